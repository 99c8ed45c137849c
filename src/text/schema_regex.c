/* ECMA-262 patterns → deterministic automata.
 *
 * Three steps: the pattern becomes a tree; the tree becomes a nondeterministic automaton, built back
 * to front so that each piece knows what follows it; sets of its states become the states of the
 * deterministic one. An unanchored pattern gets a loop over any character before and after, and the
 * anchors are edges that only count at the first position or at the end, so "^a|b$" and "(^|,)a"
 * need no special case. */
#include <stdio.h>
#include <string.h>

#include "text/schema_int.h"

#define GROUPS_MAX 50
#define COUNT_MAX 1000u
#define NFA_MAX 4096u
#define ESCAPES_MAX 64 /* ranges of one class before sorting */

/* ---- sets of characters ---- */

struct set {
    struct sc_range r[2 * ESCAPES_MAX];
    uint32_t n;
};

static const struct sc_range any_char[] = {{0, 0xD7FF}, {0xE000, 0x10FFFF}};
static const struct sc_range digit_set[] = {{'0', '9'}};
static const struct sc_range word_set[] = {{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}};
static const struct sc_range space_set[] = {
    {9, 13},          {' ', ' '},       {0xA0, 0xA0},     {0x1680, 0x1680}, {0x2000, 0x200A},
    {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F}, {0x3000, 0x3000}, {0xFEFF, 0xFEFF}};
static const struct sc_range line_ends[] = {{'\n', '\n'}, {'\r', '\r'}, {0x2028, 0x2029}};

enum rkind { R_EMPTY, R_SET, R_CAT, R_ALT, R_REP, R_BEG, R_END };

struct rx {
    enum rkind kind;
    uint32_t min, max; /* R_REP */
    uint32_t n;
    const struct sc_range *ranges; /* R_SET */
    struct rx **kids;              /* R_CAT, R_ALT; R_REP: one */
};

struct reader {
    struct sc *c;
    const json_t *where;
    const uint32_t *s; /* code points, then a 0 past the end */
    uint32_t n, at, depth;
};

static bool bad(struct reader *r, const char *what)
{
    sc_fail_at(r->c, IC_BAD_REQUEST, r->where, "\"pattern\": %s at character %u", what, r->at + 1);
    return false;
}

static bool more(const struct reader *r)
{
    return r->at < r->n;
}

static bool take(struct reader *r, uint32_t ch)
{
    if (!more(r) || r->s[r->at] != ch)
        return false;
    r->at++;
    return true;
}

static bool add_range(struct reader *r, struct set *set, uint32_t lo, uint32_t hi)
{
    if (set->n == sizeof set->r / sizeof *set->r)
        return bad(r, "a class with more than 128 ranges is not supported");
    set->r[set->n++] = (struct sc_range){lo, hi};
    return true;
}

static bool add_ranges(struct reader *r, struct set *set, const struct sc_range *from, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!add_range(r, set, from[i].lo, from[i].hi))
            return false;
    return true;
}

static void sort_set(struct set *set)
{
    uint32_t m = 0;

    for (uint32_t i = 1; i < set->n; i++)
        for (uint32_t k = i; k && set->r[k].lo < set->r[k - 1].lo; k--) {
            struct sc_range t = set->r[k];
            set->r[k] = set->r[k - 1];
            set->r[k - 1] = t;
        }
    for (uint32_t i = 0; i < set->n; i++)
        if (m && set->r[i].lo <= set->r[m - 1].hi + 1)
            set->r[m - 1].hi = set->r[i].hi > set->r[m - 1].hi ? set->r[i].hi : set->r[m - 1].hi;
        else
            set->r[m++] = set->r[i];
    set->n = m;
}

