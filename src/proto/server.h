/* The protocol layer: one object that serves every connection of the process.
 *
 * It implements struct ic_peer_app (the network calls it), turns messages into requests for the engines and
 * their events into messages. Loop thread only; engines reach it
 * through `events`. */
#ifndef IC_PROTO_SERVER_H
#define IC_PROTO_SERVER_H

#include "hw/monitor.h"
#include "proto/keys.h"
#include "proto/peer.h"
#include "sched/law_engine.h"
#include "sched/text_engine.h"

#define IC_ID_MAX 128               /* bytes of a client's request id */
#define IC_CLIENT_ID_MAX 128        /* bytes of a client id */
#define IC_DEADLINE_MS_MAX 86400000 /* longest deadline_ms */
#define IC_MESSAGES_MAX 1024        /* messages of one request */

struct ic_server_config {
    unsigned connections_max;
    size_t message_max, outbox_max; /* bytes, as given to the network */
    int requests_max;               /* requests under way per connection */
    int sessions_max;               /* sessions per client where its key says nothing else */
    int sims_max;                   /* simulations per connection */
    unsigned grid_max;              /* as given to the Law M engine */
    int queue_max;                  /* as given to the text engine */
    int stall_s;                    /* an engine that has not moved for so long is unhealthy */
    const struct ic_keys *keys;     /* NULL: everybody is welcome */
};

struct ic_server;

/* Everything passed in is borrowed and must outlive the server. */
enum ic_status ic_server_open(struct ic_server **out, const struct ic_server_config *cfg,
                              struct ic_events *events, struct ic_err *err);
void ic_server_close(struct ic_server **s);
/* Engines, NULL: none of the kind (any more). */
void ic_server_set_engines(struct ic_server *s, struct ic_text_engine *text, struct ic_law_engine *law);
/* The hardware monitor, NULL: none. Its `changed` should wake the loop, so that clients hear of it at once. */
void ic_server_set_monitor(struct ic_server *s, struct ic_monitor *monitor);

/* What the network calls, with the server as `app`. */
/* What is known of this process, for whoever looks for the cause after its end: engines, requests, all metrics. The loop. */
void ic_server_dump(struct ic_server *s, struct ic_buf *b);

extern const struct ic_peer_app ic_server_app;

/* Called when the server wants to know or do what only its owner can. Loop thread. */
struct ic_server_hooks {
    void *arg;
    void (*woken)(void *arg);  /* after events were handled: engine states may have changed, signals come */
    void (*ticked)(void *arg); /* once a second, every 100 ms while draining */
};
void ic_server_set_hooks(struct ic_server *s, const struct ic_server_hooks *hooks);

/* No new requests from now on: they get `unavailable`. */
void ic_server_drain(struct ic_server *s);
/* Requests of all connections under way. */
int ic_server_active(const struct ic_server *s);
/* Ends what is still under way: `error` unavailable, `end`. */
void ic_server_cancel_all(struct ic_server *s);

#endif
