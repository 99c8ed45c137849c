/* Random schedules as in text_sched_test.c, on a real model (stories260K) behind the engine's own back end, under a fake
 * clock and on one thread: each seed is one schedule, always the same.
 *
 * The oracle is a second instance of the model, which computes each request's prompt alone in a fresh sequence and then
 * token by token: every token that was said must be the one that it takes there. The shape of a batch and the
 * order of the cells change the last bits of a logit, so where two tokens are as good as equal the other one may have
 * been said; it then goes on behind that one, so no token is left unchecked. Such ties must be rare.
 *
 * IC_SEED=n and IC_ROUNDS=n choose other schedules; a failure prints the seed of its schedule. */
#pragma GCC diagnostic ignored "-Wunused-function"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

#include "sched/text_engine.c" /* its back end */

#include "base/utf8.h"
#include "sched/check.h"
#include "sched/text_sched_int.h"

#define MODEL IC_SOURCE_DIR "/demo/models/stories260K-f32.gguf"
#define CTX 192     /* tokens of a conversation at most */
#define CTX_MIN 128 /* and at least, as schedules choose */
#define CELLS 256   /* of the real cache */
#define LIE 64      /* cells that some schedules are told of and that are not there */
#define PARALLEL 5  /* at most; PARALLEL + KEPT sequences */
#define KEPT 8
#define BATCH 64
#define REQS 24    /* of a schedule */
#define SESSIONS 4 /* even ones go on with prompts, odd ones with messages */
#define MSGS_MAX (2 * REQS)
#define PROMPT_MAX 4096 /* tokens, those that will be refused included */
#define TICKS_MAX 20000 /* of a schedule; one takes some hundreds */
#define ROUNDS 16
#define ROUNDS_TELLING 16 /* from so many on everything must have happened at least once */
/* Difference of two logits (nats of their probabilities) below which either may be taken. Sums in half precision and in the cells'
 * order differ by 0.006 (text/kv_test.c) in each of the two. */
#define TIE 0.05f
#define TIES_MAX 0.01 /* of all tokens */

struct asked {
    struct ic_text_req *req;       /* our reference */
    int session;                   /* index, -1: none */
    int32_t prompt[CTX], n_prompt; /* as the sampler was opened with */
    int32_t said[CTX], n_said;     /* as drawn */
    bool eog, ended, error_more;
    int32_t last_index, n_events;
    struct ic_buf text;
    enum ic_status code; /* of an error */
};

/* What the oracle knows of a conversation. */
struct talk {
    uint64_t handle;
    int32_t tokens[CTX], n;
    struct ic_chat_msg msgs[MSGS_MAX];
    size_t n_msgs;
};

struct probe {
    struct asked *r;
    void *sampler;
};

struct world {
    struct ic_text_engine e; /* its model and its back end only */
    struct ic_text_backend be;
    struct ic_text_counters c;
    struct ic_text_sched *s;
    struct asked r[REQS];
    int n;
    struct talk talk[SESSIONS];
    uint64_t last_handle, rng;
    int64_t now, ns_base, ns_row;
    double ns_byte;     /* of bringing KV back */
    int aborts, spoils; /* of 1000 decodes told to stop, and of 1000 parts that come back broken */
    int errs, breaks;   /* of 1000 tokens that the draft proposes, and of 1000 calls of it that fail */
    int32_t abort_in;   /* questions of the decode under way until it is told to stop; 0: never */
    int32_t pinned;     /* tokens */
    bool lost;          /* the device has been, once at least */
    int samplers;
};

/* What has happened in all schedules. */
static struct {
    uint64_t tokens, ties, preempted, spilled, restored, spoilt, drafted, accepted, by_model, cached, full,
        stopped;
    uint64_t deadlines, aborts, went_on, reopened, tidied, stop_strings;
} seen;

static struct world *w;
static struct ic_text_model *alone;

static uint64_t rnd(uint64_t n)
{
    w->rng ^= w->rng << 13;
    w->rng ^= w->rng >> 7;
    w->rng ^= w->rng << 17;
    return (w->rng >> 11) % n;
}

static bool chance(int of_1000)
{
    return (int)rnd(1000) < of_1000;
}

/* ---- the oracle --------------------------------------------------------------------------------------------------- */

