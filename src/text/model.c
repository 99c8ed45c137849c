/* Loading a model and running it. See model.h for the contract.
 *
 * One context holds all sequences in a unified KV cache: its cells are shared by everybody and taken as needed,
 * so that conversations of any length fit beside each other. Flash attention skips the cells of other
 * sequences, which is what makes the unified cache as fast as separate ones. */
#include "text/internal.h"

#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/exit.h"
#include "base/log.h"
#include "hw/cpu.h"
#include "text/attention.h"
#include "text/lora.h"
#include "text/place.h"

#define LAST_LINES_MS 500 /* for the log, where llama.cpp ends the process */
#define CPU_SAMPLE_MS 200 /* how long the free cores are looked for at start */
/* How long the compute threads spin for the next graph, 0-100; 1 is about 2 ms. llama.cpp's default of 50 spins for
 * a tenth of a second, which is stolen from the Law M engine when both take turns. */
#define THREADPOOL_POLL 1

/* what llama.cpp logged last as an error on this thread */
static _Thread_local char complaint[IC_ERR_MSG_MAX];

static void to_log(enum ggml_log_level level, const char *text, void *arg)
{
    static _Thread_local enum ggml_log_level last;
    (void)arg;
    ic_meter_line(text);
    if (level != GGML_LOG_LEVEL_CONT)
        last = level;
    if (level == GGML_LOG_LEVEL_ERROR)
        snprintf(complaint, sizeof complaint, "%.*s", (int)strcspn(text, "\n"), text);
    if (last == GGML_LOG_LEVEL_ERROR)
        ic_warn("llama", "%s", text);
    else
        ic_debug("llama", "%s", text);
}

/* ggml gives up by abort() on files that lie in ways its parser does not check. Whoever started us should read
 * one line, not a register dump. What llama.cpp's own sources complain of while a file is read is the file's fault, and
 * anything that is not as it should be in the first decode after that (which threads of a pool compute). */
static _Thread_local const char *reading; /* the file, or NULL */
static _Atomic(const char *) trying;      /* likewise */

static void on_ggml_abort(const char *text)
{
    const char *tried = atomic_load(&trying), *path = tried ? tried : reading;
    const bool file = tried ? strstr(text, "GGML_ASSERT") != NULL
                            : reading && (strstr(text, "src/llama-") || strstr(text, "src/gguf"));

    ic_error("llama", "gave up: %s", text);
    ic_log_flush(LAST_LINES_MS);
    if (file)
        fprintf(stderr, "inference-core: model %s: broken, llama.cpp gave up on it\n", path);
    _exit(file ? IC_EXIT_FILE : IC_EXIT_FAILED);
}

struct llama_model *ic_load_file(const char *path, struct llama_model_params p)
{
    reading = path;
    struct llama_model *m = llama_model_load_from_file(path, p);
    reading = NULL;
    return m;
}

enum ic_status ic_text_load_backends(const char *dir, struct ic_err *err)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static bool done;

    pthread_mutex_lock(&lock);
    if (!done) {
        llama_log_set(to_log, NULL);
        ggml_set_abort_callback(on_ggml_abort);
        ggml_backend_load_all_from_path(dir ? dir : IC_LLAMA_LIB);
        llama_backend_init();
        done = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) != NULL;
    }
    bool usable = done;
    pthread_mutex_unlock(&lock);
    if (!usable)
        return ic_fail(err, IC_BAD_REQUEST, "no ggml back end for the CPU in %s", dir ? dir : IC_LLAMA_LIB);
    return IC_OK;
}

static void fill_names(struct ic_text_model *m, const char *path)
{
    const char *base = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    size_t len = strlen(base);

    if (len > 5 && !strcmp(base + len - 5, ".gguf"))
        len -= 5;
    if (len >= sizeof m->info.name)
        len = sizeof m->info.name - 1;
    memcpy(m->info.name, base, len);
    m->info.name[len] = 0;
    llama_model_desc(m->model, m->info.desc, sizeof m->info.desc);
}

