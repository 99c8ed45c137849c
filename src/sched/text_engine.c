/* The text engine's thread. Everything that reaches it comes through one locked list of commands and the cancel
 * flags of requests; everything that leaves it goes into `events`. */
#include "sched/text_engine.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/altstack.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "hw/cpu.h"
#include "hw/ledger.h"
#include "sched/spill_disk.h"
#include "text/draft.h"
#include "text/lora.h"

#define REOPEN_TRIES 5 /* after 1, 2, 4 and 8 s */
#define FAILURES_MAX 2 /* decodes in a row, before the model is opened anew with fewer layers on the GPU */
/* Cells without a user that may stay beside streams; in between all of them leave. This many cost one stream 2.6 % on a CPU
 * (docs/benchmarks.md), but where they leave beside streams these go on in their cells, out of order, and sums in f16 then round
 * otherwise: with 128, a seed often said another thing than a moment before (wire_sampling under load: 6 of 20 runs; with 1024 none). */
#define IDLE_CELLS 1024
/* longer, and a loop that is busy with something else would slow down every stream */
#define HAND_OVER_NS IC_MS
#define OFFER_NS                                                                                           \
    (IC_MS /                                                                                               \
     4) /* tokens of one tick are written together, but none waits longer for the others to be drawn */

enum command_kind { CMD_SUBMIT, CMD_SESSION_CLOSE };

struct command {
    struct command *next;
    enum command_kind kind;
    struct ic_text_req *req;
    uint64_t session;
};

struct ic_text_engine {
    struct ic_worker worker;
    struct ic_text_engine_config cfg;
    struct ic_events *events;
    struct ic_text_model *model; /* the thread's; NULL while it is away */
    struct ic_draft *draft;      /* likewise; NULL also where there is none, or it has failed */
    struct ic_text_backend be;
    struct ic_spill_disk *disk;
    struct ic_text_sched *sched;
    struct ic_text_counters counters;
    struct ic_err err;
    struct ic_text_info info[2]; /* taken in turns, so that whoever still reads the one before may */
    _Atomic(const struct ic_text_info *) info_now;
    pthread_mutex_t vocab_lock;           /* guards the next two against unloading, see borrow */
    const struct ic_text_model *vocab_of; /* the model, or `vocab` while it is away */
    struct ic_text_model *vocab;
    int64_t idle_since_ns; /* 0: not idle */
    int failures;          /* decodes in a row that the model failed at */
    uint64_t files;        /* which files the model was opened from, model_files() */
    bool exchanged;        /* they are others than before, and the scheduler does not know yet */
    _Atomic(enum ic_engine_state) state;
    _Atomic int32_t inbox_requests;
    atomic_bool stop, draining;
    pthread_mutex_t lock; /* guards the list and `kicked` */
    pthread_cond_t wake;
    struct command *head, **tail;
    bool kicked;
    /* computing takes every core: the loop has none of its own, so this thread writes its tokens */
    bool hand_over;
    int64_t unsaid_ns; /* when the first event was put that has not been offered; 0: none */
};

/* ---- the real model behind the scheduler ---------------------------------------------------------------- */

static enum ic_status be_tokenize(void *arg, const char *text, size_t len, bool first, int32_t max,
                                  int32_t **out, int32_t *n, struct ic_err *err)
{
    struct ic_text_engine *e = arg;
    return first ? ic_text_tokenize(e->model, text, len, true, false, max, out, n, err)
                 : ic_text_tokenize_more(e->model, text, len, max, out, n, err);
}

static enum ic_status be_chat(void *arg, const struct ic_chat_msg *msgs, size_t n_msgs, int32_t max,
                              int32_t **out, int32_t *n, struct ic_err *err)
{
    struct ic_text_engine *e = arg;
    return ic_text_chat_tokenize(e->model, msgs, n_msgs, max, out, n, err);
}

/* What a decode that hangs looks like. */
static enum ic_decode faulty(struct ic_life *me, bool *is_fault)
{
    bool hang = ic_fault(IC_FAULT_TEXT_HANG) || ic_fault(IC_FAULT_TEXT_DEAD),
         stall = !hang && ic_fault(IC_FAULT_TEXT_STALL);

    *is_fault = hang || stall || ic_fault(IC_FAULT_TEXT_OOM);
    while (hang || (stall && !atomic_load(&me->abort)))
        usleep(10000);
    return stall ? IC_DECODE_ABORTED : IC_DECODE_FAILED;
}

