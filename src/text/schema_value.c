/* JSON values beside schemas: types, equality, text, and plain validation.
 *
 * Validation is what makes siblings of `enum` and `const` right: the constants that the other
 * keywords forbid are left out of the grammar. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "text/schema_int.h"

unsigned sc_type_of(const json_t *v)
{
    switch (json_typeof(v)) {
    case JSON_OBJECT: return SC_OBJ;
    case JSON_ARRAY: return SC_ARR;
    case JSON_STRING: return SC_STR;
    case JSON_INTEGER: return SC_INT;
    case JSON_REAL: return json_real_value(v) == floor(json_real_value(v)) ? SC_INT : SC_FRAC;
    case JSON_TRUE:
    case JSON_FALSE: return SC_BOOL;
    default: return SC_NULL;
    }
}

static unsigned named_type(const json_t *v)
{
    switch (json_string_value(v)[0]) {
    case 'b': return SC_BOOL;
    case 'i': return SC_INT;
    case 's': return SC_STR;
    case 'a': return SC_ARR;
    case 'o': return SC_OBJ;
    default: return !strcmp(json_string_value(v), "null") ? SC_NULL : SC_INT | SC_FRAC;
    }
}

unsigned sc_types(const json_t *schema)
{
    const json_t *v = json_object_get(schema, "type");
    unsigned types = 0;
    size_t i;
    json_t *one;

    if (!v)
        return SC_ALL;
    if (json_is_string(v))
        return named_type(v);
    json_array_foreach(v, i, one) types |= named_type(one);
    return types;
}

static bool same_number(const json_t *a, const json_t *b)
{
    if (json_is_integer(a) && json_is_integer(b))
        return json_integer_value(a) == json_integer_value(b);
    if (json_is_real(a) && json_is_real(b))
        return json_real_value(a) == json_real_value(b);
    const json_t *i = json_is_integer(a) ? a : b, *r = json_is_integer(a) ? b : a;
    double v = json_real_value(r);
    return v >= -9.2e18 && v <= 9.2e18 && v == floor(v) && (json_int_t)v == json_integer_value(i);
}

bool sc_same(const json_t *a, const json_t *b)
{
    size_t i;
    const char *key;
    json_t *v;

    if (json_is_number(a) && json_is_number(b))
        return same_number(a, b);
    if (json_typeof(a) != json_typeof(b))
        return false;
    if (json_is_array(a)) {
        if (json_array_size(a) != json_array_size(b))
            return false;
        json_array_foreach(a, i, v) if (!sc_same(v, json_array_get(b, i))) return false;
        return true;
    }
    if (!json_is_object(a))
        return json_equal(a, b);
    if (json_object_size(a) != json_object_size(b))
        return false;
    json_object_foreach((json_t *)(uintptr_t)a, key, v)
    {
        const json_t *other = json_object_get(b, key);
        if (!other || !sc_same(v, other))
            return false;
    }
    return true;
}

void sc_put_json(struct ic_buf *out, const json_t *value)
{
    size_t i;
    const char *key, *comma = "";
    json_t *v;

    switch (json_typeof(value)) {
    case JSON_OBJECT:
        ic_buf_puts(out, "{");
        json_object_foreach((json_t *)(uintptr_t)value, key, v)
        {
            ic_buf_puts(out, comma);
            ic_json_str(out, key, strlen(key));
            ic_buf_puts(out, ":");
            sc_put_json(out, v);
            comma = ",";
        }
        ic_buf_puts(out, "}");
        break;
    case JSON_ARRAY:
        ic_buf_puts(out, "[");
        json_array_foreach(value, i, v)
        {
            ic_buf_puts(out, i ? "," : "");
            sc_put_json(out, v);
        }
        ic_buf_puts(out, "]");
        break;
    case JSON_STRING: ic_json_str(out, json_string_value(value), json_string_length(value)); break;
    case JSON_INTEGER: ic_buf_printf(out, "%lld", (long long)json_integer_value(value)); break;
    case JSON_REAL: sc_put_real(out, json_real_value(value)); break;
    case JSON_TRUE: ic_buf_puts(out, "true"); break;
    case JSON_FALSE: ic_buf_puts(out, "false"); break;
    default: ic_buf_puts(out, "null"); break;
    }
}

void sc_bounds_of(const json_t *schema, struct sc_bounds *b)
{
    static const struct {
        const char *key;
        bool low, open;
    } table[] = {{"minimum", true, false},
                 {"exclusiveMinimum", true, true},
                 {"maximum", false, false},
                 {"exclusiveMaximum", false, true}};

    for (size_t i = 0; i < 4; i++) {
        const json_t *v = json_object_get(schema, table[i].key);
        struct sc_dec d;
        if (!v || !sc_dec_from(v, &d))
            continue;
        if (table[i].low)
            sc_bound_lo(b, &d, table[i].open);
        else
            sc_bound_hi(b, &d, table[i].open);
    }
}

/* ---- formats ---- */

