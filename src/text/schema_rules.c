/* Rules that any schema may need: blanks, strings, numbers, any JSON value, a choice of constants.
 * Made on first use, shared by all that use them. */
#include <stdio.h>
#include <string.h>

#include "text/schema_int.h"

/* A rule made once under a fixed name: its reference, building the body on first use. The slot is
 * filled before the body is made, so a body may refer to itself. */
static uint32_t once(struct sc *c, const char *name, uint32_t (*body)(struct sc *))
{
    uint32_t *slot = sc_memo(c, name, strlen(name));

    if (!slot)
        return SC_NODE_NEVER;
    if (!*slot) {
        uint32_t rule = sc_rule(c, name, SC_NODE_NEVER);
        *slot = rule + 1;
        uint32_t node = body(c);
        if (c->st)
            return SC_NODE_NEVER;
        c->rules[rule].body = node;
    }
    return sc_ref(c, *slot - 1);
}

static uint32_t blank_body(struct sc *c)
{
    uint32_t pad = sc_class(c, (const struct sc_range[]){{'\t', '\t'}, {' ', ' '}}, 2);

    return SC_ALT(c, SC_NODE_EMPTY, sc_lits(c, " "), SC_SEQ(c, sc_lits(c, "\n"), sc_rep(c, pad, 0, 32)));
}

uint32_t sc_blank(struct sc *c)
{
    return once(c, "blank", blank_body);
}

static uint32_t hex_body(struct sc *c)
{
    return sc_class(c, (const struct sc_range[]){{'0', '9'}, {'a', 'f'}, {'A', 'F'}}, 3);
}

/* \uXXXX: one that is not a surrogate, or a high and a low one */
static uint32_t unicode_escape(struct sc *c)
{
    uint32_t hex = once(c, "hex", hex_body);
    uint32_t d = sc_class(c, (const struct sc_range[]){{'d', 'd'}, {'D', 'D'}}, 2);
    uint32_t not_d = sc_class(
        c, (const struct sc_range[]){{'0', '9'}, {'a', 'c'}, {'e', 'f'}, {'A', 'C'}, {'E', 'F'}}, 5);
    uint32_t high = sc_class(c, (const struct sc_range[]){{'8', '9'}, {'a', 'b'}, {'A', 'B'}}, 3);
    uint32_t low = sc_class(c, (const struct sc_range[]){{'c', 'f'}, {'C', 'F'}}, 2);

    return SC_SEQ(
        c, sc_lits(c, "u"),
        SC_ALT(c, SC_SEQ(c, not_d, sc_rep(c, hex, 3, 3)),
               SC_SEQ(c, d, sc_range1(c, '0', '7'), sc_rep(c, hex, 2, 2)),
               SC_SEQ(c, d, high, sc_rep(c, hex, 2, 2), sc_lits(c, "\\u"), d, low, sc_rep(c, hex, 2, 2))));
}

static uint32_t char_body(struct sc *c)
{
    static const struct sc_range raw[] = {{' ', '!'}, {'#', '['}, {']', 0xD7FF}, {0xE000, 0x10FFFF}};
    static const struct sc_range letters[] = {{'"', '"'}, {'/', '/'}, {'\\', '\\'}, {'b', 'b'},
                                              {'f', 'f'}, {'n', 'n'}, {'r', 'r'},   {'t', 't'}};

    return SC_ALT(c, sc_class(c, raw, 4),
                  SC_SEQ(c, sc_lits(c, "\\"), SC_ALT(c, sc_class(c, letters, 8), unicode_escape(c))));
}

uint32_t sc_char(struct sc *c)
{
    return once(c, "char", char_body);
}

uint32_t sc_string(struct sc *c, uint32_t min, uint32_t max)
{
    char key[40];

    snprintf(key, sizeof key, "string %u %u", min, max);
    uint32_t *slot = sc_memo(c, key, strlen(key));
    if (!slot)
        return SC_NODE_NEVER;
    if (!*slot) {
        uint32_t quote = sc_lits(c, "\"");
        uint32_t body = SC_SEQ(c, quote, sc_rep(c, sc_char(c), min, max), quote);
        *slot = sc_rule(c, "string", body) + 1;
    }
    return sc_ref(c, *slot - 1);
}

static uint32_t number_body(struct sc *c)
{
    uint32_t digit = sc_range1(c, '0', '9');
    uint32_t whole = SC_ALT(c, sc_lits(c, "0"), SC_SEQ(c, sc_range1(c, '1', '9'), sc_rep(c, digit, 0, 17)));
    uint32_t sign = sc_class(c, (const struct sc_range[]){{'+', '+'}, {'-', '-'}}, 2);
    uint32_t e = sc_class(c, (const struct sc_range[]){{'e', 'e'}, {'E', 'E'}}, 2);
    uint32_t frac = SC_SEQ(c, sc_lits(c, "."), sc_rep(c, digit, 1, 17));
    uint32_t exp = SC_SEQ(c, e, sc_rep(c, sign, 0, 1), sc_rep(c, digit, 1, 2));

    return SC_SEQ(c, sc_rep(c, sc_lits(c, "-"), 0, 1), whole, sc_rep(c, frac, 0, 1), sc_rep(c, exp, 0, 1));
}

