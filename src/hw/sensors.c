/* Sensors of the CPU in sysfs, and the file that stands for all sensors in tests.
 *
 * sysfs files vanish (a module is unloaded, a laptop sleeps), change their numbers, and say nonsense: every
 * failure makes a reading unknown and nothing else. The list of files is made once and again when one of
 * them could not be read, at most every RESCAN_READS readings while there is none. */
#include "hw/sensors.h"

#include <dirent.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#define INPUTS_MAX 256       /* CPU sensors that are read: a big server has one per core */
#define INPUT_PATH_MAX 320   /* bytes of a path */
#define RESCAN_READS 30      /* readings between two searches that found nothing */
#define WORD_MAX 64          /* bytes of a sysfs word: a chip's name, a label */
#define LINE_BYTES_MAX 256   /* of the test's file */
#define INPUT_NUMBER_MAX 512 /* temp<n>_input: the highest n looked at */

void ic_gpu_sample_clear(struct ic_gpu_sample *g)
{
    struct ic_gpu_sample none = {
        .temp = NAN,
        .slowdown_temp = NAN,
        .power_w = NAN,
        .power_limit_w = NAN,
        .fan_percent = NAN,
        .graphics_mhz = NAN,
        .memory_mhz = NAN,
        .gpu_percent = NAN,
        .memory_percent = NAN,
        .memory_total = -1,
        .memory_used = -1,
        .memory_free = -1,
        .throttle = -1,
    };
    memcpy(none.name, g->name, sizeof none.name);
    memcpy(none.uuid, g->uuid, sizeof none.uuid);
    *g = none;
}

void ic_hw_sample_clear(struct ic_hw_sample *s)
{
    memset(s, 0, sizeof *s);
    for (unsigned i = 0; i < IC_GPUS_MAX; i++)
        ic_gpu_sample_clear(&s->gpu[i]);
    s->cpu_temp = NAN;
}

double ic_temp_checked(double celsius)
{
    return celsius >= IC_TEMP_LOWEST && celsius <= IC_TEMP_HIGHEST ? celsius : NAN; /* NAN compares false */
}

/* ---- sysfs -------------------------------------------------------------------------------------- */

struct sysfs {
    char root[INPUT_PATH_MAX / 2];
    char (*inputs)[INPUT_PATH_MAX];
    unsigned n_inputs;
    unsigned until_rescan; /* readings */
};

/* The first word of a file, "" when there is none. */
static void read_word(const char *path, char word[WORD_MAX])
{
    FILE *f = fopen(path, "re");

    word[0] = 0;
    if (!f)
        return;
    if (!fgets(word, WORD_MAX, f))
        word[0] = 0;
    fclose(f);
    word[strcspn(word, "\n")] = 0;
}

/* NAN for what is no number or no sane temperature. False: the file is not there any more. */
static bool read_millidegrees(const char *path, double *celsius)
{
    FILE *f = fopen(path, "re");
    double v;

    *celsius = NAN;
    if (!f)
        return false;
    if (fscanf(f, "%lf", &v) == 1)
        *celsius = ic_temp_checked(v / 1000);
    fclose(f);
    return true;
}

static bool any_of(const char *word, const char *const *list)
{
    for (; *list; list++)
        if (!strcasecmp(word, *list))
            return true;
    return false;
}

/* A path, printf style; false when it is too long to be one of ours. */
__attribute__((format(printf, 2, 3))) static bool make_path(char path[INPUT_PATH_MAX], const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    int n = vsnprintf(path, INPUT_PATH_MAX, fmt, ap);
    va_end(ap);
    return n > 0 && n < INPUT_PATH_MAX;
}

static void add_input(struct sysfs *s, const char *path)
{
    if (s->n_inputs < INPUTS_MAX)
        snprintf(s->inputs[s->n_inputs++], INPUT_PATH_MAX, "%s", path);
}

/* The inputs of one hwmon chip. AMD's k10temp has Tctl, which on some models is the temperature plus 20 or
 * 27 degrees to make fans run faster, and Tdie, the truth: with a Tdie there, Tctl is left out. */
static void add_chip(struct sysfs *s, const char *dir)
{
    unsigned first = s->n_inputs, tctl = INPUTS_MAX;
    bool tdie = false;

    for (int i = 1; i <= INPUT_NUMBER_MAX; i++) {
        char path[INPUT_PATH_MAX], label[WORD_MAX];
        if (!make_path(path, "%s/temp%d_input", dir, i) || access(path, R_OK) != 0) {
            if (i > 16 &&
                s->n_inputs == first) /* coretemp's numbers have gaps, but none so wide at the start */
                break;
            continue;
        }
        add_input(s, path);
        label[0] = 0;
        if (make_path(path, "%s/temp%d_label", dir, i))
            read_word(path, label);
        if (!strcasecmp(label, "Tctl"))
            tctl = s->n_inputs - 1;
        tdie |= !strcasecmp(label, "Tdie");
    }
    if (tdie && tctl < s->n_inputs)
        memmove(s->inputs[tctl], s->inputs[tctl + 1], (--s->n_inputs - tctl) * sizeof *s->inputs);
}

/* Walks over root/class/<kind>; `chip` of hwmon adds a chip's inputs, a thermal zone has one. */
static void scan_class(struct sysfs *s, const char *kind, const char *word, const char *const *wanted,
                       bool chip)
{
    char dir[INPUT_PATH_MAX], path[INPUT_PATH_MAX], name[WORD_MAX];
    const struct dirent *e;

    DIR *d = make_path(dir, "%s/class/%s", s->root, kind) ? opendir(dir) : NULL;
    if (!d)
        return;
    while ((e = readdir(d))) {
        char sub[INPUT_PATH_MAX];
        if (e->d_name[0] == '.' || !make_path(sub, "%s/%s", dir, e->d_name) ||
            !make_path(path, "%s/%s", sub, word))
            continue;
        read_word(path, name);
        if (!any_of(name, wanted))
            continue;
        if (chip)
            add_chip(s, sub);
        else if (make_path(path, "%s/temp", sub))
            add_input(s, path);
    }
    closedir(d);
}

