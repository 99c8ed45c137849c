/* Every kernel of every instruction set against plain loops in double, at sizes that reach each tail:
 * channels around the blocks of 16 and panels of 32, grids around the 4x4 tiles, groups of 16 tiles and
 * chunks of 32 cells. Instruction sets that this machine lacks are said to be skipped.
 *
 * Tolerances: a float32 dot product whose |w x| sum to S errs by a few units of 2^-24 S (terms of either
 * sign: far below the worst case, which grows with their number). 5 units are allowed to direct
 * convolution, 12 to Winograd, whose transforms mix a whole tile, hence S is the largest over the grid. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "law/cpu/pack.c" /* reaches its statics */
#include "law/cpu/synth.h"

#define ULP 0x1p-24

static const struct ic_cpu_kernels *usable(unsigned i)
{
    if (runs_here(known[i]))
        return known[i];
    print_message("skipped: this machine has no %s\n", known[i]->name);
    return NULL;
}

static float *floats(size_t n)
{
    float *p = aligned_alloc(64, (n * sizeof *p + 63) / 64 * 64 + 64);
    assert_non_null(p);
    memset(p, 0, (n * sizeof *p + 63) / 64 * 64 + 64);
    return p;
}

/* [samples][channels][cells] -> blocked, padding zero */
static float *to_blocks(const float *x, unsigned samples, unsigned channels, size_t cells)
{
    const unsigned blocks = ic_cpu_blocks(channels);
    float *out = floats((size_t)samples * blocks * 16 * cells);
    for (unsigned s = 0; s < samples; s++)
        for (unsigned c = 0; c < channels; c++)
            for (size_t i = 0; i < cells; i++)
                out[(((size_t)s * blocks + c / 16) * cells + i) * 16 + c % 16] =
                    x[((size_t)s * channels + c) * cells + i];
    return out;
}

static float at_block(const float *x, unsigned blocks, size_t cells, unsigned s, unsigned c, size_t i)
{
    return x[(((size_t)s * blocks + c / 16) * cells + i) * 16 + c % 16];
}

static float *noise(size_t n, float centre, uint64_t seed)
{
    float *p = floats(n);
    for (size_t i = 0; i < n; i++)
        p[i] = centre + synth_uniform(&seed);
    return p;
}

struct conv_case {
    unsigned h, w, cin[2], cout, samples, splits;
    bool bias;
    enum ic_law_act act;
};

static struct layer layer_for(const struct conv_case *t, const float *w)
{
    struct layer l = {.w = w, .cin = t->cin[0] + t->cin[1], .cout = t->cout};
    for (int i = 0; i < 2; i++) {
        l.in.channels[i] = t->cin[i];
        l.in.blocks[i] = ic_cpu_blocks(t->cin[i]);
    }
    l.out.channels[0] = t->cout;
    l.out.blocks[0] = ic_cpu_blocks(t->cout);
    l.k = (l.in.blocks[0] + l.in.blocks[1]) * 16;
    l.n = l.out.blocks[0] * 16;
    return l;
}

static double act_ref(double x, enum ic_law_act act)
{
    return act == IC_LAW_ACT_ELU && x < 0 ? expm1(x) : x;
}

/* out[o,y,x] in double and the sum of |w x| */
static double conv_ref(const struct conv_case *t, const float *const x[2], const float *w,
                       const float *bias, unsigned s, unsigned o, unsigned y, unsigned c, double *scale)
{
    double sum = bias ? (double)bias[o] : 0;
    const size_t cells = (size_t)t->h * t->w;
    *scale = fabs(sum);
    for (unsigned i = 0, first = 0; i < 2; first += t->cin[i++])
        for (unsigned k = 0; k < t->cin[i]; k++)
            for (unsigned tap = 0; tap < 9; tap++) {
                const unsigned iy = y + tap / 3 - 1, ix = c + tap % 3 - 1;
                if (iy >= t->h || ix >= t->w)
                    continue;
                const double p = (double)w[((size_t)o * (t->cin[0] + t->cin[1]) + first + k) * 9 + tap] *
                                 (double)x[i][((size_t)s * t->cin[i] + k) * cells + (size_t)iy * t->w + ix];
                sum += p;
                *scale += fabs(p);
            }
    return sum;
}

