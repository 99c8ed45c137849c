/* Everything that is not Winograd: direct 3x3 (for networks with a hard threshold, where a rounding
 * difference would flip a spike), transposed 2x2, pointwise chains with the field's update, norms,
 * pooling, ConvLSTM. */

/* Bias is in already; activation over cells of `blocks` blocks, then the statistics of the run. */
static void finish_run(const struct ic_cpu_conv *c, float *out, size_t c_block, unsigned blocks, unsigned n,
                       float *stats, unsigned channel)
{
    const unsigned channels = c->out_blocks * 16;
    for (unsigned b = 0; b < blocks; b++)
        for (unsigned s = 0; s < 16; s += IC_VW) {
            float *p = out + b * c_block + s;
            vf sum = v_zero(), square = v_zero();
            for (unsigned i = 0; i < n; i++) {
                vf x = v_act(v_load(p + i * 16), &c->act);
                v_store(p + i * 16, x);
                sum += x;
            }
            if (!stats)
                continue;
            const vf mean = sum * v_set1(1.0f / (float)n);
            for (unsigned i = 0; i < n; i++) {
                vf d = v_load(p + i * 16) - mean;
                square = v_fma(d, d, square);
            }
            v_store(stats + channel + b * 16 + s, mean);
            v_store(stats + channels + channel + b * 16 + s, square);
        }
}

static void direct(const struct ic_cpu_conv *c, unsigned unit, float *scratch)
{
    const struct ic_cpu_segments seg = ic_cpu_segments_direct(c->height, c->width);
    const unsigned per = seg.rows * seg.per_row;
    const unsigned index = unit / c->splits, split = unit % c->splits;
    const unsigned sample = index / per, y = index % per / seg.per_row, x0 = index % seg.per_row * seg.run;
    const unsigned n = c->width - x0 < seg.run ? c->width - x0 : seg.run;
    const unsigned k_blocks = c->in[0].blocks + c->in[1].blocks;
    const size_t plane = (size_t)c->height * c->width * 16, k = (size_t)k_blocks * 16;
    const size_t row = (size_t)(n + 2) * 16;
    float *patch = scratch;
    size_t *off = (size_t *)(patch + (size_t)k_blocks * 3 * (IC_CPU_CHUNK + 2) * 16);
    unsigned kb = 0;
    for (int src = 0; src < 2; src++)
        for (unsigned blk = 0; blk < c->in[src].blocks; blk++, kb++)
            for (unsigned ky = 0; ky < 3; ky++) {
                float *q = patch + (kb * 3 + ky) * row;
                const float *p = c->in[src].p + sample * c->in[src].stride + blk * plane;
                if (y + ky < 1 || y + ky > c->height) {
                    memset(q, 0, row * sizeof(float));
                    continue;
                }
                p += (size_t)(y + ky - 1) * c->width * 16;
                for (unsigned i = 0; i < n + 2; i++)
                    for (unsigned s = 0; s < 16; s += IC_VW)
                        v_store(q + i * 16 + s, x0 + i < 1 || x0 + i > c->width
                                                    ? v_zero()
                                                    : v_load(p + (size_t)(x0 + i - 1) * 16 + s));
            }
    unsigned at = 0;
    for (unsigned ky = 0; ky < 3; ky++)
        for (unsigned kx = 0; kx < 3; kx++)
            for (kb = 0; kb < k_blocks; kb++)
                off[at++] = (kb * 3 + ky) * row + kx * 16;
    const unsigned panels = c->panel_to - c->panel_from;
    for (unsigned i = panels * split / c->splits; i < panels * (split + 1) / c->splits; i++) {
        const unsigned panel = c->panel_from + i, width = c->out_blocks - panel * 2 >= 2 ? 32 : 16;
        float *out = c->out + sample * c->out_stride + panel * 2 * plane + ((size_t)y * c->width + x0) * 16;
        struct gemm g = {.a = patch,
                         .off = off,
                         .steps = at,
                         .u = c->u + (size_t)i * 9 * k * 32,
                         .width = width,
                         .init = c->bias ? c->bias + panel * 32 : NULL,
                         .c = out,
                         .c_cell = 16,
                         .c_block = plane};
        gemm_run(&g, n);
        finish_run(c, out, plane, width / 16, n,
                   c->stats ? c->stats + (size_t)index * 2 * c->out_blocks * 16 : NULL, panel * 32);
    }
}

