/* Requests that want a vector, over the fake model: each vector must be what the states of that prompt alone come to (the
 * world's oracle compares at every END), whatever happened to the request on its way. */
#include "sched/text_world.h"

static bool differ(const struct client_req *a, const struct client_req *b)
{
    return memcmp(a->vector, b->vector, sizeof a->vector) != 0;
}

static void each_kind_gives_its_own(void **state)
{
    struct world *w = world_new(1, 2, 8, 64, 200);

    (void)state;
    struct client_req *r[] = {submit_embed(w, "a prompt of more than one slice", IC_POOLING_MEAN),
                              submit_embed(w, "a prompt of more than one slice", IC_POOLING_CLS),
                              submit_embed(w, "a prompt of more than one slice", IC_POOLING_LAST)};
    run_dry(w);
    for (int i = 0; i < 3; i++)
        CHECK(r[i]->has_vector && r[i]->end.reason == IC_END_STOP && r[i]->end.stats.prompt_tokens == 32);
    CHECK(differ(r[0], r[1]) && differ(r[1], r[2]) && differ(r[0], r[2]));
    CHECK(r[0]->end.stats.ttft_ms <= 0); /* no token ever came */
    world_free(w);
}

static void beside_others_it_is_the_same(void **state)
{
    struct world *w = world_new(2, 6, 16, 100, 600);
    char text[64];

    (void)state;
    struct client_req *stream = endless(submit_prompt(w, "s", 60));
    tick(w);
    struct client_req *vector = submit_embed(w, letters(text, 40), IC_POOLING_MEAN);
    for (int i = 0; i < 3; i++) /* of one client, so one after the other, but in shared decodes */
        submit_embed(w, letters(text, 10 + i), (enum ic_pooling)(IC_POOLING_MEAN + i));
    struct client_req *late = endless(submit_prompt(w, letters(text, 20), 5));
    run_dry(w);
    CHECK(vector->has_vector && stream->end.stats.tokens == 60 && late->end.stats.tokens == 5);
    world_free(w);
}

/* Cells of others have no hidden states to them. */
static void only_what_is_not_wanted_comes_from_the_cache(void **state)
{
    static const struct {
        enum ic_pooling kind;
        int32_t cached;
    } t[] = {{IC_POOLING_MEAN, 0}, {IC_POOLING_CLS, 0}, {IC_POOLING_LAST, 40}};
    char text[64], more[72];

    (void)state;
    for (size_t i = 0; i < 3; i++) {
        struct world *w = world_new(3 + i, 3, 64, 100, 600);
        struct client_req *first = endless(submit_prompt(w, letters(text, 40), 0));
        run_dry(w);
        CHECK(first->end.stats.cached_tokens == 0);
        struct client_req *r = submit_embed(w, text, t[i].kind);
        run_dry(w);
        CHECK(r->end.stats.cached_tokens == t[i].cached);
        snprintf(more, sizeof more, "%sxyz", text); /* and what it computed is there for others */
        struct client_req *after = endless(submit_prompt(w, more, 1));
        run_dry(w);
        CHECK(after->end.stats.cached_tokens >= 40);
        world_free(w);
    }
}

static void nobody_waits_for_cells_that_cannot_help(void **state)
{
    struct world *w = world_new(6, 4, 8, 100, 600);
    char text[64];

    (void)state;
    endless(submit_prompt(w, letters(text, 40), 1));
    tick(w); /* it is being read */
    struct client_req *r = submit_embed(w, text, IC_POOLING_MEAN),
                      *last = submit_embed(w, text, IC_POOLING_LAST);
    tick(w);
    for (int32_t i = 0; i < w->s->n_running; i++) {
        const struct run *x = w->s->order[i];
        CHECK(x->req != r->req || !x->lead);
        CHECK(x->req != last->req || x->lead);
    }
    run_dry(w);
    CHECK(r->end.stats.cached_tokens == 0 && last->end.stats.cached_tokens > 0);
    world_free(w);
}

/* Put back in the middle of its prompt: no state is lost, and none counts twice. */
static void a_preempted_one_goes_on(void **state)
{
    (void)state;
    for (int lose_cells = 0; lose_cells < 2; lose_cells++)
        for (int kind = IC_POOLING_MEAN; kind < IC_POOLINGS; kind++) {
            struct world *w = world_new(7, 1, 8, 100, 200);
            char text[64];
            struct client_req *r = submit_embed(w, letters(text, 50), (enum ic_pooling)kind);
            tick(w);
            tick(w);
            struct client_req *high = ask(w, -1, "h", 3);
            high->req->priority = IC_PRIO_HIGH;
            endless(submit(w, high));
            tick(w);
            CHECK(w->c.preempted == 1 && !is_running(w, r));
            int64_t rows = w->f.decoded_rows;
            if (lose_cells)
                empty_cache(w);
            run_dry(w);
            CHECK(r->has_vector && high->end.stats.tokens == 3);
            CHECK((w->f.decoded_rows - rows < 51) == !lose_cells);
            world_free(w);
        }
}

static void the_model_may_go_and_come_back(void **state)
{
    char text[64];

    (void)state;
    for (int orderly = 0; orderly < 2; orderly++) {
        struct world *w = world_new(8, 2, 8, 100, 200);
        struct client_req *r = submit_embed(w, letters(text, 50), IC_POOLING_MEAN);
        tick(w);
        tick(w);
        lose(w, orderly);
        run_dry(w);
        CHECK(orderly ? r->has_vector
                      : r->code == IC_INTERNAL); /* its rows were in the decode that was lost */
        world_free(w);
    }
    struct world *w = world_new(9, 2, 8, 100, 200);
    struct client_req *r = submit_embed(w, letters(text, 50), IC_POOLING_MEAN);
    tick(w);
    lose(w, true);
    w->f.be.n_embd = FAKE_EMBD - 1;
    w->unchecked = true;
    reopen(w);
    CHECK(r->ended && r->code == IC_INTERNAL && !r->has_vector);
    world_free(w);
}

