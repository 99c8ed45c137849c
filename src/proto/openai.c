/* OpenAI's HTTP formats over the same engine: chat completions and completions, whole or as server-sent events. Fields
 * beyond OpenAI's (top_k, min_p, repeat_penalty, grammar, json_schema) are those of docs/protocol.md. */
#include "proto/internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/utf8.h"

/* Bytes or tokens of /tokenize and /detokenize. The loop does them itself and everybody waits for it: 70 ms for
 * the worst 16 KiB, but 1 s for the worst 64 KiB. */
#define TOKENIZE_MAX 16384
#define SLOW_RESERVE 1024 /* bytes of an outbox kept free for telling its owner that it is full */

/* The lists of `logprobs`: chat has one of objects, completions have four side by side. */
enum { LIST_CONTENT, LIST_TOKENS = 0, LIST_LOGPROBS, LIST_TOPS, LIST_OFFSETS, N_LISTS };

struct completion {
    struct http_job job;
    bool chat, stream, usage, begun; /* begun: the head of a streamed answer has left */
    int64_t created;
    int64_t alternatives;            /* with each token's log probability */
    int64_t chars;                   /* characters before the next token */
    struct ic_buf text;              /* whole answers: what has come */
    struct ic_buf logprobs[N_LISTS]; /* JSON, without the brackets; streamed answers: of one event */
    struct ic_err err;
};

static void free_completion(struct http_job *job)
{
    struct completion *q = (struct completion *)job;

    ic_buf_deinit(&q->text);
    for (int i = 0; i < N_LISTS; i++)
        ic_buf_deinit(&q->logprobs[i]);
    free(q);
}

/* ---- reading ------------------------------------------------------------------------------------------------------ */

/* Asks for nothing: not there, or empty. */
static bool asks_nothing(const json_t *v)
{
    return !v || json_is_null(v) || (json_is_array(v) && json_array_size(v) == 0) ||
           (json_is_object(v) && json_object_size(v) == 0);
}

/* What would be ignored silently is refused by name. */
static enum ic_status refuse_unsupported(const json_t *o, bool chat, struct ic_err *err)
{
    const json_t *suffix = json_object_get(o, "suffix");
    int64_t n = 1, best_of = 1;
    bool echo = false;
    enum ic_status st;

    if ((st = ic_field_int(o, "n", 1, 128, &n, err)) != IC_OK ||
        (st = ic_field_int(o, "best_of", 1, 128, &best_of, err)) != IC_OK ||
        (st = ic_field_bool(o, "echo", &echo, err)) != IC_OK)
        return st;
    if (n != 1 || best_of != 1)
        return ic_fail(err, IC_BAD_REQUEST,
                       "n and best_of must be 1: send several requests, they share the decoding");
    if (!asks_nothing(json_object_get(o, "tools")) || !asks_nothing(json_object_get(o, "functions")))
        return ic_fail(err, IC_BAD_REQUEST, "tools are not supported");
    if (!chat && suffix && !json_is_null(suffix))
        return ic_fail(err, IC_BAD_REQUEST, "suffix is not supported");
    if (echo)
        return ic_fail(err, IC_BAD_REQUEST, "echo is not supported");
    return IC_OK;
}

/* How many alternatives are asked for, translated into `logprobs` of `params`. There one at least is asked for, so that
 * the chosen token's own comes along. */
static enum ic_status translate_logprobs(json_t *o, bool chat, int64_t *alternatives, struct ic_err *err)
{
    int64_t n = -1;
    bool on = false;
    enum ic_status st;

    if (!chat) {
        if ((st = ic_field_int(o, "logprobs", 0, IC_LOGPROBS_MAX, &n, err)) != IC_OK)
            return st;
        on = n >= 0;
    } else {
        if ((st = ic_field_bool(o, "logprobs", &on, err)) != IC_OK ||
            (st = ic_field_int(o, "top_logprobs", 0, IC_LOGPROBS_MAX, &n, err)) != IC_OK)
            return st;
        if (n > 0 && !on)
            return ic_fail(err, IC_BAD_REQUEST, "top_logprobs needs logprobs: true");
    }
    *alternatives = n > 0 ? n : 0;
    if (json_object_set_new(o, "logprobs", json_integer(!on ? 0 : n > 0 ? n : 1)) != 0)
        return ic_fail(err, IC_OOM, "out of memory");
    return IC_OK;
}

