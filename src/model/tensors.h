/* A set of named tensors that lie in a file and are read one by one, when asked for.
 *
 * Both containers (torch zip, safetensors) end here: opening one checks every tensor's place against
 * the file without reading a payload; `ic_tensors_read_f32` then materialises a single tensor. So a
 * checkpoint's optimiser state costs its table entry and nothing else. The set owns the descriptor of
 * the open file and the table. Reads use pread(2): a file that shrinks meanwhile is an error, not a
 * signal. A set may be read by one thread at a time. May block on file I/O. */
#ifndef IC_MODEL_TENSORS_H
#define IC_MODEL_TENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

#define IC_TENSOR_DIMS_MAX 8
#define IC_TENSOR_NAME_MAX 256                     /* bytes, with the NUL */
#define IC_TENSORS_MAX 4096                        /* tensors in one file */
#define IC_TENSOR_ELEMENTS_MAX ((uint64_t)1 << 32) /* in one tensor */
#define IC_TENSOR_EXPANDED_MAX 65536               /* in one that is larger than its storage */

/* X(symbol, bytes, safetensors' name, torch storage class, parts of one element) */
#define IC_DTYPES(X)                                                                                       \
    X(F32, 4, "F32", "FloatStorage", 1)                                                                    \
    X(F64, 8, "F64", "DoubleStorage", 1)                                                                   \
    X(F16, 2, "F16", "HalfStorage", 1)                                                                     \
    X(BF16, 2, "BF16", "BFloat16Storage", 1)                                                               \
    X(C64, 8, "C64", "ComplexFloatStorage", 2)                                                             \
    X(C128, 16, "C128", "ComplexDoubleStorage", 2)                                                         \
    X(I64, 8, "I64", "LongStorage", 1)                                                                     \
    X(I32, 4, "I32", "IntStorage", 1)                                                                      \
    X(I16, 2, "I16", "ShortStorage", 1)                                                                    \
    X(I8, 1, "I8", "CharStorage", 1)                                                                       \
    X(U8, 1, "U8", "ByteStorage", 1)                                                                       \
    X(BOOL, 1, "BOOL", "BoolStorage", 1)

enum ic_dtype {
#define X(symbol, bytes, st, torch, parts) IC_DTYPE_##symbol,
    IC_DTYPES(X)
#undef X
        IC_DTYPE_COUNT
};

struct ic_dtype_info {
    const char *name;  /* safetensors' */
    const char *torch; /* class in module `torch` */
    unsigned bytes;    /* of one element */
    unsigned parts;    /* float32 values that one element becomes: 2 for complex */
};

/* Never NULL for a valid enumerator. */
const struct ic_dtype_info *ic_dtype_info(enum ic_dtype t);
bool ic_dtype_by_name(const char *name, size_t len, enum ic_dtype *out);  /* safetensors' name */
bool ic_dtype_by_torch(const char *name, size_t len, enum ic_dtype *out); /* storage class */

/* Where a run of bytes lies in the file. */
struct ic_extent {
    uint64_t at;     /* file offset of the stored bytes */
    uint64_t stored; /* bytes in the file */
    uint64_t bytes;  /* bytes after inflating; == stored where not deflated */
    bool deflated;
    bool has_crc; /* zip entries: crc32 of the inflated bytes */
    uint32_t crc;
};

struct ic_tensor {
    char *name; /* NUL-terminated valid UTF-8; owned by the set */
    enum ic_dtype dtype;
    unsigned ndim;
    int64_t shape[IC_TENSOR_DIMS_MAX];  /* >= 0 */
    int64_t stride[IC_TENSOR_DIMS_MAX]; /* elements, >= 0 */
    uint64_t offset;                    /* elements into the extent */
    uint64_t count;                     /* elements: the product of shape */
    struct ic_extent where;             /* the whole storage; several tensors may share one */
};

struct ic_tensors {
    int fd;
    uint64_t file_bytes;
    struct ic_tensor *list; /* in file order; names are unique */
    size_t count;
    /* What a torch checkpoint says beside its tensors; -1 and NaN where it does not. */
    int64_t episode;
    double loss;
    char form[64];  /* "bare state dict", "model_state_dict", "safetensors" … for people */
    bool stripped;  /* keys began with `_orig_mod.` and lost it */
    size_t ignored; /* values in the state dict that are not tensors */
    /* safetensors' metadata whose key begins with IC_TENSORS_META_PREFIX; strings owned by the set. */
    struct ic_tensors_meta {
        char *key, *value; /* NUL-terminated valid UTF-8 */
    } * meta;
    size_t meta_count;
};

#define IC_TENSORS_META_PREFIX "ic." /* this project's own keys; all others are skipped */
#define IC_TENSORS_META_MAX 64       /* such pairs in one file */

/* Opens by content: a zip (torch) or safetensors. Codes: NOT_FOUND, BAD_REQUEST, TOO_LARGE, OOM,
 * INTERNAL. On failure *out is NULL. */
enum ic_status ic_tensors_open(const char *path, struct ic_tensors **out, struct ic_err *err);
void ic_tensors_close(struct ic_tensors **set);
/* NULL: no such tensor. */
const struct ic_tensor *ic_tensors_find(const struct ic_tensors *set, const char *name);

/* The value of a metadata key, or NULL. */
const char *ic_tensors_meta(const struct ic_tensors *set, const char *key);

/* Materialises t as float32, row-major, contiguous: t->count * parts values (complex becomes Re, Im
 * pairs), which must equal `n`. Strides are honoured. NaN and Inf in the file, and float64 values
 * past float32, are refused by the tensor's name. Bytes are checked against the zip's CRC. */
enum ic_status ic_tensors_read_f32(const struct ic_tensors *set, const struct ic_tensor *t, float *out,
                                   size_t n, struct ic_err *err);

/* "[4, 8, 3, 3]" into buf; for messages. Returns buf. */
char *ic_tensor_shape_str(const int64_t *shape, unsigned ndim, char *buf, size_t size);

/* For the containers: an empty set over an open descriptor, which it then owns (also on failure). */
struct ic_tensors *ic_tensors_new(int fd, uint64_t file_bytes, struct ic_err *err);
/* Checks t (dtype, shape, stride, offset, where are set) against its extent, computes count, copies
 * it and the name into the set. Duplicate names are refused. */
enum ic_status ic_tensors_add(struct ic_tensors *set, const struct ic_tensor *t, const char *name,
                              size_t name_len, struct ic_err *err);

/* Reads exactly n bytes at file offset `at`; a short file is BAD_REQUEST "truncated". */
enum ic_status ic_pread_all(int fd, uint64_t at, void *buf, size_t n, struct ic_err *err);

#endif
