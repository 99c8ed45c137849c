/* What each convolution is cut into: every sensible cut is timed once, when a plan is opened; of small plans the few
 * best of each once more within the whole step, as what is fastest beside itself need not be beside the others (a
 * block that leaves shared memory to the next launch's hides that one's start). See exec_int.h. */
#include "law/cuda/exec_int.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

#define FOLD_TILES_MAX 256 /* of a thread block there */
#define SHARE_SHIFT 1      /* log2 of the blocks that share weights in tall.cuh, fold.cuh */
#define TUNE_LAUNCHES 8    /* of a candidate, between two events, */
#define TUNE_ROUND_MS 0.4f /* or fewer that take so long */
#define TUNE_ROUNDS 3
#define TUNE_CELLS (64 * 64 * 64) /* of a large batch so many are enough to see what is hopeless */
#define TUNE_MOST_MS 800          /* a convolution; then the best so far is taken */
#define TUNE_HOPELESS 1.5f        /* times as slow as the best, after what a lone launch adds of its own */
#define TUNE_LONE_MS 0.006f       /* at most */
#define KNOWN_MAX 1024            /* convolutions whose cuts are remembered, */
#define KEPT 6                    /* so many of each until a whole step has been timed with them */
#define STEPS 4                   /* of the graph that is timed */
#define PASSES 2                  /* over all launches: what is best for one depends on its neighbours */
#define STEP_MOST_MS 1.0f         /* steps that are longer are not: launches matter little there */
#define STEP_ROUND_MS 1.0f        /* of steps between two events */
#define STEP_GAIN 0.998f          /* at least, of what it took before */
#define STEPS_MOST_MS 1000        /* a plan */

struct choice {
    int config, chunk16, resident, tiles;
    int buffers, passes; /* wide.cuh */
    int cluster_shift;   /* split.cuh */
};

static bool shape(struct ic_cu_conv *c, const struct ic_law_exec *e, struct choice k, int taps)
{
    const int smem_max = e->packed->smem_max, slots_max = SLOTS_MAX(e->plan->batch);
    if (k.config >= IC_CU_TALL_FIRST)
        return ic_cu_tall_shape(c, k.config - IC_CU_TALL_FIRST, taps, k.tiles, k.cluster_shift, smem_max) &&
               c->slots <= slots_max;
    if (k.config >= IC_CU_SPLIT_FIRST)
        return ic_cu_split_shape(c, k.config - IC_CU_SPLIT_FIRST, taps, k.cluster_shift, smem_max) &&
               c->slots <= slots_max;
    if (k.config >= IC_CU_CONFIG_COUNT) {
        const struct ic_cu_wide_cut cut = {k.chunk16, k.resident, k.tiles, k.passes, k.buffers};
        return ic_cu_wide_shape(c, k.config - IC_CU_CONFIG_COUNT, taps, &cut, smem_max) &&
               c->slots <= slots_max;
    }
    return ic_cu_conv_shape(c, k.config, taps, k.chunk16, k.resident, k.tiles, smem_max) &&
           c->slots <= slots_max;
}

cudaError_t ic_cu_launch_run(const struct ic_law_exec *e, const struct launch *l, int n)
{
    const enum ic_cu_type type = e->packed->type;
    const int overlap = e->packed->overlap;
    switch (l->kind) {
    case CONV: return ic_cu_conv_run(&l->a.conv, type, l->config, l->taps, n, overlap, e->stream);
    case FOLD:
        return l->a.fold.split ? ic_cu_split_fold_run(&l->a.fold, type, l->config, n, overlap, e->stream)
                               : ic_cu_fold_run(&l->a.fold, type, l->config, n, overlap, e->stream);
    case LAST: return ic_cu_last_run(&l->a.last, type, n, overlap, e->stream);
    case LSTM: return ic_cu_lstm_run(&l->a.lstm, type, n, e->stream);
    case UPDATE: return ic_cu_update_run(&l->a.update, type, n, e->stream);
    case OP32: break;
    }
    return ic_cu_op32_run(&l->a.op32, n, e->stream);
}

struct stopwatch {
    cudaEvent_t ev[2];
    float best, best_sample; /* ms of the whole batch, and of a lone launch for best_n; < 0: none yet */
    unsigned best_n;
};

