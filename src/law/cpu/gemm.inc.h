/* The inner product everything rests on: NP cells (or Winograd tiles) times NV vectors of output
 * channels, kept in registers over the whole reduction.
 *
 *   c[i][o] = init[o] + sum over blocks s, lanes l of a[off[s] + 16 i + l] * u[(16 s + l) * width + o]
 *
 * The order of the sum is that of u's rows whatever NP is: a cell's result does not depend on how many
 * neighbours were computed with it. Register budgets: AVX-512 8x2 accumulators + 2 weights (an FMA a
 * cycle needs >= 4 independent ones; 10 loads per 16 FMAs); AVX2 5x2 of 16 registers; baseline 4x2. */

#if IC_VW == 16
#define IC_NP 8
#elif IC_VW == 8
#define IC_NP 6
#else
#define IC_NP 4
#endif

struct gemm {
    const float *a;
    const size_t *off; /* floats from a, per block of 16 */
    size_t steps;      /* entries of off */
    const float *u;
    unsigned width;    /* floats of a row of u: 32 or 16 */
    const float *init; /* [width] or NULL */
    float *c;
    size_t c_cell, c_block; /* floats between cells, and between blocks of 16 channels */
    const float *ahead;     /* weights wanted next, fetched one line per row of u; NULL: none */
};

#define UNROLL _Pragma("GCC unroll 16")

IC_INLINE void gemm_body(const struct gemm *g, const float *a0, float *c0, unsigned lane, const int np,
                         const int nv)
{
    vf acc[IC_NP][2];
    const unsigned width = g->width;
    const float *u = g->u + lane;
    const float *ahead = g->ahead ? g->ahead : g->u;
    UNROLL for (int v = 0; v < nv; v++)
    {
        vf b = g->init ? v_load(g->init + lane + v * IC_VW) : v_zero();
        UNROLL for (int i = 0; i < np; i++) acc[i][v] = b;
    }
    for (size_t s = 0; s < g->steps; s++) {
        const float *a = a0 + g->off[s];
        for (int l = 0; l < 16; l++) {
            vf w[2];
            UNROLL for (int v = 0; v < nv; v++) w[v] = v_load(u + v * IC_VW);
            __builtin_prefetch(ahead);
            ahead += 16;
            UNROLL for (int i = 0; i < np; i++)
            {
                vf x = v_set1(a[i * 16 + l]);
                UNROLL for (int v = 0; v < nv; v++) acc[i][v] = v_fma(x, w[v], acc[i][v]);
            }
            u += width;
        }
    }
    UNROLL for (int v = 0; v < nv; v++)
    {
        const unsigned o = lane + (unsigned)v * IC_VW;
        float *c = c0 + (size_t)(o / 16) * g->c_block + o % 16;
        UNROLL for (int i = 0; i < np; i++) v_store(c + (size_t)i * g->c_cell, acc[i][v]);
    }
}

#define GEMM_FN(np, nv)                                                                                    \
    static __attribute__((noinline)) void gemm_##np##_##nv(const struct gemm *g, const float *a, float *c, \
                                                           unsigned lane)                                  \
    {                                                                                                      \
        gemm_body(g, a, c, lane, np, nv);                                                                  \
    }
#define GEMM_FNS(np) GEMM_FN(np, 1) GEMM_FN(np, 2)
GEMM_FNS(1)
GEMM_FNS(2)
GEMM_FNS(3)
GEMM_FNS(4)
#if IC_NP >= 6
GEMM_FNS(5)
GEMM_FNS(6)
#endif
#if IC_NP >= 8
GEMM_FNS(7)
GEMM_FNS(8)
#endif

static void (*const gemm_fns[IC_NP][2])(const struct gemm *, const float *, float *, unsigned) = {
    {gemm_1_1, gemm_1_2}, {gemm_2_1, gemm_2_2}, {gemm_3_1, gemm_3_2}, {gemm_4_1, gemm_4_2},
#if IC_NP >= 6
    {gemm_5_1, gemm_5_2}, {gemm_6_1, gemm_6_2},
#endif
#if IC_NP >= 8
    {gemm_7_1, gemm_7_2}, {gemm_8_1, gemm_8_2},
#endif
};

/* Any number of cells, all `width` channels. Cells are cut evenly: 9 as 5 + 4, not 8 + 1. */
static void gemm_run(struct gemm *g, unsigned cells)
{
    const unsigned parts = (cells + IC_NP - 1) / IC_NP;
    const unsigned nv = g->width >= 2 * IC_VW ? 2 : 1;
    const float *ahead = g->ahead;
    for (unsigned part = 0, at = 0; part < parts; part++) {
        const unsigned n = (cells - at + (parts - part) - 1) / (parts - part);
        for (unsigned lane = 0; lane < g->width; lane += nv * IC_VW) {
            gemm_fns[n - 1][nv - 1](g, g->a + (size_t)at * 16, g->c + (size_t)at * g->c_cell, lane);
            if (ahead) /* each call fetches one line per row; a row of 32 has two */
                g->ahead = g->ahead == ahead && g->width == 32 ? ahead + g->steps * 16 * 16 : ahead;
        }
        at += n;
    }
    g->ahead = ahead;
}

IC_INLINE vf v_act(vf x, const struct ic_cpu_act *act)
{
    switch (act->kind) {
    case IC_LAW_ACT_ELU: return v_elu(x);
    case IC_LAW_ACT_SPIKE: {
        vi m = x > v_set1(act->spike_at);
        return (vf)((vi)v_set1(act->spike_to) & m);
    }
    default: return x;
    }
}
