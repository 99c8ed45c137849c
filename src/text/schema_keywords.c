/* Before anything is compiled, the whole document is walked once: every keyword must be in the table
 * below, with a value of the right type and size. Later stages may then trust what they read, and a
 * keyword that is not enforced cannot slip through by standing where nobody looks. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "text/schema_int.h"

enum form {
    F_NOTE,      /* annotation: read over */
    F_NOTE_ROOT, /* annotation that only the root may have */
    F_TYPE,
    F_ENUM,
    F_ANY,
    F_NUMBER,
    F_COUNT, /* non-negative integer up to IC_SCHEMA_REPEAT_MAX */
    F_STRING,
    F_FORMAT,
    F_REF,
    F_NAMES, /* array of strings */
    F_FALSE, /* only false does nothing */
    F_KEYS,  /* a schema of names, such as every name fulfils */
    F_SCHEMA,
    F_SCHEMAS, /* non-empty array of schemas */
    F_MAP      /* object of schemas */
};

static const struct {
    const char *name;
    enum form form;
} keywords[] = {
    {"type", F_TYPE},
    {"enum", F_ENUM},
    {"const", F_ANY},
    {"properties", F_MAP},
    {"required", F_NAMES},
    {"additionalProperties", F_SCHEMA},
    {"propertyNames", F_KEYS}, /* zod writes it for every record */
    {"items", F_SCHEMA},
    {"prefixItems", F_SCHEMAS},
    {"minItems", F_COUNT},
    {"maxItems", F_COUNT},
    {"uniqueItems", F_FALSE},
    {"minLength", F_COUNT},
    {"maxLength", F_COUNT},
    {"pattern", F_STRING},
    {"format", F_FORMAT},
    {"minimum", F_NUMBER},
    {"maximum", F_NUMBER},
    {"exclusiveMinimum", F_NUMBER},
    {"exclusiveMaximum", F_NUMBER},
    {"$ref", F_REF},
    {"$defs", F_MAP},
    {"definitions", F_MAP},
    {"allOf", F_SCHEMAS},
    {"anyOf", F_SCHEMAS},
    {"oneOf", F_SCHEMAS},
    {"$schema", F_NOTE_ROOT}, /* below the root these two would change what $ref means */
    {"$id", F_NOTE_ROOT},
    {"$comment", F_NOTE},
    {"title", F_NOTE},
    {"description", F_NOTE},
    {"default", F_NOTE},
    {"examples", F_NOTE},
    {"deprecated", F_NOTE},
    {"readOnly", F_NOTE},
    {"writeOnly", F_NOTE},
};

#define SEEN_SLOTS (4u * IC_SCHEMA_NODES_MAX)

static const json_t **seen_slot(const struct sc *c, const json_t *schema)
{
    uint32_t at = (uint32_t)(((uint64_t)(uintptr_t)schema * 0x9E3779B97F4A7C15u) >> 40) % SEEN_SLOTS;

    while (c->seen[at] && c->seen[at] != schema)
        at = (at + 1) % SEEN_SLOTS;
    return &c->seen[at];
}

bool sc_passed(const struct sc *c, const json_t *schema)
{
    return json_is_boolean(schema) || *seen_slot(c, schema) == schema;
}

static void wrong(struct sc *c, const json_t *schema, const char *key, const char *must)
{
    sc_fail_at(c, IC_BAD_REQUEST, schema, "\"%.40s\" must be %s", key, must);
}

static bool is_count(const json_t *v, double *out)
{
    *out = json_number_value(v);
    return json_is_number(v) && *out >= 0 && *out == floor(*out);
}

uint32_t sc_count(const json_t *schema, const char *key, uint32_t fallback)
{
    double v;

    return is_count(json_object_get(schema, key), &v) ? (uint32_t)v : fallback;
}

static bool type_known(const json_t *v)
{
    static const char *const names[] = {"null",   "boolean", "integer", "number",
                                        "string", "array",   "object"};

    for (size_t i = 0; json_is_string(v) && i < sizeof names / sizeof *names; i++)
        if (!strcmp(json_string_value(v), names[i]))
            return true;
    return false;
}

static void check_type(struct sc *c, const json_t *schema, const json_t *v)
{
    size_t i;
    json_t *one;
    bool ok = type_known(v) || json_array_size(v) > 0;

    json_array_foreach(v, i, one) ok = ok && type_known(one);
    if (!ok)
        wrong(c, schema, "type",
              "null, boolean, integer, number, string, array, object, or a list of them");
}