/* llama.cpp knows a template by the strings in it. TinyLlama's has the tags of Zephyr and names its EOS by variable
 * only, which is taken for GLM-Edge, whose turns have no end: the model then answers nonsense. */
static bool is_zephyr_by_variable(const char *t)
{
    return strstr(t, "<|user|>") && strstr(t, "<|assistant|>") && strstr(t, "eos_token") &&
           !strstr(t, "<|end|>") && !strstr(t, "<|endoftext|>") && !strstr(t, "</s>");
}

static enum ic_status pick_template(struct ic_text_model *m, const char *wanted, struct ic_err *err)
{
    if (wanted) {
        const struct llama_chat_message probe = {"user", "x"};
        if (llama_chat_apply_template(wanted, &probe, 1, true, NULL, 0) < 0)
            return ic_fail(err, IC_BAD_REQUEST, "chat template %s is not one that llama.cpp knows", wanted);
        m->template_copy = strdup(wanted);
        m->template = m->template_copy;
        if (!m->template)
            return ic_fail(err, IC_OOM, "out of memory");
    } else {
        m->template = llama_model_chat_template(m->model, NULL);
        m->zephyr = m->template && is_zephyr_by_variable(m->template);
    }
    m->info.has_chat_template = m->template != NULL;
    return IC_OK;
}

static void fill_info(struct ic_text_model *m)
{
    const struct ic_place *p = m->place;
    struct ic_text_info *i = &m->info;

    i->n_vocab = llama_vocab_n_tokens(m->vocab);
    i->n_ctx_train = llama_model_n_ctx_train(m->model);
    i->n_params = llama_model_n_params(m->model);
    i->model_bytes = llama_model_size(m->model);
    i->ctx_size = p->sizes.ctx;
    i->kv_size = p->sizes.kv;
    i->parallel = p->sizes.parallel;
    i->seqs = p->sizes.seqs;
    i->window = llama_model_is_recurrent(m->model) || llama_model_is_hybrid(m->model) ? -1
                : llama_model_n_swa(m->model) > 0
                    ? llama_model_n_swa(m->model) / 2 /* symmetric ones look half as far */
                    : 0;
    i->batch = p->sizes.batch;
    i->gpu_layers = p->plan.layers;
    i->layers = p->plan.layers_max;
    i->pooling = p->pooling;
    i->n_embd = p->pooling ? llama_model_n_embd_out(m->model) : 0;
}

static bool abort_trampoline(void *arg)
{
    struct ic_text_model *m = arg;
    return m->abort_test && m->abort_test(m->abort_arg);
}

/* ggml's scheduler asks of each node of a graph, before it computes any, whether we want to see its result. */
static bool on_node(struct ggml_tensor *node, bool ask, void *arg)
{
    const struct ic_text_model *m = arg;

    if (ask)
        ic_attention_take(node, m->pool ? m->threads.now : m->info.threads);
    return !ask;
}

static enum ic_status make_context(struct ic_text_model *m, struct ic_err *err)
{
    struct llama_context_params p = ic_place_context_params(m->place);

    p.n_threads = p.n_threads_batch = m->info.threads;
    p.abort_callback = abort_trampoline;
    p.abort_callback_data = m;
    if (m->info.gpu_layers == 0) { /* so that all of it lies in the host's memory */
        p.cb_eval = on_node;
        p.cb_eval_user_data = m;
    }
    m->ctx = llama_init_from_model(m->model, p);
    if (!m->ctx)
        return ic_fail(err, IC_OOM,
                       "no room for a context of %d tokens (try a smaller --kv-size or --ctx-size)%s",
                       m->info.kv_size,
                       p.type_k == GGML_TYPE_F16 && p.type_v == GGML_TYPE_F16
                           ? ""
                           : ", or heads that a quantised cache cannot hold (try --cache-type-k f16 "
                             "--cache-type-v f16)");
    m->info.outputs = (int32_t)p.n_outputs_max;
    m->info.kv_size = (int32_t)llama_n_ctx(m->ctx);
    if (m->info.ctx_size > m->info.kv_size)
        m->info.ctx_size = m->info.kv_size;
    m->batch = llama_batch_init(m->info.batch, 0, 1);
    return m->batch.token ? IC_OK : ic_fail(err, IC_OOM, "out of memory");
}

