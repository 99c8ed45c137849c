/* The Law M scheduler. See law_sched.h for the contract.
 *
 *   created (paused) ──run──► running ──steps done, pause──► paused
 *                                │
 *      a running one is, at any time, either in its group's line (ready) or held back by its rate (due
 * later)
 *
 * Frames: drawn right after the step that they show, when the simulation's client has taken the earlier
 * ones; a client that is behind costs nothing but skipped frames. Those that a device draws are `pending`
 * while they are copied: from the end of one batch until the next has begun, a command comes, or there is
 * nothing else to do. So a pending frame's simulation is always there.
 *
 * psi, h and c of a simulation with a `state` may be behind it (`stale`): to_host before they are read or
 * partly written, written after they were. */
#include "sched/law_sched.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

#define PREDICT_MEMORY_NS (IC_PREDICT_MEMORY_S * 1000 * IC_MS)
#define PERIOD_MAX_NS                                                                                      \
    (365LL * 86400 * 1000 * IC_MS) /* rarer than once a year is as good as never, and never overflows */
#define COPY_NS (IC_SIM_COPY_S * 1000 * IC_MS)
#define OWED_POLL_NS (2 * IC_MS) /* how often to look whether a client can take the frame it is owed */

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
static int64_t period_of(double per_second)
{
    double ns = 1e9 / per_second;
    return ns < PERIOD_MAX_NS ? (int64_t)ns : PERIOD_MAX_NS;
}

/* ---- events ------------------------------------------------------------------------------------- */

static struct ic_event *new_event(enum ic_event_kind kind, uint64_t owner, uint64_t rid, size_t len)
{
    struct ic_event *ev = calloc(1, sizeof *ev + len + 1);

    if (ev) {
        ev->kind = kind;
        ev->owner = owner;
        ev->rid = rid;
        ev->len = len;
    }
    return ev;
}

static void emit_error(struct ic_law_sched *s, const struct ic_sim_cmd *cmd, const struct ic_err *err)
{
    struct ic_event *ev = new_event(IC_EVENT_ERROR, cmd->owner, cmd->rid, strlen(err->msg));

    atomic_fetch_add(&s->c->refused, 1);
    if (!ev)
        return;
    memcpy(ev->text, err->msg, ev->len);
    ev->code = err->code;
    ev->sim.sim = cmd->sim;
    s->st->emit(s->st->arg, ev);
}

static void fill_info(const struct sim *m, struct ic_sim_info *i)
{
    const struct ic_law_group *p = m->g->plan;

    *i = (struct ic_sim_info){
        .sim = m->id,
        .law = m->g->law,
        .height = p->height,
        .width = p->width,
        .d = p->law->d,
        .step = m->step,
        .left = m->left,
        .running = m->left != 0,
        .gamma = m->o.gamma,
        .rate = m->o.rate,
        .fps = m->o.fps,
        .every = m->o.every,
        .seed = m->o.seed,
        .bytes = m->bytes,
        .view = {m->o.view, m->o.encoding, m->o.roi},
    };
}

static void emit_sim(struct ic_law_sched *s, const struct sim *m, enum ic_event_kind kind, uint64_t rid,
                     const void *data, size_t len)
{
    struct ic_event *ev = new_event(kind, m->owner, rid, len);

    if (!ev)
        return;
    if (len)
        memcpy(ev->text, data, len);
    fill_info(m, &ev->sim);
    s->st->emit(s->st->arg, ev);
}

static struct ic_law_shape shape_of(const struct group *g)
{
    return (struct ic_law_shape){g->plan->height, g->plan->width, g->plan->law->d};
}

static size_t extras_floats(unsigned extras, size_t cells)
{
    size_t n = 0;
    n += extras & IC_EXTRA_HSV ? 2 * cells : 0;
    n += extras & IC_EXTRA_COMPLEX ? 2 * cells : 0;
    n += extras & IC_EXTRA_FLOW ? 3 * cells : 0;
    n += extras & IC_EXTRA_ATTRACTOR ? 6 : 0;
    n += extras & IC_EXTRA_POINCARE ? 2 * (cells < IC_LAW_POINCARE_POINTS ? cells : IC_LAW_POINCARE_POINTS)
                                    : 0;
    return n;
}

/* Fills `out` in the order of the IC_EXTRA bits; returns the floats written. */
static size_t draw_extras(struct ic_law_sched *s, const struct sim *m, const float *delta, float *out,
                          size_t *n_poincare)
{
    struct ic_law_shape shape = shape_of(m->g);
    size_t cells = shape.h * shape.w, n = 0;
    unsigned extras = m->o.extras;

    if (extras & IC_EXTRA_HSV) {
        ic_law_extra_phase_hsv(m->psi, shape, out, out + cells);
        n += 2 * cells;
    }
    if (extras & IC_EXTRA_COMPLEX) {
        ic_law_extra_complex_3d(m->psi, shape, out + n, out + n + cells);
        n += 2 * cells;
    }
    if (extras & IC_EXTRA_FLOW) {
        ic_law_extra_flow(delta, shape, out + n, out + n + cells, out + n + 2 * cells);
        n += 3 * cells;
    }
    if (extras & IC_EXTRA_ATTRACTOR) {
        struct ic_law_attractor a;
        ic_law_extra_attractor(m->psi, shape, &a);
        for (int k = 0; k < 2; k++) {
            out[n++] = (float)a.channel[k].re;
            out[n++] = (float)a.channel[k].im;
            out[n++] = (float)a.channel[k].abs;
        }
    }
    if (extras & IC_EXTRA_POINCARE) {
        *n_poincare = ic_law_extra_poincare(m->psi, shape, IC_LAW_POINCARE_POINTS, out + n, s->scratch);
        n += 2 * *n_poincare;
    }
    return n;
}

static bool client_is_behind(const struct sim *m)
{
    return atomic_load(&m->credit->in_flight) >= IC_SIM_FRAMES_IN_FLIGHT;
}

