/* A plan made into phases, and a step.
 *
 * A phase is one pass of the pool over independent units. Consecutive operations melt into one:
 *   conv 3x3 + group/RMS norm   the conv's epilogue leaves partial statistics; `moments` adds them up in
 *                               double; `norm` scales, shifts, takes ELU, in place
 *   norm + max pool             the pooled copy is written from the rows just normalised
 *   conv 1x1 (+ conv 1x1 …)     per chunk of 32 cells, intermediate layers never leave L1
 *   last conv 1x1 + update      psi' of the same chunk
 * Concatenations are two input pointers.
 *
 * Norm and ELU are one pass over memory of their own instead of being redone by the next conv's
 * loads: a Winograd tile reads 36 cells for 16 outputs, and ELU costs more than the tile's transform.
 *
 * Samples of a batch run in micro-batches whose activations share one small arena: at grid 64 and b 32 a
 * sample's is 1.8 MB, so several stay in L3 while a layer's weights are used for all of them.
 *
 * Measured on two Zen 4 cores (FMA peak 233 GFLOP/s), UNET_UNITARY d 8 b 32, counted as direct
 * convolution: 570 GFLOP/s at grid 64 batch 1, 560 at batch 16, 575 at grid 128; direct 3x3 in the same
 * frame 202 to 209; AVX2 480 to 498. All 3x3
 * convolutions of a step: ours, statistics included, 2.7 ms at batch 1 and 45 ms at 16; oneDNN 2.6.3's,
 * each alone, hot and in its own layout: direct 7.6 and 128 ms, the better of its Winograds 3.3 and 54.
 * PyTorch eager: 39, 56, 57 GFLOP/s. Huge pages for the weights: 1%, not worth their rounding up of memory.
 *
 * Weights in 4 or 16 bits are expanded to float32 on the way (expand.inc.h): in the scratch of each
 * Winograd unit, or, of small and of other layers, a pass of panels at a time into a scratch that all plans
 * of the law share. What that costs is won back by smaller weights and, with AVX512-BF16, by transposed
 * convolutions in bfloat16 products, which took 17 % of a step: NF4 is as fast as float32
 * (docs/benchmarks-law.md). Activations stay float32:
 * a 16-bit one would be converted at each of the 36 loads of a tile's 16 outputs (not tried).
 */
#include "law/cpu/exec.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

enum phase_kind { WINO, WINO_FEW, DIRECT, CONVT, CONVT_FEW, CHAIN, NORM, MOMENTS, PLAIN };

struct phase {
    enum phase_kind kind;
    const char *name, *label;
    double flops; /* one sample */
    uint64_t ns;
    void (*plain)(const struct ic_cpu_plain *, unsigned);
    bool by_block;    /* plain: a unit is a block of a sample, else a row */
    bool to_y;        /* its last output is the network's: written to the sample's place in `y` */
    unsigned expands; /* weights kept in few bits: expanded before each pass; a chain's all at once */
    unsigned panels_at_once;
    struct ic_cpu_expand expand[IC_CPU_CHAIN_MAX];
    union {
        struct ic_cpu_conv conv;
        struct ic_cpu_chain chain;
        struct ic_cpu_norm norm;
        struct ic_cpu_moments moments;
        struct ic_cpu_plain p;
    } a;
};

struct ic_law_exec {
    const struct ic_law_packed *packed;
    const struct ic_law_plan *plan; /* the caller's: batch */
    struct ic_law_plan *micro;      /* ours: the same with the micro-batch */
    size_t phase_count;
    struct phase phases[IC_LAW_PLAN_OPS_MAX + 16];
    float *block; /* all of the following, one allocation */
    size_t block_bytes;
    float *arena, *y, *stats, *mean, *scale, *shift, *scratch;
    unsigned y_first;                /* sample whose network output y begins with */
    size_t y_stride, scratch_floats; /* floats: per sample; per thread */
    bool profile;
};

size_t ic_law_cpu_tensor_bytes(const struct ic_law *law, unsigned channels, unsigned height, unsigned width)
{
    (void)law;
    return (size_t)ic_cpu_blocks(channels) * 16 * height * width * sizeof(float);
}

/* ---- How work is cut -------------------------------------------------------------------------- */

static struct ic_cpu_segments segments(unsigned rows, unsigned across, unsigned most)
{
    const unsigned per_row = (across + most - 1) / most;
    const unsigned run = (across + per_row - 1) / per_row;
    return (struct ic_cpu_segments){rows, (across + run - 1) / run, run};
}