static void use_pool(struct ic_text_model *m, struct ggml_threadpool *pool, int32_t threads)
{
    if (pool)
        llama_attach_threadpool(m->ctx, pool, pool);
    else
        llama_detach_threadpool(m->ctx);
    llama_set_n_threads(m->ctx, threads, threads);
}

/* Without a pool of its own ggml starts and joins its threads anew for every decode. The CPU back end keeps a pointer to
 * the pool it computed with last, and pauses that one when the next decode brings another: a pool that is replaced
 * must live until that decode is done, and the guest's. */
static void make_pool(struct ic_text_model *m, int32_t threads)
{
    struct ggml_threadpool_params p = ggml_threadpool_params_default(threads);

    IC_ASSERT(!m->old_pool);
    m->old_pool = m->pool;
    p.poll = THREADPOOL_POLL;
    m->pool = m->pool_make(&p);
    use_pool(m, m->pool, threads);
    if (m->guest)
        use_pool(m->guest, m->pool, threads);
}

/* The guest may not decode for long. One row does, in a sequence that nothing else is in. False: it still points to
 * another pool than its host's. */
static bool touch(struct ic_text_model *guest)
{
    struct ic_row row = {0, 0, guest->info.seqs, true, false};

    ic_text_decode(guest, &row, 1);
    ic_text_seq_rm(guest, row.seq, 0);
    return guest->computed_with == guest->host->pool;
}

/* We have computed with the new one. */
static void free_old_pool(struct ic_text_model *m)
{
    if (!m->old_pool)
        return;
    if (m->guest && m->guest->computed_with == m->old_pool && !touch(m->guest))
        m->guest->broken = true;
    m->pool_free(m->old_pool);
    m->old_pool = NULL;
}

void ic_text_lend_threads(struct ic_text_model *m, struct ic_text_model *guest)
{
    IC_ASSERT(!m->guest && !m->host && !guest->host && !guest->pool && guest->info.seqs < IC_TEXT_SEQS_MAX);
    m->guest = guest;
    guest->host = m;
    guest->info.threads = m->pool ? m->threads.now : m->info.threads;
    use_pool(guest, m->pool, guest->info.threads);
}

/* Threads without a processor are spun for by all others at each node: on two, 8 of them are a hundred times slower than
 * 2, and 512 do not come to the end of the first decode. */
static int32_t asked_threads(const struct ic_text_config *cfg)
{
    const int32_t most = ic_cpu_processors();

    if (cfg->threads > most)
        ic_warn("text", "%d instead of the %d threads asked for: there are no more processors for us", most,
                cfg->threads);
    return cfg->threads > most ? most : cfg->threads;
}

static void start_threads(struct ic_text_model *m, const struct ic_text_config *cfg)
{
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_reg_t reg = cpu ? ggml_backend_dev_backend_reg(cpu) : NULL;

    if (!reg || cfg->guest)
        return;
    *(void **)&m->pool_make = ggml_backend_reg_get_proc_address(reg, "ggml_threadpool_new");
    *(void **)&m->pool_free = ggml_backend_reg_get_proc_address(reg, "ggml_threadpool_free");
    if (!m->pool_make || !m->pool_free)
        return;
    make_pool(m, m->info.threads);
    /* A number that was asked for is the most that there will be, and never more than there are cores. */
    int32_t cores = ic_cpu_cores();
    ic_threads_init(&m->threads, m->info.threads,
                    cfg->threads > 0 && cfg->threads < cores ? cfg->threads : cores);
}

/* After a decode: see threads.h. A pool of another size is made rather than a part of one used, whose other threads
 * would go on to spin for every decode. */
