/* Tests of the network layer through real sockets: a loop thread with a small app, and a raw client that
 * can misbehave. Nothing is asserted about time but that it comes within 10 s. HTTP and WebSocket here;
 * limits, addresses, TLS, files, abuse and measurements in net_limits_test.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "net/net_test_client.h"

static struct srv srv; /* the one most tests share */

static int shared_start(void **state)
{
    (void)state;
    struct ic_net_config cfg = srv_config();
    srv_start(&srv, &cfg);
    return 0;
}

/* Also checks that nothing was leaked: every peer opened was closed. */
static int shared_stop(void **state)
{
    (void)state;
    srv_drained(&srv);
    int owed = srv.opened + srv.http - srv.closed;
    unsigned left = srv_peers(&srv);
    srv_stop(&srv);
    return owed || left ? -1 : 0;
}

/* ---- HTTP ---- */

static void http_basics(void **state)
{
    (void)state;
    struct cl_answer a = {0};
    int fd = cl_connect(srv.port);
    cl_puts(fd, "\r\nGET /a%20b/c?x=%31 HTTP/1.1\r\nHost: x\r\nX-IC-Test:  v w \r\n\r\n");
    assert_int_equal(cl_answer(fd, &a, false), 404);
    assert_string_equal(a.body, "GET /a b/c ?x=%31 v w");
    assert_null(strcasestr(a.head, "libwebsockets"));
    assert_null(strcasestr(a.head, "connection: close"));
    /* the same connection: HEAD, then three at once */
    cl_puts(fd, "HEAD /echo HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_int_equal(cl_answer(fd, &a, true), 200);
    assert_non_null(strstr(a.head, "Content-Length: 0\r\n"));
    cl_puts(fd, "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
                "GET /sse HTTP/1.1\r\nHost: x\r\n\r\n"
                "POST /echo HTTP/1.1\nHost: x\nTransfer-Encoding: "
                "chunked\n\n3;e=1\r\nabc\r\n2\t;e\r\nde\r\n0\r\nT: x\r\n\r\n");
    assert_int_equal(cl_answer(fd, &a, false), 200);
    assert_string_equal(a.body, "abc");
    assert_int_equal(cl_answer(fd, &a, false), 200);
    assert_string_equal(a.body, "data: 1\n\ndata: 2\n\n");
    assert_non_null(strstr(a.head, "X-Extra: 1\r\n"));
    assert_int_equal(cl_answer(fd, &a, false), 200);
    assert_string_equal(a.body, "abcde");
    cl_puts(fd, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert_int_equal(cl_answer(fd, &a, false), 404);
    assert_non_null(strstr(a.head, "Connection: close\r\n"));
    assert_true(cl_eof(fd));
    close(fd);
    free(a.body);
}

static void http_1_0(void **state)
{
    (void)state;
    struct cl_answer a = {0};
    int fd = cl_connect(srv.port);
    cl_puts(fd, "GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    assert_int_equal(cl_answer(fd, &a, false), 404);
    assert_non_null(strstr(a.head, "Connection: keep-alive"));
    cl_puts(fd, "GET /sse HTTP/1.0\r\n\r\n");
    char body[19] = {0};
    assert_int_equal(cl_answer(fd, &a, true), 200);
    assert_null(strstr(a.head, "chunked"));
    assert_true(cl_read(fd, body, 18));
    assert_string_equal(body, "data: 1\n\ndata: 2\n\n");
    assert_true(cl_eof(fd));
    close(fd);
}

static void http_bad_requests(void **state)
{
    (void)state;
    static const struct {
        int status;
        const char *text;
    } cases[] = {
        {400, "hello\r\n\r\n"},
        {400, "\x16\x03\x01\x02"}, /* a TLS client's greeting; its end is not waited for */
        {400, "GET\r\n\r\n"},
        {400, "GET /\r\n\r\n"},
        {400, "GET / HTTP/1.1\r\n\r\n"},
        {400, "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"},
        {400, "GET /%zz HTTP/1.1\r\nHost: x\r\n\r\n"},
        {400, "GET /%00 HTTP/1.1\r\nHost: x\r\n\r\n"},
        {400, "GET x HTTP/1.1\r\nHost: x\r\n\r\n"},
        {400, "GET / HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n"},
        {400, "GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n folded\r\n\r\n"},
        {400, "GET / HTTP/1.1\r\nHost: x\r\nA: b\x01\r\n\r\n"},
        {400, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n"},
        {400, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"},
        {400, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"},
        {400, "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"},
        /* a line that two parties end at different bytes is one that they read differently */
        {400, "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\rX\n"},
        {400, "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\r\n"},
        {400, "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\r\n"},
#define CHUNKED "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        {400, CHUNKED "1\na\r\n0\r\n\r\n"},
        {400, CHUNKED "1;\na\r\n0\r\n\r\n"},
        {400, CHUNKED "1;e\x01\r\na\r\n0\r\n\r\n"},
        {400, CHUNKED "1 e\r\na\r\n0\r\n\r\n"},
        {400, CHUNKED "1\r\na\n0\r\n\r\n"},
        {400, CHUNKED "1\r\na\r\n0\n\r\n"},
        {400, CHUNKED "1\r\na\r\n0\r\n\n"},
        {400, CHUNKED "0\r\n\rX"},
        {400, CHUNKED "0\r\n: x\r\n\r\n"},
        {400, CHUNKED "0\r\nGET / HTTP/1.1\r\n\r\n"},
        {400, CHUNKED "0\r\nT: x\n\r\n"},
        {400, CHUNKED "0\r\nT: \x01\r\n\r\n"},
        {400, "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
        {400, "GET / HTTP/1.1\r\nHost: a b\r\n\r\n"},
        {400, "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"},
        {400, "GET / HTTP/1.1\r\nHost: a@b\r\n\r\n"},
        {400, "GET / HTTP/1.x\r\nHost: x\r\n\r\n"},
        {413, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100001\r\n\r\n"},
        {413, "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n400000\r\nxxxxx"},
        {501, "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n"},
        {505, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"},
    };
    struct cl_answer a = {0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int fd = cl_connect(srv.port);
        cl_puts(fd, cases[i].text);
        if (cases[i].status == 413) { /* the body goes on: the answer must arrive all the same */
            char *more = calloc(1, 200000);
            cl_write(fd, more, 200000);
            free(more);
        }
        int status = cl_answer(fd, &a, false);
        if (status != cases[i].status)
            print_error("case %zu: %d\n", i, status);
        assert_int_equal(status, cases[i].status);
        assert_non_null(strstr(a.body, "\"code\":"));
        assert_true(cl_eof(fd));
        close(fd);
    }
    int fd = cl_connect(srv.port);
    cl_puts(fd, "GET / HTTP/1.1\r\nHost: x\r\n");
    for (int i = 0; i < 2000; i++)
        cl_puts(fd, "A: bbbbbbbbbbb\r\n");
    assert_int_equal(cl_answer(fd, &a, false), 431);
    close(fd);
    free(a.body);
}

static void http_expect(void **state)
{
    (void)state;
    struct cl_answer a = {0};
    int fd = cl_connect(srv.port);
    cl_puts(fd, "POST /echo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
    assert_int_equal(cl_answer(fd, &a, false), 100);
    cl_puts(fd, "ok");
    assert_int_equal(cl_answer(fd, &a, false), 200);
    assert_string_equal(a.body, "ok");
    close(fd);
    free(a.body);
}

static void http_later(void **state)
{
    (void)state;
    struct cl_answer a = {0};
    int before = srv.http, closed = srv.closed;
    int fd = cl_connect(srv.port);
    cl_puts(fd, "GET /later HTTP/1.1\r\nHost: x\r\n\r\nGET /after HTTP/1.1\r\nHost: x\r\n\r\n");
    srv_wait(&srv.http, before + 1);
    srv_command(&srv, CMD_ANSWER_LATER);
    assert_int_equal(cl_answer(fd, &a, false), 200);
    assert_string_equal(a.body, "late");
    assert_int_equal(cl_answer(fd, &a, false), 404);
    /* an exchange whose client goes away is closed, and its id names nobody */
    cl_puts(fd, "GET /later HTTP/1.1\r\nHost: x\r\n\r\n");
    srv_wait(&srv.http, before + 3);
    close(fd);
    srv_wait(&srv.closed, closed + 3);
    assert_int_equal(srv.closed, closed + 3);
    srv_command(&srv, CMD_ANSWER_LATER);
    free(a.body);
}

static void http_big_answer(void **state)
{
    (void)state;
    struct cl_answer a = {0};
    assert_int_equal(cl_get(srv.port, "GET /big HTTP/1.1\r\nHost: x\r\n\r\n", &a), 200);
    assert_int_equal(a.len, 8 << 20);
    free(a.body);
}

static void http_half_close(void **state)
{
    (void)state;
    struct cl_answer a = {0};
    int fd = cl_connect(srv.port);
    cl_puts(fd, "GET /big HTTP/1.1\r\nHost: x\r\n\r\nGET /echo HTTP/1.1\r\nHost: x\r\n\r\n");
    shutdown(fd, SHUT_WR);
    assert_int_equal(cl_answer(fd, &a, false), 200);
    assert_int_equal(a.len, 8 << 20);
    assert_int_equal(cl_answer(fd, &a, false), 200);
    assert_true(cl_eof(fd));
    close(fd);
    free(a.body);
}

static void http_slow(void **state)
{
    (void)state;
    static struct srv s;
    struct ic_net_config cfg = srv_config();
    struct cl_answer a = {0};
    cfg.request_s = 1;
    srv_start(&s, &cfg);
    int silent = cl_connect(s.port);
    int head = cl_connect(s.port);
    cl_puts(head, "GET / HTTP/1.1\r\nHo");
    int body = cl_connect(s.port);
    cl_puts(body, "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc");
    assert_int_equal(cl_answer(head, &a, false), 408);
    assert_int_equal(cl_answer(body, &a, false), 408);
    assert_true(cl_eof(head) && cl_eof(body) && cl_eof(silent));
    close(head);
    close(body);
    close(silent);
    free(a.body);
    srv_stop(&s);
}

/* ---- WebSocket ---- */

static void ws_echo(void **state)
{
    (void)state;
    static const size_t sizes[] = {0, 1, 125, 126, 127, 65535, 65536, 300000};
    int fd =
        cl_ws_open(srv.port, "/hello", "Sec-WebSocket-Extensions: permessage-deflate\r\nX-IC-Test: v\r\n");
    assert_true(cl_ws_expect(fd, 0x81, "hello"));
    char *msg = malloc(300000), *got;
    size_t len;
    memset(msg, 'm', 300000);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (uint8_t op = 1; op <= 2; op++) {
            cl_ws_frame(fd, 0x80 | op, msg, sizes[i]);
            assert_int_equal(cl_ws_next(fd, &got, &len), 0x80 | op);
            assert_int_equal(len, sizes[i]);
            assert_memory_equal(got, msg, len);
            free(got);
        }
    free(msg);
    srv_wait(&srv.written, 16);
    assert_true(srv.written >= 16);
    cl_ws_text(fd, "header x-ic-test");
    assert_true(cl_ws_expect(fd, 0x81, "v"));
    /* fragments with a ping between, an UTF-8 character cut in two */
    cl_ws_frame(fd, 0x01, "a\xc3", 2);
    cl_ws_frame(fd, 0x89, "p", 1);
    cl_ws_frame(fd, 0x00, "", 0);
    cl_ws_frame(fd, 0x8a, "unasked", 7);
    cl_ws_frame(fd, 0x80, "\xa9z", 2);
    assert_true(cl_ws_expect(fd, 0x8a, "p"));
    assert_true(cl_ws_expect(fd, 0x81, "a\xc3\xa9z"));
    /* byte by byte */
    uint8_t raw[] = {0x81, 0x82, 0, 0, 0, 0, 'h', 'i'};
    for (size_t i = 0; i < sizeof raw; i++)
        cl_write(fd, raw + i, 1);
    assert_true(cl_ws_expect(fd, 0x81, "hi"));
    cl_ws_frame(fd, 0x88, "\x03\xe8ok", 4);
    assert_int_equal(cl_ws_close_code(fd), 1000);
    assert_true(cl_eof(fd));
    close(fd);
}

static void ws_handshakes(void **state)
{
    (void)state;
    struct cl_answer a = {0};
    int fd = cl_connect(srv.port);
    cl_puts(fd, "GET /any/path?q=1 HTTP/1.1\r\nHost: x\r\nUpgrade: WebSocket\r\nConnection: upgrade\r\n"
                "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                "Sec-WebSocket-Protocol: unknown.v1, other\r\nSec-WebSocket-Extensions: "
                "permessage-deflate\r\n\r\n");
    assert_int_equal(cl_answer(fd, &a, true), 101);
    assert_non_null(strstr(a.head, "Sec-WebSocket-Protocol: unknown.v1\r\n"));
    assert_null(strstr(a.head, "Extensions"));
    close(fd);
    assert_int_equal(
        cl_get(srv.port,
               "GET /deny HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\nX-Client-ID: "
               "me\r\n"
               "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
               &a),
        401);
    assert_string_equal(a.body, "{\"error\":\"who is me?\"}");
    assert_int_equal(
        cl_get(srv.port,
               "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
               "Sec-WebSocket-Version: 8\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
               &a),
        426);
    assert_non_null(strstr(a.head, "Sec-WebSocket-Version: 13"));
    assert_int_equal(cl_get(srv.port,
                            "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
                            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: short\r\n\r\n",
                            &a),
                     400);
    /* curl's offer of HTTP/2 is to be ignored */
    assert_int_equal(
        cl_get(srv.port,
               "GET /echo HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n"
               "HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
               &a),
        200);
    free(a.body);
}

static void ws_too_large(void **state)
{
    (void)state;
    int fd = cl_ws_open(srv.port, "/x", "");
    int refused = srv.refused;
    char *big = malloc(400000);
    memset(big, 'b', 400000);
    cl_ws_frame(fd, 0x81, big, 300001);
    assert_true(cl_ws_expect(fd, 0x81, "too_large"));
    cl_ws_frame(fd, 0x01, big, 200000);
    cl_ws_frame(fd, 0x00, big, 100001);
    cl_ws_frame(fd, 0x00, big, 400000);
    cl_ws_frame(fd, 0x80, big, 1);
    assert_true(cl_ws_expect(fd, 0x81, "too_large"));
    cl_ws_text(fd, "alive");
    assert_true(cl_ws_expect(fd, 0x81, "alive"));
    assert_int_equal(srv.refused, refused + 2);
    free(big);
    close(fd);
}

static void ws_bad_text(void **state)
{
    (void)state;
    int fd = cl_ws_open(srv.port, "/x", "");
    cl_ws_text(fd, "before");
    cl_ws_text(fd, "\xed\xa0\x80");
    cl_ws_text(fd, "after");
    assert_true(cl_ws_expect(fd, 0x81, "before"));
    assert_true(cl_ws_expect(fd, 0x81, "bad_request"));
    assert_int_equal(cl_ws_close_code(fd), 1007);
    assert_true(cl_eof(fd));
    close(fd);
}

static void ws_protocol_errors(void **state)
{
    (void)state;
    static const struct {
        size_t len;
        const char *bytes;
        int code;
    } cases[] = {
        {2, "\x81\x01", 1002},                                      /* unmasked */
        {6, "\xc1\x80mask", 1002},                                  /* RSV1 */
        {6, "\xa1\x80mask", 1002},                                  /* RSV2 */
        {6, "\x83\x80mask", 1002},                                  /* unknown data opcode */
        {6, "\x8b\x80mask", 1002},                                  /* unknown control opcode */
        {6, "\x09\x80mask", 1002},                                  /* fragmented ping */
        {4, "\x89\xfe\x00\x7e", 1002},                              /* long ping */
        {6, "\x80\x80mask", 1002},                                  /* continuation of nothing */
        {12, "\x01\x80mask\x81\x80mask", 1002},                     /* message in a message */
        {14, "\x82\xff\xff\xff\xff\xff\xff\xff\xff\xffmask", 1002}, /* negative length */
        {7, "\x88\x81\0\0\0\0\x03", 1002},                          /* close of one byte */
        {8, "\x88\x82\0\0\0\0\x03\xed", 1002},                      /* 1005 */
        {8, "\x88\x82\0\0\0\0\x03\xe7", 1002},                      /* 999 */
        {8, "\x88\x82\0\0\0\0\x0b\xb7", 1002},                      /* 2999 */
        {8, "\x88\x82\0\0\0\0\x13\x88", 1002},                      /* 5000 */
        {9, "\x88\x83\0\0\0\0\x03\xe8\xff", 1007},                  /* reason not UTF-8 */
        {6, "\x88\x80mask", 0},                                     /* fine: close without a code */
        {8, "\x88\x82\0\0\0\0\x0b\xb8", 3000},                      /* fine */
        {8, "\x88\x82\0\0\0\0\x03\xf5", 1013},                      /* fine */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int fd = cl_ws_open(srv.port, "/x", "");
        cl_write(fd, cases[i].bytes, cases[i].len);
        int code = cl_ws_close_code(fd);
        if (code != cases[i].code)
            print_error("case %zu: %d\n", i, code);
        assert_int_equal(code, cases[i].code);
        cl_ws_text(fd, "nobody hears this");
        assert_true(cl_eof(fd));
        close(fd);
    }
}

static void ws_app_closes(void **state)
{
    (void)state;
    char *data;
    size_t len;
    int fd = cl_ws_open(srv.port, "/x", "");
    cl_ws_text(fd, "first");
    cl_ws_text(fd, "close 1008 reason");
    cl_ws_text(fd, "ignored");
    assert_true(cl_ws_expect(fd, 0x81, "first"));
    assert_int_equal(cl_ws_next(fd, &data, &len), 0x88);
    assert_memory_equal(data, "\x03\xf0reason", 8);
    free(data);
    cl_ws_frame(fd, 0x88, "\x03\xf0", 2);
    assert_true(cl_eof(fd));
    close(fd);
}

static void ws_outbox(void **state)
{
    (void)state;
    int fd = cl_ws_open(srv.port, "/x", "");
    int busy = srv.busy;
    /* 64 MiB at once: more than kernel buffers and outbox take */
    cl_ws_text(fd, "flood t 1024 65536");
    srv_wait(&srv.busy, busy + 1);
    assert_true(srv.busy > busy);
    cl_ws_text(fd, "close 1013 slow");
    assert_int_equal(cl_ws_close_code(fd), 1013);
    close(fd);
}

static void ws_frames_dropped(void **state)
{
    (void)state;
    char *data, *last = NULL;
    size_t len;
    int fd = cl_ws_open(srv.port, "/x", "");
    /* one callback queues 200 frames of 50000: the outbox holds 20, the newest win */
    cl_ws_text(fd, "flood f 200 50000");
    unsigned got = 0;
    int first;
    cl_ws_text(fd, "end");
    while ((first = cl_ws_next(fd, &data, &len)) == 0x82) {
        free(last);
        last = data;
        got++;
    }
    assert_int_equal(first, 0x81);
    free(data);
    assert_int_equal(got + (unsigned)srv.lost, 200);
    assert_int_equal((uint8_t)last[0], 199);
    assert_true(got <= 20);
    free(last);
    close(fd);
}

static void ws_stuck_client(void **state)
{
    (void)state;
    /* a client that never reads and never answers the close is dropped all the same */
    int closed = srv.closed;
    int fd = cl_ws_open(srv.port, "/x", "");
    cl_ws_text(fd, "flood t 1024 65536");
    for (int i = 0; i < 5000; i++)
        cl_ws_frame(fd, 0x89, "ping", 4);
    cl_ws_text(fd, "close 1013 slow");
    srv_wait(&srv.closed, closed + 1);
    assert_int_equal(srv.closed, closed + 1);
    close(fd);
}

static void ws_pings_at_once(void **state)
{
    (void)state;
    /* more than pongs are kept for: some go unanswered, the latest never (RFC 6455, 5.5.3) */
    uint8_t frames[300 * 16] = {0};
    char name[16], *got;
    size_t at = 0, len;
    long last = -1;
    int fd = cl_ws_open(srv.port, "/x", "");
    for (int i = 0; i < 300; i++) {
        int n = snprintf(name, sizeof name, "%d", i);
        frames[at] = 0x89;
        frames[at + 1] = (uint8_t)(0x80 | n);
        memcpy(frames + at + 6, name, (size_t)n); /* the mask is 0 */
        at += 6 + (size_t)n;
    }
    cl_write(fd, frames, at);
    while (last < 299) {
        assert_int_equal(cl_ws_next(fd, &got, &len), 0x8a);
        assert_true(strtol(got, NULL, 10) > last);
        last = strtol(got, NULL, 10);
        free(got);
    }
    close(fd);
}

static void ws_idle(void **state)
{
    (void)state;
    static struct srv s;
    struct ic_net_config cfg = srv_config();
    cfg.idle_s = 1;
    srv_start(&s, &cfg);
    int fd = cl_ws_open(s.port, "/x", "");
    assert_true(cl_ws_expect(fd, 0x89, ""));
    cl_ws_frame(fd, 0x8a, "", 0);
    assert_true(cl_ws_expect(fd, 0x89, ""));
    assert_true(cl_eof(fd)); /* unanswered */
    close(fd);
    srv_stop(&s);
}

/* What proxies keep for further requests is left to them longer than a WebSocket is left without a ping. */
static void http_idle(void **state)
{
    (void)state;
    static struct srv s;
    struct ic_net_config cfg = srv_config();
    struct cl_answer a = {0};
    cfg.idle_s = 3; /* what is asked below may come that much late */
    srv_start(&s, &cfg);
    int fd = cl_connect(s.port);
    cl_puts(fd, "GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_int_equal(cl_answer(fd, &a, false), 404);
    int ws = cl_ws_open(s.port, "/x", "");
    assert_true(cl_ws_expect(ws, 0x89, ""));
    cl_puts(fd, "GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_int_equal(cl_answer(fd, &a, false), 404);
    assert_true(cl_eof(fd));
    close(fd);
    close(ws);
    free(a.body);
    srv_stop(&s);
}

static void close_all(void **state)
{
    (void)state;
    static struct srv s;
    struct ic_net_config cfg = srv_config();
    struct cl_answer a = {0};
    srv_start(&s, &cfg);
    int ws = cl_ws_open(s.port, "/x", ""), rude = cl_ws_open(s.port, "/x", "");
    int idle = cl_connect(s.port), busy = cl_connect(s.port);
    cl_puts(idle, "GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_int_equal(cl_answer(idle, &a, false), 404);
    cl_puts(busy, "GET /later HTTP/1.1\r\nHost: x\r\n\r\n");
    srv_wait(&s.http, 2);
    srv_command(&s, CMD_STOP_ACCEPTING);
    assert_int_equal(cl_connect(s.port), -1);
    srv_command(&s, CMD_CLOSE_ALL);
    assert_int_equal(cl_ws_close_code(ws), 1001);
    cl_ws_frame(ws, 0x88, "\x03\xe9", 2);
    assert_true(cl_eof(ws));
    assert_true(cl_eof(idle));
    srv_command(&s, CMD_ANSWER_LATER);
    assert_int_equal(cl_answer(busy, &a, false), 200);
    assert_non_null(strstr(a.head, "Connection: close"));
    srv_drained(&s); /* also of the one that does not answer the close frame */
    assert_int_equal(srv_peers(&s), 0);
    close(ws);
    close(rude);
    close(idle);
    close(busy);
    free(a.body);
    srv_stop(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(http_basics),
        cmocka_unit_test(http_1_0),
        cmocka_unit_test(http_bad_requests),
        cmocka_unit_test(http_expect),
        cmocka_unit_test(http_later),
        cmocka_unit_test(http_big_answer),
        cmocka_unit_test(http_half_close),
        cmocka_unit_test(http_slow),
        cmocka_unit_test(ws_echo),
        cmocka_unit_test(ws_handshakes),
        cmocka_unit_test(ws_too_large),
        cmocka_unit_test(ws_bad_text),
        cmocka_unit_test(ws_protocol_errors),
        cmocka_unit_test(ws_app_closes),
        cmocka_unit_test(ws_outbox),
        cmocka_unit_test(ws_frames_dropped),
        cmocka_unit_test(ws_stuck_client),
        cmocka_unit_test(ws_pings_at_once),
        cmocka_unit_test(ws_idle),
        cmocka_unit_test(http_idle),
        cmocka_unit_test(close_all),
    };
    return cmocka_run_group_tests(tests, shared_start, shared_stop);
}
