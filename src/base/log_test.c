/* The log's levels, lines and thread: nothing lost, nothing blocked, every loss told. Sinks are of memory.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/clock.h"
#include "base/log.h"

/* ---- a sink of memory ---- */

static char got[8 << 20];
static size_t got_len;
static atomic_int failing; /* errno, 0: it takes all */
static atomic_int reopened;
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER; /* held by a test: writes block */

static size_t mem_write(void *arg, const char *data, size_t len, int *why)
{
    (void)arg;
    pthread_mutex_lock(&gate);
    pthread_mutex_unlock(&gate);
    *why = atomic_load(&failing);
    if (*why)
        return 0;
    assert_true(got_len + len < sizeof got);
    memcpy(got + got_len, data, len);
    got_len += len;
    got[got_len] = 0;
    return len;
}

static void mem_reopen(void *arg)
{
    (void)arg;
    atomic_fetch_add(&reopened, 1);
}

static int no_fd(void *arg)
{
    (void)arg;
    return -1;
}

static const struct ic_log_sink mem = {.write = mem_write, .reopen = mem_reopen, .fd = no_fd};

static void start(void)
{
    struct ic_err err = {0};
    got_len = 0;
    got[0] = 0;
    atomic_store(&failing, 0);
    assert_int_equal(ic_log_start(&mem, &err), IC_OK);
}

static unsigned count(const char *what)
{
    unsigned n = 0;
    for (const char *p = got; (p = strstr(p, what)); p++)
        n++;
    return n;
}

/* ---- levels ---- */

static void levels_per_module(void **state)
{
    struct ic_err err = {0};

    (void)state;
    assert_int_equal(ic_log_set_levels("info,net=debug,text=warn", &err), IC_OK);
    assert_true(ic_log_enabled(IC_LOG_DEBUG, "net"));
    assert_false(ic_log_enabled(IC_LOG_TRACE, "net"));
    assert_true(ic_log_enabled(IC_LOG_WARN, "text"));
    assert_false(ic_log_enabled(IC_LOG_INFO, "text"));
    assert_true(ic_log_enabled(IC_LOG_INFO, "law"));
    assert_false(ic_log_enabled(IC_LOG_DEBUG, "law"));
    assert_int_equal(ic_log_set_levels("law=trace", &err), IC_OK); /* info for all others */
    assert_true(ic_log_enabled(IC_LOG_TRACE, "law"));
    assert_true(ic_log_enabled(IC_LOG_INFO, "net"));
    assert_false(ic_log_enabled(IC_LOG_DEBUG, "net"));
    assert_int_equal(ic_log_set_levels("error,net=info,net=warn", &err), IC_OK); /* the last counts */
    assert_false(ic_log_enabled(IC_LOG_INFO, "net"));
    static const char *const bad[] = {
        "",
        "loud",
        "info,",
        ",info",
        "info,warn",
        "net=",
        "=info",
        "net=loud",
        "info,net",
        "info net=debug",
        "INFO",
        "averyverylongname=info",
        "a=info,b=info,c=info,d=info,e=info,f=info,g=info,h=info,i=info,j=info,k=info,"
        "l=info,m=info,n=info,o=info,p=info,q=info"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(ic_log_set_levels(bad[i], &err), IC_BAD_REQUEST);
        assert_false(ic_log_enabled(IC_LOG_INFO, "net")); /* as before */
    }
    ic_log_set_level(IC_LOG_INFO);
    assert_true(ic_log_enabled(IC_LOG_INFO, "net"));
}

/* ---- lines ---- */

static void lines_are_json_and_say_whose_they_are(void **state)
{
    struct ic_log_ids ids = {.rid = 7, .owner = (uint64_t)3 << 32 | 12, .sim = 9, .id = "cl\"ient\n\xff"};
    char text[2 * IC_LOG_LINE_MAX], now[8];
    time_t t = time(NULL);
    struct tm tm;

    (void)state;
    start();
    ic_log(IC_LOG_WARN, "net", "a \"quoted\" %s\n",
           "line\twith\x01"
           "controls");
    ic_log_about(&ids, IC_LOG_INFO, "text", "ended");
    ic_log(IC_LOG_DEBUG, "net", "not at this level");
    memset(text, 1, sizeof text - 1); /* every byte becomes six */
    text[sizeof text - 1] = 0;
    ic_log(IC_LOG_ERROR, "net", "%s", text);
    ic_log(IC_LOG_ERROR, "net", "%s", "the last");
    assert_true(ic_log_stop());
    char *line = strtok(got, "\n");
    gmtime_r(&t, &tm);
    snprintf(now, sizeof now, "20%02d-", tm.tm_year % 100);
    assert_memory_equal(line, "{\"time\":\"", 9);
    assert_memory_equal(line + 9, now, 5);
    assert_string_equal(line + 9 + 24,
                        "\",\"level\":\"warn\",\"module\":\"net\",\"msg\":\"a \\\"quoted\\\" "
                        "line\\twith\\u0001controls\"}");
    int y, mo, d, h, mi, s, ms;
    assert_int_equal(sscanf(line + 9, "%4d-%2d-%2dT%2d:%2d:%2d.%3dZ", &y, &mo, &d, &h, &mi, &s, &ms), 7);
    struct tm back = {
        .tm_year = y - 1900, .tm_mon = mo - 1, .tm_mday = d, .tm_hour = h, .tm_min = mi, .tm_sec = s};
    assert_in_range(timegm(&back), t - 1, t + 600);
    line = strtok(NULL, "\n");
    assert_string_equal(line + 33,
                        "\",\"level\":\"info\",\"module\":\"text\",\"rid\":7,\"conn\":\"3.12\",\"sim\":9,"
                        "\"id\":\"cl\\\"ient\\n\xEF\xBF\xBD\",\"msg\":\"ended\"}");
    line = strtok(NULL, "\n");
    assert_int_equal(strlen(line), 33 + strlen("\",\"level\":\"error\",\"module\":\"net\",\"msg\":\"\"}") +
                                       6 * (IC_LOG_LINE_MAX - 1));
    line = strtok(NULL, "\n");
    assert_non_null(strstr(line, "the last"));
    assert_null(strtok(NULL, "\n"));
}