static void adapt_threads(struct ic_text_model *m, int64_t wall, int64_t cpu)
{
    int64_t now = ic_now_ns();
    int32_t before = m->threads.now;
    bool changed = ic_threads_decoded(&m->threads, wall, cpu, now);

    if (!changed && ic_threads_may_grow(&m->threads)) {
        double others = ic_cpu_others(&m->watch);
        changed = others >= 0 && ic_threads_others(&m->threads, others, now);
    }
    if (!changed)
        return;
    ic_info("text", "%d instead of %d compute threads: others %s", m->threads.now, before,
            m->threads.now < before ? "use the cores" : "left cores alone");
    make_pool(m, m->threads.now);
}

/* The first decode pays for page faults of the weights and for building the graph; no client should. */
static bool warm_up(struct ic_text_model *m, const char *path)
{
    int32_t token = llama_vocab_bos(m->vocab);
    struct ic_row row = {token >= 0 ? token : 0, 0, 0, true, false};

    atomic_store(&trying, path);
    const bool decoded = ic_text_decode(m, &row, 1) == IC_DECODE_OK;
    atomic_store(&trying, NULL);
    if (!decoded)
        return false;
    const float *logits = ic_text_logits(m, 0);
    if (!isfinite(logits[ic_logits_argmax(logits, m->info.n_vocab)]))
        ic_warn("text", "the first decode gave no usable logits: %s may be broken", path);
    llama_memory_clear(llama_get_memory(m->ctx), true);
    memset(m->sure, 0, sizeof m->sure);
    return true;
}

/* Whether this kind of model gives hidden states at all is known only when it has. */
static enum ic_status try_embedding(struct ic_text_model *m, struct ic_err *err)
{
    int32_t token = llama_vocab_bos(m->vocab);
    struct ic_row row = {token >= 0 ? token : 0, 0, 0, false, true};
    bool decoded = ic_text_decode(m, &row, 1) == IC_DECODE_OK;
    bool given = decoded && m->info.n_embd > 0 && ic_text_embedding(m, 0);

    llama_memory_clear(llama_get_memory(m->ctx), true);
    memset(m->sure, 0, sizeof m->sure);
    if (!decoded && m->info.gpu_layers > 0)
        return ic_fail(err, IC_OOM, "the first decode with hidden states failed");
    return given ? IC_OK
                 : ic_fail(err, IC_BAD_REQUEST,
                           "this model gives no embeddings: serve it with --pooling none");
}

/* Takes down what an attempt has made. */
static void unload(struct ic_text_model *m)
{
    IC_ASSERT(!m->guest); /* its CPU back end points to our pool */
    if (m->host)
        m->host->guest = NULL;
    m->host = NULL;
    if (m->ctx) {
        llama_detach_threadpool(m->ctx);
        llama_free(m->ctx);
    }
    free_old_pool(m);
    if (m->pool)
        m->pool_free(m->pool);
    if (m->batch.token)
        llama_batch_free(m->batch);
    llama_model_free(m->model);
    m->ctx = NULL;
    m->embd_on = false;
    m->pool = NULL;
    m->batch = (struct llama_batch){0};
    m->model = NULL;
    m->vocab = NULL;
}

static enum ic_status check_kind(struct ic_text_model *m, const char *path, struct ic_err *err)
{
    m->vocab = llama_model_get_vocab(m->model);
    if (!llama_model_has_decoder(m->model) || llama_model_has_encoder(m->model) ||
        llama_model_is_diffusion(m->model) || llama_vocab_type(m->vocab) == LLAMA_VOCAB_TYPE_NONE)
        return ic_fail(err, IC_BAD_REQUEST, "model %s: not a decoder that generates text", path);
    return IC_OK;
}

/* Before there is a context, whose graphs are sized for the adapters that the model has. They live as long as the model. */
static enum ic_status load_adapters(struct ic_text_model *m, struct ic_err *err)
{
    const struct ic_lora_list *list = &m->place->lora;

