/* See prefix.h. A node's `seqs` holds every sequence whose path leads through it, so it is a superset of each child's;
 * a node whose set becomes empty is freed, and so are, before it, all nodes below. */
#include "sched/prefix.h"

#include <stdlib.h>
#include <string.h>

struct node {
    struct node *parent, *child, *next;
    int32_t *tokens, n, cap;
    int32_t from; /* position of tokens[0] in its sequences */
    int64_t used;
    struct ic_seq_set seqs;
    bool open;
    char salt[IC_SALT_MAX + 1];
};

struct ic_prefix {
    struct node root; /* holds no token; its set is not kept */
    struct node *leaf[IC_PREFIX_SEQS_MAX];
    int32_t n_seq, cells;
};

/* ---- sets ------------------------------------------------------------------------------------------------ */

static bool has(const struct ic_seq_set *s, int32_t seq)
{
    return s->word[seq / 64] >> (seq % 64) & 1;
}

static void put(struct ic_seq_set *s, int32_t seq)
{
    s->word[seq / 64] |= UINT64_C(1) << (seq % 64);
}

static void take(struct ic_seq_set *s, int32_t seq)
{
    s->word[seq / 64] &= ~(UINT64_C(1) << (seq % 64));
}

static bool meets(const struct ic_seq_set *a, const struct ic_seq_set *b)
{
    for (size_t i = 0; i < sizeof a->word / sizeof *a->word; i++)
        if (a->word[i] & b->word[i])
            return true;
    return false;
}

static bool is_empty(const struct ic_seq_set *s)
{
    return !meets(s, s);
}

static bool is_only(const struct ic_seq_set *s, int32_t seq)
{
    struct ic_seq_set rest = *s;
    take(&rest, seq);
    return is_empty(&rest);
}

/* ---- nodes ------------------------------------------------------------------------------------------------- */

static void unlink_node(struct node *x)
{
    struct node **p = &x->parent->child;
    while (*p != x)
        p = &(*p)->next;
    *p = x->next;
}

static void link_node(struct node *x, struct node *parent)
{
    x->parent = parent;
    x->next = parent->child;
    parent->child = x;
}

static void free_node(struct ic_prefix *p, struct node *x)
{
    IC_ASSERT(!x->child && x != &p->root);
    unlink_node(x);
    p->cells -= x->n;
    free(x->tokens);
    free(x);
}

static bool grow(struct node *x, const int32_t *tokens, int32_t n)
{
    if (x->n + n > x->cap) {
        int32_t cap = x->n + n + x->cap / 2;
        int32_t *t = realloc(x->tokens, sizeof *t * (size_t)cap);
        if (!t)
            return false;
        x->tokens = t;
        x->cap = cap;
    }
    memcpy(x->tokens + x->n, tokens, sizeof *tokens * (size_t)n);
    x->n += n;
    return true;
}

/* Cuts a node in two behind its first `at` tokens; the upper part is the same struct. */
static bool split(struct ic_prefix *p, struct node *x, int32_t at)
{
    struct node *low = calloc(1, sizeof *low);

    IC_ASSERT(at > 0 && at < x->n);
    if (!low)
        return false;
    *low = *x;
    low->tokens = NULL;
    low->n = low->cap = 0;
    low->from = x->from + at;
    low->next = NULL;
    if (!grow(low, x->tokens + at, x->n - at)) {
        free(low);
        return false;
    }
    x->n = at;
    x->child = NULL;
    for (struct node *c = low->child; c; c = c->next)
        c->parent = low;
    link_node(low, x);
    for (int32_t i = 0; i < p->n_seq; i++) /* paths that ended here end in the lower part */
        if (p->leaf[i] == x)
            p->leaf[i] = low;
    return true;
}

static int32_t end_of(const struct node *x)
{
    return x->from + x->n;
}

/* ---- open, close, what there is --------------------------------------------------------------------------------- */

