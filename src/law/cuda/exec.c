/* A plan made into launches, captured as CUDA graphs, and a step.
 *
 * Operations melt: a norm (with its ELU) and a max pool have no launch of their own, the convolution that
 * reads them does both while loading; INPUT and UPDATE belong to the first and the last convolution.
 * UNET_UNITARY is 15 launches. What a launch is cut into is chosen once, when the plan is opened (choose).
 *
 * Nothing is allocated and the host waits for nothing inside a step; a call to `run` waits once, at its
 * end. */
#include "law/cuda/exec.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "law/plugin.h"

#define SLOTS_MAX 256   /* statistics of a sample's tiles that a consumer adds up */
#define GRAPH_STEPS 8   /* steps of the long graph */
#define BUCKETS_MAX 24  /* batch sizes that have graphs of their own */
#define TUNE_LAUNCHES 8 /* of a candidate, between two events */
#define TUNE_ROUNDS 3
#define TUNE_HOPELESS 1.5f  /* times as slow as the best, after what a lone launch adds of its own */
#define TUNE_LONE_MS 0.006f /* at most */
#define KNOWN_MAX 1024      /* cuts of convolutions that are remembered */

enum launch_kind { CONV, LSTM, UPDATE, OP32 };

struct launch {
    enum launch_kind kind;
    int config, taps;
    const char *label;
    double flops; /* of one sample */
    union {
        struct ic_cu_conv conv;
        struct ic_cu_lstm lstm;
        struct ic_cu_update update;
        struct ic_cu_op32 op32;
    } a;
};

/* What a launch that reads a tensor has to know of it. */
struct view {
    int load; /* enum ic_cu_load */
    int of;   /* POOL: the tensor that holds the values */
    const struct ic_law_op *norm;
    size_t norm_index;
    float *stats;
    int slots, gran;
};

struct bucket {
    unsigned n;
    cudaGraphExec_t one, many;
};

struct ic_law_exec {
    const struct ic_law_packed *packed;
    const struct ic_law_plan *plan;
    char *arena;
    float *stats;
    size_t stats_floats;
    char *state; /* device: psi, h and c, delta of each place of a batch */
    size_t state_stride, delta_at;
    struct ic_cu_io *table, *table_host; /* device; pinned */
    char *staging;                       /* pinned, as `state` */
    cudaStream_t stream;
    size_t launch_count, bytes;
    struct launch launches[IC_LAW_PLAN_OPS_MAX];
    struct view views[IC_LAW_PLAN_TENSORS_MAX];
    struct bucket buckets[BUCKETS_MAX];
    size_t bucket_count;
    bool graphs;
    unsigned long runs;
};

size_t ic_cu_tensor_bytes(unsigned channels, unsigned height, unsigned width)
{
    return (size_t)ic_cu_pad(channels) * height * width * 2;
}

enum ic_status ic_cu_fail(struct ic_err *err, cudaError_t e, const char *what)
{
    cudaGetLastError(); /* a failure that did no harm must not be found again by the next call */
    if (e == cudaErrorMemoryAllocation)
        return ic_fail(err, IC_OOM, "%s: the GPU's memory is exhausted", what);
    if (e == cudaErrorNoDevice || e == cudaErrorDevicesUnavailable || e == cudaErrorInsufficientDriver)
        return ic_fail(err, IC_UNAVAILABLE, "%s: %s", what, cudaGetErrorString(e));
    return ic_fail(err, IC_UNAVAILABLE, "%s: the GPU is lost (%s)", what, cudaGetErrorString(e));
}

#define TRY(call, what)                                                                                    \
    do {                                                                                                   \
        cudaError_t try_e = (call);                                                                        \
        if (try_e != cudaSuccess)                                                                          \
            return ic_cu_fail(err, try_e, what);                                                           \
    } while (0)

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

static int slots_max(const struct ic_law_op *op)
{
    const unsigned n = (op->height + 3) / 4 * ((op->width + 7) / 8);
    return n < SLOTS_MAX ? (int)n : SLOTS_MAX;
}

static size_t stats_floats(const struct ic_law_op *norm, unsigned batch)
{
    return (size_t)batch * ic_cu_pad(norm->cout) / (unsigned)gran_of(norm) * (unsigned)slots_max(norm) * 2;
}