struct ic_cpu_segments ic_cpu_segments_wino(unsigned height, unsigned width)
{
    return segments((height + 3) / 4, (width + 3) / 4, IC_CPU_TILES);
}

struct ic_cpu_segments ic_cpu_segments_direct(unsigned height, unsigned width)
{
    return segments(height, width, IC_CPU_CHUNK);
}

/* Groups of up to IC_CPU_TILES tiles, whole segments each. */
static unsigned groups_of(const struct ic_cpu_segments *s, unsigned samples)
{
    const unsigned per_group = IC_CPU_TILES / s->run;
    return (s->rows * s->per_row * samples + per_group - 1) / per_group;
}

unsigned ic_cpu_wino_units(const struct ic_cpu_conv *c)
{
    const struct ic_cpu_segments s = ic_cpu_segments_wino(c->height, c->width);
    return groups_of(&s, c->samples) * c->splits;
}

unsigned ic_cpu_direct_units(const struct ic_cpu_conv *c)
{
    const struct ic_cpu_segments s = ic_cpu_segments_direct(c->height, c->width);
    return s.rows * s.per_row * c->samples * c->splits;
}

#define V_BYTES ((size_t)2400 << 10) /* of transformed inputs that share expanded weights, per thread */

/* floats of one entry of a kernel's table of block offsets */
#define OFFSET (sizeof(size_t) / sizeof(float))

size_t ic_cpu_wino_scratch(unsigned k_blocks)
{
    const size_t lane = IC_CPU_TILES * 16, v = 36 * (k_blocks * lane + 16), m = 2 * 36 * (lane + 16);
    return v + m + k_blocks * OFFSET;
}

/* More groups amortise the expansion (about 117 vector operations for 16 weights' 36 points, beside 36 FMAs
 * a tile) and fall out of L2; a group's transformed inputs take K * 2304 bytes. */
unsigned ic_cpu_wino_groups_max(unsigned k_blocks)
{
    const size_t fit = V_BYTES / ((size_t)k_blocks * 16 * 36 * IC_CPU_TILES * sizeof(float));
    return fit < 1 ? 1 : fit > IC_CPU_GROUPS_MAX ? IC_CPU_GROUPS_MAX : (unsigned)fit;
}

size_t ic_cpu_wino_few_scratch(unsigned k_blocks, unsigned groups)
{
    const size_t lane = IC_CPU_TILES * 16, v = 36 * (k_blocks * lane + 16), m = 2 * 36 * (lane + 16);
    return groups * (v + m) + 36 * ((size_t)k_blocks * 16 * IC_CPU_PANEL + IC_CPU_EXPAND_PAD) +
           k_blocks * OFFSET;
}

size_t ic_cpu_direct_scratch(unsigned k_blocks)
{
    return (size_t)k_blocks * (3 * (IC_CPU_CHUNK + 2) * 16 + 9 * OFFSET);
}

size_t ic_cpu_chain_scratch(const struct ic_cpu_chain *c)
{
    size_t out = 0, in = 0;
    for (unsigned i = 0; i < c->count; i++) {
        out = out > c->conv[i].out_blocks ? out : c->conv[i].out_blocks;
        in = in > c->conv[i].in[0].blocks ? in : c->conv[i].in[0].blocks;
    }
    return 2 * out * IC_CPU_CHUNK * 16 + in * OFFSET;
}

/* Few groups of tiles: cut them by output panel too, so that every thread has its share. */
static unsigned splits_for(unsigned units, unsigned panels, unsigned threads)
{
    unsigned n = units < threads                          ? (threads + units - 1) / units
                 : units < 4 * threads && units % threads ? threads
                                                          : 1;
    return n < panels ? n : panels;
}

/* ---- From ops to phases ------------------------------------------------------------------------ */

struct builder {
    struct ic_law_exec *e;
    const struct ic_law_plan *plan; /* the micro-batch's */
    size_t at;                      /* op */
};

static float *tensor_at(const struct builder *b, int t, size_t *stride)
{
    *stride = b->plan->tensors[t].stride / sizeof(float);
    return b->e->arena ? b->e->arena + b->plan->tensors[t].offset / sizeof(float) : NULL;
}

static const struct ic_law_op *op_at(const struct builder *b, size_t i)
{
    return i < b->plan->op_count ? &b->plan->ops[i] : NULL;
}

