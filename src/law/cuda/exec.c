/* A plan made into launches, captured as CUDA graphs, and a step.
 *
 * Operations melt: a norm (with its ELU) and a max pool have no launch of their own, the convolution that
 * reads them does both while loading; INPUT and UPDATE belong to the first and the last convolution.
 * UNET_UNITARY is 15 launches; 13 where the transposed convolutions melt too (fold.cuh: Hopper, large
 * batches). What a launch is cut into is chosen once, when the plan is opened (choose).
 *
 * Nothing is allocated and the host waits for nothing inside a step; a call to `run` waits once, at its
 * end. States lie where state_open put them: a table on the device, sent before each run, says where those
 * of this batch are, so that nothing is copied to form a batch. Deltas are written into a part of the arena
 * that is free when the last operation runs, and are there until the next run. Frames are drawn by the
 * stream of the steps and copied by another one. */
#include "law/cuda/exec.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "law/cuda/frames.h"
#include "law/plugin.h"

#define SLOTS_MAX 256             /* statistics of a sample's tiles that a consumer adds up */
#define SPLIT_BATCH 8             /* split.cuh is for batches up to this */
#define LAST_BLOCKS 4             /* of last.cu's kernel, a multiprocessor */
#define FOLD_CELLS (16 * 64 * 64) /* of a batch: fold.cuh is for so many or more */
#define FOLD_TILES_MAX 256        /* of a thread block there */
#define GRAPH_STEPS 8             /* steps of the long graph */
#define BUCKETS_MAX 24            /* batch sizes that have graphs of their own */
#define TUNE_LAUNCHES 8           /* of a candidate, between two events, */
#define TUNE_ROUND_MS 0.4f        /* or fewer that take so long */
#define TUNE_ROUNDS 3
#define TUNE_CELLS (64 * 64 * 64) /* of a large batch so many are enough to see what is hopeless */
#define TUNE_MOST_MS 800          /* a convolution; then the best so far is taken */
#define TUNE_HOPELESS 1.5f        /* times as slow as the best, after what a lone launch adds of its own */
#define TUNE_LONE_MS 0.006f       /* at most */
#define KNOWN_MAX 1024            /* cuts of convolutions that are remembered */

enum launch_kind { CONV, FOLD, LAST, LSTM, UPDATE, OP32 };

