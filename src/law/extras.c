#include "law/extras.h"

#include <math.h>
#include <string.h>

#define TAU 6.28318530717958647692

/* A cell as drawn: NULL where it is masked. */
static const float *shown_cell(const float *psi, size_t d, size_t i)
{
    const float *cell = psi + i * 2 * d;
    return ic_law_norm2_shown(ic_law_cell_norm2(cell, d)) ? cell : NULL;
}

/* v = (v - min)/(max - min), 0.5 where flat. */
static void minmax(float *v, size_t n)
{
    float lo = v[0], hi = v[0];
    for (size_t i = 1; i < n; i++) {
        lo = v[i] < lo ? v[i] : lo;
        hi = v[i] > hi ? v[i] : hi;
    }
    float range = hi - lo;
    for (size_t i = 0; i < n; i++)
        v[i] = range < 1e-10f ? 0.5f : (v[i] - lo) / range;
}

void ic_law_extra_phase_hsv(const float *psi, struct ic_law_shape shape, float *hue, float *value)
{
    size_t n = shape.h * shape.w, d = shape.d;

    for (size_t i = 0; i < n; i++) {
        const float *cell = shown_cell(psi, d, i);
        double c = 0, s = 0;
        for (size_t k = 0; cell && k < d; k++) {
            double m = hypot((double)cell[2 * k], (double)cell[2 * k + 1]);
            c += m > 0 ? (double)cell[2 * k] / m : 1;
            s += m > 0 ? (double)cell[2 * k + 1] / m : 0;
        }
        hue[i] = (float)(atan2(s, c) / TAU + 0.5);
        value[i] = cell ? (float)ic_law_cell_norm2(cell, d) : 0;
    }
    minmax(value, n);
}

void ic_law_extra_complex_3d(const float *psi, struct ic_law_shape shape, float *re, float *im)
{
    for (size_t i = 0; i < shape.h * shape.w; i++) {
        const float *cell = shown_cell(psi, shape.d, i);
        double a = 0, b = 0;
        for (size_t k = 0; cell && k < shape.d; k++) {
            a += (double)cell[2 * k];
            b += (double)cell[2 * k + 1];
        }
        re[i] = (float)(a / (double)shape.d);
        im[i] = (float)(b / (double)shape.d);
    }
}

static void scale_down(float *v, size_t n, float by)
{
    for (size_t i = 0; by > 0 && i < n; i++)
        v[i] /= by;
}

void ic_law_extra_flow(const float *v, struct ic_law_shape shape, float *dx, float *dy, float *magnitude)
{
    size_t n = shape.h * shape.w, d = shape.d;
    float component = 0, size = 0;

    for (size_t i = 0; i < n; i++) {
        const float *cell = v ? v + i * 2 * d : NULL;
        double a = 0, b = 0, m = 0;
        if (cell && !(ic_law_cell_norm2(cell, d) <= (double)FLT_MAX))
            cell = NULL;
        for (size_t k = 0; cell && k < d; k++) {
            a += (double)cell[2 * k];
            b += (double)cell[2 * k + 1];
            m += hypot((double)cell[2 * k], (double)cell[2 * k + 1]);
        }
        dx[i] = (float)(a / (double)d);
        dy[i] = (float)(b / (double)d);
        magnitude[i] = (float)(m / (double)d);
        component = fmaxf(component, fmaxf(fabsf(dx[i]), fabsf(dy[i])));
        size = fmaxf(size, magnitude[i]);
    }
    scale_down(dx, n, component);
    scale_down(dy, n, component);
    scale_down(magnitude, n, size);
}

void ic_law_extra_attractor(const float *psi, struct ic_law_shape shape, struct ic_law_attractor *out)
{
    const float *cell = shown_cell(psi, shape.d, shape.h / 2 * shape.w + shape.w / 2);

    memset(out, 0, sizeof *out);
    for (size_t k = 0; cell && k < 2 && k < shape.d; k++) {
        out->channel[k].re = (double)cell[2 * k];
        out->channel[k].im = (double)cell[2 * k + 1];
        out->channel[k].abs = hypot((double)cell[2 * k], (double)cell[2 * k + 1]);
    }
}

/* ---- Poincare: principal components by Jacobi rotations of the covariance ---- */

