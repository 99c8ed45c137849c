#include "sched/text_cost.h"

#define KEEP 0.8      /* weight of what was known before */
#define OUTLIER 4     /* times what was known */
#define ONE_BY_ONE 16 /* up to here each number of rows has its own price */
#define ROW_GUESS 0.6 /* of the mean price of a row so far, for one more than has ever been seen */

/* The largest number of rows that has price i. */
static int32_t size_of(int32_t i)
{
    int32_t k = i - ONE_BY_ONE - 1, octave = k / 8;

    return i <= ONE_BY_ONE ? i : (16 << octave) + (k % 8 + 1) * (2 << octave);
}

static int32_t index_of(int32_t n)
{
    int32_t i = n < 1 ? 1 : n;

    if (i > ONE_BY_ONE)
        for (i = ONE_BY_ONE + 1; i < IC_COST_SIZES - 1 && size_of(i) < n; i++)
            ;
    return i;
}

/* The nearest price that has been seen, from i in steps of `step`; 0: none. */
static int32_t seen(const struct ic_text_cost *c, int32_t i, int32_t step)
{
    while (i >= 1 && i < IC_COST_SIZES && c->ns[i] <= 0)
        i += step;
    return i >= 1 && i < IC_COST_SIZES ? i : 0;
}

double ic_text_cost_of(const struct ic_text_cost *c, int32_t n)
{
    int32_t i = index_of(n), below = seen(c, i, -1), above = seen(c, i, 1);
    double low = c->ns[below], high = c->ns[above], at = size_of(below), to = size_of(above);

    if (below == i && below)
        return low;
    if (below && above)
        return low + (high - low) * (n - at) / (to - at);
    if (below)
        return n > at ? low + ROW_GUESS * (n - at) * low / at : low;
    return above ? high * n / to : 0;
}

double ic_text_cost_row(const struct ic_text_cost *c)
{
    int32_t i = seen(c, IC_COST_SIZES - 1, -1);

    return i ? c->ns[i] / size_of(i) : 0;
}

/* No dearer than by the row so far, nor than any larger one, nor, where one of less than twice the size is known, than what
 * lies between. 0: nobody knows. */
static double at_most(const struct ic_text_cost *c, int32_t n)
{
    int32_t i = index_of(n), below = seen(c, i, -1), above = seen(c, i, 1);
    double ns = below == i ? c->ns[i] : below ? c->ns[below] * n / size_of(below) : 0;

    if (below && below != i && above && size_of(above) < 2 * size_of(below))
        ns = ic_text_cost_of(c, n);
    for (i++; i < IC_COST_SIZES; i++)
        if (c->ns[i] > 0 && (ns <= 0 || c->ns[i] < ns))
            ns = c->ns[i];
    return ns;
}

/* A tick during which somebody else had the core says little: no single one moves the price far. */
void ic_text_cost_learn(struct ic_text_cost *c, double ns, int32_t n)
{
    double *known = &c->ns[index_of(n)];

    if (*known > 0 && ns > OUTLIER * *known)
        ns = OUTLIER * *known;
    *known = *known > 0 ? KEEP * *known + (1 - KEEP) * ns : ns;
}

int32_t ic_text_cost_slice(const struct ic_text_cost *c, int32_t n_decode, int32_t n_usual, int32_t room,
                           double bound_ns)
{
    double bound = bound_ns > 0 ? bound_ns : IC_GAP_FACTOR * ic_text_cost_of(c, n_usual);

    if (n_decode == 0)
        return room;
    for (int32_t i = index_of(n_decode + room); i > 0; i--) {
        int32_t n = size_of(i) < n_decode + room ? size_of(i) : n_decode + room, slice = n - n_decode;
        double ns = at_most(c, n);
        if (slice <= IC_SLICE_MIN)
            break;
        if (ns > 0 && ns <= IC_GAP_AIM * bound)
            return slice;
    }
    return IC_SLICE_MIN < room ? IC_SLICE_MIN : room;
}
