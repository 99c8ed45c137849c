/* What clients of the Law M scheduler see: frames in time and not too many, the last one never lost,
 * metrics. */
#include "sched/law_world.h"

static uint64_t create_shown(struct world *v, struct ic_sim_opts opts)
{
    uint64_t id = ++v->last_sim;
    opts.set |= IC_SET_INIT;
    opts.init = IC_LAW_INIT_ZEROS;
    command(v, (struct ic_sim_cmd){
                   .op = IC_SIM_CREATE, .owner = 1, .sim = id, .height = 4, .width = 4, .opts = opts});
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
        op_set(&w, IC_SIM_SET, id,
               (struct ic_sim_opts){.set = IC_SET_VIEW, .view = (enum ic_view)(i % IC_VIEW_COUNT)});
        assert_int_equal(take_frames(&w, at, 64), 1);
    }
    run_steps(&w, id, -1);
    run_until(&w, w.now + SEC);
    assert_in_range(take_frames(&w, at, 64), IC_SIM_FRAMES_IN_FLIGHT,
                    IC_SIM_FRAMES_IN_FLIGHT); /* not one was taken */
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
    /* the run is over, the client has taken nothing: the frame of step 10 is owed, and looked after now and
     * then */
    int64_t next = tick(&w);
    assert_in_range(next, w.now + 1, w.now + 100 * MS);
    w.now = next;
    assert_int_equal(take_frames(&w, at, 64), IC_SIM_FRAMES_IN_FLIGHT);
    assert_int_equal(tick(&w), INT64_MAX);
    assert_int_equal(take_frames(&w, at, 64), 1);
    assert_int_equal(at[0], 10);
    /* so is the picture after a change of view, once, however many the changes */
    for (int i = 0; i < 10; i++)
        op_set(&w, IC_SIM_SET, id,
               (struct ic_sim_opts){.set = IC_SET_VIEW, .view = i == 9 ? IC_VIEW_REAL : IC_VIEW_PHASE});
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
    op_set(&w, IC_SIM_SET, id,
           (struct ic_sim_opts){.set = IC_SET_GAMMA, .gamma = 0.5}); /* nothing to see */
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
    uint64_t id =
        create_shown(&w, (struct ic_sim_opts){.set = IC_SET_METRICS | IC_SET_EXTRAS,
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
            assert_int_equal(ev->len,
                             ev->sim.frame.bytes + (7 * 16 + 6 + 2 * ev->sim.n_poincare) * sizeof(float));
            if (ev->sim.has_metrics)
                assert_true(ev->sim.metrics.energy ==
                            (double)ev->sim.step * (double)ev->sim.step); /* psi[0] counts */
        }
    }
    assert_int_equal(frames, 100);
    assert_int_equal(with, 10);
    close_world(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_frames_every_so_many_steps),
        cmocka_unit_test(test_never_more_frames_than_fps),
        cmocka_unit_test(test_a_new_fps_takes_effect_at_once),
        cmocka_unit_test(test_frames_out_of_turn_do_not_silence_a_simulation),
        cmocka_unit_test(test_a_client_that_is_behind_gets_fewer_frames),
        cmocka_unit_test(test_the_last_frame_is_not_lost),
        cmocka_unit_test(test_what_is_changed_while_paused_is_shown),
        cmocka_unit_test(test_metrics_and_extras_travel_with_frames),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
