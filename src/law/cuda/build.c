/* Launches of a plan: what melts into what, where statistics lie, and who reads them how. See exec_int.h. */
#include "law/cuda/exec_int.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* of a batch: fold.cuh is for so many or more, split_fold.cuh for fewer */
#define FOLD_CELLS (16 * 64 * 64)

/* ---- From ops to launches ---------------------------------------------------------------------- */

static char *tensor_at(const struct ic_law_exec *e, int t)
{
    return e->arena + e->plan->tensors[t].offset;
}

static struct launch *add(struct ic_law_exec *e, enum launch_kind kind, int tensor)
{
    struct launch *l = &e->launches[e->launch_count++];
    *l = (struct launch){.kind = kind, .label = tensor >= 0 ? e->plan->tensors[tensor].label : "psi"};
    return l;
}

/* Sums per 8 channels where groups are whole 8s, else per channel. */
static int gran_of(const struct ic_law_op *norm)
{
    return norm->kind == IC_LAW_OP_GROUPNORM && norm->cout / norm->groups % 8 == 0 ? 8 : 1;
}

/* Of tiles of 4x8 cells; or, where split.cuh and split_fold.cuh may be, of an eighth of a phase of 16x16, which is no
 * less than an eighth of 8x8. */
static int slots_max(const struct ic_law_op *op, unsigned batch)
{
    const unsigned n = batch <= SPLIT_BATCH
                           ? (op->height + 15) / 16 * ((op->width + 15) / 16) * 4 * IC_CU_CLUSTER_MAX
                           : (op->height + 3) / 4 * ((op->width + 7) / 8);
    return n < SLOTS_MAX(batch) ? (int)n : SLOTS_MAX(batch);
}

size_t ic_cu_stats_floats(const struct ic_law_op *norm, unsigned batch, enum ic_cu_type type)
{
    if (type == IC_CU_F32)
        return (size_t)batch * norm->groups * IC_CU_SUMS32 * 2 * (sizeof(double) / sizeof(float));
    return (size_t)batch * ic_cu_pad(norm->cout) / (unsigned)gran_of(norm) *
           (unsigned)slots_max(norm, batch) * 2;
}

static struct ic_cu_src source_of(const struct ic_law_exec *e, int t)
{
    const struct view *v = &e->views[t];
    const struct ic_law_tensor *tensor = &e->plan->tensors[t];
    struct ic_cu_src s = {.p = e->arena + tensor->offset,
                          .stride = tensor->stride,
                          .load = v->load,
                          .cpad = (int)ic_cu_pad(tensor->channels),
                          .channels = (int)tensor->channels};
    if (v->norm) {
        s.stats = v->stats;
        s.scale = e->packed->ops[v->norm_index].weight;
        s.shift = e->packed->ops[v->norm_index].bias;
        s.slots = v->slots;
        s.gran = v->gran;
        s.group_size = (int)(v->norm->cout / v->norm->groups);
        s.groups = (int)v->norm->groups;
        s.group_units = s.group_size / s.gran;
        s.stats_stride = s.cpad / s.gran * s.slots;
        s.rms = v->norm->kind == IC_LAW_OP_RMSNORM;
        s.eps = v->norm->eps;
        s.inv_count = (float)(1.0 / ((double)s.group_size * v->norm->height * v->norm->width));
    }
    return s;
}

/* ---- The walk ------------------------------------------------------------------------------------ */

/* Whether last.cu has a kernel for what `c`, a 1x1 convolution before UPDATE, computes. */
static bool make_last(const struct ic_law_exec *e, const struct ic_cu_conv *c, struct ic_cu_last *a)
{
    *a = (struct ic_cu_last){.in = c->in[0],
                             .io = c->io,
                             .weight = c->weight,
                             .bias = c->bias,
                             .columns = c->columns,
                             .d = c->d,
                             .product = c->product,
                             .cells = c->height * c->width,
                             .blocks = e->packed->sms};
    return c->in[0].load == IC_CU_LOAD_NORM && c->in[1].cpad == 0 && !c->nf4.codes &&
           c->act == IC_LAW_ACT_NONE && ic_cu_last_shape(a);
}

