/* Inside the network layer: what net.c, conn.c, http.c, ws.c and their helpers share. Nobody else
 * includes this.
 *
 * What libwebsockets does here: the loop, TLS, timers and the wake-up from other threads. What it does not
 * do: speak HTTP and WebSocket. Its 4.1 roles accept unmasked client frames, drop a client that names an
 * unknown subprotocol, know no chunked request bodies, answer no 408, and give no way to throw the rest of
 * a too long message away and go on; all of that is promised by peer.h. So head.c, http.c and ws.c read the
 * bytes. TLS connections are adopted in lws' raw role; plain ones lie beside it, for lws' poll(2) is slow
 * with many of them (plain.c).
 *
 * Thread: the loop. Only ic_net.wake and ic_net.stop are touched by others (atomic).
 *
 * Invariants
 * - A connection is in the slot table from accept to conn_free; `due[slot]` is 0 when the slot is free.
 * - The app is called from lws callbacks and timers only, never from inside a vt function: vt functions
 *   queue and put the connection on the dirty list; conn_settle_all, which every entry from lws ends
 *   with, writes, moves states on and reports. So a wake-up writes to the socket in the same turn.
 * - on_close is owed exactly while `app_live`. */
#ifndef IC_NET_NET_I_H
#define IC_NET_NET_I_H

#include <libwebsockets.h>
#include <pthread.h>
#include <stdatomic.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/log.h"
#include "net/head.h"
#include "net/net.h"

#define IC_NET_LISTEN_MAX 4       /* addresses one host name may stand for */
#define IC_NET_LOBBY 64           /* sockets past connections_max that are kept to be told 503 */
#define IC_NET_STASH_MAX 65536    /* bytes read ahead while an answer is awaited */
#define IC_NET_AWAY_MS 2000       /* a tick that is as late: the whole process stood still */
#define IC_NET_RX 65536           /* one read */
#define IC_NET_TX_TLS 16384       /* one TLS record */
#define IC_NET_LINGER_MS 1000     /* wait for the client's FIN after ours */
#define IC_NET_PONGS_MAX 64       /* unsent pongs of one peer; the last answers all pings that come then */
#define IC_NET_CLOSE_WAIT_MS 1000 /* wait for the client's close frame after ours left */

/* HTTP:      HEAD -> BODY -> APP -> HEAD … (keep-alive) or LINGER
 * WebSocket: HEAD -> OPEN -> CLOSING -> LINGER
 * LINGER flushes, sends FIN and throws away what comes, so that an unread request does not make the
 * kernel reset the connection under the answer. Any state -> DEAD on errors and time-outs; a DEAD
 * connection is freed by the settle that meets it. */
enum conn_state { C_HEAD, C_BODY, C_APP, C_OPEN, C_CLOSING, C_LINGER, C_DEAD };

enum out_kind { OUT_DATA, OUT_FRAME, OUT_PONG, OUT_CONTROL };

struct out_msg {
    struct out_msg *next;
    size_t len, off;
    int64_t stamp;
    enum out_kind kind;
    uint8_t data[];
};

struct http_state {
    struct ic_buf head; /* bytes of a head that is not complete */
    struct ic_buf body;
    struct ic_req req;
    struct ic_chunked chunked;
    uint64_t left;       /* Content-Length: bytes to come */
    bool begun, ended;   /* the answer has been started / is complete */
    bool chunked_answer; /* streamed with chunked coding (HTTP/1.1), else until close */
    bool first_done;     /* an exchange was completed: an idle time-out is not worth a 408 */
};

struct ws_state {
    struct ic_buf msg; /* the message being joined */
    int64_t rx_ns;     /* last byte from the client */
    uint64_t left;     /* payload bytes of this frame to come */
    uint8_t hdr[14];   /* frame header so far */
    uint8_t hdr_len;
    uint8_t mask_at;
    uint8_t control_len;
    uint8_t control[125];
    bool in_payload, in_message, binary, discard;
    bool pinged;
    bool deaf;         /* protocol error: nothing the client sends can be understood any more */
    bool close_queued; /* a close frame is in the outbox or left */
    bool close_got;    /* the client's close frame arrived */
};

struct conn {
    struct ic_peer peer; /* first: vt functions cast */
    uint32_t magic;
    enum conn_state state;
    struct ic_net *net;
    struct lws *wsi; /* TLS only, else NULL */
    int fd;
    uint32_t events; /* plain: what epoll watches for */
    bool lobby;      /* past connections_max: the first request is answered 503 */
    bool got_bytes;  /* the client said something (so its TLS handshake is done) */
    bool app_live;   /* on_close is owed */
    bool dirty, settling;
    bool rx_paused;
    bool fin_sent;
    bool eof; /* plain: the client has sent its FIN, but may still read */
    struct conn *dirty_next, *dirty_prev;
    struct out_msg *out, *out_tail;
    size_t pending; /* bytes in out, less what left */
    /* of those, bytes of FRAMEs that have not begun to leave: they give way to anything else */
    size_t frames;
    size_t held; /* TLS: bytes lws keeps for itself after a partial write */
    unsigned pongs;
    struct out_msg *last_pong; /* valid while pongs > 0 */
    uint8_t *stash;            /* read ahead of the answer under way */
    size_t stash_len;
    struct http_state http;
    struct ws_state ws;
};

