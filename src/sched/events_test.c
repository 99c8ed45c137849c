/* The event queue between threads: order kept, bounded, nobody left waiting. Meant for TSan too. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>
#include <cmocka.h>

#include "sched/events.h"

#define PRODUCERS 3
#define EACH (3 * IC_EVENTS_MAX / 2) /* more than fits, so producers have to wait */

struct shared {
    struct ic_events q;
    atomic_int wakes, put, done;
};

static void on_wake(void *arg)
{
    atomic_fetch_add(&((struct shared *)arg)->wakes, 1);
}

static struct ic_event *event(uint64_t owner, int32_t index)
{
    struct ic_event *ev = calloc(1, sizeof *ev + 1);
    assert_non_null(ev);
    ev->owner = owner;
    ev->index = index;
    return ev;
}

static struct ic_event *token(uint64_t owner, int32_t index)
{
    struct ic_event *ev = event(owner, index);
    ev->kind = IC_EVENT_TOKEN;
    return ev;
}

struct producer {
    struct shared *s;
    uint64_t id;
};

static void *produce(void *arg)
{
    struct producer *p = arg;
    for (int32_t i = 0; i < EACH; i++) {
        ic_events_put(&p->s->q, event(p->id, i));
        atomic_fetch_add(&p->s->put, 1);
    }
    atomic_fetch_add(&p->s->done, 1);
    return NULL;
}

static void oldest_first_and_woken_once(void **state)
{
    struct shared s = {0};

    (void)state;
    ic_events_init(&s.q, on_wake, &s);
    assert_null(ic_events_take(&s.q));
    for (int32_t i = 0; i < 3; i++)
        ic_events_put(&s.q, event(1, i));
    assert_int_equal(s.wakes, 1); /* it stopped being empty once */
    struct ic_event *ev = ic_events_take(&s.q), *next;
    for (int32_t i = 0; i < 3; i++, ev = next) {
        assert_int_equal(ev->index, i);
        next = ev->next;
        free(ev);
    }
    assert_null(ev);
    ic_events_put(&s.q, event(1, 3));
    assert_int_equal(s.wakes, 2);
    ic_events_deinit(&s.q); /* frees what nobody took */
}

static void producers_wait_and_lose_nothing(void **state)
{
    struct shared s = {0};
    struct producer p[PRODUCERS];
    pthread_t thread[PRODUCERS];
    int32_t next_of[PRODUCERS] = {0};
    int taken = 0;

    (void)state;
    ic_events_init(&s.q, on_wake, &s);
    for (unsigned i = 0; i < PRODUCERS; i++) {
        p[i] = (struct producer){&s, i};
        assert_int_equal(pthread_create(&thread[i], NULL, produce, &p[i]), 0);
    }
    while (atomic_load(&s.put) < IC_EVENTS_MAX) /* nobody takes: it fills to its bound */
        usleep(1000);
    usleep(20000);
    assert_true(atomic_load(&s.put) == IC_EVENTS_MAX && atomic_load(&s.done) == 0);
    while (taken < PRODUCERS * EACH) {
        int got = 0;
        for (struct ic_event *ev = ic_events_take(&s.q), *next; ev; ev = next) {
            next = ev->next;
            assert_int_equal(ev->index, next_of[ev->owner]++);
            got++;
            free(ev);
        }
        assert_true(got <= IC_EVENTS_MAX);
        taken += got;
        if (!got)
            usleep(100);
    }
    for (unsigned i = 0; i < PRODUCERS; i++)
        pthread_join(thread[i], NULL);
    assert_null(ic_events_take(&s.q));
    assert_true(s.wakes >= 1);
    ic_events_deinit(&s.q);
}

struct hand_over {
    struct shared *s;
    int64_t limit_ns;
};

static void *hand_over(void *arg)
{
    struct hand_over *h = arg;
    ic_events_put(&h->s->q, event(1, 0));
    ic_events_hand_over(&h->s->q, h->limit_ns);
    atomic_fetch_add(&h->s->done, 1);
    return NULL;
}

static void an_engine_hands_over_until_its_events_are_written(void **state)
{
    struct shared s = {0};
    struct hand_over h = {&s, INT64_C(3600) * 1000000000}, hasty = {&s, 1000000};
    pthread_t thread;

    (void)state;
    ic_events_init(&s.q, on_wake, &s);
    ic_events_hand_over(&s.q, h.limit_ns); /* nothing to wait for */
    assert_int_equal(pthread_create(&thread, NULL, hand_over, &h), 0);
    struct ic_event *ev;
    while (!(ev = ic_events_take(&s.q)))
        usleep(1000);
    free(ev);
    usleep(20000);
    assert_int_equal(s.done, 0);      /* taken is not written */
    ic_events_put(&s.q, event(2, 0)); /* somebody else's, later: not waited for */
    ic_events_written(&s.q);
    pthread_join(thread, NULL);
    assert_int_equal(s.done, 1);

    assert_int_equal(pthread_create(&thread, NULL, hand_over, &hasty), 0);
    pthread_join(thread, NULL); /* nobody takes: the limit lets it go */
    assert_int_equal(pthread_create(&thread, NULL, hand_over, &h), 0);
    usleep(5000);
    ic_events_close(&s.q);
    pthread_join(thread, NULL);
    assert_int_equal(s.done, 3);
    ic_events_deinit(&s.q);
}

struct turn {
    struct shared s; /* first: wake_arg of both */
    int turns, got;
    bool busy;
};

