/* Prometheus text exposition (format 0.0.4), written piece by piece into a buffer. Any thread. */
#ifndef IC_OPS_METRICS_H
#define IC_OPS_METRICS_H

#include "base/buf.h"
#include "base/hist.h"
#include "hw/monitor.h"
#include "sched/engine.h"
#include "sched/law_sched.h"
#include "sched/text_sched.h"

/* One metric with HELP and TYPE ("counter", "gauge"). */
void ic_prom_value(struct ic_buf *b, const char *name, const char *type, const char *help, double v);
void ic_prom_hist(struct ic_buf *b, const char *name, const char *help, struct ic_hist *h);

/* The engines' counters; the tables of names stand in metrics.c. */
void ic_prom_text(struct ic_buf *b, struct ic_text_counters *c);
void ic_prom_law(struct ic_buf *b, struct ic_law_counters *c);
/* How the engines are watched and rest; NULL: there is none. */
void ic_prom_engines(struct ic_buf *b, const struct ic_engine_health *text,
                     const struct ic_engine_health *law);
/* GPUs, the CPU's temperature, the thermal governor. */
void ic_prom_hw(struct ic_buf *b, const struct ic_hw_view *v, const struct ic_thermal *t);
/* Lines of the log, and those that are missing in it. */
void ic_prom_log(struct ic_buf *b);
/* The process: resident memory, CPU seconds, open files, threads. */
void ic_prom_process(struct ic_buf *b);

#endif
