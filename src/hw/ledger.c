#include "hw/ledger.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct ic_ledger {
    pthread_mutex_t lock;
    struct ic_ledger_device device[IC_LEDGER_DEVICES_MAX];
    int n_devices;
    struct ic_ledger_item item[IC_LEDGER_ITEMS_MAX];
    int n_items;
};

enum ic_status ic_ledger_open(struct ic_ledger **out, struct ic_err *err)
{
    struct ic_ledger *l = calloc(1, sizeof *l);

    *out = l;
    if (!l)
        return ic_fail(err, IC_OOM, "out of memory");
    pthread_mutex_init(&l->lock, NULL);
    return IC_OK;
}

void ic_ledger_close(struct ic_ledger **lp)
{
    struct ic_ledger *l = *lp;

    if (!l)
        return;
    pthread_mutex_destroy(&l->lock);
    free(l);
    *lp = NULL;
}

static uint64_t reserved(const struct ic_ledger *l, int device)
{
    uint64_t sum = 0;

    for (int i = 0; i < l->n_items; i++)
        if (l->item[i].device == device)
            sum += l->item[i].bytes;
    return sum;
}

static uint64_t room(const struct ic_ledger *l, int device)
{
    const struct ic_ledger_device *d = &l->device[device];
    uint64_t taken = reserved(l, device) + d->margin;

    return d->free > taken ? d->free - taken : 0;
}

int ic_ledger_enter(struct ic_ledger *l, const struct ic_ledger_device *d)
{
    int i;

    pthread_mutex_lock(&l->lock);
    for (i = 0; i < l->n_devices && strcmp(l->device[i].name, d->name) != 0; i++)
        continue;
    if (i == IC_LEDGER_DEVICES_MAX) {
        i = -1;
    } else {
        uint64_t held = reserved(l, i), before = l->device[i].free;
        l->n_devices += i == l->n_devices;
        l->device[i] = *d;
        l->device[i].free += held;
        if (held && before < l->device[i].free)
            l->device[i].free = before;
    }
    pthread_mutex_unlock(&l->lock);
    return i;
}

uint64_t ic_ledger_room(struct ic_ledger *l, int device)
{
    pthread_mutex_lock(&l->lock);
    IC_ASSERT(device >= 0 && device < l->n_devices);
    uint64_t bytes = room(l, device);
    pthread_mutex_unlock(&l->lock);
    return bytes;
}

uint64_t ic_ledger_room_now(struct ic_ledger *l, int device, uint64_t free)
{
    pthread_mutex_lock(&l->lock);
    IC_ASSERT(device >= 0 && device < l->n_devices);
    uint64_t bytes = room(l, device), margin = l->device[device].margin;
    pthread_mutex_unlock(&l->lock);
    uint64_t now = free > margin ? free - margin : 0;
    return now < bytes ? now : bytes;
}

/* With the lock held. */
static enum ic_status reserve(struct ic_ledger *l, int device, const char *owner, const char *what,
                              uint64_t bytes, bool force, struct ic_err *err)
{
    IC_ASSERT(device >= 0 && device < l->n_devices);
    uint64_t left = room(l, device);
    if (bytes == 0)
        return IC_OK;
    if (bytes > left && !force)
        return ic_fail(err, IC_OOM, "%s: %" PRIu64 " MiB for %s, %" PRIu64 " MiB are left",
                       l->device[device].name, bytes >> 20, what, left >> 20);
    if (l->n_items == IC_LEDGER_ITEMS_MAX)
        return ic_fail(err, IC_OOM, "the ledger of GPU memory is full (%d items)", IC_LEDGER_ITEMS_MAX);
    struct ic_ledger_item *it = &l->item[l->n_items++];
    *it = (struct ic_ledger_item){.device = device, .owner = owner, .bytes = bytes};
    snprintf(it->what, sizeof it->what, "%s", what);
    return IC_OK;
}