static const float *decode_alone(const int32_t *tokens, int32_t from, int32_t to)
{
    static struct ic_row rows[BATCH];
    int32_t n = 0;

    for (; from < to; from += n) {
        n = to - from < BATCH ? to - from : BATCH;
        for (int32_t i = 0; i < n; i++)
            rows[i] = (struct ic_row){tokens[from + i], from + i, 0, i == n - 1, false};
        CHECK(ic_text_decode(alone, rows, n) == IC_DECODE_OK);
    }
    return ic_text_logits(alone, n - 1);
}

/* Each token it said is what the model says alone to what stands before it. */
static void check_alone(const struct asked *r)
{
    const struct ic_text_params *p = &r->req->params;
    int32_t all[2 * CTX], n = r->n_prompt;
    struct ic_sampler *smp;

    memcpy(all, r->prompt, sizeof *all * (size_t)n);
    memcpy(all + n, r->said, sizeof *all * (size_t)r->n_said);
    CHECK(ic_text_seq_rm(alone, 0, 0));
    CHECK(ic_sampler_open(&smp, alone, p, r->prompt, n, NULL) == IC_OK);
    const float *l = r->n_said + r->eog > 0 ? decode_alone(all, 0, n) : NULL;
    for (int32_t i = 0; i < r->n_said + r->eog; i++) {
        struct ic_sampled d;
        CHECK(ic_sampler_draw(smp, l, &d, NULL) == IC_OK);
        int32_t got = i < r->n_said ? r->said[i] : -1;
        seen.tokens++;
        if (i == r->n_said && d.eog)
            break;
        if (got != d.token) {
            int32_t other = got < 0 ? 2 : got; /* 2: this vocabulary's end */
            float gap = l[d.token] - l[other];
            if (!(gap >= 0 && gap < TIE))
                printf("token %d of %d behind %d: %d, alone %d, which is better by %g\n", i, r->n_said, n,
                       other, d.token, (double)gap);
            CHECK(gap >= 0 && gap < TIE);
            seen.ties++;
            CHECK(got < 0 || ic_sampler_rebind(smp, alone, p, r->said, i + 1, NULL) == IC_OK);
        }
        if (i + 1 < r->n_said + r->eog)
            l = decode_alone(all, n + i, n + i + 1);
    }
    ic_sampler_close(&smp);
}

/* What must have been sent: the pieces of what was said, up to a stop string. */
static void check_text(const struct asked *r, enum ic_end_reason reason, const struct ic_text_stats *st)
{
    const struct ic_text_params *p = &r->req->params;
    struct ic_buf raw = {0}, want = {0};
    bool plain = true, own_end = reason == IC_END_STOP || reason == IC_END_LENGTH;

    for (int32_t i = 0; i < r->n_said; i++) {
        size_t before = raw.len;
        ic_text_piece(alone, r->said[i], &raw);
        plain &= raw.len > before;
        for (size_t k = before; k < raw.len; k++)
            plain &= (unsigned char)raw.data[k] < 0x80;
    }
    ic_buf_put(&raw, "", 1);
    raw.len--;
    char *stop = p->n_stop && raw.len ? strstr(raw.data, p->stop[0]) : NULL;
    if (stop)
        raw.len = (size_t)(stop - raw.data);
    if (raw.len && ic_buf_reserve(&want, 3 * raw.len))
        want.len = ic_utf8_scrub(want.data, raw.data, raw.len);
    CHECK(r->text.len <= want.len && (r->text.len == 0 || !memcmp(r->text.data, want.data, r->text.len)));
    CHECK(!own_end || r->text.len == want.len);
    CHECK(st->tokens == r->n_said);
    if (plain && !p->n_stop) /* else some tokens were held back, and left together */
        CHECK(r->n_events == r->n_said && r->last_index == r->n_said - 1);
    bool full = r->n_said == p->max_tokens || r->n_prompt + r->n_said == w->be.ctx_size;
    CHECK(reason != IC_END_LENGTH || (full && !r->eog && !stop));
    CHECK(reason != IC_END_STOP || r->eog || stop);
    seen.stop_strings += stop != NULL;
    ic_buf_deinit(&raw);
    ic_buf_deinit(&want);
}

