/* The governor under made-up temperatures: its table of transitions, then random walks against what it
 * promises. */
#include "hw/governor.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/log.h"

#define S 1000000000LL
#define MS 1000000LL

static const struct ic_governor_config plain = {.gpu_limit = 80, .cpu_limit = 95};

static void say(struct ic_governor *g, double temp, int64_t now)
{
    struct ic_hw_sample s;

    ic_hw_sample_clear(&s);
    s.n_gpus = 1;
    s.gpu[0].temp = temp;
    ic_governor_update(g, &s, IC_READ_ALL, now);
}

static struct ic_thermal view(struct ic_governor *g, int64_t now)
{
    struct ic_thermal t;
    ic_governor_view(g, now, &t);
    return t;
}

static void table(void **state)
{
    static const struct {
        double temp;
        enum ic_thermal_state st;
        double duty;
    } steps[] = {
        {40, IC_THERMAL_NORMAL, 1},    {79.9, IC_THERMAL_NORMAL, 1}, {80, IC_THERMAL_SLOW, 0.9},
        {82.5, IC_THERMAL_SLOW, 0.55}, {85, IC_THERMAL_SLOW, 0.2},   {89.9, IC_THERMAL_SLOW, 0.2},
        {79, IC_THERMAL_SLOW, 0.9},    {77, IC_THERMAL_SLOW, 0.9},   {76.9, IC_THERMAL_NORMAL, 1},
        {79.9, IC_THERMAL_NORMAL, 1},  {81, IC_THERMAL_SLOW, 0.76},  {90, IC_THERMAL_PAUSED, 0},
        {85, IC_THERMAL_PAUSED, 0},    {77, IC_THERMAL_PAUSED, 0},   {76, IC_THERMAL_NORMAL, 1},
        {120, IC_THERMAL_PAUSED, 0},   {20, IC_THERMAL_NORMAL, 1},
    };
    struct ic_governor g;
    int64_t now = S;

    (void)state;
    ic_governor_init(&g, &plain);
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        say(&g, steps[i].temp, now += S);
        struct ic_thermal t = view(&g, now);
        if (t.state != steps[i].st || fabs(t.duty - steps[i].duty) > 1e-9)
            fail_msg("step %zu, %.1f °C: %s, duty %g", i, steps[i].temp, ic_thermal_name(t.state), t.duty);
    }
    struct ic_thermal t = view(&g, now);
    assert_int_equal(t.changes[IC_THERMAL_SLOW], 2);
    assert_int_equal(t.changes[IC_THERMAL_PAUSED], 2);
    assert_int_equal(t.changes[IC_THERMAL_NORMAL], 3);
    assert_int_equal(t.state_ns[0] + t.state_ns[1] + t.state_ns[2],
                     (int64_t)(sizeof steps / sizeof *steps - 1) * S);
    ic_governor_deinit(&g);
}

static enum ic_thermal_state state_at(struct ic_governor_config cfg, double slowdown, double temp,
                                      double *limit)
{
    struct ic_governor g;
    struct ic_hw_sample s;

    ic_hw_sample_clear(&s);
    s.n_gpus = 1;
    s.gpu[0].temp = temp;
    s.gpu[0].slowdown_temp = slowdown;
    ic_governor_init(&g, &cfg);
    ic_governor_update(&g, &s, IC_READ_ALL, S);
    struct ic_thermal t = view(&g, S);
    ic_governor_deinit(&g);
    if (limit)
        *limit = t.limit;
    return t.state;
}