/* Translates OpenAI's names into those of `params`, in place. */
static enum ic_status translate(json_t *o, struct completion *q, struct ic_err *err)
{
    const json_t *format = json_object_get(o, "response_format");
    json_t *max = json_object_get(o, "max_completion_tokens");
    enum ic_status st = translate_logprobs(o, q->chat, &q->alternatives, err);
    int set = 0;

    if (st != IC_OK)
        return st;
    if (max && !json_is_null(max) && json_object_set(o, "max_tokens", max) != 0)
        return ic_fail(err, IC_OOM, "out of memory");
    if (format && !json_is_null(format)) {
        const char *type = json_string_value(json_object_get(format, "type"));
        bool object = type && !strcmp(type, "json_object"),
             by_schema = type && !strcmp(type, "json_schema");
        json_t *schema =
            by_schema ? json_object_get(json_object_get(format, "json_schema"), "schema") : NULL;
        if (!schema || json_is_null(schema)) /* where llama-server's clients put it, for both types */
            schema = json_object_get(format, "schema");
        if ((object || by_schema) && schema && !json_is_null(schema))
            set = json_object_set(o, "json_schema", schema);
        else if (object)
            set = json_object_set_new(o, "json_schema", json_pack("{s:s}", "type", "object"));
        else if (!type || strcmp(type, "text") != 0)
            return ic_fail(err, IC_BAD_REQUEST,
                           "response_format must be text, json_object, or json_schema with a schema");
    }
    return set == 0 ? IC_OK : ic_fail(err, IC_OOM, "out of memory");
}

static enum ic_status parse_text(const json_t *o, bool chat, struct ic_text_req *req, struct ic_err *err)
{
    const json_t *prompt = json_object_get(o, "prompt");

    if (chat)
        return ic_parse_messages(json_object_get(o, "messages"), req, err);
    if (json_is_array(prompt) && json_array_size(prompt) == 1)
        prompt = json_array_get(prompt, 0);
    if (!json_is_string(prompt))
        return ic_fail(err, IC_BAD_REQUEST, "prompt must be a string");
    if (!(req->prompt_len = json_string_length(prompt)))
        return ic_fail(err, IC_BAD_REQUEST, "the prompt is empty");
    return (req->prompt = strdup(json_string_value(prompt))) ? IC_OK
                                                             : ic_fail(err, IC_OOM, "out of memory");
}

static enum ic_status parse(const struct ic_server *s, json_t *o, struct completion *q, struct ic_err *err)
{
    const json_t *stream_options = json_object_get(o, "stream_options"), *max;
    enum ic_status st;

    if ((st = refuse_unsupported(o, q->chat, err)) != IC_OK || (st = translate(o, q, err)) != IC_OK ||
        (st = ic_field_bool(o, "stream", &q->stream, err)) != IC_OK ||
        (st = parse_text(o, q->chat, q->job.req, err)) != IC_OK ||
        (st = ic_parse_params(o, &q->job.req->params, err)) != IC_OK ||
        (st = ic_parse_salt(o, q->job.req, err)) != IC_OK)
        return st;
    max = json_object_get(o, "max_tokens");
    if (!q->chat && (!max || json_is_null(max)))
        q->job.req->params.max_tokens = 16; /* OpenAI's default for this path */
    if (json_is_object(stream_options))
        st = ic_field_bool(stream_options, "include_usage", &q->usage, err);
    (void)s;
    return st;
}

/* ---- writing ------------------------------------------------------------------------------------------------------ */

static const char *model_name(const struct ic_server *s)
{
    const struct ic_text_info *i = s->text ? ic_text_engine_info(s->text) : NULL;
    return i ? i->name : "";
}

