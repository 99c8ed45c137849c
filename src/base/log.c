/* Authors format their line on their own stack and copy it into the ring under a lock held for that copy
 * alone. The log thread copies whole lines out, writes them without the lock, and only then moves `tail`:
 * what a crash interrupts is still in the ring.
 *
 *   ring    tail ≤ written … head: free running counts of bytes; authors move head (under the lock, after
 * the bytes are there), the log thread alone moves tail. crash   reads [tail, head) without the lock, which
 * the crashed thread may hold. `crashing` keeps the log thread from writing the same lines, and `writing`
 * tells that it is at it. Both are seq_cst: one of the two sees the other's. */
#include "base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/clock.h"
#include "base/utf8.h"

#define BATCH (64 << 10)            /* bytes written at once; every line fits */
#define LINE_BYTES 16384            /* a text of IC_LOG_LINE_MAX with every byte escaped, and the rest */
#define ID_MAX 128                  /* bytes of a client's id that are shown */
#define CRASH_WAIT_NS (200 * IC_MS) /* for the log thread to end the write it is in */

/* ---- levels ---- */

static const char *const level_names[] = {"error", "warn", "info", "debug", "trace"};
#define N_LEVELS (sizeof level_names / sizeof *level_names)

struct levels {
    int all, n;
    struct {
        char name[IC_LOG_MODULE_LEN_MAX + 1];
        int level;
    } module[IC_LOG_MODULES_MAX];
};

static struct levels levels = {.all = IC_LOG_INFO};
static atomic_int level_max = IC_LOG_INFO; /* the highest of them: what is above it needs no look-up */

void ic_log_set_level(enum ic_log_level level)
{
    levels = (struct levels){.all = (int)level};
    atomic_store(&level_max, (int)level);
}

static int level_named(const char *name, size_t len)
{
    for (size_t i = 0; i < N_LEVELS; i++)
        if (strlen(level_names[i]) == len && !strncmp(level_names[i], name, len))
            return (int)i;
    return -1;
}

static enum ic_status parse_one(struct levels *l, const char *p, size_t len, bool first, struct ic_err *err)
{
    const char *eq = memchr(p, '=', len);
    size_t name = eq ? (size_t)(eq - p) : 0;
    int level = eq ? level_named(eq + 1, len - name - 1) : level_named(p, len);

    if (level < 0 || (!eq && !first))
        return ic_fail(
            err, IC_BAD_REQUEST,
            "log levels are error, warn, info, debug, trace, and then MODULE=LEVEL, not \"%.*s\"",
            (int)(len > 40 ? 40 : len), p);
    if (!eq) {
        l->all = level;
        return IC_OK;
    }
    if (!name || name > IC_LOG_MODULE_LEN_MAX || strspn(p, "abcdefghijklmnopqrstuvwxyz") != name)
        return ic_fail(err, IC_BAD_REQUEST, "a log module's name has 1 to %d small letters",
                       IC_LOG_MODULE_LEN_MAX);
    if (l->n == IC_LOG_MODULES_MAX)
        return ic_fail(err, IC_BAD_REQUEST, "log levels of more than %d modules", IC_LOG_MODULES_MAX);
    memcpy(l->module[l->n].name, p, name);
    l->module[l->n].name[name] = 0;
    l->module[l->n++].level = level;
    return IC_OK;
}

enum ic_status ic_log_set_levels(const char *spec, struct ic_err *err)
{
    struct levels l = {.all = IC_LOG_INFO};
    int max;

    for (const char *p = spec;; p++) {
        size_t len = strcspn(p, ",");
        enum ic_status st = parse_one(&l, p, len, p == spec, err);
        if (st != IC_OK)
            return st;
        p += len;
        if (!*p)
            break;
    }
    max = l.all;
    for (int i = 0; i < l.n; i++)
        max = l.module[i].level > max ? l.module[i].level : max;
    levels = l;
    atomic_store(&level_max, max);
    return IC_OK;
}

bool ic_log_enabled(enum ic_log_level level, const char *module)
{
    if ((int)level > atomic_load_explicit(&level_max, memory_order_relaxed))
        return false;
    for (int i = levels.n - 1; i >= 0; i--) /* the last said counts */
        if (!strcmp(levels.module[i].name, module))
            return (int)level <= levels.module[i].level;
    return (int)level <= levels.all;
}

/* ---- where lines go ---- */

enum mode { DIRECT, THREAD, MUTE };

