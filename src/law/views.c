#include "law/views.h"

/* Frames of a hundred simulations share two cores with the laws: the loops below are written over planes
 * (one channel of a row at a time) so that the compiler turns them into vector code. errno and
 * floating-point traps are of no use here and would forbid that for sqrt and for selects; NaN keeps its
 * meaning. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3", "no-math-errno", "no-trapping-math")
#endif

#include <stdlib.h>
#include <string.h>

#include "law/fft.h"
#include "law/view_cell.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "frames are little-endian as they lie in memory");

#define FFT_PLANS 8
#define LANES 16 /* partial minima and maxima */

struct ic_view_ctx {
    float *map;  /* values of the picture, region only */
    float *rows; /* planes of one row */
    float *grid; /* one value per cell of the whole grid */
    double *spectrum;
    size_t map_size, rows_size, grid_size, spectrum_size; /* bytes */
    struct ic_fft *fft[FFT_PLANS];
    unsigned fft_next; /* the plan to give up next */
};

/* One row cut into planes: re and im are [d][n], the rest [n]. Masked cells are all zero. */
struct row {
    float *re, *im, *norm2;
    size_t n;
};

struct pic {
    struct ic_view_ctx *ctx;
    const float *psi, *delta;
    struct ic_law_shape s;
    struct ic_view_roi roi;
    bool quick; /* the answer becomes bytes */
    size_t channels;
    float *map;
    struct row a, b; /* psi; delta */
    float *t0, *t1;  /* two more planes of a row */
};

/* ---- Scratch ---- */

/* Gives a block of at least `want` bytes in place of `old`, whose content is not kept; NULL (and *size 0)
 * without memory. */
static void *grown(void *old, size_t *size, size_t want)
{
    if (old && *size >= want)
        return old;
    free(old);
    void *p = aligned_alloc(64, (want + 63) & ~(size_t)63);
    *size = p ? want : 0;
    return p;
}

static bool grow_grid(struct ic_view_ctx *ctx, size_t cells)
{
    ctx->grid = grown(ctx->grid, &ctx->grid_size, cells * sizeof *ctx->grid);
    return ctx->grid != NULL;
}

enum ic_status ic_view_ctx_open(struct ic_view_ctx **out, struct ic_err *err)
{
    *out = calloc(1, sizeof **out);
    return *out ? IC_OK : ic_fail(err, IC_OOM, "no memory for a view context");
}

void ic_view_ctx_close(struct ic_view_ctx **ctx)
{
    if (!ctx || !*ctx)
        return;
    for (unsigned i = 0; i < FFT_PLANS; i++)
        ic_fft_close(&(*ctx)->fft[i]);
    free((*ctx)->map);
    free((*ctx)->rows);
    free((*ctx)->grid);
    free((*ctx)->spectrum);
    free(*ctx);
    *ctx = NULL;
}

size_t ic_view_ctx_bytes(const struct ic_view_ctx *ctx)
{
    return sizeof *ctx + ctx->map_size + ctx->rows_size + ctx->grid_size + ctx->spectrum_size;
}

static struct ic_fft *fft_for(struct ic_view_ctx *ctx, size_t n)
{
    for (unsigned i = 0; i < FFT_PLANS; i++)
        if (ctx->fft[i] && ic_fft_length(ctx->fft[i]) == n)
            return ctx->fft[i];
    struct ic_fft **slot = &ctx->fft[ctx->fft_next++ % FFT_PLANS];
    ic_fft_close(slot);
    (void)ic_fft_open(slot, n, NULL);
    return *slot;
}

/* ---- Rows ---- */

static bool finite_norm2(float n2)
{
    return n2 <= FLT_MAX; /* false for NaN */
}

static bool shown_norm2(float n2)
{
    return n2 > (float)(IC_LAW_MASK_NORM * IC_LAW_MASK_NORM) && n2 <= FLT_MAX;
}

static void norm2_row(const float *src, size_t n, size_t d, float *out)
{
    for (size_t x = 0; x < n; x++) {
        const float *cell = src + x * 2 * d;
        float sum = 0;
        for (size_t i = 0; i < 2 * d; i++)
            sum += cell[i] * cell[i];
        out[x] = shown_norm2(sum) ? sum : 0;
    }
}