/* Everything but the set, of the characters that UTF-8 has. */
static bool add_others(struct reader *r, struct set *out, const struct sc_range *from, size_t n)
{
    for (int half = 0; half < 2; half++) {
        uint32_t at = any_char[half].lo, end = any_char[half].hi;
        for (size_t i = 0; i < n && at <= end; i++) {
            if (from[i].hi < at)
                continue;
            if (from[i].lo > at && !add_range(r, out, at, from[i].lo - 1 < end ? from[i].lo - 1 : end))
                return false;
            at = from[i].hi + 1;
        }
        if (at <= end && !add_range(r, out, at, end))
            return false;
    }
    return true;
}

static struct rx *new_rx(struct reader *r, enum rkind kind)
{
    struct rx *x = sc_get(r->c, sizeof *x);
    if (x)
        x->kind = kind;
    return x;
}

static struct rx *set_rx(struct reader *r, struct set *set)
{
    struct rx *x = new_rx(r, R_SET);

    sort_set(set);
    struct sc_range *own = sc_get(r->c, (set->n + 1) * sizeof *own);
    if (!x || !own)
        return NULL;
    memcpy(own, set->r, set->n * sizeof *own);
    x->ranges = own;
    x->n = set->n;
    return x;
}

/* ---- reading ---- */

static int hex_value(uint32_t ch)
{
    return ch >= '0' && ch <= '9'   ? (int)(ch - '0')
           : ch >= 'a' && ch <= 'f' ? (int)(ch - 'a' + 10)
           : ch >= 'A' && ch <= 'F' ? (int)(ch - 'A' + 10)
                                    : -1;
}

static bool read_hex(struct reader *r, int n, uint32_t *out)
{
    for (*out = 0; n; n--, r->at++) {
        int v = more(r) ? hex_value(r->s[r->at]) : -1;
        if (v < 0)
            return bad(r, "bad hexadecimal escape");
        *out = *out << 4 | (uint32_t)v;
    }
    return true;
}

static bool read_unicode(struct reader *r, uint32_t *out)
{
    uint32_t low;

    if (take(r, '{')) {
        for (*out = 0; more(r) && hex_value(r->s[r->at]) >= 0 && *out <= 0x10FFFF; r->at++)
            *out = *out << 4 | (uint32_t)hex_value(r->s[r->at]);
        if (*out > 0x10FFFF || !take(r, '}'))
            return bad(r, "bad \\u{…} escape");
    } else {
        if (!read_hex(r, 4, out))
            return false;
        if (*out >= 0xD800 && *out < 0xDC00 && take(r, '\\')) {
            if (!take(r, 'u') || !read_hex(r, 4, &low) || low < 0xDC00 || low > 0xDFFF)
                return bad(r, "half of a surrogate pair");
            *out = 0x10000 + ((*out - 0xD800) << 10) + (low - 0xDC00);
        }
    }
    if (*out >= 0xD800 && *out <= 0xDFFF)
        return bad(r, "half of a surrogate pair");
    return true;
}

/* \d and its like go into the set whole (*single false); any other escape is one character. */
static bool read_escape(struct reader *r, struct set *set, bool in_class, uint32_t *ch, bool *single)
{
    if (!more(r))
        return bad(r, "a lone \\");
    uint32_t e = r->s[r->at++];
    *single = false;
    switch (e) {
    case 'd': return add_ranges(r, set, digit_set, 1);
    case 'w': return add_ranges(r, set, word_set, 4);
    case 's': return add_ranges(r, set, space_set, 10);
    case 'D': return add_others(r, set, digit_set, 1);
    case 'W': return add_others(r, set, word_set, 4);
    case 'S': return add_others(r, set, space_set, 10);
    default: break;
    }
    *single = true;
    *ch = e;
    if (e == 'x')
        return read_hex(r, 2, ch);
    if (e == 'u')
        return read_unicode(r, ch);
    if (e == '0' && !(more(r) && r->s[r->at] >= '0' && r->s[r->at] <= '9')) {
        *ch = 0;
        return true;
    }
    static const char letters[] = "tnrfv", values[] = "\t\n\r\f\v";
    const char *p = e < 0x80 && e ? strchr(letters, (int)e) : NULL;
    if (p)
        *ch = (uint32_t)values[p - letters];
    else if (e == 'b' && in_class)
        *ch = 8;
    else if ((e >= '0' && e <= '9') || e == 'k')
        return bad(r, "back references are not supported,");
    else if (e == 'b' || e == 'B')
        return bad(r, "\\b and \\B are not supported,");
    else if (e == 'p' || e == 'P')
        return bad(r, "\\p{…} is not supported,");
    else if ((e >= 'a' && e <= 'z') || (e >= 'A' && e <= 'Z') || e >= 0x80)
        return bad(r, "unknown escape");
    return true;
}

