/* Reading JSON with jansson, also where memory ends. Any thread. */
#ifndef IC_BASE_JSON_H
#define IC_BASE_JSON_H

#include <jansson.h>

/* As json_loadb. Where memory does not suffice: NULL, and json_error_code(je) is json_error_out_of_memory. */
json_t *ic_json_load(const char *data, size_t len, size_t flags, json_error_t *je);

#endif
