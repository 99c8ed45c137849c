/* The fast CPU back end of Law M: `ic_law_backend_cpu` (interface: law/plan.h), and what only a CPU has.
 *
 * Kernels for AVX-512, AVX2 (+FMA) and the compiler's baseline are all linked in; the best one that
 * this machine can run is taken when weights are packed, unless the environment variable IC_LAW_ISA
 * ("avx512", "avx2", "scalar") or a caller says otherwise. On one of them a simulation's result is the
 * same to the last bit whatever the batch, its place in it and the number of threads.
 *
 * A step runs a batch a few samples at a time ("micro-batch"): the arena is that of the micro-batch, so
 * a further simulation costs its own state, nothing else. The plan's own arena (plan->arena_bytes) is
 * neither used nor allocated; exec_bytes tells what is. */
#ifndef IC_LAW_CPU_CPU_H
#define IC_LAW_CPU_CPU_H

#include "law/plan.h"

extern const struct ic_law_backend ic_law_backend_cpu;

/* Bytes of [ceil(channels/16)][height*width][16] float32. */
size_t ic_law_cpu_tensor_bytes(const struct ic_law *law, unsigned channels, unsigned height,
                               unsigned width);

struct ic_law_cpu_opts {
    const char *isa;      /* NULL: IC_LAW_ISA, else the best */
    unsigned threads;     /* 0: as many as this process may run on */
    bool direct;          /* 3x3 convolutions without Winograd; IC_LAW_CONV=direct does the same. Always
                             so for SNN_UNET: a rounding difference would flip spikes */
    unsigned micro_batch; /* 0: chosen from the grid */
    size_t expand_bytes;  /* 0: IC_LAW_CPU_EXPAND_BYTES */
    bool keep_out;        /* net_out tells every sample's output; else only those of the last micro-batch */
    bool wide;            /* no products of bfloat16, even where the machine has them (AVX512-BF16) */
};

/* Weights that the law keeps in 4 or 16 bits are packed in as many and expanded to float32 (bfloat16 pairs
 * for transposed convolutions, where the machine multiplies those) as they are used: by each unit of work
 * in its own scratch, or a pass of output panels at a time into one scratch that all plans of the law
 * share, of at most this many bytes, or one panel where that is more. */
#define IC_LAW_CPU_EXPAND_BYTES ((size_t)16 << 20)

/* ic_law_backend.pack with options. BAD_REQUEST: no such instruction set, or not on this machine. */
enum ic_status ic_law_cpu_pack(const struct ic_law *law, const struct ic_law_cpu_opts *opts,
                               struct ic_law_packed **out, struct ic_err *err);

/* Of packed_bytes: the scratch for expanded weights; 0 where all are float32. */
size_t ic_law_cpu_expand_bytes(const struct ic_law_packed *packed);

const char *ic_law_cpu_isa(const struct ic_law_packed *packed);
/* The i-th instruction set this build knows, best first, or NULL past the last. */
const char *ic_law_cpu_isa_known(unsigned i);
bool ic_law_cpu_isa_usable(const char *isa);

/* Threads taking part in steps that start from now on, 1..those at packing. Any thread. */
void ic_law_cpu_set_threads(struct ic_law_packed *packed, unsigned threads);

/* For measurements: nanoseconds spent per phase since the last reset, summed over steps. */
struct ic_law_cpu_phase {
    const char *kind;  /* "wino", "norm" … */
    const char *label; /* the tensor it writes */
    double flops;      /* of one sample, counted as direct convolution; 0: not a convolution */
    uint64_t ns;
};
size_t ic_law_cpu_phases(const struct ic_law_exec *exec, struct ic_law_cpu_phase *out, size_t max);
void ic_law_cpu_profile(struct ic_law_exec *exec, bool on); /* resets; off by default */
/* FLOP/s of `threads` threads of the packed law's instruction set doing nothing but fused
 * multiply-adds. Blocks for about a quarter of a second. */
double ic_law_cpu_peak(struct ic_law_packed *packed);

#endif
