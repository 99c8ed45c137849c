/* POST /predict: one Law M step for a caller that keeps its own state. The scheduler batches it with everybody else's.
 *
 * The state comes as raw little-endian float32 or as JSON, laid out [H,W,d,2] ("hwd2", the default) or [2d,H,W]
 * ("chw": real parts of all channels, then imaginary parts), and goes back the same way. What belongs to the request
 * is read from JSON fields, the query string or x-ic-* headers: law, height, width (or grid), gamma, layout. For a law with
 * memory the state may be followed by h and c, [4b,H/4,W/4] each; the answer always is. */
#include "proto/internal.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

/* What an answer needs to know of its request; hangs on the peer. */
struct predict {
    struct http_job job;
    bool json, chw;
};

static void predict_event(struct ic_server *s, struct ic_peer *p, struct ic_event *ev);

static void free_predict(struct http_job *job)
{
    free(job);
}

/* Value of a key in a query string, decoded, into `out`; false: absent. */
static bool query_value(const char *query, const char *key, char *out, size_t size)
{
    size_t klen = strlen(key);

    for (const char *p = query; *p; p += strcspn(p, "&"), p += *p == '&') {
        if (strncmp(p, key, klen) != 0 || p[klen] != '=')
            continue;
        size_t n = 0;
        for (const char *v = p + klen + 1; *v && *v != '&'; v++) {
            char c = *v;
            unsigned hex;
            /* %00 stays as it stands: it would hide what follows */
            if (c == '%' && sscanf(v + 1, "%2x", &hex) == 1 && hex && v[1] && v[2]) {
                c = (char)hex;
                v += 2;
            } else if (c == '+') {
                c = ' ';
            }
            if (n + 1 >= size) /* no name is so long: what is left of it will not be found */
                break;
            out[n++] = c;
        }
        out[n] = 0;
        return true;
    }
    return false;
}

/* Query and headers as a JSON object, so that there is one way to check them. Numbers become numbers. NULL: no memory. */
static json_t *outer_fields(struct ic_peer *p, const struct ic_http_req *r)
{
    static const char *const keys[] = {"law", "grid", "height", "width", "gamma", "layout"};
    json_t *o = json_object();

    for (size_t i = 0; o && i < sizeof keys / sizeof *keys; i++) {
        char value[IC_LAW_NAME_MAX], header[32], *end;
        snprintf(header, sizeof header, "x-ic-%s", keys[i]);
        if (!query_value(r->query, keys[i], value, sizeof value))
            snprintf(value, sizeof value, "%s", p->vt->header(p, header));
        if (!*value)
            continue;
        bool text = !strcmp(keys[i], "law") || !strcmp(keys[i], "layout");
        double d = text ? 0 : strtod(value, &end);
        json_t *v = text || *end || !isfinite(d)
                        ? json_string_nocheck(value) /* even what is not UTF-8 must not get lost */
                    : d == floor(d) && fabs(d) < 1e15 ? json_integer((json_int_t)d)
                                                      : json_real(d);
        if (json_object_set_new(o, keys[i], v) != 0) {
            json_decref(o);
            return NULL;
        }
    }
    return o;
}

/* What the body leaves out, or gives as null, stands outside. */
static bool add_missing(json_t *o, json_t *outer)
{
    const char *key;
    json_t *v;

    json_object_foreach(outer, key, v)
    {
        json_t *inner = json_object_get(o, key);
        if ((!inner || json_is_null(inner)) && json_object_set(o, key, v) != 0)
            return false;
    }
    return true;
}

static bool flatten(const json_t *v, float *out, size_t cap, size_t *n)
{
    size_t i;
    json_t *each;

    if (json_is_number(v)) {
        double d = json_number_value(v);
        if (*n >= cap || !(fabs(d) <= (double)FLT_MAX))
            return false;
        out[(*n)++] = (float)d;
        return true;
    }
    if (!json_is_array(v))
        return false;
    json_array_foreach(v, i, each) if (!flatten(each, out, cap, n)) return false;
    return true;
}

static void chw_to_hwd2(const float *in, float *out, size_t cells, size_t d)
{
    for (size_t k = 0; k < 2 * d; k++)
        for (size_t i = 0; i < cells; i++)
            out[i * 2 * d + 2 * (k % d) + k / d] = in[k * cells + i];
}

