/* `inference-core serve`: wires the parts together and lives until a signal.
 *
 *   main thread   the loop: network, protocol (blocked signals)
 *   ic-text       the text engine, and the compute threads it starts
 *   ic-law        the Law M engine, likewise
 *   ic-log        writes the log
 *   ic-signal     waits for signals; wakes the loop
 *
 *   starting ──model loaded──► serving ──SIGTERM/SIGINT──► draining ──nothing left, or time is up──►
 * closing ──► exit 0 └──model broken──► exit 4                      a second signal: exit at once SIGHUP
 * reopens the log file.
 */
#include "cli/cli.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "cli/options.h"
#include "hw/monitor.h"
#include "hw/nvml.h"
#include "hw/cpu.h"
#include "hw/cuda_context.h"
#include "hw/ledger.h"
#include "law/plugin.h"
#include "net/net.h"
#include "ops/crash.h"
#include "ops/logfile.h"
#include "ops/notify.h"
#include "proto/server.h"

#define CANCEL_GRACE_MS 2000      /* after the drain time: for the engine to end what is left */
#define FRAME_HEAD_MAX 8192       /* bytes of a frame's JSON header at most, metrics included */
#define CLOSE_GRACE_MS 3000       /* for clients to answer the close frame */
#define LAST_LINES_MS 500         /* for the log, when a second signal ends all at once */
#define STATE_DUMP_MAX (16 << 20) /* bytes */
#define HOUR_NS (3600 * 1000 * IC_MS)

enum phase { PHASE_SERVING, PHASE_DRAINING, PHASE_CANCELLING, PHASE_CLOSING };

struct serve {
    struct ic_options opt;
    struct ic_keys *keys;
    struct ic_events events;
    struct ic_text_engine *text; /* NULL: no --model */
    struct ic_law_engine *law;   /* NULL: no --law */
    struct ic_turn turn;
    struct ic_ledger *ledger; /* of GPU memory; for both engines */
    struct ic_monitor *monitor;
    struct ic_server *server;
    struct ic_net *net;
    struct ic_notify notify;    /* the service manager, where there is one */
    struct ic_logfile *logfile; /* NULL: the log goes to stderr */
    atomic_bool hung_up;        /* SIGHUP came, and the manager does not know yet */
    pthread_t signals;
    atomic_int signal; /* the first one received */
    enum phase phase;
    int64_t phase_ns; /* since when */
    bool announced, failed;
    int exit_code;
};

static void wake_loop(void *arg)
{
    struct serve *s = arg;
    ic_net_wake(s->net);
}

static bool take_turn(void *arg)
{
    struct serve *s = arg;
    return ic_net_turn(s->net);
}

static void *signal_main(void *arg)
{
    struct serve *s = arg;
    sigset_t set;
    int sig;

    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    for (;;) {
        if (sigwait(&set, &sig) != 0)
            continue;
        if (sig == SIGHUP) {
            ic_log_reopen();
            atomic_store(&s->hung_up, true);
        } else if (atomic_exchange(&s->signal, sig) != 0) {
            ic_log_flush(LAST_LINES_MS);
            _exit(128 + sig);
        }
        ic_net_wake(s->net);
    }
    return NULL;
}

static void enter(struct serve *s, enum phase p)
{
    s->phase = p;
    s->phase_ns = ic_now_ns();
}

static void finish(struct serve *s, int code)
{
    ic_notify_stopping(&s->notify);
    s->exit_code = code;
    ic_net_stop(s->net);
}

static int exit_for(enum ic_status st)
{
    return st == IC_OOM                                 ? IC_EXIT_MEMORY
           : st == IC_NOT_FOUND || st == IC_BAD_REQUEST ? IC_EXIT_FILE
                                                        : IC_EXIT_FAILED;
}

/* Before there is a network it is the files of TLS that are not found, and what is refused is the address. */
static int start_failed(const struct serve *s, enum ic_status st)
{
    return st == IC_OOM                  ? IC_EXIT_MEMORY
           : s->net || st == IC_INTERNAL ? IC_EXIT_FAILED
           : st == IC_NOT_FOUND          ? IC_EXIT_FILE
                                         : IC_EXIT_PORT;
}

