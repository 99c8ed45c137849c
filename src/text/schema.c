/* JSON Schema → grammar: from schemas to what a value may be.
 *
 * Everything is a conjunction. A value must satisfy a list of schemas: at the root one, for a member
 * all that speak of it. The list is expanded into branches: $ref and allOf join the list, anyOf and
 * oneOf fork it. Within a branch only plain keywords are left, which merge (the greater minimum,
 * both patterns' automaton, for each member the schemas of all), so siblings, $ref with siblings and
 * allOf of anything need no case of their own.
 *
 * A conjunction becomes one rule, remembered under the set of its schemas; that is what makes
 * recursive schemas end. Rules are named first and made from a queue, so the C stack stays flat
 * however deep a schema refers. */
#include <stdlib.h>
#include <string.h>

#include "text/schema_int.h"

/* A list that branches share the beginnings of. */
struct cell {
    const struct cell *before;
    const json_t *schema; /* a plain schema; in choices: the one with the oneOf */
    uint32_t choice;
};

struct branch {
    const struct cell *schemas, *choices;
    uint32_t n;
};

struct branches {
    struct branch list[IC_SCHEMA_BRANCHES_MAX];
    uint32_t n;
};

/* Where the expansion came from, to see a schema that refers to itself before any value begins. */
struct path {
    const struct path *up;
    const json_t *schema;
};

/* A list of schemas that all apply; booleans `true` are left out. */
struct list {
    const json_t **of;
    uint32_t n;
    bool never; /* one of them is false */
};

struct sc_conj {
    struct sc_conj *next;
    struct list list;
    uint32_t rule;
};

/* What a branch says about values. */
struct shape {
    struct list all; /* its schemas, in order of appearance */
    const struct cell *choices;
    unsigned types, spec_types; /* with and without the types that keywords imply */
    const json_t **values;      /* enum or const values that satisfy all; NULL: no such keyword */
    uint32_t n_values;
    const json_t *one, *listed; /* the const or enum they were taken from: more than y->values may satisfy
                                   one alternative of a oneOf, since values of two are in neither */
    bool constrained;
    struct members *members; /* members_of keeps them */
};

/* ---- lists ---- */

static void add_to(struct sc *c, struct list *l, const json_t *schema)
{
    if (!schema || json_is_true(schema))
        return;
    if (json_is_false(schema)) {
        l->never = true;
        return;
    }
    for (uint32_t i = 0; i < l->n; i++)
        if (l->of[i] == schema)
            return;
    if ((l->n & (l->n + 1)) == 0) { /* full at 0, 1, 3, 7, … */
        const json_t **of = sc_get(c, (2 * l->n + 1) * sizeof *of);
        if (!of)
            return;
        if (l->n)
            memcpy(of, l->of, l->n * sizeof *of);
        l->of = of;
    }
    l->of[l->n++] = schema;
}

static int by_address(const void *a, const void *b)
{
    uintptr_t x = (uintptr_t) * (const void *const *)a, y = (uintptr_t) * (const void *const *)b;
    return x < y ? -1 : x > y;
}

/* The memo slot of a set of schemas, whatever their order. */
static uint32_t *slot_of(struct sc *c, char kind, const struct list *l)
{
    struct list key = {0};

    key.of = sc_get(c, (l->n + 1) * sizeof *key.of);
    if (!key.of)
        return NULL;
    memset(key.of, kind, sizeof *key.of); /* the first entry tells the kinds apart */
    if (l->n)
        memcpy(key.of + 1, l->of, l->n * sizeof *key.of);
    qsort(key.of + 1, l->n, sizeof *key.of, by_address);
    return sc_memo(c, key.of, (l->n + 1) * sizeof *key.of);
}

/* A value that satisfies all of a list. Its rule is made later, by the queue. */
static uint32_t value_of(struct sc *c, struct list l)
{
    if (l.never)
        return SC_NODE_NEVER;
    if (!l.n)
        return sc_any(c);
    uint32_t *slot = slot_of(c, 'v', &l);
    if (!slot)
        return SC_NODE_NEVER;
    if (!*slot) {
        struct sc_conj *todo = sc_get(c, sizeof *todo);
        if (!todo)
            return SC_NODE_NEVER;
        todo->list = l;
        todo->rule = sc_rule(c, "value", SC_NODE_NEVER);
        *slot = todo->rule + 1;
        *c->todo_end = todo;
        c->todo_end = &todo->next;
    }
    return sc_ref(c, *slot - 1);
}