static void talk_reset(struct talk *t)
{
    for (size_t i = 0; i < t->n_msgs; i++) {
        free((char *)t->msgs[i].role);
        free((char *)t->msgs[i].content);
    }
    *t = (struct talk){.handle = ++w->last_handle};
}

static void talk_add(struct talk *t, const char *role, const char *content, size_t len)
{
    CHECK(t->n_msgs < MSGS_MAX);
    t->msgs[t->n_msgs++] = (struct ic_chat_msg){strdup(role), strndup(content, len)};
}

/* The conversation goes on behind this answer. */
static void talk_on(struct talk *t, const struct asked *r)
{
    const struct ic_text_req *q = r->req;

    memcpy(t->tokens, r->prompt, sizeof *t->tokens * (size_t)r->n_prompt);
    memcpy(t->tokens + r->n_prompt, r->said, sizeof *t->tokens * (size_t)r->n_said);
    t->n = r->n_prompt + r->n_said;
    if (q->prompt)
        return;
    for (size_t i = 0; i < q->n_msgs; i++)
        talk_add(t, q->msgs[i].role, q->msgs[i].content, strlen(q->msgs[i].content));
    talk_add(t, "assistant", r->text.data ? r->text.data : "", r->text.len);
}

/* The prompt's tokens as they must be, given what was said before; returns how many, CTX at most are written. */
static int32_t prompt_of(const struct asked *r, int32_t *out)
{
    const struct talk *t = r->session >= 0 ? &w->talk[r->session] : NULL;
    const struct ic_text_req *q = r->req;
    int32_t *more = NULL, n = 0, old = 0;

    if (q->prompt) {
        old = t ? t->n : 0;
        if (old == 0)
            CHECK(ic_text_tokenize(alone, q->prompt, q->prompt_len, true, false, PROMPT_MAX, &more, &n,
                                   NULL) == IC_OK);
        else
            CHECK(ic_text_tokenize_more(alone, q->prompt, q->prompt_len, PROMPT_MAX, &more, &n, NULL) ==
                  IC_OK);
    } else {
        struct ic_chat_msg all[MSGS_MAX + 2];
        size_t k = t ? t->n_msgs : 0;
        for (size_t i = 0; i < k; i++)
            all[i] = t->msgs[i];
        for (size_t i = 0; i < q->n_msgs; i++)
            all[k++] = q->msgs[i];
        CHECK(ic_text_chat_tokenize(alone, all, k, PROMPT_MAX, &more, &n, NULL) == IC_OK);
    }
    if (old + n <= CTX) {
        if (old > 0)
            memcpy(out, t->tokens, sizeof *out * (size_t)old);
        memcpy(out + old, more, sizeof *out * (size_t)n);
    }
    free(more);
    return old + n;
}

/* ---- what the scheduler sees -------------------------------------------------------------------------------------------- */

static bool stop_now(void *arg)
{
    (void)arg;
    return w->abort_in > 0 && --w->abort_in == 0;
}

static enum ic_decode real_decode(void *arg, const struct ic_row *rows, int32_t n)
{
    struct ic_text_engine *e = arg;

    w->now += w->ns_base + w->ns_row * n;
    w->abort_in = chance(w->aborts) ? 1 + (int32_t)rnd(40) : 0;
    enum ic_decode rc = ic_text_decode(e->model, rows, n);
    w->abort_in = 0;
    seen.full += rc == IC_DECODE_FULL;
    seen.stopped += rc == IC_DECODE_ABORTED;
    CHECK(rc != IC_DECODE_FAILED);
    return rc;
}

/* The model drafts for itself, but for errors on order. */
static bool real_draft(void *arg, struct ic_draft_req *reqs, int32_t n)
{
    struct ic_text_engine *e = arg;

    w->now += w->ns_row;
    w->abort_in = chance(w->aborts) ? 1 + (int32_t)rnd(40) : 0;
    bool ok = ic_draft_propose(e->draft, reqs, n);
    w->abort_in = 0;
    CHECK(ok);
    for (int32_t i = 0; i < n; i++)
        for (int32_t k = 0; k < reqs[i].n_out; k++)
            if (chance(w->errs))
                reqs[i].out[k] = 3 + (int32_t)rnd(500);
    ok = !chance(w->breaks);
    if (!ok)
        ic_draft_close(&e->draft);
    return ok;
}

