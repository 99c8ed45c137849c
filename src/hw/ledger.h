/* One ledger of GPU memory per process: who has taken how much of which device, and how much is left.
 *
 * Free memory alone does not say what may be taken: an engine that has planned has not yet allocated, and a
 * second one that looks then sees it all as free. So both engines plan with ic_ledger_room(), reserve what
 * they planned, item by item, and only then allocate; what is released may be taken again.
 *
 * Any thread. Device numbers are stable for the life of the ledger. */
#ifndef IC_HW_LEDGER_H
#define IC_HW_LEDGER_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

#define IC_LEDGER_DEVICES_MAX 16
#define IC_LEDGER_ITEMS_MAX 256

struct ic_ledger;

struct ic_ledger_device {
    char name[64];  /* the back end's: "CUDA0", "Vulkan1" */
    char desc[128]; /* the maker's */
    /* bytes; free as found when the device was entered, what this process holds included */
    uint64_t total, free;
    uint64_t margin; /* bytes of it that are never given out */
};

struct ic_ledger_item {
    int device;
    const char *owner; /* "text", "law": a literal */
    char what[64];     /* "weights of 12 layers" */
    uint64_t bytes;
};

/* IC_OOM. */
enum ic_status ic_ledger_open(struct ic_ledger **out, struct ic_err *err);
void ic_ledger_close(struct ic_ledger **l);

/* Enters a device, or renews what is known of it, and returns its number; -1: there are too many. d->free
 * is what is free right now. What is reserved meanwhile counts as allocated, but never makes the device
 * larger than it was. */
int ic_ledger_enter(struct ic_ledger *l, const struct ic_ledger_device *d);

/* Bytes that may still be reserved. */
uint64_t ic_ledger_room(struct ic_ledger *l, int device);
/* Likewise, and not more than is free right now (`free`, bytes, as the device tells) less the margin:
 * others may have come meanwhile, of whom the ledger does not know. */
uint64_t ic_ledger_room_now(struct ic_ledger *l, int device, uint64_t free);
/* Copies `what`; `owner` is kept as it is. Zero bytes are no item. IC_OOM: not that much room, or too many
 * items; nothing is taken. `force`: takes it all the same (somebody asked for exactly that). */
enum ic_status ic_ledger_reserve(struct ic_ledger *l, int device, const char *owner, const char *what,
                                 uint64_t bytes, bool force, struct ic_err *err);
/* Makes the owner hold `bytes` under this name in place of what it held there (at first nothing), in one
 * step. IC_OOM as above when that is more; nothing changes then. 0: the item goes. */
enum ic_status ic_ledger_resize(struct ic_ledger *l, int device, const char *owner, const char *what,
                                uint64_t bytes, struct ic_err *err);
/* Gives back all items of an owner. */
void ic_ledger_release(struct ic_ledger *l, const char *owner);

/* Copies of what there is; return the number, at most `max`. */
int ic_ledger_devices(struct ic_ledger *l, struct ic_ledger_device *out, int max);
int ic_ledger_items(struct ic_ledger *l, struct ic_ledger_item *out, int max);

/* Memory of this machine (of its cgroup, where that is less): bytes that can be had without pushing others
 * out, and all there is. False: unknown. */
bool ic_host_memory(uint64_t *available, uint64_t *total);

#endif
