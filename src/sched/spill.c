#include "sched/spill.h"

#include <stdlib.h>
#include <string.h>

static size_t cost(const struct ic_spill_part *p)
{
    return sizeof *p + sizeof *p->tokens * (size_t)p->to + p->bytes;
}

void ic_spill_drop(struct ic_spill *s, struct ic_spill_part *p)
{
    struct ic_spill_part **at = &s->first;

    while (*at != p)
        at = &(*at)->next;
    *at = p->next;
    s->sum -= cost(p);
    s->count--;
    free(p->tokens);
    free(p->data);
    free(p);
}

static void to_front(struct ic_spill *s, struct ic_spill_part *p)
{
    struct ic_spill_part **at = &s->first;

    while (*at != p)
        at = &(*at)->next;
    *at = p->next;
    p->next = s->first;
    s->first = p;
}

bool ic_spill_has(struct ic_spill *s, const char *salt, const int32_t *tokens, int32_t from, int32_t to, bool whole)
{
    for (struct ic_spill_part *p = s->first; p; p = p->next)
        if (p->from <= from && (whole ? p->to == to : p->to >= to) && strcmp(p->salt, salt) == 0 &&
            memcmp(p->tokens, tokens, sizeof *tokens * (size_t)to) == 0) {
            to_front(s, p);
            return true;
        }
    return false;
}

static void drop_covered(struct ic_spill *s, const struct ic_spill_part *by)
{
    for (struct ic_spill_part *p = s->first, *next; p; p = next) {
        next = p->next;
        if (by->from <= p->from && by->to >= p->to && strcmp(p->salt, by->salt) == 0 &&
            memcmp(p->tokens, by->tokens, sizeof *p->tokens * (size_t)p->to) == 0)
            ic_spill_drop(s, p);
    }
}

bool ic_spill_put(struct ic_spill *s, const char *salt, int32_t *tokens, int32_t from, int32_t to, void *data, size_t bytes,
                  bool whole)
{
    struct ic_spill_part *p = calloc(1, sizeof *p);

    if (p) {
        *p = (struct ic_spill_part){.from = from, .to = to, .tokens = tokens, .data = data, .bytes = bytes};
        memcpy(p->salt, salt, strnlen(salt, IC_SALT_MAX));
    }
    if (!p || cost(p) > s->max) {
        free(p);
        free(tokens);
        free(data);
        return false;
    }
    if (!whole)
        drop_covered(s, p);
    while (s->sum + cost(p) > s->max) {
        struct ic_spill_part *last = s->first;
        while (last->next)
            last = last->next;
        ic_spill_drop(s, last);
    }
    p->next = s->first;
    s->first = p;
    s->sum += cost(p);
    s->count++;
    return true;
}

struct ic_spill_part *ic_spill_find(struct ic_spill *s, const char *salt, const int32_t *tokens, int32_t n,
                                    int32_t have, bool whole, int32_t *reach)
{
    struct ic_spill_part *best = NULL;

    *reach = have;
    for (struct ic_spill_part *p = s->first; p; p = p->next) {
        int32_t k = 0, end = p->to < n ? p->to : n;
        if (p->from > have || end <= *reach || strcmp(p->salt, salt) != 0)
            continue;
        while (k < end && p->tokens[k] == tokens[k])
            k++;
        if (k > *reach && (!whole || k == p->to)) {
            best = p;
            *reach = k;
        }
    }
    if (best)
        to_front(s, best);
    return best;
}

void ic_spill_clear(struct ic_spill *s)
{
    while (s->first)
        ic_spill_drop(s, s->first);
}
