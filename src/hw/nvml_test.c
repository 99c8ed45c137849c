/* NVML through a fake libnvidia-ml.so.1 (fake_nvml.c), and through the real one where there is a GPU. */
#include "hw/nvml.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "base/log.h"
#include "hw/fake_nvml.h"

#define S 1000000000LL

static int64_t fake_now;
static int64_t now_ns(void)
{
    return fake_now;
}

static struct fake_nvml *fake;
static void *fake_lib;

static int load_fake(void **state)
{
    (void)state;
    fake_lib = dlopen(FAKE_NVML, RTLD_NOW);
    fake = fake_lib ? dlsym(fake_lib, "fake_nvml") : NULL;
    if (!fake)
        return -1;
    memset(fake, 0, sizeof *fake);
    fake->n = 2;
    for (unsigned i = 0; i < FAKE_GPUS; i++) {
        fake->gpu[i].temp = 60 + i;
        fake->gpu[i].slowdown = 99;
        fake->gpu[i].power_mw = 87500;
        fake->gpu[i].limit_mw = 120000;
        fake->gpu[i].fan = 43;
        fake->gpu[i].graphics = 1708;
        fake->gpu[i].memory_clock = 4004;
        fake->gpu[i].use = 97;
        fake->gpu[i].memory_use = 55;
        fake->gpu[i].total = 3ULL << 30;
        fake->gpu[i].used = 1ULL << 30;
        fake->gpu[i].reasons = IC_THROTTLE_POWER_CAP;
    }
    fake_now = 1000 * S;
    return 0;
}

static int unload_fake(void **state)
{
    (void)state;
    return dlclose(fake_lib);
}

static struct ic_sensor_source open_fake(void)
{
    struct ic_sensor_source s;
    struct ic_err err = {0};

    if (ic_nvml_source(&s, FAKE_NVML, &err) != IC_OK)
        fail_msg("%s", err.msg);
    ic_nvml_set_clock(&s, now_ns);
    return s;
}

static void everything(void **state)
{
    struct ic_sensor_source s = open_fake();
    struct ic_hw_sample h;

    (void)state;
    ic_hw_sample_clear(&h);
    s.read(s.arg, IC_READ_ALL, &h);
    assert_int_equal(h.n_gpus, 2);
    assert_true(isnan(h.cpu_temp));
    const struct ic_gpu_sample *g = &h.gpu[1];
    assert_string_equal(g->name, "Fake GPU 1");
    assert_string_equal(g->uuid, "GPU-00000001");
    assert_true(!g->gone && g->temp == 61 && g->slowdown_temp == 99 && g->power_w == 87.5 &&
                g->power_limit_w == 120);
    assert_true(g->fan_percent == 43 && g->graphics_mhz == 1708 && g->memory_mhz == 4004);
    assert_true(g->gpu_percent == 97 && g->memory_percent == 55 && g->throttle == IC_THROTTLE_POWER_CAP);
    assert_int_equal(g->memory_total, 3LL << 30);
    assert_int_equal(g->memory_used, 1LL << 30);
    assert_int_equal(g->memory_free, 2LL << 30);
    int calls = fake->calls;
    s.read(s.arg, IC_READ_CPU, &h); /* GPUs are left alone */
    assert_int_equal(fake->calls, calls);
    s.close(s.arg);
    assert_int_equal(fake->inits, 1);
    assert_int_equal(fake->shutdowns, 1);
}

/* Each call fails by itself, with "not supported" or anything else: its field is unknown and nothing else
 * is. */
