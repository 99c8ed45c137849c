/* The supervisor's decisions, over seconds and over years. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "ops/restart.h"

#define S 1000000000LL

static const struct ic_restart_config config = {.crashes = 3,
                                                .steps = 4,
                                                .within_ns = 300 * S,
                                                .good_ns = 60 * S,
                                                .retry_ns = 3600 * S,
                                                .delay_min_ns = S / 5,
                                                .delay_max_ns = 30 * S};

/* A run that begins at *now, is ready after a second, and crashes `lives` seconds later. */
static int64_t crash(struct ic_restart *r, int64_t *now, int64_t lives)
{
    *now += S;
    ic_restart_ready(r, *now);
    for (int64_t end = *now + lives * S; *now < end; *now += S)
        ic_restart_tick(r, *now);
    int64_t delay = ic_restart_ended(r, *now);
    *now += delay;
    return delay;
}

static void steps_down_after_crashes_and_backs_off(void **state)
{
    struct ic_restart r;
    int64_t now = 5 * S;
    static const int steps[] = {0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3};

    (void)state;
    ic_restart_init(&r, &config);
    for (int i = 0; i < 12; i++) {
        int64_t delay = crash(&r, &now, 1);
        assert_int_equal(r.step, steps[i]);
        static const int64_t fifths[] = {1, 2, 1, 2, 4, 1, 2, 4, 1, 2, 4, 8};
        assert_true(delay == fifths[i] * S / 5);
    }
    for (int i = 0; i < 100; i++) {
        assert_true(crash(&r, &now, 1) <= 30 * S);
        assert_int_equal(r.step, 3); /* there is no further one, and no giving up */
    }
    assert_true(crash(&r, &now, 1) == 30 * S);
    assert_int_equal(r.restarts, 113);
}

static void a_good_run_forgets(void **state)
{
    struct ic_restart r;
    int64_t now = S;

    (void)state;
    ic_restart_init(&r, &config);
    for (int i = 0; i < 1000; i++) { /* good runs in between: never a step down, always at once */
        crash(&r, &now, 1);
        crash(&r, &now, 1);
        assert_true(crash(&r, &now, 61) == S / 5);
        assert_int_equal(r.step, 0);
        assert_int_equal(r.n_ends, 1);
        now += 400 * S;
    }
}

static void rare_crashes_are_no_reason(void **state)
{
    struct ic_restart r;
    int64_t now = S;

    (void)state;
    ic_restart_init(&r, &config);
    for (int i = 0; i < 100; i++) { /* never good, but slowly */
        crash(&r, &now, 50);
        now += 200 * S;
        assert_int_equal(r.step, 0);
    }
}

static void returns_to_what_was_wished(void **state)
{
    struct ic_restart r;
    int64_t now = S, wait = 3600;

    (void)state;
    ic_restart_init(&r, &config);
    for (int i = 0; i < 3; i++)
        crash(&r, &now, 1);
    assert_int_equal(r.step, 1);
    for (int round = 0; round < 8; round++, wait = wait < 3600 * IC_RESTART_RETRY_MAX ? wait * 2 : wait) {
        ic_restart_ready(&r, now);
        assert_true(ic_restart_due(&r) == now + 60 * S);
        assert_int_equal(ic_restart_tick(&r, now + 60 * S - 1), IC_RESTART_NOTHING);
        assert_int_equal(ic_restart_tick(&r, now + 60 * S), IC_RESTART_GOOD);
        assert_int_equal(ic_restart_tick(&r, now + 60 * S), IC_RESTART_NOTHING);
        assert_true(ic_restart_due(&r) == now + wait * S);
        assert_int_equal(ic_restart_tick(&r, now + wait * S - 1), IC_RESTART_NOTHING);
        now += wait * S;
        assert_int_equal(ic_restart_tick(&r, now), IC_RESTART_RETURN);
        assert_int_equal(ic_restart_tick(&r, now + 1000 * S), IC_RESTART_NOTHING); /* said once */
        assert_true(ic_restart_ended(&r, now) == 0);
        assert_int_equal(r.step, 0);
        for (int i = 0; i < 3; i++) /* and it is still not good */
            crash(&r, &now, 1);
        assert_int_equal(r.step, 1);
    }
    ic_restart_ready(&r, now);
    ic_restart_tick(&r, now += 60 * S);
    assert_int_equal(ic_restart_tick(&r, now += 3600 * IC_RESTART_RETRY_MAX * S), IC_RESTART_RETURN);
    ic_restart_ended(&r, now);
    ic_restart_ready(&r, now); /* now it is: all is as at the start */
    assert_int_equal(ic_restart_tick(&r, now += 60 * S), IC_RESTART_GOOD);
    assert_true(ic_restart_due(&r) == INT64_MAX);
    assert_true(r.retry_factor == 1);
}

static void never_ready_is_never_good(void **state)
{
    struct ic_restart r;

    (void)state;
    ic_restart_init(&r, &config);
    assert_true(ic_restart_due(&r) == INT64_MAX);
    assert_int_equal(ic_restart_tick(&r, 1LL << 60), IC_RESTART_NOTHING);
}

static void some_ends_are_final(void **state)
{
    (void)state;
    for (int ready = 0; ready < 2; ready++) {
        assert_true(ic_restart_final(0, ready));
        assert_true(ic_restart_final(2, ready));
        assert_false(ic_restart_final(1, ready));
        assert_false(ic_restart_final(5, ready)); /* less may fit */
        assert_false(ic_restart_final(127, ready));
    }
    for (int code = 3; code <= 4; code++) {
        assert_true(ic_restart_final(code, false));
        assert_false(ic_restart_final(code, true));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(steps_down_after_crashes_and_backs_off),
        cmocka_unit_test(a_good_run_forgets),
        cmocka_unit_test(rare_crashes_are_no_reason),
        cmocka_unit_test(returns_to_what_was_wished),
        cmocka_unit_test(never_ready_is_never_good),
        cmocka_unit_test(some_ends_are_final),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
