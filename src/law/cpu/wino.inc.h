/* 3x3 convolution by Winograd's F(4x4, 3x3): 36 multiplications for 16 outputs instead of 144.
 *
 * Points 0, +-3/4, +-3/2, infinity rather than the textbook's 0, +-1, +-2: on the golden laws the
 * textbook's points cost 2-5 times direct convolution's rounding error, these cost the same as PyTorch's
 * own float32 (max |psi_1 - float64|: 4.7e-7 against 4.4e-7 on unet_unitary-d4-b16, 6.3e-7 against
 * 2.6e-7 on ginzburg-landau, where the bound is 1e-5); the constants are exact in binary and +- pairs
 * share their even and odd halves.
 *
 * A unit: up to 16 tiles (whole segments) and a share of the output panels. Per unit:
 *   1. every input tile of every input block is transformed into V [36][K/16][16 tiles][16] in scratch
 *      (36 * K * 16 * 4 bytes: 590 KB at K = 256, made to stay in a core's L2 of 1 MB);
 *   2. per panel of 32 outputs and each of the 36 points, M = V_p x U_p (gemm.inc.h);
 *   3. M [2][36][16 tiles][16] is transformed back while it is in L1/L2, with the statistics.
 * Where one unit's tiles are all there are, two threads split the panels and both do step 1 (5% of the
 * work at K = 256): cheaper than a barrier between 1 and 2. */

#define PT_A 0.75f
#define PT_B 1.5f
#define M_POINT (IC_CPU_TILES * 16 + 16) /* floats from point to point in M; +16: off the same L1 set */

static size_t v_point(unsigned k_blocks)
{
    return (size_t)k_blocks * IC_CPU_TILES * 16 + 16;
}

/* One dimension of the input transform, in place. */
IC_INLINE void wino_in6(vf *d0, vf *d1, vf *d2, vf *d3, vf *d4, vf *d5)
{
    const float a2 = PT_A * PT_A, b2 = PT_B * PT_B;
    const vf t0 = v_fma(v_set1(-(a2 + b2)), *d2, v_fma(v_set1(a2 * b2), *d0, *d4));
    const vf e1 = v_fma(v_set1(-b2), *d2, *d4), o1 = v_fma(v_set1(-b2), *d1, *d3);
    const vf e2 = v_fma(v_set1(-a2), *d2, *d4), o2 = v_fma(v_set1(-a2), *d1, *d3);
    const vf t5 = v_fma(v_set1(-(a2 + b2)), *d3, v_fma(v_set1(a2 * b2), *d1, *d5));
    *d0 = t0;
    *d1 = v_fma(v_set1(PT_A), o1, e1);
    *d2 = v_fma(v_set1(-PT_A), o1, e1);
    *d3 = v_fma(v_set1(PT_B), o2, e2);
    *d4 = v_fma(v_set1(-PT_B), o2, e2);
    *d5 = t5;
}

/* Six products to four outputs. */
IC_INLINE void wino_out4(const vf *m, size_t step, vf *y0, vf *y1, vf *y2, vf *y3)
{
    const float a = PT_A, b = PT_B;
    const vf s1 = m[step] + m[2 * step], d1 = m[step] - m[2 * step];
    const vf s2 = m[3 * step] + m[4 * step], d2 = m[3 * step] - m[4 * step];
    *y0 = m[0] + s1 + s2;
    *y1 = v_fma(v_set1(a), d1, v_set1(b) * d2);
    *y2 = v_fma(v_set1(a * a), s1, v_set1(b * b) * s2);
    *y3 = v_fma(v_set1(a * a * a), d1, v_fma(v_set1(b * b * b), d2, m[5 * step]));
}

/* in: a 6x6 patch with `row` floats between its rows; out: 36 points, `point` floats apart. */
IC_INLINE void wino_in(const float *in, size_t row, float *out, size_t point)
{
    vf w[36];
    UNROLL for (int x = 0; x < 6; x++)
    {
        vf t[6];
        UNROLL for (int y = 0; y < 6; y++) t[y] = v_load(in + (size_t)y * row + (size_t)x * 16);
        wino_in6(&t[0], &t[1], &t[2], &t[3], &t[4], &t[5]);
        UNROLL for (int y = 0; y < 6; y++) w[y * 6 + x] = t[y];
    }
    UNROLL for (int y = 0; y < 6; y++)
    {
        vf *t = w + y * 6;
        wino_in6(&t[0], &t[1], &t[2], &t[3], &t[4], &t[5]);
        UNROLL for (int x = 0; x < 6; x++) v_store(out + (size_t)(y * 6 + x) * point, t[x]);
    }
}