static void one_by_one(void **state)
{
    struct ic_sensor_source s = open_fake();
    struct ic_hw_sample h;
    static const int codes[] = {3, 4, 13, 17, 999};

    (void)state;
    for (unsigned c = 0; c < sizeof codes / sizeof *codes; c++)
        for (int which = 0; which < 9; which++) {
            int *rc[] = {&fake->gpu[0].temp_rc,  &fake->gpu[0].threshold_rc, &fake->gpu[0].power_rc,
                         &fake->gpu[0].limit_rc, &fake->gpu[0].fan_rc,       &fake->gpu[0].clock_rc,
                         &fake->gpu[0].use_rc,   &fake->gpu[0].mem_rc,       &fake->gpu[0].throttle_rc};
            *rc[which] = codes[c];
            ic_hw_sample_clear(&h);
            s.read(s.arg, IC_READ_GPU, &h);
            const struct ic_gpu_sample *g = &h.gpu[0];
            bool unknown[] = {isnan(g->temp),
                              isnan(g->slowdown_temp),
                              isnan(g->power_w),
                              isnan(g->power_limit_w),
                              isnan(g->fan_percent),
                              isnan(g->graphics_mhz) && isnan(g->memory_mhz),
                              isnan(g->gpu_percent) && isnan(g->memory_percent),
                              g->memory_total == -1 && g->memory_used == -1 && g->memory_free == -1,
                              g->throttle == -1};
            for (int k = 0; k < 9; k++)
                assert_int_equal(unknown[k], k == which);
            assert_false(g->gone);
            assert_true(h.gpu[1].temp == 61);
            *rc[which] = 0;
        }
    fake->gpu[0].temp = 511; /* what some boards say for "no sensor" */
    s.read(s.arg, IC_READ_GPU, &h);
    assert_true(isnan(h.gpu[0].temp));
    s.close(s.arg);
}

static void lost_and_found(void **state)
{
    struct ic_sensor_source s = open_fake();
    struct ic_hw_sample h;

    (void)state;
    ic_hw_sample_clear(&h);
    for (int at = 1; at <= 12; at++) { /* lost at each call of a reading */
        fake->gpu[0].lost_at = at;
        s.read(s.arg, IC_READ_GPU, &h);
        assert_int_equal(h.n_gpus, 2);
        if (fake->gpu[0].rc) {
            assert_true(h.gpu[0].gone && isnan(h.gpu[0].temp) && h.gpu[0].memory_total == -1 &&
                        h.gpu[0].throttle == -1);
            assert_true(h.gpu[1].temp == 61);
        }
        int calls = fake->calls;
        fake_now += 29 * S; /* not yet */
        s.read(s.arg, IC_READ_GPU, &h);
        assert_true(!fake->gpu[0].rc || fake->calls < calls + 14);
        fake->gpu[0].lost_at = 0;
        fake_now += S + 1;
        s.read(s.arg, IC_READ_GPU, &h); /* tried, and still lost */
        assert_int_equal(h.gpu[0].gone, fake->gpu[0].rc != 0);
        fake->gpu[0].rc = 0;
        fake_now += 10 * S;
        s.read(s.arg, IC_READ_GPU, &h);
        fake_now += 21 * S;
        s.read(s.arg, IC_READ_GPU, &h);
        assert_true(!h.gpu[0].gone && h.gpu[0].temp == 60);
        assert_string_equal(h.gpu[0].name, "Fake GPU 0");
    }
    assert_int_equal(fake->inits, 1); /* the other one was alive all the time */
    fake->gpu[0].rc = 16;
    fake->gpu[1].rc = 1;
    s.read(s.arg, IC_READ_GPU, &h);
    assert_true(h.gpu[0].gone && h.gpu[1].gone);
    fake->init_rc = 9;
    fake_now += 31 * S;
    s.read(s.arg, IC_READ_GPU, &h);
    assert_true(h.gpu[0].gone && h.gpu[1].gone);
    fake->init_rc = fake->gpu[0].rc = fake->gpu[1].rc = 0;
    fake->gpu[1].handle_rc = 4;
    fake_now += 31 * S;
    s.read(s.arg, IC_READ_GPU, &h);
    assert_true(!h.gpu[0].gone && h.gpu[1].gone);
    assert_int_equal(fake->inits, 3);
    s.close(s.arg);
    assert_int_equal(fake->shutdowns, 2);
}

