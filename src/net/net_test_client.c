/* See net_test_client.h. Threads: client functions on the test's; app functions on the loop thread. */
#include "net/net_test_client.h"

#include <arpa/inet.h>
#include <endian.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "base/clock.h"

/* ---- client ---- */

int cl_connect(int port)
{
    struct sockaddr_in sa = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    sa.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    struct timeval tv = {.tv_sec = 10};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv);
    if (connect(fd, (struct sockaddr *)&sa, sizeof sa)) {
        close(fd);
        return -1;
    }
    return fd;
}

bool cl_write(int fd, const void *data, size_t len)
{
    for (const char *p = data; len;) {
        ssize_t n = send(fd, p, len, MSG_NOSIGNAL);
        if (n <= 0)
            return false;
        p += n;
        len -= (size_t)n;
    }
    return true;
}

bool cl_puts(int fd, const char *s)
{
    return cl_write(fd, s, strlen(s));
}

bool cl_read(int fd, void *out, size_t len)
{
    for (char *p = out; len;) {
        ssize_t n = recv(fd, p, len, 0);
        if (n <= 0)
            return false;
        p += n;
        len -= (size_t)n;
    }
    return true;
}

bool cl_eof(int fd)
{
    char sink[4096];
    ssize_t n;
    while ((n = recv(fd, sink, sizeof sink, 0)) > 0)
        ;
    return n == 0;
}

static bool read_line(int fd, char *out, size_t size, size_t *len)
{
    size_t start = *len;
    do {
        if (*len + 1 >= size || !cl_read(fd, out + *len, 1))
            return false;
    } while (out[(*len)++] != '\n');
    out[*len] = 0;
    return *len > start;
}

static bool read_chunks(int fd, struct cl_answer *a)
{
    for (;;) {
        char line[64];
        size_t n = 0;
        if (!read_line(fd, line, sizeof line, &n))
            return false;
        size_t size = strtoul(line, NULL, 16);
        a->body = realloc(a->body, a->len + size + 3);
        if (!cl_read(fd, a->body + a->len, size + 2))
            return false;
        a->len += size;
        a->body[a->len] = 0;
        if (!size)
            return true;
    }
}

int cl_answer(int fd, struct cl_answer *a, bool is_head)
{
    size_t n = 0;
    free(a->body);
    *a = (struct cl_answer){.status = -1};
    do {
        if (!read_line(fd, a->head, sizeof a->head, &n))
            return -1;
    } while (n < 4 || strcmp(a->head + n - 4, "\r\n\r\n"));
    a->status = atoi(a->head + 9);
    const char *length = strstr(a->head, "Content-Length: ");
    if (is_head || a->status == 100)
        return a->status;
    if (strstr(a->head, "chunked"))
        return read_chunks(fd, a) ? a->status : -1;
    if (length) {
        a->len = strtoul(length + 16, NULL, 10);
        a->body = calloc(1, a->len + 1);
        if (!cl_read(fd, a->body, a->len))
            return -1;
    }
    return a->status;
}

int cl_get(int port, const char *request, struct cl_answer *a)
{
    int fd = cl_connect(port);
    cl_puts(fd, request);
    int status = cl_answer(fd, a, false);
    close(fd);
    return status;
}

