/* The log's file: rotated by size and age, rotated files compressed, all of them together within a bound.
 *
 *   PATH            the current one
 *   PATH.000007     rotated, not compressed yet (or not possible: the disk is full)
 *   PATH.000006.gz  rotated and compressed; the number rises, whatever the clock does
 *
 * What the disk does not take is lost, not waited for: a line is in the file whole or not at all. Each
 * write is another try, so that it goes on by itself when there is room again. What is no regular file (a
 * FIFO, a device) is written to and never rotated.
 *
 * Thread: opened by one, then all calls come from the log thread (base/log.h) until it has ended. */
#ifndef IC_OPS_LOGFILE_H
#define IC_OPS_LOGFILE_H

#include <stdint.h>
#include <sys/types.h>

#include "base/log.h"
#include "base/status.h"

#define IC_LOGFILE_PATH_MAX 3000 /* bytes */

struct ic_logfile_config {
    const char *path; /* copied */
    /* a file is rotated before it would pass this; at least one write of 64 KiB fits */
    int64_t rotate_bytes;
    int64_t rotate_ns;   /* … or when it is older than this, by the monotonic clock; 0: never */
    int64_t total_bytes; /* of the current and all rotated files; at least 3 * rotate_bytes */
    /* For tests, NULL: the real ones. */
    ssize_t (*write)(int fd, const void *p, size_t n);
    int64_t (*now_ns)(void);
    double (*wall_s)(void);
};

struct ic_logfile;

/* Opens or makes the file (mode 0640) and goes on at its end; compression that was interrupted is resumed
 * later. IC_NOT_FOUND: it cannot be opened. IC_BAD_REQUEST: the sizes make no sense. */
enum ic_status ic_logfile_open(struct ic_logfile **out, const struct ic_logfile_config *cfg,
                               struct ic_err *err);
void ic_logfile_close(struct ic_logfile **f); /* accepts *f == NULL */
/* For ic_log_start; valid until ic_logfile_close. */
struct ic_log_sink ic_logfile_sink(struct ic_logfile *f);
uint64_t ic_logfile_rotations(const struct ic_logfile *f); /* any thread */

#endif
