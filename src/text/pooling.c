#include "text/pooling.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum ic_status ic_pooling_parse(const char *name, enum ic_pooling *out, struct ic_err *err)
{
    static const char *const names[] = {
#define X(symbol, name) name,
        IC_POOLING_TABLE(X)
#undef X
    };

    *out = IC_POOLING_NONE;
    for (int i = 0; i < IC_POOLINGS && name; i++)
        if (!strcmp(name, names[i])) {
            *out = (enum ic_pooling)i;
            return IC_OK;
        }
    return !name ? IC_OK
                 : ic_fail(err, IC_BAD_REQUEST, "--pooling takes none, mean, cls or last, not \"%.40s\"",
                           name);
}

enum ic_status ic_pool_open(struct ic_pool *p, enum ic_pooling kind, int32_t n_embd, int32_t n_tokens,
                            struct ic_err *err)
{
    IC_ASSERT(kind > IC_POOLING_NONE && kind < IC_POOLINGS && n_embd > 0 && n_tokens > 0);
    *p = (struct ic_pool){.kind = kind, .n_embd = n_embd, .n_tokens = n_tokens};
    p->sum = calloc((size_t)n_embd, sizeof *p->sum);
    return p->sum ? IC_OK : ic_fail(err, IC_OOM, "out of memory");
}

void ic_pool_deinit(struct ic_pool *p)
{
    free(p->sum);
    *p = (struct ic_pool){0};
}

bool ic_pool_wants(const struct ic_pool *p, int32_t pos)
{
    if (pos < p->seen)
        return false;
    return p->kind == IC_POOLING_MEAN || pos == (p->kind == IC_POOLING_CLS ? 0 : p->n_tokens - 1);
}

void ic_pool_add(struct ic_pool *p, int32_t pos, const float *state)
{
    if (ic_pool_wants(p, pos))
        for (int32_t i = 0; i < p->n_embd; i++)
            p->sum[i] += (double)state[i];
    if (pos >= p->seen)
        p->seen = pos + 1;
}

int32_t ic_pool_may_skip(const struct ic_pool *p)
{
    if (p->kind == IC_POOLING_MEAN)
        return p->seen < p->n_tokens - 1 ? p->seen : p->n_tokens - 1;
    return p->kind == IC_POOLING_CLS && p->seen == 0 ? 0 : p->n_tokens - 1;
}

bool ic_pool_result(const struct ic_pool *p, float *out)
{
    double square = 0;

    IC_ASSERT(p->seen == p->n_tokens);
    for (int32_t i = 0; i < p->n_embd; i++)
        square += p->sum[i] * p->sum[i];
    if (!isfinite(square))
        return false;
    for (int32_t i = 0; i < p->n_embd; i++)
        out[i] = square > 0 ? (float)(p->sum[i] / sqrt(square)) : 0;
    return true;
}
