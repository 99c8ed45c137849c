/* The Law M scheduler with a device: states stay there, steps are made several at a time, frames are drawn
 * there and come late; and what clients see of it is what they see without. */
#include "sched/law_world.h"

static uint64_t create_shown(struct ic_sim_opts opts)
{
    uint64_t id = ++w.last_sim;
    opts.set |= IC_SET_INIT;
    opts.init = IC_LAW_INIT_ZEROS;
    command(&w, (struct ic_sim_cmd){
                    .op = IC_SIM_CREATE, .owner = 1, .sim = id, .height = 4, .width = 4, .opts = opts});
    drop_events(&w);
    return id;
}

static float read_state(uint64_t id)
{
    float first;
    op(&w, IC_SIM_STATE, id);
    struct ic_event *ev = event_of(&w, IC_EVENT_SIM_STATE);
    assert_non_null(ev);
    memcpy(&first, ev->text, sizeof first);
    ic_event_free(ev);
    return first;
}

static void test_states_stay_and_are_read_when_asked_for(void **state)
{
    (void)state;
    open_device_world(&w, NULL);
    uint64_t a = create(&w), b = create_on(&w, 2, 8, 1);
    run_steps(&w, a, -1);
    run_steps(&w, b, -1);
    for (int i = 0; i < 10; i++)
        tick(&w);
    assert_int_equal(w.puts, 2);
    assert_int_equal(w.gets, 0);
    assert_true(sim_named(&w, a)->psi[0] == 0);
    assert_true(read_state(a) == (float)steps_of(&w, a));
    assert_true(read_state(a) == (float)steps_of(&w, a)); /* it is there: not asked for again */
    assert_int_equal(w.gets, 1);
    op(&w, IC_SIM_PAUSE, b);
    assert_true(read_state(b) == (float)steps_of(&w, b));
    assert_true(sim_named(&w, b)->h[0] == (float)steps_of(&w, b));
    close_world(&w);
}

/* A tool works on the newest state, and the next step on what the tool made of it; so with a reset. */
static void test_edits_go_to_the_device(void **state)
{
    (void)state;
    open_device_world(&w, NULL);
    uint64_t id = create(&w);
    run_steps(&w, id, 3);
    tick(&w);
    struct ic_sim_cmd tool = {.op = IC_SIM_TOOL, .owner = 1, .sim = id, .tool = IC_LAW_TOOL_VORTEX};
    ic_law_tool_args_init(&tool.tool_args);
    command(&w, tool);
    const float after = sim_named(&w, id)->psi[0], far = sim_named(&w, id)->psi[20];
    assert_int_equal(w.gets, 1);
    run_steps(&w, id, 3);
    tick(&w);
    assert_int_equal(w.puts, 2);
    assert_true(read_state(id) == after + 3);
    assert_true(sim_named(&w, id)->psi[20] == far);
    op(&w, IC_SIM_RESET, id);
    run_steps(&w, id, 2);
    tick(&w);
    assert_true(read_state(id) == 2);
    close_world(&w);
}

static void test_steps_are_made_together(void **state)
{
    (void)state;
    open_device_world(&w, NULL);
    w.step_ns = 100000;
    uint64_t id = create_shown((struct ic_sim_opts){.set = IC_SET_EVERY, .every = 10});
    run_steps(&w, id, 95);
    unsigned before = w.n_batches;
    int64_t frames = 0;
    for (int i = 0; i < 100; i++) { /* a client that takes each frame at once */
        ic_law_sched_tick(w.s);
        for (struct ic_event *ev; (ev = next_event(&w)); ic_event_free(ev))
            if (ev->kind == IC_EVENT_SIM_FRAME) {
                frames++;
                assert_int_equal(ev->sim.step, frames < 10 ? 10 * frames : 95);
            }
    }
    assert_int_equal(frames, 10);
    assert_int_equal(w.n_batches - before, 10);
    assert_int_equal(w.c.steps, 95);
    assert_int_equal(w.steps_most, 10);
    assert_int_equal(w.gets, 0); /* the last frame was drawn there too */

    /* no longer than a slice: others wait for it */
    op_set(&w, IC_SIM_SET, id, (struct ic_sim_opts){.set = IC_SET_FRAMES, .frames = false});
    run_steps(&w, id, -1);
    tick(&w);
    assert_int_equal(w.steps_most, IC_SIM_SLICE_MS * 10);
    /* and not past another's wish */
    uint64_t other = create_shown((struct ic_sim_opts){.set = IC_SET_EVERY, .every = 7});
    run_steps(&w, other, -1);
    w.steps_most = 0;
    while (steps_of(&w, other) < 70)
        tick(&w);
    assert_int_equal(w.steps_most, 7);
    assert_int_equal(last_batch(&w)->n, 2);
    close_world(&w);

    open_device_world(&w, NULL); /* its rate is kept */
    id = create(&w);
    run_rate(&w, id, 100);
    run_until(&w, w.now + SEC);
    assert_int_equal(w.steps_most, 1);
    assert_in_range(steps_of(&w, id), 95, 101);
    close_world(&w);
}

