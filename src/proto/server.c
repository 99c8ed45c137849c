/* Connections: their life, their requests, their events. The messages themselves are native.c's. */
#include "base/clock.h"
#include "base/log.h"
#include "proto/internal.h"

#include <stdalign.h>
#include <stdlib.h>
#include <string.h>

#define ERROR_RESERVE 4096 /* bytes of an outbox kept free for telling its owner that it is full */

uint64_t ic_owner_of(const struct ic_peer *p)
{
    return (uint64_t)p->id.slot << 32 | p->id.gen;
}

uint64_t ic_client_of(const struct ic_server *s, const struct ic_peer *p, const char *client_id)
{
    uint64_t h = 14695981039346656037u; /* FNV-1a; the ids are the operator's */

    if (!s->cfg.keys || !client_id || !*client_id)
        return ic_owner_of(p);
    for (; *client_id; client_id++)
        h = (h ^ (unsigned char)*client_id) * 1099511628211u;
    return h;
}

static struct conn *conn_of(const struct ic_server *s, uint64_t owner)
{
    uint32_t slot = (uint32_t)(owner >> 32);
    struct conn *c = slot < s->cfg.connections_max ? s->conns[slot] : NULL;
    return c && c->peer->id.gen == (uint32_t)owner ? c : NULL;
}

enum ic_status ic_server_open(struct ic_server **out, const struct ic_server_config *cfg,
                              struct ic_events *events, struct ic_err *err)
{
    struct ic_server *s = calloc(1, sizeof *s);

    *out = NULL;
    if (s) {
        s->conns = calloc(cfg->connections_max, sizeof *s->conns);
        s->waiting = calloc(cfg->connections_max, sizeof *s->waiting);
    }
    if (!s || !s->conns || !s->waiting) {
        ic_server_close(&s);
        return ic_fail(err, IC_OOM, "out of memory");
    }
    s->cfg = *cfg;
    s->events = events;
    s->start_ns = ic_now_ns();
    s->start_wall_s = (int64_t)ic_wall_s();
    *out = s;
    return IC_OK;
}

void ic_server_close(struct ic_server **sp)
{
    if (*sp) {
        ic_buf_deinit(&(*sp)->out);
        free((*sp)->conns);
        free((*sp)->waiting);
        free(*sp);
        *sp = NULL;
    }
}

void ic_server_set_engines(struct ic_server *s, struct ic_text_engine *text, struct ic_law_engine *law)
{
    s->text = text;
    s->law = law;
}

void ic_server_set_hooks(struct ic_server *s, const struct ic_server_hooks *hooks)
{
    s->hooks = *hooks;
}

void ic_server_drain(struct ic_server *s)
{
    s->draining = true;
}

int ic_server_active(const struct ic_server *s)
{
    return s->active;
}

/* The first reason stays. */
static void cancel(struct ic_text_req *r, enum ic_cancel why)
{
    enum ic_cancel none = IC_CANCEL_NONE;
    atomic_compare_exchange_strong(&r->cancel, &none, why);
}

void ic_server_cancel_all(struct ic_server *s)
{
    for (unsigned i = 0; i < s->cfg.connections_max; i++) {
        struct http_job *job = s->waiting[i] ? s->waiting[i]->app : NULL;
        for (int k = 0; s->conns[i] && s->conns[i]->streams && k < s->cfg.requests_max; k++)
            if (s->conns[i]->streams[k].req)
                cancel(s->conns[i]->streams[k].req, IC_CANCEL_SHUTDOWN);
        if (job && job->req)
            cancel(job->req, IC_CANCEL_SHUTDOWN);
        for (int k = 0; job && k < job->n_more; k++)
            if (job->more[k])
                cancel(job->more[k], IC_CANCEL_SHUTDOWN);
    }
    if (s->text)
        ic_text_engine_kick(s->text);
}

/* ---- sending -------------------------------------------------------------------------------------------- */

