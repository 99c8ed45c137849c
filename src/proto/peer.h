/* A connection as the protocol layer sees it, and what the network layer owes it.
 *
 * `net` implements the functions of struct ic_peer_vt and calls the ones of struct ic_peer_app; neither
 * side knows the other's types. Everything here runs on the loop thread (or, while that waits, on one that
 * takes its turn: on_turn; never on two at once), never blocks and never re-enters: a call from app to peer only queues work, it does not call back before it returns.
 *
 * A peer is owned by `net`. It is valid from on_open (WebSocket) or on_http (one HTTP exchange) until
 * on_close returns; other threads name it by slot and generation only. */
#ifndef IC_PROTO_PEER_H
#define IC_PROTO_PEER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* Names a connection for other threads. A slot is reused, a (slot, gen) pair never within a run. */
struct ic_peer_id {
    uint32_t slot, gen; /* gen 0: nobody */
};

enum ic_peer_kind { IC_PEER_WS, IC_PEER_HTTP };

enum ic_peer_msg {
    IC_MSG_TEXT,   /* WebSocket text; must be valid UTF-8 */
    IC_MSG_BINARY, /* WebSocket binary */
    IC_MSG_FRAME,  /* binary that may be dropped, oldest first, when the outbox is full */
};

struct ic_peer {
    const struct ic_peer_vt *vt;
    struct ic_peer_id id;
    enum ic_peer_kind kind;
    const char *path;     /* WebSocket: path of the handshake, no query; valid while the peer is */
    void *app;            /* the protocol layer's own state, NULL at first */
    uint64_t frames_lost; /* IC_MSG_FRAME messages dropped so far */
};

struct ic_peer_vt {
    /* WebSocket. Copies data. stamp_ns (0: none) is the time the content was made; it is handed to
     * app->on_written when the bytes have been given to the socket. IC_BUSY when the outbox bound would
     * be passed (nothing was queued), IC_OOM. Where room is short, FRAMEs of this peer that have not begun to
     * leave are dropped first, oldest first, whatever is to be sent; peer->frames_lost goes up by as many
     * (and by one for a FRAME that does not fit itself). */
    enum ic_status (*send)(struct ic_peer *, enum ic_peer_msg, const void *data, size_t len,
                           int64_t stamp_ns);
    /* WebSocket. Sends what is queued (for at most IC_NET_CLOSE_MS), then a close frame with the code
     * (RFC 6455: 1000, 1001, 1008, 1009, 1013 …) and reason (at most 123 bytes), then closes. */
    void (*close)(struct ic_peer *, uint16_t code, const char *reason);
    /* Bytes queued and not yet written, less the FRAMEs that would give way; the bound is the config's outbox_max. */
    size_t (*pending)(struct ic_peer *);
    /* WebSocket or HTTP: value of a request header of the handshake / request, lower-case name,
     * "" when absent; valid until the callback in which it was asked for returns. Only the names that
     * `net` keeps: authorization, x-client-id, x-api-key, content-type, accept and the x-ic-* ones. */
    const char *(*header)(struct ic_peer *, const char *name);
    /* HTTP. A whole answer: status, content type (NULL: none), extra headers ("Name: value\r\n" lines
     * or NULL), body (copied). Exactly once per exchange, unless begin/chunk/end are used. */
    void (*reply)(struct ic_peer *, int status, const char *type, const char *extra, const void *body,
                  size_t len);
    /* HTTP. A streamed answer (SSE): begin, then chunks (copied; IC_BUSY past the outbox bound), then
     * end. The connection stays usable for the next request where HTTP allows it. */
    void (*begin)(struct ic_peer *, int status, const char *type, const char *extra);
    enum ic_status (*chunk)(struct ic_peer *, const void *data, size_t len, int64_t stamp_ns);
    void (*end)(struct ic_peer *);
};

struct ic_http_req {
    const char *method; /* "GET", "POST", "HEAD", "OPTIONS", "DELETE" … */
    const char *path;   /* decoded, starts with '/', no query */
    const char *query;  /* raw text after '?', "" when absent */
    const char *body;   /* len bytes and then a NUL; valid during on_http */
    size_t len;
};

/* What the protocol layer implements. `app` is passed back as given to the network layer. */
struct ic_peer_app {
    /* Handshake, before the upgrade: IC_OK to accept. Otherwise the HTTP status of the code is sent
     * with the body {"error":msg}. The peer has only header() and path at this time. */
    enum ic_status (*on_handshake)(void *app, struct ic_peer *, struct ic_err *);
    void (*on_open)(void *app, struct ic_peer *);
    /* One whole message of at most message_max bytes, text already checked to be UTF-8 and NUL-terminated. */
    void (*on_message)(void *app, struct ic_peer *, const char *data, size_t len, bool binary);
    /* A message that was refused and thrown away: IC_TOO_LARGE (past message_max) or IC_BAD_REQUEST (a
     * text message that is not UTF-8; `net` closes with 1007 after this returns). */
    void (*on_refused)(void *app, struct ic_peer *, const struct ic_err *, bool binary);
    /* The peer is gone, WebSocket or HTTP exchange (also a finished one). No call on it after this. */
    void (*on_close)(void *app, struct ic_peer *);
    /* One HTTP request, body complete. The app answers now or later (reply, or begin/chunk/end). */
    void (*on_http)(void *app, struct ic_peer *, const struct ic_http_req *);
    /* Another thread called ic_net_wake: drain queues. */
    void (*on_wake)(void *app);
    /* Any thread, while the loop waits (ic_net_turn): write what of the queues needs nothing but sockets. False: there
     * is more, for the loop. */
    bool (*on_turn)(void *app);
    /* What on_wake or on_turn queued has been written, as far as the sockets took it. */
    void (*on_settled)(void *app);
    /* Every IC_NET_TICK_MS or more often; every 100 ms from ic_net_stop_accepting on. */
    void (*on_tick)(void *app);
    /* A stamped message has been written to its socket; `ns` after its stamp. */
    void (*on_written)(void *app, int64_t ns);
};

#endif
