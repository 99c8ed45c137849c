/* Pictures of a state: what a frame carries.
 *
 * A view maps psi (and, for two of them, delta) to one or three values per cell; law-m.md 4.6 is the
 * source, with the full entropy, coherence and channel-activity maps given there under "earlier full
 * definitions". Rules that hold for all:
 *
 *  - Mask: a cell of psi whose channel norm is <= 0.05, or that holds a NaN or an infinity (or whose norm^2
 *    is beyond float32), counts as zero. A cell of delta that is not finite counts as zero. delta may be
 *    NULL: all zero.
 *  - Normalisation: `fixed` clips to [0, 1]; `min-max` takes (v-min)/(max-min) over the values of the
 *    picture, region included, and shows a range below 1e-10 as 0.5. min and max of the frame are those of
 *    the values before normalisation (0 and 1 for fixed): value = min + (max-min) * shown.
 *  - u8 is trunc(shown * 255), f32 the shown value itself, little-endian.
 *  - Region: everything is computed on the full grid (derivatives, spectrum, neighbours, spatial
 *    means) and cut afterwards; a view that depends on one cell only computes just the region, which
 *    gives the same values.
 *
 * A context holds the scratch memory; it grows when a larger frame or a first spectral view comes and is
 * then reused, so frames of a settled set of sizes allocate nothing. One context per thread; it may serve
 * any number of simulations. Nothing blocks. */
#ifndef IC_LAW_VIEWS_H
#define IC_LAW_VIEWS_H

#include <stdint.h>

#include "base/status.h"
#include "law/field.h"

/* X(symbol, wire name, values per cell, normalisation, needs delta, formula). e = sum_k |psi_k|^2. */
#define IC_VIEW_TABLE(X)                                                                                   \
    X(DENSITY, "density", 1, FIXED, 0, "e")                                                                \
    X(PHASE, "phase", 1, FIXED, 0,                                                                         \
      "(theta + pi)/(2 pi), theta = atan2(mean_k sin arg psi_k, mean_k cos arg psi_k); arg 0 = 0")         \
    X(PHASE_HSV, "phase_hsv", 3, FIXED, 0,                                                                 \
      "RGB of hue = phase, saturation 1, value = min-max of e (1 where e is even to 1e-5)")                \
    X(REAL, "real", 1, MINMAX, 0, "mean_k Re psi_k")                                                       \
    X(IMAG, "imag", 1, MINMAX, 0, "mean_k Im psi_k")                                                       \
    X(FIELDS, "fields", 3, MINMAX, 0, "|psi_0|, |psi_1|, |psi_2| (absent channels 0), one range")          \
    X(PHYSICS, "physics", 1, MINMAX, 1,                                                                    \
      "mean_k |delta_k|/(|psi_k| + 1e-10), a term with |psi_k| <= 1e-10 being 0")                          \
    X(FLOW, "flow", 3, SYMMETRIC, 1,                                                                       \
      "mean_k Re delta_k, mean_k Im delta_k, mean_k |delta_k|; min = -max, max = largest size of all")     \
    X(ENTROPY, "entropy", 1, MINMAX, 0,                                                                    \
      "-sum_k p_k ln(p_k + 1e-10)/ln d, p_k = |psi_k|^2/e (1/d where e = 0); 0 where d = 1")               \
    X(COHERENCE, "coherence", 1, MINMAX, 0,                                                                \
      "|<psi(y,x), psi(y,x+1)>|/(norm norm + 1e-10); last column of the grid 0")                           \
    X(CHANNEL_ACTIVITY, "channel_activity", 1, MINMAX, 0,                                                  \
      "max_k |psi_k|^2 / max_k (mean over the grid of |psi_k|^2); 0 where that is 0")                      \
    X(GRADIENT, "gradient", 1, MINMAX, 0, "|grad e|, central differences, one-sided at the borders")       \
    X(SPECTRAL, "spectral", 1, MINMAX, 0,                                                                  \
      "ln(1 + |fftshift(FFT2(e))|), centre bin = largest of its 8 neighbours")                             \
    X(ENERGY, "energy", 1, MINMAX, 0, "e")

enum ic_view {
#define X(symbol, name, channels, norm, delta, formula) IC_VIEW_##symbol,
    IC_VIEW_TABLE(X)
#undef X
        IC_VIEW_COUNT
};

/* Name and formula; never NULL. */
const char *ic_view_name(enum ic_view view);
const char *ic_view_formula(enum ic_view view);
size_t ic_view_channels(enum ic_view view); /* values per cell: 1 or 3 */
bool ic_view_needs_delta(enum ic_view view);
/* Whether a cell's values come from that cell alone: no neighbours, no spectrum, no means of the grid. */
bool ic_view_of_one_cell(enum ic_view view);
/* An unknown name, or NULL, is IC_BAD_REQUEST (Atheria shows the density for those). */
enum ic_status ic_view_parse(const char *name, enum ic_view *view, struct ic_err *err);

enum ic_view_encoding { IC_VIEW_U8, IC_VIEW_F32 };
const char *ic_view_encoding_name(enum ic_view_encoding encoding); /* "u8", "f32": also the dtype */
enum ic_status ic_view_encoding_parse(const char *name, enum ic_view_encoding *encoding,
                                      struct ic_err *err);

/* Rows y..y+h and columns x..x+w; all zero means the whole grid. Must lie inside it. */
struct ic_view_roi {
    size_t x, y, w, h;
};

struct ic_view_request {
    enum ic_view view;
    enum ic_view_encoding encoding;
    struct ic_view_roi roi;
};

/* What a render leaves: row-major [h][w] (ndim 2) or [h][w][3] (ndim 3). */
struct ic_view_frame {
    size_t shape[3];
    unsigned ndim;
    enum ic_view_encoding dtype;
    size_t bytes;
    float min, max; /* of the values before normalisation */
};

struct ic_view_ctx;

/* IC_OOM leaves *out NULL. */
enum ic_status ic_view_ctx_open(struct ic_view_ctx **out, struct ic_err *err);
void ic_view_ctx_close(struct ic_view_ctx **ctx);        /* NULL and *ctx == NULL are fine */
size_t ic_view_ctx_bytes(const struct ic_view_ctx *ctx); /* scratch held now, transform plans aside */

/* Checks a request against a shape and gives the frame's shape, dtype and bytes (min = max = 0), so that
 * the caller can provide the array. IC_BAD_REQUEST: bad shape, view, encoding or region. */
enum ic_status ic_view_plan(const struct ic_view_request *request, struct ic_law_shape shape,
                            struct ic_view_frame *frame, struct ic_err *err);

/* Draws into out (caller-owned, out_size >= the planned bytes, any alignment). psi and delta are only
 * read. Errors: those of ic_view_plan, IC_TOO_LARGE where out is too small, IC_OOM; out is unspecified
 * then, the context stays usable.
 *
 * The phase of a u8 frame uses a polynomial arc tangent in float32: within 4e-6 rad (1/6000 of a u8 step)
 * of the exact angle of the same mean vector, so a byte differs from the exact one only within that
 * distance of a step; a component below 1e-19 counts as zero. An f32 frame uses double precision and
 * libm. */
enum ic_status ic_view_render(struct ic_view_ctx *ctx, const struct ic_view_request *request,
                              const float *psi, const float *delta, struct ic_law_shape shape, void *out,
                              size_t out_size, struct ic_view_frame *frame, struct ic_err *err);

#endif
