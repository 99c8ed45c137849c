#include "hw/turn.h"

#include "base/clock.h"

void ic_turn_init(struct ic_turn *t)
{
    *t = (struct ic_turn){0};
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->next, NULL);
}

void ic_turn_deinit(struct ic_turn *t)
{
    pthread_mutex_destroy(&t->lock);
    pthread_cond_destroy(&t->next);
}

void ic_turn_take(struct ic_turn *t)
{
    if (!t)
        return;
    pthread_mutex_lock(&t->lock);
    uint64_t mine = t->taken++;
    while (t->served != mine) {
        t->contended_ns = ic_now_ns();
        pthread_cond_wait(&t->next, &t->lock);
    }
    pthread_mutex_unlock(&t->lock);
}

void ic_turn_give(struct ic_turn *t)
{
    if (!t)
        return;
    pthread_mutex_lock(&t->lock);
    t->served++;
    pthread_cond_broadcast(&t->next);
    pthread_mutex_unlock(&t->lock);
}

int ic_turn_contended(struct ic_turn *t, int64_t ns)
{
    if (!t)
        return 0;
    pthread_mutex_lock(&t->lock);
    int yes = t->contended_ns && ic_now_ns() - t->contended_ns < ns;
    pthread_mutex_unlock(&t->lock);
    return yes;
}