static void hand_over(struct ic_text_engine *e)
{
    if (e->hand_over)
        ic_events_hand_over(e->events, HAND_OVER_NS);
    e->unsaid_ns = 0;
}

static enum ic_decode be_decode(void *arg, const struct ic_row *rows, int32_t n)
{
    struct ic_text_engine *e = arg;
    struct ic_life *me = e->worker.life;
    bool fault;

    hand_over(e); /* else the tokens of the last tick may wait until this one is computed */
    int64_t t0 = ic_worker_begin(&e->worker);
    enum ic_decode rc = faulty(me, &fault);
    if (!fault)
        rc = ic_text_decode(e->model, rows, n);
    int64_t t1 = ic_worker_end(&e->worker, me);
    ic_governor_pause_ns(e->cfg.governor, t1 - t0, t1); /* booked here, rested between ticks */
    if (rc == IC_DECODE_ABORTED && atomic_load(&me->abort))
        rc = IC_DECODE_FAILED;
    e->failures = rc == IC_DECODE_FAILED ? e->failures + 1 : rc == IC_DECODE_OK ? 0 : e->failures;
    return rc;
}

static int32_t be_draft_behind(void *arg, int32_t seq, const int32_t *tokens, int32_t n)
{
    struct ic_text_engine *e = arg;
    return ic_draft_behind(e->draft, seq, tokens, n);
}

/* As be_decode, but what fails here costs the draft and nothing else. */
static bool be_draft(void *arg, struct ic_draft_req *reqs, int32_t n)
{
    struct ic_text_engine *e = arg;
    struct ic_life *me = e->worker.life;

    hand_over(e);
    int64_t t0 = ic_worker_begin(&e->worker);
    bool ok = !ic_fault(IC_FAULT_DRAFT_FAIL) && ic_draft_propose(e->draft, reqs, n);
    int64_t t1 = ic_worker_end(&e->worker, me);
    ic_governor_pause_ns(e->cfg.governor, t1 - t0, t1);
    if (atomic_load(&me->abort)) /* it stood still */
        ok = false;
    if (!ok) {
        ic_warn("text", "the draft model failed: it goes on without");
        ic_draft_close(&e->draft);
    }
    return ok;
}

static bool be_seq_rm(void *arg, int32_t seq, int32_t from)
{
    struct ic_text_engine *e = arg;
    return ic_text_seq_rm(e->model, seq, from);
}

static void be_seq_cp(void *arg, int32_t src, int32_t dst, int32_t from, int32_t to)
{
    struct ic_text_engine *e = arg;
    ic_text_seq_cp(e->model, src, dst, from, to);
}

static size_t be_seq_save(void *arg, int32_t seq, int32_t from, int32_t to, size_t max, void **data)
{
    struct ic_text_engine *e = arg;
    return ic_text_seq_save(e->model, seq, from, to, max, data);
}

static bool be_seq_load(void *arg, int32_t seq, int32_t from, int32_t keep_from, int32_t to,
                        const void *data, size_t bytes)
{
    struct ic_text_engine *e = arg;
    return ic_text_seq_load(e->model, seq, from, keep_from, to, data, bytes);
}

static void be_piece(void *arg, int32_t token, struct ic_buf *out)
{
    struct ic_text_engine *e = arg;
    ic_text_piece(e->model, token, out);
}

static enum ic_status be_sampler_open(void *arg, void **sampler, const struct ic_text_params *p,
                                      const int32_t *prompt, int32_t n, struct ic_err *err)
{
    struct ic_text_engine *e = arg;
    struct ic_sampler *s;
    enum ic_status st = ic_sampler_open(&s, e->model, p, prompt, n, err);
    *sampler = s;
    return st;
}

static enum ic_status be_draw(void *arg, void *sampler, int32_t row, struct ic_sampled *out,
                              struct ic_err *err)
{
    struct ic_text_engine *e = arg;
    const float *logits = ic_text_logits(e->model, row);
    return logits ? ic_sampler_draw(sampler, logits, out, err)
                  : ic_fail(err, IC_INTERNAL, "a row has no logits");
}

static const float *be_embedding(void *arg, int32_t row)
{
    struct ic_text_engine *e = arg;
    return ic_text_embedding(e->model, row);
}

