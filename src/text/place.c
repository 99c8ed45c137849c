/* See place.h. What is measured and what is computed:
 *
 *   weights of a layer    the file's tensors, to the byte
 *   cache of a layer      the file's figures; their sum is checked against llama.cpp's own, and scaled to
 * it for the kinds of cache that we do not know compute buffers       llama.cpp builds its graphs without
 * allocating anything and says how large they would be, for the very split that is planned: where layers
 * stay on the CPU, big batches copy their weights to the GPU, so that fewer layers can mean larger buffers
 *   the driver's own      constants, place.h
 */
#include "text/place.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/least.h"
#include "base/log.h"
#include "text/draft.h"
#include "text/internal.h"

#define CACHE_PAD 256 /* cells: llama.cpp rounds up to this */
#define RESERVE_TRIES 3

/* ---- sizes -------------------------------------------------------------------------------------- */

static void apply_sizes(struct ic_place *p)
{
    p->in.kv = (struct ic_gguf_kv){
        .cells = ((uint32_t)p->sizes.kv + CACHE_PAD - 1) / CACHE_PAD * CACHE_PAD,
        .sequences = (uint32_t)p->sizes.parallel,
        .batch = (uint32_t)p->sizes.batch,
        .k_type = p->type_k,
        .v_type = p->type_v,
        .swa_full = true,
    };
}

static bool has_state(const struct ic_gguf_facts *f)
{
    for (uint32_t i = 0; i < f->n_layers; i++)
        if (f->layer[i].state_bytes)
            return true;
    return false;
}

static bool cache_type(const char *name, enum ggml_type *out)
{
    *out = !name || !strcmp(name, "f16") ? GGML_TYPE_F16
           : !strcmp(name, "q8_0")       ? GGML_TYPE_Q8_0
           : !strcmp(name, "q4_0")       ? GGML_TYPE_Q4_0
                                         : GGML_TYPE_COUNT;
    return *out != GGML_TYPE_COUNT;
}

static enum ic_status decide_sizes(struct ic_place *p, const struct ic_text_config *cfg, struct ic_err *err)
{
    struct ic_sizes *s = &p->sizes;
    int32_t parallel_max = (int32_t)llama_max_parallel_sequences(), trained = (int32_t)p->facts.n_ctx_train;

    if (!cache_type(cfg->type_k, &p->type_k) || !cache_type(cfg->type_v, &p->type_v))
        return ic_fail(err, IC_BAD_REQUEST, "the type of the KV cache must be f16, q8_0 or q4_0");
    s->ctx = cfg->ctx_size ? cfg->ctx_size
             : trained > 0 ? ic_least(trained, IC_CTX_DEFAULT_MAX)
                           : IC_CTX_DEFAULT_MAX;
    if (s->ctx < 8)
        return ic_fail(err, IC_BAD_REQUEST, "a context of %d tokens is too small", s->ctx);
    if (cfg->parallel < 1 || cfg->parallel > parallel_max)
        return ic_fail(err, IC_BAD_REQUEST, "parallel must be 1 to %d", parallel_max);
    s->parallel = cfg->parallel;
    int64_t kv = cfg->kv_size ? cfg->kv_size : (int64_t)s->ctx * IC_KV_CONVERSATIONS;
    if (kv < s->ctx)
        return ic_fail(err, IC_BAD_REQUEST, "a KV cache of %lld tokens cannot hold one context of %d",
                       (long long)kv, s->ctx);
    if (kv > INT32_MAX / 2)
        return ic_fail(err, IC_BAD_REQUEST, "a KV cache of %lld tokens is too large", (long long)kv);
    s->kv = (int32_t)kv;
    /* A sequence more costs a few bits in each cell and a row of logits, but a recurrent model a whole state. One is kept for copies of parts
     * (ic_text_seq_save). */
    s->seqs = has_state(&p->facts)
                  ? s->parallel
                  : ic_most(s->parallel, ic_least(s->parallel + IC_SEQS_KEPT, parallel_max - 1));
    s->batch = ic_most(cfg->batch > 0 ? cfg->batch : IC_BATCH_DEFAULT, s->parallel);
    p->ctx_default = !cfg->ctx_size;
    p->kv_default = !cfg->kv_size;
    p->batch_default = cfg->batch <= 0;
    apply_sizes(p);
    return IC_OK;
}

