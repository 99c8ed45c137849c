#include "hw/governor.h"

#include <stdio.h>
#include <string.h>

#include "base/log.h"

const char *ic_thermal_name(enum ic_thermal_state st)
{
    static const char *const names[] = {"normal", "slow", "paused"};
    return names[st];
}

void ic_governor_init(struct ic_governor *g, const struct ic_governor_config *cfg)
{
    memset(g, 0, sizeof *g);
    pthread_mutex_init(&g->lock, NULL);
    g->cfg = *cfg;
    g->cpu.temp = NAN;
    for (unsigned i = 0; i < IC_GPUS_MAX; i++)
        g->gpu[i].temp = NAN;
    g->now = (struct ic_thermal){.duty = 1, .temp = NAN, .limit = NAN};
}

void ic_governor_deinit(struct ic_governor *g)
{
    pthread_mutex_destroy(&g->lock);
}

void ic_governor_set_poke(struct ic_governor *g, void (*poke)(void *), void *arg)
{
    pthread_mutex_lock(&g->lock);
    g->poke = poke;
    g->poke_arg = arg;
    pthread_mutex_unlock(&g->lock);
}

bool ic_governor_sleep(struct ic_governor *g, int64_t since)
{
    pthread_mutex_lock(&g->lock);
    g->sleeping = g->worked_ns < since;
    bool armed = g->sleeping;
    pthread_mutex_unlock(&g->lock);
    return armed;
}

/* ---- one device --------------------------------------------------------------------------------- */

/* Limits of a GPU. One that slows itself down below our limit gets a lower limit, so that there is
 * something between going on and standing still. */
static void gpu_limits(const struct ic_governor_config *cfg, double slowdown, struct ic_governor_device *d)
{
    d->limit = cfg->gpu_limit;
    d->critical = cfg->gpu_critical;
    if (d->critical > 0)
        return;
    d->critical = cfg->gpu_limit + IC_GOVERNOR_CRITICAL;
    if (slowdown > 0 && slowdown < d->critical)
        d->critical = slowdown;
    if (d->limit > d->critical - IC_GOVERNOR_RAMP)
        d->limit = d->critical - IC_GOVERNOR_RAMP;
}

static void device_update(struct ic_governor_device *d, const char *what, unsigned i, double temp,
                          int64_t now)
{
    if (isnan(temp)) { /* what was last known counts for a while */
        if (d->seen_ns && !d->blind && now - d->seen_ns > IC_GOVERNOR_BLIND_NS) {
            ic_warn("hw", "%s %u has told no temperature for %lld s: it is not protected any more", what, i,
                    (long long)((now - d->seen_ns) / 1000000000));
            d->blind = true;
            d->state = IC_THERMAL_NORMAL;
            d->temp = NAN;
        }
        return;
    }
    d->temp = temp;
    if (d->blind)
        ic_info("hw", "%s %u tells its temperature again: %.0f °C", what, i, temp);
    d->blind = false;
    d->seen_ns = now;
    if (d->limit <= 0)
        d->state = IC_THERMAL_NORMAL;
    else if (temp >= d->critical)
        d->state = IC_THERMAL_PAUSED;
    else if (temp < d->limit - IC_GOVERNOR_HYSTERESIS)
        d->state = IC_THERMAL_NORMAL;
    else if (temp >= d->limit && d->state == IC_THERMAL_NORMAL)
        d->state = IC_THERMAL_SLOW;
}

/* The part of the time that this device wants rested. */
static double rest_part(const struct ic_governor_device *d)
{
    double top = d->critical < d->limit + IC_GOVERNOR_RAMP ? d->critical : d->limit + IC_GOVERNOR_RAMP, up;

    if (d->state != IC_THERMAL_SLOW)
        return d->state == IC_THERMAL_PAUSED ? 1 : 0;
    up = (d->temp - d->limit) / (top - d->limit);
    up = up < 0 ? 0 : up > 1 ? 1 : up;
    return IC_GOVERNOR_REST_LEAST + up * (IC_GOVERNOR_REST_MOST - IC_GOVERNOR_REST_LEAST);
}

/* ---- all of them -------------------------------------------------------------------------------- */

static void consider(struct ic_thermal *t, const struct ic_governor_device *d, int device)
{
    double duty = 1 - rest_part(d);

    if (duty < t->duty) {
        t->state = d->state;
        t->duty = duty;
        t->device = device;
        t->temp = d->temp;
        t->limit = d->limit;
    }
}

/* The worst of the devices. */
static void conclude(const struct ic_governor *g, struct ic_thermal *t)
{
    t->state = IC_THERMAL_NORMAL;
    t->duty = 1;
    t->device = IC_DEVICE_CPU;
    t->temp = NAN;
    t->limit = g->cfg.cpu_limit;
    for (unsigned i = 0; i < g->n_gpus; i++)
        if (!isnan(g->gpu[i].temp) && !(t->temp >= g->gpu[i].temp)) {
            t->device = (int)i;
            t->temp = g->gpu[i].temp;
            t->limit = g->gpu[i].limit;
        }
    if (isnan(t->temp))
        t->temp = g->cpu.temp;
    for (unsigned i = 0; i < g->n_gpus; i++)
        consider(t, &g->gpu[i], (int)i);
    consider(t, &g->cpu, IC_DEVICE_CPU);
}

