/* Reading JSON from clients: fields by name with a type and a range, an error that names the field. */
#ifndef IC_PROTO_FIELDS_H
#define IC_PROTO_FIELDS_H

#include <jansson.h>

#include "sched/request.h"

#define IC_JSON_DEPTH_MAX 64 /* nesting of a message */

/* Parses one JSON object. NULL and an error otherwise. The caller decref's it. */
json_t *ic_json_object(const char *data, size_t len, struct ic_err *err);

/* Every getter leaves *out alone and returns IC_OK when the field is absent or null. */
enum ic_status ic_field_num(const json_t *o, const char *key, double lo, double hi, double *out,
                            struct ic_err *err);
enum ic_status ic_field_int(const json_t *o, const char *key, int64_t lo, int64_t hi, int64_t *out,
                            struct ic_err *err);
enum ic_status ic_field_bool(const json_t *o, const char *key, bool *out, struct ic_err *err);
/* Borrowed from o; at most `max` bytes. */
enum ic_status ic_field_str(const json_t *o, const char *key, size_t max, const char **out,
                            struct ic_err *err);

/* `cache_salt`: the key space of cached prefixes, at most IC_SALT_MAX bytes; absent: the common one. */
enum ic_status ic_parse_salt(const json_t *o, struct ic_text_req *req, struct ic_err *err);
/* Sampling parameters (protocol: `params`) over what p holds already. Unknown fields are ignored. */
enum ic_status ic_parse_params(const json_t *o, struct ic_text_params *p, struct ic_err *err);
/* [{role, content}] into req->msgs. Contents may be strings or OpenAI's lists of {type: "text", text}. */
enum ic_status ic_parse_messages(const json_t *list, struct ic_text_req *req, struct ic_err *err);

#endif
