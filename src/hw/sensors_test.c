/* Sensors on made-up sysfs trees, and the file that stands for sensors. */
#include "hw/sensors.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static char root[64];

static void shell(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static void shell(const char *fmt, ...)
{
    char cmd[512];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(cmd, sizeof cmd, fmt, ap);
    va_end(ap);
    if (system(cmd) != 0)
        fail_msg("%s", cmd);
}

static int make_root(void **state)
{
    (void)state;
    strcpy(root, "/tmp/ic-sensors-XXXXXX");
    return mkdtemp(root) ? 0 : -1;
}

static int remove_root(void **state)
{
    (void)state;
    shell("rm -rf %s", root);
    return 0;
}

/* Writes `text` to root/path; folders are made. */
static void put(const char *path, const char *text)
{
    char full[160];

    snprintf(full, sizeof full, "%s/%s", root, path);
    for (char *p = full + strlen(root) + 1; (p = strchr(p, '/')); *p++ = '/') {
        *p = 0;
        mkdir(full, 0700);
    }
    FILE *f = fopen(full, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static double cpu(struct ic_sensor_source *s)
{
    struct ic_hw_sample sample;

    ic_hw_sample_clear(&sample);
    s->read(s->arg, IC_READ_ALL, &sample);
    assert_int_equal(sample.n_gpus, 0);
    return sample.cpu_temp;
}

static struct ic_sensor_source sysfs(void)
{
    struct ic_sensor_source s;
    assert_int_equal(ic_sensors_sysfs(&s, root, NULL), IC_OK);
    return s;
}

static void nothing_there(void **state)
{
    struct ic_sensor_source s = sysfs();

    (void)state;
    assert_true(isnan(cpu(&s)));
    put("class/hwmon/hwmon0/name", "nvme\n"); /* a disk's is not the CPU's */
    put("class/hwmon/hwmon0/temp1_input", "61000\n");
    put("class/thermal/thermal_zone0/type", "iwlwifi_1\n");
    put("class/thermal/thermal_zone0/temp", "44000\n");
    for (int i = 0; i < 40; i++)
        assert_true(isnan(cpu(&s)));
    s.close(s.arg);
}

static void intel(void **state)
{
    struct ic_sensor_source s = sysfs();

    (void)state;
    put("class/hwmon/hwmon3/name", "coretemp\n");
    put("class/hwmon/hwmon3/temp1_input", "55000\n");
    put("class/hwmon/hwmon3/temp1_label", "Package id 0\n");
    put("class/hwmon/hwmon3/temp2_input", "53000\n");
    put("class/hwmon/hwmon3/temp30_input", "58500\n"); /* cores are numbered with gaps */
    put("class/thermal/thermal_zone0/type", "x86_pkg_temp\n");
    put("class/thermal/thermal_zone0/temp", "99000\n"); /* hwmon comes first */
    assert_true(cpu(&s) == 58.5);
    /* nonsense is left out */
    put("class/hwmon/hwmon3/temp30_input", "255000\n");
    assert_true(cpu(&s) == 55);
    put("class/hwmon/hwmon3/temp1_input", "-128000\n");
    assert_true(cpu(&s) == 53);
    put("class/hwmon/hwmon3/temp2_input", "N/A\n");
    assert_true(isnan(cpu(&s)));
    put("class/hwmon/hwmon3/temp2_input", "");
    assert_true(isnan(cpu(&s)));
    put("class/hwmon/hwmon3/temp2_input", "52000\n");
    cpu(&s); /* found again at the latest with the second reading */
    assert_true(cpu(&s) == 52);
    s.close(s.arg);
}

static void amd(void **state)
{
    struct ic_sensor_source s = sysfs();

    (void)state;
    put("class/hwmon/hwmon0/name", "k10temp\n");
    put("class/hwmon/hwmon0/temp1_input", "87000\n"); /* Tdie + 27, for the fans */
    put("class/hwmon/hwmon0/temp1_label", "Tctl\n");
    put("class/hwmon/hwmon0/temp2_input", "60000\n");
    put("class/hwmon/hwmon0/temp2_label", "Tdie\n");
    assert_true(cpu(&s) == 60);
    s.close(s.arg);
    s = sysfs();
    shell("rm %s/class/hwmon/hwmon0/temp2_*", root); /* newer ones have but Tctl, and there it is true */
    assert_true(cpu(&s) == 87);
    s.close(s.arg);
}

static void zones(void **state)
{
    struct ic_sensor_source s = sysfs();

    (void)state;
    put("class/thermal/thermal_zone1/type", "cpu-thermal\n");
    put("class/thermal/thermal_zone1/temp", "48250\n");
    put("class/thermal/thermal_zone0/type", "gpu-thermal\n");
    put("class/thermal/thermal_zone0/temp", "70000\n");
    put("class/thermal/cooling_device0/type", "Processor\n");
    assert_true(cpu(&s) == 48.25);
    s.close(s.arg);
}

static void coming_and_going(void **state)
{
    struct ic_sensor_source s = sysfs();

    (void)state;
    put("class/hwmon/hwmon0/name", "coretemp\n");
    put("class/hwmon/hwmon0/temp1_input", "50000\n");
    assert_true(cpu(&s) == 50);
    shell("mv %s/class/hwmon/hwmon0 %s/class/hwmon/hwmon7", root, root); /* the module was loaded again */
    assert_true(isnan(cpu(&s)));
    assert_true(cpu(&s) == 50);
    shell("rm -r %s/class", root);
    for (int i = 0; i < 5; i++)
        assert_true(isnan(cpu(&s)));
    put("class/hwmon/hwmon0/name", "zenpower\n");
    put("class/hwmon/hwmon0/temp1_input", "51000\n");
    int n = 0;
    while (isnan(cpu(&s)))
        assert_in_range(++n, 0, 40);
    assert_true(cpu(&s) == 51);
    s.close(s.arg);
    /* only what was asked for */
    struct ic_hw_sample sample;
    s = sysfs();
    ic_hw_sample_clear(&sample);
    s.read(s.arg, IC_READ_GPU, &sample);
    assert_true(isnan(sample.cpu_temp));
    s.close(s.arg);
}

static void the_file(void **state)
{
    struct ic_sensor_source s;
    struct ic_hw_sample h;
    char path[96];

    (void)state;
    snprintf(path, sizeof path, "%s/sensors", root);
    assert_int_equal(ic_sensors_file(&s, path, NULL), IC_OK);
    ic_hw_sample_clear(&h);
    s.read(s.arg, IC_READ_ALL, &h);
    assert_true(h.n_gpus == 1 && h.gpu[0].gone && isnan(h.gpu[0].temp) && isnan(h.cpu_temp));
    put("sensors", "# comment\ntemp=81.5\n  cpu = "
                   "60\npower=99\nvram_total_mb=3072\nvram_used_mb=1000\nnonsense\nfan=x\n");
    s.read(s.arg, IC_READ_ALL, &h);
    assert_true(!h.gpu[0].gone && h.gpu[0].temp == 81.5 && h.cpu_temp == 60 && h.gpu[0].power_w == 99);
    assert_true(isnan(h.gpu[0].fan_percent) && h.gpu[0].throttle == -1);
    assert_int_equal(h.gpu[0].memory_total, 3072LL << 20);
    assert_int_equal(h.gpu[0].memory_free, 2072LL << 20);
    put("sensors", "temp=1e9\ncpu=nan\n");
    s.read(s.arg, IC_READ_ALL, &h);
    assert_true(isnan(h.gpu[0].temp) && isnan(h.cpu_temp) && isnan(h.gpu[0].power_w));
    put("sensors", "temp=70\ncpu=70\n");
    s.read(s.arg, IC_READ_CPU, &h);
    assert_true(isnan(h.gpu[0].temp) && h.cpu_temp == 70);
    s.close(s.arg);
}

static void checked(void **state)
{
    (void)state;
    assert_true(ic_temp_checked(-40) == -40 && ic_temp_checked(150) == 150 && ic_temp_checked(0) == 0);
    assert_true(isnan(ic_temp_checked(-40.1)) && isnan(ic_temp_checked(150.1)) &&
                isnan(ic_temp_checked(NAN)) && isnan(ic_temp_checked(INFINITY)));
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, make_root, remove_root)
    const struct CMUnitTest tests[] = {
        T(nothing_there),          T(intel), T(amd), T(zones), T(coming_and_going), T(the_file),
        cmocka_unit_test(checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
