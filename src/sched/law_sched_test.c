/* The Law M scheduler over a fake stepper and a fake clock: batches, rates, and thousands of random
 * schedules against a model of what every simulation must have done.
 *
 * IC_SEED=n and IC_ROUNDS=n choose other schedules; a failure prints the seed of its schedule. */
#include "sched/law_world.h"

/* ---- batches ------------------------------------------------------------------------------------ */

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
    assert_int_equal(last_batch(&w)->id[0] + last_batch(&w)->id[1] + last_batch(&w)->id[2],
                     id[0] + id[2] + late);
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

/* ---- rates -------------------------------------------------------------------------------------- */

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
    /* a stall: one step at once, perhaps one more, then the rate again; what was missed is not made up for
     */
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
        const unsigned set = IC_SET_RATE | IC_SET_FPS | IC_SET_FRAMES;
        op_set(&w, IC_SIM_RUN, id,
               (struct ic_sim_opts){.set = set, .rate = rates[i], .fps = rates[i], .frames = true});
        for (int k = 0; k < 5; k++)
            tick(&w);
        /* the next one is a very long way off, not in the past */
        assert_int_equal(steps_of(&w, id), rates[i] < 1 ? 1 : 5);
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

/* ---- random schedules --------------------------------------------------------------------------- */

#define SIMS 40
#define OWNERS 5

/* What the model knows of a simulation. */
struct shadow {
    uint64_t id, owner;
    int64_t step, left;
    float count;          /* psi[0] */
    bool predict, failed; /* failed: it is yet to be told that its step was not made */
    bool lost, back;      /* likewise that steps were lost; it was told, and its status is to follow */
};

struct model {
    struct shadow sim[SIMS];
    uint64_t steps, predicts, failed, told,
        gone_before; /* gone_before: events up to here may name owners that have gone since */
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

/* Whoever has steps to do on this plan is told and pauses; a prediction is over. */
static void model_fail(struct world *v, const struct ic_law_group *g)
{
    struct model *m = v->arg;
    for (const struct sim *x = v->s->sims; x; x = x->next_all)
        if (x->g->plan == g && x->left) {
            struct shadow *sh = shadow_of(m, x->id);
            CHECK(sh && sh->left != 0);
            sh->left = 0;
            sh->failed = true;
            m->failed++;
        }
}

/* The device is lost, with steps that the scheduler learns of now. */
static void model_lost(struct world *v, uint64_t id, uint64_t steps)
{
    struct shadow *sh = shadow_of(v->arg, id);
    CHECK(sh && !sh->predict && v->lost);
    sh->step -= (int64_t)steps;
    sh->count -= (float)steps;
    /* one whose last steps these were has a run still */
    sh->left += sim_named(v, id)->left > 0 ? (int64_t)steps : 0;
    sh->lost = true;
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
        CHECK(ev->kind == IC_EVENT_SIM_STATUS || ev->kind == IC_EVENT_SIM_FRAME ||
              ev->kind == IC_EVENT_SIM_PREDICTED || ev->kind == IC_EVENT_ERROR);
        if (ev->kind == IC_EVENT_ERROR && ev->code == IC_UNAVAILABLE) {
            CHECK(sh->lost);
            sh->lost = false;
            sh->back = true;
            ic_event_free(ev);
            continue;
        }
        if (ev->kind == IC_EVENT_ERROR) {
            CHECK(sh->failed && ev->code == IC_OOM);
            sh->failed = false;
            m->told++;
            if (sh->predict)
                *sh = (struct shadow){0};
            ic_event_free(ev);
            continue;
        }
        CHECK(!sh->failed || (ev->kind == IC_EVENT_SIM_FRAME && v->st.draw)); /* of the step before */
        if (ev->kind == IC_EVENT_SIM_PREDICTED) {
            CHECK(sh->predict && sh->step == 1 && first_of(ev) == sh->count);
            m->predicts++;
            *sh = (struct shadow){0};
        } else if (ev->kind == IC_EVENT_SIM_FRAME && v->st.draw) { /* it may be of the step before */
            CHECK(!sh->predict && (v->lost || ev->sim.step <= sh->step));
        } else if (ev->kind == IC_EVENT_SIM_STATUS && sh->back) { /* and steps were made since */
            CHECK(!sh->predict && ev->sim.step <= sh->step && ev->rid == 0);
        } else {
            CHECK(!sh->predict && ev->sim.step == sh->step && ev->sim.left == sh->left);
        }
        if (ev->kind == IC_EVENT_SIM_STATUS) {
            CHECK(ev->rid == 0 && (sh->left == 0 || sh->back));
            sh->back = false;
        }
        if (ev->kind == IC_EVENT_SIM_FRAME && *n_held < 64 && rnd(v, 2))
            held[(*n_held)++] = ev; /* a slow client */
        else
            ic_event_free(ev);
    }
}

