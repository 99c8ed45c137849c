#include "model/pickle.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/utf8.h"
#include "model/pickle_ops.h"

/* ---- Names ----------------------------------------------------------------------------------- */

enum opcode {
#define X(code, name) OP_##name = code,
    IC_PICKLE_OPS(X)
#undef X
};

static const char *opcode_name(unsigned op)
{
    switch (op) {
#define X(code, name)                                                                                      \
    case code: return #name;
        IC_PICKLE_OPS(X)
#undef X
    default: return "(no such opcode)";
    }
}

/* X(symbol, module, name, meaning): the whole white list, storage classes (module `torch`, IC_DTYPES)
 * aside. DICT: called with nothing or pairs, makes a dict. OPAQUE: whatever it is called with, the result
 * is a value that nobody can look into. NAME: stands for itself and may not be called. */
#define GLOBALS(X)                                                                                         \
    X("collections", "OrderedDict", DICT)                                                                  \
    X("collections", "defaultdict", DICT)                                                                  \
    X("collections", "Counter", DICT)                                                                      \
    X("builtins", "dict", DICT)                                                                            \
    X("__builtin__", "dict", DICT)                                                                         \
    X("torch._utils", "_rebuild_tensor_v2", TENSOR)                                                        \
    X("torch._utils", "_rebuild_parameter", PARAMETER)                                                     \
    X("torch._utils", "_rebuild_parameter_with_state", PARAMETER)                                          \
    X("torch", "Size", TUPLE)                                                                              \
    X("torch", "device", OPAQUE)                                                                           \
    X("torch", "float32", NAME)                                                                            \
    X("torch", "float64", NAME)                                                                            \
    X("torch", "float16", NAME)                                                                            \
    X("torch", "bfloat16", NAME)                                                                           \
    X("torch", "complex64", NAME)                                                                          \
    X("torch", "complex128", NAME)                                                                         \
    X("torch", "int64", NAME)                                                                              \
    X("torch", "int32", NAME)                                                                              \
    X("torch", "int16", NAME)                                                                              \
    X("torch", "int8", NAME)                                                                               \
    X("torch", "uint8", NAME)                                                                              \
    X("torch", "bool", NAME)                                                                               \
    X("builtins", "list", NAME)                                                                            \
    X("__builtin__", "list", NAME)                                                                         \
    X("builtins", "set", OPAQUE)                                                                           \
    X("__builtin__", "set", OPAQUE)                                                                        \
    X("builtins", "frozenset", OPAQUE)                                                                     \
    X("__builtin__", "frozenset", OPAQUE)                                                                  \
    X("builtins", "complex", OPAQUE)                                                                       \
    X("__builtin__", "complex", OPAQUE)                                                                    \
    X("builtins", "bytearray", OPAQUE)                                                                     \
    X("__builtin__", "bytearray", OPAQUE)                                                                  \
    X("_codecs", "encode", OPAQUE)                                                                         \
    X("pathlib", "PosixPath", OPAQUE)                                                                      \
    X("pathlib", "WindowsPath", OPAQUE)                                                                    \
    X("pathlib._local", "PosixPath", OPAQUE)                                                               \
    X("pathlib._local", "WindowsPath", OPAQUE)                                                             \
    X("datetime", "datetime", OPAQUE)                                                                      \
    X("datetime", "timedelta", OPAQUE)                                                                     \
    X("types", "SimpleNamespace", OPAQUE)                                                                  \
    X("argparse", "Namespace", OPAQUE)                                                                     \
    X("numpy", "dtype", OPAQUE)                                                                            \
    X("numpy", "ndarray", NAME)                                                                            \
    X("numpy.core.multiarray", "scalar", OPAQUE)                                                           \
    X("numpy._core.multiarray", "scalar", OPAQUE)                                                          \
    X("numpy.core.multiarray", "_reconstruct", OPAQUE)                                                     \
    X("numpy._core.multiarray", "_reconstruct", OPAQUE)

enum meaning { M_DICT, M_TENSOR, M_PARAMETER, M_TUPLE, M_OPAQUE, M_NAME, M_STORAGE };

