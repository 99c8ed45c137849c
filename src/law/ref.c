/* The reference: executes a plan in plain C, float32, NCHW. It exists to be read and to be right; the
 * fast back ends are held to it. Products of nine taps are summed in float32, channels in float64, so its
 * own rounding stays below PyTorch's. Compiled with -O3 (the row loops vectorise), never fast-math. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "law/plan.h"

struct ic_law_packed {
    const struct ic_law *law; /* the reference reads the law's own weights where they are float32 */
    float *wide;              /* the others in float32, one after the other; owned */
    size_t wide_count;
    const float **weights; /* per weight of the law; owned */
};

struct ic_law_exec {
    const struct ic_law_plan *plan;
    const struct ic_law *law;
    const float *const *weights;
    char *arena;
    double *sums; /* one row: `width` float64 */
    float *part;  /* one row: `width` float32 */
    size_t width; /* of the widest tensor */
    size_t bytes;
};

static float *sample(const struct ic_law_exec *e, int tensor, unsigned i)
{
    const struct ic_law_tensor *t = &e->plan->tensors[tensor];
    return (float *)(void *)(e->arena + t->offset + i * t->stride);
}

static const float *weights(const struct ic_law_exec *e, int index)
{
    return index < 0 ? NULL : e->weights[index];
}

static float activate(float x, const struct ic_law_op *op)
{
    switch (op->act) {
    case IC_LAW_ACT_NONE: return x;
    case IC_LAW_ACT_ELU: return x > 0 ? x : expm1f(x);
    case IC_LAW_ACT_SPIKE: return x > op->spike_at ? op->spike_to : 0;
    }
    return x;
}

/* psi [H,W,d,2] -> [2d,H,W] */
static void run_input(const struct ic_law_exec *e, const struct ic_law_op *op, const struct ic_law_io *io,
                      float *out)
{
    size_t cells = (size_t)op->height * op->width, d = e->law->d;
    for (size_t k = 0; k < d; k++)
        for (size_t i = 0; i < cells; i++) {
            out[k * cells + i] = io->psi[(i * d + k) * 2];
            out[(d + k) * cells + i] = io->psi[(i * d + k) * 2 + 1];
        }
}

/* part[x] += sum_k taps[k] * row[x + k - 1], zero outside */
static void add_row3(float *restrict part, const float *restrict row, const float *taps, size_t w)
{
    float a = taps[0], b = taps[1], c = taps[2];
    for (size_t x = 1; x + 1 < w; x++)
        part[x] += a * row[x - 1] + b * row[x] + c * row[x + 1];
    part[0] += b * row[0] + (w > 1 ? c * row[1] : 0);
    if (w > 1)
        part[w - 1] += a * row[w - 2] + b * row[w - 1];
}

/* sums[x] += the 3x3 taps over one input channel's rows y-1, y, y+1 */
static void add_channel3(struct ic_law_exec *e, const float *in, const float *taps, size_t y, size_t h,
                         size_t w)
{
    float *restrict part = e->part;
    double *restrict sums = e->sums;
    memset(part, 0, w * sizeof *part);
    for (size_t ky = y ? 0 : 1; ky < 3 && y + ky < h + 1; ky++)
        add_row3(part, in + (y + ky - 1) * w, taps + 3 * ky, w);
    for (size_t x = 0; x < w; x++)
        sums[x] += (double)part[x];
}

static void run_conv(struct ic_law_exec *e, const struct ic_law_op *op, unsigned i)
{
    size_t h = op->height, w = op->width, cells = h * w, k2 = op->kind == IC_LAW_OP_CONV3X3 ? 9 : 1;
    const float *in[2] = {sample(e, op->in[0], i), op->in[1] >= 0 ? sample(e, op->in[1], i) : NULL};
    const float *bias = weights(e, op->bias);
    float *out = sample(e, op->out, i);
    double *restrict sums = e->sums;
    for (size_t o = 0; o < op->cout; o++)
        for (size_t y = 0; y < h; y++) {
            const float *taps = weights(e, op->weight) + o * (op->cin[0] + op->cin[1]) * k2;
            for (size_t x = 0; x < w; x++)
                sums[x] = bias ? (double)bias[o] : 0;
            for (int side = 0; side < 2; side++)
                for (size_t c = 0; c < op->cin[side]; c++, taps += k2) {
                    const float *plane = in[side] + c * cells;
                    if (k2 == 9)
                        add_channel3(e, plane, taps, y, h, w);
                    else
                        for (size_t x = 0; x < w; x++)
                            sums[x] += (double)*taps * (double)plane[y * w + x];
                }
            for (size_t x = 0; x < w; x++)
                out[o * cells + y * w + x] = activate((float)sums[x], op);
        }
}

