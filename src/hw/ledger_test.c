/* The ledger: what one engine has reserved, the other does not get. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "hw/ledger.h"

#define MIB (UINT64_C(1) << 20)

static struct ic_ledger_device card(uint64_t free_mib)
{
    return (struct ic_ledger_device){
        .name = "GPU0", .desc = "a card", .total = 3072 * MIB, .free = free_mib * MIB, .margin = 512 * MIB};
}

static void two_engines_share_a_device(void **state)
{
    struct ic_ledger *l;
    struct ic_err err = {0};
    struct ic_ledger_device d = card(3000);
    struct ic_ledger_item items[4];

    (void)state;
    assert_int_equal(ic_ledger_open(&l, &err), IC_OK);
    int id = ic_ledger_enter(l, &d);
    assert_int_equal(id, 0);
    assert_int_equal(ic_ledger_room(l, id) / MIB, 2488);
    assert_int_equal(ic_ledger_reserve(l, id, "text", "weights", 2000 * MIB, false, &err), IC_OK);
    assert_int_equal(ic_ledger_reserve(l, id, "text", "nothing", 0, false, &err), IC_OK);
    assert_int_equal(ic_ledger_reserve(l, id, "law", "plans", 489 * MIB, false, &err), IC_OOM);
    assert_string_equal(err.msg, "GPU0: 489 MiB for plans, 488 MiB are left");
    assert_int_equal(ic_ledger_reserve(l, id, "law", "plans", 488 * MIB, false, &err), IC_OK);
    assert_int_equal(ic_ledger_room(l, id), 0);
    assert_int_equal(ic_ledger_items(l, items, 4), 2);
    ic_ledger_release(l, "text");
    assert_int_equal(ic_ledger_items(l, items, 4), 1);
    assert_string_equal(items[0].owner, "law");
    assert_int_equal(ic_ledger_room(l, id) / MIB, 2000);
    assert_int_equal(ic_ledger_reserve(l, id, "text", "as asked for", 4000 * MIB, true, &err), IC_OK);
    assert_int_equal(ic_ledger_room(l, id), 0);
    ic_ledger_close(&l);
    assert_null(l);
}

static void what_is_held_can_change_in_size(void **state)
{
    struct ic_ledger *l;
    struct ic_err err = {0};
    struct ic_ledger_device d = card(3000);
    struct ic_ledger_item items[4];

    (void)state;
    assert_int_equal(ic_ledger_open(&l, &err), IC_OK);
    int id = ic_ledger_enter(l, &d);
    assert_int_equal(ic_ledger_reserve(l, id, "text", "plans", 1000 * MIB, false, &err), IC_OK);
    assert_int_equal(ic_ledger_resize(l, id, "law", "plans", 400 * MIB, &err), IC_OK);
    assert_int_equal(ic_ledger_resize(l, id, "law", "plans", 1488 * MIB, &err),
                     IC_OK); /* its own 400 count as free */
    assert_int_equal(ic_ledger_room(l, id), 0);
    assert_int_equal(ic_ledger_resize(l, id, "law", "plans", 1489 * MIB, &err), IC_OOM);
    assert_int_equal(ic_ledger_items(l, items, 4), 2);
    assert_int_equal(ic_ledger_resize(l, id, "law", "plans", 100 * MIB, &err), IC_OK);
    assert_int_equal(ic_ledger_room(l, id) / MIB, 1388);
    assert_int_equal(ic_ledger_resize(l, id, "law", "plans", 0, &err), IC_OK);
    assert_int_equal(ic_ledger_items(l, items, 4), 1); /* the other's item of that name stays */
    assert_string_equal(items[0].owner, "text");
    assert_int_equal(ic_ledger_resize(l, id, "law", "plans", 0, &err), IC_OK);
    ic_ledger_close(&l);
}

