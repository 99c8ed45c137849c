/* Weights in the order in which the tensor cores want them, sent to the device once per law.
 *
 * A unit is 8 columns (output channels) of 16 input channels at one tap: [2][8 columns][8 inputs], two of
 * the 8x8 matrices that ldmatrix and wgmma read. Units lie [columns/128][inputs/16][tap][16 (the last
 * block: what is left)], so that what a block of columns takes of any range of inputs is in one piece.
 * Channels are padded to whole 16s with zeros. The field's channels change from PyTorch's order (all Re,
 * then all Im) to psi's own, side by side, by permuting the first layer's inputs and the last layer's
 * columns.
 *
 * NF4 weights keep their codes, in the same order, and their scales in the checkpoint's order (a plan may
 * have them in 16 bits besides: exec.c); those of the two layers that touch the field, and blocks of
 * another size than 64, become 16-bit here. */
#include "law/cuda/exec.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/half.h"

#define UNIT 128  /* values of a unit */
#define BLOCK 128 /* columns that lie together */
#define SMALLEST_GRID 16
#define HALF_MAJOR 8 /* compute capability from which conv.cuh and exact_mma.cu run */
#define F16_MAX 65504.0f
#define SCALE_MOST 48 /* exponents of what exact_mma.cu scales: products stay float32's */

/* Which of PyTorch's channels stands at a padded place; -1: none. */
struct side {
    unsigned channels[2], padded[2];
    bool pairs; /* the field */
};

static long channel_at(const struct side *s, unsigned place)
{
    const unsigned second = place >= s->padded[0], local = second ? place - s->padded[0] : place;
    if (local >= s->channels[second])
        return -1;
    if (s->pairs)
        return local % 2 ? s->channels[0] / 2 + local / 2 : local / 2;
    return (long)(second ? s->channels[0] + local : local);
}

/* A convolution as a matrix: value (column, input, tap) of the checkpoint's tensor. */
struct matrix {
    struct side in, out;
    unsigned phases; /* 4: transposed; columns are phases x padded outputs */
    unsigned taps, columns, inputs;
    size_t so, si, st; /* strides of output, input, tap (or phase) in the checkpoint */
};

static struct matrix matrix_of(const struct ic_law_plan *p, const struct ic_law_op *op)
{
    struct matrix m = {.phases = op->kind == IC_LAW_OP_CONVT2X2 ? 4 : 1,
                       .taps = op->kind == IC_LAW_OP_CONV3X3 ? 9 : 1};
    const unsigned cin = op->cin[0] + op->cin[1];
    for (int i = 0; i < 2; i++) {
        m.in.channels[i] = op->cin[i];
        m.in.padded[i] = ic_cu_pad(op->cin[i]);
        m.inputs += m.in.padded[i];
    }
    m.in.pairs = p->ops[0].kind == IC_LAW_OP_INPUT && op->in[0] == p->ops[0].out;
    m.out.channels[0] = op->cout;
    m.out.padded[0] = ic_cu_pad(op->cout);
    m.out.pairs = op->out == p->net_out;
    m.columns = m.phases * m.out.padded[0];
    if (m.phases == 4) {
        m.so = 4;
        m.si = (size_t)op->cout * 4;
    } else {
        m.so = (size_t)cin * m.taps;
        m.si = m.taps;
    }
    m.st = 1;
    return m;
}

/* Flat index of the value at (column, input place, tap), or -1 in padding. */
static long long flat_at(const struct matrix *m, unsigned column, unsigned place, unsigned tap)
{
    const long o = channel_at(&m->out, column % m->out.padded[0]), i = channel_at(&m->in, place);
    if (o < 0 || i < 0)
        return -1;
    if (m->phases == 4)
        tap = column / m->out.padded[0];
    return (long long)((size_t)o * m->so + (size_t)i * m->si + tap * m->st);
}

static enum ic_status send(struct ic_law_packed *p, const void *from, size_t bytes, void **to,
                           struct ic_err *err)
{
    cudaError_t e = cudaMalloc(to, bytes ? bytes : 1);
    if (e == cudaSuccess)
        e = cudaMemcpy(*to, from, bytes, cudaMemcpyHostToDevice);
    if (e != cudaSuccess)
        return ic_cu_fail(err, e, "weights to the device");
    p->bytes += bytes;
    return IC_OK;
}

