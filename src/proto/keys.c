#include "proto/keys.h"

#include <errno.h>
#include <ini.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/lines.h"

struct ic_keys {
    struct ic_client *client;
    int n;
};

struct loading {
    struct ic_keys *k;
    struct ic_err *err;
};

static struct ic_client *client_for(struct ic_keys *k, const char *id, struct ic_err *err)
{
    for (int i = 0; i < k->n; i++)
        if (!strcmp(k->client[i].id, id))
            return &k->client[i];
    if (k->n == IC_KEYS_MAX || strlen(id) >= sizeof k->client->id) {
        ic_fail(err, IC_TOO_LARGE, "keys: too many clients, or too long a client id");
        return NULL;
    }
    struct ic_client *grown = realloc(k->client, sizeof *grown * (size_t)(k->n + 1));
    if (!grown) {
        ic_fail(err, IC_OOM, "out of memory");
        return NULL;
    }
    k->client = grown;
    grown[k->n] = (struct ic_client){0};
    strcpy(grown[k->n].id, id);
    return &grown[k->n++];
}

static int on_pair(void *arg, const char *section, const char *name, const char *value)
{
    struct loading *l = arg;
    struct ic_client *c;
    char *end;

    if (l->err->code != IC_OK) /* the reader goes on; the first mistake is the one to tell */
        return 0;
    if (!*section) {
        ic_fail(l->err, IC_BAD_REQUEST, "keys: %s stands outside a [client_id] section", name);
        return 0;
    }
    if (!(c = client_for(l->k, section, l->err)))
        return 0;
    if (!strcmp(name, "key")) {
        if (strlen(value) < IC_KEY_LEN_MIN || strlen(value) > IC_KEY_LEN_MAX) {
            ic_fail(l->err, IC_BAD_REQUEST, "keys: the key of %s must have %d to %d characters", section,
                    IC_KEY_LEN_MIN, IC_KEY_LEN_MAX);
            return 0;
        }
        if (c->key[0]) { /* an indented line under a key would replace it by its own text */
            ic_fail(l->err, IC_BAD_REQUEST,
                    "keys: %s has a key twice (an indented line continues the one before)", section);
            return 0;
        }
        strcpy(c->key, value);
    } else if (!strcmp(name, "max_sessions")) {
        long v = strtol(value, &end, 10);
        if (*end || end == value || v < 1 || v > 100000) {
            ic_fail(l->err, IC_BAD_REQUEST, "keys: max_sessions of %s must be 1 to 100000", section);
            return 0;
        }
        c->max_sessions = (int)v;
    } else {
        ic_fail(l->err, IC_BAD_REQUEST, "keys: unknown entry %s of %s", name, section);
        return 0;
    }
    return 1;
}

enum ic_status ic_keys_load(struct ic_keys **out, const char *path, struct ic_err *err)
{
    struct ic_err first = {0};
    struct ic_keys *k = calloc(1, sizeof *k);
    struct loading l = {k, &first};

    *out = NULL;
    if (!k)
        return ic_fail(err, IC_OOM, "out of memory");
    struct ic_lines lines = {.file = fopen(path, "re")};
    int rc = lines.file ? ini_parse_stream(ic_lines_next, &lines, on_pair, &l) : 0;
    const int why = !lines.file || ferror(lines.file) ? errno : 0; /* a folder, a broken disk */
    if (lines.file)
        fclose(lines.file);
    if (why) {
        first = (struct ic_err){0};
        ic_fail(&first, why == ENOENT ? IC_NOT_FOUND : IC_BAD_REQUEST, "keys file %s: %s", path,
                strerror(why));
    } else if (lines.nul) {
        first = (struct ic_err){0};
        ic_fail(&first, IC_BAD_REQUEST, "keys file %s: there is a NUL in it: not a text file", path);
    } else if (first.code != IC_OK) {
        ic_fail(err, first.code, "%s", first.msg);
    } else if (rc > 0) {
        ic_fail(&first, IC_BAD_REQUEST, "keys file %s: line %d makes no sense or is too long", path, rc);
    } else if (k->n == 0) {
        ic_fail(&first, IC_BAD_REQUEST, "keys file %s: no client in it", path);
    }
    for (int i = 0; i < k->n && first.code == IC_OK; i++)
        if (!k->client[i].key[0])
            ic_fail(&first, IC_BAD_REQUEST, "keys file %s: %s has no key", path, k->client[i].id);
    if (first.code != IC_OK) {
        ic_keys_free(&k);
        return ic_fail(err, first.code, "%s", first.msg);
    }
    *out = k;
    return IC_OK;
}

void ic_keys_free(struct ic_keys **kp)
{
    if (*kp) {
        if ((*kp)->client)
            explicit_bzero((*kp)->client, sizeof *(*kp)->client * (size_t)(*kp)->n);
        free((*kp)->client);
        free(*kp);
        *kp = NULL;
    }
}

/* Both are looked at to the full length of the field, so the time says nothing about the key. */
static unsigned differ(const char *a, const char *b)
{
    char pad[IC_KEY_LEN_MAX + 1] = {0};
    unsigned d = 0;

    strncpy(pad, b, sizeof pad - 1);
    d |= strlen(b) > IC_KEY_LEN_MAX;
    for (size_t i = 0; i < sizeof pad; i++)
        d |= (unsigned)(unsigned char)a[i] ^ (unsigned)(unsigned char)pad[i];
    return d;
}

const struct ic_client *ic_keys_check(const struct ic_keys *k, const char *id, const char *key)
{
    const struct ic_client *found = NULL;
    bool any = !id || !*id;

    for (int i = 0; i < k->n; i++) {
        unsigned d = differ(k->client[i].key, key);
        if (!d && (any || !strcmp(k->client[i].id, id)))
            found = &k->client[i];
    }
    return found;
}
