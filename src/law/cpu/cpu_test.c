/* The CPU back end as a whole: against the reference on every architecture, odd sizes and instruction
 * set; and what it promises: a simulation's bits depend neither on its batch nor on the threads, and a
 * step allocates nothing. (PyTorch's golden vectors: golden_test, run once per instruction set.) */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <limits.h>
#include <malloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <cmocka.h>

#include "law/cpu/cpu.h"
#include "law/cpu/pool.h"
#include "law/cpu/synth.h"

struct sim {
    float *psi, *h, *c, *delta;
    size_t psi_bytes, mem_bytes;
};

static void *zeros(size_t bytes)
{
    void *p = aligned_alloc(64, bytes / 64 * 64 + 64);
    assert_non_null(p);
    return memset(p, 0, bytes / 64 * 64 + 64);
}

static struct sim sim_new(const struct ic_law *law, unsigned h, unsigned w, uint64_t seed)
{
    struct sim s = {.psi_bytes = ic_law_psi_bytes(law, h, w),
                    .mem_bytes = ic_law_memory_bytes(law, h, w) / 2};
    s.psi = zeros(s.psi_bytes);
    s.delta = zeros(s.psi_bytes);
    synth_psi(s.psi, (size_t)h * w, law->d, seed);
    if (law->memory) {
        s.h = zeros(s.mem_bytes);
        s.c = zeros(s.mem_bytes);
    }
    return s;
}

static void sim_free(struct sim *s)
{
    free(s->psi);
    free(s->h);
    free(s->c);
    free(s->delta);
}

static struct ic_law_io io_of(const struct sim *s, float gamma)
{
    return (struct ic_law_io){.psi = s->psi, .h = s->h, .c = s->c, .delta = s->delta, .gamma = gamma};
}

struct rig {
    const struct ic_law_backend *be;
    struct ic_law_packed *packed;
    struct ic_law_plan *plan;
    struct ic_law_exec *exec;
};

static struct rig rig_open(const struct ic_law *law, const struct ic_law_cpu_opts *opts, unsigned h,
                           unsigned w, unsigned batch)
{
    struct rig r = {.be = opts ? &ic_law_backend_cpu : &ic_law_backend_ref};
    struct ic_err err = {0};
    if ((opts ? ic_law_cpu_pack(law, opts, &r.packed, &err) : r.be->pack(law, 1, &r.packed, &err)) !=
            IC_OK ||
        ic_law_plan_open(law, h, w, batch, r.be->tensor_bytes, &r.plan, &err) != IC_OK ||
        r.be->open(r.packed, r.plan, &r.exec, &err) != IC_OK)
        fail_msg("%s", err.msg);
    return r;
}

static void rig_close(struct rig *r)
{
    r->be->close(&r->exec);
    ic_law_plan_close(&r->plan);
    r->be->unpack(&r->packed);
}

static double worst(const float *a, const float *b, size_t bytes)
{
    double w = 0;
    for (size_t i = 0; i < bytes / sizeof *a; i++)
        w = fmax(w, isfinite(a[i]) ? fabs((double)a[i] - (double)b[i]) : INFINITY);
    return w;
}

