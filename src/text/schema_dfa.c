/* String automata: combining them, and writing one down as grammar rules.
 *
 * One rule a state, each alternative a class of characters and then the next state's rule. Being
 * deterministic it keeps the grammar engine at one path whatever the pattern was, and being
 * right-linear it never grows the engine's stacks. */
#include <stdlib.h>
#include <string.h>

#include "text/schema_int.h"

#define LAST_CHAR 0x10FFFFu

void sc_dfa_trim(struct sc *c, struct sc_dfa *d)
{
    bool *live = sc_get(c, d->n + 1), changed = true;

    if (!live)
        return;
    while (changed && sc_work(c, 2 * d->n)) {
        changed = false;
        for (uint32_t i = d->n; i > 0; i--) {
            const struct sc_state *s = &d->states[i - 1];
            bool ok = live[i - 1] || s->accept;
            for (uint32_t k = 0; k < s->n && !ok; k++)
                ok = live[s->edges[k].to];
            if (ok && !live[i - 1])
                live[i - 1] = changed = true;
        }
    }
    for (uint32_t i = 0; i < d->n; i++) {
        struct sc_state *s = &d->states[i];
        uint32_t m = 0;
        for (uint32_t k = 0; k < s->n; k++)
            if (live[s->edges[k].to])
                s->edges[m++] = s->edges[k];
        s->n = m;
    }
    if (d->n && !live[0])
        d->n = 0;
}

/* ---- intersection ---- */

struct pairs {
    struct sc *c;
    const json_t *where;
    uint64_t *list; /* a's state << 32 | b's */
    uint32_t n, *hash;
};
#define PAIRS_HASH 8192u

static uint32_t pair_number(struct pairs *p, uint32_t a, uint32_t b)
{
    uint64_t key = (uint64_t)a << 32 | b;
    uint32_t slot = (uint32_t)(key * 0x9E3779B97F4A7C15u >> 40) & (PAIRS_HASH - 1);

    for (; p->hash[slot]; slot = (slot + 1) & (PAIRS_HASH - 1))
        if (p->list[p->hash[slot] - 1] == key)
            return p->hash[slot] - 1;
    if (p->n >= IC_SCHEMA_STATES_MAX) {
        sc_fail_at(p->c, IC_TOO_LARGE, p->where,
                   "\"pattern\", \"format\" and lengths together need more than %d states",
                   IC_SCHEMA_STATES_MAX);
        return 0;
    }
    p->list[p->n] = key;
    p->hash[slot] = ++p->n;
    return p->n - 1;
}

static void pair_edges(struct pairs *p, const struct sc_state *a, const struct sc_state *b,
                       struct sc_state *out)
{
    out->edges = sc_get(p->c, (a->n + b->n + 1) * sizeof *out->edges);
    if (!out->edges || !sc_work(p->c, a->n + b->n))
        return;
    for (uint32_t i = 0, k = 0; i < a->n && k < b->n;) {
        const struct sc_edge *x = &a->edges[i], *y = &b->edges[k];
        uint32_t lo = x->lo > y->lo ? x->lo : y->lo, hi = x->hi < y->hi ? x->hi : y->hi;
        if (lo <= hi)
            out->edges[out->n++] = (struct sc_edge){lo, hi, pair_number(p, x->to, y->to)};
        if (x->hi <= y->hi)
            i++;
        else
            k++;
    }
    out->accept = a->accept && b->accept;
}

static void intersect(struct sc *c, const struct sc_dfa *a, const struct sc_dfa *b, const json_t *where,
                      struct sc_dfa *out)
{
    struct pairs p = {.c = c, .where = where};

    p.list = sc_get(c, IC_SCHEMA_STATES_MAX * sizeof *p.list);
    p.hash = sc_get(c, PAIRS_HASH * sizeof *p.hash);
    out->states = sc_get(c, IC_SCHEMA_STATES_MAX * sizeof *out->states);
    if (c->st || !a->n || !b->n)
        return;
    pair_number(&p, 0, 0);
    for (uint32_t i = 0; i < p.n && !c->st; i++)
        pair_edges(&p, &a->states[p.list[i] >> 32], &b->states[p.list[i] & UINT32_MAX], &out->states[i]);
    out->n = p.n;
    sc_dfa_trim(c, out);
}

bool sc_dfa_both(struct sc *c, const struct sc_dfa *a, const struct sc_dfa *b, const json_t *where,
                 struct sc_dfa *out)
{
    struct sc_scratch old = sc_scratch_begin(c);
    struct sc_dfa made = {0};

    intersect(c, a, b, where, &made);
    return sc_scratch_keep(c, old, &made, out);
}

