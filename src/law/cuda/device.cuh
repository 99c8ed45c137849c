/* Small pieces of device code: two 16-bit types, the tensor core's product, copies. */
#ifndef IC_LAW_CUDA_DEVICE_CUH
#define IC_LAW_CUDA_DEVICE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

/* Tensor cores with 16x8x16 products and asynchronous copies: Ampere and later. */
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define IC_CU_TENSOR 1
#else
#define IC_CU_TENSOR 0
#endif

/* A conversion that saturates, one instruction instead of five: Ampere and later, CUDA 12.1 and later. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 &&                                                      \
    __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201
#define IC_CU_SATURATES 1
#else
#define IC_CU_SATURATES 0
#endif

struct f16 {
    typedef __half one;
    __device__ static float2 unpack(uint32_t v)
    {
        return __half22float2(*reinterpret_cast<const __half2 *>(&v));
    }
    /* Of values that are known to be in range; pack saturates: what is past it stays finite. */
    __device__ static uint32_t pack_finite(float a, float b)
    {
        __half2 h = __floats2half2_rn(a, b);
        return *reinterpret_cast<uint32_t *>(&h);
    }
    __device__ static uint32_t pack(float a, float b)
    {
#if IC_CU_SATURATES
        uint32_t h;
        asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(b), "f"(a));
        return h;
#else
        return pack_finite(fminf(fmaxf(a, -65504.f), 65504.f), fminf(fmaxf(b, -65504.f), 65504.f));
#endif
    }
    __device__ static uint32_t larger(uint32_t a, uint32_t b)
    {
        __half2 h = __hmax2(*reinterpret_cast<__half2 *>(&a), *reinterpret_cast<__half2 *>(&b));
        return *reinterpret_cast<uint32_t *>(&h);
    }
};

struct bf16 {
    typedef __nv_bfloat16 one;
    __device__ static float2 unpack(uint32_t v)
    {
        return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
    }
    __device__ static uint32_t pack_finite(float a, float b) { return pack(a, b); }
    __device__ static uint32_t pack(float a, float b)
    {
        __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
        return *reinterpret_cast<uint32_t *>(&h);
    }
    __device__ static uint32_t larger(uint32_t a, uint32_t b)
    {
        __nv_bfloat162 h =
            __hmax2(*reinterpret_cast<__nv_bfloat162 *>(&a), *reinterpret_cast<__nv_bfloat162 *>(&b));
        return *reinterpret_cast<uint32_t *>(&h);
    }
};

__device__ inline float elu(float x)
{
    float e; /* a result so small that it is flushed to zero is lost beside the 1 anyway */
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(fminf(x, 0.0f) * 1.4426950408889634f));
    return fmaxf(x, e - 1.0f); /* exp(x) - 1 >= x */
}

__device__ inline uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

#if IC_CU_TENSOR
__device__ inline void copy16_async(uint32_t to, const void *from)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}
__device__ inline void copies_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> __device__ inline void copies_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
__device__ inline void load_matrix(uint32_t (&r)[4], uint32_t at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

/* Programmatic dependent launch (Hopper): the next kernel of the stream may start its blocks once all of
 * ours have started; it waits here before it touches anything that an earlier kernel wrote. */
__device__ inline void let_next_start()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void wait_for_previous()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif
