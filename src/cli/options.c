#include "cli/options.h"

#include <ctype.h>
#include <errno.h>
#include <ini.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/lines.h"

struct row {
    const char *flag, *unit, *help, *def;
    bool text;
    size_t offset;
    int64_t num, lo, hi;
};

static const struct row rows[] = {
#define S(field, flag, def, unit, help)                                                                    \
    {flag, unit, help, def, true, offsetof(struct ic_options, field), 0, 0, 0},
#define I(field, flag, def, lo, hi, unit, help)                                                            \
    {flag, unit, help, NULL, false, offsetof(struct ic_options, field), def, lo, hi},
    IC_OPTIONS(S, I)
#undef S
#undef I
};
#define N_ROWS (sizeof rows / sizeof *rows)
_Static_assert(N_ROWS <= IC_OPTIONS_MAX, "each may own a string");

static const struct row *find(const char *flag, size_t len)
{
    for (size_t i = 0; i < N_ROWS; i++)
        if (strlen(rows[i].flag) == len && !strncmp(rows[i].flag, flag, len))
            return &rows[i];
    return NULL;
}

static enum ic_status set(struct ic_options *o, const struct row *r, const char *value, const char *from,
                          struct ic_err *err)
{
    char *end;
    int shift = 0;

    if (r->text) {
        *(const char **)((char *)o + r->offset) = *value ? value : NULL;
        return IC_OK;
    }
    errno = 0;
    long long v = strtoll(value, &end, 10);
    switch (toupper((unsigned char)*end)) {
    case 'K': shift = 10; break;
    case 'M': shift = 20; break;
    case 'G': shift = 30; break;
    default: break;
    }
    const char *rest = end + (shift ? 1 : 0);
    if (end == value || errno || (*rest && (!shift || strcmp(rest, "iB") != 0)))
        return ic_fail(err, IC_BAD_REQUEST, "%s%s takes a whole number, not \"%.60s\"", from, r->flag,
                       value);
    int64_t unit = INT64_C(1) << shift; /* divided first, so that nothing can overflow */
    if (v > r->hi / unit || v < r->lo / unit || v * unit < r->lo)
        return ic_fail(err, IC_BAD_REQUEST, "%s%s must be %lld to %lld", from, r->flag, (long long)r->lo,
                       (long long)r->hi);
    *(int64_t *)((char *)o + r->offset) = v * unit;
    return IC_OK;
}

struct from_file {
    struct ic_options *o;
    struct ic_err *err;
    bool seen[N_ROWS];
};

static int on_pair(void *arg, const char *section, const char *name, const char *value)
{
    struct from_file *f = arg;
    const struct row *r = find(name, strlen(name));
    char *copy;

    if (f->err->code != IC_OK) /* the reader goes on; the first mistake is the one to tell */
        return 0;
    if (*section && strcmp(section, "server") != 0) {
        ic_fail(f->err, IC_BAD_REQUEST, "configuration: unknown section [%s]", section);
        return 0;
    }
    if (!r || !strcmp(name, "config")) {
        ic_fail(f->err, IC_BAD_REQUEST, "configuration: unknown entry %s", name);
        return 0;
    }
    if (f->seen[r - rows]) {
        ic_fail(f->err, IC_BAD_REQUEST,
                "configuration: %s stands twice (an indented line continues the one before)", name);
        return 0;
    }
    f->seen[r - rows] = true;
    if (!(copy = strdup(value))) {
        ic_fail(f->err, IC_OOM, "out of memory");
        return 0;
    }
    f->o->owned[f->o->n_owned++] = copy;
    return set(f->o, r, copy, "configuration: ", f->err) == IC_OK;
}

static enum ic_status read_file(struct ic_options *o, const char *path, struct ic_err *err)
{
    struct ic_err first = {0};
    struct from_file f = {.o = o, .err = &first};
    struct ic_lines l = {.file = fopen(path, "re")};

