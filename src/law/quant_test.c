/* Policies, and quantised laws on their way through a file: whole, and damaged in every way that has a
 * name. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <math.h>
#include <sys/stat.h>

#include "law/fixture.h"
#include "law/quant.h"
#include "model/half.h"

static char folder[32], path[64], other[64];

static int make_folder(void **state)
{
    (void)state;
    strcpy(folder, "/tmp/ic-quant-XXXXXX");
    if (!mkdtemp(folder))
        return -1;
    snprintf(path, sizeof path, "%s/law.safetensors", folder);
    snprintf(other, sizeof other, "%s/other.safetensors", folder);
    return 0;
}

static int drop_folder(void **state)
{
    (void)state;
    unlink(path);
    unlink(other);
    return rmdir(folder);
}

static struct ic_law_policy policy_of(const char *precision, const char *rules)
{
    struct ic_law_policy p;
    struct ic_err err = {0};
    if (ic_law_policy_parse(precision, rules, &p, &err) != IC_OK)
        fail_msg("%s", err.msg);
    return p;
}

/* The fixture's law written plainly at `path`, then opened with a policy. */
static struct ic_law *law_with(enum ic_law_arch arch, const struct ic_law_policy *policy)
{
    struct ic_err err = {0};
    struct ic_law *law = fixture_law(arch, 2, 9, 4), *out;
    assert_non_null(law);
    assert_int_equal(ic_law_write(law, path, &err), IC_OK);
    ic_law_close(&law);
    /* what a trainer writes has no layout in it */
    struct ic_tensors *set;
    struct ic_safetensors_out list[IC_LAW_SPECS_MAX];
    assert_int_equal(ic_tensors_open(path, &set, &err), IC_OK);
    for (size_t i = 0; i < set->count; i++) {
        const struct ic_tensor *t = &set->list[i];
        float *data = malloc(t->count * sizeof *data);
        assert_int_equal(ic_tensors_read_f32(set, t, data, t->count, &err), IC_OK);
        list[i] = (struct ic_safetensors_out){
            .name = t->name, .dtype = IC_DTYPE_F32, .ndim = t->ndim, .data = data};
        memcpy(list[i].shape, t->shape, sizeof list[i].shape);
    }
    assert_int_equal(ic_safetensors_write(path, list, set->count, NULL, 0, &err), IC_OK);
    for (size_t i = 0; i < set->count; i++)
        free((void *)(uintptr_t)list[i].data);
    ic_tensors_close(&set);
    const struct ic_law_open_opts opts = {.arch = ic_law_arch_info(arch)->name, .policy = policy};
    if (ic_law_open(path, &opts, &out, &err) != IC_OK)
        fail_msg("%s", err.msg);
    return out;
}

static enum ic_law_precision of(const struct ic_law *law, const char *name)
{
    const int i = ic_law_weight_find(law, name);
    assert_true(i >= 0);
    return law->weights[i].precision;
}

/* ---- 16 bits ---------------------------------------------------------------------------------- */

static void sixteen_bits(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) { /* every number comes back as it was */
        const float f = ic_f16_to_f32((uint16_t)h), b = ic_bf16_to_f32((uint16_t)h);
        if (!isnan(f))
            assert_int_equal(ic_f32_to_f16(f), h);
        if (!isnan(b))
            assert_int_equal(ic_f32_to_bf16(b), h);
        if (isfinite(f) && (h & 0x7FFF) < 0x7BFF) { /* halfway to the next: to the even one */
            const float next = ic_f16_to_f32((uint16_t)(h + 1));
            const float mid = (float)(((double)f + (double)next) / 2);
            assert_int_equal(ic_f32_to_f16(mid), h % 2 ? h + 1 : h);
            assert_int_equal(ic_f32_to_f16(nextafterf(mid, next)), h + 1);
        }
    }
    assert_int_equal(ic_f32_to_f16(65519.0f), 0x7BFF);
    assert_int_equal(ic_f32_to_f16(65520.0f), 0x7C00);
    assert_true(isnan(ic_f16_to_f32(ic_f32_to_f16((float)NAN))));
    assert_true(isnan(ic_bf16_to_f32(ic_f32_to_bf16((float)NAN))));
    assert_int_equal(ic_f32_to_bf16(1.00390625f), 0x3F80); /* 1 + 2^-8: halfway, to the even one */
    assert_int_equal(ic_f32_to_bf16(1.01171875f), 0x3F82);
}