/* ---- expansion into branches ---- */

static bool holds(const struct branch *b, const json_t *schema)
{
    for (const struct cell *p = b->schemas; p; p = p->before)
        if (p->schema == schema)
            return true;
    return false;
}

static const struct cell *add_cell(struct sc *c, const struct cell *before, const json_t *schema,
                                   uint32_t choice)
{
    struct cell *p = sc_get(c, sizeof *p);

    if (p)
        *p = (struct cell){before, schema, choice};
    return p;
}

static void expand(struct sc *c, struct branches *b, const json_t *schema, const struct path *up,
                   int depth);

/* Forks every branch into one for each alternative. */
static void fork_branches(struct sc *c, struct branches *b, const json_t *schema, const char *key,
                          const struct path *here, int depth)
{
    const json_t *list = json_object_get(schema, key);
    bool one = !strcmp(key, "oneOf");
    struct branches *from = sc_get(c, sizeof *from), *part = sc_get(c, sizeof *part);
    size_t i;
    json_t *alt;

    if (!from || !part)
        return;
    *from = *b;
    b->n = 0;
    json_array_foreach(list, i, alt)
    {
        *part = *from;
        for (uint32_t k = 0; one && k < part->n; k++)
            part->list[k].choices = add_cell(c, part->list[k].choices, schema, (uint32_t)i);
        expand(c, part, alt, here, depth + 1);
        if (c->st)
            return;
        if (part->n > IC_SCHEMA_BRANCHES_MAX - b->n) {
            sc_fail_at(c, IC_TOO_LARGE, schema, "\"%s\" makes more than %d alternatives of one value", key,
                       IC_SCHEMA_BRANCHES_MAX);
            return;
        }
        memcpy(b->list + b->n, part->list, part->n * sizeof *part->list);
        b->n += part->n;
    }
}

/* Adds a schema and all it stands for to every branch that does not hold it yet. */
static void expand_new(struct sc *c, struct branches *b, const json_t *schema, const struct path *up,
                       int depth)
{
    struct path here = {up, schema};
    size_t i;
    json_t *v;

    if (json_object_get(schema, "$ref")) {
        const json_t *to = sc_resolve(c, schema);
        if (to)
            expand(c, b, to, &here, depth + 1);
    }
    json_array_foreach(json_object_get(schema, "allOf"), i, v)
    {
        if (!c->st)
            expand(c, b, v, &here, depth + 1);
    }
    for (uint32_t k = 0; k < b->n && !c->st; k++) {
        b->list[k].schemas = add_cell(c, b->list[k].schemas, schema, 0);
        b->list[k].n++;
    }
    if (!c->st && json_object_get(schema, "anyOf"))
        fork_branches(c, b, schema, "anyOf", &here, depth);
    if (!c->st && json_object_get(schema, "oneOf"))
        fork_branches(c, b, schema, "oneOf", &here, depth);
}

static void expand(struct sc *c, struct branches *b, const json_t *schema, const struct path *up, int depth)
{
    if (c->st || json_is_true(schema) || !sc_work(c, 20 + 4 * b->n))
        return;
    if (json_is_false(schema)) {
        b->n = 0;
        return;
    }
    if (depth > 2 * IC_SCHEMA_DEPTH_MAX) {
        sc_fail(c, IC_TOO_LARGE, "a chain of more than %d \"$ref\", \"allOf\", \"anyOf\"",
                2 * IC_SCHEMA_DEPTH_MAX);
        return;
    }
    for (const struct path *p = up; p; p = p->up)
        if (p->schema == schema) {
            sc_fail_at(c, IC_BAD_REQUEST, schema, "the schema refers to itself without any value between");
            return;
        }
    uint32_t holding = 0;
    for (uint32_t k = 0; k < b->n; k++)
        holding += holds(&b->list[k], schema);
    if (!holding) {
        expand_new(c, b, schema, up, depth);
        return;
    }
    if (holding == b->n)
        return;
    struct branches *fresh = sc_get(c, sizeof *fresh);
    if (!fresh)
        return;
    uint32_t kept = 0;
    for (uint32_t k = 0; k < b->n; k++)
        if (holds(&b->list[k], schema))
            b->list[kept++] = b->list[k];
        else
            fresh->list[fresh->n++] = b->list[k];
    b->n = kept;
    expand_new(c, fresh, schema, up, depth);
    if (fresh->n > IC_SCHEMA_BRANCHES_MAX - b->n) {
        sc_fail_at(c, IC_TOO_LARGE, schema, "more than %d alternatives of one value",
                   IC_SCHEMA_BRANCHES_MAX);
        return;
    }
    memcpy(b->list + b->n, fresh->list, fresh->n * sizeof *fresh->list);
    b->n += fresh->n;
}

