/* See gguf.h. Which tensor belongs to which layer is told by its name, as in llama.cpp; whether a layer
 * caches keys and values or carries a state, by the tensors that it has. */
#include "model/gguf.h"

#include <ctype.h>
#include <errno.h>
#include <ggml.h>
#include <gguf.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define NUMBER_MAX (UINT64_C(1) << 31) /* no count in a header has a reason to be larger */
#define HEADER_BYTES 24                /* magic, version, tensors, keys */
#define CACHE_PAD 256                  /* cells: llama.cpp rounds up to this */

/* What is known of a layer while its tensors go by. */
struct seen {
    bool attention, recurrent;
};

struct reading {
    struct ic_gguf_facts *f;
    const char *kind, *path; /* kind: "model" or "adapter", for messages */
    struct ic_err *err;
    uint32_t nextn; /* layers at the end that predict further tokens; llama.cpp leaves them out */
    struct seen seen[IC_GGUF_LAYERS_MAX];
};

/* ---- keys --------------------------------------------------------------------------------------- */

static int64_t find(const struct gguf_context *g, const char *arch, const char *name)
{
    char key[160];

    snprintf(key, sizeof key, "%s%s%s", arch ? arch : "", arch ? "." : "", name);
    return gguf_find_key(g, key);
}

static bool element(enum gguf_type type, const void *data, size_t i, uint64_t *out)
{
    int64_t v;

    switch (type) {
    case GGUF_TYPE_UINT8: v = ((const uint8_t *)data)[i]; break;
    case GGUF_TYPE_BOOL:
    case GGUF_TYPE_INT8: v = ((const int8_t *)data)[i]; break;
    case GGUF_TYPE_UINT16: v = ((const uint16_t *)data)[i]; break;
    case GGUF_TYPE_INT16: v = ((const int16_t *)data)[i]; break;
    case GGUF_TYPE_UINT32: v = ((const uint32_t *)data)[i]; break;
    case GGUF_TYPE_INT32: v = ((const int32_t *)data)[i]; break;
    case GGUF_TYPE_UINT64:
    case GGUF_TYPE_INT64: v = ((const int64_t *)data)[i]; break;
    default: return false;
    }
    *out = (uint64_t)v;
    return v >= 0 && (uint64_t)v <= NUMBER_MAX;
}

/* A whole number, or the i-th of an array of them (one per layer). False: there is none that makes sense.
 */
static bool number(const struct gguf_context *g, const char *arch, const char *name, size_t i,
                   uint64_t *out)
{
    int64_t id = find(g, arch, name);

    if (id < 0)
        return false;
    enum gguf_type type = gguf_get_kv_type(g, id);
    if (type == GGUF_TYPE_STRING)
        return false;
    if (type != GGUF_TYPE_ARRAY)
        return element(type, gguf_get_val_data(g, id), 0, out);
    type = gguf_get_arr_type(g, id);
    if (type == GGUF_TYPE_STRING || i >= gguf_get_arr_n(g, id))
        return false;
    return element(type, gguf_get_arr_data(g, id), i, out);
}

static uint32_t number_or(const struct gguf_context *g, const char *arch, const char *name, size_t i,
                          uint32_t other)
{
    uint64_t v;
    return number(g, arch, name, i, &v) ? (uint32_t)v : other;
}

static bool is_array(const struct gguf_context *g, const char *arch, const char *name)
{
    int64_t id = find(g, arch, name);
    return id >= 0 && gguf_get_kv_type(g, id) == GGUF_TYPE_ARRAY;
}

static enum ic_status read_arch(struct reading *r, const struct gguf_context *g)
{
    int64_t id = gguf_find_key(g, "general.architecture");
    const char *arch =
        id >= 0 && gguf_get_kv_type(g, id) == GGUF_TYPE_STRING ? gguf_get_val_str(g, id) : "";

