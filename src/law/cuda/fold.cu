/* Weights, shapes and launches of fold.cuh's convolutions. */
#include "law/cuda/fold.cuh"
#include "law/cuda/launch.cuh"

/* ---- Weights --------------------------------------------------------------------------------------- */

/* For an output of phase p in a row (or column): which of the three rows of the smaller tensor that a
 * cell's outputs read, and which row of the 2x2 weights, made what tap k of the 3x3 convolution meets. */
__device__ static int up_spot(int p, int k)
{
    return (p + k + 1) >> 1;
}
__device__ static int up_tap(int p, int k)
{
    return (p + k + 1) & 1;
}

/* Output channels of a block. */
static __host__ __device__ int block_columns(int cout)
{
    return cout % 64 == 0 ? 64 : 32;
}

/* Products of 64 rows, of both warpgroups, for 16 channels of the smaller tensor, and of the skip. */
static __host__ __device__ int low_products(int cout)
{
    return block_columns(cout) == 64 ? 16 : 12;
}
static __host__ __device__ int skip_products(int cout)
{
    return block_columns(cout) == 64 ? 36 : 24;
}

/* What a value is: of output o and input c, at a spot seen from the first that the phase reads. */
struct spot {
    int o, c, y, x, py, px;
    bool low; /* c is of the smaller tensor */
};

/* split_fold.cuh's order: [64 columns, which are outputs of a phase, phase after phase], and there first [16 inputs of
 * the smaller tensor][2x2 taps], then [16 of the skip][3x3 taps], each in units as pack.c's. */
__device__ static spot split_spot(const ic_cu_fold_source &s, int i)
{
    const int v = i % 1024, low_all = s.low / 16 * 4, all = low_all + s.skip / 16 * 9, nth = i / 1024 % all,
              column = i / 1024 / all * 64 + v / 128 * 8 + v / 8 % 8, phase = column / s.cout;
    const bool low = nth < low_all;
    const int at = low ? nth : nth - low_all, taps = low ? 4 : 9, across = low ? 2 : 3, tap = at % taps;
    return {column % s.cout,
            at / taps * 16 + v / 64 % 2 * 8 + v % 8,
            tap / across,
            tap % across,
            phase >> 1,
            phase & 1,
            low};
}

/* fold.cuh's order: [a block's outputs], and there first [16
 * inputs of the smaller tensor][row of the phase][step], then [16 of the skip][ky][row of the phase][step],
 * each step 64 rows of 16 inputs, in units as pack.c's. */
__device__ static spot fold_spot(const ic_cu_fold_source &s, int i)
{
    const bool pair = block_columns(s.cout) == 32;
    const int low_each = low_products(s.cout), skip_each = skip_products(s.cout),
              low_all = s.low / 16 * low_each, block_all = low_all + s.skip / 16 * skip_each;
    const int v = i % 1024, row = v / 128 * 8 + v / 8 % 8, nth = i / 1024 % block_all,
              block = i / 1024 / block_all;
    const bool low = nth < low_all;
    const int at = low ? nth : nth - low_all, each = low ? low_each : skip_each, k = at / each,
              steps = low ? low_each / 2 : skip_each / 6, step = at % steps, py = at / steps & 1,
              ky = at % each / (2 * steps); /* of the skip */
    const int px = pair ? row / 32 : step & 1;
    int y = ky, x = pair ? step - px : step / 2;
    if (low) {
        y = pair ? step / 3 : step / 4;
        x = pair ? step % 3 - px : step / 2 % 2;
    }
    return {block * (pair ? 32 : 64) + (pair ? row % 32 : row),
            k * 16 + v / 64 % 2 * 8 + v % 8,
            y,
            x,
            py,
            px,
            low};
}

/* One thread a value. */
template <class T> __global__ void fold_weights(ic_cu_fold_source s, uint16_t *out, int values)
{
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= values)
        return;
    const spot p = s.split ? split_spot(s, i) : fold_spot(s, i);
    const float *conv = s.conv + (size_t)p.o * (s.up + s.skip) * 9;
    float sum = 0;
    if (!p.low && p.x >= 0 && p.x < 3)
        sum = conv[(s.up + p.c) * 9 + p.y * 3 + p.x];
    for (int tap = 0; tap < 9 && p.low; tap++) {
        const int ty = tap / 3, tx = tap % 3;
        if (up_spot(p.py, ty) != p.py + p.y || up_spot(p.px, tx) != p.px + p.x)
            continue;
        const float *up = s.transposed + (size_t)p.c * s.up * 4 + up_tap(p.py, ty) * 2 + up_tap(p.px, tx);
        for (int u = 0; u < s.up; u++)
            sum = fmaf(conv[u * 9 + tap], up[u * 4], sum);
    }
    out[i] = (uint16_t)T::pack(sum, 0.0f);
}

/* What the transposed convolution's bias adds to an output: of the taps that lie inside the grid. */
__global__ void fold_bias(ic_cu_fold_source s, float *out)
{
    const int o = (int)(blockIdx.x * blockDim.x + threadIdx.x), y = blockIdx.y / 3, x = blockIdx.y % 3;
    if (o >= s.cout)
        return;
    float sum = 0;
    for (int ky = y == 0 ? 1 : 0; ky < (y == 2 ? 2 : 3) && s.bias; ky++)
        for (int kx = x == 0 ? 1 : 0; kx < (x == 2 ? 2 : 3); kx++)
            for (int u = 0; u < s.up; u++)
                sum = fmaf(s.conv[((size_t)o * (s.up + s.skip) + u) * 9 + ky * 3 + kx], s.bias[u], sum);
    out[blockIdx.y * s.cout + o] = sum;
}

