/* The CUDA back end of Law M on a GPU: is it right, and how fast.
 *
 *   law-gpu check ROOT          golden vectors of ROOT/tests/golden and random laws against the reference
 *   law-gpu quick               a few random laws only: with IC_LAW_CUDA_CUT=0, 1, … (law/cuda/exec.c)
 *   law-gpu tall                laws large enough for tall.cuh: with IC_LAW_CUDA_TALL=1, so that it is used, and
 *                               with IC_LAW_CUDA_SHARE=1, so that blocks share weights (law/cuda/tune.c)
 *   law-gpu small               one small law, a few steps: for compute-sanitizer
 *   law-gpu serve [GRID,BATCH]  (64,64) milliseconds of a step as a server makes it: states that travel or
 *                               stay, with and without frames, beside the device's own time
 *   law-gpu time [--backend B] [--precision P] [--d N] [--b N] [--case GRID,BATCH]…
 *
 * `check` exits with 1 where an error is past its bound. Bounds: float32 is held to what
 * tests/golden/README.md says, and all back ends to a relative error |x - ref| / |ref| of delta in one step.
 * A convolution in float32 (law/cuda/exact_mma.cu) has products within 2^-21, sums of 9 that lose 2^-25 with each addition
 * and up to 200 of these sums added, 2^-25 * sqrt(200): 1.2e-6 together; 16 layers add like a random walk, norm and ELU may
 * double that: 1e-5. In 16 bits each of up to 16 layers rounds its output and its weights once, errors of half a unit in the last place
 * that add like a random walk: 2^-11 * sqrt(2 * 16) / sqrt(3) * 2 (what norm and ELU may amplify) = 0.6 %
 * for fp16, eight times that for bf16. The bound is twice it. Run it with IC_LAW_CUDA_POISON=1: memory is
 * NaN before every plan. */
#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/clock.h"
#include "law/cpu/synth.h"
#include "law/plugin.h"
#include "model/tensors.h"

#define CASES_MAX 16
#define PEAK_TFLOPS 790e12 /* dense fp16 matrix products measured on an H100 and an H200 of ours */
#define BOUND_F16 1.2e-2
#define BOUND_BF16 9.6e-2
#define BOUND_F32 1e-5
#define BOUND_GOLDEN 1e-5 /* float32, one step */

static const struct ic_law_plugin *plugin;
static int failures;

static _Noreturn void die(const char *what, const struct ic_err *err)
{
    fprintf(stderr, "%s: %s\n", what, err->msg);
    exit(1);
}

static const struct ic_law_backend *backend(const char *name)
{
    const struct ic_law_backend *be;
    struct ic_err err = {0};
    if (ic_law_backend_open(name, &be, &err) != IC_OK)
        die(name, &err);
    return be;
}

/* A law on a back end with a batch of states. */
struct rig {
    const struct ic_law_backend *be;
    struct ic_law_plan *plan;
    struct ic_law_packed *packed;
    struct ic_law_exec *exec;
    struct ic_law_io *io;
    unsigned n;
};

static struct rig rig_open(const struct ic_law *law, const char *name, unsigned h, unsigned w,
                           unsigned batch)
{
    struct rig r = {.be = backend(name), .n = batch};
    struct ic_err err = {0};
    if (ic_law_plan_open(law, h, w, batch, r.be->tensor_bytes, &r.plan, &err) != IC_OK ||
        r.be->pack(law, 2, &r.packed, &err) != IC_OK ||
        r.be->open(r.packed, r.plan, &r.exec, &err) != IC_OK)
        die(name, &err);
    r.io = calloc(batch, sizeof *r.io);
    for (unsigned i = 0; i < batch; i++) {
        const size_t bytes = (r.plan->psi_bytes + 63) / 64 * 64, half = r.plan->memory_bytes / 2;
        r.io[i] = (struct ic_law_io){
            .psi = aligned_alloc(64, bytes), .delta = aligned_alloc(64, bytes), .gamma = law->gamma};
        if (half) {
            r.io[i].h = calloc(1, half);
            r.io[i].c = calloc(1, half);
            uint64_t seed = 100 + i;
            for (size_t k = 0; k < half / sizeof(float); k++) {
                r.io[i].h[k] = 0.5f * synth_uniform(&seed);
                r.io[i].c[k] = synth_uniform(&seed);
            }
        }
        synth_psi(r.io[i].psi, (size_t)h * w, law->d, i + 1);
    }
    return r;
}

static void rig_close(struct rig *r)
{
    for (unsigned i = 0; i < r->n; i++) {
        free(r->io[i].psi);
        free(r->io[i].delta);
        free(r->io[i].h);
        free(r->io[i].c);
    }
    free(r->io);
    r->be->close(&r->exec);
    r->be->unpack(&r->packed);
    ic_law_plan_close(&r->plan);
}

static void steps(struct rig *r, unsigned n, unsigned count)
{
    struct ic_err err = {0};
    if (r->be->run) {
        if (r->be->run(r->exec, r->io, n, count, &err) != IC_OK)
            die(r->be->name, &err);
        return;
    }
    for (unsigned i = 0; i < count; i++)
        r->be->step(r->exec, r->io, n);
}

