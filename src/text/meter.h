/* What llama.cpp says it allocates, read from its log: its C API has no call for it (the one there is
 * returns a C++ map). The lines are those of the pinned version; one that is not understood is not counted,
 * and whoever asks for a figure that is not there estimates instead.
 *
 * A meter listens on the thread that started it, where llama.cpp loads and logs. */
#ifndef IC_TEXT_METER_H
#define IC_TEXT_METER_H

#include <stdbool.h>
#include <stdint.h>

#define IC_METER_NAMES_MAX 64

struct ic_meter {
    struct ic_meter_row {
        char name[48]; /* of the kind of buffer: "CPU", "Vulkan0", "CUDA_Host" */
        uint64_t weights, cache, compute;
    } row[IC_METER_NAMES_MAX];
    int n;
    uint64_t cache_total; /* KV and recurrent states; known even when nothing is allocated */
    bool compute_seen;
    bool flash; /* flash attention runs, on the devices that the layers are on */
};

/* Clears `m` and lets the log lines of this thread go into it too; NULL: no more. */
void ic_meter_listen(struct ic_meter *m);
/* One line of llama.cpp's log, for whoever is listening on this thread. */
void ic_meter_line(const char *text);
/* The row of a kind of buffer; all zero when nothing was said about it. */
struct ic_meter_row ic_meter_row(const struct ic_meter *m, const char *name);

#endif
