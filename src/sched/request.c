#include "sched/request.h"

#include <stdlib.h>

#include "base/clock.h"

static const char *const end_names[] = {
#define X(symbol, name) name,
    IC_END_TABLE(X)
#undef X
};

const char *ic_end_name(enum ic_end_reason r)
{
    return end_names[r];
}

struct ic_text_req *ic_text_req_new(void)
{
    static _Atomic uint64_t last_rid;
    struct ic_text_req *r = calloc(1, sizeof *r);

    if (!r)
        return NULL;
    atomic_init(&r->refs, 1);
    r->rid = atomic_fetch_add(&last_rid, 1) + 1;
    r->priority = IC_PRIO_NORMAL;
    r->arrival_ns = ic_now_ns();
    ic_text_params_init(&r->params);
    return r;
}

struct ic_text_req *ic_text_req_ref(struct ic_text_req *r)
{
    atomic_fetch_add(&r->refs, 1);
    return r;
}

void ic_text_req_unref(struct ic_text_req *r)
{
    if (!r || atomic_fetch_sub(&r->refs, 1) != 1)
        return;
    for (size_t i = 0; i < r->n_msgs; i++) {
        free((char *)r->msgs[i].role);
        free((char *)r->msgs[i].content);
    }
    free(r->msgs);
    free(r->prompt);
    ic_text_params_deinit(&r->params);
    free(r);
}

void ic_sim_credit_unref(struct ic_sim_credit *c)
{
    if (atomic_fetch_sub(&c->refs, 1) == 1)
        free(c);
}

void ic_event_free(struct ic_event *ev)
{
    if (ev && ev->kind == IC_EVENT_SIM_FRAME) {
        atomic_fetch_sub(&ev->sim.credit->in_flight, 1);
        ic_sim_credit_unref(ev->sim.credit);
    }
    free(ev);
}
