/* Status codes and error text, shared by every module.
 *
 * One code means one action for whoever receives it; the names are those of the wire protocol
 * (docs/protocol.md), so a library's failure travels to the client without translation. Functions
 * return `enum ic_status` (0 is success) and, where a person will read the cause, fill a
 * caller-owned `struct ic_err`. Only the edge of a request logs. Any thread. */
#ifndef IC_BASE_STATUS_H
#define IC_BASE_STATUS_H

#include <stddef.h>

/* X(symbol, wire name, HTTP status) */
#define IC_STATUS_TABLE(X)                                                                                 \
    X(OK, "ok", 200)                                                                                       \
    X(BAD_REQUEST, "bad_request", 400)   /* the input is wrong: do not repeat it */                        \
    X(TOO_LARGE, "too_large", 413)       /* past a named limit: send less */                               \
    X(UNAUTHORIZED, "unauthorized", 401) /* show valid credentials first */                                \
    X(FORBIDDEN, "forbidden", 403)       /* these credentials never may */                                 \
    X(NOT_FOUND, "not_found", 404)       /* no such file, session, model or path */                        \
    X(BUSY, "busy", 429)                 /* a queue is full: try again later */                            \
    X(OOM, "oom", 507)                   /* memory of a device or pool is exhausted */                     \
    X(DEADLINE, "deadline", 504)         /* the caller's time ran out */                                   \
    X(UNAVAILABLE, "unavailable", 503)   /* loading, draining or switched off */                           \
    X(INTERNAL, "internal", 500)         /* our fault, or the machine's (I/O) */

enum ic_status {
#define X(symbol, name, http) IC_##symbol,
    IC_STATUS_TABLE(X)
#undef X
        IC_STATUS_COUNT
};

#define IC_ERR_MSG_MAX 512

/* Owned by the caller; zero-initialise before use. `msg` is always NUL-terminated valid UTF-8. */
struct ic_err {
    enum ic_status code;
    char msg[IC_ERR_MSG_MAX];
};

/* Wire name of a code ("bad_request"); never NULL. */
const char *ic_status_name(enum ic_status code);
/* The HTTP status that fits a code. */
int ic_status_http(enum ic_status code);

/* Records code and text (printf style, cut to IC_ERR_MSG_MAX, made valid UTF-8, control characters
 * replaced) in `err`, which may be NULL, and returns `code` so that callers can `return ic_fail(…)`. */
enum ic_status ic_fail(struct ic_err *err, enum ic_status code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* For what only a bug can break; stays on in release builds. Never for input, files or memory. */
#define IC_ASSERT(cond) ((cond) ? (void)0 : ic_assert_failed(#cond, __FILE__, __LINE__))
_Noreturn void ic_assert_failed(const char *cond, const char *file, int line);

#endif
