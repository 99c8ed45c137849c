/* KV that had to leave the device, in host memory: parts of sequences, the least recently used dropped first, their sum
 * bounded. The sum is honest: data, tokens and book-keeping, as asked of malloc. One thread.
 *
 * With a disk below, the data of what would be dropped goes to a file there instead; its tokens stay in memory, counted
 * as before. The files have a sum and a bound of their own. Without a disk, or with one that is full or broken, all is as if
 * there were none. */
#ifndef IC_SCHED_SPILL_H
#define IC_SCHED_SPILL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "sched/prefix.h"

struct ic_spill_part {
    struct ic_spill_part *next; /* less recently put away */
    char salt[IC_SALT_MAX + 1];
    int32_t from, to; /* positions whose KV this is */
    int32_t *tokens;  /* [0..to): a part means what it does behind these only */
    void *data;       /* NULL: it is on the disk */
    size_t bytes;     /* of data */
    uint64_t file;    /* its name on the disk; 0: it is in memory */
};

#define IC_SPILL_FILE_HEAD 128  /* bytes of a file before its tokens */
#define IC_SPILL_FILES_MAX 4096 /* parts on the disk: each is looked at by every search */

/* Bytes of the file of a part. */
size_t ic_spill_file_bytes(const struct ic_spill_part *p);

/* Where parts go below host memory. The real one is spill_disk.h, tests have others. All calls on the spill's thread, and
 * none waits for a disk but get. */
struct ic_spill_disk {
    void *arg;
    size_t max; /* bytes of all files, kept by the spill */
    /* Takes p->data, which will be read as `file`; the rest of p is copied. False: not now, nothing taken. */
    bool (*put)(void *arg, uint64_t file, const struct ic_spill_part *p);
    /* The data (malloc'd, the caller's) if it is there and all that p says; NULL: it is not, nor will it be. */
    void *(*get)(void *arg, uint64_t file, const struct ic_spill_part *p);
    void (*drop)(void *arg, uint64_t file); /* it will not be asked for again */
    /* The next file that was taken and could not be written after all; it is to be dropped. False: there is none. */
    bool (*failed)(void *arg, uint64_t *file);
};

struct ic_spill {
    struct ic_spill_part *first;
    size_t max, sum;            /* bytes of host memory */
    int32_t count;              /* parts, in memory or on the disk */
    struct ic_spill_disk *disk; /* borrowed; NULL: none. Changed only while no part is on it */
    size_t disk_sum;            /* bytes of files, those still to be written included */
    int32_t disk_count;
    uint64_t last_file;
    uint64_t disk_put, disk_got,
        disk_lost; /* tokens that went there, that came back, and of parts that went and could not be
                                               read or written */
};

/* Whether the KV of tokens[from..to) behind tokens[0..from) is there already, maybe as a piece of a longer part (`whole`:
 * only as it is). Then it counts as used. */
bool ic_spill_has(struct ic_spill *s, const char *salt, const int32_t *tokens, int32_t from, int32_t to,
                  bool whole);
/* Takes data and tokens (malloc'd); drops them, and says false, when they are larger than all there may be. Parts
 * that it makes superfluous go (`whole`: none does, for the shorter ones serve others). */
bool ic_spill_put(struct ic_spill *s, const char *salt, int32_t *tokens, int32_t from, int32_t to,
                  void *data, size_t bytes, bool whole);
/* The part that carries tokens[0..n) furthest beyond its first `have`, and how far. NULL: none. `whole`: parts are of use
 * only if all of them is a beginning of tokens. It counts as used. */
struct ic_spill_part *ic_spill_find(struct ic_spill *s, const char *salt, const int32_t *tokens, int32_t n,
                                    int32_t have, bool whole, int32_t *reach);
/* The part's data is in memory; another may have had to leave it. False: it cannot be read, and the part is gone. */
bool ic_spill_fetch(struct ic_spill *s, struct ic_spill_part *p);
void ic_spill_drop(struct ic_spill *s, struct ic_spill_part *p);
void ic_spill_clear(struct ic_spill *s); /* also what is to be called at the end */

#endif
