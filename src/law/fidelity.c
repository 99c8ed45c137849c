#include "law/fidelity.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "law/cpu/pool.h"
#include "law/init.h"
#include "law/metrics.h"
#include "law/stats.h"

#define ROWS (IC_LAW_FIDELITY_ROWS_MAX + 1) /* row 0 is float32 */
#define SEEDS IC_LAW_FIDELITY_SEEDS_MAX
#define GROUP 64        /* seeds that are stepped together: what a plan and the states take is bounded */
#define TIMES 24        /* at which the overlap is taken, at most */
#define SAMPLES 160     /* of the metrics, about */
#define BATCHES 8       /* that the samples of a run are cut into (law/stats.h), at most */
#define SEEDS_TOLD 9999 /* more are not reckoned */
#define ONE_STEPS 10    /* states from which the one-step error is taken, about */

/* What is judged; a mean smaller than `least` does not make a deviation larger than by it. */
static const struct {
    const char *name;
    size_t at;
    double least;
} judged[] = {
    {"entropy", offsetof(struct ic_law_metrics, channel_entropy), 1e-6},
    {"complexity", offsetof(struct ic_law_metrics, complexity), 1e-6},
    {"symmetry", offsetof(struct ic_law_metrics, symmetry), 1e-6},
    {"coherence", offsetof(struct ic_law_metrics, coherence), 1e-6},
    {"defects", offsetof(struct ic_law_metrics, defects), 1},
};
#define JUDGED (sizeof judged / sizeof judged[0])

struct row {
    const char *name;
    struct ic_law *law;
    struct ic_law_packed *packed;
    struct ic_law_plan *plan;
    struct ic_law_exec *exec;
    struct ic_law_io io[GROUP];
    float *kept[GROUP];                 /* psi as it was when metrics were asked for */
    double sum[JUDGED][SEEDS][BATCHES]; /* over samples of the metrics */
    double overlap[TIMES];              /* mean over seeds */
    double one_sum;                     /* of squared one-step errors */
    double mean[JUDGED];
    struct ic_law_estimate dev[JUDGED]; /* from float32, as a share of its mean */
};

struct run {
    const struct ic_law_fidelity_opts *o;
    unsigned grid, rows, times, time[TIMES];
    unsigned spin_up, every;             /* steps before the first sample; between samples */
    unsigned first, n;                   /* the group's: seeds before it, and in it */
    unsigned samples, batches;           /* samples that the group has taken so far */
    unsigned one_steps;                  /* one-step errors of a row so far */
    unsigned planned, in_batch[BATCHES]; /* samples in all; of each batch */
    size_t floats, memory;               /* of psi; of each of h, c */
    struct row row[ROWS];
    struct ic_cpu_pool *pool; /* computes metrics */
    pthread_t beside;         /* drives it while a device steps on, if `busy` */
    bool busy;
    struct ic_law_io from[GROUP], to[GROUP]; /* scratch: the float32 state, and where a row takes it */
    double x[SEEDS * BATCHES];               /* scratch */
    FILE *csv;
};

/* ---- Memory ------------------------------------------------------------------------------------ */

static unsigned group_of(const struct ic_law_fidelity_opts *o)
{
    return o->seeds < GROUP ? o->seeds : GROUP;
}

static bool io_new(const struct run *r, struct ic_law_io *io, float gamma)
{
    io->gamma = gamma;
    io->psi = aligned_alloc(64, (r->floats * sizeof(float) + 63) / 64 * 64);
    if (r->memory) {
        io->h = aligned_alloc(64, (r->memory * sizeof(float) + 63) / 64 * 64);
        io->c = aligned_alloc(64, (r->memory * sizeof(float) + 63) / 64 * 64);
    }
    return io->psi && (!r->memory || (io->h && io->c));
}

static void io_free(struct ic_law_io *io)
{
    free(io->psi);
    free(io->h);
    free(io->c);
}

