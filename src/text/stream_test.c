/* The text stream against an oracle that sees the whole answer at once: however the bytes are cut into tokens, the
 * same text comes out, in whole characters, up to the first complete stop string. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "base/utf8.h"
#include "text/stream.h"

/* Byte by byte: the text ends before the first stop string that is complete, the longest where several end together. */
static size_t naive_end(char *const *stop, int n_stop, const char *s, size_t len, bool *stopped)
{
    for (size_t e = 1; e <= len; e++) {
        size_t longest = 0;
        for (int i = 0; i < n_stop; i++) {
            size_t n = strlen(stop[i]);
            if (n <= e && n > longest && !memcmp(s + e - n, stop[i], n))
                longest = n;
        }
        if (longest) {
            *stopped = true;
            return e - longest;
        }
    }
    *stopped = false;
    return len;
}

/* Pushes s cut before each position whose bit is set in `cuts` (of the first 64), and compares with the oracle. */
static void check_cut(char *const *stop, int n_stop, const char *s, size_t len, uint64_t cuts)
{
    struct ic_stream st = {.stop = stop, .n_stop = n_stop};
    struct ic_buf out = {0}, want = {0};
    bool stopped;
    size_t from = 0, end = naive_end(stop, n_stop, s, len, &stopped);

    assert_true(ic_buf_reserve(&want, 3 * len + 1));
    want.len = ic_utf8_scrub(want.data, s, end);
    for (size_t i = 1; i <= len; i++) {
        if (i < len && !(cuts >> (i % 64) & 1))
            continue;
        size_t was = out.len;
        ic_stream_push(&st, s + from, i - from, &out);
        /* What leaves is whole characters, and never more than the oracle lets out. */
        assert_true(out.len == was || ic_utf8_valid(out.data + was, out.len - was));
        assert_true(out.len <= want.len && (!out.len || !memcmp(out.data, want.data, out.len)));
        from = i;
    }
    assert_int_equal(st.stopped, stopped);
    if (!st.stopped)
        ic_stream_flush(&st, &out);
    assert_int_equal(out.len, want.len);
    assert_true(!want.len || !memcmp(out.data, want.data, want.len));
    ic_stream_push(&st, "zzz", 3, &want); /* after a stop nothing comes any more */
    assert_true(!stopped || want.len == out.len);
    ic_stream_deinit(&st);
    ic_buf_deinit(&out);
    ic_buf_deinit(&want);
}

static void every_cut_of_characters_and_stops(void **state)
{
    static const struct {
        const char *text, *stop[3];
    } t[] = {
        {"a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z", {0}},
        {"a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z", {"\xE2\x82\xAC"}},
        {"a\xC3\xA9\xE2\x82\xACz", {"\xC3\xA9z", "\xE2\x82\xACy"}},
        {"ab\xFF\xE2\x82z\xC3", {"z"}},
        {"ab\xFF\xE2\x82z\xC3", {0}},
        {"\xE2\x82\xE2\x82\xAC\x80\x80", {"\xAC\x80"}}, /* a stop that begins inside a character */
        {"aaaab", {"aab"}},
        {"ababac", {"abac"}},
        {"xabcdefy", {"abcdef", "cd"}}, /* the shorter one is complete first, whatever the tokens are */
        {"xabcdefy", {"bcd", "abcd", "d"}},
        {"ab", {"abc"}}, /* held to the end, then sent */
        {"abab", {"abc", "ba"}},
        {"end", {"end"}},
        {"\n\nUser:", {"\nUser:", "\n\n"}},
    };

    (void)state;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        char *stop[3];
        int n = 0;
        while (n < 3 && t[i].stop[n]) {
            stop[n] = (char *)t[i].stop[n];
            n++;
        }
        size_t len = strlen(t[i].text);
        for (uint64_t cuts = 0; cuts < 1u << len; cuts += 2)
            check_cut(stop, n, t[i].text, len, cuts);
    }
}

static uint64_t rng = 88172645463325252u;

static unsigned rnd(unsigned n)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (unsigned)(rng >> 20) % n;
}

static void random_texts(void **state)
{
    static const char *const bits[] = {
        "a",    "b",    "ab",       "\xC3",     "\xA9", "\xC3\xA9", "\xE2\x82\xAC",
        "\xE2", "\x82", "\xF0\x9F", "\x98\x80", "\xFF", "\n"};

    (void)state;
    for (int round = 0; round < 60000; round++) {
        char text[200] = "", stops[4][24];
        char *stop[4];
        int n_stop = (int)rnd(5);
        for (int i = 0; i < n_stop; i++) {
            stop[i] = stops[i];
            *stops[i] = 0;
            for (unsigned k = 1 + rnd(4); k > 0; k--)
                strcat(stops[i], bits[rnd(round % 3 ? 3 : 13)]);
        }
        for (unsigned k = rnd(30); k > 0; k--)
            strcat(text, bits[rnd(round % 3 ? 3 : 13)]);
        uint64_t cuts = (uint64_t)rnd(1u << 30) << 32 | rnd(1u << 30);
        check_cut(stop, n_stop, text, strlen(text), round % 4 ? cuts : round % 8 ? ~0ull : 0);
    }
}

/* What can leave does so at once: a reader sees each token when it was made. */
static void nothing_waits_without_a_reason(void **state)
{
    char *stop[] = {(char *)"xyz"};
    struct ic_stream st = {.stop = stop, .n_stop = 1};
    struct ic_buf out = {0};

    (void)state;
    ic_stream_push(&st, "ab", 2, &out);
    assert_int_equal(out.len, 2);
    ic_stream_push(&st, "cx", 2, &out);
    assert_int_equal(out.len, 3); /* x may become xyz */
    ic_stream_push(&st, "xy", 2, &out);
    assert_int_equal(out.len, 4);
    ic_stream_push(&st, "\xC3", 1, &out);
    assert_int_equal(out.len, 6); /* xy cannot any more; the half character waits */
    ic_stream_push(&st, "", 0, &out);
    assert_int_equal(out.len, 6);
    ic_stream_push(&st, "\xA9", 1, &out);
    assert_int_equal(out.len, 8);
    ic_stream_deinit(&st);
    ic_buf_deinit(&out);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_cut_of_characters_and_stops),
        cmocka_unit_test(random_texts),
        cmocka_unit_test(nothing_waits_without_a_reason),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
