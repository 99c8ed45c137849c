/* The world in which the tests of the Law M scheduler play: scheduler, fake stepper, fake clock, and what
 * clients have been told. It may have a device (open_device_world), with a memory of its own: states and
 * deltas there are not what the host has, until somebody asks for them.
 *
 * The fake step adds one to the first number of each state, so a step too many or too few of any simulation
 * shows in its psi; what a batch was made of is read off the scheduler's own list. After every command and
 * every tick the scheduler's lists, counters and memory sums are checked against each other, by what
 * its files share. For tests only; a test need not use all of it. */
#ifndef IC_SCHED_LAW_WORLD_H
#define IC_SCHED_LAW_WORLD_H

#pragma GCC diagnostic ignored "-Wunused-function"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "sched/law_sched_int.h" /* the state is checked after every call */

#include "base/hist.h"
#include "sched/check.h"

#define MS IC_MS
#define SEC (1000 * IC_MS)
#define LAWS 3
#define BATCHES 4096
#define EVENTS 8192
#define START_NS (5 * SEC) /* the clock does not begin at 0 */

struct batch_log {
    uint64_t id[16];
    unsigned n, law;
    int64_t at; /* its beginning */
};

struct world {
    struct ic_law laws[LAWS];
    struct ic_law_stepper st;
    struct ic_law_counters c;
    struct ic_law_sched *s;
    int64_t now, step_ns, step_ns_each;
    unsigned limit;      /* batch_limit; 0: none */
    size_t group_shared; /* bytes that a plan takes besides what belongs to each of its batch */
    int plans, opens;    /* plans alive; opened so far */
    bool open_fails;
    struct batch_log batch[BATCHES]; /* a ring: the last ones */
    unsigned n_batches;
    struct ic_event *event[EVENTS]; /* a ring, NULL: taken */
    unsigned n_events, seen;
    size_t moved_shared;   /* what a plan takes from its next step on; 0: as before */
    unsigned step_fails;   /* a bit for each law whose steps find no memory */
    uint64_t fails_of_100; /* steps of any law */
    void (*on_step)(struct world *w, uint64_t id);
    void (*on_fail)(struct world *w, const struct ic_law_group *g);
    void (*on_lost)(struct world *w, uint64_t id, uint64_t steps);
    uint64_t rng, last_sim, last_rid;
    void *arg;
    /* the device */
    bool lost;     /* it is gone, */
    int64_t loses; /* with its so-manieth step from now; 0: never */
    float *delta[16];
    unsigned puts, gets, starts, draws, steps_most; /* steps_most: in one call */
    const struct ic_law_io *started;
    unsigned started_steps;
    struct ic_law_draw drawn[16];
    unsigned char *pixels[16];
    struct ic_view_frame frame[16];
    unsigned n_drawn;
    bool draw_fails;
    struct ic_view_ctx *views;
};

/* A state on the fake device. */
struct ic_law_state {
    struct world *w;
    struct ic_law_io host;
    float *dev; /* psi, h and c as they lie in the host's memory, in one */
    size_t bytes;
    bool host_newer, home; /* home: not on the device any more */
    uint64_t ahead, lost;
};

static uint64_t rnd(struct world *w, uint64_t n)
{
    w->rng = w->rng * 6364136223846793005ULL + 1442695040888963407ULL;
    return (w->rng >> 33) % n;
}

/* ---- the fake stepper --------------------------------------------------------------------------- */

static const struct ic_law *fake_law(void *arg, unsigned i)
{
    return &((struct world *)arg)->laws[i];
}

static enum ic_status fake_group_open(void *arg, unsigned law, unsigned height, unsigned width,
                                      unsigned max_batch, size_t room_, struct ic_law_group **out,
                                      struct ic_err *err)
{
    struct world *w = arg;
    const struct ic_law *l = &w->laws[law];
    size_t psi = (size_t)height * width * l->d * 2 * sizeof(float);
    size_t memory = l->memory ? (size_t)height / 4 * (width / 4) * l->b * 4 * 2 * sizeof(float) : 0;
    size_t need = w->group_shared + (max_batch + 1) * ((psi + 63) / 64 * 64) + memory;