/* The one line of a failure, on stderr and in the log's file. */
static int tell_failure(struct serve *s, int code, const char *text)
{
    ic_log_flush(LAST_LINES_MS); /* what led to it comes first */
    if (s->logfile)
        ic_error("serve", "%s", text);
    return ic_cli_fail((enum ic_exit)code, text);
}

static void fail(struct serve *s, const struct ic_err *err)
{
    if (!s->failed) /* once, though wakes may follow */
        finish(s, tell_failure(s, exit_for(err->code), err->msg));
    s->failed = true;
}

static void tell_ready(struct serve *s)
{
    ic_notify_ready(&s->notify, "serving on %s:%d", s->opt.host, ic_net_port(s->net));
}

/* False: it is not there, or not whole; the log says so. */
static bool dump(struct serve *s)
{
    struct ic_buf b = {.max = STATE_DUMP_MAX};

    ic_server_dump(s->server, &b);
    FILE *f = fopen(s->opt.state_dump, "w");
    /* what does not fit into the stream's buffer is written at once, and fclose knows nothing of how that went */
    bool whole = f && fwrite(b.data, 1, b.len, f) == b.len;
    int why = b.failed ? ENOMEM : errno;
    if (f && fclose(f) != 0 && whole) {
        whole = false;
        why = errno;
    }
    if (!whole || b.failed)
        ic_error("serve", "state dump %s: %s", s->opt.state_dump, strerror(why));
    return whole && !b.failed;
}

/* An engine stands still, and there is no way to go on in this process. Whoever supervises it starts
 * another. */
static void lost(struct serve *s, const char *engine)
{
    const bool dumped = s->opt.state_dump && dump(s);

    ic_error("serve", "the %s engine stands still for good: this process ends%s%s", engine,
             dumped ? "; its state is in " : "", dumped ? s->opt.state_dump : "");
    ic_log_flush(LAST_LINES_MS);
    _exit(IC_EXIT_STALLED); /* nothing can be joined or freed any more */
}

static void watch(struct serve *s)
{
    int64_t now = ic_now_ns(), stall = s->opt.stall_s * 1000 * IC_MS;

    if (s->text && ic_text_engine_watch(s->text, now, stall) == IC_WATCH_LOST)
        lost(s, "text");
    if (s->law && ic_law_engine_watch(s->law, now, stall) == IC_WATCH_LOST)
        lost(s, "Law M");
}

static void advance(void *arg);

static void on_tick(void *arg)
{
    watch(arg);
    advance(arg);
}