    if (!*arch || strlen(arch) >= sizeof r->f->arch)
        return ic_fail(r->err, IC_BAD_REQUEST, "model %s: names no architecture", r->path);
    for (const char *p = arch; *p; p++)
        if (!isalnum((unsigned char)*p) && *p != '-' && *p != '_' && *p != '.')
            return ic_fail(r->err, IC_BAD_REQUEST, "model %s: names no sensible architecture", r->path);
    strcpy(r->f->arch, arch);
    return IC_OK;
}

static enum ic_status read_sizes(struct reading *r, const struct gguf_context *g)
{
    struct ic_gguf_facts *f = r->f;
    enum ic_status st = read_arch(r, g);

    if (st != IC_OK)
        return st;
    f->n_layers = number_or(g, f->arch, "block_count", 0, 0);
    if (f->n_layers == 0)
        return ic_fail(r->err, IC_BAD_REQUEST,
                       "model %s: says nothing about its layers (a vocabulary only?)", r->path);
    if (f->n_layers > IC_GGUF_LAYERS_MAX)
        return ic_fail(r->err, IC_BAD_REQUEST, "model %s: claims %u layers, at most %d can be", r->path,
                       f->n_layers, IC_GGUF_LAYERS_MAX);
    f->n_ctx_train = number_or(g, f->arch, "context_length", 0, 0);
    f->n_embd = number_or(g, f->arch, "embedding_length", 0, 0);
    f->n_experts = number_or(g, f->arch, "expert_count", 0, 0);
    f->n_swa = number_or(g, f->arch, "attention.sliding_window", 0, 0);
    int64_t tokens = gguf_find_key(g, "tokenizer.ggml.tokens");
    f->n_vocab = tokens >= 0 && gguf_get_kv_type(g, tokens) == GGUF_TYPE_ARRAY
                     ? (uint32_t)gguf_get_arr_n(g, tokens)
                     : number_or(g, f->arch, "vocab_size", 0, 0);
    r->nextn = number_or(g, f->arch, "nextn_predict_layers", 0, 0);
    return IC_OK;
}

/* ---- tensors ------------------------------------------------------------------------------------ */

static bool starts(const char *s, const char *with)
{
    return !strncmp(s, with, strlen(with));
}

static enum ic_status place_layer_tensor(struct reading *r, const char *name, uint64_t bytes)
{
    char *end;
    unsigned long il = isdigit((unsigned char)name[4]) ? strtoul(name + 4, &end, 10) : ULONG_MAX;

    if (il >= r->f->n_layers || *end != '.')
        return ic_fail(r->err, IC_BAD_REQUEST, "%s %s: tensor %s belongs to no layer of the %u there are",
                       r->kind, r->path, name, r->f->n_layers);
    struct ic_gguf_layer *layer = &r->f->layer[il];
    const char *part = end + 1;
    if (il + r->nextn >= r->f->n_layers)
        return IC_OK;
    layer->bytes += bytes;
    layer->tensors++;
    if (strstr(part, "_exps."))
        layer->expert_bytes += bytes;
    if (starts(part, "attn_k.") || starts(part, "attn_kv") || starts(part, "attn_qkv."))
        r->seen[il].attention = true;
    if (starts(part, "ssm_") || starts(part, "time_mix_") || starts(part, "shortconv."))
        r->seen[il].recurrent = true;
    return IC_OK;
}

static enum ic_status place_tensor(struct reading *r, const char *name, uint64_t bytes, bool *has_output)
{
    struct ic_gguf_facts *f = r->f;

    f->tensor_bytes += bytes;
    if (starts(name, "blk."))
        return place_layer_tensor(r, name, bytes);
    if (starts(name, "token_embd") || starts(name, "token_types") || starts(name, "position_embd") ||
        starts(name, "per_layer_token_embd")) {
        f->input_bytes += bytes;
        if (!strcmp(name, "token_embd.weight"))
            f->embd_bytes = bytes;
        return IC_OK;
    }
    f->output_bytes += bytes;
    f->output_tensors++;
    if (!strcmp(name, "output.weight"))
        *has_output = true;
    return IC_OK;
}