struct launch {
    enum launch_kind kind;
    int config, taps;
    const char *label;
    double flops; /* of one sample */
    union {
        struct ic_cu_conv conv;
        struct ic_cu_fold fold;
        struct ic_cu_last last;
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
    const struct ic_law_plan *plan; /* own_plan */
    struct ic_law_plan own_plan;    /* without the tensors that are never made */
    char *arena;
    float *stats;
    size_t stats_floats;
    char *delta, *delta_own; /* device: of each place of a batch; delta_own: where the arena has no room */
    size_t delta_stride;
    char *expanded; /* device: NF4 weights in 16 bits; NULL: the convolutions expand them */
    size_t expanded_used;
    char *folded; /* device: weights of FOLD */
    size_t folded_used;
    struct ic_cu_io *table, *table_host; /* device; pinned */
    struct ic_law_state **own;           /* places of simulations without a state, made when needed */
    bool started;
    cudaError_t start_error;
    unsigned ran; /* simulations of the last run */
    struct {
        struct ic_cu_frame *table, *table_host; /* device; pinned */
        float *partial;                         /* device */
        char *pool,
            *pool_host; /* device; pinned: min and max of each frame of a batch, then their pixels */
        size_t *at;     /* in the pool */
        struct ic_view_frame *info;
        unsigned n;
        cudaStream_t copies;
        cudaEvent_t drawn, copied;
    } frames;
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

/* Of tiles of 4x8 cells; or, where split.cuh may be, of an eighth of 8x8. */
static int slots_max(const struct ic_law_op *op, unsigned batch)
{
    const unsigned n = batch <= SPLIT_BATCH
                           ? (op->height + 7) / 8 * ((op->width + 7) / 8) * IC_CU_CLUSTER_MAX
                           : (op->height + 3) / 4 * ((op->width + 7) / 8);
    return n < SLOTS_MAX ? (int)n : SLOTS_MAX;
}

static size_t stats_floats(const struct ic_law_op *norm, unsigned batch)
{
    return (size_t)batch * ic_cu_pad(norm->cout) / (unsigned)gran_of(norm) *
           (unsigned)slots_max(norm, batch) * 2;
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
    int cluster_shift;   /* split.cuh */
};

static bool shape(struct ic_cu_conv *c, const struct ic_law_packed *p, struct choice k, int taps)
{
    if (k.config >= IC_CU_SPLIT_FIRST)
        return ic_cu_split_shape(c, k.config - IC_CU_SPLIT_FIRST, taps, k.cluster_shift, p->smem_max) &&
               c->slots <= SLOTS_MAX;
    if (k.config >= IC_CU_CONFIG_COUNT) {
        const struct ic_cu_wide_cut cut = {k.chunk16, k.resident, k.tiles, k.passes, k.buffers};
        return ic_cu_wide_shape(c, k.config - IC_CU_CONFIG_COUNT, taps, &cut, p->smem_max) &&
               c->slots <= SLOTS_MAX;
    }
    return ic_cu_conv_shape(c, k.config, taps, k.chunk16, k.resident, k.tiles, p->smem_max) &&
           c->slots <= SLOTS_MAX;
}

static cudaError_t run_launch(const struct ic_law_exec *e, const struct launch *l, int n)
{
    const enum ic_cu_type type = e->packed->type;
    const int overlap = e->packed->overlap;
    switch (l->kind) {
    case CONV: return ic_cu_conv_run(&l->a.conv, type, l->config, l->taps, n, overlap, e->stream);
    case FOLD: return ic_cu_fold_run(&l->a.fold, type, l->config, n, overlap, e->stream);
    case LAST: return ic_cu_last_run(&l->a.last, type, n, overlap, e->stream);
    case LSTM: return ic_cu_lstm_run(&l->a.lstm, type, n, e->stream);
    case UPDATE: return ic_cu_update_run(&l->a.update, type, n, e->stream);
    case OP32: break;
    }
    return ic_cu_op32_run(&l->a.op32, n, e->stream);
}

struct stopwatch {
    cudaEvent_t ev[2];
    float best, best_sample; /* ms of the whole batch, and of what is enough; < 0: none yet */
};

static bool timed(struct ic_law_exec *e, const struct launch *l, unsigned n, int launches,
                  const cudaEvent_t ev[2], float *ms)
{
    cudaEventRecord(ev[0], e->stream);
    for (int i = 0; i < launches; i++)
        if (run_launch(e, l, (int)n) != cudaSuccess)
            return false;
    cudaEventRecord(ev[1], e->stream);
    if (cudaEventSynchronize(ev[1]) != cudaSuccess || cudaEventElapsedTime(ms, ev[0], ev[1]) != cudaSuccess)
        return false;
    *ms /= (float)launches;
    return true;
}

/* Milliseconds of one launch; < 0: it failed, or a single launch of a part of a large batch shows it to be
 * far from the best. */
static float measure(struct ic_law_exec *e, const struct launch *l, struct stopwatch *w)
{
    const unsigned batch = e->plan->batch, enough = TUNE_CELLS / (e->plan->height * e->plan->width) + 1,
                   n = batch < enough ? batch : enough;
    float mine = -1, sample, ms;
    if (!timed(e, l, n, 1, w->ev, &sample) ||
        !timed(e, l, n, 1, w->ev, &sample)) /* the first one warms up */
        return -1;
    if (w->best >= 0 && sample > TUNE_HOPELESS * w->best_sample + TUNE_LONE_MS)
        return -1;
    const float fit = TUNE_ROUND_MS / sample * (float)n / (float)batch;
    const int launches = fit < 1 ? 1 : fit < TUNE_LAUNCHES ? (int)fit : TUNE_LAUNCHES;
    for (int round = 0; round < TUNE_ROUNDS; round++) {
        if (!timed(e, l, batch, launches, w->ev, &ms))
            return -1;
        mine = mine < 0 || ms < mine ? ms : mine;
    }
    if (w->best < 0 || mine < w->best) {
        w->best = mine;
        w->best_sample = sample;
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
        for (int i = 0; i < 4 * 2 * 3; i++) /* chunk, resident, buffers */
            for (int tiles = 1; tiles <= 32; tiles *= 2)
                for (int passes = 1; passes <= (tiles > 1 ? 1 : column_blocks); passes *= 2) {
                    struct ic_cu_conv t = *c;
                    const struct choice ch = {.config = IC_CU_CONFIG_COUNT + config,
                                              .chunk16 = chunks[i / 6],
                                              .resident = i / 3 % 2,
                                              .tiles = tiles,
                                              .buffers = 1 + i % 3,
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

/* The same of split.cuh's. */
static void each_split(const struct ic_law_exec *e, const struct ic_cu_conv *c, int taps,
                       void (*try_one)(void *, const struct ic_cu_conv *, struct choice), void *ctx)
{
    for (int config = IC_CU_SPLIT_FIRST; config < IC_CU_SPLIT_FIRST + IC_CU_SPLIT_COUNT; config++)
        for (int shift = 0; 1 << shift <= IC_CU_CLUSTER_MAX; shift++) {
            struct ic_cu_conv t = *c;
            const struct choice ch = {.config = config, .cluster_shift = shift};
            if (shape(&t, e->packed, ch, taps) &&
                (long)t.slots * (t.columns / ic_cu_config(config)->columns) * (long)e->plan->batch <=
                    8L * e->packed->sms)
                try_one(ctx, &t, ch);
        }
}

/* Calls try_one for every sensible cut. */
static void each_choice(const struct ic_law_exec *e, const struct ic_cu_conv *c, int taps,
                        void (*try_one)(void *, const struct ic_cu_conv *, struct choice), void *ctx)
{
    static const int chunks[] = {0, 16, 8, 4, 2};
    if (e->packed->wide)
        each_wide(e, c, taps, try_one, ctx);
    if (e->packed->wide && e->plan->batch <= SPLIT_BATCH)
        each_split(e, c, taps, try_one, ctx);
    for (int config = 0; config < IC_CU_CONFIG_COUNT; config++) {
        const struct ic_cu_config *k = ic_cu_config(config);
        if (k->columns >= 2 * c->columns && k->columns > 16 && config != 0)
            continue;
        for (size_t i = 0; i < sizeof chunks / sizeof chunks[0]; i++)
            for (int resident = 0; resident <= (i == 0); resident++)
                for (int tiles = 1; tiles <= 256; tiles *= 2) {
                    struct ic_cu_conv t = *c;
                    const struct choice ch = {config, chunks[i], resident, tiles, 1, 1, 0};
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
    struct stopwatch watch;
    float best_ms;
    struct choice best;
    int tried;
    int64_t until; /* ic_now_ns */
};

static void time_one(void *ctx, const struct ic_cu_conv *c, struct choice ch)
{
    struct tuning *t = ctx;
    if (t->best_ms >= 0 && ic_now_ns() > t->until)
        return;
    const struct launch l = {.kind = CONV, .config = ch.config, .taps = t->taps, .a.conv = *c};
    const float ms = measure(t->e, &l, &t->watch);
    t->tried++;
    if (ms >= 0 && (t->best_ms < 0 || ms < t->best_ms)) {
        t->best_ms = ms;
        t->best = ch;
    }
}

/* IC_LAW_CUDA_CUT=N, for tests: of every convolution the N-th of its cuts or so instead of the fastest (all
 * must compute the same), with an even N one of wide.cuh's or split.cuh's if there is any. */
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
    int key[19];
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
                                  c->in[0].load, c->in[1].load, c->in[0].cpad, c->stats_gran,
                                  c->in[0].channels, c->in[0].gran, c->in[0].group_size, c->in[1].channels,
                                  c->in[1].gran}};
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
    struct tuning t = {.e = e,
                       .taps = l->taps,
                       .best_ms = -1,
                       .watch.best = -1,
                       .until = ic_now_ns() + TUNE_MOST_MS * (int64_t)1000000};
    struct known k = key_of(e, l);
    if (recall(&k) && shape(&l->a.conv, e->packed, k.choice, l->taps)) {
        l->config = k.choice.config;
        return IC_OK;
    }
    TRY(cudaEventCreate(&t.watch.ev[0]), "an event");
    TRY(cudaEventCreate(&t.watch.ev[1]), "an event");
    if (!pick(e, l, &t))
        each_choice(e, &l->a.conv, l->taps, time_one, &t);
    cudaEventDestroy(t.watch.ev[0]);
    cudaEventDestroy(t.watch.ev[1]);
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
                "buffers %d passes %d cluster %d blocks %dx%d smem %d, of %d\n",
                l->label, l->a.conv.c16 * 16, l->a.conv.columns, l->taps, (double)t.best_ms * 1e3,
                l->flops * e->plan->batch / ((double)t.best_ms * 1e9), t.best.config,
                ic_cu_config(l->config)->rows, ic_cu_config(l->config)->columns, t.best.chunk16,
                t.best.resident, t.best.tiles, t.best.buffers, t.best.passes, 1 << t.best.cluster_shift,
                l->a.conv.slots,
                (l->a.conv.columns + ic_cu_config(l->config)->columns - 1) /
                    ic_cu_config(l->config)->columns,
                l->a.conv.smem, t.tried);
    return IC_OK;
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
                             .blocks = LAST_BLOCKS * e->packed->sms};
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
    e->stats_floats += stats_floats(norm, e->plan->batch);
}

/* ---- Transposed convolutions that are folded into the next one: fold.cuh -------------------------- */

/* Op `at` is a transposed convolution that fold.cuh makes one with the next op. IC_LAW_CUDA_FOLD=0, 1, for
 * tests: never, in batches of any size. */
static bool folds(const struct ic_law_packed *packed, const struct ic_law_plan *p, size_t at)
{
    const struct ic_law_op *up = &p->ops[at], *conv = up + 1, *norm = up + 2;
    const struct ic_law_tensor *t = p->tensors;
    const char *fold = getenv("IC_LAW_CUDA_FOLD");
    const bool large = fold ? *fold != '0' : (size_t)p->batch * p->height * p->width >= FOLD_CELLS;
    return packed->wide && large && at + 2 < p->op_count && up->kind == IC_LAW_OP_CONVT2X2 &&
           conv->kind == IC_LAW_OP_CONV3X3 && conv->in[0] == up->out && conv->in[1] >= 0 &&
           conv->bias < 0 && conv->act == IC_LAW_ACT_NONE && t[up->out].last == at + 1 &&
           !((t[up->in[0]].stride | t[conv->in[1]].stride | t[conv->out].stride) >> 31) &&
           norm->kind == IC_LAW_OP_GROUPNORM && norm->in[0] == conv->out && gran_of(norm) == 8 &&
           up->cin[0] % 16 == 0 && conv->cin[1] % 16 == 0 && conv->cout % 32 == 0;
}

static struct ic_cu_fold_source fold_source(const struct ic_law_op *up)
{
    return (struct ic_cu_fold_source){.cout = (int)up[1].cout,
                                      .low = (int)up->cin[0],
                                      .up = (int)up[1].cin[0],
                                      .skip = (int)up[1].cin[1]};
}

/* What this back end runs of a plan: an up-sampled tensor that is never made has no place. */
static void fold_plan(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                      struct ic_law_plan *out)
{
    *out = *plan;
    for (size_t i = 0; i < plan->op_count; i++)
        if (folds(packed, plan, i))
            ic_law_plan_bypass(out, i);
}

/* Bytes of the folded weights; 0: op `at` is not the first of two that are one. */
static size_t folded_bytes(const struct ic_law_plan *p, size_t at)
{
    const struct ic_law_op *op = &p->ops[at];
    if (op->kind != IC_LAW_OP_CONVT2X2 || op->out >= 0)
        return 0;
    const struct ic_cu_fold_source s = fold_source(op);
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
    struct ic_cu_fold_source s = fold_source(up);
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

static bool shape_fold(struct launch *l, const struct ic_law_packed *p, struct choice k)
{
    l->config = k.config;
    return ic_cu_fold_shape(&l->a.fold, k.config, k.tiles, p->smem_max) && l->a.fold.slots <= SLOTS_MAX;
}

/* Times each cut; what is chosen is remembered as convolutions' cuts are. IC_LAW_CUDA_CUT as there. */
static enum ic_status choose_fold(struct ic_law_exec *e, struct launch *l, struct ic_err *err)
{
    const struct ic_cu_fold *a = &l->a.fold;
    const char *cut = getenv("IC_LAW_CUDA_CUT");
    const int taps = 2; /* no convolution has so many: the keys are apart */
    struct known k = {.key = {e->packed->device, (int)e->packed->type, 0, taps, a->low16, a->skip16,
                              a->cpad, a->height, a->width, (int)e->plan->batch, a->in[0].group_size,
                              a->in[1].group_size}};
    struct stopwatch watch = {.best = -1};
    float best_ms = -1;
    unsigned n = cut ? (unsigned)strtoul(cut, NULL, 10) : 0;
    if (recall(&k) && shape_fold(l, e->packed, k.choice))
        return IC_OK;
    TRY(cudaEventCreate(&watch.ev[0]), "an event");
    TRY(cudaEventCreate(&watch.ev[1]), "an event");
    for (int config = 0; config < IC_CU_FOLD_COUNT; config++)
        for (int tiles = 1; tiles <= FOLD_TILES_MAX; tiles *= 2) {
            const struct choice c = {.config = config, .tiles = tiles};
            struct launch t = *l;
            if (!shape_fold(&t, e->packed, c) ||
                (tiles > 1 && 2 * ic_cu_fold_blocks(&t.a.fold) * (long)e->plan->batch < e->packed->sms))
                continue; /* or fewer, longer blocks would leave multiprocessors idle */
            const float ms = cut ? (float)(n++ * 2654435761u % 1024) : measure(e, &t, &watch);
            if (ms < 0 || (best_ms >= 0 && ms >= best_ms))
                continue;
            best_ms = ms;
            k.choice = c;
        }
    cudaEventDestroy(watch.ev[0]);
    cudaEventDestroy(watch.ev[1]);
    cudaError_t bad = cudaGetLastError();
    if (best_ms < 0)
        return bad != cudaSuccess
                   ? ic_cu_fail(err, bad, l->label)
                   : ic_fail(err, IC_TOO_LARGE, "%s does not fit the GPU's shared memory", l->label);
    remember(&k);
    (void)shape_fold(l, e->packed, k.choice);
    if (getenv("IC_LAW_CUDA_VERBOSE"))
        fprintf(stderr, "%-34s %3d + %3d -> %3d: %8.2f us %7.1f TFLOP/s  fold %d tiles %d smem %d\n",
                l->label, a->low16 * 16, a->skip16 * 16, a->cpad, (double)best_ms * 1e3,
                l->flops * e->plan->batch / ((double)best_ms * 1e9), l->config, k.choice.tiles, a->smem);
    return IC_OK;
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
        s = choose_fold(e, l, err);
    v->slots = l->a.fold.slots;
    return s;
}

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
            const bool folded = folded_bytes(p, at) > 0;
            enum ic_status s = folded ? add_fold(e, at, err) : add_conv(e, at, &used, err);
            if (folded)
                used = 3;
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

/* ---- States ---------------------------------------------------------------------------------------- */

struct ic_law_state {
    float *psi, *h, *c; /* device, one allocation */
    size_t psi_bytes, half;
};

/* Through pinned memory, and from there to the host's copy at once: a copy that breaks off must not leave
 * half a state there. As large as the largest state so far, for the process. */
static struct {
    pthread_mutex_t lock;
    char *p;
    size_t bytes;
} bounce = {.lock = PTHREAD_MUTEX_INITIALIZER};

static cudaError_t grow_bounce(size_t bytes)
{
    cudaError_t bad = cudaSuccess;
    if (bounce.bytes < bytes) {
        cudaFreeHost(bounce.p);
        bounce.p = NULL;
        bad = cudaMallocHost((void **)&bounce.p, bytes);
        bounce.bytes = bad == cudaSuccess ? bytes : 0;
    }
    return bad;
}

static void cu_state_close(struct ic_law_state **state)
{
    if (!*state)
        return;
    cudaFree((*state)->psi);
    free(*state);
    *state = NULL;
}

static enum ic_status cu_state_open(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                                    const struct ic_law_io *host, struct ic_law_state **out,
                                    struct ic_err *err)
{
    const size_t bytes = ic_law_state_bytes(plan->law, plan->height, plan->width);
    struct ic_law_state *s = calloc(1, sizeof *s);
    (void)packed, (void)host;
    *out = NULL;
    if (!s)
        return ic_fail(err, IC_OOM, "no memory for a state");
    cudaError_t bad = cudaMalloc((void **)&s->psi, bytes);
    if (bad == cudaSuccess && getenv("IC_LAW_CUDA_POISON"))
        bad = cudaMemset(s->psi, 0xFF, bytes);
    if (bad != cudaSuccess) {
        cu_state_close(&s);
        return ic_cu_fail(err, bad, "room for a state");
    }
    s->psi_bytes = plan->psi_bytes;
    s->half = plan->memory_bytes / 2;
    if (s->half) {
        s->h = s->psi + s->psi_bytes / sizeof(float);
        s->c = s->h + s->half / sizeof(float);
    }
    *out = s;
    return IC_OK;
}

/* Copies on the default stream, which waits for no other: by the contract none of them uses the state. */
static enum ic_status cu_state_put(struct ic_law_state *s, const struct ic_law_io *host, struct ic_err *err)
{
    const size_t bytes = s->psi_bytes + 2 * s->half;
    pthread_mutex_lock(&bounce.lock);
    cudaError_t bad = grow_bounce(bytes);
    if (bad == cudaSuccess) {
        memcpy(bounce.p, host->psi, s->psi_bytes);
        if (s->half) {
            memcpy(bounce.p + s->psi_bytes, host->h, s->half);
            memcpy(bounce.p + s->psi_bytes + s->half, host->c, s->half);
        }
        bad = cudaMemcpy(s->psi, bounce.p, bytes, cudaMemcpyHostToDevice);
    }
    pthread_mutex_unlock(&bounce.lock);
    TRY(bad, "a state to the GPU");
    return IC_OK;
}

static enum ic_status cu_state_get(struct ic_law_state *s, const struct ic_law_io *host, struct ic_err *err)
{
    const size_t bytes = s->psi_bytes + 2 * s->half;
    pthread_mutex_lock(&bounce.lock);
    cudaError_t bad = grow_bounce(bytes);
    if (bad == cudaSuccess)
        bad = cudaMemcpy(bounce.p, s->psi, bytes, cudaMemcpyDeviceToHost);
    if (bad == cudaSuccess) {
        memcpy(host->psi, bounce.p, s->psi_bytes);
        if (s->half) {
            memcpy(host->h, bounce.p + s->psi_bytes, s->half);
            memcpy(host->c, bounce.p + s->psi_bytes + s->half, s->half);
        }
    }
    pthread_mutex_unlock(&bounce.lock);
    TRY(bad, "a state from the GPU");
    return IC_OK;
}

static enum ic_status cu_delta(struct ic_law_exec *e, unsigned place, float *out, struct ic_err *err)
{
    IC_ASSERT(place < e->ran && e->table_host[place].delta);
    TRY(cudaMemcpy(out, e->table_host[place].delta, e->plan->psi_bytes, cudaMemcpyDeviceToHost),
        "a delta from the GPU");
    return IC_OK;
}

/* ---- Frames ---------------------------------------------------------------------------------------- */

static size_t range_bytes(const struct ic_law_plan *p)
{
    return (p->batch * 2 * sizeof(float) + 255) / 256 * 256;
}

static size_t pool_bytes(const struct ic_law_plan *p)
{
    return range_bytes(p) + ic_law_frames_bytes(p->height, p->width, p->batch);
}

/* Places each frame in the pool. */
static enum ic_status lay_out(struct ic_law_exec *e, const struct ic_law_draw *draws, unsigned n,
                              size_t *used, struct ic_err *err)
{
    const struct ic_law_plan *p = e->plan;
    const struct ic_law_shape shape = {p->height, p->width, p->law->d};
    *used = range_bytes(p);
    for (unsigned i = 0; i < n; i++) {
        const struct ic_law_draw *d = &draws[i];
        struct ic_view_frame *info = &e->frames.info[i];
        if (!ic_view_of_one_cell(d->request.view))
            return ic_fail(err, IC_BAD_REQUEST, "the GPU does not draw %s", ic_view_name(d->request.view));
        enum ic_status s = ic_view_plan(&d->request, shape, info, err);
        if (s != IC_OK)
            return s;
        IC_ASSERT(d->place < (int)e->ran);
        e->frames.at[i] = *used;
        e->frames.table_host[i] = (struct ic_cu_frame){
            .psi = d->state->psi,
            .delta = d->place >= 0 ? e->table_host[d->place].delta : NULL,
            .out = e->frames.pool + *used,
            .view = (int)d->request.view,
            .f32 = d->request.encoding == IC_VIEW_F32,
            .x = (int)d->request.roi.x,
            .y = (int)d->request.roi.y,
            .w = (int)info->shape[1],
            .h = (int)info->shape[0],
            .grid_w = (int)p->width,
            .d = (int)p->law->d,
        };
        *used += (info->bytes + 3) / 4 * 4;
    }
    return *used <= pool_bytes(p) ? IC_OK : ic_fail(err, IC_TOO_LARGE, "too many frames at once");
}

static enum ic_status cu_draw(struct ic_law_exec *e, const struct ic_law_draw *draws, unsigned n,
                              struct ic_err *err)
{
    size_t used;
    IC_ASSERT(n >= 1 && n <= e->plan->batch && !e->started);
    if (e->frames.n) /* its table and its pixels are about to be overwritten */
        TRY(cudaEventSynchronize(e->frames.copied), "frames");
    e->frames.n = 0;
    enum ic_status s = lay_out(e, draws, n, &used, err);
    if (s != IC_OK)
        return s;
    TRY(cudaMemcpyAsync(e->frames.table, e->frames.table_host, n * sizeof *e->frames.table,
                        cudaMemcpyHostToDevice, e->stream),
        "frames");
    TRY(ic_cu_frames_run(e->frames.table, (float *)(void *)e->frames.pool, e->frames.partial, (int)n,
                         e->stream),
        "frames");
    TRY(cudaEventRecord(e->frames.drawn, e->stream), "frames");
    TRY(cudaStreamWaitEvent(e->frames.copies, e->frames.drawn, 0), "frames");
    TRY(cudaMemcpyAsync(e->frames.pool_host, e->frames.pool, used, cudaMemcpyDeviceToHost,
                        e->frames.copies),
        "frames");
    TRY(cudaEventRecord(e->frames.copied, e->frames.copies), "frames");
    e->frames.n = n;
    return IC_OK;
}

static enum ic_status cu_frame(struct ic_law_exec *e, unsigned i, void *out, size_t size,
                               struct ic_view_frame *frame, struct ic_err *err)
{
    IC_ASSERT(i < e->frames.n && size >= e->frames.info[i].bytes);
    TRY(cudaEventSynchronize(e->frames.copied), "frames");
    const float *range = (const float *)(const void *)e->frames.pool_host + 2 * i;
    memcpy(out, e->frames.pool_host + e->frames.at[i], e->frames.info[i].bytes);
    frame->min = range[0];
    frame->max = range[1];
    return IC_OK;
}

static enum ic_status open_frames(struct ic_law_exec *e, struct ic_err *err)
{
    const size_t n = e->plan->batch;
    e->frames.at = calloc(n, sizeof *e->frames.at);
    e->frames.info = calloc(n, sizeof *e->frames.info);
    if (!e->frames.at || !e->frames.info)
        return ic_fail(err, IC_OOM, "no memory for frames");
    TRY(cudaMalloc((void **)&e->frames.table, n * sizeof *e->frames.table), "room for frames");
    TRY(cudaMalloc((void **)&e->frames.partial, n * IC_CU_FRAME_BLOCKS * 2 * sizeof(float)),
        "room for frames");
    TRY(cudaMalloc((void **)&e->frames.pool, pool_bytes(e->plan)), "room for frames");
    TRY(cudaMallocHost((void **)&e->frames.table_host, n * sizeof *e->frames.table), "pinned memory");
    TRY(cudaMallocHost((void **)&e->frames.pool_host, pool_bytes(e->plan)), "pinned memory");
    TRY(cudaStreamCreateWithFlags(&e->frames.copies, cudaStreamNonBlocking), "a stream");
    TRY(cudaEventCreateWithFlags(&e->frames.drawn, cudaEventDisableTiming), "an event");
    TRY(cudaEventCreateWithFlags(&e->frames.copied, cudaEventDisableTiming), "an event");
    return IC_OK;
}

static void close_frames(struct ic_law_exec *e)
{
    if (e->frames.copies)
        cudaStreamSynchronize(e->frames.copies);
    cudaFree(e->frames.table);
    cudaFree(e->frames.partial);
    cudaFree(e->frames.pool);
    cudaFreeHost(e->frames.table_host);
    cudaFreeHost(e->frames.pool_host);
    if (e->frames.drawn)
        cudaEventDestroy(e->frames.drawn);
    if (e->frames.copied)
        cudaEventDestroy(e->frames.copied);
    if (e->frames.copies)
        cudaStreamDestroy(e->frames.copies);
    free(e->frames.at);
    free(e->frames.info);
}

/* ---- A step ---------------------------------------------------------------------------------------- */

static cudaError_t enqueue(const struct ic_law_exec *e, int n)
{
    cudaError_t bad = cudaSuccess;
    for (size_t i = 0; i < e->launch_count && bad == cudaSuccess; i++)
        bad = run_launch(e, &e->launches[i], n);
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

/* io NULL: places without a simulation, for timing; before there are any, where deltas go. */
static void fill_table(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n)
{
    const struct ic_law_plan *p = e->plan;
    for (unsigned i = 0; i < p->batch; i++) {
        float *delta = (float *)(void *)(e->delta + i * e->delta_stride);
        struct ic_cu_io *t = &e->table_host[i];
        memset(t, 0, sizeof *t);
        if (i >= n)
            continue;
        const struct ic_law_state *state = io && io[i].state ? io[i].state : e->own[i];
        t->psi = state ? state->psi : delta;
        t->h = state ? state->h : NULL;
        t->c = state ? state->c : NULL;
        t->delta = io && io[i].delta ? delta : NULL;
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

static cudaError_t begin(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n, unsigned steps)
{
    e->runs++;
    fill_table(e, io, n);
    const cudaError_t bad = cudaMemcpyAsync(e->table, e->table_host, e->plan->batch * sizeof *e->table,
                                            cudaMemcpyHostToDevice, e->stream);
    return bad == cudaSuccess ? launch_steps(e, n, steps, e->graphs) : bad;
}

/* Places for the first n, where the io has no states. */
static enum ic_status own_places(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n,
                                 struct ic_err *err)
{
    enum ic_status s = IC_OK;
    for (unsigned i = 0; i < n && s == IC_OK; i++) {
        if (e->own[i] || (io && io[i].state))
            continue;
        if ((s = cu_state_open(e->packed, e->plan, io, &e->own[i], err)) == IC_OK)
            e->bytes += ic_law_state_bytes(e->plan->law, e->plan->height, e->plan->width);
    }
    return s;
}

/* Simulations without a state are brought and taken back by `run`. */
static void cu_start(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n, unsigned steps)
{
    for (unsigned i = 0; i < n; i++)
        if (!io[i].state)
            return;
    e->started = true;
    e->start_error = begin(e, io, n, steps);
}

static enum ic_status cu_run(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n, unsigned steps,
                             struct ic_err *err)
{
    enum ic_status s = IC_OK;
    IC_ASSERT(n >= 1 && n <= e->plan->batch && steps >= 1);
    if (!e->started) {
        s = own_places(e, io, n, err);
        for (unsigned i = 0; i < n && s == IC_OK; i++)
            if (!io[i].state)
                s = cu_state_put(e->own[i], &io[i], err);
        if (s != IC_OK)
            return s;
        e->start_error = begin(e, io, n, steps);
    }
    e->started = false;
    e->ran = n;
    TRY(e->start_error, "a step");
    TRY(cudaStreamSynchronize(e->stream), "a step");
    if (fault_lost(e))
        return ic_fail(err, IC_UNAVAILABLE,
                       "a step: the GPU is lost (a fault that IC_LAW_CUDA_FAULT asks for)");
    for (unsigned i = 0; i < n && s == IC_OK; i++)
        if (!io[i].state) {
            s = cu_state_get(e->own[i], &io[i], err);
            if (s == IC_OK && io[i].delta)
                s = cu_delta(e, i, io[i].delta, err);
        }
    return s;
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
    close_frames(e);
    for (unsigned i = 0; e->own && i < e->plan->batch; i++)
        cu_state_close(&e->own[i]);
    free(e->own);
    cudaFree(e->arena);
    cudaFree(e->stats);
    cudaFree(e->delta_own);
    cudaFree(e->expanded);
    cudaFree(e->folded);
    cudaFree(e->table);
    cudaFreeHost(e->table_host);
    if (e->stream)
        cudaStreamDestroy(e->stream);
    free(e);
    *exec = NULL;
}

/* Bytes that a plan takes on the device besides its arena, and where its deltas lie. */
struct layout {
    size_t stats;                             /* floats */
    size_t delta_stride, delta_at, delta_own; /* delta_at: in the arena; delta_own: bytes, else 0 */
    size_t expanded, folded;                  /* bytes */
    size_t all;                               /* bytes, the arena included */
};

/* Bytes of the arena that no tensor uses while the last convolution or UPDATE writes delta; SIZE_MAX: there
 * are none. */
static size_t free_at_the_end(const struct ic_law_plan *p, size_t want)
{
    const unsigned from = p->op_count > 2 ? (unsigned)p->op_count - 2 : 0;
    size_t at = 0;
    for (bool moved = true; moved;) {
        moved = false;
        for (size_t i = 0; i < p->tensor_count; i++) {
            const struct ic_law_tensor *t = &p->tensors[i];
            const size_t end = t->offset + t->stride * p->batch;
            if (t->last >= from && t->offset < at + want && at < end) {
                at = (end + 255) / 256 * 256;
                moved = true;
            }
        }
    }
    return at + want <= p->arena_bytes ? at : SIZE_MAX;
}

static struct layout layout_of(const struct ic_law_packed *packed, const struct ic_law_plan *p)
{
    struct layout l = {.stats = 64};
    for (size_t i = 0; i < p->op_count; i++)
        if (p->ops[i].kind == IC_LAW_OP_GROUPNORM || p->ops[i].kind == IC_LAW_OP_RMSNORM)
            l.stats += stats_floats(&p->ops[i], p->batch);
    for (size_t i = 0; i < packed->op_count; i++) {
        const size_t folded = folded_bytes(p, i);
        l.folded += folded;
        if (folded)
            i++; /* neither weights are read */
        else
            l.expanded += packed->ops[i].expanded;
    }
    /* small plans stay small, where that costs no more than a little time: not where split.cuh runs */
    if (l.expanded > p->arena_bytes && !(packed->wide && p->batch <= SPLIT_BATCH))
        l.expanded = 0;
    l.delta_stride = (p->psi_bytes + 255) / 256 * 256;
    l.delta_at = free_at_the_end(p, l.delta_stride * p->batch);
    l.delta_own = l.delta_at == SIZE_MAX ? l.delta_stride * p->batch : 0;
    l.all =
        p->arena_bytes + l.stats * sizeof(float) + l.delta_own + l.expanded + l.folded + pool_bytes(p) +
        (sizeof(struct ic_cu_io) + sizeof(struct ic_cu_frame) + IC_CU_FRAME_BLOCKS * 2 * sizeof(float)) *
            p->batch;
    return l;
}

static enum ic_status allocate(struct ic_law_exec *e, struct ic_err *err)
{
    const struct ic_law_plan *p = e->plan;
    const struct layout l = layout_of(e->packed, p);
    const size_t stats = l.stats;
    if (!(e->own = calloc(p->batch, sizeof(void *))))
        return ic_fail(err, IC_OOM, "no memory for a plan's state");
    TRY(cudaMalloc((void **)&e->arena, p->arena_bytes), "an arena");
    TRY(cudaMalloc((void **)&e->stats, stats * sizeof(float)), "an arena");
    if (l.delta_own)
        TRY(cudaMalloc((void **)&e->delta_own, l.delta_own), "room for deltas");
    if (l.expanded)
        TRY(cudaMalloc((void **)&e->expanded, l.expanded), "room for weights");
    if (l.folded)
        TRY(cudaMalloc((void **)&e->folded, l.folded), "room for weights");
    e->delta = l.delta_own ? e->delta_own : e->arena + l.delta_at;
    e->delta_stride = l.delta_stride;
    TRY(cudaMalloc((void **)&e->table, p->batch * sizeof *e->table), "an arena");
    TRY(cudaMallocHost((void **)&e->table_host, p->batch * sizeof *e->table), "pinned memory");
    TRY(cudaStreamCreateWithFlags(&e->stream, cudaStreamNonBlocking), "a stream");
    enum ic_status s = open_frames(e, err);
    if (s != IC_OK)
        return s;
    e->bytes = l.all;
    /* Every byte is written before it is read; a test may ask for NaNs to see that. */
    const int fill = getenv("IC_LAW_CUDA_POISON") ? 0xFF : 0;
    TRY(cudaMemset(e->arena, fill, p->arena_bytes), "an arena");
    TRY(cudaMemset(e->stats, fill, stats * sizeof(float)), "an arena");
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
    fold_plan(packed, plan, &e->own_plan);
    e->plan = plan = &e->own_plan;
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
    struct ic_law_plan own;
    fold_plan(packed, plan, &own);
    return layout_of(packed, &own).all + sizeof(struct ic_law_exec);
}

/* ---- The plug-in's table --------------------------------------------------------------------------- */

static enum ic_status time_steps(struct ic_law_exec *e, unsigned n, unsigned steps, bool graphs, double *ms,
                                 struct ic_err *err)
{
    cudaEvent_t ev[2];
    float t = 0;
    enum ic_status s = own_places(e, NULL, n, err);
    if (s != IC_OK)
        return s;
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
    enum ic_status s = own_places(e, NULL, n, err);
    for (unsigned i = 0; i < n && s == IC_OK; i++)
        s = cu_state_put(e->own[i], &io[i], err);
    return s;
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
        .state_open = cu_state_open,                                                                       \
        .state_close = cu_state_close,                                                                     \
        .state_put = cu_state_put,                                                                         \
        .state_get = cu_state_get,                                                                         \
        .start = cu_start,                                                                                 \
        .draw = cu_draw,                                                                                   \
        .frame = cu_frame,                                                                                 \
        .delta = cu_delta,                                                                                 \
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