enum ic_status ic_prefix_open(struct ic_prefix **out, int32_t n_seq, struct ic_err *err)
{
    struct ic_prefix *p = *out = calloc(1, sizeof *p);

    IC_ASSERT(n_seq > 0 && n_seq <= IC_PREFIX_SEQS_MAX);
    if (!p)
        return ic_fail(err, IC_OOM, "out of memory");
    p->n_seq = n_seq;
    for (int32_t i = 0; i < n_seq; i++)
        p->leaf[i] = &p->root;
    return IC_OK;
}

void ic_prefix_close(struct ic_prefix **pp)
{
    struct ic_prefix *p = *pp;

    if (!p)
        return;
    for (int32_t i = 0; i < p->n_seq; i++)
        ic_prefix_cut(p, i, 0);
    IC_ASSERT(!p->root.child && p->cells == 0);
    free(p);
    *pp = NULL;
}

int32_t ic_prefix_cells(const struct ic_prefix *p)
{
    return p->cells;
}

int32_t ic_prefix_len(const struct ic_prefix *p, int32_t seq)
{
    return end_of(p->leaf[seq]);
}

void ic_prefix_tokens(const struct ic_prefix *p, int32_t seq, int32_t from, int32_t to, int32_t *out)
{
    for (const struct node *x = p->leaf[seq]; x != &p->root; x = x->parent)
        for (int32_t i = x->n - 1; i >= 0; i--)
            if (x->from + i >= from && x->from + i < to)
                out[x->from + i - from] = x->tokens[i];
}

const char *ic_prefix_salt(const struct ic_prefix *p, int32_t seq)
{
    return p->leaf[seq]->salt;
}

static int32_t cells_below(const struct node *x, const struct ic_seq_set *set)
{
    int32_t n = 0;
    for (const struct node *c = x->child; c; c = c->next)
        if (meets(&c->seqs, set))
            n += c->n + cells_below(c, set);
    return n;
}

int32_t ic_prefix_cells_of(const struct ic_prefix *p, const struct ic_seq_set *set)
{
    return cells_below(&p->root, set);
}

int32_t ic_prefix_own(const struct ic_prefix *p, int32_t seq, int32_t *from)
{
    const struct node *x = p->leaf[seq];

    *from = end_of(x);
    if (x == &p->root || !is_only(&x->seqs, seq))
        return 0;
    *from = x->from;
    return x->n;
}

/* ---- looking for a beginning -------------------------------------------------------------------------------------- */

struct search {
    const struct ic_prefix *p;
    const char *salt;
    const int32_t *tokens;
    int32_t n, window, best, holder;
};

/* Whether some sequence of this node lets its first `len` tokens be shared. */
static int32_t lender(const struct search *s, const struct node *x, int32_t len)
{
    for (int32_t i = 0; i < s->p->n_seq; i++) {
        int32_t has_len = ic_prefix_len(s->p, i);
        if (has(&x->seqs, i) && (s->window == 0 || has_len == len || has_len <= s->window))
            return i;
    }
    return -1;
}

static void descend(struct search *s, const struct node *x)
{
    for (const struct node *c = x->child; c; c = c->next) {
        int32_t k = 0;
        if (!c->open && strcmp(c->salt, s->salt) != 0)
            continue;
        while (k < c->n && c->from + k < s->n && c->tokens[k] == s->tokens[c->from + k])
            k++;
        if (k == 0)
            continue;
        if (k == c->n)
            descend(s, c);
        int32_t len = c->from + k, holder = len > s->best ? lender(s, c, len) : -1;
        if (holder >= 0) {
            s->best = len;
            s->holder = holder;
        }
    }
}

int32_t ic_prefix_match(const struct ic_prefix *p, const char *salt, const int32_t *tokens, int32_t n,
                        int32_t window, int32_t *holder)
{
    struct search s = {p, salt, tokens, n, window, 0, -1};

    descend(&s, &p->root);
    *holder = s.holder;
    return s.best;
}

/* ---- changes --------------------------------------------------------------------------------------------------------- */

