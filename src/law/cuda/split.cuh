/* Convolutions of few cells, where what counts is the time from the launch before to the launch after:
 * wgmma products whose sum is cut among the blocks of a thread block cluster (Hopper).
 *
 * A cluster owns a tile of 64 or 128 cells and a range of columns; each of its blocks brings and normalises
 * a range of the input's channels only, all at once, and multiplies them by their weights. It sends the
 * rows of its products to the block that adds them up, stores them and sums them for the next norm.
 * Compared with blocks that each have all channels of fewer columns, nothing is normalised twice, and no
 * sum is long.
 *
 * All weights have a place of their own; or they come in stages and only some of these have, so that a second block
 * has room on the multiprocessor, and the warps that do not multiply ask for the rest as places become free.
 *
 * Whatever does not depend on the launch before is done before the block waits for it: weights, addresses,
 * and every parameter is read once, as each first use of a line of them waits for memory (`pin`). Tiles and
 * weights lie as in wide.cuh. */
#ifndef IC_LAW_CUDA_SPLIT_CUH
#define IC_LAW_CUDA_SPLIT_CUH

#include "law/cuda/wide.cuh"

#define SPLIT_THREADS 256
#define SMEM_OF_TWO (226 * 1024) /* bytes of shared memory that two blocks of a multiprocessor may have */

#if IC_CU_WGMMA
/* 16 bytes to another block's shared memory, counted by a barrier there. */
__device__ inline void send(uint32_t to, float a, float b, float c, float d, uint32_t barrier)
{
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::
            "r"(to),
        "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier)
        : "memory");
}
/* As barrier_wait, for what other blocks of the cluster sent. */
__device__ inline void barrier_wait_cluster(uint32_t at, uint32_t parity)
{
    asm volatile("{\n\t.reg .pred done;\n\t"
                 "again:\n\t"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
                 "@done bra over;\n\t"
                 "bra again;\n\t"
                 "over:\n\t}" ::"r"(at),
                 "r"(parity)
                 : "memory");
}
template <int V> struct constant {
    static constexpr int value = V;
};
/* The value is there before what follows. */
template <class V> __device__ inline void pin(V *&v)
{
    asm volatile("" : "+l"(v));
}
__device__ inline void pin(int &v)
{
    asm volatile("" : "+r"(v));
}
__device__ inline void pin(float &v)
{
    asm volatile("" : "+f"(v));
}

/* Scale and shift of all channels of a block, 12 bytes a channel; in float16 as norm_octet wants them too.
 */
template <class T> struct norm_table {
    float *by, *add;

    __device__ norm_table(float *at, int channels) : by(at), add(at + channels) {}
    __device__ void put(int channel, float times, float plus) const
    {
        by[channel] = times;
        add[channel] = plus;
    }
    __device__ uint4 apply(int octet, uint4 v) const
    {
        return normalised<T>(v, by + 8 * octet, add + 8 * octet);
    }
};
template <> struct norm_table<f16> {
    float *by, *add;
    __half *by16, *add16;

    __device__ norm_table(float *at, int channels)
        : by(at), add(at + channels), by16(reinterpret_cast<__half *>(at + 2 * channels)),
          add16(by16 + channels)
    {
    }
    __device__ void put(int channel, float times, float plus) const
    {
        by[channel] = times;
        add[channel] = plus;
        by16[channel] = __float2half_rn(times);
        add16[channel] = __float2half_rn(plus);
    }
    __device__ uint4 apply(int octet, uint4 v) const
    {
        const uint4 b = *reinterpret_cast<const uint4 *>(by16 + 8 * octet),
                    a = *reinterpret_cast<const uint4 *>(add16 + 8 * octet);
        norm_octet<f16> n;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            n.by[i] = reinterpret_cast<const __half2 *>(&b)[i];
            n.add[i] = reinterpret_cast<const __half2 *>(&a)[i];
        }
        return n(v);
    }
};
#endif

