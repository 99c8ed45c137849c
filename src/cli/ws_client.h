/* A small blocking WebSocket client (RFC 6455, text and binary messages, no TLS): for `ask` and for the
 * tests and benchmarks written in C. One thread per client. */
#ifndef IC_CLI_WS_CLIENT_H
#define IC_CLI_WS_CLIENT_H

#include "base/buf.h"
#include "base/status.h"

struct ic_ws; /* opaque */

#define IC_WS_MESSAGE_MAX ((size_t)64 << 20)

/* Connects and shakes hands; `headers` is "" or extra lines, each ending in \r\n. */
enum ic_status ic_ws_open(struct ic_ws **out, const char *host, int port, const char *path,
                          const char *headers, struct ic_err *err);
enum ic_status ic_ws_send(struct ic_ws *w, const void *data, size_t len, bool binary, struct ic_err *err);
/* Waits for one whole message and puts it, NUL-terminated, into `out` (cleared first). Pings are answered.
 * IC_DEADLINE after timeout_ms (-1: never); IC_UNAVAILABLE when the server closed: *close_code then tells
 * why (1006: no frame). */
enum ic_status ic_ws_recv(struct ic_ws *w, struct ic_buf *out, int timeout_ms, int *close_code,
                          struct ic_err *err);
int ic_ws_fd(const struct ic_ws *w);
void ic_ws_close(struct ic_ws **w); /* sends a close frame, does not wait for the answer; accepts NULL */

#endif
