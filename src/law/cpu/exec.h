/* Internal to law/cpu: what pack.c makes and exec.c runs. */
#ifndef IC_LAW_CPU_EXEC_H
#define IC_LAW_CPU_EXEC_H

#include "law/cpu/cpu.h"
#include "law/cpu/kernels.h"
#include "law/cpu/pool.h"

/* The weights of one op of the plan, by the op's index (the list is the same on every grid). */
struct ic_cpu_weights {
    size_t u, bias; /* floats from `data`; bias: SIZE_MAX where there is none */
};

struct ic_law_packed {
    const struct ic_law *law; /* borrowed */
    const struct ic_cpu_kernels *kernels;
    struct ic_cpu_pool *pool; /* owned */
    bool direct;
    unsigned micro_batch;
    size_t op_count;
    struct ic_cpu_weights ops[IC_LAW_PLAN_OPS_MAX];
    float *data; /* owned, 64-byte aligned */
    size_t data_bytes;
};

void ic_cpu_unpack(struct ic_law_packed **packed);

#endif