/* One input row becomes two output rows; each of the four taps is a pointwise product whose cells lie
 * two apart. */
static void convt(const struct ic_cpu_conv *c, unsigned unit, float *scratch)
{
    const unsigned sample = unit / c->height, y = unit % c->height, k_blocks = c->in[0].blocks;
    const size_t plane = (size_t)c->height * c->width * 16, k = (size_t)k_blocks * 16;
    size_t *off = (size_t *)scratch;
    for (unsigned i = 0; i < k_blocks; i++)
        off[i] = i * plane;
    const float *in = c->in[0].p + sample * c->in[0].stride + (size_t)y * c->width * 16;
    for (unsigned tap = 0; tap < 4; tap++)
        for (unsigned panel = c->panel_from; panel < c->panel_to; panel++) {
            const unsigned width = c->out_blocks - panel * 2 >= 2 ? 32 : 16;
            const float *u = c->u + tap * c->tap_stride + (panel - c->panel_from) * k * 32;
            struct gemm g = {.a = in,
                             .off = off,
                             .steps = k_blocks,
                             .u = u,
                             .width = width,
                             .init = c->bias ? c->bias + panel * 32 : NULL,
                             .c = c->out + sample * c->out_stride + panel * 2 * plane * 4 +
                                  ((size_t)(2 * y + tap / 2) * c->width * 2 + tap % 2) * 16,
                             .c_cell = 32,
                             .c_block = plane * 4,
                             .ahead = u + k * width};
            gemm_run(&g, c->width);
        }
}

#define PHI_FLOATS 1024 /* 4 KB: stays in L1; at least two cells at d = IC_LAW_D_MAX */

/* psi' of n <= PHI_FLOATS / wide cells, wide = 2d rounded up to whole vectors. Three passes: phi and its
 * squared norm; the roots, as vectors; the scaling. One pass with a scalar root per cell took 250 cycles
 * a cell, mostly waiting; keeping phi in psi itself costs masked stores that cannot be forwarded to the
 * masked loads behind them. */
static void update_few(const float *y, size_t y_block, float *psi, float *delta, unsigned n, unsigned d,
                       bool product, vf g)
{
    const unsigned len = 2 * d, wide = (len + IC_VW - 1) / IC_VW * IC_VW;
    float phi[PHI_FLOATS] __attribute__((aligned(64)));
    float norm[IC_CPU_CHUNK] __attribute__((aligned(64))) = {0};
    for (unsigned i = 0; i < n; i++) {
        vf sum = v_zero();
        for (unsigned j = 0; j < len; j += IC_VW) {
            const unsigned m = len - j < IC_VW ? len - j : IC_VW;
            const vf p = v_load_n(psi + (size_t)i * len + j, m);
            vf dl = v_load(y + (j / 16) * y_block + (size_t)i * 16 + j % 16);
            if (product)
                dl = v_cmul(dl, p);
            if (delta)
                v_store_n(delta + (size_t)i * len + j, dl, m);
            const vf f = p + (dl - g * p);
            sum = v_fma(f, f, sum);
            v_store(phi + i * wide + j, f);
        }
        norm[i] = v_sum(sum);
    }
    for (unsigned i = 0; i < n; i += IC_VW)
        v_store(norm + i, v_set1(1.0f) / (v_sqrt(v_load(norm + i)) + v_set1(1e-9f)));
    for (unsigned i = 0; i < n; i++) {
        const vf r = v_set1(norm[i]);
        for (unsigned j = 0; j < len; j += IC_VW)
            v_store_n(psi + (size_t)i * len + j, v_load(phi + i * wide + j) * r,
                      len - j < IC_VW ? len - j : IC_VW);
    }
}