static double relative(const float *a, const float *ref, size_t n)
{
    double diff = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        const double d = (double)a[i] - (double)ref[i];
        diff += d * d;
        norm += (double)ref[i] * (double)ref[i];
    }
    return sqrt(diff / (norm > 0 ? norm : 1));
}

static void verdict(double e, double bound)
{
    const bool good = e <= bound; /* a NaN is not */
    failures += !good;
    printf("%s\n", good ? "ok" : "WRONG");
    fflush(stdout);
}

/* Of norms' scales some are negative, and some are zero: what is pooled before a norm depends on that. */
static void turn_scales(struct ic_law *law)
{
    for (size_t k = 0; k < law->weight_count; k++) {
        const struct ic_law_weight *w = &law->weights[k];
        if (w->ndim != 1 || !strstr(w->name, "conv_block") || !strstr(w->name, ".weight"))
            continue;
        float *scale = (float *)law->data + (w->data - (const float *)law->data);
        for (size_t i = 1; i < w->count; i += 3)
            scale[i] = i % 11 == 4 ? 0.0f : -scale[i];
    }
}

/* Random law and states, one step of each back end beside the reference's; the batch is not full. */
static void check_random(enum ic_law_arch arch, unsigned d, unsigned b, unsigned h, unsigned w,
                         const char *precision)
{
    static const struct {
        const char *name;
        double bound;
    } all[] = {{"cuda-fp32", BOUND_F32}, {"cuda-fp16", BOUND_F16}, {"cuda-bf16", BOUND_BF16}};
    struct ic_law *law = synth_law(arch, d, b, 11 + d);
    struct ic_law_policy policy;
    struct ic_err err = {0};
    if (law)
        turn_scales(law);
    if (!law || (precision && (ic_law_policy_parse("fp32", precision, &policy, &err) != IC_OK ||
                               !synth_requantise(law, &policy))))
        die("a law", &err);
    struct rig ref = rig_open(law, "ref", h, w, 3);
    steps(&ref, 3, 1);
    for (int i = 0; i < 3; i++) {
        if (arch == IC_LAW_SNN_UNET && i > 0)
            continue;
        struct rig r = rig_open(law, all[i].name, h, w, 5);
        struct rig again = rig_open(law, all[i].name, h, w, 5);
        steps(&r, 3, 1);
        double delta = 0, memory = 0;
        bool same = true;
        for (unsigned k = 0; k < 3; k++) {
            const size_t n = ref.plan->psi_bytes / sizeof(float),
                         m = ref.plan->memory_bytes / 2 / sizeof(float);
            delta = fmax(delta, relative(r.io[k].delta, ref.io[k].delta, n));
            if (!(relative(r.io[k].delta, ref.io[k].delta, n) >= 0))
                delta = NAN;
            if (m)
                memory = fmax(
                    memory, fmax(relative(r.io[k].h, ref.io[k].h, m), relative(r.io[k].c, ref.io[k].c, m)));
        }
        /* each one alone, in the first place of the batch: the same to the last bit */
        for (unsigned k = 0; k < 3; k++) {
            struct ic_law_io first = again.io[0];
            again.io[0] = again.io[k];
            steps(&again, 1, 1);
            again.io[0] = first;
        }
        for (unsigned k = 0; k < 3; k++)
            same = same && memcmp(again.io[k].psi, r.io[k].psi, ref.plan->psi_bytes) == 0;
        printf("%-10s %-22s d %2u b %3u %3ux%-3u %-14s delta %.2e memory %.1e bound %.1e  same again: %s  ",
               all[i].name, ic_law_arch_info(arch)->name, d, b, h, w, precision ? precision : "", delta,
               memory, all[i].bound, same ? "yes" : "NO");
        verdict(same ? fmax(delta, memory) : 1e9, isnan(delta) ? -1 : all[i].bound);
        rig_close(&again);
        rig_close(&r);
    }
    rig_close(&ref);
    synth_free(law);
}

/* What the back end "cuda" computes a law in, by what its weights are kept in and the `largest` of them. */
static void check_choice(enum ic_law_arch arch, const char *precision, double largest, const char *same_as)
{
    struct ic_law *law = synth_law(arch, 4, 16, 5);
    struct ic_law_policy policy;
    struct ic_err err = {0};
    if (!law || ic_law_policy_parse(precision, NULL, &policy, &err) != IC_OK ||
        !synth_requantise(law, &policy))
        die("a law", &err);
    law->weight_abs_max = largest;
    struct rig chosen = rig_open(law, "cuda", 32, 32, 1), named = rig_open(law, same_as, 32, 32, 1);
    steps(&chosen, 1, 3);
    steps(&named, 1, 3);
    const bool same = memcmp(chosen.io[0].psi, named.io[0].psi, named.plan->psi_bytes) == 0;
    printf("cuda, %s kept in %s: %s %s  ", ic_law_arch_info(arch)->name, precision, same ? "as" : "NOT as",
           same_as);
    verdict(same ? 0 : 1, 0.5);
    rig_close(&chosen);
    rig_close(&named);
    synth_free(law);
}