static struct ic_buf *begin(struct ic_server *s, const struct completion *q, bool sse)
{
    struct ic_buf *b = &s->out;

    ic_buf_clear(b);
    ic_buf_puts(b, sse ? "data: {" : "{");
    ic_json_key(b, "id");
    ic_buf_printf(b, "\"%s-%llu\"", q->chat ? "chatcmpl" : "cmpl", (unsigned long long)q->job.rid);
    ic_json_kstr(b, "object",
                 !q->chat ? "text_completion"
                 : sse    ? "chat.completion.chunk"
                          : "chat.completion");
    ic_json_kint(b, "created", q->created);
    ic_json_kstr(b, "model", model_name(s));
    return b;
}

static void put_usage(struct ic_buf *b, const struct ic_text_stats *t)
{
    ic_json_key(b, "usage");
    ic_buf_printf(b,
                  "{\"prompt_tokens\":%d,\"completion_tokens\":%d,\"total_tokens\":%d,"
                  "\"prompt_tokens_details\":{\"cached_tokens\":%d}}",
                  t->prompt_tokens, t->tokens, t->prompt_tokens + t->tokens, t->cached_tokens);
}

static void put_byte_list(struct ic_buf *b, const char *s, size_t n)
{
    ic_buf_puts(b, "[");
    for (size_t i = 0; i < n; i++)
        ic_buf_printf(b, i ? ",%u" : "%u", (unsigned char)s[i]);
    ic_buf_puts(b, "]");
}

static void put_bytes(struct ic_buf *b, const char *s, size_t n)
{
    ic_json_key(b, "bytes");
    put_byte_list(b, s, n);
}

/* JSON has no infinity; OpenAI writes this instead. */
static double finite_logprob(double v)
{
    return isfinite(v) ? v : -9999.0;
}

/* One entry of choices[].logprobs.content. */
static void put_logprob(struct ic_buf *b, const struct ic_event *ev, int64_t alternatives)
{
    ic_buf_puts(b, b->len ? ",{" : "{");
    ic_json_key(b, "token");
    ic_json_str(b, ev->text, ev->len);
    ic_json_knum(b, "logprob", finite_logprob(log((double)ev->prob)));
    put_bytes(b, ev->text, ev->len);
    ic_json_key(b, "top_logprobs");
    ic_buf_puts(b, "[");
    for (int32_t i = 0; i < ev->n_top && i < alternatives; i++) {
        ic_buf_puts(b, i ? ",{" : "{");
        ic_json_key(b, "token");
        ic_json_str(b, ev->text + ev->top[i].off, ev->top[i].len);
        ic_json_knum(b, "logprob", finite_logprob((double)ev->top[i].logprob));
        put_bytes(b, ev->text + ev->top[i].off, ev->top[i].len);
        ic_buf_puts(b, "}");
    }
    ic_buf_puts(b, "]}");
}

/* The same for completions: an entry in each of the four lists. */
static void put_logprob_lists(struct ic_buf *lists, const struct ic_event *ev, int64_t alternatives,
                              int64_t offset)
{
    struct ic_buf *tops = &lists[LIST_TOPS];

    for (int i = 0; i < N_LISTS; i++)
        ic_buf_puts(&lists[i], lists[i].len ? "," : "");
    ic_json_str(&lists[LIST_TOKENS], ev->text, ev->len);
    ic_json_num(&lists[LIST_LOGPROBS], finite_logprob(log((double)ev->prob)));
    ic_buf_printf(&lists[LIST_OFFSETS], "%lld", (long long)offset);
    ic_buf_puts(tops, "{");
    for (int32_t i = 0; i < ev->n_top && i < alternatives; i++) {
        ic_buf_puts(tops, i ? "," : "");
        ic_json_str(tops, ev->text + ev->top[i].off, ev->top[i].len);
        ic_buf_puts(tops, ":");
        ic_json_num(tops, finite_logprob((double)ev->top[i].logprob));
    }
    ic_buf_puts(tops, "}");
}

