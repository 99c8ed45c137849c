#include "text/sample.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/utf8.h"
#include "text/internal.h"
#include "text/vec.h"

struct ic_sampler {
    struct llama_sampler *chain;   /* bias, penalties … draw */
    struct llama_sampler *grammar; /* NULL: none */
    llama_token_data *cand;        /* n_vocab, refilled for every draw */
    bool blind;                    /* there was no memory for looking at what a token says */
    int32_t n_vocab, logprobs;
    bool greedy, plain; /* plain: greedy with nothing in the way, an argmax is enough */
    const struct llama_vocab *vocab;
    /* with a grammar: [0, tail) what has been said of a character that is not complete; behind it, scratch */
    struct ic_buf said;
    size_t tail;
};

void ic_text_params_init(struct ic_text_params *p)
{
    *p = (struct ic_text_params){
        .temp = 0.7f,
        .top_k = 40,
        .top_p = 0.95f,
        .min_p = 0.05f,
        .repeat_penalty = 1.0f,
        .max_tokens = -1,
    };
}

void ic_text_params_deinit(struct ic_text_params *p)
{
    free(p->grammar);
    free(p->bias);
    for (int32_t i = 0; i < p->n_stop; i++)
        free(p->stop[i]);
    *p = (struct ic_text_params){0};
}

static void chain_add(struct ic_sampler *s, struct llama_sampler *link, bool *ok)
{
    if (link)
        llama_sampler_chain_add(s->chain, link);
    else
        *ok = false;
}

static enum ic_status add_bias(struct ic_sampler *s, const struct ic_text_params *p, bool *ok,
                               struct ic_err *err)
{
    llama_logit_bias bias[IC_LOGIT_BIAS_MAX];

    for (int32_t i = 0; i < p->n_bias; i++) {
        if (p->bias[i].token >= s->n_vocab)
            return ic_fail(err, IC_BAD_REQUEST, "logit_bias: the model has no token %d", p->bias[i].token);
        bias[i] = (llama_logit_bias){p->bias[i].token, p->bias[i].bias};
    }
    chain_add(s, llama_sampler_init_logit_bias(s->n_vocab, p->n_bias, bias), ok);
    return IC_OK;
}

static enum ic_status build_chain(struct ic_sampler *s, const struct ic_text_params *p, struct ic_err *err)
{
    uint32_t seed = p->seed;
    bool ok = true;
    enum ic_status st;
    bool penal = p->repeat_penalty != 1.0f || p->frequency_penalty != 0.0f || p->presence_penalty != 0.0f;
    struct llama_sampler_chain_params cp = llama_sampler_chain_default_params();

    cp.no_perf = true;
    if (!(s->chain = llama_sampler_chain_init(cp)))
        return ic_fail(err, IC_OOM, "out of memory");
    if (p->n_bias > 0 && (st = add_bias(s, p, &ok, err)) != IC_OK)
        return st;
    if (penal)
        chain_add(s,
                  llama_sampler_init_penalties(s->n_vocab, IC_REPEAT_LAST_N, p->repeat_penalty,
                                               p->frequency_penalty, p->presence_penalty),
                  &ok);
    /* Below, nothing but the largest logit would be left either, until the quotients overflow and anything is drawn. */
    s->greedy = p->temp < 1e-10f;
    s->plain = s->greedy && !penal && !p->grammar && !p->n_bias;
    if (s->greedy) {
        chain_add(s, llama_sampler_init_greedy(), &ok);
    } else {
        if (!p->has_seed && getrandom(&seed, sizeof seed, 0) != sizeof seed)
            return ic_fail(err, IC_INTERNAL, "no random seed to be had");
        /* llama.cpp's mark for "random": keep the promise of a given seed */
        if (seed == LLAMA_DEFAULT_SEED)
            seed = 0;
        if (p->top_k > 0)
            chain_add(s, llama_sampler_init_top_k(p->top_k), &ok);
        if (p->top_p < 1.0f)
            chain_add(s, llama_sampler_init_top_p(p->top_p, 1), &ok);
        if (p->min_p > 0.0f)
            chain_add(s, llama_sampler_init_min_p(p->min_p, 1), &ok);
        chain_add(s, llama_sampler_init_temp(p->temp), &ok);
        chain_add(s, llama_sampler_init_dist(seed), &ok);
    }
    return ok ? IC_OK : ic_fail(err, IC_OOM, "out of memory");
}

/* The grammar is llama.cpp's, and takes some tokens for what they do not say: a control token for its own spelling, which
 * nobody gets to see, and overlong forms, which are no UTF-8, for characters. False: the token is one of these. Else *tail gets
 * how many bytes of s->said would be left of a character. */
