/* Atheria's dialect at /ws: what its own web client speaks (docs/protocol.md §2).
 *
 * In: {"scope","command","args"} or {"type":"scope.command","payload"}. Out: {"type","payload"}, and a frame as two
 * messages, a JSON header and then MessagePack. Every connection has a simulation of its own; "experiments" are the laws
 * that are loaded. What belongs to training or to things this server does not have is answered with a notification. */
#include "proto/internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "base/clock.h"
#include "proto/msgpack.h"

#define STEPS_PER_S 60.0 /* at speed 1, as Atheria's own loop */
#define FPS_DEFAULT 30.0
#define MAP_PLAIN_MAX 50000     /* values; a larger map goes compressed, as Atheria sends it */
#define FRAME_PENDING_MAX 65536 /* bytes unsent: the client is behind, this frame is left out */
#define METRICS_EVERY_NS (500 * IC_MS)
#define HEADER_ROOM 8192 /* of the outbox, for a frame's header and whatever else is said */
#define REGION_SIDE 256  /* at most, shown at first of a grid whose picture would not fit into the outbox */

struct atheria {
    uint64_t sim; /* handle, 0: none */
    const char *law;
    char viz[32];
    bool live, compress, roi_on;
    bool told; /* that this picture is too large to be sent */
    double speed, fps;
    int64_t frame_skip, interval;
    int64_t grid; /* for the next load; 0: the law's */
    char init[IC_LAW_MODE_MAX];
    bool has_gamma;
    double gamma;
    struct ic_view_roi roi;
    struct ic_law_metrics metrics; /* the last ones */
    bool has_metrics;
    int64_t fps_ns, fps_step; /* for the steps per second shown */
    double shown_fps;
};

/* ---- writing ------------------------------------------------------------------------------------------------- */

static struct ic_buf *begin(struct ic_server *s, const char *type)
{
    struct ic_buf *b = &s->out;

    ic_buf_clear(b);
    ic_buf_puts(b, "{");
    ic_json_kstr(b, "type", type);
    ic_json_key(b, "payload");
    ic_buf_puts(b, "{");
    return b;
}

static void send(struct ic_server *s, struct conn *c)
{
    ic_buf_puts(&s->out, "}"); /* the payload; ic_conn_send closes the message */
    ic_conn_send(s, c, 0);
}

static void notify(struct ic_server *s, struct conn *c, const char *status, const char *text)
{
    struct ic_buf *b = begin(s, "notification");

    ic_json_kstr(b, "status", status);
    ic_json_kstr(b, "message", text);
    send(s, c);
}

static void put_compile_status(struct ic_server *s, struct ic_buf *b, const struct atheria *a)
{
    ic_json_key(b, "compile_status");
    ic_buf_puts(b, "{");
    ic_json_kbool(b, "is_compiled", true);
    ic_json_kbool(b, "is_native", true);
    ic_json_kstr(b, "model_name", a->law);
    ic_json_kbool(b, "compiles_enabled", true);
    ic_json_kstr(b, "device_str", "cpu");
    ic_json_kstr(b, "native_version", IC_VERSION);
    ic_json_kstr(b, "wrapper_version", IC_VERSION);
    ic_json_kstr(b, "engine_type", "CARTESIAN");
    ic_buf_puts(b, "}");
    (void)s;
}

static void put_experiment(struct ic_server *s, struct ic_buf *b, unsigned i)
{
    const struct ic_law *l = ic_law_engine_law(s->law, i);

    ic_buf_puts(b, "{");
    ic_json_kstr(b, "name", l->name);
    ic_json_kstr(b, "model_architecture", ic_law_arch_info(l->arch)->name);
    ic_json_kint(b, "grid_size_training", l->grid_training);
    ic_json_kint(b, "qca_steps_training", l->steps_training);
    ic_json_kint(b, "total_episodes", l->episode < 0 ? 0 : l->episode);
    ic_json_kint(b, "lr_rate_m", 0);
    ic_json_kbool(b, "has_checkpoint", true);
    ic_json_key(b, "config");
    ic_buf_puts(b, "{");
    ic_json_kstr(b, "EXPERIMENT_NAME", l->name);
    ic_json_kstr(b, "MODEL_ARCHITECTURE", ic_law_arch_info(l->arch)->name);
    ic_json_kint(b, "GRID_SIZE_TRAINING", l->grid_training);
    ic_json_kint(b, "QCA_STEPS_TRAINING", l->steps_training);
    ic_json_knum(b, "GAMMA_DECAY", (double)l->gamma);
    ic_json_kstr(b, "INITIAL_STATE_MODE_INFERENCE", l->initial_mode);
    ic_json_key(b, "MODEL_PARAMS");
    ic_buf_printf(b, "{\"d_state\":%u,\"hidden_channels\":%u}", l->d, l->b);
    ic_buf_puts(b, "}}");
}

static void put_experiments(struct ic_server *s, struct ic_buf *b)
{
    ic_json_key(b, "experiments");
    ic_buf_puts(b, "[");
    for (unsigned i = 0; s->law && i < ic_law_engine_count(s->law); i++) {
        if (i)
            ic_buf_puts(b, ",");
        put_experiment(s, b, i);
    }
    ic_buf_puts(b, "]");
}

