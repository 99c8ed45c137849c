/* The schema compiler, keyword by keyword: documents that its grammar must accept and refuse, and
 * schemas that it must refuse with their messages. */
#include "text/schema_test.h"

struct example {
    const char *schema;
    const char *good[16], *bad[24];
};

static void run_examples(const struct example *list, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        char *g = grammar_of(list[i].schema);
        for (size_t k = 0; k < 16 && list[i].good[k]; k++)
            if (!matches(g, list[i].good[k]))
                fail_msg("%s\nmust accept %s\n%s", list[i].schema, list[i].good[k], g);
        for (size_t k = 0; k < 24 && list[i].bad[k]; k++)
            if (matches(g, list[i].bad[k]))
                fail_msg("%s\nmust refuse %s\n%s", list[i].schema, list[i].bad[k], g);
        free(g);
    }
}
#define RUN(list) run_examples(list, sizeof list / sizeof *list)

static void types_and_constants(void **state)
{
    static const struct example list[] = {
        {"{\"type\":\"null\"}", {"null"}, {"", "nul", "true", " null", "null "}},
        {"{\"type\":\"boolean\"}", {"true", "false"}, {"0", "\"true\"", "truefalse"}},
        {"{\"type\":\"integer\"}",
         {"0", "7", "-1", "120", "999999999999999999"},
         {"-0", "01", "1.0", "1e3", "+1", "-", "", "1000000000000000000", "\"1\""}},
        {"{\"type\":\"number\"}",
         {"0", "-0.5", "1.25", "1e5", "1E-12", "2.5e+7"},
         {".5", "1.", "01", "1e", "1e100", "NaN", "--1", "0x1"}},
        {"{\"type\":\"string\"}",
         {"\"\"", "\"a b\"", "\"é\"", "\"日本😀\"", "\"\\n\\t\\\"\\\\\\/\\b\"", "\"\\u00e9\"",
          "\"\\uD83D\\uDE00\"", "\"\x7f\""},
         {"\"", "a", "\"a\nb\"", "\"\\x\"", "\"\\u12\"", "\"\\ud800\"", "\"\\udc00\"", "\"\\ud800\\u0041\"",
          "\"\t\"", "\"\xff\"", "\"\xc0\x80\"", "\"\xed\xa0\x80\"", "\"\xf5\x80\x80\x80\""}},
        {"{\"type\":\"array\"}", {"[]", "[1,\"a\",[null]]", "[ {} ]"}, {"{}", "[1,]", "[,]", "["}},
        {"{\"type\":\"object\"}",
         {"{}", "{\"a\":1}", "{\"a\": {\"b\":[1,2]},\n  \"c\":null}"},
         {"[]", "{a:1}", "{\"a\":1,}", "{\"a\"}", "{\"a\" :1}"}},
        {"{\"type\":[\"string\",\"null\"],\"maxLength\":1}",
         {"null", "\"\"", "\"x\""},
         {"\"xy\"", "1", "true"}},
        {"{\"type\":[\"integer\",\"number\"]}", {"1", "1.5"}, {"\"1\""}},
        {"true", {"1", "\"x\"", "{\"a\":[]}", "null", "[true,false]"}, {"", "x", "1 "}},
        {"{}", {"1", "{}"}, {"tru"}},
        {"{\"title\":\"t\",\"description\":\"d\",\"default\":3,\"examples\":[1],\"deprecated\":true,"
         "\"readOnly\":true,\"writeOnly\":false,\"$comment\":\"c\",\"$schema\":\"s\",\"$id\":\"i\"}",
         {"1", "[]"},
         {"x"}},
        {"{\"const\":\"a\\\"b\\\\c\\nd\"}", {"\"a\\\"b\\\\c\\nd\""}, {"\"a\"", "\"a\\\"b\\\\c\\u000ad\""}},
        {"{\"const\":{\"a\":[1,2.5,null,true],\"b\":{}}}",
         {"{\"a\":[1,2.5,null,true],\"b\":{}}"},
         {"{\"b\":{},\"a\":[1,2.5,null,true]}", "{}"}},
        {"{\"const\":1.0}", {"1"}, {"1.0"}},
        {"{\"enum\":[0.1,1e300,-2.5e-9,100,123456.75]}",
         {"0.1", "1e300", "-2.5e-9", "100", "123456.75"},
         {"1"}},
        {"{\"enum\":[\"red\",\"reddish\",\"r\",\"été\",\"étale\",\"日\",\"月\",null,7,77,[1]]}",
         {"\"red\"", "\"reddish\"", "\"r\"", "\"été\"", "\"étale\"", "\"日\"", "\"月\"", "null", "7", "77",
          "[1]"},
         {"\"re\"", "\"redd\"", "\"\"", "777", "[]", "\"é\"", "\"\xe6\""}},
        {"{\"enum\":[\"a-b]\",\"[^c\",\"#\",\"{|}\",\"(?)\"]}",
         {"\"a-b]\"", "\"[^c\"", "\"#\"", "\"{|}\"", "\"(?)\""},
         {"\"a\""}},
        {"{\"enum\":[\"\\u0000\",\"\\u007f\"]}", {"\"\\u007f\"", "\"\\u0000\""}, {"\"\""}},
        /* siblings take constants away */
        {"{\"type\":\"string\",\"enum\":[\"a\",1,null]}", {"\"a\""}, {"1", "null"}},
        {"{\"enum\":[1,5,9,9.5],\"minimum\":2,\"type\":\"integer\",\"maximum\":9}",
         {"5", "9"},
         {"1", "9.5"}},
        {"{\"enum\":[\"ab\",\"abc\",\"x\"],\"pattern\":\"^a\",\"maxLength\":2}",
         {"\"ab\""},
         {"\"abc\"", "\"x\""}},
        {"{\"enum\":[[1],[1,2],[\"a\"]],\"items\":{\"type\":\"integer\"},\"minItems\":2}",
         {"[1,2]"},
         {"[1]", "[\"a\"]"}},
        {"{\"enum\":[{\"a\":1},{\"a\":\"x\"},{\"b\":1}],\"properties\":{\"a\":{\"type\":\"integer\"}},"
         "\"required\":[\"a\"]}",
         {"{\"a\":1}"},
         {"{\"a\":\"x\"}", "{\"b\":1}"}},
        {"{\"enum\":[1,2,3],\"const\":2}", {"2"}, {"1", "3"}},
        {"{\"enum\":[1,2,3],\"anyOf\":[{\"enum\":[3,4]},{\"maximum\":1}]}", {"1", "3"}, {"2", "4"}},
        {"{\"allOf\":[{\"enum\":[1,2,3]},{\"enum\":[3.0,2,9]}]}", {"2", "3"}, {"1", "9"}},
    };
    (void)state;
    RUN(list);
}

