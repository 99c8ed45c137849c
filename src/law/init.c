#include "law/init.h"

/* The same state everywhere means no fused multiply-add behind our back: aarch64 compilers contract by
 * default, x86 ones as soon as they may use FMA. */
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <math.h>
#include <string.h>

static const char *const init_names[] = {
#define X(symbol, name, help) name,
    IC_LAW_INIT_TABLE(X)
#undef X
};

const char *ic_law_init_name(enum ic_law_init_mode mode)
{
    return (unsigned)mode < IC_LAW_INIT_COUNT ? init_names[mode] : "unknown";
}

enum ic_status ic_law_init_parse(const char *name, enum ic_law_init_mode *mode, struct ic_err *err)
{
    if (!name) {
        *mode = IC_LAW_INIT_COMPLEX_NOISE;
        return IC_OK;
    }
    for (unsigned i = 0; i < IC_LAW_INIT_COUNT; i++) {
        if (strcmp(name, init_names[i]) == 0) {
            *mode = (enum ic_law_init_mode)i;
            return IC_OK;
        }
    }
    return ic_fail(err, IC_BAD_REQUEST, "init '%.40s' is unknown (complex_noise, random, zeros)", name);
}

/* ---- Elementary functions from basic operations only ---- */

/* ln x for normal x > 0: x = m 2^e with m in [sqrt(1/2), sqrt 2), then the series of
 * 2 atanh((m-1)/(m+1)). The argument is below 0.172, so 11 terms reach double precision. */
static const double odd_inverse[] = {1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11,
                                     1.0 / 9,  1.0 / 7,  1.0 / 5,  1.0 / 3,  1.0};

static double det_log(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    int e = (int)(bits >> 52) - 1023;
    bits = (bits & 0xFFFFFFFFFFFFFull) | 0x3FF0000000000000ull;
    double m;
    memcpy(&m, &bits, sizeof m);
    if (m > 1.4142135623730951) {
        m *= 0.5;
        e++;
    }
    double s = (m - 1) / (m + 1), s2 = s * s, sum = 0;
    for (size_t i = 0; i < sizeof odd_inverse / sizeof *odd_inverse; i++)
        sum = sum * s2 + odd_inverse[i];
    return 2 * s * sum + (double)e * 0.69314718055994530942;
}

/* cos and sin of |x| <= 1 by their power series (1/k! with alternating signs, highest first); the first
 * term left out is below 1e-20. */
static const double cos_series[] = {1 / 2432902008176640000.0,
                                    -1 / 6402373705728000.0,
                                    1 / 20922789888000.0,
                                    -1 / 87178291200.0,
                                    1 / 479001600.0,
                                    -1 / 3628800.0,
                                    1 / 40320.0,
                                    -1 / 720.0,
                                    1 / 24.0,
                                    -1 / 2.0,
                                    1.0};
static const double sin_series[] = {1 / 51090942171709440000.0,
                                    -1 / 121645100408832000.0,
                                    1 / 355687428096000.0,
                                    -1 / 1307674368000.0,
                                    1 / 6227020800.0,
                                    -1 / 39916800.0,
                                    1 / 362880.0,
                                    -1 / 5040.0,
                                    1 / 120.0,
                                    -1 / 6.0,
                                    1.0};

static void det_sincos(double x, double *s, double *c)
{
    double x2 = x * x, sn = 0, cs = 0;
    for (size_t i = 0; i < sizeof cos_series / sizeof *cos_series; i++) {
        cs = cs * x2 + cos_series[i];
        sn = sn * x2 + sin_series[i];
    }
    *c = cs;
    *s = x * sn;
}