static const struct {
    enum ic_law_arch arch;
    unsigned d, b, h, w;
} laws[] = {
    {IC_LAW_UNET_UNITARY, 1, 11, 4, 4},
    {IC_LAW_UNET_UNITARY, 3, 13, 20, 36},
    {IC_LAW_UNET_UNITARY, 5, 18, 36, 20},
    {IC_LAW_UNET, 8, 20, 4, 44},
    {IC_LAW_UNET, 11, 16, 64, 8},
    {IC_LAW_UNET_UNITARY, 8, 32, 32, 32},
    {IC_LAW_UNET_UNITARY, 4, 8, 72, 140},
    {IC_LAW_UNET_UNITARY_RMSNORM, 3, 13, 20, 20},
    {IC_LAW_UNET_UNITARY_RMSNORM, 9, 18, 4, 36},
    {IC_LAW_UNET_CONVLSTM, 1, 11, 20, 12},
    {IC_LAW_UNET_CONVLSTM, 5, 8, 36, 36},
    {IC_LAW_UNET_CONVLSTM, 4, 20, 4, 4},
    {IC_LAW_MLP, 1, 1, 1, 1},
    {IC_LAW_MLP, 3, 20, 7, 13},
    {IC_LAW_MLP, 8, 32, 33, 65},
    {IC_LAW_MLP, 21, 64, 5, 100},
    {IC_LAW_MLP, 100, 8, 5, 33},
    {IC_LAW_MLP, 256, 3, 2, 3},
    {IC_LAW_DEEP_QCA, 1, 11, 1, 7},
    {IC_LAW_DEEP_QCA, 5, 18, 37, 3},
    {IC_LAW_DEEP_QCA, 8, 40, 20, 21},
    {IC_LAW_SNN_UNET, 1, 11, 1, 1},
    {IC_LAW_SNN_UNET, 3, 13, 9, 34},
    {IC_LAW_SNN_UNET, 8, 16, 20, 36},
};
#define LAWS (sizeof laws / sizeof laws[0])

/* Sanitizers slow the kernels 10 to 50 times: there, small grids only. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CELLS_MAX 450u
#else
#define CELLS_MAX UINT_MAX
#endif

/* psi' against the update done in double from the kernel's own delta. (Not against the reference's psi':
 * where psi + delta nearly cancels, normalising magnifies any difference.) Returns error over tolerance. */
static double update_error(const float *before, const struct sim *s, unsigned d, size_t cells, float gamma)
{
    double most = 0;
    const double g = gamma > 0 ? (double)gamma : 0;
    for (size_t i = 0; i < cells * 2 * d; i += 2 * d) {
        double sum = 0, size = 0;
        for (size_t k = i; k < i + 2 * d; k++) {
            const double phi = (double)before[k] * (1 - g) + (double)s->delta[k];
            sum += phi * phi;
            size += fabs((double)before[k]) + fabs((double)s->delta[k]);
        }
        for (size_t k = i; k < i + 2 * d; k++) {
            const double want = ((double)before[k] * (1 - g) + (double)s->delta[k]) / (sqrt(sum) + 1e-9);
            most = fmax(most, fabs((double)s->psi[k] - want) / (4e-7 * (1 + size / (sqrt(sum) + 1e-9))));
        }
    }
    return most;
}

/* The next step starts both from the reference's state. */
static void resync(struct sim *to, const struct sim *from)
{
    memcpy(to->psi, from->psi, from->psi_bytes);
    if (from->h) {
        memcpy(to->h, from->h, from->mem_bytes);
        memcpy(to->c, from->c, from->mem_bytes);
    }
}

static void requantise(struct ic_law *law, const char *precision, const char *layers)
{
    struct ic_law_policy policy;
    struct ic_err err = {0};
    char rule[80];
    const bool nf4 = strncmp(precision, "nf4", 3) == 0;
    snprintf(rule, sizeof rule, "%s=%s", layers, nf4 ? "nf4" : precision);
    assert_int_equal(ic_law_policy_parse(precision, rule, &policy, &err), IC_OK);
    assert_true(synth_requantise(law, &policy));
}

/* Every layer in `precision` (NULL: float32), on both sides: the reference reads the same rounded weights.
 */
