/* The Law M engine's thread: commands in, batches, events out. */
#include "sched/law_engine.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/altstack.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "hw/cpu.h"
#include "law/fallback.h"
#include "law/plugin.h"
#include "hw/ledger.h"

#define CPU_SAMPLE_MS 200
/* While the text engine wants the cores too, a batch is cut to what takes about this long: it is what a
 * token may have to wait for. */
#define SHARED_BATCH_MS 25
#define SHARED_FOR_NS (500 * IC_MS) /* how long a sharing of the cores is expected to go on */

struct command {
    struct command *next;
    struct ic_sim_cmd cmd;
};

struct ic_law_farewell {
    struct command command; /* alone: it is freed as that */
};

/* A plan with its executor. */
struct group {
    struct ic_law_group pub; /* first: the scheduler's view of it */
    struct ic_law_plan *plan;
    struct ic_law_packed *packed; /* the law's when it was opened */
    struct ic_law_exec *exec;
    double ns_per_sim; /* moving average, 0: unknown */
    int64_t start_ns;  /* of a step begun with st_start; 0: none */
};

struct ic_law_engine {
    struct ic_worker worker;
    unsigned threads; /* compute threads */
    int gpu;          /* its number in the ledger, where it is in_ledger */
    bool in_ledger;
    size_t gpu_bytes; /* held there */
    struct ic_law_engine_config cfg;
    struct ic_events *events;
    const struct ic_law_backend *backend;
    /* of `backend`, which has the CPU behind it; NULL: it is the CPU's own */
    const struct ic_law_backend *device;
    struct ic_law *laws[IC_LAWS_MAX];
    struct ic_law_packed *packed[IC_LAWS_MAX];
    struct {
        unsigned base;      /* index of the law under its plain name */
        char precision[16]; /* as asked for, else what the file has */
    } variant[IC_LAWS_MAX];
    _Atomic unsigned n_laws; /* grows while loading, shown once READY */
    struct ic_law_stepper stepper;
    struct ic_law_sched *sched;
    struct ic_law_counters counters;
    struct ic_err err;
    _Atomic(enum ic_engine_state) state;
    atomic_bool stop;
    pthread_mutex_t lock; /* guards the list */
    pthread_cond_t wake;
    struct command *head, **tail;
    unsigned n_commands;
};

/* ---- the back end behind the scheduler ---------------------------------------------------------- */

static const struct ic_law *st_law(void *arg, unsigned i)
{
    struct ic_law_engine *e = arg;
    return e->laws[i];
}

static void st_group_close(void *arg, struct ic_law_group *pub)
{
    struct ic_law_engine *e = arg;
    struct group *g = (struct group *)pub;

    if (g->exec)
        e->backend->close(&g->exec);
    ic_law_plan_close(&g->plan);
    free(g);
}

/* Bytes of host memory that a group will take: what its plan has there; for each simulation of a batch the
 * delta that the scheduler keeps, and one's buffers more, which is the first simulation itself. */
static size_t bytes_of(const struct ic_law *law, unsigned height, unsigned width, size_t plan,
                       unsigned max_batch)
{
    return plan + (max_batch + 1) * (ic_law_psi_bytes(law, height, width) + IC_LAW_ALIGN) +
           ic_law_memory_bytes(law, height, width);
}

static bool on_device(const struct ic_law_engine *e, unsigned law)
{
    return e->device && ic_law_fallback_on_device(e->packed[law]);
}

/* Bytes of host memory that an open plan takes. */
static size_t host_bytes(const struct ic_law_engine *e, const struct group *g)
{
    return e->device ? ic_law_fallback_host_bytes(g->exec) : e->backend->exec_bytes(g->exec);
}

/* What the GPU has to give, by the ledger and by what it says itself, less the margin. */
static size_t device_room(const struct ic_law_engine *e)
{
    uint64_t free, total, margin = e->cfg.vram_margin;

    if (!e->device->memory || !e->device->memory(&free, &total))
        return 0;
    if (e->in_ledger)
        return (size_t)ic_ledger_room_now(e->cfg.ledger, e->gpu, free);
    return (size_t)(free > margin ? free - margin : 0);
}