static void put_info(struct ic_server *s, struct ic_buf *b, const struct atheria *a,
                     const struct ic_sim_info *i)
{
    const struct ic_law *l = ic_law_engine_law(s->law, i->law);

    ic_json_key(b, "simulation_info");
    ic_buf_puts(b, "{");
    ic_json_kint(b, "step", i->step + l->initial_step);
    ic_json_kbool(b, "is_paused", !i->running);
    ic_json_kbool(b, "live_feed_enabled", a->live);
    ic_json_kint(b, "initial_step", l->initial_step);
    ic_json_kint(b, "checkpoint_step", l->initial_step);
    ic_json_kint(b, "checkpoint_episode", l->episode < 0 ? 0 : l->episode);
    ic_json_kint(b, "training_grid_size", l->grid_training);
    ic_json_kint(b, "inference_grid_size", i->height);
    ic_json_kbool(b, "grid_scaled", l->grid_training && l->grid_training != i->height);
    ic_json_knum(b, "gamma_decay", i->gamma);
    ic_buf_puts(b, "}");
}

static void send_status(struct ic_server *s, struct conn *c, const struct ic_sim_info *i)
{
    struct ic_buf *b = begin(s, "inference_status_update");

    ic_json_kstr(b, "status", !i ? "idle" : i->running ? "running" : "paused");
    if (i) {
        ic_json_kint(b, "step", i->step + ic_law_engine_law(s->law, i->law)->initial_step);
        put_info(s, b, c->atheria, i);
    }
    put_compile_status(s, b, c->atheria);
    send(s, c);
}

/* ---- frames ---------------------------------------------------------------------------------------------------- */

static const float *floats(const struct ic_event *ev, float **copy, size_t offset, size_t n)
{
    free(*copy);
    *copy = malloc(n * sizeof **copy + 1);
    if (*copy)
        memcpy(*copy, ev->text + offset, n * sizeof **copy);
    return *copy;
}

static void put_rows(struct ic_buf *b, const float *v, size_t h, size_t w, size_t channels)
{
    ic_mp_array(b, (uint32_t)h);
    for (size_t y = 0; y < h; y++) {
        ic_mp_array(b, (uint32_t)w);
        for (size_t x = 0; x < w; x++, v += channels) {
            if (channels > 1)
                ic_mp_array(b, (uint32_t)channels);
            for (size_t k = 0; k < channels; k++)
                ic_mp_f32(b, v[k]);
        }
    }
}

static void put_base64(struct ic_buf *b, const unsigned char *p, size_t n)
{
    ic_mp_be(b, 0xDB, (n + 2) / 3 * 4, 4);
    ic_buf_base64(b, p, n);
}

/* zlib at level 6, malloc'd; 0: no memory. */
static size_t deflated(const void *data, size_t len, unsigned char **out)
{
    uLongf n = compressBound(len);

    *out = malloc(n);
    if (*out && compress2(*out, &n, data, len, 6) == Z_OK)
        return n;
    free(*out);
    *out = NULL;
    return 0;
}

/* {data: base64(zlib(float32)), shape, dtype, compressed}: only for [h,w], since the client rebuilds no more. */
static bool put_compressed(struct ic_buf *b, const float *v, size_t h, size_t w)
{
    unsigned char *z = NULL;
    size_t n = deflated(v, h * w * sizeof *v, &z);

    if (!n)
        return false;
    ic_mp_map(b, 4);
    ic_mp_str(b, "data");
    put_base64(b, z, n);
    ic_mp_str(b, "shape");
    ic_mp_array(b, 2);
    ic_mp_int(b, (int64_t)h);
    ic_mp_int(b, (int64_t)w);
    ic_mp_str(b, "dtype");
    ic_mp_str(b, "float32");
    ic_mp_str(b, "compressed");
    ic_mp_bool(b, true);
    free(z);
    return true;
}

static void put_map(struct ic_buf *b, const struct atheria *a, const struct ic_view_frame *f,
                    const float *v)
{
    size_t channels = f->ndim > 2 ? f->shape[2] : 1;

    if (a->compress && channels == 1 && f->shape[0] * f->shape[1] > MAP_PLAIN_MAX &&
        put_compressed(b, v, f->shape[0], f->shape[1]))
        return;
    put_rows(b, v, f->shape[0], f->shape[1], channels);
}

static void put_named_rows(struct ic_buf *b, const char *const *names, unsigned n, const float *v, size_t h,
                           size_t w)
{
    ic_mp_map(b, n);
    for (unsigned i = 0; i < n; i++) {
        ic_mp_str(b, names[i]);
        put_rows(b, v + i * h * w, h, w, 1);
    }
}

static void put_attractor(struct ic_buf *b, const float *v)
{
    static const char *const names[] = {"real", "imag", "abs"};

    ic_mp_map(b, 2);
    for (int k = 0; k < 2; k++) {
        ic_mp_str(b, k ? "channel_1" : "channel_0");
        ic_mp_map(b, 3);
        for (int i = 0; i < 3; i++) {
            ic_mp_str(b, names[i]);
            ic_mp_f32(b, v[3 * k + i]);
        }
    }
}

