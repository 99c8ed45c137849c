/* Fields of clients' JSON: types, ranges, sizes; every refusal names the field, and nothing is left half done that
 * the request's own deinit does not free (ASan). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "base/buf.h"
#include "base/utf8.h"
#include "proto/fields.h"
#include "proto/server.h"

static json_t *parse(const char *text, struct ic_err *err)
{
    *err = (struct ic_err){0};
    return ic_json_object(text, strlen(text), err);
}

static void only_whole_objects_are_messages(void **state)
{
    static const struct {
        const char *text;
        size_t len; /* 0: strlen */
        bool good;
    } t[] = {
        {"{}", 0, true},
        {" {\"a\": 1} \n", 0, true},
        {"{\"a\":1,\"a\":2}", 0, true},
        {"{\"a\":\"\\ud83d\\ude00\"}", 0, true},
        {"", 0, false},
        {"[]", 0, false},
        {"1", 0, false},
        {"null", 0, false},
        {"{", 0, false},
        {"{}{}", 0, false},
        {"{} x", 0, false},
        {"{\"a\":NaN}", 0, false},
        {"{\"a\":Infinity}", 0, false},
        {"{\"a\":1e400}", 0, false},
        {"{\"a\":-1e400}", 0, false},
        {"{\"a\":99999999999999999999}", 0, true}, /* a number, too */
        {"{\"a\":01}", 0, false},
        {"{\"a\":\"\xFF\"}", 0, false},
        {"{\"a\":\"\xED\xA0\x80\"}", 0, false},
        {"{\"a\":\"\\ud83d\"}", 0, false},
        {"{\"a\":\"\\u0000\"}", 0, false}, /* strings are C strings further in */
        {"{\"a\":\"\n\"}", 0, false},
        {"{\"a\":1}\0x", 9, false},
        {"{\"a\0b\":1}", 9, false},
        {"\xEF\xBB\xBF{}", 0, false},
    };
    struct ic_err err;

    (void)state;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        err = (struct ic_err){0};
        json_t *o = ic_json_object(t[i].text, t[i].len ? t[i].len : strlen(t[i].text), &err);
        assert_true((o != NULL) == t[i].good && (err.code == IC_OK) == t[i].good);
        assert_true(t[i].good || (err.code == IC_BAD_REQUEST && ic_utf8_valid(err.msg, strlen(err.msg))));
        json_decref(o);
    }
}

static void nesting_has_a_bound(void **state)
{
    (void)state;
    for (int deep = IC_JSON_DEPTH_MAX - 2; deep <= 200000; deep = deep < 70 ? deep + 1 : deep * 7)
        for (int kind = 0; kind < 2; kind++) {
            struct ic_buf b = {0};
            struct ic_err err = {0};
            ic_buf_puts(&b, "{\"a\":");
            for (int i = 1; i < deep; i++)
                ic_buf_puts(&b, kind ? "[" : "{\"a\":");
            ic_buf_puts(&b, kind ? "" : "1");
            for (int i = 1; i < deep; i++)
                ic_buf_puts(&b, kind ? "]" : "}");
            ic_buf_puts(&b, kind && deep == 1 ? "1}" : "}");
            json_t *o = ic_json_object(b.data, b.len, &err);
            assert_true((o != NULL) == (deep <= IC_JSON_DEPTH_MAX));
            assert_true(o || strstr(err.msg, "deeper"));
            json_decref(o);
            ic_buf_deinit(&b);
        }
    struct ic_err err;
    char text[400] = "{\"a\":\"\\\""; /* brackets in a string are none, also behind an escaped quote */
    memset(text + 8, '[', 300);
    strcpy(text + 308, "\"}");
    json_t *o = parse(text, &err);
    assert_non_null(o);
    json_decref(o);
}

