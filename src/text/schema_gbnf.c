/* Memory, errors and the grammar under construction.
 *
 * The grammar is kept as nodes until the end because only then it is known which rules can produce
 * a finite text at all: a required member whose schema is false, or a list that must contain itself,
 * would otherwise trap the model in a rule without exit. What llama.cpp's parser and matcher are
 * weak at is avoided here: repetition is applied to single elements only (it multiplies groups and
 * limits the product to 2000), and counts above 1000 are built from pieces (above 2000 it silently
 * drops the upper bound). */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "text/schema_int.h"

#define POOL_MAX ((size_t)128 << 20)
#define WORK_MAX 20000000u
#define PIECE 1000u /* repetitions in one {m,n} */

struct sc_block {
    struct sc_block *next;
    size_t used, size;
    _Alignas(max_align_t) char bytes[];
};

void *sc_get(struct sc *c, size_t size)
{
    struct sc_block *b = c->blocks;

    size = (size + 15) & ~(size_t)15;
    if (!b || b->size - b->used < size) {
        size_t want = size > (64 << 10) ? size : (64 << 10);
        if (want > POOL_MAX || c->pooled > POOL_MAX - want) {
            sc_fail(c, IC_TOO_LARGE, "the schema needs more than %zu MiB of memory", POOL_MAX >> 20);
            return NULL;
        }
        b = calloc(1, sizeof *b + want);
        if (!b) {
            sc_fail(c, IC_OOM, "out of memory for the schema");
            return NULL;
        }
        b->size = want;
        b->next = c->blocks;
        c->blocks = b;
        c->pooled += want;
    }
    void *p = b->bytes + b->used;
    b->used += size;
    return p;
}

static void free_blocks(struct sc_block *b)
{
    while (b) {
        struct sc_block *next = b->next;
        free(b);
        b = next;
    }
}

void sc_free(struct sc *c)
{
    free_blocks(c->blocks);
    c->blocks = NULL;
}

struct sc_scratch sc_scratch_begin(struct sc *c)
{
    struct sc_scratch old = {c->blocks, c->pooled};
    c->blocks = NULL;
    return old;
}

bool sc_scratch_keep(struct sc *c, struct sc_scratch old, const struct sc_dfa *made, struct sc_dfa *out)
{
    struct sc_block *scratch = c->blocks;

    c->blocks = old.blocks;
    c->pooled = old.pooled;
    *out = (struct sc_dfa){0};
    struct sc_state *states = c->st ? NULL : sc_get(c, (made->n + 1) * sizeof *states);
    for (uint32_t i = 0; states && i < made->n; i++) {
        states[i] = made->states[i];
        states[i].edges = sc_get(c, (states[i].n + 1) * sizeof(struct sc_edge));
        if (!states[i].edges)
            break;
        if (states[i].n)
            memcpy(states[i].edges, made->states[i].edges, states[i].n * sizeof(struct sc_edge));
    }
    if (!c->st)
        *out = (struct sc_dfa){states, made->n};
    free_blocks(scratch);
    return !c->st;
}

static void keep_error(struct sc *c, enum ic_status st, const char *text)
{
    if (c->st)
        return;
    c->st = st;
    ic_fail(c->err, st, "json_schema: %s", text);
}

void sc_fail(struct sc *c, enum ic_status st, const char *fmt, ...)
{
    char text[160];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    keep_error(c, st, text);
}

/* Appends "/key" with the JSON pointer escapes. */
static void put_step(struct ic_buf *path, const char *key)
{
    ic_buf_puts(path, "/");
    for (; *key; key++)
        if (*key == '~' || *key == '/')
            ic_buf_puts(path, *key == '~' ? "~0" : "~1");
        else
            ic_buf_put(path, key, 1);
}

static bool find_path(const json_t *at, const json_t *what, struct ic_buf *path, int depth)
{
    size_t i, len = path->len;
    json_t *v;

    if (at == what)
        return true;
    if (depth > 2 * IC_SCHEMA_DEPTH_MAX + 2)
        return false;
    if (json_is_array(at)) {
        json_array_foreach(at, i, v)
        {
            ic_buf_printf(path, "/%zu", i);
            if (find_path(v, what, path, depth + 1))
                return true;
            path->len = len;
        }
    } else if (json_is_object(at)) {
        const char *key;
        json_object_foreach((json_t *)(uintptr_t)at, key, v)
        {
            put_step(path, key);
            if (find_path(v, what, path, depth + 1))
                return true;
            path->len = len;
        }
    }
    return false;
}

