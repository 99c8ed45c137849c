/* The text scheduler. See text_sched.h for the contract.
 *
 * A request becomes a run. What is left to decode of a run is always tokens[n_past .. n_tokens): a prompt at first,
 * then the one token sampled last; after a preemption all of it again. So there is one rule for every tick:
 *
 *      submit ──► waiting ──admit──► running ──┬── sampled an end ──► finished (END)
 *                   ▲                  │       ├── cancel, deadline ─► finished (END abort, deadline)
 *                   └────preempt───────┘       └── failure ──────────► finished (ERROR, END error)
 *
 *   waiting: holds no slot; tokens are known unless its session is busy with an earlier request.
 *   running: holds a slot (a llama.cpp sequence) and n_past cells of it.
 *   A slot without a run may still hold the KV of an idle session; it is taken away when somebody needs it, and
 *   computed again when the session goes on.
 *
 * Cells: sum of n_past over all slots never exceeds kv_size. When the running ones outgrow it, idle sessions lose
 * their KV first, then the run admitted last goes back to waiting: nothing is lost, only computed again. One run
 * alone always fits, because ctx_size <= kv_size. */
#include "sched/text_sched.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "sched/session.h"
#include "text/stream.h"

#define RESERVE_PER_RUN 16 /* cells kept free for each run at admission, so that it does not come to preemption at once */
#define SLICE_MIN 4        /* prompt tokens of a tick at least, however slow */
#define ALONE_MIN 32       /* rows of a prompt that is decoded alone, to learn a row's price from it */
#define GAP_FACTOR 3       /* a stream's gap while somebody's prompt is read, over its gap alone */

struct run {
    struct run *next; /* in the waiting list */
    struct ic_text_req *req;
    struct ic_session *session;
    int32_t slot;
    int32_t *tokens, n_tokens, cap, n_prompt;
    int32_t n_keep;   /* tokens of the session's KV that this run reuses */
    int32_t n_gen;    /* sampled so far */
    int32_t rows, at; /* of the current decode: how many, and the index of the one with logits or -1 */
    int32_t cached;
    bool prepared, told_queued, admitted_once;
    void *sampler;
    struct ic_stream stream;
    struct ic_buf answer; /* CHAT sessions: what the client has been sent */
    int64_t admit_ns, first_ns, last_ns;
};

struct slot {
    struct run *run;            /* NULL: idle or free */
    struct ic_session *session; /* whose KV it is, NULL: the run's own or nobody's */
    int32_t n_past;
};

struct ic_text_sched {
    const struct ic_text_backend *be;
    struct ic_text_counters *c;
    struct slot *slots;
    struct run **order; /* running, admitted first to last */
    int32_t n_running, n_slots;
    struct run *waiting;
    struct ic_row *rows;
    struct ic_sessions sessions;
    double ns_decode_tick, ns_prompt_row; /* moving averages, 0: not known yet */
    bool parked;  /* there is no model now */
    bool crowded; /* the back end had fewer cells than it said: nobody joins before somebody has ended */
    struct ic_buf text;
};

/* ---- events ------------------------------------------------------------------------------------------ */

static struct ic_event *new_event(const struct run *r, enum ic_event_kind kind, const char *text, size_t len, size_t extra)
{
    struct ic_event *ev = calloc(1, sizeof *ev + len + extra + 1);

    if (!ev)
        return NULL;
    ev->owner = r->req->owner;
    ev->rid = r->req->rid;
    ev->kind = kind;
    ev->len = len;
    if (len)
        memcpy(ev->text, text, len);
    return ev;
}

static void emit(struct ic_text_sched *s, const struct run *r, struct ic_event *ev)
{
    /* No memory for an event: the client must not be left waiting for it, and cannot be told. Its connection is
     * the only thing that suffers; the protocol notices the missing END when the connection closes. */
    if (ev && atomic_load(&r->req->cancel) != IC_CANCEL_GONE)
        s->be->emit(s->be->arg, ev);
    else
        free(ev);
}

static void emit_error(struct ic_text_sched *s, const struct run *r, const struct ic_err *err, bool more)
{
    struct ic_event *ev = new_event(r, IC_EVENT_ERROR, err->msg, strlen(err->msg), 0);
    if (ev) {
        ev->code = err->code;
        ev->more = more;
    }
    emit(s, r, ev);
}

