/* The sim_* ops of the native protocol (docs/protocol.md §1): simulations of a connection.
 *
 * The engine owns the simulations; kept here is what the events have told, so that unknown ids are refused
 * and /v1/sims can be answered without asking it. */
#include "proto/internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>

#define SIM_ID_MAX 32

struct sim *ic_sim_of(const struct ic_server *s, const struct conn *c, uint64_t handle)
{
    for (int i = 0; c->sims && i < s->cfg.sims_max; i++)
        if (c->sims[i].handle == handle)
            return &c->sims[i];
    return NULL;
}

/* ---- reading ------------------------------------------------------------------------------------ */

static enum ic_status parse_roi(const json_t *v, struct ic_view_roi *roi, struct ic_err *err)
{
    static const char *const names[] = {"x", "y", "w", "h"};
    int64_t n[4] = {0};
    enum ic_status st = IC_OK;

    if (!json_is_object(v))
        return ic_fail(err, IC_BAD_REQUEST, "roi must be an object with x, y, w, h, or null");
    for (int i = 0; i < 4 && st == IC_OK; i++)
        st = ic_field_int(v, names[i], 0, IC_LAW_GRID_MAX, &n[i], err);
    *roi = (struct ic_view_roi){(size_t)n[0], (size_t)n[1], (size_t)n[2], (size_t)n[3]};
    return st;
}

/* Reads what protocol.md lets a client set on a simulation. */
static enum ic_status parse_opts(const json_t *o, struct ic_sim_opts *p, struct ic_err *err)
{
    const char *view = NULL, *encoding = NULL, *init = NULL;
    const json_t *roi = json_object_get(o, "roi");
    int64_t seed = -1;
    enum ic_status st = IC_OK;

#define HAS(key) (json_object_get(o, key) && !json_is_null(json_object_get(o, key)))
#define READ(bit, key, call)                                                                               \
    if (st == IC_OK && HAS(key)) {                                                                         \
        st = (call);                                                                                       \
        p->set |= (bit);                                                                                   \
    }
    READ(IC_SET_STEPS, "steps", ic_field_int(o, "steps", -1, INT64_MAX, &p->steps, err))
    READ(IC_SET_EVERY, "every", ic_field_int(o, "every", 1, IC_SIM_STEPS_MAX, &p->every, err))
    READ(IC_SET_FPS, "fps", ic_field_num(o, "fps", 0, IC_SIM_RATE_MAX, &p->fps, err))
    READ(IC_SET_RATE, "rate", ic_field_num(o, "rate", 0, IC_SIM_RATE_MAX, &p->rate, err))
    READ(IC_SET_GAMMA, "gamma",
         ic_field_num(o, "gamma", -IC_SIM_GAMMA_MAX, IC_SIM_GAMMA_MAX, &p->gamma, err))
    READ(IC_SET_METRICS, "metrics", ic_field_bool(o, "metrics", &p->metrics, err))
    READ(IC_SET_FRAMES, "frames", ic_field_bool(o, "frames", &p->frames, err))
    READ(IC_SET_SEED, "seed", ic_field_int(o, "seed", 0, INT64_MAX, &seed, err))
    READ(IC_SET_VIEW, "view", ic_field_str(o, "view", 64, &view, err))
    READ(IC_SET_ENCODING, "encoding", ic_field_str(o, "encoding", 16, &encoding, err))
    READ(IC_SET_INIT, "init", ic_field_str(o, "init", 64, &init, err))
#undef READ
#undef HAS
    if (st == IC_OK && view)
        st = ic_view_parse(view, &p->view, err);
    if (st == IC_OK && encoding)
        st = ic_view_encoding_parse(encoding, &p->encoding, err);
    if (st == IC_OK && init)
        st = ic_law_init_parse(init, &p->init, err);
    if (st == IC_OK && (p->set & IC_SET_STEPS) && p->steps == 0)
        st = ic_fail(err, IC_BAD_REQUEST, "steps must be at least 1, or -1");
    if (st == IC_OK && (p->set & IC_SET_STEPS) && p->steps > IC_SIM_STEPS_MAX)
        st = ic_fail(err, IC_TOO_LARGE, "steps must be at most %d, or -1", IC_SIM_STEPS_MAX);
    if (st == IC_OK && roi) { /* null: the whole grid again */
        p->set |= IC_SET_ROI;
        p->roi = (struct ic_view_roi){0};
        if (!json_is_null(roi))
            st = parse_roi(roi, &p->roi, err);
    }
    p->seed = (uint64_t)seed;
    return st;
}