static void a_device_entered_again_does_not_grow(void **state)
{
    struct ic_ledger *l;
    struct ic_err err = {0};
    struct ic_ledger_device d = card(3000);

    (void)state;
    assert_int_equal(ic_ledger_open(&l, &err), IC_OK);
    int id = ic_ledger_enter(l, &d);
    assert_int_equal(ic_ledger_reserve(l, id, "law", "plans", 1000 * MIB, false, &err), IC_OK);
    assert_int_equal(ic_ledger_enter(l, &d), id); /* reserved, but not yet allocated: still 3000 free */
    assert_int_equal(ic_ledger_room(l, id) / MIB, 1488);
    d = card(2000); /* allocated */
    assert_int_equal(ic_ledger_enter(l, &d), id);
    assert_int_equal(ic_ledger_room(l, id) / MIB, 1488);
    d = card(1500); /* another process has taken 500 */
    assert_int_equal(ic_ledger_enter(l, &d), id);
    assert_int_equal(ic_ledger_room(l, id) / MIB, 988);
    ic_ledger_release(l, "law");
    assert_int_equal(ic_ledger_enter(l, &d), id); /* nothing reserved: what is free is what counts */
    assert_int_equal(ic_ledger_room(l, id) / MIB, 988);
    ic_ledger_close(&l);
}

/* Room is what the ledger says, unless the device has less: then others took it, and the margin stays free
 * all the same. */
static void room_is_no_more_than_what_is_free_now(void **state)
{
    struct ic_ledger *l;
    struct ic_err err = {0};
    struct ic_ledger_device d = card(3000);

    (void)state;
    assert_int_equal(ic_ledger_open(&l, &err), IC_OK);
    int id = ic_ledger_enter(l, &d);
    assert_int_equal(ic_ledger_reserve(l, id, "text", "weights", 1000 * MIB, false, &err), IC_OK);
    assert_int_equal(ic_ledger_room_now(l, id, 3000 * MIB) / MIB,
                     1488); /* not yet allocated: the ledger knows */
    assert_int_equal(ic_ledger_room_now(l, id, 2000 * MIB) / MIB, 1488); /* allocated */
    assert_int_equal(ic_ledger_room_now(l, id, 1500 * MIB) / MIB,
                     988);                                     /* and another process has taken 500 */
    assert_int_equal(ic_ledger_room_now(l, id, 500 * MIB), 0); /* less than the margin */
    assert_int_equal(ic_ledger_room(l, id) / MIB, 1488);       /* nothing was changed by asking */
    ic_ledger_close(&l);
}

static void everything_is_bounded(void **state)
{
    struct ic_ledger *l;
    struct ic_err err = {0};
    struct ic_ledger_device d = card(3000);

    (void)state;
    assert_int_equal(ic_ledger_open(&l, &err), IC_OK);
    for (int i = 0; i < IC_LEDGER_DEVICES_MAX; i++) {
        d.name[3] = (char)('A' + i);
        assert_int_equal(ic_ledger_enter(l, &d), i);
    }
    strcpy(d.name, "one more");
    assert_int_equal(ic_ledger_enter(l, &d), -1);
    for (int i = 0; i < IC_LEDGER_ITEMS_MAX; i++)
        assert_int_equal(ic_ledger_reserve(l, 3, "text", "a", 1, false, &err), IC_OK);
    assert_int_equal(ic_ledger_reserve(l, 3, "text", "a", 1, false, &err), IC_OOM);
    ic_ledger_close(&l);
}

static void the_host_is_known(void **state)
{
    uint64_t available, total;

    (void)state;
    if (!ic_host_memory(&available, &total))
        skip();
    assert_true(available > 0 && available <= total);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(two_engines_share_a_device),
        cmocka_unit_test(what_is_held_can_change_in_size),
        cmocka_unit_test(a_device_entered_again_does_not_grow),
        cmocka_unit_test(room_is_no_more_than_what_is_free_now),
        cmocka_unit_test(everything_is_bounded),
        cmocka_unit_test(the_host_is_known),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