/* One call of 11 steps is 11 calls of one step. */
static void check_many(const char *name)
{
    struct ic_law *law = synth_law(IC_LAW_UNET_UNITARY, 8, 32, 3);
    struct rig a = rig_open(law, name, 64, 64, 2), b = rig_open(law, name, 64, 64, 2);
    steps(&a, 2, 11);
    for (int i = 0; i < 11; i++)
        steps(&b, 2, 1);
    const bool same = memcmp(a.io[1].psi, b.io[1].psi, a.plan->psi_bytes) == 0 &&
                      memcmp(a.io[1].delta, b.io[1].delta, a.plan->psi_bytes) == 0;
    printf("%-10s eleven steps at once %s ", name,
           same ? "are eleven single ones" : "DIFFER from eleven single ones:");
    verdict(same ? 0 : 1, 0.5);
    rig_close(&a);
    rig_close(&b);
    synth_free(law);
}

/* 24 simulations are enough for float32's convolutions to be cut as no test with few is; each computes what it does alone. */
static void check_batch(void)
{
    enum { BATCH = 24, GRID = 64, STEPS = 2 };
    struct ic_law *law = synth_law(IC_LAW_UNET_UNITARY, 8, 32, 3);
    struct rig all = rig_open(law, "cuda-fp32", GRID, GRID, BATCH),
               one = rig_open(law, "cuda-fp32", GRID, GRID, 1);
    unsigned same = 0;
    steps(&all, BATCH, STEPS);
    for (unsigned i = 0; i < BATCH; i++) {
        synth_psi(one.io[0].psi, (size_t)GRID * GRID, law->d, i + 1); /* as rig_open does */
        steps(&one, 1, STEPS);
        same += memcmp(one.io[0].psi, all.io[i].psi, all.plan->psi_bytes) == 0;
    }
    printf("cuda-fp32  %u of %d simulations of a large batch are what they are alone  ", same, BATCH);
    verdict(BATCH - same, 0.5);
    rig_close(&all);
    rig_close(&one);
    synth_free(law);
}

/* ---- states that stay ------------------------------------------------------------------------------ */

static void stay(struct rig *r)
{
    struct ic_err err = {0};
    for (unsigned i = 0; i < r->n; i++)
        if (r->be->state_open(r->packed, r->plan, &r->io[i], &r->io[i].state, &err) != IC_OK ||
            r->be->state_put(r->io[i].state, &r->io[i], &err) != IC_OK)
            die("a state", &err);
}

static void leave(struct rig *r)
{
    for (unsigned i = 0; i < r->n; i++)
        r->be->state_close(&r->io[i].state);
}

static void fetch(struct rig *r, unsigned i)
{
    struct ic_err err = {0};
    if (r->be->state_get(r->io[i].state, &r->io[i], &err) != IC_OK)
        die("a state", &err);
}

static void start(struct rig *r, unsigned n, unsigned count)
{
    r->be->start(r->exec, r->io, n, count);
}

static bool same_state(const struct rig *a, const struct rig *b, unsigned i)
{
    const size_t half = a->plan->memory_bytes / 2;
    return memcmp(a->io[i].psi, b->io[i].psi, a->plan->psi_bytes) == 0 &&
           (!half ||
            (memcmp(a->io[i].h, b->io[i].h, half) == 0 && memcmp(a->io[i].c, b->io[i].c, half) == 0));
}

/* Steps in pieces, begun or not, in other company and after an edit: the same as states that travel. */
static void check_resident(const char *name, enum ic_law_arch arch, unsigned d, unsigned b, unsigned grid)
{
    struct ic_law *law = synth_law(arch, d, b, 3);
    struct rig there = rig_open(law, name, grid, grid, 3), here = rig_open(law, name, grid, grid, 3);
    struct ic_err err = {0};
    float *delta = malloc(there.plan->psi_bytes);
    bool same = true;
    stay(&there);
    float *const before = malloc(there.plan->psi_bytes);
    memcpy(before, there.io[0].psi, there.plan->psi_bytes);
    steps(&there, 3, 3);
    start(&there, 3, 1);
    steps(&there, 3, 1);
    start(&there, 1, 7); /* the first goes ahead */
    steps(&there, 1, 7);
    struct ic_law_io first = there.io[0]; /* and the others follow in its place */
    there.io[0] = there.io[1];
    there.io[1] = there.io[2];
    start(&there, 2, 7);
    steps(&there, 2, 7);
    there.io[2] = there.io[1];
    there.io[1] = there.io[0];
    there.io[0] = first;
    same =
        same && memcmp(before, there.io[0].psi, there.plan->psi_bytes) == 0; /* the host's is untouched */
    steps(&here, 3, 11);
    if (there.be->delta(there.exec, 1, delta, &err) != IC_OK) /* place 1 was simulation 2 */
        die("a delta", &err);
    same = same && memcmp(delta, here.io[2].delta, there.plan->psi_bytes) == 0;
    for (unsigned i = 0; i < 3; i++) {
        fetch(&there, i);
        same = same && same_state(&there, &here, i);
        there.io[i].psi[2 * d] += 0.25f;
        here.io[i].psi[2 * d] += 0.25f;
        if (there.be->state_put(there.io[i].state, &there.io[i], &err) != IC_OK)
            die("a state", &err);
    }
    steps(&there, 3, 2);
    steps(&here, 3, 2);
    for (unsigned i = 0; i < 3; i++) {
        fetch(&there, i);
        same = same && same_state(&there, &here, i);
    }
    printf("%-10s %-22s states that stay %s ", name, ic_law_arch_info(arch)->name,
           same ? "are those that travel" : "DIFFER from those that travel:");
    verdict(same ? 0 : 1, 0.5);
    leave(&there);
    rig_close(&there);
    rig_close(&here);
    free(before);
    free(delta);
    synth_free(law);
}