static void numbers(void **state)
{
    static const struct {
        const char *text;
        bool num, whole; /* accepted as number 0 … 10, as whole number 0 … 10 */
        double want;
    } t[] = {
        {"{}", true, true, -7},
        {"{\"v\":null}", true, true, -7},
        {"{\"v\":0}", true, true, 0},
        {"{\"v\":10}", true, true, 10},
        {"{\"v\":2.5}", true, false, 2.5},
        {"{\"v\":3.0}", true, true, 3},
        {"{\"v\":1e1}", true, true, 10},
        {"{\"v\":-0.0}", true, true, 0},
        {"{\"v\":1e-320}", true, false, 1e-320},
        {"{\"v\":10.000001}", false, false, 0},
        {"{\"v\":11}", false, false, 0},
        {"{\"v\":-1}", false, false, 0},
        {"{\"v\":1e300}", false, false, 0},
        {"{\"v\":-1e300}", false, false, 0},
        {"{\"v\":9223372036854775807}", false, false, 0},
        {"{\"v\":-9223372036854775808}", false, false, 0},
        {"{\"v\":9.3e18}", false, false, 0},
        {"{\"v\":\"3\"}", false, false, 0},
        {"{\"v\":true}", false, false, 0},
        {"{\"v\":[3]}", false, false, 0},
        {"{\"v\":{}}", false, false, 0},
    };
    struct ic_err err;

    (void)state;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        json_t *o = parse(t[i].text, &err);
        double d = -7;
        int64_t n = -7;
        assert_non_null(o);
        assert_int_equal(ic_field_num(o, "v", 0, 10, &d, &err), t[i].num ? IC_OK : IC_BAD_REQUEST);
        assert_true(t[i].num ? d <= t[i].want && d >= t[i].want : d < -6.9 && strstr(err.msg, "v must"));
        err = (struct ic_err){0};
        assert_int_equal(ic_field_int(o, "v", 0, 10, &n, &err), t[i].whole ? IC_OK : IC_BAD_REQUEST);
        assert_true(t[i].whole ? n == (int64_t)t[i].want : n == -7 && !strncmp(err.msg, "v ", 2));
        json_decref(o);
    }
    json_t *o = parse("{\"v\":-9223372036854775808,\"w\":9223372036854775807}", &err);
    int64_t v = 0, w = 0;
    assert_int_equal(ic_field_int(o, "v", INT64_MIN, INT64_MAX, &v, &err), IC_OK);
    assert_int_equal(ic_field_int(o, "w", INT64_MIN, INT64_MAX, &w, &err), IC_OK);
    assert_true(v == INT64_MIN && w == INT64_MAX);
    json_decref(o);
}

static void strings_and_booleans(void **state)
{
    struct ic_err err;
    json_t *o = parse("{\"s\":\"abc\",\"n\":null,\"t\":true,\"i\":1,\"e\":\"\"}", &err);
    const char *s = "before";
    bool b = false;

    (void)state;
    assert_int_equal(ic_field_str(o, "none", 3, &s, &err), IC_OK);
    assert_int_equal(ic_field_str(o, "n", 3, &s, &err), IC_OK);
    assert_string_equal(s, "before");
    assert_int_equal(ic_field_str(o, "s", 2, &s, &err), IC_TOO_LARGE);
    assert_int_equal(ic_field_str(o, "i", 3, &s, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_field_str(o, "t", 3, &s, &err), IC_BAD_REQUEST);
    assert_string_equal(s, "before");
    assert_int_equal(ic_field_str(o, "s", 3, &s, &err), IC_OK);
    assert_string_equal(s, "abc");
    assert_int_equal(ic_field_str(o, "e", 0, &s, &err), IC_OK);
    assert_string_equal(s, "");
    assert_int_equal(ic_field_bool(o, "none", &b, &err), IC_OK);
    assert_int_equal(ic_field_bool(o, "i", &b, &err), IC_BAD_REQUEST);
    assert_false(b);
    assert_int_equal(ic_field_bool(o, "t", &b, &err), IC_OK);
    assert_true(b);
    json_decref(o);
}

static enum ic_status params(const char *text, struct ic_text_params *p, struct ic_err *err)
{
    json_t *o = parse(text, err);

    assert_non_null(o);
    ic_text_params_init(p);
    enum ic_status st = ic_parse_params(o, p, err);
    json_decref(o); /* what p keeps must be its own */
    return st;
}

static void biases(void **state)
{
    static const char *const good[] = {"{\"logit_bias\":null}", "{\"logit_bias\":{}}",
                                       "{\"logit_bias\":[]}"};
    static const char *const bad[] = {"5",
                                      "\"x\"",
                                      "true",
                                      "{\"x\":1}",
                                      "{\"\":1}",
                                      "{\"-1\":1}",
                                      "{\"1.5\":1}",
                                      "{\" 1\":1}",
                                      "{\"2147483648\":1}",
                                      "{\"99999999999999999999\":1}",
                                      "{\"1\":101}",
                                      "{\"1\":-100.5}",
                                      "{\"1\":\"2\"}",
                                      "{\"1\":true}",
                                      "{\"1\":null}",
                                      "[1]",
                                      "[[1]]",
                                      "[[1,2,3]]",
                                      "[[\"a\",1]]",
                                      "[[1.5,1]]",
                                      "[[-1,1]]",
                                      "[[1,true]]",
                                      "[{\"1\":2}]"};
    struct ic_text_params p;
    struct ic_err err;
    char text[8192];

    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        assert_int_equal(params(good[i], &p, &err), IC_OK);
        assert_int_equal(p.n_bias, 0);
        ic_text_params_deinit(&p);
    }
    assert_int_equal(params("{\"logit_bias\":{\"0\":-100,\"2147483647\":2.5,\"7\":false}}", &p, &err),
                     IC_OK);
    assert_true(p.n_bias == 3 && p.bias[0].token == 0 && p.bias[0].bias <= -100 &&
                p.bias[1].token == INT32_MAX && p.bias[2].token == 7 && isinf(p.bias[2].bias));
    ic_text_params_deinit(&p);
    assert_int_equal(params("{\"logit_bias\":[[3,100],[3.0,false]]}", &p, &err), IC_OK);
    assert_true(p.n_bias == 2 && p.bias[1].token == 3 && p.bias[1].bias < -1e30f);
    ic_text_params_deinit(&p);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        snprintf(text, sizeof text, "{\"logit_bias\":%s}", bad[i]);
        assert_int_equal(params(text, &p, &err), IC_BAD_REQUEST);
        assert_non_null(strstr(err.msg, "logit_bias"));
        ic_text_params_deinit(&p);
    }
    for (int n = IC_LOGIT_BIAS_MAX; n <= IC_LOGIT_BIAS_MAX + 1; n++) {
        size_t len = (size_t)snprintf(text, sizeof text, "{\"logit_bias\":[[0,1]");
        for (int i = 1; i < n; i++)
            len += (size_t)snprintf(text + len, sizeof text - len, ",[%d,1]", i);
        snprintf(text + len, sizeof text - len, "]}");
        assert_int_equal(params(text, &p, &err), n > IC_LOGIT_BIAS_MAX ? IC_TOO_LARGE : IC_OK);
        ic_text_params_deinit(&p);
    }
}