static void be_sampler_close(void *arg, void *sampler)
{
    struct ic_sampler *s = sampler;
    (void)arg;
    ic_sampler_close(&s);
}

static enum ic_status be_sampler_rebind(void *arg, void *sampler, const struct ic_text_params *p,
                                        const int32_t *said, int32_t n, struct ic_err *err)
{
    struct ic_text_engine *e = arg;
    return ic_sampler_rebind(sampler, e->model, p, said, n, err);
}

static int64_t be_now(void *arg)
{
    (void)arg;
    return ic_now_ns();
}

static void say(struct ic_text_engine *e)
{
    if (e->unsaid_ns)
        ic_events_offer(e->events);
    e->unsaid_ns = 0;
}

static void be_lost(void *arg, const struct ic_lost *lost)
{
    ic_events_lost(((struct ic_text_engine *)arg)->events, lost);
}

static void be_emit(void *arg, struct ic_event *ev)
{
    struct ic_text_engine *e = arg;
    int64_t now;

    if (!e->hand_over) {
        ic_events_put(e->events, ev);
        return;
    }
    ic_events_put_later(e->events, ev);
    now = ic_now_ns();
    e->unsaid_ns = e->unsaid_ns ? e->unsaid_ns : now;
    if (now - e->unsaid_ns >= OFFER_NS)
        say(e);
}

static bool should_abort(void *arg)
{
    struct ic_life *l = arg;
    if (ic_life_left_behind(l)) /* the scheduler is another's */
        return true;
    struct ic_text_engine *e = l->engine;
    return atomic_load(&l->abort) || atomic_load(&e->stop) || ic_text_sched_batch_is_dead(e->sched);
}

/* ---- the thread -------------------------------------------------------------------------------------------- */

static void set_state(struct ic_text_engine *e, enum ic_engine_state st)
{
    atomic_store(&e->state, st);
    e->events->wake(e->events->wake_arg);
}

static void publish(struct ic_text_engine *e, const struct ic_text_model *m, struct ic_text_model *vocab)
{
    pthread_mutex_lock(&e->vocab_lock);
    e->vocab_of = m;
    ic_text_model_close(&e->vocab);
    e->vocab = vocab;
    pthread_mutex_unlock(&e->vocab_lock);
}

/* At the start a draft that is of no use is an error; later it goes on without. */
static enum ic_status draft_is_off(struct ic_text_engine *e, enum ic_status st)
{
    ic_draft_close(&e->draft);
    if (!e->sched)
        return st;
    ic_warn("text", "it goes on without the draft model: %s", e->err.msg);
    return IC_OK;
}

/* Both models. The draft first: the other one then takes what is left of the GPUs. */
static enum ic_status open_files(struct ic_text_engine *e)
{
    enum ic_status st = IC_OK;

    if (e->cfg.model.draft && (st = ic_draft_open(&e->draft, &e->cfg.model, &e->err)) != IC_OK)
        st = draft_is_off(e, st);
    if (st == IC_OK)
        st = ic_text_model_open(&e->model, &e->cfg.model, &e->err);
    if (st == IC_OK && e->draft && (st = ic_draft_bind(e->draft, e->model, &e->err)) != IC_OK)
        st = draft_is_off(e, st);
    if (st != IC_OK) {
        ic_draft_close(&e->draft);
        ic_text_model_close(&e->model);
    }
    return st;
}

/* Tells the model and its adapters from others of the same names. */
static uint64_t model_files(const struct ic_text_config *c)
{
    struct ic_lora_list lora = {0};
    uint64_t sum = 0;

    ic_lora_parse(&lora, c->lora, NULL);
    for (int i = -1; i < lora.n; i++) {
        struct stat f = {0};
        stat(i < 0 ? c->path : lora.item[i].path, &f);
        const uint64_t what[] = {f.st_dev, f.st_ino, (uint64_t)f.st_size, (uint64_t)f.st_mtim.tv_sec,
                                 (uint64_t)f.st_mtim.tv_nsec};
        for (size_t k = 0; k < sizeof what / sizeof *what; k++)
            sum = (sum ^ what[k]) * 1099511628211u;
    }
    ic_lora_deinit(&lora);
    return sum;
}