/* ---- shapes ---- */

static const struct {
    const char *key;
    unsigned type;
} kind_of[] = {
    {"properties", SC_OBJ},
    {"required", SC_OBJ},
    {"additionalProperties", SC_OBJ},
    {"items", SC_ARR},
    {"prefixItems", SC_ARR},
    {"minItems", SC_ARR},
    {"maxItems", SC_ARR},
    {"minLength", SC_STR},
    {"maxLength", SC_STR},
    {"pattern", SC_STR},
    {"format", SC_STR},
    {"minimum", SC_INT | SC_FRAC},
    {"maximum", SC_INT | SC_FRAC},
    {"exclusiveMinimum", SC_INT | SC_FRAC},
    {"exclusiveMaximum", SC_INT | SC_FRAC},
};

static bool all_valid(struct sc *c, const struct list *all, const json_t *value)
{
    for (uint32_t i = 0; i < all->n; i++)
        if (!sc_valid(c, all->of[i], value))
            return false;
    return true;
}

static bool add_value(struct sc *c, struct shape *s, const json_t *v)
{
    if (all_valid(c, &s->all, v))
        s->values[s->n_values++] = v;
    return sc_work(c, 4);
}

/* The first enum or const names the candidates; the others only take away. */
static void find_values(struct sc *c, struct shape *s)
{
    size_t k;
    json_t *v;

    for (uint32_t i = 0; i < s->all.n && !s->values; i++) {
        const json_t *one = json_object_get(s->all.of[i], "const"),
                     *list = json_object_get(s->all.of[i], "enum");
        if (!one && !list)
            continue;
        s->values = sc_get(c, (json_array_size(list) + 1) * sizeof *s->values);
        if (!s->values)
            return;
        s->one = one;
        s->listed = one ? NULL : list;
        if (one)
            add_value(c, s, one);
        c->trusted = s->listed;
        json_array_foreach(s->listed, k, v) if (!add_value(c, s, v)) break;
        c->trusted = NULL;
    }
}

static struct shape *shape_of(struct sc *c, const struct branch *b)
{
    struct shape *s = sc_get(c, sizeof *s);
    unsigned implied = 0;
    bool typed = false;

    if (!s || !(s->all.of = sc_get(c, (b->n + 1) * sizeof *s->all.of)))
        return NULL;
    s->choices = b->choices;
    s->all.n = b->n;
    uint32_t at = b->n;
    for (const struct cell *p = b->schemas; p; p = p->before)
        s->all.of[--at] = p->schema;
    s->types = s->spec_types = SC_ALL;
    for (uint32_t i = 0; i < s->all.n; i++) {
        const json_t *schema = s->all.of[i];
        s->types &= sc_types(schema);
        typed |= json_object_get(schema, "type") != NULL;
        for (size_t k = 0; k < sizeof kind_of / sizeof *kind_of; k++)
            if (json_object_get(schema, kind_of[k].key))
                implied |= kind_of[k].type;
    }
    s->spec_types = s->types;
    s->constrained = typed || implied;
    if (!typed && implied)
        s->types = implied;
    find_values(c, s);
    if (s->values) {
        unsigned seen = s->one ? sc_type_of(s->one) : 0;
        json_t *v;
        size_t k;
        json_array_foreach(s->listed, k, v) seen |= sc_type_of(v);
        s->types &= seen;
        s->spec_types &= seen;
        s->constrained = true;
    }
    return s;
}