/* ---- states on a device ------------------------------------------------------------------------- */

static struct ic_law_io io_of(const struct sim *m)
{
    return (struct ic_law_io){
        .psi = m->psi, .h = m->h, .c = m->c, .gamma = (float)m->o.gamma, .state = m->state};
}

static void tell(struct ic_law_sched *s, const struct sim *m, const struct ic_err *err)
{
    struct ic_sim_cmd about = {.owner = m->owner, .sim = m->id, .rid = m->rid};

    emit_error(s, &about, err);
}

/* The simulation has gone back by so many steps: m->step and m->left say so already. */
static void tell_loss(struct ic_law_sched *s, const struct sim *m, int64_t steps)
{
    struct ic_err err = {0};

    ic_fail(&err, IC_UNAVAILABLE,
            "the GPU was lost, and with it %lld steps: the simulation goes on from step %lld",
            (long long)steps, (long long)m->step);
    tell(s, m, &err);
    emit_sim(s, m, IC_EVENT_SIM_STATUS, 0, NULL, 0);
}

/* What was lost since it was last asked; a run that is under way makes these steps again. */
static void go_back(struct ic_law_sched *s, struct sim *m, int64_t lost)
{
    if (!lost)
        return;
    m->step -= lost;
    m->left += m->left > 0 ? lost : 0;
    tell_loss(s, m, lost);
}

static int64_t take_loss(struct ic_law_sched *s, struct sim *m)
{
    return m->state ? (int64_t)s->st->state_lost(s->st->arg, m->state) : 0;
}

/* psi, h and c are those of m->step afterwards; where the device is lost, m->step is theirs. */
static void to_host(struct ic_law_sched *s, struct sim *m)
{
    const struct ic_law_io io = io_of(m);

    if (!m->stale)
        return;
    s->st->state_get(s->st->arg, m->state, &io);
    m->stale = false;
    go_back(s, m, take_loss(s, m));
}

/* psi, h or c were written. */
static void written(struct ic_law_sched *s, struct sim *m)
{
    const struct ic_law_io io = io_of(m);

    m->stale = false;
    if (m->state)
        s->st->state_put(s->st->arg, m->state, &io);
}

/* ---- frames ------------------------------------------------------------------------------------- */

/* The earliest time of the next frame. On schedule, so that there are never more than `fps` in a second,
 * however the steps fall. */
static void plan_next_frame(struct sim *m, int64_t now)
{
    int64_t period = m->o.fps > 0 ? period_of(m->o.fps) : 0;
    int64_t due = m->frame_due_ns + period,
            latest = now + period + period / 10; /* frames out of turn do not add up */
    m->frame_due_ns = due <= now ? now + period : due < latest ? due : latest;
}

static bool metrics_are_due(const struct sim *m, int64_t now)
{
    return m->o.metrics && (!m->metrics_ns || now - m->metrics_ns >= m->o.metrics_ns);
}

/* Whether the device may draw it: what else travels with the frame is made from the host's copy. */
static bool device_draws(const struct ic_law_sched *s, const struct sim *m, int64_t now)
{
    return m->stale && s->st->draw && ic_view_of_one_cell(m->o.view) && !m->o.extras &&
           !metrics_are_due(m, now);
}

/* Whether a frame after this step may want its delta. */
static bool wants_delta(const struct sim *m)
{
    return m->o.frames && (ic_view_needs_delta(m->o.view) || m->o.extras & IC_EXTRA_FLOW || m->o.metrics);
}

static void send_frame(struct ic_law_sched *s, struct sim *m, struct ic_event *ev)
{
    atomic_fetch_add(&m->credit->refs, 1);
    atomic_fetch_add(&m->credit->in_flight, 1);
    ev->sim.credit = m->credit;
    atomic_fetch_add(&s->c->frames, 1);
    s->st->emit(s->st->arg, ev);
}

/* An event for a frame as it is now, with room for `extra` floats after its pixels; NULL: no memory. */
static struct ic_event *new_frame(struct ic_law_sched *s, struct sim *m, size_t extra)
{
    struct ic_view_request req = {m->o.view, m->o.encoding, m->o.roi};
    struct ic_view_frame frame;
    struct ic_event *ev = NULL;

    if (ic_view_plan(&req, shape_of(m->g), &frame, NULL) == IC_OK)
        ev = new_event(IC_EVENT_SIM_FRAME, m->owner, 0, frame.bytes + extra * sizeof(float));
    if (!ev)
        return NULL;
    fill_info(m, &ev->sim);
    ev->sim.frame = frame;
    ev->stamp_ns = s->st->now_ns(s->st->arg);
    return ev;
}

/* Draws what the client looks at on the CPU and sends it. `place`: in the step just made, for its delta;
 * -1: none. */
static void draw_here(struct ic_law_sched *s, struct sim *m, int place)
{
    struct ic_view_request req = {m->o.view, m->o.encoding, m->o.roi};
    struct ic_law_shape shape = shape_of(m->g);
    size_t extra = extras_floats(m->o.extras, shape.h * shape.w), n_poincare = 0;
    const int64_t before = m->step;
    float *extras = NULL, *delta = place >= 0 ? s->io[place].delta : NULL;

    if (delta && m->state)
        s->st->delta(s->st->arg, m->g->plan, (unsigned)place, delta);
    to_host(s, m);
    if (m->step != before)
        delta = NULL; /* of a step that is lost */
    struct ic_event *ev = new_frame(s, m, extra);
    if (!ev || (extra && !(extras = malloc(extra * sizeof *extras))) ||
        ic_view_render(s->views, &req, m->psi, delta, shape, ev->text, ev->sim.frame.bytes, &ev->sim.frame,
                       NULL) != IC_OK) {
        free(extras);
        free(ev);
        return;
    }
    plan_next_frame(m, ev->stamp_ns);
    if (extra) {
        extra = draw_extras(s, m, delta, extras, &n_poincare);
        memcpy(ev->text + ev->sim.frame.bytes, extras, extra * sizeof *extras);
        ev->len = ev->sim.frame.bytes + extra * sizeof *extras;
        ev->sim.extras = m->o.extras;
        ev->sim.n_poincare = n_poincare;
        free(extras);
    }
    if (metrics_are_due(m, ev->stamp_ns)) {
        m->metrics_ns = ev->stamp_ns;
        ev->sim.has_metrics =
            ic_law_metrics_compute(m->psi, delta, shape, 0, &ev->sim.metrics, NULL) == IC_OK;
    }
    send_frame(s, m, ev);
}

