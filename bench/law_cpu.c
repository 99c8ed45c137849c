/* Steps per second of the CPU back end on UNET_UNITARY, against what this machine's cores can do.
 *
 *   law-cpu-bench [--threads N] [--isa NAME] [--direct] [--micro N] [--d N] [--b N] [--repeat N]
 *                 [--case GRID,BATCH]… [--ops] [--dump FOLDER] [--precision P] [--expand BYTES]
 *
 * Prints per case the median and the fastest step, GFLOP/s counted as direct convolutions (so that
 * Winograd's savings show as speed, and numbers compare with PyTorch's), and the share of the measured
 * peak of fused multiply-adds; --ops adds where the time goes. The line beginning "RESULT" is for
 * bench/law.sh. --dump writes weights, start and end state for bench/law_torch.py to repeat. */
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "base/clock.h"
#include "law/cpu/cpu.h"
#include "law/cpu/synth.h"

#define CASES_MAX 16
#define DUMP_STEPS 3

struct options {
    struct ic_law_cpu_opts pack;
    unsigned d, b, repeat, cases, grid[CASES_MAX], batch[CASES_MAX];
    bool ops;
    const char *dump, *precision;
};

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Of all threads of this process: on a busy machine, with one thread, this is what a step costs. */
static double cpu_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static void print_ops(const struct ic_law_exec *exec, unsigned batch, unsigned steps)
{
    struct ic_law_cpu_phase ph[64];
    const size_t n = ic_law_cpu_phases(exec, ph, 64);
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)ph[i].ns;
    for (size_t i = 0; i < n; i++) {
        const double us = (double)ph[i].ns / 1e3 / steps;
        printf("    %-10s %-34s %9.1f us %5.1f%%", ph[i].kind, ph[i].label, us,
               100 * (double)ph[i].ns / sum);
        if (ph[i].flops > 0)
            printf("  %7.1f GFLOP/s", ph[i].flops * batch / us / 1e3);
        printf("\n");
    }
}

static void write_file(const char *folder, const char *name, const void *p, size_t bytes)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(p, 1, bytes, f) != bytes || fclose(f) != 0) {
        perror(path);
        exit(1);
    }
}

/* Weights as one float32 stream in state_dict order; psi before and after DUMP_STEPS steps. */
static void dump(const struct options *o, const struct ic_law *law, struct ic_law_packed *packed)
{
    const unsigned grid = 64;
    struct ic_law_plan *plan;
    struct ic_law_exec *exec;
    struct ic_err err = {0};
    float *all = calloc(law->weight_bytes, 1);
    float *psi = calloc(ic_law_psi_bytes(law, grid, grid), 1);
    if (!all || !psi ||
        ic_law_plan_open(law, grid, grid, 1, ic_law_cpu_tensor_bytes, &plan, &err) != IC_OK ||
        ic_law_backend_cpu.open(packed, plan, &exec, &err) != IC_OK) {
        fprintf(stderr, "dump: %s\n", err.msg);
        exit(1);
    }
    size_t n = 0;
    for (size_t i = 0; i < law->weight_count; i++) {
        memcpy(all + n, law->weights[i].data, law->weights[i].count * sizeof(float));
        n += law->weights[i].count;
    }
    write_file(o->dump, "weights.f32", all, n * sizeof(float));
    synth_psi(psi, grid * grid, law->d, 7);
    write_file(o->dump, "psi_0.f32", psi, ic_law_psi_bytes(law, grid, grid));
    for (int i = 0; i < DUMP_STEPS; i++)
        ic_law_backend_cpu.step(exec, &(struct ic_law_io){.psi = psi, .gamma = law->gamma}, 1);
    write_file(o->dump, "psi_end.f32", psi, ic_law_psi_bytes(law, grid, grid));
    ic_law_backend_cpu.close(&exec);
    ic_law_plan_close(&plan);
    free(all);
    free(psi);
}