static const struct {
    const char *module, *name;
    enum meaning meaning;
} globals[] = {
#define X(module, name, meaning) {module, name, M_##meaning},
    GLOBALS(X)
#undef X
};
#define GLOBALS_COUNT (sizeof globals / sizeof globals[0])
/* pval.global: an index into `globals`, or GLOBALS_COUNT + a dtype for a storage class. */

static enum meaning meaning_of(const struct ic_pval *v)
{
    return v->global < GLOBALS_COUNT ? globals[v->global].meaning : M_STORAGE;
}

static const char *global_name(unsigned g)
{
    return g < GLOBALS_COUNT ? globals[g].name : ic_dtype_info((enum ic_dtype)(g - GLOBALS_COUNT))->torch;
}

static const char *kind_name(const struct ic_pval *v)
{
    static const char *const names[] = {"None",      "a bool",   "an int",          "a float", "a string",
                                        "bytes",     "a tuple",  "a list",          "a dict",  "a global",
                                        "a storage", "a tensor", "an opaque value", "MARK"};
    return names[v->kind];
}

/* ---- The arena ------------------------------------------------------------------------------- */

struct ic_parena {
    struct ic_parena *older;
    size_t used, cap;
    _Alignas(16) unsigned char bytes[];
};

#define ARENA_FIRST ((size_t)16 << 10)

static void *arena_take(struct ic_parena **a, size_t n)
{
    n = (n + 15) & ~(size_t)15;
    if (!*a || (*a)->cap - (*a)->used < n) {
        size_t cap = *a ? (*a)->cap * 2 : ARENA_FIRST;
        while (cap < n)
            cap *= 2;
        struct ic_parena *fresh = malloc(sizeof *fresh + cap);
        if (!fresh)
            return NULL;
        fresh->older = *a;
        fresh->used = 0;
        fresh->cap = cap;
        *a = fresh;
    }
    void *p = (*a)->bytes + (*a)->used;
    (*a)->used += n;
    return p;
}

void ic_pickle_deinit(struct ic_pickle *p)
{
    while (p->arena) {
        struct ic_parena *older = p->arena->older;
        free(p->arena);
        p->arena = older;
    }
    p->root = p->storages = NULL;
}

/* ---- The machine ----------------------------------------------------------------------------- */

struct machine {
    const uint8_t *p, *end, *start;
    struct ic_parena *arena;
    struct ic_pval **stack;
    size_t top, stack_cap;
    struct ic_pval **memo;
    size_t memo_cap, memo_filled;
    size_t values;
    struct ic_pval *storages;
    enum ic_status failed; /* IC_OK, or why the machine stopped; `err` is filled */
    struct ic_err *err;
    bool stopped;
};

#define FAIL(m, code, ...)                                                                                 \
    ((void)((m)->failed == IC_OK && ((m)->failed = ic_fail((m)->err, code, "pickle: " __VA_ARGS__))))

/* The next n bytes, or NULL and failed. */
static const uint8_t *take(struct machine *m, uint64_t n)
{
    if ((uint64_t)(m->end - m->p) < n) {
        FAIL(m, IC_BAD_REQUEST, "truncated at byte %zu", (size_t)(m->p - m->start));
        return NULL;
    }
    const uint8_t *p = m->p;
    m->p += n;
    return p;
}

static uint64_t take_uint(struct machine *m, unsigned bytes)
{
    const uint8_t *p = take(m, bytes);
    uint64_t v = 0;
    for (unsigned i = 0; p && i < bytes; i++)
        v |= (uint64_t)p[i] << (8 * i);
    return v;
}

static struct ic_pval *value(struct machine *m, enum ic_pval_kind kind)
{
    if (m->failed != IC_OK)
        return NULL;
    if (++m->values > IC_PICKLE_VALUES_MAX) {
        FAIL(m, IC_TOO_LARGE, "more than IC_PICKLE_VALUES_MAX (%d) values", IC_PICKLE_VALUES_MAX);
        return NULL;
    }
    struct ic_pval *v = arena_take(&m->arena, sizeof *v);
    if (!v) {
        FAIL(m, IC_OOM, "no memory for values");
        return NULL;
    }
    memset(v, 0, sizeof *v);
    v->kind = (uint8_t)kind;
    return v;
}