/* Moves through the phases; called after every wake and tick. */
static void advance(void *arg)
{
    struct serve *s = arg;
    int64_t for_ms = (ic_now_ns() - s->phase_ns) / IC_MS;

    ic_notify_tick(&s->notify, ic_now_ns(), NULL, NULL);
    if (atomic_load(&s->hung_up) && atomic_exchange(&s->hung_up, false) && s->phase == PHASE_SERVING &&
        s->announced) {
        ic_notify_reloading(&s->notify);
        ic_info("serve", "the log was reopened");
        tell_ready(s);
    }
    switch (s->phase) {
    case PHASE_SERVING:
        if (s->text && ic_text_engine_state(s->text) == IC_ENGINE_FAILED)
            fail(s, ic_text_engine_error(s->text));
        else if (s->law && ic_law_engine_state(s->law) == IC_ENGINE_FAILED)
            fail(s, ic_law_engine_error(s->law));
        else if (!s->announced && (!s->text || ic_text_engine_state(s->text) == IC_ENGINE_READY) &&
                 (!s->law || ic_law_engine_state(s->law) == IC_ENGINE_READY)) {
            s->announced = true;
            ic_info("serve", "ready on ws%s://%s:%d", s->opt.tls_cert ? "s" : "", s->opt.host,
                    ic_net_port(s->net));
            tell_ready(s);
        }
        if (atomic_load(&s->signal)) {
            ic_info("serve", "%s: draining for at most %lld s", strsignal(atomic_load(&s->signal)),
                    (long long)s->opt.drain_s);
            ic_notify_stopping(&s->notify);
            ic_net_stop_accepting(s->net);
            if (s->text)
                ic_text_engine_drain(s->text);
            ic_server_drain(s->server);
            enter(s, PHASE_DRAINING);
        }
        break;
    case PHASE_DRAINING:
        if (ic_server_active(s->server) > 0 && for_ms >= s->opt.drain_s * 1000) {
            ic_warn("serve", "%d requests did not finish in time", ic_server_active(s->server));
            ic_server_cancel_all(s->server);
            enter(s, PHASE_CANCELLING);
            for_ms = 0;
        }
        /* fall through */
    case PHASE_CANCELLING:
        if (ic_server_active(s->server) == 0 ||
            (s->phase == PHASE_CANCELLING && for_ms >= CANCEL_GRACE_MS)) {
            ic_net_close_all(s->net, 1001, "server is shutting down");
            enter(s, PHASE_CLOSING);
        }
        break;
    case PHASE_CLOSING:
        if (ic_net_peers(s->net) == 0 || for_ms >= CLOSE_GRACE_MS)
            finish(s, IC_EXIT_OK);
        break;
    }
}

/* On the monitor's thread: a driver may take seconds to start, or hang. */
static unsigned add_nvml(void *arg, struct ic_sensor_source *sources, unsigned n)
{
    struct ic_err why = {0};

    if (ic_nvml_source(&sources[n], arg, &why) == IC_OK)
        return n + 1;
    ic_debug("hw", "no NVIDIA GPU is watched: %s", why.msg); /* which is normal */
    return n;
}

static enum ic_status add_sources(const struct ic_options *o, struct ic_monitor_config *cfg,
                                  struct ic_err *err)
{
    cfg->n_sources = 1;
    if (!o->sensor_file) {
        cfg->add = add_nvml;
        cfg->add_arg = (void *)o->nvml_library;
        return ic_sensors_sysfs(&cfg->sources[0], "/sys", err);
    }
    ic_warn("hw", "temperatures come from %s, not from the hardware", o->sensor_file);
    return ic_sensors_file(&cfg->sources[0], o->sensor_file, err);
}

static enum ic_status start_monitor(struct serve *s, struct ic_err *err)
{
    struct ic_monitor_config cfg = {
        .governor = {.gpu_limit = (double)s->opt.temp_limit,
                     .gpu_critical = (double)s->opt.temp_critical,
                     .cpu_limit = (double)s->opt.cpu_temp_limit},
        .changed = wake_loop,
        .changed_arg = s,
    };
    enum ic_status st = add_sources(&s->opt, &cfg, err);

    if (st == IC_OK && (st = ic_monitor_open(&s->monitor, &cfg, err)) == IC_OK)
        ic_server_set_monitor(s->server, s->monitor);
    return st;
}

/* For the planner, which takes the lower of two opinions. */
static bool gpu_free(void *arg, const char *pci, uint64_t *bytes)
{
    return ic_nvml_free_memory(((struct serve *)arg)->opt.nvml_library, pci, bytes);
}

/* The model has left: so does the context, which would keep the card awake. */
static void model_gone(void *arg)
{
    int n = ic_cuda_release();

    (void)arg;
    if (n > 0)
        ic_info("text", "the contexts on %d GPUs were given back", n);
}

/* --law-max-batch: auto, or a number. */
static enum ic_status law_batch(const struct ic_options *o, struct ic_law_engine_config *law,
                                struct ic_err *err)
{
    char *end;

