/* The native protocol (docs/protocol.md §1): one JSON object a message, `op` first. Also what clients of
 * InferenceCenter speak. */
#include "proto/internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>

#include "base/clock.h"
#include "base/log.h"

/* A message's fields: those of `payload`, where there is one, as if they stood at top level. */
struct msg {
    json_t *top, *payload;
    char id[IC_ID_MAX + 1];
};

static json_t *field(const struct msg *m, const char *key)
{
    json_t *v = m->payload ? json_object_get(m->payload, key) : NULL;
    return v ? v : json_object_get(m->top, key);
}

/* The object to read `key` from with the getters of fields.h. */
static const json_t *holder(const struct msg *m, const char *key)
{
    return m->payload && json_object_get(m->payload, key) ? m->payload : m->top;
}

static void fail(struct ic_server *s, struct conn *c, const struct msg *m, const struct ic_err *err)
{
    ic_conn_error(s, c, m->id[0] ? m->id : NULL, NULL, err);
}

static bool authed(struct ic_server *s, struct conn *c, const struct msg *m)
{
    struct ic_err err = {0};

    if (c->authed)
        return true;
    ic_fail(&err, IC_UNAUTHORIZED, "Not authenticated");
    fail(s, c, m, &err);
    return false;
}

/* ---- hello, auth ---------------------------------------------------------------------------------------- */

static void put_limits(struct ic_server *s, struct conn *c, struct ic_buf *b)
{
    const struct ic_text_info *i = s->text ? ic_text_engine_info(s->text) : NULL;

    ic_json_key(b, "limits");
    ic_buf_puts(b, "{");
    ic_json_kint(b, "message_bytes", (int64_t)s->cfg.message_max);
    ic_json_kint(b, "outbox_bytes", (int64_t)s->cfg.outbox_max);
    ic_json_kint(b, "connections", s->cfg.connections_max);
    ic_json_kint(b, "requests_per_connection", s->cfg.requests_max);
    ic_json_kint(b, "sessions", c->sessions_max);
    ic_json_kint(b, "queue", s->cfg.queue_max);
    ic_json_kint(b, "id_bytes", IC_ID_MAX);
    ic_json_kint(b, "messages", IC_MESSAGES_MAX);
    ic_json_kint(b, "stop_strings", IC_STOP_MAX);
    ic_json_kint(b, "stop_bytes", IC_STOP_LEN_MAX);
    ic_json_kint(b, "logprobs", IC_LOGPROBS_MAX);
    ic_json_kint(b, "grammar_bytes", IC_GRAMMAR_LEN_MAX);
    ic_json_kint(b, "json_depth", IC_JSON_DEPTH_MAX);
    ic_json_kint(b, "deadline_ms", IC_DEADLINE_MS_MAX);
    if (i) {
        ic_json_kint(b, "context_tokens", i->ctx_size);
        ic_json_kint(b, "prompt_tokens", i->ctx_size - 1);
    }
    ic_sim_put_limits(s, b);
    ic_buf_puts(b, "}");
}

void ic_native_hello(struct ic_server *s, struct conn *c)
{
    const struct ic_text_info *i = s->text ? ic_text_engine_info(s->text) : NULL;
    struct ic_buf *b = ic_reply(s, "hello");

    ic_json_kstr(b, "status", s->draining ? "draining" : i || !s->text ? "ready" : "loading");
    ic_json_kstr(b, "message", "Server is available");
    ic_json_kstr(b, "model", i ? i->name : NULL);
    ic_json_key(b, "laws");
    ic_buf_puts(b, "[");
    for (unsigned k = 0; s->law && k < ic_law_engine_count(s->law); k++) {
        const char *name = ic_law_engine_law(s->law, k)->name;
        if (k)
            ic_buf_puts(b, ",");
        ic_json_str(b, name, strlen(name));
    }
    ic_buf_puts(b, "]");
    ic_json_kstr(b, "version", IC_VERSION);
    ic_json_kint(b, "protocol", 1);
    ic_json_kint(b, "uptime_seconds", (ic_now_ns() - s->start_ns) / (1000 * IC_MS));
    put_limits(s, c, b);
    ic_json_kbool(b, "requires_auth", s->cfg.keys != NULL);
    ic_conn_send(s, c, 0);
}

