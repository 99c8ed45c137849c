/* Internal to law/cuda: what the host (C) tells the kernels (CUDA C++). Plain structs, passed by value
 * as kernel parameters; all pointers are device memory unless said otherwise. */
#ifndef IC_LAW_CUDA_KERNELS_H
#define IC_LAW_CUDA_KERNELS_H

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* One simulation of a step, as ic_law_io. psi == NULL: an empty place of a batch that is not full. */
struct ic_cu_io {
    float *psi, *h, *c, *delta;
    float gamma;
    int unused;
};

enum ic_cu_type { IC_CU_F32, IC_CU_F16, IC_CU_BF16 };

/* How a convolution's input comes to shared memory. */
enum ic_cu_load {
    IC_CU_LOAD_NONE,
    IC_CU_LOAD_PSI, /* the simulation's psi: float32, Re and Im of a channel side by side */
    IC_CU_LOAD_RAW, /* as stored */
    IC_CU_LOAD_NORM /* normalised with the producer's statistics, then ELU */
};

/* An input: [sample][y][x][cpad], 16-bit. Statistics: [sample][unit][slot] (sum, sum of squares) of the
 * convolution's output; a unit is `gran` channels, a slot what one thread block of the producer saw. */
struct ic_cu_src {
    const void *p;
    size_t stride; /* bytes of a sample */
    const float *stats, *scale, *shift;
    int load, cpad, channels;
    int slots, gran, group_size; /* group_size: channels that share a mean */
    int groups, group_units,
        stats_stride;     /* group_units: of a group; stats_stride: (sum, square)s of a sample */
    int lane_shift;       /* log2 of the threads that add one group up */
    int rms;              /* RMS norm: no mean is subtracted */
    float eps, inv_count; /* inv_count: 1 / (cells * group_size) */
};

enum ic_cu_epilogue {
    IC_CU_STORE,  /* out[sample][y][x][cpad] */
    IC_CU_STORE4, /* transposed convolution: column n is output channel n % cpad of phase n / cpad */
    IC_CU_UPDATE  /* columns are a_k, Re and Im side by side: psi' and delta */
};

/* NF4 weights of a convolution; element (o, i, tap) has the flat index o*so + i*si + tap*st in the
 * checkpoint's order, its scale is absmax[flat / 64]. */
struct ic_cu_nf4 {
    const uint32_t *codes; /* pack.c's order, eight codes a word; NULL: weights are 16-bit */
    const float *absmax;
    int so, si, st;
    int cin0, cpad0, cin; /* channels of the first input, padded; all channels */
    int cout, cout_pad,
        phases; /* phases 4: transposed, column n is output n % cout_pad at tap n / cout_pad */
};

struct ic_cu_conv {
    struct ic_cu_src in[2];
    const struct ic_cu_io *io;
    const void *weight; /* 16-bit, pack.c's order */
    struct ic_cu_nf4 nf4;
    const float *bias; /* per column, padded; NULL: none */
    void *out;
    size_t out_stride; /* bytes of a sample */
    /* Out, of half the height and width: of each 2x2 cells the value that the norm and ELU make the largest. NULL: nobody
     * asks. A norm's scale may be negative, and the smallest is what is wanted then: flip is the scale's sign. */
    void *pooled;
    size_t pooled_stride;
    const uint16_t *flip; /* per channel, padded */
    float *stats;         /* out; NULL: nobody asks */
    int stats_gran, stats_stride;
    int height, width; /* cells the rows of the product stand for: the output's, or STORE4: the input's */
    int columns;       /* of the product, a multiple of 16 */
    int cpad;          /* channels of out, padded */
    int chunks;
    int c16, chunk16; /* input channels / 16: all; those in shared memory at a time */
    int tile_w, tile_shift, tile_h, tiles_x, tiles_y, tiles_per_block, slots;
    uint32_t tile_divide; /* by a tile's width, border included: (n * tile_divide) >> 16 */
    int act;              /* enum ic_law_act: NONE or ELU */
    int epilogue, d, product;
    int resident; /* all weights of a block's columns fit in shared memory */
    int ring_at;  /* where weights lie, bytes after the input tile's start */
    int smem;     /* bytes */
    /* wide.cuh only */
    int buffers, buffer_bytes; /* for input tiles: 2: the next one comes while one is multiplied */
    int passes;                /* blocks of columns that a thread block takes one after another */
    int stages, ring;          /* of a pass; of weights in shared memory */
    int scale_at, sums_at, area_at, out_at; /* bytes; out_at 0: over the tile */
    int cluster_shift; /* split.cuh: log2 of the blocks that share a sum; tall.cuh: that share weights */
};