static void against_reference(const char *isa, bool direct, const char *precision, size_t expand_bytes,
                              bool bf16_products)
{
    const double most_allowed = bf16_products ? 0.02 : 2e-5;
    double most = 0;
    for (size_t i = 0; i < LAWS; i++) {
        const unsigned h = laws[i].h, w = laws[i].w, batch = 2;
        if (h * w > CELLS_MAX)
            continue;
        struct ic_law *law = synth_law(laws[i].arch, laws[i].d, laws[i].b, i + 1);
        if (precision)
            requantise(law, precision, "all");
        struct rig ref = rig_open(law, NULL, h, w, batch);
        struct rig cpu = rig_open(law,
                                  &(struct ic_law_cpu_opts){.isa = isa,
                                                            .threads = 2,
                                                            .direct = direct,
                                                            .wide = !bf16_products,
                                                            .keep_out = true,
                                                            .expand_bytes = expand_bytes},
                                  h, w, batch);
        struct sim a[2], b[2];
        struct ic_law_io ia[2], ib[2];
        for (unsigned s = 0; s < batch; s++) {
            a[s] = sim_new(law, h, w, 100 + s);
            b[s] = sim_new(law, h, w, 100 + s);
            ia[s] = io_of(&a[s], s ? 0.3f : -1.0f);
            ib[s] = io_of(&b[s], s ? 0.3f : -1.0f);
        }
        float *ya = zeros(a[0].psi_bytes), *yb = zeros(a[0].psi_bytes), *before[2];
        before[0] = zeros(a[0].psi_bytes);
        before[1] = zeros(a[0].psi_bytes);
        for (int step = 0; step < 2; step++) {
            for (unsigned s = 0; s < batch; s++)
                memcpy(before[s], b[s].psi, b[s].psi_bytes);
            ref.be->step(ref.exec, ia, batch);
            cpu.be->step(cpu.exec, ib, batch);
            for (unsigned s = 0; s < batch; s++) {
                ref.be->net_out(ref.exec, s, ya);
                cpu.be->net_out(cpu.exec, s, yb);
                double size = 1, e = worst(yb, ya, a[s].psi_bytes);
                for (size_t q = 0; q < a[s].psi_bytes / 4; q++)
                    size = fmax(size, fabs((double)ya[q]));
                e = fmax(e / size, worst(b[s].delta, a[s].delta, a[s].psi_bytes) / size);
                if (law->memory)
                    e = fmax(e, fmax(worst(b[s].h, a[s].h, a[s].mem_bytes),
                                     worst(b[s].c, a[s].c, a[s].mem_bytes)));
                most = fmax(most, e);
                if (!(e <= most_allowed))
                    fail_msg("%s%s %s d %u b %u %ux%u, step %d, sample %u: error %g", isa,
                             direct ? " direct" : "", ic_law_arch_info(law->arch)->name, law->d, law->b, h,
                             w, step + 1, s, e);
                assert_true(update_error(before[s], &b[s], law->d, (size_t)h * w, ib[s].gamma) <= 1);
                resync(&b[s], &a[s]);
            }
        }
        for (unsigned s = 0; s < batch; s++) {
            sim_free(&a[s]);
            sim_free(&b[s]);
        }
        free(ya);
        free(yb);
        free(before[0]);
        free(before[1]);
        rig_close(&ref);
        rig_close(&cpu);
        synth_free(law);
    }
    print_message("%s%s: largest difference from the reference %.2g\n", isa, direct ? " direct" : "", most);
}

static void matches_reference(void **state)
{
    (void)state;
    for (unsigned i = 0; ic_law_cpu_isa_known(i); i++) {
        const char *isa = ic_law_cpu_isa_known(i);
        if (!ic_law_cpu_isa_usable(isa)) {
            print_message("skipped: this machine has no %s\n", isa);
            continue;
        }
        against_reference(isa, false, NULL, 0, false);
        against_reference(isa, true, NULL, 0, false);
    }
}

/* Weights in few bits, expanded on the way: in one pass, and one panel of outputs at a time. */
static void few_bits_match_reference(void **state)
{
    static const char *const precisions[] = {"fp16", "bf16", "nf4", "nf4dq"};
    (void)state;
    for (unsigned i = 0; ic_law_cpu_isa_known(i); i++) {
        const char *isa = ic_law_cpu_isa_known(i);
        for (unsigned p = 0; p < 4 && ic_law_cpu_isa_usable(isa); p++) {
            print_message("%s: ", precisions[p]);
            against_reference(isa, p == 3, precisions[p], p % 2, false);
            print_message("%s, products of bfloat16 where there are: ", precisions[p]);
            against_reference(isa, p == 3, precisions[p], p % 2, true);
        }
    }
}

