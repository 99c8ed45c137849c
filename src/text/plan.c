#include "text/plan.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define BALANCE_ROUNDS 24 /* halvings when looking for the emptiest way to fill several devices */

static uint64_t cache_bytes(const struct ic_plan_in *in, int32_t layer)
{
    return (uint64_t)((double)ic_gguf_kv_bytes(in->facts, (uint32_t)layer, &in->kv) * in->kv_scale);
}

/* Item i of n_layers + 1: a layer, or at last the output. */
static uint64_t item_weights(const struct ic_gguf_facts *f, int32_t i)
{
    if (i < (int32_t)f->n_layers)
        return f->layer[i].bytes + (uint64_t)f->layer[i].tensors * IC_PLAN_TENSOR_PAD;
    return ic_gguf_output_bytes(f) + (uint64_t)(f->output_tensors + f->tied) * IC_PLAN_TENSOR_PAD;
}

static uint64_t item_cache(const struct ic_plan_in *in, int32_t i)
{
    return i < (int32_t)in->facts->n_layers ? cache_bytes(in, i) : 0;
}

static uint64_t may_use(const struct ic_plan_device *d)
{
    uint64_t taken = d->held + d->margin;
    return d->free > taken ? d->free - taken : 0;
}

/* Fills the devices from the last one and the output on, each up to `share` of what may be used, and counts
 * the items placed; `counts` gets those of each device. */
static int32_t fill(const struct ic_plan_in *in, double share, int32_t most, int32_t *counts)
{
    int32_t item = (int32_t)in->facts->n_layers, placed = 0;

    for (int d = (int)in->n_devices - 1; d >= 0; d--) {
        const struct ic_plan_device *dev = &in->devices[d];
        double room = (double)may_use(dev) * share - (double)(dev->context + dev->compute);
        counts[d] = 0;
        while (placed < most) {
            room -= (double)(item_weights(in->facts, item) + item_cache(in, item));
            if (room < 0)
                break;
            counts[d]++;
            placed++;
            item--;
        }
    }
    return placed;
}

/* Places `n` items, which fit when each device is `most` full (1: all that may be used), so that all
 * devices are equally full in proportion to what may be used of each. */
static void balance(const struct ic_plan_in *in, int32_t n, double most, int32_t *counts)
{
    double low = 0, high = most;

    for (int i = 0; i < BALANCE_ROUNDS && in->n_devices > 1; i++) {
        double middle = (low + high) / 2;
        if (fill(in, middle, n, counts) >= n)
            high = middle;
        else
            low = middle;
    }
    fill(in, high, n, counts);
}

static void choose(struct ic_plan *p, const struct ic_plan_in *in, int32_t *counts)
{
    int32_t want = in->exactly >= 0 && in->exactly < p->layers_max ? in->exactly : p->layers_max;
    double full = 1;

    memset(counts, 0, IC_PLAN_DEVICES_MAX * sizeof *counts);
    if (in->n_devices == 0)
        return;
    if (in->exactly < 0) {
        want = in->at_most < want ? in->at_most : want;
        want = fill(in, 1, want > 0 ? want : 0, counts);
    } else if (fill(in, 1, want, counts) < want) {
        p->fits = false;
        for (full = 2; fill(in, full, want, counts) < want && full < 0x1p40; full *= 2)
            continue;
        if (fill(in, full, want, counts) < want) { /* no device has anything free */
            memset(counts, 0, IC_PLAN_DEVICES_MAX * sizeof *counts);
            counts[in->n_devices - 1] = want;
            return;
        }
    }
    balance(in, want, full, counts);
}

static void fill_share(struct ic_plan_share *s, const struct ic_plan_in *in, const struct ic_plan_device *d,
                       int32_t end, int32_t count)
{
    int32_t n_layers = (int32_t)in->facts->n_layers;

    *s = (struct ic_plan_share){.first = end - count};
    for (int32_t i = end - count; i < end; i++) {
        s->weights += item_weights(in->facts, i);
        s->kv += item_cache(in, i);
        s->output |= i == n_layers;
        s->layers += i < n_layers;
    }
    s->used = count ? s->weights + s->kv + d->context + d->compute : 0;
    s->left = (int64_t)may_use(d) - (int64_t)s->used;
}

void ic_plan_make(struct ic_plan *p, const struct ic_plan_in *in)
{
    int32_t counts[IC_PLAN_DEVICES_MAX], n_layers = (int32_t)in->facts->n_layers, end = n_layers + 1;

    IC_ASSERT(in->n_devices <= IC_PLAN_DEVICES_MAX);
    *p = (struct ic_plan){.layers_max = n_layers + 1, .fits = true, .host_compute = in->host_compute};
    choose(p, in, counts);
    for (int d = (int)in->n_devices - 1; d >= 0; d--) {
        fill_share(&p->device[d], in, &in->devices[d], end, counts[d]);
        p->split[d] = (float)counts[d];
        p->layers += counts[d];
        end -= counts[d];
    }
    p->host_weights = in->facts->input_bytes;
    if (p->layers == 0)
        p->host_weights += in->facts->output_bytes;
    for (int32_t i = 0; i < end && i < n_layers; i++) {
        p->host_weights += in->facts->layer[i].bytes;
        p->host_kv += cache_bytes(in, i);
    }
}

