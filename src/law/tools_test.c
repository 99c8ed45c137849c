#include <complex.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "law/init.h"
#include "law/metrics.h"
#include "law/tools.h"

/* A state with guard floats on both sides: a tool that writes outside is found without a sanitizer. */
#define GUARD 64
#define MARK 12345.0f

struct field {
    struct ic_law_shape s;
    size_t n;
    float *all, *psi, *before;
};

static struct field new_field(size_t h, size_t w, size_t d)
{
    struct field f = {.s = {h, w, d}};
    f.n = ic_law_shape_floats(f.s);
    f.all = malloc((f.n + 2 * GUARD) * sizeof(float));
    f.before = malloc(f.n * sizeof(float));
    assert_true(f.all && f.before);
    f.psi = f.all + GUARD;
    for (size_t i = 0; i < f.n + 2 * GUARD; i++)
        f.all[i] = MARK;
    assert_int_equal(ic_law_init_fill(f.psi, f.s, IC_LAW_INIT_RANDOM, 77, NULL), IC_OK);
    memcpy(f.before, f.psi, f.n * sizeof(float));
    return f;
}

static void check_guards(const struct field *f)
{
    for (size_t i = 0; i < GUARD; i++)
        assert_true(f->all[i] == MARK && f->psi[f->n + i] == MARK);
}

static void free_field(struct field *f)
{
    check_guards(f);
    free(f->all);
    free(f->before);
}

static double complex at(const float *psi, struct ic_law_shape s, size_t y, size_t x, size_t k)
{
    const float *c = ic_law_cell(psi, s, y, x) + 2 * k;
    return (double)c[0] + I * (double)c[1];
}

static void close_to(double complex a, double complex b)
{
    assert_true(cabs(a - b) < 3e-7 * (1 + cabs(b)));
}

static size_t apply(struct field *f, enum ic_law_tool tool, const struct ic_law_tool_args *a)
{
    size_t touched = 99;
    assert_int_equal(ic_law_tool_apply(f->psi, f->s, tool, a, &touched, NULL), IC_OK);
    check_guards(f);
    return touched;
}

/* numpy.linspace(-1, 1, 2r). */
static double lin(int i, int r)
{
    return i == 2 * r - 1 ? 1 : -1 + i * (2.0 / (2 * r - 1));
}

static void check_vortex(int cx, int cy, int r)
{
    struct field f = new_field(12, 16, 3);
    struct ic_law_tool_args a;
    size_t inside = 0;

    ic_law_tool_args_init(&a);
    a.x = cx + 0.75; /* rounded down */
    a.y = cy;
    if (r != 5)
        a.radius = r;
    size_t touched = apply(&f, IC_LAW_TOOL_VORTEX, &a);
    for (int y = 0; y < 12; y++) {
        for (int x = 0; x < 16; x++) {
            bool in = y >= cy - r && y < cy + r && x >= cx - r && x < cx + r;
            inside += in;
            for (size_t k = 0; k < 3; k++) {
                double complex was = at(f.before, f.s, (size_t)y, (size_t)x, k);
                double complex is = at(f.psi, f.s, (size_t)y, (size_t)x, k);
                if (!in) {
                    assert_true(is == was);
                    continue;
                }
                double ty = lin(y - cy + r, r), tx = lin(x - cx + r, r);
                close_to(is, 0.2 * was + 0.8 * exp(-2 * ty * ty) * cexp(I * M_PI * ty) * exp(-2 * tx * tx) *
                                             cexp(I * M_PI * tx));
            }
        }
    }
    assert_int_equal(touched, inside);
    free_field(&f);
}

static void vortex_is_atherias_pattern_clipped(void **state)
{
    (void)state;
    check_vortex(8, 6, 5);
    check_vortex(0, 0, 5);
    check_vortex(15, 11, 3);
    check_vortex(-3, 14, 5);
    check_vortex(8, 6, 40);
    check_vortex(3, 3, 1);
    check_vortex(100, 100, 5);
    check_vortex(-900000, 3, 5);
}

