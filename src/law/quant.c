#include "law/quant.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "model/half.h"
#include "model/safetensors.h"

#define LAYOUT_MAX 160
#define PART_NAME_MAX (IC_LAW_TENSOR_NAME_MAX + 16)

static const char *const tails[] = {".absmax", ".absmax_scale", ".absmax_offset"};

static size_t aligned(size_t bytes)
{
    return (bytes + IC_LAW_WEIGHT_ALIGN - 1) / IC_LAW_WEIGHT_ALIGN * IC_LAW_WEIGHT_ALIGN;
}

/* ---- In memory ------------------------------------------------------------------------------- */

size_t ic_law_weight_room(enum ic_law_precision p, bool twice, size_t count)
{
    const size_t blocks = ic_nf4_blocks(count, IC_NF4_BLOCK);
    switch (p) {
    case IC_LAW_FP16:
    case IC_LAW_BF16: return aligned(count * sizeof(uint16_t));
    case IC_LAW_NF4:
        return aligned(ic_nf4_code_bytes(count)) +
               (twice ? aligned(blocks) + aligned(ic_nf4_scale_blocks(blocks) * sizeof(float))
                      : aligned(blocks * sizeof(float)));
    default: return aligned(count * sizeof(float));
    }
}

void ic_law_weight_place(struct ic_law_weight *w, enum ic_law_precision p, bool twice, void *place)
{
    char *at = place;
    w->precision = p;
    w->data = p == IC_LAW_FP32 ? (float *)place : NULL;
    w->half = p == IC_LAW_FP16 || p == IC_LAW_BF16 ? (uint16_t *)place : NULL;
    w->nf4 = (struct ic_nf4){0};
    if (p != IC_LAW_NF4)
        return;
    const size_t blocks = ic_nf4_blocks(w->count, IC_NF4_BLOCK);
    w->nf4 = (struct ic_nf4){.count = w->count, .block = IC_NF4_BLOCK, .codes = (uint8_t *)at};
    at += aligned(ic_nf4_code_bytes(w->count));
    if (twice) {
        w->nf4.absmax_codes = (uint8_t *)at;
        w->nf4.absmax_scale = (float *)(void *)(at + aligned(blocks));
    } else
        w->nf4.absmax = (float *)(void *)at;
}

size_t ic_law_weight_bytes(const struct ic_law_weight *w)
{
    switch (w->precision) {
    case IC_LAW_FP16:
    case IC_LAW_BF16: return w->count * sizeof(uint16_t);
    case IC_LAW_NF4: return ic_nf4_bytes(&w->nf4);
    default: return w->count * sizeof(float);
    }
}

void ic_law_weight_read(const struct ic_law_weight *w, size_t from, size_t n, float *out)
{
    IC_ASSERT(from <= w->count && n <= w->count - from);
    switch (w->precision) {
    case IC_LAW_FP16:
        for (size_t i = 0; i < n; i++)
            out[i] = ic_f16_to_f32(w->half[from + i]);
        break;
    case IC_LAW_BF16:
        for (size_t i = 0; i < n; i++)
            out[i] = ic_bf16_to_f32(w->half[from + i]);
        break;
    case IC_LAW_NF4: ic_nf4_dequantise(&w->nf4, from, n, out); break;
    default: memcpy(out, w->data + from, n * sizeof *out);
    }
}

/* The law's memory is written while a law is being made, and only then. */
static void *mutable(const void *p)
{
    return (void *)(uintptr_t)p;
}

static enum ic_status fill_half(const struct ic_law_weight *w, const float *x, struct ic_err *err)
{
    uint16_t *out = mutable(w->half);
    const bool bf16 = w->precision == IC_LAW_BF16;
    for (size_t i = 0; i < w->count; i++) {
        out[i] = bf16 ? ic_f32_to_bf16(x[i]) : ic_f32_to_f16(x[i]);
        if (!isfinite(bf16 ? ic_bf16_to_f32(out[i]) : ic_f16_to_f32(out[i])))
            return ic_fail(err, IC_BAD_REQUEST, "tensor %s: value %zu (%g) does not fit %s", w->name, i,
                           (double)x[i], ic_law_precision_name(w->precision));
    }
    return IC_OK;
}

