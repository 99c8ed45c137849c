/* A plan made into launches, captured as CUDA graphs, and a step.
 *
 * Operations melt: a norm (with its ELU) has no launch of its own, the convolution that reads it does it while
 * loading, nor has a max pool, which the convolution before the norm does, storing; INPUT and UPDATE belong to the first and the last convolution.
 * UNET_UNITARY is 15 launches; 13 where the transposed convolutions melt too (Hopper; fold.cuh, split_fold.cuh). What a launch is cut into is chosen once, when the plan is opened (tune.c).
 *
 * Nothing is allocated and the host waits for nothing inside a step; a call to `run` waits once, at its
 * end. States lie where state_open put them: a table on the device, sent before each run, says where those
 * of this batch are, so that nothing is copied to form a batch. Deltas are written into a part of the arena
 * that is free when the last operation runs, and are there until the next run. Frames are drawn by the
 * stream of the steps and copied by another one. */
#include "law/cuda/exec_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "law/plugin.h"

#define GRAPH_STEPS 8 /* steps of the long graph */

size_t ic_cu_tensor_bytes(const struct ic_law *law, unsigned channels, unsigned height, unsigned width)
{
    (void)law;
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

/* ---- A step ---------------------------------------------------------------------------------------- */

static cudaError_t enqueue(const struct ic_law_exec *e, int n)
{
    cudaError_t bad = cudaSuccess;
    for (size_t i = 0; i < e->launch_count && bad == cudaSuccess; i++)
        bad = ic_cu_launch_run(e, &e->launches[i], n);
    return bad;
}

cudaError_t ic_cu_capture(struct ic_law_exec *e, unsigned n, unsigned steps, cudaGraphExec_t *out)
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
        TRY(ic_cu_capture(e, n, 1, &b->one), "capturing a graph");
        TRY(ic_cu_capture(e, n, GRAPH_STEPS, &b->many), "capturing a graph");
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
        if ((s = ic_cu_state_open(e->packed, e->plan, io, &e->own[i], err)) == IC_OK)
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
                s = ic_cu_state_put(e->own[i], &io[i], err);
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
            s = ic_cu_state_get(e->own[i], &io[i], err);
            if (s == IC_OK && io[i].delta)
                s = ic_cu_delta(e, i, io[i].delta, err);
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
    ic_cu_frames_close(e);
    for (unsigned i = 0; e->own && i < e->plan->batch; i++)
        ic_cu_state_close(&e->own[i]);
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
        if (p->ops[i].kind == IC_LAW_OP_GROUPNORM || p->ops[i].kind == IC_LAW_OP_RMSNORM) {
            const size_t floats = ic_cu_stats_floats(&p->ops[i], p->batch, packed->type);
            if (packed->type != IC_CU_F32)
                l.stats += floats;
            else if (floats > l.stats) /* a norm's sums are read before the next one's are made */
                l.stats = floats;
        }
    for (size_t i = 0; i < packed->op_count; i++) {
        const size_t folded = ic_cu_folded_bytes(p, i);
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
        p->arena_bytes + l.stats * sizeof(float) + l.delta_own + l.expanded + l.folded +
        ic_cu_pool_bytes(p) +
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
    enum ic_status s = ic_cu_frames_open(e, err);
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
    ic_cu_fold_plan(packed, plan, &e->own_plan);
    e->plan = plan = &e->own_plan;
    const char *graphs = getenv("IC_LAW_CUDA_GRAPH");
    e->graphs = !graphs || strcmp(graphs, "0") != 0;
    enum ic_status s = allocate(e, err);
    if (s == IC_OK)
        s = packed->type == IC_CU_F32 ? ic_cu_build32(e) : ic_cu_build(e, err);
    if (s == IC_OK && e->graphs)
        s = ic_cu_choose_together(e, err);
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
    ic_cu_fold_plan(packed, plan, &own);
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
        s = ic_cu_state_put(e->own[i], &io[i], err);
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

/* what: the type it computes in, of `law`. */
#define BACKEND(tag, id, what)                                                                             \
    static size_t bytes_##tag(const struct ic_law *law, unsigned c, unsigned h, unsigned w)                \
    {                                                                                                      \
        return (what) == IC_CU_F32 ? ic_law_tensor_bytes_nchw(law, c, h, w)                                \
                                   : ic_cu_tensor_bytes(law, c, h, w);                                     \
    }                                                                                                      \
    static enum ic_status pack_##tag(const struct ic_law *law, unsigned threads,                           \
                                     struct ic_law_packed **out, struct ic_err *err)                       \
    {                                                                                                      \
        (void)threads;                                                                                     \
        return ic_cu_pack(law, what, out, err);                                                            \
    }                                                                                                      \
    static const struct ic_law_backend backend_##tag = {                                                   \
        .name = id,                                                                                        \
        .tensor_bytes = bytes_##tag,                                                                       \
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
        .state_open = ic_cu_state_open,                                                                    \
        .state_close = ic_cu_state_close,                                                                  \
        .state_put = ic_cu_state_put,                                                                      \
        .state_get = ic_cu_state_get,                                                                      \
        .start = cu_start,                                                                                 \
        .draw = ic_cu_draw,                                                                                \
        .frame = ic_cu_frame,                                                                              \
        .delta = ic_cu_delta,                                                                              \
    };

BACKEND(any, "cuda", ic_cu_type_of(law))
BACKEND(f16, "cuda-fp16", IC_CU_F16)
BACKEND(bf16, "cuda-bf16", IC_CU_BF16)
BACKEND(f32, "cuda-fp32", IC_CU_F32)

__attribute__((visibility("default"))) const struct ic_law_plugin ic_law_plugin = {
    .abi = IC_LAW_PLUGIN_ABI,
    .backend_size = sizeof(struct ic_law_backend),
    .plan_size = sizeof(struct ic_law_plan),
    .law_size = sizeof(struct ic_law),
    .backends = {&backend_any, &backend_f16, &backend_bf16, &backend_f32},
    .set_states = set_states,
    .time_steps = time_steps,
    .launches = launches,
};
