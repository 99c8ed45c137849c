#include "sched/engine.h"

enum ic_watch_do ic_watch_next(struct ic_watch_state *w, int64_t beat, int64_t now, int64_t stall_ns)
{
    int64_t grace = stall_ns < IC_ABORT_GRACE_NS ? stall_ns : IC_ABORT_GRACE_NS;

    if (beat != w->beat) {
        if (w->beat)
            w->rebuilds = 0; /* it moved by itself: a rebuilding sets it to 0 */
        w->beat = beat;
        w->told_ns = 0;
    }
    if (beat == 0 || now - beat < stall_ns)
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
