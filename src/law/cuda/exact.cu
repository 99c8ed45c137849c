/* Every operation of a plan in float32, NCHW, one kernel each: for laws that are kept in float32, for spiking
 * ones (a rounding would flip a spike), for GPUs without bfloat16 tensor cores, and what the tensor core path
 * is compared with. Convolutions are here for SNN_UNET and for GPUs before 8.0, the others' are in exact_mma.cu;
 * their sums run in float32 over all taps and channels with fused multiply-adds. Norms' statistics are in
 * float64. No fast-math. */
#define _Noreturn __attribute__((noreturn)) /* plan.h is C */
#include "law/cuda/kernels.h"
#include "law/plan.h"

#define BLOCK 128 /* threads; of convolutions and norms below */
#define NORM_BLOCK 512
#define NORM_EACH 16 /* values of a thread */
#define NORM_VALUES (NORM_BLOCK * NORM_EACH)
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

/* A group is summed in parts, by a block each: how many depends on its size alone. One: norm32 sums it itself. */
__host__ __device__ static int parts_of(const ic_cu_op32 &a)
{
    const size_t n = (size_t)a.cout / a.groups * a.height * a.width,
                 parts = (n + NORM_VALUES - 1) / NORM_VALUES;
    return parts < IC_CU_SUMS32 ? (int)parts : IC_CU_SUMS32;
}

/* To all threads. */
__device__ static double block_sum(double v, double *shared)
{
    for (int m = 16; m; m >>= 1)
        v += __shfl_xor_sync(~0u, v, m);
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        shared[threadIdx.x / 32] = v;
    __syncthreads();
    v = shared[threadIdx.x % 32 % (blockDim.x / 32)];
    for (int m = (int)blockDim.x / 64; m; m >>= 1)
        v += __shfl_xor_sync(~0u, v, m);
    return v;
}

__global__ static void __launch_bounds__(NORM_BLOCK) sums32(const __grid_constant__ ic_cu_op32 a)
{
    __shared__ double shared[NORM_BLOCK / 32];
    const int s = blockIdx.z, g = blockIdx.y, parts = parts_of(a);
    if (!a.io[s].psi)
        return;
    const size_t n = (size_t)a.cout / a.groups * a.height * a.width, part = (n + parts - 1) / parts,
                 from = blockIdx.x * part, to = min(from + part, n);
    const float *x = a.out + s * a.out_stride + g * n;
    double sum = 0, sq = 0;
#pragma unroll 8
    for (size_t i = from + threadIdx.x; i < to; i += NORM_BLOCK) {
        const double d = x[i];
        sum += d;
        sq += d * d;
    }
    sum = block_sum(sum, shared);
    sq = block_sum(sq, shared);
    if (threadIdx.x == 0) {
        double *out = a.sums + (((size_t)s * a.groups + g) * parts + blockIdx.x) * 2;
        out[0] = sum;
        out[1] = sq;
    }
}

/* A thread: NORM_EACH values of a group. Where a block has all of it, it needs nothing else. */
__global__ static void __launch_bounds__(NORM_BLOCK, 2) norm32(const __grid_constant__ ic_cu_op32 a)
{
    __shared__ double shared[NORM_BLOCK / 32];
    const int s = blockIdx.z, g = blockIdx.y, per = a.cout / a.groups, parts = parts_of(a),
              cells = a.height * a.width, step = (int)blockDim.x;
    const size_t n = (size_t)per * cells, from = (size_t)blockIdx.x * step * NORM_EACH + threadIdx.x;
    if (!a.io[s].psi)
        return;
    const int left = n > from ? (int)min(n - from, (size_t)step * NORM_EACH) : 0;
    float *x = a.out + s * a.out_stride + g * n + from, v[NORM_EACH];
#pragma unroll
    for (int i = 0; i < NORM_EACH; i++)
        v[i] = i * step < left ? x[i * step] : 0.0f;
    const bool rms = a.kind == IC_LAW_OP_RMSNORM;
    double mean = 0, var = 0;
    if (parts == 1) {
#pragma unroll
        for (int i = 0; i < NORM_EACH; i++)
            mean += v[i];
        mean = rms ? 0 : block_sum(mean, shared) / n;
    } else {
        const double *in = a.sums + ((size_t)s * a.groups + g) * parts * 2;
        for (int i = 0; i < parts; i++) {
            mean += in[2 * i];
            var += in[2 * i + 1];
        }
        mean = rms ? 0 : mean / n;
        var = var / n - mean * mean;
    }
    const float m = (float)mean;
#pragma unroll
    for (int i = 0; i < NORM_EACH; i++)
        v[i] = i * step < left ? v[i] - m : 0.0f;
    if (parts == 1) {
#pragma unroll
        for (int i = 0; i < NORM_EACH; i++)
            var += (double)v[i] * v[i];
        var = block_sum(var, shared) / n - (mean - m) * (mean - m);
    }
    const float r = (float)(1.0 / sqrt(fmax(var, 0.0) + (double)a.eps));
    int c = (int)(from / cells), cell = (int)(from % cells);
#pragma unroll
    for (int i = 0; i < NORM_EACH; i++, cell += step) {
        for (; cell >= cells; cell -= cells)
            c++;
        if (i * step < left)
            x[i * step] =
                activate(a, v[i] * r * a.weight[g * per + c] + (a.bias ? a.bias[g * per + c] : 0.0f));
    }
}

