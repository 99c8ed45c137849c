/* KV in host memory: each piece once, within the bound, the least recently used dropped. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "sched/fake_disk.h"

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
    void *data = malloc(1000);

    assert_non_null(data);
    memset(data, other, 1000);
    assert_true(ic_spill_put(s, salt, some(to, other), from, to, data, 1000, whole));
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
    assert_false(ic_spill_put(&s, "", some(10, N), 0, 10, malloc(6000), 6000,
                              false)); /* larger than all there may be */
    ic_spill_clear(&s);
}

/* ---- a disk below ------------------------------------------------------------------------------------------------- */

static struct fake_disk disk;

/* Ten parts of 10 tokens; where memory holds four. Each differs from the others from its own place on. */
static struct ic_spill ten_parts(size_t disk_max)
{
    struct ic_spill s = {.max = 6000, .disk = fake_disk_init(&disk, disk_max)};

    for (int32_t i = 0; i < 10; i++)
        put(&s, "", 0, 10, i, false);
    return s;
}

static void check_sums(const struct ic_spill *s)
{
    size_t sum = 0, files = 0;
    int32_t n = 0, on_disk = 0;

    for (const struct ic_spill_part *p = s->first; p; p = p->next, n++) {
        sum += sizeof *p + sizeof *p->tokens * (size_t)p->to + (p->file ? 0 : p->bytes);
        files += p->file ? ic_spill_file_bytes(p) : 0;
        on_disk += p->file != 0;
    }
    assert_true(sum == s->sum && sum <= s->max && n == s->count);
    assert_true(files == s->disk_sum && files == disk.sum && files <= disk.face.max &&
                on_disk == s->disk_count && on_disk == disk.n);
}

/* The part whose tokens differ from `other` on, with its data in memory, or NULL. */
static struct ic_spill_part *fetch(struct ic_spill *s, int32_t other)
{
    int32_t reach, *t = some(10, other);
    struct ic_spill_part *p = ic_spill_find(s, "", t, 10, 0, true, &reach);

    free(t);
    return p && ic_spill_fetch(s, p) ? p : NULL;
}

static void what_memory_cannot_keep_lies_on_the_disk(void **state)
{
    struct ic_spill s = ten_parts(1 << 20);

    (void)state;
    assert_int_equal(s.count, 10);
    assert_true(s.disk_count >= 5 && s.disk_count < 10);
    check_sums(&s);
    for (int round = 0; round < 2; round++)
        for (int32_t i = 0; i < 10; i++) { /* each comes back as it was, and others go for it */
            struct ic_spill_part *p = fetch(&s, i);
            assert_true(p && p->data && p->bytes == 1000 && ((char *)p->data)[0] == i &&
                        ((char *)p->data)[999] == i);
            assert_ptr_equal(s.first, p);
            check_sums(&s);
        }
    assert_int_equal(s.count, 10);
    assert_true(s.disk_got == 10 * (uint64_t)disk.gets && disk.gets >= 10 && s.disk_lost == 0);
    put(&s, "", 0, 10, 5, false); /* stands for the same one, which lies on the disk: its file goes */
    assert_int_equal(s.count, 10);
    check_sums(&s);
    ic_spill_clear(&s);
    assert_true(disk.n == 0 && s.disk_sum == 0 && s.sum == 0);
}

static void the_disk_is_bounded_and_the_used_ones_stay(void **state)
{
    struct ic_spill s = ten_parts(3 * (IC_SPILL_FILE_HEAD + 40 + 1000) + 50);

    (void)state;
    assert_int_equal(s.disk_count, 3);
    assert_false(has(&s, "", 0, 10, 0, false)); /* the first has gone for good */
    assert_true(has(&s, "", 0, 10, 9, false));
    for (int32_t i = 20; i < 30; i++) {
        put(&s, i % 2 ? "a" : "b", 0, 10, i % 10, false);
        assert_true(has(&s, "", 0, 10, 9, false)); /* used, so it outlives all others, in memory or not */
        check_sums(&s);
    }
    ic_spill_clear(&s);
    s = ten_parts(1000); /* no part fits */
    assert_true(s.disk_count == 0 && s.count < 10 && disk.puts == 0);
    ic_spill_clear(&s);
}

static void a_disk_that_is_full_or_fails_is_as_none(void **state)
{
    (void)state;
    for (int kind = 0; kind < 3; kind++) {
        struct ic_spill s = {.max = 6000, .disk = fake_disk_init(&disk, 1 << 20)};
        disk.full = kind == 0;
        disk.failing = kind == 1;
        disk.corrupt = kind == 2;
        for (int32_t i = 0; i < 10; i++)
            put(&s, "", 0, 10, i, false);
        bool there = has(&s, "", 0, 10, 0, false);
        assert_true(there == (kind == 2));
        assert_true(kind == 2 || s.disk_count == 0);
        assert_null(fetch(&s, 0));
        assert_false(has(&s, "", 0, 10, 0, false)); /* it is not asked for twice */
        assert_non_null(fetch(&s, 9));
        assert_true((s.disk_lost > 0) == (kind > 0));
        check_sums(&s);
        ic_spill_clear(&s);
        assert_int_equal(disk.n, 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_piece_once),
        cmocka_unit_test(whole_parts_stand_for_themselves),
        cmocka_unit_test(bounded_and_the_used_ones_stay),
        cmocka_unit_test(what_memory_cannot_keep_lies_on_the_disk),
        cmocka_unit_test(the_disk_is_bounded_and_the_used_ones_stay),
        cmocka_unit_test(a_disk_that_is_full_or_fails_is_as_none),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
