/* Between text and tokens. Tokenising is llama.cpp's; what is ours is that a control token may only come from a
 * template, never from what a user wrote. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "text/internal.h"

/* Templates are rendered with a mark in the place of each content, so that template text and user text can be
 * told apart afterwards: MARK_OPEN index MARK_CLOSE, with a MARK_EDGE on both sides: white space that a trimming
 * template eats, of a kind that no template puts there itself. A content that is white space only stands for itself:
 * templates ask whether there is any. */
#define MARK_OPEN '\x01'
#define MARK_CLOSE '\x02'
#define MARK_EDGE '\v'
#define MARK_LEN_MAX 32
#define WHITE " \t\r\n\v\f" /* what templates trim */

/* Texts for BPE vocabularies are cut into words first, for many of them by std::regex, which calls itself for each character
 * of a word: 343 bytes of stack each, so 24,000 letters in a row ended the process. A word is as long as white space and what
 * is none in a row, at most. Where that is much, a thread with stack enough for it does it; its pages cost memory only
 * as far as they are used. */
#define WORD_MAX (128 << 10) /* characters */
#define WORD_SHORT 4096      /* no matter on any thread */
#define WORD_CHAR_STACK 512
#define STACK_BESIDE (1 << 20)

/* No word of the text, with the white space beside it, is longer, in characters. What is not ASCII may be of either kind. */
static size_t longest_word(const char *text, size_t len)
{
    size_t before = 0, run = 0, either = 0, most = 0; /* `either`: at the end of `run` */
    bool white = false;

    for (size_t i = 0; i < len; i++) {
        const unsigned char c = (unsigned char)text[i];
        const bool is_white = c && strchr(WHITE, c);
        if ((c & 0xC0) == 0x80)
            continue;
        if (c < 0x80 && is_white != white) {
            before = run - either;
            run = either;
            white = is_white;
        }
        run++;
        either = c < 0x80 ? 0 : either + 1;
        most = before + run > most ? before + run : most;
    }
    return most;
}

struct cut {
    const struct llama_vocab *vocab;
    const char *text;
    int32_t len, *tokens, cap, got;
    bool first, special;
};

static void *cut_up(void *arg)
{
    struct cut *c = arg;
    c->got = llama_tokenize(c->vocab, c->text, c->len, c->tokens, c->cap, c->first, c->special);
    return NULL;
}

static enum ic_status cut_up_deep(struct cut *c, size_t word, struct ic_err *err)
{
    pthread_attr_t attr;
    pthread_t thread;

    pthread_attr_init(&attr);
    bool ok = pthread_attr_setstacksize(&attr, word * WORD_CHAR_STACK + STACK_BESIDE) == 0 &&
              pthread_create(&thread, &attr, cut_up, c) == 0;
    pthread_attr_destroy(&attr);
    if (!ok)
        return ic_fail(err, IC_OOM, "no thread for the tokenizer");
    pthread_join(thread, NULL);
    return IC_OK;
}

enum ic_status ic_text_tokenize(const struct ic_text_model *m, const char *text, size_t len, bool first,
                                bool special, int32_t max, int32_t **out, int32_t *n, struct ic_err *err)
{
    size_t word = 0;

    *out = NULL;
    /* Every token covers at most max_piece bytes: refused before the work, not after it. */
    if (len / (size_t)(m->max_piece > 0 ? m->max_piece : 1) > (size_t)max || len > INT32_MAX / 4) {
        *n = (int32_t)(len / (size_t)m->max_piece);
        return IC_TOO_LARGE;
    }
    if (len > WORD_SHORT && llama_vocab_type(m->vocab) == LLAMA_VOCAB_TYPE_BPE &&
        (word = longest_word(text, len)) > WORD_MAX)
        return ic_fail(err, IC_BAD_REQUEST, "a word, or white space, of more than %d characters", WORD_MAX);
    enum ic_status st = ic_chars_check(m->chars, text, len, err);
    if (st != IC_OK)
        return st;
    int32_t cap = (int32_t)len + 8; /* a token per byte, BOS, EOS and a space prefix */
    int32_t *tokens = malloc(sizeof *tokens * (size_t)cap);
    if (!tokens)
        return ic_fail(err, IC_OOM, "out of memory");
    struct cut c = {m->vocab, text, (int32_t)len, tokens, cap, -1, first, special};
    if (word > WORD_SHORT)
        st = cut_up_deep(&c, word, err);
    else
        cut_up(&c);
    if (st != IC_OK) {
        free(tokens);
        return st;
    }
    int32_t got = c.got;
    if (got < 0) {
        free(tokens);
        return ic_fail(err, IC_INTERNAL, "the tokenizer failed");
    }
    /* "add_special" also appends EOS where a model wants it, which would end the answer before it begins. */
    if (first && got > 0 && llama_vocab_get_add_eos(m->vocab) &&
        tokens[got - 1] == llama_vocab_eos(m->vocab))
        got--;
    *n = got;
    if (got > max) {
        free(tokens);
        return IC_TOO_LARGE;
    }
    *out = tokens;
    return IC_OK;
}

