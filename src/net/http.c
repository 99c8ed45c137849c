/* HTTP exchanges: a request's head and body in, one answer out, then the next request.
 *
 * An answer, whole or streamed, is complete when `ended`; the exchange is over (on_close) when it has
 * also been written, so that a client that pipelines without reading is not served ahead. Network
 * errors (400, 408, 413, …) are answered here without the app and end the connection, because what
 * follows on it cannot be trusted to start a request.
 *
 * Thread: the loop. Owner: the conn. Invariant: in C_APP exactly one on_http is unanswered or its
 * answer unwritten. */
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#include "net/net_i.h"

static const char *reason_of(int status)
{
    static const struct {
        int status;
        const char *text;
    } table[] = {
        {200, "OK"},
        {201, "Created"},
        {202, "Accepted"},
        {204, "No Content"},
        {301, "Moved Permanently"},
        {302, "Found"},
        {304, "Not Modified"},
        {400, "Bad Request"},
        {401, "Unauthorized"},
        {403, "Forbidden"},
        {404, "Not Found"},
        {405, "Method Not Allowed"},
        {408, "Request Timeout"},
        {409, "Conflict"},
        {411, "Length Required"},
        {413, "Content Too Large"},
        {415, "Unsupported Media Type"},
        {422, "Unprocessable Content"},
        {426, "Upgrade Required"},
        {429, "Too Many Requests"},
        {431, "Request Header Fields Too Large"},
        {500, "Internal Server Error"},
        {501, "Not Implemented"},
        {503, "Service Unavailable"},
        {504, "Gateway Timeout"},
        {505, "HTTP Version Not Supported"},
        {507, "Insufficient Storage"},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (table[i].status == status)
            return table[i].text;
    return "Status";
}

/* The Date field's text; made once a second. */
static const char *date_now(void)
{
    static char text[40];
    static time_t made; /* loop thread only */
    time_t now = time(NULL);
    if (now != made) {
        struct tm tm;
        gmtime_r(&now, &tm);
        strftime(text, sizeof text, "%a, %d %b %Y %H:%M:%S GMT", &tm);
        made = now;
    }
    return text;
}

static void queue_bytes(struct conn *c, const void *a, size_t a_len, const void *b, size_t b_len,
                        int64_t stamp)
{
    struct out_msg *m = conn_msg(a_len + b_len);
    if (!m) {
        conn_dead(c);
        return;
    }
    memcpy(m->data, a, a_len);
    if (b_len)
        memcpy(m->data + a_len, b, b_len);
    m->stamp = stamp;
    conn_queue(c, m);
}

/* Status line and fields, without the blank line; length < 0: a body of unknown length follows. */
static void put_head(struct conn *c, struct ic_buf *b, int status, const char *type, const char *extra,
                     long length)
{
    struct ic_req *r = &c->http.req;
    if (c->net->draining || c->lobby)
        r->keep_alive = false;
    bool has_body = status >= 200 && status != 204 && status != 304;
    c->http.chunked_answer = length < 0 && r->http11 && has_body && !r->head;
    if (length < 0 && !r->http11 && has_body)
        r->keep_alive = false; /* the end of the body is the end of the connection */
    ic_buf_printf(b, "HTTP/1.1 %d %s\r\nDate: %s\r\n", status, reason_of(status), date_now());
    if (type)
        ic_buf_printf(b, "Content-Type: %s\r\n", type);
    if (length >= 0 && has_body)
        ic_buf_printf(b, "Content-Length: %ld\r\n", length);
    if (c->http.chunked_answer)
        ic_buf_puts(b, "Transfer-Encoding: chunked\r\n");
    if (!r->keep_alive)
        ic_buf_puts(b, "Connection: close\r\n");
    else if (!r->http11)
        ic_buf_puts(b, "Connection: keep-alive\r\n");
    const char *origin = origin_answer(c->net->cfg, r);
    if (origin)
        ic_buf_printf(b, "Access-Control-Allow-Origin: %s\r\n", origin);
    /* also where none was allowed: a cache is not to give that answer to others */
    if (c->net->cfg->origins)
        ic_buf_puts(b, "Vary: Origin\r\n");
    if (extra)
        ic_buf_puts(b, extra);
    ic_buf_puts(b, "\r\n");
}

/* A whole answer. The caller decides on the state. */
void http_answer(struct conn *c, int status, const char *type, const char *extra, const void *body,
                 size_t len)
{
    struct ic_buf b = {0};
    put_head(c, &b, status, type, extra, (long)len);
    if (b.failed)
        conn_dead(c);
    else
        queue_bytes(c, b.data, b.len, body, c->http.req.head || status == 204 || status == 304 ? 0 : len,
                    0);
    ic_buf_deinit(&b);
    c->http.begun = c->http.ended = true;
}

void http_error(struct conn *c, int status, const char *msg)
{
    static const struct {
        int status;
        const char *code;
    } codes[] = {{413, "too_large"},   {431, "too_large"}, {408, "deadline"},
                 {503, "unavailable"}, {507, "oom"},       {403, "forbidden"}};
    const char *code = "bad_request";
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        if (codes[i].status == status)
            code = codes[i].code;
    struct ic_buf b = {0};
    ic_buf_puts(&b, "{\"error\":{");
    ic_json_kstr(&b, "code", code);
    ic_json_kstr(&b, "message", msg);
    ic_json_kstr(&b, "type", status < 500 ? "invalid_request_error" : "server_error");
    ic_buf_puts(&b, ",\"param\":null}}");
    c->http.req.keep_alive = false;
    const char *extra = status == 503   ? "Retry-After: 1\r\n"
                        : status == 426 ? "Sec-WebSocket-Version: 13\r\nUpgrade: websocket\r\n"
                                        : NULL;
    if (b.failed)
        conn_dead(c);
    else
        http_answer(c, status, "application/json", extra, b.data, b.len);
    ic_buf_deinit(&b);
    conn_linger(c);
}

/* How long a client may take to read a complete answer: request_s and 1 s for each 16 KiB. */
static void answer_due(struct conn *c)
{
    conn_set_due(c, (int64_t)c->net->cfg->request_s * 1000 + (int64_t)(c->pending / 16));
}

static void call_app(struct conn *c)
{
    struct http_state *h = &c->http;
    c->state = C_APP;
    h->begun = h->ended = false;
    conn_set_due(c, -1);
    if (origin_preflight(c) || static_serve(c)) {
        answer_due(c);
        conn_touch(c);
        return;
    }
    if (!ic_buf_reserve(&h->body, 1)) {
        http_error(c, 507, "out of memory");
        return;
    }
    h->body.data[h->body.len] = 0;
    conn_app_open(c, IC_PEER_HTTP);
    c->peer.path = h->req.path;
    struct ic_http_req req = {h->req.method, h->req.path, h->req.query, h->body.data, h->body.len};
    c->net->app->on_http(c->net->arg, &c->peer, &req);
    buf_release(&h->body); /* valid during on_http only */
    conn_touch(c);
}

static void head_done(struct conn *c)
{
    struct http_state *h = &c->http;
    struct ic_req *r = &h->req;
    if (c->lobby) {
        http_error(c, 503, "too many connections");
        return;
    }
    if (r->upgrade) {
        ws_upgrade(c);
        return;
    }
    if (r->length > c->net->cfg->body_max) {
        http_error(c, 413, "request body too large");
        return;
    }
    h->left = r->length;
    h->chunked = (struct ic_chunked){0};
    if (!h->left && !r->chunked) {
        call_app(c);
        return;
    }
    c->state = C_BODY;
    if (r->expect_continue)
        queue_bytes(c, "HTTP/1.1 100 Continue\r\n\r\n", 25, NULL, 0, 0);
}

size_t http_feed_head(struct conn *c, const uint8_t *p, size_t len)
{
    struct ic_buf *b = &c->http.head;
    if (!b->len) { /* blank lines before a request line are to be ignored */
        size_t blank = 0;
        while (blank < len && (p[blank] == '\r' || p[blank] == '\n'))
            blank++;
        if (blank)
            return blank;
        conn_set_due(c, (int64_t)(c->lobby ? 2 : c->net->cfg->request_s) * 1000);
    }
    size_t before = b->len;
    size_t take = len < IC_HEAD_MAX - before ? len : IC_HEAD_MAX - before;
    ic_buf_put(b, p, take);
    if (b->failed) {
        conn_dead(c);
        return len;
    }
    /* told at once: who speaks TLS here waits for an answer, not for us */
    if (!ic_head_begins(b->data[0])) {
        buf_release(b);
        http_error(c, 400, "malformed request line");
        return len;
    }
    size_t end = ic_head_end(b->data, b->len, before);
    if (!end && b->len < IC_HEAD_MAX)
        return len;
    const char *why = "request head too large";
    int status = end ? ic_req_parse(&c->http.req, b->data, end, &why) : 431;
    buf_release(b);
    if (status) {
        http_error(c, status, why);
        return len;
    }
    head_done(c);
    return end - before;
}

size_t http_feed_body(struct conn *c, const uint8_t *p, size_t len)
{
    struct http_state *h = &c->http;
    const uint8_t *data = p;
    size_t n = len < h->left ? len : (size_t)h->left, used = n;
    if (h->req.chunked) {
        long r = ic_chunked_feed(&h->chunked, p, len, &data, &n);
        if (r < 0) {
            http_error(c, 400, "malformed chunked body");
            return len;
        }
        used = (size_t)r;
    } else {
        h->left -= n;
    }
    if (n > c->net->cfg->body_max - h->body.len) {
        http_error(c, 413, "request body too large");
        return len;
    }
    ic_buf_put(&h->body, data, n);
    if (h->body.failed)
        http_error(c, 507, "out of memory");
    else if (h->req.chunked ? h->chunked.done : !h->left)
        call_app(c);
    return used;
}

/* The outbox is empty. If the answer is complete, the connection is ready for another request. */
void http_written(struct conn *c)
{
    struct http_state *h = &c->http;
    if (!h->ended)
        return;
    bool keep = h->req.keep_alive && !c->net->draining;
    conn_app_close(c);
    ic_req_deinit(&h->req);
    c->peer.path = NULL;
    h->begun = h->ended = false;
    h->first_done = true;
    if (!keep) {
        conn_linger(c);
        return;
    }
    c->state = C_HEAD;
    conn_set_due(c, 2 * (int64_t)c->net->cfg->idle_s * 1000);
}

void http_timeout(struct conn *c)
{
    if (c->state == C_APP) { /* the answer is complete, and the client does not read it */
        conn_dead(c);
        return;
    }
    if (c->state == C_HEAD && !c->http.head.len) {
        if (c->got_bytes)
            conn_linger(c);
        else
            conn_dead(c);
        return;
    }
    http_error(c, 408,
               c->state == C_HEAD ? "the request head took too long" : "the request body took too long");
}

void http_deinit(struct conn *c)
{
    ic_buf_deinit(&c->http.head);
    ic_buf_deinit(&c->http.body);
    ic_req_deinit(&c->http.req);
}

/* ---- vt ---- */

static bool may_answer(struct conn *c)
{
    return c->state == C_APP && c->app_live && !c->http.ended;
}

void http_reply(struct ic_peer *p, int status, const char *type, const char *extra, const void *body,
                size_t len)
{
    struct conn *c = conn_of(p);
    if (!may_answer(c) || c->http.begun)
        return;
    http_answer(c, status, type, extra, body, len);
    answer_due(c);
    conn_touch(c);
}

void http_begin(struct ic_peer *p, int status, const char *type, const char *extra)
{
    struct conn *c = conn_of(p);
    if (!may_answer(c) || c->http.begun)
        return;
    c->http.begun = true;
    struct ic_buf b = {0};
    put_head(c, &b, status, type, extra, -1);
    if (b.failed)
        conn_dead(c);
    else
        queue_bytes(c, b.data, b.len, NULL, 0, 0);
    ic_buf_deinit(&b);
}

enum ic_status http_chunk(struct ic_peer *p, const void *data, size_t len, int64_t stamp_ns)
{
    struct conn *c = conn_of(p);
    if (!may_answer(c) || !c->http.begun)
        return IC_BUSY;
    if (!len || c->http.req.head) /* an empty chunk would end the body */
        return IC_OK;
    char size[24];
    size_t size_len = c->http.chunked_answer ? (size_t)snprintf(size, sizeof size, "%zx\r\n", len) : 0;
    size_t total = size_len + len + (size_len ? 2 : 0);
    if (total > c->net->cfg->outbox_max || c->pending + c->held > c->net->cfg->outbox_max - total)
        return IC_BUSY;
    struct out_msg *m = conn_msg(total);
    if (!m) {
        conn_dead(c); /* an answer with a hole must not look complete */
        return IC_OOM;
    }
    memcpy(m->data, size, size_len);
    memcpy(m->data + size_len, data, len);
    if (size_len)
        memcpy(m->data + size_len + len, "\r\n", 2);
    m->stamp = stamp_ns;
    conn_queue(c, m);
    return IC_OK;
}

void http_end(struct ic_peer *p)
{
    struct conn *c = conn_of(p);
    if (!may_answer(c) || !c->http.begun)
        return;
    if (c->http.chunked_answer)
        queue_bytes(c, "0\r\n\r\n", 5, NULL, 0, 0);
    c->http.ended = true;
    answer_due(c);
    conn_touch(c);
}
