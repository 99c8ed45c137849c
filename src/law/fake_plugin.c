/* A plug-in without a GPU, for tests: its back end "cuda" is fake_device.h with a memory that ends.
 * The environment says what the device is like:
 *   FAKE_GPU_MIB=N    its memory, of which weights, plans and states take their share (default 1024)
 *   FAKE_GPU_OOM=N    the Nth call for steps finds no memory, once
 *   FAKE_GPU_LOST=N   the Nth call for steps, and all that is asked afterwards, finds no device
 *   FAKE_GPU_LOG=FILE what has happened is told there at the end of the process
 * FAKE_ABI and FAKE_SYMBOL, at compile time, make a plug-in that must be refused. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "law/fake_device.h"
#include "law/plugin.h"

#ifndef FAKE_ABI
#define FAKE_ABI IC_LAW_PLUGIN_ABI
#endif
#ifndef FAKE_SYMBOL
#define FAKE_SYMBOL ic_law_plugin
#endif

static _Atomic size_t held; /* bytes */

static long setting(const char *name, long otherwise)
{
    const char *v = getenv(name);
    return v ? strtol(v, NULL, 10) : otherwise;
}

static bool memory(uint64_t *bytes, uint64_t *total)
{
    const size_t in_use = atomic_load(&held);

    *total = (uint64_t)setting("FAKE_GPU_MIB", 1024) << 20;
    *bytes = *total > in_use ? *total - in_use : 0;
    return true;
}

static enum ic_status take(size_t bytes, struct ic_err *err)
{
    uint64_t left, total;

    memory(&left, &total);
    if (bytes > left)
        return ic_fail(err, IC_OOM, "the fake GPU's memory is exhausted");
    atomic_fetch_add(&held, bytes);
    return IC_OK;
}

static void give(size_t bytes)
{
    atomic_fetch_sub(&held, bytes);
}

static void unpack(struct ic_law_packed **packed)
{
    if (*packed)
        give(ic_law_backend_ref.packed_bytes(*packed));
    ic_law_backend_ref.unpack(packed);
}

static enum ic_status pack(const struct ic_law *law, unsigned threads, struct ic_law_packed **out,
                           struct ic_err *err)
{
    enum ic_status st = ic_law_backend_ref.pack(law, threads, out, err);

    if (st == IC_OK && (st = take(ic_law_backend_ref.packed_bytes(*out), err)) != IC_OK)
        ic_law_backend_ref.unpack(out);
    return st;
}

static enum ic_status open_exec(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                                struct ic_law_exec **out, struct ic_err *err)
{
    const size_t bytes = fake_exec_size(packed, plan);
    enum ic_status st = take(bytes, err);

    *out = NULL;
    if (st == IC_OK && (st = fake_open(packed, plan, out, err)) != IC_OK)
        give(bytes);
    return st;
}

static void close_exec(struct ic_law_exec **exec)
{
    if (*exec)
        give(fake_exec_bytes(*exec));
    fake_close(exec);
}

static enum ic_status open_state(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                                 const struct ic_law_io *host, struct ic_law_state **out,
                                 struct ic_err *err)
{
    const size_t bytes = ic_law_state_bytes(plan->law, plan->height, plan->width);
    enum ic_status st = take(bytes, err);

    *out = NULL;
    if (st == IC_OK && (st = fake_state_open(packed, plan, host, out, err)) != IC_OK)
        give(bytes);
    return st;
}

static void close_state(struct ic_law_state **state)
{
    if (*state)
        give((*state)->bytes);
    fake_state_close(state);
}

static struct ic_law_backend backend;

__attribute__((constructor)) static void make_backend(void)
{
    const long oom = setting("FAKE_GPU_OOM", 0), lost = setting("FAKE_GPU_LOST", 0);

    backend = fake_device_backend("cuda");
    backend.pack = pack;
    backend.unpack = unpack;
    backend.open = open_exec;
    backend.close = close_exec;
    backend.state_open = open_state;
    backend.state_close = close_state;
    backend.memory = memory;
    fake_device.fail_at = (unsigned long)(oom ? oom : lost);
    fake_device.fail_with = oom ? IC_OOM : IC_UNAVAILABLE;
}

__attribute__((destructor)) static void tell(void)
{
    const char *path = getenv("FAKE_GPU_LOG");
    FILE *f = path ? fopen(path, "w") : NULL;

    if (!f)
        return;
    fprintf(f,
            "{\"runs\":%lu,\"puts\":%lu,\"gets\":%lu,\"draws\":%lu,\"frames\":%lu,\"deltas\":%lu,"
            "\"held\":%zu}\n",
            fake_device.runs, fake_device.puts, fake_device.gets, fake_device.draws, fake_device.frames,
            fake_device.deltas, atomic_load(&held));
    fclose(f);
}

__attribute__((visibility("default"))) extern const struct ic_law_plugin FAKE_SYMBOL;
const struct ic_law_plugin FAKE_SYMBOL = {
    .abi = FAKE_ABI,
    .backend_size = sizeof(struct ic_law_backend),
    .plan_size = sizeof(struct ic_law_plan),
    .law_size = sizeof(struct ic_law),
    .backends = {&backend},
};
