/* Attention of few rows over many cells of the KV cache, on the CPU.
 *
 * ggml computes up to 63 rows one by one and head by head: each converts all keys and values from 16 bits anew, though
 * the heads of a group and the rows of a batch read the same ones. Of the time to the first token after a cached prefix
 * of 1,000 tokens that was 42 %. Here 64 cells are converted once for up to 64 queries (rows times heads of a group).
 *
 * Sums are kept in 32 bits (ggml's in 16), by blocks of 64 cells with a running maximum, for each query by itself: what
 * else a batch computes does not change a row's result, and where its cells lie changes it in the last bits only. Masked
 * cells, whatever they hold, have no part in it.
 *
 * There is no way in ggml's API to give an operation another kernel. But its scheduler shows each node of a graph to a
 * callback before it is computed, and a node may be made a custom operation there. A graph that llama.cpp uses again
 * keeps what was made of it. */
#ifndef IC_TEXT_ATTENTION_H
#define IC_TEXT_ATTENTION_H

#include <stdbool.h>
#include <stdint.h>

struct ggml_tensor;

/* Fewer cells than these, used or not (llama.cpp counts in 256s), are left to ggml: short texts come out as its own tools',
 * and do not go from its sums to ours, by which a word can change at a near tie, when others' cells come and go. */
#define IC_ATTENTION_CELLS_MIN 1024
#define IC_ATTENTION_ROWS_MAX 63 /* from 64 rows on ggml goes by tiles itself */

/* Makes `node` a custom operation if it is attention (ggml_flash_attn_ext) of a kind that is computed here: f16 keys and
 * values of one size, up to 256 and a multiple of 8; one mask, no bias by distance, no cap, no sinks; a processor with
 * AVX2; and enough heads and rows for `threads` threads. False: it is left as it was. Its tensors must lie in the host's memory. The
 * thread that decodes. */
bool ic_attention_take(struct ggml_tensor *node, int32_t threads);

#endif