/* WM: warpgroups that multiply, 64 cells each; N: columns; STAGED: see above. */
template <class T, int TAPS, int WM, int N, int STAGED>
__global__ void __launch_bounds__(SPLIT_THREADS, WM *N <= 64 ? 2 : 1)
    split_kernel(const __grid_constant__ ic_cu_conv a)
{
#if IC_CU_WGMMA
    constexpr int WARPS = SPLIT_THREADS / 32, N8 = N / 8, BORDER = TAPS == 9 ? 1 : 0;
    constexpr int TILE_W = WM * 8, TILE_H = 8, BW = TILE_W + 2 * BORDER, CELLS = BW * (TILE_H + 2 * BORDER),
                  PLANE = CELLS * 16;
    constexpr int GROUPS = (CELLS + 15) / 16;    /* a warp brings 16 cells of two octets at a time */
    constexpr int AHEAD = IC_CU_SPLIT_AHEAD(WM); /* items of a warp */
    constexpr int ROW = N + 16;                  /* floats of a row of products */
    extern __shared__ __align__(128) char smem[];
    const int tid = threadIdx.x, lane = tid & 31, w4 = tid >> 5 & 3, warp = __shfl_sync(~0u, tid >> 5, 0),
              wg = warp >> 2;
    const int cluster = 1 << a.cluster_shift, rank = blockIdx.x & (cluster - 1),
              ti = blockIdx.x >> a.cluster_shift, sample = blockIdx.z;
    const int c16 = a.chunk16, units = c16 * TAPS, n8 = blockIdx.y * N8;

    let_next_start();
    constexpr int STAGE16 = TAPS == 9 ? 1 : 4, STAGE_UNITS = STAGE16 * TAPS,
                  STAGE = STAGE_UNITS * N8 * UNIT;
    const uint32_t bar = shared_address(smem), arrived = bar + 8, ring = shared_address(smem + a.ring_at);
    auto full = [&](int slot) { return bar + 16 + slot * 16; };
    auto empty = [&](int slot) { return bar + 24 + slot * 16; };
    float2 *sums = reinterpret_cast<float2 *>(smem + a.sums_at); /* [warp][N8] */
    const norm_table<T> table(reinterpret_cast<float *>(smem + a.scale_at), c16 * 16);
    const uint32_t area =
        shared_address(smem + a.area_at); /* in a cluster the upper byte is the block's rank */
    const uint32_t partial = shared_address(smem + a.out_at); /* [block][row][ROW] */

    if (tid == 0) {
        barrier_init(bar, 1);
        barrier_init(arrived, 1);
        for (int i = 0; STAGED && i < a.ring; i++) {
            barrier_init(full(i), 1);
            barrier_init(empty(i), WM * 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        if (!STAGED)
            barrier_expect(bar, units * N8 * UNIT);
        barrier_expect(arrived, WM * 64 * N * 4);
        for (int i = 0; STAGED && i < a.ring; i++)
            barrier_expect(full(i), STAGE);
    }
    __syncthreads();
    /* Weights; pack.c's blocks are of 128 columns, the last one of what is left. Many pieces take one
     * warp long, and all warps disturb who is beside them: they help where nobody can be. */
    const int weight_width = min(16, a.columns / 8 - (n8 & ~15));
    const char *weight =
        static_cast<const char *>(a.weight) +
        ((size_t)(n8 & ~15) * a.c16 * TAPS + (size_t)rank * units * weight_width + (n8 & 15)) * UNIT;
    if (lane == 0) {
        const int askers = 2 * a.smem > SMEM_OF_TWO ? WARPS : 1,
                  now = STAGED ? a.ring * STAGE_UNITS : units;
        if (!STAGED && weight_width == N8 && warp == 0)
            copy_bulk(ring, weight, units * N8 * UNIT, bar);
        for (int u = warp; u < now && (STAGED || weight_width != N8) && warp < askers; u += askers)
            copy_bulk(ring + u * N8 * UNIT, weight + u * weight_width * UNIT, N8 * UNIT,
                      STAGED ? full(u / STAGE_UNITS) : bar);
    }
    const ic_cu_io io = a.io[sample]; /* the table does not change during a graph */
    if (!io.psi) {                    /* nobody may write to a block that has ended */
        if (!STAGED)
            barrier_wait(bar, 0);
        for (int i = 0; STAGED && i < a.ring; i++)
            barrier_wait(full(i), 0);
        return;
    }
    __syncwarp();
    if (cluster > 1)
        cluster_arrive(); /* others may send now */

    /* ---- where things are ---- */
    const int load = a.in[0].load;
    const int ty = divided(ti, a.tiles_x), yt = ty * TILE_H, xt = (ti - ty * a.tiles_x) * TILE_W;
    const int first = rank * c16 * 16, n_first = min(max(a.in[0].cpad - first, 0) / 8, 2 * c16);
    const char *base0 = static_cast<const char *>(a.in[0].p) + (size_t)sample * a.in[0].stride + 2 * first,
               *base1 = static_cast<const char *>(a.in[1].p) + (size_t)sample * a.in[1].stride +
                        2 * (first - a.in[0].cpad);
    /* This thread's part of an item: eight lanes are eight cells, then two octets, then eight cells more.
     * from: bytes, or -1: zeros; to: in shared memory, 0: nowhere. */
    struct spot {
        int octet, from;
        uint32_t to;
        bool second; /* of the two inputs */
    };
    const int width = a.width, height = a.height, cpad0 = a.in[0].cpad, cpad1 = a.in[1].cpad,
              pairs = 2 * a.d;
    const bool norm0 = load == IC_CU_LOAD_NORM, norm1 = a.in[1].load == IC_CU_LOAD_NORM;
    auto spot_of = [&](int item) {
        spot s;
        const int pair = item / GROUPS, cell = (item - pair * GROUPS) * 16 + (lane & 7) + (lane >> 4) * 8,
                  py = cell / BW, y = yt - BORDER + py, x = xt - BORDER + cell - py * BW;
        const bool mine = cell < CELLS && pair < c16,
                   inside = mine && (unsigned)y < (unsigned)height && (unsigned)x < (unsigned)width;
        s.octet = 2 * pair + (lane >> 3 & 1);
        s.second = 2 * pair >= n_first;
        s.to = mine ? area + s.octet * PLANE + cell * 16 : 0;
        s.from = load == IC_CU_LOAD_PSI ? 4 * ((y * width + x) * pairs + first + 8 * s.octet)
                                        : 2 * ((y * width + x) * (s.second ? cpad1 : cpad0) + 8 * s.octet);
        if (!inside)
            s.from = -1;
        return s;
    };
    auto put = [&](const spot &s, uint4 v) {
        const uint32_t keep = s.from >= 0 ? ~0u : 0u; /* outside the grid are zeros, after the activation */
        if (s.to)
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(s.to), "r"(v.x & keep),
                         "r"(v.y & keep), "r"(v.z & keep), "r"(v.w & keep)
                         : "memory");
    };
    spot spots[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
        spots[k] = {0, -1, 0, false};
        if (warp + k * WARPS < c16 * GROUPS)
            spots[k] = spot_of(warp + k * WARPS);
    }

    /* The norm: some lanes an octet; where the range has both inputs, half of the threads each. */
    const bool both = n_first > 0 && n_first < 2 * c16;
    const int half = both ? tid / (SPLIT_THREADS / 2) : n_first == 0,
              share = both ? SPLIT_THREADS / 2 : SPLIT_THREADS, octets = half ? 2 * c16 - n_first : n_first;
    const ic_cu_src &source = half ? a.in[1] : a.in[0];
    const int lane_shift = min(5, 31 - __clz(share / max(octets, 1))), lanes = 1 << lane_shift,
              part = (tid & (share - 1)) & (lanes - 1), octet = (tid & (share - 1)) >> lane_shift;
    const bool normed = source.load == IC_CU_LOAD_NORM;
    const int channel0 = half ? first - a.in[0].cpad + (both ? 8 * n_first : 0) : first; /* of the source */
    const int slots = normed && octet < octets ? source.slots : 0;
    const float2 *stats = reinterpret_cast<const float2 *>(source.stats) +
                          (size_t)sample * source.stats_stride + (size_t)(channel0 / 8 + octet) * slots;
    float eps = source.eps, inv_count = source.inv_count, times = 0, plus = 0;
    if (slots && part < 8) {
        times = __ldg(source.scale + channel0 + 8 * octet + part);
        plus = __ldg(source.shift + channel0 + 8 * octet + part);
    }
    auto coefficients = [&](const float2(&seen)[AHEAD]) {
        float sum = 0, square = 0;
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            sum += seen[k].x;
            square += seen[k].y;
        }
        for (int i = part + AHEAD * lanes; i < slots; i += lanes) {
            const float2 v = __ldcg(stats + i);
            sum += v.x;
            square += v.y;
        }
        for (int m = lanes / 2; m; m >>= 1) {
            sum += __shfl_xor_sync(~0u, sum, m);
            square += __shfl_xor_sync(~0u, square, m);
        }
        const float mean = sum * inv_count, var = fmaxf(square * inv_count - mean * mean, 0.0f),
                    w = times * rsqrtf(var + eps);
        if (slots && part < 8)
            table.put(8 * ((both && half ? n_first : 0) + octet) + part, w, plus - mean * w);
        __syncthreads();
    };

    /* where this thread's four columns of a row go */
    const int four = tid % (N / 4) * 4, column = n8 * 8 + four, row0 = tid / (N / 4);
    const bool up = a.epilogue == IC_CU_STORE4;
    const int phase = up ? divided(column, a.cpad) : 0;
    int cell_bytes = 2 * a.cpad * (up ? 2 : 1), row_bytes = cell_bytes * a.width * (up ? 2 : 1);
    char *out = static_cast<char *>(a.out) + (size_t)sample * a.out_stride + 2 * (column - phase * a.cpad) +
                (phase >> 1) * row_bytes / 2 + (phase & 1) * cell_bytes / 2;
    float2 *stats_out = reinterpret_cast<float2 *>(a.stats);
    if (stats_out)
        stats_out += (size_t)sample * a.stats_stride + (size_t)(n8 + tid % N8) * a.slots + blockIdx.x;
    float4 bias = make_float4(0, 0, 0, 0);
    if (a.bias)
        bias = __ldg(reinterpret_cast<const float4 *>(a.bias + column));
    char *pooled_out = TAPS == 9 ? static_cast<char *>(a.pooled) : nullptr;
    uint2 flip = make_uint2(0, 0);
    if (pooled_out) {
        pooled_out += (size_t)sample * a.pooled_stride + 2 * column;
        flip = __ldg(reinterpret_cast<const uint2 *>(a.flip + column));
    }
    pin(base0);
    pin(base1);
    pin(stats);
    pin(eps);
    pin(inv_count);
    pin(out);
    pin(pooled_out);
    pin(row_bytes);
    pin(cell_bytes);
    pin(stats_out);
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
        pin(spots[k].from);

    if (cluster > 1)
        cluster_wait(); /* all blocks have begun */
    wait_for_previous();

    /* ---- the input: all of it is asked for before any of it is waited for ---- */
    float2 seen[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
        seen[k] = part + k * lanes < slots ? __ldcg(stats + part + k * lanes) : make_float2(0, 0);
    constexpr int FEW = 2; /* of what takes more loads; split.cu counts items */
    if (load == IC_CU_LOAD_PSI) {
        uint4 v[FEW][2];
#pragma unroll
        for (int k = 0; k < FEW; k++) {
            const int c = first + 8 * spots[k].octet;
            if (spots[k].from >= 0)
                load_psi(v[k], io.psi + spots[k].from / 4 - c, c, pairs);
        }
#pragma unroll
        for (int k = 0; k < FEW; k++) {
            const float *f = reinterpret_cast<const float *>(v[k]);
            put(spots[k], make_uint4(T::pack(f[0], f[1]), T::pack(f[2], f[3]), T::pack(f[4], f[5]),
                                     T::pack(f[6], f[7])));
        }
    } else {
        uint4 v[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            v[k] = spots[k].from >= 0 ? __ldcg(reinterpret_cast<const uint4 *>(
                                            (spots[k].second ? base1 : base0) + spots[k].from))
                                      : make_uint4(0, 0, 0, 0);
        coefficients(seen);
#pragma unroll
        for (int k0 = 0; k0 < AHEAD;
             k0 += 4) { /* four at a time, without branches: their latencies overlap */
            if (warp + k0 * WARPS >= c16 * GROUPS)
                break;
#pragma unroll
            for (int k = k0; k < k0 + 4 && k < AHEAD; k++) {
                const uint4 n = table.apply(spots[k].octet, v[k]);
                const uint32_t use = (spots[k].second ? norm1 : norm0) ? ~0u : 0u;
                v[k] = make_uint4((n.x & use) | (v[k].x & ~use), (n.y & use) | (v[k].y & ~use),
                                  (n.z & use) | (v[k].z & ~use), (n.w & use) | (v[k].w & ~use));
            }
#pragma unroll
            for (int k = k0; k < k0 + 4 && k < AHEAD; k++)
                put(spots[k], v[k]);
        }
    }
    fence_writes();
    if (!STAGED)
        barrier_wait(bar, 0); /* the weights */
    __syncthreads();

    /* ---- the products ---- */
    float acc[1][N / 2];
    const int rows_shift = (WM == 2 ? 7 : 6) - a.cluster_shift, rows = 1 << rows_shift;
    if (wg < WM) {
        const uint32_t rows0 = matrix_low(((area & 0xffffff) + wg * 8 * 16) / 16, PLANE / 16),
                       columns0 = matrix_low((ring & 0xffffff) / 16, 128 / 16);
        settle(acc);
        auto stage = [&](int c0, int n,
                         uint32_t columns) { /* 16-channel blocks from c0 on */
                                             products_begin();
#pragma unroll 1
                                             for (int c = 0; c < n; c++)
#pragma unroll
                                                 for (int tap = 0; tap < TAPS; tap++)
                                                     product<BW, UNIT / 16>(
                                                         acc[0],
                                                         rows0 + (c0 + c) * (2 * PLANE / 16) +
                                                             tap / 3 * BW + tap % 3,
                                                         columns + (c * TAPS + tap) * (N8 * UNIT / 16),
                                                         c0 + c + tap > 0, T());
                                             products_commit();
        };
        if (!STAGED)
            stage(0, c16, columns0);
        int slot = 0;
        uint32_t phase = 0;
#pragma unroll 1
        for (int i = 0; STAGED && i < a.stages; i++) {
            barrier_wait(full(slot), phase);
            stage(i * STAGE16, STAGE16, columns0 + slot * (STAGE / 16));
            if (i > 0 && i + a.ring <= a.stages) { /* the stage before has been read, its place is wanted */
                products_wait<1>();
                if (lane == 0)
                    barrier_arrive(empty(slot > 0 ? slot - 1 : a.ring - 1));
            }
            if (++slot == a.ring) {
                slot = 0;
                phase ^= 1;
            }
        }
        products_wait<0>();
        settle(acc);
        /* A lane has two columns of each octet of two rows: of two octets they go in one piece. */
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int r = wg * 64 + w4 * 16 + h * 8 + (lane >> 2), owner = r >> rows_shift;
            const uint32_t to = partial + ((rank * rows + r - owner * rows) * ROW + (lane & 3) * 4) * 4;
            const uint32_t there = shared_of(to, owner), counted = shared_of(arrived, owner);
#pragma unroll
            for (int j = 0; j < N8; j += 2) {
                const float *c = &acc[0][4 * j + 2 * h];
                if (cluster > 1)
                    send(there + j * 32, c[0], c[1], c[4], c[5], counted);
                else
                    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + j * 32), "f"(c[0]),
                                 "f"(c[1]), "f"(c[4]), "f"(c[5])
                                 : "memory");
            }
        }
    }
    if (STAGED && wg == WM) { /* who does not multiply */
        int slot = 0;
        uint32_t turn = 0;
        for (int i = a.ring; i < a.stages; i++) {
            barrier_wait(empty(slot), turn);
            if (lane == 0) {
                const char *from = weight + i * STAGE_UNITS * weight_width * UNIT;
                if (w4 == 0)
                    barrier_expect(full(slot), STAGE);
                for (int u = w4; u < STAGE_UNITS; u += 4)
                    copy_bulk(ring + slot * STAGE + u * N8 * UNIT, from + u * weight_width * UNIT,
                              N8 * UNIT, full(slot));
            }
            if (++slot == a.ring) {
                slot = 0;
                turn ^= 1;
            }
        }
    }
    if (cluster > 1)
        barrier_wait_cluster(arrived, 0);
    else
        __syncthreads();

    /* ---- this block's rows ---- */
    float sum = 0, square = 0;
    /* of octet j its columns 4 i + (0, 1) and 4 i + (2, 3), i = 0 or 1, lie in the pieces of lanes 2 i and
     * 2 i + 1 */
    float *mine =
        reinterpret_cast<float *>(smem + a.out_at) + four / 16 * 16 + four / 4 % 2 * 8 + four / 8 % 2 * 2;
    constexpr int STEP = SPLIT_THREADS / (N / 4);
    auto add_up =
        [&](auto blocks) { /* some rows at a time: their latencies overlap */
                           constexpr int C = decltype(blocks)::value, ROUNDS = WM * 64 / C / STEP,
                                         EACH = ROUNDS <= 1       ? 1
                                                : ROUNDS * C <= 4 ? ROUNDS
                                                : C >= 4          ? 1
                                                                  : 4 / C;
                           for (int r0 = row0; r0 < rows; r0 += EACH * STEP) {
                               float2 p[EACH][C][2];
#pragma unroll
                               for (int e = 0; e < EACH; e++)
#pragma unroll
                                   for (int k = 0; k < C; k++) {
                                       const float *at = mine + (k * rows + r0 + e * STEP) * ROW;
                                       p[e][k][0] = *reinterpret_cast<const float2 *>(at);
                                       p[e][k][1] = *reinterpret_cast<const float2 *>(at + 4);
                                   }
#pragma unroll
                               for (int e = 0; e < EACH; e++) {
                                   float4 v = bias;
#pragma unroll
                                   for (int k = 0; k < C; k++)
                                       v = make_float4(v.x + p[e][k][0].x, v.y + p[e][k][0].y,
                                                       v.z + p[e][k][1].x, v.w + p[e][k][1].y);
                                   const int row = rank * rows + r0 + e * STEP, y = yt + (row >> 3 & 7),
                                             x = xt + (row >> 6) * 8 + (row & 7);
                                   if (y < height && x < width) {
                                       sum += v.x + v.y + (v.z + v.w);
                                       square += fmaf(v.x, v.x, v.y * v.y) + fmaf(v.z, v.z, v.w * v.w);
                                       const uint2 packed =
                                           make_uint2(T::pack(v.x, v.y), T::pack(v.z, v.w));
                                       *reinterpret_cast<uint2 *>(out + (y * row_bytes + x * cell_bytes)) =
                                           packed;
                                       if (pooled_out) /* over what this thread alone has read */
                                           *reinterpret_cast<uint2 *>(mine + (r0 + e * STEP) * ROW) =
                                               packed;
                                   }
                               }
                           }
        };
    switch (cluster) {
    case 1: add_up(constant<1>()); break;
    case 2: add_up(constant<2>()); break;
    case 4: add_up(constant<4>()); break;
    default: add_up(constant<IC_CU_CLUSTER_MAX>());
    }
    if (stats_out) {
#pragma unroll
        for (int m = 1; m < 32; m = m == 1 ? N / 4 : 2 * m) { /* the octet's other half, then other rows */
            sum += __shfl_xor_sync(~0u, sum, m);
            square += __shfl_xor_sync(~0u, square, m);
        }
        if (lane < N / 4 && lane % 2 == 0)
            sums[warp * N8 + lane / 2] = make_float2(sum, square);
        __syncthreads();
        if (tid < N8) {
            float2 v = make_float2(0, 0);
#pragma unroll
            for (int i = 0; i < WARPS; i++) {
                v.x += sums[i * N8 + tid].x;
                v.y += sums[i * N8 + tid].y;
            }
            *stats_out = v;
        }
    }
    if (pooled_out) { /* it has statistics: a barrier is behind; split.cu sees to whole rows of 2x2 cells */
        for (int q = row0; q < rows / 4; q += STEP) {
            const int all = rank * (rows / 4) + q, y = all >> 2 & 3, x = (all >> 4) * 4 + (all & 3);
            const float *at = mine + ((all >> 4) * 64 + y * 16 + (all & 3) * 2 - rank * rows) * ROW;
            uint2 v[4];
#pragma unroll
            for (int k = 0; k < 4; k++)
                v[k] = *reinterpret_cast<const uint2 *>(at + ((k >> 1) * 8 + (k & 1)) * ROW);
            if (yt + 2 * y < height && xt + 2 * x < width)
                *reinterpret_cast<uint2 *>(pooled_out + ((yt / 2 + y) * (width / 2) + xt / 2 + x) *
                                                            cell_bytes) = pooled<T>(v, flip);
        }
    }
#endif
}

#endif