struct wino_tile {
    unsigned sample, ty, tx;
};

/* All tiles of the unit, all input blocks -> V. */
static void wino_load(const struct ic_cpu_conv *c, const struct wino_tile *tiles, unsigned n, float *v,
                      size_t point)
{
    const int height = (int)c->height, width = (int)c->width;
    const size_t plane = (size_t)c->height * c->width * 16, row = (size_t)c->width * 16;
    unsigned kb = 0;
    for (int src = 0; src < 2; src++) {
        for (unsigned blk = 0; blk < c->in[src].blocks; blk++, kb++) {
            for (unsigned t = 0; t < n; t++) {
                const float *in = c->in[src].p + tiles[t].sample * c->in[src].stride + blk * plane;
                float *out = v + ((size_t)kb * IC_CPU_TILES + t) * 16;
                const int y0 = (int)tiles[t].ty * 4 - 1, x0 = (int)tiles[t].tx * 4 - 1;
                if (y0 >= 0 && x0 >= 0 && y0 + 6 <= height && x0 + 6 <= width) {
                    const float *p = in + (size_t)y0 * row + (size_t)x0 * 16;
                    for (int s = 0; s < 16; s += IC_VW)
                        wino_in(p + s, row, out + s, point);
                    continue;
                }
                float patch[36 * 16] __attribute__((aligned(64))); /* at a border: zeros outside */
                for (int y = 0; y < 6; y++)
                    for (int x = 0; x < 6; x++) {
                        float *q = patch + (y * 6 + x) * 16;
                        const int iy = y0 + y, ix = x0 + x;
                        const bool inside = iy >= 0 && iy < height && ix >= 0 && ix < width;
                        const float *p =
                            in + ((size_t)(inside ? iy : 0) * c->width + (size_t)(inside ? ix : 0)) * 16;
                        for (int s = 0; s < 16; s += IC_VW)
                            v_store(q + s, inside ? v_load(p + s) : v_zero());
                    }
                for (int s = 0; s < 16; s += IC_VW)
                    wino_in(patch + s, 6 * 16, out + s, point);
            }
        }
    }
}

struct moments {
    vf pivot, sum, square; /* of x - pivot: no cancellation where the mean is far from 0 */
};

/* One tile, one vector of channels: M -> outputs, statistics. */
IC_INLINE void wino_out(const struct ic_cpu_conv *c, const float *m, vf bias, float *out, unsigned vy,
                        unsigned vx, struct moments *mo, bool first)
{
    vf w[24], y[16];
    const size_t row = (size_t)c->width * 16;
    UNROLL for (int x = 0; x < 6; x++)
    {
        vf t[6];
        UNROLL for (int i = 0; i < 6; i++) t[i] = v_load(m + (size_t)(i * 6 + x) * M_POINT);
        wino_out4(t, 1, &w[x], &w[6 + x], &w[12 + x], &w[18 + x]);
    }
    UNROLL for (int i = 0; i < 4; i++)
        wino_out4(w + i * 6, 1, &y[i * 4], &y[i * 4 + 1], &y[i * 4 + 2], &y[i * 4 + 3]);
    UNROLL for (int i = 0; i < 16; i++) y[i] = v_act(y[i] + bias, &c->act);
    if (first) {
        mo->pivot = y[0];
        mo->sum = mo->square = v_zero();
    }
    if (vy == 4 && vx == 4) {
        UNROLL for (int i = 0; i < 16; i++)
            v_store(out + (size_t)(i / 4) * row + (size_t)(i % 4) * 16, y[i]);
        vf s = v_zero(), q = v_zero();
        UNROLL for (int i = 0; i < 16; i++)
        {
            vf d = y[i] - mo->pivot;
            s += d;
            q = v_fma(d, d, q);
        }
        mo->sum += s;
        mo->square += q;
        return;
    }
    for (unsigned i = 0; i < vy; i++)
        for (unsigned j = 0; j < vx; j++) {
            vf d = y[i * 4 + j] - mo->pivot;
            v_store(out + (size_t)i * row + (size_t)j * 16, y[i * 4 + j]);
            mo->sum += d;
            mo->square = v_fma(d, d, mo->square);
        }
}