/* Takes the frames that the device draws and sends them. One that is lost with the device is owed. */
static void send_drawn(struct ic_law_sched *s)
{
    for (unsigned i = 0; s->copying && i < s->n_pending; i++) {
        struct pending *p = &s->pending[i];
        if (s->st->frame(s->st->arg, s->pending_of, i, p->ev->text, p->ev->sim.frame.bytes,
                         &p->ev->sim.frame) == IC_OK) {
            send_frame(s, p->m, p->ev);
        } else {
            p->m->owes_frame = true;
            free(p->ev);
        }
    }
    if (s->copying)
        s->n_pending = 0;
    s->copying = false;
}

/* Adds a frame to those that the device is to draw. False: no memory. */
static bool gather(struct ic_law_sched *s, struct sim *m, int place)
{
    struct ic_event *ev = new_frame(s, m, 0);

    if (!ev)
        return false;
    s->draws[s->n_pending] = (struct ic_law_draw){m->state, place, {m->o.view, m->o.encoding, m->o.roi}};
    s->pending[s->n_pending] = (struct pending){m, ev, m->frame_due_ns};
    s->n_pending++;
    s->pending_of = m->g->plan;
    plan_next_frame(m, ev->stamp_ns);
    return true;
}

/* Has the device draw what was gathered; what it cannot draw is drawn here. */
static void draw_gathered(struct ic_law_sched *s)
{
    if (!s->n_pending)
        return;
    s->copying = s->st->draw(s->st->arg, s->pending_of, s->draws, s->n_pending) == IC_OK;
    for (unsigned i = 0; !s->copying && i < s->n_pending; i++) {
        struct pending *p = &s->pending[i];
        free(p->ev);
        p->m->frame_due_ns = p->due_ns; /* planned anew */
        draw_here(s, p->m, s->draws[i].place);
    }
    s->n_pending = s->copying ? s->n_pending : 0;
}

/* Draws what the client looks at. `later`: it may come after the next step's beginning, and is gathered
 * with others; else it has been sent when this returns. */
static void emit_frame(struct ic_law_sched *s, struct sim *m, int place, bool later)
{
    const bool gathering = s->n_pending > 0 && !s->copying;

    if (client_is_behind(m)) {
        atomic_fetch_add(&s->c->frames_skipped, 1);
        return;
    }
    m->owes_frame = false;
    if (!device_draws(s, m, s->st->now_ns(s->st->arg)) || (!later && gathering)) {
        draw_here(s, m, place);
        return;
    }
    if (!later)
        send_drawn(s);
    if (gather(s, m, place) && !later) {
        draw_gathered(s);
        send_drawn(s);
    }
}

/* A frame that nothing newer would follow: drawn now, or as soon as the client has taken the earlier ones.
 */
static void emit_last_frame(struct ic_law_sched *s, struct sim *m, int place)
{
    m->owes_frame = true;
    if (!client_is_behind(m))
        emit_frame(s, m, place, false);
}

static bool frame_is_due(const struct sim *m, int64_t now)
{
    if (!m->o.frames || m->step % m->o.every != 0)
        return false;
    /* A tenth early is on time: a frame that misses by a hair would wait for a whole further step. */
    return m->o.fps <= 0 || now >= m->frame_due_ns - period_of(m->o.fps) / 10;
}

/* ---- groups ------------------------------------------------------------------------------------- */

static int64_t bytes_held(const struct ic_law_sched *s)
{
    return atomic_load(&s->c->state_bytes) + atomic_load(&s->c->shared_bytes);
}

/* Of one simulation's delta in its group's buffer: back ends want them aligned, whatever the grid. */
static size_t delta_stride(const struct ic_law_group *p)
{
    return (p->psi_bytes + IC_LAW_ALIGN - 1) / IC_LAW_ALIGN * IC_LAW_ALIGN;
}

static size_t group_bytes(const struct group *g)
{
    return g->shared + g->plan->max_n * delta_stride(g->plan);
}

/* A plan that has moved from a GPU to the CPU takes host memory that it did not. It is counted, even past
 * the limit: what runs goes on, and what comes new is refused. */
static void recount(struct ic_law_sched *s, struct group *g)
{
    atomic_fetch_add(&s->c->shared_bytes, (int64_t)g->plan->shared_bytes - (int64_t)g->shared);
    g->shared = g->plan->shared_bytes;
}

static void close_group(struct ic_law_sched *s, struct group *g)
{
    struct group **p = &s->groups;

    while (*p != g)
        p = &(*p)->next;
    *p = g->next;
    atomic_fetch_sub(&s->c->shared_bytes, (int64_t)group_bytes(g));
    atomic_fetch_sub(&s->c->groups, 1);
    s->st->group_close(s->st->arg, g->plan);
    free(g->delta);
    free(g);
}

/* Closes the plan that has been unused longest. False: there is none. */
static bool drop_unused_group(struct ic_law_sched *s)
{
    struct group *oldest = NULL;

    for (struct group *g = s->groups; g; g = g->next)
        if (!g->users && (!oldest || g->used_ns < oldest->used_ns))
            oldest = g;
    if (oldest)
        close_group(s, oldest);
    return oldest;
}

static size_t room(const struct ic_law_sched *s)
{
    size_t held = (size_t)bytes_held(s);
    return held < s->lim.memory_max ? s->lim.memory_max - held : 0;
}

/* Opens a plan within the memory that is left: unused plans make room for it, then its batch is made
 * smaller. */
