/* HTTP/1 request heads and chunked bodies as bytes: no sockets, no state of a connection.
 * Pure functions over caller-owned memory; any thread. */
#ifndef IC_NET_HEAD_H
#define IC_NET_HEAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define IC_HEAD_MAX 16384 /* bytes of a request head, else 431 */
#define IC_HEAD_FIELDS_MAX 100

/* What a head said. `text` owns the strings, one allocation of what is worth keeping. */
struct ic_req {
    char *text;
    const char *method, *path, *query;
    const char *kept; /* name NUL value NUL …: the fields ic_req_field knows */
    size_t kept_len;
    bool http11, keep_alive, head, upgrade, expect_continue, chunked;
    uint64_t length;
    int ws_version; /* 0: none given */
    char ws_key[25];
    char ws_protocol[64]; /* the first one offered, "" none */
    char etag[48];        /* If-None-Match, "" none */
};

/* Whether a request can begin with this byte; a TLS client's greeting does not. */
bool ic_head_begins(char c);

/* Where a head ends in p[0..len): the offset after the blank line, 0 when it is not complete. Looks at
 * bytes from `from` on (what was looked at before). */
size_t ic_head_end(const char *p, size_t len, size_t from);

/* Parses a whole head; changes the bytes. 0, or the HTTP status to refuse with and *why. On failure
 * `r` owns nothing. */
int ic_req_parse(struct ic_req *r, char *head, size_t len, const char **why);
const char *ic_req_field(const struct ic_req *r, const char *name); /* "" when absent */
void ic_req_deinit(struct ic_req *r);

/* Chunked coding. Zero-initialise. */
struct ic_chunked {
    uint64_t left;
    unsigned state, digits, extra; /* extra: bytes of extensions and trailers, bounded */
    bool done;
};

/* Takes bytes of a chunked body from p[0..len). At most one piece of content is returned per call:
 * *data, *data_len (0: none). Returns bytes used; -1: malformed. */
long ic_chunked_feed(struct ic_chunked *s, const uint8_t *p, size_t len, const uint8_t **data,
                     size_t *data_len);

#endif