/* Splits n cells into planes and empties those that do not count. */
static void load_row(const float *src, size_t d, bool mask, const struct row *r)
{
    size_t n = r->n, empty = 0;

    memset(r->norm2, 0, n * sizeof *r->norm2);
    for (size_t k = 0; k < d; k++) {
        const float *restrict in = src + 2 * k;
        float *restrict re = r->re + k * n, *restrict im = r->im + k * n, *restrict n2 = r->norm2;
        for (size_t x = 0; x < n; x++) {
            float a = in[x * 2 * d], b = in[x * 2 * d + 1];
            re[x] = a;
            im[x] = b;
            n2[x] += a * a + b * b;
        }
    }
    for (size_t x = 0; x < n; x++)
        empty += mask ? !shown_norm2(r->norm2[x]) : !finite_norm2(r->norm2[x]);
    if (!empty)
        return;
    for (size_t x = 0; x < n; x++) {
        if (mask ? shown_norm2(r->norm2[x]) : finite_norm2(r->norm2[x]))
            continue;
        r->norm2[x] = 0;
        for (size_t k = 0; k < d; k++)
            r->re[k * n + x] = r->im[k * n + x] = 0;
    }
}

static void load_psi(struct pic *p, size_t y, size_t x)
{
    load_row(ic_law_cell(p->psi, p->s, y, x), p->s.d, true, &p->a);
}

static void load_delta(struct pic *p, size_t y, size_t x)
{
    if (p->delta) {
        load_row(ic_law_cell(p->delta, p->s, y, x), p->s.d, false, &p->b);
        return;
    }
    memset(p->b.re, 0, p->s.d * p->b.n * sizeof *p->b.re);
    memset(p->b.im, 0, p->s.d * p->b.n * sizeof *p->b.im);
}

/* ---- Views of one cell: out[x] from the row in p->a (psi) and p->b (delta) ---- */

static void row_density(const struct pic *p, float *out)
{
    memcpy(out, p->a.norm2, p->a.n * sizeof *out);
}

static void phase_quick(const struct pic *p, float *out)
{
    size_t n = p->a.n;
    float *restrict c = p->t0, *restrict s = p->t1;

    memset(c, 0, n * sizeof *c);
    memset(s, 0, n * sizeof *s);
    for (size_t k = 0; k < p->s.d; k++) {
        const float *restrict re = p->a.re + k * n, *restrict im = p->a.im + k * n;
        for (size_t x = 0; x < n; x++) {
            float m2 = re[x] * re[x] + im[x] * im[x];
            float inv = 1 / sqrtf(m2 >= FLT_MIN ? m2 : 1);
            c[x] += m2 >= FLT_MIN ? re[x] * inv : 1; /* arg 0 = 0 */
            s[x] += m2 >= FLT_MIN ? im[x] * inv : 0;
        }
    }
    for (size_t x = 0; x < n; x++)
        out[x] = turns(s[x], c[x]) + 0.5f;
}

static void phase_exact(const struct pic *p, float *out)
{
    size_t n = p->a.n;
    for (size_t x = 0; x < n; x++) {
        double c = 0, s = 0;
        for (size_t k = 0; k < p->s.d; k++) {
            double re = (double)p->a.re[k * n + x], im = (double)p->a.im[k * n + x];
            double m = sqrt(re * re + im * im);
            c += m > 0 ? re / m : 1;
            s += m > 0 ? im / m : 0;
        }
        out[x] = (float)(atan2(s, c) / 6.28318530717958647692 + 0.5);
    }
}

static void row_phase(const struct pic *p, float *out)
{
    if (p->quick)
        phase_quick(p, out);
    else
        phase_exact(p, out);
}

static void mean_plane(const float *planes, size_t n, size_t d, float *restrict out)
{
    memset(out, 0, n * sizeof *out);
    for (size_t k = 0; k < d; k++) {
        const float *restrict plane = planes + k * n;
        for (size_t x = 0; x < n; x++)
            out[x] += plane[x];
    }
    for (size_t x = 0; x < n; x++)
        out[x] /= (float)d;
}

