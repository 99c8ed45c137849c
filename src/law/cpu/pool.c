/* How a phase runs (see pool.h).
 *
 *   ticket = generation << 32 | next unit      one atomic word that says all
 *
 * The holder writes fn, ctx and units, then publishes a ticket of a new generation. A thread reads the
 * ticket, then the description, then takes the unit by compare-and-swap. If the swap succeeds the ticket
 * had not moved, so the description read belongs to it; and the phase cannot end (nor the description
 * be written again) before that unit is counted in `done`. A thread that slept through whole phases
 * fails its swap and looks again: nothing waits for it.
 *
 * Sleeping: workers on `wake` (a copy of the generation's low bits), the holder on `done`. Each side
 * tells the other that it sleeps before it looks a last time, so no wake-up is lost, and no system call
 * is made while all are awake. */
#include "law/cpu/pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/clock.h"

struct worker {
    struct ic_cpu_pool *pool;
    unsigned index;
    pthread_t thread;
};

struct ic_cpu_pool {
    _Alignas(64) _Atomic uint64_t ticket;
    _Atomic(ic_cpu_unit_fn) fn;
    _Atomic(void *) ctx;
    _Atomic uint32_t units;
    _Atomic uint32_t limit; /* threads that take part */
    _Alignas(64) _Atomic uint32_t done;
    _Atomic uint32_t holder_sleeps;
    _Alignas(64) _Atomic uint32_t wake;
    _Atomic uint32_t sleepers;
    _Atomic bool stop;
    _Alignas(64) pthread_mutex_t lock; /* held from take to release */
    unsigned threads, started;
    struct worker *workers;
};

static void futex_wait(_Atomic uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, int n)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
}

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Takes and does one unit of the current phase; false: none is left. */
static bool take_unit(struct ic_cpu_pool *p, unsigned index)
{
    uint64_t t = atomic_load_explicit(&p->ticket, memory_order_acquire);
    for (;;) {
        const uint32_t units = atomic_load_explicit(&p->units, memory_order_relaxed);
        const ic_cpu_unit_fn fn = atomic_load_explicit(&p->fn, memory_order_relaxed);
        void *ctx = atomic_load_explicit(&p->ctx, memory_order_relaxed);
        if ((uint32_t)t >= units)
            return false;
        if (!atomic_compare_exchange_weak_explicit(&p->ticket, &t, t + 1, memory_order_acq_rel,
                                                   memory_order_acquire))
            continue;
        fn(ctx, (uint32_t)t, index);
        if (atomic_fetch_add(&p->done, 1) + 1 == units && atomic_load(&p->holder_sleeps))
            futex_wake(&p->done, 1);
        return true;
    }
}

static bool spin_until_woken(struct ic_cpu_pool *p, uint32_t seen)
{
    const int64_t until = ic_now_ns() + IC_CPU_SPIN_NS;
    do {
        for (int i = 0; i < 32; i++) {
            if (atomic_load_explicit(&p->wake, memory_order_acquire) != seen)
                return true;
            relax();
        }
    } while (ic_now_ns() < until);
    return false;
}

static void *worker_main(void *arg)
{
    const struct worker *w = arg;
    struct ic_cpu_pool *p = w->pool;
    while (!atomic_load(&p->stop)) {
        const uint32_t seen = atomic_load(&p->wake);
        const uint32_t limit = atomic_load(&p->limit);
        if (w->index >= limit && !atomic_load(&p->stop)) { /* parked: no phase wakes it */
            futex_wait(&p->limit, limit);
            continue;
        }
        while (take_unit(p, w->index))
            ;
        if (spin_until_woken(p, seen))
            continue;
        atomic_fetch_add(&p->sleepers, 1);
        if (!atomic_load(&p->stop))
            futex_wait(&p->wake, seen); /* returns at once where wake != seen */
        atomic_fetch_sub(&p->sleepers, 1);
    }
    return NULL;
}

