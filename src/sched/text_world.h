/* The world in which the tests of the text scheduler play: scheduler, fake model (fake_backend.h), clients and what
 * they have been told, and an oracle that knows what must come out. Includes the scheduler's sources, for their statics:
 * the state is checked after every tick. For tests only; a test need not use all of it. */
#ifndef IC_SCHED_TEXT_WORLD_H
#define IC_SCHED_TEXT_WORLD_H

#pragma GCC diagnostic ignored "-Wunused-function"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <math.h>
#include <cmocka.h>

/* Memory for a conversation's turns runs out when a test says so. */
static int strdups_left = -1;

static char *flaky_strdup(const char *s)
{
    if (strdups_left == 0)
        return NULL;
    strdups_left -= strdups_left > 0;
    return strndup(s, strlen(s));
}

#define strdup flaky_strdup
#include "sched/session.c"
#undef strdup
#include "sched/text_sched.c" /* its statics: the state is checked after every tick */

#include "base/utf8.h"
#include "sched/check.h"
#include "sched/fake_backend.h"
#include "sched/fake_disk.h"

#define REQS 400
#define SESSIONS 6
#define TOKENS_MAX 4096

/* ---- a world: scheduler, model, clients and what they have been told ---------------------------------------- */

struct client_req {
    struct ic_text_req *req; /* our reference */
    int session;             /* index, -1: none */
    bool silent, queued, ended, gone_before_end, error_more;
    int32_t last_index;
    struct ic_buf text;
    struct ic_event end; /* without its text: the last event */
    float vector[FAKE_EMBD];
    bool has_vector;
    int64_t asked_at; /* the tick before which it was cancelled, 0: never */
    char err[128];
    enum ic_status code;
};

/* What the oracle knows of a conversation. */
struct talk {
    uint64_t handle;
    enum ic_session_kind kind;
    int32_t tokens[TOKENS_MAX], n;
    struct ic_chat_msg *msgs;
    size_t n_msgs;
    bool unknown; /* a request of it went away unheard: only the scheduler knows what was said */
};

struct world {
    struct fake f;
    struct fake_disk disk; /* where a test wants one: with_disk */
    struct ic_text_counters c;
    struct ic_text_sched *s;
    struct client_req r[REQS];
    int n;
    struct talk talk[SESSIONS];
    uint64_t last_handle, rng;
    int64_t ticks, events;
    int cancels_in_decode; /* of 1000 */
    bool unchecked;        /* oracle off */
};

static uint64_t rnd(struct world *w, uint64_t n)
{
    return (fake_random(&w->rng) >> 11) % n;
}

static void talk_reset(struct world *w, struct talk *t)
{
    for (size_t i = 0; i < t->n_msgs; i++) {
        free((char *)t->msgs[i].role);
        free((char *)t->msgs[i].content);
    }
    free(t->msgs);
    *t = (struct talk){.handle = ++w->last_handle};
}

static void talk_add(struct talk *t, const char *role, const char *content, size_t len)
{
    t->msgs = realloc(t->msgs, sizeof *t->msgs * (t->n_msgs + 1));
    IC_ASSERT(t->msgs);
    t->msgs[t->n_msgs++] = (struct ic_chat_msg){strdup(role), strndup(content, len)};
}

/* The prompt's tokens as they must be, given what was said before. */
static int32_t prompt_of(const struct world *w, const struct client_req *r, int32_t *out)
{
    const struct talk *t = r->session >= 0 ? &w->talk[r->session] : NULL;
    const struct ic_text_req *q = r->req;
    int32_t old = 0;

    if (q->prompt) {
        if (t && t->kind == IC_SESSION_RAW) {
            old = t->n;
            memcpy(out, t->tokens, sizeof *out * (size_t)old);
        }
        return old + fake_tokens(&w->f, q->prompt, q->prompt_len, old == 0, out + old);
    }
    struct ic_chat_msg all[1024];
    size_t n = 0;
    for (size_t i = 0; t && i < t->n_msgs; i++)
        all[n++] = t->msgs[i];
    for (size_t i = 0; i < q->n_msgs; i++)
        all[n++] = q->msgs[i];
    return fake_chat_tokens(&w->f, all, n, out);
}

struct answer {
    int32_t token[TOKENS_MAX], n;
    enum ic_end_reason reason;
    struct ic_buf text; /* what is sent when it comes to its own end */
};

