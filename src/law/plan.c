#include "law/plan.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const op_names[IC_LAW_OP_COUNT] = {
#define X(symbol, text) text,
    IC_LAW_OPS(X)
#undef X
};

const char *ic_law_op_name(enum ic_law_op_kind kind)
{
    return (unsigned)kind < IC_LAW_OP_COUNT ? op_names[kind] : "?";
}

size_t ic_law_tensor_bytes_nchw(const struct ic_law *law, unsigned channels, unsigned height,
                                unsigned width)
{
    (void)law;
    return (size_t)channels * height * width * sizeof(float);
}

/* ---- Writing the list ------------------------------------------------------------------------ */

#define GROUPNORM_EPS 1e-5f
#define RMSNORM_EPS 1e-6f

struct builder {
    struct ic_law_plan *p;
    const struct ic_law *law;
    ic_law_tensor_bytes_fn bytes;
};

static int tensor(struct builder *b, const char *label, unsigned c, unsigned h, unsigned w)
{
    struct ic_law_plan *p = b->p;
    IC_ASSERT(p->tensor_count < IC_LAW_PLAN_TENSORS_MAX);
    size_t stride = (b->bytes(b->law, c, h, w) + IC_LAW_ALIGN - 1) / IC_LAW_ALIGN * IC_LAW_ALIGN;
    p->tensors[p->tensor_count] =
        (struct ic_law_tensor){.channels = c, .height = h, .width = w, .stride = stride, .label = label};
    return (int)p->tensor_count++;
}

/* Appends an op; channels and sizes follow from its tensors. */
static struct ic_law_op *emit(struct builder *b, enum ic_law_op_kind kind, int in0, int in1, int out)
{
    struct ic_law_plan *p = b->p;
    IC_ASSERT(p->op_count < IC_LAW_PLAN_OPS_MAX);
    struct ic_law_op *op = &p->ops[p->op_count++];
    *op = (struct ic_law_op){.kind = kind,
                             .in = {in0, in1},
                             .out = out,
                             .weight = -1,
                             .bias = -1,
                             .height = p->height,
                             .width = p->width};
    for (int i = 0; i < 2; i++)
        op->cin[i] = op->in[i] >= 0 ? p->tensors[op->in[i]].channels : 0;
    if (out >= 0) {
        op->cout = p->tensors[out].channels;
        op->height = p->tensors[out].height;
        op->width = p->tensors[out].width;
    }
    return op;
}

static int weight(const struct builder *b, const char *name, const char *tail)
{
    char full[2 * IC_LAW_TENSOR_NAME_MAX];
    snprintf(full, sizeof full, "%s%s", name, tail);
    return ic_law_weight_find(b->law, full);
}

/* out = act(conv(in0 ++ in1)); the kernel's size is the weight's. Returns the new tensor. */
static int conv(struct builder *b, const char *name, int in0, int in1, enum ic_law_act act)
{
    int w = weight(b, name, ".weight");
    IC_ASSERT(w >= 0);
    const struct ic_law_weight *k = &b->law->weights[w];
    const struct ic_law_tensor *t = &b->p->tensors[in0];
    int out = tensor(b, k->name, k->dim[0], t->height, t->width);
    struct ic_law_op *op = emit(b, k->dim[2] == 3 ? IC_LAW_OP_CONV3X3 : IC_LAW_OP_CONV1X1, in0, in1, out);
    op->weight = w;
    op->bias = weight(b, name, ".bias");
    op->act = act;
    IC_ASSERT(op->cin[0] + op->cin[1] == k->dim[1]);
    uint64_t macs = (uint64_t)op->cout * k->dim[1] * k->dim[2] * k->dim[3];
    b->p->macs += macs * op->height * op->width;
    return out;
}