/* The extras of a frame, under the names of the client; an absent one is null. Eight keys. */
static void put_extras(struct ic_buf *b, const struct ic_event *ev)
{
    static const char *const hsv[] = {"hue", "value"}, *const complex[] = {"real", "imag"},
                             *const flow[] = {"dx", "dy", "magnitude"};
    const struct ic_sim_info *i = &ev->sim;
    size_t at = i->frame.bytes, cells = (size_t)i->height * i->width;
    float *copy = NULL;
    const float *v;

#define EXTRA(bit, key, n, put)                                                                            \
    ic_mp_str(b, key);                                                                                     \
    if ((i->extras & (bit)) && (v = floats(ev, &copy, at, (n)))) {                                         \
        put;                                                                                               \
        at += (n) * sizeof(float);                                                                         \
    } else {                                                                                               \
        ic_mp_nil(b);                                                                                      \
    }
    EXTRA(IC_EXTRA_HSV, "phase_hsv_data", 2 * cells, put_named_rows(b, hsv, 2, v, i->height, i->width))
    EXTRA(IC_EXTRA_COMPLEX, "complex_3d_data", 2 * cells,
          put_named_rows(b, complex, 2, v, i->height, i->width))
    EXTRA(IC_EXTRA_FLOW, "flow_data", 3 * cells, put_named_rows(b, flow, 3, v, i->height, i->width))
    EXTRA(IC_EXTRA_ATTRACTOR, "phase_attractor", (size_t)6, put_attractor(b, v))
    EXTRA(IC_EXTRA_POINCARE, "poincare_coords", 2 * i->n_poincare, put_rows(b, v, i->n_poincare, 2, 1))
#undef EXTRA
    free(copy);
}

static void put_frame_info(struct ic_server *s, struct ic_buf *b, const struct atheria *a,
                           const struct ic_sim_info *i)
{
    const struct ic_law *l = ic_law_engine_law(s->law, i->law);

    ic_mp_str(b, "simulation_info");
    ic_mp_map(b, 9);
    ic_mp_str(b, "step");
    ic_mp_int(b, i->step + l->initial_step);
    ic_mp_str(b, "is_paused");
    ic_mp_bool(b, !i->running);
    ic_mp_str(b, "live_feed_enabled");
    ic_mp_bool(b, a->live);
    ic_mp_str(b, "fps");
    ic_mp_f64(b, a->shown_fps);
    ic_mp_str(b, "initial_step");
    ic_mp_int(b, l->initial_step);
    ic_mp_str(b, "training_grid_size");
    ic_mp_int(b, l->grid_training);
    ic_mp_str(b, "inference_grid_size");
    ic_mp_int(b, i->height);
    ic_mp_str(b, "epoch");
    ic_mp_int(b, a->has_metrics ? (int64_t)a->metrics.epoch : 0);
    ic_mp_str(b, "epoch_metrics");
    ic_mp_map(b, 3);
    const double v[] = {a->metrics.energy, a->metrics.clustering, a->metrics.symmetry};
    static const char *const names[] = {"energy", "clustering", "symmetry"};
    for (int k = 0; k < 3; k++) {
        ic_mp_str(b, names[k]);
        ic_mp_f64(b, a->has_metrics && isfinite(v[k]) ? v[k] : 0);
    }
}

static void count_fps(struct atheria *a, const struct ic_event *ev)
{
    int64_t dt = ev->stamp_ns - a->fps_ns;

    if (!a->fps_ns || ev->sim.step < a->fps_step || dt > 5000 * IC_MS) {
        a->fps_ns = ev->stamp_ns;
        a->fps_step = ev->sim.step;
        a->shown_fps = 0;
    } else if (dt >= 500 * IC_MS) {
        a->shown_fps = (double)(ev->sim.step - a->fps_step) * 1e9 / (double)dt;
        a->fps_ns = ev->stamp_ns;
        a->fps_step = ev->sim.step;
    }
}

