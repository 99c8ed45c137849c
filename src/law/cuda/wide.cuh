/* Convolutions on Hopper's warpgroup products (wgmma), for what has many cells and many channels. The same
 * matrix product as conv.cuh's, cut otherwise.
 *
 * Both operands lie in shared memory as "core matrices", 8 rows of 16 bytes. The input tile lies as
 * [octet of channels][cell y][cell x], 16 bytes a cell, so that 8 neighbouring cells are a core matrix
 * wherever they begin: 64 rows of a product are a patch of 8x8 cells, and a tap is nothing but another
 * address. Weights come in the order [8 columns][16 inputs][tap] in which pack.c laid them, a stage at a
 * time, by bulk copies that a barrier counts; they are streamed through a ring, or all stay.
 *
 * In some configurations a warpgroup of its own brings the input (LOAD), a chunk or a tile ahead of the
 * others, which only multiply and store. In the rest a warpgroup's products run beside its other work:
 * while they do, it normalises the next chunk or tile in the other buffer. What still waits is covered by
 * the other blocks of the multiprocessor. */
#ifndef IC_LAW_CUDA_WIDE_CUH
#define IC_LAW_CUDA_WIDE_CUH

#include "law/cuda/conv.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define IC_CU_WGMMA 1
#else
#define IC_CU_WGMMA 0
#endif

#define UNIT 256 /* bytes of 8 columns of 16 inputs at a tap */

#if IC_CU_WGMMA

/* ---- Barriers, copies, products ------------------------------------------------------------------ */

