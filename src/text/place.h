/* Bringing a model up on what there is: looks at the devices, measures, plans (text/plan.h), reserves in
 * the ledger, and when loading fails all the same, says what to try next.
 *
 *   open ──► try ──works──► settle (the ledger gets the real figures)
 *             ▲ └─fails──► step_down: fewer layers … none … a smaller cache, batch, context ──► false: give
 * up └───────────────┘
 *
 * The thread that loads the model. */
#ifndef IC_TEXT_PLACE_H
#define IC_TEXT_PLACE_H

#include <llama.h>

#include "hw/ledger.h"
#include "text/lora.h"
#include "text/meter.h"
#include "text/model.h"
#include "text/plan.h"

#define IC_CTX_SHRUNK_MIN 512 /* tokens: no context that nobody asked for becomes smaller than this */
#define IC_BATCH_SHRUNK_MIN 64
/* Sequences beside those that are decoded, for prefixes and idle sessions. llama.cpp reserves a row of logits for each. */
#define IC_SEQS_KEPT 32
#define IC_MEASURE_ROUNDS 4 /* a split changes the buffers, and these the split: so often at most */

/* What a CUDA process takes beside what it asks for: the context itself, where free memory was read without one (an
 * assumed card, NVML), and what comes once it computes: cuBLAS with its workspace, kernels loaded when first used, ggml's
 * pool. The latter were 171 to 193 MiB on an H100 (1.1 B model in f16, batches of 512). */
#define IC_CUDA_CONTEXT (UINT64_C(128) << 20)
#define IC_CUDA_LATER (UINT64_C(192) << 20)

struct ic_sizes {
    int32_t ctx, kv, parallel, batch;
    int32_t seqs; /* sequences: parallel, and some that only keep what they have */
};

struct ic_place {
    struct ic_gguf_facts facts;
    struct ic_sizes sizes;
    struct ic_plan_device device[IC_PLAN_DEVICES_MAX];
    struct ic_plan_in in;
    struct ic_plan plan;
    struct ic_meter meter;               /* of the last load */
    float measured[IC_PLAN_DEVICES_MAX]; /* the split that was measured last; all 0: none */
    enum llama_flash_attn_type flash;
    /* devices: llama.cpp's, ours, and what it is told to use */
    ggml_backend_dev_t dev[IC_PLAN_DEVICES_MAX]; /* NULL: an assumed one */
    char name[IC_PLAN_DEVICES_MAX][64], desc[IC_PLAN_DEVICES_MAX][128];
    int ledger_id[IC_PLAN_DEVICES_MAX];
    ggml_backend_dev_t used[IC_PLAN_DEVICES_MAX + 1];
    float split[128]; /* llama_max_devices() of them are read */
    struct ic_ledger *ledger, *own_ledger;
    const char *path, *owner; /* owner: in the ledger */
    struct ic_lora_list lora; /* checked; their bytes are in the facts */
    enum ic_pooling pooling;
    enum ggml_type type_k, type_v;               /* of the KV cache */
    bool ctx_default, kv_default, batch_default; /* nobody asked for this size, so it may shrink */
    int inject; /* for tests: so many attempts find no memory (IC_TEST_LOAD_FAIL) */
};

/* `plan_only`: devices may be assumed, nothing is reserved, and host buffers are measured too. Prints the
 * table to the log otherwise. Back ends must be loaded. Errors as ic_text_model_open. */
enum ic_status ic_place_open(struct ic_place **out, const struct ic_text_config *cfg, bool plan_only,
                             struct ic_err *err);
/* Gives everything back to the ledger. */
void ic_place_close(struct ic_place **p);

/* What llama.cpp is told. They point into *p and hold until it changes. */
struct llama_model_params ic_place_model_params(struct ic_place *p);
struct llama_context_params ic_place_context_params(const struct ic_place *p);

/* Whether this attempt is to be taken for one that found no memory. */
bool ic_place_injected(struct ic_place *p);
/* After a failed attempt: the next one to try, logged with `why`. False: there is none. */
bool ic_place_step_down(struct ic_place *p, const char *why);
/* After one that works. */
void ic_place_settle(struct ic_place *p);

#endif
