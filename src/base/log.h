/* Log lines: level, module, text. Readable on a terminal, one JSON object a line elsewhere.
 * Safe from any thread; a line is one write(2). Never log prompt or answer text above IC_LOG_TRACE. */
#ifndef IC_BASE_LOG_H
#define IC_BASE_LOG_H

#include <stdbool.h>

#include "base/status.h"

enum ic_log_level { IC_LOG_ERROR, IC_LOG_WARN, IC_LOG_INFO, IC_LOG_DEBUG, IC_LOG_TRACE };

/* Lines above `level` are dropped. Default IC_LOG_INFO. */
void ic_log_set_level(enum ic_log_level level);
/* Parses "error", "warn", "info", "debug", "trace". */
enum ic_status ic_log_parse_level(const char *name, enum ic_log_level *level);
enum ic_log_level ic_log_level_now(void);

#define IC_LOG_LINE_MAX 2048 /* bytes; a longer text is cut */

void ic_log(enum ic_log_level level, const char *module, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* Between on and off, what libraries write to stderr by themselves goes nowhere; our lines go where they always go. For
 * calls that would print what a client sent. One thread at a time. */
void ic_log_mute_stderr(bool on);

#define ic_error(module, ...) ic_log(IC_LOG_ERROR, module, __VA_ARGS__)
#define ic_warn(module, ...) ic_log(IC_LOG_WARN, module, __VA_ARGS__)
#define ic_info(module, ...) ic_log(IC_LOG_INFO, module, __VA_ARGS__)
#define ic_debug(module, ...) ic_log(IC_LOG_DEBUG, module, __VA_ARGS__)

#endif
