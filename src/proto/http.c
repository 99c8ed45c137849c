/* The HTTP side: health, readiness, metrics, models. */
#include "proto/internal.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "base/clock.h"
#include "ops/metrics.h"

#define MODEL_PATH "/v1/models/"

static void reply_json(struct ic_peer *p, int status, const char *extra, struct ic_buf *b)
{
    if (b->failed)
        p->vt->reply(p, 500, NULL, NULL, NULL, 0);
    else
        p->vt->reply(p, status, "application/json", extra, b->data, b->len);
}

/* OpenAI's form of an error. Clients repeat what they are told to: Retry-After, wherever it may help. */
void ic_http_error(struct ic_server *s, struct ic_peer *p, int status, enum ic_status code,
                   const char *text, const char *extra)
{
    struct ic_buf *b = &s->out;

    if (code == IC_BUSY || code == IC_UNAVAILABLE)
        extra = "Retry-After: 1\r\n";
    ic_buf_clear(b);
    ic_buf_puts(b, "{\"error\":{");
    ic_json_kstr(b, "code", ic_status_name(code));
    ic_json_kstr(b, "message", text);
    ic_json_kstr(b, "type", status >= 500 ? "server_error" : "invalid_request_error");
    ic_json_kstr(b, "param", NULL);
    ic_buf_puts(b, "}}");
    reply_json(p, status, extra, b);
}

/* Why the server cannot take work now; NULL: it can. */
static const char *not_ready(const struct ic_server *s)
{
    if (s->draining)
        return "draining";
    if (s->law && ic_law_engine_state(s->law) != IC_ENGINE_READY)
        return ic_law_engine_state(s->law) == IC_ENGINE_LOADING ? "the laws are being loaded"
                                                                : "the laws could not be loaded";
    if (ic_status_not_ready(s))
        return ic_status_not_ready(s);
    if (!s->text)
        return NULL;
    switch (ic_text_engine_state(s->text)) {
    case IC_ENGINE_READY: break;
    case IC_ENGINE_LOADING: return "the model is being loaded";
    case IC_ENGINE_FAILED: return "the model could not be loaded";
    default: return "draining";
    }
    return atomic_load(&ic_text_engine_counters(s->text)->waiting) >= s->cfg.queue_max ? "the queue is full"
                                                                                       : NULL;
}

static const char *not_healthy(const struct ic_server *s)
{
    int64_t beat = s->text ? ic_text_engine_beat(s->text) : 0,
            law_beat = s->law ? ic_law_engine_beat(s->law) : 0;
    int64_t limit = ic_now_ns() - s->cfg.stall_s * 1000 * IC_MS;

    if (s->text && ic_text_engine_state(s->text) == IC_ENGINE_FAILED)
        return "the text engine has failed";
    if (s->law && ic_law_engine_state(s->law) == IC_ENGINE_FAILED)
        return "the Law M engine has failed";
    if (beat && beat < limit)
        return "the text engine has stopped moving";
    if (law_beat && law_beat < limit)
        return "the Law M engine has stopped moving";
    return NULL;
}

static void reply_state(struct ic_server *s, struct ic_peer *p, const char *good, const char *why)
{
    struct ic_buf *b = &s->out;

    ic_buf_clear(b);
    ic_buf_puts(b, "{");
    ic_json_kstr(b, "status", why ? "unavailable" : good);
    if (why)
        ic_json_kstr(b, "reason", why);
    ic_json_kint(b, "uptime_seconds", (ic_now_ns() - s->start_ns) / (1000 * IC_MS));
    ic_buf_puts(b, "}");
    reply_json(p, why ? 503 : 200, why ? "Retry-After: 1\r\n" : NULL, b);
}

static void get_health(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r)
{
    (void)r;
    reply_state(s, p, "ok", not_healthy(s));
}

static void get_ready(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r)
{
    (void)r;
    reply_state(s, p, "ready", not_ready(s));
}

static void put_metrics(struct ic_server *s, struct ic_buf *b)
{
    unsigned open = 0;

    for (unsigned i = 0; i < s->cfg.connections_max; i++)
        open += s->conns[i] != NULL;
    ic_prom_value(b, "ic_ready", "gauge", "1 when new work is taken", not_ready(s) ? 0 : 1);
    ic_prom_value(b, "ic_ws_connections", "gauge", "WebSocket clients", open);
    ic_prom_value(b, "ic_ws_connections_total", "counter", "WebSocket clients so far", (double)s->ws_total);
    ic_prom_value(b, "ic_ws_messages_total", "counter", "WebSocket messages received", (double)s->messages);
    ic_prom_value(b, "ic_http_requests_total", "counter", "HTTP requests", (double)s->http_total);
    ic_prom_value(b, "ic_errors_total", "counter", "error messages sent", (double)s->errors);
    ic_prom_value(b, "ic_slow_clients_closed_total", "counter",
                  "Clients closed because they read too slowly", (double)s->slow_closed);
    ic_prom_hist(b, "ic_token_write_seconds",
                 "From sampling a token to its bytes being given to the socket", &s->write);
    if (s->text)
        ic_prom_text(b, ic_text_engine_counters(s->text));
    if (s->law)
        ic_prom_law(b, ic_law_engine_counters(s->law));
    ic_prom_engines(b, s->text ? ic_text_engine_health(s->text) : NULL,
                    s->law ? ic_law_engine_health(s->law) : NULL);
    ic_status_prom(s, b);
    ic_prom_log(b);
    ic_prom_process(b);
}

