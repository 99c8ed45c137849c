/* The plan's layout, each operation of the reference on values that a hand can compute, and whole networks
 * of odd sizes against a second, naive implementation that shares no code with either. */
#include <setjmp.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "law/fixture.h"
#include "law/plan.h"

/* ---- One operation --------------------------------------------------------------------------- */

/* A plan of two ops: MEM_IN brings `in` [c,h,w] to tensor 0, then `op` makes tensor 1 [oc,oh,ow] (or works
 * in place on tensor 0). */
struct one {
    struct ic_law law;
    struct ic_law_weight w[2];
    struct ic_law_plan plan;
};

static void one_tensor(struct one *o, int i, unsigned c, unsigned h, unsigned w, size_t offset)
{
    o->plan.tensors[i] = (struct ic_law_tensor){
        .channels = c, .height = h, .width = w, .stride = (size_t)4096, .offset = offset, .label = "t"};
}

static void run_one(struct one *o, struct ic_law_op op, unsigned ic, unsigned ih, unsigned iw, float *in,
                    unsigned oc, unsigned oh, unsigned ow, float *c, float *out)
{
    struct ic_err err = {0};
    struct ic_law_packed *packed;
    struct ic_law_exec *exec;
    const struct ic_law_backend *be = &ic_law_backend_ref;
    bool in_place = op.kind == IC_LAW_OP_GROUPNORM || op.kind == IC_LAW_OP_RMSNORM;
    o->law.weights = o->w;
    o->law.weight_count = 2;
    o->plan.law = &o->law;
    o->plan.batch = 1;
    o->plan.arena_bytes = 8192;
    o->plan.op_count = 2;
    o->plan.tensor_count = 2;
    one_tensor(o, 0, ic, ih, iw, 0);
    one_tensor(o, 1, oc, oh, ow, 4096);
    o->plan.ops[0] = (struct ic_law_op){
        .kind = IC_LAW_OP_MEM_IN, .in = {-1, -1}, .out = 0, .cout = ic, .height = ih, .width = iw};
    op.in[0] = 0;
    op.in[1] = op.cin[1] ? 0 : -1;
    op.out = in_place ? 0 : 1;
    op.cin[0] = ic;
    op.cout = oc;
    op.height = oh;
    op.width = ow;
    o->plan.ops[1] = op;
    o->plan.net_out = op.out;
    assert_int_equal(be->pack(&o->law, 1, &packed, &err), IC_OK);
    assert_int_equal(be->open(packed, &o->plan, &exec, &err), IC_OK);
    struct ic_law_io io = {.h = in, .c = c};
    be->step(exec, &io, 1);
    be->net_out(exec, 0, out);
    be->close(&exec);
    be->unpack(&packed);
}

static void close_to(const float *got, const double *want, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!(fabs((double)got[i] - want[i]) <= 1e-6 * fmax(1, fabs(want[i]))))
            fail_msg("value %zu is %.9g, not %.9g", i, (double)got[i], want[i]);
}

static void conv3x3_is_a_cross_correlation(void **state)
{
    struct one o = {0};
    float in[9] = {1}, out[9]; /* a single 1 at (0,0) */
    const float w[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9}, bias = 0.5f;
    (void)state;
    o.w[0].data = w;
    o.w[1].data = &bias;
    run_one(&o, (struct ic_law_op){.kind = IC_LAW_OP_CONV3X3, .weight = 0, .bias = 1}, 1, 3, 3, in, 1, 3, 3,
            NULL, out);
    close_to(out, (const double[]){5.5, 4.5, 0.5, 2.5, 1.5, 0.5, 0.5, 0.5, 0.5}, 9);
}

static void conv3x3_pads_with_zeros_and_concatenates(void **state)
{
    struct one o = {0};
    float in[6] = {1, 1, 1, 1, 1, 1}, out[6]; /* [1,2,3] of ones, twice */
    float w[18];
    (void)state;
    for (int i = 0; i < 18; i++)
        w[i] = i < 9 ? 1 : 10;
    o.w[0].data = w;
    run_one(&o, (struct ic_law_op){.kind = IC_LAW_OP_CONV3X3, .weight = 0, .bias = -1, .cin = {0, 1}}, 1, 2,
            3, in, 1, 2, 3, NULL, out);
    close_to(out, (const double[]){44, 66, 44, 44, 66, 44}, 6);
    float single[1] = {2}; /* a single cell sees the centre tap only */
    for (int i = 0; i < 18; i++)
        w[i] = (float)i;
    run_one(&o, (struct ic_law_op){.kind = IC_LAW_OP_CONV3X3, .weight = 0, .bias = -1}, 1, 1, 1, single, 1,
            1, 1, NULL, out);
    close_to(out, (const double[]){8}, 1);
}

static void conv1x1_applies_elu_and_spike(void **state)
{
    struct one o = {0};
    float in[4] = {1, 2, 3, -5}, out[4]; /* channel 0: 1 2, channel 1: 3 -5 */
    const float w[4] = {1, 1, 2, 0}, bias[2] = {0, -3};
    (void)state;
    o.w[0].data = w;
    o.w[1].data = bias;
    struct ic_law_op op = {.kind = IC_LAW_OP_CONV1X1, .weight = 0, .bias = 1, .act = IC_LAW_ACT_ELU};
    run_one(&o, op, 2, 1, 2, in, 2, 1, 2, NULL, out); /* sums: 4 -3 | -1 1 */
    close_to(out, (const double[]){4, exp(-3) - 1, exp(-1) - 1, 1}, 4);
    op.act = IC_LAW_ACT_SPIKE;
    op.spike_at = 1;
    op.spike_to = 2;
    run_one(&o, op, 2, 1, 2, in, 2, 1, 2, NULL, out); /* strictly above 1 */
    close_to(out, (const double[]){2, 0, 0, 0}, 4);
}

