/* Telling a service manager how we are: the datagrams of sd_notify(3), written by hand.
 *
 * The manager names its socket in NOTIFY_SOCKET (a path, or '@' and an abstract name) and the time within
 * which it wants to hear WATCHDOG=1 again in WATCHDOG_USEC, meant for us where WATCHDOG_PID is ours or
 * absent. Without NOTIFY_SOCKET, which is normal, everything here does nothing. Nothing blocks: a datagram
 * that the manager has no room for is lost, but for READY, STOPPING and RELOADING, for which we wait up to
 * IC_NOTIFY_WAIT_MS.
 *
 * Thread: one owner at a time (the loop). */
#ifndef IC_OPS_NOTIFY_H
#define IC_OPS_NOTIFY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

#define IC_NOTIFY_MAX 1024 /* bytes of one datagram */
#define IC_NOTIFY_WAIT_MS 1000

struct ic_notify {
    int fd;              /* connected to the manager; -1: there is none */
    int64_t watchdog_ns; /* WATCHDOG=1 must come within this; 0: nobody waits for it */
    int64_t last_ns;     /* when the last one was sent */
    bool ready, stopping;
    char status[600]; /* the last STATUS, so that the same is not sent again */
};

/* Reads the environment. IC_OK also without a manager (fd -1). IC_BAD_REQUEST: NOTIFY_SOCKET or
 * WATCHDOG_USEC makes no sense; IC_UNAVAILABLE: nobody listens there. After an error *n is usable and mute.
 */
enum ic_status ic_notify_open(struct ic_notify *n, struct ic_err *err);
void ic_notify_close(struct ic_notify *n);

/* READY=1 with a status line (printf style; controls become blanks). Once; also ends what RELOADING began.
 */
void ic_notify_ready(struct ic_notify *n, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* STATUS= alone; the same text again is not sent. */
void ic_notify_status(struct ic_notify *n, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* RELOADING=1 with MONOTONIC_USEC; ic_notify_ready must follow. */
void ic_notify_reloading(struct ic_notify *n);
/* STOPPING=1, once. */
void ic_notify_stopping(struct ic_notify *n);

/* To be called regularly, at least once in half of watchdog_ns (see ic_notify_due_ns): sends WATCHDOG=1
 * when half of the time has gone and all is well. `well` NULL: that this is called at all is proof enough.
 * While it is not well the manager hears nothing and acts. */
void ic_notify_tick(struct ic_notify *n, int64_t now_ns, bool (*well)(void *arg), void *arg);
/* Nanoseconds (ic_now_ns) when tick wants to be called next; INT64_MAX: never. */
int64_t ic_notify_due_ns(const struct ic_notify *n);

/* What to give to a child as WATCHDOG_USEC, and how to read it: microseconds, at most a day. 0: none or not
 * for us. */
int64_t ic_notify_watchdog_ns(const char *usec, const char *pid, int64_t self);

#endif
