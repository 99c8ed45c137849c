#include "law/fallback.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/fault.h"
#include "base/log.h"

static const struct ic_law_backend *first; /* set once, by ic_law_backend_with_cpu */
static struct ic_law_gate gate;            /* likewise; take NULL: none */

void ic_law_fallback_gate(const struct ic_law_gate *g)
{
    gate = g ? *g : (struct ic_law_gate){0};
}

static bool take(const char *what, size_t bytes, struct ic_err *why)
{
    return !gate.take || bytes == 0 || gate.take(gate.arg, what, bytes, why);
}

static void give(size_t *bytes)
{
    if (gate.give && *bytes)
        gate.give(gate.arg, *bytes);
    *bytes = 0;
}

/* What may change behind the immutable packed form: the CPU's is made when it is first needed. */
struct inner {
    pthread_mutex_t lock;
    struct ic_law_packed *cpu; /* NULL: not needed yet */
    atomic_bool lost;
};

struct ic_law_packed {
    const struct ic_law *law;
    unsigned threads;
    struct ic_law_packed *device; /* NULL: the law is on the CPU */
    size_t taken;                 /* of the device's memory */
    struct inner *inner;
};

struct ic_law_exec {
    const struct ic_law_packed *packed;
    const struct ic_law_plan *plan;
    struct ic_law_exec *device, *cpu; /* one of them */
    struct ic_law_plan *cpu_plan;
    size_t taken;                 /* of the device's memory */
    struct ic_law_state **guests; /* of simulations without a state, a place each; NULL: not needed yet */
    struct ic_law_io *io;         /* the batch as the one of `device` or `cpu` sees it */
    unsigned guests_off;          /* of the batch so many have their new state, though the run failed */
    bool started;                 /* io is made; start_status and why are its error */
    enum ic_status start_status;
    struct ic_err why;
};

struct ic_law_state {
    struct ic_law_state *next, *prev; /* in `on_device`: the longest unused is last */
    const struct ic_law_packed *packed;
    struct ic_law_io host;
    struct ic_law_state *device; /* NULL: not there */
    size_t taken;                /* of the device's memory */
    enum { HOST, BOTH, DEVICE } newer;
    uint64_t ahead; /* DEVICE: steps since the two were the same */
    uint64_t lost;
    bool busy; /* in a run */
};

/* All states on the device, of all laws. The lock guards the list and `busy`; it is not held while the
 * device works, so that a thread that hangs there does not stop the one that takes over. */
static struct {
    pthread_mutex_t lock;
    struct ic_law_state *first, *last;
} on_device = {.lock = PTHREAD_MUTEX_INITIALIZER};

static const struct ic_law_backend *cpu_backend(void)
{
    const struct ic_law_backend *be = ic_law_backend_find("cpu");
    return be ? be : &ic_law_backend_ref;
}

static enum ic_status packed_for_cpu(const struct ic_law_packed *p, struct ic_law_packed **out,
                                     struct ic_err *err)
{
    enum ic_status s = IC_OK;
    pthread_mutex_lock(&p->inner->lock);
    if (!p->inner->cpu)
        s = cpu_backend()->pack(p->law, p->threads, &p->inner->cpu, err);
    *out = p->inner->cpu;
    pthread_mutex_unlock(&p->inner->lock);
    return s;
}

static enum ic_status open_on_cpu(struct ic_law_exec *e, struct ic_err *err)
{
    const struct ic_law_backend *cpu = cpu_backend();
    const struct ic_law_plan *p = e->plan;
    struct ic_law_packed *packed;
    enum ic_status s = IC_OK;
    if (ic_fault(IC_FAULT_LAW_OOM))
        s = ic_fail(err, IC_OOM, "no memory for a plan on the CPU (a fault that IC_FAULT asks for)");
    if (s == IC_OK)
        s = packed_for_cpu(e->packed, &packed, err);
    if (s == IC_OK)
        s = ic_law_plan_open(p->law, p->height, p->width, p->batch, cpu->tensor_bytes, &e->cpu_plan, err);
    if (s == IC_OK)
        s = cpu->open(packed, e->cpu_plan, &e->cpu, err);
    if (s != IC_OK)
        ic_law_plan_close(&e->cpu_plan);
    return s;
}

/* ---- States ------------------------------------------------------------------------------------ */

static void list_in(struct ic_law_state *s)
{
    s->prev = NULL;
    s->next = on_device.first;
    *(s->next ? &s->next->prev : &on_device.last) = s;
    on_device.first = s;
}

