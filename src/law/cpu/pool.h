/* A few threads that share one piece of work at a time, and stand aside for others.
 *
 * `ic_cpu_pool_run` cuts the work in units, which the caller and the pool's threads take one by one; it
 * returns when the last is done. The caller's thread works too, so a pool of n has n - 1 threads of its
 * own. Units must be independent; which thread does which is not defined.
 *
 * The machine's cores are shared with the text engine: nobody waits spinning for longer than
 * IC_CPU_SPIN_NS, then sleeps in a futex. A thread whose core was taken delays only the unit it holds;
 * the others take what is left. */
#ifndef IC_LAW_CPU_POOL_H
#define IC_LAW_CPU_POOL_H

#include "base/status.h"

#define IC_CPU_THREADS_MAX 256u
#define IC_CPU_SPIN_NS 20000 /* between two phases of a step lie 1-10 us */

struct ic_cpu_pool;

/* `worker` is 0 for the caller, else below the pool's thread count: an index for scratch memory. */
typedef void (*ic_cpu_unit_fn)(void *ctx, unsigned unit, unsigned worker);

/* threads: 1..IC_CPU_THREADS_MAX, the caller's included; 0: as many as this process may run on. */
enum ic_status ic_cpu_pool_open(unsigned threads, struct ic_cpu_pool **out, struct ic_err *err);
void ic_cpu_pool_close(struct ic_cpu_pool **pool); /* joins; NULL and *pool == NULL are fine */

unsigned ic_cpu_pool_threads(const struct ic_cpu_pool *pool); /* as opened */
/* How many take part from the next run on: 1..ic_cpu_pool_threads. Any thread. */
void ic_cpu_pool_limit(struct ic_cpu_pool *pool, unsigned threads);
unsigned ic_cpu_pool_limit_now(const struct ic_cpu_pool *pool);

/* One user at a time: take the pool for a series of runs, then let go. May block. */
void ic_cpu_pool_take(struct ic_cpu_pool *pool);
void ic_cpu_pool_release(struct ic_cpu_pool *pool);
/* By the holder only. Blocks until all units are done. */
void ic_cpu_pool_run(struct ic_cpu_pool *pool, ic_cpu_unit_fn fn, void *ctx, unsigned units);

#endif
