/* CHECK for tests that replay random schedules: a failure names the schedule, by its seed, and the
 * condition. For tests only, with cmocka. */
#ifndef IC_SCHED_CHECK_H
#define IC_SCHED_CHECK_H

#include <stdint.h>
#include <stdio.h>

static uint64_t seed_now; /* of the schedule under way */

#define CHECK(cond)                                                                                        \
    do {                                                                                                   \
        if (!(cond)) {                                                                                     \
            printf("schedule %llu: %s does not hold\n", (unsigned long long)seed_now, #cond);              \
            fail_msg("%s:%d", __FILE__, __LINE__);                                                         \
        }                                                                                                  \
    } while (0)

#endif