static bool timed(struct ic_law_exec *e, const struct launch *l, unsigned n, int launches,
                  const cudaEvent_t ev[2], float *ms)
{
    cudaEventRecord(ev[0], e->stream);
    for (int i = 0; i < launches; i++)
        if (ic_cu_launch_run(e, l, (int)n) != cudaSuccess)
            return false;
    cudaEventRecord(ev[1], e->stream);
    if (cudaEventSynchronize(ev[1]) != cudaSuccess || cudaEventElapsedTime(ms, ev[0], ev[1]) != cudaSuccess)
        return false;
    *ms /= (float)launches;
    return true;
}

/* Thread blocks of a simulation. */
static long blocks_of(const struct launch *l)
{
    if (l->kind == FOLD)
        return ic_cu_fold_blocks(&l->a.fold);
    const struct ic_cu_conv *c = &l->a.conv;
    const int columns = ic_cu_config(l->config)->columns;
    return (long)c->slots * ((c->columns + columns - 1) / columns / (c->passes > 1 ? c->passes : 1));
}

/* Milliseconds of one launch; < 0: it failed, or a single launch of a part of a large batch shows it to be
 * far from the best. */
static float measure(struct ic_law_exec *e, const struct launch *l, struct stopwatch *w)
{
    const unsigned batch = e->plan->batch, enough = TUNE_CELLS / (e->plan->height * e->plan->width) + 1;
    /* Where a part leaves multiprocessors idle it shows nothing. Those of conv.cuh are slow and many. */
    const bool idle = (l->kind == FOLD || l->config >= IC_CU_CONFIG_COUNT) &&
                      blocks_of(l) * (long)enough < e->packed->sms;
    const unsigned n = batch < enough || idle ? batch : enough;
    float mine = -1, sample, ms;
    if (!timed(e, l, n, 1, w->ev, &sample) ||
        !timed(e, l, n, 1, w->ev, &sample)) /* the first one warms up */
        return -1;
    if (w->best >= 0 &&
        sample > TUNE_HOPELESS * w->best_sample * (float)n / (float)w->best_n + TUNE_LONE_MS)
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
        w->best_n = n;
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
                    if (ch.chunk16 >= c->c16 || !shape(&t, e, ch, taps))
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
            if (shape(&t, e, ch, taps) &&
                (long)t.slots * (t.columns / ic_cu_config(config)->columns) * (long)e->plan->batch <=
                    8L * e->packed->sms)
                try_one(ctx, &t, ch);
        }
}

/* IC_LAW_CUDA_SHARE=1, for tests: in tall.cuh and fold.cuh blocks share weights wherever they can. */
static bool always_shared(void)
{
    const char *share = getenv("IC_LAW_CUDA_SHARE");
    return share && *share == '1';
}

/* The same of tall.cuh's; whether there is any. */
static bool each_tall(const struct ic_law_exec *e, const struct ic_cu_conv *c, int taps,
                      void (*try_one)(void *, const struct ic_cu_conv *, struct choice), void *ctx)
{
    bool any = false;
    for (int config = IC_CU_TALL_FIRST; config < IC_CU_TALL_FIRST + IC_CU_TALL_COUNT; config++)
        for (int tiles = 1; tiles <= 32; tiles *= 2) {
            struct ic_cu_conv t = *c;
            const struct choice ch = {.config = config, .tiles = tiles};
            if (!shape(&t, e, ch, taps))
                continue;
            any = true;
            const int column_blocks = t.columns / ic_cu_config(config)->columns;
            if (tiles > 1 && 2L * t.slots * column_blocks * (long)e->plan->batch < e->packed->sms)
                break; /* fewer, longer blocks would leave multiprocessors idle */
            struct choice shared = ch;
            shared.cluster_shift = SHARE_SHIFT;
            const bool can_share = shape(&t, e, shared, taps);
            if (can_share)
                try_one(ctx, &t, shared);
            if (!(can_share && always_shared()) && shape(&t, e, ch, taps))
                try_one(ctx, &t, ch);
        }
    return any;
}

/* Calls try_one for every sensible cut. */
static void each_choice(const struct ic_law_exec *e, const struct ic_cu_conv *c, int taps,
                        void (*try_one)(void *, const struct ic_cu_conv *, struct choice), void *ctx)
{
    static const int chunks[] = {0, 16, 8, 4, 2};
    const char *tall = getenv("IC_LAW_CUDA_TALL"); /* 0, 1, for tests: never, wherever it can be */
    if (e->packed->wide && (!tall || *tall == '1') && each_tall(e, c, taps, try_one, ctx) && tall)
        return;
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
                    if (chunks[i] >= c->c16 || !shape(&t, e, ch, taps))
                        continue;
                    try_one(ctx, &t, ch);
                    const long blocks =
                        (long)t.slots * ((c->columns + k->columns - 1) / k->columns) * (long)e->plan->batch;
                    if (blocks < 2L * e->packed->sms)
                        break; /* fewer, longer blocks would leave multiprocessors idle */
                }
    }
}

