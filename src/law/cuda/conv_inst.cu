/* One type, form of weights and kernel size of the convolution, in every configuration. Compiled once for
 * each, with IC_CU_TYPE (f16, bf16), IC_CU_NF4 (0, 1) and IC_CU_TAPS (9, 1), so that the work spreads over
 * cores. */
#include "law/cuda/conv.cuh"

#define PASTE(a, b, c, d) a##b##_##c##_##d
#define NAME(a, b, c, d) PASTE(a, b, c, d)

typedef void (*conv_fn)(ic_cu_conv);

static const conv_fn kernels[IC_CU_CONFIG_COUNT] = {
#define X(i, wm, wn, wk, mt, nt, u, blocks)                                                                \
    conv_kernel<IC_CU_TYPE, IC_CU_NF4, IC_CU_TAPS, wm, wn, wk, mt, nt, u, blocks>,
    IC_CU_CONFIGS(X)
#undef X
};

extern "C" const void *NAME(ic_cu_conv_, IC_CU_TYPE, IC_CU_NF4, IC_CU_TAPS)(int config)
{
    return reinterpret_cast<const void *>(kernels[config]);
}
