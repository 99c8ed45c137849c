/* A decoder's first convolution with the transposed convolution before it folded in. Nothing stands between
 * the two, so that an output is linear in the smaller tensor below: of each of the four places that an
 * output can have in its 2x2 cells (its phase) it reads 2x2 cells of that tensor, with weights that are
 * sums of products of both convolutions' (fold.cu), and 3x3 cells of the skip. The up-sampled tensor, the
 * largest of all, is never made, and the whole takes two thirds of the multiplications.
 *
 * A thread block owns a tile of the smaller tensor's cells ("cells" below), eight wide, all four phases of
 * them, and 64 output channels, or 32 (PAIR). Its operands lie in shared memory as in wide.cuh, but the
 * product is the other way round: its 64 rows are output channels of a phase, its columns all cells of the
 * tile. With cells as rows and few channels as columns the same work reads shared memory all the time, and
 * loading starves. Of the skip the four phases lie apart, so that eight neighbours of a phase are a core
 * matrix. A warpgroup multiplies the two phases of an upper or a lower row. PAIR: the 64 rows are 32
 * channels of both, with zeros where a spot in shared memory is none of a phase's taps.
 *
 * LOAD warpgroups only load: their last warp asks for weights, the others bring and normalise the inputs,
 * 16 channels or a few times that at a time (a chunk), in teams, each for a buffer of its own: what is
 * written for wgmma must be fenced, which waits for all that a warp has under way, so that a warp cannot
 * bring its next chunk meanwhile. The two others only multiply and store. The first chunks, which nothing
 * else could go on beside, are brought by all warps. */
#ifndef IC_LAW_CUDA_FOLD_CUH
#define IC_LAW_CUDA_FOLD_CUH

#include "law/cuda/wide.cuh"

#if IC_CU_WGMMA
/* 8x8 matrices of rows and columns, written as rows of columns. */
__device__ inline void store_turned(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
}
#endif

#if IC_CU_WGMMA
/* Eight values into (sum, sum of squares). */
template <class T> __device__ inline void count(uint4 v, float2 &keep)
{
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 x = T::unpack(w[i]);
        keep.x += x.x + x.y;
        keep.y = fmaf(x.x, x.x, fmaf(x.y, x.y, keep.y));
    }
}
/* Lane l of a warp counted eight channels of l % 8: to sums[warp][8]. */
__device__ inline void sum_of_copies(float2 keep, float2 *sums, int warp, int lane)
{
#pragma unroll
    for (int m = 8; m < 32; m *= 2) {
        keep.x += __shfl_xor_sync(~0u, keep.x, m);
        keep.y += __shfl_xor_sync(~0u, keep.y, m);
    }
    if (lane < 8)
        sums[warp * 8 + lane] = keep;
}
#endif

template <int N> struct number {
    static constexpr int value = N;
};

#if IC_CU_WGMMA
/* norm_octet in fewer instructions, for warps that have registers for more factors. */
template <class T> struct lean_octet : norm_octet<T> {
};
template <> struct lean_octet<f16> {
    __half2 by[4], add[4], by_log2[4], add_log2[4]; /* for x, and for x / ln 2 */

    __device__ void take(const float *times, const float *plus)
    {
        constexpr float LOG2_E = 1.4426950408889634f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            by[i] = __floats2half2_rn(times[2 * i], times[2 * i + 1]);
            add[i] = __floats2half2_rn(plus[2 * i], plus[2 * i + 1]);
            by_log2[i] = __floats2half2_rn(times[2 * i] * LOG2_E, times[2 * i + 1] * LOG2_E);
            add_log2[i] = __floats2half2_rn(plus[2 * i] * LOG2_E, plus[2 * i + 1] * LOG2_E);
        }
    }
    /* ELU is max(x, 0) less 1 - 2^(x / ln 2) where that is not negative: what clamps costs no instruction so. */
    __device__ uint4 operator()(uint4 v) const
    {
        const __half2 one = __float2half2_rn(1.0f), minus = __float2half2_rn(-1.0f);
        __half2 *h = reinterpret_cast<__half2 *>(&v);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const __half2 u = __hfma2(h[i], by_log2[i], add_log2[i]);
            __half2 e;
            asm("ex2.approx.f16x2 %0, %1;"
                : "=r"(reinterpret_cast<uint32_t &>(e))
                : "r"(reinterpret_cast<const uint32_t &>(u)));
            h[i] = __hsub2(__hfma2_relu(h[i], by[i], add[i]), __hfma2_sat(e, minus, one));
        }
        return v;
    }
};
#endif

