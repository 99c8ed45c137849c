/* Convolutions as matrix products on tensor cores: rows are cells, columns output channels, the sum runs
 * over taps and input channels.
 *
 * A thread block owns a tile of cells and a range of columns. It brings the tile, one cell wider on each
 * side, to shared memory once, normalising and activating on the way, so that these are never passes over
 * memory of their own; the nine taps then read shifted rows of it. Weights lie in the order in
 * which the lanes of a product want them; they are streamed through a ring, or all of them are fetched
 * before the block waits for the kernel before it (they do not depend on it). The epilogue adds the
 * bias, gathers the next norm's sums, and writes whole 16-byte pieces, pooled ones too; the last layer's computes psi'. */
#ifndef IC_LAW_CUDA_CONV_CUH
#define IC_LAW_CUDA_CONV_CUH

#include "law/cuda/device.cuh"
#include "law/cuda/kernels.h"

#define PIECE 512 /* bytes of a 16 x 16 piece of weights, as four 8 x 8: 16 bytes a lane */
#define TAPS_MAX 9

/* The code book of QLoRA (Dettmers et al. 2023, appendix E). */
__constant__ float nf4_book[16] = {-1.0f,
                                   -0.6961928009986877f,
                                   -0.5250730514526367f,
                                   -0.39491748809814453f,
                                   -0.28444138169288635f,
                                   -0.18477343022823334f,
                                   -0.09105003625154495f,
                                   0.0f,
                                   0.07958029955625534f,
                                   0.16093020141124725f,
                                   0.24611230194568634f,
                                   0.33791524171829224f,
                                   0.44070982933044434f,
                                   0.5626170039176941f,
                                   0.7229568362236023f,
                                   1.0f};

/* ---- Inputs ----------------------------------------------------------------------------------- */

/* The first sums of each lane that norm_coefficients adds up, on their way before other work. */
#define NORM_AHEAD 4
#define NORM_AT_ONCE 8 /* of the others */
template <int AHEAD>
__device__ inline void norm_ahead(const ic_cu_src &s, int sample, int tid, float2 (&sums)[AHEAD])
{
    const int lanes = 1 << s.lane_shift, lane = tid & (lanes - 1), g = tid >> s.lane_shift,
              n = g < s.groups ? s.group_units * s.slots : 0; /* groups is 0 where there is no norm */
    const float2 *p =
        reinterpret_cast<const float2 *>(s.stats) + (size_t)sample * s.stats_stride + (size_t)g * n;
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
        sums[k] = lane + k * lanes < n ? __ldcg(p + lane + k * lanes) : make_float2(0, 0);
}
/* What a lane multiplies and adds of the norm's own, which depends on no launch. */
__device__ inline float2 norm_own(const ic_cu_src &s, int tid)
{
    const int lane = tid & ((1 << s.lane_shift) - 1), g = tid >> s.lane_shift, c = g * s.group_size + lane;
    if (g >= s.groups || lane >= s.group_size)
        return make_float2(0, 0);
    return make_float2(__ldg(s.scale + c), s.rms ? 0.0f : __ldg(s.shift + c));
}

/* scale and shift of every input channel, from the producer's sums: a few lanes a group. AHEAD: the first
 * sums are there already; own: and so is norm_own. */