/* Makes the cheapest thing smaller that nobody asked for. False: all is at its smallest. */
static bool shrink(struct ic_place *p)
{
    struct ic_sizes *s = &p->sizes, before = *s;

    if (p->kv_default && s->kv > s->ctx) {
        s->kv = ic_most(s->kv / 2, s->ctx);
    } else if (p->batch_default && s->batch > ic_most(s->parallel, IC_BATCH_SHRUNK_MIN)) {
        s->batch = ic_most(s->batch / 2, ic_most(s->parallel, IC_BATCH_SHRUNK_MIN));
    } else if (p->ctx_default && s->ctx > IC_CTX_SHRUNK_MIN) {
        s->ctx = ic_most(s->ctx / 2, IC_CTX_SHRUNK_MIN);
        s->kv = p->kv_default ? s->ctx : s->kv;
    } else {
        return false;
    }
    ic_warn(
        "memory",
        "smaller, to fit: %d tokens a conversation (was %d), %d in all (was %d), batches of %d (was %d)",
        s->ctx, before.ctx, s->kv, before.kv, s->batch, before.batch);
    apply_sizes(p);
    return true;
}

/* ---- devices ------------------------------------------------------------------------------------ */

static bool same_card(ggml_backend_dev_t a, ggml_backend_dev_t b)
{
    struct ggml_backend_dev_props pa, pb;

    ggml_backend_dev_get_props(a, &pa);
    ggml_backend_dev_get_props(b, &pb);
    return pa.device_id && pb.device_id && !strcmp(pa.device_id, pb.device_id);
}

/* As llama.cpp chooses: cards of their own, each once though two back ends see it; integrated ones where
 * there is nothing better. */
static unsigned find_devices(ggml_backend_dev_t *out, enum ggml_backend_dev_type type)
{
    unsigned n = 0;

    for (size_t i = 0; i < ggml_backend_dev_count() && n < IC_PLAN_DEVICES_MAX; i++) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        bool known = ggml_backend_dev_type(dev) != type;
        for (unsigned k = 0; k < n && !known; k++)
            known = same_card(out[k], dev);
        if (!known)
            out[n++] = dev;
    }
    return n;
}

static bool is_cuda(ggml_backend_dev_t dev)
{
    return !strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)), "CUDA");
}

static uint64_t free_memory(ggml_backend_dev_t dev, const struct ic_text_config *cfg, uint64_t *total)
{
    struct ggml_backend_dev_props props;
    size_t got_free = 0, got_total = 0;
    uint64_t other;

    ggml_backend_dev_memory(dev, &got_free, &got_total);
    *total = got_total;
    ggml_backend_dev_get_props(dev, &props);
    if (cfg->gpu_free && props.device_id && cfg->gpu_free(cfg->gpu_free_arg, props.device_id, &other) &&
        other < got_free)
        return other;
    return got_free;
}

static void add_device(struct ic_place *p, const struct ic_text_config *cfg, ggml_backend_dev_t dev,
                       bool plan_only)
{
    unsigned i = p->in.n_devices;
    struct ic_ledger_device d = {.margin = cfg->vram_margin};

    snprintf(d.name, sizeof d.name, "%s", dev ? ggml_backend_dev_name(dev) : "GPU");
    snprintf(d.desc, sizeof d.desc, "%s", dev ? ggml_backend_dev_description(dev) : "assumed");
    if (dev)
        d.free = free_memory(dev, cfg, &d.total);
    else
        d.total = cfg->vram_max;
    if (cfg->vram_max && (plan_only || cfg->vram_max < d.free))
        d.free = cfg->vram_max;
    int id = ic_ledger_enter(p->ledger, &d);
    if (id < 0)
        return;
    struct ic_ledger_device now[IC_LEDGER_DEVICES_MAX];
    ic_ledger_devices(p->ledger, now, IC_LEDGER_DEVICES_MAX);
    uint64_t room = ic_ledger_room(p->ledger, id), spare = room + d.margin;
    p->dev[i] = dev;
    p->ledger_id[i] = id;
    memcpy(p->name[i], d.name, sizeof d.name);
    memcpy(p->desc[i], d.desc, sizeof d.desc);
    p->device[i] = (struct ic_plan_device){
        .name = p->name[i],
        .desc = p->desc[i],
        .total = d.total,
        .free = now[id].free,
        .held = room && now[id].free > spare ? now[id].free - spare : 0,
        .margin = d.margin,
        .context = !dev           ? IC_CUDA_CONTEXT + IC_CUDA_LATER
                   : is_cuda(dev) ? IC_CUDA_LATER
                                  : 0,
    };
    p->in.n_devices++;
}

