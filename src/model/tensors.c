#include "model/tensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/utf8.h"
#include "model/half.h"
#include "model/safetensors.h"
#include "model/torch.h"
#include "model/zip.h"

static const struct ic_dtype_info dtypes[IC_DTYPE_COUNT] = {
#define X(symbol, bytes, st, torch, parts) {st, torch, bytes, parts},
    IC_DTYPES(X)
#undef X
};

const struct ic_dtype_info *ic_dtype_info(enum ic_dtype t)
{
    IC_ASSERT((unsigned)t < IC_DTYPE_COUNT);
    return &dtypes[t];
}

static bool named(const char *want, const char *name, size_t len)
{
    return strlen(want) == len && memcmp(want, name, len) == 0;
}

bool ic_dtype_by_name(const char *name, size_t len, enum ic_dtype *out)
{
    for (unsigned t = 0; t < IC_DTYPE_COUNT; t++)
        if (named(dtypes[t].name, name, len))
            return *out = (enum ic_dtype)t, true;
    return false;
}

bool ic_dtype_by_torch(const char *name, size_t len, enum ic_dtype *out)
{
    for (unsigned t = 0; t < IC_DTYPE_COUNT; t++)
        if (named(dtypes[t].torch, name, len))
            return *out = (enum ic_dtype)t, true;
    return false;
}

char *ic_tensor_shape_str(const int64_t *shape, unsigned ndim, char *buf, size_t size)
{
    size_t at = 0;
    for (unsigned i = 0; i <= ndim && at < size; i++) {
        int n = i < ndim ? snprintf(buf + at, size - at, "%s%" PRId64, i ? ", " : "[", shape[i])
                         : snprintf(buf + at, size - at, "%s]", ndim ? "" : "[");
        at += n > 0 ? (size_t)n : 0;
    }
    return buf;
}