/* Statistics of the float32 outputs themselves, so that only the reduction is under test. */
static void check_moments(const struct ic_cpu_kernels *k, const struct conv_case *t,
                          const struct ic_cpu_conv *c, bool wino, unsigned groups)
{
    const struct ic_cpu_segments seg =
        wino ? ic_cpu_segments_wino(t->h, t->w) : ic_cpu_segments_direct(t->h, t->w);
    const size_t cells = (size_t)t->h * t->w, wide = c->out_blocks * 16;
    float *w = noise(t->cout, 1, 5), *b = noise(t->cout, 0, 6), *res = floats(3 * wide * t->samples);
    const struct ic_cpu_moments m = {.stats = c->stats,
                                     .segments = seg.rows * seg.per_row,
                                     .height = t->h,
                                     .width = t->w,
                                     .wino = wino,
                                     .channels = t->cout,
                                     .groups = groups,
                                     .eps = 1e-5f,
                                     .weight = w,
                                     .bias = groups ? b : NULL,
                                     .mean = res,
                                     .scale = res + wide * t->samples,
                                     .shift = res + 2 * wide * t->samples,
                                     .samples = t->samples};
    const unsigned size = groups ? t->cout / groups : 1;
    for (unsigned s = 0; s < t->samples; s++) {
        k->moments(&m, s);
        for (unsigned c0 = 0; c0 < t->cout; c0 += size) {
            double sum = 0, sq = 0;
            for (unsigned ch = c0; ch < c0 + size; ch++)
                for (size_t i = 0; i < cells; i++)
                    sum += (double)at_block(c->out, c->out_blocks, cells, s, ch, i);
            const double mu = groups ? sum / (double)(cells * size) : 0;
            for (unsigned ch = c0; ch < c0 + size; ch++)
                for (size_t i = 0; i < cells; i++)
                    sq += pow((double)at_block(c->out, c->out_blocks, cells, s, ch, i) - mu, 2);
            const double dev = sqrt(sq / (double)(cells * size) + 1e-5);
            for (unsigned ch = c0; ch < c0 + size; ch++) {
                const size_t at = s * wide + ch;
                assert_true(fabs((double)m.mean[at] - mu) <= 2e-6 * (fabs(mu) + dev));
                assert_true(fabs((double)m.scale[at] * dev / (double)w[ch] - 1) <= 5e-6);
                assert_true(m.shift[at] == (groups ? b[ch] : 0.0f));
            }
        }
        for (size_t ch = t->cout; ch < wide; ch++)
            assert_true(m.mean[s * wide + ch] == 0 && m.scale[s * wide + ch] == 0 &&
                        m.shift[s * wide + ch] == 0);
    }
    free(w);
    free(b);
    free(res);
}

