#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/utf8.h"

#define BUG_FLUSH_MS 500 /* the log may take for its lines before we abort */

static const struct {
    const char *name;
    int http;
} status_table[IC_STATUS_COUNT] = {
#define X(symbol, name, http) {name, http},
    IC_STATUS_TABLE(X)
#undef X
};

const char *ic_status_name(enum ic_status code)
{
    return (unsigned)code < IC_STATUS_COUNT ? status_table[code].name : "internal";
}

int ic_status_http(enum ic_status code)
{
    return (unsigned)code < IC_STATUS_COUNT ? status_table[code].http : 500;
}

enum ic_status ic_fail(struct ic_err *err, enum ic_status code, const char *fmt, ...)
{
    if (err) {
        char raw[IC_ERR_MSG_MAX / 3];
        va_list ap;
        va_start(ap, fmt);
        int n = vsnprintf(raw, sizeof raw, fmt, ap);
        va_end(ap);
        size_t len = n < 0 ? 0 : (size_t)n < sizeof raw ? (size_t)n : sizeof raw - 1;
        if ((size_t)(n < 0 ? 0 : n) >= sizeof raw)
            len = ic_utf8_whole(raw, len);
        for (size_t i = 0; i < len; i++)
            if ((unsigned char)raw[i] < 0x20 || raw[i] == 0x7F)
                raw[i] = ' ';
        len = ic_utf8_scrub(err->msg, raw, len);
        err->msg[len] = 0;
        err->code = code;
    }
    return code;
}

_Noreturn void ic_assert_failed(const char *cond, const char *file, int line)
{
    ic_log(IC_LOG_ERROR, "bug", "%s does not hold at %s:%d", cond, file, line);
    ic_log_flush(BUG_FLUSH_MS);
    fprintf(stderr, "inference-core: bug: %s does not hold at %s:%d\n", cond, file, line);
    abort();
}
