/* Shapes and launches of split_fold.cuh. */
#include "law/cuda/split_fold.cuh"
#include "law/cuda/launch.cuh"

#define TILE 8 /* cells of the smaller tensor, across and down */
#define PHASES 4
#define COLUMNS 64                             /* of a block */
#define THREADS 256                            /* SPLIT_THREADS */
#define TAP (COLUMNS * 32)                     /* bytes of weights of 16 channels, */
#define SLOT (4 * TAP)                         /* of a stage at most, */
#define OUT (TILE * TILE * (COLUMNS + 16) * 4) /* of products that another block sends, */
#define SMEM_OF_ONE (113 * 1024)               /* and of two blocks of a multiprocessor */
#define RING_MAX 16                            /* stages whose barriers have room before the sums */
#define SUMS_AT 384

struct config {
    int ahead, rounds, blocks;
    const void *f16, *bf16;
};

static const struct config configs[IC_CU_SPLIT_FOLD_COUNT] = {
#if IC_CU_WIDE
#define X(i, ahead, rounds, blocks)                                                                        \
    {ahead, rounds, blocks, reinterpret_cast<const void *>(split_fold_kernel<f16, ahead, rounds, blocks>), \
     reinterpret_cast<const void *>(split_fold_kernel<bf16, ahead, rounds, blocks>)},
    IC_CU_SPLIT_FOLD_CONFIGS(X)
#undef X
#endif
};

static const void *kernel_of(enum ic_cu_type type, int config)
{
    return type == IC_CU_F16 ? configs[config].f16 : configs[config].bf16;
}

static int groups_of(int cells) /* 16 of them are an item, with 16 channels */
{
    return (cells + 15) / 16;
}

int ic_cu_split_fold_shape(struct ic_cu_fold *a, int config, int cluster_shift, int smem_max)
{
    const int cluster = 1 << cluster_shift, low16 = a->low16 / cluster, skip16 = a->skip16 / cluster;
    const int low = (TILE + 2) * (TILE + 2), skip = 4 * (TILE + 1) * (TILE + 1);
    if (cluster > IC_CU_CLUSTER_MAX || a->low16 % cluster || a->skip16 % cluster || low16 > 8 ||
        skip16 > 8 || a->cpad % 32 || a->out_stride >> 31 || a->in[0].stride >> 31 ||
        a->in[1].stride >> 31 ||
        low16 * groups_of(low) + skip16 * groups_of(skip) >
            THREADS / 32 * configs[config].ahead * configs[config].rounds)
        return 0; /* a warp has all of its part of the inputs of a round under way at once */
    for (int i = 0; i < 2; i++)
        if (a->in[i].channels != a->in[i].cpad || a->in[i].gran != 8 || a->in[i].group_size != 8)
            return 0;
    a->cluster_shift = cluster_shift;
    a->tiles_per_block = 1;
    a->tiles_x = (a->width + TILE - 1) / TILE;
    a->tiles_y = (a->height + TILE - 1) / TILE;
    /* each phase sums for itself, or two where a block has both */
    a->slots = a->tiles_x * a->tiles_y * cluster * (a->cpad * 2 == COLUMNS ? 2 : PHASES);
    a->stats_stride = a->cpad / 8 * a->slots;
    a->sums_at = SUMS_AT;
    a->scale_at = rounded(a->sums_at + THREADS / 32 * COLUMNS);
    a->area_at = rounded(a->scale_at + (low16 + skip16) * 16 * 12);
    a->ring_at = rounded(a->area_at + (low16 * low + skip16 * skip) * 32);
    int weights = (low16 * 4 + skip16 * 9) * TAP;
    if (configs[config].rounds > 1) {
        const int stages = low16 + 3 * skip16;
        a->ring = (SMEM_OF_ONE - a->ring_at - OUT) / SLOT;
        a->ring = a->ring < stages ? a->ring : stages;
        a->ring = a->ring < RING_MAX ? a->ring : RING_MAX;
        if (a->ring < 2)
            return 0;
        weights = a->ring * SLOT;
    }
    a->out_at = a->ring_at + weights;
    a->smem = a->out_at + OUT;
    return a->smem <= smem_max;
}

long ic_cu_split_fold_blocks(const struct ic_cu_fold *a)
{
    return (long)a->tiles_x * a->tiles_y * (a->cpad * PHASES / COLUMNS) << a->cluster_shift;
}

int ic_cu_split_fold_at_once(int config)
{
    return configs[config].blocks;
}

cudaError_t ic_cu_split_fold_init(enum ic_cu_type type, int smem_max)
{
    return allow_smem(IC_CU_SPLIT_FOLD_COUNT, smem_max, [=](int i) { return kernel_of(type, i); });
}

cudaError_t ic_cu_split_fold_run(const struct ic_cu_fold *a, enum ic_cu_type type, int config, int samples,
                                 int overlap, cudaStream_t stream)
{
    const dim3 grid((unsigned)(a->tiles_x * a->tiles_y) << a->cluster_shift,
                    (unsigned)(a->cpad * PHASES / COLUMNS), (unsigned)samples);
    return launch_kernel(kernel_of(type, config), grid, THREADS, (size_t)a->smem, a, overlap, stream,
                         1 << a->cluster_shift);
}