/* ---- frames ---------------------------------------------------------------------------------------- */

/* Of [0, 1] where 0 and 1 are neighbours. */
static double circular(double d)
{
    return fmin(d, 1 - d);
}

struct frame_errors {
    double u8, f32, range; /* steps of a byte; of [0, 1]; relative */
    size_t bytes, other;
};

static void compare_frame(struct rig *r, struct ic_view_ctx *ctx, unsigned i, const struct ic_law_draw *d,
                          const float *delta, struct frame_errors *e)
{
    const struct ic_law_shape shape = {r->plan->height, r->plan->width, r->plan->law->d};
    struct ic_view_frame got, want;
    struct ic_err err = {0};
    const bool ring = d->request.view == IC_VIEW_PHASE;
    if (ic_view_plan(&d->request, shape, &got, &err) != IC_OK)
        die("a frame", &err);
    unsigned char *a = malloc(got.bytes), *b = malloc(got.bytes);
    if (r->be->frame(r->exec, i, a, got.bytes, &got, &err) != IC_OK ||
        ic_view_render(ctx, &d->request, r->io[i].psi, delta, shape, b, got.bytes, &want, &err) != IC_OK)
        die("a frame", &err);
    e->range =
        fmax(e->range, fabs((double)got.min - (double)want.min) / fmax(fabs((double)want.min), 1e-6));
    e->range =
        fmax(e->range, fabs((double)got.max - (double)want.max) / fmax(fabs((double)want.max), 1e-6));
    for (size_t k = 0; k < got.bytes && got.dtype == IC_VIEW_U8; k++) {
        const double diff = fabs((double)a[k] - (double)b[k]);
        e->u8 = fmax(e->u8, ring ? 255 * circular(diff / 255) : diff);
        e->bytes++;
        e->other += a[k] != b[k];
    }
    for (size_t k = 0; k < got.bytes / 4 && got.dtype == IC_VIEW_F32; k++) {
        const double diff =
            fabs((double)((const float *)(const void *)a)[k] - (double)((const float *)(const void *)b)[k]);
        e->f32 = isnan(diff) ? 9 : fmax(e->f32, ring ? circular(diff) : diff);
    }
    free(a);
    free(b);
}

/* Every view of one cell, both encodings, with a region and without: after a step, with its delta; and of
 * a state with cells that do not count. */
static void check_frames(unsigned d, unsigned grid_h, unsigned grid_w)
{
    struct ic_law *law = synth_law(IC_LAW_UNET_UNITARY, d, 16, 3);
    struct rig r = rig_open(law, "cuda-fp16", grid_h, grid_w, 4);
    const size_t row = 2 * (size_t)d, cells = (size_t)grid_h * grid_w;
    struct ic_view_ctx *ctx;
    struct ic_err err = {0};
    if (ic_view_ctx_open(&ctx, &err) != IC_OK)
        die("a context", &err);
    stay(&r);
    for (int spoiled = 0; spoiled < 2; spoiled++) {
        if (spoiled) {
            for (unsigned i = 0; i < 4; i++) {
                float *psi = r.io[i].psi;
                for (size_t k = 0; k < row; k++) {
                    psi[5 * row + k] = 0;
                    psi[6 * row + k] *= 0.04f;
                    psi[9 * row + k] *= 3e19f;
                    psi[11 * row + k] *= 2;
                }
                psi[7 * row] = NAN;
                psi[8 * row + 1] = INFINITY;
                for (size_t k = 0; k < row && i == 3; k++) /* an even picture */
                    for (size_t c = 0; c < cells; c++)
                        psi[c * row + k] = k == 0 ? 1.0f : 0.0f;
                if (r.be->state_put(r.io[i].state, &r.io[i], &err) != IC_OK)
                    die("a state", &err);
            }
        } else {
            steps(&r, 4, 3);
            for (unsigned i = 0; i < 4; i++) {
                fetch(&r, i);
                if (r.be->delta(r.exec, i, r.io[i].delta, &err) != IC_OK)
                    die("a delta", &err);
            }
        }
        for (int v = 0; v < IC_VIEW_COUNT; v++) {
            const enum ic_view view = (enum ic_view)v;
            struct frame_errors e = {0};
            if (!ic_view_of_one_cell(view))
                continue;
            for (int f32 = 0; f32 < 2; f32++) {
                const enum ic_view_encoding enc = f32 ? IC_VIEW_F32 : IC_VIEW_U8;
                const struct ic_view_roi part = {3, 5, 7, 6}, all = {0};
                struct ic_law_draw draws[4];
                for (unsigned i = 0; i < 4; i++)
                    draws[i] = (struct ic_law_draw){
                        r.io[i].state, spoiled || i == 2 ? -1 : (int)i, {view, enc, i % 2 ? part : all}};
                /* of three float32 a cell not all fit at once, which is told */
                const unsigned n = f32 && ic_view_channels(view) == 3 ? 2 : 4;
                if (n < 4) {
                    struct ic_law_draw many[4] = {draws[0], draws[2], draws[0], draws[2]};
                    e.range = r.be->draw(r.exec, many, 4, &err) == IC_TOO_LARGE ? 0 : 9;
                }
                if (r.be->draw(r.exec, draws, n, &err) != IC_OK)
                    die("drawing", &err);
                for (unsigned i = 0; i < n; i++)
                    compare_frame(&r, ctx, i, &draws[i], draws[i].place < 0 ? NULL : r.io[i].delta, &e);
            }
            const bool good = e.u8 <= 1 && e.f32 <= 1e-5 && e.range <= 1e-5;
            printf("frames d %2u %ux%u %-10s %s u8 off by %.0f (%zu of %zu), f32 by %.1e, range by %.1e  ",
                   d, grid_h, grid_w, ic_view_name(view), spoiled ? "spoiled" : "stepped", e.u8, e.other,
                   e.bytes, e.f32, e.range);
            verdict(good ? 0 : 1, 0.5);
        }
    }
    struct ic_law_draw other = {r.io[0].state, -1, {.view = IC_VIEW_GRADIENT}};
    if (r.be->draw(r.exec, &other, 1, &err) != IC_BAD_REQUEST)
        verdict(1, 0);
    leave(&r);
    ic_view_ctx_close(&ctx);
    rig_close(&r);
    synth_free(law);
}