/* psi' of n cells. y: network output in pair order (Re, Im interleaved), blocks y_block floats apart. */
static void update_cells(const float *y, size_t y_block, float *psi, float *delta, unsigned n, unsigned d,
                         bool product, float gamma)
{
    const vf g = v_set1(gamma > 0 ? gamma : 0.0f);
    const unsigned wide = (2 * d + IC_VW - 1) / IC_VW * IC_VW;
    const unsigned fit = PHI_FLOATS / wide, few = fit < IC_CPU_CHUNK ? fit : IC_CPU_CHUNK;
    for (unsigned i = 0; i < n; i += few) {
        const size_t at = (size_t)i * 2 * d;
        update_few(y + (size_t)i * 16, y_block, psi + at, delta ? delta + at : NULL,
                   n - i < few ? n - i : few, d, product, g);
    }
}

static void chain(const struct ic_cpu_chain *c, unsigned unit, float *scratch)
{
    const unsigned chunks = (unsigned)((c->cells + IC_CPU_CHUNK - 1) / IC_CPU_CHUNK);
    const unsigned sample = unit / chunks;
    const size_t cell = (size_t)(unit % chunks) * IC_CPU_CHUNK;
    const unsigned n = c->cells - cell < IC_CPU_CHUNK ? (unsigned)(c->cells - cell) : IC_CPU_CHUNK;
    size_t most = 0;
    for (unsigned i = 0; i < c->count; i++)
        most = most > c->conv[i].out_blocks ? most : c->conv[i].out_blocks;
    most *= IC_CPU_CHUNK * 16;
    size_t *off = (size_t *)(scratch + 2 * most);
    const float *a = c->conv[0].in[0].p + sample * c->conv[0].in[0].stride + cell * 16;
    size_t a_block = c->cells * 16;
    for (unsigned i = 0; i < c->count; i++) {
        const struct ic_cpu_conv *v = &c->conv[i];
        const size_t k = (size_t)v->in[0].blocks * 16;
        float *out = v->out ? v->out + sample * v->out_stride + cell * 16 : scratch + (i % 2) * most;
        const size_t c_block = v->out ? c->cells * 16 : IC_CPU_CHUNK * 16;
        for (unsigned b = 0; b < v->in[0].blocks; b++)
            off[b] = b * a_block;
        for (unsigned panel = 0; panel < (v->out_blocks + 1) / 2; panel++) {
            const unsigned width = v->out_blocks - panel * 2 >= 2 ? 32 : 16;
            struct gemm g = {.a = a,
                             .off = off,
                             .steps = v->in[0].blocks,
                             .u = v->u + panel * k * 32,
                             .width = width,
                             .init = v->bias ? v->bias + panel * 32 : NULL,
                             .c = out + panel * 2 * c_block,
                             .c_cell = 16,
                             .c_block = c_block};
            gemm_run(&g, n);
        }
        if (v->act.kind != IC_LAW_ACT_NONE)
            finish_run(v, out, c_block, v->out_blocks, n, NULL, 0);
        a = out;
        a_block = c_block;
    }
    if (c->update) {
        const struct ic_law_io *io = &c->io[sample];
        const size_t at = cell * 2 * c->d;
        update_cells(a, a_block, io->psi + at, io->delta ? io->delta + at : NULL, n, c->d, c->product,
                     io->gamma);
    }
}

