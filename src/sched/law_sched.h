/* The Law M scheduler: every simulation of every client, stepped in batches.
 *
 * Simulations on the same law and grid share a plan and form a group. Whoever has a step to do waits in its
 * group's line; a batch takes the first of the line, at most `max_batch`, and each goes to the line's end
 * afterwards, so everybody gets its turn and batches are formed anew at every step. A batch that is not
 * full waits for company at most `batch_timeout_ns` after its first member came, and not at all when nobody
 * else could come in that time: neither a simulation held back by its rate, nor one of as many /predict
 * callers as were lately seen at once.
 *
 * A step that cannot be made, for want of memory, is told to everybody who has steps to do on that plan: an
 * ERROR with the step's code, then the STATUS of the simulation, which is paused where it was. The others
 * do not notice.
 *
 * Where states may stay on a device, psi, h and c of a simulation in host memory are a copy, brought up to
 * date when somebody needs it (a state that is asked for, a tool, a view or metrics that the CPU draws) and
 * at the latest IC_SIM_COPY_S after a step. When the device is lost, the simulations go on on the CPU from
 * these copies: each is told by an ERROR with IC_UNAVAILABLE how many steps it goes back, and a STATUS. A
 * run makes these steps again.
 *
 * Several steps are one call of a device as long as nobody in the batch wants a frame, a pause for its rate
 * or its end in between, and they take no longer than IC_SIM_SLICE_MS. Frames are drawn there and copied
 * while the next step is made; so a frame is sent when the next batch has begun, or nothing else is to do.
 *
 * Pure policy over a struct ic_law_stepper: no thread, no lock, no clock of its own. All calls on one
 * thread. */
#ifndef IC_SCHED_LAW_SCHED_H
#define IC_SCHED_LAW_SCHED_H

#include "base/hist.h"
#include "law/extras.h"
#include "law/init.h"
#include "law/plan.h"
#include "law/tools.h"
#include "law/views.h"
#include "sched/events.h"
#include "sched/request.h"

#define IC_SIM_FRAMES_IN_FLIGHT                                                                            \
    2                       /* frames of a simulation between engine and network; newer ones are skipped */
#define IC_SIM_COPY_S 1     /* the most that a lost device takes of a simulation's work, in seconds */
#define IC_SIM_SLICE_MS 20  /* of several steps in one call: what others in line may have to wait for */
#define IC_SIM_RATE_MAX 1e6 /* steps or frames per second */
#define IC_SIM_GAMMA_MAX 1e3
#define IC_SIM_STEPS_MAX 1000000000 /* of one run */
#define IC_PREDICT_MEMORY_S 2       /* how long the number of callers seen at once is believed */

/* A plan on a back end, with room for `max_n` simulations in one step. Owned by the stepper. */
struct ic_law_group {
    const struct ic_law *law;
    unsigned height, width, max_n;
    size_t psi_bytes, memory_bytes; /* of one simulation: psi; h and c together */
    size_t shared_bytes; /* host memory of the plan: arena and scratch, unless a GPU has them. `step` may
                            change it */
};

/* What the scheduler needs of the compute. The real one is law_engine.c. */
struct ic_law_stepper {
    void *arg;
    unsigned n_laws;
    const struct ic_law *(*law)(void *arg, unsigned i);
    /* Makes the group of a law on a grid; it lives until group_close. IC_OOM: with the scheduler's
     * max_batch buffers of psi_bytes and a first simulation it would take more than `room` bytes; then
     * nothing of that size has been allocated, for the sizes are a client's wish. */
    enum ic_status (*group_open)(void *arg, unsigned law, unsigned height, unsigned width,
                                 unsigned max_batch, size_t room, struct ic_law_group **out,
                                 struct ic_err *err);
    void (*group_close)(void *arg, struct ic_law_group *g);
    /* `steps` of them. On failure no step was made, and all states are as they were (but for what a lost
     * device took with it: state_lost); a later call may find what this one did not. IC_OOM: a GPU without
     * memory, and none for the CPU in its place. */
    enum ic_status (*step)(void *arg, struct ic_law_group *g, const struct ic_law_io *io, unsigned n,
                           unsigned steps, struct ic_err *err);
    /* The most simulations that one batch should have now (>= 1), for the sake of others who share the
     * cores. */
    unsigned (*batch_limit)(void *arg, struct ic_law_group *g);
    int64_t (*now_ns)(void *arg);
    void (*emit)(void *arg, struct ic_event *ev);        /* takes ev */
    void (*lost)(void *arg, const struct ic_lost *lost); /* there was no memory for an event */