static struct phase *add(struct builder *b, enum phase_kind kind, const char *name, int tensor)
{
    IC_ASSERT(b->e->phase_count < sizeof b->e->phases / sizeof b->e->phases[0]);
    struct phase *p = &b->e->phases[b->e->phase_count++];
    *p = (struct phase){
        .kind = kind, .name = name, .label = tensor >= 0 ? b->plan->tensors[tensor].label : "psi"};
    return p;
}

static struct ic_cpu_act act_of(const struct ic_law_op *op)
{
    return (struct ic_cpu_act){op->act, op->spike_at, op->spike_to};
}

static struct ic_cpu_conv conv_of(const struct builder *b, size_t index)
{
    const struct ic_law_op *op = &b->plan->ops[index];
    const struct ic_law_packed *pk = b->e->packed;
    struct ic_cpu_conv c = {.out_blocks = ic_cpu_blocks(op->cout),
                            .act = act_of(op),
                            .splits = 1,
                            .panel_to = (ic_cpu_blocks(op->cout) + 1) / 2,
                            .tap_stride = (size_t)pk->ops[index].k * pk->ops[index].n,
                            .u = pk->ops[index].form == IC_CPU_F32 ? pk->data + pk->ops[index].u : NULL,
                            .bias =
                                pk->ops[index].bias != SIZE_MAX ? pk->data + pk->ops[index].bias : NULL};
    for (int i = 0; i < 2; i++)
        if (op->in[i] >= 0) {
            c.in[i].p = tensor_at(b, op->in[i], &c.in[i].stride);
            c.in[i].blocks = ic_cpu_blocks(op->cin[i]);
        }
    c.out = tensor_at(b, op->out, &c.out_stride);
    c.height = b->plan->tensors[op->in[0]].height;
    c.width = b->plan->tensors[op->in[0]].width;
    return c;
}

/* Where the conv of op `index`, just added to phase p, reads weights that must be expanded first. */
static void add_expand(const struct builder *b, struct phase *p, struct ic_cpu_conv *c, size_t index)
{
    const struct ic_law_packed *pk = b->e->packed;
    if (pk->ops[index].form == IC_CPU_F32)
        return;
    struct ic_cpu_expand *x = &p->expand[p->expands];
    *x = ic_cpu_expand_of(pk, b->plan, index);
    if (ic_cpu_expands_in_units(pk, &pk->ops[index])) {
        p->kind = WINO_FEW;
        c->expand = x;
        return;
    }
    if (x->pairs)
        p->kind = CONVT_FEW;
    /* the links of a chain lie one after the other */
    if (p->expands)
        x->u = p->expand[p->expands - 1].u +
               (size_t)(p->expand[p->expands - 1].blocks + 1) / 2 * p->expand[p->expands - 1].panel_stride;
    x->block_to = x->blocks;
    c->u = x->u;
    p->panels_at_once = pk->ops[index].panels_at_once;
    p->expands++;
}

static double conv_flops(const struct ic_law_op *op, unsigned taps)
{
    return 2.0 * taps * op->cout * (op->cin[0] + op->cin[1]) * op->height * op->width;
}

/* The norm after conv `op` (already added as the last phase), and the pool after that. */
static void add_norm(struct builder *b, struct ic_cpu_conv *conv, const struct ic_law_op *op, bool wino)
{
    struct ic_law_exec *e = b->e;
    const struct ic_law *law = b->plan->law;
    const struct ic_cpu_segments s = wino ? ic_cpu_segments_wino(conv->height, conv->width)
                                          : ic_cpu_segments_direct(conv->height, conv->width);
    conv->stats = e->stats;
    struct phase *m = add(b, MOMENTS, "moments", op->out);
    m->a.moments = (struct ic_cpu_moments){.stats = e->stats,
                                           .segments = s.rows * s.per_row,
                                           .height = op->height,
                                           .width = op->width,
                                           .wino = wino,
                                           .channels = op->cout,
                                           .groups = op->kind == IC_LAW_OP_GROUPNORM ? op->groups : 0,
                                           .eps = op->eps,
                                           .weight = law->weights[op->weight].data,
                                           .bias = op->bias >= 0 ? law->weights[op->bias].data : NULL,
                                           .mean = e->mean,
                                           .scale = e->scale,
                                           .shift = e->shift};
    struct phase *n = add(b, NORM, "norm", op->out);
    n->a.norm = (struct ic_cpu_norm){.blocks = ic_cpu_blocks(op->cout),
                                     .height = op->height,
                                     .width = op->width,
                                     .mean = e->mean,
                                     .scale = e->scale,
                                     .shift = e->shift,
                                     .act = act_of(op)};
    n->a.norm.x = tensor_at(b, op->out, &n->a.norm.stride);
    const unsigned rows = 1024 / op->width; /* 64 KB a unit */
    n->a.norm.rows = rows < 2 ? 2 : rows / 2 * 2;
    const struct ic_law_op *pool = op_at(b, b->at);
    if (pool && pool->kind == IC_LAW_OP_MAXPOOL2 && pool->in[0] == op->out) {
        n->name = "norm+pool";
        n->a.norm.pool = tensor_at(b, pool->out, &n->a.norm.pool_stride);
        b->at++;
    }
}

