/* A draft model on a real one: stories260K drafts for itself, so that what it proposes is known to be right. What it
 * holds, what it forgets, what it is refused for. When it is asked is the scheduler's (sched/text_draft_test.c). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>
#include <ggml.h>
#include <gguf.h>

#include "text/model.c" /* its pools */
#include "text/draft.c" /* its model */

#define MODEL IC_SOURCE_DIR "/demo/models/stories260K-f32.gguf"
#define OTHER IC_SOURCE_DIR "/.models/tinyllama-1.1b-chat-iq2_xxs.gguf"
#define CTX 256
#define CELLS 512 /* of the draft: two streams */
#define STREAMS 4
#define MAX 8     /* proposals in a call */
#define TIE 0.05f /* as in sched/text_real_test.c */
#define SAID 150  /* tokens */

static const char *const beginnings[] = {"Once upon a time", "Tom and Sam are friends. They like to",
                                         "The little girl named Lily went to the park.", "One day, a cat"};

static struct ic_text_model *m;
static struct ic_draft *d;

static struct ic_text_config config(void)
{
    return (struct ic_text_config){.path = MODEL,
                                   .draft = MODEL,
                                   .ctx_size = CTX,
                                   .kv_size = CELLS,
                                   .parallel = STREAMS,
                                   .batch = 64,
                                   .threads = 1};
}

static int open_both(void **state)
{
    struct ic_text_config cfg = config();
    struct ic_err err = {0};

    (void)state;
    if (ic_draft_open(&d, &cfg, &err) == IC_OK && ic_text_model_open(&m, &cfg, &err) == IC_OK &&
        ic_draft_bind(d, m, &err) == IC_OK)
        return 0;
    fprintf(stderr, "%s\n", err.msg);
    return -1;
}

static int close_both(void **state)
{
    (void)state;
    ic_draft_close(&d);
    assert_null(d);
    ic_draft_close(&d);
    ic_text_model_close(&m);
    return 0;
}

static int32_t begin(int which, int32_t *out)
{
    const char *s = beginnings[which % 4];
    int32_t *t, n;

    assert_int_equal(ic_text_tokenize(m, s, strlen(s), true, false, CTX, &t, &n, NULL), IC_OK);
    memcpy(out, t, sizeof *t * (size_t)n);
    free(t);
    return n;
}

static int32_t highest(const float *l)
{
    int32_t at = 0;

    for (int32_t i = 1; i < m->info.n_vocab; i++)
        at = l[i] > l[at] ? i : at;
    return at;
}

/* Decodes tokens[from..n) of sequence 0, all with logits. */
static void decode(const int32_t *tokens, int32_t from, int32_t n)
{
    static struct ic_row rows[64];

    for (int32_t i = from; i < n; i++)
        rows[i - from] =
            (struct ic_row){tokens[i], i, 0, i >= n - 5, false}; /* no more than may ask for them */
    assert_int_equal(ic_text_decode(m, rows, n - from), IC_DECODE_OK);
}

static int32_t propose(int32_t seq, const int32_t *tokens, int32_t n, int32_t read, int32_t max,
                       int32_t *out)
{
    struct ic_draft_req q = {.seq = seq, .tokens = tokens, .n = n, .read = read, .max = max, .out = out};

    assert_true(ic_draft_propose(d, &q, 1));
    assert_true(q.n_out <= max && q.read <= read);
    return q.n_out;
}

/* What is said with it is what is said without, but for ties, in fewer decodes; nearly all is accepted. */
static void a_model_that_drafts_for_itself_is_nearly_always_right(void **state)
{
    int32_t t[CTX], out[MAX], n, proposed = 0, accepted = 0, decodes = 0;

    (void)state;
    n = begin(0, t);
    int32_t prompt = n;
    decode(t, 0, n);
    t[n] = highest(ic_text_logits(m, n - 1));
    n++;
    while (n < prompt + SAID) {
        int32_t k = propose(0, t, n, n, 4, out), kept = 0;
        memcpy(t + n, out, sizeof *out * (size_t)k);
        decode(t, n - 1, n + k);
        decodes++;
        for (; kept <= k; kept++) {
            const float *l = ic_text_logits(m, kept);
            int32_t said = highest(l);
            if (kept < k && said != out[kept])
                assert_true(l[said] - l[out[kept]] < TIE);
            t[n + kept] = said;
            if (kept == k || said != out[kept])
                break;
        }
        proposed += k;
        accepted += kept;
        n += kept + 1;
        assert_true(ic_text_seq_rm(m, 0, n - 1));
        assert_in_range(ic_draft_behind(d, 0, t, n), 1,
                        2); /* the last one, and what the model put behind it */
    }
    print_message("%d of %d kept, %d decodes for %d tokens\n", accepted, proposed, decodes, n - prompt - 1);
    assert_true(proposed > SAID / 4 && accepted > proposed * 9 / 10 && decodes < SAID - proposed * 8 / 10);
    assert_true(ic_text_seq_rm(m, 0, 0));
}

