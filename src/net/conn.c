/* One connection: its slot, its outbox, its time-outs, and the settling that follows every event.
 *
 * Writing. TLS goes through lws_write, which keeps what a full socket did not take; while it does, it
 * neither reads that socket nor stops polling it for input, so a client that sends without reading would
 * turn the loop into a busy one. Hence input is not polled for while lws holds something.
 *
 * Thread: the loop. Owner of a conn: the slot table; of an out_msg: the outbox it is in.
 *
 * Invariants
 * - pending == sum of len - off over the outbox; only the first message has off > 0.
 * - frames == sum of len over the FRAMEs in it with off == 0.
 * - A conn on the dirty list is settled before the entry from lws returns.
 * - Freeing a conn detaches it from its wsi first; lws closes that one on its own afterwards. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "net/net_i.h"

/* ---- slots ---- */

struct conn *conn_new(struct ic_net *n, int fd)
{
    if (!n->free_count && !n->lobby_count)
        return NULL;
    struct conn *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    c->lobby = !n->free_count;
    uint32_t slot = c->lobby ? n->free_lobby[--n->lobby_count] : n->free_slots[--n->free_count];
    c->magic = IC_CONN_MAGIC;
    c->net = n;
    c->fd = fd;
    c->peer.vt = &ic_net_vt;
    c->peer.id.slot = slot;
    c->http.head.max = IC_HEAD_MAX;
    c->http.body.max = n->cfg->body_max + 1;
    c->ws.msg.max = n->cfg->message_max + 1;
    n->slots[slot] = c;
    n->used++;
    conn_set_due(c, (int64_t)(c->lobby ? 2 : n->cfg->request_s) * 1000);
    return c;
}

static void undirty(struct conn *c)
{
    if (!c->dirty)
        return;
    if (c->dirty_prev)
        c->dirty_prev->dirty_next = c->dirty_next;
    else
        c->net->dirty = c->dirty_next;
    if (c->dirty_next)
        c->dirty_next->dirty_prev = c->dirty_prev;
    c->dirty = false;
    c->dirty_next = c->dirty_prev = NULL;
}

static struct out_msg *out_pop(struct conn *c)
{
    struct out_msg *m = c->out;
    c->out = m->next;
    if (!c->out)
        c->out_tail = NULL;
    c->pending -= m->len - m->off;
    if (m->kind == OUT_FRAME && !m->off)
        c->frames -= m->len;
    if (m->kind == OUT_PONG)
        c->pongs--;
    return m;
}

/* Also called by lws' own closing (peer hung up): then `wsi` is already on its way out. */
void conn_free(struct conn *c)
{
    struct ic_net *n = c->net;
    conn_check(c);
    c->state = C_DEAD;
    conn_app_close(c);
    undirty(c);
    if (c->wsi)
        lws_set_opaque_user_data(c->wsi, NULL);
    else if (!n->cfg->tls_cert)
        close(c->fd);
    while (c->out)
        free(out_pop(c));
    free(c->stash);
    http_deinit(c);
    ic_buf_deinit(&c->ws.msg);
    uint32_t slot = c->peer.id.slot;
    n->slots[slot] = NULL;
    n->due[slot] = 0;
    if (slot < n->cfg->connections_max)
        n->free_slots[n->free_count++] = slot;
    else
        n->free_lobby[n->lobby_count++] = slot;
    n->used--;
    c->magic = 0;
    free(c);
}

void conn_set_due(struct conn *c, int64_t ms)
{
    int64_t at = ms < 0 ? INT64_MAX : ic_now_ns() + ms * IC_MS;
    c->net->due[c->peer.id.slot] = at;
    net_tick_by(c->net, at);
}

void conn_app_open(struct conn *c, enum ic_peer_kind kind)
{
    struct ic_net *n = c->net;
    uint32_t slot = c->peer.id.slot;
    if (!++n->gens[slot])
        n->gens[slot] = 1;
    c->peer.id.gen = n->gens[slot];
    c->peer.kind = kind;
    c->app_live = true;
}

void conn_app_close(struct conn *c)
{
    if (!c->app_live)
        return;
    c->app_live = false;
    c->net->app->on_close(c->net->arg, &c->peer);
    c->peer.app = NULL;
    c->peer.id.gen = 0;
    c->peer.frames_lost = 0;
}

/* ---- outbox ---- */

struct out_msg *conn_msg(size_t len)
{
    struct out_msg *m = len < SIZE_MAX - sizeof *m ? malloc(sizeof *m + len) : NULL;
    if (m)
        *m = (struct out_msg){.len = len};
    return m;
}

void conn_queue(struct conn *c, struct out_msg *m)
{
    m->next = NULL;
    if (c->out_tail)
        c->out_tail->next = m;
    else
        c->out = m;
    c->out_tail = m;
    c->pending += m->len;
    if (m->kind == OUT_FRAME)
        c->frames += m->len;
    if (m->kind == OUT_PONG)
        c->pongs++;
    conn_touch(c);
}