static void what_cannot_be_is_refused(void **state)
{
    struct world *w = world_new(10, 2, 8, 32, 64);
    char text[64];

    (void)state;
    w->f.add_bos = false;
    struct client_req *over = submit_embed(w, letters(text, 32), IC_POOLING_MEAN);
    struct client_req *full = submit_embed(w, letters(text, 31), IC_POOLING_MEAN);
    struct client_req *none = submit_embed(w, "~~", IC_POOLING_LAST);
    run_dry(w);
    CHECK(over->code == IC_TOO_LARGE && !over->error_more && !over->has_vector);
    CHECK(full->has_vector);
    CHECK(none->code == IC_BAD_REQUEST && strstr(none->err, "empty"));
    w->f.be.n_embd = 0;
    w->unchecked = true;
    struct client_req *off = submit_embed(w, "a", IC_POOLING_MEAN);
    run_dry(w);
    CHECK(off->code == IC_BAD_REQUEST && strstr(off->err, "--pooling") && !off->error_more);
    world_free(w);
}

static void cancels_and_deadlines_end_it(void **state)
{
    struct world *w = world_new(11, 4, 8, 100, 400);
    char text[64];

    (void)state;
    struct client_req *aborted = submit_embed(w, letters(text, 60), IC_POOLING_MEAN);
    struct client_req *gone = submit_embed(w, letters(text, 60), IC_POOLING_MEAN);
    struct client_req *late = ask(w, -1, letters(text, 60), 0),
                      *stays = submit_embed(w, letters(text, 60), IC_POOLING_CLS);
    late->req->pooling = IC_POOLING_LAST;
    late->req->deadline_ns = w->f.now + 1500;
    submit(w, late);
    tick(w);
    tick(w);
    cancel(w, aborted, IC_CANCEL_ABORT);
    cancel(w, gone, IC_CANCEL_GONE);
    tick(w);
    CHECK(aborted->ended && aborted->end.reason == IC_END_ABORT && !aborted->has_vector);
    CHECK(late->ended && late->end.reason == IC_END_DEADLINE && !late->has_vector);
    run_dry(w);
    CHECK(!gone->has_vector && stays->has_vector);
    world_free(w);
}

static void a_missing_state_ends_the_one_that_needs_it(void **state)
{
    struct world *w = world_new(12, 4, 64, 100, 400);

    (void)state;
    w->f.states_fail = 1024;
    struct client_req *r = submit_embed(w, "abc", IC_POOLING_MEAN),
                      *other = endless(submit_prompt(w, "xyz", 4));
    run_dry(w);
    CHECK(r->code == IC_INTERNAL && r->end.reason == IC_END_ERROR && other->end.stats.tokens == 4);
    world_free(w);
}

/* ---- the sums themselves ------------------------------------------------------------------------------------------- */

static void nothing_and_nonsense_have_no_length(void **state)
{
    float zero[2] = {0, 0}, bad[2] = {1, NAN}, out[2] = {9, 9};
    struct ic_pool p;

    (void)state;
    assert_int_equal(ic_pool_open(&p, IC_POOLING_LAST, 2, 1, NULL), IC_OK);
    ic_pool_add(&p, 0, zero);
    assert_true(ic_pool_result(&p, out) && memcmp(out, zero, sizeof out) == 0);
    ic_pool_deinit(&p);
    assert_int_equal(ic_pool_open(&p, IC_POOLING_MEAN, 2, 1, NULL), IC_OK);
    ic_pool_add(&p, 0, bad);
    assert_false(ic_pool_result(&p, out));
    ic_pool_deinit(&p);
    ic_pool_deinit(&p);
}

static void the_option_names_a_kind(void **state)
{
    enum ic_pooling k;
    struct ic_err err = {0};

    (void)state;
    assert_int_equal(ic_pooling_parse(NULL, &k, &err), IC_OK);
    assert_int_equal(k, IC_POOLING_NONE);
    assert_int_equal(ic_pooling_parse("cls", &k, &err), IC_OK);
    assert_int_equal(k, IC_POOLING_CLS);
    assert_int_equal(ic_pooling_parse("Mean", &k, &err), IC_BAD_REQUEST);
    assert_int_equal(ic_pooling_parse("", &k, &err), IC_BAD_REQUEST);
    assert_non_null(strstr(err.msg, "none, mean, cls or last"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_kind_gives_its_own),
        cmocka_unit_test(beside_others_it_is_the_same),
        cmocka_unit_test(only_what_is_not_wanted_comes_from_the_cache),
        cmocka_unit_test(nobody_waits_for_cells_that_cannot_help),
        cmocka_unit_test(a_preempted_one_goes_on),
        cmocka_unit_test(the_model_may_go_and_come_back),
        cmocka_unit_test(what_cannot_be_is_refused),
        cmocka_unit_test(cancels_and_deadlines_end_it),
        cmocka_unit_test(a_missing_state_ends_the_one_that_needs_it),
        cmocka_unit_test(nothing_and_nonsense_have_no_length),
        cmocka_unit_test(the_option_names_a_kind),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