static void row_real(const struct pic *p, float *out)
{
    mean_plane(p->a.re, p->a.n, p->s.d, out);
}

static void row_imag(const struct pic *p, float *out)
{
    mean_plane(p->a.im, p->a.n, p->s.d, out);
}

static void row_fields(const struct pic *p, float *out)
{
    size_t n = p->a.n;
    for (size_t k = 0; k < 3; k++) {
        for (size_t x = 0; x < n; x++) {
            float re = k < p->s.d ? p->a.re[k * n + x] : 0, im = k < p->s.d ? p->a.im[k * n + x] : 0;
            out[x * 3 + k] = sqrtf(re * re + im * im);
        }
    }
}

static void row_physics(const struct pic *p, float *out)
{
    size_t n = p->a.n;

    memset(out, 0, n * sizeof *out);
    for (size_t i = 0; i < p->s.d * n; i++) { /* i = k n + x; |delta|/|psi| over b.re */
        float m = sqrtf(p->a.re[i] * p->a.re[i] + p->a.im[i] * p->a.im[i]);
        float v = sqrtf(p->b.re[i] * p->b.re[i] + p->b.im[i] * p->b.im[i]);
        p->b.re[i] = m > TINY ? v / (m + TINY) : 0;
    }
    mean_plane(p->b.re, n, p->s.d, out);
}

static void row_flow(const struct pic *p, float *out)
{
    size_t n = p->b.n;

    mean_plane(p->b.re, n, p->s.d, p->t0);
    mean_plane(p->b.im, n, p->s.d, p->t1);
    for (size_t i = 0; i < p->s.d * n; i++)
        p->b.re[i] = sqrtf(p->b.re[i] * p->b.re[i] + p->b.im[i] * p->b.im[i]);
    mean_plane(p->b.re, n, p->s.d, p->b.im); /* over the first plane, no longer needed */
    for (size_t x = 0; x < n; x++) {
        out[x * 3] = p->t0[x];
        out[x * 3 + 1] = p->t1[x];
        out[x * 3 + 2] = p->b.im[x];
    }
}

static void row_entropy(const struct pic *p, float *out)
{
    size_t n = p->a.n, d = p->s.d;

    memset(out, 0, n * sizeof *out);
    if (d == 1)
        return;
    for (size_t k = 0; k < d; k++) {
        const float *re = p->a.re + k * n, *im = p->a.im + k * n;
        for (size_t x = 0; x < n; x++) {
            float e = p->a.norm2[x];
            float q = e > 0 ? (re[x] * re[x] + im[x] * im[x]) / e : 1 / (float)d;
            out[x] -= q * logf(q + TINY);
        }
    }
    for (size_t x = 0; x < n; x++)
        out[x] /= logf((float)d);
}

/* ---- Views that need neighbours or the whole grid ---- */

static bool map_coherence(struct pic *p)
{
    size_t d = p->s.d, w = p->roi.w;
    bool border = p->roi.x + w == p->s.w;

    p->a.n = border ? w : w + 1;
    for (size_t y = 0; y < p->roi.h; y++) {
        size_t n = p->a.n;
        float *out = p->map + y * w, *restrict re = p->t0, *restrict im = p->t1;
        load_psi(p, p->roi.y + y, p->roi.x);
        memset(re, 0, n * sizeof *re);
        memset(im, 0, n * sizeof *im);
        for (size_t k = 0; k < d; k++) {
            const float *a = p->a.re + k * n, *b = p->a.im + k * n;
            for (size_t x = 0; x + 1 < n; x++) {
                re[x] += a[x] * a[x + 1] + b[x] * b[x + 1];
                im[x] += a[x] * b[x + 1] - b[x] * a[x + 1];
            }
        }
        for (size_t x = 0; x + 1 < n; x++) {
            float norms = sqrtf(p->a.norm2[x]) * sqrtf(p->a.norm2[x + 1]) + TINY;
            float c = re[x] / norms, s = im[x] / norms; /* divided first: never beyond 1 */
            out[x] = sqrtf(c * c + s * s);
        }
        if (border)
            out[w - 1] = 0;
    }
    return true;
}

