#include "sched/text_spec.h"

#define KEEP 0.75 /* of what was known of a stream's hits */
/* gain that makes up for what is not counted: sampling, events, guesses that go wrong in rows */
#define MARGIN 1.05
#define NEARLY_SURE 0.75
#define RELAX 0.998 /* of hope, per tick in which the price forbids what is nearly sure */
#define HOPE_MIN 0.5

static const int32_t level_from[IC_SPEC_LEVELS] = {IC_SPEC_NGRAM, 6, 12, 24};
static const double first_hits[IC_SPEC_LEVELS] = {0.3, 0.5, 0.7,
                                                  0.9}; /* of a stream that has not been seen */

static int32_t level(int32_t agree)
{
    int32_t l = IC_SPEC_LEVELS - 1;

    while (l > 0 && agree < level_from[l])
        l--;
    return l;
}

void ic_spec_init(struct ic_spec *g)
{
    *g = (struct ic_spec){.at = -1};
    for (int32_t l = 0; l < IC_SPEC_LEVELS; l++)
        g->hits[l] = first_hits[l];
}

/* Where the end of the text stood before, with most tokens in common and the latest of those: the place behind it, or -1. */
static void find(struct ic_spec *g, const int32_t *tokens, int32_t n)
{
    g->at = -1;
    g->agree = IC_SPEC_NGRAM - 1;
    for (int32_t i = n - 1, last = n - IC_SPEC_REACH;
         i >= IC_SPEC_NGRAM && i - IC_SPEC_NGRAM >= last && g->agree < IC_SPEC_AGREE_MAX; i--) {
        int32_t k = 0;
        while (k < IC_SPEC_AGREE_MAX && k < i && tokens[i - 1 - k] == tokens[n - 1 - k])
            k++;
        if (k > g->agree) {
            g->agree = k;
            g->at = i;
        }
    }
}

void ic_spec_note(struct ic_spec *g, const int32_t *tokens, int32_t n)
{
    bool hit = false;

    if (g->at >= 0 && g->at < n - 1) {
        double *hits = &g->hits[level(g->agree)];
        hit = tokens[g->at] == tokens[n - 1];
        *hits = KEEP * *hits + (hit ? 1 - KEEP : 0);
    }
    if (!hit) {
        find(g, tokens, n);
        return;
    }
    g->at++;
    g->agree += g->agree < IC_SPEC_AGREE_MAX;
}

int32_t ic_spec_guess(const struct ic_spec *g, const int32_t *tokens, int32_t n, int32_t *out, int32_t max)
{
    if (g->at < 0 || g->at >= n)
        return 0;
    for (int32_t i = 0; i < max;
         i++) /* past the end it repeats what it has just proposed: a text with a period */
        out[i] = g->at + i < n ? tokens[g->at + i] : out[g->at + i - n];
    return max;
}

double ic_spec_chance(const struct ic_spec *g, int32_t ahead)
{
    return g->at < 0 ? 0 : g->hits[level(g->agree + ahead)];
}

int32_t ic_spec_worth(struct ic_spec_tick *t, const double *chance, int32_t max, double step_ns,
                      double hope)
{
    double rows_ns = ic_text_cost_of(t->cost, t->rows), useful = t->useful, all = 1, best = 0,
           best_useful = 0, best_ns = 0;
    int32_t best_k = 0;

    if (t->ns <= 0 || rows_ns <= 0)
        return 0;
    best = MARGIN * t->useful / t->ns;
    for (int32_t k = 1; k <= max; k++) {
        double more = ic_text_cost_of(t->cost, t->rows + k) - rows_ns,
               ns = t->ns + hope * more + k * step_ns;
        all *= chance[k - 1];
        useful += all;
        if (ns > t->limit_ns || useful <= best * ns)
            continue;
        best = useful / ns;
        best_useful = useful;
        best_ns = ns;
        best_k = k;
    }
    if (best_k > 0) {
        t->rows += best_k;
        t->useful = best_useful;
        t->ns = best_ns;
    }
    return best_k;
}

int32_t ic_spec_count(const struct ic_spec *g, struct ic_spec_tick *t, double *hope, int32_t max)
{
    double chance[IC_SPEC_MAX];

    if (g->at < 0)
        return 0;
    max = max < IC_SPEC_MAX ? max : IC_SPEC_MAX;
    for (int32_t i = 0; i < max; i++)
        chance[i] = ic_spec_chance(g, i);
    int32_t k = ic_spec_worth(t, chance, max, 0, *hope);
    if (k > 0)
        *hope = 1;
    else if (ic_spec_chance(g, 0) > NEARLY_SURE && *hope > HOPE_MIN)
        *hope *= RELAX;
    return k;
}