static bool near(float a, double b)
{
    return (double)a > b - 1e-6 && (double)a < b + 1e-6;
}

static void parameters_land_where_they_belong(void **state)
{
    struct ic_text_params p, def;
    struct ic_err err;

    (void)state;
    ic_text_params_init(&def);
    assert_int_equal(params("{\"unknown\":[{}]}", &p, &err), IC_OK);
    assert_memory_equal(&p, &def, sizeof p); /* nothing given, nothing changed: not even by rounding */
    assert_int_equal(
        params(
            "{\"temp\":0.5,\"top_k\":7,\"top_p\":0.25,\"min_p\":0.125,\"repeat_penalty\":1.5,"
            "\"frequency_penalty\":-2,\"presence_penalty\":2,\"seed\":42,\"max_tokens\":9,\"logprobs\":20,"
            "\"stop\":[\"a\",\"bc\"],\"grammar\":\"root ::= \\\"x\\\"\"}",
            &p, &err),
        IC_OK);
    assert_true(near(p.temp, 0.5) && near(p.top_p, 0.25) && near(p.min_p, 0.125) &&
                near(p.repeat_penalty, 1.5));
    assert_true(near(p.frequency_penalty, -2) && near(p.presence_penalty, 2));
    assert_true(p.top_k == 7 && p.seed == 42 && p.has_seed && p.max_tokens == 9 && p.logprobs == 20 &&
                p.n_stop == 2);
    assert_string_equal(p.stop[0], "a");
    assert_string_equal(p.stop[1], "bc");
    assert_string_equal(p.grammar, "root ::= \"x\"");
    ic_text_params_deinit(&p);

    assert_int_equal(
        params("{\"temp\":0.5,\"temperature\":1.5,\"stop\":\"one\",\"max_tokens\":-1,\"seed\":-1}", &p,
               &err),
        IC_OK);
    assert_true(near(p.temp, 1.5) && p.n_stop == 1 && p.max_tokens == -1 && !p.has_seed);
    ic_text_params_deinit(&p);
    assert_int_equal(params("{\"max_tokens\":0,\"seed\":0,\"top_k\":0,\"temp\":0}", &p, &err), IC_OK);
    assert_true(p.max_tokens == 0 && p.has_seed && p.seed == 0 && p.top_k == 0 && p.temp <= 0);
    ic_text_params_deinit(&p);

    uint32_t seen[3];
    static const char *const seeds[] = {"{\"seed\":1}", "{\"seed\":4294967297}",
                                        "{\"seed\":9223372036854775807}"};
    for (int i = 0; i < 3; i++) { /* all of a long seed counts */
        assert_int_equal(params(seeds[i], &p, &err), IC_OK);
        seen[i] = p.seed;
        ic_text_params_deinit(&p);
    }
    assert_true(seen[0] != seen[1] && seen[1] != seen[2] && seen[0] != seen[2]);
}

