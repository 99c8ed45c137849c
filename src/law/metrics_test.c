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

static float *new_state(struct ic_law_shape s, enum ic_law_init_mode mode, uint64_t seed)
{
    float *psi = malloc(ic_law_shape_floats(s) * sizeof *psi);
    assert_non_null(psi);
    assert_int_equal(ic_law_init_fill(psi, s, mode, seed, NULL), IC_OK);
    return psi;
}

static double complex at(const float *psi, struct ic_law_shape s, size_t y, size_t x, size_t k)
{
    const float *c = psi + ((y * s.w + x) * s.d + k) * 2;
    return (double)c[0] + I * (double)c[1];
}

static void near(double a, double b, double tolerance)
{
    if (isnan(b)) {
        assert_true(isnan(a));
        return;
    }
    if (!(fabs(a - b) <= tolerance * (1 + fabs(b))))
        fail_msg("%.17g is not %.17g", a, b);
}

/* Welford's running variance: another road to the same number. */
struct running {
    double n, mean, m2;
};

static void running_add(struct running *r, double v)
{
    double d = v - r->mean;
    r->n += 1;
    r->mean += d / r->n;
    r->m2 += d * (v - r->mean);
}

/* The winding of one plaquette, straight from the angles. */
static int winding(const float *psi, struct ic_law_shape s, size_t y, size_t x, size_t k)
{
    double t[5], sum = 0;
    t[0] = t[4] = carg(at(psi, s, y, x, k));
    t[1] = carg(at(psi, s, y, x + 1, k));
    t[2] = carg(at(psi, s, y + 1, x + 1, k));
    t[3] = carg(at(psi, s, y + 1, x, k));
    for (int i = 0; i < 4; i++) {
        double step = t[i + 1] - t[i];
        sum += step > M_PI ? step - 2 * M_PI : step < -M_PI ? step + 2 * M_PI : step;
    }
    return (int)lrint(sum / (2 * M_PI));
}

static struct ic_law_metrics naive(const float *psi, const float *delta, struct ic_law_shape s,
                                   size_t channel)
{
    struct ic_law_metrics m = {0};
    struct running e = {0}, size = {0};
    double n = (double)(s.h * s.w), d = (double)s.d, asym = 0;

    for (size_t y = 0; y < s.h; y++) {
        for (size_t x = 0; x < s.w; x++) {
            double ce = 0, cs = 0;
            for (size_t k = 0; k < s.d; k++) {
                double a = cabs(at(psi, s, y, x, k));
                ce += a * a;
                cs += a;
                m.mean_delta += cabs(at(delta, s, y, x, k)) / (n * d);
                if (s.h == s.w) /* numpy.rot90: out[y][x] = in[x][w-1-y] */
                    asym += pow(a - cabs(at(psi, s, x, s.w - 1 - y, k)), 2);
            }
            running_add(&e, ce);
            running_add(&size, cs);
            for (size_t k = 0; k < s.d; k++) {
                double p = pow(cabs(at(psi, s, y, x, k)), 2) / ce;
                m.channel_entropy -= p * log(p + 1e-10) / n;
            }
        }
    }
    m.energy = e.mean * n;
    for (size_t i = 0; i < s.h * s.w * s.d; i++) {
        double p = pow(cabs(at(psi, s, 0, 0, i)), 2) / (m.energy + 1e-9);
        m.entropy -= p * log(p + 1e-9);
    }
    for (size_t y = 0; y < s.h; y++) {
        for (size_t x = 0; x + 1 < s.w; x++) {
            double complex dot = 0;
            double na = 0, nb = 0;
            for (size_t k = 0; k < s.d; k++) {
                dot += conj(at(psi, s, y, x, k)) * at(psi, s, y, x + 1, k);
                na += pow(cabs(at(psi, s, y, x, k)), 2);
                nb += pow(cabs(at(psi, s, y, x + 1, k)), 2);
            }
            m.coherence += cabs(dot) / (sqrt(na * nb) + 1e-10) / (double)(s.h * (s.w - 1));
            if (y + 1 < s.h) {
                m.defects += winding(psi, s, y, x, channel) != 0;
                m.defect_charge += winding(psi, s, y, x, channel);
            }
        }
    }
    m.channel_entropy_norm = s.d > 1 ? m.channel_entropy / log(d) : 0;
    m.symmetry = s.h == s.w ? 1 / (1 + 100 * asym / (n * d)) : (double)NAN;
    m.complexity = sqrt(size.m2 / (n - 1));
    m.clustering = e.m2 / (n - 1);
    m.epoch = m.energy < 1                             ? 0
              : m.symmetry < 0.2 && m.clustering < 0.1 ? 1
              : m.symmetry > 0.6                       ? 2
              : m.symmetry > 0.3 && m.clustering > 0.5 ? 3
              : m.clustering > 2                       ? 4
                                                       : 1;
    return m;
}

