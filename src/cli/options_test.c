/* Options of serve: which source wins, what is refused and in whose name, and that the help forgets none.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "cli/options.h"

static char file[64];

static void write_file(const char *text)
{
    FILE *f = fopen(file, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static int set_up(void **state)
{
    (void)state;
    strcpy(file, "/tmp/ic_options_test.XXXXXX");
    int fd = mkstemp(file);
    assert_true(fd >= 0);
    close(fd);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    return unlink(file);
}

/* Parses a command line of words separated by spaces; %s is the file. */
static enum ic_status parse(struct ic_options *o, const char *line, bool *help, struct ic_err *err)
{
    static char text[2048]; /* options borrow from argv */
    char *argv[64] = {"serve"};
    int argc = 1;

    snprintf(text, sizeof text, line, file);
    for (char *w = strtok(text, " "); w; w = strtok(NULL, " "))
        argv[argc++] = !strcmp(w, "\"\"") ? "" : w;
    *err = (struct ic_err){0};
    return ic_options_parse(o, argc, argv, help, err);
}

static void later_sources_win(void **state)
{
    struct ic_options o;
    struct ic_err err;
    bool help;

    (void)state;
    assert_int_equal(parse(&o, "", &help, &err), IC_OK);
    assert_int_equal(o.port, 3000);
    assert_string_equal(o.host, "127.0.0.1");
    assert_null(o.model);
    assert_false(help);
    ic_options_deinit(&o);

    write_file("port = 4000\nmodel = file.gguf\n[server]\nqueue = 7\nctx-size = 2k\n");
    assert_int_equal(parse(&o, "--config %s", &help, &err), IC_OK);
    assert_int_equal(o.port, 4000);
    assert_int_equal(o.queue_max, 7);
    assert_int_equal(o.ctx_size, 2048);
    assert_string_equal(o.model, "file.gguf");
    ic_options_deinit(&o);

    setenv("IC_PORT", "5000", 1);
    setenv("IC_CTX_SIZE", "512", 1);
    assert_int_equal(parse(&o, "--config=%s", &help, &err), IC_OK);
    assert_int_equal(o.port, 5000);
    assert_int_equal(o.ctx_size, 512);
    assert_int_equal(o.queue_max, 7);
    ic_options_deinit(&o);

    assert_int_equal(parse(&o, "--port 6000 --model=m.gguf --config %s --port=6001", &help, &err), IC_OK);
    assert_int_equal(o.port, 6001); /* the last of the line, wherever --config stands */
    assert_int_equal(o.ctx_size, 512);
    assert_string_equal(o.model, "m.gguf");
    ic_options_deinit(&o);
    unsetenv("IC_PORT");
    unsetenv("IC_CTX_SIZE");

    setenv("IC_CONFIG", file, 1);
    assert_int_equal(parse(&o, "", &help, &err), IC_OK);
    assert_int_equal(o.port, 4000);
    ic_options_deinit(&o);
    assert_int_equal(parse(&o, "--config /nonexistent/x.ini", &help, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "/nonexistent/x.ini"));
    ic_options_deinit(&o);
    unsetenv("IC_CONFIG");
}

