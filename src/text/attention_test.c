/* Attention of few rows, beside ggml's own of the same graph. Keys, values and queries are random; what differs is how many
 * rows and heads there are, what the rows may see, and by how many threads it is computed. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include <ggml.h>
#include <ggml-backend.h>

#include "text/attention.h"
#include "text/internal.h"

/* ggml sums in 16 bits, whose last place is 2^-11 of what is summed so far: seen 2.6e-3 for values of size 1. */
#define NEAR 6e-3f
#define HIDDEN 0xfc00 /* -inf */
#define NOT_A_NUMBER 0x7e00

struct scene {
    int64_t d, heads, groups, rows, cells;
    int32_t threads;
    bool (*sees)(const struct scene *s, int64_t row, int64_t cell);
};

struct made {
    struct ggml_context *ctx;
    ggml_backend_buffer_t buffer;
    struct ggml_tensor *q, *k, *v, *mask, *out;
    struct ggml_cgraph *graph;
};

static ggml_backend_t cpu;
static void (*set_threads)(ggml_backend_t, int);

static uint32_t seed;
static float noise(void) /* within 1 of 0 */
{
    seed = seed * 1664525u + 1013904223u;
    return (float)(seed >> 8) / (float)(1 << 23) - 1;
}

static struct made make(const struct scene *s)
{
    struct made m = {
        .ctx = ggml_init((struct ggml_init_params){
            .mem_size = 64 * ggml_tensor_overhead() + ggml_graph_overhead(), .no_alloc = true})};

    m.q = ggml_new_tensor_3d(m.ctx, GGML_TYPE_F32, s->d, s->rows, s->heads);
    m.k = ggml_new_tensor_3d(m.ctx, GGML_TYPE_F16, s->d, s->cells, s->groups);
    m.v = ggml_new_tensor_3d(m.ctx, GGML_TYPE_F16, s->d, s->cells, s->groups);
    m.mask = ggml_new_tensor_2d(m.ctx, GGML_TYPE_F16, s->cells, s->rows);
    m.out = ggml_flash_attn_ext(m.ctx, m.q, m.k, m.v, m.mask, 1 / sqrtf((float)s->d), 0, 0);
    m.graph = ggml_new_graph(m.ctx);
    ggml_build_forward_expand(m.graph, m.out);
    m.buffer = ggml_backend_alloc_ctx_tensors(m.ctx, cpu);
    assert_non_null(m.buffer);
    seed = 7;
    for (int64_t i = 0; i < ggml_nelements(m.q); i++)
        ((float *)m.q->data)[i] = 4 * noise();
    for (int64_t i = 0; i < ggml_nelements(m.k); i++) {
        ((ggml_fp16_t *)m.k->data)[i] = ggml_fp32_to_fp16(noise());
        ((ggml_fp16_t *)m.v->data)[i] = ggml_fp32_to_fp16(noise());
    }
    for (int64_t r = 0; r < s->rows; r++)
        for (int64_t c = 0; c < s->cells; c++)
            ((ggml_fp16_t *)m.mask->data)[r * s->cells + c] = s->sees(s, r, c) ? 0 : HIDDEN;
    return m;
}

static void drop(struct made *m)
{
    ggml_backend_buffer_free(m->buffer);
    ggml_free(m->ctx);
}

static float *compute(struct made *m, int32_t threads)
{
    float *out = malloc(ggml_nbytes(m->out));

    assert_non_null(out);
    set_threads(cpu, threads);
    memset(m->out->data, 0xff, ggml_nbytes(m->out));
    assert_int_equal(ggml_backend_graph_compute(cpu, m->graph), GGML_STATUS_SUCCESS);
    memcpy(out, m->out->data, ggml_nbytes(m->out));
    return out;
}

/* ---- what rows may see ---------------------------------------------------------------------------- */

static bool all(const struct scene *s, int64_t row, int64_t cell)
{
    (void)s, (void)row, (void)cell;
    return true;
}

static bool causal(const struct scene *s, int64_t row, int64_t cell)
{
    return cell < s->cells - 300 + row;
}

/* cells of many sequences among each other, one row each */
static bool own(const struct scene *s, int64_t row, int64_t cell)
{
    return cell % s->rows == row;
}

/* a window, which leaves whole blocks out; the second row sees nothing */
static bool window(const struct scene *s, int64_t row, int64_t cell)
{
    (void)s;
    return row != 1 && cell >= 190 + row && cell < 260 + row;
}

