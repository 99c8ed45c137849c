#include "law/metrics.h"

#include <math.h>

static const struct ic_law_metric_info infos[] = {
#define X(name, unit, formula, source) {#name, unit, formula, source},
    IC_LAW_METRIC_TABLE(X)
#undef X
};
static const size_t offsets[] = {
#define X(name, unit, formula, source) offsetof(struct ic_law_metrics, name),
    IC_LAW_METRIC_TABLE(X)
#undef X
};
#define COUNT (sizeof infos / sizeof *infos)

size_t ic_law_metric_count(void)
{
    return COUNT;
}

const struct ic_law_metric_info *ic_law_metric_info(size_t i)
{
    return i < COUNT ? &infos[i] : NULL;
}

double ic_law_metric_value(const struct ic_law_metrics *m, size_t i)
{
    return i < COUNT ? *(const double *)(const void *)((const char *)m + offsets[i]) : (double)NAN;
}

void ic_law_metrics_json(struct ic_buf *b, const struct ic_law_metrics *m)
{
    ic_buf_puts(b, "{");
    for (size_t i = 0; i < COUNT; i++)
        ic_json_knum(b, infos[i].name, ic_law_metric_value(m, i));
    ic_buf_puts(b, "}");
}

/* A broken cell reads as zeros; float32 squares cannot overflow a double, so only NaN and infinities
 * are broken. */
static const float *good_cell(const float *psi, struct ic_law_shape s, size_t i)
{
    const float *cell = psi + i * s.d * 2;
    return isfinite(ic_law_cell_norm2(cell, s.d)) ? cell : NULL;
}

static double size2(const float *cell, size_t k)
{
    double re = cell ? (double)cell[2 * k] : 0, im = cell ? (double)cell[2 * k + 1] : 0;
    return re * re + im * im;
}

/* ---- Energy, clustering, complexity: means first, then deviations from them. One pass over squares would
 * lose clustering, which is 1e-14 for unit cells. ---- */

struct totals {
    double energy, size; /* sums over the cells of e and of sum_k |psi_k| */
    double bad;
};

static double cell_size(const float *cell, size_t d)
{
    double sum = 0;
    for (size_t k = 0; cell && k < d; k++)
        sum += sqrt(size2(cell, k));
    return sum;
}

static struct totals add_up(const float *psi, struct ic_law_shape s)
{
    struct totals t = {0};
    for (size_t i = 0; i < s.h * s.w; i++) {
        const float *cell = good_cell(psi, s, i);
        t.bad += cell == NULL;
        t.energy += cell ? ic_law_cell_norm2(cell, s.d) : 0;
        t.size += cell_size(cell, s.d);
    }
    return t;
}

static void spread(const float *psi, struct ic_law_shape s, const struct totals *t,
                   struct ic_law_metrics *m)
{
    double n = (double)(s.h * s.w), e_mean = t->energy / n, size_mean = t->size / n, e2 = 0, size2_sum = 0;

    for (size_t i = 0; i < s.h * s.w; i++) {
        const float *cell = good_cell(psi, s, i);
        double e = (cell ? ic_law_cell_norm2(cell, s.d) : 0) - e_mean;
        double size = cell_size(cell, s.d) - size_mean;
        e2 += e * e;
        size2_sum += size * size;
    }
    m->clustering = n > 1 ? e2 / (n - 1) : 0;
    m->complexity = n > 1 ? sqrt(size2_sum / (n - 1)) : 0;
}

static void entropies(const float *psi, struct ic_law_shape s, const struct totals *t,
                      struct ic_law_metrics *m)
{
    double all = 0, channel = 0;

    for (size_t i = 0; i < s.h * s.w; i++) {
        const float *cell = good_cell(psi, s, i);
        double e = cell ? ic_law_cell_norm2(cell, s.d) : 0, sum = 0;
        for (size_t k = 0; k < s.d; k++) {
            double p = e > 0 ? size2(cell, k) / e : 1 / (double)s.d;
            double q = size2(cell, k) / (t->energy + 1e-9);
            sum -= p > 0 ? p * log(p + 1e-10) : 0;
            all -= q > 0 ? q * log(q + 1e-9) : 0;
        }
        channel += sum;
    }
    m->entropy = all;
    m->channel_entropy = channel / (double)(s.h * s.w);
    m->channel_entropy_norm = s.d > 1 ? m->channel_entropy / log((double)s.d) : 0;
}

/* rot90 takes the value of row x, column w-1-y to row y, column x. */
static double symmetry(const float *psi, struct ic_law_shape s)
{
    double sum = 0;

    if (s.h != s.w)
        return (double)NAN;
    for (size_t y = 0; y < s.h; y++) {
        for (size_t x = 0; x < s.w; x++) {
            const float *a = good_cell(psi, s, y * s.w + x);
            const float *b = good_cell(psi, s, x * s.w + (s.w - 1 - y));
            for (size_t k = 0; k < s.d; k++) {
                double diff = sqrt(size2(a, k)) - sqrt(size2(b, k));
                sum += diff * diff;
            }
        }
    }
    return 1 / (1 + 100 * sum / (double)(s.h * s.w * s.d));
}