static struct {
    _Atomic(enum mode) mode;
    /* guards all down to `thread`, but for tail and head, which a crash reads without it */
    pthread_mutex_t lock;
    pthread_cond_t wake, drained;
    bool open, asleep, stop, done, reopen;
    pthread_t thread;
    struct ic_log_sink sink;
    _Atomic uint64_t head, tail, dropped, lost, lines;
    uint64_t told_dropped, told_lost; /* the thread's */
    int why;                          /* errno of the last loss; the thread's */
    atomic_bool plain, crashing, writing;
    char ring[IC_LOG_RING], batch[BATCH];
} l = {.lock = PTHREAD_MUTEX_INITIALIZER};

static int own_fd = STDERR_FILENO;
static pthread_once_t own_once = PTHREAD_ONCE_INIT;

/* A descriptor of our own for where stderr led at first, so that stderr itself can be muted for a while. */
static void open_own(void)
{
    int fd = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3);
    pthread_condattr_t attr;

    if (fd >= 0)
        own_fd = fd;
    atomic_store(&l.plain, isatty(own_fd));
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&l.wake, &attr);
    pthread_cond_init(&l.drained, &attr);
    pthread_condattr_destroy(&attr);
}

static int log_fd(void)
{
    pthread_once(&own_once, open_own);
    return own_fd;
}

void ic_log_mute_stderr(bool on)
{
    int fd = log_fd(), nowhere;

    if (fd == STDERR_FILENO)
        return; /* no descriptor to come back to */
    if (!on) {
        dup2(fd, STDERR_FILENO);
    } else if ((nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC)) >= 0) {
        dup2(nowhere, STDERR_FILENO);
        close(nowhere);
    }
}

/* Everything, or up to an error. Async-signal-safe. */
static size_t write_all(int fd, const char *p, size_t len)
{
    size_t done = 0;

    while (done < len) {
        ssize_t n = write(fd, p + done, len - done);
        if (n > 0) {
            done += (size_t)n;
        } else if (n < 0 && errno == EAGAIN) { /* somebody else made our pipe non-blocking */
            struct pollfd pfd = {.fd = fd, .events = POLLOUT};
            poll(&pfd, 1, -1);
        } else if (n == 0 || errno != EINTR) {
            break;
        }
    }
    return done;
}

static size_t own_write(void *arg, const char *data, size_t len, int *why)
{
    (void)arg;
    size_t done = write_all(log_fd(), data, len);
    *why = errno;
    while (done < len && done && data[done - 1] != '\n')
        done--;
    return done;
}

static int own_fd_now(void *arg)
{
    (void)arg;
    return own_fd;
}

/* ---- lines ---- */

/* "2026-11-24T15:04:05.123Z" into out[25]. By hand, because gmtime_r takes a lock that a crash may hold.
 * The date from days since 1970: in years that begin in March the leap day is the last one, and 153 days
 * are 5 months. */
static void put_time(char out[25])
{
    struct timespec ts;
    char *p = out;

    clock_gettime(CLOCK_REALTIME, &ts);
    int64_t days = ts.tv_sec / 86400 + 719468, sec = ts.tv_sec % 86400; /* since 0000-03-01 */
    int64_t era = days / 146097, doe = days % 146097;
    int64_t yoe = (doe - doe / 1460 + doe / 36524 - doe / 146096) / 365;
    int64_t doy = doe - (365 * yoe + yoe / 4 - yoe / 100), mp = (5 * doy + 2) / 153;
    int64_t month = mp < 10 ? mp + 3 : mp - 9, year = yoe + era * 400 + (month <= 2);
    const int64_t part[] = {year,          month,    doy - (153 * mp + 2) / 5 + 1, sec / 3600,
                            sec / 60 % 60, sec % 60, ts.tv_nsec / 1000000};
    const int digits[] = {4, 2, 2, 2, 2, 2, 3};
    for (int i = 0; i < 7; i++) {
        int64_t v = part[i];
        for (int d = digits[i] - 1; d >= 0; d--, v /= 10)
            p[d] = (char)('0' + v % 10);
        p += digits[i];
        *p++ = "--T::.Z"[i];
    }
    *p = 0;
}

static void put_ids_json(struct ic_buf *b, const struct ic_log_ids *ids)
{
    if (ids->rid)
        ic_buf_printf(b, ",\"rid\":%llu", (unsigned long long)ids->rid);
    if (ids->owner)
        ic_buf_printf(b, ",\"conn\":\"%u.%u\"", (unsigned)(ids->owner >> 32), (unsigned)ids->owner);
    if (ids->sim)
        ic_buf_printf(b, ",\"sim\":%llu", (unsigned long long)ids->sim);
    if (ids->id) {
        ic_json_key(b, "id");
        ic_json_str(b, ids->id, strnlen(ids->id, ID_MAX));
    }
}

