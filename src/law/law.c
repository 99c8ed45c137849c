#include "law/law.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/log.h"
#include "base/utf8.h"
#include "law/config.h"
#include "law/plan.h"
#include "law/quant.h"
#include "model/tensors.h"

#define GAMMA_STANDARD 0.01
#define STEPS_TRAINING_STANDARD 100
#define PATH_MAX_BYTES 4096

/* ---- Names and places ------------------------------------------------------------------------ */

/* The number right after the last `mark` in a file name, or -1. */
static int64_t number_after(const char *name, const char *mark)
{
    const char *hit = NULL;
    for (const char *p = name; (p = strstr(p, mark)); p++)
        hit = p + strlen(mark);
    if (!hit || !isdigit((unsigned char)*hit))
        return -1;
    int64_t n = 0;
    for (; isdigit((unsigned char)*hit); hit++)
        if (__builtin_mul_overflow(n, 10, &n) || __builtin_add_overflow(n, *hit - '0', &n))
            return -1;
    return n;
}

/* law-m.md §3.1: the last `_`-separated token without extension and `ep`, as a number; else 0. */
static int64_t checkpoint_rank(const char *name)
{
    const char *token = strrchr(name, '_');
    token = token ? token + 1 : name;
    if (strncmp(token, "ep", 2) == 0)
        token += 2;
    int64_t n = 0;
    const char *p = token;
    for (; isdigit((unsigned char)*p); p++)
        if (__builtin_mul_overflow(n, 10, &n) || __builtin_add_overflow(n, *p - '0', &n))
            return 0;
    return p > token && strcmp(p, ".pth") == 0 ? n : 0;
}

static bool has_tail(const char *name, const char *tail)
{
    size_t n = strlen(name), t = strlen(tail);
    return n > t && strcmp(name + n - t, tail) == 0;
}

/* The folder's latest checkpoint; equal ranks (best_model, last_checkpoint): the last by name. */
static enum ic_status latest_checkpoint(const char *folder, char *out, size_t size, struct ic_err *err)
{
    DIR *dir = opendir(folder);
    if (!dir)
        return ic_fail(err, IC_INTERNAL, "%s: %s", folder, strerror(errno));
    char best[256] = "";
    const struct dirent *e;
    while ((e = readdir(dir))) {
        if (!has_tail(e->d_name, ".pth"))
            continue;
        int64_t now = checkpoint_rank(e->d_name), then = checkpoint_rank(best);
        if (!best[0] || now > then || (now == then && strcmp(e->d_name, best) > 0))
            snprintf(best, sizeof best, "%s", e->d_name);
    }
    closedir(dir);
    if (!best[0])
        return ic_fail(err, IC_NOT_FOUND, "%s holds no .pth file", folder);
    int n = snprintf(out, size, "%s/%s", folder, best);
    return n > 0 && (size_t)n < size ? IC_OK : ic_fail(err, IC_BAD_REQUEST, "the path is too long");
}

static bool is_file(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISREG(st.st_mode);
}

/* config.json beside the checkpoint, or where Atheria keeps it (law-m.md §3.1):
 * training_checkpoints/<exp>/x.pth and experiments/<exp>/config.json. */
static bool find_config(const char *checkpoint, char *out, size_t size)
{
    const char *slash = strrchr(checkpoint, '/');
    char folder[PATH_MAX_BYTES];
    int n = snprintf(folder, sizeof folder, "%.*s", slash ? (int)(slash - checkpoint) : 1,
                     slash ? checkpoint : ".");
    if (n < 0 || (size_t)n >= sizeof folder)
        return false;
    n = snprintf(out, size, "%s/config.json", folder);
    if (n > 0 && (size_t)n < size && is_file(out))
        return true;
    const char *exp = strrchr(folder, '/');
    if (!exp)
        return false;
    n = snprintf(out, size, "%s/../../experiments/%s/config.json", folder, exp + 1);
    return n > 0 && (size_t)n < size && is_file(out);
}

/* ---- Which network is it --------------------------------------------------------------------- */

/* Tensors that only one family has, and its output layer, whose shape [2d, b, 1, 1] gives the sizes. Two of each, so that
 * a file that lacks one of them is still told what is missing. */
