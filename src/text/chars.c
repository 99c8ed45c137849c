/* Characters that a vocabulary has no tokens for. SPM vocabularies spell them in tokens for bytes; where one of these is missing
 * too, llama.cpp throws, which C cannot catch and the process does not survive. RWKV's are lists of bytes; where a token begins
 * with a byte that is none by itself, llama.cpp goes round for ever and takes all memory. So vocabularies without all of the
 * bytes are remembered with what they have, and a text is looked at before it is given to llama.cpp. */
#include <stdlib.h>
#include <string.h>

#include "text/internal.h"

#define BLANK "\xE2\x96\x81" /* U+2581, which llama.cpp writes for a space */

struct ic_chars {
    bool byte[256]; /* there is a token for it */
    bool blanks;    /* a space is written as BLANK, and one may be put in front (SPM) */
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

static enum ic_status learn_piece(struct ic_chars *c, const struct llama_vocab *vocab, int32_t token)
{
    struct ic_buf piece = {0};

    ic_vocab_piece(vocab, token, &piece);
    if (piece.len == 1)
        c->byte[(unsigned char)piece.data[0]] = true;
    const bool failed = piece.failed;
    ic_buf_deinit(&piece);
    return failed ? IC_OOM : IC_OK;
}

enum ic_status ic_chars_learn(struct ic_chars **out, const struct llama_vocab *vocab, struct ic_err *err)
{
    const int32_t n = llama_vocab_n_tokens(vocab);
    const bool spm = llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_SPM;
    enum ic_status st = IC_OK;
    bool all = true;

    *out = NULL;
    if (!spm && llama_vocab_type(vocab) != LLAMA_VOCAB_TYPE_RWKV)
        return IC_OK;
    struct ic_chars *c = calloc(1, sizeof *c + sizeof *c->known * (size_t)n);
    if (!c)
        return ic_fail(err, IC_OOM, "out of memory");
    c->blanks = spm;
    for (int32_t i = 0; i < n && st == IC_OK; i++)
        if (spm)
            learn(c, llama_vocab_get_text(vocab, i));
        else
            st = learn_piece(c, vocab, i);
    for (int i = 1; i < 256; i++) /* there is no NUL in a text */
        all = all && c->byte[i];
    if (all || st != IC_OK) {
        free(c);
        return st == IC_OK ? IC_OK : ic_fail(err, st, "out of memory");
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
    bool ok = !c || !c->blanks || has(c, BLANK, 3);

    for (size_t i = 0, n; c && ok && i < len; i += n) {
        n = char_len((unsigned char)text[i]);
        n = n < len - i ? n : len - i;
        ok = (c->blanks && text[i] == ' ') || has(c, text + i, n);
        if (!ok)
            return ic_fail(err, IC_BAD_REQUEST, "the model's vocabulary does not know the character %.*s",
                           (int)n, text + i);
    }
    return ok ? IC_OK : ic_fail(err, IC_BAD_REQUEST, "the model's vocabulary does not know spaces");
}
