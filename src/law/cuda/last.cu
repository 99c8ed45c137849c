/* The last operation of the U-Nets in one pass over memory: the 1x1 convolution of the normalised input,
 * and psi' from it. Few products and many bytes: nothing of a cell goes through shared memory.
 *
 * A warp takes 16 cells at a time as the rows of its products. Sums may run in any order and columns may
 * lie in any place, so both are dealt out such that each lane reads and writes 16 bytes in a row: of each
 * 32 input channels lane l has octet l % 4, of each 16 columns the four from 4 * (l % 4) on. Weights are
 * brought to that order once a block. The next cells are on their way while these are computed. */
#include "law/cuda/conv.cuh"
#include "law/cuda/launch.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)
#define COLUMNS_MAX 64
#define SMEM_MAX 49152 /* what a kernel has without asking */

/* Four floats of a cell of which `left` are there, on a 16-byte boundary where d is even. */
template <bool EVEN> __device__ inline float4 load_four(const float *p, int left)
{
    float4 v = make_float4(0, 0, 0, 0);
    if (EVEN) {
        if (left > 0)
            v = __ldcg(reinterpret_cast<const float4 *>(p));
        return v;
    }
    if (left > 0)
        *reinterpret_cast<float2 *>(&v.x) = __ldcg(reinterpret_cast<const float2 *>(p));
    if (left > 2)
        *reinterpret_cast<float2 *>(&v.z) = __ldcg(reinterpret_cast<const float2 *>(p + 2));
    return v;
}

template <bool EVEN> __device__ inline void store_four(float *p, float4 v, int left)
{
    if (EVEN) {
        if (left > 0)
            *reinterpret_cast<float4 *>(p) = v;
        return;
    }
    if (left > 0)
        *reinterpret_cast<float2 *>(p) = make_float2(v.x, v.y);
    if (left > 2)
        *reinterpret_cast<float2 *>(p + 2) = make_float2(v.z, v.w);
}

/* Of rows lane / 4 and that + 8 of 16 cells, GROUPS octets: one of each 32 channels, of which the first
 * `octets` are there. */
template <int GROUPS>
__device__ inline void load_input(uint4 (&in)[GROUPS][2], const char *at, int row_bytes, int cells_left,
                                  int octets)
{
#pragma unroll
    for (int j = 0; j < GROUPS; j++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            in[j][h] = 4 * j < octets && 8 * h < cells_left
                           ? __ldcg(reinterpret_cast<const uint4 *>(at + 8 * h * row_bytes + 64 * j))
                           : make_uint4(0, 0, 0, 0);
}

__device__ inline float2 delta_of(int product, float2 ak, float2 p)
{
    return product ? make_float2(ak.x * p.x - ak.y * p.y, ak.x * p.y + ak.y * p.x) : ak;
}

/* 1 / (|phi| + 1e-9), to a few units in the last place. */
__device__ inline float over_norm(float sum)
{
    float root;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(sum));
    return __fdividef(1.0f, root + 1e-9f);
}

/* Thread blocks of a multiprocessor, which registers allow. */
static constexpr int at_once(int columns16, int groups)
{
    return columns16 * groups == 1 ? 4 : columns16 <= 2 ? 2 : 1;
}