/* ---- strings and numbers ---- */

static uint32_t string_of(struct sc *c, const struct list *all)
{
    static const char *const keys[] = {"pattern", "format"};
    uint32_t min = 0, max = SC_INF;
    const json_t *where = NULL;
    struct sc_dfa d = {0}, other;

    for (uint32_t i = 0; i < all->n && !c->st; i++) {
        uint32_t lo = sc_count(all->of[i], "minLength", 0), hi = sc_count(all->of[i], "maxLength", SC_INF);
        min = lo > min ? lo : min;
        max = hi < max ? hi : max;
        for (int k = 0; k < 2 && !c->st; k++) {
            if (!json_object_get(all->of[i], keys[k]))
                continue;
            const struct sc_dfa *next = sc_dfa_of(c, all->of[i], keys[k]);
            other = d;
            if (next && !where)
                d = *next;
            else if (next)
                sc_dfa_both(c, &other, next, all->of[i], &d);
            where = all->of[i];
        }
    }
    if (c->st || min > max)
        return SC_NODE_NEVER;
    if (!where)
        return sc_string(c, min, max);
    if (min || max != SC_INF) {
        struct sc_dfa length, both;
        if (!sc_dfa_length(c, min, max, where, &length) || !sc_dfa_both(c, &d, &length, where, &both))
            return SC_NODE_NEVER;
        d = both;
    }
    return SC_SEQ(c, sc_lits(c, "\""), sc_dfa_body(c, &d));
}

static uint32_t number_of_kind(struct sc *c, const struct list *all, bool whole)
{
    struct sc_bounds b = {0};

    for (uint32_t i = 0; i < all->n; i++)
        sc_bounds_of(all->of[i], &b);
    return whole ? sc_integer_range(c, &b) : sc_number_range(c, &b);
}

/* ---- arrays ---- */

/* The schemas for position i: prefixItems where they reach, else items. */
static struct list item_at(struct sc *c, const struct list *all, size_t i)
{
    struct list l = {0};

    for (uint32_t k = 0; k < all->n; k++) {
        const json_t *prefix = json_object_get(all->of[k], "prefixItems");
        add_to(c, &l,
               i < json_array_size(prefix) ? json_array_get(prefix, i)
                                           : json_object_get(all->of[k], "items"));
    }
    return l;
}

static uint32_t with_comma(struct sc *c, uint32_t node)
{
    return SC_SEQ(c, sc_lits(c, ","), sc_blank(c), node);
}

/* At least one item, where all are alike. */
static uint32_t plain_items(struct sc *c, const struct list *all, uint32_t min, uint32_t max)
{
    if (!max)
        return SC_NODE_NEVER;
    uint32_t item = value_of(c, item_at(c, all, 0));
    return SC_SEQ(c, item,
                  sc_rep(c, with_comma(c, item), min ? min - 1 : 0, max == SC_INF ? SC_INF : max - 1));
}

/* At least one item, where the first n_prefix have schemas of their own; made from the last to the
 * first, each followed by the rule of what may come after it. */
static uint32_t prefixed_items(struct sc *c, const struct list *all, uint32_t n_prefix, uint32_t min,
                               uint32_t max)
{
    uint32_t tail = SC_NODE_EMPTY;

    if (max > n_prefix) {
        uint32_t rest = with_comma(c, value_of(c, item_at(c, all, n_prefix)));
        tail =
            sc_rep(c, rest, min > n_prefix ? min - n_prefix : 0, max == SC_INF ? SC_INF : max - n_prefix);
    }
    for (uint32_t i = n_prefix; i > 0; i--) {
        uint32_t item = i > max ? SC_NODE_NEVER : value_of(c, item_at(c, all, i - 1));
        if (i == 1)
            return SC_SEQ(c, item, tail);
        uint32_t stop = i - 1 >= min ? SC_NODE_EMPTY : SC_NODE_NEVER; /* the array may end before it */
        tail = sc_ref(c, sc_rule(c, "items", SC_ALT(c, SC_SEQ(c, with_comma(c, item), tail), stop)));
    }
    return tail;
}

