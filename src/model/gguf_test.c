/* Facts of real and made-up GGUF files, and what happens to files that lie. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>
#include <ggml.h>
#include <gguf.h>

#include "model/gguf.h"

#define STORIES IC_SOURCE_DIR "/demo/models/stories260K-f32.gguf"
#define TINYLLAMA IC_SOURCE_DIR "/.models/tinyllama-1.1b-chat-iq2_xxs.gguf"

static struct ic_gguf_facts facts;
static struct ic_err err;
static char dir[] = "/tmp/ic_gguf_test.XXXXXX";
static char path[128];

static void no_log(enum ggml_log_level level, const char *text, void *arg)
{
    (void)level;
    (void)text;
    (void)arg;
}

static int set_up(void **state)
{
    (void)state;
    ggml_log_set(no_log, NULL);
    if (!mkdtemp(dir))
        return -1;
    snprintf(path, sizeof path, "%s/model.gguf", dir);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    unlink(path);
    return rmdir(dir);
}

/* ---- files to order ----------------------------------------------------------------------------- */

struct made {
    struct gguf_context *g;
    struct ggml_context *tensors;
};

static struct made make(const char *arch, uint32_t layers)
{
    struct made m = {gguf_init_empty(),
                     ggml_init((struct ggml_init_params){.mem_size = 1 << 20, .no_alloc = false})};
    char key[64];

    gguf_set_val_str(m.g, "general.architecture", arch);
    snprintf(key, sizeof key, "%s.block_count", arch);
    gguf_set_val_u32(m.g, key, layers);
    return m;
}

/* Of F32. */
static void add(struct made *m, const char *name, int64_t numbers)
{
    struct ggml_tensor *t = ggml_new_tensor_1d(m->tensors, GGML_TYPE_F32, numbers);
    memset(t->data, 0, ggml_nbytes(t));
    ggml_set_name(t, name);
    gguf_add_tensor(m->g, t);
}

static void add_llama(struct made *m, uint32_t layers)
{
    char name[64];

    add(m, "token_embd.weight", 100);
    for (uint32_t i = 0; i < layers; i++) {
        snprintf(name, sizeof name, "blk.%u.attn_k.weight", i);
        add(m, name, 10);
        snprintf(name, sizeof name, "blk.%u.ffn_up_exps.weight", i);
        add(m, name, 30);
    }
    add(m, "output_norm.weight", 5);
}

static void write_to(struct made *m, const char *where)
{
    assert_true(gguf_write_to_file(m->g, where, false));
    gguf_free(m->g);
    ggml_free(m->tensors);
}

static enum ic_status read_made(struct made *m)
{
    write_to(m, path);
    err = (struct ic_err){0};
    return ic_gguf_read(&facts, path, &err);
}

static void refused(struct made *m, const char *why)
{
    assert_int_equal(read_made(m), IC_BAD_REQUEST);
    if (!strstr(err.msg, why))
        fail_msg("\"%s\" does not say \"%s\"", err.msg, why);
}

static const struct ic_gguf_kv f16 = {.cells = 1024,
                                      .sequences = 4,
                                      .batch = 128,
                                      .k_type = GGML_TYPE_F16,
                                      .v_type = GGML_TYPE_F16,
                                      .swa_full = true};

/* ---- tests -------------------------------------------------------------------------------------- */

