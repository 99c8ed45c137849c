#include "text/attention.h"

#include <math.h>
#include <pthread.h>
#include <string.h>

#include <ggml.h>

#include "text/vec.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define CELLS 64      /* of the cache, at a time */
#define QUERIES 64    /* rows times heads of a group, at a time: 64 KiB of each array below at most */
#define HEAD_MAX 256  /* elements of a head */
#define HIDDEN 0xfc00 /* -inf in 16 bits: what the mask says of a cell that a row must not see */
/* the last word of op_params: a custom operation's own are the first */
#define SCALE_AT (GGML_MAX_OP_PARAMS / sizeof(int32_t) - 1)
#define KERNEL static __attribute__((target("avx2,fma,f16c")))

/* What one thread computes with, on its stack. Rows of `d` elements, `d` being that of the head. */
struct work {
    float q[QUERIES * HEAD_MAX], out[QUERIES * HEAD_MAX]; /* out: Σ p v so far */
    float k[CELLS * HEAD_MAX], v[CELLS * HEAD_MAX];
    float max[QUERIES], sum[QUERIES]; /* of the scores seen; Σ p */
    float p[CELLS];                   /* scores, then e^(score - max) */
};

static const void *at(const struct ggml_tensor *t, int64_t i1, int64_t i2)
{
    return (const char *)t->data + (size_t)i1 * t->nb[1] + (size_t)i2 * t->nb[2];
}

/* Rows that are computed together with all heads of a group: many share what is converted, few leave work for every thread. */
static int64_t rows_together(int64_t rows, int64_t group, int64_t groups, int64_t threads)
{
    int64_t n = QUERIES / group < rows ? QUERIES / group : rows;

    while (n > 1 && groups * ((rows + n - 1) / n) < threads)
        n = (n + 1) / 2;
    return n;
}

KERNEL void convert(float *to, const struct ggml_tensor *t, int64_t cell, int64_t head, int64_t d)
{
    for (int64_t j = 0; j < CELLS; j++) {
        const char *from = at(t, cell + j, head);
        for (int64_t i = 0; i < d; i += IC_LANES)
            _mm256_storeu_ps(to + j * d + i,
                             _mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u *)(from + i * 2))));
    }
}

/* p[j] = q . k[j], eight cells at a time */
KERNEL void dots(float *p, const float *q, const float *k, int64_t d)
{
    for (int64_t j = 0; j < CELLS; j += 8) {
        __m256 a[8] = {0};
        for (int64_t i = 0; i < d; i += IC_LANES) {
            __m256 x = _mm256_loadu_ps(q + i);
#pragma GCC unroll 8
            for (int c = 0; c < 8; c++)
                a[c] = _mm256_fmadd_ps(x, _mm256_loadu_ps(k + (j + c) * d + i), a[c]);
        }
        __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
        __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
        _mm256_storeu_ps(p + j, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                                              _mm256_permute2f128_ps(low, high, 0x31)));
    }
}

/* out += Σ p[j] v[j], `n` registers of it, which start at v. What weighs nothing may be anything, so it is passed over. */
KERNEL inline __attribute__((always_inline)) void weigh(float *out, const float *p, const float *v,
                                                        int64_t d, const int n)
{
    __m256 a[8];

#pragma GCC unroll 8
    for (int i = 0; i < n; i++)
        a[i] = _mm256_loadu_ps(out + i * IC_LANES);
    for (int64_t j = 0; j < CELLS; j++, v += d) {
        if (p[j] == 0)
            continue;
        __m256 x = _mm256_set1_ps(p[j]);
#pragma GCC unroll 8
        for (int i = 0; i < n; i++)
            a[i] = _mm256_fmadd_ps(x, _mm256_loadu_ps(v + i * IC_LANES), a[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; i++)
        _mm256_storeu_ps(out + i * IC_LANES, a[i]);
}

KERNEL float highest(__m256 x)
{
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}

/* Takes 64 cells into what query `n` has seen. */
KERNEL void take_in(struct work *w, int64_t n, const uint16_t *mask, float scale, int64_t d)
{
    const __m256 never = _mm256_set1_ps(-INFINITY);
    float *out = w->out + n * d;
    ic_vec most = (ic_vec)never;

    dots(w->p, w->q + n * d, w->k, d);
    for (int64_t j = 0; j < CELLS; j += IC_LANES) {
        __m256 m = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u *)(mask + j)));
        __m256 s = _mm256_fmadd_ps(_mm256_loadu_ps(w->p + j), _mm256_set1_ps(scale), m);
        s = _mm256_blendv_ps(s, never, _mm256_cmp_ps(m, never, _CMP_EQ_OQ));
        _mm256_storeu_ps(w->p + j, s);
        ic_vec score = (ic_vec)s;
        ic_vec_greater(&most, &score);
    }
    float max = highest((__m256)most);
    if (max > w->max[n]) {
        float less = expf(w->max[n] - max); /* 0 the first time */
        w->sum[n] *= less;
        for (int64_t i = 0; i < d; i++)
            out[i] *= less;
        w->max[n] = max;
    }
    __m256 sum = _mm256_setzero_ps();
    for (int64_t j = 0; j < CELLS; j += IC_LANES) {
        __m256 s = _mm256_loadu_ps(w->p + j);
        ic_vec x = (ic_vec)_mm256_sub_ps(s, _mm256_set1_ps(w->max[n]));
        ic_vec_exp_below_zero(&x);
        __m256 e = _mm256_andnot_ps(_mm256_cmp_ps(s, never, _CMP_EQ_OQ), (__m256)x);
        _mm256_storeu_ps(w->p + j, e);
        sum = _mm256_add_ps(sum, e);
    }
    for (int i = 0; i < IC_LANES; i++)
        w->sum[n] += sum[i];
    int64_t i = 0;
    for (; i + 8 * IC_LANES <= d; i += 8 * IC_LANES)
        weigh(out + i, w->p, w->v + i, d, 8);
    for (; i < d; i += IC_LANES)
        weigh(out + i, w->p, w->v + i, d, 1);
}

