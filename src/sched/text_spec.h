/* Speculation without a second model (text_draft.h: with one): where the end of a text stood before, it may go on as it did
 * then (prompt lookup). What it would be is computed beside the next token, and kept as far as the sampler, asked for each
 * place in turn, says the same: so the text and its distribution are those without it. No thread, no clock. */
#ifndef IC_SCHED_TEXT_SPEC_H
#define IC_SCHED_TEXT_SPEC_H

#include <stdbool.h>
#include <stdint.h>

#include "sched/text_cost.h"

#define IC_SPEC_NGRAM 3      /* tokens at the end that must have stood together before */
#define IC_SPEC_REACH 8192   /* tokens back that are searched for them */
#define IC_SPEC_AGREE_MAX 32 /* tokens that agree with those before: more are not counted */
#define IC_SPEC_LEVELS 4     /* of agreement: from 3, 6, 12 and 24 tokens */
#define IC_SPEC_MAX 24       /* tokens proposed for one stream in a tick */
#define IC_SPEC_ROWS_MAX 64  /* for all together */

/* Of one stream. Every token tells whether it would have been guessed, whether or not it was proposed: a stream that
 * does not repeat itself pays nothing to find out. What has agreed for long is more likely to go on than what has just begun to,
 * so each level has its own figure. */
struct ic_spec {
    int32_t at;    /* the next token should be the one at this place; -1: no guess */
    int32_t agree; /* tokens before it that are those before the end of the text */
    double hits
        [IC_SPEC_LEVELS]; /* of the last guesses of a level, those that were right: moving average, 0 to 1 */
};

void ic_spec_init(struct ic_spec *g);
/* tokens[0..n), the last of them new (or all, when a prompt is through). */
void ic_spec_note(struct ic_spec *g, const int32_t *tokens, int32_t n);
/* The tokens behind tokens[0..n), `max` at most; returns how many: max, or 0 without a guess. */
int32_t ic_spec_guess(const struct ic_spec *g, const int32_t *tokens, int32_t n, int32_t *out, int32_t max);
/* That the token `ahead` places behind the next one is right, if all before it are. */
double ic_spec_chance(const struct ic_spec *g, int32_t ahead);

/* A tick as planned so far. */
struct ic_spec_tick {
    const struct ic_text_cost *cost;
    int32_t rows;    /* that it decodes */
    double useful;   /* of them: a proposal counts by its chance to be kept */
    double ns;       /* that it takes, with what a draft model has taken */
    double limit_ns; /* that it may take */
};

/* How many proposals make the most of a tick, `max` at most, where chance[i] is the i-th one's if those before it are right and
 * each takes step_ns besides its row: the most useful rows in the time, and some more than without any. Few may
 * not pay where many do (text_cost.h). The tick then includes them. `hope`: of the rows' price, what is believed of it. */
int32_t ic_spec_worth(struct ic_spec_tick *t, const double *chance, int32_t max, double step_ns,
                      double hope);
/* The same for a stream and its guess. *hope (1 at first) falls while a price forbids what is nearly sure: it may be an old
 * one. */
int32_t ic_spec_count(const struct ic_spec *g, struct ic_spec_tick *t, double *hope, int32_t max);

#endif
