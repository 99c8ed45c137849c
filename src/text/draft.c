/* See draft.h. A call has two parts: reading, where each stream has as many rows as it lacks, and steps, where each
 * stream that is still sure of itself has one, its last proposal. The last proposal of a stream is never read: if it
 * holds, the next call does. `held` only ever says what a decode has been through with. */
#include "text/draft.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/least.h"
#include "base/log.h"
#include "text/internal.h"

struct held {
    int32_t *tokens, n, cap;
    uint64_t used; /* number of the call */
};

struct ic_draft {
    struct ic_text_model *m;
    struct held *seq;
    int32_t n_seq, ctx, cells; /* cells: one less than there are, for the touch of model.c */
    uint64_t calls;
    /* of the decode under way */
    struct ic_row *rows;
    int32_t *row_of; /* of each row: the request whose next token it tells, -1: none's */
    int32_t n_rows;
};

enum outcome { FINE, STOPPED, BROKEN };

struct ic_text_config ic_draft_config(const struct ic_text_config *model)
{
    int32_t ctx = ic_least(model->ctx_size, IC_DRAFT_CTX_MAX), kv = model->kv_size;

    if (ctx == 0 && kv > 0) /* the default could be more than these cells hold */
        ctx = ic_least(kv, IC_CTX_DEFAULT_MAX);
    if (kv > 0 && kv < ctx)
        kv = ctx;
    if (kv >= IC_KV_CONVERSATIONS * ctx)
        kv = 0; /* so many by default, and these may shrink */
    return (struct ic_text_config){
        .path = model->draft,
        .ctx_size = ctx,
        .kv_size = kv,
        .parallel = ic_least(model->parallel, IC_DRAFT_STREAMS_MAX),
        .batch = IC_DRAFT_BATCH,
        .gpu_layers = model->gpu_layers == 0 ? 0 : IC_GPU_LAYERS_AUTO,
        .vram_margin = model->vram_margin,
        .vram_max = model->vram_max,
        .backends = model->backends,
        .ledger = model->ledger,
        .gpu_free = model->gpu_free,
        .gpu_free_arg = model->gpu_free_arg,
        .owner = IC_LEDGER_OWNER_DRAFT,
        .guest = true,
    };
}

/* ---- opening --------------------------------------------------------------------------------------------------- */

enum ic_status ic_draft_open(struct ic_draft **out, const struct ic_text_config *model, struct ic_err *err)
{
    struct ic_text_config cfg = ic_draft_config(model);
    struct ic_draft *d = calloc(1, sizeof *d);
    struct ic_err own = {0};
    enum ic_status st;

    *out = NULL;
    if (!d)
        return ic_fail(err, IC_OOM, "out of memory");
    if ((st = ic_text_model_open(&d->m, &cfg, &own)) != IC_OK) {
        if (!strncmp(own.msg, "model ", 6))
            ic_fail(err, st, "draft %s", own.msg);
        else
            ic_fail(err, st, "draft model %s: %s", cfg.path, own.msg);
        goto out;
    }
    const struct ic_text_info *i = ic_text_model_info(d->m);
    if (i->window != 0) {
        st = ic_fail(
            err, IC_BAD_REQUEST,
            "draft model %s: with its recurrent state or sliding window it cannot take guesses back",
            cfg.path);
        goto out;
    }
    d->n_seq = i->seqs;
    d->cells = i->kv_size - 1;
    d->ctx = i->n_ctx_train > 0 ? ic_least(i->ctx_size, i->n_ctx_train) : i->ctx_size;
    d->seq = calloc((size_t)d->n_seq, sizeof *d->seq);
    d->rows = calloc((size_t)i->batch, sizeof *d->rows);
    d->row_of = calloc((size_t)i->batch, sizeof *d->row_of);
    if (!d->seq || !d->rows || !d->row_of) {
        st = ic_fail(err, IC_OOM, "out of memory");
        goto out;
    }
    *out = d;
    return IC_OK;
out:
    ic_draft_close(&d);
    return st;
}

void ic_draft_close(struct ic_draft **dp)
{
    struct ic_draft *d = dp ? *dp : NULL;

    if (!d)
        return;
    ic_text_model_close(&d->m);
    for (int32_t i = 0; d->seq && i < d->n_seq; i++)
        free(d->seq[i].tokens);
    free(d->seq);
    free(d->rows);
    free(d->row_of);
    free(d);
    *dp = NULL;
}

#define OTHER_VOCAB "draft model %s: another vocabulary than the model's: "