void ic_native_auth_success(struct ic_server *s, struct conn *c)
{
    struct ic_buf *b = ic_reply(s, "auth_success");

    ic_json_kstr(b, "client_id", c->client_id);
    ic_json_kint(b, "max_sessions", c->sessions_max);
    ic_conn_send(s, c, 0);
}

static void op_hello(struct ic_server *s, struct conn *c, const struct msg *m)
{
    (void)m;
    ic_native_hello(s, c);
}

static void op_auth(struct ic_server *s, struct conn *c, const struct msg *m)
{
    const char *id = NULL, *key = NULL, *why = NULL;
    const struct ic_client *cl = NULL;
    struct ic_err err = {0};

    if (ic_field_str(holder(m, "client_id"), "client_id", IC_CLIENT_ID_MAX, &id, &err) != IC_OK ||
        ic_field_str(holder(m, "api_key"), "api_key", IC_KEY_LEN_MAX, &key, &err) != IC_OK)
        why = err.msg;
    else if (s->cfg.keys && (!id || !key))
        why = "Missing client_id or api_key";
    else if (s->cfg.keys && !(cl = ic_keys_check(s->cfg.keys, id, key)))
        why = "Invalid credentials";
    if (why) {
        ic_json_kstr(ic_reply(s, "auth_failed"), "reason", why);
        ic_conn_send(s, c, 0);
        return;
    }
    c->authed = true;
    snprintf(c->client_id, sizeof c->client_id, "%s", cl ? cl->id : id ? id : "");
    if (cl && cl->max_sessions)
        c->sessions_max = cl->max_sessions;
    ic_native_auth_success(s, c);
}

/* ---- sessions --------------------------------------------------------------------------------------------- */

static struct session *session_named(struct conn *c, const char *id)
{
    for (int i = 0; id && i < c->n_sessions; i++)
        if (!strcmp(c->sessions[i].id, id))
            return &c->sessions[i];
    return NULL;
}

/* Sessions of the same client on all its connections; a client without an id counts alone. */
static int sessions_of_client(const struct ic_server *s, const struct conn *c)
{
    int n = 0;

    if (!s->cfg.keys)
        return c->n_sessions;
    for (unsigned i = 0; i < s->cfg.connections_max; i++)
        if (s->conns[i] && !strcmp(s->conns[i]->client_id, c->client_id))
            n += s->conns[i]->n_sessions;
    return n;
}

static void session_error(struct ic_server *s, struct conn *c, enum ic_status code, const char *text)
{
    struct ic_buf *b = ic_reply(s, "session_error");

    ic_json_kstr(b, "code", ic_status_name(code));
    ic_json_kstr(b, "message", text);
    ic_json_kstr(b, "error", text);
    ic_conn_send(s, c, 0);
}

static void op_create_session(struct ic_server *s, struct conn *c, const struct msg *m)
{
    unsigned char raw[16];
    struct session *grown;

    (void)m;
    if (!c->authed) {
        session_error(s, c, IC_UNAUTHORIZED, "Not authenticated");
        return;
    }
    if (!s->text) {
        session_error(s, c, IC_UNAVAILABLE, "this server has no text model");
        return;
    }
    if (sessions_of_client(s, c) >= c->sessions_max) {
        session_error(s, c, IC_BUSY, "Failed to create session (limit reached)");
        return;
    }
    grown = realloc(c->sessions, sizeof *grown * (size_t)(c->n_sessions + 1));
    if (grown)
        c->sessions = grown;
    if (!grown || getrandom(raw, sizeof raw, 0) != sizeof raw) {
        session_error(s, c, IC_OOM, "Failed to create session");
        return;
    }
    struct session *se = &grown[c->n_sessions++];
    se->handle = ++s->last_session;
    strcpy(se->id, "sess_");
    for (int i = 0; i < 16; i++)
        snprintf(se->id + 5 + 2 * i, 3, "%02x", raw[i]);
    ic_json_kstr(ic_reply(s, "session_created"), "session_id", se->id);
    ic_conn_send(s, c, 0);
}