/* --law-max-batch auto: within half of what is left where the plan will lie and where the states do, so
 * that the next grid finds room. `why`: for the log. */
static unsigned largest_batch(const struct ic_law_engine *e, unsigned law, unsigned height, unsigned width,
                              size_t room, unsigned most, char *why, size_t why_size)
{
    const struct ic_law_backend *be = e->backend;
    struct ic_law_packed *packed = e->packed[law];
    struct ic_law_room left = {.host = room};
    struct ic_law_fit fit = {0};
    uint64_t available, total;

    if (ic_host_memory(&available, &total) && available < room)
        left.host = (size_t)available;
    left.host /= 2;
    if (on_device(e, law)) {
        left.device = device_room(e) / 2;
        left.on_device = true;
        fit = ic_law_batch_fit(be, packed, e->laws[law], height, width, &left, most);
        if (!fit.n && fit.limit == IC_LAW_FIT_DEVICE) /* then it will be opened on the CPU */
            be = ic_law_fallback_cpu(e->packed[law], &packed);
    }
    if (be && !fit.n) {
        left.on_device = false;
        fit = ic_law_batch_fit(be, packed, e->laws[law], height, width, &left, most);
    }
    snprintf(why, why_size, "auto: %s %zu MiB%s",
             fit.limit == IC_LAW_FIT_DEVICE ? "half of what the GPU has to give is"
             : fit.limit == IC_LAW_FIT_HOST
                 ? "half of the host memory that is left is"
                 : "no larger one is made; half of the host memory that is left is",
             (fit.limit == IC_LAW_FIT_DEVICE ? left.device : left.host) >> 20,
             left.on_device ? "" : ", on the CPU");
    return fit.n ? fit.n : 1;
}

static enum ic_status st_group_open(void *arg, unsigned law, unsigned height, unsigned width,
                                    unsigned max_batch, size_t room, struct ic_law_group **out,
                                    struct ic_err *err)
{
    struct ic_law_engine *e = arg;
    struct group *g = calloc(1, sizeof *g);
    char why[128] = "--law-max-batch";
    size_t need = 0;
    enum ic_status st;

    *out = NULL;
    if (!g)
        return ic_fail(err, IC_OOM, "out of memory");
    if (max_batch < e->cfg.limits.max_batch)
        snprintf(why, sizeof why, "what --law-memory leaves");
    if (e->cfg.batch_auto)
        max_batch = largest_batch(e, law, height, width, room, max_batch, why, sizeof why);
    const struct ic_law_backend *be = e->backend;
    if ((st = ic_law_plan_open(e->laws[law], height, width, max_batch, be->tensor_bytes, &g->plan, err)) ==
        IC_OK) {
        size_t plan = be->exec_size ? be->exec_size(e->packed[law], g->plan) : g->plan->arena_bytes;
        if (on_device(e, law))
            plan = ic_law_staging_bytes(e->device, e->laws[law], height, width, max_batch);
        need = bytes_of(e->laws[law], height, width, plan, max_batch);
    }
    if (st == IC_OK && need <= room && (st = be->open(e->packed[law], g->plan, &g->exec, err)) == IC_OK) {
        g->packed = e->packed[law];
        g->pub = (struct ic_law_group){
            .law = e->laws[law],
            .height = height,
            .width = width,
            .max_n = max_batch,
            .psi_bytes = g->plan->psi_bytes,
            .memory_bytes = g->plan->memory_bytes,
            .shared_bytes = host_bytes(e, g),
        };
        ic_info("law",
                "%s, %u x %u: a batch of %u at most (%s); the plan takes %zu KiB, %zu of them of the "
                "host's memory",
                e->laws[law]->name, height, width, max_batch, why, be->exec_bytes(g->exec) >> 10,
                g->pub.shared_bytes >> 10);
        need = bytes_of(e->laws[law], height, width, g->pub.shared_bytes, max_batch);
    }
    if (st == IC_OK && need > room)
        st = ic_fail(
            err, IC_OOM,
            "a %u x %u simulation of this law takes %zu MiB at the least; --law-memory leaves %zu MiB",
            height, width, need >> 20, room >> 20);
    if (st != IC_OK) {
        st_group_close(e, &g->pub);
        return st;
    }
    *out = &g->pub;
    return IC_OK;
}

