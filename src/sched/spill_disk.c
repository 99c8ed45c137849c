/* See spill_disk.h.
 *
 * A part that has been taken is in the queue, then being written, then a file; and it can be dropped or asked for at any of
 * these times. The lock guards queue and lists, never a call that may wait for the disk.
 *
 * Files to be removed go first, before the next is written: so what lies on the disk never exceeds what the spill counts.
 *
 * Whether a folder's process lives is told by a lock (flock) on it, which goes with the process however that ends. */
#include "sched/spill_disk.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/altstack.h"
#include "base/clock.h"
#include "base/log.h"

#define FOLDER "inference-core-kv-" /* and the process's number and a random one */
#define FOLDER_TRIES 8 /* another may take an empty folder for a dead one's, before it is locked */
#define NAME_MAX_LEN 64
#define DIGITS 16 /* of a file's name */
#define MAGIC UINT64_C(0x0a31564b43490d89)

/* A file is this, the tokens, the data. */
struct head {
    uint64_t magic, sum; /* sum: of all the rest, and of this with 0 for it */
    uint64_t file, bytes;
    int32_t from, to;
    char salt[IC_SALT_MAX + 1];
    char zero[24];
};
_Static_assert(sizeof(struct head) == IC_SPILL_FILE_HEAD, "as the spill counts it");

struct job {
    struct job *next;
    struct head head;
    int32_t *tokens;
    void *data;
    bool dropped; /* while it was being written */
};

struct disk {
    struct ic_spill_disk face;
    int parent, own; /* folders; own is locked */
    char name[NAME_MAX_LEN];
    pthread_t thread;
    _Atomic int64_t warned_ns;
    atomic_bool stop;
    pthread_mutex_t lock; /* guards all that follows */
    pthread_cond_t wake;
    struct job *head, **tail, *writing;
    int32_t n_jobs; /* that being written included */
    size_t bytes;   /* of their data */
    uint64_t failed[IC_SPILL_DISK_FAILED];
    int32_t n_failed;
    uint64_t gone[IC_SPILL_FILES_MAX]; /* files to be removed */
    int32_t n_gone;
};

static void warn(struct disk *d, const char *what, const char *why)
{
    int64_t now = ic_now_ns(), before = atomic_load(&d->warned_ns);

    if ((before == 0 || now - before >= IC_SPILL_DISK_WARN_NS) &&
        atomic_compare_exchange_strong(&d->warned_ns, &before, now))
        ic_warn("text", "the cache's disk: %s: %s (what is not there is computed again)", what, why);
}

/* For accidents, not for enemies: who can write there is us. Eight bytes at a time, some GB/s. */
static uint64_t add_up(uint64_t h, const void *data, size_t n)
{
    const unsigned char *p = data;

    for (; n > 0; n -= n < 8 ? n : 8, p += 8) {
        uint64_t v = 0;
        memcpy(&v, p, n < 8 ? n : 8);
        h = (h ^ v) * UINT64_C(0x9E3779B97F4A7C15);
        h ^= h >> 32;
    }
    return h;
}

static uint64_t sum_of(const struct head *head, const int32_t *tokens, const void *data)
{
    struct head h = *head;

    h.sum = 0;
    return add_up(add_up(add_up(1, &h, sizeof h), tokens, sizeof *tokens * (size_t)h.to), data, h.bytes);
}

static struct head head_of(uint64_t file, const struct ic_spill_part *p)
{
    struct head h = {.magic = MAGIC, .file = file, .bytes = p->bytes, .from = p->from, .to = p->to};

    memcpy(h.salt, p->salt, strnlen(p->salt, IC_SALT_MAX));
    return h;
}

static const char *file_name(char *out, uint64_t file, const char *end)
{
    snprintf(out, NAME_MAX_LEN, "%0*llx%s", DIGITS, (unsigned long long)file, end);
    return out;
}

/* ---- the thread --------------------------------------------------------------------------------------------------- */

static int write_all(struct disk *d, int fd, const void *data, size_t n)
{
    const char *p = data;

    while (n > 0) {
        ssize_t k = write(fd, p, n < IC_SPILL_DISK_PIECE ? n : IC_SPILL_DISK_PIECE);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            return k < 0 ? errno : EIO;
        if (atomic_load(&d->stop))
            return ECANCELED;
        p += k;
        n -= (size_t)k;
    }
    return 0;
}

