/* What the readers and the writer make of honest files. Hostile ones: hostile_test.c. */
#include <setjmp.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <cmocka.h>

#include "model/fixture.h"
#include "model/pickle.h"
#include "model/safetensors.h"
#include "model/tensors.h"
#include "model/zip.h"

/* Writes a checkpoint of one pickle and some storages, opens it. */
static struct ic_tensors *open_torch(struct ic_buf *pickle, struct zip_entry *storages, size_t n,
                                     struct ic_err *err)
{
    struct zip_entry e[8];
    struct ic_buf zip = {0};
    e[0] = zip_stored("m/data.pkl", pickle->data, pickle->len);
    for (size_t i = 0; i < n; i++)
        e[i + 1] = storages[i];
    zip_write(&zip, e, n + 1);
    const char *path = file_with(zip.data, zip.len);
    struct ic_tensors *set = NULL;
    ic_tensors_open(path, &set, err);
    unlink(path);
    ic_buf_deinit(&zip);
    ic_buf_deinit(pickle);
    return set;
}

static struct ic_tensors *open_one(const char *cls, const void *data, size_t bytes, int32_t count,
                                   int32_t offset, unsigned ndim, const int32_t *size,
                                   const int32_t *stride, struct ic_err *err)
{
    struct ic_buf p = {0};
    struct zip_entry st = zip_stored("m/data/0", data, bytes);
    pk_begin(&p);
    ic_buf_puts(&p, "}");
    pk_str(&p, "w");
    pk_tensor(&p, cls, "0", count, offset, ndim, size, stride);
    ic_buf_puts(&p, "s.");
    return open_torch(&p, &st, 1, err);
}

static void expect(const struct ic_tensors *set, const char *name, const float *want, size_t n)
{
    struct ic_err err = {0};
    const struct ic_tensor *t = ic_tensors_find(set, name);
    float got[64];
    assert_non_null(t);
    assert_in_range(n, 1, 64);
    if (ic_tensors_read_f32(set, t, got, n, &err))
        fail_msg("%s: %s", name, err.msg);
    for (size_t i = 0; i < n; i++)
        if (!(fabsf(got[i] - want[i]) <= 1e-7f * fabsf(want[i])))
            fail_msg("%s[%zu] is %g, not %g", name, i, (double)got[i], (double)want[i]);
}

#define V(...)                                                                                             \
    (const int32_t[])                                                                                      \
    {                                                                                                      \
        __VA_ARGS__                                                                                        \
    }

