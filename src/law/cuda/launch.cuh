/* Host side of the kernels that read a norm's sums and may start before the one before them has ended. */
#ifndef IC_LAW_CUDA_LAUNCH_CUH
#define IC_LAW_CUDA_LAUNCH_CUH

#include "law/cuda/kernels.h"

/* `a` is the kernel's only parameter. overlap: programmatic dependent launch. cluster: blocks along x that
 * share memory. */
template <class A>
static cudaError_t launch_kernel(const void *kernel, dim3 grid, int threads, size_t smem, const A *a,
                                 int overlap, cudaStream_t stream, int cluster = 1)
{
    cudaLaunchAttribute attributes[2] = {};
    unsigned n = 0;
    if (overlap) {
        attributes[n].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[n++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[n].id = cudaLaunchAttributeClusterDimension;
        attributes[n].val.clusterDim.x = (unsigned)cluster;
        attributes[n].val.clusterDim.y = attributes[n].val.clusterDim.z = 1;
        n++;
    }
    cudaLaunchConfig_t launch = {};
    launch.gridDim = grid;
    launch.blockDim = dim3((unsigned)threads);
    launch.dynamicSmemBytes = smem;
    launch.stream = stream;
    launch.attrs = attributes;
    launch.numAttrs = n;
    void *args[1] = {const_cast<A *>(a)};
    return cudaLaunchKernelExC(&launch, kernel, args);
}

/* As many lanes a group as leave all groups to one pass of a block, 32 at most. */
static inline void share_lanes(struct ic_cu_src *s, int threads)
{
    for (s->lane_shift = 5; s->lane_shift > 0 && (s->groups << s->lane_shift) > threads; s->lane_shift--)
        ;
}

/* The kernels of a family, kernel_at(0 … count - 1), may use so much shared memory; NULL: that one is not built. Not to have
 * them is no failure, so nothing is left of it for the next call. */
template <class F> static cudaError_t allow_smem(int count, int smem_max, F kernel_at)
{
    cudaError_t e = cudaSuccess;
    for (int i = 0; i < count && e == cudaSuccess; i++) {
        const void *kernel = kernel_at(i);
        e = kernel ? cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_max)
                   : cudaErrorNoKernelImageForDevice;
    }
    cudaGetLastError();
    return e;
}

/* kernel_of(type, taps, config) of a family for Hopper, whose kernels are built by type and taps; NULL where it is not. */
#if IC_CU_WIDE
#define KERNELS_BY_TYPE_AND_TAPS(family)                                                                   \
    extern "C" {                                                                                           \
    const void *ic_cu_##family##_f16_9(int config);                                                        \
    const void *ic_cu_##family##_f16_1(int config);                                                        \
    const void *ic_cu_##family##_bf16_9(int config);                                                       \
    const void *ic_cu_##family##_bf16_1(int config);                                                       \
    }                                                                                                      \
    static const void *kernel_of(enum ic_cu_type type, int taps, int config)                               \
    {                                                                                                      \
        if (type == IC_CU_F16)                                                                             \
            return taps == 9 ? ic_cu_##family##_f16_9(config) : ic_cu_##family##_f16_1(config);            \
        return taps == 9 ? ic_cu_##family##_bf16_9(config) : ic_cu_##family##_bf16_1(config);              \
    }
#else
#define KERNELS_BY_TYPE_AND_TAPS(family)                                                                   \
    static const void *kernel_of(enum ic_cu_type, int, int)                                                \
    {                                                                                                      \
        return nullptr;                                                                                    \
    }
#endif

/* Blocks that share weights take as many tiles each: clusters are whole, and so are a block's tiles. */
static inline int even_clusters(int all_tiles, int tiles, int cluster_shift)
{
    return cluster_shift == 0 || all_tiles % (tiles << cluster_shift) == 0;
}

/* Bytes of shared memory, up to where the next part may begin. */
static inline int rounded(int a)
{
    return (a + 127) / 128 * 128;
}

static inline int larger(int a, int b)
{
    return a > b ? a : b;
}

#endif