/* Frames by time: as many as without a device, in far fewer calls. */
static void test_frames_by_time_in_few_calls(void **state)
{
    (void)state;
    open_device_world(&w, NULL);
    w.step_ns = 300000;
    uint64_t id = create_shown((struct ic_sim_opts){.set = IC_SET_FPS, .fps = 25});
    run_steps(&w, id, -1);
    int n = 0;
    int64_t last = 0;
    while (w.now < START_NS + 10 * SEC) {
        tick(&w);
        for (struct ic_event *ev; (ev = next_event(&w)); ic_event_free(ev))
            if (ev->kind == IC_EVENT_SIM_FRAME) {
                n++;
                assert_true(ev->stamp_ns - last >= 36 * MS); /* a tenth early is on time */
                last = ev->stamp_ns;
            }
    }
    assert_in_range(n, 225, 251);
    assert_true(w.n_batches < 4 * 251);
    assert_in_range(w.c.steps, 33000, 33400);
    close_world(&w);
}

/* Of every view, on the device and not: as the CPU draws the same state; after the next batch has begun, or
 * when there is nothing else to do. */
static void test_frames_are_right_and_late(void **state)
{
    (void)state;
    for (int v = 0; v < IC_VIEW_COUNT; v++) {
        const bool there = ic_view_of_one_cell((enum ic_view)v);
        float psi[PSI_FLOATS] = {0};
        struct ic_view_frame f;
        uint8_t want[48];
        open_device_world(&w, NULL);
        struct ic_view_request req = {(enum ic_view)v, IC_VIEW_U8, {0}};
        uint64_t id = create_shown((struct ic_sim_opts){.set = IC_SET_VIEW, .view = (enum ic_view)v});
        run_steps(&w, id, 2);
        drop_events(&w);
        for (int step = 1; step <= 2; step++) {
            tick(&w);
            /* the first waits for the second step; the last does not wait */
            assert_int_equal(w.n_events - w.seen, step == 2 ? (there ? 3 : 2) : there ? 0 : 1);
            if (step == 1 && there)
                continue;
            for (int k = there ? 1 : step; k <= step; k++) {
                struct ic_event *ev = next_event(&w);
                psi[0] = (float)k;
                float delta[PSI_FLOATS] = {(float)k};
                assert_int_equal(ic_view_render(w.views, &req, psi, delta, (struct ic_law_shape){4, 4, 1},
                                                want, sizeof want, &f, NULL),
                                 IC_OK);
                assert_int_equal(ev->kind, IC_EVENT_SIM_FRAME);
                assert_int_equal(ev->sim.step, k);
                assert_int_equal(ev->len, f.bytes);
                assert_memory_equal(ev->text, want, f.bytes);
                assert_true(ev->sim.frame.min == f.min && ev->sim.frame.max == f.max);
                ic_event_free(ev);
            }
        }
        struct ic_event *ev = next_event(&w);
        assert_int_equal(ev->kind, IC_EVENT_SIM_STATUS); /* after its last frame */
        ic_event_free(ev);
        assert_int_equal(w.gets, there ? 0 : 2);
        close_world(&w);
    }
    /* without a next step: at the next look, or before the next command is answered */
    for (int command_first = 0; command_first < 2; command_first++) {
        open_device_world(&w, NULL);
        uint64_t id = create_shown((struct ic_sim_opts){.set = IC_SET_RATE, .rate = 10});
        run_steps(&w, id, -1);
        tick(&w);
        assert_int_equal(w.n_events, w.seen + 1); /* the run's answer */
        if (command_first)
            op(&w, IC_SIM_PAUSE, id);
        else
            tick(&w);
        struct ic_event *ev = event_of(&w, IC_EVENT_SIM_FRAME);
        assert_int_equal(ev->sim.step, 1);
        ic_event_free(ev);
        close_world(&w);
    }
}

