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
 *   What a run leaves behind in its slot stays there until somebody needs the cells: text_cells.c. So a run that was put
 *   back, for want of cells or for somebody of a higher priority, finds its own again, or has it computed again:
 *   nothing is lost.
 *
 * One tick: every stream's next token, a slice of prompts (text_cost.h) in a fair order, and guesses of what comes behind
 * the next tokens (text_spec.h, text_draft.h). A prompt that begins like one which is being read waits for that one and
 * then shares it. */
#include "sched/text_sched.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "sched/text_sched_int.h"

/* ---- the end of a run ---------------------------------------------------------------------------------- */

static void remove_running(struct ic_text_sched *s, const struct run *r)
{
    int32_t w = 0;
    for (int32_t i = 0; i < s->n_running; i++)
        if (s->order[i] != r)
            s->order[w++] = s->order[i];
    s->n_running = w;
}

/* The session takes over what was said, or, when nothing was, stays as it was before the request. False: so it does
 * because there was no memory for more. */
static bool give_back_session(struct ic_text_sched *s, struct run *r, bool said)
{
    struct ic_session *se = r->session;
    const bool wanted = said;

    if (!se || !r->prepared) /* not prepared: it was waiting behind an earlier request of its session */
        return true;
    se->busy = false;
    se->used_ns = s->be->now_ns(s->be->arg);
    if (said && se->kind == IC_SESSION_CHAT) {
        ic_buf_put(&r->answer, "", 1);
        struct ic_chat_msg reply = {"assistant", r->answer.data};
        size_t before = se->n_msgs;
        said = !r->answer.failed && ic_session_add_msgs(se, r->req->msgs, r->req->n_msgs) &&
               ic_session_add_msgs(se, &reply, 1);
        if (!said)
            ic_session_cut_msgs(se, before);
    }
    if (said) {
        free(se->tokens);
        se->tokens = r->tokens;
        se->n_tokens = r->n_tokens;
        r->tokens = NULL;
    } else if (!se->n_tokens) {
        se->kind = IC_SESSION_NEW;
    }
    return said == wanted;
}

static void free_run(struct ic_text_sched *s, struct run *r)
{
    if (r->sampler)
        s->be->sampler_close(s->be->arg, r->sampler);
    ic_pool_deinit(&r->pool);
    ic_stream_deinit(&r->stream);
    ic_buf_deinit(&r->answer);
    ic_text_req_unref(r->req);
    free(r->tokens);
    ic_queue_leave(s, r->client);
    free(r);
}

/* Lets go of its slot, which keeps what it holds; the run itself stays. */
static void leave_slot(struct ic_text_sched *s, struct run *r)
{
    s->slots[r->slot].run = NULL;
    remove_running(s, r);
    for (int32_t i = 0; i < s->n_running; i++)
        if (s->order[i]->lead == r) {
            s->order[i]->lead = NULL;
            s->order[i]->look = true;
        }
    s->trim = true;
    r->slot = -1;
    r->lead = NULL;
    r->look = false;
    r->rows = r->n_draft = 0;
    r->client->n_running--;
    atomic_fetch_sub(&s->c->running, 1);
}

/* Ends a run wherever it is. `err` (or NULL) goes out first. */
static void finish(struct ic_text_sched *s, struct run *r, enum ic_end_reason reason,
                   const struct ic_err *err)
{
    int64_t now = s->be->now_ns(s->be->arg);
    struct ic_event *ev = ic_run_event(r, IC_EVENT_END, NULL, 0, 0);
    struct ic_err forgot = {0};

    if (!give_back_session(s, r, r->n_gen > 0 && reason != IC_END_ERROR)) {
        ic_fail(&forgot, IC_OOM, "no memory for the session to keep this answer");
        err = &forgot;
        reason = IC_END_ERROR;
    }
    if (err)
        ic_run_error(s, r, err, true);
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
    ic_run_emit(s, r, ev);
    atomic_fetch_add(&s->c->ended[reason], 1);
    if (r->slot >= 0)
        s->service_ns = 0.8 * s->service_ns + 0.2 * (double)(now - r->admit_ns);
    if (r->slot >= 0) {
        leave_slot(s, r);
        s->crowded = false;
    } else {
        ic_queue_remove(s, r);
    }
    free_run(s, r);
}