struct ic_buf *ic_reply(struct ic_server *s, const char *op)
{
    ic_buf_clear(&s->out);
    ic_buf_puts(&s->out, "{\"op\":\"");
    ic_buf_puts(&s->out, op);
    ic_buf_puts(&s->out, "\"");
    return &s->out;
}

static void cancel_streams(struct ic_server *s, struct conn *c, enum ic_cancel why)
{
    bool any = false;

    for (int i = 0; c->streams && i < s->cfg.requests_max; i++) {
        struct stream *st = &c->streams[i];
        enum ic_cancel none = IC_CANCEL_NONE;
        if (!st->req)
            continue;
        if (!atomic_compare_exchange_strong(&st->req->cancel, &none, why) && why == IC_CANCEL_GONE)
            atomic_store(&st->req->cancel, why);
        any = true;
        if (why == IC_CANCEL_GONE)
            ic_stream_free(s, c, st);
    }
    if (any && s->text)
        ic_text_engine_kick(s->text);
}

static void doom(struct ic_server *s, struct conn *c)
{
    struct ic_err err = {0};

    c->doomed = true;
    s->slow_closed++;
    ic_fail(&err, IC_BUSY, "this connection reads too slowly: its outbox of %zu bytes is full",
            s->cfg.outbox_max);
    for (int i = 0; c->streams && i < s->cfg.requests_max; i++)
        if (c->streams[i].req)
            ic_conn_error(s, c, c->streams[i].id, NULL, &err);
    cancel_streams(s, c, IC_CANCEL_GONE);
    c->peer->vt->close(c->peer, 1013, "reading too slowly");
}

void ic_conn_break_off(struct ic_server *s, struct conn *c)
{
    if (c->doomed)
        return;
    c->doomed = true;
    cancel_streams(s, c, IC_CANCEL_GONE);
    c->peer->vt->close(c->peer, 1011, "out of memory");
}

void ic_conn_send(struct ic_server *s, struct conn *c, int64_t stamp_ns)
{
    struct ic_peer *p = c->peer;

    ic_buf_puts(&s->out, "}");
    if (s->out.failed) {
        ic_error("proto", "a message could not be built: out of memory");
        ic_conn_break_off(s, c);
        return;
    }
    if (!c->doomed && p->vt->pending(p) + s->out.len + ERROR_RESERVE > s->cfg.outbox_max) {
        doom(s, c);
        return;
    }
    if (p->vt->send(p, IC_MSG_TEXT, s->out.data, s->out.len, stamp_ns) == IC_OOM)
        ic_conn_break_off(s, c);
}

void ic_conn_error_about(struct ic_server *s, struct conn *c, const char *id, const char *key,
                         const char *what, const struct ic_err *err)
{
    struct ic_buf *b = ic_reply(s, "error");

    s->errors++;
    ic_log_about(&(struct ic_log_ids){.owner = ic_owner_of(c->peer), .id = id}, IC_LOG_DEBUG, "request",
                 "told: %s", ic_status_name(err->code)); /* the text may quote the client */
    if (id)
        ic_json_kstr(b, "id", id);
    if (what)
        ic_json_kstr(b, key, what);
    ic_json_kstr(b, "code", ic_status_name(err->code));
    ic_json_kstr(b, "message", err->msg);
    ic_json_kstr(b, "error", err->msg);
    ic_conn_send(s, c, 0);
}

void ic_conn_error(struct ic_server *s, struct conn *c, const char *id, const char *session,
                   const struct ic_err *err)
{
    ic_conn_error_about(s, c, id, "session_id", session, err);
}

void ic_stream_free(struct ic_server *s, struct conn *c, struct stream *st)
{
    ic_text_req_unref(st->req);
    *st = (struct stream){0};
    c->n_streams--;
    s->active--;
}

/* ---- what the network calls -------------------------------------------------------------------------------- */

