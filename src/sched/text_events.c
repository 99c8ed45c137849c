/* What the scheduler tells: a run's events, on their way to whoever asked. */
#include <stdlib.h>
#include <string.h>

#include "sched/text_sched_int.h"

struct ic_event *ic_run_event(const struct run *r, enum ic_event_kind kind, const char *text, size_t len,
                              size_t extra)
{
    struct ic_event *ev = calloc(1, sizeof *ev + len + extra + 1);

    if (!ev)
        return NULL;
    ev->owner = r->req->owner;
    ev->rid = r->req->rid;
    ev->kind = kind;
    ev->len = len;
    if (len)
        memcpy(ev->text, text, len);
    return ev;
}

void ic_run_emit(struct ic_text_sched *s, const struct run *r, struct ic_event *ev)
{
    const bool gone = atomic_load(&r->req->cancel) == IC_CANCEL_GONE;

    if (ev && !gone)
        s->be->emit(s->be->arg, ev);
    else if (ev)
        free(ev);
    else if (!gone) {
        /* an answer with a hole is none: the request ends here, as far as its client is told */
        s->be->lost(s->be->arg,
                    &(struct ic_lost){.owner = r->req->owner, .rid = r->req->rid, .more = r->prepared});
        atomic_store(&r->req->cancel, IC_CANCEL_GONE);
    }
}

void ic_run_error(struct ic_text_sched *s, const struct run *r, const struct ic_err *err, bool more)
{
    struct ic_event *ev = ic_run_event(r, IC_EVENT_ERROR, err->msg, strlen(err->msg), 0);
    if (ev) {
        ev->code = err->code;
        ev->more = more;
    }
    ic_run_emit(s, r, ev);
}

void ic_run_token(struct ic_text_sched *s, struct run *r, const struct ic_sampled *d,
                  const struct ic_buf *text)
{
    struct ic_buf tops = {0};
    struct ic_event_top top[IC_LOGPROBS_MAX];

    for (int32_t i = 0; d && i < d->n_top; i++) {
        top[i] = (struct ic_event_top){d->top[i].logprob, (uint32_t)(text->len + tops.len), 0};
        s->be->piece(s->be->arg, d->top[i].token, &tops);
        top[i].len = (uint32_t)(text->len + tops.len) - top[i].off;
    }
    struct ic_event *ev =
        tops.failed ? NULL : ic_run_event(r, IC_EVENT_TOKEN, text->data, text->len, tops.len);
    if (ev) {
        ev->index =
            d ? r->n_gen - 1 : r->n_gen; /* what was held back leaves with the end-of-generation token */
        ev->stamp_ns = r->last_ns;
        if (d) {
            ev->prob = d->prob;
            ev->n_top = d->n_top;
            memcpy(ev->top, top, sizeof *top * (size_t)d->n_top);
            if (tops.len)
                memcpy(ev->text + text->len, tops.data, tops.len);
        }
    }
    if (r->session && r->session->kind == IC_SESSION_CHAT)
        ic_buf_put(&r->answer, text->data, text->len);
    if (r->answer.failed) { /* the session would go on with another text than was said */
        free(ev);
        ev = NULL;
    }
    ic_run_emit(s, r, ev);
    ic_buf_deinit(&tops);
}
