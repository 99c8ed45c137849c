/* A plan: one law on one grid with one batch size, as a flat list of operations over static buffers.
 *
 * Building a plan does all the thinking once: which operation reads and writes which tensor, how long
 * each tensor lives, and where in a single arena it lies (tensors whose lifetimes do not meet share
 * bytes). Running it allocates nothing. The plan is the same for every back end; a back end decides
 * only how a tensor is laid out inside its bytes and how the weights are packed.
 *
 * Logical tensors are [sample, channel, y, x], float32 by default. Sample i of a tensor starts at
 *     arena + tensor.offset + i * tensor.stride
 * and has `stride` bytes of which the back end is master (NCHW, channel-blocked, fp16: its choice,
 * told through `tensor_bytes` when the plan is built). Samples never mix: every statistic is per
 * sample, so the first n <= batch samples can be run alone with the same result to the last bit.
 *
 * A plan borrows its law and is immutable: any thread may read it. Formulas: shared/law-m.md §1.2, §2. */
#ifndef IC_LAW_PLAN_H
#define IC_LAW_PLAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/status.h"
#include "law/law.h"
#include "law/views.h"

/* X(symbol, text)
 *
 * INPUT     psi [H,W,d,2] of each simulation -> out [2d,H,W]: channels 0..d-1 = Re psi_k,
 *           d..2d-1 = Im psi_k.
 * CONV3X3   out[o,y,x] = act(bias[o] + sum_{i,ky,kx} w[o,i,ky,kx] * in[i, y+ky-1, x+kx-1]); zero
 *           padding; cross-correlation. in[1] >= 0: the input channels are those of in[0] followed by
 *           those of in[1] (a virtual concatenation; nothing is copied). bias may be -1.
 * CONV1X1   the same with a 1x1 kernel.
 * GROUPNORM in place (out == in[0]): per sample and group of C/groups consecutive channels,
 *           act((x - mean) / sqrt(var + eps) * w[c] + bias[c]); biased variance over group * H * W.
 *           Always directly follows the CONV that wrote the tensor, so a back end may gather the
 *           sums in the conv's epilogue.
 * RMSNORM   in place: per sample and channel, act(x / sqrt(mean_{y,x}(x^2) + eps) * w[c]). Same place.
 * MAXPOOL2  out[c,y,x] = max of in[c, 2y..2y+1, 2x..2x+1]; height, width are the output's.
 * CONVT2X2  transposed convolution, stride 2: out[o, 2y+ky, 2x+kx] = bias[o] + sum_i in[i,y,x] *
 *           w[i,o,ky,kx]; height, width are the output's (twice the input's).
 * MEM_IN    h [4b,H/4,W/4] of each simulation -> out.
 * LSTM      in[0] = gates [16b,h,w], four chunks of 4b in the order forget, input, output, candidate
 *           (before their nonlinearities): c' = sig(f)*c + sig(i)*tanh(g); h' = sig(o)*tanh(c').
 *           c of the simulation is read and replaced by c', its h replaced by h', and out = h' [4b,h,w].
 * RESIZE_HALF  2:1 bilinear with antialiasing (torchvision >= 0.17): per axis the taps 1/8 3/8 3/8 1/8
 *           over input samples 2y-1..2y+2, renormalised at the borders where taps fall outside.
 * UPDATE    in[0] = network output Y [2d,H,W]; per cell a_k = Y[k] + i Y[d+k]; delta = product ?
 *           a_k * psi_k : a_k; phi = psi + delta - max(gamma,0) * psi;
 *           psi' = phi / (sqrt(sum_k |phi_k|^2) + 1e-9), in place in the simulation. `delta` (without
 *           the decay term) also goes to ic_law_io.delta where that is set. out = -1. */
#define IC_LAW_OPS(X)                                                                                      \
    X(INPUT, "input")                                                                                      \
    X(CONV3X3, "conv3x3")                                                                                  \
    X(CONV1X1, "conv1x1")                                                                                  \
    X(GROUPNORM, "groupnorm")                                                                              \
    X(RMSNORM, "rmsnorm")                                                                                  \
    X(MAXPOOL2, "maxpool2")                                                                                \
    X(CONVT2X2, "convt2x2")                                                                                \
    X(MEM_IN, "mem_in")                                                                                    \
    X(LSTM, "lstm")                                                                                        \
    X(RESIZE_HALF, "resize_half")                                                                          \
    X(UPDATE, "update")

enum ic_law_op_kind {
#define X(symbol, text) IC_LAW_OP_##symbol,
    IC_LAW_OPS(X)
#undef X
        IC_LAW_OP_COUNT
};

