/* The text scheduler over a fake model (fake_backend.h) and a fake clock: thousands of random schedules against an
 * oracle, and one test for each rule that random schedules cannot see.
 *
 * The oracle is the fake model asked alone: whatever happened to a request on its way (slices, preemption, evicted
 * sessions, aborted decodes), its text must be what the model says to its prompt, or a beginning of it. It follows
 * sessions at each END, for requests of one session are served one after the other.
 *
 * IC_SEED=n and IC_ROUNDS=n choose other schedules; a failure prints the seed of its schedule. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
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
#include "sched/fake_backend.h"

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
    int64_t asked_at;    /* the tick before which it was cancelled, 0: never */
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

static uint64_t seed_now; /* of the schedule under way, for messages */

#define CHECK(cond)                                                                                                    \
    do {                                                                                                               \
        if (!(cond)) {                                                                                                 \
            printf("schedule %llu: %s does not hold\n", (unsigned long long)seed_now, #cond);                          \
            fail_msg("%s:%d", __FILE__, __LINE__);                                                                     \
        }                                                                                                              \
    } while (0)

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
static void ask_alone(const struct world *w, const struct ic_text_params *p, const int32_t *prompt, int32_t n,
                      struct answer *a)
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

    if (strstr(r->err, "injected")) {
        CHECK(w->f.injected > 0);
    } else if (strstr(r->err, "failed to decode") || strstr(r->err, "cache is full")) {
        CHECK(w->f.bad_decodes > 0 && r->error_more);
    } else if (r->code == IC_UNAVAILABLE) {
        CHECK(atomic_load(&r->req->cancel) == IC_CANCEL_SHUTDOWN && r->error_more);
    } else if (!t || !t->unknown) {
        n = prompt_of(w, r, prompt);
        if (r->code == IC_TOO_LARGE)
            CHECK(n > most);
        else if (strstr(r->err, "goes on"))
            CHECK(t && t->kind != IC_SESSION_NEW && (t->kind == IC_SESSION_CHAT) == (r->req->prompt != NULL));
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
        CHECK(r->last_index < 0 || w->c.preempted > 0);
        r->queued = true;
        break;
    case IC_EVENT_TOKEN:
        CHECK(!r->error_more && ev->index > r->last_index && ev->len > 0 && ic_utf8_valid(ev->text, ev->len));
        CHECK((ev->n_top || ev->text[ev->len] == 0) && ev->stamp_ns == w->f.now);
        r->last_index = ev->index;
        ic_buf_put(&r->text, ev->text, ev->len);
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
    w->f.arg = w;
    for (int i = 0; i < SESSIONS; i++)
        w->talk[i].handle = ++w->last_handle;
    CHECK(ic_text_sched_open(&w->s, &w->f.be, &w->c, NULL) == IC_OK);
    w->f.sched = w->s;
    return w;
}

static void world_free(struct world *w)
{
    ic_text_sched_close(&w->s);
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

static int32_t min32(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

static void check_slots(const struct world *w)
{
    const struct ic_text_sched *s = w->s;
    int32_t with_run = 0;

    CHECK(cells_used(s) <= w->f.be.kv_size);
    for (int32_t i = 0; i < s->n_slots; i++) {
        const struct slot *sl = &s->slots[i];
        const struct fake_seq *kv = &w->f.seq[i];
        CHECK(sl->n_past == kv->n);
        with_run += sl->run != NULL;
        if (sl->run) {
            const struct run *r = sl->run;
            CHECK(r->slot == i && sl->session == r->session);
            CHECK(sl->n_past < r->n_tokens && same(kv->token, r->tokens, sl->n_past));
            CHECK(r->n_tokens <= w->f.be.ctx_size);
            if (r->session)
                CHECK(r->n_keep <= r->session->n_tokens && same(r->tokens, r->session->tokens, r->n_keep));
        } else if (sl->session) {
            CHECK(sl->session->n_past == sl->n_past && same(kv->token, sl->session->tokens, sl->n_past));
        } else {
            CHECK(sl->n_past == 0);
        }
        CHECK(!sl->session || sl->session->slot == i);
    }
    CHECK(with_run == s->n_running && w->c.running == s->n_running);
}

static void check_session(const struct world *w, const struct ic_session *se)
{
    const struct ic_text_sched *s = w->s;
    int holders = 0;

    CHECK(se->slot < s->n_slots && (se->slot < 0 || s->slots[se->slot].session == se));
    CHECK(se->slot >= 0 || se->n_past == 0);
    CHECK(se->n_past <= se->n_tokens);
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
            CHECK(!strcmp(se->msgs[k].content, t->msgs[k].content) && !strcmp(se->msgs[k].role, t->msgs[k].role));
    }
}

static void check_state(const struct world *w)
{
    const struct ic_text_sched *s = w->s;
    int64_t waiting = 0;

    check_slots(w);
    for (int i = 0; i < IC_SESSION_BUCKETS; i++)
        for (const struct ic_session *se = s->sessions.bucket[i]; se; se = se->next)
            check_session(w, se);
    for (const struct run *r = s->waiting; r; r = r->next, waiting++) {
        CHECK(r->slot == -1 && (r->prepared || !r->tokens));
        CHECK(!r->next || r->next->req->priority <= r->req->priority);
        if (r->prepared && r->session)
            CHECK(same(r->tokens, r->session->tokens, min32(r->n_keep, r->session->n_past)));
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
                if (r->req->owner == was->owner[k])
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
    if (w->c.preempted == preempted) /* a victim goes to the front, which is not overtaking */
        check_overtaking(w, &was);
    CHECK(more || (!w->s->waiting && !w->s->n_running));
    return more;
}

/* Ticks until nothing is left, and sees to it that every tick but a few gets something done. */
static void run_dry(struct world *w)
{
    int idle = 0;

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
    CHECK(w->c.kv_used == fake_cells(&w->f)); /* all that is held is of idle sessions: check_slots */
}

/* ---- random schedules -------------------------------------------------------------------------------------------- */

static void random_text(struct world *w, char *out, size_t n)
{
    for (size_t i = 0; i < n; i++)
        out[i] = "abcxyz ~"[rnd(w, 8)];
    out[n] = 0;
}

static void random_submit(struct world *w)
{
    static const char *const stops[] = {"ab", "bca", "dd", "\xC3\xA9", "aa a", "c", "ddab"};
    char text[200];
    int session = rnd(w, 3) ? -1 : (int)rnd(w, SESSIONS);
    uint64_t most = rnd(w, 12) ? (uint64_t)w->f.be.ctx_size * 2 / 3 : (uint64_t)w->f.be.ctx_size + 20;
    bool chat = session >= 0 ? (session & 1) ^ !rnd(w, 30) : !rnd(w, 3);
    struct client_req *r;

    if (most > sizeof text - 1)
        most = sizeof text - 1;
    random_text(w, text, rnd(w, rnd(w, 3) ? most / 3 + 1 : most));
    r = ask(w, session, chat ? NULL : text, -1);
    for (uint64_t i = 0; chat && i < 1 + rnd(w, 2); i++) {
        say(r, i ? "user" : "system", text);
        random_text(w, text, rnd(w, most / 3 + 1));
    }
    struct ic_text_params *p = &r->req->params;
    p->seed = (uint32_t)rnd(w, 1 << 20);
    p->max_tokens = rnd(w, 4) ? (int32_t)rnd(w, 12) : rnd(w, 2) ? -1 : 0;
    while (p->n_stop < 3 && rnd(w, 2))
        p->stop[p->n_stop++] = strdup(stops[rnd(w, sizeof stops / sizeof *stops)]);
    r->req->priority = rnd(w, 3) ? IC_PRIO_NORMAL : (enum ic_priority)rnd(w, 3);
    if (!rnd(w, 8))
        r->req->deadline_ns = w->f.now + (int64_t)rnd(w, 60000);
    if (!rnd(w, 40))
        cancel(w, r, IC_CANCEL_ABORT); /* before anybody has seen it */
    submit(w, r);
}

static void random_cancel(struct world *w)
{
    struct client_req *r = &w->r[w->n ? rnd(w, (uint64_t)w->n) : 0];

    if (!w->n || r->ended)
        return;
    enum ic_cancel how = (enum ic_cancel)(1 + rnd(w, 3));
    if (how == IC_CANCEL_GONE && r->session >= 0 && r->req->session == w->talk[r->session].handle)
        w->talk[r->session].unknown = true;
    cancel(w, r, how);
}

static struct world *random_world(uint64_t seed)
{
    uint64_t g = fake_mix(seed, 5);
    int32_t parallel = 1 + (int32_t)(fake_random(&g) % 6), ctx = 16 + (int32_t)(fake_random(&g) % 80);
    int32_t batch = parallel + (int32_t)(fake_random(&g) % 24), kv = ctx + (int32_t)(fake_random(&g) % (uint64_t)(2 * ctx));
    struct world *w = world_new(seed, parallel, batch, ctx, kv);

    w->f.recurrent = rnd(w, 4) == 0;
    w->f.add_bos = rnd(w, 4) != 0;
    w->f.ns_base = (int64_t)rnd(w, 5000);
    w->f.ns_row = (int64_t)rnd(w, 1000);
    if (rnd(w, 2)) {
        w->f.full = (int)rnd(w, 50);
        w->f.aborted = (int)rnd(w, 100);
        w->f.failed = (int)rnd(w, 20);
        w->f.draw_fails = (int)rnd(w, 10);
        w->f.open_fails = (int)rnd(w, 30);
        w->f.tokenize_fails = (int)rnd(w, 30);
    }
    w->cancels_in_decode = rnd(w, 2) ? 0 : (int)rnd(w, 100);
    return w;
}

static void random_schedule(uint64_t seed)
{
    struct world *w = random_world(seed);
    int steps = 20 + (int)rnd(w, 200), busy = 2 + (int)rnd(w, 6);

    for (int i = 0; i < steps && w->n < REQS - 4; i++) {
        uint64_t what = rnd(w, 20);
        if (what < (uint64_t)busy)
            random_submit(w);
        else if (what == 8)
            random_cancel(w);
        else if (what == 9 && !rnd(w, 3))
            close_session(w, (int)rnd(w, SESSIONS));
        else if (what == 10)
            w->f.now += (int64_t)rnd(w, 20000);
        else if (what == 11)
            ic_text_sched_reap(w->s, NULL); /* a rest between two ticks */
        else
            tick(w);
    }
    if (rnd(w, 8)) { /* else: the server ends in the middle of it */
        w->f.full = w->f.aborted = w->f.failed = w->f.draw_fails = w->f.open_fails = w->f.tokenize_fails = 0;
        w->cancels_in_decode = 0;
        int64_t from = w->ticks;
        run_dry(w);
        CHECK(w->ticks - from <= 40LL * w->n * w->f.be.ctx_size + 100);
        if (rnd(w, 2)) {
            for (int i = 0; i < SESSIONS; i++)
                close_session(w, i);
            CHECK(!tick(w) && fake_cells(&w->f) == 0 && w->c.kv_used == 0 && w->c.sessions == 0);
        }
    }
    world_free(w);
}

static uint64_t env_number(const char *name, uint64_t def)
{
    const char *v = getenv(name);
    return v ? strtoull(v, NULL, 10) : def;
}

static void thousands_of_schedules(void **state)
{
    uint64_t from = env_number("IC_SEED", 1), rounds = env_number("IC_ROUNDS", 4000);

    (void)state;
    for (uint64_t i = 0; i < rounds; i++)
        random_schedule(from + i);
}

/* ---- one rule at a time ------------------------------------------------------------------------------------------- */

static char *letters(char *out, int n)
{
    for (int i = 0; i < n; i++)
        out[i] = (char)('a' + i % 26);
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

/* Never an end of its own, so that lengths are known. */
static struct client_req *endless(struct client_req *r)
{
    r->req->params.seed &= ~1u;
    return r;
}

static void preemption_loses_nothing(void **state)
{
    struct world *w = world_new(1, 2, 8, 60, 64);
    char text[64];

    (void)state;
    struct client_req *a = endless(submit_prompt(w, letters(text, 10), 30));
    struct client_req *b = endless(submit_prompt(w, letters(text, 8), 30));
    run_dry(w); /* 40 and 38 cells do not fit into 64 at once; the oracle compares the texts */
    CHECK(w->c.preempted > 0);
    CHECK(a->end.reason == IC_END_LENGTH && a->end.stats.tokens == 30);
    CHECK(b->end.reason == IC_END_LENGTH && b->end.stats.tokens == 30);
    world_free(w);
}

static void the_victim_is_the_last_of_the_lowest_priority(void **state)
{
    struct world *w = world_new(2, 3, 16, 64, 64);

    (void)state;
    struct client_req *low = ask(w, -1, "ab", 40), *high = ask(w, -1, "ab", 40);
    low->req->priority = IC_PRIO_LOW;
    high->req->priority = IC_PRIO_HIGH;
    endless(submit(w, low));
    tick(w);
    struct client_req *mid = endless(submit_prompt(w, "ab", 40));
    tick(w);
    endless(submit(w, high));
    while (w->c.preempted == 0)
        CHECK(tick(w));
    CHECK(is_running(w, high) && is_running(w, mid) && !is_running(w, low));
    while (w->c.preempted == 1)
        CHECK(tick(w));
    CHECK(is_running(w, high) && !is_running(w, mid));
    CHECK(w->s->waiting->req == mid->req && w->s->waiting->next->req == low->req); /* normal before low */
    run_dry(w);
    world_free(w);
}

/* A back end that has fewer cells than it said: whoever can go on must, and must not be kept from it by somebody who
 * is admitted and thrown out again for ever. */
static void less_room_than_promised_ends_all_the_same(void **state)
{
    (void)state;
    for (int32_t real = 20; real < 90; real += 3) {
        struct world *w = world_new(3, 3, 16, 48, 100);
        char text[64];
        w->f.cells_real = real;
        for (int i = 0; i < 5; i++)
            endless(submit_prompt(w, letters(text, 10 + i), 20));
        run_dry(w);
        for (int i = 0; i < 5; i++)
            CHECK(w->r[i].end.reason == (real >= 30 + i ? IC_END_LENGTH : IC_END_ERROR));
        world_free(w);
    }
}

static void idle_sessions_lose_their_cells_oldest_first_and_only_for_need(void **state)
{
    struct world *w = world_new(4, 4, 32, 64, 100);
    char text[64];

    (void)state;
    for (int i = 0; i < 3; i++) {
        endless(submit(w, ask(w, i, letters(text, 15), 5))); /* leaves 20 cells: BOS, 15 and 4 decoded */
        run_dry(w);
    }
    submit_prompt(w, letters(text, 9), 20); /* 10, then 30: fits beside the 60 */
    run_dry(w);
    CHECK(session(w, 0)->n_past == 20 && session(w, 1)->n_past == 20 && session(w, 2)->n_past == 20);
    submit_prompt(w, letters(text, 49), 0); /* 50 of 40 free: one has to go, which is who was idle longest */
    run_dry(w);
    CHECK(session(w, 0)->n_past == 0 && session(w, 0)->slot < 0 && session(w, 0)->n_tokens == 21);
    CHECK(session(w, 1)->n_past == 20 && session(w, 2)->n_past == 20);
    struct client_req *again = submit(w, ask(w, 0, "x", 1)); /* computed anew: the oracle compares */
    run_dry(w);
    CHECK(again->end.stats.cached_tokens == 0 && again->end.stats.prompt_tokens == 22);
    world_free(w);
}

static void a_slot_is_taken_from_the_oldest_idle_session(void **state)
{
    struct world *w = world_new(5, 2, 32, 64, 200);
    char text[64];

    (void)state;
    for (int i = 0; i < 2; i++) {
        submit(w, ask(w, i, letters(text, 8), 3));
        run_dry(w);
    }
    submit(w, ask(w, 0, "y", 3));
    run_dry(w); /* now session 1 is the older one */
    submit_prompt(w, letters(text, 8), 3);
    run_dry(w);
    CHECK(session(w, 0)->slot >= 0 && session(w, 1)->slot < 0);
    world_free(w);
}

static void priorities_then_arrival(void **state)
{
    struct world *w = world_new(6, 1, 8, 64, 64);
    static const enum ic_priority prio[] = {IC_PRIO_LOW, IC_PRIO_NORMAL, IC_PRIO_HIGH, IC_PRIO_NORMAL, IC_PRIO_HIGH};
    static const int want[] = {2, 4, 1, 3, 0};
    struct client_req *r[5];
    int done = 0;

    (void)state;
    struct client_req *first = submit_prompt(w, "first", 4);
    tick(w);
    for (int i = 0; i < 5; i++) {
        r[i] = ask(w, -1, "abc", 2);
        r[i]->req->priority = prio[i];
        submit(w, r[i]);
    }
    while (tick(w)) {
        int ended = 0;
        for (int i = 0; i < 5; i++)
            ended += r[i]->ended;
        CHECK(ended <= done + 1);
        if (ended > done)
            CHECK(first->ended && r[want[done]]->ended);
        done = ended;
    }
    CHECK(done == 5);
    world_free(w);
}

static void nobody_overtakes_but_whose_predecessor_waits_for_its_session(void **state)
{
    struct world *w = world_new(7, 4, 16, 80, 100);
    char text[100];

    (void)state;
    endless(submit(w, ask(w, 0, letters(text, 20), 20)));
    tick(w);
    struct client_req *second = submit(w, ask(w, 0, "b", 1)); /* behind its own session: passes are allowed */
    struct client_req *big = submit_prompt(w, letters(text, 75), 1);
    struct client_req *small = submit_prompt(w, "c", 1);
    tick(w);
    CHECK(!is_running(w, second) && !is_running(w, big) && !is_running(w, small));
    CHECK(second->queued && big->queued && small->queued);
    cancel(w, big, IC_CANCEL_ABORT);
    tick(w);
    CHECK(big->ended && small->ended && !second->ended); /* one tick is all that it needed */
    run_dry(w);
    CHECK(second->end.stats.cached_tokens > 0);
    world_free(w);
}

/* The heart of it: a stream's gap while a long prompt comes in. */
static void a_long_prompt_stretches_gaps_by_a_bounded_factor(void **state)
{
    static const struct {
        int64_t base, row;
    } cost[] = {{1000, 10}, {1000, 100}, {100000, 1}, {20000, 1000}, {100, 100000}};
    char text[1000];

    (void)state;
    for (size_t i = 0; i < sizeof cost / sizeof *cost; i++) {
        struct world *w = world_new(8 + i, 4, 256, 1000, 3000);
        w->f.ns_base = cost[i].base;
        w->f.ns_row = cost[i].row;
        endless(submit_prompt(w, letters(text, 300), 1)); /* teaches what a prompt costs */
        tick(w);
        CHECK(w->f.last_n == 256); /* nobody is disturbed: a whole batch */
        run_dry(w);
        struct client_req *stream = endless(submit_prompt(w, "s", 300));
        for (int k = 0; k < 10; k++)
            tick(w);
        struct client_req *late = submit_prompt(w, letters(text, 900), 1);
        int64_t alone = cost[i].base + cost[i].row, most = 0;
        int32_t slice = 0, ticks = 0;
        for (; !late->ended; ticks++) {
            int64_t was = w->f.now;
            int tokens = stream->last_index;
            CHECK(tick(w) && (stream->last_index > tokens || w->f.last_n > 1));
            most = w->f.now - was > most ? w->f.now - was : most;
            slice = w->f.last_n - 1 > slice ? w->f.last_n - 1 : slice;
        }
        if (slice > SLICE_MIN) /* below that the prompt would never be read */
            CHECK(most <= GAP_FACTOR * alone + cost[i].row);
        CHECK(slice >= SLICE_MIN && slice <= 255);
        /* And the room is used: by the true price of a row, so that the prompt is read as soon as can be. */
        double ideal = (double)((GAP_FACTOR - 1) * alone) / (double)cost[i].row;
        ideal = ideal > 255 ? 255 : ideal < SLICE_MIN ? SLICE_MIN : ideal;
        CHECK(ticks <= 4 + 1.2 * 901 / ideal); /* some to learn it */
        run_dry(w);
        world_free(w);
    }
}

static void an_unknown_cost_gets_the_smallest_slice(void **state)
{
    struct world *w = world_new(12, 4, 64, 200, 400);
    char text[200];

    (void)state;
    endless(submit_prompt(w, "s", 50));
    tick(w); /* two rows of prompt alone teach a price, decoding has none yet */
    submit_prompt(w, letters(text, 100), 1);
    tick(w);
    CHECK(w->f.last_n == 1 + SLICE_MIN);
    run_dry(w);
    world_free(w);
}

static void a_batch_is_dead_when_all_of_it_are_cancelled(void **state)
{
    struct world *w = world_new(13, 3, 3, 64, 128);
    char text[64];

    (void)state;
    CHECK(!ic_text_sched_batch_is_dead(w->s));
    struct client_req *a = endless(submit_prompt(w, "a", 30)), *b = endless(submit_prompt(w, "b", 30));
    for (int i = 0; i < 6; i++)
        tick(w);
    struct client_req *c = endless(submit_prompt(w, letters(text, 30), 30));
    for (int i = 0; i < 2; i++)
        tick(w);
    cancel(w, a, IC_CANCEL_ABORT);
    cancel(w, b, IC_CANCEL_GONE);
    CHECK(!ic_text_sched_batch_is_dead(w->s)); /* c has a row in it */
    for (int32_t i = 0; i < w->s->n_running; i++)
        if (w->s->order[i]->req == c->req)
            w->s->order[i]->rows = 0; /* as when there is no room for its prompt */
    CHECK(ic_text_sched_batch_is_dead(w->s));
    run_dry(w);
    world_free(w);
}

static void no_tokens_wanted(void **state)
{
    struct world *w = world_new(14, 2, 8, 64, 128);
    char text[64];

    (void)state;
    struct client_req *r = submit_prompt(w, letters(text, 30), 0);
    run_dry(w);
    CHECK(r->end.reason == IC_END_LENGTH && r->end.stats.tokens == 0 && r->end.stats.prompt_tokens == 31);
    CHECK(r->end.stats.ttft_ms <= 0 && r->last_index == -1 && w->f.decoded_rows == 31);
    world_free(w);
}

static void the_context_holds_what_it_says(void **state)
{
    struct world *w = world_new(15, 2, 8, 32, 64);
    char text[64];

    (void)state;
    struct client_req *full = endless(submit_prompt(w, letters(text, 30), -1)); /* 31 with BOS: one token fits */
    struct client_req *over = submit_prompt(w, letters(text, 31), -1);
    struct client_req *half = endless(submit_prompt(w, letters(text, 10), -1));
    run_dry(w);
    CHECK(full->end.reason == IC_END_LENGTH && full->end.stats.tokens == 1);
    CHECK(over->code == IC_TOO_LARGE && !over->error_more && over->ended);
    CHECK(strstr(over->err, "32") && strstr(over->err, "31"));
    CHECK(half->end.reason == IC_END_LENGTH && half->end.stats.tokens == 32 - 11);
    CHECK(w->c.refused == 1);
    world_free(w);
}

static void a_full_session_is_refused_even_where_nothing_is_added(void **state)
{
    struct world *w = world_new(16, 2, 8, 32, 64);
    char text[64];

    (void)state;
    endless(submit(w, ask(w, 0, letters(text, 20), -1)));
    run_dry(w);
    CHECK(session(w, 0)->n_tokens == 32);
    struct client_req *nothing = submit(w, ask(w, 0, "~", 4)), *more = submit(w, ask(w, 0, "a", 4));
    run_dry(w);
    CHECK(nothing->code == IC_TOO_LARGE && more->code == IC_TOO_LARGE);
    world_free(w);
}

static void a_conversation_goes_on_from_its_cells(void **state)
{
    struct world *w = world_new(17, 3, 16, 100, 300);

    (void)state;
    endless(submit(w, ask(w, 0, "hello", 7)));
    run_dry(w);
    struct client_req *two = submit(w, ask(w, 0, "again", 1));
    run_dry(w);
    CHECK(two->end.stats.cached_tokens == 1 + 5 + 6 && two->end.stats.prompt_tokens == 1 + 5 + 7 + 5);
    struct client_req *chat = ask(w, 1, NULL, 5);
    say(chat, "user", "hi");
    endless(submit(w, chat));
    run_dry(w);
    struct client_req *next = ask(w, 1, NULL, 5);
    say(next, "user", "yes");
    submit(w, next);
    run_dry(w); /* BOS, role, h, i, end, role: all of the first prompt, its answer is tokenised anew */
    CHECK(next->end.stats.cached_tokens >= 6);
    CHECK(session(w, 1)->n_msgs == 4);
    world_free(w);
}

/* The first of two requests of a session is cancelled in each state; the second must find the session as it was, or
 * as far as it was said. */
static void a_cancelled_request_leaves_its_session_right(void **state)
{
    static const enum ic_cancel how[] = {IC_CANCEL_ABORT, IC_CANCEL_GONE, IC_CANCEL_SHUTDOWN};
    char text[100];

    (void)state;
    for (int at = 0; at < 14; at++)
        for (int h = 0; h < 3; h++)
            for (int rec = 0; rec < 2; rec++) {
                struct world *w = world_new(18, 2, 4, 100, 200);
                w->f.recurrent = rec;
                endless(submit(w, ask(w, 0, "begin", 5)));
                run_dry(w);
                int32_t was = session(w, 0)->n_tokens, past = session(w, 0)->n_past;
                struct client_req *a = endless(submit(w, ask(w, 0, letters(text, 20), 20)));
                struct client_req *b = submit(w, ask(w, 0, "end", 3));
                for (int i = 0; i < at; i++)
                    tick(w);
                if (how[h] == IC_CANCEL_GONE)
                    w->talk[0].unknown = true;
                cancel(w, a, how[h]);
                int32_t said = a->last_index + 1;
                tick(w);
                run_dry(w);
                CHECK(b->ended && b->end.reason != IC_END_ERROR);
                if (at < 6) { /* 21 tokens, four a tick: nothing said yet */
                    CHECK(b->end.stats.prompt_tokens == was + 3);
                    CHECK(rec || b->end.stats.cached_tokens == past);
                }
                if (how[h] == IC_CANCEL_SHUTDOWN)
                    CHECK(b->end.stats.prompt_tokens == was + 3); /* an error is not a turn */
                else if (at >= 8)
                    CHECK(b->end.stats.prompt_tokens >= was + 20 + said + 3 && said > 0);
                world_free(w);
            }
}

static void a_refused_request_lets_its_session_go_on(void **state)
{
    struct world *w = world_new(19, 2, 8, 40, 80);
    char text[64];

    (void)state;
    endless(submit(w, ask(w, 0, "one", 3)));
    struct client_req *big = submit(w, ask(w, 0, letters(text, 60), 3)), *kind = ask(w, 0, NULL, 3);
    say(kind, "user", "no messages here");
    submit(w, kind);
    struct client_req *last = submit(w, ask(w, 0, "two", 3));
    run_dry(w);
    CHECK(big->code == IC_TOO_LARGE && kind->code == IC_BAD_REQUEST);
    CHECK(big->queued && big->error_more && big->end.reason == IC_END_ERROR); /* it had been told to wait */
    CHECK(last->end.stats.prompt_tokens == 1 + 3 + 3 + 3);
    world_free(w);
}

static void closing_a_session_ends_all_of_it(void **state)
{
    char text[64];

    (void)state;
    for (int at = 0; at < 10; at++) {
        struct world *w = world_new(20, 2, 4, 64, 128);
        endless(submit(w, ask(w, 0, letters(text, 16), 10)));
        for (int i = 0; i < 3; i++)
            submit(w, ask(w, 0, "b", 2));
        struct client_req *other = endless(submit_prompt(w, "other", 10));
        for (int i = 0; i < at; i++)
            tick(w);
        close_session(w, 0);
        for (int i = 0; i < 4; i++)
            CHECK(w->r[i].end.reason == IC_END_ABORT);
        check_state(w);
        run_dry(w);
        CHECK(other->end.reason == IC_END_LENGTH && w->c.kv_used == 0 && w->c.sessions == 0);
        world_free(w);
    }
}

static void deadlines_hold_in_the_queue_too(void **state)
{
    struct world *w = world_new(21, 1, 4, 100, 100);
    char text[100];

    (void)state;
    struct client_req *a = ask(w, -1, letters(text, 60), 30), *b = ask(w, -1, "b", 3);
    a->req->deadline_ns = w->f.now + 10 * w->f.ns_base; /* 16 slices of 4: in the middle of its prompt */
    b->req->deadline_ns = w->f.now + 5 * w->f.ns_base;
    submit(w, a);
    submit(w, b);
    while (!b->ended)
        CHECK(tick(w));
    CHECK(b->end.reason == IC_END_DEADLINE && !a->ended && b->last_index < 0);
    CHECK(w->f.now < b->req->deadline_ns + 2 * w->f.ns_base);
    run_dry(w);
    CHECK(a->end.reason == IC_END_DEADLINE && a->end.stats.tokens == 0 && a->end.stats.prompt_tokens == 61);
    world_free(w);
}

static void a_failed_decode_ends_who_was_in_it(void **state)
{
    struct world *w = world_new(22, 3, 8, 64, 128);

    (void)state;
    struct client_req *a = endless(submit_prompt(w, "aa", 20)), *b = endless(submit(w, ask(w, 0, "bb", 20)));
    for (int i = 0; i < 4; i++)
        tick(w);
    w->f.failed = 1024;
    tick(w);
    w->f.failed = 0;
    CHECK(a->ended && b->ended && a->error_more && b->error_more && a->code == IC_INTERNAL);
    struct client_req *c = submit(w, ask(w, 0, "cc", 2));
    run_dry(w);
    CHECK(c->end.stats.prompt_tokens == 3 && c->end.reason != IC_END_ERROR); /* b never happened */
    world_free(w);
}

/* An answer's held back tail leaves with the end-of-generation token, under an index of its own. */
static void what_was_held_back_leaves_at_the_end(void **state)
{
    int seen = 0;

    (void)state;
    for (uint32_t seed = 1; seed < 4000 && !seen; seed += 2) {
        struct world *w = world_new(23, 1, 8, 64, 64);
        struct client_req *r = ask(w, -1, "abc", -1);
        r->req->params.seed = seed;
        r->req->params.stop[0] = strdup("dda"); /* `dd` or `d` at the end is held */
        r->req->params.n_stop = 1;
        submit(w, r);
        run_dry(w);
        seen += r->end.reason == IC_END_STOP && r->text.len && r->text.data[r->text.len - 1] == 'd' &&
                r->last_index == r->end.stats.tokens;
        world_free(w);
    }
    CHECK(seen);
}

static void a_conversation_too_long_to_keep_is_refused_whole(void **state)
{
    struct world *w = world_new(24, 1, 64, 1000, 1000);

    (void)state;
    struct client_req *first = ask(w, 1, NULL, 2);
    say(first, "user", "a");
    endless(submit(w, first));
    run_dry(w);
    CHECK(session(w, 1)->n_msgs == 2);
    struct client_req *r = ask(w, 1, NULL, 2);
    w->unchecked = true;
    for (int i = 0; i < IC_SESSION_MSGS_MAX - 2; i++) /* they fit, the answer would not */
        say(r, "user", "");
    submit(w, r);
    run_dry(w);
    CHECK(r->code == IC_TOO_LARGE && strstr(r->err, "turns") && session(w, 1)->n_msgs == 2);
    world_free(w);
}

static void times_are_those_of_the_clock(void **state)
{
    struct world *w = world_new(25, 1, 8, 64, 64);

    (void)state;
    w->f.ns_base = 2 * IC_MS;
    w->f.ns_row = 0;
    struct client_req *a = endless(submit_prompt(w, "abc", 5)), *b = endless(submit_prompt(w, "abc", 1));
    run_dry(w);
    CHECK(a->end.stats.queue_ms < 0.001 && a->end.stats.ttft_ms > 1.99 && a->end.stats.ttft_ms < 2.01);
    CHECK(a->end.stats.total_ms > 9.99 && a->end.stats.total_ms < 10.01);
    CHECK(a->end.stats.tps > 499 && a->end.stats.tps < 501);
    CHECK(b->end.stats.queue_ms > 9.99 && b->end.stats.ttft_ms > 11.99 && b->end.stats.ttft_ms < 12.01);
    CHECK(w->c.tokens == 6 && w->c.requests == 2 && w->c.prompt_tokens == 8 && w->c.ended[IC_END_LENGTH] == 2);
    world_free(w);
}

static void on_event_tops(void *arg, struct ic_event *ev)
{
    if (ev->kind == IC_EVENT_TOKEN) {
        CHECK(ev->n_top == 3);
        size_t at = ev->len;
        for (int i = 0; i < 3; i++) {
            CHECK(ev->top[i].off == at && ev->top[i].len == strlen(fake_pieces[i]));
            CHECK(!memcmp(ev->text + at, fake_pieces[i], ev->top[i].len));
            at += ev->top[i].len;
        }
        CHECK(ev->text[at] == 0);
    }
    on_event(arg, ev);
}

static void alternatives_travel_behind_the_text(void **state)
{
    struct world *w = world_new(26, 1, 8, 64, 64);

    (void)state;
    w->f.on_event = on_event_tops;
    struct client_req *r = ask(w, -1, "abc", 20);
    r->req->params.logprobs = 3;
    endless(submit(w, r));
    w->unchecked = false;
    run_dry(w);
    CHECK(r->text.len > 0);
    world_free(w);
}

/* What an engine does while it rests: cancels and deadlines are obeyed, and nothing is computed. */
static void a_rest_obeys_cancels_and_deadlines(void **state)
{
    struct world *w = world_new(28, 2, 8, 64, 64);
    struct client_req *r[4];
    int64_t until = INT64_MAX;

    (void)state;
    for (int i = 0; i < 4; i++) { /* two run, two wait */
        r[i] = ask(w, -1, "abc", 20);
        r[i]->req->deadline_ns = i % 2 ? w->f.now + 1000 * w->f.ns_base * (i + 1) : 0;
        endless(submit(w, r[i]));
    }
    for (int i = 0; i < 3; i++)
        tick(w);
    int64_t decodes = w->f.decodes;
    CHECK(ic_text_sched_reap(w->s, &until) && until == r[1]->req->deadline_ns);
    until = 5; /* never raised */
    CHECK(ic_text_sched_reap(w->s, &until) && until == 5);
    cancel(w, r[0], IC_CANCEL_ABORT);
    cancel(w, r[2], IC_CANCEL_ABORT);
    CHECK(ic_text_sched_reap(w->s, NULL) && r[0]->ended && r[2]->ended && !r[1]->ended && !r[3]->ended);
    w->f.now = r[1]->req->deadline_ns;
    until = INT64_MAX;
    CHECK(ic_text_sched_reap(w->s, &until) && r[1]->ended && until == r[3]->req->deadline_ns);
    w->f.now = until;
    CHECK(!ic_text_sched_reap(w->s, NULL) && r[3]->ended && r[3]->end.reason == IC_END_DEADLINE);
    CHECK(w->f.decodes == decodes && !tick(w));
    world_free(w);
}

static void the_end_of_the_server_ends_all(void **state)
{
    struct world *w = world_new(27, 2, 8, 64, 64);

    (void)state;
    for (int i = 0; i < 6; i++)
        endless(submit(w, ask(w, i % 2 ? 0 : -1, "abc", 20)));
    for (int i = 0; i < 3; i++)
        tick(w);
    ic_text_sched_close(&w->s);
    for (int i = 0; i < 6; i++)
        CHECK(w->r[i].ended && w->r[i].error_more && w->r[i].code == IC_UNAVAILABLE && w->r[i].end.reason == IC_END_ERROR);
    world_free(w);
}

static void the_victim_comes_back_first(void **state)
{
    struct world *w = world_new(28, 2, 8, 60, 64);
    char text[64];

    (void)state;
    endless(submit_prompt(w, letters(text, 10), 30));
    struct client_req *b = endless(submit_prompt(w, letters(text, 8), 30));
    tick(w);
    struct client_req *c = endless(submit_prompt(w, "c", 1));
    while (w->c.preempted == 0)
        CHECK(tick(w));
    CHECK(!c->ended && w->s->waiting->req == b->req && w->s->waiting->next->req == c->req);
    run_dry(w);
    world_free(w);
}

/* After a back end has shown itself smaller than it said, who waits joins again as soon as somebody has ended, not
 * only when all have. */
static void a_crowded_house_opens_again(void **state)
{
    struct world *w = world_new(29, 4, 16, 60, 200);
    char text[64];

    (void)state;
    w->f.cells_real = 80;
    endless(submit_prompt(w, letters(text, 10), 45));
    endless(submit_prompt(w, letters(text, 10), 20));
    struct client_req *c = endless(submit_prompt(w, letters(text, 10), 20));
    while (w->c.preempted == 0)
        CHECK(tick(w));
    CHECK(!is_running(w, c));
    w->f.cells_real = 200;
    while (!w->r[1].ended)
        CHECK(tick(w));
    tick(w);
    CHECK(is_running(w, c) && is_running(w, &w->r[0]));
    run_dry(w);
    world_free(w);
}

/* Its own cells are the last that a session's request may cost, be the session idle for ever so long. */
static void a_session_does_not_eat_its_own_cells(void **state)
{
    struct world *w = world_new(30, 3, 32, 64, 70);
    char text[64];

    (void)state;
    endless(submit(w, ask(w, 0, letters(text, 15), 5)));
    run_dry(w);
    endless(submit(w, ask(w, 1, letters(text, 25), 5)));
    run_dry(w);
    struct client_req *r = submit(w, ask(w, 0, letters(text, 30), 1)); /* 31 more; 20 free */
    run_dry(w);
    CHECK(r->end.stats.cached_tokens == 20 && session(w, 1)->n_past == 0);
    world_free(w);
}

static void prompts_are_read_in_the_order_of_admission(void **state)
{
    struct world *w = world_new(31, 3, 10, 100, 300);
    char text[100];

    (void)state;
    struct client_req *a = endless(submit_prompt(w, letters(text, 40), 1));
    struct client_req *b = endless(submit_prompt(w, letters(text, 30), 1));
    for (int i = 0; i < 4; i++)
        tick(w);
    CHECK(!a->ended && w->s->slots[1].n_past == 0);
    tick(w); /* the last row of a, and what else fits of b */
    CHECK(a->ended && !b->ended && w->f.last_n > 1);
    run_dry(w);
    world_free(w);
}

/* A stream outgrows what was kept free for it while somebody else's prompt is still being read. */
static void a_prompt_takes_no_more_cells_than_there_are(void **state)
{
    struct world *w = world_new(32, 2, 5, 240, 243);
    char text[240];

    (void)state;
    endless(submit_prompt(w, "abcd", 230));
    tick(w);
    tick(w);
    endless(submit_prompt(w, letters(text, 200), 5));
    tick(w);
    CHECK(w->s->n_running == 2);
    while (w->c.preempted == 0)
        CHECK(tick(w)); /* the fake model asserts that it is never asked for more than it has */
    run_dry(w);
    world_free(w);
}

/* A model that cannot cut forgets all of a session at admission: then all of it has to find room. */
static void what_cannot_be_cut_is_counted_as_gone(void **state)
{
    (void)state;
    for (int recurrent = 0; recurrent < 2; recurrent++) {
        struct world *w = world_new(33, 3, 64, 100, 105);
        char text[64];
        w->f.recurrent = recurrent;
        struct client_req *chat = ask(w, 1, NULL, 20);
        say(chat, "user", letters(text, 40));
        endless(submit(w, chat));
        run_dry(w);
        endless(submit_prompt(w, letters(text, 8), 30));
        tick(w);
        struct client_req *next = ask(w, 1, NULL, 4); /* its answer is tokenised anew: the KV has to be cut there */
        say(next, "user", "x");
        endless(submit(w, next));
        tick(w);
        CHECK(!is_running(w, next)); /* 29 new tokens would fit, all 73 do not */
        run_dry(w);
        CHECK((next->end.stats.cached_tokens == 0) == recurrent && w->c.preempted == 0);
        world_free(w);
    }
}

/* A back end that is full gives an idle session's cells away before anybody is put back into the queue. */
static void idle_sessions_go_before_anybody_is_preempted(void **state)
{
    struct world *w = world_new(34, 3, 32, 64, 200);
    char text[64];

    (void)state;
    submit(w, ask(w, 0, letters(text, 20), 5));
    run_dry(w);
    w->f.cells_real = 60; /* 25 of them idle */
    endless(submit_prompt(w, letters(text, 10), 10));
    endless(submit_prompt(w, letters(text, 10), 10));
    run_dry(w);
    CHECK(w->c.preempted == 0 && session(w, 0)->n_past == 0 && w->f.bad_decodes == 1);
    world_free(w);
}

/* An answer that cannot be kept is not kept by half: the conversation is as before it. */
static void without_memory_a_turn_is_forgotten_whole(void **state)
{
    (void)state;
    for (int left = 0; left < 4; left++) {
        struct world *w = world_new(35, 2, 64, 200, 400);
        for (int i = 0; i < 3; i++) {
            struct client_req *r = ask(w, 1, NULL, 4);
            say(r, "user", i ? "more" : "first");
            endless(submit(w, r));
            w->unchecked = i == 1;
            strdups_left = i == 1 ? left : -1; /* a question's role and content, an answer's role and content */
            run_dry(w);
            CHECK(r->end.reason == IC_END_LENGTH && session(w, 1)->n_msgs == (i == 2 ? 4 : 2));
        }
        world_free(w);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(preemption_loses_nothing),
        cmocka_unit_test(the_victim_is_the_last_of_the_lowest_priority),
        cmocka_unit_test(less_room_than_promised_ends_all_the_same),
        cmocka_unit_test(idle_sessions_lose_their_cells_oldest_first_and_only_for_need),
        cmocka_unit_test(a_slot_is_taken_from_the_oldest_idle_session),
        cmocka_unit_test(priorities_then_arrival),
        cmocka_unit_test(nobody_overtakes_but_whose_predecessor_waits_for_its_session),
        cmocka_unit_test(a_long_prompt_stretches_gaps_by_a_bounded_factor),
        cmocka_unit_test(an_unknown_cost_gets_the_smallest_slice),
        cmocka_unit_test(a_batch_is_dead_when_all_of_it_are_cancelled),
        cmocka_unit_test(no_tokens_wanted),
        cmocka_unit_test(the_context_holds_what_it_says),
        cmocka_unit_test(a_full_session_is_refused_even_where_nothing_is_added),
        cmocka_unit_test(a_conversation_goes_on_from_its_cells),
        cmocka_unit_test(a_cancelled_request_leaves_its_session_right),
        cmocka_unit_test(a_refused_request_lets_its_session_go_on),
        cmocka_unit_test(closing_a_session_ends_all_of_it),
        cmocka_unit_test(deadlines_hold_in_the_queue_too),
        cmocka_unit_test(a_failed_decode_ends_who_was_in_it),
        cmocka_unit_test(what_was_held_back_leaves_at_the_end),
        cmocka_unit_test(a_conversation_too_long_to_keep_is_refused_whole),
        cmocka_unit_test(times_are_those_of_the_clock),
        cmocka_unit_test(alternatives_travel_behind_the_text),
        cmocka_unit_test(a_rest_obeys_cancels_and_deadlines),
        cmocka_unit_test(the_end_of_the_server_ends_all),
        cmocka_unit_test(the_victim_comes_back_first),
        cmocka_unit_test(a_crowded_house_opens_again),
        cmocka_unit_test(a_session_does_not_eat_its_own_cells),
        cmocka_unit_test(prompts_are_read_in_the_order_of_admission),
        cmocka_unit_test(a_prompt_takes_no_more_cells_than_there_are),
        cmocka_unit_test(what_cannot_be_cut_is_counted_as_gone),
        cmocka_unit_test(idle_sessions_go_before_anybody_is_preempted),
        cmocka_unit_test(without_memory_a_turn_is_forgotten_whole),
        cmocka_unit_test(thousands_of_schedules),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