static void norms_take_statistics_per_group(void **state)
{
    struct one o = {0};
    float in[8] = {1, 3, 1, 3, 10, 10, 30, 30}, out[8];
    const float scale[4] = {1, 2, 1, 1}, shift[4] = {0, 0, 0, 5};
    (void)state;
    o.w[0].data = scale;
    o.w[1].data = shift;
    struct ic_law_op op = {.kind = IC_LAW_OP_GROUPNORM, .weight = 0, .bias = 1, .groups = 2, .eps = 0};
    run_one(&o, op, 4, 1, 2, in, 4, 1, 2, NULL,
            out); /* groups: {1 3 1 3} mean 2 dev 1; {10 10 30 30} 20, 10 */
    close_to(out, (const double[]){-1, 1, -2, 2, -1, -1, 6, 6}, 8);
    float rms[4] = {3, 4, 0, 0};
    op = (struct ic_law_op){.kind = IC_LAW_OP_RMSNORM, .weight = 0, .bias = -1, .eps = 1e-6f};
    run_one(&o, op, 2, 1, 2, rms, 2, 1, 2, NULL, out);
    double r = sqrt(12.5 + 1e-6);
    close_to(out, (const double[]){3 / r, 4 / r, 0, 0}, 4);
}

static void pooling_transposing_and_resizing(void **state)
{
    struct one o = {0};
    float in[8] = {1, 2, 5, -1, 3, 4, -7, -2}, out[8];
    const float w[4] = {1, 2, 3, 4}, bias = 10;
    (void)state;
    run_one(&o, (struct ic_law_op){.kind = IC_LAW_OP_MAXPOOL2}, 1, 2, 4, in, 1, 1, 2, NULL, out);
    close_to(out, (const double[]){4, 5}, 2);
    o.w[0].data = w;
    o.w[1].data = &bias;
    float two[2] = {2, 1};
    run_one(&o, (struct ic_law_op){.kind = IC_LAW_OP_CONVT2X2, .weight = 0, .bias = 1}, 1, 1, 2, two, 1, 2,
            4, NULL, out);
    close_to(out, (const double[]){12, 14, 11, 12, 16, 18, 13, 14}, 8);
    float ramp[8] = {0, 0, 0, 7, 0, 0, 0, 7}; /* taps 3/8 3/8 1/8 over their sum at the borders */
    run_one(&o, (struct ic_law_op){.kind = IC_LAW_OP_RESIZE_HALF}, 1, 2, 4, ramp, 1, 1, 2, NULL, out);
    close_to(out, (const double[]){0, 3}, 2);
    float wide[16] = {0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0}; /* inside: 1/8 3/8 3/8 1/8 */
    run_one(&o, (struct ic_law_op){.kind = IC_LAW_OP_RESIZE_HALF}, 1, 2, 8, wide, 1, 1, 4, NULL, out);
    close_to(out, (const double[]){0, 3, 1, 0}, 4);
}

static void lstm_forgets_takes_and_gives(void **state)
{
    struct one o = {0};
    float gates[4] = {0, logf(3), 0, 0.5f}, c[1] = {2}, out[1]; /* forget 1/2, input 3/4, output 1/2 */
    (void)state;
    run_one(&o, (struct ic_law_op){.kind = IC_LAW_OP_LSTM}, 4, 1, 1, gates, 1, 1, 1, c, out);
    double now = 0.5 * 2 + 0.75 * tanh(0.5);
    close_to(c, &now, 1);
    close_to(out, (const double[]){0.5 * tanh(now)}, 1);
    close_to(gates, (const double[]){0.5 * tanh(now)}, 1); /* h was replaced */
}

/* ---- Whole networks, naively ----------------------------------------------------------------- */

struct map { /* [c,h,w], float64 */
    unsigned c, h, w;
    double *v;
};

static struct map map_new(unsigned c, unsigned h, unsigned w)
{
    return (struct map){c, h, w, calloc((size_t)c * h * w, sizeof(double))};
}

static double at(const struct map *m, unsigned c, long y, long x)
{
    return y < 0 || x < 0 || y >= (long)m->h || x >= (long)m->w
               ? 0
               : m->v[((size_t)c * m->h + (size_t)y) * m->w + (size_t)x];
}

static const struct ic_law_weight *weight(const struct ic_law *law, const char *format, const char *name)
{
    char full[128];
    snprintf(full, sizeof full, "%s%s", name, format);
    int i = ic_law_weight_find(law, full);
    return i < 0 ? NULL : &law->weights[i];
}

/* Frees its argument. */
static struct map conv(const struct ic_law *law, const char *name, struct map in)
{
    const struct ic_law_weight *w = weight(law, ".weight", name), *b = weight(law, ".bias", name);
    struct map out = map_new(w->dim[0], in.h, in.w);
    long k = w->dim[2], half = k / 2;
    assert_int_equal(w->dim[1], in.c);
    for (unsigned o = 0; o < out.c; o++)
        for (long y = 0; y < (long)in.h; y++)
            for (long x = 0; x < (long)in.w; x++) {
                double sum = b ? (double)b->data[o] : 0;
                for (unsigned i = 0; i < in.c; i++)
                    for (long ky = 0; ky < k; ky++)
                        for (long kx = 0; kx < k; kx++)
                            sum +=
                                (double)
                                    w->data[(((size_t)o * in.c + i) * (size_t)k + (size_t)ky) * (size_t)k +
                                            (size_t)kx] *
                                at(&in, i, y + ky - half, x + kx - half);
                out.v[((size_t)o * in.h + (size_t)y) * in.w + (size_t)x] = sum;
            }
    free(in.v);
    return out;
}

