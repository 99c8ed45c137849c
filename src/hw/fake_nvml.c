/* A libnvidia-ml.so.1 that says what the test dictates. Without a test (the server run with --nvml-library)
 * it shows one device with plausible values. */
#include "hw/fake_nvml.h"

#include <stddef.h>
#include <stdio.h>

#define EXPORT __attribute__((visibility("default")))

EXPORT struct fake_nvml fake_nvml = {
    .n = 1,
    .gpu = {{.temp = 61,
             .slowdown = 99,
             .power_mw = 87500,
             .limit_mw = 120000,
             .fan = 43,
             .graphics = 1708,
             .memory_clock = 4004,
             .use = 97,
             .memory_use = 55,
             .total = 3ULL << 30,
             .used = 1ULL << 30}},
};

struct nvml_device {
    int index;
};
static struct nvml_device devices[FAKE_GPUS];
typedef struct nvml_device *dev;

static int about(dev d, int rc)
{
    fake_nvml.calls++;
    if (fake_nvml.gpu[d->index].lost_at && --fake_nvml.gpu[d->index].lost_at == 0)
        fake_nvml.gpu[d->index].rc = 15;
    return fake_nvml.gpu[d->index].rc ? fake_nvml.gpu[d->index].rc : rc;
}

EXPORT int nvmlInit_v2(void)
{
    fake_nvml.inits++;
    return fake_nvml.init_rc;
}

EXPORT int nvmlShutdown(void)
{
    fake_nvml.shutdowns++;
    return 0;
}

EXPORT int nvmlDeviceGetCount_v2(unsigned *n)
{
    *n = (unsigned)fake_nvml.n;
    return 0;
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned i, dev *out)
{
    devices[i].index = (int)i;
    *out = &devices[i];
    return fake_nvml.gpu[i].handle_rc;
}

/* Device i is at 0000:0i:00.0. */
EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char *pci, dev *out)
{
    unsigned bus;

    if (sscanf(pci, "0000:%2x:00.0", &bus) != 1 || (int)bus >= fake_nvml.n)
        return 6; /* NVML_ERROR_NOT_FOUND */
    return nvmlDeviceGetHandleByIndex_v2(bus, out);
}

EXPORT int nvmlDeviceGetName(dev d, char *name, unsigned len)
{
    snprintf(name, len, "Fake GPU %d", d->index);
    return about(d, fake_nvml.gpu[d->index].name_rc);
}

EXPORT int nvmlDeviceGetUUID(dev d, char *uuid, unsigned len)
{
    snprintf(uuid, len, "GPU-%08d", d->index);
    return about(d, 0);
}

/* X(symbol, value, code): calls that yield one unsigned. */
#define SIMPLE(X)                                                                                          \
    X(nvmlDeviceGetPowerUsage, power_mw, power_rc)                                                         \
    X(nvmlDeviceGetEnforcedPowerLimit, limit_mw, limit_rc)                                                 \
    X(nvmlDeviceGetFanSpeed, fan, fan_rc)
#define X(symbol, value, code)                                                                             \
    EXPORT int symbol(dev d, unsigned *out)                                                                \
    {                                                                                                      \
        *out = fake_nvml.gpu[d->index].value;                                                              \
        return about(d, fake_nvml.gpu[d->index].code);                                                     \
    }
SIMPLE(X)
#undef X

EXPORT int nvmlDeviceGetTemperature(dev d, int sensor, unsigned *out)
{
    *out = fake_nvml.gpu[d->index].temp;
    return about(d, sensor == 0 ? fake_nvml.gpu[d->index].temp_rc : 2);
}

EXPORT int nvmlDeviceGetTemperatureThreshold(dev d, int which, unsigned *out)
{
    *out = fake_nvml.gpu[d->index].slowdown;
    return about(d, which == 1 ? fake_nvml.gpu[d->index].threshold_rc : 2);
}

EXPORT int nvmlDeviceGetClockInfo(dev d, int which, unsigned *out)
{
    *out = which == 0 ? fake_nvml.gpu[d->index].graphics : fake_nvml.gpu[d->index].memory_clock;
    return about(d, which == 0 || which == 2 ? fake_nvml.gpu[d->index].clock_rc : 2);
}

EXPORT int nvmlDeviceGetUtilizationRates(dev d, unsigned out[2])
{
    out[0] = fake_nvml.gpu[d->index].use;
    out[1] = fake_nvml.gpu[d->index].memory_use;
    return about(d, fake_nvml.gpu[d->index].use_rc);
}

EXPORT int nvmlDeviceGetMemoryInfo(dev d, unsigned long long out[3])
{
    out[0] = fake_nvml.gpu[d->index].total;
    out[1] = fake_nvml.gpu[d->index].total - fake_nvml.gpu[d->index].used;
    out[2] = fake_nvml.gpu[d->index].used;
    return about(d, fake_nvml.gpu[d->index].mem_rc);
}

EXPORT int nvmlDeviceGetCurrentClocksThrottleReasons(dev d, unsigned long long *out)
{
    *out = fake_nvml.gpu[d->index].reasons;
    return about(d, fake_nvml.gpu[d->index].throttle_rc);
}
