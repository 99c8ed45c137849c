#include "ops/restart.h"

#include <string.h>

#include "base/exit.h"
#include "base/status.h"

void ic_restart_init(struct ic_restart *r, const struct ic_restart_config *cfg)
{
    IC_ASSERT(cfg->crashes >= 1 && cfg->crashes <= IC_RESTART_CRASHES_MAX && cfg->steps >= 1);
    *r = (struct ic_restart){.cfg = *cfg, .delay_ns = cfg->delay_min_ns, .retry_factor = 1};
}

void ic_restart_ready(struct ic_restart *r, int64_t now)
{
    if (!r->ready_ns)
        r->ready_ns = now;
}

static int64_t retry_at(const struct ic_restart *r)
{
    return r->step && r->cfg.retry_ns && !r->returning ? r->ready_ns + r->cfg.retry_ns * r->retry_factor
                                                       : INT64_MAX;
}

int64_t ic_restart_due(const struct ic_restart *r)
{
    if (!r->ready_ns)
        return INT64_MAX;
    return r->good ? retry_at(r) : r->ready_ns + r->cfg.good_ns;
}

enum ic_restart_news ic_restart_tick(struct ic_restart *r, int64_t now)
{
    if (now < ic_restart_due(r))
        return IC_RESTART_NOTHING;
    if (!r->good) {
        r->good = true;
        r->n_ends = 0;
        r->delay_ns = r->cfg.delay_min_ns;
        if (!r->step)
            r->retry_factor = 1;
        return IC_RESTART_GOOD;
    }
    r->returning = true;
    return IC_RESTART_RETURN;
}

/* Ends that still count, this one included. */
static int count(struct ic_restart *r, int64_t now)
{
    int kept = 0;

    for (int i = 0; i < r->n_ends; i++)
        if (now - r->ends[i] < r->cfg.within_ns)
            r->ends[kept++] = r->ends[i];
    if (kept == r->cfg.crashes) /* only on the last step; the oldest goes */
        memmove(r->ends, r->ends + 1, (size_t)--kept * sizeof *r->ends);
    r->ends[kept++] = now;
    r->n_ends = kept;
    return kept;
}

int64_t ic_restart_ended(struct ic_restart *r, int64_t now)
{
    bool returning = r->returning;

    r->restarts++;
    r->ready_ns = 0;
    r->good = r->returning = false;
    if (returning) { /* wanted */
        r->step = 0;
        r->n_ends = 0;
        r->delay_ns = r->cfg.delay_min_ns;
        if (r->retry_factor < IC_RESTART_RETRY_MAX)
            r->retry_factor *= 2;
        return 0;
    }
    if (count(r, now) >= r->cfg.crashes && r->step + 1 < r->cfg.steps) {
        r->step++;
        r->n_ends = 0;
        r->delay_ns = r->cfg.delay_min_ns;
    }
    int64_t delay = r->delay_ns;
    r->delay_ns = delay < r->cfg.delay_max_ns / 2 ? delay * 2 : r->cfg.delay_max_ns;
    return delay;
}

bool ic_restart_final(int exit_code, bool was_ready)
{
    switch (exit_code) {
    case IC_EXIT_OK:
    case IC_EXIT_USAGE: return true;
    case IC_EXIT_FILE: /* else it was there: somebody puts another in its place, or the disk comes back */
    case IC_EXIT_PORT: /* else somebody took it meanwhile, or the last process still has it */
        return !was_ready;
    default: return false;
    }
}