/* The fastest so far, in their order. */
struct best {
    float ms[KEPT];
    struct choice choice[KEPT];
    int count;
};

static void offer(struct best *b, float ms, struct choice c)
{
    int at = b->count;
    if (ms < 0)
        return;
    while (at > 0 && ms < b->ms[at - 1])
        at--;
    if (at == KEPT)
        return;
    const int last = b->count < KEPT ? b->count : KEPT - 1;
    for (int i = last; i > at; i--) {
        b->ms[i] = b->ms[i - 1];
        b->choice[i] = b->choice[i - 1];
    }
    b->ms[at] = ms;
    b->choice[at] = c;
    b->count = last + 1;
}

struct tuning {
    struct ic_law_exec *e;
    int taps;
    struct stopwatch watch;
    struct best best;
    int tried;
    int64_t until; /* ic_now_ns */
};

static void time_one(void *ctx, const struct ic_cu_conv *c, struct choice ch)
{
    struct tuning *t = ctx;
    if (t->best.count > 0 && ic_now_ns() > t->until)
        return;
    const struct launch l = {.kind = CONV, .config = ch.config, .taps = t->taps, .a.conv = *c};
    offer(&t->best, measure(t->e, &l, &t->watch), ch);
    t->tried++;
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
    offer(&t->best, 0, p.found);
    t->tried = (int)p.count;
    return true;
}

/* What was chosen before in this process: plans of the same sizes must compute the same bits. */
struct known {
    int key[19];
    struct choice choice[KEPT]; /* the fastest first */
    int count;
    bool settled; /* within a step */
};
static struct known known[KNOWN_MAX];
static size_t known_count;
static pthread_mutex_t known_lock = PTHREAD_MUTEX_INITIALIZER;

static struct known key_of(const struct ic_law_exec *e, const struct launch *l)
{
    const struct ic_cu_conv *c = &l->a.conv;
    if (l->kind == FOLD) {
        const struct ic_cu_fold *a = &l->a.fold;
        const int taps = 2; /* no convolution has so many: the keys are apart */
        return (struct known){.key = {e->packed->device, (int)e->packed->type, 0, taps, a->low16, a->skip16,
                                      a->cpad, a->height, a->width, (int)e->plan->batch,
                                      a->in[0].group_size, a->in[1].group_size, a->split}};
    }
    return (struct known){.key = {e->packed->device, (int)e->packed->type, c->nf4.codes != NULL, l->taps,
                                  c->c16, c->columns, c->height, c->width, (int)e->plan->batch,
                                  2 * c->epilogue + (c->pooled != NULL), c->in[0].load, c->in[1].load,
                                  c->in[0].cpad, c->stats_gran, c->in[0].channels, c->in[0].gran,
                                  c->in[0].group_size, c->in[1].channels, c->in[1].gran}};
}

/* Which of `known` has this key; -1: none. */
static int find(const int *key)
{
    for (size_t i = 0; i < known_count; i++)
        if (memcmp(known[i].key, key, sizeof known[i].key) == 0)
            return (int)i;
    return -1;
}

static bool recall(struct known *k)
{
    pthread_mutex_lock(&known_lock);
    const int at = find(k->key);
    if (at >= 0)
        *k = known[at];
    pthread_mutex_unlock(&known_lock);
    return at >= 0;
}

static void remember(const struct known *k)
{
    pthread_mutex_lock(&known_lock);
    const int at = find(k->key);
    if (at >= 0)
        known[at] = *k;
    else if (known_count < KNOWN_MAX)
        known[known_count++] = *k;
    pthread_mutex_unlock(&known_lock);
}

static void learn(struct known *k, const struct best *b)
{
    memcpy(k->choice, b->choice, sizeof k->choice);
    k->count = b->count;
    remember(k);
}

/* Times every sensible cut of a convolution on this device. Reads and writes the arena, whose content does
 * not matter yet, and the places of the batch. */
