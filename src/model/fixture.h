/* For tests only: writes pickles and zips, honest or not, byte by byte. */
#ifndef IC_MODEL_FIXTURE_H
#define IC_MODEL_FIXTURE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zlib.h>

#include "base/buf.h"

static inline void put_u(struct ic_buf *b, uint64_t v, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i++)
        ic_buf_put(b, &(char){(char)(i < 8 ? v >> (8 * i) : 0)}, 1);
}

/* ---- Pickle ---------------------------------------------------------------------------------- */

static inline void pk_str(struct ic_buf *b, const char *s)
{
    ic_buf_puts(b, "X");
    put_u(b, strlen(s), 4);
    ic_buf_puts(b, s);
}

static inline void pk_int(struct ic_buf *b, int32_t v)
{
    ic_buf_puts(b, "J");
    put_u(b, (uint32_t)v, 4);
}

static inline void pk_begin(struct ic_buf *b)
{
    ic_buf_put(b, "\x80\x02", 2);
}

static inline void pk_global(struct ic_buf *b, const char *module, const char *name)
{
    ic_buf_printf(b, "c%s\n%s\n", module, name);
}

/* A tensor of `ndim` dimensions over storage `key` that claims `count` elements. */
static inline void pk_tensor(struct ic_buf *b, const char *cls, const char *key, int32_t count,
                             int32_t offset, unsigned ndim, const int32_t *size, const int32_t *stride)
{
    pk_global(b, "torch._utils", "_rebuild_tensor_v2");
    ic_buf_puts(b, "((");
    pk_str(b, "storage");
    pk_global(b, "torch", cls);
    pk_str(b, key);
    pk_str(b, "cpu");
    pk_int(b, count);
    ic_buf_puts(b, "tQ");
    pk_int(b, offset);
    ic_buf_puts(b, "(");
    for (unsigned i = 0; i < ndim; i++)
        pk_int(b, size[i]);
    ic_buf_puts(b, "t(");
    for (unsigned i = 0; i < ndim; i++)
        pk_int(b, stride[i]);
    ic_buf_put(b, "t\x89", 2); /* requires_grad = False */
    pk_global(b, "collections", "OrderedDict");
    ic_buf_puts(b, ")RtR");
}

/* torch's format before the zip, up to its storages: `version` and `little` are opcodes for one value each, `keys` for
 * any number of strings. */
static inline void old_file(struct ic_buf *b, const char *version, const char *little,
                            const struct ic_buf *program, const char *keys)
{
    ic_buf_put(b, "\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", 15);
    ic_buf_printf(b, "\x80\x02%s.\x80\x02}\x8c\x0dlittle_endian%ss.", version, little);
    for (size_t i = 0; i < program->len; i++) { /* a storage's id has a sixth part, None */
        if (i + 1 < program->len && memcmp(program->data + i, "tQ", 2) == 0)
            ic_buf_puts(b, "N");
        ic_buf_put(b, program->data + i, 1);
    }
    ic_buf_printf(b, "\x80\x02](%se.", keys);
}

/* ---- Zip ------------------------------------------------------------------------------------- */

struct zip_entry {
    const char *name;
    const void *data; /* as stored */
    size_t stored;
    uint64_t bytes; /* inflated size to declare */
    uint32_t crc;   /* of the inflated bytes */
    uint16_t method, flags;
    uint64_t at; /* where its local header went; filled by zip_write */
};

static inline struct zip_entry zip_stored(const char *name, const void *data, size_t n)
{
    return (struct zip_entry){
        .name = name, .data = data, .stored = n, .bytes = n, .crc = (uint32_t)crc32(0, data, (uInt)n)};
}

static inline void zip_local(struct ic_buf *b, struct zip_entry *e)
{
    e->at = b->len;
    put_u(b, 0x04034b50, 4);
    put_u(b, 20, 2);
    put_u(b, e->flags | 8, 2); /* sizes and CRC follow, as torch writes: zero here */
    put_u(b, e->method, 2);
    put_u(b, 0, 16);
    put_u(b, strlen(e->name), 2);
    put_u(b, 0, 2);
    ic_buf_puts(b, e->name);
    ic_buf_put(b, e->data, e->stored);
}

static inline void zip_central(struct ic_buf *b, const struct zip_entry *e)
{
    put_u(b, 0x02014b50, 4);
    put_u(b, 20, 2);
    put_u(b, 20, 2);
    put_u(b, e->flags | 8, 2);
    put_u(b, e->method, 2);
    put_u(b, 0, 4);
    put_u(b, e->crc, 4);
    put_u(b, e->stored, 4);
    put_u(b, e->bytes, 4);
    put_u(b, strlen(e->name), 2);
    put_u(b, 0, 12);
    put_u(b, e->at, 4);
    ic_buf_puts(b, e->name);
}

static inline void zip_end(struct ic_buf *b, size_t count, uint64_t at)
{
    uint64_t bytes = b->len - at;
    put_u(b, 0x06054b50, 4);
    put_u(b, 0, 4);
    put_u(b, count, 2);
    put_u(b, count, 2);
    put_u(b, bytes, 4);
    put_u(b, at, 4);
    put_u(b, 0, 2);
}

static inline void zip_write(struct ic_buf *b, struct zip_entry *e, size_t count)
{
    for (size_t i = 0; i < count; i++)
        zip_local(b, &e[i]);
    uint64_t at = b->len;
    for (size_t i = 0; i < count; i++)
        zip_central(b, &e[i]);
    zip_end(b, count, at);
}

/* Raw deflate of n bytes; the caller frees. */
static inline void *zip_deflate(const void *data, size_t n, size_t *out_n)
{
    z_stream z = {0};
    deflateInit2(&z, 9, Z_DEFLATED, -15, 9, Z_DEFAULT_STRATEGY);
    size_t cap = deflateBound(&z, n) + 64;
    void *out = malloc(cap);
    z.next_in = (Bytef *)(uintptr_t)data;
    z.avail_in = (uInt)n;
    z.next_out = out;
    z.avail_out = (uInt)cap;
    deflate(&z, Z_FINISH);
    *out_n = cap - z.avail_out;
    deflateEnd(&z);
    return out;
}

/* ---- Files ----------------------------------------------------------------------------------- */

/* A new temporary file with these bytes; unlink it after use. */
static inline const char *file_with(const void *data, size_t n)
{
    static char path[64];
    snprintf(path, sizeof path, "/tmp/ic-model-XXXXXX");
    int fd = mkstemp(path);
    if (fd < 0 || write(fd, data, n) != (ssize_t)n)
        abort();
    close(fd);
    return path;
}

#endif
