/* The keys file: what is accepted, what is refused, and that nothing is cut or merged behind the owner's back. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "proto/keys.h"

static char file[64];

static int set_up(void **state)
{
    (void)state;
    strcpy(file, "/tmp/ic_keys_test.XXXXXX");
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

static struct ic_keys *load(const char *text, struct ic_err *err)
{
    struct ic_keys *k = (struct ic_keys *)1;
    FILE *f = fopen(file, "w");

    assert_non_null(f);
    fputs(text, f);
    fclose(f);
    *err = (struct ic_err){0};
    enum ic_status st = ic_keys_load(&k, file, err);
    assert_true((st == IC_OK) == (k != NULL) && st == err->code);
    return k;
}

static void a_client_is_known_by_its_id_and_key(void **state)
{
    struct ic_err err;
    struct ic_keys *k =
        load("; comment\n[alice]\nkey = alice-key-1\nmax_sessions = 3\n\n[bob]\nkey=bob-key-22\n"
             "[twin]\nkey = bob-key-22\n",
             &err);

    (void)state;
    assert_non_null(k);
    const struct ic_client *c = ic_keys_check(k, "alice", "alice-key-1");
    assert_non_null(c);
    assert_string_equal(c->id, "alice");
    assert_int_equal(c->max_sessions, 3);
    assert_string_equal(ic_keys_check(k, NULL, "alice-key-1")->id, "alice");
    assert_string_equal(ic_keys_check(k, "", "alice-key-1")->id, "alice");
    assert_string_equal(ic_keys_check(k, "bob", "bob-key-22")->id, "bob");
    assert_string_equal(ic_keys_check(k, "twin", "bob-key-22")->id, "twin");
    assert_int_equal(ic_keys_check(k, "bob", "bob-key-22")->max_sessions, 0);
    assert_null(ic_keys_check(k, "alice", "bob-key-22"));
    assert_null(ic_keys_check(k, "carol", "bob-key-22"));
    assert_null(ic_keys_check(k, "bob", ""));
    assert_null(ic_keys_check(k, NULL, ""));
    assert_null(ic_keys_check(k, "bob", "bob-key-2"));
    assert_null(ic_keys_check(k, "bob", "bob-key-222"));
    assert_null(ic_keys_check(k, "bob", "Bob-key-22"));
    ic_keys_free(&k);
    assert_null(k);
    ic_keys_free(&k);
}

static void lengths_are_those_of_the_header(void **state)
{
    char text[1024], key[IC_KEY_LEN_MAX + 2], id[130];
    struct ic_err err;
    struct ic_keys *k;

    (void)state;
    memset(key, 'k', sizeof key);
    key[IC_KEY_LEN_MAX] = 0;
    memset(id, 'i', sizeof id);
    id[IC_KEYS_ID_MAX] = 0;
    snprintf(text, sizeof text, "[%s]\nmax_sessions = 100000\nkey = %s\n", id, key);
    k = load(text, &err); /* the longest of both */
    assert_non_null(k);
    assert_non_null(ic_keys_check(k, id, key));
    key[IC_KEY_LEN_MAX] = 'k';
    key[IC_KEY_LEN_MAX + 1] = 0;
    assert_null(ic_keys_check(k, id, key)); /* the right beginning and more */
    ic_keys_free(&k);

    snprintf(text, sizeof text, "[a]\nkey = %s\n", key);
    assert_null(load(text, &err));
    assert_non_null(strstr(err.msg, "characters"));
    assert_null(load("[a]\nkey = 1234567\n", &err));
    k = load("[a]\nkey = 12345678\n", &err);
    assert_non_null(k);
    ic_keys_free(&k);
    id[IC_KEYS_ID_MAX] = 'i';
    id[IC_KEYS_ID_MAX + 1] = 0;
    snprintf(text, sizeof text, "[%s]\nkey = 12345678\n", id);
    assert_null(load(text, &err));
    assert_non_null(strstr(err.msg, "client id"));
}