    law->batch_auto = o->law_max_batch && !strcmp(o->law_max_batch, "auto");
    long n = law->batch_auto    ? IC_LAW_BATCH_MAX
             : o->law_max_batch ? strtol(o->law_max_batch, &end, 10)
                                : 16;
    if (!law->batch_auto && o->law_max_batch &&
        (end == o->law_max_batch || *end || n < 1 || n > IC_LAW_BATCH_MAX))
        return ic_fail(err, IC_BAD_REQUEST, "--law-max-batch takes auto, or 1 to %d, not \"%.60s\"",
                       IC_LAW_BATCH_MAX, o->law_max_batch);
    law->limits.max_batch = (unsigned)n;
    return ic_law_engine_check(o->precision, o->law_policy, err);
}

static enum ic_status start(struct serve *s, struct ic_err *err)
{
    const struct ic_options *o = &s->opt;
    struct ic_net_config net = {
        .host = o->host,
        .port = (int)o->port,
        .tls_cert = o->tls_cert,
        .tls_key = o->tls_key,
        .web_root = o->web_root,
        .origins = o->origins,
        .connections_max = (unsigned)o->connections_max,
        .message_max = (size_t)o->message_max,
        .body_max = (size_t)o->message_max,
        .outbox_max = (size_t)o->outbox_max,
        .idle_s = (unsigned)o->idle_s,
        .request_s = (unsigned)o->request_s,
    };
    struct ic_server_config server = {
        .connections_max = (unsigned)o->connections_max,
        .message_max = (size_t)o->message_max,
        .outbox_max = (size_t)o->outbox_max,
        .requests_max = (int)o->requests_max,
        .sessions_max = (int)o->sessions_max,
        .sims_max = (int)o->sims_per_conn,
        .grid_max = (unsigned)o->grid_max,
        .queue_max = (int)o->queue_max,
        .stall_s = (int)o->stall_s,
        .keys = s->keys,
    };
    struct ic_text_engine_config text = {
        .queue_max = (int32_t)o->queue_max,
        .turn = o->law ? &s->turn : NULL,
        .idle_unload_ns = o->idle_unload * 1000 * IC_MS,
        .prefix = o->prefix,
        .cache_disk = o->cache_disk,
        .cache_disk_max = (size_t)o->cache_disk_max,
        .policy = {.itl_bound_ns = (double)o->itl_bound * IC_MS,
                   .queue_per_client = (int32_t)o->queue_client,
                   .cache_ram = (size_t)o->cache_ram,
                   .no_speculation = !o->speculate,
                   .shift = o->shift != 0},
    };
    struct ic_law_engine_config law = {
        .laws = o->law,
        .backend = o->law_backend,
        .threads = (int)o->law_threads,
        .precision = o->precision,
        .policy = o->law_policy,
        .limits = {.max_batch = 0, /* below */
                   .batch_timeout_ns = o->law_batch_timeout * IC_MS,
                   .grid_max = (unsigned)o->grid_max,
                   .sims_max = (unsigned)o->sims_max,
                   .memory_max = (size_t)o->law_memory,
                   .frame_max = (size_t)o->outbox_max - FRAME_HEAD_MAX},
        .turn = o->model ? &s->turn : NULL,
        .vram_margin = (uint64_t)o->vram_margin,
        .vram_max = (uint64_t)o->vram,
    };
    struct ic_server_hooks hooks = {s, advance, on_tick};
    enum ic_status st;

    if ((st = law_batch(o, &law, err)) != IC_OK || (st = ic_ledger_open(&s->ledger, err)) != IC_OK ||
        (st = ic_cli_text_config(o, &text.model, err)) != IC_OK)
        return st;
    text.model.ledger = law.ledger = s->ledger;
    text.model.gpu_free = gpu_free;
    text.model.gpu_free_arg = s;
    if (!o->law || !strcmp(law.backend, "cpu") ||
        !strcmp(law.backend, "ref")) /* else another's work is on the card */
        text.model_gone = model_gone;
    /* The server exists before the network, which calls it, and after the engine, which it calls; the
     * engine's thread starts last, when there is a loop to wake. */
    if ((st = ic_server_open(&s->server, &server, &s->events, err)) != IC_OK ||
        (st = ic_net_open(&s->net, &net, &ic_server_app, s->server, err)) != IC_OK ||
        (st = start_monitor(s, err)) != IC_OK)
        return st;
    text.governor = law.governor = ic_monitor_governor(s->monitor);
    if ((o->model && (st = ic_text_engine_start(&s->text, &text, &s->events, err)) != IC_OK) ||
        (o->law && (st = ic_law_engine_start(&s->law, &law, &s->events, err)) != IC_OK))
        return st;
    ic_server_set_engines(s->server, s->text, s->law);
    ic_server_set_hooks(s->server, &hooks);
    if (pthread_create(&s->signals, NULL, signal_main, s) != 0)
        return ic_fail(err, IC_OOM, "no thread for signals");
    pthread_setname_np(s->signals, "ic-signal");
    return IC_OK;
}

