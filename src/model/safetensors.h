/* safetensors: 8 bytes of header length (little endian), a JSON header, the tensors' bytes.
 *
 * Reading checks the header's length, every dtype and shape against its byte range, and that the ranges
 * cover the data without gap or overlap (as the format's own reader does). Writing sorts keys in byte order
 * (so equal contents are equal files), pads the header with spaces so that data begins 8-byte aligned, and
 * replaces the file whole (temporary file, fsync, rename), so a reader never sees half of one. Format:
 * huggingface/safetensors README. May block on file I/O. */
#ifndef IC_MODEL_SAFETENSORS_H
#define IC_MODEL_SAFETENSORS_H

#include "base/status.h"
#include "model/tensors.h"

#define IC_SAFETENSORS_HEADER_MAX ((uint64_t)4 << 20) /* bytes of JSON */
#define IC_SAFETENSORS_META_MAX 64                    /* pairs that the writer takes */

/* Fills an empty set (made by ic_tensors_new) from its file. */
enum ic_status ic_safetensors_read(struct ic_tensors *set, struct ic_err *err);

struct ic_safetensors_out {
    const char *name; /* valid UTF-8, unique */
    enum ic_dtype dtype;
    unsigned ndim;
    int64_t shape[IC_TENSOR_DIMS_MAX];
    const void *data; /* row-major, little endian; product(shape) elements; borrowed */
};

/* meta: n_meta pairs key, value (strings) for `__metadata__`; NULL where n_meta is 0. On failure the
 * file at `path` is as it was. Codes: BAD_REQUEST, OOM, INTERNAL (I/O), NOT_FOUND (folder). */
enum ic_status ic_safetensors_write(const char *path, const struct ic_safetensors_out *list, size_t count,
                                    const char *const (*meta)[2], size_t n_meta, struct ic_err *err);

#endif