/* ---- Policies --------------------------------------------------------------------------------- */

static void policies(void **state)
{
    (void)state;
    struct ic_law_policy p = policy_of("nf4", NULL);
    struct ic_law *law = law_with(IC_LAW_UNET, &p);
    assert_int_equal(law->precision, IC_LAW_NF4);
    assert_int_equal(of(law, "inc.conv_block.0.weight"), IC_LAW_FP32);
    assert_int_equal(of(law, "conv_up2.conv_block.3.weight"), IC_LAW_FP32);
    assert_int_equal(of(law, "outc.weight"), IC_LAW_FP32);
    assert_int_equal(of(law, "outc.bias"), IC_LAW_FP32);
    assert_int_equal(of(law, "bot.conv_block.1.weight"), IC_LAW_FP32); /* a norm */
    assert_int_equal(of(law, "bot.conv_block.0.weight"), IC_LAW_NF4);
    assert_int_equal(of(law, "up1.weight"), IC_LAW_NF4);
    assert_int_equal(of(law, "conv_up1.conv_block.0.weight"), IC_LAW_NF4);
    ic_law_close(&law);

    p = policy_of("nf4", "all=nf4,bot=bf16,bot.conv_block.3=fp16,outc=fp32");
    law = law_with(IC_LAW_UNET, &p);
    assert_int_equal(of(law, "inc.conv_block.0.weight"), IC_LAW_NF4);
    assert_int_equal(of(law, "bot.conv_block.0.weight"), IC_LAW_BF16);
    assert_int_equal(of(law, "bot.conv_block.3.weight"), IC_LAW_FP16);
    assert_int_equal(of(law, "outc.weight"), IC_LAW_FP32);
    ic_law_close(&law);

    /* bfloat16 leaves alone what NF4 does, fp16 nothing */
    const struct ic_law_policy nf4 = policy_of("nf4", NULL), bf16 = policy_of("bf16", NULL);
    for (unsigned arch = 0; arch < IC_LAW_ARCH_COUNT; arch++) {
        struct ic_law *other_law = law_with((enum ic_law_arch)arch, &nf4);
        law = law_with((enum ic_law_arch)arch, &bf16);
        size_t reduced = 0;
        for (size_t i = 0; i < law->weight_count; i++) {
            const bool less = other_law->weights[i].precision == IC_LAW_NF4;
            assert_int_equal(law->weights[i].precision, less ? IC_LAW_BF16 : IC_LAW_FP32);
            reduced += less;
        }
        assert_true(reduced > 0 && reduced < law->weight_count);
        ic_law_close(&law);
        ic_law_close(&other_law);
    }
    p = policy_of("bf16", "all=bf16");
    for (unsigned arch = 0; arch < IC_LAW_ARCH_COUNT; arch++) {
        law = law_with((enum ic_law_arch)arch, &p);
        for (size_t i = 0; i < law->weight_count; i++) {
            const bool folded = strncmp(law->weights[i].name, IC_LAW_FOLDED, 6) == 0;
            assert_int_equal(law->weights[i].precision,
                             law->weights[i].ndim == 4 && !folded ? IC_LAW_BF16 : IC_LAW_FP32);
        }
        ic_law_close(&law);
    }
}

