/* The split between CPU and GPU for real: Vulkan on a software GPU (lavapipe). Skipped, with the reason,
 * where there is no back end (tools/deps.sh vulkan) or no driver.
 *
 * IC_TEST_BACKENDS: a folder of back ends in place of .deps/vulkan. IC_TEST_MODEL: a larger model, tried
 * too. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>
#include <ggml-backend.h>

#include "hw/ledger.h"
#include "text/model.h"

#define MIB (UINT64_C(1) << 20)
#define STORIES IC_SOURCE_DIR "/demo/models/stories260K-f32.gguf"
#define SKIPPED 77 /* what ctest takes for "skipped" */
#define ANSWER_MAX 1024

static const char *backends;
static struct ic_err err;

static struct ic_text_config config(const char *path, int32_t layers)
{
    return (struct ic_text_config){.path = path,
                                   .ctx_size = 128,
                                   .kv_size = 256,
                                   .parallel = 1,
                                   .batch = 32,
                                   .threads = 1,
                                   .gpu_layers = layers,
                                   .backends = backends};
}

static int32_t best(const float *logits, int32_t n)
{
    int32_t at = 0;

    for (int32_t i = 1; i < n; i++)
        at = logits[i] > logits[at] ? i : at;
    return at;
}

/* The greedy continuation of `prompt`. */
static void answer(struct ic_text_model *m, const char *prompt, int32_t tokens, char *out)
{
    struct ic_buf text = {0};
    struct ic_row rows[32] = {0};
    int32_t *ids, n;

    assert_int_equal(ic_text_tokenize(m, prompt, strlen(prompt), true, false, 32, &ids, &n, &err), IC_OK);
    for (int32_t i = 0; i < n; i++)
        rows[i] = (struct ic_row){ids[i], i, 0, i == n - 1, false};
    free(ids);
    for (int32_t made = 0, pos = n; made < tokens; made++, pos++) {
        assert_int_equal(ic_text_decode(m, rows, n), IC_DECODE_OK);
        int32_t id = best(ic_text_logits(m, n - 1), ic_text_model_info(m)->n_vocab);
        ic_text_piece(m, id, &text);
        rows[0] = (struct ic_row){id, pos, 0, true, false};
        n = 1;
    }
    assert_true(text.len < ANSWER_MAX);
    memcpy(out, text.data, text.len);
    out[text.len] = 0;
    ic_buf_deinit(&text);
}

/* Opens, answers, closes; returns the layers that were placed on the GPU. */
static int32_t run(const struct ic_text_config *cfg, const char *prompt, int32_t tokens, char *out)
{
    struct ic_text_model *m;

    err = (struct ic_err){0};
    if (ic_text_model_open(&m, cfg, &err) != IC_OK)
        fail_msg("%s", err.msg);
    int32_t layers = ic_text_model_info(m)->gpu_layers;
    answer(m, prompt, tokens, out);
    ic_text_model_close(&m);
    return layers;
}

static void the_same_text_however_it_is_split(void **state)
{
    static const int32_t layers[] = {1, 3, IC_GPU_LAYERS_ALL, IC_GPU_LAYERS_AUTO}, placed[] = {1, 3, 6, 6};
    char cpu[ANSWER_MAX], gpu[ANSWER_MAX];
    struct ic_text_config cfg = config(STORIES, 0);

    (void)state;
    assert_int_equal(run(&cfg, "Once upon a time", 40, cpu), 0);
    assert_non_null(strstr(cpu, "there was a little girl named Lily"));
    for (size_t i = 0; i < sizeof layers / sizeof *layers; i++) {
        cfg.gpu_layers = layers[i];
        assert_int_equal(run(&cfg, "Once upon a time", 40, gpu), placed[i]);
        assert_string_equal(gpu, cpu);
    }
}

static void a_cap_yields_the_planned_split(void **state)
{
    struct ic_text_config cfg = config(STORIES, IC_GPU_LAYERS_AUTO);
    struct ic_ledger_item items[IC_LEDGER_ITEMS_MAX];
    struct ic_text_model *m;
    char text[ANSWER_MAX];
    int32_t before = -1, splits = 0;

    (void)state;
    for (cfg.vram_max = MIB / 2; before < 6 && cfg.vram_max < 64 * MIB; cfg.vram_max += cfg.vram_max / 4) {
        struct ic_err e = {0};
        assert_int_equal(ic_ledger_open(&cfg.ledger, &e), IC_OK);
        assert_int_equal(ic_text_model_open(&m, &cfg, &err), IC_OK);
        int32_t layers = ic_text_model_info(m)->gpu_layers;
        assert_true(layers >= before); /* a larger cap never means fewer */
        splits += layers > before;
        before = layers;
        uint64_t taken = 0;
        for (int i = 0, n = ic_ledger_items(cfg.ledger, items, IC_LEDGER_ITEMS_MAX); i < n; i++)
            taken += items[i].bytes;
        assert_int_equal(taken != 0, layers != 0);
        assert_true(taken <= cfg.vram_max); /* what llama.cpp has really allocated */
        answer(m, "Once upon a time", 8, text);
        assert_string_equal(text, ", there was a little girl");
        ic_text_model_close(&m);
        assert_int_equal(ic_ledger_items(cfg.ledger, items, IC_LEDGER_ITEMS_MAX), 0);
        ic_ledger_close(&cfg.ledger);
    }
    assert_int_equal(before, 6);
    assert_true(splits >= 2);
}