void sc_fail_at(struct sc *c, enum ic_status st, const json_t *where, const char *fmt, ...)
{
    char text[160], all[256];
    struct ic_buf path = {.max = 1 << 20};
    va_list ap;

    if (c->st)
        return;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    find_path(c->root, where, &path, 0);
    ic_buf_put(&path, "", 1);
    /* the message is short: of a long path keep the end, which says more */
    const char *p = path.data && !path.failed ? path.data : "";
    size_t len = strlen(p), room = strlen(text) < 100 ? 40 + (100 - strlen(text)) / 2 : 40;
    if (len > room) {
        p += len - room;
        while (((unsigned char)*p & 0xC0) == 0x80)
            p++;
    }
    snprintf(all, sizeof all, "%s, at #%s%s", text, len > room ? "…" : "", p);
    keep_error(c, st, all);
    ic_buf_deinit(&path);
}

bool sc_work(struct sc *c, uint32_t steps)
{
    if (steps > WORK_MAX - c->work) {
        c->work = WORK_MAX;
        sc_fail(c, IC_TOO_LARGE, "the schema takes too much work to compile");
    } else {
        c->work += steps;
    }
    return !c->st;
}

struct sc_memo {
    struct sc_memo *next;
    size_t len;
    uint32_t value;
    char key[];
};

uint32_t *sc_memo(struct sc *c, const void *key, size_t len)
{
    uint64_t h = 1469598103934665603u;

    for (size_t i = 0; i < len; i++)
        h = (h ^ ((const unsigned char *)key)[i]) * 1099511628211u;
    struct sc_memo **head = &c->memo[(h ^ h >> 32) % (sizeof c->memo / sizeof *c->memo)];
    for (struct sc_memo *m = *head; m; m = m->next)
        if (m->len == len && !memcmp(m->key, key, len))
            return &m->value;
    struct sc_memo *m = sc_get(c, sizeof *m + len);
    if (!m)
        return NULL;
    memcpy(m->key, key, len);
    m->len = len;
    m->next = *head;
    *head = m;
    return &m->value;
}

/* ---- nodes ---- */

static uint32_t add_node(struct sc *c, struct sc_node node)
{
    if (c->n_nodes == c->cap_nodes) {
        uint32_t cap = c->cap_nodes ? 2 * c->cap_nodes : 256;
        struct sc_node *p = sc_get(c, cap * sizeof *p);
        if (!p)
            return SC_NODE_NEVER;
        if (c->n_nodes)
            memcpy(p, c->nodes, c->n_nodes * sizeof *p);
        c->nodes = p;
        c->cap_nodes = cap;
    }
    c->nodes[c->n_nodes] = node;
    return c->n_nodes++;
}

bool sc_grammar_init(struct sc *c)
{
    add_node(c, (struct sc_node){.kind = SC_EMPTY});
    add_node(c, (struct sc_node){.kind = SC_NEVER});
    return !c->st;
}

static void *copy(struct sc *c, const void *p, size_t size)
{
    void *q = sc_get(c, size ? size : 1);
    if (q && size)
        memcpy(q, p, size);
    return q;
}

uint32_t sc_lit(struct sc *c, const char *bytes, size_t len)
{
    if (!len)
        return SC_NODE_EMPTY;
    char *own = copy(c, bytes, len);
    return own ? add_node(c, (struct sc_node){.kind = SC_LIT, .n = (uint32_t)len, .bytes = own})
               : SC_NODE_NEVER;
}

uint32_t sc_lits(struct sc *c, const char *text)
{
    return sc_lit(c, text, strlen(text));
}

uint32_t sc_class(struct sc *c, const struct sc_range *ranges, uint32_t n)
{
    if (!n)
        return SC_NODE_NEVER;
    struct sc_range *own = copy(c, ranges, n * sizeof *own);
    return own ? add_node(c, (struct sc_node){.kind = SC_CLASS, .n = n, .ranges = own}) : SC_NODE_NEVER;
}

uint32_t sc_range1(struct sc *c, uint32_t lo, uint32_t hi)
{
    return lo <= hi ? sc_class(c, &(struct sc_range){lo, hi}, 1) : SC_NODE_NEVER;
}

