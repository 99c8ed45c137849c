/* What a client sees of a text server: speed, gaps, abort, the price of being idle. One measurement a call,
 * printed as `name value` lines for bench/text.sh to collect.
 *
 *   text-bench stream --port P [--sse] [--streams N] [--tokens N] [--sampled] [--prefix WORDS --question
 * WORDS] text-bench abort  --port P [--trials N] [--prefill] [--beside N] text-bench idle   --port P --pid
 * PID [--conns N] [--seconds N]
 *
 * stream: N requests at once, each on its own connection. `tps` is counted over the time in which all N
 * generate, after the last one's first token and before the first one's end: the steady state, as
 * llama.cpp's tools count it; `all_tps` from the first request to the last token. `prefix`: all prompts
 * begin with so many words alike, and what is known of them may be used. abort: a request is aborted at a
 * random moment of a random tick (or of its prefill); `beside`: others go on. idle: what N open connections
 * add to the process's memory, and what it does meanwhile. */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/hist.h"
#include "text_io.h"

#define CONNS_MAX 65536
#define BESIDE_MAX 64
#define WORDS_MAX 100000
/* Counting goes on until it is stopped, at temperature 0 too: no stream ends before its number of tokens.
 */
#define PROMPT "%d, %d, %d,"

struct options {
    int port, pid, streams, tokens, trials, beside, conns, seconds, prefix, question;
    bool sse, sampled, prefill;
};

/* ---- figures ------------------------------------------------------------------------------------ */

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Nearest rank: the smallest value that `q` of all values do not exceed. Sorts. */
static double quantile(double *v, int n, double q)
{
    if (n == 0)
        return 0;
    qsort(v, (size_t)n, sizeof *v, by_value);
    int i = (int)(q * n + 0.999999) - 1;
    return v[i < 0 ? 0 : i >= n ? n - 1 : i];
}

static void print_quantiles(const char *name, double *v, int n)
{
    printf("%s_p50 %.3f\n%s_p99 %.3f\n%s_max %.3f\n", name, quantile(v, n, 0.5), name, quantile(v, n, 0.99),
           name, quantile(v, n, 1));
}

static void *need(void *p)
{
    if (!p)
        text_fail("out of memory");
    return p;
}

/* The counts of one of the server's histograms, the last one is the total. Bounds are those of base/hist.h.
 */
static void read_hist(int port, const char *name, double counts[IC_HIST_N + 1])
{
    char key[128];
    char *all = text_http_get(port, "/metrics");
    int n = snprintf(key, sizeof key, "\n%s_bucket{le=", name);
    const char *p = all;

    for (int i = 0; i <= IC_HIST_N; i++) {
        p = p ? strstr(p, key) : NULL;
        p = p ? strchr(p + n, ' ') : NULL;
        counts[i] = p ? strtod(p, NULL) : 0;
    }
    free(all);
}

/* Upper bound of the bucket that holds the quantile, in ms. */
static double hist_quantile(const double before[IC_HIST_N + 1], const double after[IC_HIST_N + 1], double q)
{
    double total = after[IC_HIST_N] - before[IC_HIST_N];

    for (int i = 0; i < IC_HIST_N; i++)
        if (after[i] - before[i] >= q * total)
            return ic_hist_bounds[i] * 1e3;
    return 1e9;
}

/* The part of all values above a bound. */
static double hist_above(const double before[IC_HIST_N + 1], const double after[IC_HIST_N + 1],
                         double bound_s)
{
    double total = after[IC_HIST_N] - before[IC_HIST_N];

    for (int i = 0; i < IC_HIST_N && total > 0; i++)
        if (ic_hist_bounds[i] >= bound_s)
            return 1 - (after[i] - before[i]) / total;
    return 0;
}

/* ---- stream ------------------------------------------------------------------------------------- */

/* Numbers of three digits: `prefix` of them the same for all, `question` of this one's own. */
static char *shared_prompt(int i, const struct options *o)
{
    struct ic_buf b = {0};

    for (int k = 0; k < o->prefix; k++)
        ic_buf_printf(&b, "%d ", 100 + k * 7919 % 900);
    for (int k = 0; k < o->question; k++)
        ic_buf_printf(&b, "%d ", 100 + (k * 104729 + (i + 1) * 1299709) % 900);
    ic_buf_put(&b, "", 1);
    return need(b.failed ? NULL : b.data);
}

static char *counting_prompt(int i)
{
    struct ic_buf b = {0};

    ic_buf_printf(&b, PROMPT, 10 * i + 1, 10 * i + 2, 10 * i + 3);
    ic_buf_put(&b, "", 1);
    return need(b.failed ? NULL : b.data);
}

/* Tokens a second of one stream between two moments, by its own gaps: a message that comes a microsecond
 * before or after an edge makes no difference. */
