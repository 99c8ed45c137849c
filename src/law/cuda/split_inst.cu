/* One type and kernel size of split.cuh in every configuration, as conv_inst.cu. */
#include "law/cuda/split.cuh"

#define PASTE(a, b, c) a##b##_##c
#define NAME(a, b, c) PASTE(a, b, c)

typedef void (*split_fn)(ic_cu_conv);

static const split_fn kernels[IC_CU_SPLIT_COUNT] = {
#define X(i, wm, n, staged) split_kernel<IC_CU_TYPE, IC_CU_TAPS, wm, n, staged>,
    IC_CU_SPLIT_CONFIGS(X)
#undef X
};

extern "C" const void *NAME(ic_cu_split_, IC_CU_TYPE, IC_CU_TAPS)(int config)
{
    return reinterpret_cast<const void *>(kernels[config]);
}