static uint16_t narrow(float v, enum ic_cu_type type)
{
    if (type == IC_CU_BF16)
        return ic_f32_to_bf16(v);
    return ic_f32_to_f16(v > F16_MAX ? F16_MAX : v < -F16_MAX ? -F16_MAX : v);
}

static unsigned code_at(const struct ic_nf4 *q, size_t i)
{
    return i % 2 ? q->codes[i / 2] & 15 : q->codes[i / 2] >> 4;
}

/* Calls for every value of a matrix in that order. */
static void each_value(const struct matrix *m, void (*fn)(void *ctx, size_t at, long long flat), void *ctx)
{
    size_t at = 0;
    for (unsigned block = 0; block < m->columns; block += BLOCK)
        for (unsigned unit = 0; unit < m->inputs / 16 * m->taps; unit++)
            for (unsigned n = block; n < block + BLOCK && n < m->columns; n += 8)
                for (unsigned v = 0; v < UNIT; v++) {
                    const unsigned c = unit / m->taps * 16, tap = unit % m->taps;
                    fn(ctx, at++, flat_at(m, n + v / 8 % 8, c + v / 64 * 8 + v % 8, tap));
                }
}

struct narrowing {
    const float *from;
    uint16_t *to;
    enum ic_cu_type type;
};

static void narrow_one(void *ctx, size_t at, long long flat)
{
    const struct narrowing *n = ctx;
    n->to[at] = flat < 0 ? 0 : narrow(n->from[flat], n->type);
}

struct coding {
    const struct ic_nf4 *from;
    uint32_t *to;
};

static void code_one(void *ctx, size_t at, long long flat)
{
    const struct coding *c = ctx;
    const unsigned code = flat < 0 ? IC_NF4_ZERO : code_at(c->from, (size_t)flat);
    c->to[at / 8] |= (uint32_t)code << 4 * (at % 8);
}

static enum ic_status pack_nf4(struct ic_law_packed *p, const struct ic_law_weight *w,
                               const struct matrix *m, struct ic_cu_weights *to, struct ic_err *err)
{
    const size_t values = (size_t)m->columns * m->taps * m->inputs,
                 blocks = ic_nf4_blocks(w->count, w->nf4.block);
    uint32_t *codes = calloc(values / 8, sizeof *codes);
    float *absmax = calloc(blocks, sizeof *absmax);
    void *sent_codes = NULL, *sent_absmax = NULL;
    enum ic_status s = codes && absmax ? IC_OK : ic_fail(err, IC_OOM, "no memory to pack weights");
    if (s == IC_OK) {
        each_value(m, code_one, &(struct coding){&w->nf4, codes});
        for (size_t b = 0; b < blocks; b++)
            absmax[b] = ic_nf4_absmax(&w->nf4, b);
        s = send(p, codes, values / 2, &sent_codes, err);
        to->weight = sent_codes;
    }
    if (s == IC_OK) {
        s = send(p, absmax, blocks * sizeof *absmax, &sent_absmax, err);
        to->expanded = values * sizeof(uint16_t);
        to->nf4 = (struct ic_cu_nf4){.codes = sent_codes,
                                     .absmax = sent_absmax,
                                     .so = (int)m->so,
                                     .si = (int)m->si,
                                     .st = (int)m->st,
                                     .cin0 = (int)m->in.channels[0],
                                     .cpad0 = (int)m->in.padded[0],
                                     .cin = (int)(m->in.channels[0] + m->in.channels[1]),
                                     .cout = (int)m->out.channels[0],
                                     .cout_pad = (int)m->out.padded[0],
                                     .phases = (int)m->phases};
    }
    free(codes);
    free(absmax);
    return s;
}

static enum ic_status pack_half(struct ic_law_packed *p, const struct ic_law_weight *w,
                                const struct matrix *m, struct ic_cu_weights *to, struct ic_err *err)
{
    const size_t values = (size_t)m->columns * m->taps * m->inputs;
    float *all = malloc(w->count * sizeof *all);
    uint16_t *half = malloc(values * sizeof *half);
    enum ic_status s = all && half ? IC_OK : ic_fail(err, IC_OOM, "no memory to pack weights");
    if (s == IC_OK) {
        ic_law_weight_read(w, 0, w->count, all);
        each_value(m, narrow_one, &(struct narrowing){all, half, p->type});
        s = send(p, half, values * sizeof *half, &to->weight, err);
    }
    free(all);
    free(half);
    return s;
}

static float largest(const float *v, size_t n)
{
    float most = 0;
    for (size_t i = 0; i < n; i++)
        most = fmaxf(most, fabsf(v[i]));
    return most;
}

