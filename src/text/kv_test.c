/* What the prefix cache asks of llama.cpp, on a real model: cells shared between sequences, parts of them saved to host
 * memory and brought back, in every type of cache. Each must give the logits that computing it all in one gives; batches of
 * another shape round differently, so to a tolerance. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>
#include <unistd.h>
#include <cmocka.h>

#include "text/internal.h"

#define MODEL IC_SOURCE_DIR "/demo/models/stories260K-f32.gguf"
#define LARGE IC_SOURCE_DIR "/.models/tinyllama-1.1b-chat-iq2_xxs.gguf"
#define N 120 /* tokens of the text */
#define CUT 70
/* Flash attention on the CPU sums in half precision and in the cells' order, so the same text in other cells gives logits that
 * differ by up to 0.006 (seen). */
#define NEAR 0.03f
/* quantised, in other batches or other cells: 0.38 seen; both weights and cache round coarsely */
#define NEAR_OTHERWISE 0.8f

static struct ic_text_model *m;
static int32_t token[N + 1];
static float *want; /* logits behind all of the text */

/* Quantised caches need heads of a multiple of 32, which stories260K has not (8). */
static const char *model_for(const char *type)
{
    return strcmp(type, "f16") != 0 ? LARGE : MODEL;
}

static bool can_open(const char *type)
{
    if (access(model_for(type), R_OK) == 0)
        return true;
    printf("skipped: a cache in %s, for want of %s (tools/fetch-model.sh)\n", type, model_for(type));
    return false;
}

static void open_as(const char *type)
{
    struct ic_text_config cfg = {.path = model_for(type),
                                 .ctx_size = 256,
                                 .kv_size = 512,
                                 .parallel = 4,
                                 .batch = 128,
                                 .threads = 1,
                                 .type_k = type,
                                 .type_v = type};
    struct ic_err err = {0};

    if (ic_text_model_open(&m, &cfg, &err) != IC_OK)
        fail_msg("%s", err.msg);
    for (int i = 0; i <= N; i++)
        token[i] = i ? 3 + (i * 37) % 500 : 1;
}

static void close_it(void)
{
    free(want);
    want = NULL;
    ic_text_model_close(&m);
}

/* Decodes text[from..to) into seq; the logits of its last row. */
static const float *decode(int32_t seq, int32_t from, int32_t to)
{
    struct ic_row rows[N + 1];

    for (int32_t i = from; i < to; i++)
        rows[i - from] = (struct ic_row){token[i], i, seq, i == to - 1, false};
    assert_int_equal(ic_text_decode(m, rows, to - from), IC_DECODE_OK);
    return ic_text_logits(m, to - from - 1);
}

static void learn_what_is_wanted(void)
{
    size_t bytes = sizeof *want * (size_t)ic_text_model_info(m)->n_vocab;
    decode(0, 0, CUT);
    decode(0, CUT, N - 1);
    const float *l = decode(0, N - 1, N);

    want = malloc(bytes);
    assert_non_null(want);
    memcpy(want, l, bytes);
}

static float distance(const float *l)
{
    float most = 0;
    for (int32_t i = 0; i < ic_text_model_info(m)->n_vocab; i++)
        most = fmaxf(most, fabsf(l[i] - want[i]));
    if (most >= NEAR)
        printf("a logit differs by %g\n", (double)most);
    return most;
}

static const char *const types[] = {"f16", "q8_0", "q4_0"};

static void shared_cells_say_the_same(void **state)
{
    (void)state;
    for (size_t t = 0; t < 3; t++) {
        if (!can_open(types[t]))
            continue;
        open_as(types[t]);
        learn_what_is_wanted();
        ic_text_seq_cp(m, 0, 1, 0, CUT);
        decode(1, CUT, N - 1);
        assert_true(distance(decode(1, N - 1, N)) < NEAR);
        /* They stay when the first holder goes, and nobody else's are there. */
        assert_true(ic_text_seq_rm(m, 0, 0));
        assert_true(ic_text_seq_rm(m, 1, CUT));
        decode(1, CUT, N - 1);
        assert_true(distance(decode(1, N - 1, N)) < NEAR);
        close_it();
    }
}