static void note_logprob(struct completion *q, const struct ic_event *ev)
{
    if (ev->n_top && q->chat)
        put_logprob(&q->logprobs[LIST_CONTENT], ev, q->alternatives);
    else if (ev->n_top)
        put_logprob_lists(q->logprobs, ev, q->alternatives, q->chars);
    for (size_t i = 0; i < ev->len; i++)
        q->chars += ((unsigned char)ev->text[i] & 0xC0) != 0x80;
}

/* Writes what has been noted, and forgets it. */
static void put_logprobs(struct ic_buf *b, struct completion *q)
{
    static const char *const names[] = {"tokens", "token_logprobs", "top_logprobs", "text_offset"};

    ic_json_key(b, "logprobs");
    if (!q->logprobs[0].len) {
        ic_buf_puts(b, "null");
        return;
    }
    ic_buf_puts(b, "{");
    for (int i = 0; i < (q->chat ? 1 : N_LISTS); i++) {
        struct ic_buf *list = &q->logprobs[i];
        ic_json_key(b, q->chat ? "content" : names[i]);
        ic_buf_puts(b, "[");
        ic_buf_put(b, list->data, list->len);
        ic_buf_puts(b, "]");
        b->failed |= list->failed;
        ic_buf_clear(list);
    }
    ic_buf_puts(b, "}");
}

static const char *finish_name(enum ic_end_reason r)
{
    return r == IC_END_LENGTH ? "length" : "stop";
}

/* Makes s->out the event that tells of an error: the last one, [DONE] does not follow. */
static void make_error_event(struct ic_server *s, const struct ic_err *err)
{
    struct ic_buf *b = &s->out;

    ic_buf_clear(b);
    ic_buf_puts(b, "data: {\"error\":{");
    ic_json_kstr(b, "code", ic_status_name(err->code));
    ic_json_kstr(b, "message", err->msg);
    ic_json_kstr(b, "type", "server_error");
    ic_json_kstr(b, "param", NULL);
    ic_buf_puts(b, "}}");
}

/* A client too slow for an event (IC_BUSY), or one for whose event there is no memory, loses its request. It is told so:
 * an answer that was cut off must not look like one that is complete. */
static void cut_off(struct ic_server *s, struct ic_peer *p, enum ic_status why)
{
    static const char no_memory[] = "data: {\"error\":{\"code\":\"oom\",\"message\":\"out of memory\","
                                    "\"type\":\"server_error\",\"param\":null}}\n\n";
    struct completion *q = p->app;
    struct ic_err err = {0};

    if (why == IC_BUSY) {
        s->slow_closed++;
        ic_fail(&err, IC_BUSY, "this connection reads too slowly: its outbox of %zu bytes is full",
                s->cfg.outbox_max);
        make_error_event(s, &err);
        ic_buf_puts(&s->out, "\n\n");
    }
    if (why == IC_BUSY && !s->out.failed)
        p->vt->chunk(p, s->out.data, s->out.len, 0);
    else
        p->vt->chunk(p, no_memory, sizeof no_memory - 1, 0);
    atomic_store(&q->job.req->cancel, IC_CANCEL_GONE);
    ic_http_waited(s, p);
    p->vt->end(p);
}

/* Sends s->out as an event. */
static void send_event(struct ic_server *s, struct ic_peer *p, int64_t stamp_ns)
{
    struct completion *q = p->app;

    if (s->waiting[p->id.slot] != p) /* cut off by the event before */
        return;
    ic_buf_puts(&s->out, "\n\n");
    if (!q->begun) {
        p->vt->begin(p, 200, "text/event-stream; charset=utf-8",
                     "Cache-Control: no-cache\r\nX-Accel-Buffering: no\r\n");
        q->begun = true;
    }
    enum ic_status st = s->out.failed ? IC_OOM
                        : p->vt->pending(p) + s->out.len + SLOW_RESERVE > s->cfg.outbox_max
                            ? IC_BUSY
                            : p->vt->chunk(p, s->out.data, s->out.len, stamp_ns);
    if (st != IC_OK)
        cut_off(s, p, st);
}