static void block_signals(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); /* a log file at the limit: write tells it too */
}

/* From here on lines are written by a thread of their own. */
static enum ic_status start_log(struct serve *s, struct ic_err *err)
{
    struct ic_logfile_config cfg = {.path = s->opt.log_file,
                                    .rotate_bytes = s->opt.log_rotate,
                                    .rotate_ns = s->opt.log_hours * HOUR_NS,
                                    .total_bytes = s->opt.log_total};
    struct ic_log_sink sink;
    enum ic_status st;

    if (!s->opt.log_file)
        return ic_log_start(NULL, err);
    if ((st = ic_logfile_open(&s->logfile, &cfg, err)) != IC_OK)
        return st;
    sink = ic_logfile_sink(s->logfile);
    return ic_log_start(&sink, err);
}

static void stop_log(struct serve *s)
{
    bool ended = ic_log_stop();
    struct ic_log_stats n = ic_log_stats();

    if (ended)
        ic_logfile_close(&s->logfile); /* else the thread is still in there */
    if (n.dropped || n.lost)
        ic_warn("log", "%llu lines found the queue full, %llu could not be written",
                (unsigned long long)n.dropped, (unsigned long long)n.lost);
}

static bool is_loopback(const char *host)
{
    return !strncmp(host, "127.", 4) || !strcmp(host, "::1") || !strcmp(host, "localhost");
}

static int check_options(const struct ic_options *o)
{
    struct ic_text_config text;
    struct ic_law_engine_config law;
    struct ic_err err;

    if (law_batch(o, &law, &err) != IC_OK)
        return ic_cli_fail(IC_EXIT_USAGE, err.msg);
    if (ic_log_set_levels(o->log_level ? o->log_level : "info", &err) != IC_OK) {
        char text_of[IC_ERR_MSG_MAX + 20];
        snprintf(text_of, sizeof text_of, "--log-level: %s", err.msg);
        return ic_cli_fail(IC_EXIT_USAGE, text_of);
    }
    if (o->log_total / 3 < o->log_rotate)
        return ic_cli_fail(IC_EXIT_USAGE,
                           "--log-total-bytes must be at least three times --log-rotate-bytes");
    if (!o->model && !o->law)
        return ic_cli_fail(IC_EXIT_USAGE, "serve needs --model FILE.gguf, or --law PATH, or both");
    if (ic_cli_text_config(o, &text, &err) != IC_OK)
        return ic_cli_fail(IC_EXIT_USAGE, err.msg);
    if (!o->tls_cert != !o->tls_key)
        return ic_cli_fail(IC_EXIT_USAGE, "--tls-cert and --tls-key go together");
    if (ic_net_check_origins(o->origins, &err) != IC_OK)
        return ic_cli_fail(IC_EXIT_USAGE, err.msg);
    if (o->cache_disk && o->cache_ram == 0)
        return ic_cli_fail(IC_EXIT_USAGE,
                           "--cache-disk takes what leaves --cache-ram, which is 0: there must be some");
    if (o->temp_critical && o->temp_critical <= o->temp_limit)
        return ic_cli_fail(IC_EXIT_USAGE, "--temp-critical must be above --temp-limit");
    if (!o->host)
        return ic_cli_fail(IC_EXIT_USAGE, "--host must not be empty");
    if (o->law && o->law_plugin) { /* who names one wants that one: there is no going on without it */
        ic_law_plugin_path(o->law_plugin);
        if (!ic_law_plugin_load(&err))
            return ic_cli_fail(IC_EXIT_FILE, err.msg);
    }
    if (o->model && access(o->model, R_OK) != 0) {
        ic_fail(&err, IC_NOT_FOUND, "model %s: %s", o->model, strerror(errno));
        return ic_cli_fail(IC_EXIT_FILE, err.msg);
    }
    if (o->draft && !o->model)
        return ic_cli_fail(IC_EXIT_USAGE, "--draft guesses for a model: it needs --model");
    if (o->draft && access(o->draft, R_OK) != 0) {
        ic_fail(&err, IC_NOT_FOUND, "draft model %s: %s", o->draft, strerror(errno));
        return ic_cli_fail(IC_EXIT_FILE, err.msg);
    }
    return IC_EXIT_OK;
}