enum ic_law_act {
    IC_LAW_ACT_NONE,
    IC_LAW_ACT_ELU,  /* x > 0 ? x : exp(x) - 1 */
    IC_LAW_ACT_SPIKE /* x > spike_at ? spike_to : 0 */
};

struct ic_law_tensor {
    unsigned channels, height, width;
    size_t stride;        /* bytes of one sample, a multiple of IC_LAW_ALIGN; from tensor_bytes */
    size_t offset;        /* bytes from the arena's start, a multiple of IC_LAW_ALIGN */
    unsigned first, last; /* ops that write it first and read it last, inclusive */
    const char *label;    /* for people: "x1", "conv_up1.0" … */
};

struct ic_law_op {
    enum ic_law_op_kind kind;
    enum ic_law_act act;
    int in[2];              /* tensor indices; -1: none */
    int out;                /* tensor index; -1: none */
    int weight, bias;       /* indices into law->weights; -1: none. Norms: scale, shift */
    unsigned cin[2];        /* channels of in[0], in[1] (0: none) */
    unsigned cout;          /* channels of out */
    unsigned height, width; /* of the output (UPDATE: of the field) */
    unsigned groups;        /* GROUPNORM */
    float eps;              /* norms */
    float spike_at, spike_to;
};

#define IC_LAW_ALIGN 64 /* bytes: a cache line, and an AVX-512 vector */
#define IC_LAW_PLAN_OPS_MAX 64
#define IC_LAW_PLAN_TENSORS_MAX 64
#define IC_LAW_ARENA_MAX ((uint64_t)1 << 40) /* bytes; a plan that needs more is refused */

/* Bytes of one sample of a logical tensor in the back end's layout, which may go by the law's precision;
 * rounded up to IC_LAW_ALIGN by the plan. Must not depend on anything but its arguments and the device. */
typedef size_t (*ic_law_tensor_bytes_fn)(const struct ic_law *law, unsigned channels, unsigned height,
                                         unsigned width);

struct ic_law_plan {
    const struct ic_law *law; /* borrowed */
    unsigned height, width, batch;
    size_t op_count, tensor_count;
    struct ic_law_op ops[IC_LAW_PLAN_OPS_MAX];
    struct ic_law_tensor tensors[IC_LAW_PLAN_TENSORS_MAX];
    int net_out;                    /* tensor that holds Y (input of UPDATE) */
    size_t arena_bytes;             /* peak, for the whole batch; aligned */
    size_t tensors_bytes;           /* what it would be if no bytes were shared */
    size_t psi_bytes, memory_bytes; /* what one simulation owns: psi; h and c together */
    uint64_t macs;                  /* multiply-accumulates of one sample's step */
};

/* Height and width must be multiples of law->grid_multiple. Errors: BAD_REQUEST, TOO_LARGE, OOM. */
enum ic_status ic_law_plan_open(const struct ic_law *law, unsigned height, unsigned width, unsigned batch,
                                ic_law_tensor_bytes_fn tensor_bytes, struct ic_law_plan **out,
                                struct ic_err *err);
void ic_law_plan_close(struct ic_law_plan **plan);

/* For a back end that makes op `at` and the next one, the only one that reads its output, in one: of its
 * own copy of a plan. The output has no bytes any more, op `at` no output, and in[0] of the next is that of
 * op `at` (cin[0] stays); the other tensors are laid out anew. */
void ic_law_plan_bypass(struct ic_law_plan *plan, size_t at);
/* Likewise, for a back end that writes the output of op `at` when it runs op `from`, an earlier one: it lives from there
 * on, and the tensors are laid out anew. A later bypass forgets it. */
void ic_law_plan_hasten(struct ic_law_plan *plan, size_t at, size_t from);

const char *ic_law_op_name(enum ic_law_op_kind kind);

struct ic_law_backend;
struct ic_law_packed;

/* Appends the itemised sum as text lines: what a simulation owns, what the plan takes on this back end with
 * these packed weights (shared by all simulations of the batch), the weights (shared by all plans of the
 * law). Says what the back end would allocate, not what the plan's own arena comes to. */
void ic_law_plan_report(const struct ic_law_plan *plan, const struct ic_law_backend *be,
                        const struct ic_law_packed *packed, struct ic_buf *out);

/* Plain float32 NCHW: channels * height * width * 4; the law does not matter. */
size_t ic_law_tensor_bytes_nchw(const struct ic_law *law, unsigned channels, unsigned height,
                                unsigned width);