void ic_cpu_pool_run(struct ic_cpu_pool *p, ic_cpu_unit_fn fn, void *ctx, unsigned units)
{
    if (units == 0)
        return;
    if (units == 1 || atomic_load(&p->limit) == 1) {
        for (unsigned i = 0; i < units; i++)
            fn(ctx, i, 0);
        return;
    }
    /* The old ticket is spent (next unit >= units), so nobody takes anything until the new one is out;
     * but `units` may only grow once no thread can match the old ticket: retire it first. */
    const uint64_t generation = (atomic_load(&p->ticket) >> 32) + 1;
    atomic_store(&p->ticket, generation << 32 | UINT32_MAX);
    atomic_store(&p->done, 0);
    atomic_store(&p->fn, fn);
    atomic_store(&p->ctx, ctx);
    atomic_store(&p->units, units);
    atomic_store(&p->ticket, (generation + 1) << 32);
    atomic_fetch_add(&p->wake, 1);
    if (atomic_load(&p->sleepers))
        futex_wake(&p->wake, (int)IC_CPU_THREADS_MAX);
    while (take_unit(p, 0))
        ;
    int64_t until = 0;
    for (unsigned n = 0;; n++) {
        const uint32_t done = atomic_load(&p->done);
        if (done == units)
            return;
        relax();
        if (n % 32)
            continue;
        const int64_t now = ic_now_ns();
        if (!until)
            until = now + IC_CPU_SPIN_NS;
        if (now < until)
            continue;
        atomic_store(&p->holder_sleeps, 1);
        const uint32_t again = atomic_load(&p->done);
        if (again != units)
            futex_wait(&p->done, again);
        atomic_store(&p->holder_sleeps, 0);
    }
}

void ic_cpu_pool_take(struct ic_cpu_pool *p)
{
    pthread_mutex_lock(&p->lock);
}

void ic_cpu_pool_release(struct ic_cpu_pool *p)
{
    pthread_mutex_unlock(&p->lock);
}

unsigned ic_cpu_pool_threads(const struct ic_cpu_pool *p)
{
    return p->threads;
}

unsigned ic_cpu_pool_limit_now(const struct ic_cpu_pool *p)
{
    return atomic_load(&p->limit);
}

void ic_cpu_pool_limit(struct ic_cpu_pool *p, unsigned threads)
{
    IC_ASSERT(threads >= 1 && threads <= p->threads);
    atomic_store(&p->limit, threads);
    futex_wake(&p->limit, (int)IC_CPU_THREADS_MAX);
}

static unsigned cores(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0)
        return 1;
    const unsigned n = (unsigned)CPU_COUNT(&set);
    return n < 1 ? 1 : n > IC_CPU_THREADS_MAX ? IC_CPU_THREADS_MAX : n;
}

enum ic_status ic_cpu_pool_open(unsigned threads, struct ic_cpu_pool **out, struct ic_err *err)
{
    *out = NULL;
    if (threads == 0)
        threads = cores();
    if (threads > IC_CPU_THREADS_MAX)
        return ic_fail(err, IC_BAD_REQUEST, "%u threads; at most %u", threads, IC_CPU_THREADS_MAX);
    struct ic_cpu_pool *p = aligned_alloc(64, (sizeof *p + 63) / 64 * 64);
    struct worker *workers = calloc(threads, sizeof *workers);
    if (!p || !workers) {
        free(p);
        free(workers);
        return ic_fail(err, IC_OOM, "no memory for %u threads", threads);
    }
    *p = (struct ic_cpu_pool){.threads = threads, .workers = workers};
    atomic_init(&p->ticket, UINT32_MAX);
    atomic_init(&p->limit, threads);
    pthread_mutex_init(&p->lock, NULL);
    for (unsigned i = 1; i < threads; i++) {
        workers[i] = (struct worker){.pool = p, .index = i};
        if (pthread_create(&workers[i].thread, NULL, worker_main, &workers[i]) != 0) {
            ic_cpu_pool_close(&p);
            return ic_fail(err, IC_OOM, "cannot start thread %u of %u", i, threads);
        }
        p->started = i;
    }
    *out = p;
    return IC_OK;
}

void ic_cpu_pool_close(struct ic_cpu_pool **pool)
{
    if (!pool || !*pool)
        return;
    struct ic_cpu_pool *p = *pool;
    atomic_store(&p->stop, true);
    atomic_store(&p->limit, p->threads + 1); /* a new value: whoever parks now returns at once */
    futex_wake(&p->limit, (int)IC_CPU_THREADS_MAX);
    atomic_fetch_add(&p->wake, 1);
    futex_wake(&p->wake, (int)IC_CPU_THREADS_MAX);
    for (unsigned i = 1; i <= p->started; i++)
        pthread_join(p->workers[i].thread, NULL);
    pthread_mutex_destroy(&p->lock);
    free(p->workers);
    free(p);
    *pool = NULL;
}
