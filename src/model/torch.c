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

struct reader {
    struct ic_tensors *set;
    const struct ic_zip *zip;
    const char *root; /* `<root>/` */
    size_t root_len;
    bool strip;
};

static enum ic_status add_tensor(const struct reader *r, const struct ic_ptensor *p, const char *name,
                                 size_t len, struct ic_err *err)
{
    char entry[IC_ZIP_NAME_MAX + 16];
    const struct ic_pstorage *st = p->storage;
    int shown = len < IC_TENSOR_NAME_MAX ? (int)len : IC_TENSOR_NAME_MAX;
    if (st->key_len > 64)
        return ic_fail(err, IC_BAD_REQUEST, "tensor %.*s: its storage's key is too long", shown, name);
    snprintf(entry, sizeof entry, "%.*sdata/%.*s", (int)r->root_len, r->root, (int)st->key_len, st->key);
    const struct ic_zip_entry *e = ic_zip_find(r->zip, entry);
    if (!e)
        return ic_fail(err, IC_BAD_REQUEST, "tensor %.*s: its storage %s is not in the file", shown, name,
                       entry);
    uint64_t holds = e->where.bytes / ic_dtype_info(st->dtype)->bytes;
    if (st->count > holds)
        return ic_fail(err, IC_BAD_REQUEST,
                       "tensor %.*s: storage %s should hold %" PRIu64 " elements and holds %" PRIu64, shown,
                       name, entry, st->count, holds);
    struct ic_tensor t = {.dtype = st->dtype, .ndim = p->ndim, .offset = p->offset, .where = e->where};
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
