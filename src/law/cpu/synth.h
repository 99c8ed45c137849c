/* Laws with random weights, made in memory: for tests and benchmarks of the CPU back end only.
 * Weights are He-scaled so that activations stay of order 1 through every layer; norm scales lie around
 * 1, shifts and biases around 0; thresholds are the defaults. Same seed, same law. */
#ifndef IC_LAW_CPU_SYNTH_H
#define IC_LAW_CPU_SYNTH_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "law/law.h"
#include "law/quant.h"

static inline uint32_t synth_next(uint64_t *s)
{
    *s = *s * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*s >> 33);
}

/* Uniform in [-1, 1). */
static inline float synth_uniform(uint64_t *s)
{
    return (float)synth_next(s) / 1073741824.0f - 1.0f;
}

static inline void synth_weight(struct ic_law_weight *w, const struct ic_law_spec *spec, float *data,
                                uint64_t *seed)
{
    memcpy(w->name, spec->name, sizeof w->name);
    w->ndim = spec->ndim;
    w->count = 1;
    for (int i = 0; i < 4; i++) {
        w->dim[i] = i < (int)spec->ndim ? spec->dim[i] : 1;
        w->count *= w->dim[i];
    }
    w->data = data;
    const bool transposed = strncmp(spec->name, "up", 2) == 0;
    const double fan = spec->ndim == 4 ? (double)w->count / (transposed ? w->dim[1] * 4.0 : w->dim[0]) : 1;
    for (size_t i = 0; i < w->count; i++) {
        const float u = synth_uniform(seed);
        if (spec->ndim == 4)
            data[i] = u * (float)sqrt(3.0 / fan);
        else if (!spec->parameter)
            data[i] = spec->standard;
        else
            data[i] = strstr(spec->name, ".bias") ? 0.3f * u : 1 + 0.3f * u;
    }
    if (strcmp(spec->name, "conv_neighbors.weight") == 0)
        for (size_t i = 0; i < w->count; i++)
            data[i] = i % 9 == 4 ? 0.0f : 1.0f;
}

/* DEEP_QCA's first two layers as one 3x3 convolution, as ic_law_open makes it. */
static inline void synth_fold(struct ic_law *law, float *data)
{
    const float *p = law->weights[ic_law_weight_find(law, "processing_net.0.weight")].data;
    const float *bias = law->weights[ic_law_weight_find(law, "processing_net.0.bias")].data;
    struct ic_law_weight *w = &law->weights[law->weight_count++], *b = &law->weights[law->weight_count++];
    *w = (struct ic_law_weight){.name = IC_LAW_FOLDED ".weight",
                                .ndim = 4,
                                .dim = {law->b, 2 * law->d, 3, 3},
                                .count = (size_t)law->b * 2 * law->d * 9,
                                .data = data};
    *b = (struct ic_law_weight){
        .name = IC_LAW_FOLDED ".bias", .ndim = 1, .dim = {law->b, 1, 1, 1}, .count = law->b, .data = bias};
    for (size_t o = 0; o < law->b; o++)
        for (size_t i = 0; i < 2 * law->d; i++) {
            double sum = 0;
            for (size_t k = 0; k < 8; k++)
                sum += (double)p[(o * 2 * law->d + i) * 8 + k];
            for (size_t t = 0; t < 9; t++)
                data[(o * 2 * law->d + i) * 9 + t] = t == 4 ? 0.0f : (float)sum;
        }
}

/* NULL where memory is short. Free with synth_free. */
static inline struct ic_law *synth_law(enum ic_law_arch arch, unsigned d, unsigned b, uint64_t seed)
{
    struct ic_law_spec specs[IC_LAW_SPECS_MAX];
    const size_t n = ic_law_arch_specs(arch, d, b, specs);
    const struct ic_law_arch_info *info = ic_law_arch_info(arch);
    struct ic_law *law = calloc(1, sizeof *law);
    size_t floats = (size_t)b * 2 * d * 9 + 16;
    for (size_t i = 0; i < n; i++) {
        size_t c = 1;
        for (unsigned k = 0; k < specs[i].ndim; k++)
            c *= specs[i].dim[k];
        floats += (c + 15) / 16 * 16;
    }
    if (!law)
        return NULL;
    law->weights = calloc(n + 2, sizeof *law->weights);
    law->data = aligned_alloc(64, floats * sizeof(float) / 64 * 64 + 64);
    if (!law->weights || !law->data) {
        free(law->weights);
        free(law->data);
        free(law);
        return NULL;
    }
    snprintf(law->name, sizeof law->name, "synthetic");
    law->arch = arch;
    law->d = d;
    law->b = b;
    law->product = info->product;
    law->memory = info->memory;
    law->grid_multiple = info->grid_multiple;
    law->gamma = 0.01f;
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        synth_weight(&law->weights[i], &specs[i], (float *)law->data + at, &seed);
        at += (law->weights[i].count + 15) / 16 * 16;
        law->weight_count++;
    }
    if (arch == IC_LAW_DEEP_QCA)
        synth_fold(law, (float *)law->data + at);
    law->weight_bytes = floats * sizeof(float);
    return law;
}

static inline void synth_free(struct ic_law *law)
{
    free(law->weights);
    free(law->data);
    free(law);
}

/* Rewrites the law's weights in the precisions of a policy. False where memory is short, or fp16 too
 * narrow. */
static inline bool synth_requantise(struct ic_law *law, const struct ic_law_policy *policy)
{
    size_t total = 0, at = 0;
    bool good = true;
    struct ic_err err = {0};
    enum ic_law_precision p[IC_LAW_SPECS_MAX + 2];
    for (size_t i = 0; i < law->weight_count; i++) {
        struct ic_law_spec spec = {.ndim = law->weights[i].ndim};
        memcpy(spec.name, law->weights[i].name, sizeof spec.name);
        const bool folded = strncmp(spec.name, IC_LAW_FOLDED, strlen(IC_LAW_FOLDED)) == 0;
        p[i] = folded ? IC_LAW_FP32 : ic_law_policy_of(policy, law->arch, &spec);
        total += ic_law_weight_room(p[i], policy->twice, law->weights[i].count);
    }
    char *data = aligned_alloc(IC_LAW_WEIGHT_ALIGN, total);
    for (size_t i = 0; data && i < law->weight_count; i++) {
        struct ic_law_weight *w = &law->weights[i];
        const float *x = w->data;
        ic_law_weight_place(w, p[i], policy->twice, data + at);
        at += ic_law_weight_room(p[i], policy->twice, w->count);
        law->precision = p[i] > law->precision ? p[i] : law->precision;
        good = ic_law_weight_fill(w, x, &err) == IC_OK && good;
    }
    if (!data)
        return false;
    free(law->data);
    law->data = data;
    law->weight_bytes = total;
    return good;
}

/* Random field, unit norm per cell (initial mode `random`). */
static inline void synth_psi(float *psi, size_t cells, unsigned d, uint64_t seed)
{
    for (size_t i = 0; i < cells; i++, psi += 2 * d) {
        double sum = 0;
        for (unsigned k = 0; k < 2 * d; k++) {
            psi[k] = synth_uniform(&seed) + synth_uniform(&seed);
            sum += (double)psi[k] * (double)psi[k];
        }
        for (unsigned k = 0; k < 2 * d; k++)
            psi[k] = (float)((double)psi[k] / sqrt(sum));
    }
}

#endif