static void compare(const float *psi, const float *delta, struct ic_law_shape s, size_t channel)
{
    struct ic_law_metrics m, want = naive(psi, delta, s, channel);
    assert_int_equal(ic_law_metrics_compute(psi, delta, s, channel, &m, NULL), IC_OK);
    for (size_t i = 0; i < ic_law_metric_count(); i++)
        near(ic_law_metric_value(&m, i), ic_law_metric_value(&want, i), 1e-11);
}

static void all_agree_with_a_naive_version(void **state)
{
    const struct ic_law_shape shapes[] = {{8, 8, 4}, {20, 20, 1}, {4, 36, 3}, {16, 12, 5}, {3, 2, 2}};
    (void)state;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        for (unsigned mode = 0; mode < IC_LAW_INIT_ZEROS; mode++) {
            float *psi = new_state(shapes[i], (enum ic_law_init_mode)mode, i);
            float *delta = new_state(shapes[i], IC_LAW_INIT_RANDOM, i + 50);
            compare(psi, delta, shapes[i], shapes[i].d - 1);
            for (size_t v = 0; v < ic_law_shape_floats(shapes[i]); v++)
                psi[v] *= 0.3f + 5 * fabsf(delta[v]); /* cells of many sizes */
            compare(psi, delta, shapes[i], 0);
            free(psi);
            free(delta);
        }
    }
}

/* By hand: 2 x 2 cells, 2 channels, of squares (1,0) (1/2,1/2) (0,1) (1/2,1/2). */
static void hand_made_state(void **state)
{
    struct ic_law_shape s = {2, 2, 2};
    const float q = sqrtf(0.5f);
    const float psi[] = {1, 0, 0, 0, /**/ q, 0, q, 0, /**/ 0, 0, 0, 1, /**/ 0, q, 0, q};
    const float delta[] = {3, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1};
    struct ic_law_metrics m;
    (void)state;
    assert_int_equal(ic_law_metrics_compute(psi, delta, s, 0, &m, NULL), IC_OK);
    near(m.channel_entropy, log(2) / 2, 1e-7);
    near(m.channel_entropy_norm, 0.5, 1e-7);
    near(m.entropy, log(4) + log(2) / 2, 1e-7);
    near(m.energy, 4, 1e-7);
    near(m.clustering, 0, 1e-12);
    near(m.mean_delta, 6.0 / 8, 1e-12);
    near(m.coherence, sqrt(0.5), 1e-7);                /* both rows: one shared channel of two */
    near(m.complexity, (sqrt(2) - 1) / sqrt(3), 1e-7); /* sizes 1, r2, 1, r2 */
    /* |psi| turned by 90 degrees: [[A B][C D]] -> [[B D][A C]], A (1,0), B = D (q,q), C (0,1). */
    double ab = pow(1 - sqrt(0.5), 2) + 0.5, d = (ab + 0 + 2 + ab) / 8;
    near(m.symmetry, 1 / (1 + 100 * d), 1e-6);
    assert_true(m.bad_cells == 0);
    assert_true(m.epoch == 1);
}

static void unit_cells_obey_the_entropy_identity(void **state)
{
    struct ic_law_shape s = {32, 32, 4};
    float *psi = new_state(s, IC_LAW_INIT_RANDOM, 4);
    struct ic_law_metrics m;
    (void)state;
    assert_int_equal(ic_law_metrics_compute(psi, NULL, s, 0, &m, NULL), IC_OK);
    near(m.entropy, log(1024) + m.channel_entropy, 1e-5); /* law-m.md 5.2; the epsilons differ */
    near(m.energy, 1024, 1e-6);
    assert_true(m.clustering < 1e-13);
    assert_true(isnan(m.mean_delta));
    free(psi);
}

static void even_field(void **state)
{
    struct ic_law_shape s = {8, 8, 2};
    float psi[8 * 8 * 4];
    struct ic_law_metrics m;
    (void)state;
    for (size_t i = 0; i < 8 * 8 * 4; i++)
        psi[i] = 0.5f;
    assert_int_equal(ic_law_metrics_compute(psi, psi, s, 1, &m, NULL), IC_OK);
    near(m.coherence, 1, 1e-9);
    near(m.symmetry, 1, 1e-12);
    near(m.channel_entropy_norm, 1, 1e-9);
    near(m.mean_delta, sqrt(0.5), 1e-12);
    assert_true(m.complexity < 1e-14 && m.clustering < 1e-28 && m.defects == 0);
    assert_true(m.epoch == 2);
}