static bool take_turn(void *arg)
{
    struct turn *t = arg;
    bool rest;

    t->turns++;
    if (t->busy)
        return false;
    for (struct ic_event *ev = ic_events_take_tokens(&t->s.q, &rest), *next; ev; ev = next, t->got++) {
        next = ev->next;
        assert_true(ev->kind == IC_EVENT_TOKEN && ev->index == t->got);
        free(ev);
    }
    ic_events_written(&t->s.q);
    return !rest;
}

/* Tokens are written by the thread that made them; the loop is woken for the rest only, or when it has the turn. */
static void an_engine_writes_its_tokens(void **state)
{
    struct turn t = {0};
    struct ic_events *q = &t.s.q;
    struct ic_event *ev;

    (void)state;
    ic_events_init(q, on_wake, &t);
    ic_events_offer(q);
    assert_int_equal(t.s.wakes, 0); /* nothing to offer */
    ic_events_put_later(q, token(1, 0));
    assert_int_equal(t.s.wakes, 0);
    ic_events_offer(q); /* nobody but the loop can */
    assert_int_equal(t.s.wakes, 1);
    q->turn = take_turn;
    ic_events_put_later(q, token(1, 1));
    ic_events_hand_over(q, INT64_C(3600) * 1000000000);
    assert_true(t.got == 2 && t.turns == 1 && t.s.wakes == 1);
    ic_events_put_later(q, token(1, 2));
    ic_events_put_later(q, token(1, 3));
    ev = event(1, 4);
    ev->kind = IC_EVENT_END;
    ic_events_put_later(q, ev);
    ic_events_put_later(q, token(2, 4)); /* behind it: not before it */
    ic_events_offer(q);
    assert_true(t.got == 4 && t.s.wakes == 2);
    ic_events_offer(q); /* again, with the end at the head */
    assert_true(t.got == 4 && t.s.wakes == 3);
    ev = ic_events_take(q);
    assert_true(ev->kind == IC_EVENT_END && ev->next->kind == IC_EVENT_TOKEN && !ev->next->next);
    free(ev->next);
    free(ev);
    ic_events_written(q);
    t.busy = true;
    ic_events_put_later(q, token(1, 4));
    ic_events_hand_over(q, 1000); /* the loop is at work: it will come to it */
    assert_true(t.got == 4 && t.s.wakes == 4);
    t.busy = false;
    ic_events_offer(q);
    assert_true(t.got == 5 && t.s.wakes == 4);
    ic_events_deinit(q);
}

static void closing_lets_everybody_go(void **state)
{
    struct shared s = {0};
    struct producer p[PRODUCERS];
    pthread_t thread[PRODUCERS];
    int left = 0;

    (void)state;
    ic_events_init(&s.q, on_wake, &s);
    for (unsigned i = 0; i < PRODUCERS; i++) {
        p[i] = (struct producer){&s, i};
        assert_int_equal(pthread_create(&thread[i], NULL, produce, &p[i]), 0);
    }
    while (atomic_load(&s.put) < IC_EVENTS_MAX)
        usleep(1000);
    ic_events_close(&s.q);
    for (unsigned i = 0; i < PRODUCERS; i++)
        pthread_join(thread[i], NULL); /* hangs when one still waits */
    for (struct ic_event *ev = ic_events_take(&s.q), *next; ev; ev = next, left++) {
        next = ev->next;
        free(ev);
    }
    assert_int_equal(left, IC_EVENTS_MAX); /* what came later was thrown away */
    ic_events_put(&s.q, event(1, 1));
    assert_null(ic_events_take(&s.q));
    ic_events_deinit(&s.q);
}

/* What could not be made is told of by itself: bounded as the others are, in order, and nobody waits when all is over. */
static void *lose(void *arg)
{
    struct shared *s = arg;
    for (uint64_t i = 0; i < IC_EVENTS_LOST_MAX + 1; i++)
        ic_events_lost(&s->q, &(struct ic_lost){.owner = 1, .rid = i, .more = i % 2});
    atomic_fetch_add(&s->done, 1);
    return NULL;
}

static void what_is_lost_is_told(void **state)
{
    struct shared s = {0};
    struct ic_lost lost[IC_EVENTS_LOST_MAX];
    pthread_t t;

    (void)state;
    ic_events_init(&s.q, on_wake, &s);
    pthread_create(&t, NULL, lose, &s);
    for (uint64_t n = 0; n < IC_EVENTS_LOST_MAX + 1;)
        for (unsigned i = 0, k = ic_events_take_lost(&s.q, lost); i < k; i++, n++)
            assert_true(lost[i].owner == 1 && lost[i].rid == n && lost[i].more == n % 2);
    pthread_join(t, NULL);
    assert_true(atomic_load(&s.wakes) > 0);
    assert_int_equal(ic_events_take_lost(&s.q, lost), 0);
    pthread_create(&t, NULL, lose, &s); /* one too many: it waits */
    while (atomic_load(&s.wakes) < 2 * IC_EVENTS_LOST_MAX + 1)
        usleep(1000);
    assert_int_equal(atomic_load(&s.done), 1);
    ic_events_close(&s.q);
    pthread_join(t, NULL);
    assert_int_equal(ic_events_take_lost(&s.q, lost), IC_EVENTS_LOST_MAX);
    ic_events_deinit(&s.q);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(oldest_first_and_woken_once),
        cmocka_unit_test(producers_wait_and_lose_nothing),
        cmocka_unit_test(an_engine_hands_over_until_its_events_are_written),
        cmocka_unit_test(an_engine_writes_its_tokens),
        cmocka_unit_test(closing_lets_everybody_go),
        cmocka_unit_test(what_is_lost_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
