/* Histogram of durations in fixed buckets; lock-free, any thread may add while another reads. */
#ifndef IC_BASE_HIST_H
#define IC_BASE_HIST_H

#include <stdatomic.h>
#include <stdint.h>

/* Upper bounds in seconds, Prometheus style (cumulative when printed); the last bucket is +Inf. */
#define IC_HIST_BOUNDS                                                                                     \
    {                                                                                                      \
        0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,   \
            10.0, 30.0, 60.0, 120.0                                                                        \
    }
#define IC_HIST_N 19

struct ic_hist {
    _Atomic uint64_t bucket[IC_HIST_N + 1];
    _Atomic uint64_t sum_ns;
};

extern const double ic_hist_bounds[IC_HIST_N];

void ic_hist_add(struct ic_hist *h, int64_t ns); /* negative counts as 0 */

#endif