static enum ic_status fill_nf4(struct ic_law_weight *w, const float *x, struct ic_err *err)
{
    const struct ic_nf4 *q = &w->nf4;
    const size_t blocks = ic_nf4_blocks(q->count, q->block);
    float *absmax = q->absmax ? mutable(q->absmax) : malloc(blocks * sizeof *absmax + 1);
    if (!absmax)
        return ic_fail(err, IC_OOM, "no memory for the scales of %s", w->name);
    struct ic_err why = {0};
    enum ic_status s = ic_nf4_quantise(x, q->count, q->block, mutable(q->codes), absmax, &why);
    if (s != IC_OK)
        s = ic_fail(err, s, "tensor %s: %s", w->name, why.msg);
    else if (!q->absmax)
        ic_nf4_quantise_absmax(absmax, blocks, mutable(q->absmax_codes), mutable(q->absmax_scale),
                               &w->nf4.absmax_offset);
    if (!q->absmax)
        free(absmax);
    return s;
}

enum ic_status ic_law_weight_fill(struct ic_law_weight *w, const float *x, struct ic_err *err)
{
    switch (w->precision) {
    case IC_LAW_FP16:
    case IC_LAW_BF16: return fill_half(w, x, err);
    case IC_LAW_NF4: return fill_nf4(w, x, err);
    default: memcpy(mutable(w->data), x, w->count * sizeof *x); return IC_OK;
    }
}

/* ---- From a file ----------------------------------------------------------------------------- */

size_t ic_law_file_stem(const char *name)
{
    const size_t n = strlen(name);
    for (size_t i = 0; i < sizeof tails / sizeof tails[0]; i++) {
        const size_t t = strlen(tails[i]);
        if (n > t && strcmp(name + n - t, tails[i]) == 0)
            return n - t;
    }
    return n;
}

static void layout_text(const uint32_t dim[4], unsigned ndim, bool twice, char *out)
{
    const int64_t shape[4] = {dim[0], dim[1], dim[2], dim[3]};
    char text[96];
    snprintf(out, LAYOUT_MAX, "nf4 block %u absmax %s of %s", IC_NF4_BLOCK, twice ? "u8/256" : "f32",
             ic_tensor_shape_str(shape, ndim, text, sizeof text));
}

enum ic_status ic_law_file_is_quantised(const struct ic_tensors *set, bool *yes, struct ic_err *err)
{
    const char *format = ic_tensors_meta(set, "ic.format");
    *yes = format != NULL;
    if (format && strcmp(format, IC_LAW_FILE_FORMAT) != 0)
        return ic_fail(err, IC_BAD_REQUEST, "a quantised law of format \"%.60s\"; known here: \"%s\"",
                       format, IC_LAW_FILE_FORMAT);
    return IC_OK;
}

static const struct ic_tensor *part(const struct ic_tensors *set, const char *name, const char *tail)
{
    char full[PART_NAME_MAX];
    snprintf(full, sizeof full, "%s%s", name, tail);
    return ic_tensors_find(set, full);
}

/* One-dimensional, of this type and length. */
static enum ic_status check_part(const struct ic_tensors *set, const char *name, const char *tail,
                                 enum ic_dtype dtype, size_t count, struct ic_err *err)
{
    const struct ic_tensor *t = part(set, name, tail);
    char shape[160];
    if (!t)
        return ic_fail(err, IC_BAD_REQUEST, "tensor %s%s is missing", name, tail);
    if (t->dtype != dtype || t->ndim != 1 || t->count != count)
        return ic_fail(err, IC_BAD_REQUEST, "tensor %s%s is %s %s; expected %s [%zu]", name, tail,
                       ic_dtype_info(t->dtype)->name,
                       ic_tensor_shape_str(t->shape, t->ndim, shape, sizeof shape),
                       ic_dtype_info(dtype)->name, count);
    return IC_OK;
}

