/* KV that had to leave the device, in host memory: parts of sequences, the least recently used dropped first, their sum
 * bounded. The sum is honest: data, tokens and book-keeping, as asked of malloc. One thread. */
#ifndef IC_SCHED_SPILL_H
#define IC_SCHED_SPILL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "sched/prefix.h"

struct ic_spill_part {
    struct ic_spill_part *next; /* less recently put away */
    char salt[IC_SALT_MAX + 1];
    int32_t from, to;           /* positions whose KV this is */
    int32_t *tokens;            /* [0..to): a part means what it does behind these only */
    void *data;
    size_t bytes; /* of data */
};

struct ic_spill {
    struct ic_spill_part *first;
    size_t max, sum; /* bytes */
    int32_t count;
};

/* Whether the KV of tokens[from..to) behind tokens[0..from) is there already, maybe as a piece of a longer part (`whole`:
 * only as it is). Then it counts as used. */
bool ic_spill_has(struct ic_spill *s, const char *salt, const int32_t *tokens, int32_t from, int32_t to, bool whole);
/* Takes data and tokens (malloc'd); drops them, and says false, when they are larger than all there may be. Parts
 * that it makes superfluous go (`whole`: none does, for the shorter ones serve others). */
bool ic_spill_put(struct ic_spill *s, const char *salt, int32_t *tokens, int32_t from, int32_t to, void *data, size_t bytes,
                  bool whole);
/* The part that carries tokens[0..n) furthest beyond its first `have`, and how far. NULL: none. `whole`: parts are of use
 * only if all of them is a beginning of tokens. It counts as used. */
struct ic_spill_part *ic_spill_find(struct ic_spill *s, const char *salt, const int32_t *tokens, int32_t n,
                                    int32_t have, bool whole, int32_t *reach);
void ic_spill_drop(struct ic_spill *s, struct ic_spill_part *p);
void ic_spill_clear(struct ic_spill *s); /* also what is to be called at the end */

#endif