/* Groups of consecutive channels are consecutive in memory. Two passes: mean, then variance. */
static void run_groupnorm(const struct ic_law_exec *e, const struct ic_law_op *op, unsigned i)
{
    size_t cells = (size_t)op->height * op->width, per = op->cout / op->groups;
    const float *scale = weights(e, op->weight), *shift = weights(e, op->bias);
    for (size_t g = 0; g < op->groups; g++) {
        float *x = sample(e, op->out, i) + g * per * cells;
        double mean = 0, var = 0;
        for (size_t j = 0; j < per * cells; j++)
            mean += (double)x[j];
        mean /= (double)(per * cells);
        for (size_t j = 0; j < per * cells; j++)
            var += ((double)x[j] - mean) * ((double)x[j] - mean);
        double r = 1 / sqrt(var / (double)(per * cells) + (double)op->eps);
        for (size_t c = 0; c < per; c++) {
            double a = r * (double)scale[g * per + c], b = (double)shift[g * per + c];
            for (size_t j = c * cells; j < (c + 1) * cells; j++)
                x[j] = activate((float)(((double)x[j] - mean) * a + b), op);
        }
    }
}

static void run_rmsnorm(const struct ic_law_exec *e, const struct ic_law_op *op, unsigned i)
{
    size_t cells = (size_t)op->height * op->width;
    const float *scale = weights(e, op->weight);
    for (size_t c = 0; c < op->cout; c++) {
        float *x = sample(e, op->out, i) + c * cells;
        double sq = 0;
        for (size_t j = 0; j < cells; j++)
            sq += (double)x[j] * (double)x[j];
        double a = (double)scale[c] / sqrt(sq / (double)cells + (double)op->eps);
        for (size_t j = 0; j < cells; j++)
            x[j] = activate((float)((double)x[j] * a), op);
    }
}

static void run_maxpool(const struct ic_law_exec *e, const struct ic_law_op *op, unsigned i)
{
    const float *in = sample(e, op->in[0], i);
    float *out = sample(e, op->out, i);
    size_t h = op->height, w = op->width;
    for (size_t r = 0; r < op->cout * h; r++) /* row r of all channels: input rows 2r, 2r+1 */
        for (size_t x = 0; x < w; x++) {
            const float *a = in + (2 * r) * (2 * w) + 2 * x, *b = a + 2 * w;
            out[r * w + x] = fmaxf(fmaxf(a[0], a[1]), fmaxf(b[0], b[1]));
        }
}

static void run_convt(struct ic_law_exec *e, const struct ic_law_op *op, unsigned i)
{
    size_t h = op->height / 2, w = op->width / 2, cin = op->cin[0], cout = op->cout;
    const float *in = sample(e, op->in[0], i), *bias = weights(e, op->bias), *k = weights(e, op->weight);
    float *out = sample(e, op->out, i);
    double *restrict sums = e->sums;
    for (size_t o = 0; o < cout; o++)
        for (size_t y = 0; y < 2 * h; y++)
            for (size_t kx = 0; kx < 2; kx++) {
                for (size_t x = 0; x < w; x++)
                    sums[x] = bias ? (double)bias[o] : 0;
                for (size_t c = 0; c < cin; c++) {
                    double tap = (double)k[(c * cout + o) * 4 + (y % 2) * 2 + kx];
                    const float *row = in + (c * h + y / 2) * w;
                    for (size_t x = 0; x < w; x++)
                        sums[x] += tap * (double)row[x];
                }
                for (size_t x = 0; x < w; x++)
                    out[(o * 2 * h + y) * 2 * w + 2 * x + kx] = (float)sums[x];
            }
}

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

static void run_lstm(const struct ic_law_exec *e, const struct ic_law_op *op, const struct ic_law_io *io,
                     unsigned i)
{
    size_t n = (size_t)op->cout * op->height * op->width; /* 4b * h * w: one chunk */
    const float *gates = sample(e, op->in[0], i);
    float *out = sample(e, op->out, i);
    for (size_t j = 0; j < n; j++) {
        double f = sigmoid((double)gates[j]), in = sigmoid((double)gates[n + j]);
        double o = sigmoid((double)gates[2 * n + j]), cand = tanh((double)gates[3 * n + j]);
        io->c[j] = (float)(f * (double)io->c[j] + in * cand);
        io->h[j] = out[j] = (float)(o * tanh((double)io->c[j]));
    }
}