/* Under another name until it is whole. */
static bool write_file(struct disk *d, struct job *j)
{
    char half[NAME_MAX_LEN], whole[NAME_MAX_LEN];
    int fd = openat(d->own, file_name(half, j->head.file, ".tmp"),
                    O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    int why = fd < 0 ? errno : 0;

    if (fd >= 0) {
        j->head.sum = sum_of(&j->head, j->tokens, j->data);
        if ((why = write_all(d, fd, &j->head, sizeof j->head)) == 0 &&
            (why = write_all(d, fd, j->tokens, sizeof *j->tokens * (size_t)j->head.to)) == 0)
            why = write_all(d, fd, j->data, j->head.bytes);
        if (close(fd) != 0 && !why)
            why = errno;
        if (!why && renameat(d->own, half, d->own, file_name(whole, j->head.file, ".kv")) != 0)
            why = errno;
        if (why)
            unlinkat(d->own, half, 0);
    }
    if (why && why != ECANCELED)
        warn(d, "a file was not written", strerror(why));
    return why == 0;
}

static void remove_file(struct disk *d, uint64_t file)
{
    char name[NAME_MAX_LEN];

    if (unlinkat(d->own, file_name(name, file, ".kv"), 0) != 0 && errno != ENOENT)
        warn(d, "a file was not removed", strerror(errno));
}

static void free_job(struct job *j)
{
    free(j->tokens);
    free(j->data);
    free(j);
}

/* With the lock. */
static struct job *take_job(struct disk *d)
{
    struct job *j = d->head;

    d->head = j->next;
    if (!d->head)
        d->tail = &d->head;
    return j;
}

static void forget_job(struct disk *d, struct job *j)
{
    d->n_jobs--;
    d->bytes -= j->head.bytes;
    free_job(j);
}

/* Called with the lock, which is given up meanwhile. */
static void write_next(struct disk *d)
{
    struct job *j = d->writing = take_job(d);

    pthread_mutex_unlock(&d->lock);
    bool ok = write_file(d, j);
    pthread_mutex_lock(&d->lock);
    d->writing = NULL;
    if (ok && j->dropped) {
        pthread_mutex_unlock(&d->lock);
        remove_file(d, j->head.file);
        pthread_mutex_lock(&d->lock);
    } else if (!ok && !j->dropped) {
        IC_ASSERT(d->n_failed < IC_SPILL_DISK_FAILED); /* see disk_put */
        d->failed[d->n_failed++] = j->head.file;
    }
    forget_job(d, j);
}

static void *disk_main(void *arg)
{
    struct disk *d = arg;

    ic_altstack_here();
    pthread_mutex_lock(&d->lock);
    while (!atomic_load(&d->stop)) {
        if (d->n_gone > 0) {
            uint64_t file = d->gone[--d->n_gone];
            pthread_mutex_unlock(&d->lock);
            remove_file(d, file);
            pthread_mutex_lock(&d->lock);
        } else if (d->head) {
            write_next(d);
        } else {
            pthread_cond_wait(&d->wake, &d->lock);
        }
    }
    pthread_mutex_unlock(&d->lock);
    return NULL;
}

/* ---- what the spill calls -------------------------------------------------------------------------------------------- */

static bool has_room(const struct disk *d, size_t bytes)
{
    return d->n_jobs < IC_SPILL_DISK_QUEUE &&
           (d->n_jobs == 0 || d->bytes + bytes <= IC_SPILL_DISK_QUEUE_BYTES) &&
           d->n_failed + d->n_jobs < IC_SPILL_DISK_FAILED;
}

static bool disk_put(void *arg, uint64_t file, const struct ic_spill_part *p)
{
    struct disk *d = arg;
    size_t tokens = sizeof *p->tokens * (size_t)p->to;
    struct job *j = calloc(1, sizeof *j);

    if (!j || !(j->tokens = malloc(tokens))) {
        free(j);
        return false;
    }
    memcpy(j->tokens, p->tokens, tokens);
    j->head = head_of(file, p);
    pthread_mutex_lock(&d->lock);
    bool taken = has_room(d, p->bytes);
    if (taken) {
        j->data = p->data;
        *d->tail = j;
        d->tail = &j->next;
        d->n_jobs++;
        d->bytes += p->bytes;
        pthread_cond_signal(&d->wake);
    }
    pthread_mutex_unlock(&d->lock);
    if (!taken)
        free_job(j);
    return taken;
}

/* With the lock: what waits to be written, or is being written. */
static struct job *find_job(const struct disk *d, uint64_t file)
{
    struct job *j = d->head;

    if (d->writing && d->writing->head.file == file)
        return d->writing;
    while (j && j->head.file != file)
        j = j->next;
    return j;
}

static void *copy_of_job(struct disk *d, uint64_t file)
{
    void *data = NULL;

    pthread_mutex_lock(&d->lock);
    struct job *j = find_job(d, file);
    if (j && (data = malloc(j->head.bytes)) != NULL)
        memcpy(data, j->data, j->head.bytes); /* the thread only reads it, and frees it under the lock */
    pthread_mutex_unlock(&d->lock);
    return data;
}

static bool read_all(int fd, void *data, size_t n)
{
    char *p = data;

    while (n > 0) {
        ssize_t k = read(fd, p, n);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            return false;
        p += k;
        n -= (size_t)k;
    }
    return true;
}

/* All of an open file, or NULL and why. */
static void *read_file(int fd, uint64_t file, const struct ic_spill_part *p, const char **why)
{
    struct head want = head_of(file, p), got;
    struct stat st;
    size_t n_tokens = sizeof *p->tokens * (size_t)p->to;

    *why = "it is not what was written";
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode) || (uint64_t)st.st_size != ic_spill_file_bytes(p))
        return NULL;
    int32_t *tokens = malloc(n_tokens);
    void *data = malloc(p->bytes);
    bool ok = tokens && data;
    if (!ok) {
        *why = "out of memory";
    } else if (!read_all(fd, &got, sizeof got) || !read_all(fd, tokens, n_tokens) ||
               !read_all(fd, data, p->bytes)) {
        *why = "it cannot be read";
        ok = false;
    } else {
        want.sum = got.sum;
        ok = memcmp(&got, &want, sizeof got) == 0 && memcmp(tokens, p->tokens, n_tokens) == 0 &&
             sum_of(&got, tokens, data) == got.sum;
    }
    free(tokens);
    if (!ok) {
        free(data);
        data = NULL;
    }
    return data;
}

