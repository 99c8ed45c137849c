/* The network: one port, HTTP and WebSocket, with or without TLS, on libwebsockets. Knows no model and
 * no protocol; it turns bytes into calls of struct ic_peer_app (proto/peer.h).
 *
 * Thread: open, run and close on one thread (the loop). ic_net_wake, ic_net_turn and ic_net_stop from any
 * thread; ic_net_stop also from a signal handler. The loop blocks only in poll. */
#ifndef IC_NET_NET_H
#define IC_NET_NET_H

#include "proto/peer.h"

struct ic_net_config {
    const char *host;     /* address to bind: "127.0.0.1", "::1", "0.0.0.0", "::", a name */
    int port;             /* 0: any free one (see ic_net_port) */
    const char *tls_cert; /* PEM paths, both or neither (NULL) */
    const char *tls_key;
    const char *web_root; /* folder of static files served at '/' for GET, NULL: none */
    /* Of pages that browsers let use this server, with commas between, or "*": they may read what HTTP answers, and no
     * others may open a WebSocket (403) but our own. NULL: no answer is for pages of others, WebSockets are for all. */
    const char *origins;
    unsigned connections_max; /* sockets at once; one more is refused with 503 or closed */
    size_t message_max;       /* bytes of one WebSocket message */
    size_t body_max;          /* bytes of one HTTP request body, else 413 */
    size_t outbox_max;        /* bytes queued to one peer, else IC_BUSY */
    unsigned idle_s;    /* WebSocket: ping after this many idle seconds; all: hang up after twice that */
    unsigned request_s; /* handshake, request head and body must arrive within this, else 408/close */
};

#define IC_NET_TICK_MS 1000  /* between ticks while nothing falls due */
#define IC_NET_CLOSE_MS 2000 /* how long a closing peer may take to read what is queued */

struct ic_net;

/* Binds and listens. IC_BUSY: the address is in use (never shared: no SO_REUSEPORT). IC_BAD_REQUEST: bad
 * address. IC_NOT_FOUND: certificate, key or web_root are missing or broken. `app` and the strings must outlive the net. On error *out is NULL. */
enum ic_status ic_net_open(struct ic_net **out, const struct ic_net_config *cfg,
                           const struct ic_peer_app *app, void *app_arg, struct ic_err *err);
/* Whether `origins` is a list as it should be (NULL is); any thread. IC_BAD_REQUEST names the wrong one. */
enum ic_status ic_net_check_origins(const char *list, struct ic_err *err);
int ic_net_port(const struct ic_net *n); /* the bound TCP port */

/* Serves until ic_net_stop. */
void ic_net_run(struct ic_net *n);
void ic_net_wake(struct ic_net *n); /* coalesced: many wakes, one on_wake */
/* Any thread: the app's on_turn and the writing after it, here and now, while the loop waits in poll. False: on_turn left
 * something, or the loop is at work, or there is TLS (libwebsockets is the loop's alone): ic_net_wake helps. */
bool ic_net_turn(struct ic_net *n);
void ic_net_stop(struct ic_net *n); /* ic_net_run returns soon */

/* Loop thread: no further connections are accepted (the listening socket closes); existing ones go on. */
void ic_net_stop_accepting(struct ic_net *n);
/* Loop thread: close() on every WebSocket peer with the code; HTTP exchanges in flight may finish. */
void ic_net_close_all(struct ic_net *n, uint16_t code, const char *reason);
/* Loop thread: live peers of any kind / sockets open. */
unsigned ic_net_peers(const struct ic_net *n);
/* Loop thread: the peer with this id, or NULL when it has gone. */
struct ic_peer *ic_net_peer(struct ic_net *n, struct ic_peer_id id);

void ic_net_close(struct ic_net **n); /* accepts NULL and *n == NULL; on_close runs for what is left */

#endif
