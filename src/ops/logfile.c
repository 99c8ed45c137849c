/* Rotation is a rename, a new file, and pruning; each of them may fail, and then the old file is simply
 * gone on with until the next line. Compression runs in slices of SLICE bytes when no line waits (log.h:
 * work), into PATH.N.gz.tmp, which becomes PATH.N.gz when it is complete; whatever is interrupted is begun
 * anew by the next one to look.
 *
 * The folder is looked through when something has rotated, not kept in memory: what an operator moves or
 * deletes there is then known. Ages are of the monotonic clock; only a file found at the start is asked for
 * its birth by the wall clock, and a birth in the future counts as now. */
#include "ops/logfile.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include "base/clock.h"

#define SLICE (128 << 10)     /* bytes compressed at once: some ms */
#define FULL_PIPE_MS 1000     /* a FIFO's reader may take before its lines are lost */
#define NUMBER_MAX 999999999u /* of a rotated file */
#define PATH_BYTES (IC_LOGFILE_PATH_MAX + 32)

struct ic_logfile {
    struct ic_logfile_config cfg;
    char path[IC_LOGFILE_PATH_MAX + 1];
    size_t dir_len; /* of path, up to the last slash with it */
    _Atomic int fd;
    bool regular, torn; /* torn: half a line stands at the end and could not be taken back */
    bool stuck;         /* the last rotation failed */
    int64_t size, begun_ns;
    unsigned last; /* highest number in use */
    _Atomic uint64_t rotations;
    /* compression */
    bool look; /* there may be something to compress */
    unsigned packing;
    int in;
    gzFile out;
    char slice[SLICE];
};

static int64_t real_now(void)
{
    return ic_now_ns();
}

/* ---- the folder ---- */

/* A rotated file's name: PATH.NUMBER and nothing, ".gz" or ".gz.tmp" after it. */
enum kind { PLAIN, PACKED, HALF, OTHER };

static enum kind parse_name(const struct ic_logfile *f, const char *name, unsigned *number)
{
    const char *base = f->path + f->dir_len;
    size_t len = strlen(base), digits;
    unsigned long v;

    if (strncmp(name, base, len) != 0 || name[len] != '.')
        return OTHER;
    name += len + 1;
    digits = strspn(name, "0123456789");
    if (digits < 6 || digits > 9 || (v = strtoul(name, NULL, 10)) == 0)
        return OTHER;
    *number = (unsigned)v;
    name += digits;
    return !*name ? PLAIN : !strcmp(name, ".gz") ? PACKED : !strcmp(name, ".gz.tmp") ? HALF : OTHER;
}

static const char *name_of(const struct ic_logfile *f, unsigned number, enum kind kind,
                           char out[PATH_BYTES])
{
    static const char *const ends[] = {"", ".gz", ".gz.tmp"};
    snprintf(out, PATH_BYTES, "%s.%06u%s", f->path, number, ends[kind]);
    return out;
}

struct view {
    unsigned last, first; /* highest and lowest number; 0: there is none */
    unsigned plain;       /* lowest that is not compressed, 0: none */
    int64_t bytes;        /* of all but half ones */
};

static struct view look_around(const struct ic_logfile *f)
{
    struct view v = {0};
    char dir[PATH_BYTES];
    struct stat st;
    struct dirent *e;

    snprintf(dir, sizeof dir, "%.*s", (int)(f->dir_len ? f->dir_len : 1), f->dir_len ? f->path : ".");
    DIR *d = opendir(dir);
    while (d && (e = readdir(d))) {
        unsigned n;
        enum kind k = parse_name(f, e->d_name, &n);
        if (k == OTHER || fstatat(dirfd(d), e->d_name, &st, AT_SYMLINK_NOFOLLOW) != 0)
            continue;
        v.last = n > v.last ? n : v.last;
        if (k == HALF)
            continue;
        v.bytes += st.st_size;
        v.first = !v.first || n < v.first ? n : v.first;
        if (k == PLAIN && (!v.plain || n < v.plain))
            v.plain = n;
    }
    if (d)
        closedir(d);
    return v;
}