static void put_ids_plain(struct ic_buf *b, const struct ic_log_ids *ids)
{
    if (ids->rid)
        ic_buf_printf(b, " rid=%llu", (unsigned long long)ids->rid);
    if (ids->owner)
        ic_buf_printf(b, " conn=%u.%u", (unsigned)(ids->owner >> 32), (unsigned)ids->owner);
    if (ids->sim)
        ic_buf_printf(b, " sim=%llu", (unsigned long long)ids->sim);
    if (ids->id) { /* a terminal obeys control characters */
        ic_buf_puts(b, " id=");
        for (size_t i = 0; i < ID_MAX && ids->id[i]; i++)
            ic_buf_put(b, (unsigned char)ids->id[i] < 0x20 || ids->id[i] == 0x7F ? "?" : &ids->id[i], 1);
    }
}

static void put_line(struct ic_buf *b, enum ic_log_level level, const char *module,
                     const struct ic_log_ids *ids, const char *text, size_t len)
{
    static const struct ic_log_ids none;
    char now[25];

    put_time(now);
    if (atomic_load_explicit(&l.plain, memory_order_relaxed)) {
        ic_buf_printf(b, "%.12s %-5s %-5s %.*s", now + 11, level_names[level], module, (int)len, text);
        put_ids_plain(b, ids ? ids : &none);
    } else {
        ic_buf_printf(b, "{\"time\":\"%s\"", now);
        ic_json_kstr(b, "level", level_names[level]);
        ic_json_kstr(b, "module", module);
        put_ids_json(b, ids ? ids : &none);
        ic_json_key(b, "msg");
        ic_json_str(b, text, len);
        ic_buf_puts(b, "}");
    }
    ic_buf_puts(b, "\n");
}

/* Into the ring, or away. False: the thread has ended meanwhile. */
static bool put(const char *p, size_t len)
{
    pthread_mutex_lock(&l.lock);
    if (l.done) {
        pthread_mutex_unlock(&l.lock);
        return false;
    }
    uint64_t head = atomic_load_explicit(&l.head, memory_order_relaxed);
    if (len > IC_LOG_RING - (head - atomic_load(&l.tail))) {
        atomic_fetch_add(&l.dropped, 1);
    } else {
        size_t at = head % IC_LOG_RING, first = len < IC_LOG_RING - at ? len : IC_LOG_RING - at;
        memcpy(l.ring + at, p, first);
        memcpy(l.ring, p + first, len - first);
        atomic_store(&l.head, head + len);
    }
    if (l.asleep)
        pthread_cond_signal(&l.wake);
    pthread_mutex_unlock(&l.lock);
    return true;
}

static void log_v(const struct ic_log_ids *ids, enum ic_log_level level, const char *module,
                  const char *fmt, va_list ap)
{
    char text[IC_LOG_LINE_MAX], bytes[LINE_BYTES];
    /* as large as it may get: nothing is allocated */
    struct ic_buf line = {.data = bytes, .cap = sizeof bytes, .max = sizeof bytes};
    int fd = log_fd(), n = vsnprintf(text, sizeof text, fmt, ap);

    if (n < 0)
        return;
    size_t len = (size_t)n < sizeof text ? (size_t)n : ic_utf8_whole(text, sizeof text - 1);
    while (len && text[len - 1] == '\n')
        len--;
    put_line(&line, level, module, ids, text, len);
    if (line.failed)
        return;
    atomic_fetch_add_explicit(&l.lines, 1, memory_order_relaxed);
    enum mode mode = atomic_load(&l.mode);
    if (mode == THREAD && put(line.data, line.len))
        return;
    if (mode == MUTE || write_all(fd, line.data, line.len) != line.len)
        atomic_fetch_add(&l.lost, 1);
}

void ic_log(enum ic_log_level level, const char *module, const char *fmt, ...)
{
    va_list ap;

    if (!ic_log_enabled(level, module))
        return;
    va_start(ap, fmt);
    log_v(NULL, level, module, fmt, ap);
    va_end(ap);
}

void ic_log_about(const struct ic_log_ids *ids, enum ic_log_level level, const char *module,
                  const char *fmt, ...)
{
    va_list ap;

    if (!ic_log_enabled(level, module))
        return;
    va_start(ap, fmt);
    log_v(ids, level, module, fmt, ap);
    va_end(ap);
}

