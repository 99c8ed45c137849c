/* The options of `inference-core serve`, each in one row: it yields the field, the flag (--kv-size), the
 * environment variable (IC_KV_SIZE), the entry of the configuration file (kv-size) and the help.
 *
 * Later wins: default, file (--config or IC_CONFIG), environment, command line. */
#ifndef IC_CLI_OPTIONS_H
#define IC_CLI_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/status.h"

/* S(field, flag, default or NULL, unit, help)          text
 * I(field, flag, default, lowest, highest, unit, help) whole number; sizes take K, M, G (powers of 1024),
 * also KiB … */
#define IC_OPTIONS(S, I)                                                                                   \
    S(model, "model", NULL, "FILE", "GGUF model to serve (the first file of a split one)")                 \
    S(lora, "lora", NULL, "FILE[:SCALE],…",                                                                \
      "LoRA adapters (GGUF) over the model, for every request; scale 1 where none is given")               \
    S(draft, "draft", NULL, "FILE",                                                                        \
      "smaller GGUF model of the same vocabulary: guesses ahead, and the model checks, several tokens a "  \
      "tick")                                                                                              \
    S(law, "law", NULL, "PATH,…", "Law M checkpoints (or their folders) to serve, separated by commas")    \
    S(host, "host", "127.0.0.1", "ADDRESS", "address to listen on; 0.0.0.0 or :: for every network")       \
    I(port, "port", 3000, 0, 65535, "", "TCP port for WebSocket and HTTP; 0: any free one")                \
    I(ctx_size, "ctx-size", 0, 0, 1 << 24, "tokens",                                                       \
      "one conversation: prompt and answer; 0: the model's, at most 4096")                                 \
    I(kv_size, "kv-size", 0, 0, 1 << 26, "tokens",                                                         \
      "KV cache of all conversations together; 0: 4 times ctx-size")                                       \
    I(parallel, "parallel", 64, 1, 256, "requests", "decoded at once; the others wait in the queue")       \
    I(batch, "batch", 0, 0, 8192, "tokens", "of one decode at most; at least `parallel`; 0: 512")          \
    S(type_k, "cache-type-k", "f16", "TYPE", "of the KV cache's keys: f16, q8_0 or q4_0")                  \
    S(type_v, "cache-type-v", "f16", "TYPE", "of its values, likewise")                                    \
    I(cache_ram, "cache-ram", 512 << 20, 0, 1LL << 44, "bytes",                                            \
      "of host memory for KV that had to leave the cache; 0: none")                                        \
    S(cache_disk, "cache-disk", NULL, "DIR",                                                               \
      "folder for files of KV that had to leave host memory; none: it is dropped")                         \
    I(cache_disk_max, "cache-disk-max", 4LL << 30, 1 << 20, 1LL << 50, "bytes", "of these files together") \
    S(prefix, "prefix", NULL, "FILE",                                                                      \
      "text that prompts begin with (raw, or as system turn): computed at start and kept")                 \
    I(itl_bound, "itl-bound", 0, 0, 60000, "ms",                                                           \
      "between two tokens of a stream while prompts are read; 0: 3 times the usual")                       \
    I(speculate, "speculate", 0, 0, 1, "",                                                                 \
      "1: where a text repeats itself, what comes next is guessed and checked, several tokens a tick; 0: " \
      "never")                                                                                             \
    I(shift, "context-shift", 0, 0, 1, "",                                                                 \
      "1: a full context drops its middle half and goes on; 0: it ends (length)")                          \
    S(pooling, "pooling", "none", "TYPE",                                                                  \
      "of embeddings (/v1/embeddings): mean, cls or last; none: there are none")                           \
    I(threads, "threads", 0, 0, 512, "threads",                                                            \
      "for compute, no more than there are processors; 0: as many as there are free cores")                \
    S(gpu_layers, "gpu-layers", "auto", "auto|N",                                                          \
      "layers on the GPU: as many as fit, or N (the output counts as one); -1: all")                       \
    I(vram_margin, "vram-margin", 512 << 20, 0, 1LL << 44, "bytes", "of each GPU's memory that stay free") \
    I(vram, "vram", 0, 0, 1LL << 44, "bytes", "of each GPU's memory to use at most; 0: what is free")      \
    S(backends, "backends", NULL, "DIR",                                                                   \
      "folder of ggml's back ends; default: where llama.cpp's libraries lie")                              \
    S(chat_template, "chat-template", NULL, "NAME",                                                        \
      "chat format in place of the model's own, e.g. chatml, llama3")                                      \
    I(law_threads, "law-threads", 0, 0, 256, "threads", "for laws; 0: as many as there are free cores")    \
    S(precision, "precision", NULL, "LIST",                                                                \
      "of laws: fp32, fp16, bf16, nf4, nf4dq or LAW=…; a second one is served as LAW@…")                   \
    S(law_backend, "law-backend", "cpu", "cpu|auto|cuda|…",                                                \
      "what computes laws; auto: a GPU if its plug-in is there")                                           \
    S(law_plugin, "law-plugin", NULL, "FILE",                                                              \
      "of laws on a GPU; default: libic-law-cuda.so beside this program, or installed")                    \
    S(law_policy, "law-policy", NULL, "RULES",                                                             \
      "exceptions to it, LAYER=PRECISION,… (a layer, a block, or all)")                                    \
    S(law_max_batch, "law-max-batch", "16", "auto|N",                                                      \
      "simulations stepped together at most; auto: as many as memory holds")                               \
    I(law_batch_timeout, "law-batch-timeout", 50, 0, 10000, "ms",                                          \
      "a step may wait for others to join its batch")                                                      \
    I(law_memory, "law-memory", 2LL << 30, 1 << 20, 1LL << 44, "bytes",                                    \
      "of host memory, for all simulations' states and plans")                                             \
    I(grid_max, "grid-max", 1024, 1, 4096, "cells", "on a side of a simulation's grid")                    \
    I(sims_max, "simulations", 1024, 1, 65536, "simulations", "in all")                                    \
    I(sims_per_conn, "simulations-per-connection", 16, 1, 1024, "simulations", "of one connection")        \
    I(queue_max, "queue", 256, 1, 1000000, "requests", "that may wait; one more is refused as busy")       \
    I(queue_client, "queue-max-per-client", 0, 0, 1000000, "requests",                                     \
      "of one client that may wait; 0: only the whole counts")                                             \
    I(requests_max, "requests", 64, 1, 4096, "requests", "under way per connection")                       \
    I(sessions_max, "sessions", 8, 1, 100000, "sessions",                                                  \
      "per client, where its key does not say otherwise")                                                  \
    I(connections_max, "connections", 1024, 1, 65536, "sockets", "open at once")                           \
    I(message_max, "message-max", 1 << 20, 1024, 256 << 20, "bytes",                                       \
      "of one WebSocket message or HTTP body")                                                             \
    I(outbox_max, "outbox", 1 << 20, 65536, 256 << 20, "bytes",                                            \
      "kept for a client that reads slowly, before it is closed")                                          \
    I(idle_s, "idle-seconds", 50, 1, 86400, "seconds",                                                     \
      "until a silent client is pinged; twice that: closed")                                               \
    I(request_s, "request-seconds", 15, 1, 3600, "seconds",                                                \
      "a handshake or an HTTP request may take to arrive")                                                 \
    I(drain_s, "drain-seconds", 10, 0, 86400, "seconds",                                                   \
      "running requests may take to finish after SIGTERM or SIGINT")                                       \
    I(stall_s, "stall-seconds", 60, 1, 86400, "seconds",                                                   \
      "a tick may take; then it is told to stop, then its engine is built anew")                           \
    S(state_dump, "state-dump", NULL, "FILE",                                                              \
      "written when an engine stands still for good, before the process ends")                             \
    I(idle_unload, "idle-unload", 900, 0, 31536000, "seconds",                                             \
      "without work, until the model is unloaded; 0: never")                                               \
    I(temp_limit, "temp-limit", 80, 0, 120, "°C",                                                          \
      "of a GPU, from which on the server works more slowly; 0: never")                                    \
    I(temp_critical, "temp-critical", 0, 0, 140, "°C",                                                     \
      "of a GPU, at which it pauses; 0: limit + 10, or what the device says")                              \
    I(cpu_temp_limit, "cpu-temp-limit", 95, 0, 120, "°C",                                                  \
      "of the CPU, likewise (it pauses 10 above); 0: never")                                               \
    S(nvml_library, "nvml-library", NULL, "FILE",                                                          \
      "NVIDIA's libnvidia-ml.so.1, where it is in no usual place")                                         \
    S(sensor_file, "sensor-file", NULL, "FILE",                                                            \
      "for tests: readings from this file, not from the hardware")                                         \
    S(keys, "keys", NULL, "FILE", "clients and their API keys (INI); none: everybody is accepted")         \
    S(tls_cert, "tls-cert", NULL, "FILE", "certificate chain (PEM); with tls-key: TLS only")               \
    S(tls_key, "tls-key", NULL, "FILE", "private key (PEM)")                                               \
    S(origins, "origins", NULL, "LIST",                                                                    \
      "of web pages' origins (https://a.example,…), or *: browsers let these use the server, no others")   \
    S(web_root, "web-root", NULL, "DIR", "folder of static files to serve at /")                           \
    S(log_level, "log-level", "info", "LEVELS",                                                            \
      "error, warn, info, debug or trace; then of modules: info,net=debug")                                \
    S(log_file, "log-file", NULL, "FILE", "for the log, as JSON lines; none: stderr")                      \
    I(log_rotate, "log-rotate-bytes", 64 << 20, 64 << 10, 1LL << 40, "bytes",                              \
      "of a log file, before a new one is begun")                                                          \
    I(log_hours, "log-rotate-hours", 168, 0, 87600, "hours",                                               \
      "until a new log file is begun; 0: only by size")                                                    \
    I(log_total, "log-total-bytes", 512 << 20, 192 << 10, 1LL << 44, "bytes",                              \
      "of all log files, three times log-rotate-bytes at least; the oldest goes")                          \
    S(config, "config", NULL, "FILE", "configuration file (INI): these names, without dashes in front")

#define IC_OPTIONS_MAX 128

struct ic_options {
#define S(field, flag, def, unit, help) const char *field;
#define I(field, flag, def, lo, hi, unit, help) int64_t field;
    IC_OPTIONS(S, I)
#undef S
#undef I
    char *owned[IC_OPTIONS_MAX]; /* strings read from the file, one an option at most; freed by
                                    ic_options_deinit */
    int n_owned;
};

/* argv[0] is skipped. IC_BAD_REQUEST with the option's name otherwise. *help: --help was asked for. */
enum ic_status ic_options_parse(struct ic_options *o, int argc, char **argv, bool *help,
                                struct ic_err *err);
void ic_options_deinit(struct ic_options *o);
void ic_options_help(struct ic_buf *out);

#endif