static struct map elu(struct map m)
{
    for (size_t i = 0; i < (size_t)m.c * m.h * m.w; i++)
        m.v[i] = m.v[i] > 0 ? m.v[i] : exp(m.v[i]) - 1;
    return m;
}

static struct map normalise(const struct ic_law *law, const char *name, struct map m)
{
    const struct ic_law_weight *w = weight(law, ".weight", name), *b = weight(law, ".bias", name);
    unsigned groups = b ? m.c > 8 ? m.c / 8 : 1 : m.c;
    if (m.c % groups)
        groups = 1;
    size_t n = (size_t)m.c / groups * m.h * m.w, plane = (size_t)m.h * m.w;
    for (size_t g = 0; g < groups; g++) {
        double mean = 0, var = 0, *v = m.v + g * n;
        for (size_t i = 0; b && i < n; i++)
            mean += v[i] / (double)n;
        for (size_t i = 0; i < n; i++)
            var += (v[i] - mean) * (v[i] - mean) / (double)n;
        for (size_t i = 0; i < n; i++) {
            size_t c = (g * n + i) / plane;
            v[i] = (v[i] - mean) / sqrt(var + (b ? 1e-5 : 1e-6)) * (double)w->data[c] +
                   (b ? (double)b->data[c] : 0);
        }
    }
    return m;
}

static struct map block(const struct ic_law *law, const char *name, struct map m)
{
    char part[64];
    for (int i = 0; i < 2; i++) {
        snprintf(part, sizeof part, "%s.conv_block.%d", name, 3 * i);
        m = conv(law, part, m);
        snprintf(part, sizeof part, "%s.conv_block.%d", name, 3 * i + 1);
        m = elu(normalise(law, part, m));
    }
    return m;
}

static struct map halved(const struct map *m)
{
    struct map out = map_new(m->c, m->h / 2, m->w / 2);
    for (unsigned c = 0; c < m->c; c++)
        for (long y = 0; y < (long)out.h; y++)
            for (long x = 0; x < (long)out.w; x++)
                out.v[((size_t)c * out.h + (size_t)y) * out.w + (size_t)x] =
                    fmax(fmax(at(m, c, 2 * y, 2 * x), at(m, c, 2 * y, 2 * x + 1)),
                         fmax(at(m, c, 2 * y + 1, 2 * x), at(m, c, 2 * y + 1, 2 * x + 1)));
    return out;
}

static struct map doubled(const struct ic_law *law, const char *name, struct map in)
{
    const struct ic_law_weight *w = weight(law, ".weight", name), *b = weight(law, ".bias", name);
    struct map out = map_new(w->dim[1], in.h * 2, in.w * 2);
    for (unsigned o = 0; o < out.c; o++)
        for (unsigned y = 0; y < out.h; y++)
            for (unsigned x = 0; x < out.w; x++) {
                double sum = (double)b->data[o];
                for (unsigned i = 0; i < in.c; i++)
                    sum += at(&in, i, y / 2, x / 2) *
                           (double)w->data[(((size_t)i * out.c + o) * 2 + y % 2) * 2 + x % 2];
                out.v[((size_t)o * out.h + y) * out.w + x] = sum;
            }
    free(in.v);
    return out;
}

/* Frees a only. */
static struct map joined(struct map a, const struct map *b)
{
    struct map out = map_new(a.c + b->c, a.h, a.w);
    memcpy(out.v, a.v, (size_t)a.c * a.h * a.w * sizeof(double));
    memcpy(out.v + (size_t)a.c * a.h * a.w, b->v, (size_t)b->c * b->h * b->w * sizeof(double));
    free(a.v);
    return out;
}

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

/* hc: h then c, float64, [4b,h,w] each; replaced. */
static struct map remember(const struct ic_law *law, struct map x3, double *hc)
{
    size_t n = (size_t)x3.c * x3.h * x3.w;
    struct map h = {x3.c, x3.h, x3.w, hc}, out = map_new(x3.c, x3.h, x3.w);
    struct map g = conv(law, "conv_gates", joined(x3, &h));
    for (size_t i = 0; i < n; i++) {
        hc[n + i] = sigmoid(g.v[i]) * hc[n + i] + sigmoid(g.v[n + i]) * tanh(g.v[3 * n + i]);
        hc[i] = out.v[i] = sigmoid(g.v[2 * n + i]) * tanh(hc[n + i]);
    }
    free(g.v);
    return out;
}

static struct map naive_unet(const struct ic_law *law, struct map x, double *hc)
{
    struct map x1 = block(law, "inc", x);
    struct map x2 = block(law, "down1.1", halved(&x1));
    struct map x3 = block(law, "down2.1", halved(&x2));
    if (hc)
        x3 = remember(law, x3, hc);
    struct map u1 = doubled(law, "up1", block(law, "bot", x3));
    struct map u2 = doubled(law, "up2", block(law, "conv_up1", joined(u1, &x2)));
    struct map y = conv(law, "outc", block(law, "conv_up2", joined(u2, &x1)));
    free(x1.v);
    free(x2.v);
    return y;
}

