/* For net_test.c: a raw client (blocking sockets that give up after 10 s) and the app under test with
 * its loop thread. Test code only. */
#ifndef IC_NET_TEST_CLIENT_H
#define IC_NET_TEST_CLIENT_H

#include <stdatomic.h>

#include "net/net.h"

/* ---- client; -1 or false on end of stream, reset or give-up ---- */
int cl_connect(int port);
bool cl_write(int fd, const void *data, size_t len);
bool cl_puts(int fd, const char *s);
bool cl_read(int fd, void *out, size_t len);
bool cl_eof(int fd); /* the server closed; reads and drops what is before */
/* One HTTP answer: the head (NUL-terminated), the status returned, body by Content-Length or chunked. */
struct cl_answer {
    int status;
    char head[4096];
    char *body; /* freed by the next call with the same struct; zero-initialise */
    size_t len;
};
int cl_answer(int fd, struct cl_answer *a, bool is_head);
int cl_get(int port, const char *request, struct cl_answer *a);        /* connect, send, answer, close */
int cl_ws_open(int port, const char *path, const char *extra);         /* the fd after a 101 */
bool cl_ws_frame(int fd, uint8_t first, const void *data, size_t len); /* masked */
bool cl_ws_text(int fd, const char *s);
/* The next frame: first byte, or -1; *len bytes of payload (malloc, NUL-terminated) in *data. */
int cl_ws_next(int fd, char **data, size_t *len);
bool cl_ws_expect(int fd, uint8_t first, const char *payload);
int cl_ws_close_code(int fd); /* skips frames up to a close frame; its code, 0: none, -1: no close */

/* ---- server: text messages are commands, see net_test_client.c ---- */
#define SRV_TIMES 4096
struct srv {
    struct ic_net *net;
    struct ic_net_config cfg;
    int port;
    unsigned long thread;
    atomic_int settled, written_at_settled; /* on_settled: calls, and `written` as the last one saw it */
    atomic_int opened, closed, http, wakes, refused, written, command, busy;
    atomic_uint peers;
    atomic_ullong lost;
    _Atomic int64_t wake_ns;
    atomic_bool more;              /* on_turn leaves something */
    int64_t written_ns[SRV_TIMES]; /* entry i: set before written becomes i + 1 */
    struct ic_peer_id later, target;
};
enum { CMD_NONE, CMD_PEERS, CMD_CLOSE_ALL, CMD_STOP_ACCEPTING, CMD_ANSWER_LATER, CMD_SEND_TARGET };

struct ic_net_config srv_config(void);
void srv_start(struct srv *s, const struct ic_net_config *cfg);
void srv_stop(struct srv *s);
void srv_command(struct srv *s, int command); /* done when this returns */
void srv_wait(atomic_int *v, int value);      /* until *v >= value, 10 s */
unsigned srv_peers(struct srv *s);
void srv_settled(struct srv *s); /* every callback under way has returned */
void srv_drained(struct srv *s); /* waits until no peer is left */

#endif