/* ---- the table ---------------------------------------------------------------------------------- */

struct ic_bytes_text ic_bytes_text(uint64_t bytes)
{
    struct ic_bytes_text t;

    if (bytes >= UINT64_C(1) << 30)
        snprintf(t.s, sizeof t.s, "%.2f GiB", (double)bytes / 0x1p30);
    else if (bytes >= UINT64_C(1) << 20)
        snprintf(t.s, sizeof t.s, "%.1f MiB", (double)bytes / 0x1p20);
    else
        snprintf(t.s, sizeof t.s, "%.1f KiB", (double)bytes / 0x1p10);
    return t;
}

struct printer {
    void (*line)(void *arg, const char *text);
    void *arg;
};

static void say(const struct printer *pr, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void say(const struct printer *pr, const char *fmt, ...)
{
    char text[IC_PLAN_LINE_MAX];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    pr->line(pr->arg, text);
}

static void item(const struct printer *pr, const char *what, uint64_t bytes)
{
    say(pr, "  %-48s %12s", what, ic_bytes_text(bytes).s);
}

static void print_model(const struct printer *pr, const struct ic_plan_in *in)
{
    const struct ic_gguf_facts *f = in->facts;
    uint64_t layers = 0, experts = 0;

    for (uint32_t i = 0; i < f->n_layers; i++) {
        layers += f->layer[i].bytes;
        experts += f->layer[i].expert_bytes;
    }
    say(pr, "%s: %s, %u layers, %s in %u file%s", in->what ? in->what : "model", f->arch, f->n_layers,
        ic_bytes_text(f->tensor_bytes).s, f->n_files, f->n_files > 1 ? "s" : "");
    item(pr, "layers", layers);
    if (experts)
        item(pr, "of these experts", experts);
    if (f->lora_bytes)
        item(pr, "LoRA adapters, counted with their layers", f->lora_bytes);
    item(pr, "embedding", f->input_bytes);
    item(pr, f->tied ? "output (and a copy of the embedding on a GPU)" : "output", f->output_bytes);
}

static void name_share(char *out, size_t size, const struct ic_plan_share *s)
{
    const char *output = s->output ? " and the output" : "";

    if (s->layers == 0)
        snprintf(out, size, "the output");
    else if (s->layers == 1)
        snprintf(out, size, "layer %" PRId32 "%s", s->first, output);
    else
        snprintf(out, size, "layers %" PRId32 "-%" PRId32 "%s", s->first, s->first + s->layers - 1, output);
}

static void print_device(const struct printer *pr, const struct ic_plan_in *in,
                         const struct ic_plan_device *d, const struct ic_plan_share *s)
{
    char what[96];

    say(pr, "%s (%s): %s free of %s", d->name, d->desc, ic_bytes_text(d->free).s,
        ic_bytes_text(d->total).s);
    if (s->used) {
        name_share(what, sizeof what, s);
        item(pr, what, s->weights);
        snprintf(what, sizeof what, "KV cache of %" PRId32 " layer%s, %u tokens", s->layers,
                 s->layers == 1 ? "" : "s", in->kv.cells);
        item(pr, what, s->kv);
        item(pr, in->measured ? "compute buffers (measured)" : "compute buffers (estimated)", d->compute);
        if (d->context)
            item(pr, "driver context", d->context);
    }
    if (d->held)
        item(pr, "held by others", d->held);
    item(pr, "safety margin", d->margin);
    if (s->left < 0)
        say(pr, "  %-48s %12s", "MISSING", ic_bytes_text((uint64_t)-s->left).s);
    else
        item(pr, "left", (uint64_t)s->left);
}

void ic_plan_print(const struct ic_plan *p, const struct ic_plan_in *in,
                   void (*line)(void *arg, const char *text), void *arg)
{
    struct printer pr = {line, arg};
    char what[96];

    print_model(&pr, in);
    for (unsigned d = 0; d < in->n_devices; d++)
        print_device(&pr, in, &in->devices[d], &p->device[d]);
    if (in->host_available)
        say(&pr, "host: %s available", ic_bytes_text(in->host_available).s);
    else
        say(&pr, "host:");
    item(&pr, "weights (mapped from the file)", p->host_weights);
    snprintf(what, sizeof what, "KV cache, %u tokens", in->kv.cells);
    item(&pr, what, p->host_kv);
    if (p->host_compute)
        item(&pr, "compute buffers (measured)", p->host_compute);
    if (in->n_devices == 0)
        say(&pr, "decided: all on the CPU");
    else
        say(&pr, "decided: %" PRId32 " of %" PRId32 " layers on the GPU (the output counts as one)%s",
            p->layers, p->layers_max, p->fits ? "" : ", as asked for, though they do not fit");
}
