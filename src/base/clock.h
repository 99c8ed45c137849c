/* Time. One source of "now" for everything that waits or measures; never the wall clock, so that a
 * clock jump moves nothing. Any thread. */
#ifndef IC_BASE_CLOCK_H
#define IC_BASE_CLOCK_H

#include <stdint.h>
#include <time.h>

/* Monotonic nanoseconds since an arbitrary start (CLOCK_MONOTONIC). */
static inline int64_t ic_now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

/* Wall-clock seconds since 1970, for people and logs only. */
static inline double ic_wall_s(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

#define IC_MS 1000000LL /* nanoseconds in a millisecond */

#endif