static enum ic_status open_plan(struct ic_law_sched *s, unsigned law, unsigned height, unsigned width,
                                struct ic_law_group **out, struct ic_err *err)
{
    unsigned n = s->lim.max_batch;
    enum ic_status st;

    while ((st = s->st->group_open(s->st->arg, law, height, width, n, room(s), out, err)) == IC_OOM)
        if (!drop_unused_group(s) && (n /= 2) == 0)
            break;
    return st;
}

static enum ic_status get_group(struct ic_law_sched *s, unsigned law, unsigned height, unsigned width,
                                struct group **out, struct ic_err *err)
{
    struct ic_law_group *plan;
    enum ic_status st;

    for (struct group *g = s->groups; g; g = g->next)
        if (g->law == law && g->plan->height == height && g->plan->width == width) {
            *out = g;
            return IC_OK;
        }
    if ((st = open_plan(s, law, height, width, &plan, err)) != IC_OK)
        return st;
    struct group *g = calloc(1, sizeof *g);
    if (g) {
        g->plan = plan;
        g->shared = plan->shared_bytes;
        g->law = law;
        g->tail = &g->head;
        g->delta = aligned_alloc(IC_LAW_ALIGN, plan->max_n * delta_stride(plan));
    }
    if (!g || !g->delta) {
        free(g);
        s->st->group_close(s->st->arg, plan);
        return ic_fail(err, IC_OOM, "out of memory");
    }
    g->used_ns = s->st->now_ns(s->st->arg);
    g->next = s->groups;
    s->groups = g;
    atomic_fetch_add(&s->c->groups, 1);
    atomic_fetch_add(&s->c->shared_bytes, (int64_t)group_bytes(g));
    *out = g;
    return IC_OK;
}

static void join_line(struct sim *m, int64_t now)
{
    struct group *g = m->g;

    m->in_line = true;
    m->ready_ns = now;
    m->next = NULL;
    *g->tail = m;
    g->tail = &m->next;
    g->waiting++;
    g->predicts += m->predict;
    if (g->predicts >= g->predict_peak || now - g->peak_ns >= PREDICT_MEMORY_NS) {
        g->predict_peak = g->predicts;
        g->peak_ns = now;
    }
}

static void leave_line(struct sim *m)
{
    struct group *g = m->g;
    struct sim **p = &g->head;

    if (!m->in_line)
        return;
    while (*p != m)
        p = &(*p)->next;
    *p = m->next;
    if (!*p)
        g->tail = p;
    g->waiting--;
    g->predicts -= m->predict;
    m->in_line = false;
}

/* ---- simulations -------------------------------------------------------------------------------- */

static struct sim *find_sim(const struct ic_law_sched *s, uint64_t id, uint64_t owner)
{
    for (struct sim *m = s->sims; m; m = m->next_all)
        if (m->id == id)
            return m->owner == owner ? m : NULL;
    return NULL;
}

static void free_sim(struct ic_law_sched *s, struct sim *m)
{
    struct sim **p = &s->sims;

    leave_line(m);
    while (*p != m)
        p = &(*p)->next_all;
    *p = m->next_all;
    m->g->users--;
    m->g->used_ns = s->st->now_ns(s->st->arg);
    atomic_fetch_sub(&s->c->sims, 1);
    atomic_fetch_sub(&s->c->running, m->left != 0);
    atomic_fetch_sub(&s->c->state_bytes, (int64_t)m->bytes);
    ic_sim_credit_unref(m->credit);
    if (m->state)
        s->st->state_close(s->st->arg, &m->state);
    free(m->psi);
    free(m);
}

static void set_left(struct ic_law_sched *s, struct sim *m, int64_t left)
{
    atomic_fetch_add(&s->c->running, (left != 0) - (m->left != 0));
    m->left = left;
    if (left == 0)
        leave_line(m);
    else if (!m->in_line) {
        int64_t now = s->st->now_ns(s->st->arg);
        if (m->due_ns <= now)
            join_line(m, now);
    }
}

static enum ic_status check_grid(const struct ic_law_sched *s, const struct ic_sim_cmd *cmd,
                                 struct ic_err *err)
{
    if (cmd->law >= s->st->n_laws)
        return ic_fail(err, IC_NOT_FOUND, "no such law");
    unsigned m = s->st->law(s->st->arg, cmd->law)->grid_multiple;
    if (cmd->height < 1 || cmd->width < 1 || cmd->height > s->lim.grid_max || cmd->width > s->lim.grid_max)
        return ic_fail(err, IC_TOO_LARGE, "a grid side must be 1 to %u", s->lim.grid_max);
    if (cmd->height % m || cmd->width % m)
        return ic_fail(err, IC_BAD_REQUEST, "this law's grid sides must be multiples of %u", m);
    if (atomic_load(&s->c->sims) >= s->lim.sims_max)
        return ic_fail(err, IC_BUSY, "%u simulations are running already", s->lim.sims_max);
    return IC_OK;
}

static enum ic_status check_view(const struct ic_law_sched *s, const struct group *g,
                                 const struct ic_sim_opts *o, struct ic_err *err)
{
    struct ic_view_request req = {o->view, o->encoding, o->roi};
    struct ic_view_frame frame;
    enum ic_status st = ic_view_plan(&req, shape_of(g), &frame, err);

    frame.bytes += st == IC_OK
                       ? extras_floats(o->extras, (size_t)g->plan->height * g->plan->width) * sizeof(float)
                       : 0;
    if (st == IC_OK && o->frames && frame.bytes > s->lim.frame_max)
        return ic_fail(err, IC_TOO_LARGE,
                       "a frame of %zu bytes does not fit into an outbox of %zu: choose a region",
                       frame.bytes, s->lim.frame_max);
    return st;
}

/* Applies what a command sets. Nothing is changed on failure. */
static enum ic_status apply(const struct ic_law_sched *s, struct sim *m, const struct ic_sim_opts *n,
                            struct ic_err *err)
{
    struct ic_sim_opts o = m->o;