enum ic_status ic_cu_choose(struct ic_law_exec *e, struct launch *l, struct ic_err *err)
{
    struct tuning t = {
        .e = e, .taps = l->taps, .watch.best = -1, .until = ic_now_ns() + TUNE_MOST_MS * (int64_t)1000000};
    struct known k = key_of(e, l);
    if (recall(&k) && shape(&l->a.conv, e, k.choice[0], l->taps)) {
        l->config = k.choice[0].config;
        return IC_OK;
    }
    TRY(cudaEventCreate(&t.watch.ev[0]), "an event");
    TRY(cudaEventCreate(&t.watch.ev[1]), "an event");
    if (!pick(e, l, &t))
        each_choice(e, &l->a.conv, l->taps, time_one, &t);
    cudaEventDestroy(t.watch.ev[0]);
    cudaEventDestroy(t.watch.ev[1]);
    cudaError_t bad = cudaGetLastError();
    if (t.best.count == 0)
        return bad != cudaSuccess
                   ? ic_cu_fail(err, bad, l->label)
                   : ic_fail(err, IC_TOO_LARGE, "%s does not fit the GPU's shared memory", l->label);
    learn(&k, &t.best);
    const struct choice best = t.best.choice[0];
    l->config = best.config;
    (void)shape(&l->a.conv, e, best, l->taps);
    if (getenv("IC_LAW_CUDA_VERBOSE"))
        fprintf(
            stderr,
            "%-34s %3d -> %3d taps %d: %8.2f us %7.1f TFLOP/s  config %d (%dx%d) chunk %d resident %d "
            "tiles %d "
            "buffers %d passes %d cluster %d blocks %dx%d smem %d, of %d\n",
            l->label, l->a.conv.c16 * 16, l->a.conv.columns, l->taps, (double)t.best.ms[0] * 1e3,
            l->flops * e->plan->batch / ((double)t.best.ms[0] * 1e9), best.config,
            ic_cu_config(l->config)->rows, ic_cu_config(l->config)->columns, best.chunk16, best.resident,
            best.tiles, best.buffers, best.passes, 1 << best.cluster_shift, l->a.conv.slots,
            (l->a.conv.columns + ic_cu_config(l->config)->columns - 1) / ic_cu_config(l->config)->columns,
            l->a.conv.smem, t.tried);
    return IC_OK;
}

/* ---- Folded ones --------------------------------------------------------------------------------- */

static bool shape_fold(struct launch *l, const struct ic_law_exec *e, struct choice k)
{
    struct ic_cu_fold *a = &l->a.fold;
    l->config = k.config;
    return (a->split ? ic_cu_split_fold_shape(a, k.config, k.cluster_shift, e->packed->smem_max)
                     : ic_cu_fold_shape(a, k.config, k.tiles, k.cluster_shift, e->packed->smem_max)) &&
           a->slots <= SLOTS_MAX(e->plan->batch);
}

/* Calls try_one for each cut. */
static void each_fold(const struct ic_law_exec *e, const struct launch *l,
                      void (*try_one)(void *, const struct launch *, struct choice), void *ctx)
{
    if (l->a.fold.split) {
        for (int config = 0; config < IC_CU_SPLIT_FOLD_COUNT; config++)
            for (int shift = 0; 1 << shift <= IC_CU_CLUSTER_MAX; shift++) {
                const struct choice c = {.config = config, .cluster_shift = shift};
                struct launch t = *l;
                if (shape_fold(&t, e, c))
                    try_one(ctx, &t, c);
            }
        return;
    }
    for (int config = 0; config < IC_CU_FOLD_COUNT; config++)
        for (int tiles = 1; tiles <= FOLD_TILES_MAX; tiles *= 2) {
            const struct choice c = {.config = config, .tiles = tiles};
            struct launch t = *l;
            if (!shape_fold(&t, e, c) ||
                (tiles > 1 && 2 * ic_cu_fold_blocks(&t.a.fold) * (long)e->plan->batch < e->packed->sms))
                continue; /* fewer, longer blocks would leave multiprocessors idle */
            struct choice shared = c;
            shared.cluster_shift = SHARE_SHIFT;
            const bool can_share = shape_fold(&t, e, shared);
            if (can_share)
                try_one(ctx, &t, shared);
            if (!(can_share && always_shared()) && shape_fold(&t, e, c))
                try_one(ctx, &t, c);
        }
}

struct folding {
    struct ic_law_exec *e;
    struct stopwatch watch;
    struct best best;
    const char *cut; /* IC_LAW_CUDA_CUT */
    unsigned n;
};

