/* How many cores there are for us, and how many of them are idle. Any thread; reads /sys and /proc. */
#ifndef IC_HW_CPU_H
#define IC_HW_CPU_H

/* Cores that this process may use: CPU affinity, cut by the cgroup's quota (cpu.max), hyper-thread siblings
 * counted once (two busy-waiting threads on one core slow each other down). At least 1. */
int ic_cpu_cores(void);

/* Of those, the ones that nobody used during the next `sample_ms` (blocks as long): the right number of
 * spinning compute threads. A thread too many costs far more than one too few: with 3 threads on 2 cores a
 * 15 M model fell from 592 to 1.6 tokens/s. At least 1. */
int ic_cpu_cores_free(int sample_ms);

#endif