static void real_files(void **state)
{
    struct stat s;

    (void)state;
    assert_int_equal(ic_gguf_read(&facts, STORIES, &err), IC_OK);
    assert_string_equal(facts.arch, "llama");
    assert_int_equal(facts.n_layers, 5);
    assert_int_equal(facts.n_embd, 64);
    assert_int_equal(facts.n_vocab, 512);
    assert_int_equal(facts.embd_bytes, 64 * 512 * 4);
    assert_true(facts.tied);
    assert_int_equal(facts.layer[0].k_row, 32); /* 4 heads of 8 */
    assert_int_equal(stat(STORIES, &s), 0);
    assert_int_equal(facts.file_bytes, s.st_size);
    if (access(TINYLLAMA, R_OK) != 0)
        return;
    assert_int_equal(ic_gguf_read(&facts, TINYLLAMA, &err), IC_OK);
    assert_int_equal(facts.n_layers, 22);
    assert_int_equal(facts.n_ctx_train, 2048);
    assert_false(facts.tied);
    assert_int_equal(facts.layer[21].v_row, 256);
    uint64_t sum = facts.input_bytes + facts.output_bytes;
    for (uint32_t i = 0; i < facts.n_layers; i++)
        sum += facts.layer[i].bytes;
    assert_int_equal(sum, facts.tensor_bytes);
    assert_true(facts.tensor_bytes < facts.file_bytes);
}

static void tensors_are_told_apart(void **state)
{
    struct made m = make("llama", 2);

    (void)state;
    gguf_set_val_u32(m.g, "llama.expert_count", 8);
    add_llama(&m, 2);
    add(&m, "output.weight", 50);
    assert_int_equal(read_made(&m), IC_OK);
    assert_int_equal(facts.n_experts, 8);
    assert_int_equal(facts.input_bytes, 400);
    assert_int_equal(facts.layer[1].bytes, 160);
    assert_int_equal(facts.layer[1].expert_bytes, 120);
    assert_int_equal(facts.layer[1].tensors, 2);
    assert_int_equal(facts.output_bytes, 220);
    assert_false(facts.tied);
    assert_int_equal(ic_gguf_output_bytes(&facts), 220);
    m = make("llama", 2);
    add_llama(&m, 2);
    assert_int_equal(read_made(&m), IC_OK);
    assert_true(facts.tied);
    assert_int_equal(ic_gguf_output_bytes(&facts), 20 + 400);
}

static void caches_per_layer(void **state)
{
    const int32_t heads[] = {2, 0, 4, 4};
    const bool windows[] = {true, false, true, false};
    struct ic_gguf_kv kv = f16;
    struct made m = make("gemma3", 4);

    (void)state;
    gguf_set_val_u32(m.g, "gemma3.embedding_length", 512);
    gguf_set_val_u32(m.g, "gemma3.attention.head_count", 8);
    gguf_set_arr_data(m.g, "gemma3.attention.head_count_kv", GGUF_TYPE_INT32, heads, 4);
    gguf_set_val_u32(m.g, "gemma3.attention.value_length", 96);
    gguf_set_val_u32(m.g, "gemma3.attention.sliding_window", 100);
    gguf_set_arr_data(m.g, "gemma3.attention.sliding_window_pattern", GGUF_TYPE_BOOL, windows, 4);
    add_llama(&m, 4);
    assert_int_equal(read_made(&m), IC_OK);
    assert_int_equal(ic_gguf_kv_bytes(&facts, 0, &f16), 1024 * 2 * (2 * 64 + 2 * 96));
    assert_int_equal(ic_gguf_kv_bytes(&facts, 1, &f16), 0);
    assert_int_equal(ic_gguf_kv_bytes(&facts, 2, &f16), 1024 * 2 * (4 * 64 + 4 * 96));
    kv.k_type = GGML_TYPE_Q8_0; /* 34 bytes for 32 numbers */
    assert_int_equal(ic_gguf_kv_bytes(&facts, 0, &kv), 1024 * (128 / 32 * 34 + 2 * 192));
    kv = f16;
    kv.swa_full = false; /* 4 * 100 + 128 tokens, in steps of 256 */
    assert_int_equal(ic_gguf_kv_bytes(&facts, 0, &kv), 768 * 2 * (2 * 64 + 2 * 96));
    assert_int_equal(ic_gguf_kv_bytes(&facts, 3, &kv), 1024 * 2 * (4 * 64 + 4 * 96));
}