static void look_for_devices(struct ic_place *p, const struct ic_text_config *cfg, bool plan_only)
{
    ggml_backend_dev_t found[IC_PLAN_DEVICES_MAX];

    p->in.devices = p->device;
    if (cfg->gpu_layers == 0)
        return; /* not even asked for free memory: for some drivers that makes a context */
    unsigned n = find_devices(found, GGML_BACKEND_DEVICE_TYPE_GPU);
    if (n == 0)
        n = find_devices(found, GGML_BACKEND_DEVICE_TYPE_IGPU);
    for (unsigned i = 0; i < n; i++)
        add_device(p, cfg, found[i], plan_only);
    if (n == 0 && plan_only && cfg->vram_max)
        add_device(p, cfg, NULL, plan_only);
    else if (n == 0 && cfg->gpu_layers != IC_GPU_LAYERS_AUTO)
        ic_warn("memory", "no GPU, or no back end for it: all layers stay on the CPU");
}

/* ---- what llama.cpp is told --------------------------------------------------------------------- */

struct llama_model_params ic_place_model_params(struct ic_place *p)
{
    struct llama_model_params mp = llama_model_default_params();
    unsigned n = 0;

    IC_ASSERT(llama_max_devices() <= sizeof p->split / sizeof *p->split);
    memset(p->split, 0, sizeof p->split);
    for (unsigned i = 0; i < p->in.n_devices; i++) {
        if (p->plan.split[i] <= 0 || !p->dev[i])
            continue; /* a device without layers is not to get a context either */
        p->split[n] = p->plan.split[i];
        p->used[n++] = p->dev[i];
    }
    p->used[n] = NULL;
    mp.devices = p->used;
    mp.tensor_split = p->split;
    mp.n_gpu_layers = n ? p->plan.layers : 0;
    return mp;
}

struct llama_context_params ic_place_context_params(const struct ic_place *p)
{
    struct llama_context_params cp = llama_context_default_params();

    cp.n_ctx = (uint32_t)p->sizes.kv;
    cp.n_batch = cp.n_ubatch = (uint32_t)p->sizes.batch;
    cp.n_seq_max =
        (uint32_t)ic_least(p->sizes.seqs + !has_state(&p->facts), (int32_t)llama_max_parallel_sequences());
    /* Only the last row of each sequence is asked for, and some proposals: without this the logits of a whole batch are
     * reserved. (No fewer than there are sequences, and no more in a decode: llama.cpp asserts both.) */
    cp.n_outputs_max = cp.n_seq_max;
    if (p->pooling) { /* any row may be asked for its hidden state, which its logits come along with; we pool ourselves */
        cp.n_outputs_max = (uint32_t)ic_most(p->sizes.batch, (int32_t)cp.n_seq_max);
        cp.pooling_type = LLAMA_POOLING_TYPE_NONE;
    }
    cp.kv_unified = true;
    cp.type_k = p->type_k;
    cp.type_v = p->type_v;
    if (p->type_v != GGML_TYPE_F16) /* llama.cpp has nothing else that reads them */
        cp.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    if (p->plan.layers > 0 && p->type_v == GGML_TYPE_F16)
        cp.flash_attn_type = p->flash;
    return cp;
}

/* ---- measuring ---------------------------------------------------------------------------------- */

/* Where there is no figure: logits, mask and a few activations of a batch. */
static uint64_t guess_compute(const struct ic_place *p)
{
    const struct ic_sizes *s = &p->sizes;

    int32_t outputs = p->pooling ? ic_most(s->seqs, s->batch) : s->seqs;

    return 4 * ((uint64_t)outputs * p->facts.n_vocab +
                (uint64_t)s->batch * (16 * (uint64_t)p->facts.n_embd + p->in.kv.cells));
}

static uint64_t cache_by_facts(const struct ic_place *p)
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < p->facts.n_layers; i++)
        sum += ic_gguf_kv_bytes(&p->facts, i, &p->in.kv);
    return sum;
}

