#include "proto/fields.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/json.h"
#include "proto/server.h"
#include "text/schema.h"

static size_t depth_of(const char *s, size_t len)
{
    size_t depth = 0, most = 0;
    bool in_string = false;

    for (size_t i = 0; i < len; i++) {
        char c = s[i];
        if (in_string) {
            if (c == '\\')
                i++;
            else if (c == '"')
                in_string = false;
        } else if (c == '"') {
            in_string = true;
        } else if (c == '{' || c == '[') {
            most = ++depth > most ? depth : most;
        } else if ((c == '}' || c == ']') && depth) {
            depth--;
        }
    }
    return most;
}

json_t *ic_json_object(const char *data, size_t len, struct ic_err *err)
{
    json_error_t je;

    if (depth_of(data, len) > IC_JSON_DEPTH_MAX) {
        ic_fail(err, IC_BAD_REQUEST, "the JSON nests deeper than %d levels", IC_JSON_DEPTH_MAX);
        return NULL;
    }
    /* jansson takes one behind a number for the end of its own buffer, and reads on */
    if (memchr(data, 0, len)) {
        ic_fail(err, IC_BAD_REQUEST, "not valid JSON: there is a NUL in it");
        return NULL;
    }
    json_t *o = ic_json_load(data, len, 0, &je);
    /* A whole number past 64 bits is JSON all the same, and how JavaScript writes 1e20. */
    if (!o && json_error_code(&je) == json_error_numeric_overflow)
        o = ic_json_load(data, len, JSON_DECODE_INT_AS_REAL, &je);
    if (!o && json_error_code(&je) == json_error_out_of_memory) {
        ic_fail(err, IC_OOM, "no memory to read the message");
        return NULL;
    }
    if (!o && json_error_code(&je) == json_error_numeric_overflow) {
        ic_fail(err, IC_BAD_REQUEST, "a number is too large (line %d, column %d)", je.line, je.column);
        return NULL;
    }
    if (!o && (json_error_code(&je) == json_error_null_character ||
               json_error_code(&je) == json_error_null_byte_in_key)) {
        ic_fail(err, IC_BAD_REQUEST, "\\u0000 is not taken in a string (line %d, column %d)", je.line,
                je.column);
        return NULL;
    }
    if (!o) {
        ic_fail(err, IC_BAD_REQUEST, "not valid JSON (line %d, column %d)", je.line, je.column);
        return NULL;
    }
    if (!json_is_object(o)) {
        json_decref(o);
        ic_fail(err, IC_BAD_REQUEST, "a message must be a JSON object");
        return NULL;
    }
    return o;
}

static bool absent(const json_t *v)
{
    return !v || json_is_null(v);
}

enum ic_status ic_field_num(const json_t *o, const char *key, double lo, double hi, double *out,
                            struct ic_err *err)
{
    const json_t *v = json_object_get(o, key);

    if (absent(v))
        return IC_OK;
    if (!json_is_number(v))
        return ic_fail(err, IC_BAD_REQUEST, "%s must be a number", key);
    double d = json_number_value(v);
    if (!isfinite(d) || d < lo || d > hi)
        return ic_fail(err, IC_BAD_REQUEST, "%s must be %g to %g", key, lo, hi);
    *out = d;
    return IC_OK;
}

enum ic_status ic_field_int(const json_t *o, const char *key, int64_t lo, int64_t hi, int64_t *out,
                            struct ic_err *err)
{
    const json_t *v = json_object_get(o, key);

    if (absent(v))
        return IC_OK;
    double d = json_is_number(v) ? json_number_value(v) : NAN;
    if (!json_is_number(v) || (json_is_real(v) && d != floor(d)))
        return ic_fail(err, IC_BAD_REQUEST, "%s must be a whole number", key);
    if (json_is_real(v) && fabs(d) > 9e15)
        return ic_fail(err, IC_BAD_REQUEST, "%s is too large", key);
    int64_t i = json_is_integer(v) ? json_integer_value(v) : (int64_t)d;
    if (i < lo || i > hi)
        return ic_fail(err, IC_BAD_REQUEST, "%s must be %lld to %lld", key, (long long)lo, (long long)hi);
    *out = i;
    return IC_OK;
}

enum ic_status ic_field_bool(const json_t *o, const char *key, bool *out, struct ic_err *err)
{
    const json_t *v = json_object_get(o, key);

    if (absent(v))
        return IC_OK;
    if (!json_is_boolean(v))
        return ic_fail(err, IC_BAD_REQUEST, "%s must be true or false", key);
    *out = json_is_true(v);
    return IC_OK;
}

enum ic_status ic_field_str(const json_t *o, const char *key, size_t max, const char **out,
                            struct ic_err *err)
{
    const json_t *v = json_object_get(o, key);

    if (absent(v))
        return IC_OK;
    if (!json_is_string(v))
        return ic_fail(err, IC_BAD_REQUEST, "%s must be a string", key);
    if (json_string_length(v) > max)
        return ic_fail(err, IC_TOO_LARGE, "%s is longer than %zu bytes", key, max);
    *out = json_string_value(v);
    return IC_OK;
}

