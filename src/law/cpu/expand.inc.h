/* Weights kept in 4 or 16 bits, made into the float32 form that the convolutions read, a pass of output
 * panels at a time (exec.c): a unit is one block of 16 outputs and IC_CPU_EXPAND_CHUNK inputs of it.
 *
 * Or, for larger Winograd layers, made in the scratch of the unit that reads them (wino_few).
 *
 * Vectors run along the output channels. A 4-bit code is looked up by one permutation of the codebook; a
 * 3x3 kernel then goes through Winograd's G g G^T in float32 (pack.c does float32 weights in double; the
 * difference is an ulp or two of a number that was rounded to 4 or 16 bits before). Points of a panel lie
 * IC_CPU_EXPAND_PAD floats further apart than they are long: 36 streams of stores a power of two apart
 * would all want the same cache set. */

#if IC_VW == 16
IC_INLINE vf nf4_value(vi code) /* only the low 4 bits of each lane count */
{
    return (vf)_mm512_permutexvar_ps((__m512i)code, _mm512_loadu_ps(ic_nf4_code));
}

IC_INLINE vf v_load_bf16(const uint16_t *p)
{
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i_u *)p)), 16);
}

IC_INLINE vf v_load_f16(const uint16_t *p)
{
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i_u *)p));
}
#elif IC_VW == 8
IC_INLINE vf nf4_value(vi code)
{
    const __m256 lo = _mm256_permutevar8x32_ps(_mm256_loadu_ps(ic_nf4_code), (__m256i)code);
    const __m256 hi = _mm256_permutevar8x32_ps(_mm256_loadu_ps(ic_nf4_code + 8), (__m256i)code);
    return (vf)_mm256_blendv_ps(lo, hi, (__m256)(code << 28)); /* by bit 3 */
}

IC_INLINE vf v_load_bf16(const uint16_t *p)
{
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i_u *)p)), 16);
}

IC_INLINE vf v_load_f16(const uint16_t *p)
{
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u *)p));
}
#else
IC_INLINE vf nf4_value(vi code)
{
    return (vf){ic_nf4_code[code[0] & 15], ic_nf4_code[code[1] & 15], ic_nf4_code[code[2] & 15],
                ic_nf4_code[code[3] & 15]};
}

IC_INLINE vf v_load_bf16(const uint16_t *p)
{
    return (vf){ic_bf16_to_f32(p[0]), ic_bf16_to_f32(p[1]), ic_bf16_to_f32(p[2]), ic_bf16_to_f32(p[3])};
}

IC_INLINE vf v_load_f16(const uint16_t *p)
{
    return (vf){ic_f16_to_f32(p[0]), ic_f16_to_f32(p[1]), ic_f16_to_f32(p[2]), ic_f16_to_f32(p[3])};
}
#endif

typedef uint32_t vu __attribute__((vector_size(IC_VW * 4)));
typedef uint32_t vu_mem __attribute__((vector_size(IC_VW * 4), aligned(4), may_alias));

/* Three taps to six points: (1, p, p^2) / prod_j (p - q_j) for p = 0, +-a, +-b; the last tap for infinity.
 */
IC_INLINE void wino_g6(vf g0, vf g1, vf g2, vf *o0, vf *o1, vf *o2, vf *o3, vf *o4, vf *o5)
{
    const float a2 = PT_A * PT_A, b2 = PT_B * PT_B;
    const float c0 = 1 / (a2 * b2), ca = 1 / (2 * a2 * (a2 - b2)), cb = 1 / (2 * b2 * (b2 - a2));
    const vf ea = v_fma(v_set1(ca * a2), g2, v_set1(ca) * g0),
             eb = v_fma(v_set1(cb * b2), g2, v_set1(cb) * g0);
    *o0 = v_set1(c0) * g0;
    *o1 = v_fma(v_set1(ca * PT_A), g1, ea);
    *o2 = v_fma(v_set1(-ca * PT_A), g1, ea);
    *o3 = v_fma(v_set1(cb * PT_B), g1, eb);
    *o4 = v_fma(v_set1(-cb * PT_B), g1, eb);
    *o5 = g2;
}