static void norm(const struct ic_cpu_norm *p, unsigned unit)
{
    const unsigned chunks = (p->height + p->rows - 1) / p->rows;
    const unsigned y0 = unit % chunks * p->rows, y1 = y0 + p->rows < p->height ? y0 + p->rows : p->height;
    const unsigned block = unit / chunks % p->blocks, sample = unit / chunks / p->blocks;
    const size_t row = (size_t)p->width * 16, at = ((size_t)sample * p->blocks + block) * 16;
    float *x = p->x + sample * p->stride + block * p->height * row;
    for (unsigned s = 0; s < 16; s += IC_VW) {
        const vf mean = v_load(p->mean + at + s), scale = v_load(p->scale + at + s);
        const vf shift = v_load(p->shift + at + s);
        if (p->act.kind == IC_LAW_ACT_ELU)
            for (float *q = x + y0 * row + s; q < x + y1 * row; q += 16)
                v_store(q, v_elu(v_fma(v_load(q) - mean, scale, shift)));
        else
            for (float *q = x + y0 * row + s; q < x + y1 * row; q += 16)
                v_store(q, v_act(v_fma(v_load(q) - mean, scale, shift), &p->act));
    }
    if (!p->pool)
        return;
    const unsigned w2 = p->width / 2, h2 = p->height / 2;
    for (unsigned y = y0 / 2; y < y1 / 2; y++) {
        float *o = p->pool + sample * p->pool_stride + ((size_t)block * h2 + y) * w2 * 16;
        const float *q = x + (size_t)y * 2 * row;
        for (size_t i = 0; i < (size_t)w2 * 16; i += 16)
            for (unsigned s = 0; s < 16; s += IC_VW)
                v_store(o + i + s,
                        v_max(v_max(v_load(q + 2 * i + s), v_load(q + 2 * i + 16 + s)),
                              v_max(v_load(q + row + 2 * i + s), v_load(q + row + 2 * i + 16 + s))));
    }
}

/* Cells in segment s of a sample. */
static unsigned segment_cells(const struct ic_cpu_moments *m, unsigned s)
{
    if (!m->wino) {
        const struct ic_cpu_segments g = ic_cpu_segments_direct(m->height, m->width);
        const unsigned left = m->width - s % g.per_row * g.run;
        return left < g.run ? left : g.run;
    }
    const struct ic_cpu_segments g = ic_cpu_segments_wino(m->height, m->width);
    const unsigned ly = m->height - s / g.per_row * 4, lx = m->width - s % g.per_row * g.run * 4;
    return (ly < 4 ? ly : 4) * (lx < g.run * 4 ? lx : g.run * 4);
}

/* Double, in a fixed order: first the mean of the group, then the squares about it. */
static void moments(const struct ic_cpu_moments *m, unsigned sample)
{
    const unsigned wide = ic_cpu_blocks(m->channels) * 16;
    const float *st = m->stats + (size_t)sample * m->segments * 2 * wide;
    float *mean = m->mean + (size_t)sample * wide, *scale = m->scale + (size_t)sample * wide;
    float *shift = m->shift + (size_t)sample * wide;
    const unsigned size = m->groups ? m->channels / m->groups : 1;
    const double total = (double)m->height * m->width * size;
    for (unsigned c0 = 0; c0 < m->channels; c0 += size) {
        double sum = 0, square = 0;
        for (unsigned s = 0; s < m->segments; s++) {
            const float *p = st + (size_t)s * 2 * wide + c0;
            double part = 0;
            for (unsigned c = 0; c < size; c++)
                part += (double)p[c];
            sum += part * segment_cells(m, s);
        }
        const double mu = m->groups ? sum / total : 0;
        for (unsigned s = 0; s < m->segments; s++) {
            const float *p = st + (size_t)s * 2 * wide + c0;
            double part = 0;
            for (unsigned c = 0; c < size; c++)
                part += ((double)p[c] - mu) * ((double)p[c] - mu);
            square += part * segment_cells(m, s);
            for (unsigned c = 0; c < size; c++)
                square += (double)p[wide + c];
        }
        const double r = 1.0 / __builtin_sqrt(square / total + (double)m->eps);
        for (unsigned c = c0; c < c0 + size; c++) {
            mean[c] = (float)mu;
            scale[c] = (float)(r * (double)m->weight[c]);
            shift[c] = m->bias ? m->bias[c] : 0.0f;
        }
    }
    for (unsigned c = m->channels; c < wide; c++)
        mean[c] = scale[c] = shift[c] = 0; /* padding stays 0 */
}