static const struct sign {
    const char *tensor, *output;
    enum ic_law_arch arch;
} signs[] = {
    {"conv_gates.weight", "outc.weight", IC_LAW_UNET_CONVLSTM},
    {"conv_gates.bias", "outc.weight", IC_LAW_UNET_CONVLSTM},
    {"processing_net.0.weight", "processing_net.4.weight", IC_LAW_DEEP_QCA},
    {"processing_net.2.weight", "processing_net.4.weight", IC_LAW_DEEP_QCA},
    {"net.0.weight", "net.4.weight", IC_LAW_MLP},
    {"net.2.weight", "net.4.weight", IC_LAW_MLP},
    {"conv_bottom.weight", "conv_out.weight", IC_LAW_SNN_UNET},
    {"conv_bottom.bias", "conv_out.weight", IC_LAW_SNN_UNET},
    {"inc.conv_block.1.bias", "outc.weight", IC_LAW_UNET}, /* or UNET_UNITARY */
    {"bot.conv_block.1.bias", "outc.weight", IC_LAW_UNET},
    {"inc.conv_block.1.weight", "outc.weight", IC_LAW_UNET_UNITARY_RMSNORM},
    {"bot.conv_block.1.weight", "outc.weight", IC_LAW_UNET_UNITARY_RMSNORM},
};

/* Where a network stands inside a wrapper (`module.` of DataParallel, `model.` of a trainer, any other), what stands
 * before its first layer leaves every name that begins with it. */
static enum ic_status unwrap(struct ic_tensors *set, struct ic_err *err)
{
    char wrapper[IC_TENSOR_NAME_MAX] = "";
    size_t len = 0;
    for (size_t k = 0; k < sizeof signs / sizeof signs[0]; k++)
        if (ic_tensors_find(set, signs[k].tensor))
            return IC_OK;
    for (size_t i = 0; i < set->count; i++)
        for (size_t k = 0; k < sizeof signs / sizeof signs[0]; k++) {
            const char *name = set->list[i].name;
            if (!has_tail(name, signs[k].tensor))
                continue;
            const size_t before = strlen(name) - strlen(signs[k].tensor);
            if (name[before - 1] != '.')
                continue;
            if (len && (before != len || memcmp(wrapper, name, len) != 0))
                return ic_fail(err, IC_BAD_REQUEST, "two networks, in %.*s and in %.*s: save one alone",
                               (int)len - 1, wrapper, (int)before - 1, name);
            memcpy(wrapper, name, len = before);
        }
    for (size_t i = 0; i < set->count && len; i++) {
        char *name = set->list[i].name;
        if (strncmp(name, wrapper, len) != 0 || !name[len])
            continue;
        if (ic_tensors_find(set, name + len))
            return ic_fail(err, IC_BAD_REQUEST, "tensor %s appears twice, with and without %s", name + len,
                           wrapper);
        memmove(name, name + len, strlen(name + len) + 1);
    }
    return IC_OK;
}

static enum ic_status choose_arch(const struct ic_tensors *set, const char *said, const char *by,
                                  struct ic_law *law, const struct sign **sign, struct ic_err *err)
{
    enum ic_law_arch arch = IC_LAW_ARCH_COUNT;
    *sign = NULL;
    if (said) {
        enum ic_status s = ic_law_arch_parse(said, &arch, err);
        if (s != IC_OK)
            return s;
    }
    for (size_t i = 0; i < sizeof signs / sizeof signs[0] && !*sign; i++)
        if (ic_tensors_find(set, signs[i].tensor))
            *sign = &signs[i];
    if (!*sign)
        return ic_fail(err, IC_BAD_REQUEST, "%zu tensors (%s), but not those of any Law M architecture%s%s",
                       set->count, set->form, set->count ? "; the first is " : "",
                       set->count ? set->list[0].name : "");
    if (!said && (*sign)->arch == IC_LAW_UNET)
        return ic_fail(err, IC_BAD_REQUEST,
                       "UNET or UNET_UNITARY? Their tensors are the same: say which with --arch, or "
                       "MODEL_ARCHITECTURE in config.json");
    bool same = arch == (*sign)->arch || (arch == IC_LAW_UNET_UNITARY && (*sign)->arch == IC_LAW_UNET);
    if (said && !same)
        return ic_fail(err, IC_BAD_REQUEST, "%s says %s, but the tensors are those of %s", by, said,
                       (*sign)->arch == IC_LAW_UNET ? "UNET or UNET_UNITARY"
                                                    : ic_law_arch_info((*sign)->arch)->name);
    law->arch = said ? arch : (*sign)->arch;
    return IC_OK;
}

