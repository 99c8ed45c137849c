/* Emergence metrics of a state (law-m.md 5): numbers that tell whether something is happening.
 *
 * psi and delta are float32 [h][w][d][2] (field.h), the caller's, only read. No display mask: these are the
 * numbers of the state itself. A cell of psi with a NaN or an infinity counts as a zero cell (bad_cells
 * says how many there are), and so does one of delta. All sums are double precision, row by row, channel by
 * channel, in one thread: the same state gives the same bits. Nothing allocates or blocks; any thread.
 *
 * Notation: e = sum_k |psi_k|^2 of a cell, E = sum of e over the cells, N = h w. */
#ifndef IC_LAW_METRICS_H
#define IC_LAW_METRICS_H

#include <stddef.h>

#include "base/buf.h"
#include "base/status.h"
#include "law/field.h"

/* X(field and JSON name, unit, formula, source). NaN in a field: not defined for this state; JSON null. */
#define IC_LAW_METRIC_TABLE(X)                                                                             \
    X(channel_entropy, "nats",                                                                             \
      "mean over cells of -sum_k p_k ln(p_k + 1e-10), p_k = |psi_k|^2/e; p_k = 1/d where e = 0",           \
      "law-m.md 5.2 (3) and its identity: the informative entropy; 0 to ln d")                             \
    X(channel_entropy_norm, "1", "channel_entropy / ln d; 0 where d = 1", "law-m.md 4.6 entropy map")      \
    X(entropy, "nats", "-sum over cells and k of p ln(p + 1e-9), p = |psi_k|^2/(E + 1e-9)",                \
      "law-m.md 5.2 (1); with unit cells ln N + channel_entropy")                                          \
    X(symmetry, "1",                                                                                       \
      "1/(1 + 100 D), D = mean over y, x, k of (|psi| - |rot90 psi|)^2; null unless the grid is "          \
      "square",                                                                                            \
      "law-m.md 5.1 EpochDetector")                                                                        \
    X(coherence, "1",                                                                                      \
      "mean over the h (w-1) horizontal neighbour pairs of |<a, b>|/(|a| |b| + 1e-10); null where "        \
      "w = 1",                                                                                             \
      "law-m.md 4.6 coherence map without its empty last column, so that an even field has 1")             \
    X(complexity, "1", "standard deviation over cells (unbiased) of sum_k |psi_k|; 0 where N = 1",         \
      "law-m.md 5.4 and 5.5 (the trainer's loss is -ln(this + 1e-6))")                                     \
    X(mean_delta, "1", "mean over y, x, k of |delta_k|, delta without the decay; null before a step",      \
      "law-m.md 5.5")                                                                                      \
    X(defects, "count",                                                                                    \
      "2x2 plaquettes around which arg psi_channel turns by +-2 pi (each step wrapped to "                 \
      "[-pi, pi]; arg 0 = 0)",                                                                             \
      "law-m.md 5; winding number as in train_ginzburg_landau.py")                                         \
    X(defect_charge, "count",                                                                              \
      "positive minus negative defects; rows run down, so + is clockwise on "                              \
      "screen",                                                                                            \
      "the same")                                                                                          \
    X(energy, "1", "E", "law-m.md 5.1; N once cells are normalised")                                       \
    X(clustering, "1", "variance over cells (unbiased) of e; 0 where N = 1", "law-m.md 5.1")               \
    X(epoch, "0-5",                                                                                        \
      "first that holds: energy < 1: 0; symmetry < 0.2 and clustering < 0.1: 1; symmetry > 0.6: 2; "       \
      "symmetry > 0.3 and clustering > 0.5: 3; clustering > 2: 4; else 1",                                 \
      "law-m.md 5.1; an undefined symmetry fulfils none of its comparisons")                               \
    X(bad_cells, "count", "cells of psi holding a NaN or an infinity", "ours")

struct ic_law_metrics {
#define X(name, unit, formula, source) double name;
    IC_LAW_METRIC_TABLE(X)
#undef X
};

/* One row of the table, for help and documents. */
struct ic_law_metric_info {
    const char *name, *unit, *formula, *source;
};
size_t ic_law_metric_count(void);
const struct ic_law_metric_info *ic_law_metric_info(size_t i); /* NULL past the end */
double ic_law_metric_value(const struct ic_law_metrics *m, size_t i);

/* Computes all. delta may be NULL (mean_delta is NaN then). `channel` is the one whose defects are counted
 * (0 as a rule). IC_BAD_REQUEST: bad shape, or channel >= d; *out is unchanged then. */
enum ic_status ic_law_metrics_compute(const float *psi, const float *delta, struct ic_law_shape shape,
                                      size_t channel, struct ic_law_metrics *out, struct ic_err *err);

/* Appends a JSON object with every metric, in table order. */
void ic_law_metrics_json(struct ic_buf *b, const struct ic_law_metrics *m);

/* Phase defects of one channel (< d): how many plaquettes wind by +2 pi and by -2 pi. Exact: which half
 * plane a value lies in and the sign of a cross product, both free of rounding, settle every step. */
void ic_law_defects(const float *psi, struct ic_law_shape shape, size_t channel, size_t *positive,
                    size_t *negative);

/* The epoch rule alone. */
int ic_law_epoch(double energy, double symmetry, double clustering);

#endif