static void *disk_get(void *arg, uint64_t file, const struct ic_spill_part *p)
{
    struct disk *d = arg;
    char name[NAME_MAX_LEN];
    const char *why;
    void *data = copy_of_job(d, file);

    if (data)
        return data;
    /* NONBLOCK: should somebody have put a FIFO there */
    int fd = openat(d->own, file_name(name, file, ".kv"), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0) {
        warn(d, name, strerror(errno));
        return NULL;
    }
    if (!(data = read_file(fd, file, p, &why)))
        warn(d, name, why);
    close(fd);
    return data;
}

static void disk_drop(void *arg, uint64_t file)
{
    struct disk *d = arg;
    bool now = false;

    pthread_mutex_lock(&d->lock);
    struct job *j = find_job(d, file), **at = &d->head;
    if (j && j == d->writing) {
        j->dropped = true;
    } else if (j) {
        while (*at != j)
            at = &(*at)->next;
        *at = j->next;
        if (!j->next)
            d->tail = at;
        forget_job(d, j);
    } else if (d->n_gone < IC_SPILL_FILES_MAX) {
        d->gone[d->n_gone++] = file;
        pthread_cond_signal(&d->wake);
    } else {
        now = true;
    }
    pthread_mutex_unlock(&d->lock);
    if (now)
        remove_file(d, file);
}

static bool disk_failed(void *arg, uint64_t *file)
{
    struct disk *d = arg;

    pthread_mutex_lock(&d->lock);
    bool any = d->n_failed > 0;
    if (any)
        *file = d->failed[--d->n_failed];
    pthread_mutex_unlock(&d->lock);
    return any;
}

/* ---- folders ----------------------------------------------------------------------------------------------------------- */

static bool is_our_file(const char *name)
{
    return strspn(name, "0123456789abcdef") == DIGITS &&
           (!strcmp(name + DIGITS, ".kv") || !strcmp(name + DIGITS, ".tmp"));
}

static bool is_our_folder(const char *name)
{
    size_t n = strlen(FOLDER);
    return strlen(name) < NAME_MAX_LEN && !strncmp(name, FOLDER, n) && name[n] &&
           strspn(name + n, "0123456789abcdef-") == strlen(name + n);
}

/* Calls `each` for every name in the folder. */
static void for_names(int folder, void (*each)(int folder, const char *name))
{
    int fd = openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;

    if (!dir) {
        if (fd >= 0)
            close(fd);
        return;
    }
    for (struct dirent *e; (e = readdir(dir)) != NULL;)
        each(folder, e->d_name);
    closedir(dir);
}

static void remove_our_file(int folder, const char *name)
{
    if (is_our_file(name))
        unlinkat(folder, name, 0);
}

static void remove_folder(int parent, int folder, const char *name)
{
    for_names(folder, remove_our_file);
    if (unlinkat(parent, name, AT_REMOVEDIR) !=
        0) /* somebody has put something in it: that is not ours to remove */
        ic_warn("text", "the cache's disk: %s was not removed: %s", name, strerror(errno));
}

