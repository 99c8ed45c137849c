/* The log's file: rotation by size and age, compression, the bound of all, disks that are full or gone,
 * clocks that jump. No test waits for anything: the clock, the wall clock and write(2) are replaced where
 * they matter. */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <dirent.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>
#include <cmocka.h>

#include "ops/logfile.h"

#define HOUR (3600LL * 1000000000)

static char dir[64], path[96];
static int64_t now;
static double wall;
static int64_t room; /* bytes that the disk still takes; -1: without end */
static int disk_error;

static int64_t fake_now(void)
{
    return now;
}

static double fake_wall(void)
{
    return wall;
}

static ssize_t fake_write(int fd, const void *p, size_t n)
{
    if (room == 0) {
        errno = disk_error;
        return -1;
    }
    if (room > 0 && (int64_t)n > room)
        n = (size_t)room;
    ssize_t done = write(fd, p, n);
    if (room > 0)
        room -= done;
    return done;
}

static int set_up(void **state)
{
    (void)state;
    strcpy(dir, "/tmp/ic_logfile.XXXXXX");
    if (!mkdtemp(dir))
        return -1;
    snprintf(path, sizeof path, "%s/ic.log", dir);
    now = 1000 * HOUR;
    wall = 1.8e9;
    room = -1;
    disk_error = ENOSPC;
    return 0;
}

static int tear_down(void **state)
{
    char cmd[128];
    (void)state;
    snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
    return system(cmd) == 0 ? 0 : -1;
}

static struct ic_logfile *open_log(int64_t rotate_bytes, int64_t rotate_ns, int64_t total)
{
    struct ic_logfile_config cfg = {path, rotate_bytes, rotate_ns, total, fake_write, fake_now, fake_wall};
    struct ic_logfile *f;
    struct ic_err err = {0};

    if (ic_logfile_open(&f, &cfg, &err) != IC_OK)
        fail_msg("%s", err.msg);
    return f;
}

/* Line n has its number and 60 letters that do not compress to nothing. */
static size_t put(struct ic_logfile *f, unsigned n)
{
    struct ic_log_sink s = ic_logfile_sink(f);
    char line[128];
    int why = 0;
    uint64_t r = n * 6364136223846793005ULL + 1;

    int len = snprintf(line, sizeof line, "%06u ", n);
    for (int i = 0; i < 60; i++, r = r * 6364136223846793005ULL + 1442695040888963407ULL)
        line[len++] = (char)('a' + (r >> 59) % 26);
    line[len++] = '\n';
    return s.write(s.arg, line, (size_t)len, &why) == (size_t)len;
}

static void pack_all(struct ic_logfile *f)
{
    struct ic_log_sink s = ic_logfile_sink(f);
    while (s.work(s.arg)) {
    }
}

static int64_t total_size(int *files, int *packed)
{
    int64_t sum = 0;
    char name[400];
    struct stat st;
    struct dirent *e;
    DIR *d = opendir(dir);

    *files = *packed = 0;
    while ((e = readdir(d)))
        if (e->d_name[0] != '.') {
            snprintf(name, sizeof name, "%s/%s", dir, e->d_name);
            assert_int_equal(stat(name, &st), 0);
            sum += st.st_size;
            ++*files;
            *packed += strstr(name, ".gz") != NULL;
            assert_null(strstr(name, ".tmp"));
        }
    closedir(d);
    return sum;
}

/* Reads a file of the log (gzread reads plain ones too); its lines must rise. Returns the next number
 * expected. */
static unsigned check_lines(const char *name, unsigned *first)
{
    char line[200];
    unsigned n = 0, last = 0, lines = 0;
    gzFile g = gzopen(name, "rb");

    assert_non_null(g);
    while (gzgets(g, line, sizeof line)) {
        assert_int_equal(strlen(line), 68);
        assert_int_equal(line[67], '\n');
        assert_int_equal(sscanf(line, "%6u ", &n), 1);
        if (lines++ == 0)
            *first = n;
        else
            assert_int_equal(n, last + 1);
        last = n;
    }
    gzclose(g);
    assert_true(lines > 0);
    return last + 1;
}