/* Throws away the message after `prev` (NULL: the first). */
void conn_drop_frame(struct conn *c, struct out_msg *prev)
{
    struct out_msg *m = prev ? prev->next : c->out;
    if (prev)
        prev->next = m->next;
    else
        c->out = m->next;
    if (c->out_tail == m)
        c->out_tail = prev;
    c->pending -= m->len;
    c->frames -= m->len;
    free(m);
}

/* `n` bytes have gone: takes them off the outbox and reports the stamped messages among them. */
static void out_consume(struct conn *c, size_t n)
{
    while (n) {
        struct out_msg *m = c->out;
        size_t part = m->len - m->off < n ? m->len - m->off : n;
        if (part < m->len - m->off) {
            if (m->kind == OUT_FRAME && !m->off)
                c->frames -= m->len;
            m->off += part;
            c->pending -= part;
            return;
        }
        n -= part;
        out_pop(c);
        if (m->stamp)
            c->net->app->on_written(c->net->arg, ic_now_ns() - m->stamp);
        free(m);
    }
}

static void write_plain(struct conn *c)
{
    while (c->out) {
        struct iovec iov[16];
        size_t total = 0;
        int count = 0;
        for (struct out_msg *m = c->out; m && count < 16; m = m->next) {
            iov[count++] = (struct iovec){m->data + m->off, m->len - m->off};
            total += m->len - m->off;
        }
        struct msghdr mh = {.msg_iov = iov, .msg_iovlen = (size_t)count};
        ssize_t n = sendmsg(c->fd, &mh, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0) {
            if (errno == EINTR)
                continue;
            if (errno != EAGAIN && errno != EWOULDBLOCK && errno != ENOBUFS)
                conn_dead(c);
            return;
        }
        out_consume(c, (size_t)n);
        if ((size_t)n < total)
            return;
    }
}

static void write_tls(struct conn *c)
{
    if (c->held && !lws_partial_buffered(c->wsi)) {
        c->held = 0;
        lws_rx_flow_control(c->wsi, !c->rx_paused);
    }
    while (c->out && !c->held) {
        size_t n = 0;
        for (struct out_msg *m = c->out; m && n < IC_NET_TX_TLS; m = m->next) {
            size_t part = m->len - m->off < IC_NET_TX_TLS - n ? m->len - m->off : IC_NET_TX_TLS - n;
            memcpy(c->net->tx + LWS_PRE + n, m->data + m->off, part);
            n += part;
        }
        if (lws_write(c->wsi, c->net->tx + LWS_PRE, n, LWS_WRITE_RAW) < 0) {
            conn_dead(c);
            return;
        }
        if (lws_partial_buffered(c->wsi)) {
            c->held = n;
            lws_rx_flow_control(c->wsi, 0);
        }
        out_consume(c, n);
    }
}

/* ---- states ---- */

void conn_touch(struct conn *c)
{
    if (c->dirty || c->settling)
        return;
    c->dirty = true;
    c->dirty_next = c->net->dirty;
    if (c->net->dirty)
        c->net->dirty->dirty_prev = c;
    c->net->dirty = c;
}

void conn_dead(struct conn *c)
{
    c->state = C_DEAD;
    conn_touch(c);
}

void conn_linger(struct conn *c)
{
    if (c->state == C_DEAD)
        return;
    c->state = C_LINGER;
    free(c->stash);
    c->stash = NULL;
    c->stash_len = 0;
    conn_set_due(c, IC_NET_CLOSE_MS);
    conn_touch(c);
}

/* The outbox is empty and nothing more will be said. */
static void linger_written(struct conn *c)
{
    if (c->fin_sent)
        return;
    c->fin_sent = true;
    if (c->net->cfg->tls_cert || c->eof) { /* with TLS lws sends close_notify and waits for the client */
        c->state = C_DEAD;
        return;
    }
    shutdown(c->fd, SHUT_WR);
    conn_set_due(c, IC_NET_LINGER_MS);
}

static void pause_rx(struct conn *c, bool pause)
{
    c->rx_paused = pause;
    if (c->wsi)
        lws_rx_flow_control(c->wsi, !pause && !c->held);
}

static void stash(struct conn *c, const uint8_t *p, size_t len)
{
    uint8_t *grown = realloc(c->stash, c->stash_len + len);
    if (!grown) {
        conn_dead(c);
        return;
    }
    c->stash = grown;
    memcpy(c->stash + c->stash_len, p, len);
    c->stash_len += len;
    if (c->stash_len >= IC_NET_STASH_MAX && !c->rx_paused)
        pause_rx(c, true);
}

static void feed(struct conn *c, const uint8_t *p, size_t len)
{
    while (len) {
        size_t used = len;
        switch (c->state) {
        case C_HEAD: used = http_feed_head(c, p, len); break;
        case C_BODY: used = http_feed_body(c, p, len); break;
        case C_APP: stash(c, p, len); break;
        case C_OPEN:
        case C_CLOSING: used = ws_feed(c, p, len); break;
        case C_LINGER:
        case C_DEAD: break;
        }
        p += used;
        len -= used;
    }
}