static void take_measures(struct ic_place *p)
{
    const struct ic_meter *m = &p->meter;
    uint64_t facts = cache_by_facts(p);

    p->in.measured = m->compute_seen;
    p->in.host_compute = 0;
    for (int i = 0; i < m->n; i++)
        if (strstr(m->row[i].name, "CPU") || strstr(m->row[i].name, "_Host"))
            p->in.host_compute += m->row[i].compute;
    for (unsigned d = 0; d < p->in.n_devices; d++) {
        if (p->dev[d] && p->plan.split[d] <= 0)
            continue; /* it was not part of this measurement */
        p->device[d].compute =
            !m->compute_seen ? guess_compute(p)
            : p->dev[d]
                ? ic_meter_row(m, ggml_backend_buft_name(ggml_backend_dev_buffer_type(p->dev[d]))).compute
                : p->in.host_compute;
    }
    if (facts && m->cache_total)
        p->in.kv_scale = (double)m->cache_total / (double)facts;
    else if (m->cache_total)
        ic_warn("memory", "this model's cache is of a kind that cannot be planned: %s",
                ic_bytes_text(m->cache_total).s);
    if (facts && m->cache_total && (p->in.kv_scale < 0.99 || p->in.kv_scale > 1.01))
        ic_debug("memory", "the cache is %.2f times what the file says", p->in.kv_scale);
}

/* Loads without allocating, for the plan as it is. A model that even this cannot load is broken; a context
 * that cannot be made leaves guesses. */
static enum ic_status measure(struct ic_place *p, struct ic_err *err)
{
    struct llama_model_params mp = ic_place_model_params(p);

    mp.no_alloc = true;
    mp.load_mode = LLAMA_LOAD_MODE_NONE;
    ic_meter_listen(&p->meter);
    struct llama_model *model = ic_load_file(p->path, mp);
    struct llama_context *ctx = model ? llama_init_from_model(model, ic_place_context_params(p)) : NULL;
    ic_meter_listen(NULL);
    if (ctx)
        llama_free(ctx);
    llama_model_free(model);
    if (!model)
        return ic_fail(err, IC_BAD_REQUEST,
                       "model %s: broken or of a kind that this llama.cpp does not know", p->path);
    take_measures(p);
    memcpy(p->measured, p->plan.split, sizeof p->measured);
    return IC_OK;
}

/* ---- planning ----------------------------------------------------------------------------------- */

/* Plans `wanted` layers (-1: as many as fit, `at_most`), measuring until the plan is the one that was
 * measured. */
static enum ic_status plan_measured(struct ic_place *p, int32_t wanted, int32_t at_most, struct ic_err *err)
{
    enum ic_status st;

    p->in.exactly = wanted;
    p->in.at_most = at_most;
    for (int round = 0;; round++) {
        ic_plan_make(&p->plan, &p->in);
        if (p->plan.layers == 0 || round == IC_MEASURE_ROUNDS ||
            !memcmp(p->measured, p->plan.split, sizeof p->measured))
            return IC_OK;
        if ((st = measure(p, err)) != IC_OK)
            return st;
        p->in.at_most =
            ic_least(p->in.at_most, p->plan.layers); /* never up again, or it might go to and fro */
    }
}

/* Measures the model with all of it on the GPUs, which tells what they can. llama.cpp would look at the
 * split itself and give flash attention up altogether, because a batch of 32 rows computes layers of the
 * CPU on the GPU too and so not where they lie. Without it the cells of other sequences are computed along,
 * and the buffers are ten times as large. */
static enum ic_status measure_all(struct ic_place *p, struct ic_err *err)
{
    p->in.exactly = INT32_MAX;
    ic_plan_make(&p->plan, &p->in);
    enum ic_status st = measure(p, err);
    if (p->meter.flash)
        p->flash = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    return st;
}

/* The host's part: refuses or shrinks what would be killed when its pages are touched. */
static enum ic_status fit_host(struct ic_place *p, struct ic_err *err)
{
    uint64_t available, total;

    if (!ic_host_memory(&available, &total))
        return IC_OK;
    p->in.host_available = available;
    for (;;) {
        uint64_t compute = p->in.host_compute ? p->in.host_compute : guess_compute(p),
                 need = p->plan.host_kv + compute;
        if (need <= available)
            return IC_OK;
        if (!shrink(p)) {
            if (need > total)
                return ic_fail(err, IC_OOM,
                               "a KV cache of %d tokens needs %s of memory, there are %s (try a smaller "
                               "--kv-size or --ctx-size)",
                               p->sizes.kv, ic_bytes_text(need).s, ic_bytes_text(total).s);
            ic_warn("memory", "%s are needed, %s are available", ic_bytes_text(need).s,
                    ic_bytes_text(available).s);
            return IC_OK;
        }
        p->in.host_compute = 0;
        ic_plan_make(&p->plan, &p->in);
    }
}

