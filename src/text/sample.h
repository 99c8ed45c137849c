/* From logits to a token: sampling parameters, a sampler per request, probabilities.
 *
 * A sampler belongs to one request and is used by the text engine's thread only. The chain is
 * bias → penalties → top_k → top_p → min_p → temp → draw, as in llama.cpp's own server, over llama.cpp's samplers;
 * temp 0 is greedy: the most probable token after bias, penalties and grammar, nothing drawn. */
#ifndef IC_TEXT_SAMPLE_H
#define IC_TEXT_SAMPLE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

#define IC_LOGPROBS_MAX 20              /* most alternatives that `logprobs` may ask for */
#define IC_STOP_MAX 16                  /* stop strings of one request */
#define IC_STOP_LEN_MAX 256             /* bytes of one stop string */
#define IC_GRAMMAR_LEN_MAX (256 * 1024) /* bytes of a GBNF text */
#define IC_GRAMMAR_DEPTH_MAX 256        /* groups within groups of a GBNF text */
#define IC_GRAMMAR_FOLLOW_MAX 1000      /* groups and rules within each other, where the text can begin */
#define IC_GRAMMAR_TOKEN_MS 1000        /* of a core, that a grammar may take for one token */
#define IC_GRAMMAR_CHAIN_MAX 128        /* parts in a row that may all be left out */
#define IC_REPEAT_LAST_N 64             /* tokens that the penalties look back on */
#define IC_LOGIT_BIAS_MAX 300           /* tokens with a bias of their own, as many as OpenAI takes */

/* Added to a token's logit before everything else; -INFINITY: it is never said. */
struct ic_logit_bias {
    int32_t token;
    float bias;
};

/* Owned by a request; strings and biases are heap copies freed by ic_text_params_deinit. */
struct ic_text_params {
    float temp;              /* >= 0; 0: greedy */
    int32_t top_k;           /* 0: off */
    float top_p;             /* 0 < p <= 1; 1: off */
    float min_p;             /* 0 <= p <= 1; 0: off */
    float repeat_penalty;    /* > 0; 1: off */
    float frequency_penalty; /* -2 … 2; 0: off */
    float presence_penalty;  /* -2 … 2; 0: off */
    uint32_t seed;           /* used when has_seed, else a random one */
    bool has_seed;
    int32_t max_tokens; /* -1: as many as the context holds */
    int32_t logprobs;   /* alternatives reported with each token, 0 … IC_LOGPROBS_MAX */
    char *grammar;      /* GBNF, root rule `root`, or NULL */
    char *stop[IC_STOP_MAX];
    int32_t n_stop;
    struct ic_logit_bias *bias;
    int32_t n_bias; /* 0 … IC_LOGIT_BIAS_MAX */
};

/* Whether a client's GBNF is within these bounds, without which llama.cpp's engine would stand still for minutes or end the
 * process (grammar.c). IC_TOO_LARGE, IC_BAD_REQUEST (it names tokens, or is left recursive), IC_OOM; what does not parse is left to ic_sampler_open. Any thread. */
enum ic_status ic_grammar_check(const char *gbnf, struct ic_err *err);

void ic_text_params_init(struct ic_text_params *p); /* the defaults, see sample.c */
void ic_text_params_deinit(struct ic_text_params *p);

struct ic_logprob {
    int32_t token;
    /* natural logarithm of the softmax probability over the whole vocabulary, at temperature 1 */
    float logprob;
};

/* What one sampling gave. */
struct ic_sampled {
    int32_t token;
    bool eog;   /* an end-of-generation token: not part of the answer */
    float prob; /* softmax probability of `token` over the whole vocabulary, at temperature 1 */
    int32_t n_top;
    struct ic_logprob top[IC_LOGPROBS_MAX]; /* most probable first */
};

struct ic_text_model;
struct ic_sampler;

/* `prompt` (n tokens, borrowed for the call) primes the penalties. IC_BAD_REQUEST: the grammar does not
 * parse, or a bias is for a token that there is none of. Beyond the model's life it may only be closed or
 * rebound. */
enum ic_status ic_sampler_open(struct ic_sampler **out, const struct ic_text_model *m,
                               const struct ic_text_params *p, const int32_t *prompt, int32_t n,
                               struct ic_err *err);
/* The model has been closed and opened again: the sampler goes on with the new one (same file), as if nothing had
 * happened. `said`: the n tokens drawn so far. On failure it can only be closed. */
enum ic_status ic_sampler_rebind(struct ic_sampler *s, const struct ic_text_model *m,
                                 const struct ic_text_params *p, const int32_t *said, int32_t n,
                                 struct ic_err *err);
/* Samples from `logits` (n_vocab floats, read only) and advances the sampler. IC_INTERNAL when no token
 * has a finite logit. */
enum ic_status ic_sampler_draw(struct ic_sampler *s, const float *logits, struct ic_sampled *out,
                               struct ic_err *err);
void ic_sampler_close(struct ic_sampler **s); /* accepts NULL */

#endif