static enum ic_status choose_sizes(const struct ic_tensors *set, const struct sign *sign,
                                   const struct ic_law_config *config, struct ic_law *law,
                                   struct ic_err *err)
{
    const struct ic_tensor *t = ic_tensors_find(set, sign->output);
    char shape[160];
    if (!t)
        return ic_fail(err, IC_BAD_REQUEST, "tensor %s is missing", sign->output);
    law->d = config->d;
    law->b = config->b;
    if (t->dtype == IC_DTYPE_U8 && law->d && law->b)
        return IC_OK; /* quantised: its shape is in its layout, which load_weights checks */
    if (t->ndim != 4 || t->shape[0] < 2 || t->shape[0] % 2 || t->shape[0] > 2 * IC_LAW_D_MAX ||
        t->shape[1] < 1 || t->shape[1] > IC_LAW_B_MAX)
        return ic_fail(err, IC_BAD_REQUEST,
                       "tensor %s has shape %s; expected [2d, b, 1, 1], d <= %d, b <= %d", t->name,
                       ic_tensor_shape_str(t->shape, t->ndim, shape, sizeof shape), IC_LAW_D_MAX,
                       IC_LAW_B_MAX);
    law->d = config->d ? config->d : (unsigned)t->shape[0] / 2;
    law->b = config->b ? config->b : (unsigned)t->shape[1];
    return IC_OK;
}

/* ---- Weights --------------------------------------------------------------------------------- */

static enum ic_status check_spec(const struct ic_law_spec *spec, const struct ic_tensor *t,
                                 struct ic_err *err)
{
    int64_t want[4] = {spec->dim[0], spec->dim[1], spec->dim[2], spec->dim[3]};
    char expected[160], found[160];
    if (!t && spec->optional)
        return IC_OK;
    ic_tensor_shape_str(want, spec->ndim, expected, sizeof expected);
    if (!t)
        return ic_fail(err, IC_BAD_REQUEST, "tensor %s %s is missing", spec->name, expected);
    bool same = t->ndim == spec->ndim;
    for (unsigned i = 0; same && i < spec->ndim; i++)
        same = t->shape[i] == want[i];
    if (spec->ndim == 0 && t->count == 1) /* snnTorch's scalars come as [] or [1] */
        same = true;
    if (!same)
        return ic_fail(err, IC_BAD_REQUEST, "tensor %s has shape %s; expected %s", spec->name,
                       ic_tensor_shape_str(t->shape, t->ndim, found, sizeof found), expected);
    if (ic_dtype_info(t->dtype)->parts != 1)
        return ic_fail(err, IC_BAD_REQUEST, "tensor %s is complex", spec->name);
    return IC_OK;
}

static size_t spec_count(const struct ic_law_spec *s)
{
    return (size_t)s->dim[0] * s->dim[1] * s->dim[2] * s->dim[3];
}

/* Takes the next weight's place from the law's block, *at bytes into it, and steps over it. */
static struct ic_law_weight *place(struct ic_law *law, const struct ic_law_spec *spec,
                                   enum ic_law_precision precision, bool twice, size_t *at)
{
    struct ic_law_weight *w = &law->weights[law->weight_count++];
    memcpy(w->name, spec->name, sizeof w->name);
    w->ndim = spec->ndim;
    memcpy(w->dim, spec->dim, sizeof w->dim);
    w->count = spec_count(spec);
    ic_law_weight_place(w, precision, twice, (char *)law->data + *at);
    *at += ic_law_weight_room(precision, twice, w->count);
    if (precision > law->precision)
        law->precision = precision;
    return w;
}

/* conv_neighbors (depthwise 3x3, output channel 8i+r reads input i) followed by the first 1x1 layer P is
 * the 3x3 convolution  F[o,i,ky,kx] = sum_r P[o,8i+r] K[8i+r,ky,kx]  (law-m.md §2.6). Exact for any K. */
