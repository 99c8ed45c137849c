/* When to start a server again that has ended, and with which configuration: the decisions of
 * `inference-core supervise`, without a process or a clock, so that years can be tried in a test.
 *
 *   A ladder of configurations: step 0 is the wished one, each further one asks for less.
 *   A run is good once it has been ready for good_ns. It forgets the crashes before it.
 *   After `crashes` ends within within_ns, with no good run between them, one step down; on the last step
 * it goes on trying. Between an end and the next start: delay_min_ns, doubled with each end up to
 * delay_max_ns; a good run or a step down begins anew. A good run on a lower step ends after retry_ns in
 * favour of the wished configuration; each such return that fails doubles the time until the next, up to
 * IC_RESTART_RETRY_MAX times.
 *
 * Pure; times are ic_now_ns(). One owner. */
#ifndef IC_OPS_RESTART_H
#define IC_OPS_RESTART_H

#include <stdbool.h>
#include <stdint.h>

#define IC_RESTART_CRASHES_MAX 32
#define IC_RESTART_RETRY_MAX 16

struct ic_restart_config {
    int crashes, steps; /* 1 to IC_RESTART_CRASHES_MAX; at least 1 */
    int64_t within_ns, good_ns;
    int64_t retry_ns; /* 0: never returns by itself */
    int64_t delay_min_ns, delay_max_ns;
};

struct ic_restart {
    struct ic_restart_config cfg;
    int step;
    bool good, returning;
    int64_t ready_ns, delay_ns, retry_factor; /* ready_ns 0: not ready */
    int64_t ends[IC_RESTART_CRASHES_MAX];
    int n_ends;
    uint64_t restarts;
};

void ic_restart_init(struct ic_restart *r, const struct ic_restart_config *cfg);
void ic_restart_ready(struct ic_restart *r, int64_t now);

enum ic_restart_news {
    IC_RESTART_NOTHING,
    IC_RESTART_GOOD,   /* the run has become good: its configuration is worth remembering */
    IC_RESTART_RETURN, /* end this run, gently: the wished configuration is to be tried again */
};
/* To be asked at ic_restart_due (INT64_MAX: never) or whenever; each piece of news comes once. */
enum ic_restart_news ic_restart_tick(struct ic_restart *r, int64_t now);
int64_t ic_restart_due(const struct ic_restart *r);

/* The process has ended and is to be started again: the delay until then (ns). r->step may have changed. */
int64_t ic_restart_ended(struct ic_restart *r, int64_t now);

/* Whether an end is final: exit codes of base/exit.h that another try cannot mend. `was_ready`: some run of
 * it has been ready, so that its options are sound. */
bool ic_restart_final(int exit_code, bool was_ready);

#endif