__device__ inline void barrier_init(uint32_t at, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
__device__ inline void barrier_arrive(uint32_t at)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
__device__ inline void barrier_arrive(uint32_t at, int count)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
__device__ inline void barrier_expect(uint32_t at, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
__device__ inline void barrier_wait(uint32_t at, uint32_t parity)
{
    asm volatile("{\n\t.reg .pred done;\n\t"
                 "again:\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
                 "@done bra over;\n\t"
                 "bra again;\n\t"
                 "over:\n\t}" ::"r"(at),
                 "r"(parity)
                 : "memory");
}
__device__ inline void copy_bulk(uint32_t to, const void *from, int bytes, uint32_t barrier)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}
/* Of barriers in shared memory that were made known (fence.mbarrier_init) alone. */
__device__ inline void cluster_arrive()
{
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void cluster_wait()
{
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/* The same place in the shared memory of another block of the cluster. */
__device__ inline uint32_t shared_of(uint32_t at, int rank)
{
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
    return there;
}
/* All barriers of all blocks of a cluster have been made. */
__device__ inline void barriers_known(int cluster)
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    if (cluster == 1) {
        __syncthreads();
        return;
    }
    cluster_arrive();
    cluster_wait();
}
/* This warp arrives at a barrier of each block of the cluster. */
__device__ inline void barrier_arrive_all(uint32_t at, int cluster, int lane)
{
    if (cluster == 1) {
        if (lane == 0)
            barrier_arrive(at);
    } else if (lane < cluster) {
        asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(shared_of(at, lane)) : "memory");
    }
}
/* Each block of a cluster calls this, and all of them get it all: each reads a part and sends it to the same place of
 * each, counted by the same barrier of each, which expects `bytes`. */
__device__ inline void copy_bulk_shared(uint32_t to, const char *from, int bytes, uint32_t barrier,
                                        int cluster_shift, int rank)
{
    if (cluster_shift == 0) {
        copy_bulk(to, from, bytes, barrier);
        return;
    }
    const int part = bytes >> cluster_shift;
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1], %2, [%3], %4;" ::"r"(to + rank * part),
        "l"(from + rank * part), "r"(part), "r"(barrier), "h"((uint16_t)((1 << (1 << cluster_shift)) - 1))
        : "memory");
}
__device__ inline void copy16_or_zero(uint32_t to, const void *from, bool copy)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(copy ? 16 : 0)
                 : "memory");
}
/* What this thread wrote to shared memory is there for wgmma, once a barrier has been passed too. */
__device__ inline void fence_writes()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void products_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void products_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int LEFT> __device__ inline void products_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
__device__ inline void store_matrix(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

/* The lower half of a matrix's descriptor: where it lies, and the step between core matrices along the sum,
 * in 16 bytes, without the upper byte of its address, a block's rank in its cluster. The upper half, the step
 * along rows (or columns), is the same for a whole kernel. */
__device__ inline constexpr uint32_t matrix_low(uint32_t at, uint32_t along_sum)
{
    return along_sum << 16 | (at & 0xfffff);
}

/* c += or (add == 0) = a * b of 64 x 16 and 16 x N. ROWS, COLUMNS: their upper halves. */
#define LIST16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define LIST32 LIST16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LIST64                                                                                             \
    LIST32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54," \
           "%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LIST128                                                                                            \
    LIST64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86," \
           "%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,"  \
           "%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,"    \
           "%126,%127"
#define C8(i)                                                                                              \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]),            \
        "+f"(c[i + 6]), "+f"(c[i + 7])
#define PRODUCT(type, n, list, a, b, on, rows, columns, ...)                                               \
    template <int ROWS, int COLUMNS>                                                                       \
    __device__ inline void product(float(&c)[n / 2], uint32_t da, uint32_t db, int add, type)              \
    {                                                                                                      \
        asm volatile("{\n\t.reg .pred p;\n\t.reg .b64 da, db;\n\tsetp.ne.b32 p, %" on ", 0;\n\t"           \
                     "mov.b64 da, {%" a ", %" rows "};\n\tmov.b64 db, {%" b ", %" columns "};\n\t"         \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {" list           \
                     "}, da, db, p, 1, 1, 0, 0;\n\t}"                                                      \
                     : __VA_ARGS__                                                                         \
                     : "r"(da), "r"(db), "r"(add), "n"(ROWS), "n"(COLUMNS));                               \
    }
#define PRODUCTS(type)                                                                                     \
    PRODUCT(type, 32, LIST16, "16", "17", "18", "19", "20", C8(0), C8(8))                                  \
    PRODUCT(type, 64, LIST32, "32", "33", "34", "35", "36", C8(0), C8(8), C8(16), C8(24))                  \
    PRODUCT(type, 128, LIST64, "64", "65", "66", "67", "68", C8(0), C8(8), C8(16), C8(24), C8(32), C8(40), \
            C8(48), C8(56))                                                                                \
    PRODUCT(type, 256, LIST128, "128", "129", "130", "131", "132", C8(0), C8(8), C8(16), C8(24), C8(32),   \
            C8(40), C8(48), C8(56), C8(64), C8(72), C8(80), C8(88), C8(96), C8(104), C8(112), C8(120))
PRODUCTS(f16)
PRODUCTS(bf16)

/* V sums over a warp in V shuffles or so: lane l is left with the l / (32 / V)-th in v[0]. */
template <int V, int HALF = V / 2> __device__ inline void sum_many(float (&v)[V], int lane)
{
    constexpr int m = 16 / (V / 2) * HALF;
    if constexpr (HALF > 0) {
        const bool upper = lane & m;
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            const float give = upper ? v[i] : v[i + HALF], keep = upper ? v[i + HALF] : v[i];
            v[i] = keep + __shfl_xor_sync(~0u, give, m);
        }
        sum_many<V, HALF / 2>(v, lane);
    } else {
#pragma unroll
        for (int rest = 16 / V; rest; rest /= 2)
            v[0] += __shfl_xor_sync(~0u, v[0], rest);
    }
}

/* The compiler moves nothing of the accumulators past this. */
template <int A, int B> __device__ inline void settle(float (&acc)[A][B])
{
#pragma unroll
    for (int a = 0; a < A; a++)
#pragma unroll
        for (int b = 0; b < B; b++)
            asm volatile("" : "+f"(acc[a][b])::"memory");
}
#endif

#if IC_CU_WGMMA
/* scale and shift of eight channels, and what conv.cuh's `normalised` does with them. */
template <class T> struct norm_octet {
    float by[8], add[8];

    __device__ void take(const float *times, const float *plus)
    {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            by[i] = times[i];
            add[i] = plus[i];
        }
    }
    __device__ uint4 operator()(uint4 v) const
    {
        return normalised<T>(v, by, add);
    }
};

/* In float16 two at a time: the result is rounded to that anyway, and half of the instructions are saved.
 */