static void strides_and_offsets_are_honoured(void **state)
{
    struct ic_err err = {0};
    const float v[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    (void)state;
    struct ic_tensors *set = open_one("FloatStorage", v, sizeof v, 8, 2, 2, V(3, 2), V(1, 3), &err);
    assert_non_null(set);
    expect(set, "w", (const float[]){2, 5, 3, 6, 4, 7}, 6);
    ic_tensors_close(&set);
    set = open_one("FloatStorage", v, sizeof v, 8, 7, 0, V(0), V(0), &err); /* a scalar */
    expect(set, "w", (const float[]){7}, 1);
    ic_tensors_close(&set);
    set = open_one("FloatStorage", v, sizeof v, 8, 0, 2, V(0, 3), V(3, 1), &err); /* an empty tensor */
    assert_int_equal(ic_tensors_find(set, "w")->count, 0);
    ic_tensors_close(&set);
    set = open_one("FloatStorage", v, 8, 2, 0, 2, V(3, 2), V(0, 1), &err); /* expanded */
    expect(set, "w", (const float[]){0, 1, 0, 1, 0, 1}, 6);
    ic_tensors_close(&set);
}

static void every_dtype_becomes_float32(void **state)
{
    struct ic_err err = {0};
    const double f64[2] = {-1.5, 0.1};
    const uint16_t f16[4] = {0x3C00, 0xC000, 0x0001, 0x7BFF}, bf16[2] = {0x3F80, 0xC040};
    const int64_t i64[2] = {-3, 70000};
    const int32_t i32[2] = {-3, 70000};
    const int16_t i16[2] = {-3, 700};
    const int8_t i8[2] = {-3, 100};
    const uint8_t u8[2] = {3, 200}, flag[2] = {0, 1};
    const float c64[4] = {1, 2, 3, 4};
    const double c128[2] = {5, 6};
    (void)state;
    const struct {
        const char *cls;
        const void *data;
        size_t bytes, n, elements;
        float want[4];
    } rows[] = {
        {"DoubleStorage", f64, 16, 2, 2, {-1.5f, 0.1f}},
        {"HalfStorage", f16, 8, 4, 4, {1, -2, 5.9604645e-8f, 65504}},
        {"BFloat16Storage", bf16, 4, 2, 2, {1, -3}},
        {"LongStorage", i64, 16, 2, 2, {-3, 70000}},
        {"IntStorage", i32, 8, 2, 2, {-3, 70000}},
        {"ShortStorage", i16, 4, 2, 2, {-3, 700}},
        {"CharStorage", i8, 2, 2, 2, {-3, 100}},
        {"ByteStorage", u8, 2, 2, 2, {3, 200}},
        {"BoolStorage", flag, 2, 2, 2, {0, 1}},
        {"ComplexFloatStorage", c64, 16, 4, 2, {1, 2, 3, 4}},
        {"ComplexDoubleStorage", c128, 16, 2, 1, {5, 6}},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        int32_t n = (int32_t)rows[i].elements;
        struct ic_tensors *set =
            open_one(rows[i].cls, rows[i].data, rows[i].bytes, n, 0, 1, V(n), V(1), &err);
        if (!set)
            fail_msg("%s: %s", rows[i].cls, err.msg);
        expect(set, "w", rows[i].want, rows[i].n);
        ic_tensors_close(&set);
    }
}

static void not_finite_is_refused_by_name(void **state)
{
    struct ic_err err = {0};
    const float bad[2] = {1, (float)NAN};
    const double far[1] = {1e300};
    float out[2];
    (void)state;
    struct ic_tensors *set = open_one("FloatStorage", bad, 8, 2, 0, 1, V(2), V(1), &err);
    assert_int_equal(ic_tensors_read_f32(set, set->list, out, 2, &err), IC_BAD_REQUEST);
    assert_string_equal(err.msg, "tensor w holds NaN (value 1)");
    ic_tensors_close(&set);
    set = open_one("DoubleStorage", far, 8, 1, 0, 1, V(1), V(1), &err);
    assert_int_equal(ic_tensors_read_f32(set, set->list, out, 1, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "tensor w holds an infinity"));
    ic_tensors_close(&set);
}

/* {"episode": 3, <key>: OrderedDict{"_orig_mod.w": t, "n": 5}, "optimizer_state_dict": {...}} */
static void wrappers_and_prefixes_are_undone(void **state)
{
    static const char *const keys[] = {"model_state_dict", "state_dict"};
    const float v[2] = {1, 2};
    (void)state;
    for (int i = 0; i < 2; i++) {
        struct ic_err err = {0};
        struct ic_buf p = {0};
        struct zip_entry st = zip_stored("m/data/0", v, sizeof v);
        pk_begin(&p);
        ic_buf_puts(&p, "}(");
        pk_str(&p, "episode");
        ic_buf_put(&p, "K\x03", 2);
        pk_str(&p, "loss");
        ic_buf_put(&p, "G\x3f\xe0\0\0\0\0\0\0", 9);
        pk_str(&p, keys[i]);
        pk_global(&p, "collections", "OrderedDict");
        ic_buf_puts(&p, ")R(");
        pk_str(&p, "_orig_mod.w");
        pk_tensor(&p, "FloatStorage", "0", 2, 0, 1, V(2), V(1));
        pk_str(&p, "a._orig_mod.b"); /* the prefix leaves every key once it was seen */
        pk_tensor(&p, "FloatStorage", "0", 2, 1, 1, V(1), V(1));
        pk_str(&p, "n");
        ic_buf_put(&p, "K\x05", 2);
        ic_buf_puts(&p, "u}");
        pk_str(&p, "_metadata");
        ic_buf_puts(&p, "}sb"); /* BUILD */
        pk_str(&p, "optimizer_state_dict");
        ic_buf_puts(&p, "}"); /* its storage is not even in the file: nobody asks */
        pk_str(&p, "state");
        pk_tensor(&p, "FloatStorage", "99", 1 << 30, 0, 1, V(1 << 30), V(1));
        ic_buf_puts(&p, "su.");
        struct ic_tensors *set = open_torch(&p, &st, 1, &err);
        if (!set)
            fail_msg("%s", err.msg);
        assert_int_equal(set->count, 2);
        assert_int_equal(set->ignored, 1);
        assert_true(set->stripped);
        assert_int_equal(set->episode, 3);
        assert_true(set->loss == 0.5);
        assert_string_equal(set->form, keys[i]);
        expect(set, "w", v, 2);
        expect(set, "a.b", v + 1, 1);
        ic_tensors_close(&set);
    }
}

static void a_deflated_storage_is_inflated(void **state)
{
    struct ic_err err = {0};
    float v[64];
    struct ic_buf p = {0};
    size_t n;
    (void)state;
    for (int i = 0; i < 64; i++)
        v[i] = (float)(i / 8);
    void *small = zip_deflate(v, sizeof v, &n);
    struct zip_entry st = zip_stored("m/data/0", v, sizeof v);
    st.data = small;
    st.stored = n;
    st.method = 8;
    pk_begin(&p);
    ic_buf_puts(&p, "}");
    pk_str(&p, "w");
    pk_tensor(&p, "FloatStorage", "0", 64, 0, 1, V(64), V(1));
    ic_buf_puts(&p, "s.");
    struct ic_tensors *set = open_torch(&p, &st, 1, &err);
    assert_non_null(set);
    expect(set, "w", v, 64);
    ic_tensors_close(&set);
    free(small);
}

/* Sizes, offset and the directory's place all in their 64-bit form, as torch writes past 4 GiB. */
/* Two storages, listed in another order than the program's, one of them shared by two tensors. */
static void the_format_before_the_zip_is_read(void **state)
{
    const double doubles[2] = {0.5, -2};
    const float floats[4] = {1, 2, 3, 4};
    struct ic_buf p = {0}, b = {0};
    struct ic_err err = {0};
    (void)state;
    pk_begin(&p);
    ic_buf_puts(&p, "}(");
    pk_str(&p, "module.w");
    pk_tensor(&p, "FloatStorage", "one", 4, 0, 2, V(2, 2), V(1, 2));
    pk_str(&p, "module.v");
    pk_tensor(&p, "DoubleStorage", "two", 2, 1, 1, V(1), V(1));
    pk_str(&p, "module.x");
    pk_tensor(&p, "FloatStorage", "one", 4, 3, 0, V(0), V(0));
    ic_buf_puts(&p, "u.");
    old_file(&b, "M\xe9\x03", "\x88", &p, "\x8c\x03two\x8c\x03one");
    put_u(&b, 2, 8);
    ic_buf_put(&b, doubles, sizeof doubles);
    put_u(&b, 4, 8);
    ic_buf_put(&b, floats, sizeof floats);
    const char *path = file_with(b.data, b.len);
    struct ic_tensors *set = NULL;
    if (ic_tensors_open(path, &set, &err))
        fail_msg("%s", err.msg);
    unlink(path);
    expect(set, "module.w", (const float[]){1, 3, 2, 4}, 4);
    expect(set, "module.v", (const float[]){-2}, 1);
    expect(set, "module.x", (const float[]){4}, 1);
    ic_tensors_close(&set);
    ic_buf_deinit(&p);
    ic_buf_deinit(&b);
}

static void zip64_is_read(void **state)
{
    struct ic_err err = {0};
    struct ic_buf b = {0};
    struct zip_entry e[2] = {zip_stored("m/data.pkl", "N.", 2), zip_stored("m/data/0", "abcd", 4)};
    struct ic_zip *zip;
    (void)state;
    zip_local(&b, &e[0]);
    zip_local(&b, &e[1]);
    uint64_t at = b.len, end;
    for (int i = 0; i < 2; i++) {
        size_t start = b.len;
        zip_central(&b, &e[i]);
        memset(b.data + start + 20, 0xff, 8); /* both sizes */
        memset(b.data + start + 42, 0xff, 4); /* offset */
        b.data[start + 30] = 4 + 24 + 5;      /* extra: an unknown field, then zip64's */
        put_u(&b, 0x4242, 2);
        put_u(&b, 1, 2);
        put_u(&b, 7, 1);
        put_u(&b, 1, 2);
        put_u(&b, 24, 2);
        put_u(&b, e[i].bytes, 8);
        put_u(&b, e[i].stored, 8);
        put_u(&b, e[i].at, 8);
    }
    end = b.len;
    put_u(&b, 0x06064b50, 4);
    put_u(&b, 44, 8);
    put_u(&b, 0, 12);
    put_u(&b, 2, 8);
    put_u(&b, 2, 8);
    put_u(&b, end - at, 8);
    put_u(&b, at, 8);
    put_u(&b, 0x07064b50, 4);
    put_u(&b, 0, 4);
    put_u(&b, end, 8);
    put_u(&b, 1, 4);
    zip_end(&b, 2, at);
    memset(b.data + b.len - 14, 0xff, 12); /* counts, size and place: see zip64 */
    const char *path = file_with(b.data, b.len);
    int fd = open(path, O_RDONLY);
    unlink(path);
    if (ic_zip_open(fd, b.len, &zip, &err))
        fail_msg("%s", err.msg);
    uint8_t *data;
    assert_int_equal(ic_extent_read(fd, &ic_zip_find(zip, "m/data/0")->where, 100, "x", &data, &err),
                     IC_OK);
    assert_memory_equal(data, "abcd", 4);
    free(data);
    ic_zip_close(&zip);
    memset(b.data + end + 48, 0xff, 8); /* a directory beyond the file */
    close(fd);
    path = file_with(b.data, b.len);
    fd = open(path, O_RDONLY);
    unlink(path);
    assert_int_equal(ic_zip_open(fd, b.len, &zip, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "outside the file"));
    close(fd);
    ic_buf_deinit(&b);
}

/* What protocol 4 and numpy put beside the tensors. */
static void later_protocols_and_numpy_scalars_are_read(void **state)
{
    struct ic_err err = {0};
    struct ic_pickle pk;
    static const char frame[] = "\x80\x04\x95\x29\0\0\0\0\0\0\0}\x94(\x8c\x01\x61\x94\x8c\x0b"
                                "collections\x94\x8c\x0bOrderedDict\x94\x93\x94)R\x94u.";
    (void)state;
    if (ic_pickle_parse((const uint8_t *)frame, sizeof frame - 1, &pk, &err))
        fail_msg("%s", err.msg);
    assert_int_equal(ic_pval_get(pk.root, "a")->kind, IC_PVAL_DICT);
    ic_pickle_deinit(&pk);

    struct ic_buf p = {
        0}; /* numpy.core.multiarray.scalar(dtype('f8', False, True).__setstate__(…), b'…') */
    pk_begin(&p);
    pk_global(&p, "numpy.core.multiarray", "scalar");
    pk_global(&p, "numpy", "dtype");
    pk_str(&p, "f8");
    ic_buf_put(&p, "\x89\x88\x87R(", 5);
    ic_buf_put(&p, "K\x03", 2);
    pk_str(&p, "<");
    ic_buf_put(&p, "NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb", 17);
    pk_global(&p, "_codecs", "encode");
    pk_str(&p, "abcdefgh");
    pk_str(&p, "latin1");
    ic_buf_put(&p, "\x86R\x86R\x85.", 6);
    if (ic_pickle_parse((const uint8_t *)p.data, p.len, &pk, &err))
        fail_msg("%s", err.msg);
    assert_int_equal(pk.root->list.items[0]->kind, IC_PVAL_OPAQUE);
    ic_pickle_deinit(&pk);
    ic_buf_deinit(&p);

    static const char ints[] =
        "\x80\x02(K\xffM\xff\xffJ\xfe\xff\xff\xff\x8a\x02\xff\xff\x8a\x09\1\1\1\1\1\1\1\1\1\x8a\0\x88Nt.";
    assert_int_equal(ic_pickle_parse((const uint8_t *)ints, sizeof ints - 1, &pk, &err), IC_OK);
    struct ic_pval **v = pk.root->list.items;
    assert_int_equal(v[0]->i, 255);
    assert_int_equal(v[1]->i, 65535);
    assert_int_equal(v[2]->i, -2);
    assert_int_equal(v[3]->i, -1);
    assert_int_equal(v[4]->kind, IC_PVAL_OPAQUE);
    assert_int_equal(v[5]->i, 0);
    assert_true(v[6]->b);
    ic_pickle_deinit(&pk);
}

/* What trainers keep beside the weights without a thought (CPython 3 wrote these, protocols 2 and 4):
 * {'d': datetime, 't': timedelta, 'p': PosixPath, 'n': SimpleNamespace, 'a': Namespace, 'c': Counter('aab')}. */
static void things_beside_the_weights_are_passed_over(void **state)
{
    static const char two[] =
        "\x80\x02\x7d\x71\x00\x28\x58\x01\x00\x00\x00\x64\x71\x01\x63\x64\x61\x74\x65\x74\x69\x6d\x65\x0a"
        "\x64\x61\x74\x65\x74\x69\x6d\x65\x0a\x71\x02\x63\x5f\x63\x6f\x64\x65\x63\x73\x0a\x65\x6e\x63\x6f"
        "\x64\x65\x0a\x71\x03\x58\x0b\x00\x00\x00\x07\xc3\xa9\x0c\x01\x00\x00\x00\x00\x00\x00\x71\x04\x58"
        "\x06\x00\x00\x00\x6c\x61\x74\x69\x6e\x31\x71\x05\x86\x71\x06\x52\x71\x07\x85\x71\x08\x52\x71\x09"
        "\x58\x01\x00\x00\x00\x74\x71\x0a\x63\x64\x61\x74\x65\x74\x69\x6d\x65\x0a\x74\x69\x6d\x65\x64\x65"
        "\x6c\x74\x61\x0a\x71\x0b\x4b\x03\x4b\x00\x4b\x00\x87\x71\x0c\x52\x71\x0d\x58\x01\x00\x00\x00\x70"
        "\x71\x0e\x63\x70\x61\x74\x68\x6c\x69\x62\x0a\x50\x6f\x73\x69\x78\x50\x61\x74\x68\x0a\x71\x0f\x58"
        "\x01\x00\x00\x00\x2f\x71\x10\x58\x01\x00\x00\x00\x78\x71\x11\x58\x01\x00\x00\x00\x79\x71\x12\x87"
        "\x71\x13\x52\x71\x14\x58\x01\x00\x00\x00\x6e\x71\x15\x63\x74\x79\x70\x65\x73\x0a\x53\x69\x6d\x70"
        "\x6c\x65\x4e\x61\x6d\x65\x73\x70\x61\x63\x65\x0a\x71\x16\x29\x52\x71\x17\x7d\x71\x18\x58\x01\x00"
        "\x00\x00\x61\x71\x19\x4b\x01\x73\x62\x68\x19\x63\x61\x72\x67\x70\x61\x72\x73\x65\x0a\x4e\x61\x6d"
        "\x65\x73\x70\x61\x63\x65\x0a\x71\x1a\x29\x81\x71\x1b\x7d\x71\x1c\x58\x01\x00\x00\x00\x62\x71\x1d"
        "\x4b\x02\x73\x62\x58\x01\x00\x00\x00\x63\x71\x1e\x63\x63\x6f\x6c\x6c\x65\x63\x74\x69\x6f\x6e\x73"
        "\x0a\x43\x6f\x75\x6e\x74\x65\x72\x0a\x71\x1f\x7d\x71\x20\x28\x58\x01\x00\x00\x00\x61\x71\x21\x4b"
        "\x02\x58\x01\x00\x00\x00\x62\x71\x22\x4b\x01\x75\x85\x71\x23\x52\x71\x24\x75\x2e";
    static const char four[] =
        "\x80\x04\x95\x03\x01\x00\x00\x00\x00\x00\x00\x7d\x94\x28\x8c\x01\x64\x94\x8c\x08\x64\x61\x74\x65"
        "\x74\x69\x6d\x65\x94\x8c\x08\x64\x61\x74\x65\x74\x69\x6d\x65\x94\x93\x94\x43\x0a\x07\xe9\x0c\x01"
        "\x00\x00\x00\x00\x00\x00\x94\x85\x94\x52\x94\x8c\x01\x74\x94\x68\x02\x8c\x09\x74\x69\x6d\x65\x64"
        "\x65\x6c\x74\x61\x94\x93\x94\x4b\x03\x4b\x00\x4b\x00\x87\x94\x52\x94\x8c\x01\x70\x94\x8c\x07\x70"
        "\x61\x74\x68\x6c\x69\x62\x94\x8c\x09\x50\x6f\x73\x69\x78\x50\x61\x74\x68\x94\x93\x94\x8c\x01\x2f"
        "\x94\x8c\x01\x78\x94\x8c\x01\x79\x94\x87\x94\x52\x94\x8c\x01\x6e\x94\x8c\x05\x74\x79\x70\x65\x73"
        "\x94\x8c\x0f\x53\x69\x6d\x70\x6c\x65\x4e\x61\x6d\x65\x73\x70\x61\x63\x65\x94\x93\x94\x29\x52\x94"
        "\x7d\x94\x8c\x01\x61\x94\x4b\x01\x73\x62\x68\x1c\x8c\x08\x61\x72\x67\x70\x61\x72\x73\x65\x94\x8c"
        "\x09\x4e\x61\x6d\x65\x73\x70\x61\x63\x65\x94\x93\x94\x29\x81\x94\x7d\x94\x8c\x01\x62\x94\x4b\x02"
        "\x73\x62\x8c\x01\x63\x94\x8c\x0b\x63\x6f\x6c\x6c\x65\x63\x74\x69\x6f\x6e\x73\x94\x8c\x07\x43\x6f"
        "\x75\x6e\x74\x65\x72\x94\x93\x94\x7d\x94\x28\x8c\x01\x61\x94\x4b\x02\x8c\x01\x62\x94\x4b\x01\x75"
        "\x85\x94\x52\x94\x75\x2e";
    const struct {
        const char *bytes;
        size_t len;
    } t[] = {{two, sizeof two - 1}, {four, sizeof four - 1}};
    (void)state;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        struct ic_err err = {0};
        struct ic_pickle pk;
        if (ic_pickle_parse((const uint8_t *)t[i].bytes, t[i].len, &pk, &err))
            fail_msg("%s", err.msg);
        assert_int_equal(ic_pval_get(pk.root, "p")->kind, IC_PVAL_OPAQUE);
        assert_int_equal(ic_pval_get(pk.root, "c")->kind, IC_PVAL_DICT);
        ic_pickle_deinit(&pk);
    }
}

