/* A device for tests, where there is none: the reference back end behind a device's manners. Its memory is
 * ordinary memory that nobody else reaches: a state there is full of NaN until state_put, steps leave the
 * host's copy alone, delta and frames are there until the next run or draw and NaN or 0xEE afterwards. So
 * what is not copied in time shows. Each file that includes it has a device of its own. */
#ifndef IC_LAW_FAKE_DEVICE_H
#define IC_LAW_FAKE_DEVICE_H

#pragma GCC diagnostic ignored "-Wunused-function"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "law/plan.h"

/* What has happened, and what is to fail: a run, counted from 1, and in which way. */
static struct {
    unsigned long runs, puts, gets, draws, frames, deltas;
    size_t states;         /* open now */
    unsigned long fail_at; /* 0: never */
    enum ic_status fail_with;
    bool gone; /* nothing can be read back any more */
} fake_device;

struct ic_law_state {
    struct ic_law_state *next; /* in fake_states: what is abandoned can still be found, and is no leak */
    float *psi, *h, *c;
    size_t psi_bytes, half;
    size_t bytes; /* that it takes, ic_law_state_bytes */
};
static struct ic_law_state *fake_states;

struct ic_law_exec {
    struct ic_law_exec *ref;
    const struct ic_law_plan *plan;
    struct ic_law_io *io;
    float *delta; /* of each place */
    bool *wanted; /* delta, in the last run */
    unsigned ran;
    bool started;
    unsigned drawn;
    struct ic_view_frame *frames;
    unsigned char *pool; /* ic_law_frames_bytes */
    size_t *at;
    struct ic_view_ctx *views;
};

static void fake_fill(float *p, size_t bytes)
{
    for (size_t i = 0; i < bytes / sizeof *p; i++)
        p[i] = NAN;
}

static float *fake_alloc(size_t bytes)
{
    float *p = aligned_alloc(IC_LAW_ALIGN, (bytes + IC_LAW_ALIGN - 1) / IC_LAW_ALIGN * IC_LAW_ALIGN);
    if (p)
        fake_fill(p, bytes);
    return p;
}

static enum ic_status fake_gone(struct ic_err *err)
{
    return ic_fail(err, IC_UNAVAILABLE, "the fake device is gone");
}

static void fake_state_close(struct ic_law_state **state)
{
    if (!*state)
        return;
    fake_device.states--;
    struct ic_law_state **p = &fake_states;
    while (*p != *state)
        p = &(*p)->next;
    *p = (*state)->next;
    free((*state)->psi);
    free((*state)->h);
    free((*state)->c);
    free(*state);
    *state = NULL;
}

static enum ic_status fake_state_open(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                                      const struct ic_law_io *host, struct ic_law_state **out,
                                      struct ic_err *err)
{
    struct ic_law_state *s = *out = calloc(1, sizeof *s);
    (void)packed, (void)host;
    if (!s)
        return ic_fail(err, IC_OOM, "no memory");
    fake_device.states++;
    s->next = fake_states;
    fake_states = s;
    s->psi_bytes = plan->psi_bytes;
    s->bytes = ic_law_state_bytes(plan->law, plan->height, plan->width);
    s->half = plan->memory_bytes / 2;
    s->psi = fake_alloc(s->psi_bytes);
    s->h = s->half ? fake_alloc(s->half) : NULL;
    s->c = s->half ? fake_alloc(s->half) : NULL;
    if (!s->psi || (s->half && (!s->h || !s->c))) {
        fake_state_close(out);
        return ic_fail(err, IC_OOM, "no memory");
    }
    return IC_OK;
}

static enum ic_status fake_state_put(struct ic_law_state *s, const struct ic_law_io *host,
                                     struct ic_err *err)
{
    if (fake_device.gone)
        return fake_gone(err);
    fake_device.puts++;
    memcpy(s->psi, host->psi, s->psi_bytes);
    if (s->half) {
        memcpy(s->h, host->h, s->half);
        memcpy(s->c, host->c, s->half);
    }
    return IC_OK;
}

