#include "base/utf8.h"

#include <string.h>

/* Length of the well-formed character at s (1..4), 0 when malformed; *need gets the length that the
 * lead byte announces and *good the bytes (>= 1) that form a maximal valid prefix of it. */
static size_t char_at(const unsigned char *s, size_t len, size_t *need, size_t *good)
{
    unsigned char c = s[0], lo = 0x80, hi = 0xBF;
    size_t n;

    *good = 1;
    if (c < 0x80)
        n = 1;
    else if (c >= 0xC2 && c <= 0xDF)
        n = 2;
    else if (c >= 0xE0 && c <= 0xEF) {
        n = 3;
        if (c == 0xE0)
            lo = 0xA0; /* no overlong */
        if (c == 0xED)
            hi = 0x9F; /* no surrogates */
    } else if (c >= 0xF0 && c <= 0xF4) {
        n = 4;
        if (c == 0xF0)
            lo = 0x90;
        if (c == 0xF4)
            hi = 0x8F;
    } else {
        *need = 1;
        return 0;
    }
    *need = n;
    for (size_t i = 1; i < n; i++) {
        if (i >= len || s[i] < lo || s[i] > hi)
            return 0;
        lo = 0x80;
        hi = 0xBF;
        *good = i + 1;
    }
    return n;
}

bool ic_utf8_valid(const char *s, size_t len)
{
    const unsigned char *p = (const unsigned char *)s;
    size_t need, good;

    for (size_t i = 0; i < len;) {
        size_t n = p[i] < 0x80 ? 1 : char_at(p + i, len - i, &need, &good);
        if (n == 0)
            return false;
        i += n;
    }
    return true;
}

size_t ic_utf8_whole(const char *s, size_t len)
{
    const unsigned char *p = (const unsigned char *)s;
    size_t back = len < 3 ? len : 3;

    for (size_t i = 1; i <= back; i++) {
        unsigned char c = p[len - i];
        size_t need, good;
        if (c < 0x80)
            return len;
        if (c >= 0xC0) { /* the last lead byte: is what follows it a prefix that could grow? */
            if (char_at(p + len - i, i, &need, &good) == 0 && good == i && need > i)
                return len - i;
            return len;
        }
    }
    return len;
}

size_t ic_utf8_scrub(char *out, const char *s, size_t len)
{
    const unsigned char *p = (const unsigned char *)s;
    size_t w = 0, need, good;

    for (size_t i = 0; i < len;) {
        size_t n = char_at(p + i, len - i, &need, &good);
        if (n) {
            memcpy(out + w, s + i, n);
            w += n;
            i += n;
        } else {
            memcpy(out + w, "\xEF\xBF\xBD", 3);
            w += 3;
            i += good;
        }
    }
    return w;
}
