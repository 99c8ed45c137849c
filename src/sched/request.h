/* A text request, and the events that both engines cause: what passes between the protocol (loop thread) and the
 * engines (a thread each).
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
#include "law/metrics.h"
#include "law/views.h"
#include "sched/prefix.h"
#include "text/model.h"
#include "text/pooling.h"
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
    /* who shares with the others fairly: a number of the key, or of the connection without one */
    uint64_t client;
    char salt[IC_SALT_MAX + 1]; /* the key space of its cached prefixes; "": the common one */
    enum ic_priority priority;
    int64_t arrival_ns;  /* ic_now_ns() at submission */
    int64_t deadline_ns; /* 0: none */
    char *prompt;        /* raw text (UTF-8, owned), or NULL and messages */
    size_t prompt_len;
    struct ic_chat_msg *msgs; /* owned, with their strings */
    size_t n_msgs;
    struct ic_text_params params;
    /* not NONE: no text is wanted but the vector of the prompt; of params nothing counts then */
    enum ic_pooling pooling;
};

/* One holder, defaults in params, arrival now. NULL when out of memory. */
struct ic_text_req *ic_text_req_new(void);
struct ic_text_req *ic_text_req_ref(struct ic_text_req *r);
void ic_text_req_unref(struct ic_text_req *r); /* accepts NULL; the last holder frees */

enum ic_event_kind {
    IC_EVENT_QUEUED,    /* has to wait; index is its place in the queue, 1 the next */
    IC_EVENT_TOKEN,     /* text; index, prob, top */
    IC_EVENT_EMBEDDING, /* text[0..len): float32, of length 1. The END follows */
    IC_EVENT_END,       /* reason, stats. The last event of a request that had been admitted or queued. */
    IC_EVENT_ERROR,     /* code, text. An END with reason error follows when `more`, else it is the last. */
    /* Law M; `sim` tells which and how it is */
    IC_EVENT_SIM_CREATED,
    IC_EVENT_SIM_STATUS, /* answers a command, or the run is over */
    IC_EVENT_SIM_FRAME,  /* text[0..len): pixels (frame.bytes), extras; frame, metrics */
    IC_EVENT_SIM_STATE,  /* text[0..len): psi, float32 [H,W,d,2], then h and c where the law has memory */
    IC_EVENT_SIM_CLOSED,
    IC_EVENT_SIM_PREDICTED, /* text[0..len): psi, then h and c where the law has memory */
};

/* Counts the frames of one simulation that are on their way to the network. */
struct ic_sim_credit {
    atomic_int refs, in_flight;
};
void ic_sim_credit_unref(struct ic_sim_credit *c);

/* Arrays of float32 that a frame may carry behind its pixels, in this order (law/extras.h; h, w: the whole grid). */
enum {
    IC_EXTRA_HSV = 1,       /* hue [h,w], value [h,w] */
    IC_EXTRA_COMPLEX = 2,   /* re [h,w], im [h,w] */
    IC_EXTRA_FLOW = 4,      /* dx, dy, magnitude, [h,w] each */
    IC_EXTRA_ATTRACTOR = 8, /* re, im, abs of channel 0, then of channel 1 */
    IC_EXTRA_POINCARE = 16, /* [n_poincare][2] */
};

/* How a simulation is, in every event about it. */
struct ic_sim_info {
    uint64_t sim;
    unsigned law, height, width, d;
    int64_t step, left; /* steps done; steps still to do, -1: until paused */
    bool running;
    double gamma, rate, fps;
    int64_t every;
    uint64_t seed;
    size_t bytes; /* of its state */
    struct ic_view_request view;
    struct ic_view_frame frame; /* SIM_FRAME */
    unsigned extras;            /* SIM_FRAME: which follow the pixels */
    size_t n_poincare;
    bool has_metrics;
    struct ic_law_metrics metrics; /* SIM_FRAME, when has_metrics */
    struct ic_sim_credit *credit;  /* SIM_FRAME: one count of it belongs to the event */
};

#define IC_END_TABLE(X)                                                                                    \
    X(STOP, "stop") X(LENGTH, "length") X(ABORT, "abort") X(DEADLINE, "deadline") X(ERROR, "error")
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

/* Made by an engine, freed with ic_event_free by whoever takes it off the queue. */
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
    union {
        struct {
            struct ic_text_stats stats;
            int32_t n_top;
            struct ic_event_top top[IC_LOGPROBS_MAX];
        };
        struct ic_sim_info sim;
    };
    size_t len;  /* bytes of the content at the start of `text` */
    char text[]; /* content, then the texts of `top`; NUL-terminated */
};

/* Also gives a frame's credit back: its simulation may send another. Any thread; accepts NULL. */
void ic_event_free(struct ic_event *ev);

#endif