/* Annihilates a[p][q] of the symmetric n x n matrix a; the columns of v collect the rotations. */
static void rotate(double *a, double *v, size_t n, size_t p, size_t q)
{
    double theta = (a[q * n + q] - a[p * n + p]) / (2 * a[p * n + q]);
    double t = copysign(1, theta) / (fabs(theta) + sqrt(theta * theta + 1));
    double c = 1 / sqrt(t * t + 1), s = t * c;

    for (size_t i = 0; i < n; i++) {
        double x = a[i * n + p], y = a[i * n + q];
        a[i * n + p] = c * x - s * y;
        a[i * n + q] = s * x + c * y;
    }
    for (size_t i = 0; i < n; i++) {
        double x = a[p * n + i], y = a[q * n + i];
        a[p * n + i] = c * x - s * y;
        a[q * n + i] = s * x + c * y;
        x = v[i * n + p], y = v[i * n + q];
        v[i * n + p] = c * x - s * y;
        v[i * n + q] = s * x + c * y;
    }
}

/* Cyclic sweeps until nothing off the diagonal matters beside it (quadratic: about 6 to 10 sweeps). */
static void jacobi(double *a, double *v, size_t n)
{
    double trace = 0;

    memset(v, 0, n * n * sizeof *v);
    for (size_t i = 0; i < n; i++) {
        v[i * n + i] = 1;
        trace += a[i * n + i];
    }
    for (int sweep = 0; sweep < 30; sweep++) {
        double off = 0;
        for (size_t p = 0; p < n; p++) {
            for (size_t q = p + 1; q < n; q++) {
                off = fmax(off, fabs(a[p * n + q]));
                if (fabs(a[p * n + q]) > 1e-15 * trace)
                    rotate(a, v, n, p, q);
            }
        }
        if (off <= 1e-15 * trace)
            return;
    }
}

/* The column of v with the largest eigenvalue, other than `but`, its sign settled. */
static size_t principal(const double *a, double *v, size_t n, size_t but)
{
    size_t best = but == 0 ? 1 : 0, top = 0;
    for (size_t i = 0; i < n; i++)
        if (i != but && a[i * n + i] > a[best * n + best])
            best = i;
    for (size_t i = 1; i < n; i++)
        if (fabs(v[i * n + best]) > fabs(v[top * n + best]))
            top = i;
    if (v[top * n + best] < 0)
        for (size_t i = 0; i < n; i++)
            v[i * n + best] = -v[i * n + best];
    return best;
}

struct sample {
    const float *psi;
    size_t d, stride, count;
};

/* Component i of a sampled cell, centred. */
static double component(const float *cell, const double *mean, size_t i)
{
    return (cell ? (double)cell[i] : 0) - mean[i];
}

static void covariance(const struct sample *s, double *mean, double *a)
{
    size_t n = 2 * s->d;

    memset(mean, 0, n * sizeof *mean);
    memset(a, 0, n * n * sizeof *a);
    for (size_t j = 0; j < s->count; j++) {
        const float *cell = shown_cell(s->psi, s->d, j * s->stride);
        for (size_t i = 0; cell && i < n; i++)
            mean[i] += (double)cell[i] / (double)s->count;
    }
    for (size_t j = 0; j < s->count; j++) {
        const float *cell = shown_cell(s->psi, s->d, j * s->stride);
        for (size_t p = 0; p < n; p++) {
            double c = component(cell, mean, p);
            for (size_t q = 0; q <= p; q++)
                a[p * n + q] += c * component(cell, mean, q);
        }
    }
    for (size_t p = 0; p < n; p++)
        for (size_t q = 0; q < p; q++)
            a[q * n + p] = a[p * n + q];
}

size_t ic_law_extra_poincare_scratch(size_t d)
{
    return 2 * d + 2 * (2 * d) * (2 * d); /* mean, covariance, rotations */
}

size_t ic_law_extra_poincare(const float *psi, struct ic_law_shape shape, size_t max_points, float *out,
                             double *scratch)
{
    size_t cells = shape.h * shape.w, n = 2 * shape.d, axis[2];
    double *mean = scratch, *a = mean + n, *v = a + n * n, most = 0;

    if (max_points == 0)
        return 0;
    struct sample s = {.psi = psi, .d = shape.d, .stride = (cells + max_points - 1) / max_points};
    s.count = (cells + s.stride - 1) / s.stride;
    covariance(&s, mean, a);
    jacobi(a, v, n);
    axis[0] = principal(a, v, n, n);
    axis[1] = principal(a, v, n, axis[0]);
    for (int pass = 0; pass < 2; pass++) { /* first the largest coordinate, then the coordinates */
        for (size_t j = 0; j < s.count; j++) {
            const float *cell = shown_cell(psi, shape.d, j * s.stride);
            for (size_t c = 0; c < 2; c++) {
                double sum = 0;
                for (size_t i = 0; i < n; i++)
                    sum += component(cell, mean, i) * v[i * n + axis[c]];
                if (pass == 0)
                    most = fmax(most, fabs(sum));
                else
                    out[2 * j + c] = most > 0 ? (float)(sum / most) : 0;
            }
        }
    }
    return s.count;
}
