/* Tests of the network layer's edges: too many connections, addresses, TLS, static files, clients that
 * vanish or misuse the connection; and measurements of latency and memory, which are printed. See
 * net_test.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
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

/* ---- limits, addresses ---- */

static void too_many(void **state)
{
    (void)state;
    static struct srv s;
    struct ic_net_config cfg = srv_config();
    struct cl_answer a = {0};
    cfg.connections_max = 3;
    srv_start(&s, &cfg);
    int fds[3], more[100];
    for (int i = 0; i < 3; i++)
        assert_true((fds[i] = cl_ws_open(s.port, "/x", "")) >= 0);
    assert_int_equal(cl_get(s.port, "GET / HTTP/1.1\r\nHost: x\r\n\r\n", &a), 503);
    assert_int_equal(cl_ws_open(s.port, "/x", ""), -1);
    for (int i = 0; i < 100; i++)
        more[i] = cl_connect(s.port);
    cl_ws_text(fds[0], "unharmed");
    assert_true(cl_ws_expect(fds[0], 0x81, "unharmed"));
    for (int i = 0; i < 100; i++)
        close(more[i]);
    close(fds[1]);
    int again = -1;
    for (int i = 0; i < 1000 && again < 0;
         i++, usleep(5000)) /* the slot becomes free when the loop sees it */
        again = cl_ws_open(s.port, "/x", "");
    assert_true(again >= 0);
    close(again);
    close(fds[0]);
    close(fds[2]);
    free(a.body);
    srv_stop(&s);
}

static const struct ic_peer_app no_app = {0};

static void addresses(void **state)
{
    (void)state;
    struct ic_net_config cfg = srv_config();
    struct ic_net *n = (struct ic_net *)&cfg;
    struct ic_err err = {0};
    char want[64];
    cfg.port = srv.port;
    assert_int_equal(ic_net_open(&n, &cfg, &no_app, NULL, &err), IC_BUSY);
    assert_null(n);
    snprintf(want, sizeof want, "port %d on 127.0.0.1 is in use", srv.port);
    assert_string_equal(err.msg, want);
    cfg.host = "0.0.0.0";
    assert_int_equal(ic_net_open(&n, &cfg, &no_app, NULL, &err), IC_BUSY);
    cfg.port = 0;
    cfg.host = "no.such.host.invalid";
    assert_int_equal(ic_net_open(&n, &cfg, &no_app, NULL, &err), IC_BAD_REQUEST);
    cfg.host = "203.0.113.7";
    assert_int_equal(ic_net_open(&n, &cfg, &no_app, NULL, &err), IC_BAD_REQUEST);
    cfg.host = "127.0.0.1";
    cfg.tls_cert = "/nonexistent";
    assert_int_equal(ic_net_open(&n, &cfg, &no_app, NULL, &err), IC_BAD_REQUEST);
    cfg.tls_key = __FILE__;
    cfg.tls_cert = __FILE__;
    assert_int_equal(ic_net_open(&n, &cfg, &no_app, NULL, &err), IC_NOT_FOUND);
    cfg.tls_key = cfg.tls_cert = NULL;
    cfg.web_root = "/nonexistent";
    assert_int_equal(ic_net_open(&n, &cfg, &no_app, NULL, &err), IC_NOT_FOUND);
    ic_net_close(&n);
    ic_net_close(NULL);
    static const char *const hosts[] = {"localhost", "::1", "[::1]", "::", "0.0.0.0"};
    for (size_t i = 0; i < sizeof hosts / sizeof *hosts; i++) {
        static struct srv s;
        struct ic_net_config c = srv_config();
        struct cl_answer a = {0};
        c.host = hosts[i];
        if (ic_net_open(&n, &c, &no_app, NULL, &err)) {
            print_message("%s: %s\n", hosts[i], err.msg);
            continue; /* no IPv6 here */
        }
        c.port = ic_net_port(n);
        ic_net_close(&n);
        srv_start(&s, &c); /* the same port again at once */
        if (i != 1 && i != 2) {
            assert_int_equal(cl_get(s.port, "GET / HTTP/1.1\r\nHost: x\r\n\r\n", &a), 404);
            free(a.body);
        }
        srv_stop(&s);
    }
}

