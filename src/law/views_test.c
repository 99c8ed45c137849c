#include <complex.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "law/extras.h"
#include "law/fft.h"
#include "law/init.h"
#include "law/views.h"

/* ---- The views once more, slowly, in double precision, straight from the table of law-m.md 4.6 ---- */

struct scene {
    struct ic_law_shape s;
    float *psi, *delta;
};

static struct scene new_scene(size_t h, size_t w, size_t d, uint64_t seed)
{
    struct scene c = {.s = {h, w, d}};
    size_t n = ic_law_shape_floats(c.s);
    c.psi = malloc(n * sizeof(float));
    c.delta = malloc(n * sizeof(float));
    assert_true(c.psi && c.delta);
    assert_int_equal(ic_law_init_fill(c.psi, c.s, IC_LAW_INIT_RANDOM, seed, NULL), IC_OK);
    assert_int_equal(ic_law_init_fill(c.delta, c.s, IC_LAW_INIT_RANDOM, seed + 1000, NULL), IC_OK);
    return c;
}

/* Cells of many sizes, some below the mask. */
static void uneven(struct scene *c)
{
    for (size_t i = 0; i < c->s.h * c->s.w; i++) {
        float scale = i % 7 == 0 ? 0.02f : 0.2f + 0.01f * (float)(i * 37 % 101);
        for (size_t v = 0; v < 2 * c->s.d; v++)
            c->psi[i * 2 * c->s.d + v] *= scale;
    }
}

static void free_scene(struct scene *c)
{
    free(c->psi);
    free(c->delta);
}

static double complex at(const struct scene *c, long y, long x, size_t k)
{
    const float *cell = c->psi + ((size_t)y * c->s.w + (size_t)x) * c->s.d * 2;
    double n2 = 0;
    for (size_t i = 0; i < 2 * c->s.d; i++)
        n2 += pow((double)cell[i], 2);
    if (!(sqrt(n2) > 0.05) || isinf(n2))
        return 0;
    return (double)cell[2 * k] + I * (double)cell[2 * k + 1];
}

static double complex delta_at(const struct scene *c, long y, long x, size_t k)
{
    const float *v = c->delta + (((size_t)y * c->s.w + (size_t)x) * c->s.d + k) * 2;
    return c->delta ? (double)v[0] + I * (double)v[1] : 0;
}

static double density(const struct scene *c, long y, long x)
{
    double e = 0;
    for (size_t k = 0; k < c->s.d; k++)
        e += pow(cabs(at(c, y, x, k)), 2);
    return e;
}

static double slope(const struct scene *c, long y, long x, long dy, long dx)
{
    long h = (long)c->s.h, w = (long)c->s.w;
    bool before = y - dy >= 0 && x - dx >= 0, after = y + dy < h && x + dx < w;
    double b = before ? density(c, y - dy, x - dx) : density(c, y, x);
    double a = after ? density(c, y + dy, x + dx) : density(c, y, x);
    return before && after ? (a - b) / 2 : a - b;
}

/* One bin of fftshift(FFT2(density)) by definition. */
static double bin(const struct scene *c, long y, long x)
{
    long h = (long)c->s.h, w = (long)c->s.w, ky = (y - h / 2 + h) % h, kx = (x - w / 2 + w) % w;
    double complex sum = 0;
    for (long j = 0; j < h; j++)
        for (long i = 0; i < w; i++)
            sum +=
                density(c, j, i) *
                cexp(-2 * M_PI * I * ((double)(j * ky % h) / (double)h + (double)(i * kx % w) / (double)w));
    return log(1 + cabs(sum));
}

static double spectral(const struct scene *c, long y, long x)
{
    long h = (long)c->s.h, w = (long)c->s.w;
    double most = 0;
    if (y != h / 2 || x != w / 2)
        return bin(c, y, x);
    for (long j = y - 1; j <= y + 1; j++)
        for (long i = x - 1; i <= x + 1; i++)
            if ((j != y || i != x) && j >= 0 && i >= 0 && j < h && i < w)
                most = fmax(most, bin(c, j, i));
    return most;
}

static double coherence(const struct scene *c, long y, long x)
{
    double complex dot = 0;
    if (x + 1 == (long)c->s.w)
        return 0;
    for (size_t k = 0; k < c->s.d; k++)
        dot += conj(at(c, y, x, k)) * at(c, y, x + 1, k);
    return cabs(dot) / (sqrt(density(c, y, x)) * sqrt(density(c, y, x + 1)) + 1e-10);
}

static double activity(const struct scene *c, long y, long x)
{
    double most = 0, scale = 0;
    for (size_t k = 0; k < c->s.d; k++) {
        double mean = 0;
        for (long j = 0; j < (long)c->s.h; j++)
            for (long i = 0; i < (long)c->s.w; i++)
                mean += pow(cabs(at(c, j, i, k)), 2) / (double)(c->s.h * c->s.w);
        scale = fmax(scale, mean);
        most = fmax(most, pow(cabs(at(c, y, x, k)), 2));
    }
    return scale > 0 ? most / scale : 0;
}

