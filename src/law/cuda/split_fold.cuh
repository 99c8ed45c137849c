/* A transposed convolution and the 3x3 convolution that reads it, made one as in fold.cuh, for few cells: what counts
 * is the time from the launch before to the launch after, so that all is done as in split.cuh.
 *
 * A cluster owns a tile of 8x8 cells of the smaller tensor ("cells" below) and 64 columns; column n is output channel
 * n % cpad of phase n / cpad. Each of its blocks has a range of both inputs' channels, brings and normalises all of
 * it at once, and multiplies it by its weights (fold.cu made them): 2x2 cells of the smaller tensor and 3x3 of the
 * skip for a phase. A warpgroup has 32 columns, which are of one phase. Of the skip the four phases lie apart, so that
 * eight neighbours of a phase are a core matrix. */
#ifndef IC_LAW_CUDA_SPLIT_FOLD_CUH
#define IC_LAW_CUDA_SPLIT_FOLD_CUH

#include "law/cuda/split.cuh"

/* AHEAD: pieces of the inputs that a warp asks for at once; ROUNDS: how often. With more than one, weights come in
 * stages too (as in split.cuh), and two blocks have room on a multiprocessor where one had. */
template <class T, int AHEAD, int ROUNDS, int BLOCKS>
__global__ void __launch_bounds__(SPLIT_THREADS, BLOCKS)
    split_fold_kernel(const __grid_constant__ ic_cu_fold a)
{
#if IC_CU_WGMMA
    constexpr int WARPS = SPLIT_THREADS / 32, TILE = 8, ROWS = TILE * TILE, N = 64, N8 = N / 8,
                  ROW = N + 16;
    constexpr int LOW_W = TILE + 2, LOW_CELLS = LOW_W * LOW_W, LOW_GROUPS = (LOW_CELLS + 15) / 16;
    constexpr int SKIP_W = TILE + 1, SKIP_ONE = SKIP_W * SKIP_W, SKIP_CELLS = 4 * SKIP_ONE,
                  SKIP_GROUPS = (SKIP_CELLS + 15) / 16;
    constexpr int TAP = N8 * UNIT; /* bytes of weights */
    constexpr bool STAGED = ROUNDS > 1;
    constexpr int LOW_STAGE = 4 * TAP, SKIP_STAGE = 3 * TAP, SLOT = LOW_STAGE;
    extern __shared__ __align__(128) char smem[];
    const int tid = threadIdx.x, lane = tid & 31, w4 = tid >> 5 & 3, warp = __shfl_sync(~0u, tid >> 5, 0),
              wg = warp >> 2;
    const int cluster = 1 << a.cluster_shift, rank = blockIdx.x & (cluster - 1),
              ti = blockIdx.x >> a.cluster_shift, sample = blockIdx.z, n8 = blockIdx.y * N8;
    const int low16 = a.low16 >> a.cluster_shift, skip16 = a.skip16 >> a.cluster_shift;

    let_next_start();
    const uint32_t low_bar = shared_address(smem), skip_bar = low_bar + 8, arrived = low_bar + 16,
                   ring = shared_address(smem + a.ring_at);
    float2 *sums = reinterpret_cast<float2 *>(smem + a.sums_at); /* [warp][N8] */
    const norm_table<T> table(reinterpret_cast<float *>(smem + a.scale_at), (low16 + skip16) * 16);
    const uint32_t area = shared_address(smem + a.area_at),
                   partial = shared_address(smem + a.out_at); /* [block][row][ROW] */

    auto full = [&](int slot) { return low_bar + 32 + slot * 16; };
    auto empty = [&](int slot) { return low_bar + 40 + slot * 16; };
    const int low_bytes = low16 * 4 * TAP, skip_bytes = skip16 * 9 * TAP, stages = low16 + 3 * skip16;
    const char *low_from = static_cast<const char *>(a.weight) +
                           (size_t)blockIdx.y * (a.low16 * 4 + a.skip16 * 9) * TAP + rank * low_bytes,
               *skip_from = low_from + (a.low16 * 4 * TAP - rank * low_bytes) + rank * skip_bytes;
    auto ask = [&](int stage, int slot) {
        const int bytes = stage < low16 ? LOW_STAGE : SKIP_STAGE;
        barrier_expect(full(slot), bytes);
        copy_bulk(ring + slot * SLOT,
                  stage < low16 ? low_from + stage * LOW_STAGE : skip_from + (stage - low16) * SKIP_STAGE,
                  bytes, full(slot));
    };
    if (tid == 0) {
        barrier_init(low_bar, 1);
        barrier_init(skip_bar, 1);
        barrier_init(arrived, 1);
        for (int i = 0; STAGED && i < a.ring; i++) {
            barrier_init(full(i), 1);
            barrier_init(empty(i), WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        if (!STAGED) {
            barrier_expect(low_bar, low_bytes);
            copy_bulk(ring, low_from, low_bytes, low_bar);
            barrier_expect(skip_bar, skip_bytes);
            copy_bulk(ring + low_bytes, skip_from, skip_bytes, skip_bar);
        }
        for (int i = 0; STAGED && i < a.ring; i++)
            ask(i, i);
        barrier_expect(arrived, ROWS * N * 4);
    }
    __syncthreads();
    const ic_cu_io io = a.io[sample]; /* the table does not change during a graph */
    if (!io.psi) {                    /* nobody may write to a block that has ended */
        if (!STAGED) {
            barrier_wait(low_bar, 0);
            barrier_wait(skip_bar, 0);
        }
        for (int i = 0; STAGED && i < a.ring; i++)
            barrier_wait(full(i), 0);
        return;
    }
    if (cluster > 1)
        cluster_arrive(); /* others may send now */

    /* ---- where things are ---- */
    const int ty = divided(ti, a.tiles_x), yt = ty * TILE, xt = (ti - ty * a.tiles_x) * TILE;
    const int first0 = rank * low16 * 16, first1 = rank * skip16 * 16; /* channels */
    const char *base0 = static_cast<const char *>(a.in[0].p) + (size_t)sample * a.in[0].stride + 2 * first0,
               *base1 = static_cast<const char *>(a.in[1].p) + (size_t)sample * a.in[1].stride + 2 * first1;
    /* This thread's part of an item, as in split.cuh: eight lanes are eight cells, then two octets, then eight cells
     * more. Items of the smaller tensor come first. */
    struct spot {
        int octet, from;
        uint32_t to;
        bool second; /* of the two inputs */
    };
    const int width = a.width, height = a.height, cpad0 = a.in[0].cpad, cpad1 = a.in[1].cpad;
    const int low_items = low16 * LOW_GROUPS, items = low_items + skip16 * SKIP_GROUPS;
    const uint32_t skip_area = area + low16 * 2 * LOW_CELLS * 16;
    auto spot_of = [&](int item) {
        spot s;
        s.second = item >= low_items;
        const int of = s.second ? item - low_items : item,
                  pair = s.second ? of / SKIP_GROUPS : of / LOW_GROUPS,
                  group = of - pair * (s.second ? SKIP_GROUPS : LOW_GROUPS),
                  cell = group * 16 + (lane & 7) + (lane >> 4) * 8, octet = 2 * pair + (lane >> 3 & 1);
        int y, x;
        if (s.second) {
            const int phase = cell / SKIP_ONE, rest = cell - phase * SKIP_ONE, py = rest / SKIP_W;
            y = 2 * (yt + py) - 1 + (phase >> 1);
            x = 2 * (xt + rest - py * SKIP_W) - 1 + (phase & 1);
        } else {
            const int py = cell / LOW_W;
            y = yt - 1 + py;
            x = xt - 1 + cell - py * LOW_W;
        }
        const int h = s.second ? 2 * height : height, w = s.second ? 2 * width : width,
                  cells = s.second ? SKIP_CELLS : LOW_CELLS;
        const bool mine = cell < cells,
                   inside = mine && (unsigned)y < (unsigned)h && (unsigned)x < (unsigned)w;
        s.octet = octet + (s.second ? 2 * low16 : 0);
        s.to = mine ? (s.second ? skip_area : area) + (octet * cells + cell) * 16 : 0;
        s.from = inside ? 2 * ((y * w + x) * (s.second ? cpad1 : cpad0) + 8 * octet) : -1;
        return s;
    };
    spot spots[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
        spots[k] = {0, -1, 0, false};
        if (warp + k * WARPS < items)
            spots[k] = spot_of(warp + k * WARPS);
    }

    /* The norm: half of the threads an input, some lanes an octet. */
    const int half = tid / (SPLIT_THREADS / 2), octets = 2 * (half ? skip16 : low16);
    const ic_cu_src &source = half ? a.in[1] : a.in[0];
    const int share = tid & (SPLIT_THREADS / 2 - 1),
              lane_shift = min(5, 31 - __clz(SPLIT_THREADS / 2 / octets)), lanes = 1 << lane_shift,
              part = share & (lanes - 1), octet = share >> lane_shift;
    const int channel0 = half ? first1 : first0, slots = octet < octets ? source.slots : 0;
    const float2 *stats = reinterpret_cast<const float2 *>(source.stats) +
                          (size_t)sample * source.stats_stride + (size_t)(channel0 / 8 + octet) * slots;
    float eps = source.eps, inv_count = source.inv_count, times = 0, plus = 0;
    if (slots && part < 8) {
        times = __ldg(source.scale + channel0 + 8 * octet + part);
        plus = __ldg(source.shift + channel0 + 8 * octet + part);
    }

    /* where this thread's four columns of a row go */
    const int four = tid % (N / 4) * 4, column = n8 * 8 + four, row0 = tid / (N / 4);
    const int phase = divided(column, a.cpad), channel = column - phase * a.cpad, py = phase >> 1,
              px = phase & 1;
    int cell_bytes = 4 * a.cpad,
        row_bytes = 2 * cell_bytes * a.width; /* of the smaller tensor's cells and rows */
    char *out = static_cast<char *>(a.out) + (size_t)sample * a.out_stride + 2 * channel +
                py * row_bytes / 2 + px * cell_bytes / 2;
    const int edge_y = py ? height - 1 : 0, edge_x = px ? width - 1 : 0; /* biases differ there */
    float4 bias[2][2];
#pragma unroll
    for (int y = 0; y < 2; y++)
#pragma unroll
        for (int x = 0; x < 2; x++)
            bias[y][x] = __ldg(reinterpret_cast<const float4 *>(
                a.bias + ((y ? 2 * py : 1) * 3 + (x ? 2 * px : 1)) * a.cpad + channel));
    /* Where both halves of the columns are the same channels, their sums are one. */
    const bool twice = a.cpad * 2 == N;
    const int phase_out = divided(n8 + tid % N8, a.cpad / 8), part_out = twice ? blockIdx.y : phase_out,
              parts_out = twice ? 2 : 4;
    float2 *stats_out = reinterpret_cast<float2 *>(a.stats) + (size_t)sample * a.stats_stride +
                        (size_t)(n8 + tid % N8 - phase_out * (a.cpad / 8)) * a.slots +
                        blockIdx.x * parts_out + part_out;
    pin(base0);
    pin(base1);
    pin(stats);
    pin(eps);
    pin(inv_count);
    pin(out);
    pin(row_bytes);
    pin(cell_bytes);
    pin(stats_out);
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
        pin(spots[k].from);

    if (cluster > 1)
        cluster_wait(); /* all blocks have begun */
    wait_for_previous();

    /* ---- the inputs: all of them are asked for before any is waited for ---- */
    constexpr int SEEN = 8;
    float2 seen[SEEN];
#pragma unroll
    for (int k = 0; k < SEEN; k++)
        seen[k] = part + k * lanes < slots ? __ldcg(stats + part + k * lanes) : make_float2(0, 0);
    uint4 v[AHEAD];
    auto fetch = [&]() {
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            v[k] = spots[k].from >= 0 ? __ldcg(reinterpret_cast<const uint4 *>(
                                            (spots[k].second ? base1 : base0) + spots[k].from))
                                      : make_uint4(0, 0, 0, 0);
    };
    fetch();
    {
        float sum = 0, square = 0;
#pragma unroll
        for (int k = 0; k < SEEN; k++) {
            sum += seen[k].x;
            square += seen[k].y;
        }
        for (int i = part + SEEN * lanes; i < slots; i += lanes) {
            const float2 s = __ldcg(stats + i);
            sum += s.x;
            square += s.y;
        }
        for (int m = lanes / 2; m; m >>= 1) {
            sum += __shfl_xor_sync(~0u, sum, m);
            square += __shfl_xor_sync(~0u, square, m);
        }
        const float mean = sum * inv_count, var = fmaxf(square * inv_count - mean * mean, 0.0f),
                    w = times * rsqrtf(var + eps);
        if (slots && part < 8)
            table.put(8 * (half * 2 * low16 + octet) + part, w, plus - mean * w);
    }
    __syncthreads();
#pragma unroll 1
    for (int round = 0;; round++) {
#pragma unroll
        for (int k0 = 0; k0 < AHEAD;
             k0 += 4) { /* four at a time, without branches: their latencies overlap */
            if (warp + (round * AHEAD + k0) * WARPS >= items)
                break;
#pragma unroll
            for (int k = k0; k < k0 + 4 && k < AHEAD; k++)
                v[k] = table.apply(spots[k].octet, v[k]);
#pragma unroll
            for (int k = k0; k < k0 + 4 && k < AHEAD; k++) {
                const uint32_t keep =
                    spots[k].from >= 0 ? ~0u : 0u; /* outside are zeros, after the activation */
                if (spots[k].to)
                    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(spots[k].to),
                                 "r"(v[k].x & keep), "r"(v[k].y & keep), "r"(v[k].z & keep),
                                 "r"(v[k].w & keep)
                                 : "memory");
            }
        }
        if (round + 1 == ROUNDS)
            break;
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const int item = warp + ((round + 1) * AHEAD + k) * WARPS;
            spots[k] = {0, -1, 0, false};
            if (item < items)
                spots[k] = spot_of(item);
        }
        fetch();
    }
    fence_writes();
    if (!STAGED)
        barrier_wait(low_bar, 0);
    __syncthreads();

    /* ---- the products ---- */
    {
        float acc[1][16];
        const int mine = divided(n8 * 8 + wg * 32, a.cpad), my = mine >> 1, mx = mine & 1; /* its phase */
        /* in a cluster the upper byte of an address is the block's rank */
        const uint32_t cells0 = (area & 0xffffff) / 16,
                       low = matrix_low(cells0 + my * LOW_W + mx, LOW_CELLS),
                       skip = matrix_low(cells0 + low16 * 2 * LOW_CELLS, SKIP_CELLS);
        uint32_t columns = matrix_low((ring & 0xffffff) / 16 + wg * (4 * UNIT / 16), 128 / 16);
        uint32_t row_of[3], column_of[3]; /* of the skip's taps */
#pragma unroll
        for (int k = 0; k < 3; k++) {
            row_of[k] = ((my + k) & 1) * 2 * SKIP_ONE + ((my + k) >> 1) * SKIP_W;
            column_of[k] = ((mx + k) & 1) * SKIP_ONE + ((mx + k) >> 1);
        }
        auto low_taps = [&](int c, uint32_t columns) {
#pragma unroll
            for (int tap = 0; tap < 4; tap++)
                product<LOW_W, UNIT / 16>(acc[0], low + c * 2 * LOW_CELLS + (tap >> 1) * LOW_W + (tap & 1),
                                          columns + tap * (TAP / 16), c + tap > 0, T());
        };
        auto skip_taps = [&](int c, uint32_t row, uint32_t columns) {
#pragma unroll
            for (int kx = 0; kx < 3; kx++)
                product<SKIP_W, UNIT / 16>(acc[0], skip + c * 2 * SKIP_CELLS + row + column_of[kx],
                                           columns + kx * (TAP / 16), 1, T());
        };
        settle(acc);
        if constexpr (!STAGED) {
            products_begin();
#pragma unroll 1
            for (int c = 0; c < low16; c++, columns += LOW_STAGE / 16)
                low_taps(c, columns);
            products_commit();
            barrier_wait(skip_bar, 0);
            products_begin();
#pragma unroll 1
            for (int c = 0; c < skip16; c++)
#pragma unroll
                for (int ky = 0; ky < 3; ky++, columns += SKIP_STAGE / 16)
                    skip_taps(c, row_of[ky], columns);
            products_commit();
        } else {
            int slot = 0, before = -1, stage = 0;
            uint32_t turn = 0, turn_before = 0;
            auto begin = [&]() {
                barrier_wait(full(slot), turn);
                products_begin();
                return columns + slot * (SLOT / 16);
            };
            auto done = [&]() {
                products_commit();
                products_wait<1>();
                const int next =
                    stage - 1 + a.ring; /* takes the place of the stage before, which has been read */
                if (before >= 0 && next < stages) {
                    if (lane == 0)
                        barrier_arrive(empty(before));
                    if (warp == 0) {
                        barrier_wait(empty(before), turn_before);
                        if (lane == 0)
                            ask(next, before);
                        __syncwarp();
                    }
                }
                stage++;
                before = slot;
                turn_before = turn;
                if (++slot == a.ring) {
                    slot = 0;
                    turn ^= 1;
                }
            };
#pragma unroll 1
            for (int c = 0; c < low16; c++) {
                low_taps(c, begin());
                done();
            }
#pragma unroll 1
            for (int c = 0; c < skip16; c++)
#pragma unroll 1
                for (int ky = 0; ky < 3; ky++) {
                    const int y = my + ky;
                    skip_taps(c, (y & 1) * 2 * SKIP_ONE + (y >> 1) * SKIP_W, begin());
                    done();
                }
        }
        products_wait<0>();
        settle(acc);
        /* A lane has two columns of each octet of two rows: of two octets they go in one piece. */
        const int rows_shift = 6 - a.cluster_shift;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int r = w4 * 16 + h * 8 + (lane >> 2), owner = r >> rows_shift;
            const uint32_t to =
                partial + ((((rank - owner) << rows_shift) + r) * ROW + wg * 32 + (lane & 3) * 4) * 4;
            const uint32_t there = shared_of(to, owner), counted = shared_of(arrived, owner);
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
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
    if (cluster > 1)
        barrier_wait_cluster(arrived, 0);
    else
        __syncthreads();

    /* ---- this block's rows ---- */
    float sum = 0, square = 0;
    /* of octet j its columns 4 i + (0, 1) and 4 i + (2, 3), i = 0 or 1, lie in the pieces of lanes 2 i and
     * 2 i + 1 */
    const float *parts = reinterpret_cast<const float *>(smem + a.out_at) + four / 16 * 16 +
                         four / 4 % 2 * 8 + four / 8 % 2 * 2;
    constexpr int STEP = SPLIT_THREADS / (N / 4);
    auto add_up = [&](auto blocks) {
        constexpr int C = decltype(blocks)::value, EACH = ROWS / C >= STEP ? ROWS / C / STEP : 1;
        const int first = rank * (ROWS / C);
        if (row0 >= ROWS / C)
            return;
        float2 p[EACH][C][2]; /* all at once: their latencies overlap */
#pragma unroll
        for (int e = 0; e < EACH; e++)
#pragma unroll
            for (int k = 0; k < C; k++) {
                const float *at = parts + (k * (ROWS / C) + row0 + e * STEP) * ROW;
                p[e][k][0] = *reinterpret_cast<const float2 *>(at);
                p[e][k][1] = *reinterpret_cast<const float2 *>(at + 4);
            }
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int row = first + row0 + e * STEP, y = yt + (row >> 3), x = xt + (row & 7);
            const bool ey = y == edge_y, ex = x == edge_x;
            const float4 b0 = ex ? bias[0][1] : bias[0][0], b1 = ex ? bias[1][1] : bias[1][0];
            float4 s = ey ? b1 : b0;
#pragma unroll
            for (int k = 0; k < C; k++)
                s = make_float4(s.x + p[e][k][0].x, s.y + p[e][k][0].y, s.z + p[e][k][1].x,
                                s.w + p[e][k][1].y);
            if (y < height && x < width) {
                sum += s.x + s.y + (s.z + s.w);
                square += fmaf(s.x, s.x, s.y * s.y) + fmaf(s.z, s.z, s.w * s.w);
                *reinterpret_cast<uint2 *>(out + (y * row_bytes + x * cell_bytes)) =
                    make_uint2(T::pack(s.x, s.y), T::pack(s.z, s.w));
            }
        }
    };
    switch (cluster) {
    case 1: add_up(constant<1>()); break;
    case 2: add_up(constant<2>()); break;
    case 4: add_up(constant<4>()); break;
    default: add_up(constant<IC_CU_CLUSTER_MAX>());
    }
#pragma unroll
    for (int m = 1; m < 32; m = m == 1 ? N / 4 : 2 * m) { /* the octet's other half, then other rows */
        sum += __shfl_xor_sync(~0u, sum, m);
        square += __shfl_xor_sync(~0u, square, m);
    }
    if (lane < N / 4 && lane % 2 == 0)
        sums[warp * N8 + lane / 2] = make_float2(sum, square);
    __syncthreads();
    if (tid < (twice ? N8 / 2 : N8)) {
        float2 s = make_float2(0, 0);
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            s.x += sums[i * N8 + tid].x;
            s.y += sums[i * N8 + tid].y;
        }
#pragma unroll
        for (int i = 0; i < WARPS && twice; i++) {
            s.x += sums[i * N8 + N8 / 2 + tid].x;
            s.y += sums[i * N8 + N8 / 2 + tid].y;
        }
        *stats_out = s;
    }
#endif
}

#endif
