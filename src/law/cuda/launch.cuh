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

static inline int larger(int a, int b)
{
    return a > b ? a : b;
}

#endif
