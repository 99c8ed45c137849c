/* Every operation of a plan in float32, NCHW, one kernel each: for laws that are kept in float32, for spiking
 * ones (a rounding would flip a spike), for GPUs without bfloat16 tensor cores, and what the tensor core path
 * is compared with. Sums of a convolution run in float32 over all taps and channels with fused
 * multiply-adds; norms' statistics in float64. No fast-math. */
#define _Noreturn __attribute__((noreturn)) /* plan.h is C */
#include "law/cuda/kernels.h"
#include "law/plan.h"

#define BLOCK 128 /* threads; of convolutions and norms below */
#define NORM_BLOCK 1024
#define OUTS 8  /* outputs of a thread of a convolution */
#define CELLS 4 /* cells, side by side */
#define TILE 16 /* side of a block's */
#define TILE_THREADS (TILE * TILE / CELLS)
#define CHUNK 8           /* input channels in shared memory */
#define BLOCKS_ENOUGH 264 /* two for each multiprocessor of the largest GPUs */

__device__ static float activate(const ic_cu_op32 &a, float x)
{
    switch (a.act) {
    case IC_LAW_ACT_ELU: return x > 0 ? x : expf(x) - 1.0f;
    case IC_LAW_ACT_SPIKE: return x > a.spike_at ? a.spike_to : 0.0f;
    default: return x;
    }
}

__global__ static void input32(const __grid_constant__ ic_cu_op32 a)
{
    const int cells = a.height * a.width, i = blockIdx.x * BLOCK + threadIdx.x, s = blockIdx.z;
    const float *psi = a.io[s].psi;
    if (!psi || i >= cells)
        return;
    float *out = a.out + s * a.out_stride + i;
    for (int k = 0; k < a.d; k++) {
        out[(size_t)k * cells] = psi[((size_t)i * a.d + k) * 2];
        out[(size_t)(a.d + k) * cells] = psi[((size_t)i * a.d + k) * 2 + 1];
    }
}

/* A convolution, or (UP) a transposed one as a 1x1 convolution of the smaller tensor with an output for each
 * of the four places that a cell grows into. A block: 16x16 cells, 8 * GROUPS outputs; a thread: 4 cells of a
 * row, 8 outputs. Inputs and weights come CHUNK channels at a time; each sum runs over channels, then taps,
 * whatever GROUPS is. */