static struct map naive_qca(const struct ic_law *law, struct map x)
{
    const struct ic_law_weight *k = weight(law, ".weight", "conv_neighbors");
    struct map sums = map_new(8 * x.c, x.h, x.w);
    for (unsigned c = 0; c < sums.c; c++)
        for (long y = 0; y < (long)x.h; y++)
            for (long i = 0; i < (long)x.w; i++)
                for (long t = 0; t < 9; t++)
                    sums.v[((size_t)c * x.h + (size_t)y) * x.w + (size_t)i] +=
                        (double)k->data[(size_t)c * 9 + (size_t)t] *
                        at(&x, c / 8, y + t / 3 - 1, i + t % 3 - 1);
    free(x.v);
    return conv(law, "processing_net.4",
                elu(conv(law, "processing_net.2", elu(conv(law, "processing_net.0", sums)))));
}

/* Bilinear, antialiased: a triangle of support 2 input samples either side of (y + 0.5) * 2. */
static struct map shrunk(struct map in)
{
    struct map out = map_new(in.c, in.h / 2, in.w / 2);
    for (unsigned c = 0; c < out.c; c++)
        for (unsigned y = 0; y < out.h; y++)
            for (unsigned x = 0; x < out.w; x++) {
                double sum = 0, all = 0;
                for (unsigned v = 0; v < in.h; v++)
                    for (unsigned u = 0; u < in.w; u++) {
                        double wy = 1 - fabs(v + 0.5 - 2 * (y + 0.5)) / 2,
                               wx = 1 - fabs(u + 0.5 - 2 * (x + 0.5)) / 2;
                        double w = fmax(0, wy) * fmax(0, wx);
                        sum += w * at(&in, c, v, u);
                        all += w;
                    }
                out.v[((size_t)c * out.h + y) * out.w + x] = sum / all;
            }
    free(in.v);
    return out;
}

/* Cells so near the threshold that float32 may fall on the other side are counted. */
static struct map fire(struct map m, unsigned *close)
{
    for (size_t i = 0; i < (size_t)m.c * m.h * m.w; i++) {
        *close += fabs(m.v[i] - 1) < 1e-5;
        m.v[i] = m.v[i] > 1;
    }
    return m;
}

static struct map naive_snn(const struct ic_law *law, struct map x, unsigned *close)
{
    struct map s1 = fire(conv(law, "conv1", x), close);
    struct map copy = map_new(s1.c, s1.h, s1.w);
    memcpy(copy.v, s1.v, (size_t)s1.c * s1.h * s1.w * sizeof(double));
    struct map s2 = fire(conv(law, "conv_bottom", copy), close);
    struct map y = fire(conv(law, "conv2", joined(shrunk(doubled(law, "upconv", s2)), &s1)), close);
    free(s1.v);
    return fire(conv(law, "conv_out", y), close);
}

static struct map naive_net(const struct ic_law *law, struct map x, double *hc, unsigned *close)
{
    switch (law->arch) {
    case IC_LAW_MLP: return conv(law, "net.4", elu(conv(law, "net.2", elu(conv(law, "net.0", x)))));
    case IC_LAW_DEEP_QCA: return naive_qca(law, x);
    case IC_LAW_SNN_UNET: return naive_snn(law, x, close);
    default: return naive_unet(law, x, hc);
    }
}

static void naive_step(const struct ic_law *law, double *psi, unsigned h, unsigned w, double gamma,
                       double *hc, unsigned *close)
{
    unsigned d = law->d;
    size_t cells = (size_t)h * w;
    struct map x = map_new(2 * d, h, w);
    for (size_t i = 0; i < cells; i++)
        for (size_t k = 0; k < 2 * d; k++)
            x.v[(k % 2 * d + k / 2) * cells + i] = psi[i * 2 * d + k];
    struct map y = naive_net(law, x, hc, close);
    for (size_t i = 0; i < cells; i++) {
        double *p = psi + i * 2 * d, norm = 0;
        for (size_t k = 0; k < d; k++) {
            double re = y.v[k * cells + i], im = y.v[(d + k) * cells + i], a = p[2 * k], b = p[2 * k + 1];
            if (law->arch == IC_LAW_UNET_UNITARY) {
                double t = re * a - im * b;
                im = re * b + im * a;
                re = t;
            }
            p[2 * k] = a + re - gamma * a;
            p[2 * k + 1] = b + im - gamma * b;
            norm += p[2 * k] * p[2 * k] + p[2 * k + 1] * p[2 * k + 1];
        }
        for (size_t k = 0; k < 2 * d; k++)
            p[k] /= sqrt(norm) + 1e-9;
    }
    free(y.v);
}

/* ---- A stepper over a back end --------------------------------------------------------------- */

struct stepper {
    const struct ic_law_backend *be;
    struct ic_law_plan *plan;
    struct ic_law_packed *packed;
    struct ic_law_exec *exec;
};

static void stepper_open(struct stepper *s, const struct ic_law_backend *be, const struct ic_law *law,
                         unsigned h, unsigned w, unsigned batch)
{
    struct ic_err err = {0};
    s->be = be;
    assert_int_equal(ic_law_plan_open(law, h, w, batch, be->tensor_bytes, &s->plan, &err), IC_OK);
    assert_int_equal(be->pack(law, 1, &s->packed, &err), IC_OK);
    assert_int_equal(be->open(s->packed, s->plan, &s->exec, &err), IC_OK);
}

static void stepper_close(struct stepper *s)
{
    s->be->close(&s->exec);
    s->be->unpack(&s->packed);
    ic_law_plan_close(&s->plan);
}

