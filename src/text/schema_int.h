/* The parts of the schema compiler: one conversion's state, the grammar under construction, string
 * automata, number ranges. Private to schema*.c.
 *
 * Errors are sticky: the first one is kept in `st`, later calls do nothing useful but stay safe, and
 * the caller looks once at the end. All memory comes from the conversion's pool. */
#ifndef IC_TEXT_SCHEMA_INT_H
#define IC_TEXT_SCHEMA_INT_H

#include <stdbool.h>
#include <stdint.h>

#include "text/schema.h"

#define SC_INF UINT32_MAX

struct sc_range {
    uint32_t lo, hi; /* code points, inclusive */
};

/* A deterministic automaton over code points; state 0 starts, a missing edge rejects. */
struct sc_edge {
    uint32_t lo, hi, to;
};
struct sc_state {
    struct sc_edge *edges; /* sorted, disjoint */
    uint32_t n;
    bool accept;
};
struct sc_dfa {
    struct sc_state *states;
    uint32_t n; /* 0: the empty language */
};

enum sc_kind { SC_EMPTY, SC_NEVER, SC_LIT, SC_CLASS, SC_SEQ, SC_ALT, SC_REP, SC_REF };

struct sc_node {
    enum sc_kind kind;
    uint32_t n;        /* bytes, ranges or kids; SC_REF: the rule; SC_REP: the repeated node */
    uint32_t min, max; /* SC_REP */
    union {
        const char *bytes;
        const struct sc_range *ranges;
        const uint32_t *kids;
    };
};

struct sc_rule {
    const char *hint; /* start of its name, for readers */
    uint32_t body;
    bool productive, reachable;
};

struct sc_conj; /* schema.c */

struct sc {
    const json_t *root;
    struct ic_err *err;
    enum ic_status st;

    struct sc_block *blocks;
    size_t pooled;

    struct sc_node *nodes;
    uint32_t n_nodes, cap_nodes;
    struct sc_rule *rules;
    uint32_t n_rules, cap_rules;

    struct sc_memo *memo[512]; /* things made once, by key */

    const json_t **seen; /* hash set of the schemas that the keyword check has passed */
    uint32_t n_seen;

    struct sc_conj *todo, **todo_end; /* values whose rules are named but not yet made */
    struct sc_dfa dfas[256];          /* of patterns and formats */
    uint32_t n_dfas;
    bool has_formats, formats_pass; /* validation: read `format` as an annotation */
    const json_t *trusted;          /* validation: the enum that a value was taken from */
    uint32_t work;                  /* steps spent in loops that a hostile schema could stretch */
};