static bool sees_any(const uint16_t *mask)
{
    uint16_t any = 0;

    for (int64_t j = 0; j < CELLS; j++)
        any |= mask[j] ^ HIDDEN;
    return any != 0;
}

/* Rows [from, from + rows) of all query heads that share the key head `head`. */
KERNEL void attend_group(struct ggml_tensor *dst, int64_t head, int64_t from, int64_t rows, struct work *w)
{
    const struct ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3];
    int64_t d = q->ne[0], group = q->ne[2] / k->ne[2], n = rows * group;
    float scale;

    memcpy(&scale, &dst->op_params[SCALE_AT], sizeof scale);
    for (int64_t i = 0; i < n; i++) {
        memcpy(w->q + i * d, at(q, from + i / group, head * group + i % group), (size_t)d * sizeof(float));
        w->max[i] = -INFINITY;
        w->sum[i] = 0;
    }
    memset(w->out, 0, (size_t)(n * d) * sizeof(float));
    for (int64_t cell = 0; cell < k->ne[1]; cell += CELLS) {
        bool converted = false;
        for (int64_t r = 0; r < rows; r++) {
            const uint16_t *m = (const uint16_t *)at(mask, from + r, 0) + cell;
            if (!sees_any(m))
                continue;
            if (!converted) {
                convert(w->k, k, cell, head, d);
                convert(w->v, v, cell, head, d);
                converted = true;
            }
            for (int64_t i = r * group; i < (r + 1) * group; i++)
                take_in(w, i, m, scale, d);
        }
    }
    for (int64_t i = 0; i < n; i++) {
        float *out = (float *)at(dst, head * group + i % group, from + i / group);
        float by = w->sum[i] > 0 ? 1 / w->sum[i] : 0; /* 0: a row that sees nothing */
        for (int64_t e = 0; e < d; e++)
            out[e] = w->out[i * d + e] * by;
    }
}

static void attend(struct ggml_tensor *dst, int ith, int nth, void *arg)
{
    const struct ggml_tensor *q = dst->src[0], *k = dst->src[1];
    int64_t rows = q->ne[1], groups = k->ne[2];
    int64_t step = rows_together(rows, q->ne[2] / groups, groups, nth), parts = (rows + step - 1) / step;
    struct work w;

    (void)arg;
    for (int64_t i = ith; i < groups * parts; i += nth) {
        int64_t from = i / groups * step;
        attend_group(dst, i % groups, from, rows - from < step ? rows - from : step, &w);
    }
}

/* ---- which are taken ------------------------------------------------------------------------------ */

static int32_t
    custom[GGML_MAX_OP_PARAMS / sizeof(int32_t)]; /* op_params of an operation that calls `attend` */
static bool possible;

static void prepare(void)
{
    struct ggml_context *c =
        ggml_init((struct ggml_init_params){.mem_size = 2 * ggml_tensor_overhead(), .no_alloc = true});

    if (!c)
        return;
    const struct ggml_tensor *t =
        ggml_custom_4d(c, GGML_TYPE_F32, 1, 1, 1, 1, NULL, 0, attend, GGML_N_TASKS_MAX, NULL);
    memcpy(custom, t->op_params, sizeof custom);
    ggml_free(c);
    __builtin_cpu_init();
    possible = custom[SCALE_AT] == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c");
}

static bool cells_fit(const struct ggml_tensor *t, const struct ggml_tensor *q)
{
    return t->type == GGML_TYPE_F16 && t->nb[0] == sizeof(uint16_t) && t->ne[0] == q->ne[0] &&
           t->ne[3] == 1 && t->ne[1] >= IC_ATTENTION_CELLS_MIN && t->ne[1] % CELLS == 0;
}

bool ic_attention_take(struct ggml_tensor *node, int32_t threads)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    const struct ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3];
    float p[3]; /* scale, bias by distance, cap */

    if (node->op != GGML_OP_FLASH_ATTN_EXT || !mask || node->src[4])
        return false;
    pthread_once(&once, prepare);
    memcpy(p, node->op_params, sizeof p);
    if (!possible || p[1] != 0 || p[2] != 0 || !cells_fit(k, q) || !cells_fit(v, q))
        return false;
    if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || q->ne[3] != 1 ||
        q->ne[0] % IC_LANES != 0 || q->ne[0] > HEAD_MAX || q->ne[1] > IC_ATTENTION_ROWS_MAX)
        return false;
    if (k->ne[1] != v->ne[1] || k->ne[2] != v->ne[2] || q->ne[2] % k->ne[2] != 0 ||
        q->ne[2] / k->ne[2] > QUERIES)
        return false;
    if (mask->type != GGML_TYPE_F16 || mask->ne[0] < k->ne[1] || mask->ne[1] < q->ne[1] ||
        mask->ne[2] != 1 || mask->ne[3] != 1)
        return false;
    if (node->type != GGML_TYPE_F32 || !ggml_is_contiguous(node) || k->ne[2] * q->ne[1] < threads)
        return false;
    memcpy(node->op_params, custom, sizeof custom);
    memcpy(&node->op_params[SCALE_AT], &p[0], sizeof p[0]);
    node->op = GGML_OP_CUSTOM;
    return true;
}

#else

bool ic_attention_take(struct ggml_tensor *node, int32_t threads)
{
    (void)node, (void)threads;
    return false;
}

#endif
