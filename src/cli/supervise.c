/* `inference-core supervise [OPTIONS] -- serve …`: starts the server, starts it again when it ends
 * unbidden, asks for less when it keeps ending, and tells a service manager and a file how it stands. What
 * to do when is ops/restart.h's to say; here are the process, its signals, its datagrams.
 *
 *   starting ──READY=1──► running ──good-seconds──► good (remembered as last good)
 *      ▲  └──ends──┐         │ ends, or silent for watchdog-seconds: SIGABRT, then SIGKILL
 *      └── waiting ◄─────────┘                                exit 0, 2, 4, or a signal of ours: we end
 * alike
 *
 * The child tells us by sd_notify over a socket of ours, of which only its own process is believed; what it
 * says goes on to our manager. One thread, which sleeps in poll until something happens or falls due. The
 * child ends with us (PR_SET_PDEATHSIG). */
#include "cli/cli.h"

#include <errno.h>
#include <jansson.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "cli/options.h"
#include "ops/notify.h"
#include "ops/restart.h"

#define SECOND (1000 * IC_MS)
#define AWAY_NS (500 * IC_MS)       /* a wait that lasted so much too long: we did not run ourselves */
#define ABORT_GRACE_NS (5 * SECOND) /* from SIGABRT, for its backtrace, to SIGKILL */
#define DELAY_MIN_NS (200 * IC_MS)
#define CTX_UNSAID 4096 /* what ctx-size 0 means at most */
#define CTX_MIN 512     /* half of it is no help any more */
#define STEPS_MAX 4
#define WORDS_MAX 6 /* that a step adds to the command line */
#define STATE_FILE "supervise.json"

/* ---- options ---- */

/* S(name, default, lowest, highest, help) */
#define SUPERVISE_OPTIONS(I)                                                                               \
    I(crashes, "crashes", 3, 1, IC_RESTART_CRASHES_MAX, "ends within …")                                   \
    I(within, "within-seconds", 300, 1, 86400, "… so many seconds: ask for less")                          \
    I(good, "good-seconds", 60, 1, 86400, "a run must be ready to count as good")                          \
    I(retry, "retry-seconds", 21600, 0, 2592000,                                                           \
      "of a good run with less, then the wished again; 0: never")                                          \
    I(max_delay, "max-delay-seconds", 30, 1, 3600, "between two starts")                                   \
    I(watchdog, "watchdog-seconds", 30, 0, 86400, "a server may be silent; 0: for ever")

struct settings {
#define I(field, flag, def, lo, hi, help) int64_t field;
    SUPERVISE_OPTIONS(I)
#undef I
    const char *state; /* file; NULL: none */
};

static const struct {
    const char *flag, *help;
    int64_t def, lo, hi;
    size_t at;
} rows[] = {
#define I(field, flag, def, lo, hi, help) {flag, help, def, lo, hi, offsetof(struct settings, field)},
    SUPERVISE_OPTIONS(I)
#undef I
};
#define N_ROWS (sizeof rows / sizeof *rows)

/* What a step of the ladder asks for instead of the wished; 0 and NULL: as wished. */
struct step {
    int64_t ctx, kv;
    const char *layers;
    const char *name;
};

struct supervise {
    struct settings set;
    int argc; /* of serve, argv[0] is "serve" */
    char **argv;
    struct step ladder[STEPS_MAX];
    struct step wished, last_good;
    char good_layers[32]; /* what last_good.layers points to */
    bool have_good;
    struct ic_restart restart;
    struct ic_notify up; /* our manager */
    int signals, inbox;
    struct sockaddr_un address;
    socklen_t address_len;
    pid_t pid;                           /* 0: none, waiting */
    int64_t start_ns, beat_ns, abort_ns; /* beat 0: not ready yet; abort: SIGABRT was sent */
    bool stopping, ever_ready;
    char ended[80], said[300]; /* how the last run ended; the child's STATUS */
    uint64_t ends;
};

static int usage(const char *text)
{
    return ic_cli_fail(IC_EXIT_USAGE, text);
}

