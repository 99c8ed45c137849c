#include "model/torch.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "model/pickle.h"
#include "model/zip.h"

#define TORCH_PREFIX "_orig_mod." /* what torch.compile's wrapper puts before every key */

/* The one entry `<root>/data.pkl`; root_len is the length of `<root>/`. */
static enum ic_status find_program(const struct ic_zip *zip, const struct ic_zip_entry **program,
                                   size_t *root_len, struct ic_err *err)
{
    static const char tail[] = "data.pkl";
    *program = NULL;
    for (size_t i = 0; i < zip->count; i++) {
        const char *name = zip->entries[i].name, *slash = strchr(name, '/');
        size_t len = slash ? (size_t)(slash - name) + 1 : 0;
        if (strcmp(name + len, "constants.pkl") == 0)
            return ic_fail(err, IC_BAD_REQUEST, "a TorchScript archive (%s): save a state_dict instead",
                           name);
        if (strcmp(name + len, tail) != 0)
            continue;
        if (*program)
            return ic_fail(err, IC_BAD_REQUEST, "zip: both %s and %s", (*program)->name, name);
        *program = &zip->entries[i];
        *root_len = len;
    }
    return *program ? IC_OK : ic_fail(err, IC_BAD_REQUEST, "zip: no data.pkl: not a file of torch.save");
}

/* Big-endian files exist in principle; nothing here reads them. */
static enum ic_status check_byteorder(const struct ic_tensors *set, const struct ic_zip *zip,
                                      const char *root, size_t root_len, struct ic_err *err)
{
    char name[IC_ZIP_NAME_MAX + 16];
    snprintf(name, sizeof name, "%.*sbyteorder", (int)root_len, root);
    const struct ic_zip_entry *e = ic_zip_find(zip, name);
    if (!e)
        return IC_OK;
    uint8_t *text;
    enum ic_status s = ic_extent_read(set->fd, &e->where, 16, name, &text, err);
    if (s != IC_OK)
        return s;
    if (e->where.bytes != 6 || memcmp(text, "little", 6) != 0)
        s = ic_fail(err, IC_BAD_REQUEST, "%s is not little", name);
    free(text);
    return s;
}

struct old_storage { /* of the format before the zip */
    const struct ic_pstorage *is;
    struct ic_extent where;
    bool there; /* `where` is known */
};

struct reader {
    struct ic_tensors *set;
    const struct ic_zip *zip; /* NULL: the old format */
    const char *root;         /* `<root>/` */
    size_t root_len;
    struct old_storage *old; /* by key */
    size_t old_count;
    bool strip;
};

static int by_key(const void *a, const void *b)
{
    const struct old_storage *x = a, *y = b;
    const size_t n = x->is->key_len < y->is->key_len ? x->is->key_len : y->is->key_len;
    const int order = memcmp(x->is->key, y->is->key, n);
    return order ? order : (x->is->key_len > y->is->key_len) - (x->is->key_len < y->is->key_len);
}

static struct old_storage *find_old(const struct reader *r, const char *key, size_t len)
{
    const struct ic_pstorage st = {.key = key, .key_len = len};
    return r->old_count
               ? bsearch(&(struct old_storage){.is = &st}, r->old, r->old_count, sizeof *r->old, by_key)
               : NULL;
}

/* Where a storage lies, or NULL; `entry` becomes its name for messages. */
static const struct ic_extent *find_storage(const struct reader *r, const struct ic_pstorage *st,
                                            char *entry, size_t size)
{
    snprintf(entry, size, "%.*s%s%.*s", (int)r->root_len, r->root, r->zip ? "data/" : "", (int)st->key_len,
             st->key);
    if (r->zip) {
        const struct ic_zip_entry *e = ic_zip_find(r->zip, entry);
        return e ? &e->where : NULL;
    }
    const struct old_storage *o = find_old(r, st->key, st->key_len);
    return o && o->there ? &o->where : NULL;
}

static enum ic_status add_tensor(const struct reader *r, const struct ic_ptensor *p, const char *name,
                                 size_t len, struct ic_err *err)
{
    char entry[IC_ZIP_NAME_MAX + 80];
    const struct ic_pstorage *st = p->storage;
    int shown = len < IC_TENSOR_NAME_MAX ? (int)len : IC_TENSOR_NAME_MAX;
    if (st->key_len > 64)
        return ic_fail(err, IC_BAD_REQUEST, "tensor %.*s: its storage's key is too long", shown, name);
    const struct ic_extent *where = find_storage(r, st, entry, sizeof entry);
    if (!where)
        return ic_fail(err, IC_BAD_REQUEST, "tensor %.*s: its storage %s is not in the file", shown, name,
                       entry);
    uint64_t holds = where->bytes / ic_dtype_info(st->dtype)->bytes;
    if (st->count > holds)
        return ic_fail(err, IC_BAD_REQUEST,
                       "tensor %.*s: storage %s should hold %" PRIu64 " elements and holds %" PRIu64, shown,
                       name, entry, st->count, holds);
    struct ic_tensor t = {.dtype = st->dtype, .ndim = p->ndim, .offset = p->offset, .where = *where};
    memcpy(t.shape, p->size, sizeof t.shape);
    memcpy(t.stride, p->stride, sizeof t.stride);
    return ic_tensors_add(r->set, &t, name, len, err);
}