static void bad_parameters_are_named(void **state)
{
    static const struct {
        const char *text, *says;
        enum ic_status want;
    } t[] = {
        {"{\"temp\":-0.1}", "temp", IC_BAD_REQUEST},
        {"{\"temp\":\"1\"}", "temp", IC_BAD_REQUEST},
        {"{\"temp\":101}", "temp", IC_BAD_REQUEST},
        {"{\"temperature\":-1}", "temperature", IC_BAD_REQUEST},
        {"{\"top_p\":1.01}", "top_p", IC_BAD_REQUEST},
        {"{\"min_p\":-0.01}", "min_p", IC_BAD_REQUEST},
        {"{\"repeat_penalty\":0}", "repeat_penalty", IC_BAD_REQUEST},
        {"{\"frequency_penalty\":2.1}", "frequency_penalty", IC_BAD_REQUEST},
        {"{\"presence_penalty\":-2.1}", "presence_penalty", IC_BAD_REQUEST},
        {"{\"top_k\":-1}", "top_k", IC_BAD_REQUEST},
        {"{\"top_k\":2147483648}", "top_k", IC_BAD_REQUEST},
        {"{\"top_k\":1.5}", "top_k", IC_BAD_REQUEST},
        {"{\"max_tokens\":-2}", "max_tokens", IC_BAD_REQUEST},
        {"{\"max_tokens\":4294967295}", "max_tokens", IC_BAD_REQUEST},
        {"{\"logprobs\":21}", "logprobs", IC_BAD_REQUEST},
        {"{\"logprobs\":true}", "logprobs", IC_BAD_REQUEST},
        {"{\"seed\":-2}", "seed", IC_BAD_REQUEST},
        {"{\"seed\":1e300}", "seed", IC_BAD_REQUEST},
        {"{\"stop\":3}", "stop", IC_BAD_REQUEST},
        {"{\"stop\":[\"a\",3]}", "stop", IC_BAD_REQUEST},
        {"{\"stop\":\"\"}", "stop", IC_BAD_REQUEST},
        {"{\"stop\":[\"a\",\"\"]}", "stop", IC_BAD_REQUEST},
        {"{\"grammar\":\"\"}", "grammar", IC_BAD_REQUEST},
        {"{\"grammar\":3}", "grammar", IC_BAD_REQUEST},
        {"{\"grammar\":\"root ::= \",\"json_schema\":{}}", "exclude", IC_BAD_REQUEST},
        {"{\"json_schema\":3}", "schema", IC_BAD_REQUEST},
    };
    struct ic_text_params p;
    struct ic_err err;

    (void)state;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        assert_int_equal(params(t[i].text, &p, &err), t[i].want);
        assert_int_equal(err.code, t[i].want);
        assert_non_null(strstr(err.msg, t[i].says));
        ic_text_params_deinit(&p);
    }
}

static void stops_are_bounded(void **state)
{
    struct ic_text_params p;
    struct ic_err err;
    char text[1024], one[IC_STOP_LEN_MAX + 2];

    (void)state;
    for (int n = IC_STOP_MAX; n <= IC_STOP_MAX + 1; n++) {
        struct ic_buf b = {0};
        ic_buf_puts(&b, "{\"stop\":[\"x\"");
        for (int i = 1; i < n; i++)
            ic_buf_puts(&b, ",\"y\"");
        ic_buf_put(&b, "]}", 3);
        assert_int_equal(params(b.data, &p, &err), n <= IC_STOP_MAX ? IC_OK : IC_TOO_LARGE);
        ic_text_params_deinit(&p);
        ic_buf_deinit(&b);
    }
    for (size_t n = IC_STOP_LEN_MAX; n <= IC_STOP_LEN_MAX + 1; n++) {
        memset(one, 'a', n);
        one[n] = 0;
        snprintf(text, sizeof text, "{\"stop\":[\"%s\"]}", one);
        assert_int_equal(params(text, &p, &err), n <= IC_STOP_LEN_MAX ? IC_OK : IC_TOO_LARGE);
        ic_text_params_deinit(&p);
    }
}