/* COLUMNS16: columns / 16, or more; GROUPS: 32 input channels each, those that are loaded ahead. */
template <class T, int COLUMNS16, int GROUPS, bool EVEN>
__global__ void __launch_bounds__(THREADS, at_once(COLUMNS16, GROUPS))
    last_kernel(const __grid_constant__ ic_cu_last a)
{
#if IC_CU_TENSOR
    extern __shared__ __align__(16) char smem[];
    constexpr int PIECES = 2 * COLUMNS16; /* of 8 columns */
    const int tid = threadIdx.x, lane = tid & 31, row = lane >> 2, four = lane & 3, sample = blockIdx.y;
    const int octets = a.in.cpad / 8;
    const ic_cu_io io = a.io[sample]; /* the table does not change during a graph */
    let_next_start();
    if (!io.psi)
        return;

    uint4 *weights = reinterpret_cast<uint4 *>(smem); /* [32 channels][piece][lane] */
    float *scale = reinterpret_cast<float *>(weights + a.groups * PIECES * 32),
          *shift = scale + a.groups * 32;
    for (int i = tid; i < a.groups * PIECES * 32; i += THREADS) {
        /* pack.c's order is [16 inputs][8 columns] of [2][8 columns][8 inputs] */
        const int n = i / 32 % PIECES, octet = i / (PIECES * 32) * 4 + four,
                  column = n / 2 * 16 + row / 2 * 4 + n % 2 * 2 + row % 2;
        const int unit = (octet >> 1) * (a.columns / 8) + (column >> 3);
        weights[i] =
            octet < octets && column < a.columns
                ? __ldg(static_cast<const uint4 *>(a.weight) + unit * 16 + (octet & 1) * 8 + (column & 7))
                : make_uint4(0, 0, 0, 0);
    }
    for (int c = a.in.cpad + tid; c < a.groups * 32; c += THREADS)
        scale[c] = shift[c] = 0;
    float4 bias[COLUMNS16];
#pragma unroll
    for (int i = 0; i < COLUMNS16; i++)
        bias[i] = a.bias && 16 * i < a.columns
                      ? __ldg(reinterpret_cast<const float4 *>(a.bias) + 4 * i + four)
                      : make_float4(0, 0, 0, 0);

    const int step = gridDim.x * WARPS * 16, row_bytes = 2 * a.in.cpad,
              first = (blockIdx.x * WARPS + (tid >> 5)) * 16 + row;
    int cells_left = a.cells - first; /* from this lane's first row on */
    const char *input = static_cast<const char *>(a.in.p) + (size_t)sample * a.in.stride +
                        (size_t)first * row_bytes + 16 * four;
    float *psi = io.psi + (size_t)first * 2 * a.d + 4 * four;
    const ptrdiff_t delta = io.delta ? io.delta - io.psi : 0;
    const float keep = 1.0f - fmaxf(io.gamma, 0.0f);

    uint4 next[GROUPS][2];
    float4 field[COLUMNS16][2];
    auto load_field = [&](int left) {
#pragma unroll
        for (int i = 0; i < COLUMNS16; i++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                field[i][h] = load_four<EVEN>(psi + 16 * h * a.d + 16 * i,
                                              8 * h < left ? 2 * a.d - 16 * i - 4 * four : 0);
    };
    wait_for_previous();
    load_input(next, input, row_bytes, cells_left, octets - four);
    load_field(cells_left);
    norm_coefficients(a.in, sample, scale, shift, tid, THREADS);
    __syncthreads();

    for (; cells_left + row > 0; cells_left -= step) {
        uint4 now[GROUPS][2];
#pragma unroll
        for (int j = 0; j < GROUPS; j++) {
            now[j][0] = next[j][0];
            now[j][1] = next[j][1];
        }
        const char *here = input;
        input += (size_t)step * row_bytes;
        load_input(next, input, row_bytes, cells_left - step, octets - four);

        float acc[PIECES][4];
#pragma unroll
        for (int n = 0; n < PIECES; n++)
            acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
        for (int g0 = 0; g0 < a.groups; g0 += GROUPS) {
            if (g0 > 0)
                load_input(now, here + 64 * g0, row_bytes, cells_left, octets - 4 * g0 - four);
#pragma unroll
            for (int j = 0; j < GROUPS; j++) {
                const int c = ((g0 + j) * 4 + four) * 8;
                const uint4 lo = normalised<T>(now[j][0], scale + c, shift + c),
                            hi = normalised<T>(now[j][1], scale + c, shift + c);
                const uint32_t low[4] = {lo.x, hi.x, lo.y, hi.y}, high[4] = {lo.z, hi.z, lo.w, hi.w};
#pragma unroll
                for (int n = 0; n < PIECES; n++) {
                    const uint4 w = weights[((g0 + j) * PIECES + n) * 32 + lane];
                    multiply(acc[n], low, w.x, w.y, T());
                    multiply(acc[n], high, w.z, w.w, T());
                }
            }
        }

#pragma unroll
        for (int h = 0; h < 2; h++) {
            float *at = psi + 16 * h * a.d;
            const int columns_left = 8 * h < cells_left ? 2 * a.d - 4 * four : 0;
            float sum = 0;
#pragma unroll
            for (int i = 0; i < COLUMNS16; i++) {
                const int left = columns_left - 16 * i;
                float4 &p = field[i][h];
                const float2 a0 = make_float2(acc[2 * i][2 * h] + bias[i].x,
                                              acc[2 * i][2 * h + 1] + bias[i].y),
                             a1 = make_float2(acc[2 * i + 1][2 * h] + bias[i].z,
                                              acc[2 * i + 1][2 * h + 1] + bias[i].w);
                const float2 d0 = delta_of(a.product, a0, make_float2(p.x, p.y)),
                             d1 = delta_of(a.product, a1, make_float2(p.z, p.w));
                if (io.delta)
                    store_four<EVEN>(at + delta + 16 * i, make_float4(d0.x, d0.y, d1.x, d1.y), left);
                p = make_float4(fmaf(keep, p.x, d0.x), fmaf(keep, p.y, d0.y), fmaf(keep, p.z, d1.x),
                                fmaf(keep, p.w, d1.y));
                if (left > 0)
                    sum = fmaf(p.x, p.x, fmaf(p.y, p.y, sum));
                if (left > (EVEN ? 0 : 2))
                    sum = fmaf(p.z, p.z, fmaf(p.w, p.w, sum));
            }
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const float r = over_norm(sum);
#pragma unroll
            for (int i = 0; i < COLUMNS16; i++) {
                const float4 p = field[i][h];
                store_four<EVEN>(at + 16 * i, make_float4(p.x * r, p.y * r, p.z * r, p.w * r),
                                 columns_left - 16 * i);
            }
        }
        psi += (size_t)step * 2 * a.d;
        load_field(cells_left - step);
    }
#endif
}

/* Columns that a kernel for `columns` computes, in 16s. */
static int columns16_of(int columns)
{
    return columns <= 16 ? 1 : columns <= 32 ? 2 : 4;
}

template <class T, bool EVEN> static const void *kernel_of(int columns16, int groups)
{
#define KERNEL(n)                                                                                          \
    if (columns16 == n)                                                                                    \
        return groups == 1 ? reinterpret_cast<const void *>(last_kernel<T, n, 1, EVEN>)                    \
                           : reinterpret_cast<const void *>(last_kernel<T, n, 2, EVEN>);
    KERNEL(1)
    KERNEL(2)
    KERNEL(4)
#undef KERNEL
    return nullptr;
}

template <class T> static const void *kernel_for(const ic_cu_last *a)
{
    const int columns16 = columns16_of(a->columns);
    return a->d % 2 == 0 ? kernel_of<T, true>(columns16, a->groups)
                         : kernel_of<T, false>(columns16, a->groups);
}

static size_t smem_of(const ic_cu_last *a)
{
    return (size_t)a->groups * (size_t)(columns16_of(a->columns) * 1024 + 256);
}

int ic_cu_last_shape(struct ic_cu_last *a)
{
    a->groups = (a->in.cpad + 31) / 32;
    if (a->groups > 1)
        a->groups = (a->groups + 1) / 2 * 2;
    a->blocks *= at_once(columns16_of(a->columns), a->groups == 1 ? 1 : 2);
    share_lanes(&a->in, THREADS);
    return a->columns <= COLUMNS_MAX && smem_of(a) <= SMEM_MAX;
}

cudaError_t ic_cu_last_run(const struct ic_cu_last *a, enum ic_cu_type type, int samples, int overlap,
                           cudaStream_t stream)
{
    /* no more blocks than run at a time */
    const int most = (a->cells + WARPS * 16 - 1) / (WARPS * 16), share = a->blocks / samples;
    const dim3 grid((unsigned)(share < 1 ? 1 : share < most ? share : most), (unsigned)samples);
    return launch_kernel(type == IC_CU_F16 ? kernel_for<f16>(a) : kernel_for<bf16>(a), grid, THREADS,
                         smem_of(a), a, overlap, stream);
}