static enum ic_status st_step(void *arg, struct ic_law_group *pub, const struct ic_law_io *io, unsigned n,
                              unsigned steps, struct ic_err *err)
{
    struct ic_law_engine *e = arg;
    struct group *g = (struct group *)pub;
    struct ic_life *me = e->worker.life;
    const int64_t called = ic_now_ns(), begun = g->start_ns ? g->start_ns : called;
    int64_t t0 = ic_worker_begin(&e->worker);

    for (bool hang = ic_fault(IC_FAULT_LAW_HANG); hang;)
        pause();
    enum ic_status st = ic_law_exec_run(e->backend, g->exec, io, n, steps, err);
    int64_t t1 = ic_worker_end(&e->worker, me);
    double ns = (double)(t1 - t0 + called - begun) / n / steps; /* without the wait for the cores */
    g->start_ns = 0;
    ic_governor_pause_ns(e->cfg.governor, t1 - t0, t1); /* booked here, rested between ticks */
    pub->shared_bytes = host_bytes(e, g);               /* it may have moved to the CPU */
    if (st != IC_OK) {
        ic_error("law", "%s, %u x %u: a step could not be made: %s", pub->law->name, pub->height,
                 pub->width, err->msg);
        return st;
    }
    g->ns_per_sim = g->ns_per_sim > 0 ? 0.8 * g->ns_per_sim + 0.2 * ns : ns;
    return IC_OK;
}

static unsigned st_batch_limit(void *arg, struct ic_law_group *pub)
{
    struct ic_law_engine *e = arg;
    struct group *g = (struct group *)pub;

    if (!ic_turn_contended(e->cfg.turn, SHARED_FOR_NS) || g->ns_per_sim <= 0)
        return pub->max_n;
    double n = (double)SHARED_BATCH_MS * IC_MS / g->ns_per_sim;
    return n < 1 ? 1 : n < pub->max_n ? (unsigned)n : pub->max_n;
}

/* ---- states on a device: for the scheduler, what the back end has --------------------------------- */

#define STEPS_MAX 1024 /* in one call */

static enum ic_status st_state_open(void *arg, struct ic_law_group *pub, const struct ic_law_io *host,
                                    struct ic_law_state **out, struct ic_err *err)
{
    struct ic_law_engine *e = arg;
    struct group *g = (struct group *)pub;
    return e->backend->state_open(g->packed, g->plan, host, out, err);
}

static void st_state_close(void *arg, struct ic_law_state **state)
{
    ((struct ic_law_engine *)arg)->backend->state_close(state);
}

static void st_state_put(void *arg, struct ic_law_state *state, const struct ic_law_io *host)
{
    (void)((struct ic_law_engine *)arg)->backend->state_put(state, host, NULL);
}

static void st_state_get(void *arg, struct ic_law_state *state, const struct ic_law_io *host)
{
    struct ic_err err = {0};
    if (((struct ic_law_engine *)arg)->backend->state_get(state, host, &err) != IC_OK)
        ic_warn("law", "a state could not be read back: %s", err.msg);
}

static uint64_t st_state_lost(void *arg, struct ic_law_state *state)
{
    (void)arg;
    return ic_law_fallback_lost(state);
}

static uint64_t st_state_abandon(void *arg, struct ic_law_state **state)
{
    (void)arg;
    return ic_law_fallback_abandon(state);
}

static void st_start(void *arg, struct ic_law_group *pub, const struct ic_law_io *io, unsigned n,
                     unsigned steps)
{
    struct ic_law_engine *e = arg;
    struct group *g = (struct group *)pub;
    g->start_ns = ic_now_ns();
    e->backend->start(g->exec, io, n, steps);
}

static unsigned st_steps_in(void *arg, struct ic_law_group *pub, unsigned n, int64_t ns)
{
    struct group *g = (struct group *)pub;
    (void)arg;
    if (!ic_law_fallback_on_device(g->packed) || g->ns_per_sim <= 0 || ns <= 0)
        return 1;
    const double steps = (double)ns / (g->ns_per_sim * n);
    return steps < 1 ? 1 : steps > STEPS_MAX ? STEPS_MAX : (unsigned)steps;
}

