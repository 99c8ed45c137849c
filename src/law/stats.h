/* Means of noisy series, with intervals that may be believed: for comparing runs of a chaotic law
 * (law/fidelity.c).
 *
 * The samples of one run are no independent draws: neighbours in time are alike, and runs differ by what
 * they began with for as long as that lasts. So each run is cut into batches of consecutive samples, and
 * the means of the batches say two things: how much they scatter within a run, and how much the runs
 * scatter. Where runs differ by no more than their batches explain, all batches are draws of one thing, and
 * their number counts (batch means). Where they differ by more (batches too short to be independent, or
 * something that a run keeps), only the number of runs counts.
 *
 * Pure; any thread. */
#ifndef IC_LAW_STATS_H
#define IC_LAW_STATS_H

#include <stdbool.h>

#define IC_LAW_STATS_POOL_RUNS_MIN                                                                         \
    4 /* with fewer, how much runs differ is anybody's guess: never pooled                                 \
       */

struct ic_law_estimate {
    double mean;
    double half; /* of the 95 % interval (Student's t): mean - half to mean + half; infinite for one run */
    double sd;   /* of one run's mean, as far as can be told */
    unsigned freedom;
    bool pooled; /* the batches counted, not the runs */
};

/* x[run * batches + i]: mean of the i-th batch of a run. runs, batches >= 1. A NaN in x is one in the mean,
 * with an infinite interval. */
struct ic_law_estimate ic_law_estimate_of(const double *x, unsigned runs, unsigned batches);

/* About how many such runs would narrow the interval to +- margin (> 0), at least 2, at most `most`. */
unsigned ic_law_runs_for(const struct ic_law_estimate *e, unsigned batches, double margin, unsigned most);

/* Two-sided 95 % of Student's t; freedom >= 1. */
double ic_law_student(unsigned freedom);

#endif