static enum ic_status fake_state_get(struct ic_law_state *s, const struct ic_law_io *host,
                                     struct ic_err *err)
{
    if (fake_device.gone)
        return fake_gone(err);
    fake_device.gets++;
    memcpy(host->psi, s->psi, s->psi_bytes);
    if (s->half) {
        memcpy(host->h, s->h, s->half);
        memcpy(host->c, s->c, s->half);
    }
    return IC_OK;
}

static void fake_close(struct ic_law_exec **exec)
{
    struct ic_law_exec *e = *exec;
    if (!e)
        return;
    ic_law_backend_ref.close(&e->ref);
    ic_view_ctx_close(&e->views);
    free(e->io);
    free(e->delta);
    free(e->wanted);
    free(e->frames);
    free(e->pool);
    free(e->at);
    free(e);
    *exec = NULL;
}

static enum ic_status fake_open(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                                struct ic_law_exec **out, struct ic_err *err)
{
    struct ic_law_exec *e = *out = calloc(1, sizeof *e);
    if (!e)
        return ic_fail(err, IC_OOM, "no memory");
    const size_t n = plan->batch;
    e->plan = plan;
    e->io = calloc(n, sizeof *e->io);
    e->delta = fake_alloc(n * plan->psi_bytes);
    e->wanted = calloc(n, sizeof *e->wanted);
    e->frames = calloc(n, sizeof *e->frames);
    e->at = calloc(n, sizeof *e->at);
    e->pool = malloc(ic_law_frames_bytes(plan->height, plan->width, plan->batch));
    enum ic_status st = ic_view_ctx_open(&e->views, err);
    if (st == IC_OK && (!e->io || !e->delta || !e->wanted || !e->frames || !e->at || !e->pool))
        st = ic_fail(err, IC_OOM, "no memory");
    if (st == IC_OK)
        st = ic_law_backend_ref.open(packed, plan, &e->ref, err);
    if (st != IC_OK)
        fake_close(out);
    return st;
}

static size_t fake_exec_size(const struct ic_law_packed *packed, const struct ic_law_plan *plan)
{
    return ic_law_backend_ref.exec_size(packed, plan) + sizeof(struct ic_law_exec) +
           ic_law_frames_bytes(plan->height, plan->width, plan->batch);
}

static size_t fake_exec_bytes(const struct ic_law_exec *e)
{
    return ic_law_backend_ref.exec_bytes(e->ref) + sizeof *e +
           ic_law_frames_bytes(e->plan->height, e->plan->width, e->plan->batch);
}

/* The steps are made in `run`; until then the device has what it had. */
static void fake_start(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n, unsigned steps)
{
    (void)io, (void)n, (void)steps;
    e->started = true;
}

static enum ic_status fake_run(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n,
                               unsigned steps, struct ic_err *err)
{
    const size_t psi = e->plan->psi_bytes;
    e->started = false;
    e->ran = n;
    e->drawn = 0;
    fake_fill(e->delta, e->plan->batch * psi);
    if (++fake_device.runs == fake_device.fail_at) {
        fake_device.gone = fake_device.fail_with == IC_UNAVAILABLE;
        for (unsigned i = 0; i < n && fake_device.fail_with != IC_OOM; i++) /* half made */
            if (io[i].state)
                fake_fill(io[i].state->psi, psi);
        return ic_fail(err, fake_device.fail_with,
                       fake_device.gone ? "the fake device is gone" : "the fake GPU's memory is exhausted");
    }
    for (unsigned i = 0; i < n; i++) {
        e->io[i] = io[i];
        e->wanted[i] = io[i].delta;
        if (!io[i].state)
            continue;
        e->io[i].psi = io[i].state->psi;
        e->io[i].h = io[i].state->h;
        e->io[i].c = io[i].state->c;
        e->io[i].delta = io[i].delta ? e->delta + i * psi / sizeof(float) : NULL;
    }
    for (unsigned k = 0; k < steps; k++)
        ic_law_backend_ref.step(e->ref, e->io, n);
    return IC_OK;
}

