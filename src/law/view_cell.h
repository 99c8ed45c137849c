/* Internal to law: what the pictures of the CPU (views.c) and of a GPU (cuda/frames.cu) reckon in the same
 * way, to the last bit where neither contracts products and sums. No state. Source of the numbers:
 * law-m.md 4.6. */
#ifndef IC_LAW_VIEW_CELL_H
#define IC_LAW_VIEW_CELL_H

#include <math.h>

#ifdef __CUDACC__
#define IC_VIEW_FN __device__ static inline
#else
#define IC_VIEW_FN static inline
#endif

#define FLAT_RANGE 1e-10f  /* below: shown as 0.5 */
#define EVEN_DENSITY 1e-5f /* phase_hsv: float32 noise of unit cells is not a picture */
#define TINY 1e-10f        /* the epsilon of entropy, coherence and physics */

enum norm { NORM_FIXED, NORM_MINMAX, NORM_SYMMETRIC };

/* atan2(y, x)/(2 pi) in [-0.5, 0.5]; the polynomial is within 2.5e-7 rad of the arc tangent on [0, 1]
 * (fitted by reweighted least squares), the rest is float32 rounding. */
IC_VIEW_FN float turns(float y, float x)
{
    const float ax = fabsf(x), ay = fabsf(y);
    const float hi = ax > ay ? ax : ay, lo = ax > ay ? ay : ax;
    const float q = hi > 0 ? lo / hi : 0, z = q * q;
    float t =
        q *
        (0.159154324f +
         z * (-0.053026238f +
              z * (0.0315251163f + z * (-0.0210615134f +
                                        z * (0.0126724926f + z * (-0.0053482706f + z * 0.00108412821f))))));
    t = ay > ax ? 0.25f - t : t;
    t = x < 0 ? 0.5f - t : t;
    return y < 0 ? -t : t;
}

#endif