static enum ic_status st_draw(void *arg, struct ic_law_group *pub, const struct ic_law_draw *draws,
                              unsigned n)
{
    return ((struct ic_law_engine *)arg)->backend->draw(((struct group *)pub)->exec, draws, n, NULL);
}

static enum ic_status st_frame(void *arg, struct ic_law_group *pub, unsigned i, void *out, size_t size,
                               struct ic_view_frame *frame)
{
    struct group *g = (struct group *)pub;
    return ((struct ic_law_engine *)arg)->backend->frame(g->exec, i, out, size, frame, NULL);
}

static void st_delta(void *arg, struct ic_law_group *pub, unsigned place, float *out)
{
    struct group *g = (struct group *)pub;
    if (((struct ic_law_engine *)arg)->backend->delta(g->exec, place, out, NULL) != IC_OK)
        memset(out, 0, pub->psi_bytes); /* the device is lost: the next step will say so */
}

static int64_t st_now(void *arg)
{
    (void)arg;
    return ic_now_ns();
}

static void st_emit(void *arg, struct ic_event *ev)
{
    struct ic_law_engine *e = arg;
    ic_events_put(e->events, ev);
}

static void st_lost(void *arg, const struct ic_lost *lost)
{
    ic_events_lost(((struct ic_law_engine *)arg)->events, lost);
}

/* ---- the thread --------------------------------------------------------------------------------- */

static void set_state(struct ic_law_engine *e, enum ic_engine_state st)
{
    atomic_store(&e->state, st);
    e->events->wake(e->events->wake_arg);
}

/* The n-th entry of the list of precisions that law `name` takes; false: it has no more. NAME=PRECISION
 * entries with its name, or else those without a name. `used` (a bit per entry) remembers whose names were
 * met. */
static bool precision_of(const char *list, const char *name, unsigned n, char *out, size_t size,
                         uint64_t *used)
{
    for (int named = 1; named >= 0; named--) {
        unsigned at = 0, entry = 0, mine = 0;
        for (const char *p = list; p && *p; p += strcspn(p, ","), p += *p == ',', entry++) {
            const size_t len = strcspn(p, ",");
            const char *eq = memchr(p, '=', len), *value = eq ? eq + 1 : p;
            const size_t key = eq ? (size_t)(eq - p) : 0;
            if (named != (eq != NULL) || (eq && (strlen(name) != key || memcmp(name, p, key) != 0)))
                continue;
            *used |= entry < 64 ? UINT64_C(1) << entry : 0;
            mine++;
            if (at++ == n) {
                snprintf(out, size, "%.*s", (int)(len - (size_t)(value - p)), value);
                return true;
            }
        }
        if (mine)
            return false;
    }
    return false;
}

enum ic_status ic_law_engine_check(const char *precision, const char *policy, struct ic_err *err)
{
    struct ic_law_policy p;
    char value[32];
    enum ic_status st = ic_law_policy_parse("fp32", policy, &p, err);
    unsigned entries = 0;

    for (const char *at = precision; at && *at && st == IC_OK; at += strcspn(at, ","), at += *at == ',') {
        const size_t len = strcspn(at, ",");
        const char *eq = memchr(at, '=', len), *from = eq ? eq + 1 : at;
        snprintf(value, sizeof value, "%.*s", (int)(len - (size_t)(from - at)), from);
        st = ic_law_policy_parse(value, NULL, &p, err);
        if (++entries > IC_LAWS_MAX && st == IC_OK)
            st = ic_fail(err, IC_TOO_LARGE, "more than %d precisions", IC_LAWS_MAX);
    }
    return st;
}

/* Opens a law in one precision (NULL: as the file has it) into the next place, unnamed among the others
 * yet. */
static enum ic_status open_as(struct ic_law_engine *e, const char *path, const char *precision)
{
    struct ic_law_policy policy;
    struct ic_law_open_opts opts = {0};
    const bool exceptions = e->cfg.policy && (!precision || strcmp(precision, "fp32") != 0);
    enum ic_status st = IC_OK;