static void objects(void **state)
{
    static const struct example list[] = {
        {"{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"},\"b\":{\"type\":\"boolean\"},"
         "\"c\":{\"type\":\"null\"}}}",
         {"{}", "{\"a\":1}", "{\"b\":true}", "{\"c\":null}", "{\"a\":1,\"b\":true}", "{\"a\":1,\"c\":null}",
          "{\"b\":false,\"c\":null}", "{\"a\":1,\"b\":true,\"c\":null}", "{ \"a\": 1, \"b\": true }",
          "{\n  \"a\": 1,\n  \"c\": null\n}", "{ }"},
         {"{\"b\":true,\"a\":1}", "{\"a\":1,}", "{,\"a\":1}", "{\"a\":1 \"b\":true}", "{\"a\":1,\"a\":1}",
          "{\"d\":1}", "{\"a\":true}", "{\"a\":  1}", "{  }", "{\"a\":1,\n\n\"b\":true}"}},
        {"{\"properties\":{\"a\":{\"type\":\"integer\"},\"b\":{\"type\":\"integer\"},\"c\":{\"type\":"
         "\"integer\"},"
         "\"d\":{\"type\":\"integer\"}},\"required\":[\"d\",\"b\"]}",
         {"{\"b\":1,\"d\":1}", "{\"a\":1,\"b\":1,\"d\":1}", "{\"b\":1,\"c\":1,\"d\":1}",
          "{\"a\":1,\"b\":1,\"c\":1,\"d\":1}"},
         {"{}", "{\"b\":1}", "{\"d\":1}", "{\"a\":1,\"d\":1}", "{\"b\":1,\"c\":1}", "1"}},
        {"{\"type\":\"object\",\"properties\":{},\"additionalProperties\":false}", {"{}"}, {"{\"a\":1}"}},
        {"{\"type\":\"object\",\"properties\":{}}", {"{}", "{\"a\":1}"}, {"[]"}},
        {"{\"required\":[\"x\"]}", {"{\"x\":1}", "{\"x\":{}}"}, {"{}", "{\"y\":1}", "3"}},
        {"{\"properties\":{\"ab\":{\"type\":\"integer\"},\"ac\":{\"type\":\"integer\"}},\"required\":["
         "\"ab\"],"
         "\"additionalProperties\":true}",
         {"{\"ab\":1}", "{\"ab\":1,\"x\":\"y\"}", "{\"ab\":1,\"ac\":2,\"a\":[],\"abc\":{}}",
          "{\"ab\":1,\"\":0}", "{\"ab\":1,\"é\\n\\\"\":0}"},
         {"{}", "{\"x\":1}", "{\"ab\":\"s\"}", "{\"ab\":1,\"ab\":\"s\"}", "{\"ab\":1,\"x\":1,\"ac\":2}",
          "{\"ab\":1,\"\\u0061c\":\"s\"}", "{\"ab\":1,}"}},
        {"{\"type\":\"object\",\"additionalProperties\":{\"type\":\"integer\",\"minimum\":0}}",
         {"{}", "{\"a\":0}", "{\"a\":0,\"b\":12}"},
         {"{\"a\":-1}", "{\"a\":\"\"}"}},
        {"{\"additionalProperties\":{\"type\":\"string\"},\"required\":[\"k\"]}",
         {"{\"k\":\"v\"}", "{\"k\":\"v\",\"l\":\"\"}"},
         {"{\"k\":1}", "{}"}},
        {"{\"properties\":{\"a\":false,\"b\":true},\"additionalProperties\":{\"const\":1}}",
         {"{}", "{\"b\":[]}", "{\"c\":1}", "{\"b\":0,\"c\":1}"},
         {"{\"a\":1}", "{\"c\":2}"}},
        {"{\"properties\":{\"q\\\"\\\\/\\n\":{\"const\":1},\"é\":{\"const\":2}}}",
         {"{\"q\\\"\\\\/\\n\":1}", "{\"é\":2}"},
         {"{\"q\":1}"}},
        {"{\"type\":\"object\",\"propertyNames\":{\"type\":\"string\"},\"additionalProperties\":{\"const\":"
         "1}}",
         {"{}", "{\"a\":1}", "{\"a\":1,\"b\":1}"},
         {"{\"a\":2}", "{a:1}"}},
        {"{\"properties\":{\"o\":{\"properties\":{\"p\":{\"type\":\"array\",\"items\":{\"type\":\"null\"}}}"
         "}}}",
         {"{\"o\":{\"p\":[null,null]}}", "{\"o\":{}}"},
         {"{\"o\":{\"p\":[1]}}", "{\"p\":[]}"}},
    };
    (void)state;
    RUN(list);
}

