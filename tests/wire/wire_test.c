/* The server as a client written in C sees it: the binary itself, started by fork and exec, over real
 * sockets. The broad tests are the .test.mjs files beside it; this one adds what the client library of
 * `ask` and the benchmarks can show, and frames cut anywhere.
 *
 * IC_BIN: the server; IC_MODEL: its model. */
#include <errno.h>
#include <jansson.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "cli/ws_client.h"

#define GIVE_UP_MS 90000
#define ENDLESS "{\"temp\":1,\"seed\":1,\"grammar\":\"root ::= [a-z ] root\"}"

static pid_t server;
static bool server_failed; /* cmocka does not count a failed teardown */
static int port;
static FILE *server_log;

/* ---- the server --------------------------------------------------------------------------------- */

static int start_server(void **state)
{
    const char *bin = getenv("IC_BIN"), *model = getenv("IC_MODEL"), *at;
    int fds[2];
    char line[2000];

    (void)state;
    if (!bin || !model || pipe(fds) != 0)
        return -1;
    server = fork();
    if (server == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(fds[1], STDERR_FILENO);
        close(fds[0]);
        close(fds[1]);
        execl(bin, bin, "serve", "--model", model, "--port", "0", "--threads", "1", "--ctx-size", "16384",
              "--kv-size", "65536", (char *)NULL);
        _exit(127);
    }
    close(fds[1]);
    server_log = fdopen(fds[0], "r");
    while (server > 0 && server_log && fgets(line, sizeof line, server_log)) {
        fputs(line, stderr);
        if ((at = strstr(line, "ready on ws://127.0.0.1:"))) {
            port = atoi(at + strlen("ready on ws://127.0.0.1:"));
            return port > 0 ? 0 : -1;
        }
    }
    return -1;
}

/* It must still be there, and leave with 0: under the sanitizers anything else tells of an error. */
static int stop_server(void **state)
{
    char line[2000];
    int status = -1;

    (void)state;
    server_failed = true;
    if (kill(server, SIGTERM) != 0)
        return -1;
    while (fgets(line, sizeof line, server_log))
        fputs(line, stderr);
    fclose(server_log);
    if (waitpid(server, &status, 0) != server || !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        fprintf(stderr, "the server ended with status %d\n", status);
        return -1;
    }
    server_failed = false;
    return 0;
}

/* ---- a client ----------------------------------------------------------------------------------- */

struct client {
    struct ic_ws *ws;
    struct ic_buf msg;
    json_t *last;
};

static struct client join(const char *headers)
{
    struct client c = {0};
    struct ic_err err = {0};

    if (ic_ws_open(&c.ws, "127.0.0.1", port, "/", headers, &err) != IC_OK)
        fail_msg("cannot connect: %s", err.msg);
    return c;
}

static void say(struct client *c, const char *fmt, ...)
{
    struct ic_err err = {0};
    char text[4000];
    va_list ap;

    va_start(ap, fmt);
    int n = vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    assert_in_range(n, 1, sizeof text - 1);
    if (ic_ws_send(c->ws, text, (size_t)n, false, &err) != IC_OK)
        fail_msg("cannot send: %s", err.msg);
}

/* The next message; valid until the one after it. */
static json_t *hear(struct client *c)
{
    struct ic_err err = {0};

    json_decref(c->last);
    c->last = NULL;
    if (ic_ws_recv(c->ws, &c->msg, GIVE_UP_MS, NULL, &err) != IC_OK)
        fail_msg("nothing heard: %s", err.msg);
    c->last = json_loadb(c->msg.data, c->msg.len, 0, NULL);
    assert_non_null(c->last);
    return c->last;
}

static const char *str(json_t *o, const char *key)
{
    const char *s = json_string_value(json_object_get(o, key));
    return s ? s : "";
}

static json_t *hear_op(struct client *c, const char *op)
{
    json_t *m;

    while (strcmp(str(m = hear(c), "op"), op) != 0)
        ;
    return m;
}

static void leave(struct client *c)
{
    json_decref(c->last);
    ic_buf_deinit(&c->msg);
    ic_ws_close(&c->ws);
}

/* Without a word. */
static void vanish(struct client *c)
{
    struct linger hard = {1, 0};
    setsockopt(ic_ws_fd(c->ws), SOL_SOCKET, SO_LINGER, &hard, sizeof hard); /* RST */
    shutdown(ic_ws_fd(c->ws), SHUT_RDWR);
    leave(c);
}