static double overlap(const float *a, const float *b, size_t d)
{
    double re = 0, im = 0;

    if (!a || !b)
        return 0;
    for (size_t k = 0; k < d; k++) {
        double ar = (double)a[2 * k], ai = (double)a[2 * k + 1];
        double br = (double)b[2 * k], bi = (double)b[2 * k + 1];
        re += ar * br + ai * bi;
        im += ar * bi - ai * br;
    }
    double norms = sqrt(ic_law_cell_norm2(a, d)) * sqrt(ic_law_cell_norm2(b, d));
    return sqrt(re * re + im * im) / (norms + 1e-10); /* float32 inputs: no overflow */
}

static double coherence(const float *psi, struct ic_law_shape s)
{
    double sum = 0;

    if (s.w < 2)
        return (double)NAN;
    for (size_t y = 0; y < s.h; y++)
        for (size_t x = 0; x + 1 < s.w; x++)
            sum += overlap(good_cell(psi, s, y * s.w + x), good_cell(psi, s, y * s.w + x + 1), s.d);
    return sum / (double)(s.h * (s.w - 1));
}

static double mean_delta(const float *delta, struct ic_law_shape s)
{
    double sum = 0;

    if (!delta)
        return (double)NAN;
    for (size_t i = 0; i < s.h * s.w; i++)
        sum += cell_size(good_cell(delta, s, i), s.d);
    return sum / (double)(s.h * s.w * s.d);
}

/* ---- Defects ---- */

/* Whole turns that wrapping takes out of the step arg b - arg a: the step crosses the cut at +-pi upwards
 * (-1), downwards (+1) or not (0). The angle lies in [0, pi] where Im >= 0, else in (-pi, 0); between the
 * two halves the step exceeds pi exactly where the cross product has the sign below. A step of exactly pi
 * crosses nothing, in either direction, so a loop's turns always sum to its winding. Products of two
 * float32 values are exact in double and their difference has the right sign. */
static int crossing(const float *a, const float *b)
{
    double cross = (double)a[0] * (double)b[1] - (double)a[1] * (double)b[0];
    int a_low = a[1] < 0, b_low = b[1] < 0;
    return a_low && !b_low ? -(cross < 0) : !a_low && b_low ? (cross > 0) : 0;
}

void ic_law_defects(const float *psi, struct ic_law_shape shape, size_t channel, size_t *positive,
                    size_t *negative)
{
    size_t step = 2 * shape.d, row = step * shape.w;

    *positive = *negative = 0;
    for (size_t y = 0; y + 1 < shape.h; y++) {
        const float *a = psi + y * row + 2 * channel;
        for (size_t x = 0; x + 1 < shape.w; x++, a += step) {
            const float *b = a + step, *c = b + row, *d = a + row;
            int turns = crossing(a, b) + crossing(b, c) + crossing(c, d) + crossing(d, a);
            *positive += turns > 0;
            *negative += turns < 0;
        }
    }
}

int ic_law_epoch(double energy, double symmetry_value, double clustering)
{
    if (energy < 1)
        return 0;
    if (symmetry_value < 0.2 && clustering < 0.1)
        return 1;
    if (symmetry_value > 0.6)
        return 2;
    if (symmetry_value > 0.3 && clustering > 0.5)
        return 3;
    return clustering > 2 ? 4 : 1;
}

enum ic_status ic_law_metrics_compute(const float *psi, const float *delta, struct ic_law_shape shape,
                                      size_t channel, struct ic_law_metrics *out, struct ic_err *err)
{
    size_t positive, negative;

    if (!ic_law_shape_ok(shape))
        return ic_fail(err, IC_BAD_REQUEST, "a state of %zux%zu cells and %zu channels is out of range",
                       shape.h, shape.w, shape.d);
    if (channel >= shape.d)
        return ic_fail(err, IC_BAD_REQUEST, "channel %zu does not exist (there are %zu)", channel, shape.d);
    struct totals t = add_up(psi, shape);
    spread(psi, shape, &t, out);
    entropies(psi, shape, &t, out);
    out->energy = t.energy;
    out->bad_cells = t.bad;
    out->symmetry = symmetry(psi, shape);
    out->coherence = coherence(psi, shape);
    out->mean_delta = mean_delta(delta, shape);
    ic_law_defects(psi, shape, channel, &positive, &negative);
    out->defects = (double)(positive + negative);
    out->defect_charge = (double)positive - (double)negative;
    out->epoch = (double)ic_law_epoch(out->energy, out->symmetry, out->clustering);
    return IC_OK;
}
