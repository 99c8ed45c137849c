#include "text/threads.h"

#include "base/clock.h"

#define WINDOW_NS (100 * IC_MS)     /* of decoding; long enough that one wake-up of the network does not count */
#define MISSING 0.4                 /* cores that we did not get: from here on they are not ours … */
#define MISSING_PART 0.03           /* … and as much of each thread, which sleep while the graph is made */
#define FREE 0.75                   /* of a core left alone: it is ours */
#define HOLD_MIN_NS (500 * IC_MS)
#define HOLD_MAX_NS (30000 * IC_MS)
#define PROVED_NS (5000 * IC_MS)    /* a step up that lasts so long was right */

void ic_threads_init(struct ic_threads *t, int32_t start, int32_t max)
{
    *t = (struct ic_threads){.now = start, .max = max > start ? max : start, .hold_ns = HOLD_MIN_NS};
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
    if (t->now == 1 || missing < MISSING + MISSING_PART * t->now)
        return false;
    /* A thread that shares a core with one other gets half of it, so each missing half is a core to leave. But not
     * all at once: threads that spin and those that are held up by them cannot be told apart. */
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
    return true;
}

bool ic_threads_may_grow(const struct ic_threads *t)
{
    return t->now < t->max;
}

bool ic_threads_others(struct ic_threads *t, double cores, int64_t now)
{
    double spare = (double)t->max - (double)t->now - (cores > 0 ? cores : 0);

    if (t->now >= t->max || spare < FREE) {
        t->free_ns = 0;
        return false;
    }
    if (!t->free_ns)
        t->free_ns = now;
    if (now - t->free_ns < t->hold_ns)
        return false;
    t->now += spare < 1 ? 1 : (int32_t)spare;
    if (t->now > t->max)
        t->now = t->max;
    t->up_ns = now;
    t->free_ns = 0;
    t->wall_ns = t->cpu_ns = 0;
    return true;
}