/* Refused before it was ever taken: one ERROR, no END. The run is in no list yet. */
static void refuse(struct ic_text_sched *s, struct run *r, const struct ic_err *err)
{
    ic_run_error(s, r, err, false);
    atomic_fetch_add(&s->c->refused, 1);
    free_run(s, r);
}

/* ---- preparing and admitting ---------------------------------------------------------------------------- */

static enum ic_status tokenize_run(struct ic_text_sched *s, struct run *r, int32_t **tokens, int32_t *n,
                                   struct ic_err *err)
{
    const struct ic_text_backend *be = s->be;
    const struct ic_text_req *q = r->req;
    struct ic_session *se = r->session;
    int32_t max = be->ctx_size - 1; /* one token at least must fit behind the prompt */
    enum ic_status st;

    if (se && se->stale)
        return ic_fail(err, IC_NOT_FOUND,
                       "Session not found: the model that it was held with is another one now");
    if (se && se->kind != IC_SESSION_NEW && (se->kind == IC_SESSION_CHAT) != (q->prompt == NULL))
        return ic_fail(err, IC_BAD_REQUEST, "this session goes on with `%s`",
                       se->kind == IC_SESSION_CHAT ? "messages" : "prompt");
    if (q->prompt) {
        int32_t old = se ? se->n_tokens : 0, *more = NULL;
        st = be->tokenize(be->arg, q->prompt, q->prompt_len, old == 0, max - old > 0 ? max - old : 0, &more,
                          n, err);
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
        if (se &&
            se->n_msgs + n_all + 1 > IC_SESSION_MSGS_MAX) /* known now, so not found out after the answer */
            return ic_fail(err, IC_TOO_LARGE, "a session holds at most %d turns", IC_SESSION_MSGS_MAX);
        struct ic_chat_msg *all = se ? ic_session_join(se, q->msgs, q->n_msgs, &n_all) : NULL;
        if (se && !all)
            return ic_fail(err, IC_OOM, "out of memory");
        st = be->chat(be->arg, all ? all : q->msgs, n_all, max, tokens, n, err);
        free(all);
    }
    if (st == IC_TOO_LARGE)
        ic_fail(err, st, "the prompt has %d tokens or more; at most %d fit into a context of %d", *n, max,
                be->ctx_size);
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
    st = r->req->pooling ? ic_embed_open(s, r, err)
                         : s->be->sampler_open(s->be->arg, &r->sampler, &r->req->params, r->tokens, n, err);
    if (st != IC_OK)
        return st;
    if (se) {
        se->kind = r->req->prompt ? IC_SESSION_RAW : IC_SESSION_CHAT;
        se->busy = true;
    }
    r->prepared = true;
    return IC_OK;
}

static bool try_admit(struct ic_text_sched *s, struct run *r)
{
    int32_t slot = ic_cells_take_slot(s, r);

    if (slot < 0)
        return false;
    s->slots[slot].run = r;
    r->slot = slot;
    s->order[s->n_running++] = r;
    r->client->n_running++;
    atomic_fetch_add(&s->c->running, 1);
    ic_cells_find_lead(s, r);
    if (!r->lead)
        ic_cells_restore(s, r);
    ic_cells_credit(s, r);
    if (!r->admitted_once) {
        r->admitted_once = true;
        r->admit_ns = s->be->now_ns(s->be->arg);
        atomic_fetch_add(&s->c->prompt_tokens, (uint64_t)r->n_prompt);
        ic_hist_add(&s->c->queue, r->admit_ns - r->req->arrival_ns);
        ic_queue_served(s, r);
    }
    return true;
}