/* What a device refuses to draw, the CPU draws. */
static void test_frames_that_the_device_does_not_draw(void **state)
{
    (void)state;
    open_device_world(&w, NULL);
    w.draw_fails = true;
    uint64_t id = create_shown((struct ic_sim_opts){.set = IC_SET_FPS, .fps = 100});
    run_steps(&w, id, 1000);
    int n = 0;
    for (struct ic_event *ev; w.c.running || w.n_events > w.seen; tick(&w))
        while ((ev = next_event(&w))) {
            n += ev->kind == IC_EVENT_SIM_FRAME;
            ic_event_free(ev);
        }
    assert_in_range(n, 98, 102);
    assert_int_equal(w.gets, n);
    close_world(&w);
}

static void test_metrics_are_those_of_their_step(void **state)
{
    int with = 0, frames = 0;
    (void)state;
    open_device_world(&w, NULL);
    uint64_t id = create_shown((struct ic_sim_opts){.set = IC_SET_METRICS | IC_SET_VIEW,
                                                    .view = IC_VIEW_DENSITY,
                                                    .metrics = true,
                                                    .metrics_ns = 10 * MS});
    run_steps(&w, id, 100);
    for (int i = 0; i < 110; i++) {
        ic_law_sched_tick(w.s);
        for (struct ic_event *ev; (ev = event_of(&w, IC_EVENT_SIM_FRAME)); ic_event_free(ev)) {
            frames++;
            with += ev->sim.has_metrics;
            if (!ev->sim.has_metrics)
                continue;
            assert_true(ev->sim.metrics.energy == (double)ev->sim.step * (double)ev->sim.step);
            assert_true(fabs(ev->sim.metrics.mean_delta - (double)ev->sim.step / 16) < 1e-9);
        }
    }
    assert_int_equal(frames, 100);
    assert_int_equal(with, 10);
    assert_int_equal(w.gets, 10); /* only for these */
    close_world(&w);
}

/* Whatever a client asks for, the host's copy is at most a second old. */
static void test_the_copy_is_not_old(void **state)
{
    (void)state;
    open_device_world(&w, NULL);
    uint64_t id = create(&w);
    run_steps(&w, id, -1);
    while (w.now < START_NS + 10 * SEC) {
        tick(&w);
        const struct sim *m = sim_named(&w, id);
        assert_true((float)m->step - m->psi[0] <= 1000 + 2 * IC_SIM_SLICE_MS);
    }
    assert_in_range(w.gets, 9, 10);
    op(&w, IC_SIM_PAUSE, id); /* a paused one too */
    run_until(&w, w.now + 2 * SEC);
    assert_true(sim_named(&w, id)->psi[0] == (float)steps_of(&w, id));
    assert_int_equal(tick(&w), INT64_MAX);
    close_world(&w);
}

/* The device goes: who was on it goes back to its copy, is told, and its run makes the steps again. */
static void test_a_lost_device(void **state)
{
    (void)state;
    open_device_world(&w, NULL);
    uint64_t run = create(&w), idle = create(&w), read = create(&w);
    run_steps(&w, idle, 50);
    while (w.c.running)
        tick(&w);
    run_steps(&w, run, 3000);
    while (steps_of(&w, run) < 1500)
        tick(&w);
    const uint64_t rid = sim_named(&w, run)->rid;
    const int64_t step = steps_of(&w, run);
    (void)read;
    drop_events(&w);
    w.loses = 1;
    tick(&w);
    assert_true(w.lost);
    struct ic_event *ev = next_event(&w);
    assert_int_equal(ev->kind, IC_EVENT_ERROR);
    assert_int_equal(ev->code, IC_UNAVAILABLE);
    assert_int_equal(ev->sim.sim, run);
    assert_int_equal(ev->rid, rid);
    ic_event_free(ev);
    const int64_t back = steps_of(&w, run);
    assert_true(back < step && back > step - 1100);
    assert_int_equal(sim_named(&w, run)->left, 3000 - back);
    assert_true(sim_named(&w, run)->psi[0] == (float)back);
    expect_sim(&w, IC_EVENT_SIM_STATUS, run, 0, back, 3000 - back);
    assert_null(next_event(&w));
    while (w.c.running)
        tick(&w);
    assert_int_equal(steps_of(&w, run), 3000);
    assert_true(sim_named(&w, run)->psi[0] == 3000);
    /* the idle one had been copied in time: nothing to tell */
    assert_null(event_of(&w, IC_EVENT_ERROR));
    assert_true(read_state(idle) == 50);
    close_world(&w);

    open_device_world(&w, NULL); /* found out by a look at the state */
    run = create(&w);
    run_steps(&w, run, 50);
    while (w.c.running)
        tick(&w);
    drop_events(&w);
    w.lost = true;
    op(&w, IC_SIM_STATE, run);
    ev = next_event(&w);
    assert_int_equal(ev->kind, IC_EVENT_ERROR);
    assert_non_null(strstr(ev->text, "50 steps"));
    ic_event_free(ev);
    expect_sim(&w, IC_EVENT_SIM_STATUS, run, 0, 0, 0);
    ev = next_event(&w);
    assert_int_equal(ev->kind, IC_EVENT_SIM_STATE);
    assert_int_equal(ev->sim.step, 0);
    ic_event_free(ev);
    close_world(&w);
}

