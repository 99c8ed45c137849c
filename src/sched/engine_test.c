/* The watch over a thread: what it does when, by a clock of the test's. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "sched/engine.h"

#define S INT64_C(1000000000)
#define STALL (60 * S)

static void who_moves_or_sleeps_is_left_alone(void **state)
{
    struct ic_watch_state w = {0};

    (void)state;
    for (int64_t now = S; now < 1000 * S; now += S) {
        assert_int_equal(ic_watch_next(&w, now - 59 * S, now, STALL), IC_WATCH_DO_NOTHING);
        assert_int_equal(ic_watch_next(&w, 0, now, STALL), IC_WATCH_DO_NOTHING);
    }
}

static void told_once_then_left_behind_once(void **state)
{
    struct ic_watch_state w = {0};
    int64_t at = 60 * S, beat = 1;

    (void)state;
    assert_int_equal(ic_watch_next(&w, beat, at, STALL), IC_WATCH_DO_NOTHING);
    assert_int_equal(ic_watch_next(&w, beat, at += S, STALL), IC_WATCH_DO_ABORT);
    for (int64_t i = S; i < IC_ABORT_GRACE_NS; i += S)
        assert_int_equal(ic_watch_next(&w, beat, at + i, STALL), IC_WATCH_DO_WAIT);
    assert_int_equal(ic_watch_next(&w, beat, at + IC_ABORT_GRACE_NS, STALL), IC_WATCH_DO_REBUILD);
    assert_int_equal(w.rebuilds, 1);
    assert_int_equal(ic_watch_next(&w, 0, at + 10 * S, STALL), IC_WATCH_DO_NOTHING); /* the new one loads */
}

static void a_short_limit_has_a_short_grace(void **state)
{
    struct ic_watch_state w = {0};

    (void)state;
    assert_int_equal(ic_watch_next(&w, 1, 2 * S, S), IC_WATCH_DO_ABORT);
    assert_int_equal(ic_watch_next(&w, 1, 3 * S, S), IC_WATCH_DO_REBUILD);
}

static void who_stopped_when_told_starts_from_nothing(void **state)
{
    struct ic_watch_state w = {0};

    (void)state;
    assert_int_equal(ic_watch_next(&w, 1, 100 * S, STALL), IC_WATCH_DO_ABORT);
    assert_int_equal(ic_watch_next(&w, 101 * S, 102 * S, STALL), IC_WATCH_DO_NOTHING);
    for (int64_t at = 103 * S; at < 161 * S; at += S)
        assert_int_equal(ic_watch_next(&w, 101 * S, at, STALL), IC_WATCH_DO_NOTHING);
    assert_int_equal(ic_watch_next(&w, 101 * S, 161 * S, STALL),
                     IC_WATCH_DO_ABORT); /* a new stall: told anew */
}

/* A container that is paused for an hour, before a tick, in one, and in one that has been told to stop. */
static void nobody_is_blamed_for_time_in_which_the_process_did_not_run(void **state)
{
    struct ic_watch_state w = {0};
    int64_t beat = 10 * S, at = 10 * S;

    (void)state;
    assert_int_equal(ic_watch_next(&w, 0, at, STALL), IC_WATCH_DO_NOTHING);
    assert_int_equal(ic_watch_next(&w, beat, at += 3600 * S, STALL), IC_WATCH_DO_NOTHING);
    for (int64_t end = at + 30 * S; at < end;)
        assert_int_equal(ic_watch_next(&w, beat, at += S, STALL), IC_WATCH_DO_NOTHING);
    assert_int_equal(ic_watch_next(&w, beat, at += 3600 * S, STALL), IC_WATCH_DO_NOTHING);
    for (int64_t end = at + 27 * S; at < end;) /* two of the sixty were the looks after the pauses */
        assert_int_equal(ic_watch_next(&w, beat, at += S, STALL), IC_WATCH_DO_NOTHING);
    assert_int_equal(ic_watch_next(&w, beat, at += S, STALL), IC_WATCH_DO_ABORT);
    assert_int_equal(ic_watch_next(&w, beat, at += 3600 * S, STALL), IC_WATCH_DO_WAIT);
    for (int i = 0; i < 3; i++)
        assert_int_equal(ic_watch_next(&w, beat, at += S, STALL), IC_WATCH_DO_WAIT);
    assert_int_equal(ic_watch_next(&w, beat, at += S, STALL), IC_WATCH_DO_REBUILD);
}

static int stall(struct ic_watch_state *w, int64_t *now)
{
    int64_t beat = *now += S;

    for (; *now < beat + STALL; *now += S)
        assert_int_equal(ic_watch_next(w, beat, *now, STALL), IC_WATCH_DO_NOTHING);
    assert_int_equal(ic_watch_next(w, beat, *now, STALL), IC_WATCH_DO_ABORT);
    for (*now += S; *now < beat + STALL + IC_ABORT_GRACE_NS; *now += S)
        assert_int_equal(ic_watch_next(w, beat, *now, STALL), IC_WATCH_DO_WAIT);
    return (int)ic_watch_next(w, beat, *now, STALL);
}

static void given_up_after_too_many_in_a_row(void **state)
{
    struct ic_watch_state w = {0};
    int64_t now = S;

    (void)state;
    for (int i = 0; i < IC_REBUILDS_MAX; i++)
        assert_int_equal(stall(&w, &now), IC_WATCH_DO_REBUILD);
    assert_int_equal(stall(&w, &now), IC_WATCH_DO_GIVE_UP);

    w = (struct ic_watch_state){0};
    for (int i = 0; i < 5 * IC_REBUILDS_MAX; i++) {
        assert_int_equal(stall(&w, &now), IC_WATCH_DO_REBUILD);
        now += S;
        assert_int_equal(ic_watch_next(&w, now, now, STALL), IC_WATCH_DO_NOTHING);
        assert_int_equal(ic_watch_next(&w, 0, now, STALL),
                         IC_WATCH_DO_NOTHING); /* one tick came to its end */
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(who_moves_or_sleeps_is_left_alone),
        cmocka_unit_test(told_once_then_left_behind_once),
        cmocka_unit_test(a_short_limit_has_a_short_grace),
        cmocka_unit_test(who_stopped_when_told_starts_from_nothing),
        cmocka_unit_test(nobody_is_blamed_for_time_in_which_the_process_did_not_run),
        cmocka_unit_test(given_up_after_too_many_in_a_row),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
