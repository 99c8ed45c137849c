/* Internal to law/cuda: frames drawn on the device (law/views.h says what they show). */
#ifndef IC_LAW_CUDA_FRAMES_H
#define IC_LAW_CUDA_FRAMES_H

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define IC_CU_FRAME_BLOCKS 16 /* thread blocks that share a frame */

/* One frame. All pointers are device memory. */
struct ic_cu_frame {
    const float *psi, *delta; /* [H,W,d,2]; delta NULL: all zero */
    void *out;                /* [h][w][channels of the view], bytes or float32 */
    int view;                 /* enum ic_view, one of those that depend on one cell only */
    int f32;                  /* encoding: 0 is u8 */
    int x, y, w, h;           /* the region, resolved */
    int grid_w, d;
};

/* Draws `n` frames of a device table. `range`: [n][2] min and max of each, as ic_view_frame; `partial`:
 * [n][IC_CU_FRAME_BLOCKS][2] floats of scratch. */
cudaError_t ic_cu_frames_run(const struct ic_cu_frame *frames, float *range, float *partial, int n,
                             cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
