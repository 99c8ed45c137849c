/* LoRA adapters over stories260K: what the option says, what they do to its logits, and which files are refused. The
 * adapters are made here; their effect is known from how they are made. */
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
#include <ggml.h>
#include <gguf.h>

#include "text/lora.h"
#include "text/model.h"

#define MODEL IC_SOURCE_DIR "/demo/models/stories260K-f32.gguf"
#define EMBD 64 /* of that model, also the rows of attn_q */
#define RANK 4
#define V 512
#define EXACT 1e-5f /* the same sums; adding nothing to them changes nothing */
/* the same numbers in another order, through five layers and a KV cache in f16 (kv_test.c) */
#define ROUNDED 3e-2f
#define CHANGED 1e-1f

static char dir[] = "/tmp/ic_lora_test.XXXXXX";

/* ---- adapters to order ------------------------------------------------------------------------------------------ */

struct kind {
    const char *arch, *type, *adapter, *tensor;
    float b;         /* size of B's numbers; 0: without effect */
    int32_t columns; /* of A */
    bool alpha_is_text, lonely, alora, integers, empty;
};

static const struct kind good = {.arch = "llama",
                                 .type = "adapter",
                                 .adapter = "lora",
                                 .tensor = "blk.%d.attn_q.weight",
                                 .b = 0.5f,
                                 .columns = EMBD};

static void add(struct gguf_context *g, struct ggml_context *c, const char *name, enum ggml_type type,
                int64_t cols, int64_t rows, float size, uint32_t *rng)
{
    struct ggml_tensor *t = ggml_new_tensor_2d(c, type, cols, rows);

    memset(t->data, 0, ggml_nbytes(t));
    for (int64_t i = 0; type == GGML_TYPE_F32 && i < cols * rows; i++) {
        *rng = *rng * 1664525u + 1013904223u;
        ((float *)t->data)[i] = size * ((float)(*rng >> 8) / (float)(1 << 24) - 0.5f);
    }
    ggml_set_name(t, name);
    gguf_add_tensor(g, t);
}

/* Writes one, for layers 0 to 4; the name lasts until the next with the same `as`. */
static const char *made(const char *as, const struct kind *k)
{
    static char path[8][128];
    static int next;
    char *p = path[next++ % 8], name[96], full[128];
    struct gguf_context *g = gguf_init_empty();
    struct ggml_context *c = ggml_init((struct ggml_init_params){.mem_size = 1 << 20});
    uint32_t rng = 7;

    gguf_set_val_str(g, "general.architecture", k->arch);
    gguf_set_val_str(g, "general.type", k->type);
    gguf_set_val_str(g, "adapter.type", k->adapter);
    if (k->alpha_is_text)
        gguf_set_val_str(g, "adapter.lora.alpha", "four");
    else
        gguf_set_val_f32(g, "adapter.lora.alpha", RANK);
    if (k->alora)
        gguf_set_arr_data(g, "adapter.alora.invocation_tokens", GGUF_TYPE_UINT32, &rng, 1);
    for (int i = 0; i < 5 && !k->empty; i++) {
        snprintf(name, sizeof name, k->tensor, i);
        snprintf(full, sizeof full, "%s.lora_a", name);
        add(g, c, full, k->integers ? GGML_TYPE_I32 : GGML_TYPE_F32, k->columns, RANK, 1, &rng);
        snprintf(full, sizeof full, "%s.lora_b", name);
        if (!k->lonely)
            add(g, c, full, GGML_TYPE_F32, RANK, EMBD, k->b, &rng);
        if (!strchr(k->tensor, '%'))
            break;
    }
    snprintf(p, sizeof path[0], "%s/%s.gguf", dir, as);
    assert_true(gguf_write_to_file(g, p, false));
    gguf_free(g);
    ggml_free(c);
    return p;
}

static int make_dir(void **state)
{
    (void)state;
    return mkdtemp(dir) ? 0 : -1;
}

static int remove_dir(void **state)
{
    char command[64];

    (void)state;
    snprintf(command, sizeof command, "rm -r %s", dir);
    return system(command);
}