static void arrays(void **state)
{
    static const struct example list[] = {
        {"{\"type\":\"array\",\"items\":{\"type\":\"integer\"}}",
         {"[]", "[1]", "[1,2,3]", "[1, 2]", "[\n1,\n2\n]", "[ ]"},
         {"[\"a\"]", "[1,]", "[1 2]", "[1,  2]"}},
        {"{\"items\":{\"const\":1},\"minItems\":2,\"maxItems\":4,\"uniqueItems\":false}",
         {"[1,1]", "[1,1,1]", "[1,1,1,1]"},
         {"[]", "[1]", "[1,1,1,1,1]"}},
        {"{\"type\":\"array\",\"minItems\":1}", {"[0]", "[0,{}]"}, {"[]"}},
        {"{\"type\":\"array\",\"maxItems\":0}", {"[]"}, {"[0]"}},
        {"{\"type\":\"array\",\"maxItems\":1.0}", {"[]", "[1]"}, {"[0,0]"}},
        {"{\"prefixItems\":[{\"type\":\"integer\"},{\"type\":\"string\"}]}",
         {"[]", "[1]", "[1,\"a\"]"},
         {"[\"a\"]", "[1,2]", "[1,\"a\",3]", "[,]"}},
        {"{\"prefixItems\":[{\"const\":1},{\"const\":2}],\"items\":{\"const\":3},\"minItems\":2}",
         {"[1,2]", "[1,2,3]", "[1,2,3,3]"},
         {"[1]", "[]", "[1,2,4]"}},
        {"{\"prefixItems\":[{\"const\":1},{\"const\":2}],\"items\":{\"const\":3},\"minItems\":3,"
         "\"maxItems\":4}",
         {"[1,2,3]", "[1,2,3,3]"},
         {"[1,2]", "[1,2,3,3,3]"}},
        {"{\"prefixItems\":[{\"const\":1},{\"const\":2}],\"items\":false}",
         {"[]", "[1]", "[1,2]"},
         {"[1,2,3]"}},
        {"{\"prefixItems\":[{\"const\":1},{\"const\":2}],\"maxItems\":1}", {"[]", "[1]"}, {"[1,2]"}},
        {"{\"prefixItems\":[{\"const\":1}],\"minItems\":2}", {"[1,null]"}, {"[1]", "[1,2,3]"}},
        {"{\"prefixItems\":[{\"const\":1},false,{\"const\":3}]}", {"[]", "[1]"}, {"[1,2]", "[1,2,3]"}},
        {"{\"type\":\"array\",\"items\":false}", {"[]"}, {"[1]"}},
        {"{\"allOf\":[{\"items\":{\"minimum\":2}},{\"prefixItems\":[{\"maximum\":5}],\"items\":{"
         "\"maximum\":9}}],"
         "\"items\":{\"type\":\"integer\"}}",
         {"[]", "[2,9]", "[5]"},
         {"[6]", "[1]", "[2,10]", "[2.5]"}},
    };
    (void)state;
    RUN(list);
}