static void add_conv3(struct builder *b)
{
    const struct ic_law_op *op = op_at(b, b->at), *norm = op_at(b, b->at + 1);
    const bool wino = !b->e->packed->direct;
    struct phase *p = add(b, wino ? WINO : DIRECT, wino ? "wino" : "direct", op->out);
    p->a.conv = conv_of(b, b->at);
    add_expand(b, p, &p->a.conv, b->at++);
    p->flops = conv_flops(op, 9);
    if (norm && (norm->kind == IC_LAW_OP_GROUPNORM || norm->kind == IC_LAW_OP_RMSNORM) &&
        norm->in[0] == op->out) {
        b->at++;
        add_norm(b, &p->a.conv, norm, wino);
    }
}

static void add_chain(struct builder *b)
{
    const struct ic_law_op *op = op_at(b, b->at);
    struct phase *p = add(b, CHAIN, "chain", op->out);
    struct ic_cpu_chain *c = &p->a.chain;
    *c = (struct ic_cpu_chain){
        .cells = (size_t)op->height * op->width, .d = b->plan->law->d, .product = b->plan->law->product};
    for (;;) {
        op = op_at(b, b->at);
        c->conv[c->count] = conv_of(b, b->at);
        add_expand(b, p, &c->conv[c->count++], b->at++);
        p->flops += conv_flops(op, 1);
        const struct ic_law_op *next = op_at(b, b->at);
        if (!next || next->in[0] != op->out)
            break;
        if (next->kind == IC_LAW_OP_UPDATE) {
            c->update = p->to_y = true;
            b->at++;
            break;
        }
        if (next->kind != IC_LAW_OP_CONV1X1 || c->count == IC_CPU_CHAIN_MAX ||
            b->plan->tensors[op->out].last != b->at)
            break;
        c->conv[c->count - 1].out = NULL; /* read by the next link alone: stays in scratch */
    }
    p->label = b->plan->tensors[op->out].label;
}

static void add_plain(struct builder *b, const char *name,
                      void (*fn)(const struct ic_cpu_plain *, unsigned), bool by_block)
{
    const struct ic_law_op *op = op_at(b, b->at++);
    struct phase *p = add(b, PLAIN, name, op->out);
    p->plain = fn;
    p->by_block = by_block;
    p->a.p = (struct ic_cpu_plain){.channels = op->cout,
                                   .blocks = ic_cpu_blocks(op->cout),
                                   .height = op->height,
                                   .width = op->width,
                                   .d = b->plan->law->d,
                                   .product = b->plan->law->product};
    if (op->in[0] >= 0)
        p->a.p.in = tensor_at(b, op->in[0], &p->a.p.in_stride);
    if (op->out >= 0)
        p->a.p.out = tensor_at(b, op->out, &p->a.p.out_stride);
}

/* A first walk (arena NULL) only counts; the second writes real pointers. */
static enum ic_status build(struct ic_law_exec *e, struct ic_err *err)
{
    struct builder b = {.e = e, .plan = e->micro};
    const struct ic_cpu_kernels *k = e->packed->kernels;
    e->phase_count = 0;
    while (b.at < b.plan->op_count) {
        const struct ic_law_op *op = op_at(&b, b.at);
        switch (op->kind) {
        case IC_LAW_OP_INPUT: add_plain(&b, "input", k->input, false); break;
        case IC_LAW_OP_CONV3X3: add_conv3(&b); break;
        case IC_LAW_OP_CONV1X1: add_chain(&b); break;
        case IC_LAW_OP_MAXPOOL2: add_plain(&b, "pool", k->pool, false); break;
        case IC_LAW_OP_MEM_IN: add_plain(&b, "mem_in", k->mem_in, true); break;
        case IC_LAW_OP_LSTM: add_plain(&b, "lstm", k->lstm, true); break;
        case IC_LAW_OP_RESIZE_HALF: add_plain(&b, "resize", k->resize_half, false); break;
        case IC_LAW_OP_UPDATE: add_plain(&b, "update", k->update, false); break;
        case IC_LAW_OP_CONVT2X2: {
            struct phase *p = add(&b, CONVT, "convt", op->out);
            p->a.conv = conv_of(&b, b.at);
            add_expand(&b, p, &p->a.conv, b.at++);
            p->flops = 2.0 * op->cin[0] * op->cout * op->height * op->width;
            break;
        }
        default:
            return ic_fail(err, IC_INTERNAL, "the CPU back end cannot run %s there",
                           ic_law_op_name(op->kind));
        }
    }
    return IC_OK;
}

