/* The monitor's thread: when it reads, that it sleeps otherwise, that it ends. Waits are for events, with a
 * generous end; the one thing judged by time is that nothing happens for a while, which a slow machine
 * cannot make fail. */
#include "hw/monitor.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <time.h>

#include <cmocka.h>

#include "base/clock.h"
#include "base/log.h"

#define PERIOD (5 * IC_MS)
#define GIVE_UP_NS (60 * 1000 * IC_MS)

static atomic_int temp, reads, gpu_reads, closed, changes;
static atomic_bool hang;

static void nap(int64_t ns)
{
    struct timespec ts = {ns / 1000000000, ns % 1000000000};
    nanosleep(&ts, NULL);
}

static void fake_read(void *arg, int what, struct ic_hw_sample *s)
{
    (void)arg;
    atomic_fetch_add(&reads, 1);
    while (atomic_load(&hang))
        nap(IC_MS);
    if (what & IC_READ_CPU)
        s->cpu_temp = 40;
    if (!(what & IC_READ_GPU))
        return;
    atomic_fetch_add(&gpu_reads, 1);
    s->n_gpus = 1;
    s->gpu[0].temp = atomic_load(&temp);
}

static void fake_close(void *arg)
{
    (void)arg;
    atomic_fetch_add(&closed, 1);
}

static void on_change(void *arg)
{
    (void)arg;
    atomic_fetch_add(&changes, 1);
}

static struct ic_monitor *start(int64_t period)
{
    struct ic_monitor_config cfg = {
        .sources = {{.name = "fake", .what = IC_READ_ALL, .read = fake_read, .close = fake_close}},
        .n_sources = 1,
        .governor = {.gpu_limit = 80, .cpu_limit = 95},
        .period_ns = period,
        .changed = on_change,
    };
    struct ic_monitor *m;

    temp = 50;
    reads = gpu_reads = closed = changes = 0;
    hang = false;
    assert_int_equal(ic_monitor_open(&m, &cfg, NULL), IC_OK);
    return m;
}

#define UNTIL(cond)                                                                                        \
    do {                                                                                                   \
        for (int64_t end = ic_now_ns() + GIVE_UP_NS; !(cond); nap(IC_MS))                                  \
            if (ic_now_ns() > end)                                                                         \
                fail_msg("gave up waiting for %s", #cond);                                                 \
    } while (0)

static enum ic_thermal_state state_of(struct ic_monitor *m)
{
    struct ic_thermal t;
    ic_governor_view(ic_monitor_governor(m), ic_now_ns(), &t);
    return t.state;
}

static void asleep_when_idle(void **state)
{
    struct ic_monitor *m = start(PERIOD);
    struct ic_hw_view v;

    (void)state;
    UNTIL((ic_monitor_view(m, &v), v.reads == 1));
    assert_true(v.sample.gpu[0].temp == 50 && v.sample.cpu_temp == 40 && v.gpu_ns && v.cpu_ns);
    nap(40 * PERIOD);
    assert_int_equal(reads, 1);    /* the one at the start */
    for (int i = 0; i < 20; i++) { /* looking is no reason to read: the last reading is younger than 10 s */
        ic_monitor_ask(m);
        nap(PERIOD);
    }
    assert_int_equal(reads, 1);
    /* work wakes it */
    UNTIL((ic_governor_pause_ns(ic_monitor_governor(m), IC_MS, ic_now_ns()), gpu_reads >= 5));
    /* two seconds after the last work it sleeps again */
    UNTIL((nap(100 * IC_MS), ic_monitor_view(m, &v), ic_now_ns() - v.gpu_ns > 10 * PERIOD));
    int n = reads;
    nap(40 * PERIOD);
    assert_int_equal(reads, n);
    ic_monitor_close(&m);
    assert_null(m);
    assert_int_equal(closed, 1);
    ic_monitor_close(&m);
}

static void watched(void **state)
{
    struct ic_monitor *m = start(PERIOD);

    (void)state;
    ic_monitor_watch(m, true);
    UNTIL(gpu_reads >= 10);
    ic_monitor_watch(m, false);
    UNTIL((nap(20 * PERIOD), true));
    int n = reads;
    nap(40 * PERIOD);
    assert_int_equal(reads, n);
    ic_monitor_close(&m);
    /* at the real pace: not more than one a second */
    m = start(0);
    int64_t t0 = ic_now_ns();
    ic_monitor_watch(m, true);
    UNTIL(reads >= 3);
    assert_true(ic_now_ns() - t0 >= 2 * IC_MONITOR_PERIOD_NS - 50 * IC_MS);
    ic_monitor_close(&m);
}

/* Too hot and nothing to do: it goes on looking until it has cooled down, else nobody would ever let go. */
static void hot(void **state)
{
    struct ic_monitor *m = start(PERIOD);
    struct ic_governor *g = ic_monitor_governor(m);

    (void)state;
    temp = 95;
    ic_governor_pause_ns(g, IC_MS, ic_now_ns());
    UNTIL((ic_governor_pause_ns(g, 1, ic_now_ns()), state_of(m) == IC_THERMAL_PAUSED));
    UNTIL(changes == 1);
    assert_true(ic_governor_pause_ns(g, 0, ic_now_ns()) > 0);
    nap(2100 * IC_MS); /* longer than the linger */
    temp = 60;
    UNTIL(state_of(m) == IC_THERMAL_NORMAL);
    UNTIL(changes == 2);
    ic_monitor_close(&m);
}

/* A driver that hangs holds up nobody but the thread itself, and closing waits for it. */
static void hanging(void **state)
{
    struct ic_monitor *m = start(PERIOD);
    struct ic_hw_view v;

    (void)state;
    UNTIL(reads == 1);
    hang = true;
    ic_monitor_watch(m, true);
    UNTIL(reads == 2);
    for (int i = 0; i < 1000; i++) {
        ic_monitor_view(m, &v);
        ic_monitor_ask(m);
        assert_int_equal(ic_governor_pause_ns(ic_monitor_governor(m), IC_MS, ic_now_ns()), 0);
    }
    hang = false;
    ic_monitor_close(&m);
}

static void *worker(void *arg)
{
    for (int i = 0; i < 20000; i++)
        ic_governor_pause_ns(arg, 1000, ic_now_ns());
    return NULL;
}

/* For TSan: everybody at once, many short lives. */
static void crowd(void **state)
{
    (void)state;
    for (int i = 0; i < 20; i++) {
        struct ic_monitor *m = start(IC_MS);
        struct ic_hw_view v;
        pthread_t t[2];
        for (int k = 0; k < 2; k++)
            assert_int_equal(pthread_create(&t[k], NULL, worker, ic_monitor_governor(m)), 0);
        for (int k = 0; k < 200; k++) {
            temp = k % 50 + 50;
            ic_monitor_watch(m, k & 1);
            ic_monitor_ask(m);
            ic_monitor_view(m, &v);
            state_of(m);
        }
        for (int k = 0; k < 2; k++)
            pthread_join(t[k], NULL);
        ic_monitor_close(&m);
    }
    for (int i = 0; i < 100; i++) { /* stopped as soon as started */
        struct ic_monitor *m = start(IC_MS);
        ic_monitor_close(&m);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(asleep_when_idle), cmocka_unit_test(watched), cmocka_unit_test(hot),
        cmocka_unit_test(hanging),          cmocka_unit_test(crowd),
    };
    ic_log_set_level(IC_LOG_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
