/* KV in files: what comes back is what went there or nothing, and nobody else's file is ever touched. Disks that are full, broken
 * and slow are made by a write(2) of our own. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <cmocka.h>

static atomic_int write_errno;           /* what each write says, 0: it goes through */
static atomic_bool write_waits, waiting; /* a slow disk; the thread is in there */

static ssize_t odd_write(int fd, const void *data, size_t n)
{
    while (atomic_load(&write_waits)) {
        atomic_store(&waiting, true);
        usleep(1000);
    }
    atomic_store(&waiting, false);
    if (atomic_load(&write_errno)) {
        errno = atomic_load(&write_errno);
        return -1;
    }
    return write(fd, data, n > 1000 ? n / 2 : n); /* short ones are normal */
}

#define write odd_write
#include "sched/spill_disk.c"
#undef write

#define BYTES 100000
#define TOKENS 50
#define PATIENCE_MS 60000 /* nothing passes or fails by time but by giving up */

static char dir[] = "/tmp/ic_spill_disk_test.XXXXXX";

static struct ic_spill_disk *open_it(void)
{
    struct ic_spill_disk *disk;
    struct ic_err err = {0};

    if (ic_spill_disk_open(&disk, dir, 1 << 30, &err) != IC_OK || !disk)
        fail_msg("%s", err.msg);
    return disk;
}

static struct ic_spill_part part_of(int32_t seed)
{
    struct ic_spill_part p = {.salt = "tenant", .from = 10, .to = TOKENS, .bytes = BYTES};

    p.tokens = malloc(sizeof *p.tokens * TOKENS);
    p.data = malloc(BYTES);
    assert_true(p.tokens && p.data);
    for (int32_t i = 0; i < TOKENS; i++)
        p.tokens[i] = seed + i;
    for (int32_t i = 0; i < BYTES; i++)
        ((unsigned char *)p.data)[i] = (unsigned char)(i * 7 + i / 256 + seed);
    return p;
}

/* As put by the spill: the data is the disk's. */
static bool put(struct ic_spill_disk *disk, uint64_t file, int32_t seed)
{
    struct ic_spill_part p = part_of(seed);
    bool ok = disk->put(disk->arg, file, &p);

    if (!ok)
        free(p.data);
    free(p.tokens);
    return ok;
}

/* What comes back must be right, if anything does. */
static bool get(struct ic_spill_disk *disk, uint64_t file, int32_t seed)
{
    struct ic_spill_part p = part_of(seed);
    void *data = disk->get(disk->arg, file, &p);

    assert_true(!data || !memcmp(data, p.data, BYTES));
    free(data);
    free(p.data);
    free(p.tokens);
    return data != NULL;
}

static void settle(struct ic_spill_disk *disk)
{
    struct disk *d = disk->arg;

    for (int i = 0; i < PATIENCE_MS; i++) {
        pthread_mutex_lock(&d->lock);
        bool busy = d->n_jobs > 0 || d->n_gone > 0;
        pthread_mutex_unlock(&d->lock);
        if (!busy)
            return;
        usleep(1000);
    }
    fail_msg("the disk's thread does nothing");
}

static void until_waiting(void)
{
    for (int i = 0; i < PATIENCE_MS && !atomic_load(&waiting); i++)
        usleep(1000);
    assert_true(atomic_load(&waiting));
}

static char *path_of(struct ic_spill_disk *disk, uint64_t file)
{
    static char path[300];
    const struct disk *d = disk->arg;

    snprintf(path, sizeof path, "%s/%s/%016llx.kv", dir, d->name, (unsigned long long)file);
    return path;
}

static int names_in(const char *folder)
{
    int n = -2;
    DIR *d = opendir(folder);

    assert_non_null(d);
    while (readdir(d))
        n++;
    closedir(d);
    return n;
}

static void what_was_written_comes_back(void **state)
{
    struct ic_spill_disk *disk = open_it();
    struct stat st;

    (void)state;
    for (uint64_t f = 1; f <= 20; f++) {
        assert_true(put(disk, f, (int32_t)f));
        assert_true(get(disk, f, (int32_t)f)); /* from the queue, from under the pen, or from the disk */
        if (f % 4 == 0)
            settle(disk);
    }
    settle(disk);
    for (uint64_t f = 1; f <= 20; f++)
        assert_true(get(disk, f, (int32_t)f));
    struct ic_spill_part p = part_of(3);
    assert_int_equal(stat(path_of(disk, 3), &st), 0);
    assert_int_equal(st.st_size, ic_spill_file_bytes(&p));
    assert_int_equal(st.st_mode & 0777, 0600);
    free(p.data);
    free(p.tokens);
    for (uint64_t f = 1; f <= 20; f++)
        disk->drop(disk->arg, f);
    settle(disk);
    assert_int_equal(access(path_of(disk, 3), F_OK), -1);
    assert_true(put(disk, 21, 21)); /* left to the end */
    settle(disk);
    ic_spill_disk_close(&disk);
    assert_null(disk);
    ic_spill_disk_close(&disk);
    assert_int_equal(names_in(dir), 0);
}