    if (n->set & IC_SET_VIEW)
        o.view = n->view;
    if (n->set & IC_SET_EVERY)
        o.every = n->every;
    if (n->set & IC_SET_FPS)
        o.fps = n->fps;
    if (n->set & IC_SET_RATE)
        o.rate = n->rate;
    if (n->set & IC_SET_ENCODING)
        o.encoding = n->encoding;
    if (n->set & IC_SET_ROI)
        o.roi = n->roi;
    if (n->set & IC_SET_METRICS) {
        o.metrics = n->metrics;
        o.metrics_ns = n->metrics_ns;
    }
    if (n->set & IC_SET_EXTRAS)
        o.extras = n->extras;
    if (n->set & IC_SET_FRAMES)
        o.frames = n->frames;
    if (n->set & IC_SET_GAMMA)
        o.gamma = n->gamma;
    if (n->set & IC_SET_SEED)
        o.seed = n->seed;
    if (n->set & IC_SET_INIT)
        o.init = n->init;
    enum ic_status st = check_view(s, m->g, &o, err);
    if (st != IC_OK)
        return st;
    m->o = o;
    if (n->set & (IC_SET_RATE | IC_SET_FPS)) { /* what was planned by the old ones holds no more */
        int64_t now = s->st->now_ns(s->st->arg);
        int64_t due = o.rate > 0 ? now + period_of(o.rate) : now;
        m->due_ns = m->due_ns < due ? m->due_ns : due;
        due = o.fps > 0 ? now + period_of(o.fps) : now;
        m->frame_due_ns = m->frame_due_ns < due ? m->frame_due_ns : due;
    }
    return IC_OK;
}

static enum ic_status alloc_sim(struct ic_law_sched *s, const struct ic_sim_cmd *cmd, struct sim **out,
                                struct ic_err *err)
{
    enum ic_status st = check_grid(s, cmd, err);
    struct group *g = NULL;

    if (st != IC_OK || (st = get_group(s, cmd->law, cmd->height, cmd->width, &g, err)) != IC_OK)
        return st;
    size_t bytes = g->plan->psi_bytes + g->plan->memory_bytes;
    g->users++; /* from here on it is not one of the unused ones */
    while (room(s) < bytes && drop_unused_group(s)) {
    }
    if (room(s) < bytes) {
        g->users--;
        return ic_fail(err, IC_OOM, "no room for a further simulation (see --law-memory)");
    }
    struct sim *m = calloc(1, sizeof *m);
    struct ic_sim_credit *credit = calloc(1, sizeof *credit);
    float *psi = aligned_alloc(IC_LAW_ALIGN, (bytes + IC_LAW_ALIGN - 1) / IC_LAW_ALIGN * IC_LAW_ALIGN);
    if (!m || !credit || !psi) {
        free(m);
        free(credit);
        free(psi);
        g->users--;
        return ic_fail(err, IC_OOM, "out of memory");
    }
    memset(psi, 0, bytes);
    atomic_init(&credit->refs, 1);
    const struct ic_law *law = g->plan->law;
    *m = (struct sim){
        .g = g,
        .id = cmd->sim,
        .owner = cmd->owner,
        .rid = cmd->rid,
        .psi = psi,
        .h = law->memory ? psi + g->plan->psi_bytes / sizeof *psi : NULL,
        .c = law->memory ? psi + (g->plan->psi_bytes + g->plan->memory_bytes / 2) / sizeof *psi : NULL,
        .bytes = bytes,
        .credit = credit,
        .o = {.view = IC_VIEW_PHASE, .every = 1, .frames = true, .gamma = (double)law->gamma},
        .next_all = s->sims,
    };
    s->sims = m;
    atomic_fetch_add(&s->c->sims, 1);
    atomic_fetch_add(&s->c->state_bytes, (int64_t)bytes);
    *out = m;
    /* A prediction is one step: its state does not stay anywhere. */
    const struct ic_law_io io = io_of(m);
    if (s->st->state_open && cmd->op != IC_SIM_PREDICT)
        return s->st->state_open(s->st->arg, g->plan, &io, &m->state, err);
    return IC_OK;
}

static enum ic_status fill_state(struct ic_law_sched *s, struct sim *m, struct ic_err *err)
{
    memset(m->psi, 0, m->bytes);
    enum ic_status st = ic_law_init_fill(m->psi, shape_of(m->g), m->o.init, m->o.seed, err);
    written(s, m);
    return st;
}

static enum ic_status take_state(struct ic_law_sched *s, struct sim *m, const struct ic_sim_cmd *cmd,
                                 struct ic_err *err)
{
    size_t psi = m->g->plan->psi_bytes / sizeof(float), all = m->bytes / sizeof(float);

    if (cmd->state_floats != psi && cmd->state_floats != all)
        return ic_fail(err, IC_BAD_REQUEST, "a state of this law and grid has %zu bytes, not %zu",
                       psi * sizeof(float), cmd->state_floats * sizeof(float));
    memcpy(m->psi, cmd->state, cmd->state_floats * sizeof(float));
    written(s, m);
    return IC_OK;
}

static void cmd_create(struct ic_law_sched *s, struct ic_sim_cmd *cmd)
{
    struct ic_err err = {0};
    struct sim *m = NULL;
    enum ic_status st = alloc_sim(s, cmd, &m, &err);

    if (st == IC_OK)
        st = apply(s, m, &cmd->opts, &err);
    if (st == IC_OK)
        st = cmd->state ? take_state(s, m, cmd, &err) : fill_state(s, m, &err);
    if (st != IC_OK) {
        emit_error(s, cmd, &err);
        if (m)
            free_sim(s, m);
        return;
    }
    atomic_fetch_add(&s->c->created, 1);
    m->step = 0;
    emit_sim(s, m, IC_EVENT_SIM_CREATED, cmd->rid, NULL, 0);
}