static void charged_vortex_holds_one_singularity(void **state)
{
    (void)state;
    for (int q = -2; q <= 2; q++) {
        struct field f = new_field(24, 24, 2);
        struct ic_law_tool_args a;
        size_t pos, neg;
        for (size_t i = 0; i < f.n; i++)
            f.psi[i] = i % 2 == 0 ? 0.5f : 0;
        ic_law_tool_args_init(&a);
        a.radius = 8;
        a.charge = q;
        if (q != 0)
            apply(&f, IC_LAW_TOOL_VORTEX, &a);
        ic_law_defects(f.psi, f.s, 1, &pos, &neg);
        /* Inside the pattern rules; its charge comes out as the even field takes over at the rim. A double
         * charge may split into two single ones. */
        if (q == 0) {
            assert_int_equal(pos + neg, 0);
        } else {
            size_t centre_pos, centre_neg;
            struct ic_law_shape small = {8, 8, 2};
            float *cut = malloc(ic_law_shape_floats(small) * sizeof *cut);
            assert_non_null(cut);
            for (size_t y = 0; y < 8; y++)
                memcpy(cut + y * 32, ic_law_cell(f.psi, f.s, 8 + y, 8), 32 * sizeof *cut);
            ic_law_defects(cut, small, 1, &centre_pos, &centre_neg);
            if (q == 1 || q == -1) {
                assert_int_equal(centre_pos, q == 1);
                assert_int_equal(centre_neg, q == -1);
            } else {
                assert_true(q > 0 ? centre_pos >= 1 && centre_neg == 0
                                  : centre_neg >= 1 && centre_pos == 0);
            }
            free(cut);
        }
        free_field(&f);
    }
}

static void wave_covers_the_grid(void **state)
{
    struct field f = new_field(8, 20, 2);
    struct ic_law_tool_args a;
    (void)state;
    ic_law_tool_args_init(&a);
    a.kx = 7;
    a.ky = -2.5;
    a.x = 3;
    a.blend = 0.5;
    assert_int_equal(apply(&f, IC_LAW_TOOL_WAVE, &a), 8 * 20);
    for (int y = 0; y < 8; y++) {
        for (int x = 0; x < 20; x++) {
            double ty = -1 + (y - 4 + 20) * 2.0 / 39, tx = -1 + (x - 3 + 20) * 2.0 / 39;
            for (size_t k = 0; k < 2; k++)
                close_to(at(f.psi, f.s, (size_t)y, (size_t)x, k),
                         0.5 * at(f.before, f.s, (size_t)y, (size_t)x, k) +
                             0.5 * (0.5 * cexp(I * 7 * tx)) * (0.5 * cexp(I * -2.5 * ty)));
        }
    }
    free_field(&f);
}

static void collapse_honours_its_intensity(void **state)
{
    const double intensities[] = {0, 0.1, 2};
    (void)state;
    for (size_t t = 0; t < 3; t++) {
        struct field f = new_field(48, 48, 4);
        struct ic_law_tool_args a;
        double sum = 0, cross = 0, mean = 0;
        ic_law_tool_args_init(&a);
        a.intensity = intensities[t];
        a.seed = 5;
        assert_int_equal(apply(&f, IC_LAW_TOOL_COLLAPSE, &a), 48 * 48);
        for (size_t i = 0; i < f.n; i += 2) {
            double re = (double)(f.psi[i] - f.before[i]), im = (double)(f.psi[i + 1] - f.before[i + 1]);
            sum += re * re + im * im;
            cross += re * im;
            mean += re;
        }
        double n = (double)f.n / 2, var = intensities[t] * intensities[t];
        assert_true(fabs(sum / n - var) <= 5 * var / sqrt(n) + 1e-6);
        assert_true(fabs(cross / n) <= 5 * var / 2 / sqrt(n));
        assert_true(fabs(mean / n) <= 5 * intensities[t] / sqrt(2 * n) + 1e-7);
        free_field(&f);
    }
}

