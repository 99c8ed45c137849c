/* Many clients, each with a simulation of its own, against a running server: frame intervals as they
 * arrive, and the memory that each further simulation costs.
 *
 *   law-serve-bench PORT [CLIENTS 100] [GRID 64] [SECONDS 20] [LAW]
 *
 * Prints one line a figure, for bench/law_serve.sh. Every client runs as fast as it is let, a frame each
 * step. */
#include <jansson.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "cli/ws_client.h"

#define CLIENTS_MAX 1000

struct client {
    struct ic_ws *ws;
    char sim[40];
    int64_t last_ns;
    long frames, step;
};

static double *gaps;
static size_t n_gaps, cap_gaps;

static void die(const char *what)
{
    fprintf(stderr, "law-serve-bench: %s\n", what);
    exit(1);
}

static void send_json(struct client *c, const char *json)
{
    struct ic_err err = {0};
    if (ic_ws_send(c->ws, json, strlen(json), false, &err) != IC_OK)
        die(err.msg);
}

/* Waits for the message `op` and returns it; others are thrown away. */
static json_t *await(struct client *c, const char *op)
{
    struct ic_buf msg = {0};
    struct ic_err err = {0};

    for (;;) {
        if (ic_ws_recv(c->ws, &msg, 60000, NULL, &err) != IC_OK)
            die(err.msg);
        json_t *o = msg.data[0] == '{' ? json_loadb(msg.data, msg.len, 0, NULL) : NULL;
        const char *got = json_string_value(json_object_get(o, "op"));
        if (got && !strcmp(got, "error"))
            die(json_string_value(json_object_get(o, "message")));
        if (got && !strcmp(got, op)) {
            ic_buf_deinit(&msg);
            return o;
        }
        json_decref(o);
    }
}

static double metric(const char *text, const char *name)
{
    const char *p = text;
    size_t n = strlen(name);

    while ((p = strstr(p, name)) && (p[n] != ' ' || (p != text && p[-1] != '\n')))
        p += n;
    return p ? atof(p + n) : 0;
}

/* GET /metrics over a plain socket of the WebSocket client's making is not worth a library: curl is there.
 */
static char *metrics(int port)
{
    char cmd[128];
    struct ic_buf b = {0};
    char chunk[4096];
    size_t n;

    snprintf(cmd, sizeof cmd, "curl -sf http://127.0.0.1:%d/metrics", port);
    FILE *f = popen(cmd, "r");
    if (!f)
        die("curl does not start");
    while ((n = fread(chunk, 1, sizeof chunk, f)) > 0)
        ic_buf_put(&b, chunk, n);
    ic_buf_put(&b, "", 1);
    if (pclose(f) != 0 || b.failed)
        die("no /metrics");
    return b.data;
}