    if (e->n_laws == IC_LAWS_MAX)
        return ic_fail(&e->err, IC_TOO_LARGE, "more than %d laws", IC_LAWS_MAX);
    if (precision || exceptions) {
        st = ic_law_policy_parse(precision ? precision : "fp32", exceptions ? e->cfg.policy : NULL, &policy,
                                 &e->err);
        opts.policy = &policy;
    }
    struct ic_err why = {0};
    if (st == IC_OK &&
        (st = ic_law_open(path, &opts, &e->laws[e->n_laws], &why)) != IC_OK) { /* of several, which */
        const bool prefix = !strstr(why.msg, path);
        ic_fail(&e->err, st, "%s%s%s", prefix ? path : "", prefix ? ": " : "", why.msg);
    }
    return st;
}

/* Takes the law just opened in: name, packed weights, a line in the log. */
static enum ic_status take_in(struct ic_law_engine *e, unsigned base, const char *precision,
                              unsigned threads)
{
    unsigned i = e->n_laws;
    struct ic_law *law = e->laws[i];
    enum ic_status st = IC_OK;

    if (i != base) {
        const size_t at = strlen(law->name), tail = strlen(precision) + 1;
        if (at + tail >= sizeof law->name)
            st = ic_fail(&e->err, IC_TOO_LARGE, "the name of law %s is too long to add @%s", law->name,
                         precision);
        else
            snprintf(law->name + at, sizeof law->name - at, "@%s", precision);
    }
    for (unsigned k = 0; k < i && st == IC_OK; k++)
        if (!strcmp(e->laws[k]->name, law->name))
            st = ic_fail(&e->err, IC_BAD_REQUEST, "two laws are called %s", law->name);
    if (st == IC_OK)
        st = e->backend->pack(law, threads, &e->packed[i], &e->err);
    if (st != IC_OK) {
        ic_law_close(&e->laws[i]);
        return st;
    }
    e->variant[i].base = base;
    snprintf(e->variant[i].precision, sizeof e->variant[i].precision, "%s",
             precision ? precision : ic_law_precision_name(law->precision));
    ic_info("law", "%s: %s, d %u, hidden %u, %llu parameters in %s: %zu KiB, packed %zu KiB", law->name,
            ic_law_arch_info(law->arch)->name, law->d, law->b, (unsigned long long)law->params,
            e->variant[i].precision, law->weight_bytes >> 10, e->backend->packed_bytes(e->packed[i]) >> 10);
    if (e->device && strcmp(e->device->name, "cuda") == 0 && law->precision == IC_LAW_FP32 &&
        law->arch != IC_LAW_SNN_UNET && ic_law_fallback_on_device(e->packed[i]))
        ic_info("law", "%s: float32 on the GPU, too; --precision fp16 is many times faster on tensor cores",
                law->name);
    e->n_laws++;
    return IC_OK;
}

static enum ic_status load_one(struct ic_law_engine *e, const char *path, unsigned threads, uint64_t *used)
{
    const unsigned base = e->n_laws;
    char precision[16], name[IC_LAW_NAME_MAX];
    enum ic_status st = open_as(e, path, NULL); /* as it is: to learn its name */

    if (st != IC_OK)
        return st;
    snprintf(name, sizeof name, "%s", e->laws[base]->name);
    if (!precision_of(e->cfg.precision, name, 0, precision, sizeof precision, used))
        return take_in(e, base, NULL, threads);
    ic_law_close(&e->laws[base]);
    for (unsigned n = 0;
         st == IC_OK && precision_of(e->cfg.precision, name, n, precision, sizeof precision, used); n++)
        if ((st = open_as(e, path, precision)) == IC_OK)
            st = take_in(e, base, precision, threads);
    return st;
}

/* Each NAME of NAME=PRECISION must be a law's. */
static enum ic_status check_names(struct ic_law_engine *e, uint64_t used)
{
    unsigned entry = 0;

    for (const char *p = e->cfg.precision; p && *p; p += strcspn(p, ","), p += *p == ',', entry++) {
        const size_t len = strcspn(p, ",");
        const char *eq = memchr(p, '=', len);
        if (eq && entry < 64 && !(used >> entry & 1))
            return ic_fail(&e->err, IC_BAD_REQUEST, "--precision names a law that is not served: %.*s",
                           (int)len, p);
    }
    return IC_OK;
}