static bool one_cell(const struct scene *s, int64_t row, int64_t cell)
{
    return cell == s->cells - 1 - row * 67;
}

/* ---- tests ---------------------------------------------------------------------------------------- */

static void as_ggml(void **state)
{
    static const struct scene scenes[] = {
        {64, 32, 4, 20, 1280, 2, causal}, {64, 32, 4, 1, 1280, 2, all},
        {64, 32, 4, 63, 1280, 1, causal}, {128, 16, 8, 8, 1536, 2, own},
        {80, 8, 8, 5, 1280, 2, causal},   {256, 8, 1, 3, 1280, 2, all},
        {8, 8, 4, 7, 1280, 1, own},       {64, 8, 2, 4, 1536, 2, window},
        {96, 64, 1, 9, 1280, 2, causal},  {64, 4, 4, 6, 1280, 2, one_cell},
        {64, 40, 8, 12, 1280, 2, window},
    };

    (void)state;
    for (size_t i = 0; i < sizeof scenes / sizeof *scenes; i++) {
        const struct scene *s = &scenes[i];
        struct made m = make(s);
        float *want = compute(&m, s->threads), worst = 0;
        assert_true(ic_attention_take(m.out, s->threads));
        assert_int_equal(m.out->op, GGML_OP_CUSTOM);
        float *got = compute(&m, s->threads);
        for (int64_t e = 0; e < ggml_nelements(m.out); e++) {
            float off = fabsf(want[e] - got[e]);
            worst = off <= worst ? worst : off; /* NaN counts */
        }
        printf("heads of %d, %d of %d, %d rows, %d cells: at most %.2g apart\n", (int)s->d, (int)s->heads,
               (int)s->groups, (int)s->rows, (int)s->cells, (double)worst);
        assert_true(worst < NEAR);
        free(want);
        free(got);
        drop(&m);
    }
}

/* By the formula, in doubles: closer than ggml is. */
static void as_defined(void **state)
{
    const struct scene s = {64, 8, 2, 6, 1536, 2, causal};
    struct made m = make(&s);
    double worst = 0;

    (void)state;
    assert_true(ic_attention_take(m.out, 2));
    float *got = compute(&m, 2);
    for (int64_t r = 0; r < s.rows; r++)
        for (int64_t h = 0; h < s.heads; h++) {
            const float *q = (float *)m.q->data + (h * s.rows + r) * s.d;
            double p[1536], sum = 0, out[64] = {0};
            for (int64_t c = 0; c < s.cells; c++) {
                const ggml_fp16_t *k = (ggml_fp16_t *)m.k->data + (h / 4 * s.cells + c) * s.d;
                double dot = 0;
                for (int64_t i = 0; i < s.d; i++)
                    dot += (double)q[i] * (double)ggml_fp16_to_fp32(k[i]);
                sum += p[c] = causal(&s, r, c) ? exp(dot / 8) : 0;
            }
            for (int64_t c = 0; c < s.cells; c++)
                for (int64_t i = 0; i < s.d; i++)
                    out[i] += p[c] / sum *
                              (double)ggml_fp16_to_fp32(
                                  ((ggml_fp16_t *)m.v->data)[(h / 4 * s.cells + c) * s.d + i]);
            for (int64_t i = 0; i < s.d; i++)
                worst = fmax(worst, fabs(out[i] - (double)got[(r * s.heads + h) * s.d + i]));
        }
    printf("at most %.2g from the formula\n", worst);
    assert_true(worst < 1e-5);
    free(got);
    drop(&m);
}

/* Another sequence's cells may hold anything: a row that must not see them is what it is without. */
static void hidden_cells_have_no_part(void **state)
{
    const struct scene s = {64, 8, 2, 4, 1280, 2, own};
    struct made m = make(&s);

    (void)state;
    assert_true(ic_attention_take(m.out, 2));
    float *want = compute(&m, 2);
    for (int64_t g = 0; g < s.groups; g++)
        for (int64_t c = 3; c < s.cells; c += 4) /* what the last row sees */
            for (int64_t i = 0; i < s.d; i++) {
                ((ggml_fp16_t *)m.k->data)[(g * s.cells + c) * s.d + i] = NOT_A_NUMBER;
                ((ggml_fp16_t *)m.v->data)[(g * s.cells + c) * s.d + i] = i % 2 ? NOT_A_NUMBER : HIDDEN;
            }
    float *got = compute(&m, 2);
    assert_memory_equal(want, got, (size_t)(3 * s.heads * s.d) * sizeof(float));
    assert_true(isnan(got[3 * s.heads * s.d + 1]));
    free(want);
    free(got);
    drop(&m);
}

