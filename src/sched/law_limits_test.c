/* What the Law M scheduler answers, and what it refuses: events, states, limits, memory. */
#include "sched/law_world.h"

/* ---- events ------------------------------------------------------------------------------------- */

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
    struct ic_sim_cmd ask = {.op = IC_SIM_PREDICT, .owner = 1, .sim = 1, .law = 2, .height = 8, .width = 8};
    ask.state = v;
    ask.state_floats = psi + memory;
    command(&w, ask);
    tick(&w);
    struct ic_event *ev = event_of(&w, IC_EVENT_SIM_PREDICTED);
    assert_int_equal(ev->len, (psi + memory) * sizeof(float));
    float *got = malloc(ev->len);
    memcpy(got, ev->text, ev->len);
    assert_true(got[0] == 1 && got[psi] == 6 && got[psi + memory - 1] == 8);
    free(got);
    ic_event_free(ev);
    /* without it: zero */
    ask.state = calloc(psi, sizeof *ask.state);
    ask.state_floats = psi;
    command(&w, ask);
    tick(&w);
    ev = event_of(&w, IC_EVENT_SIM_PREDICTED);
    got = malloc(ev->len);
    memcpy(got, ev->text, ev->len);
    assert_true(got[psi] == 1 && got[psi + memory - 1] == 1);
    free(got);
    ic_event_free(ev);
    close_world(&w);
}

/* ---- limits ------------------------------------------------------------------------------------- */

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
    struct ic_sim_cmd odd = {.op = IC_SIM_CREATE, .owner = 1, .sim = 90, .height = 4, .width = 4};
    odd.state = bad;
    odd.state_floats = 30;
    command(&w, odd);
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
    op_set(&w, IC_SIM_SET, 91,
           (struct ic_sim_opts){.set = IC_SET_FRAMES | IC_SET_ROI, .frames = true, .roi = {0, 0, 8, 8}});
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

/* ---- steps that cannot be made ------------------------------------------------------------------ */

static void expect_oom_of(uint64_t sim, uint64_t owner, uint64_t rid)
{
    struct ic_event *ev = next_event(&w);
    assert_non_null(ev);
    assert_int_equal(ev->kind, IC_EVENT_ERROR);
    assert_int_equal(ev->code, IC_OOM);
    assert_int_equal(ev->sim.sim, sim);
    assert_int_equal(ev->owner, owner);
    assert_int_equal(ev->rid, rid);
    assert_string_equal(ev->text, "the fake has no memory");
    ic_event_free(ev);
}

/* Those of the plan that have steps to do, in the batch or not, are told and pause as they are; a paused
 * one hears nothing, another plan's go on, and a new run is a new try. */