    for (int i = 0; i < list->n; i++) {
        const char *path = list->item[i].path;
        complaint[0] = 0;
        if ((m->adapter[i] = llama_adapter_lora_init(m->model, path)) != NULL)
            continue;
        const char *why =
            strstr(complaint, "adapter: "); /* "FUNCTION: failed to apply lora adapter: WHY" */
        return ic_fail(err, strstr(complaint, "allocate") ? IC_OOM : IC_BAD_REQUEST, "adapter %s: %s", path,
                       why ? why + strlen("adapter: ") : "broken, or of another model");
    }
    return IC_OK;
}

static enum ic_status apply_adapters(struct ic_text_model *m, struct ic_err *err)
{
    const struct ic_lora_list *list = &m->place->lora;
    float scale[IC_LORA_MAX];

    for (int i = 0; i < list->n; i++)
        scale[i] = list->item[i].scale;
    if (list->n > 0 && llama_set_adapters_lora(m->ctx, m->adapter, (size_t)list->n, scale) != 0)
        return ic_fail(err, IC_BAD_REQUEST, "the adapters cannot be applied");
    for (int i = 0; i < list->n; i++)
        ic_info("text", "adapter %s at scale %g", list->item[i].path, (double)scale[i]);
    return IC_OK;
}

/* Loads, makes the context and decodes once, as planned. IC_OOM: another plan may do better. */
static enum ic_status attempt(struct ic_text_model *m, const struct ic_text_config *cfg, struct ic_err *err)
{
    bool gpu = m->place->plan.layers > 0;
    enum ic_status st;

    m->model = ic_load_file(cfg->path, ic_place_model_params(m->place));
    if (!m->model)
        return gpu ? ic_fail(err, IC_OOM, "loading failed")
                   : ic_fail(err, IC_BAD_REQUEST,
                             "model %s: broken or of a kind that this llama.cpp does not know", cfg->path);
    if ((st = check_kind(m, cfg->path, err)) != IC_OK)
        return st;
    fill_info(m);
    m->info.threads = cfg->guest         ? 1
                      : cfg->threads > 0 ? asked_threads(cfg)
                                         : ic_cpu_cores_free(CPU_SAMPLE_MS);
    if (ic_place_injected(m->place))
        return ic_fail(err, IC_OOM, "no memory (injected)");
    if ((st = load_adapters(m, err)) != IC_OK || (st = make_context(m, err)) != IC_OK ||
        (st = apply_adapters(m, err)) != IC_OK)
        return st;
    start_threads(m, cfg);
    if (!warm_up(m, cfg->path)) {
        if (gpu)
            return ic_fail(err, IC_OOM, "the first decode failed");
        ic_warn("text", "the warm-up decode failed");
    }
    return m->info.pooling ? try_embedding(m, err) : IC_OK;
}

static enum ic_status bring_up(struct ic_text_model *m, const struct ic_text_config *cfg,
                               struct ic_err *err)
{
    enum ic_status st;

    for (;;) {
        ic_meter_listen(&m->place->meter);
        st = attempt(m, cfg, err);
        ic_meter_listen(NULL);
        if (st == IC_OK)
            break;
        unload(m);
        if (st != IC_OOM || !ic_place_step_down(m->place, err->msg))
            return st;
        *err = (struct ic_err){0};
    }
    ic_place_settle(m->place);
    return IC_OK;
}

static int32_t longest_piece(const struct llama_vocab *vocab)
{
    int32_t longest = 0;

    for (int32_t t = 0, n = llama_vocab_n_tokens(vocab); t < n; t++) {
        int32_t len = (int32_t)strlen(llama_vocab_get_text(vocab, t));
        longest = len > longest ? len : longest;
    }
    return longest;
}

enum ic_status ic_text_model_open(struct ic_text_model **out, const struct ic_text_config *cfg,
                                  struct ic_err *err)
{
    struct ic_err own = {0};
    enum ic_status st;