static void send_frame(struct ic_server *s, struct conn *c, const struct ic_event *ev)
{
    struct atheria *a = c->atheria;
    const struct ic_sim_info *i = &ev->sim;
    struct ic_buf body = {0}, *b = &body;
    float *map = NULL;

    if (i->has_metrics) {
        a->metrics = i->metrics;
        a->has_metrics = true;
    }
    count_fps(a, ev);
    /* A header without its body would be taken for the header of the next one: both or neither. A client that is behind
     * gets neither, and then the newest frame instead of a queue of old ones. */
    if (c->peer->vt->pending(c->peer) > FRAME_PENDING_MAX)
        return;
    if (!floats(ev, &map, 0, i->frame.bytes / sizeof(float))) {
        ic_sim_frame_lost(s, c, i);
        return;
    }
    ic_mp_map(b, 10);
    ic_mp_str(b, "step");
    ic_mp_int(b, i->step + ic_law_engine_law(s->law, i->law)->initial_step);
    ic_mp_str(b, "timestamp");
    ic_mp_f64(b, (double)ev->stamp_ns * 1e-9); /* only ever grows; the client drops what is older */
    ic_mp_str(b, "map_data");
    put_map(b, a, &i->frame, map);
    ic_mp_str(b, "hist_data");
    ic_mp_map(b, 0);
    put_extras(b, ev);
    put_frame_info(s, b, a, i);
    free(map);
    size_t room = s->cfg.outbox_max - HEADER_ROOM;
    if (body.failed)
        ic_sim_frame_lost(s, c, i);
    if (!body.failed && body.len > room && !a->told) {
        char text[160];
        a->told = true;
        snprintf(text, sizeof text,
                 "This picture takes %zu bytes, this server sends at most %zu: choose a region", body.len,
                 room);
        notify(s, c, "warning", text);
    }
    if (!body.failed && body.len <= room && c->peer->vt->pending(c->peer) <= room - body.len) {
        struct ic_buf *h = &s->out;
        ic_buf_clear(h);
        ic_buf_printf(h, "{\"type\":\"simulation_frame_binary\",\"format\":\"msgpack\",\"size\":%zu",
                      body.len);
        ic_conn_send(s, c, 0);
        if (!c->doomed &&
            c->peer->vt->send(c->peer, IC_MSG_BINARY, body.data, body.len, ev->stamp_ns) == IC_OOM)
            ic_conn_break_off(s, c); /* it was announced */
    }
    ic_buf_deinit(&body);
}

/* ---- the simulation ---------------------------------------------------------------------------------------------- */

/* Atheria's names of pictures: what map they show and what comes beside it. Unknown names show the density. */
static void look(const struct atheria *a, struct ic_sim_opts *o)
{
    static const struct {
        const char *name;
        enum ic_view view;
        unsigned extras;
    } looks[] = {
        {"phase_hsv", IC_VIEW_PHASE, IC_EXTRA_HSV},
        {"flow", IC_VIEW_DENSITY, IC_EXTRA_FLOW},
        {"poincare", IC_VIEW_DENSITY, IC_EXTRA_POINCARE},
        {"poincare_3d", IC_VIEW_DENSITY, IC_EXTRA_POINCARE},
        {"complex_3d", IC_VIEW_DENSITY, IC_EXTRA_COMPLEX},
        {"phase_attractor", IC_VIEW_DENSITY, IC_EXTRA_ATTRACTOR},
    };

    o->set |= IC_SET_VIEW | IC_SET_EXTRAS | IC_SET_ENCODING;
    o->encoding = IC_VIEW_F32;
    o->view = IC_VIEW_DENSITY;
    o->extras = 0;
    for (size_t i = 0; i < sizeof looks / sizeof *looks; i++)
        if (!strcmp(a->viz, looks[i].name)) {
            o->view = looks[i].view;
            o->extras = looks[i].extras;
            return;
        }
    if (ic_view_parse(a->viz, &o->view, NULL) != IC_OK)
        o->view = IC_VIEW_DENSITY;
}

static void pace(const struct atheria *a, struct ic_sim_opts *o)
{
    o->set |= IC_SET_RATE | IC_SET_FPS | IC_SET_EVERY | IC_SET_FRAMES;
    o->rate = a->interval == -1 ? 0 : STEPS_PER_S * a->speed;
    o->fps = a->fps;
    o->every = (a->interval > 0 ? a->interval : 1) * (a->frame_skip + 1);
    o->frames = a->live && a->interval != -1;
}

static bool command(struct ic_server *s, struct conn *c, struct ic_sim_cmd *cmd)
{
    struct ic_err err = {0};

    cmd->owner = ic_owner_of(c->peer);
    if (!s->law)
        ic_fail(&err, IC_UNAVAILABLE, "this server has no laws");
    else if (s->draining && cmd->op == IC_SIM_CREATE)
        ic_fail(&err, IC_UNAVAILABLE, "the server is shutting down");
    else if (cmd->op == IC_SIM_CLOSE) /* never refused: nobody else would */
        ic_law_engine_command(s->law, cmd, &err);
    else if (ic_sim_keep_call(s, c, "", &cmd->rid, &err) == IC_OK &&
             ic_law_engine_command(s->law, cmd, &err) != IC_OK)
        ic_sim_end_call(c, cmd->rid, NULL);
    if (err.code != IC_OK)
        notify(s, c, "error", err.msg);
    if (err.code == IC_OOM && cmd->op == IC_SIM_CLOSE)
        ic_conn_break_off(s, c); /* which ends it */
    return err.code == IC_OK;
}

/* A command on the simulation of this connection; without one the client is told to load. */
static bool on_sim(struct ic_server *s, struct conn *c, struct ic_sim_cmd *cmd)
{
    struct atheria *a = c->atheria;

    if (!a->sim) {
        notify(s, c, "warning", "No experiment is loaded");
        return false;
    }
    cmd->sim = a->sim;
    return command(s, c, cmd);
}

static void set(struct ic_server *s, struct conn *c, const struct ic_sim_opts *o)
{
    struct ic_sim_cmd cmd = {.op = IC_SIM_SET, .opts = *o};
    if (((struct atheria *)c->atheria)->sim)
        on_sim(s, c, &cmd);
}

