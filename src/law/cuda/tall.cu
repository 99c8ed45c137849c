/* Shapes and launches of tall.cuh's convolutions. */
#include "law/cuda/launch.cuh"
#if IC_CU_WIDE
#include "law/cuda/tall.cuh"
#endif

#define TILE_W 8
#define WG_H 32
#define STAGE64 (3 * 2048) /* bytes of a stage of weights for 64 columns */

static const struct ic_cu_config config = {256, 128, IC_CU_TALL_THREADS, 3, 2, 1};

const struct ic_cu_config *ic_cu_tall_config(void)
{
    return &config;
}

/* Of 16 bytes for eight channels of a cell. */
static int loads_of(const struct ic_cu_conv *c)
{
    return c->in[0].load == IC_CU_LOAD_PSI ? 2 : 1;
}

int ic_cu_tall_shape(struct ic_cu_conv *c, int taps, int tiles, int smem_max)
{
    const struct ic_cu_src *in = &c->in[0];
    const bool two = c->columns == 64, psi = in->load == IC_CU_LOAD_PSI;
    const int chunk16 = IC_CU_TALL_CHUNK16(two), tile_h = two ? 2 * WG_H : WG_H, loads = loads_of(c);
    if (c->nf4.codes || taps != 9 || c->epilogue != IC_CU_STORE || c->act ||
        (c->stats && c->stats_gran != 8) || c->c16 % chunk16 || (c->columns % 128 && !two) ||
        c->in[1].cpad || c->out_stride >> 31 || in->stride >> 31 ||
        (size_t)c->height * (size_t)c->width * (size_t)c->d >> 27 ||
        (in->load != IC_CU_LOAD_NORM && (!psi || in->cpad != 2 * c->d)) || c->height < tile_h)
        return 0;
    c->tiles_x = (c->width + TILE_W - 1) / TILE_W;
    c->tiles_y = (c->height + tile_h - 1) / tile_h;
    c->tiles_per_block = tiles;
    c->slots = (c->tiles_x * c->tiles_y + tiles - 1) / tiles;
    c->stats_stride = c->cpad / 8 * c->slots;
    for (int i = 0; i < 2; i++)
        share_lanes(&c->in[i], IC_CU_TALL_THREADS);
    const int step = 16 / chunk16, cells = (TILE_W + 2) * (tile_h + 2),
              plane = (cells + 4 * step - 1) / (4 * step) * (4 * step), stage = (two ? 1 : 2) * STAGE64;
    c->buffer_bytes = plane * chunk16 * 32;
    for (c->ring = IC_CU_TALL_RING; c->ring > 2; c->ring--) {
        c->scale_at = rounded(16 * (c->ring + IC_CU_TALL_TEAMS));
        c->sums_at = c->scale_at + c->c16 * 16 * 8;
        c->area_at = rounded(c->sums_at + IC_CU_TALL_SUMS + IC_CU_TALL_TEAMS * 4 * plane);
        c->ring_at = c->area_at + IC_CU_TALL_TEAMS * c->buffer_bytes;
        c->out_at = c->ring_at + c->ring * stage;
        c->smem = c->out_at + IC_CU_TALL_OUT;
        if (loads > 1)
            c->smem += IC_CU_TALL_TEAMS * IC_CU_TALL_AHEAD * 2 * loads * 32 * 16;
        if (c->smem <= smem_max)
            return 1;
    }
    return 0;
}

/* [type][two][loads - 1] */
static const void *const kernels[2][2][2] = {
#if IC_CU_WIDE
#define KERNEL(T, two, loads) reinterpret_cast<const void *>(tall_kernel<T, two, loads>)
#define OF(T)                                                                                              \
    {                                                                                                      \
        {KERNEL(T, false, 1), KERNEL(T, false, 2)},                                                        \
        {                                                                                                  \
            KERNEL(T, true, 1), KERNEL(T, true, 2)                                                         \
        }                                                                                                  \
    }
    OF(f16), OF(bf16)
#undef OF
#undef KERNEL
#endif
};

cudaError_t ic_cu_tall_init(enum ic_cu_type type, int smem_max)
{
    return allow_smem(4, smem_max, [=](int i) { return kernels[type == IC_CU_BF16][i / 2][i % 2]; });
}

cudaError_t ic_cu_tall_run(const struct ic_cu_conv *c, enum ic_cu_type type, int samples, int overlap,
                           cudaStream_t stream)
{
    const bool two = c->columns == 64;
    const dim3 grid((unsigned)c->slots, two ? 1 : (unsigned)c->columns / 128, (unsigned)samples);
    return launch_kernel(kernels[type == IC_CU_BF16][two][loads_of(c) - 1], grid, IC_CU_TALL_THREADS,
                         (size_t)c->smem, c, overlap, stream);
}