static bool real_seq_load(void *arg, int32_t seq, int32_t from, int32_t keep_from, int32_t to,
                          const void *data, size_t bytes)
{
    bool spoil = chance(w->spoils);

    w->now += (int64_t)(w->ns_byte * (double)bytes);
    bool ok = be_seq_load(arg, seq, from, keep_from, to, data, spoil ? bytes / 2 : bytes);
    CHECK(!spoil || !ok);
    seen.spoilt += spoil;
    return ok;
}

static enum ic_status real_sampler_open(void *arg, void **sampler, const struct ic_text_params *p,
                                        const int32_t *prompt, int32_t n, struct ic_err *err)
{
    int32_t want[CTX];
    struct asked *r = w->r;

    while (&r->req->params != p) /* the scheduler's is the request's own */
        r++;
    CHECK(n > 0 && n < w->be.ctx_size && r->n_prompt == 0);
    CHECK(prompt_of(r, want) == n && !memcmp(want, prompt, sizeof *want * (size_t)n));
    memcpy(r->prompt, prompt, sizeof *want * (size_t)n);
    r->n_prompt = n;
    seen.went_on += r->session >= 0 && w->talk[r->session].n > 0;
    struct probe *pr = malloc(sizeof *pr);
    CHECK(pr);
    *pr = (struct probe){.r = r};
    *sampler = pr;
    w->samplers++;
    enum ic_status st = be_sampler_open(arg, &pr->sampler, p, prompt, n, err);
    CHECK(st == IC_OK);
    return st;
}

static enum ic_status real_draw(void *arg, void *sampler, int32_t row, struct ic_sampled *out,
                                struct ic_err *err)
{
    struct probe *pr = sampler;
    struct asked *r = pr->r;

    CHECK(be_draw(arg, pr->sampler, row, out, err) == IC_OK);
    CHECK(!r->eog && !r->ended && r->n_prompt + r->n_said < CTX);
    if (out->eog)
        r->eog = true;
    else
        r->said[r->n_said++] = out->token;
    return IC_OK;
}

static void real_sampler_close(void *arg, void *sampler)
{
    struct probe *pr = sampler;

    be_sampler_close(arg, pr->sampler);
    free(pr);
    w->samplers--;
}

static enum ic_status real_sampler_rebind(void *arg, void *sampler, const struct ic_text_params *p,
                                          const int32_t *said, int32_t n, struct ic_err *err)
{
    struct probe *pr = sampler;

    CHECK(n == pr->r->n_said && (n == 0 || !memcmp(said, pr->r->said, sizeof *said * (size_t)n)));
    return be_sampler_rebind(arg, pr->sampler, p, said, n, err);
}

static int64_t fake_clock(void *arg)
{
    (void)arg;
    return w->now;
}

static void on_error(struct asked *r, const struct ic_event *ev)
{
    int32_t ignored[CTX];

    r->code = ev->code;
    r->error_more = ev->more;
    if (ev->code == IC_TOO_LARGE)
        CHECK(prompt_of(r, ignored) >= w->be.ctx_size);
    else if (ev->code == IC_UNAVAILABLE)
        CHECK(atomic_load(&r->req->cancel) == IC_CANCEL_SHUTDOWN);
    else
        CHECK(ev->code == IC_INTERNAL && w->lost && strstr(ev->text, "device is lost"));
}

static void on_end(struct asked *r, const struct ic_event *ev)
{
    CHECK((ev->reason == IC_END_ERROR) == r->error_more);
    CHECK(ev->reason != IC_END_DEADLINE || w->now >= r->req->deadline_ns);
    CHECK(ev->stats.prompt_tokens == r->n_prompt && ev->stats.cached_tokens <= r->n_prompt);
    CHECK(r->n_prompt == 0 || ev->stats.cached_tokens < r->n_prompt);
    check_text(r, ev->reason, &ev->stats);
    check_alone(r);
    seen.deadlines += ev->reason == IC_END_DEADLINE;
    seen.aborts += ev->reason == IC_END_ABORT;
    if (r->session >= 0 && r->n_said > 0 && ev->reason != IC_END_ERROR)
        talk_on(&w->talk[r->session], r);
}

