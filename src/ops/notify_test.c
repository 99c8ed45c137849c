/* What a service manager hears: over a path and an abstract name, in which order, and what it never hears.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/clock.h"
#include "ops/notify.h"

static char dir[64], name[128];
static int manager = -1;

/* A manager that listens on a path, or on an abstract name. */
static void listen_at(bool abstract)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX};

    if (manager >= 0)
        close(manager);
    strcpy(dir, "/tmp/ic_notify.XXXXXX");
    assert_non_null(mkdtemp(dir));
    snprintf(name, sizeof name, "%s%s/sock", abstract ? "@" : "", dir);
    strcpy(at.sun_path, name);
    if (abstract)
        at.sun_path[0] = 0;
    manager = socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    socklen_t len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(name) + !abstract);
    assert_int_equal(bind(manager, (struct sockaddr *)&at, len), 0);
    setenv("NOTIFY_SOCKET", name, 1);
}

static int forget(void **state)
{
    (void)state;
    if (manager >= 0)
        close(manager);
    manager = -1;
    if (*name == '/')
        unlink(name);
    rmdir(dir);
    unsetenv("NOTIFY_SOCKET");
    unsetenv("WATCHDOG_USEC");
    unsetenv("WATCHDOG_PID");
    return 0;
}

/* The next datagram, "" when there is none. Datagrams of AF_UNIX are there when send returns. */
static const char *heard(void)
{
    static char text[2000];
    ssize_t n = recv(manager, text, sizeof text - 1, 0);
    text[n > 0 ? n : 0] = 0;
    return text;
}

static void a_life(void **state)
{
    struct ic_notify n;
    struct ic_err err = {0};

    (void)state;
    for (int abstract = 0; abstract < 2; abstract++) {
        listen_at(abstract);
        assert_int_equal(ic_notify_open(&n, &err), IC_OK);
        assert_int_equal(n.watchdog_ns, 0);
        ic_notify_reloading(&n); /* before READY there is nothing to reload */
        assert_string_equal(heard(), "");
        ic_notify_status(&n, "loading %s", "a\nREADY=1");
        assert_string_equal(heard(), "STATUS=loading a READY=1");
        ic_notify_status(&n, "loading a READY=1");
        assert_string_equal(heard(), "");
        ic_notify_ready(&n, "on port %d", 3000);
        assert_string_equal(heard(), "READY=1\nSTATUS=on port 3000");
        ic_notify_ready(&n, "on port %d", 3000);
        assert_string_equal(heard(), "");
        int64_t before = ic_now_ns() / 1000;
        ic_notify_reloading(&n);
        const char *text = heard();
        assert_memory_equal(text, "RELOADING=1\nMONOTONIC_USEC=", 27);
        assert_in_range(atoll(text + 27), before, ic_now_ns() / 1000);
        ic_notify_ready(&n, "again");
        assert_string_equal(heard(), "READY=1\nSTATUS=again");
        ic_notify_stopping(&n);
        assert_string_equal(heard(), "STOPPING=1\nSTATUS=shutting down");
        ic_notify_stopping(&n);
        ic_notify_reloading(&n);
        ic_notify_ready(&n, "never again");
        ic_notify_tick(&n, INT64_MAX - 1, NULL, NULL);
        assert_string_equal(heard(), "");
        ic_notify_close(&n);
        forget(NULL);
    }
}

static void no_manager_is_normal(void **state)
{
    struct ic_notify n;
    struct ic_err err = {0};

    (void)state;
    unsetenv("NOTIFY_SOCKET");
    setenv("WATCHDOG_USEC", "1000000", 1);
    assert_int_equal(ic_notify_open(&n, &err), IC_OK);
    assert_int_equal(n.fd, -1);
    ic_notify_ready(&n, "x");
    ic_notify_stopping(&n);
    assert_true(ic_notify_due_ns(&n) == INT64_MAX);
    ic_notify_close(&n);
}