template <> struct norm_octet<f16> {
    __half2 by[4], add[4];

    __device__ void take(const float *times, const float *plus)
    {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            by[i] = __floats2half2_rn(times[2 * i], times[2 * i + 1]);
            add[i] = __floats2half2_rn(plus[2 * i], plus[2 * i + 1]);
        }
    }
    __device__ static __half2 elu2(__half2 x)
    {
        const __half2 zero = __float2half2_rn(0.0f), minus = __float2half2_rn(-1.0f),
                      log2_e = __float2half2_rn(1.44269504f), least = __hmul2(__hmin2(x, zero), log2_e);
        __half2 e;
        asm("ex2.approx.f16x2 %0, %1;"
            : "=r"(reinterpret_cast<uint32_t &>(e))
            : "r"(reinterpret_cast<const uint32_t &>(least)));
        return __hmax2(x, __hadd2(e, minus));
    }
    __device__ uint4 operator()(uint4 v) const
    {
        __half2 *h = reinterpret_cast<__half2 *>(&v);
#pragma unroll
        for (int i = 0; i < 4; i++)
            h[i] = elu2(__hfma2(h[i], by[i], add[i]));
        return v;
    }
};
#endif

/* ---- The kernel ------------------------------------------------------------------------------------ */

template <class T, int TAPS, int WM, int WK, int MT, int N, int UNITS9, int LOAD, int BLOCKS>
__global__ void __launch_bounds__((WM * WK + LOAD) * 128, BLOCKS)
    wide_kernel(const __grid_constant__ ic_cu_conv a)
{
#if IC_CU_WGMMA
    constexpr int THREADS = (WM * WK + LOAD) * 128, WARPS = (LOAD ? LOAD : WM * WK) * 4, M = WM * MT * 64,
                  N8 = N / 8;
    constexpr int BORDER = TAPS == 9 ? 1 : 0, TILE_W = M >= 128 ? 16 : 8, TILE_H = M / TILE_W;
    constexpr int BW = TILE_W + 2 * BORDER, BH = TILE_H + 2 * BORDER, CELLS = BW * BH, PLANE = CELLS * 16;
    constexpr int UNITS = TAPS == 9 ? UNITS9 : 4, STAGE = UNITS * N8 * UNIT;
    constexpr int GROUP = WM * 128; /* threads that share a stage */
    constexpr int OUT_ROW = N * 2 + 16;
    extern __shared__ __align__(128) char smem[];
    const int tid = threadIdx.x, lane = tid & 31, w4 = tid >> 5 & 3;
    const int warp = __shfl_sync(~0u, tid >> 5, 0); /* so that the compiler sees that lanes agree */
    const int wg = warp >> 2, wk = WK > 1 ? wg / WM : 0, wm = WK > 1 ? wg % WM : wg;
    const int gtid = tid - wk * GROUP, warp_in_group = warp - wk * (GROUP / 32);
    const bool loads = LOAD > 0 && wg >= WM * WK; /* this warpgroup brings the input and nothing else */
    const int loader = LOAD ? warp - WM * WK * 4 : warp;           /* of WARPS */
    const int sample = blockIdx.z, block0 = blockIdx.y * a.passes; /* its first block of N columns */
    const int channels = a.c16 * 16;

    const ic_cu_io io = a.io[sample]; /* the table does not change during a graph */
    let_next_start();
    if (!io.psi)
        return;

    float *scale = reinterpret_cast<float *>(smem + a.scale_at), *shift = scale + channels;
    float *sums = reinterpret_cast<float *>(smem + a.sums_at); /* [warp][N8] (sum, square) */
    const uint32_t bars = shared_address(smem), ring = shared_address(smem + a.ring_at);
    auto full = [&](int slot) { return bars + slot * 16; };
    auto empty = [&](int slot) { return bars + slot * 16 + 8; };
    auto tile_full = [&](int buffer) { return full(a.ring + buffer); };
    auto tile_empty = [&](int buffer) { return empty(a.ring + buffer); };
    for (int i = warp; i < a.ring + (LOAD ? a.buffers : 0) && lane == 0;
         i += THREADS / 32) { /* each takes 90 cycles of a warp */
        barrier_init(full(i), i < a.ring ? 1 : WARPS);
        barrier_init(empty(i), GROUP / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();

    /* ---- weights: stage after stage, this group's are every WK-th ---- */
    const int units_all = a.c16 * TAPS, tiles_all = a.tiles_x * a.tiles_y;
    const int tile0 = blockIdx.x * a.tiles_per_block, tiles = min(a.tiles_per_block, tiles_all - tile0);
    int fill_left = a.resident ? a.stages * a.passes : tiles * a.passes * a.stages, fill_stage = wk,
        fill_pass = 0, fill_slot = wk;
    fill_left = (fill_left - wk + WK - 1) / WK;
    /* Fills the next slot; after: which turn of it must have been read first, -1: none. */
    auto fill = [&](int after) {
        const uint32_t to = ring + fill_slot * STAGE;
        /* pack.c's blocks are of 128 columns, the last one of what is left */
        const int n8 = (block0 + fill_pass) * N8, width = min(16, a.columns / 8 - (n8 & ~15));
        const size_t from = (size_t)(n8 & ~15) * units_all + (size_t)fill_stage * UNITS * width + (n8 & 15);
        /* A stage in one piece is the first warp's to ask for; many pieces would take one thread long. Who
         * asks for nothing does not wait for the others either. */
        const bool whole = width == N8;
        if (!whole || warp_in_group == 0) {
            if (after >= 0)
                barrier_wait(empty(fill_slot), (uint32_t)after);
            if (lane == 0) {
                const char *weight = static_cast<const char *>(a.weight) + from * UNIT;
                if (warp_in_group == 0)
                    barrier_expect(full(fill_slot), STAGE);
                if (whole)
                    copy_bulk(to, weight, STAGE, full(fill_slot));
                else
                    for (int u = warp_in_group; u < UNITS; u += GROUP / 32)
                        copy_bulk(to + u * N8 * UNIT, weight + u * width * UNIT, N8 * UNIT,
                                  full(fill_slot));
            }
        }
        fill_left--;
        fill_stage += WK;
        if (fill_stage >= a.stages) {
            fill_stage -= a.stages;
            if (++fill_pass == a.passes)
                fill_pass = 0;
        }
        fill_slot += WK;
        if (fill_slot >= a.ring)
            fill_slot -= a.ring;
    };
    for (int i = wk; i < a.ring && fill_left > 0 && !loads; i += WK)
        fill(-1);

    /* ---- input: item i is a chunk of a tile, in buffer i % buffers; brought by WARPS warps ---- */
    struct {
        int y0, x0;
        int first;         /* channel, of both inputs' together */
        int shift, groups; /* log2 of the octets that a warp takes at once; their groups */
        int turns;         /* over cells */
        char *to;
    } in;
    auto place = [&](int item, int buffer) {
        const int of = divided(item, a.chunks), chunk = item - of * a.chunks, ti = tile0 + of;
        const int ty = divided(ti, a.tiles_x), nc = min(a.chunk16, a.c16 - chunk * a.chunk16);
        in.y0 = ty * TILE_H - BORDER;
        in.x0 = (ti - ty * a.tiles_x) * TILE_W - BORDER;
        in.first = chunk * a.chunk16 * 16;
        in.shift = nc & 1 || a.in[0].cpad & 31 ? 1 : 2;
        in.groups = 2 * nc >> in.shift;
        in.turns =
            in.shift == 1 ? (CELLS + 16 * WARPS - 1) / (16 * WARPS) : (CELLS + 8 * WARPS - 1) / (8 * WARPS);
        in.to = smem + a.area_at + buffer * a.buffer_bytes;
    };
    const char *base0 = static_cast<const char *>(a.in[0].p) + (size_t)sample * a.in[0].stride,
               *base1 = static_cast<const char *>(a.in[1].p) + (size_t)sample * a.in[1].stride;
    /* This thread's cell in a turn. Eight lanes are eight cells of an octet, the warp's quarters octets of
     * the same cells. */
    struct spot {
        bool mine, inside;
        int cell, y, x;
    };
    auto spot_of = [&](int turn) {
        spot p;
        const int cell =
            ((turn * WARPS + loader) << (5 - in.shift)) + (lane & 7) + (lane >> (3 + in.shift)) * 8;
        p.mine = cell < CELLS;
        p.cell = min(cell, CELLS - 1);
        const int py = p.cell / BW;
        p.y = in.y0 + py;
        p.x = in.x0 + p.cell - py * BW;
        p.inside = (unsigned)p.y < (unsigned)a.height && (unsigned)p.x < (unsigned)a.width;
        return p;
    };
    /* fn(input, its load, where its plane begins, its channel) for each of this thread's octets. An input's
     * channels are whole groups: shift is 1 where they are not whole 32s. */
    auto octets = [&](auto fn) {
        const int octet = (lane >> 3) & ((1 << in.shift) - 1);
#pragma unroll 1
        for (int g = 0; g < in.groups; g++) {
            const int c = in.first + 8 * ((g << in.shift) + octet),
                      which = in.first + (8 * g << in.shift) >= a.in[0].cpad;
            fn(which, which ? a.in[1].load : a.in[0].load, in.to + ((g << in.shift) + octet) * PLANE,
               which ? c - a.in[0].cpad : c);
        }
    };
    /* What needs no arithmetic yet is copied as it is; what is left is done when the norm is known. */
    auto begin = [&]() {
        octets([&](int which, int load, char *plane, int c) {
            if (load != IC_CU_LOAD_NORM && load != IC_CU_LOAD_RAW)
                return;
            const char *from = (which ? base1 : base0) + 2 * c;
            const unsigned step = 2 * (which ? a.in[1].cpad : a.in[0].cpad);
            const uint32_t to = shared_address(plane);
#pragma unroll 2
            for (int turn = 0; turn < in.turns; turn++) {
                const spot p = spot_of(turn);
                if (p.mine) /* outside the grid: zeros */
                    copy16_or_zero(to + p.cell * 16,
                                   from + (p.inside ? (size_t)(unsigned)(p.y * a.width + p.x) * step : 0),
                                   p.inside);
            }
        });
        copies_commit();
    };
    auto end = [&](int turn0, int turn1) {
        octets([&](int which, int load, char *plane, int c) {
            if (load == IC_CU_LOAD_NORM) {
                const float *times = scale + (which ? a.in[0].cpad : 0) + c, *plus = times + channels;
                norm_octet<T> norm;
                norm.take(times, plus);
                for (int turn = turn0; turn < turn1;
                     turn += 2) { /* two at a time: their latencies overlap */
                    spot p[2];
                    uint4 v[2];
#pragma unroll
                    for (int k = 0; k < 2; k++) {
                        p[k] = spot_of(turn + k);
                        v[k] = make_uint4(0, 0, 0, 0);
                        if (p[k].mine) /* the rest would read what other threads bring */
                            v[k] = *reinterpret_cast<const uint4 *>(plane + p[k].cell * 16);
                    }
#pragma unroll
                    for (int k = 0; k < 2; k++)
                        v[k] = norm(v[k]);
#pragma unroll
                    for (int k = 0; k < 2; k++) /* outside it stays zero, after the activation */
                        if (p[k].mine && p[k].inside && turn + k < turn1)
                            *reinterpret_cast<uint4 *>(plane + p[k].cell * 16) = v[k];
                }
                return;
            }
            if (load == IC_CU_LOAD_RAW)
                return;
#pragma unroll 2
            for (int turn = turn0; turn < turn1; turn++) {
                const spot p = spot_of(turn);
                uint4 out = make_uint4(0, 0, 0, 0);
                if (p.inside) { /* of psi */
                    uint4 q[2];
                    load_psi(q, io.psi + (size_t)(p.y * a.width + p.x) * 2 * a.d, c, 2 * a.d);
                    const float *f = reinterpret_cast<const float *>(q);
                    out = make_uint4(T::pack(f[0], f[1]), T::pack(f[2], f[3]), T::pack(f[4], f[5]),
                                     T::pack(f[6], f[7]));
                }
                if (p.mine)
                    *reinterpret_cast<uint4 *>(plane + p.cell * 16) = out;
            }
        });
    };

    const int items = tiles * a.chunks;
    /* Where the epilogue has room of its own, a buffer is filled again before it, beside its work. */
    const bool early = !LOAD && a.buffers == 2 && a.out_at;
    auto coefficients = [&]() {
        norm_coefficients(a.in[0], sample, scale, shift, tid, THREADS);
        norm_coefficients(a.in[1], sample, scale + a.in[0].cpad, shift + a.in[0].cpad, tid, THREADS);
        __syncthreads();
    };
    if constexpr (LOAD > 0) {
        wait_for_previous();
        if (loads) {
            if constexpr (N == 128)
                asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
            place(0, 0);
            begin();
            coefficients();
            /* With a third buffer the next item is on its way while this one is normalised. */
            const bool ahead = a.buffers == 3;
            int buffer = 0, next = 0, turn = 0; /* turn: how often `next` has been all buffers */
            for (int item = 0; item < items; item++) {
                auto begin_next = [&]() {
                    if (item + 1 == items)
                        return;
                    if (++next == a.buffers) {
                        next = 0;
                        turn++;
                    }
                    if (turn > 0)
                        barrier_wait(tile_empty(next), (turn - 1) & 1);
                    place(item + 1, next);
                    begin();
                };
                if (ahead) {
                    begin_next();
                    place(item, buffer);
                }
                if (ahead && item + 1 < items)
                    copies_wait<1>();
                else
                    copies_wait<0>();
                end(0, in.turns);
                fence_writes();
                __syncwarp();
                if (lane == 0)
                    barrier_arrive(tile_full(buffer));
                if (++buffer == a.buffers)
                    buffer = 0;
                if (!ahead)
                    begin_next();
            }
            return;
        }
        if constexpr (N == 128)
            asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        coefficients();
    }
    auto sync_products = [&]() { /* of the warps that multiply */
                                 if constexpr (LOAD > 0)
                                     asm volatile("bar.sync 1, %0;" ::"n"(GROUP) : "memory");
                                 else
                                     __syncthreads();
    };
    int which = 0;           /* LOAD: the item's buffer */
    uint32_t which_turn = 0; /* and its phase */
    float acc[MT][N / 2];
    float total = 0; /* this lane's part of the statistics, over tiles */
    int add = 0, slot = wk;
    uint32_t phase = 0;

    for (int item = 0; item < items; item++) {
        const int ti = tile0 + divided(item, a.chunks), chunk = item - divided(item, a.chunks) * a.chunks;
        const bool last_chunk = chunk == a.chunks - 1, has_next = item + 1 < items;
        const int nc = min(a.chunk16, a.c16 - chunk * a.chunk16), stages = nc * TAPS / UNITS;
        if (!LOAD)
            which = a.buffers == 2 ? item & 1 : 0;
        char *buffer = smem + a.area_at + which * a.buffer_bytes;
        if constexpr (LOAD > 0) {
            barrier_wait(tile_full(which), which_turn);
        } else if (item == 0 || a.buffers == 1) {
            if (item == 0)
                wait_for_previous();
            else
                __syncthreads(); /* the buffer is free */
            place(item, which);
            begin();
            if (early && has_next) {
                place(1, 1);
                begin();
                place(0, 0);
            }
            if (item == 0)
                coefficients();
            if (early && has_next)
                copies_wait<1>();
            else
                copies_wait<0>();
            end(0, in.turns);
        }
        if constexpr (LOAD == 0) {
            fence_writes();
            __syncthreads();
        }

        for (int pass = 0; pass < a.passes; pass++) {
            const bool ahead = !LOAD && has_next && a.buffers == 2 && pass == 0;
            if (chunk == 0)
                add = 0;
            int before = -1; /* the slot whose products may still run */
            uint32_t before_phase = 0;
            auto release = [&]() {
                if (a.resident || before < 0)
                    return;
                __syncwarp();
                if (lane == 0)
                    barrier_arrive(empty(before));
                if (fill_left > 0)
                    fill((int)before_phase);
            };
            settle(acc);
            const int patch0 = wm * MT; /* the warpgroup's first */
            const uint32_t rows0 = matrix_low(
                               (shared_address(buffer) +
                                (patch0 / (TILE_W / 8) * 8 * BW + patch0 % (TILE_W / 8) * 8) * 16) /
                                   16,
                               PLANE / 16),
                           columns0 = matrix_low(ring / 16, 128 / 16);
            for (int s = wk; s < stages; s += WK) {
                barrier_wait(full(slot), a.resident ? 0 : phase);
                const int c = TAPS == 9 ? s / (9 / UNITS) : s * UNITS,
                          ky = TAPS == 9 ? s % (9 / UNITS) : 0; /* UNITS 9: 0 */
                const uint32_t rows = rows0 + (uint32_t)(c * 2 * PLANE + ky * BW * 16) / 16,
                               columns = columns0 + slot * (STAGE / 16);
                products_begin();
#pragma unroll
                for (int u = 0; u < UNITS; u++) {
                    const int tap = TAPS == 9 ? u / 3 * BW + u % 3 : u * 2 * PLANE / 16;
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        constexpr int ACROSS = TILE_W / 8; /* patches */
                        const int patch = MT % ACROSS == 0 ? m / ACROSS * 8 * BW + m % ACROSS * 8 : 0;
                        product<BW, UNIT / 16>(acc[m], rows + tap + patch, columns + u * (N8 * UNIT / 16),
                                               add, T());
                    }
                    add = 1;
                }
                products_commit();
                if (ahead) {                                      /* beside the products: the next item */
                    const int turn = s / WK, n = stages / WK - 1; /* the first begins, n end */
                    if (turn == 0) {
                        place(item + 1, 1 - which);
                        if (!early)
                            begin();
                    }
                    if (turn == 1 || n == 0)
                        copies_wait<0>();
                    if (turn > 0 || n == 0)
                        end(n ? divided(in.turns * (turn - 1), n) : 0,
                            n ? divided(in.turns * turn, n) : in.turns);
                }
                products_wait<1>();
                release();
                before = slot;
                before_phase = phase;
                slot += WK;
                if (slot >= a.ring) {
                    slot -= a.ring;
                    phase ^= 1;
                }
            }
            products_wait<0>();
            settle(acc);
            release();
            if constexpr (LOAD > 0) {
                __syncwarp();
                if (lane == 0)
                    barrier_arrive(tile_empty(which));
                if (++which == a.buffers) {
                    which = 0;
                    which_turn ^= 1;
                }
            } else if (early && item + 2 < items) {
                __syncthreads(); /* the tile has been read */
                place(item + 2, which);
                begin();
            }
            if (!last_chunk)
                continue;

            /* ---- epilogue ---- */
            char *area = a.out_at ? smem + a.out_at : buffer;
            if (!LOAD && (WK > 1 || !a.out_at))
                __syncthreads(); /* the tile has been read */
            if (WK > 1) {
                float4 *partial = reinterpret_cast<float4 *>(area);
                if (wk > 0) {
#pragma unroll
                    for (int m = 0; m < MT; m++)
#pragma unroll
                        for (int i = 0; i < N8; i++)
                            partial[(((wk - 1) * MT + m) * N8 + i) * GROUP + gtid] = make_float4(
                                acc[m][4 * i], acc[m][4 * i + 1], acc[m][4 * i + 2], acc[m][4 * i + 3]);
                }
                __syncthreads();
                if (wk == 0) {
#pragma unroll
                    for (int k = 1; k < WK; k++)
#pragma unroll
                        for (int m = 0; m < MT; m++)
#pragma unroll
                            for (int i = 0; i < N8; i++) {
                                const float4 v = partial[(((k - 1) * MT + m) * N8 + i) * GROUP + gtid];
                                acc[m][4 * i] += v.x;
                                acc[m][4 * i + 1] += v.y;
                                acc[m][4 * i + 2] += v.z;
                                acc[m][4 * i + 3] += v.w;
                            }
                }
                __syncthreads();
            }
            const int column0 = (block0 + pass) * N, ty = divided(ti, a.tiles_x), yt = ty * TILE_H,
                      xt = (ti - ty * a.tiles_x) * TILE_W;
            /* where this lane's eight channels of cell 0 go, and the way to others */
            const bool four = a.epilogue == IC_CU_STORE4;
            const int column = column0 + lane % N8 * 8, phase = four ? divided(column, a.cpad) : 0;
            const int cell_bytes = 2 * a.cpad * (four ? 2 : 1),
                      row_bytes = cell_bytes * a.width * (four ? 2 : 1);
            char *out_at = static_cast<char *>(a.out) + (size_t)sample * a.out_stride +
                           2 * (column - phase * a.cpad) + (phase >> 1) * row_bytes / 2 +
                           (phase & 1) * cell_bytes / 2;
            float keep[N8 * 2]; /* (sum, square) of eight columns each */
#pragma unroll
            for (int i = 0; i < N8 * 2; i++)
                keep[i] = 0;
            if (wk == 0) {
                char *mine = area + (wm * 4 + w4) * 16 * OUT_ROW;
                const uint32_t to =
                    shared_address(mine) + ((lane >> 3 & 1) * 8 + (lane & 7)) * OUT_ROW + (lane >> 4) * 16;
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    const int patch = wm * MT + m, py = yt + patch / (TILE_W / 8) * 8 + 2 * w4,
                              px = xt + patch % (TILE_W / 8) * 8;
                    const bool x_in = px + (lane >> 2) < a.width, in0 = x_in && py < a.height,
                               in1 = x_in && py + 1 < a.height;
#pragma unroll
                    for (int j = 0; j < N8; j += 2) {
                        uint32_t out[4];
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            const int n = j + h, at = column0 + n * 8 + (lane & 3) * 2;
                            float2 bias = make_float2(0, 0);
                            if (a.bias)
                                bias = __ldg(reinterpret_cast<const float2 *>(a.bias + at));
                            const float *sum = &acc[m][4 * n];
                            float v[4] = {sum[0] + bias.x, sum[1] + bias.y, sum[2] + bias.x,
                                          sum[3] + bias.y};
                            if (in0) {
                                keep[2 * n] += v[0] + v[1];
                                keep[2 * n + 1] += fmaf(v[0], v[0], v[1] * v[1]);
                            }
                            if (in1) {
                                keep[2 * n] += v[2] + v[3];
                                keep[2 * n + 1] += fmaf(v[2], v[2], v[3] * v[3]);
                            }
                            if (a.act) {
#pragma unroll
                                for (int i = 0; i < 4; i++)
                                    v[i] = elu(v[i]);
                            }
                            out[2 * h] = T::pack(v[0], v[1]);
                            out[2 * h + 1] = T::pack(v[2], v[3]);
                        }
                        store_matrix(to + j * 16, out[0], out[1], out[2], out[3]);
                    }
                    __syncwarp();
#pragma unroll
                    for (int k = 0; k < N8 / 2; k++) {
                        constexpr int ROWS = 32 / N8; /* cells that the warp writes at once */
                        const int r = k * ROWS + lane / N8, y = py + (k * ROWS >> 3),
                                  x = px + (k * ROWS & 7) + lane / N8;
                        if (y < a.height && x < a.width)
                            *reinterpret_cast<uint4 *>(out_at + (y * row_bytes + x * cell_bytes)) =
                                *reinterpret_cast<const uint4 *>(mine + r * OUT_ROW + lane % N8 * 16);
                    }
                    /* The warp has two whole rows of the patch, from an even cell on; four channels of 2x2 a lane. */
#pragma unroll 1
                    for (int k = 0; k < N / 32 && TAPS == 9 && a.pooled; k++) {
                        const int x = (k * 32 + lane) / (N / 4), c = (k * 32 + lane) % (N / 4) * 4;
                        if (py >= a.height || px + 2 * x >= a.width)
                            break;
                        uint2 v[4];
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            v[i] = *reinterpret_cast<const uint2 *>(
                                mine + ((i >> 1) * 8 + 2 * x + (i & 1)) * OUT_ROW + 2 * c);
                        *reinterpret_cast<uint2 *>(
                            static_cast<char *>(a.pooled) + (size_t)sample * a.pooled_stride +
                            2 * (column0 + c) + ((py >> 1) * (a.width >> 1) + (px >> 1) + x) * cell_bytes) =
                            pooled<T>(v, __ldg(reinterpret_cast<const uint2 *>(a.flip + column0 + c)));
                    }
                    __syncwarp();
                }
            }
            if (!a.stats)
                continue;
            if (wk == 0) {
                sum_many<N8 * 2>(keep, lane);
                total += keep[0];
            }
            if (has_next)
                continue;
            if (pass > 0)
                sync_products(); /* the sums of the pass before have been read */
            if (wk == 0) {
                constexpr int EACH = 32 / (N8 * 2);
                if (lane % EACH == 0)
                    sums[(wm * 4 + w4) * N8 * 2 + lane / EACH] = total;
                total = 0;
            }
            sync_products();
            if (tid < N8 && column0 + tid * 8 < a.columns) {
                float2 v = make_float2(0, 0);
#pragma unroll
                for (int i = 0; i < WM * 4; i++) {
                    v.x += sums[(i * N8 + tid) * 2];
                    v.y += sums[(i * N8 + tid) * 2 + 1];
                }
                reinterpret_cast<float2 *>(a.stats)[(size_t)sample * a.stats_stride +
                                                    (size_t)(column0 / 8 + tid) * a.slots + blockIdx.x] = v;
            }
        }
    }
#endif
}

#endif