static void get_metrics(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r)
{
    struct ic_buf *b = &s->out;

    (void)r;
    ic_buf_clear(b);
    put_metrics(s, b);
    if (b->failed)
        p->vt->reply(p, 500, NULL, NULL, NULL, 0);
    else
        p->vt->reply(p, 200, "text/plain; version=0.0.4; charset=utf-8", NULL, b->data, b->len);
}

static void put_model(const struct ic_server *s, const struct ic_text_info *i, struct ic_buf *b)
{
    ic_buf_puts(b, "{");
    ic_json_kstr(b, "id", i->name);
    ic_json_kstr(b, "object", "model");
    ic_json_kint(b, "created", s->start_wall_s);
    ic_json_kstr(b, "owned_by", "inference-core");
    ic_json_key(b, "meta");
    ic_buf_puts(b, "{");
    ic_json_kstr(b, "description", i->desc);
    ic_json_kint(b, "n_params", (int64_t)i->n_params);
    ic_json_kint(b, "size", (int64_t)i->model_bytes);
    ic_json_kint(b, "n_vocab", i->n_vocab);
    ic_json_kint(b, "n_ctx_train", i->n_ctx_train);
    ic_json_kint(b, "n_ctx", i->ctx_size);
    ic_json_kbool(b, "chat_template", i->has_chat_template);
    ic_buf_puts(b, "}}");
}

static void get_models(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r)
{
    const struct ic_text_info *i = s->text ? ic_text_engine_info(s->text) : NULL;
    struct ic_buf *b = &s->out;

    (void)r;
    ic_buf_clear(b);
    ic_buf_puts(b, "{\"object\":\"list\",\"data\":[");
    if (i)
        put_model(s, i, b);
    ic_buf_puts(b, "]}");
    reply_json(p, 200, NULL, b);
}

static void get_model(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r)
{
    const struct ic_text_info *i = s->text ? ic_text_engine_info(s->text) : NULL;

    if (s->text && !i) {
        ic_http_error(s, p, 503, IC_UNAVAILABLE, "no text model is loaded", NULL);
        return;
    }
    if (!i || strcmp(r->path + strlen(MODEL_PATH), i->name) != 0) {
        ic_http_error(s, p, 404, IC_NOT_FOUND, "there is no such model (GET /v1/models tells which)", NULL);
        return;
    }
    ic_buf_clear(&s->out);
    put_model(s, i, &s->out);
    reply_json(p, 200, NULL, &s->out);
}

static void get_laws(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r)
{
    struct ic_buf *b = &s->out;

    (void)r;
    ic_buf_clear(b);
    ic_buf_puts(b, "{\"object\":\"list\",\"data\":[");
    for (unsigned i = 0; s->law && i < ic_law_engine_count(s->law); i++) {
        if (i)
            ic_buf_puts(b, ",");
        ic_sim_put_law(s, i, b);
    }
    ic_buf_puts(b, "]}");
    reply_json(p, 200, NULL, b);
}

static void get_sims(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r)
{
    struct ic_buf *b = &s->out;
    bool first = true;

    (void)r;
    ic_buf_clear(b);
    ic_buf_puts(b, "{\"object\":\"list\",\"data\":[");
    for (unsigned i = 0; i < s->cfg.connections_max; i++)
        for (int k = 0; s->conns[i] && s->conns[i]->sims && k < s->cfg.sims_max; k++) {
            const struct sim *m = &s->conns[i]->sims[k];
            if (!m->handle || !m->made)
                continue;
            ic_buf_puts(b, first ? "{" : ",{");
            first = false;
            ic_json_key(b, "sim_id");
            ic_buf_printf(b, "\"sim_%llu\"", (unsigned long long)m->handle);
            ic_json_kstr(b, "law", ic_law_engine_law(s->law, m->law)->name);
            ic_json_kint(b, "height", m->height);
            ic_json_kint(b, "width", m->width);
            ic_json_kint(b, "step", m->step);
            ic_json_kstr(b, "status", m->running ? "running" : "paused");
            ic_buf_puts(b, "}");
        }
    ic_buf_puts(b, "]}");
    reply_json(p, 200, NULL, b);
}

static void get_root(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r)
{
    size_t len;
    const char *page = ic_web_page(&len);

    (void)s;
    (void)r;
    p->vt->reply(p, 200, "text/html; charset=utf-8",
                 "Content-Security-Policy: default-src 'none'; script-src 'unsafe-inline'; style-src "
                 "'unsafe-inline'; "
                 "connect-src 'self' ws: wss:\r\nX-Content-Type-Options: nosniff\r\n",
                 page, len);
}

