#include "law/law_cli.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "law/law.h"
#include "law/plan.h"
#include "model/safetensors.h"
#include "model/tensors.h"

static const char usage[] =
    "usage: inference-core law inspect FILE [--config F] [--arch A]\n"
    "       inference-core law step --checkpoint F [--config F] [--arch A] --state IN.safetensors\n"
    "                --steps N --out OUT.safetensors [--precision fp32] [--gamma G]\n"
    "                [--backend ref|cpu] [--threads N]\n";

static int usage_error(const char *what, const char *value)
{
    fprintf(stderr, "inference-core law: %s%s\n%s", what, value ? value : "", usage);
    return IC_EXIT_USAGE;
}

static int exit_code(enum ic_status s)
{
    switch (s) {
    case IC_OK: return IC_EXIT_OK;
    case IC_BAD_REQUEST:
    case IC_TOO_LARGE:
    case IC_NOT_FOUND: return IC_EXIT_FILE;
    default: return IC_EXIT_FAILED;
    }
}

static int report(const char *file, enum ic_status s, const struct ic_err *err)
{
    if (s != IC_OK)
        fprintf(stderr, "inference-core law: %s%s%s\n", file ? file : "", file ? ": " : "", err->msg);
    return exit_code(s);
}

/* ---- Options --------------------------------------------------------------------------------- */

struct options {
    const char *file, *checkpoint, *config, *arch, *state, *steps, *out, *precision, *gamma, *backend,
        *threads;
};

/* Fills what `allowed` (a blank-separated list of option names) admits; each at most once. */
static int parse(int argc, char **argv, const char *allowed, bool takes_file, struct options *o)
{
    const struct {
        const char *name;
        const char **slot;
    } all[] = {{"--checkpoint", &o->checkpoint}, {"--config", &o->config}, {"--arch", &o->arch},
               {"--state", &o->state},           {"--steps", &o->steps},   {"--out", &o->out},
               {"--precision", &o->precision},   {"--gamma", &o->gamma},   {"--backend", &o->backend},
               {"--threads", &o->threads}};
    for (int i = 1; i < argc; i++) {
        const char **slot = NULL;
        char padded[64];
        snprintf(padded, sizeof padded, " %.50s ", argv[i]);
        for (size_t k = 0; k < sizeof all / sizeof all[0] && strncmp(argv[i], "--", 2) == 0; k++)
            if (strcmp(all[k].name, argv[i]) == 0 && strstr(allowed, padded))
                slot = all[k].slot;
        if (slot) {
            if (++i >= argc)
                return usage_error("no value after ", argv[i - 1]);
        } else if (argv[i][0] == '-' && argv[i][1])
            return usage_error("unknown option ", argv[i]);
        else if (takes_file)
            slot = &o->file;
        if (!slot || *slot)
            return usage_error(slot ? "given twice: " : "what is ", argv[i]);
        *slot = argv[i];
    }
    return IC_EXIT_OK;
}

static bool whole_number(const char *text, unsigned long max, unsigned long *out)
{
    char *end;
    errno = 0;
    *out = strtoul(text, &end, 10);
    return text[0] >= '0' && text[0] <= '9' && !*end && !errno && *out <= max;
}

/* ---- inspect --------------------------------------------------------------------------------- */

static void print_weights(const struct ic_law *law)
{
    printf("tensors (name, shape, mean, deviation, largest):\n");
    for (size_t i = 0; i < law->weight_count; i++) {
        const struct ic_law_weight *w = &law->weights[i];
        double sum = 0, sq = 0, top = 0;
        for (size_t k = 0; k < w->count; k++) {
            sum += (double)w->data[k];
            top = fmax(top, fabs((double)w->data[k]));
        }
        double mean = sum / (double)w->count;
        for (size_t k = 0; k < w->count; k++)
            sq += ((double)w->data[k] - mean) * ((double)w->data[k] - mean);
        int64_t shape[4] = {w->dim[0], w->dim[1], w->dim[2], w->dim[3]};
        char text[96];
        printf("  %-30s %-18s %10.3g %10.3g %10.3g\n", w->name,
               ic_tensor_shape_str(shape, w->ndim, text, sizeof text), mean, sqrt(sq / (double)w->count),
               top);
    }
}