/* What is packed stays in few bits: 4 per parameter, beside biases; and the scratch keeps to its size. */
static void few_bits_stay_few(void **state)
{
    static const struct {
        const char *precision;
        double bits;
    } want[] = {{"nf4", 4}, {"bf16", 16}, {"fp16", 16}};
    (void)state;
    for (unsigned i = 0; i < 3; i++)
        for (size_t expand = 1; expand <= 1 << 22; expand <<= 22) {
            struct ic_law *law = synth_law(IC_LAW_UNET_UNITARY, 8, 32, 1);
            struct ic_law_packed *packed;
            struct ic_err err = {0};
            double values = 0;
            for (size_t k = 0; k < law->weight_count; k++)
                values += law->weights[k].ndim == 4 ? (double)law->weights[k].count : 0;
            requantise(law, want[i].precision, "all");
            assert_int_equal(
                ic_law_cpu_pack(law, &(struct ic_law_cpu_opts){.threads = 1, .expand_bytes = expand},
                                &packed, &err),
                IC_OK);
            const size_t scratch = ic_law_cpu_expand_bytes(packed);
            const double bytes = (double)(ic_law_backend_cpu.packed_bytes(packed) - scratch);
            assert_true(bytes >= values * want[i].bits / 8 && bytes < values * want[i].bits / 8 + 50000);
            /* one panel of the largest layer, 256 inputs wide: 36 points of 256 x 32 */
            assert_true(scratch > 0 && scratch < (expand > 1 ? expand : (size_t)37 * 256 * 33 * 4));
            ic_law_backend_cpu.unpack(&packed);
            synth_free(law);
        }
}

/* Runs `n` simulations (seeds 1..n) for `steps` steps in one batch; returns their final states. */
static void run_batch(const struct ic_law *law, const struct ic_law_cpu_opts *opts, unsigned h, unsigned w,
                      unsigned n, unsigned steps, const unsigned *seeds, struct sim *out)
{
    struct rig r = rig_open(law, opts, h, w, n);
    struct ic_law_io io[16];
    for (unsigned i = 0; i < n; i++) {
        out[i] = sim_new(law, h, w, seeds[i]);
        io[i] = io_of(&out[i], 0.01f * (float)seeds[i]);
    }
    for (unsigned s = 0; s < steps; s++)
        r.be->step(r.exec, io, n);
    rig_close(&r);
}

static void assert_same(const struct sim *a, const struct sim *b)
{
    assert_memory_equal(a->psi, b->psi, a->psi_bytes);
    assert_memory_equal(a->delta, b->delta, a->psi_bytes);
    if (a->h) {
        assert_memory_equal(a->h, b->h, a->mem_bytes);
        assert_memory_equal(a->c, b->c, a->mem_bytes);
    }
}

/* Alone with one thread; in 16, last and first, with 1..4 threads and several micro-batches. */
static void same_bits(const char *isa, size_t which, const char *precision)
{
    struct ic_law *law = synth_law(laws[which].arch, laws[which].d, laws[which].b, 3);
    if (precision)
        requantise(law, precision, "all");
    const unsigned h = laws[which].h, w = laws[which].w;
    static const struct ic_law_cpu_opts ways[] = {{.threads = 1},
                                                  {.threads = 2},
                                                  {.threads = 4, .micro_batch = 3},
                                                  {.threads = 3, .micro_batch = 16},
                                                  {.threads = 2, .micro_batch = 1}};
    struct sim alone[2], many[16];
    for (unsigned i = 0; i < 2; i++)
        run_batch(law, &(struct ic_law_cpu_opts){.isa = isa, .threads = 1}, h, w, 1, 3,
                  (unsigned[]){i ? 16 : 1}, &alone[i]);
    for (unsigned v = 0; v < sizeof ways / sizeof ways[0]; v++) {
        struct ic_law_cpu_opts o = ways[v];
        o.isa = isa;
        unsigned seeds[16];
        for (unsigned i = 0; i < 16; i++)
            seeds[i] = v % 2 ? 16 - i : i + 1;
        run_batch(law, &o, h, w, 16, 3, seeds, many);
        assert_same(&alone[0], &many[v % 2 ? 15 : 0]);
        assert_same(&alone[1], &many[v % 2 ? 0 : 15]);
        for (unsigned i = 0; i < 16; i++)
            sim_free(&many[i]);
    }
    sim_free(&alone[0]);
    sim_free(&alone[1]);
    synth_free(law);
}