static void other_kinds_of_cache(void **state)
{
    struct made m = make("deepseek2", 1);

    (void)state;
    gguf_set_val_u32(m.g, "deepseek2.attention.head_count", 16);
    gguf_set_val_u32(m.g, "deepseek2.attention.head_count_kv", 1);
    gguf_set_val_u32(m.g, "deepseek2.attention.key_length", 576);
    gguf_set_val_u32(m.g, "deepseek2.attention.value_length", 512);
    gguf_set_val_u32(m.g, "deepseek2.attention.key_length_mla", 192);
    add(&m, "blk.0.attn_kv_a_mqa.weight", 8);
    assert_int_equal(read_made(&m), IC_OK);
    assert_int_equal(ic_gguf_kv_bytes(&facts, 0, &f16), 1024 * 2 * 576);

    m = make("hybrid", 2); /* one layer of each kind */
    gguf_set_val_u32(m.g, "hybrid.attention.head_count", 4);
    gguf_set_val_u32(m.g, "hybrid.embedding_length", 64);
    gguf_set_val_u32(m.g, "hybrid.ssm.conv_kernel", 4);
    gguf_set_val_u32(m.g, "hybrid.ssm.inner_size", 128);
    gguf_set_val_u32(m.g, "hybrid.ssm.state_size", 16);
    add(&m, "blk.0.ssm_in.weight", 8);
    add(&m, "blk.1.attn_k.weight", 8);
    assert_int_equal(read_made(&m), IC_OK);
    assert_int_equal(ic_gguf_kv_bytes(&facts, 0, &f16), 4 * 4 * (3 * 128 + 16 * 128));
    assert_int_equal(ic_gguf_kv_bytes(&facts, 1, &f16), 1024 * 2 * (64 + 64));
}

static void split_models(void **state)
{
    char first[160], second[160];
    struct made m;

    (void)state;
    snprintf(first, sizeof first, "%s/m-00001-of-00002.gguf", dir);
    snprintf(second, sizeof second, "%s/m-00002-of-00002.gguf", dir);
    for (uint16_t i = 0; i < 2; i++) {
        m = make("llama", 2);
        gguf_set_val_u16(m.g, "split.no", i);
        gguf_set_val_u16(m.g, "split.count", 2);
        add(&m, i ? "blk.1.attn_k.weight" : "blk.0.attn_k.weight", 10 + i);
        write_to(&m, i ? second : first);
    }
    assert_int_equal(ic_gguf_read(&facts, first, &err), IC_OK);
    assert_int_equal(facts.n_files, 2);
    assert_int_equal(facts.layer[0].bytes, 40);
    assert_int_equal(facts.layer[1].bytes, 44);
    assert_int_equal(facts.tensor_bytes, 84);
    assert_int_equal(ic_gguf_read(&facts, second, &err), IC_BAD_REQUEST); /* not the first */
    assert_int_equal(rename(first, path), 0);
    assert_int_equal(ic_gguf_read(&facts, path, &err), IC_BAD_REQUEST); /* the others cannot be found */
    assert_int_equal(rename(path, first), 0);
    assert_int_equal(truncate(second, 200), 0);
    assert_int_equal(ic_gguf_read(&facts, first, &err), IC_BAD_REQUEST);
    unlink(second);
    assert_int_equal(ic_gguf_read(&facts, first, &err), IC_NOT_FOUND);
    unlink(first);
}