/* A vector of float32 as it is, or one value per column: padded, permuted, repeated for each phase. most: its largest. */
static enum ic_status pack_vector(struct ic_law_packed *p, const struct ic_law_weight *w,
                                  const struct side *out, unsigned columns, float **to, float *most,
                                  struct ic_err *err)
{
    const size_t n = columns ? columns : w->count;
    float *all = malloc(w->count * sizeof *all), *v = calloc(n, sizeof *v);
    void *sent = NULL;
    enum ic_status s = all && v ? IC_OK : ic_fail(err, IC_OOM, "no memory to pack weights");
    if (s == IC_OK) {
        ic_law_weight_read(w, 0, w->count, all);
        for (unsigned i = 0; i < n; i++) {
            const long c = columns ? channel_at(out, i % out->padded[0]) : (long)i;
            v[i] = c < 0 ? 0 : all[c];
        }
        *most = largest(all, w->count);
        s = send(p, v, n * sizeof *v, &sent, err);
        *to = sent;
    }
    free(all);
    free(v);
    return s;
}

/* ---- float32 by tensor cores: exact_mma.cu ------------------------------------------------------- */

double ic_cu_input_bound(const struct ic_law_packed *packed, const struct ic_law_plan *plan, size_t at)
{
    double bound[IC_LAW_PLAN_TENSORS_MAX], most = 0;
    for (size_t t = 0; t < plan->tensor_count; t++)
        bound[t] = INFINITY;
    for (size_t i = 0; i < at; i++) {
        const struct ic_law_op *op = &plan->ops[i];
        const double gain = (double)packed->ops[i].gain, offset = (double)packed->ops[i].offset;
        if (op->kind == IC_LAW_OP_GROUPNORM || op->kind == IC_LAW_OP_RMSNORM)
            bound[op->out] = gain * sqrt((double)op->cout / op->groups * op->height * op->width) + offset;
        else if (op->kind == IC_LAW_OP_MAXPOOL2)
            bound[op->out] = bound[op->in[0]];
        else if (op->kind == IC_LAW_OP_CONVT2X2)
            bound[op->out] = gain * bound[op->in[0]] + offset;
        else if (op->kind == IC_LAW_OP_LSTM)
            bound[op->out] = 1;
    }
    for (int i = 0; i < 2; i++)
        if (plan->ops[at].in[i] >= 0)
            most = fmax(most, bound[plan->ops[at].in[i]]);
    return most;
}

/* Of a transposed convolution: [inputs][outputs], by what the largest input becomes larger at most. */
static float largest_sum(const float *v, size_t inputs, size_t outputs)
{
    double most = 0;
    for (size_t o = 0; o < outputs; o++) {
        double sum = 0;
        for (size_t c = 0; c < inputs; c++)
            sum += fabs((double)v[c * outputs + o]);
        most = fmax(most, sum);
    }
    return (float)most;
}

