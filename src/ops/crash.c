/* All below `on_crash` runs in a process that is broken: no allocation, no lock that somebody may hold, no
 * stdio.
 *
 * The first thread to crash reports; others that crash meanwhile wait for the end. A second crash of the
 * reporting thread ends the process at once with the first signal's default, and an alarm ends it should
 * the report hang.
 *
 * glibc's backtrace loads libgcc when first called, so it is called once at the start. Frames are named by
 * backtrace_symbols_fd into a pipe made beforehand, whose text then becomes lines of the log. */
#include "ops/crash.h"

#include <elf.h>
#include <execinfo.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/altstack.h"
#include "base/clock.h"
#include "base/log.h"

#define FRAMES_MAX 64
#define REPORT_S 5 /* a report may take */
#define FAULT_MS_MAX 600000
#define BUILD_ID_MAX 20 /* bytes shown */

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED true
#else
#define SANITIZED false
#endif

static const struct {
    int sig;
    const char *name;
} signals[] = {
    {SIGSEGV, "SIGSEGV"}, {SIGBUS, "SIGBUS"}, {SIGFPE, "SIGFPE"}, {SIGILL, "SIGILL"}, {SIGABRT, "SIGABRT"}};
#define N_SIGNALS (sizeof signals / sizeof *signals)

static atomic_int reporter; /* thread id; 0: nobody has crashed */
static int names[2] = {-1, -1};
static char build_id[2 * BUILD_ID_MAX + 1] = "unknown";

/* ---- text without stdio ---- */

struct text {
    char s[512];
    size_t n;
};

static void put(struct text *t, const char *s)
{
    while (*s && t->n < sizeof t->s)
        t->s[t->n++] = *s++;
}

static void put_num(struct text *t, uint64_t v, unsigned base)
{
    char digits[24];
    int n = 0;

    do
        digits[n++] = "0123456789abcdef"[v % base];
    while ((v /= base) && n < (int)sizeof digits);
    while (n && t->n < sizeof t->s)
        t->s[t->n++] = digits[--n];
}

static void say(const struct text *t)
{
    ic_log_crash_line(t->s, t->n);
}

/* ---- the report ---- */

static void say_cause(int sig, const siginfo_t *info)
{
    struct text t = {.n = 0};
    char thread[17] = "";

    prctl(PR_GET_NAME, thread);
    put(&t, "crashed: ");
    for (size_t i = 0; i < N_SIGNALS; i++)
        if (signals[i].sig == sig)
            put(&t, signals[i].name);
    if (info->si_code <= 0 && sig != SIGABRT) {
        put(&t, " sent by process ");
        put_num(&t, (uint64_t)info->si_pid, 10);
    } else if (sig != SIGABRT) {
        put(&t, " at address 0x");
        put_num(&t, (uintptr_t)info->si_addr, 16);
    }
    put(&t, " in thread ");
    put(&t, thread);
    put(&t, "; version " IC_VERSION ", build id ");
    put(&t, build_id);
    say(&t);
}

static void say_frames(void)
{
    void *frames[FRAMES_MAX];
    struct text t;
    char c;
    int n = backtrace(frames, FRAMES_MAX);

    if (names[1] < 0)
        return;
    for (int i = 2; i < n; i++) { /* not this function and the handler */
        backtrace_symbols_fd(&frames[i], 1, names[1]);
        t.n = 0;
        put(&t, "#");
        put_num(&t, (uint64_t)(i - 2), 10);
        put(&t, " ");
        while (read(names[0], &c, 1) == 1 && c != '\n')
            if (t.n < sizeof t.s)
                t.s[t.n++] = c;
        say(&t);
    }
}

static void let_go(int sig)
{
    signal(sig, SIG_DFL);
    raise(sig); /* blocked until the handler returns */
}

static void on_crash(int sig, siginfo_t *info, void *context)
{
    int self = (int)syscall(SYS_gettid), nobody = 0;

    (void)context;
    if (!atomic_compare_exchange_strong(&reporter, &nobody, self)) {
        if (nobody == self) {
            let_go(sig);
            return;
        }
        for (;;)
            pause();
    }
    sigset_t alarms;
    sigemptyset(&alarms);
    sigaddset(&alarms, SIGALRM);
    signal(SIGALRM, SIG_DFL);
    pthread_sigmask(SIG_UNBLOCK, &alarms, NULL);
    alarm(REPORT_S);
    ic_log_crash_begin();
    say_cause(sig, info);
    say_frames();
    alarm(0);
    let_go(sig);
}