/* Taps of one output sample along an axis of `n` input samples: weights t[0..3] for inputs first-1 … */
static void half_taps(size_t y, size_t n, double t[4])
{
    static const double taps[4] = {0.125, 0.375, 0.375, 0.125};
    double sum = 0;
    for (size_t k = 0; k < 4; k++) {
        bool inside = 2 * y + k >= 1 && 2 * y + k - 1 < n;
        t[k] = inside ? taps[k] : 0;
        sum += t[k];
    }
    for (size_t k = 0; k < 4; k++)
        t[k] /= sum;
}

static void run_resize(const struct ic_law_exec *e, const struct ic_law_op *op, unsigned i)
{
    size_t h = op->height, w = op->width;
    for (size_t c = 0; c < op->cout; c++) {
        const float *in = sample(e, op->in[0], i) + c * 4 * h * w;
        float *out = sample(e, op->out, i) + c * h * w;
        for (size_t y = 0; y < h; y++)
            for (size_t x = 0; x < w; x++) {
                double ty[4], tx[4], sum = 0;
                half_taps(y, 2 * h, ty);
                half_taps(x, 2 * w, tx);
                for (size_t a = 0; a < 4; a++)
                    for (size_t b = 0; b < 4; b++)
                        if (ty[a] != 0 && tx[b] != 0)
                            sum += ty[a] * tx[b] * (double)in[(2 * y + a - 1) * 2 * w + 2 * x + b - 1];
                out[y * w + x] = (float)sum;
            }
    }
}

/* One cell of the update: y points at Y[0] of the cell, channels `cells` apart. */
static void update_cell(const struct ic_law *law, const float *y, size_t cells, float *psi, float *delta,
                        float gamma)
{
    double n2 = 0;
    for (size_t k = 0; k < law->d; k++) {
        float ar = y[k * cells], ai = y[(law->d + k) * cells], pr = psi[2 * k], pi = psi[2 * k + 1];
        float dr = law->product ? ar * pr - ai * pi : ar, di = law->product ? ar * pi + ai * pr : ai;
        if (delta) {
            delta[2 * k] = dr;
            delta[2 * k + 1] = di;
        }
        pr += dr - gamma * pr;
        pi += di - gamma * pi;
        psi[2 * k] = pr;
        psi[2 * k + 1] = pi;
        n2 += (double)pr * (double)pr + (double)pi * (double)pi;
    }
    double norm = sqrt(n2) + 1e-9;
    for (size_t k = 0; k < 2 * law->d; k++)
        psi[k] = (float)((double)psi[k] / norm);
}

static void run_update(const struct ic_law_exec *e, const struct ic_law_op *op, const struct ic_law_io *io,
                       unsigned i)
{
    size_t cells = (size_t)op->height * op->width, d = e->law->d;
    const float *y = sample(e, op->in[0], i);
    float gamma = io->gamma > 0 ? io->gamma : 0;
    for (size_t p = 0; p < cells; p++)
        update_cell(e->law, y + p, cells, io->psi + p * d * 2, io->delta ? io->delta + p * d * 2 : NULL,
                    gamma);
}

static void run_op(struct ic_law_exec *e, const struct ic_law_op *op, const struct ic_law_io *io,
                   unsigned i)
{
    switch (op->kind) {
    case IC_LAW_OP_INPUT: run_input(e, op, io, sample(e, op->out, i)); break;
    case IC_LAW_OP_CONV3X3:
    case IC_LAW_OP_CONV1X1: run_conv(e, op, i); break;
    case IC_LAW_OP_GROUPNORM: run_groupnorm(e, op, i); break;
    case IC_LAW_OP_RMSNORM: run_rmsnorm(e, op, i); break;
    case IC_LAW_OP_MAXPOOL2: run_maxpool(e, op, i); break;
    case IC_LAW_OP_CONVT2X2: run_convt(e, op, i); break;
    case IC_LAW_OP_MEM_IN:
        memcpy(sample(e, op->out, i), io->h, (size_t)op->cout * op->height * op->width * sizeof(float));
        break;
    case IC_LAW_OP_LSTM: run_lstm(e, op, io, i); break;
    case IC_LAW_OP_RESIZE_HALF: run_resize(e, op, i); break;
    case IC_LAW_OP_UPDATE: run_update(e, op, io, i); break;
    case IC_LAW_OP_COUNT: IC_ASSERT(!"an operation");
    }
}