static double conv_case_run(const struct ic_cpu_kernels *k, const struct conv_case *t, bool wino,
                            uint64_t seed)
{
    const size_t cells = (size_t)t->h * t->w;
    const unsigned cin = t->cin[0] + t->cin[1];
    float *w = noise((size_t)t->cout * cin * 9, 0, seed), *bias = noise(t->cout, 0, seed + 1);
    float *x[2], *xb[2];
    for (int i = 0; i < 2; i++) {
        x[i] = noise((size_t)t->samples * t->cin[i] * cells, 0.2f, seed + 2 + (uint64_t)i);
        xb[i] = to_blocks(x[i], t->samples, t->cin[i], cells);
    }
    const struct layer l = layer_for(t, w);
    const unsigned taps = wino ? 36 : 9, blocks = l.out.blocks[0];
    float *u = floats((size_t)taps * l.k * l.n + 64), *b = floats(l.n);
    pack_taps(&l, 9, taps, wino, u);
    memcpy(b, bias, t->cout * sizeof *b);
    float *out = floats((size_t)t->samples * l.n * cells),
          *stats = floats((size_t)t->samples * 2 * l.n * cells);
    float *scratch = floats(ic_cpu_wino_scratch(l.k / 16) + ic_cpu_direct_scratch(l.k / 16));
    struct ic_cpu_conv c = {.out = out,
                            .out_stride = (size_t)l.n * cells,
                            .out_blocks = blocks,
                            .height = t->h,
                            .width = t->w,
                            .u = u,
                            .bias = t->bias ? b : NULL,
                            .act = {.kind = t->act},
                            .stats = stats,
                            .samples = t->samples,
                            .splits = t->splits,
                            .panel_to = (blocks + 1) / 2};
    for (int i = 0; i < 2; i++) {
        c.in[i].p = xb[i];
        c.in[i].blocks = l.in.blocks[i];
        c.in[i].stride = (size_t)l.in.blocks[i] * 16 * cells;
    }
    for (unsigned n = wino ? ic_cpu_wino_units(&c) : ic_cpu_direct_units(&c); n-- > 0;)
        (wino ? k->wino : k->direct)(&c, n, scratch);
    double worst = 0, most = 0;
    for (unsigned s = 0; s < t->samples; s++)
        for (unsigned o = 0; o < t->cout; o++)
            for (unsigned y = 0; y < t->h; y++)
                for (unsigned cx = 0; cx < t->w; cx++) {
                    double scale;
                    const double want = act_ref(
                        conv_ref(t, (const float *const *)x, w, t->bias ? bias : NULL, s, o, y, cx, &scale),
                        t->act);
                    most = fmax(most, scale);
                    worst =
                        fmax(worst, fabs((double)at_block(out, blocks, cells, s, o, (size_t)y * t->w + cx) -
                                         want));
                }
    for (unsigned s = 0; s < t->samples; s++)
        for (unsigned o = t->cout; o < l.n; o++)
            for (size_t i = 0; i < cells; i++)
                assert_true(at_block(out, blocks, cells, s, o, i) == 0);
    const double bound = (wino ? 12 : 5) * ULP * most;
    if (!(worst <= bound))
        fail_msg("%s %s %ux%u cin %u+%u cout %u samples %u: error %g, bound %g", k->name,
                 wino ? "wino" : "direct", t->h, t->w, t->cin[0], t->cin[1], t->cout, t->samples, worst,
                 bound);
    check_moments(k, t, &c, wino, ic_law_groups(t->cout));
    check_moments(k, t, &c, wino, 0);
    for (int i = 0; i < 2; i++) {
        free(x[i]);
        free(xb[i]);
    }
    free(w);
    free(bias);
    free(u);
    free(b);
    free(out);
    free(stats);
    free(scratch);
    return worst / bound;
}

static unsigned pick(const unsigned *list, unsigned n, uint64_t *seed)
{
    return list[synth_next(seed) % n];
}

static void conv3x3(void **state)
{
    (void)state;
    static const unsigned sides[] = {1, 2, 3, 4, 5, 7, 8, 9, 10, 16, 17, 20, 36, 65, 70};
    static const unsigned ins[] = {1, 2, 6, 10, 16, 22, 40}, seconds[] = {0, 0, 5, 16, 20};
    static const unsigned outs[] = {1, 2, 11, 16, 18, 26, 32, 33, 44, 64};
    for (unsigned isa = 0; isa < KNOWN; isa++) {
        const struct ic_cpu_kernels *k = usable(isa);
        if (!k)
            continue;
        uint64_t seed = 11;
        double worst[2] = {0};
        for (unsigned i = 0; i < 120; i++) {
            struct conv_case t = {.h = pick(sides, 13, &seed),
                                  .w = pick(sides, 15, &seed),
                                  .cin = {pick(ins, 7, &seed), pick(seconds, 5, &seed)},
                                  .cout = pick(outs, 10, &seed),
                                  .bias = i % 2,
                                  .act = i % 3 ? IC_LAW_ACT_NONE : IC_LAW_ACT_ELU};
            t.samples = t.h * t.w < 200 ? 1 + i % 3 : 1;
            t.splits = 1 + i % 2;
            if (t.splits > (ic_cpu_blocks(t.cout) + 1) / 2)
                t.splits = 1;
            for (int wino = 0; wino < 2; wino++)
                worst[wino] = fmax(worst[wino], conv_case_run(k, &t, wino, i + 1));
        }
        print_message("%s: conv3x3 error/bound: direct %.2f, Winograd %.2f\n", k->name, worst[0], worst[1]);
    }
}

