/* A disk for the spill that is none: in memory, suspicious, and as full, broken or slow as a test says. One thread; for
 * tests only. */
#ifndef IC_SCHED_FAKE_DISK_H
#define IC_SCHED_FAKE_DISK_H

#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "sched/spill.h"

#define FAKE_FILES 512

struct fake_file {
    uint64_t file;
    void *data;
    size_t bytes, size; /* of data; of the file */
    int32_t from, to;
    bool failed; /* it was taken and is not there */
};

struct fake_disk {
    struct ic_spill_disk face;
    struct fake_file at[FAKE_FILES];
    int n;
    size_t sum;
    bool full, failing, corrupt; /* takes nothing; loses what it takes; gives nothing back */
    int every;                   /* 0: what these say is always so, else at every such call only */
    int calls;
    int64_t *now; /* a clock that reading moves on, or NULL */
    int64_t ns_per_byte;
    int puts, gets; /* that went well */
};

static inline bool fake_disk_wrong(struct fake_disk *d, bool how)
{
    return how && (d->every == 0 || ++d->calls % d->every == 0);
}

static inline struct fake_file *fake_file(struct fake_disk *d, uint64_t file)
{
    for (int i = 0; i < d->n; i++)
        if (d->at[i].file == file)
            return &d->at[i];
    IC_ASSERT(!"a file that was taken and not dropped");
    return NULL;
}

static inline bool fake_disk_put(void *arg, uint64_t file, const struct ic_spill_part *p)
{
    struct fake_disk *d = arg;

    for (int i = 0; i < d->n; i++)
        IC_ASSERT(d->at[i].file != file);
    IC_ASSERT(file != 0 && p->data && p->file == 0 && d->sum + ic_spill_file_bytes(p) <= d->face.max);
    if (d->n == FAKE_FILES || fake_disk_wrong(d, d->full))
        return false;
    struct fake_file *f = &d->at[d->n++];
    *f = (struct fake_file){.file = file,
                            .data = p->data,
                            .bytes = p->bytes,
                            .size = ic_spill_file_bytes(p),
                            .from = p->from,
                            .to = p->to,
                            .failed = fake_disk_wrong(d, d->failing)};
    d->sum += f->size;
    d->puts++;
    return true;
}

static inline void *fake_disk_get(void *arg, uint64_t file, const struct ic_spill_part *p)
{
    struct fake_disk *d = arg;
    const struct fake_file *f = fake_file(d, file);

    IC_ASSERT(f->bytes == p->bytes && f->from == p->from && f->to == p->to && p->file == file && !p->data);
    if (d->now)
        *d->now += d->ns_per_byte * (int64_t)p->bytes;
    if (f->failed || fake_disk_wrong(d, d->corrupt))
        return NULL;
    void *data = malloc(f->bytes);
    IC_ASSERT(data);
    memcpy(data, f->data, f->bytes);
    d->gets++;
    return data;
}

static inline void fake_disk_drop(void *arg, uint64_t file)
{
    struct fake_disk *d = arg;
    struct fake_file *f = fake_file(d, file);

    d->sum -= f->size;
    free(f->data);
    *f = d->at[--d->n];
}

static inline bool fake_disk_failed(void *arg, uint64_t *file)
{
    struct fake_disk *d = arg;

    for (int i = 0; i < d->n; i++)
        if (d->at[i].failed) {
            *file = d->at[i].file;
            return true;
        }
    return false;
}

static inline struct ic_spill_disk *fake_disk_init(struct fake_disk *d, size_t max)
{
    *d = (struct fake_disk){.face = {.arg = d,
                                     .max = max,
                                     .put = fake_disk_put,
                                     .get = fake_disk_get,
                                     .drop = fake_disk_drop,
                                     .failed = fake_disk_failed}};
    return &d->face;
}

#endif
