#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "law/init.h"

static float *new_state(struct ic_law_shape s)
{
    float *psi = malloc(ic_law_shape_floats(s) * sizeof *psi);
    assert_non_null(psi);
    memset(psi, 0xFF, ic_law_shape_floats(s) * sizeof *psi);
    return psi;
}

/* Known answers published with the generator (Random123, philox4x32-10). */
static void philox_gives_the_published_answers(void **state)
{
    uint32_t r[4];
    (void)state;
    ic_law_rng_bits(0, 0, 0, r);
    assert_int_equal(r[0], 0x6627e8d5u);
    assert_int_equal(r[1], 0xe169c58du);
    assert_int_equal(r[2], 0xbc57ac4cu);
    assert_int_equal(r[3], 0x9b00dbd8u);
}

static void numbers_depend_on_every_name_part(void **state)
{
    uint32_t a[4], b[4];
    (void)state;
    ic_law_rng_bits(7, 1, 2, a);
    ic_law_rng_bits(7 + (1ull << 32), 1, 2, b);
    assert_memory_not_equal(a, b, sizeof a);
    ic_law_rng_bits(7, 2, 2, b);
    assert_memory_not_equal(a, b, sizeof a);
    ic_law_rng_bits(7, 1, 2 + (1ull << 32), b);
    assert_memory_not_equal(a, b, sizeof a);
    ic_law_rng_bits(7, 1, 2, b);
    assert_memory_equal(a, b, sizeof a);
}

static void normals_agree_with_box_muller_by_libm(void **state)
{
    (void)state;
    for (uint64_t i = 0; i < 20000; i++) {
        double u[2], n[2];
        ic_law_rng_uniform2(5, 3, i, u);
        ic_law_rng_normal2(5, 3, i, n);
        assert_true(u[0] > 0 && u[0] < 1 && u[1] > 0 && u[1] < 1);
        double r = sqrt(-2 * log(u[0]));
        assert_true(fabs(n[0] - r * cos(2 * M_PI * u[1])) < 1e-14 * 20);
        assert_true(fabs(n[1] - r * sin(2 * M_PI * u[1])) < 1e-14 * 20);
    }
}

/* Mean, variance, skewness, kurtosis and pair correlation within 5 standard errors; the seed is fixed, so
 * this is no gamble. */
static void normals_are_standard(void **state)
{
    const double n = 200000;
    double m1 = 0, m2 = 0, m3 = 0, m4 = 0, cross = 0, beyond = 0;
    (void)state;
    for (uint64_t i = 0; i < (uint64_t)n; i++) {
        double v[2];
        ic_law_rng_normal2(42, 9, i, v);
        cross += v[0] * v[1];
        for (int j = 0; j < 2; j++) {
            m1 += v[j], m2 += v[j] * v[j], m3 += v[j] * v[j] * v[j], m4 += v[j] * v[j] * v[j] * v[j];
            beyond += fabs(v[j]) > 1.959963984540054;
        }
    }
    double se = 1 / sqrt(2 * n);
    assert_true(fabs(m1 / (2 * n)) < 5 * se);
    assert_true(fabs(m2 / (2 * n) - 1) < 5 * se * sqrt(2));
    assert_true(fabs(m3 / (2 * n)) < 5 * se * sqrt(15));
    assert_true(fabs(m4 / (2 * n) - 3) < 5 * se * sqrt(96));
    assert_true(fabs(beyond / (2 * n) - 0.05) < 5 * se * sqrt(0.05 * 0.95));
    assert_true(fabs(cross / n) < 5 / sqrt(n));
}

static void complex_noise_has_unit_channels_and_narrow_phases(void **state)
{
    struct ic_law_shape s = {40, 52, 5};
    float *psi = new_state(s);
    double m1 = 0, m2 = 0, n = (double)(s.h * s.w * s.d);
    (void)state;
    assert_int_equal(ic_law_init_fill(psi, s, IC_LAW_INIT_COMPLEX_NOISE, 3, NULL), IC_OK);
    for (size_t i = 0; i < s.h * s.w * s.d; i++) {
        double re = (double)psi[2 * i], im = (double)psi[2 * i + 1];
        assert_true(fabs(re * re + im * im - 1) < 2.5e-7);
        m1 += atan2(im, re);
        m2 += atan2(im, re) * atan2(im, re);
    }
    assert_true(fabs(m1 / n) < 5 * 0.1 / sqrt(n));
    assert_true(fabs(m2 / n / 0.01 - 1) < 5 * sqrt(2 / n));
    free(psi);
}

static void random_cells_have_unit_norm_and_no_direction(void **state)
{
    struct ic_law_shape s = {36, 44, 3};
    float *psi = new_state(s);
    double mean[6] = {0}, share[6] = {0}, cells = (double)(s.h * s.w);
    (void)state;
    assert_int_equal(ic_law_init_fill(psi, s, IC_LAW_INIT_RANDOM, 11, NULL), IC_OK);
    for (size_t i = 0; i < s.h * s.w; i++) {
        assert_true(fabs(ic_law_cell_norm2(psi + i * 6, 3) - 1) < 5e-7);
        for (size_t k = 0; k < 6; k++) {
            mean[k] += (double)psi[i * 6 + k];
            share[k] += (double)psi[i * 6 + k] * (double)psi[i * 6 + k];
        }
    }
    /* On the unit sphere in 6 dimensions: E x^2 = 1/6, E x^4 = 3/48. */
    for (size_t k = 0; k < 6; k++) {
        assert_true(fabs(mean[k] / cells) < 5 * sqrt(1.0 / 6 / cells));
        assert_true(fabs(share[k] / cells - 1.0 / 6) < 5 * sqrt((3.0 / 48 - 1.0 / 36) / cells));
    }
    free(psi);
}