bool sc_dfa_length(struct sc *c, uint32_t min, uint32_t max, const json_t *where, struct sc_dfa *out)
{
    uint32_t n = (max == SC_INF ? min : max) + 1;

    *out = (struct sc_dfa){0};
    if (n > IC_SCHEMA_STATES_MAX) {
        sc_fail_at(c, IC_TOO_LARGE, where,
                   "minLength or maxLength above %d beside \"pattern\" or \"format\"",
                   IC_SCHEMA_STATES_MAX - 1);
        return false;
    }
    out->states = sc_get(c, n * sizeof *out->states);
    struct sc_edge *edges = sc_get(c, n * sizeof *edges);
    if (!out->states || !edges)
        return false;
    out->n = n;
    for (uint32_t i = 0; i < n; i++) {
        bool last = i + 1 == n;
        edges[i] = (struct sc_edge){0, LAST_CHAR, last ? i : i + 1};
        out->states[i] =
            (struct sc_state){.edges = &edges[i], .n = last && max != SC_INF ? 0 : 1, .accept = i >= min};
    }
    return true;
}

/* ---- every object name but the declared ones ---- */

struct keys {
    struct sc *c;
    struct sc_dfa *d;
    uint32_t cap;
};

static uint32_t key_state(struct keys *k)
{
    if (k->d->n == k->cap) {
        uint32_t cap = k->cap ? 2 * k->cap : 64;
        struct sc_state *s = sc_get(k->c, cap * sizeof *s);
        if (!s)
            return 0;
        if (k->cap)
            memcpy(s, k->d->states, k->d->n * sizeof *s);
        k->d->states = s;
        k->cap = cap;
    }
    k->d->states[k->d->n] = (struct sc_state){.accept = true};
    return k->d->n++;
}

/* The state after `ch`, added in order if there is none. */
static uint32_t key_step(struct keys *k, uint32_t from, uint32_t ch)
{
    struct sc_state *s = &k->d->states[from];
    uint32_t at = 0;

    while (at < s->n && s->edges[at].lo < ch)
        at++;
    if (at < s->n && s->edges[at].lo == ch)
        return s->edges[at].to;
    uint32_t to = key_state(k);
    struct sc_edge *edges = sc_get(k->c, (k->d->states[from].n + 1) * sizeof *edges);
    if (k->c->st || !edges || !sc_work(k->c, k->d->states[from].n + 1))
        return 0;
    s = &k->d->states[from];
    if (at)
        memcpy(edges, s->edges, at * sizeof *edges);
    edges[at] = (struct sc_edge){ch, ch, to};
    if (s->n > at)
        memcpy(edges + at + 1, s->edges + at, (s->n - at) * sizeof *edges);
    s->edges = edges;
    s->n++;
    return to;
}

/* Every character without an edge leads to `other`, from where anything goes. */
static void fill_gaps(struct keys *k, uint32_t state, uint32_t other)
{
    struct sc_state *s = &k->d->states[state];
    struct sc_edge *edges = sc_get(k->c, (2 * s->n + 1) * sizeof *edges);
    uint32_t n = 0, at = 0;

    if (!edges)
        return;
    for (uint32_t i = 0; i <= s->n; i++) {
        uint32_t lo = i < s->n ? s->edges[i].lo : LAST_CHAR + 1;
        if (lo > at)
            edges[n++] = (struct sc_edge){at, lo - 1, other};
        if (i < s->n) {
            edges[n++] = s->edges[i];
            at = s->edges[i].hi + 1;
        }
    }
    s->edges = edges;
    s->n = n;
}

bool sc_dfa_other_keys(struct sc *c, const char *const *keys, uint32_t n, struct sc_dfa *out)
{
    struct keys k = {.c = c, .d = out};

    *out = (struct sc_dfa){0};
    key_state(&k);
    for (uint32_t i = 0; i < n && !c->st; i++) {
        uint32_t at = 0;
        for (const char *p = keys[i], *end = p + strlen(p); p < end && !c->st;)
            at = key_step(&k, at, sc_next_char(&p, end));
        if (!c->st)
            out->states[at].accept = false;
    }
    uint32_t named = out->n, other = key_state(&k);
    for (uint32_t i = 0; i <= named && !c->st; i++)
        fill_gaps(&k, i, other);
    return !c->st;
}

bool sc_dfa_match(const struct sc_dfa *d, const char *s, size_t len)
{
    uint32_t at = 0;

    if (!d->n)
        return false;
    for (const char *end = s + len; s < end;) {
        uint32_t ch = sc_next_char(&s, end), k = 0;
        const struct sc_state *st = &d->states[at];
        while (k < st->n && st->edges[k].hi < ch)
            k++;
        if (k == st->n || st->edges[k].lo > ch)
            return false;
        at = st->edges[k].to;
    }
    return d->states[at].accept;
}