static void numbers_have_ranges_and_suffixes(void **state)
{
    static const struct {
        const char *line;
        int64_t want; /* -2: refused */
    } t[] = {
        {"--kv-size 0", 0},
        {"--kv-size 4k", 4096},
        {"--kv-size 64M", 1 << 26},
        {"--kv-size 65M", -2},
        {"--kv-size 1G", -2},
        {"--kv-size 67108864", 1 << 26},
        {"--kv-size 67108865", -2},
        {"--kv-size -1", -2},
        {"--kv-size -1K", -2}, /* shifting a negative number left is undefined */
        {"--kv-size -9223372036854775808", -2},
        {"--kv-size -9223372036854775807K", -2},
        {"--kv-size 9223372036854775807K", -2},
        {"--kv-size 99999999999999999999", -2},
        {"--kv-size 1KB", -2},
        {"--kv-size K", -2},
        {"--kv-size 1.5", -2},
        {"--kv-size 0x10", -2},
        {"--kv-size 12,", -2},
        {"--kv-size \"\"", -2},
        {"--kv-size=", -2},
        {"--kv-size", -2},
    };
    struct ic_options o;
    struct ic_err err;
    bool help;

    (void)state;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        enum ic_status st = parse(&o, t[i].line, &help, &err);
        if (t[i].want == -2) {
            assert_int_equal(st, IC_BAD_REQUEST);
            assert_non_null(strstr(err.msg, "kv-size"));
        } else {
            assert_int_equal(st, IC_OK);
            assert_int_equal(o.kv_size, t[i].want);
        }
        ic_options_deinit(&o);
    }
    assert_int_equal(parse(&o, "--gpu-layers -1 --message-max 256M --vram 3GiB", &help, &err), IC_OK);
    assert_string_equal(o.gpu_layers, "-1");
    assert_int_equal(o.vram, 3LL << 30);
    assert_int_equal(o.message_max, 256 << 20);
    ic_options_deinit(&o);
    assert_int_equal(parse(&o, "--message-max 1023", &help, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "1024 to 268435456"));
    ic_options_deinit(&o);
}

/* Every row of the table: its default lies in its range, its bounds are taken, what is just outside is not.
 */
static void every_number_keeps_to_its_range(void **state)
{
    struct ic_options o;
    struct ic_err err;
    bool help;
    char line[128];

    (void)state;
#define S(field, flag, def, unit, text)
#define I(field, flag, def, lo, hi, unit, text)                                                            \
    assert_true((def) >= (lo) && (def) <= (hi));                                                           \
    for (int over = -1; over <= 2; over++) {                                                               \
        int64_t v = over < 1 ? (int64_t)(lo) + over : (int64_t)(hi) + over - 1;                            \
        snprintf(line, sizeof line, "--" flag " %lld", (long long)v);                                      \
        enum ic_status st = parse(&o, line, &help, &err);                                                  \
        assert_int_equal(st, over == -1 || over == 2 ? IC_BAD_REQUEST : IC_OK);                            \
        assert_true(st != IC_OK || o.field == v);                                                          \
        ic_options_deinit(&o);                                                                             \
    }
    IC_OPTIONS(S, I)
#undef S
#undef I
}

static void wrong_lines_are_named(void **state)
{
    static const struct {
        const char *line, *says;
    } t[] = {
        {"--prot 3", "--prot"},
        {"--port", "--port needs a value"},
        {"model.gguf", "model.gguf"},
        {"-p 3", "-p"},
        {"--", "--"},
        {"--=3", "--=3"},
        {"--port=abc", "--port"},
        {"--portx=1", "--portx"},
        {"--por=1", "--por"},
    };
    struct ic_options o;
    struct ic_err err;
    bool help;

    (void)state;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        assert_int_equal(parse(&o, t[i].line, &help, &err), IC_BAD_REQUEST);
        const char *says = strcmp(t[i].line, "--=3") ? t[i].says : "--";
        assert_non_null(strstr(err.msg, says));
        ic_options_deinit(&o);
    }
    setenv("IC_PORT", "70000", 1);
    assert_int_equal(parse(&o, "", &help, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "environment"));
    assert_non_null(strstr(err.msg, "port"));
    ic_options_deinit(&o);
    assert_int_equal(parse(&o, "--help", &help, &err), IC_OK); /* help even so */
    assert_true(help);
    unsetenv("IC_PORT");
    ic_options_deinit(&o);
}

static void wrong_files_are_named(void **state)
{
    static char path[600];
    const struct {
        const char *text, *says;
    } t[] = {
        {"prot = 3\n", "prot"},
        {"port = x\n", "port"},
        {"port = 70000\nqueue = x\n", "port"}, /* the first mistake is told, not the last */
        {"[servers]\nport = 3\n", "servers"},
        {"config = other.ini\n", "config"},
        {"port\n", "line 1"},
        {path, "too long"}, /* longer than the reader's lines: refused, not cut */
        /* An indented line continues the one before, which nobody means here: model would be "port = 4". */
        {"model = a.gguf\n  port = 4\n", "model"},
        {"port = 3\nport = 4\n", "port"},
    };
    struct ic_options o;
    struct ic_err err;
    bool help;

    (void)state;
    snprintf(path, sizeof path, "model = /%0500d.gguf\n", 0);
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        write_file(t[i].text);
        assert_int_equal(parse(&o, "--config %s", &help, &err), IC_BAD_REQUEST);
        assert_non_null(strstr(err.msg, t[i].says));
        assert_non_null(strstr(err.msg, "configuration"));
        ic_options_deinit(&o);
    }
}

