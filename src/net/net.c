/* The network layer's frame: opening, the loop, waking it, closing. See net_i.h for how it is divided.
 *
 * Thread: the loop, but ic_net_wake and ic_net_stop, which only set an atomic flag and write to lws'
 * event descriptor (lws_cancel_service), so a signal handler may call ic_net_stop; and ic_net_turn, which
 * does the loop's work while that waits. Every entry from lws has `turn` locked.
 *
 * Every entry from lws ends in conn_settle_all: what an app callback queued is written before poll is
 * called again. A wake-up thus costs one eventfd write, one poll return, one send. */
#include "net/net.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "net/net_i.h"

#define TICK_MIN_MS 100
#define FDS_BESIDE 256 /* model files, GPUs, logs, the lobby … */
#define FDS_LWS 4096   /* above what connections take: nothing else opens so many */

/* ---- what lws tells us ---- */

static int on_rx(struct lws *wsi, void *in, size_t len)
{
    struct conn *c = lws_get_opaque_user_data(wsi);
    if (!c)
        return -1; /* freed already: lws closes it */
    struct ic_net *n = c->net;
    conn_check(c);
    if (!c->got_bytes) /* lws limits the TLS handshake, and does not take the limit off in the raw role */
        lws_set_timeout(wsi, NO_PENDING_TIMEOUT, 0);
    conn_rx(c, in, len);
    conn_settle_all(n);
    return 0;
}

static void on_writable(struct lws *wsi)
{
    struct conn *c = lws_get_opaque_user_data(wsi);
    if (!c)
        return;
    struct ic_net *n = c->net;
    conn_touch(c);
    conn_settle_all(n);
}

/* The socket is gone. Comes up to three times for one wsi, and before RAW_ADOPT for failed ones. */
static void on_gone(struct lws *wsi)
{
    struct conn *c = lws_get_opaque_user_data(wsi);
    if (!c)
        return;
    struct ic_net *n = c->net;
    lws_set_opaque_user_data(wsi, NULL);
    c->wsi = NULL;
    conn_free(c);
    conn_settle_all(n);
}

static void on_cancelled(struct lws *wsi)
{
    struct ic_net *n = lws_context_user(lws_get_context(wsi));
    if (!atomic_exchange(&n->wake, false) || n->closing)
        return;
    n->app->on_wake(n->arg);
    conn_settle_all(n);
    n->app->on_settled(n->arg);
}

static int net_event(struct lws *wsi, enum lws_callback_reasons why, void *in, size_t len)
{
    switch (why) {
    case LWS_CALLBACK_RAW_RX: return on_rx(wsi, in, len);
    case LWS_CALLBACK_RAW_WRITEABLE: on_writable(wsi); break;
    case LWS_CALLBACK_RAW_CLOSE:
    case LWS_CALLBACK_RAW_SKT_DROP_PROTOCOL:
    case LWS_CALLBACK_WSI_DESTROY:
        if (lws_get_context(wsi) && lws_get_opaque_user_data(wsi))
            on_gone(wsi);
        break;
    case LWS_CALLBACK_EVENT_WAIT_CANCELLED: on_cancelled(wsi); break;
    default: break;
    }
    return 0;
}

static int net_callback(struct lws *wsi, enum lws_callback_reasons why, void *user, void *in, size_t len)
{
    struct lws_context *ctx = wsi ? lws_get_context(wsi) : NULL;
    struct ic_net *n = ctx ? lws_context_user(ctx) : NULL;
    (void)user;
    if (!n)
        return net_event(wsi, why, in, len);
    pthread_mutex_lock(&n->turn);
    int rc = net_event(wsi, why, in, len);
    pthread_mutex_unlock(&n->turn);
    return rc;
}

/* Sources have a protocol of their own, so that their opaque pointer is never taken for a conn. */
static int source_callback(struct lws *wsi, enum lws_callback_reasons why, void *user, void *in, size_t len)
{
    (void)user;
    (void)in;
    (void)len;
    struct source *s = wsi ? lws_get_opaque_user_data(wsi) : NULL;
    if (why == LWS_CALLBACK_RAW_RX_FILE && s) {
        pthread_mutex_lock(&s->net->turn);
        s->ready(s);
        conn_settle_all(s->net);
        pthread_mutex_unlock(&s->net->turn);
    } else if (why == LWS_CALLBACK_RAW_CLOSE_FILE && s) {
        s->wsi = NULL;
        s->fd = -1; /* lws closes it */
        lws_set_opaque_user_data(wsi,
                                 NULL); /* WSI_DESTROY goes to the first protocol, whosever the wsi is */
    }
    return 0;
}

