#include "law/tools.h"

#include <math.h>
#include <string.h>

#include "law/init.h"

#define PI 3.14159265358979323846

/* ---- Names and numbers ---- */

static const char *const tool_names[] = {
#define X(symbol, name, help) name,
    IC_LAW_TOOL_TABLE(X)
#undef X
};
static const char *const tool_helps[] = {
#define X(symbol, name, help) help,
    IC_LAW_TOOL_TABLE(X)
#undef X
};
static const char *const inject_names[] = {
#define X(symbol, name) name,
    IC_LAW_INJECT_TABLE(X)
#undef X
};
static const struct {
    const char *name;
    size_t offset;
    double min, max;
} arg_table[] = {
#define X(name, min, max, help) {#name, offsetof(struct ic_law_tool_args, name), min, max},
    IC_LAW_TOOL_ARG_TABLE(X)
#undef X
};
#define ARG_COUNT (sizeof arg_table / sizeof *arg_table)

static double *arg_at(struct ic_law_tool_args *args, size_t i)
{
    return (double *)(void *)((char *)args + arg_table[i].offset);
}

void ic_law_tool_args_init(struct ic_law_tool_args *args)
{
    *args = (struct ic_law_tool_args){.type = IC_LAW_INJECT_PRIMORDIAL_SOUP};
    for (size_t i = 0; i < ARG_COUNT; i++)
        *arg_at(args, i) = (double)NAN;
}

static enum ic_status check_value(size_t i, double value, struct ic_err *err)
{
    if (value >= arg_table[i].min && value <= arg_table[i].max)
        return IC_OK;
    return ic_fail(err, IC_BAD_REQUEST, "%s must be a number from %g to %g", arg_table[i].name,
                   arg_table[i].min, arg_table[i].max);
}

enum ic_status ic_law_tool_arg_set(struct ic_law_tool_args *args, const char *name, double value,
                                   struct ic_err *err)
{
    for (size_t i = 0; i < ARG_COUNT; i++) {
        if (strcmp(name, arg_table[i].name) != 0)
            continue;
        enum ic_status st = check_value(i, value, err);
        if (st == IC_OK)
            *arg_at(args, i) = value;
        return st;
    }
    return ic_fail(err, IC_NOT_FOUND, "tools take no '%.40s'", name);
}

const char *ic_law_tool_name(enum ic_law_tool tool)
{
    return (unsigned)tool < IC_LAW_TOOL_COUNT ? tool_names[tool] : "unknown";
}

const char *ic_law_tool_help(enum ic_law_tool tool)
{
    return (unsigned)tool < IC_LAW_TOOL_COUNT ? tool_helps[tool] : "";
}

const char *ic_law_inject_name(enum ic_law_inject type)
{
    return (unsigned)type < IC_LAW_INJECT_COUNT ? inject_names[type] : "unknown";
}

enum ic_status ic_law_tool_parse(const char *name, enum ic_law_tool *tool, struct ic_err *err)
{
    for (unsigned i = 0; name && i < IC_LAW_TOOL_COUNT; i++) {
        if (strcmp(name, tool_names[i]) == 0) {
            *tool = (enum ic_law_tool)i;
            return IC_OK;
        }
    }
    return ic_fail(err, IC_BAD_REQUEST,
                   "tool '%.40s' is unknown (vortex, wave, collapse, inject_energy, click_out)",
                   name ? name : "");
}

enum ic_status ic_law_inject_parse(const char *name, enum ic_law_inject *type, struct ic_err *err)
{
    for (unsigned i = 0; name && i < IC_LAW_INJECT_COUNT; i++) {
        if (strcmp(name, inject_names[i]) == 0) {
            *type = (enum ic_law_inject)i;
            return IC_OK;
        }
    }
    return ic_fail(err, IC_BAD_REQUEST,
                   "inject type '%.40s' is unknown (primordial_soup, dense_monolith, symmetric_seed)",
                   name ? name : "");
}

/* ---- Windows ---- */

/* The centre and the rows [y0, y1) and columns [x0, x1) of a window that lie on the grid. */
struct window {
    long x, y, r;
    long x0, x1, y0, y1;
};

