#include "model/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/json.h"
#include "base/utf8.h"

/* ---- Reading --------------------------------------------------------------------------------- */

static bool natural(const json_t *v, uint64_t *out)
{
    if (!json_is_integer(v) || json_integer_value(v) < 0)
        return false;
    *out = (uint64_t)json_integer_value(v);
    return true;
}

/* One header entry: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}. */
static enum ic_status read_entry(struct ic_tensors *set, const char *name, const json_t *j,
                                 uint64_t data_at, struct ic_err *err)
{
    const char *dtype = json_string_value(json_object_get(j, "dtype"));
    const json_t *shape = json_object_get(j, "shape"), *range = json_object_get(j, "data_offsets");
    struct ic_tensor t = {0};
    uint64_t begin, end, bytes, n;
    if (!dtype || !json_is_array(shape) || json_array_size(range) != 2 ||
        !natural(json_array_get(range, 0), &begin) || !natural(json_array_get(range, 1), &end) ||
        json_array_size(shape) > IC_TENSOR_DIMS_MAX)
        return ic_fail(err, IC_BAD_REQUEST, "safetensors: entry %.100s lacks dtype, shape or data_offsets",
                       name);
    if (!ic_dtype_by_name(dtype, strlen(dtype), &t.dtype))
        return ic_fail(err, IC_BAD_REQUEST, "safetensors: %.100s has unknown dtype %.20s", name, dtype);
    t.ndim = (unsigned)json_array_size(shape);
    bytes = ic_dtype_info(t.dtype)->bytes;
    for (unsigned i = 0; i < t.ndim; i++) {
        if (!natural(json_array_get(shape, i), &n) || n > IC_TENSOR_ELEMENTS_MAX ||
            __builtin_mul_overflow(bytes, n, &bytes))
            return ic_fail(err, IC_BAD_REQUEST, "safetensors: %.100s has a shape that no file holds", name);
        t.shape[i] = (int64_t)n;
    }
    int64_t stride = 1; /* cannot overflow: it divides `bytes`, or the tensor is empty */
    for (unsigned i = t.ndim; i-- > 0;) {
        t.stride[i] = stride;
        stride *= t.shape[i] ? t.shape[i] : 1;
    }
    if (begin > end || end > set->file_bytes - data_at || end - begin != bytes)
        return ic_fail(err, IC_BAD_REQUEST,
                       "safetensors: %.100s needs %" PRIu64 " bytes; its range is %" PRIu64 "..%" PRIu64
                       " of %" PRIu64,
                       name, bytes, begin, end, set->file_bytes - data_at);
    t.where = (struct ic_extent){.at = data_at + begin, .stored = bytes, .bytes = bytes};
    return ic_tensors_add(set, &t, name, strlen(name), err);
}

/* Of the metadata, what is this project's own. */
static enum ic_status read_meta(struct ic_tensors *set, const json_t *j, struct ic_err *err)
{
    const size_t prefix = strlen(IC_TENSORS_META_PREFIX);
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)j, key, v)
    {
        if (strncmp(key, IC_TENSORS_META_PREFIX, prefix) != 0)
            continue;
        if (!json_is_string(v) || strlen(json_string_value(v)) != json_string_length(v))
            return ic_fail(err, IC_BAD_REQUEST, "safetensors: metadata %.100s is not a plain string", key);
        if (set->meta_count == IC_TENSORS_META_MAX)
            return ic_fail(err, IC_TOO_LARGE, "safetensors: metadata past IC_TENSORS_META_MAX (%d)",
                           IC_TENSORS_META_MAX);
        if (!set->meta && !(set->meta = calloc(IC_TENSORS_META_MAX, sizeof *set->meta)))
            return ic_fail(err, IC_OOM, "no memory for metadata");
        struct ic_tensors_meta *m = &set->meta[set->meta_count++];
        m->key = strdup(key);
        m->value = strdup(json_string_value(v));
        if (!m->key || !m->value)
            return ic_fail(err, IC_OOM, "no memory for metadata");
    }
    return IC_OK;
}

static int by_place(const void *a, const void *b)
{
    const struct ic_tensor *x = a, *y = b;
    int order = (x->where.at > y->where.at) - (x->where.at < y->where.at);
    return order ? order : (x->where.bytes > y->where.bytes) - (x->where.bytes < y->where.bytes);
}