static void one_channel_random_is_a_phase(void **state)
{
    struct ic_law_shape s = {4, 4, 1};
    float *psi = new_state(s);
    (void)state;
    assert_int_equal(ic_law_init_fill(psi, s, IC_LAW_INIT_RANDOM, 0, NULL), IC_OK);
    for (size_t i = 0; i < 16; i++)
        assert_true(fabs(ic_law_cell_norm2(psi + i * 2, 1) - 1) < 5e-7);
    free(psi);
}

static uint32_t fnv(const void *p, size_t n)
{
    const unsigned char *s = p;
    uint32_t h = 2166136261u;
    for (size_t i = 0; i < n; i++)
        h = (h ^ s[i]) * 16777619u;
    return h;
}

/* The same bits on every machine and compiler: these sums were taken with gcc and clang on x86-64. */
static void states_are_the_same_everywhere(void **state)
{
    struct ic_law_shape s = {12, 20, 3};
    float *psi = new_state(s);
    size_t bytes = ic_law_shape_floats(s) * sizeof *psi;
    (void)state;
    assert_int_equal(ic_law_init_fill(psi, s, IC_LAW_INIT_RANDOM, 0x0123456789ABCDEFull, NULL), IC_OK);
    assert_int_equal(fnv(psi, bytes), 0x3af4806bu);
    assert_int_equal(ic_law_init_fill(psi, s, IC_LAW_INIT_COMPLEX_NOISE, 0x0123456789ABCDEFull, NULL),
                     IC_OK);
    assert_int_equal(fnv(psi, bytes), 0x2eed61adu);
    free(psi);
}

static void seeds_decide(void **state)
{
    struct ic_law_shape s = {8, 8, 2};
    size_t bytes = ic_law_shape_floats(s) * sizeof(float);
    float *a = new_state(s), *b = new_state(s);
    (void)state;
    for (unsigned m = 0; m < IC_LAW_INIT_ZEROS; m++) {
        assert_int_equal(ic_law_init_fill(a, s, (enum ic_law_init_mode)m, 1, NULL), IC_OK);
        assert_int_equal(ic_law_init_fill(b, s, (enum ic_law_init_mode)m, 1, NULL), IC_OK);
        assert_memory_equal(a, b, bytes);
        assert_int_equal(ic_law_init_fill(b, s, (enum ic_law_init_mode)m, 2, NULL), IC_OK);
        assert_memory_not_equal(a, b, bytes);
    }
    assert_int_equal(ic_law_init_fill(a, s, IC_LAW_INIT_ZEROS, 9, NULL), IC_OK);
    memset(b, 0, bytes);
    assert_memory_equal(a, b, bytes);
    free(a);
    free(b);
}

static void names_and_refusals(void **state)
{
    enum ic_law_init_mode mode = IC_LAW_INIT_ZEROS;
    struct ic_err err = {0};
    struct ic_law_shape bad[] = {
        {0, 4, 1}, {4, 0, 1}, {4, 4, 0}, {IC_LAW_GRID_MAX + 1, 4, 1}, {4, 4, IC_LAW_D_MAX + 1}};
    float psi[2] = {7, 7};
    (void)state;
    assert_int_equal(ic_law_init_parse(NULL, &mode, &err), IC_OK);
    assert_int_equal(mode, IC_LAW_INIT_COMPLEX_NOISE);
    for (unsigned m = 0; m < IC_LAW_INIT_COUNT; m++) {
        assert_int_equal(ic_law_init_parse(ic_law_init_name((enum ic_law_init_mode)m), &mode, &err), IC_OK);
        assert_int_equal(mode, m);
    }
    assert_int_equal(ic_law_init_parse("ionq", &mode, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "ionq"));
    assert_int_equal(ic_law_init_parse("", &mode, &err), IC_BAD_REQUEST);
    assert_int_equal(mode, IC_LAW_INIT_ZEROS);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(ic_law_init_fill(psi, bad[i], IC_LAW_INIT_ZEROS, 0, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_law_init_fill(psi, (struct ic_law_shape){1, 1, 1}, IC_LAW_INIT_COUNT, 0, &err),
                     IC_BAD_REQUEST);
    assert_true(psi[0] == 7 && psi[1] == 7);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(philox_gives_the_published_answers),
        cmocka_unit_test(numbers_depend_on_every_name_part),
        cmocka_unit_test(normals_agree_with_box_muller_by_libm),
        cmocka_unit_test(normals_are_standard),
        cmocka_unit_test(complex_noise_has_unit_channels_and_narrow_phases),
        cmocka_unit_test(random_cells_have_unit_norm_and_no_direction),
        cmocka_unit_test(one_channel_random_is_a_phase),
        cmocka_unit_test(states_are_the_same_everywhere),
        cmocka_unit_test(seeds_decide),
        cmocka_unit_test(names_and_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