static bool read_class_item(struct reader *r, struct set *set, uint32_t *ch, bool *single)
{
    if (take(r, '\\'))
        return read_escape(r, set, true, ch, single);
    *ch = r->s[r->at++];
    *single = true;
    return true;
}

static struct rx *read_class(struct reader *r)
{
    struct set set = {.n = 0}, others = {.n = 0};
    bool invert = take(r, '^'), single, single2;
    uint32_t lo, hi;

    while (!take(r, ']')) {
        if (!more(r)) {
            bad(r, "a class without ]");
            return NULL;
        }
        if (!read_class_item(r, &set, &lo, &single))
            return NULL;
        hi = lo;
        if (more(r) && r->s[r->at] == '-' && r->at + 1 < r->n && r->s[r->at + 1] != ']') {
            r->at++;
            if (!read_class_item(r, &set, &hi, &single2))
                return NULL;
            if (!single || !single2 || hi < lo) {
                bad(r, "a range with a class as its end, or out of order,");
                return NULL;
            }
        }
        if (single && !add_range(r, &set, lo, hi))
            return NULL;
    }
    if (!invert)
        return set_rx(r, &set);
    sort_set(&set);
    return add_others(r, &others, set.r, set.n) ? set_rx(r, &others) : NULL;
}

static struct rx *read_choice(struct reader *r);

static struct rx *read_group(struct reader *r)
{
    struct rx *x = NULL;

    if (take(r, '?')) {
        if (take(r, '=') || take(r, '!')) {
            bad(r, "lookahead is not supported,");
            return NULL;
        }
        if (take(r, '<')) {
            if (take(r, '=') || take(r, '!')) {
                bad(r, "lookbehind is not supported,");
                return NULL;
            }
            while (more(r) && r->s[r->at] != '>')
                r->at++;
            r->at += more(r);
        } else if (!take(r, ':')) {
            bad(r, "(?…) of this kind is not supported,");
            return NULL;
        }
    }
    if (++r->depth > GROUPS_MAX)
        bad(r, "groups nested more than 50 deep,");
    else
        x = read_choice(r);
    r->depth--;
    if (x && !take(r, ')')) {
        bad(r, "a group without )");
        return NULL;
    }
    return x;
}

static struct rx *read_atom(struct reader *r)
{
    struct set set = {.n = 0};
    uint32_t ch = r->s[r->at++];
    bool single = true;

    switch (ch) {
    case '^': return new_rx(r, R_BEG);
    case '$': return new_rx(r, R_END);
    case '(': return read_group(r);
    case '[': return read_class(r);
    case '.': return add_others(r, &set, line_ends, 3) ? set_rx(r, &set) : NULL;
    case '*':
    case '+':
    case '?': bad(r, "nothing to repeat"); return NULL;
    case '{':
    case '}':
    case ']': bad(r, "{, } and ] must be escaped,"); return NULL;
    case '\\':
        if (!read_escape(r, &set, false, &ch, &single))
            return NULL;
        break;
    default: break;
    }
    return !single || add_range(r, &set, ch, ch) ? set_rx(r, &set) : NULL;
}

static bool read_number(struct reader *r, uint32_t *out)
{
    uint32_t from = r->at;

    for (*out = 0; more(r) && r->s[r->at] >= '0' && r->s[r->at] <= '9'; r->at++)
        if (*out <= COUNT_MAX)
            *out = *out * 10 + (r->s[r->at] - '0');
    if (r->at == from)
        return bad(r, "a number is missing in {…}");
    if (*out > COUNT_MAX) {
        sc_fail_at(r->c, IC_TOO_LARGE, r->where, "\"pattern\": a repetition of more than %u", COUNT_MAX);
        return false;
    }
    return true;
}

