/* The shape of a Law M state and the few facts about one cell that several modules share.
 *
 * A state psi is float32 [h][w][d][2]: row y, column x, channel k, then Re and Im, no padding. The
 * caller owns it. delta (the last step's update without the decay term) has the same layout.
 * Pure functions, any thread, nothing blocks. */
#ifndef IC_LAW_FIELD_H
#define IC_LAW_FIELD_H

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>

#include "law/arch.h" /* IC_LAW_GRID_MAX, IC_LAW_D_MAX: keep every product of sizes far from overflow */

/* Cells with a channel norm at or below this are shown as empty (law-m.md 4.6). */
#define IC_LAW_MASK_NORM 0.05

struct ic_law_shape {
    size_t h, w, d; /* rows, columns, complex channels */
};

static inline bool ic_law_shape_ok(struct ic_law_shape s)
{
    return s.h >= 1 && s.h <= IC_LAW_GRID_MAX && s.w >= 1 && s.w <= IC_LAW_GRID_MAX && s.d >= 1 &&
           s.d <= IC_LAW_D_MAX;
}

/* float32 values in a state. */
static inline size_t ic_law_shape_floats(struct ic_law_shape s)
{
    return s.h * s.w * s.d * 2;
}

/* The 2*d floats of one cell. */
static inline const float *ic_law_cell(const float *psi, struct ic_law_shape s, size_t y, size_t x)
{
    return psi + (y * s.w + x) * s.d * 2;
}

/* Sum of squares of one cell, summed in channel order. NaN or infinite where the cell is. */
static inline double ic_law_cell_norm2(const float *cell, size_t d)
{
    double sum = 0;
    for (size_t i = 0; i < 2 * d; i++)
        sum += (double)cell[i] * (double)cell[i];
    return sum;
}

/* Whether a cell of this norm^2 is drawn. A cell with a NaN, an infinity or a norm^2 beyond float32
 * is treated as empty, so that one broken cell never spoils a picture. */
static inline bool ic_law_norm2_shown(double norm2)
{
    return norm2 > IC_LAW_MASK_NORM * IC_LAW_MASK_NORM && norm2 <= (double)FLT_MAX;
}

#endif
