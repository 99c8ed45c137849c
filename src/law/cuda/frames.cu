/* Frames: one launch that finds the range of values of every frame, one that draws. A value is computed in
 * both, which is cheaper than keeping it. The arithmetic is that of views.c, operation by operation, and
 * this file is compiled without fused multiply-adds: what differs is logf (entropy) and, in f32 frames,
 * atan2. Minima and maxima are exact, whatever the order. */
#include "law/cuda/frames.h"

#include <stdbool.h>
#define _Noreturn __attribute__((noreturn)) /* views.h is C */
extern "C" {
#include "law/views.h"
}
#include "law/view_cell.h"

#define THREADS 256

__device__ static int norm_of(int view)
{
    switch (view) {
#define X(symbol, name, channels, norm, delta, formula)                                                    \
    case IC_VIEW_##symbol: return NORM_##norm;
        IC_VIEW_TABLE(X)
#undef X
    default: return NORM_FIXED;
    }
}

__device__ static int channels_of(int view)
{
    switch (view) {
#define X(symbol, name, channels, norm, delta, formula)                                                    \
    case IC_VIEW_##symbol: return channels;
        IC_VIEW_TABLE(X)
#undef X
    default: return 1;
    }
}

/* |cell|^2, 0 where the cell does not count. Cells that do not count have no values at all: `on` is false.
 */
__device__ static float norm2_of(const float *cell, int d, bool mask, bool *on)
{
    float sum = 0;
    for (int k = 0; k < d; k++) {
        const float2 v = reinterpret_cast<const float2 *>(cell)[k];
        sum += v.x * v.x + v.y * v.y;
    }
    *on = sum <= FLT_MAX && (!mask || sum > (float)(IC_LAW_MASK_NORM * IC_LAW_MASK_NORM));
    return *on ? sum : 0;
}

__device__ static float2 channel(const float *cell, int k, bool on)
{
    return on ? reinterpret_cast<const float2 *>(cell)[k] : make_float2(0, 0);
}

__device__ static float phase_of(const float *cell, int d, bool on, bool quick)
{
    if (quick) {
        float c = 0, s = 0;
        for (int k = 0; k < d; k++) {
            const float2 v = channel(cell, k, on);
            const float m2 = v.x * v.x + v.y * v.y, inv = 1 / sqrtf(m2 >= FLT_MIN ? m2 : 1);
            c += m2 >= FLT_MIN ? v.x * inv : 1; /* arg 0 = 0 */
            s += m2 >= FLT_MIN ? v.y * inv : 0;
        }
        return turns(s, c) + 0.5f;
    }
    double c = 0, s = 0;
    for (int k = 0; k < d; k++) {
        const float2 v = channel(cell, k, on);
        const double re = (double)v.x, im = (double)v.y, m = sqrt(re * re + im * im);
        c += m > 0 ? re / m : 1;
        s += m > 0 ? im / m : 0;
    }
    return (float)(atan2(s, c) / 6.28318530717958647692 + 0.5);
}

__device__ static float entropy_of(const float *cell, int d, bool on, float e)
{
    float out = 0;
    if (d == 1)
        return 0;
    for (int k = 0; k < d; k++) {
        const float2 v = channel(cell, k, on);
        const float q = e > 0 ? (v.x * v.x + v.y * v.y) / e : 1 / (float)d;
        out -= q * logf(q + TINY);
    }
    return out / logf((float)d);
}

/* The values of cell `at` of the grid before normalisation. phase_hsv: hue and density. */
__device__ static void values(const struct ic_cu_frame &f, size_t at, float v[3])
{
    const int d = f.d;
    const float *psi = f.psi + at * 2 * (size_t)d, *delta = f.delta ? f.delta + at * 2 * (size_t)d : NULL;
    bool on = false, moves = false;
    const float e = f.view == IC_VIEW_FLOW ? 0 : norm2_of(psi, d, true, &on);
    if (delta && (f.view == IC_VIEW_FLOW || f.view == IC_VIEW_PHYSICS))
        norm2_of(delta, d, false, &moves);
    float sum[3] = {0, 0, 0};
    switch (f.view) {
    case IC_VIEW_PHASE: v[0] = phase_of(psi, d, on, !f.f32); break;
    case IC_VIEW_PHASE_HSV:
        v[0] = phase_of(psi, d, on, !f.f32);
        v[1] = e;
        break;
    case IC_VIEW_REAL:
    case IC_VIEW_IMAG:
        for (int k = 0; k < d; k++)
            sum[0] += f.view == IC_VIEW_REAL ? channel(psi, k, on).x : channel(psi, k, on).y;
        v[0] = sum[0] / (float)d;
        break;
    case IC_VIEW_FIELDS:
        for (int k = 0; k < 3; k++) {
            const float2 c = k < d ? channel(psi, k, on) : make_float2(0, 0);
            v[k] = sqrtf(c.x * c.x + c.y * c.y);
        }
        break;
    case IC_VIEW_PHYSICS:
        for (int k = 0; k < d; k++) {
            const float2 c = channel(psi, k, on), b = channel(delta, k, moves);
            const float m = sqrtf(c.x * c.x + c.y * c.y), n = sqrtf(b.x * b.x + b.y * b.y);
            sum[0] += m > TINY ? n / (m + TINY) : 0;
        }
        v[0] = sum[0] / (float)d;
        break;
    case IC_VIEW_FLOW:
        for (int k = 0; k < d; k++) {
            const float2 b = channel(delta, k, moves);
            sum[0] += b.x;
            sum[1] += b.y;
            sum[2] += sqrtf(b.x * b.x + b.y * b.y);
        }
        for (int k = 0; k < 3; k++)
            v[k] = sum[k] / (float)d;
        break;
    case IC_VIEW_ENTROPY: v[0] = entropy_of(psi, d, on, e); break;
    default: v[0] = e; break; /* density, energy */
    }
}