static void several_streams_together_get_what_they_get_alone(void **state)
{
    int32_t t[STREAMS][CTX], out[STREAMS][MAX], alone[MAX];
    struct ic_draft_req q[STREAMS];

    (void)state;
    for (int i = 0; i < STREAMS; i++) {
        q[i] = (struct ic_draft_req){
            .seq = i, .tokens = t[i], .n = begin(i, t[i]), .read = CTX, .out = out[i]};
        q[i].max = 2 + 2 * i;
        assert_true(q[i].max <= MAX);
    }
    assert_true(ic_draft_propose(d, q, STREAMS));
    int32_t all = 0;
    for (int i = 0; i < STREAMS; i++) {
        int32_t k = propose(STREAMS + i, t[i], q[i].n, CTX, q[i].max, alone);
        assert_int_equal(k, q[i].n_out);
        assert_memory_equal(alone, out[i], sizeof *alone * (size_t)k);
        assert_true(k == q[i].max || q[i].unsure);
        all += k;
    }
    assert_true(all > 0);
}

/* Nothing is proposed before all has been read, and no more is read than allowed. */
static void it_reads_as_much_as_it_may(void **state)
{
    int32_t t[CTX], out[MAX], fresh[MAX], n = begin(2, t);

    (void)state;
    while (n < 100) {
        t[n] = t[n % 7 + 1];
        n++;
    }
    assert_int_equal(ic_draft_behind(d, 0, t, n),
                     n - 1); /* what begins alike, BOS, is there: from the tests before */
    assert_int_equal(propose(0, t, n, 30, MAX, out), 0);
    assert_int_equal(ic_draft_behind(d, 0, t, n), n - 31);
    assert_int_equal(propose(0, t, n, n - 32, 0, NULL), 0);
    assert_int_equal(ic_draft_behind(d, 0, t, n), 1);
    int32_t k = propose(0, t, n, 1, MAX, out);
    /* Cut back in the middle and gone on with: as if read in one go. */
    t[60] = t[61];
    assert_int_equal(ic_draft_behind(d, 0, t, n), n - 60);
    k = propose(0, t, n, CTX, MAX, out);
    assert_int_equal(k, propose(7, t, n, CTX, MAX, fresh));
    assert_memory_equal(out, fresh, sizeof *out * (size_t)k);
    assert_int_equal(ic_draft_behind(d, 0, t, CTX), INT32_MAX); /* as long as its context */
    assert_int_equal(ic_draft_behind(d, 1000, t, n), INT32_MAX);
    assert_int_equal(propose(1000, t, n, CTX, MAX, out), 0);
}

/* Streams that do not fit do not take each other's cells, as long as those are in use; then the oldest's go. */
static void its_cells_are_bounded(void **state)
{
    static int32_t t[4][CTX];
    int32_t n = 200;

    (void)state;
    assert_int_equal(ic_draft_info(d)->kv_size, CELLS);
    for (int i = 0; i < IC_DRAFT_FRESH + 2; i++) /* what the tests before have left is old now */
        propose(20, t[0], 2, 2, 0, NULL);
    for (int i = 0; i < 4; i++)
        for (int32_t k = 0; k < n; k++)
            t[i][k] = 3 + (k * (i + 3)) % 400;
    for (int i = 0; i < 2; i++)
        propose(10 + i, t[i], n, n - 1, 0, NULL);
    struct ic_draft_req q = {.seq = 12, .tokens = t[2], .n = n, .read = n - 1};
    assert_true(ic_draft_propose(d, &q, 1));
    assert_true(q.read == 0 && q.n_out == 0 && ic_draft_behind(d, 12, t[2], n) == n);
    assert_true(ic_draft_behind(d, 10, t[0], n) == 1 && ic_draft_behind(d, 11, t[1], n) == 1);
    for (int i = 0; i < IC_DRAFT_FRESH; i++) /* 10 is not asked for any more */
        propose(11, t[1], n, 1, 0, NULL);
    q.read = n - 1;
    assert_true(ic_draft_propose(d, &q, 1));
    assert_int_equal(q.read, n - 1);
    assert_true(ic_draft_behind(d, 10, t[0], n) == n && ic_draft_behind(d, 11, t[1], n) == 1);
}