static bool map_activity(struct pic *p)
{
    size_t d = p->s.d, cells = p->s.h * p->s.w;
    double sum[IC_LAW_D_MAX] = {0}, most = 0;

    p->a.n = p->s.w;
    for (size_t y = 0; y < p->s.h; y++) {
        load_psi(p, y, 0);
        for (size_t k = 0; k < d; k++) {
            const float *re = p->a.re + k * p->s.w, *im = p->a.im + k * p->s.w;
            for (size_t x = 0; x < p->s.w; x++)
                sum[k] += (double)(re[x] * re[x] + im[x] * im[x]);
        }
    }
    for (size_t k = 0; k < d; k++)
        most = sum[k] > most ? sum[k] : most;
    float scale = (float)(most / (double)cells);
    p->a.n = p->roi.w;
    for (size_t y = 0; y < p->roi.h; y++) {
        float *restrict out = p->map + y * p->roi.w;
        load_psi(p, p->roi.y + y, p->roi.x);
        memset(out, 0, p->roi.w * sizeof *out);
        for (size_t k = 0; k < d; k++) {
            const float *restrict re = p->a.re + k * p->roi.w, *restrict im = p->a.im + k * p->roi.w;
            for (size_t x = 0; x < p->roi.w; x++) {
                float m2 = re[x] * re[x] + im[x] * im[x];
                out[x] = m2 > out[x] ? m2 : out[x];
            }
        }
        for (size_t x = 0; x < p->roi.w; x++)
            out[x] = scale > 0 ? out[x] / scale : 0;
    }
    return true;
}

static bool grid_density(struct pic *p)
{
    size_t cells = p->s.h * p->s.w;
    if (!grow_grid(p->ctx, cells))
        return false;
    norm2_row(p->psi, cells, p->s.d, p->ctx->grid);
    return true;
}

static bool map_gradient(struct pic *p)
{
    size_t h = p->s.h, w = p->s.w;

    if (!grid_density(p))
        return false;
    const float *e = p->ctx->grid;
    for (size_t i = 0; i < p->roi.h; i++) {
        size_t y = p->roi.y + i, up = y > 0 ? y - 1 : 0, down = y + 1 < h ? y + 1 : y;
        float dy = down - up == 2 ? 0.5f : 1;
        for (size_t j = 0; j < p->roi.w; j++) {
            size_t x = p->roi.x + j, left = x > 0 ? x - 1 : 0, right = x + 1 < w ? x + 1 : x;
            float gx = (e[y * w + right] - e[y * w + left]) * (right - left == 2 ? 0.5f : 1);
            float gy = (e[down * w + x] - e[up * w + x]) * dy;
            float g = sqrtf(gx * gx + gy * gy);
            p->map[i * p->roi.w + j] = g <= FLT_MAX ? g : FLT_MAX;
        }
    }
    return true;
}

/* Rows in pairs: row i of a block rides as the real part of lane i, row i + LANES as the imaginary one, and
 * the symmetry of real transforms takes them apart again. half is [2][h][k], k = w/2 + 1. */
static void transform_rows(const float *e, size_t h, size_t w, struct ic_fft *fft, double *re, double *im,
                           double *half)
{
    size_t k = w / 2 + 1;

    for (size_t y0 = 0; y0 < h; y0 += 2 * IC_FFT_LANES) {
        for (size_t x = 0; x < w; x++) {
            for (size_t i = 0; i < IC_FFT_LANES; i++) {
                size_t y = y0 + i, y2 = y + IC_FFT_LANES;
                re[x * IC_FFT_LANES + i] = y < h ? (double)e[y * w + x] : 0;
                im[x * IC_FFT_LANES + i] = y2 < h ? (double)e[y2 * w + x] : 0;
            }
        }
        ic_fft_run(fft, re, im);
        for (size_t x = 0; x < k; x++) {
            for (size_t i = 0; i < IC_FFT_LANES; i++) {
                size_t a = x * IC_FFT_LANES + i, b = (w - x) % w * IC_FFT_LANES + i;
                size_t y = y0 + i, y2 = y + IC_FFT_LANES;
                if (y < h) {
                    half[y * k + x] = 0.5 * (re[a] + re[b]);
                    half[(h + y) * k + x] = 0.5 * (im[a] - im[b]);
                }
                if (y2 < h) {
                    half[y2 * k + x] = 0.5 * (im[a] + im[b]);
                    half[(h + y2) * k + x] = 0.5 * (re[b] - re[a]);
                }
            }
        }
    }
}

