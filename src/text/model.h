/* A GGUF model and its context through llama.cpp's C API: load, decode many sequences at once, read
 * logits, translate between text and tokens.
 *
 * Thread: open, decode, sequences and logits belong to the text engine's thread. ic_text_abort may be
 * called from any thread. Tokenising, pieces and info are read-only after open and safe anywhere.
 * llama.h is included nowhere outside src/text. */
#ifndef IC_TEXT_MODEL_H
#define IC_TEXT_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/status.h"
#include "text/pooling.h"

struct ic_ledger;

struct ic_text_config {
    const char *path;          /* GGUF file (the first one of a split model) */
    const char *chat_template; /* NULL: the model's own; else a name that llama.cpp knows ("chatml") */
    const char *lora;          /* adapters, as text/lora.h reads them; NULL: none */
    const char *draft;         /* a smaller model that guesses ahead, opened by text/draft.h; NULL: none */
    /* of hidden states, for embeddings; not NONE: every row of a decode may have one */
    enum ic_pooling pooling;
    int32_t ctx_size; /* tokens of one conversation; 0: the model's, at most IC_CTX_DEFAULT_MAX */
    /* tokens (KV cells) of all conversations together; 0: IC_KV_CONVERSATIONS * ctx_size */
    int32_t kv_size;
    int32_t parallel;            /* sequences decoded at once */
    int32_t batch;               /* tokens of one decode at most; 0: IC_BATCH_DEFAULT */
    int32_t threads;             /* compute threads; 0: the cores that are free now */
    const char *type_k, *type_v; /* of the KV cache: f16, q8_0 or q4_0; NULL: f16 */
    int32_t gpu_layers;       /* layers on the GPU, the output being one; 0: no GPU is touched; -1: all */
    uint64_t vram_margin;     /* bytes of each device that stay free */
    uint64_t vram_max;        /* bytes of each device that may be planned with; 0: what is free */
    const char *backends;     /* folder of ggml's back ends; NULL: where llama.cpp's libraries lie */
    struct ic_ledger *ledger; /* shared with other engines, must outlive the model; NULL: one of its own */
    /* Another opinion on what is free of a device (NVML's), by PCI address ("0000:01:00.0"); the lower one counts. NULL:
     * the back end's alone. False: it does not know this device. Called during open. */
    bool (*gpu_free)(void *arg, const char *pci, uint64_t *bytes);
    void *gpu_free_arg;
    const char *owner; /* in the ledger: a literal; NULL: IC_LEDGER_OWNER_TEXT */
    bool guest; /* computes with another model's threads (ic_text_lend_threads): it makes none of its own */
};
/* Sizes that are 0 become smaller still where memory is short, before the model is refused. */

#define IC_LEDGER_OWNER_TEXT "text" /* who holds what a model takes */
#define IC_LEDGER_OWNER_DRAFT "draft"
#define IC_CTX_DEFAULT_MAX 4096
#define IC_KV_CONVERSATIONS 4
#define IC_BATCH_DEFAULT 512
#define IC_GPU_LAYERS_ALL (-1)
#define IC_GPU_LAYERS_AUTO (-2) /* as many as fit */

/* Owned by the model. */
struct ic_text_info {
    char name[128]; /* file name without folder and .gguf */
    char desc[128]; /* architecture, size and type in words */
    int32_t n_vocab, n_ctx_train;
    int32_t ctx_size, kv_size, parallel, batch, threads; /* as decided */
    int32_t gpu_layers, layers;                          /* on a GPU, of how many; the output is one */
    /* rows of a decode that may ask for logits, parallel at least: one more ends the process */
    int32_t outputs;
    /* sequences that can be held: parallel, and where they cost nothing some that only keep what they have */
    int32_t seqs;
    /* what the memory can do: 0: be cut and shared anywhere; w: a sequence longer than w only as a whole; -1: a
     * recurrent state, which only goes on */
    int32_t window;
    enum ic_pooling pooling; /* NONE: no hidden states can be had */
    int32_t n_embd;          /* numbers of one; 0: none can be had */
    uint64_t n_params, model_bytes;
    bool has_chat_template;
};

struct ic_text_model;

/* Loads the model and makes its context; seconds to minutes. What fits on the GPU is decided here and logged, item by
 * item; when it does not fit after all, fewer layers are tried, down to none. IC_NOT_FOUND: no such file, of the model or an adapter.
 * IC_BAD_REQUEST: not a model that can generate text, an adapter that is not for it, hidden states wanted of a model that
 * gives none, or a size that cannot be. IC_OOM: the context does not fit. */
enum ic_status ic_text_model_open(struct ic_text_model **out, const struct ic_text_config *cfg,
                                  struct ic_err *err);
/* The vocabulary alone: for tokenising and pieces while the model is away. Costs a few MiB. Errors as above. */
enum ic_status ic_text_vocab_open(struct ic_text_model **out, const struct ic_text_config *cfg,
                                  struct ic_err *err);
