/* The text engine: a thread that loads a model, owns it and runs the text scheduler over it.
 *
 * Start and stop on one thread (main); submit, close_session and kick from any. */
#ifndef IC_SCHED_TEXT_ENGINE_H
#define IC_SCHED_TEXT_ENGINE_H

#include "hw/governor.h"
#include "hw/turn.h"
#include "sched/engine.h"
#include "sched/events.h"
#include "sched/text_sched.h"
#include "text/model.h"

struct ic_text_engine_config {
    struct ic_text_config model;  /* strings must outlive the engine */
    int32_t queue_max;            /* requests waiting at once, one more is IC_BUSY */
    struct ic_text_policy policy; /* see text_sched.h */
    const char *cache_disk;       /* folder for KV that leaves host memory (spill_disk.h), or NULL */
    size_t cache_disk_max;        /* bytes of all files there */
    const char *prefix;           /* file that prompts will begin with, computed at start, or NULL */
    struct ic_turn *turn;         /* shared with other engines that compute on the CPU, or NULL */
    int64_t idle_unload_ns;       /* without work, until the model is unloaded; 0: never */
    void (*model_gone)(void *);   /* the engine's thread, after unloading; or NULL */
    void *model_gone_arg;
    struct ic_governor *governor; /* orders rests between decodes; must outlive the engine, or NULL */
};

struct ic_text_engine;

/* Returns at once; loading goes on in the thread, which calls events->wake when the state changes. `events` is
 * borrowed and must outlive the engine. Errors: no memory, or those of ic_spill_disk_open. */
enum ic_status ic_text_engine_start(struct ic_text_engine **out, const struct ic_text_engine_config *cfg,
                                    struct ic_events *events, struct ic_err *err);

enum ic_engine_state ic_text_engine_state(const struct ic_text_engine *e);
/* Why it FAILED; valid in that state only. */
const struct ic_err *ic_text_engine_error(const struct ic_text_engine *e);
/* Model facts; NULL until READY. */
const struct ic_text_info *ic_text_engine_info(const struct ic_text_engine *e);
/* For tokenising and pieces only, which go on while the model is away; NULL until READY and for moments of a rebuilding.
 * Not NULL: must be given back at once by the same thread, for the engine may wait for it. */
const struct ic_text_model *ic_text_engine_borrow(struct ic_text_engine *e);
void ic_text_engine_give_back(struct ic_text_engine *e);
struct ic_text_counters *ic_text_engine_counters(struct ic_text_engine *e);
/* Monotonic ns of the last sign of life of the thread; 0 while it sleeps for want of work, waits for another engine's
 * turn or loads the model. */
int64_t ic_text_engine_beat(const struct ic_text_engine *e);
const struct ic_engine_health *ic_text_engine_health(const struct ic_text_engine *e);
/* To be called about once a second by one thread, the one that stops the engine: what stands still for longer than
 * stall_ns is told to stop; what does not (soon) is left behind with its thread, and the engine goes on in a new thread
 * with a model opened anew. Only those who had rows in the decode fail (`internal`), the others are computed again. */
enum ic_watch ic_text_engine_watch(struct ic_text_engine *e, int64_t now, int64_t stall_ns);

/* Takes one reference on success: events follow. IC_BUSY: the queue is full. IC_UNAVAILABLE: not READY. On failure
 * the caller keeps its reference and no event follows. */
enum ic_status ic_text_engine_submit(struct ic_text_engine *e, struct ic_text_req *req, struct ic_err *err);
/* The conversation is over; requests of it end as aborted. */
void ic_text_engine_session_close(struct ic_text_engine *e, uint64_t session);
/* After setting a cancel flag: the engine looks at once instead of at its next tick. */
void ic_text_engine_kick(struct ic_text_engine *e);

/* Nothing new is taken from now on. Done when counters show nothing running and waiting. */
void ic_text_engine_drain(struct ic_text_engine *e);
/* Ends everything (`error` unavailable to whoever still waits) and joins the thread; a decode under way is
 * aborted where the backend can. Accepts NULL and *e == NULL. */
void ic_text_engine_stop(struct ic_text_engine **e);

#endif