static void stop_packing(struct ic_logfile *f)
{
    char tmp[PATH_BYTES];

    if (f->out)
        gzclose(f->out);
    if (f->in >= 0)
        close(f->in);
    if (f->packing)
        unlink(name_of(f, f->packing, HALF, tmp));
    f->out = NULL;
    f->in = -1;
    f->packing = 0;
}

/* Removes the oldest until all, a current file at its largest and the compressed twin of one are within the
 * bound. */
static void prune(struct ic_logfile *f)
{
    struct view v;
    char name[PATH_BYTES];

    while ((v = look_around(f)).first && v.bytes > f->cfg.total_bytes - 2 * f->cfg.rotate_bytes) {
        if (v.first == f->packing)
            stop_packing(f);
        int gone = unlink(name_of(f, v.first, PLAIN, name)) == 0;
        gone |= unlink(name_of(f, v.first, PACKED, name)) == 0;
        if (!gone)
            return; /* not ours to delete */
    }
    f->last = v.last > f->last ? v.last : f->last;
    f->look = v.plain != 0;
}

/* What a process that ended in the middle has left: nobody packs now. */
static void sweep(const struct ic_logfile *f)
{
    char dir[PATH_BYTES];
    struct dirent *e;
    unsigned n;

    snprintf(dir, sizeof dir, "%.*s", (int)(f->dir_len ? f->dir_len : 1), f->dir_len ? f->path : ".");
    DIR *d = opendir(dir);
    while (d && (e = readdir(d)))
        if (parse_name(f, e->d_name, &n) == HALF)
            unlinkat(dirfd(d), e->d_name, 0);
    if (d)
        closedir(d);
}

/* ---- opening ---- */

static int open_path(const struct ic_logfile *f, int flags)
{
    /* NONBLOCK: a FIFO without a reader must not hold us */
    return open(f->path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NOCTTY | O_NONBLOCK | flags, 0640);
}

/* How long ago a file was made, in ns, by the wall clock: 0 to rotate_ns. */
static int64_t age_of(const struct ic_logfile *f, int fd)
{
    struct statx sx;

    if (!f->cfg.rotate_ns || statx(fd, "", AT_EMPTY_PATH, STATX_BTIME, &sx) != 0 ||
        !(sx.stx_mask & STATX_BTIME))
        return 0;
    double s = f->cfg.wall_s() - (double)sx.stx_btime.tv_sec, max = (double)f->cfg.rotate_ns * 1e-9;
    return s <= 0 ? 0 : s >= max ? f->cfg.rotate_ns : (int64_t)(s * 1e9);
}

static void adopt(struct ic_logfile *f, int fd)
{
    struct stat st;
    int old = atomic_load(&f->fd);

    f->regular = fstat(fd, &st) == 0 && S_ISREG(st.st_mode);
    f->size = f->regular ? st.st_size : 0;
    f->torn = f->stuck = false;
    f->begun_ns = f->cfg.now_ns() - (f->size ? age_of(f, fd) : 0);
    atomic_store(&f->fd, fd);
    if (old >= 0)
        close(old);
}

enum ic_status ic_logfile_open(struct ic_logfile **out, const struct ic_logfile_config *cfg,
                               struct ic_err *err)
{
    struct ic_logfile *f;
    const char *slash = strrchr(cfg->path, '/');

