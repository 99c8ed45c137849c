/* What the files of src/text share. */
#ifndef IC_TEXT_INTERNAL_H
#define IC_TEXT_INTERNAL_H

#include <llama.h>

#include "hw/cpu.h"
#include "text/lora.h"
#include "text/model.h"
#include "text/threads.h"

struct ic_place;

/* Loads ggml's back ends from `dir` (NULL: the default), once in a process: later calls find them there.
 * IC_BAD_REQUEST: there is none for the CPU. */
enum ic_status ic_text_load_backends(const char *dir, struct ic_err *err);

/* Of n logits the place of the largest, the first of equals; NaNs are passed over, and 0 is returned where there is nothing
 * else. (sample.c) */
int32_t ic_logits_argmax(const float *l, int32_t n);
/* ln Σ exp(l), which turns logits into log probabilities; `max`: the largest. */
float ic_logits_log_sum_exp(const float *l, int32_t n, float max);

/* Appends a token's text to `out`; a control token has none. (prompt.c) */
void ic_vocab_piece(const struct llama_vocab *vocab, int32_t token, struct ic_buf *out);

#define IC_TEXT_SEQS_MAX 256 /* llama.cpp's LLAMA_MAX_SEQ */

/* Reads a model; where llama.cpp aborts over it, the process ends with IC_EXIT_FILE and a line that names it. */
struct llama_model *ic_load_file(const char *path, struct llama_model_params p);

/* chars.c. *out: NULL where every text has tokens; else free()'d by the caller. */
struct ic_chars;
enum ic_status ic_chars_learn(struct ic_chars **out, const struct llama_vocab *vocab, struct ic_err *err);
/* IC_BAD_REQUEST: llama.cpp must not see this text. */
enum ic_status ic_chars_check(const struct ic_chars *c, const char *text, size_t len, struct ic_err *err);

struct ic_text_model {
    struct ic_place *place; /* what lies where; holds our part of the ledger */
    struct llama_model *model;
    struct llama_context *ctx;
    struct llama_adapter_lora *adapter[IC_LORA_MAX]; /* those of place->lora; the model's */
    const struct llama_vocab *vocab;
    struct ggml_threadpool *pool, *old_pool; /* old: replaced, until the next decode is done */
    struct ggml_threadpool *(*pool_make)(struct ggml_threadpool_params *);
    void (*pool_free)(struct ggml_threadpool *);
    struct ic_threads threads;
    struct ic_cpu_watch watch;
    bool adapt; /* threads follow what the machine leaves us */
    struct llama_batch batch;
    bool embd_on;                   /* the context gives hidden states now */
    int32_t sure[IC_TEXT_SEQS_MAX]; /* positions of each sequence that a decode has been through with */
    const char *template;           /* NULL: none; owned by the llama model or the caller's config */
    char *template_copy;
    /* llama.cpp takes the template for another family's; it is Zephyr's with the model's own EOS */
    bool zephyr;
    int32_t max_piece;      /* bytes of the longest token text */
    struct ic_chars *chars; /* NULL: any will do */
    struct ic_text_info info;
    bool (*abort_test)(void *);
    void *abort_arg;
    struct ic_text_model *guest, *host; /* who computes with our threads; whose threads we compute with */
    /* of a guest: at its last decode; its CPU back end points there */
    const struct ggml_threadpool *computed_with;
    bool broken; /* never to be decoded again */
};

/* `guest`, opened as one (struct ic_text_config), computes with the threads of `m` from here on, until it is closed,
 * which must come first. Same thread as their decodes, which therefore take turns. */
void ic_text_lend_threads(struct ic_text_model *m, struct ic_text_model *guest);

#endif
