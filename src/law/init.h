/* Initial states of a simulation, and the random numbers behind them.
 *
 * Formulas: law-m.md 1.5. Everything here is a pure function of its arguments: the number used for
 * channel k of cell (y, x) depends on the seed and on the index (y*w + x)*d + k alone, so a state can
 * be filled in any order, by any number of threads, on any machine, and comes out the same to the
 * last bit. To keep that promise the logarithm, sine and cosine are our own, made of correctly
 * rounded operations (+ - * / sqrt) without contraction; libm differs from machine to machine.
 * Nothing allocates or blocks; any thread. */
#ifndef IC_LAW_INIT_H
#define IC_LAW_INIT_H

#include <stdint.h>

#include "base/status.h"
#include "law/field.h"

/* X(symbol, wire name, definition) */
#define IC_LAW_INIT_TABLE(X)                                                                               \
    X(COMPLEX_NOISE, "complex_noise", "psi = exp(i n), n ~ N(0, 0.1); cell norm^2 is d")                   \
    X(RANDOM, "random", "Re, Im ~ N(0, 1), each cell divided by its norm; cell norm^2 is 1")               \
    X(ZEROS, "zeros", "all zero")

enum ic_law_init_mode {
#define X(symbol, name, help) IC_LAW_INIT_##symbol,
    IC_LAW_INIT_TABLE(X)
#undef X
        IC_LAW_INIT_COUNT
};

/* Wire name of a mode; never NULL. */
const char *ic_law_init_name(enum ic_law_init_mode mode);

/* Finds a mode by name. NULL means the default, complex_noise. Any other unknown name, the empty one
 * included, is IC_BAD_REQUEST and leaves *mode alone (Atheria takes unknown names for zeros; a
 * misspelt mode should not look like a dead law). */
enum ic_status ic_law_init_parse(const char *name, enum ic_law_init_mode *mode, struct ic_err *err);

/* Fills psi, float32 [h][w][d][2], caller-owned. A bad shape or mode is IC_BAD_REQUEST and leaves psi
 * alone. `random` divides by the norm without an epsilon, as Atheria does; a cell of norm exactly 0, which
 * this generator never draws, would become channel 0 = 1. */
enum ic_status ic_law_init_fill(float *psi, struct ic_law_shape shape, enum ic_law_init_mode mode,
                                uint64_t seed, struct ic_err *err);

/* ---- Random numbers: Philox4x32-10 (Salmon et al., SC 2011), key = seed, counter = (index, stream).
 * Counter-based, so there is no state to carry: a number is named by (seed, stream, index). ---- */

enum ic_law_stream { /* who draws; equal indices in different streams are unrelated */
                     IC_LAW_STREAM_COMPLEX_NOISE,
                     IC_LAW_STREAM_RANDOM,
                     IC_LAW_STREAM_COLLAPSE,
                     IC_LAW_STREAM_INJECT,
                     IC_LAW_STREAM_CLICK_OUT,
};

/* 128 random bits. */
void ic_law_rng_bits(uint64_t seed, uint32_t stream, uint64_t index, uint32_t out[4]);
/* Two uniforms in (0, 1), multiples of 2^-53 plus half of one: neither end occurs. */
void ic_law_rng_uniform2(uint64_t seed, uint32_t stream, uint64_t index, double out[2]);
/* Two independent N(0, 1) by Box-Muller; |value| < 8.7. */
void ic_law_rng_normal2(uint64_t seed, uint32_t stream, uint64_t index, double out[2]);

#endif
