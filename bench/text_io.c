#include "text_io.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "cli/ws_client.h"

#define STREAMS_MAX 256

void text_fail(const char *what)
{
    fprintf(stderr, "text-bench: %s\n", what);
    exit(1);
}

static double number_after(const char *text, const char *key)
{
    const char *p = strstr(text, key);
    return p ? strtod(p + strlen(key), NULL) : 0;
}

static void note_token(struct text_stream *s, int64_t now)
{
    if (s->n == s->cap) {
        s->cap = s->cap * 2 + 64;
        s->at_ns = realloc(s->at_ns, sizeof *s->at_ns * (size_t)s->cap);
        if (!s->at_ns)
            text_fail("out of memory");
    }
    s->at_ns[s->n++] = now;
}

/* ---- WebSocket ---------------------------------------------------------------------------------- */

void text_open_ws(struct text_stream *s, int port)
{
    struct ic_err err = {0};

    *s = (struct text_stream){0};
    if (ic_ws_open(&s->ws, "127.0.0.1", port, "/", "", &err) != IC_OK)
        text_fail(err.msg);
    s->fd = ic_ws_fd(s->ws);
}

static void send_ws(struct text_stream *s, const struct ic_buf *b)
{
    struct ic_err err = {0};

    if (b->failed || ic_ws_send(s->ws, b->data, b->len, false, &err) != IC_OK)
        text_fail(b->failed ? "out of memory" : err.msg);
}

void text_send_ws(struct text_stream *s, const struct text_request *r, const char *id)
{
    static unsigned long n;
    struct ic_buf b = {0};

    ic_buf_puts(&b, "{\"op\":\"infer\"");
    ic_json_kstr(&b, "id", id);
    if (!r->cached)
        ic_buf_printf(&b, ",\"cache_salt\":\"%lx-%lu\"", (unsigned long)ic_now_ns(), n++);
    ic_json_kstr(&b, "prompt", r->prompt);
    ic_buf_printf(&b, ",\"params\":{\"max_tokens\":%d,\"seed\":1%s}}", r->max_tokens,
                  r->greedy ? ",\"temp\":0" : "");
    s->sent_ns = ic_now_ns();
    send_ws(s, &b);
    ic_buf_deinit(&b);
}

void text_abort_ws(struct text_stream *s, const char *id)
{
    struct ic_buf b = {0};

    ic_buf_puts(&b, "{\"op\":\"abort\"");
    ic_json_kstr(&b, "id", id);
    ic_buf_puts(&b, "}");
    s->abort_ns = ic_now_ns();
    send_ws(s, &b);
    ic_buf_deinit(&b);
}

static void take_ws(struct text_stream *s)
{
    struct ic_err err = {0};
    enum ic_status st;

    while ((st = ic_ws_recv(s->ws, &s->in, 0, NULL, &err)) == IC_OK) {
        const char *m = s->in.data;
        int64_t now = ic_now_ns();
        if (!strncmp(m, "{\"op\":\"token\"", 13)) {
            note_token(s, now);
        } else if (!strncmp(m, "{\"op\":\"abort\"", 13)) {
            s->ack_ns = now;
        } else if (!strncmp(m, "{\"op\":\"end\"", 11)) {
            const char *reason = strstr(m, "\"reason\":\"");
            sscanf(reason ? reason + 10 : "?", "%15[a-z]", s->reason);
            s->server_tps = number_after(m, "\"tps\":");
            s->prompt_tokens = (int)number_after(m, "\"prompt_tokens\":");
            s->end_ns = now;
        } else if (!strncmp(m, "{\"op\":\"error\"", 13)) {
            text_fail(m);
        }
    }
    if (st != IC_DEADLINE)
        text_fail(err.msg);
}

/* ---- HTTP --------------------------------------------------------------------------------------- */