static void check_names(struct sc *c, const json_t *schema, const char *key, const json_t *v)
{
    size_t i;
    json_t *one;
    bool ok = json_is_array(v);

    json_array_foreach(v, i, one) ok = ok && json_is_string(one);
    if (!ok)
        wrong(c, schema, key, "an array of strings");
    else if (json_array_size(v) > IC_SCHEMA_MEMBERS_MAX)
        sc_fail_at(c, IC_TOO_LARGE, schema, "\"%s\" has more than %d names", key, IC_SCHEMA_MEMBERS_MAX);
}

static void check_number(struct sc *c, const json_t *schema, const char *key, const json_t *v)
{
    struct sc_dec d;

    if (!json_is_number(v))
        wrong(c, schema, key, "a number");
    else if (!sc_dec_from(v, &d))
        sc_fail_at(c, IC_TOO_LARGE, schema, "\"%s\" has more than %d digits", key, SC_DIGITS);
}

static void check_format(struct sc *c, const json_t *schema, const json_t *v)
{
    c->has_formats = true;
    if (!json_is_string(v))
        wrong(c, schema, "format", "a string");
    else if (!sc_format_pattern(json_string_value(v)))
        sc_fail_at(c, IC_BAD_REQUEST, schema, "\"format\": \"%.40s\" is not supported",
                   json_string_value(v));
}

static void check_ref(struct sc *c, const json_t *schema, const json_t *v)
{
    const char *s = json_string_value(v);

    if (!s)
        wrong(c, schema, "$ref", "a string");
    else if (s[0] != '#' || (s[1] && s[1] != '/'))
        sc_fail_at(c, IC_BAD_REQUEST, schema,
                   "\"$ref\": \"%.40s\" is not supported, only # and #/… within this document", s);
}

static bool any_string(const json_t *v)
{
    const char *type = json_string_value(json_object_get(v, "type"));

    return json_is_true(v) || (json_is_object(v) && !json_object_size(v)) ||
           (type && !strcmp(type, "string") && json_object_size(v) == 1);
}

/* A scalar keyword; the ones that hold schemas are the walk's. */
static void check_value(struct sc *c, const json_t *schema, const char *key, const json_t *v,
                        enum form form)
{
    double n;

    switch (form) {
    case F_NOTE_ROOT:
        if (schema != c->root)
            sc_fail_at(c, IC_BAD_REQUEST, schema, "\"%s\" below the root is not supported", key);
        break;
    case F_TYPE: check_type(c, schema, v); break;
    case F_ENUM:
        if (!json_array_size(v))
            wrong(c, schema, key, "a non-empty array");
        else if (json_array_size(v) > IC_SCHEMA_ENUM_MAX)
            sc_fail_at(c, IC_TOO_LARGE, schema, "\"enum\" has more than %d values", IC_SCHEMA_ENUM_MAX);
        break;
    case F_NUMBER: check_number(c, schema, key, v); break;
    case F_COUNT:
        if (!is_count(v, &n))
            wrong(c, schema, key, "a non-negative integer");
        else if (n > IC_SCHEMA_REPEAT_MAX)
            sc_fail_at(c, IC_TOO_LARGE, schema, "\"%s\" is above %d", key, IC_SCHEMA_REPEAT_MAX);
        break;
    case F_STRING:
        if (!json_is_string(v))
            wrong(c, schema, key, "a string");
        break;
    case F_FORMAT: check_format(c, schema, v); break;
    case F_REF: check_ref(c, schema, v); break;
    case F_KEYS:
        if (!any_string(v))
            sc_fail_at(c, IC_BAD_REQUEST, schema,
                       "\"%s\" other than true, {} and {\"type\": \"string\"} is not supported", key);
        break;
    case F_NAMES: check_names(c, schema, key, v); break;
    case F_FALSE:
        if (!json_is_boolean(v))
            wrong(c, schema, key, "a boolean");
        else if (json_is_true(v))
            sc_fail_at(c, IC_BAD_REQUEST, schema, "\"%s\": true is not supported", key);
        break;
    default: break;
    }
}

static void walk(struct sc *c, const json_t *schema, const json_t *parent, const char *key, int depth);

static void walk_held(struct sc *c, const json_t *schema, const char *key, json_t *v, enum form form,
                      int depth)
{
    size_t i;
    const char *name;
    json_t *one;

    if (form == F_SCHEMA) {
        walk(c, v, schema, key, depth + 1);
    } else if (form == F_SCHEMAS) {
        if (!json_array_size(v))
            wrong(c, schema, key, "a non-empty array of schemas");
        json_array_foreach(v, i, one) walk(c, one, v, key, depth + 1);
    } else if (form == F_MAP) {
        if (!json_is_object(v))
            wrong(c, schema, key, "an object of schemas");
        json_object_foreach(v, name, one) walk(c, one, v, name, depth + 1);
    }
}

