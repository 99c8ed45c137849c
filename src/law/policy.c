#include "law/policy.h"

#include <stdio.h>
#include <string.h>

static const char *const names[IC_LAW_PRECISION_COUNT] = {
#define X(symbol, name) name,
    IC_LAW_PRECISIONS(X)
#undef X
};

/* What NF4 and bfloat16 leave alone unless told otherwise: the first and the last block, and the output. */
static const char *const kept[IC_LAW_ARCH_COUNT][4] = {
    [IC_LAW_UNET] = {"inc", "conv_up2", "outc"},
    [IC_LAW_UNET_UNITARY] = {"inc", "conv_up2", "outc"},
    [IC_LAW_UNET_UNITARY_RMSNORM] = {"inc", "conv_up2", "outc"},
    [IC_LAW_UNET_CONVLSTM] = {"inc", "conv_up2", "outc"},
    [IC_LAW_MLP] = {"net.0", "net.4"},
    [IC_LAW_DEEP_QCA] = {"conv_neighbors", "processing_net.0", "processing_net.4"},
    [IC_LAW_SNN_UNET] = {"conv1", "conv2", "conv_out"},
};

const char *ic_law_precision_name(enum ic_law_precision p)
{
    return (unsigned)p < IC_LAW_PRECISION_COUNT ? names[p] : "?";
}

static bool precision_by_name(const char *name, size_t len, enum ic_law_precision *out)
{
    for (unsigned i = 0; i < IC_LAW_PRECISION_COUNT; i++)
        if (strlen(names[i]) == len && memcmp(names[i], name, len) == 0)
            return *out = (enum ic_law_precision)i, true;
    return false;
}

static enum ic_status add_rule(struct ic_law_policy *p, const char *text, size_t len, struct ic_err *err)
{
    const char *eq = memchr(text, '=', len);
    const size_t layer = eq ? (size_t)(eq - text) : 0;
    if (p->rules == IC_LAW_POLICY_RULES_MAX)
        return ic_fail(err, IC_TOO_LARGE, "policy: more than %d exceptions", IC_LAW_POLICY_RULES_MAX);
    if (layer < 1 || layer >= IC_LAW_TENSOR_NAME_MAX)
        return ic_fail(err, IC_BAD_REQUEST, "policy: \"%.*s\" is not LAYER=PRECISION",
                       (int)(len < 80 ? len : 80), text);
    memcpy(p->rule[p->rules].layer, text, layer);
    if (!precision_by_name(eq + 1, len - layer - 1, &p->rule[p->rules].precision))
        return ic_fail(err, IC_BAD_REQUEST, "policy: \"%.*s\": precision is fp32, fp16, bf16 or nf4",
                       (int)(len < 80 ? len : 80), text);
    p->rules++;
    return IC_OK;
}

enum ic_status ic_law_policy_parse(const char *precision, const char *rules, struct ic_law_policy *out,
                                   struct ic_err *err)
{
    *out = (struct ic_law_policy){.base = IC_LAW_FP32};
    out->twice = strcmp(precision, "nf4dq") == 0;
    if (out->twice)
        out->base = IC_LAW_NF4;
    else if (!precision_by_name(precision, strlen(precision), &out->base))
        return ic_fail(err, IC_BAD_REQUEST, "precision is fp32, fp16, bf16, nf4 or nf4dq, not \"%.60s\"",
                       precision);
    enum ic_status s = IC_OK;
    while (rules && *rules && s == IC_OK) {
        const size_t len = strcspn(rules, ",");
        s = add_rule(out, rules, len, err);
        rules += len + (rules[len] == ',');
    }
    return s;
}

/* "bot" fits "bot.conv_block.0.weight"; "bot.conv" does not. */
static bool fits(const char *layer, const struct ic_law_spec *spec)
{
    const size_t n = strlen(layer);
    if (strcmp(layer, "all") == 0)
        return true;
    return strncmp(layer, spec->name, n) == 0 && spec->name[n] == '.';
}

enum ic_status ic_law_policy_check(const struct ic_law_policy *p, enum ic_law_arch arch, struct ic_err *err)
{
    struct ic_law_spec specs[IC_LAW_SPECS_MAX];
    const size_t n = ic_law_arch_specs(arch, 1, 1, specs); /* the names do not depend on the sizes */
    for (unsigned r = 0; r < p->rules; r++) {
        bool found = false;
        for (size_t i = 0; i < n && !found; i++)
            found = specs[i].ndim == 4 && fits(p->rule[r].layer, &specs[i]);
        if (found)
            continue;
        char list[128] = "", last[IC_LAW_TENSOR_NAME_MAX] = "", block[IC_LAW_TENSOR_NAME_MAX];
        for (size_t i = 0, at = 0; i < n && at < sizeof list; i++) { /* blocks: layers would not fit */
            snprintf(block, sizeof block, "%.*s", (int)strcspn(specs[i].name, "."), specs[i].name);
            if (specs[i].ndim != 4 || strcmp(block, last) == 0)
                continue;
            at += (size_t)snprintf(list + at, sizeof list - at, " %s", block);
            memcpy(last, block, sizeof last);
        }
        return ic_fail(err, IC_BAD_REQUEST, "policy: %s has no layer %s; it has%s",
                       ic_law_arch_info(arch)->name, p->rule[r].layer, list);
    }
    return IC_OK;
}

static enum ic_law_precision decide(const struct ic_law_policy *p, enum ic_law_arch arch,
                                    const struct ic_law_spec *spec, bool keeps)
{
    if (spec->ndim != 4)
        return IC_LAW_FP32;
    enum ic_law_precision found = p->base;
    for (size_t i = 0; keeps && i < 4 && kept[arch][i]; i++)
        if (fits(kept[arch][i], spec))
            found = IC_LAW_FP32;
    for (unsigned r = 0; r < p->rules; r++)
        if (fits(p->rule[r].layer, spec))
            found = p->rule[r].precision;
    return found;
}

enum ic_law_precision ic_law_policy_of(const struct ic_law_policy *p, enum ic_law_arch arch,
                                       const struct ic_law_spec *spec)
{
    return decide(p, arch, spec, p->base == IC_LAW_NF4 || p->base == IC_LAW_BF16);
}

bool ic_law_policy_takes(const struct ic_law_policy *p, enum ic_law_arch arch,
                         const struct ic_law_spec *spec, enum ic_law_precision stored)
{
    return stored == ic_law_policy_of(p, arch, spec) || stored == decide(p, arch, spec, false);
}