static void spikes(void **state)
{
    (void)state;
    for (unsigned isa = 0; isa < KNOWN; isa++) {
        const struct ic_cpu_kernels *k = usable(isa);
        if (!k)
            continue;
        float w[9] = {0, 0, 0, 0, 1, 0, 0, 0, 0}, x[6] = {0.5f, 1.0f, 1.0000001f, -3, 2, 1};
        float *in = to_blocks(x, 1, 1, 6), *u = floats(9 * 16 * 16), *out = floats(6 * 16),
              *scratch = floats(4096);
        const struct conv_case t = {.h = 2, .w = 3, .cin = {1, 0}, .cout = 1};
        const struct layer l = layer_for(&t, w);
        pack_taps(&l, 9, 9, false, u);
        const struct ic_cpu_conv c = {.in = {{in, 96, 1}},
                                      .out = out,
                                      .out_stride = 96,
                                      .out_blocks = 1,
                                      .height = 2,
                                      .width = 3,
                                      .u = u,
                                      .act = {IC_LAW_ACT_SPIKE, 1, 2},
                                      .samples = 1,
                                      .splits = 1,
                                      .panel_to = 1};
        for (unsigned n = 0; n < ic_cpu_direct_units(&c); n++)
            k->direct(&c, n, scratch);
        static const float want[6] = {0, 0, 2, 0, 2, 0}; /* strictly above */
        for (int i = 0; i < 6; i++)
            assert_true(out[i * 16] == want[i]);
        free(in);
        free(u);
        free(out);
        free(scratch);
    }
}

static void convt2x2(void **state)
{
    (void)state;
    static const unsigned sizes[][4] = {{1, 1, 1, 1},    {1, 5, 8, 4},    {3, 9, 22, 11},
                                        {4, 16, 64, 32}, {5, 17, 36, 18}, {9, 33, 20, 40}};
    for (unsigned isa = 0; isa < KNOWN; isa++) {
        const struct ic_cpu_kernels *k = usable(isa);
        for (unsigned i = 0; k && i < 6; i++) {
            const unsigned h = sizes[i][0], w = sizes[i][1], cin = sizes[i][2], cout = sizes[i][3],
                           samples = 2;
            const struct conv_case t = {.h = h, .w = w, .cin = {cin, 0}, .cout = cout};
            const size_t cells = (size_t)h * w;
            float *wt = noise((size_t)cin * cout * 4, 0, i), *bias = noise(cout, 0, i + 9),
                  *x = noise(samples * cin * cells, 0, i + 3);
            const struct layer l = layer_for(&t, wt);
            float *xb = to_blocks(x, samples, cin, cells), *u = floats((size_t)4 * l.k * l.n),
                  *b = floats(l.n);
            float *out = floats(samples * (size_t)l.n * cells * 4), *scratch = floats(l.k);
            pack_convt(&l, u);
            memcpy(b, bias, cout * sizeof *b);
            const struct ic_cpu_conv c = {.in = {{xb, l.k * cells, l.in.blocks[0]}},
                                          .out = out,
                                          .out_stride = l.n * cells * 4,
                                          .out_blocks = l.out.blocks[0],
                                          .height = h,
                                          .width = w,
                                          .u = u,
                                          .bias = b,
                                          .samples = samples,
                                          .splits = 1,
                                          .panel_to = (l.out.blocks[0] + 1) / 2,
                                          .tap_stride = (size_t)l.k * l.n};
            for (unsigned n = 0; n < samples * h; n++)
                k->convt(&c, n, scratch);
            for (unsigned s = 0; s < samples; s++)
                for (unsigned o = 0; o < cout; o++)
                    for (size_t p = 0; p < cells * 4; p++) {
                        const size_t y = p / (2 * w), cx = p % (2 * w), tap = y % 2 * 2 + cx % 2;
                        double want = (double)bias[o];
                        for (unsigned q = 0; q < cin; q++)
                            want += (double)x[((size_t)s * cin + q) * cells + y / 2 * w + cx / 2] *
                                    (double)wt[((size_t)q * cout + o) * 4 + tap];
                        assert_true(fabs((double)at_block(out, c.out_blocks, cells * 4, s, o, p) - want) <=
                                    ULP * 4 * (cin + 1));
                    }
            free(wt);
            free(bias);
            free(x);
            free(xb);
            free(u);
            free(b);
            free(out);
            free(scratch);
        }
    }
}