#define SEED_MAX ((UINT64_C(1) << 53) - 1)

uint64_t ic_sim_seed(uint64_t instead)
{
    uint64_t seed;
    return (getrandom(&seed, sizeof seed, 0) < 0 ? instead : seed) & SEED_MAX;
}

static enum ic_status parse_tool(const json_t *o, struct ic_sim_cmd *cmd, struct ic_err *err)
{
    const char *tool = NULL, *type = NULL, *key;
    const json_t *args = json_object_get(o, "args");
    json_t *v;
    enum ic_status st = ic_field_str(o, "tool", 64, &tool, err);

    ic_law_tool_args_init(&cmd->tool_args);
    if (args && !json_is_null(args) && !json_is_object(args) && st == IC_OK)
        st = ic_fail(err, IC_BAD_REQUEST, "args must be an object");
    if (!json_is_object(args))
        args = o;
    if (st == IC_OK)
        st = ic_law_tool_parse(tool, &cmd->tool, err);
    if (st == IC_OK)
        st = ic_field_str(json_object_get(args, "type") ? args : o, "type", 64, &type, err);
    if (st == IC_OK && type && cmd->tool == IC_LAW_TOOL_INJECT_ENERGY)
        st = ic_law_inject_parse(type, &cmd->tool_args.type, err);
    if (getrandom(&cmd->tool_args.seed, sizeof cmd->tool_args.seed, 0) < 0)
        cmd->tool_args.seed = cmd->rid;
    json_object_foreach((json_t *)args, key, v)
    {
        if (st != IC_OK)
            break;
        if (json_is_null(v))
            continue;
        st = ic_law_tool_arg_set(&cmd->tool_args, key, json_number_value(v), err);
        if (st == IC_NOT_FOUND) /* not one of the tool's numbers */
            st = IC_OK;
        else if (!json_is_number(v))
            st = ic_fail(err, IC_BAD_REQUEST, "%s must be a number", key);
    }
    return st;
}

enum ic_status ic_sim_parse_grid(const struct ic_server *s, const json_t *o, int64_t *grid, int64_t *height,
                                 int64_t *width, struct ic_err *err)
{
    enum ic_status st;

    if ((st = ic_field_int(o, "grid", 1, INT32_MAX, grid, err)) != IC_OK ||
        (st = ic_field_int(o, "height", 1, INT32_MAX, height, err)) != IC_OK ||
        (st = ic_field_int(o, "width", 1, INT32_MAX, width, err)) != IC_OK)
        return st;
    if (*grid > s->cfg.grid_max || *height > s->cfg.grid_max || *width > s->cfg.grid_max)
        return ic_fail(err, IC_TOO_LARGE, "a grid side must be 1 to %u (grid_side)", s->cfg.grid_max);
    return IC_OK;
}

static enum ic_status parse_create(const struct ic_server *s, const json_t *o, struct ic_sim_cmd *cmd,
                                   bool *state, struct ic_err *err)
{
    const char *law = NULL, *precision = NULL;
    int64_t grid = 0, height = 0, width = 0;
    int index = 0;
    enum ic_status st;

    if ((st = ic_field_str(o, "law", IC_LAW_NAME_MAX, &law, err)) != IC_OK ||
        (st = ic_field_str(o, "precision", 16, &precision, err)) != IC_OK ||
        (st = ic_sim_parse_grid(s, o, &grid, &height, &width, err)) != IC_OK ||
        (st = ic_field_bool(o, "state", state, err)) != IC_OK)
        return st;
    if (law && (index = ic_law_engine_find(s->law, law)) < 0)
        return ic_fail(err, IC_NOT_FOUND, "there is no law %.100s here", law);
    if (!ic_law_engine_count(s->law))
        return ic_fail(err, IC_UNAVAILABLE, "no law is loaded (yet)");
    if (precision && (index = ic_law_engine_variant(s->law, (unsigned)index, precision)) < 0)
        return ic_fail(err, IC_BAD_REQUEST, "this law is not served in %.16s", precision);
    const struct ic_law *l = ic_law_engine_law(s->law, (unsigned)index);
    if (!grid)
        grid = l->grid_training ? l->grid_training : 64;
    cmd->law = (unsigned)index;
    cmd->height = (unsigned)(height ? height : grid);
    cmd->width = (unsigned)(width ? width : grid);
    if (!(cmd->opts.set & IC_SET_SEED)) {
        cmd->opts.set |= IC_SET_SEED;
        cmd->opts.seed = ic_sim_seed(cmd->rid);
    }
    if (!(cmd->opts.set & IC_SET_INIT)) { /* as the law's own configuration says */
        cmd->opts.set |= IC_SET_INIT;
        if (ic_law_init_parse(l->initial_mode, &cmd->opts.init, NULL) != IC_OK)
            cmd->opts.init = IC_LAW_INIT_COMPLEX_NOISE;
    }
    return IC_OK;
}