struct job {
    float *psi;
    struct ic_law_shape shape;
    struct ic_law_tool_args args; /* every number resolved by the tool from its defaults */
};

static double or_default(double v, double standard)
{
    return isnan(v) ? standard : v;
}

static long clip(long v, size_t side)
{
    return v < 0 ? 0 : v > (long)side ? (long)side : v;
}

static struct window window_of(const struct job *j, double radius)
{
    struct window w = {
        .x = (long)floor(or_default(j->args.x, (double)(j->shape.w / 2))),
        .y = (long)floor(or_default(j->args.y, (double)(j->shape.h / 2))),
        .r = (long)floor(radius),
    };
    w.x0 = clip(w.x - w.r, j->shape.w), w.x1 = clip(w.x + w.r, j->shape.w);
    w.y0 = clip(w.y - w.r, j->shape.h), w.y1 = clip(w.y + w.r, j->shape.h);
    return w;
}

static float *cell_at(const struct job *j, long y, long x)
{
    return j->psi + ((size_t)y * j->shape.w + (size_t)x) * j->shape.d * 2;
}

/* Sample i of 2r evenly spaced ones over [-1, 1], ends included. */
static double sample(long i, long r)
{
    return -1 + 2 * (double)i / (double)(2 * r - 1);
}

static void blend_cell(float *cell, size_t d, double blend, double re, double im)
{
    for (size_t k = 0; k < d; k++) {
        cell[2 * k] = (float)((1 - blend) * (double)cell[2 * k] + blend * re);
        cell[2 * k + 1] = (float)((1 - blend) * (double)cell[2 * k + 1] + blend * im);
    }
}

/* ---- The tools ---- */

static size_t tool_vortex(const struct job *j)
{
    struct window w = window_of(j, or_default(j->args.radius, 5));
    double blend = or_default(j->args.blend, 0.8), charge = rint(or_default(j->args.charge, 0));

    for (long y = w.y0; y < w.y1; y++) {
        double ty = sample(y - (w.y - w.r), w.r);
        for (long x = w.x0; x < w.x1; x++) {
            /* An even number of samples straddles the centre: no cell sits on the singularity. */
            double tx = sample(x - (w.x - w.r), w.r);
            double size = exp(-2 * (tx * tx + ty * ty));
            double phase = charge != 0 ? charge * atan2(ty, tx) : PI * (tx + ty);
            blend_cell(cell_at(j, y, x), j->shape.d, blend, size * cos(phase), size * sin(phase));
        }
    }
    return (size_t)(w.y1 - w.y0) * (size_t)(w.x1 - w.x0);
}

static size_t tool_wave(const struct job *j)
{
    size_t side = j->shape.h > j->shape.w ? j->shape.h : j->shape.w;
    struct window w = window_of(j, (double)side);
    double blend = or_default(j->args.blend, 0.8);
    double kx = or_default(j->args.kx, 1), ky = or_default(j->args.ky, 1);

    /* The whole grid, also where a centre far away leaves its corners outside the window of 2r. */
    for (long y = 0; y < (long)j->shape.h; y++) {
        for (long x = 0; x < (long)j->shape.w; x++) {
            double phase = kx * sample(x - (w.x - w.r), w.r) + ky * sample(y - (w.y - w.r), w.r);
            blend_cell(cell_at(j, y, x), j->shape.d, blend, 0.25 * cos(phase), 0.25 * sin(phase));
        }
    }
    return j->shape.h * j->shape.w;
}

