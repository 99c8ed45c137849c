/* An unpickler that executes nothing.
 *
 * A pickle is a program for a stack machine; this one knows the opcodes that torch.save emits
 * (protocols 2 to 5, what plain data needs) and a short list of globals, each of which stands for a
 * fixed shape of data. No name is ever looked up, no object is built but the values below. Any other
 * opcode or global is refused by its name. Memory is an arena bounded by the length of the input; the
 * machine does not recurse, so nesting costs no stack. Reference: CPython Lib/pickletools.py, torch
 * 2.x torch/serialization.py and torch/_utils.py. Pure; any thread. */
#ifndef IC_MODEL_PICKLE_H
#define IC_MODEL_PICKLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "model/tensors.h"

#define IC_PICKLE_BYTES_MAX ((uint64_t)16 << 20) /* of one pickle */
#define IC_PICKLE_VALUES_MAX 1000000             /* values made while reading it */
#define IC_PICKLE_STACK_MAX 65536                /* values waiting on the stack */
#define IC_PICKLE_MEMO_MAX 1000000               /* memo slots */
#define IC_PICKLE_DEPTH_MAX 64                   /* containers in containers */
#define IC_PICKLE_STRING_MAX ((uint64_t)1 << 20) /* bytes of one string */
#define IC_PICKLE_NAME_MAX 128                   /* bytes of a module or global name */

enum ic_pval_kind {
    IC_PVAL_NONE,
    IC_PVAL_BOOL,
    IC_PVAL_INT,
    IC_PVAL_FLOAT,
    IC_PVAL_STR, /* UTF-8, checked */
    IC_PVAL_BYTES,
    IC_PVAL_TUPLE,
    IC_PVAL_LIST,    /* and sets */
    IC_PVAL_DICT,    /* and OrderedDict: items are key, value, key, value … */
    IC_PVAL_GLOBAL,  /* a whitelisted name */
    IC_PVAL_STORAGE, /* persistent id ('storage', class, key, location, count[, None]) */
    IC_PVAL_TENSOR,  /* _rebuild_tensor_v2 of a storage */
    IC_PVAL_OPAQUE,  /* something harmless that nobody asks for: numpy scalars, big ints … */
    IC_PVAL_MARK     /* internal */
};

struct ic_pval;

struct ic_pstorage {
    const char *key; /* entry `data/<key>` of the zip, or a name in the old format; key_len bytes */
    size_t key_len;
    enum ic_dtype dtype;
    uint64_t count; /* elements it claims */
};

struct ic_ptensor {
    const struct ic_pstorage *storage;
    uint64_t offset; /* elements */
    unsigned ndim;
    int64_t size[IC_TENSOR_DIMS_MAX], stride[IC_TENSOR_DIMS_MAX];
};

struct ic_pval {
    uint8_t kind;  /* enum ic_pval_kind */
    uint8_t depth; /* containers below, itself included */
    union {
        bool b;
        int64_t i;
        double f;
        struct {
            const char *p; /* not NUL-terminated; lies in the input */
            size_t len;
        } s;
        struct {
            struct ic_pval **items;
            uint32_t len, cap;
        } list; /* TUPLE, LIST, DICT (len counts keys and values) */
        unsigned global;
        struct ic_pstorage storage;
        struct ic_ptensor *tensor;
    };
};

struct ic_pickle {
    struct ic_pval *root;
    size_t used;              /* bytes of the input up to STOP, which ends it: others may follow */
    struct ic_pval *storages; /* a LIST of all STORAGE values, in the order of their ids; NULL: none */
    struct ic_parena *arena;  /* everything above lies here or in the input */
};

/* The input must outlive the result. On failure the result is empty. Codes: BAD_REQUEST, TOO_LARGE, OOM. */
enum ic_status ic_pickle_parse(const uint8_t *data, size_t len, struct ic_pickle *out, struct ic_err *err);
void ic_pickle_deinit(struct ic_pickle *p);

/* Value under a string key of a dict; NULL: absent, or not a dict. The last one wins, as in Python. */
const struct ic_pval *ic_pval_get(const struct ic_pval *dict, const char *key);

#endif