static enum ic_status check_nf4(const struct ic_tensors *set, const struct ic_law_spec *spec,
                                const char *layout, bool *twice, struct ic_err *err)
{
    char once_text[LAYOUT_MAX], twice_text[LAYOUT_MAX], key[PART_NAME_MAX + 16];
    const size_t count = (size_t)spec->dim[0] * spec->dim[1] * spec->dim[2] * spec->dim[3];
    const size_t blocks = ic_nf4_blocks(count, IC_NF4_BLOCK);
    layout_text(spec->dim, spec->ndim, false, once_text);
    layout_text(spec->dim, spec->ndim, true, twice_text);
    snprintf(key, sizeof key, "ic.tensor.%s", spec->name);
    *twice = strcmp(layout, twice_text) == 0;
    if (!*twice && strcmp(layout, once_text) != 0)
        return ic_fail(err, IC_BAD_REQUEST,
                       "tensor %s has the layout \"%.100s\"; known here: \"%s\", \"%s\"", spec->name,
                       layout, once_text, twice_text);
    enum ic_status s = check_part(set, spec->name, "", IC_DTYPE_U8, ic_nf4_code_bytes(count), err);
    if (s == IC_OK)
        s = check_part(set, spec->name, tails[0], *twice ? IC_DTYPE_U8 : IC_DTYPE_F32, blocks, err);
    if (s == IC_OK && *twice)
        s = check_part(set, spec->name, tails[1], IC_DTYPE_F32, ic_nf4_scale_blocks(blocks), err);
    if (s == IC_OK && *twice)
        s = check_part(set, spec->name, tails[2], IC_DTYPE_F32, 1, err);
    return s;
}

enum ic_status ic_law_file_precision(const struct ic_tensors *set, const struct ic_law_spec *spec,
                                     enum ic_law_precision *p, bool *twice, struct ic_err *err)
{
    char key[PART_NAME_MAX + 16];
    const struct ic_tensor *t = ic_tensors_find(set, spec->name);
    snprintf(key, sizeof key, "ic.tensor.%s", spec->name);
    const char *layout = ic_tensors_meta(set, key);
    *twice = false;
    *p = IC_LAW_FP32;
    if (layout) {
        *p = IC_LAW_NF4;
        return check_nf4(set, spec, layout, twice, err);
    }
    if (t && t->dtype == IC_DTYPE_U8)
        return ic_fail(err, IC_BAD_REQUEST, "tensor %s is U8, but the metadata has no %s", spec->name, key);
    if (t && spec->ndim == 4 && (t->dtype == IC_DTYPE_F16 || t->dtype == IC_DTYPE_BF16))
        *p = t->dtype == IC_DTYPE_F16 ? IC_LAW_FP16 : IC_LAW_BF16;
    return IC_OK;
}

/* A safetensors payload, as it is. */
static enum ic_status read_bytes(const struct ic_tensors *set, const char *name, const char *tail,
                                 void *out, size_t bytes, struct ic_err *err)
{
    const struct ic_tensor *t = part(set, name, tail);
    IC_ASSERT(t && !t->where.deflated && t->offset == 0 && t->where.stored == bytes);
    return ic_pread_all(set->fd, t->where.at, out, bytes, err);
}

static enum ic_status check_scales(const struct ic_law_weight *w, const char *tail, const float *x,
                                   size_t n, struct ic_err *err)
{
    for (size_t i = 0; i < n; i++)
        if (!(isfinite(x[i]) && x[i] >= 0))
            return ic_fail(err, IC_BAD_REQUEST, "tensor %s%s: scale %zu is %g", w->name, tail, i,
                           (double)x[i]);
    return IC_OK;
}

