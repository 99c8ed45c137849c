/* How far a law in fewer bits departs from itself in float32: `inference-core law fidelity`.
 *
 * Every precision starts from the same states and steps beside float32. Single trajectories of a chaotic
 * law part whatever the difference, so what is judged is the time average of each emergence metric
 * (law/metrics.h) after the spin-up, and its difference from float32's run of the same seed, as a share of
 * float32's mean, with a 95 % confidence interval: over the seeds, or over batches of the runs' samples
 * where seeds do not differ more than those explain (law/stats.h). A row passes where every deviation is
 * below the threshold with its whole interval, fails where one is above it with its whole interval, and is
 * undecided otherwise (one seed always): chaos alone parts the averages of so few seeds further. A row of
 * float32 from starts nudged by a millionth shows how far that is.
 *
 * Rows do not start from float32's states after the spin-up, though that would narrow the intervals: what
 * they had in common would still be there at the end of a run of slow patterns, and would pass for likeness
 * of the laws.
 *
 * Beside that: one-step error ||psi'_p - psi'_32|| / ||psi'_32 - psi|| from states of the float32 run's
 * second half, and overlap |<psi_p, psi_32>| / (||psi_p|| ||psi_32||) at growing times. Blocks for the
 * whole run; prints to stdout. One call at a time. */
#ifndef IC_LAW_FIDELITY_H
#define IC_LAW_FIDELITY_H

#include "law/plan.h"

#define IC_LAW_FIDELITY_GRIDS_MAX 8
#define IC_LAW_FIDELITY_ROWS_MAX 8
#define IC_LAW_FIDELITY_SEEDS_MAX 4096
#define IC_LAW_FIDELITY_STEPS_MAX 1000000u

struct ic_law_fidelity_opts {
    const char *path, *config, *arch; /* as ic_law_open; an original, not a quantised file */
    const struct ic_law_backend *backend;
    unsigned threads; /* 0: the back end chooses */
    unsigned grids, grid[IC_LAW_FIDELITY_GRIDS_MAX];
    unsigned seeds, steps;
    unsigned long first_seed; /* >= 1: the seeds are first_seed, first_seed + 1, ... */
    unsigned spin_up;         /* steps, of `steps`, before anything is averaged; 0: a quarter */
    unsigned rows;            /* what is compared with float32 */
    struct {
        const char *name;
        struct ic_law_policy policy;
        bool nudged; /* starts differ by a millionth */
    } row[IC_LAW_FIDELITY_ROWS_MAX];
    double threshold;       /* largest deviation that passes, as a share: 0.05 */
    bool layers;            /* also the one-step error of each layer alone in NF4 */
    const char *csv, *plot; /* files to write, or NULL; the plot is SVG */
};

enum ic_law_fidelity_verdict { IC_LAW_FIDELITY_PASS, IC_LAW_FIDELITY_UNDECIDED, IC_LAW_FIDELITY_FAIL };

/* *worst: of all rows and grids; nudged rows are shown, not judged. Codes: as ic_law_open and the back
 * end's, UNAVAILABLE (a device is lost), INTERNAL (I/O). */
enum ic_status ic_law_fidelity(const struct ic_law_fidelity_opts *o, enum ic_law_fidelity_verdict *worst,
                               struct ic_err *err);

#endif