template <int SIDE, bool UP, int GROUPS>
__global__ static void __launch_bounds__(TILE_THREADS *GROUPS) conv32(const __grid_constant__ ic_cu_op32 a)
{
    constexpr int TAPS = SIDE * SIDE, HALO = SIDE / 2, ROWS = TILE + 2 * HALO, ROW = (ROWS + 3) / 4 * 4,
                  THREADS = TILE_THREADS * GROUPS, OUTPUTS = OUTS * GROUPS;
    __shared__ __align__(16) float in[CHUNK][ROWS][ROW];
    __shared__ __align__(16) float weight[CHUNK][TAPS][OUTPUTS];
    const int height = UP ? a.height / 2 : a.height, width = UP ? a.width / 2 : a.width,
              across = (width + TILE - 1) / TILE, x0 = (int)blockIdx.x % across * TILE,
              y0 = (int)blockIdx.x / across * TILE, s = blockIdx.z, all = a.cin[0] + a.cin[1],
              outputs = UP ? 4 * a.cout : a.cout, first = (int)blockIdx.y * OUTPUTS,
              group = (int)threadIdx.x / TILE_THREADS, quad = (int)threadIdx.x % TILE_THREADS,
              tx = quad % (TILE / CELLS) * CELLS, ty = quad / (TILE / CELLS);
    if (!a.io[s].psi)
        return;
    float acc[CELLS][OUTS];
    for (int o = 0; o < OUTS; o++) {
        const int out = first + group * OUTS + o;
        const float bias = a.bias && out < outputs ? a.bias[UP ? out / 4 : out] : 0.0f;
        for (int i = 0; i < CELLS; i++)
            acc[i][o] = bias;
    }
    for (int c0 = 0; c0 < all; c0 += CHUNK) {
        const int chunk = min(CHUNK, all - c0);
        for (int i = (int)threadIdx.x; i < chunk * ROWS * ROWS; i += THREADS) {
            const int c = i / (ROWS * ROWS), y = i / ROWS % ROWS, x = i % ROWS, yy = y0 + y - HALO,
                      xx = x0 + x - HALO, which = c0 + c >= a.cin[0],
                      local = which ? c0 + c - a.cin[0] : c0 + c;
            const bool there = (unsigned)yy < (unsigned)height && (unsigned)xx < (unsigned)width;
            in[c][y][x] =
                there ? a.in[which][s * a.in_stride[which] + ((size_t)local * height + yy) * width + xx]
                      : 0.0f;
        }
        for (int i = (int)threadIdx.x; i < chunk * TAPS * OUTPUTS; i += THREADS) {
            const int o = i % OUTPUTS, t = i / OUTPUTS % TAPS, c = i / (OUTPUTS * TAPS), out = first + o;
            const size_t at =
                UP ? (size_t)(c0 + c) * outputs + out : ((size_t)out * all + c0 + c) * TAPS + t;
            weight[c][t][o] = out < outputs ? __ldg(a.weight + at) : 0.0f;
        }
        __syncthreads();
        for (int c = 0; c < chunk; c++)
#pragma unroll
            for (int dy = 0; dy < SIDE; dy++) {
                float v[CELLS + 2 * HALO];
#pragma unroll
                for (int i = 0; i < CELLS + 2 * HALO; i++)
                    v[i] = in[c][ty + dy][tx + i];
#pragma unroll
                for (int dx = 0; dx < SIDE; dx++)
#pragma unroll
                    for (int o = 0; o < OUTS; o++) {
                        const float w = weight[c][dy * SIDE + dx][group * OUTS + o];
#pragma unroll
                        for (int i = 0; i < CELLS; i++)
                            acc[i][o] = fmaf(v[i + dx], w, acc[i][o]);
                    }
            }
        __syncthreads();
    }
    const int y = y0 + ty;
    for (int o = 0; o < OUTS; o++) {
        const int out = first + group * OUTS + o, channel = UP ? out / 4 : out;
        for (int i = 0; i < CELLS; i++) {
            const int x = x0 + tx + i;
            if (out >= outputs || y >= height || x >= width)
                continue;
            const size_t cell =
                UP ? (size_t)(2 * y + out % 4 / 2) * a.width + 2 * x + out % 2 : (size_t)y * width + x;
            a.out[s * a.out_stride + (size_t)channel * a.height * a.width + cell] = activate(a, acc[i][o]);
        }
    }
}

/* More outputs a block read the input less often; fewer make more blocks, for small batches. */
template <int SIDE, bool UP> static void run_conv32(const ic_cu_op32 &a, int samples, cudaStream_t stream)
{
    const int outputs = UP ? 4 * a.cout : a.cout, height = UP ? a.height / 2 : a.height,
              width = UP ? a.width / 2 : a.width;
    const unsigned tiles = (unsigned)((width + TILE - 1) / TILE * ((height + TILE - 1) / TILE)),
                   n = (unsigned)samples;
    const auto grid = [&](int groups) {
        return dim3(tiles, (unsigned)((outputs + OUTS * groups - 1) / (OUTS * groups)), n);
    };
    const auto enough = [&](int groups) {
        const dim3 g = grid(groups);
        return outputs > OUTS * groups / 2 && g.x * g.y * g.z >= BLOCKS_ENOUGH;
    };
    if (enough(4))
        conv32<SIDE, UP, 4><<<grid(4), TILE_THREADS * 4, 0, stream>>>(a);
    else if (enough(2))
        conv32<SIDE, UP, 2><<<grid(2), TILE_THREADS * 2, 0, stream>>>(a);
    else
        conv32<SIDE, UP, 1><<<grid(1), TILE_THREADS, 0, stream>>>(a);
}

