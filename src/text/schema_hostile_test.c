/* The schema compiler under load and malice: sizes at and past the bounds, references that multiply,
 * random outputs checked for validity, and mutated schemas, which must end in an error or in a grammar
 * that llama.cpp loads. */
#include "text/schema_test.h"

#include "base/clock.h"
#include "text/schema_int.h"

static void repeat(struct ic_buf *b, const char *text, int n)
{
    for (int i = 0; i < n; i++)
        ic_buf_puts(b, text);
}

static char *text_of(struct ic_buf *b)
{
    ic_buf_put(b, "", 1);
    return ic_buf_take(b, NULL);
}

static void hostile_sizes(void **state)
{
    struct ic_buf b = {0};
    char *s;

    (void)state;
    repeat(&b, "{\"items\":", 200);
    ic_buf_puts(&b, "{}");
    repeat(&b, "}", 200);
    s = text_of(&b);
    refused(s, IC_TOO_LARGE, "schemas nest more than 64 deep");
    free(s);

    ic_buf_puts(&b, "{\"enum\":[0");
    for (int i = 1; i < 2001; i++)
        ic_buf_printf(&b, ",%d", i);
    ic_buf_puts(&b, "]}");
    s = text_of(&b);
    refused(s, IC_TOO_LARGE, "\"enum\" has more than 2000 values");
    free(s);

    ic_buf_puts(&b, "{\"properties\":{\"p\":{}");
    for (int i = 0; i < 512; i++)
        ic_buf_printf(&b, ",\"p%d\":{}", i);
    ic_buf_puts(&b, "}}");
    s = text_of(&b);
    refused(s, IC_TOO_LARGE, "more than 512 members of one object");
    free(s);

    ic_buf_puts(&b, "{\"anyOf\":[{}");
    repeat(&b, ",{}", 5000);
    ic_buf_puts(&b, "]}");
    s = text_of(&b);
    refused(s, IC_TOO_LARGE, "more than 4096 schemas");
    free(s);

    ic_buf_puts(&b, "{\"properties\":{\"p\":{}");
    for (int i = 0; i < 400; i++)
        ic_buf_printf(&b, ",\"p%d\":{\"type\":\"string\",\"maxLength\":%d}", i, 1000 + i);
    ic_buf_puts(&b, "}}");
    s = text_of(&b);
    refused(s, IC_TOO_LARGE, "add up to more than 400000 elements");
    free(s);

    ic_buf_puts(&b, "{\"pattern\":\"");
    repeat(&b, "a", 1025);
    ic_buf_puts(&b, "\"}");
    s = text_of(&b);
    refused(s, IC_TOO_LARGE, "\"pattern\" is longer than 1024 characters");
    free(s);

    ic_buf_puts(&b, "{\"pattern\":\"");
    repeat(&b, "(", 60);
    repeat(&b, ")", 60);
    ic_buf_puts(&b, "\"}");
    s = text_of(&b);
    refused(s, IC_BAD_REQUEST, "groups nested more than 50 deep");
    free(s);

    ic_buf_puts(&b, "{\"const\":\"");
    repeat(&b, "x", 300000);
    ic_buf_puts(&b, "\"}");
    s = text_of(&b);
    refused(s, IC_TOO_LARGE, "the constants are longer than 256 KiB");
    free(s);

    ic_buf_puts(&b, "{\"properties\":{\"p\":{}");
    for (int i = 0; i < 500; i++) {
        ic_buf_printf(&b, ",\"p%d\":{\"const\":\"", i);
        repeat(&b, "x", 600);
        ic_buf_puts(&b, "\"}");
    }
    ic_buf_puts(&b, "}}");
    s = text_of(&b);
    refused(s, IC_TOO_LARGE, "the grammar is longer than 256 KiB");
    free(s);
}