static void emit_token(struct ic_text_sched *s, struct run *r, const struct ic_sampled *d, const struct ic_buf *text)
{
    struct ic_buf tops = {0};
    struct ic_event_top top[IC_LOGPROBS_MAX];

    for (int32_t i = 0; d && i < d->n_top; i++) {
        top[i] = (struct ic_event_top){d->top[i].logprob, (uint32_t)(text->len + tops.len), 0};
        s->be->piece(s->be->arg, d->top[i].token, &tops);
        top[i].len = (uint32_t)(text->len + tops.len) - top[i].off;
    }
    struct ic_event *ev = new_event(r, IC_EVENT_TOKEN, text->data, text->len, tops.len);
    if (ev) {
        ev->index = d ? r->n_gen - 1 : r->n_gen; /* what was held back leaves with the end-of-generation token */
        ev->stamp_ns = r->last_ns;
        if (d) {
            ev->prob = d->prob;
            ev->n_top = d->n_top;
            memcpy(ev->top, top, sizeof *top * (size_t)d->n_top);
            if (tops.len)
                memcpy(ev->text + text->len, tops.data, tops.len);
        }
    }
    emit(s, r, ev);
    if (r->session && r->session->kind == IC_SESSION_CHAT)
        ic_buf_put(&r->answer, text->data, text->len);
    ic_buf_deinit(&tops);
}

/* ---- slots and cells ----------------------------------------------------------------------------------- */

static int32_t cells_used(const struct ic_text_sched *s)
{
    int32_t n = 0;
    for (int32_t i = 0; i < s->n_slots; i++)
        n += s->slots[i].n_past;
    return n;
}

/* Cells that the running ones will need for what they already have, beyond those they hold. */
static int32_t cells_promised(const struct ic_text_sched *s)
{
    int32_t n = 0;
    for (int32_t i = 0; i < s->n_running; i++)
        n += s->order[i]->n_tokens - s->slots[s->order[i]->slot].n_past + RESERVE_PER_RUN;
    return n;
}

/* Cuts a slot's KV back to `keep` tokens; to nothing where the model cannot cut. */
static void cut(struct ic_text_sched *s, int32_t slot, int32_t keep)
{
    struct slot *sl = &s->slots[slot];

    if (sl->n_past <= keep && keep > 0)
        return;
    if (!s->parked && !s->be->seq_rm(s->be->arg, slot, keep))
        keep = 0;
    sl->n_past = keep;
    if (sl->session && sl->session->n_past > keep)
        sl->session->n_past = keep;
}

/* An idle session loses its KV (it keeps its tokens). */
static void evict(struct ic_text_sched *s, int32_t slot)
{
    struct ic_session *who = s->slots[slot].session;

    cut(s, slot, 0);
    if (who)
        who->slot = -1, who->n_past = 0;
    s->slots[slot].session = NULL;
}

static int32_t oldest_idle(const struct ic_text_sched *s, const struct ic_session *but)
{
    int32_t best = -1;
    for (int32_t i = 0; i < s->n_slots; i++) {
        const struct slot *sl = &s->slots[i];
        if (!sl->run && sl->session && sl->session != but &&
            (best < 0 || sl->session->used_ns < s->slots[best].session->used_ns))
            best = i;
    }
    return best;
}

static int32_t free_slot(const struct ic_text_sched *s)
{
    for (int32_t i = 0; i < s->n_slots; i++)
        if (!s->slots[i].run && !s->slots[i].session)
            return i;
    return -1;
}

/* ---- the end of a run ---------------------------------------------------------------------------------- */

static void remove_running(struct ic_text_sched *s, const struct run *r)
{
    int32_t w = 0;
    for (int32_t i = 0; i < s->n_running; i++)
        if (s->order[i] != r)
            s->order[w++] = s->order[i];
    s->n_running = w;
}

static void insert_waiting(struct ic_text_sched *s, struct run *r, bool first_of_class)
{
    struct run **p = &s->waiting;

    while (*p && ((*p)->req->priority > r->req->priority ||
                  (!first_of_class && (*p)->req->priority == r->req->priority)))
        p = &(*p)->next;
    r->next = *p;
    *p = r;
    atomic_fetch_add(&s->c->waiting, 1);
}

static void remove_waiting(struct ic_text_sched *s, struct run *r)
{
    for (struct run **p = &s->waiting; *p; p = &(*p)->next)
        if (*p == r) {
            *p = r->next;
            atomic_fetch_sub(&s->c->waiting, 1);
            return;
        }
    IC_ASSERT(!"run is waiting");
}

