/* Shapes and launches of wide.cuh's convolutions. */
#include "law/cuda/launch.cuh"

KERNELS_BY_TYPE_AND_TAPS(wide)

struct config {
    struct ic_cu_config shared;
    int units, load;
};

static const struct config configs[IC_CU_WIDE_COUNT] = {
#define X(i, wm, wk, mt, n, units, load, blocks)                                                           \
    {{wm * mt * 64, n, (wm * wk + load) * 128, units, wm, wk}, units, load},
    IC_CU_WIDE_CONFIGS(X)
#undef X
};

const struct ic_cu_config *ic_cu_wide_config(int i)
{
    return &configs[i].shared;
}

int ic_cu_wide_shape(struct ic_cu_conv *c, int config, int taps, const struct ic_cu_wide_cut *cut,
                     int smem_max)
{
    const struct ic_cu_config *k = &configs[config].shared;
    const int border = taps == 9 ? 2 : 0, wk = k->warps_k, n8 = k->columns / 8;
    const int load = configs[config].load, units = taps == 9 ? configs[config].units : 4,
              stage = units * n8 * 256;
    const int blocks = (c->columns + k->columns - 1) / k->columns;
    if (c->nf4.codes || c->epilogue == IC_CU_UPDATE || (c->stats && c->stats_gran != 8) ||
        c->c16 * taps % units || c->columns % k->columns || c->out_stride >> 31)
        return 0;
    c->chunk16 = cut->chunk16 > 0 && cut->chunk16 < c->c16 ? cut->chunk16 : c->c16;
    c->chunks = (c->c16 + c->chunk16 - 1) / c->chunk16;
    c->tile_w = k->rows >= 128 ? 16 : 8;
    c->tile_h = k->rows / c->tile_w;
    c->tiles_x = (c->width + c->tile_w - 1) / c->tile_w;
    c->tiles_y = (c->height + c->tile_h - 1) / c->tile_h;
    c->tiles_per_block = cut->tiles;
    c->slots = (c->tiles_x * c->tiles_y + cut->tiles - 1) / cut->tiles;
    c->buffers = load ? cut->buffers : cut->buffers > 1 ? 2 : 1;
    c->passes = cut->passes;
    c->resident = cut->resident;
    c->stages = c->c16 * taps / units;
    if ((c->chunks > 1 && (taps == 1 || c->passes > 1)) || (c->passes > 1 && cut->tiles > 1) ||
        blocks % c->passes || (load && (c->passes > 1 || c->buffers == 1)) ||
        (c->buffers >= 2 && c->chunks * cut->tiles == 1))
        return 0;
    /* groups that share the sum take turns at stages, in every chunk alike */
    const int in_chunk = taps == 9 ? c->chunk16 * 9 / units : c->stages,
              in_last = c->stages - (c->chunks - 1) * in_chunk;
    if (in_chunk % wk || in_last % wk)
        return 0;
    c->ring = c->resident ? c->stages * c->passes : (units == 9 ? 3 : 4) * (wk > 1 ? 2 : 1);
    if ((!c->resident && c->ring >= c->stages * c->passes) || /* that is resident */
        c->ring > k->threads)
        return 0;
    if (c->stats)
        c->stats_stride = c->cpad / c->stats_gran * c->slots;
    for (int i = 0; i < 2; i++)
        share_lanes(&c->in[i], k->threads);
    const int tile = (c->tile_w + border) * (c->tile_h + border) * c->chunk16 * 32;
    const int out = k->warps_m * 4 * 16 * (k->columns * 2 + 16),
              parts = (wk - 1) * k->rows * k->columns * 4, epilogue = larger(out, parts);
    const bool apart = load || c->passes > 1 || cut->buffers == 3;
    c->buffer_bytes = rounded(apart ? tile : larger(tile, epilogue));
    c->scale_at = rounded(16 * (c->ring + c->buffers));
    c->sums_at = c->scale_at + c->c16 * 16 * 8;
    c->area_at = rounded(c->sums_at + k->threads / 32 * n8 * 8);
    c->ring_at = c->area_at + c->buffers * c->buffer_bytes;
    c->smem = c->ring_at + c->ring * stage;
    c->out_at = 0;
    if (apart) {
        c->out_at = rounded(c->smem);
        c->smem = c->out_at + epilogue;
    }
    return c->smem <= smem_max;
}

cudaError_t ic_cu_wide_init(enum ic_cu_type type, int smem_max)
{
    return allow_smem(2 * IC_CU_WIDE_COUNT, smem_max,
                      [=](int i) { return kernel_of(type, i & 1 ? 9 : 1, i / 2); });
}

cudaError_t ic_cu_wide_run(const struct ic_cu_conv *c, enum ic_cu_type type, int config, int taps,
                           int samples, int overlap, cudaStream_t stream)
{
    const struct ic_cu_config *k = &configs[config].shared;
    const dim3 grid((unsigned)c->slots, (unsigned)((c->columns + k->columns - 1) / k->columns / c->passes),
                    (unsigned)samples);
    return launch_kernel(kernel_of(type, taps, config), grid, k->threads, (size_t)c->smem, c, overlap,
                         stream);
}