static enum ic_status open_model(struct ic_text_engine *e)
{
    const struct ic_text_info *old = atomic_load(&e->info_now);
    struct ic_text_info *i = &e->info[old == &e->info[0]];
    const uint64_t files = model_files(&e->cfg.model);
    enum ic_status st = open_files(e);

    if (st != IC_OK)
        return st;
    e->exchanged |= e->files && e->files != files;
    e->files = files;
    *i = *ic_text_model_info(e->model);
    atomic_store(&e->info_now, i);
    e->hand_over = i->threads >= ic_cpu_cores();
    e->be = (struct ic_text_backend){
        .arg = e,
        .ctx_size = i->ctx_size,
        .kv_size = i->kv_size,
        .parallel = i->parallel,
        .batch = i->batch,
        .outputs = i->outputs,
        .n_vocab = i->n_vocab,
        .n_embd = i->n_embd,
        .tokenize = be_tokenize,
        .chat = be_chat,
        .decode = be_decode,
        .n_seq = i->seqs,
        .window = i->window,
        .idle_cells = IDLE_CELLS,
        .policy = e->cfg.policy,
        .disk = e->disk,
        .seq_rm = be_seq_rm,
        .seq_cp = be_seq_cp,
        .seq_save = be_seq_save,
        .seq_load = be_seq_load,
        .piece = be_piece,
        .sampler_open = be_sampler_open,
        .draw = be_draw,
        .sampler_close = be_sampler_close,
        .embedding = be_embedding,
        .sampler_rebind = be_sampler_rebind,
        .draft_behind = be_draft_behind,
        .draft = e->draft ? be_draft : NULL,
        .now_ns = be_now,
        .emit = be_emit,
        .lost = be_lost,
    };
    ic_text_set_abort(e->model, should_abort, e->worker.life);
    if (e->draft)
        ic_draft_set_abort(e->draft, should_abort, e->worker.life);
    publish(e, e->model, NULL);
    return IC_OK;
}

static enum ic_status pin_prefix(struct ic_text_engine *e, struct ic_err *err)
{
    return e->cfg.prefix ? ic_text_pin_file(e->sched, &e->be, e->cfg.prefix,
                                            ic_text_model_info(e->model)->has_chat_template, err)
                         : IC_OK;
}

/* ---- the model goes away and comes back ---------------------------------------------------------------------- */

/* Nothing to do for --idle-unload seconds: model, context and the GPU's memory are given back. */
static void put_away(struct ic_text_engine *e)
{
    struct ic_text_model *vocab = NULL;
    struct ic_err err;

    if (ic_text_vocab_open(&vocab, &e->cfg.model, &err) != IC_OK) {
        ic_warn("text", "the idle model stays: %s", err.msg);
        e->idle_since_ns = ic_now_ns(); /* and is asked again after as long */
        return;
    }
    ic_text_sched_park(e->sched);
    publish(e, vocab, vocab);
    ic_draft_close(&e->draft);
    ic_text_model_close(&e->model);
    if (e->cfg.model_gone)
        e->cfg.model_gone(e->cfg.model_gone_arg);
    atomic_store(&e->worker.health.away, true);
    atomic_fetch_add(&e->worker.health.unloaded, 1);
    ic_info("text", "idle for %.0f s: the model was unloaded", (double)e->cfg.idle_unload_ns / 1e9);
}

/* The model failed at every decode lately. On a GPU that is nearly always memory that somebody else has taken since. */
static void lean_back(struct ic_text_engine *e)
{
    int32_t layers = ic_text_model_info(e->model)->gpu_layers;

    e->failures = 0;
    if (layers == 0)
        return;
    ic_warn("text", "%d decodes in a row failed: from %d layers on the GPU to %d", FAILURES_MAX, layers,
            layers / 2);
    ic_text_sched_forget_kv(e->sched, "the model failed to decode");
    pthread_mutex_lock(&e->vocab_lock);
    e->vocab_of = NULL;
    pthread_mutex_unlock(&e->vocab_lock);
    ic_draft_close(&e->draft);
    ic_text_model_close(&e->model);
    e->cfg.model.gpu_layers = layers / 2;
    atomic_fetch_add(&e->worker.health.rebuilt, 1);
}

/* Waits for a command or a kick until `until` (ic_now_ns; 0: not at all, INT64_MAX: for ever), then detaches the
 * commands and runs them. */