static void limits(void **state)
{
    double limit;

    (void)state;
    /* the device's own slowdown temperature, where it is lower than limit + 10 */
    assert_int_equal(state_at(plain, 87, 87, NULL), IC_THERMAL_PAUSED);
    assert_int_equal(state_at(plain, 87, 86.9, NULL), IC_THERMAL_SLOW);
    assert_int_equal(state_at(plain, 102, 90, NULL), IC_THERMAL_PAUSED);
    /* below our limit: the limit gives way */
    assert_int_equal(state_at(plain, 78, 73, &limit), IC_THERMAL_SLOW);
    assert_true(limit == 73);
    assert_int_equal(state_at(plain, 78, 78, NULL), IC_THERMAL_PAUSED);
    /* what the operator has said counts */
    struct ic_governor_config own = {.gpu_limit = 70, .gpu_critical = 95};
    assert_int_equal(state_at(own, 87, 94.9, NULL), IC_THERMAL_SLOW);
    assert_int_equal(state_at(own, 87, 95, NULL), IC_THERMAL_PAUSED);
    /* 0: not governed */
    struct ic_governor_config off = {0};
    assert_int_equal(state_at(off, 87, 140, NULL), IC_THERMAL_NORMAL);
}

/* The worst device decides, and each has its own hysteresis. */
static void devices(void **state)
{
    struct ic_governor g;
    struct ic_hw_sample s;
    struct ic_thermal t;
    char why[IC_THERMAL_WHY_MAX];

    (void)state;
    ic_governor_init(&g, &plain);
    ic_hw_sample_clear(&s);
    s.n_gpus = 2;
    s.gpu[0].temp = 60;
    s.gpu[1].temp = 83;
    s.cpu_temp = 96;
    ic_governor_update(&g, &s, IC_READ_ALL, S);
    t = view(&g, S);
    assert_int_equal(t.state, IC_THERMAL_SLOW);
    assert_int_equal(t.device, 1);
    ic_thermal_why(&t, why);
    assert_string_equal(why, "GPU 1 is at 83 °C, the limit is 80 °C");
    s.gpu[1].temp = 70;
    ic_governor_update(&g, &s, IC_READ_GPU, 2 * S);
    t = view(&g, 2 * S);
    assert_int_equal(t.state, IC_THERMAL_SLOW);
    assert_int_equal(t.device, IC_DEVICE_CPU);
    s.cpu_temp = 105;
    ic_governor_update(&g, &s, IC_READ_CPU, 3 * S);
    t = view(&g, 3 * S);
    assert_int_equal(t.state, IC_THERMAL_PAUSED);
    ic_thermal_why(&t, why);
    assert_string_equal(why, "the CPU is at 105 °C, the limit is 95 °C");
    s.cpu_temp = 50;
    s.gpu[0].temp = 65;
    ic_governor_update(&g, &s, IC_READ_ALL, 4 * S);
    t = view(&g, 4 * S);
    assert_int_equal(t.state, IC_THERMAL_NORMAL);
    assert_true(t.temp == 70);
    ic_thermal_why(&t, why);
    assert_string_equal(why, "");
    ic_governor_deinit(&g);
}

static void silence(void **state)
{
    struct ic_governor g;

    (void)state;
    ic_governor_init(&g, &plain);
    say(&g, 91, S);
    for (int i = 1; i <= 10; i++) {
        say(&g, NAN, S + i * S);
        assert_int_equal(view(&g, S + i * S).state, IC_THERMAL_PAUSED);
    }
    say(&g, NAN, 11 * S + 1);
    assert_int_equal(view(&g, 11 * S + 1).state, IC_THERMAL_NORMAL);
    assert_int_equal(ic_governor_pause_ns(&g, MS, 11 * S + 1), 0);
    say(&g, 91, 12 * S); /* it is back, and so is the guard */
    assert_int_equal(view(&g, 12 * S).state, IC_THERMAL_PAUSED);
    /* the device falls out of the sample altogether */
    struct ic_hw_sample none;
    ic_hw_sample_clear(&none);
    ic_governor_update(&g, &none, IC_READ_ALL, 13 * S);
    assert_int_equal(view(&g, 13 * S).state, IC_THERMAL_PAUSED);
    ic_governor_update(&g, &none, IC_READ_ALL, 23 * S);
    assert_int_equal(view(&g, 23 * S).state, IC_THERMAL_NORMAL);
    ic_governor_deinit(&g);

    /* nobody reads any more: the driver hangs */
    ic_governor_init(&g, &plain);
    say(&g, 91, S);
    assert_int_equal(ic_governor_pause_ns(&g, MS, 11 * S), IC_GOVERNOR_ASK_PAUSED_NS);
    assert_int_equal(ic_governor_pause_ns(&g, MS, 11 * S + 1), 0);
    assert_int_equal(view(&g, 11 * S + 1).state, IC_THERMAL_NORMAL);
    say(&g, 91, 20 * S);
    assert_int_equal(view(&g, 20 * S).state, IC_THERMAL_PAUSED);
    /* a device that never told anything is no reason for anything */
    ic_governor_deinit(&g);
    ic_governor_init(&g, &plain);
    say(&g, NAN, 100 * S);
    assert_int_equal(view(&g, 100 * S).state, IC_THERMAL_NORMAL);
    ic_governor_deinit(&g);
}