/* False after an error; *found says whether there was a quantifier. */
static bool read_quantifier(struct reader *r, uint32_t *min, uint32_t *max, bool *found)
{
    *found = true;
    *min = 0;
    *max = SC_INF;
    if (take(r, '+')) {
        *min = 1;
    } else if (take(r, '?')) {
        *max = 1;
    } else if (take(r, '{')) {
        if (!read_number(r, min))
            return false;
        *max = *min;
        if (take(r, ',')) {
            *max = SC_INF;
            if (more(r) && r->s[r->at] != '}' && !read_number(r, max))
                return false;
        }
        if (!take(r, '}') || *min > *max)
            return bad(r, "bad {…}");
    } else if (!take(r, '*')) {
        *found = false;
        return true;
    }
    take(r, '?'); /* lazy: the same strings match */
    return true;
}

/* A growing list of parts that becomes one R_CAT or R_ALT. */
struct parts {
    struct rx **list;
    uint32_t n, cap;
};

static bool add_part(struct reader *r, struct parts *p, struct rx *x)
{
    if (!x)
        return false;
    if (p->n == p->cap) {
        uint32_t cap = p->cap ? 2 * p->cap : 8;
        struct rx **list = sc_get(r->c, cap * sizeof(struct rx *));
        if (!list)
            return false;
        if (p->n)
            memcpy(list, p->list, p->n * sizeof(struct rx *));
        p->list = list;
        p->cap = cap;
    }
    p->list[p->n++] = x;
    return true;
}

static struct rx *join_parts(struct reader *r, struct parts *p, enum rkind kind)
{
    if (p->n == 1)
        return p->list[0];
    struct rx *x = new_rx(r, p->n ? kind : R_EMPTY);
    if (x) {
        x->kids = p->list;
        x->n = p->n;
    }
    return x;
}

static struct rx *read_repeated(struct reader *r)
{
    uint32_t min, max;
    bool found;
    struct rx *x = read_atom(r);

    if (!x || !read_quantifier(r, &min, &max, &found))
        return NULL;
    if (!found)
        return x;
    if (x->kind == R_BEG || x->kind == R_END) {
        bad(r, "nothing to repeat");
        return NULL;
    }
    struct rx *rep = new_rx(r, R_REP);
    if (!rep || !(rep->kids = sc_get(r->c, sizeof(struct rx *))))
        return NULL;
    rep->kids[0] = x;
    rep->min = min;
    rep->max = max;
    return rep;
}

static struct rx *read_choice(struct reader *r)
{
    struct parts alts = {0};

    do {
        struct parts cat = {0};
        while (more(r) && r->s[r->at] != '|' && r->s[r->at] != ')')
            if (!add_part(r, &cat, read_repeated(r)))
                return NULL;
        if (!add_part(r, &alts, join_parts(r, &cat, R_CAT)))
            return NULL;
    } while (take(r, '|'));
    return join_parts(r, &alts, R_ALT);
}

/* ---- nondeterministic automaton ---- */

struct nstate {
    enum rkind kind; /* R_SET, R_BEG, R_END; R_ALT: both next; R_EMPTY: the end */
    uint32_t next, next2;
    const struct sc_range *ranges;
    uint32_t n;
    bool alive; /* can still match when the first position is past */
};

struct nfa {
    struct sc *c;
    const json_t *where;
    struct nstate *s;
    uint32_t n;
};

static uint32_t add_state(struct nfa *a, struct nstate s)
{
    if (a->n >= NFA_MAX) {
        sc_fail_at(a->c, IC_TOO_LARGE, a->where, "\"pattern\" is too large");
        return 0;
    }
    a->s[a->n] = s;
    return a->n++;
}