static void put_delta(struct ic_buf *b, const struct completion *q, const char *text, size_t len,
                      const char *role)
{
    ic_json_key(b, "choices");
    ic_buf_puts(b, "[{\"index\":0");
    if (q->chat) {
        ic_json_key(b, "delta");
        ic_buf_puts(b, "{");
        if (role)
            ic_json_kstr(b, "role", role);
        if (text) {
            ic_json_key(b, "content");
            ic_json_str(b, text, len);
        }
        ic_buf_puts(b, "}");
    } else {
        ic_json_key(b, "text");
        ic_json_str(b, text ? text : "", len);
    }
}

/* A chat's first event names the role and nothing else, as OpenAI's does: their own client takes a first event's
 * logprobs twice. */
static void stream_role(struct ic_server *s, struct ic_peer *p)
{
    struct completion *q = p->app;
    struct ic_buf *b;

    if (!q->chat || q->begun)
        return;
    b = begin(s, q, true);
    put_delta(b, q, "", 0, "assistant");
    ic_json_kstr(b, "finish_reason", NULL);
    ic_buf_puts(b, "}]}");
    send_event(s, p, 0);
}

static void stream_token(struct ic_server *s, struct ic_peer *p, const struct ic_event *ev)
{
    struct completion *q = p->app;
    struct ic_buf *b;

    stream_role(s, p);
    b = begin(s, q, true);
    put_delta(b, q, ev->text, ev->len, NULL);
    note_logprob(q, ev);
    if (ev->n_top)
        put_logprobs(b, q);
    ic_json_kstr(b, "finish_reason", NULL);
    ic_buf_puts(b, "}]}");
    send_event(s, p, ev->stamp_ns);
}

static void stream_end(struct ic_server *s, struct ic_peer *p, const struct ic_event *ev)
{
    struct completion *q = p->app;
    struct ic_buf *b;

    stream_role(s, p);
    b = begin(s, q, true);
    put_delta(b, q, NULL, 0, NULL);
    ic_json_kstr(b, "finish_reason", finish_name(ev->reason));
    ic_buf_puts(b, "}]}");
    send_event(s, p, 0);
    if (q->usage) {
        b = begin(s, q, true);
        ic_json_key(b, "choices");
        ic_buf_puts(b, "[]");
        put_usage(b, &ev->stats);
        ic_buf_puts(b, "}");
        send_event(s, p, 0);
    }
    ic_buf_clear(&s->out);
    ic_buf_puts(&s->out, "data: [DONE]");
    send_event(s, p, 0);
}

static void reply_whole(struct ic_server *s, struct ic_peer *p, const struct ic_event *ev)
{
    struct completion *q = p->app;
    struct ic_buf *b = begin(s, q, false);

    ic_json_key(b, "choices");
    ic_buf_puts(b, "[{\"index\":0");
    if (q->chat) {
        ic_json_key(b, "message");
        ic_buf_puts(b, "{");
        ic_json_kstr(b, "role", "assistant");
        ic_json_key(b, "content");
    } else {
        ic_json_key(b, "text");
    }
    ic_json_str(b, q->text.data ? q->text.data : "", q->text.len);
    if (q->chat)
        ic_buf_puts(b, "}");
    put_logprobs(b, q);
    ic_json_kstr(b, "finish_reason", finish_name(ev->reason));
    ic_buf_puts(b, "}]");
    put_usage(b, &ev->stats);
    ic_buf_puts(b, "}");
    if (b->failed || q->text.failed)
        ic_http_error(s, p, 507, IC_OOM, "the answer is too large", NULL);
    else
        p->vt->reply(p, 200, "application/json", NULL, b->data, b->len);
}

static void end_with_error(struct ic_server *s, struct ic_peer *p, const struct ic_err *err)
{
    struct completion *q = p->app;

    if (q->begun) {
        make_error_event(s, err);
        send_event(s, p, 0);
    } else {
        ic_http_error(s, p, ic_status_http(err->code), err->code, err->msg, NULL);
    }
}