static void ref_step(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n)
{
    IC_ASSERT(n >= 1 && n <= e->plan->batch);
    for (size_t k = 0; k < e->plan->op_count; k++)
        for (unsigned i = 0; i < n; i++)
            run_op(e, &e->plan->ops[k], &io[i], i);
}

static void ref_unpack(struct ic_law_packed **packed)
{
    if (!packed || !*packed)
        return;
    free((*packed)->wide);
    free((void *)(uintptr_t)(*packed)->weights);
    free(*packed);
    *packed = NULL;
}

static enum ic_status ref_pack(const struct ic_law *law, unsigned threads, struct ic_law_packed **out,
                               struct ic_err *err)
{
    (void)threads;
    *out = NULL;
    struct ic_law_packed *p = calloc(1, sizeof *p);
    if (!p)
        return ic_fail(err, IC_OOM, "no memory for weights");
    p->law = law;
    for (size_t i = 0; i < law->weight_count; i++)
        p->wide_count += law->weights[i].precision == IC_LAW_FP32 ? 0 : law->weights[i].count;
    p->wide = malloc((p->wide_count + 1) * sizeof *p->wide);
    p->weights = calloc(law->weight_count, sizeof *p->weights);
    if (!p->wide || !p->weights) {
        ref_unpack(&p);
        return ic_fail(err, IC_OOM, "no memory for weights");
    }
    float *at = p->wide;
    for (size_t i = 0; i < law->weight_count; i++) {
        const struct ic_law_weight *w = &law->weights[i];
        const bool plain = w->precision == IC_LAW_FP32;
        p->weights[i] = plain ? w->data : at;
        if (plain)
            continue;
        ic_law_weight_read(w, 0, w->count, at);
        at += w->count;
    }
    *out = p;
    return IC_OK;
}

static size_t ref_packed_bytes(const struct ic_law_packed *packed)
{
    return sizeof *packed + packed->wide_count * sizeof(float) +
           packed->law->weight_count * sizeof *packed->weights;
}

static void ref_close(struct ic_law_exec **e)
{
    if (!e || !*e)
        return;
    free((*e)->arena);
    free((*e)->sums);
    free((*e)->part);
    free(*e);
    *e = NULL;
}

static size_t widest(const struct ic_law_plan *plan)
{
    size_t width = 0;
    for (size_t i = 0; i < plan->tensor_count; i++)
        width = width > plan->tensors[i].width ? width : plan->tensors[i].width;
    return width;
}

static size_t ref_exec_size(const struct ic_law_packed *packed, const struct ic_law_plan *plan)
{
    (void)packed;
    return sizeof(struct ic_law_exec) + plan->arena_bytes + widest(plan) * (sizeof(double) + sizeof(float));
}

static enum ic_status ref_open(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                               struct ic_law_exec **out, struct ic_err *err)
{
    *out = NULL;
    IC_ASSERT(packed->law == plan->law);
    struct ic_law_exec *e = calloc(1, sizeof *e);
    if (!e)
        return ic_fail(err, IC_OOM, "no memory for a plan");
    e->plan = plan;
    e->law = packed->law;
    e->weights = packed->weights;
    e->width = widest(plan);
    e->arena = aligned_alloc(IC_LAW_ALIGN, plan->arena_bytes);
    e->sums = malloc(e->width * sizeof *e->sums);
    e->part = malloc(e->width * sizeof *e->part);
    e->bytes = ref_exec_size(packed, plan);
    if (!e->arena || !e->sums || !e->part) {
        ref_close(&e);
        return ic_fail(err, IC_OOM, "no memory for an arena of %zu bytes", plan->arena_bytes);
    }
    *out = e;
    return IC_OK;
}

static size_t ref_exec_bytes(const struct ic_law_exec *e)
{
    return e->bytes;
}

static void ref_net_out(const struct ic_law_exec *e, unsigned i, float *out)
{
    const struct ic_law_tensor *t = &e->plan->tensors[e->plan->net_out];
    memcpy(out, sample(e, e->plan->net_out, i),
           ic_law_tensor_bytes_nchw(e->plan->law, t->channels, t->height, t->width));
}

const struct ic_law_backend ic_law_backend_ref = {
    .name = "ref",
    .tensor_bytes = ic_law_tensor_bytes_nchw,
    .pack = ref_pack,
    .unpack = ref_unpack,
    .packed_bytes = ref_packed_bytes,
    .open = ref_open,
    .close = ref_close,
    .exec_bytes = ref_exec_bytes,
    .step = ref_step,
    .net_out = ref_net_out,
    .exec_size = ref_exec_size,
};