static void norm(struct builder *b, const char *name, int x)
{
    bool rms = b->law->arch == IC_LAW_UNET_UNITARY_RMSNORM;
    struct ic_law_op *op = emit(b, rms ? IC_LAW_OP_RMSNORM : IC_LAW_OP_GROUPNORM, x, -1, x);
    op->weight = weight(b, name, ".weight");
    op->bias = weight(b, name, ".bias");
    op->groups = rms ? op->cout : ic_law_groups(op->cout);
    op->eps = rms ? RMSNORM_EPS : GROUPNORM_EPS;
    op->act = IC_LAW_ACT_ELU;
    IC_ASSERT(op->weight >= 0 && (op->bias >= 0) == !rms);
}

/* conv 3x3, norm, ELU, conv 3x3, norm, ELU (law-m.md §2.1) */
static int block(struct builder *b, const char *name, int in0, int in1)
{
    char part[IC_LAW_TENSOR_NAME_MAX];
    int x = in0;
    for (int i = 0; i < 2; i++) {
        snprintf(part, sizeof part, "%s.conv_block.%d", name, 3 * i);
        x = conv(b, part, x, i ? -1 : in1, IC_LAW_ACT_NONE);
        snprintf(part, sizeof part, "%s.conv_block.%d", name, 3 * i + 1);
        norm(b, part, x);
    }
    return x;
}

static int pool(struct builder *b, const char *label, int x)
{
    const struct ic_law_tensor *t = &b->p->tensors[x];
    int out = tensor(b, label, t->channels, t->height / 2, t->width / 2);
    emit(b, IC_LAW_OP_MAXPOOL2, x, -1, out);
    return out;
}

static int up(struct builder *b, const char *name, int x)
{
    int w = weight(b, name, ".weight");
    IC_ASSERT(w >= 0);
    const struct ic_law_weight *k = &b->law->weights[w];
    const struct ic_law_tensor *t = &b->p->tensors[x];
    int out = tensor(b, k->name, k->dim[1], t->height * 2, t->width * 2);
    struct ic_law_op *op = emit(b, IC_LAW_OP_CONVT2X2, x, -1, out);
    op->weight = w;
    op->bias = weight(b, name, ".bias");
    b->p->macs += (uint64_t)op->cout * op->cin[0] * op->height * op->width;
    return out;
}

/* The ConvLSTM at the bottom (law-m.md §2.4): x3 -> h'. */
static int lstm(struct builder *b, int x3)
{
    const struct ic_law_tensor *t = &b->p->tensors[x3];
    unsigned c = t->channels, h = t->height, w = t->width;
    int mem = tensor(b, "h", c, h, w);
    emit(b, IC_LAW_OP_MEM_IN, -1, -1, mem);
    int gates = conv(b, "conv_gates", x3, mem, IC_LAW_ACT_NONE);
    int out = tensor(b, "h'", c, h, w);
    emit(b, IC_LAW_OP_LSTM, gates, -1, out);
    return out;
}

static int unet(struct builder *b, int x)
{
    int x1 = block(b, "inc", x, -1);                        /* [b,   H,   W]   */
    int x2 = block(b, "down1.1", pool(b, "pool1", x1), -1); /* [2b,  H/2, W/2] */
    int x3 = block(b, "down2.1", pool(b, "pool2", x2), -1); /* [4b,  H/4, W/4] */
    if (b->law->memory)
        x3 = lstm(b, x3);
    int bt = block(b, "bot", x3, -1);                    /* [8b,  H/4, W/4] */
    int c1 = block(b, "conv_up1", up(b, "up1", bt), x2); /* [4b + 2b] -> [4b, H/2, W/2] */
    int c2 = block(b, "conv_up2", up(b, "up2", c1), x1); /* [2b + b]  -> [b,  H,   W]   */
    return conv(b, "outc", c2, -1, IC_LAW_ACT_NONE);     /* [2d,  H,   W]   */
}