IC_INLINE void expand_wino(const vf *g, float *out, size_t point)
{
    vf t[18]; /* [6][3] */
    UNROLL for (int j = 0; j < 3; j++)
        wino_g6(g[j], g[3 + j], g[6 + j], &t[j], &t[3 + j], &t[6 + j], &t[9 + j], &t[12 + j], &t[15 + j]);
    UNROLL for (int i = 0; i < 6; i++)
    {
        vf o[6];
        wino_g6(t[3 * i], t[3 * i + 1], t[3 * i + 2], &o[0], &o[1], &o[2], &o[3], &o[4], &o[5]);
        UNROLL for (int j = 0; j < 6; j++) v_store(out + (size_t)(i * 6 + j) * point, o[j]);
    }
}

/* The scales of 16 outputs at one place of their rows: rows are whole blocks, so all switch together. */
static void row_scales(const struct ic_cpu_expand *x, unsigned block, size_t at, float *out)
{
    const size_t per_row = (size_t)x->cin * x->taps / IC_NF4_BLOCK, b = at / IC_NF4_BLOCK;
    for (unsigned l = 0; l < 16; l++) {
        const size_t o = (size_t)block * 16 + l;
        out[l] = o < x->cout ? ic_nf4_absmax(x->nf4, o * per_row + b) : 0;
    }
}

/* Those of any one input channel of 16 outputs: the first cut[l] taps of an output have scale s[0][l], the
 * rest s[1][l]. */
static void any_scales(const struct ic_cpu_expand *x, unsigned block, unsigned k, float s[2][16],
                       int32_t cut[16])
{
    const int i = x->chan_in[k];
    for (unsigned l = 0; l < 16; l++) {
        const int o = x->chan_out[block * 16 + l];
        s[0][l] = s[1][l] = 0;
        cut[l] = 0;
        if (o < 0 || i < 0)
            continue;
        const size_t f =
            (x->transposed ? (size_t)i * x->cout + (size_t)o : (size_t)o * x->cin + (size_t)i) * x->taps;
        s[0][l] = ic_nf4_absmax(x->nf4, f / IC_NF4_BLOCK);
        s[1][l] = ic_nf4_absmax(x->nf4, (f + x->taps - 1) / IC_NF4_BLOCK);
        cut[l] = (int32_t)(IC_NF4_BLOCK - f % IC_NF4_BLOCK);
    }
}

/* Scales of input k; those of k - 1 are in s. Returns how many taps have s[0] (IC_CPU_SCALES_ROWS). */
static unsigned scales_of(const struct ic_cpu_expand *x, unsigned block, unsigned k, bool first,
                          unsigned cut_before, float s[2][16], int32_t cut[16])
{
    if (x->scales == IC_CPU_SCALES_ANY) {
        any_scales(x, block, k, s, cut);
        return 0;
    }
    if (x->scales == IC_CPU_SCALES_ONE) { /* 16 outputs of 4 taps lie together: one block */
        const float one =
            ic_nf4_absmax(x->nf4, ((size_t)k * x->cout + (size_t)block * 16) * 4 / IC_NF4_BLOCK);
        for (unsigned l = 0; l < 16; l++)
            s[0][l] = one;
        return x->taps;
    }
    const size_t at = (size_t)k * x->taps;
    const unsigned until = IC_NF4_BLOCK - (unsigned)(at % IC_NF4_BLOCK);
    if (first || until == IC_NF4_BLOCK)
        row_scales(x, block, at, s[0]);
    else if (cut_before < x->taps)
        memcpy(s[0], s[1], sizeof s[0]);
    if (until < x->taps)
        row_scales(x, block, at + until, s[1]);
    return until;
}