static void io_copy(const struct run *r, struct ic_law_io *to, const struct ic_law_io *from)
{
    memcpy(to->psi, from->psi, r->floats * sizeof(float));
    if (r->memory) {
        memcpy(to->h, from->h, r->memory * sizeof(float));
        memcpy(to->c, from->c, r->memory * sizeof(float));
    }
}

static void row_close(const struct run *r, struct row *w)
{
    const struct ic_law_backend *be = r->o->backend;
    for (unsigned s = 0; s < GROUP; s++) {
        io_free(&w->io[s]);
        free(w->kept[s]);
    }
    if (w->exec)
        be->close(&w->exec);
    ic_law_plan_close(&w->plan);
    if (w->packed)
        be->unpack(&w->packed);
    ic_law_close(&w->law);
}

static enum ic_status row_open(const struct run *r, struct row *w, const struct ic_law_policy *policy,
                               struct ic_err *err)
{
    const struct ic_law_fidelity_opts *o = r->o;
    const struct ic_law_open_opts how = {.config = o->config, .arch = o->arch, .policy = policy};
    enum ic_status s = ic_law_open(o->path, &how, &w->law, err);
    if (s == IC_OK)
        s = ic_law_plan_open(w->law, r->grid, r->grid, group_of(o), o->backend->tensor_bytes, &w->plan,
                             err);
    if (s == IC_OK)
        s = o->backend->pack(w->law, o->threads, &w->packed, err);
    if (s == IC_OK)
        s = o->backend->open(w->packed, w->plan, &w->exec, err);
    return s;
}

/* ---- Measures ---------------------------------------------------------------------------------- */

static double difference(const float *a, const float *b, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    return sqrt(sum);
}

static double overlap(const float *a, const float *b, size_t n)
{
    double re = 0, im = 0, aa = 0, bb = 0;
    for (size_t i = 0; i < n; i += 2) {
        const double ar = (double)a[i], ai = (double)a[i + 1], br = (double)b[i], bi = (double)b[i + 1];
        re += ar * br + ai * bi;
        im += ar * bi - ai * br;
        aa += ar * ar + ai * ai;
        bb += br * br + bi * bi;
    }
    return aa > 0 && bb > 0 ? hypot(re, im) / sqrt(aa * bb) : 0;
}

static void put_csv(const struct run *r, const struct row *w, const char *what, const char *metric,
                    int seed, unsigned step, double value)
{
    const unsigned long from = r->o->first_seed - 1;
    if (r->csv)
        fprintf(r->csv, "%u,%s,%s,%s,%ld,%u,%.9g\n", r->grid, w->name, what, metric,
                seed < 0 ? -1 : (long)from + seed, step, value);
}

/* Unit: a row's seed. What a sample adds belongs to it alone. */
static void sample_one(void *ctx, unsigned unit, unsigned worker)
{
    struct run *r = ctx;
    struct row *w = &r->row[unit / r->n];
    const unsigned s = unit % r->n, batch = r->samples * r->batches / r->planned;
    const struct ic_law_shape shape = {r->grid, r->grid, w->law->d};
    struct ic_law_metrics m;
    (void)worker;
    if (ic_law_metrics_compute(w->kept[s], NULL, shape, 0, &m, NULL) != IC_OK)
        return;
    for (size_t k = 0; k < JUDGED; k++)
        w->sum[k][r->first + s][batch] += *(const double *)(const void *)((const char *)&m + judged[k].at);
}

static void *sample_all(void *ctx)
{
    struct run *r = ctx;
    ic_cpu_pool_take(r->pool);
    ic_cpu_pool_run(r->pool, sample_one, r, r->rows * r->n);
    ic_cpu_pool_release(r->pool);
    r->samples++;
    return NULL;
}

static void finish_sample(struct run *r)
{
    if (r->busy)
        pthread_join(r->beside, NULL);
    r->busy = false;
}