/* ---- the thread ---- */

#define AUTHORS 4
#define LINES 400 /* of each; all fit into the ring together */

static void *author(void *arg)
{
    for (int i = 0; i < LINES; i++)
        ic_log(IC_LOG_INFO, "test", "author %d line %d", (int)(intptr_t)arg, i);
    return NULL;
}

static void many_authors_lose_nothing(void **state)
{
    pthread_t t[AUTHORS];
    int next[AUTHORS] = {0}, a, n;
    struct ic_log_stats before = ic_log_stats(), after;

    (void)state;
    for (int round = 0; round < 5; round++) {
        start();
        memset(next, 0, sizeof next);
        for (intptr_t i = 0; i < AUTHORS; i++)
            pthread_create(&t[i], NULL, author, (void *)i);
        for (int i = 0; i < AUTHORS; i++)
            pthread_join(t[i], NULL);
        assert_true(ic_log_stop());
        for (char *line = strtok(got, "\n"); line; line = strtok(NULL, "\n")) {
            assert_int_equal(sscanf(strstr(line, "author"), "author %d line %d\"}", &a, &n), 2);
            assert_int_equal(n, next[a]++);
        }
        for (int i = 0; i < AUTHORS; i++)
            assert_int_equal(next[i], LINES);
    }
    after = ic_log_stats();
    assert_int_equal(after.lines - before.lines, 5 * AUTHORS * LINES);
    assert_int_equal(after.dropped, before.dropped);
}

static void a_blocked_sink_holds_nobody_up(void **state)
{
    enum { MANY = 20000 };
    struct ic_log_stats before = ic_log_stats(), after;
    unsigned long long told = 0, n;

    (void)state;
    start();
    pthread_mutex_lock(&gate);
    for (int i = 0; i < MANY; i++) /* would never come back if it waited */
        ic_log(IC_LOG_INFO, "test", "line %05d of many", i);
    after = ic_log_stats();
    uint64_t dropped = after.dropped - before.dropped;
    assert_in_range(dropped, MANY / 2, MANY - 1000);
    pthread_mutex_unlock(&gate);
    ic_log_flush(60000);
    ic_log(IC_LOG_INFO, "test", "afterwards");
    assert_true(ic_log_stop());
    assert_int_equal(count("of many"), MANY - dropped);
    assert_int_equal(count("afterwards"), 1);
    for (const char *p = got; (p = strstr(p, "missing here: ")); p++) {
        assert_int_equal(sscanf(p, "missing here: %llu found the queue full, 0 could not", &n), 1);
        told += n;
    }
    assert_int_equal(told, dropped);
}

static void a_full_disk_is_told_when_it_is_over(void **state)
{
    struct ic_log_stats before = ic_log_stats(), after;

    (void)state;
    start();
    ic_log(IC_LOG_INFO, "test", "before");
    ic_log_flush(60000);
    atomic_store(&failing, ENOSPC);
    for (int i = 0; i < 100; i++) {
        ic_log(IC_LOG_INFO, "test", "lost %d", i);
        ic_log_flush(60000);
    }
    after = ic_log_stats();
    assert_int_equal(after.lost - before.lost, 100);
    atomic_store(&failing, 0);
    ic_log(IC_LOG_INFO, "test", "after");
    assert_true(ic_log_stop());
    assert_int_equal(count("\n"), 3);
    char *told = strstr(got, "0 found the queue full, 100 could not be written: No space left on device");
    assert_non_null(told);
    assert_true(strstr(got, "before") < told && told < strstr(got, "after"));
}

