/* A client's message, as far as JSON goes: the object, its parameters (grammars from schemas among them) and its
 * messages. What is accepted must keep the promises that the engine builds on. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/utf8.h"
#include "proto/fields.h"
#include "proto/server.h"

static void check_params(const struct ic_text_params *p)
{
    IC_ASSERT(p->temp >= 0 && isfinite(p->temp) && p->top_k >= 0 && p->top_p >= 0 && p->top_p <= 1);
    IC_ASSERT(p->min_p >= 0 && p->min_p <= 1 && p->repeat_penalty > 0 && fabsf(p->frequency_penalty) <= 2 &&
              fabsf(p->presence_penalty) <= 2);
    IC_ASSERT(p->max_tokens >= -1 && p->logprobs >= 0 && p->logprobs <= IC_LOGPROBS_MAX);
    IC_ASSERT(p->n_stop >= 0 && p->n_stop <= IC_STOP_MAX);
    for (int32_t i = 0; i < p->n_stop; i++)
        IC_ASSERT(*p->stop[i] && strlen(p->stop[i]) <= IC_STOP_LEN_MAX);
    IC_ASSERT(p->n_bias >= 0 && p->n_bias <= IC_LOGIT_BIAS_MAX);
    for (int32_t i = 0; i < p->n_bias; i++)
        IC_ASSERT(p->bias[i].token >= 0 && p->bias[i].bias <= 100);
    IC_ASSERT(!p->grammar || (*p->grammar && strlen(p->grammar) <= IC_GRAMMAR_LEN_MAX));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct ic_err err = {0};
    json_t *o = ic_json_object((const char *)data, size, &err);

    IC_ASSERT((o != NULL) == (err.code == IC_OK) && ic_utf8_valid(err.msg, strlen(err.msg)));
    if (!o)
        return 0;
    struct ic_text_req *r = ic_text_req_new();
    const json_t *params = json_object_get(o, "params");
    enum ic_status st = ic_parse_params(json_is_object(params) ? params : o, &r->params, &err);
    IC_ASSERT(st == err.code && ic_utf8_valid(err.msg, strlen(err.msg)));
    if (st == IC_OK)
        check_params(&r->params);
    err = (struct ic_err){0};
    st = ic_parse_messages(json_object_get(o, "messages"), r, &err);
    IC_ASSERT(st == err.code && (st != IC_OK || (r->n_msgs > 0 && r->n_msgs <= IC_MESSAGES_MAX)));
    for (size_t i = 0; i < r->n_msgs; i++)
        IC_ASSERT(ic_utf8_valid(r->msgs[i].content, strlen(r->msgs[i].content)) && *r->msgs[i].role);
    ic_text_req_unref(r);
    json_decref(o);
    return 0;
}
