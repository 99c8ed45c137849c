/* A model for the scheduler that is none: deterministic, instant, and suspicious.
 *
 * Its next token is a hash of everything that its KV holds of the sequence, of the sampler's seed and of how often
 * that sampler has drawn. So a row that is lost, doubled, out of place or another sequence's changes the text, and
 * one look at the text is enough. The contract of struct ic_text_backend is asserted at every call. It can be told
 * to refuse, to stop half-way and to fail. One thread; for tests only. */
#ifndef IC_SCHED_FAKE_BACKEND_H
#define IC_SCHED_FAKE_BACKEND_H

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "sched/text_sched.h"

#define FAKE_SEQS 24
#define FAKE_CELLS 8192
#define FAKE_CTX 1024
#define FAKE_BOS 99
#define FAKE_BYTE 100 /* a prompt's byte b is token 100 + b */
/* a turn begins with 360 + the first letter of its role, and ends with FAKE_TURN_END */
#define FAKE_ROLE 360
#define FAKE_TURN_END 490
#define FAKE_VOCAB 500
#define FAKE_EMBD 3

/* What the model can say. Split characters, a broken one and an empty piece are among it, and few letters, so that
 * stop strings are met. */
static const char *const fake_pieces[] = {"a",    "b",        "c",    "d",    "ab", "bc",
                                          "e",    " ",        "\xC3", "\xA9", "",   "\xE2\x82\xAC",
                                          "\xE2", "\x82\xAC", "\xFF", "dd"};
#define FAKE_PIECES ((int32_t)(sizeof fake_pieces / sizeof *fake_pieces))
#define FAKE_EOG FAKE_PIECES

struct fake_seq {
    int32_t token[FAKE_CTX], n;
    uint64_t hash[FAKE_CTX]; /* of token[0..i] */
    int32_t cell[FAKE_CTX];
    int32_t sure; /* positions that a decode has been through with */
};

/* What seq_save gives. */
struct fake_blob {
    int32_t from, to;
    uint64_t before; /* hash of what it lies behind */
    struct {
        int32_t token;
        uint64_t hash;
    } at[];
};

struct fake {
    struct ic_text_backend be;
    struct ic_text_sched *sched;
    struct fake_seq seq[FAKE_SEQS];
    int32_t refs[FAKE_CELLS]; /* of each cell: how many sequences hold it */
    int64_t now;
    int64_t ns_base, ns_row;
    int hiccups;        /* of 1000 decodes, its own and the draft's, that take 30 times ns_base more */
    int32_t cells_real; /* where FULL really begins; kv_size unless a test says otherwise */
    bool gone;          /* no model is open: nothing of it may be touched */
    int epoch;          /* how often it has been opened anew */
    bool add_bos;
    uint64_t rng;
    /* Of 1000 calls so many go wrong. */
    int full, aborted, failed, draw_fails, open_fails, tokenize_fails, save_fails, load_fails;
    uint64_t row_hash[FAKE_CTX];      /* of the last decode; 0: no logits */
    float state[FAKE_CTX][FAKE_EMBD]; /* of the last decode */
    bool has_state[FAKE_CTX];
    int states_fail; /* of 1000 */
    int32_t n_rows;
    /* A draft model (fake_with_draft), which knows the future. */
    struct {
        int32_t token[FAKE_CTX], n;
    } read[FAKE_SEQS];
    int draft_right, draft_unsure;   /* of 1000 tokens: so many are right; at so many it ends */
    int draft_fails, draft_forgets;  /* of 1000 calls; of 1000 streams in a call: others take the cells */
    int64_t draft_ns, draft_read_ns; /* of a step for any number of streams, and of a token read */
    bool draft_gone;
    int64_t draft_calls, draft_reads; /* reads: tokens */
    int32_t draft_read_most;          /* in one call */
    const struct fake_sampler *(*sampler_of)(void *, int32_t seq);
    /* What has happened. */
    int64_t decodes, decoded_rows, bad_decodes, injected, samplers, copies, saves, loads;
    int32_t last_n;
    void (*in_decode)(void *, const struct ic_row *rows, int32_t n); /* e.g. somebody cancels meanwhile */
    void (*on_event)(void *, struct ic_event *);                     /* takes it */
    void *arg;
};

static inline uint64_t fake_mix(uint64_t h, uint64_t v)
{
    h ^= v + 0x9E3779B97F4A7C15u + (h << 6) + (h >> 2);
    h ^= h >> 33;
    h *= 0xFF51AFD7ED558CCDu;
    return (h ^ h >> 33) | 1;
}