/* Whatever has happened to a file: nothing comes back, or what was written. */
static void a_file_that_is_not_what_was_written_is_not_there(void **state)
{
    struct ic_spill_disk *disk = open_it();
    const off_t size = IC_SPILL_FILE_HEAD + 4 * TOKENS + BYTES;
    const off_t at[] = {0,
                        8,
                        16,
                        24,
                        32,
                        36,
                        40,
                        103,
                        120,
                        IC_SPILL_FILE_HEAD,
                        IC_SPILL_FILE_HEAD + 4 * TOKENS - 1,
                        IC_SPILL_FILE_HEAD + 4 * TOKENS,
                        size / 2,
                        size - 1};
    uint64_t f = 1;

    (void)state;
    for (size_t i = 0; i < sizeof at / sizeof *at; i++, f++) { /* one bit */
        unsigned char c;
        assert_true(put(disk, f, 1));
        settle(disk);
        int fd = open(path_of(disk, f), O_RDWR);
        assert_true(fd >= 0 && pread(fd, &c, 1, at[i]) == 1);
        c ^= 4;
        assert_true(pwrite(fd, &c, 1, at[i]) == 1);
        close(fd);
        assert_false(get(disk, f, 1));
    }
    const off_t cut[] = {0, 1, IC_SPILL_FILE_HEAD, size - 1, size + 1};
    for (size_t i = 0; i < sizeof cut / sizeof *cut; i++, f++) {
        assert_true(put(disk, f, 1));
        settle(disk);
        assert_int_equal(truncate(path_of(disk, f), cut[i]), 0);
        assert_false(get(disk, f, 1));
    }
    assert_true(put(disk, f, 1) && put(disk, f + 1, 1) && put(disk, f + 2, 2));
    settle(disk);
    assert_int_equal(unlink(path_of(disk, f)), 0); /* gone */
    assert_false(get(disk, f, 1));
    assert_int_equal(mkfifo(path_of(disk, f), 0600), 0); /* nobody hangs there */
    assert_false(get(disk, f, 1));
    assert_false(get(disk, f + 2, 1)); /* another's tokens */
    char other[300];
    snprintf(other, sizeof other, "%s", path_of(disk, f + 1));
    assert_int_equal(rename(other, path_of(disk, f)), 0); /* another part's file in its place */
    assert_false(get(disk, f, 1));
    assert_true(get(disk, f + 2, 2));
    ic_spill_disk_close(&disk);
    assert_int_equal(names_in(dir), 0);
}

static void a_full_disk_takes_nothing_and_harms_nobody(void **state)
{
    struct ic_spill_disk *disk = open_it();
    uint64_t file, failed = 0;

    (void)state;
    assert_true(put(disk, 1, 1));
    settle(disk);
    atomic_store(&write_errno, ENOSPC);
    for (uint64_t f = 2; f < 2 + 2 * IC_SPILL_DISK_FAILED; f++) {
        put(disk, f, 1); /* refused when too many failures are still to be told */
        settle(disk);
    }
    while (disk->failed(disk->arg, &file)) {
        assert_true(file >= 2);
        disk->drop(disk->arg, file);
        failed++;
    }
    assert_int_equal(failed, IC_SPILL_DISK_FAILED);
    atomic_store(&write_errno, 0);
    assert_true(put(disk, 1000, 5));
    settle(disk);
    assert_true(get(disk, 1000, 5) && get(disk, 1, 1));
    struct disk *d = disk->arg;
    char own[300];
    snprintf(own, sizeof own, "%s/%s", dir, d->name);
    assert_int_equal(names_in(own), 2); /* nothing half done is left */
    ic_spill_disk_close(&disk);
}

/* Nobody waits for it: its queue is bounded, and what is in there can be had and dropped at any time. */
static void a_slow_disk_holds_up_nobody(void **state)
{
    struct ic_spill_disk *disk = open_it();
    uint64_t f = 1, file;

    (void)state;
    atomic_store(&write_waits, true);
    assert_true(put(disk, f, 1));
    until_waiting();
    while (put(disk, f + 1, (int32_t)f + 1))
        f++;
    assert_int_equal(f, IC_SPILL_DISK_QUEUE);
    for (uint64_t i = 1; i <= f; i++)
        assert_true(get(disk, i, (int32_t)i));
    disk->drop(disk->arg, 1); /* under the pen */
    disk->drop(disk->arg, 3);
    disk->drop(disk->arg, f); /* the last */
    assert_true(put(disk, 50, 50));
    atomic_store(&write_waits, false);
    settle(disk);
    assert_false(get(disk, 1, 1) || get(disk, 3, 3) || get(disk, f, (int32_t)f));
    assert_true(get(disk, 2, 2) && get(disk, 50, 50) && !disk->failed(disk->arg, &file));
    struct disk *d = disk->arg;
    char own[300];
    snprintf(own, sizeof own, "%s/%s", dir, d->name);
    assert_int_equal(names_in(own), IC_SPILL_DISK_QUEUE - 3 + 1);
    ic_spill_disk_close(&disk);
    assert_int_equal(names_in(dir), 0);
}