/* Frames that are lost on their way are drawn again. */
static void test_a_frame_lost_with_the_device_is_owed(void **state)
{
    (void)state;
    open_device_world(&w, NULL);
    uint64_t id = create_shown((struct ic_sim_opts){.set = IC_SET_RATE, .rate = 10});
    run_steps(&w, id, -1);
    tick(&w);
    drop_events(&w);
    w.lost = true;
    op(&w, IC_SIM_PAUSE, id);
    drop_events(&w);
    tick(&w);
    struct ic_event *ev = event_of(&w, IC_EVENT_SIM_FRAME);
    assert_non_null(ev);
    assert_int_equal(ev->sim.step, 0);
    ic_event_free(ev);
    close_world(&w);
}

static jmp_buf hung;

static void hang(struct world *v, uint64_t id)
{
    (void)v, (void)id;
    longjmp(hung, 1);
}

/* A step that never ends: the others go on from their copies, and a device that hangs is not asked. */
static void test_a_step_that_hangs(void **state)
{
    (void)state;
    open_device_world(&w, NULL);
    uint64_t hit = create(&w), other = create_on(&w, 1, 4, 1);
    run_steps(&w, other, 7);
    while (w.c.running)
        tick(&w);
    assert_true(read_state(other) == 7);
    run_steps(&w, other, 5);
    while (w.c.running)
        tick(&w);
    run_steps(&w, hit, -1);
    drop_events(&w);
    w.on_step = hang;
    struct sim *m = sim_named(&w, hit);
    float *psi = m->psi;
    struct ic_law_state *left = m->state;
    struct group *unused = m->g; /* nobody else is on it */
    struct ic_law_group *plans[2] = {w.s->groups->plan, w.s->groups->next->plan};
    float *deltas[2] = {w.s->groups->delta, w.s->groups->next->delta};
    struct ic_law_io *io = w.s->io;
    if (!setjmp(hung))
        ic_law_sched_tick(w.s);
    w.on_step = NULL;
    w.started = NULL;
    const unsigned gets = w.gets;
    assert_int_equal(ic_law_sched_lose_batch(w.s, "it hangs"), IC_OK);
    w.plans -= 2; /* the old ones are not closed: below */
    assert_int_equal(w.gets, gets);
    assert_null(sim_named(&w, hit));
    assert_int_equal(steps_of(&w, other), 7);
    assert_non_null(sim_named(&w, other)->state);
    run_steps(&w, other, 5);
    while (w.c.running)
        tick(&w);
    assert_true(read_state(other) == 12);
    /* what the thread that hangs still has */
    fake_state_close(&w, &left);
    free(psi);
    free(io);
    free(unused);
    for (int i = 0; i < 2; i++) {
        free(deltas[i]);
        free(plans[i]);
    }
    close_world(&w);
}

static void test_predictions_leave_nothing_there(void **state)
{
    (void)state;
    open_device_world(&w, NULL);
    predict(&w, 4, PSI_FLOATS);
    tick(&w);
    struct ic_event *ev = event_of(&w, IC_EVENT_SIM_PREDICTED);
    float first;
    memcpy(&first, ev->text, sizeof first);
    assert_true(first == 5);
    ic_event_free(ev);
    assert_int_equal(w.puts, 0);
    close_world(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_states_stay_and_are_read_when_asked_for),
        cmocka_unit_test(test_edits_go_to_the_device),
        cmocka_unit_test(test_steps_are_made_together),
        cmocka_unit_test(test_frames_by_time_in_few_calls),
        cmocka_unit_test(test_frames_are_right_and_late),
        cmocka_unit_test(test_frames_that_the_device_does_not_draw),
        cmocka_unit_test(test_metrics_are_those_of_their_step),
        cmocka_unit_test(test_the_copy_is_not_old),
        cmocka_unit_test(test_a_lost_device),
        cmocka_unit_test(test_a_frame_lost_with_the_device_is_owed),
        cmocka_unit_test(test_a_step_that_hangs),
        cmocka_unit_test(test_predictions_leave_nothing_there),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
