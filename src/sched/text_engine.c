/* The text engine's thread. Everything that reaches it comes through one locked list of commands and the cancel
 * flags of requests; everything that leaves it goes into `events`. */
#include "sched/text_engine.h"

#include <pthread.h>
#include <stdlib.h>

#include "base/altstack.h"
#include "base/clock.h"
#include "base/log.h"
#include "hw/cpu.h"

#define HAND_OVER_NS IC_MS /* longer, and a loop that is busy with something else would slow down every stream */

enum command_kind { CMD_SUBMIT, CMD_SESSION_CLOSE };

struct command {
    struct command *next;
    enum command_kind kind;
    struct ic_text_req *req;
    uint64_t session;
};

struct ic_text_engine {
    struct ic_text_engine_config cfg;
    struct ic_events *events;
    struct ic_text_model *model; /* the thread's; read-only parts for others once READY */
    struct ic_text_backend be;
    struct ic_text_sched *sched;
    struct ic_text_counters counters;
    struct ic_err err;
    _Atomic(enum ic_engine_state) state;
    _Atomic int64_t beat;
    _Atomic int32_t inbox_requests;
    atomic_bool stop, draining;
    pthread_t thread;
    pthread_mutex_t lock; /* guards the list and `kicked` */
    pthread_cond_t wake;
    struct command *head, **tail;
    bool kicked;
    bool hand_over; /* computing takes every core: the loop needs one lent to it */
};

/* ---- the real model behind the scheduler ---------------------------------------------------------------- */

static enum ic_status be_tokenize(void *arg, const char *text, size_t len, bool first, int32_t max, int32_t **out,
                                  int32_t *n, struct ic_err *err)
{
    struct ic_text_engine *e = arg;
    return first ? ic_text_tokenize(e->model, text, len, true, false, max, out, n, err)
                 : ic_text_tokenize_more(e->model, text, len, max, out, n, err);
}

static enum ic_status be_chat(void *arg, const struct ic_chat_msg *msgs, size_t n_msgs, int32_t max, int32_t **out,
                              int32_t *n, struct ic_err *err)
{
    struct ic_text_engine *e = arg;
    return ic_text_chat_tokenize(e->model, msgs, n_msgs, max, out, n, err);
}

static enum ic_decode be_decode(void *arg, const struct ic_row *rows, int32_t n)
{
    struct ic_text_engine *e = arg;
    atomic_store(&e->beat, ic_now_ns());
    if (e->hand_over) /* else the tokens of the last tick may wait until this one is computed */
        ic_events_hand_over(e->events, HAND_OVER_NS);
    ic_turn_take(e->cfg.turn);
    int64_t t0 = ic_now_ns();
    enum ic_decode rc = ic_text_decode(e->model, rows, n);
    int64_t t1 = ic_now_ns();
    ic_turn_give(e->cfg.turn);
    ic_governor_pause_ns(e->cfg.governor, t1 - t0, t1); /* booked here, rested between ticks */
    return rc;
}

static bool be_seq_rm(void *arg, int32_t seq, int32_t from)
{
    struct ic_text_engine *e = arg;
    return ic_text_seq_rm(e->model, seq, from);
}

static void be_piece(void *arg, int32_t token, struct ic_buf *out)
{
    struct ic_text_engine *e = arg;
    ic_text_piece(e->model, token, out);
}

static enum ic_status be_sampler_open(void *arg, void **sampler, const struct ic_text_params *p, const int32_t *prompt,
                                      int32_t n, struct ic_err *err)
{
    struct ic_text_engine *e = arg;
    struct ic_sampler *s;
    enum ic_status st = ic_sampler_open(&s, e->model, p, prompt, n, err);
    *sampler = s;
    return st;
}

static enum ic_status be_draw(void *arg, void *sampler, int32_t row, struct ic_sampled *out, struct ic_err *err)
{
    struct ic_text_engine *e = arg;
    const float *logits = ic_text_logits(e->model, row);
    return logits ? ic_sampler_draw(sampler, logits, out, err) : ic_fail(err, IC_INTERNAL, "a row has no logits");
}

static void be_sampler_close(void *arg, void *sampler)
{
    struct ic_sampler *s = sampler;
    (void)arg;
    ic_sampler_close(&s);
}

static enum ic_status be_sampler_rebind(void *arg, void *sampler, const struct ic_text_params *p, const int32_t *said,
                                        int32_t n, struct ic_err *err)
{
    struct ic_text_engine *e = arg;
    return ic_sampler_rebind(sampler, e->model, p, said, n, err);
}

static int64_t be_now(void *arg)
{
    (void)arg;
    return ic_now_ns();
}