static enum ic_status read_tensors(struct reading *r, const struct gguf_context *g, const char *path,
                                   uint64_t file_bytes, bool *has_output)
{
    uint64_t start = gguf_get_data_offset(g);

    for (int64_t i = 0, n = gguf_get_n_tensors(g); i < n; i++) {
        const char *name = gguf_get_tensor_name(g, i);
        uint64_t at = gguf_get_tensor_offset(g, i), bytes = gguf_get_tensor_size(g, i);
        if (start > file_bytes || at > file_bytes - start || bytes > file_bytes - start - at)
            return ic_fail(r->err, IC_BAD_REQUEST,
                           "%s %s: cut short: tensor %s does not lie inside the %llu bytes of the file",
                           r->kind, path, name, (unsigned long long)file_bytes);
        enum ic_status st = place_tensor(r, name, bytes, has_output);
        if (st != IC_OK)
            return st;
    }
    return IC_OK;
}

/* ---- caches ------------------------------------------------------------------------------------- */

/* Elements of recurrent state per sequence and layer, by the formulas of the families that have one. */
static uint64_t state_elements(const struct ic_gguf_facts *f, const struct gguf_context *g)
{
    uint64_t wkv = number_or(g, f->arch, "wkv.head_size", 0, 0);
    uint64_t conv = number_or(g, f->arch, "ssm.conv_kernel", 0, 0),
             inner = number_or(g, f->arch, "ssm.inner_size", 0, 0);
    uint64_t state = number_or(g, f->arch, "ssm.state_size", 0, 0),
             groups = number_or(g, f->arch, "ssm.group_count", 0, 0);
    uint64_t shortconv = number_or(g, f->arch, "shortconv.l_cache", 0, 0);

    if (wkv > IC_GGUF_ROW_MAX || conv > 1024 || inner > IC_GGUF_ROW_MAX || state > 65536 ||
        groups > 65536 || shortconv > 1024)
        return 0;
    if (wkv)
        return (uint64_t)f->n_embd * (wkv + number_or(g, f->arch, "token_shift_count", 0, 2) % 16);
    if (shortconv)
        return (uint64_t)f->n_embd * (shortconv - 1);
    return (conv ? conv - 1 : 0) * (inner + 2 * groups * state) + state * inner;
}

static enum ic_status read_caches(struct reading *r, const struct gguf_context *g)
{
    struct ic_gguf_facts *f = r->f;
    uint32_t heads = number_or(g, f->arch, "attention.head_count", 0, 0);
    uint32_t width = heads ? f->n_embd / heads : 0;
    uint32_t k_len = number_or(g, f->arch, "attention.key_length", 0, width);
    uint32_t v_len = number_or(g, f->arch, "attention.value_length", 0, width);
    bool latent =
        find(g, f->arch, "attention.key_length_mla") >= 0; /* keys and values are one compressed row */
    bool interval = number_or(g, f->arch, "full_attention_interval", 0, 0) > 0;
    bool windows = is_array(g, f->arch, "attention.sliding_window_pattern");
    uint32_t period = windows ? 0 : number_or(g, f->arch, "attention.sliding_window_pattern", 0, 0);
    uint64_t state = 4 * state_elements(f, g);