enum ic_status ic_text_tokenize_more(const struct ic_text_model *m, const char *text, size_t len,
                                     int32_t max, int32_t **out, int32_t *n, struct ic_err *err)
{
    static const char mark[] = "\x01"; /* in no vocabulary part of a longer token */
    int32_t *head = NULL, n_head = 0;
    enum ic_status st;

    *out = NULL;
    *n = 0;
    if (llama_vocab_type(m->vocab) != LLAMA_VOCAB_TYPE_SPM)
        return ic_text_tokenize(m, text, len, false, false, max, out, n, err);
    /* llama.cpp has no switch for it: so the space goes in front of a mark, and both are taken away again. */
    char *marked = malloc(len + 1);
    if (!marked)
        return ic_fail(err, IC_OOM, "out of memory");
    *marked = *mark;
    memcpy(marked + 1, text, len);
    st = ic_text_tokenize(m, mark, 1, false, false, INT16_MAX, &head, &n_head, NULL);
    bool odd = st == IC_BAD_REQUEST; /* a vocabulary that does not know the mark, or joins it */
    if (st != IC_OK && !odd)
        ic_fail(err, st, "%s", ic_status_name(st));
    if (st == IC_OK) {
        st = ic_text_tokenize(m, marked, len + 1, false, false, max + n_head, out, n, err);
        *n -= *n < n_head ? *n : n_head;
    }
    odd = odd || (st == IC_OK && memcmp(*out, head, sizeof *head * (size_t)n_head));
    if (st == IC_OK && !odd)
        memmove(*out, *out + n_head, sizeof **out * (size_t)*n);
    free(head);
    free(marked);
    if (!odd)
        return st;
    free(*out);
    return ic_text_tokenize(m, text, len, false, false, max, out, n, err);
}

void ic_text_piece(const struct ic_text_model *m, int32_t token, struct ic_buf *out)
{
    ic_vocab_piece(m->vocab, token, out);
}

void ic_vocab_piece(const struct llama_vocab *vocab, int32_t token, struct ic_buf *out)
{
    char small[64];
    int32_t n = llama_token_to_piece(vocab, token, small, sizeof small, 0, false);

    if (n >= 0) {
        ic_buf_put(out, small, (size_t)n);
    } else if (ic_buf_reserve(out, (size_t)-n)) {
        n = llama_token_to_piece(vocab, token, out->data + out->len, -n, 0, false);
        out->len += n > 0 ? (size_t)n : 0;
    }
}

/* Renders the template over marks instead of contents. NUL-terminated in `out`. */
static enum ic_status render_marks(const struct ic_text_model *m, const struct ic_chat_msg *msgs, size_t n,
                                   struct ic_buf *out, struct ic_err *err)
{
    enum ic_status st = IC_OK;
    const char *family = m->zephyr ? "zephyr" : m->template;
    struct llama_chat_message *chat = calloc(n, sizeof *chat);
    char(*marks)[MARK_LEN_MAX] = calloc(n, sizeof *marks);

