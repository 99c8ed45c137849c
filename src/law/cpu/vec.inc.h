/* A vector of IC_VW floats, whatever the instruction set: the one place where kernels differ.
 *
 * Included (through kernels.inc.h) by one .c file per instruction set, which defines IC_VW first:
 * 16 with -mavx512f…, 8 with -mavx2 -mfma, 4 with the compiler's baseline (SSE2 on x86-64, NEON on
 * aarch64). Arithmetic is GCC's vector extension; only fused multiply-add and masked loads are
 * intrinsics. Everything is static: nothing compiled for AVX-512 may be linked where another file
 * could pick it up (a plain `inline` here would be a crash on older machines).
 *
 * v_fma is fused on AVX2 and AVX-512 and is not on the baseline; hence "equal to the last bit" is
 * promised per instruction set, not between them. */
#ifndef IC_VW
#error "define IC_VW before including"
#endif

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if IC_VW > 4
#include <immintrin.h>
#endif

typedef float vf __attribute__((vector_size(IC_VW * 4)));
typedef int32_t vi __attribute__((vector_size(IC_VW * 4)));
typedef float vf_mem __attribute__((vector_size(IC_VW * 4), aligned(4), may_alias));

#define IC_INLINE static inline __attribute__((always_inline, unused))

IC_INLINE vf v_load(const float *p)
{
    return *(const vf_mem *)p;
}

IC_INLINE void v_store(float *p, vf x)
{
    *(vf_mem *)p = x;
}

IC_INLINE vf v_set1(float x)
{
#if IC_VW == 16
    return (vf)_mm512_set1_ps(x);
#elif IC_VW == 8
    return (vf)_mm256_set1_ps(x);
#else
    return (vf){x, x, x, x};
#endif
}

IC_INLINE vf v_zero(void)
{
    return (vf){0};
}

/* a * b + c */
IC_INLINE vf v_fma(vf a, vf b, vf c)
{
#if IC_VW == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif IC_VW == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

IC_INLINE vf v_max(vf a, vf b)
{
#if IC_VW == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif IC_VW == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    vi m = a > b;
    return (vf)(((vi)a & m) | ((vi)b & ~m));
#endif
}

IC_INLINE vf v_min(vf a, vf b)
{
#if IC_VW == 16
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif IC_VW == 8
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    vi m = a < b;
    return (vf)(((vi)a & m) | ((vi)b & ~m));
#endif
}

/* The first n (0..IC_VW) floats; the others read as 0 and are not touched. */
IC_INLINE vf v_load_n(const float *p, unsigned n)
{
#if IC_VW == 16
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1u), p);
#else
    if (n >= IC_VW)
        return v_load(p);
    vf x = v_zero();
    memcpy(&x, p, n * sizeof(float));
    return x;
#endif
}

IC_INLINE void v_store_n(float *p, vf x, unsigned n)
{
#if IC_VW == 16
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1u), (__m512)x);
#else
    if (n >= IC_VW)
        v_store(p, x);
    else
        memcpy(p, &x, n * sizeof(float));
#endif
}

/* Sum of the lanes, always in the same order: halves onto each other. */
IC_INLINE float v_sum(vf x)
{
#if IC_VW > 4
#if IC_VW == 16
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
#else
    __m256 h = (__m256)x;
#endif
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
#else
    return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

IC_INLINE vf v_sqrt(vf x)
{
#if IC_VW == 16
    return (vf)_mm512_sqrt_ps((__m512)x);
#elif IC_VW == 8
    return (vf)_mm256_sqrt_ps((__m256)x);
#else
    return (vf){__builtin_sqrtf(x[0]), __builtin_sqrtf(x[1]), __builtin_sqrtf(x[2]), __builtin_sqrtf(x[3])};
#endif
}

/* e^x for x in [-87, 88], below clamped to e^-87 (1.6e-38; nobody adds it to anything it could move).
 * Cody-Waite reduction, then a polynomial of degree 6 of our own fit (weighted minimax of
 * (e^r - 1 - r) / r^2 on |r| <= ln2/2, error 3e-9 of e^r, a twentieth of an ulp). Whole: < 1.5 ulp. */
IC_INLINE vf v_exp(vf x)
{
    const vf magic = v_set1(0x1.8p23f); /* adding it rounds to an integer, kept in the low mantissa bits */
    x = v_max(x, v_set1(-87.0f));
    vf t = v_fma(x, v_set1(0x1.715476p0f), magic);
    vf n = t - magic;
    vf r = v_fma(n, v_set1(-0x1.62e4p-1f), x);
    r = v_fma(n, v_set1(-0x1.7f7d1cp-20f), r);
    vf q = v_fma(v_set1(0x1.6a2438p-10f), r, v_set1(0x1.1239eap-7f));
    q = v_fma(q, r, v_set1(0x1.5558f2p-5f));
    q = v_fma(q, r, v_set1(0x1.555492p-3f));
    q = v_fma(q, r, v_set1(0x1.fffffcp-2f));
    vf p = v_fma(r * r, q, r) + v_set1(1.0f);
    return (vf)((vi)p + ((vi)t << 23)); /* p in [0.7, 1.42]: the exponent field takes n */
}

/* x > 0 ? x : e^x - 1, without a branch: one of the two terms is exactly 0. The order of operands lets
 * a NaN through. */
IC_INLINE vf v_elu(vf x)
{
    return v_max(v_zero(), x) + (v_exp(v_min(x, v_zero())) - v_set1(1.0f));
}

IC_INLINE vf v_sigmoid(vf x)
{
    x = v_max(v_min(x, v_set1(80.0f)), v_set1(-80.0f));
    return v_set1(1.0f) / (v_set1(1.0f) + v_exp(-x));
}

/* (1 - e^-2|x|) / (1 + e^-2|x|) with the sign of x; absolute error 1e-7. */
IC_INLINE vf v_tanh(vf x)
{
    const vi sign = (vi)x & (vi)v_set1(-0.0f);
    vf ax = (vf)((vi)x ^ sign);
    vf e = v_exp(ax * v_set1(-2.0f));
    vf y = (v_set1(1.0f) - e) / (v_set1(1.0f) + e);
    return (vf)((vi)y | sign);
}

/* Pairs (re, im) interleaved: the product of two complex vectors. */
IC_INLINE vf v_cmul(vf a, vf b)
{
#if IC_VW == 16
    vf re = (vf)_mm512_moveldup_ps((__m512)a), im = (vf)_mm512_movehdup_ps((__m512)a);
    vf sw = (vf)_mm512_permute_ps((__m512)b, 0xb1);
    return (vf)_mm512_fmaddsub_ps((__m512)re, (__m512)b, (__m512)(im * sw));
#elif IC_VW == 8
    vf re = (vf)_mm256_moveldup_ps((__m256)a), im = (vf)_mm256_movehdup_ps((__m256)a);
    vf sw = (vf)_mm256_permute_ps((__m256)b, 0xb1);
    return (vf)_mm256_fmaddsub_ps((__m256)re, (__m256)b, (__m256)(im * sw));
#else
    vf re = __builtin_shuffle(a, (vi){0, 0, 2, 2}), im = __builtin_shuffle(a, (vi){1, 1, 3, 3});
    vf sw = __builtin_shuffle(b, (vi){1, 0, 3, 2});
    return re * b + im * sw * (vf){-1.0f, 1.0f, -1.0f, 1.0f};
#endif
}