static double rate_between(const struct text_stream *s, int64_t from, int64_t until)
{
    int first = 0, last = s->n - 1;

    while (first < last && s->at_ns[first] < from)
        first++;
    while (last > first && s->at_ns[last] > until)
        last--;
    return last > first ? (last - first) * 1e9 / (double)(s->at_ns[last] - s->at_ns[first]) : 0;
}

static void report_streams(const struct text_stream *s, int n, bool steady)
{
    int64_t from = 0, until = INT64_MAX, sent = INT64_MAX, last = 0;
    double server = 0, tps = 0;
    int n_gaps = 0, total = 0;

    for (int i = 0; i < n; i++) {
        if (s[i].n < 2 || !strcmp(s[i].reason, "error"))
            text_fail("a stream broke off");
        from = s[i].at_ns[0] > from ? s[i].at_ns[0] : from;
        until = s[i].at_ns[s[i].n - 1] < until ? s[i].at_ns[s[i].n - 1] : until;
        sent = s[i].sent_ns < sent ? s[i].sent_ns : sent;
        last = s[i].at_ns[s[i].n - 1] > last ? s[i].at_ns[s[i].n - 1] : last;
        server += s[i].server_tps;
        total += s[i].n;
    }
    if (steady && from >= until)
        text_fail("the first stream ended before the last one began: ask for more tokens");
    double *gaps = need(malloc(sizeof *gaps * (size_t)total)),
           *ttft = need(malloc(sizeof *ttft * (size_t)n));
    for (int i = 0; i < n; i++) {
        tps += rate_between(&s[i], from, until);
        ttft[i] = (double)(s[i].at_ns[0] - s[i].sent_ns) / IC_MS;
        for (int k = 1; k < s[i].n; k++)
            gaps[n_gaps++] = (double)(s[i].at_ns[k] - s[i].at_ns[k - 1]) / IC_MS;
    }
    printf("tps %.3f\nserver_tps %.3f\nall_tps %.3f\ntokens %d\n", tps, server,
           total * 1e9 / (double)(last - sent), total);
    print_quantiles("gap_ms", gaps, n_gaps);
    print_quantiles("ttft_ms", ttft, n);
    free(gaps);
    free(ttft);
}

static void run_stream(const struct options *o)
{
    struct text_stream *s = need(calloc((size_t)o->streams, sizeof *s));
    double before[IC_HIST_N + 1], after[IC_HIST_N + 1];
    int left = o->streams;

    for (int i = 0; i < o->streams && !o->sse; i++)
        text_open_ws(&s[i], o->port);
    if (!o->sse)
        read_hist(o->port, "ic_token_write_seconds", before);
    for (int i = 0; i < o->streams; i++) {
        char *prompt = o->prefix ? shared_prompt(i, o) : counting_prompt(i);
        struct text_request r = {prompt, o->tokens, !o->sampled, o->prefix > 0};
        if (o->sse)
            text_open_sse(&s[i], o->port, &r);
        else
            text_send_ws(&s[i], &r, "a");
        free(prompt);
    }
    while (left) {
        text_pump(s, o->streams, -1);
        left = 0;
        for (int i = 0; i < o->streams; i++)
            left += !s[i].end_ns;
    }
    report_streams(s, o->streams, o->prefix == 0);
    if (!o->sse) {
        read_hist(o->port, "ic_token_write_seconds", after);
        printf("write_ms_p50 %g\nwrite_ms_p99 %g\nwrite_ms_max %g\nwrite_late_percent %.2f\n",
               hist_quantile(before, after, 0.5), hist_quantile(before, after, 0.99),
               hist_quantile(before, after, 1), 100 * hist_above(before, after, 1e-3));
    }
    for (int i = 0; i < o->streams; i++)
        text_close(&s[i]);
    free(s);
}

/* ---- abort -------------------------------------------------------------------------------------- */

static void pump_until(struct text_stream *s, int n, int64_t until)
{
    for (int64_t now; (now = ic_now_ns()) < until;)
        text_pump(s, n, until - now);
}

static double uniform(unsigned *state)
{
    return (double)rand_r(state) / ((double)RAND_MAX + 1);
}

static char *long_prompt(int words)
{
    struct ic_buf b = {0};

    for (int i = 0; i < words; i++)
        ic_buf_printf(&b, "%s%d", i ? ", " : "", i % 10);
    ic_buf_put(&b, "", 1);
    return need(b.failed ? NULL : b.data);
}

struct aborts {
    double *silence, *ack, *end; /* ms after the abort left: last token, answer, end */
    double *tick;                /* the last gap before it; prefill: nothing */
    int n, late;                 /* late: trials in which a token came after the abort had been sent */
};

static void abort_now(struct text_stream *s, int n_streams, const char *id)
{
    text_abort_ws(&s[0], id);
    while (!s[0].end_ns)
        text_pump(s, n_streams, -1);
}