static void completion_event(struct ic_server *s, struct ic_peer *p, struct ic_event *ev)
{
    struct completion *q = p->app;
    bool over = ev->kind == IC_EVENT_END || (ev->kind == IC_EVENT_ERROR && !ev->more);

    if (ev->kind == IC_EVENT_TOKEN && q->stream) {
        stream_token(s, p, ev);
    } else if (ev->kind == IC_EVENT_TOKEN) {
        ic_buf_put(&q->text, ev->text, ev->len);
        note_logprob(q, ev);
    } else if (ev->kind == IC_EVENT_ERROR) {
        ic_fail(&q->err, ev->code, "%s", ev->text);
    }
    if (!over || s->waiting[p->id.slot] != p) /* the latter: given up as too slow */
        return;
    if (ev->kind == IC_EVENT_END && ev->reason == IC_END_DEADLINE)
        ic_fail(&q->err, IC_DEADLINE, "the deadline has passed");
    else if (ev->kind == IC_EVENT_END && ev->reason >= IC_END_ABORT && q->err.code == IC_OK)
        ic_fail(&q->err, IC_INTERNAL,
                "the answer was broken off"); /* there was no memory for telling why */
    if (q->err.code != IC_OK)
        end_with_error(s, p, &q->err);
    else if (q->stream)
        stream_end(s, p, ev);
    else
        reply_whole(s, p, ev);
    if (s->waiting[p->id.slot] == p) {
        ic_http_waited(s, p);
        if (q->begun)
            p->vt->end(p);
    }
}

/* ---- requests ------------------------------------------------------------------------------------------------------- */

static void complete(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r, bool chat)
{
    struct ic_err err = {0};
    struct completion *q = calloc(1, sizeof *q);
    json_t *o = NULL;

    if (!q || !(q->job.req = ic_text_req_new()))
        ic_fail(&err, IC_OOM, "out of memory");
    else if (!s->text)
        ic_fail(&err, IC_UNAVAILABLE, "this server has no text model");
    else if (s->draining)
        ic_fail(&err, IC_UNAVAILABLE, "the server is shutting down");
    else
        o = ic_json_object(r->body, r->len, &err);
    if (err.code == IC_OK) {
        q->chat = chat;
        q->created = (int64_t)ic_wall_s();
        q->job.rid = q->job.req->rid;
        q->job.event = completion_event;
        q->job.free = free_completion;
        q->job.req->owner = ic_owner_of(p);
        q->job.req->client = ic_client_of(s, p, ic_http_client(s, p));
        if (parse(s, o, q, &err) == IC_OK &&
            ic_text_engine_submit(s->text, ic_text_req_ref(q->job.req), &err) != IC_OK)
            ic_text_req_unref(q->job.req);
    }
    json_decref(o);
    if (err.code == IC_OK) {
        ic_http_wait(s, p, &q->job);
        return;
    }
    if (q)
        ic_text_req_unref(q->job.req);
    free(q);
    ic_http_error(s, p, ic_status_http(err.code), err.code, err.msg, NULL);
}

void ic_openai_chat(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r)
{
    complete(s, p, r, true);
}

void ic_openai_completion(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r)
{
    complete(s, p, r, false);
}

/* ---- /tokenize, /detokenize: llama-server's formats ------------------------------------------------------------------- */

/* A token with its text, or with its bytes where they are no text by themselves. */
static void put_piece(struct ic_buf *b, const struct ic_text_model *m, int32_t token)
{
    struct ic_buf piece = {0};

    ic_text_piece(m, token, &piece);
    ic_buf_printf(b, "{\"id\":%d", token);
    ic_json_key(b, "piece");
    if (ic_utf8_valid(piece.data, piece.len))
        ic_json_str(b, piece.data ? piece.data : "", piece.len);
    else
        put_byte_list(b, piece.data, piece.len);
    ic_buf_puts(b, "}");
    b->failed |= piece.failed;
    ic_buf_deinit(&piece);
}