static void hostile_references(void **state)
{
    struct ic_buf b = {0};
    char *s;

    (void)state;
    /* each refers to the next twice: 2^40 paths */
    static const char *const forms[] = {"anyOf", "allOf"};
    for (int f = 0; f < 2; f++) {
        ic_buf_puts(&b, "{\"$ref\":\"#/$defs/d0\",\"$defs\":{");
        for (int i = 0; i < 40; i++)
            ic_buf_printf(&b, "\"d%d\":{\"%s\":[{\"$ref\":\"#/$defs/d%d\"},{\"$ref\":\"#/$defs/d%d\"}]},",
                          i, forms[f], i + 1, i + 1);
        ic_buf_puts(&b, "\"d40\":{\"type\":\"null\"}}}");
        s = text_of(&b);
        if (f)
            free(grammar_of(s));
        else
            refused(s, IC_TOO_LARGE, "alternatives of one value");
        free(s);
    }
    ic_buf_puts(&b, "{\"$ref\":\"#/$defs/d0\",\"$defs\":{");
    for (int i = 0; i < 40; i++)
        ic_buf_printf(
            &b,
            "\"d%d\":{\"properties\":{\"a\":{\"$ref\":\"#/$defs/d%d\"},\"b\":{\"$ref\":\"#/$defs/d%d\"}}},",
            i, i + 1, i + 1);
    ic_buf_puts(&b, "\"d40\":{\"type\":\"null\"}}}");
    s = text_of(&b);
    char *g = grammar_of(s);
    assert_true(strlen(g) < 40000);
    assert_true(matches(g, "{\"a\":{\"b\":{\"a\":{}}}}"));
    free(g);
    free(s);

    /* a long chain of $ref */
    ic_buf_puts(&b, "{\"$ref\":\"#/$defs/d0\",\"$defs\":{");
    for (int i = 0; i < 500; i++)
        ic_buf_printf(&b, "\"d%d\":{\"$ref\":\"#/$defs/d%d\"},", i, i + 1);
    ic_buf_puts(&b, "\"d500\":{\"type\":\"null\"}}}");
    s = text_of(&b);
    refused(s, IC_TOO_LARGE, "a chain of more than 128");
    free(s);

    /* alternatives that multiply */
    ic_buf_puts(&b, "{\"allOf\":[{}");
    repeat(&b, ",{\"anyOf\":[{\"minimum\":1},{\"maximum\":0},{\"type\":\"null\"}]}", 12);
    ic_buf_puts(&b, "]}");
    s = text_of(&b);
    refused(s, IC_TOO_LARGE, "alternatives of one value");
    free(s);

    /* recursion where every level meets another set of schemas */
    ic_buf_puts(&b, "{\"$ref\":\"#/$defs/d0\",\"$defs\":{");
    for (int i = 0; i < 24; i++)
        ic_buf_printf(&b,
                      "%s\"d%d\":{\"properties\":{\"a\":{\"allOf\":[{\"$ref\":\"#/$defs/"
                      "d%d\"},{\"$ref\":\"#/$defs/d%d\"}]},"
                      "\"b\":{\"$ref\":\"#/$defs/d%d\"}}}",
                      i ? "," : "", i, (i * 2 + 1) % 24, (i * 3 + 2) % 24, (i * 5 + 1) % 24);
    ic_buf_puts(&b, "}}");
    s = text_of(&b);
    struct ic_buf out = {0};
    json_t *j = parse(s);
    int64_t from = ic_now_ns();
    ic_schema_to_gbnf(j, &out, NULL); /* either way: bounded */
    assert_true(ic_now_ns() - from < 20000 * IC_MS);
    json_decref(j);
    ic_buf_deinit(&out);
    free(s);
}

/* A value checked against itself through $ref without end. */
static void hostile_constant(void **state)
{
    (void)state;
    refused("{\"enum\":[1],\"items\":{\"$ref\":\"#/items\"},\"anyOf\":[{\"$ref\":\"#/items\"}]}",
            IC_BAD_REQUEST, "refers to itself");
    refused(
        "{\"$defs\":{\"a\":{\"$ref\":\"#/$defs/a\"}},\"enum\":[[1]],\"items\":{\"$ref\":\"#/$defs/a\"}}",
        IC_BAD_REQUEST, "meets a \"$ref\" to itself");
}