/* First occurrence of the prefix, wherever it stands, as `str.replace(prefix, '', 1)` does. */
static enum ic_status add_named(const struct reader *r, const struct ic_pval *key, const struct ic_pval *v,
                                struct ic_err *err)
{
    const size_t n = sizeof TORCH_PREFIX - 1;
    const char *hit = r->strip ? memmem(key->s.p, key->s.len, TORCH_PREFIX, n) : NULL;
    if (!hit || key->s.len >= IC_TENSOR_NAME_MAX + n)
        return add_tensor(r, v->tensor, key->s.p, key->s.len, err);
    char name[IC_TENSOR_NAME_MAX + sizeof TORCH_PREFIX];
    size_t before = (size_t)(hit - key->s.p);
    memcpy(name, key->s.p, before);
    memcpy(name + before, hit + n, key->s.len - before - n);
    return add_tensor(r, v->tensor, name, key->s.len - n, err);
}

static enum ic_status add_dict(struct reader *r, const struct ic_pval *dict, struct ic_err *err)
{
    const size_t n = sizeof TORCH_PREFIX - 1;
    for (uint32_t i = 0; i < dict->list.len; i += 2) {
        const struct ic_pval *key = dict->list.items[i];
        if (key->kind == IC_PVAL_STR && key->s.len >= n && memcmp(key->s.p, TORCH_PREFIX, n) == 0)
            r->strip = r->set->stripped = true;
    }
    for (uint32_t i = 0; i < dict->list.len; i += 2) {
        const struct ic_pval *key = dict->list.items[i], *v = dict->list.items[i + 1];
        if (key->kind != IC_PVAL_STR || v->kind != IC_PVAL_TENSOR) {
            r->set->ignored++;
            continue;
        }
        enum ic_status s = add_named(r, key, v, err);
        if (s != IC_OK)
            return s;
    }
    return IC_OK;
}

/* Plain values of a dict as a JSON object, dicts in it `deep` deep. *left entries at most are looked at: a dict
 * that stands in many places costs its size in each. */
static void put_object(struct ic_buf *b, const struct ic_pval *dict, int deep, int *left)
{
    char key[128];
    ic_buf_puts(b, "{");
    for (uint32_t i = 0; i < dict->list.len && (*left)-- > 0; i += 2) {
        const struct ic_pval *k = dict->list.items[i], *v = dict->list.items[i + 1];
        if (k->kind != IC_PVAL_STR || k->s.len >= sizeof key || memchr(k->s.p, 0, k->s.len))
            continue;
        memcpy(key, k->s.p, k->s.len);
        key[k->s.len] = 0;
        if (v->kind == IC_PVAL_STR) {
            ic_json_key(b, key);
            ic_json_str(b, v->s.p, v->s.len);
        } else if (v->kind == IC_PVAL_INT)
            ic_json_kint(b, key, v->i);
        else if (v->kind == IC_PVAL_FLOAT && isfinite(v->f))
            ic_json_knum(b, key, v->f);
        else if (v->kind == IC_PVAL_BOOL)
            ic_json_kbool(b, key, v->b);
        else if (v->kind == IC_PVAL_DICT && deep) {
            ic_json_key(b, key);
            put_object(b, v, deep - 1, left);
        }
    }
    ic_buf_puts(b, "}");
}

#define CONFIG_BYTES_MAX ((size_t)64 << 10)
#define CONFIG_ENTRIES_MAX 1000

/* Trainer v3 keeps the experiment's config.json as a dict beside the weights. */
static enum ic_status keep_config(struct ic_tensors *set, const struct ic_pval *config, struct ic_err *err)
{
    struct ic_buf b = {.max = CONFIG_BYTES_MAX};
    int left = CONFIG_ENTRIES_MAX;
    put_object(&b, config, 2, &left);
    ic_buf_put(&b, "", 1);
    if (b.failed || left < 0) /* none of ours */
        return ic_buf_deinit(&b), IC_OK;
    set->meta = calloc(1, sizeof *set->meta);
    if (!set->meta)
        return ic_buf_deinit(&b), ic_fail(err, IC_OOM, "no memory for metadata");
    set->meta_count = 1;
    set->meta->value = ic_buf_take(&b, NULL);
    set->meta->key = strdup(IC_TENSORS_META_PREFIX "config");
    return set->meta->key ? IC_OK : ic_fail(err, IC_OOM, "no memory for metadata");
}