/* A device steps on meanwhile; where the CPU steps, its cores are taken. */
static void sample_metrics(struct run *r)
{
    finish_sample(r);
    for (unsigned i = 0; i < r->rows; i++)
        for (unsigned s = 0; s < r->n; s++)
            memcpy(r->row[i].kept[s], r->row[i].io[s].psi, r->floats * sizeof(float));
    r->in_batch[r->samples * r->batches / r->planned]++;
    r->busy = r->o->backend->run && pthread_create(&r->beside, NULL, sample_all, r) == 0;
    if (!r->busy)
        sample_all(r);
}

/* One step of `w` from the float32 run's states against float32's own step; *out: mean over seeds of the
 * squared error. r->from holds the states before, row 0 those after. */
static enum ic_status one_step(struct run *r, struct row *w, double *out, struct ic_err *err)
{
    *out = 0;
    for (unsigned s = 0; s < r->n; s++)
        io_copy(r, &r->to[s], &r->from[s]);
    enum ic_status st = ic_law_exec_run(r->o->backend, w->exec, r->to, r->n, 1, err);
    for (unsigned s = 0; s < r->n && st == IC_OK; s++) {
        const float *after = r->row[0].io[s].psi;
        const double change = difference(after, r->from[s].psi, r->floats);
        const double e = change > 0 ? difference(r->to[s].psi, after, r->floats) / change : 0;
        *out += e * e / r->n;
    }
    return st;
}

static enum ic_status one_steps(struct run *r, unsigned step, struct ic_err *err)
{
    enum ic_status st = IC_OK;
    for (unsigned i = 1; i < r->rows && st == IC_OK; i++) {
        double e;
        st = one_step(r, &r->row[i], &e, err);
        r->row[i].one_sum += e * r->n;
        put_csv(r, &r->row[i], "one_step", "", -1, step, sqrt(e));
    }
    r->one_steps += r->n;
    return st;
}

/* What the group adds to the CSV. */
static void put_means(const struct run *r)
{
    for (unsigned i = 0; i < r->rows && r->csv; i++)
        for (size_t k = 0; k < JUDGED; k++)
            for (unsigned s = r->first; s < r->first + r->n; s++) {
                double mean = 0;
                for (unsigned b = 0; b < r->batches; b++) {
                    const double sum = r->row[i].sum[k][s][b];
                    mean += sum / r->samples;
                    put_csv(r, &r->row[i], "batch", judged[k].name, (int)s, b, sum / r->in_batch[b]);
                }
                put_csv(r, &r->row[i], "mean", judged[k].name, (int)s, r->o->steps, mean);
            }
    if (r->csv)
        fflush(r->csv); /* a long run that is stopped leaves what it has */
}

/* Each seed's difference from float32, batch by batch: what both runs of a seed have in common falls out.
 */
static void judge(struct run *r)
{
    const unsigned n = r->o->seeds, batches = r->batches;
    for (unsigned i = 0; i < r->rows; i++)
        for (size_t k = 0; k < JUDGED; k++) {
            struct row *w = &r->row[i];
            w->mean[k] = 0;
            for (unsigned s = 0; s < n; s++)
                for (unsigned b = 0; b < batches; b++)
                    w->mean[k] += w->sum[k][s][b] / r->samples / n;
            const double scale = fmax(fabs(r->row[0].mean[k]), judged[k].least);
            for (unsigned s = 0; s < n; s++)
                for (unsigned b = 0; b < batches; b++)
                    r->x[s * batches + b] =
                        (w->sum[k][s][b] - r->row[0].sum[k][s][b]) / r->in_batch[b] / scale;
            w->dev[k] = ic_law_estimate_of(r->x, n, batches);
        }
}

/* ---- Running ----------------------------------------------------------------------------------- */

/* 1, 2, 5, 10, 20, 50 … and the last. */
static void choose_times(struct run *r)
{
    static const unsigned digits[] = {1, 2, 5};
    unsigned power = 1;
    for (unsigned i = 0; r->times < TIMES - 1; i++) {
        const unsigned t = digits[i % 3] * power;
        if (t >= r->o->steps)
            break;
        r->time[r->times++] = t;
        power *= i % 3 == 2 ? 10 : 1;
    }
    r->time[r->times++] = r->o->steps;
}