static size_t tool_collapse(const struct job *j)
{
    bool local = !isnan(j->args.radius);
    double radius = floor(or_default(j->args.radius, 0));
    double sigma = or_default(j->args.intensity, 0.1) * sqrt(0.5);
    struct window w = window_of(j, radius);
    if (!local)
        w.x0 = 0, w.x1 = (long)j->shape.w, w.y0 = 0, w.y1 = (long)j->shape.h;

    for (long y = w.y0; y < w.y1; y++) {
        for (long x = w.x0; x < w.x1; x++) {
            double s = local ? hypot((double)(x - w.x), (double)(y - w.y)) / radius : 0;
            double size = sigma * exp(-2 * s * s), n[2];
            float *cell = cell_at(j, y, x);
            uint64_t first = ((uint64_t)y * j->shape.w + (uint64_t)x) * j->shape.d;
            for (size_t k = 0; k < j->shape.d; k++) {
                ic_law_rng_normal2(j->args.seed, IC_LAW_STREAM_COLLAPSE, first + k, n);
                cell[2 * k] = (float)((double)cell[2 * k] + size * n[0]);
                cell[2 * k + 1] = (float)((double)cell[2 * k + 1] + size * n[1]);
            }
        }
    }
    return (size_t)(w.y1 - w.y0) * (size_t)(w.x1 - w.x0);
}

/* Numbers for inject_energy are named by an item (a cell's position in its window; ITEM_COMMON for what
 * all cells share) and a slot within it (0: chances; 1 + k: channel k). */
#define ITEM_COMMON 0xFFFFFFFFull
#define SLOT_BITS 16

static void inject_numbers(const struct job *j, uint64_t item, uint64_t slot, bool normal, double out[2])
{
    uint64_t index = item << SLOT_BITS | slot;
    if (normal)
        ic_law_rng_normal2(j->args.seed, IC_LAW_STREAM_INJECT, index, out);
    else
        ic_law_rng_uniform2(j->args.seed, IC_LAW_STREAM_INJECT, index, out);
}

/* A direction drawn evenly from the complex sphere, of the given norm^2. Two passes over the same
 * numbers, so that the norm is known before the first channel is written. */
static void put_direction(const struct job *j, float *cell, uint64_t item, double norm2)
{
    double n[2], sum = 0;
    for (size_t k = 0; k < j->shape.d; k++) {
        inject_numbers(j, item, 1 + k, true, n);
        sum += n[0] * n[0] + n[1] * n[1];
    }
    double scale = sum > 0 ? sqrt(norm2 / sum) : 0;
    for (size_t k = 0; k < j->shape.d; k++) {
        inject_numbers(j, item, 1 + k, true, n);
        cell[2 * k] = (float)(n[0] * scale);
        cell[2 * k + 1] = (float)(n[1] * scale);
    }
}

static uint64_t item_of(const struct window *w, long y, long x)
{
    return (uint64_t)(y - (w->y - w->r)) * 2 * (uint64_t)w->r + (uint64_t)(x - (w->x - w->r));
}

static size_t inject_soup(const struct job *j, double intensity)
{
    struct window w = window_of(j, or_default(j->args.radius, 10));
    size_t n = 0;

    for (long y = w.y0; y < w.y1; y++) {
        for (long x = w.x0; x < w.x1; x++) {
            double u[2], dist = hypot((double)(x - w.x), (double)(y - w.y));
            inject_numbers(j, item_of(&w, y, x), 0, false, u);
            if (u[0] >= 0.3 * exp(-2 * dist / (double)w.r))
                continue;
            put_direction(j, cell_at(j, y, x), item_of(&w, y, x), intensity * (0.1 + 0.4 * u[1]));
            n++;
        }
    }
    return n;
}

static size_t inject_monolith(const struct job *j, double intensity)
{
    struct window w = window_of(j, or_default(j->args.radius, 5));
    double n[2];

    for (long y = w.y0; y < w.y1; y++) {
        for (long x = w.x0; x < w.x1; x++) {
            float *cell = cell_at(j, y, x);
            put_direction(j, cell, ITEM_COMMON, 2 * intensity);
            for (size_t k = 0; k < j->shape.d; k++) { /* a perfect block would be a dull one */
                inject_numbers(j, item_of(&w, y, x), 1 + k, true, n);
                cell[2 * k] = (float)((double)cell[2 * k] + 0.05 * n[0]);
                cell[2 * k + 1] = (float)((double)cell[2 * k + 1] + 0.05 * n[1]);
            }
        }
    }
    return (size_t)(w.y1 - w.y0) * (size_t)(w.x1 - w.x0);
}