static enum ic_status read_root(struct reader *r, const struct ic_pval *root, struct ic_err *err)
{
    struct ic_tensors *set = r->set;
    if (root->kind == IC_PVAL_TENSOR) {
        snprintf(set->form, sizeof set->form, "a bare tensor");
        return add_tensor(r, root->tensor, "psi", 3, err);
    }
    if (root->kind != IC_PVAL_DICT)
        return ic_fail(err, IC_BAD_REQUEST,
                       "the checkpoint is neither a dict nor a tensor (a whole pickled "
                       "model? save its state_dict)");
    const char *form = "model_state_dict";
    const struct ic_pval *dict = ic_pval_get(root, form), *v;
    if (!dict)
        dict = ic_pval_get(root, form = "state_dict");
    if (!dict && (v = ic_pval_get(root, "model")) && v->kind == IC_PVAL_DICT)
        dict = v, form = "model";
    if (!dict)
        dict = root, form = "bare state dict";
    if (dict->kind != IC_PVAL_DICT)
        return ic_fail(err, IC_BAD_REQUEST, "%s is not a dict", form);
    snprintf(set->form, sizeof set->form, "%s", form);
    if ((v = ic_pval_get(root, "episode")) && v->kind == IC_PVAL_INT && v->i >= 0)
        set->episode = v->i;
    if ((v = ic_pval_get(root, "loss")) && v->kind == IC_PVAL_FLOAT)
        set->loss = v->f;
    if ((v = ic_pval_get(root, "config")) && v->kind == IC_PVAL_DICT) {
        enum ic_status s = keep_config(set, v, err);
        if (s != IC_OK)
            return s;
    }
    return add_dict(r, dict, err);
}

enum ic_status ic_torch_read(struct ic_tensors *set, struct ic_err *err)
{
    struct ic_zip *zip;
    const struct ic_zip_entry *program;
    struct reader r = {.set = set};
    struct ic_pickle pickle = {0};
    uint8_t *bytes = NULL;
    enum ic_status s = ic_zip_open(set->fd, set->file_bytes, &zip, err);
    if (s != IC_OK)
        return s;
    s = find_program(zip, &program, &r.root_len, err);
    if (s == IC_OK) {
        r.zip = zip;
        r.root = program->name;
        s = check_byteorder(set, zip, r.root, r.root_len, err);
    }
    if (s == IC_OK)
        s = ic_extent_read(set->fd, &program->where, IC_PICKLE_BYTES_MAX, program->name, &bytes, err);
    if (s == IC_OK)
        s = ic_pickle_parse(bytes, (size_t)program->where.bytes, &pickle, err);
    if (s == IC_OK)
        s = read_root(&r, pickle.root, err);
    ic_pickle_deinit(&pickle);
    free(bytes);
    ic_zip_close(&zip);
    return s;
}

/* ---- Before torch 1.6, or with _use_new_zipfile_serialization=False -----------------------------
 *
 * Pickles one behind the other: the magic number, 1001, a dict about the machine, the program, the list of
 * the storages' keys; then, in the order of that list, of each storage its count (int64) and its elements. */

#define OLD_PROTOCOL 1001

bool ic_torch_is_old(const uint8_t *head, size_t n)
{
    static const uint8_t magic[] = {0x8A, 10, 0x6C, 0xFC, 0x9C, 0x46, 0xF9, 0x20, 0x6A, 0xA8, 0x50, 0x19};
    size_t at = n > 2 && head[2] == 0x95 ? 11 : 2; /* a FRAME, from protocol 4 on */
    return n >= at + sizeof magic && head[0] == 0x80 && memcmp(head + at, magic, sizeof magic) == 0;
}

/* What every storage of the program is, once each, by key. */
static enum ic_status list_old(struct reader *r, const struct ic_pval *storages, struct ic_err *err)
{
    const size_t n = storages ? storages->list.len : 0;
    size_t kept = 0;
    r->old = calloc(n + 1, sizeof *r->old);
    if (!r->old)
        return ic_fail(err, IC_OOM, "no memory for a table of storages");
    for (size_t i = 0; i < n; i++)
        r->old[i].is = &storages->list.items[i]->storage;
    qsort(r->old, n, sizeof *r->old, by_key);
    for (size_t i = 0; i < n; i++)
        if (!kept || by_key(&r->old[kept - 1], &r->old[i]) != 0)
            r->old[kept++] = r->old[i];
        else if (r->old[kept - 1].is->dtype != r->old[i].is->dtype ||
                 r->old[kept - 1].is->count != r->old[i].is->count)
            return ic_fail(err, IC_BAD_REQUEST, "storage %.*s is of two kinds",
                           (int)(r->old[i].is->key_len < 64 ? r->old[i].is->key_len : 64),
                           r->old[i].is->key);
    r->old_count = kept;
    return IC_OK;
}

