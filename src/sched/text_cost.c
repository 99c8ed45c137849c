#include "sched/text_cost.h"

#define KEEP 0.8     /* weight of what was known before */
#define OUTLIER 4    /* times what was known */
#define ALONE_MIN 32 /* rows of a prompt that is decoded alone, to learn a row's price from it */

static int32_t class_of(int32_t n)
{
    int32_t c = 0;
    for (int32_t most = 1; most < n && c < IC_COST_CLASSES - 1; most *= 2)
        c++;
    return c;
}

static int32_t known_class(const struct ic_text_cost *k, int32_t n)
{
    int32_t c = class_of(n), up;

    for (up = c; c >= 0 && k->decode_ns[c] <= 0;)
        c--;
    if (c >= 0)
        return c;
    while (up < IC_COST_CLASSES && k->decode_ns[up] <= 0)
        up++;
    return up < IC_COST_CLASSES ? up : -1;
}

double ic_text_cost_decode(const struct ic_text_cost *k, int32_t n)
{
    int32_t c = known_class(k, n);
    return c < 0 ? 0 : k->decode_ns[c];
}

/* A tick during which somebody else had the core says little: no single one moves the price far. */
static void average(double *v, double x)
{
    if (*v > 0 && x > OUTLIER * *v)
        x = OUTLIER * *v;
    *v = *v > 0 ? KEEP * *v + (1 - KEEP) * x : x;
}

/* A number of streams that is never seen without a prompt beside them would keep the price of a smaller number, and the
 * prompts their small slices. What the prompt does not account for is theirs, within reason: no cheaper than
 * fewer streams, and no dearer by the stream. */
static void guess(struct ic_text_cost *k, double ns, int32_t n_decode, int32_t n_prompt)
{
    int32_t c = class_of(n_decode), below = known_class(k, n_decode);

    if (k->row_ns <= 0 || below < 0 || below > c || (below == c && !k->guessed[c]))
        return;
    while (below == c || (below > 0 && k->decode_ns[below] <= 0))
        if (--below < 0)
            return;
    double low = k->decode_ns[below], high = low * (1 << (c - below)), x = ns - k->row_ns * n_prompt;
    average(&k->decode_ns[c], x < low ? low : x > high ? high : x);
    k->guessed[c] = true;
}

void ic_text_cost_learn(struct ic_text_cost *k, double ns, int32_t n_decode, int32_t n_prompt)
{
    if (n_prompt == 0) {
        int32_t c = class_of(n_decode);
        if (k->guessed[c])
            k->decode_ns[c] = 0;
        k->guessed[c] = false;
        average(&k->decode_ns[c], ns);
    } else if (n_prompt >= IC_SLICE_MIN) {
        double base = ic_text_cost_decode(k, n_decode > 0 ? n_decode : 1); /* what a tick costs whatever is in it */
        if (n_decode > 0)
            guess(k, ns, n_decode, n_prompt);
        if (n_decode == 0 && n_prompt < ALONE_MIN && k->row_ns > 0)
            return; /* nearly all of it is the base, or noise: it would make a row look many times dearer */
        average(&k->row_ns, ns > base ? (ns - base) / n_prompt : ns / (n_decode + n_prompt));
    }
}

int32_t ic_text_cost_slice(const struct ic_text_cost *k, int32_t n_decode, int32_t room, double bound_ns)
{
    double base = ic_text_cost_decode(k, n_decode), slice = IC_SLICE_MIN;

    if (n_decode == 0)
        return room;
    if (k->row_ns > 0 && base > 0)
        slice = (bound_ns > 0 ? bound_ns - base : (IC_GAP_FACTOR - 1) * base) / k->row_ns;
    if (slice < IC_SLICE_MIN)
        slice = IC_SLICE_MIN;
    return slice < room ? (int32_t)slice : room;
}
