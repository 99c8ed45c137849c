/* A plan on the device, as the files that make and run it share it: build.c (launches of a plan), tune.c (what each is cut
 * into), states.c (states and frames), exec.c (graphs, steps, the plug-in's table). The calls of ic_law_backend are
 * described in law/law.h and law/plan.h; nothing here is thread-safe by itself. */
#ifndef IC_LAW_CUDA_EXEC_INT_H
#define IC_LAW_CUDA_EXEC_INT_H

#include "law/cuda/exec.h"
#include "law/cuda/frames.h"

#define SPLIT_BATCH 8 /* split.cuh is for batches up to this */
/* statistics of a sample's tiles that a consumer adds up */
#define SLOTS_MAX(batch) ((batch) <= SPLIT_BATCH ? 1024 : 256)
#define BUCKETS_MAX 24 /* batch sizes that have graphs of their own */

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
        /* device; pinned: min and max of each frame of a batch, then their pixels */
        char *pool, *pool_host;
        size_t *at; /* in the pool */
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

struct ic_law_state {
    float *psi, *h, *c; /* device, one allocation */
    size_t psi_bytes, half;
};

#define TRY(call, what)                                                                                    \
    do {                                                                                                   \
        cudaError_t try_e = (call);                                                                        \
        if (try_e != cudaSuccess)                                                                          \
            return ic_cu_fail(err, try_e, what);                                                           \
    } while (0)

/* build.c. fold_plan: a copy of `plan`, without the tensors of transposed convolutions that melt into the next one, whose
 * weights (of the pair at op `at`) then take folded_bytes, and with pooled ones that a convolution writes. build: the launches of e->plan, into e; build32: those of
 * float32, where nothing melts and nothing is chosen. */
void ic_cu_fold_plan(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                     struct ic_law_plan *out);
size_t ic_cu_folded_bytes(const struct ic_law_plan *p, size_t at);
size_t ic_cu_stats_floats(const struct ic_law_op *norm, unsigned batch, enum ic_cu_type type);
enum ic_status ic_cu_build(struct ic_law_exec *e, struct ic_err *err);
enum ic_status ic_cu_build32(struct ic_law_exec *e);

/* exec.c. A graph of steps of the first `n` simulations. */
cudaError_t ic_cu_capture(struct ic_law_exec *e, unsigned n, unsigned steps, cudaGraphExec_t *out);

/* tune.c. Enqueues a launch for the first `n` simulations; chooses what one is cut into, by timing; and chooses among the
 * best cuts of all launches, by timing whole steps. */
cudaError_t ic_cu_launch_run(const struct ic_law_exec *e, const struct launch *l, int n);
enum ic_status ic_cu_choose(struct ic_law_exec *e, struct launch *l, struct ic_err *err);
enum ic_status ic_cu_choose_fold(struct ic_law_exec *e, struct launch *l, struct ic_err *err);
enum ic_status ic_cu_choose_together(struct ic_law_exec *e, struct ic_err *err);

/* states.c: states of simulations, the deltas of the last run, */
enum ic_status ic_cu_state_open(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                                const struct ic_law_io *host, struct ic_law_state **out,
                                struct ic_err *err);
void ic_cu_state_close(struct ic_law_state **state);
enum ic_status ic_cu_state_put(struct ic_law_state *s, const struct ic_law_io *host, struct ic_err *err);
enum ic_status ic_cu_state_get(struct ic_law_state *s, const struct ic_law_io *host, struct ic_err *err);
enum ic_status ic_cu_delta(struct ic_law_exec *e, unsigned place, float *out, struct ic_err *err);
/* and frames: `pool` is the memory for those of a batch. */
size_t ic_cu_pool_bytes(const struct ic_law_plan *p);
enum ic_status ic_cu_frames_open(struct ic_law_exec *e, struct ic_err *err);
void ic_cu_frames_close(struct ic_law_exec *e);
enum ic_status ic_cu_draw(struct ic_law_exec *e, const struct ic_law_draw *draws, unsigned n,
                          struct ic_err *err);
enum ic_status ic_cu_frame(struct ic_law_exec *e, unsigned i, void *out, size_t size,
                           struct ic_view_frame *frame, struct ic_err *err);

#endif