static void add_gap(double ms)
{
    if (n_gaps == cap_gaps) {
        cap_gaps = cap_gaps ? 2 * cap_gaps : 4096;
        if (!(gaps = realloc(gaps, cap_gaps * sizeof *gaps)))
            die("out of memory");
    }
    gaps[n_gaps++] = ms;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void take(struct client *c, int64_t from_ns)
{
    static struct ic_buf msg;
    struct ic_err err = {0};

    if (ic_ws_recv(c->ws, &msg, 60000, NULL, &err) != IC_OK)
        die(err.msg);
    if (msg.len < 8 || msg.data[0] == '{')
        return;
    int64_t now = ic_now_ns();
    if (c->last_ns >= from_ns)
        add_gap((double)(now - c->last_ns) / IC_MS);
    c->last_ns = now;
    c->frames += now >= from_ns;
}

int main(int argc, char **argv)
{
    int port = argc > 1 ? atoi(argv[1]) : 0, n = argc > 2 ? atoi(argv[2]) : 100,
        grid = argc > 3 ? atoi(argv[3]) : 64;
    int seconds = argc > 4 ? atoi(argv[4]) : 20;
    const char *law = argc > 5 ? argv[5] : NULL;
    static struct client clients[CLIENTS_MAX];
    static struct pollfd pfd[CLIENTS_MAX];
    struct ic_err err = {0};
    char json[256];

    if (!port || n < 2 || n > CLIENTS_MAX)
        die("usage: law-serve-bench PORT [CLIENTS] [GRID] [SECONDS] [LAW]");
    double rss_one = 0, rss_all = 0, bytes_one = 0, bytes_all = 0;
    for (int i = 0; i < n; i++) {
        struct client *c = &clients[i];
        if (ic_ws_open(&c->ws, "127.0.0.1", port, "/", "", &err) != IC_OK)
            die(err.msg);
        snprintf(json, sizeof json,
                 "{\"op\":\"sim_create\",\"grid\":%d,\"seed\":%d,\"frames\":false%s%s%s}", grid, i,
                 law ? ",\"law\":\"" : "", law ? law : "", law ? "\"" : "");
        send_json(c, json);
        json_t *o = await(c, "sim_created");
        snprintf(c->sim, sizeof c->sim, "%s", json_string_value(json_object_get(o, "sim_id")));
        json_decref(o);
        /* One step each, so that all memory that a simulation ever touches has been touched. */
        snprintf(json, sizeof json, "{\"op\":\"sim_step\",\"sim_id\":\"%s\"}", c->sim);
        send_json(c, json);
        for (bool over = false; !over; json_decref(o)) {
            o = await(c, "sim_status");
            over = json_integer_value(json_object_get(o, "step")) == 1;
        }
        pfd[i] = (struct pollfd){ic_ws_fd(c->ws), POLLIN, 0};
        if (i == 0 || i == n - 1) {
            char *m = metrics(port);
            double rss = metric(m, "process_resident_memory_bytes"),
                   bytes = metric(m, "ic_law_state_bytes");
            *(i ? &rss_all : &rss_one) = rss;
            *(i ? &bytes_all : &bytes_one) = bytes;
            free(m);
        }
    }
    printf("state_bytes_per_sim %.0f\n", (bytes_all - bytes_one) / (n - 1));
    printf("rss_bytes_per_sim_and_connection %.0f\n", (rss_all - rss_one) / (n - 1));

    for (int i = 0; i < n; i++) {
        snprintf(json, sizeof json,
                 "{\"op\":\"sim_run\",\"sim_id\":\"%s\",\"view\":\"phase\",\"frames\":true}",
                 clients[i].sim);
        send_json(&clients[i], json);
    }
    int64_t from = ic_now_ns() + 2000 * IC_MS, until = from + seconds * 1000 * IC_MS; /* 2 s to settle */
    while (ic_now_ns() < until) {
        if (poll(pfd, (nfds_t)n, 1000) < 0)
            die("poll");
        for (int i = 0; i < n; i++)
            if (pfd[i].revents)
                take(&clients[i], from);
    }
    double sum = 0;
    long least = clients[0].frames, most = least;
    for (size_t i = 0; i < n_gaps; i++)
        sum += gaps[i];
    for (int i = 0; i < n; i++) {
        least = clients[i].frames < least ? clients[i].frames : least;
        most = clients[i].frames > most ? clients[i].frames : most;
    }
    if (!n_gaps)
        die("no frames");
    qsort(gaps, n_gaps, sizeof *gaps, by_value);
    double mean = sum / (double)n_gaps, p99 = gaps[(size_t)((double)(n_gaps - 1) * 0.99)];
    printf("clients %d\nframes %zu\nframes_least %ld\nframes_most %ld\n", n, n_gaps, least, most);
    printf("interval_ms_mean %.2f\ninterval_ms_p50 %.2f\ninterval_ms_p99 %.2f\ninterval_ms_max %.2f\n",
           mean, gaps[n_gaps / 2], p99, gaps[n_gaps - 1]);
    printf("p99_over_mean %.3f\n", p99 / mean);
    for (int i = 0; i < n; i++)
        ic_ws_close(&clients[i].ws);
    return 0;
}