/* The session takes over what was said, or, when nothing was, stays as it was before the request. */
static void give_back_session(struct ic_text_sched *s, struct run *r, bool said)
{
    struct ic_session *se = r->session;

    if (!se || !r->prepared) /* not prepared: it was waiting behind an earlier request of its session */
        return;
    se->busy = false;
    se->used_ns = s->be->now_ns(s->be->arg);
    if (said && se->kind == IC_SESSION_CHAT) {
        ic_buf_put(&r->answer, "", 1);
        struct ic_chat_msg reply = {"assistant", r->answer.failed || !r->answer.data ? "" : r->answer.data};
        size_t before = se->n_msgs;
        said = ic_session_add_msgs(se, r->req->msgs, r->req->n_msgs) && ic_session_add_msgs(se, &reply, 1);
        if (!said)
            ic_session_cut_msgs(se, before);
    }
    if (said) {
        free(se->tokens);
        se->tokens = r->tokens;
        se->n_tokens = r->n_tokens;
        r->tokens = NULL;
        if (r->slot >= 0)
            se->n_past = s->slots[r->slot].n_past;
    } else {
        if (r->slot >= 0) {
            cut(s, r->slot, r->n_keep);
            se->n_past = s->slots[r->slot].n_past;
        }
        if (!se->n_tokens)
            se->kind = IC_SESSION_NEW;
    }
}

static void free_run(struct ic_text_sched *s, struct run *r)
{
    if (r->sampler)
        s->be->sampler_close(s->be->arg, r->sampler);
    ic_stream_deinit(&r->stream);
    ic_buf_deinit(&r->answer);
    ic_text_req_unref(r->req);
    free(r->tokens);
    free(r);
}

/* Lets go of slot and session; the run itself stays. */
static void leave_slot(struct ic_text_sched *s, struct run *r)
{
    struct slot *sl = &s->slots[r->slot];

    sl->run = NULL;
    if (!sl->session)
        cut(s, r->slot, 0);
    remove_running(s, r);
    r->slot = -1;
    atomic_fetch_sub(&s->c->running, 1);
}

/* Ends a run wherever it is. `err` (or NULL) goes out first. */
static void finish(struct ic_text_sched *s, struct run *r, enum ic_end_reason reason, const struct ic_err *err)
{
    int64_t now = s->be->now_ns(s->be->arg);
    struct ic_event *ev = new_event(r, IC_EVENT_END, NULL, 0, 0);

    if (err)
        emit_error(s, r, err, true);
    if (ev) {
        struct ic_text_stats *st = &ev->stats;
        int64_t from = r->req->arrival_ns;
        ev->reason = reason;
        st->total_ms = (double)(now - from) / IC_MS;
        st->ttft_ms = r->first_ns ? (double)(r->first_ns - from) / IC_MS : 0;
        st->queue_ms = (double)((r->admitted_once ? r->admit_ns : now) - from) / IC_MS;
        st->tps = r->n_gen > 1 && r->last_ns > r->first_ns
                      ? (double)(r->n_gen - 1) * 1e9 / (double)(r->last_ns - r->first_ns)
                      : 0;
        st->prompt_tokens = r->n_prompt;
        st->cached_tokens = r->cached;
        st->tokens = r->n_gen;
        if (r->n_gen > 1)
            atomic_store(&s->c->last_tps, st->tps);
    }
    emit(s, r, ev);
    atomic_fetch_add(&s->c->ended[reason], 1);
    give_back_session(s, r, r->n_gen > 0 && reason != IC_END_ERROR);
    if (r->slot >= 0) {
        leave_slot(s, r);
        s->crowded = false;
    } else {
        remove_waiting(s, r);
    }
    free_run(s, r);
}

/* Refused before it was ever taken: one ERROR, no END. The run is in no list yet. */
static void refuse(struct ic_text_sched *s, struct run *r, const struct ic_err *err)
{
    emit_error(s, r, err, false);
    atomic_fetch_add(&s->c->refused, 1);
    free_run(s, r);
}

/* ---- preparing and admitting ---------------------------------------------------------------------------- */

static enum ic_status tokenize_run(struct ic_text_sched *s, struct run *r, int32_t **tokens, int32_t *n, struct ic_err *err)
{
    const struct ic_text_backend *be = s->be;
    const struct ic_text_req *q = r->req;
    struct ic_session *se = r->session;
    int32_t max = be->ctx_size - 1; /* one token at least must fit behind the prompt */
    enum ic_status st;

