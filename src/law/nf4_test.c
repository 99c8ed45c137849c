/* NF4 against its definition and bitsandbytes' own test value. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <stdbool.h>

#include "law/init.h"
#include "law/nf4.h"

#define MANY ((size_t)1 << 20)

static float *normals(size_t n, uint64_t seed)
{
    float *x = malloc(n * sizeof *x);
    assert_non_null(x);
    for (size_t i = 0; i < n; i += 2) {
        double v[2];
        ic_law_rng_normal2(seed, 0, i / 2, v);
        x[i] = (float)v[0];
        if (i + 1 < n)
            x[i + 1] = (float)v[1];
    }
    return x;
}

struct made {
    struct ic_nf4 q;
    uint8_t *codes, *codes8;
    float *absmax, *scale;
};

/* Every buffer has exactly its documented size, so that a step past it is the sanitiser's to see. */
static struct made make(const float *x, size_t n, unsigned block, bool twice)
{
    const size_t blocks = ic_nf4_blocks(n, block);
    struct made m = {.codes = malloc(ic_nf4_code_bytes(n) + (n == 0)),
                     .codes8 = malloc(blocks + 1),
                     .absmax = malloc(blocks * sizeof(float) + (n == 0)),
                     .scale = malloc(ic_nf4_scale_blocks(blocks) * sizeof(float) + (n == 0))};
    struct ic_err err = {0};
    assert_int_equal(ic_nf4_quantise(x, n, block, m.codes, m.absmax, &err), IC_OK);
    m.q = (struct ic_nf4){.count = n, .block = block, .codes = m.codes, .absmax = m.absmax};
    if (twice) {
        ic_nf4_quantise_absmax(m.absmax, blocks, m.codes8, m.scale, &m.q.absmax_offset);
        m.q.absmax = NULL;
        m.q.absmax_codes = m.codes8;
        m.q.absmax_scale = m.scale;
    }
    return m;
}

static void drop(struct made *m)
{
    free(m->codes);
    free(m->codes8);
    free(m->absmax);
    free(m->scale);
}

static double mean_error(const float *x, size_t n, unsigned block, bool twice, double *bits)
{
    struct made m = make(x, n, block, twice);
    float *y = malloc(n * sizeof *y);
    double sum = 0;
    assert_non_null(y);
    ic_nf4_dequantise(&m.q, 0, n, y);
    for (size_t i = 0; i < n; i++)
        sum += fabs((double)x[i] - (double)y[i]);
    *bits = 8.0 * (double)ic_nf4_bytes(&m.q) / (double)n;
    free(y);
    drop(&m);
    return sum / (double)n;
}

/* A million samples leave about 6e-5 of statistical error. */
static void error_on_normal_data(void **state)
{
    double bits, at64, at32, twice;
    float *x = normals(MANY, 5);
    (void)state;
    at64 = mean_error(x, MANY, 64, false, &bits);
    assert_true(fabs(at64 - 0.0728) < 0.0002);
    assert_true(bits == 4.5);
    at32 = mean_error(x, MANY, 32, false, &bits);
    assert_true(fabs(at32 - 0.0677) < 0.0002);
    assert_true(bits == 5);
    twice = mean_error(x, MANY, 64, true, &bits);
    assert_true(fabs(bits - 4.127) < 0.0005);
    assert_true(fabs(twice - at64) < 0.0003); /* the second quantisation is nearly free */
    free(x);
}

static void codebook(void **state)
{
    (void)state;
    assert_true(ic_nf4_code[0] == -1 && ic_nf4_code[15] == 1 && ic_nf4_code[IC_NF4_ZERO] == 0);
    for (int i = 1; i < 16; i++)
        assert_true(ic_nf4_code[i] > ic_nf4_code[i - 1]);
    const float *t = ic_nf4_dynamic();
    for (int i = 1; i < 256; i++)
        assert_true(t[i] > t[i - 1]);
    assert_true(t[255] == 1 && t[127] == 0);
    assert_true(fabsf(t[254] - 0.99296875f) < 1e-6f && fabsf(t[0] + 0.99296875f) < 1e-6f);
    assert_true(fabsf(t[128] - 5.5e-7f) < 1e-12f);
}

