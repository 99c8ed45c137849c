/* The smaller and the larger of two numbers. Any thread. */
#ifndef IC_BASE_LEAST_H
#define IC_BASE_LEAST_H

#include <stdint.h>

static inline int32_t ic_least(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

static inline int32_t ic_most(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

#endif