/* The mean of unit phasors; its length tells how well the angle is defined. */
static double complex phasor(const struct scene *c, long y, long x)
{
    double sine = 0, cosine = 0;
    for (size_t k = 0; k < c->s.d; k++) {
        sine += sin(carg(at(c, y, x, k))) / (double)c->s.d;
        cosine += cos(carg(at(c, y, x, k))) / (double)c->s.d;
    }
    return cosine + I * sine;
}

static double value(const struct scene *c, enum ic_view view, long y, long x, size_t ch)
{
    double d = (double)c->s.d, sum = 0;

    switch (view) {
    case IC_VIEW_ENERGY:
    case IC_VIEW_DENSITY: return density(c, y, x);
    case IC_VIEW_PHASE: return (carg(phasor(c, y, x)) + M_PI) / (2 * M_PI);
    case IC_VIEW_REAL:
    case IC_VIEW_IMAG:
        for (size_t k = 0; k < c->s.d; k++)
            sum += view == IC_VIEW_REAL ? creal(at(c, y, x, k)) : cimag(at(c, y, x, k));
        return sum / d;
    case IC_VIEW_FIELDS: return ch < c->s.d ? cabs(at(c, y, x, ch)) : 0;
    case IC_VIEW_PHYSICS:
        for (size_t k = 0; k < c->s.d; k++) {
            double m = cabs(at(c, y, x, k));
            sum += m > 1e-10 ? cabs(delta_at(c, y, x, k)) / (m + 1e-10) : 0;
        }
        return sum / d;
    case IC_VIEW_FLOW:
        for (size_t k = 0; k < c->s.d; k++) {
            double complex v = delta_at(c, y, x, k);
            sum += ch == 0 ? creal(v) : ch == 1 ? cimag(v) : cabs(v);
        }
        return sum / d;
    case IC_VIEW_ENTROPY:
        for (size_t k = 0; k < c->s.d; k++) {
            double e = density(c, y, x), p = e > 0 ? pow(cabs(at(c, y, x, k)), 2) / e : 1 / d;
            sum -= p * log(p + 1e-10) / log(d);
        }
        return c->s.d > 1 ? sum : 0;
    case IC_VIEW_COHERENCE: return coherence(c, y, x);
    case IC_VIEW_CHANNEL_ACTIVITY: return activity(c, y, x);
    case IC_VIEW_GRADIENT: return hypot(slope(c, y, x, 1, 0), slope(c, y, x, 0, 1));
    case IC_VIEW_SPECTRAL: return spectral(c, y, x);
    default: fail(); return 0;
    }
}

static bool fixed_range(enum ic_view v)
{
    return v == IC_VIEW_DENSITY || v == IC_VIEW_PHASE || v == IC_VIEW_PHASE_HSV;
}

static struct ic_view_frame render(const struct scene *c, enum ic_view view, enum ic_view_encoding enc,
                                   struct ic_view_roi roi, void *out, size_t size)
{
    struct ic_view_ctx *ctx;
    struct ic_view_request r = {view, enc, roi};
    struct ic_view_frame f;
    assert_int_equal(ic_view_ctx_open(&ctx, NULL), IC_OK);
    assert_int_equal(ic_view_render(ctx, &r, c->psi, c->delta, c->s, out, size, &f, NULL), IC_OK);
    ic_view_ctx_close(&ctx);
    assert_null(ctx);
    return f;
}

/* Bytes are the truncation of what f32 shows, except where the quick phase stands at a step: one off, and
 * only within the documented distance. */
static void check_bytes(const uint8_t *u8, const float *f32, size_t n, enum ic_view view)
{
    for (size_t i = 0; i < n; i++) {
        double v = (double)f32[i] * 255, off = (double)u8[i] - floor(v);
        if (view != IC_VIEW_PHASE && view != IC_VIEW_PHASE_HSV) {
            assert_int_equal(u8[i], (int)(f32[i] * 255.0f));
            continue;
        }
        if (off == 0 || (u8[i] == 0 && v > 254.9) || (u8[i] == 255 && v < 0.1))
            continue; /* equal, or the other end of the circle */
        assert_true(fabs(off) == 1 && fabs(v - rint(v)) < 0.02);
    }
}