static enum ic_status read_nf4(const struct ic_tensors *set, struct ic_law_weight *w, struct ic_err *err)
{
    struct ic_nf4 *q = &w->nf4;
    const size_t blocks = ic_nf4_blocks(q->count, q->block), scales = ic_nf4_scale_blocks(blocks);
    enum ic_status s = read_bytes(set, w->name, "", mutable(q->codes), ic_nf4_code_bytes(q->count), err);
    if (s == IC_OK && q->absmax) {
        s = read_bytes(set, w->name, tails[0], mutable(q->absmax), blocks * sizeof(float), err);
        return s == IC_OK ? check_scales(w, tails[0], q->absmax, blocks, err) : s;
    }
    if (s == IC_OK)
        s = read_bytes(set, w->name, tails[0], mutable(q->absmax_codes), blocks, err);
    if (s == IC_OK)
        s = read_bytes(set, w->name, tails[1], mutable(q->absmax_scale), scales * sizeof(float), err);
    if (s == IC_OK)
        s = check_scales(w, tails[1], q->absmax_scale, scales, err);
    if (s == IC_OK)
        s = read_bytes(set, w->name, tails[2], &q->absmax_offset, sizeof(float), err);
    if (s == IC_OK && !(isfinite(q->absmax_offset) && fabsf(q->absmax_offset) < 1e30f))
        s = ic_fail(err, IC_BAD_REQUEST, "tensor %s%s is %g", w->name, tails[2], (double)q->absmax_offset);
    /* each is finite; their sum must be too */
    for (size_t i = 0; s == IC_OK && i < scales; i++)
        if (q->absmax_scale[i] > 1e30f)
            s = ic_fail(err, IC_BAD_REQUEST, "tensor %s%s: scale %zu is %g", w->name, tails[1], i,
                        (double)q->absmax_scale[i]);
    return s;
}

enum ic_status ic_law_file_read(const struct ic_tensors *set, struct ic_law_weight *w, struct ic_err *err)
{
    if (w->precision == IC_LAW_NF4)
        return read_nf4(set, w, err);
    if (w->precision == IC_LAW_FP32)
        return ic_tensors_read_f32(set, ic_tensors_find(set, w->name), mutable(w->data), w->count, err);
    enum ic_status s = read_bytes(set, w->name, "", mutable(w->half), w->count * sizeof(uint16_t), err);
    const uint16_t exponent = w->precision == IC_LAW_FP16 ? 0x7C00 : 0x7F80;
    for (size_t i = 0; s == IC_OK && i < w->count; i++)
        if ((w->half[i] & exponent) == exponent)
            s = ic_fail(err, IC_BAD_REQUEST, "tensor %s holds NaN or an infinity (value %zu)", w->name, i);
    return s;
}

/* ---- To a file ------------------------------------------------------------------------------- */

struct writer {
    size_t tensors, metas;
    struct ic_safetensors_out out[4 * IC_LAW_SPECS_MAX];
    const char *meta[IC_LAW_SPECS_MAX + 2][2];
    char names[4 * IC_LAW_SPECS_MAX][PART_NAME_MAX];
    char keys[IC_LAW_SPECS_MAX][PART_NAME_MAX + 16], layouts[IC_LAW_SPECS_MAX][LAYOUT_MAX];
};

static void put(struct writer *wr, const struct ic_law_weight *w, const char *tail, enum ic_dtype dtype,
                size_t count, const void *data)
{
    struct ic_safetensors_out *o = &wr->out[wr->tensors];
    snprintf(wr->names[wr->tensors], PART_NAME_MAX, "%s%s", w->name, tail);
    *o = (struct ic_safetensors_out){.name = wr->names[wr->tensors++],
                                     .dtype = dtype,
                                     .ndim = 1,
                                     .shape = {(int64_t)count},
                                     .data = data};
}