/* A LIF whose membrane starts at zero in every step is a threshold (law-m.md §2.7). */
static int spiking(struct builder *b, const char *name, const char *lif, int in0, int in1)
{
    int x = conv(b, name, in0, in1, IC_LAW_ACT_SPIKE);
    struct ic_law_op *op = &b->p->ops[b->p->op_count - 1];
    op->spike_at = b->law->weights[weight(b, lif, ".threshold")].data[0];
    op->spike_to = b->law->weights[weight(b, lif, ".graded_spikes_factor")].data[0];
    return x;
}

static int snn(struct builder *b, int x)
{
    int s1 = spiking(b, "conv1", "lif1", x, -1);              /* [b,  H, W] */
    int s2 = spiking(b, "conv_bottom", "lif_bottom", s1, -1); /* [2b, H, W] */
    int big = up(b, "upconv", s2);                            /* [b, 2H, 2W] */
    const struct ic_law_tensor *t = &b->p->tensors[s1];
    int small = tensor(b, "resized", t->channels, t->height, t->width);
    emit(b, IC_LAW_OP_RESIZE_HALF, big, -1, small); /* [b, H, W] */
    int s3 = spiking(b, "conv2", "lif2", small, s1);
    return spiking(b, "conv_out", "lif_out", s3, -1); /* [2d, H, W] */
}

static int pointwise(struct builder *b, const char *const names[3], int x)
{
    x = conv(b, names[0], x, -1, IC_LAW_ACT_ELU);
    x = conv(b, names[1], x, -1, IC_LAW_ACT_ELU);
    return conv(b, names[2], x, -1, IC_LAW_ACT_NONE);
}

static void build(struct builder *b)
{
    static const char *const mlp[3] = {"net.0", "net.2", "net.4"};
    /* ic_law_open folds the neighbour sum into the first layer: one 3x3 convolution */
    static const char *const qca[3] = {IC_LAW_FOLDED, "processing_net.2", "processing_net.4"};
    struct ic_law_plan *p = b->p;
    int x = tensor(b, "psi", 2 * b->law->d, p->height, p->width), y = -1;
    emit(b, IC_LAW_OP_INPUT, -1, -1, x);
    switch (b->law->arch) {
    case IC_LAW_UNET:
    case IC_LAW_UNET_UNITARY:
    case IC_LAW_UNET_UNITARY_RMSNORM:
    case IC_LAW_UNET_CONVLSTM: y = unet(b, x); break;
    case IC_LAW_MLP: y = pointwise(b, mlp, x); break;
    case IC_LAW_DEEP_QCA: y = pointwise(b, qca, x); break;
    case IC_LAW_SNN_UNET: y = snn(b, x); break;
    case IC_LAW_ARCH_COUNT: IC_ASSERT(!"an architecture");
    }
    p->net_out = y;
    emit(b, IC_LAW_OP_UPDATE, y, -1, -1);
}

/* ---- Laying the tensors out ------------------------------------------------------------------ */

static void find_lifetimes(struct ic_law_plan *p)
{
    for (size_t t = 0; t < p->tensor_count; t++) {
        p->tensors[t].first = UINT32_MAX;
        p->tensors[t].last = 0;
    }
    for (unsigned i = 0; i < p->op_count; i++) {
        const int touched[3] = {p->ops[i].in[0], p->ops[i].in[1], p->ops[i].out};
        for (int k = 0; k < 3; k++)
            if (touched[k] >= 0) {
                struct ic_law_tensor *t = &p->tensors[touched[k]];
                t->first = t->first < i ? t->first : i;
                t->last = i;
            }
    }
    for (size_t t = 0; t < p->tensor_count; t++)
        if (p->tensors[t].first == UINT32_MAX) /* bypassed */
            p->tensors[t].first = 0;
}

static int larger_first(const void *a, const void *b)
{
    const struct ic_law_tensor *const *x = a, *const *y = b;
    if ((*x)->stride != (*y)->stride)
        return (*x)->stride < (*y)->stride ? 1 : -1;
    return ((*x)->first > (*y)->first) - ((*x)->first < (*y)->first);
}

/* Lowest offset at which t meets none of placed[0..n) that live while it does. `placed` is sorted by
 * offset. */