/* Where the first stop string that is complete begins, byte by byte; SIZE_MAX: none. */
static size_t naive_stop(const struct ic_text_params *p, const struct ic_buf *b, size_t *end)
{
    for (size_t e = 1; e <= b->len; e++) {
        size_t longest = 0;
        for (int i = 0; i < p->n_stop; i++) {
            size_t n = strlen(p->stop[i]);
            if (n <= e && n > longest && !memcmp(b->data + e - n, p->stop[i], n))
                longest = n;
        }
        *end = e;
        if (longest)
            return e - longest;
    }
    return SIZE_MAX;
}

/* The model alone: no batches, no scheduler. */
static void ask_alone(const struct world *w, const struct ic_text_params *p, const int32_t *prompt,
                      int32_t n, struct answer *a)
{
    struct fake_sampler smp = fake_sampler_of(p->seed, prompt, n);
    struct ic_buf raw = {0};
    uint64_t h = 1;
    size_t cut_at, end;

    a->n = 0;
    a->text = (struct ic_buf){0};
    for (int32_t i = 0; i < n; i++)
        h = fake_mix(h, (uint64_t)prompt[i]);
    for (;;) {
        if (p->max_tokens >= 0 && a->n >= p->max_tokens) {
            a->reason = IC_END_LENGTH;
            break;
        }
        if (n + a->n >= w->f.be.ctx_size) {
            a->reason = IC_END_LENGTH;
            break;
        }
        int32_t t = fake_next(&smp, h);
        if (t == FAKE_EOG) {
            a->reason = IC_END_STOP;
            break;
        }
        a->token[a->n++] = t;
        h = fake_mix(h, (uint64_t)t);
        ic_buf_puts(&raw, fake_pieces[t]);
        if ((cut_at = naive_stop(p, &raw, &end)) != SIZE_MAX) {
            raw.len = cut_at;
            a->reason = IC_END_STOP;
            break;
        }
    }
    if (raw.len && ic_buf_reserve(&a->text, 3 * raw.len))
        a->text.len = ic_utf8_scrub(a->text.data, raw.data, raw.len);
    ic_buf_deinit(&raw);
}

/* The vector as it must be: of the states at all tokens, the first or the last, at length 1. */
static void vector_alone(enum ic_pooling kind, const int32_t *prompt, int32_t n, float *out)
{
    double sum[FAKE_EMBD] = {0}, square = 0;
    float state[FAKE_EMBD];
    uint64_t h = 1;

    for (int32_t i = 0; i < n; i++) {
        h = fake_mix(h, (uint64_t)prompt[i]);
        fake_state(h, state);
        for (int k = 0; k < FAKE_EMBD; k++)
            if (kind == IC_POOLING_MEAN || i == (kind == IC_POOLING_CLS ? 0 : n - 1))
                sum[k] += (double)state[k];
    }
    for (int k = 0; k < FAKE_EMBD; k++)
        square += sum[k] * sum[k];
    for (int k = 0; k < FAKE_EMBD; k++)
        out[k] = (float)(sum[k] / sqrt(square));
}

static void check_vector(const struct client_req *r, const int32_t *prompt, int32_t n)
{
    float want[FAKE_EMBD];

    CHECK(r->has_vector == (r->end.reason == IC_END_STOP));
    CHECK(r->end.stats.tokens == 0 && r->text.len == 0 && r->end.reason != IC_END_LENGTH);
    vector_alone(r->req->pooling, prompt, n, want);
    for (int i = 0; i < FAKE_EMBD && r->has_vector; i++)
        CHECK(fabsf(want[i] - r->vector[i]) < 1e-6f);
}