static enum ic_status take_memory(struct run *r, struct ic_err *err)
{
    const struct ic_law *law = r->row[0].law;
    r->floats = ic_law_psi_bytes(law, r->grid, r->grid) / sizeof(float);
    r->memory = ic_law_memory_bytes(law, r->grid, r->grid) / 2 / sizeof(float);
    for (unsigned k = 0; k < group_of(r->o); k++) {
        bool good = io_new(r, &r->from[k], law->gamma) && io_new(r, &r->to[k], law->gamma);
        for (unsigned i = 0; i < r->rows; i++) {
            r->row[i].kept[k] = malloc(r->floats * sizeof(float));
            good = io_new(r, &r->row[i].io[k], law->gamma) && r->row[i].kept[k] && good;
        }
        if (!good)
            return ic_fail(err, IC_OOM, "no memory for %u states of %u rows", group_of(r->o), r->rows);
    }
    return IC_OK;
}

/* The group's starts. */
static enum ic_status start(struct run *r, struct ic_err *err)
{
    const struct ic_law *law = r->row[0].law;
    const struct ic_law_shape shape = {r->grid, r->grid, law->d};
    enum ic_law_init_mode mode;
    enum ic_status s = ic_law_init_parse(law->initial_mode, &mode, err);
    for (unsigned k = 0; k < r->n && s == IC_OK; k++) {
        struct ic_law_io *first = &r->row[0].io[k];
        if (r->memory) {
            memset(first->h, 0, r->memory * sizeof(float));
            memset(first->c, 0, r->memory * sizeof(float));
        }
        s = ic_law_init_fill(first->psi, shape, mode, r->o->first_seed + r->first + k, err);
        for (unsigned i = 1; i < r->rows && s == IC_OK; i++) {
            io_copy(r, &r->row[i].io[k], first);
            for (size_t x = 0; x < r->floats && r->o->row[i - 1].nudged; x++)
                r->row[i].io[k].psi[x] *= x % 3 ? 1 - 1e-6f : 1 + 1e-6f;
        }
    }
    return s;
}

static void take_overlaps(struct run *r, unsigned which)
{
    for (unsigned i = 0; i < r->rows; i++)
        for (unsigned s = 0; s < r->n; s++) {
            const double v = overlap(r->row[i].io[s].psi, r->row[0].io[s].psi, r->floats);
            r->row[i].overlap[which] += v / r->o->seeds;
            put_csv(r, &r->row[i], "overlap", "", (int)(r->first + s), r->time[which], v);
        }
}

/* When to sample: SAMPLES times, or so, from the spin-up's end to the last step. */
static void plan_samples(struct run *r)
{
    const unsigned left = r->o->steps - r->spin_up;
    r->every = (left + SAMPLES - 1) / SAMPLES;
    r->planned = (left - 1) / r->every + 1;
    r->batches = r->planned < BATCHES ? r->planned : BATCHES;
}

/* Whether the one-step error of step t is taken. */
static bool takes_one_step(const struct run *r, unsigned t)
{
    const unsigned steps = r->o->steps, every = (steps / 2) / ONE_STEPS + 1;
    return t > steps / 2 && (steps - t) % every == 0;
}

static bool samples(const struct run *r, unsigned t)
{
    return t > r->spin_up && (r->o->steps - t) % r->every == 0;
}

