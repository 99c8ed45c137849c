/* NVML by dlopen.
 *
 * The declarations below are those of NVML's stable C ABI (exported, with these names and types, by every
 * driver since 2014; the _v2 names since 2012): plain ints, pointers and two small structs. Entry points
 * that a driver lacks are NULL, and what they would have said is unknown; only init, shutdown, count and
 * handle are indispensable.
 *
 *            read fails with "not supported", "no permission" …: that field is unknown, the others go on
 *   present ──read fails with "GPU is lost", "reset required", "not initialized"──► gone
 * ──IC_NVML_RETRY_S──► tried again ▲ │ └────────────────────────────────── handle and first reading succeed
 * ◄───────────────────────────────────┘
 *
 * A lost GPU stays lost for the NVML session that has seen it, so that trying again begins with shutdown
 * and init when no device is left; with others alive only the handle is asked for anew, which suffices
 * after a reset. */
#include "hw/nvml.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"

typedef int nvml_ret;                 /* nvmlReturn_t, an enum */
typedef struct nvml_device *nvml_dev; /* nvmlDevice_t, opaque */

enum {
    NVML_SUCCESS = 0,
    NVML_UNINITIALIZED = 1,
    NVML_INVALID_ARGUMENT = 2, /* also said of a handle that has gone stale */
    NVML_GPU_IS_LOST = 15,
    NVML_RESET_REQUIRED = 16,
};
#define NVML_TEMPERATURE_GPU 0
#define NVML_THRESHOLD_SLOWDOWN 1
#define NVML_CLOCK_GRAPHICS 0
#define NVML_CLOCK_MEM 2

struct nvml_utilization { /* nvmlUtilization_t: percent */
    unsigned gpu, memory;
};
struct nvml_memory { /* nvmlMemory_t: bytes */
    unsigned long long total, free, used;
};

/* X(field, symbol, arguments): the entry points. */
#define NVML_CALLS(X)                                                                                      \
    X(init, "nvmlInit_v2", (void))                                                                         \
    X(shutdown, "nvmlShutdown", (void))                                                                    \
    X(count, "nvmlDeviceGetCount_v2", (unsigned *))                                                        \
    X(handle, "nvmlDeviceGetHandleByIndex_v2", (unsigned, nvml_dev *))                                     \
    X(by_pci, "nvmlDeviceGetHandleByPciBusId_v2", (const char *, nvml_dev *))                              \
    X(name, "nvmlDeviceGetName", (nvml_dev, char *, unsigned))                                             \
    X(uuid, "nvmlDeviceGetUUID", (nvml_dev, char *, unsigned))                                             \
    X(temperature, "nvmlDeviceGetTemperature", (nvml_dev, int, unsigned *))                                \
    X(threshold, "nvmlDeviceGetTemperatureThreshold", (nvml_dev, int, unsigned *))                         \
    X(power, "nvmlDeviceGetPowerUsage", (nvml_dev, unsigned *))                                            \
    X(power_limit, "nvmlDeviceGetEnforcedPowerLimit", (nvml_dev, unsigned *))                              \
    X(fan, "nvmlDeviceGetFanSpeed", (nvml_dev, unsigned *))                                                \
    X(clock, "nvmlDeviceGetClockInfo", (nvml_dev, int, unsigned *))                                        \
    X(utilization, "nvmlDeviceGetUtilizationRates", (nvml_dev, struct nvml_utilization *))                 \
    X(memory, "nvmlDeviceGetMemoryInfo", (nvml_dev, struct nvml_memory *))                                 \
    X(throttle, "nvmlDeviceGetCurrentClocksThrottleReasons", (nvml_dev, unsigned long long *))

struct device {
    nvml_dev handle;
    bool gone;
    int64_t lost_ns; /* when it was last found to be gone */
};

struct nvml {
    void *lib;
#define X(field, symbol, args) nvml_ret(*field) args;
    NVML_CALLS(X)
#undef X
    bool up; /* between init and shutdown */
    unsigned n;
    struct device dev[IC_GPUS_MAX];
    int64_t (*now_ns)(void);
};

static bool means_lost(nvml_ret rc)
{
    return rc == NVML_GPU_IS_LOST || rc == NVML_RESET_REQUIRED || rc == NVML_UNINITIALIZED;
}