static void check_view(const struct scene *c, enum ic_view view, struct ic_view_roi roi)
{
    struct ic_view_roi r = roi.w ? roi : (struct ic_view_roi){0, 0, c->s.w, c->s.h};
    size_t ch = ic_view_channels(view), n = r.w * r.h * ch;
    float *got = malloc(n * sizeof *got);
    uint8_t *bytes = malloc(n);
    double *want = malloc(n * sizeof *want), lo = HUGE_VAL, hi = -HUGE_VAL;

    assert_true(got && bytes && want);
    struct ic_view_frame f = render(c, view, IC_VIEW_F32, roi, got, n * sizeof *got);
    assert_int_equal(f.bytes, n * sizeof *got);
    assert_true(f.shape[0] == r.h && f.shape[1] == r.w && f.shape[2] == ch && f.ndim == (ch > 1 ? 3 : 2));
    render(c, view, IC_VIEW_U8, roi, bytes, n);
    check_bytes(bytes, got, n, view);
    for (size_t i = 0; i < n; i++) {
        want[i] = value(c, view, (long)(r.y + i / ch / r.w), (long)(r.x + i / ch % r.w), i % ch);
        lo = fmin(lo, want[i]);
        hi = fmax(hi, want[i]);
    }
    if (view == IC_VIEW_FLOW)
        hi = fmax(hi, -lo), lo = -hi;
    if (fixed_range(view))
        lo = 0, hi = 1;
    assert_true(fabs((double)f.min - lo) <= 2e-6 * (1 + fabs(lo)));
    assert_true(fabs((double)f.max - hi) <= 2e-6 * (1 + fabs(hi)));
    for (size_t i = 0; i < n; i++) {
        double shown = hi - lo < 1e-10 ? 0.5 : fmin(fmax((want[i] - lo) / (hi - lo), 0), 1);
        double err = fabs((double)got[i] - shown), allowed = 4e-6 * (1 + fabs(hi) / fmax(hi - lo, 1e-3));
        if (view == IC_VIEW_PHASE) {
            err = fmin(err, 1 - err);
            allowed = 1e-7 / fmax(cabs(phasor(c, (long)(r.y + i / r.w), (long)(r.x + i % r.w))), 1e-3);
        }
        if (!(err <= allowed))
            fail_msg("%s [%zu]: %.9g, not %.9g", ic_view_name(view), i, (double)got[i], shown);
    }
    free(got);
    free(bytes);
    free(want);
}

static void every_view_agrees_with_a_naive_version(void **state)
{
    const size_t shapes[][3] = {{8, 8, 4}, {12, 20, 1}, {4, 36, 3}, {20, 12, 2}, {6, 7, 5}};
    (void)state;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct scene c = new_scene(shapes[i][0], shapes[i][1], shapes[i][2], i);
        uneven(&c);
        for (unsigned v = 0; v < IC_VIEW_COUNT; v++) {
            if (v == IC_VIEW_PHASE_HSV)
                continue; /* below */
            check_view(&c, (enum ic_view)v, (struct ic_view_roi){0});
            check_view(&c, (enum ic_view)v, (struct ic_view_roi){1, 2, 3, 2});
            check_view(&c, (enum ic_view)v, (struct ic_view_roi){c.s.w - 3, c.s.h - 2, 3, 2});
            check_view(&c, (enum ic_view)v, (struct ic_view_roi){0, 0, 1, 1});
        }
        free_scene(&c);
    }
}

static void delta_may_be_absent(void **state)
{
    struct scene c = new_scene(4, 8, 2, 1);
    float out[4 * 8 * 3], *delta = c.delta;
    (void)state;
    c.delta = NULL;
    for (unsigned v = 0; v < IC_VIEW_COUNT; v++) {
        if (!ic_view_needs_delta((enum ic_view)v))
            continue;
        struct ic_view_frame f =
            render(&c, (enum ic_view)v, IC_VIEW_F32, (struct ic_view_roi){0}, out, sizeof out);
        assert_true(f.min == 0 && f.max == 0);
        for (size_t i = 0; i < 32 * ic_view_channels((enum ic_view)v); i++)
            assert_true(out[i] == 0.5f);
    }
    c.delta = delta;
    free_scene(&c);
}

/* ---- Phase and its colours ---- */

static void phase_runs_round_the_whole_circle(void **state)
{
    const size_t n = 4096;
    struct scene c = new_scene(1, n, 1, 0);
    float *f32 = malloc(n * sizeof *f32);
    uint8_t *u8 = malloc(n);
    (void)state;
    assert_true(f32 && u8);
    for (size_t i = 0; i < n; i++) {
        double a = -M_PI + 2 * M_PI * ((double)i + 0.5) / (double)n;
        c.psi[2 * i] = (float)cos(a);
        c.psi[2 * i + 1] = (float)sin(a);
    }
    render(&c, IC_VIEW_PHASE, IC_VIEW_F32, (struct ic_view_roi){0}, f32, n * sizeof *f32);
    render(&c, IC_VIEW_PHASE, IC_VIEW_U8, (struct ic_view_roi){0}, u8, n);
    check_bytes(u8, f32, n, IC_VIEW_PHASE);
    for (size_t i = 0; i < n; i++) {
        assert_true(fabs((double)f32[i] - ((double)i + 0.5) / (double)n) < 1.5e-7);
        assert_int_equal(u8[i], (int)(((double)i + 0.5) / (double)n * 255));
    }
    free(f32);
    free(u8);
    free_scene(&c);
}