    if (!l.file)
        return ic_fail(err, IC_BAD_REQUEST, "configuration %s: %s", path, strerror(errno));
    int rc = ini_parse_stream(ic_lines_next, &l, on_pair, &f);
    const int why = ferror(l.file) ? errno : 0; /* a folder, a broken disk */
    fclose(l.file);
    if (first.code != IC_OK)
        return ic_fail(err, first.code, "%s", first.msg);
    if (why || l.nul)
        return ic_fail(err, IC_BAD_REQUEST, "configuration %s: %s", path,
                       why ? strerror(why) : "there is a NUL in it: not a text file");
    return rc == 0 ? IC_OK
                   : ic_fail(err, IC_BAD_REQUEST, "configuration %s: line %d makes no sense or is too long",
                             path, rc);
}

static const char *env_of(const struct row *r)
{
    char name[64] = "IC_";
    size_t n = 3;

    for (const char *p = r->flag; *p && n < sizeof name - 1; p++)
        name[n++] = *p == '-' ? '_' : (char)toupper((unsigned char)*p);
    name[n] = 0;
    return getenv(name);
}

/* One walk over the command line: with `r` it applies the options, without it looks only for --config and
 * --help. */
static enum ic_status walk(struct ic_options *o, int argc, char **argv, bool apply, bool *help,
                           struct ic_err *err)
{
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i], *eq = strchr(a, '=');
        if (!strcmp(a, "--help") || !strcmp(a, "-h")) {
            *help = true;
            continue;
        }
        size_t len = eq ? (size_t)(eq - a) : strlen(a);
        const struct row *r = !strncmp(a, "--", 2) ? find(a + 2, len - 2) : NULL;
        if (!r)
            return ic_fail(err, IC_BAD_REQUEST, "unknown option %.*s (see --help)",
                           (int)(len > 80 ? 80 : len), a);
        if (!eq && i + 1 >= argc)
            return ic_fail(err, IC_BAD_REQUEST, "--%s needs a value", r->flag);
        const char *value = eq ? eq + 1 : argv[++i];
        if (apply || !strcmp(r->flag, "config")) {
            enum ic_status st = set(o, r, value, "--", err);
            if (st != IC_OK)
                return st;
        }
    }
    return IC_OK;
}

enum ic_status ic_options_parse(struct ic_options *o, int argc, char **argv, bool *help, struct ic_err *err)
{
    enum ic_status st;

    *help = false;
    *o = (struct ic_options){0};
    for (size_t i = 0; i < N_ROWS; i++)
        if (rows[i].text)
            *(const char **)((char *)o + rows[i].offset) = rows[i].def;
        else
            *(int64_t *)((char *)o + rows[i].offset) = rows[i].num;
    o->config = getenv("IC_CONFIG");
    if ((st = walk(o, argc, argv, false, help, err)) != IC_OK || *help)
        return st;
    if (o->config && (st = read_file(o, o->config, err)) != IC_OK)
        return st;
    for (size_t i = 0; i < N_ROWS; i++) {
        const char *v = env_of(&rows[i]);
        if (v && strcmp(rows[i].flag, "config") != 0 &&
            (st = set(o, &rows[i], v, "environment: ", err)) != IC_OK)
            return st;
    }
    return walk(o, argc, argv, true, help, err);
}

void ic_options_deinit(struct ic_options *o)
{
    for (int i = 0; i < o->n_owned; i++)
        free(o->owned[i]);
    *o = (struct ic_options){0};
}

void ic_options_help(struct ic_buf *out)
{
    for (size_t i = 0; i < N_ROWS; i++) {
        char left[48];
        const struct row *r = &rows[i];
        snprintf(left, sizeof left, "--%s %s", r->flag, r->text ? r->unit : "N");
        ic_buf_printf(out, "  %-26s %s", left, r->help);
        if (!r->text)
            ic_buf_printf(out, " (%s%sdefault %lld)", *r->unit ? r->unit : "", *r->unit ? ", " : "",
                          (long long)r->num);
        else if (r->def)
            ic_buf_printf(out, " (default %s)", r->def);
        ic_buf_puts(out, "\n");
    }
}