static void strings(void **state)
{
    static const struct example list[] = {
        {"{\"minLength\":2,\"maxLength\":3}",
         {"\"ab\"", "\"abc\"", "\"é日😀\"", "\"\\n\\u00e9\"", "\"\\ud83d\\ude00x\""},
         {"\"a\"", "\"abcd\"", "\"\\n\"", "1"}},
        {"{\"type\":\"string\",\"maxLength\":0}", {"\"\""}, {"\"a\""}},
        {"{\"pattern\":\"^a*b+c?$\"}",
         {"\"b\"", "\"aab\"", "\"bbc\""},
         {"\"a\"", "\"\"", "\"bcc\"", "\"xb\""}},
        {"{\"pattern\":\"b\"}", {"\"b\"", "\"abc\"", "\"\\nb\\\"\"", "\"bbb\""}, {"\"\"", "\"ac\""}},
        {"{\"pattern\":\"^ab\"}", {"\"ab\"", "\"abab\""}, {"\"a\"", "\"xab\""}},
        {"{\"pattern\":\"ab$\"}", {"\"ab\"", "\"aabab\""}, {"\"abx\"", "\"b\""}},
        {"{\"pattern\":\"^a|b$\"}", {"\"ax\"", "\"xb\"", "\"a\"", "\"b\""}, {"\"xa\"", "\"bx\"", "\"\""}},
        {"{\"pattern\":\"(^|,)a(,|$)\"}",
         {"\"a\"", "\"b,a\"", "\"a,b\"", "\"x,a,y\""},
         {"\"ab\"", "\"b,ab\"", "\"ba\""}},
        {"{\"pattern\":\"^(a|bc){2,3}$\"}",
         {"\"aa\"", "\"bca\"", "\"abca\""},
         {"\"a\"", "\"aaaa\"", "\"bc\""}},
        {"{\"pattern\":\"^\\\\d{3}-\\\\d{2,}$\"}",
         {"\"123-45\"", "\"123-456789\""},
         {"\"12-45\"", "\"123-4\"", "\"٣23-45\""}},
        {"{\"pattern\":\"^\\\\w+\\\\s\\\\W\\\\D\\\\S$\"}",
         {"\"a_1 -xy\"", "\"a\\t--y\"", "\"a\\u000b-é😀\""},
         {"\"a-xyz\"", "\"a b1y\"", "\"a -1y\"", "\"a -x \""}},
        {"{\"pattern\":\"^[^a-c\\\\d]$\"}",
         {"\"d\"", "\"é\"", "\"\\\"\"", "\"\\u0000\"", "\"😀\""},
         {"\"a\"", "\"5\"", "\"\"", "\"dd\""}},
        {"{\"pattern\":\"^.$\"}",
         {"\"x\"", "\"\\\\\"", "\"日\"", "\"\\u001f\"", "\"\\t\""},
         {"\"\\n\"", "\"\\r\"", "\"\"", "\"\xe2\x80\xa8\""}},
        {"{\"pattern\":\"^[\\\\]\\\\\\\\^-]+$\"}", {"\"]\"", "\"\\\\^-\""}, {"\"a\""}},
        {"{\"pattern\":\"^[a-]$\"}", {"\"a\"", "\"-\""}, {"\"b\""}},
        {"{\"pattern\":\"^[^]$\"}", {"\"a\"", "\"\\n\""}, {"\"\""}},
        {"{\"pattern\":\"^\\\\x41\\\\u0042\\\\u{43}\\\\uD83D\\\\uDE00\\\\t\\\\n\\\\r\\\\f\\\\v\\\\.\\\\/"
         "\\\\-$\"}",
         {"\"ABC😀\\t\\n\\r\\f\\u000b./-\""},
         {"\"ABC\""}},
        {"{\"pattern\":\"^\\\"[\\\"\\\\\\\\]$\"}",
         {"\"\\\"\\\"\"", "\"\\\"\\\\\""},
         {"\"\\\"\"", "\"\\\\\\\"\""}},
        {"{\"pattern\":\"^(?:a(?<n>b)?)*?$\"}", {"\"\"", "\"ab\"", "\"aaba\""}, {"\"b\"", "\"abb\""}},
        {"{\"pattern\":\"^(a*)*$\"}", {"\"\"", "\"aaaa\""}, {"\"b\""}},
        {"{\"pattern\":\"^(|a|b{0}){0,3}$\"}", {"\"\"", "\"aaa\""}, {"\"aaaa\"", "\"b\""}},
        {"{\"pattern\":\"\"}", {"\"\"", "\"x\\n\""}, {"1"}},
        {"{\"pattern\":\"$^\"}", {"\"\""}, {"\"a\""}},
        {"{\"pattern\":\"$(^|b)\"}", {"\"\""}, {"\"a\"", "\"b\""}},
        {"{\"pattern\":\"^[a-z]+$\",\"minLength\":2,\"maxLength\":3}",
         {"\"ab\"", "\"abc\""},
         {"\"a\"", "\"abcd\"", "\"A\""}},
        {"{\"pattern\":\"^[a-z]+$\",\"minLength\":3}", {"\"abc\"", "\"abcdefgh\""}, {"\"ab\""}},
        {"{\"allOf\":[{\"pattern\":\"a\"},{\"pattern\":\"b\"},{\"pattern\":\"^[a-c]*$\"}]}",
         {"\"ab\"", "\"bca\""},
         {"\"a\"", "\"abd\""}},
        {"{\"format\":\"date\"}",
         {"\"2024-02-29\"", "\"2023-12-31\"", "\"2000-02-29\"", "\"1900-02-28\""},
         {"\"2023-02-29\"", "\"1900-02-29\"", "\"2023-04-31\"", "\"2023-13-01\"", "\"2023-00-10\"",
          "\"2023-1-01\"", "\"x2023-01-01\""}},
        {"{\"format\":\"time\"}",
         {"\"23:59:59Z\"", "\"00:00:00.123+02:30\""},
         {"\"24:00:00Z\"", "\"12:00:00\"", "\"12:60:00Z\""}},
        {"{\"format\":\"date-time\"}",
         {"\"2024-02-29T12:00:00Z\""},
         {"\"2023-02-29T12:00:00Z\"", "\"2024-01-01 12:00:00Z\""}},
        {"{\"format\":\"uuid\"}",
         {"\"123e4567-e89b-12d3-A456-426614174000\""},
         {"\"123e4567e89b12d3a456426614174000\"", "\"g23e4567-e89b-12d3-a456-426614174000\""}},
        {"{\"format\":\"email\"}",
         {"\"a.b+c@ex-ample.co.uk\""},
         {"\"a@b\"", "\"@b.c\"", "\"a..b@c.de\"", "\"a@-b.c\"", "\"a b@c.de\""}},
        {"{\"format\":\"ipv4\"}",
         {"\"0.0.0.0\"", "\"255.249.199.9\""},
         {"\"256.0.0.1\"", "\"01.1.1.1\"", "\"1.1.1\"", "\"1.1.1.1.1\""}},
        {"{\"format\":\"date\",\"pattern\":\"^20\"}", {"\"2024-01-01\""}, {"\"1999-01-01\""}},
    };
    (void)state;
    RUN(list);
}

