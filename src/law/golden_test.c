/* Every back end against PyTorch's own output (tests/golden): each architecture, after 1, 10 and 50 steps.
 * Bounds are those of tests/golden/README.md; the measured errors are printed. */
#include <setjmp.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include <jansson.h>

#include "law/law.h"
#include "law/plan.h"
#include "model/tensors.h"

struct golden {
    const char *folder, *checkpoint, *arch; /* arch: NULL where config.json says it */
};

static const struct golden cases[] = {
    {"deep_qca-d4-b32", NULL, NULL},
    {"mlp-d8-b32", NULL, NULL},
    {"snn_unet-d4-b16", NULL, NULL},
    {"unet-d4-b8", NULL, NULL},
    {"unet_convlstm-d4-b8", NULL, NULL},
    {"unet_unitary-d4-b16", NULL, NULL},
    {"unet_unitary-d5-b10", NULL, NULL},
    {"unet_unitary_rmsnorm-d4-b8", NULL, NULL},
    {"quantum_lifecycle", NULL, "UNET_UNITARY"},
    {"ginzburg-landau", IC_SOURCE_DIR "/demo/laws/ginzburg-landau", NULL},
};

#define BOUND_ONE_STEP 1e-5
#define TIMES_TORCH 20.0
#define FLOOR 1e-5
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define LONG_RUN 0 /* sanitised, the reference is some ten times slower: no statistics at 50 */
#else
#define LONG_RUN 1
#endif

static double *read_f64(const struct ic_tensors *set, const char *name, size_t *n)
{
    struct ic_err err = {0};
    const struct ic_tensor *t = ic_tensors_find(set, name);
    assert_non_null(t);
    assert_int_equal(t->dtype, IC_DTYPE_F64);
    double *out = malloc(t->count * sizeof *out);
    assert_int_equal(ic_pread_all(set->fd, t->where.at, out, t->count * sizeof *out, &err), IC_OK);
    *n = t->count;
    return out;
}

static float *read_f32(const struct ic_tensors *set, const char *name)
{
    struct ic_err err = {0};
    const struct ic_tensor *t = ic_tensors_find(set, name);
    assert_non_null(t);
    float *out = malloc(t->count * sizeof *out);
    assert_int_equal(ic_tensors_read_f32(set, t, out, t->count, &err), IC_OK);
    return out;
}

/* PyTorch's own float32 error after `step` steps, from the file's metadata. */
static double torch_error(const struct ic_tensors *set, const char *step)
{
    uint8_t len[8];
    struct ic_err err = {0};
    assert_int_equal(ic_pread_all(set->fd, 0, len, 8, &err), IC_OK);
    size_t n = (size_t)len[0] | (size_t)len[1] << 8 | (size_t)len[2] << 16;
    char *text = malloc(n);
    assert_int_equal(ic_pread_all(set->fd, 8, text, n, &err), IC_OK);
    json_t *root = json_loadb(text, n, 0, NULL);
    const char *inner =
        json_string_value(json_object_get(json_object_get(root, "__metadata__"), "max_abs_f32_vs_f64"));
    assert_non_null(inner);
    json_t *errors = json_loads(inner, 0, NULL);
    double e = json_number_value(json_object_get(errors, step));
    assert_true(e > 0);
    json_decref(errors);
    json_decref(root);
    free(text);
    return e;
}

static double max_diff(const float *a, const double *b, size_t n)
{
    double worst = 0;
    for (size_t i = 0; i < n; i++)
        worst = fmax(worst, fabs((double)a[i] - b[i]));
    return worst;
}

/* Statistics that agree where trajectories no longer do: mean channel entropy of a cell (nats), mean and
 * deviation of sum_k |psi_k|, mean |<psi(y,x), psi(y,x+1)>|. */
static void statistics(const double *psi, size_t h, size_t w, size_t d, double out[4])
{
    double entropy = 0, sum = 0, sq = 0, coherence = 0;
    for (size_t i = 0; i < h * w; i++) {
        const double *p = psi + i * d * 2;
        double mags = 0, re = 0, im = 0;
        for (size_t k = 0; k < d; k++) {
            double m2 = p[2 * k] * p[2 * k] + p[2 * k + 1] * p[2 * k + 1];
            entropy -= m2 * log(m2 + 1e-12);
            mags += sqrt(m2);
            if (i % w + 1 < w) {
                const double *q = p + d * 2;
                re += p[2 * k] * q[2 * k] + p[2 * k + 1] * q[2 * k + 1];
                im += p[2 * k] * q[2 * k + 1] - p[2 * k + 1] * q[2 * k];
            }
        }
        coherence += hypot(re, im);
        sum += mags;
        sq += mags * mags;
    }
    double n = (double)(h * w), mean = sum / n;
    out[0] = entropy / n;
    out[1] = mean;
    out[2] = sqrt(fmax(0, sq / n - mean * mean));
    out[3] = coherence / n;
}

static double worst_statistic(const float *psi, const double *want, size_t h, size_t w, size_t d)
{
    size_t n = h * w * d * 2;
    double *wide = malloc(n * sizeof *wide), a[4], b[4], worst = 0;
    for (size_t i = 0; i < n; i++)
        wide[i] = (double)psi[i];
    statistics(wide, h, w, d, a);
    statistics(want, h, w, d, b);
    for (int i = 0; i < 4; i++)
        worst = fmax(worst, fabs(a[i] - b[i]) / fmax(fabs(b[i]), 0.05));
    free(wide);
    return worst;
}