/* Back to the head of the queue. What it has stays in its slot, and goes to host memory or away when it is needed. */
static void preempt(struct ic_text_sched *s, struct run *r)
{
    leave_slot(s, r);
    ic_queue_put(s, r, true);
    atomic_fetch_add(&s->c->preempted, 1);
}

/* The last admitted of the lowest priority, which is below `below`. */
static struct run *victim(const struct ic_text_sched *s, int below)
{
    struct run *worst = NULL;

    for (int32_t i = s->n_running - 1; i >= 0; i--)
        if ((int)s->order[i]->req->priority < (worst ? (int)worst->req->priority : below))
            worst = s->order[i];
    return worst;
}

static bool admit_at_others_cost(struct ic_text_sched *s, struct run *r)
{
    struct run *v;

    if (r->req->priority != IC_PRIO_HIGH || !ic_cells_would_fit(s, r, IC_PRIO_HIGH))
        return false;
    while ((v = victim(s, IC_PRIO_HIGH)) != NULL) {
        preempt(s, v);
        if (try_admit(s, r))
            return true;
    }
    return false;
}

static void tell_queued(struct ic_text_sched *s)
{
    for (struct run *r = s->waiting; r; r = r->next) {
        if (r->told_queued)
            continue;
        struct ic_event *ev = ic_run_event(r, IC_EVENT_QUEUED, NULL, 0, 0);
        if (ev)
            ev->index = ic_queue_place(s, r);
        ic_run_emit(s, r, ev);
        r->told_queued = true;
    }
}

/* In turn (text_queue.c): who does not fit yet is not overtaken. Only a request that waits for its own session lets others
 * pass. */
static void admit(struct ic_text_sched *s)
{
    struct run *r;

    while (!(s->crowded && s->n_running > 0) && (r = ic_queue_pick(s)) != NULL) {
        struct ic_err err = {0};
        if (!r->prepared && prepare(s, r, &err) != IC_OK) {
            if (r->told_queued) { /* the client has been told to wait, so it waits for an END */
                finish(s, r, IC_END_ERROR, &err);
            } else {
                ic_queue_remove(s, r);
                refuse(s, r, &err);
            }
            continue;
        }
        if (!try_admit(s, r) && !admit_at_others_cost(s, r))
            break;
        ic_queue_remove(s, r);
    }
    tell_queued(s);
}

static void preempt_last(struct ic_text_sched *s)
{
    preempt(s, victim(s, IC_PRIO_HIGH + 1));
}

/* ---- one decode ----------------------------------------------------------------------------------------- */

static int32_t pending(const struct ic_text_sched *s, const struct run *r)
{
    return r->n_tokens - s->slots[r->slot].n_past;
}

static void add_rows(struct ic_text_sched *s, struct run *r, int32_t count, int32_t *n)
{
    int32_t from = s->slots[r->slot].n_past;
    bool embed = r->req->pooling != IC_POOLING_NONE;

    r->first = *n;
    for (int32_t i = 0; i < count; i++) {
        bool last = from + i + 1 == r->n_tokens, state = embed && ic_pool_wants(&r->pool, from + i);
        s->rows[*n] = (struct ic_row){r->tokens[from + i], from + i, r->slot, last && !embed, state};
        if (last)
            r->at = *n;
        ++*n;
    }
    r->rows = count;
}

static int32_t count_streams(const struct ic_text_sched *s)
{
    int32_t n = 0;
    for (int32_t i = 0; i < s->n_running; i++)
        n += pending(s, s->order[i]) == 1;
    return n;
}