static void take_commands(struct ic_text_engine *e, int64_t until)
{
    struct timespec ts = {(time_t)(until / 1000000000), (long)(until % 1000000000)};

    say(e);
    pthread_mutex_lock(&e->lock);
    while (!e->head && !e->kicked && !atomic_load(&e->stop) && until > ic_now_ns()) {
        atomic_store(&e->worker.beat, 0);
        if (until == INT64_MAX)
            pthread_cond_wait(&e->wake, &e->lock);
        else
            pthread_cond_timedwait(&e->wake, &e->lock, &ts);
    }
    struct command *c = e->head, *next;
    e->head = NULL;
    e->tail = &e->head;
    e->kicked = false;
    pthread_mutex_unlock(&e->lock);
    atomic_store(&e->worker.beat, ic_now_ns());

    for (; c; c = next) {
        next = c->next;
        if (c->kind == CMD_SUBMIT) {
            atomic_fetch_sub(&e->inbox_requests, 1);
            ic_text_sched_submit(e->sched, c->req);
        } else {
            ic_text_sched_session_close(e->sched, c->session);
        }
        free(c);
    }
}

/* Obeys cancels, deadlines and commands for `ns`. False: nobody waits any more. */
static bool wait_parked(struct ic_text_engine *e, int64_t ns)
{
    int64_t end = ic_now_ns() + ns;
    bool waiting = true;

    while (waiting && ic_now_ns() < end && !atomic_load(&e->stop)) {
        int64_t until = end;
        waiting = ic_text_sched_reap(e->sched, &until);
        if (waiting)
            take_commands(e, until);
    }
    return waiting;
}

/* Somebody waits: the model comes back. What fails now may succeed in a moment, as when another process has the memory.
 * Where its file stays away, those who wait are told, and it is looked for again when the next one asks: the other
 * engine has work to do. False: that is of no use. */
static bool bring_back(struct ic_text_engine *e)
{
    int64_t t0 = ic_now_ns();

    for (int i = 0; !atomic_load(&e->stop); i++) {
        say(e);
        atomic_store(&e->worker.beat, 0); /* loading takes what it takes */
        enum ic_status st = e->model ? IC_OK : open_model(e);
        const bool exchanged = st == IC_OK && e->exchanged;
        if (exchanged) {
            ic_warn("text",
                    "the model's file is another one than before: what the old one computed is forgotten");
            ic_text_sched_forget_model(e->sched);
            e->exchanged = false;
        }
        if (st == IC_OK && ic_text_sched_unpark(e->sched, &e->be, &e->err) == IC_OK) {
            struct ic_err own = {0};
            if (exchanged && pin_prefix(e, &own) != IC_OK)
                ic_warn("text", "%s", own.msg);
            double seconds = (double)(ic_now_ns() - t0) / 1e9;
            atomic_store(&e->worker.health.wake_s, seconds);
            atomic_fetch_add(&e->worker.health.woken, 1);
            atomic_store(&e->worker.health.away, false);
            ic_info("text", "the model is back after %.2f s", seconds);
            return true;
        }
        ic_warn("text", "the model did not come back: %s", e->err.msg);
        if (i + 1 == REOPEN_TRIES) {
            struct ic_err why = {0};
            if (e->err.code != IC_NOT_FOUND && e->err.code != IC_BAD_REQUEST)
                return false;
            ic_fail(&why, IC_UNAVAILABLE, "the model's file is gone");
            ic_text_sched_turn_away(e->sched, &why);
            return true;
        }
        if (!wait_parked(e, (int64_t)1000000000 << i))
            return true;
    }
    return true;
}

/* Rests where the governor says so, in pieces, obeying cancels, deadlines and commands meanwhile. False: go on. */
static bool rest(struct ic_text_engine *e, bool *busy)
{
    int64_t now = ic_now_ns(), ns = ic_governor_pause_ns(e->cfg.governor, 0, now), until = now + ns;

    if (ns <= 0)
        return false;
    *busy = ic_text_sched_reap(e->sched, &until);
    if (*busy)
        take_commands(e, until);
    return true;
}

static enum ic_status first_load(struct ic_text_engine *e)
{
    enum ic_status st = open_model(e);
    if (st == IC_OK)
        st = ic_text_sched_open(&e->sched, &e->be, &e->counters, &e->err);
    return st == IC_OK ? pin_prefix(e, &e->err) : st;
}