static void fake_step(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n)
{
    (void)fake_run(e, io, n, 1, NULL);
}

static enum ic_status fake_draw(struct ic_law_exec *e, const struct ic_law_draw *draws, unsigned n,
                                struct ic_err *err)
{
    const struct ic_law_shape shape = {e->plan->height, e->plan->width, e->plan->law->d};
    const size_t size = ic_law_frames_bytes(e->plan->height, e->plan->width, e->plan->batch);
    size_t used = 0;
    IC_ASSERT(n <= e->plan->batch && !e->started);
    for (unsigned i = 0; i < n; i++) {
        if (!ic_view_of_one_cell(draws[i].request.view))
            return ic_fail(err, IC_BAD_REQUEST, "not a view of one cell");
        IC_ASSERT(ic_view_plan(&draws[i].request, shape, &e->frames[i], NULL) == IC_OK);
        e->at[i] = used;
        used += e->frames[i].bytes;
    }
    if (used > size)
        return ic_fail(err, IC_TOO_LARGE, "too many frames");
    if (fake_device.gone)
        return fake_gone(err);
    fake_device.draws++;
    memset(e->pool, 0xEE, size);
    for (unsigned i = 0; i < n; i++) {
        const int place = draws[i].place;
        IC_ASSERT(place < (int)e->ran);
        const float *delta = place >= 0 && e->wanted[place]
                                 ? e->delta + (size_t)place * e->plan->psi_bytes / sizeof(float)
                                 : NULL;
        enum ic_status st = ic_view_render(e->views, &draws[i].request, draws[i].state->psi, delta, shape,
                                           e->pool + e->at[i], e->frames[i].bytes, &e->frames[i], err);
        if (st != IC_OK)
            return st;
    }
    e->drawn = n;
    return IC_OK;
}

static enum ic_status fake_frame(struct ic_law_exec *e, unsigned i, void *out, size_t size,
                                 struct ic_view_frame *frame, struct ic_err *err)
{
    if (fake_device.gone)
        return fake_gone(err);
    fake_device.frames++;
    IC_ASSERT(size >= e->frames[i].bytes && frame->bytes == e->frames[i].bytes);
    memcpy(out, e->pool + e->at[i], e->frames[i].bytes);
    memset(e->pool + e->at[i], 0xEE, e->frames[i].bytes);
    frame->min = e->frames[i].min;
    frame->max = e->frames[i].max;
    return IC_OK;
}

static enum ic_status fake_delta(struct ic_law_exec *e, unsigned place, float *out, struct ic_err *err)
{
    IC_ASSERT(place < e->ran && e->wanted[place]);
    if (fake_device.gone)
        return fake_gone(err);
    fake_device.deltas++;
    memcpy(out, e->delta + place * e->plan->psi_bytes / sizeof(float), e->plan->psi_bytes);
    return IC_OK;
}

/* The whole of it over the reference; memory is for the includer to say. */
static struct ic_law_backend fake_device_backend(const char *name)
{
    struct ic_law_backend be = ic_law_backend_ref;
    be.name = name;
    be.net_out = NULL;
    be.open = fake_open;
    be.close = fake_close;
    be.exec_bytes = fake_exec_bytes;
    be.exec_size = fake_exec_size;
    be.step = fake_step;
    be.run = fake_run;
    be.state_open = fake_state_open;
    be.state_close = fake_state_close;
    be.state_put = fake_state_put;
    be.state_get = fake_state_get;
    be.start = fake_start;
    be.draw = fake_draw;
    be.frame = fake_frame;
    be.delta = fake_delta;
    return be;
}

#endif