static struct ic_cu_src source_of(const struct ic_law_exec *e, int t)
{
    const struct view *v = &e->views[t];
    const struct ic_law_tensor *tensor = &e->plan->tensors[v->load == IC_CU_LOAD_POOL ? v->of : t];
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

/* ---- What a convolution is cut into ------------------------------------------------------------- */

struct choice {
    int config, chunk16, resident, tiles;
    int buffers, passes; /* wide.cuh */
};

static bool shape(struct ic_cu_conv *c, const struct ic_law_packed *p, struct choice k, int taps)
{
    if (k.config >= IC_CU_CONFIG_COUNT) {
        const struct ic_cu_wide_cut cut = {k.chunk16, k.resident, k.tiles, k.buffers, k.passes};
        return ic_cu_wide_shape(c, k.config - IC_CU_CONFIG_COUNT, taps, &cut, p->smem_max) &&
               c->slots <= SLOTS_MAX;
    }
    return ic_cu_conv_shape(c, k.config, taps, k.chunk16, k.resident, k.tiles, p->smem_max) &&
           c->slots <= SLOTS_MAX;
}

static bool timed(struct ic_law_exec *e, const struct ic_cu_conv *c, int config, int taps, int launches,
                  cudaEvent_t ev[2], float *ms)
{
    cudaEventRecord(ev[0], e->stream);
    for (int i = 0; i < launches; i++)
        if (ic_cu_conv_run(c, e->packed->type, config, taps, (int)e->plan->batch, e->packed->overlap,
                           e->stream) != cudaSuccess)
            return false;
    cudaEventRecord(ev[1], e->stream);
    if (cudaEventSynchronize(ev[1]) != cudaSuccess || cudaEventElapsedTime(ms, ev[0], ev[1]) != cudaSuccess)
        return false;
    *ms /= (float)launches;
    return true;
}

/* Milliseconds of one launch; < 0: it failed. A candidate that a single launch shows to be far from `best`
 * (< 0: none yet) is not measured further. */
static float measure(struct ic_law_exec *e, const struct ic_cu_conv *c, int config, int taps,
                     cudaEvent_t ev[2], float best)
{
    float mine = -1, ms;
    if (!timed(e, c, config, taps, 1, ev, &ms) ||
        !timed(e, c, config, taps, 1, ev, &ms)) /* the first one warms up */
        return -1;
    if (best >= 0 && ms > TUNE_HOPELESS * best + TUNE_LONE_MS)
        return ms;
    for (int round = 0; round < TUNE_ROUNDS; round++) {
        if (!timed(e, c, config, taps, TUNE_LAUNCHES, ev, &ms))
            return -1;
        mine = mine < 0 || ms < mine ? ms : mine;
    }
    return mine;
}

/* Calls try_one for every sensible cut of wide.cuh's. */
static void each_wide(const struct ic_law_exec *e, const struct ic_cu_conv *c, int taps,
                      void (*try_one)(void *, const struct ic_cu_conv *, struct choice), void *ctx)
{
    static const int chunks[] = {0, 8, 4, 2};
    for (int config = 0; config < IC_CU_WIDE_COUNT; config++) {
        const struct ic_cu_config *k = ic_cu_wide_config(config);
        const int column_blocks = (c->columns + k->columns - 1) / k->columns;
        if (k->columns >= 2 * c->columns && k->columns > 32)
            continue;
        for (int i = 0; i < 4 * 2 * 2; i++) /* chunk, resident, buffers */
            for (int tiles = 1; tiles <= 32; tiles *= 2)
                for (int passes = 1; passes <= (tiles > 1 ? 1 : column_blocks); passes *= 2) {
                    struct ic_cu_conv t = *c;
                    const struct choice ch = {.config = IC_CU_CONFIG_COUNT + config,
                                              .chunk16 = chunks[i / 4],
                                              .resident = i / 2 % 2,
                                              .tiles = tiles,
                                              .buffers = 1 + i % 2,
                                              .passes = passes};
                    if (ch.chunk16 >= c->c16 || !shape(&t, e->packed, ch, taps))
                        continue;
                    const long blocks = (long)t.slots * (column_blocks / passes) * (long)e->plan->batch;
                    if (tiles * passes > 1 && 2 * blocks < e->packed->sms)
                        break; /* fewer, longer blocks would leave multiprocessors idle */
                    try_one(ctx, &t, ch);
                }
    }
}

/* Calls try_one for every sensible cut. */
static void each_choice(const struct ic_law_exec *e, const struct ic_cu_conv *c, int taps,
                        void (*try_one)(void *, const struct ic_cu_conv *, struct choice), void *ctx)
{
    static const int chunks[] = {0, 16, 8, 4, 2};
    if (e->packed->wide)
        each_wide(e, c, taps, try_one, ctx);
    for (int config = 0; config < IC_CU_CONFIG_COUNT; config++) {
        const struct ic_cu_config *k = ic_cu_config(config);
        if (k->columns >= 2 * c->columns && k->columns > 16 && config != 0)
            continue;
        for (size_t i = 0; i < sizeof chunks / sizeof chunks[0]; i++)
            for (int resident = 0; resident <= (i == 0); resident++)
                for (int tiles = 1; tiles <= 256; tiles *= 2) {
                    struct ic_cu_conv t = *c;
                    const struct choice ch = {config, chunks[i], resident, tiles, 1, 1};
                    if (chunks[i] >= c->c16 || !shape(&t, e->packed, ch, taps))
                        continue;
                    try_one(ctx, &t, ch);
                    const long blocks =
                        (long)t.slots * ((c->columns + k->columns - 1) / k->columns) * (long)e->plan->batch;
                    if (blocks < 2L * e->packed->sms)
                        break; /* fewer, longer blocks would leave multiprocessors idle */
                }
    }
}

struct tuning {
    struct ic_law_exec *e;
    int taps;
    cudaEvent_t ev[2];
    float best_ms;
    struct choice best;
    int tried;
};

static void time_one(void *ctx, const struct ic_cu_conv *c, struct choice ch)
{
    struct tuning *t = ctx;
    const float ms = measure(t->e, c, ch.config, t->taps, t->ev, t->best_ms);
    t->tried++;
    if (ms >= 0 && (t->best_ms < 0 || ms < t->best_ms)) {
        t->best_ms = ms;
        t->best = ch;
    }
}

/* IC_LAW_CUDA_CUT=N, for tests: of every convolution the N-th of its cuts or so instead of the fastest (all
 * must compute the same), with an even N one of wide.cuh's if there is any. */
struct picking {
    unsigned wanted, count, wide;
    struct choice found;
};

static void pick_one(void *ctx, const struct ic_cu_conv *c, struct choice ch)
{
    struct picking *p = ctx;
    (void)c;
    if (p->count++ == p->wanted)
        p->found = ch;
    p->wide += ch.config >= IC_CU_CONFIG_COUNT;
}

static bool pick(struct ic_law_exec *e, const struct launch *l, struct tuning *t)
{
    const char *cut = getenv("IC_LAW_CUDA_CUT");
    struct picking p = {.wanted = ~0u};
    if (!cut)
        return false;
    each_choice(e, &l->a.conv, l->taps, pick_one, &p);
    const unsigned n = (unsigned)strtoul(cut, NULL, 10), of = n % 2 == 0 && p.wide ? p.wide : p.count;
    if (of == 0)
        return false;
    p.wanted = (n + 1) * 2654435761u % of;
    p.count = 0;
    each_choice(e, &l->a.conv, l->taps, pick_one, &p);
    t->best = p.found;
    t->best_ms = 0;
    t->tried = (int)p.count;
    return true;
}

/* What was chosen before in this process: plans of the same sizes must compute the same bits. */
struct known {
    int key[14];
    struct choice choice;
};
static struct known known[KNOWN_MAX];
static size_t known_count;
static pthread_mutex_t known_lock = PTHREAD_MUTEX_INITIALIZER;

static struct known key_of(const struct ic_law_exec *e, const struct launch *l)
{
    const struct ic_cu_conv *c = &l->a.conv;
    return (struct known){.key = {e->packed->device, (int)e->packed->type, c->nf4.codes != NULL, l->taps,
                                  c->c16, c->columns, c->height, c->width, (int)e->plan->batch, c->epilogue,
                                  c->in[0].load, c->in[1].load, c->in[0].cpad, c->stats_gran}};
}

static bool recall(struct known *k)
{
    bool found = false;
    pthread_mutex_lock(&known_lock);
    for (size_t i = 0; i < known_count && !found; i++)
        if (memcmp(known[i].key, k->key, sizeof k->key) == 0) {
            k->choice = known[i].choice;
            found = true;
        }
    pthread_mutex_unlock(&known_lock);
    return found;
}

static void remember(const struct known *k)
{
    pthread_mutex_lock(&known_lock);
    if (known_count < KNOWN_MAX)
        known[known_count++] = *k;
    pthread_mutex_unlock(&known_lock);
}

/* Times every sensible cut of a convolution on this device. Reads and writes the arena, whose content does
 * not matter yet, and the places of the batch. */
static enum ic_status choose(struct ic_law_exec *e, struct launch *l, struct ic_err *err)
{
    struct tuning t = {.e = e, .taps = l->taps, .best_ms = -1};
    struct known k = key_of(e, l);
    if (recall(&k)) {
        l->config = k.choice.config;
        (void)shape(&l->a.conv, e->packed, k.choice, l->taps);
        return IC_OK;
    }
    TRY(cudaEventCreate(&t.ev[0]), "an event");
    TRY(cudaEventCreate(&t.ev[1]), "an event");
    if (!pick(e, l, &t))
        each_choice(e, &l->a.conv, l->taps, time_one, &t);
    cudaEventDestroy(t.ev[0]);
    cudaEventDestroy(t.ev[1]);
    cudaError_t bad = cudaGetLastError();
    if (t.best_ms < 0)
        return bad != cudaSuccess
                   ? ic_cu_fail(err, bad, l->label)
                   : ic_fail(err, IC_TOO_LARGE, "%s does not fit the GPU's shared memory", l->label);
    l->config = t.best.config;
    k.choice = t.best;
    remember(&k);
    (void)shape(&l->a.conv, e->packed, t.best, l->taps);
    if (getenv("IC_LAW_CUDA_VERBOSE"))
        fprintf(stderr,
                "%-34s %3d -> %3d taps %d: %8.2f us %7.1f TFLOP/s  config %d (%dx%d) chunk %d resident %d "
                "tiles %d "
                "buffers %d passes %d blocks %dx%d smem %d, of %d\n",
                l->label, l->a.conv.c16 * 16, l->a.conv.columns, l->taps, (double)t.best_ms * 1e3,
                l->flops * e->plan->batch / ((double)t.best_ms * 1e9), t.best.config,
                ic_cu_config(l->config)->rows, ic_cu_config(l->config)->columns, t.best.chunk16,
                t.best.resident, t.best.tiles, t.best.buffers, t.best.passes, l->a.conv.slots,
                (l->a.conv.columns + ic_cu_config(l->config)->columns - 1) /
                    ic_cu_config(l->config)->columns,
                l->a.conv.smem, t.tried);
    return IC_OK;
}

/* ---- The walk ------------------------------------------------------------------------------------ */

/* A convolution, what it reads on the way in, and the norm or UPDATE that follows. Returns ops consumed. */
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
    c->io = e->table;
    c->weight = w->weight;
    c->nf4 = w->nf4;
    c->bias = w->bias;
    c->cpad = (int)ic_cu_pad(op->cout);
    c->columns = c->cpad * (transposed ? 4 : 1);
    c->c16 = (c->in[0].cpad + c->in[1].cpad) / 16;
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
        v->load = IC_CU_LOAD_NORM;
        v->norm = next;
        v->norm_index = at + 1;
        v->gran = gran_of(next);
        v->stats = e->stats + e->stats_floats;
        e->stats_floats += stats_floats(next, p->batch);
        c->stats = v->stats;
        c->stats_gran = v->gran;
    }
    struct ic_cu_conv fused = *c;
    if (next && next->kind == IC_LAW_OP_UPDATE && next->in[0] == op->out) {
        fused.epilogue = IC_CU_UPDATE;
        for (int config = 0; config < IC_CU_CONFIG_COUNT; config++)
            if (ic_cu_config(config)->columns >= c->columns) {
                *c = fused;
                *used = 2;
                break;
            }
    }
    enum ic_status s = choose(e, l, err);
    v->slots = c->slots;
    return s;
}