/* An END has come: is what was sent what the model says, and what does the conversation now hold? */
static void check_end(struct world *w, struct client_req *r)
{
    static int32_t prompt[TOKENS_MAX];
    static struct answer a;
    const struct ic_text_stats *st = &r->end.stats;
    struct talk *t = r->session >= 0 ? &w->talk[r->session] : NULL;
    bool own_end = r->end.reason == IC_END_STOP || r->end.reason == IC_END_LENGTH;

    CHECK(st->tokens >= 0 && st->total_ms >= 0 && st->queue_ms >= 0 && st->queue_ms <= st->total_ms);
    if (st->prompt_tokens == 0) { /* never prepared */
        CHECK(!own_end && r->text.len == 0 && st->tokens == 0);
        return;
    }
    if (t && (t->unknown || t->handle != r->req->session))
        return;
    int32_t n = prompt_of(w, r, prompt);
    CHECK(st->prompt_tokens == n);
    CHECK(st->cached_tokens >= 0 && st->cached_tokens < n);
    if (r->req->pooling) {
        check_vector(r, prompt, n);
        return;
    }
    ask_alone(w, &r->req->params, prompt, n, &a);
    CHECK(st->tokens <= a.n && r->text.len <= a.text.len);
    CHECK(r->text.len == 0 || !memcmp(r->text.data, a.text.data, r->text.len));
    if (own_end) {
        CHECK(r->end.reason == a.reason && st->tokens == a.n && r->text.len == a.text.len);
    }
    if (t && st->tokens > 0 && r->end.reason != IC_END_ERROR) {
        t->kind = r->req->prompt ? IC_SESSION_RAW : IC_SESSION_CHAT;
        memcpy(prompt + n, a.token, sizeof *prompt * (size_t)st->tokens);
        t->n = n + st->tokens;
        memcpy(t->tokens, prompt, sizeof *prompt * (size_t)t->n);
        if (t->kind == IC_SESSION_CHAT) {
            for (size_t i = 0; i < r->req->n_msgs; i++)
                talk_add(t, r->req->msgs[i].role, r->req->msgs[i].content, strlen(r->req->msgs[i].content));
            talk_add(t, "assistant", r->text.data ? r->text.data : "", r->text.len);
        }
    }
    ic_buf_deinit(&a.text);
}

/* A request has been refused or failed: for a reason that we know of? */
static void check_error(struct world *w, struct client_req *r)
{
    static int32_t prompt[TOKENS_MAX];
    const struct talk *t = r->session >= 0 ? &w->talk[r->session] : NULL;
    int32_t n, most = w->f.be.ctx_size - 1;

    if (strstr(r->err, "no hidden state")) {
        CHECK(r->req->pooling && w->f.injected > 0 && r->error_more);
    } else if (strstr(r->err, "injected")) {
        CHECK(w->f.injected > 0);
    } else if (strstr(r->err, "failed to decode") || strstr(r->err, "cache is full")) {
        CHECK(w->f.bad_decodes > 0 && r->error_more);
    } else if (strstr(r->err, "device is lost")) {
        CHECK(r->code == IC_INTERNAL && r->error_more && w->f.gone);
    } else if (r->code == IC_UNAVAILABLE) {
        CHECK(atomic_load(&r->req->cancel) == IC_CANCEL_SHUTDOWN && r->error_more);
    } else if (!t || !t->unknown) {
        n = prompt_of(w, r, prompt);
        if (r->code == IC_TOO_LARGE)
            CHECK(n > most);
        else if (strstr(r->err, "goes on"))
            CHECK(t && t->kind != IC_SESSION_NEW &&
                  (t->kind == IC_SESSION_CHAT) == (r->req->prompt != NULL));
        else
            CHECK(r->code == IC_BAD_REQUEST && strstr(r->err, "empty") && n == 0);
    }
}

static void on_event(void *arg, struct ic_event *ev)
{
    struct world *w = arg;

    CHECK(ev->owner < (uint64_t)w->n);
    struct client_req *r = &w->r[ev->owner];
    CHECK(ev->rid == r->req->rid && !r->ended);
    CHECK(atomic_load(&r->req->cancel) != IC_CANCEL_GONE);
    w->events++;
    switch (ev->kind) {
    case IC_EVENT_QUEUED:
        CHECK(!r->queued && ev->index >= 1 && ev->index <= w->c.waiting + 1);
        CHECK(r->last_index < 0 || w->c.preempted > 0 || w->f.epoch > 0);
        r->queued = true;
        break;
    case IC_EVENT_TOKEN:
        CHECK(!r->error_more && ev->index > r->last_index && ev->len > 0 &&
              ic_utf8_valid(ev->text, ev->len));
        CHECK((ev->n_top || ev->text[ev->len] == 0) && ev->stamp_ns == w->f.now);
        r->last_index = ev->index;
        ic_buf_put(&r->text, ev->text, ev->len);
        break;
    case IC_EVENT_EMBEDDING:
        CHECK(r->req->pooling && !r->has_vector && !r->error_more && ev->len == sizeof r->vector);
        memcpy(r->vector, ev->text, sizeof r->vector);
        r->has_vector = true;
        break;
    case IC_EVENT_ERROR:
        CHECK(!r->error_more);
        r->code = ev->code;
        snprintf(r->err, sizeof r->err, "%s", ev->text);
        r->error_more = ev->more;
        r->ended = !ev->more;
        CHECK(ev->more || !r->queued); /* who has been told to wait gets an END */
        if (!w->unchecked)
            check_error(w, r);
        break;
    case IC_EVENT_END:
        r->ended = true;
        CHECK((ev->reason == IC_END_ERROR) == r->error_more);
        r->end = *ev;
        if (!w->unchecked)
            check_end(w, r);
        break;
    default: CHECK(!"an event of text");
    }
    free(ev);
}