/* The one before hangs in a decode and keeps its models; the scheduler and all who wait are ours. */
static enum ic_status take_over(struct ic_text_engine *e)
{
    e->model = NULL;
    e->draft = NULL;
    if (e->cfg.model.ledger) { /* what it holds shows in what is free */
        ic_ledger_release(e->cfg.model.ledger, IC_LEDGER_OWNER_TEXT);
        ic_ledger_release(e->cfg.model.ledger, IC_LEDGER_OWNER_DRAFT);
    }
    ic_text_sched_forget_kv(e->sched, "the decode did not come to an end");
    return bring_back(e) ? IC_OK : e->err.code;
}

static bool idle_for_long(struct ic_text_engine *e, bool busy)
{
    if (busy || e->idle_since_ns == 0)
        e->idle_since_ns = busy ? 0 : ic_now_ns();
    return !busy && e->cfg.idle_unload_ns && ic_now_ns() - e->idle_since_ns >= e->cfg.idle_unload_ns;
}

static void *engine_main(void *arg)
{
    struct ic_text_engine *e = ((struct ic_life *)arg)->engine;
    ic_altstack_here();
    bool busy = false, untidy = false, ok = (e->sched ? take_over(e) : first_load(e)) == IC_OK;

    if (ok)
        set_state(e, atomic_load(&e->draining) ? IC_ENGINE_DRAINING : IC_ENGINE_READY);
    while (ok && !atomic_load(&e->stop)) {
        bool away = ic_text_sched_is_parked(e->sched);
        take_commands(e, busy || untidy                   ? 0
                         : away || !e->cfg.idle_unload_ns ? INT64_MAX
                                                          : e->idle_since_ns + e->cfg.idle_unload_ns);
        untidy = false;
        if (rest(e, &busy))
            continue;
        busy = ic_text_sched_tick(e->sched);
        untidy = !busy && ic_text_sched_tidy(e->sched);
        if (e->failures >= FAILURES_MAX)
            lean_back(e);
        if (ic_text_sched_is_parked(e->sched))
            ok = !busy || bring_back(e);
        else if (idle_for_long(e, busy))
            put_away(e);
    }
    if (!ok) {
        set_state(e, IC_ENGINE_FAILED);
        return NULL;
    }
    take_commands(e, 0);
    ic_text_sched_close(&e->sched);
    set_state(e, IC_ENGINE_STOPPED);
    return NULL;
}

/* ---- from other threads ------------------------------------------------------------------------------------ */

enum ic_status ic_text_engine_start(struct ic_text_engine **out, const struct ic_text_engine_config *cfg,
                                    struct ic_events *events, struct ic_err *err)
{
    struct ic_text_engine *e = calloc(1, sizeof *e);
    pthread_condattr_t attr;