static void local_collapse_stays_local(void **state)
{
    struct field f = new_field(20, 20, 1);
    struct ic_law_tool_args a;
    (void)state;
    ic_law_tool_args_init(&a);
    a.x = 18;
    a.y = 2;
    a.radius = 4;
    a.intensity = 1;
    assert_int_equal(apply(&f, IC_LAW_TOOL_COLLAPSE, &a), 6 * 6);
    for (size_t y = 0; y < 20; y++)
        for (size_t x = 0; x < 20; x++)
            assert_true((at(f.psi, f.s, y, x, 0) != at(f.before, f.s, y, x, 0)) == (y < 6 && x >= 14));
    free_field(&f);
}

static struct field injected(enum ic_law_inject type, double x, double y, uint64_t seed, double radius,
                             size_t *touched)
{
    struct field f = new_field(40, 40, 3);
    struct ic_law_tool_args a;
    ic_law_init_fill(f.psi, f.s, IC_LAW_INIT_ZEROS, 0, NULL);
    ic_law_tool_args_init(&a);
    a.type = type;
    a.x = x;
    a.y = y;
    a.seed = seed;
    if (radius > 0)
        a.radius = radius;
    *touched = apply(&f, IC_LAW_TOOL_INJECT_ENERGY, &a);
    return f;
}

static void soup_thins_out_from_its_centre(void **state)
{
    double expected = 0, variance = 0;
    size_t found = 0, trials = 60;
    (void)state;
    for (uint64_t seed = 0; seed < trials; seed++) {
        size_t touched, filled = 0;
        struct field f = injected(IC_LAW_INJECT_PRIMORDIAL_SOUP, 20, 20, seed, 0, &touched);
        for (size_t y = 0; y < 40; y++) {
            for (size_t x = 0; x < 40; x++) {
                double e = ic_law_cell_norm2(ic_law_cell(f.psi, f.s, y, x), 3);
                filled += e > 0;
                assert_true(e == 0 || (e > 0.0999 && e < 0.5001));
                assert_true(e == 0 || (y >= 10 && y < 30 && x >= 10 && x < 30));
            }
        }
        assert_int_equal(filled, touched);
        found += touched;
        free_field(&f);
    }
    for (int y = -10; y < 10; y++) {
        for (int x = -10; x < 10; x++) {
            double p = 0.3 * exp(-sqrt((double)(x * x + y * y)) / 5);
            expected += p;
            variance += p * (1 - p);
        }
    }
    assert_true(fabs((double)found - expected * (double)trials) < 5 * sqrt(variance * (double)trials));
}

static void monolith_is_a_square_of_one_direction(void **state)
{
    size_t touched;
    struct field f = injected(IC_LAW_INJECT_DENSE_MONOLITH, 2, 39, 1, 0, &touched);
    double complex mean[3] = {0};
    (void)state;
    assert_int_equal(touched, 7 * 6);
    for (size_t y = 34; y < 40; y++)
        for (size_t x = 0; x < 7; x++)
            for (size_t k = 0; k < 3; k++)
                mean[k] += at(f.psi, f.s, y, x, k) / 42;
    double norm2 = 0, spread = 0;
    for (size_t k = 0; k < 3; k++)
        norm2 += creal(mean[k]) * creal(mean[k]) + cimag(mean[k]) * cimag(mean[k]);
    assert_true(fabs(norm2 - 2) < 0.1);
    for (size_t y = 0; y < 40; y++) {
        for (size_t x = 0; x < 40; x++) {
            if (y >= 34 && x < 7)
                for (size_t k = 0; k < 3; k++)
                    spread += pow(cabs(at(f.psi, f.s, y, x, k) - mean[k]), 2) / (42 * 6);
            else
                assert_true(ic_law_cell_norm2(ic_law_cell(f.psi, f.s, y, x), 3) == 0);
        }
    }
    assert_true(sqrt(spread) > 0.04 && sqrt(spread) < 0.06);
    free_field(&f);
}