    if (se && se->kind != IC_SESSION_NEW && (se->kind == IC_SESSION_CHAT) != (q->prompt == NULL))
        return ic_fail(err, IC_BAD_REQUEST, "this session goes on with `%s`",
                       se->kind == IC_SESSION_CHAT ? "messages" : "prompt");
    if (q->prompt) {
        int32_t old = se ? se->n_tokens : 0, *more = NULL;
        st = be->tokenize(be->arg, q->prompt, q->prompt_len, old == 0, max - old > 0 ? max - old : 0, &more, n, err);
        *n += old;
        if (st == IC_OK && *n > max) { /* a full session, and text that makes no token */
            free(more);
            more = NULL;
            st = IC_TOO_LARGE;
        }
        if (st == IC_OK && old) {
            int32_t *all = malloc(sizeof *all * (size_t)*n);
            if (all) {
                memcpy(all, se->tokens, sizeof *all * (size_t)old);
                memcpy(all + old, more, sizeof *all * (size_t)(*n - old));
            } else {
                st = ic_fail(err, IC_OOM, "out of memory");
            }
            free(more);
            more = all;
        }
        *tokens = more;
    } else {
        size_t n_all = q->n_msgs;
        if (se && se->n_msgs + n_all + 1 > IC_SESSION_MSGS_MAX) /* known now, so not found out after the answer */
            return ic_fail(err, IC_TOO_LARGE, "a session holds at most %d turns", IC_SESSION_MSGS_MAX);
        struct ic_chat_msg *all = se ? ic_session_join(se, q->msgs, q->n_msgs, &n_all) : NULL;
        if (se && !all)
            return ic_fail(err, IC_OOM, "out of memory");
        st = be->chat(be->arg, all ? all : q->msgs, n_all, max, tokens, n, err);
        free(all);
    }
    if (st == IC_TOO_LARGE)
        ic_fail(err, st, "the prompt has %d tokens or more; at most %d fit into a context of %d", *n, max, be->ctx_size);
    else if (st == IC_OK && *n == 0)
        st = ic_fail(err, IC_BAD_REQUEST, "the prompt is empty");
    return st;
}

/* Makes the tokens and the sampler of a run whose session, if any, is free. */
static enum ic_status prepare(struct ic_text_sched *s, struct run *r, struct ic_err *err)
{
    struct ic_session *se = r->session;
    int32_t n = 0;
    enum ic_status st = tokenize_run(s, r, &r->tokens, &n, err);

    if (st != IC_OK)
        return st;
    r->n_tokens = r->n_prompt = r->cap = n;
    st = s->be->sampler_open(s->be->arg, &r->sampler, &r->req->params, r->tokens, n, err);
    if (st != IC_OK)
        return st;
    if (se) {
        while (r->n_keep < n - 1 && r->n_keep < se->n_past && r->tokens[r->n_keep] == se->tokens[r->n_keep])
            r->n_keep++;
        se->kind = r->req->prompt ? IC_SESSION_RAW : IC_SESSION_CHAT;
        se->busy = true;
    }
    r->prepared = true;
    return IC_OK;
}

/* Frees cells by taking the KV of idle sessions until `need` are free. */
static bool make_room(struct ic_text_sched *s, int32_t need, const struct ic_session *but)
{
    int32_t victim;

    while (s->be->kv_size - cells_used(s) < need && (victim = oldest_idle(s, but)) >= 0)
        evict(s, victim);
    return s->be->kv_size - cells_used(s) >= need;
}

static bool try_admit(struct ic_text_sched *s, struct run *r)
{
    struct ic_session *se = r->session;
    int32_t slot = se && se->slot >= 0 ? se->slot : free_slot(s);

    if (slot < 0 && (slot = oldest_idle(s, se)) >= 0)
        evict(s, slot);
    if (slot < 0)
        return false;
    if (se && se->slot == slot)
        cut(s, slot, r->n_keep < se->n_past ? r->n_keep : se->n_past);
    /* What is kept is known after the cut only: not every model can keep a part. */
    int32_t need = r->n_tokens - s->slots[slot].n_past + (s->n_running ? cells_promised(s) + RESERVE_PER_RUN : 0);
    if (!make_room(s, need, se))
        return false;

    s->slots[slot].run = r;
    s->slots[slot].session = se;
    if (se) {
        se->slot = slot;
        r->n_keep = s->slots[slot].n_past;
    }
    r->slot = slot;
    s->order[s->n_running++] = r;
    atomic_fetch_add(&s->c->running, 1);
    if (!r->admitted_once) {
        r->admitted_once = true;
        r->admit_ns = s->be->now_ns(s->be->arg);
        r->cached = s->slots[slot].n_past;
        atomic_fetch_add(&s->c->prompt_tokens, (uint64_t)r->n_prompt);
        atomic_fetch_add(&s->c->cached_tokens, (uint64_t)r->cached);
        ic_hist_add(&s->c->queue, r->admit_ns - r->req->arrival_ns);
    }
    return true;
}