static enum ic_status check_vocab(const struct ic_text_model *d, const struct ic_text_model *m,
                                  struct ic_err *err)
{
    const struct llama_vocab *a = d->vocab, *b = m->vocab;
    const char *name = d->info.name;
    const struct {
        const char *what;
        int32_t draft, model;
    } same[] = {
        {"number of tokens", llama_vocab_n_tokens(a), llama_vocab_n_tokens(b)},
        {"kind of tokeniser", (int32_t)llama_vocab_type(a), (int32_t)llama_vocab_type(b)},
        {"BOS", llama_vocab_bos(a), llama_vocab_bos(b)},
        {"EOS", llama_vocab_eos(a), llama_vocab_eos(b)},
        {"EOT", llama_vocab_eot(a), llama_vocab_eot(b)},
    };

    for (size_t i = 0; i < sizeof same / sizeof *same; i++)
        if (same[i].draft != same[i].model)
            return ic_fail(err, IC_BAD_REQUEST, OTHER_VOCAB "its %s is %d, the model's %d", name,
                           same[i].what, same[i].draft, same[i].model);
    for (int32_t t = 0; t < same[0].model; t++) {
        const char *of_draft = llama_vocab_get_text(a, t), *of_model = llama_vocab_get_text(b, t);
        if (strcmp(of_draft, of_model) != 0)
            return ic_fail(err, IC_BAD_REQUEST,
                           OTHER_VOCAB "its token %d is \"%.40s\", the model's \"%.40s\"", name, t,
                           of_draft, of_model);
        if (llama_vocab_is_eog(a, t) != llama_vocab_is_eog(b, t))
            return ic_fail(err, IC_BAD_REQUEST, OTHER_VOCAB "token %d ends a text for one of them only",
                           name, t);
    }
    return IC_OK;
}

enum ic_status ic_draft_bind(struct ic_draft *d, struct ic_text_model *m, struct ic_err *err)
{
    const struct ic_text_info *i = &d->m->info;

    if (m->info.window != 0)
        return ic_fail(
            err, IC_BAD_REQUEST,
            "--draft: with a recurrent state or a sliding window the model cannot take guesses back");
    enum ic_status st = check_vocab(d->m, m, err);
    if (st != IC_OK)
        return st;
    ic_text_lend_threads(m, d->m);
    ic_info("text",
            "draft model %s (%s): %d tokens a stream, %d in all, the model's %d threads, %d of %d layers "
            "on the GPU",
            i->name, i->desc, d->ctx, d->cells, i->threads, i->gpu_layers, i->layers);
    return IC_OK;
}

const struct ic_text_info *ic_draft_info(const struct ic_draft *d)
{
    return &d->m->info;
}

void ic_draft_set_abort(struct ic_draft *d, bool (*test)(void *), void *arg)
{
    ic_text_set_abort(d->m, test, arg);
}

/* ---- what it holds ---------------------------------------------------------------------------------------------- */

/* Tokens that it need not read again; never all, for the last one's logits are wanted. */
static int32_t in_common(const struct held *h, const int32_t *tokens, int32_t n)
{
    int32_t i = 0, most = ic_least(h->n, n - 1);

    if (most > 0 && !memcmp(h->tokens, tokens, sizeof *tokens * (size_t)most))
        return most;
    while (i < most && h->tokens[i] == tokens[i])
        i++;
    return i;
}

int32_t ic_draft_behind(const struct ic_draft *d, int32_t seq, const int32_t *tokens, int32_t n)
{
    return seq >= d->n_seq || n >= d->ctx ? INT32_MAX : n - in_common(&d->seq[seq], tokens, n);
}

static void cut(struct ic_draft *d, int32_t seq, int32_t to)
{
    ic_text_seq_rm(d->m, seq, to);
    if (d->seq[seq].n > to)
        d->seq[seq].n = to;
}

static int32_t cells_free(const struct ic_draft *d)
{
    int32_t n = d->cells;

    for (int32_t i = 0; i < d->n_seq; i++)
        n -= d->seq[i].n;
    return n;
}

/* Of those that were not needed for some calls the ones that were not for longest lose all they have. */
static bool make_room(struct ic_draft *d, int32_t need)
{
    while (cells_free(d) < need) {
        int32_t old = -1;
        for (int32_t i = 0; i < d->n_seq; i++)
            if (d->seq[i].n > 0 && d->seq[i].used + IC_DRAFT_FRESH < d->calls &&
                (old < 0 || d->seq[i].used < d->seq[old].used))
                old = i;
        if (old < 0)
            return false;
        cut(d, old, 0);
    }
    return true;
}

static bool grow(struct held *h, int32_t n)
{
    if (n <= h->cap)
        return true;
    int32_t cap = n + n / 2 + 64;
    int32_t *p = realloc(h->tokens, sizeof *p * (size_t)cap);
    if (!p)
        return false;
    h->tokens = p;
    h->cap = cap;
    return true;
}

/* ---- reading and proposing -------------------------------------------------------------------------------------- */

/* Sees to it that the request can be served: its sequence holds nothing else than its beginning, and what comes has
 * cells and memory. Else it reads nothing. `promised`: cells of requests before it. */