static void absence(void **state)
{
    struct ic_sensor_source s;
    struct ic_err err = {0};

    (void)state;
    assert_int_equal(ic_nvml_source(&s, "/nonexistent/libnvidia-ml.so.1", &err), IC_NOT_FOUND);
    assert_int_equal(ic_nvml_source(&s, "libm.so.6", &err), IC_NOT_FOUND); /* a library, but not this one */
    fake->init_rc = 9;
    assert_int_equal(ic_nvml_source(&s, FAKE_NVML, &err), IC_NOT_FOUND);
    fake->init_rc = 0;
    fake->n = 0;
    assert_int_equal(ic_nvml_source(&s, FAKE_NVML, &err), IC_NOT_FOUND);
    assert_int_equal(fake->shutdowns, 1);
    fake->n = FAKE_GPUS; /* more than are watched */
    s = open_fake();
    struct ic_hw_sample h;
    ic_hw_sample_clear(&h);
    s.read(s.arg, IC_READ_GPU, &h);
    assert_int_equal(h.n_gpus, IC_GPUS_MAX);
    s.close(s.arg);
}

/* On a machine with an NVIDIA GPU: the ABI as we have written it down, seen to give sane values. */
static void the_real_one(void **state)
{
    struct ic_sensor_source s;
    struct ic_hw_sample h;
    struct ic_err err = {0};

    (void)state;
    if (ic_nvml_source(&s, NULL, &err) != IC_OK) {
        print_message("no NVML here: %s\n", err.msg);
        skip();
    }
    ic_hw_sample_clear(&h);
    s.read(s.arg, IC_READ_ALL, &h);
    assert_true(h.n_gpus >= 1);
    for (unsigned i = 0; i < h.n_gpus; i++) {
        const struct ic_gpu_sample *g = &h.gpu[i];
        print_message("GPU %u: %s %s, %g °C (slowdown %g), %g of %g W, fan %g %%, %g / %g MHz, busy %g / "
                      "%g %%, memory %lld = "
                      "%lld + %lld, throttle %llx\n",
                      i, g->name, g->uuid, g->temp, g->slowdown_temp, g->power_w, g->power_limit_w,
                      g->fan_percent, g->graphics_mhz, g->memory_mhz, g->gpu_percent, g->memory_percent,
                      (long long)g->memory_total, (long long)g->memory_used, (long long)g->memory_free,
                      (unsigned long long)g->throttle);
        assert_true(g->name[0] && !strncmp(g->uuid, "GPU-", 4));
        assert_true(isnan(g->temp) || (g->temp > 0 && g->temp < 110));
        assert_true(isnan(g->gpu_percent) || g->gpu_percent <= 100);
        assert_true(g->memory_total == -1 || g->memory_free <= g->memory_total);
    }
    s.close(s.arg);
}

static void free_memory_by_address(void **state)
{
    uint64_t bytes = 1;

    (void)state;
    fake->gpu[1].used = 3ULL << 29;
    assert_true(ic_nvml_free_memory(FAKE_NVML, "0000:01:00.0", &bytes));
    assert_int_equal(bytes, 3ULL << 29);
    assert_int_equal(fake->inits, 1);
    assert_int_equal(fake->shutdowns, 1);
    bytes = 7;
    assert_false(ic_nvml_free_memory(FAKE_NVML, "0000:02:00.0", &bytes));
    fake->gpu[1].mem_rc = 3; /* not supported */
    assert_false(ic_nvml_free_memory(FAKE_NVML, "0000:01:00.0", &bytes));
    assert_false(ic_nvml_free_memory("/nonexistent/libnvidia-ml.so.1", "0000:01:00.0", &bytes));
    fake->init_rc = 9;
    assert_false(ic_nvml_free_memory(FAKE_NVML, "0000:01:00.0", &bytes));
    assert_int_equal(bytes, 7);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, load_fake, unload_fake)
    const struct CMUnitTest tests[] = {
        T(everything),
        T(one_by_one),
        T(lost_and_found),
        T(absence),
        T(free_memory_by_address),
        cmocka_unit_test(the_real_one),
    };
    ic_log_set_level(IC_LOG_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