/* Adds what matches x and goes on to `next`; returns where it begins. */
static uint32_t add_rx(struct nfa *a, const struct rx *x, uint32_t next)
{
    uint32_t at = next;

    if (a->c->st || !sc_work(a->c, 1))
        return 0;
    switch (x->kind) {
    case R_EMPTY: return next;
    case R_SET:
        return add_state(a, (struct nstate){.kind = R_SET, .next = next, .ranges = x->ranges, .n = x->n});
    case R_BEG:
    case R_END: return add_state(a, (struct nstate){.kind = x->kind, .next = next});
    case R_CAT:
        for (uint32_t i = x->n; i > 0; i--)
            at = add_rx(a, x->kids[i - 1], at);
        return at;
    case R_ALT:
        at = add_rx(a, x->kids[x->n - 1], next);
        for (uint32_t i = x->n - 1; i > 0; i--)
            at = add_state(
                a, (struct nstate){.kind = R_ALT, .next = add_rx(a, x->kids[i - 1], next), .next2 = at});
        return at;
    case R_REP:
        if (x->max == SC_INF) {
            at = add_state(a, (struct nstate){.kind = R_ALT, .next2 = next});
            uint32_t body = add_rx(a, x->kids[0], at);
            a->s[at].next = body;
        } else {
            for (uint32_t i = x->min; i < x->max && !a->c->st; i++)
                at = add_state(
                    a, (struct nstate){.kind = R_ALT, .next = add_rx(a, x->kids[0], at), .next2 = next});
        }
        for (uint32_t i = 0; i < x->min && !a->c->st; i++)
            at = add_rx(a, x->kids[0], at);
        return at;
    }
    return at;
}

static void mark_alive(struct nfa *a)
{
    bool changed = true;

    while (changed && sc_work(a->c, a->n)) {
        changed = false;
        for (uint32_t i = 0; i < a->n; i++) {
            struct nstate *s = &a->s[i];
            bool alive = s->kind == R_EMPTY || (s->kind == R_SET && s->n && a->s[s->next].alive) ||
                         (s->kind == R_END && a->s[s->next].alive) ||
                         (s->kind == R_ALT && (a->s[s->next].alive || a->s[s->next2].alive));
            if (alive && !s->alive)
                s->alive = changed = true;
        }
    }
}

/* ---- sets of states ---- */

struct subset {
    struct nfa *a;
    uint32_t words; /* of a bit set of states */
    uint64_t **sets;
    uint32_t n;
    uint32_t *hash; /* index + 1 */
    uint32_t *stack, *members;
    uint32_t end; /* the state that matches everything from there on */
};
#define HASH_SIZE 8192u /* > 2 * IC_SCHEMA_STATES_MAX, a power of two */

/* Adds state `i` and all it reaches without a character. `first`: at the first position; `last`: at
 * the end of the string. */
static void close_over(struct subset *b, uint64_t *set, uint32_t i, bool first, bool last)
{
    uint32_t n = 0, steps = 1;
    struct nfa *a = b->a;

    b->stack[n++] = i;
    for (; n; steps++) {
        i = b->stack[--n];
        if ((!first && !a->s[i].alive) || (set[i / 64] >> (i % 64) & 1))
            continue;
        set[i / 64] |= (uint64_t)1 << (i % 64);
        const struct nstate *s = &a->s[i];
        if (s->kind == R_ALT) {
            b->stack[n++] = s->next2;
            b->stack[n++] = s->next;
        } else if ((s->kind == R_BEG && first) || (s->kind == R_END && last)) {
            b->stack[n++] = s->next;
        }
    }
    sc_work(a->c, steps);
}

static bool has(const uint64_t *set, uint32_t i)
{
    return set[i / 64] >> (i % 64) & 1;
}

static bool accepts(struct subset *b, const uint64_t *set, uint64_t *scratch, bool first)
{
    memset(scratch, 0, b->words * sizeof *scratch);
    for (uint32_t i = 0; i < b->a->n; i++)
        if (has(set, i) && !has(scratch, i))
            close_over(b, scratch, i, first, true);
    return has(scratch, b->end);
}