/* ---- memory of a GPU: in the ledger that the text engine plans with -------------------------------- */

#define GPU_OWNER "law"
#define GPU_WHAT "laws and their plans"

static bool gpu_take(void *arg, const char *what, size_t bytes, struct ic_err *why)
{
    struct ic_law_engine *e = arg;

    (void)what;
    if (ic_ledger_resize(e->cfg.ledger, e->gpu, GPU_OWNER, GPU_WHAT, e->gpu_bytes + bytes, why) != IC_OK)
        return false;
    e->gpu_bytes += bytes;
    return true;
}

static void gpu_give(void *arg, size_t bytes)
{
    struct ic_law_engine *e = arg;

    e->gpu_bytes -= bytes;
    ic_ledger_resize(e->cfg.ledger, e->gpu, GPU_OWNER, GPU_WHAT, e->gpu_bytes, NULL);
}

static void enter_ledger(struct ic_law_engine *e)
{
    /* as ggml calls it */
    struct ic_ledger_device d = {.name = "CUDA0", .desc = "for laws", .margin = e->cfg.vram_margin};
    const struct ic_law_gate gate = {gpu_take, gpu_give, e};

    if (!e->cfg.ledger || !e->device->memory || !e->device->memory(&d.free, &d.total))
        return;
    if (e->cfg.vram_max && e->cfg.vram_max < d.free)
        d.free = e->cfg.vram_max;
    e->gpu = ic_ledger_enter(e->cfg.ledger, &d);
    e->in_ledger = e->gpu >= 0;
    if (e->in_ledger)
        ic_law_fallback_gate(&gate);
}

/* A back end that may lose its device has the CPU behind it; one that cannot be loaded is an error, but
 * "auto" takes the CPU then. */
static enum ic_status find_backend(struct ic_law_engine *e)
{
    const bool choose = strcmp(e->cfg.backend, "auto") == 0;
    struct ic_err why = {0};

    if (ic_law_backend_open(choose ? "cuda" : e->cfg.backend, &e->backend, choose ? &why : &e->err) !=
        IC_OK) {
        if (!choose)
            return e->err.code;
        /* That there is no plug-in is normal; one that is there and good for nothing is not. */
        ic_log(why.code == IC_NOT_FOUND ? IC_LOG_INFO : IC_LOG_WARN, "law", "laws run on the CPU: %s",
               why.msg);
        return ic_law_backend_open("cpu", &e->backend, &e->err);
    }
    if (e->backend->run) {
        e->device = e->backend;
        enter_ledger(e);
        e->backend = ic_law_backend_with_cpu(e->device);
    }
    return IC_OK;
}

static enum ic_status load(struct ic_law_engine *e)
{
    unsigned threads = e->threads =
        (unsigned)(e->cfg.threads > 0 ? e->cfg.threads : ic_cpu_cores_free(CPU_SAMPLE_MS));
    char *list = strdup(e->cfg.laws), *save = NULL;
    uint64_t used = 0;
    enum ic_status st = list ? IC_OK : ic_fail(&e->err, IC_OOM, "out of memory");

    if (st == IC_OK)
        st = find_backend(e);
    for (char *p = list ? strtok_r(list, ",", &save) : NULL; p && st == IC_OK;
         p = strtok_r(NULL, ",", &save))
        st = load_one(e, p, threads, &used);
    free(list);
    if (st == IC_OK)
        st = check_names(e, used);
    if (st != IC_OK)
        return st;
    e->stepper = (struct ic_law_stepper){
        .arg = e,
        .n_laws = e->n_laws,
        .law = st_law,
        .group_open = st_group_open,
        .group_close = st_group_close,
        .step = st_step,
        .batch_limit = st_batch_limit,
        .now_ns = st_now,
        .emit = st_emit,
        .lost = st_lost,
    };
    if (e->device && e->device->state_open) {
        e->stepper.state_open = st_state_open;
        e->stepper.state_close = st_state_close;
        e->stepper.state_put = st_state_put;
        e->stepper.state_get = st_state_get;
        e->stepper.state_lost = st_state_lost;
        e->stepper.state_abandon = st_state_abandon;
        e->stepper.start = st_start;
        e->stepper.steps_in = st_steps_in;
        e->stepper.draw = st_draw;
        e->stepper.frame = st_frame;
        e->stepper.delta = st_delta;
    }
    return ic_law_sched_open(&e->sched, &e->stepper, &e->cfg.limits, &e->counters, &e->err);
}