static void push(struct machine *m, struct ic_pval *v)
{
    if (m->failed != IC_OK || !v)
        return;
    if (m->top == m->stack_cap) {
        size_t cap = m->stack_cap ? m->stack_cap * 2 : 256;
        if (cap > IC_PICKLE_STACK_MAX)
            return FAIL(m, IC_TOO_LARGE, "more than IC_PICKLE_STACK_MAX (%d) values on the stack",
                        IC_PICKLE_STACK_MAX);
        struct ic_pval **more = realloc(m->stack, cap * sizeof *more);
        if (!more)
            return FAIL(m, IC_OOM, "no memory for the stack");
        m->stack = more;
        m->stack_cap = cap;
    }
    m->stack[m->top++] = v;
}

/* The topmost value, never a mark; NULL and failed otherwise. */
static struct ic_pval *peek(struct machine *m)
{
    if (m->failed == IC_OK && m->top > 0 && m->stack[m->top - 1]->kind != IC_PVAL_MARK)
        return m->stack[m->top - 1];
    FAIL(m, IC_BAD_REQUEST, "the stack is empty at byte %zu", (size_t)(m->p - m->start));
    return NULL;
}

static struct ic_pval *pop(struct machine *m)
{
    struct ic_pval *v = peek(m);
    if (v)
        m->top--;
    return v;
}

/* Pops everything above the last mark, and the mark. The values stay readable at *items until the next
 * push. */
static bool pop_mark(struct machine *m, struct ic_pval ***items, size_t *n)
{
    for (size_t i = m->top; m->failed == IC_OK && i-- > 0;)
        if (m->stack[i]->kind == IC_PVAL_MARK) {
            *items = m->stack + i + 1;
            *n = m->top - i - 1;
            m->top = i;
            return true;
        }
    FAIL(m, IC_BAD_REQUEST, "no mark on the stack at byte %zu", (size_t)(m->p - m->start));
    return false;
}

/* Appends to a LIST, TUPLE or DICT. */
static void extend(struct machine *m, struct ic_pval *to, struct ic_pval *const *items, size_t n)
{
    if (m->failed != IC_OK || n == 0)
        return;
    if (to->list.len + n > to->list.cap) {
        size_t cap = to->list.cap * 2u > to->list.len + n ? to->list.cap * 2u : to->list.len + n;
        struct ic_pval **more =
            cap > 2 * (size_t)IC_PICKLE_VALUES_MAX ? NULL : arena_take(&m->arena, cap * sizeof *more);
        if (!more)
            return FAIL(m, IC_OOM, "no memory for a list of %zu values", to->list.len + n);
        if (to->list.len)
            memcpy(more, to->list.items, to->list.len * sizeof *more);
        to->list.items = more;
        to->list.cap = (uint32_t)cap;
    }
    for (size_t i = 0; i < n; i++) {
        if (items[i]->depth >= to->depth)
            to->depth = (uint8_t)(items[i]->depth + 1);
        to->list.items[to->list.len++] = items[i];
    }
    if (to->depth > IC_PICKLE_DEPTH_MAX)
        FAIL(m, IC_TOO_LARGE, "nested deeper than IC_PICKLE_DEPTH_MAX (%d)", IC_PICKLE_DEPTH_MAX);
}

static struct ic_pval *container(struct machine *m, enum ic_pval_kind kind, struct ic_pval *const *items,
                                 size_t n)
{
    struct ic_pval *v = value(m, kind);
    if (v) {
        v->depth = 1;
        extend(m, v, items, n);
    }
    return v;
}