static void help(void)
{
    puts("usage: inference-core supervise [OPTIONS] -- serve …\n\noptions (--name=N or --name N):");
    for (size_t i = 0; i < N_ROWS; i++)
        printf("  --%-22s %s (default %lld)\n", rows[i].flag, rows[i].help, (long long)rows[i].def);
    puts("  --state FILE             how it stands, as JSON (default: " STATE_FILE
         " in $STATE_DIRECTORY, if set)");
}

static bool set_number(struct settings *s, const char *flag, size_t len, const char *value)
{
    char *end;

    for (size_t i = 0; i < N_ROWS; i++) {
        if (strlen(rows[i].flag) != len || strncmp(rows[i].flag, flag, len) != 0)
            continue;
        errno = 0;
        long long v = strtoll(value, &end, 10);
        if (errno || end == value || *end || v < rows[i].lo || v > rows[i].hi)
            return false;
        *(int64_t *)((char *)s + rows[i].at) = v;
        return true;
    }
    return false;
}

/* Up to the "--". IC_EXIT_OK, or an exit code after a message; *shown: help was asked for. */
static int parse(struct supervise *s, int argc, char **argv, bool *shown)
{
    char text[160];
    int i;

    for (size_t k = 0; k < N_ROWS; k++)
        *(int64_t *)((char *)&s->set + rows[k].at) = rows[k].def;
    for (i = 1; i < argc && strcmp(argv[i], "--") != 0; i++) {
        const char *a = argv[i], *eq = strchr(a, '='), *value;
        size_t len = eq ? (size_t)(eq - a) : strlen(a);
        if (!strcmp(a, "--help") || !strcmp(a, "-h")) {
            help();
            *shown = true;
            return IC_EXIT_OK;
        }
        value = eq ? eq + 1 : i + 1 < argc ? argv[++i] : NULL;
        if (value && len == 7 && !strncmp(a, "--state", 7)) {
            s->set.state = value;
        } else if (!value || len < 3 || strncmp(a, "--", 2) != 0 ||
                   !set_number(&s->set, a + 2, len - 2, value)) {
            snprintf(text, sizeof text, "supervise: bad option or value: %.60s (see supervise --help)", a);
            return usage(text);
        }
    }
    s->argc = argc - i - 1;
    s->argv = argv + i + 1;
    if (s->argc < 1 || strcmp(s->argv[0], "serve") != 0)
        return usage("supervise: what to run stands behind --, and begins with serve");
    return IC_EXIT_OK;
}

/* ---- the ladder ---- */

static int64_t half(int64_t v, int64_t min)
{
    return v / 2 > min ? v / 2 : min;
}

static bool same(const struct step *a, const struct step *b)
{
    return a->ctx == b->ctx && a->kv == b->kv && !strcmp(a->layers, b->layers);
}

/* Wished; the last good one where that is another; half the context; that without a GPU. */
static int build_ladder(struct supervise *s)
{
    int n = 0;
    struct step less = {.ctx = half(s->wished.ctx ? s->wished.ctx : CTX_UNSAID, CTX_MIN),
                        .kv = s->wished.kv ? half(s->wished.kv, CTX_MIN) : 0,
                        .name = "half the context"};

    s->ladder[n++] = (struct step){.name = "as wished"};
    if (s->have_good && !same(&s->last_good, &s->wished)) {
        s->ladder[n] = s->last_good;
        s->ladder[n++].name = "as it was good last";
    }
    s->ladder[n++] = less;
    less.layers = "0";
    less.name = "half the context, CPU only";
    s->ladder[n++] = less;
    IC_ASSERT(n <= STEPS_MAX);
    return n;
}

/* The values of the step that runs now, in full. */
static struct step in_force(const struct supervise *s)
{
    struct step now = s->ladder[s->restart.step];

    if (!now.ctx)
        now.ctx = s->wished.ctx;
    if (!now.kv)
        now.kv = s->wished.kv;
    if (!now.layers)
        now.layers = s->wished.layers;
    return now;
}