static void phase_at_the_axes(void **state)
{
    const float psi[] = {1, 0, 0, 1, -1, 0, 0, -1, 0, 0, 1e-12f, -1};
    struct scene c = {.s = {1, 6, 1}};
    float f32[6];
    uint8_t u8[6];
    (void)state;
    c.psi = malloc(sizeof psi);
    assert_non_null(c.psi);
    memcpy(c.psi, psi, sizeof psi);
    render(&c, IC_VIEW_PHASE, IC_VIEW_F32, (struct ic_view_roi){0}, f32, sizeof f32);
    render(&c, IC_VIEW_PHASE, IC_VIEW_U8, (struct ic_view_roi){0}, u8, sizeof u8);
    const float want[] = {0.5f, 0.75f, 1, 0.25f, 0.5f, 0.25f}; /* an empty cell has phase 0 */
    const uint8_t bytes[] = {127, 191, 255, 63, 127, 63};
    for (int i = 0; i < 6; i++)
        assert_true(fabsf(f32[i] - want[i]) < 1e-7f);
    assert_memory_equal(u8, bytes, sizeof u8);
    free(c.psi);
}

/* An empty channel beside i: its phasor is 1, so the mean points to pi/4. */
static void an_empty_channel_has_phase_zero(void **state)
{
    float psi[] = {0, 0, 0, 1}, f32;
    struct scene c = {.s = {1, 1, 2}, .psi = psi};
    uint8_t u8;
    (void)state;
    render(&c, IC_VIEW_PHASE, IC_VIEW_F32, (struct ic_view_roi){0}, &f32, sizeof f32);
    render(&c, IC_VIEW_PHASE, IC_VIEW_U8, (struct ic_view_roi){0}, &u8, sizeof u8);
    assert_true(f32 == 0.625f);
    assert_int_equal(u8, 159);
}

/* Colours by walking the six edges of the hue hexagon. */
static void naive_rgb(double hue, double value, double rgb[3])
{
    double h = hue * 6, f = h - floor(h);
    const double edge[7][3] = {{1, f, 0}, {1 - f, 1, 0}, {0, 1, f}, {0, 1 - f, 1},
                               {f, 0, 1}, {1, 0, 1 - f}, {1, 0, 0}};
    for (int c = 0; c < 3; c++)
        rgb[c] = edge[(int)h][c] * value;
}

static void check_hsv(struct scene *c, bool even)
{
    size_t n = c->s.h * c->s.w;
    float *out = malloc(n * 3 * sizeof *out), *hue = malloc(n * sizeof *hue),
          *val = malloc(n * sizeof *val);
    uint8_t *bytes = malloc(n * 3);
    double rgb[3];

    assert_true(out && hue && val && bytes);
    struct ic_view_frame f =
        render(c, IC_VIEW_PHASE_HSV, IC_VIEW_F32, (struct ic_view_roi){0}, out, n * 12);
    assert_true(f.ndim == 3 && f.min == 0 && f.max == 1);
    render(c, IC_VIEW_PHASE_HSV, IC_VIEW_U8, (struct ic_view_roi){0}, bytes, n * 3);
    ic_law_extra_phase_hsv(c->psi, c->s, hue, val);
    for (size_t i = 0; i < n; i++) {
        double want = value(c, IC_VIEW_PHASE, (long)(i / c->s.w), (long)(i % c->s.w), 0);
        assert_true(fabs((double)hue[i] - want) < 1e-6);
        naive_rgb((double)hue[i], even ? 1 : (double)val[i], rgb);
        for (size_t ch = 0; ch < 3; ch++) {
            assert_true(fabs((double)out[3 * i + ch] - rgb[ch]) < 1e-5);
            assert_true(fabs((double)bytes[3 * i + ch] - floor(255 * (double)out[3 * i + ch])) <= 1);
        }
    }
    free(out);
    free(hue);
    free(val);
    free(bytes);
}

static void phase_colours(void **state)
{
    struct scene c = new_scene(12, 16, 3, 5);
    (void)state;
    check_hsv(&c, true); /* unit cells: the density is even but for rounding */
    uneven(&c);
    check_hsv(&c, false);
    free_scene(&c);
}

/* ---- Values that no state should hold ---- */

static void broken_cells_are_empty(void **state)
{
    const float poison[] = {NAN, INFINITY, -INFINITY, 3e38f, -1e30f};
    (void)state;
    for (size_t q = 0; q < sizeof poison / sizeof *poison; q++) {
        for (unsigned v = 0; v < IC_VIEW_COUNT; v++) {
            struct scene a = new_scene(8, 12, 3, 3), b = new_scene(8, 12, 3, 3);
            float fa[96 * 3], fb[96 * 3];
            uint8_t ua[96 * 3], ub[96 * 3];
            size_t n = 96 * ic_view_channels((enum ic_view)v);
            a.psi[6 * 40 + 3] = a.psi[6 * 95] = poison[q];
            a.delta[6 * 11 + 5] = poison[q];
            memset(b.psi + 6 * 40, 0, 6 * sizeof(float));
            memset(b.psi + 6 * 95, 0, 6 * sizeof(float));
            memset(b.delta + 6 * 11, 0, 6 * sizeof(float));
            render(&a, (enum ic_view)v, IC_VIEW_F32, (struct ic_view_roi){0}, fa, sizeof fa);
            render(&b, (enum ic_view)v, IC_VIEW_F32, (struct ic_view_roi){0}, fb, sizeof fb);
            assert_memory_equal(fa, fb, n * sizeof *fa);
            render(&a, (enum ic_view)v, IC_VIEW_U8, (struct ic_view_roi){0}, ua, sizeof ua);
            render(&b, (enum ic_view)v, IC_VIEW_U8, (struct ic_view_roi){0}, ub, sizeof ub);
            assert_memory_equal(ua, ub, n);
            free_scene(&a);
            free_scene(&b);
        }
    }
}