static void push_string(struct machine *m, enum ic_pval_kind kind, unsigned length_bytes)
{
    uint64_t len = take_uint(m, length_bytes);
    if (len > IC_PICKLE_STRING_MAX && m->failed == IC_OK)
        return FAIL(m, IC_TOO_LARGE, "a string of %" PRIu64 " bytes, past IC_PICKLE_STRING_MAX", len);
    const uint8_t *p = take(m, len);
    if (!p || m->failed != IC_OK)
        return;
    if (kind == IC_PVAL_STR && !ic_utf8_valid((const char *)p, (size_t)len))
        return FAIL(m, IC_BAD_REQUEST, "a string that is not UTF-8");
    struct ic_pval *v = value(m, kind);
    if (v) {
        v->s.p = (const char *)p;
        v->s.len = (size_t)len;
    }
    push(m, v);
}

static void push_int(struct machine *m, int64_t i)
{
    struct ic_pval *v = value(m, IC_PVAL_INT);
    if (v)
        v->i = i;
    push(m, v);
}

/* LONG1, LONG4: little-endian two's complement of any length; past 64 bits nobody asks for the value. */
static void push_long(struct machine *m, unsigned length_bytes)
{
    uint64_t n = take_uint(m, length_bytes);
    const uint8_t *p = take(m, n);
    if (!p)
        return;
    if (n > 8)
        return push(m, value(m, IC_PVAL_OPAQUE));
    uint64_t v = n && p[n - 1] & 0x80 ? UINT64_MAX : 0;
    for (uint64_t i = n; i-- > 0;)
        v = v << 8 | p[i];
    push_int(m, (int64_t)v);
}

static void push_float(struct machine *m) /* BINFLOAT: big endian */
{
    const uint8_t *p = take(m, 8);
    struct ic_pval *v = p ? value(m, IC_PVAL_FLOAT) : NULL;
    uint64_t bits = 0;
    if (!v)
        return;
    for (int i = 0; i < 8; i++)
        bits = bits << 8 | p[i];
    memcpy(&v->f, &bits, 8);
    push(m, v);
}

static void push_bool(struct machine *m, bool b)
{
    struct ic_pval *v = value(m, IC_PVAL_BOOL);
    if (v)
        v->b = b;
    push(m, v);
}

/* ---- Globals --------------------------------------------------------------------------------- */

static bool equal(const char *want, const char *p, size_t len)
{
    return strlen(want) == len && memcmp(want, p, len) == 0;
}

static void push_global(struct machine *m, const char *module, size_t module_len, const char *name,
                        size_t name_len)
{
    if (m->failed != IC_OK)
        return;
    unsigned found = UINT32_MAX;
    enum ic_dtype dtype;
    for (unsigned i = 0; i < GLOBALS_COUNT; i++)
        if (equal(globals[i].module, module, module_len) && equal(globals[i].name, name, name_len))
            found = i;
    if (equal("torch", module, module_len) && ic_dtype_by_torch(name, name_len, &dtype))
        found = (unsigned)GLOBALS_COUNT + (unsigned)dtype;
    if (found == UINT32_MAX)
        return FAIL(m, IC_BAD_REQUEST, "global %.*s.%.*s is not allowed",
                    (int)(module_len < IC_PICKLE_NAME_MAX ? module_len : IC_PICKLE_NAME_MAX), module,
                    (int)(name_len < IC_PICKLE_NAME_MAX ? name_len : IC_PICKLE_NAME_MAX), name);
    struct ic_pval *v = value(m, IC_PVAL_GLOBAL);
    if (v)
        v->global = found;
    push(m, v);
}

/* GLOBAL: two lines of text, module and name. */
static void op_global(struct machine *m)
{
    const char *part[2];
    size_t len[2];
    for (int i = 0; i < 2; i++) {
        const uint8_t *nl = memchr(m->p, '\n', (size_t)(m->end - m->p));
        if (!nl)
            return FAIL(m, IC_BAD_REQUEST, "truncated at byte %zu", (size_t)(m->p - m->start));
        part[i] = (const char *)m->p;
        len[i] = (size_t)(nl - m->p);
        m->p = nl + 1;
    }
    push_global(m, part[0], len[0], part[1], len[1]);
}

static void op_stack_global(struct machine *m)
{
    struct ic_pval *name = pop(m), *module = pop(m);
    if (!name || !module)
        return;
    if (name->kind != IC_PVAL_STR || module->kind != IC_PVAL_STR)
        return FAIL(m, IC_BAD_REQUEST, "STACK_GLOBAL of %s and %s", kind_name(module), kind_name(name));
    push_global(m, module->s.p, module->s.len, name->s.p, name->s.len);
}