static float rounded(float v, bool half)
{
    uint32_t bits;
    if (half)
        return ic_f16_to_f32(ic_f32_to_f16(v));
    memcpy(&bits, &v, sizeof bits);
    bits = (bits + 0x1000u) & 0xffffe000u;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* Puts a value's two parts where its word has room for them: word[0], word[128]. */
static void put_split(uint32_t *word, float v, bool half, size_t which)
{
    const float part[2] = {rounded(v, half), rounded(v - rounded(v, half), half)};
    for (int i = 0; i < 2; i++) {
        uint32_t bits;
        memcpy(&bits, &part[i], sizeof bits);
        word[i * 128] |= half ? (uint32_t)ic_f32_to_f16(part[i]) << 16 * which : bits;
    }
}

/* The order is in kernels.h. */
static enum ic_status pack_split(struct ic_law_packed *p, const struct ic_law_plan *plan, size_t index,
                                 struct ic_err *err)
{
    const struct ic_law_op *op = &plan->ops[index];
    const struct ic_law_weight *w = &p->law->weights[op->weight];
    struct ic_cu_weights *to = &p->ops[index];
    const bool up = op->kind == IC_LAW_OP_CONVT2X2;
    const size_t taps = op->kind == IC_LAW_OP_CONV3X3 ? 9 : 1, outputs = (size_t)op->cout * (up ? 4 : 1),
                 channels = op->cin[0] + op->cin[1];
    int exponent[2]; /* of the largest input, the largest weight */
    float *all = malloc(w->count * sizeof *all);
    if (!all)
        return ic_fail(err, IC_OOM, "no memory to pack weights");
    ic_law_weight_read(w, 0, w->count, all);
    const double bound = ic_cu_input_bound(p, plan, index);
    frexp(bound, &exponent[0]);
    frexpf(largest(all, w->count), &exponent[1]);
    to->half = isfinite(bound) && abs(exponent[0]) < SCALE_MOST && abs(exponent[1]) < SCALE_MOST;
    to->unscale = to->half ? ldexpf(1, exponent[1] - 15) : 1;
    if (up)
        to->gain = largest_sum(all, op->cin[0], outputs);
    const size_t each = to->half ? 2 : 1, chunk = IC_CU_MMA32_WORDS(taps),
                 words = (channels + each * chunk - 1) / (each * chunk) * chunk,
                 units = (outputs + 15) / 16 * (words / 8) * taps;
    uint32_t *v = calloc(units * IC_CU_MMA32_UNIT, sizeof *v);
    enum ic_status s = v ? IC_OK : ic_fail(err, IC_OOM, "no memory to pack weights");
    for (size_t i = 0; i < units * 128 * each && s == IC_OK; i++) {
        const size_t at = i / each % 128, unit = i / each / 128, lane = at / 4, tap = unit % taps,
                     o = unit / taps / (words / 8) * 16 +
                         (up ? lane / 4 * 2 + at % 2 : lane / 4 + at % 2 * 8),
                     word = unit / taps % (words / 8) * 8 + lane % 4 + at % 4 / 2 * 4,
                     c = word * each + i % each;
        if (o < outputs && c < channels)
            put_split(&v[unit * IC_CU_MMA32_UNIT + at],
                      all[up ? c * outputs + o : (o * channels + c) * taps + tap] / to->unscale, to->half,
                      i % each);
    }
    if (s == IC_OK)
        s = send(p, v, units * IC_CU_MMA32_UNIT * sizeof *v, &to->weight, err);
    free(all);
    free(v);
    return s;
}

/* Of a norm's scales. */
static enum ic_status pack_signs(struct ic_law_packed *p, const struct ic_law_weight *w, uint16_t **to,
                                 struct ic_err *err)
{
    const size_t n = ic_cu_pad((unsigned)w->count);
    float *all = malloc(w->count * sizeof *all);
    uint16_t *v = calloc(n, sizeof *v);
    void *sent = NULL;
    enum ic_status s = all && v ? IC_OK : ic_fail(err, IC_OOM, "no memory to pack weights");
    if (s == IC_OK) {
        ic_law_weight_read(w, 0, w->count, all);
        for (size_t i = 0; i < w->count; i++)
            v[i] = all[i] < 0 ? 0x8000 : 0;
        s = send(p, v, n * sizeof *v, &sent, err);
        *to = sent;
    }
    free(all);
    free(v);
    return s;
}

static enum ic_status pack_op(struct ic_law_packed *p, const struct ic_law_plan *plan, size_t index,
                              struct ic_err *err)
{
    const struct ic_law_op *op = &plan->ops[index];
    const struct ic_law *law = p->law;
    struct ic_cu_weights *to = &p->ops[index];
    if (op->weight < 0)
        return IC_OK;
    const struct ic_law_weight *w = &law->weights[op->weight],
                               *b = op->bias >= 0 ? &law->weights[op->bias] : NULL;
    const bool conv = op->kind != IC_LAW_OP_GROUPNORM && op->kind != IC_LAW_OP_RMSNORM;
    enum ic_status s;
    if (!conv || p->type == IC_CU_F32) {
        float *weight = NULL;
        if (conv && p->split)
            s = pack_split(p, plan, index, err);
        else {
            s = pack_vector(p, w, NULL, 0, &weight, &to->gain, err);
            to->weight = weight;
        }
        if (s == IC_OK && !conv && p->type != IC_CU_F32)
            s = pack_signs(p, w, &to->flip, err);
        return s == IC_OK && b ? pack_vector(p, b, NULL, 0, &to->bias, &to->offset, err) : s;
    }
    const struct matrix m = matrix_of(plan, op);
    const bool keep =
        w->precision == IC_LAW_NF4 && w->nf4.block == IC_NF4_BLOCK && !m.in.pairs && !m.out.pairs;
    s = keep ? pack_nf4(p, w, &m, to, err) : pack_half(p, w, &m, to, err);
    return s == IC_OK && b ? pack_vector(p, b, &m.out, m.columns, &to->bias, &to->offset, err) : s;
}

static enum ic_status find_device(struct ic_law_packed *p, struct ic_err *err)
{
    struct cudaDeviceProp prop;
    int n = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess || n < 1)
        return ic_fail(err, IC_UNAVAILABLE, "no CUDA device: %s",
                       e != cudaSuccess ? cudaGetErrorString(e) : "none is there");
    if ((e = cudaGetDevice(&p->device)) != cudaSuccess ||
        (e = cudaGetDeviceProperties(&prop, p->device)) != cudaSuccess)
        return ic_cu_fail(err, e, "looking at the device");
    if (p->type != IC_CU_F32 && prop.major < HALF_MAJOR)
        return ic_fail(
            err, IC_UNAVAILABLE,
            "%s has compute capability %d.%d; the 16-bit back ends need 8.0, cuda-fp32 runs on any",
            prop.name, prop.major, prop.minor);
    p->sms = prop.multiProcessorCount;
    p->smem_max = (int)prop.sharedMemPerBlockOptin;
    p->overlap = prop.major >= 9;
    if (p->type != IC_CU_F32 && (e = ic_cu_conv_init(p->type, p->smem_max)) != cudaSuccess)
        return ic_cu_fail(err, e, "this build's kernels on this device");
    p->split = p->type == IC_CU_F32 && p->law->arch != IC_LAW_SNN_UNET && prop.major >= HALF_MAJOR &&
               ic_cu_mma32_init(p->smem_max) == cudaSuccess;
    p->wide = p->type != IC_CU_F32 && prop.major == 9 &&
              ic_cu_wide_init(p->type, p->smem_max) == cudaSuccess &&
              ic_cu_split_init(p->type, p->smem_max) == cudaSuccess &&
              ic_cu_fold_init(p->type, p->smem_max) == cudaSuccess &&
              ic_cu_split_fold_init(p->type, p->smem_max) == cudaSuccess &&
              ic_cu_tall_init(p->type, p->smem_max) == cudaSuccess;
    return IC_OK;
}