template <int AHEAD = 0>
__device__ inline void norm_coefficients(const ic_cu_src &s, int sample, float *scale, float *shift,
                                         int tid, int threads, const float2 *ahead = nullptr,
                                         const float2 *own = nullptr)
{
    if (s.load != IC_CU_LOAD_NORM)
        return;
    const int groups = s.groups, lanes = 1 << s.lane_shift, n = s.group_units * s.slots,
              lane = tid & (lanes - 1);
    const float2 *all = reinterpret_cast<const float2 *>(s.stats) + (size_t)sample * s.stats_stride;
    for (int first = 0; first < groups; first += threads >> s.lane_shift) {
        const int g = first + (tid >> s.lane_shift);
        float sum = 0, sq = 0, w0 = 0, b0 = 0;
        if (own && first == 0) {
            w0 = own->x;
            b0 = own->y;
        } else if (g < groups && lane < s.group_size) { /* on their way while the sums come */
            w0 = __ldg(s.scale + g * s.group_size + lane);
            b0 = s.rms ? 0.0f : __ldg(s.shift + g * s.group_size + lane);
        }
        if (g < groups) {
            const float2 *p = all + (size_t)g * n;
            int i = lane;
            if (AHEAD > 0 && first == 0) {
                i += AHEAD * lanes;
#pragma unroll
                for (int k = 0; k < AHEAD; k++) {
                    sum += ahead[k].x;
                    sq += ahead[k].y;
                }
            }
            for (; i < n; i += NORM_AT_ONCE * lanes) {
                float2 v[NORM_AT_ONCE]; /* without branches: one wait for memory, however many there are */
#pragma unroll
                for (int k = 0; k < NORM_AT_ONCE; k++)
                    v[k] = i + k * lanes < n ? __ldcg(p + i + k * lanes) : make_float2(0, 0);
#pragma unroll
                for (int k = 0; k < NORM_AT_ONCE; k++) {
                    sum += v[k].x;
                    sq += v[k].y;
                }
            }
        }
        for (int m = lanes / 2; m; m >>= 1) {
            sum += __shfl_xor_sync(~0u, sum, m);
            sq += __shfl_xor_sync(~0u, sq, m);
        }
        if (g < groups) {
            const float mean = s.rms ? 0.0f : sum * s.inv_count;
            const float var = fmaxf(sq * s.inv_count - mean * mean, 0.0f), r = rsqrtf(var + s.eps);
            for (int k = lane; k < s.group_size; k += lanes) {
                const int c = g * s.group_size + k;
                const float w = (k == lane ? w0 : __ldg(s.scale + c)) * r;
                scale[c] = w;
                shift[c] = (k == lane ? b0 : s.rms ? 0.0f : __ldg(s.shift + c)) - mean * w;
            }
        }
    }
    for (int c = s.channels + tid; c < s.cpad; c += threads)
        scale[c] = shift[c] = 0;
}

template <class T> __device__ inline uint4 normalised(uint4 v, const float *scale, const float *shift)
{
    uint32_t *w = reinterpret_cast<uint32_t *>(&v);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 x = T::unpack(w[i]);
        const float2 a = reinterpret_cast<const float2 *>(scale)[i],
                     b = reinterpret_cast<const float2 *>(shift)[i];
        w[i] = T::pack_finite(elu(fmaf(x.x, a.x, b.x)), elu(fmaf(x.y, a.y, b.y)));
    }
    return v;
}

/* What ic_cu_conv.pooled is, of two channels of four cells; flip: the scales' signs. Which of the values, once stored, is
 * normalised to the largest does not depend on the statistics: rounding, the norm and ELU keep the order or turn it. */
template <class T>
__device__ inline uint32_t pooled(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t flip)
{
    return T::larger(T::larger(a ^ flip, b ^ flip), T::larger(c ^ flip, d ^ flip)) ^ flip;
}
template <class T> __device__ inline uint2 pooled(const uint2 (&v)[4], uint2 flip)
{
    return make_uint2(pooled<T>(v[0].x, v[1].x, v[2].x, v[3].x, flip.x),
                      pooled<T>(v[0].y, v[1].y, v[2].y, v[3].y, flip.y));
}
template <class T> __device__ inline uint4 pooled(const uint4 (&v)[4], uint4 flip)
{
    return make_uint4(pooled<T>(v[0].x, v[1].x, v[2].x, v[3].x, flip.x),
                      pooled<T>(v[0].y, v[1].y, v[2].y, v[3].y, flip.y),
                      pooled<T>(v[0].z, v[1].z, v[2].z, v[3].z, flip.z),
                      pooled<T>(v[0].w, v[1].w, v[2].w, v[3].w, flip.w));
}

/* Eight channels of psi at a cell; past 2d: zeros. */
__device__ inline void load_psi(uint4 *v, const float *cell, int c, int n)
{
    if (n % 8 == 0 && c < n) {
        v[0] = __ldcg(reinterpret_cast<const uint4 *>(cell + c));
        v[1] = __ldcg(reinterpret_cast<const uint4 *>(cell + c) + 1);
        return;
    }
    float *f = reinterpret_cast<float *>(v);
#pragma unroll
    for (int i = 0; i < 8; i++)
        f[i] = c + i < n ? __ldcg(cell + c + i) : 0.0f;
}