static double check_odd(const struct ic_law_backend *be, enum ic_law_arch arch, unsigned d, unsigned b,
                        unsigned h, unsigned w, double gamma)
{
    struct ic_law *law = fixture_law(arch, d, b, 1000 * b + d);
    assert_non_null(law);
    struct stepper s;
    stepper_open(&s, be, law, h, w, 1);
    size_t n = (size_t)h * w * d * 2, m = s.plan->memory_bytes / sizeof(float);
    unsigned fired = 0;
    float *psi = fixture_psi(h, w, d, 7), *mem = calloc(m + 2, sizeof *mem),
          *delta = malloc(n * sizeof *delta);
    double *want = malloc(n * sizeof *want), *hc = calloc(m + 2, sizeof *hc), worst = 0;
    unsigned close = 0;
    for (size_t i = 0; i < n; i++)
        want[i] = (double)psi[i];
    for (int step = 0; step < 2; step++) {
        struct ic_law_io io = {
            .psi = psi, .h = mem, .c = mem + m / 2, .delta = delta, .gamma = (float)gamma};
        be->step(s.exec, &io, 1);
        for (size_t i = 0; i < n; i++)
            fired += delta[i] != 0;
        naive_step(law, want, h, w, gamma > 0 ? (double)io.gamma : 0, m ? hc : NULL, &close);
    }
    for (size_t i = 0; i < n; i++)
        worst = fmax(worst, fabs((double)psi[i] - want[i]));
    for (size_t i = 0; i < m; i++)
        worst = fmax(worst, fabs((double)mem[i] - hc[i]));
    if (!(worst <= 1e-5) && !(close && arch == IC_LAW_SNN_UNET))
        fail_msg("%s d %u b %u %ux%u: %.2e", ic_law_arch_info(arch)->name, d, b, h, w, worst);
    if (n > 100 && b > 1) /* a net of which all outputs are silent, or all spike, tests nothing */
        assert_true(fired > 0 && (arch != IC_LAW_SNN_UNET || fired < 2 * n));
    free(psi);
    free(mem);
    free(delta);
    free(want);
    free(hc);
    stepper_close(&s);
    ic_law_close(&law);
    return worst;
}

static void odd_sizes_agree_with_a_naive_implementation(void **state)
{
    static const struct {
        unsigned d, b, h, w;
    } sizes[] = {{1, 11, 20, 20}, {3, 13, 4, 4},   {5, 18, 36, 20},
                 {1, 20, 4, 36},  {3, 11, 36, 36}, {5, 1, 20, 4}};
    static const struct {
        unsigned d, b, h, w;
    } free_sizes[] = {{1, 11, 1, 1}, {3, 13, 5, 3}, {5, 18, 7, 9}, {1, 20, 1, 6}, {3, 1, 2, 2}};
    (void)state;
    for (unsigned arch = 0; arch < IC_LAW_ARCH_COUNT; arch++) {
        double worst = 0;
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
            worst = fmax(worst, check_odd(&ic_law_backend_ref, (enum ic_law_arch)arch, sizes[i].d,
                                          sizes[i].b, sizes[i].h, sizes[i].w, i % 2 ? 0.05 : -1));
        if (ic_law_arch_info((enum ic_law_arch)arch)->grid_multiple == 1)
            for (size_t i = 0; i < sizeof free_sizes / sizeof free_sizes[0]; i++)
                worst = fmax(worst, check_odd(&ic_law_backend_ref, (enum ic_law_arch)arch, free_sizes[i].d,
                                              free_sizes[i].b, free_sizes[i].h, free_sizes[i].w, 0.01));
        print_message("%-22s odd sizes, 2 steps: %.1e from naive float64\n",
                      ic_law_arch_info((enum ic_law_arch)arch)->name, worst);
    }
}

/* ---- Batches, layout, bounds ----------------------------------------------------------------- */

static void a_batch_changes_nothing_to_the_last_bit(void **state)
{
    enum { BATCH = 5, SIDE = 12 };
    (void)state;
    for (unsigned arch = 0; arch < IC_LAW_ARCH_COUNT; arch++) {
        struct ic_law *law = fixture_law((enum ic_law_arch)arch, 3, 12, 5);
        struct stepper alone, together;
        stepper_open(&alone, &ic_law_backend_ref, law, SIDE, SIDE, 1);
        stepper_open(&together, &ic_law_backend_ref, law, SIDE, SIDE, BATCH);
        size_t psi_n = alone.plan->psi_bytes / 4, mem_n = alone.plan->memory_bytes / 8;
        float *a[BATCH], *b[BATCH], *ma[BATCH], *mb[BATCH];
        for (unsigned i = 0; i < BATCH; i++) {
            a[i] = fixture_psi(SIDE, SIDE, 3, i);
            b[i] = fixture_psi(SIDE, SIDE, 3, i);
            ma[i] = calloc(2 * mem_n + 1, 4);
            mb[i] = calloc(2 * mem_n + 1, 4);
        }
        for (unsigned step = 0; step < 3; step++) {
            struct ic_law_io io[BATCH];
            unsigned n = BATCH - step; /* the batch is re-formed: 5, 4, 3 of them, in another order */
            for (unsigned k = 0; k < n; k++) {
                unsigned i = (k + step) % n;
                io[k] = (struct ic_law_io){
                    .psi = b[i], .h = mb[i], .c = mb[i] + mem_n, .gamma = 0.01f * (float)i};
            }
            together.be->step(together.exec, io, n);
            for (unsigned i = 0; i < n; i++) {
                io[0] = (struct ic_law_io){
                    .psi = a[i], .h = ma[i], .c = ma[i] + mem_n, .gamma = 0.01f * (float)i};
                alone.be->step(alone.exec, io, 1);
            }
        }
        for (unsigned i = 0; i < BATCH; i++) {
            assert_memory_equal(a[i], b[i], psi_n * 4);
            assert_memory_equal(ma[i], mb[i], 2 * mem_n * 4);
            free(a[i]);
            free(b[i]);
            free(ma[i]);
            free(mb[i]);
        }
        stepper_close(&alone);
        stepper_close(&together);
        ic_law_close(&law);
    }
}