static int find_keyword(const char *key)
{
    for (size_t i = 0; i < sizeof keywords / sizeof *keywords; i++)
        if (!strcmp(keywords[i].name, key))
            return (int)i;
    return -1;
}

/* `parent` and `key` say where a value that is no schema stands. */
static void walk(struct sc *c, const json_t *schema, const json_t *parent, const char *key, int depth)
{
    json_t *v;

    if (c->st || json_is_boolean(schema))
        return;
    if (!json_is_object(schema)) {
        if (!strcmp(key, "items") && json_is_array(schema))
            wrong(c, parent, key, "a schema (a list of schemas is \"prefixItems\")");
        else
            sc_fail_at(c, IC_BAD_REQUEST, parent, "%s%.40s%s must be an object or a boolean",
                       *key ? "\"" : "the schema", key, *key ? "\"" : "");
        return;
    }
    const json_t **slot = seen_slot(c, schema);
    if (*slot)
        return; /* a value that stands in two places */
    if (depth > IC_SCHEMA_DEPTH_MAX || ++c->n_seen > IC_SCHEMA_NODES_MAX) {
        if (depth > IC_SCHEMA_DEPTH_MAX)
            sc_fail(c, IC_TOO_LARGE, "schemas nest more than %d deep", IC_SCHEMA_DEPTH_MAX);
        else
            sc_fail(c, IC_TOO_LARGE, "more than %d schemas in the document", IC_SCHEMA_NODES_MAX);
        return;
    }
    *slot = schema;
    json_object_foreach((json_t *)(uintptr_t)schema, key, v)
    {
        int at = find_keyword(key);
        if (at < 0)
            sc_fail_at(c, IC_BAD_REQUEST, schema, "keyword \"%.40s\" is not supported", key);
        else if (keywords[at].form >= F_SCHEMA)
            walk_held(c, schema, key, v, keywords[at].form, depth);
        else
            check_value(c, schema, key, v, keywords[at].form);
        if (c->st)
            return;
    }
}

void sc_check_keywords(struct sc *c)
{
    c->seen = sc_get(c, SEEN_SLOTS * sizeof *c->seen);
    if (c->seen)
        walk(c, c->root, c->root, "", 0);
}

/* ---- $ref ---- */

static int hex_digit(char ch)
{
    return ch >= '0' && ch <= '9'   ? ch - '0'
           : ch >= 'a' && ch <= 'f' ? ch - 'a' + 10
           : ch >= 'A' && ch <= 'F' ? ch - 'A' + 10
                                    : -1;
}

/* One step of a pointer: %XX first, then ~1 and ~0. Stops at '/' or the end. */
static const char *read_step(const char *p, char *out, size_t size)
{
    size_t n = 0;
    bool tilde = false; /* out ends with a '~' that is not decoded yet */

    for (; *p && *p != '/'; p++) {
        char ch = *p;
        if (ch == '%' && hex_digit(p[1]) >= 0 && hex_digit(p[2]) >= 0) {
            ch = (char)(hex_digit(p[1]) * 16 + hex_digit(p[2]));
            p += 2;
        }
        if (n + 1 >= size || !ch)
            return NULL;
        if (tilde && (ch == '0' || ch == '1')) {
            out[n - 1] = ch == '1' ? '/' : '~';
            tilde = false;
        } else {
            out[n++] = ch;
            tilde = ch == '~';
        }
    }
    out[n] = 0;
    return p;
}

static const json_t *step_into(const json_t *at, const char *step)
{
    if (json_is_object(at))
        return json_object_get(at, step);
    if (!json_is_array(at) || !*step || strspn(step, "0123456789") != strlen(step) || strlen(step) > 6)
        return NULL;
    return json_array_get(at, (size_t)strtoul(step, NULL, 10));
}

const json_t *sc_resolve(struct sc *c, const json_t *schema)
{
    const char *ref = json_string_value(json_object_get(schema, "$ref"));
    const char *p = ref + 1;
    const json_t *at = c->root;
    char step[256];

    while (at && *p == '/') {
        p = read_step(p + 1, step, sizeof step);
        if (!p)
            break;
        at = step_into(at, step);
    }
    if (!at || !p || !(json_is_boolean(at) || (json_is_object(at) && sc_passed(c, at)))) {
        sc_fail_at(c, IC_BAD_REQUEST, schema, "\"$ref\": \"%.60s\" does not point at a schema", ref);
        return NULL;
    }
    return at;
}