static double worst(const float *a, const double *ref, size_t n)
{
    double w = 0;
    for (size_t i = 0; i < n; i++) {
        const double d = fabs((double)a[i] - ref[i]);
        w = d > w || isnan(d) ? d : w;
    }
    return w;
}

static double *read_f64(const struct ic_tensors *set, const char *name, size_t *n)
{
    struct ic_err err = {0};
    const struct ic_tensor *t = ic_tensors_find(set, name);
    if (!t || t->dtype != IC_DTYPE_F64)
        die(name, &err);
    double *out = malloc(t->count * sizeof *out);
    if (ic_pread_all(set->fd, t->where.at, out, t->count * sizeof *out, &err) != IC_OK)
        die(name, &err);
    *n = t->count;
    return out;
}

static void check_golden(const char *root, const char *folder, const char *checkpoint, const char *arch)
{
    static const char *const names[] = {"cuda-fp32", "cuda-fp16", "cuda-bf16"};
    char path[1024];
    struct ic_err err = {0};
    struct ic_law *law;
    struct ic_tensors *set;
    snprintf(path, sizeof path, "%s/%s%s", root, checkpoint ? checkpoint : "tests/golden/",
             checkpoint ? "" : folder);
    if (ic_law_open(path, &(struct ic_law_open_opts){.arch = arch}, &law, &err) != IC_OK)
        die(path, &err);
    snprintf(path, sizeof path, "%s/tests/golden/%s/golden.safetensors", root, folder);
    if (ic_tensors_open(path, &set, &err) != IC_OK)
        die(path, &err);
    const struct ic_tensor *t = ic_tensors_find(set, "psi_0");
    for (int i = 0; i < 3; i++) {
        if (law->arch == IC_LAW_SNN_UNET && i > 0)
            continue;
        struct rig r = rig_open(law, names[i], (unsigned)t->shape[0], (unsigned)t->shape[1], 1);
        size_t n;
        double *one = read_f64(set, "psi_1.f64", &n), *ten = read_f64(set, "psi_10.f64", &n);
        if (ic_tensors_read_f32(set, t, r.io[0].psi, n, &err) != IC_OK)
            die(path, &err);
        if (r.io[0].h) {
            memset(r.io[0].h, 0, r.plan->memory_bytes / 2);
            memset(r.io[0].c, 0, r.plan->memory_bytes / 2);
        }
        float *start = malloc(n * sizeof *start);
        memcpy(start, r.io[0].psi, n * sizeof *start);
        steps(&r, 1, 1);
        const double e1 = worst(r.io[0].psi, one, n);
        /* against what the step changed, so that a law that hardly moves is held to its movement too */
        double diff = 0, moved = 0;
        for (size_t k = 0; k < n; k++) {
            const double want = one[k] - (double)start[k], d = (double)r.io[0].psi[k] - one[k];
            diff += d * d;
            moved += want * want;
        }
        const double rel = sqrt(diff / moved);
        steps(&r, 1, 9);
        printf("%-10s %-28s worst |psi - f64| after 1: %.1e, after 10: %.1e; of the step's change %.1e  ",
               names[i], folder, e1, worst(r.io[0].psi, ten, n), rel);
        verdict(i == 0 ? e1 : rel, i == 0 ? BOUND_GOLDEN : i == 1 ? BOUND_F16 : BOUND_BF16);
        free(start);
        free(one);
        free(ten);
        rig_close(&r);
    }
    ic_tensors_close(&set);
    ic_law_close(&law);
}

