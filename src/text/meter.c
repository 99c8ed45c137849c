#include "text/meter.h"

#include <stdio.h>
#include <string.h>

static _Thread_local struct ic_meter *listener;

void ic_meter_listen(struct ic_meter *m)
{
    if (m)
        memset(m, 0, sizeof *m);
    listener = m;
}

/* Lines give MiB with two digits: rounded up by what these may hide. */
static uint64_t bytes_of(double mib)
{
    return mib > 0 && mib < 0x1p30 ? (uint64_t)((mib + 0.005) * 0x1p20) : 0;
}

static struct ic_meter_row *row_of(struct ic_meter *m, const char *name)
{
    for (int i = 0; i < m->n; i++)
        if (!strcmp(m->row[i].name, name))
            return &m->row[i];
    if (m->n == IC_METER_NAMES_MAX)
        return NULL;
    snprintf(m->row[m->n].name, sizeof m->row[m->n].name, "%s", name);
    return &m->row[m->n++];
}

void ic_meter_line(const char *text)
{
    struct ic_meter *m = listener;
    char name[48], kind[16];
    double mib;

    if (!m)
        return;
    if (sscanf(text, "llama_kv_cache: size = %lf MiB", &mib) == 1 ||
        sscanf(text, "llama_memory_recurrent: size = %lf MiB", &mib) == 1) {
        m->cache_total += bytes_of(mib);
        return;
    }
    if (strstr(text, ": Flash Attention enabled"))
        m->flash = true;
    if (sscanf(text, "%*[^:]: %47s %15s buffer size = %lf MiB", name, kind, &mib) != 3)
        return;
    struct ic_meter_row *row = row_of(m, name);
    if (!row)
        return;
    if (!strcmp(kind, "model") || !strcmp(kind, "LoRA"))
        row->weights += bytes_of(mib);
    else if (!strcmp(kind, "KV") || !strcmp(kind, "RS"))
        row->cache += bytes_of(mib);
    else if (!strcmp(kind, "compute"))
        row->compute = bytes_of(mib); /* said again whenever they are made anew */
    m->compute_seen |= !strcmp(kind, "compute");
}

struct ic_meter_row ic_meter_row(const struct ic_meter *m, const char *name)
{
    for (int i = 0; i < m->n; i++)
        if (!strcmp(m->row[i].name, name))
            return m->row[i];
    return (struct ic_meter_row){0};
}
