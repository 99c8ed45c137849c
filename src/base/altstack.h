/* A stack of its own for the signal handlers of a thread, so that one that has used up its stack can still
 * tell (the handler of ops/crash.c). Each thread that wants one says so; the others handle signals on their
 * own stack. */
#ifndef IC_BASE_ALTSTACK_H
#define IC_BASE_ALTSTACK_H

#define IC_ALTSTACK_BYTES (128 << 10)

/* For the calling thread, until it ends. Where memory fails it goes without. Twice is harmless. */
void ic_altstack_here(void);

#endif