static unsigned wino_segment(const struct ic_cpu_conv *c, const struct ic_cpu_segments *seg, unsigned index,
                             struct wino_tile *tiles)
{
    const unsigned per = seg->rows * seg->per_row, across = (c->width + 3) / 4;
    const unsigned sample = index / per, ty = index % per / seg->per_row;
    const unsigned from = index % seg->per_row * seg->run;
    const unsigned n = across - from < seg->run ? across - from : seg->run;
    for (unsigned i = 0; i < n; i++)
        tiles[i] = (struct wino_tile){sample, ty, from + i};
    return n;
}

static void wino_store(const struct ic_cpu_conv *c, unsigned first, const unsigned *counts,
                       unsigned segments, const struct wino_tile *tiles, const float *m, unsigned block)
{
    const size_t plane = (size_t)c->height * c->width * 16;
    const unsigned channels = c->out_blocks * 16;
    for (unsigned s = 0; s < 16; s += IC_VW) {
        const vf bias = c->bias ? v_load(c->bias + block * 16 + s) : v_zero();
        unsigned t = 0;
        for (unsigned g = 0; g < segments; g++) {
            struct moments mo = {v_zero(), v_zero(), v_zero()};
            unsigned cells = 0;
            for (unsigned i = 0; i < counts[g]; i++, t++) {
                const struct wino_tile *tile = &tiles[t];
                const unsigned ly = c->height - tile->ty * 4, lx = c->width - tile->tx * 4;
                const unsigned vy = ly < 4 ? ly : 4, vx = lx < 4 ? lx : 4;
                float *out = c->out + tile->sample * c->out_stride + block * plane +
                             ((size_t)tile->ty * 4 * c->width + tile->tx * 4) * 16 + s;
                wino_out(c, m + (size_t)t * 16 + s, bias, out, vy, vx, &mo, i == 0);
                cells += vy * vx;
            }
            if (c->stats) {
                float *st = c->stats + (size_t)(first + g) * 2 * channels + block * 16 + s;
                const vf r = v_set1(1.0f / (float)cells);
                v_store(st, v_fma(mo.sum, r, mo.pivot));
                v_store(st + channels, v_max(v_zero(), mo.square - mo.sum * mo.sum * r));
            }
        }
    }
}

static void wino(const struct ic_cpu_conv *c, unsigned unit, float *scratch)
{
    const struct ic_cpu_segments seg = ic_cpu_segments_wino(c->height, c->width);
    const unsigned total = seg.rows * seg.per_row * c->samples;
    const unsigned per_unit = IC_CPU_TILES / seg.run;
    const unsigned first = unit / c->splits * per_unit, split = unit % c->splits;
    const unsigned k_blocks = c->in[0].blocks + c->in[1].blocks;
    const size_t point = v_point(k_blocks), k = (size_t)k_blocks * 16;
    struct wino_tile tiles[IC_CPU_TILES];
    unsigned counts[IC_CPU_TILES], segments = 0, n = 0;
    for (; segments < per_unit && first + segments < total; segments++) {
        counts[segments] = wino_segment(c, &seg, first + segments, tiles + n);
        n += counts[segments];
    }

    float *v = scratch, *m = scratch + 36 * point;
    size_t *off = (size_t *)(m + 2 * 36 * M_POINT);
    for (unsigned i = 0; i < k_blocks; i++)
        off[i] = i * IC_CPU_TILES * 16;
    wino_load(c, tiles, n, v, point);

    const unsigned panels = c->panel_to - c->panel_from;
    const unsigned from = panels * split / c->splits, to = panels * (split + 1) / c->splits;
    for (unsigned at = from; at < to; at++) {
        const unsigned panel = c->panel_from + at, width = c->out_blocks - panel * 2 >= 2 ? 32 : 16;
        const float *u = c->u + (size_t)at * 36 * k * 32;
        for (unsigned p = 0; p < 36; p++) {
            const float *up = u + (size_t)p * k * width;
            struct gemm g = {.a = v + p * point,
                             .off = off,
                             .steps = k_blocks,
                             .u = up,
                             .width = width,
                             .c = m + p * M_POINT,
                             .c_cell = 16,
                             .c_block = 36 * M_POINT,
                             .ahead = up + k * width};
            gemm_run(&g, n);
        }
        for (unsigned b = 0; b < width / 16; b++)
            wino_store(c, first, counts, segments, tiles, m + (size_t)b * 36 * M_POINT, panel * 2 + b);
    }
}