void ic_text_model_close(struct ic_text_model **m);
const struct ic_text_info *ic_text_model_info(const struct ic_text_model *m);

/* What open would decide, without loading the weights (seconds, mostly for the vocabulary): the table, line by line,
 * that of cfg->draft before it.
 * vram_max then stands for what is free, and where there is no GPU, for one. Errors as above. */
enum ic_status ic_text_plan(const struct ic_text_config *cfg, void (*line)(void *arg, const char *text),
                            void *arg, struct ic_err *err);

/* One token of one sequence in a decode. */
struct ic_row {
    int32_t token, pos, seq;
    bool logits; /* its logits are wanted */
    /* its hidden state is; only with info.pooling. All rows of such a decode cost as if they had logits */
    bool embd;
};

enum ic_decode {
    IC_DECODE_OK,
    IC_DECODE_FULL,    /* no KV cells; nothing changed */
    IC_DECODE_ABORTED, /* the abort test said so; rows may be half done: remove them with ic_text_seq_rm */
    IC_DECODE_FAILED,  /* as ABORTED, but the model is at fault */
};

/* Decodes rows[0..n), n <= info.batch; blocks until done. */
enum ic_decode ic_text_decode(struct ic_text_model *m, const struct ic_row *rows, int32_t n);
/* Logits (n_vocab) of row i of the last decode; valid until the next. NULL when not asked for. */
const float *ic_text_logits(struct ic_text_model *m, int32_t i);
/* Hidden state (info.n_embd) of row i of the last decode, likewise. */
const float *ic_text_embedding(struct ic_text_model *m, int32_t i);
/* Forgets positions >= from of a sequence (0: all). False when this kind of model cannot keep the part
 * before `from`: then everything of the sequence has been forgotten. */
bool ic_text_seq_rm(struct ic_text_model *m, int32_t seq, int32_t from);
/* Positions [from, to) of `src` belong to `dst` too: the same cells, nothing is copied. `dst` holds exactly [0, from). Only as
 * info.window allows. */
void ic_text_seq_cp(struct ic_text_model *m, int32_t src, int32_t dst, int32_t from, int32_t to);
/* The KV of positions [from, to), which are the end of a sequence, in *data (malloc'd, the caller's): returns its bytes. 0:
 * more than max, no memory, or the model cannot (info.window != 0 and from > 0). */
size_t ic_text_seq_save(struct ic_text_model *m, int32_t seq, int32_t from, int32_t to, size_t max,
                        void **data);
/* Puts [keep_from, to) of data, saved as [from, …) from this or another instance of the same model, behind the keep_from
 * positions that the sequence holds. Needs free cells for all that was saved. False: it does not fit, in size or in kind;
 * positions >= keep_from are then undefined. */
bool ic_text_seq_load(struct ic_text_model *m, int32_t seq, int32_t from, int32_t keep_from, int32_t to,
                      const void *data, size_t bytes);
/* `test` runs on a compute thread now and then during a decode; true ends the decode (CPU only). */
void ic_text_set_abort(struct ic_text_model *m, bool (*test)(void *), void *arg);

/* Tokens of `text` (any bytes). `first`: a conversation begins, so the model's BOS is added where it wants one.
 * `special`: control tokens written in the text are those tokens (templates), else they are plain text (users).
 * *out is malloc'd by the call, owned by the caller. IC_TOO_LARGE past `max` tokens: *n is then the length. */
enum ic_status ic_text_tokenize(const struct ic_text_model *m, const char *text, size_t len, bool first,
                                bool special, int32_t max, int32_t **out, int32_t *n, struct ic_err *err);
/* The same for text that goes on behind other text (no BOS, no control tokens): as ic_text_tokenize, but without the
 * space that some vocabularies put in front of every beginning. */
enum ic_status ic_text_tokenize_more(const struct ic_text_model *m, const char *text, size_t len,
                                     int32_t max, int32_t **out, int32_t *n, struct ic_err *err);
/* Appends the bytes of a token (maybe a part of a character); control tokens give nothing. */
void ic_text_piece(const struct ic_text_model *m, int32_t token, struct ic_buf *out);

struct ic_chat_msg {
    const char *role;    /* "system", "user", "assistant", "tool" */
    const char *content; /* UTF-8, NUL-terminated */
};

/* The tokens of a conversation under the model's chat template, opened for the assistant's turn. Control
 * tokens inside a content stay text. IC_BAD_REQUEST: the model has no template or one that llama.cpp's C API
 * does not know. Otherwise as ic_text_tokenize. */
enum ic_status ic_text_chat_tokenize(const struct ic_text_model *m, const struct ic_chat_msg *msgs,
                                     size_t n_msgs, int32_t max, int32_t **out, int32_t *n,
                                     struct ic_err *err);

#endif