static void restart(void **state)
{
    (void)state;
    static struct srv s;
    struct ic_net_config cfg = srv_config();
    for (int i = 0; i < 3; i++) {
        srv_start(&s, &cfg);
        cfg.port = s.port;
        int fd = cl_ws_open(s.port, "/x", ""); /* closed by the server: TIME_WAIT on its side */
        srv_stop(&s);
        assert_int_equal(s.closed, 1);
        close(fd);
    }
}

/* ---- static files ---- */

static void write_file(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static void static_files(void **state)
{
    (void)state;
    static struct srv s;
    char dir[] = "/tmp/ic_net_test_XXXXXX", path[128];
    struct ic_net_config cfg = srv_config();
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/root", dir);
    mkdir(path, 0755);
    static const char *const files[][2] = {{"secret", "secret"},
                                           {"root/index.html", "<html>"},
                                           {"root/a.js", "1"},
                                           {"root/.env", "secret"},
                                           {"root/health", "fake"}};
    for (size_t i = 0; i < 5; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, files[i][0]);
        write_file(path, files[i][1]);
    }
    snprintf(path, sizeof path, "%s/root/link", dir);
    assert_int_equal(symlink("../secret", path), 0);
    snprintf(path, sizeof path, "%s/root", dir);
    cfg.web_root = path;
    srv_start(&s, &cfg);
    static const struct {
        const char *path;
        int status;
        const char *text;
    } cases[] = {{"/", 200, "text/html"},      {"/a.js", 200, "text/javascript"},
                 {"/../secret", 404, "GET"},   {"/%2e%2e/secret", 404, "GET"},
                 {"/..%2fsecret", 404, "GET"}, {"/.env", 404, "GET"},
                 {"/link", 404, "GET"},        {"/health", 404, "GET"},
                 {"/none", 404, "GET"},        {"//a.js", 200, "1"},
                 {"/a.js/", 404, "GET"}};
    struct cl_answer a = {0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char req[128];
        snprintf(req, sizeof req, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", cases[i].path);
        assert_int_equal(cl_get(s.port, req, &a), cases[i].status);
        assert_true(strstr(a.head, cases[i].text) || strstr(a.body, cases[i].text));
        assert_null(strstr(a.body, "secret") == a.body ? a.body : NULL);
    }
    assert_int_equal(cl_get(s.port, "POST / HTTP/1.1\r\nHost: x\r\n\r\n", &a), 404);
    free(a.body);
    srv_stop(&s);
    snprintf(path, sizeof path, "rm -r %s", dir);
    assert_int_equal(system(path), 0);
}

/* ---- TLS, through the openssl tool ---- */

static int s_client(int port, pid_t *pid)
{
    int sv[2];
    char to[32];
    struct timeval tv = {.tv_sec = 10};
    snprintf(to, sizeof to, "127.0.0.1:%d", port);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv), 0);
    setsockopt(sv[0], SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
    *pid = fork();
    if (!*pid) {
        dup2(sv[1], 0);
        dup2(sv[1], 1);
        dup2(open("/dev/null", O_WRONLY), 2);
        execlp("openssl", "openssl", "s_client", "-quiet", "-connect", to, (char *)NULL);
        _exit(1);
    }
    close(sv[1]);
    return sv[0];
}