uint32_t sc_seq(struct sc *c, const uint32_t *kids, uint32_t n)
{
    uint32_t *own = copy(c, kids, n * sizeof *own), m = 0;

    if (!own)
        return SC_NODE_NEVER;
    for (uint32_t i = 0; i < n; i++) {
        if (kids[i] == SC_NODE_NEVER)
            return SC_NODE_NEVER;
        if (kids[i] != SC_NODE_EMPTY)
            own[m++] = kids[i];
    }
    return m == 0   ? SC_NODE_EMPTY
           : m == 1 ? own[0]
                    : add_node(c, (struct sc_node){.kind = SC_SEQ, .n = m, .kids = own});
}

uint32_t sc_alt(struct sc *c, const uint32_t *kids, uint32_t n)
{
    uint32_t *own = copy(c, kids, n * sizeof *own), m = 0;

    if (!own)
        return SC_NODE_NEVER;
    for (uint32_t i = 0; i < n; i++) {
        bool again = kids[i] == SC_NODE_NEVER;
        for (uint32_t k = 0; k < m && !again; k++)
            again =
                own[k] == kids[i] || (c->nodes[own[k]].kind == SC_REF && c->nodes[kids[i]].kind == SC_REF &&
                                      c->nodes[own[k]].n == c->nodes[kids[i]].n);
        if (!again)
            own[m++] = kids[i];
    }
    return m == 0   ? SC_NODE_NEVER
           : m == 1 ? own[0]
                    : add_node(c, (struct sc_node){.kind = SC_ALT, .n = m, .kids = own});
}

uint32_t sc_rule(struct sc *c, const char *hint, uint32_t body)
{
    if (c->n_rules >= IC_SCHEMA_RULES_MAX) {
        sc_fail(c, IC_TOO_LARGE, "the schema needs more than %d grammar rules", IC_SCHEMA_RULES_MAX);
        return 0;
    }
    if (c->n_rules == c->cap_rules) {
        uint32_t cap = c->cap_rules ? 2 * c->cap_rules : 64;
        struct sc_rule *p = sc_get(c, cap * sizeof *p);
        if (!p)
            return 0;
        if (c->n_rules)
            memcpy(p, c->rules, c->n_rules * sizeof *p);
        c->rules = p;
        c->cap_rules = cap;
    }
    c->rules[c->n_rules] = (struct sc_rule){.hint = hint, .body = body};
    return c->n_rules++;
}

uint32_t sc_ref(struct sc *c, uint32_t rule)
{
    return add_node(c, (struct sc_node){.kind = SC_REF, .n = rule});
}

static uint32_t rep_node(struct sc *c, uint32_t node, uint32_t min, uint32_t max)
{
    if (max == 0)
        return SC_NODE_EMPTY;
    if (min == 1 && max == 1)
        return node;
    return add_node(c, (struct sc_node){.kind = SC_REP, .n = node, .min = min, .max = max});
}

/* At most `max` of node, for a max that one {0,n} cannot hold: either a whole piece and then the
 * rest, or less than a piece. Two paths stay open for at most a piece. */
static uint32_t rep_up_to(struct sc *c, uint32_t node, uint32_t piece, uint32_t max)
{
    uint32_t node_opt = SC_NODE_EMPTY;

    /* from the shortest up, so that long ones do not recurse */
    for (uint32_t n = max % PIECE; n <= max; n += PIECE) {
        if (n <= PIECE)
            node_opt = rep_node(c, node, 0, n);
        else
            node_opt = SC_ALT(c, SC_SEQ(c, piece, node_opt), rep_node(c, node, 0, PIECE - 1));
        if (node_opt != SC_NODE_EMPTY)
            node_opt = sc_ref(c, sc_rule(c, "upto", node_opt));
    }
    return node_opt;
}

uint32_t sc_rep(struct sc *c, uint32_t node, uint32_t min, uint32_t max)
{
    if (min > max || (node == SC_NODE_NEVER && min))
        return SC_NODE_NEVER;
    if (node == SC_NODE_NEVER || node == SC_NODE_EMPTY || max == 0)
        return SC_NODE_EMPTY;
    enum sc_kind kind = c->nodes[node].kind;
    if (kind != SC_CLASS && kind != SC_REF && kind != SC_LIT)
        node = sc_ref(c, sc_rule(c, "part", node));
    if (min <= PIECE && (max <= PIECE || max == SC_INF))
        return rep_node(c, node, min, max);
    uint32_t piece = sc_ref(c, sc_rule(c, "piece", rep_node(c, node, PIECE, PIECE)));
    uint32_t tail = max == SC_INF        ? rep_node(c, node, 0, SC_INF)
                    : max - min <= PIECE ? rep_node(c, node, 0, max - min)
                                         : rep_up_to(c, node, piece, max - min);
    return SC_SEQ(c, rep_node(c, piece, min / PIECE, min / PIECE),
                  rep_node(c, node, min % PIECE, min % PIECE), tail);
}

