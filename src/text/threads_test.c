/* The decisions of threads.h, over made-up machines: `cores` cores of which others want `busy`. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/clock.h"
#include "text/threads.h"

#define DECODE_MS 40

/* One decode on such a machine, and a look at the others when one is due. Each of our threads and of the
 * others' wants a core; where there are too few everybody gets the same share. */
static bool decode(struct ic_threads *t, int64_t *now, int cores, int busy)
{
    double want = t->now + busy, share = want > cores ? cores / want : 1;
    int64_t wall = DECODE_MS * IC_MS;
    bool changed;

    *now += wall;
    changed = ic_threads_decoded(t, wall, (int64_t)(t->now * share * (double)wall), *now);
    if (!changed && ic_threads_may_grow(t))
        changed = ic_threads_others(t, busy * share, *now);
    return changed;
}

static int changes_over(struct ic_threads *t, int64_t *now, int64_t ms, int cores, int busy)
{
    int n = 0;
    for (int64_t until = *now + ms * IC_MS; *now < until;)
        n += decode(t, now, cores, busy);
    return n;
}

static void alone_nothing_changes(void **state)
{
    (void)state;
    for (int cores = 1; cores <= 64; cores *= 2) {
        struct ic_threads t;
        int64_t now = IC_MS;
        ic_threads_init(&t, cores, cores);
        assert_int_equal(changes_over(&t, &now, 60000, cores, 0), 0);
        assert_int_equal(t.now, cores);
    }
}

static void a_busy_core_is_left_at_once_and_taken_back_when_free(void **state)
{
    struct ic_threads t;
    int64_t now = IC_MS;
    (void)state;

    ic_threads_init(&t, 2, 2);
    changes_over(&t, &now, 1000, 2, 0);
    assert_int_equal(changes_over(&t, &now, 300, 2, 1), 1);
    assert_int_equal(t.now, 1);
    assert_int_equal(changes_over(&t, &now, 4000, 2, 1), 0); /* stays, while the other one stays */
    assert_int_equal(changes_over(&t, &now, 400, 2, 0), 0);  /* not for every pause of others */
    assert_int_equal(changes_over(&t, &now, 400, 2, 0), 1);
    assert_int_equal(t.now, 2);
}

/* Somebody computes for ever with our priority: trying again costs next to nothing. */
static void trying_again_becomes_rare(void **state)
{
    struct ic_threads t;
    int64_t now = IC_MS;
    int two = 0, all = 0;
    (void)state;

    ic_threads_init(&t, 2, 2);
    for (; now < 600000 * IC_MS; all++) {
        decode(&t, &now, 2, 1);
        two += t.now == 2;
    }
    assert_in_range(two, 1, all / 100);
}

/* Others use every core that we leave but yield it when we want it. */
static void cores_that_are_yielded_are_won_back(void **state)
{
    struct ic_threads t;
    int64_t now = IC_MS, wall = DECODE_MS * IC_MS;
    (void)state;

    ic_threads_init(&t, 4, 4);
    changes_over(&t, &now, 1000, 4, 8);
    assert_in_range(t.now, 1, 2);
    for (int i = 0; i < 3000; i++) {
        now += wall;
        if (!ic_threads_decoded(&t, wall, (int64_t)(0.98 * t.now * (double)wall), now) &&
            ic_threads_may_grow(&t))
            ic_threads_others(&t, 4 - t.now, now);
    }
    assert_int_equal(t.now, 4);
}

static void one_bad_window_is_chance(void **state)
{
    struct ic_threads t;
    int64_t now = 0, wall = 120 * IC_MS;
    (void)state;

    ic_threads_init(&t, 2, 2);
    for (int i = 0; i < 100; i++) {
        now += wall;
        assert_false(ic_threads_decoded(&t, wall, (int64_t)((i % 2 ? 2.0 : 1.5) * (double)wall), now));
    }
}

static void more_threads_than_cores_are_given_up(void **state)
{
    struct ic_threads t;
    int64_t now = IC_MS;
    (void)state;

    ic_threads_init(&t, 3, 2); /* somebody said --threads 3 on two cores */
    changes_over(&t, &now, 1000, 2, 0);
    assert_in_range(t.now, 1, 2);
}

static void many_cores_give_up_few_threads(void **state)
{
    struct ic_threads t;
    int64_t now = IC_MS;
    (void)state;

    ic_threads_init(&t, 16, 16);
    changes_over(&t, &now, 3000, 16, 2);
    assert_in_range(t.now, 12, 15);
    changes_over(&t, &now, 3000, 16, 60);
    assert_in_range(t.now, 1, 8);
    changes_over(&t, &now, 5000, 16, 0);
    assert_int_equal(t.now, 16);
}

/* Others who compute a second and pause a second: the more often we were wrong the longer we wait. */
static void a_step_up_that_failed_makes_the_next_one_later(void **state)
{
    struct ic_threads t;
    int64_t now = IC_MS;
    int early = 0, late = 0;
    (void)state;

    ic_threads_init(&t, 2, 2);
    for (int i = 0; i < 5; i++)
        early += changes_over(&t, &now, 1000, 2, 1) + changes_over(&t, &now, 1000, 2, 0);
    for (int i = 0; i < 50; i++)
        late += changes_over(&t, &now, 1000, 2, 1) + changes_over(&t, &now, 1000, 2, 0);
    assert_in_range(early, 1, 8);
    assert_in_range(late, 0, 6);
    changes_over(&t, &now, 40000, 2, 0); /* peace: the whole machine again, and no grudge */
    assert_int_equal(t.now, 2);
    changes_over(&t, &now, 200, 2, 1);
    changes_over(&t, &now, 1000, 2, 0);
    assert_int_equal(t.now, 2);
}

static void started_on_a_busy_machine_it_grows_later(void **state)
{
    struct ic_threads t;
    int64_t now = IC_MS;
    (void)state;

    ic_threads_init(&t, 1, 4);
    changes_over(&t, &now, 3000, 4, 3);
    assert_int_equal(t.now, 1);
    changes_over(&t, &now, 3000, 4, 0);
    assert_int_equal(t.now, 4);
}

static void a_short_disturbance_does_not_count(void **state)
{
    struct ic_threads t;
    int64_t now = 0;
    (void)state;

    ic_threads_init(&t, 2, 2);
    for (int i = 0; i < 1000; i++) { /* the network thread takes 5 % of one core */
        now += DECODE_MS * IC_MS;
        assert_false(ic_threads_decoded(&t, DECODE_MS * IC_MS, (int64_t)(1.95 * DECODE_MS * IC_MS), now));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(alone_nothing_changes),
        cmocka_unit_test(a_busy_core_is_left_at_once_and_taken_back_when_free),
        cmocka_unit_test(trying_again_becomes_rare),
        cmocka_unit_test(cores_that_are_yielded_are_won_back),
        cmocka_unit_test(one_bad_window_is_chance),
        cmocka_unit_test(more_threads_than_cores_are_given_up),
        cmocka_unit_test(many_cores_give_up_few_threads),
        cmocka_unit_test(a_step_up_that_failed_makes_the_next_one_later),
        cmocka_unit_test(started_on_a_busy_machine_it_grows_later),
        cmocka_unit_test(a_short_disturbance_does_not_count),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