static int read_wishes(struct supervise *s)
{
    static char layers[sizeof s->good_layers];
    struct ic_options o;
    struct ic_err err = {0};
    bool asks_help;
    enum ic_status st = ic_options_parse(&o, s->argc, s->argv, &asks_help, &err);

    if (st == IC_OK) {
        snprintf(layers, sizeof layers, "%s", o.gpu_layers ? o.gpu_layers : "auto");
        s->wished = (struct step){.ctx = o.ctx_size, .kv = o.kv_size, .layers = layers};
    }
    ic_options_deinit(&o);
    if (st != IC_OK)
        return ic_cli_fail_for(&err, IC_EXIT_USAGE);
    return asks_help ? usage("supervise: serve --help answers by itself") : IC_EXIT_OK;
}

/* ---- the state file ---- */

static void read_state(struct supervise *s)
{
    json_error_t e;
    json_t *root = s->set.state ? json_load_file(s->set.state, JSON_REJECT_DUPLICATES, &e) : NULL;
    const json_t *good = json_object_get(root, "last_good");
    const char *layers = json_string_value(json_object_get(good, "gpu_layers"));
    int64_t ctx = json_integer_value(json_object_get(good, "ctx_size"));
    int64_t kv = json_integer_value(json_object_get(good, "kv_size"));

    if (layers && ctx >= 0 && kv >= 0 && strlen(layers) < sizeof s->good_layers) {
        snprintf(s->good_layers, sizeof s->good_layers, "%s", layers);
        s->last_good = (struct step){.ctx = ctx, .kv = kv, .layers = s->good_layers};
        s->have_good = true;
    }
    json_decref(root);
}

static json_t *step_json(const struct step *p)
{
    return json_pack("{s:I,s:I,s:s}", "ctx_size", (json_int_t)p->ctx, "kv_size", (json_int_t)p->kv,
                     "gpu_layers", p->layers);
}

/* Whole or not at all: written beside it and renamed. */
static void write_state(struct supervise *s, const char *state)
{
    char beside[4096];
    struct step now = in_force(s);

    if (!s->set.state || snprintf(beside, sizeof beside, "%s.new", s->set.state) >= (int)sizeof beside)
        return;
    json_t *root = json_pack("{s:s,s:i,s:i,s:s,s:o,s:I,s:s,s:s,s:f}", "state", state, "pid", (int)s->pid,
                             "step", s->restart.step, "configuration", s->ladder[s->restart.step].name,
                             "in_force", step_json(&now), "restarts", (json_int_t)s->ends, "last_end",
                             s->ended, "said", s->said, "time", ic_wall_s());
    if (root && s->have_good)
        json_object_set_new(root, "last_good", step_json(&s->last_good));
    if (!root || json_dump_file(root, beside, JSON_INDENT(2)) != 0 || rename(beside, s->set.state) != 0) {
        ic_warn("supervise", "%s cannot be written: %s", s->set.state, strerror(errno));
        unlink(beside);
    }
    json_decref(root);
}

/* How it stands, to our manager and into the file. */
static void tell(struct supervise *s, const char *state)
{
    const char *name = s->ladder[s->restart.step].name;

    if (!s->stopping)
        ic_notify_status(&s->up, "%s%s%s%s%s; %llu restarts", s->pid ? s->said : state,
                         s->restart.step ? "; " : "", s->restart.step ? name : "",
                         *s->ended ? "; last ended by " : "", s->ended, (unsigned long long)s->ends);
    write_state(s, state);
}

/* ---- the child ---- */