    *out = NULL;
    err = err ? err : &own;
    struct ic_text_model *m = calloc(1, sizeof *m);
    if (!m)
        return ic_fail(err, IC_OOM, "out of memory");
    if ((st = ic_text_load_backends(cfg->backends, err)) != IC_OK ||
        (st = ic_place_open(&m->place, cfg, false, err)) != IC_OK || (st = bring_up(m, cfg, err)) != IC_OK)
        goto out;
    fill_names(m, cfg->path);
    m->max_piece = longest_piece(m->vocab);
    if ((st = ic_chars_learn(&m->chars, m->vocab, err)) != IC_OK ||
        (st = pick_template(m, cfg->chat_template, err)) != IC_OK)
        goto out;
    /* Threads that wait for a GPU, or for the disk as in the warm-up, use no CPU either, and are not to be taken for
     * threads that do not get any. */
    m->adapt = m->pool && m->info.gpu_layers == 0 && (m->threads.max > 1 || m->threads.now > 1);
    if (!cfg->guest)
        ic_info("text",
                "%s (%s): %d tokens a conversation, %d in all, %d sequences, %d threads, %d of %d layers "
                "on the GPU",
                m->info.name, m->info.desc, m->info.ctx_size, m->info.kv_size, m->info.parallel,
                m->info.threads, m->info.gpu_layers, m->info.layers);
    *out = m;
    return IC_OK;
out:
    ic_text_model_close(&m);
    return st;
}

enum ic_status ic_text_vocab_open(struct ic_text_model **out, const struct ic_text_config *cfg,
                                  struct ic_err *err)
{
    struct llama_model_params p = llama_model_default_params();
    struct ic_text_model *m = calloc(1, sizeof *m);
    enum ic_status st;

    *out = NULL;
    if (!m)
        return ic_fail(err, IC_OOM, "out of memory");
    p.vocab_only = true;
    p.n_gpu_layers = 0;
    if ((st = ic_text_load_backends(cfg->backends, err)) == IC_OK &&
        !(m->model = ic_load_file(cfg->path, p)))
        st = ic_fail(err, IC_BAD_REQUEST, "model %s: its vocabulary cannot be read", cfg->path);
    if (st == IC_OK) {
        m->vocab = llama_model_get_vocab(m->model);
        m->max_piece = longest_piece(m->vocab);
        st = ic_chars_learn(&m->chars, m->vocab, err);
    }
    if (st != IC_OK) {
        ic_text_model_close(&m);
        return st;
    }
    *out = m;
    return IC_OK;
}

void ic_text_model_close(struct ic_text_model **mp)
{
    struct ic_text_model *m = *mp;

    if (!m)
        return;
    unload(m);
    ic_place_close(&m->place);
    free(m->template_copy);
    free(m->chars);
    free(m);
    *mp = NULL;
}

const struct ic_text_info *ic_text_model_info(const struct ic_text_model *m)
{
    return &m->info;
}

void ic_text_set_abort(struct ic_text_model *m, bool (*test)(void *), void *arg)
{
    m->abort_test = test;
    m->abort_arg = arg;
}

/* llama.cpp gives hidden states of all rows or of none, and logits with each. So it is switched on for the decodes that
 * need it only. */
static bool switch_embeddings(struct ic_text_model *m, const struct ic_row *rows, int32_t n)
{
    bool on = false;

    for (int32_t i = 0; i < n; i++)
        on |= rows[i].embd;
    IC_ASSERT(!on || m->info.pooling);
    if (on != m->embd_on)
        llama_set_embeddings(m->ctx, on);
    m->embd_on = on;
    return on;
}

enum ic_decode ic_text_decode(struct ic_text_model *m, const struct ic_row *rows, int32_t n)
{
    struct llama_batch *b = &m->batch;

