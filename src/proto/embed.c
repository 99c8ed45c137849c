/* POST /v1/embeddings, OpenAI's format. Each string of `input` is a text request of its own, so that it is queued, shares
 * its turn and is decoded as every other; IC_EMBED_AT_ONCE of them at most are under way, the next follows when one is done.
 * A queue that is full only slows this down as long as one of ours is in it. */
#include "proto/internal.h"

#include <stdlib.h>
#include <string.h>

#define IC_EMBED_INPUTS_MAX 2048 /* as OpenAI's */
#define IC_EMBED_AT_ONCE 32      /* of one exchange */
/* bytes: the loop writes it, and everybody waits for that, some 70 ms */
#define IC_EMBED_ANSWER_MAX (4 << 20)
#define NUMBER_BYTES 16 /* "-1.23456789e-05," */
#define ENTRY_BYTES 64  /* of what stands around a vector */
#define FORMAT_MAX 16   /* bytes of encoding_format */

enum state { TODO, ASKED, DONE };

struct embedding {
    struct http_job job; /* its `more` are `asked` */
    struct ic_text_req *asked[IC_EMBED_AT_ONCE];
    size_t input_of[IC_EMBED_AT_ONCE]; /* which of the inputs that is */
    int under_way, window; /* window: so many may be; less after a refusal, more with each that is done */
    json_t *body;          /* owns the inputs */
    size_t count, left, first_todo; /* left: not DONE; before first_todo none is TODO */
    unsigned char *state;           /* of each input */
    float *vectors;                 /* [count][n_embd] */
    int32_t n_embd;
    enum ic_pooling pooling;
    bool base64;
    int64_t prompt_tokens;
};

/* Nobody waits for the rest any more. */
static void drop_requests(struct ic_server *s, struct embedding *q)
{
    for (int k = 0; k < IC_EMBED_AT_ONCE; k++) {
        if (!q->asked[k])
            continue;
        atomic_store(&q->asked[k]->cancel, IC_CANCEL_GONE);
        ic_text_req_unref(q->asked[k]);
        q->asked[k] = NULL;
    }
    if (q->under_way > 0 && s->text)
        ic_text_engine_kick(s->text);
    q->under_way = 0;
}

static void free_embedding(struct http_job *job)
{
    struct embedding *q = (struct embedding *)job;

    json_decref(q->body);
    free(q->state);
    free(q->vectors);
    free(q);
}

/* ---- reading ------------------------------------------------------------------------------------------------------ */

static const json_t *input_at(const struct embedding *q, size_t i)
{
    const json_t *input = json_object_get(q->body, "input");
    return json_is_array(input) ? json_array_get(input, i) : input;
}

static enum ic_status check_inputs(struct embedding *q, struct ic_err *err)
{
    const json_t *input = json_object_get(q->body, "input");

    q->count = json_is_array(input) ? json_array_size(input) : 1;
    if (q->count == 0)
        return ic_fail(err, IC_BAD_REQUEST, "input is empty");
    if (q->count > IC_EMBED_INPUTS_MAX)
        return ic_fail(err, IC_TOO_LARGE, "input holds %zu texts, at most %d can be", q->count,
                       IC_EMBED_INPUTS_MAX);
    for (size_t i = 0; i < q->count; i++) {
        const json_t *text = input_at(q, i);
        if (!json_is_string(text))
            return ic_fail(
                err, IC_BAD_REQUEST,
                "input must be a string or a list of strings (lists of tokens are not supported)");
        if (json_string_length(text) == 0)
            return ic_fail(err, IC_BAD_REQUEST, "input %zu is empty", i);
    }
    return IC_OK;
}

static enum ic_status check_format(struct embedding *q, struct ic_err *err)
{
    const json_t *dimensions = json_object_get(q->body, "dimensions");
    const char *format = "float";
    enum ic_status st = ic_field_str(q->body, "encoding_format", FORMAT_MAX, &format, err);

    if (st != IC_OK)
        return st;
    q->base64 = !strcmp(format, "base64");
    if (!q->base64 && strcmp(format, "float") != 0)
        return ic_fail(err, IC_BAD_REQUEST, "encoding_format must be float or base64");
    if (dimensions && !json_is_null(dimensions))
        return ic_fail(err, IC_BAD_REQUEST,
                       "dimensions is not supported: vectors are as long as the model makes them");
    return IC_OK;
}

/* How long the answer may become, and memory for it. */
static enum ic_status make_room(struct embedding *q, struct ic_err *err)
{
    size_t each = (size_t)q->n_embd * (q->base64 ? sizeof(float) * 4 / 3 + 1 : NUMBER_BYTES) + ENTRY_BYTES;