static enum ic_status build(struct ic_law_exec *e, struct ic_err *err)
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
            enum ic_status s = add_conv(e, at, &used, err);
            if (s != IC_OK)
                return s;
            break;
        }
        case IC_LAW_OP_MAXPOOL2:
            if (e->views[op->in[0]].load != IC_CU_LOAD_NORM ||
                p->tensors[op->in[0]].last < p->tensors[op->out].last)
                return ic_fail(err, IC_INTERNAL, "the CUDA back end cannot pool %s",
                               p->tensors[op->in[0]].label);
            e->views[op->out] = e->views[op->in[0]];
            e->views[op->out].load = IC_CU_LOAD_POOL;
            e->views[op->out].of = op->in[0];
            break;
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

static enum ic_status build32(struct ic_law_exec *e)
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
                                 .cout = (int)op->cout,
                                 .height = (int)op->height,
                                 .width = (int)op->width,
                                 .groups = (int)op->groups,
                                 .d = (int)p->law->d,
                                 .product = p->law->product,
                                 .eps = op->eps,
                                 .spike_at = op->spike_at,
                                 .spike_to = op->spike_to};
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

/* ---- A step ---------------------------------------------------------------------------------------- */

static cudaError_t enqueue(const struct ic_law_exec *e, int n)
{
    cudaError_t bad = cudaSuccess;
    for (size_t i = 0; i < e->launch_count && bad == cudaSuccess; i++) {
        const struct launch *l = &e->launches[i];
        switch (l->kind) {
        case CONV:
            bad = ic_cu_conv_run(&l->a.conv, e->packed->type, l->config, l->taps, n, e->packed->overlap,
                                 e->stream);
            break;
        case LSTM: bad = ic_cu_lstm_run(&l->a.lstm, e->packed->type, n, e->stream); break;
        case UPDATE: bad = ic_cu_update_run(&l->a.update, e->packed->type, n, e->stream); break;
        case OP32: bad = ic_cu_op32_run(&l->a.op32, n, e->stream); break;
        }
    }
    return bad;
}

