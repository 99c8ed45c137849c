#include "model/zip.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "base/utf8.h"

/* Record sizes and signatures (APPNOTE 4.3). */
enum { LOCAL_BYTES = 30, CENTRAL_BYTES = 46, END_BYTES = 22, END64_BYTES = 56, LOCATOR_BYTES = 20 };
#define LOCAL_SIG 0x04034b50u
#define CENTRAL_SIG 0x02014b50u
#define END_SIG 0x06054b50u
#define END64_SIG 0x06064b50u
#define LOCATOR_SIG 0x07064b50u

static uint16_t u16(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

static uint32_t u32(const uint8_t *p)
{
    return (uint32_t)u16(p) | (uint32_t)u16(p + 2) << 16;
}

static uint64_t u64(const uint8_t *p)
{
    return (uint64_t)u32(p) | (uint64_t)u32(p + 4) << 32;
}

struct directory {
    uint64_t at, bytes, count;
};

/* zip64: a locator before the end record points at a larger end record. */
static enum ic_status find_directory64(int fd, uint64_t end_at, struct directory *dir, struct ic_err *err)
{
    uint8_t loc[LOCATOR_BYTES], end[END64_BYTES];
    if (end_at < LOCATOR_BYTES)
        return ic_fail(err, IC_BAD_REQUEST, "zip: no room for the zip64 locator");
    enum ic_status s = ic_pread_all(fd, end_at - LOCATOR_BYTES, loc, sizeof loc, err);
    if (s != IC_OK)
        return s;
    uint64_t at = u64(loc + 8);
    if (u32(loc) != LOCATOR_SIG || at > end_at - LOCATOR_BYTES || end_at - LOCATOR_BYTES - at < END64_BYTES)
        return ic_fail(err, IC_BAD_REQUEST, "zip: the zip64 locator points outside the file");
    s = ic_pread_all(fd, at, end, sizeof end, err);
    if (s != IC_OK)
        return s;
    if (u32(end) != END64_SIG)
        return ic_fail(err, IC_BAD_REQUEST, "zip: no zip64 end record where the locator points");
    *dir = (struct directory){.at = u64(end + 48), .bytes = u64(end + 40), .count = u64(end + 32)};
    return IC_OK;
}

/* The end record is the last one whose comment length reaches exactly to the end of the file. */
static enum ic_status find_directory(int fd, uint64_t file_bytes, struct directory *dir, struct ic_err *err)
{
    if (file_bytes < END_BYTES)
        return ic_fail(err, IC_BAD_REQUEST, "zip: the file is truncated (%" PRIu64 " bytes)", file_bytes);
    uint64_t span =
        file_bytes < END_BYTES + IC_ZIP_COMMENT_MAX ? file_bytes : END_BYTES + IC_ZIP_COMMENT_MAX;
    uint8_t *tail = malloc((size_t)span);
    if (!tail)
        return ic_fail(err, IC_OOM, "no memory for the end of the zip");
    enum ic_status s = ic_pread_all(fd, file_bytes - span, tail, (size_t)span, err);
    const uint8_t *end = NULL;
    for (uint64_t i = span - END_BYTES + 1; s == IC_OK && i-- > 0 && !end;)
        if (u32(tail + i) == END_SIG && u16(tail + i + 20) == span - END_BYTES - i)
            end = tail + i;
    if (s == IC_OK && !end)
        s = ic_fail(err, IC_BAD_REQUEST, "zip: no end record: the file is truncated, or not a zip");
    if (s == IC_OK) {
        uint64_t end_at = file_bytes - span + (uint64_t)(end - tail);
        *dir = (struct directory){.at = u32(end + 16), .bytes = u32(end + 12), .count = u16(end + 10)};
        if (u16(end + 4) != 0 && u16(end + 4) != 0xFFFF)
            s = ic_fail(err, IC_BAD_REQUEST, "zip: an archive on several disks");
        else if (dir->at == UINT32_MAX || dir->bytes == UINT32_MAX || dir->count == UINT16_MAX)
            s = find_directory64(fd, end_at, dir, err);
        if (s == IC_OK && (dir->at > end_at || dir->bytes > end_at - dir->at))
            s = ic_fail(err, IC_BAD_REQUEST, "zip: the central directory lies outside the file");
    }
    free(tail);
    return s;
}

/* Reads sizes and offset of one central record, zip64 extra field included. */
static enum ic_status central_sizes(const uint8_t *rec, size_t name_len, size_t extra_len,
                                    struct ic_extent *where, struct ic_err *err)
{
    uint64_t *field[3] = {&where->bytes, &where->stored, &where->at};
    where->bytes = u32(rec + 24);
    where->stored = u32(rec + 20);
    where->at = u32(rec + 42);
    const uint8_t *extra = rec + CENTRAL_BYTES + name_len, *stop = extra + extra_len;
    while (stop - extra >= 4) {
        uint16_t id = u16(extra), len = u16(extra + 2);
        extra += 4;
        if (len > stop - extra)
            break; /* torch pads with a malformed field on purpose nowhere; others do: ignored */
        for (size_t i = 0, used = 0; id == 1 && i < 3; i++)
            if (*field[i] == UINT32_MAX && used + 8u <= len) {
                *field[i] = u64(extra + used);
                used += 8;
            }
        extra += len;
    }
    if (where->bytes == UINT32_MAX || where->stored == UINT32_MAX || where->at == UINT32_MAX)
        return ic_fail(err, IC_BAD_REQUEST, "zip: a zip64 size is missing");
    return IC_OK;
}

/* Turns the local header's offset into the payload's; the local header is believed for the length of
 * its name and extra field only. */
static enum ic_status locate(const struct ic_zip *zip, uint64_t directory_at, struct ic_zip_entry *e,
                             struct ic_err *err)
{
    uint8_t local[LOCAL_BYTES];
    uint64_t at = e->where.at;
    if (at > directory_at || directory_at - at < LOCAL_BYTES)
        return ic_fail(err, IC_BAD_REQUEST, "zip: entry %s begins outside the file", e->name);
    enum ic_status s = ic_pread_all(zip->fd, at, local, sizeof local, err);
    if (s != IC_OK)
        return s;
    if (u32(local) != LOCAL_SIG)
        return ic_fail(err, IC_BAD_REQUEST, "zip: entry %s has no local header", e->name);
    at += LOCAL_BYTES + (uint64_t)u16(local + 26) + u16(local + 28);
    if (at > directory_at || directory_at - at < e->where.stored)
        return ic_fail(err, IC_BAD_REQUEST, "zip: entry %s (%" PRIu64 " bytes) ends outside the file",
                       e->name, e->where.stored);
    e->where.at = at;
    if (!e->where.deflated && e->where.bytes != e->where.stored)
        return ic_fail(err, IC_BAD_REQUEST, "zip: stored entry %s claims two sizes", e->name);
    if (e->where.deflated && (e->where.stored > UINT64_MAX / IC_ZIP_RATIO_MAX - IC_ZIP_RATIO_SLACK ||
                              e->where.bytes > e->where.stored * IC_ZIP_RATIO_MAX + IC_ZIP_RATIO_SLACK))
        return ic_fail(err, IC_TOO_LARGE,
                       "zip: entry %s claims to inflate %" PRIu64 " bytes to %" PRIu64
                       ", past IC_ZIP_RATIO_MAX (%d)",
                       e->name, e->where.stored, e->where.bytes, IC_ZIP_RATIO_MAX);
    return IC_OK;
}

static enum ic_status read_central(struct ic_zip *zip, const struct directory *dir, const uint8_t *bytes,
                                   struct ic_err *err)
{
    size_t at = 0;
    char *name = zip->names;
    for (; zip->count < dir->count; zip->count++) {
        const uint8_t *rec = bytes + at;
        if (dir->bytes - at < CENTRAL_BYTES || u32(rec) != CENTRAL_SIG)
            return ic_fail(err, IC_BAD_REQUEST, "zip: entry %zu of the central directory is damaged",
                           zip->count);
        size_t name_len = u16(rec + 28), extra = u16(rec + 30), comment = u16(rec + 32);
        uint16_t flags = u16(rec + 8), method = u16(rec + 10);
        if (dir->bytes - at - CENTRAL_BYTES < name_len + extra + comment)
            return ic_fail(err, IC_BAD_REQUEST, "zip: the central directory is truncated");
        const char *raw = (const char *)rec + CENTRAL_BYTES;
        if (name_len == 0 || name_len > IC_ZIP_NAME_MAX || memchr(raw, 0, name_len) ||
            !ic_utf8_valid(raw, name_len))
            return ic_fail(err, IC_BAD_REQUEST, "zip: an entry's name is empty, too long or not UTF-8");
        struct ic_zip_entry *e = &zip->entries[zip->count];
        e->name = name;
        memcpy(name, raw, name_len);
        name[name_len] = 0;
        name += name_len + 1;
        if (flags & 1)
            return ic_fail(err, IC_BAD_REQUEST, "zip: entry %s is encrypted", e->name);
        if (method != 0 && method != 8)
            return ic_fail(err, IC_BAD_REQUEST, "zip: entry %s uses compression method %u", e->name,
                           method);
        e->where = (struct ic_extent){.deflated = method == 8, .has_crc = true, .crc = u32(rec + 16)};
        enum ic_status s = central_sizes(rec, name_len, extra, &e->where, err);
        if (s == IC_OK)
            s = locate(zip, dir->at, e, err);
        if (s != IC_OK)
            return s;
        at += CENTRAL_BYTES + name_len + extra + comment;
    }
    return IC_OK;
}

static int by_name(const void *a, const void *b)
{
    const struct ic_zip_entry *const *x = a, *const *y = b;
    return strcmp((*x)->name, (*y)->name);
}

static int by_place(const void *a, const void *b)
{
    const struct ic_zip_entry *const *x = a, *const *y = b;
    return ((*x)->where.at > (*y)->where.at) - ((*x)->where.at < (*y)->where.at);
}

/* Two entries of one name, or over the same bytes, would let a small file stand for a large one. */
static enum ic_status check_unique(const struct ic_zip *zip, struct ic_err *err)
{
    const struct ic_zip_entry **order = malloc((zip->count + 1) * sizeof(void *));
    enum ic_status s = IC_OK;
    if (!order)
        return ic_fail(err, IC_OOM, "no memory for a zip's table");
    for (size_t i = 0; i < zip->count; i++)
        order[i] = &zip->entries[i];
    qsort(order, zip->count, sizeof *order, by_name);
    for (size_t i = 1; i < zip->count && s == IC_OK; i++)
        if (strcmp(order[i - 1]->name, order[i]->name) == 0)
            s = ic_fail(err, IC_BAD_REQUEST, "zip: entry %s appears twice", order[i]->name);
    qsort(order, zip->count, sizeof *order, by_place);
    for (size_t i = 1; i < zip->count && s == IC_OK; i++)
        if (order[i - 1]->where.at + order[i - 1]->where.stored > order[i]->where.at)
            s = ic_fail(err, IC_BAD_REQUEST, "zip: entries %s and %s overlap", order[i - 1]->name,
                        order[i]->name);
    free(order);
    return s;
}

enum ic_status ic_zip_open(int fd, uint64_t file_bytes, struct ic_zip **out, struct ic_err *err)
{
    struct directory dir = {0};
    *out = NULL;
    enum ic_status s = find_directory(fd, file_bytes, &dir, err);
    if (s != IC_OK)
        return s;
    if (dir.bytes > IC_ZIP_DIRECTORY_MAX || dir.count > IC_ZIP_ENTRIES_MAX)
        return ic_fail(err, IC_TOO_LARGE, "zip: %" PRIu64 " entries, past IC_ZIP_ENTRIES_MAX (%d)",
                       dir.count, IC_ZIP_ENTRIES_MAX);
    if (dir.count > dir.bytes / CENTRAL_BYTES)
        return ic_fail(err, IC_BAD_REQUEST, "zip: %" PRIu64 " entries in a directory of %" PRIu64 " bytes",
                       dir.count, dir.bytes);
    uint8_t *bytes = malloc((size_t)dir.bytes + 1);
    struct ic_zip *zip = calloc(1, sizeof *zip);
    if (zip) {
        *zip = (struct ic_zip){.fd = fd, .file_bytes = file_bytes};
        zip->entries = calloc((size_t)dir.count + 1, sizeof *zip->entries);
        zip->names = malloc((size_t)dir.bytes + (size_t)dir.count + 1);
    }
    if (!bytes || !zip || !zip->entries || !zip->names)
        s = ic_fail(err, IC_OOM, "no memory for a zip's table");
    if (s == IC_OK)
        s = ic_pread_all(fd, dir.at, bytes, (size_t)dir.bytes, err);
    if (s == IC_OK)
        s = read_central(zip, &dir, bytes, err);
    if (s == IC_OK)
        s = check_unique(zip, err);
    free(bytes);
    if (s != IC_OK)
        ic_zip_close(&zip);
    *out = zip;
    return s;
}

void ic_zip_close(struct ic_zip **zip)
{
    if (!zip || !*zip)
        return;
    free((*zip)->entries);
    free((*zip)->names);
    free(*zip);
    *zip = NULL;
}

const struct ic_zip_entry *ic_zip_find(const struct ic_zip *zip, const char *name)
{
    for (size_t i = 0; i < zip->count; i++)
        if (strcmp(zip->entries[i].name, name) == 0)
            return &zip->entries[i];
    return NULL;
}

#define INFLATE_STEP ((size_t)64 << 10)

/* Inflates into exactly where->bytes; more or fewer is an error. */
static enum ic_status inflate_extent(int fd, const struct ic_extent *where, const char *what, uint8_t *out,
                                     struct ic_err *err)
{
    enum ic_status s = IC_OK;
    z_stream z = {0};
    uint8_t *in = malloc(INFLATE_STEP);
    if (!in || inflateInit2(&z, -MAX_WBITS) != Z_OK)
        return free(in), ic_fail(err, IC_OOM, "no memory to inflate %s", what);
    uint64_t taken = 0, made = 0;
    int rc = Z_OK;
    uint8_t beyond; /* where output past the declared size lands: one byte is enough to see it */
    while (s == IC_OK && rc != Z_STREAM_END) {
        if (z.avail_in == 0 && taken < where->stored) {
            uint64_t left = where->stored - taken;
            size_t n = left < INFLATE_STEP ? (size_t)left : INFLATE_STEP;
            s = ic_pread_all(fd, where->at + taken, in, n, err);
            z.next_in = in;
            z.avail_in = (uInt)n;
            taken += n;
        }
        uint64_t room = where->bytes - made;
        size_t give = room ? room < (1u << 30) ? (size_t)room : 1u << 30 : 1;
        z.next_out = room ? out + made : &beyond;
        z.avail_out = (uInt)give;
        if (s == IC_OK)
            rc = inflate(&z, Z_NO_FLUSH);
        size_t got = give - z.avail_out;
        if (s == IC_OK && got > room)
            s = ic_fail(err, IC_BAD_REQUEST, "zip: %s inflates to more than it claims", what);
        else if (s == IC_OK && rc != Z_OK && rc != Z_STREAM_END)
            s = ic_fail(err, IC_BAD_REQUEST, "zip: %s is damaged (does not inflate)", what);
        made += got;
    }
    inflateEnd(&z);
    free(in);
    if (s == IC_OK && made != where->bytes)
        s = ic_fail(err, IC_BAD_REQUEST, "zip: %s inflates to less than it claims", what);
    return s;
}

static uint32_t crc_of(const uint8_t *p, uint64_t n)
{
    uLong crc = crc32(0, Z_NULL, 0);
    for (uint64_t at = 0; at < n;) {
        uInt step = n - at < (1u << 30) ? (uInt)(n - at) : 1u << 30;
        crc = crc32(crc, p + at, step);
        at += step;
    }
    return (uint32_t)crc;
}

enum ic_status ic_extent_read(int fd, const struct ic_extent *where, uint64_t max, const char *what,
                              uint8_t **out, struct ic_err *err)
{
    *out = NULL;
    if (where->bytes > max || where->bytes >= SIZE_MAX)
        return ic_fail(err, IC_TOO_LARGE, "%s has %" PRIu64 " bytes; the limit is %" PRIu64, what,
                       where->bytes, max);
    uint8_t *p = malloc((size_t)where->bytes + 1);
    if (!p)
        return ic_fail(err, IC_OOM, "no memory for %s (%" PRIu64 " bytes)", what, where->bytes);
    enum ic_status s = where->deflated ? inflate_extent(fd, where, what, p, err)
                                       : ic_pread_all(fd, where->at, p, (size_t)where->bytes, err);
    if (s == IC_OK && where->has_crc && crc_of(p, where->bytes) != where->crc)
        s = ic_fail(err, IC_BAD_REQUEST, "%s is damaged: its bytes do not match their checksum", what);
    if (s != IC_OK)
        return free(p), s;
    *out = p;
    return IC_OK;
}