static const struct lws_protocols protocols[] = {
    {.name = "ic", .callback = net_callback, .rx_buffer_size = IC_NET_RX, .tx_packet_size = IC_NET_TX_TLS},
    {.name = "ic-source", .callback = source_callback},
    {0},
};

static void on_lws_log(int level, const char *line)
{
    size_t len = strcspn(line, "\n");
    enum ic_log_level to = level & LLL_ERR ? IC_LOG_ERROR : level & LLL_WARN ? IC_LOG_WARN : IC_LOG_DEBUG;
    ic_log(to, "net", "%.*s", (int)(len > 1000 ? 1000 : len), line);
}

/* A timer of the kernel's, not one of lws': that one counts in whole milliseconds while it waits, and spins
 * for the rest. Set anew at each tick and when something falls due before it. */
void net_tick_by(struct ic_net *n, int64_t at_ns)
{
    if (at_ns >= n->tick_ns)
        return;
    n->tick_ns = at_ns;
    struct itimerspec at = {.it_value = {(time_t)(at_ns / (1000 * IC_MS)), (long)(at_ns % (1000 * IC_MS))}};
    timerfd_settime(n->ticker.fd, TFD_TIMER_ABSTIME, &at, NULL);
}

static void on_tick(struct source *s)
{
    struct ic_net *n = s->net;
    uint64_t expired;
    if (read(s->fd, &expired, sizeof expired) != sizeof expired || n->closing)
        return;
    conn_were_away(n, ic_now_ns() - n->tick_ns);
    n->tick_ns = INT64_MAX;
    int64_t due = conn_tick(n), floor = ic_now_ns() + TICK_MIN_MS * IC_MS;
    ic_listen_pause(n, false);
    n->app->on_tick(n->arg);
    net_tick_by(n, ic_now_ns() + (n->busy_ticks ? TICK_MIN_MS : IC_NET_TICK_MS) * IC_MS);
    net_tick_by(n, due < floor ? floor : due);
}

/* ---- opening ---- */

static void raise_fd_limit(unsigned want)
{
    struct rlimit rl;
    if (getrlimit(RLIMIT_NOFILE, &rl) || rl.rlim_cur >= want)
        return;
    rl.rlim_cur = rl.rlim_max < want ? rl.rlim_max : want;
    if (setrlimit(RLIMIT_NOFILE, &rl) || rl.rlim_cur < want)
        ic_warn("net", "only %llu file descriptors are allowed, %u connections may need %u",
                (unsigned long long)rl.rlim_cur, want - FDS_BESIDE, want);
}

static bool open_tables(struct ic_net *n)
{
    n->slot_count = n->cfg->connections_max + IC_NET_LOBBY;
    n->slots = calloc(n->slot_count, sizeof *n->slots);
    n->due = calloc(n->slot_count, sizeof *n->due);
    n->gens = calloc(n->slot_count, sizeof *n->gens);
    n->free_slots = calloc(n->cfg->connections_max, sizeof *n->free_slots);
    n->free_lobby = calloc(IC_NET_LOBBY, sizeof *n->free_lobby);
    n->rx = malloc(IC_NET_RX);
    n->tx = malloc(LWS_PRE + IC_NET_TX_TLS);
    if (!n->slots || !n->due || !n->gens || !n->free_slots || !n->free_lobby || !n->rx || !n->tx ||
        n->poller.fd < 0 || n->ticker.fd < 0)
        return false;
    for (unsigned i = n->slot_count; i > n->cfg->connections_max; i--)
        n->free_lobby[n->lobby_count++] = i - 1;
    for (unsigned i = n->cfg->connections_max; i > 0; i--) /* low slots are given out first */
        n->free_slots[n->free_count++] = i - 1;
    return true;
}

static enum ic_status check_files(const struct ic_net_config *cfg, struct ic_err *err)
{
    if (!cfg->tls_cert != !cfg->tls_key)
        return ic_fail(err, IC_BAD_REQUEST, "TLS needs both a certificate and a key");
    if (cfg->tls_cert && access(cfg->tls_cert, R_OK))
        return ic_fail(err, IC_NOT_FOUND, "cannot read the TLS certificate %s", cfg->tls_cert);
    struct stat root;
    if (cfg->web_root && (stat(cfg->web_root, &root) || !S_ISDIR(root.st_mode)))
        return ic_fail(err, IC_NOT_FOUND, "the folder to serve, %s, is not there", cfg->web_root);
    if (cfg->tls_key && access(cfg->tls_key, R_OK))
        return ic_fail(err, IC_NOT_FOUND, "cannot read the TLS key %s", cfg->tls_key);
    return IC_OK;
}