/* What a kernel is cut into. Warps along rows, columns, and the sum; 16-row and 8-column pieces a warp;
 * 16-deep slices of the sum a stage; thread blocks per multiprocessor the compiler aims at. */
#define IC_CU_CONFIGS(X)                                                                                   \
    X(0, 1, 1, 4, 2, 2, 8, 2)                                                                              \
    X(1, 1, 1, 4, 2, 4, 8, 2)                                                                              \
    X(2, 2, 1, 2, 2, 4, 4, 2)                                                                              \
    X(3, 2, 2, 1, 2, 4, 4, 3)                                                                              \
    X(4, 4, 1, 1, 2, 4, 4, 3)                                                                              \
    X(5, 4, 1, 1, 4, 4, 4, 3)                                                                              \
    X(6, 2, 2, 1, 4, 4, 4, 3)                                                                              \
    X(7, 2, 4, 1, 4, 4, 2, 2)                                                                              \
    X(8, 1, 1, 8, 2, 2, 16, 2)                                                                             \
    X(9, 4, 1, 1, 2, 2, 4, 3)                                                                              \
    X(10, 1, 1, 8, 2, 4, 16, 2)                                                                            \
    X(11, 2, 1, 8, 1, 2, 16, 1)

struct ic_cu_config {
    int rows, columns, threads, stage; /* stage: 16-deep slices */
    int warps_m, warps_k;
};

#define IC_CU_CONFIG_COUNT 12
#define IC_CU_RING 4 /* stages in flight when weights are streamed */

/* wide.cuh, Hopper and 16-bit weights only: warpgroups along rows and the sum, 64-row pieces a warpgroup,
 * columns, 16-deep slices of a 3x3 convolution's sum a stage, warpgroups that only load, thread blocks per
 * multiprocessor the compiler aims at. These count on from IC_CU_CONFIG_COUNT. */
#define IC_CU_WIDE_CONFIGS(X)                                                                              \
    X(0, 2, 1, 2, 64, 9, 0, 2)                                                                             \
    X(1, 2, 1, 2, 32, 9, 0, 3)                                                                             \
    X(2, 1, 1, 2, 64, 9, 0, 3)                                                                             \
    X(3, 2, 1, 1, 64, 9, 0, 2)                                                                             \
    X(4, 2, 1, 2, 128, 9, 0, 1)                                                                            \
    X(5, 2, 1, 2, 32, 9, 0, 2)                                                                             \
    X(6, 1, 4, 1, 32, 3, 0, 1)                                                                             \
    X(7, 1, 2, 1, 64, 3, 0, 2)                                                                             \
    X(8, 2, 1, 2, 32, 9, 1, 2)                                                                             \
    X(9, 1, 1, 2, 128, 3, 0, 2)                                                                            \
    X(10, 2, 1, 2, 128, 9, 1, 1)                                                                           \
    X(11, 1, 1, 2, 64, 9, 1, 2)                                                                            \
    X(12, 1, 1, 2, 128, 9, 3, 1)                                                                           \
    X(13, 2, 1, 1, 64, 9, 2, 1)                                                                            \
    X(14, 2, 1, 2, 64, 9, 2, 1)                                                                            \
    X(15, 2, 1, 1, 64, 9, 3, 1)                                                                            \
    X(16, 1, 1, 2, 128, 9, 2, 1)                                                                           \
    X(17, 2, 1, 1, 32, 9, 0, 4)
#define IC_CU_WIDE_COUNT 18

struct ic_cu_wide_cut {
    int chunk16, resident, tiles, passes;
    int buffers; /* 3: two, and room of its own for the epilogue; with a warpgroup that loads: three */
};

/* split.cuh, Hopper and 16-bit weights only: warpgroups along rows, columns, whether weights come in stages.
 * These count on from wide.cuh's. */
#define IC_CU_SPLIT_CONFIGS(X)                                                                             \
    X(0, 1, 32, 0)                                                                                         \
    X(1, 1, 64, 0)                                                                                         \
    X(2, 1, 128, 0)                                                                                        \
    X(3, 2, 32, 0)                                                                                         \
    X(4, 2, 64, 0)                                                                                         \
    X(5, 1, 32, 1)                                                                                         \
    X(6, 1, 64, 1)