/* ---- which rules can end ---- */

static bool productive(const struct sc *c, uint32_t id)
{
    const struct sc_node *n = &c->nodes[id];

    switch (n->kind) {
    case SC_NEVER: return false;
    case SC_REF: return c->rules[n->n].productive;
    case SC_REP: return n->min == 0 || productive(c, n->n);
    case SC_SEQ:
        for (uint32_t i = 0; i < n->n; i++)
            if (!productive(c, n->kids[i]))
                return false;
        return true;
    case SC_ALT:
        for (uint32_t i = 0; i < n->n; i++)
            if (productive(c, n->kids[i]))
                return true;
        return false;
    default: return true;
    }
}

/* Rules mostly refer to later ones, so going down converges in few rounds; up is for the others. */
static void mark_productive(struct sc *c)
{
    bool more = true;

    for (bool down = true; more && sc_work(c, 4 * c->n_rules); down = !down) {
        more = false;
        for (uint32_t k = 0; k < c->n_rules; k++) {
            struct sc_rule *r = &c->rules[down ? c->n_rules - 1 - k : k];
            if (!r->productive && productive(c, r->body))
                r->productive = more = true;
        }
    }
}

struct reach {
    uint32_t *list, n;
};

static void mark_reachable(struct sc *c, uint32_t id, struct reach *todo)
{
    const struct sc_node *n = &c->nodes[id];

    if (!productive(c, id))
        return;
    if (n->kind == SC_REF && !c->rules[n->n].reachable) {
        c->rules[n->n].reachable = true;
        todo->list[todo->n++] = n->n;
    } else if (n->kind == SC_REP) {
        mark_reachable(c, n->n, todo);
    } else if (n->kind == SC_SEQ || n->kind == SC_ALT) {
        for (uint32_t i = 0; i < n->n; i++)
            mark_reachable(c, n->kids[i], todo);
    }
}

/* ---- text ---- */

struct writer {
    struct sc *c;
    struct ic_buf *out;
    uint64_t elements; /* of llama.cpp's unrolled grammar, about */
};

/* A code point inside a literal or class. What means something to the GBNF parser goes as a number. */
static void put_char(struct ic_buf *out, uint32_t ch, bool in_class)
{
    bool plain = ch > 0x20 && ch < 0x7F && ch != '"' && ch != '\\';

    if (in_class)
        plain = (ch >= '0' && ch <= '9') || (ch >= 'a' && ch <= 'z') || (ch >= 'A' && ch <= 'Z');
    else
        plain = plain || ch == ' ';
    if (plain)
        ic_buf_printf(out, "%c", (int)ch);
    else if (!in_class && (ch == '"' || ch == '\\'))
        ic_buf_printf(out, "\\%c", (int)ch);
    else if (ch <= 0xFF)
        ic_buf_printf(out, "\\x%02X", ch);
    else if (ch <= 0xFFFF)
        ic_buf_printf(out, "\\u%04X", ch);
    else
        ic_buf_printf(out, "\\U%08X", ch);
}

uint32_t sc_next_char(const char **s, const char *end)
{
    unsigned char b = (unsigned char)*(*s)++;
    uint32_t more = b < 0xC0 ? 0 : b < 0xE0 ? 1 : b < 0xF0 ? 2 : 3;
    uint32_t ch = more ? b & (0x3Fu >> more) : b;

    for (; more && *s < end; more--)
        ch = ch << 6 | ((unsigned char)*(*s)++ & 0x3F);
    return ch;
}

static void put_rule_name(struct writer *w, uint32_t rule)
{
    ic_buf_printf(w->out, "%s-%u", w->c->rules[rule].hint, rule);
}

static void put_terminal(struct writer *w, const struct sc_node *n)
{
    if (n->kind == SC_LIT) {
        ic_buf_puts(w->out, "\"");
        for (const char *p = n->bytes, *end = p + n->n; p < end;)
            put_char(w->out, sc_next_char(&p, end), false);
        ic_buf_puts(w->out, "\"");
        w->elements += n->n;
        return;
    }
    ic_buf_puts(w->out, "[");
    for (uint32_t i = 0; i < n->n; i++) {
        put_char(w->out, n->ranges[i].lo, true);
        if (n->ranges[i].hi != n->ranges[i].lo) {
            ic_buf_puts(w->out, "-");
            put_char(w->out, n->ranges[i].hi, true);
        }
    }
    ic_buf_puts(w->out, "]");
    w->elements += 2 * n->n;
}