enum ic_status ic_ledger_reserve(struct ic_ledger *l, int device, const char *owner, const char *what,
                                 uint64_t bytes, bool force, struct ic_err *err)
{
    pthread_mutex_lock(&l->lock);
    enum ic_status st = reserve(l, device, owner, what, bytes, force, err);
    pthread_mutex_unlock(&l->lock);
    return st;
}

enum ic_status ic_ledger_resize(struct ic_ledger *l, int device, const char *owner, const char *what,
                                uint64_t bytes, struct ic_err *err)
{
    struct ic_ledger_item old = {0};
    int i = 0;

    pthread_mutex_lock(&l->lock);
    while (i < l->n_items && (l->item[i].device != device || strcmp(l->item[i].owner, owner) != 0 ||
                              strcmp(l->item[i].what, what) != 0))
        i++;
    bool had = i < l->n_items;
    if (had) {
        old = l->item[i];
        l->item[i] = l->item[--l->n_items];
    }
    enum ic_status st = reserve(l, device, owner, what, bytes, had && bytes <= old.bytes, err);
    if (st != IC_OK && had)
        l->item[l->n_items++] = old;
    pthread_mutex_unlock(&l->lock);
    return st;
}

void ic_ledger_release(struct ic_ledger *l, const char *owner)
{
    int kept = 0;

    pthread_mutex_lock(&l->lock);
    for (int i = 0; i < l->n_items; i++)
        if (strcmp(l->item[i].owner, owner) != 0)
            l->item[kept++] = l->item[i];
    l->n_items = kept;
    pthread_mutex_unlock(&l->lock);
}

int ic_ledger_devices(struct ic_ledger *l, struct ic_ledger_device *out, int max)
{
    pthread_mutex_lock(&l->lock);
    int n = l->n_devices < max ? l->n_devices : max;
    memcpy(out, l->device, (size_t)n * sizeof *out);
    pthread_mutex_unlock(&l->lock);
    return n;
}

int ic_ledger_items(struct ic_ledger *l, struct ic_ledger_item *out, int max)
{
    pthread_mutex_lock(&l->lock);
    int n = l->n_items < max ? l->n_items : max;
    memcpy(out, l->item, (size_t)n * sizeof *out);
    pthread_mutex_unlock(&l->lock);
    return n;
}

/* ---- the host ----------------------------------------------------------------------------------- */

/* A file of one number. False: there is none, or it says "max". */
static bool read_number(const char *path, uint64_t *out)
{
    FILE *f = fopen(path, "re");
    bool ok = f && fscanf(f, "%" SCNu64, out) == 1;

    if (f)
        fclose(f);
    return ok;
}

/* The limit of our cgroup (version 2) and of those around it. */
static void cgroup_memory(uint64_t *available, uint64_t *total)
{
    char line[512], path[640], group[512] = "";
    FILE *f = fopen("/proc/self/cgroup", "re");
    uint64_t limit, used;

    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "0::%511[^\n]", group) == 1)
            break;
    if (f)
        fclose(f);
    while (*group == '/') {
        snprintf(path, sizeof path, "/sys/fs/cgroup%s/memory.max", group);
        if (read_number(path, &limit)) {
            snprintf(path, sizeof path, "/sys/fs/cgroup%s/memory.current", group);
            uint64_t left = read_number(path, &used) && used < limit ? limit - used : 0;
            *available = left < *available ? left : *available;
            *total = limit < *total ? limit : *total;
        }
        *strrchr(group, '/') = 0;
    }
}

bool ic_host_memory(uint64_t *available, uint64_t *total)
{
    char line[128];
    uint64_t kib;
    FILE *f = fopen("/proc/meminfo", "re");

    *available = *total = 0;
    while (f && fgets(line, sizeof line, f)) {
        if (sscanf(line, "MemTotal: %" SCNu64, &kib) == 1)
            *total = kib << 10;
        else if (sscanf(line, "MemAvailable: %" SCNu64, &kib) == 1)
            *available = kib << 10;
    }
    if (f)
        fclose(f);
    if (!*total || !*available)
        return false;
    cgroup_memory(available, total);
    return true;
}