/* The numeric parameters in one table: name, place, range. */
#define PARAM_NUMS(X)                                                                                      \
    X("temp", temp, 0, 100)                                                                                \
    X("temperature", temp, 0, 100)                                                                         \
    X("top_p", top_p, 0, 1)                                                                                \
    X("min_p", min_p, 0, 1)                                                                                \
    X("repeat_penalty", repeat_penalty, 0.01, 100)                                                         \
    X("frequency_penalty", frequency_penalty, -2, 2)                                                       \
    X("presence_penalty", presence_penalty, -2, 2)

static enum ic_status add_stop(struct ic_text_params *p, const json_t *v, struct ic_err *err)
{
    if (!json_is_string(v))
        return ic_fail(err, IC_BAD_REQUEST, "stop must be a list of strings");
    size_t n = json_string_length(v);
    if (n == 0)
        return ic_fail(err, IC_BAD_REQUEST, "a stop string must not be empty");
    if (n > IC_STOP_LEN_MAX)
        return ic_fail(err, IC_TOO_LARGE, "a stop string is longer than %d bytes", IC_STOP_LEN_MAX);
    if (p->n_stop == IC_STOP_MAX)
        return ic_fail(err, IC_TOO_LARGE, "more than %d stop strings", IC_STOP_MAX);
    if (!(p->stop[p->n_stop] = strdup(json_string_value(v))))
        return ic_fail(err, IC_OOM, "out of memory");
    p->n_stop++;
    return IC_OK;
}

static enum ic_status parse_stop(const json_t *v, struct ic_text_params *p, struct ic_err *err)
{
    size_t i;
    json_t *each;
    enum ic_status st = IC_OK;

    if (absent(v))
        return IC_OK;
    if (!json_is_array(v))
        return add_stop(p, v, err);
    json_array_foreach(v, i, each) if ((st = add_stop(p, each, err)) != IC_OK) break;
    return st;
}

static enum ic_status parse_grammar(const json_t *o, struct ic_text_params *p, struct ic_err *err)
{
    const json_t *schema = json_object_get(o, "json_schema");
    const char *grammar = NULL;
    struct ic_buf gbnf = {.max = IC_GRAMMAR_LEN_MAX + 1};
    enum ic_status st = ic_field_str(o, "grammar", IC_GRAMMAR_LEN_MAX, &grammar, err);

    if (st != IC_OK)
        return st;
    if (grammar && !absent(schema))
        return ic_fail(err, IC_BAD_REQUEST, "grammar and json_schema exclude each other");
    if (grammar && !*grammar)
        return ic_fail(err, IC_BAD_REQUEST, "grammar must not be empty");
    if (grammar && (st = ic_grammar_check(grammar, err)) != IC_OK)
        return st;
    if (grammar)
        return (p->grammar = strdup(grammar)) ? IC_OK : ic_fail(err, IC_OOM, "out of memory");
    if (absent(schema))
        return IC_OK;
    if ((st = ic_schema_to_gbnf(schema, &gbnf, err)) == IC_OK)
        p->grammar = ic_buf_take(&gbnf, NULL);
    ic_buf_deinit(&gbnf);
    return st;
}

static enum ic_status add_bias(struct ic_text_params *p, double token, const json_t *v, struct ic_err *err)
{
    double bias = json_number_value(v);

    if (!(token >= 0 && token <= INT32_MAX && token == floor(token)))
        return ic_fail(err, IC_BAD_REQUEST, "logit_bias names tokens by their numbers");
    if (!json_is_false(v) && (!json_is_number(v) || !(fabs(bias) <= 100)))
        return ic_fail(err, IC_BAD_REQUEST, "a bias in logit_bias must be -100 to 100, or false for never");
    p->bias[p->n_bias++] =
        (struct ic_logit_bias){(int32_t)token, json_is_false(v) ? -INFINITY : (float)bias};
    return IC_OK;
}

/* {"TOKEN": BIAS, …} as OpenAI writes it, or [[TOKEN, BIAS], …] as llama-server does. */
static enum ic_status parse_bias(const json_t *v, struct ic_text_params *p, struct ic_err *err)
{
    size_t n = json_object_size(v) + json_array_size(v), i;
    const char *key;
    json_t *each;
    enum ic_status st = IC_OK;

    if (absent(v))
        return IC_OK;
    if (!json_is_object(v) && !json_is_array(v))
        return ic_fail(err, IC_BAD_REQUEST, "logit_bias must be an object of tokens and their biases");
    if (n > IC_LOGIT_BIAS_MAX)
        return ic_fail(err, IC_TOO_LARGE, "logit_bias is for %d tokens at most", IC_LOGIT_BIAS_MAX);
    if (n && !(p->bias = malloc(n * sizeof *p->bias)))
        return ic_fail(err, IC_OOM, "out of memory");
    json_array_foreach(v, i, each)
    {
        const json_t *token = json_array_get(each, 0);
        st = add_bias(p,
                      json_array_size(each) == 2 && json_is_number(token) ? json_number_value(token) : NAN,
                      json_array_get(each, 1), err);
        if (st != IC_OK)
            return st;
    }
    json_object_foreach((json_t *)v, key, each)
    {
        size_t digits = strspn(key, "0123456789");
        st = add_bias(p, digits && digits < 11 && !key[digits] ? strtod(key, NULL) : NAN, each, err);
        if (st != IC_OK)
            return st;
    }
    return IC_OK;
}

