/* Turns on the CPU's cores. Both engines compute with as many threads as there are free cores; side by side
 * they would have twice as many, and spinning threads on a full machine are ruinous. So one computes at a
 * time, in the order of asking, for one decode or one batch. Any thread. */
#ifndef IC_HW_TURN_H
#define IC_HW_TURN_H

#include <pthread.h>
#include <stdint.h>

struct ic_turn {
    pthread_mutex_t lock;
    pthread_cond_t next;
    uint64_t taken, served; /* tickets */
    int64_t contended_ns;   /* when somebody last had to wait */
};

void ic_turn_init(struct ic_turn *t);
void ic_turn_deinit(struct ic_turn *t);
void ic_turn_take(struct ic_turn *t); /* NULL: no effect */
void ic_turn_give(struct ic_turn *t);
/* Whether somebody had to wait during the last `ns`. */
int ic_turn_contended(struct ic_turn *t, int64_t ns);

#endif