/* The chunk being expanded: where its values begin, and the scales of the input at hand. */
struct few {
    const struct ic_cpu_expand *x;
    const uint16_t *half;
    const uint32_t *words;
    unsigned k0, until;
    float s[2][16] __attribute__((aligned(64)));
    int32_t cut[16] __attribute__((aligned(64)));
};

IC_INLINE void few_begin(struct few *f, const struct ic_cpu_expand *x, unsigned block, unsigned k0,
                         const enum ic_cpu_form form, const unsigned taps)
{
    f->x = x;
    f->k0 = k0;
    f->until = taps;
    if (form == IC_CPU_NF4)
        f->words = x->words + ((size_t)block * x->k + k0) / 8 * taps * 16;
    else
        f->half = x->half + ((size_t)block * x->k + k0) * taps * 16;
    memset(f->s, 0, sizeof f->s);
    memset(f->cut, 0, sizeof f->cut);
}

/* The taps of input k for outputs v..v+IC_VW of the block; f's scales are those of k. */
IC_INLINE void few_taps(const struct few *f, unsigned k, unsigned v, const enum ic_cpu_form form,
                        const unsigned taps, vf *g)
{
    const bool any = f->x->scales == IC_CPU_SCALES_ANY;
    UNROLL for (unsigned tap = 0; tap < taps; tap++)
    {
        const unsigned n = (k - f->k0) * taps + tap;
        if (form == IC_CPU_BF16)
            g[tap] = v_load_bf16(f->half + (size_t)n * 16 + v);
        else if (form == IC_CPU_F16)
            g[tap] = v_load_f16(f->half + (size_t)n * 16 + v);
        else {
            const vu_mem w = *(const vu_mem *)(f->words + (size_t)(n / 8) * 16 + v);
            vf scale = v_load(f->s[!any && tap >= f->until] + v);
            if (any) {
                const vi first = *(const vi *)(const void *)(f->cut + v) > (int32_t)tap;
                scale = (vf)(((vi)scale & first) | ((vi)v_load(f->s[1] + v) & ~first));
            }
            g[tap] = nf4_value((vi)(w >> (4 * (n % 8)))) * scale;
        }
    }
}

IC_INLINE void expand_chunk(const struct ic_cpu_expand *x, unsigned block, unsigned k0, float *u,
                            unsigned width, size_t point, const enum ic_cpu_form form, const unsigned taps,
                            const bool wino)
{
    struct few f;
    const unsigned k1 = k0 + IC_CPU_EXPAND_CHUNK < x->k ? k0 + IC_CPU_EXPAND_CHUNK : x->k;
    few_begin(&f, x, block, k0, form, taps);
    for (unsigned k = k0; k < k1; k++) {
        vf g[9];
        float *out = u + (size_t)k * width;
        if (form == IC_CPU_NF4)
            f.until = scales_of(x, block, k, k == k0, f.until, f.s, f.cut);
        for (unsigned v = 0; v < 16; v += IC_VW) {
            few_taps(&f, k, v, form, taps, g);
            if (wino)
                expand_wino(g, out + v, point);
            else
                UNROLL for (unsigned tap = 0; tap < taps; tap++)
                    v_store(out + (size_t)tap * point + v, g[tap]);
        }
    }
}

/* To bfloat16, nearest and ties to even, in the upper half of each lane. */
IC_INLINE vi v_bf16(vf x)
{
    const vi bits = (vi)x;
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & (int32_t)0xFFFF0000;
}