static enum ic_status fold_taps(const struct ic_law *law, const float *k, const float *p, float *out,
                                struct ic_err *err)
{
    const size_t in = 2 * law->d;
    for (size_t o = 0; o < law->b; o++)
        for (size_t i = 0; i < in; i++)
            for (size_t tap = 0; tap < 9; tap++) {
                double sum = 0;
                for (size_t r = 8 * i; r < 8 * i + 8; r++)
                    sum += (double)p[o * 8 * in + r] * (double)k[r * 9 + tap];
                if (!isfinite((float)sum))
                    return ic_fail(err, IC_BAD_REQUEST,
                                   "processing_net.0.weight and conv_neighbors.weight overflow");
                out[(o * in + i) * 9 + tap] = (float)sum;
            }
    return IC_OK;
}

/* The folded layer is float32 whatever its parts are kept in. */
static enum ic_status fold_neighbours(struct ic_law *law, size_t *at, struct ic_err *err)
{
    const struct ic_law_weight *k = &law->weights[ic_law_weight_find(law, "conv_neighbors.weight")];
    const struct ic_law_weight *p = &law->weights[ic_law_weight_find(law, "processing_net.0.weight")];
    const struct ic_law_weight *bias = &law->weights[ic_law_weight_find(law, "processing_net.0.bias")];
    struct ic_law_spec spec = {
        .name = IC_LAW_FOLDED ".weight", .ndim = 4, .dim = {law->b, 2 * law->d, 3, 3}};
    float *taps = malloc((k->count + p->count) * sizeof *taps);
    if (!taps)
        return ic_fail(err, IC_OOM, "no memory to fold a layer");
    ic_law_weight_read(k, 0, k->count, taps);
    ic_law_weight_read(p, 0, p->count, taps + k->count);
    float *out = (float *)(void *)((char *)law->data + *at);
    place(law, &spec, IC_LAW_FP32, false, at);
    enum ic_status s = fold_taps(law, taps, taps + k->count, out, err);
    free(taps);
    spec = (struct ic_law_spec){.name = IC_LAW_FOLDED ".bias", .ndim = 1, .dim = {law->b, 1, 1, 1}};
    out = (float *)(void *)((char *)law->data + *at);
    place(law, &spec, IC_LAW_FP32, false, at);
    memcpy(out, bias->data, bias->count * sizeof(float));
    return s;
}

/* A LIF is a threshold only where the threshold is positive: else the reset would act in the same step. */
static enum ic_status check_spikes(const struct ic_law *law, struct ic_err *err)
{
    for (size_t i = 0; i < law->weight_count; i++) {
        const struct ic_law_weight *w = &law->weights[i];
        if (w->ndim == 0 && has_tail(w->name, ".threshold") && !(w->data[0] > 0))
            return ic_fail(err, IC_BAD_REQUEST, "tensor %s is %g; a threshold must be positive", w->name,
                           (double)w->data[0]);
    }
    return IC_OK;
}

/* Buffers of snnTorch that no step reads. */
static bool is_known_extra(const char *name)
{
    return has_tail(name, ".mem") || has_tail(name, ".reset_mechanism_val") || has_tail(name, ".syn");
}

static void warn_unexpected(const struct ic_tensors *set, const struct ic_law_spec *specs, size_t n,
                            bool quantised)
{
    size_t unexpected = 0;
    const char *first = NULL;
    for (size_t i = 0; i < set->count; i++) {
        bool known = is_known_extra(set->list[i].name);
        const size_t stem = quantised ? ic_law_file_stem(set->list[i].name) : strlen(set->list[i].name);
        for (size_t k = 0; k < n && !known; k++)
            known = strlen(specs[k].name) == stem && memcmp(set->list[i].name, specs[k].name, stem) == 0;
        if (!known && unexpected++ == 0)
            first = set->list[i].name;
    }
    if (unexpected)
        ic_warn("law", "%zu tensor(s) that the network does not have were ignored, %s first", unexpected,
                first);
}

/* What each tensor will be kept in. */
struct form {
    enum ic_law_precision precision;
    bool twice;
};

