/* Every operation of a plan in float32, NCHW, one plain kernel each: what the tensor core path is compared
 * with on the device, the only path for spiking laws (a rounding would flip a spike) and for GPUs without
 * bfloat16 tensor cores. Sums of a convolution run in float32 over all taps and channels with fused
 * multiply-adds; norms' statistics in float64. No fast-math. */
#define _Noreturn __attribute__((noreturn)) /* plan.h is C */
#include "law/cuda/kernels.h"
#include "law/plan.h"

#define OUTS 8 /* output channels of a thread */
#define BLOCK 128

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

template <int SIDE> __global__ static void conv32(const __grid_constant__ ic_cu_op32 a)
{
    const int cells = a.height * a.width, i = blockIdx.x * BLOCK + threadIdx.x, s = blockIdx.z,
              o0 = blockIdx.y * OUTS, x = i % a.width, y = i / a.width, all = a.cin[0] + a.cin[1];
    if (!a.io[s].psi || i >= cells)
        return;
    float acc[OUTS];
    for (int o = 0; o < OUTS; o++)
        acc[o] = a.bias && o0 + o < a.cout ? a.bias[o0 + o] : 0.0f;
    for (int c = 0; c < all; c++) {
        const int which = c >= a.cin[0], local = which ? c - a.cin[0] : c;
        const float *in = a.in[which] + s * a.in_stride[which] + (size_t)local * cells;
        for (int t = 0; t < SIDE * SIDE; t++) {
            const int yy = y + t / SIDE - SIDE / 2, xx = x + t % SIDE - SIDE / 2;
            if ((unsigned)yy >= (unsigned)a.height || (unsigned)xx >= (unsigned)a.width)
                continue;
            const float v = in[yy * a.width + xx];
#pragma unroll
            for (int o = 0; o < OUTS; o++)
                if (o0 + o < a.cout)
                    acc[o] =
                        fmaf(v, __ldg(a.weight + ((size_t)(o0 + o) * all + c) * SIDE * SIDE + t), acc[o]);
        }
    }
    for (int o = 0; o < OUTS && o0 + o < a.cout; o++)
        a.out[s * a.out_stride + (size_t)(o0 + o) * cells + i] = activate(a, acc[o]);
}

/* A thread an output cell and OUTS channels. */
__global__ static void convt32(const __grid_constant__ ic_cu_op32 a)
{
    const int cells = a.height * a.width, i = blockIdx.x * BLOCK + threadIdx.x, s = blockIdx.z,
              o0 = blockIdx.y * OUTS, x = i % a.width, y = i / a.width, w = a.width / 2,
              tap = (y & 1) * 2 + (x & 1);
    if (!a.io[s].psi || i >= cells)
        return;
    float acc[OUTS];
    for (int o = 0; o < OUTS; o++)
        acc[o] = a.bias && o0 + o < a.cout ? a.bias[o0 + o] : 0.0f;
    for (int c = 0; c < a.cin[0]; c++) {
        const float v = a.in[0][s * a.in_stride[0] + (size_t)c * (cells / 4) + (y / 2) * w + x / 2];
        for (int o = 0; o < OUTS; o++)
            if (o0 + o < a.cout)
                acc[o] = fmaf(v, __ldg(a.weight + ((size_t)c * a.cout + o0 + o) * 4 + tap), acc[o]);
    }
    for (int o = 0; o < OUTS && o0 + o < a.cout; o++)
        a.out[s * a.out_stride + (size_t)(o0 + o) * cells + i] = activate(a, acc[o]);
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
    for (int i = 0; i < BLOCK / 32; i++)
        sum += shared[i];
    return sum;
}

/* A block a group: the mean, then the squared deviations, then the values. */
__global__ static void norm32(const __grid_constant__ ic_cu_op32 a)
{
    __shared__ double shared[BLOCK / 32];
    const int s = blockIdx.z, g = blockIdx.x, per = a.cout / a.groups, cells = a.height * a.width;
    if (!a.io[s].psi)
        return;
    float *x = a.out + s * a.out_stride + (size_t)g * per * cells;
    const size_t n = (size_t)per * cells;
    const bool rms = a.kind == IC_LAW_OP_RMSNORM;
    double sum = 0, sq = 0;
    if (!rms) {
        for (size_t i = threadIdx.x; i < n; i += BLOCK)
            sum += x[i];
        sum = block_sum(sum, shared) / (double)n;
    }
    for (size_t i = threadIdx.x; i < n; i += BLOCK)
        sq += (x[i] - sum) * (x[i] - sum);
    sq = block_sum(sq, shared) / (double)n;
    const float mean = (float)sum, r = (float)(1.0 / sqrt(sq + (double)a.eps));
    for (size_t i = threadIdx.x; i < n; i += BLOCK) {
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
    const dim3 cells(blocks, 1, n), planes(blocks, (unsigned)a->cout, n),
        outs(blocks, (unsigned)(a->cout + OUTS - 1) / OUTS, n), groups((unsigned)a->groups, 1, n);
    switch (a->kind) {
    case IC_LAW_OP_INPUT: input32<<<cells, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_CONV3X3: conv32<3><<<outs, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_CONV1X1: conv32<1><<<outs, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_CONVT2X2: convt32<<<outs, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_GROUPNORM:
    case IC_LAW_OP_RMSNORM: norm32<<<groups, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_MAXPOOL2: pool32<<<planes, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_RESIZE_HALF: resize32<<<planes, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_MEM_IN: mem_in32<<<planes, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_LSTM: lstm32<<<planes, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_UPDATE: update32<<<cells, BLOCK, 0, stream>>>(*a); break;
    default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}
