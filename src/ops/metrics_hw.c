/* The hardware and the thermal governor in /metrics. A reading that there is not is left out, as Prometheus
 * wants it. */
#include "ops/metrics.h"

#include <math.h>

#include "base/clock.h"

static double known(int64_t v)
{
    return v < 0 ? NAN : (double)v;
}

/* X(value of g, metric, help) */
#define GPU_METRICS(X)                                                                                     \
    X(g->gone ? 0 : 1, "ic_gpu_up", "1 while the device answers")                                          \
    X(g->temp, "ic_gpu_temperature_celsius", "Temperature")                                                \
    X(g->slowdown_temp, "ic_gpu_slowdown_temperature_celsius",                                             \
      "Temperature at which the device throttles by itself")                                               \
    X(g->power_w, "ic_gpu_power_watts", "Power drawn")                                                     \
    X(g->power_limit_w, "ic_gpu_power_limit_watts", "Power limit in force")                                \
    X(g->fan_percent, "ic_gpu_fan_percent", "Fan speed in parts of its highest")                           \
    X(g->graphics_mhz * 1e6, "ic_gpu_graphics_clock_hertz", "Clock of the processors")                     \
    X(g->memory_mhz * 1e6, "ic_gpu_memory_clock_hertz", "Clock of the memory")                             \
    X(g->gpu_percent, "ic_gpu_utilization_percent", "Time during which something computed")                \
    X(g->memory_percent, "ic_gpu_memory_utilization_percent",                                              \
      "Time during which memory was read or written")                                                      \
    X(known(g->memory_total), "ic_gpu_memory_bytes", "Memory of the device")                               \
    X(known(g->memory_used), "ic_gpu_memory_used_bytes", "Memory in use, by anybody")                      \
    X(known(g->memory_free), "ic_gpu_memory_free_bytes", "Memory that is free")                            \
    X(known(g->throttle), "ic_gpu_throttle_reasons", "Bits of NVML's clocks throttle reasons")

static void head(struct ic_buf *b, const char *name, const char *type, const char *help)
{
    ic_buf_printf(b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static double gpu_value(const struct ic_gpu_sample *g, int which)
{
    int i = 0;
#define X(value, name, help)                                                                               \
    if (i++ == which)                                                                                      \
        return (value);
    GPU_METRICS(X)
#undef X
    return NAN;
}

static void put_gpus(struct ic_buf *b, const struct ic_hw_sample *s)
{
    static const struct {
        const char *name, *help;
    } rows[] = {
#define X(value, name, help) {name, help},
        GPU_METRICS(X)
#undef X
    };

    for (int r = 0; r < (int)(sizeof rows / sizeof *rows); r++) {
        bool any = false;
        for (unsigned i = 0; i < s->n_gpus; i++) {
            double v = gpu_value(&s->gpu[i], r);
            if (isnan(v))
                continue;
            if (!any)
                head(b, rows[r].name, "gauge", rows[r].help);
            any = true;
            ic_buf_printf(b, "%s{gpu=\"%u\"} %.17g\n", rows[r].name, i, v);
        }
    }
}

/* A label's value: bytes that would have to be escaped become '?'. */
static void put_label(struct ic_buf *b, const char *text)
{
    for (; *text; text++) {
        bool plain = *text >= ' ' && *text < 127 && *text != '"' && *text != '\\';
        ic_buf_put(b, plain ? text : "?", 1);
    }
}

static void put_names(struct ic_buf *b, const struct ic_hw_sample *s)
{
    if (s->n_gpus)
        head(b, "ic_gpu_info", "gauge", "Names of the devices");
    for (unsigned i = 0; i < s->n_gpus; i++) {
        ic_buf_printf(b, "ic_gpu_info{gpu=\"%u\",name=\"", i);
        put_label(b, s->gpu[i].name);
        ic_buf_puts(b, "\",uuid=\"");
        put_label(b, s->gpu[i].uuid);
        ic_buf_puts(b, "\"} 1\n");
    }
}

static void put_thermal(struct ic_buf *b, const struct ic_thermal *t)
{
    ic_prom_value(b, "ic_thermal_state", "gauge", "0 normal, 1 slow, 2 paused", t->state);
    ic_prom_value(b, "ic_thermal_duty", "gauge", "Share of the time that engines may compute", t->duty);
    head(b, "ic_thermal_transitions_total", "counter", "Changes of the thermal state, by the new one");
    for (int i = 0; i < 3; i++)
        ic_buf_printf(b, "ic_thermal_transitions_total{to=\"%s\"} %llu\n",
                      ic_thermal_name((enum ic_thermal_state)i), (unsigned long long)t->changes[i]);
    head(b, "ic_thermal_state_seconds_total", "counter",
         "Time spent in each thermal state, up to the last reading");
    for (int i = 0; i < 3; i++)
        ic_buf_printf(b, "ic_thermal_state_seconds_total{state=\"%s\"} %.3f\n",
                      ic_thermal_name((enum ic_thermal_state)i), (double)t->state_ns[i] * 1e-9);
    ic_prom_value(b, "ic_thermal_rest_seconds_total", "counter", "Rest ordered between ticks while slow",
                  (double)t->rest_ns * 1e-9);
}

void ic_prom_hw(struct ic_buf *b, const struct ic_hw_view *v, const struct ic_thermal *t)
{
    int64_t now = ic_now_ns();

    put_thermal(b, t);
    put_names(b, &v->sample);
    put_gpus(b, &v->sample);
    if (!isnan(v->sample.cpu_temp))
        ic_prom_value(b, "ic_cpu_temperature_celsius", "gauge", "The hottest sensor of the CPU",
                      v->sample.cpu_temp);
    if (v->gpu_ns && v->sample.n_gpus)
        ic_prom_value(b, "ic_gpu_reading_age_seconds", "gauge",
                      "Since the GPUs were read: not while nothing is to be done",
                      (double)(now - v->gpu_ns) * 1e-9);
    if (v->cpu_ns && !isnan(v->sample.cpu_temp))
        ic_prom_value(b, "ic_cpu_reading_age_seconds", "gauge", "Since the CPU's sensors were read",
                      (double)(now - v->cpu_ns) * 1e-9);
    ic_prom_value(b, "ic_hw_reads_total", "counter", "Readings of the sensors", (double)v->reads);
    ic_prom_value(b, "ic_hw_gpu_reads_total", "counter", "Readings that touched GPUs",
                  (double)v->gpu_reads);
}
