/* Files that lie. Each is refused with a sentence, none crashes, none costs more memory than it justifies
 * (the peak of the whole program is checked last). Run under ASan and UBSan as well. */
#include <setjmp.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>
#include <cmocka.h>

#include "model/fixture.h"
#include "model/pickle.h"
#include "model/pickle_ops.h"
#include "model/tensors.h"
#include "model/zip.h"

#define V(...)                                                                                             \
    (const int32_t[])                                                                                      \
    {                                                                                                      \
        __VA_ARGS__                                                                                        \
    }

static uint64_t rng_state = 42;

static uint64_t bits(void) /* splitmix64 */
{
    uint64_t z = (rng_state += 0x9E3779B97F4A7C15u);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* ---- Pickles --------------------------------------------------------------------------------- */

static void refused(const void *p, size_t n, const char *why)
{
    struct ic_err err = {0};
    struct ic_pickle pk;
    uint8_t *exact = malloc(n ? n : 1); /* so that ASan sees a read past the end */
    memcpy(exact, p, n);
    enum ic_status s = ic_pickle_parse(exact, n, &pk, &err);
    if (s == IC_OK)
        fail_msg("accepted; expected: %s", why);
    assert_null(pk.arena);
    if (!strstr(err.msg, why))
        fail_msg("\"%s\" lacks \"%s\"", err.msg, why);
    free(exact);
}

#define REFUSED(literal, why) refused(literal, sizeof(literal) - 1, why)

static void calls_are_refused_by_name(void **state)
{
    (void)state;
    REFUSED("\x80\x02"
            "cos\nsystem\nX\x09\0\0\0touch /x \x85R.",
            "pickle: global os.system is not allowed");
    REFUSED("\x80\x02"
            "cposix\nsystem\n.",
            "pickle: global posix.system is not allowed");
    REFUSED("\x80\x02"
            "cbuiltins\neval\n.",
            "pickle: global builtins.eval is not allowed");
    REFUSED("\x80\x02"
            "c__builtin__\nexec\n.",
            "pickle: global __builtin__.exec is not allowed");
    REFUSED("\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93.", "pickle: global os.system is not allowed");
    REFUSED("\x80\x02"
            "ctorch.hub\nload\n.",
            "pickle: global torch.hub.load is not allowed");
    REFUSED("\x80\x02"
            "ctorch\nFloatStorage\n)R.",
            "REDUCE of global FloatStorage in a way that is not allowed");
    REFUSED("\x80\x02"
            "ctorch._utils\n_rebuild_tensor_v2\n)\x81.",
            "NEWOBJ of global _rebuild_tensor_v2");
    REFUSED("\x80\x02"
            "ctorch._utils\n_rebuild_tensor_v2\n)R.",
            "_rebuild_tensor_v2 called with");
#define LAZY(bits)                                                                                         \
    "\x80\x02" /* the seventh argument: what torch puts off until somebody looks */                        \
    "ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0"                 \
    "0X\3\0\0\0"                                                                                           \
    "cpuK\1tQK\0(K\1t(K\1t\x89"                                                                            \
    "ccollections\nOrderedDict\n)R}" bits "tR."
    REFUSED(LAZY("X\4\0\0\0conj\x88s"), "conjugated or negated lazily");
    REFUSED(LAZY("X\3\0\0\0neg\x88s"), "conjugated or negated lazily");
#undef LAZY
    REFUSED("(S'id'\nios\nsystem\n.", "is not allowed"); /* INST, as in protocol 0 */
    REFUSED("\x80\x02\x82\x01.", "pickle: opcode 0x82 EXT1 is not allowed");
    REFUSED("\x80\x02Pname\n.", "pickle: opcode 0x50 PERSID is not allowed");
    REFUSED("\x80\x02"
            "(o.",
            "pickle: opcode 0x6F OBJ is not allowed");
    REFUSED("\x80\x05\x97.", "pickle: opcode 0x97 NEXT_BUFFER is not allowed");
    REFUSED("\x80\x02\x00.", "pickle: opcode 0x00 (no such opcode) is not allowed");
    REFUSED("\x80\x02K\1K\2R.", "REDUCE of an int with an int");
    REFUSED("\x80\x02K\1Q.", "a persistent id that is not");
    REFUSED("\x80\x02K\1}b.", "BUILD of an int is not allowed");
    REFUSED("\x80\x02K\1K\2a.", "APPEND to an int");
    REFUSED("\x80\x09N.", "protocol 9");
}

static void broken_machines_are_refused(void **state)
{
    (void)state;
    REFUSED("", "truncated at byte 0");
    REFUSED("\x80\x02.", "the stack is empty");
    REFUSED("\x80\x02(.", "the stack is empty");
    REFUSED("\x80\x02NN.", "1 values left");
    REFUSED("\x80\x02t.", "no mark");
    REFUSED("\x80\x02(NNNt\x87.", "the stack is empty");
    REFUSED("\x80\x02h\x07.", "memo slot 7 is empty");
    REFUSED("\x80\x02Nj\xff\xff\xff\xff.", "memo slot 4294967295 is empty");
    REFUSED("\x80\x02X\x02\0\0\0\xC0\x80.", "not UTF-8");
    REFUSED("\x80\x02}(Nu.", "SETITEMS of 1 values");
    REFUSED("\x80\x02X\xff\xff\xff\xff", "IC_PICKLE_STRING_MAX");
    REFUSED("\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xff", "IC_PICKLE_STRING_MAX");
    REFUSED("\x80\x02\x8b\xff\xff\xff\xff", "truncated");
    REFUSED("\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff", "truncated");
    REFUSED("\x80\x02"
            "cos",
            "truncated");
}

static void bombs_are_refused(void **state)
{
    (void)state;
    REFUSED("\x80\x02Nr\xf0\xff\xff\xff.", "IC_PICKLE_MEMO_MAX");
    REFUSED("\x80\x02Nr\x90\0\0\0.", "memo slot 144"); /* no pickler counts past the program's length */
    struct ic_buf b = {0};
    pk_begin(&b); /* nesting, from the outside in */
    for (int i = 0; i < 60000; i++)
        ic_buf_puts(&b, "]");
    for (int i = 0; i < 59999; i++)
        ic_buf_puts(&b, "a");
    ic_buf_puts(&b, ".");
    refused(b.data, b.len, "IC_PICKLE_DEPTH_MAX");
    ic_buf_clear(&b);
    pk_begin(&b); /* and as a chain of tuples */
    ic_buf_puts(&b, "N");
    for (int i = 0; i < 100000; i++)
        ic_buf_puts(&b, "\x85");
    refused(b.data, b.len, "IC_PICKLE_DEPTH_MAX");
    ic_buf_clear(&b);
    pk_begin(&b); /* values waiting */
    for (int i = 0; i < 100000; i++)
        ic_buf_puts(&b, "N");
    refused(b.data, b.len, "IC_PICKLE_STACK_MAX");
    ic_buf_clear(&b);
    pk_begin(&b); /* values made and dropped */
    for (int i = 0; i < 1100000; i++)
        ic_buf_puts(&b, "N0");
    refused(b.data, b.len, "IC_PICKLE_VALUES_MAX");
    ic_buf_clear(&b);
    pk_begin(&b); /* a billion laughs: each list holds the one before ten times */
    ic_buf_puts(&b, "]q");
    ic_buf_put(&b, "\0", 1);
    for (int i = 1; i < 100; i++) {
        ic_buf_puts(&b, "](");
        for (int k = 0; k < 10; k++)
            ic_buf_put(&b, (char[]){'h', (char)(i - 1)}, 2);
        ic_buf_put(&b, (char[]){'e', 'q', (char)i}, 3);
    }
    refused(b.data, b.len, "IC_PICKLE_DEPTH_MAX");
    ic_buf_deinit(&b);
}

/* A list that contains itself: harmless, since nothing here recurses. */
static void a_cycle_ends(void **state)
{
    struct ic_err err = {0};
    struct ic_pickle pk;
    static const char cycle[] = "\x80\x02]q\0h\0a.";
    (void)state;
    assert_int_equal(ic_pickle_parse((const uint8_t *)cycle, sizeof cycle - 1, &pk, &err), IC_OK);
    ic_pickle_deinit(&pk);
}

/* A state dict of two tensors with everything around it; returned in b. */
static void small_program(struct ic_buf *b)
{
    pk_begin(b);
    ic_buf_puts(b, "}q");
    ic_buf_put(b, "\0", 1);
    pk_str(b, "model_state_dict");
    pk_global(b, "collections", "OrderedDict");
    ic_buf_puts(b, ")R(");
    pk_str(b, "a");
    pk_tensor(b, "FloatStorage", "0", 4, 0, 2, V(2, 2), V(2, 1));
    pk_str(b, "b");
    pk_tensor(b, "FloatStorage", "1", 2, 0, 1, V(2), V(1));
    ic_buf_puts(b, "u}");
    pk_str(b, "_metadata");
    ic_buf_puts(b, "Nsbs.");
}

static void every_prefix_of_a_program_is_refused(void **state)
{
    struct ic_buf b = {0};
    struct ic_err err = {0};
    struct ic_pickle pk;
    (void)state;
    small_program(&b);
    assert_int_equal(ic_pickle_parse((const uint8_t *)b.data, b.len, &pk, &err), IC_OK);
    ic_pickle_deinit(&pk);
    for (size_t n = 0; n < b.len; n++)
        refused(b.data, n, "pickle: ");
    ic_buf_deinit(&b);
}

static void random_programs_end(void **state)
{
    struct ic_buf b = {0};
    size_t accepted = 0;
    (void)state;
    small_program(&b);
    for (int i = 0; i < 200000; i++) {
        struct ic_err err = {0};
        struct ic_pickle pk;
        size_t n = 1 + bits() % (b.len - 1);
        uint8_t *p = malloc(n);
        if (i % 2) { /* a damaged program */
            memcpy(p, b.data, n);
            for (int k = 0; k < 3; k++)
                p[bits() % n] ^= (uint8_t)(1u << bits() % 8);
        } else /* noise */
            for (size_t k = 0; k < n; k++)
                p[k] = (uint8_t)bits();
        if (ic_pickle_parse(p, n, &pk, &err) == IC_OK)
            accepted++;
        ic_pickle_deinit(&pk);
        free(p);
    }
    print_message("200000 random programs, %zu of them valid\n", accepted);
    ic_buf_deinit(&b);
}

/* ---- Containers ------------------------------------------------------------------------------ */

/* Opens the bytes, reads every tensor; IC_OK or what went wrong first. */
static enum ic_status read_all(const void *data, size_t n, struct ic_err *err)
{
    const char *path = file_with(data, n);
    struct ic_tensors *set;
    enum ic_status s = ic_tensors_open(path, &set, err);
    unlink(path);
    for (size_t i = 0; s == IC_OK && i < set->count; i++) {
        size_t values = (size_t)set->list[i].count * ic_dtype_info(set->list[i].dtype)->parts;
        float *out = malloc(values * sizeof *out + 1);
        s = ic_tensors_read_f32(set, &set->list[i], out, values, err);
        free(out);
    }
    ic_tensors_close(&set);
    return s;
}

static void file_refused(const struct ic_buf *b, const char *why)
{
    struct ic_err err = {0};
    enum ic_status s = read_all(b->data, b->len, &err);
    if (s == IC_OK || !strstr(err.msg, why))
        fail_msg("\"%s\" lacks \"%s\"", s == IC_OK ? "(accepted)" : err.msg, why);
}

static const float four[4] = {1, 2, 3, 4};

/* The honest file: program and two storages. */
static void small_entries(struct ic_buf *program, struct zip_entry e[4])
{
    small_program(program);
    e[0] = zip_stored("m/data.pkl", program->data, program->len);
    e[1] = zip_stored("m/data/0", four, 16);
    e[2] = zip_stored("m/data/1", four, 8);
    e[3] = zip_stored("m/version", "3\n", 2);
}

static void small_file(struct ic_buf *out)
{
    struct ic_buf program = {0};
    struct zip_entry e[4];
    small_entries(&program, e);
    zip_write(out, e, 4);
    ic_buf_deinit(&program);
}

static void every_prefix_of_a_file_is_refused(void **state)
{
    struct ic_buf b = {0};
    struct ic_err err = {0};
    (void)state;
    small_file(&b);
    if (read_all(b.data, b.len, &err))
        fail_msg("%s", err.msg);
    for (size_t n = 0; n < b.len; n++)
        if (read_all(b.data, n, &err) == IC_OK)
            fail_msg("a prefix of %zu bytes was accepted", n);
    ic_buf_deinit(&b);
}

static void every_flipped_bit_is_survived(void **state)
{
    struct ic_buf b = {0};
    size_t accepted = 0;
    (void)state;
    small_file(&b);
    for (size_t i = 0; i < b.len * 8; i++) {
        struct ic_err err = {0};
        b.data[i / 8] = (char)(b.data[i / 8] ^ 1 << i % 8);
        accepted += read_all(b.data, b.len, &err) == IC_OK;
        b.data[i / 8] = (char)(b.data[i / 8] ^ 1 << i % 8);
    }
    /* what is left: dates, versions, local headers' zeroes, unused flags */
    print_message("%zu flipped bits, %zu without effect\n", b.len * 8, accepted);
    ic_buf_deinit(&b);
}

static void lying_zips_are_refused(void **state)
{
    struct ic_buf program = {0}, b = {0};
    struct zip_entry e[4];
    (void)state;
    small_entries(&program, e);
#define TRY(change, why)                                                                                   \
    do {                                                                                                   \
        struct zip_entry kept[4];                                                                          \
        memcpy(kept, e, sizeof kept);                                                                      \
        change;                                                                                            \
        ic_buf_clear(&b);                                                                                  \
        zip_write(&b, e, 4);                                                                               \
        file_refused(&b, why);                                                                             \
        memcpy(e, kept, sizeof kept);                                                                      \
    } while (0)
    TRY(e[1].crc ^= 1, "a is damaged: its bytes do not match");
    TRY(e[0].crc ^= 1, "m/data.pkl is damaged");
    TRY(e[1].flags = 1, "encrypted");
    TRY(e[1].method = 12, "compression method 12");
    TRY(e[1].bytes = 1 << 30, "claims two sizes");
    TRY((e[1].method = 8, e[1].bytes = 1u << 30), "IC_ZIP_RATIO_MAX");
    TRY((e[1].method = 8, e[1].bytes = 1000), "does not inflate");
    TRY(e[2].name = "m/data/0", "entry m/data/0 appears twice");
    TRY(e[2].name = "m/data/2", "tensor b: its storage m/data/1 is not in the file");
    TRY(e[1] = zip_stored("m/data/0", four, 8), "should hold 4 elements and holds 2");
    TRY(e[3] = zip_stored("n/data.pkl", "N.", 2), "zip: both");
    TRY(e[0].name = "m/other", "no data.pkl");
    TRY(e[3] = zip_stored("m/byteorder", "big", 3), "m/byteorder is not little");
    TRY(e[3].name = "m/constants.pkl", "TorchScript");
    TRY(e[3].name = "m/\xff", "not UTF-8");
#undef TRY
    /* the directory, not the entries */
    ic_buf_clear(&b);
    for (int i = 0; i < 4; i++)
        zip_local(&b, &e[i]);
    uint64_t at = b.len;
    e[2].at = e[1].at; /* two entries over the same bytes */
    for (int i = 0; i < 4; i++)
        zip_central(&b, &e[i]);
    zip_end(&b, 4, at);
    file_refused(&b, "overlap");
    for (int far = 0; far < 2; far++) {
        ic_buf_clear(&b);
        for (int i = 0; i < 4; i++)
            zip_local(&b, &e[i]);
        at = b.len;
        e[2].at = far ? 0x7fffffff : at - 10;
        for (int i = 0; i < 4; i++)
            zip_central(&b, &e[i]);
        zip_end(&b, 4, at);
        file_refused(&b, "outside the file");
    }
    ic_buf_clear(&b);
    zip_write(&b, e, 4);
    memset(b.data + b.len - 14, 0xff, 4); /* 65535 entries: zip64, but no locator */
    file_refused(&b, "zip64 locator");
    ic_buf_clear(&b);
    zip_write(&b, e, 4);
    memset(b.data + b.len - 14, 0x10, 4);
    file_refused(&b, "entries in a directory of");
    ic_buf_deinit(&b);
    ic_buf_deinit(&program);
}

/* A megabyte of zeros in a kilobyte, declared as what it is; and declared as less. */
static void deflate_bombs_are_refused(void **state)
{
    struct ic_buf program = {0}, b = {0};
    struct zip_entry e[4];
    size_t big = (size_t)32 << 20, n;
    void *zeros = calloc(1, big), *packed = zip_deflate(zeros, big, &n);
    (void)state;
    small_entries(&program, e);
    e[1] = (struct zip_entry){.name = "m/data/0",
                              .data = packed,
                              .stored = n,
                              .bytes = big,
                              .method = 8,
                              .crc = (uint32_t)crc32(0, zeros, (uInt)big)};
    zip_write(&b, e, 4);
    file_refused(&b, "IC_ZIP_RATIO_MAX");
    e[1].bytes = 16;
    ic_buf_clear(&b);
    zip_write(&b, e, 4);
    file_refused(&b, "inflates to more than it claims");
    size_t cut; /* a stream that ends too soon */
    void *whole = zip_deflate(four, 16, &cut);
    e[1] =
        (struct zip_entry){.name = "m/data/0", .data = whole, .stored = cut - 4, .bytes = 16, .method = 8};
    ic_buf_clear(&b);
    zip_write(&b, e, 4);
    file_refused(&b, "does not inflate");
    free(whole);
    free(zeros);
    free(packed);
    ic_buf_deinit(&b);
    ic_buf_deinit(&program);
}

static void lying_tensors_are_refused(void **state)
{
    static const struct {
        const char *cls;
        int32_t count, offset, ndim, size[9], stride[9];
        const char *why;
    } rows[] = {
        {"FloatStorage", 4, 1, 1, {4}, {1}, "needs element 4 of a storage that holds 4"},
        {"FloatStorage", 4, 0, 2, {2, 2}, {4, 1}, "needs element 5"},
        {"FloatStorage", 4, 0, 1, {1 << 30}, {0}, "repeats its storage"},
        {"FloatStorage", 4, 0, 2, {65537, 4}, {0, 1}, "repeats its storage"},
        {"FloatStorage", 4, 0, 2, {1 << 30, 1 << 30}, {0, 0}, "IC_TENSOR_ELEMENTS_MAX"},
        {"FloatStorage", 4, 0, 2, {2, 2}, {0x7fffffff, 0x7fffffff}, "needs element"},
        {"FloatStorage", 5, 0, 1, {4}, {1}, "should hold 5 elements and holds 4"},
        {"DoubleStorage", 4, 0, 1, {4}, {1}, "should hold 4 elements and holds 2"},
        {"FloatStorage", 4, 0, 9, {1}, {1}, "at most 8 dimensions"},
        {"FloatStorage", 4, -1, 1, {1}, {1}, "_rebuild_tensor_v2 called with"},
        {"FloatStorage", 4, 0, 1, {-1}, {1}, "_rebuild_tensor_v2 called with"},
        {"FloatStorage", -4, 0, 1, {1}, {1}, "a persistent id"},
        {"QUInt8Storage", 4, 0, 1, {1}, {1}, "pickle: global torch.QUInt8Storage is not allowed"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct ic_buf p = {0}, b = {0};
        struct zip_entry e[2];
        pk_begin(&p);
        ic_buf_puts(&p, "}");
        pk_str(&p, "w");
        pk_tensor(&p, rows[i].cls, "0", rows[i].count, rows[i].offset, (unsigned)rows[i].ndim, rows[i].size,
                  rows[i].stride);
        ic_buf_puts(&p, "s.");
        e[0] = zip_stored("m/data.pkl", p.data, p.len);
        e[1] = zip_stored("m/data/0", four, 16);
        zip_write(&b, e, 2);
        file_refused(&b, rows[i].why);
        ic_buf_deinit(&b);
        ic_buf_deinit(&p);
    }
}

/* torch's format before the zip: every prefix is refused, every flipped bit survived, every lie told. */
static void lying_old_files_are_refused(void **state)
{
    static const struct {
        const char *version, *machine, *keys;
        uint64_t count;
        const char *why;
    } rows[] = {
        {"M\xe9\x03", "\x88", "\x8c\1a", 4, NULL},
        {"M\xe8\x03", "\x88", "\x8c\1a", 4, "not version 1001"},
        {"M\xe9\x03", "\x89", "\x8c\1a", 4, "not little endian"},
        {"M\xe9\x03", "\x88", "\x8c\1b", 4, "storage 0 of its list is unknown"},
        {"M\xe9\x03", "\x88", "\x8c\1a\x8c\1a", 4, "storage 1 of its list is unknown, or twice"},
        {"M\xe9\x03", "\x88", "K\1", 4, "storage 0 of its list is unknown"},
        {"M\xe9\x03", "\x88", "", 4, "its storage a is not in the file"},
        {"M\xe9\x03", "\x88", "\x8c\1a", 5, "should have 4"},
        {"M\xe9\x03", "\x88", "\x8c\1a", (uint64_t)1 << 62, "should have 4"},
    };
    struct ic_err err = {0};
    (void)state;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct ic_buf b = {0}, p = {0};
        pk_begin(&p);
        ic_buf_puts(&p, "}");
        pk_str(&p, "w");
        pk_tensor(&p, "FloatStorage", "a", 4, 0, 1, (const int32_t[]){4}, (const int32_t[]){1});
        ic_buf_puts(&p, "s.");
        old_file(&b, rows[i].version, rows[i].machine, &p, rows[i].keys);
        put_u(&b, rows[i].count, 8);
        ic_buf_put(&b, four, 16);
        if (rows[i].why)
            file_refused(&b, rows[i].why);
        else {
            size_t accepted = 0;
            assert_int_equal(read_all(b.data, b.len, &err), IC_OK);
            for (size_t n = 0; n < b.len; n++)
                assert_int_not_equal(read_all(b.data, n, &err), IC_OK);
            for (size_t k = 0; k < b.len * 8; k++) {
                b.data[k / 8] = (char)(b.data[k / 8] ^ 1 << k % 8);
                accepted += read_all(b.data, b.len, &err) == IC_OK;
                b.data[k / 8] = (char)(b.data[k / 8] ^ 1 << k % 8);
            }
            print_message("%zu flipped bits, %zu accepted (names, values)\n", b.len * 8, accepted);
        }
        ic_buf_deinit(&b);
        ic_buf_deinit(&p);
    }
}

static void other_files_are_named(void **state)
{
    struct ic_err err = {0};
    struct ic_tensors *set;
    (void)state;
#define TRY(literal, why)                                                                                  \
    do {                                                                                                   \
        char bytes[] = literal;                                                                            \
        file_refused(&(struct ic_buf){.data = bytes, .len = sizeof bytes - 1}, why);                       \
    } while (0)
    TRY("\x80\x02\x8a\x0al\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", "pickle: truncated");
    TRY("\x80\x02}q\0X\x01\0\0\0aK\x01s.", "a bare pickle");
    TRY("hello, world", "neither a zip");
    TRY("PK", "only 2 bytes");
    TRY("PK\3\4 and nothing else of any use", "no end record");
#undef TRY
    assert_int_equal(ic_tensors_open("/tmp", &set, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_tensors_open("/tmp/no such file", &set, &err), IC_NOT_FOUND);
    assert_int_equal(ic_tensors_open("/dev/zero", &set, &err), IC_BAD_REQUEST);
}

/* ---- safetensors ----------------------------------------------------------------------------- */

static void st_file(struct ic_buf *b, const char *header, size_t data)
{
    ic_buf_clear(b);
    put_u(b, strlen(header), 8);
    ic_buf_puts(b, header);
    for (size_t i = 0; i < data; i++)
        ic_buf_puts(b, "\x01");
}

#define ST(name, dtype, shape, range)                                                                      \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" range "}"

static void lying_safetensors_are_refused(void **state)
{
    static const struct {
        const char *header;
        size_t data;
        const char *why;
    } rows[] = {
        {"{" ST("a", "F32", "[2]", "[0,4]") "}", 4, "needs 8 bytes"},
        {"{" ST("a", "F32", "[2]", "[0,8]") "}", 4, "of 4"},
        {"{" ST("a", "F32", "[1]", "[8,4]") "}", 8, "range is 8..4"},
        {"{" ST("a", "F32", "[1]", "[0,4]") "," ST("b", "F32", "[1]", "[2,6]") "}", 6,
         "b overlaps its neighbour"},
        {"{" ST("a", "F32", "[1]", "[0,4]") "," ST("b", "F32", "[1]", "[5,9]") "}", 9, "b leaves a gap"},
        {"{" ST("a", "F32", "[1]", "[0,4]") "}", 5, "1 bytes after the last tensor"},
        {"{" ST("a", "F32", "[1]", "[0,4]") "," ST("a", "F32", "[1]", "[4,8]") "}", 8, "duplicate"},
        {"{" ST("a", "Q7", "[1]", "[0,4]") "}", 4, "unknown dtype Q7"},
        {"{" ST("a", "F32", "[-1]", "[0,4]") "}", 4, "a shape that no file holds"},
        {"{" ST("a", "F32", "[4294967296,4294967296]", "[0,4]") "}", 4, "a shape that no file holds"},
        {"{" ST("a", "F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]") "}", 4, "lacks dtype"},
        {"{" ST("a", "F32", "1", "[0,4]") "}", 4, "lacks dtype"},
        {"{" ST("a", "F32", "[1]", "[0]") "}", 4, "lacks dtype"},
        {"{\"a\":7}", 0, "lacks dtype"},
        {"{" ST("", "F32", "[1]", "[0,4]") "}", 4, "a tensor's name is empty"},
        {"{\"a\":", 0, "safetensors: header"},
        {"[]", 0, "neither a zip"},
    };
    struct ic_buf b = {0};
    (void)state;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        st_file(&b, rows[i].header, rows[i].data);
        file_refused(&b, rows[i].why);
    }
    st_file(&b, "{}", 0);
    memset(b.data, 0xff, 8); /* a header longer than any file */
    file_refused(&b, "neither a zip");
    ic_buf_deinit(&b);
    b.max = (size_t)8 << 20;
    put_u(&b, 5 << 20, 8);
    ic_buf_reserve(&b, 5 << 20);
    memset(b.data + 8, '{', 5 << 20);
    b.len = 8 + (5 << 20);
    file_refused(&b, "IC_SAFETENSORS_HEADER_MAX");
    b.len = 8;
    memset(b.data, 0, 8);
    b.data[2] = 0x10; /* 1 MiB of nested arrays: jansson's own depth bound */
    memset(b.data + 8, '[', 1 << 20);
    b.data[8] = '{';
    memcpy(b.data + 9, "\"a\":", 4);
    b.len = 8 + (1 << 20);
    file_refused(&b, "safetensors: header");
    ic_buf_deinit(&b);
}

static void damaged_safetensors_are_survived(void **state)
{
    struct ic_buf b = {0};
    size_t accepted = 0;
    struct ic_err err = {0};
    (void)state;
    st_file(&b, "{" ST("a", "F32", "[2,3]", "[0,24]") "," ST("b", "F16", "[2]", "[24,28]") "}", 28);
    assert_int_equal(read_all(b.data, b.len, &err), IC_OK);
    for (size_t n = 0; n < b.len; n++)
        assert_int_not_equal(read_all(b.data, n, &err), IC_OK);
    for (size_t i = 0; i < b.len * 8; i++) {
        b.data[i / 8] = (char)(b.data[i / 8] ^ 1 << i % 8);
        accepted += read_all(b.data, b.len, &err) == IC_OK;
        b.data[i / 8] = (char)(b.data[i / 8] ^ 1 << i % 8);
    }
    print_message("%zu flipped bits, %zu accepted (names, values)\n", b.len * 8, accepted);
    ic_buf_deinit(&b);
}

/* The largest honest thing above is the pickle with IC_PICKLE_VALUES_MAX values, some 60 MB; the deflate
 * test itself holds 32 MB of zeros. A bomb that got through would show as hundreds. */
static void memory_stayed_small(void **state)
{
    struct rusage u;
    (void)state;
    getrusage(RUSAGE_SELF, &u);
    print_message("peak resident set: %ld MiB\n", u.ru_maxrss / 1024);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    skip(); /* quarantines and shadows */
#endif
    assert_true(u.ru_maxrss < 256 * 1024);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(calls_are_refused_by_name),
        cmocka_unit_test(broken_machines_are_refused),
        cmocka_unit_test(bombs_are_refused),
        cmocka_unit_test(a_cycle_ends),
        cmocka_unit_test(every_prefix_of_a_program_is_refused),
        cmocka_unit_test(random_programs_end),
        cmocka_unit_test(every_prefix_of_a_file_is_refused),
        cmocka_unit_test(every_flipped_bit_is_survived),
        cmocka_unit_test(lying_zips_are_refused),
        cmocka_unit_test(deflate_bombs_are_refused),
        cmocka_unit_test(lying_tensors_are_refused),
        cmocka_unit_test(lying_old_files_are_refused),
        cmocka_unit_test(other_files_are_named),
        cmocka_unit_test(lying_safetensors_are_refused),
        cmocka_unit_test(damaged_safetensors_are_survived),
        cmocka_unit_test(memory_stayed_small),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