/* The session a message names. False after an error has been sent. */
static bool find_session(struct ic_server *s, struct conn *c, const struct msg *m, struct session **out)
{
    const char *id = NULL;
    struct ic_err err = {0};

    *out = NULL;
    if (ic_field_str(holder(m, "session_id"), "session_id", IC_ID_MAX, &id, &err) == IC_OK) {
        if (!id || (*out = session_named(c, id)))
            return true;
        ic_fail(&err, IC_NOT_FOUND, "Session not found or access denied");
    }
    fail(s, c, m, &err);
    return false;
}

static void op_close_session(struct ic_server *s, struct conn *c, const struct msg *m)
{
    struct session *se;
    struct ic_err err = {0};
    char id[IC_SESSION_ID_LEN + 1];

    if (!authed(s, c, m) || !find_session(s, c, m, &se))
        return;
    if (!se) {
        ic_fail(&err, IC_BAD_REQUEST, "Missing session_id");
        fail(s, c, m, &err);
        return;
    }
    memcpy(id, se->id, sizeof id);
    for (int i = 0; c->streams && i < s->cfg.requests_max; i++)
        if (c->streams[i].req && c->streams[i].session == se->handle)
            c->streams[i].silenced = true; /* its end follows, no token */
    ic_text_engine_session_close(s->text, se->handle);
    *se = c->sessions[--c->n_sessions];
    ic_json_kstr(ic_reply(s, "session_closed"), "session_id", id);
    ic_conn_send(s, c, 0);
}

/* ---- infer, abort ------------------------------------------------------------------------------------------ */

static struct stream *stream_named(const struct ic_server *s, const struct conn *c, const char *id)
{
    for (int i = 0; c->streams && i < s->cfg.requests_max; i++)
        if (c->streams[i].req && !strcmp(c->streams[i].id, id))
            return &c->streams[i];
    return NULL;
}

static struct stream *free_stream(struct ic_server *s, struct conn *c, struct ic_err *err)
{
    if (!c->streams && !(c->streams = calloc((size_t)s->cfg.requests_max, sizeof *c->streams))) {
        ic_fail(err, IC_OOM, "out of memory");
        return NULL;
    }
    for (int i = 0; i < s->cfg.requests_max; i++)
        if (!c->streams[i].req)
            return &c->streams[i];
    ic_fail(err, IC_BUSY, "this connection has %d requests under way already", s->cfg.requests_max);
    return NULL;
}

static enum ic_status parse_priority(const json_t *o, enum ic_priority *out, struct ic_err *err)
{
    static const char *const names[] = {"low", "normal", "high"};
    const char *v = NULL;
    enum ic_status st = ic_field_str(o, "priority", 16, &v, err);

    if (st != IC_OK || !v)
        return st;
    for (int i = 0; i < 3; i++)
        if (!strcmp(v, names[i])) {
            *out = (enum ic_priority)i;
            return IC_OK;
        }
    return ic_fail(err, IC_BAD_REQUEST, "priority must be low, normal or high");
}

static enum ic_status parse_prompt(const struct msg *m, struct ic_text_req *req, struct ic_err *err)
{
    const json_t *prompt = field(m, "prompt"), *messages = field(m, "messages");
    bool has_prompt = prompt && !json_is_null(prompt), has_messages = messages && !json_is_null(messages);