static inline uint64_t fake_random(uint64_t *s)
{
    *s ^= *s << 13;
    *s ^= *s >> 7;
    *s ^= *s << 17;
    return *s;
}

static inline bool fake_chance(struct fake *f, int of_1000)
{
    bool hit = of_1000 > 0 && (int)(fake_random(&f->rng) >> 20 & 1023) < of_1000;
    f->injected += hit;
    return hit;
}

static inline int32_t fake_cells(const struct fake *f)
{
    int32_t n = 0;
    for (int i = 0; i < FAKE_CELLS; i++)
        n += f->refs[i] > 0;
    return n;
}

static inline int32_t fake_cell(struct fake *f)
{
    for (int i = 0; i < FAKE_CELLS; i++)
        if (f->refs[i] == 0) {
            f->refs[i] = 1;
            return i;
        }
    IC_ASSERT(!"the fake model has cells enough");
    return -1;
}

static inline int64_t fake_hiccup(struct fake *f)
{
    return f->hiccups > 0 && (int)((fake_random(&f->rng) >> 20) % 1000) < f->hiccups ? 30 * f->ns_base : 0;
}

static inline void fake_put(struct fake *f, int32_t seq, int32_t token, uint64_t hash, int32_t cell)
{
    struct fake_seq *q = &f->seq[seq];
    IC_ASSERT(q->n < FAKE_CTX);
    q->hash[q->n] = hash;
    q->cell[q->n] = cell;
    q->token[q->n++] = token;
}

static inline void fake_apply(struct fake *f, const struct ic_row *r)
{
    struct fake_seq *q = &f->seq[r->seq];
    fake_put(f, r->seq, r->token, fake_mix(q->n ? q->hash[q->n - 1] : 1, (uint64_t)r->token), fake_cell(f));
}

static inline void fake_cut(struct fake *f, int32_t seq, int32_t from)
{
    struct fake_seq *q = &f->seq[seq];
    while (q->n > from)
        IC_ASSERT(f->refs[q->cell[--q->n]]-- > 0);
    if (q->sure > q->n)
        q->sure = q->n;
}

/* What the model holds at a token whose beginning has this hash. */
static inline void fake_state(uint64_t hash, float *out)
{
    for (int i = 0; i < FAKE_EMBD; i++, hash = fake_mix(hash, 17))
        out[i] = (float)((double)(hash >> 11 & 0xFFFFFF) / 0x800000 - 1);
}

static enum ic_decode fake_decode(void *arg, const struct ic_row *rows, int32_t n)
{
    struct fake *f = arg;
    int32_t next[FAKE_SEQS], logits[FAKE_SEQS] = {0}, outputs = 0;

    IC_ASSERT(!f->gone && n > 0 && n <= f->be.batch);
    for (int i = 0; i < FAKE_SEQS; i++)
        next[i] = f->seq[i].n;
    for (int32_t i = 0; i < n; i++) {
        const struct ic_row *r = &rows[i];
        IC_ASSERT(r->seq >= 0 && r->seq < f->be.n_seq);
        IC_ASSERT(r->token >= 0 && r->token < f->be.n_vocab && r->token != FAKE_EOG);
        IC_ASSERT(r->pos == next[r->seq]++ && r->pos < f->be.ctx_size);
        IC_ASSERT(logits[r->seq] == 0 ||
                  (r->logits && logits[r->seq] <= IC_SPEC_MAX)); /* the last one's, and of proposals */
        logits[r->seq] += r->logits;
        outputs += r->logits;
    }
    IC_ASSERT(outputs <= f->be.outputs && fake_cells(f) + n <= f->be.kv_size);
    memset(f->row_hash, 0, sizeof f->row_hash);
    memset(f->has_state, 0, sizeof f->has_state);
    f->n_rows = 0;
    f->last_n = n;
    f->now += f->ns_base + f->ns_row * n + fake_hiccup(f);
    f->decodes++;
    if (f->in_decode)
        f->in_decode(f->arg, rows, n);
    if (fake_chance(f, f->full) || fake_cells(f) + n > f->cells_real) {
        f->bad_decodes++;
        return IC_DECODE_FULL;
    }
    bool failed = fake_chance(f, f->failed);
    if (failed || fake_chance(f, f->aborted) || ic_text_sched_batch_is_dead(f->sched)) {
        for (int32_t i = (int32_t)(fake_random(&f->rng) % (uint64_t)(n + 1)); i > 0; i--, rows++)
            fake_apply(f, rows);
        f->bad_decodes++;
        return failed ? IC_DECODE_FAILED : IC_DECODE_ABORTED;
    }
    for (int32_t i = 0; i < n; i++) {
        fake_apply(f, &rows[i]);
        f->has_state[i] = rows[i].embd;
        if (rows[i].embd)
            fake_state(f->seq[rows[i].seq].hash[rows[i].pos], f->state[i]);
        if (rows[i].logits)
            f->row_hash[i] = f->seq[rows[i].seq].hash[rows[i].pos];
        f->seq[rows[i].seq].sure = f->seq[rows[i].seq].n;
    }
    f->n_rows = n;
    f->decoded_rows += n;
    return IC_DECODE_OK;
}

