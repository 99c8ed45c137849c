/* What the files of the Law M scheduler share: law_sched.c (groups, batches), law_commands.c, law_frames.c. Nobody else
 * includes it but their tests. */
#ifndef IC_SCHED_LAW_SCHED_INT_H
#define IC_SCHED_LAW_SCHED_INT_H

#include "base/clock.h"
#include "sched/law_sched.h"

/* rarer than once a year is as good as never, and never overflows */
#define PERIOD_MAX_NS (365LL * 86400 * 1000 * IC_MS)

struct sim {
    struct sim *next_all, *next; /* of all; in the line */
    struct group *g;
    uint64_t id, owner, rid;
    float *psi, *h, *c;
    struct ic_sim_opts o;
    int64_t step, left;   /* left 0: paused */
    int64_t ready_ns;     /* when it joined the line */
    int64_t due_ns;       /* not before, by its rate */
    int64_t frame_due_ns; /* when the next frame may come, by its fps */
    bool owes_frame;    /* one that the client must see could not be drawn: it has to take the earlier ones
                           first */
    int64_t metrics_ns; /* of the last metrics */
    size_t bytes;
    bool in_line, predict;
    struct ic_sim_credit *credit;
    struct ic_law_state *state; /* NULL: psi, h and c are all there is */
    bool stale;                 /* these are behind it, */
    int64_t stale_ns;           /* since then */
};

/* A frame on its way from a device. */
struct pending {
    struct sim *m;
    struct ic_event *ev; /* complete but for its pixels */
    int64_t due_ns;      /* the simulation's frame_due_ns before it */
};

struct group {
    struct group *next;
    struct ic_law_group *plan;
    unsigned law, users;        /* users: simulations on it */
    struct sim *head, **tail;   /* the line */
    unsigned waiting, predicts; /* in the line; of those, predictions */
    unsigned predict_peak;      /* predictions in the line at once, lately */
    int64_t peak_ns;
    float *delta; /* plan->max_n buffers of delta_stride() bytes: the last step's delta */
    int64_t used_ns;
    size_t shared; /* plan->shared_bytes, as counted */
};

struct ic_law_sched {
    const struct ic_law_stepper *st;
    struct ic_law_limits lim;
    struct ic_law_counters *c;
    struct sim *sims;
    struct group *groups;
    struct ic_law_io *io;
    struct sim **batch;
    unsigned n_batch; /* in the step under way */
    struct ic_law_draw *draws;
    struct pending *pending; /* of one plan; being gathered, then being copied */
    unsigned n_pending;
    bool copying;
    struct ic_law_group *pending_of;
    struct ic_view_ctx *views;
    double *scratch; /* for the largest d */
};

/* Nanoseconds between two steps or frames. */
static inline int64_t ic_sims_period(double per_second)
{
    double ns = 1e9 / per_second;
    return ns < PERIOD_MAX_NS ? (int64_t)ns : PERIOD_MAX_NS;
}

/* Of one simulation's delta in its group's buffer: back ends want them aligned, whatever the grid. */
static inline size_t ic_group_delta_stride(const struct ic_law_group *p)
{
    return (p->psi_bytes + IC_LAW_ALIGN - 1) / IC_LAW_ALIGN * IC_LAW_ALIGN;
}

static inline size_t ic_group_bytes(const struct group *g)
{
    return g->shared + g->plan->max_n * ic_group_delta_stride(g->plan);
}

/* law_frames.c: what is told of simulations, their states on a device, and frames */
void ic_sims_error(struct ic_law_sched *s, const struct ic_sim_cmd *cmd, const struct ic_err *err);
void ic_sim_emit(struct ic_law_sched *s, const struct sim *m, enum ic_event_kind kind, uint64_t rid,
                 const void *data, size_t len);
/* The last that is heard of it; it is freed before, so that whoever hears it finds its place free. */
void ic_sim_end(struct ic_law_sched *s, struct sim *m, enum ic_event_kind kind, uint64_t rid,
                const void *data, size_t len);
void ic_sim_tell(struct ic_law_sched *s, const struct sim *m, const struct ic_err *err);
void ic_sim_tell_loss(struct ic_law_sched *s, const struct sim *m, int64_t steps);
struct ic_law_shape ic_sims_shape(const struct group *g);
size_t ic_sims_extras_floats(unsigned extras, size_t cells);
bool ic_sim_is_behind(const struct sim *m);
struct ic_law_io ic_sim_io(const struct sim *m);
void ic_sim_go_back(struct ic_law_sched *s, struct sim *m, int64_t lost);
int64_t ic_sim_take_loss(struct ic_law_sched *s,
                         struct sim *m); /* steps that are lost since it was asked last */
void ic_sim_to_host(struct ic_law_sched *s,
                    struct sim *m); /* before psi, h and c are read or partly written */
void ic_sim_written(struct ic_law_sched *s, struct sim *m); /* after they were */
bool ic_sim_wants_delta(const struct sim *m);
bool ic_frame_is_due(const struct sim *m, int64_t now);
/* `place`: of the simulation in the batch that was stepped, -1: in none; `later`: a device may draw it beside the next step */
void ic_frame_emit(struct ic_law_sched *s, struct sim *m, int place, bool later);
void ic_frame_emit_last(struct ic_law_sched *s, struct sim *m, int place);
void ic_frames_draw(struct ic_law_sched *s); /* has the device begin with those that were gathered */
void ic_frames_send(struct ic_law_sched *s); /* sends those that it has drawn, waiting for it */

/* law_sched.c: groups, each with its plan and its line of simulations that wait for a step */
size_t ic_sims_room(const struct ic_law_sched *s); /* bytes that may still be taken */
enum ic_status ic_groups_get(struct ic_law_sched *s, unsigned law, unsigned height, unsigned width,
                             struct group **out, struct ic_err *err);
bool ic_groups_drop_unused(struct ic_law_sched *s);
void ic_line_join(struct sim *m, int64_t now);
void ic_line_leave(struct sim *m);

/* law_commands.c */
void ic_sim_free(struct ic_law_sched *s, struct sim *m);
void ic_sim_set_left(struct ic_law_sched *s, struct sim *m,
                     int64_t left); /* steps still to make; counted as running */

#endif