static void large_but_fine(void **state)
{
    struct ic_buf b = {0};
    char *s, *g;

    (void)state;
    ic_buf_puts(&b, "{\"enum\":[0");
    for (int i = 1; i < 2000; i++)
        ic_buf_printf(&b, ",%d", i * 7);
    ic_buf_puts(&b, "]}");
    s = text_of(&b);
    g = grammar_of(s);
    assert_true(matches(g, "1407") && !matches(g, "1408"));
    free(s);
    free(g);

    ic_buf_puts(&b, "{\"properties\":{\"p\":{}");
    for (int i = 0; i < 511; i++)
        ic_buf_printf(&b, ",\"p%d\":{\"type\":\"integer\"}", i);
    ic_buf_puts(&b, "}}");
    s = text_of(&b);
    g = grammar_of(s);
    assert_true(matches(g, "{\"p3\":1,\"p510\":2}") && !matches(g, "{\"p4\":1,\"p3\":2}"));
    free(s);
    free(g);

    /* counts beyond what one {m,n} of llama.cpp can hold */
    struct ic_buf doc = {0};
    static const int counts[] = {2499, 2500, 3000, 3999, 5001, 5002};
    g = grammar_of("{\"type\":\"string\",\"minLength\":2500,\"maxLength\":5001}");
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        ic_buf_puts(&doc, "\"");
        repeat(&doc, "x", counts[i]);
        ic_buf_puts(&doc, "\"");
        s = text_of(&doc);
        assert_int_equal(matches(g, s), counts[i] >= 2500 && counts[i] <= 5001);
        free(s);
    }
    free(g);
    g = grammar_of("{\"items\":{\"const\":0},\"minItems\":1001}");
    for (int n = 1000; n <= 1002; n++) {
        ic_buf_puts(&doc, "[0");
        repeat(&doc, ",0", n - 1);
        ic_buf_puts(&doc, "]");
        s = text_of(&doc);
        assert_int_equal(matches(g, s), n > 1000);
        free(s);
    }
    free(g);
    free(grammar_of("{\"type\":\"string\",\"maxLength\":65536}"));
    g = grammar_of("{\"type\":\"string\",\"minLength\":65536}");
    struct llama_sampler *sampler = llama_sampler_init_grammar(vocab, g, "root");
    assert_non_null(sampler);
    llama_sampler_free(sampler);
    free(g);
}

/* ---- random outputs are valid ---- */

static uint64_t seed = 88172645463325252u;

static uint32_t pick(uint32_t n)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (uint32_t)((seed >> 16) % n);
}

/* A random text of the grammar, preferring to end; false if it did not within the buffer. */
static bool random_text(const char *gbnf, char *out, size_t size)
{
    struct llama_sampler *g = llama_sampler_init_grammar(vocab, gbnf, "root");
    llama_token_data all[256];
    size_t n = 0;
    bool done = false;

    assert_non_null(g);
    while (n + 1 < size && !done) {
        for (int b = 0; b < 256; b++)
            all[b] = (llama_token_data){byte_token[b], 0.0f, 0.0f};
        all[0].id = llama_vocab_eos(vocab);
        llama_token_data_array list = {all, 256, -1, false};
        llama_sampler_apply(g, &list);
        int ok[256], m = 0, end[4], e = 0;
        for (int b = 0; b < 256; b++) {
            if (!isfinite(all[b].logit) || (b >= 128 && m && ok[0] < 128))
                continue; /* ASCII where there is any: the engine itself lets overlong UTF-8 pass */
            ok[m++] = b;
            if (strchr("]}\"", b)) /* includes the end */
                end[e++] = b;
        }
        if (!m)
            fail_msg("a dead end after %.*s\n%s", (int)n, out, gbnf);
        int b = e && pick(3) == 0 ? end[pick((uint32_t)e)] : ok[pick((uint32_t)m)];
        done = b == 0;
        if (!done) {
            llama_sampler_accept(g, byte_token[b]);
            out[n++] = (char)b;
        }
    }
    out[n] = 0;
    llama_sampler_free(g);
    return done;
}

