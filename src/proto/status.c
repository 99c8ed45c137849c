/* What clients are told of the hardware: the `status` message when heat changes what the server does, and
 * the figures of the `metrics` message. Loop thread. */
#include "proto/internal.h"

#include <math.h>

#include "base/clock.h"
#include "ops/metrics.h"

static struct ic_thermal thermal(const struct ic_server *s)
{
    struct ic_thermal t = {.duty = 1, .temp = NAN};

    if (s->monitor)
        ic_governor_view(ic_monitor_governor(s->monitor), ic_now_ns(), &t);
    return t;
}

static void send_status(struct ic_server *s, struct conn *c, const struct ic_thermal *t)
{
    char why[IC_THERMAL_WHY_MAX];
    struct ic_buf *b;

    ic_thermal_why(t, why);
    if (c->dialect == DIALECT_ATHERIA) {
        ic_buf_clear(b = &s->out);
        ic_buf_puts(b, "{\"type\":\"notification\",\"payload\":{");
        ic_json_kstr(b, "status", t->state == IC_THERMAL_NORMAL ? "info" : "warning");
        ic_json_key(b, "message");
        ic_buf_printf(b, "\"%s%s%s\"", ic_thermal_name(t->state), *why ? ": " : "",
                      why); /* nothing to escape in it */
        ic_buf_puts(b, "}");
    } else {
        b = ic_reply(s, "status");
        ic_json_kstr(b, "state", ic_thermal_name(t->state));
        ic_json_kstr(b, "reason", *why ? why : NULL);
        ic_json_knum(b, "temp", t->temp);
        ic_json_knum(b, "duty", round(t->duty * 1000) / 1000);
    }
    ic_conn_send(s, c, 0);
}

void ic_status_hello(struct ic_server *s, struct conn *c)
{
    struct ic_thermal t = thermal(s);

    if (t.state == s->told &&
        t.state != IC_THERMAL_NORMAL) /* else ic_status_tick is about to tell everybody */
        send_status(s, c, &t);
}

void ic_status_tick(struct ic_server *s)
{
    struct ic_thermal t = thermal(s);

    if (t.state == s->told)
        return;
    s->told = t.state;
    for (unsigned i = 0; i < s->cfg.connections_max; i++)
        if (s->conns[i] && !s->conns[i]->doomed)
            send_status(s, s->conns[i], &t);
}

const char *ic_status_not_ready(const struct ic_server *s)
{
    return thermal(s).state == IC_THERMAL_PAUSED ? "too hot: paused until it has cooled down" : NULL;
}

static double mib(int64_t bytes)
{
    return bytes < 0 ? NAN : (double)(bytes >> 20);
}

static void put_gpu(struct ic_buf *b, const struct ic_gpu_sample *g, bool governed)
{
    ic_buf_puts(b, "{");
    ic_json_kstr(b, "name", g->name[0] ? g->name : NULL);
    ic_json_knum(b, "temp", g->temp); /* null where there is no reading, as all of these */
    ic_json_knum(b, "vram_total_mb", mib(g->memory_total));
    ic_json_knum(b, "vram_used_mb", mib(g->memory_used));
    ic_json_knum(b, "vram_free_mb", mib(g->memory_free));
    ic_json_knum(b, "power_watts", g->power_w);
    ic_json_knum(b, "power_limit_watts", g->power_limit_w);
    ic_json_knum(b, "fan_percent", g->fan_percent);
    ic_json_knum(b, "gpu_percent", g->gpu_percent);
    ic_json_knum(b, "memory_percent", g->memory_percent);
    ic_json_knum(b, "graphics_mhz", g->graphics_mhz);
    ic_json_knum(b, "memory_mhz", g->memory_mhz);
    if (g->throttle < 0 && !governed)
        ic_json_kstr(b, "throttling", NULL);
    else
        ic_json_kbool(b, "throttling", governed || (g->throttle & IC_THROTTLE_ANY));
    ic_buf_puts(b, "}");
}

void ic_status_put_hw(struct ic_server *s, struct ic_buf *b)
{
    struct ic_thermal t = thermal(s);
    struct ic_hw_view v;
    const struct ic_hw_sample *h = &v.sample;

    ic_hw_sample_clear(&v.sample);
    if (s->monitor)
        ic_monitor_view(s->monitor, &v);
    ic_json_key(b, "gpu");
    put_gpu(b, &h->gpu[0], t.state != IC_THERMAL_NORMAL);
    if (h->n_gpus > 1) {
        ic_json_key(b, "gpus");
        ic_buf_puts(b, "[");
        for (unsigned i = 0; i < h->n_gpus; i++) {
            if (i)
                ic_buf_puts(b, ",");
            put_gpu(b, &h->gpu[i], t.state != IC_THERMAL_NORMAL);
        }
        ic_buf_puts(b, "]");
    }
    ic_json_key(b, "cpu");
    ic_buf_puts(b, "{");
    ic_json_knum(b, "temp", h->cpu_temp);
    ic_buf_puts(b, "}");
    ic_json_key(b, "thermal");
    ic_buf_puts(b, "{");
    ic_json_kstr(b, "state", ic_thermal_name(t.state));
    ic_json_knum(b, "duty", round(t.duty * 1000) / 1000);
    ic_buf_puts(b, "}");
}

void ic_status_prom(struct ic_server *s, struct ic_buf *b)
{
    struct ic_thermal t = thermal(s);
    struct ic_hw_view v;

    if (!s->monitor)
        return;
    ic_monitor_ask(s->monitor);
    ic_monitor_view(s->monitor, &v);
    ic_prom_hw(b, &v, &t);
}

void ic_server_set_monitor(struct ic_server *s, struct ic_monitor *monitor)
{
    s->monitor = monitor;
}