static void admit(struct ic_text_sched *s)
{
    struct run *r = s->waiting, *next;
    bool blocked = s->crowded && s->n_running > 0;
    int32_t place = 0;

    for (; r; r = next) {
        next = r->next;
        if (!blocked && !r->prepared && !(r->session && r->session->busy)) {
            struct ic_err err = {0};
            if (prepare(s, r, &err) != IC_OK) {
                if (r->told_queued) { /* the client has been told to wait, so it waits for an END */
                    finish(s, r, IC_END_ERROR, &err);
                } else {
                    remove_waiting(s, r);
                    refuse(s, r, &err);
                }
                continue;
            }
        }
        /* In order: who comes first and does not fit yet is not overtaken. Only a request that waits for its own
         * session lets others pass. */
        if (!blocked && r->prepared) {
            if (try_admit(s, r)) {
                remove_waiting(s, r);
                continue;
            }
            blocked = true;
        }
        place++;
        if (!r->told_queued) {
            struct ic_event *ev = new_event(r, IC_EVENT_QUEUED, NULL, 0, 0);
            if (ev)
                ev->index = place;
            emit(s, r, ev);
            r->told_queued = true;
        }
    }
}

static void preempt_last(struct ic_text_sched *s)
{
    int32_t worst = s->n_running - 1;

    for (int32_t i = s->n_running - 1; i >= 0; i--)
        if (s->order[i]->req->priority < s->order[worst]->req->priority)
            worst = i;
    struct run *r = s->order[worst];
    int32_t slot = r->slot;
    leave_slot(s, r);
    evict(s, slot);
    r->n_keep = 0;
    insert_waiting(s, r, true);
    atomic_fetch_add(&s->c->preempted, 1);
}

/* ---- one decode ----------------------------------------------------------------------------------------- */

static int32_t pending(const struct ic_text_sched *s, const struct run *r)
{
    return r->n_tokens - s->slots[r->slot].n_past;
}

/* Prompt tokens that this tick may carry beside n_decode streams without stretching their gaps too far. */
static int32_t prompt_budget(const struct ic_text_sched *s, int32_t n_decode)
{
    int32_t room = s->be->batch - n_decode;

    if (n_decode == 0 || s->ns_prompt_row <= 0 || s->ns_decode_tick <= 0)
        return n_decode && room > SLICE_MIN ? SLICE_MIN : room;
    double slice = (GAP_FACTOR - 1) * s->ns_decode_tick / s->ns_prompt_row;
    if (slice < SLICE_MIN)
        slice = SLICE_MIN;
    return slice < room ? (int32_t)slice : room;
}

static void add_rows(struct ic_text_sched *s, struct run *r, int32_t count, int32_t *n)
{
    int32_t from = s->slots[r->slot].n_past;

    for (int32_t i = 0; i < count; i++) {
        bool last = from + i + 1 == r->n_tokens;
        s->rows[*n] = (struct ic_row){r->tokens[from + i], from + i, r->slot, last};
        if (last)
            r->at = *n;
        ++*n;
    }
    r->rows = count;
}

/* Fills s->rows: every stream's next token, then prompts in the order of admission. Returns the rows and in
 * *n_prompt how many of them belong to prompts. */
static int32_t build(struct ic_text_sched *s, int32_t *n_prompt)
{
    int32_t n = 0, n_decode = 0;

    for (int32_t i = 0; i < s->n_running; i++)
        n_decode += pending(s, s->order[i]) == 1;
    while (!make_room(s, n_decode, NULL) && s->n_running > 1) {
        preempt_last(s);
        n_decode = 0;
        for (int32_t i = 0; i < s->n_running; i++)
            n_decode += pending(s, s->order[i]) == 1;
    }
    for (int32_t i = 0; i < s->n_running; i++) {
        struct run *r = s->order[i];
        r->rows = 0;
        r->at = -1;
        if (pending(s, r) == 1)
            add_rows(s, r, 1, &n);
    }
    int32_t budget = prompt_budget(s, n_decode), unread = 0;
    for (int32_t i = 0; i < s->n_running; i++)
        unread += s->order[i]->rows ? 0 : pending(s, s->order[i]);
    if (budget > unread)
        budget = unread; /* no idle session loses its cells for rows that nobody has */
    make_room(s, n + budget, NULL);
    int32_t used = cells_used(s);
    for (int32_t i = 0; i < s->n_running && budget > 0; i++) {
        struct run *r = s->order[i];
        int32_t want = pending(s, r), cells = s->be->kv_size - used - n;
        if (r->rows || want > budget)
            want = r->rows ? 0 : budget;
        if (want > cells)
            want = cells;
        if (want > 0) {
            add_rows(s, r, want, &n);
            budget -= want;
        }
    }
    if (n == 0 && s->n_running > 1) /* prompts that block each other: the last one waits */
        preempt_last(s);
    *n_prompt = n - n_decode;
    return n;
}