enum ic_status ic_parse_salt(const json_t *o, struct ic_text_req *req, struct ic_err *err)
{
    const char *salt = NULL;
    enum ic_status st = ic_field_str(o, "cache_salt", IC_SALT_MAX, &salt, err);

    if (st == IC_OK && salt)
        memcpy(req->salt, salt, strlen(salt) + 1);
    return st;
}

enum ic_status ic_parse_params(const json_t *o, struct ic_text_params *p, struct ic_err *err)
{
    enum ic_status st;
    double num;
    int64_t top_k = p->top_k, max_tokens = p->max_tokens, logprobs = p->logprobs, seed = -1;

#define X(name, field, lo, hi)                                                                             \
    num = (double)p->field;                                                                                \
    if ((st = ic_field_num(o, name, lo, hi, &num, err)) != IC_OK)                                          \
        return st;                                                                                         \
    p->field = (float)num;
    PARAM_NUMS(X)
#undef X
    if ((st = ic_field_int(o, "top_k", 0, INT32_MAX, &top_k, err)) != IC_OK ||
        (st = ic_field_int(o, "max_tokens", -1, INT32_MAX, &max_tokens, err)) != IC_OK ||
        (st = ic_field_int(o, "logprobs", 0, IC_LOGPROBS_MAX, &logprobs, err)) != IC_OK ||
        (st = ic_field_int(o, "seed", -1, INT64_MAX, &seed, err)) != IC_OK ||
        (st = parse_stop(json_object_get(o, "stop"), p, err)) != IC_OK ||
        (st = parse_bias(json_object_get(o, "logit_bias"), p, err)) != IC_OK ||
        (st = parse_grammar(o, p, err)) != IC_OK)
        return st;
    p->top_k = (int32_t)top_k;
    p->max_tokens = (int32_t)max_tokens;
    p->logprobs = (int32_t)logprobs;
    if (seed >= 0) {
        p->has_seed = true;
        p->seed = (uint32_t)seed ^ (uint32_t)((uint64_t)seed >> 32);
    }
    return IC_OK;
}

static bool known_role(const char *role)
{
    static const char *const roles[] = {"system", "user", "assistant", "tool", "developer"};
    for (size_t i = 0; i < sizeof roles / sizeof *roles; i++)
        if (!strcmp(role, roles[i]))
            return true;
    return false;
}

static char *content_text(const json_t *v, struct ic_err *err)
{
    struct ic_buf b = {0};
    size_t i;
    json_t *part;

    if (json_is_string(v))
        ic_buf_put(&b, json_string_value(v), json_string_length(v));
    else if (json_is_array(v))
        json_array_foreach(v, i, part)
        {
            const char *type = json_string_value(json_object_get(part, "type"));
            const json_t *text = json_object_get(part, "text");
            if (!type || strcmp(type, "text") != 0 || !json_is_string(text)) {
                ic_fail(err, IC_BAD_REQUEST,
                        "a part of a message's content must be {\"type\": \"text\", \"text\": …}");
                ic_buf_deinit(&b);
                return NULL;
            }
            ic_buf_put(&b, json_string_value(text), json_string_length(text));
        }
    else {
        ic_fail(err, IC_BAD_REQUEST, "a message's content must be a string");
        return NULL;
    }
    ic_buf_put(&b, "", 1);
    if (b.failed) {
        ic_buf_deinit(&b);
        ic_fail(err, IC_OOM, "out of memory");
        return NULL;
    }
    return ic_buf_take(&b, NULL);
}

enum ic_status ic_parse_messages(const json_t *list, struct ic_text_req *req, struct ic_err *err)
{
    size_t n = json_array_size(list), i;
    json_t *m;

    if (!json_is_array(list) || n == 0)
        return ic_fail(err, IC_BAD_REQUEST, "messages must be a list that is not empty");
    if (n > IC_MESSAGES_MAX)
        return ic_fail(err, IC_TOO_LARGE, "more than %d messages", IC_MESSAGES_MAX);
    if (!(req->msgs = calloc(n, sizeof *req->msgs)))
        return ic_fail(err, IC_OOM, "out of memory");
    json_array_foreach(list, i, m)
    {
        const char *role = json_string_value(json_object_get(m, "role"));
        if (!role || !known_role(role))
            return ic_fail(err, IC_BAD_REQUEST,
                           "a message's role must be system, user, assistant, tool or developer");
        if (!strcmp(role, "developer")) /* OpenAI's newer name */
            role = "system";
        char *content = content_text(json_object_get(m, "content"), err);
        if (!content)
            return err ? err->code : IC_BAD_REQUEST;
        req->msgs[i] = (struct ic_chat_msg){strdup(role), content};
        req->n_msgs = i + 1;
        if (!req->msgs[i].role)
            return ic_fail(err, IC_OOM, "out of memory");
    }
    return IC_OK;
}
