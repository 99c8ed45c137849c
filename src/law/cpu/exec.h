/* Internal to law/cpu: what pack.c makes and exec.c runs. */
#ifndef IC_LAW_CPU_EXEC_H
#define IC_LAW_CPU_EXEC_H

#include "law/cpu/cpu.h"
#include "law/cpu/kernels.h"
#include "law/cpu/pool.h"

/* The weights of one op of the plan, by the op's index (the list is the same on every grid). */
struct ic_cpu_weights {
    enum ic_cpu_form form;
    size_t u, bias; /* floats from `data`; SIZE_MAX where there is none. u: F32 alone */
    size_t small;   /* bytes from `small`: the weight in fewer bits (kernels.h) */
    size_t maps;    /* from `maps`: PyTorch's channel at each input place, then at each output place */
    unsigned k, n;  /* padded inputs and outputs */
    unsigned taps;  /* 9, 4 or 1 */
    unsigned panels_at_once; /* that the scratch for expanded weights holds */
};

struct ic_law_packed {
    const struct ic_law *law; /* borrowed */
    const struct ic_cpu_kernels *kernels;
    struct ic_cpu_pool *pool; /* owned */
    bool direct;
    bool bf16; /* products of bfloat16 where weights are bf16 or NF4 and Winograd does not apply */
    bool keep_out;
    unsigned micro_batch;
    size_t op_count;
    struct ic_cpu_weights ops[IC_LAW_PLAN_OPS_MAX];
    float *data; /* owned, 64-byte aligned */
    size_t data_bytes;
    uint8_t *small; /* owned, 64-byte aligned; NULL where every weight is float32 */
    size_t small_bytes;
    int32_t *maps; /* owned */
    size_t maps_count;
    float *expanded; /* owned, 64-byte aligned: one pass of one layer; used under the pool's lock */
    size_t expanded_bytes;
};

/* The task of expanding op's weights; its pass (block_from, block_to) is set by the caller. */
struct ic_cpu_expand ic_cpu_expand_of(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                                      size_t op);
/* Winograd with weights in few bits, of which each unit expands its own in its scratch. */
bool ic_cpu_expands_in_units(const struct ic_law_packed *packed, const struct ic_cpu_weights *w);
/* Floats of expanded weights of `panels` panels, of which the last may be narrow. */
size_t ic_cpu_expanded_floats(const struct ic_law_packed *packed, const struct ic_cpu_weights *w,
                              unsigned panels);

void ic_cpu_unpack(struct ic_law_packed **packed);

#endif
