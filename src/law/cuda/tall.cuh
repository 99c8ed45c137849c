/* The largest 3x3 convolutions on Hopper: products of 64 output channels and 256 cells.
 *
 * A product of 64 x 16 and 16 x N reads both from shared memory, in N / 2 cycles: with N 128, as wide.cuh
 * and fold.cuh have it, that is three quarters of what shared memory gives, and what is brought there,
 * normalised there and stored there shares the rest. With N 256 it is five eighths, and weights last twice
 * as long. That costs half of the registers, so that only one warpgroup is left to load.
 *
 * Rows are output channels, as in fold.cuh, and columns a tile of 8 x 32 cells; core matrices, barriers and
 * the ring of weights are those of wide.cuh. Two warpgroups multiply and store: each has 64 of a block's 128
 * output channels (IC_CU_TALL_128); or, of 64, 32 of a tile's 64 rows (IC_CU_TALL_64). For few cells there are
 * the same with tiles of 8 x 16 (IC_CU_TALL_128_FEW), and with 64 output channels of which each warpgroup has
 * half of the sum (IC_CU_TALL_64_FEW).
 *
 * Each warp of the rest loads by itself, every TEAMS-th chunk of the input's channels into a buffer of its own;
 * the last one asks for weights besides, whenever it looks and a place in the ring is free. One warp takes 5 us
 * for a chunk, so that the first ones, which nothing else could go on beside, are brought by all warps. */
#ifndef IC_LAW_CUDA_TALL_CUH
#define IC_LAW_CUDA_TALL_CUH

#include "law/cuda/fold.cuh"

#if IC_CU_WGMMA
__device__ inline bool barrier_passed(uint32_t at, uint32_t parity)
{
    uint32_t passed;
    asm volatile("{\n\t.reg .pred p;\n\t"
                 "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                 "selp.u32 %0, 1, 0, p;\n\t}"
                 : "=r"(passed)
                 : "r"(at), "r"(parity)
                 : "memory");
    return passed;
}
#endif