static bool says_so(struct ic_sampler *s, int32_t token, size_t *tail)
{
    s->said.len = s->tail;
    s->said.failed = false;
    *tail = s->tail;
    if (llama_vocab_is_eog(s->vocab, token))
        return s->tail == 0;
    ic_vocab_piece(s->vocab, token, &s->said);
    s->blind |= s->said.failed;
    size_t whole = ic_utf8_whole(s->said.data, s->said.len);
    *tail = s->said.len - whole;
    return s->said.len > s->tail && !s->said.failed && ic_utf8_valid(s->said.data, whole);
}

static void accept_in_grammar(struct ic_sampler *s, int32_t token)
{
    size_t tail;

    llama_sampler_accept(s->grammar, token);
    says_so(s, token, &tail);
    if (tail)
        memmove(s->said.data, s->said.data + s->said.len - tail, tail);
    s->tail = tail;
}

enum ic_status ic_sampler_open(struct ic_sampler **out, const struct ic_text_model *m,
                               const struct ic_text_params *p, const int32_t *prompt, int32_t n,
                               struct ic_err *err)
{
    enum ic_status st = IC_OOM;
    struct ic_sampler *s = calloc(1, sizeof *s);

    *out = NULL;
    if (!s)
        return ic_fail(err, IC_OOM, "out of memory");
    s->n_vocab = m->info.n_vocab;
    s->vocab = m->vocab;
    s->logprobs = p->logprobs;
    if ((st = build_chain(s, p, err)) != IC_OK)
        goto fail;
    if (!s->plain && !(s->cand = malloc(sizeof *s->cand * (size_t)s->n_vocab))) {
        st = ic_fail(err, IC_OOM, "out of memory");
        goto fail;
    }
    if (p->grammar) {
        /* the parser prints what is wrong with a client's text there, and the text */
        ic_log_mute_stderr(true);
        s->grammar = llama_sampler_init_grammar(m->vocab, p->grammar, "root");
        ic_log_mute_stderr(false);
        if (!s->grammar) {
            st = ic_fail(err, IC_BAD_REQUEST, "the grammar does not parse as GBNF with a rule `root`");
            goto fail;
        }
    }
    for (int32_t i = n > IC_REPEAT_LAST_N ? n - IC_REPEAT_LAST_N : 0; i < n; i++)
        llama_sampler_accept(s->chain, prompt[i]);
    *out = s;
    return IC_OK;
fail:
    ic_sampler_close(&s);
    return st;
}

/* Bias, penalties and the random numbers know nothing of the model; only the grammar holds its vocabulary. */
enum ic_status ic_sampler_rebind(struct ic_sampler *s, const struct ic_text_model *m,
                                 const struct ic_text_params *p, const int32_t *said, int32_t n,
                                 struct ic_err *err)
{
    if (m->info.n_vocab != s->n_vocab)
        return ic_fail(err, IC_INTERNAL, "the model came back with another vocabulary");
    s->vocab = m->vocab;
    if (!s->grammar)
        return IC_OK;
    llama_sampler_free(s->grammar);
    if (!(s->grammar = llama_sampler_init_grammar(m->vocab, p->grammar, "root")))
        return ic_fail(err, IC_OOM, "out of memory");
    s->tail = 0;
    for (int32_t i = 0; i < n; i++)
        accept_in_grammar(s, said[i]);
    return IC_OK;
}

void ic_sampler_close(struct ic_sampler **sp)
{
    struct ic_sampler *s = *sp;

    if (!s)
        return;
    if (s->chain)
        llama_sampler_free(s->chain);
    if (s->grammar)
        llama_sampler_free(s->grammar);
    ic_buf_deinit(&s->said);
    free(s->cand);
    free(s);
    *sp = NULL;
}

/* ---- the two passes over all logits that every draw makes. A NaN is neither a maximum nor does it spoil the sum. */

/* Built a second time for processors that hold eight in a register; which one runs is decided when the program is loaded. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) &&   \
    !defined(__SANITIZE_THREAD__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

IC_WITHIN void load(ic_vec *v, const float *p)
{
    memcpy(v, p, sizeof *v);
}

WIDE int32_t ic_logits_argmax(const float *l, int32_t n)
{
    ic_vec m = (ic_vec){0} - INFINITY, v;
    float max = -INFINITY;
    int32_t i = 0;

    for (; i + IC_LANES <= n; i += IC_LANES) {
        load(&v, l + i);
        ic_vec_greater(&m, &v);
    }
    for (int32_t k = 0; k < IC_LANES; k++)
        max = m[k] > max ? m[k] : max;
    for (; i < n; i++)
        max = l[i] > max ? l[i] : max;
    for (i = 0; i < n; i++)
        if (l[i] == max)
            return i;
    return 0;
}

/* ln Σ exp(l): what turns logits into log probabilities. Summed against the maximum, so nothing overflows; in floats for
 * a short while and then in a double, so that a large vocabulary loses nothing. */
