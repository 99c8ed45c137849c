/* What the files of src/proto share: the state behind a connection. Loop thread. */
#ifndef IC_PROTO_INTERNAL_H
#define IC_PROTO_INTERNAL_H

#include <jansson.h>

#include "proto/fields.h"
#include "proto/server.h"

#define IC_SESSION_ID_LEN 37 /* "sess_" and 32 hex digits */

/* One request under way. */
struct stream {
    struct ic_text_req *req; /* our reference; NULL: the entry is free */
    uint64_t session;        /* handle, 0: none */
    char session_id[IC_SESSION_ID_LEN +
                    1]; /* "": none; kept here, since the session may be closed before the end */
    char id[IC_ID_MAX + 1];
    bool silenced; /* aborted: tokens that were on their way are not sent any more */
};

struct session {
    uint64_t handle;
    char id[IC_SESSION_ID_LEN + 1];
};

/* A simulation of this connection, as far as its events have told. */
struct sim {
    uint64_t handle; /* the engine's number; "sim_<handle>" on the wire */
    unsigned law, height, width;
    int64_t step;
    bool running, made; /* made: SIM_CREATED has come */
};

/* A sim_* message whose answer is awaited: its id is to be echoed. */
struct sim_call {
    struct sim_call *next;
    uint64_t rid;
    char id[];
};

#define IC_SIM_CALLS_MAX 256 /* sim_* messages of one connection that wait for their answer */

enum dialect { DIALECT_NATIVE, DIALECT_ATHERIA };

/* A WebSocket client. Freed in on_close; engines know it as ic_owner_of(peer). */
struct conn {
    struct ic_peer *peer;
    bool authed, metrics, doomed; /* doomed: too slow, being closed */
    char client_id[IC_CLIENT_ID_MAX + 1];
    int sessions_max;
    struct stream *streams; /* cfg.requests_max entries, allocated with the first request */
    int n_streams;          /* entries in use */
    struct session *sessions;
    int n_sessions;
    uint64_t ids_given;
    enum dialect dialect;
    struct sim *sims; /* cfg.sims_per_conn entries, allocated with the first; handle 0: free */
    struct ic_law_farewell *farewell; /* there where `sims` is */
    struct sim_call *calls;           /* at most IC_SIM_CALLS_MAX */
    int n_calls;
    struct ic_sim_cmd *awaiting; /* a sim_create whose binary state is to follow */
    void *atheria;               /* what atheria.c keeps of this connection */
};

struct ic_server {
    struct ic_server_config cfg;
    struct ic_text_engine *text;
    struct ic_law_engine *law;
    struct ic_events *events;
    struct ic_server_hooks hooks;
    struct ic_monitor *monitor; /* NULL: nothing is known of the hardware */
    enum ic_thermal_state told; /* the state that clients know of */
    struct conn **conns;        /* by peer slot; NULL: no WebSocket client there */
    struct ic_peer **waiting;   /* by peer slot: HTTP exchanges that an engine will answer */
    int active;
    bool draining;
    int64_t start_ns, start_wall_s, last_metrics_ns;
    uint64_t last_session, last_sim, last_rid;
    struct ic_buf out;    /* the message being written */
    struct ic_hist write; /* from sampling to the socket */
    _Atomic uint64_t ws_total, http_total, messages, errors, slow_closed;
};

/* server.c */
uint64_t ic_owner_of(const struct ic_peer *p); /* the number by which engines know a connection */
/* The number by which the text engine knows whoever shares with others: the key's where there are keys, whatever the
 * number of its connections, else the connection's own. */
uint64_t ic_client_of(const struct ic_server *s, const struct ic_peer *p, const char *client_id);
/* Of what is said to this client something is missing for want of memory: closes it, so that it does not wait for that. */
void ic_conn_break_off(struct ic_server *s, struct conn *c);
/* Sends s->out as text. A client too slow for it is told so and closed, one for which there is no memory is closed. */
void ic_conn_send(struct ic_server *s, struct conn *c, int64_t stamp_ns);
/* {"op": "error", …, key: what, …}: what it is about, where `what` is not NULL. */
void ic_conn_error_about(struct ic_server *s, struct conn *c, const char *id, const char *key,
                         const char *what, const struct ic_err *err);
/* {"op": "error", …}; id and session may be NULL. */
void ic_conn_error(struct ic_server *s, struct conn *c, const char *id, const char *session,
                   const struct ic_err *err);
/* Begins a message {"op":op in s->out. */
struct ic_buf *ic_reply(struct ic_server *s, const char *op);
void ic_stream_free(struct ic_server *s, struct conn *c, struct stream *st);

/* native.c: the protocol of docs/protocol.md §1 */
void ic_native_hello(struct ic_server *s, struct conn *c);
void ic_native_auth_success(struct ic_server *s, struct conn *c);
void ic_native_message(struct ic_server *s, struct conn *c, const char *data, size_t len);
void ic_native_event(struct ic_server *s, struct conn *c, struct stream *st, const struct ic_event *ev);
void ic_native_metrics(struct ic_server *s); /* to every subscriber */

