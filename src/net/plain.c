/* Sockets without TLS: watched by an epoll instance of our own, which lws polls as one descriptor.
 *
 * lws' loop is poll(2) over every socket. With 1000 idle connections that made the way from
 * ic_net_wake to the socket 0.17 ms long instead of 0.02, and it grows with each connection; its libev
 * plug-in takes SIGINT over and allows one context a process. TLS needs lws, plain sockets do not.
 *
 * Thread: the loop. Owner of an fd: the conn, closed in conn_free.
 * Invariant: a batch of events is settled after its last one, and conns are freed only when settling, so
 * the pointers in a batch are all alive. */
#include <errno.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "net/net_i.h"

#define EVENTS_AT_ONCE 64

bool plain_add(struct conn *c)
{
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = c};
    c->events = EPOLLIN;
    return !epoll_ctl(c->net->poller.fd, EPOLL_CTL_ADD, c->fd, &ev);
}

void plain_watch(struct conn *c)
{
    uint32_t events =
        (c->rx_paused || c->eof ? 0u : (uint32_t)EPOLLIN) | (c->out ? (uint32_t)EPOLLOUT : 0u);
    if (events == c->events)
        return;
    struct epoll_event ev = {.events = events, .data.ptr = c};
    c->events = events;
    if (epoll_ctl(c->net->poller.fd, EPOLL_CTL_MOD, c->fd, &ev))
        conn_dead(c);
}

static void readable(struct conn *c)
{
    ssize_t n = recv(c->fd, c->net->rx, IC_NET_RX, MSG_DONTWAIT);
    if (n > 0)
        conn_rx(c, c->net->rx, (size_t)n);
    else if (!n)
        conn_eof(c);
    else if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
        conn_dead(c);
}

void plain_ready(struct source *s)
{
    struct epoll_event ev[EVENTS_AT_ONCE];
    int n = epoll_wait(s->fd, ev, EVENTS_AT_ONCE, 0);
    for (int i = 0; i < n; i++) {
        struct conn *c = ev[i].data.ptr;
        conn_check(c);
        if (ev[i].events & EPOLLIN)
            readable(c);
        else if (ev[i].events & (EPOLLHUP | EPOLLERR))
            conn_dead(c);
        if (ev[i].events & EPOLLOUT)
            conn_touch(c);
    }
}