static enum ic_status check_cover(struct ic_tensors *set, uint64_t data_at, struct ic_err *err)
{
    uint64_t at = data_at;
    if (set->count)
        qsort(set->list, set->count, sizeof *set->list, by_place);
    for (size_t i = 0; i < set->count; i++) {
        if (set->list[i].where.at != at)
            return ic_fail(err, IC_BAD_REQUEST, "safetensors: %s %s", set->list[i].name,
                           set->list[i].where.at < at ? "overlaps its neighbour"
                                                      : "leaves a gap before it");
        at += set->list[i].where.bytes;
    }
    if (at != set->file_bytes)
        return ic_fail(err, IC_BAD_REQUEST, "safetensors: %" PRIu64 " bytes after the last tensor",
                       set->file_bytes - at);
    return IC_OK;
}

enum ic_status ic_safetensors_read(struct ic_tensors *set, struct ic_err *err)
{
    uint8_t raw[8];
    uint64_t len = 0;
    enum ic_status s = ic_pread_all(set->fd, 0, raw, sizeof raw, err);
    if (s != IC_OK)
        return s;
    for (int i = 7; i >= 0; i--)
        len = len << 8 | raw[i];
    if (len < 2 || len > set->file_bytes - 8)
        return ic_fail(err, IC_BAD_REQUEST, "neither a zip (torch.save) nor safetensors, or truncated");
    if (len > IC_SAFETENSORS_HEADER_MAX)
        return ic_fail(err, IC_TOO_LARGE,
                       "safetensors: a header of %" PRIu64 " bytes, past IC_SAFETENSORS_HEADER_MAX", len);
    char *text = malloc((size_t)len);
    if (!text)
        return ic_fail(err, IC_OOM, "no memory for the header");
    s = ic_pread_all(set->fd, 8, text, (size_t)len, err);
    json_error_t je;
    json_t *root = NULL;
    if (s == IC_OK && text[0] != '{')
        s = ic_fail(err, IC_BAD_REQUEST, "neither a zip (torch.save) nor safetensors");
    else if (s == IC_OK && !(root = ic_json_load(text, (size_t)len, JSON_REJECT_DUPLICATES, &je)))
        s = ic_fail(err, json_error_code(&je) == json_error_out_of_memory ? IC_OOM : IC_BAD_REQUEST,
                    "safetensors: header: %s (byte %d)", je.text, je.position);
    else if (s == IC_OK && !json_is_object(root))
        s = ic_fail(err, IC_BAD_REQUEST, "safetensors: the header is not an object");
    const char *key;
    json_t *v;
    json_object_foreach(root, key, v)
    {
        if (s == IC_OK)
            s = strcmp(key, "__metadata__") == 0 ? read_meta(set, v, err)
                                                 : read_entry(set, key, v, 8 + len, err);
    }
    json_decref(root);
    free(text);
    snprintf(set->form, sizeof set->form, "safetensors");
    return s == IC_OK ? check_cover(set, 8 + len, err) : s;
}

/* ---- Writing --------------------------------------------------------------------------------- */

static uint64_t out_bytes(const struct ic_safetensors_out *t)
{
    uint64_t n = ic_dtype_info(t->dtype)->bytes;
    for (unsigned i = 0; i < t->ndim; i++) {
        IC_ASSERT(t->shape[i] >= 0);
        IC_ASSERT(!__builtin_mul_overflow(n, (uint64_t)t->shape[i], &n));
    }
    return n;
}

struct named {
    const char *name;
    size_t index;
};

static int by_text(const void *a, const void *b)
{
    const struct named *x = a, *y = b;
    return strcmp(x->name, y->name);
}