#define DAY                                                                                                \
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\\d|30)|02-(?:0[1-9]|"     \
    "1\\d|2[0-8]))"
#define LEAP "(?:\\d\\d(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29"
#define DATE "(?:\\d{4}-" DAY "|" LEAP ")"
#define TIME "(?:[01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d(?:\\.\\d{1,9})?(?:Z|[+-](?:[01]\\d|2[0-3]):[0-5]\\d)"
#define HEX4 "[0-9A-Fa-f]{4}"
#define OCTET "(?:25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)"
#define ATOM "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
#define LABEL "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"

const char *sc_format_pattern(const char *name)
{
    static const char *const table[][2] = {
        {"date", "^" DATE "$"},
        {"time", "^" TIME "$"},
        {"date-time", "^" DATE "T" TIME "$"},
        {"uuid", "^" HEX4 HEX4 "-" HEX4 "-" HEX4 "-" HEX4 "-" HEX4 HEX4 HEX4 "$"},
        {"email", "^" ATOM "(?:\\." ATOM ")*@" LABEL "(?:\\." LABEL ")+$"},
        {"ipv4", "^" OCTET "(?:\\." OCTET "){3}$"},
    };

    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (!strcmp(table[i][0], name))
            return table[i][1];
    return NULL;
}

const struct sc_dfa *sc_dfa_of(struct sc *c, const json_t *schema, const char *key)
{
    const json_t *v = json_object_get(schema, key);
    const char *text = json_string_value(v), *pattern = text;
    size_t len = json_string_length(v);

    if (!strcmp(key, "format")) {
        pattern = sc_format_pattern(text);
        len = strlen(pattern);
    }
    /* the memo holds numbers, so the automata stand in a list */
    struct ic_buf name = {.max = 1 << 20};
    ic_buf_puts(&name, "dfa ");
    ic_buf_put(&name, pattern, len);
    uint32_t *slot = name.failed ? NULL : sc_memo(c, name.data, name.len);
    ic_buf_deinit(&name);
    if (!slot) {
        sc_fail(c, IC_OOM, "out of memory for the schema");
        return NULL;
    }
    if (!*slot) {
        if (c->n_dfas == sizeof c->dfas / sizeof *c->dfas) {
            sc_fail(c, IC_TOO_LARGE, "more than %zu different patterns", sizeof c->dfas / sizeof *c->dfas);
            return NULL;
        }
        struct sc_dfa d;
        if (!sc_regex(c, pattern, len, schema, &d))
            return NULL;
        c->dfas[c->n_dfas] = d;
        *slot = ++c->n_dfas;
    }
    return &c->dfas[*slot - 1];
}

/* ---- validation ---- */

static bool listed(const json_t *list, const json_t *value)
{
    size_t i;
    json_t *v;

    json_array_foreach(list, i, v) if (sc_same(v, value)) return true;
    return false;
}

static bool string_ok(struct sc *c, const json_t *schema, const json_t *value)
{
    const char *s = json_string_value(value), *p = s, *end = s + json_string_length(value);
    const char *const keys[] = {"pattern", "format"};
    uint32_t n = 0;

    for (; p < end; n++)
        sc_next_char(&p, end);
    if (n < sc_count(schema, "minLength", 0) || n > sc_count(schema, "maxLength", SC_INF))
        return false;
    for (int i = 0; i < 2; i++) {
        if (!json_object_get(schema, keys[i]) || (i == 1 && c->formats_pass))
            continue;
        const struct sc_dfa *d = sc_dfa_of(c, schema, keys[i]);
        if (!d || !sc_work(c, n) || !sc_dfa_match(d, s, (size_t)(end - s)))
            return false;
    }
    return true;
}

