/* Discrete Fourier transforms of any length for the spectral view.
 *
 * A plan belongs to one length and transforms IC_FFT_LANES sequences at once, lane beside lane, so that
 * every butterfly is a few vector operations whatever the length. Powers of two run as a Stockham
 * radix-2 transform, all others through Bluestein's chirp (L. Bluestein, 1970), O(n log n) also for
 * primes. Double precision; the relative error is about 1e-15 log2 n.
 *
 * A plan owns its tables and scratch (about 300 bytes per point) and is changed by every run: one
 * thread at a time. Only open allocates. */
#ifndef IC_LAW_FFT_H
#define IC_LAW_FFT_H

#include <stddef.h>

#include "base/status.h"

#define IC_FFT_LANES 8
#define IC_FFT_LENGTH_MAX ((size_t)1 << 20)

struct ic_fft;

/* Length 1..IC_FFT_LENGTH_MAX, else IC_BAD_REQUEST; IC_OOM. On failure *out is NULL. */
enum ic_status ic_fft_open(struct ic_fft **out, size_t length, struct ic_err *err);
void ic_fft_close(struct ic_fft **fft); /* NULL and *fft == NULL are fine */
size_t ic_fft_length(const struct ic_fft *fft);

/* In place, forward, unscaled: X[k] = sum_j x[j] exp(-2 pi i j k / n) in every lane. re and im are
 * [length][IC_FFT_LANES], caller-owned, distinct. */
void ic_fft_run(struct ic_fft *fft, double *re, double *im);

#endif