/* From one step that is looked at to the next; in between a device keeps its states to itself. */
static enum ic_status step_through(struct run *r, struct ic_err *err)
{
    enum ic_status st = IC_OK;
    for (unsigned done = 0, next = 0; done < r->o->steps && st == IC_OK;) {
        const bool take = takes_one_step(r, done + 1);
        unsigned t = done + 1; /* the last step is looked at: samples() */
        while (!samples(r, t) && t != r->time[next] && !takes_one_step(r, t) && !takes_one_step(r, t + 1))
            t++;
        for (unsigned s = 0; take && s < r->n; s++)
            io_copy(r, &r->from[s], &r->row[0].io[s]);
        for (unsigned i = 0; i < r->rows && st == IC_OK; i++)
            st = ic_law_exec_run(r->o->backend, r->row[i].exec, r->row[i].io, r->n, t - done, err);
        done = t;
        if (take && st == IC_OK)
            st = one_steps(r, t, err);
        if (samples(r, t))
            sample_metrics(r);
        if (next < r->times && t == r->time[next])
            take_overlaps(r, next++);
    }
    finish_sample(r);
    return st;
}

static enum ic_status run_groups(struct run *r, struct ic_err *err)
{
    const unsigned seeds = r->o->seeds, group = group_of(r->o);
    enum ic_status s = take_memory(r, err);
    plan_samples(r);
    for (r->first = 0; r->first < seeds && s == IC_OK; r->first += group) {
        r->n = seeds - r->first < group ? seeds - r->first : group;
        r->samples = 0;
        memset(r->in_batch, 0, sizeof r->in_batch);
        s = start(r, err);
        if (s == IC_OK)
            s = step_through(r, err);
        if (s == IC_OK)
            put_means(r);
        if (s == IC_OK && r->first + r->n < seeds)
            fprintf(stderr, "grid %u: %u of %u seeds done\n", r->grid, r->first + r->n, seeds);
    }
    return s;
}

/* ---- Telling ----------------------------------------------------------------------------------- */

/* *seeds: about how many would decide, if the deviations are what they seem to be (and for one that is next
 * to the threshold a tenth of it is told apart). */
static enum ic_law_fidelity_verdict judge_row(const struct run *r, const struct row *w, unsigned *seeds)
{
    const double most = r->o->threshold;
    enum ic_law_fidelity_verdict v = IC_LAW_FIDELITY_PASS;
    *seeds = 2;
    for (size_t k = 0; k < JUDGED; k++) {
        const struct ic_law_estimate *e = &w->dev[k];
        const double dev = fabs(e->mean);
        enum ic_law_fidelity_verdict one = dev + e->half <= most ? IC_LAW_FIDELITY_PASS /* a NaN does not */
                                           : dev - e->half <= most ? IC_LAW_FIDELITY_UNDECIDED
                                                                   : IC_LAW_FIDELITY_FAIL;
        v = one > v ? one : v;
        if (one != IC_LAW_FIDELITY_UNDECIDED)
            continue;
        const unsigned n = ic_law_runs_for(e, r->batches, fmax(fabs(most - dev), most / 10), SEEDS_TOLD);
        *seeds = n > *seeds ? n : *seeds;
    }
    return v;
}