/* Four taps as pairs of bfloat16: of inputs k (low half) and k + 1, [k/2][width]; u in words. */
IC_INLINE void expand_pairs(const struct ic_cpu_expand *x, unsigned block, unsigned k0, float *u,
                            unsigned width, size_t point, const enum ic_cpu_form form)
{
    struct few f;
    const unsigned k1 = k0 + IC_CPU_EXPAND_CHUNK < x->k ? k0 + IC_CPU_EXPAND_CHUNK : x->k;
    few_begin(&f, x, block, k0, form, 4);
    for (unsigned k = k0; k < k1; k += 2) {
        vi lo[4][16 / IC_VW];
        for (unsigned odd = 0; odd < 2; odd++) {
            if (form == IC_CPU_NF4)
                f.until = scales_of(x, block, k + odd, k + odd == k0, f.until, f.s, f.cut);
            for (unsigned v = 0; v < 16; v += IC_VW) {
                vf g[4];
                few_taps(&f, k + odd, v, form, 4, g);
                UNROLL for (unsigned tap = 0; tap < 4; tap++)
                {
                    const vi b = v_bf16(g[tap]);
                    if (odd)
                        v_store(u + (size_t)(k / 2) * width + (size_t)tap * point + v,
                                (vf)(b | lo[tap][v / IC_VW]));
                    else
                        lo[tap][v / IC_VW] = (vi)((vu)b >> 16);
                }
            }
        }
    }
}