static void list_out(struct ic_law_state *s)
{
    *(s->prev ? &s->prev->next : &on_device.first) = s->next;
    *(s->next ? &s->next->prev : &on_device.last) = s->prev;
    s->next = s->prev = NULL;
}

/* Brings the host's copy up to date. On failure the device is lost, and the host's copy is the state. */
static enum ic_status fetch(struct ic_law_state *s, struct ic_err *err)
{
    if (s->newer != DEVICE)
        return IC_OK;
    enum ic_status st = first->state_get(s->device, &s->host, err);
    s->newer = st == IC_OK ? BOTH : HOST;
    if (st != IC_OK) {
        s->lost += s->ahead;
        atomic_store(&s->packed->inner->lost, true);
    }
    s->ahead = 0;
    return st;
}

/* Off the device; what is only there is copied to the host first where `save`, and else lost. */
static void go_home(struct ic_law_state *s, bool save)
{
    struct ic_err why = {0};
    if (!s->device)
        return;
    if (save && fetch(s, &why) != IC_OK)
        ic_warn("law", "%s: a state could not be read back: %s", s->packed->law->name, why.msg);
    s->lost += s->newer == DEVICE ? s->ahead : 0;
    s->ahead = 0;
    s->newer = HOST;
    pthread_mutex_lock(&on_device.lock);
    list_out(s);
    pthread_mutex_unlock(&on_device.lock);
    first->state_close(&s->device);
    give(&s->taken);
}

/* False: all states there are in use. */
static bool evict_one(void)
{
    pthread_mutex_lock(&on_device.lock);
    struct ic_law_state *s = on_device.last;
    while (s && s->busy)
        s = s->prev;
    pthread_mutex_unlock(&on_device.lock);
    if (s)
        go_home(s, true);
    return s;
}

/* Memory of a state on the device, at the cost of others there. */
static enum ic_status open_state(const struct ic_law_exec *e, const struct ic_law_io *host,
                                 struct ic_law_state **out, size_t *taken, struct ic_err *err)
{
    const struct ic_law_plan *p = e->plan;
    const size_t bytes = ic_law_state_bytes(p->law, p->height, p->width);
    enum ic_status st;
    do {
        st = take("a state of a law", bytes, err) ? IC_OK : IC_OOM;
        *taken = st == IC_OK ? bytes : 0;
        if (st == IC_OK)
            st = first->state_open(e->packed->device, p, host, out, err);
        if (st != IC_OK)
            give(taken);
    } while (st == IC_OOM && evict_one());
    return st;
}

static enum ic_status fb_state_open(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                                    const struct ic_law_io *host, struct ic_law_state **out,
                                    struct ic_err *err)
{
    (void)plan;
    struct ic_law_state *s = *out = calloc(1, sizeof *s);
    if (!s)
        return ic_fail(err, IC_OOM, "no memory for a simulation's state");
    s->packed = packed;
    s->host = *host;
    s->host.state = NULL;
    return IC_OK;
}

static void fb_state_close(struct ic_law_state **state)
{
    struct ic_law_state *s = *state;
    if (s)
        go_home(s, false);
    free(s);
    *state = NULL;
}

static enum ic_status fb_state_put(struct ic_law_state *s, const struct ic_law_io *host, struct ic_err *err)
{
    (void)err;
    IC_ASSERT(host->psi == s->host.psi);
    s->newer = HOST; /* it goes there with the next run */
    s->ahead = 0;
    return IC_OK;
}

static enum ic_status fb_state_get(struct ic_law_state *s, const struct ic_law_io *host, struct ic_err *err)
{
    IC_ASSERT(host->psi == s->host.psi);
    return fetch(s, err);
}

uint64_t ic_law_fallback_lost(struct ic_law_state *s)
{
    const uint64_t lost = s->lost;
    s->lost = 0;
    return lost;
}

uint64_t ic_law_fallback_abandon(struct ic_law_state **state)
{
    struct ic_law_state *s = *state;
    const uint64_t lost = s->lost + s->ahead;
    if (s->device) {
        pthread_mutex_lock(&on_device.lock);
        list_out(s);
        pthread_mutex_unlock(&on_device.lock);
    }
    free(s); /* what it has of the device is not given back to the gate either: it is not free */
    *state = NULL;
    return lost;
}

static void set_busy(const struct ic_law_io *io, unsigned n, bool busy)
{
    pthread_mutex_lock(&on_device.lock);
    for (unsigned i = 0; i < n; i++)
        if (io[i].state)
            io[i].state->busy = busy;
    pthread_mutex_unlock(&on_device.lock);
}