    *out = NULL;
    if (w->open_fails)
        return ic_fail(err, IC_INTERNAL, "the fake cannot");
    if (need > room_)
        return ic_fail(err, IC_OOM, "no room for a plan");
    *out = malloc(sizeof **out);
    **out = (struct ic_law_group){l, height, width, max_batch, psi, memory, w->group_shared};
    w->plans++;
    w->opens++;
    return IC_OK;
}

static void fake_group_close(void *arg, struct ic_law_group *g)
{
    ((struct world *)arg)->plans--;
    free(g);
}

static struct sim *sim_with(const struct world *w, const float *psi)
{
    for (struct sim *m = w->s->sims; m; m = m->next_all)
        if (m->psi == psi)
            return m;
    return NULL;
}

/* ---- its device --------------------------------------------------------------------------------- */

static enum ic_status fake_state_open(void *arg, struct ic_law_group *g, const struct ic_law_io *host,
                                      struct ic_law_state **out, struct ic_err *err)
{
    struct ic_law_state *s = *out = calloc(1, sizeof *s);
    (void)err;
    s->w = arg;
    s->host = *host;
    s->bytes = g->psi_bytes + g->memory_bytes;
    s->dev = malloc(s->bytes);
    memset(s->dev, 0xFF, s->bytes); /* NaN */
    s->host_newer = true;
    return IC_OK;
}

static void fake_state_close(void *arg, struct ic_law_state **state)
{
    (void)arg;
    free((*state)->dev);
    free(*state);
    *state = NULL;
}

static void fake_state_put(void *arg, struct ic_law_state *s, const struct ic_law_io *host)
{
    struct world *w = arg;
    CHECK(!w->started && host->psi == s->host.psi);
    s->host_newer = true;
    s->ahead = 0;
}

/* What a state has become when the device is lost. */
static void fake_home(struct ic_law_state *s)
{
    s->lost += s->ahead;
    s->ahead = 0;
    s->home = true;
}

static void fake_state_get(void *arg, struct ic_law_state *s, const struct ic_law_io *host)
{
    struct world *w = arg;
    CHECK(!w->started && host->psi == s->host.psi);
    if (w->lost)
        fake_home(s);
    if (s->home || s->host_newer)
        return;
    w->gets++;
    memcpy(s->host.psi, s->dev, s->bytes);
    s->ahead = 0;
}

static struct sim *sim_with(const struct world *w, const float *psi);

static uint64_t fake_state_lost(void *arg, struct ic_law_state *s)
{
    struct world *w = arg;
    uint64_t lost = s->lost;
    if (lost && w->on_lost)
        w->on_lost(w, sim_with(w, s->host.psi)->id, lost);
    s->lost = 0;
    return lost;
}

static uint64_t fake_state_abandon(void *arg, struct ic_law_state **state)
{
    fake_home(*state);
    uint64_t lost = fake_state_lost(arg, *state);
    fake_state_close(arg, state);
    return lost;
}

static void fake_start(void *arg, struct ic_law_group *g, const struct ic_law_io *io, unsigned n,
                       unsigned steps)
{
    struct world *w = arg;
    (void)g, (void)n;
    CHECK(!w->started);
    w->starts++;
    w->started = io;
    w->started_steps = steps;
}

static unsigned fake_steps_in(void *arg, struct ic_law_group *g, unsigned n, int64_t ns)
{
    struct world *w = arg;
    int64_t each = w->step_ns + w->step_ns_each * n;
    (void)g;
    return w->lost || ns < each ? 1 : ns / each > 1000 ? 1000 : (unsigned)(ns / each);
}