static void tls(void **state)
{
    (void)state;
    static struct srv s;
    char dir[] = "/tmp/ic_net_tls_XXXXXX", key[64], cert[64], cmd[400];
    assert_non_null(mkdtemp(dir));
    snprintf(key, sizeof key, "%s/key.pem", dir);
    snprintf(cert, sizeof cert, "%s/cert.pem", dir);
    snprintf(cmd, sizeof cmd,
             "openssl req -x509 -newkey rsa:2048 -nodes -keyout %s -out %s -days 2 -subj /CN=localhost "
             "2>/dev/null",
             key, cert);
    if (system(cmd)) {
        rmdir(dir);
        skip();
    }
    struct ic_net_config cfg = srv_config();
    struct cl_answer a = {0};
    cfg.tls_cert = cert;
    cfg.tls_key = key;
    cfg.request_s = 2;
    srv_start(&s, &cfg);
    pid_t pid;
    int fd = s_client(s.port, &pid);
    cl_puts(fd, "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc");
    assert_int_equal(cl_answer(fd, &a, false), 200);
    assert_string_equal(a.body, "abc");
    cl_puts(fd, "GET /big HTTP/1.1\r\nHost: x\r\n\r\n");
    srv_wait(&s.http, 2);
    usleep(100000); /* lets the socket fill, so that lws has to keep a part */
    assert_int_equal(cl_answer(fd, &a, false), 200);
    assert_int_equal(a.len, 8 << 20);
    cl_puts(fd, "GET /x HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n");
    assert_int_equal(cl_answer(fd, &a, true), 101);
    cl_ws_text(fd, "secret");
    assert_true(cl_ws_expect(fd, 0x81, "secret"));
    /* not TLS at all, half a handshake, and silence: all go away */
    int plain = cl_connect(s.port), half = cl_connect(s.port), silent = cl_connect(s.port);
    cl_puts(plain, "GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    cl_write(half, "\x16\x03\x01\x02\x00\x01", 6);
    cl_eof(plain);
    cl_eof(half);
    cl_eof(silent);
    cl_ws_text(fd, "still here");
    assert_true(cl_ws_expect(fd, 0x81, "still here"));
    close(plain);
    close(half);
    close(silent);
    close(fd);
    kill(pid, SIGTERM); /* -quiet makes it wait for the server to close */
    waitpid(pid, NULL, 0);
    srv_drained(&s);
    assert_int_equal(srv_peers(&s), 0);
    free(a.body);
    srv_stop(&s);
    unlink(key);
    unlink(cert);
    rmdir(dir);
}

/* ---- abuse ---- */

static uint32_t rnd(uint32_t *s)
{
    *s = *s * 1664525u + 1013904223u;
    return *s >> 8;
}

static void reset_close(int fd)
{
    struct linger l = {.l_onoff = 1};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof l);
    close(fd);
}

static void abrupt(void **state)
{
    (void)state;
    static const char *const starts[] = {
        "",
        "G",
        "GET / HTTP/1.1\r\nHost",
        "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc",
        "GET /big HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /later HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /sse HTTP/1.1\r\nHost: x\r\n\r\nGET /big HTTP/1.1\r\nHost: x\r\n\r\nGET /big",
    };
    uint32_t seed = 7;
    for (int i = 0; i < 300; i++) {
        int fd = i & 1 ? cl_ws_open(srv.port, "/x", "") : cl_connect(srv.port);
        if (i & 1) {
            uint8_t junk[64];
            for (size_t k = 0; k < sizeof junk; k++)
                junk[k] = (uint8_t)rnd(&seed);
            switch (i % 4) {
            case 1: cl_write(fd, junk, rnd(&seed) % sizeof junk); break;
            default:
                cl_ws_text(fd, "flood t 64 65536");
                cl_ws_frame(fd, 0x01, junk, 20);
                break;
            }
        } else {
            cl_puts(fd, starts[rnd(&seed) % (sizeof starts / sizeof *starts)]);
        }
        if (i % 3)
            reset_close(fd);
        else
            close(fd);
    }
    int fd = cl_ws_open(srv.port, "/x", "");
    cl_ws_text(fd, "fine");
    assert_true(cl_ws_expect(fd, 0x81, "fine"));
    close(fd);
}

/* Pipelines more than is read ahead behind an unanswered request, so that the server stops reading; then
 * goes away, which must be noticed all the same. Neither may keep the loop busy. */
static void paused_client(void **state)
{
    (void)state;
    srv_settled(&srv); /* those of the test before have gone */
    int http = srv.http, closed = srv.closed;
    int fd = cl_connect(srv.port);
    struct timeval tv = {.tv_usec = 200000};
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv);
    cl_puts(fd, "GET /later HTTP/1.1\r\nHost: x\r\n\r\n");
    srv_wait(&srv.http, http + 1);
    char *junk = malloc(1 << 20);
    memset(junk, 'j', 1 << 20);
    while (cl_write(fd, junk, 1 << 20))
        ;
    free(junk);
    struct rusage a, b;
    getrusage(RUSAGE_SELF, &a);
    usleep(300000);
    getrusage(RUSAGE_SELF, &b);
    long us = (b.ru_utime.tv_sec - a.ru_utime.tv_sec + b.ru_stime.tv_sec - a.ru_stime.tv_sec) * 1000000 +
              b.ru_utime.tv_usec - a.ru_utime.tv_usec + b.ru_stime.tv_usec - a.ru_stime.tv_usec;
    print_message("CPU in 300 ms beside a paused client: %ld us\n", us);
    reset_close(fd);
    srv_wait(&srv.closed, closed + 1);
    assert_int_equal(srv.closed, closed + 1);
}

/* ---- measurements ---- */

