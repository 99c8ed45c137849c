#include "hw/cpu.h"

#include <math.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"

#define CPUS_MAX CPU_SETSIZE
#define HURRY_NICE (-10)
#define SLICE_NS (100000)           /* the kernel's least; others have 3 ms */
#define WATCH_MIN_NS (100 * IC_MS)  /* /proc/stat counts in steps of 10 ms */
#define WATCH_MAX_NS (1000 * IC_MS) /* what was true longer ago says nothing about now */

static double cgroup_quota(void)
{
    double quota, period;
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "re");
    int got = f ? fscanf(f, "%lf %lf", &quota, &period) : 0;

    if (f)
        fclose(f);
    return got == 2 && period > 0 ? quota / period : (double)CPUS_MAX;
}

/* The first hyper-thread of the core that `cpu` belongs to; the cpu itself where /sys does not say. */
static int core_of(size_t cpu)
{
    char path[96];
    int first = (int)cpu;

    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%zu/topology/thread_siblings_list", cpu);
    FILE *f = fopen(path, "re");
    if (f) {
        if (fscanf(f, "%d", &first) != 1)
            first = (int)cpu;
        fclose(f);
    }
    return first;
}

/* Marks in `mine` the cpus we may run on and returns how many physical cores they are. */
static int count_cores(cpu_set_t *mine)
{
    cpu_set_t cores;
    int n = 0;

    CPU_ZERO(&cores);
    if (sched_getaffinity(0, sizeof *mine, mine) != 0) {
        CPU_ZERO(mine);
        CPU_SET(0, mine);
    }
    for (size_t i = 0; i < CPUS_MAX; i++)
        if (CPU_ISSET(i, mine)) {
            size_t core = (size_t)core_of(i);
            if (core >= CPUS_MAX)
                core = i;
            n += !CPU_ISSET(core, &cores);
            CPU_SET(core, &cores);
        }
    return n > 0 ? n : 1;
}

int ic_cpu_cores(void)
{
    cpu_set_t mine;
    int n = count_cores(&mine);
    double quota = cgroup_quota();

    if (quota < n)
        n = (int)quota;
    return n > 0 ? n : 1;
}

int ic_cpu_processors(void)
{
    cpu_set_t mine;

    count_cores(&mine);
    const int n = CPU_COUNT(&mine);
    const double quota = cgroup_quota();
    return quota >= n ? n : quota > 1 ? (int)ceil(quota) : 1;
}

/* Sums over our cpus the jiffies not idle (user, nice, system, irq, softirq, steal) and all of them. */
static int read_busy(const cpu_set_t *mine, double *busy, double *all)
{
    char line[512];
    FILE *f = fopen("/proc/stat", "re");

    if (!f)
        return -1;
    *busy = *all = 0;
    while (fgets(line, sizeof line, f)) {
        unsigned cpu;
        int used;
        unsigned long long v[8] = {0};
        if (sscanf(line, "cpu%u%n", &cpu, &used) != 1 || cpu >= CPUS_MAX || !CPU_ISSET(cpu, mine))
            continue;
        if (sscanf(line + used, "%llu %llu %llu %llu %llu %llu %llu %llu", &v[0], &v[1], &v[2], &v[3],
                   &v[4], &v[5], &v[6], &v[7]) < 5)
            continue;
        double idle = (double)(v[3] + v[4]), sum = 0;
        for (int i = 0; i < 8; i++)
            sum += (double)v[i];
        *all += sum;
        *busy += sum - idle;
    }
    fclose(f);
    return *all > 0 ? 0 : -1;
}

int ic_cpu_cores_free(int sample_ms)
{
    cpu_set_t mine;
    double busy0, all0, busy1, all1;
    int cores = ic_cpu_cores();

    count_cores(&mine);
    if (read_busy(&mine, &busy0, &all0) != 0)
        return cores;
    struct timespec ts = {sample_ms / 1000, (sample_ms % 1000) * 1000000L};
    nanosleep(&ts, NULL);
    if (read_busy(&mine, &busy1, &all1) != 0 || all1 <= all0)
        return cores;
    /* Rounded: a core that others use for less than half of the time is still worth a thread. */
    int taken = (int)((busy1 - busy0) / (all1 - all0) * CPU_COUNT(&mine) + 0.5);
    return cores - taken > 0 ? cores - taken : 1;
}

/* A short slice means an early deadline in the kernel's EEVDF scheduler. With two compute threads on two
 * cores the time from sampling to the socket's write fell from 2.5 to 0.25 ms (p99); a nice value of -10
 * alone did not help. */
void ic_cpu_hurry(void)
{
    struct { /* glibc has no such call before 2.41 */
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } a = {.size = sizeof a};
    const uint64_t reset_on_fork = 1;

    if (syscall(SYS_sched_getattr, 0, &a, sizeof a, 0) != 0 || a.policy != SCHED_OTHER)
        return;
    a.size = sizeof a;
    a.flags |= reset_on_fork;
    a.runtime = SLICE_NS; /* an older kernel has no use for it */
    int32_t nice = a.nice;
    if (a.nice > HURRY_NICE)
        a.nice = HURRY_NICE;
    if (syscall(SYS_sched_setattr, 0, &a, 0) != 0) {
        a.nice = nice;
        syscall(SYS_sched_setattr, 0, &a, 0);
    }
}

int64_t ic_cpu_self_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

double ic_cpu_others(struct ic_cpu_watch *w)
{
    cpu_set_t mine;
    struct ic_cpu_watch now = {.at_ns = ic_now_ns(), .self_ns = ic_cpu_self_ns()};
    int64_t wall = now.at_ns - w->at_ns;

    if (w->at_ns && wall < WATCH_MIN_NS)
        return -1;
    count_cores(&mine);
    if (read_busy(&mine, &now.busy, &now.all) != 0)
        return -1;
    double busy = now.all > w->all ? (now.busy - w->busy) / (now.all - w->all) * CPU_COUNT(&mine) : 0;
    double self = wall > 0 ? (double)(now.self_ns - w->self_ns) / (double)wall : 0;
    bool known = w->at_ns && wall <= WATCH_MAX_NS;
    *w = now;
    return !known ? -1 : busy > self ? busy - self : 0;
}