static void learn_cost(struct ic_text_sched *s, double ns, int32_t n, int32_t n_prompt)
{
    const double keep = 0.8;

    if (n_prompt == 0)
        s->ns_decode_tick = s->ns_decode_tick > 0 ? keep * s->ns_decode_tick + (1 - keep) * ns : ns;
    else if (n_prompt >= SLICE_MIN / 2) {
        double base = s->ns_decode_tick; /* what a tick costs whatever is in it */
        double per = ns > base ? (ns - base) / n_prompt : ns / n;
        if (n == n_prompt && n < ALONE_MIN && s->ns_prompt_row > 0)
            return; /* nearly all of it is the base, or noise: it would make a row look many times dearer */
        s->ns_prompt_row = s->ns_prompt_row > 0 ? keep * s->ns_prompt_row + (1 - keep) * per : per;
    }
}

static bool append_token(struct run *r, int32_t token)
{
    if (r->n_tokens == r->cap) {
        int32_t cap = r->cap + r->cap / 2 + 64;
        int32_t *p = realloc(r->tokens, sizeof *p * (size_t)cap);
        if (!p)
            return false;
        r->tokens = p;
        r->cap = cap;
    }
    r->tokens[r->n_tokens++] = token;
    return true;
}

/* The row of a run has been decoded to its end: sample, send, and see whether it was the last one. */
static void take_token(struct ic_text_sched *s, struct run *r)
{
    const struct ic_text_params *p = &r->req->params;
    struct ic_sampled d;
    struct ic_err err = {0};
    struct ic_buf piece = {0};
    bool over, length;

    if (p->max_tokens == 0) {
        finish(s, r, IC_END_LENGTH, NULL);
        return;
    }
    if (s->be->draw(s->be->arg, r->sampler, r->at, &d, &err) != IC_OK) {
        finish(s, r, IC_END_ERROR, &err);
        return;
    }
    int64_t now = s->be->now_ns(s->be->arg);
    if (!r->first_ns) {
        r->first_ns = now;
        ic_hist_add(&s->c->ttft, now - r->req->arrival_ns);
        atomic_store(&s->c->last_ttft_ms, (double)(now - r->req->arrival_ns) / IC_MS);
    } else {
        ic_hist_add(&s->c->itl, now - r->last_ns);
    }
    r->last_ns = now;
    ic_buf_clear(&s->text);
    if (!d.eog) {
        if (!append_token(r, d.token)) {
            ic_fail(&err, IC_OOM, "out of memory");
            finish(s, r, IC_END_ERROR, &err);
            return;
        }
        r->n_gen++;
        atomic_fetch_add(&s->c->tokens, 1);
        s->be->piece(s->be->arg, d.token, &piece);
        ic_stream_push(&r->stream, piece.data, piece.len, &s->text);
        ic_buf_deinit(&piece);
    }
    length = r->n_tokens >= s->be->ctx_size || (p->max_tokens > 0 && r->n_gen >= p->max_tokens);
    over = d.eog || r->stream.stopped || length;
    if (over && !r->stream.stopped)
        ic_stream_flush(&r->stream, &s->text);
    if (s->text.len)
        emit_token(s, r, d.eog ? NULL : &d, &s->text);
    if (over)
        finish(s, r, d.eog || r->stream.stopped ? IC_END_STOP : IC_END_LENGTH, NULL);
}

/* The decode did not go through: back to the state before it. */
static void undo(struct ic_text_sched *s, enum ic_decode rc)
{
    struct ic_err err = {0};
    int32_t n = s->n_running;

    if (rc == IC_DECODE_FULL) {
        int32_t idle = oldest_idle(s, NULL);
        if (idle >= 0) {
            evict(s, idle);
            return;
        }
        if (n > 1) {
            preempt_last(s);
            s->crowded = true; /* by our own count there is room: it would be let in again at once, for ever */
            return;
        }
        ic_fail(&err, IC_OOM, "the KV cache is full");
    } else if (rc == IC_DECODE_FAILED) {
        ic_fail(&err, IC_INTERNAL, "the model failed to decode");
    }
    for (int32_t i = n - 1; i >= 0; i--) {
        struct run *r = s->order[i];
        if (!r->rows)
            continue;
        struct slot *sl = &s->slots[r->slot];
        int32_t keep = sl->n_past;
        sl->n_past += r->rows; /* maybe there, maybe not: cut() removes them */
        cut(s, r->slot, keep);
        if (err.code)
            finish(s, r, IC_END_ERROR, &err);
    }
}

static void reap(struct ic_text_sched *s, struct run *r, int64_t now)
{
    struct ic_err err = {0};

    switch (atomic_load(&r->req->cancel)) {
    case IC_CANCEL_NONE:
        if (r->req->deadline_ns && now >= r->req->deadline_ns)
            finish(s, r, IC_END_DEADLINE, NULL);
        break;
    case IC_CANCEL_SHUTDOWN:
        ic_fail(&err, IC_UNAVAILABLE, "the server is shutting down");
        finish(s, r, IC_END_ERROR, &err);
        break;
    default: finish(s, r, IC_END_ABORT, NULL);
    }
}