/* ---- Memory ------------------------------------------------------------------------------------ */

struct needs {
    size_t stats, channels, scratch; /* floats */
};

static void at_least(size_t *v, size_t n)
{
    *v = *v > n ? *v : n;
}

static struct needs needs_of(const struct ic_law_exec *e)
{
    struct needs n = {0};
    const size_t samples = e->micro->batch;
    for (size_t i = 0; i < e->phase_count; i++) {
        const struct phase *p = &e->phases[i];
        const unsigned k = p->kind <= CONVT_FEW ? p->a.conv.in[0].blocks + p->a.conv.in[1].blocks : 0;
        switch (p->kind) {
        case WINO: at_least(&n.scratch, ic_cpu_wino_scratch(k)); break;
        case WINO_FEW: {
            const struct ic_cpu_segments seg = ic_cpu_segments_wino(p->a.conv.height, p->a.conv.width);
            const unsigned all = groups_of(&seg, (unsigned)samples), most = ic_cpu_wino_groups_max(k);
            at_least(&n.scratch, ic_cpu_wino_few_scratch(k, all < most ? all : most));
            break;
        }
        case DIRECT: at_least(&n.scratch, ic_cpu_direct_scratch(k)); break;
        case CONVT: at_least(&n.scratch, k * OFFSET); break;
        case CONVT_FEW: at_least(&n.scratch, (size_t)k * 8 * p->a.conv.width); break;
        case CHAIN: at_least(&n.scratch, ic_cpu_chain_scratch(&p->a.chain)); break;
        case MOMENTS: {
            const size_t wide = (size_t)ic_cpu_blocks(p->a.moments.channels) * 16;
            at_least(&n.stats, samples * p->a.moments.segments * 2 * wide);
            at_least(&n.channels, samples * wide);
            break;
        }
        default: break;
        }
    }
    return n;
}

static size_t take(size_t *at, size_t floats)
{
    const size_t here = *at;
    *at += (floats + 15) / 16 * 16;
    return here;
}

/* Where each part of the block lies, in floats. */
struct parts {
    size_t arena, y, stats, mean, scale, shift, scratch, end;
};

static struct parts parts_of(struct ic_law_exec *e)
{
    const struct needs n = needs_of(e);
    const struct ic_law_tensor *y = &e->micro->tensors[e->micro->net_out];
    size_t at = 0;
    struct parts p;
    e->y_stride = y->stride / sizeof(float);
    e->scratch_floats = (n.scratch + 31) / 16 * 16;
    p.arena = take(&at, e->micro->arena_bytes / sizeof(float));
    p.y = take(&at, e->y_stride * (e->packed->keep_out ? e->plan->batch : e->micro->batch));
    p.stats = take(&at, n.stats);
    p.mean = take(&at, n.channels);
    p.scale = take(&at, n.channels);
    p.shift = take(&at, n.channels);
    p.scratch = take(&at, e->scratch_floats * ic_cpu_pool_threads(e->packed->pool));
    p.end = at;
    return p;
}

static enum ic_status allocate(struct ic_law_exec *e, struct ic_err *err)
{
    const struct parts p = parts_of(e);
    e->block_bytes = p.end * sizeof(float);
    e->block = aligned_alloc(IC_LAW_ALIGN, e->block_bytes);
    if (!e->block)
        return ic_fail(err, IC_OOM, "no memory for an arena of %zu bytes", e->block_bytes);
    memset(e->block, 0,
           e->block_bytes); /* touched now, not in the first step; and never a NaN in padding */
    e->arena = e->block + p.arena;
    e->y = e->block + p.y;
    e->stats = e->block + p.stats;
    e->mean = e->block + p.mean;
    e->scale = e->block + p.scale;
    e->shift = e->block + p.shift;
    e->scratch = e->block + p.scratch;
    return IC_OK;
}