static void rotates_by_size_and_keeps_within_the_bound(void **state)
{
    enum { ROTATE = 68 * 100, TOTAL = ROTATE * 6, LINES = 5000 };
    struct ic_logfile *f = open_log(ROTATE, 0, TOTAL);
    int files, packed;
    char name[128];

    (void)state;
    for (unsigned i = 0; i < LINES; i++) {
        assert_true(put(f, i));
        if (i % 700 == 0)
            pack_all(f);
        assert_true(total_size(&files, &packed) <= TOTAL); /* at any time */
    }
    pack_all(f);
    assert_int_equal(ic_logfile_rotations(f), LINES / 100 - 1);
    total_size(&files, &packed);
    assert_int_equal(packed, files - 1);
    assert_true(files >= 4);
    /* the newest ones are there, complete and in order, up to the last line */
    unsigned first = 0, next = 0, expect = 0;
    for (unsigned n = (unsigned)(LINES / 100 - 1) - (unsigned)packed + 1; n < LINES / 100; n++) {
        snprintf(name, sizeof name, "%s.%06u.gz", path, n);
        next = check_lines(name, &first);
        if (expect)
            assert_int_equal(first, expect);
        expect = next;
    }
    next = check_lines(path, &first);
    assert_int_equal(first, expect);
    assert_int_equal(next, LINES);
    ic_logfile_close(&f);
}

static void rotates_by_age_whatever_the_wall_clock_does(void **state)
{
    struct ic_logfile *f = open_log(1 << 20, 24 * HOUR, 1 << 24);
    unsigned n = 0;

    (void)state;
    assert_true(put(f, n++));
    wall -= 10 * 365 * 86400.0; /* back by ten years */
    for (int h = 0; h < 23; h++, now += HOUR)
        assert_true(put(f, n++));
    assert_int_equal(ic_logfile_rotations(f), 0);
    wall += 20 * 365 * 86400.0; /* and far into the future */
    assert_true(put(f, n++));
    assert_int_equal(ic_logfile_rotations(f), 0);
    now += HOUR; /* 24 h */
    assert_true(put(f, n++));
    assert_int_equal(ic_logfile_rotations(f), 1);
    now += 1000 * HOUR; /* no line, no rotation; then one */
    assert_true(put(f, n++));
    assert_int_equal(ic_logfile_rotations(f), 2);
    ic_logfile_close(&f);
    /* started anew while the wall clock is wrong: a file from the future is as old as nothing */
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    wall = (double)st.st_mtime - 1e8;
    f = open_log(1 << 20, 24 * HOUR, 1 << 24);
    assert_true(put(f, n++));
    now += 23 * HOUR;
    assert_true(put(f, n++));
    assert_int_equal(ic_logfile_rotations(f), 0);
    now += HOUR;
    assert_true(put(f, n++));
    assert_int_equal(ic_logfile_rotations(f), 1);
    pack_all(f);
    unsigned first;
    assert_int_equal(check_lines(path, &first), n);
    ic_logfile_close(&f);
}

static void an_old_file_is_rotated_at_its_age(void **state)
{
    struct ic_logfile *f = open_log(1 << 20, 24 * HOUR, 1 << 24);
    struct statx sx;

    (void)state;
    assert_true(put(f, 0));
    ic_logfile_close(&f);
    assert_int_equal(statx(AT_FDCWD, path, 0, STATX_BTIME, &sx), 0);
    if (!(sx.stx_mask & STATX_BTIME)) {
        print_message("skipped: this file system knows no birth times\n");
        skip();
    }
    wall = (double)sx.stx_btime.tv_sec + 20 * 3600; /* started 20 h later */
    f = open_log(1 << 20, 24 * HOUR, 1 << 24);
    assert_true(put(f, 1));
    now += 3 * HOUR;
    assert_true(put(f, 2));
    assert_int_equal(ic_logfile_rotations(f), 0);
    now += 2 * HOUR;
    assert_true(put(f, 3));
    assert_int_equal(ic_logfile_rotations(f), 1);
    ic_logfile_close(&f);
}