/* lws allots and clears 16 bytes for each descriptor the limit allows; containers often allow a million or
 * a billion. The limit is lowered while it looks. TLS sockets stay below it, for descriptors are given
 * out lowest first. */
static struct lws_context *create_context(const struct lws_context_creation_info *info, unsigned fds)
{
    struct rlimit was = {0}, low;
    bool lower = !getrlimit(RLIMIT_NOFILE, &was) && was.rlim_cur > fds;
    low = was;
    low.rlim_cur = fds;
    if (lower)
        lower = !setrlimit(RLIMIT_NOFILE, &low);
    struct lws_context *ctx = lws_create_context(info);
    if (lower)
        setrlimit(RLIMIT_NOFILE, &was);
    return ctx;
}

static enum ic_status open_lws(struct ic_net *n, struct ic_err *err)
{
    bool debug = ic_log_enabled(IC_LOG_DEBUG, "net");
    lws_set_log_level(LLL_ERR | LLL_WARN | (debug ? LLL_NOTICE : 0), on_lws_log);
    struct lws_context_creation_info info = {
        .port = CONTEXT_PORT_NO_LISTEN,
        .protocols = protocols,
        .options = LWS_SERVER_OPTION_EXPLICIT_VHOSTS,
        .user = n,
        .pt_serv_buf_size = IC_NET_RX,
        .timeout_secs = n->cfg->request_s ? n->cfg->request_s : 1,
        .gid = -1,
        .uid = -1,
    };
    if (n->cfg->tls_cert)
        info.options |= LWS_SERVER_OPTION_DO_SSL_GLOBAL_INIT;
    n->ctx = create_context(&info, n->cfg->connections_max + FDS_LWS);
    if (!n->ctx)
        return ic_fail(err, IC_INTERNAL, "the network library did not start");
    info.port = CONTEXT_PORT_NO_LISTEN_SERVER;
    info.vhost_name = "ic";
    if (n->cfg->tls_cert) {
        info.options |= LWS_SERVER_OPTION_CREATE_VHOST_SSL_CTX;
        info.ssl_cert_filepath = n->cfg->tls_cert;
        info.ssl_private_key_filepath = n->cfg->tls_key;
        info.alpn = "http/1.1"; /* lws would offer h2, which nothing here speaks */
    }
    n->vhost = lws_create_vhost(n->ctx, &info);
    if (!n->vhost)
        return n->cfg->tls_cert
                   ? ic_fail(err, IC_NOT_FOUND, "TLS certificate %s and key %s do not work together",
                             n->cfg->tls_cert, n->cfg->tls_key)
                   : ic_fail(err, IC_INTERNAL, "the network library did not start");
    return IC_OK;
}

static enum ic_status adopt_source(struct ic_net *n, struct source *src, struct ic_err *err)
{
    lws_adopt_desc_t d = {.vh = n->vhost,
                          .type = LWS_ADOPT_RAW_FILE_DESC,
                          .fd.filefd = src->fd,
                          .vh_prot_name = "ic-source",
                          .opaque = src};
    src->wsi = lws_adopt_descriptor_vhost_via_info(&d);
    if (src->wsi)
        return IC_OK;
    src->fd = -1; /* lws closed it */
    return ic_fail(err, IC_INTERNAL, "the network library refused a descriptor");
}

static enum ic_status adopt_sources(struct ic_net *n, struct ic_err *err)
{
    enum ic_status st = adopt_source(n, &n->poller, err);
    if (!st)
        st = adopt_source(n, &n->ticker, err);
    for (unsigned i = 0; !st && i < n->listener_count; i++)
        st = adopt_source(n, &n->listeners[i], err);
    return st;
}

