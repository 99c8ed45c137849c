/* The text scheduler: which tokens of which requests go into the next decode.
 *
 * Pure policy over a struct ic_text_backend: no thread, no lock and no clock of its own, so that it can be
 * replayed with a fake model and a fake time. All calls on one thread. */
#ifndef IC_SCHED_TEXT_SCHED_H
#define IC_SCHED_TEXT_SCHED_H

#include "base/hist.h"
#include "sched/request.h"

/* What the scheduler needs of a model. The real one is text/, wrapped in text_engine.c. */
struct ic_text_backend {
    void *arg;
    int32_t ctx_size, kv_size, parallel, batch, n_vocab; /* as in struct ic_text_info */
    /* Tokens of a prompt (as ic_text_tokenize, special off) and of a conversation (as ic_text_chat_tokenize). */
    enum ic_status (*tokenize)(void *arg, const char *s, size_t len, bool first, int32_t max, int32_t **out, int32_t *n,
                               struct ic_err *err);
    enum ic_status (*chat)(void *arg, const struct ic_chat_msg *msgs, size_t n_msgs, int32_t max, int32_t **out,
                           int32_t *n, struct ic_err *err);
    enum ic_decode (*decode)(void *arg, const struct ic_row *rows, int32_t n);
    bool (*seq_rm)(void *arg, int32_t seq, int32_t from);
    void (*piece)(void *arg, int32_t token, struct ic_buf *out);
    enum ic_status (*sampler_open)(void *arg, void **sampler, const struct ic_text_params *p, const int32_t *prompt,
                                   int32_t n, struct ic_err *err);
    enum ic_status (*draw)(void *arg, void *sampler, int32_t row, struct ic_sampled *out, struct ic_err *err);
    void (*sampler_close)(void *arg, void *sampler);
    /* The model has been opened anew (ic_text_sched_unpark): makes a sampler of the old one go on with the new one.
     * `said`: the n tokens drawn so far. NULL: samplers do not depend on the model. */
    enum ic_status (*sampler_rebind)(void *arg, void *sampler, const struct ic_text_params *p, const int32_t *said,
                                     int32_t n, struct ic_err *err);
    int64_t (*now_ns)(void *arg);
    void (*emit)(void *arg, struct ic_event *ev); /* takes ev */
};

/* Read by other threads at any time. */
struct ic_text_counters {
    _Atomic int64_t running, waiting, sessions, kv_used;
    _Atomic uint64_t requests, refused, tokens, prompt_tokens, cached_tokens, preempted, ticks, rows;
    _Atomic uint64_t ended[IC_END_ERROR + 1];
    _Atomic double last_tps, last_ttft_ms;
    struct ic_hist ttft, itl, queue, tick;
};

struct ic_text_sched;

/* `be` and `c` are borrowed and must outlive it. */
enum ic_status ic_text_sched_open(struct ic_text_sched **out, const struct ic_text_backend *be,
                                  struct ic_text_counters *c, struct ic_err *err);
void ic_text_sched_close(struct ic_text_sched **s); /* ends what is left with IC_CANCEL_SHUTDOWN */

/* Takes the caller's reference. What becomes of it is told by events only. */
void ic_text_sched_submit(struct ic_text_sched *s, struct ic_text_req *req);
/* Ends the session's requests as aborted and forgets the conversation. Unknown handles are ignored. */
void ic_text_sched_session_close(struct ic_text_sched *s, uint64_t session);

/* One tick: obeys cancels and deadlines, admits, decodes once, samples, emits. False when there is nothing to do
 * until the next call of another function (or the next cancel). */
bool ic_text_sched_tick(struct ic_text_sched *s);

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
/* Goes on with `be` (borrowed as in open; may be the old pointer, filled anew), whose sizes may have changed: requests
 * that do not fit any more end with an error. IC_OOM: still parked, try again. Only when parked. */
enum ic_status ic_text_sched_unpark(struct ic_text_sched *s, const struct ic_text_backend *be, struct ic_err *err);
bool ic_text_sched_is_parked(const struct ic_text_sched *s);

/* During a decode, from any thread: true when everybody in it has been cancelled. */
bool ic_text_sched_batch_is_dead(void *sched);

#endif
