#include "base/hist.h"

const double ic_hist_bounds[IC_HIST_N] = IC_HIST_BOUNDS;

void ic_hist_add(struct ic_hist *h, int64_t ns)
{
    int i = 0;

    if (ns < 0)
        ns = 0;
    while (i < IC_HIST_N && (double)ns > ic_hist_bounds[i] * 1e9)
        i++;
    atomic_fetch_add_explicit(&h->bucket[i], 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&h->sum_ns, (uint64_t)ns, memory_order_relaxed);
}