/* The norm `at` is left to those that read v, with sums that its producer makes. */
static void expect_norm(struct ic_law_exec *e, struct view *v, size_t at)
{
    const struct ic_law_op *norm = &e->plan->ops[at];
    v->load = IC_CU_LOAD_NORM;
    v->norm = norm;
    v->norm_index = at;
    v->gran = gran_of(norm);
    v->stats = e->stats + e->stats_floats;
    e->stats_floats += ic_cu_stats_floats(norm, e->plan->batch, e->packed->type);
}

/* ---- Transposed convolutions that are folded into the next one: fold.cuh, split_fold.cuh ---------- */

static bool folds_large(const struct ic_law_plan *p)
{
    const char *fold = getenv("IC_LAW_CUDA_FOLD");
    return fold ? *fold == '1' : (size_t)p->batch * p->height * p->width >= FOLD_CELLS;
}

/* Or by split_fold.cuh, where all its blocks run at once; up: the transposed convolution. */
static bool folds_split(const struct ic_law_packed *packed, const struct ic_law_plan *p,
                        const struct ic_law_op *up)
{
    const char *fold = getenv("IC_LAW_CUDA_FOLD");
    const struct ic_law_op *conv = up + 1;
    struct ic_cu_fold a = {.cpad = (int)conv->cout,
                           .height = (int)conv->height / 2,
                           .width = (int)conv->width / 2,
                           .low16 = (int)up->cin[0] / 16,
                           .skip16 = (int)conv->cin[1] / 16};
    if (p->batch > SPLIT_BATCH || (fold ? *fold != '2' : folds_large(p)))
        return false;
    for (int i = 0; i < 2; i++)
        a.in[i] = (struct ic_cu_src){.gran = 8, .group_size = 8};
    for (int i = 0; i < IC_CU_SPLIT_FOLD_COUNT; i++)
        for (int shift = 0; 1 << shift <= IC_CU_CLUSTER_MAX; shift++)
            if (ic_cu_split_fold_shape(&a, i, shift, packed->smem_max) && a.slots <= SLOTS_MAX(p->batch) &&
                (fold || ic_cu_split_fold_blocks(&a) * (long)p->batch <=
                             (long)packed->sms * ic_cu_split_fold_at_once(i)))
                return true;
    return false;
}

/* Op `at` is a transposed convolution that is made one with the next op. IC_LAW_CUDA_FOLD=0, 1, 2, for tests: never,
 * by fold.cuh in batches of any size, by split_fold.cuh in all batches up to SPLIT_BATCH. */
static bool folds(const struct ic_law_packed *packed, const struct ic_law_plan *p, size_t at)
{
    const struct ic_law_op *up = &p->ops[at], *conv = up + 1, *norm = up + 2;
    const struct ic_law_tensor *t = p->tensors;
    return packed->wide && at + 2 < p->op_count && up->kind == IC_LAW_OP_CONVT2X2 &&
           conv->kind == IC_LAW_OP_CONV3X3 && conv->in[0] == up->out && conv->in[1] >= 0 &&
           conv->bias < 0 && conv->act == IC_LAW_ACT_NONE && t[up->out].last == at + 1 &&
           !((t[up->in[0]].stride | t[conv->in[1]].stride | t[conv->out].stride) >> 31) &&
           norm->kind == IC_LAW_OP_GROUPNORM && norm->in[0] == conv->out && gran_of(norm) == 8 &&
           up->cin[0] % 16 == 0 && conv->cin[1] % 16 == 0 && conv->cout % 32 == 0 &&
           (folds_large(p) || folds_split(packed, p, up));
}

static struct ic_cu_fold_source fold_source(const struct ic_law_plan *p, const struct ic_law_op *up)
{
    return (struct ic_cu_fold_source){.split = !folds_large(p),
                                      .cout = (int)up[1].cout,
                                      .low = (int)up->cin[0],
                                      .up = (int)up[1].cin[0],
                                      .skip = (int)up[1].cin[1]};
}

/* The convolution at op `at` writes what the pool behind its norm reads: ic_cu_conv.pooled. */
static bool pools(const struct ic_law_plan *p, size_t at)
{
    const struct ic_law_op *op = &p->ops[at], *norm = op + 1, *pool = op + 2;
    return at + 2 < p->op_count && op->kind == IC_LAW_OP_CONV3X3 &&
           (norm->kind == IC_LAW_OP_GROUPNORM || norm->kind == IC_LAW_OP_RMSNORM) &&
           norm->in[0] == op->out && pool->kind == IC_LAW_OP_MAXPOOL2 && pool->in[0] == op->out &&
           op->height % 2 == 0 && op->width % 2 == 0;
}