enum ic_status ic_net_open(struct ic_net **out, const struct ic_net_config *cfg,
                           const struct ic_peer_app *app, void *app_arg, struct ic_err *err)
{
    *out = NULL;
    struct ic_net *n = calloc(1, sizeof *n);
    if (!n)
        return ic_fail(err, IC_OOM, "no memory for the network");
    pthread_mutexattr_t recursive;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&n->turn, &recursive);
    pthread_mutexattr_destroy(&recursive);
    n->cfg_copy = *cfg;
    n->cfg = &n->cfg_copy;
    n->app = app;
    n->arg = app_arg;
    n->spare_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    n->poller = (struct source){.net = n, .fd = epoll_create1(EPOLL_CLOEXEC), .ready = plain_ready};
    n->ticker = (struct source){
        .net = n, .fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC), .ready = on_tick};
    n->tick_ns = INT64_MAX;
    net_tick_by(n, ic_now_ns() + IC_NET_TICK_MS * IC_MS);
    raise_fd_limit(cfg->connections_max + FDS_BESIDE);
    enum ic_status st =
        open_tables(n) ? check_files(cfg, err) : ic_fail(err, IC_OOM, "no memory for connections");
    if (!st)
        st = ic_listen(n, err);
    if (!st)
        st = open_lws(n, err);
    if (!st)
        st = adopt_sources(n, err);
    if (st) {
        ic_net_close(&n);
        return st;
    }
    *out = n;
    return IC_OK;
}

int ic_net_port(const struct ic_net *n)
{
    return n->port;
}

/* ---- running ---- */

void ic_net_run(struct ic_net *n)
{
    while (!atomic_load(&n->stop))
        if (lws_service(n->ctx, 0) < 0) {
            ic_error("net", "the event loop failed");
            break;
        }
}

void ic_net_wake(struct ic_net *n)
{
    if (!atomic_exchange(&n->wake, true))
        lws_cancel_service(n->ctx);
}

bool ic_net_turn(struct ic_net *n)
{
    if (n->cfg->tls_cert || pthread_mutex_trylock(&n->turn))
        return false;
    bool all = n->closing || n->app->on_turn(n->arg);
    conn_settle_all(n);
    if (!n->closing)
        n->app->on_settled(n->arg);
    pthread_mutex_unlock(&n->turn);
    return all;
}

void ic_net_stop(struct ic_net *n)
{
    atomic_store(&n->stop, true);
    lws_cancel_service(n->ctx);
}

unsigned ic_net_peers(const struct ic_net *n)
{
    return n->used;
}

struct ic_peer *ic_net_peer(struct ic_net *n, struct ic_peer_id id)
{
    struct conn *c = id.slot < n->slot_count ? n->slots[id.slot] : NULL;
    return c && c->app_live && id.gen && c->peer.id.gen == id.gen ? &c->peer : NULL;
}

/* ---- closing ---- */

void ic_net_stop_accepting(struct ic_net *n)
{
    n->busy_ticks = true; /* the app is waiting for an end */
    net_tick_by(n, ic_now_ns() + TICK_MIN_MS * IC_MS);
    for (unsigned i = 0; i < n->listener_count; i++) {
        struct source *l = &n->listeners[i];
        if (!l->wsi)
            continue;
        shutdown(l->fd, SHUT_RDWR); /* at once; lws closes the descriptor a moment later */
        lws_set_timeout(l->wsi, PENDING_TIMEOUT_USER_OK, LWS_TO_KILL_ASYNC);
    }
}

void ic_net_close_all(struct ic_net *n, uint16_t code, const char *reason)
{
    n->draining = true;
    for (unsigned i = 0; i < n->slot_count; i++) {
        struct conn *c = n->slots[i];
        if (c && c->state == C_OPEN)
            ws_close(&c->peer, code, reason);
        else if (c && c->state == C_HEAD && !c->http.head.len) /* between requests */
            conn_dead(c);
    }
}

void ic_net_close(struct ic_net **np)
{
    struct ic_net *n = np ? *np : NULL;
    if (!n)
        return;
    n->closing = true;
    for (unsigned i = 0; i < n->slot_count && n->slots; i++)
        if (n->slots[i])
            conn_free(n->slots[i]);
    if (n->ctx)
        lws_context_destroy(n->ctx);
    for (unsigned i = 0; i < n->listener_count; i++)
        if (n->listeners[i].fd >= 0)
            close(n->listeners[i].fd);
    if (n->poller.fd >= 0)
        close(n->poller.fd);
    if (n->ticker.fd >= 0)
        close(n->ticker.fd);
    if (n->spare_fd >= 0)
        close(n->spare_fd);
    free(n->slots);
    free(n->due);
    free(n->gens);
    free(n->free_slots);
    free(n->free_lobby);
    free(n->rx);
    free(n->tx);
    pthread_mutex_destroy(&n->turn);
    free(n);
    *np = NULL;
}
