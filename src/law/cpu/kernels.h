/* What a kernel is asked to do: the arguments of one fused operation, and the table of functions that
 * each instruction set fills. Internal to law/cpu.
 *
 * Layout of every activation: float32 [ceil(C/16)][H*W][16], "blocks" of 16 channels, one cell's 16
 * channels in one cache line; channels past C are zero (their weights are zero, and so is everything
 * computed from them). Sample i starts `stride` floats after sample i-1.
 *
 * A kernel does one *unit* of an operation: units write disjoint bytes and may run on any thread in
 * any order. No unit's arithmetic depends on how many samples or threads there are, hence neither does
 * the result. */
#ifndef IC_LAW_CPU_KERNELS_H
#define IC_LAW_CPU_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "law/plan.h"
#include "model/half.h"

#define IC_CPU_LANES 16u      /* channels in a block, on every instruction set */
#define IC_CPU_PANEL 32u      /* output channels of one weight panel; the last may be 16 */
#define IC_CPU_TILES 16u      /* Winograd tiles (4x4 cells each) of one unit, at most */
#define IC_CPU_GROUPS_MAX 16u /* groups of so many tiles that share a panel of expanded weights */
#define IC_CPU_CHUNK 32u      /* cells of one unit of a direct or pointwise convolution, at most */

static inline unsigned ic_cpu_blocks(unsigned channels)
{
    return (channels + IC_CPU_LANES - 1) / IC_CPU_LANES;
}

struct ic_cpu_act {
    enum ic_law_act kind;
    float spike_at, spike_to;
};

struct ic_cpu_expand;

/* A convolution of any kind. 3x3: u is Winograd's [panel][36][K][width] or, direct,
 * [panel][ky][kx][K][width]; 1x1: [panel][K][width]; transposed 2x2: [ky][kx][panel][K][width].
 * K = 16 * (in[0].blocks + in[1].blocks); width = 32, for the last panel 16 where blocks are odd. */
struct ic_cpu_conv {
    struct {
        const float *p;
        size_t stride;
        unsigned blocks; /* in[1]: 0 where there is no second input */
    } in[2];
    float *out;
    size_t out_stride;
    unsigned out_blocks;
    unsigned height, width; /* cells of the input (3x3, 1x1: and of the output) */
    const float *u;
    const float *bias; /* [16 * out_blocks], or NULL */
    struct ic_cpu_act act;
    /* Per sample, segment and channel: mean and sum of squared deviations of the outputs in that
     * segment, [samples][segments][2][16 * out_blocks]; NULL: not wanted. Segments are fixed by the
     * grid alone: see ic_cpu_segments. */
    float *stats;
    unsigned samples;
    unsigned splits; /* each group of tiles is cut in this many units by output panel */
    /* Weights that are kept in fewer bits are expanded and used a pass of panels at a time: u then holds
     * panels panel_from..panel_to alone. All of them otherwise. */
    unsigned panel_from, panel_to;
    /* Winograd with weights in few bits: u is not used; a unit takes `groups` groups of tiles, and expands
     * a panel in its own scratch for all of them. */
    const struct ic_cpu_expand *expand;
    unsigned groups;
    size_t tap_stride; /* transposed 2x2: floats from tap to tap of u */
};

enum ic_cpu_form { IC_CPU_F32, IC_CPU_F16, IC_CPU_BF16, IC_CPU_NF4 };

/* How the absmax blocks of an NF4 weight lie under 16 outputs: */
enum ic_cpu_scales {
    IC_CPU_SCALES_ROWS, /* an output's row is whole blocks: all 16 change scale at the same input and tap */
    IC_CPU_SCALES_ONE,  /* transposed: 16 outputs of one input are one block */
    IC_CPU_SCALES_ANY
};

#define IC_CPU_EXPAND_CHUNK 32u /* inputs of a unit; a multiple of 8 */
#define IC_CPU_EXPAND_PAD 16u   /* floats from the end of a Winograd point's rows to the next point */

/* Weights in few bits -> the float32 u of a pass. Kept as, of each block of 16 outputs and each input, all
 * taps: 16 bits: [block][K][taps][16]; NF4: [block][K/8][taps][16] words, of whose nibbles, the lowest
 * first, nibble n of word j is value 8j + n of the eight inputs' taps. Padding is 0. */
struct ic_cpu_expand {
    enum ic_cpu_form form;
    enum ic_cpu_scales scales; /* NF4 */
    bool wino, transposed;
    bool pairs;               /* transposed: u in pairs of bfloat16 along K, [tap][panel][K/2][width] */
    unsigned taps, k, blocks; /* 9, 4 or 1; padded inputs; blocks of outputs in all */
    unsigned cin, cout;       /* PyTorch's */
    const uint16_t *half;
    const uint32_t *words;
    const struct ic_nf4 *nf4;
    const int32_t *chan_in, *chan_out; /* PyTorch's channel at a place, -1: padding */
    float *u;
    size_t panel_stride, tap_stride; /* floats */
    unsigned block_from, block_to;   /* of this pass; even, or the end */
};

static inline unsigned ic_cpu_expand_units(const struct ic_cpu_expand *x)
{
    return (x->block_to - x->block_from) * ((x->k + IC_CPU_EXPAND_CHUNK - 1) / IC_CPU_EXPAND_CHUNK);
}