static cudaError_t capture(struct ic_law_exec *e, unsigned n, unsigned steps, cudaGraphExec_t *out)
{
    cudaGraph_t graph = NULL;
    cudaError_t bad = cudaStreamBeginCapture(e->stream, cudaStreamCaptureModeThreadLocal), ended;
    if (bad != cudaSuccess)
        return bad;
    for (unsigned i = 0; i < steps && bad == cudaSuccess; i++)
        bad = enqueue(e, (int)n);
    ended = cudaStreamEndCapture(e->stream, &graph);
    bad = bad != cudaSuccess ? bad : ended;
    if (bad == cudaSuccess)
        bad = cudaGraphInstantiate(out, graph, 0);
    if (graph)
        cudaGraphDestroy(graph);
    return bad;
}

/* Graphs for 1, 2, 3, 4, 6, 8, 12 … and the whole batch; a batch takes the next larger one, whose last
 * places are empty then. */
static enum ic_status capture_all(struct ic_law_exec *e, struct ic_err *err)
{
    for (unsigned n = 1, step = 1;; n += step) {
        if (n > e->plan->batch)
            n = e->plan->batch;
        struct bucket *b = &e->buckets[e->bucket_count++];
        b->n = n;
        TRY(capture(e, n, 1, &b->one), "capturing a graph");
        TRY(capture(e, n, GRAPH_STEPS, &b->many), "capturing a graph");
        TRY(cudaGraphUpload(b->one, e->stream), "sending a graph");
        TRY(cudaGraphUpload(b->many, e->stream), "sending a graph");
        if (n == e->plan->batch || e->bucket_count == BUCKETS_MAX)
            break;
        if (n >= 2 && (n & (n - 1)) == 0)
            step = n / 2;
    }
    TRY(cudaStreamSynchronize(e->stream), "sending graphs");
    return IC_OK;
}

