/* The hardware monitor: a thread (ic-hw) that reads the sensors, keeps the last readings for whoever wants
 * to see them, and drives the thermal governor. Reading may block for as long as a driver likes, so nobody
 * else ever does it.
 *
 * It reads at most once in IC_MONITOR_PERIOD_NS, and only while somebody needs it:
 *   - an engine computes, the governor is not in its normal state, or a client watches the metrics:
 * everything;
 *   - otherwise nothing: the thread sleeps without a timer, and GPUs, which some drivers wake up to be
 * read, are not touched. Whoever then asks (/metrics) gets the last readings and causes a reading of the
 * CPU's sensors, at most once in IC_MONITOR_IDLE_NS. */
#ifndef IC_HW_MONITOR_H
#define IC_HW_MONITOR_H

#include "hw/governor.h"

#define IC_MONITOR_PERIOD_NS (1000 * 1000000LL)
#define IC_MONITOR_IDLE_NS (10 * 1000 * 1000000LL)
#define IC_MONITOR_LINGER_NS                                                                               \
    (2 * 1000 * 1000000LL) /* after the last decode or batch it still counts as busy */
#define IC_MONITOR_FRESH_NS                                                                                \
    (30 * 1000 * 1000000LL) /* older GPU readings are not shown: they say nothing about now */
#define IC_MONITOR_SOURCES_MAX 4

struct ic_monitor_config {
    struct ic_sensor_source sources[IC_MONITOR_SOURCES_MAX];
    unsigned n_sources;
    /* Adds sources to sources[0..n), on the monitor's thread and before its first reading: for those that
     * take their time to open, as NVML does. Returns how many there are then. NULL: there are none such. */
    unsigned (*add)(void *arg, struct ic_sensor_source *sources, unsigned n);
    void *add_arg; /* must outlive the monitor */
    struct ic_governor_config governor;
    int64_t period_ns; /* 0: IC_MONITOR_PERIOD_NS; tests are in a hurry */
    /* The thermal state has changed. Called on the monitor's thread, no lock held; NULL: nobody cares. */
    void (*changed)(void *arg);
    void *changed_arg;
};

struct ic_hw_view {
    struct ic_hw_sample sample; /* GPUs without figures when they are older than IC_MONITOR_FRESH_NS */
    int64_t gpu_ns, cpu_ns;     /* when (ic_now_ns) they were read; 0: never */
    uint64_t reads, gpu_reads;  /* of all sensors that were due, and those of them that touched GPUs */
};

struct ic_monitor;

/* Takes the sources: they are closed with the monitor, and also when this fails (IC_OOM). Reads everything
 * once, in its thread, and returns without waiting for that. */
enum ic_status ic_monitor_open(struct ic_monitor **out, const struct ic_monitor_config *cfg,
                               struct ic_err *err);
/* Joins the thread (a reading under way is waited for) and frees. No engine may use the governor any more.
 * Accepts *m == NULL. */
void ic_monitor_close(struct ic_monitor **m);

/* For engines; lives as long as the monitor. */
struct ic_governor *ic_monitor_governor(struct ic_monitor *m);

/* Any thread; none of these blocks for a sensor. */
void ic_monitor_watch(struct ic_monitor *m,
                      bool somebody);      /* clients watch the metrics, or none does any more */
void ic_monitor_ask(struct ic_monitor *m); /* somebody has looked once */
void ic_monitor_view(struct ic_monitor *m, struct ic_hw_view *out);

#endif