static _Noreturn void become_server(struct supervise *s, pid_t parent)
{
    char name[sizeof s->address.sun_path + 1], ctx[24], kv[24], usec[24];
    const struct step *step = &s->ladder[s->restart.step];
    char **argv = calloc((size_t)s->argc + WORDS_MAX + 2, sizeof *argv);
    sigset_t none;
    int n = 0;

    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) /* it has gone before it could be tied to us */
        _exit(IC_EXIT_FAILED);
    setpgid(0,
            0); /* Ctrl-C reaches us alone, and through us the server: two signals would end it at once */
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    snprintf(name, sizeof name, "@%.*s", (int)(s->address_len - offsetof(struct sockaddr_un, sun_path) - 1),
             s->address.sun_path + 1);
    setenv("NOTIFY_SOCKET", name, 1);
    unsetenv("WATCHDOG_PID");
    unsetenv("WATCHDOG_USEC");
    snprintf(usec, sizeof usec, "%lld", (long long)(s->set.watchdog * 1000000));
    if (s->set.watchdog)
        setenv("WATCHDOG_USEC", usec, 1);
    if (!argv)
        _exit(IC_EXIT_MEMORY);
    argv[n++] = (char *)"inference-core";
    for (int i = 0; i < s->argc; i++)
        argv[n++] = s->argv[i];
    snprintf(ctx, sizeof ctx, "%lld", (long long)step->ctx);
    snprintf(kv, sizeof kv, "%lld", (long long)step->kv);
    if (step->ctx)
        argv[n++] = (char *)"--ctx-size", argv[n++] = ctx;
    if (step->kv)
        argv[n++] = (char *)"--kv-size", argv[n++] = kv;
    if (step->layers)
        argv[n++] = (char *)"--gpu-layers", argv[n++] = (char *)step->layers;
    execv("/proc/self/exe", argv);
    _exit(127);
}

static void start(struct supervise *s)
{
    pid_t pid, self = getpid();

    s->beat_ns = s->abort_ns = 0;
    snprintf(s->said, sizeof s->said, "starting");
    fflush(NULL);
    if ((pid = fork()) == 0)
        become_server(s, self);
    if (pid < 0) { /* as an end: it is tried again, later and later */
        snprintf(s->ended, sizeof s->ended, "no process: %s", strerror(errno));
        s->start_ns = ic_now_ns() + ic_restart_ended(&s->restart, ic_now_ns());
        return;
    }
    s->pid = pid;
    ic_info("supervise", "started process %d, %s", (int)s->pid, s->ladder[s->restart.step].name);
    tell(s, "starting");
}

/* The child has ended. Returns an exit code for us, or -1: it will be started again. */
static int ended(struct supervise *s, int status)
{
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), before = s->restart.step;
    bool wanted = s->restart.returning;

    s->pid = 0;
    if (WIFEXITED(status))
        snprintf(s->ended, sizeof s->ended, "exit code %d", code);
    else
        snprintf(s->ended, sizeof s->ended, "signal %d (%s)%s", WTERMSIG(status),
                 strsignal(WTERMSIG(status)), s->abort_ns ? ", because it was silent" : "");
    if (s->stopping || (!wanted && WIFEXITED(status) && ic_restart_final(code, s->ever_ready))) {
        ic_log(code ? IC_LOG_ERROR : IC_LOG_INFO, "supervise",
               "the server ended by %s; so does its supervisor", s->ended);
        write_state(s, "ended");
        return code;
    }
    s->ends++;
    if (WIFEXITED(status) && (code == IC_EXIT_FILE || code == IC_EXIT_PORT))
        s->restart.n_ends = 0; /* to ask for less brings back neither */
    int64_t delay = ic_restart_ended(&s->restart, ic_now_ns());
    s->start_ns = ic_now_ns() + delay;
    ic_log(wanted ? IC_LOG_INFO : IC_LOG_ERROR, "supervise",
           "the server ended by %s; starting it again in %.1f s", s->ended, (double)delay * 1e-9);
    if (s->restart.step != before)
        ic_warn("supervise",
                wanted ? "back to the wished configuration: %s"
                       : "it keeps ending; from now on with less: %s",
                s->ladder[s->restart.step].name);
    tell(s, "waiting to start again");
    return -1;
}

/* ---- what comes in ---- */

static void on_line(struct supervise *s, const char *line)
{
    int64_t now = ic_now_ns();

    if (!strcmp(line, "READY=1")) {
        s->ever_ready = true;
        s->beat_ns = now;
        ic_restart_ready(&s->restart, now);
        ic_notify_ready(&s->up, "%s", s->said);
        tell(s, "running");
    } else if (!strcmp(line, "WATCHDOG=1")) {
        if (s->beat_ns)
            s->beat_ns = now;
    } else if (!strcmp(line, "RELOADING=1")) {
        ic_notify_reloading(&s->up);
    } else if (!strncmp(line, "STATUS=", 7)) {
        snprintf(s->said, sizeof s->said, "%.*s", (int)sizeof s->said - 1, line + 7);
        tell(s, s->beat_ns ? "running" : "starting");
    }
}

