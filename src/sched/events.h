/* The way back: events from engine threads to the loop thread. Bounded: an engine that is too far ahead waits
 * for the loop, which never waits for anything. */
#ifndef IC_SCHED_EVENTS_H
#define IC_SCHED_EVENTS_H

#include <pthread.h>

#include "sched/request.h"

#define IC_EVENTS_MAX 16384
#define IC_EVENTS_LOST_MAX 64

/* An event for which there was no memory: whose it was. */
struct ic_lost {
    uint64_t owner, rid, sim;
    bool more; /* of a request that has begun: an END is owed, too */
};

struct ic_events {
    pthread_mutex_t lock;
    pthread_cond_t room;
    struct ic_event *head, **tail;
    unsigned count;
    struct ic_lost lost[IC_EVENTS_LOST_MAX];
    unsigned n_lost;
    bool closed;
    uint64_t put, taken, written; /* events so far; for ic_events_hand_over */
    unsigned waiters;
    pthread_cond_t done;
    void (*wake)(void *); /* called when the queue stops being empty; any thread */
    /* Any thread: takes and writes the tokens at the head, in the loop's stead, where the loop waits for something to do. True:
     * all that there was. NULL: only the loop can. */
    bool (*turn)(void *);
    void *wake_arg; /* of both */
};

void ic_events_init(struct ic_events *q, void (*wake)(void *), void *arg);
/* Takes ev; blocks while IC_EVENTS_MAX are waiting, unless the queue is closed (then ev is freed). */
void ic_events_put(struct ic_events *q, struct ic_event *ev);
/* As ic_events_put, but nobody is woken: ic_events_offer or _hand_over is to follow within a millisecond. */
void ic_events_put_later(struct ic_events *q, struct ic_event *ev);
/* In place of an event that could not be made, so that nobody waits for it. Blocks while IC_EVENTS_LOST_MAX are
 * waiting. Allocates nothing. */
void ic_events_lost(struct ic_events *q, const struct ic_lost *lost);
/* The loop, after ic_events_take: those that were lost since; returns how many. */
unsigned ic_events_take_lost(struct ic_events *q, struct ic_lost out[IC_EVENTS_LOST_MAX]);
/* What waits is written from this thread if it can be (turn), else the loop is woken. */
void ic_events_offer(struct ic_events *q);
/* Detaches everything that waits, oldest first; NULL when empty. Never blocks for long. */
struct ic_event *ic_events_take(struct ic_events *q);
/* Detaches the tokens before the first event of another kind. *rest: something stays behind. */
struct ic_event *ic_events_take_tokens(struct ic_events *q, bool *rest);
/* The loop: what was taken so far has been given to its sockets, as far as they took it. */
void ic_events_written(struct ic_events *q);
/* An engine, before it keeps a core busy: offers, and waits until everything that was put has been written, at most limit_ns.
 * For machines where the loop has no core to itself, and a token would wait for the next one to be computed. */
void ic_events_hand_over(struct ic_events *q, int64_t limit_ns);
/* No more waiting, no more events: for the end of the process. */
void ic_events_close(struct ic_events *q);
void ic_events_deinit(struct ic_events *q);

#endif