__device__ static double block_sum(double v, double *shared)
{
    for (int m = 16; m; m >>= 1)
        v += __shfl_xor_sync(~0u, v, m);
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        shared[threadIdx.x / 32] = v;
    __syncthreads();
    double sum = 0;
    for (int i = 0; i < NORM_BLOCK / 32; i++)
        sum += shared[i];
    return sum;
}

/* A block a group: the mean, then the squared deviations, then the values. */
__global__ static void norm32(const __grid_constant__ ic_cu_op32 a)
{
    __shared__ double shared[NORM_BLOCK / 32];
    const int s = blockIdx.z, g = blockIdx.x, per = a.cout / a.groups, cells = a.height * a.width;
    if (!a.io[s].psi)
        return;
    float *x = a.out + s * a.out_stride + (size_t)g * per * cells;
    const size_t n = (size_t)per * cells;
    const bool rms = a.kind == IC_LAW_OP_RMSNORM;
    double sum = 0, sq = 0;
    if (!rms) {
        for (size_t i = threadIdx.x; i < n; i += NORM_BLOCK)
            sum += x[i];
        sum = block_sum(sum, shared) / (double)n;
    }
    for (size_t i = threadIdx.x; i < n; i += NORM_BLOCK)
        sq += (x[i] - sum) * (x[i] - sum);
    sq = block_sum(sq, shared) / (double)n;
    const float mean = (float)sum, r = (float)(1.0 / sqrt(sq + (double)a.eps));
    for (size_t i = threadIdx.x; i < n; i += NORM_BLOCK) {
        const int c = g * per + (int)(i / cells);
        x[i] = activate(a, (x[i] - mean) * r * a.weight[c] + (a.bias ? a.bias[c] : 0.0f));
    }
}

__global__ static void pool32(const __grid_constant__ ic_cu_op32 a)
{
    const int cells = a.height * a.width, i = blockIdx.x * BLOCK + threadIdx.x, s = blockIdx.z,
              c = blockIdx.y;
    if (!a.io[s].psi || i >= cells)
        return;
    const int x = i % a.width, y = i / a.width, w = 2 * a.width;
    const float *in = a.in[0] + s * a.in_stride[0] + (size_t)c * 4 * cells + (size_t)2 * y * w + 2 * x;
    a.out[s * a.out_stride + (size_t)c * cells + i] = fmaxf(fmaxf(in[0], in[1]), fmaxf(in[w], in[w + 1]));
}

/* Taps 1/8 3/8 3/8 1/8 over samples 2i-1..2i+2, renormalised where they fall outside. */
__device__ static float resize_weights(int i, int n, float *w)
{
    const float taps[4] = {0.125f, 0.375f, 0.375f, 0.125f};
    float sum = 0;
    for (int t = 0; t < 4; t++) {
        w[t] = (unsigned)(2 * i - 1 + t) < (unsigned)n ? taps[t] : 0.0f;
        sum += w[t];
    }
    return sum;
}

__global__ static void resize32(const __grid_constant__ ic_cu_op32 a)
{
    const int cells = a.height * a.width, i = blockIdx.x * BLOCK + threadIdx.x, s = blockIdx.z,
              c = blockIdx.y;
    if (!a.io[s].psi || i >= cells)
        return;
    const int x = i % a.width, y = i / a.width, w = 2 * a.width, h = 2 * a.height;
    const float *in = a.in[0] + s * a.in_stride[0] + (size_t)c * 4 * cells;
    float wy[4], wx[4], sum = 0;
    const float sy = resize_weights(y, h, wy), sx = resize_weights(x, w, wx);
    for (int j = 0; j < 4; j++)
        for (int k = 0; k < 4; k++)
            if (wy[j] > 0 && wx[k] > 0)
                sum = fmaf(wy[j] / sy * (wx[k] / sx), in[(size_t)(2 * y - 1 + j) * w + 2 * x - 1 + k], sum);
    a.out[s * a.out_stride + (size_t)c * cells + i] = sum;
}