/* One datagram; only those of the child itself count. False: there is none. */
static bool take_datagram(struct supervise *s)
{
    char text[IC_NOTIFY_MAX + 1];
    union {
        char bytes[CMSG_SPACE(sizeof(struct ucred))];
        struct cmsghdr align;
    } control;
    struct iovec iov = {text, sizeof text - 1};
    struct msghdr msg = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    struct ucred who = {.pid = -1};
    ssize_t n = recvmsg(s->inbox, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

    if (n < 0)
        return errno == EINTR;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_CREDENTIALS)
            memcpy(&who, CMSG_DATA(c), sizeof who);
    if (!s->pid || who.pid != s->pid)
        return true;
    text[n] = 0;
    /* READY and its STATUS come together; the status first, so that ready tells it */
    for (int ready = 0; ready < 2; ready++)
        for (const char *p = text; *p;) {
            size_t len = strcspn(p, "\n");
            char line[IC_NOTIFY_MAX + 1];
            memcpy(line, p, len);
            line[len] = 0;
            if ((strcmp(line, "READY=1") == 0) == (ready == 1))
                on_line(s, line);
            p += len + (p[len] == '\n');
        }
    return true;
}

/* Our own signals. Returns an exit code, or -1. */
static int take_signal(struct supervise *s)
{
    struct signalfd_siginfo info;
    int status;

    if (read(s->signals, &info, sizeof info) != sizeof info)
        return -1;
    int sig = (int)info.ssi_signo;
    if (sig == SIGCHLD) {
        while (take_datagram(s)) { /* what it said before it ended */
        }
        pid_t pid = waitpid(-1, &status, WNOHANG);
        return pid > 0 && pid == s->pid ? ended(s, status) : -1;
    }
    if (sig != SIGHUP) {
        if (!s->stopping)
            ic_notify_stopping(&s->up);
        s->stopping = true;
    }
    if (s->pid)
        kill(s->pid, sig);
    else if (s->stopping)
        return IC_EXIT_OK;
    return -1;
}

/* ---- time ---- */