static void check_layout(const struct ic_law_plan *p)
{
    for (size_t i = 0; i < p->tensor_count; i++) {
        const struct ic_law_tensor *a = &p->tensors[i];
        assert_true(a->first <= a->last && a->last < p->op_count);
        assert_true(a->offset % IC_LAW_ALIGN == 0 && a->stride % IC_LAW_ALIGN == 0);
        assert_true(a->offset + a->stride * p->batch <= p->arena_bytes);
        for (size_t j = 0; j < i; j++) {
            const struct ic_law_tensor *b = &p->tensors[j];
            bool meet = a->first <= b->last && b->first <= a->last;
            bool overlap = a->offset < b->offset + b->stride * p->batch &&
                           b->offset < a->offset + a->stride * p->batch;
            assert_false(meet && overlap);
        }
    }
    for (size_t k = 0; k < p->op_count; k++) /* a norm follows the conv that wrote its tensor */
        if (p->ops[k].kind == IC_LAW_OP_GROUPNORM || p->ops[k].kind == IC_LAW_OP_RMSNORM) {
            assert_int_equal(p->ops[k].in[0], p->ops[k].out);
            assert_int_equal(p->ops[k - 1].kind, IC_LAW_OP_CONV3X3);
            assert_int_equal(p->ops[k - 1].out, p->ops[k].out);
        }
}

static size_t clumsy_bytes(const struct ic_law *law, unsigned c, unsigned h, unsigned w)
{
    (void)law;
    return ((size_t)c + 15) / 16 * 16 * (h + 2) * (w + 2) * 4 + 3;
}

static void living_tensors_never_overlap(void **state)
{
    struct ic_err err = {0};
    (void)state;
    for (unsigned arch = 0; arch < IC_LAW_ARCH_COUNT; arch++) {
        struct ic_law *law = fixture_law((enum ic_law_arch)arch, 2, 9, 3);
        for (unsigned batch = 1; batch <= 16; batch += 5) {
            struct ic_law_plan *p;
            assert_int_equal(ic_law_plan_open(law, 8, 12, batch,
                                              batch == 6 ? clumsy_bytes : ic_law_tensor_bytes_nchw, &p,
                                              &err),
                             IC_OK);
            check_layout(p);
            assert_int_equal(p->macs, 96 * ic_law_macs_per_cell(law->arch, 2, 9));
            ic_law_plan_close(&p);
        }
        ic_law_close(&law);
    }
}

static struct ic_law_fit expect_fit(const struct ic_law_backend *be, const struct ic_law_packed *packed,
                                    const struct ic_law *law, struct ic_law_room room, unsigned most,
                                    unsigned n, enum ic_law_fit_limit limit)
{
    const struct ic_law_fit fit = ic_law_batch_fit(be, packed, law, 8, 12, &room, most);
    if (fit.n != n || fit.limit != limit)
        fail_msg("a batch of %u, bound by %d; not %u by %d", fit.n, fit.limit, n, limit);
    assert_true(fit.host <= room.host && fit.device <= room.device);
    return fit;
}

#define FAKE_PLAN 5000 /* bytes on the fake device: of a plan, and of each of its batch */
#define FAKE_EACH 1000

static size_t fake_exec_size(const struct ic_law_packed *packed, const struct ic_law_plan *plan)
{
    (void)packed;
    return FAKE_PLAN + FAKE_EACH * (size_t)plan->batch;
}

/* On a device the plan counts there, the states and what is copied to and fro in the host's memory; the
 * smaller of the two decides. */
static void a_device_and_its_host_both_bound_a_batch(void **state)
{
    struct ic_law_backend be = ic_law_backend_ref;
    struct ic_law *law = fixture_law(IC_LAW_UNET_CONVLSTM, 2, 4, 3);
    const size_t psi = 8 * 12 * 2 * 2 * sizeof(float),
                 memory = 2 * (4 * 4) * (8 / 4) * (12 / 4) * sizeof(float);
    const size_t each = 2 * psi + memory + (2 * psi + memory), much = (size_t)1 << 40;
    struct ic_law_fit fit;
    (void)state;
    be.exec_size = fake_exec_size;
    assert_int_equal(ic_law_staging_bytes(&be, law, 8, 12, 3), 3 * (2 * psi + memory));
    const size_t seven = FAKE_PLAN + 7 * FAKE_EACH;
    fit = expect_fit(&be, NULL, law, (struct ic_law_room){much, seven, true}, 1024, 7, IC_LAW_FIT_DEVICE);
    assert_int_equal(fit.device, seven);
    assert_int_equal(fit.host, 7 * each);
    expect_fit(&be, NULL, law, (struct ic_law_room){much, seven - 1, true}, 1024, 6, IC_LAW_FIT_DEVICE);
    expect_fit(&be, NULL, law, (struct ic_law_room){7 * each, much, true}, 1024, 7, IC_LAW_FIT_HOST);
    expect_fit(&be, NULL, law, (struct ic_law_room){7 * each - 1, much, true}, 1024, 6, IC_LAW_FIT_HOST);
    expect_fit(&be, NULL, law, (struct ic_law_room){5 * each, seven, true}, 1024, 5, IC_LAW_FIT_HOST);
    expect_fit(&be, NULL, law, (struct ic_law_room){9 * each, seven, true}, 1024, 7, IC_LAW_FIT_DEVICE);
    expect_fit(&be, NULL, law, (struct ic_law_room){much, much, true}, 1024, 1024, IC_LAW_FIT_MOST);
    expect_fit(&be, NULL, law, (struct ic_law_room){much, FAKE_PLAN, true}, 1024, 0, IC_LAW_FIT_DEVICE);
    expect_fit(&be, NULL, law, (struct ic_law_room){0, much, true}, 1024, 0, IC_LAW_FIT_HOST);
    /* without a device the same plan counts beside the states, and what a device has does not matter */
    expect_fit(&be, NULL, law, (struct ic_law_room){seven + 7 * (2 * psi + memory), 0, false}, 1024, 7,
               IC_LAW_FIT_HOST);
    ic_law_close(&law);
}