static uint32_t array_of(struct sc *c, const struct list *all)
{
    uint32_t min = 0, max = SC_INF, n_prefix = 0;
    bool rest_known = false;

    for (uint32_t i = 0; i < all->n; i++) {
        uint32_t lo = sc_count(all->of[i], "minItems", 0), hi = sc_count(all->of[i], "maxItems", SC_INF);
        uint32_t n = (uint32_t)json_array_size(json_object_get(all->of[i], "prefixItems"));
        min = lo > min ? lo : min;
        max = hi < max ? hi : max;
        n_prefix = n > n_prefix ? n : n_prefix;
        rest_known |= json_object_get(all->of[i], "items") != NULL;
    }
    if (n_prefix && !rest_known) { /* see schema.h: closed there */
        uint32_t end = min > n_prefix ? min : n_prefix;
        max = max < end ? max : end;
    }
    if (min > max)
        return SC_NODE_NEVER;

    uint32_t body = n_prefix ? prefixed_items(c, all, n_prefix, min, max) : plain_items(c, all, min, max);
    body = SC_ALT(c, min ? SC_NODE_NEVER : SC_NODE_EMPTY, SC_SEQ(c, body, sc_blank(c)));
    return SC_SEQ(c, sc_lits(c, "["), sc_blank(c), body, sc_lits(c, "]"));
}

/* ---- objects ---- */

struct member {
    const char *name;
    bool required;
};

struct members {
    struct member *of;
    uint32_t n, cap;
    bool closed; /* other names may not appear */
    struct list others;
};

static bool grow_members(struct sc *c, struct members *m)
{
    uint32_t cap = m->cap ? 2 * m->cap : 8;
    struct member *of = sc_get(c, cap * sizeof *of);

    if (!of)
        return false;
    if (m->n)
        memcpy(of, m->of, m->n * sizeof *of);
    m->of = of;
    m->cap = cap;
    return true;
}

static void add_member(struct sc *c, struct members *m, json_t *index, const char *name, bool required,
                       const json_t *where)
{
    const json_t *at = json_object_get(index, name);

    if (at) {
        m->of[json_integer_value(at)].required |= required;
    } else if (m->n == IC_SCHEMA_MEMBERS_MAX) {
        sc_fail_at(c, IC_TOO_LARGE, where, "more than %d members of one object", IC_SCHEMA_MEMBERS_MAX);
    } else if (m->n == m->cap && !grow_members(c, m)) {
        return;
    } else if (json_object_set_new(index, name, json_integer((json_int_t)m->n))) {
        sc_fail(c, IC_OOM, "out of memory for the schema");
    } else {
        m->of[m->n++] = (struct member){name, required};
    }
}

/* Declared members in order of appearance, then required names nobody declared. */
static struct members *members_of(struct sc *c, struct shape *s)
{
    const struct list *all = &s->all;

    if (s->members)
        return s->members;
    struct members *m = sc_get(c, sizeof *m);
    json_t *index = json_object(), *v;
    const char *name;
    size_t k;
    bool ruled = false;

    if (!m || !index) {
        json_decref(index);
        sc_fail(c, IC_OOM, "out of memory for the schema");
        return NULL;
    }
    for (uint32_t i = 0; i < all->n && sc_work(c, 10); i++) {
        const json_t *props = json_object_get(all->of[i], "properties");
        sc_work(c, 10 * (uint32_t)json_object_size(props));
        json_object_foreach(json_object_get(all->of[i], "properties"), name, v)
            add_member(c, m, index, name, false, all->of[i]);
        const json_t *more = json_object_get(all->of[i], "additionalProperties");
        ruled |= more != NULL;
        add_to(c, &m->others, more);
    }
    for (uint32_t i = 0; i < all->n; i++)
        json_array_foreach(json_object_get(all->of[i], "required"), k, v)
            add_member(c, m, index, json_string_value(v), true, all->of[i]);
    json_decref(index);
    m->closed = m->others.never || (!ruled && m->n);
    return s->members = m;
}

/* All that is said about a member: by name, or else by additionalProperties beside it. */
static struct list member_schemas(struct sc *c, const struct list *all, const char *name)
{
    struct list l = {0};