/* The whole greedy answer, into `out`. */
static void answer(struct client *c, const char *id, const char *prompt, int max_tokens, struct ic_buf *out)
{
    json_t *m;

    ic_buf_clear(out);
    say(c, "{\"op\":\"infer\",\"id\":\"%s\",\"prompt\":\"%s\",\"params\":{\"temp\":0,\"max_tokens\":%d}}",
        id, prompt, max_tokens);
    for (int next = 0;;) {
        m = hear(c);
        assert_string_equal(str(m, "id"), id);
        if (!strcmp(str(m, "op"), "end"))
            break;
        assert_string_equal(str(m, "op"), "token");
        assert_int_equal(json_integer_value(json_object_get(m, "index")), next++);
        ic_buf_puts(out, str(m, "content"));
    }
    assert_string_equal(str(m, "reason"), "length");
    assert_int_equal(json_integer_value(json_object_get(json_object_get(m, "stats"), "tokens")),
                     max_tokens);
    ic_buf_put(out, "", 1);
    assert_false(out->failed);
}

static char *expected(void)
{
    static struct ic_buf b;
    struct client c = join("");

    if (!b.len) {
        hear_op(&c, "hello");
        answer(&c, "x", "Once upon a time", 40, &b);
    }
    leave(&c);
    return b.data;
}

static void check_right(void)
{
    struct client c = join("");
    struct ic_buf b = {0};

    hear_op(&c, "hello");
    answer(&c, "y", "Once upon a time", 40, &b);
    assert_string_equal(b.data, expected());
    ic_buf_deinit(&b);
    leave(&c);
}

/* ---- tests -------------------------------------------------------------------------------------- */

static void greets(void **state)
{
    struct client c = join("");
    json_t *m = hear(&c);

    (void)state;
    assert_string_equal(str(m, "op"), "hello");
    assert_string_equal(str(m, "status"), "ready");
    leave(&c);
    c = join("X-Client-ID: c\r\nX-API-Key: key\r\n");
    assert_string_equal(str(hear(&c), "op"), "auth_success");
    assert_string_equal(str(hear(&c), "op"), "hello");
    leave(&c);
}

static void streams(void **state)
{
    (void)state;
    assert_non_null(strstr(expected(), "there was a little girl"));
    for (int i = 0; i < 5; i++)
        check_right();
}

static void two_at_once(void **state)
{
    struct client c = join("");
    int tokens[2] = {0}, ends = 0, turns = 0, who, last = -1;

    (void)state;
    hear_op(&c, "hello");
    for (int i = 0; i < 2; i++)
        say(&c,
            "{\"op\":\"infer\",\"id\":\"%d\",\"prompt\":\"Once\",\"params\":{\"temp\":0,\"max_tokens\":150}"
            "}",
            i);
    while (ends < 2) {
        json_t *m = hear(&c);
        who = atoi(str(m, "id"));
        assert_in_range(who, 0, 1);
        if (!strcmp(str(m, "op"), "end"))
            ends++;
        else if (!strcmp(str(m, "op"), "token"))
            tokens[who]++;
        turns += who != last;
        last = who;
    }
    assert_int_equal(tokens[0], 150);
    assert_int_equal(tokens[1], 150);
    assert_true(turns > 50);
    leave(&c);
}

static void aborts(void **state)
{
    struct client c = join("");
    json_t *m;

    (void)state;
    hear_op(&c, "hello");
    for (int i = 0; i < 30; i++) {
        say(&c, "{\"op\":\"infer\",\"id\":\"a%d\",\"prompt\":\"Once\",\"params\":" ENDLESS "}", i);
        if (i % 3)
            hear_op(&c, "token");
        say(&c, "{\"op\":\"abort\",\"id\":\"a%d\"}", i);
        m = hear_op(&c, "abort");
        assert_string_equal(str(m, "status"), "aborted");
        m = hear(&c); /* nothing stands between the acknowledgement and the end */
        assert_string_equal(str(m, "op"), "end");
        assert_string_equal(str(m, "reason"), "abort");
    }
    leave(&c);
    check_right();
}

static void disconnects(void **state)
{
    (void)state;
    expected();
    for (int i = 0; i < 120; i++) {
        struct client c = join("");
        for (int k = 0; k < 3; k++)
            say(&c, "{\"op\":\"infer\",\"prompt\":\"Once upon a time\",\"params\":" ENDLESS "}");
        if (i % 4 == 1)
            hear_op(&c, "token");
        if (i % 4 == 2)
            say(&c, "{\"op\":\"abort\"}");
        if (i % 2)
            vanish(&c);
        else
            leave(&c);
        if (i % 20 == 19)
            check_right();
    }
}

static void pour(int fd, const unsigned char *p, size_t n)
{
    while (n) {
        ssize_t k = send(fd, p, n, MSG_NOSIGNAL);
        assert_true(k > 0 || errno == EINTR);
        p += k > 0 ? k : 0;
        n -= k > 0 ? (size_t)k : 0;
    }
}