static void unload(struct ic_server *s, struct conn *c)
{
    struct atheria *a = c->atheria;
    struct ic_sim_cmd cmd = {.op = IC_SIM_CLOSE, .sim = a->sim};

    if (a->sim) {
        struct sim *m = ic_sim_of(s, c, a->sim);
        if (m)
            m->handle = 0; /* nothing that is still on its way counts */
        command(s, c, &cmd);
    }
    a->sim = 0;
    a->law = NULL;
    a->has_metrics = false;
}

static void send_roi(struct ic_server *s, struct conn *c, const struct sim *m)
{
    const struct atheria *a = c->atheria;
    int64_t total = (int64_t)m->width * m->height,
            area = a->roi_on ? (int64_t)(a->roi.w * a->roi.h) : total;
    struct ic_buf *b = begin(s, "roi_status_update");

    ic_json_kbool(b, "enabled", a->roi_on);
    ic_json_kint(b, "x", (int64_t)a->roi.x);
    ic_json_kint(b, "y", (int64_t)a->roi.y);
    ic_json_kint(b, "width", a->roi_on ? (int64_t)a->roi.w : m->width);
    ic_json_kint(b, "height", a->roi_on ? (int64_t)a->roi.h : m->height);
    ic_json_kint(b, "area", area);
    ic_json_kint(b, "total_area", total);
    ic_json_knum(b, "reduction_ratio", 1 - (double)area / (double)total);
    send(s, c);
}

static void load(struct ic_server *s, struct conn *c, const json_t *args)
{
    struct atheria *a = c->atheria;
    struct ic_sim_cmd cmd = {.op = IC_SIM_CREATE};
    struct ic_err err = {0};
    const char *name = NULL;
    int64_t grid = a->grid;

    if (ic_field_str(args, "experiment_name", IC_LAW_NAME_MAX, &name, &err) != IC_OK ||
        ic_field_int(args, "grid_size", 1, s->cfg.grid_max, &grid, &err) != IC_OK) {
        notify(s, c, "error", err.msg);
        return;
    }
    int i = !s->law ? -1 : name ? ic_law_engine_find(s->law, name) : ic_law_engine_count(s->law) ? 0 : -1;
    if (i < 0) {
        notify(s, c, "error", "There is no such experiment here");
        return;
    }
    unload(s, c);
    const struct ic_law *l = ic_law_engine_law(s->law, (unsigned)i);
    if (!ic_sim_make_room(s, c)) {
        notify(s, c, "error", "out of memory");
        return;
    }
    cmd.law = (unsigned)i;
    cmd.height = cmd.width = (unsigned)(grid ? grid : l->grid_training ? l->grid_training : 128);
    cmd.sim = ++s->last_sim;
    cmd.opts.set = IC_SET_INIT | IC_SET_SEED | IC_SET_METRICS;
    cmd.opts.metrics = true;
    cmd.opts.metrics_ns = METRICS_EVERY_NS;
    if (ic_law_init_parse(*a->init ? a->init : l->initial_mode, &cmd.opts.init, NULL) != IC_OK)
        cmd.opts.init = IC_LAW_INIT_COMPLEX_NOISE;
    cmd.opts.seed = ic_sim_seed(s->last_rid);
    if (a->has_gamma) {
        cmd.opts.set |= IC_SET_GAMMA;
        cmd.opts.gamma = a->gamma;
    }
    look(a, &cmd.opts);
    pace(a, &cmd.opts);
    a->roi = (struct ic_view_roi){0};
    a->roi_on = false;
    a->told = false;
    size_t side = cmd.width;
    while (side * side * (sizeof(float) + 1) > s->cfg.outbox_max - HEADER_ROOM)
        side = side > REGION_SIDE ? REGION_SIDE : side / 2;
    if (side < cmd.width) {
        a->roi = (struct ic_view_roi){(cmd.width - side) / 2, (cmd.height - side) / 2, side, side};
        a->roi_on = true;
        cmd.opts.set |= IC_SET_ROI;
        cmd.opts.roi = a->roi;
    }
    if (command(s, c, &cmd)) {
        c->sims[0] =
            (struct sim){.handle = cmd.sim, .law = cmd.law, .width = cmd.width, .height = cmd.height};
        a->sim = cmd.sim;
        a->law = l->name;
        if (a->roi_on)
            send_roi(s, c, &c->sims[0]);
    }
}

/* ---- commands -------------------------------------------------------------------------------------------------------- */

static void do_load(struct ic_server *s, struct conn *c, const json_t *args)
{
    load(s, c, args);
}

static void do_play(struct ic_server *s, struct conn *c, const json_t *args)
{
    struct ic_sim_cmd cmd = {.op = IC_SIM_RUN};
    (void)args;
    on_sim(s, c, &cmd);
}

static void do_pause(struct ic_server *s, struct conn *c, const json_t *args)
{
    struct ic_sim_cmd cmd = {.op = IC_SIM_PAUSE};
    (void)args;
    on_sim(s, c, &cmd);
}

static void do_unload(struct ic_server *s, struct conn *c, const json_t *args)
{
    (void)args;
    unload(s, c);
    send_status(s, c, NULL);
}

