#include "ops/notify.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/utf8.h"

#define USEC_MAX (86400LL * 1000000) /* of a watchdog */

int64_t ic_notify_watchdog_ns(const char *usec, const char *pid, int64_t self)
{
    char *end;

    if (!usec || *usec < '0' || *usec > '9')
        return 0;
    errno = 0;
    long long us = strtoll(usec, &end, 10);
    if (errno || *end || us <= 0 || us > USEC_MAX)
        return 0;
    if (pid && *pid && strtoll(pid, NULL, 10) != self)
        return 0;
    return us * 1000;
}

static enum ic_status connect_to(struct ic_notify *n, const char *name, struct ic_err *err)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    size_t len = strlen(name);

    if ((*name != '/' && *name != '@') || len < 2 || len >= sizeof to.sun_path)
        return ic_fail(err, IC_BAD_REQUEST,
                       "NOTIFY_SOCKET must be a path or an abstract name of less than %zu bytes",
                       sizeof to.sun_path);
    memcpy(to.sun_path, name, len);
    if (*name == '@')
        to.sun_path[0] = 0;
    n->fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (n->fd < 0)
        return ic_fail(err, IC_INTERNAL, "no socket for NOTIFY_SOCKET: %s", strerror(errno));
    socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len + (*name == '/' ? 1 : 0));
    if (connect(n->fd, (struct sockaddr *)&to, size) == 0)
        return IC_OK;
    int why = errno;
    close(n->fd);
    n->fd = -1;
    return ic_fail(err, IC_UNAVAILABLE, "NOTIFY_SOCKET %s: %s", name, strerror(why));
}

enum ic_status ic_notify_open(struct ic_notify *n, struct ic_err *err)
{
    const char *name = getenv("NOTIFY_SOCKET"), *usec = getenv("WATCHDOG_USEC");

    *n = (struct ic_notify){.fd = -1};
    if (!name || !*name)
        return IC_OK;
    enum ic_status st = connect_to(n, name, err);
    if (st != IC_OK)
        return st;
    n->watchdog_ns = ic_notify_watchdog_ns(usec, getenv("WATCHDOG_PID"), getpid());
    if (usec && *usec && !n->watchdog_ns && ic_notify_watchdog_ns(usec, NULL, 0) == 0)
        return ic_fail(err, IC_BAD_REQUEST,
                       "WATCHDOG_USEC must be a number of microseconds, at most a day");
    return IC_OK;
}

void ic_notify_close(struct ic_notify *n)
{
    if (n->fd >= 0)
        close(n->fd);
    n->fd = -1;
}

static void put(struct ic_notify *n, bool must, const char *text)
{
    struct pollfd p = {.fd = n->fd, .events = POLLOUT};

    if (n->fd < 0)
        return;
    for (int tries = 0; tries < 2; tries++) {
        if (send(n->fd, text, strlen(text), MSG_NOSIGNAL) >= 0 || (errno != EAGAIN && errno != ENOBUFS) ||
            !must)
            return;
        poll(&p, 1, IC_NOTIFY_WAIT_MS);
    }
}

/* Whether the status changed. */
static bool set_status(struct ic_notify *n, const char *fmt, va_list ap)
{
    char raw[sizeof n->status / 3], text[sizeof n->status];

    int len = vsnprintf(raw, sizeof raw, fmt, ap);
    if (len < 0)
        return false;
    size_t k = ic_utf8_whole(raw, (size_t)len < sizeof raw ? (size_t)len : sizeof raw - 1);
    for (size_t i = 0; i < k; i++)
        if ((unsigned char)raw[i] < 0x20 || raw[i] == 0x7F)
            raw[i] = ' '; /* a newline would begin another assignment */
    text[ic_utf8_scrub(text, raw, k)] = 0;
    if (!strcmp(text, n->status))
        return false;
    strcpy(n->status, text);
    return true;
}

void ic_notify_ready(struct ic_notify *n, const char *fmt, ...)
{
    char text[IC_NOTIFY_MAX];
    va_list ap;

    va_start(ap, fmt);
    set_status(n, fmt, ap);
    va_end(ap);
    if (n->ready || n->stopping)
        return;
    n->ready = true;
    n->last_ns = ic_now_ns(); /* the watchdog's time begins with this */
    snprintf(text, sizeof text, "READY=1\nSTATUS=%s", n->status);
    put(n, true, text);
}

void ic_notify_status(struct ic_notify *n, const char *fmt, ...)
{
    char text[IC_NOTIFY_MAX];
    va_list ap;

    va_start(ap, fmt);
    bool news = set_status(n, fmt, ap);
    va_end(ap);
    if (!news)
        return;
    snprintf(text, sizeof text, "STATUS=%s", n->status);
    put(n, false, text);
}

void ic_notify_reloading(struct ic_notify *n)
{
    char text[64];

    if (!n->ready || n->stopping)
        return; /* it is not up yet: READY will say all */
    n->ready = false;
    snprintf(text, sizeof text, "RELOADING=1\nMONOTONIC_USEC=%lld", (long long)(ic_now_ns() / 1000));
    put(n, true, text);
}

void ic_notify_stopping(struct ic_notify *n)
{
    if (!n->stopping)
        put(n, true, "STOPPING=1\nSTATUS=shutting down");
    n->stopping = true;
}

int64_t ic_notify_due_ns(const struct ic_notify *n)
{
    return n->fd < 0 || !n->watchdog_ns ? INT64_MAX : n->last_ns + n->watchdog_ns / 2;
}

void ic_notify_tick(struct ic_notify *n, int64_t now_ns, bool (*well)(void *arg), void *arg)
{
    if (now_ns < ic_notify_due_ns(n) || (well && !well(arg)))
        return;
    n->last_ns = now_ns;
    put(n, false, "WATCHDOG=1");
}