/* Lets go of the device, guests included. */
static void leave_device(struct ic_law_exec *e)
{
    for (unsigned i = 0; e->guests && i < e->plan->batch; i++)
        if (e->guests[i]) {
            size_t bytes = ic_law_state_bytes(e->plan->law, e->plan->height, e->plan->width);
            first->state_close(&e->guests[i]);
            give(&bytes);
        }
    if (e->device)
        first->close(&e->device);
    give(&e->taken);
}

/* Each state of the batch is on the device, as new as the host's. */
static enum ic_status bring(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n,
                            struct ic_err *err)
{
    enum ic_status st = IC_OK;
    if (!first->state_open) {
        memcpy(e->io, io, n * sizeof *io);
        return IC_OK;
    }
    set_busy(io, n, true);
    for (unsigned i = 0; i < n && st == IC_OK; i++) {
        struct ic_law_state *s = io[i].state;
        e->io[i] = io[i];
        if (!s) {
            size_t taken;
            if (!e->guests[i])
                st = open_state(e, &io[i], &e->guests[i], &taken, err);
            if (st == IC_OK)
                st = first->state_put(e->guests[i], &io[i], err);
            e->io[i].state = e->guests[i];
            continue;
        }
        const bool there = s->device;
        if (!there)
            st = open_state(e, &s->host, &s->device, &s->taken, err);
        if (st == IC_OK && s->newer == HOST)
            st = first->state_put(s->device, &s->host, err);
        if (st == IC_OK && s->newer == HOST)
            s->newer = BOTH;
        e->io[i].state = s->device;
        if (!s->device)
            continue;
        pthread_mutex_lock(&on_device.lock);
        if (there)
            list_out(s);
        list_in(s);
        pthread_mutex_unlock(&on_device.lock);
    }
    return st;
}

/* What those without a state get back. Before any state counts as newer: a failure leaves them as they
 * were. */
static enum ic_status see_guests_off(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n,
                                     struct ic_err *err)
{
    enum ic_status st = IC_OK;
    for (unsigned i = 0; i < n && st == IC_OK; i++)
        if (!io[i].state) {
            st = first->state_get(e->guests[i], &io[i], err);
            e->guests_off = st == IC_OK ? i + 1 : i;
            if (st == IC_OK && io[i].delta)
                st = first->delta(e->device, i, io[i].delta, err);
        }
    return st;
}

static enum ic_status run_on_device(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n,
                                    unsigned steps, struct ic_err *err)
{
    enum ic_status st = e->started ? e->start_status : bring(e, io, n, err);
    if (e->started)
        *err = e->why;
    e->started = false;
    if (st == IC_OK)
        st = first->run(e->device, e->io, n, steps, err);
    if (st == IC_OK && first->state_open)
        st = see_guests_off(e, io, n, err);
    for (unsigned i = 0; i < n && st == IC_OK; i++)
        if (io[i].state) {
            io[i].state->newer = DEVICE;
            io[i].state->ahead += steps;
        }
    set_busy(io, n, false);
    return st;
}

static void fb_start(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n, unsigned steps)
{
    if (!e->device || !first->start)
        return;
    e->why = (struct ic_err){0};
    e->started = true;
    if ((e->start_status = bring(e, io, n, &e->why)) == IC_OK)
        first->start(e->device, e->io, n, steps);
}

static enum ic_status gone(struct ic_err *err)
{
    return ic_fail(err, IC_UNAVAILABLE, "it is not on the device");
}

static enum ic_status fb_draw(struct ic_law_exec *e, const struct ic_law_draw *draws, unsigned n,
                              struct ic_err *err)
{
    struct ic_law_draw mine[IC_LAW_BATCH_MAX];
    IC_ASSERT(n <= e->plan->batch && n <= IC_LAW_BATCH_MAX);
    if (!e->device || !first->draw)
        return gone(err);
    for (unsigned i = 0; i < n; i++) {
        mine[i] = draws[i];
        mine[i].state = draws[i].state->device;
        if (!mine[i].state || draws[i].state->newer == HOST)
            return gone(err);
    }
    return first->draw(e->device, mine, n, err);
}

static enum ic_status fb_frame(struct ic_law_exec *e, unsigned i, void *out, size_t size,
                               struct ic_view_frame *frame, struct ic_err *err)
{
    return e->device && first->frame ? first->frame(e->device, i, out, size, frame, err) : gone(err);
}

