/* KV in host memory: each piece once, within the bound, the least recently used dropped. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "sched/spill.h"

#define N 100

/* Tokens 0, 1, 2 … but for those from `other` on, which are a thousand more. */
static int32_t *some(int32_t n, int32_t other)
{
    int32_t *t = malloc(sizeof *t * (size_t)n);

    assert_non_null(t);
    for (int32_t i = 0; i < n; i++)
        t[i] = i + (i >= other ? 1000 : 0);
    return t;
}

static bool has(struct ic_spill *s, const char *salt, int32_t from, int32_t to, int32_t other, bool whole)
{
    int32_t *t = some(to, other);
    bool yes = ic_spill_has(s, salt, t, from, to, whole);
    free(t);
    return yes;
}

static void put(struct ic_spill *s, const char *salt, int32_t from, int32_t to, int32_t other, bool whole)
{
    assert_true(ic_spill_put(s, salt, some(to, other), from, to, malloc(1000), 1000, whole));
}

static void each_piece_once(void **state)
{
    struct ic_spill s = {.max = 1 << 20};

    (void)state;
    put(&s, "", 0, 50, N, false);
    assert_true(has(&s, "", 0, 50, N, false));
    assert_true(has(&s, "", 20, 40, N, false)); /* a piece of it */
    assert_false(has(&s, "", 0, 60, N, false));
    assert_false(has(&s, "", 0, 50, 49, false)); /* other tokens */
    assert_false(has(&s, "x", 0, 50, N, false)); /* another's */
    put(&s, "", 50, 80, N, false);
    put(&s, "", 0, 50, 40, false);
    put(&s, "x", 0, 50, N, false);
    assert_int_equal(s.count, 4);
    put(&s, "", 0, 90, N, false); /* makes the first two superfluous, and no other */
    assert_int_equal(s.count, 3);
    assert_true(has(&s, "", 50, 80, N, false));
    assert_true(has(&s, "", 0, 50, 40, false));
    assert_true(has(&s, "x", 0, 50, N, false));
    ic_spill_clear(&s);
    assert_int_equal(s.sum, 0);
}

static void whole_parts_stand_for_themselves(void **state)
{
    struct ic_spill s = {.max = 1 << 20};

    (void)state;
    put(&s, "", 0, 50, N, true);
    put(&s, "", 0, 90, N, true);
    assert_int_equal(s.count, 2);
    assert_true(has(&s, "", 0, 50, N, true));
    assert_false(has(&s, "", 0, 60, N, true)); /* cannot be cut out of the longer one */
    ic_spill_clear(&s);
}

static void bounded_and_the_used_ones_stay(void **state)
{
    struct ic_spill s = {.max = 5000};

    (void)state;
    for (int32_t i = 1; i <= 20; i++) {
        put(&s, "", 0, 10, i % 10 + (i > 10) * 20, false);
        assert_true(s.sum <= s.max);
        has(&s, "", 0, 10, 1, false); /* used */
    }
    assert_true(s.count >= 2 && s.count <= 4);
    assert_true(has(&s, "", 0, 10, 1, false));
    assert_false(ic_spill_put(&s, "", some(10, N), 0, 10, malloc(6000), 6000, false)); /* larger than all there may be */
    ic_spill_clear(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_piece_once),
        cmocka_unit_test(whole_parts_stand_for_themselves),
        cmocka_unit_test(bounded_and_the_used_ones_stay),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
