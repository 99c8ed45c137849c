#include "sched/session.h"

#include <stdlib.h>
#include <string.h>

static struct ic_session **place(struct ic_sessions *t, uint64_t handle)
{
    struct ic_session **p = &t->bucket[handle % IC_SESSION_BUCKETS];
    while (*p && (*p)->handle != handle)
        p = &(*p)->next;
    return p;
}

struct ic_session *ic_session_find(struct ic_sessions *t, uint64_t handle)
{
    return *place(t, handle);
}

struct ic_session *ic_session_get(struct ic_sessions *t, uint64_t handle)
{
    struct ic_session **p = place(t, handle);

    if (!*p && (*p = calloc(1, sizeof **p))) {
        (*p)->handle = handle;
        t->count++;
    }
    return *p;
}

static void free_msgs(struct ic_chat_msg *m, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        free((char *)m[i].role);
        free((char *)m[i].content);
    }
}

void ic_session_drop(struct ic_sessions *t, struct ic_session *s)
{
    struct ic_session **p = place(t, s->handle);

    IC_ASSERT(*p == s);
    *p = s->next;
    t->count--;
    free_msgs(s->msgs, s->n_msgs);
    free(s->msgs);
    free(s->tokens);
    free(s);
}

struct ic_chat_msg *ic_session_join(const struct ic_session *s, const struct ic_chat_msg *more, size_t n,
                                    size_t *n_out)
{
    struct ic_chat_msg *all = malloc(sizeof *all * (s->n_msgs + n + 1));

    if (!all)
        return NULL;
    if (s->n_msgs)
        memcpy(all, s->msgs, sizeof *all * s->n_msgs);
    memcpy(all + s->n_msgs, more, sizeof *all * n);
    *n_out = s->n_msgs + n;
    return all;
}

bool ic_session_add_msgs(struct ic_session *s, const struct ic_chat_msg *more, size_t n)
{
    if (s->n_msgs + n > IC_SESSION_MSGS_MAX)
        return false;
    struct ic_chat_msg *all = realloc(s->msgs, sizeof *all * (s->n_msgs + n));
    if (!all)
        return false;
    s->msgs = all;
    for (size_t i = 0; i < n; i++) {
        struct ic_chat_msg m = {strdup(more[i].role), strdup(more[i].content)};
        if (!m.role || !m.content) {
            free_msgs(&m, 1);
            free_msgs(s->msgs + s->n_msgs, i);
            return false;
        }
        s->msgs[s->n_msgs + i] = m;
    }
    s->n_msgs += n;
    return true;
}

void ic_session_cut_msgs(struct ic_session *s, size_t keep)
{
    free_msgs(s->msgs + keep, s->n_msgs - keep);
    s->n_msgs = keep;
}