static size_t first_fit(const struct ic_law_tensor *t, struct ic_law_tensor *const *placed, size_t n,
                        size_t batch)
{
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        const struct ic_law_tensor *o = placed[i];
        bool together = o->first <= t->last && t->first <= o->last;
        if (together && o->offset < at + t->stride * batch && at < o->offset + o->stride * batch)
            at = o->offset + o->stride * batch;
    }
    return at;
}

/* Interval colouring, largest tensors first: the big ones fix the peak, the small ones fill holes. */
static void lay_out(struct ic_law_plan *p)
{
    struct ic_law_tensor *order[IC_LAW_PLAN_TENSORS_MAX], *placed[IC_LAW_PLAN_TENSORS_MAX];
    for (size_t i = 0; i < p->tensor_count; i++)
        order[i] = &p->tensors[i];
    p->arena_bytes = p->tensors_bytes = 0;
    qsort(order, p->tensor_count, sizeof order[0], larger_first);
    for (size_t n = 0; n < p->tensor_count; n++) {
        struct ic_law_tensor *t = order[n];
        t->offset = first_fit(t, placed, n, p->batch);
        size_t end = t->offset + t->stride * p->batch, at = n;
        p->arena_bytes = p->arena_bytes > end ? p->arena_bytes : end;
        p->tensors_bytes += t->stride * p->batch;
        for (; at > 0 && placed[at - 1]->offset > t->offset; at--)
            placed[at] = placed[at - 1];
        placed[at] = t;
    }
}

/* Every size below is a product of bounded factors, so only this sum needs a check; it is taken before
 * offsets are. */
static enum ic_status check_size(const struct ic_law_plan *p, struct ic_err *err)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < p->tensor_count; i++)
        if (p->tensors[i].stride > IC_LAW_ARENA_MAX ||
            (sum += (uint64_t)p->tensors[i].stride * p->batch) > IC_LAW_ARENA_MAX)
            return ic_fail(err, IC_TOO_LARGE, "a plan of %ux%u cells, batch %u, is past IC_LAW_ARENA_MAX",
                           p->height, p->width, p->batch);
    return IC_OK;
}

enum ic_status ic_law_plan_open(const struct ic_law *law, unsigned height, unsigned width, unsigned batch,
                                ic_law_tensor_bytes_fn tensor_bytes, struct ic_law_plan **out,
                                struct ic_err *err)
{
    *out = NULL;
    if (height < 1 || width < 1 || batch < 1)
        return ic_fail(err, IC_BAD_REQUEST, "a grid of %ux%u cells, batch %u", height, width, batch);
    if (height > IC_LAW_GRID_MAX || width > IC_LAW_GRID_MAX || batch > IC_LAW_BATCH_MAX)
        return ic_fail(err, IC_TOO_LARGE, "a grid of %ux%u cells, batch %u; the limits are %d and %d",
                       height, width, batch, IC_LAW_GRID_MAX, IC_LAW_BATCH_MAX);
    if (height % law->grid_multiple || width % law->grid_multiple)
        return ic_fail(err, IC_BAD_REQUEST,
                       "a grid of %ux%u cells: %s needs sides that are multiples of %u", height, width,
                       ic_law_arch_info(law->arch)->name, law->grid_multiple);
    struct ic_law_plan *p = calloc(1, sizeof *p);
    if (!p)
        return ic_fail(err, IC_OOM, "no memory for a plan");
    p->law = law;
    p->height = height;
    p->width = width;
    p->batch = batch;
    p->psi_bytes = ic_law_psi_bytes(law, height, width);
    p->memory_bytes = ic_law_memory_bytes(law, height, width);
    build(&(struct builder){.p = p, .law = law, .bytes = tensor_bytes});
    enum ic_status s = check_size(p, err);
    if (s != IC_OK)
        return free(p), s;
    find_lifetimes(p);
    lay_out(p);
    *out = p;
    return IC_OK;
}