void ic_openai_tokenize(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r)
{
    const struct ic_text_model *m = s->text ? ic_text_engine_borrow(s->text) : NULL;
    struct ic_err err = {0};
    json_t *o = ic_json_object(r->body, r->len, &err);
    const char *content = NULL;
    bool special = false, parse = false, pieces = false;
    int32_t *tokens = NULL, n = 0;
    struct ic_buf *b = &s->out;

    if (o && ic_field_str(o, "content", TOKENIZE_MAX, &content, &err) == IC_OK &&
        ic_field_bool(o, "add_special", &special, &err) == IC_OK &&
        ic_field_bool(o, "parse_special", &parse, &err) == IC_OK &&
        ic_field_bool(o, "with_pieces", &pieces, &err) == IC_OK) {
        if (!content)
            ic_fail(&err, IC_BAD_REQUEST, "content is missing");
        else if (!m)
            ic_fail(&err, IC_UNAVAILABLE, "no text model is loaded");
        else if (ic_text_tokenize(m, content, strlen(content), special, parse, TOKENIZE_MAX, &tokens, &n,
                                  &err) == IC_TOO_LARGE)
            ic_fail(&err, IC_TOO_LARGE, "content has more than %d tokens", TOKENIZE_MAX);
    }
    json_decref(o);
    ic_buf_clear(b);
    ic_buf_puts(b, "{\"tokens\":[");
    for (int32_t i = 0; err.code == IC_OK && i < n; i++) {
        ic_buf_puts(b, i ? "," : "");
        if (pieces)
            put_piece(b, m, tokens[i]);
        else
            ic_buf_printf(b, "%d", tokens[i]);
    }
    ic_buf_puts(b, "]}");
    if (m)
        ic_text_engine_give_back(s->text);
    free(tokens);
    if (b->failed || b->len > s->cfg.outbox_max)
        ic_fail(&err, IC_TOO_LARGE, "the answer would be longer than %zu bytes", s->cfg.outbox_max);
    if (err.code != IC_OK)
        ic_http_error(s, p, ic_status_http(err.code), err.code, err.msg, NULL);
    else
        p->vt->reply(p, 200, "application/json", NULL, b->data, b->len);
}

void ic_openai_detokenize(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r)
{
    const struct ic_text_model *m = s->text ? ic_text_engine_borrow(s->text) : NULL;
    struct ic_err err = {0};
    json_t *o = ic_json_object(r->body, r->len, &err), *list = o ? json_object_get(o, "tokens") : NULL,
           *each;
    struct ic_buf text = {0}, *b = &s->out;
    size_t i;

    if (o && !m)
        ic_fail(&err, IC_UNAVAILABLE, "no text model is loaded");
    else if (o && (!json_is_array(list) || json_array_size(list) > TOKENIZE_MAX))
        ic_fail(&err, IC_BAD_REQUEST, "tokens must be a list of at most %d numbers", TOKENIZE_MAX);
    json_array_foreach(list, i, each)
    {
        json_int_t t = json_is_integer(each) ? json_integer_value(each) : -1;
        if (err.code != IC_OK)
            break;
        if (t < 0 || t >= ic_text_engine_info(s->text)->n_vocab)
            ic_fail(&err, IC_BAD_REQUEST, "there is no such token at place %zu", i);
        else
            ic_text_piece(m, (int32_t)t, &text);
        if (text.failed ||
            text.len > s->cfg.outbox_max) /* a short question could else have a very long answer */
            ic_fail(&err, IC_TOO_LARGE, "content would be longer than %zu bytes", s->cfg.outbox_max);
    }
    if (m)
        ic_text_engine_give_back(s->text);
    json_decref(o);
    if (err.code != IC_OK) {
        ic_http_error(s, p, ic_status_http(err.code), err.code, err.msg, NULL);
    } else {
        ic_buf_clear(b);
        ic_buf_puts(b, "{\"content\":");
        ic_json_str(b, text.data ? text.data : "", text.len);
        ic_buf_puts(b, "}");
        if (b->failed)
            ic_http_error(s, p, 507, IC_OOM, "out of memory", NULL);
        else
            p->vt->reply(p, 200, "application/json", NULL, b->data, b->len);
    }
    ic_buf_deinit(&text);
}