static void cmd_predict(struct ic_law_sched *s, struct ic_sim_cmd *cmd)
{
    struct ic_err err = {0};
    struct sim *m = NULL;
    enum ic_status st = alloc_sim(s, cmd, &m, &err);

    if (st == IC_OK)
        st = take_state(s, m, cmd, &err);
    if (st != IC_OK) {
        emit_error(s, cmd, &err);
        if (m)
            free_sim(s, m);
        return;
    }
    if (cmd->opts.set & IC_SET_GAMMA)
        m->o.gamma = cmd->opts.gamma;
    m->predict = true;
    atomic_fetch_add(&s->c->predicts, 1);
    set_left(s, m, 1);
}

static void cmd_run(struct ic_law_sched *s, struct sim *m, const struct ic_sim_cmd *cmd)
{
    m->due_ns = s->st->now_ns(s->st->arg);
    m->owes_frame = false;
    set_left(s, m, cmd->opts.set & IC_SET_STEPS ? cmd->opts.steps : -1);
}

static enum ic_status cmd_reset(struct ic_law_sched *s, struct sim *m, struct ic_err *err)
{
    enum ic_status st = fill_state(s, m, err);

    m->step = 0;
    return st;
}

static void close_owner(struct ic_law_sched *s, uint64_t owner)
{
    for (struct sim *m = s->sims, *next; m; m = next) {
        next = m->next_all;
        if (m->owner == owner)
            free_sim(s, m);
    }
}

/* Commands on a simulation that exists. */
static void control(struct ic_law_sched *s, struct sim *m, const struct ic_sim_cmd *cmd)
{
    struct ic_err err = {0};
    bool redraw = false;
    enum ic_status st = apply(s, m, &cmd->opts, &err);

    if (st == IC_OK)
        switch (cmd->op) {
        case IC_SIM_RUN: cmd_run(s, m, cmd); break;
        case IC_SIM_PAUSE: set_left(s, m, 0); break;
        case IC_SIM_SET:
            redraw = cmd->opts.set & (IC_SET_VIEW | IC_SET_ENCODING | IC_SET_ROI | IC_SET_FRAMES);
            break;
        case IC_SIM_RESET:
            st = cmd_reset(s, m, &err);
            redraw = true;
            break;
        case IC_SIM_TOOL:
            to_host(s, m);
            st = ic_law_tool_apply(m->psi, shape_of(m->g), cmd->tool, &cmd->tool_args, NULL, &err);
            written(s, m);
            redraw = true;
            break;
        case IC_SIM_STATE:
            if (m->bytes > s->lim.frame_max) { /* before it is copied: it could not be sent */
                st = ic_fail(&err, IC_TOO_LARGE, "a state of %zu bytes does not fit into an outbox of %zu",
                             m->bytes, s->lim.frame_max);
                break;
            }
            to_host(s, m);
            emit_sim(s, m, IC_EVENT_SIM_STATE, cmd->rid, m->psi, m->bytes);
            return;
        case IC_SIM_CLOSE:
            emit_sim(s, m, IC_EVENT_SIM_CLOSED, cmd->rid, NULL, 0);
            free_sim(s, m);
            return;
        default: IC_ASSERT(!"a command on a simulation");
        }
    if (st != IC_OK) {
        emit_error(s, cmd, &err);
        return;
    }
    m->rid = cmd->rid;
    emit_sim(s, m, IC_EVENT_SIM_STATUS, cmd->rid, NULL, 0);
    if (redraw && m->left == 0 && m->o.frames)
        emit_last_frame(s, m, -1);
}

void ic_law_sched_command(struct ic_law_sched *s, struct ic_sim_cmd *cmd)
{
    struct ic_err err = {0};
    struct sim *m;

    send_drawn(s);
    if (cmd->op == IC_SIM_CREATE)
        cmd_create(s, cmd);
    else if (cmd->op == IC_SIM_PREDICT)
        cmd_predict(s, cmd);
    else if (cmd->op == IC_SIM_OWNER_GONE)
        close_owner(s, cmd->owner);
    else if ((m = find_sim(s, cmd->sim, cmd->owner)) && !m->predict)
        control(s, m, cmd);
    else {
        ic_fail(&err, IC_NOT_FOUND, "no such simulation");
        emit_error(s, cmd, &err);
    }
    free(cmd->state);
    cmd->state = NULL;
}

/* ---- batches ------------------------------------------------------------------------------------ */

static unsigned batch_size(const struct ic_law_sched *s, const struct group *g)
{
    unsigned limit = s->st->batch_limit(s->st->arg, g->plan);
    return limit < 1 ? 1 : limit < g->plan->max_n ? limit : g->plan->max_n;
}

/* Until when it pays to wait for company for the line of g; 0: do not wait. */
static int64_t wait_until(const struct ic_law_sched *s, const struct group *g, int64_t now)
{
    int64_t first = g->head->ready_ns, limit = first + s->lim.batch_timeout_ns, until = 0;

    if (g->waiting >= batch_size(s, g))
        return 0;
    for (const struct sim *m = g->head; m; m = m->next)
        if (!m->predict && m->o.rate <= 0)
            return 0; /* one that runs as fast as it can is not slowed down for the sake of the others */
    if (g->predicts && g->predicts < g->predict_peak)
        until = limit;
    for (const struct sim *m = s->sims; m; m = m->next_all)
        if (m->g == g && m->left && !m->in_line && m->due_ns <= limit && m->due_ns > until)
            until = m->due_ns;
    return until > now ? until : 0;
}

/* Ends the wait of simulations whose time has come, draws the frames owed, and brings host copies up to
 * date that are old. Returns when the next one's time will have come. */