enum ic_cu_type ic_cu_type_of(const struct ic_law *law)
{
    int device, major = HALF_MAJOR; /* where none answers, pack says so */
    if (law->precision == IC_LAW_FP32 || law->arch == IC_LAW_SNN_UNET)
        return IC_CU_F32;
    if (cudaGetDevice(&device) == cudaSuccess)
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (major < HALF_MAJOR)
        return IC_CU_F32;
    return law->precision == IC_LAW_BF16 && law->weight_abs_max > F16_MAX ? IC_CU_BF16 : IC_CU_F16;
}

enum ic_status ic_cu_pack(const struct ic_law *law, enum ic_cu_type type, struct ic_law_packed **out,
                          struct ic_err *err)
{
    *out = NULL;
    if (law->arch == IC_LAW_SNN_UNET && type != IC_CU_F32)
        return ic_fail(err, IC_BAD_REQUEST,
                       "SNN_UNET's spikes flip under 16-bit rounding: use the back end cuda-fp32 or cpu");
    struct ic_law_packed *p = calloc(1, sizeof *p);
    struct ic_law_plan *plan = NULL;
    if (!p)
        return ic_fail(err, IC_OOM, "no memory for a law's weights");
    p->law = law;
    p->type = type;
    enum ic_status s = find_device(p, err);
    if (s == IC_OK)
        s = ic_law_plan_open(law, SMALLEST_GRID, SMALLEST_GRID, 1, ic_cu_tensor_bytes, &plan, err);
    for (size_t i = 0; s == IC_OK && i < plan->op_count; i++)
        s = pack_op(p, plan, i, err);
    p->op_count = plan ? plan->op_count : 0;
    ic_law_plan_close(&plan);
    if (s != IC_OK)
        ic_cu_unpack(&p);
    *out = p;
    return s;
}

void ic_cu_unpack(struct ic_law_packed **packed)
{
    if (!packed || !*packed)
        return;
    struct ic_law_packed *p = *packed;
    for (size_t i = 0; i < IC_LAW_PLAN_OPS_MAX; i++) {
        cudaFree(p->ops[i].weight);
        cudaFree(p->ops[i].bias);
        cudaFree(p->ops[i].flip);
        cudaFree((void *)(uintptr_t)p->ops[i].nf4.absmax);
    }
    free(p);
    *packed = NULL;
}