static int check(const char *root)
{
    static const char *const folders[] = {
        "deep_qca-d4-b32",     "mlp-d8-b32",          "snn_unet-d4-b16",     "unet-d4-b8",
        "unet_convlstm-d4-b8", "unet_unitary-d4-b16", "unet_unitary-d5-b10", "unet_unitary_rmsnorm-d4-b8"};
    for (size_t i = 0; i < sizeof folders / sizeof folders[0]; i++)
        check_golden(root, folders[i], NULL, NULL);
    check_golden(root, "quantum_lifecycle", NULL, "UNET_UNITARY");
    check_golden(root, "ginzburg-landau", "demo/laws/ginzburg-landau", NULL);
    for (int arch = 0; arch < IC_LAW_ARCH_COUNT; arch++) {
        check_random((enum ic_law_arch)arch, 5, 10, 20, 12, NULL);
        check_random((enum ic_law_arch)arch, 8, 32, 32, 64, NULL);
    }
    check_random(IC_LAW_UNET_UNITARY, 8, 32, 64, 64, NULL);
    check_random(IC_LAW_UNET_UNITARY, 16, 64, 32, 32, NULL);
    check_random(IC_LAW_UNET_UNITARY, 70, 24, 16, 16, NULL);
    check_random(IC_LAW_UNET_UNITARY, 8, 32, 32, 32, "all=nf4");
    check_random(IC_LAW_UNET_UNITARY, 5, 20, 20, 12, "all=nf4");
    check_random(IC_LAW_UNET_CONVLSTM, 4, 16, 16, 16, "all=nf4");
    check_random(IC_LAW_UNET_UNITARY, 8, 32, 32, 32, "all=fp16");
    check_choice(IC_LAW_UNET_UNITARY, "fp32", 1, "cuda-fp32");
    check_choice(IC_LAW_UNET_UNITARY, "fp16", 1, "cuda-fp16");
    check_choice(IC_LAW_UNET_UNITARY, "bf16", 1, "cuda-fp16");
    check_choice(IC_LAW_UNET_UNITARY, "bf16", 70000, "cuda-bf16");
    check_choice(IC_LAW_UNET_UNITARY, "nf4", 1, "cuda-fp16");
    check_choice(IC_LAW_SNN_UNET, "nf4", 1, "cuda-fp32");
    check_many("cuda-fp16");
    check_many("cuda-fp32");
    check_batch();
    for (int arch = 0; arch < IC_LAW_ARCH_COUNT; arch++)
        check_resident("cuda-fp32", (enum ic_law_arch)arch, 4, 16, 16);
    check_resident("cuda-fp16", IC_LAW_UNET_UNITARY, 8, 32, 64);
    check_resident("cuda-fp16", IC_LAW_UNET_CONVLSTM, 4, 16, 32);
    check_resident("cuda-fp16", IC_LAW_MLP, 5, 10, 20);
    check_resident("cuda-bf16", IC_LAW_DEEP_QCA, 4, 16, 32);
    check_frames(8, 64, 64);
    check_frames(1, 12, 20);
    check_frames(2, 16, 24);
    printf("%s: %d wrong\n", failures ? "CHECK FAILED" : "CHECK PASSED", failures);
    return failures != 0;
}

static int quick(void)
{
    check_random(IC_LAW_UNET_UNITARY, 5, 10, 20, 12, NULL);
    check_random(IC_LAW_UNET_UNITARY, 8, 32, 40, 36, NULL);
    check_random(IC_LAW_UNET_UNITARY, 16, 64, 32, 32, NULL);
    check_random(IC_LAW_UNET_UNITARY, 8, 32, 40, 36, "all=nf4");
    check_random(IC_LAW_UNET_UNITARY, 5, 20, 20, 12, "all=nf4");
    check_random(IC_LAW_UNET_CONVLSTM, 4, 16, 16, 16, "all=nf4");
    printf("%s: %d wrong\n", failures ? "CHECK FAILED" : "CHECK PASSED", failures);
    return failures != 0;
}

/* Outputs of 64 and of 128 channels and more, tiles that are not full, and tiles of which there are pairs; inputs that are
 * the field, pooled, and neither. */
static int tall(void)
{
    check_random(IC_LAW_UNET_UNITARY, 16, 64, 72, 64, NULL);
    check_random(IC_LAW_UNET_UNITARY, 4, 64, 80, 72, NULL);
    check_random(IC_LAW_UNET_UNITARY, 8, 32, 136, 72, NULL);
    printf("%s: %d wrong\n", failures ? "CHECK FAILED" : "CHECK PASSED", failures);
    return failures != 0;
}

static int small(void)
{
    struct ic_law *law = synth_law(IC_LAW_UNET_UNITARY, 4, 16, 3);
    static const char *const names[] = {"cuda-fp16", "cuda-fp32"};
    for (int i = 0; i < 2; i++) {
        struct rig r = rig_open(law, names[i], 16, 16, 2);
        steps(&r, 2, 2);
        printf("%s: psi[0] %g\n", names[i], (double)r.io[0].psi[0]);
        stay(&r);
        start(&r, 2, 2);
        steps(&r, 2, 2);
        struct ic_law_draw d = {r.io[1].state, 1, {.view = IC_VIEW_FLOW}};
        struct ic_view_frame f = {0};
        unsigned char pixels[16 * 16 * 3];
        struct ic_err err = {0};
        if (r.be->draw(r.exec, &d, 1, &err) != IC_OK ||
            r.be->frame(r.exec, 0, pixels, sizeof pixels, &f, &err) != IC_OK)
            die("drawing", &err);
        fetch(&r, 0);
        leave(&r);
        rig_close(&r);
    }
    synth_free(law);
    return 0;
}