/* ---- A step ------------------------------------------------------------------------------------ */

struct job {
    const struct ic_law_exec *e;
    const struct phase *p;
};

static void do_expand(void *ctx, unsigned unit, unsigned worker)
{
    const struct job *j = ctx;
    (void)worker;
    for (unsigned i = 0; i < j->p->expands; i++) { /* the links of a chain, counted through */
        const unsigned n = ic_cpu_expand_units(&j->p->expand[i]);
        if (unit < n) {
            j->e->packed->kernels->expand(&j->p->expand[i], unit);
            return;
        }
        unit -= n;
    }
}

static void do_unit(void *ctx, unsigned unit, unsigned worker)
{
    const struct job *j = ctx;
    const struct ic_cpu_kernels *k = j->e->packed->kernels;
    float *scratch = j->e->scratch + worker * j->e->scratch_floats;
    switch (j->p->kind) {
    case WINO: k->wino(&j->p->a.conv, unit, scratch); break;
    case WINO_FEW: k->wino_few(&j->p->a.conv, unit, scratch); break;
    case DIRECT: k->direct(&j->p->a.conv, unit, scratch); break;
    case CONVT: k->convt(&j->p->a.conv, unit, scratch); break;
    case CONVT_FEW: k->convt_few(&j->p->a.conv, unit, scratch); break;
    case CHAIN: k->chain(&j->p->a.chain, unit, scratch); break;
    case NORM: k->norm(&j->p->a.norm, unit); break;
    case MOMENTS: k->moments(&j->p->a.moments, unit); break;
    case PLAIN: j->p->plain(&j->p->a.p, unit); break;
    }
}

/* How the groups of tiles are shared out where each unit expands its own weights: as many groups to a unit
 * as may be, but a unit for every thread, and units evenly; where there are fewer groups than threads, by
 * panels too. */
static unsigned share_groups(struct ic_cpu_conv *c, unsigned threads)
{
    const struct ic_cpu_segments s = ic_cpu_segments_wino(c->height, c->width);
    const unsigned groups = groups_of(&s, c->samples), panels = (c->out_blocks + 1) / 2;
    const unsigned most = ic_cpu_wino_groups_max(c->in[0].blocks + c->in[1].blocks);
    unsigned units = (groups + most - 1) / most;
    /* with few tiles, transforming them twice costs less than expanding the weights twice */
    const bool by_panel =
        units < threads && panels >= threads && c->out_blocks * 16 >= groups * IC_CPU_TILES;
    if (!by_panel) {
        units = (units + threads - 1) / threads * threads;
        units = units < groups ? units : groups;
    }
    c->groups = (groups + units - 1) / units;
    units = (groups + c->groups - 1) / c->groups;
    c->splits = splits_for(units, panels, threads);
    return units * c->splits;
}

/* Sets what depends on this micro-batch; returns the number of units. */
static unsigned prepare(struct ic_law_exec *e, struct phase *p, const struct ic_law_io *io, float *y,
                        unsigned n, unsigned threads)
{
    struct ic_cpu_conv *c = &p->a.conv;
    switch (p->kind) {
    case WINO:
    case DIRECT:
        c->samples = n;
        c->splits = 1;
        c->splits = splits_for(p->kind == WINO ? ic_cpu_wino_units(c) : ic_cpu_direct_units(c),
                               c->panel_to - c->panel_from, threads);
        return p->kind == WINO ? ic_cpu_wino_units(c) : ic_cpu_direct_units(c);
    case WINO_FEW: c->samples = n; return share_groups(c, threads);
    case CONVT:
    case CONVT_FEW: c->samples = n; return n * c->height;
    case CHAIN:
        p->a.chain.samples = n;
        p->a.chain.io = io;
        if (p->to_y) {
            p->a.chain.conv[p->a.chain.count - 1].out = y;
            p->a.chain.conv[p->a.chain.count - 1].out_stride = e->y_stride;
        }
        return ic_cpu_chain_units(&p->a.chain);
    case NORM: p->a.norm.samples = n; return ic_cpu_norm_units(&p->a.norm);
    case MOMENTS: p->a.moments.samples = n; return n;
    case PLAIN:
        p->a.p.samples = n;
        p->a.p.io = io;
        return n * (p->by_block ? p->a.p.blocks : p->a.p.height);
    }
    return 0;
}

/* Expands the weights of the pass that begins at `panel`, if the phase has any that need it; returns where
 * the next pass begins, 0: nowhere. */
