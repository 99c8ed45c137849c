/* WebSocket (RFC 6455): handshake, frames in, messages out, closing.
 *
 *   OPEN --close() or protocol error--> CLOSING --our close frame left, and the client's came--> LINGER
 *   OPEN --client's close frame--> CLOSING (echo queued, on_close called) --echo left--> LINGER
 *
 * In CLOSING nothing more is accepted to be sent and data from the client is thrown away. After a
 * protocol error the client's bytes cannot be framed any more (`deaf`), so its close frame is not
 * waited for.
 *
 * Memory: a message is joined in a buffer that grows with the bytes that came, not with the length a
 * frame header claims, and is freed after each message, so an idle connection holds none.
 *
 * Thread: the loop. Owner: the conn. */
#include <endian.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/utf8.h"
#include "net/net_i.h"

enum { OP_CONT = 0, OP_TEXT = 1, OP_BINARY = 2, OP_CLOSE = 8, OP_PING = 9, OP_PONG = 10 };

#define CONTROL_MAX 125 /* bytes of a control frame's payload */
#define KEEP_CAP 2048   /* a message buffer up to this size is kept for the next message */

/* ---- out ---- */

/* A frame with its header; the payload is to be filled in at the returned place. */
static struct out_msg *frame_new(uint8_t op, size_t len, uint8_t **payload)
{
    size_t head = len < 126 ? 2 : len < 65536 ? 4 : 10;
    struct out_msg *m = len < SIZE_MAX / 2 ? conn_msg(head + len) : NULL;
    if (!m)
        return NULL;
    m->data[0] = (uint8_t)(0x80 | op);
    if (head == 2) {
        m->data[1] = (uint8_t)len;
    } else if (head == 4) {
        uint16_t be = htobe16((uint16_t)len);
        m->data[1] = 126;
        memcpy(m->data + 2, &be, 2);
    } else {
        uint64_t be = htobe64(len);
        m->data[1] = 127;
        memcpy(m->data + 2, &be, 8);
    }
    *payload = m->data + head;
    return m;
}

static void send_control(struct conn *c, uint8_t op, const void *data, size_t len)
{
    uint8_t *payload;
    struct out_msg *m = frame_new(op, len, &payload);
    if (!m) {
        conn_dead(c);
        return;
    }
    if (len)
        memcpy(payload, data, len);
    m->kind = OUT_CONTROL;
    conn_queue(c, m);
}

/* Of pings that come faster than their answers leave, the latest has to be answered (RFC 6455, 5.5.3): where the outbox
 * holds as many pongs as it may, the last of them, which cannot have begun to leave, takes up what the newest ping says. */
static void send_pong(struct conn *c, const void *data, size_t len)
{
    bool full = c->pongs == IC_NET_PONGS_MAX;
    uint8_t *payload;
    struct out_msg *m = full ? c->last_pong : frame_new(OP_PONG, CONTROL_MAX, &payload);
    if (!m) {
        conn_dead(c);
        return;
    }
    if (full)
        c->pending -= m->len;
    m->len = 2 + len;
    m->data[1] = (uint8_t)len;
    if (len)
        memcpy(m->data + 2, data, len);
    m->kind = OUT_PONG;
    if (full)
        c->pending += m->len;
    else
        conn_queue(c, m);
    c->last_pong = m;
}

/* Drops frames that have not begun to leave, oldest first, until `need` bytes fit; none when they would not
 * fit even without them. */
static bool make_room(struct conn *c, size_t need, size_t max)
{
    if (c->pending + c->held - c->frames + need > max)
        return false;
    struct out_msg *prev = NULL;
    for (struct out_msg *m = c->out; m && c->pending + c->held + need > max;) {
        struct out_msg *next = m->next;
        if (m->kind == OUT_FRAME && !m->off) {
            conn_drop_frame(c, prev);
            c->peer.frames_lost++;
        } else {
            prev = m;
        }
        m = next;
    }
    return c->pending + c->held + need <= max;
}

enum ic_status ws_send(struct ic_peer *p, enum ic_peer_msg kind, const void *data, size_t len,
                       int64_t stamp_ns)
{
    struct conn *c = conn_of(p);
    size_t max = c->net->cfg->outbox_max;
    if (c->state != C_OPEN || len > max)
        return IC_BUSY;
    uint8_t *payload;
    struct out_msg *m = frame_new(kind == IC_MSG_TEXT ? OP_TEXT : OP_BINARY, len, &payload);
    if (!m)
        return IC_OOM;
    if (!make_room(c, m->len, max)) {
        c->peer.frames_lost += kind == IC_MSG_FRAME;
        free(m);
        return IC_BUSY;
    }
    if (len)
        memcpy(payload, data, len);
    m->stamp = stamp_ns;
    m->kind = kind == IC_MSG_FRAME ? OUT_FRAME : OUT_DATA;
    conn_queue(c, m);
    return IC_OK;
}

