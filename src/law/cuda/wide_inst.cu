/* One type and kernel size of wide.cuh in every configuration, as conv_inst.cu. */
#include "law/cuda/wide.cuh"

#define PASTE(a, b, c) a##b##_##c
#define NAME(a, b, c) PASTE(a, b, c)

typedef void (*wide_fn)(ic_cu_conv);

static const wide_fn kernels[IC_CU_WIDE_COUNT] = {
#define X(i, wm, wk, mt, n, units, load, blocks)                                                           \
    wide_kernel<IC_CU_TYPE, IC_CU_TAPS, wm, wk, mt, n, units, load, blocks>,
    IC_CU_WIDE_CONFIGS(X)
#undef X
};

extern "C" const void *NAME(ic_cu_wide_, IC_CU_TYPE, IC_CU_TAPS)(int config)
{
    return reinterpret_cast<const void *>(kernels[config]);
}