static size_t inject_seed(const struct job *j, double intensity)
{
    struct window w = window_of(j, or_default(j->args.radius, 4));
    size_t n = 0;

    /* The mirror lies on the centre cell, so the pattern spans (x-r, x+r) and offset 0 is its own
     * image. Every cell asks which quadrant cell it mirrors: border clipping needs no special case. */
    for (long y = w.y0; y < w.y1; y++) {
        for (long x = w.x0; x < w.x1; x++) {
            long oy = y < w.y ? w.y - y : y - w.y, ox = x < w.x ? w.x - x : x - w.x;
            uint64_t item = (uint64_t)oy * (uint64_t)w.r + (uint64_t)ox;
            double u[2];
            if (oy >= w.r || ox >= w.r)
                continue;
            inject_numbers(j, item, 0, false, u);
            if (u[0] <= 0.5)
                continue;
            put_direction(j, cell_at(j, y, x), item, intensity);
            n++;
        }
    }
    return n;
}

static size_t tool_inject(const struct job *j)
{
    double intensity = or_default(j->args.intensity, 1);
    switch (j->args.type) {
    case IC_LAW_INJECT_PRIMORDIAL_SOUP: return inject_soup(j, intensity);
    case IC_LAW_INJECT_DENSE_MONOLITH: return inject_monolith(j, intensity);
    case IC_LAW_INJECT_SYMMETRIC_SEED: return inject_seed(j, intensity);
    case IC_LAW_INJECT_COUNT: break;
    }
    return 0;
}

static size_t tool_click_out(const struct job *j)
{
    double u[2];
    size_t cells = j->shape.h * j->shape.w, values = j->shape.d * 2;
    size_t pairs = (size_t)(or_default(j->args.fraction, 0.5) * (double)cells);

    ic_law_rng_uniform2(j->args.seed, IC_LAW_STREAM_CLICK_OUT, 0, u);
    if (u[0] >= or_default(j->args.chance, 0.01))
        return 0;
    for (size_t i = 0; i < pairs; i++) {
        ic_law_rng_uniform2(j->args.seed, IC_LAW_STREAM_CLICK_OUT, 1 + i, u);
        float *a = j->psi + (size_t)(u[0] * (double)cells) * values;
        float *b = j->psi + (size_t)(u[1] * (double)cells) * values;
        for (size_t v = 0; v < values; v++) {
            float t = a[v];
            a[v] = b[v];
            b[v] = t;
        }
    }
    return 2 * pairs;
}

static size_t (*const tool_functions[])(const struct job *) = {
    [IC_LAW_TOOL_VORTEX] = tool_vortex,       [IC_LAW_TOOL_WAVE] = tool_wave,
    [IC_LAW_TOOL_COLLAPSE] = tool_collapse,   [IC_LAW_TOOL_INJECT_ENERGY] = tool_inject,
    [IC_LAW_TOOL_CLICK_OUT] = tool_click_out,
};
_Static_assert(sizeof tool_functions / sizeof *tool_functions == IC_LAW_TOOL_COUNT, "a tool each");

enum ic_status ic_law_tool_apply(float *psi, struct ic_law_shape shape, enum ic_law_tool tool,
                                 const struct ic_law_tool_args *args, size_t *touched, struct ic_err *err)
{
    struct job j = {.psi = psi, .shape = shape, .args = *args};

    if (touched)
        *touched = 0;
    if (!ic_law_shape_ok(shape))
        return ic_fail(err, IC_BAD_REQUEST, "a state of %zux%zu cells and %zu channels is out of range",
                       shape.h, shape.w, shape.d);
    if ((unsigned)tool >= IC_LAW_TOOL_COUNT)
        return ic_fail(err, IC_BAD_REQUEST, "tool %d is unknown", (int)tool);
    if ((unsigned)args->type >= IC_LAW_INJECT_COUNT)
        return ic_fail(err, IC_BAD_REQUEST, "inject type %d is unknown", (int)args->type);
    for (size_t i = 0; i < ARG_COUNT; i++) {
        double v = *arg_at(&j.args, i);
        if (!isnan(v) && check_value(i, v, err) != IC_OK)
            return IC_BAD_REQUEST;
    }
    size_t n = tool_functions[tool](&j);
    if (touched)
        *touched = n;
    return IC_OK;
}