/* False: the prefill was over before its time, for the machine has become faster; nothing was measured. */
static bool abort_once(struct text_stream *s, int n_streams, const struct options *o, const char *prompt,
                       double prefill_ms, unsigned *rnd, struct aborts *a)
{
    struct text_request r = {prompt, 4096, true, false};
    char id[32];

    snprintf(id, sizeof id, "t%d", a->n);
    text_reset(&s[0]);
    text_send_ws(&s[0], &r, id);
    if (o->prefill) {
        pump_until(s, n_streams, s[0].sent_ns + (int64_t)((0.1 + 0.7 * uniform(rnd)) * prefill_ms * IC_MS));
    } else {
        int want = 3 + (int)(5 * uniform(rnd));
        while (s[0].n < want)
            text_pump(s, n_streams, -1);
        double gap = (double)(s[0].at_ns[s[0].n - 1] - s[0].at_ns[s[0].n - 2]);
        pump_until(s, n_streams, s[0].at_ns[s[0].n - 1] + (int64_t)(uniform(rnd) * gap));
        a->tick[a->n] = gap / IC_MS;
    }
    if (o->prefill && s[0].n) {
        if (!s[0].end_ns)
            abort_now(s, n_streams, id);
        return false;
    }
    if (s[0].end_ns)
        text_fail("a request ended before it could be aborted");
    abort_now(s, n_streams, id);
    if (strcmp(s[0].reason, "abort") != 0)
        text_fail("an aborted request ended for another reason");
    int64_t last = s[0].n ? s[0].at_ns[s[0].n - 1] : 0;
    a->late += last > s[0].abort_ns;
    a->silence[a->n] = last > s[0].abort_ns ? (double)(last - s[0].abort_ns) / IC_MS : 0;
    a->ack[a->n] = (double)(s[0].ack_ns - s[0].abort_ns) / IC_MS;
    a->end[a->n] = (double)(s[0].end_ns - s[0].abort_ns) / IC_MS;
    a->n++;
    return true;
}

/* How long the long prompt takes to its first token, and how many tokens it has. */
static double time_prefill(struct text_stream *s, int n_streams, const char *prompt)
{
    struct text_request r = {prompt, 1, true, false};

    text_reset(&s[0]);
    text_send_ws(&s[0], &r, "first");
    while (!s[0].end_ns)
        text_pump(s, n_streams, -1);
    printf("prompt_tokens %d\n", s[0].prompt_tokens);
    return (double)(s[0].at_ns[0] - s[0].sent_ns) / IC_MS;
}

static void run_abort(const struct options *o)
{
    struct text_stream s[1 + BESIDE_MAX];
    int n = 1 + o->beside;
    size_t trials = (size_t)o->trials;
    struct aborts a = {need(calloc(trials, sizeof(double))),
                       need(calloc(trials, sizeof(double))),
                       need(calloc(trials, sizeof(double))),
                       need(calloc(trials, sizeof(double))),
                       0,
                       0};
    char prompt[128], *words = o->prefill ? long_prompt(110) : NULL;
    unsigned rnd = 1;
    double prefill_ms = 0;

    for (int i = 0; i < n; i++)
        text_open_ws(&s[i], o->port);
    if (o->prefill)
        prefill_ms = time_prefill(s, 1, words);
    for (int i = 1; i < n; i++) {
        struct text_request r = {prompt, 100000, true, false};
        snprintf(prompt, sizeof prompt, PROMPT, 10 * i + 1, 10 * i + 2, 10 * i + 3);
        text_send_ws(&s[i], &r, "other");
    }
    snprintf(prompt, sizeof prompt, PROMPT, 1, 2, 3);
    for (int i = 0; i < o->trials; i++) {
        for (int k = 1; k < n; k++)
            if (s[k].end_ns) { /* the context is full: once more */
                struct text_request r = {prompt, 100000, true, false};
                text_reset(&s[k]);
                text_send_ws(&s[k], &r, "other");
            }
        if (!abort_once(s, n, o, o->prefill ? words : prompt, prefill_ms, &rnd, &a))
            prefill_ms *= 0.8;
    }
    if (a.n == 0)
        text_fail("no request lived long enough to be aborted");
    print_quantiles("silence_ms", a.silence, a.n);
    print_quantiles("ack_ms", a.ack, a.n);
    print_quantiles("end_ms", a.end, a.n);
    if (!o->prefill)
        print_quantiles("tick_ms", a.tick, a.n);
    else
        printf("prefill_ms %.3f\n", prefill_ms);
    printf("late %d\ntrials %d\n", a.late, a.n);
    for (int i = 0; i < n; i++)
        text_close(&s[i]);
    free(words);
    free(a.silence);
    free(a.ack);
    free(a.end);
    free(a.tick);
}

/* ---- idle --------------------------------------------------------------------------------------- */