__global__ static void mem_in32(const __grid_constant__ ic_cu_op32 a)
{
    const int cells = a.height * a.width, i = blockIdx.x * BLOCK + threadIdx.x, s = blockIdx.z,
              c = blockIdx.y;
    const float *h = a.io[s].h;
    if (h && i < cells)
        a.out[s * a.out_stride + (size_t)c * cells + i] = h[(size_t)c * cells + i];
}

__device__ static float sigmoid32(float x)
{
    return 1.0f / (1.0f + expf(-x));
}

__global__ static void lstm32(const __grid_constant__ ic_cu_op32 a)
{
    const int cells = a.height * a.width, i = blockIdx.x * BLOCK + threadIdx.x, s = blockIdx.z,
              k = blockIdx.y;
    const ic_cu_io io = a.io[s];
    if (!io.h || i >= cells)
        return;
    const float *g = a.in[0] + s * a.in_stride[0] + i;
    const size_t step = (size_t)a.cout * cells, at = (size_t)k * cells + i, first = (size_t)k * cells;
    const float f = sigmoid32(g[first]), in = sigmoid32(g[first + step]),
                o = sigmoid32(g[first + 2 * step]), cand = tanhf(g[first + 3 * step]);
    const float c = f * io.c[at] + in * cand, h = o * tanhf(c);
    io.c[at] = c;
    io.h[at] = h;
    a.out[s * a.out_stride + at] = h;
}

__global__ static void update32(const __grid_constant__ ic_cu_op32 a)
{
    const int cells = a.height * a.width, i = blockIdx.x * BLOCK + threadIdx.x, s = blockIdx.z;
    const ic_cu_io io = a.io[s];
    if (!io.psi || i >= cells)
        return;
    const float *y = a.in[0] + s * a.in_stride[0] + i, gamma = fmaxf(io.gamma, 0.0f);
    float *psi = io.psi + (size_t)i * a.d * 2;
    float sum = 0, r = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int k = 0; k < a.d; k++) {
            const float ar = y[(size_t)k * cells], ai = y[(size_t)(a.d + k) * cells], pr = psi[2 * k],
                        pi = psi[2 * k + 1];
            const float dr = a.product ? ar * pr - ai * pi : ar, di = a.product ? ar * pi + ai * pr : ai;
            const float fr = pr + (dr - gamma * pr), fi = pi + (di - gamma * pi);
            if (pass) {
                psi[2 * k] = fr / r;
                psi[2 * k + 1] = fi / r;
                continue;
            }
            sum += fr * fr + fi * fi;
            if (io.delta) {
                io.delta[((size_t)i * a.d + k) * 2] = dr;
                io.delta[((size_t)i * a.d + k) * 2 + 1] = di;
            }
        }
        r = sqrtf(sum) + 1e-9f;
    }
}

cudaError_t ic_cu_op32_run(const struct ic_cu_op32 *a, int samples, cudaStream_t stream)
{
    const unsigned blocks = (unsigned)(a->height * a->width + BLOCK - 1) / BLOCK, n = (unsigned)samples;
    const dim3 cells(blocks, 1, n), planes(blocks, (unsigned)a->cout, n), groups((unsigned)a->groups, 1, n);
    switch (a->kind) {
    case IC_LAW_OP_INPUT: input32<<<cells, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_CONV3X3: run_conv32<3, false>(*a, samples, stream); break;
    case IC_LAW_OP_CONV1X1: run_conv32<1, false>(*a, samples, stream); break;
    case IC_LAW_OP_CONVT2X2: run_conv32<1, true>(*a, samples, stream); break;
    case IC_LAW_OP_GROUPNORM:
    case IC_LAW_OP_RMSNORM: norm32<<<groups, NORM_BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_MAXPOOL2: pool32<<<planes, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_RESIZE_HALF: resize32<<<planes, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_MEM_IN: mem_in32<<<planes, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_LSTM: lstm32<<<planes, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_UPDATE: update32<<<cells, BLOCK, 0, stream>>>(*a); break;
    default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}