static int dial(int port)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof a) != 0)
        text_fail("cannot connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

static void write_all(int fd, const struct ic_buf *b)
{
    if (b->failed || send(fd, b->data, b->len, MSG_NOSIGNAL) != (ssize_t)b->len) /* small: goes at once */
        text_fail("cannot send a request");
}

void text_open_sse(struct text_stream *s, int port, const struct text_request *r)
{
    struct ic_buf body = {0}, b = {0};

    *s = (struct text_stream){0};
    s->fd = dial(port);
    ic_buf_printf(&body, "{\"stream\":true,\"ignore_eos\":true,\"cache_prompt\":%s",
                  r->cached ? "true" : "false");
    ic_json_kstr(&body, "prompt", r->prompt);
    ic_buf_printf(
        &body, ",\"n_predict\":%d,\"seed\":1,%s}", r->max_tokens,
        r->greedy ? "\"temperature\":0"
                  : "\"temperature\":0.7,\"top_k\":40,\"top_p\":0.95,\"min_p\":0.05,\"repeat_penalty\":1.0,"
                    "\"samplers\":[\"top_k\",\"top_p\",\"min_p\",\"temperature\"]");
    ic_buf_printf(&b,
                  "POST /completion HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                  "Connection: close\r\nContent-Length: %zu\r\n\r\n",
                  body.len);
    ic_buf_put(&b, body.data, body.len);
    s->sent_ns = ic_now_ns();
    write_all(s->fd, &b);
    ic_buf_deinit(&body);
    ic_buf_deinit(&b);
}

/* An event is a line; what the chunked coding puts between lines is not, and is skipped with the HTTP head.
 */
static void sse_line(struct text_stream *s, const char *line, int64_t now)
{
    if (strncmp(line, "data: {", 7) != 0)
        return;
    if (strstr(line, "\"stop\":false")) {
        note_token(s, now);
    } else {
        s->server_tps = number_after(line, "\"predicted_per_second\":");
        s->prompt_tokens = (int)number_after(line, "\"prompt_n\":");
        strcpy(s->reason, strstr(line, "\"stop\":true") ? "length" : "error");
        s->end_ns = now;
    }
}

static void take_sse(struct text_stream *s)
{
    char chunk[16384];
    ssize_t n = recv(s->fd, chunk, sizeof chunk, MSG_DONTWAIT);
    int64_t now = ic_now_ns();

    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        if (!s->end_ns)
            text_fail("the peer hung up");
        return;
    }
    ic_buf_put(&s->in, chunk, (size_t)n);
    size_t from = 0;
    for (char *nl; (nl = memchr(s->in.data + from, '\n', s->in.len - from));
         from = (size_t)(nl + 1 - s->in.data)) {
        *nl = 0;
        sse_line(s, s->in.data + from, now);
    }
    memmove(s->in.data, s->in.data + from, s->in.len - from);
    s->in.len -= from;
}

char *text_http_get(int port, const char *path)
{
    struct ic_buf b = {0};
    char chunk[16384];
    ssize_t n;
    int fd = dial(port);

    ic_buf_printf(&b, "GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n", path);
    write_all(fd, &b);
    ic_buf_clear(&b);
    while ((n = recv(fd, chunk, sizeof chunk, 0)) > 0)
        ic_buf_put(&b, chunk, (size_t)n);
    ic_buf_put(&b, "", 1);
    close(fd);
    if (b.failed)
        text_fail("out of memory");
    return b.data;
}

/* ---- both --------------------------------------------------------------------------------------- */

void text_pump(struct text_stream *s, int n, int64_t wait_ns)
{
    struct pollfd p[STREAMS_MAX];
    struct timespec ts = {wait_ns / 1000000000, wait_ns % 1000000000};

    if (n > STREAMS_MAX)
        text_fail("too many streams");
    for (int i = 0; i < n; i++)
        p[i] = (struct pollfd){s[i].end_ns ? -1 : s[i].fd, POLLIN, 0};
    if (ppoll(p, (nfds_t)n, wait_ns < 0 ? NULL : &ts, NULL) < 0 && errno != EINTR)
        text_fail("poll failed");
    for (int i = 0; i < n; i++)
        if (p[i].revents) {
            if (s[i].ws)
                take_ws(&s[i]);
            else
                take_sse(&s[i]);
        }
}

void text_reset(struct text_stream *s)
{
    s->n = 0;
    s->sent_ns = s->abort_ns = s->ack_ns = s->end_ns = 0;
    s->reason[0] = 0;
}

void text_close(struct text_stream *s)
{
    if (s->ws)
        ic_ws_close(&s->ws);
    else
        close(s->fd);
    ic_buf_deinit(&s->in);
    free(s->at_ns);
    *s = (struct text_stream){0};
}
