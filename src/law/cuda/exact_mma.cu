/* Convolutions in float32 by tensor cores, from Ampere on, NCHW. They multiply numbers of 11 bits, half of a float32's 24:
 * each operand is a sum of two, x = high + low + at most 2^-22 of it, and three products, low * high, high * low and
 * high * high, are the float32's within 2^-21. Weights come split (pack.c), inputs are split in shared memory.
 *
 * Two kinds of halves. tf32 have float32's exponents. fp16 are twice as fast, but lose bits below 2^-14 and end at 65504:
 * they are for inputs of which a bound is known (what a norm made, pooled or grown or not: build.c), scaled by a power of
 * two so that the bound is 2^15; what is smaller than 2^-15 of the bound is off by 2^-40 of the bound.
 *
 * Tensor cores cut off what does not fit when they add, so a long sum shrinks, by about 2^-25 of itself with each
 * addition. Only nine (SIDE 3; six for SIDE 1) are therefore theirs, to a zero; these sums are added up by float32
 * additions, which round. The order of all this depends on the layer alone: whatever a launch is cut into, the bits are
 * the same.
 *
 * A block: 16 * MF outputs, 16 x NF / 2 * WARPS cells; a warp: NF times 8 of these, in a row. Inputs come
 * a chunk of channels at a time, as they are, to a place that only the thread that asked for them reads; it splits
 * them into words of one tf32 or two channels' fp16, where all read them. While a chunk is multiplied the next one is on its way. */
#define _Noreturn __attribute__((noreturn)) /* plan.h is C */
#include "law/cuda/device.cuh"
#include "law/cuda/launch.cuh"
#include "law/plan.h"

#define WARPS 4
#define TILE 16 /* cells side by side */
#define UNIT IC_CU_MMA32_UNIT
#define BLOCKS_ENOUGH(at_once) (120u * (unsigned)(at_once)) /* for a large GPU */

/* MF, NF, blocks of a multiprocessor; the first that fits and makes enough blocks is taken. */
#define CONFIGS(X) X(0, 2, 8, 2) X(1, 2, 4, 3) X(2, 1, 8, 3) X(3, 1, 2, 4)

/* Sizes in words of 4 bytes. */
template <int SIDE, bool HALF, int MF, int NF> struct shape {
    static constexpr int TAPS = SIDE * SIDE, HALO = SIDE / 2, WIDE = TILE + 2 * HALO,
                         HIGH = NF / 2 * WARPS + 2 * HALO, CELLS = WIDE * HIGH, THREADS = 32 * WARPS,
                         WORDS = IC_CU_MMA32_WORDS(TAPS), CHANNELS = WORDS * (HALF ? 2 : 1),
                         PLACES = (CELLS + THREADS - 1) / THREADS;
    /* of pairs of words: 8 of 32 banks further than a whole number of rounds, as lanes side by side read four of a cell's */
    static constexpr int PLANE = (CELLS + 11) / 16 * 16 + 4;
    static constexpr int PIECE = WORDS / 8 * TAPS * UNIT; /* of 16 outputs' weights for a chunk */
    static constexpr int WEIGHTS = MF * PIECE, SPLIT = 2 * WORDS * PLANE, RAW = CHANNELS * CELLS,
                         SMEM = (2 * WEIGHTS + 2 * SPLIT + RAW) * 4;
};

#if IC_CU_TENSOR
__device__ static void copy4_or_zero(uint32_t to, const float *from, bool there)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(there ? 4 : 0));
}

