/* What has to be known of a client's GBNF before llama.cpp gets it: its engine has no bounds of its own.
 *
 * - It reads groups by recursion: some ten thousand within each other end the process.
 * - It keeps a stack for every place at which the text may go on. Where places follow each other that may all be left out,
 *   every one of n leads to every later one, and the stacks are compared pair by pair: the cube of n. A dozen rules
 *   "a ::= b b" down to "x"? are 4096 places, and a token takes minutes, for everybody.
 *
 * - It overlooks left recursion behind a part that may be left out, and follows it for ever.
 * - It may throw where a grammar names tokens, and so end the process, when the text goes on by characters there.
 *
 * So the first two are counted here, and the others refused. What this does not see is ambiguity that grows with the text: IC_GRAMMAR_TOKEN_MS ends that.
 *
 * Thread: any. Owner: the caller. What does not parse is let through: the engine refuses it. */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "text/sample.h"

#define CHAIN_CAP 1000000L /* counting further means nothing */
#define NAME_SIZE 128      /* a rule's name and NUL */

/* The first character from `g` on that is in no string, class or remark, or NULL. */
static const char *outside(const char *g)
{
    for (; *g; g++) {
        char end = *g == '"' ? '"' : *g == '[' ? ']' : *g == '#' ? '\n' : 0;
        if (!end)
            return g;
        for (g++; *g && *g != end; g++)
            if (*g == '\\' && end != '\n' && g[1])
                g++;
        if (!*g)
            break;
    }
    return NULL;
}

/* <[17]> or <think>, beside characters */
static bool names_tokens(const char *g)
{
    while ((g = outside(g)) && *g != '<')
        g++;
    return g;
}

/* Of a rule, a sequence or an item: whether it may be empty, and how many places can be the next one, alternatives counted
 * once. */
struct span {
    long chain;
    bool empty;
};

struct rule {
    const char *body;
    struct span span;
    enum { NEW, RUNNING, DONE } state;
};

struct reader {
    const char *at;
    json_t *names; /* name: index */
    struct rule *rules;
    size_t count;
    long worst; /* longest chain anywhere */
    int deep;   /* groups and rules being followed */
    /* the first round, in which only what can come first is followed, so that it comes to an end */
    bool first;
    bool skipping; /* in it: what is read cannot come first */
    bool lost;     /* too deep */
    bool circle;   /* a rule leads to itself with nothing said */
};

static bool is_word(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
           c == '_';
}

static size_t word_len(const char *p)
{
    size_t n = 0;
    while (is_word(p[n]))
        n++;
    return n;
}

/* The word at p as a string; false: it is too long. */
static bool copy_word(char name[NAME_SIZE], const char *p)
{
    size_t n = word_len(p);
    if (n >= NAME_SIZE)
        return false;
    memcpy(name, p, n);
    name[n] = 0;
    return true;
}

static const char *skip(const char *p)
{
    for (;; p++) {
        if (*p == '#')
            p += strcspn(p, "\n");
        if (!*p || !strchr(" \t\r\n", *p))
            return p;
    }
}

static bool starts_rule(const char *p)
{
    size_t n = word_len(p);
    return n && !strncmp(skip(p + n), "::=", 3);
}

static struct span alternatives(struct reader *r);

/* One group or rule further in. */
static struct span deeper(struct reader *r)
{
    struct span x = {1, false};

    if (r->deep >= IC_GRAMMAR_FOLLOW_MAX) {
        r->lost = true;
        return x;
    }
    r->deep++;
    x = alternatives(r);
    r->deep--;
    return x;
}

static struct span rule_span(struct reader *r, size_t i)
{
    struct rule *rule = &r->rules[i];

    if (rule->state == NEW) {
        const char *back = r->at;
        bool skipping = r->skipping;
        rule->state = RUNNING;
        r->at = rule->body;
        r->skipping = false;
        rule->span = deeper(r);
        rule->state = DONE;
        r->at = back;
        r->skipping = skipping;
    }
    if (rule->state == RUNNING)
        r->circle = true;
    return rule->state == DONE ? rule->span : (struct span){1, false};
}

static struct span reference(struct reader *r)
{
    char name[NAME_SIZE];
    const json_t *i = copy_word(name, r->at) ? json_object_get(r->names, name) : NULL;

    r->at += word_len(r->at);
    return !r->skipping && i ? rule_span(r, (size_t)json_integer_value(i)) : (struct span){1, false};
}

static void repetition(struct reader *r, struct span *x)
{
    for (r->at = skip(r->at); *r->at && strchr("*+?{", *r->at); r->at = skip(r->at)) {
        char op = *r->at++;
        long least = op == '+' ? 1 : 0, most = 1;
        if (op == '{') {
            char *end;
            least = strtol(r->at, &end, 10);
            end += strspn(end, " ");
            most = *end == ',' ? strtol(end + 1, NULL, 10) : least;
            r->at = end + strcspn(end, "}");
            r->at += *r->at == '}';
        }
        most = most < least ? least : most;
        if (x->empty && most > 1)
            x->chain = most > CHAIN_CAP / (x->chain + 1) ? CHAIN_CAP : x->chain * most;
        x->empty |= least == 0;
    }
}

/* False: the sequence ends here. */
static bool item(struct reader *r, struct span *x)
{
    *x = (struct span){1, false};
    r->at = skip(r->at);
    char c = r->lost ? 0 : *r->at;
    if (c == '"' || c == '[') {
        const char *from = r->at++;
        for (char end = c == '"' ? '"' : ']'; *r->at && *r->at != end; r->at++)
            r->at += *r->at == '\\' && r->at[1];
        if (c == '"' && r->at == from + 1)
            *x = (struct span){0, true};
        r->at += *r->at != 0;
    } else if (c == '.') {
        r->at++;
    } else if (c == '(') {
        r->at++;
        *x = deeper(r);
        r->at = skip(r->at);
        r->at += *r->at == ')';
    } else if (is_word(c) && !starts_rule(r->at)) {
        *x = reference(r);
    } else {
        return false;
    }
    repetition(r, x);
    return true;
}

static struct span sequence(struct reader *r)
{
    struct span all = {0, true}, x;
    bool skipping = r->skipping;
    long run = 0; /* places from the last one on that had to be there */

    while (item(r, &x)) {
        run = run + x.chain > CHAIN_CAP ? CHAIN_CAP : run + x.chain;
        r->worst = run > r->worst ? run : r->worst;
        if (all.empty)
            all.chain = run;
        if (x.empty)
            continue;
        all.empty = false;
        run = 0;
        r->skipping = r->first;
    }
    r->skipping = skipping;
    return all;
}

static struct span alternatives(struct reader *r)
{
    struct span all = {0, false};

    for (bool more = true; more;) {
        struct span one = sequence(r);
        all.chain = one.chain > all.chain ? one.chain : all.chain;
        all.empty |= one.empty;
        r->at = skip(r->at);
        more = *r->at == '|';
        r->at += more;
    }
    return all;
}

/* Finds the rules. */
static enum ic_status index_rules(struct reader *r, const char *g, struct ic_err *err)
{
    size_t room = 0;

    for (const char *p = g; (p = outside(p)); p += word_len(p) ? word_len(p) : 1) {
        if (!is_word(*p) || !starts_rule(p))
            continue;
        if (r->count == room) {
            room = room ? 2 * room : 64;
            struct rule *grown = realloc(r->rules, room * sizeof *grown);
            if (!grown)
                return ic_fail(err, IC_OOM, "out of memory");
            r->rules = grown;
        }
        char name[NAME_SIZE];
        if (!copy_word(name, p))
            return ic_fail(err, IC_TOO_LARGE, "a rule's name in the grammar is longer than %d bytes",
                           NAME_SIZE - 1);
        if (json_object_set_new_nocheck(r->names, name, json_integer((json_int_t)r->count)))
            return ic_fail(err, IC_OOM, "out of memory");
        r->rules[r->count++] = (struct rule){.body = skip(p + word_len(p)) + 3};
    }
    return IC_OK;
}

static bool nests_too_deep(const char *g)
{
    long depth = 0;

    for (; depth <= IC_GRAMMAR_DEPTH_MAX && (g = outside(g)); g++)
        depth += *g == '(' ? 1 : *g == ')' ? -1 : 0;
    return depth > IC_GRAMMAR_DEPTH_MAX;
}

enum ic_status ic_grammar_check(const char *g, struct ic_err *err)
{
    struct reader r = {.names = json_object(), .first = true};
    enum ic_status st = IC_OK;

    if (nests_too_deep(g))
        st = ic_fail(err, IC_TOO_LARGE, "the grammar nests groups deeper than %d", IC_GRAMMAR_DEPTH_MAX);
    else if (names_tokens(g))
        st = ic_fail(err, IC_BAD_REQUEST, "a grammar that names tokens (<…>) is not supported");
    else
        st = r.names ? index_rules(&r, g, err) : ic_fail(err, IC_OOM, "out of memory");
    for (size_t i = 0; st == IC_OK && i < r.count; i++)
        rule_span(&r, i);
    r.first = false; /* all are known now: every place of every rule */
    for (size_t i = 0; st == IC_OK && i < r.count; i++) {
        r.at = r.rules[i].body;
        alternatives(&r);
    }
    if (st == IC_OK && r.circle)
        st = ic_fail(err, IC_BAD_REQUEST, "a rule of the grammar leads to itself with no character before");
    else if (st == IC_OK && r.lost)
        st = ic_fail(err, IC_TOO_LARGE, "the grammar's rules lead deeper than %d", IC_GRAMMAR_FOLLOW_MAX);
    else if (st == IC_OK && r.worst > IC_GRAMMAR_CHAIN_MAX)
        st = ic_fail(err, IC_TOO_LARGE, "more than %d parts in a row of the grammar may all be left out",
                     IC_GRAMMAR_CHAIN_MAX);
    json_decref(r.names);
    free(r.rules);
    return st;
}