/* The number of a set, adding it if it is new; UINT32_MAX for the empty one or after an error. */
static uint32_t number_of(struct subset *b, uint64_t *set)
{
    uint64_t h = 7, any = 0;
    bool end = has(set, b->end);

    if (end) { /* everything follows: all such sets are one */
        memset(set, 0, b->words * sizeof *set);
        set[b->end / 64] |= (uint64_t)1 << (b->end % 64);
    }
    for (uint32_t w = 0; w < b->words; w++) {
        h = (h ^ set[w]) * 0x9E3779B97F4A7C15u;
        h ^= h >> 29;
        any |= set[w];
    }
    if (!any)
        return UINT32_MAX;
    uint32_t slot = (uint32_t)h & (HASH_SIZE - 1);
    for (; b->hash[slot]; slot = (slot + 1) & (HASH_SIZE - 1))
        if (!memcmp(b->sets[b->hash[slot] - 1], set, b->words * sizeof *set))
            return b->hash[slot] - 1;
    if (b->n >= IC_SCHEMA_STATES_MAX) {
        sc_fail_at(b->a->c, IC_TOO_LARGE, b->a->where, "\"pattern\" needs more than %d states",
                   IC_SCHEMA_STATES_MAX);
        return UINT32_MAX;
    }
    uint64_t *own = sc_get(b->a->c, b->words * sizeof *own);
    if (!own)
        return UINT32_MAX;
    memcpy(own, set, b->words * sizeof *own);
    b->sets[b->n] = own;
    b->hash[slot] = ++b->n;
    return b->n - 1;
}

static uint32_t cut_points(const struct nfa *a, uint32_t *cuts, uint32_t cap)
{
    uint32_t n = 0;

    cuts[n++] = 0;
    cuts[n++] = 0x110000;
    for (uint32_t i = 0; i < a->n; i++)
        for (uint32_t k = 0; k < a->s[i].n; k++)
            for (int side = 0; side < 2; side++) {
                uint32_t v = side ? a->s[i].ranges[k].hi + 1 : a->s[i].ranges[k].lo, at = n;
                while (at > 0 && cuts[at - 1] > v)
                    at--;
                if (at > 0 && cuts[at - 1] == v)
                    continue;
                if (n == cap)
                    return 0;
                memmove(cuts + at + 1, cuts + at, (n - at) * sizeof *cuts);
                cuts[at] = v;
                n++;
            }
    return n;
}

static bool contains(const struct nstate *s, uint32_t ch)
{
    for (uint32_t k = 0; k < s->n; k++)
        if (s->ranges[k].lo <= ch && ch <= s->ranges[k].hi)
            return true;
    return false;
}

#define CUTS_MAX 1024u

/* Edges of set `from`: between two cut points all characters do the same. */
static bool add_edges(struct subset *b, uint32_t from, const uint32_t *cuts, uint32_t n_cuts,
                      uint64_t *scratch, struct sc_edge *edges, struct sc_state *out)
{
    struct nfa *a = b->a;
    uint32_t *members = b->members, m = 0, n = 0;

    for (uint32_t i = 0; i < a->n; i++)
        if (has(b->sets[from], i) && a->s[i].n)
            members[m++] = i;
    for (uint32_t k = 0; k + 1 < n_cuts; k++) {
        memset(scratch, 0, b->words * sizeof *scratch);
        for (uint32_t i = 0; i < m; i++)
            if (contains(&a->s[members[i]], cuts[k]))
                close_over(b, scratch, a->s[members[i]].next, false, false);
        uint32_t to = number_of(b, scratch);
        if (!sc_work(a->c, 2 + m + b->words))
            return false;
        if (to == UINT32_MAX)
            continue;
        if (n && edges[n - 1].to == to && edges[n - 1].hi + 1 == cuts[k])
            edges[n - 1].hi = cuts[k + 1] - 1;
        else
            edges[n++] = (struct sc_edge){cuts[k], cuts[k + 1] - 1, to};
    }
    out->edges = sc_get(a->c, (n + 1) * sizeof *edges);
    if (!out->edges)
        return false;
    memcpy(out->edges, edges, n * sizeof *edges);
    out->n = n;
    return true;
}

