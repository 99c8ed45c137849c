/* The world in which the tests of the Law M scheduler play: scheduler, fake stepper, fake clock, and what
 * clients have been told.
 *
 * The fake step adds one to the first number of each state, so a step too many or too few of any simulation
 * shows in its psi; what a batch was made of is read off the scheduler's own list. After every command and
 * every tick the scheduler's lists, counters and memory sums are checked against each other. Includes the
 * scheduler's source, for its statics. For tests only; a test need not use all of it. */
#ifndef IC_SCHED_LAW_WORLD_H
#define IC_SCHED_LAW_WORLD_H

#pragma GCC diagnostic ignored "-Wunused-function"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>

#include "sched/law_sched.c" /* its statics: the state is checked after every call */

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
    uint64_t rng, last_sim, last_rid;
    void *arg;
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

static enum ic_status fake_step(void *arg, struct ic_law_group *g, const struct ic_law_io *io, unsigned n,
                                struct ic_err *err)
{
    struct world *w = arg;
    struct batch_log *b = &w->batch[w->n_batches++ % BATCHES];
    const bool fails =
        w->step_fails >> (g->law - w->laws) & 1 || (w->fails_of_100 && rnd(w, 100) < w->fails_of_100);

    CHECK(n >= 1 && n <= g->max_n);
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
            CHECK(io[k].psi != io[i].psi && io[k].delta != io[i].delta);
        CHECK((uintptr_t)io[i].delta % 16 == 0 && (uintptr_t)io[i].psi % 16 == 0);
        CHECK(!io[i].h == !g->law->memory && !io[i].c == !g->law->memory);
        io[i].psi[0] += 1;
        memset(io[i].delta, 0, g->psi_bytes);
        io[i].delta[0] = io[i].psi[0];
        if (io[i].h) {
            size_t half = g->memory_bytes / sizeof(float) / 2;
            io[i].h[0] += 1;
            io[i].c[half - 1] += 1; /* its very end: ASan sees a state that is too short */
        }
        b->id[i] = m->id;
        if (w->on_step)
            w->on_step(w, m->id);
    }
    w->now += w->step_ns + w->step_ns_each * n;
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
    w->st = (struct ic_law_stepper){
        w,        LAWS,     fake_law, fake_group_open, fake_group_close, fake_step, fake_batch_limit,
        fake_now, fake_emit};
    w->now = START_NS;
    w->step_ns = MS;
    w->group_shared = 1000;
    w->rng = 1;
    assert_int_equal(ic_law_sched_open(&w->s, &w->st, lim ? lim : &default_limits, &w->c, &err), IC_OK);
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
        shared += (int64_t)group_bytes(g);
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