/* A segment is what one partial statistic covers: a run of `run` tiles (Winograd; 4 rows high) or
 * cells (direct; 1 row high) of one row. */
struct ic_cpu_segments {
    unsigned rows, per_row, run; /* rows * per_row segments of `run` (the last of a row: the rest) */
};
struct ic_cpu_segments ic_cpu_segments_wino(unsigned height, unsigned width);
struct ic_cpu_segments ic_cpu_segments_direct(unsigned height, unsigned width);
unsigned ic_cpu_wino_units(const struct ic_cpu_conv *c);
unsigned ic_cpu_direct_units(const struct ic_cpu_conv *c);
/* floats of scratch that one unit needs */
size_t ic_cpu_wino_scratch(unsigned k_blocks);
size_t ic_cpu_wino_few_scratch(unsigned k_blocks, unsigned groups);
/* Groups of tiles that share an expanded panel, at most. */
unsigned ic_cpu_wino_groups_max(unsigned k_blocks);
size_t ic_cpu_direct_scratch(unsigned k_blocks);

struct ic_cpu_norm { /* x = act((x - mean) * scale + shift), in place; optionally also max-pooled 2x2 */
    float *x;
    size_t stride;
    unsigned blocks, height, width;
    const float *mean, *scale, *shift; /* [samples][16 * blocks] */
    struct ic_cpu_act act;
    float *pool; /* [blocks][H/2 * W/2][16], or NULL */
    size_t pool_stride;
    unsigned samples, rows; /* rows of one unit: even */
};

struct ic_cpu_moments { /* partial statistics -> mean, scale, shift per channel */
    const float *stats;
    unsigned segments, height, width;
    bool wino;
    unsigned channels, groups; /* groups 0: RMSNorm */
    float eps;
    const float *weight, *bias; /* bias NULL: RMSNorm */
    float *mean, *scale, *shift;
    unsigned samples;
};

#define IC_CPU_CHAIN_MAX 4
/* Pointwise convolutions one after the other on the same cells, the last optionally followed by the
 * field's update. */
struct ic_cpu_chain {
    unsigned count;
    struct ic_cpu_conv conv[IC_CPU_CHAIN_MAX];
    bool update;
    bool product;
    unsigned d;
    const struct ic_law_io *io; /* samples of them, where update */
    unsigned samples;
    size_t cells; /* height * width */
};

struct ic_cpu_plain { /* the small ones: input, memory, lstm, resize, pool, update alone */
    const float *in;
    size_t in_stride;
    float *out;
    size_t out_stride;
    unsigned channels, blocks, height, width; /* of out; channels: logical (lstm: of h) */
    const struct ic_law_io *io;
    unsigned samples;
    unsigned d;
    bool product;
};

struct ic_cpu_kernels {
    const char *name;
    void (*expand)(const struct ic_cpu_expand *x, unsigned unit);
    void (*wino)(const struct ic_cpu_conv *c, unsigned unit, float *scratch);
    void (*wino_few)(const struct ic_cpu_conv *c, unsigned unit, float *scratch); /* weights in few bits */
    void (*direct)(const struct ic_cpu_conv *c, unsigned unit, float *scratch);
    void (*convt)(const struct ic_cpu_conv *c, unsigned unit, float *scratch); /* unit: an input row */
    /* The same with weights in few bits, in products of bfloat16; NULL: not on this instruction set. */
    void (*convt_few)(const struct ic_cpu_conv *c, unsigned unit, float *scratch);
    void (*chain)(const struct ic_cpu_chain *c, unsigned unit, float *scratch);
    void (*norm)(const struct ic_cpu_norm *n, unsigned unit);
    void (*moments)(const struct ic_cpu_moments *m, unsigned unit); /* unit: a sample */
    void (*input)(const struct ic_cpu_plain *p, unsigned unit);     /* unit: a row of a sample */
    void (*pool)(const struct ic_cpu_plain *p, unsigned unit);
    void (*mem_in)(const struct ic_cpu_plain *p, unsigned unit);
    void (*lstm)(const struct ic_cpu_plain *p, unsigned unit);
    void (*resize_half)(const struct ic_cpu_plain *p, unsigned unit);
    void (*update)(const struct ic_cpu_plain *p, unsigned unit);
    double (*peak)(double seconds);  /* FLOP/s of this thread in a loop of fused multiply-adds */
    void (*elu)(float *x, size_t n); /* for tests; n a multiple of 16 */
};

extern const struct ic_cpu_kernels ic_cpu_kernels_base;
#if defined(__x86_64__)
extern const struct ic_cpu_kernels ic_cpu_kernels_avx2;
extern const struct ic_cpu_kernels ic_cpu_kernels_avx512;
#endif

/* Units of a chain: chunks of IC_CPU_CHUNK cells of a sample. */
static inline unsigned ic_cpu_chain_units(const struct ic_cpu_chain *c)
{
    return c->samples * (unsigned)((c->cells + IC_CPU_CHUNK - 1) / IC_CPU_CHUNK);
}
size_t ic_cpu_chain_scratch(const struct ic_cpu_chain *c);
static inline unsigned ic_cpu_norm_units(const struct ic_cpu_norm *n)
{
    return n->samples * n->blocks * ((n->height + n->rows - 1) / n->rows);
}

#endif