#define IC_CU_SPLIT_COUNT 7
#define IC_CU_SPLIT_FIRST (IC_CU_CONFIG_COUNT + IC_CU_WIDE_COUNT)
#define IC_CU_CLUSTER_MAX 8              /* blocks */
#define IC_CU_SPLIT_AHEAD(wm) (7 + (wm)) /* pieces of the input that a warp asks for at once */

/* tall.cuh, Hopper and 16-bit weights only: these count on from split.cuh's. Output channels of a block. */
enum ic_cu_tall_cut {
    IC_CU_TALL_128,
    IC_CU_TALL_64,
    IC_CU_TALL_128_FEW,
    IC_CU_TALL_64_FEW,
    IC_CU_TALL_COUNT
};
#define IC_CU_TALL_FIRST (IC_CU_SPLIT_FIRST + IC_CU_SPLIT_COUNT)
#define IC_CU_TALL_COLUMNS(cut) ((cut) == IC_CU_TALL_64 || (cut) == IC_CU_TALL_64_FEW ? 64 : 128)
#define IC_CU_TALL_WG_H(cut) ((cut) >= IC_CU_TALL_128_FEW ? 16 : 32) /* rows of cells of a product, */
#define IC_CU_TALL_H(cut) ((cut) == IC_CU_TALL_64 ? 64 : IC_CU_TALL_WG_H(cut)) /* of a tile */
#define IC_CU_TALL_TEAMS(cut) ((cut) >= IC_CU_TALL_128_FEW ? 8 : 4) /* warps that load, a buffer each */
#define IC_CU_TALL_THREADS(cut) (256 + 32 * IC_CU_TALL_TEAMS(cut))
#define IC_CU_TALL_CHUNK16(cut) ((cut) == IC_CU_TALL_64 ? 1 : 2) /* 16s of channels of a buffer */
#define IC_CU_TALL_STAGE(cut) ((cut) == IC_CU_TALL_64 ? 3 * 2048 : 6 * 2048) /* bytes of weights */
#define IC_CU_TALL_RING 8   /* stages, where there is room */
#define IC_CU_TALL_SUMS 512 /* bytes of the statistics of a block's warps, */
#define IC_CU_TALL_OUT(cut)                                                                                \
    ((cut) == IC_CU_TALL_64_FEW ? 32768 : 2 * 64 * (64 * 2 + 16)) /* of what waits to be stored */
#define IC_CU_TALL_AHEAD 8 /* twice so many cells of psi are under way of a lane */

/* Of all families. */
const struct ic_cu_config *ic_cu_config(int i);
/* Fills tiles, slots and smem of `c` for a configuration. chunk16: 16-channel blocks at a time (0: all);
 * 0 when it does not fit in `smem_max` bytes, else 1. */
int ic_cu_conv_shape(struct ic_cu_conv *c, int config, int taps, int chunk16, int resident,
                     int tiles_per_block, int smem_max);
/* Raises the shared memory limits of a type's kernels, once per device. */
cudaError_t ic_cu_conv_init(enum ic_cu_type type, int smem_max);
/* The same for wide.cuh; configurations from 0 on. init fails where the device or the build has none. */
const struct ic_cu_config *ic_cu_wide_config(int i);
int ic_cu_wide_shape(struct ic_cu_conv *c, int config, int taps, const struct ic_cu_wide_cut *cut,
                     int smem_max);
cudaError_t ic_cu_wide_init(enum ic_cu_type type, int smem_max);
cudaError_t ic_cu_wide_run(const struct ic_cu_conv *c, enum ic_cu_type type, int config, int taps,
                           int samples, int overlap, cudaStream_t stream);
/* The same for split.cuh. */
const struct ic_cu_config *ic_cu_split_config(int i);
int ic_cu_split_shape(struct ic_cu_conv *c, int config, int taps, int cluster_shift, int smem_max);
cudaError_t ic_cu_split_init(enum ic_cu_type type, int smem_max);
cudaError_t ic_cu_split_run(const struct ic_cu_conv *c, enum ic_cu_type type, int config, int taps,
                            int samples, int overlap, cudaStream_t stream);
/* The same for tall.cuh: 3x3 convolutions of one input, outputs 64 or whole 128s. cluster_shift: log2 of the blocks that
 * share weights. */
const struct ic_cu_config *ic_cu_tall_config(int i);
int ic_cu_tall_shape(struct ic_cu_conv *c, int config, int taps, int tiles, int cluster_shift,
                     int smem_max);
