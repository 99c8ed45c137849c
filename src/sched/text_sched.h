/* The text scheduler: which tokens of which requests go into the next decode.
 *
 * Pure policy over a struct ic_text_backend: no thread, no lock and no clock of its own, so that it can be
 * replayed with a fake model and a fake time. All calls on one thread. */
#ifndef IC_SCHED_TEXT_SCHED_H
#define IC_SCHED_TEXT_SCHED_H

#include "base/hist.h"
#include "sched/events.h"
#include "sched/request.h"
#include "text/draft.h"

/* What the operator decides. Zeros: the defaults. */
struct ic_text_policy {
    /* longest gap between two tokens of a stream because of others' prompts; 0: 3 times without */
    double itl_bound_ns;
    int32_t queue_per_client; /* requests of one client that may wait; 0: no bound of its own */
    /* tokens in common with another's prompt, from which on they are not computed again; 0: 32 */
    int32_t share_min;
    size_t cache_ram;    /* bytes of host memory for KV that had to leave the cache; 0: none */
    bool no_speculation; /* no guesses from what stands in a stream's own text */
    bool shift; /* a full context drops its older half and goes on, instead of ending with `length` */
};

struct ic_spill_disk;

/* What the scheduler needs of a model. The real one is text/, wrapped in text_engine.c. */
struct ic_text_backend {
    void *arg;
    int32_t ctx_size, kv_size, parallel, batch, n_vocab; /* as in struct ic_text_info */
    /* rows of a decode that may ask for logits: parallel, and what is beyond it for proposals */
    int32_t outputs;
    int32_t n_embd; /* numbers of a hidden state; 0: none can be had, `embedding` is not called */
    int32_t n_seq;  /* sequences that can be held: parallel, and those that only keep what they have */
    /* Cells that nobody uses are passed over by every row of every decode. More than these go to host memory (cache_ram) even beside
     * streams, whence they come back in milliseconds; the others in ic_text_sched_tidy. */
    int32_t idle_cells;
    int32_t window; /* what the memory can do, as in ic_prefix_match: 0: be cut and shared anywhere */
    struct ic_text_policy policy;
    /* below policy.cache_ram (spill.h), borrowed, the same for all back ends; NULL: none */
    struct ic_spill_disk *disk;
    /* Tokens of a prompt (as ic_text_tokenize, special off) and of a conversation (as ic_text_chat_tokenize). */
    enum ic_status (*tokenize)(void *arg, const char *s, size_t len, bool first, int32_t max, int32_t **out,
                               int32_t *n, struct ic_err *err);
    enum ic_status (*chat)(void *arg, const struct ic_chat_msg *msgs, size_t n_msgs, int32_t max,
                           int32_t **out, int32_t *n, struct ic_err *err);
    enum ic_decode (*decode)(void *arg, const struct ic_row *rows, int32_t n);
    bool (*seq_rm)(void *arg, int32_t seq, int32_t from);
    /* The cells of `src` at positions [from, to) belong to `dst` too. Only as `window` allows. */
    void (*seq_cp)(void *arg, int32_t src, int32_t dst, int32_t from, int32_t to);
    /* Copies positions [from, to) of a sequence, which are its end, to malloc'd memory: returns its bytes; 0: cannot,
     * or more than max. window != 0: from is 0. NULL: cannot. */
    size_t (*seq_save)(void *arg, int32_t seq, int32_t from, int32_t to, size_t max, void **data);
    /* Brings [keep_from, to) of what was saved as [from, …) back to the end of a sequence that holds keep_from. Needs
     * free cells for all that was saved. False: not there; the sequence may hold anything from keep_from on. */
    bool (*seq_load)(void *arg, int32_t seq, int32_t from, int32_t keep_from, int32_t to, const void *data,
                     size_t bytes);
    void (*piece)(void *arg, int32_t token, struct ic_buf *out);
    enum ic_status (*sampler_open)(void *arg, void **sampler, const struct ic_text_params *p,
                                   const int32_t *prompt, int32_t n, struct ic_err *err);
    enum ic_status (*draw)(void *arg, void *sampler, int32_t row, struct ic_sampled *out,
                           struct ic_err *err);
    void (*sampler_close)(void *arg, void *sampler);
    /* Hidden state (n_embd numbers) of a row of the last decode that had `embd` set; NULL: there is none. */
    const float *(*embedding)(void *arg, int32_t row);
    /* The model has been opened anew (ic_text_sched_unpark): makes a sampler of the old one go on with the new one.
     * `said`: the n tokens drawn so far. NULL: samplers do not depend on the model. */
    enum ic_status (*sampler_rebind)(void *arg, void *sampler, const struct ic_text_params *p,
                                     const int32_t *said, int32_t n, struct ic_err *err);
    /* The model that guesses ahead, as ic_draft_behind and ic_draft_propose; its sequences are numbered as the model's.
     * After a false it is not called any more. NULL: there is none. */
    int32_t (*draft_behind)(void *arg, int32_t seq, const int32_t *tokens, int32_t n);
    bool (*draft)(void *arg, struct ic_draft_req *reqs, int32_t n);
    int64_t (*now_ns)(void *arg);
    void (*emit)(void *arg, struct ic_event *ev);        /* takes ev */
    void (*lost)(void *arg, const struct ic_lost *lost); /* there was no memory for an event */
};

