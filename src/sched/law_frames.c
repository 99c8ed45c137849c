/* What a client is told and shown of its simulations: events, metrics, frames, drawn here or by the device that holds the
 * state; and that state's way to the host. See law_sched_int.h. */
#include <stdlib.h>
#include <string.h>

#include "sched/law_sched_int.h"

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

void ic_sims_error(struct ic_law_sched *s, const struct ic_sim_cmd *cmd, const struct ic_err *err)
{
    struct ic_event *ev = new_event(IC_EVENT_ERROR, cmd->owner, cmd->rid, strlen(err->msg));

    atomic_fetch_add(&s->c->refused, 1);
    if (!ev) {
        s->st->lost(s->st->arg, &(struct ic_lost){.owner = cmd->owner, .rid = cmd->rid, .sim = cmd->sim});
        return;
    }
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

/* NULL: no memory for it. */
static struct ic_event *event_of(const struct sim *m, enum ic_event_kind kind, uint64_t rid,
                                 const void *data, size_t len)
{
    struct ic_event *ev = new_event(kind, m->owner, rid, len);

    if (!ev)
        return NULL;
    if (len)
        memcpy(ev->text, data, len);
    fill_info(m, &ev->sim);
    return ev;
}

static void emit_or_lose(struct ic_law_sched *s, struct ic_event *ev, const struct ic_lost *lost)
{
    if (ev)
        s->st->emit(s->st->arg, ev);
    else
        s->st->lost(s->st->arg, lost);
}

void ic_sim_emit(struct ic_law_sched *s, const struct sim *m, enum ic_event_kind kind, uint64_t rid,
                 const void *data, size_t len)
{
    const struct ic_lost lost = {.owner = m->owner, .rid = rid, .sim = m->id};

    emit_or_lose(s, event_of(m, kind, rid, data, len), &lost);
}

void ic_sim_end(struct ic_law_sched *s, struct sim *m, enum ic_event_kind kind, uint64_t rid,
                const void *data, size_t len)
{
    const struct ic_lost lost = {.owner = m->owner, .rid = rid, .sim = m->id};
    struct ic_event *ev = event_of(m, kind, rid, data, len);

    ic_sim_free(s, m);
    emit_or_lose(s, ev, &lost);
}

struct ic_law_shape ic_sims_shape(const struct group *g)
{
    return (struct ic_law_shape){g->plan->height, g->plan->width, g->plan->law->d};
}

size_t ic_sims_extras_floats(unsigned extras, size_t cells)
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
    struct ic_law_shape shape = ic_sims_shape(m->g);
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

bool ic_sim_is_behind(const struct sim *m)
{
    return atomic_load(&m->credit->in_flight) >= IC_SIM_FRAMES_IN_FLIGHT;
}

/* ---- states on a device ------------------------------------------------------------------------- */

struct ic_law_io ic_sim_io(const struct sim *m)
{
    return (struct ic_law_io){
        .psi = m->psi, .h = m->h, .c = m->c, .gamma = (float)m->o.gamma, .state = m->state};
}

void ic_sim_tell(struct ic_law_sched *s, const struct sim *m, const struct ic_err *err)
{
    struct ic_sim_cmd about = {.owner = m->owner, .sim = m->id, .rid = m->rid};

    ic_sims_error(s, &about, err);
}

/* The simulation has gone back by so many steps: m->step and m->left say so already. */
void ic_sim_tell_loss(struct ic_law_sched *s, const struct sim *m, int64_t steps)
{
    struct ic_err err = {0};

    ic_fail(&err, IC_UNAVAILABLE,
            "the GPU was lost, and with it %lld steps: the simulation goes on from step %lld",
            (long long)steps, (long long)m->step);
    ic_sim_tell(s, m, &err);
    ic_sim_emit(s, m, IC_EVENT_SIM_STATUS, 0, NULL, 0);
}

/* What was lost since it was last asked; a run that is under way makes these steps again. */
void ic_sim_go_back(struct ic_law_sched *s, struct sim *m, int64_t lost)
{
    if (!lost)
        return;
    m->step -= lost;
    m->left += m->left > 0 ? lost : 0;
    ic_sim_tell_loss(s, m, lost);
}

int64_t ic_sim_take_loss(struct ic_law_sched *s, struct sim *m)
{
    return m->state ? (int64_t)s->st->state_lost(s->st->arg, m->state) : 0;
}

/* psi, h and c are those of m->step afterwards; where the device is lost, m->step is theirs. */
void ic_sim_to_host(struct ic_law_sched *s, struct sim *m)
{
    const struct ic_law_io io = ic_sim_io(m);

    if (!m->stale)
        return;
    s->st->state_get(s->st->arg, m->state, &io);
    m->stale = false;
    ic_sim_go_back(s, m, ic_sim_take_loss(s, m));
}

/* psi, h or c were written. */
void ic_sim_written(struct ic_law_sched *s, struct sim *m)
{
    const struct ic_law_io io = ic_sim_io(m);

    m->stale = false;
    if (m->state)
        s->st->state_put(s->st->arg, m->state, &io);
}

/* ---- frames ------------------------------------------------------------------------------------- */

/* The earliest time of the next frame. On schedule, so that there are never more than `fps` in a second,
 * however the steps fall. */
static void plan_next_frame(struct sim *m, int64_t now)
{
    int64_t period = m->o.fps > 0 ? ic_sims_period(m->o.fps) : 0;
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
bool ic_sim_wants_delta(const struct sim *m)
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

    if (ic_view_plan(&req, ic_sims_shape(m->g), &frame, NULL) == IC_OK)
        ev = new_event(IC_EVENT_SIM_FRAME, m->owner, 0, frame.bytes + extra * sizeof(float));
    if (!ev)
        return NULL;
    fill_info(m, &ev->sim);
    ev->sim.frame = frame;
    ev->stamp_ns = s->st->now_ns(s->st->arg);
    return ev;
}

/* There was no memory for a frame that nothing newer would follow. */
static void lose_frame(struct ic_law_sched *s, const struct sim *m)
{
    if (!m->left)
        s->st->lost(s->st->arg, &(struct ic_lost){.owner = m->owner, .sim = m->id});
}

/* Draws what the client looks at on the CPU and sends it. `place`: in the step just made, for its delta;
 * -1: none. */
static void draw_here(struct ic_law_sched *s, struct sim *m, int place)
{
    struct ic_view_request req = {m->o.view, m->o.encoding, m->o.roi};
    struct ic_law_shape shape = ic_sims_shape(m->g);
    size_t extra = ic_sims_extras_floats(m->o.extras, shape.h * shape.w), n_poincare = 0;
    const int64_t before = m->step;
    float *extras = NULL, *delta = place >= 0 ? s->io[place].delta : NULL;

    if (delta && m->state)
        s->st->delta(s->st->arg, m->g->plan, (unsigned)place, delta);
    ic_sim_to_host(s, m);
    if (m->step != before)
        delta = NULL; /* of a step that is lost */
    struct ic_event *ev = new_frame(s, m, extra);
    if (!ev || (extra && !(extras = malloc(extra * sizeof *extras))) ||
        ic_view_render(s->views, &req, m->psi, delta, shape, ev->text, ev->sim.frame.bytes, &ev->sim.frame,
                       NULL) != IC_OK) {
        free(extras);
        free(ev);
        lose_frame(s, m);
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
void ic_frames_send(struct ic_law_sched *s)
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

/* Adds a frame to those that the device is to draw. False: no memory, and told. */
static bool gather(struct ic_law_sched *s, struct sim *m, int place)
{
    struct ic_event *ev = new_frame(s, m, 0);

    if (!ev) {
        lose_frame(s, m);
        return false;
    }
    s->draws[s->n_pending] = (struct ic_law_draw){m->state, place, {m->o.view, m->o.encoding, m->o.roi}};
    s->pending[s->n_pending] = (struct pending){m, ev, m->frame_due_ns};
    s->n_pending++;
    s->pending_of = m->g->plan;
    plan_next_frame(m, ev->stamp_ns);
    return true;
}

/* Has the device draw what was gathered; what it cannot draw is drawn here. */
void ic_frames_draw(struct ic_law_sched *s)
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
void ic_frame_emit(struct ic_law_sched *s, struct sim *m, int place, bool later)
{
    const bool gathering = s->n_pending > 0 && !s->copying;

    if (ic_sim_is_behind(m)) {
        atomic_fetch_add(&s->c->frames_skipped, 1);
        return;
    }
    m->owes_frame = false;
    if (!device_draws(s, m, s->st->now_ns(s->st->arg)) || (!later && gathering)) {
        draw_here(s, m, place);
        return;
    }
    if (!later)
        ic_frames_send(s);
    if (gather(s, m, place) && !later) {
        ic_frames_draw(s);
        ic_frames_send(s);
    }
}

/* A frame that nothing newer would follow: drawn now, or as soon as the client has taken the earlier ones.
 */
void ic_frame_emit_last(struct ic_law_sched *s, struct sim *m, int place)
{
    m->owes_frame = true;
    if (!ic_sim_is_behind(m))
        ic_frame_emit(s, m, place, false);
}

bool ic_frame_is_due(const struct sim *m, int64_t now)
{
    if (!m->o.frames || m->step % m->o.every != 0)
        return false;
    /* A tenth early is on time: a frame that misses by a hair would wait for a whole further step. */
    return m->o.fps <= 0 || now >= m->frame_due_ns - ic_sims_period(m->o.fps) / 10;
}
