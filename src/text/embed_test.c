/* Hidden states of a real model: that they depend on the text alone, whatever is decoded beside it and in how many parts,
 * and that logits are the same with and without them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>
#include <cmocka.h>

#include "text/internal.h"

#define MODEL IC_SOURCE_DIR "/demo/models/stories260K-f32.gguf"
#define EMBD 64 /* of that model */
#define V 512
#define N 40
#define SEQS 4
#define BATCH 64
#define NEAR 1e-4f       /* of a vector of length 1; batches of another shape round otherwise */
#define NEAR_LOGIT 3e-2f /* as in kv_test.c */

static struct ic_text_model *m;

static void open_pooling(enum ic_pooling kind)
{
    struct ic_text_config cfg = {.path = MODEL,
                                 .ctx_size = 256,
                                 .kv_size = 1024,
                                 .parallel = SEQS,
                                 .batch = BATCH,
                                 .threads = 1,
                                 .pooling = kind};
    struct ic_err err = {0};

    if (ic_text_model_open(&m, &cfg, &err) != IC_OK)
        fail_msg("%s", err.msg);
}

static int32_t token_at(int32_t seq, int32_t i)
{
    return i ? 3 + (i * 37 + seq * 11) % 500 : 1;
}

/* The vector of one sequence's N tokens, read in slices of `slice`, with as many rows of others beside them. */
static void vector_of(int32_t seq, enum ic_pooling kind, int32_t slice, bool beside, float *out)
{
    struct ic_row rows[2 * BATCH];
    struct ic_pool p;

    assert_int_equal(ic_pool_open(&p, kind, EMBD, N, NULL), IC_OK);
    for (int32_t at = 0; at < N; at += slice) {
        int32_t k = 0, end = at + slice < N ? at + slice : N, own;
        for (int32_t i = at; beside && i < end; i++)
            rows[k++] = (struct ic_row){token_at(seq + 1, i), i, (seq + 1) % SEQS, i + 1 == end, false};
        own = k;
        for (int32_t i = at; i < end; i++)
            rows[k++] = (struct ic_row){token_at(seq, i), i, seq, false, ic_pool_wants(&p, i)};
        assert_int_equal(ic_text_decode(m, rows, k), IC_DECODE_OK);
        for (int32_t i = own; i < k; i++)
            ic_pool_add(&p, rows[i].pos, rows[i].embd ? ic_text_embedding(m, i) : NULL);
    }
    assert_true(ic_pool_result(&p, out));
    ic_pool_deinit(&p);
    for (int32_t i = 0; i < SEQS; i++)
        assert_true(ic_text_seq_rm(m, i, 0));
}

static float apart(const float *a, const float *b, int n)
{
    float most = 0;
    for (int i = 0; i < n; i++)
        most = fmaxf(most, fabsf(a[i] - b[i]));
    return most;
}

static void a_vector_is_that_of_its_text(void **state)
{
    float whole[IC_POOLINGS][EMBD], other[EMBD];

    (void)state;
    open_pooling(IC_POOLING_MEAN);
    assert_int_equal(ic_text_model_info(m)->n_embd, EMBD);
    for (int k = IC_POOLING_MEAN; k < IC_POOLINGS; k++) {
        vector_of(0, (enum ic_pooling)k, N, false, whole[k]);
        vector_of(0, (enum ic_pooling)k, 7, false, other);
        assert_true(apart(whole[k], other, EMBD) < NEAR);
        vector_of(2, (enum ic_pooling)k, N, false, other); /* another text */
        assert_true(k == IC_POOLING_CLS || apart(whole[k], other, EMBD) > 100 * NEAR);
        vector_of(0, (enum ic_pooling)k, 16, true, other);
        assert_true(apart(whole[k], other, EMBD) < NEAR);
    }
    assert_true(apart(whole[IC_POOLING_MEAN], whole[IC_POOLING_LAST], EMBD) > 100 * NEAR);
    assert_true(apart(whole[IC_POOLING_CLS], whole[IC_POOLING_LAST], EMBD) > 100 * NEAR);
    ic_text_model_close(&m);
}

/* Rows that want logits, with and without hidden states in the same decode. */
static void logits_are_the_same_beside_them(void **state)
{
    float want[V];
    struct ic_row rows[2 * N];
    int32_t k;

    (void)state;
    open_pooling(IC_POOLING_LAST);
    for (int round = 0; round < 3; round++) {
        k = 0;
        for (int32_t i = 0; i < N / 2; i++) /* the middle round wants states */
            rows[k++] = (struct ic_row){token_at(1, i), i, 1, false, round == 1};
        for (int32_t i = 0; i < N; i++)
            rows[k++] = (struct ic_row){token_at(0, i), i, 0, i + 1 == N, false};
        assert_int_equal(ic_text_decode(m, rows, k), IC_DECODE_OK);
        assert_true((ic_text_embedding(m, 0) != NULL) == (round == 1));
        const float *got = ic_text_logits(m, k - 1);
        if (round == 0)
            memcpy(want, got, sizeof want);
        assert_true(apart(want, got, V) < NEAR_LOGIT);
        assert_true(ic_text_seq_rm(m, 0, 0) && ic_text_seq_rm(m, 1, 0));
    }
    ic_text_model_close(&m);
}

static void a_whole_batch_may_want_them(void **state)
{
    struct ic_row rows[BATCH];

    (void)state;
    open_pooling(IC_POOLING_MEAN);
    for (int32_t i = 0; i < BATCH; i++)
        rows[i] = (struct ic_row){token_at(0, i), i, 0, true, true};
    assert_int_equal(ic_text_decode(m, rows, BATCH), IC_DECODE_OK);
    for (int32_t i = 0; i < BATCH; i++)
        assert_true(ic_text_embedding(m, i) && ic_text_logits(m, i));
    ic_text_model_close(&m);
}

static void without_the_option_there_are_none(void **state)
{
    struct ic_row row = {1, 0, 0, true, false};

    (void)state;
    open_pooling(IC_POOLING_NONE);
    assert_int_equal(ic_text_model_info(m)->n_embd, 0);
    assert_int_equal(ic_text_decode(m, &row, 1), IC_DECODE_OK);
    assert_null(ic_text_embedding(m, 0));
    ic_text_model_close(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_vector_is_that_of_its_text),
        cmocka_unit_test(logits_are_the_same_beside_them),
        cmocka_unit_test(a_whole_batch_may_want_them),
        cmocka_unit_test(without_the_option_there_are_none),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