static void on_event(void *arg, struct ic_event *ev)
{
    (void)arg;
    CHECK(ev->owner < (uint64_t)w->n);
    struct asked *r = &w->r[ev->owner];
    CHECK(!r->ended && atomic_load(&r->req->cancel) != IC_CANCEL_GONE);
    switch (ev->kind) {
    case IC_EVENT_QUEUED: CHECK(ev->index >= 1); break;
    case IC_EVENT_TOKEN:
        CHECK(!r->error_more && ev->index > r->last_index && ev->len > 0 &&
              ic_utf8_valid(ev->text, ev->len));
        r->last_index = ev->index;
        r->n_events++;
        ic_buf_put(&r->text, ev->text, ev->len);
        break;
    case IC_EVENT_ERROR:
        CHECK(!r->error_more);
        on_error(r, ev);
        r->ended = !ev->more;
        break;
    default:
        CHECK(ev->kind == IC_EVENT_END);
        on_end(r, ev);
        r->ended = true;
    }
    free(ev);
}

/* ---- a world --------------------------------------------------------------------------------------------------------- */

static const struct ic_text_config model_cfg = {.path = MODEL,
                                                .chat_template = "chatml",
                                                .ctx_size = CTX,
                                                .kv_size = CELLS,
                                                .parallel = PARALLEL,
                                                .batch = BATCH,
                                                .threads = 1};

/* The engine's own back end, but for the clock and for what is watched or made to fail. */
static void take_backend(void)
{
    struct ic_text_backend was = w->be;

    w->be = w->e.be;
    w->be.ctx_size = was.ctx_size;
    w->be.kv_size = was.kv_size;
    w->be.parallel = was.parallel;
    w->be.batch = was.batch;
    w->be.n_seq = was.n_seq;
    w->be.policy = was.policy;
    w->be.decode = real_decode;
    w->be.seq_load = real_seq_load;
    w->be.draft = w->e.draft ? real_draft : NULL;
    w->be.sampler_open = real_sampler_open;
    w->be.draw = real_draw;
    w->be.sampler_close = real_sampler_close;
    w->be.sampler_rebind = real_sampler_rebind;
    w->be.now_ns = fake_clock;
    w->be.emit = on_event;
    ic_text_set_abort(w->e.model, stop_now, NULL);
    if (w->e.draft)
        ic_draft_set_abort(w->e.draft, stop_now, NULL);
}

static void choose_sizes(void)
{
    struct ic_text_backend *be = &w->be;

    be->ctx_size = CTX_MIN + (int32_t)rnd(CTX - CTX_MIN + 1);
    be->kv_size =
        rnd(3) ? be->ctx_size + (int32_t)rnd((uint64_t)(CELLS - be->ctx_size)) : CELLS + (int32_t)rnd(LIE);
    be->parallel = 1 + (int32_t)rnd(PARALLEL);
    be->batch = be->parallel + (int32_t)rnd(BATCH - PARALLEL + 1);
    be->n_seq = be->parallel + (int32_t)rnd(KEPT + 1);
    be->policy.share_min = 4 + (int32_t)rnd(29);
    be->policy.cache_ram = rnd(4) ? (size_t)50000 + rnd(400000) : 0;
    be->idle_cells = rnd(2) ? 1024 : (int32_t)rnd(100);
    be->policy.no_speculation = rnd(4) == 0;
    w->ns_base = (int64_t)rnd(200000);
    w->ns_row = 100 + (int64_t)rnd(20000);
    w->ns_byte = (double)rnd(100) / 25;
    w->aborts = rnd(2) ? (int)rnd(100) : 0;
    w->spoils = rnd(2) ? 300 + (int)rnd(700) : 0;
    w->errs = rnd(2) ? (int)rnd(600) : 0;
    w->breaks = rnd(2) ? (int)rnd(30) : 0;
}

static const char *const beginnings[] = {
    "Once upon a time there was a little dog. He had a red ball and a big heart. ",
    "Once upon a time there was a little girl named Lily. She loved to play outside in the park. ",
    "Tom and Sam are friends. They like to run and jump. ",
};
static const char *const ends[] = {"The dog",  "His mum", "One day", "A cat",
                                   "The ball", "He ran",  "Lily",    "The sun"};