void ic_thermal_why(const struct ic_thermal *t, char why[IC_THERMAL_WHY_MAX])
{
    char device[24] = "the CPU";

    why[0] = 0;
    if (t->state == IC_THERMAL_NORMAL)
        return;
    if (t->device != IC_DEVICE_CPU)
        snprintf(device, sizeof device, "GPU %d", t->device);
    snprintf(why, IC_THERMAL_WHY_MAX, "%s is at %.0f °C, the limit is %.0f °C", device, t->temp, t->limit);
}

static void log_change(const struct ic_thermal *t)
{
    char why[IC_THERMAL_WHY_MAX];

    ic_thermal_why(t, why);
    if (t->state == IC_THERMAL_NORMAL)
        ic_info("hw", "cool enough: at full speed again");
    else
        ic_warn("hw", "%s: %s", t->state == IC_THERMAL_SLOW ? "slowing down" : "pausing", why);
}

bool ic_governor_update(struct ic_governor *g, const struct ic_hw_sample *s, int what, int64_t now)
{
    pthread_mutex_lock(&g->lock);
    enum ic_thermal_state before = g->now.state;
    if (g->updated_ns)
        g->now.state_ns[before] += now - g->updated_ns;
    g->updated_ns = now;
    g->stale_told = false;
    if (what & IC_READ_GPU) {
        /* a device that is not in the sample any more is one that does not answer */
        g->n_gpus = s->n_gpus > g->n_gpus ? s->n_gpus : g->n_gpus;
        for (unsigned i = 0; i < g->n_gpus; i++) {
            const struct ic_gpu_sample *in = &s->gpu[i];
            if (!isnan(in->slowdown_temp) || !g->gpu[i].seen_ns)
                gpu_limits(&g->cfg, in->slowdown_temp, &g->gpu[i]);
            device_update(&g->gpu[i], "GPU", i, i < s->n_gpus ? in->temp : NAN, now);
        }
    }
    if (what & IC_READ_CPU) {
        g->cpu.limit = g->cfg.cpu_limit;
        g->cpu.critical = g->cfg.cpu_limit + IC_GOVERNOR_CRITICAL;
        device_update(&g->cpu, "CPU", 0, s->cpu_temp, now);
    }
    conclude(g, &g->now);
    bool changed = g->now.state != before;
    if (changed)
        g->now.changes[g->now.state]++;
    if (g->now.state != IC_THERMAL_SLOW)
        g->rest_until_ns = 0;
    struct ic_thermal t = g->now;
    pthread_mutex_unlock(&g->lock);
    if (changed)
        log_change(&t);
    return changed;
}

/* Under the lock: nobody has read the sensors for so long that what is known of them counts for nothing. */
static bool stale(const struct ic_governor *g, int64_t now)
{
    return g->now.state != IC_THERMAL_NORMAL && now - g->updated_ns > IC_GOVERNOR_BLIND_NS;
}

/* Under the lock: the work that has ended at `now` is paid for with rest. */
static void order_rest(struct ic_governor *g, int64_t worked, int64_t now)
{
    int64_t rest = (int64_t)((double)worked * (1 - g->now.duty) / g->now.duty);
    int64_t from = g->rest_until_ns > now ? g->rest_until_ns : now, most = now + IC_GOVERNOR_REST_MAX_NS;

    g->rest_until_ns = rest > most - from ? most : from + rest;
    g->now.rest_ns += g->rest_until_ns - from;
}

int64_t ic_governor_pause_ns(struct ic_governor *g, int64_t worked, int64_t now)
{
    void (*poke)(void *) = NULL;
    bool warn = false;
    int64_t rest = 0;

    if (!g)
        return 0;
    pthread_mutex_lock(&g->lock);
    if (worked > 0)
        g->worked_ns = now;
    if (worked > 0 && g->sleeping) {
        g->sleeping = false;
        poke = g->poke;
    }
    if (stale(g, now)) {
        warn = !g->stale_told;
        g->stale_told = true;
    } else if (g->now.state == IC_THERMAL_PAUSED) {
        rest = IC_GOVERNOR_ASK_PAUSED_NS;
    } else if (g->now.state == IC_THERMAL_SLOW) {
        if (worked > 0)
            order_rest(g, worked, now);
        rest = g->rest_until_ns - now;
        rest = rest < 0 ? 0 : rest > IC_GOVERNOR_ASK_SLOW_NS ? IC_GOVERNOR_ASK_SLOW_NS : rest;
    }
    pthread_mutex_unlock(&g->lock);
    if (poke)
        poke(g->poke_arg);
    if (warn)
        ic_warn("hw",
                "the sensors have not been read for %lld s (a driver that hangs?): the heat is not watched",
                (long long)(IC_GOVERNOR_BLIND_NS / 1000000000));
    return rest;
}

void ic_governor_view(struct ic_governor *g, int64_t now, struct ic_thermal *out)
{
    pthread_mutex_lock(&g->lock);
    *out = g->now;
    if (stale(g, now)) {
        out->state = IC_THERMAL_NORMAL;
        out->duty = 1;
        out->temp = NAN;
    }
    pthread_mutex_unlock(&g->lock);
}