cudaError_t ic_cu_tall_init(enum ic_cu_type type, int smem_max);
cudaError_t ic_cu_tall_run(const struct ic_cu_conv *c, enum ic_cu_type type, int config, int samples,
                           int overlap, cudaStream_t stream);
/* Of all families. */
cudaError_t ic_cu_conv_run(const struct ic_cu_conv *c, enum ic_cu_type type, int config, int taps,
                           int samples, int overlap, cudaStream_t stream);

/* A transposed convolution and the 3x3 convolution that reads it before another input, made one: fold.cuh,
 * Hopper and 16 bit only. Inputs are LOAD_NORM, channels whole 16s, outputs whole 32s, sums of 8 each. */
struct ic_cu_fold {
    struct ic_cu_src in[2]; /* what the transposed one reads, of half the height and width; the skip */
    const struct ic_cu_io *io;
    const void *weight; /* 16-bit, fold.cuh's order */
    const float *bias;  /* [top, middle, bottom row][left, middle, right column][cpad] */
    void *out;
    size_t out_stride; /* bytes of a sample */
    float *stats;      /* out */
    int stats_stride;
    int height, width; /* of in[0] */
    int cpad;          /* output channels */
    int low16, skip16; /* channels / 16 of in[0], in[1] */
    int low_chunk;     /* 16s of in[0] in shared memory at a time; of in[1] it is one */
    int tiles_x, tiles_y, tiles_per_block, slots;
    int buffer_bytes, ring; /* of an input chunk; stages of weights */
    int scale_at, sums_at, table_at, area_at, ring_at, out_at, smem; /* bytes */
    int split,
        cluster_shift; /* split: weights lie for split_fold.cuh; log2 of the blocks that share a sum, or else weights */
};

/* Cells of a tile, whether 32 output channels of two phases are a product, warpgroups that load, thread
 * blocks per multiprocessor. */
#define IC_CU_FOLD_CONFIGS(X)                                                                              \
    X(0, 256, 1, 2, 1)                                                                                     \
    X(1, 128, 1, 2, 1)                                                                                     \
    X(2, 64, 1, 1, 2)                                                                                      \
    X(3, 128, 0, 2, 1)                                                                                     \
    X(4, 64, 0, 2, 1)                                                                                      \
    X(5, 64, 0, 3, 1)
#define IC_CU_FOLD_COUNT 6
#define IC_CU_FOLD_BUFFERS 3 /* for chunks of inputs, */
#define IC_CU_FOLD_CHUNK 4   /* of so many 16s of in[0], or of one of in[1], which takes about as much */
#define IC_CU_FOLD_RING 4    /* stages of weights in flight, where there is room */
#define IC_CU_FOLD_OUT_H 8   /* rows of cells of a warpgroup that wait to be stored */

/* Where the weights come from: float32 in the checkpoint's order, on the device. */
struct ic_cu_fold_source {
    const float *conv;       /* [cout][up + skip][3][3] */
    const float *transposed; /* [low][up][2][2] */
    const float *bias;       /* [up]; NULL: none */
    int cout, low, up, skip; /* channels */
    int split;               /* in the order of split_fold.cuh, not of fold.cuh */
};
size_t ic_cu_fold_bytes(const struct ic_cu_fold_source *s);
/* Writes ic_cu_fold_bytes of weights and biases to `to`, each sum rounded once, and has `a` use them. */
cudaError_t ic_cu_fold_weights(const struct ic_cu_fold_source *s, enum ic_cu_type type,
                               struct ic_cu_fold *a, void *to, cudaStream_t stream);
/* As those of wide.cuh. */
int ic_cu_fold_shape(struct ic_cu_fold *a, int config, int tiles_per_block, int cluster_shift,
                     int smem_max);
long ic_cu_fold_blocks(const struct ic_cu_fold *a); /* thread blocks of a sample, once it has a shape */
cudaError_t ic_cu_fold_init(enum ic_cu_type type, int smem_max);
cudaError_t ic_cu_fold_run(const struct ic_cu_fold *a, enum ic_cu_type type, int config, int samples,
                           int overlap, cudaStream_t stream);

/* The same for few cells: split_fold.cuh. Pieces of the inputs that a warp asks for at once, and how often; thread
 * blocks per multiprocessor. */