static bool number_ok(const json_t *schema, const json_t *value)
{
    struct sc_bounds b = {0};
    struct sc_dec d;

    sc_bounds_of(schema, &b);
    return (!b.has_lo && !b.has_hi) || (sc_dec_from(value, &d) && sc_in_bounds(&b, &d));
}

static bool valid(struct sc *c, const json_t *schema, const json_t *value, int depth);

static bool array_ok(struct sc *c, const json_t *schema, const json_t *value, int depth)
{
    const json_t *prefix = json_object_get(schema, "prefixItems"), *rest = json_object_get(schema, "items");
    size_t i, n = json_array_size(value), n_prefix = json_array_size(prefix);

    if (n < sc_count(schema, "minItems", 0) || n > sc_count(schema, "maxItems", SC_INF))
        return false;
    for (i = 0; i < n; i++) {
        const json_t *s = i < n_prefix ? json_array_get(prefix, i) : rest;
        if (s && !valid(c, s, json_array_get(value, i), depth))
            return false;
    }
    return true;
}

static bool object_ok(struct sc *c, const json_t *schema, const json_t *value, int depth)
{
    const json_t *props = json_object_get(schema, "properties"), *s;
    const json_t *more = json_object_get(schema, "additionalProperties");
    size_t i;
    const char *key;
    json_t *v;

    json_array_foreach(json_object_get(schema, "required"), i, v)
    {
        if (!json_object_get(value, json_string_value(v)))
            return false;
    }
    json_object_foreach((json_t *)(uintptr_t)value, key, v)
    {
        s = json_object_get(props, key);
        if (!s)
            s = more;
        if (s && !valid(c, s, v, depth))
            return false;
    }
    return true;
}

static bool combined_ok(struct sc *c, const json_t *schema, const json_t *value, int depth)
{
    static const char *const keys[] = {"allOf", "anyOf", "oneOf"};
    json_t *v;
    size_t i;

    for (int k = 0; k < 3; k++) {
        const json_t *list = json_object_get(schema, keys[k]);
        size_t good = 0, n = json_array_size(list);
        json_array_foreach(list, i, v) good += valid(c, v, value, depth);
        if (list && (k == 0 ? good != n : k == 1 ? good == 0 : good != 1))
            return false;
    }
    return true;
}

static bool valid(struct sc *c, const json_t *schema, const json_t *value, int depth)
{
    const json_t *v;
    unsigned type = sc_type_of(value);

    if (json_is_boolean(schema))
        return json_is_true(schema);
    if (depth > 4 * IC_SCHEMA_DEPTH_MAX) {
        sc_fail_at(c, IC_BAD_REQUEST, schema,
                   "a value of \"enum\" or \"const\" meets a \"$ref\" to itself");
        return false;
    }
    if (!sc_work(c, 8) || !(sc_types(schema) & type))
        return false;
    if ((v = json_object_get(schema, "const")) && !sc_same(v, value))
        return false;
    v = json_object_get(schema, "enum");
    if (v && !(depth == 0 && v == c->trusted) &&
        (!sc_work(c, (uint32_t)json_array_size(v)) || !listed(v, value)))
        return false;
    if (json_object_get(schema, "$ref")) {
        v = sc_resolve(c, schema);
        if (!v || !valid(c, v, value, depth + 1))
            return false;
    }
    if ((type == SC_STR && !string_ok(c, schema, value)) ||
        (type & (SC_INT | SC_FRAC) && !number_ok(schema, value)) ||
        (type == SC_ARR && !array_ok(c, schema, value, depth + 1)) ||
        (type == SC_OBJ && !object_ok(c, schema, value, depth + 1)))
        return false;
    return combined_ok(c, schema, value, depth + 1);
}

/* Under a oneOf it matters whether `format` asserts, as here, or only annotates, as in validators by
 * default: a value must be right either way. */
bool sc_valid(struct sc *c, const json_t *schema, const json_t *value)
{
    bool ok = valid(c, schema, value, 0);

    if (ok && c->has_formats) {
        c->formats_pass = true;
        ok = valid(c, schema, value, 0);
        c->formats_pass = false;
    }
    return ok;
}