#define SONG "root ::= \"The cat sat on the mat, and so it goes. \" root"

static void pin_one(void)
{
    int32_t *tokens, n;

    CHECK(ic_text_tokenize(alone, beginnings[0], strlen(beginnings[0]), true, false, CTX, &tokens, &n,
                           NULL) == IC_OK);
    if (ic_text_sched_pin(w->s, tokens, n, NULL) == IC_OK)
        w->pinned = n;
    free(tokens);
}

static void world_new(uint64_t seed)
{
    w = calloc(1, sizeof *w);
    IC_ASSERT(w);
    seed_now = seed;
    w->rng = (seed + 1) * UINT64_C(0x9E3779B97F4A7C15);
    for (int i = 0; i < 8; i++)
        rnd(2);
    w->now = 1000;
    for (int i = 0; i < SESSIONS; i++)
        talk_reset(&w->talk[i]);
    pthread_mutex_init(&w->e.vocab_lock, NULL);
    w->e.cfg.model = model_cfg;
    w->e.cfg.model.draft = rnd(3) ? MODEL : NULL;
    CHECK(open_model(&w->e) == IC_OK);
    CHECK(w->e.be.window == 0 && w->e.be.n_seq >= PARALLEL + KEPT && w->e.be.kv_size == CELLS);
    choose_sizes();
    take_backend();
    CHECK(ic_text_sched_open(&w->s, &w->be, &w->c, NULL) == IC_OK);
    if (rnd(4) == 0 && w->be.kv_size <= CELLS) /* a prefix needs the cells that were promised */
        pin_one();
}

static void count_what_happened(void)
{
    seen.preempted += w->c.preempted;
    seen.spilled += w->c.spilled;
    seen.restored += w->c.restored;
    seen.drafted += w->c.drafted;
    seen.accepted += w->c.accepted;
    seen.by_model += w->be.policy.no_speculation ? w->c.accepted : 0;
    seen.cached += w->c.cached_tokens;
}

static void world_free(void)
{
    ic_text_sched_close(&w->s);
    for (int i = 0; i < w->n; i++) {
        struct asked *r = &w->r[i];
        CHECK(r->ended || atomic_load(&r->req->cancel) == IC_CANCEL_GONE);
        CHECK(atomic_load(&r->req->refs) == 1);
        ic_text_req_unref(r->req);
        ic_buf_deinit(&r->text);
    }
    CHECK(w->samplers == 0 && w->c.running == 0 && w->c.waiting == 0);
    for (int i = 0; i < SESSIONS; i++)
        talk_reset(&w->talk[i]);
    count_what_happened();
    ic_draft_close(&w->e.draft);
    ic_text_model_close(&w->e.model);
    pthread_mutex_destroy(&w->e.vocab_lock);
    free(w);
    w = NULL;
}

/* ---- random schedules ---------------------------------------------------------------------------------------------- */

static void close_session(int i)
{
    ic_text_sched_session_close(w->s, w->talk[i].handle);
    talk_reset(&w->talk[i]);
}

static char *random_prompt(void)
{
    char text[1000] = "";

    if (rnd(5))
        strcat(text, beginnings[rnd(3)]);
    if (rnd(4) == 0)
        strcat(text, beginnings[rnd(3)]);
    if (rnd(12) == 0) /* maybe too long */
        for (int i = 0; i < 5; i++)
            strcat(text, beginnings[rnd(3)]);
    strcat(text, ends[rnd(8)]);
    return strdup(text);
}

static void random_params(struct asked *r)
{
    struct ic_text_params *p = &r->req->params;

    p->temp = 0;
    p->max_tokens = rnd(12) ? 1 + (int32_t)rnd(40) : rnd(2) ? -1 : 0;
    if (rnd(4) == 0) { /* what can be guessed */
        p->grammar = strdup(SONG);
        p->max_tokens = 30 + (int32_t)rnd(60);
    } else if (rnd(5) == 0) {
        static const char *const stops[] = {"the ", ". ", "said", "zebra"};
        p->stop[p->n_stop++] = strdup(stops[rnd(4)]);
    }
    if (rnd(4) == 0)
        strcpy(r->req->salt, "tenant");
    r->req->client = rnd(3);
    r->req->priority = rnd(2) ? IC_PRIO_NORMAL : (enum ic_priority)rnd(3);
    if (rnd(10) == 0)
        r->req->deadline_ns = w->now + (int64_t)rnd(60) * (w->ns_base + 4 * w->ns_row);
}