/* ---- as grammar ---- */

/* How JSON writes the characters of a class that leads to one state. */
struct spelled {
    struct sc_range *raw;
    uint32_t n;
    struct sc_range letters[8]; /* after a backslash */
    uint32_t n_letters;
    struct sc_range low[32], high[32]; /* last digit of \u000x and \u001x */
    uint32_t n_low, n_high;
};

static void spell_char(struct spelled *s, uint32_t ch)
{
    static const char special[] = "\"\\\b\f\n\r\t", letter[] = "\"\\bfnrt";
    static const char hex[] = "0123456789abcdef";
    const char *p = ch ? strchr(special, (int)ch) : NULL;

    if (p) {
        uint32_t l = (uint32_t)letter[p - special];
        s->letters[s->n_letters++] = (struct sc_range){l, l};
    } else {
        uint32_t d = (uint32_t)hex[ch & 15];
        struct sc_range r = {d, d};
        if (ch < 16)
            s->low[s->n_low++] = r;
        else
            s->high[s->n_high++] = r;
    }
}

static void spell_raw(struct spelled *s, uint32_t lo, uint32_t hi)
{
    if (lo > hi)
        return;
    if (s->n && s->raw[s->n - 1].hi + 1 == lo)
        s->raw[s->n - 1].hi = hi;
    else
        s->raw[s->n++] = (struct sc_range){lo, hi};
}

/* The pieces of [lo, hi] that stand for themselves lie between these. */
static void spell_range(struct spelled *s, uint32_t lo, uint32_t hi)
{
    static const struct sc_range plain[] = {{0x20, '!'}, {'#', '['}, {']', 0xD7FF}, {0xE000, LAST_CHAR}};

    for (uint32_t ch = lo; ch <= hi && ch <= '\\'; ch++)
        if (ch < 0x20 || ch == '"' || ch == '\\')
            spell_char(s, ch);
    for (size_t i = 0; i < 4; i++)
        spell_raw(s, lo > plain[i].lo ? lo : plain[i].lo, hi < plain[i].hi ? hi : plain[i].hi);
}

static uint32_t spelled_node(struct sc *c, const struct spelled *s)
{
    uint32_t low = SC_SEQ(c, sc_lits(c, "u000"), sc_class(c, s->low, s->n_low));
    uint32_t high = SC_SEQ(c, sc_lits(c, "u001"), sc_class(c, s->high, s->n_high));
    uint32_t escapes = SC_ALT(c, sc_class(c, s->letters, s->n_letters), low, high);

    return SC_ALT(c, sc_class(c, s->raw, s->n), SC_SEQ(c, sc_lits(c, "\\"), escapes));
}

/* The alternatives of one state: for each target the characters that lead there. */
static uint32_t state_node(struct sc *c, const struct sc_state *s, const uint32_t *rules)
{
    uint32_t *alts = sc_get(c, (s->n + 1) * sizeof *alts), n = 0;
    bool *done = sc_get(c, s->n + 1);
    struct spelled sp = {.raw = sc_get(c, (4 * s->n + 1) * sizeof *sp.raw)};

    if (!alts || !done || !sp.raw)
        return SC_NODE_NEVER;
    for (uint32_t i = 0; i < s->n; i++) {
        if (done[i])
            continue;
        sp.n = sp.n_letters = sp.n_low = sp.n_high = 0;
        for (uint32_t k = i; k < s->n; k++)
            if (s->edges[k].to == s->edges[i].to) {
                done[k] = true;
                spell_range(&sp, s->edges[k].lo, s->edges[k].hi);
            }
        alts[n++] = SC_SEQ(c, spelled_node(c, &sp), sc_ref(c, rules[s->edges[i].to]));
    }
    if (s->accept)
        alts[n++] = sc_lits(c, "\"");
    return sc_alt(c, alts, n);
}

uint32_t sc_dfa_body(struct sc *c, const struct sc_dfa *d)
{
    uint32_t *rules = sc_get(c, (d->n + 1) * sizeof *rules);

    if (!d->n || !rules)
        return SC_NODE_NEVER;
    for (uint32_t i = 0; i < d->n && !c->st; i++)
        rules[i] = sc_rule(c, "s", SC_NODE_NEVER);
    for (uint32_t i = 0; i < d->n && !c->st; i++) {
        uint32_t body = state_node(c, &d->states[i], rules);
        if (!c->st)
            c->rules[rules[i]].body = body;
    }
    return c->st ? SC_NODE_NEVER : sc_ref(c, rules[0]);
}