static void in_decode(void *arg, const struct ic_row *rows, int32_t n)
{
    struct world *w = arg;
    bool alive = false;

    if (!w->s->slots[rows[0].seq].run)
        return; /* a pinned prefix: nobody's */
    /* Clients go while the model computes. */
    for (int32_t i = 0; i < w->s->n_running; i++)
        if ((int)rnd(w, 1000) < w->cancels_in_decode) {
            enum ic_cancel none = IC_CANCEL_NONE;
            struct client_req *r = &w->r[w->s->order[i]->req->owner];
            atomic_compare_exchange_strong(&r->req->cancel, &none, IC_CANCEL_ABORT);
        }
    /* The very question that batch_is_dead answers, asked of the rows themselves. */
    for (int32_t i = 0; i < n; i++)
        alive |= atomic_load(&w->s->slots[rows[i].seq].run->req->cancel) == IC_CANCEL_NONE;
    CHECK(ic_text_sched_batch_is_dead(w->s) == !alive);
}

/* For the draft, which knows what will be drawn. */
static const struct fake_sampler *sampler_of(void *arg, int32_t seq)
{
    const struct run *r = ((struct world *)arg)->s->slots[seq].run;

    CHECK(r && r->sampler && r->rows == 1); /* it is asked for streams only */
    return r->sampler;
}

static struct world *world_new(uint64_t seed, int32_t parallel, int32_t batch, int32_t ctx, int32_t kv)
{
    struct world *w = calloc(1, sizeof *w);

    IC_ASSERT(w);
    seed_now = seed;
    w->rng = fake_mix(seed, 11);
    fake_init(&w->f, parallel, batch, ctx, kv);
    w->f.rng = fake_mix(seed, 12);
    w->f.on_event = on_event;
    w->f.in_decode = in_decode;
    w->f.sampler_of = sampler_of;
    w->f.arg = w;
    for (int i = 0; i < SESSIONS; i++)
        w->talk[i].handle = ++w->last_handle;
    CHECK(ic_text_sched_open(&w->s, &w->f.be, &w->c, NULL) == IC_OK);
    w->f.sched = w->s;
    return w;
}

/* After a change of the back end's sizes or the operator's policy, before anything is asked. */
static void world_restart(struct world *w)
{
    ic_text_sched_close(&w->s);
    CHECK(ic_text_sched_open(&w->s, &w->f.be, &w->c, NULL) == IC_OK);
    w->f.sched = w->s;
}

/* Below host memory, for the next restart. */
static void with_disk(struct world *w, size_t max)
{
    w->f.be.disk = fake_disk_init(&w->disk, max);
    w->disk.now = &w->f.now;
}

static void world_free(struct world *w)
{
    ic_text_sched_close(&w->s);
    CHECK(w->disk.n == 0 && w->disk.sum == 0);
    for (int i = 0; i < w->n; i++) {
        struct client_req *r = &w->r[i];
        CHECK(r->ended || atomic_load(&r->req->cancel) == IC_CANCEL_GONE);
        CHECK(atomic_load(&r->req->refs) == 1);
        ic_text_req_unref(r->req);
        ic_buf_deinit(&r->text);
    }
    CHECK(w->f.samplers == 0 && w->c.running == 0 && w->c.waiting == 0);
    for (int i = 0; i < SESSIONS; i++)
        talk_reset(w, &w->talk[i]);
    free(w);
}

/* A new request, not yet submitted. */
static struct client_req *ask(struct world *w, int session, const char *prompt, int32_t max_tokens)
{
    IC_ASSERT(w->n < REQS);
    struct client_req *r = &w->r[w->n];
    struct ic_text_req *q = ic_text_req_new();