/* Waits until `until` (a monotonic time; INT64_MAX: for ever) or for a command, then carries all out. */
static void take_commands(struct ic_law_engine *e, int64_t until)
{
    struct timespec ts = {(time_t)(until / 1000000000), (long)(until % 1000000000)};

    pthread_mutex_lock(&e->lock);
    while (!e->head && !atomic_load(&e->stop) && until > ic_now_ns()) {
        atomic_store(&e->worker.beat, 0);
        if (until == INT64_MAX)
            pthread_cond_wait(&e->wake, &e->lock);
        else if (pthread_cond_timedwait(&e->wake, &e->lock, &ts) == ETIMEDOUT)
            break;
    }
    struct command *c = e->head, *next;
    e->head = NULL;
    e->tail = &e->head;
    e->n_commands = 0;
    pthread_mutex_unlock(&e->lock);
    atomic_store(&e->worker.beat, ic_now_ns());
    for (; c; c = next) {
        next = c->next;
        ic_law_sched_command(e->sched, &c->cmd);
        free(c);
    }
}

/* The one before hangs in a step and keeps what it uses: packed weights with their compute threads, plans,
 * the states of its batch. The laws, the scheduler and the other simulations are ours. */
static enum ic_status take_over(struct ic_law_engine *e)
{
    enum ic_status st = IC_OK;

    for (unsigned i = 0; i < e->n_laws && st == IC_OK; i++)
        st = e->backend->pack(e->laws[i], e->threads, &e->packed[i], &e->err);
    return st == IC_OK ? ic_law_sched_lose_batch(e->sched, "a step did not come to an end") : st;
}

static void *engine_main(void *arg)
{
    struct ic_law_engine *e = ((struct ic_life *)arg)->engine;
    int64_t until = INT64_MAX;

    ic_altstack_here();
    if ((e->sched ? take_over(e) : load(e)) != IC_OK) {
        set_state(e, IC_ENGINE_FAILED);
        return NULL;
    }
    set_state(e, IC_ENGINE_READY);
    while (!atomic_load(&e->stop)) {
        take_commands(e, until);
        int64_t now = ic_now_ns(), rest = ic_governor_pause_ns(e->cfg.governor, 0, now);
        until = rest > 0 ? now + rest : ic_law_sched_tick(e->sched);
    }
    set_state(e, IC_ENGINE_STOPPED);
    return NULL;
}

/* ---- from other threads ------------------------------------------------------------------------- */

enum ic_status ic_law_engine_start(struct ic_law_engine **out, const struct ic_law_engine_config *cfg,
                                   struct ic_events *events, struct ic_err *err)
{
    struct ic_law_engine *e = calloc(1, sizeof *e);
    pthread_condattr_t attr;

    *out = NULL;
    if (!e)
        return ic_fail(err, IC_OOM, "out of memory");
    e->cfg = *cfg;
    e->events = events;
    e->tail = &e->head;
    pthread_mutex_init(&e->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&e->wake, &attr);
    pthread_condattr_destroy(&attr);
    e->worker.engine = e;
    e->worker.main = engine_main;
    e->worker.name = "ic-law";
    e->worker.module = "law";
    e->worker.turn = cfg->turn;
    if (!ic_worker_start(&e->worker)) {
        free(e);
        return ic_fail(err, IC_OOM, "no thread for the Law M engine");
    }
    *out = e;
    return IC_OK;
}

enum ic_watch ic_law_engine_watch(struct ic_law_engine *e, int64_t now, int64_t stall_ns)
{
    return ic_worker_watch(&e->worker, now, stall_ns);
}

enum ic_engine_state ic_law_engine_state(const struct ic_law_engine *e)
{
    return atomic_load(&e->state);
}

const struct ic_err *ic_law_engine_error(const struct ic_law_engine *e)
{
    return &e->err;
}

struct ic_law_counters *ic_law_engine_counters(struct ic_law_engine *e)
{
    return &e->counters;
}

