#include "text/threads.h"

#include "base/clock.h"

#define WINDOW_NS                                                                                          \
    (100 * IC_MS)         /* of decoding; long enough that one wake-up of the network does not count */
#define MISSING 0.4       /* cores that we did not get: from here on they are not ours … */
#define MISSING_PART 0.03 /* … and as much of each thread, which sleep while the graph is made */
#define SEVERE 0.4        /* of all threads' time: not once more */
#define FREE 0.75         /* of a core left alone: it is ours */
#define HOLD_MIN_NS (500 * IC_MS)
#define HOLD_MAX_NS (30000 * IC_MS)
#define BLIND 10                 /* times the hold: then a core is tried though others use it */
#define PROVED_NS (5000 * IC_MS) /* a step up that lasts so long was right */

void ic_threads_init(struct ic_threads *t, int32_t start, int32_t max)
{
    *t = (struct ic_threads){.now = start, .max = max, .hold_ns = HOLD_MIN_NS};
}

bool ic_threads_decoded(struct ic_threads *t, int64_t wall, int64_t cpu, int64_t now)
{
    t->wall_ns += wall;
    t->cpu_ns += cpu;
    if (t->up_ns && now - t->up_ns > PROVED_NS) {
        t->up_ns = 0;
        t->hold_ns = HOLD_MIN_NS;
    }
    if (t->wall_ns < WINDOW_NS)
        return false;
    double missing = (double)t->now - (double)t->cpu_ns / (double)t->wall_ns;
    t->wall_ns = t->cpu_ns = 0;
    bool bad = t->now > 1 && missing >= MISSING + MISSING_PART * t->now;
    bool twice = bad && (t->suspect || missing >= SEVERE * t->now);
    t->suspect = bad && !twice;
    if (!twice)
        return false;
    /* A thread that shares a core with one other gets half of it, so each missing half is a core to leave.
     * But not all at once: threads that spin and those that are held up by them cannot be told apart. */
    int32_t fewer = t->now - (int32_t)(2 * missing + 0.5);
    int32_t half = t->now / 2;
    t->now = fewer > half ? fewer : half;
    if (t->now < 1)
        t->now = 1;
    if (t->up_ns) {
        t->hold_ns = t->hold_ns < HOLD_MAX_NS / 2 ? 2 * t->hold_ns : HOLD_MAX_NS;
        t->up_ns = 0;
    }
    t->free_ns = 0;
    t->changed_ns = now;
    return true;
}

bool ic_threads_may_grow(const struct ic_threads *t)
{
    return t->now < t->max;
}

bool ic_threads_others(struct ic_threads *t, double cores, int64_t now)
{
    int32_t room = t->max - t->now;
    double spare = (double)room - (cores > 0 ? cores : 0);

    if (spare < FREE)
        t->free_ns = 0;
    else if (!t->free_ns)
        t->free_ns = now;
    bool free = t->free_ns && now - t->free_ns >= t->hold_ns;
    if (!t->changed_ns)
        t->changed_ns = now;
    bool blind = now - t->changed_ns >= BLIND * t->hold_ns;
    if (room <= 0 || (!free && !blind))
        return false;
    int32_t more = free && spare > 1 ? (int32_t)spare : 1;
    t->now += more < room ? more : room;
    t->up_ns = t->changed_ns = now;
    t->free_ns = 0;
    t->wall_ns = t->cpu_ns = 0;
    t->suspect = false;
    return true;
}