/* Keys in byte order, so that equal contents are equal files; offsets follow the same order. */
static void put_header(struct ic_buf *b, const struct ic_safetensors_out *list, const struct named *order,
                       size_t count, const char *const (*meta)[2], size_t n_meta)
{
    uint64_t at = 0;
    ic_buf_put(b, "\0\0\0\0\0\0\0\0{", 9);
    if (n_meta) {
        ic_buf_puts(b, "\"__metadata__\":{");
        for (size_t i = 0; i < n_meta; i++)
            ic_json_kstr(b, meta[i][0], meta[i][1]);
        ic_buf_puts(b, "}");
    }
    for (size_t i = 0; i < count; i++) {
        const struct ic_safetensors_out *t = &list[order[i].index];
        ic_json_key(b, t->name);
        ic_buf_printf(b, "{\"dtype\":\"%s\",\"shape\":[", ic_dtype_info(t->dtype)->name);
        for (unsigned d = 0; d < t->ndim; d++)
            ic_buf_printf(b, "%s%" PRId64, d ? "," : "", t->shape[d]);
        uint64_t end = at + out_bytes(t);
        ic_buf_printf(b, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", at, end);
        at = end;
    }
    ic_buf_puts(b, "}");
    while (b->len % 8 && !b->failed)
        ic_buf_puts(b, " ");
    for (size_t i = 0; i < 8 && !b->failed; i++)
        b->data[i] = (char)((b->len - 8) >> (8 * i));
}

static enum ic_status write_all(int fd, const void *data, uint64_t n, struct ic_err *err)
{
    const char *p = data;
    while (n) {
        ssize_t put = write(fd, p, n < (1u << 30) ? (size_t)n : 1u << 30);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return ic_fail(err, IC_INTERNAL, "write: %s", strerror(errno));
        p += put;
        n -= (uint64_t)put;
    }
    return IC_OK;
}

/* A new file beside `path`, with an ordinary file's mode (mkstemp's would stay private). */
static int open_beside(const char *path, char *tmp, size_t size)
{
    static atomic_uint serial;
    for (int tries = 0; tries < 100; tries++) {
        int len = snprintf(tmp, size, "%s.tmp.%ld.%u", path, (long)getpid(), atomic_fetch_add(&serial, 1));
        if (len < 0 || (size_t)len >= size)
            return errno = ENAMETOOLONG, -1;
        int fd = open(tmp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd >= 0 || errno != EEXIST)
            return fd;
    }
    return -1;
}

static enum ic_status write_file(const char *path, const struct ic_buf *head,
                                 const struct ic_safetensors_out *list, const struct named *order,
                                 size_t count, struct ic_err *err)
{
    char tmp[4096];
    struct stat st;
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode)) /* root would rename over a device's node */
        return ic_fail(err, IC_BAD_REQUEST, "%s is not a regular file", path);
    int fd = open_beside(path, tmp, sizeof tmp);
    if (fd < 0)
        return ic_fail(err, errno == ENOENT || errno == ENOTDIR ? IC_NOT_FOUND : IC_INTERNAL, "%s: %s",
                       path, strerror(errno));
    enum ic_status s = write_all(fd, head->data, head->len, err);
    for (size_t i = 0; i < count && s == IC_OK; i++)
        s = write_all(fd, list[order[i].index].data, out_bytes(&list[order[i].index]), err);
    if (s == IC_OK && fsync(fd))
        s = ic_fail(err, IC_INTERNAL, "%s: %s", path, strerror(errno));
    if (close(fd) && s == IC_OK)
        s = ic_fail(err, IC_INTERNAL, "%s: %s", path, strerror(errno));
    if (s == IC_OK && rename(tmp, path))
        s = ic_fail(err, IC_INTERNAL, "%s: %s", path, strerror(errno));
    if (s != IC_OK)
        unlink(tmp);
    return s;
}

enum ic_status ic_safetensors_write(const char *path, const struct ic_safetensors_out *list, size_t count,
                                    const char *const (*meta)[2], size_t n_meta, struct ic_err *err)
{
    if (count > IC_TENSORS_MAX || n_meta > IC_SAFETENSORS_META_MAX)
        return ic_fail(err, IC_TOO_LARGE, "%zu tensors, past IC_TENSORS_MAX (%d), or %zu metadata pairs",
                       count, IC_TENSORS_MAX, n_meta);
    struct named *order = malloc((count + 1) * sizeof *order);
    if (!order)
        return ic_fail(err, IC_OOM, "no memory for a header");
    for (size_t i = 0; i < count; i++)
        order[i] = (struct named){list[i].name, i};
    qsort(order, count, sizeof *order, by_text);
    enum ic_status s = IC_OK;
    for (size_t i = 0; i < count && s == IC_OK; i++)
        if (!ic_utf8_valid(order[i].name, strlen(order[i].name)) ||
            (i && strcmp(order[i - 1].name, order[i].name) == 0))
            s = ic_fail(err, IC_BAD_REQUEST, "tensor %s: not UTF-8, or given twice", order[i].name);
    struct ic_buf head = {.max = (size_t)IC_SAFETENSORS_HEADER_MAX};
    if (s == IC_OK) {
        put_header(&head, list, order, count, meta, n_meta);
        s = head.failed ? ic_fail(err, IC_OOM, "no memory for a header")
                        : write_file(path, &head, list, order, count, err);
    }
    ic_buf_deinit(&head);
    free(order);
    return s;
}
