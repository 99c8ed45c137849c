/* What clients ask of simulations: made, run, changed, reset, closed. See law_sched_int.h. */
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "sched/law_sched_int.h"

static struct sim *find_sim(const struct ic_law_sched *s, uint64_t id, uint64_t owner)
{
    for (struct sim *m = s->sims; m; m = m->next_all)
        if (m->id == id)
            return m->owner == owner ? m : NULL;
    return NULL;
}

void ic_sim_free(struct ic_law_sched *s, struct sim *m)
{
    struct sim **p = &s->sims;

    ic_line_leave(m);
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

void ic_sim_set_left(struct ic_law_sched *s, struct sim *m, int64_t left)
{
    atomic_fetch_add(&s->c->running, (left != 0) - (m->left != 0));
    m->left = left;
    if (left == 0)
        ic_line_leave(m);
    else if (!m->in_line) {
        int64_t now = s->st->now_ns(s->st->arg);
        if (m->due_ns <= now)
            ic_line_join(m, now);
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
    enum ic_status st = ic_view_plan(&req, ic_sims_shape(g), &frame, err);

    frame.bytes +=
        st == IC_OK
            ? ic_sims_extras_floats(o->extras, (size_t)g->plan->height * g->plan->width) * sizeof(float)
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
        int64_t due = o.rate > 0 ? now + ic_sims_period(o.rate) : now;
        m->due_ns = m->due_ns < due ? m->due_ns : due;
        due = o.fps > 0 ? now + ic_sims_period(o.fps) : now;
        m->frame_due_ns = m->frame_due_ns < due ? m->frame_due_ns : due;
    }
    return IC_OK;
}

static enum ic_status alloc_sim(struct ic_law_sched *s, const struct ic_sim_cmd *cmd, struct sim **out,
                                struct ic_err *err)
{
    enum ic_status st = check_grid(s, cmd, err);
    struct group *g = NULL;

    if (st != IC_OK || (st = ic_groups_get(s, cmd->law, cmd->height, cmd->width, &g, err)) != IC_OK)
        return st;
    size_t bytes = g->plan->psi_bytes + g->plan->memory_bytes;
    g->users++; /* from here on it is not one of the unused ones */
    while (ic_sims_room(s) < bytes && ic_groups_drop_unused(s)) {
    }
    if (ic_sims_room(s) < bytes) {
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
    const struct ic_law_io io = ic_sim_io(m);
    if (s->st->state_open && cmd->op != IC_SIM_PREDICT)
        return s->st->state_open(s->st->arg, g->plan, &io, &m->state, err);
    return IC_OK;
}

static enum ic_status fill_state(struct ic_law_sched *s, struct sim *m, struct ic_err *err)
{
    memset(m->psi, 0, m->bytes);
    enum ic_status st = ic_law_init_fill(m->psi, ic_sims_shape(m->g), m->o.init, m->o.seed, err);
    ic_sim_written(s, m);
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
    ic_sim_written(s, m);
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
        ic_sims_error(s, cmd, &err);
        if (m)
            ic_sim_free(s, m);
        return;
    }
    atomic_fetch_add(&s->c->created, 1);
    m->step = 0;
    ic_sim_emit(s, m, IC_EVENT_SIM_CREATED, cmd->rid, NULL, 0);
}

static void cmd_predict(struct ic_law_sched *s, struct ic_sim_cmd *cmd)
{
    struct ic_err err = {0};
    struct sim *m = NULL;
    enum ic_status st = alloc_sim(s, cmd, &m, &err);

    if (st == IC_OK)
        st = take_state(s, m, cmd, &err);
    if (st != IC_OK) {
        ic_sims_error(s, cmd, &err);
        if (m)
            ic_sim_free(s, m);
        return;
    }
    if (cmd->opts.set & IC_SET_GAMMA)
        m->o.gamma = cmd->opts.gamma;
    m->predict = true;
    atomic_fetch_add(&s->c->predicts, 1);
    ic_sim_set_left(s, m, 1);
}

static void cmd_run(struct ic_law_sched *s, struct sim *m, const struct ic_sim_cmd *cmd)
{
    m->due_ns = s->st->now_ns(s->st->arg);
    m->owes_frame = false;
    ic_sim_set_left(s, m, cmd->opts.set & IC_SET_STEPS ? cmd->opts.steps : -1);
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
            ic_sim_free(s, m);
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
        case IC_SIM_PAUSE: ic_sim_set_left(s, m, 0); break;
        case IC_SIM_SET:
            redraw = cmd->opts.set & (IC_SET_VIEW | IC_SET_ENCODING | IC_SET_ROI | IC_SET_FRAMES);
            break;
        case IC_SIM_RESET:
            st = cmd_reset(s, m, &err);
            redraw = true;
            break;
        case IC_SIM_TOOL:
            ic_sim_to_host(s, m);
            st = ic_law_tool_apply(m->psi, ic_sims_shape(m->g), cmd->tool, &cmd->tool_args, NULL, &err);
            ic_sim_written(s, m);
            redraw = true;
            break;
        case IC_SIM_STATE:
            if (m->bytes > s->lim.frame_max) { /* before it is copied: it could not be sent */
                st = ic_fail(&err, IC_TOO_LARGE, "a state of %zu bytes does not fit into an outbox of %zu",
                             m->bytes, s->lim.frame_max);
                break;
            }
            ic_sim_to_host(s, m);
            ic_sim_emit(s, m, IC_EVENT_SIM_STATE, cmd->rid, m->psi, m->bytes);
            return;
        case IC_SIM_CLOSE: ic_sim_end(s, m, IC_EVENT_SIM_CLOSED, cmd->rid, NULL, 0); return;
        default: IC_ASSERT(!"a command on a simulation");
        }
    if (st != IC_OK) {
        ic_sims_error(s, cmd, &err);
        return;
    }
    m->rid = cmd->rid;
    ic_sim_emit(s, m, IC_EVENT_SIM_STATUS, cmd->rid, NULL, 0);
    if (redraw && m->left == 0 && m->o.frames)
        ic_frame_emit_last(s, m, -1);
}

void ic_law_sched_command(struct ic_law_sched *s, struct ic_sim_cmd *cmd)
{
    struct ic_err err = {0};
    struct sim *m;

    ic_frames_send(s);
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
        ic_sims_error(s, cmd, &err);
    }
    free(cmd->state);
    cmd->state = NULL;
}
