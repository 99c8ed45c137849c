#include "sched/text_spec.h"

#define KEEP 0.75      /* of what was known of a stream's hits */
#define FIRST_HITS 0.3 /* of a stream that has not been seen: a few hits must come before it is tried */
#define KEEP_COST 0.8
#define OUTLIER 4
#define FIRST_PRICE 0.6 /* of a row, in decodes of one stream, where no price is known at all */
#define MARGIN 1.1      /* gain of the first proposal that makes up for what is not counted: sampling, events */
#define RELAX 0.995     /* per tick in which the price forbids what would be right more often than not: it may be an old one */

void ic_spec_init(struct ic_spec *g)
{
    *g = (struct ic_spec){.at = -1, .hits = FIRST_HITS};
}

/* Where the last IC_SPEC_NGRAM tokens stood before, latest first: the place behind them, or -1. */
static int32_t find(const int32_t *tokens, int32_t n)
{
    const int32_t *end = tokens + n - IC_SPEC_NGRAM;

    for (int32_t i = n - IC_SPEC_NGRAM - 1, last = n - IC_SPEC_REACH; i >= 0 && i >= last; i--) {
        int32_t k = 0;
        while (k < IC_SPEC_NGRAM && tokens[i + k] == end[k])
            k++;
        if (k == IC_SPEC_NGRAM)
            return i + IC_SPEC_NGRAM;
    }
    return -1;
}

void ic_spec_note(struct ic_spec *g, const int32_t *tokens, int32_t n)
{
    bool hit = false;

    if (g->at >= 0 && g->at < n - 1) {
        hit = tokens[g->at] == tokens[n - 1];
        g->hits = KEEP * g->hits + (hit ? 1 - KEEP : 0);
    }
    g->at = hit ? g->at + 1 : find(tokens, n);
}

int32_t ic_spec_guess(const struct ic_spec *g, const int32_t *tokens, int32_t n, int32_t *out, int32_t max)
{
    if (g->at < 0 || g->at >= n)
        return 0;
    for (int32_t i = 0; i < max; i++) /* past the end it repeats what it has just proposed: a text with a period */
        out[i] = g->at + i < n ? tokens[g->at + i] : out[g->at + i - n];
    return max;
}

double ic_spec_price(struct ic_spec_cost *c, const struct ic_spec_tick *t)
{
    if (c->row_ns <= 0)
        c->row_ns = t->row_ns > 0 ? t->row_ns : FIRST_PRICE * t->alone_ns;
    return c->row_ns;
}

int32_t ic_spec_worth(double hits, double price, struct ic_spec_tick *t, int32_t max)
{
    double chance = hits;
    int32_t k = 0;

    while (k < max && t->ns + price <= t->limit_ns && chance * t->ns > (k == 0 ? MARGIN : 1) * price * t->rows) {
        t->rows += chance;
        t->ns += price;
        chance *= hits;
        k++;
    }
    return k;
}

int32_t ic_spec_count(const struct ic_spec *g, struct ic_spec_cost *c, struct ic_spec_tick *t, int32_t max)
{
    if (g->at < 0 || t->alone_ns <= 0)
        return 0;
    int32_t k = ic_spec_worth(g->hits, ic_spec_price(c, t), t, max);
    if (k == 0 && g->hits > 0.5)
        c->row_ns *= RELAX;
    return k;
}

void ic_spec_learn(struct ic_spec_cost *c, double extra_ns, int32_t n)
{
    double x = extra_ns > 0 ? extra_ns / n : 0;

    if (c->row_ns > 0 && x > OUTLIER * c->row_ns)
        x = OUTLIER * c->row_ns;
    c->row_ns = c->row_ns > 0 ? KEEP_COST * c->row_ns + (1 - KEEP_COST) * x : x > 0 ? x : 1;
}
