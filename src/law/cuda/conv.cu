/* Shapes and launches of the convolutions, and the small kernels beside them. */
#include "law/cuda/device.cuh"
#include "law/cuda/launch.cuh"

#define FAMILY(type, nf4, taps) const void *ic_cu_conv_##type##_##nf4##_##taps(int config);
extern "C" {
FAMILY(f16, 0, 9)
FAMILY(f16, 0, 1)
FAMILY(f16, 1, 9)
FAMILY(f16, 1, 1)
FAMILY(bf16, 0, 9)
FAMILY(bf16, 0, 1)
FAMILY(bf16, 1, 9)
FAMILY(bf16, 1, 1)
}

static const void *kernel_of(enum ic_cu_type type, int nf4, int taps, int config)
{
    if (type == IC_CU_F16 && nf4)
        return taps == 9 ? ic_cu_conv_f16_1_9(config) : ic_cu_conv_f16_1_1(config);
    if (type == IC_CU_F16)
        return taps == 9 ? ic_cu_conv_f16_0_9(config) : ic_cu_conv_f16_0_1(config);
    if (nf4)
        return taps == 9 ? ic_cu_conv_bf16_1_9(config) : ic_cu_conv_bf16_1_1(config);
    return taps == 9 ? ic_cu_conv_bf16_0_9(config) : ic_cu_conv_bf16_0_1(config);
}

static const struct ic_cu_config configs[IC_CU_CONFIG_COUNT] = {
#define X(i, wm, wn, wk, mt, nt, u, blocks) {wm * mt * 16, wn * nt * 8, wm * wn * wk * 32, u, wm, wk},
    IC_CU_CONFIGS(X)
#undef X
};

const struct ic_cu_config *ic_cu_config(int i)
{
    if (i >= IC_CU_TALL_FIRST)
        return ic_cu_tall_config(i - IC_CU_TALL_FIRST);
    if (i >= IC_CU_SPLIT_FIRST)
        return ic_cu_split_config(i - IC_CU_SPLIT_FIRST);
    return i < IC_CU_CONFIG_COUNT ? &configs[i] : ic_cu_wide_config(i - IC_CU_CONFIG_COUNT);
}

int ic_cu_conv_shape(struct ic_cu_conv *c, int config, int taps, int chunk16, int resident,
                     int tiles_per_block, int smem_max)
{
    const struct ic_cu_config *k = &configs[config];
    const int border = taps == 9 ? 2 : 0;
    c->chunk16 = chunk16 > 0 && chunk16 < c->c16 ? chunk16 : c->c16;
    c->resident = resident && c->chunk16 == c->c16;
    if ((resident && !c->resident) || c->chunk16 > 256)
        return 0;
    c->tile_shift = k->rows >= 128 ? 4 : 3;
    c->tile_w = 1 << c->tile_shift;
    c->tile_h = k->rows / c->tile_w;
    c->tiles_x = (c->width + c->tile_w - 1) / c->tile_w;
    c->tiles_y = (c->height + c->tile_h - 1) / c->tile_h;
    c->tiles_per_block = tiles_per_block;
    c->slots = (c->tiles_x * c->tiles_y + tiles_per_block - 1) / tiles_per_block;
    c->chunks = (c->c16 + c->chunk16 - 1) / c->chunk16;
    c->tile_divide = 65536u / (uint32_t)(c->tile_w + border) + 1;
    if (c->stats)
        c->stats_stride = c->cpad / c->stats_gran * c->slots;
    for (int i = 0; i < 2; i++)
        share_lanes(&c->in[i], k->threads);
    const int row = c->chunk16 * 32 + 16, cells = (c->tile_w + border) * (c->tile_h + border);
    const int units = taps * c->chunk16, stage = k->stage * (k->columns / 16) * 512;
    const int input = (cells * row + 127) / 128 * 128;
    const int ring = c->resident ? (units + k->stage - 1) / k->stage * stage : IC_CU_RING * stage;
    const int parts = (k->warps_k - 1) * k->rows * k->columns * 4;
    const int out = k->rows * (k->columns * (c->epilogue == IC_CU_UPDATE ? 4 : 2) + 16);
    if (c->epilogue == IC_CU_UPDATE && k->columns < c->columns)
        return 0;
    /* what the epilogue writes may lie over the ring, but not over weights that stay for the next tile */
    c->ring_at =
        c->resident && tiles_per_block > 1 ? (larger(input, larger(parts, out)) + 127) / 128 * 128 : input;
    c->smem = c->c16 * 16 * 8 + k->warps_m * k->columns * 8 + larger(c->ring_at + ring, larger(parts, out));
    return c->smem <= smem_max;
}