/* Whether this run reads its prompt in this tick, and is its client's first that does. */
static bool reads(const struct ic_text_sched *s, int32_t i, bool *first)
{
    const struct run *r = s->order[i];

    *first = true;
    if (r->lead || r->rows || pending(s, r) <= 1)
        return false;
    for (int32_t k = 0; k < i && *first; k++) {
        const struct run *o = s->order[k];
        *first = o->client != r->client || o->lead || pending(s, o) <= 1;
    }
    return true;
}

/* Of the clients' first prompts the one with the fewest rows still to take, beyond what it has been given; -1: none. */
static int32_t shortest_reader(const struct ic_text_sched *s, const int32_t *want)
{
    int32_t best = -1, fewest = 0;
    bool first;

    for (int32_t i = 0; i < s->n_running; i++) {
        int32_t left = pending(s, s->order[i]) - want[i];
        if (reads(s, i, &first) && first && left > 0 && (best < 0 || left < fewest)) {
            best = i;
            fewest = left;
        }
    }
    return best;
}

/* Rows of prompts, `budget` at most, to each client's oldest prompt: half of them to the one admitted first, so that it
 * comes to its end whatever arrives, the others to the shortest, so that no short question waits for a long text. What is
 * left goes in the order of admission. */
static void add_prompts(struct ic_text_sched *s, int32_t budget, int32_t *n)
{
    int32_t want[IC_PREFIX_SEQS_MAX] = {0}, left = budget, at;
    bool first;

    for (int32_t i = 0; i < s->n_running; i++)
        if (reads(s, i, &first)) { /* nobody admitted before it reads, so it is its client's first */
            int32_t p = pending(s, s->order[i]), half = (budget + 1) / 2;
            want[i] = p < half ? p : half;
            left -= want[i];
            break;
        }
    while (left > 0 && (at = shortest_reader(s, want)) >= 0) {
        int32_t more = pending(s, s->order[at]) - want[at];
        more = more < left ? more : left;
        want[at] += more;
        left -= more;
    }
    for (int32_t i = 0; i < s->n_running && left > 0; i++)
        if (reads(s, i, &first)) {
            int32_t more = pending(s, s->order[i]) - want[i];
            more = more < left ? more : left;
            want[i] += more;
            left -= more;
        }
    for (int32_t i = 0; i < s->n_running; i++)
        if (want[i] > 0)
            add_rows(s, s->order[i], want[i], n);
}

/* How many streams there would be if those whose prompts are read had begun, all but one of them: their gap is the usual one while
 * so many are here, and a slice that keeps to the gap of the few that have begun would let the others wait for long. Each
 * client counts once, unless all belong to one: many prompts of one client do not stretch the gaps of others. */
static int32_t usual_streams(const struct ic_text_sched *s, int32_t n_streams)
{
    int32_t all = 0, clients = 0;
    bool first, one_client = true;

    for (int32_t i = 0; i < s->n_running; i++) {
        bool reader = reads(s, i, &first);
        all += reader;
        clients += reader && first;
        one_client &= s->order[i]->client == s->order[0]->client;
    }
    int32_t n = one_client ? all : clients;
    return n_streams + (n > 1 ? n - 1 : 0);
}