static void do_reset(struct ic_server *s, struct conn *c, const json_t *args)
{
    struct atheria *a = c->atheria;
    struct ic_sim_cmd cmd = {.op = IC_SIM_RESET, .opts = {.set = IC_SET_SEED}};

    (void)args;
    cmd.opts.seed = ic_sim_seed(s->last_rid);
    if (*a->init && ic_law_init_parse(a->init, &cmd.opts.init, NULL) == IC_OK)
        cmd.opts.set |= IC_SET_INIT;
    on_sim(s, c, &cmd);
}

static void do_config(struct ic_server *s, struct conn *c, const json_t *args)
{
    struct atheria *a = c->atheria;
    struct ic_err err = {0};
    const char *init = NULL;
    enum ic_law_init_mode mode;
    double gamma = NAN;
    int64_t grid = a->grid; /* taken only with the rest */
    struct ic_buf *b;

    if (ic_field_int(args, "grid_size", 1, s->cfg.grid_max, &grid, &err) != IC_OK ||
        ic_field_str(args, "initial_state_mode", IC_LAW_MODE_MAX - 1, &init, &err) != IC_OK ||
        ic_field_num(args, "gamma_decay", -1e9, 1e9, &gamma, &err) != IC_OK ||
        (init && ic_law_init_parse(init, &mode, &err) != IC_OK)) {
        notify(s, c, "error", err.msg);
        return;
    }
    a->grid = grid;
    if (init)
        snprintf(a->init, sizeof a->init, "%s", init);
    if (!isnan(gamma)) {
        a->has_gamma = true;
        a->gamma = gamma < 0 ? 0 : gamma > 10 ? 10 : gamma;
        set(s, c, &(struct ic_sim_opts){.set = IC_SET_GAMMA, .gamma = a->gamma});
    }
    b = begin(s, "inference_config_update");
    if (a->grid)
        ic_json_kint(b, "grid_size", a->grid);
    if (*a->init)
        ic_json_kstr(b, "initial_state_mode", a->init);
    if (a->has_gamma)
        ic_json_knum(b, "gamma_decay", a->gamma);
    send(s, c);
}

static void do_viz(struct ic_server *s, struct conn *c, const json_t *args)
{
    struct atheria *a = c->atheria;
    struct ic_sim_opts o = {0};
    struct ic_err err = {0};
    const char *viz = NULL;

    if (ic_field_str(args, "viz_type", sizeof a->viz - 1, &viz, &err) != IC_OK || !viz) {
        notify(s, c, "error", err.code ? err.msg : "viz_type is missing");
        return;
    }
    a->told = false;
    snprintf(a->viz, sizeof a->viz, "%s", viz);
    look(a, &o);
    set(s, c, &o);
}

/* A command that sets one number and is answered with one. */
static void do_number(struct ic_server *s, struct conn *c, const json_t *args, const char *key, double lo,
                      double hi, double *place, const char *answer)
{
    struct ic_sim_opts o = {0};
    struct ic_err err = {0};
    double v = *place;

    if (ic_field_num(args, key, -1e12, 1e12, &v, &err) != IC_OK) {
        notify(s, c, "error", err.msg);
        return;
    }
    *place = v < lo ? lo : v > hi ? hi : v; /* Atheria clamps */
    pace(c->atheria, &o);
    set(s, c, &o);
    ic_json_knum(begin(s, answer), key, *place);
    send(s, c);
}

static void do_speed(struct ic_server *s, struct conn *c, const json_t *args)
{
    do_number(s, c, args, "speed", 0.1, 100, &((struct atheria *)c->atheria)->speed,
              "simulation_speed_update");
}

static void do_fps(struct ic_server *s, struct conn *c, const json_t *args)
{
    do_number(s, c, args, "fps", 0.1, 120, &((struct atheria *)c->atheria)->fps, "simulation_fps_update");
}

static void do_skip(struct ic_server *s, struct conn *c, const json_t *args)
{
    struct atheria *a = c->atheria;
    struct ic_sim_opts o = {0};
    struct ic_err err = {0};

    if (ic_field_int(args, "skip", 0, 10, &a->frame_skip, &err) != IC_OK) {
        notify(s, c, "error", err.msg);
        return;
    }
    pace(a, &o);
    set(s, c, &o);
    ic_json_kint(begin(s, "simulation_frame_skip_update"), "frame_skip", a->frame_skip);
    ic_json_kint(&s->out, "skip", a->frame_skip);
    send(s, c);
}

static void do_live_feed(struct ic_server *s, struct conn *c, const json_t *args)
{
    struct atheria *a = c->atheria;
    struct ic_sim_opts o = {0};

    ic_field_bool(args, "enabled", &a->live, NULL);
    pace(a, &o);
    set(s, c, &o);
    ic_json_kbool(begin(s, "live_feed_status_update"), "enabled", a->live);
    send(s, c);
}