    if (!chat || !marks) {
        st = ic_fail(err, IC_OOM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < n; i++) {
        snprintf(marks[i], MARK_LEN_MAX, "%c%c%zu%c%c", MARK_EDGE, MARK_OPEN, i, MARK_CLOSE, MARK_EDGE);
        bool blank = msgs[i].content[strspn(msgs[i].content, WHITE)] == 0;
        chat[i] = (struct llama_chat_message){msgs[i].role, blank ? msgs[i].content : marks[i]};
    }
    int32_t need = llama_chat_apply_template(family, chat, n, true, NULL, 0);
    if (need < 0) {
        char name[48] = {0};
        snprintf(name, sizeof name, "%s", m->template);
        st = ic_fail(err, IC_BAD_REQUEST,
                     "the model's chat template (\"%s…\") is not one that llama.cpp knows", name);
        goto out;
    }
    if (!ic_buf_reserve(out, (size_t)need + 1)) {
        st = ic_fail(err, IC_OOM, "out of memory");
        goto out;
    }
    int32_t got = llama_chat_apply_template(family, chat, n, true, out->data, need + 1);
    out->len = got < need ? (size_t)(got < 0 ? 0 : got) : (size_t)need;
    out->data[out->len] = 0;
out:
    free(chat);
    free(marks);
    return st;
}

struct piece {
    const char *s;
    size_t len;
    bool user;
};

/* llama.cpp knows templates by family and closes a Zephyr turn with <|endoftext|>; models such as TinyLlama
 * use the family with their own EOS, and say so by `eos_token` in the template. */
static const char *wrong_end(const struct ic_text_model *m)
{
    static const char end[] = "<|endoftext|>";
    return strstr(m->template, "eos_token") && !strstr(m->template, end) ? end : NULL;
}

static void put_template(const struct ic_text_model *m, struct ic_buf *out, const char *s, size_t len)
{
    const char *bad = wrong_end(m), *end = s + len, *hit;
    int32_t eos = llama_vocab_eos(m->vocab);

    while (bad && eos >= 0 && (hit = memmem(s, (size_t)(end - s), bad, strlen(bad)))) {
        ic_buf_put(out, s, (size_t)(hit - s));
        ic_buf_puts(out, llama_vocab_get_text(m->vocab, eos));
        s = hit + strlen(bad);
    }
    ic_buf_put(out, s, (size_t)(end - s));
}

/* Splits a rendering at its marks and calls `put` for each stretch of template and of user text, in order. */
static bool walk(const struct ic_chat_msg *msgs, size_t n, const char *s, size_t len,
                 bool (*put)(void *, const char *, size_t, bool user), void *arg)
{
    const char *end = s + len;

    while (s < end) {
        const char *open = memchr(s, MARK_OPEN, (size_t)(end - s));
        char *close;
        unsigned long i = open ? strtoul(open + 1, &close, 10) : 0;
        if (!open || *close != MARK_CLOSE || i >= n)
            return put(arg, s, (size_t)(end - s), false);
        bool kept = open > s && open[-1] == MARK_EDGE && close[1] == MARK_EDGE;
        if (!put(arg, s, (size_t)(open - s) - kept, false))
            return false;
        const char *c = msgs[i].content;
        size_t clen = strlen(c);
        if (!kept) { /* this template trims, as its authors meant it to */
            while (clen && strchr(WHITE, c[clen - 1]))
                clen--;
            while (clen && strchr(WHITE, *c))
                c++, clen--;
        }
        if (!put(arg, c, clen, true))
            return false;
        s = close + 1 + kept;
    }
    return true;
}

struct gather {
    const struct ic_text_model *m;
    struct ic_buf *text;           /* whole rendering */
    int32_t *tokens, n, max, room; /* or token by token */
    bool has_control;              /* some user text spells a control token */
    struct ic_buf controls;        /* int32_t: the template's own control tokens, in order */
    enum ic_status st;
    struct ic_err *err;
};

static bool put_controls(struct gather *g, const char *s, size_t len)
{
    int32_t *t = NULL, n = 0;

    g->st = ic_text_tokenize(g->m, s, len, false, true, g->max, &t, &n, g->err);
    for (int32_t i = 0; g->st == IC_OK && i < n; i++)
        if (llama_vocab_is_control(g->m->vocab, t[i]))
            ic_buf_put(&g->controls, &t[i], sizeof t[i]);
    if (g->st != IC_OK)
        g->n = n;
    free(t);
    return g->st == IC_OK;
}

/* Whether the control tokens of the whole are the template's: user text may also make one together with the text
 * beside it. The BOS in front is the tokenizer's. */
static bool only_templates_controls(const struct gather *g, const int32_t *t, int32_t n)
{
    const int32_t *own = (const int32_t *)(const void *)g->controls.data;
    size_t left = g->controls.len / sizeof *own;
    bool bos = n > 0 && llama_vocab_get_add_bos(g->m->vocab) && t[0] == llama_vocab_bos(g->m->vocab);

    for (int32_t i = bos; i < n; i++) {
        if (!llama_vocab_is_control(g->m->vocab, t[i]))
            continue;
        if (!left || *own++ != t[i])
            return false;
        left--;
    }
    return left == 0;
}

static bool put_text(void *arg, const char *s, size_t len, bool user)
{
    struct gather *g = arg;

    if (!user) {
        size_t from = g->text->len;
        put_template(g->m, g->text, s, len);
        return g->text->len == from || put_controls(g, g->text->data + from, g->text->len - from);
    }
    int32_t *plain = NULL, *parsed = NULL, n_plain = 0, n_parsed = 0;
    g->st = ic_text_tokenize(g->m, s, len, false, false, g->max, &plain, &n_plain, g->err);
    if (g->st == IC_OK)
        g->st = ic_text_tokenize(g->m, s, len, false, true, g->max, &parsed, &n_parsed, g->err);
    else
        g->n = n_plain;
    if (g->st == IC_OK &&
        (n_plain != n_parsed || (n_plain && memcmp(plain, parsed, sizeof *plain * (size_t)n_plain))))
        g->has_control = true;
    free(plain);
    free(parsed);
    ic_buf_put(g->text, s, len);
    return g->st == IC_OK;
}

static bool put_tokens(void *arg, const char *s, size_t len, bool user)
{
    struct gather *g = arg;
    struct ic_buf fixed = {0};
    int32_t *t = NULL, n = 0;

    if (!len)
        return true;
    if (!user) {
        put_template(g->m, &fixed, s, len);
        s = fixed.data;
        len = fixed.len;
    }
    g->st = ic_text_tokenize(g->m, s, len, g->n == 0, !user, g->max - g->n, &t, &n, g->err);
    if (g->st == IC_OK)
        memcpy(g->tokens + g->n, t, sizeof *t * (size_t)n);
    g->n += n;
    free(t);
    ic_buf_deinit(&fixed);
    return g->st == IC_OK;
}

enum ic_status ic_text_chat_tokenize(const struct ic_text_model *m, const struct ic_chat_msg *msgs,
                                     size_t n_msgs, int32_t max, int32_t **out, int32_t *n,
                                     struct ic_err *err)
{
    struct ic_buf marks = {0}, text = {0};
    struct gather g = {.m = m, .text = &text, .max = max, .err = err};