struct yes {
    static constexpr bool value = true;
};
struct no {
    static constexpr bool value = false;
};

/* ---- The kernel ------------------------------------------------------------------------------------ */

template <class T, int CELLS_N, int PAIR, int LOAD, int BLOCKS>
__global__ void __launch_bounds__((2 + LOAD) * 128, BLOCKS)
    fold_kernel(const __grid_constant__ ic_cu_fold a)
{
#if IC_CU_WGMMA
    constexpr int WM = 2, THREADS = (WM + LOAD) * 128, WARPS = THREADS / 32, BUFFERS = IC_CU_FOLD_BUFFERS,
                  LOADERS = LOAD * 4 - 1, TEAM = LOADERS / BUFFERS, /* warps */
        ARRIVALS = WARPS * LOADERS * (LOADERS - TEAM) * TEAM;       /* however many warps bring an item */
    static_assert(BUFFERS == 3, "of which all warps bring the first, those that load the second");
    constexpr int N = PAIR ? 32 : 64, N8 = N / 8, PHASES = PAIR ? 1 : 2; /* of a warpgroup's products */
    constexpr int HALVES = CELLS_N > 128 ? 2 : 1, PRODUCT_N = CELLS_N / HALVES, HALF_H = PRODUCT_N / 8;
    constexpr int TILE_W = 8, TILE_H = CELLS_N / TILE_W;
    constexpr int LOW_W = TILE_W + 2, LOW_CELLS = LOW_W * (TILE_H + 2);
    constexpr int SKIP_W = TILE_W + 1, SKIP_ONE = SKIP_W * (TILE_H + 1), SKIP_CELLS = 4 * SKIP_ONE;
    constexpr int A = 8 * UNIT; /* bytes of weights of a product */
    constexpr int LOW_STEPS = PAIR ? 6 : 8,
                  SKIP_STEPS = PAIR ? 4 : 6; /* products of a warpgroup and stage */
    constexpr int LOW_STAGE = 2 * LOW_STEPS * A, SKIP_STAGE = 2 * SKIP_STEPS * A, SLOT = LOW_STAGE;
    constexpr int OUT_ROW = 64 * 2 + 16, OUT_H = IC_CU_FOLD_OUT_H; /* cells; rows at a time */
    extern __shared__ __align__(128) char smem[];
    const int tid = threadIdx.x, lane = tid & 31, w4 = tid >> 5 & 3;
    const int warp = __shfl_sync(~0u, tid >> 5, 0), wg = warp >> 2; /* wg: also a phase's row */
    const int sample = blockIdx.z, column0 = blockIdx.y * N;
    const int cluster = 1 << a.cluster_shift, rank = blockIdx.x & (cluster - 1);

    let_next_start();
    const float *psi = a.io[sample].psi;
    float *scale = reinterpret_cast<float *>(smem + a.scale_at), *shift = scale + (a.low16 + a.skip16) * 16;
    float2 *sums = reinterpret_cast<float2 *>(smem + a.sums_at); /* [warp][8] (sum, square) */
    const uint32_t bars = shared_address(smem), ring = shared_address(smem + a.ring_at);
    auto full = [&](int slot) { return bars + slot * 16; };
    auto empty = [&](int slot) { return bars + slot * 16 + 8; };
    auto tile_full = [&](int buffer) { return full(a.ring + buffer); };
    auto tile_empty = [&](int buffer) { return empty(a.ring + buffer); };
    for (int i = warp; i < a.ring + BUFFERS && lane == 0; i += WARPS) { /* each takes 90 cycles of a warp */
        barrier_init(full(i), i < a.ring ? 1 : ARRIVALS);
        barrier_init(empty(i), i < a.ring ? cluster * WM * 4 : WM * 4);
    }
    /* where cells of the tile in shared memory lie in the grid, seen from the tile's first: y << 16 | x */
    int *table = reinterpret_cast<int *>(smem + a.table_at);
    for (int cell = tid; cell < LOW_CELLS + SKIP_CELLS; cell += THREADS) {
        int y = cell / LOW_W, x = cell - y * LOW_W;
        if (cell >= LOW_CELLS) {
            const int phase = (cell - LOW_CELLS) / SKIP_ONE, rest = cell - LOW_CELLS - phase * SKIP_ONE;
            y = rest / SKIP_W;
            x = 2 * (rest - y * SKIP_W) + (phase & 1);
            y = 2 * y + (phase >> 1);
        }
        table[cell] = y << 16 | x;
    }
    barriers_known(cluster);

    const int tile0 = blockIdx.x * a.tiles_per_block,
              tiles = min(a.tiles_per_block, a.tiles_x * a.tiles_y - tile0);
    const int low_chunks = divided(a.low16 + a.low_chunk - 1, a.low_chunk), chunks = low_chunks + a.skip16;

    /* ---- weights: one stage after another, as they lie in memory; those of a cluster's blocks are the same ---- */
    const int stages = a.low16 + 3 * a.skip16;
    const char *weight0 = static_cast<const char *>(a.weight) +
                          (size_t)blockIdx.y * (a.low16 * LOW_STAGE + a.skip16 * 3 * SKIP_STAGE);
    const int fills = tiles * stages;
    auto ask_weights = [&](int stage, int slot) {
        const bool low = stage < a.low16;
        const int bytes = low ? LOW_STAGE : SKIP_STAGE;
        if (lane == 0) {
            barrier_expect(full(slot), bytes);
            copy_bulk_shared(ring + slot * SLOT,
                             weight0 + stage * bytes + (low ? 0 : a.low16 * (LOW_STAGE - SKIP_STAGE)),
                             bytes, full(slot), a.cluster_shift, rank);
        }
    };
    /* The ring is filled by all warps, the second half of it once the first inputs are under way, which would come
     * after it. */
    auto ask_first = [&](int from, int to) {
        for (int i = from + warp; i < min(to, fills); i += WARPS)
            ask_weights(i, i); /* stages are more than the ring's */
    };
    const int ahead = (a.ring + 1) / 2;
    ask_first(0, ahead);
    const bool asks = warp == WM * 4 + LOADERS; /* for the rest */
    int fill_left = max(fills - a.ring, 0), fill_stage = a.ring, fill_slot = 0, fill_turn = 1;
    if (fill_stage >= stages)
        fill_stage -= stages;
    auto fill = [&]() {
        barrier_wait(empty(fill_slot), (fill_turn - 1) & 1);
        ask_weights(fill_stage, fill_slot);
        fill_left--;
        if (++fill_stage == stages)
            fill_stage = 0;
        if (++fill_slot == a.ring) {
            fill_slot = 0;
            fill_turn++;
        }
    };

    /* ---- inputs: item i is a chunk of a tile, in buffer i % BUFFERS ---- */
    auto buffer_at = [&](int buffer) { return smem + a.area_at + buffer * a.buffer_bytes; };
    /* Asks for an item, as one of WARPS warps that share it: a turn of a warp is 16 cells of 16 channels, eight
     * lanes are eight cells of an octet. Returns which of its cells lie in the grid. */
    auto ask = [&](auto is_low, auto warps, int member, int ti, int c0, int nc, int buffer) {
        constexpr bool LOW = decltype(is_low)::value;
        constexpr int CELLS = LOW ? LOW_CELLS : SKIP_CELLS, AT_ONCE = decltype(warps)::value * 16,
                      TURNS = (CELLS + AT_ONCE - 1) / AT_ONCE;
        static_assert(TURNS <= 64, "a bit each");
        const ic_cu_src &in = a.in[LOW ? 0 : 1];
        const int ty = divided(ti, a.tiles_x), octet = lane >> 3 & 1, height = (LOW ? 1 : 2) * a.height,
                  width = (LOW ? 1 : 2) * a.width, y0 = ty * TILE_H * (LOW ? 1 : 2) - 1,
                  x0 = (ti - ty * a.tiles_x) * TILE_W * (LOW ? 1 : 2) - 1;
        const int first = member * 16 + (lane & 7) + (lane >> 4) * 8;
        const char *from =
            static_cast<const char *>(in.p) + (size_t)sample * in.stride + 32 * c0 + 16 * octet;
        uint4 *to = reinterpret_cast<uint4 *>(buffer_at(buffer)) + octet * CELLS + first;
        const int *where = table + (LOW ? 0 : LOW_CELLS) + first;
        uint64_t in_grid = 0;
#pragma unroll 4
        for (int t = 0; t < TURNS; t++) {
            if ((t + 1) * AT_ONCE > CELLS && first + t * AT_ONCE >= CELLS)
                break;
            const int at = where[t * AT_ONCE], y = y0 + (at >> 16), x = x0 + (at & 0xffff);
            const bool inside = (unsigned)y < (unsigned)height && (unsigned)x < (unsigned)width;
            const char *cell = from + (inside ? (size_t)(unsigned)(y * width + x) * (2 * in.cpad) : 0);
            in_grid |= (uint64_t)inside << t;
#pragma unroll
            for (int k = 0; k < (LOW ? IC_CU_FOLD_CHUNK : 1); k++)
                if (k < nc)
                    copy16_or_zero(shared_address(to + t * AT_ONCE + 2 * k * CELLS), cell + 32 * k, inside);
        }
        return in_grid;
    };
    /* Once it has come, normalises it; outside the grid it stays zero, after the activation. */
    auto normalise = [&](auto is_low, auto warps, int member, int c0, int nc, int buffer,
                         uint64_t in_grid) {
        constexpr bool LOW = decltype(is_low)::value;
        constexpr int CELLS = LOW ? LOW_CELLS : SKIP_CELLS, AT_ONCE = decltype(warps)::value * 16,
                      TURNS = (CELLS + AT_ONCE - 1) / AT_ONCE;
        const int octet = lane >> 3 & 1, first = member * 16 + (lane & 7) + (lane >> 4) * 8;
        uint4 *to = reinterpret_cast<uint4 *>(buffer_at(buffer)) + octet * CELLS + first;
        const float *times = scale + (LOW ? 0 : a.low16 * 16) + 16 * c0 + 8 * octet,
                    *plus = times + (a.low16 + a.skip16) * 16;
#pragma unroll 1
        for (int k = 0; k < nc; k++, to += 2 * CELLS, times += 16, plus += 16) {
            lean_octet<T> norm;
            norm.take(times, plus);
            /* at a time: their latencies overlap */
            constexpr int PACE = TURNS % 4 == 0 ? 4 : TURNS < 3 ? TURNS : 3;
            uint64_t inside = in_grid;
#pragma unroll 1
            for (int t = 0; t < TURNS; t += PACE, inside >>= PACE) {
                uint4 v[PACE];
#pragma unroll
                for (int i = 0; i < PACE; i++)
                    v[i] = to[(TURNS % PACE ? min(t + i, TURNS - 1) : t + i) * AT_ONCE];
#pragma unroll
                for (int i = 0; i < PACE; i++)
                    v[i] = norm(v[i]);
#pragma unroll
                for (int i = 0; i < PACE; i++)
                    if (inside >> i & 1)
                        to[(t + i) * AT_ONCE] = v[i];
            }
        }
        fence_writes();
        __syncwarp();
    };
    /* fn(whether it is of the smaller tensor, its first 16 of channels, their number) */
    auto chunk_of = [&](int chunk, auto fn) {
        if (chunk < low_chunks)
            fn(yes(), chunk * a.low_chunk, min(a.low_chunk, a.low16 - chunk * a.low_chunk));
        else
            fn(no(), chunk - low_chunks, 1);
    };

    if (!psi) { /* and nothing may come to a block that has ended */
        for (int i = warp; i < min(ahead, fills); i += WARPS)
            barrier_wait(full(i), 0);
        return;
    }
    const bool half = tid >= THREADS / 2; /* of the threads an input's norm */
    const int half_tid = half ? tid - THREADS / 2 : tid, channel0 = half ? a.low16 * 16 : 0;
    const ic_cu_src &source = a.in[half];
    const float2 own = norm_own(source, half_tid);
    float2 seen[NORM_AT_ONCE];
    wait_for_previous();
    norm_ahead(source, sample, half_tid, seen);
    /* The first chunk is brought by all warps, and those for the other buffers by all that load. */
    const int started = min(BUFFERS, chunks), member = warp - WM * 4;
    const uint64_t inside = ask(yes(), number<WARPS>(), warp, tile0, 0, a.low_chunk, 0);
    copies_commit();
    ask_first(ahead, a.ring);
    norm_coefficients<NORM_AT_ONCE>(source, sample, scale + channel0, shift + channel0, half_tid,
                                    THREADS / 2, seen, &own);
    __syncthreads();
    copies_wait<0>();
    normalise(yes(), number<WARPS>(), warp, 0, a.low_chunk, 0, inside);
    if (lane == 0)
        barrier_arrive(tile_full(0), ARRIVALS / WARPS);

    if (wg >= WM) {
        if constexpr (PHASES * CELLS_N == 256)
            asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
        if (asks) {
            while (fill_left > 0)
                fill();
            return;
        }
        const int team = member / TEAM;
        auto bring = [&](auto warps, int nth, int tile, int chunk, int buffer) {
            chunk_of(chunk, [&](auto is_low, int c0, int nc) {
                const uint64_t inside = ask(is_low, warps, nth, tile0 + tile, c0, nc, buffer);
                copies_commit();
                copies_wait<0>();
                normalise(is_low, warps, nth, c0, nc, buffer, inside);
            });
            if (lane == 0)
                barrier_arrive(tile_full(buffer), ARRIVALS / decltype(warps)::value);
        };
        /* the second item together, the third by those whose own is not the next */
        bring(number<LOADERS>(), member, 0, 1, 1);
        if (started == BUFFERS && team > 0)
            bring(number<LOADERS - TEAM>(), member - TEAM, 0, 2, 2);
        if (team >= BUFFERS)
            return;
        int tile = 0, turn = team < started ? 1 : 0, chunk = team + turn * BUFFERS;
        for (;; turn++, chunk += BUFFERS) {
            while (chunk >= chunks) {
                chunk -= chunks;
                tile++;
            }
            if (tile >= tiles)
                break;
            if (turn > 0)
                barrier_wait(tile_empty(team), (turn - 1) & 1);
            bring(number<TEAM>(), member % TEAM, tile, chunk, team);
        }
        return;
    }
    if constexpr (PHASES * CELLS_N == 256)
        asm volatile("setmaxnreg.inc.sync.aligned.u32 184;");

    float acc[PHASES * HALVES][PRODUCT_N / 2];
    float2 keep = make_float2(0, 0); /* (sum, square) of the eight channels that this thread stores */
    int slot = 0, buffer = 0;
    uint32_t phase = 0, buffer_phase = 0;

    for (int tile = 0; tile < tiles; tile++) {
        int add = 0, held = -1, held_tile = -1; /* what the products before the last ones read */
        auto release = [&]() {
            __syncwarp();
            if (held >= 0)
                barrier_arrive_all(empty(held), cluster, lane);
            if (lane == 0 && held_tile >= 0)
                barrier_arrive(tile_empty(held_tile));
            held_tile = -1;
        };
        /* Where this warpgroup's of the next stage are, once they have come. */
        auto weights = [&](int steps) {
            barrier_wait(full(slot), phase);
            products_begin();
            return matrix_low((ring + slot * SLOT + wg * steps * A) / 16, 128 / 16);
        };
        auto done = [&]() {
            add = 1;
            products_commit();
            products_wait<1>();
            release();
            held = slot;
            if (++slot == a.ring) {
                slot = 0;
                phase ^= 1;
            }
        };
        settle(acc);
        for (int chunk = 0; chunk < chunks; chunk++) {
            const uint32_t at = shared_address(buffer_at(buffer)) / 16;
            barrier_wait(tile_full(buffer), buffer_phase);
            if (chunk < low_chunks) {
                uint32_t cells = matrix_low(at + wg * LOW_W, LOW_CELLS);
                const int nc = min(a.low_chunk, a.low16 - chunk * a.low_chunk);
                for (int k = 0; k < nc; k++, cells += 2 * LOW_CELLS) {
                    const uint32_t w = weights(LOW_STEPS);
#pragma unroll
                    for (int t = 0; t < LOW_STEPS; t++) {
                        /* PAIR: [2 rows][3 columns]; else [2 rows][2 columns][phase] */
                        const int p = PAIR ? 0 : t & 1, y = PAIR ? t / 3 : t >> 2,
                                  x = PAIR ? t % 3 : (t >> 1 & 1) + p;
#pragma unroll
                        for (int h = 0; h < HALVES; h++)
                            product<UNIT / 16, LOW_W>(acc[p * HALVES + h], w + t * A / 16,
                                                      cells + (y + h * HALF_H) * LOW_W + x,
                                                      t < PHASES ? add : 1, T());
                    }
                    done();
                }
            } else {
                const uint32_t cells = matrix_low(at, SKIP_CELLS);
#pragma unroll 1
                for (int ky = 0; ky < 3; ky++) {
                    const int y = wg + ky;
                    const uint32_t w = weights(SKIP_STEPS),
                                   row = cells + (y & 1) * 2 * SKIP_ONE + (y >> 1) * SKIP_W;
#pragma unroll
                    for (int t = 0; t < SKIP_STEPS; t++) { /* PAIR: [4 columns]; else [3 columns][phase] */
                        const int p = PAIR ? 0 : t & 1, x = PAIR ? t : (t >> 1) + p;
#pragma unroll
                        for (int h = 0; h < HALVES; h++)
                            product<UNIT / 16, SKIP_W>(
                                acc[p * HALVES + h], w + t * A / 16,
                                row + (x & 1) * SKIP_ONE + (x >> 1) + h * HALF_H * SKIP_W, 1, T());
                    }
                    done();
                }
            }
            held_tile = buffer; /* free when the last stage is */
            if (++buffer == BUFFERS) {
                buffer = 0;
                buffer_phase ^= 1;
            }
        }
        /* ---- epilogue, as tall.cuh's: this warp has 16 channels, of which this lane two, lane / 4 and that + 8 ---- */
        const int ti = tile0 + tile, ty = divided(ti, a.tiles_x), y0 = ty * TILE_H,
                  x0 = (ti - ty * a.tiles_x) * TILE_W, xa = x0 + (lane & 3) * 2; /* its cells: xa, xa + 1 */
        const int edge = wg == 0 ? 0 : a.height - 1;                             /* its biases differ */
        float bias[2][2][2]; /* of a phase: [at the edge][cell][channel] */
        auto bias_of = [&](int p) {
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int px = PAIR ? w4 >> 1 : p,
                              bx = px == 0 ? (xa + c == 0 ? 0 : 1) : (xa + c == a.width - 1 ? 2 : 1),
                              by = e == 0 ? 1 : 2 * wg;
                    const float *b =
                        a.bias + (by * 3 + bx) * a.cpad + column0 + (PAIR ? w4 & 1 : w4) * 16 + lane / 4;
                    bias[e][c][0] = __ldg(b);
                    bias[e][c][1] = __ldg(b + 8);
                }
        };
        bias_of(0);
#pragma unroll
        for (int i = 0; i < 8;
             i++) /* waited for beside the last products: or the compiler asks for it after them */
            asm volatile("" : "+f"(bias[i >> 2][i >> 1 & 1][i & 1]));
        products_wait<0>();
        settle(acc);
        release();
        if (cluster > 1 && tile == tiles - 1)
            cluster_arrive(); /* sends nothing any more */

        /* 128 bytes of a cell: a phase's 64 channels, or PAIR: two phases' 32 */
        const int cell_bytes = 2 * a.cpad, row_bytes = cell_bytes * 2 * a.width;
        char *mine = smem + a.out_at + wg * TILE_W * OUT_H * OUT_ROW;
        const uint32_t to = shared_address(mine) + w4 * 32 + ((lane >> 4) * 8 + (lane & 7)) * OUT_ROW +
                            (lane >> 3 & 1) * 16;
        const int copy = tid & 127, copy_y = copy >> 6, copy_x = copy >> 3 & 7, piece = copy & 7;
        const char *copy_from = mine + (copy >> 3) * OUT_ROW + piece * 16;
        char *out = static_cast<char *>(a.out) + (size_t)sample * a.out_stride + 2 * column0 +
                    (PAIR ? (piece >> 2) * cell_bytes + (piece & 3) * 16 : piece * 16) + wg * row_bytes +
                    (x0 + copy_x) * 2 * cell_bytes;
        constexpr int PARTS = TILE_H / OUT_H; /* of a phase */
#pragma unroll 1
        for (int part = 0; part < PHASES * PARTS; part++) {
            const int j0 = part % PARTS * OUT_H;
#pragma unroll
            for (int q = 0; q < PHASES * PARTS; q++)
                if (q == part)
#pragma unroll
                    for (int j = q % PARTS * OUT_H; j < (q % PARTS + 1) * OUT_H;
                         j += 2) { /* two rows of cells */
                        const int p = q / PARTS;
                        uint32_t packed[4];
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            const float *sum = &acc[p * HALVES + j / HALF_H][4 * ((j + h) % HALF_H)];
                            const bool at_edge = y0 + j + h == edge;
                            float v[4]; /* [channel][cell] */
#pragma unroll
                            for (int i = 0; i < 4; i++)
                                v[i] = sum[i] + (at_edge ? bias[1][i & 1][i >> 1] : bias[0][i & 1][i >> 1]);
                            packed[2 * h] = T::pack(v[0], v[1]);
                            packed[2 * h + 1] = T::pack(v[2], v[3]);
                        }
                        store_turned(to + (j % OUT_H) * 8 * OUT_ROW, packed[0], packed[1], packed[2],
                                     packed[3]);
                    }
            if (PHASES == 2 && part == PARTS - 1)
                bias_of(1);
            asm volatile("bar.sync %0, 128;" ::"r"(2 + wg) : "memory");
            char *row = out + part / PARTS * cell_bytes;
#pragma unroll
            for (int k = 0; k < OUT_H; k += 2) {
                const int y = y0 + j0 + k + copy_y;
                if (y < a.height && x0 + copy_x < a.width) {
                    const uint4 v = *reinterpret_cast<const uint4 *>(copy_from + k * 8 * OUT_ROW);
                    *reinterpret_cast<uint4 *>(row + 2 * y * row_bytes) = v;
                    count<T>(v, keep);
                }
            }
            asm volatile("bar.sync %0, 128;" ::"r"(2 + wg) : "memory");
        }
    }
    if (cluster > 1)
        cluster_wait(); /* nobody may send to a block that has ended */
    sum_of_copies(keep, sums, warp, lane);
    asm volatile("bar.sync 1, %0;" ::"n"(WM * 128) : "memory"); /* of the warps that multiply */
    if (tid < N8) {
        float2 v = make_float2(0, 0);
#pragma unroll
        for (int i = 0; i < WM * 4 * (PAIR ? 2 : 1); i++) { /* PAIR: of both phases */
            const float2 one = sums[(i % (WM * 4)) * 8 + tid + i / (WM * 4) * 4];
            v.x += one.x;
            v.y += one.y;
        }
        reinterpret_cast<float2 *>(
            a.stats)[(size_t)sample * a.stats_stride + (size_t)(column0 / 8 + tid) * a.slots + blockIdx.x] =
            v;
    }
#endif
}

#endif
