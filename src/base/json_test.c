/* JSON for which memory ends at each place in turn: told as that, nothing kept, nothing written where it does not
 * belong (ASan). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <cmocka.h>

static long left = -1; /* allocations until one fails; negative: none does */
static long held;

static void *malloc_or_not(size_t n)
{
    void *p = left == 0 ? NULL : malloc(n);

    left -= left >= 0;
    held += p != NULL;
    return p;
}

static void free_counted(void *p)
{
    held -= p != NULL;
    free(p);
}

#define malloc malloc_or_not
#define free free_counted
#include "base/json.c"
#undef malloc
#undef free

static const char text[] =
    "{\"a string that is longer than the first buffer of a token\":[1,2.5,true,null,[[]],"
    "\"\\u00e4 and a value that is as long as that, and then some more to make it grow again and again\"],"
    "\"o\":{\"1\":1,\"2\":1,\"3\":1,\"4\":1,\"5\":1,\"6\":1,\"7\":1,\"8\":1,\"9\":1,\"10\":1},\"n\":-"
    "12345678901234}";

static void memory_may_end_anywhere(void **state)
{
    json_error_t je;
    long n = 0;

    (void)state;
    for (json_t *o = NULL; !o; n++) {
        const long before = held;
        left = n;
        o = ic_json_load(text, sizeof text - 1, 0, &je);
        if (!o) {
            assert_int_equal(json_error_code(&je), json_error_out_of_memory);
            assert_int_equal(held, before);
            continue;
        }
        left = -1;
        assert_int_equal(json_integer_value(json_object_get(o, "n")), -12345678901234);
        assert_int_equal(
            json_array_size(json_object_get(o, "a string that is longer than the first buffer of a token")),
            6);
        json_object_set_new(o, "later", json_string("is freed with the rest"));
        json_decref(o);
        assert_int_equal(held, before);
    }
    assert_true(n > 40);
}

static void bad_text_is_not_want_of_memory(void **state)
{
    json_error_t je;

    (void)state;
    left = -1;
    assert_null(ic_json_load("{\"a\":[1,2", 9, 0, &je));
    assert_int_equal(json_error_code(&je), json_error_premature_end_of_input);
    assert_int_equal(held, 0);
    json_t *o = ic_json_load("{\"b\":[]}", 8, 0, NULL);
    assert_non_null(o);
    json_decref(o);
    left = 0;
    assert_null(ic_json_load("{}", 2, 0, NULL));
    assert_int_equal(held, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(memory_may_end_anywhere),
        cmocka_unit_test(bad_text_is_not_want_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