static enum ic_status reserve_device(struct ic_place *p, unsigned d, struct ic_err *err)
{
    const struct ic_plan_share *s = &p->plan.device[d];
    bool force = !p->plan.fits;
    char what[64];
    int id = p->ledger_id[d];
    enum ic_status st;

    snprintf(what, sizeof what, "weights of %" PRId32 " layers%s", s->layers,
             s->output ? " and the output" : "");
    if ((st = ic_ledger_reserve(p->ledger, id, p->owner, what, s->weights, force, err)) != IC_OK ||
        (st = ic_ledger_reserve(p->ledger, id, p->owner, "KV cache", s->kv, force, err)) != IC_OK ||
        (st = ic_ledger_reserve(p->ledger, id, p->owner, "compute buffers", p->device[d].compute, force,
                                err)) != IC_OK)
        return st;
    return ic_ledger_reserve(p->ledger, id, p->owner, "driver context", p->device[d].context, force, err);
}

/* False: another engine was quicker. */
static bool reserve(struct ic_place *p)
{
    struct ic_err err = {0};

    ic_ledger_release(p->ledger, p->owner);
    for (unsigned d = 0; d < p->in.n_devices; d++) {
        if (p->plan.device[d].used == 0)
            continue;
        if (reserve_device(p, d, &err) != IC_OK) {
            ic_ledger_release(p->ledger, p->owner);
            ic_warn("memory", "%s", err.msg);
            return false;
        }
    }
    return true;
}

/* Plans `layers` at most until the ledger agrees. A measurement that fails here stops nothing: the figures
 * are then those of before. */
static void plan_at_most(struct ic_place *p, int32_t layers)
{
    for (int i = 0; i < RESERVE_TRIES; i++) {
        plan_measured(p, -1, layers, NULL);
        p->plan.fits = true;
        if (reserve(p))
            return;
        layers = ic_most(p->plan.layers - 1, 0);
    }
    p->in.exactly = 0; /* somebody takes it away under our hands: then without */
    ic_plan_make(&p->plan, &p->in);
}

static void to_log(void *arg, const char *text)
{
    (void)arg;
    ic_info("memory", "%s", text);
}

static enum ic_status decide(struct ic_place *p, const struct ic_text_config *cfg, bool plan_only,
                             struct ic_err *err)
{
    int32_t wanted = cfg->gpu_layers == IC_GPU_LAYERS_AUTO ? -1
                     : cfg->gpu_layers < 0                 ? INT32_MAX
                                                           : cfg->gpu_layers;
    enum ic_status st = decide_sizes(p, cfg, err);

    if (st != IC_OK)
        return st;
    look_for_devices(p, cfg, plan_only);
    if (p->in.n_devices == 0)
        ic_plan_make(&p->plan, &p->in);
    else if ((st = measure_all(p, err)) == IC_OK)
        st = plan_measured(p, wanted, INT32_MAX, err);
    /* Without a GPU the buffers are what they are; only a plan wants to know beforehand. */
    if (st == IC_OK && plan_only && p->plan.layers == 0)
        st = measure(p, err);
    if (st == IC_OK)
        p->plan.host_compute = p->in.host_compute;
    return st == IC_OK ? fit_host(p, err) : st;
}

/* Facts of the model and its adapters. */
static enum ic_status read_files(struct ic_place *p, const struct ic_text_config *cfg, struct ic_err *err)
{
    enum ic_status st = ic_gguf_read(&p->facts, cfg->path, err);

    if (st == IC_OK)
        st = ic_lora_parse(&p->lora, cfg->lora, err);
    for (int i = 0; st == IC_OK && i < p->lora.n; i++)
        st = ic_gguf_add_lora(&p->facts, p->lora.item[i].path, err);
    return st;
}

enum ic_status ic_place_open(struct ic_place **out, const struct ic_text_config *cfg, bool plan_only,
                             struct ic_err *err)
{
    const char *inject = getenv("IC_TEST_LOAD_FAIL");
    enum ic_status st;