static void hwd2_to_chw(const float *in, float *out, size_t cells, size_t d)
{
    for (size_t k = 0; k < 2 * d; k++)
        for (size_t i = 0; i < cells; i++)
            out[k * cells + i] = in[i * 2 * d + 2 * (k % d) + k / d];
}

static enum ic_status parse_shape(const struct ic_server *s, const json_t *o, struct ic_sim_cmd *cmd,
                                  bool *chw, struct ic_err *err)
{
    const char *law = NULL, *layout = NULL;
    int64_t grid = 0, height = 0, width = 0;
    double gamma = NAN;
    int index = 0;
    enum ic_status st;

    if ((st = ic_field_str(o, "law", IC_LAW_NAME_MAX, &law, err)) != IC_OK ||
        (st = ic_field_str(o, "layout", 16, &layout, err)) != IC_OK ||
        (st = ic_sim_parse_grid(s, o, &grid, &height, &width, err)) != IC_OK ||
        (st = ic_field_num(o, "gamma", -IC_SIM_GAMMA_MAX, IC_SIM_GAMMA_MAX, &gamma, err)) != IC_OK)
        return st;
    if (!isnan(gamma)) {
        cmd->opts.set = IC_SET_GAMMA;
        cmd->opts.gamma = gamma;
    }
    if (!ic_law_engine_count(s->law))
        return ic_fail(err, IC_UNAVAILABLE, "no law is loaded (yet)");
    if (law && (index = ic_law_engine_find(s->law, law)) < 0)
        return ic_fail(err, IC_NOT_FOUND, "there is no law %.100s here", law);
    if (layout && strcmp(layout, "hwd2") != 0 && strcmp(layout, "chw") != 0)
        return ic_fail(err, IC_BAD_REQUEST, "layout must be hwd2 or chw");
    *chw = layout && !strcmp(layout, "chw");
    cmd->law = (unsigned)index;
    cmd->height = (unsigned)(height ? height : grid);
    cmd->width = (unsigned)(width ? width : grid);
    return cmd->height && cmd->width
               ? IC_OK
               : ic_fail(err, IC_BAD_REQUEST, "height and width (or grid) are missing");
}

static enum ic_status read_state(struct ic_server *s, const json_t *psi, const struct ic_http_req *r,
                                 struct ic_sim_cmd *cmd, bool chw, struct ic_err *err)
{
    const struct ic_law *l = ic_law_engine_law(s->law, cmd->law);
    size_t floats = (size_t)cmd->height * cmd->width * l->d * 2;
    size_t all = floats + (l->memory ? ic_law_memory_bytes(l, cmd->height, cmd->width) / sizeof(float) : 0),
           n = 0;

    if (!psi && r->len != floats * sizeof(float) &&
        r->len != all * sizeof(float)) /* before memory is asked for it */
        return ic_fail(err, IC_BAD_REQUEST, "a raw state of %zu bytes was expected, not %zu",
                       floats * sizeof(float), r->len);
    size_t cap = psi && all > r->len ? r->len : all; /* each number takes a character at least */
    if (!(cmd->state = malloc(cap * sizeof(float))))
        return ic_fail(err, IC_OOM, "out of memory");
    if (psi) {
        if (!flatten(psi, cmd->state, cap, &n))
            return ic_fail(err, IC_BAD_REQUEST, "psi must be float32 numbers (lists may nest), at most %zu",
                           all);
    } else {
        n = r->len / sizeof(float);
        memcpy(cmd->state, r->body, r->len);
    }
    if (n != floats && n != all)
        return ic_fail(err, IC_BAD_REQUEST, "psi of this law and grid has %zu numbers, not %zu", floats, n);
    cmd->state_floats = n;
    if (chw) {
        float *t = malloc(floats * sizeof *t);
        if (!t)
            return ic_fail(err, IC_OOM, "out of memory");
        chw_to_hwd2(cmd->state, t, (size_t)cmd->height * cmd->width, l->d);
        memcpy(cmd->state, t, floats * sizeof *t);
        free(t);
    }
    return IC_OK;
}

