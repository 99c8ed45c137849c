/* Which layers of a model go onto which GPU.
 *
 * llama.cpp places from the end: with n_gpu_layers = k the output is the first of the k, then come the last
 * layers; a layer's cache lies where the layer does, embeddings always on the host. Over several devices
 * the k go in order, the output onto the last device. So there is one thing to choose, k, and where to cut.
 *
 * Pure arithmetic over numbers given to it; any thread. Sizes in bytes. */
#ifndef IC_TEXT_PLAN_H
#define IC_TEXT_PLAN_H

#include <stdbool.h>
#include <stdint.h>

#include "model/gguf.h"

#define IC_PLAN_DEVICES_MAX 16
#define IC_PLAN_LINE_MAX 256
#define IC_PLAN_TENSOR_PAD                                                                                 \
    256 /* what a tensor may lose to alignment on a device (CUDA 128, Vulkan up to 256) */

struct ic_plan_device {
    const char *name, *desc; /* borrowed */
    uint64_t total, free;    /* as found */
    uint64_t held;           /* of free: by other engines */
    uint64_t margin;         /* of free: for nobody */
    uint64_t context;        /* what the driver takes once something runs on the device */
    uint64_t compute;        /* buffers of a decode, when the device has any layer */
};

struct ic_plan_in {
    const char *what; /* how the table calls it; NULL: model */
    const struct ic_gguf_facts *facts;
    struct ic_gguf_kv kv;
    double kv_scale; /* measured size of the whole cache over that of the facts; 1: not measured */
    const struct ic_plan_device *devices;
    unsigned n_devices;
    int32_t exactly;                       /* so many layers, fit or not; < 0: as many as fit */
    int32_t at_most;                       /* layers; where `exactly` is < 0 */
    uint64_t host_compute, host_available; /* 0: unknown */
    bool measured;                         /* compute sizes come from llama.cpp itself */
};

/* What one device gets. */
struct ic_plan_share {
    int32_t first, layers; /* of the repeating layers; the output is not counted */
    bool output;
    uint64_t weights, kv, used; /* used: with context and compute; 0 when it gets nothing */
    int64_t left;               /* of what may be used; negative: over-committed */
};

struct ic_plan {
    int32_t layers, layers_max; /* in llama.cpp's count: the output is one */
    struct ic_plan_share device[IC_PLAN_DEVICES_MAX];
    float split[IC_PLAN_DEVICES_MAX]; /* llama.cpp's tensor_split: how many of the `layers` each device gets
                                       */
    uint64_t host_weights, host_kv, host_compute;
    bool fits;
};

/* n_devices <= IC_PLAN_DEVICES_MAX. */
void ic_plan_make(struct ic_plan *out, const struct ic_plan_in *in);

/* The table, line by line, each at most IC_PLAN_LINE_MAX with the NUL. */
void ic_plan_print(const struct ic_plan *p, const struct ic_plan_in *in,
                   void (*line)(void *arg, const char *text), void *arg);

/* "1.5 GiB", "320.0 MiB", "12 KiB" */
struct ic_bytes_text {
    char s[24];
};
struct ic_bytes_text ic_bytes_text(uint64_t bytes);

#endif