int64_t ic_law_engine_beat(const struct ic_law_engine *e)
{
    return atomic_load(&e->worker.beat);
}

const struct ic_engine_health *ic_law_engine_health(const struct ic_law_engine *e)
{
    return &e->worker.health;
}

unsigned ic_law_engine_count(const struct ic_law_engine *e)
{
    return atomic_load(&e->state) == IC_ENGINE_READY ? e->n_laws : 0;
}

const struct ic_law *ic_law_engine_law(const struct ic_law_engine *e, unsigned i)
{
    return e->laws[i];
}

int ic_law_engine_find(const struct ic_law_engine *e, const char *name)
{
    for (unsigned i = 0; i < ic_law_engine_count(e); i++)
        if (!strcmp(e->laws[i]->name, name))
            return (int)i;
    return -1;
}

const char *ic_law_engine_precision(const struct ic_law_engine *e, unsigned i)
{
    return e->variant[i].precision;
}

int ic_law_engine_variant(const struct ic_law_engine *e, unsigned i, const char *precision)
{
    for (unsigned k = 0; k < ic_law_engine_count(e); k++)
        if (e->variant[k].base == e->variant[i].base && !strcmp(e->variant[k].precision, precision))
            return (int)k;
    return -1;
}

/* Takes it, unless as many as `max` wait. */
static bool put_command(struct ic_law_engine *e, struct command *c, unsigned max)
{
    pthread_mutex_lock(&e->lock);
    const bool taken = e->n_commands < max;
    if (taken) {
        *e->tail = c;
        e->tail = &c->next;
        e->n_commands++;
        pthread_cond_signal(&e->wake);
    }
    pthread_mutex_unlock(&e->lock);
    return taken;
}

enum ic_status ic_law_engine_command(struct ic_law_engine *e, const struct ic_sim_cmd *cmd,
                                     struct ic_err *err)
{
    switch (atomic_load(&e->state)) {
    case IC_ENGINE_READY: break;
    case IC_ENGINE_LOADING: return ic_fail(err, IC_UNAVAILABLE, "the laws are being loaded");
    case IC_ENGINE_FAILED: return ic_fail(err, IC_UNAVAILABLE, "the laws could not be loaded");
    default: return ic_fail(err, IC_UNAVAILABLE, "the server is shutting down");
    }
    struct command *c = malloc(sizeof *c);
    if (!c)
        return ic_fail(err, IC_OOM, "out of memory");
    *c = (struct command){.cmd = *cmd};
    if (put_command(e, c, IC_LAW_COMMANDS_MAX))
        return IC_OK;
    free(c);
    return ic_fail(err, IC_BUSY, "%d commands are waiting for the Law M engine", IC_LAW_COMMANDS_MAX);
}

struct ic_law_farewell *ic_law_farewell_new(uint64_t owner)
{
    struct ic_law_farewell *f = malloc(sizeof *f);

    if (f)
        f->command = (struct command){.cmd = {.op = IC_SIM_OWNER_GONE, .owner = owner}};
    return f;
}

void ic_law_engine_farewell(struct ic_law_engine *e, struct ic_law_farewell *f)
{
    put_command(e, &f->command, UINT_MAX); /* never refused: it frees what the others are short of */
}

void ic_law_engine_stop(struct ic_law_engine **ep)
{
    struct ic_law_engine *e = *ep;

    if (!e)
        return;
    atomic_store(&e->stop, true);
    pthread_mutex_lock(&e->lock);
    pthread_cond_signal(&e->wake);
    pthread_mutex_unlock(&e->lock);
    pthread_join(e->worker.thread, NULL);
    *ep = NULL;
    if (e->worker.lost)
        return;
    ic_law_sched_close(&e->sched);
    for (unsigned i = 0; i < e->n_laws; i++) {
        e->backend->unpack(&e->packed[i]);
        ic_law_close(&e->laws[i]);
    }
    for (struct command *c = e->head, *next; c; c = next) {
        next = c->next;
        free(c->cmd.state);
        free(c);
    }
    pthread_mutex_destroy(&e->lock);
    pthread_cond_destroy(&e->wake);
    free(e->worker.life);
    free(e);
}