static void time_fold(void *ctx, const struct launch *l, struct choice c)
{
    struct folding *t = ctx;
    const float ms = t->cut ? (float)(t->n++ * 2654435761u % 1024) : measure(t->e, l, &t->watch);
    offer(&t->best, ms, c);
}

/* Times each cut; what is chosen is remembered as convolutions' cuts are. IC_LAW_CUDA_CUT as there. */
enum ic_status ic_cu_choose_fold(struct ic_law_exec *e, struct launch *l, struct ic_err *err)
{
    const struct ic_cu_fold *a = &l->a.fold;
    const char *cut = getenv("IC_LAW_CUDA_CUT");
    struct known k = key_of(e, l);
    struct folding t = {
        .e = e, .watch.best = -1, .cut = cut, .n = cut ? (unsigned)strtoul(cut, NULL, 10) : 0};
    if (recall(&k) && shape_fold(l, e, k.choice[0]))
        return IC_OK;
    TRY(cudaEventCreate(&t.watch.ev[0]), "an event");
    TRY(cudaEventCreate(&t.watch.ev[1]), "an event");
    each_fold(e, l, time_fold, &t);
    cudaEventDestroy(t.watch.ev[0]);
    cudaEventDestroy(t.watch.ev[1]);
    cudaError_t bad = cudaGetLastError();
    if (t.best.count == 0)
        return bad != cudaSuccess
                   ? ic_cu_fail(err, bad, l->label)
                   : ic_fail(err, IC_TOO_LARGE, "%s does not fit the GPU's shared memory", l->label);
    learn(&k, &t.best);
    (void)shape_fold(l, e, k.choice[0]);
    if (getenv("IC_LAW_CUDA_VERBOSE"))
        fprintf(stderr,
                "%-34s %3d + %3d -> %3d: %8.2f us %7.1f TFLOP/s  fold %d tiles %d cluster %d smem %d\n",
                l->label, a->low16 * 16, a->skip16 * 16, a->cpad, (double)t.best.ms[0] * 1e3,
                l->flops * e->plan->batch / ((double)t.best.ms[0] * 1e9), l->config, k.choice[0].tiles,
                1 << a->cluster_shift, a->smem);
    return IC_OK;
}

/* ---- Within a step ------------------------------------------------------------------------------- */

/* The launch takes another cut, and those that read its sums know how many there are. */
static bool recut(struct ic_law_exec *e, struct launch *l, struct choice k)
{
    const bool fold = l->kind == FOLD;
    if (!(fold ? shape_fold(l, e, k) : shape(&l->a.conv, e, k, l->taps)))
        return false;
    l->config = k.config;
    const float *stats = fold ? l->a.fold.stats : l->a.conv.stats;
    const int slots = fold ? l->a.fold.slots : l->a.conv.slots;
    for (size_t i = 0; i < e->launch_count && stats; i++) {
        struct launch *r = &e->launches[i];
        struct ic_cu_src *in = r->kind == CONV   ? r->a.conv.in
                               : r->kind == FOLD ? r->a.fold.in
                               : r->kind == LAST ? &r->a.last.in
                                                 : NULL;
        for (int j = 0; in && j < (r->kind == LAST ? 1 : 2); j++)
            if (in[j].stats == stats) {
                in[j].slots = slots;
                in[j].stats_stride = in[j].cpad / in[j].gran * slots;
            }
    }
    return true;
}

/* All launches of one key. */
static bool recut_all(struct ic_law_exec *e, const struct known *k, struct choice to)
{
    bool good = true;
    for (size_t i = 0; i < e->launch_count; i++) {
        struct launch *l = &e->launches[i];
        if (l->kind != CONV && l->kind != FOLD)
            continue;
        const struct known own = key_of(e, l);
        if (memcmp(own.key, k->key, sizeof own.key) == 0)
            good = recut(e, l, to) && good;
    }
    return good;
}

/* Milliseconds of a step as it stands; < 0: it failed. */
static float time_step(struct ic_law_exec *e, const cudaEvent_t ev[2], int launches)
{
    cudaGraphExec_t graph = NULL;
    float best = -1, ms;
    if (ic_cu_capture(e, e->plan->batch, STEPS, &graph) != cudaSuccess)
        return -1;
    bool good = cudaGraphLaunch(graph, e->stream) == cudaSuccess; /* warms up */
    for (int round = 0; round < TUNE_ROUNDS && good; round++) {
        cudaEventRecord(ev[0], e->stream);
        for (int i = 0; i < launches; i++)
            good = good && cudaGraphLaunch(graph, e->stream) == cudaSuccess;
        cudaEventRecord(ev[1], e->stream);
        good = good && cudaEventSynchronize(ev[1]) == cudaSuccess &&
               cudaEventElapsedTime(&ms, ev[0], ev[1]) == cudaSuccess;
        if (good && (best < 0 || ms < best))
            best = ms;
    }
    cudaGraphExecDestroy(graph);
    return good ? best / (float)(STEPS * launches) : -1;
}

