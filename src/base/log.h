/* Log lines: level, module, text, and which request they are about. Readable on a terminal, one JSON object
 * a line elsewhere; time in UTC. Safe from any thread. Never log prompt or answer text above IC_LOG_TRACE.
 *
 * At first a line is one write(2) by its author to where stderr led at the start. From ic_log_start on,
 * lines go into a ring of IC_LOG_RING bytes and a thread of its own (ic-log) writes them, so that no disk
 * and no slow reader of a pipe holds up an engine: a line that finds the ring full is dropped and counted.
 * The thread has no timer; it sleeps until there is a line. How many were dropped, and how many the sink
 * could not write, stands in the next line that is written, and in ic_log_stats. */
#ifndef IC_BASE_LOG_H
#define IC_BASE_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum ic_log_level { IC_LOG_ERROR, IC_LOG_WARN, IC_LOG_INFO, IC_LOG_DEBUG, IC_LOG_TRACE };

#define IC_LOG_LINE_MAX 2048  /* bytes of a text; a longer one is cut */
#define IC_LOG_MODULES_MAX 16 /* modules with a level of their own */
#define IC_LOG_MODULE_LEN_MAX 15
#define IC_LOG_RING (256 << 10) /* bytes of lines that wait to be written */
#define IC_LOG_STOP_MS 2000     /* the sink may take to write what is left at the end */

/* Lines above `level` are dropped, whatever their module. Default IC_LOG_INFO. */
void ic_log_set_level(enum ic_log_level level);
/* Parses "info", "info,net=debug,text=warn": a level for all, then those of modules. Takes effect at once;
 * not to be called while other threads log. IC_BAD_REQUEST changes nothing. */
enum ic_status ic_log_set_levels(const char *spec, struct ic_err *err);
bool ic_log_enabled(enum ic_log_level level, const char *module);

void ic_log(enum ic_log_level level, const char *module, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* Which request a line is about, as far as the author knows; zero: unknown. */
struct ic_log_ids {
    uint64_t rid;   /* "rid": the request's number in this process */
    uint64_t owner; /* "conn": slot << 32 | generation of the connection, shown as "slot.generation" */
    uint64_t sim;   /* "sim": the simulation */
    const char *id; /* "id": the client's own name for the request */
};
void ic_log_about(const struct ic_log_ids *ids, enum ic_log_level level, const char *module,
                  const char *fmt, ...) __attribute__((format(printf, 4, 5)));

/* Between on and off, what libraries write to stderr by themselves goes nowhere; our lines go where they
 * always go. For calls that would print what a client sent. One thread at a time. */
void ic_log_mute_stderr(bool on);

#define ic_error(module, ...) ic_log(IC_LOG_ERROR, module, __VA_ARGS__)
#define ic_warn(module, ...) ic_log(IC_LOG_WARN, module, __VA_ARGS__)
#define ic_info(module, ...) ic_log(IC_LOG_INFO, module, __VA_ARGS__)
#define ic_debug(module, ...) ic_log(IC_LOG_DEBUG, module, __VA_ARGS__)

/* ---- the thread that writes ---- */

/* Where lines go. All but `fd` are called by the log thread only. */
struct ic_log_sink {
    void *arg;
    /* Writes whole lines and returns the bytes of those written, always up to the end of a line; fewer than
     * len: *why is the errno. May block. */
    size_t (*write)(void *arg, const char *data, size_t len, int *why);
    /* A piece of other work (compression), a few ms long, when no line waits. True: there is more. NULL:
     * none. */
    bool (*work)(void *arg);
    void (*reopen)(void *arg); /* NULL: not possible */
    int (*fd)(void *arg);      /* to write to in a crash; async-signal-safe */
};

struct ic_log_stats {
    uint64_t lines;   /* taken */
    uint64_t dropped; /* the ring was full */
    uint64_t lost;    /* the sink could not write them */
};

/* Starts the thread. NULL: lines go where they went before. The sink is borrowed until ic_log_stop. IC_OOM:
 * no thread; lines are written as before. Not twice. */
enum ic_status ic_log_start(const struct ic_log_sink *sink, struct ic_err *err);
/* Writes what is left, at most for IC_LOG_STOP_MS, and ends the thread; later lines are written by their
 * authors, to stderr. False: the sink still blocks; it stays in use and must not be closed, later lines are
 * dropped. */
bool ic_log_stop(void);
/* Waits until all lines logged so far are written, at most `ms`. */
void ic_log_flush(int ms);
/* The thread reopens its file before the next line. Also from a signal handler's thread; not from a
 * handler. */
void ic_log_reopen(void);
struct ic_log_stats ic_log_stats(void);

/* ---- in a crash: async-signal-safe, one thread, once ---- */

/* Stops the log thread, writes the lines that are still in the ring, and returns the descriptor they went
 * to. */
int ic_log_crash_begin(void);
/* One line at level error, to that descriptor, and to stderr where that is another. Printable ASCII. */
void ic_log_crash_line(const char *text, size_t len);

#endif
