/* Weights in the order in which the kernels read them (shapes: kernels.h), made once per law.
 *
 * Two things happen on the way besides blocking. Input and output channels are padded to whole blocks
 * with zero weights, so that padding computes to zero everywhere. And the field's channels change from
 * PyTorch's order (all Re, then all Im) to psi's own (Re, Im interleaved): with the first layer's input
 * columns and the last layer's rows permuted here, psi needs no transposition in a step. */
#include "law/cpu/exec.h"

#include <stdlib.h>
#include <string.h>

static const struct ic_cpu_kernels *const known[] = {
#if defined(__x86_64__)
    &ic_cpu_kernels_avx512,
    &ic_cpu_kernels_avx2,
#endif
    &ic_cpu_kernels_base,
};
#define KNOWN (sizeof known / sizeof known[0])

const char *ic_law_cpu_isa_known(unsigned i)
{
    return i < KNOWN ? known[i]->name : NULL;
}

static bool runs_here(const struct ic_cpu_kernels *k)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (k == &ic_cpu_kernels_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (k == &ic_cpu_kernels_avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c");
#endif
    return k == &ic_cpu_kernels_base;
}

static const struct ic_cpu_kernels *find_isa(const char *name)
{
    for (unsigned i = 0; i < KNOWN; i++)
        if (name ? strcmp(known[i]->name, name) == 0 : runs_here(known[i]))
            return known[i];
    return NULL;
}

bool ic_law_cpu_isa_usable(const char *isa)
{
    const struct ic_cpu_kernels *k = find_isa(isa);
    return k && runs_here(k);
}

/* ---- Which PyTorch channel stands at a place of a block ---------------------------------------- */

struct side {
    unsigned channels[2], blocks[2];
    bool pairs; /* the field: interleaved */
};

/* Index in PyTorch's order, or -1 for padding. */
static int channel_at(const struct side *s, unsigned place)
{
    unsigned base = 0;
    for (int i = 0; i < 2; i++) {
        if (place < s->blocks[i] * 16) {
            if (place >= s->channels[i])
                return -1;
            return (int)(base + (s->pairs ? place % 2 * (s->channels[i] / 2) + place / 2 : place));
        }
        place -= s->blocks[i] * 16;
        base += s->channels[i];
    }
    return -1;
}

struct layer {
    struct side in, out;
    const float *w;
    unsigned cin, cout; /* PyTorch's */
    unsigned k, n;      /* padded */
    bool transposed;
};

static struct layer layer_of(const struct ic_law_plan *plan, const struct ic_law_op *op)
{
    struct layer l = {
        .w = plan->law->weights[op->weight].data, .cin = op->cin[0] + op->cin[1], .cout = op->cout};
    for (int i = 0; i < 2; i++) {
        l.in.channels[i] = op->cin[i];
        l.in.blocks[i] = ic_cpu_blocks(op->cin[i]);
    }
    l.out.channels[0] = op->cout;
    l.out.blocks[0] = ic_cpu_blocks(op->cout);
    l.transposed = op->kind == IC_LAW_OP_CONVT2X2;
    l.in.pairs = plan->ops[0].kind == IC_LAW_OP_INPUT && op->in[0] == plan->ops[0].out;
    l.out.pairs = op->out == plan->net_out;
    l.k = (l.in.blocks[0] + l.in.blocks[1]) * 16;
    l.n = l.out.blocks[0] * 16;
    return l;
}

/* ---- Packing ----------------------------------------------------------------------------------- */

static unsigned panel_width(const struct layer *l, unsigned panel)
{
    return l->n - panel * IC_CPU_PANEL >= IC_CPU_PANEL ? IC_CPU_PANEL : IC_CPU_LANES;
}

/* G g G^T for the points 0, 3/4, -3/4, 3/2, -3/2, infinity: row i of G is (1, p, p^2) / prod_j (p - q_j),
 * the last (0, 0, 1). In double: the weights' transform costs no accuracy. */
static void wino_weights(const float g[9], double out[36])
{
    static const double pt[5] = {0, 0.75, -0.75, 1.5, -1.5};
    double G[6][3] = {{0}}, t[6][3];
    for (int i = 0; i < 5; i++) {
        double n = 1;
        for (int j = 0; j < 5; j++)
            n *= j == i ? 1 : pt[i] - pt[j];
        for (int j = 0; j < 3; j++)
            G[i][j] = (j == 0 ? 1 : j == 1 ? pt[i] : pt[i] * pt[i]) / n;
    }
    G[5][2] = 1;
    for (int i = 0; i < 6; i++)
        for (int j = 0; j < 3; j++)
            t[i][j] = G[i][0] * (double)g[j] + G[i][1] * (double)g[3 + j] + G[i][2] * (double)g[6 + j];
    for (int i = 0; i < 6; i++)
        for (int j = 0; j < 6; j++)
            out[i * 6 + j] = t[i][0] * G[j][0] + t[i][1] * G[j][1] + t[i][2] * G[j][2];
}

/* [panel][taps][k][width], where taps of one (out, in) pair come from `expand`. */
static void pack_taps(const struct layer *l, unsigned kernel, unsigned taps, bool wino, float *u)
{
    for (unsigned place = 0; place < l->n; place++) {
        const int o = channel_at(&l->out, place);
        const unsigned panel = place / IC_CPU_PANEL, width = panel_width(l, panel);
        float *base = u + (size_t)panel * taps * l->k * IC_CPU_PANEL + place % IC_CPU_PANEL;
        for (unsigned k = 0; k < l->k; k++) {
            const int i = channel_at(&l->in, k);
            double t[36] = {0};
            if (o >= 0 && i >= 0) {
                const float *g = l->w + ((size_t)o * l->cin + (size_t)i) * kernel;
                if (wino)
                    wino_weights(g, t);
                else
                    for (unsigned p = 0; p < taps; p++)
                        t[p] = (double)g[p];
            }
            for (unsigned p = 0; p < taps; p++)
                base[((size_t)p * l->k + k) * width] = (float)t[p];
        }
    }
}

/* PyTorch [in][out][2][2] -> [tap][panel][k][width] */
static void pack_convt(const struct layer *l, float *u)
{
    for (unsigned place = 0; place < l->n; place++) {
        const int o = channel_at(&l->out, place);
        const unsigned panel = place / IC_CPU_PANEL, width = panel_width(l, panel);
        for (unsigned k = 0; k < l->k; k++) {
            const int i = channel_at(&l->in, k);
            for (unsigned tap = 0; tap < 4; tap++)
                u[(size_t)tap * l->k * l->n + (size_t)panel * l->k * IC_CPU_PANEL + (size_t)k * width +
                  place % IC_CPU_PANEL] =
                    o >= 0 && i >= 0 ? l->w[((size_t)i * l->cout + (size_t)o) * 4 + tap] : 0.0f;
        }
    }
}

/* ---- Weights in few bits ----------------------------------------------------------------------- */

static enum ic_cpu_form form_of(const struct ic_law_weight *w)
{
    switch (w->precision) {
    case IC_LAW_FP16: return IC_CPU_F16;
    case IC_LAW_BF16: return IC_CPU_BF16;
    case IC_LAW_NF4: return IC_CPU_NF4;
    default: return IC_CPU_F32;
    }
}

/* Index of tap 0 in PyTorch's order, or SIZE_MAX for padding. */
static size_t tap0(const struct layer *l, int o, int i, unsigned taps)
{
    if (o < 0 || i < 0)
        return SIZE_MAX;
    return (l->transposed ? (size_t)i * l->cout + (size_t)o : (size_t)o * l->cin + (size_t)i) * taps;
}

static void pack_half(const struct layer *l, const uint16_t *w, unsigned taps, uint16_t *out)
{
    for (unsigned block = 0; block < l->n / 16; block++)
        for (unsigned k = 0; k < l->k; k++)
            for (unsigned lane = 0; lane < 16; lane++) {
                const size_t from =
                    tap0(l, channel_at(&l->out, block * 16 + lane), channel_at(&l->in, k), taps);
                for (unsigned tap = 0; tap < taps; tap++)
                    out[(((size_t)block * l->k + k) * taps + tap) * 16 + lane] =
                        from == SIZE_MAX ? 0 : w[from + tap];
            }
}

static void pack_nf4(const struct layer *l, const struct ic_nf4 *q, unsigned taps, uint32_t *out)
{
    for (unsigned block = 0; block < l->n / 16; block++)
        for (unsigned k = 0; k < l->k; k++)
            for (unsigned lane = 0; lane < 16; lane++) {
                const size_t from =
                    tap0(l, channel_at(&l->out, block * 16 + lane), channel_at(&l->in, k), taps);
                for (unsigned tap = 0; tap < taps; tap++) {
                    const size_t at = from + tap;
                    const unsigned n = k % 8 * taps + tap;
                    const uint32_t code = from == SIZE_MAX
                                              ? IC_NF4_ZERO
                                              : (uint32_t)q->codes[at / 2] >> (at % 2 ? 0 : 4) & 15;
                    out[(((size_t)block * l->k + k) / 8 * taps + n / 8) * 16 + lane] |= code << 4 * (n % 8);
                }
            }
}

static enum ic_cpu_scales scales_of(const struct layer *l, unsigned taps)
{
    const bool straight = !l->in.pairs && !l->out.pairs;
    if (l->transposed)
        return straight && taps == 4 && l->cout % 16 == 0 ? IC_CPU_SCALES_ONE : IC_CPU_SCALES_ANY;
    return straight && l->in.channels[0] % 16 == 0 && l->in.channels[1] % 16 == 0 &&
                   (size_t)l->cin * taps % IC_NF4_BLOCK == 0
               ? IC_CPU_SCALES_ROWS
               : IC_CPU_SCALES_ANY;
}

/* Points or taps of one (output, input) pair in the expanded form. */
static unsigned points_of(const struct ic_law_packed *p, const struct ic_cpu_weights *w)
{
    return w->taps == 9 && !p->direct ? 36 : w->taps;
}

/* Layers this small are expanded whole before they run: both cores' L2 then hold them while many tiles
 * pass. */
#define SMALL_LAYER ((size_t)512 << 10) /* bytes expanded */

bool ic_cpu_expands_in_units(const struct ic_law_packed *p, const struct ic_cpu_weights *w)
{
    return w->form != IC_CPU_F32 && points_of(p, w) == 36 &&
           (size_t)36 * w->k * w->n * sizeof(float) > SMALL_LAYER;
}

size_t ic_cpu_expanded_floats(const struct ic_law_packed *p, const struct ic_cpu_weights *w,
                              unsigned panels)
{
    return (size_t)panels * points_of(p, w) * w->k * IC_CPU_PANEL;
}

struct ic_cpu_expand ic_cpu_expand_of(const struct ic_law_packed *p, const struct ic_law_plan *plan,
                                      size_t op)
{
    const struct ic_cpu_weights *w = &p->ops[op];
    const struct layer l = layer_of(plan, &plan->ops[op]);
    const uint8_t *small = p->small + w->small;
    const bool pairs = l.transposed && p->bf16 && w->form != IC_CPU_F16;
    return (struct ic_cpu_expand){
        .form = w->form,
        .scales = scales_of(&l, w->taps),
        .wino = points_of(p, w) == 36,
        .transposed = l.transposed,
        .taps = w->taps,
        .k = l.k,
        .blocks = l.n / 16,
        .cin = l.cin,
        .cout = l.cout,
        .half = (const uint16_t *)(const void *)small,
        .words = (const uint32_t *)(const void *)small,
        .nf4 = &plan->law->weights[plan->ops[op].weight].nf4,
        .chan_in = p->maps + w->maps,
        .chan_out = p->maps + w->maps + l.k,
        .u = p->expanded,
        .pairs = pairs,
        .panel_stride = (size_t)l.k * IC_CPU_PANEL * (l.transposed ? 1 : points_of(p, w)) / (pairs ? 2 : 1),
    };
}

/* ---- The whole --------------------------------------------------------------------------------- */

static unsigned taps_of(enum ic_law_op_kind kind)
{
    switch (kind) {
    case IC_LAW_OP_CONV3X3: return 9;
    case IC_LAW_OP_CONV1X1: return 1;
    case IC_LAW_OP_CONVT2X2: return 4;
    default: return 0;
    }
}

static size_t small_bytes(const struct layer *l, enum ic_cpu_form form, unsigned taps)
{
    const size_t values = (size_t)l->k * l->n * taps;
    return ((form == IC_CPU_NF4 ? values / 2 : values * sizeof(uint16_t)) + 63) / 64 * 64;
}

/* Room for every op's weights. */
static void lay_out(struct ic_law_packed *p, const struct ic_law_plan *plan, size_t expand_bytes)
{
    size_t at = 0;
    p->op_count = plan->op_count;
    for (size_t i = 0; i < plan->op_count; i++) {
        const struct ic_law_op *op = &plan->ops[i];
        struct ic_cpu_weights *w = &p->ops[i];
        *w = (struct ic_cpu_weights){.u = SIZE_MAX, .bias = SIZE_MAX, .taps = taps_of(op->kind)};
        if (!w->taps)
            continue;
        const struct layer l = layer_of(plan, op);
        w->form = form_of(&plan->law->weights[op->weight]);
        w->k = l.k;
        w->n = l.n;
        if (w->form == IC_CPU_F32) {
            w->u = at;
            at += (size_t)points_of(p, w) * l.k * l.n;
        } else {
            const unsigned panels = (l.n + IC_CPU_PANEL - 1) / IC_CPU_PANEL;
            const size_t fit = expand_bytes / (ic_cpu_expanded_floats(p, w, 1) * sizeof(float));
            /* a chain's links are all expanded before it runs: whole (they are 1x1) */
            w->panels_at_once = w->taps == 1 || fit >= panels ? panels : fit ? (unsigned)fit : 1;
            w->small = p->small_bytes;
            p->small_bytes += small_bytes(&l, w->form, w->taps);
            w->maps = p->maps_count;
            p->maps_count += l.k + l.n;
            const size_t bytes = ic_cpu_expands_in_units(p, w)
                                     ? 0
                                     : ic_cpu_expanded_floats(p, w, w->panels_at_once) * sizeof(float) *
                                           (w->taps == 1 ? IC_CPU_CHAIN_MAX : 1);
            p->expanded_bytes = p->expanded_bytes > bytes ? p->expanded_bytes : bytes;
        }
        if (op->bias >= 0) {
            w->bias = at;
            at += l.n;
        }
    }
    p->data_bytes = (at * sizeof(float) + 63) / 64 * 64;
}

static void fill_f32(const struct ic_law_packed *p, const struct ic_cpu_weights *w, const struct layer *l)
{
    float *u = p->data + w->u;
    if (w->taps == 4)
        pack_convt(l, u);
    else if (w->taps == 1)
        pack_taps(l, 1, 1, false, u);
    else
        pack_taps(l, 9, points_of(p, w), !p->direct, u);
}

static void fill_small(const struct ic_law_packed *p, const struct ic_cpu_weights *w, const struct layer *l,
                       const struct ic_law_weight *from)
{
    void *to = p->small + w->small;
    if (w->form == IC_CPU_NF4)
        pack_nf4(l, &from->nf4, w->taps, to);
    else
        pack_half(l, from->half, w->taps, to);
    for (unsigned k = 0; k < l->k; k++)
        p->maps[w->maps + k] = channel_at(&l->in, k);
    for (unsigned n = 0; n < l->n; n++)
        p->maps[w->maps + l->k + n] = channel_at(&l->out, n);
}

static void fill(struct ic_law_packed *p, const struct ic_law_plan *plan)
{
    for (size_t i = 0; i < plan->op_count; i++) {
        const struct ic_law_op *op = &plan->ops[i];
        const struct ic_cpu_weights *w = &p->ops[i];
        if (!w->taps)
            continue;
        const struct layer l = layer_of(plan, op);
        if (w->form == IC_CPU_F32)
            fill_f32(p, w, &l);
        else
            fill_small(p, w, &l, &plan->law->weights[op->weight]);
        for (unsigned place = 0; w->bias != SIZE_MAX && place < l.n; place++) {
            const int o = channel_at(&l.out, place);
            p->data[w->bias + place] = o >= 0 ? plan->law->weights[op->bias].data[o] : 0.0f;
        }
    }
}

static enum ic_status allocate(struct ic_law_packed *p, struct ic_err *err)
{
    /* one line more each: never zero bytes */
    p->data = aligned_alloc(64, p->data_bytes + 64);
    if (p->small_bytes) {
        p->expanded_bytes = (p->expanded_bytes + 63) / 64 * 64;
        p->small = aligned_alloc(64, p->small_bytes);
        p->maps = malloc(p->maps_count * sizeof *p->maps);
        p->expanded = aligned_alloc(64, p->expanded_bytes + 64);
    }
    if (!p->data || (p->small_bytes && (!p->small || !p->maps || !p->expanded)))
        return ic_fail(err, IC_OOM, "no memory for %zu bytes of packed weights",
                       p->data_bytes + p->small_bytes + p->expanded_bytes);
    if (p->small_bytes) {
        memset(p->small, 0, p->small_bytes);
        memset(p->expanded, 0, p->expanded_bytes + 64); /* touched now, not in the first step */
    }
    return IC_OK;
}

void ic_cpu_unpack(struct ic_law_packed **packed)
{
    if (!packed || !*packed)
        return;
    ic_cpu_pool_close(&(*packed)->pool);
    free((*packed)->data);
    free((*packed)->small);
    free((*packed)->maps);
    free((*packed)->expanded);
    free(*packed);
    *packed = NULL;
}

static enum ic_status choose(struct ic_law_packed *p, const struct ic_law_cpu_opts *opts,
                             struct ic_err *err)
{
    const char *isa = opts->isa ? opts->isa : getenv("IC_LAW_ISA");
    const char *conv = getenv("IC_LAW_CONV");
    if (isa && !*isa)
        isa = NULL;
    p->kernels = find_isa(isa);
    if (!p->kernels)
        return ic_fail(err, IC_BAD_REQUEST, "instruction set \"%s\": this build has no such one", isa);
    if (!runs_here(p->kernels))
        return ic_fail(err, IC_BAD_REQUEST, "instruction set \"%s\": this machine lacks it", isa);
    p->direct = opts->direct || p->law->arch == IC_LAW_SNN_UNET || (conv && strcmp(conv, "direct") == 0);
    p->micro_batch = opts->micro_batch;
    p->keep_out = opts->keep_out;
#if defined(__x86_64__)
    /* never for spikes: a rounding difference would flip one */
    p->bf16 = p->kernels->convt_few && __builtin_cpu_supports("avx512bf16") && !opts->wide &&
              p->law->arch != IC_LAW_SNN_UNET;
#endif
    return IC_OK;
}

enum ic_status ic_law_cpu_pack(const struct ic_law *law, const struct ic_law_cpu_opts *opts,
                               struct ic_law_packed **out, struct ic_err *err)
{
    *out = NULL;
    struct ic_law_plan *plan = NULL; /* the smallest grid: only the list of ops matters */
    struct ic_law_packed *p = calloc(1, sizeof *p);
    if (!p)
        return ic_fail(err, IC_OOM, "no memory to pack the weights");
    p->law = law;
    enum ic_status s = choose(p, opts, err);
    if (s == IC_OK)
        s = ic_law_plan_open(law, law->grid_multiple, law->grid_multiple, 1, ic_law_cpu_tensor_bytes, &plan,
                             err);
    if (s == IC_OK)
        s = ic_cpu_pool_open(opts->threads, &p->pool, err);
    if (s == IC_OK) {
        lay_out(p, plan, opts->expand_bytes ? opts->expand_bytes : IC_LAW_CPU_EXPAND_BYTES);
        s = allocate(p, err);
    }
    if (s == IC_OK)
        fill(p, plan);
    ic_law_plan_close(&plan);
    if (s != IC_OK)
        ic_cpu_unpack(&p);
    *out = p;
    return s;
}