/* What this back end runs of a plan: an up-sampled tensor that is never made has no place, a pooled one is there while
 * its convolution runs. */
void ic_cu_fold_plan(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                     struct ic_law_plan *out)
{
    *out = *plan;
    for (size_t i = 0; i < plan->op_count; i++)
        if (folds(packed, plan, i))
            ic_law_plan_bypass(out, i);
    for (size_t i = 0; i < plan->op_count && packed->type != IC_CU_F32; i++)
        if (pools(plan, i))
            ic_law_plan_hasten(out, i + 2, i);
}

/* Bytes of the folded weights; 0: op `at` is not the first of two that are one. */
size_t ic_cu_folded_bytes(const struct ic_law_plan *p, size_t at)
{
    const struct ic_law_op *op = &p->ops[at];
    if (op->kind != IC_LAW_OP_CONVT2X2 || op->out >= 0)
        return 0;
    const struct ic_cu_fold_source s = fold_source(p, op);
    return ic_cu_fold_bytes(&s);
}

/* A weight of the law in float32 on the device; the caller frees it. */
static enum ic_status send_float(const struct ic_law_weight *w, float **out, struct ic_err *err)
{
    float *host = malloc(w->count * sizeof *host);
    if (!host)
        return ic_fail(err, IC_OOM, "no memory to fold weights");
    ic_law_weight_read(w, 0, w->count, host);
    cudaError_t bad = cudaMalloc((void **)out, w->count * sizeof *host);
    if (bad == cudaSuccess)
        bad = cudaMemcpy(*out, host, w->count * sizeof *host, cudaMemcpyHostToDevice);
    free(host);
    TRY(bad, "weights to the device");
    return IC_OK;
}

static enum ic_status fold_weights(struct ic_law_exec *e, const struct ic_law_op *up, struct ic_cu_fold *a,
                                   struct ic_err *err)
{
    const int from[3] = {up[1].weight, up->weight, up->bias};
    float *sent[3] = {NULL, NULL, NULL};
    struct ic_cu_fold_source s = fold_source(e->plan, up);
    enum ic_status status = IC_OK;
    for (int i = 0; i < 3 && status == IC_OK; i++)
        if (from[i] >= 0)
            status = send_float(&e->plan->law->weights[from[i]], &sent[i], err);
    s.conv = sent[0];
    s.transposed = sent[1];
    s.bias = sent[2];
    cudaError_t bad = cudaSuccess;
    if (status == IC_OK)
        bad = ic_cu_fold_weights(&s, e->packed->type, a, e->folded + e->folded_used, e->stream);
    e->folded_used += ic_cu_fold_bytes(&s);
    if (bad == cudaSuccess)
        bad = cudaStreamSynchronize(e->stream);
    for (int i = 0; i < 3; i++)
        cudaFree(sent[i]);
    if (status == IC_OK)
        TRY(bad, "folding weights");
    return status;
}

/* Three ops: the transposed convolution, the convolution that reads it, and its norm. */
static enum ic_status add_fold(struct ic_law_exec *e, size_t at, struct ic_err *err)
{
    const struct ic_law_plan *p = e->plan;
    const struct ic_law_op *up = &p->ops[at], *conv = up + 1;
    struct launch *l = add(e, FOLD, conv->out);
    struct view *v = &e->views[conv->out];
    expect_norm(e, v, at + 2);
    l->flops = 2.0 * conv->height * conv->width * conv->cout * (up->cin[0] * 4 + conv->cin[1] * 9);
    l->a.fold = (struct ic_cu_fold){.in = {source_of(e, up->in[0]), source_of(e, conv->in[1])},
                                    .io = e->table,
                                    .out = tensor_at(e, conv->out),
                                    .out_stride = p->tensors[conv->out].stride,
                                    .stats = v->stats,
                                    .height = (int)conv->height / 2,
                                    .width = (int)conv->width / 2,
                                    .cpad = (int)conv->cout,
                                    .low16 = (int)up->cin[0] / 16,
                                    .skip16 = (int)conv->cin[1] / 16};
    for (int i = 0; i < 2; i++)
        if (l->a.fold.in[i].load != IC_CU_LOAD_NORM)
            return ic_fail(err, IC_INTERNAL, "%s reads what has no norm", l->label);
    enum ic_status s = fold_weights(e, up, &l->a.fold, err);
    if (s == IC_OK)
        s = ic_cu_choose_fold(e, l, err);
    v->slots = l->a.fold.slots;
    return s;
}

