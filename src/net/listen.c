/* Listening sockets: binding exclusively, and accepting.
 *
 * The sockets are made here and handed to lws as descriptors it knows nothing about: lws' own listener sets
 * SO_REUSEPORT in some builds, reports a taken port only in its log, and offers no place to refuse a
 * connection politely. SO_REUSEADDR lets a restart bind over connections in TIME_WAIT; on Linux it never
 * lets two processes listen on one port.
 *
 * A name such as "localhost" may stand for several addresses; all that exist here are bound, on one port.
 *
 * Thread: the loop. Owner of a listening fd: listen.c until adopted, then lws. */
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "net/net_i.h"

#define ACCEPTS_AT_ONCE 64

static int port_of(int fd)
{
    struct sockaddr_storage ss;
    socklen_t len = sizeof ss;
    if (getsockname(fd, (struct sockaddr *)&ss, &len))
        return 0;
    return ntohs(ss.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&ss)->sin6_port
                                          : ((struct sockaddr_in *)&ss)->sin_port);
}

/* A listening socket on the address, or -1 with errno. */
static int listen_on(const struct addrinfo *ai, int port)
{
    struct sockaddr_storage ss;
    memcpy(&ss, ai->ai_addr, ai->ai_addrlen);
    if (ai->ai_family == AF_INET6)
        ((struct sockaddr_in6 *)&ss)->sin6_port = htons((uint16_t)port);
    else
        ((struct sockaddr_in *)&ss)->sin_port = htons((uint16_t)port);
    int fd = socket(ai->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    int on = 1, off = 0;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (ai->ai_family == AF_INET6) { /* "::" is to serve IPv4 too, unless the system cannot */
        bool any = IN6_IS_ADDR_UNSPECIFIED(&((struct sockaddr_in6 *)&ss)->sin6_addr);
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, any ? &off : &on, sizeof on);
    }
    if (bind(fd, (struct sockaddr *)&ss, ai->ai_addrlen) || listen(fd, 1024)) {
        int e = errno;
        close(fd);
        errno = e;
        return -1;
    }
    return fd;
}

static enum ic_status bind_failed(const struct ic_net_config *cfg, const char *host, int e,
                                  struct ic_err *err)
{
    if (e == EADDRINUSE)
        return ic_fail(err, IC_BUSY, "port %d on %s is in use", cfg->port, host);
    if (e == EACCES)
        return ic_fail(err, IC_BAD_REQUEST, "not permitted to listen on port %d of %s", cfg->port, host);
    return ic_fail(err, IC_BAD_REQUEST, "cannot listen on port %d of %s: %s", cfg->port, host, strerror(e));
}

static enum ic_status bind_all(struct ic_net *n, const char *host, const struct addrinfo *list,
                               struct ic_err *err)
{
    int skipped = 0;
    for (const struct addrinfo *ai = list; ai && n->listener_count < IC_NET_LISTEN_MAX; ai = ai->ai_next) {
        if (ai->ai_family != AF_INET && ai->ai_family != AF_INET6)
            continue;
        int fd = listen_on(ai, n->port ? n->port : n->cfg->port);
        if (fd < 0 && (errno == EADDRNOTAVAIL || errno == EAFNOSUPPORT)) {
            skipped = errno; /* a name may have an IPv6 address on a machine without IPv6 */
            continue;
        }
        if (fd < 0)
            return bind_failed(n->cfg, host, errno, err);
        n->port = port_of(fd);
        n->listeners[n->listener_count++] = (struct source){.net = n, .fd = fd, .ready = ic_accept};
    }
    return n->listener_count ? IC_OK : bind_failed(n->cfg, host, skipped ? skipped : EADDRNOTAVAIL, err);
}

static void unlisten(struct ic_net *n)
{
    for (unsigned i = 0; i < n->listener_count; i++)
        if (!n->listeners[i].wsi)
            close(n->listeners[i].fd);
    n->listener_count = 0;
    n->port = 0;
}