static void policies_that_make_no_sense(void **state)
{
    struct ic_law_policy p;
    struct ic_err err = {0};
    char many[2048] = "";
    (void)state;
    assert_int_equal(ic_law_policy_parse("int8", NULL, &p, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "int8"));
    assert_int_equal(ic_law_policy_parse("nf4", "bot", &p, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_law_policy_parse("nf4", "=nf4", &p, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_law_policy_parse("nf4", "bot=", &p, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_law_policy_parse("nf4", "bot=fp8", &p, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "bot=fp8"));
    for (int i = 0; i <= IC_LAW_POLICY_RULES_MAX; i++)
        strcat(many, i ? ",bot=nf4" : "bot=nf4");
    assert_int_equal(ic_law_policy_parse("nf4", many, &p, &err), IC_TOO_LARGE);

    p = policy_of("nf4", "bottom=fp32");
    assert_int_equal(ic_law_policy_check(&p, IC_LAW_UNET, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "no layer bottom"));
    if (!strstr(err.msg, "it has inc down1 down2 bot up1 conv_up1 up2 conv_up2 outc"))
        fail_msg("%s", err.msg);
    p = policy_of("nf4", "bot.conv=fp32"); /* not a whole part of a name */
    assert_int_equal(ic_law_policy_check(&p, IC_LAW_UNET, &err), IC_BAD_REQUEST);
    p = policy_of("nf4", "bot.conv_block.1=fp32"); /* a norm is no layer */
    assert_int_equal(ic_law_policy_check(&p, IC_LAW_UNET, &err), IC_BAD_REQUEST);
    p = policy_of("nf4", "conv_gates=fp32");
    assert_int_equal(ic_law_policy_check(&p, IC_LAW_UNET_CONVLSTM, &err), IC_OK);
    assert_int_equal(ic_law_policy_check(&p, IC_LAW_UNET, &err), IC_BAD_REQUEST);
}

/* ---- Files ------------------------------------------------------------------------------------ */

static void same_law(const struct ic_law *a, const struct ic_law *b)
{
    assert_int_equal(a->arch, b->arch);
    assert_int_equal(a->d, b->d);
    assert_int_equal(a->b, b->b);
    assert_int_equal(a->params, b->params);
    assert_int_equal(a->param_bytes, b->param_bytes);
    assert_int_equal(a->weight_bytes, b->weight_bytes);
    assert_int_equal(a->weight_count, b->weight_count);
    assert_memory_equal(a->data, b->data, a->weight_bytes);
    for (size_t i = 0; i < a->weight_count; i++) {
        float x, y;
        assert_int_equal(a->weights[i].precision, b->weights[i].precision);
        for (size_t k = 0; k < a->weights[i].count; k++) {
            ic_law_weight_read(&a->weights[i], k, 1, &x);
            ic_law_weight_read(&b->weights[i], k, 1, &y);
            assert_true(x == y);
        }
    }
}

/* Every architecture and precision: written, and read again without a config.json and without --arch. */
static void through_a_file(void **state)
{
    static const char *const ways[][2] = {{"fp32", NULL},       {"fp16", NULL},     {"bf16", NULL},
                                          {"nf4", NULL},        {"nf4dq", NULL},    {"nf4", "all=nf4"},
                                          {"nf4dq", "all=nf4"}, {"bf16", "all=nf4"}};
    struct ic_err err = {0};
    (void)state;
    for (unsigned arch = 0; arch < IC_LAW_ARCH_COUNT; arch++)
        for (size_t i = 0; i < sizeof ways / sizeof ways[0]; i++) {
            const struct ic_law_policy p = policy_of(ways[i][0], ways[i][1]);
            struct ic_law *law = law_with((enum ic_law_arch)arch, &p), *again;
            law->gamma = 0.125f;
            assert_int_equal(ic_law_write(law, other, &err), IC_OK);
            if (ic_law_open(other, NULL, &again, &err) != IC_OK)
                fail_msg("%s %s: %s", ic_law_arch_info(law->arch)->name, ways[i][0], err.msg);
            same_law(law, again);
            assert_true(again->gamma == 0.125f);
            assert_string_equal(again->name, law->name);
            ic_law_close(&again);
            const struct ic_law_open_opts same = {.policy = &p};
            assert_int_equal(ic_law_open(other, &same, &again, &err), IC_OK);
            ic_law_close(&again);
            ic_law_close(&law);
        }
}

static void what_was_rounded_away_is_gone(void **state)
{
    struct ic_err err = {0};
    const struct ic_law_policy nf4 = policy_of("nf4", NULL), bf16 = policy_of("bf16", NULL);
    struct ic_law *law = law_with(IC_LAW_UNET, &nf4), *again;
    (void)state;
    assert_int_equal(ic_law_write(law, other, &err), IC_OK);
    assert_int_equal(ic_law_open(other, &(struct ic_law_open_opts){.policy = &bf16}, &again, &err),
                     IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "stored as"));
    assert_null(again);
    ic_law_close(&law);
}

/* What holds every layer in the law's precision is that law, unless a rule asks for more. */
static void a_file_in_one_precision(void **state)
{
    static const char *const names[] = {"bf16", "nf4"};
    struct ic_err err = {0};
    (void)state;
    for (int i = 0; i < 2; i++) {
        char all[16];
        snprintf(all, sizeof all, "all=%s", names[i]);
        const struct ic_law_policy every = policy_of(names[i], all), plain = policy_of(names[i], NULL),
                                   more = policy_of(names[i], "outc=fp32");
        struct ic_law *law = law_with(IC_LAW_UNET, &every), *again;
        assert_int_equal(ic_law_write(law, other, &err), IC_OK);
        assert_int_equal(ic_law_open(other, &(struct ic_law_open_opts){.policy = &plain}, &again, &err),
                         IC_OK);
        assert_int_equal(of(again, "outc.weight"), i ? IC_LAW_NF4 : IC_LAW_BF16);
        ic_law_close(&again);
        assert_int_equal(ic_law_open(other, &(struct ic_law_open_opts){.policy = &more}, &again, &err),
                         IC_BAD_REQUEST);
        assert_non_null(strstr(err.msg, "outc.weight is stored as"));
        ic_law_close(&law);
    }
}

static void past_fp16(void **state)
{
    struct ic_err err = {0};
    struct ic_law *law = law_with(IC_LAW_MLP, NULL);
    (void)state;
    struct ic_law_weight w = law->weights[ic_law_weight_find(law, "net.0.weight")];
    float *x = malloc(w.count * sizeof *x);
    void *room = aligned_alloc(64, ic_law_weight_room(IC_LAW_FP16, false, w.count));
    ic_law_weight_read(&w, 0, w.count, x);
    ic_law_weight_place(&w, IC_LAW_FP16, false, room);
    assert_int_equal(ic_law_weight_fill(&w, x, &err), IC_OK);
    x[3] = 70000;
    assert_int_equal(ic_law_weight_fill(&w, x, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "net.0.weight: value 3"));
    free(x);
    free(room);
    ic_law_close(&law);
}

/* ---- Damage ----------------------------------------------------------------------------------- */

static char *file_text;
static size_t file_len;

static void read_file(void)
{
    struct stat st;
    const int fd = open(other, O_RDONLY);
    assert_true(fd >= 0 && fstat(fd, &st) == 0);
    file_len = (size_t)st.st_size;
    file_text = malloc(file_len);
    assert_int_equal(read(fd, file_text, file_len), (ssize_t)file_len);
    close(fd);
}

static void write_file(size_t len)
{
    const int fd = open(other, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, file_text, len), (ssize_t)len);
    close(fd);
}

static char *in_file(const char *text)
{
    char *p = memmem(file_text, file_len, text, strlen(text));
    if (!p)
        fail_msg("the file has no %s", text);
    return p;
}

static void refused(const char *why)
{
    struct ic_err err = {0};
    struct ic_law *law;
    const enum ic_status s = ic_law_open(other, NULL, &law, &err);
    if (s != IC_BAD_REQUEST || !strstr(err.msg, why))
        fail_msg("\"%s\" lacks \"%s\" (%s)", err.msg, why, ic_status_name(s));
    assert_null(law);
}

/* Replaces text of equal length, looks at what loading says, and restores the file. */
static void refused_with(const char *from, const char *to, const char *why)
{
    assert_int_equal(strlen(from), strlen(to));
    char *at = in_file(from);
    memcpy(at, to, strlen(to));
    write_file(file_len);
    refused(why);
    memcpy(at, from, strlen(from));
}

/* The same for the first float of a tensor. */
static void refused_with_float(const char *tensor, float x, const char *why)
{
    struct ic_tensors *set;
    struct ic_err err = {0};
    write_file(file_len);
    assert_int_equal(ic_tensors_open(other, &set, &err), IC_OK);
    const struct ic_tensor *t = ic_tensors_find(set, tensor);
    assert_non_null(t);
    char *at = file_text + t->where.at, was[4];
    ic_tensors_close(&set);
    memcpy(was, at, 4);
    memcpy(at, &x, 4);
    write_file(file_len);
    refused(why);
    memcpy(at, was, 4);
}

static void damaged(void **state)
{
    struct ic_err err = {0};
    (void)state;
    for (int twice = 0; twice < 2; twice++) {
        const struct ic_law_policy p = policy_of(twice ? "nf4dq" : "nf4", "down1=bf16");
        struct ic_law *law = law_with(IC_LAW_UNET, &p), *again;
        assert_int_equal(ic_law_write(law, other, &err), IC_OK);
        ic_law_close(&law);
        read_file();
        refused_with("law-quantized-1", "law-quantized-9", "format \"law-quantized-9\"");
        refused_with("nf4 block 64", "nf4 block 32", "has the layout \"nf4 block 32");
        refused_with("nf4 block 64", "nf3 block 64", "has the layout");
        refused_with("of [72, 36, 3, 3]", "of [36, 72, 3, 3]", "bot.conv_block.0.weight has the layout");
        refused_with("\"bot.conv_block.0.weight.absmax\"", "\"bot.conv_block.0.weight.absmin\"",
                     "bot.conv_block.0.weight.absmax is missing");
        refused_with("\"ic.tensor.up1.weight\"", "\"ic.tensor.upX.weight\"", "tensor up1.weight is U8");
        refused_with("\\\"d_state\\\":2", "\\\"d_state\\\":4", "has shape");
        refused_with("\\\"d_state\\\":2", "\\\"d_state\\\":0", "d_state is not a whole number");
        refused_with("\"MODEL_ARCHITECTURE" + 1, "MODEL_ARCHITECTURF", "UNET or UNET_UNITARY");
        write_file(file_len - 7);
        refused("safetensors");
        const char *scales = twice ? "up1.weight.absmax_scale" : "up1.weight.absmax";
        refused_with_float(scales, (float)NAN, scales);
        refused_with_float(scales, (float)INFINITY, "scale 0 is inf");
        refused_with_float(scales, -1.0f, "scale 0 is -1");
        if (twice)
            refused_with_float("up1.weight.absmax_offset", (float)NAN, "up1.weight.absmax_offset is");
        refused_with_float("down1.1.conv_block.0.weight", (float)NAN, "NaN");
        refused_with_float("inc.conv_block.0.weight", (float)NAN, "NaN");
        write_file(file_len); /* whole again */
        assert_int_equal(ic_law_open(other, NULL, &again, &err), IC_OK);
        ic_law_close(&again);
        free(file_text);
    }
}

/* Parts of wrong length, in files that are sound as safetensors. */
static void wrong_counts(void **state)
{
    static const struct {
        const char *tensor;
        const char *why;
    } cases[] = {{"up1.weight", "tensor up1.weight is U8 ["},
                 {"up1.weight.absmax", "tensor up1.weight.absmax is"},
                 {"up1.weight.absmax_scale", "tensor up1.weight.absmax_scale is F32 ["},
                 {"up1.weight.absmax_offset", "tensor up1.weight.absmax_offset is F32 ["}};
    struct ic_err err = {0};
    const struct ic_law_policy p = policy_of("nf4dq", NULL);
    (void)state;
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++)
        for (int more = -1; more <= 1; more += 2) {
            struct ic_law *law = law_with(IC_LAW_UNET, &p);
            struct ic_tensors *set;
            struct ic_safetensors_out list[256];
            const char *meta[64][2];
            assert_int_equal(ic_law_write(law, other, &err), IC_OK);
            ic_law_close(&law);
            assert_int_equal(ic_tensors_open(other, &set, &err), IC_OK);
            assert_true(set->count <= 256);
            for (size_t i = 0; i < set->count; i++) {
                const struct ic_tensor *t = &set->list[i];
                char *data = calloc(t->where.bytes + 8, 1);
                assert_int_equal(ic_pread_all(set->fd, t->where.at, data, t->where.bytes, &err), IC_OK);
                list[i] = (struct ic_safetensors_out){
                    .name = t->name, .dtype = t->dtype, .ndim = t->ndim, .data = data};
                memcpy(list[i].shape, t->shape, sizeof list[i].shape);
                if (strcmp(t->name, cases[c].tensor) == 0)
                    list[i].shape[0] += more;
            }
            for (size_t i = 0; i < set->meta_count; i++) {
                meta[i][0] = set->meta[i].key;
                meta[i][1] = set->meta[i].value;
            }
            assert_int_equal(ic_safetensors_write(path, list, set->count, meta, set->meta_count, &err),
                             IC_OK);
            rename(path, other);
            refused(cases[c].why);
            for (size_t i = 0; i < set->count; i++)
                free((void *)(uintptr_t)list[i].data);
            ic_tensors_close(&set);
        }
}