/* Fills s->rows: every stream's next token, then prompts, then proposals (s->drafts). Returns how many. */
static int32_t build(struct ic_text_sched *s)
{
    int32_t n = 0, n_decode, unread = 0;
    bool first;

    while (!ic_cells_make_room(s, n_decode = count_streams(s), -1) && s->n_running > 1)
        preempt_last(s);
    for (int32_t i = 0; i < s->n_running; i++) {
        s->order[i]->rows = s->order[i]->n_draft = 0;
        s->order[i]->at = -1;
        ic_cells_join(s, s->order[i]);
    }
    n_decode = count_streams(s); /* who has joined may have one token left to read */
    if (!ic_cells_make_room(s, n_decode, -1))
        n_decode = ic_cells_free(s);
    for (int32_t i = 0; i < s->n_running && n < n_decode; i++)
        if (pending(s, s->order[i]) == 1)
            add_rows(s, s->order[i], 1, &n);
    for (int32_t i = 0; i < s->n_running; i++)
        unread += reads(s, i, &first) ? pending(s, s->order[i]) : 0;
    int32_t budget = 0;
    s->beside = unread > 0 && n > 0 ? s->beside + 1 : 0;
    if (s->beside >
        IC_LOOK_EVERY) /* else prompts would crawl for as long as they last, once the machine has become slower */
        s->beside = 0;
    else if (unread > 0)
        budget = ic_text_cost_slice(&s->cost, n, usual_streams(s, n), s->be->batch - n,
                                    s->be->policy.itl_bound_ns);
    if (budget > unread)
        budget = unread; /* nobody idle loses its cells for rows that nobody has */
    if (!ic_cells_make_room(s, n + budget, -1))
        budget = ic_cells_free(s) - n;
    n_decode = n;
    if (budget > 0)
        add_prompts(s, budget, &n);
    if (n == 0 && s->n_running > 1) /* prompts that block each other: the last one waits */
        preempt_last(s);
    s->streams = n_decode;
    s->drafts = 0;
    s->drafter.spent_ns = 0;
    if (n_decode > 0)
        ic_drafts_add(s, n_decode, &n);
    return n;
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

/* The context is full: its first quarter (the system's and the task's words, one hopes) and its last quarter stay, and what
 * lies behind the gap is computed again, at its new place. Cells are not moved: others may share them, and not every
 * kind of cache could. */
static bool shift(struct ic_text_sched *s, struct run *r)
{
    int32_t quarter = s->be->ctx_size / 4, drop = r->n_tokens - 2 * quarter;

    if (!s->be->policy.shift || quarter < 1)
        return false;
    memmove(r->tokens + quarter, r->tokens + quarter + drop, sizeof *r->tokens * (size_t)quarter);
    r->n_tokens -= drop;
    r->shifted += drop;
    ic_cells_cut(s, r->slot, quarter);
    return true;
}

/* The row of a run has been decoded to its end: sample, send, and see whether it was the last one. False: the run is over. */
static bool take_token(struct ic_text_sched *s, struct run *r, int32_t row)
{
    const struct ic_text_params *p = &r->req->params;
    struct ic_sampled d;
    struct ic_err err = {0};
    struct ic_buf piece = {0};
    bool over, length, hole = false;

    if (p->max_tokens == 0) {
        finish(s, r, IC_END_LENGTH, NULL);
        return false;
    }
    if (s->be->draw(s->be->arg, r->sampler, row, &d, &err) != IC_OK) {
        finish(s, r, IC_END_ERROR, &err);
        return false;
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
            return false;
        }
        r->n_gen++;
        if (ic_drafts_looks_up(s))
            ic_spec_note(&r->spec, r->tokens, r->n_tokens);
        atomic_fetch_add(&s->c->tokens, 1);
        s->be->piece(s->be->arg, d.token, &piece);
        ic_stream_push(&r->stream, piece.data, piece.len, &s->text);
        hole = piece.failed;
        ic_buf_deinit(&piece);
    }
    length = (p->max_tokens > 0 && r->n_gen >= p->max_tokens) ||
             (r->n_tokens >= s->be->ctx_size && !shift(s, r));
    over = d.eog || r->stream.stopped || length;
    if (over && !r->stream.stopped)
        ic_stream_flush(&r->stream, &s->text);
    if (hole || s->text.failed || r->stream.held.failed) {
        ic_fail(&err, IC_OOM, "out of memory");
        finish(s, r, IC_END_ERROR, &err);
        return false;
    }
    if (s->text.len)
        ic_run_token(s, r, d.eog ? NULL : &d, &s->text);
    if (over)
        finish(s, r, d.eog || r->stream.stopped ? IC_END_STOP : IC_END_LENGTH, NULL);
    return !over;
}

/* Its next token, and those behind it that were proposed, as long as the sampler says the same. The cells of the
 * others go. */