static void bits_do_not_depend_on_batch_or_threads(void **state)
{
    (void)state;
    for (unsigned i = 0; ic_law_cpu_isa_known(i); i++)
        if (ic_law_cpu_isa_usable(ic_law_cpu_isa_known(i)))
            for (size_t l = 0; l < LAWS; l++)
                if (laws[l].h * laws[l].w <= (CELLS_MAX < 1024 ? CELLS_MAX / 2 : 1024))
                    same_bits(ic_law_cpu_isa_known(i), l, l % 4 == 1 ? "nf4" : l % 4 == 3 ? "bf16" : NULL);
}

/* A plan for 16 run with fewer, threads changed between steps, two execs of one packed law. */
static void fewer_samples_and_threads(void **state)
{
    (void)state;
    struct ic_law *law = synth_law(IC_LAW_UNET_UNITARY, 3, 13, 5);
    struct rig a = rig_open(law, &(struct ic_law_cpu_opts){.threads = 4}, 20, 20, 16), b = a;
    struct ic_err err = {0};
    assert_int_equal(ic_law_backend_cpu.open(b.packed, b.plan, &b.exec, &err), IC_OK);
    struct sim x = sim_new(law, 20, 20, 1), y = sim_new(law, 20, 20, 1);
    const struct ic_law_io ix = io_of(&x, 0), iy = io_of(&y, 0);
    for (unsigned i = 0; i < 12; i++) {
        ic_law_cpu_set_threads(a.packed, 1 + i % 4);
        a.be->step(a.exec, &ix, 1);
        ic_law_cpu_set_threads(a.packed, 4);
        b.be->step(b.exec, &iy, 1);
    }
    assert_same(&x, &y);
    sim_free(&x);
    sim_free(&y);
    ic_law_backend_cpu.close(&b.exec);
    rig_close(&a);
    synth_free(law);
}

static void a_step_allocates_nothing(void **state)
{
    (void)state;
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    struct ic_law *law = synth_law(IC_LAW_UNET_CONVLSTM, 3, 13, 5);
    struct rig r = rig_open(law, &(struct ic_law_cpu_opts){.threads = 2}, 20, 20, 2);
    struct sim s = sim_new(law, 20, 20, 1);
    const struct ic_law_io io = io_of(&s, 0);
    r.be->step(r.exec, &io, 1);
    const struct mallinfo2 before = mallinfo2();
    for (int i = 0; i < 5; i++)
        r.be->step(r.exec, &io, 1);
    const struct mallinfo2 after = mallinfo2();
    assert_int_equal(before.uordblks, after.uordblks);
    assert_int_equal(before.hblkhd, after.hblkhd);
    assert_int_equal(before.fordblks, after.fordblks);
    sim_free(&s);
    rig_close(&r);
    synth_free(law);
#endif
}

