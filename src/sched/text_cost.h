/* What a tick costs, learnt from the ticks themselves: a decode of n streams, and each row of a prompt on top.
 * No thread, no clock. */
#ifndef IC_SCHED_TEXT_COST_H
#define IC_SCHED_TEXT_COST_H

#include <stdint.h>

#define IC_COST_STREAMS 256 /* more cost as much as so many */

struct ic_text_cost {
    double decode_ns[IC_COST_STREAMS + 1]; /* moving averages by the number of streams, 0: not seen yet */
    double row_ns;                         /* of a row more, be it a prompt's or a stream's; 0: not known yet */
};

/* Of a decode of n streams and nothing else; estimated from what has been seen of fewer and more. 0: nothing is known. */
double ic_text_cost_decode(const struct ic_text_cost *c, int32_t n);
/* A tick of n_decode streams and n_prompt rows of prompts took ns. */
void ic_text_cost_learn(struct ic_text_cost *c, double ns, int32_t n_decode, int32_t n_prompt);
/* Rows of prompts that may join n_decode streams without stretching their gaps beyond bound_ns, or where that is
 * 0 beyond IC_GAP_FACTOR times the gap of n_usual streams (as many at least); SLICE_MIN at least, `room` at most. */
int32_t ic_text_cost_slice(const struct ic_text_cost *c, int32_t n_decode, int32_t n_usual, int32_t room, double bound_ns);

/* Prompt tokens of a tick at least, however slow. A row cannot cost more than a decode of one, so this much is within
 * the default bound; and as small batches cost by the row, a larger one would read no faster. */
#define IC_SLICE_MIN 2
#define IC_GAP_FACTOR 3 /* a stream's gap while somebody's prompt is read, over its gap without */

#endif