static size_t rss_kib(void)
{
    unsigned long size = 0, rss = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (!f || fscanf(f, "%lu %lu", &size, &rss) != 2)
        rss = 0;
    if (f)
        fclose(f);
    return rss * (size_t)(sysconf(_SC_PAGESIZE) / 1024);
}

static atomic_bool burn;

static void *burner(void *arg)
{
    while (burn)
        ;
    return arg;
}

static int by_value(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void print_times(const char *from_to, const char *what, int64_t *ns, size_t n)
{
    qsort(ns, n, sizeof *ns, by_value);
    print_message("%s, %s: p50 %.3f ms, p99 %.3f ms, max %.3f ms\n", from_to, what, (double)ns[n / 2] / 1e6,
                  (double)ns[n * 99 / 100] / 1e6, (double)ns[n - 1] / 1e6);
}

/* Two times, both from ic_net_wake in this thread: to the bytes given to the socket (on_written), and to
 * the token in the client's hands. */
static void wake_latency(struct srv *s, const char *what)
{
    enum { N = 2000 };
    static int64_t ns[N];
    int first;
    char token[7];
    int fd = cl_ws_open(s->port, "/x", "");
    cl_ws_text(fd, "ready");
    assert_true(cl_ws_expect(fd, 0x81, "ready"));
    srv_settled(s);
    first = s->written;
    for (int i = 0; i < N; i++) {
        int64_t t = ic_now_ns();
        s->wake_ns = t;
        s->command = CMD_SEND_TARGET;
        ic_net_wake(s->net);
        assert_true(cl_read(fd, token, 7));
        ns[i] = ic_now_ns() - t;
        usleep(200);
    }
    print_times("wake to client ", what, ns, N);
    srv_wait(&s->written, first + N);
    srv_wait(&s->written_at_settled,
             first + N); /* on_settled comes after the writing, and after the last one too */
    for (int i = 0; i < N; i++)
        ns[i] = s->written_ns[(first + i) % SRV_TIMES];
    print_times("wake to written", what, ns, N);
    close(fd);
}

static void *chatter(void *arg)
{
    while (burn) {
        cl_ws_text(*(int *)arg, "talk");
        assert_true(cl_ws_expect(*(int *)arg, 0x81, "talk"));
    }
    return NULL;
}

/* While the loop waits another thread may do its work; while it works that one is sent away. */
static void turns(void **state)
{
    enum { N = 2000 };
    pthread_t t;
    struct srv *s = &srv;
    char token[7];
    (void)state;
    int talking = cl_ws_open(s->port, "/x", ""), quiet = cl_ws_open(s->port, "/x", ""), refused = 0;
    cl_ws_text(quiet, "ready");
    assert_true(cl_ws_expect(quiet, 0x81, "ready"));
    srv_settled(s);
    burn = true;
    pthread_create(&t, NULL, chatter, &talking);
    for (int i = 0; i < N; i++) {
        s->wake_ns = ic_now_ns();
        for (; !ic_net_turn(s->net); refused++)
            ;
        assert_true(cl_read(quiet, token, 7) && memcmp(token + 2, "token", 5) == 0);
    }
    s->more = true;
    assert_false(ic_net_turn(s->net));
    s->more = false;
    burn = false;
    pthread_join(t, NULL);
    print_message("of %d turns %d were refused\n", N + refused, refused);
    close(talking);
    close(quiet);
}

static void idle_memory(void **state)
{
    (void)state;
    static struct srv s;
    enum { N = 1000 };
    static int fds[N];
    struct ic_net_config cfg = srv_config();
    srv_start(&s, &cfg);
    int warm = cl_ws_open(s.port, "/x", "");
    size_t before = rss_kib();
    for (int i = 0; i < N; i++) {
        fds[i] = cl_ws_open(s.port, "/x", "");
        assert_true(fds[i] >= 0);
        cl_ws_text(fds[i], "hello");
        assert_true(cl_ws_expect(fds[i], 0x81, "hello"));
    }
    size_t grown = rss_kib() - before;
    print_message("idle WebSocket connection: %.2f KiB (of %d)\n", (double)grown / N, N);
    wake_latency(&s, "1000 idle connections beside");
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    assert_true(grown < 32 * N);
#endif
    for (int i = 0; i < N; i++)
        close(fds[i]);
    close(warm);
    srv_stop(&s);
}

static void latency(void **state)
{
    (void)state;
    pthread_t t[2];
    wake_latency(&srv, "quiet");
    burn = true;
    for (int i = 0; i < 2; i++)
        pthread_create(&t[i], NULL, burner, NULL);
    wake_latency(&srv, "two threads burning");
    burn = false;
    for (int i = 0; i < 2; i++)
        pthread_join(t[i], NULL);
}

/* What a browser is told about pages of other origins. */
static void origins(void **state)
{
    static const char two[] = "https://a.example, http://b.example:81";
    static const struct {
        const char *list, *origin,
            *allow;    /* allow: what Access-Control-Allow-Origin says; NULL: there is none */
        int handshake; /* status of a WebSocket's */
    } cases[] = {
        {NULL, "https://a.example", NULL, 101},
        {NULL, NULL, NULL, 101},
        {"", "https://a.example", NULL, 403},
        {"*", "https://a.example", "*", 101},
        {"*", NULL, NULL, 101},
        {two, "https://a.example", "https://a.example", 101},
        {two, "HTTP://b.example:81", "HTTP://b.example:81", 101},
        {two, "http://b.example:8", NULL, 403},
        {two, "https://a.example.evil", NULL, 403},
        {two, "null", NULL, 403},
        {"https://a.example,null", "null", "null", 101},
        {two, "http://Here:3000", NULL, 101}, /* a page of our own */
        {two, "http://here:300", NULL, 403},
        {two, NULL, NULL, 101}, /* no browser */
    };
    static const char *const heads[] = {"GET /echo", "GET /sse",
                                        "POST /none"}; /* whole, streamed, refused */

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct srv s;
        struct ic_net_config cfg = srv_config();
        struct cl_answer a = {0};
        char origin[80] = "", want[160], req[512];

        cfg.origins = cases[i].list;
        srv_start(&s, &cfg);
        if (cases[i].origin)
            snprintf(origin, sizeof origin, "Origin: %s\r\n", cases[i].origin);
        snprintf(want, sizeof want, "\r\nAccess-Control-Allow-Origin: %s\r\n",
                 cases[i].allow ? cases[i].allow : "");
        for (size_t k = 0; k < 3; k++) {
            snprintf(req, sizeof req, "%s HTTP/1.1\r\nHost: here:3000\r\n%s\r\n", heads[k], origin);
            assert_int_equal(cl_get(s.port, req, &a), k < 2 ? 200 : 404);
            assert_int_equal(strstr(a.head, want) != NULL, cases[i].allow != NULL);
            assert_int_equal(strstr(a.head, "Access-Control") != NULL, cases[i].allow != NULL);
            assert_int_equal(strstr(a.head, "\r\nVary: Origin\r\n") != NULL, cases[i].list != NULL);
        }
        snprintf(
            req, sizeof req,
            "OPTIONS /echo HTTP/1.1\r\nHost: here:3000\r\n%sAccess-Control-Request-Method: POST\r\n\r\n",
            origin);
        assert_int_equal(cl_get(s.port, req, &a) == 204, cases[i].allow != NULL);
        assert_int_equal(strstr(a.head, "Access-Control-Allow-Headers: Authorization, *\r\n") != NULL,
                         cases[i].allow != NULL);
        snprintf(req, sizeof req,
                 "GET / HTTP/1.1\r\nHost: here:3000\r\n%sUpgrade: websocket\r\nConnection: upgrade\r\n"
                 "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
                 origin);
        int fd = cl_connect(s.port);
        cl_puts(fd, req);
        assert_int_equal(cl_answer(fd, &a, cases[i].handshake == 101), cases[i].handshake);
        close(fd);
        free(a.body);
        srv_stop(&s);
    }
    static const char *const good[] = {
        NULL, "", "*", "null", "https://a.example,http://b:81", "app://x.y-z", "file://"};
    static const char *const bad[] = {"a.example", "https://", "https://a/", "https://a,b", "*.a", "**"};
    struct ic_err err = {0};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        assert_int_equal(ic_net_check_origins(good[i], &err), IC_OK);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(ic_net_check_origins(bad[i], &err), IC_BAD_REQUEST);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(too_many),      cmocka_unit_test(addresses),   cmocka_unit_test(restart),
        cmocka_unit_test(static_files),  cmocka_unit_test(tls),         cmocka_unit_test(abrupt),
        cmocka_unit_test(paused_client), cmocka_unit_test(idle_memory), cmocka_unit_test(latency),
        cmocka_unit_test(turns),         cmocka_unit_test(origins),
    };
    return cmocka_run_group_tests(tests, shared_start, shared_stop);
}