    /* ---- States on a device, as the functions of struct ic_law_backend (law/plan.h) and law/fallback.h
     * with the same names; all NULL where there are none. ---- */
    enum ic_status (*state_open)(void *arg, struct ic_law_group *g, const struct ic_law_io *host,
                                 struct ic_law_state **out, struct ic_err *err);
    void (*state_close)(void *arg, struct ic_law_state **state);
    void (*state_put)(void *arg, struct ic_law_state *state, const struct ic_law_io *host);
    /* A failure shows in state_lost. */
    void (*state_get)(void *arg, struct ic_law_state *state, const struct ic_law_io *host);
    uint64_t (*state_lost)(void *arg, struct ic_law_state *state);
    uint64_t (*state_abandon)(void *arg, struct ic_law_state **state);
    /* Begins the step that `step` with the same arguments will complete. */
    void (*start)(void *arg, struct ic_law_group *g, const struct ic_law_io *io, unsigned n,
                  unsigned steps);
    /* How many steps of n simulations fit into `ns`; at least 1, and 1 where steps are made one by one. */
    unsigned (*steps_in)(void *arg, struct ic_law_group *g, unsigned n, int64_t ns);
    enum ic_status (*draw)(void *arg, struct ic_law_group *g, const struct ic_law_draw *draws, unsigned n);
    enum ic_status (*frame)(void *arg, struct ic_law_group *g, unsigned i, void *out, size_t size,
                            struct ic_view_frame *frame);
    void (*delta)(void *arg, struct ic_law_group *g, unsigned place, float *out);
};

struct ic_law_limits {
    unsigned max_batch;
    int64_t batch_timeout_ns;
    unsigned grid_max; /* cells on a side */
    unsigned sims_max; /* simulations in all, predictions under way included */
    size_t memory_max; /* bytes of host memory: all simulations' states and all groups */
    size_t frame_max;  /* bytes of one frame's pixels */
};

/* Read by other threads at any time. */
struct ic_law_counters {
    _Atomic int64_t sims, running, groups, state_bytes, shared_bytes;
    _Atomic uint64_t created, steps, batches, batched, frames, frames_skipped, predicts, refused;
    struct ic_hist batch, wait; /* one batch's compute; from readiness to the start of the batch */
};

/* What a client may set on a simulation; only fields whose bit is in `set` are looked at. */
enum {
    IC_SET_STEPS = 1,
    IC_SET_VIEW = 2,
    IC_SET_EVERY = 4,
    IC_SET_FPS = 8,
    IC_SET_ENCODING = 16,
    IC_SET_ROI = 32,
    IC_SET_METRICS = 64,
    IC_SET_GAMMA = 128,
    IC_SET_RATE = 256,
    IC_SET_FRAMES = 512,
    IC_SET_SEED = 1024,
    IC_SET_INIT = 2048,
    IC_SET_EXTRAS = 4096,
};
struct ic_sim_opts {
    unsigned set;
    int64_t steps; /* -1: until paused */
    enum ic_view view;
    int64_t every; /* a frame each so many steps, >= 1 */
    double fps;    /* frames a second at most; 0: no limit */
    double rate;   /* steps a second at most; 0: no limit */
    enum ic_view_encoding encoding;
    struct ic_view_roi roi;
    bool metrics;       /* with frames */
    int64_t metrics_ns; /* metrics: not more often than this; 0: with each frame */
    unsigned extras;    /* IC_EXTRA_*: arrays that follow a frame's pixels */
    bool frames;        /* frames at all */
    double gamma;
    uint64_t seed;
    enum ic_law_init_mode init;
};

/* One command; `owner`, `sim` and `id` come back with every event that it causes. */
struct ic_sim_cmd {
    enum ic_sim_op {
        IC_SIM_CREATE,
        IC_SIM_RUN,
        IC_SIM_PAUSE,
        IC_SIM_SET,
        IC_SIM_TOOL,
        IC_SIM_STATE,
        IC_SIM_RESET,
        IC_SIM_CLOSE,
        IC_SIM_PREDICT,
        IC_SIM_OWNER_GONE,
    } op;
    uint64_t owner, sim; /* sim: chosen by the protocol, unique in this process */
    uint64_t rid;        /* comes back as it is */
    struct ic_sim_opts opts;
    unsigned law, height, width; /* CREATE, PREDICT */
    float *state; /* CREATE, PREDICT: psi (owned, floats), or NULL: by opts.init. PREDICT of a law with
                     memory: psi, then h and c when state_floats says so */
    size_t state_floats;
    enum ic_law_tool tool;
    struct ic_law_tool_args tool_args;
};

struct ic_law_sched;

enum ic_status ic_law_sched_open(struct ic_law_sched **out, const struct ic_law_stepper *st,
                                 const struct ic_law_limits *limits, struct ic_law_counters *c,
                                 struct ic_err *err);
void ic_law_sched_close(struct ic_law_sched **s);

/* Carries a command out; takes cmd->state. Failures are told by an ERROR event. */
void ic_law_sched_command(struct ic_law_sched *s, struct ic_sim_cmd *cmd);

/* At most one batch. Returns when it wants to be called again at the latest, on the clock of the stepper: a
 * time not after now means at once, INT64_MAX that nothing happens without a command. */
int64_t ic_law_sched_tick(struct ic_law_sched *s);

/* The thread that is in `step` will not come back: called by the one that takes over, in its place. The
 * simulations of the batch fail with IC_INTERNAL and `why`, and are closed; the others go on from the
 * states they have in host memory (a device that hangs is not asked), on plans opened anew. What the step
 * may still write to is never freed. A grid that cannot be opened again loses its simulations too. IC_OOM:
 * nothing was done. */
enum ic_status ic_law_sched_lose_batch(struct ic_law_sched *s, const char *why);

#endif
