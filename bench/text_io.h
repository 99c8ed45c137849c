/* Clients of the text benchmarks: our WebSocket protocol and llama-server's SSE behind one face, so that
 * both are timed by the same code. One thread; poll(2) over all streams. */
#ifndef IC_BENCH_TEXT_IO_H
#define IC_BENCH_TEXT_IO_H

#include <stdbool.h>
#include <stdint.h>

#include "base/buf.h"

struct ic_ws;

struct text_stream {
    struct ic_ws *ws; /* our server; NULL: SSE */
    int fd;
    struct ic_buf in; /* SSE: bytes not yet a line; WebSocket: the last message */
    int64_t sent_ns;  /* the request */
    int64_t *at_ns;   /* arrival of each token message */
    int n, cap;
    int64_t abort_ns, ack_ns; /* abort sent; answered */
    int64_t end_ns;           /* 0: still running */
    char reason[16];          /* of the end; "error" too when the server sent one */
    double server_tps;
    int prompt_tokens;
};

struct text_request {
    const char *prompt;
    int max_tokens;
    bool greedy; /* else our defaults: temp 0.7, top_k 40, top_p 0.95, min_p 0.05 */
    bool cached; /* what earlier or other requests have computed may be used; else all is computed */
};

/* All of these end the process with a message when something fails: a benchmark has nothing else to do
 * then. */
void text_fail(const char *what);
void text_open_ws(struct text_stream *s, int port);
void text_send_ws(struct text_stream *s, const struct text_request *r, const char *id);
void text_abort_ws(struct text_stream *s, const char *id);
void text_open_sse(struct text_stream *s, int port, const struct text_request *r);
/* Takes what has arrived on any stream, waiting for at most `wait_ns` (-1: until something comes). */
void text_pump(struct text_stream *s, int n, int64_t wait_ns);
void text_reset(struct text_stream *s); /* ready for another request on the same connection */
void text_close(struct text_stream *s);

/* GET; the whole answer, NUL-terminated, owned by the caller. */
char *text_http_get(int port, const char *path);

#endif