static bool as_ints(const struct ic_pval *v, int64_t *out, unsigned *n)
{
    if (v->kind != IC_PVAL_TUPLE || v->list.len > IC_TENSOR_DIMS_MAX)
        return false;
    for (uint32_t i = 0; i < v->list.len; i++) {
        if (v->list.items[i]->kind != IC_PVAL_INT || v->list.items[i]->i < 0)
            return false;
        out[i] = v->list.items[i]->i;
    }
    *n = v->list.len;
    return true;
}

/* _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata]) */
static struct ic_pval *rebuild_tensor(struct machine *m, const struct ic_pval *args)
{
    struct ic_ptensor t = {0};
    unsigned strides = 0;
    struct ic_pval *const *a = args->list.items;
    if (args->list.len < 6 || args->list.len > 7 || a[0]->kind != IC_PVAL_STORAGE ||
        a[1]->kind != IC_PVAL_INT || a[1]->i < 0 || !as_ints(a[2], t.size, &t.ndim) ||
        !as_ints(a[3], t.stride, &strides) || strides != t.ndim) {
        FAIL(m, IC_BAD_REQUEST,
             "_rebuild_tensor_v2 called with something else than storage, offset, size (at "
             "most %d dimensions), stride",
             IC_TENSOR_DIMS_MAX);
        return NULL;
    }
    /* torch conjugates and negates lazily: its storage holds other values than the tensor has. */
    for (uint32_t i = 0; args->list.len == 7 && a[6]->kind == IC_PVAL_DICT && i < a[6]->list.len; i += 2)
        if (a[6]->list.items[i + 1]->kind == IC_PVAL_BOOL && a[6]->list.items[i + 1]->b) {
            FAIL(m, IC_BAD_REQUEST,
                 "a tensor conjugated or negated lazily: save it after resolve_conj() and "
                 "resolve_neg()");
            return NULL;
        }
    t.storage = &a[0]->storage;
    t.offset = (uint64_t)a[1]->i;
    struct ic_pval *v = value(m, IC_PVAL_TENSOR);
    if (v && !(v->tensor = arena_take(&m->arena, sizeof t)))
        FAIL(m, IC_OOM, "no memory for values");
    if (m->failed != IC_OK)
        return NULL;
    *v->tensor = t;
    return v;
}

/* OrderedDict() or OrderedDict([(k, v), …]); defaultdict(factory). */
static struct ic_pval *make_dict(struct machine *m, const struct ic_pval *args)
{
    struct ic_pval *dict = container(m, IC_PVAL_DICT, NULL, 0);
    if (!dict || args->list.len == 0 || args->list.items[0]->kind != IC_PVAL_LIST)
        return dict;
    const struct ic_pval *pairs = args->list.items[0];
    for (uint32_t i = 0; i < pairs->list.len; i++) {
        const struct ic_pval *pair = pairs->list.items[i];
        if ((pair->kind != IC_PVAL_TUPLE && pair->kind != IC_PVAL_LIST) || pair->list.len != 2) {
            FAIL(m, IC_BAD_REQUEST, "a dict made of something else than pairs");
            return NULL;
        }
        extend(m, dict, pair->list.items, 2);
    }
    return dict;
}

static void op_call(struct machine *m, bool newobj)
{
    struct ic_pval *args = pop(m), *f = pop(m), *v = NULL;
    if (!args || !f)
        return;
    const char *how = newobj ? "NEWOBJ" : "REDUCE";
    if (f->kind != IC_PVAL_GLOBAL || args->kind != IC_PVAL_TUPLE)
        return FAIL(m, IC_BAD_REQUEST, "%s of %s with %s", how, kind_name(f), kind_name(args));
    const struct ic_pval *first = args->list.len ? args->list.items[0] : NULL;
    switch (meaning_of(f)) {
    case M_DICT: v = make_dict(m, args); break;
    case M_OPAQUE: v = value(m, IC_PVAL_OPAQUE); break;
    case M_TENSOR:
        if (!newobj)
            v = rebuild_tensor(m, args);
        break;
    case M_PARAMETER:
        if (!newobj && first && first->kind == IC_PVAL_TENSOR)
            v = args->list.items[0];
        break;
    case M_TUPLE:
        if (first && (first->kind == IC_PVAL_TUPLE || first->kind == IC_PVAL_LIST))
            v = container(m, IC_PVAL_TUPLE, first->list.items, first->list.len);
        break;
    case M_NAME:
    case M_STORAGE: break;
    }
    if (!v)
        return FAIL(m, IC_BAD_REQUEST, "%s of global %s in a way that is not allowed", how,
                    global_name(f->global));
    push(m, v);
}