static bool yes(void *arg)
{
    (void)arg;
    return true;
}

static void told_to_stop_it_has_proposed_nothing_and_lost_nothing(void **state)
{
    int32_t t[CTX], before[MAX], after[MAX], n = begin(1, t);
    struct ic_draft_req q = {.seq = 3, .tokens = t, .n = n, .read = n, .max = MAX, .out = after};

    (void)state;
    int32_t k = propose(3, t, n, n, MAX, before);
    ic_draft_set_abort(d, yes, NULL);
    t[n] = t[n - 1];
    q.n = n + 1;
    assert_true(ic_draft_propose(d, &q, 1));
    assert_int_equal(q.n_out, 0);
    ic_draft_set_abort(d, NULL, NULL);
    assert_int_equal(propose(3, t, n, n, MAX, after), k);
    assert_memory_equal(before, after, sizeof *before * (size_t)k);
}

/* One pool for both, and when it is replaced nobody keeps the old one: the address sanitizer sees who does. */
static void both_compute_with_one_pool(void **state)
{
    int32_t t[CTX], before[MAX], after[MAX], n = begin(0, t);

    (void)state;
    if (!m->pool)
        skip();
    int32_t k = propose(0, t, n, n, MAX, before);
    assert_ptr_equal(d->m->computed_with, m->pool);
    assert_true(m->guest == d->m && !d->m->pool && llama_n_threads(d->m->ctx) == llama_n_threads(m->ctx));
    for (int32_t threads = 1; threads <= 2; threads++)
        for (int asked = 0; asked < 2;
             asked++) { /* between the change and the model's next decode, or not */
            make_pool(m, threads);
            if (asked)
                propose(0, t, n, n, MAX, after);
            decode(t, 0, 1);
            assert_true(!m->old_pool && d->m->computed_with == m->pool && !d->m->broken);
            assert_true(llama_n_threads(d->m->ctx) == threads && llama_n_threads(m->ctx) == threads);
            assert_int_equal(propose(0, t, n, n, MAX, after), k);
            assert_memory_equal(before, after, sizeof *before * (size_t)k);
            assert_true(ic_text_seq_rm(m, 0, 0));
        }
}

/* ---- what is refused -------------------------------------------------------------------------------------------- */

static void its_sizes_follow_the_models(void **state)
{
    static const struct {
        int32_t ctx, kv, want_ctx, want_kv;
    } t[] = {{0, 0, 0, 0},           {512, 0, 512, 0},          {512, 8192, 512, 0},
             {512, 1000, 512, 1000}, {0, 1000, 1000, 1000},     {0, 100000, 4096, 0},
             {100000, 0, 8192, 0},   {100000, 200000, 8192, 0}, {8192, 8192, 8192, 8192}};

    (void)state;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        struct ic_text_config of = {
            .draft = "d", .ctx_size = t[i].ctx, .kv_size = t[i].kv, .parallel = 256};
        struct ic_text_config c = ic_draft_config(&of);
        assert_int_equal(c.ctx_size, t[i].want_ctx);
        assert_int_equal(c.kv_size, t[i].want_kv);
        assert_int_equal(c.parallel, IC_DRAFT_STREAMS_MAX);
    }
}

static enum ic_status try_draft(const char *path, struct ic_err *err)
{
    struct ic_text_config cfg = config();
    struct ic_draft *x = NULL;
    struct ic_text_model *of = NULL;