/* A descriptor that is no connection, watched by lws: listening sockets and the epoll instance. */
struct source {
    struct ic_net *net;
    struct lws *wsi;
    int fd; /* -1: closed */
    void (*ready)(struct source *);
};

struct ic_net {
    const struct ic_net_config *cfg;
    struct ic_net_config cfg_copy;
    const struct ic_peer_app *app;
    void *arg;
    struct lws_context *ctx;
    struct lws_vhost *vhost;
    struct source poller; /* plain sockets; see plain.c */
    struct source listeners[IC_NET_LISTEN_MAX];
    unsigned listener_count;
    int port;
    int spare_fd; /* given up for a moment to refuse a connection when fds have run out */
    bool draining, closing, listen_paused;
    atomic_bool wake, stop;
    /* of all below and every conn: the loop's but while it is in poll; recursive, for lws calls back */
    pthread_mutex_t turn;
    struct source ticker;
    int64_t tick_ns; /* when it goes off */
    bool busy_ticks;
    struct conn **slots;
    int64_t *due; /* when to look at the connection in this slot; INT64_MAX: never */
    uint32_t *gens;
    /* the app has room for slots below connections_max; the lobby lies above */
    uint32_t *free_slots, *free_lobby;
    unsigned slot_count, free_count, lobby_count, used;
    struct conn *dirty;
    uint8_t *rx; /* IC_NET_RX */
    uint8_t *tx; /* LWS_PRE + IC_NET_TX_TLS */
};

#define IC_CONN_MAGIC 0x1cc0117eu
#define conn_check(c) IC_ASSERT((c)->magic == IC_CONN_MAGIC)

static inline struct conn *conn_of(struct ic_peer *p)
{
    struct conn *c = (struct conn *)p;
    conn_check(c);
    return c;
}

/* Frees the bytes, keeps the bound. */
static inline void buf_release(struct ic_buf *b)
{
    size_t max = b->max;
    ic_buf_deinit(b);
    b->max = max;
}

/* listen.c */
enum ic_status ic_listen(struct ic_net *n, struct ic_err *err);
void ic_accept(struct source *l);
/* Takes no more connections, or does again. */
void ic_listen_pause(struct ic_net *n, bool pause);

/* plain.c */
bool plain_add(struct conn *c);
void plain_watch(struct conn *c); /* tells epoll what is waited for */
void plain_ready(struct source *s);

/* conn.c */
struct conn *conn_new(struct ic_net *n, int fd);
void conn_free(struct conn *c);
void conn_rx(struct conn *c, const uint8_t *p, size_t len);
void conn_eof(struct conn *c);   /* the client will send no more */
void conn_touch(struct conn *c); /* settle this one before lws gets the thread back */
void conn_settle_all(struct ic_net *n);
void conn_were_away(struct ic_net *n, int64_t ns); /* how late the tick is */
int64_t conn_tick(struct ic_net *n);               /* when the next one is due (ic_now_ns) */
void net_tick_by(struct ic_net *n, int64_t at_ns); /* the next tick comes then at the latest */
void conn_set_due(struct conn *c, int64_t ms);
void conn_linger(struct conn *c);
void conn_dead(struct conn *c);
void conn_app_open(struct conn *c, enum ic_peer_kind kind); /* a new id; on_close is owed from now */
void conn_app_close(struct conn *c);
struct out_msg *conn_msg(size_t len); /* len bytes of room, NULL: out of memory */
void conn_queue(struct conn *c, struct out_msg *m);
void conn_drop_frame(struct conn *c, struct out_msg *prev);

/* http.c: all return bytes used */
size_t http_feed_head(struct conn *c, const uint8_t *p, size_t len);
size_t http_feed_body(struct conn *c, const uint8_t *p, size_t len);
void http_written(struct conn *c);                            /* the outbox has been emptied */
void http_error(struct conn *c, int status, const char *msg); /* net's own answer, then closes */
void http_answer(struct conn *c, int status, const char *type, const char *extra, const void *body,
                 size_t len);
void http_timeout(struct conn *c);
void http_deinit(struct conn *c);
void http_reply(struct ic_peer *p, int status, const char *type, const char *extra, const void *body,
                size_t len);
void http_begin(struct ic_peer *p, int status, const char *type, const char *extra);
enum ic_status http_chunk(struct ic_peer *p, const void *data, size_t len, int64_t stamp_ns);
void http_end(struct ic_peer *p);

/* ws.c */
void ws_upgrade(struct conn *c);
size_t ws_feed(struct conn *c, const uint8_t *p, size_t len);
void ws_written(struct conn *c);
void ws_timeout(struct conn *c, int64_t now);
enum ic_status ws_send(struct ic_peer *p, enum ic_peer_msg kind, const void *data, size_t len,
                       int64_t stamp_ns);
void ws_close(struct ic_peer *p, uint16_t code, const char *reason);

/* origin.c */
/* What Access-Control-Allow-Origin is to say: the request's origin, "*", or NULL: nothing. */
const char *origin_answer(const struct ic_net_config *cfg, const struct ic_req *r);
bool origin_may_connect(const struct ic_net_config *cfg, const struct ic_req *r); /* by WebSocket */
/* True when the request was a browser's question and has been answered. */
bool origin_preflight(struct conn *c);

/* static.c: true when the request has been answered with a file of web_root */
bool static_serve(struct conn *c);

extern const struct ic_peer_vt ic_net_vt;

#endif