/* On the CPU it has been written already. */
static enum ic_status fb_delta(struct ic_law_exec *e, unsigned place, float *out, struct ic_err *err)
{
    return e->device && first->delta ? first->delta(e->device, place, out, err) : IC_OK;
}

/* ---- the table ------------------------------------------------------------------------------- */

static size_t tensor_bytes(const struct ic_law *law, unsigned channels, unsigned height, unsigned width)
{
    return first->tensor_bytes(law, channels, height, width);
}

static void fb_unpack(struct ic_law_packed **packed)
{
    if (!packed || !*packed)
        return;
    struct ic_law_packed *p = *packed;
    if (p->device)
        first->unpack(&p->device);
    give(&p->taken);
    if (p->inner && p->inner->cpu)
        cpu_backend()->unpack(&p->inner->cpu);
    if (p->inner)
        pthread_mutex_destroy(&p->inner->lock);
    free(p->inner);
    free(p);
    *packed = NULL;
}

static enum ic_status fb_pack(const struct ic_law *law, unsigned threads, struct ic_law_packed **out,
                              struct ic_err *err)
{
    struct ic_err why = {0};
    *out = NULL;
    struct ic_law_packed *p = calloc(1, sizeof *p);
    if (!p || !(p->inner = calloc(1, sizeof *p->inner))) {
        free(p);
        return ic_fail(err, IC_OOM, "no memory for a law's weights");
    }
    pthread_mutex_init(&p->inner->lock, NULL);
    p->law = law;
    p->threads = threads;
    enum ic_status s = IC_OK;
    if (first->pack(law, threads, &p->device, &why) == IC_OK) {
        size_t bytes = first->packed_bytes(p->device);
        if (take("weights of a law", bytes, &why))
            p->taken = bytes;
        else
            first->unpack(&p->device);
    }
    if (!p->device) {
        struct ic_law_packed *cpu;
        ic_warn("law", "%s runs on the CPU: %s", law->name, why.msg);
        s = packed_for_cpu(p, &cpu, err);
    }
    if (s != IC_OK)
        fb_unpack(&p);
    *out = p;
    return s;
}

static size_t fb_packed_bytes(const struct ic_law_packed *p)
{
    size_t n = sizeof *p + sizeof *p->inner;
    pthread_mutex_lock(&p->inner->lock);
    n += p->inner->cpu ? cpu_backend()->packed_bytes(p->inner->cpu) : 0;
    pthread_mutex_unlock(&p->inner->lock);
    return n + (p->device ? first->packed_bytes(p->device) : 0);
}

static void fb_close(struct ic_law_exec **exec)
{
    if (!exec || !*exec)
        return;
    struct ic_law_exec *e = *exec;
    leave_device(e);
    if (e->cpu)
        cpu_backend()->close(&e->cpu);
    ic_law_plan_close(&e->cpu_plan);
    free(e->guests);
    free(e->io);
    free(e);
    *exec = NULL;
}

/* The gate is asked for what is known beforehand, and then for what it has become. */
static enum ic_status open_on_device(struct ic_law_exec *e, struct ic_err *why)
{
    const struct ic_law_plan *p = e->plan;
    size_t want = first->exec_size ? first->exec_size(e->packed->device, p) : p->arena_bytes;

    if (!take("a plan of a law", want, why))
        return IC_OOM;
    e->taken = want;
    enum ic_status s = first->open(e->packed->device, p, &e->device, why);
    size_t got = s == IC_OK ? first->exec_bytes(e->device) : 0;
    if (got > want && !take("a plan of a law", got - want, why)) {
        first->close(&e->device);
        s = IC_OOM;
    }
    if (s != IC_OK)
        give(&e->taken);
    else if (got > want)
        e->taken = got;
    return s;
}

static enum ic_status fb_open(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                              struct ic_law_exec **out, struct ic_err *err)
{
    struct ic_err why = {0};
    struct ic_law_exec *e = calloc(1, sizeof *e);
    *out = NULL;
    if (!e)
        return ic_fail(err, IC_OOM, "no memory for a plan's state");
    e->packed = packed;
    e->plan = plan;
    e->io = calloc(plan->batch, sizeof *e->io);
    e->guests = calloc(plan->batch, sizeof(void *));
    if (!e->io || !e->guests) {
        fb_close(&e);
        return ic_fail(err, IC_OOM, "no memory for a plan's state");
    }
    enum ic_status s = IC_OK;
    const bool device = ic_law_fallback_on_device(packed);
    if (!device || open_on_device(e, &why) != IC_OK) {
        if (device)
            ic_warn("law", "%s, %u x %u, runs on the CPU: %s", plan->law->name, plan->height, plan->width,
                    why.msg);
        if (device && why.code == IC_UNAVAILABLE)
            atomic_store(&packed->inner->lost, true);
        s = open_on_cpu(e, err);
    }
    if (s != IC_OK)
        fb_close(&e);
    *out = e;
    return s;
}