/* LOADS: of 16 bytes for eight channels of a cell: 1: as stored, 2: of psi. */
template <class T, int CUT, int LOADS>
__global__ void __launch_bounds__(IC_CU_TALL_THREADS(CUT), 1)
    tall_kernel(const __grid_constant__ ic_cu_conv a)
{
#if IC_CU_WGMMA
    constexpr int WM = 2, THREADS = IC_CU_TALL_THREADS(CUT), WARPS = THREADS / 32,
                  TEAMS = IC_CU_TALL_TEAMS(CUT);
    constexpr bool TWO = CUT == IC_CU_TALL_64, /* warpgroups have other cells, */
        SUM = CUT == IC_CU_TALL_64_FEW;        /* other inputs, or else other output channels */
    constexpr int WG_H = IC_CU_TALL_WG_H(CUT), N = 8 * WG_H, TILE_W = 8, TILE_H = IC_CU_TALL_H(CUT),
                  BW = TILE_W + 2, CELLS = BW * (TILE_H + 2);
    constexpr int CHUNK16 = IC_CU_TALL_CHUNK16(CUT), OCTETS = 2 * CHUNK16; /* of channels */
    /* a warp brings cells by fours of STEP, planes are whole fours */
    constexpr int STEP = 32 / OCTETS, PLANE = (CELLS + 4 * STEP - 1) / (4 * STEP) * (4 * STEP),
                  PIECES = PLANE / (4 * STEP);
    /* of weights: three taps of 16 inputs, SUM: of 32, first the one 16 */
    constexpr int ROWS64 = 8 * UNIT, TAP = (TWO || SUM ? 1 : 2) * ROWS64, STAGE = (SUM ? 2 : 1) * 3 * TAP;
    constexpr int OUT_ROW = 64 * 2 + 16, OUT_H = 8; /* cells; rows at a time */
    constexpr int ROWS_OUT = SUM ? WG_H / 2 : WG_H; /* that a warpgroup stores */
    constexpr int PART = N / 4 * 128 * 4;           /* bytes, SUM: what a warpgroup gives to the other */
    extern __shared__ __align__(128) char smem[];
    const int tid = threadIdx.x, lane = tid & 31, w4 = tid >> 5 & 3;
    const int warp = __shfl_sync(~0u, tid >> 5, 0), wg = warp >> 2;
    const int sample = blockIdx.z, block0 = blockIdx.y * (TWO || SUM ? 64 : 128),
              column0 = block0 + (TWO || SUM ? 0 : wg * 64);
    const int cluster = 1 << a.cluster_shift, rank = blockIdx.x & (cluster - 1);

    let_next_start();
    const float *psi = a.io[sample].psi; /* the table does not change during a graph */
    float *scale = reinterpret_cast<float *>(smem + a.scale_at), *shift = scale + a.c16 * 16;
    float2 *sums = reinterpret_cast<float2 *>(smem + a.sums_at); /* [warp][8] (sum, square) */
    const uint32_t bars = shared_address(smem), ring = shared_address(smem + a.ring_at);
    auto full = [&](int slot) { return bars + slot * 16; };
    auto empty = [&](int slot) { return bars + slot * 16 + 8; };
    auto tile_full = [&](int buffer) { return full(a.ring + buffer); };
    auto tile_empty = [&](int buffer) { return empty(a.ring + buffer); };
    for (int i = warp; i < a.ring + TEAMS && lane == 0; i += WARPS) { /* each takes 90 cycles of a warp */
        barrier_init(full(i), i < a.ring ? 1 : PIECES);
        barrier_init(empty(i), i < a.ring ? cluster * WM * 4 : WM * 4);
    }
    barriers_known(cluster);

    const int tile0 = blockIdx.x * a.tiles_per_block,
              tiles = min(a.tiles_per_block, a.tiles_x * a.tiles_y - tile0);
    const int chunks = a.c16 / CHUNK16;

    /* ---- weights: one stage after another, as they lie in memory; those of a cluster's blocks are the same ---- */
    const int stages = SUM ? a.c16 / 2 * 3 : a.c16 * 3;
    const bool halves = SUM && a.columns > 64; /* in memory a tap has 128 columns */
    const char *weight0 = static_cast<const char *>(a.weight) +
                          (SUM ? (size_t)(blockIdx.y >> 1) * stages * 2 * STAGE + (blockIdx.y & 1) * ROWS64
                               : (size_t)blockIdx.y * stages * STAGE);
    const int fills = tiles * stages;
    auto ask_weights = [&](int stage, int slot) {
        const uint32_t to = ring + slot * STAGE;
        if (lane == 0) {
            barrier_expect(full(slot), STAGE);
            if (!SUM)
                copy_bulk_shared(to, weight0 + stage * STAGE, STAGE, full(slot), a.cluster_shift, rank);
        }
        if (SUM && lane < 6) { /* a tap of the first 16 inputs, or of the others */
            const int unit = (stage / 3 * 2 + lane / 3) * 9 + stage % 3 * 3 + lane % 3;
            copy_bulk(to + lane * TAP, weight0 + unit * (halves ? 2 * TAP : TAP), TAP, full(slot));
        }
    };
    /* The ring is filled by all warps, the second half of it once the first inputs are under way, which would come
     * after it. */
    auto ask_first = [&](int from, int to) {
        for (int i = from + warp; i < min(to, fills); i += WARPS) {
            int stage = i;
            while (stage >= stages)
                stage -= stages;
            ask_weights(stage, i);
        }
    };
    const int ahead = (a.ring + 1) / 2;
    ask_first(0, ahead);
    const bool asks = warp == WM * 4 + TEAMS - 1; /* for the rest */
    int fill_left = max(fills - a.ring, 0), fill_stage = a.ring, fill_slot = 0, fill_turn = 1;
    while (fill_stage >= stages)
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
    /* Fills what is free already. Lane 0's view: what the others saw a moment later could differ. */
    auto fill_free = [&]() {
        while (asks && fill_left > 0 &&
               __shfl_sync(~0u, barrier_passed(empty(fill_slot), (fill_turn - 1) & 1), 0))
            fill();
    };

    /* ---- inputs: item i is a chunk of a tile, in buffer i % TEAMS ---- */
    auto buffer_at = [&](int buffer) { return smem + a.area_at + buffer * a.buffer_bytes; };
    const int team = warp & (TEAMS - 1);
    /* Where the cells of a team's tile lie, bytes from the sample's first; < 0: outside the grid. In the
     * order in which a warp takes them: [four turns][cell of a turn][turn]. */
    int *tables = reinterpret_cast<int *>(smem + a.sums_at + IC_CU_TALL_SUMS),
        *table = tables + team * PLANE;
    auto find_cell = [&](int ti, int i) {
        const int ty = divided(ti, a.tiles_x), tx = ti - ty * a.tiles_x;
        const int cell = i / (4 * STEP) * (4 * STEP) + i % 4 * STEP + i / 4 % STEP;
        const int y = ty * TILE_H - 1 + cell / BW, x = tx * TILE_W - 1 + cell % BW;
        const bool inside =
            cell < CELLS && (unsigned)y < (unsigned)a.height && (unsigned)x < (unsigned)a.width;
        return inside ? (y * a.width + x) * 2 * a.in[0].cpad * LOADS : -1;
    };
    auto find_cells = [&](int ti) {
        __syncwarp();
        /* Unrolled: one after the other they took 2900 cycles, a fifth of what a chunk takes. */
#pragma unroll
        for (int i0 = 0; i0 < PLANE; i0 += 32)
            if (PLANE % 32 == 0 || i0 + lane < PLANE)
                table[i0 + lane] = find_cell(ti, i0 + lane);
        __syncwarp();
    };
    /* a lane's place in a chunk: eight lanes are eight cells of an octet */
    const int octet = lane >> 3 & (OCTETS - 1), first = (lane & 7) + lane / (8 * OCTETS) * 8;
    auto from_of = [&](int c0) {
        if (LOADS == 2)
            return reinterpret_cast<const char *>(psi) + 64 * c0 + 32 * octet;
        const ic_cu_src &in = a.in[0];
        return static_cast<const char *>(in.p) + (size_t)sample * in.stride + 32 * c0 + 16 * octet;
    };
    auto to_of = [&](int buffer) {
        return reinterpret_cast<uint4 *>(buffer_at(buffer)) + octet * PLANE + first;
    };
    auto packed = [](const uint4 *v) {
        const float *f = reinterpret_cast<const float *>(v);
        return make_uint4(T::pack(f[0], f[1]), T::pack(f[2], f[3]), T::pack(f[4], f[5]),
                          T::pack(f[6], f[7]));
    };

    /* The first chunks of the first tile: pieces of four cells of a lane. Those of the first GROUP of chunks are brought
     * by all warps, those of the next ones by the warps that load together, and of these some less each time: they go
     * on with what is theirs alone, which takes them longer. Psi comes to registers, two pieces of a warp. A warp that
     * loads may be at its next tile already while another is here: so each reads its own table, and the others keep
     * what they have read of it. */
    constexpr int FIRST = LOADS == 2 ? 2 : TEAMS, GROUP = TEAMS / 4;
    static_assert(GROUP * PIECES <= WARPS && (LOADS == 1 || FIRST * PIECES <= 2 * WARPS),
                  "pieces of a warp");
    const int started = min(FIRST, chunks), pieces = started * PIECES,
              together = LOADS == 2 ? pieces : min(GROUP, started) * PIECES;
    uint4 of_psi[2][4][2];
    auto offsets_of = [&](int nth) {
        return *reinterpret_cast<const int4 *>(table + (first + nth % PIECES * STEP) * 4);
    };
    auto ask_piece = [&](int nth, int k, int4 at) {
        const int chunk = nth / PIECES, p = nth - chunk * PIECES;
        const int offset[4] = {at.x, at.y, at.z, at.w};
        const char *from = from_of(chunk * CHUNK16);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const char *cell = from + max(offset[i], 0);
            if constexpr (LOADS == 1)
                copy16_or_zero(shared_address(to_of(chunk) + (4 * p + i) * STEP), cell, offset[i] >= 0);
            else
#pragma unroll
                for (int l = 0; l < 2; l++)
                    of_psi[k][i][l] = offset[i] >= 0 ? __ldcg(reinterpret_cast<const uint4 *>(cell) + l)
                                                     : make_uint4(0, 0, 0, 0);
        }
    };
    auto end_piece = [&](int nth, int k, int4 at) {
        const int chunk = nth / PIECES, p = nth - chunk * PIECES;
        const int offset[4] = {at.x, at.y, at.z, at.w};
        uint4 *to = to_of(chunk) + 4 * p * STEP, v[4];
        if constexpr (LOADS == 1) {
            norm_octet<T> norm;
            norm.take(scale + 16 * CHUNK16 * chunk + 8 * octet, shift + 16 * CHUNK16 * chunk + 8 * octet);
#pragma unroll
            for (int i = 0; i < 4; i++)
                v[i] = to[i * STEP];
#pragma unroll
            for (int i = 0; i < 4; i++)
                v[i] = norm(v[i]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++)
                v[i] = packed(of_psi[k][i]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (LOADS == 2 || offset[i] >= 0)
                to[i * STEP] = v[i];
        fence_writes();
        __syncwarp();
        if (lane == 0)
            barrier_arrive(tile_full(chunk), 1);
    };
    /* Brings an item and normalises it; outside the grid it is zero, after the activation. By asynchronous
     * copies, which can be waited for in the order in which they were asked for: a warp has so few scoreboards
     * that loads into registers, asked for ahead, are all waited for at once. */
    auto bring = [&](int c0) {
        const char *from = from_of(c0);
        uint4 *to = to_of(team);
        const int *where = table + first * 4;
        norm_octet<T> norm;
        if (LOADS == 1)
            norm.take(scale + 16 * c0 + 8 * octet, shift + 16 * c0 + 8 * octet);
        if constexpr (LOADS == 1) { /* where they belong, and there normalised */
#pragma unroll 4
            for (int p = 0; p < PIECES; p++) {
                const int4 at = *reinterpret_cast<const int4 *>(where + p * 4 * STEP);
                const int offset[4] = {at.x, at.y, at.z, at.w};
#pragma unroll
                for (int i = 0; i < 4; i++)
                    copy16_or_zero(shared_address(to + (4 * p + i) * STEP), from + max(offset[i], 0),
                                   offset[i] >= 0);
            }
            copies_commit();
            fill_free();
            copies_wait<0>();
            fill_free();
            /* `pieces` times four cells of a lane at once: their latencies overlap */
            auto normalise = [&](auto pieces, int p) {
                constexpr int N = decltype(pieces)::value;
                uint4 v[4 * N];
                int4 at[N];
#pragma unroll
                for (int i = 0; i < N; i++)
                    at[i] = *reinterpret_cast<const int4 *>(where + (p + i) * 4 * STEP);
#pragma unroll
                for (int i = 0; i < 4 * N; i++)
                    v[i] = to[(4 * p + i) * STEP];
#pragma unroll
                for (int i = 0; i < 4 * N; i++)
                    v[i] = norm(v[i]);
#pragma unroll
                for (int i = 0; i < 4 * N; i++)
                    if ((&at[i / 4].x)[i % 4] >= 0)
                        to[(4 * p + i) * STEP] = v[i];
            };
#pragma unroll 1
            for (int p = 0; p + 1 < PIECES; p += 2) {
                normalise(number<2>(), p);
                fill_free();
            }
            if (PIECES % 2)
                normalise(number<1>(), PIECES - 1);
        } else { /* by a ring of what makes two cells of a lane */
            constexpr int STEPS = 2 * PIECES, AHEAD = IC_CU_TALL_AHEAD;
            uint4 *stage = reinterpret_cast<uint4 *>(smem + a.out_at + IC_CU_TALL_OUT(CUT)) +
                           team * (AHEAD * 2 * LOADS * 32) + lane;
            auto offsets = [&](int s) {
                return *reinterpret_cast<const int2 *>(where + (s >> 1) * 4 * STEP + (s & 1) * 2);
            };
            auto ask = [&](int s, int slot) {
                const int2 at = offsets(s);
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int l = 0; l < LOADS; l++)
                        copy16_or_zero(shared_address(stage + ((slot * 2 + i) * LOADS + l) * 32),
                                       from + max(i ? at.y : at.x, 0) + 16 * l, (i ? at.y : at.x) >= 0);
            };
#pragma unroll
            for (int s = 0; s < AHEAD - 1; s++) {
                ask(s, s);
                copies_commit();
            }
            int slot = 0;
#pragma unroll 1
            for (int s = 0; s < STEPS; s++) {
                if (s + AHEAD - 1 < STEPS)
                    ask(s + AHEAD - 1, slot == 0 ? AHEAD - 1 : slot - 1);
                copies_commit();
                if (s % 2 == 0)
                    fill_free();
                copies_wait<AHEAD - 1>();
                const int2 at = offsets(s);
                uint4 v[2][LOADS], out[2];
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int l = 0; l < LOADS; l++)
                        v[i][l] = stage[((slot * 2 + i) * LOADS + l) * 32];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    out[i] = packed(v[i]);
                    to[(2 * s + i) * STEP] = (i ? at.y : at.x) >= 0 ? out[i] : make_uint4(0, 0, 0, 0);
                }
                if (++slot == AHEAD)
                    slot = 0;
            }
        }
        fence_writes();
        __syncwarp();
        if (lane == 0)
            barrier_arrive(tile_full(team), PIECES);
    };

    for (int i = tid; i < PLANE; i += THREADS) {
        const int at = find_cell(tile0, i);
#pragma unroll
        for (int t = 0; t < TEAMS; t++)
            tables[t * PLANE + i] = at;
    }
    __syncthreads();
    if (!psi) { /* and nothing may come to a block that has ended */
        for (int i = warp; i < min(ahead, fills); i += WARPS)
            barrier_wait(full(i), 0);
        return;
    }
    const float2 own = norm_own(a.in[0], tid);
    float2 seen[NORM_AT_ONCE];
    wait_for_previous();
    norm_ahead(a.in[0], sample, tid, seen);
    const int4 places = offsets_of(warp);
    if (warp < together)
        ask_piece(warp, 0, places);
    if (LOADS == 2 && WARPS + warp < together)
        ask_piece(WARPS + warp, 1, offsets_of(WARPS + warp));
    copies_commit();
    ask_first(ahead, a.ring);
    norm_coefficients<NORM_AT_ONCE>(a.in[0], sample, scale, shift, tid, THREADS, seen, &own);
    __syncthreads();
    copies_wait<0>();
    if (warp < together)
        end_piece(warp, 0, places);
    if (LOADS == 2 && WARPS + warp < together)
        end_piece(WARPS + warp, 1, places);

    if (wg >= WM) {
        if constexpr (THREADS == 384)
            asm volatile("setmaxnreg.dec.sync.aligned.u32 112;");
        const int loader = warp - WM * 4;
#pragma unroll 1 /* to be fetched, code that runs once takes as long as it is */
        for (int g = 1; g * GROUP < started && LOADS == 1; g++) {
            const int gone = (g - 1) * GROUP, from = g * GROUP * PIECES + loader - gone,
                      to = min((g + 1) * GROUP, started) * PIECES;
            if (loader < gone)
                break;
#pragma unroll 1
            for (int nth = from; nth < to; nth += TEAMS - gone)
                ask_piece(nth, 0, offsets_of(nth));
            copies_commit();
            fill_free();
            copies_wait<0>();
#pragma unroll 1
            for (int nth = from; nth < to; nth += TEAMS - gone)
                end_piece(nth, 0, offsets_of(nth));
        }
        int tile = 0, found = 0, turn = team < started ? 1 : 0, chunk = team + turn * TEAMS;
        for (;; turn++, chunk += TEAMS) {
            while (chunk >= chunks) {
                chunk -= chunks;
                tile++;
            }
            if (tile >= tiles)
                break;
            if (tile != found)
                find_cells(tile0 + (found = tile));
            if (turn > 0) {
                while (asks && fill_left > 0 &&
                       !__shfl_sync(~0u, barrier_passed(tile_empty(team), (turn - 1) & 1), 0))
                    fill_free();
                barrier_wait(tile_empty(team), (turn - 1) & 1);
            }
            bring(chunk * CHUNK16);
        }
        while (asks && fill_left > 0)
            fill();
        return;
    }
    if constexpr (THREADS == 384)
        asm volatile("setmaxnreg.inc.sync.aligned.u32 192;");

    float acc[1][N / 2];
    float2 keep = make_float2(0, 0); /* (sum, square) of the eight channels that this thread stores */
    int slot = 0, buffer = 0;
    uint32_t slot_turn = 0, buffer_turn = 0;

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
        settle(acc);
        for (int chunk = 0; chunk < chunks; chunk++) {
            barrier_wait(tile_full(buffer), buffer_turn);
            uint32_t cells = matrix_low(shared_address(buffer_at(buffer)) / 16 + (TWO   ? wg * WG_H * BW
                                                                                  : SUM ? wg * 2 * PLANE
                                                                                        : 0),
                                        PLANE);
#pragma unroll 1
            for (int k = 0; k < (SUM ? 1 : CHUNK16); k++, cells += 2 * PLANE)
#pragma unroll
                for (int ky = 0; ky < 3; ky++) {
                    barrier_wait(full(slot), slot_turn);
                    products_begin();
                    const uint32_t w = matrix_low(
                        (ring + slot * STAGE + (TWO ? 0 : wg * (SUM ? STAGE / 2 : ROWS64))) / 16, 128 / 16);
#pragma unroll
                    for (int kx = 0; kx < 3; kx++)
                        product<UNIT / 16, BW>(acc[0], w + kx * TAP / 16, cells + ky * BW + kx,
                                               ky + kx > 0 ? 1 : add, T());
                    add = 1;
                    products_commit();
                    products_wait<1>();
                    release();
                    held = slot;
                    if (++slot == a.ring) {
                        slot = 0;
                        slot_turn ^= 1;
                    }
                }
            held_tile = buffer; /* free when the last stage is */
            if (++buffer == TEAMS) {
                buffer = 0;
                buffer_turn ^= 1;
            }
        }
        products_wait<0>();
        settle(acc);
        release();
        if (cluster > 1 && tile == tiles - 1)
            cluster_arrive(); /* sends nothing any more */

        if constexpr (SUM) { /* each adds what the other has of half of the rows */
            auto part = [&](int of, int i) {
                return reinterpret_cast<float4 *>(smem + a.out_at + of * PART) + i * 128 + (tid & 127);
            };
            asm volatile("bar.sync 1, %0;" ::"n"(WM * 128) : "memory"); /* the tile before is stored */
#pragma unroll
            for (int i = 0; i < N / 16; i++) {
                const float *give = &acc[0][4 * i], *other = give + N / 4;
                *part(wg, i) = wg ? make_float4(give[0], give[1], give[2], give[3])
                                  : make_float4(other[0], other[1], other[2], other[3]);
            }
            asm volatile("bar.sync 1, %0;" ::"n"(WM * 128) : "memory");
#pragma unroll
            for (int i = 0; i < N / 16; i++) {
                const float4 v = *part(1 - wg, i);
                const float more[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int k = 0; k < 4; k++)
                    acc[0][4 * i + k] = (wg ? acc[0][N / 4 + 4 * i + k] : acc[0][4 * i + k]) + more[k];
            }
            asm volatile("bar.sync %0, 128;" ::"r"(2 + wg)
                         : "memory"); /* the room is this warpgroup's now */
        }

        /* ---- epilogue: to shared memory as they are, and from there whole lines. What the statistics see is what
         * is stored. A case for each of the products' parts, but one code for what follows. ---- */
        const int ti = tile0 + tile, ty = divided(ti, a.tiles_x),
                  y0 = ty * TILE_H + (TWO || SUM ? wg * ROWS_OUT : 0), x0 = (ti - ty * a.tiles_x) * TILE_W;
        const int cell_bytes = 2 * a.cpad, row_bytes = cell_bytes * a.width;
        char *mine = smem + a.out_at +
                     (SUM ? (1 - wg) * PART : wg * TILE_W * OUT_H * OUT_ROW); /* [cell][64 channels] */
        const uint32_t to = shared_address(mine) + w4 * 32 + ((lane >> 4) * 8 + (lane & 7)) * OUT_ROW +
                            (lane >> 3 & 1) * 16;
        /* a thread stores eight channels of 2x2 cells */
        const int copy = tid & 7, copy_y = w4 * 2, copy_x = (lane >> 3) * 2, column = column0 + copy * 8;
        const char *copy_from = mine + (copy_y * 8 + copy_x) * OUT_ROW + copy * 16;
        char *out = static_cast<char *>(a.out) + (size_t)sample * a.out_stride + 2 * column +
                    (x0 + copy_x) * cell_bytes;