static void do_interval(struct ic_server *s, struct conn *c, const json_t *args)
{
    struct atheria *a = c->atheria;
    struct ic_sim_opts o = {0};
    struct ic_err err = {0};

    if (ic_field_int(args, "interval", -1, 1000000, &a->interval, &err) != IC_OK) {
        notify(s, c, "error", err.msg);
        return;
    }
    pace(a, &o);
    set(s, c, &o);
    ic_json_kint(begin(s, "steps_interval_update"), "interval", a->interval);
    send(s, c);
}

static void do_compression(struct ic_server *s, struct conn *c, const json_t *args)
{
    struct atheria *a = c->atheria;

    ic_field_bool(args, "enabled", &a->compress, NULL);
    ic_json_kbool(begin(s, "compression_status_update"), "enabled", a->compress);
    send(s, c);
}

static void do_downsample(struct ic_server *s, struct conn *c, const json_t *args)
{
    (void)args; /* maps are sent whole: the client scales them itself */
    ic_json_kint(begin(s, "downsample_status_update"), "factor", 1);
    send(s, c);
}

static void do_roi(struct ic_server *s, struct conn *c, const json_t *args)
{
    struct atheria *a = c->atheria;
    struct ic_err err = {0};
    struct sim *m = a->sim ? ic_sim_of(s, c, a->sim) : NULL;
    const char *action = NULL;
    bool on = true;
    int64_t x = 0, y = 0, w = 0, h = 0;

    ic_field_str(args, "action", 16, &action, NULL);
    ic_field_bool(args, "enabled", &on, NULL);
    if (action && (!strcmp(action, "clear") || !strcmp(action, "disable") || !strcmp(action, "reset")))
        on = false;
    if (!m || !m->made) {
        notify(s, c, "warning", "No experiment is loaded");
        return;
    }
    if (ic_field_int(args, "x", 0, IC_LAW_GRID_MAX, &x, &err) != IC_OK ||
        ic_field_int(args, "y", 0, IC_LAW_GRID_MAX, &y, &err) != IC_OK ||
        ic_field_int(args, "width", 0, IC_LAW_GRID_MAX, &w, &err) != IC_OK ||
        ic_field_int(args, "height", 0, IC_LAW_GRID_MAX, &h, &err) != IC_OK ||
        (on && (x + w > m->width || y + h > m->height || (!w != !h)))) {
        notify(s, c, "error", err.code ? err.msg : "The region must lie inside the grid");
        return;
    }
    a->roi_on = on && w;
    a->roi = a->roi_on ? (struct ic_view_roi){(size_t)x, (size_t)y, (size_t)w, (size_t)h}
                       : (struct ic_view_roi){0};
    a->told = false;
    set(s, c, &(struct ic_sim_opts){.set = IC_SET_ROI, .roi = a->roi});
    send_roi(s, c, m);
}

static void apply_tool(struct ic_server *s, struct conn *c, const char *tool, const char *type,
                       const json_t *args)
{
    struct ic_sim_cmd cmd = {.op = IC_SIM_TOOL};
    struct ic_err err = {0};
    const char *key;
    json_t *v;

    ic_law_tool_args_init(&cmd.tool_args);
    if (ic_law_tool_parse(tool, &cmd.tool, &err) != IC_OK ||
        (type && ic_law_inject_parse(type, &cmd.tool_args.type, &err) != IC_OK)) {
        notify(s, c, "error", err.msg);
        return;
    }
    json_object_foreach((json_t *)args, key, v) if (json_is_number(v))
    {
        enum ic_status st = ic_law_tool_arg_set(&cmd.tool_args, key, json_number_value(v), &err);
        if (st != IC_OK && st != IC_NOT_FOUND) {
            notify(s, c, "error", err.msg);
            return;
        }
    }
    cmd.tool_args.seed = ++s->last_rid;
    on_sim(s, c, &cmd);
}

static void do_tool(struct ic_server *s, struct conn *c, const json_t *args)
{
    const json_t *params = json_object_get(args, "params");
    apply_tool(s, c, json_string_value(json_object_get(args, "action")), NULL,
               json_is_object(params) ? params : args);
}

static void do_inject(struct ic_server *s, struct conn *c, const json_t *args)
{
    apply_tool(s, c, "inject_energy", json_string_value(json_object_get(args, "type")), args);
}

static void do_experiments(struct ic_server *s, struct conn *c, const json_t *args)
{
    (void)args;
    put_experiments(s, begin(s, "experiments_updated"));
    send(s, c);
}

static void do_training(struct ic_server *s, struct conn *c, const json_t *args)
{
    (void)args;
    notify(s, c, "info", "This server runs laws; it does not train them");
}

static void do_shutdown(struct ic_server *s, struct conn *c, const json_t *args)
{
    (void)args;
    notify(s, c, "warning", "A client may not stop this server");
}

static void do_nothing(struct ic_server *s, struct conn *c, const json_t *args)
{
    (void)s;
    (void)c;
    (void)args;
}

static void do_absent(struct ic_server *s, struct conn *c, const json_t *args)
{
    (void)args;
    notify(s, c, "info", "This server does not have that");
}