    for (uint32_t il = 0; il < f->n_layers; il++) {
        struct ic_gguf_layer *layer = &f->layer[il];
        if (r->seen[il].recurrent)
            layer->state_bytes = state;
        if (windows)
            layer->swa = number_or(g, f->arch, "attention.sliding_window_pattern", il, 0) != 0;
        else
            layer->swa = period > 0 && il % period < period - 1;
        if (!r->seen[il].attention || (r->seen[il].recurrent && interval))
            continue;
        uint32_t n = number_or(g, f->arch, "attention.head_count_kv", il,
                               number_or(g, f->arch, "attention.head_count", il, 0));
        uint32_t k = layer->swa ? number_or(g, f->arch, "attention.key_length_swa", 0, k_len) : k_len;
        uint32_t v = layer->swa ? number_or(g, f->arch, "attention.value_length_swa", 0, v_len) : v_len;
        uint64_t k_row = (uint64_t)n * k, v_row = latent ? 0 : (uint64_t)n * v;
        if (k_row > IC_GGUF_ROW_MAX || v_row > IC_GGUF_ROW_MAX)
            return ic_fail(r->err, IC_BAD_REQUEST,
                           "model %s: layer %u claims to cache %llu numbers per token", r->path, il,
                           (unsigned long long)(k_row + v_row));
        layer->k_row = (uint32_t)k_row;
        layer->v_row = (uint32_t)v_row;
    }
    return IC_OK;
}

/* ---- files -------------------------------------------------------------------------------------- */

/* A bound on what the parser below will do: it compares each name with all before it. */
static enum ic_status check_header(FILE *file, const char *kind, const char *path, struct ic_err *err)
{
    unsigned char h[HEADER_BYTES];
    uint64_t n[2];

    if (fread(h, 1, sizeof h, file) != sizeof h || memcmp(h, "GGUF", 4) != 0)
        return ic_fail(err, IC_BAD_REQUEST, "%s %s: not a GGUF file", kind, path);
    for (int i = 0; i < 2; i++) {
        n[i] = 0;
        for (int b = 7; b >= 0; b--)
            n[i] = n[i] << 8 | h[8 + 8 * i + b];
    }
    if (n[0] > IC_GGUF_TENSORS_MAX || n[1] > IC_GGUF_KEYS_MAX)
        return ic_fail(err, IC_BAD_REQUEST,
                       "%s %s: claims %llu tensors and %llu keys, at most %d and %d can be", kind, path,
                       (unsigned long long)n[0], (unsigned long long)n[1], IC_GGUF_TENSORS_MAX,
                       IC_GGUF_KEYS_MAX);
    rewind(file);
    return IC_OK;
}

static enum ic_status open_gguf(struct gguf_context **out, uint64_t *bytes, const char *kind,
                                const char *path, struct ic_err *err)
{
    struct gguf_init_params params = {.no_alloc = true, .ctx = NULL};
    struct stat s;
    enum ic_status st;

    if (stat(path, &s) != 0)
        return ic_fail(err, errno == ENOENT || errno == ENOTDIR ? IC_NOT_FOUND : IC_BAD_REQUEST,
                       "%s %s: %s", kind, path, strerror(errno));
    if (!S_ISREG(s.st_mode))
        return ic_fail(err, IC_BAD_REQUEST, "%s %s: not a file", kind, path);
    FILE *file = fopen(path, "rbe");
    if (!file)
        return ic_fail(err, IC_BAD_REQUEST, "%s %s: %s", kind, path, strerror(errno));
    if ((st = check_header(file, kind, path, err)) == IC_OK &&
        !(*out = gguf_init_from_file_ptr(file, params)))
        st = ic_fail(err, IC_BAD_REQUEST, "%s %s: its header is broken or cut short", kind, path);
    fclose(file);
    *bytes = (uint64_t)s.st_size;
    return st;
}

/* "NAME-00001-of-00003.gguf" → the name of the i-th file (0 the first). False: not named so. */
static bool split_name(char *out, size_t size, const char *first, uint32_t i, uint32_t n)
{
    char tail[32];
    int len = snprintf(tail, sizeof tail, "-00001-of-%05u.gguf", n);
    size_t all = strlen(first);

    if (all < (size_t)len || strcmp(first + all - len, tail) != 0 || all >= size)
        return false;
    snprintf(out, size, "%.*s-%05u-of-%05u.gguf", (int)(all - (size_t)len), first, i + 1, n);
    return true;
}