static enum ic_status fake_draw(void *arg, struct ic_law_group *g, const struct ic_law_draw *draws,
                                unsigned n)
{
    struct world *w = arg;
    struct ic_law_shape shape = {g->height, g->width, g->law->d};
    CHECK(!w->started && n <= g->max_n);
    if (w->lost || w->draw_fails)
        return IC_UNAVAILABLE;
    w->draws++;
    for (unsigned i = 0; i < w->n_drawn; i++) {
        free(w->pixels[i]);
        w->pixels[i] = NULL;
    }
    w->n_drawn = n;
    for (unsigned i = 0; i < n; i++) {
        CHECK(ic_view_of_one_cell(draws[i].request.view) && !draws[i].state->host_newer);
        w->pixels[i] = malloc(1 << 20);
        CHECK(ic_view_render(w->views, &draws[i].request, draws[i].state->dev,
                             draws[i].place >= 0 ? w->delta[draws[i].place] : NULL, shape, w->pixels[i],
                             1 << 20, &w->frame[i], NULL) == IC_OK);
    }
    return IC_OK;
}

static enum ic_status fake_frame(void *arg, struct ic_law_group *g, unsigned i, void *out, size_t size,
                                 struct ic_view_frame *frame)
{
    struct world *w = arg;
    (void)g;
    CHECK(i < w->n_drawn && w->pixels[i] && size == w->frame[i].bytes); /* each is taken once */
    if (w->lost)
        return IC_UNAVAILABLE;
    memcpy(out, w->pixels[i], size);
    free(w->pixels[i]);
    w->pixels[i] = NULL;
    *frame = w->frame[i];
    return IC_OK;
}

static void fake_delta(void *arg, struct ic_law_group *g, unsigned place, float *out)
{
    struct world *w = arg;
    CHECK(!w->started);
    if (!w->lost)
        memcpy(out, w->delta[place], g->psi_bytes);
}

/* Where this step's numbers are: in the host's memory, or on the device. */
static struct ic_law_io fake_place(struct world *w, const struct ic_law_group *g,
                                   const struct ic_law_io *io, unsigned i)
{
    struct ic_law_state *s = io->state;
    struct ic_law_io at = *io;
    if (!s || w->lost || s->home) {
        if (s)
            fake_home(s);
        return at;
    }
    if (s->host_newer) {
        w->puts++;
        memcpy(s->dev, s->host.psi, s->bytes);
    }
    s->host_newer = false;
    at.psi = s->dev;
    at.h = io->h ? s->dev + g->psi_bytes / sizeof(float) : NULL;
    at.c = io->h ? s->dev + (g->psi_bytes + g->memory_bytes / 2) / sizeof(float) : NULL;
    w->delta[i] = realloc(w->delta[i], g->psi_bytes);
    memset(w->delta[i], 0xFF, g->psi_bytes);
    at.delta = io->delta ? w->delta[i] : NULL;
    if (io->delta)
        memset(io->delta, 0xFF, g->psi_bytes); /* not there yet */
    return at;
}

