/* Requests that want the vector of their prompt. They are read as every other prompt is, in slices, shared decodes and in
 * their turn; what differs is what is taken of their rows, and that cells of others, which have no hidden states, help them
 * only as far as ic_pool_may_skip says. */
#include <stdlib.h>
#include <string.h>

#include "sched/text_sched_int.h"

enum ic_status ic_embed_open(const struct ic_text_sched *s, struct run *r, struct ic_err *err)
{
    if (s->be->n_embd <= 0)
        return ic_fail(err, IC_BAD_REQUEST,
                       "this server gives no embeddings: it would have to be started with --pooling "
                       "mean, cls or last");
    return ic_pool_open(&r->pool, r->req->pooling, s->be->n_embd, r->n_tokens, err);
}

static enum ic_status send_vector(struct ic_text_sched *s, struct run *r, struct ic_err *err)
{
    size_t bytes = sizeof(float) * (size_t)r->pool.n_embd;
    struct ic_event *ev = ic_run_event(r, IC_EVENT_EMBEDDING, NULL, 0, bytes);
    float *vector = malloc(bytes); /* an event's text need not lie as numbers must */
    enum ic_status st = IC_OK;

    if (!ev || !vector)
        st = ic_fail(err, IC_OOM, "out of memory");
    else if (!ic_pool_result(&r->pool, vector))
        st = ic_fail(err, IC_INTERNAL, "the model's hidden states are not finite");
    if (st == IC_OK) {
        memcpy(ev->text, vector, bytes);
        ev->len = bytes;
        ic_run_emit(s, r, ev);
        ev = NULL;
    }
    free(ev);
    free(vector);
    return st;
}

enum ic_status ic_embed_take(struct ic_text_sched *s, struct run *r, bool *done, struct ic_err *err)
{
    *done = false;
    for (int32_t i = r->first; i < r->first + r->rows; i++) {
        const struct ic_row *row = &s->rows[i];
        const float *state = row->embd ? s->be->embedding(s->be->arg, i) : NULL;
        if (row->embd && !state)
            return ic_fail(err, IC_INTERNAL, "a row has no hidden state");
        ic_pool_add(&r->pool, row->pos, state);
    }
    if (r->at < 0)
        return IC_OK;
    *done = true;
    return send_vector(s, r, err);
}