/* Columns 0..w/2, and each value twice: |F(-ky, -kx)| = |F(ky, kx)|. Writes ln(1 + |F|), shifted. */
static void transform_columns(const double *half, size_t h, size_t w, struct ic_fft *fft, double *re,
                              double *im, float *out)
{
    size_t k = w / 2 + 1;

    for (size_t x0 = 0; x0 < k; x0 += IC_FFT_LANES) {
        for (size_t y = 0; y < h; y++) {
            for (size_t i = 0; i < IC_FFT_LANES; i++) {
                size_t x = x0 + i;
                re[y * IC_FFT_LANES + i] = x < k ? half[y * k + x] : 0;
                im[y * IC_FFT_LANES + i] = x < k ? half[(h + y) * k + x] : 0;
            }
        }
        ic_fft_run(fft, re, im);
        for (size_t y = 0; y < h; y++) {
            for (size_t i = 0; i < IC_FFT_LANES && x0 + i < k; i++) {
                size_t x = x0 + i, a = y * IC_FFT_LANES + i;
                float v = (float)log1p(sqrt(re[a] * re[a] + im[a] * im[a]));
                out[(y + h / 2) % h * w + (x + w / 2) % w] = v;
                out[((h - y) % h + h / 2) % h * w + ((w - x) % w + w / 2) % w] = v;
            }
        }
    }
}

static void replace_centre(float *map, size_t h, size_t w)
{
    size_t cy = h / 2, cx = w / 2;
    float most = 0;

    for (size_t y = cy > 0 ? cy - 1 : 0; y <= cy + 1 && y < h; y++)
        for (size_t x = cx > 0 ? cx - 1 : 0; x <= cx + 1 && x < w; x++)
            if ((y != cy || x != cx) && map[y * w + x] > most)
                most = map[y * w + x];
    map[cy * w + cx] = most;
}

static bool map_spectral(struct pic *p)
{
    size_t h = p->s.h, w = p->s.w, half = 2 * h * (w / 2 + 1), longer = h > w ? h : w;
    struct ic_view_ctx *ctx = p->ctx;
    struct ic_fft *rows = fft_for(ctx, w), *columns = fft_for(ctx, h);

    if (!rows || !columns || !grid_density(p))
        return false;
    ctx->spectrum = grown(ctx->spectrum, &ctx->spectrum_size,
                          (half + 2 * longer * IC_FFT_LANES) * sizeof *ctx->spectrum);
    if (!ctx->spectrum)
        return false;
    double *re = ctx->spectrum + half, *im = re + longer * IC_FFT_LANES;
    transform_rows(ctx->grid, h, w, rows, re, im, ctx->spectrum);
    transform_columns(ctx->spectrum, h, w, columns, re, im, ctx->grid);
    replace_centre(ctx->grid, h, w);
    for (size_t y = 0; y < p->roi.h; y++)
        memcpy(p->map + y * p->roi.w, ctx->grid + (p->roi.y + y) * w + p->roi.x, p->roi.w * sizeof *p->map);
    return true;
}

/* ---- Normalisation ---- */

