/* What a tick costs, learnt from the ticks themselves, by the rows that it decodes: a stream's next token, a row of a prompt and a
 * proposal cost alike. Not a straight line: on a CPU rows are computed one by one up to about seven, and in blocks beyond, where
 * eight are cheaper than seven and the next eight nearly free (docs/benchmarks.md); on a GPU the first dozens cost one.
 * No thread, no clock. */
#ifndef IC_SCHED_TEXT_COST_H
#define IC_SCHED_TEXT_COST_H

#include <stdint.h>

/* numbers of rows told apart: each up to 16, then eight to the octave, up to 8192 */
#define IC_COST_SIZES 89

struct ic_text_cost {
    double ns[IC_COST_SIZES]; /* moving averages, 0: not seen yet */
};

/* Of a decode of n rows; between sizes that have been seen on a straight line. 0: nothing is known. */
double ic_text_cost_of(const struct ic_text_cost *c, int32_t n);
/* Of a row where there are many of them, in the largest decode seen. 0: nothing is known. */
double ic_text_cost_row(const struct ic_text_cost *c);
/* A tick of n rows took ns. */
void ic_text_cost_learn(struct ic_text_cost *c, double ns, int32_t n);
/* Rows of prompts that may join n_decode streams without stretching their gaps beyond bound_ns, or where that is
 * 0 beyond IC_GAP_FACTOR times the gap of n_usual streams (as many at least); SLICE_MIN at least, `room` at most; with
 * room for ticks that are dearer than their mean. A size that has not been seen is taken for as dear by the row as the
 * next smaller one, so slices grow as it turns out that they may. */
int32_t ic_text_cost_slice(const struct ic_text_cost *c, int32_t n_decode, int32_t n_usual, int32_t room,
                           double bound_ns);

/* Prompt tokens of a tick at least, however slow: somebody has to get on. */
#define IC_SLICE_MIN 1
#define IC_GAP_FACTOR 3 /* a stream's gap while somebody's prompt is read, over its gap without */
/* of that for a tick's price, a mean: of 378 ticks the dearest took 1.5 times the mean */
#define IC_GAP_AIM (2.0 / 3)

#endif