static void note_deadline(const struct run *r, int64_t *until)
{
    if (until && r->req->deadline_ns && r->req->deadline_ns < *until)
        *until = r->req->deadline_ns;
}

bool ic_text_sched_reap(struct ic_text_sched *s, int64_t *until)
{
    int64_t now = s->be->now_ns(s->be->arg);
    struct run *next;

    for (int32_t i = s->n_running - 1; i >= 0; i--)
        reap(s, s->order[i], now);
    for (struct run *r = s->waiting; r; r = next) {
        next = r->next;
        reap(s, r, now);
    }
    for (int32_t i = 0; i < s->n_running; i++)
        note_deadline(s->order[i], until);
    for (struct run *r = s->waiting; r; r = r->next)
        note_deadline(r, until);
    return s->n_running > 0 || s->waiting;
}

bool ic_text_sched_tick(struct ic_text_sched *s)
{
    const struct ic_text_backend *be = s->be;
    int64_t t0 = be->now_ns(be->arg);
    int32_t n_prompt;

    ic_text_sched_reap(s, NULL);
    if (s->parked)
        return s->waiting != NULL;
    admit(s);
    int32_t n = build(s, &n_prompt);
    atomic_store(&s->c->kv_used, cells_used(s));
    atomic_store(&s->c->sessions, s->sessions.count);
    if (n == 0)
        return s->n_running > 0 || s->waiting;

    enum ic_decode rc = be->decode(be->arg, s->rows, n);
    atomic_fetch_add(&s->c->ticks, 1);
    if (rc != IC_DECODE_OK) {
        undo(s, rc);
        return true;
    }
    int64_t t1 = be->now_ns(be->arg);
    ic_hist_add(&s->c->tick, t1 - t0);
    atomic_fetch_add(&s->c->rows, (uint64_t)n);
    learn_cost(s, (double)(t1 - t0), n, n_prompt);
    for (int32_t i = 0; i < s->n_running; i++)
        s->slots[s->order[i]->slot].n_past += s->order[i]->rows;
    for (int32_t i = 0; i < s->n_running;) {
        struct run *r = s->order[i];
        if (r->at >= 0)
            take_token(s, r);
        i += i < s->n_running && s->order[i] == r; /* it may have left the list */
    }
    return true;
}

bool ic_text_sched_batch_is_dead(void *sched)
{
    struct ic_text_sched *s = sched;
    bool any = false;

    for (int32_t i = 0; i < s->n_running; i++)
        if (s->order[i]->rows) {
            if (atomic_load(&s->order[i]->req->cancel) == IC_CANCEL_NONE)
                return false;
            any = true;
        }
    return any;
}

/* ---- the model goes and comes back ------------------------------------------------------------------------- */

/* Back to the head of the queue: nothing is lost, only computed again. */
static void requeue(struct ic_text_sched *s, struct run *r)
{
    int32_t slot = r->slot;

    leave_slot(s, r);
    evict(s, slot);
    r->n_keep = r->rows = 0;
    insert_waiting(s, r, true);
}

/* Everybody leaves; the device has been, or is, emptied. */
static void vacate(struct ic_text_sched *s)
{
    while (s->n_running > 0) /* the last first, so that they come back in their order */
        requeue(s, s->order[s->n_running - 1]);
    for (int32_t i = 0; i < s->n_slots; i++)
        evict(s, i);
    s->crowded = false;
    s->parked = true;
    atomic_store(&s->c->kv_used, 0);
}

void ic_text_sched_park(struct ic_text_sched *s)
{
    if (!s->parked)
        vacate(s);
}

void ic_text_sched_forget_kv(struct ic_text_sched *s, const char *why)
{
    struct ic_err err = {0};

    if (s->parked)
        return;
    s->parked = true; /* from here on nothing on the device is touched */
    ic_fail(&err, IC_INTERNAL, "%s", why);
    for (int32_t i = s->n_running - 1; i >= 0; i--)
        if (s->order[i]->rows)
            finish(s, s->order[i], IC_END_ERROR, &err);
    vacate(s);
}

/* A request that was prepared for the old model. */
static enum ic_status rebind_run(struct ic_text_sched *s, struct run *r, struct ic_err *err)
{
    const struct ic_text_backend *be = s->be;

    if (r->n_tokens >= be->ctx_size)
        return ic_fail(err, IC_TOO_LARGE, "the model came back with a context of %d tokens, this request holds %d",
                       be->ctx_size, r->n_tokens);
    return be->sampler_rebind ? be->sampler_rebind(be->arg, r->sampler, &r->req->params, r->tokens + r->n_prompt,
                                                   r->n_tokens - r->n_prompt, err)
                              : IC_OK;
}

