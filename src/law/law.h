/* A Law M in memory: a checkpoint's weights, checked, each in the precision that a policy gives it
 * (law/policy.h; float32 where there is none), and what config.json says of it.
 *
 * `ic_law_open` reads Atheria's `.pth` (torch zip), or safetensors, beside an optional config.json,
 * and either yields a complete law or fails with one sentence and leaves nothing behind. A law is
 * immutable once opened: any number of threads may read it; it must outlive its plans.
 * May block on file I/O. Formulas and file formats: shared/law-m.md §2, §3. */
#ifndef IC_LAW_LAW_H
#define IC_LAW_LAW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "law/arch.h"
#include "law/nf4.h"
#include "law/policy.h"

#define IC_LAW_NAME_MAX 128
#define IC_LAW_MODE_MAX 32

#define IC_LAW_WEIGHT_ALIGN 64 /* bytes; of every pointer in struct ic_law_weight */

/* One weight tensor: contiguous, row-major, PyTorch's order of dimensions:
 *   Conv2d           [out, in, kh, kw]
 *   ConvTranspose2d  [in, out, kh, kw]
 *   bias, norm scale/shift [c];  scalars: ndim 0, one element
 * Borrowed from the law. */
struct ic_law_weight {
    char name[IC_LAW_TENSOR_NAME_MAX];
    unsigned ndim;
    uint32_t dim[4]; /* unused: 1 */
    size_t count;    /* elements */
    enum ic_law_precision precision;
    const float *data;    /* FP32: the values; else NULL. Always FP32 where ndim < 4 */
    const uint16_t *half; /* FP16 (IEEE binary16), BF16: the values; else NULL */
    struct ic_nf4 nf4;    /* NF4: codes and scales (law/nf4.h); else zero */
};

/* out[0..n) = values from..from+n of w in float32, whatever it is kept in; from + n <= w->count. */
void ic_law_weight_read(const struct ic_law_weight *w, size_t from, size_t n, float *out);
size_t ic_law_weight_bytes(const struct ic_law_weight *w); /* padding not counted */

struct ic_law {
    char name[IC_LAW_NAME_MAX]; /* EXPERIMENT_NAME, else the file's stem; valid UTF-8 */
    char path[512];             /* the checkpoint that was read */
    enum ic_law_arch arch;
    unsigned d, b; /* complex channels of the field; hidden channels */
    bool product;  /* delta = net(psi) (.) psi; from the arch table */
    bool memory;   /* h, c per simulation; from the arch table */
    unsigned grid_multiple;

    /* From config.json; the default of law-m.md where it is silent. */
    float gamma;                        /* GAMMA_DECAY, default 0.01; < 0 acts as 0 */
    unsigned grid_training;             /* GRID_SIZE_TRAINING; 0: unknown */
    unsigned steps_training;            /* QCA_STEPS_TRAINING, default 100 */
    char initial_mode[IC_LAW_MODE_MAX]; /* INITIAL_STATE_MODE_INFERENCE, default complex_noise */
    bool has_config;
    int64_t episode;      /* from the checkpoint, else its name; -1: unknown */
    int64_t initial_step; /* law-m.md §3.2: from `step_N` in the name, else episode * steps_training */

    uint64_t params; /* parameters in the checkpoint's sense (buffers not counted) */
    size_t weight_count;
    struct ic_law_weight *weights;   /* what the plan's ops index; owned */
    size_t weight_bytes;             /* of `data`, padding included */
    void *data;                      /* one block behind all weights; owned */
    enum ic_law_precision precision; /* the least that a weight is kept in */
    uint64_t param_bytes;            /* of the parameters as kept, scales included, padding not */
    double weight_abs_max;
};

/* Zero-initialise, then set what is known. Borrowed for the call. */
struct ic_law_open_opts {
    const char *config; /* path of config.json; NULL: the one in the checkpoint's folder, if any */
    const char *arch;   /* name as in config.json; NULL: config, else the tensors decide */
    /* NULL: as the file has it. A quantised file (law/quant.h) is taken as it is; a policy that differs
     * from it is BAD_REQUEST, since what was rounded away is gone. */
    const struct ic_law_policy *policy;
};

/* `path`: a .pth/.pt/.safetensors file, or a folder (its latest checkpoint by the rule of law-m.md §3.1
 * and its config.json). On failure *out is NULL; codes: NOT_FOUND (no such file), BAD_REQUEST (what is
 * wrong with the content), TOO_LARGE (past a named bound), OOM, INTERNAL (I/O). */
enum ic_status ic_law_open(const char *path, const struct ic_law_open_opts *opts, struct ic_law **out,
                           struct ic_err *err);
void ic_law_close(struct ic_law **law); /* NULL and *law == NULL are fine */

/* DEEP_QCA only: conv_neighbors and the first 1x1 layer composed into one 3x3 convolution [b,2d,3,3],
 * a weight `<this>.weight` with bias `<this>.bias` that the checkpoint does not have. */
#define IC_LAW_FOLDED "folded"

/* Index into `weights`, or -1. */
int ic_law_weight_find(const struct ic_law *law, const char *name);

/* Bytes that one simulation owns on an H x W grid: psi [H,W,d,2] float32, and h, c [4b,H/4,W/4]
 * float32 each where the law has memory (0 otherwise). */
size_t ic_law_psi_bytes(const struct ic_law *law, unsigned height, unsigned width);
size_t ic_law_memory_bytes(const struct ic_law *law, unsigned height, unsigned width);

#endif
