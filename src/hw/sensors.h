/* Where temperatures and the other readings of the hardware come from. A source fills its part of a sample;
 * which sources there are is decided once, at the start (cli/serve.c), and tests bring their own.
 *
 * One thread at a time calls a source (the monitor's); reading may block for as long as a driver pleases.
 */
#ifndef IC_HW_SENSORS_H
#define IC_HW_SENSORS_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

#define IC_GPUS_MAX 16        /* devices of one machine that are read; further ones are left out */
#define IC_GPU_NAME_MAX 96    /* bytes with the NUL: NVML's own bound */
#define IC_TEMP_LOWEST (-40.) /* °C; what lies outside of these two is a broken sensor, and unknown */
#define IC_TEMP_HIGHEST 150.

/* Unknown: NAN in a double, -1 in a whole number, "" in a name. Laptop and virtual GPUs know few of these.
 */
struct ic_gpu_sample {
    char name[IC_GPU_NAME_MAX], uuid[IC_GPU_NAME_MAX];
    bool gone;                     /* was there and does not answer any more; the readings are unknown */
    double temp;                   /* °C */
    double slowdown_temp;          /* °C at which the hardware throttles by itself */
    double power_w, power_limit_w; /* watts; the limit in force */
    double fan_percent;            /* of its highest speed */
    double graphics_mhz, memory_mhz;
    double gpu_percent, memory_percent; /* of the last while, busy computing and busy with memory */
    int64_t memory_total, memory_used, memory_free; /* bytes */
    int64_t throttle; /* IC_THROTTLE_* and other bits of NVML's clocks throttle reasons */
};

/* Why the driver has lowered the clocks (NVML's bits). */
#define IC_THROTTLE_POWER_CAP 0x4 /* the power limit */
#define IC_THROTTLE_HW 0x8        /* hardware: heat, power brake or a bad supply */
#define IC_THROTTLE_HEAT 0x20     /* heat, by software */
#define IC_THROTTLE_HW_HEAT 0x40  /* heat, by hardware */
#define IC_THROTTLE_POWER_BRAKE 0x80
#define IC_THROTTLE_ANY                                                                                    \
    (IC_THROTTLE_POWER_CAP | IC_THROTTLE_HW | IC_THROTTLE_HEAT | IC_THROTTLE_HW_HEAT |                     \
     IC_THROTTLE_POWER_BRAKE)

struct ic_hw_sample {
    unsigned n_gpus;
    struct ic_gpu_sample gpu[IC_GPUS_MAX];
    double cpu_temp; /* °C, the hottest of the CPU's sensors */
};

/* What is to be read; GPUs are left alone where nobody asked, because reading some of them keeps them
 * awake. */
enum { IC_READ_GPU = 1, IC_READ_CPU = 2, IC_READ_ALL = 3 };

/* All unknown, no GPU. */
void ic_hw_sample_clear(struct ic_hw_sample *s);
/* All unknown but the names. */
void ic_gpu_sample_clear(struct ic_gpu_sample *g);
/* A temperature, or NAN when no sensor of sane mind could have said so. */
double ic_temp_checked(double celsius);

struct ic_sensor_source {
    void *arg;
    const char *name; /* for the log */
    int what;         /* IC_READ_*: what it can read */
    /* Writes the readings of `what` (a part of the source's own) into s, unknown where it has none, and
     * touches nothing else there. */
    void (*read)(void *arg, int what, struct ic_hw_sample *s);
    void (*close)(void *arg); /* frees arg */
};

/* Linux: /sys/class/hwmon (coretemp, k10temp, zenpower …), and where that has no CPU, the thermal zones of
 * one. `root` stands for "/sys" (copied). Sensors that come and go are found again. IC_OOM. */
enum ic_status ic_sensors_sysfs(struct ic_sensor_source *out, const char *root, struct ic_err *err);

/* For tests: a file of lines NAME=NUMBER, read anew each time: temp (GPU 0), slowdown, power, fan,
 * vram_total_mb, vram_used_mb, throttle, cpu. What it does not name, and all while it is missing, is
 * unknown. IC_OOM. */
enum ic_status ic_sensors_file(struct ic_sensor_source *out, const char *path, struct ic_err *err);

#endif