static void large_parts_wait_alone(void **state)
{
    struct ic_spill_disk *disk = open_it();
    struct disk *d = disk->arg;

    (void)state;
    pthread_mutex_lock(&d->lock);
    assert_true(has_room(d, IC_SPILL_DISK_QUEUE_BYTES + 1));
    d->n_jobs = 1;
    d->bytes = 1000;
    assert_true(has_room(d, IC_SPILL_DISK_QUEUE_BYTES - 1000));
    assert_false(has_room(d, IC_SPILL_DISK_QUEUE_BYTES - 999));
    d->n_jobs = 0;
    d->bytes = 0;
    pthread_mutex_unlock(&d->lock);
    ic_spill_disk_close(&disk);
}

static void touch(const char *folder, const char *name, bool as_folder)
{
    char path[400];

    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (as_folder) {
        assert_int_equal(mkdir(path, 0700), 0);
    } else {
        int fd = open(path, O_WRONLY | O_CREAT, 0600);
        assert_true(fd >= 0);
        close(fd);
    }
}

static bool there(const char *name)
{
    char path[400];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return access(path, F_OK) == 0;
}

/* A process that is killed leaves its files; one that lives, and strangers, keep theirs. */
static void leftovers_go_and_nothing_else_does(void **state)
{
    (void)state;
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) { /* killed in the midst of it, one file written and one half */
        struct ic_spill_disk *disk;
        if (ic_spill_disk_open(&disk, dir, 1 << 30, NULL) != IC_OK || !put(disk, 1, 1))
            _exit(1);
        settle(disk);
        atomic_store(&write_waits, true);
        put(disk, 2, 2);
        until_waiting();
        _exit(0);
    }
    int status;
    assert_true(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    assert_int_equal(names_in(dir), 1);
    struct ic_spill_disk *living = open_it();
    assert_int_equal(names_in(dir), 1); /* the dead one's is gone, ours is there */
    assert_true(put(living, 1, 1));
    settle(living);

    static const char *const files[] = {"notes.txt", "0000000000000001.kv", FOLDER "1-2"};
    static const char *const folders[] = {"inference-core-kv", FOLDER, FOLDER "x", FOLDER "1-2.bak",
                                          "else"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        touch(dir, files[i], false);
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++)
        touch(dir, folders[i], true);
    touch(dir, FOLDER "77-0a", true); /* a dead one's, in which somebody has put something */
    char inside[300];
    snprintf(inside, sizeof inside, "%s/" FOLDER "77-0a", dir);
    touch(inside, "0123456789abcdef.kv", false);
    touch(inside, "0123456789abcdef.kv2", false);
    snprintf(inside, sizeof inside, "%s/" FOLDER "88-0a", dir);
    assert_int_equal(symlink("else", inside), 0); /* nobody goes through it */
    touch(dir, "else/0123456789abcdef.kv", false);

    struct ic_spill_disk *second = open_it();
    assert_true(get(living, 1, 1));
    ic_spill_disk_close(&second);
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        assert_true(there(files[i]));
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++)
        assert_true(there(folders[i]));
    assert_true(there(FOLDER "77-0a/0123456789abcdef.kv2") && !there(FOLDER "77-0a/0123456789abcdef.kv"));
    assert_true(there("else/0123456789abcdef.kv"));
    ic_spill_disk_close(&living);
    char cmd[200];
    snprintf(cmd, sizeof cmd, "rm -rf %s/*", dir);
    assert_int_equal(system(cmd), 0);
}

static void a_folder_that_cannot_be_used_is_told(void **state)
{
    struct ic_spill_disk *disk = (struct ic_spill_disk *)1;
    struct ic_err err = {0};

    (void)state;
    assert_int_equal(ic_spill_disk_open(&disk, "/nonexistent/folder", 1 << 20, &err), IC_NOT_FOUND);
    assert_null(disk);
    assert_non_null(strstr(err.msg, "/nonexistent/folder"));
    assert_int_equal(ic_spill_disk_open(&disk, "/dev/null", 1 << 20, &err), IC_BAD_REQUEST);
    assert_null(disk);
}

static int make_dir(void **state)
{
    (void)state;
    ic_log_set_level(IC_LOG_ERROR);
    return mkdtemp(dir) ? 0 : -1;
}

static int remove_dir(void **state)
{
    (void)state;
    return rmdir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_was_written_comes_back),
        cmocka_unit_test(a_file_that_is_not_what_was_written_is_not_there),
        cmocka_unit_test(a_full_disk_takes_nothing_and_harms_nobody),
        cmocka_unit_test(a_slow_disk_holds_up_nobody),
        cmocka_unit_test(large_parts_wait_alone),
        cmocka_unit_test(leftovers_go_and_nothing_else_does),
        cmocka_unit_test(a_folder_that_cannot_be_used_is_told),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