static void huge_and_tiny_values_stay_in_range(void **state)
{
    const float scales[] = {1e18f, 1e-3f, 1e-30f, 0};
    (void)state;
    for (size_t q = 0; q < sizeof scales / sizeof *scales; q++) {
        for (unsigned v = 0; v < IC_VIEW_COUNT; v++) {
            struct scene c = new_scene(8, 8, 2, 3);
            float f32[64 * 3];
            uint8_t u8[64 * 3];
            for (size_t i = 0; i < 64 * 4; i++)
                c.psi[i] *= scales[q] * (i % 5 == 0 ? 0.1f : 1), c.delta[i] *= scales[q];
            struct ic_view_frame f =
                render(&c, (enum ic_view)v, IC_VIEW_F32, (struct ic_view_roi){0}, f32, sizeof f32);
            render(&c, (enum ic_view)v, IC_VIEW_U8, (struct ic_view_roi){0}, u8, sizeof u8);
            assert_true(isfinite(f.min) && isfinite(f.max) && f.min <= f.max);
            for (size_t i = 0; i < 64 * ic_view_channels((enum ic_view)v); i++)
                assert_true(f32[i] >= 0 && f32[i] <= 1);
            free_scene(&c);
        }
    }
}

static void zero_state_is_flat(void **state)
{
    struct scene c = new_scene(8, 8, 4, 3);
    uint8_t u8[64 * 3];
    (void)state;
    memset(c.psi, 0, 64 * 8 * sizeof(float));
    memset(c.delta, 0, 64 * 8 * sizeof(float));
    for (unsigned v = 0; v < IC_VIEW_COUNT; v++) {
        bool black = v == IC_VIEW_DENSITY || v == IC_VIEW_PHASE_HSV;
        render(&c, (enum ic_view)v, IC_VIEW_U8, (struct ic_view_roi){0}, u8, sizeof u8);
        for (size_t i = 0; i < 64 * ic_view_channels((enum ic_view)v); i++)
            assert_int_equal(u8[i], black ? 0 : 127);
    }
    free_scene(&c);
}

static void largest_value_is_255(void **state)
{
    struct scene c = new_scene(16, 16, 4, 0);
    uint8_t u8[256 * 3];
    (void)state;
    for (uint64_t seed = 0; seed < 50; seed++) {
        assert_int_equal(ic_law_init_fill(c.psi, c.s, IC_LAW_INIT_RANDOM, seed, NULL), IC_OK);
        for (unsigned v = IC_VIEW_REAL; v < IC_VIEW_COUNT; v++) {
            uint8_t lo = 255, hi = 0;
            render(&c, (enum ic_view)v, IC_VIEW_U8, (struct ic_view_roi){0}, u8, sizeof u8);
            for (size_t i = 0; i < 256 * ic_view_channels((enum ic_view)v); i++)
                lo = u8[i] < lo ? u8[i] : lo, hi = u8[i] > hi ? u8[i] : hi;
            assert_int_equal(hi, 255);
            assert_true(v == IC_VIEW_FLOW || lo == 0);
        }
    }
    free_scene(&c);
}

/* ---- Requests ---- */

static void requests_are_checked(void **state)
{
    struct scene c = new_scene(8, 12, 1, 0);
    struct ic_view_ctx *ctx;
    struct ic_view_frame f;
    struct ic_err err = {0};
    uint8_t out[96];
    const struct ic_view_roi bad[] = {{12, 0, 1, 1},       {0, 8, 1, 1},        {0, 0, 13, 1},
                                      {0, 0, 1, 9},        {6, 0, 7, 1},        {1, 1, 0, 1},
                                      {SIZE_MAX, 0, 2, 1}, {0, SIZE_MAX, 1, 2}, {1, 0, SIZE_MAX, 1}};
    (void)state;
    assert_int_equal(ic_view_ctx_open(&ctx, NULL), IC_OK);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct ic_view_request r = {IC_VIEW_DENSITY, IC_VIEW_U8, bad[i]};
        assert_int_equal(ic_view_render(ctx, &r, c.psi, NULL, c.s, out, sizeof out, &f, &err),
                         IC_BAD_REQUEST);
    }
    struct ic_view_request r = {IC_VIEW_DENSITY, IC_VIEW_U8, {0}};
    assert_int_equal(ic_view_render(ctx, &r, c.psi, NULL, c.s, out, 95, &f, &err), IC_TOO_LARGE);
    assert_int_equal(
        ic_view_render(ctx, &r, c.psi, NULL, (struct ic_law_shape){8, 0, 1}, out, 96, &f, &err),
        IC_BAD_REQUEST);
    r.view = IC_VIEW_COUNT;
    assert_int_equal(ic_view_plan(&r, c.s, &f, &err), IC_BAD_REQUEST);
    r = (struct ic_view_request){IC_VIEW_FLOW, (enum ic_view_encoding)7, {0}};
    assert_int_equal(ic_view_plan(&r, c.s, &f, &err), IC_BAD_REQUEST);
    r.encoding = IC_VIEW_F32;
    assert_int_equal(ic_view_plan(&r, c.s, &f, &err), IC_OK);
    assert_int_equal(f.bytes, 96 * 3 * 4);
    ic_view_ctx_close(&ctx);
    ic_view_ctx_close(&ctx);
    ic_view_ctx_close(NULL);
    free_scene(&c);
}

