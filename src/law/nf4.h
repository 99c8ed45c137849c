/* NF4, the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, appendix E), as bitsandbytes lays it out.
 *
 * A tensor's values, flattened in row-major order, are cut in blocks of 64 (the last may be shorter). A
 * block keeps absmax, the largest magnitude in it; a value x becomes the code whose entry of the codebook
 * is nearest to x / absmax (halfway: the lower one). Codes lie two to a byte, the first value in the high
 * nibble; an odd tensor's last low nibble is the code of 0. value = ic_nf4_code[code] * absmax.
 * 4 + 32/64 = 4.5 bits per parameter.
 *
 * Double quantisation stores absmax itself in 8 bits: absmax[b] = offset + ic_nf4_dynamic()[code8[b]] *
 * scale[b / 256], where offset is the mean of all absmax, the codebook is the 256-value dynamic-exponent
 * type, and scale is the largest |absmax - offset| of 256 blocks. 4 + 8/64 + 32/(64*256) = 4.127 bits.
 *
 * Pure functions over the caller's memory; nothing allocates or blocks; any thread. */
#ifndef IC_LAW_NF4_H
#define IC_LAW_NF4_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

#define IC_NF4_BLOCK 64u         /* values that share an absmax */
#define IC_NF4_BLOCK_MAX 4096u   /* values; what a caller may ask for */
#define IC_NF4_SCALES_BLOCK 256u /* absmax codes that share a scale, under double quantisation */
#define IC_NF4_ZERO 7u           /* the code of 0 */

/* The codebook: ascending, -1 … 1, entry 7 is 0. */
extern const float ic_nf4_code[16];

/* A quantised tensor. All pointers are borrowed. One of absmax and absmax_codes is NULL. */
struct ic_nf4 {
    size_t count;                /* values */
    unsigned block;              /* values per absmax; IC_NF4_BLOCK in every file */
    const uint8_t *codes;        /* [(count + 1) / 2] */
    const float *absmax;         /* [blocks], finite, >= 0; NULL: double quantised */
    const uint8_t *absmax_codes; /* [blocks] */
    const float *absmax_scale;   /* [(blocks + 255) / 256], finite, >= 0 */
    float absmax_offset;
};

/* Sizes, of `count` values in blocks of `block` (1..IC_NF4_BLOCK_MAX). */
size_t ic_nf4_code_bytes(size_t count);
size_t ic_nf4_blocks(size_t count, unsigned block);
size_t ic_nf4_scale_blocks(size_t blocks);
/* Bytes that q points at, offset included. */
size_t ic_nf4_bytes(const struct ic_nf4 *q);

/* Quantises x[0..count) into codes[ic_nf4_code_bytes] and absmax[ic_nf4_blocks]. A block of zeros has
 * absmax 0 and codes IC_NF4_ZERO. BAD_REQUEST: NaN or infinity at a named place, or a bad block size;
 * codes and absmax are undefined then. */
enum ic_status ic_nf4_quantise(const float *x, size_t count, unsigned block, uint8_t *codes, float *absmax,
                               struct ic_err *err);

/* The second quantisation: absmax[0..blocks) -> codes[blocks], scale[ic_nf4_scale_blocks], *offset. */
void ic_nf4_quantise_absmax(const float *absmax, size_t blocks, uint8_t *codes, float *scale,
                            float *offset);

/* The 256 values of the dynamic-exponent type, ascending: 0, 1, and for i = 0..6 the midpoints of 2^i
 * equal parts of [0.1, 1] times 10^(i-6), each with both signs. Made on first use; any thread. */
const float *ic_nf4_dynamic(void);

/* absmax of block b, which a double-quantised tensor computes. */
float ic_nf4_absmax(const struct ic_nf4 *q, size_t b);

/* out[0..n) = values from..from+n of q; from + n <= q->count. */
void ic_nf4_dequantise(const struct ic_nf4 *q, size_t from, size_t n, float *out);

#endif