    cfg.draft = path;
    cfg.threads = 1;
    *err = (struct ic_err){0};
    enum ic_status st = ic_draft_open(&x, &cfg, err);
    if (st == IC_OK) {
        assert_int_equal(ic_text_model_open(&of, &cfg, NULL), IC_OK);
        st = ic_draft_bind(x, of, err);
    }
    ic_draft_close(&x);
    ic_text_model_close(&of);
    return st;
}

static void what_is_no_model_is_no_draft(void **state)
{
    char path[] = "/tmp/ic_draft_test.XXXXXX";
    struct ic_err err;

    (void)state;
    assert_int_equal(try_draft("/nonexistent/draft.gguf", &err), IC_NOT_FOUND);
    assert_non_null(strstr(err.msg, "draft model /nonexistent/draft.gguf"));
    int fd = mkstemp(path);
    assert_true(fd >= 0 && write(fd, "GGUF nonsense", 13) == 13);
    close(fd);
    assert_int_equal(try_draft(path, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "draft model /tmp"));
    unlink(path);
}

/* The model's file with something changed in its vocabulary. */
static void changed(const char *path, int32_t token, int32_t eos)
{
    struct ggml_context *data = NULL;
    struct gguf_init_params p = {.no_alloc = false, .ctx = &data};
    struct gguf_context *g = gguf_init_from_file(MODEL, p), *out = gguf_init_empty();
    const char *words[1000];

    assert_true(g && out);
    gguf_set_kv(out, g);
    int64_t key = gguf_find_key(g, "tokenizer.ggml.tokens");
    size_t n = gguf_get_arr_n(g, key);
    for (size_t i = 0; i < n; i++)
        words[i] = (int32_t)i == token ? "changed" : gguf_get_arr_str(g, key, i);
    gguf_set_arr_str(out, "tokenizer.ggml.tokens", words, n);
    for (int64_t i = 0; i < gguf_get_n_tensors(g); i++)
        gguf_add_tensor(out, ggml_get_tensor(data, gguf_get_tensor_name(g, i)));
    if (eos >= 0)
        gguf_set_val_u32(out, "tokenizer.ggml.eos_token_id", (uint32_t)eos);
    assert_true(gguf_write_to_file(out, path, false));
    gguf_free(out);
    gguf_free(g);
    ggml_free(data);
}

static void another_vocabulary_is_refused_and_named(void **state)
{
    static const struct {
        int32_t token, eos;
        const char *say;
    } t[] = {{-1, -1, NULL},
             {411, -1, "its token 411 is \"changed\", the model's \""},
             {-1, 7, "its EOS is 7, the model's 2"}};
    struct ic_err err;

    (void)state;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        char path[] = "/tmp/ic_draft_test.XXXXXX";
        close(mkstemp(path));
        changed(path, t[i].token, t[i].eos);
        enum ic_status st = try_draft(path, &err);
        unlink(path);
        if (!t[i].say) {
            assert_int_equal(st, IC_OK);
            continue;
        }
        assert_int_equal(st, IC_BAD_REQUEST);
        if (!strstr(err.msg, t[i].say))
            fail_msg("%s", err.msg);
    }
}

static void another_models_vocabulary_is_refused(void **state)
{
    struct ic_err err;

    (void)state;
    if (access(OTHER, R_OK) != 0)
        skip();
    assert_int_equal(try_draft(OTHER, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "number of tokens is 32000, the model's 512"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_model_that_drafts_for_itself_is_nearly_always_right),
        cmocka_unit_test(several_streams_together_get_what_they_get_alone),
        cmocka_unit_test(it_reads_as_much_as_it_may),
        cmocka_unit_test(its_cells_are_bounded),
        cmocka_unit_test(told_to_stop_it_has_proposed_nothing_and_lost_nothing),
        cmocka_unit_test(both_compute_with_one_pool),
        cmocka_unit_test(its_sizes_follow_the_models),
        cmocka_unit_test(what_is_no_model_is_no_draft),
        cmocka_unit_test(another_vocabulary_is_refused_and_named),
        cmocka_unit_test(another_models_vocabulary_is_refused),
    };
    ic_log_set_level(IC_LOG_ERROR);
    return cmocka_run_group_tests(tests, open_both, close_both);
}
