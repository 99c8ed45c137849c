/* KV on a disk, below host memory (spill.h): one file per part, in a folder of this process's own inside a folder that the
 * operator names. Nothing there outlives the process: the own folder is removed at the end, and what an earlier process
 * that was killed has left is removed at the start (folders by our name that nobody locks, and in them only files by our
 * names). Anything else in the operator's folder is left alone.
 *
 * A thread of its own (ic-spill) writes and removes, so a slow disk holds up nobody: what finds its queue full is not taken.
 * Reading is done by whoever asks, and blocks. What a disk does wrong is a warning, at most one in
 * IC_SPILL_DISK_WARN_NS; a file that is not what was written is as if it were not there. */
#ifndef IC_SCHED_SPILL_DISK_H
#define IC_SCHED_SPILL_DISK_H

#include "base/status.h"
#include "sched/spill.h"

#define IC_SPILL_DISK_QUEUE 8 /* parts that wait to be written */
/* of them together, in host memory; a larger one waits alone */
#define IC_SPILL_DISK_QUEUE_BYTES ((size_t)64 << 20)
#define IC_SPILL_DISK_FAILED 64               /* that could not be written, until the spill is told */
#define IC_SPILL_DISK_PIECE ((size_t)1 << 20) /* bytes written at once: the end waits for one */
#define IC_SPILL_DISK_STOP_MS 2000 /* a disk that hangs longer than this is left behind with its thread */
#define IC_SPILL_DISK_WARN_NS INT64_C(60000000000)

/* `dir` exists; files of at most `max` bytes together. The disk is used by one thread, any. A disk that is full or read-only
 * is a warning, and *out is NULL. IC_NOT_FOUND, IC_BAD_REQUEST: no such folder, or none that we may use. IC_OOM. */
enum ic_status ic_spill_disk_open(struct ic_spill_disk **out, const char *dir, size_t max,
                                  struct ic_err *err);
void ic_spill_disk_close(struct ic_spill_disk **disk); /* forgets and removes everything; accepts NULL */

#endif
