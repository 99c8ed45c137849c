/* What a client sends over HTTP: a request's head, and then a chunked body, which means the same however it is cut. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "net/head.h"

/* Reads a chunked body in pieces of `step` bytes. Its content's length, -1: malformed; *used: bytes up to its end. */
static long read_chunks(const uint8_t *p, size_t len, size_t step, uint8_t *out, size_t *used)
{
    struct ic_chunked c = {0};
    size_t n = 0, at = 0;

    while (at < len && !c.done) {
        const uint8_t *data = NULL;
        size_t piece = len - at < step ? len - at : step, data_len = 0;
        long taken = ic_chunked_feed(&c, p + at, piece, &data, &data_len);
        if (taken < 0)
            return -1;
        IC_ASSERT(taken > 0 && (size_t)taken <= piece && data_len <= (size_t)taken && n + data_len <= len);
        IC_ASSERT(!data_len || (data >= p + at && data + data_len <= p + at + piece));
        if (data_len)
            memcpy(out + n, data, data_len);
        n += data_len;
        at += (size_t)taken;
    }
    *used = at;
    return (long)n;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const names[] = {"host", "origin", "authorization", "x-ic-law", "accept"};
    struct ic_req r;
    const char *why = NULL;
    size_t end = ic_head_end((const char *)data, size, 0);

    IC_ASSERT(end <= size);
    if (size > IC_HEAD_MAX)
        return 0;
    if (end) {
        char *head = malloc(end);
        memcpy(head, data, end);
        int status = ic_req_parse(&r, head, end, &why);
        free(head); /* what is kept is a copy */
        IC_ASSERT(status == 0 || (status >= 400 && status < 600 && *why));
        if (!status) {
            IC_ASSERT(*r.method && r.path[0] == '/' && strlen(r.path) < end && strlen(r.query) < end);
            IC_ASSERT(!(r.chunked && r.length) && (r.http11 || !r.chunked));
            for (size_t i = 0; i < sizeof names / sizeof *names; i++)
                IC_ASSERT(strlen(ic_req_field(&r, names[i])) < end);
            ic_req_deinit(&r);
        }
    }
    size_t used[2] = {0};
    uint8_t *out[2] = {malloc(size - end + 1), malloc(size - end + 1)};
    long whole = read_chunks(data + end, size - end, size + 1, out[0], &used[0]),
         bytes = read_chunks(data + end, size - end, 1, out[1], &used[1]);
    IC_ASSERT(whole == bytes && used[0] == used[1]);
    IC_ASSERT(whole <= 0 || !memcmp(out[0], out[1], (size_t)whole));
    free(out[0]);
    free(out[1]);
    return 0;
}