/* Read by other threads at any time. */
struct ic_text_counters {
    _Atomic int64_t running, waiting, sessions;
    _Atomic int64_t kv_used;                        /* cells, each once, those of idle sequences included */
    _Atomic int64_t spill_bytes, spill_parts;       /* in host memory now */
    _Atomic uint64_t spilled, restored;             /* tokens that went there and came back */
    _Atomic int64_t disk_bytes, disk_parts;         /* on the disk now, or about to be written */
    _Atomic uint64_t disk_put, disk_got, disk_lost; /* tokens; lost: could not be written or read */
    _Atomic uint64_t requests, refused, tokens, prompt_tokens, cached_tokens, preempted, ticks, rows;
    /* tokens proposed beside the next one, and those of them that were right */
    _Atomic uint64_t drafted, accepted;
    _Atomic uint64_t ended[IC_END_ERROR + 1];
    _Atomic double last_tps, last_ttft_ms;
    struct ic_hist ttft, itl, queue, tick;
};

struct ic_text_sched;

/* `be` and `c` are borrowed and must outlive it. */
enum ic_status ic_text_sched_open(struct ic_text_sched **out, const struct ic_text_backend *be,
                                  struct ic_text_counters *c, struct ic_err *err);
void ic_text_sched_close(struct ic_text_sched **s); /* ends what is left with IC_CANCEL_SHUTDOWN */

/* A prompt that others will begin with (copied): computed now and kept for good, found by every key space. Before the
 * first request. IC_TOO_LARGE: it does not fit beside one whole context. Models that cannot share ignore it. */
enum ic_status ic_text_sched_pin(struct ic_text_sched *s, const int32_t *tokens, int32_t n,
                                 struct ic_err *err);

/* The same of a text file: as it begins raw prompts and, with `chat`, as the system's turn of conversations. IC_NOT_FOUND,
 * IC_BAD_REQUEST: not a text. */
enum ic_status ic_text_pin_file(struct ic_text_sched *s, const struct ic_text_backend *be, const char *path,
                                bool chat, struct ic_err *err);

/* Takes the caller's reference. What becomes of it is told by events only. */
void ic_text_sched_submit(struct ic_text_sched *s, struct ic_text_req *req);
/* Ends the session's requests as aborted and forgets the conversation (what it computed stays for whoever of the same
 * key space begins alike, until its cells are needed). Unknown handles are ignored. */
void ic_text_sched_session_close(struct ic_text_sched *s, uint64_t session);

/* One tick: obeys cancels and deadlines, admits, decodes once, samples, emits. False when there is nothing to do
 * until the next call of another function (or the next cancel). */
bool ic_text_sched_tick(struct ic_text_sched *s);

/* While nobody runs or waits: a piece of what idle sequences hold goes to host memory (cache_ram), as far as there is room, so that
 * the next streams find their cells free and in order. False when there is nothing to do until the next tick. */
bool ic_text_sched_tidy(struct ic_text_sched *s);

/* The part of a tick that computes nothing: obeys cancels and deadlines. Lowers *until (NULL: not wanted), a time on the
 * backend's clock, to the next deadline. False when no request is left. */
bool ic_text_sched_reap(struct ic_text_sched *s, int64_t *until);

/* ---- the model goes and comes back (idle unload, a rebuilt engine) -------------------------------------------
 *
 *      serving ──park──► parked ──unpark──► serving
 *         └───forget_kv───►┘
 *
 * While parked nothing is computed, but all of the above may be called: requests are taken and wait, cancels,
 * deadlines and closed sessions are obeyed. tick() then only reaps, and true means that somebody waits: time to open the
 * model again. Of the old back end only now_ns, emit and sampler_close are called then; `arg` and these three must
 * go on working. No event is sent for parking itself; no token is lost or repeated by it. */

/* Orderly: the device still answers. Running requests go back to the head of the queue; what the KV cache holds
 * of them and of idle sessions is kept in host memory as far as there is room (--cache-ram), the rest is computed
 * again when it is needed. Does nothing when parked. */
void ic_text_sched_park(struct ic_text_sched *s);
/* The device is lost: nothing on it is touched any more. Those that had rows in the last decode fail with IC_INTERNAL
 * and `why`, everybody else who was running goes back to the head of the queue and is computed again. When parked:
 * forgets nothing (what lies in host memory is good), does nothing. */
void ic_text_sched_forget_kv(struct ic_text_sched *s, const char *why);
/* What will come back is another model: all KV of the old one is forgotten, and what was pinned. Requests that are read
 * already end with IC_UNAVAILABLE; conversations of messages go on, those of prompts, which are tokens, are not found any
 * more. Only when parked. */
void ic_text_sched_forget_model(struct ic_text_sched *s);
/* Goes on with `be` (borrowed as in open; may be the old pointer, filled anew), whose sizes may have changed: requests
 * that do not fit any more end with an error. IC_OOM: still parked, try again. Only when parked. */
enum ic_status ic_text_sched_unpark(struct ic_text_sched *s, const struct ic_text_backend *be,
                                    struct ic_err *err);
bool ic_text_sched_is_parked(const struct ic_text_sched *s);
/* All requests end with this error. Only when parked. */
void ic_text_sched_turn_away(struct ic_text_sched *s, const struct ic_err *why);

/* During a decode, from any thread: true when everybody in it has been cancelled. */
bool ic_text_sched_batch_is_dead(void *sched);

#endif