/* ---- one device --------------------------------------------------------------------------------- */

/* Notes the outcome of a call: true when its result counts. */
static bool good(struct nvml *n, unsigned i, nvml_ret rc)
{
    if (means_lost(rc) && !n->dev[i].gone) {
        n->dev[i].gone = true;
        n->dev[i].lost_ns = n->now_ns();
        ic_warn("hw", "GPU %u does not answer any more (NVML error %d); it is tried again every %d s", i,
                rc, IC_NVML_RETRY_S);
    }
    return rc == NVML_SUCCESS;
}

/* Asks `call` for an unsigned; unknown where the entry point is missing, the device gone, or the call
 * fails. */
#define ASK(n, i, call, ...)                                                                               \
    ((n)->call && !(n)->dev[i].gone && good(n, i, (n)->call((n)->dev[i].handle, __VA_ARGS__)))

static void read_identity(struct nvml *n, unsigned i, struct ic_gpu_sample *g)
{
    char text[IC_GPU_NAME_MAX];

    if (!g->name[0] && ASK(n, i, name, text, (unsigned)sizeof text)) {
        text[sizeof text - 1] = 0;
        memcpy(g->name, text, sizeof text);
    }
    if (!g->uuid[0] && ASK(n, i, uuid, text, (unsigned)sizeof text)) {
        text[sizeof text - 1] = 0;
        memcpy(g->uuid, text, sizeof text);
    }
}

static void read_device(struct nvml *n, unsigned i, struct ic_gpu_sample *g)
{
    struct nvml_utilization use;
    struct nvml_memory mem;
    unsigned long long reasons;
    unsigned v;

    read_identity(n, i, g);
    if (ASK(n, i, temperature, NVML_TEMPERATURE_GPU, &v))
        g->temp = ic_temp_checked(v);
    if (ASK(n, i, threshold, NVML_THRESHOLD_SLOWDOWN, &v))
        g->slowdown_temp = ic_temp_checked(v);
    if (ASK(n, i, power, &v))
        g->power_w = v / 1000.;
    if (ASK(n, i, power_limit, &v))
        g->power_limit_w = v / 1000.;
    if (ASK(n, i, fan, &v))
        g->fan_percent = v;
    if (ASK(n, i, clock, NVML_CLOCK_GRAPHICS, &v))
        g->graphics_mhz = v;
    if (ASK(n, i, clock, NVML_CLOCK_MEM, &v))
        g->memory_mhz = v;
    if (ASK(n, i, utilization, &use)) {
        g->gpu_percent = use.gpu;
        g->memory_percent = use.memory;
    }
    if (ASK(n, i, memory, &mem)) {
        g->memory_total = (int64_t)mem.total;
        g->memory_used = (int64_t)mem.used;
        g->memory_free = (int64_t)mem.free;
    }
    if (ASK(n, i, throttle, &reasons))
        g->throttle = (int64_t)(reasons & INT64_MAX);
    if (n->dev[i].gone) /* half a reading is none */
        ic_gpu_sample_clear(g);
}

/* ---- coming back -------------------------------------------------------------------------------- */

static bool get_handle(struct nvml *n, unsigned i)
{
    n->dev[i].gone = n->handle(i, &n->dev[i].handle) != NVML_SUCCESS;
    return !n->dev[i].gone;
}

static void try_again(struct nvml *n, struct ic_hw_sample *s)
{
    int64_t now = n->now_ns();
    bool any_alive = false, due = false;

    for (unsigned i = 0; i < n->n; i++) {
        any_alive |= !n->dev[i].gone;
        due |= n->dev[i].gone && now - n->dev[i].lost_ns >= IC_NVML_RETRY_S * 1000 * IC_MS;
    }
    if (!due)
        return;
    if (!any_alive) {
        if (n->up)
            n->shutdown();
        n->up = n->init() == NVML_SUCCESS;
    }
    for (unsigned i = 0; i < n->n; i++) {
        if (!n->dev[i].gone || (any_alive && now - n->dev[i].lost_ns < IC_NVML_RETRY_S * 1000 * IC_MS))
            continue;
        struct ic_gpu_sample probe = {0};
        bool back = n->up && get_handle(n, i);
        if (back) {
            unsigned v;
            nvml_ret rc =
                n->temperature ? n->temperature(n->dev[i].handle, NVML_TEMPERATURE_GPU, &v) : NVML_SUCCESS;
            back = !means_lost(rc) && rc != NVML_INVALID_ARGUMENT;
        }
        n->dev[i].gone = !back;
        n->dev[i].lost_ns = now;
        if (back) {
            s->gpu[i].name[0] = s->gpu[i].uuid[0] = 0; /* it may be another card */
            read_identity(n, i, &probe);
            ic_info("hw", "GPU %u (%s) answers again", i, probe.name);
        }
    }
}