static void safetensors_come_back_as_written(void **state)
{
    struct ic_err err = {0};
    const float a[6] = {1, 2, 3, 4, 5, 6}, b[1] = {-1};
    const uint16_t h[3] = {0x3C00, 0x4000, 0x4200};
    const struct ic_safetensors_out out[] = {
        {"z", IC_DTYPE_F32, 2, {2, 3}, a},
        {"h", IC_DTYPE_F16, 1, {3}, h},
        {"empty", IC_DTYPE_F32, 2, {0, 4}, a},
        {"scalar", IC_DTYPE_F32, 0, {0}, b},
    };
    const char *meta[1][2] = {{"law", "a \"name\""}};
    char path[] = "/tmp/ic-model-st-XXXXXX";
    struct ic_tensors *set;
    struct stat st;
    (void)state;
    close(mkstemp(path));
    assert_int_equal(ic_safetensors_write(path, out, 4, meta, 1, &err), IC_OK);
    if (ic_tensors_open(path, &set, &err))
        fail_msg("%s", err.msg);
    assert_int_equal(set->count, 4);
    expect(set, "z", a, 6);
    expect(set, "h", (const float[]){1, 2, 3}, 3);
    expect(set, "scalar", b, 1);
    assert_int_equal(ic_tensors_find(set, "z")->where.at % 2, 0);
    assert_int_equal(ic_tensors_find(set, "empty")->count, 0);
    assert_int_equal((set->file_bytes - 24 - 6 - 4) % 8, 0); /* data begins aligned */
    ic_tensors_close(&set);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(ic_safetensors_write("/nowhere/x", out, 4, NULL, 0, &err), IC_NOT_FOUND);
    const struct ic_safetensors_out twice[] = {out[0], out[0]};
    assert_int_equal(ic_safetensors_write(path, twice, 2, NULL, 0, &err), IC_BAD_REQUEST);
    unlink(path);
}