static void run_case(const struct options *o, const struct ic_law *law, const struct ic_law_packed *packed,
                     unsigned grid, unsigned batch, double peak)
{
    struct ic_law_plan *plan;
    struct ic_law_exec *exec;
    struct ic_err err = {0};
    const size_t bytes = ic_law_psi_bytes(law, grid, grid);
    if (ic_law_plan_open(law, grid, grid, batch, ic_law_cpu_tensor_bytes, &plan, &err) != IC_OK ||
        ic_law_backend_cpu.open(packed, plan, &exec, &err) != IC_OK) {
        fprintf(stderr, "%s\n", err.msg);
        exit(1);
    }
    struct ic_law_io *io = calloc(batch, sizeof *io);
    double *ms = calloc(o->repeat, sizeof *ms), *cpu = calloc(o->repeat, sizeof *cpu);
    if (!io || !ms || !cpu)
        exit(1);
    for (unsigned i = 0; i < batch; i++) {
        io[i] = (struct ic_law_io){.psi = aligned_alloc(64, (bytes + 63) / 64 * 64), .gamma = law->gamma};
        synth_psi(io[i].psi, (size_t)grid * grid, law->d, i + 1);
    }
    for (int i = 0; i < 2; i++)
        ic_law_backend_cpu.step(exec, io, batch);
    ic_law_cpu_profile(exec, o->ops);
    for (unsigned i = 0; i < o->repeat; i++) {
        const int64_t t = ic_now_ns();
        const double c = cpu_ms();
        ic_law_backend_cpu.step(exec, io, batch);
        cpu[i] = cpu_ms() - c;
        ms[i] = (double)(ic_now_ns() - t) / 1e6;
    }
    qsort(ms, o->repeat, sizeof *ms, by_value);
    qsort(cpu, o->repeat, sizeof *cpu, by_value);
    const double flop = 2.0 * (double)plan->macs * batch, median = ms[o->repeat / 2];
    printf("grid %3u batch %2u  %8.2f ms/step (min %8.2f)  %6.1f GFLOP/s (max %6.1f), %3.0f%% of peak; "
           "%.2f MiB arena and scratch\n",
           grid, batch, median, ms[0], flop / median / 1e6, flop / ms[0] / 1e6,
           100 * flop / median * 1e3 / peak, (double)ic_law_backend_cpu.exec_bytes(exec) / 1048576.0);
    printf("  CPU time %.2f ms/step (min %.2f)\n", cpu[o->repeat / 2], cpu[0]);
    printf("RESULT %u %u %.4f %.4f\n", grid, batch, median, ms[0]);
    if (o->ops)
        print_ops(exec, batch, o->repeat);
    for (unsigned i = 0; i < batch; i++)
        free(io[i].psi);
    free(io);
    free(ms);
    free(cpu);
    ic_law_backend_cpu.close(&exec);
    ic_law_plan_close(&plan);
}

static struct options parse(int argc, char **argv)
{
    struct options o = {.d = 8, .b = 32, .repeat = 11};
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i], *v = i + 1 < argc ? argv[i + 1] : "0";
        if (strcmp(a, "--ops") == 0)
            o.ops = true;
        else if (strcmp(a, "--direct") == 0)
            o.pack.direct = true;
        else if (i++, strcmp(a, "--threads") == 0)
            o.pack.threads = (unsigned)atoi(v);
        else if (strcmp(a, "--isa") == 0)
            o.pack.isa = v;
        else if (strcmp(a, "--micro") == 0)
            o.pack.micro_batch = (unsigned)atoi(v);
        else if (strcmp(a, "--d") == 0)
            o.d = (unsigned)atoi(v);
        else if (strcmp(a, "--b") == 0)
            o.b = (unsigned)atoi(v);
        else if (strcmp(a, "--repeat") == 0)
            o.repeat = (unsigned)atoi(v);
        else if (strcmp(a, "--dump") == 0)
            o.dump = v;
        else if (strcmp(a, "--precision") == 0)
            o.precision = v;
        else if (strcmp(a, "--expand") == 0)
            o.pack.expand_bytes = (size_t)atoll(v);
        else if (strcmp(a, "--case") == 0 && o.cases < CASES_MAX &&
                 sscanf(v, "%u,%u", &o.grid[o.cases], &o.batch[o.cases]) == 2)
            o.cases++;
        else {
            fprintf(stderr, "what is %s? see the top of bench/law_cpu.c\n", a);
            exit(2);
        }
    }
    if (!o.cases) {
        static const unsigned standard[4][2] = {{64, 1}, {64, 16}, {128, 1}, {128, 16}};
        for (; o.cases < 4; o.cases++)
            o.grid[o.cases] = standard[o.cases][0], o.batch[o.cases] = standard[o.cases][1];
    }
    return o;
}

int main(int argc, char **argv)
{
    const struct options o = parse(argc, argv);
    struct ic_law *law = synth_law(IC_LAW_UNET_UNITARY, o.d, o.b, 1);
    struct ic_law_packed *packed;
    struct ic_err err = {0};
    struct ic_law_policy policy;
    if (law && o.precision &&
        (ic_law_policy_parse(o.precision, NULL, &policy, &err) != IC_OK ||
         !synth_requantise(law, &policy))) {
        fprintf(stderr, "%s: %s\n", o.precision, err.msg);
        return 1;
    }
    if (!law || ic_law_cpu_pack(law, &o.pack, &packed, &err) != IC_OK) {
        fprintf(stderr, "%s\n", err.msg);
        return 1;
    }
    const double peak = ic_law_cpu_peak(packed);
    printf("UNET_UNITARY d %u b %u %s, %s, %s; packed weights %.2f MiB; FMA peak %.1f GFLOP/s\n", o.d, o.b,
           o.precision ? o.precision : "fp32", ic_law_cpu_isa(packed),
           o.pack.direct ? "direct" : "Winograd F(4x4,3x3)",
           (double)ic_law_backend_cpu.packed_bytes(packed) / 1048576.0, peak / 1e9);
    if (o.dump)
        dump(&o, law, packed);
    for (unsigned i = 0; i < o.cases; i++)
        run_case(&o, law, packed, o.grid[i], o.batch[i], peak);
    ic_law_backend_cpu.unpack(&packed);
    synth_free(law);
    return 0;
}