static void op_persid(struct machine *m)
{
    struct ic_pval *pid = pop(m);
    if (!pid)
        return;
    struct ic_pval *const *a = pid->kind == IC_PVAL_TUPLE ? pid->list.items : NULL;
    /* The format before torch 1.6 has a sixth, a view of the storage, which is None in all but the oldest files. */
    const bool fits =
        a && (pid->list.len == 5 || (pid->list.len == 6 && pid->list.items[5]->kind == IC_PVAL_NONE));
    if (!fits || a[0]->kind != IC_PVAL_STR || !equal("storage", a[0]->s.p, a[0]->s.len) ||
        a[1]->kind != IC_PVAL_GLOBAL || meaning_of(a[1]) != M_STORAGE || a[2]->kind != IC_PVAL_STR ||
        a[3]->kind != IC_PVAL_STR || a[4]->kind != IC_PVAL_INT || a[4]->i < 0)
        return FAIL(m, IC_BAD_REQUEST,
                    "a persistent id that is not ('storage', class, key, location, count)");
    struct ic_pval *v = value(m, IC_PVAL_STORAGE);
    if (v)
        v->storage = (struct ic_pstorage){.key = a[2]->s.p,
                                          .key_len = a[2]->s.len,
                                          .dtype = (enum ic_dtype)(a[1]->global - GLOBALS_COUNT),
                                          .count = (uint64_t)a[4]->i};
    push(m, v);
    if (!m->storages)
        m->storages = container(m, IC_PVAL_LIST, NULL, 0);
    if (v && m->storages)
        extend(m, m->storages, &v, 1);
}

/* ---- Containers and memo --------------------------------------------------------------------- */

static void op_append(struct machine *m, bool many, const char *name)
{
    struct ic_pval *one = NULL, **items = &one;
    size_t n = 1;
    if (many ? !pop_mark(m, &items, &n) : !(one = pop(m)))
        return;
    struct ic_pval *to = peek(m);
    if (!to)
        return;
    if (to->kind != IC_PVAL_LIST)
        return FAIL(m, IC_BAD_REQUEST, "%s to %s", name, kind_name(to));
    extend(m, to, items, n);
}

static void op_setitems(struct machine *m, bool many)
{
    struct ic_pval *two[2], **items = two;
    size_t n = 2;
    if (many) {
        if (!pop_mark(m, &items, &n))
            return;
    } else if (!(two[1] = pop(m)) || !(two[0] = pop(m)))
        return;
    struct ic_pval *to = peek(m);
    if (!to)
        return;
    if (to->kind != IC_PVAL_DICT || n % 2)
        return FAIL(m, IC_BAD_REQUEST, "SETITEMS of %zu values into %s", n, kind_name(to));
    extend(m, to, items, n);
}

/* Attributes are not data: the state dict's `_metadata`, a dtype's flags. */
static void op_build(struct machine *m)
{
    if (!pop(m))
        return;
    struct ic_pval *to = peek(m);
    if (to && to->kind != IC_PVAL_DICT && to->kind != IC_PVAL_OPAQUE && to->kind != IC_PVAL_TENSOR)
        FAIL(m, IC_BAD_REQUEST, "BUILD of %s is not allowed", kind_name(to));
}

static void op_tuple(struct machine *m, size_t n)
{
    struct ic_pval *items[3];
    for (size_t i = n; i-- > 0;)
        if (!(items[i] = pop(m)))
            return;
    push(m, container(m, IC_PVAL_TUPLE, items, n));
}