/* ---- Back ends ------------------------------------------------------------------------------- */

struct ic_law_packed; /* a back end's form of a law's weights; shared by all plans of the law */
struct ic_law_exec;   /* a plan with its arena and scratch on a back end */
struct ic_law_state;  /* psi, h and c of one simulation in a device's memory (state_open) */

/* One simulation of a step. All pointers are borrowed for the call, owned by the simulation, and in
 * the canonical layout whatever the back end uses inside (host memory, float32, 16-byte aligned or
 * better). Simulations of one call must not share buffers. */
struct ic_law_io {
    float *psi;   /* [H,W,d,2] (last axis Re, Im): read, then replaced by psi' */
    float *h, *c; /* [4b,H/4,W/4] each, read and replaced; NULL where the law has no memory */
    float *delta; /* [H,W,d,2]: receives delta without the decay term; NULL: not wanted */
    float gamma;  /* decay of this simulation; <= 0 acts as 0 */
    /* Of the same back end. A step reads and replaces this one and leaves psi, h and c alone; delta, where
     * wanted, is left on the device too (`delta` of the back end has it). NULL: all in host memory. */
    struct ic_law_state *state;
};

/* A frame of a simulation as the last `run` left it. */
struct ic_law_draw {
    const struct ic_law_state *state;
    int place; /* its place in that run, whose delta is shown; -1: delta counts as zero */
    struct ic_view_request request;
};

struct ic_law_backend {
    const char *name; /* "ref", "cpu" */
    ic_law_tensor_bytes_fn tensor_bytes;
    /* Packs the weights once per law. `threads`: 0 lets the back end choose. The law must outlive
     * the packed form. Immutable afterwards. */
    enum ic_status (*pack)(const struct ic_law *law, unsigned threads, struct ic_law_packed **out,
                           struct ic_err *err);
    void (*unpack)(struct ic_law_packed **packed);
    size_t (*packed_bytes)(const struct ic_law_packed *packed);
    /* Allocates arena and scratch for a plan built with this back end's tensor_bytes. The plan and
     * the packed weights must outlive it. */
    enum ic_status (*open)(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                           struct ic_law_exec **out, struct ic_err *err);
    void (*close)(struct ic_law_exec **exec);
    size_t (*exec_bytes)(const struct ic_law_exec *exec); /* arena + scratch, as allocated */
    /* One step of io[0..n), 1 <= n <= plan->batch. Allocates nothing, cannot fail. One thread at a
     * time per exec; execs of the same packed weights may run side by side. */
    void (*step)(struct ic_law_exec *exec, const struct ic_law_io *io, unsigned n);
    /* Copies the network output Y of sample i after a step to out [2d,H,W], NCHW float32. For tests;
     * NULL where the back end fuses Y away. The CPU's keeps those of the last micro-batch: law/cpu/cpu.h.
     */
    void (*net_out)(const struct ic_law_exec *exec, unsigned sample, float *out);
    /* As `step`, `steps` (>= 1) times in a row, on a back end that can lose its device; NULL where `step`
     * cannot fail. delta, where wanted, is the last step's. On failure psi, h and c are as before the
     * call, but what is only in an ic_law_state is so after OOM alone, else lost; the exec is good for
     * nothing but close. OOM, UNAVAILABLE (the device is gone), INTERNAL. */
    enum ic_status (*run)(struct ic_law_exec *exec, const struct ic_law_io *io, unsigned n, unsigned steps,
                          struct ic_err *err);
    /* What exec_bytes would be after open, without allocating it; 0: the plan cannot be opened. NULL: not
     * known beforehand (the plan's arena_bytes is a guess then). */
    size_t (*exec_size)(const struct ic_law_packed *packed, const struct ic_law_plan *plan);
    /* Bytes of the device's memory that are free now, and all of it. False: no device. NULL: it computes in
     * the host's memory. */
    bool (*memory)(uint64_t *free, uint64_t *total);

    /* ---- What a back end adds whose states may stay on its device; else all of it is NULL. The thread is
     * that of the exec; none of it between `start` and its `run`, but for `frame`. */