/* 512 cells hold a text of 120 four times, but one that is shared 30 times over. */
static void shared_cells_take_no_room(void **state)
{
    (void)state;
    open_as("f16");
    learn_what_is_wanted();
    for (int32_t s = 1; s < 30; s++) {
        ic_text_seq_cp(m, 0, s, 0, N - 1);
        assert_true(distance(decode(s, N - 1, N)) < NEAR);
    }
    close_it();
}

static void what_was_saved_comes_back(void **state)
{
    (void)state;
    for (size_t t = 0; t < 3; t++) {
        void *all, *part;
        if (!can_open(types[t]))
            continue;
        open_as(types[t]);
        learn_what_is_wanted();
        assert_true(ic_text_seq_rm(m, 0, N - 1));
        size_t n_all = ic_text_seq_save(m, 0, 0, N - 1, SIZE_MAX, &all);
        size_t n_part = ic_text_seq_save(m, 0, CUT, N - 1, SIZE_MAX, &part);
        assert_true(n_all > n_part && n_part > 0);
        void *none;
        assert_int_equal(ic_text_seq_save(m, 0, 0, N - 1, n_all - 1, &none), 0); /* more than allowed */
        assert_null(none);
        assert_true(ic_text_seq_rm(m, 0, 0));

        assert_true(ic_text_seq_load(m, 2, 0, 0, N - 1, all, n_all));
        assert_true(distance(decode(2, N - 1, N)) < NEAR);
        /* A part behind what is there, all of it and its beginning only. */
        ic_text_seq_cp(m, 2, 3, 0, CUT);
        assert_true(ic_text_seq_load(m, 3, CUT, CUT, N - 1, part, n_part));
        assert_true(distance(decode(3, N - 1, N)) < NEAR);
        assert_true(ic_text_seq_rm(m, 3, CUT));
        assert_true(ic_text_seq_load(m, 3, CUT, CUT, CUT + 20, part, n_part));
        decode(3, CUT + 20, N - 1);
        assert_true(distance(decode(3, N - 1, N)) < (t ? NEAR_OTHERWISE : NEAR));
        /* Its end, behind a longer beginning. */
        ic_text_seq_cp(m, 2, 1, 0, CUT + 9);
        assert_true(ic_text_seq_load(m, 1, CUT, CUT + 9, N - 1, part, n_part));
        assert_true(distance(decode(1, N - 1, N)) < (t ? NEAR_OTHERWISE : NEAR));
        /* And in another instance, after the model was closed. */
        float *kept = want;
        want = NULL;
        close_it();
        open_as(types[t]);
        want = kept;
        assert_true(ic_text_seq_load(m, 0, 0, 0, N - 1, all, n_all));
        assert_true(distance(decode(0, N - 1, N)) < NEAR);
        close_it();
        free(all);
        free(part);
    }
}

static void what_does_not_fit_is_refused(void **state)
{
    void *data;

    (void)state;
    open_as("f16");
    learn_what_is_wanted();
    size_t n = ic_text_seq_save(m, 0, 0, N, SIZE_MAX, &data);
    assert_true(n > 0);
    assert_false(ic_text_seq_load(m, 1, 0, 0, N, data, n / 2)); /* cut short */
    for (int32_t s = 1; s < 4; s++)
        decode(s, 0, N); /* 480 of 512 cells */
    assert_false(ic_text_seq_load(m, 4, 0, 0, N, data, n));
    assert_true(ic_text_seq_rm(m, 4, 0));
    assert_true(ic_text_seq_rm(m, 0, N - 1)); /* nobody else has suffered */
    assert_true(distance(decode(0, N - 1, N)) < NEAR);
    close_it();
    if (can_open("q8_0")) { /* of another model and kind */
        open_as("q8_0");
        assert_false(ic_text_seq_load(m, 1, 0, 0, N, data, n));
        close_it();
    }
    free(data);
}

static void unknown_types_are_refused(void **state)
{
    struct ic_text_config cfg = {.path = MODEL, .parallel = 1, .type_k = "q5_7"};
    struct ic_err err = {0};

    (void)state;
    assert_int_equal(ic_text_model_open(&m, &cfg, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "q8_0"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shared_cells_say_the_same), cmocka_unit_test(shared_cells_take_no_room),
        cmocka_unit_test(what_was_saved_comes_back), cmocka_unit_test(what_does_not_fit_is_refused),
        cmocka_unit_test(unknown_types_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