/* Runs an engine of ticks of `work` for `span` of made-up time and returns the share of it that it
 * computed. */
static double computed(struct ic_governor *g, double temp, int64_t work, int64_t span, int engines)
{
    int64_t now = S, at[2] = {S, S}, busy = 0;

    while (now < S + span) {
        say(g, temp, now);
        int e = engines == 2 && at[1] < at[0];
        now = at[e];
        int64_t rest = ic_governor_pause_ns(g, 0, now);
        if (rest == 0) {
            now += work;
            busy += work;
            rest = ic_governor_pause_ns(g, work, now);
        }
        assert_in_range(rest, 0, IC_GOVERNOR_ASK_PAUSED_NS);
        at[e] = now + rest;
        if (engines == 2 && at[!e] < now) /* engines take turns on the cores */
            at[!e] = now;
    }
    return (double)busy / (double)(now - S);
}

static void rests(void **state)
{
    static const struct {
        double temp, share;
    } rows[] = {{70, 1}, {80, 0.9}, {82.5, 0.55}, {85, 0.2}, {88, 0.2}, {95, 0}};
    static const int64_t works[] = {200000, 5 * MS, 100 * MS, 2 * S};
    struct ic_governor g;

    (void)state;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        for (size_t k = 0; k < sizeof works / sizeof *works; k++)
            for (int engines = 1; engines <= 2; engines++) {
                ic_governor_init(&g, &plain);
                say(&g, rows[i].temp, S);
                double share = computed(&g, rows[i].temp, works[k], 2000 * works[k], engines);
                double off = fabs(share - rows[i].share);
                if (off > (engines == 2 ? 0.1 : 0.01))
                    fail_msg("%g °C, ticks of %lld ns, %d engines: %.3f", rows[i].temp, (long long)works[k],
                             engines, share);
                ic_governor_deinit(&g);
            }
    /* one rest is bounded, however long the tick was */
    ic_governor_init(&g, &plain);
    say(&g, 85, S);
    assert_int_equal(ic_governor_pause_ns(&g, 3600 * S, S), IC_GOVERNOR_ASK_SLOW_NS);
    say(&g, 85, S + IC_GOVERNOR_REST_MAX_NS);
    assert_int_equal(ic_governor_pause_ns(&g, 0, S + IC_GOVERNOR_REST_MAX_NS), 0);
    assert_int_equal(view(&g, S + IC_GOVERNOR_REST_MAX_NS).rest_ns, IC_GOVERNOR_REST_MAX_NS);
    /* normal again: what is left of a rest is forgiven */
    ic_governor_pause_ns(&g, S, 12 * S);
    say(&g, 60, 12 * S);
    assert_int_equal(ic_governor_pause_ns(&g, 0, 12 * S), 0);
    ic_governor_deinit(&g);
    assert_int_equal(ic_governor_pause_ns(NULL, S, S), 0);
}

static double uniform(unsigned *seed)
{
    *seed = *seed * 1664525 + 1013904223;
    return (*seed >> 8) / (double)(1 << 24);
}