static void a_full_disk_loses_whole_lines_and_recovers(void **state)
{
    static const int errors[] = {ENOSPC, EIO, EDQUOT};
    struct ic_log_sink s;
    char lines[68 * 5 + 1], line[200];
    int why;

    (void)state;
    for (size_t e = 0; e < 3; e++) {
        struct ic_logfile *f = open_log(1 << 20, 0, 1 << 24);
        s = ic_logfile_sink(f);
        disk_error = errors[e];
        for (unsigned i = 0; i < 10; i++)
            assert_true(put(f, i));
        memset(lines, 'x', sizeof lines);
        for (int i = 1; i <= 5; i++)
            lines[68 * i - 1] = '\n';
        room = 68 * 2 + 30; /* two lines and a half fit */
        assert_int_equal(s.write(s.arg, lines, 68 * 5, &why), 68 * 2);
        assert_int_equal(why, disk_error);
        for (int i = 0; i < 1000; i++) { /* nothing moves, nothing breaks */
            assert_int_equal(s.write(s.arg, lines, 68, &why), 0);
            assert_int_equal(why, disk_error);
        }
        room = -1;
        for (unsigned i = 12; i < 20; i++)
            assert_true(put(f, i));
        ic_logfile_close(&f);
        FILE *in = fopen(path, "r");
        int n = 0;
        for (; fgets(line, sizeof line, in); n++)
            assert_int_equal(strlen(line), 68); /* no half line, none glued to another */
        fclose(in);
        assert_int_equal(n, 20);
        unlink(path);
    }
}

static void a_limit_on_file_sizes_rotates(void **state)
{
    struct rlimit was, low;
    struct ic_logfile *f;
    int files, packed;

    (void)state;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &was), 0);
    low = was;
    low.rlim_cur = 5000; /* 73 lines and a half */
    f = open_log(1 << 20, 0, 1 << 24);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &low), 0);
    for (unsigned i = 0; i < 200; i++)
        assert_true(put(f, i));
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &was), 0);
    assert_int_equal(ic_logfile_rotations(f), 2);
    assert_int_equal(total_size(&files, &packed), 200 * 68);
    assert_int_equal(files, 3);
    unsigned first;
    assert_int_equal(check_lines(path, &first), 200);
    assert_int_equal(first, 146);
    ic_logfile_close(&f);
}

static void what_was_interrupted_is_resumed(void **state)
{
    struct ic_logfile *f = open_log(6800, 0, 1 << 20);
    char name[128];
    int files, packed;

    (void)state;
    for (unsigned i = 0; i < 350; i++)
        assert_true(put(f, i));
    ic_logfile_close(&f); /* three rotated, none compressed */
    snprintf(name, sizeof name, "%s.000001.gz.tmp", path);
    FILE *half = fopen(name, "w");
    fputs("half of it", half);
    fclose(half);
    snprintf(name, sizeof name, "%s.123", path); /* not ours: too few digits */
    fclose(fopen(name, "w"));
    f = open_log(6800, 0, 1 << 20);
    pack_all(f);
    total_size(&files, &packed);
    assert_int_equal(packed, 3);
    assert_int_equal(files, 5);
    for (unsigned i = 350; i < 450; i++)
        assert_true(put(f, i));
    pack_all(f);
    unsigned first;
    snprintf(name, sizeof name, "%s.000004.gz", path);
    assert_int_equal(check_lines(name, &first), 400);
    assert_int_equal(first, 300);
    ic_logfile_close(&f);
}