static void put_weight(struct writer *wr, const struct ic_law_weight *w)
{
    static const enum ic_dtype dtypes[] = {
        [IC_LAW_FP32] = IC_DTYPE_F32, [IC_LAW_FP16] = IC_DTYPE_F16, [IC_LAW_BF16] = IC_DTYPE_BF16};
    const struct ic_nf4 *q = &w->nf4;
    if (w->precision != IC_LAW_NF4) {
        put(wr, w, "", dtypes[w->precision], w->count, w->half ? (const void *)w->half : w->data);
        struct ic_safetensors_out *o = &wr->out[wr->tensors - 1];
        o->ndim = w->ndim;
        for (unsigned i = 0; i < w->ndim; i++)
            o->shape[i] = w->dim[i];
        return;
    }
    const size_t blocks = ic_nf4_blocks(q->count, q->block);
    put(wr, w, "", IC_DTYPE_U8, ic_nf4_code_bytes(q->count), q->codes);
    if (q->absmax)
        put(wr, w, tails[0], IC_DTYPE_F32, blocks, q->absmax);
    else {
        put(wr, w, tails[0], IC_DTYPE_U8, blocks, q->absmax_codes);
        put(wr, w, tails[1], IC_DTYPE_F32, ic_nf4_scale_blocks(blocks), q->absmax_scale);
        put(wr, w, tails[2], IC_DTYPE_F32, 1, &q->absmax_offset);
    }
    const size_t m = wr->metas++;
    snprintf(wr->keys[m], sizeof wr->keys[m], "ic.tensor.%s", w->name);
    layout_text(w->dim, w->ndim, !q->absmax, wr->layouts[m]);
    wr->meta[m][0] = wr->keys[m];
    wr->meta[m][1] = wr->layouts[m];
}

/* What config.json would say, so that the file is a law without one. */
static void put_config(const struct ic_law *law, struct ic_buf *b)
{
    ic_buf_puts(b, "{");
    ic_json_kstr(b, "EXPERIMENT_NAME", law->name);
    ic_json_kstr(b, "MODEL_ARCHITECTURE", ic_law_arch_info(law->arch)->name);
    ic_buf_printf(b, ",\"MODEL_PARAMS\":{\"d_state\":%u,\"hidden_channels\":%u}", law->d, law->b);
    ic_buf_printf(b, ",\"GAMMA_DECAY\":%.9g,\"QCA_STEPS_TRAINING\":%u", (double)law->gamma,
                  law->steps_training);
    if (law->grid_training)
        ic_buf_printf(b, ",\"GRID_SIZE_TRAINING\":%u", law->grid_training);
    ic_json_kstr(b, "INITIAL_STATE_MODE_INFERENCE", law->initial_mode);
    ic_buf_puts(b, "}");
}

enum ic_status ic_law_write(const struct ic_law *law, const char *path, struct ic_err *err)
{
    struct writer *wr = calloc(1, sizeof *wr);
    struct ic_buf config = {.max = 1u << 16};
    if (!wr)
        return ic_fail(err, IC_OOM, "no memory to write a law");
    for (size_t i = 0; i < law->weight_count; i++)
        if (strncmp(law->weights[i].name, IC_LAW_FOLDED ".", sizeof IC_LAW_FOLDED) != 0)
            put_weight(wr, &law->weights[i]);
    put_config(law, &config);
    ic_buf_put(&config, "", 1);
    wr->meta[wr->metas][0] = "ic.format";
    wr->meta[wr->metas++][1] = IC_LAW_FILE_FORMAT;
    wr->meta[wr->metas][0] = "ic.config";
    wr->meta[wr->metas++][1] = config.data;
    enum ic_status s = config.failed
                           ? ic_fail(err, IC_OOM, "no memory to write a law")
                           : ic_safetensors_write(path, wr->out, wr->tensors, wr->meta, wr->metas, err);
    ic_buf_deinit(&config);
    free(wr);
    return s;
}