static enum ic_status fake_state_open(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                                      const struct ic_law_io *host, struct ic_law_state **out,
                                      struct ic_err *err)
{
    (void)packed, (void)plan, (void)host, (void)out;
    return ic_fail(err, IC_INTERNAL, "only its presence counts");
}

/* Where states stay on the device they count there, and frames are what takes host memory besides. */
static void states_on_a_device_bound_a_batch(void **state)
{
    struct ic_law_backend be = ic_law_backend_ref;
    struct ic_law *law = fixture_law(IC_LAW_UNET_CONVLSTM, 2, 4, 3);
    const size_t psi = 8 * 12 * 2 * 2 * sizeof(float),
                 memory = 2 * (4 * 4) * (8 / 4) * (12 / 4) * sizeof(float), much = (size_t)1 << 40;
    const size_t own = (psi + memory + 255) / 256 * 256, frames = 8 * 12 * 4;
    (void)state;
    be.exec_size = fake_exec_size;
    be.state_open = fake_state_open;
    assert_int_equal(ic_law_state_bytes(law, 8, 12), own);
    assert_int_equal(ic_law_staging_bytes(&be, law, 8, 12, 7), 7 * frames);
    assert_int_equal(ic_law_staging_bytes(&be, law, 8, 12, 1), 3 * frames); /* three float32 a cell */
    const size_t seven = FAKE_PLAN + 7 * (FAKE_EACH + own), host = 7 * (2 * psi + memory + frames);
    const struct ic_law_fit fit =
        expect_fit(&be, NULL, law, (struct ic_law_room){much, seven, true}, 1024, 7, IC_LAW_FIT_DEVICE);
    assert_int_equal(fit.device, seven);
    assert_int_equal(fit.host, host);
    expect_fit(&be, NULL, law, (struct ic_law_room){much, seven - 1, true}, 1024, 6, IC_LAW_FIT_DEVICE);
    expect_fit(&be, NULL, law, (struct ic_law_room){host, much, true}, 1024, 7, IC_LAW_FIT_HOST);
    expect_fit(&be, NULL, law, (struct ic_law_room){host - 1, much, true}, 1024, 6, IC_LAW_FIT_HOST);
    ic_law_close(&law);
}

/* The report says what opening the plan then takes; the largest batch fits, and one more does not. */
static void sizes_are_told_beforehand(void **state)
{
    static const char *const backends[] = {"ref", "cpu"};
    struct ic_err err = {0};
    (void)state;
    for (unsigned arch = 0; arch < IC_LAW_ARCH_COUNT; arch++)
        for (unsigned i = 0; i < 2; i++) {
            const struct ic_law_backend *be = ic_law_backend_find(backends[i]);
            struct ic_law *law = fixture_law((enum ic_law_arch)arch, 2, 9, 3);
            struct ic_law_plan *p;
            struct ic_law_packed *packed;
            struct ic_law_exec *exec;
            if (!be) {
                ic_law_close(&law);
                continue;
            }
            assert_int_equal(ic_law_plan_open(law, 8, 12, 5, be->tensor_bytes, &p, &err), IC_OK);
            assert_int_equal(be->pack(law, 1, &packed, &err), IC_OK);
            assert_int_equal(be->open(packed, p, &exec, &err), IC_OK);
            const size_t size = be->exec_bytes(exec);
            assert_int_equal(be->exec_size(packed, p), size);
            assert_int_equal(ic_law_exec_size(be, packed, law, 8, 12, 5), size);
            const size_t each = 2 * ((p->psi_bytes + 63) / 64 * 64) + p->memory_bytes;
            expect_fit(be, packed, law, (struct ic_law_room){.host = size + 5 * each}, 1024, 5,
                       IC_LAW_FIT_HOST);
            expect_fit(be, packed, law, (struct ic_law_room){.host = size + 5 * each - 1}, 1024, 4,
                       IC_LAW_FIT_HOST);
            expect_fit(be, packed, law, (struct ic_law_room){.host = size + 5 * each}, 3, 3,
                       IC_LAW_FIT_MOST);
            expect_fit(be, packed, law, (struct ic_law_room){.host = 100}, 1024, 0, IC_LAW_FIT_HOST);
            struct ic_buf text = {0};
            char want[64];
            ic_law_plan_report(p, be, packed, &text);
            ic_buf_put(&text, "", 1);
            assert_false(text.failed);
            assert_non_null(strstr(text.data, "arena and scratch"));
            snprintf(want, sizeof want, " %zu B", size);
            assert_non_null(strstr(text.data, want));
            ic_buf_deinit(&text);
            be->close(&exec);
            be->unpack(&packed);
            ic_law_plan_close(&p);
            ic_law_close(&law);
        }
}

static void the_arena_reuses_bytes(void **state)
{
    struct ic_err err = {0};
    struct ic_law_plan *p;
    (void)state;
    struct ic_law *law = fixture_law(IC_LAW_UNET, 8, 32, 3);
    assert_int_equal(ic_law_plan_open(law, 64, 64, 1, ic_law_tensor_bytes_nchw, &p, &err), IC_OK);
    /* x1, u2 (2b) and c2 (b) live together: 4b * cells * 4 bytes is the least any order can do */
    assert_int_equal(p->arena_bytes, 4 * 32 * 64 * 64 * 4);
    ic_law_plan_close(&p);
    ic_law_close(&law);
}