#define IC_CU_SPLIT_FOLD_CONFIGS(X) X(0, 13, 1, 1) X(1, 7, 1, 2) X(2, 7, 2, 2)
#define IC_CU_SPLIT_FOLD_COUNT 3
long ic_cu_split_fold_blocks(const struct ic_cu_fold *a); /* of a sample, once it has a shape */
int ic_cu_split_fold_at_once(int config);                 /* of a multiprocessor */
int ic_cu_split_fold_shape(struct ic_cu_fold *a, int config, int cluster_shift, int smem_max);
cudaError_t ic_cu_split_fold_init(enum ic_cu_type type, int smem_max);
cudaError_t ic_cu_split_fold_run(const struct ic_cu_fold *a, enum ic_cu_type type, int config, int samples,
                                 int overlap, cudaStream_t stream);

/* The last 1x1 convolution, of a LOAD_NORM input and with 16-bit weights, and UPDATE: last.cu. */
struct ic_cu_last {
    struct ic_cu_src in;
    const struct ic_cu_io *io;
    const void *weight; /* pack.c's order */
    const float *bias;  /* per column, padded; NULL: none */
    int columns, d, product, cells;
    int blocks; /* of all samples, about; before ic_cu_last_shape multiprocessors */
    int groups; /* of 32 input channels */
};
/* Fills in.lane_shift, blocks and groups; 0: there is no kernel for so many channels. */
int ic_cu_last_shape(struct ic_cu_last *a);
cudaError_t ic_cu_last_run(const struct ic_cu_last *a, enum ic_cu_type type, int samples, int overlap,
                           cudaStream_t stream);

/* NF4 weights as 16-bit ones to `out`. units: 16-deep slices of the whole sum. */
cudaError_t ic_cu_expand_run(const struct ic_cu_nf4 *q, void *out, enum ic_cu_type type, int columns,
                             int units, int taps, cudaStream_t stream);

/* h of each simulation, [c][h][w] float32 -> [y][x][cpad]; and the LSTM's arithmetic (law/plan.h). */
struct ic_cu_lstm {
    const struct ic_cu_io *io;
    const void *gates; /* NULL: MEM_IN */
    size_t gates_stride;
    void *out;
    size_t out_stride;
    int channels, cpad, gates_cpad, cells;
};
cudaError_t ic_cu_lstm_run(const struct ic_cu_lstm *a, enum ic_cu_type type, int samples,
                           cudaStream_t stream);

/* UPDATE on its own: y is [cell][cpad] 16-bit, Re and Im side by side; or float32 planes [2d][cells]. */
struct ic_cu_update {
    const struct ic_cu_io *io;
    const void *y;
    size_t y_stride;
    int d, cpad, cells, product;
};
cudaError_t ic_cu_update_run(const struct ic_cu_update *a, enum ic_cu_type type, int samples,
                             cudaStream_t stream);

/* ---- float32, NCHW: exact.cu, exact_mma.cu ---------------------------------------------------------- */

struct ic_cu_op32 {
    int kind; /* enum ic_law_op_kind */
    int act;
    const struct ic_cu_io *io;
    const float *in[2], *weight, *bias;
    float *out;
    double *sums; /* of norms: [sample][group][IC_CU_SUMS32 at most](sum, sum of squares) */
    size_t in_stride[2], out_stride; /* floats of a sample */
    int cin[2], cout, height, width; /* of the output */
    int groups, d, product;
    /* A convolution of exact_mma.cu; half: of its fp16. Its inputs are multiplied by scale, what comes out by unscale. */
    int split, half, smem_max;
    float scale, unscale;
    float eps, spike_at, spike_to;
};
cudaError_t ic_cu_op32_run(const struct ic_cu_op32 *a, int samples, cudaStream_t stream);
#define IC_CU_SUMS32 64 /* parts of a group that are summed by themselves, at most */

/* The convolutions by tensor cores, from 8.0 on: exact_mma.cu. Weights are words of 4 bytes, one tf32 or the fp16 of two
 * channels, [outputs / 16][words / 8][tap][high, low][lane][4], where a lane's four are (row, word) = (lane / 4, lane % 4),
 * (+ 8, + 0), (+ 0, + 4), (+ 8, + 4) of 16 and 8; channels of both inputs in a row, padded with zeros to a whole number of
 * chunks. A row is an output; of transposed ones [output][y] of four and two, and x = 1 is row + 8. */
#define IC_CU_MMA32_UNIT 256                           /* words of 16 outputs, 8 words of channels, a tap */
#define IC_CU_MMA32_WORDS(taps) ((taps) == 9 ? 8 : 16) /* of a chunk */
cudaError_t ic_cu_mma32_init(int smem_max);
cudaError_t ic_cu_mma32_run(const struct ic_cu_op32 *a, int samples, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