void ic_predict_request(struct ic_server *s, struct ic_peer *p, const struct ic_http_req *r)
{
    struct ic_err err = {0};
    struct ic_sim_cmd cmd = {.op = IC_SIM_PREDICT, .owner = ic_owner_of(p)};
    const char *type = p->vt->header(p, "content-type");
    bool json = !strncasecmp(type, "application/json", 16), chw = false;
    json_t *o = NULL, *outer = NULL, *psi = NULL;
    struct predict *pr = calloc(1, sizeof *pr);

    if (!s->law)
        ic_fail(&err, IC_UNAVAILABLE, "this server has no laws");
    else if (s->draining)
        ic_fail(&err, IC_UNAVAILABLE, "the server is shutting down");
    else if (!pr || !(outer = outer_fields(p, r)))
        ic_fail(&err, IC_OOM, "out of memory");
    else if (json && (o = ic_json_object(r->body, r->len, &err))) {
        if (!add_missing(o, outer))
            ic_fail(&err, IC_OOM, "out of memory");
        else if (!(psi = json_object_get(o, "psi")))
            ic_fail(&err, IC_BAD_REQUEST, "psi is missing");
    }
    if (err.code == IC_OK)
        parse_shape(s, json ? o : outer, &cmd, &chw, &err);
    if (err.code == IC_OK)
        read_state(s, psi, r, &cmd, chw, &err);
    if (err.code == IC_OK) {
        *pr = (struct predict){
            {.rid = ++s->last_rid, .req = NULL, .event = predict_event, .free = free_predict}, json, chw};
        cmd.rid = pr->job.rid;
        cmd.sim = ++s->last_sim;
        ic_law_engine_command(s->law, &cmd, &err);
    }
    json_decref(o);
    json_decref(outer);
    if (err.code != IC_OK) {
        free(cmd.state);
        free(pr);
        ic_http_error(s, p, ic_status_http(err.code), err.code, err.msg, NULL);
        return;
    }
    ic_http_wait(s, p, &pr->job);
}

static void reply_json(struct ic_server *s, struct ic_peer *p, const struct ic_sim_info *i, bool chw,
                       const float *v, size_t n)
{
    struct ic_buf *b = &s->out;

    ic_buf_clear(b);
    ic_buf_puts(b, "{");
    ic_json_kstr(b, "law", ic_law_engine_law(s->law, i->law)->name);
    ic_json_kstr(b, "layout", chw ? "chw" : "hwd2");
    ic_json_key(b, "shape");
    if (chw)
        ic_buf_printf(b, "[%u,%u,%u]", 2 * i->d, i->height, i->width);
    else
        ic_buf_printf(b, "[%u,%u,%u,2]", i->height, i->width, i->d);
    ic_json_key(b, "psi");
    for (size_t k = 0; k < n; k++) {
        ic_buf_puts(b, k ? "," : "[");
        ic_json_num(b, (double)v[k]); /* 9 digits: float32 comes back exactly */
    }
    ic_buf_puts(b, "]}");
    if (b->failed)
        ic_http_error(s, p, 507, IC_OOM, "the answer is too large", NULL);
    else
        p->vt->reply(p, 200, "application/json", NULL, b->data, b->len);
}

static void predict_event(struct ic_server *s, struct ic_peer *p, struct ic_event *ev)
{
    struct predict *pr = p->app;
    const struct ic_sim_info *i = &ev->sim;

    ic_http_waited(s, p);
    if (ev->kind == IC_EVENT_ERROR) {
        ic_http_error(s, p, ic_status_http(ev->code), ev->code, ev->text, NULL);
        return;
    }
    size_t cells = (size_t)i->height * i->width, psi_bytes = cells * i->d * 2 * sizeof(float),
           n = ev->len / sizeof(float);
    float *out = malloc(ev->len);
    if (!out) {
        ic_http_error(s, p, 507, IC_OOM, "out of memory", NULL);
        return;
    }
    memcpy(out, ev->text, ev->len);
    if (pr->chw) {
        float *in = malloc(psi_bytes);
        if (!in) {
            free(out);
            ic_http_error(s, p, 507, IC_OOM, "out of memory", NULL);
            return;
        }
        memcpy(in, out, psi_bytes);
        hwd2_to_chw(in, out, cells, i->d);
        free(in);
    }
    if (pr->json)
        reply_json(s, p, i, pr->chw, out, n);
    else
        p->vt->reply(p, 200, "application/octet-stream", NULL, out, ev->len);
    free(out);
}