static enum ic_status fake_step(void *arg, struct ic_law_group *g, const struct ic_law_io *io, unsigned n,
                                unsigned steps, struct ic_err *err)
{
    struct world *w = arg;
    struct batch_log *b = &w->batch[w->n_batches++ % BATCHES];
    const bool fails =
        w->step_fails >> (g->law - w->laws) & 1 || (w->fails_of_100 && rnd(w, 100) < w->fails_of_100);

    CHECK(n >= 1 && n <= g->max_n && steps >= 1 && (steps == 1 || w->st.steps_in));
    CHECK(!w->st.start || (w->started == io && w->started_steps == steps));
    w->started = NULL;
    w->steps_most = steps > w->steps_most ? steps : w->steps_most;
    if (w->loses && (w->loses -= steps) <= 0) {
        w->lost = true;
        w->loses = 0;
    }
    CHECK(!w->limit || n <= w->limit);
    *b = (struct batch_log){.n = n, .law = (unsigned)(g->law - w->laws), .at = w->now};
    if (w->moved_shared)
        g->shared_bytes = w->moved_shared;
    if (fails) {
        w->now += w->step_ns;
        if (w->on_fail)
            w->on_fail(w, g);
        return ic_fail(err, IC_OOM, "the fake has no memory");
    }
    for (unsigned i = 0; i < n; i++) {
        struct sim *m = sim_with(w, io[i].psi);
        CHECK(m && m->left && !m->in_line && m->g->plan == g);
        for (unsigned k = 0; k < i; k++)
            CHECK(io[k].psi != io[i].psi && (!io[i].delta || io[k].delta != io[i].delta));
        CHECK((uintptr_t)io[i].delta % 16 == 0 && (uintptr_t)io[i].psi % 16 == 0);
        CHECK(!io[i].h == !g->law->memory && !io[i].c == !g->law->memory);
        CHECK(m->predict || !io[i].state == !w->st.state_open);
        const struct ic_law_io at = fake_place(w, g, &io[i], i);
        at.psi[0] += (float)steps;
        if (at.delta) {
            memset(at.delta, 0, g->psi_bytes);
            at.delta[0] = at.psi[0];
        }
        if (at.h) {
            size_t half = g->memory_bytes / sizeof(float) / 2;
            at.h[0] += (float)steps;
            at.c[half - 1] += (float)steps; /* its very end: ASan sees a state that is too short */
        }
        if (io[i].state && !io[i].state->home)
            io[i].state->ahead += steps;
        b->id[i] = m->id;
        for (unsigned k = 0; w->on_step && k < steps; k++)
            w->on_step(w, m->id);
    }
    w->now += (w->step_ns + w->step_ns_each * n) * steps;
    return IC_OK;
}

static unsigned fake_batch_limit(void *arg, struct ic_law_group *g)
{
    struct world *w = arg;
    return w->limit ? w->limit : g->max_n;
}

static int64_t fake_now(void *arg)
{
    return ((struct world *)arg)->now;
}

static void fake_emit(void *arg, struct ic_event *ev)
{
    struct world *w = arg;
    CHECK(w->n_events - w->seen < EVENTS);
    const bool over = ev->kind == IC_EVENT_SIM_CLOSED || ev->kind == IC_EVENT_SIM_PREDICTED;
    for (const struct sim *m = w->s->sims; m && over; m = m->next_all)
        CHECK(m->id != ev->sim.sim); /* its place is free already */
    w->event[w->n_events++ % EVENTS] = ev;
}

/* ---- driving it --------------------------------------------------------------------------------- */

static const struct ic_law_limits default_limits = {.max_batch = 16,
                                                    .batch_timeout_ns = 50 * MS,
                                                    .grid_max = 64,
                                                    .sims_max = 1000,
                                                    .memory_max = 64 << 20,
                                                    .frame_max = 1 << 20};

static void open_world(struct world *w, const struct ic_law_limits *lim)
{
    struct ic_err err = {0};

    memset(w, 0, sizeof *w);
    for (unsigned i = 0; i < LAWS; i++)
        w->laws[i] = (struct ic_law){
            .d = i + 1, .b = 8, .memory = i == 2, .grid_multiple = i == 1 ? 1 : 4, .gamma = 0.25f};
    w->st = (struct ic_law_stepper){.arg = w,
                                    .n_laws = LAWS,
                                    .law = fake_law,
                                    .group_open = fake_group_open,
                                    .group_close = fake_group_close,
                                    .step = fake_step,
                                    .batch_limit = fake_batch_limit,
                                    .now_ns = fake_now,
                                    .emit = fake_emit};
    w->now = START_NS;
    w->step_ns = MS;
    w->group_shared = 1000;
    w->rng = 1;
    assert_int_equal(ic_law_sched_open(&w->s, &w->st, lim ? lim : &default_limits, &w->c, &err), IC_OK);
}

