/* A growable byte buffer with a bound, and a JSON writer over it.
 *
 * The buffer owns its bytes. Appending past `max` or out of memory sets `failed` and leaves the
 * content as it was; callers append freely and check `failed` once at the end. Not thread-safe:
 * one owner at a time. */
#ifndef IC_BASE_BUF_H
#define IC_BASE_BUF_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct ic_buf {
    char *data;
    size_t len, cap;
    size_t max; /* bytes; 0 means IC_BUF_MAX_DEFAULT */
    bool failed;
};

#define IC_BUF_MAX_DEFAULT ((size_t)64 << 20)

void ic_buf_deinit(struct ic_buf *b);                       /* frees; a zeroed buffer is fine */
void ic_buf_clear(struct ic_buf *b);                        /* len = 0, keeps the memory */
bool ic_buf_reserve(struct ic_buf *b, size_t extra);        /* room for `extra` more bytes */
void ic_buf_put(struct ic_buf *b, const void *p, size_t n); /* copies n bytes */
void ic_buf_puts(struct ic_buf *b, const char *s);          /* copies up to the NUL */
void ic_buf_printf(struct ic_buf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
char *ic_buf_take(struct ic_buf *b, size_t *len); /* caller frees; the buffer is empty after */
void ic_buf_base64(struct ic_buf *b, const void *p, size_t n);

/* JSON pieces. Strings are escaped, and bytes that are not UTF-8 become U+FFFD, so the output is
 * always a valid document. Numbers that JSON cannot hold (NaN, infinities) become null. */
void ic_json_str(struct ic_buf *b, const char *s, size_t n); /* with the quotes */
void ic_json_num(struct ic_buf *b, double v);
/* `,"key":` (or without the comma after '{' or '['), then the value */
void ic_json_key(struct ic_buf *b, const char *key);
void ic_json_kstr(struct ic_buf *b, const char *key, const char *s);
void ic_json_kint(struct ic_buf *b, const char *key, int64_t v);
void ic_json_knum(struct ic_buf *b, const char *key, double v);
void ic_json_kbool(struct ic_buf *b, const char *key, bool v);

#endif
