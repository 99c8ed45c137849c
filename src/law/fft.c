#include "law/fft.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3")
#endif

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define LANES IC_FFT_LANES
#define TAU 6.28318530717958647692

struct ic_fft {
    size_t n;        /* the caller's length */
    size_t m;        /* n where that is a power of two, else the power of two >= 2n-1 that Bluestein uses */
    double *twiddle; /* [m/2][2]: exp(-2 pi i j / m) */
    double *chirp;   /* [n][2]: exp(-pi i j^2 / n); NULL where m == n */
    double *kernel;  /* [m][2]: transform of the conjugate chirp, over m; NULL likewise */
    double *a_re, *a_im; /* [m][LANES]; NULL where m == n: the caller's arrays serve */
    double *b_re, *b_im; /* [m][LANES]: the other side of the Stockham ping-pong */
    double memory[];     /* all of the above */
};

size_t ic_fft_length(const struct ic_fft *fft)
{
    return fft->n;
}

/* One pass: l butterflies over s interleaved sub-transforms, m = 2 l s. */
static void pass(const double *tw, size_t l, size_t s, const double *restrict xr, const double *restrict xi,
                 double *restrict yr, double *restrict yi)
{
    for (size_t p = 0; p < l; p++) {
        double wr = tw[2 * p * s], wi = tw[2 * p * s + 1];
        const double *ar = xr + s * p * LANES, *ai = xi + s * p * LANES;
        const double *br = xr + s * (p + l) * LANES, *bi = xi + s * (p + l) * LANES;
        double *cr = yr + s * 2 * p * LANES, *ci = yi + s * 2 * p * LANES;
        double *dr = cr + s * LANES, *di = ci + s * LANES;
        for (size_t q = 0; q < s * LANES; q++) {
            double tr = ar[q] - br[q], ti = ai[q] - bi[q];
            cr[q] = ar[q] + br[q];
            ci[q] = ai[q] + bi[q];
            dr[q] = tr * wr - ti * wi;
            di[q] = tr * wi + ti * wr;
        }
    }
}

/* Forward transform of length m in place; (br, bi) is scratch of the same size. */
static void power_of_two(const double *tw, size_t m, double *re, double *im, double *br, double *bi)
{
    double *xr = re, *xi = im, *yr = br, *yi = bi;

    for (size_t l = m / 2, s = 1; l >= 1; l /= 2, s *= 2) {
        pass(tw, l, s, xr, xi, yr, yi);
        double *t = xr;
        xr = yr, yr = t;
        t = xi, xi = yi, yi = t;
    }
    if (xr != re) {
        memcpy(re, xr, m * LANES * sizeof *re);
        memcpy(im, xi, m * LANES * sizeof *im);
    }
}

/* y *= (c + i s) in every lane of one point. */
static void times(double *re, double *im, const double *factor)
{
    for (size_t q = 0; q < LANES; q++) {
        double r = re[q], i = im[q];
        re[q] = r * factor[0] - i * factor[1];
        im[q] = r * factor[1] + i * factor[0];
    }
}

/* jk = (j^2 + k^2 - (k-j)^2)/2 turns the transform into a convolution with the chirp, which a cyclic one
 * of length m >= 2n-1 holds without overlap. */
static void bluestein(struct ic_fft *f, double *re, double *im)
{
    size_t bytes = f->n * LANES * sizeof *re, rest = (f->m - f->n) * LANES * sizeof *re;

    memcpy(f->a_re, re, bytes);
    memcpy(f->a_im, im, bytes);
    memset(f->a_re + f->n * LANES, 0, rest);
    memset(f->a_im + f->n * LANES, 0, rest);
    for (size_t j = 0; j < f->n; j++)
        times(f->a_re + j * LANES, f->a_im + j * LANES, f->chirp + 2 * j);
    power_of_two(f->twiddle, f->m, f->a_re, f->a_im, f->b_re, f->b_im);
    for (size_t j = 0; j < f->m; j++)
        times(f->a_re + j * LANES, f->a_im + j * LANES, f->kernel + 2 * j);
    /* With Re and Im exchanged a forward transform is an inverse one. */
    power_of_two(f->twiddle, f->m, f->a_im, f->a_re, f->b_im, f->b_re);
    for (size_t j = 0; j < f->n; j++)
        times(f->a_re + j * LANES, f->a_im + j * LANES, f->chirp + 2 * j);
    memcpy(re, f->a_re, bytes);
    memcpy(im, f->a_im, bytes);
}

void ic_fft_run(struct ic_fft *fft, double *re, double *im)
{
    if (fft->m == fft->n)
        power_of_two(fft->twiddle, fft->m, re, im, fft->b_re, fft->b_im);
    else
        bluestein(fft, re, im);
}

static void fill_chirp(struct ic_fft *f)
{
    for (size_t j = 0; j < f->n; j++) {
        /* j^2 modulo 2n first: the angle stays small and exact. */
        double angle = TAU / 2 * (double)(j * j % (2 * f->n)) / (double)f->n;
        f->chirp[2 * j] = cos(angle);
        f->chirp[2 * j + 1] = -sin(angle);
    }
    memset(f->a_re, 0, f->m * LANES * sizeof(double));
    memset(f->a_im, 0, f->m * LANES * sizeof(double));
    for (size_t j = 0; j < f->n; j++) {
        size_t mirror = (f->m - j) % f->m;
        f->a_re[j * LANES] = f->a_re[mirror * LANES] = f->chirp[2 * j];
        f->a_im[j * LANES] = f->a_im[mirror * LANES] = -f->chirp[2 * j + 1];
    }
    power_of_two(f->twiddle, f->m, f->a_re, f->a_im, f->b_re, f->b_im);
    for (size_t j = 0; j < f->m; j++) {
        f->kernel[2 * j] = f->a_re[j * LANES] / (double)f->m;
        f->kernel[2 * j + 1] = f->a_im[j * LANES] / (double)f->m;
    }
}

enum ic_status ic_fft_open(struct ic_fft **out, size_t length, struct ic_err *err)
{
    size_t m = 1, n = length;

    *out = NULL;
    if (n < 1 || n > IC_FFT_LENGTH_MAX)
        return ic_fail(err, IC_BAD_REQUEST, "a transform of %zu points is out of range", n);
    while (m < n)
        m *= 2;
    bool chirped = m != n;
    if (chirped)
        while (m < 2 * n - 1)
            m *= 2;
    size_t doubles = m + 2 * m * LANES + (chirped ? 2 * n + 2 * m + 2 * m * LANES : 0);
    struct ic_fft *f = malloc(sizeof *f + doubles * sizeof(double));
    if (!f)
        return ic_fail(err, IC_OOM, "no memory for a transform of %zu points", n);
    double *p = f->memory;
    *f = (struct ic_fft){.n = n, .m = m, .twiddle = p, .b_re = p + m, .b_im = p + m + m * LANES};
    p += m + 2 * m * LANES;
    for (size_t j = 0; j < m / 2; j++) {
        f->twiddle[2 * j] = cos(TAU * (double)j / (double)m);
        f->twiddle[2 * j + 1] = -sin(TAU * (double)j / (double)m);
    }
    if (chirped) {
        f->a_re = p, f->a_im = p + m * LANES;
        f->chirp = p + 2 * m * LANES, f->kernel = f->chirp + 2 * n;
        fill_chirp(f);
    }
    *out = f;
    return IC_OK;
}

void ic_fft_close(struct ic_fft **fft)
{
    if (fft) {
        free(*fft);
        *fft = NULL;
    }
}
