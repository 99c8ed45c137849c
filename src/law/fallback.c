#include "law/fallback.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

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
    size_t taken; /* of the device's memory */
};

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

/* ---- the table ------------------------------------------------------------------------------- */

static size_t tensor_bytes(unsigned channels, unsigned height, unsigned width)
{
    return first->tensor_bytes(channels, height, width);
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
    if (e->device)
        first->close(&e->device);
    give(&e->taken);
    if (e->cpu)
        cpu_backend()->close(&e->cpu);
    ic_law_plan_close(&e->cpu_plan);
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
    return sizeof *e + (e->device ? p->batch * ic_law_staging_bytes(p->law, p->height, p->width) : 0) +
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

static enum ic_status fb_run(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n, unsigned steps,
                             struct ic_err *err)
{
    struct ic_err why = {0};
    if (e->device) {
        if (first->run(e->device, io, n, steps, &why) == IC_OK)
            return IC_OK;
        ic_warn("law", "%s, %u x %u: the simulations move to the CPU: %s", e->plan->law->name,
                e->plan->height, e->plan->width, why.msg);
        if (why.code != IC_OOM)
            atomic_store(&e->packed->inner->lost, true);
        first->close(&e->device);
        give(&e->taken);
    }
    if (!e->cpu) {
        enum ic_status s = open_on_cpu(e, err);
        if (s != IC_OK)
            return s; /* the next call tries again */
    }
    for (unsigned i = 0; i < steps; i++)
        cpu_backend()->step(e->cpu, io, n);
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
};

const struct ic_law_backend *ic_law_backend_with_cpu(const struct ic_law_backend *device)
{
    IC_ASSERT(device->run && (!first || first == device));
    first = device;
    return &with_cpu;
}