    /* A state of this law and grid: ic_law_state_bytes on the device, content undefined until state_put.
     * psi, h and c of `host` are borrowed until state_close: a back end may bring them up to date at any
     * time. The packed weights must outlive it. OOM, UNAVAILABLE. */
    enum ic_status (*state_open)(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                                 const struct ic_law_io *host, struct ic_law_state **out,
                                 struct ic_err *err);
    void (*state_close)(struct ic_law_state **state);
    /* From, or to, psi, h and c of host memory; state_get changes nothing there when it fails. */
    enum ic_status (*state_put)(struct ic_law_state *state, const struct ic_law_io *host,
                                struct ic_err *err);
    enum ic_status (*state_get)(struct ic_law_state *state, const struct ic_law_io *host,
                                struct ic_err *err);
    /* Begins what the next call, `run` with the same arguments, completes, and returns without waiting for
     * it. Errors come from there. The io must live until then. May be NULL. */
    void (*start)(struct ic_law_exec *exec, const struct ic_law_io *io, unsigned n, unsigned steps);
    /* Draws n <= batch frames of views that depend on one cell (ic_view_of_one_cell), and begins to copy
     * them to the host; the frames of the draw before are gone. They are those of ic_view_render, but that
     * a byte may differ by one step, a float32 by 1e-5 of the range, and min and max by 1e-5 of their size.
     * TOO_LARGE: no room for all of these (4 bytes a cell and place of the batch; 12 for a batch below 3);
     * BAD_REQUEST: another view; UNAVAILABLE. Nothing is drawn then. Does not wait. */
    enum ic_status (*draw)(struct ic_law_exec *exec, const struct ic_law_draw *draws, unsigned n,
                           struct ic_err *err);
    /* Waits for frame i of the last draw; out has `size` bytes, >= those planned (ic_view_plan). Sets min
     * and max of `frame`. UNAVAILABLE. */
    enum ic_status (*frame)(struct ic_law_exec *exec, unsigned i, void *out, size_t size,
                            struct ic_view_frame *frame, struct ic_err *err);
    /* delta of a place of the last run where it was wanted, [H,W,d,2] to host memory. UNAVAILABLE. */
    enum ic_status (*delta)(struct ic_law_exec *exec, unsigned place, float *out, struct ic_err *err);
};

/* Bytes that the state of one simulation takes on a device. */
size_t ic_law_state_bytes(const struct ic_law *law, unsigned height, unsigned width);
/* Bytes of a batch's frames: on the device, and as much in pinned host memory. */
size_t ic_law_frames_bytes(unsigned height, unsigned width, unsigned batch);

/* `steps` (>= 1) steps of io[0..n) by `run`, or by `step` on a back end that cannot fail. Errors: run's. */
enum ic_status ic_law_exec_run(const struct ic_law_backend *be, struct ic_law_exec *exec,
                               const struct ic_law_io *io, unsigned n, unsigned steps, struct ic_err *err);
/* ic_law_backend.exec_size of `batch` simulations on a grid, or the guess; 0: no such plan. */
size_t ic_law_exec_size(const struct ic_law_backend *be, const struct ic_law_packed *packed,
                        const struct ic_law *law, unsigned height, unsigned width, unsigned batch);

/* What a batch may take, in bytes. A plan lies in a device's memory where `on_device` (the back end has
 * `memory`), with the states of its batch where these may stay there; else in the host's, as states and
 * deltas always do. What goes to a device and back takes host memory once more (ic_law_staging_bytes). */
struct ic_law_room {
    size_t host, device;
    bool on_device;
};

struct ic_law_fit {
    unsigned n; /* 0: not even one */
    /* Why it is not larger: nobody asked for more (or no plan may be larger), the host's memory, the
     * device's. */
    enum ic_law_fit_limit { IC_LAW_FIT_MOST, IC_LAW_FIT_HOST, IC_LAW_FIT_DEVICE } limit;
    size_t host, device; /* bytes that n take */
};

/* The largest batch, up to `most`, that fits the room: plan, and each simulation's state and delta besides.
 * The packed weights are not counted: they are there. Opens nothing; any thread. */
struct ic_law_fit ic_law_batch_fit(const struct ic_law_backend *be, const struct ic_law_packed *packed,
                                   const struct ic_law *law, unsigned height, unsigned width,
                                   const struct ic_law_room *room, unsigned most);

/* Host memory through which a batch's data travels to a device and back: its frames, or, where states
 * cannot stay there, psi, memory and delta of each. */
size_t ic_law_staging_bytes(const struct ic_law_backend *be, const struct ic_law *law, unsigned height,
                            unsigned width, unsigned batch);

extern const struct ic_law_backend ic_law_backend_ref; /* ref.c: plain C, NCHW */
/* src/law/cpu/ adds `ic_law_backend_cpu`, declared in law/cpu/cpu.h. */

/* "ref", and "cpu" where it is built in; NULL: no such back end. Plug-ins: law/plugin.h. */
const struct ic_law_backend *ic_law_backend_find(const char *name);

#endif
