#include "base/fault.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static const char *const names[IC_FAULT_COUNT] = {"text-stall:", "text-hang:", "text-dead:", "text-oom:",
                                                 "draft-fail:", "law-hang:"};
static _Atomic long left[IC_FAULT_COUNT]; /* calls until it happens; 0: never (again) */
static bool any;

static void read_orders(void)
{
    const char *orders = getenv("IC_FAULT");

    for (int i = 0; orders && i < IC_FAULT_COUNT; i++) {
        const char *at = strstr(orders, names[i]);
        if (at)
            atomic_store(&left[i], strtol(at + strlen(names[i]), NULL, 10));
        any |= at != NULL;
    }
}

bool ic_fault(enum ic_fault which)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, read_orders);
    if (!any || atomic_load(&left[which]) <= 0)
        return false;
    if (which == IC_FAULT_TEXT_DEAD && atomic_load(&left[which]) == 1)
        return true;
    return atomic_fetch_sub(&left[which], 1) == 1;
}