/* The same with a device. */
static void open_device_world(struct world *w, const struct ic_law_limits *lim)
{
    struct ic_err err = {0};

    open_world(w, lim);
    w->st.state_open = fake_state_open;
    w->st.state_close = fake_state_close;
    w->st.state_put = fake_state_put;
    w->st.state_get = fake_state_get;
    w->st.state_lost = fake_state_lost;
    w->st.state_abandon = fake_state_abandon;
    w->st.start = fake_start;
    w->st.steps_in = fake_steps_in;
    w->st.draw = fake_draw;
    w->st.frame = fake_frame;
    w->st.delta = fake_delta;
    assert_int_equal(ic_view_ctx_open(&w->views, &err), IC_OK);
}

/* The lists, the counters and the sums agree. */
static void check_all(const struct world *w)
{
    int64_t sims = 0, running = 0, groups = 0, state = 0, shared = 0;

    for (const struct sim *m = w->s->sims; m; m = m->next_all) {
        sims++;
        running += m->left != 0;
        state += (int64_t)m->bytes;
        CHECK(!m->in_line || m->left);
        CHECK(m->left >= -1);
    }
    for (const struct group *g = w->s->groups; g; g = g->next) {
        unsigned users = 0, waiting = 0, predicts = 0;
        struct sim *const *tail = &g->head;
        for (const struct sim *m = w->s->sims; m; m = m->next_all)
            users += m->g == g;
        for (struct sim *m = g->head; m; m = m->next) {
            CHECK(m->g == g && m->in_line);
            CHECK(!m->next || m->ready_ns <= m->next->ready_ns);
            waiting++;
            predicts += m->predict;
            tail = &m->next;
        }
        CHECK(tail == g->tail && users == g->users && waiting == g->waiting && predicts == g->predicts);
        groups++;
        shared += (int64_t)ic_group_bytes(g);
    }
    CHECK(sims == w->c.sims && running == w->c.running && groups == w->c.groups && groups == w->plans);
    CHECK(state == w->c.state_bytes && shared == w->c.shared_bytes);
    CHECK((uint64_t)(state + shared) <= w->s->lim.memory_max);
}

static uint64_t command(struct world *w, struct ic_sim_cmd cmd)
{
    cmd.rid = ++w->last_rid;
    ic_law_sched_command(w->s, &cmd);
    CHECK(!cmd.state);
    check_all(w);
    return cmd.rid;
}

/* One tick. Returns when to call again; asserts that "at once" is only said after a step. */
static int64_t tick(struct world *w)
{
    unsigned before = w->n_batches;
    int64_t now = w->now, next = ic_law_sched_tick(w->s);

    check_all(w);
    CHECK(w->n_batches - before <= 1);
    CHECK((next <= now) == (w->n_batches != before)); /* else the engine would spin */
    CHECK(next < INT64_MAX || !w->c.running);
    CHECK(w->n_batches != before || !w->s->n_pending); /* nothing waits for a batch that may never come */
    return next;
}

/* Ticks as the engine does, sleeping when told to, until the clock reads `until`. */
static void run_until(struct world *w, int64_t until)
{
    for (int idle = 0; w->now < until;) {
        unsigned before = w->n_batches;
        int64_t next = tick(w);
        idle = w->n_batches == before ? idle + 1 : 0;
        CHECK(idle < 4000); /* a wake-up must lead to something */
        if (next > w->now)
            w->now = next < until ? next : until;
    }
}

/* The next event, which the caller frees; NULL: none. */
static struct ic_event *next_event(struct world *w)
{
    return w->seen < w->n_events ? w->event[w->seen++ % EVENTS] : NULL;
}

static void drop_events(struct world *w)
{
    for (struct ic_event *ev; (ev = next_event(w));)
        ic_event_free(ev);
}

static void close_world(struct world *w)
{
    drop_events(w);
    ic_law_sched_close(&w->s);
    for (int i = 0; i < 16; i++) {
        free(w->delta[i]);
        free(w->pixels[i]);
    }
    ic_view_ctx_close(&w->views);
    assert_int_equal(w->plans, 0);
    assert_int_equal(w->c.sims, 0);
    assert_int_equal(w->c.running, 0);
    assert_int_equal(w->c.groups, 0);
    assert_int_equal(w->c.state_bytes, 0);
    assert_int_equal(w->c.shared_bytes, 0);
}