static void print_law(const struct ic_law *law)
{
    const struct ic_law_arch_info *info = ic_law_arch_info(law->arch);
    printf("law           %s\n", law->name);
    printf("file          %s%s\n", law->path, law->has_config ? " (with config.json)" : "");
    printf("architecture  %s: %s\n", info->name, info->what);
    printf("d_state       %u\nhidden        %u\n", law->d, law->b);
    printf("parameters    %" PRIu64 " (%.2f MB float32)\n", law->params, (double)law->params * 4e-6);
    printf("gamma         %g\ninitial mode  %s\n", (double)law->gamma, law->initial_mode);
    if (law->grid_training)
        printf("trained on    %ux%u cells, %u steps\n", law->grid_training, law->grid_training,
               law->steps_training);
    if (law->episode >= 0)
        printf("episode       %" PRId64 "\n", law->episode);
    printf("grid          sides that are multiples of %u\n", info->grid_multiple);
    print_weights(law);
}

/* The plan's sums for one simulation alone, in plain float32 layout. */
static enum ic_status print_memory(const struct ic_law *law, struct ic_err *err)
{
    static const unsigned grids[] = {64, 128, 256};
    printf("memory per simulation (weights %.3f MiB are shared):\n", (double)law->weight_bytes / 1048576);
    printf("  %-9s %12s %14s %14s %12s\n", "grid", "state MiB", "working MiB", "no reuse MiB",
           "GFLOP/step");
    for (size_t i = 0; i < sizeof grids / sizeof grids[0]; i++) {
        struct ic_law_plan *plan;
        enum ic_status s =
            ic_law_plan_open(law, grids[i], grids[i], 1, ic_law_tensor_bytes_nchw, &plan, err);
        if (s != IC_OK)
            return s;
        char name[32];
        snprintf(name, sizeof name, "%ux%u", grids[i], grids[i]);
        printf("  %-9s %12.3f %14.3f %14.3f %12.3f\n", name,
               (double)(plan->psi_bytes + plan->memory_bytes) / 1048576,
               (double)plan->arena_bytes / 1048576, (double)plan->tensors_bytes / 1048576,
               (double)plan->macs * 2e-9);
        ic_law_plan_close(&plan);
    }
    printf("  (state: what each simulation owns; working: its share of the batch in which it steps)\n");
    return IC_OK;
}

static int inspect(int argc, char **argv)
{
    struct options o = {0};
    int rc = parse(argc, argv, " --config --arch ", true, &o);
    if (rc != IC_EXIT_OK)
        return rc;
    if (!o.file)
        return usage_error("inspect: which file?", NULL);
    struct ic_err err = {0};
    struct ic_law *law;
    enum ic_status s =
        ic_law_open(o.file, &(struct ic_law_open_opts){.config = o.config, .arch = o.arch}, &law, &err);
    if (s == IC_OK) {
        print_law(law);
        s = print_memory(law, &err);
    }
    ic_law_close(&law);
    return report(o.file, s, &err);
}

/* ---- step ------------------------------------------------------------------------------------ */

struct field {
    unsigned height, width;
    float *psi, *h, *c;
};

static void field_deinit(struct field *f)
{
    free(f->psi);
    free(f->h);
    free(f->c);
}

/* [1,]H,W,d,2 of reals, or [1,]H,W,d of complex numbers. */
static enum ic_status field_shape(const struct ic_tensor *t, const struct ic_law *law, struct field *f,
                                  struct ic_err *err)
{
    int64_t s[IC_TENSOR_DIMS_MAX + 1];
    unsigned n = 0;
    char text[160];
    for (unsigned i = 0; i < t->ndim; i++)
        s[n++] = t->shape[i];
    if (ic_dtype_info(t->dtype)->parts == 2)
        s[n++] = 2;
    const int64_t *p = s;
    if (n == 5 && s[0] == 1)
        p++, n--;
    if (n != 4 || p[2] != law->d || p[3] != 2 || p[0] < 1 || p[1] < 1 || p[0] > IC_LAW_GRID_MAX ||
        p[1] > IC_LAW_GRID_MAX)
        return ic_fail(err, IC_BAD_REQUEST,
                       "tensor %s has shape %s; expected [H, W, %u, 2], sides up to %d", t->name,
                       ic_tensor_shape_str(t->shape, t->ndim, text, sizeof text), law->d, IC_LAW_GRID_MAX);
    f->height = (unsigned)p[0];
    f->width = (unsigned)p[1];
    return IC_OK;
}