static void random_submit(void)
{
    struct asked *r = &w->r[w->n];
    struct ic_text_req *q = ic_text_req_new();
    int session = rnd(2) ? -1 : (int)rnd(SESSIONS);

    IC_ASSERT(q);
    if (session >= 0 &&
        w->talk[session].n > w->be.ctx_size / 2) /* else it would only be refused from now on */
        close_session(session);
    *r = (struct asked){.req = q, .session = session, .last_index = -1};
    q->owner = (uint64_t)w->n++;
    q->session = session >= 0 ? w->talk[session].handle : 0;
    q->arrival_ns = w->now;
    char *text = random_prompt();
    if (session >= 0 ? session & 1 : rnd(6) == 0) {
        q->msgs = calloc(1, sizeof *q->msgs);
        IC_ASSERT(q->msgs);
        q->msgs[q->n_msgs++] = (struct ic_chat_msg){strdup("user"), text};
    } else {
        q->prompt = text;
        q->prompt_len = strlen(text);
    }
    random_params(r);
    ic_text_sched_submit(w->s, ic_text_req_ref(q));
}

static void random_cancel(void)
{
    struct asked *r = &w->r[w->n ? rnd((uint64_t)w->n) : 0];
    enum ic_cancel none = IC_CANCEL_NONE;

    if (w->n &&
        !r->ended) /* of a session's request that nobody hears of the oracle would not know what it said */
        atomic_compare_exchange_strong(&r->req->cancel, &none,
                                       r->session < 0 && rnd(2) ? IC_CANCEL_GONE : IC_CANCEL_ABORT);
}

/* The model goes, by our will or by itself, and comes back as another instance. */
static void reopen(void)
{
    bool orderly = rnd(2);

    if (orderly)
        ic_text_sched_park(w->s);
    else
        w->lost = true;
    ic_draft_close(&w->e.draft);
    ic_text_model_close(&w->e.model);
    if (!orderly)
        ic_text_sched_forget_kv(w->s, "the device is lost");
    CHECK(w->c.running == 0);
    CHECK(open_model(&w->e) == IC_OK);
    take_backend();
    CHECK(ic_text_sched_unpark(w->s, &w->be, NULL) == IC_OK);
    w->pinned = ic_prefix_cells(w->s->prefix);
    seen.reopened++;
}

static bool tick(void)
{
    bool more = ic_text_sched_tick(w->s);
    const struct ic_text_sched *s = w->s;

    CHECK(ic_prefix_check(s->prefix) && ic_prefix_cells(s->prefix) <= w->be.kv_size);
    for (int32_t i = 0; i < s->n_slots; i++) {
        const struct run *r = s->slots[i].run;
        CHECK(s->slots[i].n_past == ic_prefix_len(s->prefix, i));
        CHECK(!r || (r->slot == i && s->slots[i].n_past < r->n_tokens && r->n_tokens <= w->be.ctx_size));
    }
    CHECK(w->c.running == s->n_running && s->spill.sum <= s->spill.max);
    CHECK(more || (!s->waiting && !s->n_running));
    return more;
}

/* Everything has been given back: by the books, and so that the real cache takes as many tokens as it has cells. */
static void check_cells_are_free(void)
{
    int32_t seq = 0, all = CELLS - w->pinned, n;
    struct ic_row rows[BATCH];

    for (int i = 0; i < SESSIONS; i++)
        close_session(i);
    while (ic_cells_evict(w->s, -1))
        ;
    CHECK(ic_prefix_cells(w->s->prefix) == w->pinned && w->s->sessions.count == 0);
    while (w->s->slots[seq].n_past > 0)
        seq++;
    for (int32_t at = 0; at < all; at += n) {
        n = all - at < BATCH ? all - at : BATCH;
        for (int32_t i = 0; i < n; i++)
            rows[i] = (struct ic_row){5, at + i, seq, i == n - 1, false};
        CHECK(ic_text_decode(w->e.model, rows, n) == IC_DECODE_OK);
    }
}

