#include "ops/metrics.h"

#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/log.h"

static void head(struct ic_buf *b, const char *name, const char *type, const char *help)
{
    ic_buf_printf(b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

void ic_prom_value(struct ic_buf *b, const char *name, const char *type, const char *help, double v)
{
    head(b, name, type, help);
    ic_buf_printf(b, "%s %.17g\n", name, v);
}

void ic_prom_hist(struct ic_buf *b, const char *name, const char *help, struct ic_hist *h)
{
    uint64_t n = 0;

    head(b, name, "histogram", help);
    for (int i = 0; i <= IC_HIST_N; i++) {
        n += atomic_load_explicit(&h->bucket[i], memory_order_relaxed);
        if (i < IC_HIST_N)
            ic_buf_printf(b, "%s_bucket{le=\"%g\"} %llu\n", name, ic_hist_bounds[i], (unsigned long long)n);
        else
            ic_buf_printf(b, "%s_bucket{le=\"+Inf\"} %llu\n", name, (unsigned long long)n);
    }
    ic_buf_printf(b, "%s_sum %.9f\n%s_count %llu\n", name, (double)atomic_load(&h->sum_ns) * 1e-9, name,
                  (unsigned long long)n);
}

/* X(field, metric, type, help) */
#define TEXT_METRICS(X)                                                                                    \
    X(running, "ic_text_requests_running", "gauge", "Requests being decoded")                              \
    X(waiting, "ic_text_requests_waiting", "gauge", "Requests in the queue")                               \
    X(sessions, "ic_text_sessions", "gauge", "Conversations that are kept")                                \
    X(kv_used, "ic_text_kv_tokens_used", "gauge", "Tokens held in the KV cache")                           \
    X(requests, "ic_text_requests_total", "counter", "Requests taken")                                     \
    X(refused, "ic_text_requests_refused_total", "counter", "Requests refused by the engine")              \
    X(tokens, "ic_text_tokens_total", "counter", "Tokens generated")                                       \
    X(prompt_tokens, "ic_text_prompt_tokens_total", "counter", "Prompt tokens of admitted requests")       \
    X(cached_tokens, "ic_text_cached_tokens_total", "counter",                                             \
      "Prompt tokens not computed because their KV was there")                                             \
    X(preempted, "ic_text_preemptions_total", "counter",                                                   \
      "Requests put back into the queue, for want of KV cells or for a higher priority")                   \
    X(spill_bytes, "ic_text_kv_spill_bytes", "gauge",                                                      \
      "KV that had to leave the cache, kept in host memory")                                               \
    X(spilled, "ic_text_kv_spilled_tokens_total", "counter", "Tokens whose KV went to host memory")        \
    X(restored, "ic_text_kv_restored_tokens_total", "counter", "Tokens whose KV came back from there")     \
    X(disk_bytes, "ic_text_kv_disk_bytes", "gauge",                                                        \
      "Files of KV that had to leave host memory, those still to be written included")                     \
    X(disk_put, "ic_text_kv_disk_written_tokens_total", "counter",                                         \
      "Tokens whose KV went from host memory to the disk")                                                 \
    X(disk_got, "ic_text_kv_disk_read_tokens_total", "counter", "Tokens whose KV came back from there")    \
    X(disk_lost, "ic_text_kv_disk_lost_tokens_total", "counter",                                           \
      "Tokens whose KV could not be written or read, and was given up")                                    \
    X(drafted, "ic_text_drafted_tokens_total", "counter",                                                  \
      "Tokens guessed and computed beside the next one")                                                   \
    X(accepted, "ic_text_accepted_tokens_total", "counter", "Those of them that were right")               \
    X(ticks, "ic_text_decodes_total", "counter", "Decodes")                                                \
    X(rows, "ic_text_decode_rows_total", "counter", "Tokens decoded, prompts included")

void ic_prom_text(struct ic_buf *b, struct ic_text_counters *c)
{
#define X(field, name, type, help) ic_prom_value(b, name, type, help, (double)atomic_load(&c->field));
    TEXT_METRICS(X)
#undef X
    head(b, "ic_text_requests_ended_total", "counter", "Requests ended, by reason");
    for (int i = 0; i <= IC_END_ERROR; i++)
        ic_buf_printf(b, "ic_text_requests_ended_total{reason=\"%s\"} %llu\n",
                      ic_end_name((enum ic_end_reason)i), (unsigned long long)atomic_load(&c->ended[i]));
    ic_prom_hist(b, "ic_text_ttft_seconds", "From arrival to the first token", &c->ttft);
    ic_prom_hist(b, "ic_text_token_gap_seconds", "Between two tokens of a stream", &c->itl);
    ic_prom_hist(b, "ic_text_queue_seconds", "From arrival to admission", &c->queue);
    ic_prom_hist(b, "ic_text_decode_seconds", "One decode of all requests", &c->tick);
}

#define ENGINE_METRICS(X)                                                                                  \
    X(aborted, "ic_engine_ticks_aborted_total", "counter",                                                 \
      "Ticks that took too long and were told to stop")                                                    \
    X(rebuilt, "ic_engine_rebuilt_total", "counter", "Engines built anew in the process")                  \
    X(unloaded, "ic_engine_unloaded_total", "counter", "Times an idle model was unloaded")                 \
    X(woken, "ic_engine_woken_total", "counter", "Times a model came back")                                \
    X(wake_s, "ic_engine_wake_seconds", "gauge", "Time that the last coming back took")                    \
    X(away, "ic_engine_unloaded", "gauge", "1 while the model is unloaded")

void ic_prom_engines(struct ic_buf *b, const struct ic_engine_health *text,
                     const struct ic_engine_health *law)
{
#define X(field, name, type, help)                                                                         \
    head(b, name, type, help);                                                                             \
    if (text)                                                                                              \
        ic_buf_printf(b, name "{engine=\"text\"} %.9g\n", (double)atomic_load(&text->field));              \
    if (law)                                                                                               \
        ic_buf_printf(b, name "{engine=\"law\"} %.9g\n", (double)atomic_load(&law->field));
    ENGINE_METRICS(X)
#undef X
}

#define LAW_METRICS(X)                                                                                     \
    X(sims, "ic_law_simulations", "gauge", "Simulations")                                                  \
    X(running, "ic_law_simulations_running", "gauge", "Simulations that are being stepped")                \
    X(groups, "ic_law_plans", "gauge", "Plans: a law on a grid")                                           \
    X(state_bytes, "ic_law_state_bytes", "gauge", "Memory of all simulations' states")                     \
    X(shared_bytes, "ic_law_plan_bytes", "gauge", "Host memory of all plans, shared by their simulations") \
    X(created, "ic_law_simulations_created_total", "counter", "Simulations created")                       \
    X(steps, "ic_law_steps_total", "counter", "Steps of all simulations")                                  \
    X(batches, "ic_law_batches_total", "counter", "Batches")                                               \
    X(batched, "ic_law_batched_steps_total", "counter", "Steps that shared their batch with others")       \
    X(frames, "ic_law_frames_total", "counter", "Frames drawn")                                            \
    X(frames_skipped, "ic_law_frames_skipped_total", "counter",                                            \
      "Frames not drawn because the last ones were on their way")                                          \
    X(predicts, "ic_law_predictions_total", "counter", "Predictions")                                      \
    X(refused, "ic_law_commands_refused_total", "counter", "Commands refused by the engine")

void ic_prom_law(struct ic_buf *b, struct ic_law_counters *c)
{
#define X(field, name, type, help) ic_prom_value(b, name, type, help, (double)atomic_load(&c->field));
    LAW_METRICS(X)
#undef X
    ic_prom_hist(b, "ic_law_batch_seconds", "Compute of one batch", &c->batch);
    ic_prom_hist(b, "ic_law_wait_seconds", "From readiness to the start of the batch", &c->wait);
}

void ic_prom_log(struct ic_buf *b)
{
    struct ic_log_stats s = ic_log_stats();

    ic_prom_value(b, "ic_log_lines_total", "counter", "Lines logged", (double)s.lines);
    head(b, "ic_log_lines_missing_total", "counter",
         "Lines that were not written: the queue was full, or the disk");
    ic_buf_printf(b, "ic_log_lines_missing_total{reason=\"queue\"} %llu\n", (unsigned long long)s.dropped);
    ic_buf_printf(b, "ic_log_lines_missing_total{reason=\"disk\"} %llu\n", (unsigned long long)s.lost);
}

static int count_dir(const char *path)
{
    int n = 0;
    DIR *d = opendir(path);
    if (!d)
        return 0;
    while (readdir(d))
        n++;
    closedir(d);
    return n > 2 ? n - 2 : 0;
}

void ic_prom_process(struct ic_buf *b)
{
    struct rusage ru;
    long size = 0, resident = 0;
    FILE *f = fopen("/proc/self/statm", "re");

    if (f) {
        if (fscanf(f, "%ld %ld", &size, &resident) != 2)
            resident = 0;
        fclose(f);
    }
    getrusage(RUSAGE_SELF, &ru);
    ic_prom_value(b, "process_resident_memory_bytes", "gauge", "Resident memory",
                  (double)resident * (double)sysconf(_SC_PAGESIZE));
    ic_prom_value(b, "process_cpu_seconds_total", "counter", "CPU time, user and system",
                  (double)ru.ru_utime.tv_sec + (double)ru.ru_stime.tv_sec +
                      1e-6 * (double)(ru.ru_utime.tv_usec + ru.ru_stime.tv_usec));
    ic_prom_value(b, "process_open_fds", "gauge", "Open file descriptors", count_dir("/proc/self/fd"));
    ic_prom_value(b, "process_threads", "gauge", "Threads", count_dir("/proc/self/task"));
}