static int64_t soonest(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t due(const struct supervise *s)
{
    int64_t at = soonest(ic_notify_due_ns(&s->up), ic_restart_due(&s->restart));

    if (!s->pid)
        return soonest(at, s->start_ns);
    if (s->abort_ns)
        return soonest(at, s->abort_ns + ABORT_GRACE_NS);
    return s->beat_ns && s->set.watchdog && !s->stopping
               ? soonest(at, s->beat_ns + s->set.watchdog * SECOND)
               : at;
}

static void remember_good(struct supervise *s)
{
    s->last_good = in_force(s);
    snprintf(s->good_layers, sizeof s->good_layers, "%s", s->last_good.layers);
    s->last_good.layers = s->good_layers;
    s->have_good = true;
    ic_info("supervise", "a good run, %s", s->ladder[s->restart.step].name);
    tell(s, "running");
}

static void on_time(struct supervise *s, int64_t now)
{
    ic_notify_tick(&s->up, now, NULL, NULL);
    if (!s->pid) {
        if (now >= s->start_ns)
            start(s);
        return;
    }
    switch (ic_restart_tick(&s->restart, now)) {
    case IC_RESTART_GOOD: remember_good(s); break;
    case IC_RESTART_RETURN:
        ic_info("supervise", "it has run well for long; the wished configuration is tried again");
        kill(s->pid, SIGTERM);
        break;
    case IC_RESTART_NOTHING: break;
    }
    if (s->abort_ns) {
        if (now >= s->abort_ns + ABORT_GRACE_NS)
            kill(s->pid, SIGKILL);
    } else if (s->beat_ns && s->set.watchdog && !s->stopping &&
               now >= s->beat_ns + s->set.watchdog * SECOND) {
        ic_error("supervise", "the server has been silent for %lld s: aborting it",
                 (long long)s->set.watchdog);
        s->abort_ns = now;
        kill(s->pid, SIGABRT);
    }
}

static int run(struct supervise *s)
{
    struct pollfd p[] = {{.fd = s->signals, .events = POLLIN}, {.fd = s->inbox, .events = POLLIN}};
    int code = -1;

    start(s);
    while (code < 0) {
        int64_t at = due(s), ms = at == INT64_MAX ? -1 : (at - ic_now_ns()) / IC_MS + 1;
        poll(p, 2, ms < -1 ? 0 : ms > 3600000 ? 3600000 : (int)ms);
        /* the time of all that follows: if we are stopped on the way, the next round is the late one */
        const int64_t now = ic_now_ns();
        if (s->beat_ns && now - at > AWAY_NS)
            s->beat_ns = now; /* nor may the server have run: it is heard first */
        take_datagram(s);
        if (p[0].revents)
            code = take_signal(s);
        if (code < 0)
            on_time(s, now);
    }
    return code;
}

/* ---- the beginning ---- */

static enum ic_status open_inbox(struct supervise *s, struct ic_err *err)
{
    int on = 1;

    s->address = (struct sockaddr_un){.sun_family = AF_UNIX};
    s->address_len = sizeof s->address;
    s->inbox = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    /* no name given: the kernel finds an abstract one */
    if (s->inbox < 0 || setsockopt(s->inbox, SOL_SOCKET, SO_PASSCRED, &on, sizeof on) != 0 ||
        bind(s->inbox, (struct sockaddr *)&s->address, sizeof(sa_family_t)) != 0 ||
        getsockname(s->inbox, (struct sockaddr *)&s->address, &s->address_len) != 0)
        return ic_fail(err, IC_INTERNAL, "no socket for the server to tell how it is: %s", strerror(errno));
    return IC_OK;
}

static enum ic_status open_signals(struct supervise *s, struct ic_err *err)
{
    static const int which[] = {SIGCHLD, SIGTERM, SIGINT, SIGHUP};
    sigset_t set;

    sigemptyset(&set);
    for (size_t i = 0; i < sizeof which / sizeof *which; i++)
        sigaddset(&set, which[i]);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    s->signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return s->signals >= 0 ? IC_OK
                           : ic_fail(err, IC_INTERNAL, "no descriptor for signals: %s", strerror(errno));
}

int ic_cli_supervise(int argc, char **argv)
{
    static char state[4096];
    struct supervise s = {.signals = -1, .inbox = -1, .up = {.fd = -1}};
    const char *dir = getenv("STATE_DIRECTORY");
    struct ic_err err = {0};
    bool shown = false;
    int code = parse(&s, argc, argv, &shown);

    if (code != IC_EXIT_OK || shown || (code = read_wishes(&s)) != IC_EXIT_OK)
        return code;
    if (!s.set.state && dir && *dir) {
        snprintf(state, sizeof state, "%.*s/%s", (int)strcspn(dir, ":"), dir, STATE_FILE);
        s.set.state = state;
    }
    struct stat there; /* a FIFO would hold us up, and root would rename over a device's node */
    if (s.set.state && stat(s.set.state, &there) == 0 && !S_ISREG(there.st_mode))
        return usage("supervise: the state file is not a regular file");
    read_state(&s);
    struct ic_restart_config cfg = {.crashes = (int)s.set.crashes,
                                    .steps = build_ladder(&s),
                                    .within_ns = s.set.within * SECOND,
                                    .good_ns = s.set.good * SECOND,
                                    .retry_ns = s.set.retry * SECOND,
                                    .delay_min_ns = DELAY_MIN_NS,
                                    .delay_max_ns = s.set.max_delay * SECOND};
    ic_restart_init(&s.restart, &cfg);
    if (ic_notify_open(&s.up, &err) != IC_OK)
        ic_warn("supervise", "the service manager is not told how we are: %s", err.msg);
    if (open_inbox(&s, &err) != IC_OK || open_signals(&s, &err) != IC_OK)
        code = ic_cli_fail(IC_EXIT_FAILED, err.msg);
    else
        code = run(&s);
    ic_notify_close(&s.up);
    if (s.inbox >= 0)
        close(s.inbox);
    if (s.signals >= 0)
        close(s.signals);
    return code;
}
