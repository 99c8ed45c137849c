#include "cli/ws_client.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"

enum { OP_CONT = 0, OP_TEXT = 1, OP_BINARY = 2, OP_CLOSE = 8, OP_PING = 9, OP_PONG = 10 };

struct ic_ws {
    int fd;
    struct ic_buf in; /* bytes received and not yet used */
    size_t used;
};

static enum ic_status send_all(int fd, const void *data, size_t len, struct ic_err *err)
{
    const char *p = data;

    while (len) {
        ssize_t n = send(fd, p, len, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return ic_fail(err, IC_UNAVAILABLE, "the connection broke: %s", strerror(errno));
        p += n;
        len -= (size_t)n;
    }
    return IC_OK;
}

/* Reads some more bytes into w->in. */
static enum ic_status fill(struct ic_ws *w, int64_t until_ns, struct ic_err *err)
{
    struct pollfd pfd = {w->fd, POLLIN, 0};
    char chunk[16384];

    if (w->used) {
        memmove(w->in.data, w->in.data + w->used, w->in.len - w->used);
        w->in.len -= w->used;
        w->used = 0;
    }
    for (;;) {
        int64_t left = until_ns < 0 ? -1 : (until_ns - ic_now_ns()) / IC_MS;
        int rc = poll(&pfd, 1, until_ns < 0 ? -1 : left > 0 ? (int)left : 0);
        if (rc < 0 && errno == EINTR)
            continue;
        if (rc == 0)
            return ic_fail(err, IC_DEADLINE, "nothing came in time");
        ssize_t n = recv(w->fd, chunk, sizeof chunk, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return ic_fail(err, IC_UNAVAILABLE, "the server closed the connection");
        ic_buf_put(&w->in, chunk, (size_t)n);
        return w->in.failed ? ic_fail(err, IC_OOM, "out of memory") : IC_OK;
    }
}

static enum ic_status connect_to(struct ic_ws *w, const char *host, int port, struct ic_err *err)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list, *a;
    char service[16];
    int one = 1;

    snprintf(service, sizeof service, "%d", port);
    int rc = getaddrinfo(host, service, &hints, &list);
    if (rc != 0)
        return ic_fail(err, IC_BAD_REQUEST, "%s: %s", host, gai_strerror(rc));
    for (a = list; a; a = a->ai_next) {
        w->fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
        if (w->fd >= 0 && connect(w->fd, a->ai_addr, a->ai_addrlen) == 0)
            break;
        if (w->fd >= 0)
            close(w->fd);
        w->fd = -1;
    }
    freeaddrinfo(list);
    if (w->fd < 0)
        return ic_fail(err, IC_UNAVAILABLE, "cannot connect to %s port %d: %s", host, port,
                       strerror(errno));
    setsockopt(w->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return IC_OK;
}

#define HANDSHAKE_MS 30000

static enum ic_status shake_hands(struct ic_ws *w, const char *host, int port, const char *path,
                                  const char *headers, struct ic_err *err)
{
    /* The key only guards against caches between browser and server; any 16 bytes do. */
    struct ic_buf req = {0};
    char *end = NULL;
    enum ic_status st;

    ic_buf_printf(&req,
                  "GET %s HTTP/1.1\r\nHost: %s:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                  "Sec-WebSocket-Key: aW5mZXJlbmNlLWNvcmUhIQ==\r\nSec-WebSocket-Version: 13\r\n%s\r\n",
                  path, host, port, headers);
    st = req.failed ? ic_fail(err, IC_OOM, "out of memory") : send_all(w->fd, req.data, req.len, err);
    ic_buf_deinit(&req);
    int64_t until = ic_now_ns() + HANDSHAKE_MS * IC_MS;
    while (st == IC_OK && !end) {
        st = fill(w, until, err);
        end = st == IC_OK ? memmem(w->in.data, w->in.len, "\r\n\r\n", 4) : NULL;
    }
    if (st != IC_OK)
        return st;
    if (w->in.len < 12 || strncmp(w->in.data, "HTTP/1.1 101", 12) != 0) {
        size_t line = (size_t)((char *)memchr(w->in.data, '\r', w->in.len) - w->in.data);
        return ic_fail(err, IC_UNAVAILABLE, "the server answered: %.*s", (int)line, w->in.data);
    }
    w->used = (size_t)(end + 4 - w->in.data);
    return IC_OK;
}

enum ic_status ic_ws_open(struct ic_ws **out, const char *host, int port, const char *path,
                          const char *headers, struct ic_err *err)
{
    struct ic_ws *w = calloc(1, sizeof *w);
    enum ic_status st;

    *out = NULL;
    if (!w)
        return ic_fail(err, IC_OOM, "out of memory");
    w->fd = -1;
    w->in.max = IC_WS_MESSAGE_MAX + 64;
    if ((st = connect_to(w, host, port, err)) != IC_OK ||
        (st = shake_hands(w, host, port, path, headers ? headers : "", err)) != IC_OK) {
        if (w->fd >= 0)
            close(w->fd);
        ic_buf_deinit(&w->in);
        free(w);
        return st;
    }
    *out = w;
    return IC_OK;
}

static enum ic_status send_frame(struct ic_ws *w, int op, const void *data, size_t len, struct ic_err *err)
{
    unsigned char head[14] = {(unsigned char)(0x80 | op)};
    size_t n = 2;