static void op_from_mark(struct machine *m, enum ic_pval_kind kind)
{
    struct ic_pval **items;
    size_t n;
    if (!pop_mark(m, &items, &n))
        return;
    if (kind == IC_PVAL_DICT && n % 2)
        return FAIL(m, IC_BAD_REQUEST, "DICT of %zu values", n);
    push(m, container(m, kind, items, n));
}

/* A memo index past the program's own length could not have been reached by counting, as picklers do. */
static void memo_put(struct machine *m, uint64_t i)
{
    struct ic_pval *v = peek(m);
    if (!v)
        return;
    if (i >= IC_PICKLE_MEMO_MAX || i >= (uint64_t)(m->end - m->start))
        return FAIL(m, IC_TOO_LARGE,
                    "memo slot %" PRIu64 ", past IC_PICKLE_MEMO_MAX (%d) or the pickle's length", i,
                    IC_PICKLE_MEMO_MAX);
    if (i >= m->memo_cap) {
        size_t cap = m->memo_cap * 2 > i + 1 ? m->memo_cap * 2 : (size_t)i + 64;
        struct ic_pval **more = realloc(m->memo, cap * sizeof *more);
        if (!more)
            return FAIL(m, IC_OOM, "no memory for the memo");
        memset(more + m->memo_cap, 0, (cap - m->memo_cap) * sizeof *more);
        m->memo = more;
        m->memo_cap = cap;
    }
    m->memo_filled += !m->memo[i];
    m->memo[i] = v;
}

static void memo_get(struct machine *m, uint64_t i)
{
    if (m->failed != IC_OK)
        return;
    if (i >= m->memo_cap || !m->memo[i])
        return FAIL(m, IC_BAD_REQUEST, "memo slot %" PRIu64 " is empty", i);
    push(m, m->memo[i]);
}

static void op_pop_mark(struct machine *m)
{
    struct ic_pval **items;
    size_t n;
    pop_mark(m, &items, &n);
}

static void op_proto(struct machine *m)
{
    uint64_t version = take_uint(m, 1);
    if (version > 5)
        FAIL(m, IC_BAD_REQUEST, "protocol %" PRIu64 " is not known", version);
}

static void op_frame(struct machine *m)
{
    uint64_t n = take_uint(m, 8);
    if (n > (uint64_t)(m->end - m->p))
        FAIL(m, IC_BAD_REQUEST, "truncated: a frame of %" PRIu64 " bytes", n);
}