/* Queues the close frame and stops talking. code 0: a close frame without a code. */
static void start_close(struct conn *c, uint16_t code, const char *reason)
{
    uint8_t body[125];
    size_t len = 0;
    if (code) {
        size_t reason_len = reason ? strlen(reason) : 0;
        if (reason_len > 123)
            reason_len = ic_utf8_whole(reason, 123);
        body[0] = (uint8_t)(code >> 8);
        body[1] = (uint8_t)code;
        if (reason_len)
            memcpy(body + 2, reason, reason_len);
        len = 2 + reason_len;
    }
    c->state = C_CLOSING;
    c->ws.close_queued = true;
    conn_set_due(c, IC_NET_CLOSE_MS);
    send_control(c, OP_CLOSE, body, len);
}

void ws_close(struct ic_peer *p, uint16_t code, const char *reason)
{
    struct conn *c = conn_of(p);
    if (c->state == C_OPEN)
        start_close(c, code, reason);
}

static void protocol_error(struct conn *c, uint16_t code, const char *reason)
{
    c->ws.deaf = true;
    if (c->state == C_OPEN)
        start_close(c, code, reason);
    conn_app_close(c);
    conn_touch(c);
}

void ws_written(struct conn *c)
{
    struct ws_state *w = &c->ws;
    if (w->close_got || w->deaf) {
        conn_app_close(c);
        conn_linger(c);
        return;
    }
    int64_t wait = ic_now_ns() + IC_NET_CLOSE_WAIT_MS * IC_MS;
    int64_t *due = &c->net->due[c->peer.id.slot];
    if (w->close_queued) { /* first time here: from now on only the client's close frame is awaited */
        w->close_queued = false;
        *due = wait;
    }
}

void ws_timeout(struct conn *c, int64_t now)
{
    int64_t idle = (int64_t)c->net->cfg->idle_s * 1000 * IC_MS;
    if (c->state == C_CLOSING || now - c->ws.rx_ns >= 2 * idle) {
        conn_dead(c);
        return;
    }
    int64_t next = c->ws.rx_ns + idle;
    if (now >= next) {
        if (!c->ws.pinged)
            send_control(c, OP_PING, NULL, 0);
        c->ws.pinged = true;
        next += idle;
    }
    c->net->due[c->peer.id.slot] = next;
}

/* ---- in ---- */

static void refuse(struct conn *c, enum ic_status code, const char *msg)
{
    struct ic_err err = {0};
    ic_fail(&err, code, "%s", msg);
    c->net->app->on_refused(c->net->arg, &c->peer, &err, c->ws.binary);
}

static void message_done(struct conn *c)
{
    struct ws_state *w = &c->ws;
    bool discard = w->discard;
    w->in_message = w->discard = false;
    if (discard || c->state != C_OPEN)
        return;
    if (!ic_buf_reserve(&w->msg, 1)) {
        w->msg.failed = false;
        ic_buf_clear(&w->msg);
        refuse(c, IC_OOM, "no memory for the message");
        return;
    }
    w->msg.data[w->msg.len] = 0;
    if (!w->binary && !ic_utf8_valid(w->msg.data, w->msg.len)) {
        refuse(c, IC_BAD_REQUEST, "a text message must be valid UTF-8");
        protocol_error(c, 1007, "invalid UTF-8");
        return;
    }
    c->net->app->on_message(c->net->arg, &c->peer, w->msg.data, w->msg.len, w->binary);
    if (w->msg.cap > KEEP_CAP)
        buf_release(&w->msg);
    else
        ic_buf_clear(&w->msg);
}

static void discard_message(struct conn *c, enum ic_status code)
{
    char msg[96];
    c->ws.discard = true;
    buf_release(&c->ws.msg);
    if (c->state != C_OPEN)
        return;
    snprintf(msg, sizeof msg, "message larger than %zu bytes", c->net->cfg->message_max);
    refuse(c, code, code == IC_TOO_LARGE ? msg : "no memory for the message");
}

static bool close_code_ok(unsigned code)
{
    return (code >= 1000 && code <= 1014 && code != 1004 && code != 1005 && code != 1006) ||
           (code >= 3000 && code <= 4999);
}