    if (has_prompt == has_messages)
        return ic_fail(err, IC_BAD_REQUEST,
                       has_prompt ? "prompt and messages exclude each other"
                                  : "Missing prompt or messages");
    if (has_messages)
        return ic_parse_messages(messages, req, err);
    if (!json_is_string(prompt))
        return ic_fail(err, IC_BAD_REQUEST, "prompt must be a string");
    req->prompt_len = json_string_length(prompt);
    if (!req->prompt_len)
        return ic_fail(err, IC_BAD_REQUEST, "the prompt is empty");
    req->prompt = strdup(json_string_value(prompt));
    return req->prompt ? IC_OK : ic_fail(err, IC_OOM, "out of memory");
}

static enum ic_status parse_infer(const struct msg *m, struct ic_text_req *req, struct ic_err *err)
{
    const json_t *params = field(m, "params");
    double deadline_ms = 0;
    enum ic_status st = parse_prompt(m, req, err);

    if (st == IC_OK && params && !json_is_null(params))
        st = json_is_object(params) ? ic_parse_params(params, &req->params, err)
                                    : ic_fail(err, IC_BAD_REQUEST, "params must be an object");
    if (st == IC_OK)
        st = parse_priority(holder(m, "priority"), &req->priority, err);
    if (st == IC_OK)
        st =
            ic_field_num(holder(m, "deadline_ms"), "deadline_ms", 1, IC_DEADLINE_MS_MAX, &deadline_ms, err);
    if (st == IC_OK)
        st = ic_parse_salt(holder(m, "cache_salt"), req, err);
    if (deadline_ms > 0)
        req->deadline_ns = req->arrival_ns + (int64_t)(deadline_ms * IC_MS);
    return st;
}

static void op_infer(struct ic_server *s, struct conn *c, const struct msg *m)
{
    struct ic_err err = {0};
    struct session *se = NULL;
    struct stream *st;
    struct ic_text_req *req = NULL;

    if (!authed(s, c, m) || !find_session(s, c, m, &se))
        return;
    if (!s->text)
        ic_fail(&err, IC_UNAVAILABLE, "this server has no text model");
    else if (s->draining)
        ic_fail(&err, IC_UNAVAILABLE, "the server is shutting down");
    else if (m->id[0] && stream_named(s, c, m->id))
        ic_fail(&err, IC_BAD_REQUEST, "a request with this id is under way");
    else if (!(req = ic_text_req_new()))
        ic_fail(&err, IC_OOM, "out of memory");
    if (err.code != IC_OK || !(st = free_stream(s, c, &err)) || parse_infer(m, req, &err) != IC_OK)
        goto refused;
    req->owner = ic_owner_of(c->peer);
    req->client = ic_client_of(s, c->peer, c->client_id);
    req->session = se ? se->handle : 0;
    if (ic_text_engine_submit(s->text, ic_text_req_ref(req), &err) != IC_OK) {
        ic_text_req_unref(req);
        goto refused;
    }
    st->req = req;
    st->session = req->session;
    if (se)
        strcpy(st->session_id, se->id);
    if (m->id[0])
        strcpy(st->id, m->id);
    else
        do
            snprintf(st->id, sizeof st->id, "r%llu", (unsigned long long)++c->ids_given);
        while (stream_named(s, c, st->id) != st);
    c->n_streams++;
    s->active++;
    return;
refused:
    ic_text_req_unref(req);
    fail(s, c, m, &err);
}

static void op_abort(struct ic_server *s, struct conn *c, const struct msg *m)
{
    const char *session = NULL;
    struct ic_err err = {0};
    bool any = false,
         named = json_is_string(field(m, "id")); /* "" names a request that is not there, not all of them */

    if (!authed(s, c, m))
        return;
    if (ic_field_str(holder(m, "session_id"), "session_id", IC_ID_MAX, &session, &err) != IC_OK) {
        fail(s, c, m, &err);
        return;
    }
    struct session *se = session ? session_named(c, session) : NULL;
    for (int i = 0; c->streams && i < s->cfg.requests_max; i++) {
        struct stream *st = &c->streams[i];
        enum ic_cancel none = IC_CANCEL_NONE;
        if (!st->req || (named && strcmp(m->id, st->id) != 0) ||
            (session && (!se || st->session != se->handle)))
            continue;
        atomic_compare_exchange_strong(&st->req->cancel, &none, IC_CANCEL_ABORT);
        st->silenced = any = true;
    }
    if (any)
        ic_text_engine_kick(s->text);
    struct ic_buf *b = ic_reply(s, "abort");
    if (named)
        ic_json_kstr(b, "id", m->id);
    if (session)
        ic_json_kstr(b, "session_id", session);
    ic_json_kstr(b, "status", any ? "aborted" : "not_found");
    ic_conn_send(s, c, 0);
}