__device__ static size_t cell_at(const struct ic_cu_frame &f, int i)
{
    return (size_t)(f.y + i / f.w) * (size_t)f.grid_w + (size_t)(f.x + i % f.w);
}

/* The smaller and the larger of all threads' values; NaN takes part in neither. Thread 0 has the result. */
__device__ static void reduce(float &lo, float &hi)
{
    __shared__ float los[THREADS], his[THREADS];
    los[threadIdx.x] = lo;
    his[threadIdx.x] = hi;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            const float l = los[threadIdx.x + half], h = his[threadIdx.x + half];
            los[threadIdx.x] = l < los[threadIdx.x] ? l : los[threadIdx.x];
            his[threadIdx.x] = h > his[threadIdx.x] ? h : his[threadIdx.x];
        }
    }
    lo = los[0];
    hi = his[0];
}

__global__ static void find_ranges(const struct ic_cu_frame *frames, float *partial)
{
    const struct ic_cu_frame f = frames[blockIdx.y];
    const bool hsv = f.view == IC_VIEW_PHASE_HSV;
    float lo = FLT_MAX, hi = -FLT_MAX;
    if (!hsv && norm_of(f.view) == NORM_FIXED)
        return;
    const int first = hsv ? 1 : 0, last = hsv ? 2 : channels_of(f.view), cells = f.w * f.h;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < cells; i += IC_CU_FRAME_BLOCKS * THREADS) {
        float v[3] = {0, 0, 0};
        values(f, cell_at(f, i), v);
        for (int c = first; c < last; c++) {
            lo = v[c] < lo ? v[c] : lo;
            hi = v[c] > hi ? v[c] : hi;
        }
    }
    reduce(lo, hi);
    if (threadIdx.x == 0) {
        partial[(blockIdx.y * IC_CU_FRAME_BLOCKS + blockIdx.x) * 2] = lo;
        partial[(blockIdx.y * IC_CU_FRAME_BLOCKS + blockIdx.x) * 2 + 1] = hi;
    }
}

__device__ static float shown(float v, float lo, float range)
{
    if (range < FLAT_RANGE)
        return 0.5f;
    float t = (v - lo) / range;
    t = t > 0 ? t : 0; /* NaN becomes 0 */
    return t < 1 ? t : 1;
}

__device__ static void hsv_to_rgb(float v[3], float lo, float hi)
{
    const float h = v[0] * 6, e = v[1];
    const float value = hi - lo < EVEN_DENSITY ? (hi > 0 ? 1.0f : 0.0f) : (e - lo) / (hi - lo);
    const float rgb[3] = {fabsf(h - 3) - 1, 2 - fabsf(h - 2), 2 - fabsf(h - 4)};
    for (int c = 0; c < 3; c++)
        v[c] = (rgb[c] < 0 ? 0 : rgb[c] > 1 ? 1 : rgb[c]) * value;
}

__global__ static void draw_frames(const struct ic_cu_frame *frames, const float *partial, float *range)
{
    const struct ic_cu_frame f = frames[blockIdx.y];
    const bool hsv = f.view == IC_VIEW_PHASE_HSV;
    const int norm = norm_of(f.view), channels = channels_of(f.view), cells = f.w * f.h;
    float lo = 0, hi = 1;
    if (hsv || norm != NORM_FIXED) {
        const float *mine = partial + (size_t)blockIdx.y * IC_CU_FRAME_BLOCKS * 2;
        lo = mine[0];
        hi = mine[1];
        for (int b = 1; b < IC_CU_FRAME_BLOCKS; b++) {
            lo = mine[2 * b] < lo ? mine[2 * b] : lo;
            hi = mine[2 * b + 1] > hi ? mine[2 * b + 1] : hi;
        }
        if (!(lo <= hi))
            lo = hi = 0; /* nothing but NaN */
    }
    if (norm == NORM_SYMMETRIC) {
        hi = -lo > hi ? -lo : hi;
        lo = -hi;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        range[blockIdx.y * 2] = norm == NORM_FIXED ? 0 : lo;
        range[blockIdx.y * 2 + 1] = norm == NORM_FIXED ? 1 : hi;
    }
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < cells; i += IC_CU_FRAME_BLOCKS * THREADS) {
        float v[3] = {0, 0, 0};
        values(f, cell_at(f, i), v);
        if (hsv)
            hsv_to_rgb(v, lo, hi);
        for (int c = 0; c < channels; c++) {
            const float t = norm == NORM_FIXED ? shown(v[c], 0, 1) : shown(v[c], lo, hi - lo);
            const size_t to = (size_t)i * channels + c;
            if (f.f32)
                static_cast<float *>(f.out)[to] = t;
            else
                static_cast<uint8_t *>(f.out)[to] = (uint8_t)(int)(t * 255.0f);
        }
    }
}

cudaError_t ic_cu_frames_run(const struct ic_cu_frame *frames, float *range, float *partial, int n,
                             cudaStream_t stream)
{
    const dim3 grid(IC_CU_FRAME_BLOCKS, (unsigned)n);
    find_ranges<<<grid, THREADS, 0, stream>>>(frames, partial);
    draw_frames<<<grid, THREADS, 0, stream>>>(frames, partial, range);
    return cudaGetLastError();
}