static void got_close(struct conn *c)
{
    struct ws_state *w = &c->ws;
    unsigned code = w->control_len >= 2 ? (unsigned)w->control[0] << 8 | w->control[1] : 0;
    if (w->control_len == 1 || (w->control_len && !close_code_ok(code))) {
        protocol_error(c, 1002, "bad close code");
        return;
    }
    if (w->control_len > 2 && !ic_utf8_valid((char *)w->control + 2, w->control_len - 2u)) {
        protocol_error(c, 1007, "invalid UTF-8");
        return;
    }
    w->close_got = true;
    if (c->state == C_OPEN)
        start_close(c, (uint16_t)code, NULL);
    w->deaf = true; /* nothing may follow a close frame */
    conn_app_close(c);
    conn_touch(c);
}

static void control_done(struct conn *c)
{
    struct ws_state *w = &c->ws;
    switch (w->hdr[0] & 15) {
    case OP_CLOSE: got_close(c); break;
    case OP_PING:
        if (c->state == C_OPEN)
            send_pong(c, w->control, w->control_len);
        break;
    default: break;
    }
}

/* The first two bytes of a frame. NULL: fine, else what is wrong. */
static const char *check_start(const struct ws_state *w)
{
    unsigned op = w->hdr[0] & 15, len = w->hdr[1] & 127;
    bool fin = w->hdr[0] & 0x80;
    if (w->hdr[0] & 0x70)
        return "reserved bit";
    if ((op > OP_BINARY && op < OP_CLOSE) || op > OP_PONG)
        return "unknown opcode";
    if (!(w->hdr[1] & 0x80))
        return "unmasked frame";
    if (op >= OP_CLOSE)
        return !fin ? "fragmented control frame" : len > 125 ? "long control frame" : NULL;
    if (op == OP_CONT && !w->in_message)
        return "continuation of nothing";
    if (op != OP_CONT && w->in_message)
        return "message inside a message";
    return NULL;
}

static size_t header_size(const struct ws_state *w)
{
    unsigned len = w->hdr[1] & 127;
    return w->hdr_len < 2 ? 2 : len == 126 ? 8 : len == 127 ? 14 : 6;
}

static void frame_done(struct conn *c)
{
    struct ws_state *w = &c->ws;
    w->in_payload = false;
    w->hdr_len = 0;
    if ((w->hdr[0] & 15) >= OP_CLOSE)
        control_done(c);
    else if (w->hdr[0] & 0x80)
        message_done(c);
}

/* The header is complete: length, and what the frame is part of. */
static void frame_begin(struct conn *c)
{
    struct ws_state *w = &c->ws;
    unsigned op = w->hdr[0] & 15;
    w->left = w->hdr[1] & 127;
    if (w->left == 126) {
        w->left = (uint64_t)w->hdr[2] << 8 | w->hdr[3];
    } else if (w->left == 127) {
        uint64_t be;
        memcpy(&be, w->hdr + 2, 8);
        w->left = be64toh(be);
        if (w->left >> 63) {
            protocol_error(c, 1002, "bad length");
            return;
        }
    }
    memmove(w->hdr + 10, w->hdr + w->hdr_len - 4, 4); /* the mask, always in the same place */
    w->mask_at = 0;
    w->control_len = 0;
    w->in_payload = true;
    if (op < OP_CLOSE) {
        if (op != OP_CONT)
            w->binary = op == OP_BINARY;
        w->in_message = true;
        if (!w->discard && w->left > c->net->cfg->message_max - w->msg.len)
            discard_message(c, IC_TOO_LARGE);
    }
    if (!w->left)
        frame_done(c);
}

static void unmask(uint8_t *dst, const uint8_t *src, size_t n, const uint8_t mask[4], unsigned at)
{
    uint8_t turned[8];
    for (unsigned i = 0; i < 8; i++)
        turned[i] = mask[(at + i) & 3];
    uint64_t m, v;
    memcpy(&m, turned, 8);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        memcpy(&v, src + i, 8);
        v ^= m;
        memcpy(dst + i, &v, 8);
    }
    for (; i < n; i++)
        dst[i] = src[i] ^ turned[i & 7];
}

static void take_payload(struct conn *c, const uint8_t *p, size_t n)
{
    struct ws_state *w = &c->ws;
    const uint8_t *mask = w->hdr + 10;
    if ((w->hdr[0] & 15) >= OP_CLOSE) {
        unmask(w->control + w->control_len, p, n, mask, w->mask_at);
        w->control_len = (uint8_t)(w->control_len + n);
    } else if (!w->discard && c->state == C_OPEN) {
        if (ic_buf_reserve(&w->msg, n)) {
            unmask((uint8_t *)w->msg.data + w->msg.len, p, n, mask, w->mask_at);
            w->msg.len += n;
        } else {
            discard_message(c, IC_OOM);
        }
    }
    w->mask_at = (uint8_t)((w->mask_at + n) & 3);
}

