/* What the schema tests share: llama.cpp's grammar engine with the vocabulary of a tiny model, fed byte
 * by byte, so that what is tested is what a model could have written. */
#ifndef IC_TEXT_SCHEMA_TEST_H
#define IC_TEXT_SCHEMA_TEST_H

#include <dlfcn.h>
#include <llama.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "text/schema.h"

static struct llama_model *model; /* one program, one test file */
static const struct llama_vocab *vocab;
static llama_token byte_token[256];

static inline void quiet(enum ggml_log_level level, const char *text, void *arg)
{
    (void)level, (void)text, (void)arg;
}

static inline int load_vocab(void **state)
{
    Dl_info info;
    char dir[1024], text[8];

    (void)state;
    llama_log_set(quiet, NULL);
    assert_true(dladdr((void *)(uintptr_t)llama_backend_init, &info));
    snprintf(dir, sizeof dir, "%s", info.dli_fname);
    char *slash = strrchr(dir, '/');
    assert_non_null(slash);
    *slash = 0;
    ggml_backend_load_all_from_path(dir);
    llama_backend_init();
    struct llama_model_params p = llama_model_default_params();
    p.vocab_only = true;
    model = llama_model_load_from_file(IC_SOURCE_DIR "/demo/models/stories260K-f32.gguf", p);
    assert_non_null(model);
    vocab = llama_model_get_vocab(model);
    for (int b = 0; b < 256; b++) {
        snprintf(text, sizeof text, "<0x%02X>", b);
        byte_token[b] = -1;
        for (llama_token t = 0; t < llama_vocab_n_tokens(vocab); t++)
            if (!strcmp(llama_vocab_get_text(vocab, t), text))
                byte_token[b] = t;
        assert_true(byte_token[b] >= 0);
    }
    return 0;
}

static inline int free_vocab(void **state)
{
    (void)state;
    llama_model_free(model);
    llama_backend_free();
    return 0;
}

static inline bool allows(struct llama_sampler *g, llama_token t)
{
    llama_token_data one = {t, 0.0f, 0.0f};
    llama_token_data_array all = {&one, 1, -1, false};

    llama_sampler_apply(g, &all);
    return isfinite(one.logit);
}

static inline bool matches(const char *gbnf, const char *doc)
{
    struct llama_sampler *g = llama_sampler_init_grammar(vocab, gbnf, "root");
    bool ok = true;

    assert_non_null(g);
    for (const unsigned char *p = (const unsigned char *)doc; *p && ok; p++) {
        ok = allows(g, byte_token[*p]);
        if (ok)
            llama_sampler_accept(g, byte_token[*p]);
    }
    ok = ok && allows(g, llama_vocab_eos(vocab));
    llama_sampler_free(g);
    return ok;
}

static inline json_t *parse(const char *text)
{
    json_error_t e;
    json_t *j = json_loads(text, JSON_DECODE_ANY | JSON_ALLOW_NUL, &e);

    if (!j)
        fail_msg("test schema: %s in %s", e.text, text);
    return j;
}

/* The grammar of a schema that must compile; the caller frees. */
static inline char *grammar_of(const char *schema)
{
    struct ic_buf out = {0};
    struct ic_err err = {0};
    json_t *j = parse(schema);

    if (ic_schema_to_gbnf(j, &out, &err))
        fail_msg("%s: %s", schema, err.msg);
    json_decref(j);
    assert_int_equal(strlen(out.data), out.len);
    return ic_buf_take(&out, NULL);
}

static inline void refused(const char *schema, enum ic_status status, const char *says)
{
    struct ic_buf out = {0};
    struct ic_err err = {0};
    json_t *j = parse(schema);
    enum ic_status st = ic_schema_to_gbnf(j, &out, &err);

    if (st != status || err.code != status || !strstr(err.msg, says) || out.len)
        fail_msg("%.300s\n%s: %s\nexpected %s: %s", schema, ic_status_name(st), err.msg,
                 ic_status_name(status), says);
    json_decref(j);
    ic_buf_deinit(&out);
}

#endif