static void combinations(void **state)
{
    static const struct example list[] = {
        {"{\"anyOf\":[{\"type\":\"integer\"},{\"type\":\"string\",\"maxLength\":1}]}",
         {"1", "\"a\""},
         {"\"ab\"", "null"}},
        {"{\"type\":\"object\",\"properties\":{\"k\":{\"const\":1}},\"required\":[\"k\"],\"anyOf\":["
         "{\"properties\":{\"a\":{\"const\":2}},\"required\":[\"a\"]},{\"properties\":{\"b\":{\"const\":3}}"
         "}]}",
         {"{\"k\":1,\"a\":2}", "{\"k\":1}", "{\"k\":1,\"b\":3}"},
         {"{\"a\":2}", "{\"k\":1,\"a\":2,\"b\":3}"}},
        {"{\"anyOf\":[{\"minimum\":3},{\"maximum\":1}],\"type\":\"integer\"}",
         {"3", "1", "-5"},
         {"2", "1.5"}},
        {"{\"anyOf\":[false,{\"const\":1}]}", {"1"}, {"2"}},
        {"{\"anyOf\":[true,{\"const\":1}]}", {"1", "[2]"}, {"x"}},
        {"{\"allOf\":[{\"anyOf\":[{\"minimum\":3},{\"maximum\":1}]},{\"anyOf\":[{\"maximum\":4},{"
         "\"minimum\":9}]}],\"type\":\"integer\"}",
         {"3", "4", "9", "0", "1"},
         {"5", "8", "2"}},
        {"{\"$defs\":{\"base\":{\"properties\":{\"id\":{\"type\":\"integer\"}},\"required\":[\"id\"]}},"
         "\"allOf\":[{\"$ref\":\"#/$defs/"
         "base\"}],\"properties\":{\"n\":{\"type\":\"string\"},\"id\":{\"minimum\":5}}}",
         {"{\"id\":5}", "{\"id\":6,\"n\":\"\"}"},
         {"{\"id\":4}", "{\"n\":\"\"}", "{\"n\":\"\",\"id\":6}"}},
        {"{\"allOf\":[{\"properties\":{\"a\":{\"const\":1}},\"additionalProperties\":false},{"
         "\"properties\":{\"b\":true}}]}",
         {"{}", "{\"a\":1}"},
         {"{\"b\":1}"}},
        {"{\"oneOf\":[{\"type\":\"integer\"},{\"type\":\"string\"},{\"type\":\"null\"}]}",
         {"1", "\"\"", "null"},
         {"1.5", "[]"}},
        {"{\"oneOf\":[{\"properties\":{\"t\":{\"const\":\"a\"},\"x\":{\"type\":\"integer\"}},\"required\":["
         "\"t\",\"x\"]},"
         "{\"properties\":{\"t\":{\"enum\":[\"b\",\"c\"]}},\"required\":[\"t\"]}]}",
         {"{\"t\":\"a\",\"x\":1}", "{\"t\":\"b\"}", "{\"t\":\"c\"}"},
         {"{\"t\":\"a\"}", "{\"t\":\"b\",\"x\":1}", "{}"}},
        {"{\"oneOf\":[{\"properties\":{\"a\":{\"type\":\"integer\"}},\"required\":[\"a\"]},"
         "{\"properties\":{\"b\":{\"type\":\"integer\"}},\"required\":[\"b\"]}]}",
         {"{\"a\":1}", "{\"b\":1}"},
         {"{}", "{\"a\":1,\"b\":1}"}},
        {"{\"oneOf\":[{\"const\":1},{\"const\":2},{\"type\":\"string\"}]}", {"1", "2", "\"\""}, {"3"}},
        {"{\"oneOf\":[{\"enum\":[1,2]},{\"enum\":[2,3]}]}", {"1", "3"}, {"2"}},
        {"{\"$defs\":{\"n\":{\"type\":\"integer\",\"minimum\":0}},\"properties\":{\"a\":{\"$ref\":\"#/"
         "$defs/n\"},"
         "\"b\":{\"$ref\":\"#/$defs/n\",\"maximum\":3}}}",
         {"{\"a\":9,\"b\":3}"},
         {"{\"a\":-1}", "{\"b\":4}", "{\"b\":-1}"}},
        {"{\"definitions\":{\"a/b~c d\":{\"const\":1}},\"$ref\":\"#/definitions/a~1b~0c%20d\"}",
         {"1"},
         {"2"}},
        {"{\"properties\":{\"a\":{\"type\":\"array\",\"prefixItems\":[{\"const\":7}]},\"b\":{\"$ref\":\"#/"
         "properties/a/prefixItems/0\"}}}",
         {"{\"b\":7}", "{\"a\":[7],\"b\":7}"},
         {"{\"b\":8}"}},
        {"{\"properties\":{\"v\":{\"type\":\"integer\"},\"next\":{\"$ref\":\"#\"}},\"required\":[\"v\"]}",
         {"{\"v\":1}", "{\"v\":1,\"next\":{\"v\":2,\"next\":{\"v\":3}}}"},
         {"{\"v\":1,\"next\":{}}", "{\"next\":{\"v\":1}}"}},
        {"{\"$defs\":{\"t\":{\"anyOf\":[{\"type\":\"integer\"},{\"type\":\"array\",\"items\":{\"$ref\":\"#/"
         "$defs/t\"}}]}},\"$ref\":\"#/$defs/t\"}",
         {"1", "[]", "[1,[2,[]]]"},
         {"\"a\"", "[\"a\"]"}},
        {"{\"$defs\":{\"a\":{\"properties\":{\"b\":{\"$ref\":\"#/$defs/"
         "b\"}}},\"b\":{\"properties\":{\"a\":{\"$ref\":\"#/$defs/a\"}}}},\"$ref\":\"#/$defs/a\"}",
         {"{}", "{\"b\":{\"a\":{\"b\":{}}}}"},
         {"{\"a\":{}}", "{\"b\":{\"b\":{}}}"}},
        /* a member that cannot be finished is left out */
        {"{\"$defs\":{\"l\":{\"properties\":{\"n\":{\"$ref\":\"#/$defs/l\"}},\"required\":[\"n\"]}},"
         "\"properties\":{\"x\":{\"$ref\":\"#/$defs/l\"},\"y\":{\"const\":1}}}",
         {"{}", "{\"y\":1}"},
         {"{\"x\":{}}", "{\"x\":{\"n\":{}}}"}},
        {"{\"allOf\":[true,{}],\"type\":\"null\"}", {"null"}, {"1"}},
    };
    (void)state;
    RUN(list);
}

/* ---- numbers, by brute force ---- */