/* A row is the same to the last bit whoever is computed beside it, and with any number of threads. */
static void company_does_not_matter(void **state)
{
    const struct scene many = {64, 32, 4, 24, 1536, 1, causal};
    struct made m = make(&many);

    (void)state;
    assert_true(ic_attention_take(m.out, 2));
    float *want = compute(&m, 1), *two = compute(&m, 2);
    assert_memory_equal(want, two, ggml_nbytes(m.out));
    for (int64_t r = 0; r < many.rows; r++) { /* rows r and r + 1 alone */
        struct scene few = many;
        few.rows = r + 1 < many.rows ? 2 : 1;
        struct made one = make(&few);
        memcpy(one.k->data, m.k->data, ggml_nbytes(m.k));
        memcpy(one.v->data, m.v->data, ggml_nbytes(m.v));
        for (int64_t i = 0; i < few.rows; i++) {
            memcpy((char *)one.mask->data + (size_t)i * one.mask->nb[1],
                   (char *)m.mask->data + (size_t)(r + i) * m.mask->nb[1], m.mask->nb[1]);
            for (int64_t h = 0; h < many.heads; h++)
                memcpy((char *)one.q->data + (size_t)h * one.q->nb[2] + (size_t)i * one.q->nb[1],
                       (char *)m.q->data + (size_t)h * m.q->nb[2] + (size_t)(r + i) * m.q->nb[1],
                       m.q->nb[1]);
        }
        assert_true(ic_attention_take(one.out, 2));
        float *got = compute(&one, 2);
        assert_memory_equal(got, want + r * many.heads * many.d, ggml_nbytes(one.out));
        free(got);
        drop(&one);
    }
    free(want);
    free(two);
    drop(&m);
}

static void others_are_left_alone(void **state)
{
    const struct scene fits = {64, 8, 4, 4, 1280, 2, all};
    struct scene s[6];

    (void)state;
    for (int i = 0; i < 6; i++)
        s[i] = fits;
    s[0].rows = 64;
    s[1].cells = 768;
    s[2].d = 264;
    s[3].d = 12;
    s[4].heads = 512, s[4].groups = 4;
    s[5].rows = 1, s[5].threads = 5; /* four groups */
    for (int i = 0; i < 6; i++) {
        struct made m = make(&s[i]);
        assert_false(ic_attention_take(m.out, s[i].threads));
        assert_int_equal(m.out->op, GGML_OP_FLASH_ATTN_EXT);
        drop(&m);
    }
    struct made m = make(&fits);
    ((float *)m.out->op_params)[1] = 8; /* ALiBi */
    assert_false(ic_attention_take(m.out, 2));
    ((float *)m.out->op_params)[1] = 0;
    ((float *)m.out->op_params)[2] = 30; /* capped */
    assert_false(ic_attention_take(m.out, 2));
    ((float *)m.out->op_params)[2] = 0;
    m.out->src[4] = m.q; /* sinks */
    assert_false(ic_attention_take(m.out, 2));
    m.out->src[4] = NULL;
    m.out->src[3] = NULL;
    assert_false(ic_attention_take(m.out, 2));
    m.out->src[3] = m.mask;
    assert_true(ic_attention_take(m.out, 2));
    assert_false(ic_attention_take(m.out, 2)); /* it is one already */
    drop(&m);
}

static int set_up(void **state)
{
    struct ic_err err;

    (void)state;
    if (ic_text_load_backends(NULL, &err) != IC_OK)
        return -1;
    ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    *(void **)&set_threads =
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), "ggml_backend_set_n_threads");
    cpu = ggml_backend_dev_init(dev, NULL);
    struct scene s = {64, 8, 4, 4, 1280, 2, all};
    if (!cpu || !set_threads)
        return -1;
    struct made m = make(&s);
    bool taken = ic_attention_take(m.out, 2);
    drop(&m);
    if (!taken) {
        puts("skipped: a processor without AVX2, where ggml computes all attention");
        exit(77);
    }
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    ggml_backend_free(cpu);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(as_ggml),
        cmocka_unit_test(as_defined),
        cmocka_unit_test(hidden_cells_have_no_part),
        cmocka_unit_test(company_does_not_matter),
        cmocka_unit_test(others_are_left_alone),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