/* Walks over the storages, from file offset `at` on. */
static enum ic_status place_old(struct reader *r, const struct ic_pval *keys, uint64_t at,
                                struct ic_err *err)
{
    const struct ic_tensors *set = r->set;
    if (keys->kind != IC_PVAL_LIST)
        return ic_fail(err, IC_BAD_REQUEST, "torch's old format: no list of storages");
    for (uint32_t i = 0; i < keys->list.len; i++) {
        const struct ic_pval *k = keys->list.items[i];
        struct old_storage *o = k->kind == IC_PVAL_STR ? find_old(r, k->s.p, k->s.len) : NULL;
        uint8_t raw[8];
        uint64_t count = 0, bytes;
        if (!o || o->there)
            return ic_fail(err, IC_BAD_REQUEST,
                           "torch's old format: storage %u of its list is unknown, or twice", i);
        enum ic_status s = ic_pread_all(set->fd, at, raw, sizeof raw, err);
        if (s != IC_OK)
            return s;
        for (int b = 7; b >= 0; b--)
            count = count << 8 | raw[b];
        at += sizeof raw;
        if (count != o->is->count ||
            __builtin_mul_overflow(count, ic_dtype_info(o->is->dtype)->bytes, &bytes) ||
            at > set->file_bytes || bytes > set->file_bytes - at)
            return ic_fail(err, IC_BAD_REQUEST,
                           "torch's old format: storage %u has %" PRIu64
                           " elements, and should have %" PRIu64 "; or the file is truncated",
                           i, count, o->is->count);
        o->where = (struct ic_extent){.at = at, .stored = bytes, .bytes = bytes};
        o->there = true;
        at += bytes;
    }
    return IC_OK;
}

/* The three pickles before the program; *at moves behind them. */
static enum ic_status check_old(const uint8_t *bytes, size_t n, size_t *at, struct ic_err *err)
{
    enum ic_status s = IC_OK;
    for (int i = 0; i < 3 && s == IC_OK; i++) {
        struct ic_pickle p;
        s = ic_pickle_parse(bytes + *at, n - *at, &p, err);
        *at += p.used;
        const struct ic_pval *little = s == IC_OK && i == 2 ? ic_pval_get(p.root, "little_endian") : NULL;
        if (s == IC_OK && i == 1 && (p.root->kind != IC_PVAL_INT || p.root->i != OLD_PROTOCOL))
            s = ic_fail(err, IC_BAD_REQUEST, "torch's old format: not version %d of it", OLD_PROTOCOL);
        else if (s == IC_OK && i == 2 && !(little && little->kind == IC_PVAL_BOOL && little->b))
            s = ic_fail(err, IC_BAD_REQUEST, "torch's old format: not little endian");
        ic_pickle_deinit(&p);
    }
    return s;
}

enum ic_status ic_torch_read_old(struct ic_tensors *set, struct ic_err *err)
{
    const uint64_t n = set->file_bytes < IC_PICKLE_BYTES_MAX ? set->file_bytes : IC_PICKLE_BYTES_MAX;
    struct reader r = {.set = set, .root = ""};
    struct ic_pickle program = {0}, keys = {0};
    uint8_t *bytes = NULL;
    size_t at = 0;
    enum ic_status s =
        ic_extent_read(set->fd, &(struct ic_extent){.stored = n, .bytes = n}, n, "the file", &bytes, err);
    if (s == IC_OK)
        s = check_old(bytes, (size_t)n, &at, err);
    if (s == IC_OK)
        s = ic_pickle_parse(bytes + at, (size_t)n - at, &program, err);
    if (s == IC_OK)
        s = ic_pickle_parse(bytes + at + program.used, (size_t)n - at - program.used, &keys, err);
    if (s == IC_OK)
        s = list_old(&r, program.storages, err);
    if (s == IC_OK)
        s = place_old(&r, keys.root, at + program.used + keys.used, err);
    if (s == IC_OK)
        s = read_root(&r, program.root, err);
    free(r.old);
    ic_pickle_deinit(&keys);
    ic_pickle_deinit(&program);
    free(bytes);
    return s;
}
