/* Shapes and launches of split.cuh's convolutions. */
#include "law/cuda/launch.cuh"

KERNELS_BY_TYPE_AND_TAPS(split)

#define THREADS 256              /* SPLIT_THREADS */
#define SUMS_AT 384              /* bytes; barriers of 16 stages and one more are before */
#define SMEM_OF_ONE (113 * 1024) /* bytes, of two blocks of a multiprocessor */

static const struct ic_cu_config configs[IC_CU_SPLIT_COUNT] = {
#define X(i, wm, n, staged) {wm * 64, n, THREADS, 1, wm, 1},
    IC_CU_SPLIT_CONFIGS(X)
#undef X
};
static const bool staged[IC_CU_SPLIT_COUNT] = {
#define X(i, wm, n, staged) staged,
    IC_CU_SPLIT_CONFIGS(X)
#undef X
};

const struct ic_cu_config *ic_cu_split_config(int i)
{
    return &configs[i];
}

/* Channels are whole 16s, and a norm's groups octets. */
static bool takes(const struct ic_cu_src *s)
{
    return s->stride >> 31 == 0 &&
           (s->load != IC_CU_LOAD_NORM || (s->channels == s->cpad && s->gran == 8 && s->group_size == 8));
}

int ic_cu_split_shape(struct ic_cu_conv *c, int config, int taps, int cluster_shift, int smem_max)
{
    const struct ic_cu_config *k = &configs[config];
    const int border = taps == 9 ? 2 : 0, cluster = 1 << cluster_shift, n8 = k->columns / 8;
    const bool alone = c->in[0].load == IC_CU_LOAD_PSI;
    if (c->nf4.codes || c->epilogue == IC_CU_UPDATE || c->act || (c->stats && c->stats_gran != 8) ||
        cluster > IC_CU_CLUSTER_MAX || c->c16 % cluster || c->c16 / cluster > (c->in[1].cpad ? 8 : 16) ||
        (size_t)c->height * (size_t)c->width * (size_t)c->d >> 28 || c->columns % k->columns ||
        c->out_stride >> 31 || !takes(&c->in[0]) || !takes(&c->in[1]) || (alone && c->in[1].cpad) ||
        c->in[1].load == IC_CU_LOAD_PSI ||
        (c->pooled && k->rows / cluster < 16)) /* two rows of cells a block */
        return 0;
    const int tile = (k->rows / 8 + border) * (8 + border), items = (tile + 15) / 16 * (c->c16 / cluster);
    if (items > THREADS / 32 * (alone ? 2 : IC_CU_SPLIT_AHEAD(k->warps_m)))
        return 0; /* a warp has all of its part of the input under way at once */
    c->cluster_shift = cluster_shift;
    c->chunk16 = c->c16 / cluster;
    c->chunks = c->passes = c->tiles_per_block = 1;
    c->tile_w = k->rows / 8;
    c->tile_h = 8;
    c->tiles_x = (c->width + c->tile_w - 1) / c->tile_w;
    c->tiles_y = (c->height + c->tile_h - 1) / c->tile_h;
    c->slots = c->tiles_x * c->tiles_y * cluster;
    if (c->stats)
        c->stats_stride = c->cpad / c->stats_gran * c->slots;
    c->sums_at = SUMS_AT;
    c->scale_at = rounded(c->sums_at + THREADS / 32 * n8 * 8);
    c->area_at = rounded(c->scale_at + c->chunk16 * 16 * 12);
    c->ring_at = rounded(c->area_at + (c->tile_w + border) * (c->tile_h + border) * c->chunk16 * 32);
    const int stage16 = taps == 9 ? 1 : 4, stage = stage16 * taps * n8 * 256,
              out = k->rows * (k->columns + 16) * 4;
    int weights = c->chunk16 * taps * n8 * 256;
    if (staged[config]) { /* room for another block */
        c->stages = c->chunk16 / stage16;
        c->ring = (SMEM_OF_ONE - c->ring_at - out) / stage;
        if (c->ring < 2 || c->ring >= c->stages || c->chunk16 % stage16)
            return 0;
        weights = c->ring * stage;
    }
    c->out_at = c->ring_at + weights;
    c->smem = c->out_at + out;
    return c->smem <= smem_max;
}

cudaError_t ic_cu_split_init(enum ic_cu_type type, int smem_max)
{
    return allow_smem(2 * IC_CU_SPLIT_COUNT, smem_max,
                      [=](int i) { return kernel_of(type, i & 1 ? 9 : 1, i / 2); });
}

cudaError_t ic_cu_split_run(const struct ic_cu_conv *c, enum ic_cu_type type, int config, int taps,
                            int samples, int overlap, cudaStream_t stream)
{
    const dim3 grid((unsigned)c->slots, (unsigned)(c->columns / configs[config].columns),
                    (unsigned)samples);
    return launch_kernel(kernel_of(type, taps, config), grid, THREADS, (size_t)c->smem, c, overlap, stream,
                         1 << c->cluster_shift);
}
