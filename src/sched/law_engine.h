/* The Law M engine: a thread that loads laws, owns them and every simulation, and runs the Law M scheduler
 * over a back end.
 *
 * Start and stop on one thread (main); command from any. */
#ifndef IC_SCHED_LAW_ENGINE_H
#define IC_SCHED_LAW_ENGINE_H

#include "hw/governor.h"
#include "hw/turn.h"
#include "sched/engine.h"
#include "sched/events.h"
#include "sched/law_sched.h"

#define IC_LAWS_MAX 64
#define IC_LAW_COMMANDS_MAX 65536 /* commands waiting for the engine; one more is IC_BUSY */

struct ic_ledger;

struct ic_law_engine_config {
    /* paths of checkpoints or their folders, separated by commas; must outlive the engine */
    const char *laws;
    const char *
        backend; /* "cpu", "ref", "cuda" … (law/plugin.h), or "auto": cuda where its plug-in is, else cpu */
    /* In what the laws' weights are kept: PRECISION or NAME=PRECISION, separated by commas (names:
     * law/policy.h, and nf4dq). A law takes the entries with its name, or else those without; the first is
     * its own, each other one is served beside it as NAME@PRECISION. NULL: as the file has it. */
    const char *precision;
    const char *policy; /* exceptions for layers (law/policy.h), under every precision but fp32; or NULL */
    /* limits.max_batch is the most; a plan's batch is as large as fits into half of what is left of the
     * memory where it will lie (a GPU's, by the ledger and less the margin, or the host's) and of the
     * host's for the states. */
    bool batch_auto;
    int threads; /* 0: the cores that are free */
    struct ic_law_limits limits;
    struct ic_ledger *ledger; /* of GPU memory, shared with the text engine, must outlive the engine; NULL:
                                 none is asked */
    uint64_t vram_margin;     /* bytes of a GPU that stay free */
    uint64_t vram_max;        /* bytes of it to use at most; 0: what is free */
    struct ic_turn *turn;     /* shared with the text engine, or NULL */
    struct ic_governor *governor; /* orders rests between batches; must outlive the engine, or NULL */
};

struct ic_law_engine;

/* Returns at once; loading goes on in the thread. `events` is borrowed and must outlive the engine. */
enum ic_status ic_law_engine_start(struct ic_law_engine **out, const struct ic_law_engine_config *cfg,
                                   struct ic_events *events, struct ic_err *err);
enum ic_engine_state ic_law_engine_state(const struct ic_law_engine *e);
const struct ic_err *ic_law_engine_error(const struct ic_law_engine *e); /* FAILED only */
struct ic_law_counters *ic_law_engine_counters(struct ic_law_engine *e);
int64_t ic_law_engine_beat(const struct ic_law_engine *e); /* as ic_text_engine_beat */
const struct ic_engine_health *ic_law_engine_health(const struct ic_law_engine *e);
/* As ic_text_engine_watch. A step cannot be told to stop: its simulations fail when it is left behind, the
 * others go on. */
enum ic_watch ic_law_engine_watch(struct ic_law_engine *e, int64_t now, int64_t stall_ns);

/* Laws; 0 until READY. They are immutable. */
unsigned ic_law_engine_count(const struct ic_law_engine *e);
const struct ic_law *ic_law_engine_law(const struct ic_law_engine *e, unsigned i);
/* Index of a law by name; -1: none. */
int ic_law_engine_find(const struct ic_law_engine *e, const char *name);
/* The precision that law i was asked for in, else what its file has. */
const char *ic_law_engine_precision(const struct ic_law_engine *e, unsigned i);
/* Index of law i as it is served in this precision; -1: it is not. */
int ic_law_engine_variant(const struct ic_law_engine *e, unsigned i, const char *precision);
/* BAD_REQUEST where precision or policy (as in the configuration) make no sense whatever the laws. */
enum ic_status ic_law_engine_check(const char *precision, const char *policy, struct ic_err *err);

/* Ends all simulations of an owner. Made (NULL: no memory) before the first of them, so that none can outlive its
 * connection for want of memory; owned by whoever made it until it is said, and freed by free(). */
struct ic_law_farewell;
struct ic_law_farewell *ic_law_farewell_new(uint64_t owner);
/* Takes it. */
void ic_law_engine_farewell(struct ic_law_engine *e, struct ic_law_farewell *f);

/* Copies the command and takes cmd->state on success. IC_BUSY, IC_UNAVAILABLE, IC_OOM: nothing is taken. */
enum ic_status ic_law_engine_command(struct ic_law_engine *e, const struct ic_sim_cmd *cmd,
                                     struct ic_err *err);

void ic_law_engine_stop(struct ic_law_engine **e);

#endif
