/* `--prefix FILE`: a text that many prompts will begin with, computed once at start and kept. As it stands it begins raw
 * prompts; where the model has a chat template it is also the system's turn, and then what two conversations under it
 * have in common is kept. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/utf8.h"
#include "sched/text_sched.h"

#define PREFIX_BYTES_MAX (4 << 20)

static enum ic_status read_text(const char *path, char **out, size_t *len, struct ic_err *err)
{
    FILE *f = fopen(path, "rb");
    char *text = f ? malloc(PREFIX_BYTES_MAX + 1) : NULL;

    *out = NULL;
    *len = 0;
    if (!f)
        return ic_fail(err, IC_NOT_FOUND, "prefix %s: %s", path, strerror(errno));
    *len = text ? fread(text, 1, PREFIX_BYTES_MAX + 1, f) : 0;
    bool failed = ferror(f) != 0;
    fclose(f);
    if (!text)
        return ic_fail(err, IC_OOM, "out of memory");
    if (failed || *len == 0 || *len > PREFIX_BYTES_MAX || memchr(text, 0, *len) ||
        !ic_utf8_valid(text, *len)) {
        free(text);
        return ic_fail(err, IC_BAD_REQUEST, "prefix %s: not a UTF-8 text of 1 to %d bytes", path,
                       PREFIX_BYTES_MAX);
    }
    text[*len] = 0;
    *out = text;
    return IC_OK;
}

/* The tokens with which every conversation under this system's turn begins. */
static enum ic_status chat_beginning(const struct ic_text_backend *be, const char *text, int32_t **out,
                                     int32_t *n, struct ic_err *err)
{
    const struct ic_chat_msg a[] = {{"system", text}, {"user", "a"}},
                             b[] = {{"system", text}, {"user", "?"}};
    int32_t *other = NULL, n_other = 0;
    enum ic_status st = be->chat(be->arg, a, 2, be->ctx_size - 1, out, n, err);

    if (st == IC_OK && (st = be->chat(be->arg, b, 2, be->ctx_size - 1, &other, &n_other, err)) == IC_OK) {
        int32_t k = 0;
        while (k < *n && k < n_other && (*out)[k] == other[k])
            k++;
        *n = k;
    }
    free(other);
    return st;
}

static enum ic_status pin(struct ic_text_sched *s, enum ic_status st, int32_t *tokens, int32_t n,
                          const char *path, struct ic_err *err)
{
    if (st == IC_TOO_LARGE)
        ic_fail(err, st, "prefix %s: longer than a context", path);
    else if (st == IC_OK && n > 0)
        st = ic_text_sched_pin(s, tokens, n, err);
    free(tokens);
    return st;
}

enum ic_status ic_text_pin_file(struct ic_text_sched *s, const struct ic_text_backend *be, const char *path,
                                bool chat, struct ic_err *err)
{
    int32_t *tokens = NULL, n = 0;
    size_t len;
    char *text;
    enum ic_status st = read_text(path, &text, &len, err);

    if (st != IC_OK)
        return st;
    st = be->tokenize(be->arg, text, len, true, be->ctx_size - 1, &tokens, &n, err);
    st = pin(s, st, tokens, n, path, err);
    if (st == IC_OK && chat) {
        tokens = NULL;
        st = chat_beginning(be, text, &tokens, &n, err);
        st = pin(s, st, tokens, n, path, err);
    }
    free(text);
    return st;
}