/* With a device: frames of the step before that a command let come first, and what a command finds lost. */
static struct ic_event *skip_device(struct world *v)
{
    struct ic_event *ev;
    for (; (ev = next_event(v)); ic_event_free(ev)) {
        struct shadow *sh = shadow_of(v->arg, ev->sim.sim);
        if (ev->kind == IC_EVENT_SIM_FRAME && v->st.draw)
            continue;
        if (ev->kind == IC_EVENT_ERROR && ev->code == IC_UNAVAILABLE) {
            CHECK(sh && sh->lost);
            sh->lost = false;
            sh->back = true;
        } else if (ev->kind == IC_EVENT_SIM_STATUS && ev->rid == 0) {
            CHECK(sh && sh->back);
            sh->back = false;
        } else {
            break;
        }
    }
    return ev;
}

static void unread(struct world *v, struct ic_event *ev)
{
    if (ev)
        v->seen--; /* it lies there still */
}

/* The one answer to a command, and maybe a picture after it. */
static void check_answer(struct world *v, const struct shadow *sh, enum ic_event_kind kind, uint64_t rid)
{
    const bool later = sh->lost; /* the answer was given before */
    struct ic_event *ev = skip_device(v);
    if (ev && ev->kind != kind)
        printf("want %d, got %d: %s\n", kind, ev->kind, ev->kind == IC_EVENT_ERROR ? ev->text : "");
    CHECK(ev && ev->kind == kind && ev->rid == rid);
    if (kind != IC_EVENT_ERROR)
        CHECK(ev->sim.sim == sh->id && ev->owner == sh->owner &&
              (ev->sim.step == sh->step || (later && ev->sim.step > sh->step)) && ev->sim.left == sh->left);
    if (kind == IC_EVENT_SIM_STATE)
        CHECK(first_of(ev) == sh->count);
    ic_event_free(ev);
    if (v->st.draw) {
        CHECK(!skip_device(v));
        return;
    }
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
        unread(v, skip_device(v));
        if (v->event[v->seen % EVENTS] && v->seen < v->n_events &&
            v->event[v->seen % EVENTS]->kind == IC_EVENT_ERROR) {
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
        CHECK(!skip_device(v));
        for (int i = 0; i < SIMS; i++)
            if (m->sim[i].id && m->sim[i].owner == cmd.owner)
                m->sim[i] = (struct shadow){0};
        return;
    }
    static const enum ic_sim_op ops[] = {IC_SIM_RUN, IC_SIM_RUN,   IC_SIM_RUN,   IC_SIM_PAUSE,
                                         IC_SIM_SET, IC_SIM_STATE, IC_SIM_RESET, IC_SIM_CLOSE};
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
    check_answer(v, sh,
                 cmd.op == IC_SIM_STATE   ? IC_EVENT_SIM_STATE
                 : cmd.op == IC_SIM_CLOSE ? IC_EVENT_SIM_CLOSED
                                          : IC_EVENT_SIM_STATUS,
                 rid);
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
    if (seed % 3 == 0) { /* with a device, which is lost in half of them */
        open_device_world(&w, &lim);
        w.loses = seed % 2 ? 0 : 1 + (int64_t)(seed * 7919 % 200);
    } else {
        open_world(&w, &lim);
    }
    w.rng = rng * 3 + 1;
    w.on_step = model_step;
    w.on_lost = model_lost;
    w.on_fail = model_fail;
    w.fails_of_100 = rnd(&w, 4) ? 0 : 5;
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
            struct ic_sim_cmd halt = {.op = IC_SIM_PAUSE, .owner = m.sim[i].owner, .sim = m.sim[i].id};
            uint64_t rid = command(&w, halt);
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
    CHECK(m.told == m.failed);
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
    uint64_t first = seed ? strtoull(seed, NULL, 10) : 1, n = rounds ? strtoull(rounds, NULL, 10)
                                                              : seed ? 1
                                                                     : 3000;
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
        cmocka_unit_test(test_random_schedules),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