static void reopens_when_asked(void **state)
{
    (void)state;
    start();
    int before = atomic_load(&reopened);
    ic_log_reopen();
    assert_true(ic_log_stop());
    assert_int_equal(atomic_load(&reopened), before + 1);
    ic_log_reopen(); /* without a thread: nothing */
    start();
    assert_true(ic_log_stop());
    assert_int_equal(atomic_load(&reopened), before + 1);
}

static void idle_is_idle(void **state)
{
    (void)state;
    start();
    ic_log(IC_LOG_INFO, "test", "one");
    ic_log_flush(60000);
    usleep(100000); /* it lies down */
    /* the thread has no timer: what it waits on is a condition, for ever. Seen from outside: its voluntary
     * switches */
    char name[64], line[200];
    long was = -1, is = -1;
    for (int round = 0; round < 2; round++) {
        for (int tid = getpid(); tid < getpid() + 4000; tid++) {
            snprintf(name, sizeof name, "/proc/self/task/%d/status", tid);
            FILE *f = fopen(name, "r");
            bool log = false;
            while (f && fgets(line, sizeof line, f)) {
                log |= !strcmp(line, "Name:\tic-log\n");
                if (log && sscanf(line, "voluntary_ctxt_switches: %ld", round ? &is : &was) == 1)
                    break;
            }
            if (f)
                fclose(f);
        }
        if (!round)
            sleep(2);
    }
    assert_true(was > 0);
    assert_int_equal(is, was);
    assert_true(ic_log_stop());
}

/* ---- a crash ---- */

static int file = -1;

static size_t slow_write(void *arg, const char *data, size_t len, int *why)
{
    (void)arg;
    *why = 0;
    usleep(2000);
    return write(file, data, len) == (ssize_t)len ? len : 0;
}

static int file_fd(void *arg)
{
    (void)arg;
    return file;
}

/* Whatever the log thread is doing, every line is in the file once, in order, and then the crash's own. */
static void a_crash_writes_what_is_left(void **state)
{
    static const struct ic_log_sink slow = {.write = slow_write, .fd = file_fd};
    char path[] = "/tmp/ic_log_test.XXXXXX", line[300];
    struct ic_err err = {0};
    int status, n;

    (void)state;
    file = mkstemp(path);
    assert_true(file >= 0);
    for (int lines = 1; lines < 900; lines = lines * 3 + 1) {
        assert_int_equal(ftruncate(file, 0), 0);
        lseek(file, 0, SEEK_SET);
        fflush(NULL);
        pid_t child = fork();
        if (child == 0) {
            int nowhere = open("/dev/null", O_WRONLY);
            dup2(nowhere, STDERR_FILENO);
            if (ic_log_start(&slow, &err) != IC_OK)
                _exit(1);
            for (int i = 0; i < lines; i++) {
                ic_log(IC_LOG_INFO, "test", "line %d", i);
                if (i % 97 == 0)
                    usleep(1000); /* so that some are on their way */
            }
            usleep(500); /* in the middle of a write, as a rule */
            if (ic_log_crash_begin() != file)
                _exit(2);
            ic_log_crash_line("it \"broke\"\x01", 11);
            usleep(20000); /* what the other thread may still do, it does now */
            _exit(7);
        }
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFEXITED(status));
        assert_int_equal(WEXITSTATUS(status), 7);
        lseek(file, 0, SEEK_SET);
        FILE *f = fdopen(dup(file), "r");
        for (int i = 0; i < lines; i++) {
            assert_non_null(fgets(line, sizeof line, f));
            assert_non_null(strstr(line, "\"msg\":\"line "));
            assert_int_equal(sscanf(strstr(line, "\"msg\":\"line ") + 12, "%d", &n), 1);
            assert_int_equal(n, i);
        }
        assert_non_null(fgets(line, sizeof line, f));
        assert_non_null(
            strstr(line, "\"level\":\"error\",\"module\":\"crash\",\"msg\":\"it \\\"broke\\\"?\"}\n"));
        assert_null(fgets(line, sizeof line, f));
        fclose(f);
    }
    close(file);
    unlink(path);
}

/* A sink that never comes back: the end of the process does not wait for it for ever. The thread stays
 * behind, so this is a process of its own. */
static void the_end_does_not_wait_for_ever(void **state)
{
    int status;

    (void)state;
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        start();
        pthread_mutex_lock(&gate);
        ic_log(IC_LOG_INFO, "test", "never written");
        bool ended = ic_log_stop();
        ic_log(IC_LOG_INFO, "test", "nor this");
        _exit(ended ? 1 : ic_log_stats().lost ? 0 : 2);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(levels_per_module),
        cmocka_unit_test(lines_are_json_and_say_whose_they_are),
        cmocka_unit_test(many_authors_lose_nothing),
        cmocka_unit_test(a_blocked_sink_holds_nobody_up),
        cmocka_unit_test(a_full_disk_is_told_when_it_is_over),
        cmocka_unit_test(reopens_when_asked),
        cmocka_unit_test(idle_is_idle),
        cmocka_unit_test(a_crash_writes_what_is_left),
        cmocka_unit_test(the_end_does_not_wait_for_ever),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