int32_t ic_prefix_share(struct ic_prefix *p, int32_t src, int32_t dst, int32_t len, int64_t now)
{
    struct node *x = p->leaf[src];

    IC_ASSERT(p->leaf[dst] == &p->root && len <= end_of(x));
    while (x != &p->root && x->from >= len)
        x = x->parent;
    if (end_of(x) > len && !split(p, x, len - x->from))
        x = x->parent;
    p->leaf[dst] = x;
    for (struct node *y = x; y != &p->root; y = y->parent) {
        put(&y->seqs, dst);
        y->used = now;
    }
    return end_of(x);
}

bool ic_prefix_append(struct ic_prefix *p, int32_t seq, const char *salt, const int32_t *tokens, int32_t n,
                      int64_t now)
{
    struct node *x = p->leaf[seq];

    if (n <= 0)
        return true;
    if (x != &p->root && !x->child && is_only(&x->seqs, seq) && !x->open && !strcmp(x->salt, salt)) {
        if (!grow(x, tokens, n))
            return false;
        x->used = now;
    } else {
        struct node *c = calloc(1, sizeof *c);
        if (!c || !grow(c, tokens, n)) {
            free(c);
            return false;
        }
        c->from = end_of(x);
        c->used = now;
        memcpy(c->salt, salt, strnlen(salt, IC_SALT_MAX));
        put(&c->seqs, seq);
        link_node(c, x);
        p->leaf[seq] = c;
    }
    p->cells += n;
    return true;
}

int32_t ic_prefix_cut(struct ic_prefix *p, int32_t seq, int32_t keep)
{
    struct node *x = p->leaf[seq];

    while (x != &p->root && end_of(x) > keep) {
        struct node *up = x->parent;
        if (x->from < keep) {
            if (is_only(&x->seqs, seq)) { /* the end of it: nobody else is below either */
                p->cells -= end_of(x) - keep;
                x->n = keep - x->from;
                break;
            }
            if (split(p, x, keep - x->from)) { /* its lower part is let go of in the next round */
                x = x->child;
                p->leaf[seq] = x;
                continue;
            }
        }
        take(&x->seqs, seq);
        if (is_empty(&x->seqs))
            free_node(p, x);
        x = up;
        p->leaf[seq] = x;
    }
    return end_of(x);
}

void ic_prefix_touch(struct ic_prefix *p, int32_t seq, int64_t now)
{
    for (struct node *x = p->leaf[seq]; x != &p->root; x = x->parent)
        x->used = now;
}

int64_t ic_prefix_used(const struct ic_prefix *p, int32_t seq)
{
    return p->leaf[seq]->used;
}

void ic_prefix_publish(struct ic_prefix *p, int32_t seq)
{
    for (struct node *x = p->leaf[seq]; x != &p->root; x = x->parent)
        x->open = true;
}

/* ---- for tests ---------------------------------------------------------------------------------------------------------- */

static bool check_below(const struct node *x, bool is_root, int32_t *cells)
{
    for (const struct node *c = x->child; c; c = c->next) {
        struct ic_seq_set both = c->seqs;
        for (size_t i = 0; !is_root && i < sizeof both.word / sizeof *both.word; i++)
            both.word[i] &= x->seqs.word[i];
        if (c->parent != x || c->n <= 0 || c->from != end_of(x) || is_empty(&c->seqs) ||
            memcmp(&both, &c->seqs, sizeof both) != 0 || !check_below(c, false, cells))
            return false;
        *cells += c->n;
    }
    return true;
}

bool ic_prefix_check(const struct ic_prefix *p)
{
    int32_t cells = 0;

    if (!check_below(&p->root, true, &cells) || cells != p->cells)
        return false;
    for (int32_t i = 0; i < p->n_seq; i++)
        for (const struct node *x = p->leaf[i]; x != &p->root; x = x->parent)
            if (!has(&x->seqs, i))
                return false;
    return true;
}