static void zero_state_and_smallest_grid(void **state)
{
    struct ic_law_shape s = {4, 4, 3}, one = {1, 1, 1};
    float *psi = new_state(s, IC_LAW_INIT_ZEROS, 0);
    struct ic_law_metrics m;
    (void)state;
    assert_int_equal(ic_law_metrics_compute(psi, psi, s, 0, &m, NULL), IC_OK);
    assert_true(m.energy == 0 && m.clustering == 0 && m.complexity == 0 && m.entropy == 0);
    assert_true(m.coherence == 0 && m.mean_delta == 0 && m.defects == 0 && m.epoch == 0);
    near(m.channel_entropy_norm, 1, 1e-9); /* p = 1/d */
    near(m.symmetry, 1, 1e-12);
    psi[0] = 2;
    assert_int_equal(ic_law_metrics_compute(psi, NULL, one, 0, &m, NULL), IC_OK);
    assert_true(m.energy == 4 && m.clustering == 0 && m.complexity == 0 && isnan(m.coherence));
    assert_true(m.channel_entropy_norm == 0 && m.symmetry == 1);
    free(psi);
}

static void broken_cells_count_as_zero(void **state)
{
    struct ic_law_shape s = {8, 8, 2};
    float *a = new_state(s, IC_LAW_INIT_RANDOM, 1), *b = new_state(s, IC_LAW_INIT_RANDOM, 1);
    struct ic_law_metrics ma, mb;
    (void)state;
    a[4 * 9] = NAN;
    a[4 * 30 + 3] = -INFINITY;
    memset(b + 4 * 9, 0, 4 * sizeof *b);
    memset(b + 4 * 30, 0, 4 * sizeof *b);
    assert_int_equal(ic_law_metrics_compute(a, a, s, 0, &ma, NULL), IC_OK);
    assert_int_equal(ic_law_metrics_compute(b, b, s, 0, &mb, NULL), IC_OK);
    assert_true(ma.bad_cells == 2 && mb.bad_cells == 0);
    ma.bad_cells = 0;
    ma.defects = mb.defects; /* winding around a broken value is whatever it is, but it is finite */
    ma.defect_charge = mb.defect_charge;
    assert_memory_equal(&ma, &mb, sizeof ma);
    free(a);
    free(b);
}

/* ---- Defects ---- */

enum pattern { VORTEX, ANTIVORTEX, PLANE_WAVE, PAIR };

static void draw(float *psi, struct ic_law_shape s, size_t k, enum pattern p)
{
    for (size_t y = 0; y < s.h; y++) {
        for (size_t x = 0; x < s.w; x++) {
            double complex z = ((double)x - 7.3) + I * ((double)y - 5.6);
            double complex other = ((double)x - 2.2) - I * ((double)y - 9.4);
            double complex v = p == VORTEX       ? z
                               : p == ANTIVORTEX ? conj(z)
                               : p == PAIR       ? z * other
                                                 : cexp(I * (0.7 * (double)x - 1.1 * (double)y + 0.3));
            psi[((y * s.w + x) * s.d + k) * 2] = (float)creal(v);
            psi[((y * s.w + x) * s.d + k) * 2 + 1] = (float)cimag(v);
        }
    }
}

static void defects_are_counted_by_channel_and_sign(void **state)
{
    struct ic_law_shape s = {12, 16, 2};
    float *psi = new_state(s, IC_LAW_INIT_ZEROS, 0);
    struct ic_law_metrics m;
    size_t pos, neg;
    (void)state;
    draw(psi, s, 0, PLANE_WAVE);
    draw(psi, s, 1, VORTEX);
    ic_law_defects(psi, s, 0, &pos, &neg);
    assert_true(pos == 0 && neg == 0);
    ic_law_defects(psi, s, 1, &pos, &neg);
    assert_true(pos == 1 && neg == 0);
    draw(psi, s, 1, ANTIVORTEX);
    ic_law_defects(psi, s, 1, &pos, &neg);
    assert_true(pos == 0 && neg == 1);
    draw(psi, s, 1, PAIR);
    assert_int_equal(ic_law_metrics_compute(psi, NULL, s, 1, &m, NULL), IC_OK);
    assert_true(m.defects == 2 && m.defect_charge == 0);
    free(psi);
}

/* Fields on a line through the origin, where every step is 0 or exactly pi: no turn, however the signs
 * lie and whichever way the line points. */