static void number_bounds(void **state)
{
    static const struct example list[] = {
        {"{\"minimum\":0,\"maximum\":10}",
         {"0", "10", "9.99", "0.001", "10.0", "3"},
         {"-1", "-0.1", "10.01", "11", "1e0", "100", "-0"}},
        {"{\"exclusiveMinimum\":0,\"exclusiveMaximum\":1}",
         {"0.5", "0.01", "0.999"},
         {"0", "1", "0.0", "0.000", "1.0", "-0.5"}},
        {"{\"type\":\"number\",\"minimum\":-1.5,\"maximum\":2.25}",
         {"-1.5", "-1.49", "-1", "-0.2", "0", "2.25", "2.249", "2.2", "-1.50", "2.250"},
         {"-1.51", "-2", "2.26", "2.251", "3", "2.2500001", "-1.500001"}},
        {"{\"type\":\"number\",\"exclusiveMinimum\":-1.5,\"exclusiveMaximum\":-0.25}",
         {"-1.4", "-1", "-0.3", "-0.2500001", "-1.49999"},
         {"-1.5", "-0.25", "-0.250", "0", "-0.2", "1"}},
        {"{\"type\":\"number\",\"minimum\":0.1}",
         {"0.1", "0.10", "0.11", "1", "123456789012345678"},
         {"0", "0.09", "-1", "0.0999999"}},
        {"{\"type\":\"number\",\"maximum\":-3}", {"-3", "-3.5", "-100", "-3.0"}, {"-2.9", "0", "3", "-0"}},
        {"{\"type\":\"number\",\"exclusiveMinimum\":7}", {"7.1", "7.001", "8"}, {"7", "7.0", "6.9"}},
        /* as doubles these are the bounds themselves */
        {"{\"exclusiveMinimum\":0.5,\"exclusiveMaximum\":1}",
         {"0.5000000000000001", "0.75", "0.9999999999999999"},
         {"0.50000000000000005", "0.99999999999999999", "1"}},
        {"{\"type\":\"number\",\"exclusiveMinimum\":-1,\"exclusiveMaximum\":-1e-12}",
         {"-0.999", "-0.0000000000010000000000000002"},
         {"-0.99999999999999999", "-0.000000000001", "-0.00000000000100000000000000001", "0"}},
        {"{\"type\":\"number\",\"exclusiveMinimum\":1000000000000000000}",
         {"1000000000000000128"},
         {"1000000000000000000.005", "1000000000000000001"}},
        {"{\"type\":\"integer\",\"exclusiveMinimum\":9007199254740992}",
         {"9007199254740994"},
         {"9007199254740992", "9007199254740993"}},
        {"{\"type\":\"number\",\"minimum\":1.5,\"maximum\":1.5}",
         {"1.5", "1.50"},
         {"1.4", "1.6", "1.51", "1"}},
        {"{\"type\":\"number\",\"minimum\":12.34,\"maximum\":12.39}",
         {"12.34", "12.35", "12.39", "12.390"},
         {"12.3", "12.4", "12.391", "12"}},
        {"{\"type\":\"integer\",\"minimum\":0.5,\"maximum\":3.5}", {"1", "3"}, {"0", "4"}},
        {"{\"type\":\"integer\",\"exclusiveMinimum\":-2.5}", {"-2", "5"}, {"-3"}},
        {"{\"type\":\"integer\",\"minimum\":9223372036854775807}",
         {"9223372036854775807", "9999999999999999999"},
         {"9223372036854775806"}},
        {"{\"type\":\"integer\",\"minimum\":1e20,\"maximum\":1e21}",
         {"100000000000000000000", "1000000000000000000000"},
         {"99999999999999999999", "1000000000000000000001"}},
        {"{\"type\":\"integer\",\"minimum\":1,\"exclusiveMinimum\":1}", {"2"}, {"1"}},
        {"{\"type\":\"integer\",\"maximum\":-10}",
         {"-10", "-11", "-999999999999999999"},
         {"-9", "0", "10", "-010"}},
    };
    (void)state;
    RUN(list);
}

static void integer_bounds_exhaustive(void **state)
{
    static const int edges[] = {-1203, -1000, -999, -110, -100, -99, -21, -10, -9,  -1,   0,
                                1,     8,     10,   19,   20,   99,  100, 105, 987, 1000, 1234};
    char schema[160], doc[16];

    (void)state;
    for (size_t i = 0; i < sizeof edges / sizeof *edges; i++)
        for (size_t k = i; k < sizeof edges / sizeof *edges; k += 1 + k % 3) {
            snprintf(schema, sizeof schema, "{\"type\":\"integer\",\"minimum\":%d,\"maximum\":%d}",
                     edges[i], edges[k]);
            char *g = grammar_of(schema);
            for (size_t e = 0; e < sizeof edges / sizeof *edges; e++)
                for (int v = edges[e] - 1; v <= edges[e] + 1; v++) {
                    snprintf(doc, sizeof doc, "%d", v);
                    if (matches(g, doc) != (v >= edges[i] && v <= edges[k]))
                        fail_msg("%s: %d\n%s", schema, v, g);
                }
            free(g);
        }
}

/* ---- refusals ---- */

struct refusal {
    const char *schema;
    enum ic_status status;
    const char *says;
};