static const char *const rich[] = {
    "{\"properties\":{\"a\":{\"type\":\"integer\",\"minimum\":-37,\"maximum\":1250},\"b\":{\"type\":"
    "\"number\","
    "\"exclusiveMinimum\":-2.75,\"maximum\":3.125},\"c\":{\"pattern\":\"^[a-c]{2,4}(-\\\\d+)?$\","
    "\"maxLength\":7}},"
    "\"required\":[\"b\"],\"additionalProperties\":{\"type\":\"boolean\"}}",
    "{\"type\":\"array\",\"prefixItems\":[{\"enum\":[1,\"x\",null]},{\"format\":\"ipv4\"}],\"items\":{"
    "\"anyOf\":"
    "[{\"type\":\"null\"},{\"minLength\":1,\"maxLength\":3}]},\"minItems\":1,\"maxItems\":5}",
    "{\"$defs\":{\"t\":{\"properties\":{\"l\":{\"$ref\":\"#/$defs/"
    "t\"},\"v\":{\"type\":\"integer\",\"maximum\":-5}},"
    "\"required\":[\"v\"]}},\"allOf\":[{\"$ref\":\"#/$defs/t\"}],\"properties\":{\"v\":{\"minimum\":-12}}}",
    "{\"oneOf\":[{\"properties\":{\"k\":{\"const\":\"a\"},\"x\":{\"type\":\"string\",\"pattern\":\"q\"}},"
    "\"required\":[\"k\"]},"
    "{\"properties\":{\"k\":{\"const\":\"b\"},\"y\":{\"format\":\"date\"}},\"required\":[\"k\",\"y\"]}]}",
    "{\"type\":\"number\",\"minimum\":0.07,\"maximum\":120.5}",
    "{\"type\":[\"integer\",\"null\"],\"exclusiveMinimum\":995,\"exclusiveMaximum\":100003}",
    "{\"type\":\"object\",\"properties\":{\"id\":true,\"idx\":{\"type\":\"null\"}},"
    "\"additionalProperties\":true}",
};

