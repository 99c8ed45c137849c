/* `inference-core ask TEXT`: a client in a few lines, for a first look and for scripts. */
#include "base/json.h"
#include "cli/cli.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/ws_client.h"

struct ask {
    const char *host, *text, *key;
    int port, max_tokens;
    bool raw; /* send it as a prompt, not as a user's message */
};

static int parse(struct ask *a, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        const char *v = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(argv[i], "--raw")) {
            a->raw = true;
        } else if (!strncmp(argv[i], "--", 2) && argv[i][2]) {
            if (!v)
                return ic_cli_fail(IC_EXIT_USAGE, "ask: an option lacks its value");
            if (!strcmp(argv[i], "--host"))
                a->host = v;
            else if (!strcmp(argv[i], "--port"))
                a->port = atoi(v);
            else if (!strcmp(argv[i], "--max-tokens"))
                a->max_tokens = atoi(v);
            else if (!strcmp(argv[i], "--key"))
                a->key = v;
            else
                return ic_cli_fail(IC_EXIT_USAGE, "ask: unknown option (see inference-core help)");
            i++;
        } else if (a->text) {
            return ic_cli_fail(IC_EXIT_USAGE, "ask: give the text as one argument");
        } else {
            a->text = argv[i];
        }
    }
    return a->text ? IC_EXIT_OK : ic_cli_fail(IC_EXIT_USAGE, "ask: what?");
}

static enum ic_status send_request(struct ic_ws *ws, const struct ask *a, struct ic_err *err)
{
    struct ic_buf b = {0};

    ic_buf_puts(&b, "{\"op\":\"infer\"");
    if (a->raw) {
        ic_json_kstr(&b, "prompt", a->text);
    } else {
        ic_buf_puts(&b, ",\"messages\":[{\"role\":\"user\"");
        ic_json_kstr(&b, "content", a->text);
        ic_buf_puts(&b, "}]");
    }
    ic_buf_printf(&b, ",\"params\":{\"max_tokens\":%d}}", a->max_tokens);
    enum ic_status st =
        b.failed ? ic_fail(err, IC_OOM, "out of memory") : ic_ws_send(ws, b.data, b.len, false, err);
    ic_buf_deinit(&b);
    return st;
}

/* Prints tokens until the end. */
static int show(struct ic_ws *ws)
{
    struct ic_err err = {0};
    struct ic_buf msg = {0};
    int rc = -1;

    while (rc < 0) {
        if (ic_ws_recv(ws, &msg, -1, NULL, &err) != IC_OK) {
            rc = ic_cli_fail(IC_EXIT_FAILED, err.msg);
            break;
        }
        json_t *o = ic_json_load(msg.data, msg.len, 0, NULL);
        const char *op = json_string_value(json_object_get(o, "op")), *s;
        if (op && !strcmp(op, "token") && (s = json_string_value(json_object_get(o, "content")))) {
            fputs(s, stdout);
            fflush(stdout);
        } else if (op && !strcmp(op, "error")) {
            s = json_string_value(json_object_get(o, "message"));
            rc = ic_cli_fail(IC_EXIT_FAILED, s ? s : "the server refused");
        } else if (op && !strcmp(op, "end")) {
            const json_t *st = json_object_get(o, "stats");
            putchar('\n');
            if (isatty(STDERR_FILENO))
                fprintf(stderr, "(%lld tokens, first after %.0f ms, %.1f tokens/s)\n",
                        (long long)json_integer_value(json_object_get(st, "tokens")),
                        json_number_value(json_object_get(st, "ttft_ms")),
                        json_number_value(json_object_get(st, "tps")));
            rc = IC_EXIT_OK;
        }
        json_decref(o);
    }
    ic_buf_deinit(&msg);
    return rc;
}

int ic_cli_ask(int argc, char **argv)
{
    struct ask a = {.host = "127.0.0.1", .port = 3000, .max_tokens = 256};
    struct ic_err err = {0};
    struct ic_ws *ws;
    char headers[400] = "";
    int rc = parse(&a, argc, argv);

    if (rc != IC_EXIT_OK)
        return rc;
    signal(SIGPIPE, SIG_IGN);
    if (a.key)
        snprintf(headers, sizeof headers, "Authorization: Bearer %.300s\r\n", a.key);
    if (ic_ws_open(&ws, a.host, a.port, "/", headers, &err) != IC_OK)
        return ic_cli_fail(IC_EXIT_FAILED, err.msg);
    rc = send_request(ws, &a, &err) == IC_OK ? show(ws) : ic_cli_fail(IC_EXIT_FAILED, err.msg);
    ic_ws_close(&ws);
    return rc;
}