    for (uint32_t i = 0; i < all->n; i++) {
        const json_t *own = json_object_get(json_object_get(all->of[i], "properties"), name);
        add_to(c, &l, own ? own : json_object_get(all->of[i], "additionalProperties"));
    }
    return l;
}

/* The name without its opening quote, a colon, the value. */
static uint32_t member_node(struct sc *c, const char *name, uint32_t value)
{
    struct ic_buf text = {0};

    ic_json_str(&text, name, strlen(name));
    ic_buf_puts(&text, ":");
    uint32_t lit = text.failed ? SC_NODE_NEVER : sc_lit(c, text.data + 1, text.len - 1);
    if (text.failed)
        sc_fail(c, IC_OOM, "out of memory for the schema");
    ic_buf_deinit(&text);
    return SC_SEQ(c, lit, sc_rep(c, sc_lits(c, " "), 0, 1), value);
}

/* Names that are not declared: `more` is the rule of what may follow a member. */
static uint32_t other_member(struct sc *c, const struct members *m, uint32_t more)
{
    const char **names = sc_get(c, (m->n + 1) * sizeof *names);
    struct sc_dfa d;

    if (m->closed || !names)
        return SC_NODE_NEVER;
    for (uint32_t i = 0; i < m->n; i++)
        names[i] = m->of[i].name;
    if (!sc_dfa_other_keys(c, names, m->n, &d))
        return SC_NODE_NEVER;
    return SC_SEQ(c, sc_dfa_body(c, &d), sc_lits(c, ":"), sc_rep(c, sc_lits(c, " "), 0, 1),
                  value_of(c, m->others), more);
}

/* From the last member back to the first. `from` is what may come after an opening quote when the
 * next member is i or a later one; `more` what may come after member i - 1: nothing, or a comma and
 * a quote and `from`. Both are shared by everything before, so the text grows with the members and
 * not with their subsets. */
static uint32_t object_of(struct sc *c, struct shape *s)
{
    const struct members *m = members_of(c, s);

    if (!m || c->st)
        return SC_NODE_NEVER;
    if (!m->n && !m->closed && !m->others.n)
        return sc_any_object(c);
    uint32_t quote = sc_lits(c, "\""), comma = with_comma(c, quote);
    bool may_end = true;
    uint32_t more_rule = sc_rule(c, "more", SC_NODE_NEVER), more = sc_ref(c, more_rule);
    uint32_t from = sc_ref(c, sc_rule(c, "other", other_member(c, m, more)));
    if (c->st)
        return SC_NODE_NEVER;
    c->rules[more_rule].body = SC_ALT(c, SC_SEQ(c, comma, from), SC_NODE_EMPTY);
    for (uint32_t i = m->n; i > 0 && !c->st; i--) {
        const struct member *p = &m->of[i - 1];
        uint32_t value = value_of(c, member_schemas(c, &s->all, p->name));
        uint32_t own = SC_SEQ(c, member_node(c, p->name, value), more);
        from = sc_ref(c, sc_rule(c, "member", SC_ALT(c, own, p->required ? SC_NODE_NEVER : from)));
        may_end = may_end && !p->required;
        if (i > 1)
            more = sc_ref(
                c, sc_rule(c, "more",
                           SC_ALT(c, SC_SEQ(c, comma, from), may_end ? SC_NODE_EMPTY : SC_NODE_NEVER)));
    }
    uint32_t body = SC_ALT(c, may_end ? SC_NODE_EMPTY : SC_NODE_NEVER, SC_SEQ(c, quote, from, sc_blank(c)));
    return SC_SEQ(c, sc_lits(c, "{"), sc_blank(c), body, sc_lits(c, "}"));
}

/* ---- a branch's grammar ---- */

static int by_text(const void *a, const void *b)
{
    const struct ic_buf *x = a, *y = b;
    int r = memcmp(x->data, y->data, x->len < y->len ? x->len : y->len);
    return r ? r : x->len < y->len ? -1 : x->len > y->len;
}