static void seed_is_its_own_mirror_image(void **state)
{
    (void)state;
    for (uint64_t seed = 0; seed < 20; seed++) {
        size_t touched, filled = 0;
        struct field f = injected(IC_LAW_INJECT_SYMMETRIC_SEED, 20, 18, seed, 6, &touched);
        for (long oy = -9; oy <= 9; oy++) {
            for (long ox = -9; ox <= 9; ox++) {
                const float *a = ic_law_cell(f.psi, f.s, (size_t)(18 + oy), (size_t)(20 + ox));
                const float *b = ic_law_cell(f.psi, f.s, (size_t)(18 - oy), (size_t)(20 + ox));
                const float *c = ic_law_cell(f.psi, f.s, (size_t)(18 + oy), (size_t)(20 - ox));
                double e = ic_law_cell_norm2(a, 3);
                assert_memory_equal(a, b, 6 * sizeof *a);
                assert_memory_equal(a, c, 6 * sizeof *a);
                assert_true(e == 0 || fabs(e - 1) < 1e-6);
                assert_true(e == 0 || (labs(oy) < 6 && labs(ox) < 6));
                filled += e > 0;
            }
        }
        assert_int_equal(filled, touched);
        assert_in_range(filled, 121 / 4, 121 * 3 / 4);
        free_field(&f);
    }
}

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void click_out_moves_cells_and_loses_none(void **state)
{
    struct field f = new_field(16, 16, 2);
    struct ic_law_tool_args a;
    size_t moved = 0;
    float before[256], after[256];
    (void)state;
    ic_law_tool_args_init(&a);
    a.chance = 1;
    assert_int_equal(apply(&f, IC_LAW_TOOL_CLICK_OUT, &a), 2 * 128);
    for (size_t i = 0; i < 256; i++) {
        moved += memcmp(f.psi + 4 * i, f.before + 4 * i, 4 * sizeof(float)) != 0;
        before[i] = f.before[4 * i]; /* the first float names a cell */
        after[i] = f.psi[4 * i];
    }
    assert_in_range(moved, 100, 220); /* 256 (1 - e^-1) = 162 touched once or more */
    qsort(before, 256, sizeof *before, by_value);
    qsort(after, 256, sizeof *after, by_value);
    assert_memory_equal(before, after, sizeof before);
    free_field(&f);
}

static void click_out_keeps_its_chance(void **state)
{
    struct field f = new_field(4, 4, 1);
    struct ic_law_tool_args a;
    int hits = 0;
    (void)state;
    ic_law_tool_args_init(&a);
    for (a.seed = 0; a.seed < 4000; a.seed++)
        hits += apply(&f, IC_LAW_TOOL_CLICK_OUT, &a) > 0;
    assert_in_range(hits, 40 - 32, 40 + 32); /* default 0.01; 5 standard deviations */
    a.chance = 0;
    for (a.seed = 0; a.seed < 100; a.seed++)
        assert_int_equal(apply(&f, IC_LAW_TOOL_CLICK_OUT, &a), 0);
    free_field(&f);
}

static void tools_replay_by_seed(void **state)
{
    (void)state;
    for (unsigned t = 0; t < IC_LAW_TOOL_COUNT; t++) {
        struct field f = new_field(12, 12, 2), g = new_field(12, 12, 2);
        struct ic_law_tool_args a;
        ic_law_tool_args_init(&a);
        a.seed = 9;
        a.chance = 1;
        apply(&f, (enum ic_law_tool)t, &a);
        apply(&g, (enum ic_law_tool)t, &a);
        assert_memory_equal(f.psi, g.psi, f.n * sizeof(float));
        assert_memory_not_equal(f.psi, f.before, f.n * sizeof(float));
        free_field(&f);
        free_field(&g);
    }
}

static void smallest_grids_do(void **state)
{
    (void)state;
    for (unsigned t = 0; t < IC_LAW_TOOL_COUNT; t++) {
        for (unsigned type = 0; type < IC_LAW_INJECT_COUNT; type++) {
            struct field f = new_field(1, 1, 1);
            struct ic_law_tool_args a;
            ic_law_tool_args_init(&a);
            a.chance = 1;
            a.fraction = 1;
            a.radius = 1;
            a.type = (enum ic_law_inject)type;
            apply(&f, (enum ic_law_tool)t, &a);
            assert_true(isfinite(f.psi[0]) && isfinite(f.psi[1]));
            free_field(&f);
        }
    }
}