/* Checks the file's tensor against its spec and the policy, and says how the law keeps it. */
static enum ic_status form_of(const struct ic_tensors *set, const struct ic_law *law,
                              const struct ic_law_spec *spec, const struct ic_law_policy *policy,
                              bool quantised, struct form *form, struct ic_err *err)
{
    const struct ic_tensor *t = ic_tensors_find(set, spec->name);
    const enum ic_law_precision wanted = policy ? ic_law_policy_of(policy, law->arch, spec) : IC_LAW_FP32;
    enum ic_status s = IC_OK;
    *form = (struct form){wanted, policy && policy->twice};
    if (quantised)
        s = ic_law_file_precision(set, spec, &form->precision, &form->twice, err);
    if (s == IC_OK && policy && !ic_law_policy_takes(policy, law->arch, spec, form->precision))
        s = ic_fail(
            err, IC_BAD_REQUEST,
            "tensor %s is stored as %s and cannot become %s: quantise the original checkpoint again",
            spec->name, ic_law_precision_name(form->precision), ic_law_precision_name(wanted));
    if (s == IC_OK && !(quantised && form->precision == IC_LAW_NF4)) /* else its shape is in the layout */
        s = check_spec(spec, t, err);
    return s;
}

/* One tensor at a time in float32, where it is not stored as it is kept. */
static enum ic_status load_weight(const struct ic_tensors *set, const struct ic_law_spec *spec,
                                  struct ic_law_weight *w, bool quantised, struct ic_err *err)
{
    const struct ic_tensor *t = ic_tensors_find(set, spec->name);
    if (!t)
        return ic_law_weight_fill(w, &spec->standard, err);
    if (quantised)
        return ic_law_file_read(set, w, err);
    float *x = malloc(w->count * sizeof *x);
    if (!x)
        return ic_fail(err, IC_OOM, "no memory for %zu weights", w->count);
    enum ic_status s = ic_tensors_read_f32(set, t, x, w->count, err);
    if (s == IC_OK)
        s = ic_law_weight_fill(w, x, err);
    free(x);
    return s;
}

static double weight_abs_max(const struct ic_law_weight *w)
{
    float x[256];
    double top = 0;
    for (size_t at = 0; at < w->count; at += 256) {
        const size_t n = w->count - at < 256 ? w->count - at : 256;
        ic_law_weight_read(w, at, n, x);
        for (size_t i = 0; i < n; i++)
            top = fmax(top, fabs((double)x[i]));
    }
    return top;
}

/* Names what a network cannot do without: the first with its shape, more of them by name. */
static enum ic_status check_complete(const struct ic_tensors *set, const struct ic_law_spec *specs,
                                     size_t n, struct ic_err *err)
{
    char more[256] = "", shape[160];
    const struct ic_law_spec *first = NULL;
    size_t missing = 0, at = 0;
    for (size_t i = 0; i < n; i++) {
        if (specs[i].optional || ic_tensors_find(set, specs[i].name))
            continue;
        if (missing++ == 0)
            first = &specs[i];
        else if (at < sizeof more - IC_LAW_TENSOR_NAME_MAX - 8)
            at += (size_t)snprintf(more + at, sizeof more - at, "%s%s", at ? ", " : ": ", specs[i].name);
        else if (more[at - 1] != '.')
            at += (size_t)snprintf(more + at, sizeof more - at, " ...");
    }
    if (!missing)
        return IC_OK;
    const int64_t want[4] = {first->dim[0], first->dim[1], first->dim[2], first->dim[3]};
    ic_tensor_shape_str(want, first->ndim, shape, sizeof shape);
    if (missing == 1)
        return ic_fail(err, IC_BAD_REQUEST, "tensor %s %s is missing", first->name, shape);
    return ic_fail(err, IC_BAD_REQUEST, "tensor %s %s is missing, and %zu more%s", first->name, shape,
                   missing - 1, more);
}