struct ic_log_stats ic_log_stats(void)
{
    return (struct ic_log_stats){atomic_load(&l.lines), atomic_load(&l.dropped), atomic_load(&l.lost)};
}

/* ---- the thread ---- */

static size_t count_lines(const char *p, size_t len)
{
    size_t n = 0;

    for (const char *end = p + len; p < end && (p = memchr(p, '\n', (size_t)(end - p))); p++)
        n++;
    return n;
}

/* What has been dropped and lost since it was last told; false: the sink takes nothing at present. */
static bool tell_losses(void)
{
    uint64_t dropped = atomic_load(&l.dropped) - l.told_dropped, lost = atomic_load(&l.lost) - l.told_lost;
    char bytes[1024], text[256], why[64];
    struct ic_buf line = {.data = bytes, .cap = sizeof bytes, .max = sizeof bytes};
    int err = 0;

    if (!dropped && !lost)
        return true;
    int n = snprintf(text, sizeof text,
                     "log lines are missing here: %llu found the queue full, %llu could not be written%s%s",
                     (unsigned long long)dropped, (unsigned long long)lost, lost ? ": " : "",
                     lost ? strerror_r(l.why, why, sizeof why) : "");
    put_line(&line, IC_LOG_WARN, "log", NULL, text, (size_t)n);
    if (l.sink.write(l.sink.arg, line.data, line.len, &err) != line.len)
        return false;
    l.told_dropped += dropped;
    l.told_lost += lost;
    return true;
}

static void write_batch(const char *p, size_t len)
{
    size_t done = 0;
    int why = 0;

    if (tell_losses())
        done = l.sink.write(l.sink.arg, p, len, &why);
    if (done < len) {
        atomic_fetch_add(&l.lost, count_lines(p + done, len - done));
        if (why)
            l.why = why;
    }
}

/* The bytes [tail, head) without the lock; nobody but this thread moves tail. Whole lines, BATCH bytes at
 * most. */
static size_t take_batch(uint64_t tail, uint64_t head)
{
    size_t len = head - tail < BATCH ? (size_t)(head - tail) : BATCH;
    size_t at = tail % IC_LOG_RING, first = len < IC_LOG_RING - at ? len : IC_LOG_RING - at;

    memcpy(l.batch, l.ring + at, first);
    memcpy(l.batch + first, l.ring, len - first);
    while (len && l.batch[len - 1] != '\n')
        len--;
    return len;
}

/* Until the process is gone: somebody else writes the rest. */
static void yield_to_crash(void)
{
    while (atomic_load(&l.crashing))
        pause();
}

static void write_out(void)
{
    uint64_t tail = atomic_load(&l.tail);

    atomic_store(&l.writing, true);
    if (!atomic_load(&l.crashing)) {
        size_t n = take_batch(tail, atomic_load(&l.head));
        write_batch(l.batch, n);
        atomic_store(&l.tail, tail + n);
    }
    atomic_store(&l.writing, false);
    yield_to_crash();
}

static void do_reopen(void)
{
    atomic_store(&l.writing, true);
    if (l.sink.reopen && !atomic_load(&l.crashing))
        l.sink.reopen(l.sink.arg);
    atomic_store(&l.writing, false);
    yield_to_crash();
}

static void *log_main(void *arg)
{
    bool work = l.sink.work != NULL;

    (void)arg;
    pthread_mutex_lock(&l.lock);
    for (;;) {
        bool empty = atomic_load(&l.head) == atomic_load(&l.tail), reopen = l.reopen;
        if (empty)
            pthread_cond_broadcast(&l.drained);
        if (empty && !reopen && l.stop)
            break;
        if (empty && !reopen && !work) {
            l.asleep = true;
            pthread_cond_wait(&l.wake, &l.lock);
            l.asleep = false;
            work = l.sink.work != NULL; /* what was written may have made some */
            continue;
        }
        l.reopen = false;
        pthread_mutex_unlock(&l.lock);
        if (reopen)
            do_reopen();
        if (!empty)
            write_out();
        else if (work && !reopen)
            work = l.sink.work(l.sink.arg);
        if (!empty || reopen)
            work = l.sink.work != NULL;
        pthread_mutex_lock(&l.lock);
    }
    l.done = true;
    pthread_cond_broadcast(&l.drained);
    pthread_mutex_unlock(&l.lock);
    return NULL;
}

enum ic_status ic_log_start(const struct ic_log_sink *sink, struct ic_err *err)
{
    static const struct ic_log_sink own = {.write = own_write, .fd = own_fd_now};