static void take_tokens(struct ic_text_sched *s, struct run *r)
{
    int32_t slot = r->slot, n_draft = r->n_draft, from = r->draft_at;
    bool alive = take_token(s, r, r->at);

    for (int32_t i = 0; alive && i < n_draft; i++) {
        if (r->n_tokens != s->slots[slot].n_past + 1)
            break; /* its cells have been cut */
        bool right = r->tokens[r->n_tokens - 1] == r->draft[i];
        if (r->draft_by_model)
            ic_draft_checked(&s->drafter, &r->draft_stream, right);
        if (!right)
            break;
        r->rows = 1;
        ic_cells_grow(s, r);
        atomic_fetch_add(&s->c->accepted, 1);
        alive = take_token(s, r, from + i);
    }
    if (n_draft > 0)
        ic_cells_cut(s, slot, s->slots[slot].n_past);
}

/* The same for a run that wants a vector: its prompt is all that there is. */
static void take_states(struct ic_text_sched *s, struct run *r)
{
    struct ic_err err = {0};
    bool done;

    if (ic_embed_take(s, r, &done, &err) != IC_OK)
        finish(s, r, IC_END_ERROR, &err);
    else if (done)
        finish(s, r, IC_END_STOP, NULL);
}

/* The decode did not go through: back to the state before it. */
static void undo(struct ic_text_sched *s, enum ic_decode rc)
{
    struct ic_err err = {0};
    int32_t n = s->n_running;

    if (rc == IC_DECODE_FULL) {
        if (ic_cells_evict(s, -1))
            return;
        if (n > 1) {
            preempt_last(s);
            ic_cells_evict(s, -1);
            s->crowded =
                true; /* by our own count there is room: it would be let in again at once, for ever */
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
        ic_cells_cut(s, r->slot,
                     s->slots[r->slot].n_past); /* its rows are there or not: now they are not */
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

static void publish_counters(struct ic_text_sched *s)
{
    atomic_store(&s->c->kv_used, ic_prefix_cells(s->prefix));
    atomic_store(&s->c->sessions, s->sessions.count);
    atomic_store(&s->c->spill_bytes, (int64_t)s->spill.sum);
    atomic_store(&s->c->spill_parts, s->spill.count - s->spill.disk_count);
    atomic_store(&s->c->disk_bytes, (int64_t)s->spill.disk_sum);
    atomic_store(&s->c->disk_parts, s->spill.disk_count);
    atomic_store(&s->c->disk_put, s->spill.disk_put);
    atomic_store(&s->c->disk_got, s->spill.disk_got);
    atomic_store(&s->c->disk_lost, s->spill.disk_lost);
}

bool ic_text_sched_tick(struct ic_text_sched *s)
{
    const struct ic_text_backend *be = s->be;
    int64_t t0 = be->now_ns(be->arg);

    ic_text_sched_reap(s, NULL);
    if (s->parked)
        return s->waiting != NULL;
    admit(s);
    int32_t n = build(s);
    publish_counters(s);
    if (n == 0)
        return s->n_running > 0 || s->waiting;

    enum ic_decode rc = be->decode(be->arg, s->rows, n);
    atomic_fetch_add(&s->c->ticks, 1);
    if (rc != IC_DECODE_OK) {
        undo(s, rc);
        return true;
    }
    int64_t t1 = be->now_ns(be->arg);
    double ns = (double)(t1 - t0) - s->drafter.spent_ns;
    ic_hist_add(&s->c->tick, t1 - t0);
    atomic_fetch_add(&s->c->rows, (uint64_t)n);
    ic_text_cost_learn(&s->cost, ns, n);
    s->trim = s->trim && ic_cells_trim(s, s->be->idle_cells); /* now, when no token waits to be written */
    for (int32_t i = 0; i < s->n_running; i++)
        if (s->order[i]->rows) {
            ic_cells_grow(s, s->order[i]);
            ic_queue_charge(s->order[i]->client, s->order[i]->rows + s->order[i]->n_draft);
        }
    for (int32_t i = 0; i < s->n_running;) {
        struct run *r = s->order[i];
        if (r->req->pooling && r->rows)
            take_states(s, r);
        else if (r->at >= 0)
            take_tokens(s, r);
        i += i < s->n_running && s->order[i] == r; /* it may have left the list */
    }
    if (be->draft) {
        double rows_ns = ic_text_cost_of(&s->cost, n) - ic_text_cost_of(&s->cost, n - s->drafter.rows);
        ic_draft_settle(&s->drafter, ns, s->streams, n - s->streams - s->drafts, s->drafts, rows_ns);
    }
    return true;
}

bool ic_text_sched_tidy(struct ic_text_sched *s)
{
    if (s->parked || s->n_running > 0 || s->waiting || !ic_cells_trim(s, 0))
        return false;
    publish_counters(s);
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

static void all_leave(struct ic_text_sched *s)
{
    while (s->n_running > 0) { /* the last first, so that they come back in their order */
        struct run *r = s->order[s->n_running - 1];
        leave_slot(s, r);
        ic_queue_put(s, r, true);
    }
    s->crowded = false;
    s->parked = true;
}

void ic_text_sched_park(struct ic_text_sched *s)
{
    if (s->parked)
        return;
    all_leave(s);
    s->parked = false; /* the device still answers */
    ic_cells_park(s);
    s->parked = true;
    publish_counters(s);
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
    all_leave(s);
    for (int32_t i = 0; i < s->n_slots; i++)
        ic_cells_cut(s, i, 0);
    publish_counters(s);
}

static void drop_pins(struct ic_text_sched *s)
{
    for (struct ic_pin *p = s->pins, *next; p; p = next) {
        next = p->next;
        free(p->tokens);
        free(p);
    }
    s->pins = NULL;
}

void ic_text_sched_forget_model(struct ic_text_sched *s)
{
    struct ic_err err = {0};
    struct run *next;

    IC_ASSERT(s->parked);
    ic_fail(&err, IC_UNAVAILABLE, "the model was exchanged for another one");
    for (struct run *r = s->waiting; r; r = next) {
        next = r->next;
        if (r->prepared)
            finish(s, r, IC_END_ERROR, &err);
    }
    ic_spill_clear(&s->spill);
    drop_pins(s);
    for (int i = 0; i < IC_SESSION_BUCKETS; i++)
        for (struct ic_session *se = s->sessions.bucket[i]; se; se = se->next)
            se->stale = se->kind == IC_SESSION_RAW;
    publish_counters(s);
}

/* A request that was prepared for the old model. */
static enum ic_status rebind_run(struct ic_text_sched *s, struct run *r, struct ic_err *err)
{
    const struct ic_text_backend *be = s->be;

    if (r->n_tokens >= be->ctx_size)
        return ic_fail(err, IC_TOO_LARGE,
                       "the model came back with a context of %d tokens, this request holds %d",
                       be->ctx_size, r->n_tokens);
    if (r->shifted && r->req->params.grammar)
        return ic_fail(err, IC_INTERNAL,
                       "the model was reopened, and what this answer's grammar has seen is gone");
    if (r->req->pooling)
        return r->pool.n_embd == be->n_embd ? IC_OK
                                            : ic_fail(err, IC_INTERNAL, "the model came back as another");
    int32_t said = r->n_gen < r->n_tokens ? r->n_gen : r->n_tokens;
    return be->sampler_rebind ? be->sampler_rebind(be->arg, r->sampler, &r->req->params,
                                                   r->tokens + r->n_tokens - said, said, err)
                              : IC_OK;
}

enum ic_status ic_text_sched_unpark(struct ic_text_sched *s, const struct ic_text_backend *be,
                                    struct ic_err *err)
{
    struct ic_err ignored = {0};
    struct run *next;

    IC_ASSERT(s->parked);
    enum ic_status st = ic_cells_open(s, be, err);
    if (st != IC_OK)
        return st;
    s->parked = s->drafter.failed = false;
    if (ic_cells_pin_all(s, &ignored) != IC_OK)
        ic_warn("text", "%s", ignored.msg);
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

void ic_text_sched_turn_away(struct ic_text_sched *s, const struct ic_err *why)
{
    struct run *next;

    IC_ASSERT(s->parked);
    for (struct run *r = s->waiting; r; r = next) {
        next = r->next;
        finish(s, r, IC_END_ERROR, why);
    }
    publish_counters(s);
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
    ic_drafter_init(&s->drafter);
    enum ic_status st = ic_cells_open(s, be, err);
    if (st != IC_OK) {
        free(s);
        return st;
    }
    *out = s;
    return IC_OK;
}

enum ic_status ic_text_sched_pin(struct ic_text_sched *s, const int32_t *tokens, int32_t n,
                                 struct ic_err *err)
{
    struct ic_pin *p = calloc(1, sizeof *p);

    IC_ASSERT(n > 0 && !s->parked && s->n_running == 0);
    if (!p || !(p->tokens = malloc(sizeof *tokens * (size_t)n))) {
        free(p);
        return ic_fail(err, IC_OOM, "out of memory");
    }
    memcpy(p->tokens, tokens, sizeof *tokens * (size_t)n);
    p->n = n;
    enum ic_status st = ic_cells_pin(s, p, err);
    if (st != IC_OK) {
        free(p->tokens);
        free(p);
        return st;
    }
    p->next = s->pins;
    s->pins = p;
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
    ic_queue_clear(s);
    ic_spill_clear(&s->spill);
    ic_prefix_close(&s->prefix);
    drop_pins(s);
    free(s->slots);
    free(s->order);
    free(s->rows);
    free(s);
    *sp = NULL;
}

/* When a place in the queue may be free again. */
static int32_t retry_s(const struct ic_text_sched *s)
{
    double s_each = s->service_ns / 1e9 / (s->n_running > 0 ? s->n_running : 1);
    return s_each < 1 ? 1 : s_each > 60 ? 60 : (int32_t)s_each;
}

void ic_text_sched_submit(struct ic_text_sched *s, struct ic_text_req *req)
{
    struct run *r = calloc(1, sizeof *r);

    if (!r) {
        struct run tmp = {.req = req};
        struct ic_err err = {0};
        ic_fail(&err, IC_OOM, "out of memory");
        ic_run_error(s, &tmp, &err, false);
        ic_text_req_unref(req);
        return;
    }
    r->req = req;
    r->slot = r->at = -1;
    ic_spec_init(&r->spec);
    ic_draft_begin(&s->drafter, &r->draft_stream);
    r->stream.stop = req->params.stop;
    r->stream.n_stop = req->params.n_stop;
    atomic_fetch_add(&s->c->requests, 1);
    if (!(r->client = ic_queue_client(s, req->client))) {
        struct ic_err err = {0};
        ic_fail(&err, IC_OOM, "out of memory");
        refuse(s, r, &err);
        return;
    }
    if (s->be->policy.queue_per_client > 0 && r->client->n_waiting >= s->be->policy.queue_per_client) {
        struct ic_err err = {0};
        ic_fail(&err, IC_BUSY, "%d requests of this client are waiting already; try again in about %d s",
                r->client->n_waiting, retry_s(s));
        refuse(s, r, &err);
        return;
    }
    if (req->session && !(r->session = ic_session_get(&s->sessions, req->session))) {
        struct ic_err err = {0};
        ic_fail(&err, IC_OOM, "out of memory");
        refuse(s, r, &err);
        return;
    }
    ic_queue_put(s, r, false);
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
    ic_session_drop(&s->sessions, se);
}