    if (q->count > IC_EMBED_ANSWER_MAX / each)
        return ic_fail(err, IC_TOO_LARGE,
                       "the answer to %zu texts might be longer than %d bytes: send %zu at most%s",
                       q->count, IC_EMBED_ANSWER_MAX, IC_EMBED_ANSWER_MAX / each,
                       q->base64 ? "" : ", or ask for base64");
    q->left = q->count;
    q->state = calloc(q->count, 1);
    q->vectors = calloc(q->count * (size_t)q->n_embd, sizeof *q->vectors);
    return q->state && q->vectors ? IC_OK : ic_fail(err, IC_OOM, "out of memory");
}

static enum ic_status parse(struct ic_server *s, struct embedding *q, const struct ic_http_req *r,
                            struct ic_err *err)
{
    const struct ic_text_info *info = s->text ? ic_text_engine_info(s->text) : NULL;
    enum ic_status st;

    if (!s->text)
        return ic_fail(err, IC_UNAVAILABLE, "this server has no text model");
    if (s->draining)
        return ic_fail(err, IC_UNAVAILABLE, "the server is shutting down");
    if (!info)
        return ic_fail(err, IC_UNAVAILABLE, "the model is being loaded");
    if (!info->pooling)
        return ic_fail(err, IC_BAD_REQUEST,
                       "this server gives no embeddings: start it with --pooling mean, cls or last");
    q->n_embd = info->n_embd;
    q->pooling = info->pooling;
    if (!(q->body = ic_json_object(r->body, r->len, err)))
        return err->code;
    if ((st = check_inputs(q, err)) != IC_OK || (st = check_format(q, err)) != IC_OK)
        return st;
    return make_room(q, err);
}

/* ---- asking ------------------------------------------------------------------------------------------------------- */

static enum ic_status ask(struct ic_server *s, struct ic_peer *p, struct embedding *q, int slot, size_t i,
                          struct ic_err *err)
{
    const json_t *text = input_at(q, i);
    struct ic_text_req *req = ic_text_req_new();
    enum ic_status st = req ? ic_parse_salt(q->body, req, err) : ic_fail(err, IC_OOM, "out of memory");

    if (st == IC_OK && !(req->prompt = strdup(json_string_value(text))))
        st = ic_fail(err, IC_OOM, "out of memory");
    if (st == IC_OK) {
        req->prompt_len = json_string_length(text);
        req->pooling = q->pooling;
        req->owner = ic_owner_of(p);
        req->client = ic_client_of(s, p, ic_http_client(s, p));
        if ((st = ic_text_engine_submit(s->text, ic_text_req_ref(req), err)) != IC_OK)
            ic_text_req_unref(req);
    }
    if (st != IC_OK) {
        ic_text_req_unref(req);
        return st;
    }
    q->asked[slot] = req;
    q->input_of[slot] = i;
    q->state[i] = ASKED;
    q->under_way++;
    return IC_OK;
}

/* As many as may be under way. */
static enum ic_status ask_more(struct ic_server *s, struct ic_peer *p, struct embedding *q,
                               struct ic_err *err)
{
    size_t i = q->first_todo;

    for (int slot = 0; slot < IC_EMBED_AT_ONCE && q->under_way < q->window; slot++) {
        if (q->asked[slot])
            continue;
        while (i < q->count && q->state[i] != TODO)
            i++;
        q->first_todo = i;
        if (i == q->count)
            return IC_OK;
        enum ic_status st = ask(s, p, q, slot, i, err);
        if (st == IC_BUSY && q->under_way > 0) { /* there will be room when one of ours is done */
            q->window = q->under_way;
            *err = (struct ic_err){0};
            return IC_OK;
        }
        if (st != IC_OK)
            return st;
    }
    return IC_OK;
}

/* ---- answering ---------------------------------------------------------------------------------------------------- */

static void put_vector(struct ic_buf *b, const struct embedding *q, size_t i)
{
    const float *v = q->vectors + i * (size_t)q->n_embd;

    ic_buf_puts(b, i ? ",{" : "{");
    ic_json_kstr(b, "object", "embedding");
    ic_json_kint(b, "index", (int64_t)i);
    ic_json_key(b, "embedding");
    ic_buf_puts(b, q->base64 ? "\"" : "[");
    if (q->base64)
        ic_buf_base64(
            b, v, sizeof *v * (size_t)q->n_embd); /* little-endian, as every machine that this runs on */
    for (int32_t k = 0; k < q->n_embd && !q->base64; k++)
        ic_buf_printf(b, k ? ",%.9g" : "%.9g", (double)v[k]); /* nine digits are a float32 to the bit */
    ic_buf_puts(b, q->base64 ? "\"}" : "]}");
}

