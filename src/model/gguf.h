/* Facts of a GGUF file, read from its header alone: what there is to place in memory, and how much of it.
 *
 * The header is somebody else's word. It is parsed by libggml-base; everything taken from it is checked
 * here for type and size, and every tensor must lie inside its file. Pure reading, any thread; a file of a
 * 128k vocabulary takes about 50 ms. ggml's own log goes wherever the process has set it to. */
#ifndef IC_MODEL_GGUF_H
#define IC_MODEL_GGUF_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

#define IC_GGUF_LAYERS_MAX 512
#define IC_GGUF_SPLITS_MAX 256
#define IC_GGUF_KEYS_MAX 4096
#define IC_GGUF_TENSORS_MAX 65536
#define IC_GGUF_ROW_MAX (1u << 24) /* elements of one cached row; the largest model known has 2^14 */

/* One repeating layer ("blk.N."). */
struct ic_gguf_layer {
    uint64_t bytes;        /* of all its tensors */
    uint64_t expert_bytes; /* of these, experts of which a token uses a few */
    uint32_t tensors;      /* how many */
    uint32_t k_row, v_row; /* elements of the KV cache per token; 0: keeps none */
    uint64_t state_bytes;  /* recurrent state per sequence; 0: none */
    bool swa; /* looks back n_swa tokens only; false where the file leaves it to the architecture */
};

struct ic_gguf_facts {
    char arch[64];
    uint32_t n_layers, n_ctx_train, n_embd, n_vocab;
    uint32_t n_experts, n_swa;
    uint32_t n_files;      /* of a split model; else 1 */
    uint64_t file_bytes;   /* of all files */
    uint64_t tensor_bytes; /* of all tensors */
    /* embeddings and what else stands before the first layer: these stay in host memory */
    uint64_t input_bytes;
    uint64_t embd_bytes;   /* of these, the token embedding */
    uint64_t output_bytes; /* what stands behind the last layer */
    uint32_t output_tensors;
    /* of adapters, which are counted with the layers that they change; in no other sum */
    uint64_t lora_bytes;
    bool tied; /* no output matrix of its own: wherever the output runs, it needs a copy of the token
                  embedding */
    struct ic_gguf_layer layer[IC_GGUF_LAYERS_MAX];
};

/* `path`: the file, or the first one of a split model (NAME-00001-of-0000N.gguf), whose others lie beside
 * it. IC_NOT_FOUND: a file is missing. IC_BAD_REQUEST: not a GGUF model, cut short, or lying; *out is then
 * undefined. */
enum ic_status ic_gguf_read(struct ic_gguf_facts *out, const char *path, struct ic_err *err);

/* Checks that a file is a LoRA adapter for the model of *f, and adds its tensors to the layers that they change. That
 * each fits its tensor of the model is left to llama.cpp. IC_NOT_FOUND, IC_BAD_REQUEST as above; *f is then undefined. */
enum ic_status ic_gguf_add_lora(struct ic_gguf_facts *f, const char *path, struct ic_err *err);

/* How the cache is made. */
struct ic_gguf_kv {
    uint32_t cells;     /* tokens, a multiple of 256 */
    uint32_t sequences; /* recurrent states */
    uint32_t batch;     /* matters with a windowed cache only */
    int k_type, v_type; /* enum ggml_type */
    bool swa_full;      /* layers with a window keep all cells all the same */
};

/* Bytes of the cache and the recurrent state of one layer (< n_layers). */
uint64_t ic_gguf_kv_bytes(const struct ic_gguf_facts *f, uint32_t layer, const struct ic_gguf_kv *kv);
/* Bytes that the output needs on a device, the copy of a tied embedding included. */
uint64_t ic_gguf_output_bytes(const struct ic_gguf_facts *f);

#endif