cudaError_t ic_cu_conv_init(enum ic_cu_type type, int smem_max)
{
    cudaError_t e = cudaSuccess;
    for (int i = 0; i < 4 * IC_CU_CONFIG_COUNT && e == cudaSuccess; i++)
        e = cudaFuncSetAttribute(kernel_of(type, i >> 1 & 1, i & 1 ? 9 : 1, i / 4),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, smem_max);
    return e;
}

cudaError_t ic_cu_conv_run(const struct ic_cu_conv *c, enum ic_cu_type type, int config, int taps,
                           int samples, int overlap, cudaStream_t stream)
{
    if (config >= IC_CU_TALL_FIRST)
        return ic_cu_tall_run(c, type, config - IC_CU_TALL_FIRST, samples, overlap, stream);
    if (config >= IC_CU_SPLIT_FIRST)
        return ic_cu_split_run(c, type, config - IC_CU_SPLIT_FIRST, taps, samples, overlap, stream);
    if (config >= IC_CU_CONFIG_COUNT)
        return ic_cu_wide_run(c, type, config - IC_CU_CONFIG_COUNT, taps, samples, overlap, stream);
    const struct ic_cu_config *k = &configs[config];
    const dim3 grid((unsigned)c->slots, (unsigned)((c->columns + k->columns - 1) / k->columns),
                    (unsigned)samples);
    return launch_kernel(kernel_of(type, c->nf4.codes != nullptr, taps, config), grid, k->threads,
                         (size_t)c->smem, c, overlap, stream);
}

/* ---- ConvLSTM ---------------------------------------------------------------------------------- */

template <class T> __global__ void mem_in_kernel(const __grid_constant__ ic_cu_lstm a)
{
    const int sample = blockIdx.z, pairs = a.cpad / 2, i = blockIdx.x * blockDim.x + threadIdx.x;
    const float *h = a.io[sample].h;
    if (!h || i >= pairs * a.cells)
        return;
    /* cells fastest: h is read in order */
    const int c = i / a.cells * 2, cell = i % a.cells;
    const float v0 = c < a.channels ? h[(size_t)c * a.cells + cell] : 0,
                v1 = c + 1 < a.channels ? h[(size_t)(c + 1) * a.cells + cell] : 0;
    *reinterpret_cast<uint32_t *>(static_cast<char *>(a.out) + sample * a.out_stride +
                                  2 * ((size_t)cell * a.cpad + c)) = T::pack(v0, v1);
}

__device__ static float sigmoid(float x)
{
    return 1.0f / (1.0f + __expf(-x));
}