/* What a process has left that was killed. */
static void remove_if_dead(int parent, const char *name)
{
    struct stat st;

    if (!is_our_folder(name))
        return;
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return;
    if (fstat(fd, &st) == 0 && st.st_uid == geteuid() && flock(fd, LOCK_EX | LOCK_NB) == 0) {
        ic_info("text", "the cache's disk: %s is of a process that is no more, and is removed", name);
        remove_folder(parent, fd, name);
    }
    close(fd);
}

/* Returns an errno. */
static int make_folder(struct disk *d)
{
    int why = EAGAIN;

    for (int i = 0; i < FOLDER_TRIES && (why == EAGAIN || why == EEXIST || why == ENOENT); i++) {
        uint32_t r = 0;
        struct stat st;
        if (getrandom(&r, sizeof r, 0) != sizeof r)
            return EIO;
        snprintf(d->name, sizeof d->name, FOLDER "%ld-%08x", (long)getpid(), (unsigned)r);
        if (mkdirat(d->parent, d->name, 0700) != 0) {
            why = errno;
            if (why == ENOENT) /* the operator's folder itself is gone */
                return why;
            continue;
        }
        d->own = openat(d->parent, d->name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
        if (d->own >= 0 && flock(d->own, LOCK_EX | LOCK_NB) == 0 && fstat(d->own, &st) == 0 &&
            st.st_nlink > 0)
            return 0;
        why = d->own < 0 ? errno : EAGAIN; /* taken for a dead one's */
        if (d->own >= 0)
            close(d->own);
        d->own = -1;
        unlinkat(d->parent, d->name, AT_REMOVEDIR);
    }
    return why;
}

/* ---- open, close --------------------------------------------------------------------------------------------------------- */

static void free_disk(struct disk *d)
{
    if (d->own >= 0) {
        remove_folder(d->parent, d->own, d->name);
        close(d->own);
    }
    if (d->parent >= 0)
        close(d->parent);
    pthread_mutex_destroy(&d->lock);
    pthread_cond_destroy(&d->wake);
    free(d);
}

static enum ic_status open_folders(struct disk *d, const char *dir, struct ic_err *err)
{
    d->parent = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (d->parent < 0)
        return ic_fail(err, errno == ENOENT ? IC_NOT_FOUND : IC_BAD_REQUEST, "--cache-disk %s: %s", dir,
                       strerror(errno));
    for_names(d->parent, remove_if_dead);
    int why = make_folder(d);
    if (why == ENOSPC || why == EDQUOT || why == EROFS ||
        why == EIO) { /* a server must start beside a full disk */
        ic_warn("text", "no cache on the disk %s: %s", dir, strerror(why));
        return IC_UNAVAILABLE;
    }
    return why ? ic_fail(err, IC_BAD_REQUEST, "--cache-disk %s: %s", dir, strerror(why)) : IC_OK;
}

enum ic_status ic_spill_disk_open(struct ic_spill_disk **out, const char *dir, size_t max,
                                  struct ic_err *err)
{
    struct disk *d = calloc(1, sizeof *d);

    *out = NULL;
    if (!d)
        return ic_fail(err, IC_OOM, "out of memory");
    d->face = (struct ic_spill_disk){
        .arg = d, .max = max, .put = disk_put, .get = disk_get, .drop = disk_drop, .failed = disk_failed};
    d->parent = d->own = -1;
    d->tail = &d->head;
    pthread_mutex_init(&d->lock, NULL);
    pthread_cond_init(&d->wake, NULL);
    enum ic_status st = open_folders(d, dir, err);
    if (st == IC_OK && pthread_create(&d->thread, NULL, disk_main, d) != 0)
        st = ic_fail(err, IC_OOM, "no thread for the cache's disk");
    if (st != IC_OK) {
        free_disk(d);
        return st == IC_UNAVAILABLE ? IC_OK : st;
    }
    pthread_setname_np(d->thread, "ic-spill");
    *out = &d->face;
    return IC_OK;
}

void ic_spill_disk_close(struct ic_spill_disk **disk)
{
    struct disk *d = *disk ? (*disk)->arg : NULL;
    struct timespec until;

    if (!d)
        return;
    *disk = NULL;
    atomic_store(&d->stop, true);
    pthread_mutex_lock(&d->lock);
    pthread_cond_signal(&d->wake);
    pthread_mutex_unlock(&d->lock);
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += IC_SPILL_DISK_STOP_MS / 1000;
    if (pthread_timedjoin_np(d->thread, NULL, &until) != 0) {
        ic_warn("text", "the cache's disk does not answer: %s is left behind for the next start to remove",
                d->name);
        return;
    }
    while (d->head)
        forget_job(d, take_job(d));
    free_disk(d);
}