/* ---- as a server does it --------------------------------------------------------------------------- */

enum { SERVE_TRAVEL, SERVE_STAY, SERVE_FRAMES };

/* Milliseconds per step: `count` steps, `each` in a call, a u8 density frame of everybody after each call.
 */
static double serve_ms(struct rig *r, int how, unsigned count, unsigned each)
{
    const struct ic_law_shape shape = {r->plan->height, r->plan->width, r->plan->law->d};
    struct ic_law_draw *draws = calloc(r->n, sizeof *draws);
    struct ic_view_frame frame;
    struct ic_err err = {0};
    unsigned char *pixels = malloc((size_t)r->plan->height * r->plan->width * r->n);
    bool pending = false;
    for (unsigned i = 0; i < r->n; i++)
        draws[i] = (struct ic_law_draw){r->io[i].state, (int)i, {.view = IC_VIEW_DENSITY}};
    if (ic_view_plan(&draws[0].request, shape, &frame, &err) != IC_OK)
        die("a frame", &err);
    const int64_t t0 = ic_now_ns();
    for (unsigned done = 0; done <= count; done += each) {
        if (how != SERVE_TRAVEL && done < count)
            start(r, r->n, each);
        for (unsigned i = 0; pending && i < r->n; i++)
            if (r->be->frame(r->exec, i, pixels + i * frame.bytes, frame.bytes, &frame, &err) != IC_OK)
                die("a frame", &err);
        pending = false;
        if (done == count)
            break;
        steps(r, r->n, each);
        if (how != SERVE_FRAMES)
            continue;
        if (r->be->draw(r->exec, draws, r->n, &err) != IC_OK)
            die("drawing", &err);
        pending = true;
    }
    const double ms = (double)(ic_now_ns() - t0) * 1e-6 / count;
    free(draws);
    free(pixels);
    return ms;
}

static double middle(const double v[3])
{
    return fmax(fmin(v[0], v[1]), fmin(fmax(v[0], v[1]), v[2]));
}

static int serve(unsigned grid, unsigned batch)
{
    static const struct {
        const char *what;
        int how;
        unsigned each;
    } rows[] = {{"states travel, a step a call", SERVE_TRAVEL, 1},
                {"states stay, a step a call", SERVE_STAY, 1},
                {"states stay, 10 steps a call", SERVE_STAY, 10},
                {"a u8 density frame of each, every step", SERVE_FRAMES, 1},
                {"the same, every 10 steps", SERVE_FRAMES, 10}};
    struct ic_law *law = synth_law(IC_LAW_UNET_UNITARY, 8, 32, 1);
    struct rig r = rig_open(law, "cuda-fp16", grid, grid, batch);
    struct ic_err err = {0};
    double device[3];
    const size_t plan_bytes = r.be->exec_bytes(r.exec);
    for (unsigned i = 0; i < batch; i++) { /* nobody wants delta */
        free(r.io[i].delta);
        r.io[i].delta = NULL;
    }
    if (plugin->set_states(r.exec, r.io, batch, &err) != IC_OK)
        die("timing", &err);
    for (int k = 0; k < 3; k++)
        if (plugin->time_steps(r.exec, batch, 200, true, &device[k], &err) != IC_OK)
            die("timing", &err);
    printf("grid %u batch %u, UNET_UNITARY d 8 b 32, fp16; ms per step, middle of 3 x 400 (all)\n", grid,
           batch);
    printf("  %-42s %8.4f (%.4f %.4f %.4f)\n", "the device's own time", middle(device), device[0],
           device[1], device[2]);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        double ms[3];
        if (i == 1)
            stay(&r);
        serve_ms(&r, rows[i].how, 40, rows[i].each);
        for (int k = 0; k < 3; k++)
            ms[k] = serve_ms(&r, rows[i].how, 400, rows[i].each);
        printf("  %-42s %8.4f (%.4f %.4f %.4f)\n", rows[i].what, middle(ms), ms[0], ms[1], ms[2]);
        fflush(stdout);
    }
    printf("  bytes: plan %.2f MiB, states of the batch %.2f MiB, weights %.2f MiB; pinned for frames %.2f "
           "MiB\n",
           (double)plan_bytes / 1048576.0, (double)ic_law_state_bytes(law, grid, grid) * batch / 1048576.0,
           (double)r.be->packed_bytes(r.packed) / 1048576.0,
           (double)ic_law_frames_bytes(grid, grid, batch) / 1048576.0);
    leave(&r);
    rig_close(&r);
    synth_free(law);
    return 0;
}

struct options {
    const char *backend, *precision;
    unsigned d, b, cases, grid[CASES_MAX], batch[CASES_MAX];
};