static void lies(void **state)
{
    struct made m;

    (void)state;
    m = make("llama", 0);
    refused(&m, "nothing about its layers");
    m = make("llama", 1000000000);
    refused(&m, "claims 1000000000 layers");
    m = make("llama", 2);
    add(&m, "blk.2.attn_k.weight", 4);
    refused(&m, "belongs to no layer");
    m = make("llama", 2);
    add(&m, "blk.99999999999999999999.x", 4);
    refused(&m, "belongs to no layer");
    m = make("llama", 2);
    add(&m, "blk.", 4);
    refused(&m, "belongs to no layer");
    m = make("a%sb/..", 2);
    refused(&m, "architecture");
    m = make("llama", 1);
    gguf_set_val_u32(m.g, "llama.attention.head_count_kv", 1 << 30);
    gguf_set_val_u32(m.g, "llama.attention.key_length", 1 << 30);
    add_llama(&m, 1);
    refused(&m, "claims to cache");
    m = make("llama", 1);
    gguf_set_val_u32(m.g, "split.count", 60000);
    refused(&m, "claims 60000 files");
    m = make("llama", 1);
    gguf_set_val_i32(m.g, "llama.attention.head_count",
                     -4); /* of no type or sign that makes sense: as if absent */
    gguf_set_val_f32(m.g, "llama.context_length", 1e30f);
    gguf_set_val_str(m.g, "llama.embedding_length", "many");
    add_llama(&m, 1);
    assert_int_equal(read_made(&m), IC_OK);
    assert_int_equal(facts.n_ctx_train, 0);
    assert_int_equal(facts.layer[0].k_row, 0);
}

static unsigned char *slurp(size_t *n)
{
    FILE *f = fopen(STORIES, "rb");
    unsigned char *b = malloc(2 << 20);

    assert_non_null(f);
    assert_non_null(b);
    *n = fread(b, 1, 2 << 20, f);
    fclose(f);
    return b;
}

static enum ic_status read_bytes(const unsigned char *b, size_t n)
{
    FILE *f = fopen(path, "wb");

    assert_non_null(f);
    assert_int_equal(fwrite(b, 1, n, f), n);
    fclose(f);
    return ic_gguf_read(&facts, path, &err);
}

static void cut_short(void **state)
{
    size_t n;
    unsigned char *b = slurp(&n);

    (void)state;
    for (size_t at = 0; at < n; at = at < 128 ? at + 1 : at + at / 16)
        assert_int_equal(read_bytes(b, at), IC_BAD_REQUEST);
    assert_int_equal(read_bytes(b, n - 1), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "cut short"));
    assert_int_equal(read_bytes(b, n), IC_OK);
    free(b);
}

/* Whatever byte of the header is changed: facts or an error, and facts within their bounds. */
static void bytes_changed(void **state)
{
    static const unsigned char values[] = {0x00, 0x01, 0x7f, 0x80, 0xff};
    size_t n;
    unsigned char *b = slurp(&n);

    (void)state;
    for (size_t at = 0; at < 16384; at += at < 1024 ? 1 : 61) {
        unsigned char was = b[at];
        b[at] = values[at % sizeof values];
        if (read_bytes(b, n) == IC_OK) {
            assert_in_range(facts.n_layers, 1, IC_GGUF_LAYERS_MAX);
            assert_true(facts.tensor_bytes <= facts.file_bytes);
            for (uint32_t i = 0; i < facts.n_layers; i++)
                assert_true(ic_gguf_kv_bytes(&facts, i, &f16) < UINT64_C(1) << 40);
        }
        b[at] = was;
    }
    memset(b + 8, 0xff, 16);
    b[15] = b[23] = 0x7f; /* 2^63 of each */
    assert_int_equal(read_bytes(b, n), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "at most 65536 and 4096"));
    free(b);
}

static void not_models(void **state)
{
    (void)state;
    assert_int_equal(ic_gguf_read(&facts, "/nowhere/x.gguf", &err), IC_NOT_FOUND);
    assert_int_equal(ic_gguf_read(&facts, "/tmp", &err), IC_BAD_REQUEST);
    assert_int_equal(ic_gguf_read(&facts, "/dev/zero", &err), IC_BAD_REQUEST);
    assert_int_equal(ic_gguf_read(&facts, IC_SOURCE_DIR "/CMakeLists.txt", &err), IC_BAD_REQUEST);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(real_files),       cmocka_unit_test(tensors_are_told_apart),
        cmocka_unit_test(caches_per_layer), cmocka_unit_test(other_kinds_of_cache),
        cmocka_unit_test(split_models),     cmocka_unit_test(lies),
        cmocka_unit_test(cut_short),        cmocka_unit_test(bytes_changed),
        cmocka_unit_test(not_models),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