/* be.window says what this memory can do; see ic_prefix_match. What a failed decode left can always go. */
static bool fake_seq_rm(void *arg, int32_t seq, int32_t from)
{
    struct fake *f = arg;
    struct fake_seq *q = &f->seq[seq];

    IC_ASSERT(!f->gone && seq >= 0 && seq < f->be.n_seq && from >= 0);
    if (from > 0 && from < q->n &&
        (f->be.window < 0 || (f->be.window > 0 && q->n > f->be.window && from < q->sure))) {
        fake_cut(f, seq, 0);
        return false;
    }
    fake_cut(f, seq, from);
    return true;
}

static void fake_seq_cp(void *arg, int32_t src, int32_t dst, int32_t from, int32_t to)
{
    struct fake *f = arg;
    const struct fake_seq *q = &f->seq[src];

    IC_ASSERT(!f->gone && src >= 0 && src < f->be.n_seq && dst >= 0 && dst < f->be.n_seq && src != dst);
    IC_ASSERT(from == f->seq[dst].n && from < to && to <= q->sure);
    IC_ASSERT(f->be.window == 0 || (f->be.window > 0 && (to == q->n || q->n <= f->be.window)));
    for (int32_t i = from; i < to; i++) {
        f->refs[q->cell[i]]++;
        fake_put(f, dst, q->token[i], q->hash[i], q->cell[i]);
    }
    f->seq[dst].sure = to;
    f->copies++;
}

static size_t fake_seq_save(void *arg, int32_t seq, int32_t from, int32_t to, size_t max, void **data)
{
    struct fake *f = arg;
    const struct fake_seq *q = &f->seq[seq];
    struct fake_blob *b;
    size_t bytes = sizeof *b + sizeof b->at[0] * (size_t)(to - from);

    IC_ASSERT(!f->gone && from >= 0 && from < to && to == q->n && to == q->sure &&
              (f->be.window == 0 || from == 0));
    if (fake_chance(f, f->save_fails) || bytes > max)
        return 0;
    b = malloc(bytes);
    IC_ASSERT(b);
    *b = (struct fake_blob){from, to, from ? q->hash[from - 1] : 1};
    for (int32_t i = from; i < to; i++) {
        b->at[i - from].token = q->token[i];
        b->at[i - from].hash = q->hash[i];
    }
    *data = b;
    f->saves++;
    return bytes;
}

static bool fake_seq_load(void *arg, int32_t seq, int32_t from, int32_t keep_from, int32_t to,
                          const void *data, size_t bytes)
{
    struct fake *f = arg;
    struct fake_seq *q = &f->seq[seq];
    const struct fake_blob *b = data;

    IC_ASSERT(!f->gone && b->from == from && keep_from == q->n && from <= keep_from && keep_from < to &&
              to <= b->to);
    IC_ASSERT(bytes == sizeof *b + sizeof b->at[0] * (size_t)(b->to - b->from));
    IC_ASSERT(b->before == (from ? q->hash[from - 1] : 1)); /* it is put back where it came from */
    IC_ASSERT(fake_cells(f) + b->to - b->from <= f->be.kv_size);
    IC_ASSERT(f->be.window == 0 || to == b->to);
    if (fake_chance(f, f->load_fails) || fake_cells(f) + b->to - b->from > f->cells_real)
        return false;
    for (int32_t i = keep_from; i < to; i++)
        fake_put(f, seq, b->at[i - from].token, b->at[i - from].hash, fake_cell(f));
    q->sure = q->n;
    f->loads++;
    return true;
}