/* Where a tile lies and how it goes to shared memory. */
struct tile {
    int y0, x0, width, cells; /* of the tile with its border */
    uint32_t divide;          /* by width: (n * divide) >> 16, n < 2048 */
    int height_in, width_in;  /* of the grid */
};

/* Channels c0 + 8*[0, octets) of a source to `to` + cell * row + 16 * octet. Values that need no arithmetic
 * of the next cells are copied asynchronously as they are, all at once (begin); what is left is done when
 * the norm's coefficients are known (end). The same thread has the same piece in both. */
struct part {
    int c0, octets;
    char *to;
    int row;
    const float *scale, *shift; /* of the source's channel 0 */
};

/* a / b of small numbers (a < 2^20) without the long way of an integer division. */
__device__ inline int divided(int a, int b)
{
    return (int)__fdividef((float)a + 0.5f, (float)b);
}

/* Calls fn(address in shared memory, y, x, channel, inside) for this thread's pieces. */
template <class F>
__device__ inline void each_piece(const part &p, const tile &t, int tid, int threads, F fn)
{
    const int dp = divided(threads, p.octets), dq = threads - dp * p.octets;
    int cell = divided(tid, p.octets), q = tid - cell * p.octets;
#pragma unroll 1
    while (cell < t.cells) {
        const int py = (int)((uint32_t)cell * t.divide >> 16), y = t.y0 + py,
                  x = t.x0 + cell - py * t.width;
        fn(p.to + cell * p.row + 16 * q, y, x, p.c0 + 8 * q,
           (unsigned)y < (unsigned)t.height_in && (unsigned)x < (unsigned)t.width_in);
        cell += dp;
        q += dq;
        if (q >= p.octets) {
            q -= p.octets;
            cell++;
        }
    }
}

__device__ inline void begin_source(const ic_cu_src &s, int sample, const part &p, const tile &t, int tid,
                                    int threads)
{
#if IC_CU_TENSOR
    if (s.load != IC_CU_LOAD_NORM && s.load != IC_CU_LOAD_RAW)
        return;
    const char *base = static_cast<const char *>(s.p) + (size_t)sample * s.stride;
    each_piece(p, t, tid, threads, [&](char *to, int y, int x, int c, bool inside) {
        if (inside)
            copy16_async(shared_address(to), base + 2 * ((size_t)(y * t.width_in + x) * s.cpad + c));
        else
            *reinterpret_cast<uint4 *>(to) = make_uint4(0, 0, 0, 0); /* outside the grid */
    });
#endif
}