static void compression_waits_while_the_disk_is_full(void **state)
{
    struct ic_logfile *f = open_log(6800, 0, 1 << 20);
    struct rlimit was, low;
    int files, packed;

    (void)state;
    signal(SIGXFSZ, SIG_IGN);
    for (unsigned i = 0; i < 150; i++)
        assert_true(put(f, i));
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &was), 0);
    low = was;
    low.rlim_cur = 100;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &low), 0);
    pack_all(f); /* comes back */
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &was), 0);
    total_size(&files, &packed);
    assert_int_equal(packed, 0); /* and has left nothing half */
    for (unsigned i = 150; i < 250; i++)
        assert_true(put(f, i));
    pack_all(f);
    total_size(&files, &packed);
    assert_int_equal(packed, 2);
    ic_logfile_close(&f);
}

static void reopens_what_was_moved(void **state)
{
    struct ic_logfile *f = open_log(1 << 20, 0, 1 << 24);
    struct ic_log_sink s = ic_logfile_sink(f);
    char moved[128];
    unsigned first;

    (void)state;
    snprintf(moved, sizeof moved, "%s.old", path);
    for (unsigned i = 0; i < 10; i++)
        assert_true(put(f, i));
    assert_int_equal(rename(path, moved), 0);
    for (unsigned i = 10; i < 20; i++)
        assert_true(put(f, i));
    s.reopen(s.arg);
    for (unsigned i = 20; i < 30; i++)
        assert_true(put(f, i));
    assert_int_equal(check_lines(moved, &first), 20);
    assert_int_equal(check_lines(path, &first), 30);
    assert_int_equal(first, 20);
    /* the folder has gone: the old file stays in use, and does not grow without bound */
    assert_int_equal(unlink(path), 0);
    assert_int_equal(unlink(moved), 0);
    assert_int_equal(rmdir(dir), 0);
    ic_log_set_level(IC_LOG_ERROR);
    s.reopen(s.arg);
    assert_true(put(f, 30));
    ic_logfile_close(&f);
    assert_int_equal(mkdir(dir, 0700), 0);
    f = open_log(6800, 0, 6800 * 3);
    assert_true(put(f, 0));
    assert_int_equal(unlink(path), 0);
    assert_int_equal(rmdir(dir), 0);
    unsigned taken = 0;
    for (unsigned i = 1; i < 1000; i++)
        taken += (unsigned)put(f, i);
    assert_int_equal(taken, 299);
    ic_logfile_close(&f);
    assert_int_equal(mkdir(dir, 0700), 0);
}

static void bad_paths_and_sizes_are_refused(void **state)
{
    struct ic_logfile_config cfg = {
        .path = "/nonexistent/folder/log", .rotate_bytes = 1 << 20, .total_bytes = 1 << 24};
    struct ic_logfile *f;
    struct ic_err err = {0};

    (void)state;
    assert_int_equal(ic_logfile_open(&f, &cfg, &err), IC_NOT_FOUND);
    assert_non_null(strstr(err.msg, "/nonexistent/folder/log"));
    assert_null(f);
    cfg.path = dir;
    assert_int_equal(ic_logfile_open(&f, &cfg, &err), IC_NOT_FOUND);
    cfg.path = path;
    cfg.total_bytes = 3 * (1 << 20) - 3;
    assert_int_equal(ic_logfile_open(&f, &cfg, &err), IC_BAD_REQUEST);
    cfg.path = "/dev/full"; /* no regular file: written to, never rotated */
    cfg.total_bytes = 1 << 24;
    assert_int_equal(ic_logfile_open(&f, &cfg, &err), IC_OK);
    assert_false(put(f, 1));
    ic_logfile_close(&f);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(rotates_by_size_and_keeps_within_the_bound),
        TEST(rotates_by_age_whatever_the_wall_clock_does),
        TEST(an_old_file_is_rotated_at_its_age),
        TEST(a_full_disk_loses_whole_lines_and_recovers),
        TEST(a_limit_on_file_sizes_rotates),
        TEST(what_was_interrupted_is_resumed),
        TEST(compression_waits_while_the_disk_is_full),
        TEST(reopens_what_was_moved),
        TEST(bad_paths_and_sizes_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