static const struct bucket *bucket_for(const struct ic_law_exec *e, unsigned n)
{
    for (size_t i = 0; i < e->bucket_count; i++)
        if (e->buckets[i].n >= n)
            return &e->buckets[i];
    return NULL;
}

static cudaError_t launch_steps(struct ic_law_exec *e, unsigned n, unsigned steps, bool graphs)
{
    const struct bucket *b = bucket_for(e, n);
    cudaError_t bad = cudaSuccess;
    for (unsigned i = 0; i < steps && bad == cudaSuccess;) {
        const bool many = steps - i >= GRAPH_STEPS;
        if (graphs && b) {
            bad = cudaGraphLaunch(many ? b->many : b->one, e->stream);
            i += many ? GRAPH_STEPS : 1;
        } else {
            bad = enqueue(e, (int)n);
            i++;
        }
    }
    return bad;
}

static void fill_table(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n)
{
    const struct ic_law_plan *p = e->plan;
    for (unsigned i = 0; i < p->batch; i++) {
        char *at = e->state + i * e->state_stride;
        struct ic_cu_io *t = &e->table_host[i];
        memset(t, 0, sizeof *t);
        if (i >= n)
            continue;
        t->psi = (float *)at;
        if (p->memory_bytes) {
            t->h = (float *)(at + p->psi_bytes);
            t->c = (float *)(at + p->psi_bytes + p->memory_bytes / 2);
        }
        t->delta = io && io[i].delta ? (float *)(at + e->delta_at) : NULL;
        t->gamma = io ? io[i].gamma : 0.0f;
    }
}