    struct ic_place *p = *out = calloc(1, sizeof *p);
    if (!p)
        return ic_fail(err, IC_OOM, "out of memory");
    p->path = cfg->path;
    p->owner = cfg->owner ? cfg->owner : IC_LEDGER_OWNER_TEXT;
    p->in.what = cfg->guest ? "draft model" : "model";
    p->pooling = cfg->pooling;
    p->in.facts = &p->facts;
    p->in.kv_scale = 1;
    p->flash = LLAMA_FLASH_ATTN_TYPE_AUTO;
    p->inject = inject ? atoi(inject) : 0;
    if ((st = read_files(p, cfg, err)) != IC_OK)
        return st;
    if (!cfg->ledger && (st = ic_ledger_open(&p->own_ledger, err)) != IC_OK)
        return st;
    p->ledger = cfg->ledger ? cfg->ledger : p->own_ledger;
    if ((st = decide(p, cfg, plan_only, err)) != IC_OK || plan_only)
        return st;
    ic_plan_print(&p->plan, &p->in, to_log, NULL);
    if (!p->plan.fits)
        ic_warn("memory", "%d layers on the GPU were asked for and do not fit", p->plan.layers);
    if (!reserve(p))
        plan_at_most(p, ic_most(p->plan.layers - 1, 0));
    return IC_OK;
}

void ic_place_close(struct ic_place **pp)
{
    struct ic_place *p = *pp;

    if (!p)
        return;
    if (p->ledger)
        ic_ledger_release(p->ledger, p->owner);
    ic_ledger_close(&p->own_ledger);
    ic_lora_deinit(&p->lora);
    free(p);
    *pp = NULL;
}

/* ---- when it fails all the same ----------------------------------------------------------------- */

bool ic_place_injected(struct ic_place *p)
{
    if (p->inject <= 0)
        return false;
    p->inject--;
    return true;
}

bool ic_place_step_down(struct ic_place *p, const char *why)
{
    int32_t before = p->plan.layers;

    if (before > 0) {
        plan_at_most(p, before - (before + 3) / 4);
        ic_warn("memory", "%s with %d of %d layers on the GPU: trying %d", why, before, p->plan.layers_max,
                p->plan.layers);
        return true;
    }
    if (!shrink(p))
        return false;
    p->in.host_compute = 0;
    ic_plan_make(&p->plan, &p->in);
    return true;
}

void ic_place_settle(struct ic_place *p)
{
    ic_ledger_release(p->ledger, p->owner);
    for (unsigned d = 0; d < p->in.n_devices; d++) {
        const struct ic_plan_share *s = &p->plan.device[d];
        if (s->used == 0 || !p->dev[d])
            continue;
        struct ic_meter_row got =
            ic_meter_row(&p->meter, ggml_backend_buft_name(ggml_backend_dev_buffer_type(p->dev[d])));
        struct {
            const char *what;
            uint64_t planned, taken;
        } items[] = {
            {"weights", s->weights, got.weights},
            {"KV cache", s->kv, got.cache},
            {"compute buffers", p->device[d].compute, got.compute},
            {"driver context", p->device[d].context, p->device[d].context},
        };
        for (size_t i = 0; i < sizeof items / sizeof *items; i++)
            ic_ledger_reserve(p->ledger, p->ledger_id[d], p->owner, items[i].what, items[i].taken, true,
                              NULL);
        ic_info("memory", "%s: taken %s of weights (planned %s), %s of KV cache (%s), %s of buffers (%s)",
                p->name[d], ic_bytes_text(got.weights).s, ic_bytes_text(s->weights).s,
                ic_bytes_text(got.cache).s, ic_bytes_text(s->kv).s, ic_bytes_text(got.compute).s,
                ic_bytes_text(p->device[d].compute).s);
    }
}

/* ---- `plan` ------------------------------------------------------------------------------------- */

/* With --draft, the draft comes first, as when they are loaded, and the model gets what is left. */
enum ic_status ic_text_plan(const struct ic_text_config *cfg, void (*line)(void *arg, const char *text),
                            void *arg, struct ic_err *err)
{
    struct ic_text_config c[2] = {*cfg, *cfg};
    struct ic_ledger *ledger = NULL;
    struct ic_place *p[2] = {NULL};
    enum ic_status st = ic_text_load_backends(cfg->backends, err);

    if (st == IC_OK && cfg->draft && (st = ic_ledger_open(&ledger, err)) == IC_OK) {
        c[0] = ic_draft_config(cfg);
        c[0].ledger = c[1].ledger = ledger;
    }
    for (int i = cfg->draft ? 0 : 1; i < 2 && st == IC_OK; i++)
        if ((st = ic_place_open(&p[i], &c[i], true, err)) == IC_OK) {
            ic_plan_print(&p[i]->plan, &p[i]->in, line, arg);
            if (i == 0)
                reserve(p[i]);
        }
    ic_place_close(&p[0]);
    ic_place_close(&p[1]);
    ic_ledger_close(&ledger);
    return st;
}