static int64_t release_due(struct ic_law_sched *s, int64_t now)
{
    int64_t next = INT64_MAX;

    for (struct sim *m = s->sims; m; m = m->next_all) {
        int64_t due = INT64_MAX;
        if (m->owes_frame && m->o.frames && client_is_behind(m))
            due = now + OWED_POLL_NS;
        else if (m->owes_frame && m->o.frames)
            emit_frame(s, m, -1, false);
        if (m->stale && m->stale_ns + COPY_NS <= now)
            to_host(s, m);
        else if (m->stale && m->stale_ns + COPY_NS < due)
            due = m->stale_ns + COPY_NS;
        if (m->left && !m->in_line) {
            if (m->due_ns <= now)
                join_line(m, now);
            else if (m->due_ns < due)
                due = m->due_ns;
        }
        next = due < next ? due : next;
    }
    return next;
}

/* The group whose first member has waited longest, of those that may go; *next is lowered to when another
 * may. */
static struct group *choose(const struct ic_law_sched *s, int64_t now, int64_t *next)
{
    struct group *best = NULL;

    for (struct group *g = s->groups; g; g = g->next) {
        if (!g->head)
            continue;
        int64_t until = wait_until(s, g, now);
        if (until) {
            if (until < *next)
                *next = until;
        } else if (!best || g->head->ready_ns < best->head->ready_ns) {
            best = g;
        }
    }
    return best;
}

static void after_step(struct ic_law_sched *s, struct sim *m, int place, unsigned steps, int64_t now)
{
    const int64_t lost = take_loss(s, m);

    m->step += steps - lost;
    if (m->left > 0)
        m->left += lost - steps;
    if (lost)
        tell_loss(s, m, lost);
    if (m->state) {
        m->stale_ns = m->stale && !lost ? m->stale_ns : now;
        m->stale = true;
    }
    if (m->predict) {
        atomic_fetch_sub(&s->c->running, 1);
        emit_sim(s, m, IC_EVENT_SIM_PREDICTED, m->rid, m->psi, m->bytes);
        free_sim(s, m);
        return;
    }
    if (m->left == 0 && m->o.frames)
        emit_last_frame(s, m, place);
    else if (frame_is_due(m, now))
        emit_frame(s, m, place, true);
    if (m->left == 0) {
        atomic_fetch_sub(&s->c->running, 1);
        emit_sim(s, m, IC_EVENT_SIM_STATUS, 0, NULL, 0);
    } else if (m->o.rate > 0) {
        int64_t period = period_of(m->o.rate);
        /* On schedule, without trying to catch up more than one step after a stall. */
        m->due_ns = m->due_ns + period > now - period ? m->due_ns + period : now;
        if (m->due_ns <= now)
            join_line(m, now);
    } else {
        join_line(m, now);
    }
}

/* Nobody on this plan can step: whoever wants to is told and pauses, with its state as it was; a prediction
 * is over. All at once, because one by one each would try in vain for memory that it takes a while to find
 * missing. */
static void step_failed(struct ic_law_sched *s, const struct group *g, const struct ic_err *err)
{
    for (struct sim *m = s->sims, *next; m; m = next) {
        next = m->next_all;
        if (m->g != g || m->left == 0)
            continue;
        go_back(s, m, take_loss(s, m));
        tell(s, m, err);
        if (m->predict) {
            free_sim(s, m);
            continue;
        }
        set_left(s, m, 0);
        emit_sim(s, m, IC_EVENT_SIM_STATUS, 0, NULL, 0);
    }
}

/* How many steps this one may make before anybody wants to look at it. */
static unsigned steps_alone(const struct ic_law_sched *s, const struct sim *m, unsigned n, int64_t now)
{
    int64_t most = UINT_MAX;

    if (m->predict || m->o.rate > 0)
        return 1;
    if (m->left > 0)
        most = m->left;
    if (m->o.frames) {
        /* the first step with a frame that is not before its time */
        int64_t wait = m->o.fps > 0 ? m->frame_due_ns - now : 0, next = m->step;
        if (wait > 0)
            next += s->st->steps_in(s->st->arg, m->g->plan, n, wait) - 1;
        next = (next / m->o.every + 1) * m->o.every;
        most = next - m->step < most ? next - m->step : most;
    }
    return (unsigned)(most < UINT_MAX ? most : UINT_MAX);
}

static unsigned steps_together(const struct ic_law_sched *s, struct group *g, unsigned n, int64_t now)
{
    unsigned most = 1;

    if (s->st->steps_in)
        most = s->st->steps_in(s->st->arg, g->plan, n, IC_SIM_SLICE_MS * IC_MS);
    for (unsigned i = 0; i < n && most > 1; i++) {
        const unsigned alone = steps_alone(s, s->batch[i], n, now);
        most = alone < most ? alone : most;
    }
    return most;
}

static void run_batch(struct ic_law_sched *s, struct group *g, int64_t now)
{
    unsigned n = 0, most = batch_size(s, g);
    struct ic_err err = {0};

    while (g->head && n < most) {
        struct sim *m = g->head;
        leave_line(m);
        ic_hist_add(&s->c->wait, now - m->ready_ns);
        s->io[n] = io_of(m);
        if (wants_delta(m))
            s->io[n].delta = (float *)(void *)((char *)g->delta + n * delta_stride(g->plan));
        s->batch[n++] = m;
    }
    const unsigned steps = steps_together(s, g, n, now);
    s->n_batch = n;
    if (s->st->start)
        s->st->start(s->st->arg, g->plan, s->io, n, steps);
    send_drawn(s); /* of the step before, while this one is made */
    enum ic_status st = s->st->step(s->st->arg, g->plan, s->io, n, steps, &err);
    s->n_batch = 0;
    recount(s, g);
    if (st != IC_OK) {
        step_failed(s, g, &err);
        return;
    }
    int64_t done = s->st->now_ns(s->st->arg);
    ic_hist_add(&s->c->batch, (done - now) / steps);
    atomic_fetch_add(&s->c->steps, (uint64_t)n * steps);
    atomic_fetch_add(&s->c->batches, steps);
    if (n > 1)
        atomic_fetch_add(&s->c->batched, (uint64_t)n * steps);
    for (unsigned i = 0; i < n; i++)
        after_step(s, s->batch[i], (int)i, steps, done);
    draw_gathered(s);
}