    if (len < 126) {
        head[1] = (unsigned char)(0x80 | len);
    } else if (len < 65536) {
        head[1] = 0x80 | 126;
        head[n++] = (unsigned char)(len >> 8);
        head[n++] = (unsigned char)len;
    } else {
        head[1] = 0x80 | 127;
        for (int i = 7; i >= 0; i--)
            head[n++] = (unsigned char)((uint64_t)len >> (8 * i));
    }
    n += 4; /* a mask of zeros: the payload goes as it is */
    char *whole = malloc(n + len);
    if (!whole)
        return ic_fail(err, IC_OOM, "out of memory");
    memcpy(whole, head, n);
    if (len)
        memcpy(whole + n, data, len);
    enum ic_status st = send_all(w->fd, whole, n + len, err);
    free(whole);
    return st;
}

enum ic_status ic_ws_send(struct ic_ws *w, const void *data, size_t len, bool binary, struct ic_err *err)
{
    return send_frame(w, binary ? OP_BINARY : OP_TEXT, data, len, err);
}

/* One frame: payload stays in w->in at *at. */
static enum ic_status next_frame(struct ic_ws *w, int64_t until, int *op, bool *fin, size_t *at,
                                 size_t *len, struct ic_err *err)
{
    enum ic_status st;

    for (;;) {
        const unsigned char *p = (const unsigned char *)w->in.data + w->used;
        size_t have = w->in.len - w->used, head = 2;
        if (have >= 2) {
            uint64_t n = p[1] & 127;
            head = n == 126 ? 4 : n == 127 ? 10 : 2;
            if (have >= head) {
                if (head > 2) {
                    n = 0;
                    for (size_t i = 2; i < head; i++)
                        n = n << 8 | p[i];
                }
                if (n > IC_WS_MESSAGE_MAX)
                    return ic_fail(err, IC_TOO_LARGE, "the server sent a frame of %llu bytes",
                                   (unsigned long long)n);
                if (have >= head + n) {
                    *op = p[0] & 15;
                    *fin = p[0] & 0x80;
                    *at = w->used + head;
                    *len = (size_t)n;
                    w->used += head + (size_t)n;
                    return IC_OK;
                }
            }
        }
        if ((st = fill(w, until, err)) != IC_OK)
            return st;
    }
}

enum ic_status ic_ws_recv(struct ic_ws *w, struct ic_buf *out, int timeout_ms, int *close_code,
                          struct ic_err *err)
{
    int64_t until = timeout_ms < 0 ? -1 : ic_now_ns() + timeout_ms * IC_MS;
    enum ic_status st;
    bool fin = false;
    int op = 0;
    size_t at = 0, len = 0;

    ic_buf_clear(out);
    if (close_code)
        *close_code = 1006;
    for (;;) {
        if ((st = next_frame(w, until, &op, &fin, &at, &len, err)) != IC_OK)
            return st;
        if (op == OP_CLOSE) {
            const unsigned char *p = (const unsigned char *)w->in.data + at;
            if (close_code)
                *close_code = len >= 2 ? p[0] << 8 | p[1] : 1005;
            return ic_fail(err, IC_UNAVAILABLE, "the server closed the connection");
        }
        if (op == OP_PING) {
            if ((st = send_frame(w, OP_PONG, w->in.data + at, len, err)) != IC_OK)
                return st;
        } else if (op != OP_PONG) {
            ic_buf_put(out, w->in.data + at, len);
            if (!fin)
                continue;
            if (!ic_buf_reserve(out, 1))
                return ic_fail(err, IC_OOM, "out of memory");
            out->data[out->len] = 0;
            return IC_OK;
        }
    }
}

int ic_ws_fd(const struct ic_ws *w)
{
    return w->fd;
}

void ic_ws_close(struct ic_ws **wp)
{
    struct ic_ws *w = *wp;

    if (!w)
        return;
    send_frame(w, OP_CLOSE, "\x03\xE8", 2, NULL);
    close(w->fd);
    ic_buf_deinit(&w->in);
    free(w);
    *wp = NULL;
}
