/* Characters that a vocabulary has no tokens for. SPM vocabularies spell them in tokens for bytes; where one of these is missing
 * too, llama.cpp throws, which C cannot catch and the process does not survive. So vocabularies without all of the 256 are
 * remembered with the characters that they have, and a text is looked at before it is given to llama.cpp. */
#include <stdlib.h>
#include <string.h>

#include "text/internal.h"

#define BLANK "\xE2\x96\x81" /* U+2581, which llama.cpp writes for a space */

struct ic_chars {
    bool byte[256]; /* there is a token for it */
    size_t n;
    uint32_t known[]; /* characters that are tokens, as their bytes read big-endian; ascending */
};

/* Bytes of the character that starts so, as llama.cpp counts them. */
static size_t char_len(unsigned char c)
{
    return c < 0xC0 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
}

static uint32_t char_at(const char *s, size_t len)
{
    uint32_t v = 0;
    for (size_t i = 0; i < len; i++)
        v = v << 8 | (unsigned char)s[i];
    return v;
}

static int ascending(const void *a, const void *b)
{
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void learn(struct ic_chars *c, const char *token)
{
    const size_t len = strlen(token);
    char *end;

    if (len > 0 && len <= 4 && char_len((unsigned char)*token) == len)
        c->known[c->n++] = char_at(token, len);
    if (len == 1)
        c->byte[(unsigned char)*token] = true;
    if (len != 6 || strncmp(token, "<0x", 3) != 0 || token[5] != '>')
        return;
    const unsigned long v = strtoul(token + 3, &end, 16);
    if (end == token + 5)
        c->byte[v] = true;
}

enum ic_status ic_chars_learn(struct ic_chars **out, const struct llama_vocab *vocab, struct ic_err *err)
{
    const int32_t n = llama_vocab_n_tokens(vocab);
    bool all = true;

    *out = NULL;
    if (llama_vocab_type(vocab) != LLAMA_VOCAB_TYPE_SPM)
        return IC_OK;
    struct ic_chars *c = calloc(1, sizeof *c + sizeof *c->known * (size_t)n);
    if (!c)
        return ic_fail(err, IC_OOM, "out of memory");
    for (int32_t i = 0; i < n; i++)
        learn(c, llama_vocab_get_text(vocab, i));
    for (int i = 0; i < 256; i++)
        all = all && c->byte[i];
    if (all) {
        free(c);
        return IC_OK;
    }
    qsort(c->known, c->n, sizeof *c->known, ascending);
    *out = c;
    return IC_OK;
}

static bool has(const struct ic_chars *c, const char *s, size_t len)
{
    const uint32_t v = char_at(s, len);
    bool spelled = true;

    for (size_t i = 0; i < len; i++)
        spelled = spelled && c->byte[(unsigned char)s[i]];
    return spelled || bsearch(&v, c->known, c->n, sizeof v, ascending);
}

enum ic_status ic_chars_check(const struct ic_chars *c, const char *text, size_t len, struct ic_err *err)
{
    bool ok = !c || has(c, BLANK, 3); /* one may be put in front */

    for (size_t i = 0, n; c && ok && i < len; i += n) {
        n = char_len((unsigned char)text[i]);
        n = n < len - i ? n : len - i;
        ok = text[i] == ' ' || has(c, text + i, n);
        if (!ok)
            return ic_fail(err, IC_BAD_REQUEST, "the model's vocabulary does not know the character %.*s",
                           (int)n, text + i);
    }
    return ok ? IC_OK : ic_fail(err, IC_BAD_REQUEST, "the model's vocabulary does not know spaces");
}