/* ---- metrics ------------------------------------------------------------------------------------------------ */

static void op_subscribe(struct ic_server *s, struct conn *c, const struct msg *m)
{
    if (!authed(s, c, m))
        return;
    c->metrics = true;
    ic_json_kstr(ic_reply(s, "metrics_subscribed"), "message", "Subscribed to metrics updates");
    ic_conn_send(s, c, 0);
}

static void op_unsubscribe(struct ic_server *s, struct conn *c, const struct msg *m)
{
    if (!authed(s, c, m))
        return;
    c->metrics = false;
    ic_json_kstr(ic_reply(s, "metrics_unsubscribed"), "message", "Unsubscribed from metrics updates");
    ic_conn_send(s, c, 0);
}

static void put_metrics(struct ic_server *s, struct ic_buf *b)
{
    struct ic_text_counters *t = s->text ? ic_text_engine_counters(s->text) : NULL;

    ic_json_kint(b, "timestamp", (int64_t)ic_wall_s());
    ic_status_put_hw(s, b);
    ic_json_key(b, "inference");
    ic_buf_puts(b, "{");
    if (t) {
        int sessions = 0;
        for (unsigned i = 0; i < s->cfg.connections_max; i++)
            sessions += s->conns[i] ? s->conns[i]->n_sessions : 0;
        ic_json_kint(b, "active_generations", t->running);
        ic_json_kint(b, "queued", t->waiting);
        ic_json_kint(b, "total_sessions", sessions);
        ic_json_knum(b, "last_tps", t->last_tps);
        ic_json_kint(b, "last_ttft_ms", (int64_t)(t->last_ttft_ms + 0.5));
        ic_json_kint(b, "total_tokens_generated", (int64_t)t->tokens);
        ic_json_kint(b, "kv_tokens_used", t->kv_used);
    }
    ic_buf_puts(b, "}");
}

void ic_native_metrics(struct ic_server *s)
{
    bool any = false;

    for (unsigned i = 0; i < s->cfg.connections_max; i++) {
        struct conn *c = s->conns[i];
        if (c && c->metrics && !c->doomed) {
            put_metrics(s, ic_reply(s, "metrics"));
            ic_conn_send(s, c, 0);
            any = true;
        }
    }
    if (s->monitor)
        ic_monitor_watch(s->monitor, any);
}

/* ---- dispatch ------------------------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    void (*run)(struct ic_server *, struct conn *, const struct msg *);
} ops[] = {
    {"hello", op_hello},
    {"ping", op_hello},
    {"auth", op_auth},
    {"infer", op_infer},
    {"generate", op_infer},
    {"abort", op_abort},
    {"create_session", op_create_session},
    {"close_session", op_close_session},
    {"subscribe_metrics", op_subscribe},
    {"unsubscribe_metrics", op_unsubscribe},
};

void ic_native_message(struct ic_server *s, struct conn *c, const char *data, size_t len)
{
    struct ic_err err = {0};
    struct msg m = {.top = ic_json_object(data, len, &err)};
    const char *op, *id = NULL;

    if (!m.top) {
        fail(s, c, &m, &err);
        return;
    }
    m.payload = json_object_get(m.top, "payload");
    if (!json_is_object(m.payload))
        m.payload = NULL;
    if (ic_field_str(holder(&m, "id"), "id", IC_ID_MAX, &id, &err) != IC_OK) {
        fail(s, c, &m, &err);
        goto out;
    }
    if (id)
        strcpy(m.id, id);
    op = json_string_value(json_object_get(m.top, "op"));
    if (!op) {
        ic_fail(&err, IC_BAD_REQUEST, "Missing 'op' field");
        fail(s, c, &m, &err);
        goto out;
    }
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++)
        if (!strcasecmp(op, ops[i].name)) {
            ops[i].run(s, c, &m);
            goto out;
        }
    if (ic_sim_message(s, c, op, m.top, m.payload, m.id))
        goto out;
    ic_fail(&err, IC_BAD_REQUEST, "Unknown operation: %.64s", op);
    fail(s, c, &m, &err);
out:
    json_decref(m.top);
}

/* ---- events ------------------------------------------------------------------------------------------------------ */