static enum ic_law_fidelity_verdict print_grid(const struct run *r)
{
    enum ic_law_fidelity_verdict worst = IC_LAW_FIDELITY_PASS;
    printf("\ngrid %ux%u, %u seeds, %u steps; means over steps %u to %u; deviations from fp32 with their "
           "95 %% interval\n(b: over the %u batches of every run, among which seeds do not show; else over "
           "seeds)\n%-12s %10s",
           r->grid, r->grid, r->o->seeds, r->o->steps, r->spin_up + 1, r->o->steps, r->batches, "",
           "one step");
    for (size_t k = 0; k < JUDGED; k++)
        printf("  %21s", judged[k].name);
    printf("\n%-12s %10s", "fp32", "");
    for (size_t k = 0; k < JUDGED; k++)
        printf("  %21.6g", r->row[0].mean[k]);
    for (unsigned i = 1; i < r->rows; i++) {
        const struct row *w = &r->row[i];
        printf("\n%-12s %9.3f%%", w->name, 100 * sqrt(w->one_sum / r->one_steps));
        for (size_t k = 0; k < JUDGED; k++)
            printf("  %+8.2f%% +- %6.2f%%%c", 100 * w->dev[k].mean, 100 * w->dev[k].half,
                   w->dev[k].pooled ? 'b' : ' ');
    }
    printf("\noverlap with fp32 after steps\n%-12s", "");
    for (unsigned t = 0; t < r->times; t++)
        printf(" %6u", r->time[t]);
    for (unsigned i = 1; i < r->rows; i++) {
        printf("\n%-12s", r->row[i].name);
        for (unsigned t = 0; t < r->times; t++)
            printf(" %6.3f", r->row[i].overlap[t]);
    }
    printf("\n");
    for (unsigned i = 1; i < r->rows; i++) {
        unsigned seeds;
        const enum ic_law_fidelity_verdict v = judge_row(r, &r->row[i], &seeds);
        if (r->o->row[i - 1].nudged)
            continue;
        printf("verdict: %s %s (every metric within %g %%)", r->row[i].name,
               v == IC_LAW_FIDELITY_PASS   ? "passes"
               : v == IC_LAW_FIDELITY_FAIL ? "FAILS"
                                           : "is undecided",
               100 * r->o->threshold);
        if (v == IC_LAW_FIDELITY_UNDECIDED && r->o->seeds == 1)
            printf("; one seed says nothing about others");
        else if (v == IC_LAW_FIDELITY_UNDECIDED)
            printf("; it would take %s %u seeds of so many steps",
                   seeds < SEEDS_TOLD ? "about" : "more than", seeds);
        printf("\n");
        worst = v > worst ? v : worst;
    }
    return worst;
}

/* The one-step error of each layer alone in NF4, from the last states of the last
 * group. */
static enum ic_status print_layers(struct run *r, struct ic_err *err)
{
    struct ic_law_spec specs[IC_LAW_SPECS_MAX];
    const struct ic_law *law = r->row[0].law;
    const size_t n = ic_law_arch_specs(law->arch, law->d, law->b, specs);
    for (unsigned k = 0; k < r->n; k++)
        io_copy(r, &r->from[k], &r->row[0].io[k]);
    enum ic_status s = ic_law_exec_run(r->o->backend, r->row[0].exec, r->row[0].io, r->n, 1, err);
    printf("each layer alone in NF4: share of the parameters, one-step error\n");
    for (size_t i = 0; i < n && s == IC_OK; i++) {
        if (specs[i].ndim != 4)
            continue;
        const int stem = (int)(strlen(specs[i].name) - strlen(".weight"));
        struct ic_law_policy policy = {.base = IC_LAW_FP32, .rules = 1};
        snprintf(policy.rule[0].layer, sizeof policy.rule[0].layer, "%.*s", stem, specs[i].name);
        policy.rule[0].precision = IC_LAW_NF4;
        struct row w = {0};
        double e = 0;
        s = row_open(r, &w, &policy, err);
        if (s == IC_OK)
            s = one_step(r, &w, &e, err);
        if (s == IC_OK)
            printf("  %-28.*s %6.2f%% %9.3f%%\n", stem, specs[i].name,
                   100 *
                       (double)((size_t)specs[i].dim[0] * specs[i].dim[1] * specs[i].dim[2] *
                                specs[i].dim[3]) /
                       (double)law->params,
                   100 * sqrt(e));
        row_close(r, &w);
    }
    return s;
}

/* ---- The plot: overlap over time, and deviations with their intervals ---------------------------- */

#define PLOT_W 960
#define PLOT_H 340 /* of one grid */
static const char *const colours[ROWS] = {"#333",    "#1f77b4", "#2ca02c", "#d62728", "#9467bd",
                                          "#ff7f0e", "#8c564b", "#17becf", "#e377c2"};