/* h_state or c_state: [4b, H/4, W/4] after leading ones; zeros where absent. */
static enum ic_status read_memory(const struct ic_tensors *set, const char *name, const struct ic_law *law,
                                  const struct field *f, float **out, struct ic_err *err)
{
    const int64_t want[3] = {4 * (int64_t)law->b, f->height / 4, f->width / 4};
    size_t n = (size_t)(want[0] * want[1] * want[2]);
    char found[160], expected[160];
    *out = calloc(n ? n : 1, sizeof(float));
    if (!*out)
        return ic_fail(err, IC_OOM, "no memory for %s", name);
    const struct ic_tensor *t = ic_tensors_find(set, name);
    if (!t)
        return IC_OK;
    bool fits = t->ndim >= 3 && ic_dtype_info(t->dtype)->parts == 1;
    for (unsigned i = 0; fits && i < t->ndim; i++)
        fits = t->shape[i] == (i + 3 < t->ndim ? 1 : want[i + 3 - t->ndim]);
    if (!fits)
        return ic_fail(err, IC_BAD_REQUEST, "tensor %s has shape %s; expected %s", name,
                       ic_tensor_shape_str(t->shape, t->ndim, found, sizeof found),
                       ic_tensor_shape_str(want, 3, expected, sizeof expected));
    return ic_tensors_read_f32(set, t, *out, n, err);
}

static enum ic_status read_field(const char *path, const struct ic_law *law, struct field *f,
                                 struct ic_err *err)
{
    struct ic_tensors *set;
    enum ic_status s = ic_tensors_open(path, &set, err);
    if (s != IC_OK)
        return s;
    const struct ic_tensor *t = ic_tensors_find(set, "psi");
    if (!t)
        t = ic_tensors_find(set, "psi_0");
    if (!t)
        s = ic_fail(err, IC_BAD_REQUEST, "no tensor psi or psi_0");
    if (s == IC_OK)
        s = field_shape(t, law, f, err);
    size_t n = (size_t)f->height * f->width * law->d * 2;
    if (s == IC_OK && !(f->psi = malloc(n * sizeof(float))))
        s = ic_fail(err, IC_OOM, "no memory for psi");
    if (s == IC_OK)
        s = ic_tensors_read_f32(set, t, f->psi, n, err);
    if (s == IC_OK && law->memory)
        s = read_memory(set, "h_state", law, f, &f->h, err);
    if (s == IC_OK && law->memory)
        s = read_memory(set, "c_state", law, f, &f->c, err);
    ic_tensors_close(&set);
    return s;
}

static enum ic_status write_field(const char *path, const struct ic_law *law, const struct field *f,
                                  const char *steps, struct ic_err *err)
{
    int64_t h = f->height, w = f->width, mem = 4 * (int64_t)law->b;
    const struct ic_safetensors_out out[3] = {
        {"psi", IC_DTYPE_F32, 4, {h, w, law->d, 2}, f->psi},
        {"h_state", IC_DTYPE_F32, 3, {mem, h / 4, w / 4}, f->h},
        {"c_state", IC_DTYPE_F32, 3, {mem, h / 4, w / 4}, f->c},
    };
    const char *meta[3][2] = {
        {"law", law->name}, {"architecture", ic_law_arch_info(law->arch)->name}, {"steps", steps}};
    return ic_safetensors_write(path, out, law->memory ? 3 : 1, meta, 3, err);
}