/* NaN takes part in neither. Partial results side by side, because a single one would be a chain. */
static void range_of(const float *v, size_t n, float *min, float *max)
{
    float lo[LANES], hi[LANES];
    size_t i = 0;

    for (size_t j = 0; j < LANES; j++)
        lo[j] = FLT_MAX, hi[j] = -FLT_MAX;
    for (; i + LANES <= n; i += LANES) {
        for (size_t j = 0; j < LANES; j++) {
            lo[j] = v[i + j] < lo[j] ? v[i + j] : lo[j];
            hi[j] = v[i + j] > hi[j] ? v[i + j] : hi[j];
        }
    }
    for (; i < n; i++) {
        lo[0] = v[i] < lo[0] ? v[i] : lo[0];
        hi[0] = v[i] > hi[0] ? v[i] : hi[0];
    }
    for (size_t j = 1; j < LANES; j++) {
        lo[0] = lo[j] < lo[0] ? lo[j] : lo[0];
        hi[0] = hi[j] > hi[0] ? hi[j] : hi[0];
    }
    *min = lo[0] <= hi[0] ? lo[0] : 0;
    *max = lo[0] <= hi[0] ? hi[0] : 0;
}

/* v becomes what is shown, in [0, 1] whatever it was: the comparisons send NaN to 0, so that the
 * conversion to bytes is always defined. */
static void normalise(float *restrict v, size_t n, enum norm norm, float *min, float *max)
{
    *min = 0, *max = 1;
    if (norm != NORM_FIXED)
        range_of(v, n, min, max);
    if (norm == NORM_SYMMETRIC) {
        *max = -*min > *max ? -*min : *max;
        *min = -*max;
    }
    float lo = *min, range = *max - *min;
    if (range < FLAT_RANGE) {
        for (size_t i = 0; i < n; i++)
            v[i] = 0.5f;
        return;
    }
    for (size_t i = 0; i < n; i++) {
        float t = (v[i] - lo) / range; /* a true division: the largest value is exactly 1 */
        t = t > 0 ? t : 0;
        v[i] = t < 1 ? t : 1;
    }
}

static void to_bytes(const float *restrict v, size_t n, uint8_t *restrict out)
{
    for (size_t i = 0; i < n; i++)
        out[i] = (uint8_t)(int)(v[i] * 255.0f);
}

/* Hue = phase, saturation 1, value = density: as RGB, ready to be drawn. */
static bool map_phase_hsv(struct pic *p)
{
    size_t n = p->roi.w, cells = n * p->roi.h;
    float lo, hi;

    p->a.n = n;
    if (!grow_grid(p->ctx, cells))
        return false;
    for (size_t y = 0; y < p->roi.h; y++) {
        load_psi(p, p->roi.y + y, p->roi.x);
        row_phase(p, p->map + y * n); /* the map's first third: hues */
        memcpy(p->ctx->grid + y * n, p->a.norm2, n * sizeof(float));
    }
    range_of(p->ctx->grid, cells, &lo, &hi);
    bool even = hi - lo < EVEN_DENSITY;
    for (size_t i = cells; i-- > 0;) { /* backwards: the triples overtake the hues */
        float h = p->map[i] * 6, e = p->ctx->grid[i];
        float value = even ? (hi > 0 ? 1.0f : 0.0f) : (e - lo) / (hi - lo);
        float rgb[3] = {fabsf(h - 3) - 1, 2 - fabsf(h - 2), 2 - fabsf(h - 4)};
        for (size_t c = 0; c < 3; c++)
            p->map[i * 3 + c] = (rgb[c] < 0 ? 0 : rgb[c] > 1 ? 1 : rgb[c]) * value;
    }
    return true;
}

/* ---- The table ---- */

enum source { FROM_PSI = 1, FROM_DELTA = 2, FROM_BOTH = 3 };

static const struct view_info {
    const char *name, *formula;
    size_t channels;
    enum norm norm;
    bool delta;
} infos[] = {
#define X(symbol, name, channels, norm, delta, formula) {name, formula, channels, NORM_##norm, delta},
    IC_VIEW_TABLE(X)
#undef X
};