static void test_a_step_without_memory_pauses_its_plan(void **state)
{
    uint64_t id[20], run_rid[20];
    (void)state;
    open_world(&w, NULL);
    uint64_t idle = create(&w), other = create_on(&w, 1, 4, 1);
    run_steps(&w, other, -1);
    for (int i = 0; i < 20; i++) { /* more than a batch holds; the last two are held back by their rate */
        id[i] = create(&w);
        if (i < 18)
            run_steps(&w, id[i], 5);
        else
            run_rate(&w, id[i], 100);
        run_rid[i] = w.last_rid;
    }
    run_until(&w, w.now + 4 * MS);
    drop_events(&w);
    int64_t steps[20], done = (int64_t)w.c.steps, batches = (int64_t)w.c.batches;
    float psi[20];
    for (int i = 0; i < 20; i++) {
        steps[i] = steps_of(&w, id[i]);
        psi[i] = sim_named(&w, id[i])->psi[0];
    }
    int64_t steps_other = steps_of(&w, other), bytes = w.c.state_bytes, shared = w.c.shared_bytes;
    w.step_fails = 1;
    while (last_batch(&w)->law != 0 || w.c.running > 1)
        tick(&w);
    assert_int_equal(w.c.steps - (uint64_t)done,
                     steps_of(&w, other) - steps_other); /* nothing else was counted */
    assert_int_equal(w.c.batches - (uint64_t)batches, w.c.steps - (uint64_t)done);
    for (int i = 19; i >= 0; i--) { /* the newest first; each error, then how it is */
        expect_oom_of(id[i], 1, run_rid[i]);
        expect_sim(&w, IC_EVENT_SIM_STATUS, id[i], 0, steps[i], 0);
        assert_true(sim_named(&w, id[i])->psi[0] == psi[i]);
    }
    assert_null(next_event(&w));
    assert_int_equal(w.c.running, 1);
    assert_int_equal(w.c.state_bytes, bytes);
    assert_int_equal(w.c.shared_bytes, shared);
    run_until(&w, w.now + 10 * MS); /* nobody asks again by himself */
    assert_int_equal(last_batch(&w)->law, 1);
    assert_null(next_event(&w));
    assert_int_equal(steps_of(&w, idle), 0);

    run_steps(&w, id[0], 2); /* in vain once more */
    expect_sim(&w, IC_EVENT_SIM_STATUS, id[0], w.last_rid, steps[0], 2);
    run_until(&w, w.now + 3 * MS);
    expect_oom_of(id[0], 1, w.last_rid);
    expect_sim(&w, IC_EVENT_SIM_STATUS, id[0], 0, steps[0], 0);
    w.step_fails = 0;
    run_steps(&w, id[0], 2); /* and not */
    expect_sim(&w, IC_EVENT_SIM_STATUS, id[0], w.last_rid, steps[0], 2);
    run_until(&w, w.now + 6 * MS);
    expect_sim(&w, IC_EVENT_SIM_STATUS, id[0], 0, steps[0] + 2, 0);
    assert_true(sim_named(&w, id[0])->psi[0] == psi[0] + 2);
    close_world(&w);
}

/* A prediction has nobody who could try again: it is over, and its memory free. */
static void test_a_prediction_without_memory_is_over(void **state)
{
    (void)state;
    open_world(&w, NULL);
    w.step_fails = 1;
    uint64_t rid = predict(&w, 3, PSI_FLOATS), sim = w.last_sim;
    tick(&w);
    expect_oom_of(sim, 77, rid);
    assert_null(next_event(&w));
    assert_int_equal(w.c.sims, 0);
    assert_int_equal(w.c.state_bytes, 0);
    assert_int_equal(tick(&w), INT64_MAX);
    w.step_fails = 0;
    predict(&w, 3, PSI_FLOATS);
    tick(&w);
    struct ic_event *ev = event_of(&w, IC_EVENT_SIM_PREDICTED);
    assert_non_null(ev);
    ic_event_free(ev);
    close_world(&w);
}

/* A plan that moves to the CPU in a step takes host memory from then on: those that run go on, others are
 * refused. */
static void test_a_plan_that_moves_is_counted_anew(void **state)
{
    struct ic_law_limits lim = default_limits;
    (void)state;
    lim.memory_max = 20000;
    open_world(&w, &lim);
    uint64_t id = create(&w);
    run_steps(&w, id, -1);
    tick(&w);
    int64_t shared = w.c.shared_bytes;
    w.moved_shared = 1000 + 20000;
    ic_law_sched_tick(w.s); /* past the limit: check_all would say so */
    assert_int_equal(w.c.shared_bytes, shared + 20000);
    assert_int_equal(w.c.running, 1);
    drop_events(&w);
    struct ic_sim_cmd more = {
        .op = IC_SIM_CREATE, .owner = 1, .sim = 50, .height = 4, .width = 4, .rid = ++w.last_rid};
    ic_law_sched_command(w.s, &more);
    expect_error(&w, IC_OOM);
    w.moved_shared = 500;
    tick(&w);
    assert_int_equal(w.c.shared_bytes, shared - 500);
    close_world(&w); /* all of it is given back */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_events_are_exact),
        cmocka_unit_test(test_memory_of_a_law_is_kept_and_given_back),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_a_step_without_memory_pauses_its_plan),
        cmocka_unit_test(test_a_prediction_without_memory_is_over),
        cmocka_unit_test(test_a_plan_that_moves_is_counted_anew),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