static void norm_and_pool(void **state)
{
    (void)state;
    for (unsigned isa = 0; isa < KNOWN; isa++) {
        const struct ic_cpu_kernels *k = usable(isa);
        for (unsigned i = 0; k && i < 12; i++) {
            const unsigned h = 2 + 2 * (i % 5), w = 2 + 2 * (i % 7), ch = 5 + 7 * i,
                           blocks = ic_cpu_blocks(ch), samples = 1 + i % 2;
            const size_t cells = (size_t)h * w, wide = blocks * 16;
            float *x = noise(samples * ch * cells, 0.3f, i), *xb = to_blocks(x, samples, ch, cells);
            float *p = floats(3 * wide * samples), *pool = floats(samples * wide * cells / 4);
            for (size_t q = 0; q < 3 * wide * samples; q++)
                p[q] = q % wide < ch ? (float)(q % 13) / 5 - 1 : 0;
            const struct ic_cpu_norm n = {.x = xb,
                                          .stride = wide * cells,
                                          .blocks = blocks,
                                          .height = h,
                                          .width = w,
                                          .mean = p,
                                          .scale = p + wide * samples,
                                          .shift = p + 2 * wide * samples,
                                          .act = {.kind = IC_LAW_ACT_ELU},
                                          .pool = i % 3 ? pool : NULL,
                                          .pool_stride = wide * cells / 4,
                                          .samples = samples,
                                          .rows = 2 + 2 * (i % 2)};
            for (unsigned unit = 0; unit < ic_cpu_norm_units(&n); unit++)
                k->norm(&n, unit);
            for (unsigned s = 0; s < samples; s++)
                for (unsigned c = 0; c < wide; c++)
                    for (size_t q = 0; q < cells; q++) {
                        const float got = at_block(xb, blocks, cells, s, c, q);
                        const size_t at = s * wide + c;
                        const double want = c >= ch ? 0
                                                    : act_ref(((double)x[((size_t)s * ch + c) * cells + q] -
                                                               (double)n.mean[at]) *
                                                                      (double)n.scale[at] +
                                                                  (double)n.shift[at],
                                                              IC_LAW_ACT_ELU);
                        assert_true(fabs((double)got - want) <= 1e-6 * (1 + fabs(want)));
                        const size_t y = q / w, cx = q % w;
                        if (n.pool && y % 2 == 0 && cx % 2 == 0) {
                            float most = got;
                            most = fmaxf(most, at_block(xb, blocks, cells, s, c, q + 1));
                            most = fmaxf(most, at_block(xb, blocks, cells, s, c, q + w));
                            most = fmaxf(most, at_block(xb, blocks, cells, s, c, q + w + 1));
                            assert_true(at_block(pool, blocks, cells / 4, s, c, y / 2 * (w / 2) + cx / 2) ==
                                        most);
                        }
                    }
            free(x);
            free(xb);
            free(p);
            free(pool);
        }
    }
}