static const struct {
    const char *scope, *command; /* command NULL: every other one of the scope */
    void (*run)(struct ic_server *, struct conn *, const json_t *);
} commands[] = {
    {"inference", "load_experiment", do_load},
    {"inference", "play", do_play},
    {"inference", "pause", do_pause},
    {"inference", "unload_model", do_unload},
    {"inference", "unload", do_unload},
    {"inference", "reset", do_reset},
    {"inference", "set_config", do_config},
    {"inference", "set_inference_config", do_config},
    {"inference", "set_viz", do_viz},
    {"inference", "set_roi_mode", do_roi},
    {"inference", "tool_action", do_tool},
    {"inference", "apply_tool", do_tool},
    {"inference", "inject_energy", do_inject},
    {"inference", NULL, do_absent},
    {"simulation", "set_viz", do_viz},
    {"simulation", "update_visualization", do_viz},
    {"simulation", "set_speed", do_speed},
    {"simulation", "set_fps", do_fps},
    {"simulation", "set_frame_skip", do_skip},
    {"simulation", "set_live_feed", do_live_feed},
    {"simulation", "set_steps_interval", do_interval},
    {"simulation", "set_compression", do_compression},
    {"simulation", "set_downsample", do_downsample},
    {"simulation", "set_roi", do_roi},
    {"simulation", NULL, do_absent},
    {"experiment", "refresh_experiments", do_experiments},
    {"experiment", NULL, do_training},
    {"system", "refresh_experiments", do_experiments},
    {"system", "shutdown", do_shutdown},
    {"system", "toggle_logs", do_nothing},
    {"server", "shutdown", do_shutdown},
    {"analysis", NULL, do_absent},
    {"history", NULL, do_absent},
    {"snapshot", NULL, do_absent},
};

static void dispatch(struct ic_server *s, struct conn *c, const char *scope, const char *name,
                     const json_t *args)
{
    char text[160];

    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        if (!strcmp(scope, commands[i].scope) &&
            (!commands[i].command || !strcmp(name, commands[i].command))) {
            commands[i].run(s, c, args);
            return;
        }
    snprintf(text, sizeof text, "Unknown command: %.40s.%.40s", scope, name);
    notify(s, c, "error", text);
}

void ic_atheria_message(struct ic_server *s, struct conn *c, const char *data, size_t len)
{
    struct ic_err err = {0};
    json_t *o = ic_json_object(data, len, &err), *args, *empty = NULL;
    const char *scope, *name, *type;
    char split[64];

    if (!o) {
        notify(s, c, "error", err.msg);
        return;
    }
    scope = json_string_value(json_object_get(o, "scope"));
    name = json_string_value(json_object_get(o, "command"));
    args = json_object_get(o, "args");
    if (!scope && (type = json_string_value(json_object_get(o, "type"))) && strlen(type) < sizeof split) {
        char *dot = strchr(strcpy(split, type), '.');
        if (dot) {
            *dot = 0;
            scope = split;
            name = dot + 1;
            args = json_object_get(o, "payload");
        }
    }
    if (!json_is_object(args))
        args = empty = json_object();
    if (scope && name && args)
        dispatch(s, c, scope, name, args);
    else
        notify(s, c, "error", "A command has a scope and a command, or a type \"scope.command\"");
    json_decref(empty);
    json_decref(o);
}

/* ---- life and events -------------------------------------------------------------------------------------------------- */

bool ic_atheria_open(struct ic_server *s, struct conn *c)
{
    struct atheria *a = calloc(1, sizeof *a);

    if (!a)
        return false;
    *a = (struct atheria){
        .viz = "density", .live = true, .compress = true, .speed = 1, .fps = FPS_DEFAULT, .interval = 1};
    c->atheria = a;
    c->dialect = DIALECT_ATHERIA;
    struct ic_buf *b = begin(s, "initial_state");
    put_experiments(s, b);
    ic_json_kstr(b, "training_status", "idle");
    ic_json_kstr(b, "inference_status", "paused");
    put_compile_status(s, b, a);
    ic_json_kstr(b, "active_experiment", NULL);
    send(s, c);
    return true;
}

void ic_atheria_event(struct ic_server *s, struct conn *c, const struct ic_event *ev)
{
    struct atheria *a = c->atheria;

    if (ev->sim.sim != a->sim && ev->kind != IC_EVENT_ERROR)
        return;
    switch (ev->kind) {
    case IC_EVENT_SIM_CREATED: {
        char text[IC_LAW_NAME_MAX + 64];
        struct ic_sim_cmd cmd = {.op = IC_SIM_SET}; /* an empty change of view: draws the first frame */
        snprintf(text, sizeof text, "Experiment %s is loaded", a->law);
        send_status(s, c, &ev->sim);
        notify(s, c, "success", text);
        look(a, &cmd.opts);
        on_sim(s, c, &cmd);
        break;
    }
    case IC_EVENT_SIM_STATUS: send_status(s, c, &ev->sim); break;
    case IC_EVENT_SIM_FRAME: send_frame(s, c, ev); break;
    case IC_EVENT_ERROR:
        if (ev->sim.sim == a->sim && c->sims && !c->sims[0].made) {
            a->sim = 0;
            a->law = NULL;
        }
        notify(s, c, "error", ev->text);
        break;
    default: break;
    }
}
