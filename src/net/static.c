/* Static files of web_root, for GET and HEAD.
 *
 * The path is walked one name at a time with openat and O_NOFOLLOW: no "..", no dot files, no symbolic
 * links, so that nothing outside the folder can be named. A file is read whole: the console is a few
 * small files, and the page cache holds them. Paths that belong to the API are never looked up, so that
 * a file cannot shadow them.
 *
 * Thread: the loop. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#include "net/net_i.h"

#define FILE_MAX ((off_t)64 << 20)

static bool is_api(const char *path)
{
    static const char *const names[] = {"/health", "/ready",    "/metrics",    "/predict",
                                        "/ws",     "/tokenize", "/detokenize", "/v1"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        size_t n = strlen(names[i]);
        if (!strncmp(path, names[i], n) && (!path[n] || path[n] == '/'))
            return true;
    }
    return false;
}

static const char *type_of(const char *path)
{
    static const struct {
        const char *ext, *type;
    } table[] = {
        {"html", "text/html; charset=utf-8"},
        {"js", "text/javascript; charset=utf-8"},
        {"mjs", "text/javascript; charset=utf-8"},
        {"css", "text/css; charset=utf-8"},
        {"json", "application/json"},
        {"map", "application/json"},
        {"svg", "image/svg+xml"},
        {"png", "image/png"},
        {"jpg", "image/jpeg"},
        {"ico", "image/x-icon"},
        {"webp", "image/webp"},
        {"woff2", "font/woff2"},
        {"wasm", "application/wasm"},
        {"txt", "text/plain; charset=utf-8"},
        {"md", "text/plain; charset=utf-8"},
        {"webmanifest", "application/manifest+json"},
    };
    const char *dot = strrchr(path, '.');
    for (size_t i = 0; dot && i < sizeof table / sizeof *table; i++)
        if (!strcasecmp(dot + 1, table[i].ext))
            return table[i].type;
    return "application/octet-stream";
}

/* An open regular file below `root`, or -1. */
static int open_below(const char *root, const char *path)
{
    char name[256];
    int dir = open(root, O_PATH | O_DIRECTORY | O_CLOEXEC);
    while (dir >= 0) {
        path += strspn(path, "/");
        size_t n = strcspn(path, "/");
        int next = -1;
        if (n && n < sizeof name && *path != '.' && !memchr(path, '\\', n)) {
            memcpy(name, path, n);
            name[n] = 0;
            /* NONBLOCK: a FIFO in there must not stop the loop */
            int flags = path[n] ? O_PATH | O_DIRECTORY : O_RDONLY | O_NONBLOCK;
            next = openat(dir, name, flags | O_NOFOLLOW | O_CLOEXEC);
        }
        close(dir);
        if (next < 0 || !path[n])
            return next;
        dir = next;
        path += n;
    }
    return -1;
}

static bool read_all(int fd, char *out, size_t len)
{
    while (len) {
        ssize_t n = read(fd, out, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        out += n;
        len -= (size_t)n;
    }
    return true;
}

static bool serve_fd(struct conn *c, int fd, const char *path)
{
    struct stat st;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode) || st.st_size > FILE_MAX)
        return false;
    char etag[48], extra[160];
    snprintf(etag, sizeof etag, "\"%llx-%llx%08lx\"", (unsigned long long)st.st_size,
             (unsigned long long)st.st_mtim.tv_sec, (unsigned long)st.st_mtim.tv_nsec);
    snprintf(extra, sizeof extra,
             "ETag: %s\r\nCache-Control: no-cache\r\nX-Content-Type-Options: nosniff\r\n", etag);
    if (!strcmp(etag, c->http.req.etag)) {
        http_answer(c, 304, NULL, extra, NULL, 0);
        return true;
    }
    size_t len = (size_t)st.st_size;
    char *body = malloc(len + 1);
    if (!body || !read_all(fd, body, len)) {
        free(body);
        return false;
    }
    http_answer(c, 200, type_of(path), extra, body, len);
    free(body);
    return true;
}

bool static_serve(struct conn *c)
{
    const struct ic_req *r = &c->http.req;
    const char *root = c->net->cfg->web_root;
    if (!root || (strcmp(r->method, "GET") && !r->head) || is_api(r->path))
        return false;
    const char *path = strcmp(r->path, "/") ? r->path : "/index.html";
    int fd = open_below(root, path);
    if (fd < 0)
        return false;
    bool served = serve_fd(c, fd, path);
    close(fd);
    return served;
}
