/* Which tokens lie in which cells of the KV cache, and which sequences hold them: a radix tree.
 *
 * A node is a run of tokens that follow its parent's; its cells are there once, however many sequences hold it. A
 * sequence holds a path: all nodes from the root to its leaf. So the cells in use are the sum of the nodes' lengths.
 * Two nodes beside each other may begin alike: two sequences that computed the same for themselves.
 *
 * A node belongs to the key space (`salt`) of whoever computed it and is found by nobody else, so that no tenant learns
 * by timing what another has asked; a node marked open (a pinned prefix) is found by all.
 *
 * Only book-keeping: the caller does to the model's memory what it does here. One thread. */
#ifndef IC_SCHED_PREFIX_H
#define IC_SCHED_PREFIX_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

#define IC_PREFIX_SEQS_MAX 256 /* llama.cpp's LLAMA_MAX_SEQ */
#define IC_SALT_MAX 63         /* bytes of a key space's name; "" is the common one */

struct ic_seq_set {
    uint64_t word[IC_PREFIX_SEQS_MAX / 64];
};

struct ic_prefix;

enum ic_status ic_prefix_open(struct ic_prefix **out, int32_t n_seq,
                              struct ic_err *err); /* n_seq <= IC_PREFIX_SEQS_MAX */
void ic_prefix_close(struct ic_prefix **p);

int32_t ic_prefix_cells(const struct ic_prefix *p);            /* in use, each once */
int32_t ic_prefix_len(const struct ic_prefix *p, int32_t seq); /* tokens that a sequence holds */
void ic_prefix_tokens(const struct ic_prefix *p, int32_t seq, int32_t from, int32_t to,
                      int32_t *out);                                /* copies them */
const char *ic_prefix_salt(const struct ic_prefix *p, int32_t seq); /* whose its end is */
/* Cells that at least one sequence of `set` holds. */
int32_t ic_prefix_cells_of(const struct ic_prefix *p, const struct ic_seq_set *set);
/* Cells that this sequence alone holds at its end: what cutting it would free, from *from on. */
int32_t ic_prefix_own(const struct ic_prefix *p, int32_t seq, int32_t *from);

/* The longest beginning of tokens[0..n) that is there for `salt` and can be shared, and a sequence that holds it. 0: none.
 * `window`: what the model's memory can do.
 *   0   any part of a sequence can be shared
 *   w   a sequence longer than w can be shared as a whole only (sliding window: cells behind it may have been reused)
 *   -1  only whole sequences, however short (recurrent memory) */
int32_t ic_prefix_match(const struct ic_prefix *p, const char *salt, const int32_t *tokens, int32_t n,
                        int32_t window, int32_t *holder);

/* `dst` (which holds nothing) comes to hold the first `len` tokens of `src`. Returns how many it holds then: fewer
 * when there was no memory to split a node. */
int32_t ic_prefix_share(struct ic_prefix *p, int32_t src, int32_t dst, int32_t len, int64_t now);
/* A sequence has grown by n tokens. False: no memory, nothing changed. */
bool ic_prefix_append(struct ic_prefix *p, int32_t seq, const char *salt, const int32_t *tokens, int32_t n,
                      int64_t now);
/* It holds the first `keep` tokens only; what nobody holds is gone. Returns what it holds then: fewer than `keep` when
 * there was no memory to split a node. */
int32_t ic_prefix_cut(struct ic_prefix *p, int32_t seq, int32_t keep);

/* The nodes of a sequence have been used: eviction looks at the end of each sequence for the oldest. */
void ic_prefix_touch(struct ic_prefix *p, int32_t seq, int64_t now);
int64_t ic_prefix_used(const struct ic_prefix *p, int32_t seq); /* when its last node was */
/* All that `seq` holds may be found by every key space. */
void ic_prefix_publish(struct ic_prefix *p, int32_t seq);

/* For tests: false when the tree contradicts itself. */
bool ic_prefix_check(const struct ic_prefix *p);

#endif