static void input(const struct ic_cpu_plain *p, unsigned unit)
{
    const unsigned sample = unit / p->height, y = unit % p->height, len = 2 * p->d;
    const float *psi = p->io[sample].psi + (size_t)y * p->width * len;
    float *out = p->out + sample * p->out_stride + (size_t)y * p->width * 16;
    for (unsigned x = 0; x < p->width; x++, psi += len)
        for (unsigned j = 0; j < p->blocks * 16; j += IC_VW) {
            const unsigned n = j >= len ? 0 : len - j < IC_VW ? len - j : IC_VW;
            v_store(out + (size_t)(j / 16) * p->height * p->width * 16 + (size_t)x * 16 + j % 16,
                    v_load_n(psi + (n ? j : 0), n));
        }
}

static void pool(const struct ic_cpu_plain *p, unsigned unit)
{
    const unsigned sample = unit / p->height, y = unit % p->height;
    const size_t row = (size_t)p->width * 2 * 16;
    for (unsigned b = 0; b < p->blocks; b++) {
        const float *q = p->in + sample * p->in_stride + ((size_t)b * p->height + y) * 2 * row;
        float *o = p->out + sample * p->out_stride + ((size_t)b * p->height + y) * p->width * 16;
        for (size_t i = 0; i < (size_t)p->width * 16; i += 16)
            for (unsigned s = 0; s < 16; s += IC_VW)
                v_store(o + i + s,
                        v_max(v_max(v_load(q + 2 * i + s), v_load(q + 2 * i + 16 + s)),
                              v_max(v_load(q + row + 2 * i + s), v_load(q + row + 2 * i + 16 + s))));
    }
}

static void mem_in(const struct ic_cpu_plain *p, unsigned unit)
{
    const unsigned sample = unit / p->blocks, b = unit % p->blocks;
    const size_t cells = (size_t)p->height * p->width;
    float *o = p->out + sample * p->out_stride + b * cells * 16;
    for (unsigned l = 0; l < 16; l++) {
        const unsigned ch = b * 16 + l;
        const float *h = p->io[sample].h + (size_t)(ch < p->channels ? ch : 0) * cells;
        for (size_t i = 0; i < cells; i++)
            o[i * 16 + l] = ch < p->channels ? h[i] : 0.0f;
    }
}

/* Gates come blocked, h and c live as [channel][cell]: vectors run along cells. */
static void lstm(const struct ic_cpu_plain *p, unsigned unit)
{
    const unsigned sample = unit / p->blocks, b = unit % p->blocks;
    const size_t cells = (size_t)p->height * p->width;
    const float *gates = p->in + sample * p->in_stride;
    float *o = p->out + sample * p->out_stride + b * cells * 16;
    for (unsigned l = 0; l < 16; l++) {
        const unsigned ch = b * 16 + l;
        if (ch >= p->channels) {
            for (size_t i = 0; i < cells; i++)
                o[i * 16 + l] = 0;
            continue;
        }
        float *cs = p->io[sample].c + (size_t)ch * cells, *hs = p->io[sample].h + (size_t)ch * cells;
        for (size_t i = 0; i < cells; i += IC_VW) {
            const unsigned n = cells - i < IC_VW ? (unsigned)(cells - i) : IC_VW;
            float g[4][IC_VW] = {{0}}, h[IC_VW];
            for (unsigned q = 0; q < 4; q++) {
                const unsigned gc = q * p->channels + ch;
                const float *gp = gates + (size_t)(gc / 16) * cells * 16 + gc % 16;
                for (unsigned j = 0; j < n; j++)
                    g[q][j] = gp[(i + j) * 16];
            }
            const vf c0 = v_load_n(cs + i, n);
            const vf c1 = v_sigmoid(v_load(g[0])) * c0 + v_sigmoid(v_load(g[1])) * v_tanh(v_load(g[3]));
            const vf h1 = v_sigmoid(v_load(g[2])) * v_tanh(c1);
            v_store_n(cs + i, c1, n);
            v_store_n(hs + i, h1, n);
            v_store(h, h1);
            for (unsigned j = 0; j < n; j++)
                o[(i + j) * 16 + l] = h[j];
        }
    }
}