static enum ic_status read_others(struct reading *r, bool *has_output)
{
    char path[4096];
    enum ic_status st = IC_OK;

    for (uint32_t i = 1; st == IC_OK && i < r->f->n_files; i++) {
        struct gguf_context *g;
        uint64_t bytes;
        if (!split_name(path, sizeof path, r->path, i, r->f->n_files))
            return ic_fail(r->err, IC_BAD_REQUEST,
                           "model %s: the first of %u files must be named NAME-00001-of-%05u.gguf", r->path,
                           r->f->n_files, r->f->n_files);
        if ((st = open_gguf(&g, &bytes, "model", path, r->err)) != IC_OK)
            return st;
        r->f->file_bytes += bytes;
        if (number_or(g, NULL, "split.no", 0, 0) != i)
            st = ic_fail(r->err, IC_BAD_REQUEST, "model %s: not part %u of its model", path, i + 1);
        else
            st = read_tensors(r, g, path, bytes, has_output);
        gguf_free(g);
    }
    return st;
}

static enum ic_status read_all(struct reading *r, const struct gguf_context *g, uint64_t bytes)
{
    struct ic_gguf_facts *f = r->f;
    bool has_output = false;
    enum ic_status st;

    f->file_bytes = bytes;
    f->n_files = number_or(g, NULL, "split.count", 0, 1);
    if (f->n_files == 0)
        f->n_files = 1;
    if (f->n_files > IC_GGUF_SPLITS_MAX)
        return ic_fail(r->err, IC_BAD_REQUEST, "model %s: claims %u files, at most %d can be", r->path,
                       f->n_files, IC_GGUF_SPLITS_MAX);
    if (f->n_files > 1 && number_or(g, NULL, "split.no", 0, 0) != 0)
        return ic_fail(r->err, IC_BAD_REQUEST, "model %s: not the first file of its model", r->path);
    if ((st = read_sizes(r, g)) != IC_OK ||
        (st = read_tensors(r, g, r->path, bytes, &has_output)) != IC_OK ||
        (st = read_others(r, &has_output)) != IC_OK)
        return st;
    f->tied = !has_output;
    return read_caches(r, g);
}

enum ic_status ic_gguf_read(struct ic_gguf_facts *out, const char *path, struct ic_err *err)
{
    struct gguf_context *g = NULL;
    uint64_t bytes = 0;
    enum ic_status st = open_gguf(&g, &bytes, "model", path, err);

    if (st != IC_OK)
        return st;
    memset(out, 0, sizeof *out);
    struct reading *r = calloc(1, sizeof *r);
    if (!r) {
        st = ic_fail(err, IC_OOM, "out of memory");
    } else {
        r->f = out;
        r->kind = "model";
        r->path = path;
        r->err = err;
        st = read_all(r, g, bytes);
    }
    free(r);
    gguf_free(g);
    return st;
}

/* ---- adapters ----------------------------------------------------------------------------------- */

/* NULL: there is none, or it is no text. */
static const char *text_of(const struct gguf_context *g, const char *key)
{
    int64_t id = gguf_find_key(g, key);
    return id >= 0 && gguf_get_kv_type(g, id) == GGUF_TYPE_STRING ? gguf_get_val_str(g, id) : NULL;
}

/* llama.cpp asserts what is asked here, or looks at it after it has read all weights. */
static enum ic_status check_lora_keys(const struct reading *r, const struct gguf_context *g)
{
    const char *type = text_of(g, "general.type"), *kind = text_of(g, "adapter.type");
    const char *arch = text_of(g, "general.architecture");
    int64_t alpha = gguf_find_key(g, "adapter.lora.alpha");