    *out = NULL;
    if (!m->template)
        return ic_fail(
            err, IC_BAD_REQUEST,
            "this model has no chat template: send `prompt`, or start the server with --chat-template");
    enum ic_status st = render_marks(m, msgs, n_msgs, &marks, err);
    if (st != IC_OK)
        goto out;
    walk(msgs, n_msgs, marks.data, marks.len, put_text, &g);
    if ((st = g.st) != IC_OK || text.failed || g.controls.failed) {
        *n = g.n;
        st = st != IC_OK ? st : ic_fail(err, IC_OOM, "out of memory");
        goto out;
    }
    if (!g.has_control) { /* the usual case: exactly the tokens that llama.cpp's own tools would make */
        st = ic_text_tokenize(m, text.data ? text.data : "", text.len, true, true, max, out, n, err);
        if (st != IC_OK || only_templates_controls(&g, *out, *n))
            goto out;
        free(*out);
        *out = NULL;
    }
    g.n = 0;
    if (!(g.tokens = malloc(sizeof *g.tokens * ((size_t)max + 1)))) {
        st = ic_fail(err, IC_OOM, "out of memory");
        goto out;
    }
    walk(msgs, n_msgs, marks.data, marks.len, put_tokens, &g);
    *n = g.n;
    if ((st = g.st) == IC_OK)
        *out = g.tokens;
    else
        free(g.tokens);
out:
    ic_buf_deinit(&marks);
    ic_buf_deinit(&text);
    ic_buf_deinit(&g.controls);
    return st;
}
