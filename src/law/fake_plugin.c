/* A plug-in without a GPU, for tests: its back end "cuda" is the reference behind a device's manners. The
 * environment says what the device is like: FAKE_GPU_MIB=N   its memory, of which weights and plans take
 * their share (default 1024) FAKE_GPU_OOM=N   the Nth step finds no memory, once FAKE_ABI and FAKE_SYMBOL,
 * at compile time, make a plug-in that must be refused. */
#include <stdatomic.h>
#include <stdlib.h>

#include "law/plugin.h"

#ifndef FAKE_ABI
#define FAKE_ABI IC_LAW_PLUGIN_ABI
#endif
#ifndef FAKE_SYMBOL
#define FAKE_SYMBOL ic_law_plugin
#endif

static _Atomic size_t held; /* bytes */
static _Atomic long steps;

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

static size_t tensor_bytes(unsigned channels, unsigned height, unsigned width)
{
    return ic_law_backend_ref.tensor_bytes(channels, height, width);
}

static void unpack(struct ic_law_packed **packed)
{
    if (*packed)
        atomic_fetch_sub(&held, ic_law_backend_ref.packed_bytes(*packed));
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

static size_t packed_bytes(const struct ic_law_packed *packed)
{
    return ic_law_backend_ref.packed_bytes(packed);
}

static size_t exec_bytes(const struct ic_law_exec *exec)
{
    return ic_law_backend_ref.exec_bytes(exec);
}

static size_t exec_size(const struct ic_law_packed *packed, const struct ic_law_plan *plan)
{
    return ic_law_backend_ref.exec_size(packed, plan);
}

static enum ic_status open_exec(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                                struct ic_law_exec **out, struct ic_err *err)
{
    const size_t bytes = exec_size(packed, plan);
    enum ic_status st = take(bytes, err);

    *out = NULL;
    if (st == IC_OK && (st = ic_law_backend_ref.open(packed, plan, out, err)) != IC_OK)
        atomic_fetch_sub(&held, bytes);
    return st;
}

static void close_exec(struct ic_law_exec **exec)
{
    if (*exec)
        atomic_fetch_sub(&held, exec_bytes(*exec));
    ic_law_backend_ref.close(exec);
}

static enum ic_status run(struct ic_law_exec *exec, const struct ic_law_io *io, unsigned n, unsigned times,
                          struct ic_err *err)
{
    if (atomic_fetch_add(&steps, 1) + 1 == setting("FAKE_GPU_OOM", 0))
        return ic_fail(err, IC_OOM, "the fake GPU's memory is exhausted");
    for (unsigned i = 0; i < times; i++)
        ic_law_backend_ref.step(exec, io, n);
    return IC_OK;
}

static void step(struct ic_law_exec *exec, const struct ic_law_io *io, unsigned n)
{
    (void)run(exec, io, n, 1, NULL);
}

static const struct ic_law_backend backend = {
    .name = "cuda",
    .tensor_bytes = tensor_bytes,
    .pack = pack,
    .unpack = unpack,
    .packed_bytes = packed_bytes,
    .open = open_exec,
    .close = close_exec,
    .exec_bytes = exec_bytes,
    .step = step,
    .run = run,
    .exec_size = exec_size,
    .memory = memory,
};

__attribute__((visibility("default"))) extern const struct ic_law_plugin FAKE_SYMBOL;
const struct ic_law_plugin FAKE_SYMBOL = {
    .abi = FAKE_ABI,
    .backend_size = sizeof(struct ic_law_backend),
    .plan_size = sizeof(struct ic_law_plan),
    .law_size = sizeof(struct ic_law),
    .backends = {&backend},
};