/* Binds everything the host stands for; lws gets the descriptors in ic_listen_adopt. */
enum ic_status ic_listen(struct ic_net *n, struct ic_err *err)
{
    char host[256];
    const char *h = n->cfg->host && *n->cfg->host ? n->cfg->host : "127.0.0.1";
    size_t len = strlen(h);
    bool brackets = *h == '[' && h[len - 1] == ']';
    if (n->cfg->port < 0 || n->cfg->port > 65535)
        return ic_fail(err, IC_BAD_REQUEST, "port %d is not between 0 and 65535", n->cfg->port);
    if (len >= sizeof host)
        return ic_fail(err, IC_BAD_REQUEST, "the address to listen on is too long");
    snprintf(host, sizeof host, "%.*s", (int)(brackets ? len - 2 : len), brackets ? h + 1 : h);
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *list = NULL;
    int r = getaddrinfo(host, NULL, &hints, &list);
    if (r)
        return ic_fail(err, IC_BAD_REQUEST, "no address \"%s\": %s", host, gai_strerror(r));
    enum ic_status st = IC_OK;
    for (int i = 0; i < 8; i++) { /* port 0: the one the first address got may be taken on the second */
        st = bind_all(n, host, list, err);
        if (!st)
            break;
        unlisten(n);
        if (n->cfg->port || st != IC_BUSY)
            break;
    }
    freeaddrinfo(list);
    return st;
}

/* ---- accepting ---- */

static void set_options(int fd)
{
    int on = 1, unsent = 128 << 10;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    /* The kernel would take megabytes for a client that does not read; its backlog belongs into our
     * outbox, which is bounded and can drop old frames. */
    setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof unsent);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
}

static void adopt(struct ic_net *n, int fd)
{
    struct conn *c = conn_new(n, fd);
    if (!c) { /* the lobby is full, too */
        close(fd);
        return;
    }
    set_options(fd);
    if (!n->cfg->tls_cert) {
        if (!plain_add(c))
            conn_free(c);
        return;
    }
    uint32_t slot = c->peer.id.slot;
    lws_adopt_desc_t d = {
        .vh = n->vhost,
        .type = LWS_ADOPT_SOCKET | LWS_ADOPT_ALLOW_SSL,
        .fd.sockfd = fd,
        .vh_prot_name = "ic",
        .opaque = c,
    };
    struct lws *wsi = lws_adopt_descriptor_vhost_via_info(&d);
    if (n->slots[slot] != c) /* lws closed it and told so */
        return;
    if (wsi)
        c->wsi = wsi;
    else
        conn_free(c);
}

/* No descriptor is left: the waiting connection has to be taken and closed, else poll reports it for ever. False: even
 * that did not go. */
static bool refuse_one(struct ic_net *n, int listen_fd)
{
    close(n->spare_fd);
    int fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC);
    if (fd >= 0)
        close(fd);
    n->spare_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    ic_warn("net", fd >= 0 ? "out of file descriptors: a connection was refused"
                           : "out of file descriptors: a connection has to wait");
    return fd >= 0;
}

void ic_listen_pause(struct ic_net *n, bool pause)
{
    for (unsigned i = 0; i < n->listener_count && n->listen_paused != pause; i++)
        if (n->listeners[i].wsi)
            lws_rx_flow_control(n->listeners[i].wsi, !pause);
    n->listen_paused = pause;
}

void ic_accept(struct source *l)
{
    for (int i = 0; i < ACCEPTS_AT_ONCE; i++) {
        int fd = accept4(l->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            const bool no_fds = errno == EMFILE || errno == ENFILE,
                       no_room = errno == ENOBUFS || errno == ENOMEM;
            if (no_room || (no_fds && !refuse_one(l->net, l->fd)))
                /* until the next tick: it would be reported at once, and for ever */
                ic_listen_pause(l->net, true);
            return;
        }
        if (l->net->draining)
            close(fd);
        else
            adopt(l->net, fd);
    }
}