static const struct batch_log *last_batch(const struct world *w)
{
    CHECK(w->n_batches);
    return &w->batch[(w->n_batches - 1) % BATCHES];
}

/* A paused simulation of owner 1, all zero, frames off. */
static uint64_t create_on(struct world *w, unsigned law, unsigned side, uint64_t owner)
{
    uint64_t id = ++w->last_sim;
    command(w,
            (struct ic_sim_cmd){.op = IC_SIM_CREATE,
                                .owner = owner,
                                .sim = id,
                                .law = law,
                                .height = side,
                                .width = side,
                                .opts = {.set = IC_SET_INIT | IC_SET_FRAMES, .init = IC_LAW_INIT_ZEROS}});
    return id;
}

static uint64_t create(struct world *w)
{
    uint64_t id = create_on(w, 0, 4, 1);
    drop_events(w);
    return id;
}

static void op_set(struct world *w, enum ic_sim_op op, uint64_t id, struct ic_sim_opts opts)
{
    command(w, (struct ic_sim_cmd){.op = op, .owner = 1, .sim = id, .opts = opts});
}

static void op(struct world *w, enum ic_sim_op o, uint64_t id)
{
    op_set(w, o, id, (struct ic_sim_opts){0});
}

static void run_steps(struct world *w, uint64_t id, int64_t steps)
{
    op_set(w, IC_SIM_RUN, id, (struct ic_sim_opts){.set = IC_SET_STEPS, .steps = steps});
}

static void run_rate(struct world *w, uint64_t id, double rate)
{
    op_set(w, IC_SIM_RUN, id, (struct ic_sim_opts){.set = IC_SET_RATE, .rate = rate});
}

static uint64_t predict(struct world *w, float start, size_t floats)
{
    float *psi = calloc(floats, sizeof *psi);
    psi[0] = start;
    return command(w, (struct ic_sim_cmd){.op = IC_SIM_PREDICT,
                                          .owner = 77,
                                          .sim = ++w->last_sim,
                                          .height = 4,
                                          .width = 4,
                                          .state = psi,
                                          .state_floats = floats});
}
#define PSI_FLOATS 32 /* of law 0 on 4 x 4 */

static struct sim *sim_named(const struct world *w, uint64_t id)
{
    for (struct sim *m = w->s->sims; m; m = m->next_all)
        if (m->id == id)
            return m;
    return NULL;
}

static int64_t steps_of(const struct world *w, uint64_t id)
{
    return sim_named(w, id)->step;
}

/* Frees all events up to the first of a kind, which is returned (to be freed), or NULL. */
static struct ic_event *event_of(struct world *w, enum ic_event_kind kind)
{
    for (struct ic_event *ev; (ev = next_event(w)); ic_event_free(ev))
        if (ev->kind == kind)
            return ev;
    return NULL;
}

static void expect_error(struct world *w, enum ic_status code)
{
    struct ic_event *ev = next_event(w);
    assert_non_null(ev);
    assert_int_equal(ev->kind, IC_EVENT_ERROR);
    assert_int_equal(ev->code, code);
    assert_int_equal(ev->rid, w->last_rid);
    assert_true(ev->len > 0 && ev->text[ev->len] == 0);
    ic_event_free(ev);
    assert_null(next_event(w));
}

static void expect_sim(struct world *v, enum ic_event_kind kind, uint64_t id, uint64_t rid, int64_t step,
                       int64_t left)
{
    struct ic_event *ev = next_event(v);
    assert_non_null(ev);
    assert_int_equal(ev->kind, kind);
    assert_int_equal(ev->sim.sim, id);
    assert_int_equal(ev->rid, rid);
    assert_int_equal(ev->owner, 1);
    assert_int_equal(ev->sim.step, step);
    assert_int_equal(ev->sim.left, left);
    assert_int_equal(ev->sim.running, left != 0);
    ic_event_free(ev);
}

static struct world w; /* one at a time; large */

#endif