/* Faults that a test may ask for: IC_LAW_CUDA_FAULT=oom (no plan opens), lost@N (the N-th run fails). */
static bool fault_oom(void)
{
    const char *f = getenv("IC_LAW_CUDA_FAULT");
    return f && strcmp(f, "oom") == 0;
}

static bool fault_lost(const struct ic_law_exec *e)
{
    const char *f = getenv("IC_LAW_CUDA_FAULT");
    return f && strncmp(f, "lost@", 5) == 0 && e->runs >= strtoul(f + 5, NULL, 10);
}

static enum ic_status cu_run(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n, unsigned steps,
                             struct ic_err *err)
{
    const struct ic_law_plan *p = e->plan;
    const size_t own = p->psi_bytes + p->memory_bytes;
    IC_ASSERT(n >= 1 && n <= p->batch && steps >= 1);
    e->runs++;
    fill_table(e, io, n);
    for (unsigned i = 0; i < n; i++) {
        char *at = e->staging + i * e->state_stride;
        memcpy(at, io[i].psi, p->psi_bytes);
        if (p->memory_bytes) {
            memcpy(at + p->psi_bytes, io[i].h, p->memory_bytes / 2);
            memcpy(at + p->psi_bytes + p->memory_bytes / 2, io[i].c, p->memory_bytes / 2);
        }
    }
    TRY(cudaMemcpyAsync(e->table, e->table_host, p->batch * sizeof *e->table, cudaMemcpyHostToDevice,
                        e->stream),
        "a step");
    TRY(cudaMemcpy2DAsync(e->state, e->state_stride, e->staging, e->state_stride, own, n,
                          cudaMemcpyHostToDevice, e->stream),
        "a step");
    TRY(launch_steps(e, n, steps, e->graphs), "a step");
    bool delta = false;
    for (unsigned i = 0; i < n; i++)
        delta |= io[i].delta != NULL;
    TRY(cudaMemcpy2DAsync(e->staging, e->state_stride, e->state, e->state_stride,
                          delta ? e->state_stride : own, n, cudaMemcpyDeviceToHost, e->stream),
        "a step");
    TRY(cudaStreamSynchronize(e->stream), "a step");
    if (fault_lost(e))
        return ic_fail(err, IC_UNAVAILABLE,
                       "a step: the GPU is lost (a fault that IC_LAW_CUDA_FAULT asks for)");
    for (unsigned i = 0; i < n; i++) {
        const char *at = e->staging + i * e->state_stride;
        memcpy(io[i].psi, at, p->psi_bytes);
        if (p->memory_bytes) {
            memcpy(io[i].h, at + p->psi_bytes, p->memory_bytes / 2);
            memcpy(io[i].c, at + p->psi_bytes + p->memory_bytes / 2, p->memory_bytes / 2);
        }
        if (io[i].delta)
            memcpy(io[i].delta, at + e->delta_at, p->psi_bytes);
    }
    return IC_OK;
}

/* For callers that know no failure: the last state stays. */
static void cu_step(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n)
{
    struct ic_err err = {0};
    (void)cu_run(e, io, n, 1, &err);
}

/* ---- Open and close -------------------------------------------------------------------------------- */

static void cu_close(struct ic_law_exec **exec)
{
    if (!exec || !*exec)
        return;
    struct ic_law_exec *e = *exec;
    for (size_t i = 0; i < e->bucket_count; i++) {
        if (e->buckets[i].one)
            cudaGraphExecDestroy(e->buckets[i].one);
        if (e->buckets[i].many)
            cudaGraphExecDestroy(e->buckets[i].many);
    }
    cudaFree(e->arena);
    cudaFree(e->stats);
    cudaFree(e->state);
    cudaFree(e->table);
    cudaFreeHost(e->table_host);
    cudaFreeHost(e->staging);
    if (e->stream)
        cudaStreamDestroy(e->stream);
    free(e);
    *exec = NULL;
}

