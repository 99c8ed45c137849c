#include <setjmp.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "base/buf.h"
#include "base/status.h"
#include "base/utf8.h"

static void utf8_validity(void **state)
{
    (void)state;
    assert_true(ic_utf8_valid("a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80", 10));
    assert_false(ic_utf8_valid("\xC0\x80", 2));         /* overlong */
    assert_false(ic_utf8_valid("\xED\xA0\x80", 3));     /* surrogate */
    assert_false(ic_utf8_valid("\xF4\x90\x80\x80", 4)); /* past U+10FFFF */
    assert_false(ic_utf8_valid("\xE2\x82", 2));         /* cut */
}

static void utf8_waits_only_for_what_can_come(void **state)
{
    (void)state;
    assert_int_equal(ic_utf8_whole("ab\xE2\x82", 4), 2);
    assert_int_equal(ic_utf8_whole("ab\xE2\x82\xAC", 5), 5);
    assert_int_equal(ic_utf8_whole("\xF0\x9F\x98", 3), 0);
    assert_int_equal(ic_utf8_whole("a\xFF", 2), 2);        /* never valid: do not wait */
    assert_int_equal(ic_utf8_whole("a\xED\xA0", 3), 3);    /* a surrogate cannot be completed */
    assert_int_equal(ic_utf8_whole("\x80\x80\x80", 3), 3); /* stray continuations */
}

static void utf8_scrub_replaces_maximal_parts(void **state)
{
    char out[64];
    (void)state;
    size_t n = ic_utf8_scrub(out, "a\xE2\x82z\xFF", 5);
    assert_int_equal(n, 8);
    assert_memory_equal(out, "a\xEF\xBF\xBDz\xEF\xBF\xBD", n);
}

static void json_is_always_valid(void **state)
{
    struct ic_buf b = {0};
    (void)state;
    ic_buf_puts(&b, "{");
    ic_json_kstr(&b, "a\"b", "x\n\x01\xFF");
    ic_json_knum(&b, "n", (double)NAN);
    ic_json_kbool(&b, "t", true);
    ic_buf_puts(&b, "}");
    ic_buf_put(&b, "", 1);
    assert_false(b.failed);
    assert_string_equal(b.data, "{\"a\\\"b\":\"x\\n\\u0001\xEF\xBF\xBD\",\"n\":null,\"t\":true}");
    ic_buf_deinit(&b);
}

static void buffer_refuses_past_its_bound(void **state)
{
    struct ic_buf b = {.max = 10};
    (void)state;
    ic_buf_puts(&b, "12345678");
    ic_buf_puts(&b, "abc");
    assert_true(b.failed);
    assert_int_equal(b.len, 8);
    ic_buf_deinit(&b);
}

static void errors_carry_clean_text(void **state)
{
    struct ic_err err = {0};
    (void)state;
    assert_int_equal(ic_fail(&err, IC_BUSY, "bad \xC3%c", '\n'), IC_BUSY);
    assert_true(ic_utf8_valid(err.msg, strlen(err.msg)));
    assert_string_equal(ic_status_name(err.code), "busy");
    assert_int_equal(ic_status_http(err.code), 429);
    assert_int_equal(ic_fail(NULL, IC_OOM, "x"), IC_OOM);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(utf8_validity),
        cmocka_unit_test(utf8_waits_only_for_what_can_come),
        cmocka_unit_test(utf8_scrub_replaces_maximal_parts),
        cmocka_unit_test(json_is_always_valid),
        cmocka_unit_test(buffer_refuses_past_its_bound),
        cmocka_unit_test(errors_carry_clean_text),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