static void random_outputs_are_valid(void **state)
{
    char text[600];
    int finished = 0;

    (void)state;
    for (size_t i = 0; i < sizeof rich / sizeof *rich; i++) {
        char *g = grammar_of(rich[i]);
        json_t *schema = parse(rich[i]);
        struct sc *c = calloc(1, sizeof *c);
        assert_non_null(c);
        c->root = schema;
        assert_true(sc_grammar_init(c));
        sc_check_keywords(c);
        for (int k = 0; k < 60; k++) {
            if (!random_text(g, text, sizeof text))
                continue;
            json_t *doc = json_loads(text, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
            if (!doc || !sc_valid(c, schema, doc))
                fail_msg("%s\nwrote %s", rich[i], text);
            json_decref(doc);
            finished++;
        }
        sc_free(c);
        free(c);
        json_decref(schema);
        free(g);
    }
    assert_true(finished > 200);
}

/* ---- mutated schemas ---- */

static const char *const pieces[] = {"\"type\":\"object\"",
                                     "\"type\":\"string\"",
                                     "\"type\":[\"integer\",\"null\"]",
                                     "\"type\":7",
                                     "\"minimum\":-3",
                                     "\"maximum\":4.5",
                                     "\"exclusiveMinimum\":1e9",
                                     "\"minLength\":2",
                                     "\"maxLength\":30",
                                     "\"minItems\":1",
                                     "\"maxItems\":3000",
                                     "\"pattern\":\"^a[b-d]*$\"",
                                     "\"pattern\":\"x{2,5}|(y\"",
                                     "\"pattern\":\".*z.?\"",
                                     "\"format\":\"uuid\"",
                                     "\"format\":\"x\"",
                                     "\"enum\":[1,\"a\",{},[2]]",
                                     "\"const\":\"\\u00e9\\n\"",
                                     "\"required\":[\"a\",\"b\"]",
                                     "\"additionalProperties\":false",
                                     "\"additionalProperties\":true",
                                     "\"$ref\":\"#\"",
                                     "\"$ref\":\"#/properties/a\"",
                                     "\"$ref\":\"#/items\"",
                                     "\"uniqueItems\":false",
                                     "\"title\":3",
                                     "\"not\":{}",
                                     "\"items\":true",
                                     "\"items\":[]"};

static void random_schema(struct ic_buf *b, int depth)
{
    static const char *const holders[] = {"\"items\":", "\"additionalProperties\":"};
    static const char *const lists[] = {"anyOf", "allOf", "oneOf", "prefixItems"};
    uint32_t n = 1 + pick(3);

    if (pick(20) == 0) {
        ic_buf_puts(b, pick(2) ? "true" : "false");
        return;
    }
    ic_buf_puts(b, "{");
    for (uint32_t i = 0; i < n; i++) {
        ic_buf_puts(b, i ? "," : "");
        uint32_t kind = depth > 3 ? 9 : pick(10);
        if (kind < 2) {
            ic_buf_puts(b, holders[pick(2)]);
            random_schema(b, depth + 1);
        } else if (kind < 4) {
            ic_buf_printf(b, "\"%s\":[", lists[pick(4)]);
            random_schema(b, depth + 1);
            ic_buf_puts(b, ",");
            random_schema(b, depth + 1);
            ic_buf_puts(b, "]");
        } else if (kind < 6) {
            ic_buf_puts(b, "\"properties\":{\"a\":");
            random_schema(b, depth + 1);
            ic_buf_puts(b, ",\"b\":");
            random_schema(b, depth + 1);
            ic_buf_puts(b, "}");
        } else {
            ic_buf_puts(b, pieces[pick(sizeof pieces / sizeof *pieces - (pick(4) ? 3 : 0))]);
        }
    }
    ic_buf_puts(b, "}");
}

static void fuzz(void **state)
{
    struct ic_buf b = {0}, out = {0};
    const char *env = getenv("IC_FUZZ_ROUNDS");
    int rounds = env ? atoi(env) : 3000, good = 0, bad = 0;

    (void)state;
    for (int i = 0; i < rounds; i++) {
        struct ic_err err = {0};
        if (pick(4)) {
            random_schema(&b, 0);
        } else { /* a rich one with bytes changed */
            ic_buf_puts(&b, rich[pick(sizeof rich / sizeof *rich)]);
            for (uint32_t k = 1 + pick(3); k; k--)
                b.data[pick((uint32_t)b.len)] = "{}[]\",:01a9.-$*+?"[pick(17)];
        }
        char *text = text_of(&b);
        json_t *j = json_loads(text, JSON_DECODE_ANY, NULL);
        if (j && !ic_schema_to_gbnf(j, &out, &err)) {
            struct llama_sampler *g = llama_sampler_init_grammar(vocab, out.data, "root");
            if (!g)
                fail_msg("llama.cpp refuses the grammar of %s\n%s", text, out.data);
            llama_sampler_free(g);
            good++;
        } else if (j) {
            assert_true(err.code && err.msg[0] && !out.len);
            bad++;
        }
        json_decref(j);
        free(text);
    }
    ic_buf_deinit(&out);
    if (rounds >= 1000)
        assert_true(good > 100 && bad > 100);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(hostile_sizes),
        cmocka_unit_test(hostile_references),
        cmocka_unit_test(hostile_constant),
        cmocka_unit_test(large_but_fine),
        cmocka_unit_test(random_outputs_are_valid),
        cmocka_unit_test(fuzz),
    };
    return cmocka_run_group_tests(tests, load_vocab, free_vocab);
}
