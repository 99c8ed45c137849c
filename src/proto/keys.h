/* Clients that may connect and their keys, from an INI file: a section per client id with `key`, and
 * optionally `max_sessions`. Immutable once loaded; any thread. */
#ifndef IC_PROTO_KEYS_H
#define IC_PROTO_KEYS_H

#include <stdbool.h>

#include "base/status.h"

#define IC_KEYS_MAX 4096
#define IC_KEY_LEN_MAX 256
#define IC_KEY_LEN_MIN 8

struct ic_keys;

struct ic_client {
    char id[129];
    char key[IC_KEY_LEN_MAX + 1];
    int max_sessions; /* 0: the server's default */
};

enum ic_status ic_keys_load(struct ic_keys **out, const char *path, struct ic_err *err);
void ic_keys_free(struct ic_keys **k);
/* The client with this id and key, or NULL. id NULL or "": any client with that key. The comparison takes the
 * same time whatever the key. */
const struct ic_client *ic_keys_check(const struct ic_keys *k, const char *id, const char *key);

#endif