#pragma unroll 1
        for (int j0 = 0; j0 < ROWS_OUT; j0 += OUT_H) {
#pragma unroll
            for (int q = 0; q < ROWS_OUT; q += OUT_H)
                if (q == j0)
#pragma unroll
                    for (int j = q; j < q + OUT_H; j += 2) { /* two rows of cells */
                        const float *v = &acc[0][4 * j];     /* [row][channel][cell] */
                        store_turned(to + (j - q) * 8 * OUT_ROW, T::pack(v[0], v[1]), T::pack(v[2], v[3]),
                                     T::pack(v[4], v[5]), T::pack(v[6], v[7]));
                    }
            asm volatile("bar.sync %0, 128;" ::"r"(2 + wg) : "memory");
            const int y = y0 + j0 + copy_y;
            if (y < a.height && x0 + copy_x < a.width) { /* grids of which some is pooled are even */
                uint4 v[4];
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    v[k] = *reinterpret_cast<const uint4 *>(copy_from + ((k >> 1) * 8 + (k & 1)) * OUT_ROW);
                    if (y + (k >> 1) < a.height && x0 + copy_x + (k & 1) < a.width) {
                        *reinterpret_cast<uint4 *>(out + (y + (k >> 1)) * row_bytes +
                                                   (k & 1) * cell_bytes) = v[k];
                        count<T>(v[k], keep);
                    }
                }
                if (a.pooled)
                    *reinterpret_cast<uint4 *>(
                        static_cast<char *>(a.pooled) + (size_t)sample * a.pooled_stride + 2 * column +
                        ((y >> 1) * (a.width >> 1) + ((x0 + copy_x) >> 1)) * cell_bytes) =
                        pooled<T>(v, __ldg(reinterpret_cast<const uint4 *>(a.flip + column)));
            }
            asm volatile("bar.sync %0, 128;" ::"r"(2 + wg) : "memory");
        }
    }
    if (cluster > 1)
        cluster_wait(); /* nobody may send to a block that has ended */
    if (!a.stats)
        return;
    sum_of_copies(keep, sums, warp, lane);
    asm volatile("bar.sync 1, %0;" ::"n"(WM * 128) : "memory"); /* of the warps that multiply */
    if (tid < (TWO || SUM ? 8 : 16)) {
        constexpr int MANY = TWO || SUM ? 8 : 4; /* warps that have these eight channels */
        float2 v = make_float2(0, 0);
#pragma unroll
        for (int i = 0; i < MANY; i++) {
            const float2 one = sums[((tid >> 3) * 4 + i) * 8 + (tid & 7)];
            v.x += one.x;
            v.y += one.y;
        }
        reinterpret_cast<float2 *>(
            a.stats)[(size_t)sample * a.stats_stride + (size_t)(block0 / 8 + tid) * a.slots + blockIdx.x] =
            v;
    }
#endif
}

#endif