    if (!type || strcmp(type, "adapter") != 0 || !kind || strcmp(kind, "lora") != 0)
        return ic_fail(r->err, IC_BAD_REQUEST, "adapter %s: not a LoRA adapter", r->path);
    if (!arch || strcmp(arch, r->f->arch) != 0)
        return ic_fail(r->err, IC_BAD_REQUEST,
                       "adapter %s: made for the architecture %.40s, the model is %s", r->path,
                       arch ? arch : "(none)", r->f->arch);
    if (alpha >= 0 &&
        (gguf_get_kv_type(g, alpha) != GGUF_TYPE_FLOAT32 || !isfinite(gguf_get_val_f32(g, alpha))))
        return ic_fail(r->err, IC_BAD_REQUEST, "adapter %s: its alpha is no number", r->path);
    if (gguf_find_key(g, "adapter.alora.invocation_tokens") >= 0)
        return ic_fail(r->err, IC_BAD_REQUEST,
                       "adapter %s: works only behind certain words (aLoRA), which is not supported",
                       r->path);
    return IC_OK;
}

static bool ends(const char *s, const char *with)
{
    size_t n = strlen(s), k = strlen(with);
    return n >= k && !strcmp(s + n - k, with);
}

/* What else may stand in such a file llama.cpp refuses by name, or passes over. */
static enum ic_status check_lora_tensors(const struct reading *r, const struct gguf_context *g)
{
    int64_t pairs = 0;

    for (int64_t i = 0, n = gguf_get_n_tensors(g); i < n; i++) {
        enum ggml_type t = gguf_get_tensor_type(g, i);
        const char *name = gguf_get_tensor_name(g, i);
        pairs += ends(name, ".lora_a");
        if (t != GGML_TYPE_F32 && t != GGML_TYPE_F16 && t != GGML_TYPE_BF16 && !ggml_is_quantized(t))
            return ic_fail(r->err, IC_BAD_REQUEST,
                           "adapter %s: tensor %s is of the type %s, which is none of weights", r->path,
                           name, ggml_type_name(t));
    }
    return pairs > 0 ? IC_OK : ic_fail(r->err, IC_BAD_REQUEST, "adapter %s: holds no weights", r->path);
}

enum ic_status ic_gguf_add_lora(struct ic_gguf_facts *f, const char *path, struct ic_err *err)
{
    struct gguf_context *g = NULL;
    uint64_t bytes = 0, model_bytes = f->tensor_bytes;
    bool has_output = false;
    enum ic_status st = open_gguf(&g, &bytes, "adapter", path, err);

    if (st != IC_OK)
        return st;
    struct reading *r = calloc(1, sizeof *r);
    if (!r) {
        st = ic_fail(err, IC_OOM, "out of memory");
    } else {
        *r = (struct reading){.f = f, .kind = "adapter", .path = path, .err = err};
        if ((st = check_lora_keys(r, g)) == IC_OK && (st = check_lora_tensors(r, g)) == IC_OK)
            st = read_tensors(r, g, path, bytes, &has_output);
    }
    f->lora_bytes += f->tensor_bytes - model_bytes;
    f->tensor_bytes = model_bytes;
    free(r);
    gguf_free(g);
    return st;
}

uint64_t ic_gguf_kv_bytes(const struct ic_gguf_facts *f, uint32_t layer, const struct ic_gguf_kv *kv)
{
    const struct ic_gguf_layer *l = &f->layer[layer];
    uint64_t cells = kv->cells;

    IC_ASSERT(layer < f->n_layers);
    if (l->swa && f->n_swa && !kv->swa_full) {
        uint64_t window = (uint64_t)f->n_swa * kv->sequences + kv->batch;
        window = (window + CACHE_PAD - 1) / CACHE_PAD * CACHE_PAD;
        cells = window < cells ? window : cells;
    }
    return cells * (ggml_row_size((enum ggml_type)kv->k_type, l->k_row) +
                    ggml_row_size((enum ggml_type)kv->v_type, l->v_row)) +
           l->state_bytes * kv->sequences;
}

uint64_t ic_gguf_output_bytes(const struct ic_gguf_facts *f)
{
    return f->output_bytes + (f->tied ? f->embd_bytes : 0);
}
