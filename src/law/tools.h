/* What a user can do to a running state: stir, wave, disturb, inject, swap.
 *
 * A tool acts on psi (float32 [h][w][d][2], field.h; caller-owned) between two steps, in place; the
 * law's next step renormalises the cells. Formulas: law-m.md 1.8; what Atheria's servers lose on the way
 * (pitfalls 25 and 26: the intensity of collapse, x and y of wave, the layout in inject_energy) is
 * honoured here. Windows are clipped at the borders; a window wholly outside changes nothing and is no
 * error. Random choices come from args.seed alone (init.h), so a tool replays exactly on one machine.
 * Nothing allocates or blocks; any thread that may write psi. */
#ifndef IC_LAW_TOOLS_H
#define IC_LAW_TOOLS_H

#include <stdint.h>

#include "base/status.h"
#include "law/field.h"

/* X(symbol, wire name, what it does). r = radius; t_j = -1 + 2 j/(2r-1), j = 0..2r-1. */
#define IC_LAW_TOOL_TABLE(X)                                                                               \
    X(VORTEX, "vortex",                                                                                    \
      "in [y-r, y+r) x [x-r, x+r): psi = (1-blend) psi + blend p(t_y) p(t_x), "                            \
      "p(t) = exp(-2 t^2) exp(i pi t), all channels; charge != 0: the phase is charge times the "          \
      "polar angle instead (a true phase singularity). radius 5, blend 0.8, charge 0")                     \
    X(WAVE, "wave",                                                                                        \
      "whole grid: psi = (1-blend) psi + blend 0.25 exp(i (kx t_x + ky t_y)), t = (cell - centre) "        \
      "with r = the longer side. kx 1, ky 1, blend 0.8, centre of the grid")                               \
    X(COLLAPSE, "collapse",                                                                                \
      "psi += intensity CN(0,1) (Re, Im ~ N(0, 1/2)); over the whole grid, or, with a radius, "            \
      "weighted exp(-2 (dist/r)^2) around (x, y). intensity 0.1")                                          \
    X(INJECT_ENERGY, "inject_energy",                                                                      \
      "type primordial_soup (r 10: a cell at distance s is replaced with chance 0.3 exp(-2s/r) by a "      \
      "random direction of norm^2 U(0.1, 0.5)), dense_monolith (r 5: every cell of the square becomes "    \
      "one common direction of norm^2 2, plus 0.05 N(0,1) on each component), symmetric_seed (r 4: "       \
      "each of r x r cells of a quadrant with chance 1/2 a unit direction, mirrored to all four); "        \
      "norm^2 is multiplied by intensity (1)")                                                             \
    X(CLICK_OUT, "click_out",                                                                              \
      "with this chance (0.01): floor(fraction h w) (0.5) pairs of random cells swap their channel "       \
      "vectors, one pair after the other; duplicates possible")

enum ic_law_tool {
#define X(symbol, name, help) IC_LAW_TOOL_##symbol,
    IC_LAW_TOOL_TABLE(X)
#undef X
        IC_LAW_TOOL_COUNT
};

/* X(symbol, wire name): the recipes of inject_energy. */
#define IC_LAW_INJECT_TABLE(X)                                                                             \
    X(PRIMORDIAL_SOUP, "primordial_soup")                                                                  \
    X(DENSE_MONOLITH, "dense_monolith")                                                                    \
    X(SYMMETRIC_SEED, "symmetric_seed")

enum ic_law_inject {
#define X(symbol, name) IC_LAW_INJECT_##symbol,
    IC_LAW_INJECT_TABLE(X)
#undef X
        IC_LAW_INJECT_COUNT
};

/* X(field and wire name, least, most, unit and meaning): the numbers a tool takes. */
#define IC_LAW_TOOL_ARG_TABLE(X)                                                                           \
    X(x, -1e6, 1e6, "column of the centre, cells; rounded down; default w/2")                              \
    X(y, -1e6, 1e6, "row of the centre, cells; rounded down; default h/2")                                 \
    X(radius, 1, IC_LAW_GRID_MAX, "half the window's side, cells; rounded down")                           \
    X(intensity, 0, 1e3, "strength of collapse (standard deviation) and inject_energy (norm^2)")           \
    X(blend, 0, 1, "share of the pattern in vortex and wave")                                              \
    X(charge, -16, 16, "turns of phase around a vortex, rounded to a whole number")                        \
    X(kx, -1e4, 1e4, "wave number along x, radians per unit of t")                                         \
    X(ky, -1e4, 1e4, "wave number along y, radians per unit of t")                                         \
    X(chance, 0, 1, "probability that click_out happens")                                                  \
    X(fraction, 0, 1, "pairs swapped by click_out, per cell of the grid")

/* NaN in a number means "the tool's default". */
struct ic_law_tool_args {
#define X(name, min, max, help) double name;
    IC_LAW_TOOL_ARG_TABLE(X)
#undef X
    enum ic_law_inject type; /* inject_energy only */
    uint64_t seed;           /* names the random numbers; give each use its own */
};

/* All numbers default, type primordial_soup, seed 0. */
void ic_law_tool_args_init(struct ic_law_tool_args *args);

/* Sets one number by its wire name. A name that is not in the table is IC_NOT_FOUND (the protocol
 * ignores unknown fields: the caller decides); a value that is not finite or outside the table's range
 * is IC_BAD_REQUEST. args is unchanged on error. */
enum ic_status ic_law_tool_arg_set(struct ic_law_tool_args *args, const char *name, double value,
                                   struct ic_err *err);

/* Names; never NULL. Parsing an unknown name (or NULL) is IC_BAD_REQUEST. */
const char *ic_law_tool_name(enum ic_law_tool tool);
const char *ic_law_tool_help(enum ic_law_tool tool);
enum ic_status ic_law_tool_parse(const char *name, enum ic_law_tool *tool, struct ic_err *err);
const char *ic_law_inject_name(enum ic_law_inject type);
enum ic_status ic_law_inject_parse(const char *name, enum ic_law_inject *type, struct ic_err *err);

/* Applies a tool. *touched (may be NULL) counts the cells written, a cell twice where click_out swapped
 * it twice. IC_BAD_REQUEST: a bad shape, tool, type or number; psi is unchanged then. */
enum ic_status ic_law_tool_apply(float *psi, struct ic_law_shape shape, enum ic_law_tool tool,
                                 const struct ic_law_tool_args *args, size_t *touched, struct ic_err *err);

#endif