static enum ic_status run(const struct ic_law_backend *be, const struct ic_law *law, struct field *f,
                          float gamma, unsigned long steps, unsigned threads, struct ic_err *err)
{
    struct ic_law_plan *plan;
    struct ic_law_packed *packed = NULL;
    struct ic_law_exec *exec = NULL;
    enum ic_status s = ic_law_plan_open(law, f->height, f->width, 1, be->tensor_bytes, &plan, err);
    if (s == IC_OK)
        s = be->pack(law, threads, &packed, err);
    if (s == IC_OK)
        s = be->open(packed, plan, &exec, err);
    const struct ic_law_io io = {.psi = f->psi, .h = f->h, .c = f->c, .gamma = gamma};
    int64_t start = ic_now_ns();
    for (unsigned long i = 0; s == IC_OK && i < steps; i++)
        be->step(exec, &io, 1);
    double seconds = (double)(ic_now_ns() - start) * 1e-9;
    if (s == IC_OK && steps)
        printf("%lu steps of %ux%u cells in %.3f s: %.1f steps/s, %.2f GFLOP/s (%s)\n", steps, f->height,
               f->width, seconds, (double)steps / seconds,
               (double)plan->macs * 2e-9 * (double)steps / seconds, be->name);
    if (exec)
        be->close(&exec);
    if (packed)
        be->unpack(&packed);
    ic_law_plan_close(&plan);
    return s;
}

/* Text of the options to numbers; IC_EXIT_OK or a usage error already printed. */
static int step_numbers(const struct options *o, unsigned long *steps, unsigned long *threads, float *gamma,
                        const struct ic_law_backend **be)
{
    if (!o->checkpoint || !o->state || !o->steps || !o->out)
        return usage_error("step needs --checkpoint, --state, --steps and --out", NULL);
    if (!whole_number(o->steps, IC_LAW_STEPS_MAX, steps))
        return usage_error("--steps is not a whole number up to 1000000000: ", o->steps);
    *threads = 0;
    if (o->threads && !whole_number(o->threads, 1024, threads))
        return usage_error("--threads is not a whole number up to 1024: ", o->threads);
    if (o->precision && strcmp(o->precision, "fp32") != 0)
        return usage_error("--precision is fp32, not ", o->precision);
    char *end = NULL;
    *gamma = o->gamma ? strtof(o->gamma, &end) : (float)NAN;
    if (o->gamma && (end == o->gamma || *end || !isfinite(*gamma)))
        return usage_error("--gamma is not a number: ", o->gamma);
    *be = ic_law_backend_find(o->backend ? o->backend : "cpu");
    if (!*be && !o->backend)
        *be = &ic_law_backend_ref;
    return *be ? IC_EXIT_OK : usage_error("no such back end: ", o->backend);
}

static int step(int argc, char **argv)
{
    struct options o = {0};
    unsigned long steps, threads;
    float gamma;
    const struct ic_law_backend *be;
    int rc = parse(
        argc, argv,
        " --checkpoint --config --arch --state --steps --out --precision --gamma --backend --threads ",
        false, &o);
    if (rc == IC_EXIT_OK)
        rc = step_numbers(&o, &steps, &threads, &gamma, &be);
    if (rc != IC_EXIT_OK)
        return rc;
    struct ic_err err = {0};
    struct ic_law *law;
    struct field f = {0};
    const char *file = o.checkpoint;
    enum ic_status s =
        ic_law_open(file, &(struct ic_law_open_opts){.config = o.config, .arch = o.arch}, &law, &err);
    if (s == IC_OK)
        s = read_field(file = o.state, law, &f, &err);
    if (s == IC_OK)
        s = run(be, law, &f, isnan(gamma) ? law->gamma : gamma, steps, (unsigned)threads, &err);
    if (s == IC_OK)
        s = write_field(file = o.out, law, &f, o.steps, &err);
    field_deinit(&f);
    ic_law_close(&law);
    return report(file, s, &err);
}

int ic_law_main(int argc, char **argv)
{
    if (argc >= 2 && strcmp(argv[1], "inspect") == 0)
        return inspect(argc - 1, argv + 1);
    if (argc >= 2 && strcmp(argv[1], "step") == 0)
        return step(argc - 1, argv + 1);
    if (argc == 2 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
        fputs(usage, stdout);
        return IC_EXIT_OK;
    }
    return usage_error(argc < 2 ? "inspect or step?" : "no such command: ", argc < 2 ? NULL : argv[1]);
}
