/* Which precision each layer's weights are kept in.
 *
 * A policy is a precision for the law and exceptions for named layers. Only convolution weights (four
 * dimensions) are ever reduced: norms, biases and thresholds stay float32. Under nf4 and bf16 the backbone
 * is reduced while the first and last block and the output keep float32: on ginzburg-landau that is 97 % of
 * the parameters in 4 bits at a fortieth of the one-step error that NF4 everywhere has, and bfloat16 everywhere
 * shifts its emergence metrics by up to 6 % (docs/law-decisions.md). fp16 applies to every layer. Exceptions
 * are written
 *     LAYER=PRECISION[,LAYER=PRECISION…]
 * where LAYER is a weight's name without ".weight" ("conv_up1.conv_block.0"), a block that it begins with
 * ("conv_up1"), or "all"; the last one that fits a layer decides.
 *
 * Pure; any thread. */
#ifndef IC_LAW_POLICY_H
#define IC_LAW_POLICY_H

#include <stdbool.h>

#include "base/status.h"
#include "law/arch.h"

/* X(symbol, name) */
#define IC_LAW_PRECISIONS(X)                                                                               \
    X(FP32, "fp32")                                                                                        \
    X(FP16, "fp16")                                                                                        \
    X(BF16, "bf16")                                                                                        \
    X(NF4, "nf4")

enum ic_law_precision {
#define X(symbol, name) IC_LAW_##symbol,
    IC_LAW_PRECISIONS(X)
#undef X
        IC_LAW_PRECISION_COUNT
};

#define IC_LAW_POLICY_RULES_MAX 48

struct ic_law_policy {
    enum ic_law_precision base;
    bool twice; /* NF4 with its absmax quantised too ("nf4dq") */
    unsigned rules;
    struct {
        char layer[IC_LAW_TENSOR_NAME_MAX];
        enum ic_law_precision precision;
    } rule[IC_LAW_POLICY_RULES_MAX];
};

const char *ic_law_precision_name(enum ic_law_precision p);

/* precision: a name of the table, or "nf4dq"; rules: exceptions as above, or NULL. BAD_REQUEST names what
 * makes no sense; TOO_LARGE: past IC_LAW_POLICY_RULES_MAX. */
enum ic_status ic_law_policy_parse(const char *precision, const char *rules, struct ic_law_policy *out,
                                   struct ic_err *err);

/* BAD_REQUEST where a rule names no layer of the architecture; the message lists those there are. */
enum ic_status ic_law_policy_check(const struct ic_law_policy *p, enum ic_law_arch arch,
                                   struct ic_err *err);

/* The precision of one tensor of the architecture. */
enum ic_law_precision ic_law_policy_of(const struct ic_law_policy *p, enum ic_law_arch arch,
                                       const struct ic_law_spec *spec);

/* Whether a quantised file that holds the tensor in `stored` is what the policy asks for: as it would be kept, or
 * in the law's own precision where nothing but the defaults is against it (a file made with all=bf16). */
bool ic_law_policy_takes(const struct ic_law_policy *p, enum ic_law_arch arch,
                         const struct ic_law_spec *spec, enum ic_law_precision stored);

#endif
