#include "base/altstack.h"

#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <sys/mman.h>

#define GUARD 4096 /* below it, never touched: whoever runs past the end faults instead of overwriting */

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void drop(void *base)
{
    stack_t none = {.ss_flags = SS_DISABLE};

    sigaltstack(&none, NULL);
    munmap(base, GUARD + IC_ALTSTACK_BYTES);
}

static void make_key(void)
{
    pthread_key_create(&key, drop);
}

void ic_altstack_here(void)
{
    pthread_once(&once, make_key);
    if (pthread_getspecific(key))
        return;
    char *base =
        mmap(NULL, GUARD + IC_ALTSTACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED)
        return;
    stack_t st = {.ss_sp = base + GUARD, .ss_size = IC_ALTSTACK_BYTES};
    if (mprotect(base, GUARD, PROT_NONE) != 0 || pthread_setspecific(key, base) != 0 ||
        sigaltstack(&st, NULL) != 0) {
        pthread_setspecific(key, NULL);
        munmap(base, GUARD + IC_ALTSTACK_BYTES);
    }
}