static void reply(struct ic_server *s, struct ic_peer *p, const struct embedding *q)
{
    const struct ic_text_info *info = s->text ? ic_text_engine_info(s->text) : NULL;
    struct ic_buf *b = &s->out;

    ic_buf_clear(b);
    ic_buf_puts(b, "{");
    ic_json_kstr(b, "object", "list");
    ic_json_key(b, "data");
    ic_buf_puts(b, "[");
    for (size_t i = 0; i < q->count; i++)
        put_vector(b, q, i);
    ic_buf_puts(b, "]");
    ic_json_kstr(b, "model", info ? info->name : "");
    ic_json_key(b, "usage");
    ic_buf_printf(b, "{\"prompt_tokens\":%lld,\"total_tokens\":%lld}}", (long long)q->prompt_tokens,
                  (long long)q->prompt_tokens);
    if (b->failed)
        ic_http_error(s, p, 507, IC_OOM, "the answer is too large", NULL);
    else
        p->vt->reply(p, 200, "application/json", NULL, b->data, b->len);
}

static void reply_error(struct ic_server *s, struct ic_peer *p, const struct ic_err *err)
{
    ic_http_error(s, p, ic_status_http(err->code), err->code, err->msg, NULL);
}

/* One of them did not come to its end: neither does the answer. */
static void fail(struct ic_server *s, struct ic_peer *p, struct embedding *q, size_t i, enum ic_status code,
                 const char *text)
{
    struct ic_err err = {0};

    if (q->count > 1)
        ic_fail(&err, code, "input %zu: %s", i, text);
    else
        ic_fail(&err, code, "%s", text);
    drop_requests(s, q);
    reply_error(s, p, &err);
    ic_http_waited(s, p);
}

static int slot_of(const struct embedding *q, uint64_t rid)
{
    for (int k = 0; k < IC_EMBED_AT_ONCE; k++)
        if (q->asked[k] && q->asked[k]->rid == rid)
            return k;
    return -1;
}

static void free_slot(struct embedding *q, int slot)
{
    ic_text_req_unref(q->asked[slot]);
    q->asked[slot] = NULL;
    q->under_way--;
}

static void one_is_done(struct ic_server *s, struct ic_peer *p, struct embedding *q, int slot,
                        const struct ic_event *ev)
{
    size_t i = q->input_of[slot];
    struct ic_err err = {0};

    free_slot(q, slot);
    q->state[i] = DONE;
    q->left--;
    q->window += q->window < IC_EMBED_AT_ONCE;
    q->prompt_tokens += ev->stats.prompt_tokens;
    if (q->left == 0) {
        reply(s, p, q);
        ic_http_waited(s, p);
    } else if (ask_more(s, p, q, &err) != IC_OK) {
        fail(s, p, q, q->first_todo, err.code, err.msg);
    }
}

static void embedding_event(struct ic_server *s, struct ic_peer *p, struct ic_event *ev)
{
    struct embedding *q = p->app;
    int slot = slot_of(q, ev->rid);
    size_t i = slot >= 0 ? q->input_of[slot] : 0;

    if (slot < 0)
        return;
    if (ev->kind == IC_EVENT_EMBEDDING && ev->len == sizeof(float) * (size_t)q->n_embd) {
        memcpy(q->vectors + i * (size_t)q->n_embd, ev->text, ev->len);
    } else if (ev->kind == IC_EVENT_ERROR && ev->code == IC_BUSY && !ev->more && q->under_way > 1) {
        free_slot(q, slot); /* more than may wait of one client: asked again when another of ours is done */
        q->state[i] = TODO;
        q->first_todo = i < q->first_todo ? i : q->first_todo;
        q->window = q->under_way;
    } else if (ev->kind == IC_EVENT_ERROR) {
        fail(s, p, q, i, ev->code, ev->text);
    } else if (ev->kind == IC_EVENT_END && ev->reason == IC_END_STOP) {
        one_is_done(s, p, q, slot, ev);
    } else if (ev->kind == IC_EVENT_END) {
        fail(s, p, q, i, IC_INTERNAL, "it was broken off"); /* there was no memory for telling why */
    }
}

void ic_openai_embeddings(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r)
{
    struct ic_err err = {0};
    struct embedding *q = calloc(1, sizeof *q);

    if (!q) {
        ic_fail(&err, IC_OOM, "out of memory");
    } else {
        q->job.more = q->asked;
        q->job.n_more = q->window = IC_EMBED_AT_ONCE;
        q->job.event = embedding_event;
        q->job.free = free_embedding;
        if (parse(s, q, r, &err) == IC_OK && ask_more(s, p, q, &err) == IC_OK) {
            ic_http_wait(s, p, &q->job);
            return;
        }
        drop_requests(s, q);
        free_embedding(&q->job);
    }
    reply_error(s, p, &err);
}