/* The first bytes of a file are the header's length, whatever else they look like. */
static void safetensors_with_headers_of_any_length(void **state)
{
    struct ic_err err = {0};
    const float a[1] = {7};
    const struct ic_safetensors_out out[] = {{"a", IC_DTYPE_F32, 1, {1}, a}};
    char text[20001] = "", path[] = "/tmp/ic-model-st-XXXXXX";
    struct ic_tensors *set;
    (void)state;
    close(mkstemp(path));
    for (size_t n = 8; n < sizeof text; n += n == 2000 ? 17000 : 8) {
        const char *meta[1][2] = {{"law", text}};
        memset(text, 'x', n);
        assert_int_equal(ic_safetensors_write(path, out, 1, meta, 1, &err), IC_OK);
        if (ic_tensors_open(path, &set, &err))
            fail_msg("%zu bytes of metadata: %s", n, err.msg);
        expect(set, "a", a, 1);
        ic_tensors_close(&set);
    }
    unlink(path);
}

static void real_checkpoints_open(void **state)
{
    static const struct {
        const char *file, *form;
        size_t tensors;
        bool stripped;
    } rows[] = {
        {"quantum_lifecycle/quantum_lifecycle_model.pth", "bare state dict", 42, false},
        {"unet-d4-b8/checkpoint_ep7.pth", "model_state_dict", 42, false},
        {"unet_convlstm-d4-b8/checkpoint_ep7.pth", "model_state_dict", 44, false},
        {"unet_unitary_rmsnorm-d4-b8/checkpoint_ep7.pth", "model_state_dict", 30, false},
        {"mlp-d8-b32/checkpoint_ep7.pth", "model_state_dict", 6, false},
    };
    (void)state;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        char path[512];
        struct ic_err err = {0};
        struct ic_tensors *set;
        snprintf(path, sizeof path, "%s/golden/%s", IC_TEST_DIR, rows[i].file);
        if (ic_tensors_open(path, &set, &err))
            fail_msg("%s: %s", rows[i].file, err.msg);
        print_message("%s: %s, %zu tensors%s\n", rows[i].file, set->form, set->count,
                      set->stripped ? ", prefixed" : "");
        assert_string_equal(set->form, rows[i].form);
        assert_int_equal(set->count, rows[i].tensors);
        ic_tensors_close(&set);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(strides_and_offsets_are_honoured),
        cmocka_unit_test(every_dtype_becomes_float32),
        cmocka_unit_test(not_finite_is_refused_by_name),
        cmocka_unit_test(wrappers_and_prefixes_are_undone),
        cmocka_unit_test(a_deflated_storage_is_inflated),
        cmocka_unit_test(the_format_before_the_zip_is_read),
        cmocka_unit_test(zip64_is_read),
        cmocka_unit_test(later_protocols_and_numpy_scalars_are_read),
        cmocka_unit_test(things_beside_the_weights_are_passed_over),
        cmocka_unit_test(safetensors_come_back_as_written),
        cmocka_unit_test(safetensors_with_headers_of_any_length),
        cmocka_unit_test(real_checkpoints_open),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