static void fields_on_a_line_have_no_defects(void **state)
{
    const float lines[][2] = {{1, 0}, {0, 1}, {1, 1}, {-1, 1}, {0.5f, -2}, {1, -0.0f}};
    struct ic_law_shape s = {16, 16, 1};
    (void)state;
    for (size_t j = 0; j < sizeof lines / sizeof *lines; j++) {
        float *psi = new_state(s, IC_LAW_INIT_RANDOM, 8);
        size_t pos, neg;
        for (size_t i = 0; i < 256; i++) {
            float r = psi[2 * i] > 0 ? 1 : -1;
            psi[2 * i] = r * lines[j][0];
            psi[2 * i + 1] = r * lines[j][1];
        }
        ic_law_defects(psi, s, 0, &pos, &neg);
        assert_true(pos == 0 && neg == 0);
        free(psi);
    }
}

static void random_fields_wind_as_the_angles_say(void **state)
{
    struct ic_law_shape s = {64, 64, 2};
    (void)state;
    for (uint64_t seed = 0; seed < 4; seed++) {
        float *psi = new_state(s, IC_LAW_INIT_RANDOM, seed);
        size_t pos, neg, p = 0, n = 0;
        ic_law_defects(psi, s, 1, &pos, &neg);
        for (size_t y = 0; y < 63; y++) {
            for (size_t x = 0; x < 63; x++) {
                p += winding(psi, s, y, x, 1) > 0;
                n += winding(psi, s, y, x, 1) < 0;
            }
        }
        assert_int_equal(pos, p);
        assert_int_equal(neg, n);
        assert_in_range(pos + neg, 63 * 63 / 3 - 200,
                        63 * 63 / 3 + 200); /* a third, for independent phases */
        free(psi);
    }
}

/* ---- Epoch, table, refusals ---- */

static void epoch_rule(void **state)
{
    (void)state;
    assert_int_equal(ic_law_epoch(0.99, 1, 9), 0);
    assert_int_equal(ic_law_epoch(1, 0.19, 0.09), 1);
    assert_int_equal(ic_law_epoch(1, 0.61, 0), 2);
    assert_int_equal(ic_law_epoch(1, 0.61, 9), 2);
    assert_int_equal(ic_law_epoch(1, 0.31, 0.51), 3);
    assert_int_equal(ic_law_epoch(1, 0.19, 2.1), 4);
    assert_int_equal(ic_law_epoch(1, 0.25, 1), 1);
    assert_int_equal(ic_law_epoch(1, (double)NAN, 1), 1);
    assert_int_equal(ic_law_epoch(1, (double)NAN, 3), 4);
}

static void json_holds_every_metric(void **state)
{
    struct ic_law_shape s = {4, 8, 2};
    float *psi = new_state(s, IC_LAW_INIT_RANDOM, 1);
    struct ic_law_metrics m;
    struct ic_buf b = {0};
    (void)state;
    assert_int_equal(ic_law_metrics_compute(psi, NULL, s, 0, &m, NULL), IC_OK);
    ic_law_metrics_json(&b, &m);
    ic_buf_put(&b, "", 1);
    assert_false(b.failed);
    assert_non_null(strstr(b.data, "\"symmetry\":null"));
    assert_non_null(strstr(b.data, "\"mean_delta\":null"));
    assert_non_null(strstr(b.data, "\"bad_cells\":0}"));
    for (size_t i = 0; i < ic_law_metric_count(); i++) {
        const struct ic_law_metric_info *info = ic_law_metric_info(i);
        assert_non_null(strstr(b.data, info->name));
        assert_true(strlen(info->unit) > 0 && strlen(info->formula) > 0 && strlen(info->source) > 0);
    }
    assert_null(ic_law_metric_info(ic_law_metric_count()));
    assert_true(isnan(ic_law_metric_value(&m, ic_law_metric_count())));
    ic_buf_deinit(&b);
    free(psi);
}

static void refusals(void **state)
{
    struct ic_law_metrics m = {.energy = 5};
    struct ic_err err = {0};
    float psi[8] = {0};
    (void)state;
    assert_int_equal(ic_law_metrics_compute(psi, NULL, (struct ic_law_shape){0, 1, 1}, 0, &m, &err),
                     IC_BAD_REQUEST);
    assert_int_equal(ic_law_metrics_compute(psi, NULL, (struct ic_law_shape){1, 1, 2}, 2, &m, &err),
                     IC_BAD_REQUEST);
    assert_true(m.energy == 5);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_agree_with_a_naive_version),
        cmocka_unit_test(hand_made_state),
        cmocka_unit_test(unit_cells_obey_the_entropy_identity),
        cmocka_unit_test(even_field),
        cmocka_unit_test(zero_state_and_smallest_grid),
        cmocka_unit_test(broken_cells_count_as_zero),
        cmocka_unit_test(defects_are_counted_by_channel_and_sign),
        cmocka_unit_test(fields_on_a_line_have_no_defects),
        cmocka_unit_test(random_fields_wind_as_the_angles_say),
        cmocka_unit_test(epoch_rule),
        cmocka_unit_test(json_holds_every_metric),
        cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