template <class T>
__device__ inline void end_source(const ic_cu_src &s, const float *psi, int d, const part &p, const tile &t,
                                  int tid, int threads)
{
    if (s.load == IC_CU_LOAD_NORM) {
        each_piece(p, t, tid, threads, [&](char *to, int, int, int c, bool inside) {
            uint4 *at = reinterpret_cast<uint4 *>(to);
            if (inside) /* outside it stays zero, after the activation */
                *at = normalised<T>(*at, p.scale + c, p.shift + c);
        });
    } else if (s.load == IC_CU_LOAD_PSI) {
        each_piece(p, t, tid, threads, [&](char *to, int y, int x, int c, bool inside) {
            uint4 v[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
            if (inside)
                load_psi(v, psi + (size_t)(y * t.width_in + x) * 2 * d, c, 2 * d);
            const float *f = reinterpret_cast<const float *>(v);
            *reinterpret_cast<uint4 *>(to) = make_uint4(T::pack(f[0], f[1]), T::pack(f[2], f[3]),
                                                        T::pack(f[4], f[5]), T::pack(f[6], f[7]));
        });
    }
}

/* ---- Weights ----------------------------------------------------------------------------------- */

/* Slices [first, first + COUNT) of a chunk's sum, all columns of the block, to the ring at `to`. */
struct weights {
    int column16, columns16; /* the block's first piece; pieces of the product */
    int c0, nc;              /* chunk's first 16-channel block and their number */
    uint32_t divide;         /* by nc: (n * divide) >> 20 */
    int units;               /* taps * nc */
};

/* Slice u of a chunk: its tap and 16-channel block of the whole input. */
__device__ inline void locate(const weights &w, int u, int &tap, int &c)
{
    tap = (int)((uint32_t)u * w.divide >> 20);
    c = w.c0 + u - tap * w.nc;
}

/* Where pack.c put the 8 inputs of a column that lane `lane` brings of a 16 x 16 piece: lanes are
 * [2 x 8 columns][2 x 8 inputs][column]. Blocks are of 128 columns, the last one of what is left. */
__device__ inline uint32_t weight_row(const ic_cu_conv &a, int taps, int column8, int tap, int c, int lane)
{
    const int n = column8 + (lane >> 4), block = n & ~15, width = min(16, a.columns / 8 - block);
    return (uint32_t)(block * a.c16 * taps + (c * taps + tap) * width + (n & 15)) * 16 + (lane & 15);
}

/* Copies `count` slices from `first` on, all columns of the block, to shared memory. */
template <class T, int TAPS, int COLUMNS16, int THREADS>
__device__ inline void fetch_weights(const ic_cu_conv &a, const weights &w, int first, int count, char *to,
                                     int tid)
{
#if IC_CU_TENSOR
    for (int i = tid; i < count * COLUMNS16 * 32; i += THREADS) {
        const int lane = i & 31, piece = i >> 5, n = piece % COLUMNS16, u = first + piece / COLUMNS16;
        int tap, c;
        locate(w, u, tap, c);
        char *at = to + (size_t)i * 16;
        if (u < w.units && w.column16 + n < w.columns16) {
            const uint32_t from = weight_row(a, TAPS, 2 * (w.column16 + n), tap, c, lane);
            copy16_async(shared_address(at), static_cast<const char *>(a.weight) + (size_t)from * 16);
        } else {
            *reinterpret_cast<uint4 *>(at) = make_uint4(0, 0, 0, 0);
        }
    }
#endif
}

/* NF4: codes come to registers first (read), and are expanded to shared memory when they are there
 * (expand). `i` counts 16-byte pieces of lanes as above. */
template <int TAPS, int COLUMNS16>
__device__ inline uint32_t nf4_read(const ic_cu_conv &a, const weights &w, int first, int i)
{
    const int lane = i & 31, piece = i >> 5, n = piece % COLUMNS16, u = first + piece / COLUMNS16;
    int tap, c;
    locate(w, u, tap, c);
    if (u >= w.units || w.column16 + n >= w.columns16)
        return 0x77777777u; /* zeros */
    return __ldg(a.nf4.codes + weight_row(a, TAPS, 2 * (w.column16 + n), tap, c, lane));
}

template <class T, int COLUMNS16>
__device__ inline void nf4_expand(const ic_cu_conv &a, const weights &w, int first, int i, uint32_t codes,
                                  float book, char *to)
{
    const ic_cu_nf4 &q = a.nf4;
    const int lane = i & 31, piece = i >> 5, n = piece % COLUMNS16,
              u = min(first + piece / COLUMNS16, w.units - 1);
    int tap, c;
    locate(w, u, tap, c);
    int o = (w.column16 + n) * 16 + (lane >> 4) * 8 + (lane & 7), at = tap;
    if (q.phases == 4) {
        at = divided(o, q.cout_pad);
        o -= at * q.cout_pad;
    }
    const int base = min(o, q.cout - 1) * q.so + min(at, TAPS_MAX - 1) * q.st;
    const int place = c * 16 + (lane >> 3 & 1) * 8;
    const int real = place < q.cpad0 ? place : q.cin0 + place - q.cpad0;
    uint32_t out[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const int i0 = base + min(real + 2 * k, q.cin - 1) * q.si,
                  i1 = base + min(real + 2 * k + 1, q.cin - 1) * q.si;
        const float v0 = __shfl_sync(~0u, book, (int)(codes >> 8 * k), 16), /* modulo 16 */
            v1 = __shfl_sync(~0u, book, (int)(codes >> (8 * k + 4)), 16);
        out[k] = T::pack(v0 * __ldg(q.absmax + (i0 >> 6)), v1 * __ldg(q.absmax + (i1 >> 6)));
    }
    *reinterpret_cast<uint4 *>(to + (size_t)i * 16) = make_uint4(out[0], out[1], out[2], out[3]);
}

/* ---- The kernel -------------------------------------------------------------------------------- */

template <class T, bool NF4, int TAPS, int WM, int WN, int WK, int MT, int NT, int U, int MIN_BLOCKS>
__global__ void __launch_bounds__(WM *WN *WK * 32, MIN_BLOCKS)
    conv_kernel(const __grid_constant__ ic_cu_conv a)
{
#if IC_CU_TENSOR
    constexpr int THREADS = WM * WN * WK * 32, BM = WM * MT * 16, BN = WN * NT * 8, COLUMNS16 = BN / 16;
    constexpr int ITEMS = U * COLUMNS16 * 32,
                  MINE = (ITEMS + THREADS - 1) / THREADS; /* of a stage; a thread's */
    constexpr int STAGE = U * COLUMNS16 * PIECE, BORDER = TAPS == 9 ? 1 : 0;
    extern __shared__ __align__(16) char smem[];
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int wk = warp % WK, wn = warp / WK % WN, wm = warp / (WK * WN);
    const int sample = blockIdx.z, column0 = blockIdx.y * BN;
    const int channels = a.c16 * 16, row = a.chunk16 * 32 + 16;
    const int border_w = a.tile_w + 2 * BORDER, cells = border_w * (a.tile_h + 2 * BORDER);

    const ic_cu_io io = a.io[sample]; /* the table does not change during a graph */
    const float *psi = io.psi;
    let_next_start();
    if (!psi)
        return;

    float *scale = reinterpret_cast<float *>(smem), *shift = scale + channels;
    float2 *sums = reinterpret_cast<float2 *>(shift + channels); /* [WM][BN] */
    char *area = reinterpret_cast<char *>(sums + WM * BN);       /* input tile; later output */
    char *ring = area + a.ring_at;

    weights w;
    w.column16 = column0 / 16;
    w.columns16 = a.columns / 16;
    const int chunks = a.chunks;

    /* this lane's rows of the tile in shared memory, for tap (0, 0) */
    uint32_t rows[MT];
#pragma unroll
    for (int m = 0; m < MT; m++) {
        const int r = wm * MT * 16 + m * 16 + (lane & 15), y = r >> a.tile_shift, x = r & (a.tile_w - 1);
        rows[m] = shared_address(area) + (uint32_t)((y * border_w + x) * row + (lane >> 4) * 16);
    }

    float keep_sum[NT][2], keep_sq[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++)
        keep_sum[n][0] = keep_sum[n][1] = keep_sq[n][0] = keep_sq[n][1] = 0;

    const float book = NF4 ? nf4_book[lane & 15] : 0.0f;
    bool waited = false, have_weights = false;
    const int tile_end = min((int)(blockIdx.x + 1) * a.tiles_per_block, a.tiles_x * a.tiles_y);
    for (int ti = blockIdx.x * a.tiles_per_block; ti < tile_end; ti++) {
        const int ty = divided(ti, a.tiles_x), tx = ti - ty * a.tiles_x;
        tile t;
        t.y0 = ty * a.tile_h - BORDER;
        t.x0 = tx * a.tile_w - BORDER;
        t.width = border_w;
        t.cells = cells;
        t.divide = a.tile_divide;
        t.height_in = a.height;
        t.width_in = a.width;

        float acc[MT][NT][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < NT; n++)
                acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0;

        for (int chunk = 0; chunk < chunks; chunk++) {
            w.c0 = chunk * a.chunk16;
            w.nc = min(a.chunk16, a.c16 - w.c0);
            w.divide = (uint32_t)divided(1 << 20, w.nc) + 1;
            w.units = TAPS * w.nc;
            const int stages = (w.units + U - 1) / U; /* a power of two */
            if (a.resident) {
                if (NF4 && !have_weights) {
#pragma unroll 4
                    for (int i = tid; i < stages * ITEMS; i += THREADS)
                        nf4_expand<T, COLUMNS16>(a, w, 0, i, nf4_read<TAPS, COLUMNS16>(a, w, 0, i), book,
                                                 ring);
                } else if (!have_weights) {
                    fetch_weights<T, TAPS, COLUMNS16, THREADS>(a, w, 0, stages * U, ring, tid);
                }
                have_weights = true;
                copies_commit();
            } else {
#pragma unroll
                for (int s = 0; s < IC_CU_RING - 1; s++) {
                    if (NF4 && s < stages) {
#pragma unroll
                        for (int i = tid; i < ITEMS; i += THREADS)
                            nf4_expand<T, COLUMNS16>(a, w, s * U, i,
                                                     nf4_read<TAPS, COLUMNS16>(a, w, s * U, i), book,
                                                     ring + s * STAGE);
                    } else if (s < stages) {
                        fetch_weights<T, TAPS, COLUMNS16, THREADS>(a, w, s * U, U, ring + s * STAGE, tid);
                    }
                    copies_commit();
                }
            }
            const int first = w.c0 * 16, last = first + w.nc * 16, split = a.in[0].cpad;
            const part parts[2] = {{first, (min(last, split) - first) / 8, area, row, scale, shift},
                                   {max(first - split, 0), (last - max(first, split)) / 8,
                                    area + max(split - first, 0) * 2, row, scale + split, shift + split}};
            float2 ahead[NORM_AHEAD];
            if (!waited) {
                wait_for_previous();
                norm_ahead(a.in[0], sample, tid, ahead);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (parts[i].octets > 0)
                    begin_source(a.in[i], sample, parts[i], t, tid, THREADS);
            copies_commit();
            if (!waited) {
                norm_coefficients<NORM_AHEAD>(a.in[0], sample, scale, shift, tid, THREADS, ahead);
                norm_coefficients(a.in[1], sample, scale + split, shift + split, tid, THREADS);
                __syncthreads();
                waited = true;
            }
            copies_wait<0>();
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (parts[i].octets > 0)
                    end_source<T>(a.in[i], psi, a.d, parts[i], t, tid, THREADS);
            if (a.resident)
                __syncthreads();
            for (int s = 0; s < stages; s++) {
                const char *stage = ring + (a.resident ? s : s % IC_CU_RING) * STAGE;
                const int next = s + IC_CU_RING - 1;
                uint32_t codes[MINE];
                if (!a.resident) {
                    copies_wait<IC_CU_RING - 2>();
                    __syncthreads();
                    if (NF4) {
#pragma unroll
                        for (int i = 0; i < MINE; i++)
                            codes[i] = ITEMS % THREADS == 0 || i * THREADS + tid < ITEMS
                                           ? nf4_read<TAPS, COLUMNS16>(a, w, next * U, i * THREADS + tid)
                                           : 0;
                    } else if (next < stages)
                        fetch_weights<T, TAPS, COLUMNS16, THREADS>(a, w, next * U, U,
                                                                   ring + next % IC_CU_RING * STAGE, tid);
                    copies_commit();
                }
#pragma unroll
                for (int i = 0; i < U / WK; i++) {
                    const int in_stage = i * WK + wk, u = min(s * U + in_stage, w.units - 1);
                    const int tap = TAPS == 9 ? (int)((uint32_t)u * w.divide >> 20) : 0, c = u - tap * w.nc;
                    const int ky = tap / 3;
                    const uint32_t off = (uint32_t)((ky * border_w + tap - 3 * ky) * row + c * 32);
                    const uint32_t b = shared_address(stage) +
                                       (uint32_t)(in_stage * COLUMNS16 + wn * (NT / 2)) * PIECE + lane * 16;
                    uint32_t bf[NT / 2][4];
#pragma unroll
                    for (int n = 0; n < NT / 2; n++)
                        load_matrix(bf[n], b + n * PIECE);
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        uint32_t af[4];
                        load_matrix(af, rows[m] + off);
#pragma unroll
                        for (int n = 0; n < NT / 2; n++) {
                            multiply(acc[m][2 * n], af, bf[n][0], bf[n][1], T());
                            multiply(acc[m][2 * n + 1], af, bf[n][2], bf[n][3], T());
                        }
                    }
                }
                if (NF4 && !a.resident && next < stages) {
#pragma unroll
                    for (int i = 0; i < MINE; i++)
                        if (ITEMS % THREADS == 0 || i * THREADS + tid < ITEMS)
                            nf4_expand<T, COLUMNS16>(a, w, next * U, i * THREADS + tid, codes[i], book,
                                                     ring + next % IC_CU_RING * STAGE);
                }
            }
            __syncthreads(); /* the tile and the ring are free again */
        }

        /* ---- epilogue ---- */
        if (WK > 1) {
            float4 *part = reinterpret_cast<float4 *>(area);
            constexpr int N = MT * NT;
            const int place = wm * WN + wn;
            if (wk > 0) {
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int n = 0; n < NT; n++)
                        part[((wk - 1) * WM * WN + place) * N * 32 + (m * NT + n) * 32 + lane] =
                            make_float4(acc[m][n][0], acc[m][n][1], acc[m][n][2], acc[m][n][3]);
            }
            __syncthreads();
            if (wk == 0) {
#pragma unroll
                for (int k = 1; k < WK; k++)
#pragma unroll
                    for (int m = 0; m < MT; m++)
#pragma unroll
                        for (int n = 0; n < NT; n++) {
                            const float4 v =
                                part[((k - 1) * WM * WN + place) * N * 32 + (m * NT + n) * 32 + lane];
                            acc[m][n][0] += v.x;
                            acc[m][n][1] += v.y;
                            acc[m][n][2] += v.z;
                            acc[m][n][3] += v.w;
                        }
            }
            __syncthreads();
        }
        const int yt = ty * a.tile_h, xt = tx * a.tile_w;
        constexpr int OUT_ROW = BN * 2 + 16, Y_ROW = BN * 4 + 16;
        if (wk == 0) {
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const int in_block = wn * NT * 8 + n * 8 + (lane & 3) * 2, column = column0 + in_block;
                float2 bias = make_float2(0, 0);
                if (a.bias && column < a.columns)
                    bias = __ldg(reinterpret_cast<const float2 *>(a.bias + column));
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const int r = wm * MT * 16 + m * 16 + h * 8 + (lane >> 2), y = r >> a.tile_shift,
                                  x = r & (a.tile_w - 1);
                        float v0 = acc[m][n][2 * h] + bias.x, v1 = acc[m][n][2 * h + 1] + bias.y;
                        if (yt + y < a.height && xt + x < a.width) {
                            keep_sum[n][0] += v0;
                            keep_sum[n][1] += v1;
                            keep_sq[n][0] = fmaf(v0, v0, keep_sq[n][0]);
                            keep_sq[n][1] = fmaf(v1, v1, keep_sq[n][1]);
                        }
                        if (a.act) {
                            v0 = elu(v0);
                            v1 = elu(v1);
                        }
                        if (a.epilogue == IC_CU_UPDATE)
                            *reinterpret_cast<float2 *>(area + r * Y_ROW + in_block * 4) =
                                make_float2(v0, v1);
                        else
                            *reinterpret_cast<uint32_t *>(area + r * OUT_ROW + in_block * 2) =
                                T::pack(v0, v1);
                    }
            }
        }
        __syncthreads();
        if (a.epilogue == IC_CU_UPDATE) {
            /* four lanes a cell */
            float2 *field = reinterpret_cast<float2 *>(io.psi);
            float2 *delta = reinterpret_cast<float2 *>(io.delta);
            const float keep = 1.0f - fmaxf(io.gamma, 0.0f);
            for (int i = tid; i < BM * 4; i += THREADS) {
                const int r = i >> 2, y = yt + (r >> a.tile_shift), x = xt + (r & (a.tile_w - 1));
                const bool inside = y < a.height && x < a.width;
                const size_t cell = ((size_t)y * a.width + x) * a.d;
                float2 *out = reinterpret_cast<float2 *>(area + r * Y_ROW);
                float sum = 0;
                for (int k0 = i & 3; inside && k0 < a.d; k0 += 16) {
                    float2 p[4];
#pragma unroll
                    for (int j = 0; j < 4; j++) /* all on their way before the first is used */
                        p[j] = k0 + 4 * j < a.d ? __ldcg(field + cell + k0 + 4 * j) : make_float2(0, 0);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const int k = k0 + 4 * j;
                        if (k >= a.d)
                            break;
                        const float2 ak = out[k];
                        const float2 de = a.product ? make_float2(ak.x * p[j].x - ak.y * p[j].y,
                                                                  ak.x * p[j].y + ak.y * p[j].x)
                                                    : ak;
                        if (delta)
                            delta[cell + k] = de;
                        const float2 phi = make_float2(fmaf(keep, p[j].x, de.x), fmaf(keep, p[j].y, de.y));
                        out[k] = phi;
                        sum = fmaf(phi.x, phi.x, fmaf(phi.y, phi.y, sum));
                    }
                }
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                const float r_norm = 1.0f / (sqrtf(sum) + 1e-9f);
                if (inside)
                    for (int k = i & 3; k < a.d; k += 4)
                        field[cell + k] = make_float2(out[k].x * r_norm, out[k].y * r_norm);
            }
        } else {
            for (int i = tid; i < BM * (BN / 8); i += THREADS) {
                const int r = i / (BN / 8), o = i % (BN / 8), column = column0 + o * 8;
                int y = yt + (r >> a.tile_shift), x = xt + (r & (a.tile_w - 1)), c = column,
                    width = a.width;
                if (y >= a.height || x >= a.width || column >= a.columns)
                    continue;
                if (a.epilogue == IC_CU_STORE4) {
                    const int phase = divided(column, a.cpad);
                    c = column - phase * a.cpad;
                    y = 2 * y + (phase >> 1);
                    x = 2 * x + (phase & 1);
                    width *= 2;
                }
                *reinterpret_cast<uint4 *>(static_cast<char *>(a.out) + (size_t)sample * a.out_stride +
                                           2 * (((size_t)y * width + x) * a.cpad + c)) =
                    *reinterpret_cast<const uint4 *>(area + r * OUT_ROW + o * 16);
            }
            /* tiles begin at even cells and grids are even: all four cells are inside, or none */
            for (int i = tid; a.pooled && i < BM / 4 * (BN / 8); i += THREADS) {
                const int q = i / (BN / 8), o = i % (BN / 8), column = column0 + o * 8;
                const int y = 2 * (q >> (a.tile_shift - 1)), x = 2 * q & (a.tile_w - 1);
                if (yt + y >= a.height || xt + x >= a.width || column >= a.columns)
                    continue;
                uint4 v[4];
#pragma unroll
                for (int k = 0; k < 4; k++)
                    v[k] = *reinterpret_cast<const uint4 *>(
                        area + ((y + (k >> 1)) * a.tile_w + x + (k & 1)) * OUT_ROW + o * 16);
                *reinterpret_cast<uint4 *>(
                    static_cast<char *>(a.pooled) + (size_t)sample * a.pooled_stride +
                    2 * (((size_t)(yt + y) / 2 * (a.width / 2) + (xt + x) / 2) * a.cpad + column)) =
                    pooled<T>(v, __ldg(reinterpret_cast<const uint4 *>(a.flip + column)));
            }
        }
        __syncthreads();
    }

    if (a.stats) {
        float2 *out = reinterpret_cast<float2 *>(a.stats) + (size_t)sample * a.stats_stride + blockIdx.x;
        const bool eights = a.stats_gran == 8;
        if (wk == 0) {
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const int at = wn * NT * 8 + n * 8;
                if (eights) { /* one sum of eight columns */
                    float sum = keep_sum[n][0] + keep_sum[n][1], sq = keep_sq[n][0] + keep_sq[n][1];
#pragma unroll
                    for (int m = 1; m < 32; m <<= 1) {
                        sum += __shfl_xor_sync(~0u, sum, m);
                        sq += __shfl_xor_sync(~0u, sq, m);
                    }
                    if (lane == 0 && WM > 1)
                        sums[wm * BN + at] = make_float2(sum, sq);
                    else if (lane == 0 && column0 + at < a.columns)
                        out[(size_t)((column0 + at) >> 3) * a.slots] = make_float2(sum, sq);
                    continue;
                }
#pragma unroll
                for (int e = 0; e < 2; e++)
                    for (int m = 4; m < 32; m <<= 1) {
                        keep_sum[n][e] += __shfl_xor_sync(~0u, keep_sum[n][e], m);
                        keep_sq[n][e] += __shfl_xor_sync(~0u, keep_sq[n][e], m);
                    }
                if (lane < 4) {
                    sums[wm * BN + at + 2 * lane] = make_float2(keep_sum[n][0], keep_sq[n][0]);
                    sums[wm * BN + at + 2 * lane + 1] = make_float2(keep_sum[n][1], keep_sq[n][1]);
                }
            }
        }
        if (eights && WM == 1)
            return;
        __syncthreads();
        const int step = eights ? 8 : 1, column = column0 + tid * step;
        if (tid * step < BN && column < a.columns) {
            float2 v = make_float2(0, 0);
#pragma unroll
            for (int m = 0; m < WM; m++) {
                v.x += sums[m * BN + tid * step].x;
                v.y += sums[m * BN + tid * step].y;
            }
            out[(size_t)(eights ? column >> 3 : column) * a.slots] = v;
        }
    }
#endif
}

#endif
