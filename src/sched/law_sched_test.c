/* The Law M scheduler over a fake stepper and a fake clock: a test for each rule, and thousands of random schedules
 * against a model of what every simulation must have done.
 *
 * The fake step adds one to the first number of each state, so a step too many or too few of any simulation shows in
 * its psi; what a batch was made of is read off the scheduler's own list. After every command and every tick the
 * scheduler's lists, counters and memory sums are checked against each other.
 *
 * IC_SEED=n and IC_ROUNDS=n choose other schedules; a failure prints the seed of its schedule. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>

#include "sched/law_sched.c" /* its statics: the state is checked after every call */

#include "base/hist.h"

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
    void (*on_step)(struct world *w, uint64_t id);
    uint64_t rng, last_sim, last_rid;
    void *arg;
};

static uint64_t seed_now; /* of the schedule under way, for messages */

#define CHECK(cond)                                                                                                    \
    do {                                                                                                               \
        if (!(cond)) {                                                                                                 \
            printf("schedule %llu: %s does not hold\n", (unsigned long long)seed_now, #cond);                          \
            fail_msg("%s:%d", __FILE__, __LINE__);                                                                     \
        }                                                                                                              \
    } while (0)

static uint64_t rnd(struct world *w, uint64_t n)
{
    w->rng = w->rng * 6364136223846793005ULL + 1442695040888963407ULL;
    return (w->rng >> 33) % n;
}

/* ---- the fake stepper -------------------------------------------------------------------------------------------- */

static const struct ic_law *fake_law(void *arg, unsigned i)
{
    return &((struct world *)arg)->laws[i];
}

static enum ic_status fake_group_open(void *arg, unsigned law, unsigned height, unsigned width, unsigned max_batch, size_t room_,
                                      struct ic_law_group **out, struct ic_err *err)
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

static void fake_step(void *arg, struct ic_law_group *g, const struct ic_law_io *io, unsigned n)
{
    struct world *w = arg;
    struct batch_log *b = &w->batch[w->n_batches++ % BATCHES];

    CHECK(n >= 1 && n <= g->max_n);
    CHECK(!w->limit || n <= w->limit);
    *b = (struct batch_log){.n = n, .law = (unsigned)(g->law - w->laws), .at = w->now};
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

/* ---- driving it ------------------------------------------------------------------------------------------------------ */

static const struct ic_law_limits default_limits = {
    .max_batch = 16, .batch_timeout_ns = 50 * MS, .grid_max = 64, .sims_max = 1000, .memory_max = 64 << 20, .frame_max = 1 << 20};

static void open_world(struct world *w, const struct ic_law_limits *lim)
{
    struct ic_err err = {0};

    memset(w, 0, sizeof *w);
    for (unsigned i = 0; i < LAWS; i++)
        w->laws[i] = (struct ic_law){.d = i + 1, .b = 8, .memory = i == 2, .grid_multiple = i == 1 ? 1 : 4, .gamma = 0.25f};
    w->st = (struct ic_law_stepper){w, LAWS, fake_law, fake_group_open, fake_group_close, fake_step, fake_batch_limit, fake_now, fake_emit};
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
    command(w, (struct ic_sim_cmd){.op = IC_SIM_CREATE,
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

/* ---- batches ---------------------------------------------------------------------------------------------------------- */

static struct world w; /* one at a time; large */

static void test_batches_are_full_and_re_formed(void **state)
{
    uint64_t id[20];
    (void)state;
    open_world(&w, NULL);
    for (int i = 0; i < 20; i++)
        run_steps(&w, id[i] = create(&w), -1);
    tick(&w);
    assert_int_equal(last_batch(&w)->n, 16);
    for (int i = 0; i < 16; i++)
        assert_int_equal(last_batch(&w)->id[i], id[i]);
    tick(&w); /* the four that had no place come first */
    assert_int_equal(last_batch(&w)->n, 16);
    for (int i = 0; i < 16; i++)
        assert_int_equal(last_batch(&w)->id[i], id[(16 + i) % 20]);
    for (int i = 3; i < 20; i++)
        op(&w, IC_SIM_PAUSE, id[i]);
    tick(&w);
    assert_int_equal(last_batch(&w)->n, 3);
    uint64_t late = create(&w);
    run_steps(&w, late, -1);
    op(&w, IC_SIM_CLOSE, id[1]);
    tick(&w);
    assert_int_equal(last_batch(&w)->n, 3);
    assert_int_equal(last_batch(&w)->id[0] + last_batch(&w)->id[1] + last_batch(&w)->id[2], id[0] + id[2] + late);
    assert_int_equal(w.c.batches, 4);
    assert_int_equal(w.c.steps, 16 + 16 + 3 + 3);
    assert_int_equal(w.c.batched, w.c.steps);
    close_world(&w);
}

static void test_a_lone_simulation_never_waits(void **state)
{
    (void)state;
    open_world(&w, NULL);
    uint64_t id = create(&w);
    assert_int_equal(tick(&w), INT64_MAX); /* nothing to do: sleep until a command comes */
    run_steps(&w, id, 100);
    for (int i = 0; i < 100; i++)
        tick(&w);
    assert_int_equal(steps_of(&w, id), 100);
    assert_int_equal(w.now, START_NS + 100 * MS);
    assert_int_equal(w.c.batched, 0);
    assert_int_equal(tick(&w), INT64_MAX);
    /* a paced one alone neither: it steps when it is due, not later */
    run_rate(&w, id, 10);
    for (int i = 0; i < 5; i++) {
        int64_t due = w.now;
        tick(&w);
        assert_int_equal(last_batch(&w)->at, due);
        assert_int_equal(w.now = tick(&w), due + 100 * MS);
    }
    close_world(&w);
}

static void test_free_ones_are_not_held_back_by_paced_ones(void **state)
{
    (void)state;
    open_world(&w, NULL);
    uint64_t fast = create(&w);
    for (int i = 0; i < 10; i++) {
        w.now += 700000;
        run_rate(&w, create(&w), 25);
    }
    run_steps(&w, fast, -1);
    int64_t begin = w.now;
    run_until(&w, begin + SEC);
    assert_int_equal(steps_of(&w, fast), 1000); /* one in each millisecond: it never waited */
    for (uint64_t id = fast + 1; id <= fast + 10; id++)
        assert_in_range(steps_of(&w, id), 25, 27);
    close_world(&w);
}

static void test_paced_ones_wait_for_company_that_can_come(void **state)
{
    struct ic_law_limits lim = default_limits;
    (void)state;
    open_world(&w, NULL);
    uint64_t a = create(&w), b = create(&w);
    run_rate(&w, a, 10);
    tick(&w);
    w.now = START_NS + 30 * MS;
    run_rate(&w, b, 10);
    tick(&w);
    w.now = START_NS + 100 * MS; /* a is due; b will be at 130, within the 50 ms that it may wait */
    assert_int_equal(tick(&w), START_NS + 130 * MS);
    assert_int_equal(w.n_batches, 2);
    w.now = START_NS + 129 * MS;
    assert_int_equal(tick(&w), START_NS + 130 * MS);
    w.now = START_NS + 130 * MS;
    tick(&w);
    assert_int_equal(last_batch(&w)->n, 2);
    close_world(&w);

    /* company that comes too late is not waited for */
    lim.batch_timeout_ns = 20 * MS;
    open_world(&w, &lim);
    a = create(&w), b = create(&w);
    run_rate(&w, a, 10);
    tick(&w);
    w.now = START_NS + 30 * MS;
    run_rate(&w, b, 10);
    tick(&w);
    w.now = START_NS + 100 * MS;
    tick(&w);
    assert_int_equal(last_batch(&w)->at, START_NS + 100 * MS);
    assert_int_equal(last_batch(&w)->n, 1);
    /* nor is one of another plan, nor one that is paused */
    op(&w, IC_SIM_PAUSE, b);
    uint64_t other = create_on(&w, 1, 4, 1);
    drop_events(&w);
    w.now = START_NS + 185 * MS;
    run_rate(&w, other, 100);
    tick(&w);
    w.now = START_NS + 190 * MS;
    run_rate(&w, other, 0.1);
    tick(&w);
    w.now = START_NS + 200 * MS;
    tick(&w);
    assert_int_equal(last_batch(&w)->id[0], a);
    assert_int_equal(last_batch(&w)->at, START_NS + 200 * MS);
    close_world(&w);

    /* nor one that was about to be due, but has been paused */
    open_world(&w, &lim);
    a = create(&w), b = create(&w);
    run_rate(&w, a, 10);
    tick(&w);
    w.now = START_NS + 10 * MS;
    run_rate(&w, b, 10);
    tick(&w);
    op(&w, IC_SIM_PAUSE, b);
    w.now = START_NS + 100 * MS;
    tick(&w);
    assert_int_equal(last_batch(&w)->at, START_NS + 100 * MS);
    assert_int_equal(last_batch(&w)->id[0], a);
    close_world(&w);

    /* a batch that is full goes, whoever else could come; "full" is what batch_limit says */
    lim.batch_timeout_ns = 50 * MS;
    open_world(&w, &lim);
    w.limit = 2;
    uint64_t id[3];
    for (int i = 0; i < 3; i++)
        id[i] = create(&w);
    run_rate(&w, id[0], 10);
    run_rate(&w, id[1], 10);
    tick(&w);
    w.now = START_NS + 40 * MS;
    run_rate(&w, id[2], 10);
    tick(&w);
    w.now = START_NS + 100 * MS;
    tick(&w);
    assert_int_equal(last_batch(&w)->at, START_NS + 100 * MS);
    assert_int_equal(last_batch(&w)->n, 2);
    close_world(&w);
}

static void test_no_wait_is_longer_than_the_timeout(void **state)
{
    (void)state;
    open_world(&w, NULL);
    for (int i = 0; i < 12; i++) { /* there is always somebody who will be due soon */
        w.now += 7 * MS;
        run_rate(&w, create(&w), 9.0 + i * 0.37);
    }
    for (int i = 0; i < 4000; i++) {
        int64_t next = tick(&w);
        for (const struct sim *m = w.s->sims; m; m = m->next_all)
            CHECK(!m->in_line || w.now - m->ready_ns <= default_limits.batch_timeout_ns + MS);
        if (next > w.now)
            w.now = next;
    }
    assert_true(w.c.batched * 10 > w.c.steps * 9); /* and company was found */
    close_world(&w);
}

static void test_predictions_find_company_once_it_was_seen(void **state)
{
    (void)state;
    open_world(&w, NULL);
    /* a caller alone is served at once */
    for (int i = 0; i < 3; i++) {
        uint64_t rid = predict(&w, (float)i, PSI_FLOATS);
        int64_t at = w.now;
        tick(&w);
        assert_int_equal(last_batch(&w)->at, at);
        struct ic_event *ev = next_event(&w);
        assert_int_equal(ev->kind, IC_EVENT_SIM_PREDICTED);
        assert_int_equal(ev->rid, rid);
        assert_int_equal(ev->owner, 77);
        assert_int_equal(ev->len, PSI_FLOATS * sizeof(float));
        float first;
        memcpy(&first, ev->text, sizeof first);
        assert_true(first == (float)i + 1);
        ic_event_free(ev);
        assert_int_equal(w.c.sims, 0);
    }
    for (int i = 0; i < 4; i++)
        predict(&w, 0, PSI_FLOATS);
    tick(&w);
    assert_int_equal(last_batch(&w)->n, 4);
    /* four were seen together: a first one waits for the others, and goes when they are there */
    int64_t at = w.now;
    predict(&w, 0, PSI_FLOATS);
    assert_int_equal(tick(&w), at + 50 * MS);
    w.now += 10 * MS;
    predict(&w, 0, PSI_FLOATS);
    predict(&w, 0, PSI_FLOATS);
    assert_int_equal(tick(&w), at + 50 * MS);
    predict(&w, 0, PSI_FLOATS);
    tick(&w);
    assert_int_equal(last_batch(&w)->n, 4);
    assert_int_equal(last_batch(&w)->at, at + 10 * MS);
    /* but never longer than the timeout */
    at = w.now;
    predict(&w, 0, PSI_FLOATS);
    assert_int_equal(w.now = tick(&w), at + 50 * MS);
    tick(&w);
    assert_int_equal(last_batch(&w)->n, 1);
    assert_int_equal(last_batch(&w)->at, at + 50 * MS);
    /* and after a while without company that is forgotten */
    w.now += IC_PREDICT_MEMORY_S * SEC;
    at = w.now;
    predict(&w, 0, PSI_FLOATS);
    tick(&w);
    assert_int_equal(last_batch(&w)->at, at);
    /* fewer than before, seen together anew, are believed again */
    predict(&w, 0, PSI_FLOATS);
    predict(&w, 0, PSI_FLOATS);
    tick(&w);
    at = w.now;
    predict(&w, 0, PSI_FLOATS);
    assert_int_equal(tick(&w), at + 50 * MS);
    predict(&w, 0, PSI_FLOATS);
    tick(&w);
    assert_int_equal(last_batch(&w)->n, 2);
    assert_int_equal(last_batch(&w)->at, at);
    /* predictions and simulations share batches */
    run_steps(&w, create(&w), 1);
    predict(&w, 0, PSI_FLOATS);
    tick(&w);
    assert_int_equal(last_batch(&w)->n, 2);
    assert_int_equal(w.c.running, 0);
    close_world(&w);
}

static void test_everybody_gets_the_same(void **state)
{
    uint64_t id[100];
    (void)state;
    open_world(&w, NULL);
    for (int i = 0; i < 100; i++)
        run_steps(&w, id[i] = create(&w), -1);
    for (int k = 0; k < 2000; k++) {
        int64_t least = INT64_MAX, most = 0;
        tick(&w);
        assert_int_equal(last_batch(&w)->n, 16);
        for (int i = 0; i < 100; i++) {
            int64_t n = steps_of(&w, id[i]);
            least = n < least ? n : least;
            most = n > most ? n : most;
        }
        CHECK(most - least <= 1);
    }
    close_world(&w);
}

static void test_groups_take_turns(void **state)
{
    unsigned count[LAWS] = {0};
    (void)state;
    open_world(&w, NULL);
    for (int i = 0; i < 40; i++) /* three batches of law 0 would be waiting at any time */
        run_steps(&w, create_on(&w, 0, 4, 1), -1);
    run_steps(&w, create_on(&w, 1, 4, 1), -1);
    run_steps(&w, create_on(&w, 2, 4, 1), -1);
    drop_events(&w);
    assert_int_equal(w.plans, 3);
    for (int i = 0; i < 50; i++) {
        tick(&w);
        count[last_batch(&w)->law]++;
    }
    /* in the order of readiness: 40 of law 0 take 3 batches in each round of 5 */
    assert_in_range(count[0], 28, 32);
    assert_in_range(count[1], 9, 11);
    assert_in_range(count[2], 9, 11);
    close_world(&w);

    /* two lone simulations of two laws alternate */
    open_world(&w, NULL);
    run_steps(&w, create_on(&w, 0, 4, 1), -1);
    run_steps(&w, create_on(&w, 1, 4, 1), -1);
    drop_events(&w);
    tick(&w);
    for (int i = 0; i < 20; i++) {
        unsigned before = last_batch(&w)->law;
        tick(&w);
        assert_int_not_equal(last_batch(&w)->law, before);
    }
    close_world(&w);
}

static void test_odd_grids_get_aligned_buffers(void **state)
{
    (void)state;
    open_world(&w, NULL);
    w.laws[1].d = 1; /* 3 x 3 cells of 8 bytes */
    for (int i = 0; i < 5; i++)
        run_steps(&w, create_on(&w, 1, 3, 1), 2);
    tick(&w); /* the fake looks at them */
    assert_int_equal(last_batch(&w)->n, 5);
    close_world(&w);
}

static void test_batch_limit_is_honoured(void **state)
{
    (void)state;
    open_world(&w, NULL);
    for (int i = 0; i < 10; i++)
        run_steps(&w, create(&w), -1);
    for (unsigned limit = 1; limit <= 12; limit++) {
        w.limit = limit;
        tick(&w);
        assert_int_equal(last_batch(&w)->n, limit < 10 ? limit : 10);
    }
    w.limit = 0;
    tick(&w);
    assert_int_equal(last_batch(&w)->n, 10);
    close_world(&w);
}

/* ---- rates ------------------------------------------------------------------------------------------------------------ */

static void test_a_rate_is_kept(void **state)
{
    (void)state;
    open_world(&w, NULL);
    uint64_t id = create(&w);
    run_rate(&w, id, 50);
    run_until(&w, START_NS + 15 * MS);
    assert_int_equal(steps_of(&w, id), 1); /* not two in a row at the start */
    run_until(&w, START_NS + 10 * SEC);
    assert_in_range(steps_of(&w, id), 499, 501);
    /* a stall: one step at once, perhaps one more, then the rate again; what was missed is not made up for */
    int64_t had = steps_of(&w, id);
    w.now += 3 * SEC;
    int64_t begin = w.now;
    run_until(&w, begin + 10 * MS);
    assert_in_range(steps_of(&w, id) - had, 1, 2);
    run_until(&w, begin + 10 * SEC);
    assert_in_range(steps_of(&w, id) - had, 499, 502);
    close_world(&w);

    /* a step that takes longer than the period: as fast as it can */
    open_world(&w, NULL);
    w.step_ns = 30 * MS;
    run_rate(&w, id = create(&w), 100);
    run_until(&w, START_NS + 3 * SEC);
    assert_in_range(steps_of(&w, id), 99, 101);
    close_world(&w);
}

static void test_any_rate_is_bearable(void **state)
{
    static const double rates[] = {1e6, 1e-10, 1e-300, 5e-324, 1.0842e-10};
    (void)state;
    open_world(&w, NULL);
    for (size_t i = 0; i < sizeof rates / sizeof *rates; i++) {
        uint64_t id = create(&w);
        op_set(&w, IC_SIM_RUN, id,
               (struct ic_sim_opts){.set = IC_SET_RATE | IC_SET_FPS | IC_SET_FRAMES, .rate = rates[i], .fps = rates[i], .frames = true});
        for (int k = 0; k < 5; k++)
            tick(&w);
        assert_int_equal(steps_of(&w, id), rates[i] < 1 ? 1 : 5); /* the next one is a very long way off, not in the past */
        op(&w, IC_SIM_CLOSE, id);
        drop_events(&w);
    }
    close_world(&w);
}

static void test_a_new_rate_takes_effect_at_once(void **state)
{
    (void)state;
    open_world(&w, NULL);
    uint64_t id = create(&w);
    run_rate(&w, id, 0.001);
    tick(&w);
    run_until(&w, START_NS + SEC);
    assert_int_equal(steps_of(&w, id), 1);
    op_set(&w, IC_SIM_SET, id, (struct ic_sim_opts){.set = IC_SET_RATE, .rate = 10});
    run_until(&w, START_NS + 2 * SEC);
    assert_in_range(steps_of(&w, id), 10, 12);
    op_set(&w, IC_SIM_SET, id, (struct ic_sim_opts){.set = IC_SET_RATE, .rate = 0});
    run_until(&w, START_NS + 2 * SEC + 100 * MS);
    assert_in_range(steps_of(&w, id), 108, 113);
    close_world(&w);
}

/* ---- frames ------------------------------------------------------------------------------------------------------------- */

static uint64_t create_shown(struct world *v, struct ic_sim_opts opts)
{
    uint64_t id = ++v->last_sim;
    opts.set |= IC_SET_INIT;
    opts.init = IC_LAW_INIT_ZEROS;
    command(v, (struct ic_sim_cmd){.op = IC_SIM_CREATE, .owner = 1, .sim = id, .height = 4, .width = 4, .opts = opts});
    drop_events(v);
    return id;
}

/* Takes all events; the steps of the frames among them, in order. */
static int take_frames(struct world *v, int64_t *steps, int max)
{
    int n = 0;
    for (struct ic_event *ev; (ev = next_event(v)); ic_event_free(ev))
        if (ev->kind == IC_EVENT_SIM_FRAME && n < max)
            steps[n++] = ev->sim.step;
    return n;
}

static void test_frames_every_so_many_steps(void **state)
{
    int64_t at[64], n = 0;
    (void)state;
    open_world(&w, NULL);
    uint64_t id = create_shown(&w, (struct ic_sim_opts){.set = IC_SET_EVERY, .every = 3});
    run_steps(&w, id, 10);
    for (int i = 0; i < 10; i++) {
        tick(&w);
        n += take_frames(&w, at + n, 64);
    }
    assert_int_equal(n, 4);
    assert_int_equal(at[0], 3);
    assert_int_equal(at[1], 6);
    assert_int_equal(at[2], 9);
    assert_int_equal(at[3], 10); /* the last one of a run is always shown */
    assert_int_equal(w.c.frames, 4);
    assert_int_equal(w.c.frames_skipped, 0);
    op_set(&w, IC_SIM_SET, id, (struct ic_sim_opts){.set = IC_SET_FRAMES, .frames = false});
    run_steps(&w, id, 10);
    for (int i = 0; i < 10; i++)
        tick(&w);
    assert_int_equal(take_frames(&w, at, 64), 0);
    close_world(&w);
}

static void test_never_more_frames_than_fps(void **state)
{
    static const int64_t step_us[] = {300, 1000, 3700, 7000, 9500, 31000, 33300, 50000};
    (void)state;
    for (size_t k = 0; k < sizeof step_us / sizeof *step_us; k++) {
        int64_t at[4096], n = 0;
        open_world(&w, NULL);
        w.step_ns = step_us[k] * 1000;
        uint64_t id = create_shown(&w, (struct ic_sim_opts){.set = IC_SET_FPS, .fps = 30});
        run_steps(&w, id, -1);
        while (w.now < START_NS + 10 * SEC) {
            tick(&w);
            n += take_frames(&w, at + n, (int)(4096 - n));
        }
        int64_t possible = 10 * SEC / w.step_ns;
        CHECK(n <= 302);
        CHECK(n >= (possible < 300 ? possible : 300) * 9 / 10); /* and not far fewer where steps allow */
        close_world(&w);
    }
}

static void test_a_new_fps_takes_effect_at_once(void **state)
{
    int64_t at[64];
    (void)state;
    open_world(&w, NULL);
    uint64_t id = create_shown(&w, (struct ic_sim_opts){.set = IC_SET_FPS, .fps = 0.001});
    run_steps(&w, id, -1);
    run_until(&w, w.now + SEC);
    assert_int_equal(take_frames(&w, at, 64), 1);
    op_set(&w, IC_SIM_SET, id, (struct ic_sim_opts){.set = IC_SET_FPS, .fps = 20});
    int n = 0;
    for (int64_t until = w.now + SEC; w.now < until; n += take_frames(&w, at, 64))
        tick(&w);
    assert_in_range(n, 18, 21);
    close_world(&w);
}

static void test_frames_out_of_turn_do_not_silence_a_simulation(void **state)
{
    int64_t at[64];
    (void)state;
    open_world(&w, NULL);
    uint64_t id = create_shown(&w, (struct ic_sim_opts){.set = IC_SET_FPS, .fps = 10});
    for (int i = 0; i < 50; i++) {
        op_set(&w, IC_SIM_SET, id, (struct ic_sim_opts){.set = IC_SET_VIEW, .view = (enum ic_view)(i % IC_VIEW_COUNT)});
        assert_int_equal(take_frames(&w, at, 64), 1);
    }
    run_steps(&w, id, -1);
    run_until(&w, w.now + SEC);
    assert_in_range(take_frames(&w, at, 64), IC_SIM_FRAMES_IN_FLIGHT, IC_SIM_FRAMES_IN_FLIGHT); /* not one was taken */
    int n = 0;
    for (int64_t until = w.now + SEC; w.now < until; n += take_frames(&w, at, 64))
        tick(&w);
    assert_in_range(n, 9, 11);
    close_world(&w);
}

static void test_a_client_that_is_behind_gets_fewer_frames(void **state)
{
    (void)state;
    open_world(&w, NULL);
    uint64_t id = create_shown(&w, (struct ic_sim_opts){0});
    run_steps(&w, id, 100);
    for (int i = 0; i < 50; i++)
        tick(&w);
    assert_int_equal(w.c.frames, IC_SIM_FRAMES_IN_FLIGHT); /* the others were not even drawn */
    assert_int_equal(w.c.frames_skipped, 50 - IC_SIM_FRAMES_IN_FLIGHT);
    assert_int_equal(steps_of(&w, id), 50); /* and nothing was held up */
    struct ic_event *ev = event_of(&w, IC_EVENT_SIM_FRAME);
    assert_int_equal(ev->sim.step, 1);
    ic_event_free(ev); /* one taken: one more may come */
    tick(&w);
    tick(&w);
    assert_int_equal(w.c.frames, IC_SIM_FRAMES_IN_FLIGHT + 1);
    /* a simulation that has gone frees its credit with the last of its frames */
    op(&w, IC_SIM_CLOSE, id);
    close_world(&w);
}

static void test_the_last_frame_is_not_lost(void **state)
{
    int64_t at[64];
    (void)state;
    open_world(&w, NULL);
    uint64_t id = create_shown(&w, (struct ic_sim_opts){0});
    run_steps(&w, id, 10);
    for (int i = 0; i < 10; i++)
        tick(&w);
    /* the run is over, the client has taken nothing: the frame of step 10 is owed, and looked after now and then */
    int64_t next = tick(&w);
    assert_in_range(next, w.now + 1, w.now + 100 * MS);
    w.now = next;
    assert_int_equal(take_frames(&w, at, 64), IC_SIM_FRAMES_IN_FLIGHT);
    assert_int_equal(tick(&w), INT64_MAX);
    assert_int_equal(take_frames(&w, at, 64), 1);
    assert_int_equal(at[0], 10);
    /* so is the picture after a change of view, once, however many the changes */
    for (int i = 0; i < 10; i++)
        op_set(&w, IC_SIM_SET, id, (struct ic_sim_opts){.set = IC_SET_VIEW, .view = i == 9 ? IC_VIEW_REAL : IC_VIEW_PHASE});
    assert_int_equal(take_frames(&w, at, 64), IC_SIM_FRAMES_IN_FLIGHT);
    tick(&w);
    struct ic_event *ev = event_of(&w, IC_EVENT_SIM_FRAME);
    assert_int_equal(ev->sim.view.view, IC_VIEW_REAL);
    ic_event_free(ev);
    assert_null(next_event(&w));
    assert_int_equal(tick(&w), INT64_MAX);
    /* not one of a simulation whose client wants no frames any more, or that runs again */
    for (int i = 0; i < 5; i++)
        op_set(&w, IC_SIM_SET, id, (struct ic_sim_opts){.set = IC_SET_VIEW, .view = IC_VIEW_PHASE});
    op_set(&w, IC_SIM_SET, id, (struct ic_sim_opts){.set = IC_SET_FRAMES, .frames = false});
    assert_int_equal(tick(&w), INT64_MAX);
    drop_events(&w);
    assert_int_equal(tick(&w), INT64_MAX);
    assert_null(next_event(&w));
    close_world(&w);
}

static void test_what_is_changed_while_paused_is_shown(void **state)
{
    struct ic_event *ev;
    (void)state;
    open_world(&w, NULL);
    uint64_t id = create_shown(&w, (struct ic_sim_opts){0});
    static const struct ic_sim_opts redraw[] = {
        {.set = IC_SET_VIEW, .view = IC_VIEW_DENSITY},
        {.set = IC_SET_ENCODING, .encoding = IC_VIEW_F32},
        {.set = IC_SET_ROI, .roi = {1, 2, 3, 2}},
    };
    for (size_t i = 0; i < sizeof redraw / sizeof *redraw; i++) {
        op_set(&w, IC_SIM_SET, id, redraw[i]);
        ev = event_of(&w, IC_EVENT_SIM_FRAME);
        assert_non_null(ev);
        assert_int_equal(ev->sim.frame.dtype, i ? IC_VIEW_F32 : IC_VIEW_U8);
        assert_int_equal(ev->len, (i == 2 ? 6 : 16) * (i ? 4 : 1));
        ic_event_free(ev);
    }
    command(&w, (struct ic_sim_cmd){.op = IC_SIM_TOOL, .owner = 1, .sim = id, .tool = IC_LAW_TOOL_COUNT});
    expect_error(&w, IC_BAD_REQUEST);
    struct ic_sim_cmd tool = {.op = IC_SIM_TOOL, .owner = 1, .sim = id, .tool = IC_LAW_TOOL_VORTEX};
    ic_law_tool_args_init(&tool.tool_args);
    command(&w, tool);
    ev = event_of(&w, IC_EVENT_SIM_FRAME);
    assert_non_null(ev);
    ic_event_free(ev);
    op(&w, IC_SIM_RESET, id);
    ev = event_of(&w, IC_EVENT_SIM_FRAME);
    assert_non_null(ev);
    ic_event_free(ev);
    op_set(&w, IC_SIM_SET, id, (struct ic_sim_opts){.set = IC_SET_GAMMA, .gamma = 0.5}); /* nothing to see */
    assert_null(event_of(&w, IC_EVENT_SIM_FRAME));
    run_steps(&w, id, -1);
    op_set(&w, IC_SIM_SET, id, redraw[0]); /* the next step will show it */
    assert_null(event_of(&w, IC_EVENT_SIM_FRAME));
    close_world(&w);
}

static void test_metrics_and_extras_travel_with_frames(void **state)
{
    int with = 0, frames = 0;
    (void)state;
    open_world(&w, NULL);
    uint64_t id = create_shown(&w, (struct ic_sim_opts){.set = IC_SET_METRICS | IC_SET_EXTRAS,
                                                        .metrics = true,
                                                        .metrics_ns = 10 * MS,
                                                        .extras = IC_EXTRA_HSV | IC_EXTRA_COMPLEX | IC_EXTRA_FLOW |
                                                                  IC_EXTRA_ATTRACTOR | IC_EXTRA_POINCARE});
    run_steps(&w, id, 100);
    for (int i = 0; i < 100; i++) {
        tick(&w);
        for (struct ic_event *ev; (ev = event_of(&w, IC_EVENT_SIM_FRAME)); ic_event_free(ev)) {
            frames++;
            with += ev->sim.has_metrics;
            assert_int_equal(ev->len, ev->sim.frame.bytes + (7 * 16 + 6 + 2 * ev->sim.n_poincare) * sizeof(float));
            if (ev->sim.has_metrics)
                assert_true(ev->sim.metrics.energy == (double)ev->sim.step * (double)ev->sim.step); /* psi[0] counts */
        }
    }
    assert_int_equal(frames, 100);
    assert_int_equal(with, 10);
    close_world(&w);
}

/* ---- events --------------------------------------------------------------------------------------------------------------- */

static void expect_sim(struct world *v, enum ic_event_kind kind, uint64_t id, uint64_t rid, int64_t step, int64_t left)
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

static void test_events_are_exact(void **state)
{
    (void)state;
    open_world(&w, NULL);
    uint64_t id = create_on(&w, 0, 4, 1);
    expect_sim(&w, IC_EVENT_SIM_CREATED, id, w.last_rid, 0, 0);
    run_steps(&w, id, 3);
    expect_sim(&w, IC_EVENT_SIM_STATUS, id, w.last_rid, 0, 3);
    tick(&w);
    assert_null(next_event(&w));
    op(&w, IC_SIM_SET, id);
    expect_sim(&w, IC_EVENT_SIM_STATUS, id, w.last_rid, 1, 2);
    tick(&w);
    tick(&w);
    expect_sim(&w, IC_EVENT_SIM_STATUS, id, 0, 3, 0); /* the run is over */
    assert_int_equal(tick(&w), INT64_MAX);
    run_steps(&w, id, -1);
    expect_sim(&w, IC_EVENT_SIM_STATUS, id, w.last_rid, 3, -1);
    tick(&w);
    op(&w, IC_SIM_PAUSE, id);
    expect_sim(&w, IC_EVENT_SIM_STATUS, id, w.last_rid, 4, 0);
    op(&w, IC_SIM_PAUSE, id); /* again: no harm */
    expect_sim(&w, IC_EVENT_SIM_STATUS, id, w.last_rid, 4, 0);
    op(&w, IC_SIM_STATE, id);
    struct ic_event *ev = next_event(&w);
    assert_int_equal(ev->kind, IC_EVENT_SIM_STATE);
    assert_int_equal(ev->len, PSI_FLOATS * sizeof(float));
    float first;
    memcpy(&first, ev->text, sizeof first);
    assert_true(first == 4);
    ic_event_free(ev);
    op(&w, IC_SIM_RESET, id);
    expect_sim(&w, IC_EVENT_SIM_STATUS, id, w.last_rid, 0, 0);
    assert_true(sim_named(&w, id)->psi[0] == 0);
    run_steps(&w, id, 5);
    expect_sim(&w, IC_EVENT_SIM_STATUS, id, w.last_rid, 0, 5);
    run_steps(&w, id, 2); /* a run replaces the one under way */
    expect_sim(&w, IC_EVENT_SIM_STATUS, id, w.last_rid, 0, 2);
    op(&w, IC_SIM_CLOSE, id);
    expect_sim(&w, IC_EVENT_SIM_CLOSED, id, w.last_rid, 0, 2);
    assert_int_equal(tick(&w), INT64_MAX);
    /* what is gone or somebody else's does not exist */
    op(&w, IC_SIM_RUN, id);
    expect_error(&w, IC_NOT_FOUND);
    id = create(&w);
    for (int o = IC_SIM_RUN; o <= IC_SIM_CLOSE; o++) {
        command(&w, (struct ic_sim_cmd){.op = (enum ic_sim_op)o, .owner = 2, .sim = id});
        ev = next_event(&w);
        assert_int_equal(ev->kind, IC_EVENT_ERROR);
        assert_int_equal(ev->owner, 2);
        assert_int_equal(ev->code, IC_NOT_FOUND);
        ic_event_free(ev);
    }
    assert_int_equal(w.c.sims, 1);
    /* nor can a prediction be commanded */
    predict(&w, 0, PSI_FLOATS);
    command(&w, (struct ic_sim_cmd){.op = IC_SIM_CLOSE, .owner = 77, .sim = w.last_sim});
    expect_error(&w, IC_NOT_FOUND);
    close_world(&w);
}

static void test_memory_of_a_law_is_kept_and_given_back(void **state)
{
    size_t psi = 8 * 8 * 3 * 2, memory = 2 * 2 * 2 * 32;
    (void)state;
    open_world(&w, NULL);
    float *v = calloc(psi + memory, sizeof *v);
    v[psi] = 5;              /* h[0] */
    v[psi + memory - 1] = 7; /* c, the last */
    command(&w, (struct ic_sim_cmd){.op = IC_SIM_PREDICT, .owner = 1, .sim = 1, .law = 2, .height = 8, .width = 8, .state = v, .state_floats = psi + memory});
    tick(&w);
    struct ic_event *ev = event_of(&w, IC_EVENT_SIM_PREDICTED);
    assert_int_equal(ev->len, (psi + memory) * sizeof(float));
    float *got = malloc(ev->len);
    memcpy(got, ev->text, ev->len);
    assert_true(got[0] == 1 && got[psi] == 6 && got[psi + memory - 1] == 8);
    free(got);
    ic_event_free(ev);
    /* without it: zero */
    command(&w, (struct ic_sim_cmd){.op = IC_SIM_PREDICT, .owner = 1, .sim = 1, .law = 2, .height = 8, .width = 8, .state = calloc(psi, 4), .state_floats = psi});
    tick(&w);
    ev = event_of(&w, IC_EVENT_SIM_PREDICTED);
    got = malloc(ev->len);
    memcpy(got, ev->text, ev->len);
    assert_true(got[psi] == 1 && got[psi + memory - 1] == 1);
    free(got);
    ic_event_free(ev);
    close_world(&w);
}

/* ---- limits ----------------------------------------------------------------------------------------------------------------- */

static void test_limits(void **state)
{
    struct ic_law_limits lim = default_limits;
    (void)state;
    lim.sims_max = 3;
    lim.frame_max = 8 * 8 * 4;
    open_world(&w, &lim);
    create_on(&w, LAWS, 4, 1);
    expect_error(&w, IC_NOT_FOUND);
    create_on(&w, 0, 0, 1);
    expect_error(&w, IC_TOO_LARGE);
    create_on(&w, 0, 68, 1);
    expect_error(&w, IC_TOO_LARGE);
    create_on(&w, 0, 6, 1);
    expect_error(&w, IC_BAD_REQUEST);
    w.open_fails = true;
    create_on(&w, 0, 4, 1);
    expect_error(&w, IC_INTERNAL);
    w.open_fails = false;
    assert_int_equal(w.plans, 0);
    for (int i = 0; i < 3; i++) {
        create_on(&w, 0, 4, 1);
        drop_events(&w);
    }
    create_on(&w, 0, 4, 1);
    expect_error(&w, IC_BUSY);
    predict(&w, 0, PSI_FLOATS);
    expect_error(&w, IC_BUSY);
    op(&w, IC_SIM_CLOSE, 6);
    drop_events(&w);
    predict(&w, 0, PSI_FLOATS - 2);
    expect_error(&w, IC_BAD_REQUEST);
    assert_int_equal(w.c.sims, 2);
    uint64_t had = w.c.created;
    float *bad = calloc(30, sizeof *bad);
    command(&w, (struct ic_sim_cmd){.op = IC_SIM_CREATE, .owner = 1, .sim = 90, .height = 4, .width = 4, .state = bad, .state_floats = 30});
    expect_error(&w, IC_BAD_REQUEST);
    assert_int_equal(w.c.sims, 2); /* a refused one leaves nothing behind */
    assert_int_equal(w.c.created, had);
    /* frames that could never be sent are refused when they are asked for, unless none are wanted */
    struct ic_sim_cmd big = {.op = IC_SIM_CREATE, .owner = 1, .sim = 91, .height = 64, .width = 64};
    command(&w, big);
    expect_error(&w, IC_TOO_LARGE);
    big.opts = (struct ic_sim_opts){.set = IC_SET_FRAMES};
    command(&w, big);
    struct ic_event *ev = next_event(&w);
    assert_int_equal(ev->kind, IC_EVENT_SIM_CREATED);
    ic_event_free(ev);
    op_set(&w, IC_SIM_SET, 91, (struct ic_sim_opts){.set = IC_SET_FRAMES, .frames = true});
    expect_error(&w, IC_TOO_LARGE);
    op_set(&w, IC_SIM_SET, 91, (struct ic_sim_opts){.set = IC_SET_FRAMES | IC_SET_ROI, .frames = true, .roi = {0, 0, 8, 8}});
    drop_events(&w);
    op_set(&w, IC_SIM_SET, 91, (struct ic_sim_opts){.set = IC_SET_ROI, .roi = {60, 0, 8, 8}});
    expect_error(&w, IC_BAD_REQUEST);
    assert_int_equal(sim_named(&w, 91)->o.roi.x, 0); /* nothing was changed */
    /* nor is a state that could never be sent copied */
    op(&w, IC_SIM_STATE, 91);
    expect_error(&w, IC_TOO_LARGE);
    assert_int_equal(w.c.refused, 13);
    close_world(&w);
}

static void test_memory(void **state)
{
    struct ic_law_limits lim = default_limits;
    size_t psi = 4 * 4 * 2 * sizeof(float); /* 128 bytes of law 0 on 4 x 4, a multiple of 64 */
    (void)state;
    lim.max_batch = 4;
    lim.memory_max = 1000 + 4 * psi + 3 * psi; /* a plan, its deltas, three simulations */
    open_world(&w, &lim);
    for (int i = 0; i < 3; i++) {
        create_on(&w, 0, 4, 1);
        drop_events(&w);
    }
    create_on(&w, 0, 4, 1);
    expect_error(&w, IC_OOM);
    create_on(&w, 1, 4, 1);
    expect_error(&w, IC_OOM);
    predict(&w, 0, PSI_FLOATS);
    expect_error(&w, IC_OOM);
    assert_int_equal(w.plans, 1);
    for (uint64_t id = 1; id <= 3; id++)
        op(&w, IC_SIM_CLOSE, id);
    drop_events(&w);
    assert_int_equal(w.c.state_bytes, 0);
    assert_int_equal(w.plans, 1); /* it may be wanted again: kept */
    create_on(&w, 0, 4, 1);
    assert_int_equal(w.opens, 1);
    drop_events(&w);
    op(&w, IC_SIM_CLOSE, w.last_sim);
    drop_events(&w);
    create_on(&w, 1, 4, 1); /* another plan: the unused one makes room */
    expect_sim(&w, IC_EVENT_SIM_CREATED, w.last_sim, w.last_rid, 0, 0);
    assert_int_equal(w.plans, 1);
    close_world(&w);

    /* the longest unused goes first, and one in use never */
    lim.memory_max = 3 * (1000 + 4 * psi) + 2 * psi + 700;
    open_world(&w, &lim);
    w.laws[1] = w.laws[2] = w.laws[0];
    uint64_t keep = create_on(&w, 0, 4, 1), b = create_on(&w, 1, 4, 1);
    op(&w, IC_SIM_CLOSE, b);
    w.now += SEC;
    uint64_t c = create_on(&w, 2, 4, 1);
    w.now += SEC;
    op(&w, IC_SIM_CLOSE, c);
    assert_int_equal(w.plans, 3);
    command(&w, (struct ic_sim_cmd){.op = IC_SIM_CREATE, .owner = 1, .sim = 99, .height = 4, .width = 8});
    drop_events(&w);
    assert_non_null(sim_named(&w, 99));
    assert_int_equal(w.plans, 3);
    for (const struct group *g = w.s->groups; g; g = g->next)
        assert_int_not_equal(g->law, 1);
    assert_non_null(sim_named(&w, keep));
    close_world(&w);

    /* they go for a simulation of a plan that is there, too */
    lim.memory_max = 2 * (1000 + 4 * psi) + 2 * psi;
    open_world(&w, &lim);
    w.laws[1] = w.laws[0];
    op(&w, IC_SIM_CLOSE, create_on(&w, 1, 4, 1));
    for (int i = 0; i < 3; i++)
        create_on(&w, 0, 4, 1);
    drop_events(&w);
    assert_int_equal(w.c.sims, 3);
    assert_int_equal(w.plans, 1);
    close_world(&w);

    /* where a whole batch does not fit, a smaller one does */
    lim.max_batch = 16;
    lim.memory_max = 1000 + 6 * psi;
    open_world(&w, &lim);
    uint64_t id = create_on(&w, 0, 4, 1);
    expect_sim(&w, IC_EVENT_SIM_CREATED, id, w.last_rid, 0, 0);
    assert_int_equal(w.s->groups->plan->max_n, 4);
    create_on(&w, 0, 4, 1);
    drop_events(&w);
    assert_int_equal(w.c.sims, 2);
    run_steps(&w, id, -1);
    tick(&w);
    close_world(&w);
    lim.memory_max = 1000 + psi;
    open_world(&w, &lim);
    create_on(&w, 0, 4, 1);
    expect_error(&w, IC_OOM);
    assert_int_equal(w.plans, 0);
    close_world(&w);
}

/* ---- random schedules --------------------------------------------------------------------------------------------------------- */

#define SIMS 40
#define OWNERS 5

/* What the model knows of a simulation. */
struct shadow {
    uint64_t id, owner;
    int64_t step, left;
    float count; /* psi[0] */
    bool predict;
};

struct model {
    struct shadow sim[SIMS];
    uint64_t steps, predicts, gone_before; /* gone_before: events up to here may name owners that have gone since */
    bool gone[OWNERS + 1];
};

static struct shadow *shadow_of(struct model *m, uint64_t id)
{
    for (int i = 0; i < SIMS; i++)
        if (id && m->sim[i].id == id)
            return &m->sim[i];
    return NULL;
}

static void model_step(struct world *v, uint64_t id)
{
    struct model *m = v->arg;
    struct shadow *sh = shadow_of(m, id);
    CHECK(sh && sh->left != 0); /* not one that is paused or gone */
    sh->step++;
    sh->count++;
    sh->left -= sh->left > 0;
    m->steps++;
}

static float first_of(const struct ic_event *ev)
{
    float v;
    memcpy(&v, ev->text, sizeof v);
    return v;
}

/* Events that came by themselves: of steps just done. */
static void check_events(struct world *v, struct model *m, struct ic_event **held, int *n_held)
{
    for (struct ic_event *ev; (ev = next_event(v));) {
        struct shadow *sh = shadow_of(m, ev->sim.sim);
        CHECK(sh && sh->owner == ev->owner);
        CHECK(ev->kind == IC_EVENT_SIM_STATUS || ev->kind == IC_EVENT_SIM_FRAME || ev->kind == IC_EVENT_SIM_PREDICTED);
        if (ev->kind == IC_EVENT_SIM_PREDICTED) {
            CHECK(sh->predict && sh->step == 1 && first_of(ev) == sh->count);
            m->predicts++;
            *sh = (struct shadow){0};
        } else {
            CHECK(!sh->predict && ev->sim.step == sh->step && ev->sim.left == sh->left);
        }
        if (ev->kind == IC_EVENT_SIM_STATUS)
            CHECK(ev->rid == 0 && sh->left == 0);
        if (ev->kind == IC_EVENT_SIM_FRAME && *n_held < 64 && rnd(v, 2))
            held[(*n_held)++] = ev; /* a slow client */
        else
            ic_event_free(ev);
    }
}

/* The one answer to a command, and maybe a picture after it. */
static void check_answer(struct world *v, const struct shadow *sh, enum ic_event_kind kind, uint64_t rid)
{
    struct ic_event *ev = next_event(v);
    if (ev && ev->kind != kind)
        printf("want %d, got %d: %s\n", kind, ev->kind, ev->kind == IC_EVENT_ERROR ? ev->text : "");
    CHECK(ev && ev->kind == kind && ev->rid == rid);
    if (kind != IC_EVENT_ERROR)
        CHECK(ev->sim.sim == sh->id && ev->owner == sh->owner && ev->sim.step == sh->step && ev->sim.left == sh->left);
    if (kind == IC_EVENT_SIM_STATE)
        CHECK(first_of(ev) == sh->count);
    ic_event_free(ev);
    while ((ev = next_event(v))) {
        CHECK(ev->kind == IC_EVENT_SIM_FRAME && sh->left == 0);
        ic_event_free(ev);
    }
}

static struct ic_sim_opts random_opts(struct world *v)
{
    return (struct ic_sim_opts){
        .set = (unsigned)rnd(v, IC_SET_EXTRAS * 2) & ~(unsigned)(IC_SET_STEPS | IC_SET_INIT),
        .view = (enum ic_view)rnd(v, IC_VIEW_COUNT),
        .every = 1 + (int64_t)rnd(v, 4),
        .fps = rnd(v, 2) ? 0 : (double)rnd(v, 200),
        .rate = rnd(v, 2) ? 0 : (double)rnd(v, 300),
        .encoding = (enum ic_view_encoding)rnd(v, 2),
        .roi = rnd(v, 2) ? (struct ic_view_roi){1, 1, 2, 2} : (struct ic_view_roi){0},
        .metrics = rnd(v, 4) == 0,
        .extras = rnd(v, 4) ? 0 : (unsigned)rnd(v, 32),
        .frames = rnd(v, 4) != 0,
        .gamma = 0.1,
        .seed = rnd(v, 100),
    };
}

static void random_command(struct world *v, struct model *m)
{
    unsigned kind = (unsigned)rnd(v, 100);
    struct shadow *sh = &m->sim[rnd(v, SIMS)];
    struct ic_sim_cmd cmd = {.owner = 1 + rnd(v, OWNERS), .opts = random_opts(v)};
    unsigned law = (unsigned)rnd(v, LAWS), side = 4 * (1 + (unsigned)rnd(v, 2));

    if (!sh->id && kind < 70) { /* create, or predict */
        size_t floats = (size_t)side * side * (law + 1) * 2;
        cmd.op = rnd(v, 3) ? IC_SIM_CREATE : IC_SIM_PREDICT;
        cmd.sim = ++v->last_sim;
        cmd.law = law;
        cmd.height = cmd.width = side;
        cmd.opts.set |= IC_SET_INIT;
        cmd.opts.init = IC_LAW_INIT_ZEROS;
        float start = 0;
        if (cmd.op == IC_SIM_PREDICT || rnd(v, 2)) {
            cmd.state = calloc(floats, sizeof(float));
            cmd.state_floats = floats;
            cmd.state[0] = start = (float)rnd(v, 1000);
        }
        struct shadow s = {.id = cmd.sim, .owner = cmd.owner, .count = start};
        uint64_t rid = command(v, cmd);
        if (v->event[v->seen % EVENTS] && v->seen < v->n_events && v->event[v->seen % EVENTS]->kind == IC_EVENT_ERROR) {
            struct ic_event *ev = next_event(v);
            CHECK(ev->code == IC_BUSY || ev->code == IC_OOM);
            ic_event_free(ev);
            CHECK(!next_event(v));
            return;
        }
        if (cmd.op == IC_SIM_CREATE) {
            check_answer(v, &s, IC_EVENT_SIM_CREATED, rid);
        } else {
            s.predict = true;
            s.left = 1;
            CHECK(v->seen == v->n_events); /* it answers with its result only */
        }
        *sh = s;
        return;
    }
    if (kind >= 98) { /* a connection ends: its simulations go, unheard */
        cmd.op = IC_SIM_OWNER_GONE;
        command(v, cmd);
        CHECK(v->seen == v->n_events);
        for (int i = 0; i < SIMS; i++)
            if (m->sim[i].id && m->sim[i].owner == cmd.owner)
                m->sim[i] = (struct shadow){0};
        return;
    }
    static const enum ic_sim_op ops[] = {IC_SIM_RUN, IC_SIM_RUN, IC_SIM_RUN, IC_SIM_PAUSE, IC_SIM_SET, IC_SIM_STATE, IC_SIM_RESET, IC_SIM_CLOSE};
    cmd.op = ops[rnd(v, sizeof ops / sizeof *ops)];
    cmd.sim = sh->id ? sh->id : 1 + rnd(v, v->last_sim + 1);
    if (!sh->id && shadow_of(m, cmd.sim))
        sh = shadow_of(m, cmd.sim);
    if (sh->id && rnd(v, 20)) /* else anybody's */
        cmd.owner = sh->owner;
    bool mine = sh->id && cmd.owner == sh->owner && !sh->predict;
    if (cmd.op == IC_SIM_RUN && rnd(v, 2)) {
        cmd.opts.set |= IC_SET_STEPS;
        cmd.opts.steps = rnd(v, 4) ? 1 + (int64_t)rnd(v, 20) : -1;
    }
    if (cmd.op == IC_SIM_RESET) {
        cmd.opts.set |= IC_SET_INIT;
        cmd.opts.init = IC_LAW_INIT_ZEROS;
    }
    uint64_t rid = command(v, cmd);
    if (!mine) {
        check_answer(v, sh, IC_EVENT_ERROR, rid);
        return;
    }
    if (cmd.op == IC_SIM_RUN)
        sh->left = cmd.opts.set & IC_SET_STEPS ? cmd.opts.steps : -1;
    if (cmd.op == IC_SIM_PAUSE)
        sh->left = 0;
    if (cmd.op == IC_SIM_RESET)
        sh->step = 0, sh->count = 0;
    check_answer(v, sh, cmd.op == IC_SIM_STATE ? IC_EVENT_SIM_STATE : cmd.op == IC_SIM_CLOSE ? IC_EVENT_SIM_CLOSED : IC_EVENT_SIM_STATUS, rid);
    if (cmd.op == IC_SIM_CLOSE)
        *sh = (struct shadow){0};
}

static void one_schedule(uint64_t seed)
{
    static struct model m;
    struct ic_event *held[64];
    int n_held = 0;
    struct ic_law_limits lim = default_limits;

    seed_now = seed;
    memset(&m, 0, sizeof m);
    w.rng = seed;
    rnd(&w, 2);
    uint64_t rng = w.rng;
    lim.max_batch = 1 + (unsigned)rnd(&w, 8);
    lim.batch_timeout_ns = (int64_t)rnd(&w, 3) * 20 * MS;
    lim.sims_max = rnd(&w, 4) ? 1000 : 10;
    lim.memory_max = rnd(&w, 4) ? 64 << 20 : 20000;
    open_world(&w, &lim);
    w.rng = rng * 3 + 1;
    w.on_step = model_step;
    w.arg = &m;
    w.limit = rnd(&w, 3) ? 0 : 1 + (unsigned)rnd(&w, 4);
    w.step_ns = rnd(&w, 2) ? 1000 : 5 * MS;
    w.step_ns_each = rnd(&w, 2) ? 0 : MS;
    int64_t next = 0, commands = 30 + (int64_t)rnd(&w, 200);
    for (int64_t i = 0; i < commands; i++) {
        for (uint64_t k = rnd(&w, 4); k > 0; k--)
            random_command(&w, &m);
        for (uint64_t k = rnd(&w, 6); k > 0; k--) {
            next = tick(&w);
            check_events(&w, &m, held, &n_held);
            if (next > w.now && rnd(&w, 2))
                w.now = next < w.now + SEC ? next : w.now + SEC;
        }
        while (n_held && rnd(&w, 2))
            ic_event_free(held[--n_held]);
        if (rnd(&w, 8) == 0)
            w.now += (int64_t)rnd(&w, 100) * MS;
    }
    CHECK(m.steps == w.c.steps && w.c.sims == (int64_t)w.c.sims);
    /* all finite runs end, and all predictions */
    for (int i = 0; i < SIMS; i++)
        if (m.sim[i].id && m.sim[i].left < 0) {
            uint64_t rid = command(&w, (struct ic_sim_cmd){.op = IC_SIM_PAUSE, .owner = m.sim[i].owner, .sim = m.sim[i].id});
            m.sim[i].left = 0;
            check_answer(&w, &m.sim[i], IC_EVENT_SIM_STATUS, rid);
        }
    while (n_held)
        ic_event_free(held[--n_held]);
    for (int i = 0; w.c.running && i < 100000; i++) {
        next = tick(&w);
        check_events(&w, &m, held, &n_held);
        while (n_held)
            ic_event_free(held[--n_held]);
        w.now = next > w.now ? next : w.now;
    }
    CHECK(!w.c.running);
    CHECK(m.predicts + (uint64_t)0 <= w.c.predicts);
    /* half the schedules close everything one by one, the others leave it to the end of the scheduler */
    if (seed & 1) {
        for (uint64_t o = 1; o <= OWNERS; o++)
            command(&w, (struct ic_sim_cmd){.op = IC_SIM_OWNER_GONE, .owner = o});
        CHECK(!w.c.sims && !w.c.state_bytes && !w.s->sims);
        CHECK(tick(&w) == INT64_MAX);
    }
    close_world(&w);
}

static void test_random_schedules(void **state)
{
    const char *seed = getenv("IC_SEED"), *rounds = getenv("IC_ROUNDS");
    uint64_t first = seed ? strtoull(seed, NULL, 10) : 1, n = rounds ? strtoull(rounds, NULL, 10) : seed ? 1 : 3000;
    (void)state;
    for (uint64_t i = 0; i < n; i++)
        one_schedule(first + i);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_batches_are_full_and_re_formed),
        cmocka_unit_test(test_a_lone_simulation_never_waits),
        cmocka_unit_test(test_free_ones_are_not_held_back_by_paced_ones),
        cmocka_unit_test(test_paced_ones_wait_for_company_that_can_come),
        cmocka_unit_test(test_no_wait_is_longer_than_the_timeout),
        cmocka_unit_test(test_predictions_find_company_once_it_was_seen),
        cmocka_unit_test(test_everybody_gets_the_same),
        cmocka_unit_test(test_groups_take_turns),
        cmocka_unit_test(test_odd_grids_get_aligned_buffers),
        cmocka_unit_test(test_batch_limit_is_honoured),
        cmocka_unit_test(test_a_rate_is_kept),
        cmocka_unit_test(test_any_rate_is_bearable),
        cmocka_unit_test(test_a_new_rate_takes_effect_at_once),
        cmocka_unit_test(test_frames_every_so_many_steps),
        cmocka_unit_test(test_never_more_frames_than_fps),
        cmocka_unit_test(test_a_new_fps_takes_effect_at_once),
        cmocka_unit_test(test_frames_out_of_turn_do_not_silence_a_simulation),
        cmocka_unit_test(test_a_client_that_is_behind_gets_fewer_frames),
        cmocka_unit_test(test_the_last_frame_is_not_lost),
        cmocka_unit_test(test_what_is_changed_while_paused_is_shown),
        cmocka_unit_test(test_metrics_and_extras_travel_with_frames),
        cmocka_unit_test(test_events_are_exact),
        cmocka_unit_test(test_memory_of_a_law_is_kept_and_given_back),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_random_schedules),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