static void scan(struct sysfs *s)
{
    static const char *const chips[] = {"coretemp",    "k10temp",     "k8temp",      "zenpower", "zenergy",
                                        "cpu_thermal", "cpu-thermal", "via_cputemp", "cputemp",  NULL};
    static const char *const zones[] = {"x86_pkg_temp",     "cpu-thermal", "cpu_thermal", "cpu0-thermal",
                                        "cpu-0-thermal",    "soc-thermal", "soc_thermal", "CPU-therm",
                                        "cluster0-thermal", NULL};

    s->n_inputs = 0;
    scan_class(s, "hwmon", "name", chips, true);
    if (s->n_inputs == 0)
        scan_class(s, "thermal", "type", zones, false);
}

static void sysfs_read(void *arg, int what, struct ic_hw_sample *out)
{
    struct sysfs *s = arg;
    bool vanished = false;

    if (!(what & IC_READ_CPU))
        return;
    if (s->n_inputs == 0) {
        if (s->until_rescan == 0) {
            scan(s);
            s->until_rescan = RESCAN_READS;
        }
        s->until_rescan--;
    }
    out->cpu_temp = NAN;
    for (unsigned i = 0; i < s->n_inputs; i++) {
        double t;
        vanished |= !read_millidegrees(s->inputs[i], &t);
        if (!isnan(t) && !(out->cpu_temp >= t))
            out->cpu_temp = t;
    }
    if (vanished) {
        s->n_inputs = 0;
        s->until_rescan = 0;
    }
}

static void sysfs_close(void *arg)
{
    struct sysfs *s = arg;

    if (s)
        free(s->inputs);
    free(s);
}

enum ic_status ic_sensors_sysfs(struct ic_sensor_source *out, const char *root, struct ic_err *err)
{
    struct sysfs *s = calloc(1, sizeof *s);

    if (s)
        s->inputs = calloc(INPUTS_MAX, sizeof *s->inputs);
    if (!s || !s->inputs) {
        sysfs_close(s);
        return ic_fail(err, IC_OOM, "out of memory");
    }
    if (snprintf(s->root, sizeof s->root, "%s", root) >= (int)sizeof s->root) {
        sysfs_close(s);
        return ic_fail(err, IC_BAD_REQUEST, "the path %.60s… is too long", root);
    }
    *out = (struct ic_sensor_source){
        .arg = s, .name = "sysfs", .what = IC_READ_CPU, .read = sysfs_read, .close = sysfs_close};
    return IC_OK;
}

/* ---- the file of the tests ---------------------------------------------------------------------- */

static void take_line(const char *name, double v, int what, struct ic_hw_sample *s)
{
    struct ic_gpu_sample *g = &s->gpu[0];

    if (!strcmp(name, "cpu") && (what & IC_READ_CPU))
        s->cpu_temp = ic_temp_checked(v);
    if (!(what & IC_READ_GPU))
        return;
    if (!strcmp(name, "temp"))
        g->temp = ic_temp_checked(v);
    else if (!strcmp(name, "slowdown"))
        g->slowdown_temp = ic_temp_checked(v);
    else if (!strcmp(name, "power"))
        g->power_w = v;
    else if (!strcmp(name, "fan"))
        g->fan_percent = v;
    else if (!strcmp(name, "vram_total_mb") && v >= 0 && v < 1e9)
        g->memory_total = (int64_t)v << 20;
    else if (!strcmp(name, "vram_used_mb") && v >= 0 && v < 1e9)
        g->memory_used = (int64_t)v << 20;
    else if (!strcmp(name, "throttle") && v >= 0 && v < 1e9)
        g->throttle = (int64_t)v;
}

static void file_read(void *arg, int what, struct ic_hw_sample *s)
{
    char line[LINE_BYTES_MAX];
    FILE *f = fopen(arg, "re");

    if (what & IC_READ_GPU) {
        s->n_gpus = 1;
        snprintf(s->gpu[0].name, sizeof s->gpu[0].name, "sensor file");
        ic_gpu_sample_clear(&s->gpu[0]);
        s->gpu[0].gone = !f;
    }
    if (what & IC_READ_CPU)
        s->cpu_temp = NAN;
    if (!f)
        return;
    while (fgets(line, sizeof line, f)) {
        char name[LINE_BYTES_MAX];
        double v;
        if (sscanf(line, " %255[a-z_] = %lf", name, &v) == 2 && isfinite(v))
            take_line(name, v, what, s);
    }
    fclose(f);
    if (s->gpu[0].memory_total >= 0 && s->gpu[0].memory_used >= 0 && (what & IC_READ_GPU))
        s->gpu[0].memory_free = s->gpu[0].memory_total - s->gpu[0].memory_used;
}

static void file_close(void *arg)
{
    free(arg);
}

enum ic_status ic_sensors_file(struct ic_sensor_source *out, const char *path, struct ic_err *err)
{
    char *copy = strdup(path);

    if (!copy)
        return ic_fail(err, IC_OOM, "out of memory");
    *out = (struct ic_sensor_source){
        .arg = copy, .name = "file", .what = IC_READ_ALL, .read = file_read, .close = file_close};
    return IC_OK;
}