void conn_rx(struct conn *c, const uint8_t *p, size_t len)
{
    c->got_bytes = true;
    feed(c, p, len);
    conn_touch(c);
}

/* A client that has got its answer coming may close its half (nc does); one that still waits for it, or
 * a WebSocket, is taken for gone, so that nothing is computed for nobody. */
void conn_eof(struct conn *c)
{
    c->eof = true;
    if (!(c->state == C_APP && c->http.ended) && !(c->state == C_LINGER && c->out))
        conn_dead(c);
    conn_touch(c);
}

/* The exchange is over: what was read ahead is the next request. */
static void feed_stash(struct conn *c)
{
    uint8_t *p = c->stash;
    size_t len = c->stash_len;
    c->stash = NULL;
    c->stash_len = 0;
    if (p)
        feed(c, p, len);
    free(p);
    if (c->rx_paused && c->stash_len < IC_NET_STASH_MAX && c->state != C_DEAD)
        pause_rx(c, false);
}

static void kill_conn(struct conn *c)
{
    struct lws *wsi = c->wsi;
    int fd = c->fd;
    bool graceful = c->fin_sent;
    conn_free(c);
    if (!wsi)
        return;
    /* shut both ways, else lws would wait for the client's FIN with the descriptor still open */
    if (!graceful)
        shutdown(fd, SHUT_RDWR);
    lws_set_timeout(wsi, PENDING_TIMEOUT_USER_OK, LWS_TO_KILL_ASYNC);
}

static void settle(struct conn *c)
{
    c->settling = true;
    for (bool again = true; again && c->state != C_DEAD;) {
        enum conn_state before = c->state;
        size_t stashed = c->stash_len;
        if (c->net->cfg->tls_cert)
            write_tls(c);
        else
            write_plain(c);
        if (c->out || c->held || c->state == C_DEAD)
            break;
        if (c->state == C_APP)
            http_written(c);
        else if (c->state == C_CLOSING)
            ws_written(c);
        if (c->state == C_HEAD && c->stash)
            feed_stash(c);
        if (c->eof && (c->state == C_HEAD || c->state == C_BODY))
            conn_linger(c);
        if (c->eof && c->state == C_APP && !c->http.ended)
            c->state = C_DEAD;
        if (c->state == C_LINGER && !c->out)
            linger_written(c);
        again = c->out || c->state != before || c->stash_len != stashed;
    }
    c->settling = false;
    if (c->state != C_DEAD && !c->wsi)
        plain_watch(c);
    if (c->state == C_DEAD)
        kill_conn(c);
    else if (c->wsi && (c->out || c->held))
        lws_callback_on_writable(c->wsi);
}

void conn_settle_all(struct ic_net *n)
{
    while (n->dirty && !n->closing) {
        struct conn *c = n->dirty;
        undirty(c);
        settle(c);
    }
}

static void timed_out(struct conn *c, int64_t now)
{
    switch (c->state) {
    case C_HEAD:
    case C_BODY:
    case C_APP: http_timeout(c); break;
    case C_OPEN:
    case C_CLOSING: ws_timeout(c, now); break;
    case C_LINGER:
    case C_DEAD: conn_dead(c); break;
    }
}

/* A tick that comes so late tells that this process did not run: it was stopped, its container paused. What clients said
 * meanwhile lies unread; that is no silence of theirs, and is read before anybody's time is up. */
void conn_were_away(struct ic_net *n, int64_t ns)
{
    int64_t now = ic_now_ns(), read_by = now + IC_NET_TICK_MS * IC_MS;

    if (ns < IC_NET_AWAY_MS * IC_MS)
        return;
    for (unsigned i = 0; i < n->slot_count; i++) {
        struct conn *c = n->slots[i];
        if (!c)
            continue;
        if (n->due[i] < read_by)
            n->due[i] = read_by;
        if (c->state == C_OPEN)
            c->ws.rx_ns = c->ws.rx_ns + ns < now ? c->ws.rx_ns + ns : now;
    }
}

int64_t conn_tick(struct ic_net *n)
{
    int64_t now = ic_now_ns(), next = INT64_MAX;
    for (unsigned i = 0; i < n->slot_count; i++) {
        if (n->slots[i] && n->due[i] <= now)
            timed_out(n->slots[i], now);
        if (n->slots[i] && n->due[i] < next)
            next = n->due[i];
    }
    return next;
}

/* ---- what both kinds of peer share ---- */

static size_t peer_pending(struct ic_peer *p)
{
    struct conn *c = conn_of(p);
    return c->pending + c->held - c->frames;
}

static const char *peer_header(struct ic_peer *p, const char *name)
{
    return ic_req_field(&conn_of(p)->http.req, name);
}

const struct ic_peer_vt ic_net_vt = {
    .send = ws_send,
    .close = ws_close,
    .pending = peer_pending,
    .header = peer_header,
    .reply = http_reply,
    .begin = http_begin,
    .chunk = http_chunk,
    .end = http_end,
};