#define EXPAND_FN(form, taps, wino)                                                                        \
    static __attribute__((noinline)) void expand_##form##_##taps##_##wino(                                 \
        const struct ic_cpu_expand *x, unsigned block, unsigned k0, float *u, unsigned width,              \
        size_t point)                                                                                      \
    {                                                                                                      \
        expand_chunk(x, block, k0, u, width, point, IC_CPU_##form, taps, wino);                            \
    }
#define EXPAND_FNS(form)                                                                                   \
    EXPAND_FN(form, 9, 1) EXPAND_FN(form, 9, 0) EXPAND_FN(form, 4, 0) EXPAND_FN(form, 1, 0)
#define PAIRS_FN(form)                                                                                     \
    static __attribute__((noinline)) void expand_##form##_pairs(const struct ic_cpu_expand *x,             \
                                                                unsigned block, unsigned k0, float *u,     \
                                                                unsigned width, size_t point)              \
    {                                                                                                      \
        expand_pairs(x, block, k0, u, width, point, IC_CPU_##form);                                        \
    }
PAIRS_FN(BF16)
PAIRS_FN(NF4)
EXPAND_FNS(F16)
EXPAND_FNS(BF16)
EXPAND_FNS(NF4)

typedef void (*expand_fn)(const struct ic_cpu_expand *, unsigned, unsigned, float *, unsigned, size_t);

static expand_fn expand_fn_of(const struct ic_cpu_expand *x)
{
    static const expand_fn fns[][4] = {
        [IC_CPU_F16] = {expand_F16_9_1, expand_F16_9_0, expand_F16_4_0, expand_F16_1_0},
        [IC_CPU_BF16] = {expand_BF16_9_1, expand_BF16_9_0, expand_BF16_4_0, expand_BF16_1_0},
        [IC_CPU_NF4] = {expand_NF4_9_1, expand_NF4_9_0, expand_NF4_4_0, expand_NF4_1_0},
    };
    if (x->pairs)
        return x->form == IC_CPU_NF4 ? expand_NF4_pairs : expand_BF16_pairs;
    return fns[x->form][x->taps == 9 ? !x->wino : x->taps == 4 ? 2 : 3];
}

static void expand(const struct ic_cpu_expand *x, unsigned unit)
{
    const unsigned chunks = (x->k + IC_CPU_EXPAND_CHUNK - 1) / IC_CPU_EXPAND_CHUNK;
    const unsigned block = x->block_from + unit / chunks, panel = block / 2;
    const unsigned width = x->blocks - panel * 2 >= 2 ? 32 : 16;
    const size_t point = x->transposed ? x->tap_stride : (size_t)x->k * width;
    float *u = x->u + (panel - x->block_from / 2) * x->panel_stride + block % 2 * 16;
    expand_fn_of(x)(x, block, unit % chunks * IC_CPU_EXPAND_CHUNK, u, width, point);
}

/* Winograd's convolution with weights in few bits. A unit takes more tiles than `wino` does, so that a
 * panel of weights, expanded in its own scratch (36 * K * 32 * 4 bytes: 1.2 MB at K = 256, about a core's
 * L2), serves all of them; point by point, so that a point's weights are read from L1 for all but the first
 * group. */
static void wino_few(const struct ic_cpu_conv *c, unsigned unit, float *scratch)
{
    const struct ic_cpu_segments seg = ic_cpu_segments_wino(c->height, c->width);
    const unsigned total = seg.rows * seg.per_row * c->samples, per_group = IC_CPU_TILES / seg.run;
    const unsigned split = unit % c->splits;
    const unsigned k_blocks = c->in[0].blocks + c->in[1].blocks;
    const size_t point = v_point(k_blocks), k = (size_t)k_blocks * 16;
    struct group {
        struct wino_tile tiles[IC_CPU_TILES];
        unsigned counts[IC_CPU_TILES], first, segments, n;
    } group[IC_CPU_GROUPS_MAX];
    float *v = scratch, *m = v + c->groups * 36 * point, *u = m + (size_t)c->groups * 2 * 36 * M_POINT;
    size_t *off = (size_t *)(u + 36 * (k * 32 + IC_CPU_EXPAND_PAD));
    unsigned groups = 0;
    for (; groups < c->groups; groups++) {
        struct group *g = &group[groups];
        g->first = (unit / c->splits * c->groups + groups) * per_group;
        g->segments = g->n = 0;
        for (; g->segments < per_group && g->first + g->segments < total; g->segments++) {
            g->counts[g->segments] = wino_segment(c, &seg, g->first + g->segments, g->tiles + g->n);
            g->n += g->counts[g->segments];
        }
        if (!g->n)
            break;
        wino_load(c, g->tiles, g->n, v + groups * 36 * point, point);
    }
    for (unsigned i = 0; i < k_blocks; i++)
        off[i] = i * IC_CPU_TILES * 16;

    const expand_fn fn = expand_fn_of(c->expand);
    const unsigned panels = (c->out_blocks + 1) / 2;
    const unsigned from = panels * split / c->splits, to = panels * (split + 1) / c->splits;
    for (unsigned panel = from; panel < to; panel++) {
        const unsigned width = c->out_blocks - panel * 2 >= 2 ? 32 : 16;
        const size_t u_point = k * width + IC_CPU_EXPAND_PAD;
        for (unsigned k0 = 0; k0 < k; k0 += IC_CPU_EXPAND_CHUNK)
            for (unsigned b = 0; b < width / 16; b++)
                fn(c->expand, panel * 2 + b, k0, u + b * 16, width, u_point);
        for (unsigned p = 0; p < 36; p++)
            for (unsigned i = 0; i < groups; i++) {
                struct gemm g = {.a = v + (i * 36 + p) * point,
                                 .off = off,
                                 .steps = k_blocks,
                                 .u = u + p * u_point,
                                 .width = width,
                                 .c = m + (size_t)i * 2 * 36 * M_POINT + p * M_POINT,
                                 .c_cell = 16,
                                 .c_block = 36 * M_POINT,
                                 .ahead = i ? NULL : u + (p + 1) * u_point};
                gemm_run(&g, group[i].n);
            }
        for (unsigned i = 0; i < groups; i++)
            for (unsigned b = 0; b < width / 16; b++)
                wino_store(c, group[i].first, group[i].counts, group[i].segments, group[i].tiles,
                           m + ((size_t)i * 2 + b) * 36 * M_POINT, panel * 2 + b);
    }
}

#if IC_VW == 16
/* Transposed 2x2 in products of bfloat16 pairs, summed in float32: twice the multiplications of a float32
 * FMA. Weights and inputs are rounded to bfloat16, as a law in bf16 is anyway; a row of inputs once for all
 * taps and panels. u: [tap][panel][K/2][width] pairs. Runs only where the machine has AVX512-BF16. */
#define BF16 __attribute__((target("avx512bf16")))

static inline BF16 __attribute__((always_inline)) void
dot_cells(const uint32_t *a, size_t a_block, unsigned k_blocks, const float *u, unsigned width,
          const float *bias, float *c, size_t c_block, const int np, const int nv)
{
    __m512 acc[8][2];
    UNROLL for (int v = 0; v < nv; v++) UNROLL for (int i = 0; i < np; i++) acc[i][v] =
        bias ? _mm512_loadu_ps(bias + 16 * v) : _mm512_setzero_ps();
    for (unsigned s = 0; s < k_blocks; s++)
        for (unsigned l = 0; l < 8; l++, u += width) {
            __m512bh w[2];
            UNROLL for (int v = 0; v < nv; v++) w[v] = (__m512bh)_mm512_loadu_ps(u + 16 * v);
            UNROLL for (int i = 0; i < np; i++)
            {
                const __m512bh x = (__m512bh)_mm512_set1_epi32((int)a[s * a_block + (size_t)i * 8 + l]);
                UNROLL for (int v = 0; v < nv; v++) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], x, w[v]);
            }
        }
    UNROLL for (int v = 0; v < nv; v++) UNROLL for (int i = 0; i < np; i++)
        _mm512_storeu_ps(c + (size_t)v * c_block + (size_t)i * 32, acc[i][v]);
}