    IC_ASSERT(q);
    *r = (struct client_req){.req = q, .session = session, .last_index = -1};
    q->owner = (uint64_t)w->n++;
    q->session = session >= 0 ? w->talk[session].handle : 0;
    q->arrival_ns = w->f.now;
    q->params.max_tokens = max_tokens;
    if (prompt) {
        q->prompt = strdup(prompt);
        q->prompt_len = strlen(prompt);
    }
    return r;
}

static void say(struct client_req *r, const char *role, const char *content)
{
    struct ic_text_req *q = r->req;
    q->msgs = realloc(q->msgs, sizeof *q->msgs * (q->n_msgs + 1));
    IC_ASSERT(q->msgs);
    q->msgs[q->n_msgs++] = (struct ic_chat_msg){strdup(role), strdup(content)};
}

static struct client_req *submit(struct world *w, struct client_req *r)
{
    ic_text_sched_submit(w->s, ic_text_req_ref(r->req));
    return r;
}

static struct client_req *submit_embed(struct world *w, const char *prompt, enum ic_pooling kind)
{
    struct client_req *r = ask(w, -1, prompt, 0);
    r->req->pooling = kind;
    return submit(w, r);
}

static struct client_req *submit_prompt(struct world *w, const char *prompt, int32_t max_tokens)
{
    return submit(w, ask(w, -1, prompt, max_tokens));
}

static void cancel(struct world *w, struct client_req *r, enum ic_cancel how)
{
    enum ic_cancel none = IC_CANCEL_NONE;
    (void)w;
    atomic_compare_exchange_strong(&r->req->cancel, &none, how);
}

static void close_session(struct world *w, int i)
{
    ic_text_sched_session_close(w->s, w->talk[i].handle);
    for (int k = 0; k < w->n; k++)
        CHECK(w->r[k].session != i || w->r[k].req->session != w->talk[i].handle || w->r[k].ended ||
              atomic_load(&w->r[k].req->cancel) == IC_CANCEL_GONE);
    talk_reset(w, &w->talk[i]);
}

/* ---- the state after a tick ------------------------------------------------------------------------------------ */

static bool same(const int32_t *a, const int32_t *b, int32_t n)
{
    return n <= 0 || !memcmp(a, b, sizeof *a * (size_t)n);
}

static void check_slots(const struct world *w)
{
    static int32_t held[FAKE_CTX];
    const struct ic_text_sched *s = w->s;
    int32_t with_run = 0;

    CHECK(ic_prefix_check(s->prefix));
    CHECK(ic_prefix_cells(s->prefix) == fake_cells(&w->f)); /* shared ones once, and none lost */
    CHECK(ic_prefix_cells(s->prefix) <= w->f.be.kv_size);
    for (int32_t i = 0; i < s->n_slots; i++) {
        const struct slot *sl = &s->slots[i];
        const struct fake_seq *kv = &w->f.seq[i];
        CHECK(sl->n_past == kv->n && ic_prefix_len(s->prefix, i) == kv->n);
        ic_prefix_tokens(s->prefix, i, 0, kv->n, held);
        CHECK(same(kv->token, held, kv->n));
        with_run += sl->run != NULL;
        if (sl->run) {
            const struct run *r = sl->run;
            CHECK(r->slot == i && sl->n_past < r->n_tokens && same(kv->token, r->tokens, sl->n_past));
            CHECK(r->n_tokens <= w->f.be.ctx_size);
            CHECK(!r->lead || (r->lead->slot >= 0 && same(r->tokens, r->lead->tokens, r->lead_n)));
        }
    }
    CHECK(with_run == s->n_running && w->c.running == s->n_running);
}

static void check_session(const struct world *w, const struct ic_session *se)
{
    const struct ic_text_sched *s = w->s;
    int holders = 0;

    for (int32_t i = 0; i < s->n_running; i++)
        holders += s->order[i]->session == se;
    for (const struct run *r = s->waiting; r; r = r->next)
        holders += r->session == se && r->prepared;
    CHECK(holders == se->busy);
    for (int i = 0; i < SESSIONS && !w->unchecked; i++) {
        const struct talk *t = &w->talk[i];
        if (t->handle != se->handle || t->unknown || se->busy)
            continue;
        CHECK(se->kind == t->kind);
        if (t->kind == IC_SESSION_RAW)
            CHECK(se->n_tokens == t->n && same(se->tokens, t->tokens, t->n));
        CHECK(se->n_msgs == t->n_msgs);
        for (size_t k = 0; k < t->n_msgs; k++)
            CHECK(!strcmp(se->msgs[k].content, t->msgs[k].content) &&
                  !strcmp(se->msgs[k].role, t->msgs[k].role));
    }
}