static int values_of(const struct ic_cu_fold_source *s)
{
    if (s->split)
        return s->cout * (s->low * 16 + s->skip * 36);
    return s->cout / block_columns(s->cout) * 64 *
           (s->low * low_products(s->cout) + s->skip * skip_products(s->cout));
}

size_t ic_cu_fold_bytes(const struct ic_cu_fold_source *s)
{
    return (size_t)values_of(s) * 2 + (size_t)s->cout * 9 * sizeof(float);
}

cudaError_t ic_cu_fold_weights(const struct ic_cu_fold_source *s, enum ic_cu_type type,
                               struct ic_cu_fold *a, void *to, cudaStream_t stream)
{
    const int values = values_of(s);
    const unsigned blocks = ((unsigned)values + 255) / 256;
    uint16_t *weight = static_cast<uint16_t *>(to);
    float *bias = reinterpret_cast<float *>(weight + values);
    a->weight = weight;
    a->bias = bias;
    a->split = s->split;
    if (type == IC_CU_F16)
        fold_weights<f16><<<blocks, 256, 0, stream>>>(*s, weight, values);
    else
        fold_weights<bf16><<<blocks, 256, 0, stream>>>(*s, weight, values);
    fold_bias<<<dim3(((unsigned)s->cout + 63) / 64, 9), 64, 0, stream>>>(*s, bias);
    return cudaGetLastError();
}

/* ---- Shapes and launches --------------------------------------------------------------------------- */

struct config {
    int cells, pair, load, blocks;
    const void *f16, *bf16;
};

static const struct config configs[IC_CU_FOLD_COUNT] = {
#if IC_CU_WIDE
#define X(i, cells, pair, load, blocks)                                                                    \
    {cells,                                                                                                \
     pair,                                                                                                 \
     load,                                                                                                 \
     blocks,                                                                                               \
     reinterpret_cast<const void *>(fold_kernel<f16, cells, pair, load, blocks>),                          \
     reinterpret_cast<const void *>(fold_kernel<bf16, cells, pair, load, blocks>)},
    IC_CU_FOLD_CONFIGS(X)
#undef X
#endif
};

static const void *kernel_of(enum ic_cu_type type, int config)
{
    return type == IC_CU_F16 ? configs[config].f16 : configs[config].bf16;
}

#define SMEM_OF_ALL                                                                                        \
    (228 * 1024) /* of a multiprocessor's blocks together, 1024 bytes of each for the system */

int ic_cu_fold_shape(struct ic_cu_fold *a, int config, int tiles, int cluster_shift, int smem_max)
{
    const struct config *k = &configs[config];
    const int tile_w = 8, tile_h = k->cells / tile_w;
    if (k->pair != (block_columns(a->cpad) == 32) || a->out_stride >> 31 || a->in[0].stride >> 31 ||
        a->in[1].stride >> 31)
        return 0;
    a->low_chunk = a->low16 < IC_CU_FOLD_CHUNK ? a->low16 : IC_CU_FOLD_CHUNK;
    a->tiles_x = (a->width + tile_w - 1) / tile_w;
    a->tiles_y = (a->height + tile_h - 1) / tile_h;
    a->tiles_per_block = tiles;
    a->slots = (a->tiles_x * a->tiles_y + tiles - 1) / tiles;
    a->cluster_shift = cluster_shift;
    if (!even_clusters(a->tiles_x * a->tiles_y, tiles, cluster_shift))
        return 0;
    a->stats_stride = a->cpad / 8 * a->slots;
    for (int i = 0; i < 2; i++)
        share_lanes(&a->in[i], (2 + k->load) * 128 / 2); /* half of the threads each */
    const int low = (tile_w + 2) * (tile_h + 2) * 32 * a->low_chunk,
              skip = 4 * (tile_w + 1) * (tile_h + 1) * 32;
    int most = SMEM_OF_ALL / k->blocks - 1024;
    most = most < smem_max ? most : smem_max;
    a->buffer_bytes = rounded(larger(low, skip));
    for (a->ring = IC_CU_FOLD_RING; a->ring > 1; a->ring--) {
        a->scale_at = rounded(16 * (a->ring + IC_CU_FOLD_BUFFERS));
        a->sums_at = a->scale_at + (a->low16 + a->skip16) * 16 * 8;
        a->table_at = a->sums_at + 8 * 8 * 8;
        a->area_at =
            rounded(a->table_at + 4 * (tile_w + 2) * (tile_h + 2) + 16 * (tile_w + 1) * (tile_h + 1));
        a->ring_at = a->area_at + IC_CU_FOLD_BUFFERS * a->buffer_bytes;
        a->out_at = a->ring_at + a->ring * low_products(a->cpad) * 8 * UNIT;
        a->smem = a->out_at + 2 * 8 * IC_CU_FOLD_OUT_H * (64 * 2 + 16);
        if (a->smem <= most)
            return 1;
    }
    return 0;
}

long ic_cu_fold_blocks(const struct ic_cu_fold *a)
{
    return (long)a->slots * (a->cpad / block_columns(a->cpad));
}

cudaError_t ic_cu_fold_init(enum ic_cu_type type, int smem_max)
{
    return allow_smem(IC_CU_FOLD_COUNT, smem_max, [=](int i) { return kernel_of(type, i); });
}

cudaError_t ic_cu_fold_run(const struct ic_cu_fold *a, enum ic_cu_type type, int config, int samples,
                           int overlap, cudaStream_t stream)
{
    const struct config *k = &configs[config];
    const dim3 grid((unsigned)a->slots, (unsigned)(a->cpad / block_columns(a->cpad)), (unsigned)samples);
    return launch_kernel(kernel_of(type, config), grid, (2 + k->load) * 128, (size_t)a->smem, a, overlap,
                         stream, 1 << a->cluster_shift);
}
