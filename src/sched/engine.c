#include "sched/engine.h"

#include <stdlib.h>

#include "base/clock.h"
#include "base/log.h"

enum { OUTSIDE, COMPUTING, LEFT_BEHIND };

enum ic_watch_do ic_watch_next(struct ic_watch_state *w, int64_t beat, int64_t now, int64_t stall_ns)
{
    int64_t grace = stall_ns < IC_ABORT_GRACE_NS ? stall_ns : IC_ABORT_GRACE_NS;
    int64_t from = beat > w->looked_ns ? beat : w->looked_ns;

    if (beat != w->beat) {
        if (w->beat)
            w->rebuilds = 0; /* it moved by itself: a rebuilding sets it to 0 */
        w->beat = beat;
        w->told_ns = w->away_ns = 0;
    }
    if (w->looked_ns && now - from > 2 * IC_LOOK_NS) {
        w->away_ns += now - from - IC_LOOK_NS;
        w->told_ns += w->told_ns ? now - from - IC_LOOK_NS : 0;
    }
    w->looked_ns = now;
    if (beat == 0 || now - beat - w->away_ns < stall_ns)
        return IC_WATCH_DO_NOTHING;
    if (!w->told_ns) {
        w->told_ns = now;
        return IC_WATCH_DO_ABORT;
    }
    if (now - w->told_ns < grace)
        return IC_WATCH_DO_WAIT;
    if (w->rebuilds == IC_REBUILDS_MAX)
        return IC_WATCH_DO_GIVE_UP;
    w->rebuilds++;
    w->told_ns = 0;
    w->beat = 0;
    return IC_WATCH_DO_REBUILD;
}

bool ic_worker_start(struct ic_worker *w)
{
    struct ic_life *l = calloc(1, sizeof *l);

    if (!l)
        return false;
    l->engine = w->engine;
    w->life = l;
    w->watch.looked_ns = ic_now_ns();
    if (pthread_create(&w->thread, NULL, w->main, l) != 0) {
        free(l);
        return false;
    }
    pthread_setname_np(w->thread, w->name);
    return true;
}

int64_t ic_worker_begin(struct ic_worker *w)
{
    atomic_store(&w->beat, 0); /* waiting for another engine is not standing still */
    ic_turn_take(w->turn);
    int64_t now = ic_now_ns();
    atomic_store(&w->life->abort, false);
    atomic_store(&w->life->where, COMPUTING);
    atomic_store(&w->beat, now);
    return now;
}

bool ic_life_left_behind(const struct ic_life *l)
{
    return atomic_load(&l->where) == LEFT_BEHIND;
}

int64_t ic_worker_end(struct ic_worker *w, struct ic_life *me)
{
    int was = COMPUTING;

    if (!atomic_compare_exchange_strong(&me->where, &was, OUTSIDE))
        pthread_exit(NULL);
    int64_t now = ic_now_ns();
    atomic_store(&w->beat, now);
    ic_turn_give(w->turn);
    return now;
}

enum ic_watch ic_worker_watch(struct ic_worker *w, int64_t now, int64_t stall_ns)
{
    int was = COMPUTING;

    switch (ic_watch_next(&w->watch, atomic_load(&w->beat), now, stall_ns)) {
    case IC_WATCH_DO_NOTHING: return IC_WATCH_WELL;
    case IC_WATCH_DO_WAIT: return IC_WATCH_ABORTED;
    case IC_WATCH_DO_ABORT:
        ic_error(w->module, "a tick has taken more than %.1f s: it is told to stop",
                 (double)stall_ns / 1e9);
        atomic_store(&w->life->abort, true);
        atomic_fetch_add(&w->health.aborted, 1);
        return IC_WATCH_ABORTED;
    case IC_WATCH_DO_REBUILD: break;
    default: return IC_WATCH_LOST;
    }
    if (!atomic_compare_exchange_strong(&w->life->where, &was, LEFT_BEHIND))
        return IC_WATCH_LOST;
    ic_error(w->module,
             "it did not stop: its thread is left behind with what it holds, and the engine built anew");
    pthread_detach(w->thread);
    atomic_store(&w->beat, 0);
    ic_turn_give(w->turn); /* it had it */
    w->lost = true;
    atomic_fetch_add(&w->health.rebuilt, 1);
    return ic_worker_start(w) ? IC_WATCH_REBUILT : IC_WATCH_LOST;
}