    *out = NULL;
    if (strlen(cfg->path) > IC_LOGFILE_PATH_MAX)
        return ic_fail(err, IC_BAD_REQUEST, "the log file's path is longer than %d bytes",
                       IC_LOGFILE_PATH_MAX);
    if (cfg->rotate_bytes <= 0 || cfg->total_bytes / 3 < cfg->rotate_bytes)
        return ic_fail(err, IC_BAD_REQUEST,
                       "all log files together need at least three times what one may have");
    if (!(f = calloc(1, sizeof *f)))
        return ic_fail(err, IC_OOM, "out of memory");
    f->cfg = *cfg;
    strcpy(f->path, cfg->path);
    f->dir_len = slash ? (size_t)(slash - cfg->path) + 1 : 0;
    f->cfg.path = f->path;
    f->cfg.write = cfg->write ? cfg->write : write;
    f->cfg.now_ns = cfg->now_ns ? cfg->now_ns : real_now;
    f->cfg.wall_s = cfg->wall_s ? cfg->wall_s : ic_wall_s;
    f->in = -1;
    atomic_store(&f->fd, -1);
    int fd = open_path(f, 0);
    if (fd < 0) {
        ic_fail(err, IC_NOT_FOUND, "log file %s: %s", f->path, strerror(errno));
        free(f);
        return err->code;
    }
    adopt(f, fd);
    if (f->regular) {
        sweep(f);
        prune(f);
    }
    *out = f;
    return IC_OK;
}

void ic_logfile_close(struct ic_logfile **fp)
{
    struct ic_logfile *f = *fp;

    if (!f)
        return;
    stop_packing(f);
    close(atomic_load(&f->fd));
    free(f);
    *fp = NULL;
}

uint64_t ic_logfile_rotations(const struct ic_logfile *f)
{
    return atomic_load(&f->rotations);
}

/* ---- rotation ---- */

static bool path_is_ours(const struct ic_logfile *f)
{
    struct stat ours, there;
    return fstat(atomic_load(&f->fd), &ours) == 0 && stat(f->path, &there) == 0 &&
           ours.st_ino == there.st_ino && ours.st_dev == there.st_dev;
}

static void reopen(void *arg)
{
    struct ic_logfile *f = arg;
    int fd = open_path(f, 0);

    if (fd < 0) {
        ic_warn("log", "the log file cannot be reopened, the old one stays in use: %s", strerror(errno));
        return;
    }
    adopt(f, fd);
    if (f->regular)
        prune(f);
}

/* Afterwards the current file is a new one, or the old one where that was impossible. */
static void rotate(struct ic_logfile *f)
{
    char name[PATH_BYTES];

    f->stuck = true;
    if (f->last >= NUMBER_MAX)
        return;
    if (path_is_ours(f)) { /* else somebody has moved it: a new one is all that is needed */
        name_of(f, f->last + 1, PLAIN, name);
        if (access(name, F_OK) == 0) {
            f->last++; /* taken meanwhile */
            return;
        }
        if (rename(f->path, name) != 0)
            return;
        int fd = open_path(f, O_EXCL);
        if (fd < 0) {
            if (rename(name, f->path) != 0)
                f->last++; /* it stays there, and is gone on with under that name */
            return;
        }
        f->last++;
        adopt(f, fd);
    } else {
        int fd = open_path(f, 0);
        if (fd < 0)
            return;
        adopt(f, fd);
    }
    atomic_fetch_add(&f->rotations, 1);
    prune(f);
}

static bool rotation_due(const struct ic_logfile *f, size_t len)
{
    if (!f->regular || f->size == 0)
        return false;
    return f->size + (int64_t)len > f->cfg.rotate_bytes ||
           (f->cfg.rotate_ns && f->cfg.now_ns() - f->begun_ns >= f->cfg.rotate_ns);
}

/* ---- writing ---- */

/* Writes up to an error; returns the bytes written, *why: 0 or errno. */
static size_t write_some(struct ic_logfile *f, const char *p, size_t len, int *why)
{
    int fd = atomic_load(&f->fd);
    bool waited = false;
    size_t done = 0;

    *why = 0;
    while (done < len && !*why) {
        ssize_t n = f->cfg.write(fd, p + done, len - done);
        if (n > 0) {
            done += (size_t)n;
            continue;
        }
        if (n < 0 && errno == EINTR)
            continue;
        *why = n == 0 ? ENOSPC : errno;
        if (*why == EAGAIN && !waited) {
            struct pollfd pfd = {.fd = fd, .events = POLLOUT};
            waited = true;
            *why = poll(&pfd, 1, FULL_PIPE_MS) == 1 ? 0 : EAGAIN;
        }
    }
    f->size += (int64_t)done;
    return done;
}

