/* How many threads compute, decided anew while the server runs.
 *
 * ggml's threads wait for each other by spinning, about a thousand times per token. When another process
 * takes one of their cores, all the others spin until the lost one has run: 2 threads on 2 cores of which
 * one is busy are half as fast as 1 thread, 3 threads on 2 cores up to a hundred times slower. The count
 * that was right at the start is wrong as soon as somebody else starts to compute.
 *
 *   fewer: over a window of decodes the process got clearly less CPU time than threads x wall time. The
 * cores it did not get are somebody else's. more:  others have left a whole core alone for a while. They
 * are measured rather than tried, as one decode with a thread too many can take a second. But whoever uses
 * a core that we leave might yield it (a lower priority), so now and then one thread more is tried all the
 * same. Each step up that had to be taken back doubles the wait for the next.
 *
 * Pure decisions over numbers given to it; one thread. */
#ifndef IC_TEXT_THREADS_H
#define IC_TEXT_THREADS_H

#include <stdbool.h>
#include <stdint.h>

struct ic_threads {
    int32_t now, max;
    /* the window of decodes under way */
    int64_t wall_ns, cpu_ns;
    bool suspect; /* the window before it was bad */
    /* waiting to go up */
    int64_t hold_ns;    /* how long others must have left a core alone */
    int64_t free_ns;    /* since when they have; 0: they do not */
    int64_t up_ns;      /* the last step up; 0: none, or it has proved right */
    int64_t changed_ns; /* the last step up or down */
};

/* Never grows past `max`, the cores there are; `start` may be more, when somebody wants it so. */
void ic_threads_init(struct ic_threads *t, int32_t start, int32_t max);

/* A decode took `wall` during which the process used `cpu` (both ns); it ended at `now`. True: t->now has
 * changed. */
bool ic_threads_decoded(struct ic_threads *t, int64_t wall, int64_t cpu, int64_t now);

/* Whether it is worth measuring what others use. */
bool ic_threads_may_grow(const struct ic_threads *t);
/* Others used `cores` of our max cores over the last while (less than a second). True: t->now has changed.
 */
bool ic_threads_others(struct ic_threads *t, double cores, int64_t now);

#endif
