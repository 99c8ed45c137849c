#include "base/log.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"

static const char *const level_names[] = {"error", "warn", "info", "debug", "trace"};
static atomic_int level_max = IC_LOG_INFO;

void ic_log_set_level(enum ic_log_level level)
{
    atomic_store(&level_max, (int)level);
}

enum ic_log_level ic_log_level_now(void)
{
    return (enum ic_log_level)atomic_load(&level_max);
}

enum ic_status ic_log_parse_level(const char *name, enum ic_log_level *level)
{
    for (size_t i = 0; i < sizeof level_names / sizeof *level_names; i++)
        if (!strcmp(name, level_names[i])) {
            *level = (enum ic_log_level)i;
            return IC_OK;
        }
    return IC_BAD_REQUEST;
}

static int own_fd = STDERR_FILENO;
static pthread_once_t own_once = PTHREAD_ONCE_INIT;

/* A descriptor of our own for where stderr led at first, so that stderr itself can be muted for a while. */
static void open_own(void)
{
    int fd = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3);
    if (fd >= 0)
        own_fd = fd;
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

void ic_log(enum ic_log_level level, const char *module, const char *fmt, ...)
{
    char text[IC_LOG_LINE_MAX];
    struct timespec ts;
    struct tm tm;
    va_list ap;

    if ((int)level > atomic_load_explicit(&level_max, memory_order_relaxed))
        return;
    va_start(ap, fmt);
    int n = vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (n < 0)
        return;
    size_t len = (size_t)n < sizeof text ? (size_t)n : sizeof text - 1;
    while (len && text[len - 1] == '\n')
        len--;

    clock_gettime(CLOCK_REALTIME, &ts);
    gmtime_r(&ts.tv_sec, &tm);
    struct ic_buf line = {0};
    int fd = log_fd();
    if (isatty(fd)) {
        ic_buf_printf(&line, "%02d:%02d:%02d.%03ld %-5s %-5s %.*s", tm.tm_hour, tm.tm_min, tm.tm_sec,
                      ts.tv_nsec / 1000000, level_names[level], module, (int)len, text);
    } else {
        ic_buf_printf(&line, "{\"time\":\"%04d-%02d-%02dT%02d:%02d:%02d.%03ldZ\"", tm.tm_year + 1900,
                      tm.tm_mon + 1, tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec, ts.tv_nsec / 1000000);
        ic_json_kstr(&line, "level", level_names[level]);
        ic_json_kstr(&line, "module", module);
        ic_json_key(&line, "msg");
        ic_json_str(&line, text, len);
        ic_buf_puts(&line, "}");
    }
    ic_buf_puts(&line, "\n");
    if (!line.failed && write(fd, line.data, line.len) < 0) {
        /* nowhere left to report it */
    }
    ic_buf_deinit(&line);
}
