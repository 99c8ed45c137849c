/* Shapes and launches of tall.cuh's convolutions. */
#include "law/cuda/launch.cuh"
#if IC_CU_WIDE
#include "law/cuda/tall.cuh"
#endif

#define TILE_W 8

static const struct ic_cu_config configs[IC_CU_TALL_COUNT] = {
#define CUT(cut)                                                                                           \
    {                                                                                                      \
        TILE_W *IC_CU_TALL_H(cut), IC_CU_TALL_COLUMNS(cut), IC_CU_TALL_THREADS(cut), 3, 2, 1               \
    }
    CUT(IC_CU_TALL_128),
    CUT(IC_CU_TALL_64),
    CUT(IC_CU_TALL_128_FEW),
    CUT(IC_CU_TALL_64_FEW),
#undef CUT
};

const struct ic_cu_config *ic_cu_tall_config(int i)
{
    return &configs[i];
}

/* Of 16 bytes for eight channels of a cell. */
static int loads_of(const struct ic_cu_conv *c)
{
    return c->in[0].load == IC_CU_LOAD_PSI ? 2 : 1;
}

int ic_cu_tall_shape(struct ic_cu_conv *c, int cut, int taps, int tiles, int cluster_shift, int smem_max)
{
    const struct ic_cu_src *in = &c->in[0];
    const bool psi = in->load == IC_CU_LOAD_PSI, few = cut >= IC_CU_TALL_128_FEW;
    const int chunk16 = IC_CU_TALL_CHUNK16(cut), tile_h = IC_CU_TALL_H(cut), loads = loads_of(c);
    if (c->nf4.codes || taps != 9 || c->epilogue != IC_CU_STORE || c->act || c->bias ||
        (c->stats && c->stats_gran != 8) || c->c16 % chunk16 || (c->columns % 128 && c->columns != 64) ||
        (c->columns == 64 ? IC_CU_TALL_COLUMNS(cut) != 64 : cut == IC_CU_TALL_64) || (few && loads > 1) ||
        c->in[1].cpad || c->out_stride >> 31 || in->stride >> 31 ||
        (size_t)c->height * (size_t)c->width * (size_t)c->d >> 27 ||
        (in->load != IC_CU_LOAD_NORM && (!psi || in->cpad != 2 * c->d)) || c->height < tile_h)
        return 0;
    c->tiles_x = (c->width + TILE_W - 1) / TILE_W;
    c->tiles_y = (c->height + tile_h - 1) / tile_h;
    c->tiles_per_block = tiles;
    c->slots = (c->tiles_x * c->tiles_y + tiles - 1) / tiles;
    c->cluster_shift = cluster_shift;
    if (!even_clusters(c->tiles_x * c->tiles_y, tiles, cluster_shift) ||
        (cluster_shift > 0 && cut == IC_CU_TALL_64_FEW))
        return 0;
    c->stats_stride = c->cpad / 8 * c->slots;
    for (int i = 0; i < 2; i++)
        share_lanes(&c->in[i], configs[cut].threads);
    const int step = 16 / chunk16, cells = (TILE_W + 2) * (tile_h + 2),
              plane = (cells + 4 * step - 1) / (4 * step) * (4 * step), teams = IC_CU_TALL_TEAMS(cut);
    c->buffer_bytes = plane * chunk16 * 32;
    for (c->ring = IC_CU_TALL_RING; c->ring > 2; c->ring--) {
        c->scale_at = rounded(16 * (c->ring + teams));
        c->sums_at = c->scale_at + c->c16 * 16 * 8;
        c->area_at = rounded(c->sums_at + IC_CU_TALL_SUMS + teams * 4 * plane);
        c->ring_at = c->area_at + teams * c->buffer_bytes;
        c->out_at = c->ring_at + c->ring * IC_CU_TALL_STAGE(cut);
        c->smem = c->out_at + IC_CU_TALL_OUT(cut);
        if (loads > 1)
            c->smem += teams * IC_CU_TALL_AHEAD * 2 * loads * 32 * 16;
        if (c->smem <= smem_max)
            return 1;
    }
    return 0;
}

/* [type][cut][loads - 1] */
static const void *const kernels[2][IC_CU_TALL_COUNT][2] = {
#if IC_CU_WIDE
#define KERNEL(T, cut, loads) reinterpret_cast<const void *>(tall_kernel<T, cut, loads>)
#define ALL(T, cut)                                                                                        \
    {                                                                                                      \
        KERNEL(T, cut, 1), KERNEL(T, cut, 2)                                                               \
    }
#define FEW(T, cut)                                                                                        \
    {                                                                                                      \
        KERNEL(T, cut, 1)                                                                                  \
    }
#define OF(T)                                                                                              \
    {                                                                                                      \
        ALL(T, IC_CU_TALL_128), ALL(T, IC_CU_TALL_64), FEW(T, IC_CU_TALL_128_FEW),                         \
            FEW(T, IC_CU_TALL_64_FEW)                                                                      \
    }
    OF(f16), OF(bf16)
#undef OF
#undef FEW
#undef ALL
#undef KERNEL
#endif
};

static const void *kernel_of(enum ic_cu_type type, int cut, int loads)
{
    return kernels[type == IC_CU_BF16][cut][loads - 1];
}

cudaError_t ic_cu_tall_init(enum ic_cu_type type, int smem_max)
{
    return allow_smem(6, smem_max, [=](int i) {
        return i < 4 ? kernel_of(type, i / 2, 1 + i % 2) : kernel_of(type, IC_CU_TALL_128_FEW + i - 4, 1);
    });
}

cudaError_t ic_cu_tall_run(const struct ic_cu_conv *c, enum ic_cu_type type, int cut, int samples,
                           int overlap, cudaStream_t stream)
{
    const dim3 grid((unsigned)c->slots, (unsigned)(c->columns / configs[cut].columns), (unsigned)samples);
    return launch_kernel(kernel_of(type, cut, loads_of(c)), grid, configs[cut].threads, (size_t)c->smem, c,
                         overlap, stream, 1 << c->cluster_shift);
}