static double proc_kib(int pid, const char *key)
{
    char path[64], line[256];
    double v = -1;

    snprintf(path, sizeof path, "/proc/%d/status", pid);
    FILE *f = fopen(path, "re");
    while (f && v < 0 && fgets(line, sizeof line, f))
        if (!strncmp(line, key, strlen(key)))
            v = strtod(line + strlen(key) + 1, NULL);
    if (f)
        fclose(f);
    if (v < 0)
        text_fail("no such process");
    return v;
}

/* Nanoseconds on a CPU and times put on one, of all threads: /proc/PID/stat counts in ticks of 10 ms only.
 */
static void proc_sched(int pid, double *cpu_ns, double *runs)
{
    char path[128];
    struct dirent *d;
    DIR *dir;

    *cpu_ns = *runs = 0;
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    if (!(dir = opendir(path)))
        text_fail("no such process");
    while ((d = readdir(dir))) {
        double ns = 0, waited = 0, n = 0;
        FILE *f;
        snprintf(path, sizeof path, "/proc/%d/task/%.16s/schedstat", pid, d->d_name);
        if (d->d_name[0] == '.' || !(f = fopen(path, "re")))
            continue;
        if (fscanf(f, "%lf %lf %lf", &ns, &waited, &n) == 3) {
            *cpu_ns += ns;
            *runs += n;
        }
        fclose(f);
    }
    closedir(dir);
}

static void watch(const struct options *o, const char *when)
{
    double cpu0, runs0, cpu1, runs1;
    int64_t t0 = ic_now_ns();

    proc_sched(o->pid, &cpu0, &runs0);
    sleep((unsigned)o->seconds);
    proc_sched(o->pid, &cpu1, &runs1);
    double s = (double)(ic_now_ns() - t0) / 1e9;
    printf("cpu_percent_%s %.4f\nwakeups_%s %.2f\n", when, (cpu1 - cpu0) / s / 1e7, when,
           (runs1 - runs0) / s);
}

static void run_idle(const struct options *o)
{
    struct text_stream *s = need(calloc((size_t)o->conns, sizeof *s));
    const struct timespec settle = {1, 0};

    nanosleep(&settle, NULL);
    watch(o, "alone");
    double before = proc_kib(o->pid, "RssAnon");
    for (int i = 0; i < o->conns; i++)
        text_open_ws(&s[i], o->port);
    nanosleep(&settle, NULL);
    double after = proc_kib(o->pid, "RssAnon");
    printf("rss_kib_per_conn %.3f\nrss_mib %.1f\n", (after - before) / o->conns, after / 1024);
    watch(o, "connected");
    for (int i = 0; i < o->conns; i++)
        text_close(&s[i]);
    free(s);
}

/* ------------------------------------------------------------------------------------------------------------
 */

static struct options parse(int argc, char **argv)
{
    struct options o = {.streams = 1, .tokens = 128, .trials = 100, .conns = 1000, .seconds = 20};

    for (int i = 2; i < argc; i++) {
        const char *a = argv[i];
        int *number = !strcmp(a, "--port")       ? &o.port
                      : !strcmp(a, "--pid")      ? &o.pid
                      : !strcmp(a, "--streams")  ? &o.streams
                      : !strcmp(a, "--tokens")   ? &o.tokens
                      : !strcmp(a, "--trials")   ? &o.trials
                      : !strcmp(a, "--beside")   ? &o.beside
                      : !strcmp(a, "--conns")    ? &o.conns
                      : !strcmp(a, "--seconds")  ? &o.seconds
                      : !strcmp(a, "--prefix")   ? &o.prefix
                      : !strcmp(a, "--question") ? &o.question
                                                 : NULL;
        if (!strcmp(a, "--sse"))
            o.sse = true;
        else if (!strcmp(a, "--sampled"))
            o.sampled = true;
        else if (!strcmp(a, "--prefill"))
            o.prefill = true;
        else if (number && i + 1 < argc)
            *number = atoi(argv[++i]);
        else
            text_fail("see the top of bench/text_client.c for how to call it");
    }
    if (o.port <= 0 || o.streams < 1 || o.streams > 256 || o.tokens < 2 || o.trials < 1 || o.beside < 0 ||
        o.beside > BESIDE_MAX || o.prefix < 0 || o.question < 0 || o.prefix + o.question > WORDS_MAX ||
        o.conns < 1 || o.conns > CONNS_MAX)
        text_fail("a number is missing or out of range");
    return o;
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "";
    struct options o = parse(argc, argv);

    if (!strcmp(mode, "stream"))
        run_stream(&o);
    else if (!strcmp(mode, "abort"))
        run_abort(&o);
    else if (!strcmp(mode, "idle"))
        run_idle(&o);
    else
        text_fail("say stream, abort or idle");
    return 0;
}