    IC_ASSERT(n > 0 && n <= m->info.batch);
    if (m->broken)
        return IC_DECODE_FAILED;
    b->n_tokens = n;
    bool all = switch_embeddings(m, rows, n);
    for (int32_t i = 0; i < n; i++) {
        b->token[i] = rows[i].token;
        b->pos[i] = rows[i].pos;
        b->n_seq_id[i] = 1;
        b->seq_id[i][0] = rows[i].seq;
        b->logits[i] = all || rows[i].logits;
    }
    int64_t wall = m->adapt ? ic_now_ns() : 0, cpu = m->adapt ? ic_cpu_self_ns() : 0;
    int32_t rc = llama_decode(m->ctx, *b);
    if (m->host && (rc == 0 || rc == 2)) /* else it may not have come to computing */
        m->computed_with = m->host->pool;
    if (rc == 0) {
        llama_synchronize(m->ctx);
        for (int32_t i = 0; i < n; i++)
            m->sure[rows[i].seq] = rows[i].pos + 1;
        free_old_pool(m);
        if (m->adapt)
            adapt_threads(m, ic_now_ns() - wall, ic_cpu_self_ns() - cpu);
        return IC_DECODE_OK;
    }
    return rc == 1 ? IC_DECODE_FULL : rc == 2 ? IC_DECODE_ABORTED : IC_DECODE_FAILED;
}

const float *ic_text_logits(struct ic_text_model *m, int32_t i)
{
    return llama_get_logits_ith(m->ctx, i);
}

const float *ic_text_embedding(struct ic_text_model *m, int32_t i)
{
    return m->embd_on ? llama_get_embeddings_ith(m->ctx, i) : NULL;
}

/* What a decode that failed left behind can always be taken away. */
static bool can_cut(const struct ic_text_model *m, int32_t seq, int32_t from)
{
    int32_t n = m->sure[seq];
    return from == 0 || from >= n || m->info.window == 0 || n <= m->info.window;
}

bool ic_text_seq_rm(struct ic_text_model *m, int32_t seq, int32_t from)
{
    llama_memory_t mem = llama_get_memory(m->ctx);

    if (can_cut(m, seq, from) && llama_memory_seq_rm(mem, seq, from, -1)) {
        if (m->sure[seq] > from)
            m->sure[seq] = from;
        return true;
    }
    llama_memory_seq_rm(mem, seq, -1, -1);
    m->sure[seq] = 0;
    return from == 0;
}

void ic_text_seq_cp(struct ic_text_model *m, int32_t src, int32_t dst, int32_t from, int32_t to)
{
    llama_memory_seq_cp(llama_get_memory(m->ctx), src, dst, from, to);
    m->sure[dst] = to;
}

static bool parts(const struct ic_text_model *m)
{
    return m->info.window == 0 && m->info.seqs < IC_TEXT_SEQS_MAX;
}

/* llama.cpp saves whole sequences only. For a part, its cells are lent to one sequence more that is never decoded, and
 * that one is saved; likewise on the way back. */
size_t ic_text_seq_save(struct ic_text_model *m, int32_t seq, int32_t from, int32_t to, size_t max,
                        void **data)
{
    llama_memory_t mem = llama_get_memory(m->ctx);
    int32_t what = from > 0 ? m->info.seqs : seq;

    *data = NULL;
    if (to != m->sure[seq] || (from > 0 && !parts(m)))
        return 0;
    if (from > 0)
        llama_memory_seq_cp(mem, seq, what, from, to);
    size_t n = llama_state_seq_get_size(m->ctx, what), got = 0;
    if (n > 0 && n <= max && (*data = malloc(n)) != NULL)
        got = llama_state_seq_get_data(m->ctx, *data, n, what);
    if (got != n || got == 0) {
        free(*data);
        *data = NULL;
        got = 0;
    }
    if (from > 0)
        llama_memory_seq_rm(mem, what, -1, -1);
    return got;
}

bool ic_text_seq_load(struct ic_text_model *m, int32_t seq, int32_t from, int32_t keep_from, int32_t to,
                      const void *data, size_t bytes)
{
    llama_memory_t mem = llama_get_memory(m->ctx);
    bool part = parts(m);
    int32_t into = part ? m->info.seqs : seq;

    if (!part && keep_from > from)
        return false;
    bool ok = llama_state_seq_set_data(m->ctx, data, bytes, into) == bytes;
    if (part && ok)
        llama_memory_seq_cp(mem, into, seq, keep_from, to);
    if (part || !ok)
        llama_memory_seq_rm(mem, into, -1, -1);
    if (ok)
        m->sure[seq] = to;
    return ok;
}