/* ---- the source --------------------------------------------------------------------------------- */

static void nvml_read(void *arg, int what, struct ic_hw_sample *s)
{
    struct nvml *n = arg;

    if (!(what & IC_READ_GPU))
        return;
    try_again(n, s);
    s->n_gpus = n->n;
    for (unsigned i = 0; i < n->n; i++) {
        ic_gpu_sample_clear(&s->gpu[i]);
        if (!n->dev[i].gone)
            read_device(n, i, &s->gpu[i]);
        s->gpu[i].gone = n->dev[i].gone;
    }
}

static void nvml_close(void *arg)
{
    struct nvml *n = arg;

    if (!n)
        return;
    if (n->up)
        n->shutdown();
    if (n->lib)
        dlclose(n->lib);
    free(n);
}

static enum ic_status load(struct nvml *n, const char *library, struct ic_err *err)
{
    const char *name = library ? library : "libnvidia-ml.so.1";

    if (!(n->lib = dlopen(name, RTLD_NOW | RTLD_LOCAL)))
        return ic_fail(err, IC_NOT_FOUND, "%s", dlerror());
#define X(field, symbol, args) *(void **)&n->field = dlsym(n->lib, symbol);
    NVML_CALLS(X)
#undef X
    if (!n->init || !n->shutdown || !n->count || !n->handle)
        return ic_fail(err, IC_NOT_FOUND, "%s is not NVML", name);
    nvml_ret rc = n->init();
    if (rc != NVML_SUCCESS)
        return ic_fail(err, IC_NOT_FOUND,
                       "NVML does not start (error %d): no driver, or not for this process", rc);
    n->up = true;
    if ((rc = n->count(&n->n)) != NVML_SUCCESS || n->n == 0)
        return ic_fail(err, IC_NOT_FOUND, "NVML knows no device (error %d)", rc);
    if (n->n > IC_GPUS_MAX) {
        ic_warn("hw", "%u GPUs; only the first %d are watched", n->n, IC_GPUS_MAX);
        n->n = IC_GPUS_MAX;
    }
    for (unsigned i = 0; i < n->n; i++)
        if (!get_handle(n, i))
            n->dev[i].lost_ns = n->now_ns();
    return IC_OK;
}

enum ic_status ic_nvml_source(struct ic_sensor_source *out, const char *library, struct ic_err *err)
{
    struct nvml *n = calloc(1, sizeof *n);

    if (!n)
        return ic_fail(err, IC_OOM, "out of memory");
    n->now_ns = ic_now_ns;
    enum ic_status st = load(n, library, err);
    if (st != IC_OK) {
        nvml_close(n);
        return st;
    }
    *out = (struct ic_sensor_source){
        .arg = n, .name = "NVML", .what = IC_READ_GPU, .read = nvml_read, .close = nvml_close};
    return IC_OK;
}

void ic_nvml_set_clock(const struct ic_sensor_source *s, int64_t (*now_ns)(void))
{
    ((struct nvml *)s->arg)->now_ns = now_ns;
}

bool ic_nvml_free_memory(const char *library, const char *pci, uint64_t *bytes)
{
    struct nvml *n = calloc(1, sizeof *n);
    struct ic_err err;
    struct nvml_memory mem;
    nvml_dev dev;

    if (!n)
        return false;
    n->now_ns = ic_now_ns;
    bool ok = load(n, library, &err) == IC_OK && n->by_pci && n->memory &&
              n->by_pci(pci, &dev) == NVML_SUCCESS && n->memory(dev, &mem) == NVML_SUCCESS;
    nvml_close(n);
    if (ok)
        *bytes = mem.free;
    return ok;
}
