/* LoRA adapters of a server: what the option says, and applying it. They hold for every request, so that what the prefix
 * cache keeps was computed with them too. */
#ifndef IC_TEXT_LORA_H
#define IC_TEXT_LORA_H

#include "base/status.h"

#define IC_LORA_MAX 16 /* adapters of one server; each costs its share of every decode */

struct ic_lora {
    const char *path;
    float scale; /* 1: as trained; 0: without effect; finite */
};

/* Owned by whoever parsed it. */
struct ic_lora_list {
    int n;
    struct ic_lora item[IC_LORA_MAX];
    char *text; /* what the paths point into */
};

/* "FILE[:SCALE],…"; NULL or "": none. What stands behind the last colon of an item is its scale, so a file with a colon in
 * its name needs one. IC_BAD_REQUEST: a scale that is no finite number, an item without a file. IC_TOO_LARGE: more than
 * IC_LORA_MAX. *out then needs no deinit. Any thread. */
enum ic_status ic_lora_parse(struct ic_lora_list *out, const char *spec, struct ic_err *err);
void ic_lora_deinit(struct ic_lora_list *list); /* accepts one of zeros */

#endif