static void what_the_law_engine_holds_is_not_taken(void **state)
{
    struct ic_text_config cfg = config(STORIES, IC_GPU_LAYERS_AUTO);
    struct ic_ledger_device d[IC_LEDGER_DEVICES_MAX];
    struct ic_text_model *m;

    (void)state;
    cfg.vram_max = 64 * MIB;
    assert_int_equal(ic_ledger_open(&cfg.ledger, &err), IC_OK);
    assert_int_equal(ic_text_model_open(&m, &cfg, &err), IC_OK);
    assert_int_equal(ic_text_model_info(m)->gpu_layers, 6);
    ic_text_model_close(&m);
    assert_int_equal(ic_ledger_devices(cfg.ledger, d, IC_LEDGER_DEVICES_MAX), 1);
    assert_int_equal(ic_ledger_reserve(cfg.ledger, 0, "law", "plans", 64 * MIB - 1024, false, &err), IC_OK);
    assert_int_equal(ic_text_model_open(&m, &cfg, &err), IC_OK);
    assert_int_equal(ic_text_model_info(m)->gpu_layers, 0);
    ic_text_model_close(&m);
    ic_ledger_close(&cfg.ledger);
}

static void failing_allocations_step_down_to_the_cpu(void **state)
{
    struct ic_text_config cfg = config(STORIES, IC_GPU_LAYERS_AUTO);
    char cpu[ANSWER_MAX], text[ANSWER_MAX];

    (void)state;
    cfg.gpu_layers = 0;
    run(&cfg, "Once upon a time", 20, cpu);
    cfg.gpu_layers = IC_GPU_LAYERS_AUTO;
    setenv("IC_TEST_LOAD_FAIL", "2", 1);
    assert_int_equal(run(&cfg, "Once upon a time", 20, text), 3); /* 6, 4, 3 */
    assert_string_equal(text, cpu);
    setenv("IC_TEST_LOAD_FAIL", "5", 1);
    assert_int_equal(run(&cfg, "Once upon a time", 20, text), 0);
    assert_string_equal(text, cpu);
    unsetenv("IC_TEST_LOAD_FAIL");
}

static void the_larger_model_too(void **state)
{
    static const int32_t layers[] = {8, IC_GPU_LAYERS_ALL};
    const char *path = getenv("IC_TEST_MODEL");
    char cpu[ANSWER_MAX], gpu[ANSWER_MAX];

    (void)state;
    if (!path || access(path, R_OK) != 0)
        skip();
    struct ic_text_config cfg = config(path, 0);
    run(&cfg, "The capital of France is", 8, cpu);
    for (size_t i = 0; i < sizeof layers / sizeof *layers; i++) {
        cfg.gpu_layers = layers[i];
        assert_true(run(&cfg, "The capital of France is", 8, gpu) >= layers[i]);
        assert_string_equal(gpu, cpu);
    }
}

static bool has_gpu(void)
{
    for (size_t i = 0; i < ggml_backend_dev_count(); i++)
        if (ggml_backend_dev_type(ggml_backend_dev_get(i)) != GGML_BACKEND_DEVICE_TYPE_CPU)
            return true;
    return false;
}

static void no_line(void *arg, const char *text)
{
    (void)arg;
    (void)text;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_same_text_however_it_is_split),
        cmocka_unit_test(a_cap_yields_the_planned_split),
        cmocka_unit_test(what_the_law_engine_holds_is_not_taken),
        cmocka_unit_test(failing_allocations_step_down_to_the_cpu),
        cmocka_unit_test(the_larger_model_too),
    };
    char library[512];

    backends = getenv("IC_TEST_BACKENDS") ? getenv("IC_TEST_BACKENDS") : IC_SOURCE_DIR "/.deps/vulkan/lib";
    snprintf(library, sizeof library, "%s/libggml-vulkan.so", backends);
    if (access(library, R_OK) != 0) {
        printf("skipped: %s is missing (tools/deps.sh vulkan)\n", library);
        return SKIPPED;
    }
    setenv("GGML_VK_VISIBLE_DEVICES", "0", 1); /* without it ggml leaves software GPUs alone */
    struct ic_text_config cfg = config(STORIES, 0);
    if (ic_text_plan(&cfg, no_line, NULL, &err) != IC_OK || !has_gpu()) {
        printf("skipped: no Vulkan device (mesa-vulkan-drivers); %s\n", err.msg);
        return SKIPPED;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