/* Random bytes anywhere: refused with a sentence, or a law whose every weight is a number. */
static void any_byte_may_be_wrong(void **state)
{
    const struct ic_law_policy p = policy_of("nf4dq", "down1=fp16");
    struct fixture_rng rng = {77};
    struct ic_err err = {0};
    unsigned opened = 0;
    struct ic_law *law = law_with(IC_LAW_UNET, &p);
    (void)state;
    assert_int_equal(ic_law_write(law, other, &err), IC_OK);
    ic_law_close(&law);
    read_file();
    const size_t data = (size_t)((unsigned char)file_text[0] | (unsigned char)file_text[1] << 8) + 8;
    for (int i = 0; i < 600; i++) {
        const size_t at = fixture_bits(&rng) % (i % 3 ? data : file_len); /* more often in the header */
        const char was = file_text[at];
        if (i % 2)
            file_text[at] = (char)fixture_bits(&rng);
        else
            file_text[at] = (char)((unsigned char)was ^ 1u << fixture_bits(&rng) % 8);
        write_file(i % 50 == 49 ? at : file_len);
        err = (struct ic_err){0};
        if (ic_law_open(other, NULL, &law, &err) == IC_OK) {
            opened++;
            for (size_t k = 0; k < law->weight_count; k++)
                for (size_t n = 0; n < law->weights[k].count; n++) {
                    float x;
                    ic_law_weight_read(&law->weights[k], n, 1, &x);
                    assert_true(isfinite(x));
                }
        } else
            assert_true(err.msg[0] && !law);
        ic_law_close(&law);
        file_text[at] = was;
    }
    assert_true(opened > 20 && opened < 580);
    free(file_text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sixteen_bits),
        cmocka_unit_test(policies),
        cmocka_unit_test(policies_that_make_no_sense),
        cmocka_unit_test(through_a_file),
        cmocka_unit_test(what_was_rounded_away_is_gone),
        cmocka_unit_test(a_file_in_one_precision),
        cmocka_unit_test(past_fp16),
        cmocka_unit_test(damaged),
        cmocka_unit_test(wrong_counts),
        cmocka_unit_test(any_byte_may_be_wrong),
    };
    return cmocka_run_group_tests(tests, make_folder, drop_folder);
}