/* Credentials in the handshake's headers. Returns false when there are none. */
static bool header_credentials(struct ic_peer *p, const char **id, const char **key)
{
    const char *bearer = p->vt->header(p, "authorization");

    *id = p->vt->header(p, "x-client-id");
    *key = p->vt->header(p, "x-api-key");
    if (!**key && !strncasecmp(bearer, "Bearer ", 7))
        *key = bearer + 7;
    return **key != 0;
}

static enum ic_status on_handshake(void *app, struct ic_peer *p, struct ic_err *err)
{
    struct ic_server *s = app;
    const char *id, *key;

    if (s->cfg.keys && header_credentials(p, &id, &key) && !ic_keys_check(s->cfg.keys, id, key))
        return ic_fail(err, IC_UNAUTHORIZED, "Invalid credentials");
    return IC_OK;
}

static void on_open(void *app, struct ic_peer *p)
{
    struct ic_server *s = app;
    struct conn *c = calloc(1, sizeof *c);
    const char *id, *key;

    s->ws_total++;
    if (!c) {
        p->vt->close(p, 1011, "out of memory");
        return;
    }
    IC_ASSERT(p->id.slot < s->cfg.connections_max && !s->conns[p->id.slot]);
    c->peer = p;
    ic_log_about(&(struct ic_log_ids){.owner = ic_owner_of(p)}, IC_LOG_DEBUG, "proto", "connected");
    c->sessions_max = s->cfg.sessions_max;
    c->authed = !s->cfg.keys;
    p->app = c;
    s->conns[p->id.slot] = c;
    bool shown = header_credentials(p, &id, &key);
    if (!strcmp(p->path, "/ws")) {
        if (s->cfg.keys && !shown)
            p->vt->close(p, 1008, "credentials are missing");
        else if (!ic_atheria_open(s, c))
            p->vt->close(p, 1011, "out of memory");
        else
            ic_status_hello(s, c);
        return;
    }
    if (shown) {
        const struct ic_client *cl = s->cfg.keys ? ic_keys_check(s->cfg.keys, id, key) : NULL;
        c->authed = true; /* on_handshake has refused wrong ones */
        snprintf(c->client_id, sizeof c->client_id, "%s", cl ? cl->id : id);
        if (cl && cl->max_sessions)
            c->sessions_max = cl->max_sessions;
        ic_native_auth_success(s, c);
    }
    ic_native_hello(s, c);
    ic_status_hello(s, c);
}

static void on_message(void *app, struct ic_peer *p, const char *data, size_t len, bool binary)
{
    struct ic_server *s = app;

    struct conn *c = p->app;

    s->messages++;
    if (c && c->dialect == DIALECT_ATHERIA && !c->doomed && c->atheria)
        ic_atheria_message(s, c, data, len);
    if (!c || c->doomed || c->dialect == DIALECT_ATHERIA || (binary && ic_sim_binary(s, c, data, len)))
        return;
    ic_native_message(s, c, data, len); /* binary too: InferenceCenter took both alike */
}

static void on_refused(void *app, struct ic_peer *p, const struct ic_err *err, bool binary)
{
    /* in both dialects: Atheria's client ignores what it does not know */
    if (p->app && !(binary && ic_sim_binary_refused(app, p->app, err)))
        ic_conn_error(app, p->app, NULL, NULL, err);
}

void ic_http_wait(struct ic_server *s, struct ic_peer *p, struct http_job *job)
{
    p->app = job;
    s->waiting[p->id.slot] = p;
    s->active++;
}

void ic_http_waited(struct ic_server *s, struct ic_peer *p)
{
    if (s->waiting[p->id.slot] == p) {
        s->waiting[p->id.slot] = NULL;
        s->active--;
    }
}

static bool drop_request(struct ic_text_req *req)
{
    if (!req)
        return false;
    atomic_store(&req->cancel, IC_CANCEL_GONE);
    ic_text_req_unref(req);
    return true;
}