template <bool HALF> __device__ static void multiply_words(float (&c)[4], const uint4 &a, uint2 b)
{
    if (HALF)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
    else
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

/* v as two: [0] high, [1] low; of tf32 the tensor core takes the first 11 bits. */
__device__ static uint2 split_tf32(float v)
{
    const uint32_t high = (__float_as_uint(v) + 0x1000u) & 0xffffe000u;
    return make_uint2(high, __float_as_uint(v - __uint_as_float(high)));
}
__device__ static uint2 split_f16(float v0, float v1)
{
    const uint32_t high = f16::pack_finite(v0, v1);
    const float2 h = f16::unpack(high);
    return make_uint2(high, f16::pack_finite(v0 - h.x, v1 - h.y));
}

__device__ static float finish(const ic_cu_op32 &a, float x, int channel)
{
    x = x * a.unscale + (a.bias ? a.bias[channel] : 0.0f);
    return a.act == IC_LAW_ACT_ELU && x <= 0 ? expf(x) - 1.0f : x;
}

/* Two cells side by side; x is even. */
__device__ static void store_pair(const ic_cu_op32 &a, int s, int channel, int y, int x, const float *v)
{
    if (channel >= a.cout || y >= a.height || x >= a.width)
        return;
    float *to = a.out + s * a.out_stride + ((size_t)channel * a.height + y) * a.width + x;
    if (a.width % 2 == 0) {
        *reinterpret_cast<float2 *>(to) = make_float2(finish(a, v[0], channel), finish(a, v[1], channel));
        return;
    }
    to[0] = finish(a, v[0], channel);
    if (x + 1 < a.width)
        to[1] = finish(a, v[1], channel);
}

/* What two cells of the smaller tensor grow into in a row: v[0], v[2] and v[1], v[3]. */
__device__ static void store_grown(const ic_cu_op32 &a, int s, int channel, int y, int x, const float *v)
{
    if (channel >= a.cout || y >= a.height || x >= a.width)
        return;
    float *to = a.out + s * a.out_stride + ((size_t)channel * a.height + y) * a.width + x;
    const float2 one = make_float2(finish(a, v[0], channel), finish(a, v[2], channel)),
                 two = make_float2(finish(a, v[1], channel), finish(a, v[3], channel));
    if (a.width % 4 == 0) {
        *reinterpret_cast<float4 *>(to) = make_float4(one.x, one.y, two.x, two.y);
        return;
    }
    *reinterpret_cast<float2 *>(to) = one;
    if (x + 2 < a.width)
        *reinterpret_cast<float2 *>(to + 2) = two;
}
#endif

/* UP: a transposed convolution, as a 1x1 convolution of the smaller tensor with an output for each of the four places
 * that a cell grows into. */
template <int SIDE, bool UP, bool HALF, int MF, int NF, int AT_ONCE>
__global__ static void __launch_bounds__(32 * WARPS, AT_ONCE) mma32(const __grid_constant__ ic_cu_op32 a)
{
#if IC_CU_TENSOR
    using S = shape<SIDE, HALF, MF, NF>;
    extern __shared__ uint4 shared4[];
    /* split: [chunk % 2][high, low][words / 8][4][cell](word, word + 4): what a lane multiplies is one load */
    uint32_t *const shared = reinterpret_cast<uint32_t *>(shared4), *const split = shared + 2 * S::WEIGHTS;
    float *const raw = reinterpret_cast<float *>(split + 2 * S::SPLIT);
    const int height = UP ? a.height / 2 : a.height, width = UP ? a.width / 2 : a.width,
              cells = height * width, across = (width + TILE - 1) / TILE,
              x0 = (int)blockIdx.x % across * TILE, y0 = (int)blockIdx.x / across * (NF / 2 * WARPS),
              s = blockIdx.z, all = a.cin[0] + a.cin[1], outputs = UP ? 4 * a.cout : a.cout,
              first16 = (int)blockIdx.y * MF, pieces = min(MF, (outputs + 15) / 16 - first16),
              chunks = (all + S::CHANNELS - 1) / S::CHANNELS, tid = (int)threadIdx.x, lane = tid % 32,
              warp = tid / 32;
    if (!a.io[s].psi)
        return;
    int place[S::PLACES]; /* of this thread's cells in a channel; -1: outside */
#pragma unroll
    for (int p = 0; p < S::PLACES; p++) {
        const int i = tid + p * S::THREADS, y = y0 + i / S::WIDE - S::HALO, x = x0 + i % S::WIDE - S::HALO;
        place[p] = (unsigned)y < (unsigned)height && (unsigned)x < (unsigned)width ? y * width + x : -1;
    }
    const uint32_t weights_to = shared_address(shared), raw_to = shared_address(raw + tid);
    const auto load = [&](int chunk) {
        for (int i = tid; i < pieces * (S::PIECE / 4); i += S::THREADS)
            copy16_async(weights_to + (chunk % 2 * S::WEIGHTS + i * 4) * 4,
                         a.weight + ((size_t)(first16 + i / (S::PIECE / 4)) * chunks + chunk) * S::PIECE +
                             i % (S::PIECE / 4) * 4);
#pragma unroll 4
        for (int k = 0; k < S::CHANNELS; k++) {
            const int c = chunk * S::CHANNELS + k, second = c >= a.cin[0] && c < all;
            const float *from = a.in[second] + s * a.in_stride[second] +
                                (c < all ? (size_t)(second ? c - a.cin[0] : c) * cells : 0);
#pragma unroll
            for (int p = 0; p < S::PLACES; p++)
                if (p + 1 < S::PLACES || tid + p * S::THREADS < S::CELLS)
                    copy4_or_zero(raw_to + (k * S::CELLS + p * S::THREADS) * 4, from + max(place[p], 0),
                                  place[p] >= 0 && c < all);
        }
        copies_commit();
    };
    float acc[MF][NF][4] = {};
    load(0);
    for (int chunk = 0; chunk < chunks; chunk++) {
        uint2 *const high = reinterpret_cast<uint2 *>(split + chunk % 2 * S::SPLIT);
        uint2 *const low = high + S::WORDS / 2 * S::PLANE;
        copies_wait<0>();
#pragma unroll 4
        for (int w = 0; w < S::WORDS / 2; w++)
#pragma unroll
            for (int p = 0; p < S::PLACES; p++) {
                const int i = tid + p * S::THREADS;
                if (p + 1 == S::PLACES && i >= S::CELLS)
                    continue;
                uint2 v[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float *from = raw + (w / 4 * 8 + w % 4 + j * 4) * (HALF ? 2 : 1) * S::CELLS + i;
                    v[j] =
                        HALF ? split_f16(from[0] * a.scale, from[S::CELLS] * a.scale) : split_tf32(from[0]);
                }
                high[w * S::PLANE + i] = make_uint2(v[0].x, v[1].x);
                low[w * S::PLANE + i] = make_uint2(v[0].y, v[1].y);
            }
        __syncthreads(); /* and all are done with the chunk before */
        if (chunk + 1 < chunks)
            load(chunk + 1);
        const uint2 *in = high + lane % 4 * S::PLANE + warp * (NF / 2) * S::WIDE + lane / 4;
        const uint4 *weight = reinterpret_cast<const uint4 *>(shared + chunk % 2 * S::WEIGHTS) + lane;
#pragma unroll 1
        for (int dy = 0; dy < SIDE; dy++) {
            float sum[MF][NF][4] = {};
#pragma unroll
            for (int k = 0; k < S::WORDS / 8; k++)
#pragma unroll
                for (int dx = 0; dx < SIDE; dx++) {
                    uint4 wh[MF], wl[MF];
#pragma unroll
                    for (int m = 0; m < MF; m++) {
                        const uint4 *unit =
                            weight + (m * S::PIECE + (k * S::TAPS + dy * SIDE + dx) * UNIT) / 4;
                        wh[m] = unit[0];
                        wl[m] = unit[32];
                    }
#pragma unroll
                    for (int n = 0; n < NF; n++) {
                        const uint2 *at = in + k * 4 * S::PLANE + (n / 2 + dy) * S::WIDE + n % 2 * 8 + dx;
                        const uint2 h = at[0], l = at[S::WORDS / 2 * S::PLANE];
#pragma unroll
                        for (int m = 0; m < MF; m++)
                            multiply_words<HALF>(sum[m][n], wl[m], h);
#pragma unroll
                        for (int m = 0; m < MF; m++)
                            multiply_words<HALF>(sum[m][n], wh[m], l);
#pragma unroll
                        for (int m = 0; m < MF; m++)
                            multiply_words<HALF>(sum[m][n], wh[m], h);
                    }
                }
#pragma unroll
            for (int m = 0; m < MF; m++)
#pragma unroll
                for (int n = 0; n < NF; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        acc[m][n][i] += sum[m][n][i];
        }
    }
#pragma unroll
    for (int m = 0; m < MF; m++)
#pragma unroll
        for (int n = 0; n < NF; n++) {
            const int o16 = first16 + m, y = y0 + warp * (NF / 2) + n / 2,
                      x = x0 + n % 2 * 8 + lane % 4 * 2;
            if (UP)
                store_grown(a, s, o16 * 4 + lane / 8, 2 * y + lane / 4 % 2, 2 * x, acc[m][n]);
            else {
                store_pair(a, s, o16 * 16 + lane / 4, y, x, acc[m][n]);
                store_pair(a, s, o16 * 16 + lane / 4 + 8, y, x, acc[m][n] + 2);
            }
        }
#endif
}

struct config {
    int outputs, rows, at_once;
};
#define X(i, mf, nf, at_once) {16 * mf, nf / 2 * WARPS, at_once},
static const config configs[] = {CONFIGS(X)};
#undef X
#define CONFIG_COUNT ((int)(sizeof configs / sizeof configs[0]))

template <int SIDE, bool UP, bool HALF> static const void *kernel_at(int config, int *smem)
{
    switch (config) {
#define X(i, mf, nf, at_once)                                                                              \
    case i:                                                                                                \
        *smem = shape<SIDE, HALF, mf, nf>::SMEM;                                                           \
        return (const void *)mma32<SIDE, UP, HALF, mf, nf, at_once>;
        CONFIGS(X)
#undef X
    default: return nullptr;
    }
}

/* kind: 0 1x1, 1 transposed, 2 3x3, each with tf32 and then with fp16. */
static const void *kernel_of(int kind, bool half, int config, int *smem)
{
    switch (kind * 2 + half) {
    case 0: return kernel_at<1, false, false>(config, smem);
    case 1: return kernel_at<1, false, true>(config, smem);
    case 2: return kernel_at<1, true, false>(config, smem);
    case 3: return kernel_at<1, true, true>(config, smem);
    case 4: return kernel_at<3, false, false>(config, smem);
    default: return kernel_at<3, false, true>(config, smem);
    }
}

cudaError_t ic_cu_mma32_run(const struct ic_cu_op32 *a, int samples, cudaStream_t stream)
{
    const bool up = a->kind == IC_LAW_OP_CONVT2X2;
    const int kind = up                             ? 1
                     : a->kind == IC_LAW_OP_CONV3X3 ? 2
                                                    : 0,
              outputs = up ? 4 * a->cout : a->cout, height = up ? a->height / 2 : a->height,
              width = up ? a->width / 2 : a->width;
    for (int i = 0;; i++) {
        const config &c = configs[i];
        const dim3 grid((unsigned)((width + TILE - 1) / TILE * ((height + c.rows - 1) / c.rows)),
                        (unsigned)((outputs + c.outputs - 1) / c.outputs), (unsigned)samples);
        int smem = 0;
        const void *kernel = kernel_of(kind, a->half, i, &smem);
        if (i + 1 == CONFIG_COUNT || (smem <= a->smem_max && outputs > c.outputs / 2 &&
                                      grid.x * grid.y * grid.z >= BLOCKS_ENOUGH(c.at_once)))
            return launch_kernel(kernel, grid, 32 * WARPS, (size_t)smem, a, 0, stream);
    }
}

cudaError_t ic_cu_mma32_init(int smem_max)
{
    int smem;
    return allow_smem(6 * CONFIG_COUNT, smem_max, [&](int i) {
        return kernel_of(i / CONFIG_COUNT / 2, i / CONFIG_COUNT % 2, i % CONFIG_COUNT, &smem);
    });
}