/* What the codebook can say comes back exactly; the first value sits in the high nibble. */
static void exact_values(void **state)
{
    float x[64], y[64];
    (void)state;
    for (int i = 0; i < 64; i++)
        x[i] = 3 * ic_nf4_code[(i * 7) % 16];
    struct made m = make(x, 64, 64, false);
    assert_int_equal(m.codes[0], 0x07);
    assert_int_equal(m.codes[1], 0xe5);
    ic_nf4_dequantise(&m.q, 0, 64, y);
    for (int i = 0; i < 64; i++)
        assert_true(x[i] == y[i]);
    drop(&m);
}

/* The nearest code, and the lower one halfway. */
static void nearest_code(void **state)
{
    (void)state;
    for (int i = 0; i < 15; i++) {
        const float mid = (float)(((double)ic_nf4_code[i] + (double)ic_nf4_code[i + 1]) / 2);
        for (int k = -2; k <= 2; k++) {
            const float x[2] = {mid + (float)k * 1e-3f, 1};
            struct made m = make(x, 2, 64, false);
            if (k)
                assert_int_equal(m.codes[0] >> 4, k < 0 ? i : i + 1);
            drop(&m);
        }
    }
    struct made m = make((float[]){0.5f * ic_nf4_code[8], 1}, 2, 64, false);
    assert_int_equal(m.codes[0] >> 4, IC_NF4_ZERO);
    drop(&m);
}

static void odd_sizes(void **state)
{
    static const size_t sizes[] = {0, 1, 2, 3, 63, 64, 65, 127, 129, 1000};
    (void)state;
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++)
        for (int twice = 0; twice < 2; twice++) {
            const size_t n = sizes[s];
            float *x = normals(n + 1, s), *y = malloc(n * sizeof *y + 1), *z = malloc(n * sizeof *z + 1);
            struct made m = make(x, n, 64, twice);
            ic_nf4_dequantise(&m.q, 0, n, y);
            for (size_t i = 0; i < n; i++) {
                const float top = ic_nf4_absmax(&m.q, i / 64);
                /* half the widest gap of the codebook, and what the second quantisation may add */
                assert_true(fabsf(x[i] - y[i]) <= 0.153f * top + (twice ? 0.1f : 0));
                ic_nf4_dequantise(&m.q, i, n - i, z); /* from anywhere */
                assert_memory_equal(z, y + i, (n - i) * sizeof *z);
            }
            if (n % 2)
                assert_int_equal(m.codes[n / 2] & 15, IC_NF4_ZERO);
            free(x);
            free(y);
            free(z);
            drop(&m);
        }
}

static void zeros_and_extremes(void **state)
{
    float x[130] = {0}, y[130];
    (void)state;
    x[64] = -1e38f; /* the second block; the first and the tail stay zero */
    x[65] = 1e-38f;
    struct made m = make(x, 130, 64, false);
    ic_nf4_dequantise(&m.q, 0, 130, y);
    assert_true(m.absmax[0] == 0 && m.absmax[2] == 0 && y[64] == -1e38f && y[65] == 0);
    for (int i = 0; i < 130; i++)
        assert_true(isfinite(y[i]) && (i == 64 || y[i] == 0));
    assert_int_equal(m.codes[0], 0x77);
    drop(&m);
    m = make(x, 64, 64, true); /* zeros, twice quantised */
    ic_nf4_dequantise(&m.q, 0, 64, y);
    for (int i = 0; i < 64; i++)
        assert_true(y[i] == 0);
    drop(&m);
}

static void no_code_for_nan(void **state)
{
    float x[70] = {0}, absmax[2];
    uint8_t codes[35];
    struct ic_err err = {0};
    (void)state;
    x[66] = (float)NAN;
    assert_int_equal(ic_nf4_quantise(x, 70, 64, codes, absmax, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "value 66 is NaN"));
    x[66] = -(float)INFINITY;
    assert_int_equal(ic_nf4_quantise(x, 70, 64, codes, absmax, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "infinite"));
    assert_int_equal(ic_nf4_quantise(x, 60, 0, codes, absmax, &err), IC_BAD_REQUEST);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(error_on_normal_data),
        cmocka_unit_test(codebook),
        cmocka_unit_test(exact_values),
        cmocka_unit_test(nearest_code),
        cmocka_unit_test(odd_sizes),
        cmocka_unit_test(zeros_and_extremes),
        cmocka_unit_test(no_code_for_nan),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