size_t ws_feed(struct conn *c, const uint8_t *p, size_t len)
{
    struct ws_state *w = &c->ws;
    w->rx_ns = ic_now_ns();
    w->pinged = false;
    if (w->deaf)
        return len;
    if (w->in_payload) {
        size_t n = len < w->left ? len : (size_t)w->left;
        take_payload(c, p, n);
        w->left -= n;
        if (!w->left)
            frame_done(c);
        return n;
    }
    size_t used = 0;
    while (used < len && w->hdr_len < header_size(w)) {
        w->hdr[w->hdr_len++] = p[used++];
        const char *wrong = w->hdr_len == 2 ? check_start(w) : NULL;
        if (wrong) {
            protocol_error(c, 1002, wrong);
            return len;
        }
    }
    if (w->hdr_len >= 2 && w->hdr_len == header_size(w))
        frame_begin(c);
    return used;
}

/* ---- handshake ---- */

static void refuse_handshake(struct conn *c, const struct ic_err *err)
{
    struct ic_buf b = {0};
    ic_buf_puts(&b, "{");
    ic_json_kstr(&b, "error", err->msg);
    ic_buf_puts(&b, "}");
    const char *extra = err->code == IC_UNAUTHORIZED ? "WWW-Authenticate: Bearer\r\n"
                        : err->code == IC_UNAVAILABLE || err->code == IC_BUSY ? "Retry-After: 1\r\n"
                                                                              : NULL;
    c->http.req.keep_alive = false;
    if (b.failed)
        conn_dead(c);
    else
        http_answer(c, ic_status_http(err->code), "application/json", extra, b.data, b.len);
    ic_buf_deinit(&b);
    conn_linger(c);
}

static bool key_ok(const char *key)
{
    if (strlen(key) != 24 || strcmp(key + 22, "=="))
        return false;
    return strspn(key, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/") == 22;
}

static void queue_101(struct conn *c)
{
    const struct ic_req *r = &c->http.req;
    char text[64], accept[40];
    uint8_t sha[20];
    int n = snprintf(text, sizeof text, "%s258EAFA5-E914-47DA-95CA-C5AB0DC85B11", r->ws_key);
    lws_SHA1((unsigned char *)text, (size_t)n, sha);
    lws_b64_encode_string((char *)sha, sizeof sha, accept, sizeof accept);
    /* A subprotocol nobody here knows is agreed to as well: browsers and others give up when the
     * answer names none of those they offered, and what is spoken is decided by the path alone. */
    char head[256];
    n = snprintf(head, sizeof head,
                 "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                 "Sec-WebSocket-Accept: %s\r\n%s%s%s\r\n",
                 accept, r->ws_protocol[0] ? "Sec-WebSocket-Protocol: " : "", r->ws_protocol,
                 r->ws_protocol[0] ? "\r\n" : "");
    struct out_msg *m = conn_msg((size_t)n);
    if (!m) {
        conn_dead(c);
        return;
    }
    memcpy(m->data, head, (size_t)n);
    m->kind = OUT_CONTROL;
    conn_queue(c, m);
}

void ws_upgrade(struct conn *c)
{
    struct ic_req *r = &c->http.req;
    struct ic_net *n = c->net;
    if (r->ws_version != 13) {
        http_error(c, 426, "WebSocket version 13 is spoken here");
        return;
    }
    if (strcmp(r->method, "GET") || !key_ok(r->ws_key) || r->length || r->chunked) {
        http_error(c, 400, "malformed WebSocket handshake");
        return;
    }
    if (!origin_may_connect(n->cfg, r)) {
        http_error(c, 403, "pages of this origin may not connect (--origins)");
        return;
    }
    c->peer.kind = IC_PEER_WS;
    c->peer.path = r->path;
    struct ic_err err = {0};
    enum ic_status st = n->draining ? ic_fail(&err, IC_UNAVAILABLE, "shutting down")
                                    : n->app->on_handshake(n->arg, &c->peer, &err);
    if (st) {
        if (!err.msg[0])
            ic_fail(&err, st, "%s", ic_status_name(st));
        refuse_handshake(c, &err);
        return;
    }
    queue_101(c);
    if (c->state == C_DEAD)
        return;
    c->state = C_OPEN;
    c->ws.rx_ns = ic_now_ns();
    conn_set_due(c, (int64_t)n->cfg->idle_s * 1000);
    conn_app_open(c, IC_PEER_WS);
    n->app->on_open(n->arg, &c->peer);
    conn_touch(c);
}