WIDE float ic_logits_log_sum_exp(const float *l, int32_t n, float max)
{
    double sum = 0;
    int32_t i = 0;

    while (i + IC_LANES <= n) {
        ic_vec part = {0}, v;
        for (int32_t end = n - i > 1024 ? i + 1024 : n; i + IC_LANES <= end; i += IC_LANES) {
            load(&v, l + i);
            v -= max;
            ic_vec_exp_below_zero(&v);
            part += v;
        }
        for (int32_t k = 0; k < IC_LANES; k++)
            sum += (double)part[k];
    }
    for (; i < n; i++)
        sum += l[i] <= max ? (double)expf(l[i] - max) : 0;
    return max + (float)log(sum);
}

static int32_t apply(struct ic_sampler *s, bool in_grammar, const float *logits)
{
    llama_token_data_array arr = {s->cand, (size_t)s->n_vocab, -1, false};
    size_t tail;

    for (int32_t i = 0; i < s->n_vocab; i++)
        s->cand[i] = (llama_token_data){i, logits[i], 0.0f};
    if (in_grammar)
        llama_sampler_apply(s->grammar, &arr);
    for (int32_t i = 0; in_grammar && i < s->n_vocab; i++)
        if (isfinite(s->cand[i].logit) && !says_so(s, i, &tail))
            s->cand[i].logit = -INFINITY;
    llama_sampler_apply(s->chain, &arr);
    if (arr.selected < 0 || (size_t)arr.selected >= arr.size || !isfinite(arr.data[arr.selected].logit))
        return -1;
    return arr.data[arr.selected].id;
}

/* Checking one token against the grammar is cheap, the whole vocabulary is not: most draws are right at once. */
static bool grammar_takes(struct ic_sampler *s, int32_t token)
{
    llama_token_data one = {token, 1.0f, 0.0f};
    llama_token_data_array arr = {&one, 1, -1, false};

    size_t tail;

    llama_sampler_apply(s->grammar, &arr);
    return isfinite(one.logit) && says_so(s, token, &tail);
}

static void fill_top(const float *l, int32_t n, float lse, int32_t want, struct ic_sampled *out)
{
    out->n_top = 0;
    for (int32_t i = 0; i < n; i++) {
        float lp = l[i] - lse;
        int32_t at = out->n_top;
        if (at == want && lp <= out->top[at - 1].logprob)
            continue;
        if (at < want)
            out->n_top++;
        else
            at--;
        for (; at > 0 && out->top[at - 1].logprob < lp; at--)
            out->top[at] = out->top[at - 1];
        out->top[at] = (struct ic_logprob){i, lp};
    }
}

/* Nanoseconds that this thread has computed; not those that others took its core. */
static int64_t computed_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

enum ic_status ic_sampler_draw(struct ic_sampler *s, const float *logits, struct ic_sampled *out,
                               struct ic_err *err)
{
    int32_t best = ic_logits_argmax(logits, s->n_vocab), token = best;
    const int64_t before = s->grammar ? computed_ns() : 0;

    if (!isfinite(logits[best]))
        return ic_fail(err, IC_INTERNAL, "the model gave no usable logits");
    if (!s->plain) {
        token = apply(s, false, logits);
        if (s->grammar && token >= 0 && !grammar_takes(s, token))
            token = apply(s, true, logits);
    }
    const bool taken = !s->grammar || (token >= 0 && grammar_takes(s, token));
    if (s->blind)
        return ic_fail(err, IC_OOM, "out of memory");
    if (!taken)
        return ic_fail(err, IC_BAD_REQUEST, "the grammar leaves none of the model's tokens here");
    if (token < 0)
        return ic_fail(err, IC_INTERNAL, "no token is allowed here");
    if (s->grammar)
        accept_in_grammar(s, token);
    if (s->blind)
        return ic_fail(err, IC_OOM, "out of memory");
    llama_sampler_accept(s->chain, token);
    /* Where a grammar has many ways to read what was said, and more with every character, no look at it told so before. */
    if (s->grammar && computed_ns() - before > IC_GRAMMAR_TOKEN_MS * IC_MS)
        return ic_fail(err, IC_TOO_LARGE,
                       "the grammar can be read in too many ways: a token took longer than %d ms",
                       IC_GRAMMAR_TOKEN_MS);

    float lse = ic_logits_log_sum_exp(logits, s->n_vocab, logits[best]);
    out->token = token;
    out->eog = llama_vocab_is_eog(s->vocab, token);
    out->prob = expf(logits[token] - lse);
    out->n_top = 0;
    if (s->logprobs > 0)
        fill_top(logits, s->n_vocab, lse, s->logprobs < s->n_vocab ? s->logprobs : s->n_vocab, out);
    return IC_OK;
}