    log_fd();
    l.sink = sink ? *sink : own;
    l.stop = l.done = l.reopen = l.asleep = false;
    if (sink)
        atomic_store(&l.plain, false);
    if (pthread_create(&l.thread, NULL, log_main, NULL) != 0) {
        atomic_store(&l.plain, isatty(own_fd));
        return ic_fail(err, IC_OOM, "no thread for the log");
    }
    pthread_setname_np(l.thread, "ic-log");
    l.open = true;
    atomic_store(&l.mode, THREAD);
    return IC_OK;
}

/* Waits on `drained` until `until`; under the lock. False: too late. */
static bool wait_drained(int64_t until)
{
    struct timespec ts = {(time_t)(until / 1000000000), (long)(until % 1000000000)};
    return pthread_cond_timedwait(&l.drained, &l.lock, &ts) == 0;
}

void ic_log_flush(int ms)
{
    int64_t until = ic_now_ns() + ms * IC_MS;

    if (atomic_load(&l.mode) != THREAD || pthread_equal(pthread_self(), l.thread))
        return;
    pthread_mutex_lock(&l.lock);
    uint64_t head = atomic_load(&l.head);
    while ((int64_t)(head - atomic_load(&l.tail)) > 0 && !l.done && wait_drained(until)) {
    }
    pthread_mutex_unlock(&l.lock);
}

bool ic_log_stop(void)
{
    int64_t until = ic_now_ns() + IC_LOG_STOP_MS * IC_MS;

    if (!l.open)
        return true;
    l.open = false;
    pthread_mutex_lock(&l.lock);
    l.stop = true;
    pthread_cond_signal(&l.wake);
    while (!l.done && wait_drained(until)) {
    }
    bool done = l.done;
    atomic_store(&l.mode, done ? DIRECT : MUTE);
    pthread_mutex_unlock(&l.lock);
    if (!done) {
        pthread_detach(l.thread);
        return false;
    }
    pthread_join(l.thread, NULL);
    atomic_store(&l.plain, isatty(own_fd));
    return true;
}

void ic_log_reopen(void)
{
    pthread_mutex_lock(&l.lock);
    l.reopen = l.open;
    if (l.asleep)
        pthread_cond_signal(&l.wake);
    pthread_mutex_unlock(&l.lock);
}

/* ---- in a crash ---- */

int ic_log_crash_begin(void)
{
    bool thread = atomic_load(&l.mode) == THREAD;
    int fd = thread ? l.sink.fd(l.sink.arg) : own_fd;

    atomic_store(&l.crashing, true);
    if (!thread)
        return fd;
    for (int64_t until = ic_now_ns() + CRASH_WAIT_NS;
         !pthread_equal(pthread_self(), l.thread) && ic_now_ns() < until;) {
        struct timespec ms = {.tv_nsec = IC_MS};
        if (!atomic_load(&l.writing))
            break;
        nanosleep(&ms, NULL);
    }
    fd = l.sink.fd(l.sink.arg);
    uint64_t tail = atomic_load(&l.tail), head = atomic_load(&l.head);
    size_t len = (size_t)(head - tail), at = tail % IC_LOG_RING,
           first = len < IC_LOG_RING - at ? len : IC_LOG_RING - at;
    write_all(fd, l.ring + at, first);
    write_all(fd, l.ring, len - first);
    atomic_store(&l.tail, head);
    return fd;
}

void ic_log_crash_line(const char *text, size_t len)
{
    char out[2 * IC_LOG_LINE_MAX], now[25];
    size_t n = 0;
    bool plain = atomic_load(&l.plain);

#define PUT(s) (memcpy(out + n, s, strlen(s)), n += strlen(s))
    put_time(now);
    if (plain) {
        PUT(now + 11);
        PUT(" error crash ");
    } else {
        PUT("{\"time\":\"");
        PUT(now);
        PUT("\",\"level\":\"error\",\"module\":\"crash\",\"msg\":\"");
    }
    for (size_t i = 0; i < len && n < sizeof out - 8; i++) {
        if (!plain && (text[i] == '"' || text[i] == '\\'))
            out[n++] = '\\';
        out[n++] = text[i] < 0x20 || text[i] > 0x7e ? '?' : text[i];
    }
    PUT(plain ? "\n" : "\"}\n");
#undef PUT
    int fd = atomic_load(&l.mode) == THREAD ? l.sink.fd(l.sink.arg) : own_fd;
    write_all(fd, out, n);
    if (fd != own_fd)
        write_all(own_fd, out, n);
}