/* sim.c: the sim_* ops */
bool ic_sim_message(struct ic_server *s, struct conn *c, const char *op, const json_t *top,
                    const json_t *payload, const char *id); /* false: not one of its ops */
/* A seed for a client that names none: one that it can read in JSON and give back, JavaScript's too, so below 2^53.
 * instead: where the system has no random numbers. */
uint64_t ic_sim_seed(uint64_t instead);
/* A binary message: the state of a sim_create. False: none is awaited. */
bool ic_sim_binary(struct ic_server *s, struct conn *c, const char *data, size_t len);
/* One that was thrown away: the sim_create that waits for it fails by it. False: none is awaited. */
bool ic_sim_binary_refused(struct ic_server *s, struct conn *c, const struct ic_err *err);
void ic_sim_event(struct ic_server *s, struct conn *c, struct ic_event *ev);
/* There was no memory for a frame: where no other would follow, the client is not left waiting for it. */
void ic_sim_frame_lost(struct ic_server *s, struct conn *c, const struct ic_sim_info *i);
/* Room for simulations of this connection. False: no memory. */
bool ic_sim_make_room(struct ic_server *s, struct conn *c);
void ic_sim_conn_closed(struct ic_server *s, struct conn *c);
void ic_sim_put_limits(const struct ic_server *s, struct ic_buf *b);
struct sim *ic_sim_of(const struct ic_server *s, const struct conn *c, uint64_t handle);
/* Keeps an id until the answer with this rid comes. IC_BUSY: IC_SIM_CALLS_MAX are waiting already. */
enum ic_status ic_sim_keep_call(struct ic_server *s, struct conn *c, const char *id, uint64_t *rid,
                                struct ic_err *err);
void ic_sim_end_call(struct conn *c, uint64_t rid, char *id);
/* grid, height, width, as far as they are given. */
enum ic_status ic_sim_parse_grid(const struct ic_server *s, const json_t *o, int64_t *grid, int64_t *height,
                                 int64_t *width, struct ic_err *err);
/* {"name":…, "architecture":…, …} of a law. */
void ic_sim_put_law(const struct ic_server *s, unsigned i, struct ic_buf *b);

/* atheria.c: the dialect of /ws */
bool ic_atheria_open(struct ic_server *s, struct conn *c); /* false: no memory */
void ic_atheria_message(struct ic_server *s, struct conn *c, const char *data, size_t len);
void ic_atheria_event(struct ic_server *s, struct conn *c, const struct ic_event *ev);

/* An HTTP exchange that an engine will answer; hangs on peer->app, first member of whatever its maker keeps. */
struct http_job {
    uint64_t rid;
    struct ic_text_req *req; /* text: our reference; Law M: NULL */
    /* Where one exchange makes several text requests: our references to them, in the maker's memory; NULL: none there. Then
     * rid is 0 and req NULL. */
    struct ic_text_req **more;
    int n_more;
    void (*event)(struct ic_server *s, struct ic_peer *p,
                  struct ic_event *ev); /* only those of its rid or of `more` */
    void (*free)(struct http_job *job);
};
/* The exchange waits from now on, and counts as a request under way; when the peer closes, the job is freed and its
 * request cancelled. */
void ic_http_wait(struct ic_server *s, struct ic_peer *p, struct http_job *job);
/* No more events are wanted. */
void ic_http_waited(struct ic_server *s, struct ic_peer *p);

/* status.c: the hardware and its heat */
void ic_status_hello(struct ic_server *s, struct conn *c); /* to a new client, unless all is normal */
void ic_status_tick(struct ic_server *s); /* to everybody, when the thermal state has changed */
void ic_status_put_hw(struct ic_server *s, struct ic_buf *b);
void ic_status_prom(struct ic_server *s, struct ic_buf *b);
const char *ic_status_not_ready(const struct ic_server *s); /* NULL: ready as far as heat goes */

/* predict.c: POST /predict */
void ic_predict_request(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r);

/* openai.c: POST /v1/chat/completions, /v1/completions, /tokenize, /detokenize */
void ic_openai_chat(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r);
void ic_openai_completion(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r);
void ic_openai_tokenize(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r);
void ic_openai_detokenize(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r);

/* embed.c: POST /v1/embeddings */
void ic_openai_embeddings(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r);

/* web.c: the built-in page */
const char *ic_web_page(size_t *len);

/* http.c */
void ic_http_error(struct ic_server *s, struct ic_peer *p, int status, enum ic_status code,
                   const char *text, const char *extra);
void ic_http_request(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *req);
/* The id whose key an exchange shows; NULL where there are no keys. */
const char *ic_http_client(const struct ic_server *s, struct ic_peer *p);

#endif
