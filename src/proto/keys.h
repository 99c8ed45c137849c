/* Clients that may connect and their keys, from an INI file: a section per client id with `key`, and
 * optionally `max_sessions`. Immutable once loaded; any thread. */
#ifndef IC_PROTO_KEYS_H
#define IC_PROTO_KEYS_H

#include <stdbool.h>

#include "base/status.h"

#define IC_KEYS_MAX 4096
#define IC_KEY_LEN_MAX 128 /* fits into a line of the reader, which are 199 bytes */
#define IC_KEY_LEN_MIN 8
#define IC_KEYS_ID_MAX 48 /* the reader cuts section names at 49 bytes and does not say so */

struct ic_keys;

struct ic_client {
    char id[IC_KEYS_ID_MAX + 1];
    char key[IC_KEY_LEN_MAX + 1];
    int max_sessions; /* 0: the server's default */
};

enum ic_status ic_keys_load(struct ic_keys **out, const char *path, struct ic_err *err);
void ic_keys_free(struct ic_keys **k);
/* The client with this id and key, or NULL. id NULL or "": any client with that key. The comparison takes the
 * same time whatever the key. */
const struct ic_client *ic_keys_check(const struct ic_keys *k, const char *id, const char *key);

#endif
