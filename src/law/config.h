/* Atheria's experiment file config.json (shared/law-m.md §3.3): the keys that a law is made of, typed.
 *
 * Unknown keys are ignored; a known key of the wrong type is refused by name; an absent one, or null,
 * leaves its field at "unknown". Pure but for reading the file; any thread. */
#ifndef IC_LAW_CONFIG_H
#define IC_LAW_CONFIG_H

#include <stdbool.h>

#include "base/status.h"
#include "law/law.h"

#define IC_LAW_CONFIG_MAX ((size_t)1 << 20) /* bytes of config.json */

struct ic_law_config {
    char name[IC_LAW_NAME_MAX];         /* EXPERIMENT_NAME; "" unknown */
    char arch[64];                      /* MODEL_ARCHITECTURE; "" unknown */
    unsigned d, b;                      /* MODEL_PARAMS.d_state, .hidden_channels, else D_STATE,
                                         * HIDDEN_CHANNELS; 0 unknown */
    double gamma;                       /* GAMMA_DECAY; NaN unknown */
    unsigned grid_training;             /* GRID_SIZE_TRAINING; 0 unknown */
    unsigned steps_training;            /* QCA_STEPS_TRAINING; 0 unknown */
    char initial_mode[IC_LAW_MODE_MAX]; /* INITIAL_STATE_MODE_INFERENCE; "" unknown */
};

/* Codes: NOT_FOUND, BAD_REQUEST, TOO_LARGE, INTERNAL. */
enum ic_status ic_law_config_read(const char *path, struct ic_law_config *out, struct ic_err *err);
/* The same of text in memory; codes: BAD_REQUEST, TOO_LARGE. */
enum ic_status ic_law_config_parse(const char *text, size_t len, struct ic_law_config *out,
                                   struct ic_err *err);

#endif