/* '~' is no token at all, as text that a tokenizer normalises away. */
static int32_t fake_tokens(const struct fake *f, const char *s, size_t len, bool first, int32_t *out)
{
    int32_t n = 0;

    if (first && f->add_bos)
        out[n++] = FAKE_BOS;
    for (size_t i = 0; i < len; i++)
        if (s[i] != '~')
            out[n++] = FAKE_BYTE + (unsigned char)s[i];
    return n;
}

static enum ic_status fake_give(struct fake *f, int32_t *t, int32_t got, int32_t max, int32_t **out,
                                int32_t *n, struct ic_err *err)
{
    *n = got;
    *out = NULL;
    if (fake_chance(f, f->tokenize_fails)) {
        free(t);
        return ic_fail(err, IC_INTERNAL, "injected");
    }
    if (got > max) {
        free(t);
        return IC_TOO_LARGE;
    }
    *out = t;
    return IC_OK;
}

static enum ic_status fake_tokenize(void *arg, const char *s, size_t len, bool first, int32_t max,
                                    int32_t **out, int32_t *n, struct ic_err *err)
{
    struct fake *f = arg;
    int32_t *t = malloc(sizeof *t * (len + 1));

    IC_ASSERT(!f->gone && t && max >= 0);
    return fake_give(f, t, fake_tokens(f, s, len, first, t), max, out, n, err);
}

static int32_t fake_chat_tokens(const struct fake *f, const struct ic_chat_msg *m, size_t n_msgs,
                                int32_t *out)
{
    int32_t n = 0;

    if (f->add_bos)
        out[n++] = FAKE_BOS;
    for (size_t i = 0; i < n_msgs; i++) {
        out[n++] = FAKE_ROLE + m[i].role[0];
        n += fake_tokens(f, m[i].content, strlen(m[i].content), false, out + n);
        out[n++] = FAKE_TURN_END;
    }
    out[n++] = FAKE_ROLE + 'a';
    return n;
}

static enum ic_status fake_chat(void *arg, const struct ic_chat_msg *m, size_t n_msgs, int32_t max,
                                int32_t **out, int32_t *n, struct ic_err *err)
{
    struct fake *f = arg;
    size_t cap = 4;

    for (size_t i = 0; i < n_msgs; i++)
        cap += 2 + strlen(m[i].content);
    int32_t *t = malloc(sizeof *t * cap);
    IC_ASSERT(t);
    return fake_give(f, t, fake_chat_tokens(f, m, n_msgs, t), max, out, n, err);
}

static void fake_piece(void *arg, int32_t token, struct ic_buf *out)
{
    (void)arg;
    if (token < FAKE_PIECES)
        ic_buf_puts(out, fake_pieces[token]);
}

struct fake_sampler {
    uint64_t key;
    bool ends;
    int32_t logprobs;
    int epoch, drawn; /* of which model; how often it has drawn */
    bool sings;       /* the same few tokens again and again, but for a slip now and then */
    uint64_t song;
};

/* An odd seed: the model comes to an end by itself now and then; an even one: never. FAKE_SINGS in it: its text can be
 * guessed. */
#define FAKE_SINGS 6u

static struct fake_sampler fake_sampler_of(uint32_t seed, const int32_t *prompt, int32_t n)
{
    struct fake_sampler s = {.key = fake_mix(7, seed),
                             .ends = seed & 1,
                             .sings = (seed & FAKE_SINGS) == FAKE_SINGS,
                             .song = fake_mix(8, seed)};
    for (int32_t i = 0; i < n; i++)
        s.key = fake_mix(s.key, (uint64_t)prompt[i]);
    return s;
}

static int32_t fake_next(struct fake_sampler *s, uint64_t kv_hash)
{
    uint64_t h = fake_mix(kv_hash, s->key);
    s->key = fake_mix(s->key, 3);
    int at = s->drawn++ % 4;
    if (s->sings && (h >> 40) % 16 != 0)
        return (int32_t)((s->song >> (8 * at)) % (uint64_t)FAKE_PIECES);
    return s->ends && h >> 8 & 1 && (h >> 9) % 9 == 0 ? FAKE_EOG
                                                      : (int32_t)((h >> 20) % (uint64_t)FAKE_PIECES);
}