void ic_law_plan_bypass(struct ic_law_plan *p, size_t at)
{
    struct ic_law_op *op = &p->ops[at], *next = op + 1;
    IC_ASSERT(at + 1 < p->op_count && next->in[0] == op->out && p->tensors[op->out].last == at + 1);
    p->tensors[op->out].stride = 0;
    next->in[0] = op->in[0];
    op->out = -1;
    find_lifetimes(p);
    lay_out(p);
}

void ic_law_plan_hasten(struct ic_law_plan *p, size_t at, size_t from)
{
    struct ic_law_tensor *t = &p->tensors[p->ops[at].out];
    IC_ASSERT(from < at && t->first == at);
    t->first = (unsigned)from;
    lay_out(p);
}

void ic_law_plan_close(struct ic_law_plan **plan)
{
    if (plan) {
        free(*plan);
        *plan = NULL;
    }
}

/* ---- The printed sum ------------------------------------------------------------------------- */

static void line(struct ic_buf *out, const char *what, uint64_t bytes, const char *note)
{
    ic_buf_printf(out, "  %-26s %12" PRIu64 " B  %9.3f MiB  %s\n", what, bytes, (double)bytes / 1048576.0,
                  note);
}

enum ic_status ic_law_exec_run(const struct ic_law_backend *be, struct ic_law_exec *exec,
                               const struct ic_law_io *io, unsigned n, unsigned steps, struct ic_err *err)
{
    if (be->run)
        return be->run(exec, io, n, steps, err);
    for (unsigned i = 0; i < steps; i++)
        be->step(exec, io, n);
    return IC_OK;
}

size_t ic_law_exec_size(const struct ic_law_backend *be, const struct ic_law_packed *packed,
                        const struct ic_law *law, unsigned height, unsigned width, unsigned batch)
{
    struct ic_law_plan *plan;
    if (ic_law_plan_open(law, height, width, batch, be->tensor_bytes, &plan, NULL) != IC_OK)
        return 0;
    const size_t size = be->exec_size ? be->exec_size(packed, plan) : plan->arena_bytes;
    ic_law_plan_close(&plan);
    return size;
}

size_t ic_law_state_bytes(const struct ic_law *law, unsigned height, unsigned width)
{
    return (ic_law_psi_bytes(law, height, width) + ic_law_memory_bytes(law, height, width) + 255) / 256 *
           256;
}

size_t ic_law_frames_bytes(unsigned height, unsigned width, unsigned batch)
{
    /* one float32 or three bytes a cell; three float32 of a single frame at the least */
    return (size_t)height * width * 4 * (batch < 3 ? 3 : batch);
}

size_t ic_law_staging_bytes(const struct ic_law_backend *be, const struct ic_law *law, unsigned height,
                            unsigned width, unsigned batch)
{
    if (be->state_open)
        return ic_law_frames_bytes(height, width, batch);
    return batch * (2 * ic_law_psi_bytes(law, height, width) + ic_law_memory_bytes(law, height, width));
}

/* What n simulations take; false, with the bound that they pass, where that is more than there is. */
struct fit_query {
    const struct ic_law_backend *be;
    const struct ic_law_packed *packed;
    const struct ic_law *law;
    unsigned height, width;
    const struct ic_law_room *room;
    size_t each;   /* in host memory, besides the plan */
    size_t states; /* of one on the device */
};

static bool fits(const struct fit_query *q, unsigned n, struct ic_law_fit *out)
{
    const struct ic_law_room *room = q->room;
    *out = (struct ic_law_fit){.n = n, .limit = IC_LAW_FIT_HOST};
    if (q->each > room->host / n)
        return false;
    const size_t exec = ic_law_exec_size(q->be, q->packed, q->law, q->height, q->width, n);
    const size_t copies =
        room->on_device ? ic_law_staging_bytes(q->be, q->law, q->height, q->width, n) : exec;
    out->host = n * q->each + copies;
    out->device = room->on_device ? exec + n * q->states : 0;
    if (!exec)
        out->limit = IC_LAW_FIT_MOST;
    else if (out->device > room->device)
        out->limit = IC_LAW_FIT_DEVICE;
    else
        return copies <= SIZE_MAX - n * q->each && out->host <= room->host;
    return false;
}