static void numbers_are_checked(void **state)
{
    struct field f = new_field(4, 4, 1);
    struct ic_law_tool_args a, b;
    struct ic_err err = {0};
    (void)state;
    ic_law_tool_args_init(&a);
    b = a;
    assert_int_equal(ic_law_tool_arg_set(&a, "radius", (double)NAN, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_law_tool_arg_set(&a, "radius", 0.5, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "radius"));
    assert_int_equal(ic_law_tool_arg_set(&a, "x", (double)INFINITY, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_law_tool_arg_set(&a, "intensity", -1, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_law_tool_arg_set(&a, "strength", 1, &err), IC_NOT_FOUND);
    assert_memory_equal(&a, &b, sizeof a);
    assert_int_equal(ic_law_tool_arg_set(&a, "radius", 3, &err), IC_OK);
    assert_true(a.radius == 3);
    a.kx = (double)-INFINITY;
    assert_int_equal(ic_law_tool_apply(f.psi, f.s, IC_LAW_TOOL_WAVE, &a, NULL, &err), IC_BAD_REQUEST);
    a = b;
    assert_int_equal(ic_law_tool_apply(f.psi, f.s, IC_LAW_TOOL_COUNT, &a, NULL, &err), IC_BAD_REQUEST);
    a.type = IC_LAW_INJECT_COUNT;
    assert_int_equal(ic_law_tool_apply(f.psi, f.s, IC_LAW_TOOL_WAVE, &a, NULL, &err), IC_BAD_REQUEST);
    assert_int_equal(
        ic_law_tool_apply(f.psi, (struct ic_law_shape){0, 4, 1}, IC_LAW_TOOL_WAVE, &b, NULL, &err),
        IC_BAD_REQUEST);
    assert_memory_equal(f.psi, f.before, f.n * sizeof(float));
    free_field(&f);
}

static void names_round_trip(void **state)
{
    struct ic_err err = {0};
    enum ic_law_tool tool;
    enum ic_law_inject type;
    (void)state;
    for (unsigned t = 0; t < IC_LAW_TOOL_COUNT; t++) {
        assert_int_equal(ic_law_tool_parse(ic_law_tool_name((enum ic_law_tool)t), &tool, &err), IC_OK);
        assert_int_equal(tool, t);
        assert_true(strlen(ic_law_tool_help(tool)) > 0);
    }
    for (unsigned t = 0; t < IC_LAW_INJECT_COUNT; t++) {
        assert_int_equal(ic_law_inject_parse(ic_law_inject_name((enum ic_law_inject)t), &type, &err),
                         IC_OK);
        assert_int_equal(type, t);
    }
    assert_int_equal(ic_law_tool_parse("hammer", &tool, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_law_tool_parse(NULL, &tool, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_law_inject_parse("big_bang", &type, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_law_inject_parse(NULL, &type, &err), IC_BAD_REQUEST);
}

static void broken_cells_break_nothing_else(void **state)
{
    struct field f = new_field(12, 12, 2);
    struct ic_law_tool_args a;
    (void)state;
    f.psi[0] = NAN;
    f.psi[f.n - 1] = INFINITY;
    ic_law_tool_args_init(&a);
    apply(&f, IC_LAW_TOOL_WAVE, &a);
    for (size_t i = 1; i < f.n - 1; i++)
        assert_true(isfinite(f.psi[i]));
    free_field(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(vortex_is_atherias_pattern_clipped),
        cmocka_unit_test(charged_vortex_holds_one_singularity),
        cmocka_unit_test(wave_covers_the_grid),
        cmocka_unit_test(collapse_honours_its_intensity),
        cmocka_unit_test(local_collapse_stays_local),
        cmocka_unit_test(soup_thins_out_from_its_centre),
        cmocka_unit_test(monolith_is_a_square_of_one_direction),
        cmocka_unit_test(seed_is_its_own_mirror_image),
        cmocka_unit_test(click_out_moves_cells_and_loses_none),
        cmocka_unit_test(click_out_keeps_its_chance),
        cmocka_unit_test(tools_replay_by_seed),
        cmocka_unit_test(smallest_grids_do),
        cmocka_unit_test(numbers_are_checked),
        cmocka_unit_test(names_round_trip),
        cmocka_unit_test(broken_cells_break_nothing_else),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
