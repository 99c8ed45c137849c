/* The zip container that torch.save writes, read through its central directory.
 *
 * Torch streams its files: local headers carry zero sizes, so only the central directory is believed,
 * and a local header serves to find where the payload starts. Stored and deflated entries; zip64;
 * one disk; no encryption. Every entry's extent must lie inside the file and before the central
 * directory, extents must not overlap, and a declared inflated size must be one that the compressed
 * bytes can yield, all checked before anything is allocated for it.
 * Format: PKWARE APPNOTE 6.3.10 §4.3. One thread at a time per object; may block on file I/O. */
#ifndef IC_MODEL_ZIP_H
#define IC_MODEL_ZIP_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "model/tensors.h"

#define IC_ZIP_ENTRIES_MAX 16384
#define IC_ZIP_DIRECTORY_MAX ((uint64_t)16 << 20) /* bytes of central directory */
#define IC_ZIP_NAME_MAX 512                       /* bytes of an entry's name */
#define IC_ZIP_COMMENT_MAX 65535                  /* the format's own bound */
/* An entry may claim at most SLACK + RATIO * its compressed size. torch never deflates weights; a
 * re-zipped checkpoint stays under 10, the format's limit is 1032. */
#define IC_ZIP_RATIO_MAX 100
#define IC_ZIP_RATIO_SLACK ((uint64_t)64 << 10)

struct ic_zip_entry {
    char *name; /* NUL-terminated; owned by the zip */
    struct ic_extent where;
};

struct ic_zip {
    int fd; /* borrowed */
    uint64_t file_bytes;
    struct ic_zip_entry *entries; /* in directory order; names are unique */
    size_t count;
    char *names; /* one block behind all names */
};

/* fd is borrowed and must stay open. On failure *out is NULL. */
enum ic_status ic_zip_open(int fd, uint64_t file_bytes, struct ic_zip **out, struct ic_err *err);
void ic_zip_close(struct ic_zip **zip);
/* NULL: no such entry. */
const struct ic_zip_entry *ic_zip_find(const struct ic_zip *zip, const char *name);

/* Reads a whole extent (inflated, CRC checked) into a new block of where->bytes (at least one byte).
 * `what` names it in messages. Refused past max. The caller frees. */
enum ic_status ic_extent_read(int fd, const struct ic_extent *where, uint64_t max, const char *what,
                              uint8_t **out, struct ic_err *err);

#endif
