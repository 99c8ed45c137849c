/* What the process says when it crashes: on SIGSEGV, SIGBUS, SIGFPE, SIGILL and SIGABRT the lines that
 * still wait in the log's ring are written, then one line of cause (signal, address, thread, version, build
 * id) and a backtrace, a line a frame, to the log and to stderr; then the signal takes its course, so that
 * core dump and exit status are as ever.
 *
 * Built with a sanitizer, the sanitizer's own handlers stay, unless IC_CRASH_HANDLER=1. */
#ifndef IC_OPS_CRASH_H
#define IC_OPS_CRASH_H

#include <stdbool.h>

/* Once, early, by the main thread. False: left out, see above. */
bool ic_crash_install(void);

/* For tests, where IC_FAULT is "crash-after-ms:N" or "crash-after-ms:N:KIND": a thread (ic-fault) that
 * breaks after N ms in the way KIND says: segv (default), abort, fpe, ill, bus, stack (runs out of it).
 * Anything else is left to others. */
void ic_crash_arm_fault(void);

#endif