static unsigned next_pass(struct ic_law_exec *e, struct phase *p, unsigned panel)
{
    if (!p->expands)
        return 0;
    unsigned units = 0, next = 0;
    if (p->kind != CHAIN) {
        struct ic_cpu_expand *x = &p->expand[0];
        struct ic_cpu_conv *c = &p->a.conv;
        const unsigned panels = (x->blocks + 1) / 2;
        next = panel + p->panels_at_once < panels ? panel + p->panels_at_once : panels;
        c->panel_from = panel;
        c->panel_to = next;
        x->block_from = 2 * panel;
        x->block_to = 2 * next < x->blocks ? 2 * next : x->blocks;
        c->tap_stride = x->tap_stride =
            (size_t)x->k * 16 * (x->block_to - x->block_from) / (x->pairs ? 2 : 1);
        next = next < panels ? next : 0;
    }
    for (unsigned i = 0; i < p->expands; i++)
        units += ic_cpu_expand_units(&p->expand[i]);
    ic_cpu_pool_run(e->packed->pool, do_expand, &(struct job){e, p}, units);
    return next;
}

static void cpu_step(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n)
{
    struct ic_cpu_pool *pool = e->packed->pool;
    IC_ASSERT(n >= 1 && n <= e->plan->batch);
    ic_cpu_pool_take(pool);
    const unsigned threads = ic_cpu_pool_limit_now(pool);
    for (unsigned at = 0; at < n; at += e->micro->batch) {
        const unsigned m = n - at < e->micro->batch ? n - at : e->micro->batch;
        e->y_first = e->packed->keep_out ? 0 : at;
        for (size_t i = 0; i < e->phase_count; i++) {
            struct phase *p = &e->phases[i];
            const int64_t start = e->profile ? ic_now_ns() : 0;
            unsigned panel = 0;
            do {
                panel = next_pass(e, p, panel);
                const unsigned units =
                    prepare(e, p, io + at, e->y + (at - e->y_first) * e->y_stride, m, threads);
                ic_cpu_pool_run(pool, do_unit, &(struct job){e, p}, units);
            } while (panel);
            if (e->profile)
                p->ns += (uint64_t)(ic_now_ns() - start);
        }
    }
    ic_cpu_pool_release(pool);
}

static void cpu_net_out(const struct ic_law_exec *e, unsigned sample, float *out)
{
    const unsigned d = e->plan->law->d;
    const size_t cells = (size_t)e->plan->height * e->plan->width;
    IC_ASSERT(sample >= e->y_first); /* else it has been overwritten */
    const float *y = e->y + (sample - e->y_first) * e->y_stride;
    for (unsigned c = 0; c < 2 * d; c++) {
        const unsigned place = c < d ? 2 * c : 2 * (c - d) + 1;
        for (size_t i = 0; i < cells; i++)
            out[c * cells + i] = y[(place / 16 * cells + i) * 16 + place % 16];
    }
}

/* ---- Open and close ---------------------------------------------------------------------------- */

/* Enough samples that the coarsest level (a quarter of the grid) has 64 tiles, so that its weights serve
 * four groups of tiles, and no more activations than 16 MB. Measured, 16 samples of d 8 b 32 at grid 64:
 * micro-batches of 1, 2, 4, 8, 16 run at 548, 563, 572, 565, 546 GFLOP/s and take 7.3, 9.3, 13.3, 21.4,
 * 37.5 MiB; 4 it is. At grid 128, 1 (563) beats 2 (551). */
static unsigned micro_batch(const struct ic_law_packed *packed, const struct ic_law_plan *plan)
{
    if (packed->micro_batch)
        return packed->micro_batch < plan->batch ? packed->micro_batch : plan->batch;
    const uint64_t tiles = ((uint64_t)plan->height / 4 + 3) / 4 * (((uint64_t)plan->width / 4 + 3) / 4);
    uint64_t m = (64 + tiles - 1) / (tiles ? tiles : 1);
    const uint64_t sample = plan->arena_bytes / plan->batch,
                   most = ((uint64_t)16 << 20) / (sample ? sample : 1);
    m = m < most ? m : most;
    m = m < plan->batch ? m : plan->batch;
    return m ? (unsigned)m : 1;
}

static void cpu_close(struct ic_law_exec **exec)
{
    if (!exec || !*exec)
        return;
    free((*exec)->block);
    ic_law_plan_close(&(*exec)->micro);
    free(*exec);
    *exec = NULL;
}