/* ---- the option ---------------------------------------------------------------------------------------------------- */

static void the_option_is_read(void **state)
{
    struct ic_lora_list l;
    struct ic_err err = {0};

    (void)state;
    assert_int_equal(ic_lora_parse(&l, NULL, &err), IC_OK);
    assert_int_equal(l.n, 0);
    ic_lora_deinit(&l);
    assert_int_equal(ic_lora_parse(&l, "", &err), IC_OK);
    assert_int_equal(l.n, 0);
    assert_int_equal(ic_lora_parse(&l, "a.gguf,/x/b.gguf:0.5,c:d:-2,e:.25,f:+1e-3", &err), IC_OK);
    static const struct ic_lora want[] = {
        {"a.gguf", 1}, {"/x/b.gguf", 0.5f}, {"c:d", -2}, {"e", 0.25f}, {"f", 1e-3f}};
    assert_int_equal(l.n, 5);
    for (int i = 0; i < 5; i++) {
        assert_string_equal(l.item[i].path, want[i].path);
        assert_true(l.item[i].scale == want[i].scale);
    }
    ic_lora_deinit(&l);
    ic_lora_deinit(&l);
}

static void nonsense_in_the_option_is_refused(void **state)
{
    static const char *const bad[] = {"a:",   "a:x",  "a:nan",  "a:inf", "a:-inf", "a:1e99",
                                      "a:1 ", "a: 1", "a:0.5x", "a,,b",  ",",      "a,",
                                      ":1",   "a:1:", "a:+",    "a:."};
    struct ic_lora_list l;
    char many[4 * (IC_LORA_MAX + 1) + 1] = "";

    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct ic_err err = {0};
        if (ic_lora_parse(&l, bad[i], &err) != IC_BAD_REQUEST)
            fail_msg("accepted: %s", bad[i]);
        assert_non_null(strstr(err.msg, "--lora"));
        assert_null(l.text);
    }
    for (int i = 0; i < IC_LORA_MAX; i++)
        strcat(many, i ? ",a:1" : "a:1");
    assert_int_equal(ic_lora_parse(&l, many, NULL), IC_OK);
    ic_lora_deinit(&l);
    strcat(many, ",b");
    assert_int_equal(ic_lora_parse(&l, many, NULL), IC_TOO_LARGE);
}

/* ---- what they do ---------------------------------------------------------------------------------------------------- */

static enum ic_status open_with(struct ic_text_model **m, const char *lora, struct ic_err *err)
{
    struct ic_text_config cfg = {
        .path = MODEL, .ctx_size = 256, .parallel = 2, .batch = 64, .threads = 1, .lora = lora};

    *err = (struct ic_err){0};
    return ic_text_model_open(m, &cfg, err);
}

/* The logits behind a few words. */
static void logits_with(const char *lora, float *out)
{
    static const char text[] = "Once upon a time there was a little girl";
    struct ic_text_model *m;
    struct ic_err err;
    struct ic_row rows[64];
    int32_t *t, n;

    if (open_with(&m, lora, &err) != IC_OK)
        fail_msg("%s", err.msg);
    assert_int_equal(ic_text_tokenize(m, text, strlen(text), true, false, 64, &t, &n, &err), IC_OK);
    for (int32_t i = 0; i < n; i++)
        rows[i] = (struct ic_row){.token = t[i], .pos = i, .logits = i + 1 == n};
    assert_int_equal(ic_text_decode(m, rows, n), IC_DECODE_OK);
    memcpy(out, ic_text_logits(m, n - 1), V * sizeof *out);
    free(t);
    ic_text_model_close(&m);
}

static float apart(const float *a, const float *b)
{
    float most = 0;
    for (int i = 0; i < V; i++)
        most = fmaxf(most, fabsf(a[i] - b[i]));
    return most;
}

