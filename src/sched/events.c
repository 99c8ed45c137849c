#include "sched/events.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"

void ic_events_init(struct ic_events *q, void (*wake)(void *), void *arg)
{
    *q = (struct ic_events){.wake = wake, .wake_arg = arg};
    pthread_mutex_init(&q->lock, NULL);
    pthread_cond_init(&q->room, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&q->done, &attr);
    pthread_condattr_destroy(&attr);
    q->tail = &q->head;
}

static void put(struct ic_events *q, struct ic_event *ev, bool wake)
{
    pthread_mutex_lock(&q->lock);
    while (q->count >= IC_EVENTS_MAX && !q->closed)
        pthread_cond_wait(&q->room, &q->lock);
    if (q->closed) {
        pthread_mutex_unlock(&q->lock);
        ic_event_free(ev);
        return;
    }
    bool was_empty = q->count++ == 0;
    q->put++;
    ev->next = NULL;
    *q->tail = ev;
    q->tail = &ev->next;
    pthread_mutex_unlock(&q->lock);
    if (was_empty && wake)
        q->wake(q->wake_arg);
}

void ic_events_put(struct ic_events *q, struct ic_event *ev)
{
    put(q, ev, true);
}

void ic_events_put_later(struct ic_events *q, struct ic_event *ev)
{
    put(q, ev, false);
}

void ic_events_lost(struct ic_events *q, const struct ic_lost *lost)
{
    pthread_mutex_lock(&q->lock);
    while (q->n_lost >= IC_EVENTS_LOST_MAX && !q->closed)
        pthread_cond_wait(&q->room, &q->lock);
    const bool closed = q->closed;
    if (!closed)
        q->lost[q->n_lost++] = *lost;
    pthread_mutex_unlock(&q->lock);
    if (!closed)
        q->wake(q->wake_arg);
}

unsigned ic_events_take_lost(struct ic_events *q, struct ic_lost out[IC_EVENTS_LOST_MAX])
{
    pthread_mutex_lock(&q->lock);
    unsigned n = q->n_lost;
    if (n)
        memcpy(out, q->lost, n * sizeof *out);
    q->n_lost = 0;
    if (n == IC_EVENTS_LOST_MAX)
        pthread_cond_broadcast(&q->room);
    pthread_mutex_unlock(&q->lock);
    return n;
}

void ic_events_offer(struct ic_events *q)
{
    pthread_mutex_lock(&q->lock);
    bool any = q->count > 0;
    pthread_mutex_unlock(&q->lock);
    if (any && !(q->turn && q->turn(q->wake_arg)))
        q->wake(q->wake_arg);
}

struct ic_event *ic_events_take(struct ic_events *q)
{
    pthread_mutex_lock(&q->lock);
    struct ic_event *list = q->head;
    q->head = NULL;
    q->tail = &q->head;
    if (q->count >= IC_EVENTS_MAX)
        pthread_cond_broadcast(&q->room);
    q->count = 0;
    q->taken = q->put;
    pthread_mutex_unlock(&q->lock);
    return list;
}

struct ic_event *ic_events_take_tokens(struct ic_events *q, bool *rest)
{
    pthread_mutex_lock(&q->lock);
    struct ic_event *list = NULL, **end = &list;
    unsigned n = 0;
    for (; q->head && q->head->kind == IC_EVENT_TOKEN; n++) {
        *end = q->head;
        end = &q->head->next;
        q->head = *end;
    }
    *end = NULL;
    if (!q->head)
        q->tail = &q->head;
    if (n && q->count >= IC_EVENTS_MAX)
        pthread_cond_broadcast(&q->room);
    q->count -= n;
    q->taken += n;
    *rest = q->count > 0;
    pthread_mutex_unlock(&q->lock);
    return list;
}

void ic_events_written(struct ic_events *q)
{
    pthread_mutex_lock(&q->lock);
    q->written = q->taken;
    if (q->waiters)
        pthread_cond_broadcast(&q->done);
    pthread_mutex_unlock(&q->lock);
}

void ic_events_hand_over(struct ic_events *q, int64_t limit_ns)
{
    ic_events_offer(q);
    int64_t until = ic_now_ns() + limit_ns;
    struct timespec ts = {(time_t)(until / 1000000000), (long)(until % 1000000000)};

    pthread_mutex_lock(&q->lock);
    uint64_t mine = q->put;
    q->waiters++;
    while (q->written < mine && !q->closed)
        if (pthread_cond_timedwait(&q->done, &q->lock, &ts))
            break;
    q->waiters--;
    pthread_mutex_unlock(&q->lock);
}

void ic_events_close(struct ic_events *q)
{
    pthread_mutex_lock(&q->lock);
    q->closed = true;
    pthread_cond_broadcast(&q->room);
    pthread_cond_broadcast(&q->done);
    pthread_mutex_unlock(&q->lock);
}

void ic_events_deinit(struct ic_events *q)
{
    for (struct ic_event *ev = ic_events_take(q), *next; ev; ev = next) {
        next = ev->next;
        ic_event_free(ev);
    }
    pthread_mutex_destroy(&q->lock);
    pthread_cond_destroy(&q->room);
    pthread_cond_destroy(&q->done);
}