/* Bytes that a plan takes on the device besides its arena, and how its states lie. */
struct layout {
    size_t stats; /* floats */
    size_t delta_at, state_stride;
    size_t all; /* bytes, the arena included */
};

static struct layout layout_of(const struct ic_law_plan *p)
{
    struct layout l = {.stats = 64};
    for (size_t i = 0; i < p->op_count; i++)
        if (p->ops[i].kind == IC_LAW_OP_GROUPNORM || p->ops[i].kind == IC_LAW_OP_RMSNORM)
            l.stats += stats_floats(&p->ops[i], p->batch);
    l.delta_at = (p->psi_bytes + p->memory_bytes + 255) / 256 * 256;
    l.state_stride = l.delta_at + (p->psi_bytes + 255) / 256 * 256;
    l.all =
        p->arena_bytes + l.stats * sizeof(float) + (l.state_stride + sizeof(struct ic_cu_io)) * p->batch;
    return l;
}

static enum ic_status allocate(struct ic_law_exec *e, struct ic_err *err)
{
    const struct ic_law_plan *p = e->plan;
    const struct layout l = layout_of(p);
    const size_t stats = l.stats;
    e->delta_at = l.delta_at;
    e->state_stride = l.state_stride;
    TRY(cudaMalloc((void **)&e->arena, p->arena_bytes), "an arena");
    TRY(cudaMalloc((void **)&e->stats, stats * sizeof(float)), "an arena");
    TRY(cudaMalloc((void **)&e->state, e->state_stride * p->batch), "room for states");
    TRY(cudaMalloc((void **)&e->table, p->batch * sizeof *e->table), "an arena");
    TRY(cudaMallocHost((void **)&e->table_host, p->batch * sizeof *e->table), "pinned memory");
    TRY(cudaMallocHost((void **)&e->staging, e->state_stride * p->batch), "pinned memory");
    TRY(cudaStreamCreateWithFlags(&e->stream, cudaStreamNonBlocking), "a stream");
    e->bytes = l.all;
    /* Every byte is written before it is read; a test may ask for NaNs to see that. */
    const int fill = getenv("IC_LAW_CUDA_POISON") ? 0xFF : 0;
    TRY(cudaMemset(e->arena, fill, p->arena_bytes), "an arena");
    TRY(cudaMemset(e->stats, fill, stats * sizeof(float)), "an arena");
    TRY(cudaMemset(e->state, 0, e->state_stride * p->batch), "room for states");
    fill_table(e, NULL, p->batch);
    TRY(cudaMemcpy(e->table, e->table_host, p->batch * sizeof *e->table, cudaMemcpyHostToDevice),
        "an arena");
    return IC_OK;
}

static enum ic_status cu_open(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                              struct ic_law_exec **out, struct ic_err *err)
{
    *out = NULL;
    IC_ASSERT(plan->law == packed->law && plan->op_count == packed->op_count);
    if (fault_oom())
        return ic_fail(err, IC_OOM,
                       "an arena: the GPU's memory is exhausted (a fault that IC_LAW_CUDA_FAULT asks for)");
    struct ic_law_exec *e = calloc(1, sizeof *e);
    if (!e)
        return ic_fail(err, IC_OOM, "no memory for a plan's state");
    e->packed = packed;
    e->plan = plan;
    const char *graphs = getenv("IC_LAW_CUDA_GRAPH");
    e->graphs = !graphs || strcmp(graphs, "0") != 0;
    enum ic_status s = allocate(e, err);
    if (s == IC_OK)
        s = packed->type == IC_CU_F32 ? build32(e) : build(e, err);
    if (s == IC_OK && getenv("IC_LAW_CUDA_POISON") &&
        (cudaMemset(e->arena, 0xFF, plan->arena_bytes) != cudaSuccess ||
         cudaMemset(e->stats, 0xFF, e->stats_floats * sizeof(float)) != cudaSuccess))
        s = ic_fail(err, IC_INTERNAL, "poisoning the arena");
    if (s == IC_OK && e->graphs)
        s = capture_all(e, err);
    if (s != IC_OK)
        cu_close(&e);
    *out = e;
    return s;
}

