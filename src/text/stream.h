/* The text of one answer on its way out: pieces of tokens go in, whole characters come out, and nothing that
 * could still become a stop string leaves before it is known not to. Belongs to one request; one thread. */
#ifndef IC_TEXT_STREAM_H
#define IC_TEXT_STREAM_H

#include "base/buf.h"

/* Owned by the caller; zero-initialise, set stop/n_stop (borrowed, non-empty strings). */
struct ic_stream {
    char *const *stop;
    int n_stop;
    struct ic_buf held; /* bytes that have not left yet */
    bool stopped;       /* a stop string was met: it and all after it is thrown away */
};

/* Adds the bytes of a token and appends to `out` what can leave now (valid UTF-8: invalid bytes are U+FFFD). Without memory
 * held.failed or out->failed is set. */
void ic_stream_push(struct ic_stream *s, const char *bytes, size_t n, struct ic_buf *out);
/* The answer is over: appends what is still held. */
void ic_stream_flush(struct ic_stream *s, struct ic_buf *out);
void ic_stream_deinit(struct ic_stream *s);

#endif