static enum ic_status fake_sampler_open(void *arg, void **sampler, const struct ic_text_params *p,
                                        const int32_t *prompt, int32_t n, struct ic_err *err)
{
    struct fake *f = arg;
    struct fake_sampler *s = malloc(sizeof *s);

    *sampler = NULL;
    IC_ASSERT(!f->gone && s && n > 0);
    if (fake_chance(f, f->open_fails)) {
        free(s);
        return ic_fail(err, IC_BAD_REQUEST, "injected");
    }
    *s = fake_sampler_of(p->seed, prompt, n);
    s->logprobs = p->logprobs;
    s->epoch = f->epoch;
    *sampler = s;
    f->samplers++;
    return IC_OK;
}

static enum ic_status fake_draw(void *arg, void *sampler, int32_t row, struct ic_sampled *out,
                                struct ic_err *err)
{
    struct fake *f = arg;

    IC_ASSERT(!f->gone && row >= 0 && row < f->n_rows && f->row_hash[row]);
    IC_ASSERT(((struct fake_sampler *)sampler)->epoch == f->epoch);
    if (fake_chance(f, f->draw_fails))
        return ic_fail(err, IC_INTERNAL, "injected");
    memset(out, 0, sizeof *out);
    out->token = fake_next(sampler, f->row_hash[row]);
    out->eog = out->token == FAKE_EOG;
    out->prob = 0.5f;
    out->n_top = ((struct fake_sampler *)sampler)->logprobs;
    for (int32_t i = 0; i < out->n_top; i++)
        out->top[i] = (struct ic_logprob){i, (float)-i};
    f->row_hash[row] = 0; /* nobody draws twice from a row */
    return IC_OK;
}

static const float *fake_embedding(void *arg, int32_t row)
{
    struct fake *f = arg;

    IC_ASSERT(!f->gone && row >= 0 && row < f->n_rows && f->has_state[row]);
    f->has_state[row] = false; /* nobody takes it twice */
    return fake_chance(f, f->states_fail) ? NULL : f->state[row];
}

static void fake_sampler_close(void *arg, void *sampler)
{
    struct fake *f = arg;
    f->samplers--;
    free(sampler);
}

static enum ic_status fake_sampler_rebind(void *arg, void *sampler, const struct ic_text_params *p,
                                          const int32_t *said, int32_t n, struct ic_err *err)
{
    struct fake *f = arg;
    struct fake_sampler *s = sampler;

    (void)p;
    (void)said;
    IC_ASSERT(!f->gone && (s->drawn == n || f->be.policy.shift) && s->epoch <= f->epoch);
    if (fake_chance(f, f->open_fails))
        return ic_fail(err, IC_OOM, "injected");
    s->epoch = f->epoch;
    return IC_OK;
}

/* ---- the draft */

static int32_t fake_draft_behind(void *arg, int32_t seq, const int32_t *tokens, int32_t n)
{
    const struct fake *f = arg;
    int32_t same = 0;

    IC_ASSERT(!f->gone && !f->draft_gone && seq >= 0 && seq < f->be.n_seq && n > 0);
    while (same < f->read[seq].n && same < n - 1 && f->read[seq].token[same] == tokens[same])
        same++;
    return n - same;
}

/* What will be drawn behind the n tokens, but for errors on order. */
static inline void fake_foresee(struct fake *f, struct ic_draft_req *q)
{
    struct fake_sampler smp = *f->sampler_of(f->arg, q->seq);
    uint64_t h = 1;

    for (int32_t i = 0; i < q->n; i++)
        h = fake_mix(h, (uint64_t)q->tokens[i]);
    while (q->n_out < q->max && !q->unsure) {
        int32_t t = fake_next(&smp, h);
        q->unsure = t == FAKE_EOG || (int)(fake_random(&f->rng) >> 20 & 1023) < f->draft_unsure;
        if (q->unsure)
            break;
        if ((int)((fake_random(&f->rng) >> 20) % 1000) >= f->draft_right)
            t = (t + 1) % FAKE_PIECES;
        q->out[q->n_out++] = t;
        h = fake_mix(h, (uint64_t)t);
    }
}

