/* Bringing a model up without a GPU: what gives way when memory is short, what is refused, and the table of
 * `plan`. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "base/log.h"
#include "hw/ledger.h"
#include "text/model.h"

#define STORIES IC_SOURCE_DIR "/demo/models/stories260K-f32.gguf"
#define GIB (UINT64_C(1) << 30)

static struct ic_err err;
static struct ic_text_model *m;
static char table[8192];

static struct ic_text_config config(void)
{
    return (struct ic_text_config){
        .path = STORIES, .parallel = 4, .threads = 1, .gpu_layers = IC_GPU_LAYERS_AUTO};
}

static void keep_line(void *arg, const char *text)
{
    (void)arg;
    strncat(table, text, sizeof table - 2 - strlen(table));
    strcat(table, "\n");
}

static enum ic_status plan(const struct ic_text_config *cfg)
{
    table[0] = 0;
    err = (struct ic_err){0};
    return ic_text_plan(cfg, keep_line, NULL, &err);
}

static void shows(const char *text)
{
    if (!strstr(table, text))
        fail_msg("%s is not in\n%s", text, table);
}

static void no_back_ends_there(void **state)
{
    struct ic_text_config cfg = config();

    (void)state;
    cfg.backends = "/nowhere";
    assert_int_equal(plan(&cfg), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "/nowhere"));
    cfg.backends = NULL; /* and a later call may do better */
    assert_int_equal(plan(&cfg), IC_OK);
}

static void a_plan_without_a_gpu(void **state)
{
    struct ic_text_config cfg = config();

    (void)state;
    assert_int_equal(plan(&cfg), IC_OK);
    shows("model: llama, 5 layers");
    shows("KV cache, 2048 tokens");
    shows("compute buffers (measured)");
    shows("decided: all on the CPU");
    cfg.vram_max = 3 * GIB;
    cfg.vram_margin = GIB / 2;
    assert_int_equal(plan(&cfg), IC_OK);
    shows("GPU (assumed): 3.00 GiB free");
    shows("decided: 6 of 6 layers");
    cfg.gpu_layers = 2;
    assert_int_equal(plan(&cfg), IC_OK);
    shows("layer 4 and the output");
    shows("decided: 2 of 6 layers");
    cfg.vram_max = GIB / 4; /* less than the margin: asked for, and does not fit */
    assert_int_equal(plan(&cfg), IC_OK);
    shows("MISSING");
    cfg.gpu_layers = IC_GPU_LAYERS_AUTO;
    assert_int_equal(plan(&cfg), IC_OK);
    shows("decided: 0 of 6 layers");
    cfg.path = IC_SOURCE_DIR "/CMakeLists.txt";
    assert_int_equal(plan(&cfg), IC_BAD_REQUEST);
}

/* 640 bytes a token: 2^26 of them are 40 GiB. */
static void more_than_the_machine_has(void **state)
{
    struct ic_text_config cfg = config();
    uint64_t available, total;

    (void)state;
    if (!ic_host_memory(&available, &total) || total > 39 * GIB)
        skip();
    cfg.ctx_size = 1 << 24; /* the cache is four of these, unless that is too much */
    assert_int_equal(plan(&cfg), available > 11 * GIB || total > 11 * GIB ? IC_OK : IC_OOM);
    assert_null(strstr(table, "67108864 tokens"));
    cfg.kv_size = 1 << 26;
    assert_int_equal(plan(&cfg), IC_OOM);
    assert_non_null(strstr(err.msg, "--kv-size"));
    assert_int_equal(ic_text_model_open(&m, &cfg, &err), IC_OOM);
    assert_null(m);
}

static enum ic_status open_failing(const struct ic_text_config *cfg, const char *times)
{
    setenv("IC_TEST_LOAD_FAIL", times, 1);
    err = (struct ic_err){0};
    enum ic_status st = ic_text_model_open(&m, cfg, &err);
    unsetenv("IC_TEST_LOAD_FAIL");
    return st;
}

static void sizes_give_way(void **state)
{
    /* the cache 2048 → 1024 → 512, then the batch 512 → … → 64; the context is at its smallest */
    static const struct {
        const char *fails;
        int32_t kv, batch;
    } rows[] = {{"0", 2048, 512}, {"1", 1024, 512}, {"2", 512, 512}, {"3", 512, 256}, {"5", 512, 64}};
    struct ic_text_config cfg = config();

    (void)state;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        assert_int_equal(open_failing(&cfg, rows[i].fails), IC_OK);
        const struct ic_text_info *info = ic_text_model_info(m);
        assert_int_equal(info->kv_size, rows[i].kv);
        assert_int_equal(info->batch, rows[i].batch);
        assert_int_equal(info->ctx_size, 512);
        ic_text_model_close(&m);
    }
    assert_int_equal(open_failing(&cfg, "6"), IC_OOM);
    assert_null(m);
}

static void sizes_asked_for_do_not(void **state)
{
    struct ic_text_config cfg = config();

    (void)state;
    cfg.ctx_size = 512;
    cfg.kv_size = 2048;
    cfg.batch = 512;
    assert_int_equal(open_failing(&cfg, "1"), IC_OOM);
    cfg.batch = 0;
    assert_int_equal(open_failing(&cfg, "1"), IC_OK);
    assert_int_equal(ic_text_model_info(m)->kv_size, 2048);
    assert_int_equal(ic_text_model_info(m)->batch, 256);
    ic_text_model_close(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_back_ends_there),        cmocka_unit_test(a_plan_without_a_gpu),
        cmocka_unit_test(more_than_the_machine_has), cmocka_unit_test(sizes_give_way),
        cmocka_unit_test(sizes_asked_for_do_not),
    };
    ic_log_set_level(IC_LOG_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