enum ic_status ic_pread_all(int fd, uint64_t at, void *buf, size_t n, struct ic_err *err)
{
    char *p = buf;
    while (n) {
        ssize_t got = pread(fd, p, n, (off_t)at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return ic_fail(err, IC_INTERNAL, "read: %s", strerror(errno));
        if (got == 0)
            return ic_fail(err, IC_BAD_REQUEST, "the file is truncated");
        p += got;
        at += (uint64_t)got;
        n -= (size_t)got;
    }
    return IC_OK;
}

/* ---- The set --------------------------------------------------------------------------------- */

struct ic_tensors *ic_tensors_new(int fd, uint64_t file_bytes, struct ic_err *err)
{
    struct ic_tensors *set = calloc(1, sizeof *set);
    if (!set) {
        close(fd);
        ic_fail(err, IC_OOM, "no memory for a table of tensors");
        return NULL;
    }
    set->fd = fd;
    set->file_bytes = file_bytes;
    set->episode = -1;
    set->loss = (double)NAN;
    return set;
}

void ic_tensors_close(struct ic_tensors **set)
{
    if (!set || !*set)
        return;
    for (size_t i = 0; i < (*set)->count; i++)
        free((*set)->list[i].name);
    free((*set)->list);
    for (size_t i = 0; i < (*set)->meta_count; i++) {
        free((*set)->meta[i].key);
        free((*set)->meta[i].value);
    }
    free((*set)->meta);
    close((*set)->fd);
    free(*set);
    *set = NULL;
}

const struct ic_tensor *ic_tensors_find(const struct ic_tensors *set, const char *name)
{
    for (size_t i = 0; i < set->count; i++)
        if (strcmp(set->list[i].name, name) == 0)
            return &set->list[i];
    return NULL;
}

const char *ic_tensors_meta(const struct ic_tensors *set, const char *key)
{
    for (size_t i = 0; i < set->meta_count; i++)
        if (strcmp(set->meta[i].key, key) == 0)
            return set->meta[i].value;
    return NULL;
}

/* Product of the shape and the last element touched, both checked against the extent. */
static enum ic_status measure(struct ic_tensor *t, const char *name, struct ic_err *err)
{
    uint64_t count = 1, last = t->offset;
    uint64_t held = t->where.bytes / dtypes[t->dtype].bytes;
    char shape[160];
    ic_tensor_shape_str(t->shape, t->ndim, shape, sizeof shape);
    for (unsigned i = 0; i < t->ndim; i++) {
        if (t->shape[i] < 0 || t->stride[i] < 0)
            return ic_fail(err, IC_BAD_REQUEST, "tensor %s: negative size or stride", name);
        if (__builtin_mul_overflow(count, (uint64_t)t->shape[i], &count) || count > IC_TENSOR_ELEMENTS_MAX)
            return ic_fail(err, IC_TOO_LARGE, "tensor %s: %s is past IC_TENSOR_ELEMENTS_MAX", name, shape);
    }
    t->count = count;
    if (count == 0)
        return IC_OK;
    for (unsigned i = 0; i < t->ndim; i++) {
        uint64_t span;
        if (__builtin_mul_overflow((uint64_t)(t->shape[i] - 1), (uint64_t)t->stride[i], &span) ||
            __builtin_add_overflow(last, span, &last))
            return ic_fail(err, IC_BAD_REQUEST, "tensor %s: stride overflows", name);
    }
    if (last >= held)
        return ic_fail(err, IC_BAD_REQUEST,
                       "tensor %s %s needs element %" PRIu64 " of a storage that holds %" PRIu64, name,
                       shape, last, held);
    /* An expanded tensor (stride 0) could claim any size from a few bytes: a bias may, a convolution may not. */
    if (count > held && count > IC_TENSOR_EXPANDED_MAX)
        return ic_fail(err, IC_BAD_REQUEST,
                       "tensor %s %s repeats its storage of %" PRIu64
                       " elements, past IC_TENSOR_EXPANDED_MAX (%d)",
                       name, shape, held, IC_TENSOR_EXPANDED_MAX);
    return IC_OK;
}

enum ic_status ic_tensors_add(struct ic_tensors *set, const struct ic_tensor *t, const char *name,
                              size_t name_len, struct ic_err *err)
{
    if (name_len == 0 || name_len >= IC_TENSOR_NAME_MAX || memchr(name, 0, name_len) ||
        !ic_utf8_valid(name, name_len))
        return ic_fail(err, IC_BAD_REQUEST, "a tensor's name is empty, too long or not UTF-8");
    if (set->count >= IC_TENSORS_MAX)
        return ic_fail(err, IC_TOO_LARGE, "more than IC_TENSORS_MAX (%d) tensors", IC_TENSORS_MAX);
    struct ic_tensor copy = *t;
    copy.name = strndup(name, name_len);
    if (!copy.name)
        return ic_fail(err, IC_OOM, "no memory for a tensor's name");
    enum ic_status s = ic_tensors_find(set, copy.name)
                           ? ic_fail(err, IC_BAD_REQUEST, "tensor %s appears twice", copy.name)
                           : measure(&copy, copy.name, err);
    if (s == IC_OK && (set->count & (set->count - 1)) == 0) { /* full at every power of two */
        struct ic_tensor *more = realloc(set->list, (set->count ? set->count * 2 : 1) * sizeof *more);
        if (more)
            set->list = more;
        else
            s = ic_fail(err, IC_OOM, "no memory for a table of tensors");
    }
    if (s != IC_OK)
        return free(copy.name), s;
    set->list[set->count++] = copy;
    return IC_OK;
}

enum ic_status ic_tensors_open(const char *path, struct ic_tensors **out, struct ic_err *err)
{
    *out = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return ic_fail(err, errno == ENOENT || errno == ENOTDIR ? IC_NOT_FOUND : IC_INTERNAL, "%s: %s",
                       path, strerror(errno));
    struct stat st;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
        close(fd);
        return ic_fail(err, IC_BAD_REQUEST, "%s is not a regular file", path);
    }
    struct ic_tensors *set = ic_tensors_new(fd, (uint64_t)st.st_size, err);
    if (!set)
        return IC_OOM;
    unsigned char head[24] = {0};
    size_t n = st.st_size < (off_t)sizeof head ? (size_t)st.st_size : sizeof head;
    enum ic_status s = ic_pread_all(fd, 0, head, n, err);
    if (s == IC_OK && n < 8)
        s = ic_fail(err, IC_BAD_REQUEST, "the file has only %zu bytes", n);
    else if (s == IC_OK && head[8] == '{')
        /* before it a length, which may look like anything else's beginning */
        s = ic_safetensors_read(set, err);
    else if (s == IC_OK && ic_torch_is_old(head, n))
        s = ic_torch_read_old(set, err);
    else if (s == IC_OK && head[0] == 0x80 && head[1] <= 5)
        s = ic_fail(err, IC_BAD_REQUEST, "a bare pickle, not a file of torch.save");
    else if (s == IC_OK && memcmp(head, "PK", 2) == 0)
        s = ic_torch_read(set, err);
    else if (s == IC_OK)
        s = ic_safetensors_read(set, err);
    if (s != IC_OK)
        ic_tensors_close(&set);
    *out = set;
    return s;
}

