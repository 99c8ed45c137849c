/* The thermal governor: from temperatures to rests between ticks, so that the hardware neither throttles by
 * itself nor suffers.
 *
 * Every watched device (each GPU, the CPU) has a limit L and a critical temperature C, and goes through
 *
 *                    t >= L                       t >= C
 *      normal ─────────────────────► slow ─────────────────────► paused
 *        ▲                            │  ▲                         │
 *        └───────── t < L-3 ──────────┘  └── (never from paused)   │
 *        ▲                                                         │
 *        └──────────────────────── t < L-3 ────────────────────────┘
 *
 *   normal: engines compute without rest.
 *   slow:   of each piece of time a part is rested: IC_GOVERNOR_REST_LEAST up to L, rising evenly to
 *           IC_GOVERNOR_REST_MOST at L+5 (or C, where that is lower).
 *   paused: nothing is computed; cancels, deadlines and commands are obeyed all the same.
 *
 * The process is as its worst device is. More heat never means less rest: for two histories of
 * temperatures, the one that is hotter at all times has at all times the same state or a worse one, and no
 * less rest.
 *
 * A device that stops telling its temperature keeps its state for IC_GOVERNOR_BLIND_NS; then it runs free,
 * with a warning: a server that stands still for a broken sensor helps nobody, and the hardware has its own
 * last defence. */
#ifndef IC_HW_GOVERNOR_H
#define IC_HW_GOVERNOR_H

#include <pthread.h>

#include "hw/sensors.h"

#define IC_GOVERNOR_HYSTERESIS 3.0 /* °C below the limit at which a device is free again */
#define IC_GOVERNOR_RAMP 5.0       /* °C above the limit at which the rest is longest */
#define IC_GOVERNOR_CRITICAL 10.0  /* °C above the limit: critical, where nothing else is known */
#define IC_GOVERNOR_REST_LEAST 0.1 /* parts of the time that are rested */
#define IC_GOVERNOR_REST_MOST 0.8
#define IC_GOVERNOR_REST_MAX_NS (10 * 1000 * 1000000LL) /* one rest at most, however long the tick was */
#define IC_GOVERNOR_ASK_SLOW_NS (200 * 1000000LL) /* a rest is asked about again after this, while slow */
#define IC_GOVERNOR_ASK_PAUSED_NS (1000 * 1000000LL) /* … and while paused */
#define IC_GOVERNOR_BLIND_NS (10 * 1000 * 1000000LL) /* without a reading, until a device runs free */

enum ic_thermal_state { IC_THERMAL_NORMAL, IC_THERMAL_SLOW, IC_THERMAL_PAUSED };
const char *ic_thermal_name(enum ic_thermal_state st); /* "normal", "slow", "paused" */

struct ic_governor_config {
    double gpu_limit; /* °C; 0: GPUs are not governed */
    /* °C; 0: limit + 10, or the device's own slowdown temperature where that is lower */
    double gpu_critical;
    double cpu_limit; /* °C; 0: the CPU is not governed; it is critical at limit + 10 */
};

#define IC_DEVICE_CPU (-1) /* other devices are GPU 0 … */

/* How it stands. */
struct ic_thermal {
    enum ic_thermal_state state;
    double duty;        /* share of the time that may be computed: 1 normal, 0 paused */
    int device;         /* the worst: GPU index or IC_DEVICE_CPU; means nothing while normal */
    double temp, limit; /* °C, of that device; while normal, the temperature is the hottest GPU's, else the
                           CPU's; NAN */
    uint64_t changes[3]; /* transitions into each state */
    int64_t state_ns[3]; /* time spent in each */
    int64_t rest_ns;     /* rests ordered while slow */
};

struct ic_governor_device { /* the governor's own */
    enum ic_thermal_state state;
    double temp, limit, critical;
    int64_t seen_ns; /* the last good reading; 0: never */
    bool blind;      /* it has been silent for too long, and that has been said */
};

/* One mutex guards all; it is held for nanoseconds. */
struct ic_governor {
    pthread_mutex_t lock;
    struct ic_governor_config cfg;
    struct ic_governor_device gpu[IC_GPUS_MAX], cpu;
    unsigned n_gpus;
    struct ic_thermal now;
    int64_t updated_ns;    /* the last update; 0: none yet */
    int64_t rest_until_ns; /* while slow */
    int64_t worked_ns;     /* when somebody last computed; 0: never */
    bool stale_told;
    bool sleeping; /* the owner wants `poke` at the next work */
    void (*poke)(void *arg);
    void *poke_arg;
};

void ic_governor_init(struct ic_governor *g, const struct ic_governor_config *cfg);
void ic_governor_deinit(struct ic_governor *g);

/* Readings of `what` (IC_READ_*) in s, at `now` (ic_now_ns); the rest of s is not looked at. True when the
 * state has changed, which is also logged. One thread (the monitor's). */
bool ic_governor_update(struct ic_governor *g, const struct ic_hw_sample *s, int what, int64_t now);

/* For engines, after every decode or batch: `worked` ns of computing have just ended (0: nothing new).
 * Returns the ns from `now` that the caller is to rest before it computes again, and then to ask again with
 * worked 0; 0: go on. All engines share their rests: the process cools as one. `g` may be NULL. Any thread;
 * never blocks. */
int64_t ic_governor_pause_ns(struct ic_governor *g, int64_t worked, int64_t now);

/* How it stands at `now`. When the owner of the sensors has been silent for IC_GOVERNOR_BLIND_NS (a driver
 * that hangs), this is normal, as for the engines. Any thread. */
void ic_governor_view(struct ic_governor *g, int64_t now, struct ic_thermal *out);
/* Writes for people why it is slow or paused ("GPU 0 is at 83 °C, the limit is 80 °C"); "" while normal. */
#define IC_THERMAL_WHY_MAX 96
void ic_thermal_why(const struct ic_thermal *t, char why[IC_THERMAL_WHY_MAX]);

/* `poke` is called once (any thread, no lock held) at the next work after ic_governor_sleep, which the
 * owner calls before it goes to sleep; that returns false when there was work since `since`, and then
 * nothing is armed. */
void ic_governor_set_poke(struct ic_governor *g, void (*poke)(void *), void *arg);
bool ic_governor_sleep(struct ic_governor *g, int64_t since);

#endif