static void close_job(struct ic_server *s, struct ic_peer *p)
{
    struct http_job *job = p->app;

    ic_http_waited(s, p);
    bool any = drop_request(job->req);
    for (int i = 0; i < job->n_more; i++)
        any |= drop_request(job->more[i]);
    if (any && s->text)
        ic_text_engine_kick(s->text);
    job->free(job);
    p->app = NULL;
}

static void on_close(void *app, struct ic_peer *p)
{
    struct ic_server *s = app;
    struct conn *c = p->app;

    if (p->kind == IC_PEER_HTTP && p->app)
        close_job(s, p);
    if (p->kind != IC_PEER_WS || !c)
        return;
    ic_log_about(&(struct ic_log_ids){.owner = ic_owner_of(p)}, IC_LOG_DEBUG, "proto",
                 "gone, with %d requests under way", c->n_streams);
    ic_sim_conn_closed(s, c);
    cancel_streams(s, c, IC_CANCEL_GONE);
    for (int i = 0; s->text && i < c->n_sessions; i++)
        ic_text_engine_session_close(s->text, c->sessions[i].handle);
    s->conns[p->id.slot] = NULL;
    p->app = NULL;
    free(c->atheria);
    free(c->sessions);
    free(c->streams);
    free(c);
}

static void on_http(void *app, struct ic_peer *p, const struct ic_http_req *req)
{
    struct ic_server *s = app;
    s->http_total++;
    ic_http_request(s, p, req);
}

static struct stream *stream_of(const struct ic_server *s, struct conn *c, uint64_t rid)
{
    for (int i = 0; c->streams && i < s->cfg.requests_max; i++)
        if (c->streams[i].req && c->streams[i].req->rid == rid)
            return &c->streams[i];
    return NULL;
}

static void route_text(struct ic_server *s, struct conn *c, const struct ic_event *ev)
{
    struct stream *st = stream_of(s, c, ev->rid);

    if (!st)
        return;
    ic_native_event(s, c, st, ev);
    /* the event may have doomed the connection, which frees its streams */
    if ((ev->kind == IC_EVENT_END || (ev->kind == IC_EVENT_ERROR && !ev->more)) && st->req &&
        st->req->rid == ev->rid)
        ic_stream_free(s, c, st);
}

/* How a request ended. What failed for reasons of ours is told in full; other texts may quote what a client sent. */
static void log_end(const struct ic_server *s, struct conn *c, const struct ic_event *ev)
{
    struct stream *st = c ? stream_of(s, c, ev->rid) : NULL;
    struct ic_log_ids ids = {.rid = ev->rid, .owner = ev->owner, .id = st ? st->id : NULL};
    bool ours = ev->code == IC_INTERNAL || ev->code == IC_OOM;
    const struct ic_text_stats *t = &ev->stats;

    if (ev->kind == IC_EVENT_ERROR)
        ic_log_about(&ids, ours ? IC_LOG_ERROR : IC_LOG_INFO, "request", "error %s%s%s",
                     ic_status_name(ev->code), ours ? ": " : "", ours ? ev->text : "");
    else if (ev->kind == IC_EVENT_END)
        ic_log_about(&ids, IC_LOG_INFO, "request",
                     "%s: %d tokens for a prompt of %d (%d known), %.1f ms, the first after %.1f",
                     ic_end_name(ev->reason), t->tokens, t->prompt_tokens, t->cached_tokens, t->total_ms,
                     t->ttft_ms);
    if (ev->kind != IC_EVENT_SIM_CREATED && ev->kind != IC_EVENT_SIM_CLOSED)
        return;
    ids.sim = ev->sim.sim;
    if (ev->kind == IC_EVENT_SIM_CREATED)
        ic_log_about(&ids, IC_LOG_INFO, "request", "simulation of law %u on %u x %u", ev->sim.law,
                     ev->sim.height, ev->sim.width);
    else
        ic_log_about(&ids, IC_LOG_INFO, "request", "simulation closed after %lld steps",
                     (long long)ev->sim.step);
}