static void an_adapter_does_what_its_numbers_say(void **state)
{
    static float base[V], with[V], other[V];
    struct kind nothing = good;
    char spec[300];

    (void)state;
    nothing.b = 0;
    const char *zero = made("zero", &nothing), *some = made("some", &good);
    logits_with(NULL, base);
    logits_with(zero, with);
    assert_true(apart(base, with) <= EXACT);
    logits_with(some, with);
    assert_true(apart(base, with) > CHANGED);
    snprintf(spec, sizeof spec, "%s:0", some);
    logits_with(spec, other);
    assert_true(apart(base, other) <= EXACT);
    snprintf(spec, sizeof spec, "%s:0.5,%s:0.5", some, some); /* two halves are one */
    logits_with(spec, other);
    assert_true(apart(with, other) <= ROUNDED);
    snprintf(spec, sizeof spec, "%s,%s:-1", some, some); /* and one less one is none */
    logits_with(spec, other);
    assert_true(apart(base, other) <= ROUNDED);
    logits_with(some, other); /* as after an idle unload */
    assert_true(apart(with, other) <= EXACT);
}

/* ---- what is refused --------------------------------------------------------------------------------------------------- */

static void refused(const char *lora, enum ic_status want, const char *why)
{
    struct ic_text_model *m = (struct ic_text_model *)1;
    struct ic_err err;

    assert_int_equal(open_with(&m, lora, &err), want);
    assert_null(m);
    if (!strstr(err.msg, why) || !strstr(err.msg, "adapter /"))
        fail_msg("\"%s\" does not say \"%s\" of the adapter", err.msg, why);
}

#define REFUSED(why, ...)                                                                                  \
    do {                                                                                                   \
        struct kind k_ = good;                                                                             \
        __VA_ARGS__;                                                                                       \
        refused(made("bad", &k_), IC_BAD_REQUEST, why);                                                    \
    } while (0)

static void what_does_not_fit_the_model_is_refused(void **state)
{
    (void)state;
    REFUSED("made for the architecture qwen2, the model is llama", k_.arch = "qwen2");
    REFUSED("not a LoRA adapter", k_.type = "model");
    REFUSED("not a LoRA adapter", k_.adapter = "dora");
    REFUSED("its alpha is no number", k_.alpha_is_text = true);
    REFUSED("aLoRA", k_.alora = true);
    REFUSED("holds no weights", k_.empty = true);
    REFUSED("none of weights", k_.integers = true);
    REFUSED("missing one component", k_.lonely = true);
    REFUSED("incorrect shape", k_.columns = EMBD / 2);
    REFUSED("does not exist in base model", k_.tensor = "blk.%d.attn_x.weight");
    REFUSED("belongs to no layer", k_.tensor = "blk.5.attn_q.weight");
    refused(MODEL, IC_BAD_REQUEST, "not a LoRA adapter");
    refused("/nonexistent/a.gguf", IC_NOT_FOUND, "No such file");
    refused("/tmp", IC_BAD_REQUEST, "not a file");
    refused("/dev/null", IC_BAD_REQUEST, "not a file");
}

static void a_file_cut_short_is_refused(void **state)
{
    static char all[1 << 16];
    const char *whole = made("whole", &good);
    FILE *f = fopen(whole, "rb");
    size_t len = f ? fread(all, 1, sizeof all, f) : 0;

    (void)state;
    assert_true(len > 1000 && len < sizeof all);
    fclose(f);
    for (size_t cut = 0; cut < len; cut = cut < 400 ? cut + 23 : cut * 2) {
        char path[128];
        struct ic_text_model *m;
        struct ic_err err;
        snprintf(path, sizeof path, "%s/cut.gguf", dir);
        f = fopen(path, "wb");
        assert_true(f && fwrite(all, 1, cut, f) == cut);
        fclose(f);
        assert_int_equal(open_with(&m, path, &err), IC_BAD_REQUEST);
        assert_non_null(strstr(err.msg, path));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_option_is_read),
        cmocka_unit_test(nonsense_in_the_option_is_refused),
        cmocka_unit_test(an_adapter_does_what_its_numbers_say),
        cmocka_unit_test(what_does_not_fit_the_model_is_refused),
        cmocka_unit_test(a_file_cut_short_is_refused),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
