#include "sched/spill.h"

#include <stdlib.h>
#include <string.h>

static size_t cost(const struct ic_spill_part *p)
{
    return sizeof *p + sizeof *p->tokens * (size_t)p->to + (p->file ? 0 : p->bytes);
}

size_t ic_spill_file_bytes(const struct ic_spill_part *p)
{
    return IC_SPILL_FILE_HEAD + sizeof *p->tokens * (size_t)p->to + p->bytes;
}

static void leave_disk(struct ic_spill *s, struct ic_spill_part *p)
{
    s->disk->drop(s->disk->arg, p->file);
    s->disk_sum -= ic_spill_file_bytes(p);
    s->disk_count--;
}

void ic_spill_drop(struct ic_spill *s, struct ic_spill_part *p)
{
    struct ic_spill_part **at = &s->first;

    while (*at != p)
        at = &(*at)->next;
    *at = p->next;
    s->sum -= cost(p);
    s->count--;
    if (p->file)
        leave_disk(s, p);
    free(p->tokens);
    free(p->data);
    free(p);
}

/* What the disk could not write after all. */
static void drop_failed(struct ic_spill *s)
{
    uint64_t file;

    while (s->disk && s->disk->failed(s->disk->arg, &file))
        for (struct ic_spill_part *p = s->first; p; p = p->next)
            if (p->file == file) {
                s->disk_lost += (uint64_t)(p->to - p->from);
                ic_spill_drop(s, p);
                break;
            }
}

/* The part used longest ago of those from `p` on that lie on the disk (in memory). NULL: none. */
static struct ic_spill_part *last(struct ic_spill_part *p, bool on_disk)
{
    struct ic_spill_part *found = NULL;

    for (; p; p = p->next)
        if ((p->file != 0) == on_disk)
            found = p;
    return found;
}

/* To the disk, where only what was used longer ago goes for it. */
static bool demote(struct ic_spill *s, struct ic_spill_part *p)
{
    size_t bytes = ic_spill_file_bytes(p);
    struct ic_spill_part *older;

    if (!s->disk || bytes > s->disk->max)
        return false;
    while (s->disk_sum + bytes > s->disk->max || s->disk_count >= IC_SPILL_FILES_MAX) {
        if (!(older = last(p->next, true)))
            return false;
        ic_spill_drop(s, older);
    }
    if (!s->disk->put(s->disk->arg, s->last_file + 1, p))
        return false;
    s->sum -= cost(p);
    p->data = NULL;
    p->file = ++s->last_file;
    s->sum += cost(p);
    s->disk_sum += bytes;
    s->disk_count++;
    s->disk_put += (uint64_t)(p->to - p->from);
    return true;
}

/* `bytes` more will fit into memory. Not at the cost of the first part, where `keep_first`. */
static bool make_room(struct ic_spill *s, size_t bytes, bool keep_first)
{
    while (s->sum + bytes > s->max) {
        struct ic_spill_part *from = s->first && keep_first ? s->first->next : s->first,
                             *p = last(from, false);
        if (p && demote(s, p))
            continue;
        if (!p && !(p = last(from, true)))
            return false;
        ic_spill_drop(s, p);
    }
    return true;
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

bool ic_spill_has(struct ic_spill *s, const char *salt, const int32_t *tokens, int32_t from, int32_t to,
                  bool whole)
{
    drop_failed(s);
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

bool ic_spill_put(struct ic_spill *s, const char *salt, int32_t *tokens, int32_t from, int32_t to,
                  void *data, size_t bytes, bool whole)
{
    struct ic_spill_part *p = calloc(1, sizeof *p);

    drop_failed(s);
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
    make_room(s, cost(p), false);
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

    drop_failed(s);
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

bool ic_spill_fetch(struct ic_spill *s, struct ic_spill_part *p)
{
    if (!p->file)
        return true;
    void *data = s->disk->get(s->disk->arg, p->file, p);
    if (!data)
        s->disk_lost += (uint64_t)(p->to - p->from);
    to_front(s, p);
    if (!data || !make_room(s, p->bytes, true)) {
        free(data);
        ic_spill_drop(s, p);
        return false;
    }
    leave_disk(s, p);
    s->disk_got += (uint64_t)(p->to - p->from);
    s->sum -= cost(p);
    p->file = 0;
    p->data = data;
    s->sum += cost(p);
    return true;
}

void ic_spill_clear(struct ic_spill *s)
{
    while (s->first)
        ic_spill_drop(s, s->first);
}