/* What each launch adds to a step. */
static void print_launches(struct ic_law_exec *e, const cudaEvent_t ev[2], int launches)
{
    const size_t all = e->launch_count;
    float before = 0;
    for (size_t i = 0; i < all; i++) {
        e->launch_count = i + 1;
        const float ms = time_step(e, ev, launches);
        const struct launch *l = &e->launches[i];
        fprintf(stderr, "%-34s adds %6.2f us  kind %d config %d smem %d\n", l->label,
                (double)(ms - before) * 1e3, (int)l->kind, l->config,
                l->kind == CONV   ? l->a.conv.smem
                : l->kind == FOLD ? l->a.fold.smem
                                  : 0);
        before = ms;
    }
    e->launch_count = all;
}

/* Which of the best cuts of a launch, and of those like it, makes the whole step faster; *step: its ms, < 0: it is not
 * timed. */
static int best_within(struct ic_law_exec *e, const struct known *k, const char *label, struct stopwatch *w,
                       int launches, int64_t until, float *step)
{
    const int count = *step < 0 ? 0 : k->count;
    int chosen = 0;
    for (int c = 1; c < count && ic_now_ns() < until; c++) {
        const float ms = recut_all(e, k, k->choice[c]) ? time_step(e, w->ev, launches) : -1;
        if (ms < 0 || ms > *step * STEP_GAIN)
            continue;
        if (getenv("IC_LAW_CUDA_VERBOSE"))
            fprintf(stderr,
                    "%-34s its cut %d: config %d cluster %d resident %d: a step %.2f us, %.2f before\n",
                    label, c, k->choice[c].config, 1 << k->choice[c].cluster_shift, k->choice[c].resident,
                    (double)ms * 1e3, (double)*step * 1e3);
        *step = ms;
        chosen = c;
    }
    return chosen;
}

/* What is settled once stays so: plans of the same sizes must compute the same bits. */
enum ic_status ic_cu_choose_together(struct ic_law_exec *e, struct ic_err *err)
{
    const int64_t until = ic_now_ns() + STEPS_MOST_MS * (int64_t)1000000;
    struct stopwatch w;
    if (!(e->packed->wide || (e->packed->type == IC_CU_F32 && getenv("IC_LAW_CUDA_VERBOSE"))) ||
        getenv("IC_LAW_CUDA_CUT"))
        return IC_OK;
    TRY(cudaEventCreate(&w.ev[0]), "an event");
    TRY(cudaEventCreate(&w.ev[1]), "an event");
    float step = time_step(e, w.ev, 1);
    const float fit = STEP_ROUND_MS / STEPS / step;
    const int launches = fit > 1 ? (int)fit : 1;
    if (step < STEP_MOST_MS)
        step = time_step(e, w.ev, launches);
    if (getenv("IC_LAW_CUDA_VERBOSE"))
        fprintf(stderr, "a step: %.2f us\n", (double)step * 1e3);
    if (step >= STEP_MOST_MS)
        step = -1;
    for (size_t i = 0; i < PASSES * e->launch_count; i++) {
        struct launch *l = &e->launches[i % e->launch_count];
        struct known k = key_of(e, l);
        if ((l->kind != CONV && l->kind != FOLD) || !recall(&k))
            continue;
        if (!k.settled) {
            const int better = best_within(e, &k, l->label, &w, launches, until, &step);
            const struct choice first = k.choice[0];
            k.choice[0] = k.choice[better];
            k.choice[better] = first;
            k.settled = i >= (PASSES - 1) * e->launch_count;
            remember(&k);
        }
        (void)recut_all(e, &k, k.choice[0]);
    }
    if (getenv("IC_LAW_CUDA_VERBOSE"))
        print_launches(e, w.ev, launches);
    cudaEventDestroy(w.ev[0]);
    cudaEventDestroy(w.ev[1]);
    TRY(cudaGetLastError(), "timing a step");
    return IC_OK;
}