static enum ic_status load_weights(const struct ic_tensors *set, struct ic_law *law,
                                   const struct ic_law_policy *policy, struct ic_err *err)
{
    struct ic_law_spec specs[IC_LAW_SPECS_MAX];
    struct form forms[IC_LAW_SPECS_MAX];
    size_t n = ic_law_arch_specs(law->arch, law->d, law->b, specs), total = 0, at = 0;
    bool fold = law->arch == IC_LAW_DEEP_QCA, quantised;
    enum ic_status s = ic_law_file_is_quantised(set, &quantised, err);
    if (s == IC_OK && policy)
        s = ic_law_policy_check(policy, law->arch, err);
    if (s == IC_OK && !quantised)
        s = check_complete(set, specs, n, err);
    /* All shapes first: nothing is allocated for weights that the file does not hold. */
    for (size_t i = 0; i < n && s == IC_OK; i++) {
        s = form_of(set, law, &specs[i], policy, quantised, &forms[i], err);
        if (s == IC_OK)
            total += ic_law_weight_room(forms[i].precision, forms[i].twice, spec_count(&specs[i]));
        law->params += specs[i].parameter ? spec_count(&specs[i]) : 0;
    }
    if (s != IC_OK)
        return s;
    if (fold)
        total += ic_law_weight_room(IC_LAW_FP32, false, (size_t)law->b * 2 * law->d * 9) +
                 ic_law_weight_room(IC_LAW_FP32, false, law->b);
    law->weights = calloc(n + 2, sizeof *law->weights);
    law->data = aligned_alloc(IC_LAW_WEIGHT_ALIGN, total);
    if (!law->weights || !law->data)
        return ic_fail(err, IC_OOM, "no memory for %zu bytes of weights", total);
    memset(law->data, 0, total);
    law->weight_bytes = total;
    for (size_t i = 0; i < n && s == IC_OK; i++) {
        struct ic_law_weight *w = place(law, &specs[i], forms[i].precision, forms[i].twice, &at);
        s = load_weight(set, &specs[i], w, quantised, err);
        if (s != IC_OK)
            break;
        law->weight_abs_max = fmax(law->weight_abs_max, weight_abs_max(w));
        law->param_bytes += specs[i].parameter ? ic_law_weight_bytes(w) : 0;
    }
    if (s != IC_OK)
        return s;
    warn_unexpected(set, specs, n, quantised);
    s = check_spikes(law, err);
    return s == IC_OK && fold ? fold_neighbours(law, &at, err) : s;
}

/* ---- Opening --------------------------------------------------------------------------------- */

static void name_law(struct ic_law *law, const struct ic_law_config *config, const char *path)
{
    const char *file = strrchr(path, '/');
    file = file ? file + 1 : path;
    size_t stem = strlen(file);
    const char *dot = strrchr(file, '.');
    if (dot && dot > file)
        stem = (size_t)(dot - file);
    if (config->name[0])
        memcpy(law->name, config->name, sizeof law->name);
    else {
        char raw[IC_LAW_NAME_MAX / 3]; /* scrubbing may triple it */
        stem = stem < sizeof raw ? stem : sizeof raw - 1;
        law->name[ic_utf8_scrub(law->name, file, stem)] = 0;
    }
    snprintf(law->path, sizeof law->path, "%.*s", (int)sizeof law->path - 1, path);
    int64_t ep = number_after(file, "_ep"), step = number_after(file, "step_");
    if (law->episode < 0)
        law->episode = ep;
    ep = ep >= 0 ? ep : law->episode;
    if (step >= 0)
        law->initial_step = step;
    else if (ep < 0 || __builtin_mul_overflow(ep, (int64_t)law->steps_training, &law->initial_step))
        law->initial_step = 0;
}

static void take_config(struct ic_law *law, const struct ic_law_config *c)
{
    law->gamma = (float)(isnan(c->gamma) ? GAMMA_STANDARD : c->gamma);
    law->grid_training = c->grid_training;
    law->steps_training = c->steps_training ? c->steps_training : STEPS_TRAINING_STANDARD;
    snprintf(law->initial_mode, sizeof law->initial_mode, "%s",
             c->initial_mode[0] ? c->initial_mode : "complex_noise");
}