/* The host's part and the disk's: their sums are what they say, and within their bounds. */
static void check_spill(const struct world *w)
{
    const struct ic_spill *sp = &w->s->spill;
    size_t sum = 0, on_disk = 0;
    int32_t n = 0, files = 0;

    for (const struct ic_spill_part *p = sp->first; p; p = p->next, n++) {
        sum += sizeof *p + sizeof *p->tokens * (size_t)p->to + (p->file ? 0 : p->bytes);
        on_disk += p->file ? ic_spill_file_bytes(p) : 0;
        files += p->file != 0;
        CHECK((p->file == 0) == (p->data != NULL));
    }
    CHECK(sum == sp->sum && sum <= sp->max && n == sp->count);
    CHECK(on_disk == sp->disk_sum && files == sp->disk_count && w->disk.sum == on_disk &&
          w->disk.n == files);
    CHECK(!sp->disk || on_disk <= sp->disk->max);
}

/* Each client's numbers are those of the lists. */
static void check_clients(const struct world *w)
{
    const struct ic_text_sched *s = w->s;
    int32_t n = 0;

    for (const struct ic_text_client *c = s->clients; c; c = c->next, n++) {
        int32_t waiting = 0, running = 0;
        for (const struct run *r = s->waiting; r; r = r->next)
            waiting += r->client == c;
        for (int32_t i = 0; i < s->n_running; i++)
            running += s->order[i]->client == c;
        CHECK(waiting == c->n_waiting && running == c->n_running && c->balance <= IC_TURN_TOKENS);
        CHECK(waiting || running || c->balance < 0);
    }
    CHECK(n == s->n_clients);
}

static void check_state(const struct world *w)
{
    const struct ic_text_sched *s = w->s;
    int64_t waiting = 0;

    check_slots(w);
    check_spill(w);
    check_clients(w);
    for (int i = 0; i < IC_SESSION_BUCKETS; i++)
        for (const struct ic_session *se = s->sessions.bucket[i]; se; se = se->next)
            check_session(w, se);
    for (const struct run *r = s->waiting; r; r = r->next, waiting++) {
        CHECK(r->slot == -1 && (r->prepared || !r->tokens));
        CHECK(!r->next || r->next->req->priority <= r->req->priority);
    }
    CHECK(w->c.waiting == waiting);
}

struct before {
    uint64_t owner[REQS];
    bool behind_own_session[REQS]; /* somebody of its session is before it */
    int n;
};

static void look_at_queue(const struct world *w, struct before *b)
{
    b->n = 0;
    for (const struct run *r = w->s->waiting; r; r = r->next) {
        bool *behind = &b->behind_own_session[b->n];
        *behind = r->session && r->session->busy && !r->prepared;
        for (const struct run *ahead = w->s->waiting; ahead != r; ahead = ahead->next)
            *behind |= r->session && ahead->session == r->session;
        b->owner[b->n++] = r->req->owner;
    }
}

/* Who has been admitted by this tick must have had nobody in front who could have been admitted. */
static void check_overtaking(const struct world *w, const struct before *was)
{
    for (int i = 0; i < was->n; i++) {
        const struct run *in = NULL;
        for (int32_t k = 0; k < w->s->n_running; k++)
            if (w->s->order[k]->req->owner == was->owner[i])
                in = w->s->order[k];
        for (const struct run *r = w->s->waiting; in && r; r = r->next)
            for (int k = 0; k < i; k++)
                if (r->req->owner == was->owner[k] &&
                    (r->client == in->client || r->req->priority > in->req->priority))
                    CHECK(was->behind_own_session[k]);
    }
}