uint32_t sc_number(struct sc *c)
{
    return once(c, "number", number_body);
}

static uint32_t integer_body(struct sc *c)
{
    return SC_ALT(c, sc_lits(c, "0"),
                  SC_SEQ(c, sc_rep(c, sc_lits(c, "-"), 0, 1), sc_range1(c, '1', '9'),
                         sc_rep(c, sc_range1(c, '0', '9'), 0, 17)));
}

uint32_t sc_integer(struct sc *c)
{
    return once(c, "integer", integer_body);
}

static uint32_t object_body(struct sc *c)
{
    uint32_t member =
        SC_SEQ(c, sc_string(c, 0, SC_INF), sc_lits(c, ":"), sc_rep(c, sc_lits(c, " "), 0, 1), sc_any(c));
    uint32_t more = SC_SEQ(c, sc_lits(c, ","), sc_blank(c), member);

    return SC_SEQ(c, sc_lits(c, "{"), sc_blank(c),
                  SC_ALT(c, SC_NODE_EMPTY, SC_SEQ(c, member, sc_rep(c, more, 0, SC_INF), sc_blank(c))),
                  sc_lits(c, "}"));
}

uint32_t sc_any_object(struct sc *c)
{
    return once(c, "object", object_body);
}

static uint32_t array_body(struct sc *c)
{
    uint32_t more = SC_SEQ(c, sc_lits(c, ","), sc_blank(c), sc_any(c));

    return SC_SEQ(c, sc_lits(c, "["), sc_blank(c),
                  SC_ALT(c, SC_NODE_EMPTY, SC_SEQ(c, sc_any(c), sc_rep(c, more, 0, SC_INF), sc_blank(c))),
                  sc_lits(c, "]"));
}

static uint32_t any_body(struct sc *c)
{
    return SC_ALT(c, sc_any_object(c), once(c, "array", array_body), sc_string(c, 0, SC_INF), sc_number(c),
                  sc_lits(c, "true"), sc_lits(c, "false"), sc_lits(c, "null"));
}

uint32_t sc_any(struct sc *c)
{
    return once(c, "any", any_body);
}

/* How many leading bytes all of texts[0..n) share from `at` on, in whole characters. */
static size_t shared_prefix(const struct ic_buf *texts, uint32_t n, size_t at)
{
    const struct ic_buf *a = &texts[0], *b = &texts[n - 1]; /* sorted: these differ first */
    size_t k = at;

    while (k < a->len && k < b->len && a->data[k] == b->data[k])
        k++;
    while (k > at && k < a->len && ((unsigned char)a->data[k] & 0xC0) == 0x80)
        k--;
    while (k > at && k < b->len && ((unsigned char)b->data[k] & 0xC0) == 0x80)
        k--;
    return k - at;
}

static uint32_t trie(struct sc *c, const struct ic_buf *texts, uint32_t n, size_t at, int depth)
{
    size_t same = shared_prefix(texts, n, at);
    uint32_t head = sc_lit(c, texts[0].data + at, same), m = 0;

    at += same;
    if (n == 1 || c->st)
        return head;
    uint32_t *kids = sc_get(c, n * sizeof *kids);
    if (!kids)
        return SC_NODE_NEVER;
    for (uint32_t i = 0, j; i < n; i = j) {
        const char *p = texts[i].data + at, *end = texts[i].data + texts[i].len;
        j = i + 1;
        if (p == end) {
            kids[m++] = SC_NODE_EMPTY;
            continue;
        }
        const char *q = p;
        sc_next_char(&q, end);
        size_t len = (size_t)(q - p);
        while (j < n && texts[j].len - at >= len && !memcmp(texts[j].data + at, p, len))
            j++;
        kids[m++] = trie(c, texts + i, j - i, at, depth + 1);
    }
    uint32_t choice = sc_alt(c, kids, m);
    /* a rule now and then keeps the text's parentheses shallow */
    if (depth % 16 == 15)
        choice = sc_ref(c, sc_rule(c, "choice", choice));
    return SC_SEQ(c, head, choice);
}

uint32_t sc_trie(struct sc *c, const struct ic_buf *texts, uint32_t n)
{
    return n ? trie(c, texts, n, 0, 0) : SC_NODE_NEVER;
}