/* ---- beforehand ---- */

/* The linker's note of the main program. */
static int find_build_id(struct dl_phdr_info *info, size_t size, void *arg)
{
    (void)size;
    (void)arg;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *p = &info->dlpi_phdr[i];
        const char *at = (const char *)info->dlpi_addr + p->p_vaddr, *end = at + p->p_memsz;
        while (p->p_type == PT_NOTE && (size_t)(end - at) > sizeof(ElfW(Nhdr))) {
            const ElfW(Nhdr) *note = (const void *)at;
            const unsigned char *desc =
                (const unsigned char *)at + sizeof *note + ((note->n_namesz + 3u) & ~3u);
            if (note->n_type == NT_GNU_BUILD_ID && note->n_namesz == 4)
                for (unsigned k = 0; k < note->n_descsz && k < BUILD_ID_MAX; k++)
                    snprintf(build_id + (size_t)(2 * k), 3, "%02x", desc[k]);
            at = (const char *)desc + ((note->n_descsz + 3u) & ~3u);
        }
    }
    return 1; /* the first is the program itself */
}

bool ic_crash_install(void)
{
    struct sigaction sa = {.sa_sigaction = on_crash, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    const char *want = getenv("IC_CRASH_HANDLER");
    void *frame[1];

    if (SANITIZED && !(want && !strcmp(want, "1")))
        return false;
    ic_altstack_here();
    backtrace(frame, 1);
    dl_iterate_phdr(find_build_id, NULL);
    if (names[0] < 0 && pipe2(names, O_CLOEXEC | O_NONBLOCK) != 0)
        names[0] = names[1] = -1;
    sigemptyset(&sa.sa_mask);
    for (size_t i = 0; i < N_SIGNALS; i++)
        sigaddset(&sa.sa_mask, signals[i].sig);
    for (size_t i = 0; i < N_SIGNALS; i++)
        sigaction(signals[i].sig, &sa, NULL);
    return true;
}

/* ---- a fault for tests ---- */

static struct {
    long ms;
    char kind[8];
} fault;

__attribute__((noinline)) static int run_out_of_stack(int pages)
{
    volatile char frame[4096];

    frame[0] = (char)pages;
    return pages ? run_out_of_stack(pages - 1) + frame[0] : 0;
}

static void *fault_main(void *arg)
{
    struct timespec ts = {.tv_sec = fault.ms / 1000, .tv_nsec = fault.ms % 1000 * IC_MS};
    volatile int *nothing = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    (void)arg;
    ic_altstack_here();
    nanosleep(&ts, NULL);
    ic_warn("fault", "IC_FAULT: breaking now (%s)", fault.kind);
    if (!strcmp(fault.kind, "stack"))
        *nothing = run_out_of_stack(1 << 20);
    else if (!strcmp(fault.kind, "abort"))
        abort();
    for (size_t i = 0; i < N_SIGNALS; i++)
        if (strcmp(fault.kind, "segv") != 0 && !strcasecmp(signals[i].name + 3, fault.kind))
            raise(signals[i].sig);
    *nothing = 1;
    return NULL;
}

void ic_crash_arm_fault(void)
{
    const char *v = getenv("IC_FAULT"), *prefix = "crash-after-ms:";
    pthread_t t;
    char *end;

    if (!v || strncmp(v, prefix, strlen(prefix)) != 0)
        return;
    fault.ms = strtol(v + strlen(prefix), &end, 10);
    if (fault.ms < 0 || fault.ms > FAULT_MS_MAX || (*end && *end != ':'))
        return;
    snprintf(fault.kind, sizeof fault.kind, "%s", *end ? end + 1 : "segv");
    if (pthread_create(&t, NULL, fault_main, NULL) == 0) {
        pthread_setname_np(t, "ic-fault");
        pthread_detach(t);
    }
}