static void a_bypassed_tensor_has_no_bytes(void **state)
{
    struct ic_err err = {0};
    struct ic_law_plan *p;
    unsigned bypassed = 0;
    (void)state;
    struct ic_law *law = fixture_law(IC_LAW_UNET, 8, 32, 3);
    assert_int_equal(ic_law_plan_open(law, 64, 64, 3, ic_law_tensor_bytes_nchw, &p, &err), IC_OK);
    for (size_t i = 0; i < p->op_count; i++) {
        const struct ic_law_op before = p->ops[i];
        if (before.kind != IC_LAW_OP_CONVT2X2)
            continue;
        ic_law_plan_bypass(p, i);
        assert_int_equal(p->ops[i].out, -1);
        assert_int_equal(p->ops[i + 1].in[0], before.in[0]);
        assert_int_equal(p->ops[i + 1].cin[0], before.cout);
        assert_int_equal(p->tensors[before.out].stride, 0);
        assert_int_equal(p->tensors[before.in[0]].last, i + 1);
        check_layout(p);
        bypassed++;
    }
    assert_int_equal(bypassed, 2);
    /* x1 (b), c1 (4b of half the side) and c2 (b) live together */
    assert_int_equal(p->arena_bytes, 3 * 3 * 32 * 64 * 64 * 4);
    ic_law_plan_close(&p);
    ic_law_close(&law);
}

static void a_hastened_tensor_lives_earlier(void **state)
{
    struct ic_err err = {0};
    struct ic_law_plan *p;
    unsigned hastened = 0;
    (void)state;
    struct ic_law *law = fixture_law(IC_LAW_UNET, 8, 32, 3);
    assert_int_equal(ic_law_plan_open(law, 64, 64, 3, ic_law_tensor_bytes_nchw, &p, &err), IC_OK);
    for (size_t i = 0; i < p->op_count; i++) {
        if (p->ops[i].kind != IC_LAW_OP_MAXPOOL2)
            continue;
        ic_law_plan_hasten(p, i, i - 2); /* the convolution; its input lives now too */
        assert_int_equal(p->tensors[p->ops[i].out].first, i - 2);
        check_layout(p);
        hastened++;
    }
    assert_int_equal(hastened, 2);
    ic_law_plan_close(&p);
    ic_law_close(&law);
}

static void impossible_plans_are_refused(void **state)
{
    struct ic_err err = {0};
    struct ic_law_plan *p;
    (void)state;
    struct ic_law *law = fixture_law(IC_LAW_UNET, 1, 8, 3);
    ic_law_tensor_bytes_fn f = ic_law_tensor_bytes_nchw;
    assert_int_equal(ic_law_plan_open(law, 30, 32, 1, f, &p, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "multiples of 4"));
    assert_int_equal(ic_law_plan_open(law, 0, 32, 1, f, &p, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_law_plan_open(law, 32, 32, 0, f, &p, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_law_plan_open(law, 8192, 32, 1, f, &p, &err), IC_TOO_LARGE);
    assert_int_equal(ic_law_plan_open(law, 32, 32, 5000, f, &p, &err), IC_TOO_LARGE);
    assert_int_equal(ic_law_plan_open(law, 4096, 4096, 1024, f, &p, &err), IC_TOO_LARGE);
    assert_null(p);
    ic_law_close(&law);
}

static void a_dead_cell_stays_dead_under_the_product(void **state)
{
    (void)state;
    struct ic_law *law = fixture_law(IC_LAW_UNET_UNITARY, 2, 8, 3);
    struct stepper s;
    stepper_open(&s, &ic_law_backend_ref, law, 4, 4, 1);
    float *psi = fixture_psi(4, 4, 2, 1);
    memset(psi + 5 * 4, 0, 4 * sizeof(float));
    struct ic_law_io io = {.psi = psi, .gamma = 1};
    s.be->step(s.exec, &io, 1);
    for (unsigned i = 0; i < 16; i++) {
        const float *p = psi + i * 4;
        double n =
            sqrt((double)p[0] * p[0] + (double)p[1] * p[1] + (double)p[2] * p[2] + (double)p[3] * p[3]);
        assert_true(i == 5 ? n == 0 : fabs(n - 1) < 1e-5);
    }
    free(psi);
    stepper_close(&s);
    ic_law_close(&law);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(conv3x3_is_a_cross_correlation),
        cmocka_unit_test(conv3x3_pads_with_zeros_and_concatenates),
        cmocka_unit_test(conv1x1_applies_elu_and_spike),
        cmocka_unit_test(norms_take_statistics_per_group),
        cmocka_unit_test(pooling_transposing_and_resizing),
        cmocka_unit_test(lstm_forgets_takes_and_gives),
        cmocka_unit_test(odd_sizes_agree_with_a_naive_implementation),
        cmocka_unit_test(a_batch_changes_nothing_to_the_last_bit),
        cmocka_unit_test(living_tensors_never_overlap),
        cmocka_unit_test(sizes_are_told_beforehand),
        cmocka_unit_test(a_device_and_its_host_both_bound_a_batch),
        cmocka_unit_test(states_on_a_device_bound_a_batch),
        cmocka_unit_test(the_arena_reuses_bytes),
        cmocka_unit_test(a_bypassed_tensor_has_no_bytes),
        cmocka_unit_test(a_hastened_tensor_lives_earlier),
        cmocka_unit_test(impossible_plans_are_refused),
        cmocka_unit_test(a_dead_cell_stays_dead_under_the_product),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
