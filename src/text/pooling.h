/* One vector of a text: what the model holds behind the last layer at each of its tokens, pooled, at length 1. Pure, no
 * thread; one owner at a time. */
#ifndef IC_TEXT_POOLING_H
#define IC_TEXT_POOLING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* X(symbol, name): none; the mean of all tokens; the first one's; the last one's */
#define IC_POOLING_TABLE(X) X(NONE, "none") X(MEAN, "mean") X(CLS, "cls") X(LAST, "last")
enum ic_pooling {
#define X(symbol, name) IC_POOLING_##symbol,
    IC_POOLING_TABLE(X)
#undef X
        IC_POOLINGS
};

/* NULL: IC_POOLING_NONE. IC_BAD_REQUEST names those that there are. */
enum ic_status ic_pooling_parse(const char *name, enum ic_pooling *out, struct ic_err *err);

/* Of one text of n_tokens tokens. Zeros: nothing is pooled. */
struct ic_pool {
    enum ic_pooling kind;
    int32_t n_embd, n_tokens;
    int32_t seen; /* positions [0, seen) are in the sum, or not wanted */
    double *sum;  /* n_embd */
};

/* kind: not NONE. IC_OOM. */
enum ic_status ic_pool_open(struct ic_pool *p, enum ic_pooling kind, int32_t n_embd, int32_t n_tokens,
                            struct ic_err *err);
void ic_pool_deinit(struct ic_pool *p);
/* Whether the hidden state at `pos` is still wanted. What is computed twice (after a preemption) is not. */
bool ic_pool_wants(const struct ic_pool *p, int32_t pos);
/* Positions rise from call to call. `state`: n_embd numbers where it is wanted, else not looked at. */
void ic_pool_add(struct ic_pool *p, int32_t pos, const float *state);
/* The first so many tokens need not be computed here: cells of others, which have no hidden states, will do for them. */
int32_t ic_pool_may_skip(const struct ic_pool *p);
/* After the last token: n_embd numbers of length 1; all 0 where the model gives nothing else. False: they are not finite. */
bool ic_pool_result(const struct ic_pool *p, float *out);

#endif
