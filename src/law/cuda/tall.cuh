/* The largest 3x3 convolutions on Hopper: products of 64 output channels and 256 cells.
 *
 * A product of 64 x 16 and 16 x N reads both from shared memory, in N / 2 cycles: with N 128, as wide.cuh
 * and fold.cuh have it, that is three quarters of what shared memory gives, and what is brought there,
 * normalised there and stored there shares the rest. With N 256 it is five eighths, and weights last twice
 * as long. That costs half of the registers, so that only one warpgroup is left to load.
 *
 * Rows are output channels, as in fold.cuh, and columns a tile of 8 x 32 cells; core matrices, barriers and
 * the ring of weights are those of wide.cuh. Two warpgroups multiply and store. TWO: there are but 64 output
 * channels, and each has 32 of a tile's 64 rows; else each has 64 of a block's 128 output channels. Each warp
 * of the third loads by itself, every fourth chunk of the input's channels into a buffer of its own; the last
 * one asks for weights besides, whenever it looks and a place in the ring is free. */
#ifndef IC_LAW_CUDA_TALL_CUH
#define IC_LAW_CUDA_TALL_CUH

#include "law/cuda/fold.cuh"

template <int N> struct number {
    static constexpr int value = N;
};

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
template <class T, bool TWO, int LOADS>
__global__ void __launch_bounds__(IC_CU_TALL_THREADS, 1) tall_kernel(const __grid_constant__ ic_cu_conv a)
{
#if IC_CU_WGMMA
    constexpr int WM = 2, THREADS = IC_CU_TALL_THREADS, TEAMS = IC_CU_TALL_TEAMS;
    constexpr int WG_H = 32, TILE_W = 8, TILE_H = TWO ? 2 * WG_H : WG_H, BW = TILE_W + 2,
                  CELLS = BW * (TILE_H + 2);
    constexpr int CHUNK16 = IC_CU_TALL_CHUNK16(TWO), OCTETS = 2 * CHUNK16; /* of channels */
    /* a warp brings cells by fours of STEP, planes are whole fours */
    constexpr int STEP = 32 / OCTETS, PLANE = (CELLS + 4 * STEP - 1) / (4 * STEP) * (4 * STEP),
                  PIECES = PLANE / (4 * STEP);
    constexpr int ROWS64 = 8 * UNIT, TAP = (TWO ? 1 : 2) * ROWS64, STAGE = 3 * TAP; /* of weights */
    constexpr int OUT_ROW = 64 * 2 + 16, OUT_H = 8; /* cells; rows at a time */
    extern __shared__ __align__(128) char smem[];
    const int tid = threadIdx.x, lane = tid & 31, w4 = tid >> 5 & 3;
    const int warp = __shfl_sync(~0u, tid >> 5, 0), wg = warp >> 2;
    const int sample = blockIdx.z, block0 = blockIdx.y * 128, column0 = block0 + (TWO ? 0 : wg * 64);

    const ic_cu_io io = a.io[sample]; /* the table does not change during a graph */
    let_next_start();
    if (!io.psi)
        return;

    float *scale = reinterpret_cast<float *>(smem + a.scale_at), *shift = scale + a.c16 * 16;
    float *sums = reinterpret_cast<float *>(smem + a.sums_at); /* [warp][2] (sum, square) */
    const uint32_t bars = shared_address(smem), ring = shared_address(smem + a.ring_at);
    auto full = [&](int slot) { return bars + slot * 16; };
    auto empty = [&](int slot) { return bars + slot * 16 + 8; };
    auto tile_full = [&](int buffer) { return full(a.ring + buffer); };
    auto tile_empty = [&](int buffer) { return empty(a.ring + buffer); };
    if (tid < a.ring + TEAMS) {
        barrier_init(full(tid), 1);
        barrier_init(empty(tid), WM * 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();

    const int tile0 = blockIdx.x * a.tiles_per_block,
              tiles = min(a.tiles_per_block, a.tiles_x * a.tiles_y - tile0);
    const int chunks = a.c16 / CHUNK16;

    /* ---- weights: one stage after another, as they lie in memory ---- */
    const int stages = a.c16 * 3;
    const char *weight0 = static_cast<const char *>(a.weight) + (size_t)blockIdx.y * stages * STAGE,
               *weight = weight0;
    int fill_left = tiles * stages, fill_stage = 0, fill_slot = 0, fill_turn = 0;
    auto fill = [&]() {
        if (fill_turn > 0)
            barrier_wait(empty(fill_slot), (fill_turn - 1) & 1);
        if (lane == 0) {
            barrier_expect(full(fill_slot), STAGE);
            copy_bulk(ring + fill_slot * STAGE, weight, STAGE, full(fill_slot));
        }
        fill_left--;
        weight += STAGE;
        if (++fill_stage == stages) {
            fill_stage = 0;
            weight = weight0;
        }
        if (++fill_slot == a.ring) {
            fill_slot = 0;
            fill_turn++;
        }
    };
    const bool asks = warp == WM * 4 + TEAMS - 1;
    if (asks)
        for (int i = 0; i < a.ring && fill_left > 0; i++)
            fill();
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
    int *table = reinterpret_cast<int *>(smem + a.sums_at + IC_CU_TALL_SUMS) + team * PLANE;
    auto find_cells = [&](int ti) {
        const int ty = divided(ti, a.tiles_x), tx = ti - ty * a.tiles_x;
        __syncwarp();
        for (int i = lane; i < PLANE; i += 32) {
            const int cell = i / (4 * STEP) * (4 * STEP) + i % 4 * STEP + i / 4 % STEP;
            const int y = ty * TILE_H - 1 + cell / BW, x = tx * TILE_W - 1 + cell % BW;
            const bool inside =
                cell < CELLS && (unsigned)y < (unsigned)a.height && (unsigned)x < (unsigned)a.width;
            table[i] = inside ? (y * a.width + x) * 2 * a.in[0].cpad * LOADS : -1;
        }
        __syncwarp();
    };
    /* Brings an item and normalises it; outside the grid it is zero, after the activation. Eight lanes are
     * eight cells of an octet. By asynchronous copies, which can be waited for in the order in which they
     * were asked for: a warp has so few scoreboards that loads into registers, asked for ahead, are all
     * waited for at once. */
    auto bring = [&](int c0) {
        const ic_cu_src &in = a.in[0];
        const int octet = lane >> 3 & (OCTETS - 1), first = (lane & 7) + lane / (8 * OCTETS) * 8;
        const char *from =
            static_cast<const char *>(in.p) + (size_t)sample * in.stride + 32 * c0 + 16 * octet;
        if (LOADS == 2)
            from = reinterpret_cast<const char *>(io.psi) + 64 * c0 + 32 * octet;
        uint4 *to = reinterpret_cast<uint4 *>(buffer_at(team)) + octet * PLANE + first;
        const int *where = table + first * 4;
        norm_octet<T> norm;
        if (LOADS != 2)
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
#pragma unroll
                for (int i = 0; i < 4 * N; i++)
                    v[i] = to[(4 * p + i) * STEP];
#pragma unroll
                for (int i = 0; i < 4 * N; i++)
                    v[i] = norm(v[i]);
#pragma unroll
                for (int i = 0; i < 4 * N; i++)
                    if (where[(p + i / 4) * 4 * STEP + i % 4] >= 0)
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
            uint4 *stage = reinterpret_cast<uint4 *>(smem + a.out_at + IC_CU_TALL_OUT) +
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
                    const float *f = reinterpret_cast<const float *>(v[i]);
                    out[i] = make_uint4(T::pack(f[0], f[1]), T::pack(f[2], f[3]), T::pack(f[4], f[5]),
                                        T::pack(f[6], f[7]));
                    to[(2 * s + i) * STEP] = (i ? at.y : at.x) >= 0 ? out[i] : make_uint4(0, 0, 0, 0);
                }
                if (++slot == AHEAD)
                    slot = 0;
            }
        }
        fence_writes();
        __syncwarp();
        if (lane == 0)
            barrier_arrive(tile_full(team));
    };

    wait_for_previous();
    norm_coefficients(a.in[0], sample, scale, shift, tid, THREADS);
    __syncthreads();

    if (wg >= WM) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 112;");
        int tile = 0, chunk = team, found = -1;
        for (int turn = 0;; turn++, chunk += TEAMS) {
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
    asm volatile("setmaxnreg.inc.sync.aligned.u32 192;");

    float acc[1][128];
    /* (sum, square) of this warp's two eights of channels, this lane's part */
    float keep[4] = {0, 0, 0, 0};
    int slot = 0, buffer = 0;
    uint32_t slot_turn = 0, buffer_turn = 0;

    for (int tile = 0; tile < tiles; tile++) {
        int add = 0, held = -1, held_tile = -1; /* what the products before the last ones read */
        auto release = [&]() {
            __syncwarp();
            if (lane == 0 && held >= 0)
                barrier_arrive(empty(held));
            if (lane == 0 && held_tile >= 0)
                barrier_arrive(tile_empty(held_tile));
            held_tile = -1;
        };
        settle(acc);
        for (int chunk = 0; chunk < chunks; chunk++) {
            barrier_wait(tile_full(buffer), buffer_turn);
            uint32_t cells =
                matrix_low(shared_address(buffer_at(buffer)) / 16 + (TWO ? wg * WG_H * BW : 0), PLANE);
#pragma unroll 1
            for (int k = 0; k < CHUNK16; k++, cells += 2 * PLANE)
#pragma unroll
                for (int ky = 0; ky < 3; ky++) {
                    barrier_wait(full(slot), slot_turn);
                    products_begin();
                    const uint32_t w =
                        matrix_low((ring + slot * STAGE + (TWO ? 0 : wg * ROWS64)) / 16, 128 / 16);
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

        /* ---- epilogue: this warp has 16 channels, of which this lane two, lane / 4 and that + 8 ---- */
        const int ti = tile0 + tile, ty = divided(ti, a.tiles_x), y0 = ty * TILE_H + (TWO ? wg * WG_H : 0),
                  x0 = (ti - ty * a.tiles_x) * TILE_W, xa = x0 + (lane & 3) * 2; /* its cells: xa, xa + 1 */
        const int cell_bytes = 2 * a.cpad, row_bytes = cell_bytes * a.width;
        const bool in[2] = {xa < a.width, xa + 1 < a.width};
        float bias[2] = {0, 0}; /* of its channels */
        if (a.bias) {
            bias[0] = __ldg(a.bias + column0 + w4 * 16 + lane / 4);
            bias[1] = __ldg(a.bias + column0 + w4 * 16 + lane / 4 + 8);
        }
        char *mine = smem + a.out_at + wg * TILE_W * OUT_H * OUT_ROW; /* [cell][64 channels] */
        const uint32_t to = shared_address(mine) + w4 * 32 + ((lane >> 4) * 8 + (lane & 7)) * OUT_ROW +
                            (lane >> 3 & 1) * 16;
        /* a thread stores eight channels of 2x2 cells */
        const int copy = tid & 7, copy_y = w4 * 2, copy_x = (lane >> 3) * 2, column = column0 + copy * 8;
        const char *copy_from = mine + (copy_y * 8 + copy_x) * OUT_ROW + copy * 16;
        char *out = static_cast<char *>(a.out) + (size_t)sample * a.out_stride + 2 * column +
                    (x0 + copy_x) * cell_bytes;
#pragma unroll
        for (int j0 = 0; j0 < WG_H; j0 += OUT_H) {
#pragma unroll
            for (int j = j0; j < j0 + OUT_H; j += 2) { /* two rows of cells */
                uint32_t packed[4];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float *sum = &acc[0][4 * (j + h)];
                    float v[4]; /* [channel][cell] */
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        v[i] = sum[i] + bias[i >> 1];
                        if (in[i & 1] && y0 + j + h < a.height) {
                            keep[i >> 1 << 1] += v[i];
                            keep[(i >> 1 << 1) + 1] = fmaf(v[i], v[i], keep[(i >> 1 << 1) + 1]);
                        }
                    }
                    packed[2 * h] = T::pack(v[0], v[1]);
                    packed[2 * h + 1] = T::pack(v[2], v[3]);
                }
                store_turned(to + (j - j0) * 8 * OUT_ROW, packed[0], packed[1], packed[2], packed[3]);
            }
            asm volatile("bar.sync %0, 128;" ::"r"(2 + wg) : "memory");
            const int y = y0 + j0 + copy_y;
            if (y < a.height && x0 + copy_x < a.width) { /* grids of which some is pooled are even */
                uint4 v[4];
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    v[k] = *reinterpret_cast<const uint4 *>(copy_from + ((k >> 1) * 8 + (k & 1)) * OUT_ROW);
                    if (y + (k >> 1) < a.height && x0 + copy_x + (k & 1) < a.width)
                        *reinterpret_cast<uint4 *>(out + (y + (k >> 1)) * row_bytes +
                                                   (k & 1) * cell_bytes) = v[k];
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
    if (!a.stats)
        return;
    sum_many<4>(keep, lane);
    if ((lane & 7) == 0)
        sums[warp * 4 + lane / 8] = keep[0];
    asm volatile("bar.sync 1, %0;" ::"n"(WM * 128) : "memory"); /* of the warps that multiply */
    if (tid < (TWO ? 8 : 16)) {
        const float *one = sums + tid / 2 * 4 + tid % 2 * 2, *other = one + 4 * 4;
        const float2 v = make_float2(one[0] + (TWO ? other[0] : 0), one[1] + (TWO ? other[1] : 0));
        reinterpret_cast<float2 *>(
            a.stats)[(size_t)sample * a.stats_stride + (size_t)(block0 / 8 + tid) * a.slots + blockIdx.x] =
            v;
    }
#endif
}

#endif