static void names_round_trip(void **state)
{
    enum ic_view view;
    enum ic_view_encoding enc;
    struct ic_err err = {0};
    (void)state;
    for (unsigned v = 0; v < IC_VIEW_COUNT; v++) {
        assert_int_equal(ic_view_parse(ic_view_name((enum ic_view)v), &view, &err), IC_OK);
        assert_int_equal(view, v);
        assert_true(strlen(ic_view_formula(view)) > 0);
    }
    assert_int_equal(ic_view_parse("holographic", &view, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_view_parse(NULL, &view, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_view_encoding_parse("u8", &enc, &err), IC_OK);
    assert_int_equal(enc, IC_VIEW_U8);
    assert_int_equal(ic_view_encoding_parse("f32", &enc, &err), IC_OK);
    assert_string_equal(ic_view_encoding_name(enc), "f32");
    assert_int_equal(ic_view_encoding_parse("f64", &enc, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_view_encoding_parse(NULL, &enc, &err), IC_BAD_REQUEST);
}

/* One context, many sizes, views and an unaligned target: the same bytes as a fresh context gives, and
 * nothing new is held once the sizes have been seen. */
static void a_context_serves_any_order(void **state)
{
    const size_t sides[] = {36, 8, 20, 64, 4, 12, 28, 32, 44, 52};
    struct ic_view_ctx *ctx;
    size_t held = 0;
    (void)state;
    assert_int_equal(ic_view_ctx_open(&ctx, NULL), IC_OK);
    for (int round = 0; round < 2; round++) {
        for (size_t i = 0; i < sizeof sides / sizeof *sides; i++) {
            struct scene c = new_scene(sides[i], sides[(i + 3) % 10], 1 + i % 4, i);
            size_t n = c.s.h * c.s.w;
            char *a = malloc(n * 12 + 1), *b = malloc(n * 12);
            assert_true(a && b);
            for (unsigned v = 0; v < IC_VIEW_COUNT; v++) {
                struct ic_view_request r = {(enum ic_view)v, IC_VIEW_F32, {0}};
                struct ic_view_frame f, g;
                assert_int_equal(ic_view_render(ctx, &r, c.psi, c.delta, c.s, a + 1, n * 12, &f, NULL),
                                 IC_OK);
                g = render(&c, r.view, IC_VIEW_F32, r.roi, b, n * 12);
                assert_memory_equal(a + 1, b, f.bytes);
                assert_true(f.min == g.min && f.max == g.max);
            }
            free(a);
            free(b);
            free_scene(&c);
        }
        assert_true(round == 0 || ic_view_ctx_bytes(ctx) == held);
        held = ic_view_ctx_bytes(ctx);
    }
    ic_view_ctx_close(&ctx);
}

/* ---- Transforms ---- */

static void check_fft(size_t n)
{
    struct ic_fft *fft;
    double *re = malloc(n * IC_FFT_LANES * sizeof *re), *im = malloc(n * IC_FFT_LANES * sizeof *im);
    double *re0 = malloc(n * IC_FFT_LANES * sizeof *re), *im0 = malloc(n * IC_FFT_LANES * sizeof *im);

    assert_true(re && im && re0 && im0);
    assert_int_equal(ic_fft_open(&fft, n, NULL), IC_OK);
    assert_int_equal(ic_fft_length(fft), n);
    for (size_t i = 0; i < n * IC_FFT_LANES; i++) {
        double v[2];
        ic_law_rng_normal2(n, 99, i, v);
        re[i] = re0[i] = v[0], im[i] = im0[i] = v[1];
    }
    for (int twice = 0; twice < 2; twice++) { /* a plan keeps nothing from one run to the next */
        memcpy(re, re0, n * IC_FFT_LANES * sizeof *re);
        memcpy(im, im0, n * IC_FFT_LANES * sizeof *im);
        ic_fft_run(fft, re, im);
    }
    for (size_t lane = 0; lane < IC_FFT_LANES; lane++) {
        for (size_t k = 0; k < n; k++) {
            double complex sum = 0;
            for (size_t j = 0; j < n; j++)
                sum += (re0[j * IC_FFT_LANES + lane] + I * im0[j * IC_FFT_LANES + lane]) *
                       cexp(-2 * M_PI * I * (double)(j * k % n) / (double)n);
            double complex got = re[k * IC_FFT_LANES + lane] + I * im[k * IC_FFT_LANES + lane];
            assert_true(cabs(got - sum) < 1e-13 * (double)n);
        }
    }
    ic_fft_close(&fft);
    assert_null(fft);
    free(re);
    free(im);
    free(re0);
    free(im0);
}

static void transforms_of_every_length(void **state)
{
    const size_t more[] = {63, 64, 65, 97, 100, 127, 128, 251, 256};
    struct ic_fft *fft;
    struct ic_err err = {0};
    (void)state;
    for (size_t n = 1; n <= 44; n++)
        check_fft(n);
    for (size_t i = 0; i < sizeof more / sizeof *more; i++)
        check_fft(more[i]);
    assert_int_equal(ic_fft_open(&fft, 0, &err), IC_BAD_REQUEST);
    assert_null(fft);
    assert_int_equal(ic_fft_open(&fft, IC_FFT_LENGTH_MAX + 1, &err), IC_BAD_REQUEST);
}

static void a_striped_density_has_its_spectral_lines(void **state)
{
    struct scene c = new_scene(32, 100, 1, 0);
    float *out = malloc(3200 * sizeof *out);
    (void)state;
    assert_non_null(out);
    for (size_t i = 0; i < 3200; i++) {
        c.psi[2 * i] = (float)sqrt(0.5 + 0.25 * cos(2 * M_PI * 7 * (double)(i % 100) / 100));
        c.psi[2 * i + 1] = 0;
    }
    struct ic_view_frame f = render(&c, IC_VIEW_SPECTRAL, IC_VIEW_F32, (struct ic_view_roi){0}, out, 12800);
    assert_true(fabs((double)f.max - log(1 + 3200 * 0.125)) < 1e-5);
    for (size_t i = 0; i < 3200; i++) /* two lines, and a centre as dark as its neighbours */
        assert_true(i == 1657 || i == 1643 ? out[i] > 0.9999f : out[i] < 1e-4f);
    free(out);
    free_scene(&c);
}

/* ---- Extras ---- */

static void flow_and_complex_means(void **state)
{
    struct scene c = new_scene(6, 10, 3, 2);
    float dx[60], dy[60], mag[60], re[60], im[60];
    double most = 0, size = 0;
    (void)state;
    uneven(&c);
    ic_law_extra_flow(c.delta, c.s, dx, dy, mag);
    ic_law_extra_complex_3d(c.psi, c.s, re, im);
    for (long i = 0; i < 60; i++) {
        most = fmax(most, fabs(value(&c, IC_VIEW_FLOW, i / 10, i % 10, 0)));
        most = fmax(most, fabs(value(&c, IC_VIEW_FLOW, i / 10, i % 10, 1)));
        size = fmax(size, value(&c, IC_VIEW_FLOW, i / 10, i % 10, 2));
    }
    for (long i = 0; i < 60; i++) {
        assert_true(fabs((double)dx[i] - value(&c, IC_VIEW_FLOW, i / 10, i % 10, 0) / most) < 1e-6);
        assert_true(fabs((double)dy[i] - value(&c, IC_VIEW_FLOW, i / 10, i % 10, 1) / most) < 1e-6);
        assert_true(fabs((double)mag[i] - value(&c, IC_VIEW_FLOW, i / 10, i % 10, 2) / size) < 1e-6);
        assert_true(fabs((double)re[i] - value(&c, IC_VIEW_REAL, i / 10, i % 10, 0)) < 1e-7);
        assert_true(fabs((double)im[i] - value(&c, IC_VIEW_IMAG, i / 10, i % 10, 0)) < 1e-7);
    }
    c.delta[5] = NAN;
    ic_law_extra_flow(c.delta, c.s, dx, dy, mag);
    assert_true(dx[0] == 0 && dy[0] == 0 && mag[0] == 0 && isfinite(dx[1]));
    ic_law_extra_flow(NULL, c.s, dx, dy, mag);
    for (int i = 0; i < 60; i++)
        assert_true(dx[i] == 0 && dy[i] == 0 && mag[i] == 0);
    free_scene(&c);
}

static void attractor_is_the_centre_cell(void **state)
{
    struct scene c = new_scene(6, 10, 2, 2);
    struct ic_law_attractor a;
    (void)state;
    ic_law_extra_attractor(c.psi, c.s, &a);
    for (size_t k = 0; k < 2; k++) {
        assert_true(a.channel[k].re == creal(at(&c, 3, 5, k)) && a.channel[k].im == cimag(at(&c, 3, 5, k)));
        assert_true(fabs(a.channel[k].abs - cabs(at(&c, 3, 5, k))) < 1e-12);
    }
    c.psi[(3 * 10 + 5) * 4] = NAN;
    ic_law_extra_attractor(c.psi, c.s, &a);
    assert_true(a.channel[0].re == 0 && a.channel[1].abs == 0);
    ic_law_extra_attractor(c.psi, (struct ic_law_shape){1, 1, 1}, &a);
    assert_true(a.channel[0].abs > 0 && a.channel[1].abs == 0);
    free_scene(&c);
}

/* A cloud with axes known by construction: the coordinates come back, largest spread first. */
static void poincare_finds_the_axes(void **state)
{
    struct scene c = new_scene(40, 40, 3, 2);
    double scratch[2 * 3 + 2 * 36], u[6], v[6], r2 = 0, s = sqrt(0.5);
    float *out = malloc(1600 * 2 * sizeof *out);
    (void)state;
    assert_non_null(out);
    assert_int_equal(ic_law_extra_poincare_scratch(3), sizeof scratch / sizeof *scratch);
    for (int i = 0; i < 6; i++)
        u[i] = i < 2 ? s : 0, v[i] = i == 4 ? 0.8 : i == 5 ? -0.6 : 0;
    for (size_t j = 0; j < 1600; j++) {
        double n[2];
        ic_law_rng_normal2(3, 77, j, n);
        for (int i = 0; i < 6; i++)
            c.psi[j * 6 + (size_t)i] = (float)(2 * (i == 3) + 0.5 * n[0] * u[i] + 0.2 * n[1] * v[i]);
        r2 = fmax(r2, fmax(fabs(0.5 * n[0]), fabs(0.2 * n[1])));
    }
    assert_int_equal(ic_law_extra_poincare(c.psi, c.s, 1600, out, scratch), 1600);
    double most = 0, sxy = 0, sxx = 0, mean[2] = {0};
    for (size_t j = 0; j < 1600; j++) {
        double n[2];
        ic_law_rng_normal2(3, 77, j, n);
        most = fmax(most, fmax(fabs((double)out[2 * j]), fabs((double)out[2 * j + 1])));
        mean[0] += (double)out[2 * j], mean[1] += (double)out[2 * j + 1];
        sxy += (double)out[2 * j] * (double)out[2 * j + 1];
        sxx += (double)out[2 * j] * (double)out[2 * j];
        /* within the small tilt and shift that a finite sample brings */
        assert_true(fabs((double)out[2 * j] - 0.5 * n[0] / r2) < 0.05);
        assert_true(fabs((double)out[2 * j + 1] - 0.2 * n[1] / r2) < 0.1);
    }
    assert_true(most == 1);
    assert_true(fabs(sxy) < 1e-4 * sxx); /* principal: uncorrelated */
    assert_true(fabs(mean[0]) < 1e-3 && fabs(mean[1]) < 1e-3);
    free(out);
    free_scene(&c);
}

static void poincare_strides_and_survives(void **state)
{
    struct scene c = new_scene(10, 10, 1, 2);
    double scratch[2 + 2 * 4];
    float out[200], again[200];
    (void)state;
    assert_int_equal(ic_law_extra_poincare(c.psi, c.s, 30, out, scratch), 25); /* stride 4 */
    assert_int_equal(ic_law_extra_poincare(c.psi, c.s, 30, again, scratch), 25);
    assert_memory_equal(out, again, 50 * sizeof *out);
    assert_int_equal(ic_law_extra_poincare(c.psi, c.s, 0, out, scratch), 0);
    assert_int_equal(ic_law_extra_poincare(c.psi, c.s, 1, out, scratch), 1);
    assert_true(out[0] == 0 && out[1] == 0);
    for (size_t i = 0; i < 200; i++)
        c.psi[i] = i % 3 ? 1e18f : NAN;
    ic_law_extra_poincare(c.psi, c.s, 100, out, scratch);
    for (size_t i = 0; i < 200; i++)
        assert_true(out[i] >= -1 && out[i] <= 1);
    memset(c.psi, 0, 200 * sizeof(float));
    ic_law_extra_poincare(c.psi, c.s, 100, out, scratch);
    for (size_t i = 0; i < 200; i++)
        assert_true(out[i] == 0);
    free_scene(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_view_agrees_with_a_naive_version),
        cmocka_unit_test(delta_may_be_absent),
        cmocka_unit_test(phase_runs_round_the_whole_circle),
        cmocka_unit_test(phase_at_the_axes),
        cmocka_unit_test(an_empty_channel_has_phase_zero),
        cmocka_unit_test(phase_colours),
        cmocka_unit_test(broken_cells_are_empty),
        cmocka_unit_test(huge_and_tiny_values_stay_in_range),
        cmocka_unit_test(zero_state_is_flat),
        cmocka_unit_test(largest_value_is_255),
        cmocka_unit_test(requests_are_checked),
        cmocka_unit_test(names_round_trip),
        cmocka_unit_test(a_context_serves_any_order),
        cmocka_unit_test(transforms_of_every_length),
        cmocka_unit_test(a_striped_density_has_its_spectral_lines),
        cmocka_unit_test(flow_and_complex_means),
        cmocka_unit_test(attractor_is_the_centre_cell),
        cmocka_unit_test(poincare_finds_the_axes),
        cmocka_unit_test(poincare_strides_and_survives),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