/* cos and sin of 2 pi u, u in [0, 1): eighths of a turn come off exactly, the rest is below 0.4. */
static void det_sincos_turn(double u, double *s, double *c)
{
    const double half = 0.70710678118654752440;
    int eighth = (int)(u * 8 + 0.5);
    double sr, cr;
    det_sincos((u * 8 - eighth) * 0.78539816339744830962, &sr, &cr);
    switch (eighth & 7) {
    case 0: *c = cr, *s = sr; break;
    case 1: *c = (cr - sr) * half, *s = (cr + sr) * half; break;
    case 2: *c = -sr, *s = cr; break;
    case 3: *c = -(cr + sr) * half, *s = (cr - sr) * half; break;
    case 4: *c = -cr, *s = -sr; break;
    case 5: *c = (sr - cr) * half, *s = -(cr + sr) * half; break;
    case 6: *c = sr, *s = -cr; break;
    default: *c = (cr + sr) * half, *s = (sr - cr) * half; break;
    }
}

/* ---- Philox4x32-10 ---- */

void ic_law_rng_bits(uint64_t seed, uint32_t stream, uint64_t index, uint32_t out[4])
{
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32), c2 = stream, c3 = 0;

    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

static double unit_open(uint32_t lo, uint32_t hi)
{
    uint64_t u = (((uint64_t)hi << 32) | lo) >> 12; /* 52 bits, so that the half below is exact */
    return ((double)u + 0.5) * 0x1p-52;
}

void ic_law_rng_uniform2(uint64_t seed, uint32_t stream, uint64_t index, double out[2])
{
    uint32_t r[4];
    ic_law_rng_bits(seed, stream, index, r);
    out[0] = unit_open(r[0], r[1]);
    out[1] = unit_open(r[2], r[3]);
}

void ic_law_rng_normal2(uint64_t seed, uint32_t stream, uint64_t index, double out[2])
{
    double u[2], s, c;
    ic_law_rng_uniform2(seed, stream, index, u);
    double radius = sqrt(-2 * det_log(u[0]));
    det_sincos_turn(u[1], &s, &c);
    out[0] = radius * c;
    out[1] = radius * s;
}

/* ---- States ---- */

static void fill_complex_noise(float *psi, size_t values, uint64_t seed)
{
    for (size_t i = 0; i < values; i++) {
        double n[2], s, c;
        ic_law_rng_normal2(seed, IC_LAW_STREAM_COMPLEX_NOISE, i, n);
        det_sincos(n[0] * 0.1, &s, &c); /* |n| < 0.87 */
        psi[2 * i] = (float)c;
        psi[2 * i + 1] = (float)s;
    }
}

static void fill_random_cell(float *cell, size_t d, size_t first, uint64_t seed)
{
    double norm2 = 0, n[2];

    for (size_t k = 0; k < d; k++) {
        ic_law_rng_normal2(seed, IC_LAW_STREAM_RANDOM, first + k, n);
        cell[2 * k] = (float)n[0];
        cell[2 * k + 1] = (float)n[1];
        norm2 += n[0] * n[0] + n[1] * n[1];
    }
    if (!(norm2 > 0)) { /* no direction to keep */
        cell[0] = 1;
        return;
    }
    double norm = sqrt(norm2);
    for (size_t i = 0; i < 2 * d; i++)
        cell[i] = (float)((double)cell[i] / norm);
}

enum ic_status ic_law_init_fill(float *psi, struct ic_law_shape shape, enum ic_law_init_mode mode,
                                uint64_t seed, struct ic_err *err)
{
    if (!ic_law_shape_ok(shape))
        return ic_fail(err, IC_BAD_REQUEST, "a state of %zux%zu cells and %zu channels is out of range",
                       shape.h, shape.w, shape.d);
    size_t cells = shape.h * shape.w;
    switch (mode) {
    case IC_LAW_INIT_COMPLEX_NOISE: fill_complex_noise(psi, cells * shape.d, seed); return IC_OK;
    case IC_LAW_INIT_RANDOM:
        for (size_t i = 0; i < cells; i++)
            fill_random_cell(psi + i * shape.d * 2, shape.d, i * shape.d, seed);
        return IC_OK;
    case IC_LAW_INIT_ZEROS: memset(psi, 0, cells * shape.d * 2 * sizeof *psi); return IC_OK;
    case IC_LAW_INIT_COUNT: break;
    }
    return ic_fail(err, IC_BAD_REQUEST, "init mode %d is unknown", (int)mode);
}