static void put_count(struct writer *w, const struct sc_node *n)
{
    if (n->max == SC_INF && n->min <= 1)
        ic_buf_puts(w->out, n->min ? "+" : "*");
    else if (n->max == SC_INF)
        ic_buf_printf(w->out, "{%u,}", n->min);
    else if (n->min == 0 && n->max == 1)
        ic_buf_puts(w->out, "?");
    else if (n->min == n->max)
        ic_buf_printf(w->out, "{%u}", n->min);
    else
        ic_buf_printf(w->out, "{%u,%u}", n->min, n->max);
    /* an optional repetition becomes a rule of its own, about five elements' worth */
    w->elements += n->max == SC_INF ? n->min + 5 : n->min + 5 * (uint64_t)(n->max - n->min);
}

static void put_node(struct writer *w, uint32_t id, bool inside_seq);

static void put_alt(struct writer *w, const struct sc_node *n, bool inside_seq)
{
    uint32_t live = 0;

    for (uint32_t i = 0; i < n->n; i++)
        live += productive(w->c, n->kids[i]);
    bool group = inside_seq && live > 1;
    if (group)
        ic_buf_puts(w->out, "(");
    for (uint32_t i = 0, k = 0; i < n->n; i++) {
        if (!productive(w->c, n->kids[i]))
            continue;
        if (k++)
            ic_buf_puts(w->out, " | ");
        put_node(w, n->kids[i], inside_seq && live == 1);
    }
    if (group)
        ic_buf_puts(w->out, ")");
    w->elements += 2 * live;
}

static void put_node(struct writer *w, uint32_t id, bool inside_seq)
{
    const struct sc_node *n = &w->c->nodes[id];

    switch (n->kind) {
    case SC_EMPTY:
    case SC_NEVER: ic_buf_puts(w->out, "\"\""); break;
    case SC_LIT:
    case SC_CLASS: put_terminal(w, n); break;
    case SC_REF:
        put_rule_name(w, n->n);
        w->elements++;
        break;
    case SC_REP:
        if (!productive(w->c, n->n)) {
            ic_buf_puts(w->out, "\"\"");
            break;
        }
        put_node(w, n->n, true);
        put_count(w, n);
        break;
    case SC_SEQ:
        for (uint32_t i = 0; i < n->n; i++) {
            if (i)
                ic_buf_puts(w->out, " ");
            put_node(w, n->kids[i], true);
        }
        break;
    case SC_ALT: put_alt(w, n, inside_seq); break;
    }
}

void sc_emit(struct sc *c, uint32_t root, struct ic_buf *out)
{
    if (c->st)
        return;
    struct reach todo = {.list = sc_get(c, (c->n_rules + 1) * sizeof(uint32_t))};
    struct writer w = {.c = c, .out = out};

    mark_productive(c);
    if (c->st || !todo.list)
        return;
    if (!productive(c, root)) {
        sc_fail(c, IC_BAD_REQUEST, "no finite value satisfies the schema");
        return;
    }
    mark_reachable(c, root, &todo);
    for (uint32_t i = 0; i < todo.n; i++)
        mark_reachable(c, c->rules[todo.list[i]].body, &todo);

    ic_buf_puts(out, "root ::= ");
    put_node(&w, root, false);
    ic_buf_puts(out, "\n");
    for (uint32_t r = 0; r < c->n_rules && !out->failed; r++) {
        if (!c->rules[r].reachable)
            continue;
        put_rule_name(&w, r);
        ic_buf_puts(out, " ::= ");
        put_node(&w, c->rules[r].body, false);
        ic_buf_puts(out, "\n");
        w.elements += 2;
    }
    ic_buf_put(out, "", 1);
    if (out->failed)
        sc_fail(c, IC_TOO_LARGE, "the grammar is longer than %d KiB", IC_SCHEMA_OUTPUT_MAX >> 10);
    else if (w.elements > IC_SCHEMA_ELEMENTS_MAX)
        sc_fail(c, IC_TOO_LARGE, "the repetitions (maxLength, maxItems, …) add up to more than %d elements",
                IC_SCHEMA_ELEMENTS_MAX);
    else
        out->len--;
}