/* Two walks, one never cooler than the other and silent at the same times. */
static void walks(void **state)
{
    (void)state;
    for (unsigned round = 0; round < 400; round++) {
        struct ic_governor cool, hot;
        unsigned seed = round * 7919 + 1;
        struct ic_governor_config cfg = {.gpu_limit = 60 + 30 * uniform(&seed)};
        double step = 0.2 + 8 * uniform(&seed), temp = 50 + 50 * uniform(&seed), last_turn = NAN;
        enum ic_thermal_state before = IC_THERMAL_NORMAL;
        int silent = 0;
        if (uniform(&seed) < 0.3)
            cfg.gpu_critical = cfg.gpu_limit + 1 + 20 * uniform(&seed);
        ic_governor_init(&cool, &cfg);
        ic_governor_init(&hot, &cfg);
        for (int64_t i = 1; i < 2000; i++) {
            temp += step * (uniform(&seed) - 0.5) * 2;
            temp = temp < 20 ? 20 : temp > 130 ? 130 : temp;
            silent = silent > 0 ? silent - 1 : uniform(&seed) < 0.01 ? (int)(25 * uniform(&seed)) : 0;
            double warmer = temp + 10 * uniform(&seed);
            say(&cool, silent ? NAN : temp, i * S);
            say(&hot, silent ? NAN : warmer, i * S);
            struct ic_thermal c = view(&cool, i * S), h = view(&hot, i * S);
            assert_true(c.state <= h.state && c.duty >= h.duty);
            assert_true((c.state == IC_THERMAL_NORMAL) == (c.duty == 1.0));
            assert_true((c.state == IC_THERMAL_PAUSED) == (c.duty == 0.0));
            if (c.state == IC_THERMAL_SLOW)
                assert_true(c.duty >= 1 - IC_GOVERNOR_REST_MOST - 1e-9 &&
                            c.duty <= 1 - IC_GOVERNOR_REST_LEAST + 1e-9);
            if (!silent) {
                assert_false(temp >= cfg.gpu_limit && c.state == IC_THERMAL_NORMAL);
                assert_false(temp < cfg.gpu_limit - IC_GOVERNOR_HYSTERESIS && c.state != IC_THERMAL_NORMAL);
            } else {
                last_turn = NAN; /* going blind is a turn without a temperature */
            }
            /* a state left upwards and come back to: the temperature has moved by the hysteresis in between
             */
            if (c.state != before && !silent) {
                if ((before == IC_THERMAL_NORMAL || c.state == IC_THERMAL_NORMAL) && !isnan(last_turn))
                    assert_true(fabs(temp - last_turn) >= IC_GOVERNOR_HYSTERESIS - 1e-9);
                if (before == IC_THERMAL_NORMAL || c.state == IC_THERMAL_NORMAL)
                    last_turn = c.state == IC_THERMAL_NORMAL ? cfg.gpu_limit - IC_GOVERNOR_HYSTERESIS
                                                             : cfg.gpu_limit;
            }
            before = c.state;
        }
        ic_governor_deinit(&cool);
        ic_governor_deinit(&hot);
    }
}

/* A sensor that trembles by a degree around any temperature changes the state once at most. */
static void no_flapping(void **state)
{
    unsigned seed = 5;

    (void)state;
    for (double around = 70; around < 100; around += 0.25) {
        struct ic_governor g;
        ic_governor_init(&g, &plain);
        for (int64_t i = 1; i < 500; i++)
            say(&g, around + 2.9 * (uniform(&seed) - 0.5), i * S);
        struct ic_thermal t = view(&g, 500 * S);
        assert_true(t.changes[IC_THERMAL_NORMAL] == 0 && t.changes[IC_THERMAL_SLOW] <= 1 &&
                    t.changes[IC_THERMAL_PAUSED] <= 1);
        ic_governor_deinit(&g);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(table),       cmocka_unit_test(limits), cmocka_unit_test(devices),
        cmocka_unit_test(silence),     cmocka_unit_test(rests),  cmocka_unit_test(walks),
        cmocka_unit_test(no_flapping),
    };
    ic_log_set_level(IC_LOG_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
