/* States of simulations on the device, their way from and to the host, and frames drawn of them. See exec_int.h. */
#include "law/cuda/exec_int.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* ---- States ---------------------------------------------------------------------------------------- */

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

void ic_cu_state_close(struct ic_law_state **state)
{
    if (!*state)
        return;
    cudaFree((*state)->psi);
    free(*state);
    *state = NULL;
}

enum ic_status ic_cu_state_open(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                                const struct ic_law_io *host, struct ic_law_state **out, struct ic_err *err)
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
        ic_cu_state_close(&s);
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
enum ic_status ic_cu_state_put(struct ic_law_state *s, const struct ic_law_io *host, struct ic_err *err)
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

enum ic_status ic_cu_state_get(struct ic_law_state *s, const struct ic_law_io *host, struct ic_err *err)
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

enum ic_status ic_cu_delta(struct ic_law_exec *e, unsigned place, float *out, struct ic_err *err)
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

size_t ic_cu_pool_bytes(const struct ic_law_plan *p)
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
    return *used <= ic_cu_pool_bytes(p) ? IC_OK : ic_fail(err, IC_TOO_LARGE, "too many frames at once");
}

enum ic_status ic_cu_draw(struct ic_law_exec *e, const struct ic_law_draw *draws, unsigned n,
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

enum ic_status ic_cu_frame(struct ic_law_exec *e, unsigned i, void *out, size_t size,
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

enum ic_status ic_cu_frames_open(struct ic_law_exec *e, struct ic_err *err)
{
    const size_t n = e->plan->batch;
    e->frames.at = calloc(n, sizeof *e->frames.at);
    e->frames.info = calloc(n, sizeof *e->frames.info);
    if (!e->frames.at || !e->frames.info)
        return ic_fail(err, IC_OOM, "no memory for frames");
    TRY(cudaMalloc((void **)&e->frames.table, n * sizeof *e->frames.table), "room for frames");
    TRY(cudaMalloc((void **)&e->frames.partial, n * IC_CU_FRAME_BLOCKS * 2 * sizeof(float)),
        "room for frames");
    TRY(cudaMalloc((void **)&e->frames.pool, ic_cu_pool_bytes(e->plan)), "room for frames");
    TRY(cudaMallocHost((void **)&e->frames.table_host, n * sizeof *e->frames.table), "pinned memory");
    TRY(cudaMallocHost((void **)&e->frames.pool_host, ic_cu_pool_bytes(e->plan)), "pinned memory");
    TRY(cudaStreamCreateWithFlags(&e->frames.copies, cudaStreamNonBlocking), "a stream");
    TRY(cudaEventCreateWithFlags(&e->frames.drawn, cudaEventDisableTiming), "an event");
    TRY(cudaEventCreateWithFlags(&e->frames.copied, cudaEventDisableTiming), "an event");
    return IC_OK;
}

void ic_cu_frames_close(struct ic_law_exec *e)
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