/* ---- ops ---------------------------------------------------------------------------------------- */

#define SET_FIELDS                                                                                         \
    (IC_SET_VIEW | IC_SET_ENCODING | IC_SET_ROI | IC_SET_EVERY | IC_SET_FPS | IC_SET_RATE |                \
     IC_SET_FRAMES | IC_SET_METRICS | IC_SET_GAMMA)

/* Other fields are unknown to an op and change nothing: a seed taken by sim_set would be told as that of a state
 * which it has not made. */
static const struct {
    const char *name;
    enum ic_sim_op op;
    unsigned fields;
} ops[] = {
    {"sim_create", IC_SIM_CREATE, SET_FIELDS | IC_SET_SEED | IC_SET_INIT},
    {"sim_run", IC_SIM_RUN, SET_FIELDS | IC_SET_STEPS},
    {"sim_step", IC_SIM_RUN, SET_FIELDS | IC_SET_STEPS},
    {"sim_set", IC_SIM_SET, SET_FIELDS},
    {"sim_reset", IC_SIM_RESET, IC_SET_SEED | IC_SET_INIT},
    {"sim_pause", IC_SIM_PAUSE, 0},
    {"sim_tool", IC_SIM_TOOL, 0},
    {"sim_state", IC_SIM_STATE, 0},
    {"sim_close", IC_SIM_CLOSE, 0},
};

enum ic_status ic_sim_keep_call(struct ic_server *s, struct conn *c, const char *id, uint64_t *rid,
                                struct ic_err *err)
{
    size_t len = strlen(id);

    if (c->n_calls == IC_SIM_CALLS_MAX)
        return ic_fail(err, IC_BUSY, "%d sim messages of this connection wait for their answer",
                       IC_SIM_CALLS_MAX);
    struct sim_call *call = malloc(sizeof *call + len + 1);
    if (!call)
        return ic_fail(err, IC_OOM, "out of memory");
    /* The top bit keeps them apart from the numbers of text requests. */
    *call = (struct sim_call){.next = c->calls, .rid = *rid = (1ULL << 63) | ++s->last_rid};
    memcpy(call->id, id, len + 1);
    c->calls = call;
    c->n_calls++;
    return IC_OK;
}

/* The id to echo, "" for none, into `id` (or nowhere, NULL); the call is over. */
void ic_sim_end_call(struct conn *c, uint64_t rid, char *id)
{
    if (id)
        id[0] = 0;
    for (struct sim_call **p = &c->calls, *call; (call = *p); p = &call->next)
        if (call->rid == rid) {
            if (id)
                strcpy(id, call->id);
            *p = call->next;
            free(call);
            c->n_calls--;
            return;
        }
}

bool ic_sim_make_room(struct ic_server *s, struct conn *c)
{
    if (!c->farewell)
        c->farewell = ic_law_farewell_new(ic_owner_of(c->peer));
    if (c->farewell && !c->sims)
        c->sims = calloc((size_t)s->cfg.sims_max, sizeof *c->sims);
    return c->sims != NULL;
}