/* Takes back the last `n` bytes, the beginning of a line. */
static void take_back(struct ic_logfile *f, size_t n)
{
    struct stat st;
    int fd = atomic_load(&f->fd);

    f->torn = n > 0;
    if (!n || !f->regular || fstat(fd, &st) != 0 ||
        st.st_size != f->size) /* somebody else has cut or added to it */
        return;
    if (ftruncate(fd, f->size - (off_t)n) == 0) {
        f->size -= (int64_t)n;
        f->torn = false;
    }
}

/* Whole lines, up to an error. */
static size_t write_lines(struct ic_logfile *f, const char *p, size_t len, int *why)
{
    size_t done, part = 0;

    if (f->torn) {
        if (write_some(f, "\n", 1, why) != 1)
            return 0;
        f->torn = false;
    }
    done = write_some(f, p, len, why);
    if (done == len)
        return len;
    while (part < done && p[done - part - 1] != '\n')
        part++;
    take_back(f, part);
    return done - part;
}

static size_t write_sink(void *arg, const char *data, size_t len, int *why)
{
    struct ic_logfile *f = arg;

    if (rotation_due(f, len))
        rotate(f);
    if (f->regular && f->stuck && f->size + (int64_t)len > f->cfg.total_bytes) {
        *why = EFBIG; /* cannot be rotated, and must not grow */
        return 0;
    }
    size_t done = write_lines(f, data, len, why);
    if (*why == EFBIG && f->regular && f->size > 0) { /* a limit on the size of files: begin another one */
        rotate(f);
        done += write_lines(f, data + done, len - done, why);
    }
    return done;
}

/* ---- compression ---- */

static bool begin_packing(struct ic_logfile *f)
{
    char name[PATH_BYTES];
    unsigned n = look_around(f).plain;

    if (!n)
        return false;
    f->packing = n;
    f->in = open(name_of(f, n, PLAIN, name), O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    int fd = open(name_of(f, n, HALF, name), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0640);
    if (f->in < 0 || fd < 0 || !(f->out = gzdopen(fd, "wb6"))) {
        if (fd >= 0)
            close(fd);
        return false;
    }
    return true;
}

static bool end_packing(struct ic_logfile *f)
{
    char name[PATH_BYTES], half[PATH_BYTES];
    bool ok = gzclose(f->out) == Z_OK;

    f->out = NULL;
    name_of(f, f->packing, HALF, half);
    if (!ok || rename(half, name_of(f, f->packing, PACKED, name)) != 0)
        return false;
    unlink(name_of(f, f->packing, PLAIN, name));
    f->packing = 0;
    stop_packing(f);
    prune(f);
    return true;
}

/* A slice. False after an error: then the file stays as it is until something has rotated again. */
static bool pack(struct ic_logfile *f)
{
    if (!f->out && !begin_packing(f))
        return false;
    ssize_t n = read(f->in, f->slice, SLICE);
    if (n < 0)
        return errno == EINTR;
    if (n == 0)
        return end_packing(f);
    return gzwrite(f->out, f->slice, (unsigned)n) == (int)n;
}

static bool work(void *arg)
{
    struct ic_logfile *f = arg;

    if (!f->look)
        return false;
    if (!pack(f)) {
        stop_packing(f);
        f->look = false;
    }
    return f->look;
}

static int current_fd(void *arg)
{
    struct ic_logfile *f = arg;
    return atomic_load(&f->fd);
}

struct ic_log_sink ic_logfile_sink(struct ic_logfile *f)
{
    return (struct ic_log_sink){
        .arg = f, .write = write_sink, .work = work, .reopen = reopen, .fd = current_fd};
}