static void plot_overlap(FILE *f, const struct run *r, double y0)
{
    const double x0 = 60, w = 380, h = 240, last = log10(r->o->steps > 1 ? (double)r->o->steps : 10);
    fprintf(f, "<rect x='%g' y='%g' width='%g' height='%g' fill='none' stroke='#999'/>\n", x0, y0, w, h);
    for (int k = 0; k <= 4; k++)
        fprintf(f, "<text x='%g' y='%g' text-anchor='end'>%.2f</text>\n", x0 - 5, y0 + h - h * k / 4 + 4,
                k / 4.0);
    for (unsigned t = 0; t < r->times; t++)
        if (t % 3 == 0 || t + 1 == r->times)
            fprintf(f, "<text x='%g' y='%g' text-anchor='middle'>%u</text>\n",
                    x0 + w * log10((double)r->time[t]) / last, y0 + h + 15, r->time[t]);
    fprintf(f, "<text x='%g' y='%g' text-anchor='middle'>overlap with fp32, over steps (grid %u)</text>\n",
            x0 + w / 2, y0 - 8, r->grid);
    for (unsigned i = 1; i < r->rows; i++) {
        fprintf(f, "<polyline fill='none' stroke-width='2' stroke='%s' points='", colours[i]);
        for (unsigned t = 0; t < r->times; t++)
            fprintf(f, "%g,%g ", x0 + w * log10((double)r->time[t]) / last,
                    y0 + h * (1 - r->row[i].overlap[t]));
        fprintf(f, "'/>\n");
    }
}

static void plot_deviations(FILE *f, const struct run *r, double y0)
{
    const double x0 = 500, w = 420, h = 240, limit = r->o->threshold, top = 2 * limit;
    fprintf(f, "<rect x='%g' y='%g' width='%g' height='%g' fill='none' stroke='#999'/>\n", x0, y0, w, h);
    for (int k = -2; k <= 2; k++) {
        const double y = y0 + h / 2 - h / 2 * (k * limit) / top;
        fprintf(f, "<line x1='%g' x2='%g' y1='%g' y2='%g' stroke='%s'/>\n", x0, x0 + w, y, y,
                k == 0              ? "#999"
                : k == 1 || k == -1 ? "#d88"
                                    : "#eee");
        fprintf(f, "<text x='%g' y='%g' text-anchor='end'>%g%%</text>\n", x0 - 5, y + 4, 100 * k * limit);
    }
    for (size_t k = 0; k < JUDGED; k++) {
        const double cx = x0 + w * ((double)k + 0.5) / JUDGED;
        fprintf(f, "<text x='%g' y='%g' text-anchor='middle'>%s</text>\n", cx, y0 + h + 15, judged[k].name);
        for (unsigned i = 1; i < r->rows; i++) {
            const double x = cx + ((double)i - r->rows / 2.0) * 9;
            const double dev = r->row[i].dev[k].mean, e = r->row[i].dev[k].half;
            const double d = fmax(-top, fmin(top, dev)), lo = fmax(-top, dev - e), hi = fmin(top, dev + e);
            fprintf(f,
                    "<line x1='%g' x2='%g' y1='%g' y2='%g' stroke='%s' stroke-width='2'/>"
                    "<circle cx='%g' cy='%g' r='3.5' fill='%s'/>\n",
                    x, x, y0 + h / 2 * (1 - fmin(top, lo) / top), y0 + h / 2 * (1 - fmax(-top, hi) / top),
                    colours[i], x, y0 + h / 2 * (1 - d / top), colours[i]);
        }
    }
    fprintf(f,
            "<text x='%g' y='%g' text-anchor='middle'>time averages: deviation from fp32, 95 %% "
            "interval</text>\n",
            x0 + w / 2, y0 - 8);
}

static void plot_grid(FILE *f, const struct run *r, unsigned which)
{
    const double y0 = 40 + (double)which * PLOT_H;
    plot_overlap(f, r, y0);
    plot_deviations(f, r, y0);
    for (unsigned i = 1; i < r->rows; i++)
        fprintf(f, "<rect x='%g' y='%g' width='12' height='12' fill='%s'/><text x='%g' y='%g'>%s</text>\n",
                60.0 + 110 * (i - 1), y0 + 264, colours[i], 77.0 + 110 * (i - 1), y0 + 274, r->row[i].name);
}