static bool determinise(struct nfa *a, uint32_t start, uint32_t end, struct sc_dfa *out)
{
    struct sc *c = a->c;
    struct subset b = {.a = a, .words = (a->n + 63) / 64, .end = end};
    uint64_t *scratch = sc_get(c, b.words * sizeof *scratch);
    uint32_t *cuts = sc_get(c, (CUTS_MAX + 1) * sizeof *cuts);
    struct sc_edge *edges = sc_get(c, CUTS_MAX * sizeof *edges);

    b.sets = sc_get(c, IC_SCHEMA_STATES_MAX * sizeof *b.sets);
    b.hash = sc_get(c, HASH_SIZE * sizeof *b.hash);
    b.stack = sc_get(c, (2 * a->n + 4) * sizeof *b.stack);
    b.members = sc_get(c, a->n * sizeof *b.members);
    out->states = sc_get(c, IC_SCHEMA_STATES_MAX * sizeof *out->states);
    if (c->st)
        return false;
    uint32_t n_cuts = cut_points(a, cuts, CUTS_MAX);
    if (!n_cuts) {
        sc_fail_at(c, IC_TOO_LARGE, a->where, "\"pattern\" has too many character ranges");
        return false;
    }
    close_over(&b, scratch, start, true, false);
    number_of(&b, scratch);
    memset(b.hash, 0,
           HASH_SIZE * sizeof *b.hash); /* an equal set further on is not at the first position */
    for (uint32_t i = 0; i < b.n && !c->st; i++) {
        out->states[i].accept = accepts(&b, b.sets[i], scratch, i == 0);
        add_edges(&b, i, cuts, n_cuts, scratch, edges, &out->states[i]);
    }
    out->n = b.n;
    sc_dfa_trim(c, out);
    return !c->st;
}

static bool compile(struct sc *c, const char *pattern, size_t len, const json_t *where, struct sc_dfa *out)
{
    struct reader r = {.c = c, .where = where};
    struct nfa a = {.c = c, .where = where};
    uint32_t *chars = sc_get(c, (len + 1) * sizeof *chars);

    if (!chars)
        return false;
    for (const char *p = pattern, *end = pattern + len; p < end;)
        chars[r.n++] = sc_next_char(&p, end);
    if (r.n > IC_SCHEMA_PATTERN_MAX) {
        sc_fail_at(c, IC_TOO_LARGE, where, "\"pattern\" is longer than %d characters",
                   IC_SCHEMA_PATTERN_MAX);
        return false;
    }
    r.s = chars;
    struct rx *x = read_choice(&r);
    if (x && more(&r))
        bad(&r, "a ) without (");
    a.s = sc_get(c, NFA_MAX * sizeof *a.s);
    if (!x || c->st || !a.s)
        return false;

    /* the match may be followed by anything, and begin anywhere */
    uint32_t end = add_state(&a, (struct nstate){.kind = R_EMPTY, .ranges = any_char, .n = 2});
    uint32_t start = add_rx(&a, x, end);
    uint32_t skip = add_state(&a, (struct nstate){.kind = R_SET, .ranges = any_char, .n = 2});
    uint32_t from = add_state(&a, (struct nstate){.kind = R_ALT, .next = start, .next2 = skip});
    if (c->st)
        return false;
    a.s[end].next = end;
    a.s[skip].next = from;
    mark_alive(&a);
    return !c->st && determinise(&a, from, end, out);
}

bool sc_regex(struct sc *c, const char *pattern, size_t len, const json_t *where, struct sc_dfa *out)
{
    struct sc_scratch old = sc_scratch_begin(c);
    struct sc_dfa made = {0};

    compile(c, pattern, len, where, &made);
    return sc_scratch_keep(c, old, &made, out);
}