/* The field's mean may lie far from 0 compared with its spread: the statistics must not cancel. */
static void moments_far_from_zero(void **state)
{
    (void)state;
    for (unsigned isa = 0; isa < KNOWN; isa++) {
        const struct ic_cpu_kernels *k = usable(isa);
        for (int wino = 0; k && wino < 2; wino++) {
            struct conv_case t = {
                .h = 40, .w = 72, .cin = {1, 0}, .cout = 16, .samples = 1, .splits = 1, .bias = true};
            const size_t cells = (size_t)t.h * t.w;
            float w[9 * 16] = {0}, *x = noise(cells, 0, 3), *xb = to_blocks(x, 1, 1, cells);
            for (int o = 0; o < 16; o++)
                w[o * 9 + 4] = 0.01f;
            const struct layer l = layer_for(&t, w);
            float *u = floats(36 * 16 * 16 + 64), *b = floats(16), *out = floats(cells * 16),
                  *stats = floats(2 * 16 * cells);
            float *scratch = floats(ic_cpu_wino_scratch(1) + ic_cpu_direct_scratch(1));
            pack_taps(&l, 9, wino ? 36 : 9, wino, u);
            for (int o = 0; o < 16; o++)
                b[o] = 30;
            const struct ic_cpu_conv c = {.in = {{xb, cells * 16, 1}},
                                          .out = out,
                                          .out_stride = cells * 16,
                                          .out_blocks = 1,
                                          .height = t.h,
                                          .width = t.w,
                                          .u = u,
                                          .bias = b,
                                          .stats = stats,
                                          .samples = 1,
                                          .splits = 1,
                                          .panel_to = 1};
            for (unsigned n = wino ? ic_cpu_wino_units(&c) : ic_cpu_direct_units(&c); n-- > 0;)
                (wino ? k->wino : k->direct)(&c, n, scratch);
            check_moments(k, &t, &c, wino, 2); /* mean 30, deviation 0.006 */
            free(x);
            free(xb);
            free(u);
            free(b);
            free(out);
            free(stats);
            free(scratch);
        }
    }
}

static void elu_is_accurate(void **state)
{
    (void)state;
    for (unsigned isa = 0; isa < KNOWN; isa++) {
        const struct ic_cpu_kernels *k = usable(isa);
        if (!k)
            continue;
        const size_t n = 1 << 20;
        float *x = floats(n), *y = floats(n);
        for (size_t i = 0; i < n; i++)
            x[i] =
                i < n / 2 ? -(float)i * 0x1p-13f : (i % 2 ? 1.0f : -1.0f) * (float)(i - n / 2) * 0x1p-18f;
        x[0] = -INFINITY, x[1] = INFINITY, x[2] = -0.0f, x[3] = -1e30f, x[4] = 3e38f, x[5] = NAN;
        memcpy(y, x, n * sizeof *y);
        k->elu(y, n);
        double worst = 0;
        for (size_t i = 6; i < n; i++)
            worst = fmax(worst, fabs((double)y[i] - (x[i] > 0 ? (double)x[i] : expm1((double)x[i]))));
        print_message("%s: elu, largest error %.2g\n", k->name, worst);
        assert_true(worst <= 1.2e-7); /* two ulp of 1: 1 is subtracted */
        assert_true(y[0] == -1 && y[1] == INFINITY && y[2] == 0 && y[3] == -1 && y[4] == 3e38f);
        assert_true(isnan(y[5])); /* a broken law shows */
        free(x);
        free(y);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(elu_is_accurate), cmocka_unit_test(conv3x3),
        cmocka_unit_test(spikes),          cmocka_unit_test(convt2x2),
        cmocka_unit_test(norm_and_pool),   cmocka_unit_test(moments_far_from_zero),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
