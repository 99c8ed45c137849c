#include "law/law_cli.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/clock.h"
#include "base/log.h"
#include "law/fidelity.h"
#include "law/law.h"
#include "law/plan.h"
#include "law/plugin.h"
#include "law/quant.h"
#include "model/safetensors.h"
#include "model/tensors.h"

static const char usage[] =
    "usage: inference-core law inspect FILE [--config F] [--arch A]\n"
    "       inference-core law step --checkpoint F [--config F] [--arch A] --state IN.safetensors\n"
    "                --steps N --out OUT.safetensors [--precision P] [--law-policy RULES] [--gamma G]\n"
    "                [--backend B] [--threads N]\n"
    "       inference-core law quantize IN OUT.safetensors [--precision P] [--law-policy RULES]\n"
    "                [--config F] [--arch A]\n"
    "       inference-core law plan FILE [--grid N] [--batch N|auto] [--memory MIB] [--vram MIB]\n"
    "                [--precision P] [--law-policy RULES] [--backend B] [--threads N] [--config F]\n"
    "                [--arch A]\n"
    "       inference-core law fidelity --law FILE [--grids N,N] [--seeds N] [--first-seed N]\n"
    "                [--steps N] [--spin-up N]\n"
    "                [--precisions P,P] [--law-policy RULES] [--threshold PERCENT] [--layers yes]\n"
    "                [--csv F] [--plot F.svg] [--backend B] [--threads N] [--config F] [--arch A]\n"
    "P is fp32, fp16, bf16, nf4 or nf4dq (nf4 with its scales quantised too). RULES are exceptions,\n"
    "LAYER=P,LAYER=P where LAYER is a layer, a block or all; nf4 and bf16 leave the first and last block\n"
    "and the output in fp32. fidelity also knows fp32~: fp32 from starts nudged by a millionth. It ends "
    "with\n"
    "1 where a precision fails, 0 where each passes or more seeds would have to tell.\n"
    "B is cpu (the default), ref, or on a GPU cuda (it computes in fp16, fp32 laws in fp32) or\n"
    "cuda-fp16, cuda-bf16, cuda-fp32 whatever P is, from the plug-in\n"
    "libic-law-cuda.so beside this program or installed, or else from --law-plugin FILE.\n";

#define SEED_MAX 1000000000ul /* of --first-seed */

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
    const bool prefix =
        file && strncmp(err->msg, file, strlen(file)) != 0; /* else the message begins with it */
    if (s != IC_OK)
        fprintf(stderr, "inference-core law: %s%s%s\n", prefix ? file : "", prefix ? ": " : "", err->msg);
    return exit_code(s);
}

/* ---- Options --------------------------------------------------------------------------------- */

struct options {
    const char *file, *second, *checkpoint, *config, *arch, *state, *steps, *out, *precision, *policy,
        *gamma, *backend, *threads, *grid, *batch, *memory, *law, *grids, *seeds, *first_seed, *precisions,
        *threshold, *layers, *csv, *plot, *plugin, *vram, *spin_up;
};

/* Fills what `allowed` (a blank-separated list of option names) admits, each at most once, and up to
 * `files` (0 to 2) names of files. */