static BF16 void convt_few(const struct ic_cpu_conv *c, unsigned unit, float *scratch)
{
    const unsigned sample = unit / c->height, y = unit % c->height, k_blocks = c->in[0].blocks,
                   n = c->width;
    const size_t plane = (size_t)c->height * n * 16, k = (size_t)k_blocks * 16, a_block = (size_t)n * 8;
    uint32_t *a = (uint32_t *)(void *)scratch;
    for (unsigned b = 0; b < k_blocks; b++)
        for (unsigned i = 0; i < n; i++) {
            const float *in = c->in[0].p + sample * c->in[0].stride + b * plane + ((size_t)y * n + i) * 16;
            _mm256_storeu_si256((__m256i_u *)(void *)(a + b * a_block + (size_t)i * 8),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(in)));
        }
    for (unsigned tap = 0; tap < 4; tap++)
        for (unsigned panel = c->panel_from; panel < c->panel_to; panel++) {
            const unsigned width = c->out_blocks - panel * 2 >= 2 ? 32 : 16;
            const float *u = c->u + tap * c->tap_stride + (panel - c->panel_from) * k / 2 * 32;
            const float *bias = c->bias ? c->bias + panel * 32 : NULL;
            float *out = c->out + sample * c->out_stride + panel * 2 * plane * 4 +
                         ((size_t)(2 * y + tap / 2) * n * 2 + tap % 2) * 16;
            unsigned i = 0;
            for (; i + 8 <= n; i += 8)
                if (width == 32)
                    dot_cells(a + (size_t)i * 8, a_block, k_blocks, u, 32, bias, out + (size_t)i * 32,
                              plane * 4, 8, 2);
                else
                    dot_cells(a + (size_t)i * 8, a_block, k_blocks, u, 16, bias, out + (size_t)i * 32,
                              plane * 4, 8, 1);
            for (; i < n; i++)
                if (width == 32)
                    dot_cells(a + (size_t)i * 8, a_block, k_blocks, u, 32, bias, out + (size_t)i * 32,
                              plane * 4, 1, 2);
                else
                    dot_cells(a + (size_t)i * 8, a_block, k_blocks, u, 16, bias, out + (size_t)i * 32,
                              plane * 4, 1, 1);
        }
}
#define CONVT_FEW convt_few
#else
#define CONVT_FEW NULL
#endif