/* One tick and all that must hold whatever it did. */
static bool tick(struct world *w)
{
    struct before was;
    bool must_end[REQS] = {false};
    uint64_t preempted = w->c.preempted;

    look_at_queue(w, &was);
    for (int i = 0; i < w->n; i++)
        must_end[i] = atomic_load(&w->r[i].req->cancel) != IC_CANCEL_NONE ||
                      (w->r[i].req->deadline_ns && w->f.now >= w->r[i].req->deadline_ns);
    w->ticks++;
    bool more = ic_text_sched_tick(w->s);
    check_state(w);
    for (int i = 0; i < w->n; i++)
        if (must_end[i]) { /* within one tick, wherever it was */
            for (int32_t k = 0; k < w->s->n_running; k++)
                CHECK(w->s->order[k]->req != w->r[i].req);
            for (const struct run *r = w->s->waiting; r; r = r->next)
                CHECK(r->req != w->r[i].req);
        }
    if (w->c.preempted == preempted &&
        w->f.epoch == 0) /* a victim goes to the front, which is not overtaking */
        check_overtaking(w, &was);
    CHECK(more || (!w->s->waiting && !w->s->n_running));
    return more;
}

/* A piece of what is idle goes to host memory, unless somebody runs or waits. */
static bool tidy(struct world *w)
{
    int32_t cells = fake_cells(&w->f), any = w->s->n_running || w->s->waiting;
    bool more = ic_text_sched_tidy(w->s);

    check_state(w);
    CHECK(!more || !any);
    CHECK(more ? fake_cells(&w->f) <= cells
               : fake_cells(&w->f) == cells); /* equal: another idle one held the same */
    return more;
}

/* The model goes, by our will or by itself. */
static void lose(struct world *w, bool orderly)
{
    if (orderly)
        ic_text_sched_park(w->s);
    fake_lose(&w->f);
    if (!orderly)
        ic_text_sched_forget_kv(w->s, "the device is lost");
    CHECK(ic_text_sched_is_parked(w->s) && w->s->n_running == 0 && w->c.running == 0);
    check_state(w);
}

static void reopen(struct world *w)
{
    fake_reopen(&w->f);
    CHECK(ic_text_sched_unpark(w->s, &w->f.be, NULL) == IC_OK);
    check_state(w);
}

/* Ticks until nothing is left, and sees to it that every tick but a few gets something done. */
static void run_dry(struct world *w)
{
    int idle = 0;

    if (ic_text_sched_is_parked(w->s))
        reopen(w);
    for (;;) {
        int64_t rows = w->f.decoded_rows, events = w->events;
        if (!tick(w))
            break;
        idle = w->f.decoded_rows == rows && w->events == events ? idle + 1 : 0;
        CHECK(idle <= 2 * FAKE_SEQS + 2);
        CHECK(w->ticks < 1000000);
    }
    for (int i = 0; i < w->n; i++)
        CHECK(w->r[i].ended || atomic_load(&w->r[i].req->cancel) == IC_CANCEL_GONE);
    CHECK(w->c.running == 0 && w->c.waiting == 0 && w->f.samplers == 0);
    CHECK(w->c.kv_used == fake_cells(&w->f));
}

static uint64_t env_number(const char *name, uint64_t def)
{
    const char *v = getenv(name);
    return v ? strtoull(v, NULL, 10) : def;
}

/* Text that begins unlike any that was asked for lately. */
static char *letters(char *out, int n)
{
    static int calls;

    calls++;
    for (int i = 0; i < n; i++)
        out[i] = (char)('a' + (i + 7 * calls) % 26);
    out[n] = 0;
    return out;
}

static bool is_running(const struct world *w, const struct client_req *r)
{
    for (int32_t i = 0; i < w->s->n_running; i++)
        if (w->s->order[i]->req == r->req)
            return true;
    return false;
}

static struct ic_session *session(struct world *w, int i)
{
    return ic_session_find(&w->s->sessions, w->talk[i].handle);
}

/* How many of a session's tokens are in the KV. */
static int32_t held(struct world *w, int i)
{
    struct ic_session *se = session(w, i);
    int32_t holder,
        n = ic_prefix_match(w->s->prefix, "", se->tokens, se->n_tokens, w->f.be.window, &holder);
    return n < IC_GO_ON_MIN ? 0 : n; /* every prompt begins with BOS */
}

/* All that nobody uses goes, as when others need the cells. */
static void empty_cache(struct world *w)
{
    while (ic_cells_evict(w->s, -1))
        ;
    check_state(w);
}

/* Never an end of its own, so that lengths are known. */
static struct client_req *endless(struct client_req *r)
{
    r->req->params.seed &= ~1u;
    return r;
}

#endif