    *out = NULL;
    if (!e)
        return ic_fail(err, IC_OOM, "out of memory");
    if (cfg->cache_disk) {
        enum ic_status st = ic_spill_disk_open(&e->disk, cfg->cache_disk, cfg->cache_disk_max, err);
        if (st != IC_OK) {
            free(e);
            return st;
        }
    }
    e->cfg = *cfg;
    e->events = events;
    e->tail = &e->head;
    pthread_mutex_init(&e->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&e->wake, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_init(&e->vocab_lock, NULL);
    e->worker.engine = e;
    e->worker.main = engine_main;
    e->worker.name = "ic-text";
    e->worker.module = "text";
    e->worker.turn = cfg->turn;
    if (!ic_worker_start(&e->worker)) {
        ic_spill_disk_close(&e->disk);
        free(e);
        return ic_fail(err, IC_OOM, "no thread for the text engine");
    }
    *out = e;
    return IC_OK;
}

enum ic_watch ic_text_engine_watch(struct ic_text_engine *e, int64_t now, int64_t stall_ns)
{
    return ic_worker_watch(&e->worker, now, stall_ns);
}

enum ic_engine_state ic_text_engine_state(const struct ic_text_engine *e)
{
    return atomic_load(&e->state);
}

const struct ic_err *ic_text_engine_error(const struct ic_text_engine *e)
{
    return &e->err;
}

const struct ic_text_info *ic_text_engine_info(const struct ic_text_engine *e)
{
    enum ic_engine_state st = atomic_load(&e->state);
    return st == IC_ENGINE_READY || st == IC_ENGINE_DRAINING ? atomic_load(&e->info_now) : NULL;
}

const struct ic_text_model *ic_text_engine_borrow(struct ic_text_engine *e)
{
    if (!ic_text_engine_info(e))
        return NULL;
    pthread_mutex_lock(&e->vocab_lock);
    if (!e->vocab_of)
        pthread_mutex_unlock(&e->vocab_lock);
    return e->vocab_of;
}

void ic_text_engine_give_back(struct ic_text_engine *e)
{
    pthread_mutex_unlock(&e->vocab_lock);
}

const struct ic_engine_health *ic_text_engine_health(const struct ic_text_engine *e)
{
    return &e->worker.health;
}

struct ic_text_counters *ic_text_engine_counters(struct ic_text_engine *e)
{
    return &e->counters;
}

int64_t ic_text_engine_beat(const struct ic_text_engine *e)
{
    return atomic_load(&e->worker.beat);
}

static void put_command(struct ic_text_engine *e, struct command *c)
{
    pthread_mutex_lock(&e->lock);
    if (c) {
        *e->tail = c;
        e->tail = &c->next;
    }
    e->kicked = true;
    pthread_cond_signal(&e->wake);
    pthread_mutex_unlock(&e->lock);
}

enum ic_status ic_text_engine_submit(struct ic_text_engine *e, struct ic_text_req *req, struct ic_err *err)
{
    switch (atomic_load(&e->state)) {
    case IC_ENGINE_READY: break;
    case IC_ENGINE_LOADING: return ic_fail(err, IC_UNAVAILABLE, "the model is being loaded");
    case IC_ENGINE_FAILED: return ic_fail(err, IC_UNAVAILABLE, "the model could not be loaded");
    default: return ic_fail(err, IC_UNAVAILABLE, "the server is shutting down");
    }
    if (atomic_load(&e->counters.waiting) + atomic_load(&e->inbox_requests) >= e->cfg.queue_max)
        return ic_fail(err, IC_BUSY, "the queue is full (%d requests are waiting)", e->cfg.queue_max);
    struct command *c = calloc(1, sizeof *c);
    if (!c)
        return ic_fail(err, IC_OOM, "out of memory");
    c->kind = CMD_SUBMIT;
    c->req = req;
    ic_log_about(&(struct ic_log_ids){.rid = req->rid, .owner = req->owner}, IC_LOG_DEBUG, "request",
                 "taken: %zu bytes or %zu messages, at most %d tokens", req->prompt_len, req->n_msgs,
                 (int)req->params.max_tokens);
    atomic_fetch_add(&e->inbox_requests, 1);
    put_command(e, c);
    return IC_OK;
}

void ic_text_engine_session_close(struct ic_text_engine *e, uint64_t session)
{
    struct command *c = calloc(1, sizeof *c);

    if (!c) {
        ic_error("text", "out of memory: a closed session keeps its tokens until the end");
        return;
    }
    c->kind = CMD_SESSION_CLOSE;
    c->session = session;
    put_command(e, c);
}

void ic_text_engine_kick(struct ic_text_engine *e)
{
    put_command(e, NULL);
}

void ic_text_engine_drain(struct ic_text_engine *e)
{
    enum ic_engine_state ready = IC_ENGINE_READY;

    atomic_store(&e->draining, true);
    atomic_compare_exchange_strong(&e->state, &ready, IC_ENGINE_DRAINING);
}

void ic_text_engine_stop(struct ic_text_engine **ep)
{
    struct ic_text_engine *e = *ep;

    if (!e)
        return;
    atomic_store(&e->stop, true);
    put_command(e, NULL);
    pthread_join(e->worker.thread, NULL);
    ic_text_sched_close(&e->sched);
    ic_spill_disk_close(&e->disk);
    ic_draft_close(&e->draft);
    ic_text_model_close(&e->model);
    ic_text_model_close(&e->vocab);
    for (struct command *c = e->head, *next; c; c = next) {
        next = c->next;
        if (c->kind == CMD_SUBMIT)
            ic_text_req_unref(c->req);
        free(c);
    }
    *ep = NULL;
    if (e->worker.lost)
        return;
    pthread_mutex_destroy(&e->vocab_lock);
    pthread_mutex_destroy(&e->lock);
    pthread_cond_destroy(&e->wake);
    free(e->worker.life);
    free(e);
}