static void be_emit(void *arg, struct ic_event *ev)
{
    struct ic_text_engine *e = arg;
    ic_events_put(e->events, ev);
}

static bool should_abort(void *arg)
{
    struct ic_text_engine *e = arg;
    return atomic_load(&e->stop) || ic_text_sched_batch_is_dead(e->sched);
}

/* ---- the thread -------------------------------------------------------------------------------------------- */

static void set_state(struct ic_text_engine *e, enum ic_engine_state st)
{
    atomic_store(&e->state, st);
    e->events->wake(e->events->wake_arg);
}

static enum ic_status load(struct ic_text_engine *e)
{
    enum ic_status st = ic_text_model_open(&e->model, &e->cfg.model, &e->err);

    if (st != IC_OK)
        return st;
    const struct ic_text_info *i = ic_text_model_info(e->model);
    e->hand_over = i->threads >= ic_cpu_cores();
    e->be = (struct ic_text_backend){
        .arg = e,
        .ctx_size = i->ctx_size,
        .kv_size = i->kv_size,
        .parallel = i->parallel,
        .batch = i->batch,
        .n_vocab = i->n_vocab,
        .tokenize = be_tokenize,
        .chat = be_chat,
        .decode = be_decode,
        .seq_rm = be_seq_rm,
        .piece = be_piece,
        .sampler_open = be_sampler_open,
        .draw = be_draw,
        .sampler_close = be_sampler_close,
        .sampler_rebind = be_sampler_rebind,
        .now_ns = be_now,
        .emit = be_emit,
    };
    if ((st = ic_text_sched_open(&e->sched, &e->be, &e->counters, &e->err)) == IC_OK)
        ic_text_set_abort(e->model, should_abort, e);
    return st;
}

/* Waits for a command or a kick until `until` (ic_now_ns; 0: not at all, INT64_MAX: for ever), then detaches the
 * commands and runs them. */
static void take_commands(struct ic_text_engine *e, int64_t until)
{
    struct timespec ts = {(time_t)(until / 1000000000), (long)(until % 1000000000)};

    pthread_mutex_lock(&e->lock);
    while (!e->head && !e->kicked && !atomic_load(&e->stop) && until > ic_now_ns()) {
        atomic_store(&e->beat, 0);
        if (until == INT64_MAX)
            pthread_cond_wait(&e->wake, &e->lock);
        else
            pthread_cond_timedwait(&e->wake, &e->lock, &ts);
    }
    struct command *c = e->head, *next;
    e->head = NULL;
    e->tail = &e->head;
    e->kicked = false;
    pthread_mutex_unlock(&e->lock);
    atomic_store(&e->beat, ic_now_ns());

    for (; c; c = next) {
        next = c->next;
        if (c->kind == CMD_SUBMIT) {
            atomic_fetch_sub(&e->inbox_requests, 1);
            ic_text_sched_submit(e->sched, c->req);
        } else {
            ic_text_sched_session_close(e->sched, c->session);
        }
        free(c);
    }
}

/* Rests where the governor says so, in pieces, obeying cancels, deadlines and commands meanwhile. False: go on. */
static bool rest(struct ic_text_engine *e, bool *busy)
{
    int64_t now = ic_now_ns(), ns = ic_governor_pause_ns(e->cfg.governor, 0, now), until = now + ns;

    if (ns <= 0)
        return false;
    *busy = ic_text_sched_reap(e->sched, &until);
    if (*busy)
        take_commands(e, until);
    return true;
}

static void *engine_main(void *arg)
{
    struct ic_text_engine *e = arg;
    bool busy = false;

    ic_altstack_here();
    if (load(e) != IC_OK) {
        set_state(e, IC_ENGINE_FAILED);
        return NULL;
    }
    set_state(e, atomic_load(&e->draining) ? IC_ENGINE_DRAINING : IC_ENGINE_READY);
    while (!atomic_load(&e->stop)) {
        take_commands(e, busy ? 0 : INT64_MAX);
        if (!rest(e, &busy))
            busy = ic_text_sched_tick(e->sched);
    }
    take_commands(e, 0);
    ic_text_sched_close(&e->sched);
    set_state(e, IC_ENGINE_STOPPED);
    return NULL;
}

/* ---- from other threads ------------------------------------------------------------------------------------ */

enum ic_status ic_text_engine_start(struct ic_text_engine **out, const struct ic_text_engine_config *cfg,
                                    struct ic_events *events, struct ic_err *err)
{
    struct ic_text_engine *e = calloc(1, sizeof *e);
    pthread_condattr_t attr;