static bool is_of_job(const struct http_job *job, uint64_t rid)
{
    if (job->rid == rid)
        return true;
    for (int i = 0; i < job->n_more; i++)
        if (job->more[i] && job->more[i]->rid == rid)
            return true;
    return false;
}

static void route(struct ic_server *s, struct ic_event *ev)
{
    uint32_t slot = (uint32_t)(ev->owner >> 32);
    struct conn *c = conn_of(s, ev->owner);
    struct ic_peer *p = slot < s->cfg.connections_max ? s->waiting[slot] : NULL;

    log_end(s, c, ev);
    if (c && (ev->kind <= IC_EVENT_END || (ev->kind == IC_EVENT_ERROR && stream_of(s, c, ev->rid))))
        route_text(s, c, ev);
    else if (c)
        ic_sim_event(s, c, ev);
    else if (p && p->id.gen == (uint32_t)ev->owner && is_of_job(p->app, ev->rid))
        ((struct http_job *)p->app)->event(s, p, ev);
}

/* What could not be told is told as an error, made without memory. */
static void route_lost(struct ic_server *s)
{
    static const char text[] = "out of memory";
    struct ic_lost lost[IC_EVENTS_LOST_MAX];
    alignas(struct ic_event) char room[sizeof(struct ic_event) + sizeof text];
    struct ic_event *ev = (struct ic_event *)room;

    for (unsigned i = 0, n = ic_events_take_lost(s->events, lost); i < n; i++) {
        *ev = (struct ic_event){.owner = lost[i].owner, .rid = lost[i].rid, .kind = IC_EVENT_ERROR};
        ev->code = IC_OOM;
        ev->more = lost[i].more;
        ev->sim.sim = lost[i].sim;
        ev->len = sizeof text - 1;
        memcpy(ev->text, text, sizeof text);
        route(s, ev);
        if (!lost[i].more)
            continue;
        *ev = (struct ic_event){.owner = lost[i].owner, .rid = lost[i].rid, .kind = IC_EVENT_END};
        ev->reason = IC_END_ERROR;
        route(s, ev);
    }
}

static void on_wake(void *app)
{
    struct ic_server *s = app;

    for (struct ic_event *ev = ic_events_take(s->events), *next; ev; ev = next) {
        next = ev->next;
        route(s, ev);
        ic_event_free(ev);
    }
    route_lost(s);
    ic_status_tick(s);
    if (s->hooks.woken)
        s->hooks.woken(s->hooks.arg);
}

static bool on_turn(void *app)
{
    struct ic_server *s = app;
    bool rest;

    for (struct ic_event *ev = ic_events_take_tokens(s->events, &rest), *next; ev; ev = next) {
        next = ev->next;
        route(s, ev);
        ic_event_free(ev);
    }
    return !rest;
}

static void on_settled(void *app)
{
    struct ic_server *s = app;
    ic_events_written(s->events);
}

static void on_tick(void *app)
{
    struct ic_server *s = app;
    int64_t now = ic_now_ns();

    if (now - s->last_metrics_ns >= 900 * IC_MS) { /* ticks come once a second, give or take */
        s->last_metrics_ns = now;
        ic_native_metrics(s);
    }
    ic_status_tick(s); /* a driver that hangs wakes nobody */
    if (s->hooks.ticked)
        s->hooks.ticked(s->hooks.arg);
}

static void on_written(void *app, int64_t ns)
{
    struct ic_server *s = app;
    ic_hist_add(&s->write, ns);
}

const struct ic_peer_app ic_server_app = {
    .on_handshake = on_handshake,
    .on_open = on_open,
    .on_message = on_message,
    .on_refused = on_refused,
    .on_close = on_close,
    .on_http = on_http,
    .on_wake = on_wake,
    .on_turn = on_turn,
    .on_settled = on_settled,
    .on_tick = on_tick,
    .on_written = on_written,
};