static void run_norm32(const ic_cu_op32 &a, unsigned samples, cudaStream_t stream)
{
    const unsigned parts = (unsigned)parts_of(a), groups = (unsigned)a.groups;
    const size_t n = (size_t)a.cout / a.groups * a.height * a.width;
    unsigned threads = 64; /* no more than a small group needs: more of them run at once */
    while (threads < NORM_BLOCK && threads * NORM_EACH < n)
        threads *= 2;
    if (parts > 1) {
        sums32<<<dim3(parts, groups, samples), NORM_BLOCK, 0, stream>>>(a);
        threads = NORM_BLOCK / 2;
    }
    norm32<<<dim3((unsigned)((n + threads * NORM_EACH - 1) / (threads * NORM_EACH)), groups, samples),
             threads, 0, stream>>>(a);
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

/* Cells of a block of update32: their psi lies in shared memory. */
__host__ __device__ static int update_cells(int d)
{
    int cells = BLOCK;
    while (cells > 1 && cells * (2 * d + 1) * sizeof(float) > 32768)
        cells /= 2;
    return cells;
}

/* psi comes and goes as it lies; a thread has all of a cell's, an odd number of words from its neighbour's. */
__global__ static void update32(const __grid_constant__ ic_cu_op32 a)
{
    extern __shared__ float tile[];
    const int each = update_cells(a.d), first = blockIdx.x * each,
              here = min(each, a.height * a.width - first), s = blockIdx.z, cells = a.height * a.width,
              row = 2 * a.d;
    const ic_cu_io io = a.io[s];
    if (!io.psi)
        return;
    float *all = io.psi + (size_t)first * row;
    for (int j = threadIdx.x; j < here * row; j += blockDim.x)
        tile[j / row * (row + 1) + j % row] = all[j];
    __syncthreads();
    if ((int)threadIdx.x < here) {
        const int i = first + (int)threadIdx.x;
        const float *y = a.in[0] + s * a.in_stride[0] + i, gamma = fmaxf(io.gamma, 0.0f);
        float *psi = tile + threadIdx.x * (row + 1), sum = 0;
        for (int k = 0; k < a.d; k++) {
            const float ar = y[(size_t)k * cells], ai = y[(size_t)(a.d + k) * cells], pr = psi[2 * k],
                        pi = psi[2 * k + 1];
            const float dr = a.product ? ar * pr - ai * pi : ar, di = a.product ? ar * pi + ai * pr : ai;
            const float fr = pr + (dr - gamma * pr), fi = pi + (di - gamma * pi);
            psi[2 * k] = fr;
            psi[2 * k + 1] = fi;
            sum += fr * fr + fi * fi;
            if (io.delta) {
                io.delta[((size_t)i * a.d + k) * 2] = dr;
                io.delta[((size_t)i * a.d + k) * 2 + 1] = di;
            }
        }
        const float r = sqrtf(sum) + 1e-9f;
        for (int k = 0; k < row; k++)
            psi[k] = psi[k] / r;
    }
    __syncthreads();
    for (int j = threadIdx.x; j < here * row; j += blockDim.x)
        all[j] = tile[j / row * (row + 1) + j % row];
}

static void run_update32(const ic_cu_op32 &a, unsigned samples, cudaStream_t stream)
{
    const int each = update_cells(a.d), cells = a.height * a.width;
    update32<<<dim3((unsigned)((cells + each - 1) / each), 1, samples), BLOCK,
               each *(2 * a.d + 1) * sizeof(float), stream>>>(a);
}

cudaError_t ic_cu_op32_run(const struct ic_cu_op32 *a, int samples, cudaStream_t stream)
{
    const unsigned blocks = (unsigned)(a->height * a->width + BLOCK - 1) / BLOCK, n = (unsigned)samples;
    if (a->split &&
        (a->kind == IC_LAW_OP_CONV3X3 || a->kind == IC_LAW_OP_CONV1X1 || a->kind == IC_LAW_OP_CONVT2X2))
        return ic_cu_mma32_run(a, samples, stream);
    const dim3 cells(blocks, 1, n), planes(blocks, (unsigned)a->cout, n);
    switch (a->kind) {
    case IC_LAW_OP_INPUT: input32<<<cells, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_CONV3X3: run_conv32<3, false>(*a, samples, stream); break;
    case IC_LAW_OP_CONV1X1: run_conv32<1, false>(*a, samples, stream); break;
    case IC_LAW_OP_CONVT2X2: run_conv32<1, true>(*a, samples, stream); break;
    case IC_LAW_OP_GROUPNORM:
    case IC_LAW_OP_RMSNORM: run_norm32(*a, n, stream); break;
    case IC_LAW_OP_MAXPOOL2: pool32<<<planes, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_RESIZE_HALF: resize32<<<planes, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_MEM_IN: mem_in32<<<planes, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_LSTM: lstm32<<<planes, BLOCK, 0, stream>>>(*a); break;
    case IC_LAW_OP_UPDATE: run_update32(*a, n, stream); break;
    default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}