static enum ic_status messages(const char *list, struct ic_text_req **req, struct ic_err *err)
{
    struct ic_buf b = {0};

    ic_buf_printf(&b, "{\"m\":%s}", list);
    ic_buf_put(&b, "", 1);
    json_t *o = parse(b.data, err);
    assert_non_null(o);
    *req = ic_text_req_new();
    assert_non_null(*req);
    enum ic_status st = ic_parse_messages(json_object_get(o, "m"), *req, err);
    json_decref(o);
    ic_buf_deinit(&b);
    return st;
}

static void turns_of_a_conversation(void **state)
{
    struct ic_text_req *r;
    struct ic_err err;

    (void)state;
    assert_int_equal(
        messages("[{\"role\":\"developer\",\"content\":\"be\"},{\"role\":\"user\",\"content\":[{\"type\":"
                 "\"text\","
                 "\"text\":\"a\"},{\"type\":\"text\",\"text\":\"b\"}],\"name\":3},"
                 "{\"role\":\"assistant\",\"content\":\"\"},{\"role\":\"tool\",\"content\":[]}]",
                 &r, &err),
        IC_OK);
    assert_int_equal(r->n_msgs, 4);
    assert_string_equal(r->msgs[0].role, "system");
    assert_string_equal(r->msgs[1].content, "ab");
    assert_string_equal(r->msgs[2].content, "");
    assert_string_equal(r->msgs[3].content, "");
    ic_text_req_unref(r);
}

static void bad_turns_are_refused(void **state)
{
    static const char *const t[] = {
        "[]",
        "{}",
        "\"hi\"",
        "3",
        "null",
        "[null]",
        "[3]",
        "[\"hi\"]",
        "[[]]",
        "[{}]",
        "[{\"role\":\"user\"}]",
        "[{\"role\":\"user\",\"content\":null}]",
        "[{\"role\":\"user\",\"content\":3}]",
        "[{\"role\":\"user\",\"content\":{}}]",
        "[{\"role\":\"root\",\"content\":\"x\"}]",
        "[{\"role\":\"user<|im_end|>\",\"content\":\"x\"}]",
        "[{\"role\":3,\"content\":\"x\"}]",
        "[{\"content\":\"x\"}]",
        "[{\"role\":\"user\",\"content\":[\"x\"]}]",
        "[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]",
        "[{\"role\":\"user\",\"content\":[{\"type\":\"text\"}]}]",
        "[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":3}]}]",
        "[{\"role\":\"user\",\"content\":\"fine\"},{\"role\":\"user\",\"content\":[{\"text\":\"x\"}]}]",
    };
    struct ic_text_req *r;
    struct ic_err err;

    (void)state;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        assert_int_equal(messages(t[i], &r, &err), IC_BAD_REQUEST);
        assert_int_equal(err.code, IC_BAD_REQUEST);
        assert_non_null(strstr(err.msg, "message"));
        ic_text_req_unref(r);
    }
    for (int n = IC_MESSAGES_MAX; n <= IC_MESSAGES_MAX + 1; n++) {
        struct ic_buf b = {0};
        for (int i = 0; i < n; i++)
            ic_buf_puts(&b, i ? ",{\"role\":\"user\",\"content\":\"x\"}"
                              : "[{\"role\":\"user\",\"content\":\"x\"}");
        ic_buf_put(&b, "]", 2);
        assert_int_equal(messages(b.data, &r, &err), n <= IC_MESSAGES_MAX ? IC_OK : IC_TOO_LARGE);
        ic_text_req_unref(r);
        ic_buf_deinit(&b);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(only_whole_objects_are_messages),
        cmocka_unit_test(nesting_has_a_bound),
        cmocka_unit_test(numbers),
        cmocka_unit_test(strings_and_booleans),
        cmocka_unit_test(parameters_land_where_they_belong),
        cmocka_unit_test(biases),
        cmocka_unit_test(bad_parameters_are_named),
        cmocka_unit_test(stops_are_bounded),
        cmocka_unit_test(turns_of_a_conversation),
        cmocka_unit_test(bad_turns_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