/* What the file itself says where config.json is silent (a quantised law carries it along, trainer v3 too). */
static enum ic_status complete_config(const struct ic_tensors *set, bool has_config,
                                      struct ic_law_config *config, struct ic_err *err)
{
    struct ic_law_config inside;
    const char *text = ic_tensors_meta(set, "ic.config");
    if (!text)
        return IC_OK;
    struct ic_err why = {0};
    enum ic_status s = ic_law_config_parse(text, strlen(text), &inside, &why);
    if (s != IC_OK) /* where there is a config.json, that is the one that was meant */
        return has_config ? IC_OK : ic_fail(err, s, "inside the checkpoint, %s", why.msg);
    if (!has_config)
        *config = inside;
    config->d = config->d ? config->d : inside.d;
    config->b = config->b ? config->b : inside.b;
    if (!config->arch[0])
        memcpy(config->arch, inside.arch, sizeof config->arch);
    return IC_OK;
}

static enum ic_status fill(struct ic_law *law, const char *path, const struct ic_tensors *set,
                           const struct ic_law_config *config, const struct ic_law_open_opts *opts,
                           struct ic_err *err)
{
    const struct sign *sign;
    const char *arch_option = opts ? opts->arch : NULL;
    const char *said = arch_option ? arch_option : config->arch[0] ? config->arch : NULL;
    enum ic_status s = choose_arch(set, said, arch_option ? "--arch" : "config.json", law, &sign, err);
    if (s == IC_OK)
        s = choose_sizes(set, sign, config, law, err);
    if (s != IC_OK)
        return s;
    const struct ic_law_arch_info *info = ic_law_arch_info(law->arch);
    law->product = info->product;
    law->memory = info->memory;
    law->grid_multiple = info->grid_multiple;
    law->episode = set->episode;
    take_config(law, config);
    name_law(law, config, path);
    return load_weights(set, law, opts ? opts->policy : NULL, err);
}

static enum ic_status find_config_for(const char *path, const struct ic_law_open_opts *opts,
                                      struct ic_law *law, struct ic_law_config *config, struct ic_err *err)
{
    char found[PATH_MAX_BYTES];
    *config = (struct ic_law_config){.gamma = (double)NAN};
    const char *from = opts && opts->config                     ? opts->config
                       : find_config(path, found, sizeof found) ? found
                                                                : NULL;
    if (!from)
        return IC_OK;
    law->has_config = true;
    return ic_law_config_read(from, config, err);
}

enum ic_status ic_law_open(const char *path, const struct ic_law_open_opts *opts, struct ic_law **out,
                           struct ic_err *err)
{
    char inside[PATH_MAX_BYTES];
    struct ic_law_config config;
    struct ic_tensors *set = NULL;
    struct stat st;
    *out = NULL;
    if (stat(path, &st))
        return ic_fail(err, errno == ENOENT || errno == ENOTDIR ? IC_NOT_FOUND : IC_INTERNAL, "%s: %s",
                       path, strerror(errno));
    if (S_ISDIR(st.st_mode)) {
        enum ic_status s = latest_checkpoint(path, inside, sizeof inside, err);
        if (s != IC_OK)
            return s;
        path = inside;
    }
    struct ic_law *law = calloc(1, sizeof *law);
    if (!law)
        return ic_fail(err, IC_OOM, "no memory for a law");
    enum ic_status s = find_config_for(path, opts, law, &config, err);
    if (s == IC_OK)
        s = ic_tensors_open(path, &set, err);
    if (s == IC_OK)
        s = unwrap(set, err);
    if (s == IC_OK)
        s = complete_config(set, law->has_config, &config, err);
    if (s == IC_OK)
        s = fill(law, path, set, &config, opts, err);
    ic_tensors_close(&set);
    if (s != IC_OK)
        ic_law_close(&law);
    *out = law;
    return s;
}

void ic_law_close(struct ic_law **law)
{
    if (!law || !*law)
        return;
    free((*law)->weights);
    free((*law)->data);
    free(*law);
    *law = NULL;
}

int ic_law_weight_find(const struct ic_law *law, const char *name)
{
    for (size_t i = 0; i < law->weight_count; i++)
        if (strcmp(law->weights[i].name, name) == 0)
            return (int)i;
    return -1;
}

size_t ic_law_psi_bytes(const struct ic_law *law, unsigned height, unsigned width)
{
    return (size_t)height * width * law->d * 2 * sizeof(float);
}

size_t ic_law_memory_bytes(const struct ic_law *law, unsigned height, unsigned width)
{
    return law->memory ? (size_t)2 * 4 * law->b * (height / 4) * (width / 4) * sizeof(float) : 0;
}
