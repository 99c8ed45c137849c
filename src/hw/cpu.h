/* How many cores there are for us, and how many of them are idle. Any thread; reads /sys and /proc. */
#ifndef IC_HW_CPU_H
#define IC_HW_CPU_H

#include <stdint.h>

/* Cores that this process may use: CPU affinity, cut by the cgroup's quota (cpu.max), hyper-thread siblings
 * counted once (two busy-waiting threads on one core slow each other down). At least 1. */
int ic_cpu_cores(void);

/* The same, hyper-thread siblings counted each, a part of one as a whole: more than so many never compute at once. */
int ic_cpu_processors(void);

/* Of those cores, the ones that nobody used during the next `sample_ms` (blocks as long): the right number of
 * spinning compute threads. A thread too many costs far more than one too few: with 3 threads on 2 cores a
 * 15 M model fell from 592 to 1.6 tokens/s. At least 1. */
int ic_cpu_cores_free(int sample_ms);

/* What others do with our cores, from one call to the next. */
struct ic_cpu_watch {
    double busy, all; /* of /proc/stat */
    int64_t self_ns, at_ns;
};

/* Cores in use by other processes since the last call; negative when there is nothing to tell from (the
 * first call, or too short or too long ago). Reads /proc/stat: about a tenth of a millisecond. */
double ic_cpu_others(struct ic_cpu_watch *w);
/* The calling thread does little at a time and wants to do it at once: where the kernel can (Linux 6.12; no
 * rights needed), it interrupts threads that compute instead of waiting for the end of their time slice.
 * What it starts afterwards is not affected. */
void ic_cpu_hurry(void);
int64_t ic_cpu_self_ns(void); /* CPU time of this process, all threads */

#endif
