/* Intervals over synthetic series, thousands of times: how often they hold what they promise, and what
 * pooling gains. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <cmocka.h>

#include "law/stats.h"

#define BATCHES 8
#define SAMPLES 20 /* of a batch */
#define RUNS_MAX 64
#define DRAWS 2000

static uint64_t rng;

static double uniform(void) /* (0, 1) */
{
    rng = rng * 6364136223846793005ULL + 1442695040888963407ULL;
    return ((double)(rng >> 11) + 0.5) / 9007199254740992.0;
}

static double normal(void)
{
    return sqrt(-2 * log(uniform())) * cos(6.283185307179586 * uniform());
}

/* Batch means of runs about `mean`: samples that remember the one before by `phi` (AR(1), deviation 1), and
 * what a run keeps for all its length, of deviation `kept`. */
static void draw(double *x, unsigned runs, double mean, double phi, double kept)
{
    for (unsigned r = 0; r < runs; r++) {
        const double own = kept * normal();
        double v = normal();
        for (unsigned b = 0; b < BATCHES; b++) {
            double sum = 0;
            for (int i = 0; i < SAMPLES; i++) {
                sum += v;
                v = phi * v + sqrt(1 - phi * phi) * normal();
            }
            x[r * BATCHES + b] = mean + own + sum / SAMPLES;
        }
    }
}

struct quality {
    double covered, pooled, half; /* shares of the draws; median half width */
};

static int by_size(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static struct quality judge(unsigned runs, double phi, double kept)
{
    static double x[RUNS_MAX * BATCHES], half[DRAWS];
    struct quality q = {0};
    rng = 20261124;
    for (int i = 0; i < DRAWS; i++) {
        draw(x, runs, 3, phi, kept);
        const struct ic_law_estimate e = ic_law_estimate_of(x, runs, BATCHES);
        q.covered += fabs(e.mean - 3) <= e.half;
        q.pooled += e.pooled;
        half[i] = e.half;
    }
    qsort(half, DRAWS, sizeof *half, by_size);
    q.covered /= DRAWS;
    q.pooled /= DRAWS;
    q.half = half[DRAWS / 2];
    printf("%u runs, memory %.2f, kept %.2f: covered %.3f, pooled %.3f, half %.4f\n", runs, phi, kept,
           q.covered, q.pooled, q.half);
    return q;
}

/* By hand: 2 runs of 2 batches, means 2 and 6. */
static void small_numbers_are_right(void **state)
{
    const double x[] = {1, 3, 4, 8};
    (void)state;
    struct ic_law_estimate e = ic_law_estimate_of(x, 2, 2);
    assert_true(e.mean == 4);
    assert_false(e.pooled);
    assert_int_equal(e.freedom, 1);
    assert_true(fabs(e.sd - sqrt(8)) < 1e-12); /* of 2 and 6 */
    assert_true(fabs(e.half - 12.706 * sqrt(8 / 2.0)) < 1e-9);
    /* four runs that agree although their batches do not: the batches count, 4 (2 - 1) degrees of freedom
     */
    const double y[] = {1, 3, 3, 1, 1, 3, 3, 1};
    e = ic_law_estimate_of(y, 4, 2);
    assert_true(e.pooled && e.mean == 2);
    assert_int_equal(e.freedom, 4);
    assert_true(fabs(e.half - 2.776 * sqrt(2 / 8.0)) < 1e-9); /* variance 2 of each of 8 batches */
    /* of three the same is not believed */
    e = ic_law_estimate_of(y, 3, 2);
    assert_false(e.pooled);
    assert_int_equal(e.freedom, 2);
}

static void what_cannot_be_told_is_infinite(void **state)
{
    const double x[] = {1, 2, 3, 4}, bad[] = {1, (double)NAN, 3, 4}, same[] = {5, 5, 5, 5};
    (void)state;
    assert_true(isinf(ic_law_estimate_of(x, 1, 4).half)); /* one run says nothing about others */
    struct ic_law_estimate e = ic_law_estimate_of(bad, 2, 2);
    assert_true(isnan(e.mean) && isinf(e.half));
    assert_int_equal(ic_law_runs_for(&e, 2, 1, 77), 77);
    e = ic_law_estimate_of(same, 4, 1); /* one batch: nothing to pool */
    assert_true(e.half == 0 && !e.pooled);
}

/* The promise is 95 %; what is held must be near it whatever the runs have in common with themselves. */
static void the_promise_is_held(void **state)
{
    static const double phi[] = {0, 0.9}, kept[] = {0, 0.05, 0.1, 0.2, 1};
    (void)state;
    for (unsigned runs = 2; runs <= 8; runs *= 2)
        for (int i = 0; i < 2; i++)
            for (int k = 0; k < 5; k++) {
                const double covered = judge(runs, phi[i], kept[k]).covered;
                assert_true(covered > 0.93 && covered < 0.985); /* drawn to half a per cent */
            }
}

/* Against 4 runs alone: 3.182 s / 2 with s their deviation, whose median is 0.888 sd. */
static void pooling_gains_where_runs_are_alike(void **state)
{
    (void)state;
    const double sd = 1 / sqrt(BATCHES * SAMPLES), alone = 3.182 * 0.888 * sd / 2;
    struct quality q = judge(4, 0, 0);
    assert_true(q.half < 0.88 * alone);
    assert_true(q.pooled > 0.5);
    q = judge(4, 0, 10 * sd); /* and where they are not, it does not happen */
    assert_true(q.pooled < 0.02);
}

static void a_number_of_runs_is_enough(void **state)
{
    static double x[RUNS_MAX * BATCHES];
    (void)state;
    struct ic_law_estimate e = {.sd = 12.3, .freedom = 3};
    const unsigned n = ic_law_runs_for(&e, BATCHES, 5, 1000);
    assert_in_range(n, 24, 28); /* 1.96^2 * 12.3^2 / 25 = 23, and t is wider than that */
    assert_int_equal(ic_law_runs_for(&e, BATCHES, 1000, 1000), 2);
    assert_int_equal(ic_law_runs_for(&e, BATCHES, 0.01, 1000), 1000);
    e.pooled = true; /* more degrees of freedom from the start */
    assert_in_range(ic_law_runs_for(&e, BATCHES, 5, 1000), 22, n - 1);
    /* drawn: of so many runs the interval is as narrow as that, on average */
    rng = 1;
    double half = 0;
    for (int i = 0; i < 200; i++) {
        draw(x, n, 0, 0, 12.3);
        half += ic_law_estimate_of(x, n, BATCHES).half / 200;
    }
    assert_true(half > 4.6 && half < 5.2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(small_numbers_are_right),    cmocka_unit_test(what_cannot_be_told_is_infinite),
        cmocka_unit_test(the_promise_is_held),        cmocka_unit_test(pooling_gains_where_runs_are_alike),
        cmocka_unit_test(a_number_of_runs_is_enough),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