static struct sim *new_sim(struct ic_server *s, struct conn *c, struct ic_err *err)
{
    if (!ic_sim_make_room(s, c)) {
        ic_fail(err, IC_OOM, "out of memory");
        return NULL;
    }
    for (int i = 0; i < s->cfg.sims_max; i++)
        if (!c->sims[i].handle) {
            c->sims[i] = (struct sim){.handle = ++s->last_sim};
            return &c->sims[i];
        }
    ic_fail(err, IC_BUSY, "this connection has %d simulations already", s->cfg.sims_max);
    return NULL;
}

static enum ic_status find_sim(struct ic_server *s, struct conn *c, const json_t *o, uint64_t *handle,
                               struct ic_err *err)
{
    const char *name = NULL;
    unsigned long long n;
    const struct sim *m;
    int used = 0;
    enum ic_status st = ic_field_str(o, "sim_id", SIM_ID_MAX, &name, err);

    if (st != IC_OK)
        return st;
    if (!name)
        return ic_fail(err, IC_BAD_REQUEST, "Missing sim_id");
    if (sscanf(name, "sim_%llu%n", &n, &used) != 1 || name[used] || !n || !(m = ic_sim_of(s, c, n)) ||
        !m->made)
        return ic_fail(err, IC_NOT_FOUND, "this connection has no simulation %.32s", name);
    *handle = n;
    return IC_OK;
}

/* One object to read from: `payload` over the top level. The caller decref's it. NULL: no memory. */
static json_t *merged(const json_t *top, const json_t *payload)
{
    json_t *o = json_copy((json_t *)top);
    /* json_copy leaves out what there is no memory for */
    if (o && (json_object_size(o) != json_object_size(top) ||
              (payload && json_object_update(o, (json_t *)payload) != 0))) {
        json_decref(o);
        o = NULL;
    }
    return o;
}

static enum ic_status build(struct ic_server *s, struct conn *c, const char *op, unsigned fields,
                            const json_t *o, struct ic_sim_cmd *cmd, bool *state, struct ic_err *err)
{
    enum ic_status st = parse_opts(o, &cmd->opts, err);

    if (st != IC_OK)
        return st;
    cmd->opts.set &= fields;
    if (cmd->op == IC_SIM_CREATE)
        return parse_create(s, o, cmd, state, err);
    if ((st = find_sim(s, c, o, &cmd->sim, err)) != IC_OK)
        return st;
    if (!strcasecmp(op, "sim_step") && !(cmd->opts.set & IC_SET_STEPS)) {
        cmd->opts.set |= IC_SET_STEPS;
        cmd->opts.steps = 1;
    }
    return cmd->op == IC_SIM_TOOL ? parse_tool(o, cmd, err) : IC_OK;
}

bool ic_sim_message(struct ic_server *s, struct conn *c, const char *op, const json_t *top,
                    const json_t *payload, const char *id)
{
    struct ic_err err = {0};
    struct ic_sim_cmd cmd = {.owner = ic_owner_of(c->peer)};
    struct sim *made = NULL;
    bool known = false, state = false;
    unsigned fields = 0;
    json_t *o = NULL;

    for (size_t i = 0; i < sizeof ops / sizeof *ops && !known; i++)
        if ((known = !strcasecmp(op, ops[i].name))) {
            cmd.op = ops[i].op;
            fields = ops[i].fields;
        }
    if (!known)
        return false;
    if (!c->authed)
        ic_fail(&err, IC_UNAUTHORIZED, "Not authenticated");
    else if (!s->law)
        ic_fail(&err, IC_UNAVAILABLE, "this server has no laws");
    else if (s->draining)
        ic_fail(&err, IC_UNAVAILABLE, "the server is shutting down");
    else if (!(o = merged(top, payload)))
        ic_fail(&err, IC_OOM, "out of memory");
    if (err.code != IC_OK || build(s, c, op, fields, o, &cmd, &state, &err) != IC_OK)
        goto refused;
    if (cmd.op == IC_SIM_CREATE && c->awaiting) {
        ic_fail(&err, IC_BAD_REQUEST, "the binary state of the last sim_create has not come yet");
        goto refused;
    }
    if (cmd.op == IC_SIM_CREATE && !(made = new_sim(s, c, &err)))
        goto refused;
    if (made)
        cmd.sim = made->handle;
    if (ic_sim_keep_call(s, c, id, &cmd.rid, &err) != IC_OK)
        goto refused;
    if (state) { /* held back until its binary message comes */
        if (!(c->awaiting = malloc(sizeof cmd))) {
            ic_fail(&err, IC_OOM, "out of memory");
            ic_sim_end_call(c, cmd.rid, NULL);
            goto refused;
        }
        *c->awaiting = cmd;
        json_decref(o);
        return true;
    }
    if (ic_law_engine_command(s->law, &cmd, &err) == IC_OK) {
        json_decref(o);
        return true;
    }
    ic_sim_end_call(c, cmd.rid, NULL);
refused:
    if (made)
        made->handle = 0;
    json_decref(o);
    ic_conn_error(s, c, *id ? id : NULL, NULL, &err);
    return true;
}