/* One message as fragments of `step` bytes, each frame written in two pieces cut at `cut`, a ping between
 * them. */
static void send_fragments(int fd, const char *text, size_t step, size_t cut)
{
    static const unsigned char ping[] = {0x89, 0x81, 9, 8, 7, 6, 'p' ^ 9};
    size_t len = strlen(text);

    for (size_t at = 0; at < len; at += step) {
        size_t n = len - at < step ? len - at : step;
        unsigned char f[6 + 120] = {(unsigned char)((at ? 0 : 1) | (at + n == len ? 0x80 : 0)),
                                    (unsigned char)(0x80 | n),
                                    1,
                                    2,
                                    3,
                                    4};
        for (size_t i = 0; i < n; i++)
            f[6 + i] = (unsigned char)text[at + i] ^ f[2 + (i & 3)];
        size_t first = cut < 6 + n ? cut : 6 + n;
        pour(fd, f, first);
        pour(fd, f + first, 6 + n - first);
        if (at + n < len)
            pour(fd, ping, sizeof ping);
    }
}

static void fragments(void **state)
{
    static const size_t steps[] = {1, 2, 7, 50, 120};
    struct client c = join("");

    (void)state;
    hear_op(&c, "hello");
    for (size_t s = 0; s < sizeof steps / sizeof *steps; s++)
        for (size_t cut = 1; cut < 9; cut++) {
            send_fragments(
                ic_ws_fd(c.ws),
                "{\"op\":\"infer\",\"id\":\"f\xC3\xA9\",\"prompt\":\"Once upon a time \xF0\x9F\x98\x80\","
                "\"params\":{\"temp\":0,\"max_tokens\":2}}",
                steps[s], cut);
            json_t *m = hear_op(&c, "end");
            assert_string_equal(str(m, "id"), "f\xC3\xA9");
        }
    leave(&c);
}

static void many_in_one_write(void **state)
{
    struct client c = join("");
    unsigned char frames[40 * 20];
    const char ping[] = "{\"op\":\"ping\"}";
    size_t n = 0;

    (void)state;
    hear_op(&c, "hello");
    for (int i = 0; i < 40; i++) {
        const unsigned char head[] = {0x81, 0x80 | (sizeof ping - 1), 0, 0, 0, 0};
        memcpy(frames + n, head, sizeof head);
        memcpy(frames + n + sizeof head, ping, sizeof ping - 1);
        n += sizeof head + sizeof ping - 1;
    }
    pour(ic_ws_fd(c.ws), frames, n);
    for (int i = 0; i < 40; i++)
        assert_string_equal(str(hear(&c), "op"), "hello");
    leave(&c);
}

static void close_is_answered(void **state)
{
    static const unsigned char bye[] = {0x88, 0x82, 0, 0, 0, 0, 0x03, 0xE8};
    struct client c = join("");
    struct ic_err err = {0};
    int code = 0;

    (void)state;
    hear_op(&c, "hello");
    say(&c, "{\"op\":\"infer\",\"prompt\":\"Once\",\"params\":" ENDLESS "}");
    hear_op(&c, "token");
    pour(ic_ws_fd(c.ws), bye, sizeof bye);
    while (ic_ws_recv(c.ws, &c.msg, GIVE_UP_MS, &code, &err) == IC_OK)
        ;
    assert_int_equal(err.code, IC_UNAVAILABLE);
    assert_int_equal(code, 1000);
    leave(&c);
    check_right();
}

static void refuses_what_is_no_server(void **state)
{
    struct ic_ws *ws;
    struct ic_err err = {0};

    (void)state;
    assert_int_not_equal(ic_ws_open(&ws, "127.0.0.1", port, "/", "Sec-WebSocket-Version: 8\r\n", &err),
                         IC_OK);
    assert_null(ws);
    assert_int_not_equal(ic_ws_open(&ws, "no.such.host.invalid", port, "/", "", &err), IC_OK);
    assert_null(ws);
    ic_ws_close(&ws);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(greets),
        cmocka_unit_test(streams),
        cmocka_unit_test(two_at_once),
        cmocka_unit_test(aborts),
        cmocka_unit_test(disconnects),
        cmocka_unit_test(fragments),
        cmocka_unit_test(many_in_one_write),
        cmocka_unit_test(close_is_answered),
        cmocka_unit_test(refuses_what_is_no_server),
    };

    signal(SIGPIPE, SIG_IGN);
    return cmocka_run_group_tests(tests, start_server, stop_server) || server_failed;
}