static size_t cu_packed_bytes(const struct ic_law_packed *p)
{
    return p->bytes + sizeof *p;
}

static size_t cu_exec_bytes(const struct ic_law_exec *e)
{
    return e->bytes + sizeof *e;
}

static size_t cu_exec_size(const struct ic_law_packed *packed, const struct ic_law_plan *plan)
{
    (void)packed;
    return layout_of(plan).all + sizeof(struct ic_law_exec);
}

/* ---- The plug-in's table --------------------------------------------------------------------------- */

static enum ic_status time_steps(struct ic_law_exec *e, unsigned n, unsigned steps, bool graphs, double *ms,
                                 struct ic_err *err)
{
    cudaEvent_t ev[2];
    float t = 0;
    fill_table(e, NULL, n);
    TRY(cudaMemcpyAsync(e->table, e->table_host, e->plan->batch * sizeof *e->table, cudaMemcpyHostToDevice,
                        e->stream),
        "timing");
    TRY(cudaEventCreate(&ev[0]), "timing");
    TRY(cudaEventCreate(&ev[1]), "timing");
    TRY(launch_steps(e, n, steps / 4 + 1, graphs), "timing");
    TRY(cudaEventRecord(ev[0], e->stream), "timing");
    TRY(launch_steps(e, n, steps, graphs), "timing");
    TRY(cudaEventRecord(ev[1], e->stream), "timing");
    TRY(cudaEventSynchronize(ev[1]), "timing");
    TRY(cudaEventElapsedTime(&t, ev[0], ev[1]), "timing");
    cudaEventDestroy(ev[0]);
    cudaEventDestroy(ev[1]);
    *ms = (double)t / steps;
    return IC_OK;
}

static enum ic_status set_states(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n,
                                 struct ic_err *err)
{
    for (unsigned i = 0; i < n; i++)
        TRY(cudaMemcpy(e->state + i * e->state_stride, io[i].psi, e->plan->psi_bytes,
                       cudaMemcpyHostToDevice),
            "setting a state");
    return IC_OK;
}

static size_t launches(const struct ic_law_exec *e)
{
    return e->launch_count;
}

static bool cu_memory(uint64_t *bytes, uint64_t *total)
{
    size_t f, t;

    if (cudaMemGetInfo(&f, &t) != cudaSuccess)
        return false;
    *bytes = f;
    *total = t;
    return true;
}

#define BACKEND(tag, id, what)                                                                             \
    static enum ic_status pack_##tag(const struct ic_law *law, unsigned threads,                           \
                                     struct ic_law_packed **out, struct ic_err *err)                       \
    {                                                                                                      \
        (void)threads;                                                                                     \
        return ic_cu_pack(law, what, out, err);                                                            \
    }                                                                                                      \
    static const struct ic_law_backend backend_##tag = {                                                   \
        .name = id,                                                                                        \
        .tensor_bytes = what == IC_CU_F32 ? ic_law_tensor_bytes_nchw : ic_cu_tensor_bytes,                 \
        .pack = pack_##tag,                                                                                \
        .unpack = ic_cu_unpack,                                                                            \
        .packed_bytes = cu_packed_bytes,                                                                   \
        .open = cu_open,                                                                                   \
        .close = cu_close,                                                                                 \
        .exec_bytes = cu_exec_bytes,                                                                       \
        .step = cu_step,                                                                                   \
        .run = cu_run,                                                                                     \
        .exec_size = cu_exec_size,                                                                         \
        .memory = cu_memory,                                                                               \
    };

BACKEND(f16, "cuda", IC_CU_F16)
BACKEND(bf16, "cuda-bf16", IC_CU_BF16)
BACKEND(f32, "cuda-fp32", IC_CU_F32)

__attribute__((visibility("default"))) const struct ic_law_plugin ic_law_plugin = {
    .abi = IC_LAW_PLUGIN_ABI,
    .backend_size = sizeof(struct ic_law_backend),
    .plan_size = sizeof(struct ic_law_plan),
    .law_size = sizeof(struct ic_law),
    .backends = {&backend_f16, &backend_bf16, &backend_f32},
    .set_states = set_states,
    .time_steps = time_steps,
    .launches = launches,
};
