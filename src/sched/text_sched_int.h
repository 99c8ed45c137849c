/* What the files of the text scheduler share: its state. See text_sched.c for the life of a request, text_cells.c for
 * that of cells, text_queue.c for whose turn it is. */
#ifndef IC_SCHED_TEXT_SCHED_INT_H
#define IC_SCHED_TEXT_SCHED_INT_H

#include "sched/prefix.h"
#include "sched/session.h"
#include "sched/spill.h"
#include "sched/text_cost.h"
#include "sched/text_draft.h"
#include "sched/text_sched.h"
#include "sched/text_spec.h"
#include "text/pooling.h"
#include "text/stream.h"

/* cells kept free for each run at admission, so that it does not come to preemption at once */
#define IC_RESERVE_PER_RUN 16
#define IC_GO_ON_MIN 4 /* tokens of its own session: fewer (a BOS, say) are not worth a copy */
/* Tokens in common with another's prompt: fewer are not worth a wait. And what is computed in another batch may differ in the
 * last bit, of which a 2-bit model makes another word: a chat template (TinyLlama's begins with 7 tokens) must not do
 * that to short questions. */
#define IC_SHARE_MIN 32
/* ticks with prompts beside streams, then one without: what streams cost by themselves may have changed */
#define IC_LOOK_EVERY 16
#define IC_SPILL_MIN 16 /* tokens: fewer are computed sooner than copied twice */
/* idle cells that go to host memory at once, about: whoever streams or comes waits for the copy */
#define IC_TRIM_CELLS 256
/* of host memory so much (one in …) is not filled by them: what lies there would have to go */
#define IC_TRIM_SPARE 8
#define IC_CLIENTS_MAX 1024 /* whose balance is remembered while they ask nothing */
#define IC_TURN_TOKENS 512  /* quantum of the round robin between clients */

/* Whoever shares with the others: a key, or a connection without one. */
struct ic_text_client {
    struct ic_text_client *next; /* in the ring's order */
    uint64_t key;
    int64_t balance; /* tokens that it may still have computed before others have had theirs */
    int32_t n_waiting, n_running;
    int32_t seen;      /* while counting */
    struct run *first; /* while choosing: its first request that could be admitted */
};

struct run {
    struct run *next; /* in the waiting list */
    struct ic_text_req *req;
    struct ic_session *session;
    struct ic_text_client *client;
    int32_t slot;
    int32_t *tokens, n_tokens, cap, n_prompt;
    int32_t n_gen; /* sampled so far */
    /* of the current decode: how many, and the index of the (first) one with logits or -1 */
    int32_t rows, at;
    int32_t first;       /* of the current decode: the index of the first of its rows */
    struct ic_pool pool; /* where a vector is wanted, no text: what has been gathered for it */
    /* proposals of what comes behind it, each with logits: how many rows, and from where */
    int32_t n_draft, draft_at;
    int32_t draft[IC_SPEC_MAX];
    bool draft_by_model; /* they are the draft model's, not from its own text */
    struct ic_spec spec;
    struct ic_draft_stream draft_stream;
    int32_t cached;   /* prompt tokens that were there already */
    int32_t reached;  /* the furthest position that it has held */
    int32_t shifted;  /* tokens dropped from the front of a full context */
    struct run *lead; /* it is computing what this one also begins with: wait for it, up to lead_n */
    int32_t lead_n;
    bool look; /* somebody has left: see what is there now */
    bool prepared, told_queued, admitted_once;
    void *sampler;
    struct ic_stream stream;
    struct ic_buf answer; /* CHAT sessions: what the client has been sent */
    int64_t admit_ns, first_ns, last_ns;
};

/* A sequence of the model. One without a run keeps what it holds for whoever begins alike, until the cells are needed. */
struct slot {
    struct run *run; /* NULL: idle or free */
    int32_t n_past;  /* = ic_prefix_len */
    bool pinned;     /* never evicted */
};

struct ic_pin {
    struct ic_pin *next;
    int32_t *tokens, n;
};

struct ic_text_sched {
    const struct ic_text_backend *be;
    struct ic_text_counters *c;
    struct slot *slots;
    struct run **order; /* running, admitted first to last */
    int32_t n_running, n_slots;
    struct run *waiting;                   /* by priority, then arrival; who has been preempted first */
    struct ic_text_client *clients, *turn; /* turn: who is asked first, NULL: the first */
    int32_t n_clients;
    struct ic_row *rows;
    struct ic_sessions sessions;
    struct ic_prefix *prefix;
    struct ic_spill spill;
    struct ic_pin *pins;
    struct ic_text_cost cost;
    double hope; /* text_spec.h */
    struct ic_drafter drafter;
    double ns_per_byte;      /* of restoring from host memory */
    double disk_ns_per_byte; /* of bringing it there from the disk */
    double service_ns;       /* of a request from admission to end, moving average */
    int32_t streams;         /* rows of the current decode that are streams' next tokens */
    int32_t drafts;          /* … that are proposals */
    int32_t beside;          /* ticks in a row that read prompts beside streams */
    bool trim;               /* slots have become idle: maybe too much is */
    bool parked;             /* there is no model now */
    bool crowded; /* the back end had fewer cells than it said: nobody joins before somebody has ended */
    struct ic_buf text;
};