/* The sim_create that its state did not reach; takes the command. */
static void fail_awaited(struct ic_server *s, struct conn *c, struct ic_sim_cmd *cmd,
                         const struct ic_err *err)
{
    struct sim *m = ic_sim_of(s, c, cmd->sim);
    char id[IC_ID_MAX + 1];

    if (m)
        m->handle = 0;
    free(cmd->state);
    ic_sim_end_call(c, cmd->rid, id);
    ic_conn_error(s, c, *id ? id : NULL, NULL, err);
    free(cmd);
}

bool ic_sim_binary_refused(struct ic_server *s, struct conn *c, const struct ic_err *err)
{
    struct ic_sim_cmd *cmd = c->awaiting;

    if (!cmd)
        return false;
    c->awaiting = NULL;
    fail_awaited(s, c, cmd, err);
    return true;
}

bool ic_sim_binary(struct ic_server *s, struct conn *c, const char *data, size_t len)
{
    struct ic_sim_cmd *cmd = c->awaiting;
    struct ic_err err = {0};

    if (!cmd)
        return false;
    c->awaiting = NULL;
    if (len == 0 || len % sizeof(float))
        ic_fail(&err, IC_BAD_REQUEST, "a state is a whole number of float32 values");
    else if (!(cmd->state = malloc(len)))
        ic_fail(&err, IC_OOM, "out of memory");
    if (err.code == IC_OK) {
        memcpy(cmd->state, data, len);
        cmd->state_floats = len / sizeof(float);
        ic_law_engine_command(s->law, cmd, &err);
    }
    if (err.code != IC_OK)
        fail_awaited(s, c, cmd, &err);
    else
        free(cmd);
    return true;
}

void ic_sim_conn_closed(struct ic_server *s, struct conn *c)
{
    if (c->sims && s->law)
        ic_law_engine_farewell(s->law, c->farewell);
    else
        free(c->farewell);
    while (c->calls)
        ic_sim_end_call(c, c->calls->rid, NULL);
    free(c->sims);
    free(c->awaiting);
}

/* ---- events ------------------------------------------------------------------------------------- */

static void put_sim(struct ic_server *s, struct ic_buf *b, const struct ic_sim_info *i)
{
    ic_json_key(b, "sim_id");
    ic_buf_printf(b, "\"sim_%llu\"", (unsigned long long)i->sim);
    ic_json_kstr(b, "law", ic_law_engine_law(s->law, i->law)->name);
    ic_json_kint(b, "height", i->height);
    ic_json_kint(b, "width", i->width);
    ic_json_kint(b, "d", i->d);
    ic_json_kstr(b, "status", i->running ? "running" : "paused");
    ic_json_kint(b, "step", i->step);
    ic_json_kint(b, "steps_left", i->left);
    ic_json_knum(b, "gamma", i->gamma);
    ic_json_kint(b, "seed", (int64_t)i->seed);
    ic_json_kstr(b, "precision", ic_law_engine_precision(s->law, i->law));
    ic_json_kstr(b, "view", ic_view_name(i->view.view));
    ic_json_kstr(b, "encoding", ic_view_encoding_name(i->view.encoding));
    ic_json_kint(b, "every", i->every);
    ic_json_knum(b, "fps", i->fps);
    ic_json_knum(b, "rate", i->rate);
    if (i->view.roi.w) {
        ic_json_key(b, "roi");
        ic_buf_printf(b, "{\"x\":%zu,\"y\":%zu,\"w\":%zu,\"h\":%zu}", i->view.roi.x, i->view.roi.y,
                      i->view.roi.w, i->view.roi.h);
    }
    ic_json_kint(b, "bytes", (int64_t)i->bytes);
}

