/* What both engines have in common: their states, and the watch over their threads. */
#ifndef IC_SCHED_ENGINE_H
#define IC_SCHED_ENGINE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "hw/turn.h"

enum ic_engine_state {
    IC_ENGINE_LOADING,
    IC_ENGINE_READY,
    IC_ENGINE_DRAINING, /* what runs goes on, nothing new is taken */
    IC_ENGINE_FAILED,   /* see ic_text_engine_error, ic_law_engine_error */
    IC_ENGINE_STOPPED,
};

/* What ic_text_engine_watch and ic_law_engine_watch did about an engine that stands still. */
enum ic_watch {
    IC_WATCH_WELL,
    IC_WATCH_ABORTED, /* the tick was told to stop, and has a little time for it */
    IC_WATCH_REBUILT, /* its thread was left behind, a new one goes on */
    IC_WATCH_LOST     /* nothing more can be done in this process */
};
/* from being told to being left behind; the stall's limit where that is less */
#define IC_ABORT_GRACE_NS INT64_C(5000000000)
#define IC_REBUILDS_MAX 3 /* without a sign of life in between */

#define IC_LOOK_NS INT64_C(1000000000) /* from one look at an engine to the next */

/* The watch over one thread. One thread, about once a second. Where looks are further apart, the process did not run in
 * between (it was stopped, its container paused): that time is held against nobody. */
struct ic_watch_state {
    int64_t beat, told_ns; /* the last beat seen; since when it has been told to stop, 0: it has not */
    int64_t looked_ns;     /* the last look */
    int64_t away_ns;       /* since that beat, for how long the process did not run */
    int rebuilds;
};
enum ic_watch_do {
    IC_WATCH_DO_NOTHING,
    IC_WATCH_DO_ABORT,
    IC_WATCH_DO_WAIT,
    IC_WATCH_DO_REBUILD,
    IC_WATCH_DO_GIVE_UP
};
/* What to do about a thread whose last sign of life was at `beat` (0: it sleeps). ABORT comes once per stall, WAIT until
 * its grace is over, then REBUILD once, counted; after IC_REBUILDS_MAX of them without life in between, GIVE_UP. */
enum ic_watch_do ic_watch_next(struct ic_watch_state *w, int64_t beat, int64_t now, int64_t stall_ns);

/* Written by the engine and its watch, read by any thread at any time. */
struct ic_engine_health {
    _Atomic uint64_t aborted, rebuilt; /* ticks told to stop; engines built anew */
    _Atomic uint64_t unloaded, woken;  /* the model went away and came back */
    _Atomic double wake_s;             /* seconds it took to come back the last time */
    atomic_bool away;
};

/* One thread of an engine. There is one at a time that counts; one that hangs in its computing is left behind with all it
 * holds, for nobody can take that from it, and ends by itself should it ever come back. */
struct ic_life {
    void *engine;
    atomic_int where;
    atomic_bool abort; /* what is computed is to end */
};

/* Part of an engine. The first five are the engine's to fill before ic_worker_start. */
struct ic_worker {
    void *engine;
    void *(*main)(void *life);
    const char *name;     /* of the thread: a literal */
    const char *module;   /* of its log lines: a literal */
    struct ic_turn *turn; /* what it computes in; may be NULL */
    struct ic_life *life; /* changed by ic_worker_watch only, when the thread before is left behind */
    pthread_t thread;
    /* ic_now_ns of the last sign of life; 0: it sleeps, waits for its turn or loads */
    _Atomic int64_t beat;
    struct ic_watch_state watch;
    struct ic_engine_health health;
    bool lost; /* some were left behind: what they may still use must never be freed */
};

bool ic_worker_start(struct ic_worker *w); /* false: no memory or no thread */
/* Around what may hang, on the worker's thread; both return the time (ns). begin waits for the turn. A thread that has been
 * left behind does not come back from end: another has the scheduler, the turn and the name of the engine. `me`: w->life as
 * it was at begin. */
int64_t ic_worker_begin(struct ic_worker *w);
int64_t ic_worker_end(struct ic_worker *w, struct ic_life *me);
bool ic_life_left_behind(const struct ic_life *l);
/* What ic_text_engine_watch and ic_law_engine_watch do; same thread as ic_worker_start. */
enum ic_watch ic_worker_watch(struct ic_worker *w, int64_t now, int64_t stall_ns);

#endif