static void isa_by_name(void **state)
{
    (void)state;
    struct ic_law *law = synth_law(IC_LAW_MLP, 1, 4, 5);
    struct ic_law_packed *p;
    struct ic_err err = {0};
    setenv("IC_LAW_ISA", "scalar", 1);
    assert_int_equal(ic_law_cpu_pack(law, &(struct ic_law_cpu_opts){.threads = 1}, &p, &err), IC_OK);
    assert_string_equal(ic_law_cpu_isa(p), "scalar");
    ic_law_backend_cpu.unpack(&p);
    setenv("IC_LAW_ISA", "mmx", 1);
    assert_int_equal(ic_law_cpu_pack(law, &(struct ic_law_cpu_opts){.threads = 1}, &p, &err),
                     IC_BAD_REQUEST);
    assert_null(p);
    assert_non_null(strstr(err.msg, "mmx"));
    unsetenv("IC_LAW_ISA");
    synth_free(law);
}

/* ---- The pool ---------------------------------------------------------------------------------- */

struct tally {
    atomic_uint seen[64];
    unsigned spin, threads;
};

static void count_unit(void *ctx, unsigned unit, unsigned worker)
{
    struct tally *t = ctx;
    assert_true(worker < t->threads);
    for (volatile unsigned i = 0; i < t->spin; i++)
        ;
    atomic_fetch_add(&t->seen[unit], 1);
}

static void pool_does_each_unit_once(void **state)
{
    (void)state;
    for (unsigned threads = 1; threads <= 5; threads += 2) {
        struct ic_cpu_pool *pool;
        struct ic_err err = {0};
        assert_int_equal(ic_cpu_pool_open(threads, &pool, &err), IC_OK);
        ic_cpu_pool_take(pool);
        uint64_t seed = threads;
        for (unsigned round = 0; round < 3000; round++) {
            struct tally t = {.spin = synth_next(&seed) % (round % 100 == 0 ? 60000 : 300),
                              .threads = threads};
            const unsigned units = synth_next(&seed) % 64;
            if (round % 50 == 0)
                ic_cpu_pool_limit(pool, 1 + synth_next(&seed) % threads);
            ic_cpu_pool_run(pool, count_unit, &t, units);
            for (unsigned i = 0; i < 64; i++)
                assert_int_equal(atomic_load(&t.seen[i]), i < units);
        }
        ic_cpu_pool_release(pool);
        ic_cpu_pool_close(&pool);
        assert_null(pool);
    }
}

struct stepper {
    struct rig *r;
    struct sim *s;
};

static void *step_many(void *arg)
{
    struct stepper *t = arg;
    const struct ic_law_io io = io_of(t->s, 0);
    for (int i = 0; i < 20; i++)
        t->r->be->step(t->r->exec, &io, 1);
    return NULL;
}

static void execs_run_side_by_side(void **state)
{
    (void)state;
    struct ic_law *law = synth_law(IC_LAW_UNET, 2, 8, 5);
    struct rig a = rig_open(law, &(struct ic_law_cpu_opts){.threads = 2}, 8, 8, 1), b = a;
    struct ic_err err = {0};
    assert_int_equal(ic_law_backend_cpu.open(b.packed, b.plan, &b.exec, &err), IC_OK);
    struct sim x = sim_new(law, 8, 8, 1), y = sim_new(law, 8, 8, 1);
    struct stepper sa = {&a, &x}, sb = {&b, &y};
    pthread_t t;
    assert_int_equal(pthread_create(&t, NULL, step_many, &sa), 0);
    step_many(&sb);
    pthread_join(t, NULL);
    assert_same(&x, &y);
    sim_free(&x);
    sim_free(&y);
    ic_law_backend_cpu.close(&b.exec);
    rig_close(&a);
    synth_free(law);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pool_does_each_unit_once),
        cmocka_unit_test(matches_reference),
        cmocka_unit_test(few_bits_match_reference),
        cmocka_unit_test(few_bits_stay_few),
        cmocka_unit_test(bits_do_not_depend_on_batch_or_threads),
        cmocka_unit_test(fewer_samples_and_threads),
        cmocka_unit_test(execs_run_side_by_side),
        cmocka_unit_test(a_step_allocates_nothing),
        cmocka_unit_test(isa_by_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