    *out = NULL;
    if (!e)
        return ic_fail(err, IC_OOM, "out of memory");
    e->cfg = *cfg;
    e->events = events;
    e->tail = &e->head;
    pthread_mutex_init(&e->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&e->wake, &attr);
    pthread_condattr_destroy(&attr);
    if (pthread_create(&e->thread, NULL, engine_main, e) != 0) {
        free(e);
        return ic_fail(err, IC_OOM, "no thread for the text engine");
    }
    pthread_setname_np(e->thread, "ic-text");
    *out = e;
    return IC_OK;
}

enum ic_engine_state ic_text_engine_state(const struct ic_text_engine *e)
{
    return atomic_load(&e->state);
}

const struct ic_err *ic_text_engine_error(const struct ic_text_engine *e)
{
    return &e->err;
}

const struct ic_text_info *ic_text_engine_info(const struct ic_text_engine *e)
{
    enum ic_engine_state st = atomic_load(&e->state);
    return st == IC_ENGINE_READY || st == IC_ENGINE_DRAINING ? ic_text_model_info(e->model) : NULL;
}

const struct ic_text_model *ic_text_engine_model(const struct ic_text_engine *e)
{
    return ic_text_engine_info(e) ? e->model : NULL;
}

struct ic_text_counters *ic_text_engine_counters(struct ic_text_engine *e)
{
    return &e->counters;
}

int64_t ic_text_engine_beat(const struct ic_text_engine *e)
{
    return atomic_load(&e->beat);
}

static void put_command(struct ic_text_engine *e, struct command *c)
{
    pthread_mutex_lock(&e->lock);
    if (c) {
        *e->tail = c;
        e->tail = &c->next;
    }
    e->kicked = true;
    pthread_cond_signal(&e->wake);
    pthread_mutex_unlock(&e->lock);
}

enum ic_status ic_text_engine_submit(struct ic_text_engine *e, struct ic_text_req *req, struct ic_err *err)
{
    switch (atomic_load(&e->state)) {
    case IC_ENGINE_READY: break;
    case IC_ENGINE_LOADING: return ic_fail(err, IC_UNAVAILABLE, "the model is being loaded");
    case IC_ENGINE_FAILED: return ic_fail(err, IC_UNAVAILABLE, "the model could not be loaded");
    default: return ic_fail(err, IC_UNAVAILABLE, "the server is shutting down");
    }
    if (atomic_load(&e->counters.waiting) + atomic_load(&e->inbox_requests) >= e->cfg.queue_max)
        return ic_fail(err, IC_BUSY, "the queue is full (%d requests are waiting)", e->cfg.queue_max);
    struct command *c = calloc(1, sizeof *c);
    if (!c)
        return ic_fail(err, IC_OOM, "out of memory");
    c->kind = CMD_SUBMIT;
    c->req = req;
    ic_log_about(&(struct ic_log_ids){.rid = req->rid, .owner = req->owner}, IC_LOG_DEBUG, "request",
                 "taken: %zu bytes or %zu messages, at most %d tokens", req->prompt_len, req->n_msgs,
                 (int)req->params.max_tokens);
    atomic_fetch_add(&e->inbox_requests, 1);
    put_command(e, c);
    return IC_OK;
}

void ic_text_engine_session_close(struct ic_text_engine *e, uint64_t session)
{
    struct command *c = calloc(1, sizeof *c);

    if (!c) {
        ic_error("text", "out of memory: a closed session keeps its tokens until the end");
        return;
    }
    c->kind = CMD_SESSION_CLOSE;
    c->session = session;
    put_command(e, c);
}

void ic_text_engine_kick(struct ic_text_engine *e)
{
    put_command(e, NULL);
}

void ic_text_engine_drain(struct ic_text_engine *e)
{
    enum ic_engine_state ready = IC_ENGINE_READY;

    atomic_store(&e->draining, true);
    atomic_compare_exchange_strong(&e->state, &ready, IC_ENGINE_DRAINING);
}

void ic_text_engine_stop(struct ic_text_engine **ep)
{
    struct ic_text_engine *e = *ep;

    if (!e)
        return;
    atomic_store(&e->stop, true);
    put_command(e, NULL);
    pthread_join(e->thread, NULL);
    ic_text_sched_close(&e->sched);
    ic_text_model_close(&e->model);
    for (struct command *c = e->head, *next; c; c = next) {
        next = c->next;
        if (c->kind == CMD_SUBMIT)
            ic_text_req_unref(c->req);
        free(c);
    }
    pthread_mutex_destroy(&e->lock);
    pthread_cond_destroy(&e->wake);
    free(e);
    *ep = NULL;
}
