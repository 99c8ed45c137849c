#include "sched/text_cost.h"

#define KEEP 0.8     /* weight of what was known before */
#define OUTLIER 4    /* times what was known */
#define ALONE_MIN 32 /* rows of a prompt that is decoded alone, to learn a row's price from it */

static int32_t capped(int32_t n)
{
    return n < 1 ? 1 : n > IC_COST_STREAMS ? IC_COST_STREAMS : n;
}

/* The nearest number of streams that has been seen, from n in steps of `step`; 0: none. */
static int32_t seen(const struct ic_text_cost *k, int32_t n, int32_t step)
{
    while (n >= 1 && n <= IC_COST_STREAMS && k->decode_ns[n] <= 0)
        n += step;
    return n >= 1 && n <= IC_COST_STREAMS ? n : 0;
}

double ic_text_cost_decode(const struct ic_text_cost *k, int32_t n)
{
    n = capped(n);
    int32_t below = seen(k, n, -1), above = seen(k, n, 1);

    if (below == n || !above)
        return below ? k->decode_ns[below] + (n - below) * k->row_ns : 0;
    double high = k->decode_ns[above];
    if (!below) { /* one stream's share at least */
        double x = high - (above - n) * k->row_ns;
        return x > high / above ? x : high / above;
    }
    return k->decode_ns[below] + (high - k->decode_ns[below]) * (n - below) / (above - below);
}

/* A tick during which somebody else had the core says little: no single one moves the price far. */
static void average(double *v, double x)
{
    if (*v > 0 && x > OUTLIER * *v)
        x = OUTLIER * *v;
    *v = *v > 0 ? KEEP * *v + (1 - KEEP) * x : x;
}

void ic_text_cost_learn(struct ic_text_cost *k, double ns, int32_t n_decode, int32_t n_prompt)
{
    int32_t n = capped(n_decode), below = seen(k, n, -1);

    if (n_prompt == 0) {
        average(&k->decode_ns[n], ns);
        return;
    }
    if (n_prompt < IC_SLICE_MIN || (n_decode == 0 && n_prompt < ALONE_MIN && k->row_ns > 0))
        return; /* nearly all of it is the base, or noise: it would make a row look many times dearer */
    /* Streams beyond those whose price is known are rows as well. Were their part put on the prompt's few rows, these would look
     * so dear that they stay few, and nothing would ever tell otherwise. */
    double base = below ? k->decode_ns[below] : 0;
    int32_t rows = n_prompt + (below ? (n_decode > below ? n_decode - below : 0) : n_decode);
    if (seen(k, n, 1) && below) { /* between two that are known */
        base = ic_text_cost_decode(k, n);
        rows = n_prompt;
    }
    average(&k->row_ns, ns > base ? (ns - base) / rows : ns / (n_decode + n_prompt));
}

int32_t ic_text_cost_slice(const struct ic_text_cost *k, int32_t n_decode, int32_t n_usual, int32_t room, double bound_ns)
{
    double base = ic_text_cost_decode(k, n_decode), slice = IC_SLICE_MIN;
    double bound = bound_ns > 0 ? bound_ns : IC_GAP_FACTOR * ic_text_cost_decode(k, n_usual);

    if (n_decode == 0)
        return room;
    if (k->row_ns > 0 && base > 0)
        slice = (bound - base) / k->row_ns;
    if (slice < IC_SLICE_MIN)
        slice = IC_SLICE_MIN;
    return slice < room ? (int32_t)slice : room;
}