/* ---- The whole ----------------------------------------------------------------------------------- */

static enum ic_status run_grid(struct run *r, FILE *plot, unsigned which,
                               enum ic_law_fidelity_verdict *worst, struct ic_err *err)
{
    static const struct ic_law_policy fp32 = {.base = IC_LAW_FP32};
    enum ic_status s = IC_OK;
    r->rows = r->o->rows + 1;
    r->spin_up = r->o->spin_up ? r->o->spin_up : r->o->steps / 4;
    choose_times(r);
    for (unsigned i = 0; i < r->rows && s == IC_OK; i++) {
        r->row[i].name = i ? r->o->row[i - 1].name : "fp32";
        s = row_open(r, &r->row[i], i ? &r->o->row[i - 1].policy : &fp32, err);
    }
    if (s == IC_OK)
        s = ic_cpu_pool_open(r->o->threads, &r->pool, err);
    if (s == IC_OK)
        s = run_groups(r, err);
    ic_cpu_pool_close(&r->pool);
    if (s == IC_OK) {
        judge(r);
        const enum ic_law_fidelity_verdict v = print_grid(r);
        *worst = v > *worst ? v : *worst;
        if (plot)
            plot_grid(plot, r, which);
    }
    if (s == IC_OK && r->o->layers)
        s = print_layers(r, err);
    fflush(stdout);
    for (unsigned i = 0; i < r->rows; i++)
        row_close(r, &r->row[i]);
    for (unsigned k = 0; k < GROUP; k++) {
        io_free(&r->from[k]);
        io_free(&r->to[k]);
    }
    return s;
}

static enum ic_status open_file(const char *path, FILE **out, struct ic_err *err)
{
    *out = path ? fopen(path, "w") : NULL;
    return path && !*out ? ic_fail(err, IC_INTERNAL, "%s: %s", path, strerror(errno)) : IC_OK;
}

static enum ic_status close_file(FILE *f, const char *path, enum ic_status s, struct ic_err *err)
{
    const bool bad = f && (ferror(f) != 0) | (fclose(f) != 0);
    return s == IC_OK && bad ? ic_fail(err, IC_INTERNAL, "%s: %s", path, strerror(errno)) : s;
}

enum ic_status ic_law_fidelity(const struct ic_law_fidelity_opts *o, enum ic_law_fidelity_verdict *worst,
                               struct ic_err *err)
{
    FILE *csv = NULL, *plot = NULL;
    IC_ASSERT(o->rows >= 1 && o->rows < ROWS && o->grids >= 1 && o->grids <= IC_LAW_FIDELITY_GRIDS_MAX &&
              o->seeds >= 1 && o->seeds <= SEEDS && o->steps >= 4 && o->spin_up < o->steps);
    *worst = IC_LAW_FIDELITY_PASS;
    enum ic_status s = open_file(o->csv, &csv, err);
    if (s == IC_OK)
        s = open_file(o->plot, &plot, err);
    if (csv)
        fprintf(csv, "grid,precision,what,metric,seed,step,value\n");
    if (plot)
        fprintf(plot,
                "<svg xmlns='http://www.w3.org/2000/svg' width='%d' height='%u' font-family='sans-serif' "
                "font-size='12'>\n<rect width='100%%' height='100%%' fill='white'/>\n",
                PLOT_W, PLOT_H * o->grids);
    for (unsigned g = 0; g < o->grids && s == IC_OK; g++) {
        struct run *r = calloc(1, sizeof *r);
        if (!r) {
            s = ic_fail(err, IC_OOM, "no memory to compare precisions");
            break;
        }
        r->o = o;
        r->grid = o->grid[g];
        r->csv = csv;
        s = run_grid(r, plot, g, worst, err);
        free(r);
    }
    if (plot)
        fprintf(plot, "</svg>\n");
    s = close_file(csv, o->csv, s, err);
    s = close_file(plot, o->plot, s, err);
    return s;
}