int cl_ws_open(int port, const char *path, const char *extra)
{
    char text[1024];
    struct cl_answer a = {0};
    int fd = cl_connect(port);
    snprintf(text, sizeof text,
             "GET %s HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
             "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n%s\r\n",
             path, extra);
    cl_puts(fd, text);
    if (cl_answer(fd, &a, true) != 101 || !strstr(a.head, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")) {
        close(fd);
        return -1;
    }
    return fd;
}

bool cl_ws_frame(int fd, uint8_t first, const void *data, size_t len)
{
    uint8_t head[14] = {first}, mask[4] = {0x12, 0xfe, 0x45, 0x80};
    size_t n = 2;
    if (len < 126) {
        head[1] = (uint8_t)(0x80 | len);
    } else if (len < 65536) {
        uint16_t be = htobe16((uint16_t)len);
        head[1] = 0x80 | 126;
        memcpy(head + 2, &be, 2);
        n = 4;
    } else {
        uint64_t be = htobe64(len);
        head[1] = 0x80 | 127;
        memcpy(head + 2, &be, 8);
        n = 10;
    }
    memcpy(head + n, mask, 4);
    uint8_t *masked = malloc(len + n + 4);
    memcpy(masked, head, n + 4);
    for (size_t i = 0; i < len; i++)
        masked[n + 4 + i] = ((const uint8_t *)data)[i] ^ mask[i & 3];
    bool ok = cl_write(fd, masked, len + n + 4);
    free(masked);
    return ok;
}

bool cl_ws_text(int fd, const char *s)
{
    return cl_ws_frame(fd, 0x81, s, strlen(s));
}

int cl_ws_next(int fd, char **data, size_t *len)
{
    uint8_t head[2], ext[8];
    *data = NULL;
    *len = 0;
    if (!cl_read(fd, head, 2))
        return -1;
    size_t n = head[1]; /* a server must not mask: bit 7 would make this a wrong length */
    if (n == 126) {
        if (!cl_read(fd, ext, 2))
            return -1;
        n = (size_t)ext[0] << 8 | ext[1];
    } else if (n == 127) {
        uint64_t be;
        if (!cl_read(fd, &be, 8))
            return -1;
        n = be64toh(be);
    }
    *data = calloc(1, n + 1);
    *len = n;
    return cl_read(fd, *data, n) ? head[0] : -1;
}

bool cl_ws_expect(int fd, uint8_t first, const char *payload)
{
    char *data;
    size_t len;
    int got = cl_ws_next(fd, &data, &len);
    bool ok = got == first && len == strlen(payload) && !memcmp(data, payload, len);
    if (!ok)
        fprintf(stderr, "expected %02x \"%.60s\", got %02x \"%.60s\"\n", (unsigned)first, payload,
                (unsigned)got, data ? data : "");
    free(data);
    return ok;
}

int cl_ws_close_code(int fd)
{
    for (;;) {
        char *data;
        size_t len;
        int got = cl_ws_next(fd, &data, &len);
        int code = len >= 2 ? (uint8_t)data[0] << 8 | (uint8_t)data[1] : 0;
        free(data);
        if (got == 0x88)
            return code;
        if (got < 0)
            return -1;
    }
}

/* ---- app ---- */

static enum ic_status on_handshake(void *app, struct ic_peer *p, struct ic_err *err)
{
    (void)app;
    if (!strcmp(p->path, "/deny"))
        return ic_fail(err, IC_UNAUTHORIZED, "who is %s?", p->vt->header(p, "x-client-id"));
    return IC_OK;
}

static void on_open(void *app, struct ic_peer *p)
{
    struct srv *s = app;
    s->opened++;
    s->target = p->id;
    p->app = s;
    if (!strcmp(p->path, "/hello"))
        p->vt->send(p, IC_MSG_TEXT, "hello", 5, 0);
}

/* "close CODE REASON", "flood KIND COUNT SIZE" (KIND t or f), "header NAME"; anything else is echoed. */
static void on_message(void *app, struct ic_peer *p, const char *data, size_t len, bool binary)
{
    struct srv *s = app;
    unsigned code, count, size;
    char word[64], kind;
    if (data[len])
        abort(); /* the promised NUL */
    if (sscanf(data, "close %u %63s", &code, word) == 2) {
        p->vt->close(p, (uint16_t)code, word);
        if (p->vt->send(p, IC_MSG_TEXT, "x", 1, 0) == IC_OK)
            abort(); /* nothing goes after close() */
    } else if (sscanf(data, "flood %c %u %u", &kind, &count, &size) == 3) {
        char *buf = malloc(size);
        memset(buf, 'x', size);
        for (unsigned i = 0; i < count; i++) {
            buf[0] = (char)i;
            if (p->vt->send(p, kind == 'f' ? IC_MSG_FRAME : IC_MSG_BINARY, buf, size, 0) == IC_BUSY)
                s->busy++;
            if (p->vt->pending(p) > s->cfg.outbox_max)
                abort();
        }
        free(buf);
        s->lost = p->frames_lost;
    } else if (sscanf(data, "header %63s", word) == 1) {
        const char *v = p->vt->header(p, word);
        p->vt->send(p, IC_MSG_TEXT, v, strlen(v), 0);
    } else {
        p->vt->send(p, binary ? IC_MSG_BINARY : IC_MSG_TEXT, data, len, ic_now_ns());
    }
}

static void on_refused(void *app, struct ic_peer *p, const struct ic_err *err, bool binary)
{
    (void)binary;
    struct srv *s = app;
    s->refused++;
    p->vt->send(p, IC_MSG_TEXT, ic_status_name(err->code), strlen(ic_status_name(err->code)), 0);
}

static void on_close(void *app, struct ic_peer *p)
{
    (void)p;
    ((struct srv *)app)->closed++;
}

static void on_http(void *app, struct ic_peer *p, const struct ic_http_req *r)
{
    struct srv *s = app;
    if (r->body[r->len])
        abort();
    if (!strcmp(r->path, "/later")) {
        s->later = p->id;
    } else if (!strcmp(r->path, "/sse")) {
        p->vt->begin(p, 200, "text/event-stream", "X-Extra: 1\r\n");
        p->vt->chunk(p, "data: 1\n\n", 9, 0);
        p->vt->chunk(p, "data: 2\n\n", 9, 0);
        p->vt->end(p);
    } else if (!strcmp(r->path, "/echo")) {
        p->vt->reply(p, 200, "text/plain", NULL, r->body, r->len);
    } else if (!strcmp(r->path, "/big")) {
        size_t size = 8u << 20;
        char *big = calloc(1, size);
        p->vt->reply(p, 200, "application/octet-stream", NULL, big, size);
        free(big);
    } else {
        char text[512];
        int n = snprintf(text, sizeof text, "%s %s ?%s %s", r->method, r->path, r->query,
                         p->vt->header(p, "x-ic-test"));
        p->vt->reply(p, 404, "text/plain", NULL, text, (size_t)n);
    }
    s->http++;
}

static void on_wake(void *app)
{
    struct srv *s = app;
    struct ic_peer *p;
    int command = s->command;
    s->wakes++;
    s->peers = ic_net_peers(s->net);
    switch (command) {
    case CMD_CLOSE_ALL: ic_net_close_all(s->net, 1001, "bye"); break;
    case CMD_STOP_ACCEPTING: ic_net_stop_accepting(s->net); break;
    case CMD_ANSWER_LATER:
        if ((p = ic_net_peer(s->net, s->later)))
            p->vt->reply(p, 200, NULL, NULL, "late", 4);
        break;
    case CMD_SEND_TARGET:
        if ((p = ic_net_peer(s->net, s->target)))
            p->vt->send(p, IC_MSG_TEXT, "token", 5, s->wake_ns);
        break;
    default: break;
    }
    s->command = CMD_NONE;
}

/* On whatever thread has the turn: one token a call. True when the test does not say that there is more. */
static bool on_turn(void *app)
{
    struct srv *s = app;
    struct ic_peer *p = ic_net_peer(s->net, s->target);

    if (p)
        p->vt->send(p, IC_MSG_TEXT, "token", 5, s->wake_ns);
    return !s->more;
}

/* On the loop right after on_wake: by now what on_wake sent has been given to its socket. */
static void on_settled(void *app)
{
    struct srv *s = app;
    s->settled++;
    s->written_at_settled = s->written;
}

static void on_tick(void *app)
{
    (void)app;
}

static void on_written(void *app, int64_t ns)
{
    struct srv *s = app;
    if (ns < 0)
        abort();
    s->written_ns[s->written % SRV_TIMES] = ns;
    s->written++;
}

static const struct ic_peer_app test_app = {on_handshake, on_open, on_message, on_refused,
                                            on_close,     on_http, on_wake,    on_turn,
                                            on_settled,   on_tick, on_written};

/* ---- server ---- */

struct ic_net_config srv_config(void)
{
    return (struct ic_net_config){.host = "127.0.0.1",
                                  .connections_max = 2000,
                                  .message_max = 300000,
                                  .body_max = 100000,
                                  .outbox_max = 1 << 20,
                                  .idle_s = 60,
                                  .request_s = 60};
}

static void *loop(void *arg)
{
    ic_net_run(((struct srv *)arg)->net);
    return NULL;
}

void srv_start(struct srv *s, const struct ic_net_config *cfg)
{
    struct ic_err err = {0};
    pthread_t t;
    memset(s, 0, sizeof *s);
    s->cfg = *cfg;
    if (ic_net_open(&s->net, &s->cfg, &test_app, s, &err)) {
        fprintf(stderr, "open: %s\n", err.msg);
        abort();
    }
    s->port = ic_net_port(s->net);
    pthread_create(&t, NULL, loop, s);
    s->thread = t;
}

void srv_stop(struct srv *s)
{
    ic_net_stop(s->net);
    pthread_join(s->thread, NULL);
    ic_net_close(&s->net);
}

void srv_command(struct srv *s, int command)
{
    s->command = command;
    ic_net_wake(s->net);
    int64_t give_up = ic_now_ns() + 10000 * IC_MS;
    while (s->command != CMD_NONE && ic_now_ns() < give_up)
        usleep(200);
}

void srv_wait(atomic_int *v, int value)
{
    int64_t give_up = ic_now_ns() + 10000 * IC_MS;
    while (*v < value && ic_now_ns() < give_up)
        usleep(200);
}

unsigned srv_peers(struct srv *s)
{
    srv_command(s, CMD_PEERS);
    return s->peers;
}

void srv_settled(struct srv *s)
{
    srv_command(s, CMD_PEERS);
    srv_command(s, CMD_PEERS);
}

void srv_drained(struct srv *s)
{
    int64_t give_up = ic_now_ns() + 10000 * IC_MS;
    while (srv_peers(s) && ic_now_ns() < give_up)
        usleep(1000);
}