static uint32_t values_node(struct sc *c, const struct shape *s)
{
    struct ic_buf *texts = sc_get(c, (s->n_values + 1) * sizeof *texts);
    size_t total = 0;
    uint32_t node = SC_NODE_NEVER;

    if (!texts)
        return SC_NODE_NEVER;
    for (uint32_t i = 0; i < s->n_values && total <= IC_SCHEMA_OUTPUT_MAX; i++) {
        texts[i].max = IC_SCHEMA_OUTPUT_MAX + 1;
        sc_put_json(&texts[i], s->values[i]);
        total += texts[i].failed ? texts[i].max : texts[i].len;
    }
    if (total > IC_SCHEMA_OUTPUT_MAX) {
        sc_fail(c, IC_TOO_LARGE, "the constants are longer than %d KiB", IC_SCHEMA_OUTPUT_MAX >> 10);
    } else if (s->n_values) {
        qsort(texts, s->n_values, sizeof *texts, by_text);
        uint32_t n = 1;
        for (uint32_t i = 1; i < s->n_values; i++)
            if (by_text(&texts[n - 1], &texts[i])) {
                struct ic_buf t = texts[n]; /* a swap: all of them are freed below */
                texts[n++] = texts[i];
                texts[i] = t;
            }
        node = sc_trie(c, texts, n);
    }
    for (uint32_t i = 0; i < s->n_values; i++)
        ic_buf_deinit(&texts[i]);
    return node;
}

static uint32_t shape_node(struct sc *c, struct shape *s)
{
    uint32_t alts[7], n = 0;

    if (s->values)
        return values_node(c, s);
    if (!s->constrained)
        return sc_any(c);
    if (s->types & SC_OBJ)
        alts[n++] = object_of(c, s);
    if (s->types & SC_ARR)
        alts[n++] = array_of(c, &s->all);
    if (s->types & SC_STR)
        alts[n++] = string_of(c, &s->all);
    if (s->types & (SC_INT | SC_FRAC))
        alts[n++] = number_of_kind(c, &s->all, !(s->types & SC_FRAC));
    if (s->types & SC_BOOL)
        alts[n++] = SC_ALT(c, sc_lits(c, "true"), sc_lits(c, "false"));
    if (s->types & SC_NULL)
        alts[n++] = sc_lits(c, "null");
    return sc_alt(c, alts, n);
}

static uint32_t branch_node(struct sc *c, struct shape *s)
{
    uint32_t *slot = slot_of(c, 'b', &s->all);

    if (!slot)
        return SC_NODE_NEVER;
    if (!*slot) {
        uint32_t node = shape_node(c, s);
        *slot = sc_rule(c, "shape", node) + 1;
    }
    return sc_ref(c, *slot - 1);
}

/* ---- oneOf: do alternatives exclude each other? ---- */

static struct shape **shapes_of(struct sc *c, const struct list *l, uint32_t *n)
{
    struct branches b = {.n = !l->never};

    *n = 0;
    for (uint32_t i = 0; i < l->n && !c->st; i++)
        expand(c, &b, l->of[i], NULL, 0);
    struct shape **shapes = sc_get(c, (b.n + 1) * sizeof *shapes);
    if (!shapes)
        return NULL;
    for (uint32_t i = 0; i < b.n && !c->st; i++)
        shapes[i] = shape_of(c, &b.list[i]);
    *n = c->st ? 0 : b.n;
    return shapes;
}

/* Have x and y constants both, and does y name none that x writes? */
static bool other_values(const struct shape *x, const struct shape *y)
{
    size_t k;
    json_t *v;

    if (!x->values || !y->values)
        return false;
    for (uint32_t i = 0; i < x->n_values; i++) {
        if (y->one && sc_same(x->values[i], y->one))
            return false;
        json_array_foreach(y->listed, k, v) if (sc_same(x->values[i], v)) return false;
    }
    return true;
}

/* Does a member's schema list allow only constants, none of which the other list allows? */
static bool member_differs(struct sc *c, const struct list *x, const struct list *y)
{
    uint32_t nx, ny;
    struct shape **sx = shapes_of(c, x, &nx), **sy = shapes_of(c, y, &ny);

    for (uint32_t i = 0; i < nx; i++)
        for (uint32_t k = 0; k < ny; k++)
            if (sx[i]->types & sy[k]->spec_types && !other_values(sx[i], sy[k]))
                return false;
    return !c->st;
}

