/* Weights in less than float32: made, read back, written to a file and read from one.
 *
 * The file is safetensors. A 16-bit weight is an ordinary F16 or BF16 tensor. An NF4 weight NAME is
 *     NAME                U8  [(count + 1) / 2]       codes, as law/nf4.h has them
 *     NAME.absmax         F32 [blocks]                or, double quantised: U8 [blocks] with
 *     NAME.absmax_scale   F32 [ceil(blocks / 256)]    and
 *     NAME.absmax_offset  F32 [1]
 * and its layout stands in the metadata under "ic.tensor.NAME", e.g.
 *     "nf4 block 64 absmax f32 of [256, 256, 3, 3]",  "nf4 block 64 absmax u8/256 of [256, 256, 3, 3]".
 * "ic.format" is IC_LAW_FILE_FORMAT; "ic.config" is a config.json that makes the file complete alone. */
#ifndef IC_LAW_QUANT_H
#define IC_LAW_QUANT_H

#include "law/law.h"
#include "model/tensors.h"

#define IC_LAW_FILE_FORMAT "law-quantized-1"

/* Bytes that a weight of `count` values takes in memory, a multiple of IC_LAW_WEIGHT_ALIGN. */
size_t ic_law_weight_room(enum ic_law_precision p, bool twice, size_t count);

/* Lays w (name, dim, count are set) out as `p` at `place`, which has ic_law_weight_room bytes and which w
 * then borrows; values are undefined. */
void ic_law_weight_place(struct ic_law_weight *w, enum ic_law_precision p, bool twice, void *place);

/* Fills a placed weight from float32. BAD_REQUEST, by name: a value that the precision cannot hold (NaN,
 * infinity, past 65504 in fp16). */
enum ic_status ic_law_weight_fill(struct ic_law_weight *w, const float *x, struct ic_err *err);

/* Is the set a file of ic_law_write? BAD_REQUEST: it says so, but of a format not known here. */
enum ic_status ic_law_file_is_quantised(const struct ic_tensors *set, bool *yes, struct ic_err *err);

/* How such a file holds the tensor of `spec`; checks every shape and dtype of what belongs to it, reads no
 * payload. BAD_REQUEST, by name: missing parts, wrong counts, a layout not known here. */
enum ic_status ic_law_file_precision(const struct ic_tensors *set, const struct ic_law_spec *spec,
                                     enum ic_law_precision *p, bool *twice, struct ic_err *err);

/* Fills a placed weight from such a file, without a float32 copy. BAD_REQUEST, by name: scales or values
 * that are NaN, infinite or negative where they must not be. May block on file I/O. */
enum ic_status ic_law_file_read(const struct ic_tensors *set, struct ic_law_weight *w, struct ic_err *err);

/* A tensor's name without the tail of a part (".absmax" …), if it has one: its length. */
size_t ic_law_file_stem(const char *name);

/* Writes a law, each weight as it is kept in memory. Codes as ic_safetensors_write. */
enum ic_status ic_law_write(const struct ic_law *law, const char *path, struct ic_err *err);

#endif
