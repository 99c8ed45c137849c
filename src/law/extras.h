/* What Atheria's own client draws beside the map: small derived arrays (law-m.md 4.6 "Extra payloads").
 *
 * All take psi (or a vector field of the same layout), float32 [h][w][d][2], only read, with the mask of
 * views.h: cells with a channel norm <= 0.05 or holding a NaN or an infinity are zero. Output arrays are
 * the caller's, float32, row-major. Sums in double, in a fixed order: the same input gives the same
 * output. The shape must satisfy ic_law_shape_ok. Nothing allocates or blocks; any thread. */
#ifndef IC_LAW_EXTRAS_H
#define IC_LAW_EXTRAS_H

#include "law/field.h"

/* phase_hsv_data: hue[h][w] = the phase view in [0, 1]; value[h][w] = min-max of sum_k |psi_k|^2 (0.5 where
 * its range is below 1e-10). Saturation is 1 everywhere. */
void ic_law_extra_phase_hsv(const float *psi, struct ic_law_shape shape, float *hue, float *value);

/* complex_3d_data: re[h][w], im[h][w] = the channel means. */
void ic_law_extra_complex_3d(const float *psi, struct ic_law_shape shape, float *re, float *im);

/* flow_data of a field v (delta; Atheria's service passes psi): dx = mean_k Re v_k, dy = mean_k Im v_k,
 * both over the largest |component|; magnitude = mean_k |v_k| over its maximum; zeros stay zeros. v may
 * be NULL: all zero. Cells that are not finite count as zero; no norm mask. */
void ic_law_extra_flow(const float *v, struct ic_law_shape shape, float *dx, float *dy, float *magnitude);

/* phase_attractor: channels 0 and 1 of the centre cell (h/2, w/2); a channel beyond d is 0. */
struct ic_law_attractor {
    struct {
        double re, im, abs;
    } channel[2];
};
void ic_law_extra_attractor(const float *psi, struct ic_law_shape shape, struct ic_law_attractor *out);

/* poincare_coords: principal components 1 and 2 of the 2d-dimensional cell vectors (Re, Im of each
 * channel), out[count][2]. Cells are taken at the smallest stride that keeps count <= max_points (row-major
 * order, first cell included); coordinates are centred on the sample's mean and divided by the largest
 * |coordinate|. The sign of a component is such that its largest loading is positive, so nothing here
 * depends on chance. Returns count; 0 where max_points is 0. `scratch`: that many doubles. */
#define IC_LAW_POINCARE_POINTS 5000 /* what Atheria sends at most */
size_t ic_law_extra_poincare_scratch(size_t d);
size_t ic_law_extra_poincare(const float *psi, struct ic_law_shape shape, size_t max_points, float *out,
                             double *scratch);

#endif