int64_t ic_law_sched_tick(struct ic_law_sched *s)
{
    int64_t now = s->st->now_ns(s->st->arg), next = release_due(s, now);
    struct group *g = choose(s, now, &next);

    if (!g) {
        send_drawn(s);
        return next;
    }
    run_batch(s, g, now);
    return now;
}

/* ---- a step that never ends --------------------------------------------------------------------- */

static void lose(struct ic_law_sched *s, struct sim *m, const struct ic_err *err)
{
    tell(s, m, err);
    if (!m->predict)
        emit_sim(s, m, IC_EVENT_SIM_CLOSED, 0, NULL, 0);
    free_sim(s, m);
}

/* A plan anew, and with it everything that the step before may still write to. */
static enum ic_status renew(struct ic_law_sched *s, struct group *g, struct ic_err *err)
{
    struct ic_law_group *plan;
    enum ic_status st = IC_OOM;

    for (unsigned n = s->lim.max_batch; n > 0 && st == IC_OOM; n /= 2)
        st = s->st->group_open(s->st->arg, g->law, g->plan->height, g->plan->width, n,
                               room(s) + group_bytes(g), &plan, err);
    if (st != IC_OK)
        return st;
    float *delta = aligned_alloc(IC_LAW_ALIGN, plan->max_n * delta_stride(plan));
    if (!delta) {
        s->st->group_close(s->st->arg, plan);
        return ic_fail(err, IC_OOM, "out of memory");
    }
    atomic_fetch_sub(&s->c->shared_bytes, (int64_t)group_bytes(g));
    g->plan = plan;
    g->shared = plan->shared_bytes;
    g->delta = delta;
    atomic_fetch_add(&s->c->shared_bytes, (int64_t)group_bytes(g));
    return IC_OK;
}

static enum ic_status reopen_states(struct ic_law_sched *s, struct group *g, struct ic_err *err)
{
    enum ic_status st = IC_OK;

    for (struct sim *m = s->sims; m && s->st->state_open && st == IC_OK; m = m->next_all) {
        const struct ic_law_io io = io_of(m);
        if (m->g == g && !m->predict)
            st = s->st->state_open(s->st->arg, g->plan, &io, &m->state, err);
    }
    return st;
}

enum ic_status ic_law_sched_lose_batch(struct ic_law_sched *s, const char *why)
{
    struct ic_law_io *io = calloc(s->lim.max_batch, sizeof *io);
    struct ic_err err = {0};

    if (!io)
        return IC_OOM;
    s->io = io;
    ic_fail(&err, IC_INTERNAL, "%s", why);
    for (unsigned i = 0; i < s->n_pending; i++)
        free(s->pending[i].ev);
    s->n_pending = 0;
    s->copying = false;
    for (unsigned i = 0; i < s->n_batch; i++) {
        s->batch[i]->psi = NULL; /* the step's */
        s->batch[i]->state = NULL;
        lose(s, s->batch[i], &err);
    }
    s->n_batch = 0;
    for (struct sim *m = s->sims; m; m = m->next_all)
        if (m->state) {
            m->stale = false;
            go_back(s, m, (int64_t)s->st->state_abandon(s->st->arg, &m->state));
        }
    for (struct group **p = &s->groups; *p;) {
        struct group *g = *p;
        if (g->users && renew(s, g, &err) == IC_OK && reopen_states(s, g, &err) == IC_OK) {
            p = &g->next;
            continue;
        }
        for (struct sim *m = s->sims, *next; m; m = next) {
            next = m->next_all;
            if (m->g == g)
                lose(s, m, &err);
        }
        *p = g->next; /* not closed: its plan may be the one that the step is in */
        atomic_fetch_sub(&s->c->shared_bytes, (int64_t)group_bytes(g));
        atomic_fetch_sub(&s->c->groups, 1);
    }
    return IC_OK;
}

/* ---- open, close -------------------------------------------------------------------------------- */

enum ic_status ic_law_sched_open(struct ic_law_sched **out, const struct ic_law_stepper *st,
                                 const struct ic_law_limits *limits, struct ic_law_counters *c,
                                 struct ic_err *err)
{
    struct ic_law_sched *s = calloc(1, sizeof *s);

    *out = NULL;
    IC_ASSERT(limits->max_batch >= 1 && limits->max_batch <= IC_LAW_BATCH_MAX);
    if (!s)
        return ic_fail(err, IC_OOM, "out of memory");
    s->st = st;
    s->lim = *limits;
    s->c = c;
    s->io = calloc(limits->max_batch, sizeof *s->io);
    s->batch = calloc(limits->max_batch, sizeof *s->batch);
    s->draws = calloc(limits->max_batch, sizeof *s->draws);
    s->pending = calloc(limits->max_batch, sizeof *s->pending);
    enum ic_status rc = ic_view_ctx_open(&s->views, err);
    size_t d_max = 1;
    for (unsigned i = 0; i < st->n_laws; i++)
        d_max = st->law(st->arg, i)->d > d_max ? st->law(st->arg, i)->d : d_max;
    s->scratch = calloc(ic_law_extra_poincare_scratch(d_max), sizeof *s->scratch);
    if (rc == IC_OK && (!s->io || !s->batch || !s->draws || !s->pending || !s->scratch))
        rc = ic_fail(err, IC_OOM, "out of memory");
    if (rc != IC_OK)
        ic_law_sched_close(&s);
    *out = s;
    return rc;
}

void ic_law_sched_close(struct ic_law_sched **sp)
{
    struct ic_law_sched *s = *sp;

    if (!s)
        return;
    for (unsigned i = 0; i < s->n_pending; i++)
        free(s->pending[i].ev);
    while (s->sims)
        free_sim(s, s->sims);
    while (s->groups)
        close_group(s, s->groups);
    ic_view_ctx_close(&s->views);
    free(s->io);
    free(s->batch);
    free(s->draws);
    free(s->pending);
    free(s->scratch);
    free(s);
    *sp = NULL;
}