static bool fake_draft(void *arg, struct ic_draft_req *reqs, int32_t n)
{
    struct fake *f = arg;
    int32_t proposals = 0, steps = 0, rows = 0;
    bool seen[FAKE_SEQS] = {false};

    IC_ASSERT(!f->gone && !f->draft_gone && n > 0 && n <= f->be.parallel && f->be.window == 0);
    f->draft_calls++;
    for (int32_t i = 0; i < n; i++) {
        struct ic_draft_req *q = &reqs[i];
        IC_ASSERT(q->seq >= 0 && q->seq < f->be.n_seq && !seen[q->seq]);
        IC_ASSERT(q->read >= 0 && q->max >= 0 && q->max <= IC_SPEC_MAX);
        IC_ASSERT(q->n + q->max < f->be.ctx_size && q->n == f->seq[q->seq].n + 1);
        seen[q->seq] = true;
        proposals += q->max;
        if (fake_chance(f, f->draft_forgets))
            f->read[q->seq].n = 0;
        f->read[q->seq].n = q->n - fake_draft_behind(f, q->seq, q->tokens, q->n);
        int32_t from = f->read[q->seq].n;
        q->read = q->read < q->n - from ? q->read : q->n - from;
        for (int32_t k = 0; k < q->read; k++)
            f->read[q->seq].token[f->read[q->seq].n++] = q->tokens[from + k];
        rows += q->read;
        q->n_out = 0;
        q->unsure = false;
        if (from + q->read < q->n || q->max == 0)
            continue;
        fake_foresee(f, q);
        for (int32_t k = 0; k + 1 < q->n_out; k++)
            f->read[q->seq].token[f->read[q->seq].n++] = q->out[k];
        steps = q->n_out + q->unsure > steps ? q->n_out + q->unsure : steps;
    }
    IC_ASSERT(proposals <= IC_SPEC_ROWS_MAX && proposals <= f->be.outputs - f->be.parallel);
    f->now += f->draft_ns * steps + f->draft_read_ns * rows + fake_hiccup(f);
    f->draft_reads += rows;
    f->draft_read_most = rows > f->draft_read_most ? rows : f->draft_read_most;
    f->draft_gone = fake_chance(f, f->draft_fails);
    return !f->draft_gone;
}

/* right: of 1000 proposals. */
static inline void fake_with_draft(struct fake *f, int right)
{
    f->be.draft = fake_draft;
    f->be.draft_behind = fake_draft_behind;
    f->draft_right = right;
    f->draft_ns = f->ns_base / 10;
    f->draft_read_ns = f->ns_row / 10;
}

/* The device is lost, or the model is closed: what it held is gone. */
static inline void fake_lose(struct fake *f)
{
    for (int i = 0; i < FAKE_SEQS; i++) {
        fake_cut(f, i, 0);
        f->read[i].n = 0;
    }
    f->gone = true;
}

/* Another instance of it, maybe smaller. */
static inline void fake_reopen(struct fake *f)
{
    f->gone = f->draft_gone = false;
    f->epoch++;
}

static int64_t fake_now(void *arg)
{
    return ((struct fake *)arg)->now;
}

static void fake_emit(void *arg, struct ic_event *ev)
{
    struct fake *f = arg;
    f->on_event(f->arg, ev);
}

static inline void fake_init(struct fake *f, int32_t parallel, int32_t batch, int32_t ctx, int32_t kv)
{
    memset(f, 0, sizeof *f);
    IC_ASSERT(parallel + 6 <= FAKE_SEQS && ctx <= FAKE_CTX && batch <= FAKE_CTX);
    f->be = (struct ic_text_backend){
        .arg = f,
        .ctx_size = ctx,
        .kv_size = kv,
        .parallel = parallel,
        .batch = batch,
        .n_vocab = FAKE_VOCAB,
        .outputs = parallel + 16,
        .n_embd = FAKE_EMBD,
        .policy = {.share_min = 4}, /* prompts are short here */
        .n_seq = parallel + 6,
        .idle_cells = 1024,
        .tokenize = fake_tokenize,
        .chat = fake_chat,
        .decode = fake_decode,
        .seq_rm = fake_seq_rm,
        .seq_cp = fake_seq_cp,
        .seq_save = fake_seq_save,
        .seq_load = fake_seq_load,
        .piece = fake_piece,
        .sampler_open = fake_sampler_open,
        .draw = fake_draw,
        .sampler_close = fake_sampler_close,
        .embedding = fake_embedding,
        .sampler_rebind = fake_sampler_rebind,
        .now_ns = fake_now,
        .emit = fake_emit,
    };
    f->cells_real = kv;
    f->now = 1000;
    f->ns_base = 1000;
    f->ns_row = 10;
    f->rng = 88172645463325252u;
    f->add_bos = true;
}

#endif