static void one_op(struct machine *m)
{
    unsigned op = (unsigned)take_uint(m, 1);
    if (m->failed != IC_OK)
        return;
    switch (op) {
    case OP_PROTO: op_proto(m); break;
    case OP_FRAME: op_frame(m); break;
    case OP_STOP: m->stopped = true; break;
    case OP_MARK: push(m, value(m, IC_PVAL_MARK)); break;
    case OP_POP: pop(m); break;
    case OP_POP_MARK: op_pop_mark(m); break;
    case OP_DUP: push(m, peek(m)); break;
    case OP_NONE: push(m, value(m, IC_PVAL_NONE)); break;
    case OP_NEWTRUE: push_bool(m, true); break;
    case OP_NEWFALSE: push_bool(m, false); break;
    case OP_BININT: push_int(m, (int32_t)take_uint(m, 4)); break;
    case OP_BININT1: push_int(m, (int64_t)take_uint(m, 1)); break;
    case OP_BININT2: push_int(m, (int64_t)take_uint(m, 2)); break;
    case OP_LONG1: push_long(m, 1); break;
    case OP_LONG4: push_long(m, 4); break;
    case OP_BINFLOAT: push_float(m); break;
    case OP_SHORT_BINUNICODE: push_string(m, IC_PVAL_STR, 1); break;
    case OP_BINUNICODE: push_string(m, IC_PVAL_STR, 4); break;
    case OP_BINUNICODE8: push_string(m, IC_PVAL_STR, 8); break;
    case OP_SHORT_BINBYTES: push_string(m, IC_PVAL_BYTES, 1); break;
    case OP_BINBYTES: push_string(m, IC_PVAL_BYTES, 4); break;
    case OP_BINBYTES8: push_string(m, IC_PVAL_BYTES, 8); break;
    case OP_SHORT_BINSTRING: push_string(m, IC_PVAL_BYTES, 1); break;
    case OP_BINSTRING: push_string(m, IC_PVAL_BYTES, 4); break;
    case OP_BYTEARRAY8: push_string(m, IC_PVAL_BYTES, 8); break;
    case OP_EMPTY_TUPLE: push(m, container(m, IC_PVAL_TUPLE, NULL, 0)); break;
    case OP_TUPLE1: op_tuple(m, 1); break;
    case OP_TUPLE2: op_tuple(m, 2); break;
    case OP_TUPLE3: op_tuple(m, 3); break;
    case OP_TUPLE: op_from_mark(m, IC_PVAL_TUPLE); break;
    case OP_EMPTY_LIST:
    case OP_EMPTY_SET: push(m, container(m, IC_PVAL_LIST, NULL, 0)); break;
    case OP_LIST:
    case OP_FROZENSET: op_from_mark(m, IC_PVAL_LIST); break;
    case OP_APPEND: op_append(m, false, "APPEND"); break;
    case OP_APPENDS: op_append(m, true, "APPENDS"); break;
    case OP_ADDITEMS: op_append(m, true, "ADDITEMS"); break;
    case OP_EMPTY_DICT: push(m, container(m, IC_PVAL_DICT, NULL, 0)); break;
    case OP_DICT: op_from_mark(m, IC_PVAL_DICT); break;
    case OP_SETITEM: op_setitems(m, false); break;
    case OP_SETITEMS: op_setitems(m, true); break;
    case OP_BINPUT: memo_put(m, take_uint(m, 1)); break;
    case OP_LONG_BINPUT: memo_put(m, take_uint(m, 4)); break;
    case OP_MEMOIZE: memo_put(m, m->memo_filled); break;
    case OP_BINGET: memo_get(m, take_uint(m, 1)); break;
    case OP_LONG_BINGET: memo_get(m, take_uint(m, 4)); break;
    case OP_GLOBAL: op_global(m); break;
    case OP_STACK_GLOBAL: op_stack_global(m); break;
    case OP_REDUCE: op_call(m, false); break;
    case OP_NEWOBJ: op_call(m, true); break;
    case OP_BUILD: op_build(m); break;
    case OP_BINPERSID: op_persid(m); break;
    default: FAIL(m, IC_BAD_REQUEST, "opcode 0x%02X %s is not allowed", op, opcode_name(op)); break;
    }
}

enum ic_status ic_pickle_parse(const uint8_t *data, size_t len, struct ic_pickle *out, struct ic_err *err)
{
    *out = (struct ic_pickle){0};
    if (len > IC_PICKLE_BYTES_MAX)
        return ic_fail(err, IC_TOO_LARGE, "pickle: %zu bytes, past IC_PICKLE_BYTES_MAX", len);
    struct machine m = {.p = data, .end = data + len, .start = data, .err = err};
    while (m.failed == IC_OK && !m.stopped)
        one_op(&m);
    out->root = pop(&m);
    if (m.failed == IC_OK && m.top != 0)
        FAIL(&m, IC_BAD_REQUEST, "%zu values left on the stack", m.top);
    free(m.stack);
    free(m.memo);
    out->arena = m.arena;
    out->used = (size_t)(m.p - m.start);
    out->storages = m.storages;
    if (m.failed != IC_OK)
        ic_pickle_deinit(out);
    return m.failed;
}

const struct ic_pval *ic_pval_get(const struct ic_pval *dict, const char *key)
{
    if (!dict || dict->kind != IC_PVAL_DICT)
        return NULL;
    for (uint32_t i = dict->list.len; i >= 2; i -= 2) {
        const struct ic_pval *k = dict->list.items[i - 2];
        if (k->kind == IC_PVAL_STR && equal(key, k->s.p, k->s.len))
            return dict->list.items[i - 1];
    }
    return NULL;
}
