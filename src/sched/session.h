/* Conversations that go on: what is remembered of a session between two requests. Text engine's thread. */
#ifndef IC_SCHED_SESSION_H
#define IC_SCHED_SESSION_H

#include "sched/request.h"

enum ic_session_kind { IC_SESSION_NEW, IC_SESSION_RAW, IC_SESSION_CHAT };

struct ic_session {
    struct ic_session *next; /* in its bucket */
    uint64_t handle;
    enum ic_session_kind kind;
    /* all that has been said, owned; what is in the KV of it is found by them (prefix.h) */
    int32_t *tokens, n_tokens;
    struct ic_chat_msg *msgs; /* CHAT: the turns so far, owned */
    size_t n_msgs;
    bool busy;  /* a request of it is being served */
    bool stale; /* RAW: its tokens are those of a model that is no more */
    int64_t used_ns;
};

#define IC_SESSION_BUCKETS 1024
#define IC_SESSION_MSGS_MAX 4096 /* turns of one conversation */

struct ic_sessions {
    struct ic_session *bucket[IC_SESSION_BUCKETS];
    int64_t count;
};

struct ic_session *ic_session_find(struct ic_sessions *t, uint64_t handle);
struct ic_session *ic_session_get(struct ic_sessions *t, uint64_t handle); /* makes it; NULL: no memory */
void ic_session_drop(struct ic_sessions *t, struct ic_session *s);         /* frees it */

/* The turns so far and then `more`: pointers into both, one malloc'd array. NULL: no memory. */
struct ic_chat_msg *ic_session_join(const struct ic_session *s, const struct ic_chat_msg *more, size_t n,
                                    size_t *n_out);
/* Copies turns to the end. False: no memory or too many, and nothing was added. */
bool ic_session_add_msgs(struct ic_session *s, const struct ic_chat_msg *more, size_t n);
/* Forgets the turns after the first `keep`. */
void ic_session_cut_msgs(struct ic_session *s, size_t keep);

#endif