static void bad_names_are_refused(void **state)
{
    struct ic_notify n;
    struct ic_err err = {0};
    char longest[200];

    (void)state;
    memset(longest, 'x', sizeof longest - 1);
    longest[sizeof longest - 1] = 0;
    longest[0] = '/';
    const char *bad[] = {"relative", "/", "@", longest};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        setenv("NOTIFY_SOCKET", bad[i], 1);
        assert_int_equal(ic_notify_open(&n, &err), IC_BAD_REQUEST);
        assert_int_equal(n.fd, -1);
        ic_notify_ready(&n, "mute");
    }
    setenv("NOTIFY_SOCKET", "/tmp/nobody/listens/here", 1);
    assert_int_equal(ic_notify_open(&n, &err), IC_UNAVAILABLE);
    assert_int_equal(n.fd, -1);
}

static bool says(void *arg)
{
    return *(bool *)arg;
}

static void the_watchdog_hears_us_at_half_its_time(void **state)
{
    struct ic_notify n;
    struct ic_err err = {0};
    char pid[32];
    bool well = true;

    (void)state;
    listen_at(true);
    snprintf(pid, sizeof pid, "%d", (int)getpid());
    setenv("WATCHDOG_USEC", "10000000", 1);
    setenv("WATCHDOG_PID", pid, 1);
    assert_int_equal(ic_notify_open(&n, &err), IC_OK);
    assert_true(n.watchdog_ns == 10000 * IC_MS);
    ic_notify_ready(&n, "up");
    assert_string_equal(heard(), "READY=1\nSTATUS=up");
    int64_t t = n.last_ns;
    ic_notify_tick(&n, t + 4999 * IC_MS, says, &well);
    assert_string_equal(heard(), "");
    assert_true(ic_notify_due_ns(&n) == t + 5000 * IC_MS);
    ic_notify_tick(&n, t + 5000 * IC_MS, says, &well);
    assert_string_equal(heard(), "WATCHDOG=1");
    ic_notify_tick(&n, t + 9999 * IC_MS, says, &well);
    assert_string_equal(heard(), "");
    well = false; /* then nothing, for ever, until it is well again */
    for (int64_t s = 10; s < 100; s += 5)
        ic_notify_tick(&n, t + s * 1000 * IC_MS, says, &well);
    assert_string_equal(heard(), "");
    well = true;
    ic_notify_tick(&n, t + 100000 * IC_MS, says, &well);
    assert_string_equal(heard(), "WATCHDOG=1");
    ic_notify_close(&n);
}

static void watchdog_usec_is_read_with_care(void **state)
{
    struct ic_notify n;
    struct ic_err err = {0};

    (void)state;
    assert_true(ic_notify_watchdog_ns("30000000", NULL, 7) == 30000 * IC_MS);
    assert_true(ic_notify_watchdog_ns("30000000", "7", 7) == 30000 * IC_MS);
    assert_true(ic_notify_watchdog_ns("30000000", "8", 7) == 0);
    const char *bad[] = {"", "0", "-1", "x", "1x", " 1", "86400000001", "99999999999999999999999"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_true(ic_notify_watchdog_ns(bad[i], NULL, 7) == 0);
    listen_at(true);
    setenv("WATCHDOG_USEC", "soon", 1);
    assert_int_equal(ic_notify_open(&n, &err), IC_BAD_REQUEST);
    assert_true(n.fd >= 0); /* usable */
    ic_notify_close(&n);
    setenv("WATCHDOG_USEC", "1000000", 1);
    setenv("WATCHDOG_PID", "1", 1); /* somebody else's */
    assert_int_equal(ic_notify_open(&n, &err), IC_OK);
    assert_true(n.watchdog_ns == 0);
    ic_notify_close(&n);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(a_life, forget),
        cmocka_unit_test_teardown(no_manager_is_normal, forget),
        cmocka_unit_test_teardown(bad_names_are_refused, forget),
        cmocka_unit_test_teardown(the_watchdog_hears_us_at_half_its_time, forget),
        cmocka_unit_test_teardown(watchdog_usec_is_read_with_care, forget),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
