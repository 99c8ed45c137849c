/* Speculation without a second model (text_draft.h: with one): where the end of a text stood before, it may go on as it
 * did then (prompt lookup). What it would be is computed beside the next token, and kept as far as the sampler, asked
 * for each place in turn, says the same: so the text and its distribution are those without it. No thread, no clock. */
#ifndef IC_SCHED_TEXT_SPEC_H
#define IC_SCHED_TEXT_SPEC_H

#include <stdbool.h>
#include <stdint.h>

#define IC_SPEC_NGRAM 3     /* tokens at the end that must have stood together before */
#define IC_SPEC_REACH 8192  /* tokens back that are searched for them */
#define IC_SPEC_MAX 24      /* tokens proposed for one stream in a tick */
#define IC_SPEC_ROWS_MAX 64 /* for all together */

/* Of one stream. Every token tells whether it would have been guessed, whether or not it was proposed: a stream that
 * does not repeat itself pays nothing to find out. */
struct ic_spec {
    int32_t at;  /* the next token should be the one at this place; -1: no guess */
    double hits; /* of the last guesses, those that were right: moving average, 0 to 1 */
};

/* What a row of a proposal costs; of a small batch, so not the price of a prompt's row. */
struct ic_spec_cost {
    double row_ns; /* 0: not known yet */
};

void ic_spec_init(struct ic_spec *g);
/* tokens[0..n), the last of them new (or all, when a prompt is through). */
void ic_spec_note(struct ic_spec *g, const int32_t *tokens, int32_t n);
/* The tokens behind tokens[0..n), `max` at most; returns how many: max, or 0 without a guess. */
int32_t ic_spec_guess(const struct ic_spec *g, const int32_t *tokens, int32_t n, int32_t *out, int32_t max);

/* A tick as planned so far. */
struct ic_spec_tick {
    double rows;     /* of use: a proposal counts by its chance to be kept */
    double ns;       /* that it takes */
    double limit_ns; /* that it may take */
    double alone_ns; /* of a decode of one stream; 0: not known */
    double row_ns;   /* of a prompt's row, a first idea of a proposal's; 0: not known */
};

/* How many to propose, `max` at most, at this price each and where so many of the last were right: a row must be worth
 * more, by its chance to be kept, than the tick's rows are on average. The tick then includes them. */
int32_t ic_spec_worth(double hits, double price, struct ic_spec_tick *t, int32_t max);
/* Of a row: as known, or a first idea. */
double ic_spec_price(struct ic_spec_cost *c, const struct ic_spec_tick *t);
/* The two for a stream and its guess. */
int32_t ic_spec_count(const struct ic_spec *g, struct ic_spec_cost *c, struct ic_spec_tick *t, int32_t max);
/* n rows of proposals took extra_ns more than the tick without them. */
void ic_spec_learn(struct ic_spec_cost *c, double extra_ns, int32_t n);

#endif