/* Either a function per row of the region, or one for the picture (false: no memory). */
static const struct {
    void (*row)(const struct pic *, float *out);
    enum source source;
    bool (*map)(struct pic *);
} drawers[] = {
    [IC_VIEW_DENSITY] = {row_density, FROM_PSI, NULL},
    [IC_VIEW_PHASE] = {row_phase, FROM_PSI, NULL},
    [IC_VIEW_PHASE_HSV] = {NULL, FROM_PSI, map_phase_hsv},
    [IC_VIEW_REAL] = {row_real, FROM_PSI, NULL},
    [IC_VIEW_IMAG] = {row_imag, FROM_PSI, NULL},
    [IC_VIEW_FIELDS] = {row_fields, FROM_PSI, NULL},
    [IC_VIEW_PHYSICS] = {row_physics, FROM_BOTH, NULL},
    [IC_VIEW_FLOW] = {row_flow, FROM_DELTA, NULL},
    [IC_VIEW_ENTROPY] = {row_entropy, FROM_PSI, NULL},
    [IC_VIEW_COHERENCE] = {NULL, FROM_PSI, map_coherence},
    [IC_VIEW_CHANNEL_ACTIVITY] = {NULL, FROM_PSI, map_activity},
    [IC_VIEW_GRADIENT] = {NULL, FROM_PSI, map_gradient},
    [IC_VIEW_SPECTRAL] = {NULL, FROM_PSI, map_spectral},
    [IC_VIEW_ENERGY] = {row_density, FROM_PSI, NULL},
};
_Static_assert(sizeof drawers / sizeof *drawers == IC_VIEW_COUNT, "a drawer each");

const char *ic_view_name(enum ic_view view)
{
    return (unsigned)view < IC_VIEW_COUNT ? infos[view].name : "unknown";
}

const char *ic_view_formula(enum ic_view view)
{
    return (unsigned)view < IC_VIEW_COUNT ? infos[view].formula : "";
}

size_t ic_view_channels(enum ic_view view)
{
    return (unsigned)view < IC_VIEW_COUNT ? infos[view].channels : 0;
}

bool ic_view_needs_delta(enum ic_view view)
{
    return (unsigned)view < IC_VIEW_COUNT && infos[view].delta;
}

bool ic_view_of_one_cell(enum ic_view view)
{
    return (unsigned)view < IC_VIEW_COUNT && (!drawers[view].map || view == IC_VIEW_PHASE_HSV);
}

enum ic_status ic_view_parse(const char *name, enum ic_view *view, struct ic_err *err)
{
    for (unsigned i = 0; name && i < IC_VIEW_COUNT; i++) {
        if (strcmp(name, infos[i].name) == 0) {
            *view = (enum ic_view)i;
            return IC_OK;
        }
    }
    return ic_fail(err, IC_BAD_REQUEST, "view '%.40s' is unknown", name ? name : "");
}

const char *ic_view_encoding_name(enum ic_view_encoding encoding)
{
    return encoding == IC_VIEW_U8 ? "u8" : "f32";
}

enum ic_status ic_view_encoding_parse(const char *name, enum ic_view_encoding *encoding, struct ic_err *err)
{
    bool u8 = name && strcmp(name, "u8") == 0;
    if (!u8 && (!name || strcmp(name, "f32") != 0))
        return ic_fail(err, IC_BAD_REQUEST, "encoding '%.40s' is unknown (u8, f32)", name ? name : "");
    *encoding = u8 ? IC_VIEW_U8 : IC_VIEW_F32;
    return IC_OK;
}

/* ---- Rendering ---- */

static enum ic_status resolve_roi(struct ic_view_roi *roi, struct ic_law_shape s, struct ic_err *err)
{
    if (!roi->x && !roi->y && !roi->w && !roi->h)
        *roi = (struct ic_view_roi){.w = s.w, .h = s.h};
    if (roi->w < 1 || roi->h < 1 || roi->w > s.w || roi->h > s.h || roi->x > s.w - roi->w ||
        roi->y > s.h - roi->h)
        return ic_fail(err, IC_BAD_REQUEST, "region x %zu, y %zu, %zux%zu lies outside the %zux%zu grid",
                       roi->x, roi->y, roi->w, roi->h, s.w, s.h);
    return IC_OK;
}