static void refusals(void **state)
{
    static const struct refusal list[] = {
        {"3", IC_BAD_REQUEST, "the schema must be an object or a boolean, at #"},
        {"{\"multipleOf\":2}", IC_BAD_REQUEST, "keyword \"multipleOf\" is not supported, at #"},
        {"{\"properties\":{\"a/b\":{\"items\":{\"not\":{}}}}}", IC_BAD_REQUEST,
         "keyword \"not\" is not supported, at #/properties/a~1b/items"},
        {"{\"if\":{}}", IC_BAD_REQUEST, "\"if\""},
        {"{\"patternProperties\":{}}", IC_BAD_REQUEST, "\"patternProperties\""},
        {"{\"minProperties\":1}", IC_BAD_REQUEST, "\"minProperties\""},
        {"{\"contains\":{}}", IC_BAD_REQUEST, "\"contains\""},
        {"{\"unevaluatedProperties\":false}", IC_BAD_REQUEST, "\"unevaluatedProperties\""},
        {"{\"nullable\":true}", IC_BAD_REQUEST, "\"nullable\""},
        {"{\"$anchor\":\"a\"}", IC_BAD_REQUEST, "\"$anchor\""},
        {"{\"items\":{\"$id\":\"a\"}}", IC_BAD_REQUEST,
         "\"$id\" below the root is not supported, at #/items"},
        {"{\"uniqueItems\":true}", IC_BAD_REQUEST, "\"uniqueItems\": true is not supported"},
        {"{\"uniqueItems\":1}", IC_BAD_REQUEST, "\"uniqueItems\" must be a boolean"},
        {"{\"propertyNames\":{\"type\":\"string\",\"maxLength\":3}}", IC_BAD_REQUEST,
         "\"propertyNames\" other than true"},
        {"{\"propertyNames\":{\"type\":\"integer\"}}", IC_BAD_REQUEST, "\"propertyNames\" other than true"},
        {"{\"propertyNames\":false}", IC_BAD_REQUEST, "\"propertyNames\" other than true"},
        {"{\"format\":\"uri\"}", IC_BAD_REQUEST, "\"format\": \"uri\" is not supported"},
        {"{\"format\":1}", IC_BAD_REQUEST, "\"format\" must be a string"},
        {"{\"type\":\"int\"}", IC_BAD_REQUEST, "\"type\" must be null, boolean"},
        {"{\"type\":[]}", IC_BAD_REQUEST, "\"type\" must be"},
        {"{\"type\":[\"null\",3]}", IC_BAD_REQUEST, "\"type\" must be"},
        {"{\"enum\":[]}", IC_BAD_REQUEST, "\"enum\" must be a non-empty array"},
        {"{\"enum\":3}", IC_BAD_REQUEST, "\"enum\" must be a non-empty array"},
        {"{\"properties\":[]}", IC_BAD_REQUEST, "\"properties\" must be an object of schemas"},
        {"{\"properties\":{\"a\":3}}", IC_BAD_REQUEST,
         "\"a\" must be an object or a boolean, at #/properties"},
        {"{\"required\":\"a\"}", IC_BAD_REQUEST, "\"required\" must be an array of strings"},
        {"{\"required\":[1]}", IC_BAD_REQUEST, "\"required\" must be an array of strings"},
        {"{\"items\":[{}]}", IC_BAD_REQUEST,
         "\"items\" must be a schema (a list of schemas is \"prefixItems\")"},
        {"{\"prefixItems\":[]}", IC_BAD_REQUEST, "\"prefixItems\" must be a non-empty array of schemas"},
        {"{\"anyOf\":{}}", IC_BAD_REQUEST, "\"anyOf\" must be a non-empty array of schemas"},
        {"{\"items\":{\"minLength\":-1}}", IC_BAD_REQUEST,
         "\"minLength\" must be a non-negative integer, at #/items"},
        {"{\"maxItems\":1.5}", IC_BAD_REQUEST, "\"maxItems\" must be a non-negative integer"},
        {"{\"maxLength\":\"3\"}", IC_BAD_REQUEST, "\"maxLength\" must be a non-negative integer"},
        {"{\"maxLength\":65537}", IC_TOO_LARGE, "\"maxLength\" is above 65536"},
        {"{\"exclusiveMinimum\":true}", IC_BAD_REQUEST, "\"exclusiveMinimum\" must be a number"},
        {"{\"minimum\":1e80}", IC_TOO_LARGE, "\"minimum\" has more than 64 digits"},
        {"{\"maximum\":1e-80}", IC_TOO_LARGE, "\"maximum\" has more than 64 digits"},
        {"{\"pattern\":3}", IC_BAD_REQUEST, "\"pattern\" must be a string"},
        {"{\"$ref\":3}", IC_BAD_REQUEST, "\"$ref\" must be a string"},
        {"{\"$ref\":\"http://x/y\"}", IC_BAD_REQUEST, "only # and #/… within this document"},
        {"{\"$ref\":\"#a\"}", IC_BAD_REQUEST, "only # and #/…"},
        {"{\"$ref\":\"#/$defs/x\"}", IC_BAD_REQUEST, "\"#/$defs/x\" does not point at a schema"},
        {"{\"$ref\":\"#/default\",\"default\":{\"type\":\"null\"}}", IC_BAD_REQUEST,
         "does not point at a schema"},
        {"{\"$ref\":\"#/anyOf/01\",\"anyOf\":[{}]}", IC_BAD_REQUEST, "does not point at a schema"},
        {"{\"$ref\":\"#\"}", IC_BAD_REQUEST, "refers to itself without any value between, at #"},
        {"{\"$defs\":{\"a\":{\"$ref\":\"#/$defs/b\"},\"b\":{\"allOf\":[{\"$ref\":\"#/$defs/"
         "a\"}]}},\"items\":{\"$ref\":\"#/$defs/a\"}}",
         IC_BAD_REQUEST, "refers to itself without any value between, at #/$defs/a"},
        {"{\"anyOf\":[{\"$ref\":\"#\"},{\"type\":\"null\"}]}", IC_BAD_REQUEST, "refers to itself"},
        {"{\"const\":1,\"$ref\":\"#\"}", IC_BAD_REQUEST, "refers to itself"},
        {"false", IC_BAD_REQUEST, "no finite value satisfies the schema"},
        {"{\"allOf\":[{\"type\":\"string\"},{\"type\":\"null\"}]}", IC_BAD_REQUEST, "no finite value"},
        {"{\"type\":\"string\",\"const\":1}", IC_BAD_REQUEST, "no finite value"},
        {"{\"type\":\"integer\",\"minimum\":3,\"maximum\":2}", IC_BAD_REQUEST, "no finite value"},
        {"{\"type\":\"integer\",\"exclusiveMinimum\":2,\"exclusiveMaximum\":3}", IC_BAD_REQUEST,
         "no finite value"},
        {"{\"type\":\"number\",\"minimum\":3,\"exclusiveMaximum\":3}", IC_BAD_REQUEST, "no finite value"},
        {"{\"minLength\":3,\"maxLength\":2}", IC_BAD_REQUEST, "no finite value"},
        {"{\"minItems\":3,\"maxItems\":2}", IC_BAD_REQUEST, "no finite value"},
        {"{\"pattern\":\"^ab$\",\"minLength\":3}", IC_BAD_REQUEST, "no finite value"},
        {"{\"pattern\":\"a^\"}", IC_BAD_REQUEST, "no finite value"},
        {"{\"pattern\":\"[]\"}", IC_BAD_REQUEST, "no finite value"},
        {"{\"properties\":{\"a\":false},\"required\":[\"a\"]}", IC_BAD_REQUEST, "no finite value"},
        {"{\"required\":[\"a\"],\"additionalProperties\":false}", IC_BAD_REQUEST, "no finite value"},
        {"{\"properties\":{\"n\":{\"$ref\":\"#\"}},\"required\":[\"n\"]}", IC_BAD_REQUEST,
         "no finite value"},
        {"{\"items\":{\"$ref\":\"#\"},\"minItems\":1}", IC_BAD_REQUEST, "no finite value"},
        {"{\"oneOf\":[{\"type\":\"integer\"},{\"type\":\"number\"}]}", IC_BAD_REQUEST,
         "\"oneOf\" is supported where alternatives exclude each other; 0 and 1 may not"},
        {"{\"oneOf\":[{\"type\":\"null\"},{\"type\":\"string\"},{\"minLength\":1}]}", IC_BAD_REQUEST,
         "0 and 2 may not"},
        {"{\"properties\":{\"a\":true,\"b\":true},\"oneOf\":[{\"required\":[\"a\"]},{\"required\":[\"b\"]}]"
         "}",
         IC_BAD_REQUEST, "\"oneOf\""},
        {"{\"oneOf\":[{\"properties\":{\"t\":{\"const\":1}}},{\"properties\":{\"t\":{\"const\":2}}}]}",
         IC_BAD_REQUEST, "\"oneOf\""},
        {"{\"oneOf\":[{\"title\":\"t\"},{\"enum\":[1,\"a\"]}]}", IC_BAD_REQUEST, "\"oneOf\""},
        {"{\"oneOf\":[{\"type\":\"string\"},{\"enum\":[1,\"a\"]}]}", IC_BAD_REQUEST, "\"oneOf\""},
        {"{\"oneOf\":[{\"format\":\"uuid\"},{\"type\":\"string\"}],\"const\":\"a\"}", IC_BAD_REQUEST,
         "no finite value"},
        /* patterns */
        {"{\"pattern\":\"a(?=b)\"}", IC_BAD_REQUEST, "lookahead is not supported"},
        {"{\"pattern\":\"a(?!b)\"}", IC_BAD_REQUEST, "lookahead"},
        {"{\"pattern\":\"(?<=b)\"}", IC_BAD_REQUEST, "lookbehind"},
        {"{\"pattern\":\"(?<!b)\"}", IC_BAD_REQUEST, "lookbehind"},
        {"{\"pattern\":\"(?i)a\"}", IC_BAD_REQUEST, "(?…) of this kind"},
        {"{\"pattern\":\"(a)\\\\1\"}", IC_BAD_REQUEST, "back references"},
        {"{\"pattern\":\"\\\\k<a>\"}", IC_BAD_REQUEST, "back references"},
        {"{\"pattern\":\"\\\\bfoo\"}", IC_BAD_REQUEST, "\\b and \\B"},
        {"{\"pattern\":\"\\\\p{L}\"}", IC_BAD_REQUEST, "\\p{…}"},
        {"{\"pattern\":\"\\\\q\"}", IC_BAD_REQUEST, "unknown escape at character 3"},
        {"{\"pattern\":\"a\\\\\"}", IC_BAD_REQUEST, "a lone \\"},
        {"{\"pattern\":\"\\\\u12\"}", IC_BAD_REQUEST, "bad hexadecimal escape"},
        {"{\"pattern\":\"\\\\u{110000}\"}", IC_BAD_REQUEST, "bad \\u{…}"},
        {"{\"pattern\":\"\\\\uD800\"}", IC_BAD_REQUEST, "half of a surrogate pair"},
        {"{\"pattern\":\"(a\"}", IC_BAD_REQUEST, "a group without )"},
        {"{\"pattern\":\"a)\"}", IC_BAD_REQUEST, "a ) without ("},
        {"{\"pattern\":\"[a\"}", IC_BAD_REQUEST, "a class without ]"},
        {"{\"pattern\":\"[b-a]\"}", IC_BAD_REQUEST, "out of order"},
        {"{\"pattern\":\"[\\\\d-z]\"}", IC_BAD_REQUEST, "a range with a class as its end"},
        {"{\"pattern\":\"*a\"}", IC_BAD_REQUEST, "nothing to repeat"},
        {"{\"pattern\":\"a**\"}", IC_BAD_REQUEST, "nothing to repeat"},
        {"{\"pattern\":\"^*\"}", IC_BAD_REQUEST, "nothing to repeat"},
        {"{\"pattern\":\"a{2,1}\"}", IC_BAD_REQUEST, "bad {…}"},
        {"{\"pattern\":\"a{,1}\"}", IC_BAD_REQUEST, "a number is missing"},
        {"{\"pattern\":\"a}\"}", IC_BAD_REQUEST, "must be escaped"},
        {"{\"pattern\":\"a{1001}\"}", IC_TOO_LARGE, "a repetition of more than 1000"},
        {"{\"pattern\":\"(ab{900}){900}\"}", IC_TOO_LARGE, "\"pattern\" is too large"},
        {"{\"pattern\":\"a[ab]{14}$\"}", IC_TOO_LARGE, "\"pattern\" needs more than 2048 states"},
        {"{\"pattern\":\"^(ab)+$\",\"maxLength\":5000}", IC_TOO_LARGE,
         "minLength or maxLength above 2047 beside"},
        {"{\"pattern\":\"a[ab]{9}$\",\"maxLength\":40}", IC_TOO_LARGE,
         "\"format\" and lengths together need more than 2048 states"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof list / sizeof *list; i++)
        refused(list[i].schema, list[i].status, list[i].says);
    struct ic_buf out = {0};
    struct ic_err err = {0};
    assert_int_equal(ic_schema_to_gbnf(NULL, &out, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_schema_to_gbnf(NULL, &out, NULL), IC_BAD_REQUEST);
    ic_buf_deinit(&out);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(types_and_constants),
        cmocka_unit_test(objects),
        cmocka_unit_test(arrays),
        cmocka_unit_test(strings),
        cmocka_unit_test(combinations),
        cmocka_unit_test(number_bounds),
        cmocka_unit_test(integer_bounds_exhaustive),
        cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests(tests, load_vocab, free_vocab);
}
