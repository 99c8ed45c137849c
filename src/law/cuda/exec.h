/* Internal to law/cuda: what pack.c makes and exec.c runs. */
#ifndef IC_LAW_CUDA_EXEC_H
#define IC_LAW_CUDA_EXEC_H

#include "law/cuda/kernels.h"
#include "law/plan.h"

/* The weights of one op of the plan, by the op's index (the list is the same on every grid). Device. */
struct ic_cu_weights {
    void *weight; /* pack.c's order, 16-bit; norms: scale; float32 in exact mode */
    float *bias;  /* padded, NULL: none; norms: shift */
    struct ic_cu_nf4 nf4;
    uint16_t *flip;  /* norms, not in exact mode: the signs of the scales, padded (ic_cu_conv) */
    size_t expanded; /* bytes of NF4 weights when they are 16-bit; else 0 */
    /* float32: a norm's or a transposed convolution's |out| <= gain * |in| + offset, where a norm's in is at most the
     * root of the values that it is over; whether exact_mma.cu multiplies fp16, and by what the weights were divided */
    float gain, offset, unscale;
    int half;
};

struct ic_law_packed {
    const struct ic_law *law; /* borrowed */
    enum ic_cu_type type;
    int device, sms, smem_max;
    int overlap; /* programmatic dependent launch */
    int wide;    /* wide.cuh's and split.cuh's kernels run here */
    int split;   /* float32: convolutions are exact_mma.cu's */
    size_t op_count, bytes;
    struct ic_cu_weights ops[IC_LAW_PLAN_OPS_MAX];
};

/* Channels are stored in whole 16s. */
static inline unsigned ic_cu_pad(unsigned channels)
{
    return (channels + 15) / 16 * 16;
}

/* Bytes of one sample of a tensor: 16-bit, [y][x][ic_cu_pad(channels)]. */
size_t ic_cu_tensor_bytes(const struct ic_law *law, unsigned channels, unsigned height, unsigned width);

/* What a CUDA call's failure means to the caller; `what` says what was tried. */
enum ic_status ic_cu_fail(struct ic_err *err, cudaError_t e, const char *what);

/* What the back end "cuda" computes a law in. float32 laws in float32, others in fp16: it holds NF4's values,
 * and bfloat16's eight bits, while the layers that a policy keeps in float32 would lose what they are kept
 * for. bfloat16 where a weight is past fp16. Spikes (SNN_UNET) need float32, and devices before 8.0 have
 * nothing else. */
enum ic_cu_type ic_cu_type_of(const struct ic_law *law);

/* IC_UNAVAILABLE: no driver, no device, or one that is too old for `type`. */
enum ic_status ic_cu_pack(const struct ic_law *law, enum ic_cu_type type, struct ic_law_packed **out,
                          struct ic_err *err);
/* float32: what the inputs of op `at` are at most, from what is packed of the ops before it; INFINITY: not known. */
double ic_cu_input_bound(const struct ic_law_packed *packed, const struct ic_law_plan *plan, size_t at);
void ic_cu_unpack(struct ic_law_packed **packed);

#endif