/* ---- text_events.c */
/* Of this run, with room for `extra` bytes behind its text; NULL: no memory. */
struct ic_event *ic_run_event(const struct run *r, enum ic_event_kind kind, const char *text, size_t len,
                              size_t extra);
void ic_run_emit(struct ic_text_sched *s, const struct run *r,
                 struct ic_event *ev); /* takes ev, which may be NULL */
void ic_run_error(struct ic_text_sched *s, const struct run *r, const struct ic_err *err, bool more);
/* Text that may leave; d: the token that made it so, NULL when the answer is over. */
void ic_run_token(struct ic_text_sched *s, struct run *r, const struct ic_sampled *d,
                  const struct ic_buf *text);

/* ---- text_embed.c */
/* In place of a sampler. IC_BAD_REQUEST: this model is served without. */
enum ic_status ic_embed_open(const struct ic_text_sched *s, struct run *r, struct ic_err *err);
/* Takes the hidden states of the run's rows of this decode. After the last one the vector is sent, and *done set. */
enum ic_status ic_embed_take(struct ic_text_sched *s, struct run *r, bool *done, struct ic_err *err);

/* ---- text_cells.c */
int32_t ic_cells_free(const struct ic_text_sched *s);
/* Counts what a run has found of its prompt, each token once. */
void ic_cells_credit(struct ic_text_sched *s, struct run *r);
/* Cuts a slot back to its first `keep` tokens; to fewer where the model or memory cannot. */
void ic_cells_cut(struct ic_text_sched *s, int32_t slot, int32_t keep);
/* The rows of this tick have been computed. */
void ic_cells_grow(struct ic_text_sched *s, struct run *r);
/* Frees cells, idle ones that were used longest ago first, until `need` are free. */
bool ic_cells_make_room(struct ic_text_sched *s, int32_t need, int32_t but);
/* Of idle cells beyond `stay` some go to host memory, those at the end of the sequence that was used longest ago. False: nothing is
 * left to do. */
bool ic_cells_trim(struct ic_text_sched *s, int32_t stay);
/* All that one idle sequence holds goes; -1: the one used longest ago. False: there is none. */
bool ic_cells_evict(struct ic_text_sched *s, int32_t slot);
/* A slot for a run with whatever is there of its tokens, and room for the rest. -1: not now. */
int32_t ic_cells_take_slot(struct ic_text_sched *s, struct run *r);
/* Whether it would have a place if all below this priority had none. */
bool ic_cells_would_fit(const struct ic_text_sched *s, const struct run *r, enum ic_priority prio);
/* What lies in host memory of a run that has its slot. */
void ic_cells_restore(struct ic_text_sched *s, struct run *r);
/* The run's neighbours: whether somebody is computing, or has computed, what it needs. */
void ic_cells_find_lead(struct ic_text_sched *s, struct run *r);
void ic_cells_join(struct ic_text_sched *s, struct run *r);
enum ic_status ic_cells_open(struct ic_text_sched *s, const struct ic_text_backend *be, struct ic_err *err);
enum ic_status ic_cells_pin(struct ic_text_sched *s, const struct ic_pin *p, struct ic_err *err);
enum ic_status ic_cells_pin_all(struct ic_text_sched *s, struct ic_err *err);
void ic_cells_park(struct ic_text_sched *s); /* all that is idle to host memory */

/* ---- text_queue.c */
/* The client of this key; NULL: no memory. */
struct ic_text_client *ic_queue_client(struct ic_text_sched *s, uint64_t key);
void ic_queue_put(struct ic_text_sched *s, struct run *r, bool first_of_class);
void ic_queue_remove(struct ic_text_sched *s, struct run *r);
/* Whose turn it is; NULL: nobody could be admitted. */
struct run *ic_queue_pick(struct ic_text_sched *s);
/* It has been admitted. */
void ic_queue_served(struct ic_text_sched *s, struct run *r);
int32_t ic_queue_place(const struct ic_text_sched *s, const struct run *r); /* 1: the next */
void ic_queue_charge(struct ic_text_client *c, int32_t tokens);
void ic_queue_leave(struct ic_text_sched *s, struct ic_text_client *c); /* maybe it has nothing left here */
void ic_queue_clear(struct ic_text_sched *s);

#endif