static int parse(int argc, char **argv, const char *allowed, int files, struct options *o)
{
    const struct {
        const char *name;
        const char **slot;
    } all[] = {{"--checkpoint", &o->checkpoint},
               {"--config", &o->config},
               {"--arch", &o->arch},
               {"--state", &o->state},
               {"--steps", &o->steps},
               {"--out", &o->out},
               {"--precision", &o->precision},
               {"--gamma", &o->gamma},
               {"--backend", &o->backend},
               {"--threads", &o->threads},
               {"--law-policy", &o->policy},
               {"--grid", &o->grid},
               {"--batch", &o->batch},
               {"--memory", &o->memory},
               {"--law", &o->law},
               {"--grids", &o->grids},
               {"--seeds", &o->seeds},
               {"--first-seed", &o->first_seed},
               {"--precisions", &o->precisions},
               {"--csv", &o->csv},
               {"--plot", &o->plot},
               {"--threshold", &o->threshold},
               {"--layers", &o->layers},
               {"--law-plugin", &o->plugin},
               {"--vram", &o->vram},
               {"--spin-up", &o->spin_up}};
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
        else if (files > 0)
            slot = files > 1 && o->file ? &o->second : &o->file;
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

/* Opens the law at `path` as the options say. `precision` NULL and no policy: as the file has it. */
static enum ic_status open_law(const struct options *o, const char *path, const char *precision,
                               struct ic_law **law, struct ic_err *err)
{
    struct ic_law_policy policy;
    struct ic_law_open_opts opts = {.config = o->config, .arch = o->arch};
    enum ic_status s = IC_OK;
    *law = NULL;
    if (precision || o->policy) {
        s = ic_law_policy_parse(precision ? precision : "fp32", o->policy, &policy, err);
        opts.policy = &policy;
    }
    return s == IC_OK ? ic_law_open(path, &opts, law, err) : s;
}

/* A policy that makes no sense is a usage error; whether the law has its layers is told when it is opened.
 */
static int check_policy(const struct options *o)
{
    struct ic_law_policy policy;
    struct ic_err err = {0};
    if (ic_law_policy_parse(o->precision ? o->precision : "fp32", o->policy, &policy, &err) != IC_OK)
        return usage_error(err.msg, NULL);
    return IC_EXIT_OK;
}

/* A plug-in that was named is loaded whatever the back end, so that a wrong name does not go unnoticed. */
static int choose_backend(const struct options *o, const struct ic_law_backend **be)
{
    const char *name = o->backend ? o->backend : "cpu";
    struct ic_err err = {0};
    enum ic_status s = IC_OK;

    ic_law_plugin_path(o->plugin);
    if (o->plugin)
        s = ic_law_plugin_load(&err) ? IC_OK : err.code;
    if (s == IC_OK && (s = ic_law_backend_open(name, be, &err)) != IC_OK && strncmp(name, "cuda", 4) != 0) {
        if (o->backend)
            return usage_error("no such back end: ", o->backend);
        s = ic_law_backend_open("ref", be, &err);
    }
    return report(NULL, s, &err);
}

/* ---- inspect --------------------------------------------------------------------------------- */

static double value_of(const struct ic_law_weight *w, size_t i)
{
    float x;
    ic_law_weight_read(w, i, 1, &x);
    return (double)x;
}

static void print_weights(const struct ic_law *law)
{
    printf("tensors (name, shape, kept in, mean, deviation, largest):\n");
    for (size_t i = 0; i < law->weight_count; i++) {
        const struct ic_law_weight *w = &law->weights[i];
        double sum = 0, sq = 0, top = 0;
        for (size_t k = 0; k < w->count; k++) {
            const double x = value_of(w, k);
            sum += x;
            top = fmax(top, fabs(x));
        }
        double mean = sum / (double)w->count;
        for (size_t k = 0; k < w->count; k++)
            sq += (value_of(w, k) - mean) * (value_of(w, k) - mean);
        int64_t shape[4] = {w->dim[0], w->dim[1], w->dim[2], w->dim[3]};
        char text[96];
        printf("  %-30s %-18s %-4s %10.3g %10.3g %10.3g\n", w->name,
               ic_tensor_shape_str(shape, w->ndim, text, sizeof text), ic_law_precision_name(w->precision),
               mean, sqrt(sq / (double)w->count), top);
    }
}

static void print_law(const struct ic_law *law)
{
    const struct ic_law_arch_info *info = ic_law_arch_info(law->arch);
    printf("law           %s\n", law->name);
    printf("file          %s%s\n", law->path, law->has_config ? " (with config.json)" : "");
    printf("architecture  %s: %s\n", info->name, info->what);
    printf("d_state       %u\nhidden        %u\n", law->d, law->b);
    printf("parameters    %" PRIu64 " (%.2f MB as kept, %.2f MB in float32)\n", law->params,
           (double)law->param_bytes * 1e-6, (double)law->params * 4e-6);
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
    int rc = parse(argc, argv, " --config --arch ", 1, &o);
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
    if (s == IC_OK && steps) /* a device may be lost */
        s = ic_law_exec_run(be, exec, &io, 1, (unsigned)steps, err);
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
    if (check_policy(o) != IC_EXIT_OK)
        return IC_EXIT_USAGE;
    char *end = NULL;
    *gamma = o->gamma ? strtof(o->gamma, &end) : (float)NAN;
    if (o->gamma && (end == o->gamma || *end || !isfinite(*gamma)))
        return usage_error("--gamma is not a number: ", o->gamma);
    return choose_backend(o, be);
}

/* Renaming over the checkpoint would destroy it, and what was rounded away does not come back. */
static enum ic_status spare_input(const struct ic_law *law, const char *out, struct ic_err *err)
{
    struct stat a, b;
    if (stat(out, &a) == 0 && stat(law->path, &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino)
        return ic_fail(err, IC_BAD_REQUEST, "that is the checkpoint that was read: name another file");
    return IC_OK;
}

static int step(int argc, char **argv)
{
    struct options o = {0};
    unsigned long steps, threads;
    float gamma;
    const struct ic_law_backend *be;
    int rc = parse(
        argc, argv,
        " --checkpoint --config --arch --state --steps --out --precision --law-policy --gamma --backend "
        "--law-plugin --threads ",
        0, &o);
    if (rc == IC_EXIT_OK)
        rc = step_numbers(&o, &steps, &threads, &gamma, &be);
    if (rc != IC_EXIT_OK)
        return rc;
    struct ic_err err = {0};
    struct ic_law *law;
    struct field f = {0};
    const char *file = o.checkpoint;
    enum ic_status s = open_law(&o, file, o.precision, &law, &err);
    if (s == IC_OK)
        s = spare_input(law, file = o.out, &err);
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

/* ---- quantize -------------------------------------------------------------------------------- */

/* How each kind of weight came out, and what the rounding is of the weights' own size. */
static void print_quantised(const struct ic_law *original, const struct ic_law *law)
{
    printf("%-30s %-5s %10s %9s %10s\n", "tensor", "in", "values", "bits each", "error");
    for (size_t i = 0; i < law->weight_count; i++) {
        const struct ic_law_weight *w = &law->weights[i], *was = &original->weights[i];
        double err = 0, size = 0;
        if (w->ndim != 4 || strncmp(w->name, IC_LAW_FOLDED, strlen(IC_LAW_FOLDED)) == 0)
            continue;
        for (size_t k = 0; k < w->count; k++) {
            const double x = value_of(was, k), d = value_of(w, k) - x;
            err += d * d;
            size += x * x;
        }
        printf("%-30s %-5s %10zu %9.3f %9.3f%%\n", w->name, ic_law_precision_name(w->precision), w->count,
               8 * (double)ic_law_weight_bytes(w) / (double)w->count,
               size > 0 ? 100 * sqrt(err / size) : 0);
    }
    printf("%" PRIu64 " parameters: %" PRIu64 " bytes, %.3f bits each (float32: %" PRIu64 " bytes)\n",
           law->params, law->param_bytes, 8 * (double)law->param_bytes / (double)law->params,
           4 * law->params);
}

static int quantize(int argc, char **argv)
{
    struct options o = {0};
    int rc = parse(argc, argv, " --precision --law-policy --config --arch ", 2, &o);
    if (rc != IC_EXIT_OK)
        return rc;
    if (check_policy(&o) != IC_EXIT_OK)
        return IC_EXIT_USAGE;
    if (!o.file || !o.second)
        return usage_error("quantize: which file, and which to write?", NULL);
    struct ic_err err = {0};
    struct ic_law *original = NULL, *law = NULL;
    const struct ic_law_open_opts plain = {.config = o.config, .arch = o.arch};
    const char *file = o.file;
    enum ic_status s = open_law(&o, file, o.precision ? o.precision : "nf4", &law, &err);
    if (s == IC_OK)
        s = ic_law_open(file, &plain, &original, &err);
    if (s == IC_OK)
        s = spare_input(law, file = o.second, &err);
    if (s == IC_OK)
        s = ic_law_write(law, file, &err);
    if (s == IC_OK)
        print_quantised(original, law);
    ic_law_close(&original);
    ic_law_close(&law);
    return report(file, s, &err);
}

/* ---- plan ------------------------------------------------------------------------------------ */

struct plan_options {
    const struct ic_law_backend *be;
    unsigned long grid, batch, memory,
        threads;        /* batch 0: the largest that fits; memory (the host's) in MiB */
    unsigned long vram; /* MiB of a device's memory; 0: what is free but for the margin */
};

#define PLAN_MARGIN_MIB 512 /* as serve's --vram-margin is by default */

/* What is left for plans and states when the law's weights are there. */
static struct ic_law_room plan_room(const struct plan_options *po, const struct ic_law *law,
                                    const struct ic_law_packed *packed)
{
    struct ic_law_room room = {.host = (size_t)po->memory << 20, .on_device = po->be->memory != NULL};
    const size_t packed_bytes = po->be->packed_bytes(packed);
    const size_t held = law->weight_bytes + (room.on_device ? 0 : packed_bytes);
    uint64_t left = (uint64_t)po->vram << 20, total, taken = packed_bytes;
    if (room.on_device && !po->vram) {
        taken = (uint64_t)PLAN_MARGIN_MIB << 20; /* the weights are there already */
        if (!po->be->memory(&left, &total))
            left = 0;
    }
    room.host = room.host > held ? room.host - held : 0;
    room.device = (size_t)(left > taken ? left - taken : 0);
    return room;
}

static void print_largest(const struct plan_options *po, const struct ic_law_room *room,
                          const struct ic_law_fit *fit)
{
    static const char *const limits[] = {"no larger one is made", "bound by host memory",
                                         "bound by the device's memory"};
    printf("  largest batch in %lu MiB", po->memory);
    if (room->on_device)
        printf(" of host memory and %zu MiB of the device's (%s)", room->device >> 20,
               po->vram ? "--vram, less the weights" : "free, less a margin of 512");
    printf(": %u (%s)\n\n", fit->n, limits[fit->limit]);
}

/* The itemised sum of one precision, then the largest batch. */
static enum ic_status plan_one(const struct options *o, const struct plan_options *po,
                               const char *precision, struct ic_err *err)
{
    struct ic_law *law;
    struct ic_law_packed *packed = NULL;
    struct ic_law_plan *plan = NULL;
    struct ic_buf text = {0};
    const unsigned grid = (unsigned)po->grid;
    enum ic_status s = open_law(o, o->file, precision, &law, err);
    if (s == IC_OK)
        s = po->be->pack(law, (unsigned)po->threads, &packed, err);
    struct ic_law_room room = {0};
    struct ic_law_fit fit = {0};
    if (s == IC_OK) {
        room = plan_room(po, law, packed);
        fit = ic_law_batch_fit(po->be, packed, law, grid, grid, &room, IC_LAW_BATCH_MAX);
    }
    const unsigned batch = po->batch ? (unsigned)po->batch : fit.n ? fit.n : 1;
    if (s == IC_OK)
        s = ic_law_plan_open(law, grid, grid, batch, po->be->tensor_bytes, &plan, err);
    if (s == IC_OK) {
        ic_law_plan_report(plan, po->be, packed, &text);
        if (!text.failed)
            fwrite(text.data, 1, text.len, stdout);
        print_largest(po, &room, &fit);
    }
    ic_buf_deinit(&text);
    ic_law_plan_close(&plan);
    if (packed)
        po->be->unpack(&packed);
    ic_law_close(&law);
    return s;
}

static int plan(int argc, char **argv)
{
    static const char *const all[] = {"fp32", "fp16", "bf16", "nf4"};
    struct options o = {0};
    struct plan_options po = {.grid = 64, .batch = 16, .memory = 2048};
    int rc =
        parse(argc, argv,
              " --grid --batch --memory --vram --precision --law-policy --backend --law-plugin --threads "
              "--config --arch ",
              1, &o);
    if (rc == IC_EXIT_OK)
        rc = choose_backend(&o, &po.be);
    if (rc != IC_EXIT_OK)
        return rc;
    if (check_policy(&o) != IC_EXIT_OK)
        return IC_EXIT_USAGE;
    if (!o.file)
        return usage_error("plan: which file?", NULL);
    if (o.grid && (!whole_number(o.grid, IC_LAW_GRID_MAX, &po.grid) || !po.grid))
        return usage_error("--grid is not a whole number from 1 to 4096: ", o.grid);
    if (o.batch && strcmp(o.batch, "auto") == 0)
        po.batch = 0;
    else if (o.batch && (!whole_number(o.batch, IC_LAW_BATCH_MAX, &po.batch) || !po.batch))
        return usage_error("--batch is neither auto nor a whole number from 1 to 1024: ", o.batch);
    if (o.memory && !whole_number(o.memory, 1ul << 24, &po.memory))
        return usage_error("--memory is not a whole number of MiB: ", o.memory);
    if (o.vram && (!whole_number(o.vram, 1ul << 24, &po.vram) || !po.vram))
        return usage_error("--vram is not a whole number of MiB: ", o.vram);
    if (o.threads && !whole_number(o.threads, 1024, &po.threads))
        return usage_error("--threads is not a whole number up to 1024: ", o.threads);
    struct ic_err err = {0};
    struct ic_law *law;
    enum ic_status s = open_law(&o, o.file, o.precision, &law, &err);
    const bool one = s == IC_OK && (o.precision || o.policy || law->precision != IC_LAW_FP32);
    ic_law_close(&law);
    if (s == IC_OK && one)
        s = plan_one(&o, &po, o.precision, &err);
    for (size_t i = 0; i < sizeof all / sizeof all[0] && s == IC_OK && !one; i++)
        s = plan_one(&o, &po, all[i], &err);
    return report(o.file, s, &err);
}

/* ---- fidelity -------------------------------------------------------------------------------- */

/* Copies the comma-separated list into `store`, cut in pieces; how many, 0 where it is empty, has too many
 * or does not fit. */
static unsigned pieces(const char *list, char *store, size_t size, const char **out, unsigned most)
{
    unsigned n = 0;
    if (!*list || strlen(list) >= size)
        return 0;
    strcpy(store, list);
    for (char *save = NULL, *p = strtok_r(store, ",", &save); p; p = strtok_r(NULL, ",", &save)) {
        if (n == most)
            return 0;
        out[n++] = p;
    }
    return n;
}

static int fidelity_rows(const struct options *o, struct ic_law_fidelity_opts *fo, char *store, size_t size)
{
    const char *names[IC_LAW_FIDELITY_ROWS_MAX];
    struct ic_err err = {0};
    const unsigned n = pieces(o->precisions ? o->precisions : "fp32~,fp16,bf16,nf4", store, size, names,
                              IC_LAW_FIDELITY_ROWS_MAX - 1);
    if (!n)
        return usage_error("--precisions is not a list of precisions: ", o->precisions);
    for (unsigned i = 0; i < n; i++) {
        fo->row[i].name = names[i];
        fo->row[i].nudged = strcmp(names[i], "fp32~") == 0;
        if (ic_law_policy_parse(fo->row[i].nudged ? "fp32" : names[i], NULL, &fo->row[i].policy, &err) !=
            IC_OK)
            return usage_error(err.msg, NULL);
    }
    fo->rows = n;
    if (o->policy) {
        fo->row[n].name = "nf4+policy";
        if (ic_law_policy_parse("nf4", o->policy, &fo->row[n].policy, &err) != IC_OK)
            return usage_error(err.msg, NULL);
        fo->rows++;
    }
    return IC_EXIT_OK;
}

static int fidelity_numbers(const struct options *o, struct ic_law_fidelity_opts *fo)
{
    unsigned long seeds = 4, first = 1, steps = 2000, spin_up = 0, threads = 0, grid;
    const char *names[IC_LAW_FIDELITY_GRIDS_MAX];
    char store[128], *end = NULL;
    fo->grids = pieces(o->grids ? o->grids : "64", store, sizeof store, names, IC_LAW_FIDELITY_GRIDS_MAX);
    if (!fo->grids)
        return usage_error("--grids is not a list of up to 8 grid sides: ", o->grids);
    for (unsigned i = 0; i < fo->grids; i++) {
        if (!whole_number(names[i], IC_LAW_GRID_MAX, &grid) || !grid)
            return usage_error("--grids: not a grid's side: ", names[i]);
        fo->grid[i] = (unsigned)grid;
    }
    if (o->seeds && (!whole_number(o->seeds, IC_LAW_FIDELITY_SEEDS_MAX, &seeds) || !seeds))
        return usage_error("--seeds is not a whole number from 1 to 4096: ", o->seeds);
    if (o->first_seed && (!whole_number(o->first_seed, SEED_MAX, &first) || !first))
        return usage_error("--first-seed is not a whole number from 1 to 1000000000: ", o->first_seed);
    if (o->steps && (!whole_number(o->steps, IC_LAW_FIDELITY_STEPS_MAX, &steps) || steps < 4))
        return usage_error("--steps is not a whole number from 4 to 1000000: ", o->steps);
    if (o->spin_up && (!whole_number(o->spin_up, steps - 1, &spin_up) || !spin_up))
        return usage_error("--spin-up is not a whole number of steps below --steps: ", o->spin_up);
    if (o->threads && !whole_number(o->threads, 1024, &threads))
        return usage_error("--threads is not a whole number up to 1024: ", o->threads);
    fo->threshold = o->threshold ? strtod(o->threshold, &end) / 100 : 0.05;
    if (o->threshold && (end == o->threshold || *end || !(fo->threshold > 0 && fo->threshold < 10)))
        return usage_error("--threshold is not a percentage: ", o->threshold);
    fo->seeds = (unsigned)seeds;
    fo->first_seed = first;
    fo->steps = (unsigned)steps;
    fo->spin_up = (unsigned)spin_up;
    fo->threads = (unsigned)threads;
    return IC_EXIT_OK;
}

static int fidelity(int argc, char **argv)
{
    struct options o = {0};
    char store[128];
    enum ic_law_fidelity_verdict worst;
    int rc =
        parse(argc, argv,
              " --law --grids --seeds --first-seed --steps --spin-up --precisions --law-policy --threshold "
              "--layers --csv --plot "
              "--backend --law-plugin --threads --config --arch ",
              0, &o);
    if (rc == IC_EXIT_OK && !o.law)
        rc = usage_error("fidelity: which --law?", NULL);
    struct ic_law_fidelity_opts fo = {
        .path = o.law, .config = o.config, .arch = o.arch, .csv = o.csv, .plot = o.plot};
    fo.layers = o.layers && strcmp(o.layers, "no") != 0;
    if (rc == IC_EXIT_OK)
        rc = choose_backend(&o, &fo.backend);
    if (rc == IC_EXIT_OK)
        rc = fidelity_rows(&o, &fo, store, sizeof store);
    if (rc == IC_EXIT_OK)
        rc = fidelity_numbers(&o, &fo);
    if (rc != IC_EXIT_OK)
        return rc;
    struct ic_err err = {0};
    enum ic_status s = ic_law_fidelity(&fo, &worst, &err);
    return s == IC_OK && worst == IC_LAW_FIDELITY_FAIL ? IC_EXIT_FAILED : report(o.law, s, &err);
}

int ic_law_main(int argc, char **argv)
{
    signal(SIGXFSZ, SIG_IGN); /* a file at the limit: write tells it too, and takes its remains away */
    if (argc >= 2 && strcmp(argv[1], "inspect") == 0)
        return inspect(argc - 1, argv + 1);
    if (argc >= 2 && strcmp(argv[1], "step") == 0)
        return step(argc - 1, argv + 1);
    if (argc >= 2 && strcmp(argv[1], "quantize") == 0)
        return quantize(argc - 1, argv + 1);
    if (argc >= 2 && strcmp(argv[1], "plan") == 0)
        return plan(argc - 1, argv + 1);
    if (argc >= 2 && strcmp(argv[1], "fidelity") == 0)
        return fidelity(argc - 1, argv + 1);
    if (argc == 2 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
        fputs(usage, stdout);
        return IC_EXIT_OK;
    }
    return usage_error(argc < 2 ? "inspect or step?" : "no such command: ", argc < 2 ? NULL : argv[1]);
}