static struct ic_buf *stream_reply(struct ic_server *s, const struct stream *st, const char *op)
{
    struct ic_buf *b = ic_reply(s, op);

    ic_json_kstr(b, "id", st->id);
    if (*st->session_id)
        ic_json_kstr(b, "session_id", st->session_id);
    return b;
}

static void put_token(struct ic_buf *b, const struct ic_event *ev)
{
    ic_json_key(b, "content");
    ic_json_str(b, ev->text, ev->len);
    ic_json_kint(b, "index", ev->index);
    ic_json_knum(b, "prob", (double)ev->prob);
    if (ev->n_top == 0)
        return;
    ic_json_key(b, "logprobs");
    ic_buf_puts(b, "[");
    for (int32_t i = 0; i < ev->n_top; i++) {
        ic_buf_puts(b, i ? ",{" : "{");
        ic_json_key(b, "token");
        ic_json_str(b, ev->text + ev->top[i].off, ev->top[i].len);
        ic_json_knum(b, "logprob", (double)ev->top[i].logprob);
        ic_buf_puts(b, "}");
    }
    ic_buf_puts(b, "]");
}

static double ms(double v) /* three digits behind the point are enough */
{
    return round(v * 1000) / 1000;
}

static void put_end(struct ic_buf *b, const struct ic_event *ev)
{
    const struct ic_text_stats *t = &ev->stats;

    ic_json_kstr(b, "reason", ic_end_name(ev->reason));
    ic_json_key(b, "stats");
    ic_buf_puts(b, "{");
    ic_json_knum(b, "ms", ms(t->total_ms));
    ic_json_knum(b, "total_ms", ms(t->total_ms));
    ic_json_knum(b, "ttft_ms", ms(t->ttft_ms));
    ic_json_knum(b, "queue_ms", ms(t->queue_ms));
    ic_json_kint(b, "prompt_tokens", t->prompt_tokens);
    ic_json_kint(b, "cached_tokens", t->cached_tokens);
    ic_json_kint(b, "tokens", t->tokens);
    ic_json_knum(b, "tps", ms(t->tps));
    ic_buf_puts(b, "}");
}

void ic_native_event(struct ic_server *s, struct conn *c, struct stream *st, const struct ic_event *ev)
{
    struct ic_err err = {0};

    if (c->doomed)
        return;
    switch (ev->kind) {
    case IC_EVENT_QUEUED:
        ic_json_kint(stream_reply(s, st, "queued"), "position", ev->index);
        ic_conn_send(s, c, 0);
        break;
    case IC_EVENT_TOKEN:
        if (st->silenced)
            break;
        put_token(stream_reply(s, st, "token"), ev);
        ic_conn_send(s, c, ev->stamp_ns);
        break;
    case IC_EVENT_ERROR:
        ic_fail(&err, ev->code, "%s", ev->text);
        ic_conn_error(s, c, st->id, *st->session_id ? st->session_id : NULL, &err);
        break;
    default: /* END */
        put_end(stream_reply(s, st, "end"), ev);
        ic_conn_send(s, c, 0);
        break;
    }
}