struct ic_law_fit ic_law_batch_fit(const struct ic_law_backend *be, const struct ic_law_packed *packed,
                                   const struct ic_law *law, unsigned height, unsigned width,
                                   const struct ic_law_room *room, unsigned most)
{
    const size_t psi =
        (ic_law_psi_bytes(law, height, width) + IC_LAW_ALIGN - 1) / IC_LAW_ALIGN * IC_LAW_ALIGN;
    struct fit_query q = {be, packed, law, height, width, room, 0, 0};
    q.each = 2 * psi + ic_law_memory_bytes(law, height, width); /* state and delta */
    q.states = room->on_device && be->state_open ? ic_law_state_bytes(law, height, width) : 0;
    struct ic_law_fit best = {0}, tried;
    unsigned lo = 0, hi = most; /* lo fits */
    best.limit = IC_LAW_FIT_MOST;
    while (lo < hi) {
        const unsigned n = lo + (hi - lo + 1) / 2;
        if (fits(&q, n, &tried)) {
            tried.limit = best.limit;
            best = tried;
            lo = n;
        } else {
            best.limit = tried.limit; /* of the smallest that did not fit, in the end */
            hi = n - 1;
        }
    }
    return best;
}

void ic_law_plan_report(const struct ic_law_plan *p, const struct ic_law_backend *be,
                        const struct ic_law_packed *packed, struct ic_buf *out)
{
    const struct ic_law *law = p->law;
    const uint64_t own = p->psi_bytes + p->memory_bytes, packed_bytes = be->packed_bytes(packed);
    const uint64_t exec = ic_law_exec_size(be, packed, law, p->height, p->width, p->batch);
    const uint64_t more = p->batch < IC_LAW_BATCH_MAX
                              ? ic_law_exec_size(be, packed, law, p->height, p->width, p->batch + 1)
                              : 0;
    const bool device = be->memory != NULL;
    const uint64_t staging = device ? ic_law_staging_bytes(be, law, p->height, p->width, p->batch) : 0;
    const uint64_t states =
        device && be->state_open ? ic_law_state_bytes(law, p->height, p->width) * p->batch : 0;
    ic_buf_printf(out,
                  "%s %s d %u b %u %s on %s, grid %ux%u, batch %u: %zu ops, %.3f GFLOP a step and "
                  "simulation\n",
                  law->name, ic_law_arch_info(law->arch)->name, law->d, law->b,
                  ic_law_precision_name(law->precision), be->name, p->height, p->width, p->batch,
                  p->op_count, (double)p->macs * 2e-9);
    line(out, "simulation: psi", p->psi_bytes, "each");
    if (p->memory_bytes)
        line(out, "simulation: h and c", p->memory_bytes, "each");
    line(out, "simulation: delta", p->psi_bytes, "each, in a batch");
    line(out, "plan: arena and scratch", exec,
         device ? "shared by the batch, on the device" : "shared by the batch");
    if (more > exec)
        line(out, "plan: one simulation more", more - exec, "would add so much to it");
    line(out, "weights, as loaded", law->weight_bytes, "shared by all plans of the law");
    line(out, "weights, packed", packed_bytes,
         device ? "the same, on the device" : "the same, with what expands them");
    const uint64_t host = (own + p->psi_bytes) * p->batch + law->weight_bytes;
    if (!device) {
        line(out, "sum for the full batch", host + exec + packed_bytes, "");
        return;
    }
    line(out, "copies in host memory", staging, "on their way to the device, of the batch");
    if (states)
        line(out, "states on the device", states, "of the full batch");
    line(out, "sum on the device", exec + packed_bytes + states, "for the full batch");
    line(out, "sum in host memory", host + staging, "likewise");
}