/* Is every object that the grammar of x writes invalid under y? */
static bool objects_differ(struct sc *c, struct shape *x, struct shape *y)
{
    const struct members *mx = members_of(c, x), *my = members_of(c, y);

    for (uint32_t i = 0; mx && i < mx->n && !c->st; i++) {
        if (!mx->of[i].required)
            continue;
        struct list lx = member_schemas(c, &x->all, mx->of[i].name),
                    ly = member_schemas(c, &y->all, mx->of[i].name);
        if (ly.never || member_differs(c, &lx, &ly))
            return true;
    }
    for (uint32_t i = 0; mx && my && mx->closed && i < my->n && !c->st; i++) {
        bool written = false;
        for (uint32_t k = 0; k < mx->n && !written; k++)
            written = !strcmp(mx->of[k].name, my->of[i].name);
        if (my->of[i].required && !written)
            return true;
    }
    return false;
}

/* Can it be shown that no output of x is valid under y? */
static bool excludes(struct sc *c, struct shape *x, struct shape *y)
{
    if (x->values) { /* few enough to try them */
        for (uint32_t i = 0; i < x->n_values; i++)
            if (all_valid(c, &y->all, x->values[i]))
                return false;
        return true;
    }
    unsigned both = x->types & y->spec_types;
    return !both || (both == SC_OBJ && objects_differ(c, x, y));
}

static uint32_t choice_in(const struct shape *s, const json_t *schema)
{
    for (const struct cell *p = s->choices; p; p = p->before)
        if (p->schema == schema)
            return p->choice;
    return SC_INF;
}

static void check_choices(struct sc *c, struct shape *const *shapes, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        for (const struct cell *p = shapes[i]->choices; p; p = p->before)
            for (uint32_t k = 0; k < n && sc_work(c, 50); k++) {
                uint32_t other = choice_in(shapes[k], p->schema);
                if (other == SC_INF || other == p->choice || excludes(c, shapes[i], shapes[k]))
                    continue;
                sc_fail_at(c, IC_BAD_REQUEST, p->schema,
                           "\"oneOf\" is supported where alternatives exclude each other; %u and %u may "
                           "not: use \"anyOf\"",
                           p->choice < other ? p->choice : other, p->choice < other ? other : p->choice);
                return;
            }
}

/* ---- the whole ---- */

static void make(struct sc *c, struct sc_conj *todo)
{
    uint32_t n, m = 0;
    struct shape **shapes = shapes_of(c, &todo->list, &n);
    uint32_t *alts = sc_get(c, (n + 1) * sizeof *alts);

    if (c->st || !alts)
        return;
    check_choices(c, shapes, n);
    for (uint32_t i = 0; i < n && !c->st; i++)
        alts[m++] = branch_node(c, shapes[i]);
    uint32_t body = sc_alt(c, alts, m);
    if (!c->st)
        c->rules[todo->rule].body = body;
}

enum ic_status ic_schema_to_gbnf(const json_t *schema, struct ic_buf *out, struct ic_err *err)
{
    struct sc *c = calloc(1, sizeof *c);
    struct ic_buf text = {.max = IC_SCHEMA_OUTPUT_MAX};

    ic_buf_clear(out);
    if (!c)
        return ic_fail(err, IC_OOM, "out of memory for the schema");
    c->root = schema;
    c->err = err;
    c->todo_end = &c->todo;
    if (!schema)
        sc_fail(c, IC_BAD_REQUEST, "there is no schema");
    else if (sc_grammar_init(c))
        sc_check_keywords(c);
    if (!c->st) {
        struct list all = {0};
        add_to(c, &all, schema);
        uint32_t root = value_of(c, all);
        for (struct sc_conj *todo = c->todo; todo && !c->st; todo = todo->next)
            make(c, todo);
        sc_emit(c, root, &text);
    }
    if (!c->st) {
        ic_buf_put(out, text.data, text.len + 1);
        if (out->failed)
            sc_fail(c, IC_OOM, "no room for the grammar");
        else
            out->len--;
    }
    if (c->st)
        ic_buf_clear(out);
    enum ic_status st = c->st;
    ic_buf_deinit(&text);
    sc_free(c);
    free(c);
    return st;
}