static size_t fb_exec_bytes(const struct ic_law_exec *e)
{
    return sizeof *e + (e->device ? first->exec_bytes(e->device) : 0) +
           (e->cpu ? cpu_backend()->exec_bytes(e->cpu) : 0);
}

bool ic_law_fallback_on_device(const struct ic_law_packed *p)
{
    return p->device && !atomic_load(&p->inner->lost);
}

const struct ic_law_backend *ic_law_fallback_cpu(const struct ic_law_packed *p, struct ic_law_packed **out)
{
    return packed_for_cpu(p, out, NULL) == IC_OK ? cpu_backend() : NULL;
}

size_t ic_law_fallback_host_bytes(const struct ic_law_exec *e)
{
    const struct ic_law_plan *p = e->plan;
    return sizeof *e +
           (e->device ? ic_law_staging_bytes(first, p->law, p->height, p->width, p->batch) : 0) +
           (e->cpu ? cpu_backend()->exec_bytes(e->cpu) : 0);
}

static size_t fb_exec_size(const struct ic_law_packed *p, const struct ic_law_plan *plan)
{
    struct ic_law_packed *packed;
    size_t bytes;

    if (ic_law_fallback_on_device(p))
        bytes = first->exec_size ? first->exec_size(p->device, plan) : plan->arena_bytes;
    else if (packed_for_cpu(p, &packed, NULL) == IC_OK)
        bytes = ic_law_exec_size(cpu_backend(), packed, plan->law, plan->height, plan->width, plan->batch);
    else
        bytes = 0;
    return bytes ? bytes + sizeof(struct ic_law_exec) : 0;
}

/* The device is lost, or has no memory: nothing of this plan stays there. */
static void move_to_cpu(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n,
                        const struct ic_err *why)
{
    ic_warn("law", "%s, %u x %u: the simulations move to the CPU: %s", e->plan->law->name, e->plan->height,
            e->plan->width, why->msg);
    if (why->code != IC_OOM)
        atomic_store(&e->packed->inner->lost, true);
    for (unsigned i = 0; i < n; i++)
        if (io[i].state)
            go_home(io[i].state, why->code == IC_OOM);
    leave_device(e);
}

static enum ic_status fb_run(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n, unsigned steps,
                             struct ic_err *err)
{
    struct ic_err why = {0};
    e->guests_off = 0;
    if (e->device) {
        if (run_on_device(e, io, n, steps, &why) == IC_OK)
            return IC_OK;
        move_to_cpu(e, io, n, &why);
    }
    unsigned left = 0;
    for (unsigned i = 0; i < n; i++) {
        if (io[i].state)
            go_home(io[i].state, true); /* one that was not in the batch that moved */
        else if (i < e->guests_off)
            continue;
        e->io[left] = io[i];
        e->io[left++].state = NULL;
    }
    if (!e->cpu) {
        enum ic_status s = open_on_cpu(e, err);
        if (s != IC_OK)
            return s; /* the next call tries again */
    }
    for (unsigned i = 0; i < steps && left; i++)
        cpu_backend()->step(e->cpu, e->io, left);
    return IC_OK;
}

static void fb_step(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n)
{
    struct ic_err err = {0};
    if (fb_run(e, io, n, 1, &err) != IC_OK)
        ic_error("law", "a step of %s was not made: %s", e->plan->law->name, err.msg);
}

static const struct ic_law_backend with_cpu = {
    .name = "device, else cpu",
    .tensor_bytes = tensor_bytes,
    .pack = fb_pack,
    .unpack = fb_unpack,
    .packed_bytes = fb_packed_bytes,
    .open = fb_open,
    .close = fb_close,
    .exec_bytes = fb_exec_bytes,
    .step = fb_step,
    .run = fb_run,
    .exec_size = fb_exec_size,
    .state_open = fb_state_open,
    .state_close = fb_state_close,
    .state_put = fb_state_put,
    .state_get = fb_state_get,
    .start = fb_start,
    .draw = fb_draw,
    .frame = fb_frame,
    .delta = fb_delta,
};

const struct ic_law_backend *ic_law_backend_with_cpu(const struct ic_law_backend *device)
{
    IC_ASSERT(device->run && (!first || first == device));
    first = device;
    return &with_cpu;
}