/* A convolution, what it reads on the way in, and the norm, with a pool, or UPDATE that follows. used: ops consumed. */
static enum ic_status add_conv(struct ic_law_exec *e, size_t at, size_t *used, struct ic_err *err)
{
    const struct ic_law_plan *p = e->plan;
    const struct ic_law_op *op = &p->ops[at], *next = at + 1 < p->op_count ? &p->ops[at + 1] : NULL;
    const struct ic_cu_weights *w = &e->packed->ops[at];
    const bool transposed = op->kind == IC_LAW_OP_CONVT2X2;
    struct launch *l = add(e, CONV, op->out);
    struct ic_cu_conv *c = &l->a.conv;
    l->taps = op->kind == IC_LAW_OP_CONV3X3 ? 9 : 1;
    l->flops = 2.0 * l->taps * op->cout * (op->cin[0] + op->cin[1]) * op->height * op->width;
    *used = 1;
    for (int i = 0; i < 2; i++)
        if (op->in[i] >= 0) {
            c->in[i] = source_of(e, op->in[i]);
            if (c->in[i].load == IC_CU_LOAD_NONE)
                return ic_fail(err, IC_INTERNAL, "%s is read before it is written", l->label);
        }
    c->cpad = (int)ic_cu_pad(op->cout);
    c->columns = c->cpad * (transposed ? 4 : 1);
    c->c16 = (c->in[0].cpad + c->in[1].cpad) / 16;
    c->io = e->table;
    c->weight = w->weight;
    c->nf4 = w->nf4;
    if (e->expanded && w->expanded) {
        void *to = e->expanded + e->expanded_used;
        TRY(ic_cu_expand_run(&w->nf4, to, e->packed->type, c->columns, c->c16 * l->taps, l->taps,
                             e->stream),
            "expanding weights");
        e->expanded_used += w->expanded;
        c->weight = to;
        c->nf4 = (struct ic_cu_nf4){0};
    }
    c->bias = w->bias;
    c->height = (int)op->height / (transposed ? 2 : 1);
    c->width = (int)op->width / (transposed ? 2 : 1);
    c->act = op->act;
    c->epilogue = transposed ? IC_CU_STORE4 : IC_CU_STORE;
    c->d = (int)p->law->d;
    c->product = p->law->product;
    c->out = tensor_at(e, op->out);
    c->out_stride = p->tensors[op->out].stride;
    struct view *v = &e->views[op->out];
    v->load = IC_CU_LOAD_RAW;
    if (next && (next->kind == IC_LAW_OP_GROUPNORM || next->kind == IC_LAW_OP_RMSNORM) &&
        next->in[0] == op->out) {
        *used = 2;
        expect_norm(e, v, at + 1);
        c->stats = v->stats;
        c->stats_gran = v->gran;
    }
    const int pooled = pools(p, at) ? op[2].out : -1;
    if (pooled >= 0) {
        *used = 3;
        c->pooled = tensor_at(e, pooled);
        c->pooled_stride = p->tensors[pooled].stride;
        c->flip = e->packed->ops[at + 1].flip;
    }
    struct ic_cu_conv fused = *c;
    struct ic_cu_last last;
    if (next && next->kind == IC_LAW_OP_UPDATE && next->in[0] == op->out) {
        if (op->kind == IC_LAW_OP_CONV1X1 && make_last(e, c, &last)) {
            l->kind = LAST;
            l->a.last = last;
            *used = 2;
            return IC_OK;
        }
        fused.epilogue = IC_CU_UPDATE;
        for (int config = 0; config < IC_CU_CONFIG_COUNT; config++)
            if (ic_cu_config(config)->columns >= c->columns) {
                *c = fused;
                *used = 2;
                break;
            }
    }
    enum ic_status s = ic_cu_choose(e, l, err);
    v->slots = c->slots;
    if (pooled >= 0)
        e->views[pooled] = *v; /* the norm's statistics are the larger tensor's */
    return s;
}

