#include "law/nf4.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>

/* QLoRA appendix E: quantiles of N(0, 1), eight on the positive and seven on the negative side, and an
 * exact zero. */
const float ic_nf4_code[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

size_t ic_nf4_code_bytes(size_t count)
{
    return count / 2 + count % 2;
}

size_t ic_nf4_blocks(size_t count, unsigned block)
{
    return count / block + (count % block ? 1 : 0);
}

size_t ic_nf4_scale_blocks(size_t blocks)
{
    return ic_nf4_blocks(blocks, IC_NF4_SCALES_BLOCK);
}

size_t ic_nf4_bytes(const struct ic_nf4 *q)
{
    const size_t blocks = ic_nf4_blocks(q->count, q->block);
    return ic_nf4_code_bytes(q->count) +
           (q->absmax ? blocks * sizeof(float)
                      : blocks + ic_nf4_scale_blocks(blocks) * sizeof(float) + sizeof(float));
}

/* Index of the nearest of `n` ascending values; halfway: the lower. */
static unsigned nearest(const float *table, unsigned n, float x)
{
    unsigned lo = 0, hi = n - 1; /* the answer is in lo..hi */
    while (lo < hi) {
        const unsigned mid = (lo + hi) / 2;
        const double edge = ((double)table[mid] + (double)table[mid + 1]) / 2;
        if ((double)x > edge)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

enum ic_status ic_nf4_quantise(const float *x, size_t count, unsigned block, uint8_t *codes, float *absmax,
                               struct ic_err *err)
{
    if (block < 1 || block > IC_NF4_BLOCK_MAX)
        return ic_fail(err, IC_BAD_REQUEST, "NF4 blocks of %u values; 1 to %u", block, IC_NF4_BLOCK_MAX);
    for (size_t at = 0; at < count; at += block) {
        const size_t n = count - at < block ? count - at : block;
        float top = 0;
        for (size_t i = 0; i < n; i++) {
            if (!isfinite(x[at + i]))
                return ic_fail(err, IC_BAD_REQUEST, "value %zu is %s: NF4 has no code for it", at + i,
                               isnan(x[at + i]) ? "NaN" : "infinite");
            top = fmaxf(top, fabsf(x[at + i]));
        }
        absmax[at / block] = top;
        for (size_t i = at; i < at + n; i++) {
            const unsigned code = top > 0 ? nearest(ic_nf4_code, 16, x[i] / top) : IC_NF4_ZERO;
            if (i % 2 == 0)
                codes[i / 2] = (uint8_t)(code << 4 | (i + 1 == count ? IC_NF4_ZERO : 0));
            else
                codes[i / 2] = (uint8_t)(codes[i / 2] | code);
        }
    }
    return IC_OK;
}

/* ---- Double quantisation --------------------------------------------------------------------- */

static float dynamic[256];
static pthread_once_t dynamic_once = PTHREAD_ONCE_INIT;

static int ascending(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void make_dynamic(void)
{
    unsigned n = 0;
    double power = 1e-6;
    for (unsigned i = 0; i < 7; i++, power *= 10)
        for (unsigned k = 0, parts = 1u << i; k < parts; k++) {
            const double mid = 0.1 + 0.9 * ((double)k + 0.5) / (double)parts;
            dynamic[n++] = (float)(power * mid);
            dynamic[n++] = (float)(-power * mid);
        }
    dynamic[n++] = 0;
    dynamic[n++] = 1;
    IC_ASSERT(n == 256);
    qsort(dynamic, n, sizeof dynamic[0], ascending);
}

const float *ic_nf4_dynamic(void)
{
    pthread_once(&dynamic_once, make_dynamic);
    return dynamic;
}

void ic_nf4_quantise_absmax(const float *absmax, size_t blocks, uint8_t *codes, float *scale, float *offset)
{
    const float *table = ic_nf4_dynamic();
    double sum = 0;
    for (size_t b = 0; b < blocks; b++)
        sum += (double)absmax[b];
    const float mean = blocks ? (float)(sum / (double)blocks) : 0;
    for (size_t at = 0; at < blocks; at += IC_NF4_SCALES_BLOCK) {
        const size_t n = blocks - at < IC_NF4_SCALES_BLOCK ? blocks - at : IC_NF4_SCALES_BLOCK;
        float top = 0;
        for (size_t b = at; b < at + n; b++)
            top = fmaxf(top, fabsf(absmax[b] - mean));
        scale[at / IC_NF4_SCALES_BLOCK] = top;
        for (size_t b = at; b < at + n; b++)
            codes[b] = (uint8_t)nearest(table, 256, top > 0 ? (absmax[b] - mean) / top : 0);
    }
    *offset = mean;
}

float ic_nf4_absmax(const struct ic_nf4 *q, size_t b)
{
    if (q->absmax)
        return q->absmax[b];
    return q->absmax_offset +
           ic_nf4_dynamic()[q->absmax_codes[b]] * q->absmax_scale[b / IC_NF4_SCALES_BLOCK];
}

void ic_nf4_dequantise(const struct ic_nf4 *q, size_t from, size_t n, float *out)
{
    IC_ASSERT(from <= q->count && n <= q->count - from);
    for (size_t i = from; i < from + n;) {
        const size_t b = i / q->block;
        const size_t left = (b + 1) * q->block - i, end = from + n - i < left ? from + n : i + left;
        const float top = ic_nf4_absmax(q, b);
        for (; i < end; i++)
            *out++ = ic_nf4_code[q->codes[i / 2] >> (i % 2 ? 0 : 4) & 15] * top;
    }
}