static enum ic_status make_slots(struct ic_text_sched *s, const struct ic_text_backend *be, struct ic_err *err)
{
    IC_ASSERT(be->parallel <= be->batch && be->ctx_size <= be->kv_size);
    struct slot *slots = calloc((size_t)be->parallel, sizeof *slots);
    struct run **order = calloc((size_t)be->parallel, sizeof(struct run *));
    struct ic_row *rows = calloc((size_t)be->batch, sizeof *rows);

    if (!slots || !order || !rows) {
        free(slots);
        free(order);
        free(rows);
        return ic_fail(err, IC_OOM, "out of memory");
    }
    free(s->slots);
    free(s->order);
    free(s->rows);
    s->slots = slots;
    s->order = order;
    s->rows = rows;
    s->n_slots = be->parallel;
    s->be = be;
    return IC_OK;
}

enum ic_status ic_text_sched_unpark(struct ic_text_sched *s, const struct ic_text_backend *be, struct ic_err *err)
{
    struct run *next;

    IC_ASSERT(s->parked);
    enum ic_status st = make_slots(s, be, err);
    if (st != IC_OK)
        return st;
    s->parked = false;
    s->ns_decode_tick = s->ns_prompt_row = 0; /* it may have come back on another device */
    for (struct run *r = s->waiting; r; r = next) {
        struct ic_err own = {0};
        next = r->next;
        if (r->prepared && rebind_run(s, r, &own) != IC_OK)
            finish(s, r, IC_END_ERROR, &own);
    }
    return IC_OK;
}

bool ic_text_sched_is_parked(const struct ic_text_sched *s)
{
    return s->parked;
}

/* ---- open, close, submit --------------------------------------------------------------------------------- */

enum ic_status ic_text_sched_open(struct ic_text_sched **out, const struct ic_text_backend *be,
                                  struct ic_text_counters *c, struct ic_err *err)
{
    struct ic_text_sched *s = calloc(1, sizeof *s);

    *out = NULL;
    if (!s)
        return ic_fail(err, IC_OOM, "out of memory");
    s->c = c;
    enum ic_status st = make_slots(s, be, err);
    if (st != IC_OK) {
        free(s);
        return st;
    }
    *out = s;
    return IC_OK;
}

void ic_text_sched_close(struct ic_text_sched **sp)
{
    struct ic_text_sched *s = *sp;

    if (!s)
        return;
    while (s->waiting || s->n_running) {
        struct run *r = s->waiting ? s->waiting : s->order[0];
        enum ic_cancel none = IC_CANCEL_NONE;
        atomic_compare_exchange_strong(&r->req->cancel, &none, IC_CANCEL_SHUTDOWN);
        reap(s, r, 0);
    }
    for (int i = 0; i < IC_SESSION_BUCKETS; i++)
        while (s->sessions.bucket[i])
            ic_session_drop(&s->sessions, s->sessions.bucket[i]);
    ic_buf_deinit(&s->text);
    free(s->slots);
    free(s->order);
    free(s->rows);
    free(s);
    *sp = NULL;
}

void ic_text_sched_submit(struct ic_text_sched *s, struct ic_text_req *req)
{
    struct run *r = calloc(1, sizeof *r);

    if (!r) {
        struct run tmp = {.req = req};
        struct ic_err err = {0};
        ic_fail(&err, IC_OOM, "out of memory");
        emit_error(s, &tmp, &err, false);
        ic_text_req_unref(req);
        return;
    }
    r->req = req;
    r->slot = r->at = -1;
    r->stream.stop = req->params.stop;
    r->stream.n_stop = req->params.n_stop;
    atomic_fetch_add(&s->c->requests, 1);
    if (req->session && !(r->session = ic_session_get(&s->sessions, req->session))) {
        struct ic_err err = {0};
        ic_fail(&err, IC_OOM, "out of memory");
        refuse(s, r, &err);
        return;
    }
    insert_waiting(s, r, false);
}

void ic_text_sched_session_close(struct ic_text_sched *s, uint64_t session)
{
    struct ic_session *se = ic_session_find(&s->sessions, session);
    struct run *next;

    if (!se)
        return;
    for (struct run *r = s->waiting; r; r = next) {
        next = r->next;
        if (r->session == se)
            finish(s, r, IC_END_ABORT, NULL);
    }
    for (int32_t i = s->n_running - 1; i >= 0; i--)
        if (s->order[i]->session == se)
            finish(s, s->order[i], IC_END_ABORT, NULL);
    if (se->slot >= 0)
        evict(s, se->slot);
    ic_session_drop(&s->sessions, se);
}