/* inih cuts a section's name at 49 bytes: both would be one client, with the second's key. */
static void long_ids_are_not_merged(void **state)
{
    char text[512], id[101];
    struct ic_err err;

    (void)state;
    memset(id, 'i', sizeof id);
    id[100] = 0;
    snprintf(text, sizeof text, "[%.99sA]\nkey = key-of-aaa\n[%.99sB]\nkey = key-of-bbb\n", id, id);
    assert_null(load(text, &err));
    assert_int_equal(err.code, IC_TOO_LARGE);
}

static void mistakes_are_told(void **state)
{
    static const struct {
        const char *text, *says;
    } t[] = {
        {"", "no client"},
        {"key = 12345678\n", "outside"},
        {"[a]\n", "no client"},
        {"[a]\nmax_sessions = 3\n", "no key"},
        {"[a]\nkey = 12345678\nmax_sessions = 0\n", "max_sessions"},
        {"[a]\nkey = 12345678\nmax_sessions = 100001\n", "max_sessions"},
        {"[a]\nkey = 12345678\nmax_sessions = 3x\n", "max_sessions"},
        {"[a]\nkey = 12345678\nmax_sessions =\n", "max_sessions"},
        {"[a]\nkey = 12345678\nkeys = 3\n", "keys"},
        {"[a]\nkey = 12345678\nnonsense\n", "line 3"},
        {"[a\nkey = 12345678\n", "outside"},             /* the broken line opens nothing */
        {"[a]\nkey = short\nfoo = bar\n", "characters"}, /* the first mistake */
        /* An indented line continues the one before: the key would be "max_sessions = 4". */
        {"[a]\nkey = 12345678\n  max_sessions = 4\n", "twice"},
        {"[a]\nkey = 12345678\n[b]\nkey = 12345678\n[a]\nkey = 87654321\n", "twice"},
    };
    struct ic_err err;

    (void)state;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        assert_null(load(t[i].text, &err));
        assert_non_null(strstr(err.msg, t[i].says));
    }
}

static void errors_never_show_a_key(void **state)
{
    struct ic_err err;

    (void)state;
    assert_null(load("[a]\nkey = secret1\n", &err));
    assert_null(strstr(err.msg, "secret"));
    assert_null(load("[a]\nkey = secret-secret\nkey = secret-other\n", &err));
    assert_null(strstr(err.msg, "secret"));
}

/* As a crash may leave it: the first 16 characters of a key are not that key. */
static void a_file_that_ends_in_zeros_is_refused(void **state)
{
    static const char text[] = "[a]\nkey = 0123456789abcdef\0\0\0\0";
    struct ic_keys *k;
    struct ic_err err = {0};
    FILE *f = fopen(file, "w");

    (void)state;
    assert_non_null(f);
    fwrite(text, 1, sizeof text, f);
    fclose(f);
    assert_int_equal(ic_keys_load(&k, file, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "NUL"));
}

static void what_cannot_be_read_is_told(void **state)
{
    struct ic_keys *k;
    struct ic_err err = {0};

    (void)state;
    assert_int_equal(ic_keys_load(&k, "/tmp", &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "directory"));
}

static void a_missing_file_is_not_found(void **state)
{
    struct ic_keys *k;
    struct ic_err err = {0};

    (void)state;
    assert_int_equal(ic_keys_load(&k, "/nonexistent/keys.ini", &err), IC_NOT_FOUND);
    assert_null(k);
    assert_non_null(strstr(err.msg, "/nonexistent/keys.ini"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_client_is_known_by_its_id_and_key),
        cmocka_unit_test(lengths_are_those_of_the_header),
        cmocka_unit_test(long_ids_are_not_merged),
        cmocka_unit_test(mistakes_are_told),
        cmocka_unit_test(errors_never_show_a_key),
        cmocka_unit_test(a_file_that_ends_in_zeros_is_refused),
        cmocka_unit_test(what_cannot_be_read_is_told),
        cmocka_unit_test(a_missing_file_is_not_found),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