/* Bytes a step must move: every tensor written and read once, the weights, psi read twice and written. */
static double least_bytes(const struct rig *r)
{
    double bytes = (double)r->be->packed_bytes(r->packed);
    for (size_t i = 0; i < r->plan->op_count; i++) {
        const struct ic_law_op *op = &r->plan->ops[i];
        const bool conv = op->kind == IC_LAW_OP_CONV3X3 || op->kind == IC_LAW_OP_CONV1X1 ||
                          op->kind == IC_LAW_OP_CONVT2X2;
        for (int k = 0; conv && k < 2; k++)
            bytes += op->in[k] >= 0 ? (double)r->plan->tensors[op->in[k]].stride * r->n : 0;
        bytes += conv ? (double)r->plan->tensors[op->out].stride * r->n : 0;
    }
    return bytes + 3.0 * (double)r->plan->psi_bytes * r->n;
}

static void time_case(const struct options *o, const struct ic_law *law, unsigned grid, unsigned batch)
{
    struct ic_err err = {0};
    struct rig r = rig_open(law, o->backend, grid, grid, batch);
    double on[3], off, probe;
    if (plugin->set_states(r.exec, r.io, batch, &err) != IC_OK ||
        plugin->time_steps(r.exec, batch, 40, true, &probe, &err) != IC_OK)
        die("timing", &err);
    const unsigned count = probe < 0.02 ? 8000 : 160 / probe < 40 ? 40 : (unsigned)(160 / probe) / 8 * 8;
    for (int i = 0; i < 3; i++)
        if (plugin->time_steps(r.exec, batch, count, true, &on[i], &err) != IC_OK)
            die("timing", &err);
    if (plugin->time_steps(r.exec, batch, count / 4, false, &off, &err) != IC_OK)
        die("timing", &err);
    const double ms = fmax(fmin(on[0], on[1]), fmin(fmax(on[0], on[1]), on[2])); /* the middle one */
    const double flop = 2.0 * (double)r.plan->macs * batch;
    printf("%-10s %-8s d %2u b %3u grid %3u batch %2u  %8.4f ms/step (%.4f..%.4f)  graph off %8.4f  %8.1f "
           "GFLOP/s "
           "(%4.1f %% of 790 T)  >= %6.1f GB/s  %zu launches  %.1f MiB + weights %.2f MiB\n",
           o->backend, o->precision ? o->precision : "", law->d, law->b, grid, batch, ms,
           fmin(on[0], fmin(on[1], on[2])), fmax(on[0], fmax(on[1], on[2])), off, flop / ms / 1e6,
           100 * flop / (ms * 1e-3) / PEAK_TFLOPS, least_bytes(&r) / ms / 1e6, plugin->launches(r.exec),
           (double)r.be->exec_bytes(r.exec) / 1048576.0, (double)r.be->packed_bytes(r.packed) / 1048576.0);
    printf("RESULT %s%s%s %u %u %u %u %.5f %.5f\n", o->backend, o->precision ? ":" : "",
           o->precision ? o->precision : "", law->d, law->b, grid, batch, ms, off);
    fflush(stdout);
    rig_close(&r);
}

static int timing(int argc, char **argv)
{
    struct options o = {.backend = "cuda-fp16", .d = 8, .b = 32};
    struct ic_law_policy policy;
    struct ic_err err = {0};
    for (int i = 0; i + 1 < argc; i += 2) {
        const char *a = argv[i], *v = argv[i + 1];
        if (strcmp(a, "--backend") == 0)
            o.backend = v;
        else if (strcmp(a, "--precision") == 0)
            o.precision = v;
        else if (strcmp(a, "--d") == 0)
            o.d = (unsigned)atoi(v);
        else if (strcmp(a, "--b") == 0)
            o.b = (unsigned)atoi(v);
        else if (strcmp(a, "--case") == 0 && o.cases < CASES_MAX &&
                 sscanf(v, "%u,%u", &o.grid[o.cases], &o.batch[o.cases]) == 2)
            o.cases++;
        else {
            fprintf(stderr, "what is %s? see the top of bench/law_gpu.c\n", a);
            return 2;
        }
    }
    struct ic_law *law = synth_law(IC_LAW_UNET_UNITARY, o.d, o.b, 1);
    if (!law || (o.precision && (ic_law_policy_parse(o.precision, NULL, &policy, &err) != IC_OK ||
                                 !synth_requantise(law, &policy))))
        die("a law", &err);
    for (unsigned i = 0; i < o.cases; i++)
        time_case(&o, law, o.grid[i], o.batch[i]);
    synth_free(law);
    return 0;
}

int main(int argc, char **argv)
{
    struct ic_err err = {0};
    if (!(plugin = ic_law_plugin_load(&err)))
        die("no CUDA back end", &err);
    if (argc == 3 && strcmp(argv[1], "check") == 0)
        return check(argv[2]);
    if (argc == 2 && strcmp(argv[1], "quick") == 0)
        return quick();
    if (argc == 2 && strcmp(argv[1], "tall") == 0)
        return tall();
    if (argc == 2 && strcmp(argv[1], "small") == 0)
        return small();
    if (argc >= 2 && argc <= 3 && strcmp(argv[1], "serve") == 0) {
        unsigned grid = 64, batch = 64;
        if (argc == 3 && sscanf(argv[2], "%u,%u", &grid, &batch) != 2)
            return 2;
        return serve(grid, batch);
    }
    if (argc > 2 && strcmp(argv[1], "time") == 0)
        return timing(argc - 2, argv + 2);
    fprintf(stderr, "see the top of bench/law_gpu.c\n");
    return 2;
}