/* What a crash leaves of a file is zeros as often as not: the server must not start without its keys then. */
static void a_file_of_zeros_is_not_empty(void **state)
{
    static const struct {
        char bytes[24];
        size_t len;
    } t[] = {{"", 1}, {"", 24}, {"port = 3\n", 12}, {"port = 3\0\n", 10}};
    struct ic_options o;
    struct ic_err err;
    bool help;

    (void)state;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        FILE *f = fopen(file, "w");
        assert_non_null(f);
        fwrite(t[i].bytes, 1, t[i].len, f);
        fclose(f);
        assert_int_equal(parse(&o, "--config %s", &help, &err), IC_BAD_REQUEST);
        assert_non_null(strstr(err.msg, "NUL"));
        ic_options_deinit(&o);
    }
    write_file("port = 3"); /* no newline at the end: a line all the same */
    assert_int_equal(parse(&o, "--config %s", &help, &err), IC_OK);
    assert_int_equal(o.port, 3);
    ic_options_deinit(&o);
}

static void a_file_may_set_everything(void **state)
{
    struct ic_options o;
    struct ic_err err;
    struct ic_buf b = {0};
    bool help;

    (void)state;
#define S(field, flag, def, unit, text)                                                                    \
    if (strcmp(flag, "config") != 0)                                                                       \
        ic_buf_puts(&b, flag " = text of " flag "\n");
#define I(field, flag, def, lo, hi, unit, text) ic_buf_printf(&b, flag " = %lld\n", (long long)(hi));
    IC_OPTIONS(S, I)
#undef S
#undef I
    ic_buf_put(&b, "", 1);
    write_file(b.data);
    assert_int_equal(parse(&o, "--config %s", &help, &err), IC_OK);
#define S(field, flag, def, unit, text)                                                                    \
    if (strcmp(flag, "config") != 0)                                                                       \
        assert_string_equal(o.field, "text of " flag);
#define I(field, flag, def, lo, hi, unit, text) assert_true(o.field == (hi));
    IC_OPTIONS(S, I)
#undef S
#undef I
    ic_options_deinit(&o);
    ic_buf_deinit(&b);
}

static void help_names_every_option(void **state)
{
    struct ic_buf b = {0};

    (void)state;
    ic_options_help(&b);
    ic_buf_put(&b, "", 1);
#define S(field, flag, def, unit, text)                                                                    \
    assert_non_null(strstr(b.data, "--" flag " "));                                                        \
    assert_non_null(strstr(b.data, text));
#define I(field, flag, def, lo, hi, unit, text)                                                            \
    S(field, flag, def, unit, text) do                                                                     \
    {                                                                                                      \
        char want[64];                                                                                     \
        snprintf(want, sizeof want, "default %lld)", (long long)(def));                                    \
        assert_non_null(strstr(strstr(b.data, "--" flag " "), want));                                      \
    }                                                                                                      \
    while (0)                                                                                              \
        ;
    IC_OPTIONS(S, I)
#undef S
#undef I
    ic_buf_deinit(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(later_sources_win, set_up, tear_down),
        cmocka_unit_test(numbers_have_ranges_and_suffixes),
        cmocka_unit_test(every_number_keeps_to_its_range),
        cmocka_unit_test(wrong_lines_are_named),
        cmocka_unit_test_setup_teardown(wrong_files_are_named, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_file_of_zeros_is_not_empty, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_file_may_set_everything, set_up, tear_down),
        cmocka_unit_test(help_names_every_option),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
