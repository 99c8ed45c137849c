/* Faults on order, for tests: IC_FAULT="text-hang:20,law-hang:5" makes the 20th decode and the 5th batch hang. Where the
 * variable is not set, which is normal, a question costs one load. Any thread. */
#ifndef IC_BASE_FAULT_H
#define IC_BASE_FAULT_H

#include <stdbool.h>

/* What can be ordered:
 *   text-stall:N  the Nth decode goes on until it is told to stop
 *   text-hang:N   the Nth decode goes on for ever
 *   text-dead:N   the Nth and all that follow go on for ever
 *   text-oom:N    the Nth decode finds no memory
 *   draft-fail:N  the Nth call of the draft model fails
 *   law-hang:N    the Nth batch of a law goes on for ever */
enum ic_fault {
    IC_FAULT_TEXT_STALL,
    IC_FAULT_TEXT_HANG,
    IC_FAULT_TEXT_DEAD,
    IC_FAULT_TEXT_OOM,
    IC_FAULT_DRAFT_FAIL,
    IC_FAULT_LAW_HANG,
    IC_FAULT_COUNT
};

/* True at the Nth call for this fault, once (text-dead: from then on). */
bool ic_fault(enum ic_fault which);

#endif