/* A plan's state without its memory: *out on success. */
static enum ic_status prepare_exec(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                                   struct ic_law_exec **out, struct ic_err *err)
{
    *out = NULL;
    IC_ASSERT(plan->law == packed->law && plan->op_count == packed->op_count);
    struct ic_law_exec *e = calloc(1, sizeof *e);
    if (!e)
        return ic_fail(err, IC_OOM, "no memory for a plan's state");
    e->packed = packed;
    e->plan = plan;
    enum ic_status s = ic_law_plan_open(plan->law, plan->height, plan->width, micro_batch(packed, plan),
                                        ic_law_cpu_tensor_bytes, &e->micro, err);
    if (s == IC_OK)
        s = build(e, err);
    if (s != IC_OK)
        cpu_close(&e);
    *out = e;
    return s;
}

static enum ic_status cpu_open(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                               struct ic_law_exec **out, struct ic_err *err)
{
    struct ic_law_exec *e;
    enum ic_status s = prepare_exec(packed, plan, &e, err);
    if (s == IC_OK)
        s = allocate(e, err);
    if (s == IC_OK)
        s = build(e, err);
    if (s != IC_OK)
        cpu_close(&e);
    *out = e;
    return s;
}

static size_t cpu_exec_bytes(const struct ic_law_exec *e)
{
    return e->block_bytes + sizeof *e + sizeof *e->micro;
}

static size_t cpu_exec_size(const struct ic_law_packed *packed, const struct ic_law_plan *plan)
{
    struct ic_law_exec *e;
    if (prepare_exec(packed, plan, &e, NULL) != IC_OK)
        return 0;
    e->block_bytes = parts_of(e).end * sizeof(float);
    const size_t size = cpu_exec_bytes(e);
    cpu_close(&e);
    return size;
}

static enum ic_status cpu_pack(const struct ic_law *law, unsigned threads, struct ic_law_packed **out,
                               struct ic_err *err)
{
    return ic_law_cpu_pack(law, &(struct ic_law_cpu_opts){.threads = threads}, out, err);
}

static size_t cpu_packed_bytes(const struct ic_law_packed *p)
{
    return p->data_bytes + p->small_bytes + p->expanded_bytes + p->maps_count * sizeof *p->maps + sizeof *p;
}

const struct ic_law_backend ic_law_backend_cpu = {
    .name = "cpu",
    .tensor_bytes = ic_law_cpu_tensor_bytes,
    .pack = cpu_pack,
    .unpack = ic_cpu_unpack,
    .packed_bytes = cpu_packed_bytes,
    .open = cpu_open,
    .close = cpu_close,
    .exec_bytes = cpu_exec_bytes,
    .step = cpu_step,
    .net_out = cpu_net_out,
    .exec_size = cpu_exec_size,
};

size_t ic_law_cpu_expand_bytes(const struct ic_law_packed *packed)
{
    return packed->expanded_bytes;
}

const char *ic_law_cpu_isa(const struct ic_law_packed *packed)
{
    return packed->kernels->name;
}

void ic_law_cpu_set_threads(struct ic_law_packed *packed, unsigned threads)
{
    ic_cpu_pool_limit(packed->pool, threads);
}

size_t ic_law_cpu_phases(const struct ic_law_exec *e, struct ic_law_cpu_phase *out, size_t max)
{
    for (size_t i = 0; i < e->phase_count && i < max; i++) {
        const struct phase *p = &e->phases[i];
        out[i] = (struct ic_law_cpu_phase){p->name, p->label, p->flops, p->ns};
    }
    return e->phase_count;
}

void ic_law_cpu_profile(struct ic_law_exec *e, bool on)
{
    e->profile = on;
    for (size_t i = 0; i < e->phase_count; i++)
        e->phases[i].ns = 0;
}

struct peak {
    double (*fn)(double);
    double flops[IC_CPU_THREADS_MAX];
};

static void peak_unit(void *ctx, unsigned unit, unsigned worker)
{
    struct peak *p = ctx;
    (void)worker;
    p->flops[unit] = p->fn(0.25);
}

double ic_law_cpu_peak(struct ic_law_packed *packed)
{
    struct peak p = {.fn = packed->kernels->peak};
    const unsigned n = ic_cpu_pool_limit_now(packed->pool);
    ic_cpu_pool_take(packed->pool);
    ic_cpu_pool_run(packed->pool, peak_unit, &p, n);
    ic_cpu_pool_release(packed->pool);
    double sum = 0;
    for (unsigned i = 0; i < n; i++)
        sum += p.flops[i];
    return sum;
}