/* Weights of samples 2i-1 .. 2i+2 out of n: 1 3 3 1, those outside dropped, the rest scaled to sum 1. */
static void half_taps(unsigned i, unsigned n, unsigned at[4], float w[4])
{
    static const float tap[4] = {1, 3, 3, 1};
    float sum = 0;
    for (unsigned k = 0; k < 4; k++) {
        const bool inside = 2 * i + k >= 1 && 2 * i + k - 1 < n;
        at[k] = inside ? 2 * i + k - 1 : 0;
        w[k] = inside ? tap[k] : 0;
        sum += w[k];
    }
    for (unsigned k = 0; k < 4; k++)
        w[k] /= sum;
}

static void resize_half(const struct ic_cpu_plain *p, unsigned unit)
{
    const unsigned sample = unit / p->height, y = unit % p->height;
    const size_t row = (size_t)p->width * 2 * 16;
    unsigned ay[4], ax[4];
    float wy[4], wx[4];
    half_taps(y, p->height * 2, ay, wy);
    for (unsigned x = 0; x < p->width; x++) {
        half_taps(x, p->width * 2, ax, wx);
        for (unsigned b = 0; b < p->blocks; b++) {
            const float *q = p->in + sample * p->in_stride + (size_t)b * p->height * 2 * row;
            float *o = p->out + sample * p->out_stride + (((size_t)b * p->height + y) * p->width + x) * 16;
            for (unsigned s = 0; s < 16; s += IC_VW) {
                vf sum = v_zero();
                for (unsigned i = 0; i < 4; i++) {
                    vf r = v_zero();
                    for (unsigned j = 0; j < 4; j++)
                        r = v_fma(v_set1(wx[j]), v_load(q + ay[i] * row + (size_t)ax[j] * 16 + s), r);
                    sum = v_fma(v_set1(wy[i]), r, sum);
                }
                v_store(o + s, sum);
            }
        }
    }
}

static void update(const struct ic_cpu_plain *p, unsigned unit)
{
    const unsigned sample = unit / p->height, y = unit % p->height;
    const struct ic_law_io *io = &p->io[sample];
    const size_t cell = (size_t)y * p->width, at = cell * 2 * p->d;
    update_cells(p->in + sample * p->in_stride + cell * 16, (size_t)p->height * p->width * 16, io->psi + at,
                 io->delta ? io->delta + at : NULL, p->width, p->d, p->product, io->gamma);
}

static void elu(float *x, size_t n)
{
    for (size_t i = 0; i < n; i += IC_VW)
        v_store(x + i, v_elu(v_load(x + i)));
}

/* Twelve independent chains of fused multiply-adds: what this core can do and no kernel can exceed. */
static double peak(double seconds)
{
    vf a[12];
    UNROLL for (int i = 0; i < 12; i++) a[i] = v_set1((float)i);
    const vf x = v_set1(0.5f), y = v_set1(0.25f);
    double flops = 0;
    const int64_t start = ic_now_ns();
    int64_t took;
    do {
        for (int n = 0; n < 100000; n++) {
            UNROLL for (int i = 0; i < 12; i++) a[i] = v_fma(a[i], x, y);
        }
        flops += 100000.0 * 12 * IC_VW * 2;
        took = ic_now_ns() - start;
    } while ((double)took < seconds * 1e9);
    UNROLL for (int i = 1; i < 12; i++) a[0] += a[i];
    volatile float keep = v_sum(a[0]);
    (void)keep;
    return flops / (double)took * 1e9;
}