static const struct {
    const char *path;    /* with a slash at its end: and a name, which may itself have slashes */
    const char *methods; /* as for the Allow header */
    bool open;           /* needs no key */
    void (*run)(struct ic_server *, struct ic_peer *, const struct ic_http_req *);
} routes[] = {
    {"/health", "GET, HEAD", true, get_health},
    {"/ready", "GET, HEAD", true, get_ready},
    {"/metrics", "GET, HEAD", true, get_metrics},
    {"/", "GET, HEAD", true, get_root},
    {"/v1/models", "GET, HEAD", false, get_models},
    {MODEL_PATH, "GET, HEAD", false, get_model},
    {"/v1/laws", "GET, HEAD", false, get_laws},
    {"/v1/sims", "GET, HEAD", false, get_sims},
    {"/predict", "POST", false, ic_predict_request},
    {"/v1/chat/completions", "POST", false, ic_openai_chat},
    {"/v1/completions", "POST", false, ic_openai_completion},
    {"/v1/embeddings", "POST", false, ic_openai_embeddings},
    {"/tokenize", "POST", false, ic_openai_tokenize},
    {"/detokenize", "POST", false, ic_openai_detokenize},
};

static bool leads_to(const char *route, const char *path)
{
    size_t n = strlen(route);
    bool named = n > 1 && route[n - 1] == '/';
    return named ? !strncmp(path, route, n) : !strcmp(path, route);
}

static bool allowed(const char *methods, const char *method)
{
    const char *at = strstr(methods, method);
    size_t n = strlen(method);
    return at && n && (at[n] == ',' || !at[n]) && (at == methods || at[-1] == ' ');
}

static const struct ic_client *client_of(const struct ic_server *s, struct ic_peer *p)
{
    const char *id = p->vt->header(p, "x-client-id"), *key = p->vt->header(p, "x-api-key");
    const char *bearer = p->vt->header(p, "authorization");

    if (!s->cfg.keys)
        return NULL;
    if (!*key && !strncasecmp(bearer, "Bearer ", 7))
        key = bearer + 7;
    return *key ? ic_keys_check(s->cfg.keys, id, key) : NULL;
}

static bool key_ok(const struct ic_server *s, struct ic_peer *p)
{
    return !s->cfg.keys || client_of(s, p);
}

const char *ic_http_client(const struct ic_server *s, struct ic_peer *p)
{
    const struct ic_client *c = client_of(s, p);
    return c ? c->id : NULL;
}

void ic_http_request(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r)
{
    char extra[64];

    for (size_t i = 0; i < sizeof routes / sizeof *routes; i++) {
        if (!leads_to(routes[i].path, r->path))
            continue;
        if (!allowed(routes[i].methods, r->method)) {
            snprintf(extra, sizeof extra, "Allow: %s\r\n", routes[i].methods);
            ic_http_error(s, p, 405, IC_BAD_REQUEST, "this path does not take that method", extra);
        } else if (!routes[i].open && !key_ok(s, p)) {
            ic_http_error(s, p, 401, IC_UNAUTHORIZED, "Invalid credentials",
                          "WWW-Authenticate: Bearer\r\n");
        } else {
            routes[i].run(s, p, r);
        }
        return;
    }
    ic_http_error(s, p, 404, IC_NOT_FOUND, "there is nothing at this path", NULL);
}

/* No prompt, no answer: what is asked of whom, not what it says. */
void ic_server_dump(struct ic_server *s, struct ic_buf *b)
{
    int64_t now = ic_now_ns(), beat = s->text ? ic_text_engine_beat(s->text) : 0;

    ic_buf_printf(b, "# inference-core %s, up %lld s\n", IC_VERSION,
                  (long long)((now - s->start_ns) / (1000 * IC_MS)));
    if (s->text)
        ic_buf_printf(b, "# text engine: state %d, last sign of life %.1f s ago\n",
                      (int)ic_text_engine_state(s->text), beat ? (double)(now - beat) / 1e9 : 0.0);
    beat = s->law ? ic_law_engine_beat(s->law) : 0;
    if (s->law)
        ic_buf_printf(b, "# Law M engine: state %d, last sign of life %.1f s ago\n",
                      (int)ic_law_engine_state(s->law), beat ? (double)(now - beat) / 1e9 : 0.0);
    for (unsigned i = 0; i < s->cfg.connections_max; i++) {
        const struct conn *c = s->conns[i];
        for (int k = 0; c && c->streams && k < s->cfg.requests_max; k++) {
            const struct ic_text_req *q = c->streams[k].req;
            if (q)
                ic_buf_printf(b, "# connection %u: request %llu, %.1f s old, cancel %d\n", i,
                              (unsigned long long)q->rid, (double)(now - q->arrival_ns) / 1e9,
                              (int)atomic_load(&q->cancel));
        }
    }
    put_metrics(s, b);
}
