/* For tests only: laws with random weights, and a small deterministic generator. */
#ifndef IC_LAW_FIXTURE_H
#define IC_LAW_FIXTURE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "law/law.h"
#include "model/safetensors.h"

struct fixture_rng {
    uint64_t s;
};

/* splitmix64 (Steele, Lea, Flood 2014) */
static inline uint64_t fixture_bits(struct fixture_rng *r)
{
    uint64_t z = (r->s += 0x9E3779B97F4A7C15u);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static inline float fixture_uniform(struct fixture_rng *r) /* [-1, 1) */
{
    return (float)((double)(fixture_bits(r) >> 11) * 0x1p-52 - 1.0);
}

/* A complete law whose weights are random with about PyTorch's initial scale, norms near 1; written as
 * safetensors and loaded again. NULL on failure (message on stderr). */
static inline struct ic_law *fixture_law(enum ic_law_arch arch, unsigned d, unsigned b, uint64_t seed)
{
    struct ic_law_spec specs[IC_LAW_SPECS_MAX];
    struct ic_safetensors_out out[IC_LAW_SPECS_MAX];
    size_t n = ic_law_arch_specs(arch, d, b, specs), kept = 0;
    struct fixture_rng rng = {seed};
    for (size_t i = 0; i < n; i++) {
        const struct ic_law_spec *s = &specs[i];
        if (s->optional)
            continue;
        size_t count = (size_t)s->dim[0] * s->dim[1] * s->dim[2] * s->dim[3];
        float *data = malloc(count * sizeof *data);
        float centre =
            strstr(s->name, "conv_block.1.weight") || strstr(s->name, "conv_block.4.weight") ? 1 : 0;
        float scale = s->ndim == 4 ? 3.0f / (float)(s->dim[1] * s->dim[2] * s->dim[3] + 8) : 0.2f;
        if (s->ndim == 4 &&
            arch == IC_LAW_SNN_UNET) /* sums of about 1, so that some spike and some do not */
            scale = 4.0f / __builtin_sqrtf((float)(s->dim[1] * s->dim[2] * s->dim[3]));
        else if (s->ndim == 4 && strncmp(s->name, "out", 3) != 0)
            scale *= 3;
        for (size_t k = 0; k < count; k++)
            data[k] = centre + scale * fixture_uniform(&rng);
        out[kept] = (struct ic_safetensors_out){
            .name = s->name, .dtype = IC_DTYPE_F32, .ndim = s->ndim, .data = data};
        for (unsigned k = 0; k < s->ndim; k++)
            out[kept].shape[k] = s->dim[k];
        kept++;
    }
    char dir[] = "/tmp/ic-law-XXXXXX", path[64];
    struct ic_law *law = NULL;
    struct ic_err err = {0};
    if (mkdtemp(dir)) {
        snprintf(path, sizeof path, "%s/law.safetensors", dir);
        if (ic_safetensors_write(path, out, kept, NULL, 0, &err) == IC_OK)
            ic_law_open(path, &(struct ic_law_open_opts){.arch = ic_law_arch_info(arch)->name}, &law, &err);
        unlink(path);
        rmdir(dir);
    }
    if (!law)
        fprintf(stderr, "fixture_law: %s\n", err.msg);
    for (size_t i = 0; i < kept; i++)
        free((void *)(uintptr_t)out[i].data);
    return law;
}

/* A random field with unit cells, float32 [H,W,d,2]; the caller frees. */
static inline float *fixture_psi(unsigned h, unsigned w, unsigned d, uint64_t seed)
{
    struct fixture_rng rng = {seed};
    size_t n = (size_t)h * w * d * 2;
    float *psi = malloc(n * sizeof *psi);
    for (size_t i = 0; i < n; i++)
        psi[i] = fixture_uniform(&rng);
    for (size_t i = 0; i < n; i += 2 * d) {
        float sum = 1e-6f;
        for (size_t k = 0; k < 2 * d; k++)
            sum += psi[i + k] * psi[i + k];
        for (size_t k = 0; k < 2 * d; k++)
            psi[i + k] /= __builtin_sqrtf(sum);
    }
    return psi;
}

#endif