template <class T> __global__ void lstm_kernel(const __grid_constant__ ic_cu_lstm a)
{
    const int sample = blockIdx.z, i = blockIdx.x * blockDim.x + threadIdx.x;
    const ic_cu_io io = a.io[sample];
    if (!io.h || i >= a.cpad * a.cells)
        return;
    const int k = i / a.cells, cell = i % a.cells;
    typename T::one *out =
        reinterpret_cast<typename T::one *>(static_cast<char *>(a.out) + sample * a.out_stride);
    float h = 0;
    if (k < a.channels) {
        const typename T::one *g = reinterpret_cast<const typename T::one *>(
                                       static_cast<const char *>(a.gates) + sample * a.gates_stride) +
                                   (size_t)cell * a.gates_cpad + k;
        const float f = sigmoid((float)g[0]), in = sigmoid((float)g[a.channels]),
                    o = sigmoid((float)g[2 * a.channels]), cand = tanhf((float)g[3 * a.channels]);
        const size_t at = (size_t)k * a.cells + cell;
        const float c = f * io.c[at] + in * cand;
        h = o * tanhf(c);
        io.c[at] = c;
        io.h[at] = h;
    }
    out[(size_t)cell * a.cpad + k] = (typename T::one)h;
}

template <class T> static void lstm_launch(const ic_cu_lstm *a, int samples, cudaStream_t stream)
{
    const int n = a->gates ? a->cpad * a->cells : a->cpad / 2 * a->cells;
    const dim3 grid((unsigned)(n + 255) / 256, 1, (unsigned)samples);
    if (a->gates)
        lstm_kernel<T><<<grid, 256, 0, stream>>>(*a);
    else
        mem_in_kernel<T><<<grid, 256, 0, stream>>>(*a);
}

cudaError_t ic_cu_lstm_run(const struct ic_cu_lstm *a, enum ic_cu_type type, int samples,
                           cudaStream_t stream)
{
    if (type == IC_CU_F16)
        lstm_launch<f16>(a, samples, stream);
    else
        lstm_launch<bf16>(a, samples, stream);
    return cudaGetLastError();
}

/* ---- UPDATE on its own: laws of more channels than a thread block has columns ------------------- */

/* A warp a cell. */
template <class T> __global__ void update_kernel(const __grid_constant__ ic_cu_update a)
{
    const int sample = blockIdx.z, cell = (blockIdx.x * blockDim.x + threadIdx.x) / 32,
              lane = threadIdx.x & 31;
    const ic_cu_io io = a.io[sample];
    if (!io.psi || cell >= a.cells)
        return;
    const uint32_t *y =
        reinterpret_cast<const uint32_t *>(static_cast<const char *>(a.y) + sample * a.y_stride) +
        (size_t)cell * (a.cpad / 2);
    float2 *field = reinterpret_cast<float2 *>(io.psi) + (size_t)cell * a.d;
    float2 *delta = io.delta ? reinterpret_cast<float2 *>(io.delta) + (size_t)cell * a.d : nullptr;
    const float keep = 1.0f - fmaxf(io.gamma, 0.0f);
    float sum = 0;
    for (int pass = 0; pass < 2; pass++) {
        const float r = 1.0f / (sqrtf(sum) + 1e-9f);
        for (int k = lane; k < a.d; k += 32) {
            const float2 ak = T::unpack(y[k]), p = field[k];
            const float2 de =
                a.product ? make_float2(ak.x * p.x - ak.y * p.y, ak.x * p.y + ak.y * p.x) : ak;
            const float2 phi = make_float2(fmaf(keep, p.x, de.x), fmaf(keep, p.y, de.y));
            if (pass) {
                field[k] = make_float2(phi.x * r, phi.y * r);
            } else {
                sum = fmaf(phi.x, phi.x, fmaf(phi.y, phi.y, sum));
                if (delta)
                    delta[k] = de;
            }
        }
        for (int m = 16; m && !pass; m >>= 1)
            sum += __shfl_xor_sync(~0u, sum, m);
    }
}

cudaError_t ic_cu_update_run(const struct ic_cu_update *a, enum ic_cu_type type, int samples,
                             cudaStream_t stream)
{
    const dim3 grid((unsigned)(a->cells + 7) / 8, 1, (unsigned)samples);
    if (type == IC_CU_F16)
        update_kernel<f16><<<grid, 256, 0, stream>>>(*a);
    else
        update_kernel<bf16><<<grid, 256, 0, stream>>>(*a);
    return cudaGetLastError();
}