/* u32 header length, JSON header, array; the header is filled up with spaces so that the array starts at a
 * multiple of 8 bytes and a client can view it in place. */
static void finish_binary(struct ic_buf *b, const void *data, size_t len)
{
    ic_buf_puts(b, "}");
    while (b->len % 8)
        ic_buf_puts(b, " ");
    if (!b->failed) {
        uint32_t n = (uint32_t)(b->len - 4);
        for (int i = 0; i < 4; i++)
            b->data[i] = (char)(n >> (8 * i));
    }
    ic_buf_put(b, data, len);
}

static struct ic_buf *begin_binary(struct ic_server *s, const char *op, const struct ic_sim_info *i)
{
    struct ic_buf *b = &s->out;

    ic_buf_clear(b);
    ic_buf_put(b, "\0\0\0\0{\"op\":\"", 11);
    ic_buf_puts(b, op);
    ic_buf_printf(b, "\",\"sim_id\":\"sim_%llu\"", (unsigned long long)i->sim);
    ic_json_kint(b, "step", i->step);
    return b;
}

static void put_shape_as(struct ic_buf *b, const char *key, const size_t *shape, unsigned n)
{
    ic_json_key(b, key);
    for (unsigned i = 0; i < n; i++)
        ic_buf_printf(b, "%s%zu", i ? "," : "[", shape[i]);
    ic_buf_puts(b, "]");
}

static void put_shape(struct ic_buf *b, const size_t *shape, unsigned n)
{
    put_shape_as(b, "shape", shape, n);
}

void ic_sim_frame_lost(struct ic_server *s, struct conn *c, const struct ic_sim_info *i)
{
    if (!i->running)
        ic_conn_break_off(s, c);
}

static void send_frame(struct ic_server *s, struct conn *c, const struct ic_event *ev)
{
    const struct ic_sim_info *i = &ev->sim;
    struct ic_buf *b = begin_binary(s, "frame", i);

    ic_json_kstr(b, "view", ic_view_name(i->view.view));
    put_shape(b, i->frame.shape, i->frame.ndim);
    ic_json_kstr(b, "dtype", ic_view_encoding_name(i->frame.dtype));
    ic_json_knum(b, "min", (double)i->frame.min);
    ic_json_knum(b, "max", (double)i->frame.max);
    ic_json_kint(b, "lost", (int64_t)c->peer->frames_lost);
    if (i->has_metrics) {
        ic_json_key(b, "metrics");
        ic_law_metrics_json(b, &i->metrics);
    }
    finish_binary(b, ev->text, i->frame.bytes);
    if (b->failed || c->peer->vt->send(c->peer, IC_MSG_FRAME, b->data, b->len, ev->stamp_ns) == IC_OOM)
        ic_sim_frame_lost(s, c, i);
}

static void send_state(struct ic_server *s, struct conn *c, const struct ic_event *ev, const char *id)
{
    const struct ic_sim_info *i = &ev->sim;
    size_t shape[4] = {i->height, i->width, i->d, 2};
    struct ic_buf *b = begin_binary(s, "state", i);
    struct ic_err err = {0};

    if (*id)
        ic_json_kstr(b, "id", id);
    put_shape(b, shape, 4);
    if (ic_law_engine_law(s->law, i->law)->memory) {
        size_t memory[4] = {2, 4 * (size_t)ic_law_engine_law(s->law, i->law)->b, i->height / 4,
                            i->width / 4};
        put_shape_as(b, "memory_shape", memory, 4); /* h, then c, behind psi */
    }
    ic_json_kstr(b, "dtype", "f32");
    finish_binary(b, ev->text, ev->len);
    const enum ic_status st =
        b->failed ? IC_OOM : c->peer->vt->send(c->peer, IC_MSG_BINARY, b->data, b->len, 0);
    if (st == IC_OOM)
        ic_fail(&err, IC_OOM, "out of memory");
    else if (st != IC_OK)
        ic_fail(&err, IC_BUSY, "a state of %zu bytes does not fit beside what you have not read yet",
                ev->len);
    if (err.code != IC_OK)
        ic_conn_error(s, c, *id ? id : NULL, NULL, &err);
}