/* schema_gbnf.c: memory, errors, grammar */
void *sc_get(struct sc *c, size_t size); /* zeroed; NULL after setting IC_OOM */
void sc_free(struct sc *c);
/* What is taken from the pool between the two is given back, but for a copy of the automaton. */
struct sc_scratch {
    struct sc_block *blocks;
    size_t pooled;
};
struct sc_scratch sc_scratch_begin(struct sc *c);
bool sc_scratch_keep(struct sc *c, struct sc_scratch old, const struct sc_dfa *made, struct sc_dfa *out);
void sc_fail(struct sc *c, enum ic_status st, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* "… , at #/pointer": finds `where` (a schema of the document) for the message */
void sc_fail_at(struct sc *c, enum ic_status st, const json_t *where, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
bool sc_work(struct sc *c, uint32_t steps); /* false, and IC_TOO_LARGE, once too much is spent */
/* The slot for a key, a fresh zero one the first time; NULL on failure. Key bytes are copied. */
uint32_t *sc_memo(struct sc *c, const void *key, size_t len);

#define SC_NODE_EMPTY 0u
#define SC_NODE_NEVER 1u
bool sc_grammar_init(struct sc *c);
uint32_t sc_lit(struct sc *c, const char *bytes, size_t len); /* copies */
uint32_t sc_lits(struct sc *c, const char *text);
uint32_t sc_class(struct sc *c, const struct sc_range *ranges, uint32_t n); /* copies */
uint32_t sc_range1(struct sc *c, uint32_t lo, uint32_t hi);
uint32_t sc_seq(struct sc *c, const uint32_t *kids, uint32_t n); /* copies */
uint32_t sc_alt(struct sc *c, const uint32_t *kids, uint32_t n); /* copies, drops repeats */
uint32_t sc_rep(struct sc *c, uint32_t node, uint32_t min, uint32_t max);
uint32_t sc_rule(struct sc *c, const char *hint, uint32_t body); /* returns the rule's number */
uint32_t sc_ref(struct sc *c, uint32_t rule);
#define SC_SEQ(c, ...)                                                                                     \
    sc_seq((c), (const uint32_t[]){__VA_ARGS__}, (uint32_t)(sizeof((uint32_t[]){__VA_ARGS__}) / 4))
#define SC_ALT(c, ...)                                                                                     \
    sc_alt((c), (const uint32_t[]){__VA_ARGS__}, (uint32_t)(sizeof((uint32_t[]){__VA_ARGS__}) / 4))
/* Drops what can never end, checks the bounds, writes the text with `root` as start. */
void sc_emit(struct sc *c, uint32_t root, struct ic_buf *out);

/* Rules that any schema may need; references to rules made on first use. */
uint32_t sc_blank(struct sc *c); /* bounded white space */
uint32_t sc_char(struct sc *c);  /* one character of a string, with every escape */
uint32_t sc_string(struct sc *c, uint32_t min, uint32_t max);
uint32_t sc_any(struct sc *c); /* any JSON value */
uint32_t sc_any_object(struct sc *c);
uint32_t sc_number(struct sc *c);
uint32_t sc_integer(struct sc *c);
/* A choice among sorted distinct byte strings (UTF-8), sharing their beginnings. */
uint32_t sc_trie(struct sc *c, const struct ic_buf *texts, uint32_t n);

/* schema_dfa.c, schema_regex.c: string automata. False after an error. */
bool sc_regex(struct sc *c, const char *pattern, size_t len, const json_t *where, struct sc_dfa *out);
bool sc_dfa_both(struct sc *c, const struct sc_dfa *a, const struct sc_dfa *b, const json_t *where,
                 struct sc_dfa *out); /* intersection */
bool sc_dfa_length(struct sc *c, uint32_t min, uint32_t max, const json_t *where, struct sc_dfa *out);
bool sc_dfa_other_keys(struct sc *c, const char *const *keys, uint32_t n, struct sc_dfa *out);
void sc_dfa_trim(struct sc *c, struct sc_dfa *d); /* removes edges that lead nowhere */
bool sc_dfa_match(const struct sc_dfa *d, const char *s, size_t len);
uint32_t sc_dfa_body(struct sc *c, const struct sc_dfa *d); /* JSON string after its opening quote */

/* The next code point of valid UTF-8; *s moves on. */
uint32_t sc_next_char(const char **s, const char *end);

/* schema_number.c */
#define SC_DIGITS 64
struct sc_dec { /* sign, whole digits (no leading zeros but one), fraction (no trailing zeros) */
    bool neg;
    uint8_t whole[SC_DIGITS + 8], frac[SC_DIGITS];
    uint32_t nw, nf;
};
struct sc_bounds {
    bool has_lo, has_hi, lo_open, hi_open;
    struct sc_dec lo, hi;
};
/* False where the number has more digits than SC_DIGITS on a side. */
bool sc_dec_from(const json_t *number, struct sc_dec *out);
int sc_dec_cmp(const struct sc_dec *a, const struct sc_dec *b);
/* The least and greatest of both; an open bound is narrower than an equal closed one. */
void sc_bound_lo(struct sc_bounds *b, const struct sc_dec *v, bool open);
void sc_bound_hi(struct sc_bounds *b, const struct sc_dec *v, bool open);
bool sc_in_bounds(const struct sc_bounds *b, const struct sc_dec *v);
uint32_t sc_integer_range(struct sc *c, const struct sc_bounds *b);
uint32_t sc_number_range(struct sc *c, const struct sc_bounds *b);
/* Shortest text that reads back as the same double, without exponent where it is short. */
void sc_put_real(struct ic_buf *out, double v);

/* schema_keywords.c */
/* Walks the whole document: every keyword known, every value of the right type, sizes bounded. */
void sc_check_keywords(struct sc *c);
bool sc_passed(const struct sc *c, const json_t *schema);
/* The schema a "$ref" of a checked schema points at; NULL after an error. */
const json_t *sc_resolve(struct sc *c, const json_t *schema);
/* A checked non-negative integer keyword, or `fallback`. */
uint32_t sc_count(const json_t *schema, const char *key, uint32_t fallback);

/* schema_value.c */
enum { SC_NULL = 1, SC_BOOL = 2, SC_INT = 4, SC_FRAC = 8, SC_STR = 16, SC_ARR = 32, SC_OBJ = 64 };
#define SC_ALL 127u
unsigned sc_types(const json_t *schema); /* the `type` keyword as bits; SC_ALL without it */
unsigned sc_type_of(const json_t *value);
bool sc_same(const json_t *a, const json_t *b); /* JSON Schema's equality: 1 equals 1.0 */
bool sc_valid(struct sc *c, const json_t *schema, const json_t *value);
void sc_put_json(struct ic_buf *out, const json_t *value);    /* compact */
void sc_bounds_of(const json_t *schema, struct sc_bounds *b); /* narrows b */
/* The automaton of a schema's `pattern` or `format` (key), made once. */
const struct sc_dfa *sc_dfa_of(struct sc *c, const json_t *schema, const char *key);
const char *sc_format_pattern(const char *name); /* NULL: not a known format */

#endif