struct rig {
    struct ic_law *law;
    struct ic_tensors *set;
    struct ic_law_plan *plan;
    struct ic_law_packed *packed;
    struct ic_law_exec *exec;
    float *psi, *h, *c;
};

static void rig_open(struct rig *r, const struct golden *g, const struct ic_law_backend *be)
{
    char path[512];
    struct ic_err err = {0};
    snprintf(path, sizeof path, "%s/golden/%s", IC_TEST_DIR, g->folder);
    *r = (struct rig){0};
    if (ic_law_open(g->checkpoint ? g->checkpoint : path, &(struct ic_law_open_opts){.arch = g->arch},
                    &r->law, &err))
        fail_msg("%s: %s", g->folder, err.msg);
    snprintf(path, sizeof path, "%s/golden/%s/golden.safetensors", IC_TEST_DIR, g->folder);
    if (ic_tensors_open(path, &r->set, &err))
        fail_msg("%s: %s", path, err.msg);
    const struct ic_tensor *t = ic_tensors_find(r->set, "psi_0");
    assert_non_null(t);
    unsigned side = (unsigned)t->shape[0];
    assert_int_equal(
        ic_law_plan_open(r->law, side, (unsigned)t->shape[1], 1, be->tensor_bytes, &r->plan, &err), IC_OK);
    assert_int_equal(be->pack(r->law, 2, &r->packed, &err), IC_OK);
    assert_int_equal(be->open(r->packed, r->plan, &r->exec, &err), IC_OK);
    float *psi = read_f32(r->set, "psi_0");
    r->psi = aligned_alloc(64, (r->plan->psi_bytes + 63) / 64 * 64);
    memcpy(r->psi, psi, r->plan->psi_bytes);
    free(psi);
    if (r->law->memory) {
        r->h = calloc(1, r->plan->memory_bytes / 2);
        r->c = calloc(1, r->plan->memory_bytes / 2);
    }
}

static void rig_close(struct rig *r, const struct ic_law_backend *be)
{
    be->close(&r->exec);
    be->unpack(&r->packed);
    ic_law_plan_close(&r->plan);
    ic_law_close(&r->law);
    ic_tensors_close(&r->set);
    free(r->psi);
    free(r->h);
    free(r->c);
}

static double net_error(struct rig *r, const struct ic_law_backend *be, double *torch)
{
    size_t n;
    double *want = read_f64(r->set, "net_out.f64", &n);
    float *f32 = read_f32(r->set, "net_out.f32"), *got = malloc(n * sizeof *got);
    *torch = max_diff(f32, want, n);
    double e = *torch;
    if (be->net_out) {
        be->net_out(r->exec, 0, got);
        e = max_diff(got, want, n);
    }
    free(want);
    free(f32);
    free(got);
    return e;
}

static double state_error(const struct rig *r, const char *name, double *statistic)
{
    size_t n;
    double *want = read_f64(r->set, name, &n);
    assert_int_equal(n * sizeof(float), r->plan->psi_bytes);
    double e = max_diff(r->psi, want, n);
    if (statistic)
        *statistic = worst_statistic(r->psi, want, r->plan->height, r->plan->width, r->law->d);
    free(want);
    return e;
}

static void check_case(const struct golden *g, const struct ic_law_backend *be)
{
    struct rig r;
    double net_torch, stat50 = 0;
    rig_open(&r, g, be);
    struct ic_law_io io = {.psi = r.psi, .h = r.h, .c = r.c, .gamma = r.law->gamma};
    be->step(r.exec, &io, 1);
    double net = net_error(&r, be, &net_torch), one = state_error(&r, "psi_1.f64", NULL);
    for (int i = 1; i < 10; i++)
        be->step(r.exec, &io, 1);
    double ten = state_error(&r, "psi_10.f64", NULL);
    for (int i = 10; LONG_RUN && i < 50; i++)
        be->step(r.exec, &io, 1);
    double fifty = LONG_RUN ? state_error(&r, "psi_50.f64", &stat50) : 0;
    double torch10 = torch_error(r.set, "10"), bound10 = fmax(FLOOR, TIMES_TORCH * torch10);
    print_message(
        "%-5s %-28s net %.1e (torch %.1e)  1: %.1e (%.1e)  10: %.1e (%.1e)  50: %.1e (%.1e)  stat %.1e\n",
        be->name, g->folder, net, net_torch, one, torch_error(r.set, "1"), ten, torch10, fifty,
        torch_error(r.set, "50"), stat50);
    assert_true(net <= fmax(FLOOR, TIMES_TORCH * net_torch));
    assert_true(one <= BOUND_ONE_STEP);
    assert_true(ten <= bound10);
    assert_true(stat50 <= 0.01);
    rig_close(&r, be);
}

static void check_all(const char *name)
{
    const struct ic_law_backend *be = ic_law_backend_find(name);
    if (!be)
        skip();
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        check_case(&cases[i], be);
}

static void reference_matches_torch(void **state)
{
    (void)state;
    check_all("ref");
}

static void cpu_matches_torch(void **state)
{
    (void)state;
    check_all("cpu");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reference_matches_torch),
        cmocka_unit_test(cpu_matches_torch),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