static void send_status(struct ic_server *s, struct conn *c, const struct ic_event *ev, const char *op,
                        const char *id)
{
    struct ic_buf *b = ic_reply(s, op);

    if (*id)
        ic_json_kstr(b, "id", id);
    put_sim(s, b, &ev->sim);
    ic_conn_send(s, c, 0);
}

void ic_sim_event(struct ic_server *s, struct conn *c, struct ic_event *ev)
{
    struct sim *m = ic_sim_of(s, c, ev->sim.sim);
    struct ic_err err = {0};
    char id[IC_ID_MAX + 1];

    ic_sim_end_call(c, ev->rid, id);
    if (c->doomed)
        return;
    if (!m) { /* it was closed while this was on its way; who asked for it is still answered */
        if (ev->kind == IC_EVENT_ERROR && c->dialect == DIALECT_NATIVE) {
            ic_fail(&err, ev->code, "%s", ev->text);
            ic_conn_error(s, c, *id ? id : NULL, NULL, &err);
        }
        return;
    }
    if (c->dialect == DIALECT_ATHERIA)
        ic_atheria_event(s, c, ev);
    if (ev->kind == IC_EVENT_ERROR && c->dialect == DIALECT_ATHERIA) {
        m->handle = m->made ? m->handle : 0;
        return;
    }
    if (ev->kind == IC_EVENT_ERROR) {
        const bool made = m->made;
        char name[SIM_ID_MAX + 1];
        snprintf(name, sizeof name, "sim_%llu", (unsigned long long)ev->sim.sim);
        if (!made)
            m->handle = 0;
        ic_fail(&err, ev->code, "%s", ev->text);
        ic_conn_error_about(s, c, *id ? id : NULL, "sim_id", made ? name : NULL, &err);
        return;
    }
    m->law = ev->sim.law;
    m->height = ev->sim.height;
    m->width = ev->sim.width;
    m->step = ev->sim.step;
    m->running = ev->sim.running;
    if (c->dialect == DIALECT_ATHERIA) {
        m->made = true;
        return;
    }
    switch (ev->kind) {
    case IC_EVENT_SIM_CREATED:
        m->made = true;
        send_status(s, c, ev, "sim_created", id);
        break;
    case IC_EVENT_SIM_STATUS: send_status(s, c, ev, "sim_status", id); break;
    case IC_EVENT_SIM_FRAME: send_frame(s, c, ev); break;
    case IC_EVENT_SIM_STATE: send_state(s, c, ev, id); break;
    case IC_EVENT_SIM_CLOSED:
        m->handle = 0;
        send_status(s, c, ev, "sim_closed", id);
        break;
    default: break;
    }
}

/* ---- for hello and /v1/laws --------------------------------------------------------------------- */

void ic_sim_put_limits(const struct ic_server *s, struct ic_buf *b)
{
    if (!s->law)
        return;
    ic_json_kint(b, "simulations", s->cfg.sims_max);
    ic_json_kint(b, "grid_side", s->cfg.grid_max);
    ic_json_kint(b, "steps", IC_SIM_STEPS_MAX);
    ic_json_kint(b, "sim_messages", IC_SIM_CALLS_MAX);
}

void ic_sim_put_law(const struct ic_server *s, unsigned i, struct ic_buf *b)
{
    const struct ic_law *l = ic_law_engine_law(s->law, i);

    ic_buf_puts(b, "{");
    ic_json_kstr(b, "name", l->name);
    ic_json_kstr(b, "architecture", ic_law_arch_info(l->arch)->name);
    ic_json_kint(b, "d_state", l->d);
    ic_json_kint(b, "hidden_channels", l->b);
    ic_json_kint(b, "parameters", (int64_t)l->params);
    ic_json_kstr(b, "precision", ic_law_engine_precision(s->law, i));
    ic_json_kint(b, "weight_bytes", (int64_t)l->weight_bytes);
    ic_json_knum(b, "gamma", (double)l->gamma);
    ic_json_kint(b, "grid_training", l->grid_training);
    ic_json_kint(b, "grid_multiple", l->grid_multiple);
    ic_json_kstr(b, "init", l->initial_mode);
    ic_json_kbool(b, "memory", l->memory);
    ic_buf_puts(b, "}");
}
