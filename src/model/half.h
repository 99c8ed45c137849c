/* 16-bit floating point numbers in and out of float32. Pure; any thread. */
#ifndef IC_MODEL_HALF_H
#define IC_MODEL_HALF_H

#include <stdint.h>
#include <string.h>

static inline float ic_f32_of_bits(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline uint32_t ic_f32_bits(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

/* IEEE binary16; exact. */
static inline float ic_f16_to_f32(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 0x3FF;
    if (e == 31)
        return ic_f32_of_bits(sign | 0x7F800000 | m << 13);
    if (e)
        return ic_f32_of_bits(sign | (e + 112) << 23 | m << 13);
    const float sub = (float)m * 0x1p-24f; /* exact */
    return sign ? -sub : sub;
}

/* Rounds to nearest, ties to even; past 65504 becomes infinity, NaN stays one. */
static inline uint16_t ic_f32_to_f16(float f)
{
    const uint32_t bits = ic_f32_bits(f), sign = bits >> 16 & 0x8000;
    uint32_t a = bits & 0x7FFFFFFF;
    if (a > 0x7F800000)
        return (uint16_t)(sign | 0x7E00);
    if (a >= 0x477FF000) /* 65520, halfway to what would be 2^16 */
        return (uint16_t)(sign | 0x7C00);
    if (a < 0x38800000) { /* below 2^-14: a multiple of 2^-24; adding 1/2 leaves just those bits */
        const float sum = ic_f32_of_bits(a) + 0.5f;
        return (uint16_t)(sign | (ic_f32_bits(sum) - 0x3F000000));
    }
    a += 0xFFF + (a >> 13 & 1);
    return (uint16_t)(sign | ((a - 0x38000000) >> 13));
}

/* bfloat16: the upper half of a float32; exact. */
static inline float ic_bf16_to_f32(uint16_t h)
{
    return ic_f32_of_bits((uint32_t)h << 16);
}

/* Rounds to nearest, ties to even; NaN stays one. */
static inline uint16_t ic_f32_to_bf16(float f)
{
    const uint32_t bits = ic_f32_bits(f);
    if ((bits & 0x7FFFFFFF) > 0x7F800000)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

#endif