static void prepare(struct ic_draft *d, struct ic_draft_req *q, int32_t *promised)
{
    struct held *h = &d->seq[q->seq];

    q->n_out = 0;
    q->unsure = false;
    if (ic_draft_behind(d, q->seq, q->tokens, q->n) == INT32_MAX) {
        q->read = 0;
        return;
    }
    h->used = d->calls; /* the oldest of those that make room is not to be this one */
    int32_t have = in_common(h, q->tokens, q->n);
    if (have < h->n)
        cut(d, q->seq, have);
    q->read = ic_least(q->read, q->n - have);
    int32_t steps = have + q->read == q->n && q->max > 0 ? ic_least(q->max, d->ctx - q->n) - 1 : 0,
            need = q->read + steps;
    if (!make_room(d, *promised + need) || !grow(h, have + need))
        q->read = 0;
    else
        *promised += need;
}

/* Its best token, where it is sure enough of it. */
static bool best(struct ic_draft *d, const float *l, int32_t *token)
{
    int32_t n = d->m->info.n_vocab, at = ic_logits_argmax(l, n);

    *token = at;
    return isfinite(l[at]) && expf(l[at] - ic_logits_log_sum_exp(l, n, l[at])) >= IC_DRAFT_SURE &&
           !llama_vocab_is_eog(d->m->vocab, at);
}

/* Decodes what has been gathered, and takes the next token of those whose last row is among it. */
static enum outcome flush(struct ic_draft *d, struct ic_draft_req *reqs)
{
    int32_t n = d->n_rows, token;

    if (n == 0)
        return FINE;
    enum ic_decode rc = ic_text_decode(d->m, d->rows, n);
    d->n_rows = 0;
    if (rc != IC_DECODE_OK)
        return rc == IC_DECODE_ABORTED ? STOPPED : BROKEN; /* full: by our count it was not */
    for (int32_t i = 0; i < n; i++) {
        struct held *h = &d->seq[d->rows[i].seq];
        h->tokens[h->n++] = d->rows[i].token;
        if (d->row_of[i] < 0)
            continue;
        struct ic_draft_req *q = &reqs[d->row_of[i]];
        const float *l = ic_text_logits(d->m, i);
        q->unsure = !l || !best(d, l, &token);
        if (!q->unsure)
            q->out[q->n_out++] = token;
    }
    return FINE;
}

/* `of`: the request whose next token this row tells, or -1. */
static enum outcome add_row(struct ic_draft *d, struct ic_draft_req *reqs, int32_t seq, int32_t token,
                            int32_t pos, int32_t of)
{
    d->rows[d->n_rows] = (struct ic_row){token, pos, seq, of >= 0, false};
    d->row_of[d->n_rows++] = of;
    return d->n_rows == d->m->info.batch ? flush(d, reqs) : FINE;
}

static enum outcome read_all(struct ic_draft *d, struct ic_draft_req *reqs, int32_t n)
{
    enum outcome how = FINE;

    for (int32_t i = 0; i < n && how == FINE; i++) {
        const struct ic_draft_req *q = &reqs[i];
        int32_t from = q->read > 0 ? d->seq[q->seq].n : 0, to = from + q->read;
        for (int32_t p = from; p < to && how == FINE; p++)
            how = add_row(d, reqs, q->seq, q->tokens[p], p, p == q->n - 1 && q->max > 0 ? i : -1);
    }
    return how == FINE ? flush(d, reqs) : how;
}

static enum outcome steps(struct ic_draft *d, struct ic_draft_req *reqs, int32_t n)
{
    enum outcome how = FINE;
    bool any = true;

    for (int32_t step = 1; any && how == FINE; step++) {
        any = false;
        for (int32_t i = 0; i < n && how == FINE; i++) {
            const struct ic_draft_req *q = &reqs[i];
            int32_t pos = q->n + step - 1;
            if (q->unsure || q->n_out != step || step >= q->max || pos + 1 >= d->ctx)
                continue;
            how = add_row(d, reqs, q->seq, q->out[step - 1], pos, i);
            any = true;
        }
        if (how == FINE)
            how = flush(d, reqs);
    }
    return how;
}

bool ic_draft_propose(struct ic_draft *d, struct ic_draft_req *reqs, int32_t n)
{
    int32_t promised = 0;
    enum outcome how;

    d->calls++;
    d->n_rows = 0;
    for (int32_t i = 0; i < n; i++)
        prepare(d, &reqs[i], &promised);
    how = read_all(d, reqs, n);
    if (how == FINE)
        how = steps(d, reqs, n);
    if (how == FINE)
        return true;
    for (int32_t i = 0; i < n; i++) {
        reqs[i].n_out = 0;
        if (reqs[i].seq < d->n_seq)
            cut(d, reqs[i].seq, d->seq[reqs[i].seq].n); /* its rows are there or not: now they are not */
    }
    return how == STOPPED;
}
