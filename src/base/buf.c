#include "base/buf.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/utf8.h"

void ic_buf_deinit(struct ic_buf *b)
{
    free(b->data);
    *b = (struct ic_buf){0};
}

void ic_buf_clear(struct ic_buf *b)
{
    b->len = 0;
    b->failed = false;
}

bool ic_buf_reserve(struct ic_buf *b, size_t extra)
{
    size_t max = b->max ? b->max : IC_BUF_MAX_DEFAULT;

    if (b->failed)
        return false;
    if (extra > max || b->len > max - extra) {
        b->failed = true;
        return false;
    }
    if (b->cap - b->len >= extra)
        return true;
    size_t cap = b->cap ? b->cap : 256;
    while (cap - b->len < extra)
        cap *= 2;
    char *p = realloc(b->data, cap);
    if (!p) {
        b->failed = true;
        return false;
    }
    b->data = p;
    b->cap = cap;
    return true;
}

void ic_buf_put(struct ic_buf *b, const void *p, size_t n)
{
    if (n && ic_buf_reserve(b, n)) {
        memcpy(b->data + b->len, p, n);
        b->len += n;
    }
}

void ic_buf_puts(struct ic_buf *b, const char *s)
{
    ic_buf_put(b, s, strlen(s));
}

void ic_buf_printf(struct ic_buf *b, const char *fmt, ...)
{
    va_list ap, again;

    va_start(ap, fmt);
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    if (n > 0 && ic_buf_reserve(b, (size_t)n + 1)) {
        vsnprintf(b->data + b->len, (size_t)n + 1, fmt, again);
        b->len += (size_t)n;
    }
    va_end(again);
}

char *ic_buf_take(struct ic_buf *b, size_t *len)
{
    char *p = b->data;
    if (len)
        *len = b->len;
    *b = (struct ic_buf){.max = b->max};
    return p;
}

static void put_escaped(struct ic_buf *b, const char *s, size_t n)
{
    static const char hex[] = "0123456789abcdef";
    size_t from = 0;

    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c >= 0x20 && c != '"' && c != '\\' && c != 0x7F)
            continue;
        ic_buf_put(b, s + from, i - from);
        from = i + 1;
        char esc[6] = {'\\', (char)c, '0', '0', hex[c >> 4], hex[c & 15]};
        switch (c) {
        case '"':
        case '\\': ic_buf_put(b, esc, 2); break;
        case '\n': ic_buf_put(b, "\\n", 2); break;
        case '\r': ic_buf_put(b, "\\r", 2); break;
        case '\t': ic_buf_put(b, "\\t", 2); break;
        default: esc[1] = 'u'; ic_buf_put(b, esc, 6);
        }
    }
    ic_buf_put(b, s + from, n - from);
}

void ic_json_str(struct ic_buf *b, const char *s, size_t n)
{
    ic_buf_put(b, "\"", 1);
    if (ic_utf8_valid(s, n)) {
        put_escaped(b, s, n);
    } else {
        char *fixed = n < SIZE_MAX / 3 ? malloc(3 * n) : NULL;
        if (fixed)
            put_escaped(b, fixed, ic_utf8_scrub(fixed, s, n));
        else
            b->failed = true;
        free(fixed);
    }
    ic_buf_put(b, "\"", 1);
}

void ic_json_num(struct ic_buf *b, double v)
{
    if (!isfinite(v))
        ic_buf_puts(b, "null");
    else
        ic_buf_printf(b, "%.9g", v);
}

void ic_json_key(struct ic_buf *b, const char *key)
{
    if (b->len && b->data[b->len - 1] != '{' && b->data[b->len - 1] != '[')
        ic_buf_put(b, ",", 1);
    ic_json_str(b, key, strlen(key));
    ic_buf_put(b, ":", 1);
}

void ic_json_kstr(struct ic_buf *b, const char *key, const char *s)
{
    ic_json_key(b, key);
    if (s)
        ic_json_str(b, s, strlen(s));
    else
        ic_buf_puts(b, "null");
}

void ic_json_kint(struct ic_buf *b, const char *key, int64_t v)
{
    ic_json_key(b, key);
    ic_buf_printf(b, "%lld", (long long)v);
}

void ic_json_knum(struct ic_buf *b, const char *key, double v)
{
    ic_json_key(b, key);
    ic_json_num(b, v);
}

void ic_json_kbool(struct ic_buf *b, const char *key, bool v)
{
    ic_json_key(b, key);
    ic_buf_puts(b, v ? "true" : "false");
}

void ic_buf_base64(struct ic_buf *b, const void *data, size_t n)
{
    static const char set[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const unsigned char *p = data;
    size_t len = (n + 2) / 3 * 4;

    if (!ic_buf_reserve(b, len))
        return;
    char *o = b->data + b->len;
    for (size_t i = 0; i < n; i += 3) {
        unsigned v =
            (unsigned)p[i] << 16 | (i + 1 < n ? (unsigned)p[i + 1] << 8 : 0) | (i + 2 < n ? p[i + 2] : 0);
        *o++ = set[v >> 18];
        *o++ = set[v >> 12 & 63];
        *o++ = i + 1 < n ? set[v >> 6 & 63] : '=';
        *o++ = i + 2 < n ? set[v & 63] : '=';
    }
    b->len += len;
}
