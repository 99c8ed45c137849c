/* The text stream: input is `stops \n … \n\n`, then the answer, whose every byte is a coin for where it is cut.
 * Whole characters only, never more than the oracle of stream_test.c lets out, and all of it at the end. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "base/utf8.h"
#include "text/stream.h"

#define STOPS 4

static size_t naive_end(char *const *stop, int n_stop, const char *s, size_t len)
{
    for (size_t e = 1; e <= len; e++) {
        size_t longest = 0;
        for (int i = 0; i < n_stop; i++) {
            size_t n = strlen(stop[i]);
            if (n <= e && n > longest && !memcmp(s + e - n, stop[i], n))
                longest = n;
        }
        if (longest)
            return e - longest;
    }
    return len;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *s = (const char *)data, *end = s + size, *nl;
    char *stop[STOPS];
    int n = 0;

    if (size > 4096)
        return 0;
    while (n < STOPS && (nl = memchr(s, '\n', (size_t)(end - s))) && nl > s) {
        stop[n] = strndup(s, (size_t)(nl - s)); /* up to a NUL, as stop strings are */
        if (*stop[n])
            n++;
        else
            free(stop[n]);
        s = nl + 1;
    }
    size_t len = (size_t)(end - s), from = 0, most = naive_end(stop, n, s, len);
    struct ic_stream st = {.stop = stop, .n_stop = n};
    struct ic_buf out = {0};
    char *want = malloc(3 * len + 1);
    size_t n_want = ic_utf8_scrub(want, s, most);

    for (size_t i = 1; i <= len; i++) {
        if (i < len && (s[i] * 37 >> 3 & 3))
            continue;
        ic_stream_push(&st, s + from, i - from, &out);
        IC_ASSERT(ic_utf8_valid(out.data ? out.data : "", out.len) && out.len <= n_want);
        from = i;
    }
    if (!st.stopped)
        ic_stream_flush(&st, &out);
    IC_ASSERT(out.len == n_want && (!n_want || !memcmp(out.data, want, n_want)));
    free(want);
    ic_buf_deinit(&out);
    ic_stream_deinit(&st);
    while (n)
        free(stop[--n]);
    return 0;
}
