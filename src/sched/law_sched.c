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
 * psi, h and c of a simulation with a `state` may be behind it (`stale`): ic_sim_to_host before they are
 * read or partly written, ic_sim_written after they were. */
#include "sched/law_sched_int.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#define PREDICT_MEMORY_NS (IC_PREDICT_MEMORY_S * 1000 * IC_MS)
#define COPY_NS (IC_SIM_COPY_S * 1000 * IC_MS)
#define OWED_POLL_NS (2 * IC_MS) /* how often to look whether a client can take the frame it is owed */

/* ---- groups ------------------------------------------------------------------------------------- */

static int64_t bytes_held(const struct ic_law_sched *s)
{
    return atomic_load(&s->c->state_bytes) + atomic_load(&s->c->shared_bytes);
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
    atomic_fetch_sub(&s->c->shared_bytes, (int64_t)ic_group_bytes(g));
    atomic_fetch_sub(&s->c->groups, 1);
    s->st->group_close(s->st->arg, g->plan);
    free(g->delta);
    free(g);
}

/* Closes the plan that has been unused longest. False: there is none. */
bool ic_groups_drop_unused(struct ic_law_sched *s)
{
    struct group *oldest = NULL;

    for (struct group *g = s->groups; g; g = g->next)
        if (!g->users && (!oldest || g->used_ns < oldest->used_ns))
            oldest = g;
    if (oldest)
        close_group(s, oldest);
    return oldest;
}

size_t ic_sims_room(const struct ic_law_sched *s)
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

    while ((st = s->st->group_open(s->st->arg, law, height, width, n, ic_sims_room(s), out, err)) == IC_OOM)
        if (!ic_groups_drop_unused(s) && (n /= 2) == 0)
            break;
    return st;
}

enum ic_status ic_groups_get(struct ic_law_sched *s, unsigned law, unsigned height, unsigned width,
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
        g->delta = aligned_alloc(IC_LAW_ALIGN, plan->max_n * ic_group_delta_stride(plan));
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
    atomic_fetch_add(&s->c->shared_bytes, (int64_t)ic_group_bytes(g));
    *out = g;
    return IC_OK;
}

void ic_line_join(struct sim *m, int64_t now)
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

void ic_line_leave(struct sim *m)
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
        if (m->owes_frame && m->o.frames && ic_sim_is_behind(m))
            due = now + OWED_POLL_NS;
        else if (m->owes_frame && m->o.frames)
            ic_frame_emit(s, m, -1, false);
        if (m->stale && m->stale_ns + COPY_NS <= now)
            ic_sim_to_host(s, m);
        else if (m->stale && m->stale_ns + COPY_NS < due)
            due = m->stale_ns + COPY_NS;
        if (m->left && !m->in_line) {
            if (m->due_ns <= now)
                ic_line_join(m, now);
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
    const int64_t lost = ic_sim_take_loss(s, m);

    m->step += steps - lost;
    if (m->left > 0)
        m->left += lost - steps;
    if (lost)
        ic_sim_tell_loss(s, m, lost);
    if (m->state) {
        m->stale_ns = m->stale && !lost ? m->stale_ns : now;
        m->stale = true;
    }
    if (m->predict) {
        atomic_fetch_sub(&s->c->running, 1);
        ic_sim_end(s, m, IC_EVENT_SIM_PREDICTED, m->rid, m->psi, m->bytes);
        return;
    }
    if (m->left == 0 && m->o.frames)
        ic_frame_emit_last(s, m, place);
    else if (ic_frame_is_due(m, now))
        ic_frame_emit(s, m, place, true);
    if (m->left == 0) {
        atomic_fetch_sub(&s->c->running, 1);
        ic_sim_emit(s, m, IC_EVENT_SIM_STATUS, 0, NULL, 0);
    } else if (m->o.rate > 0) {
        int64_t period = ic_sims_period(m->o.rate);
        /* On schedule, without trying to catch up more than one step after a stall. */
        m->due_ns = m->due_ns + period > now - period ? m->due_ns + period : now;
        if (m->due_ns <= now)
            ic_line_join(m, now);
    } else {
        ic_line_join(m, now);
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
        ic_sim_go_back(s, m, ic_sim_take_loss(s, m));
        ic_sim_tell(s, m, err);
        if (m->predict) {
            ic_sim_free(s, m);
            continue;
        }
        ic_sim_set_left(s, m, 0);
        ic_sim_emit(s, m, IC_EVENT_SIM_STATUS, 0, NULL, 0);
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
        ic_line_leave(m);
        ic_hist_add(&s->c->wait, now - m->ready_ns);
        s->io[n] = ic_sim_io(m);
        if (ic_sim_wants_delta(m))
            s->io[n].delta = (float *)(void *)((char *)g->delta + n * ic_group_delta_stride(g->plan));
        s->batch[n++] = m;
    }
    const unsigned steps = steps_together(s, g, n, now);
    s->n_batch = n;
    if (s->st->start)
        s->st->start(s->st->arg, g->plan, s->io, n, steps);
    ic_frames_send(s); /* of the step before, while this one is made */
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
    ic_frames_draw(s);
}

int64_t ic_law_sched_tick(struct ic_law_sched *s)
{
    int64_t now = s->st->now_ns(s->st->arg), next = release_due(s, now);
    struct group *g = choose(s, now, &next);

    if (!g) {
        ic_frames_send(s);
        return next;
    }
    run_batch(s, g, now);
    return now;
}

/* ---- a step that never ends --------------------------------------------------------------------- */

static void lose(struct ic_law_sched *s, struct sim *m, const struct ic_err *err)
{
    ic_sim_tell(s, m, err);
    if (m->predict)
        ic_sim_free(s, m);
    else
        ic_sim_end(s, m, IC_EVENT_SIM_CLOSED, 0, NULL, 0);
}

/* A plan anew, and with it everything that the step before may still write to. */
static enum ic_status renew(struct ic_law_sched *s, struct group *g, struct ic_err *err)
{
    struct ic_law_group *plan;
    enum ic_status st = IC_OOM;

    for (unsigned n = s->lim.max_batch; n > 0 && st == IC_OOM; n /= 2)
        st = s->st->group_open(s->st->arg, g->law, g->plan->height, g->plan->width, n,
                               ic_sims_room(s) + ic_group_bytes(g), &plan, err);
    if (st != IC_OK)
        return st;
    float *delta = aligned_alloc(IC_LAW_ALIGN, plan->max_n * ic_group_delta_stride(plan));
    if (!delta) {
        s->st->group_close(s->st->arg, plan);
        return ic_fail(err, IC_OOM, "out of memory");
    }
    atomic_fetch_sub(&s->c->shared_bytes, (int64_t)ic_group_bytes(g));
    g->plan = plan;
    g->shared = plan->shared_bytes;
    g->delta = delta;
    atomic_fetch_add(&s->c->shared_bytes, (int64_t)ic_group_bytes(g));
    return IC_OK;
}

static enum ic_status reopen_states(struct ic_law_sched *s, struct group *g, struct ic_err *err)
{
    enum ic_status st = IC_OK;

    for (struct sim *m = s->sims; m && s->st->state_open && st == IC_OK; m = m->next_all) {
        const struct ic_law_io io = ic_sim_io(m);
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
            ic_sim_go_back(s, m, (int64_t)s->st->state_abandon(s->st->arg, &m->state));
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
        atomic_fetch_sub(&s->c->shared_bytes, (int64_t)ic_group_bytes(g));
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
        ic_sim_free(s, s->sims);
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