int ic_cli_serve(int argc, char **argv)
{
    struct serve s = {0};
    struct ic_err err = {0};
    bool help;
    int code = IC_EXIT_OK;
    enum ic_status st = ic_options_parse(&s.opt, argc, argv, &help, &err);

    if (st != IC_OK)
        code = ic_cli_fail_for(&err, IC_EXIT_USAGE);
    else if (help)
        code = ic_cli_main(2, (char *[]){"inference-core", "help", NULL});
    else
        code = check_options(&s.opt);
    if (st != IC_OK || help || code != IC_EXIT_OK)
        goto out;
    if (s.opt.keys && ic_keys_load(&s.keys, s.opt.keys, &err) != IC_OK) {
        code = ic_cli_fail_for(&err, IC_EXIT_USAGE);
        goto out;
    }
    block_signals();
    if ((st = start_log(&s, &err)) != IC_OK) {
        code = ic_cli_fail_for(&err, IC_EXIT_FILE);
        goto out;
    }
    ic_crash_install();
    ic_crash_arm_fault();
    if (!s.keys && !is_loopback(s.opt.host))
        ic_warn("serve", "listening on %s without --keys: whoever reaches this port may use it",
                s.opt.host);
    if (ic_notify_open(&s.notify, &err) != IC_OK)
        ic_warn("serve", "the service manager is not told how we are: %s", err.msg);
    ic_events_init(&s.events, wake_loop, &s);
    s.events.turn = take_turn;
    ic_turn_init(&s.turn);
    st = start(&s, &err);
    if (st != IC_OK) {
        code = tell_failure(&s, start_failed(&s, st), err.msg);
    } else {
        advance(&s);
        ic_cpu_hurry(); /* this thread is the loop from here on; what computes has threads of its own */
        ic_net_run(s.net);
        code = s.exit_code;
    }
    ic_events_close(&s.events);
    if (s.signals) {
        pthread_cancel(s.signals);
        pthread_join(s.signals, NULL);
    }
    bool left_behind = (s.text && atomic_load(&ic_text_engine_health(s.text)->rebuilt)) ||
                       (s.law && atomic_load(&ic_law_engine_health(s.law)->rebuilt));
    ic_text_engine_stop(&s.text); /* they wake the network to the last */
    ic_law_engine_stop(&s.law);
    if (s.server)
        ic_server_set_monitor(s.server, NULL);
    ic_monitor_close(&s.monitor); /* engines ask its governor, and it wakes the network too */
    if (s.server)
        ic_server_set_engines(s.server, NULL, NULL);
    ic_net_close(&s.net);
    ic_server_close(&s.server);
    ic_events_deinit(&s.events);
    ic_turn_deinit(&s.turn);
    ic_ledger_close(&s.ledger);
    ic_keys_free(&s.keys);
    ic_notify_close(&s.notify);
    if (code == IC_EXIT_OK)
        ic_info("serve", "bye");
    stop_log(&s);
    if (left_behind) /* a thread may still be in code whose static data exit() would take down */
        _exit(code);
out:
    ic_options_deinit(&s.opt);
    return code;
}