static void random_step(int busy)
{
    uint64_t what = rnd(100);

    if ((int)what < busy && w->n < REQS)
        random_submit();
    else if (what >= 98)
        random_cancel();
    else if (what == 97)
        close_session((int)rnd(SESSIONS));
    else if (what == 96)
        w->now += (int64_t)rnd(20) * w->ns_base;
    else if (what == 95)
        ic_text_sched_reap(w->s, NULL);
    else if (what == 94 && rnd(3) == 0)
        reopen();
    else if (what == 93)
        seen.tidied += ic_text_sched_tidy(w->s);
    else
        tick();
}

static void random_schedule(uint64_t seed)
{
    world_new(seed);
    int busy = 5 + (int)rnd(30), ticks = 0;

    while (w->n < REQS)
        random_step(busy);
    if (rnd(8)) { /* else: the server ends in the middle of it */
        w->aborts = 0;
        while (tick())
            CHECK(++ticks < TICKS_MAX);
        for (int i = 0; i < w->n; i++)
            CHECK(w->r[i].ended || atomic_load(&w->r[i].req->cancel) == IC_CANCEL_GONE);
        check_cells_are_free();
    }
    world_free();
}

static uint64_t env_number(const char *name, uint64_t def)
{
    const char *v = getenv(name);
    return v ? strtoull(v, NULL, 10) : def;
}

static void random_schedules_say_what_the_model_says_alone(void **state)
{
    uint64_t from = env_number("IC_SEED", 1), rounds = env_number("IC_ROUNDS", ROUNDS);

    (void)state;
    for (uint64_t i = 0; i < rounds; i++)
        random_schedule(from + i);
    printf("%llu tokens, of which %llu at a tie; %llu cached, %llu spilled, %llu restored, %llu spoilt, "
           "%llu of %llu guesses "
           "right (%llu of a draft model alone); %llu preemptions, %llu decodes found it full, %llu were "
           "stopped; "
           "%llu deadlines, %llu aborts, %llu turns of sessions, %llu stop strings, %llu reopenings\n",
           (unsigned long long)seen.tokens, (unsigned long long)seen.ties, (unsigned long long)seen.cached,
           (unsigned long long)seen.spilled, (unsigned long long)seen.restored,
           (unsigned long long)seen.spoilt, (unsigned long long)seen.accepted,
           (unsigned long long)seen.drafted, (unsigned long long)seen.by_model,
           (unsigned long long)seen.preempted, (unsigned long long)seen.full,
           (unsigned long long)seen.stopped, (unsigned long long)seen.deadlines,
           (unsigned long long)seen.aborts, (unsigned long long)seen.went_on,
           (unsigned long long)seen.stop_strings, (unsigned long long)seen.reopened);
    if (rounds < ROUNDS_TELLING)
        return;
    CHECK((double)seen.ties <= TIES_MAX * (double)seen.tokens);
    CHECK(seen.cached > 0 && seen.spilled > 0 && seen.restored > 0 && seen.spoilt > 0 &&
          seen.preempted > 0);
    CHECK(seen.accepted > 0 && seen.accepted < seen.drafted && seen.by_model > 0 && seen.full > 0 &&
          seen.stopped > 0);
    CHECK(seen.deadlines > 0 && seen.aborts > 0 && seen.went_on > 0 && seen.stop_strings > 0 &&
          seen.reopened > 0 && seen.tidied > 0);
}

static int open_alone(void **state)
{
    struct ic_text_config cfg = model_cfg;
    struct ic_err err = {0};

    (void)state;
    cfg.kv_size = 2 * CTX;
    cfg.parallel = 1;
    if (ic_text_model_open(&alone, &cfg, &err) == IC_OK)
        return 0;
    fprintf(stderr, "%s\n", err.msg);
    return -1;
}

static int close_all(void **state)
{
    (void)state;
    ic_text_model_close(&alone);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_schedules_say_what_the_model_says_alone),
    };
    ic_log_set_level(IC_LOG_ERROR); /* broken parts are on purpose */
    return cmocka_run_group_tests(tests, open_alone, close_all);
}
