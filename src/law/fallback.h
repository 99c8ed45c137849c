/* A back end that may lose its device, with the CPU behind it.
 *
 * Where the device has no room for a plan, or is lost in the middle of a step, the simulations go on on the
 * CPU from the state before that step; a law that the device cannot pack (no device; an architecture it
 * does not run) is on the CPU from the start. Each move is logged once. A lost device is not asked again.
 *
 * States (struct ic_law_state, state_open) lie in host memory, on the device, or in both:
 *
 *          state_put: the host's is newer          run: the device's is newer
 *        ┌─────────────┐   next run on the device  ┌──────────────────────────┐
 *        │    HOST     │ ────────────────────────► │    DEVICE, `ahead` steps │
 *        └─────────────┘ ◄──────────────────────── └──────────────────────────┘
 *               ▲   evicted, or moved to the CPU     │ state_get
 *               └──────────────── BOTH ◄─────────────┘
 *
 * State_open takes nothing of the device; the first run there does, through the gate. Where there is no
 * room, states that were not used for longest, and are not in a run, are copied to the host and leave the
 * device; when that is not enough the plan moves to the CPU. A device that is lost takes with it what
 * happened to a state since its host copy was last brought up to date (state_get): the simulation goes on
 * from that copy, and ic_law_fallback_lost says how many steps back that is. After OOM nothing is lost.
 * The io of such a back end may mix simulations with and without a state; those without are copied there
 * and back in each run, delta too. */
#ifndef IC_LAW_FALLBACK_H
#define IC_LAW_FALLBACK_H

#include "law/plan.h"

/* Others take memory of the same device: what a law or a plan wants there is asked for before and given
 * back afterwards. take: false, with the reason, when it may not be had; then the CPU is used. Any thread.
 */
struct ic_law_gate {
    bool (*take)(void *arg, const char *what, size_t bytes, struct ic_err *why);
    void (*give)(void *arg, size_t bytes);
    void *arg;
};
/* Before the first law is packed; NULL: no gate. Copied. */
void ic_law_fallback_gate(const struct ic_law_gate *gate);

/* `first` with the CPU back end behind it, as one back end; first->run must be there. One per process: a
 * second call with another `first` is a bug. Its functions are as thread-safe as those of `first`.
 * `run` fails, with the state as it was, only where the CPU has no memory either: IC_OOM. */
const struct ic_law_backend *ic_law_backend_with_cpu(const struct ic_law_backend *first);

/* How many steps of this state were lost since it was last asked: psi, h and c in host memory are those of
 * so many steps before. */
uint64_t ic_law_fallback_lost(struct ic_law_state *state);
/* Instead of state_close, for a state on a device that does not answer: nothing there is touched or freed.
 * Returns the steps that the host's copy lacks, those of ic_law_fallback_lost included. */
uint64_t ic_law_fallback_abandon(struct ic_law_state **state);
/* Of that back end's. Where a plan of this law would be opened now: on the device, if there is room. Any
 * thread. */
bool ic_law_fallback_on_device(const struct ic_law_packed *packed);
/* Bytes of host memory that a plan takes, wherever it is: all of it on the CPU, what is copied to and fro
 * for a device (ic_law_staging_bytes). As exec_bytes otherwise; changes in `run`. */
size_t ic_law_fallback_host_bytes(const struct ic_law_exec *exec);
/* The back end that steps in, and the law as packed for it (made now, if it was not yet; owned by
 * `packed`). NULL: no memory. Any thread. */
const struct ic_law_backend *ic_law_fallback_cpu(const struct ic_law_packed *packed,
                                                 struct ic_law_packed **out);

#endif
