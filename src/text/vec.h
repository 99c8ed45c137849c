/* Eight floats at a time, in GCC's vectors: the compiler splits them where a register holds fewer. A NaN compares false,
 * so it is never the greater one. */
#ifndef IC_TEXT_VEC_H
#define IC_TEXT_VEC_H

#include <stdint.h>

typedef float ic_vec __attribute__((vector_size(32)));
typedef int32_t ic_ivec __attribute__((vector_size(32)));
#define IC_LANES 8
/* built for whatever processor its caller is */
#define IC_WITHIN static inline __attribute__((always_inline))

IC_WITHIN void ic_vec_greater(ic_vec *a, const ic_vec *b) /* *a = *b > *a ? *b : *a, by lanes */
{
    ic_ivec yes = *b > *a;
    *a = (ic_vec)((yes & (ic_ivec)*b) | (~yes & (ic_ivec)*a));
}

/* e^x for x <= 0: 2^i times a polynomial for 2^f, |f| <= 1/2, good to 1e-6 of the value. Below -87 it is as e^-87: 0
 * beside the maximum's 1. */
IC_WITHIN void ic_vec_exp_below_zero(ic_vec *x)
{
    ic_vec t = (ic_vec){0} - 87.0f;
    ic_vec_greater(&t, x);
    t *= 1.44269504f;
    ic_ivec i = __builtin_convertvector(t - 0.5f, ic_ivec); /* towards zero, so this rounds */
    ic_vec f = t - __builtin_convertvector(i, ic_vec);
    ic_vec p = 0.00133335581f * f + 0.00961812911f;
    p = p * f + 0.0555041087f;
    p = p * f + 0.240226507f;
    p = p * f + 0.693147181f;
    p = p * f + 1.0f;
    *x = p * (ic_vec)((i + 127) << 23);
}

#endif
