/* A text request and the events it causes: all that passes between the protocol (loop thread) and the text
 * engine (its own thread).
 *
 * A request has two holders, the protocol and the engine, and a count of them; it is immutable once
 * submitted but for `cancel`, which either side may set and the engine obeys within one tick. Connections are
 * named by number (`owner`), never by pointer. */
#ifndef IC_SCHED_REQUEST_H
#define IC_SCHED_REQUEST_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "text/model.h"
#include "text/sample.h"

enum ic_priority { IC_PRIO_LOW, IC_PRIO_NORMAL, IC_PRIO_HIGH };

enum ic_cancel {
    IC_CANCEL_NONE,
    IC_CANCEL_ABORT,    /* the client asked: `end` with reason abort follows */
    IC_CANCEL_GONE,     /* nobody is listening: no event follows */
    IC_CANCEL_SHUTDOWN, /* the server ends: `error` unavailable and `end` follow */
};

struct ic_text_req {
    atomic_int refs;
    _Atomic(enum ic_cancel) cancel;
    uint64_t rid;     /* unique in this process */
    uint64_t owner;   /* whom events go to; the protocol's number for the connection */
    uint64_t session; /* a conversation that goes on, 0: none */
    enum ic_priority priority;
    int64_t arrival_ns;  /* ic_now_ns() at submission */
    int64_t deadline_ns; /* 0: none */
    char *prompt;        /* raw text (UTF-8, owned), or NULL and messages */
    size_t prompt_len;
    struct ic_chat_msg *msgs; /* owned, with their strings */
    size_t n_msgs;
    struct ic_text_params params;
};

/* One holder, defaults in params, arrival now. NULL when out of memory. */
struct ic_text_req *ic_text_req_new(void);
struct ic_text_req *ic_text_req_ref(struct ic_text_req *r);
void ic_text_req_unref(struct ic_text_req *r); /* accepts NULL; the last holder frees */

enum ic_event_kind {
    IC_EVENT_QUEUED, /* has to wait; index is its place in the queue, 1 the next */
    IC_EVENT_TOKEN,  /* text; index, prob, top */
    IC_EVENT_END,    /* reason, stats. The last event of a request that had been admitted or queued. */
    IC_EVENT_ERROR,  /* code, text. An END with reason error follows when `more`, else it is the last. */
};

#define IC_END_TABLE(X) X(STOP, "stop") X(LENGTH, "length") X(ABORT, "abort") X(DEADLINE, "deadline") X(ERROR, "error")
enum ic_end_reason {
#define X(symbol, name) IC_END_##symbol,
    IC_END_TABLE(X)
#undef X
};
const char *ic_end_name(enum ic_end_reason r);

struct ic_text_stats {
    double total_ms; /* from arrival to end */
    double ttft_ms;  /* from arrival to the first sampled token; 0: none was */
    double queue_ms; /* from arrival to admission */
    double tps;      /* tokens after the first per second since the first */
    int32_t prompt_tokens, cached_tokens, tokens;
};

struct ic_event_top {
    float logprob;
    uint32_t off, len; /* the token's text inside `text` */
};

/* Made by the engine, freed by whoever takes it off the queue (free()). */
struct ic_event {
    struct ic_event *next;
    uint64_t owner, rid;
    enum ic_event_kind kind;
    bool more;
    enum ic_status code;
    enum ic_end_reason reason;
    int32_t index;
    float prob;
    int64_t stamp_ns; /* TOKEN: when it was sampled */
    struct ic_text_stats stats;
    int32_t n_top;
    struct ic_event_top top[IC_LOGPROBS_MAX];
    size_t len;  /* bytes of the content at the start of `text` */
    char text[]; /* content, then the texts of `top`; NUL-terminated */
};

#endif