enum ic_status ic_view_plan(const struct ic_view_request *request, struct ic_law_shape shape,
                            struct ic_view_frame *frame, struct ic_err *err)
{
    struct ic_view_roi roi = request->roi;

    if (!ic_law_shape_ok(shape))
        return ic_fail(err, IC_BAD_REQUEST, "a state of %zux%zu cells and %zu channels is out of range",
                       shape.h, shape.w, shape.d);
    if ((unsigned)request->view >= IC_VIEW_COUNT)
        return ic_fail(err, IC_BAD_REQUEST, "view %d is unknown", (int)request->view);
    if (request->encoding != IC_VIEW_U8 && request->encoding != IC_VIEW_F32)
        return ic_fail(err, IC_BAD_REQUEST, "encoding %d is unknown", (int)request->encoding);
    enum ic_status st = resolve_roi(&roi, shape, err);
    if (st != IC_OK)
        return st;
    size_t channels = infos[request->view].channels;
    *frame = (struct ic_view_frame){
        .shape = {roi.h, roi.w, channels},
        .ndim = channels > 1 ? 3 : 2,
        .dtype = request->encoding,
        .bytes = roi.h * roi.w * channels * (request->encoding == IC_VIEW_F32 ? sizeof(float) : 1),
    };
    return IC_OK;
}

/* Cuts the row scratch into planes for rows of up to n cells. */
static bool prepare_rows(struct pic *p, size_t n)
{
    size_t d = p->s.d;

    p->ctx->rows = grown(p->ctx->rows, &p->ctx->rows_size, (4 * d + 4) * n * sizeof(float));
    float *at = p->ctx->rows;
    if (!at)
        return false;
    p->a = (struct row){.re = at, .im = at + d * n, .norm2 = at + 4 * d * n, .n = p->roi.w};
    p->b = (struct row){
        .re = at + 2 * d * n, .im = at + 3 * d * n, .norm2 = at + (4 * d + 1) * n, .n = p->roi.w};
    p->t0 = at + (4 * d + 2) * n;
    p->t1 = at + (4 * d + 3) * n;
    return true;
}

static bool draw(struct pic *p, enum ic_view view)
{
    if (drawers[view].map)
        return drawers[view].map(p);
    for (size_t y = 0; y < p->roi.h; y++) {
        if (drawers[view].source & FROM_PSI)
            load_psi(p, p->roi.y + y, p->roi.x);
        if (drawers[view].source & FROM_DELTA)
            load_delta(p, p->roi.y + y, p->roi.x);
        drawers[view].row(p, p->map + y * p->roi.w * p->channels);
    }
    return true;
}

enum ic_status ic_view_render(struct ic_view_ctx *ctx, const struct ic_view_request *request,
                              const float *psi, const float *delta, struct ic_law_shape shape, void *out,
                              size_t out_size, struct ic_view_frame *frame, struct ic_err *err)
{
    enum ic_status st = ic_view_plan(request, shape, frame, err);
    if (st != IC_OK)
        return st;
    if (out_size < frame->bytes)
        return ic_fail(err, IC_TOO_LARGE, "a frame of %zu bytes does not fit in %zu", frame->bytes,
                       out_size);
    struct pic p = {.ctx = ctx,
                    .psi = psi,
                    .delta = delta,
                    .s = shape,
                    .roi = request->roi,
                    .quick = request->encoding == IC_VIEW_U8,
                    .channels = infos[request->view].channels};
    (void)resolve_roi(&p.roi, shape, NULL); /* checked by the plan */
    size_t n = p.roi.w * p.roi.h * p.channels;
    p.map = ctx->map = grown(ctx->map, &ctx->map_size, n * sizeof(float));
    if (!p.map || !prepare_rows(&p, shape.w) || !draw(&p, request->view))
        return ic_fail(err, IC_OOM, "no memory to draw %zux%zu cells", p.roi.w, p.roi.h);
    normalise(p.map, n, infos[request->view].norm, &frame->min, &frame->max);
    if (request->encoding == IC_VIEW_U8)
        to_bytes(p.map, n, out);
    else
        memcpy(out, p.map, n * sizeof(float));
    return IC_OK;
}