enum ic_status ic_cu_build(struct ic_law_exec *e, struct ic_err *err)
{
    const struct ic_law_plan *p = e->plan;
    size_t used = 1;
    for (size_t at = 0; at < p->op_count; at += used) {
        const struct ic_law_op *op = &p->ops[at];
        used = 1;
        switch (op->kind) {
        case IC_LAW_OP_INPUT: e->views[op->out].load = IC_CU_LOAD_PSI; break;
        case IC_LAW_OP_CONV3X3:
        case IC_LAW_OP_CONV1X1:
        case IC_LAW_OP_CONVT2X2: {
            const bool folded = ic_cu_folded_bytes(p, at) > 0;
            enum ic_status s = folded ? add_fold(e, at, err) : add_conv(e, at, &used, err);
            if (folded)
                used = 3;
            if (s != IC_OK)
                return s;
            break;
        }
        case IC_LAW_OP_MEM_IN:
        case IC_LAW_OP_LSTM: {
            struct ic_cu_lstm *a = &add(e, LSTM, op->out)->a.lstm;
            *a = (struct ic_cu_lstm){.io = e->table,
                                     .out = tensor_at(e, op->out),
                                     .out_stride = p->tensors[op->out].stride,
                                     .channels = (int)op->cout,
                                     .cpad = (int)ic_cu_pad(op->cout),
                                     .cells = (int)(op->height * op->width)};
            if (op->kind == IC_LAW_OP_LSTM) {
                a->gates = tensor_at(e, op->in[0]);
                a->gates_stride = p->tensors[op->in[0]].stride;
                a->gates_cpad = (int)ic_cu_pad(op->cin[0]);
            }
            e->views[op->out].load = IC_CU_LOAD_RAW;
            break;
        }
        case IC_LAW_OP_UPDATE:
            add(e, UPDATE, -1)->a.update = (struct ic_cu_update){.io = e->table,
                                                                 .y = tensor_at(e, op->in[0]),
                                                                 .y_stride = p->tensors[op->in[0]].stride,
                                                                 .d = (int)p->law->d,
                                                                 .cpad = (int)ic_cu_pad(op->cin[0]),
                                                                 .cells = (int)(op->height * op->width),
                                                                 .product = p->law->product};
            break;
        default:
            return ic_fail(err, IC_INTERNAL, "the CUDA back end cannot run %s there",
                           ic_law_op_name(op->kind));
        }
    }
    return IC_OK;
}

enum ic_status ic_cu_build32(struct ic_law_exec *e)
{
    const struct ic_law_plan *p = e->plan;
    for (size_t at = 0; at < p->op_count; at++) {
        const struct ic_law_op *op = &p->ops[at];
        struct ic_cu_op32 *a = &add(e, OP32, op->out)->a.op32;
        *a = (struct ic_cu_op32){.kind = (int)op->kind,
                                 .act = (int)op->act,
                                 .io = e->table,
                                 .weight = e->packed->ops[at].weight,
                                 .bias = e->packed->ops[at].bias,
                                 .sums = (double *)(void *)e->stats,
                                 .cout = (int)op->cout,
                                 .height = (int)op->height,
                                 .width = (int)op->width,
                                 .groups = (int)op->groups,
                                 .d = (int)p->law->d,
                                 .product = p->law->product,
                                 .split = e->packed->split,
                                 .smem_max = e->packed->smem_max,
                                 .eps = op->eps,
                                 .spike_at = op->spike_at,
                                 .spike_to = op->spike_to};
        if (a->split && e->packed->ops[at].half) {
            int exponent;
            frexp(ic_cu_input_bound(e->packed, p, at), &exponent);
            a->half = 1;
            a->scale = ldexpf(1, 15 - exponent);
            a->unscale = e->packed->ops[at].unscale / a->scale;
        } else {
            a->scale = a->unscale = 1;
        }
        for (int i = 0; i < 2; i++)
            if (op->in[i] >= 0) {
                a->in[i] = (const float *)tensor_at(e, op->in[i]);
                a->in_stride[i] = p->tensors[op->in[i]].stride / sizeof(float);
                a->cin[i] = (int)op->cin[i];
            }
        if (op->out >= 0) {
            a->out = (float *)tensor_at(e, op->out);
            a->out_stride = p->tensors[op->out].stride / sizeof(float);
        }
    }
    return IC_OK;
}