/* ---- Values ---------------------------------------------------------------------------------- */

/* Real part number `part` of the element at p, as float32; the file is little endian, like every
 * machine this runs on. */
static float value_at(enum ic_dtype t, const uint8_t *p, unsigned part)
{
    union {
        float f;
        double d;
        uint16_t u16;
        uint32_t u32;
        int64_t i64;
        int32_t i32;
        int16_t i16;
    } v;
    switch (t) {
    case IC_DTYPE_F32: memcpy(&v.f, p, 4); return v.f;
    case IC_DTYPE_C64: memcpy(&v.f, p + 4 * part, 4); return v.f;
    case IC_DTYPE_F64: memcpy(&v.d, p, 8); return (float)v.d;
    case IC_DTYPE_C128: memcpy(&v.d, p + 8 * part, 8); return (float)v.d;
    case IC_DTYPE_F16: memcpy(&v.u16, p, 2); return ic_f16_to_f32(v.u16);
    case IC_DTYPE_BF16:
        memcpy(&v.u16, p, 2);
        v.u32 = (uint32_t)v.u16 << 16;
        return v.f;
    case IC_DTYPE_I64: memcpy(&v.i64, p, 8); return (float)v.i64;
    case IC_DTYPE_I32: memcpy(&v.i32, p, 4); return (float)v.i32;
    case IC_DTYPE_I16: memcpy(&v.i16, p, 2); return (float)v.i16;
    case IC_DTYPE_I8: return (float)(int8_t)*p;
    case IC_DTYPE_U8: return (float)*p;
    case IC_DTYPE_BOOL: return *p ? 1.0f : 0.0f;
    case IC_DTYPE_COUNT: break;
    }
    IC_ASSERT(!"a dtype");
    return 0;
}

enum ic_status ic_tensors_read_f32(const struct ic_tensors *set, const struct ic_tensor *t, float *out,
                                   size_t n, struct ic_err *err)
{
    const struct ic_dtype_info *info = ic_dtype_info(t->dtype);
    if (n != t->count * info->parts)
        return ic_fail(err, IC_BAD_REQUEST, "tensor %s has %" PRIu64 " values, not %zu", t->name,
                       t->count * info->parts, n);
    if (n == 0)
        return IC_OK;
    uint8_t *raw;
    enum ic_status s = ic_extent_read(set->fd, &t->where, UINT64_MAX, t->name, &raw, err);
    if (s != IC_OK)
        return s;
    int64_t at[IC_TENSOR_DIMS_MAX] = {0}; /* odometer over the shape, last dimension fastest */
    uint64_t element = t->offset;
    for (size_t i = 0; i < n && s == IC_OK; i += info->parts) {
        for (unsigned part = 0; part < info->parts; part++) {
            out[i + part] = value_at(t->dtype, raw + element * info->bytes, part);
            if (!isfinite(out[i + part]))
                s = ic_fail(err, IC_BAD_REQUEST, "tensor %s holds %s (value %zu)", t->name,
                            isnan(out[i + part]) ? "NaN" : "an infinity, or a value past float32",
                            i + part);
        }
        for (unsigned dim = t->ndim; dim-- > 0;) {
            element += (uint64_t)t->stride[dim];
            if (++at[dim] < t->shape[dim])
                break;
            element -= (uint64_t)t->stride[dim] * (uint64_t)t->shape[dim];
            at[dim] = 0;
        }
    }
    free(raw);
    return s;
}
