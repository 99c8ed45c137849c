#include "text/stream.h"

#include <string.h>

#include "base/utf8.h"

/* Where the stop string that is complete first begins in held (the longest where several end together: so it does
 * not matter how the text is cut into tokens), or SIZE_MAX; *keep gets how many bytes at the end of held could be
 * the beginning of one. */
static size_t find_stop(const struct ic_stream *s, size_t *keep)
{
    const char *h = s->held.data;
    size_t len = s->held.len, at = SIZE_MAX, end = SIZE_MAX;

    *keep = 0;
    for (int i = 0; i < s->n_stop; i++) {
        size_t n = strlen(s->stop[i]);
        const char *hit = memmem(h, len, s->stop[i], n);
        size_t from = hit ? (size_t)(hit - h) : SIZE_MAX;
        if (hit && (from + n < end || (from + n == end && from < at))) {
            at = from;
            end = from + n;
        }
        for (size_t k = n - 1 < len ? n - 1 : len; k > *keep; k--)
            if (!memcmp(h + len - k, s->stop[i], k)) {
                *keep = k;
                break;
            }
    }
    return at;
}

static void emit(struct ic_stream *s, size_t n, struct ic_buf *out)
{
    if (n && ic_buf_reserve(out, 3 * n))
        out->len += ic_utf8_scrub(out->data + out->len, s->held.data, n);
    memmove(s->held.data, s->held.data + n, s->held.len - n);
    s->held.len -= n;
}

void ic_stream_push(struct ic_stream *s, const char *bytes, size_t n, struct ic_buf *out)
{
    size_t keep;

    if (s->stopped || n == 0)
        return;
    ic_buf_put(&s->held, bytes, n);
    if (s->held.failed)
        return; /* the caller looks */
    size_t at = find_stop(s, &keep);
    if (at != SIZE_MAX) {
        s->stopped = true;
        emit(s, at, out);
        s->held.len = 0;
        return;
    }
    size_t whole = ic_utf8_whole(s->held.data, s->held.len);
    size_t free_to_go = s->held.len - keep;
    if (free_to_go > whole)
        free_to_go = whole;
    else if (free_to_go <
             whole) /* never cut inside a character, even where a stop string begins with its tail */
        free_to_go = ic_utf8_whole(s->held.data, free_to_go);
    if (free_to_go)
        emit(s, free_to_go, out);
}

void ic_stream_flush(struct ic_stream *s, struct ic_buf *out)
{
    if (s->held.len)
        emit(s, s->held.len, out);
}

void ic_stream_deinit(struct ic_stream *s)
{
    ic_buf_deinit(&s->held);
}
