/* Guesses, their price, and what the scheduler makes of them. That they change no text whatever else happens is the random
 * schedules' to show (text_sched_test.c). */
#include "sched/text_world.h"

static void guesses_what_stood_behind_it_before(void **state)
{
    const int32_t t[] = {1, 2, 3, 4, 5, 6, 7, 1, 2, 3};
    int32_t out[12], n = 10;
    struct ic_spec g;

    (void)state;
    ic_spec_init(&g);
    assert_int_equal(ic_spec_guess(&g, t, n, out, 4), 0);
    ic_spec_note(&g, t, 9); /* 7 1 2: never before */
    assert_int_equal(g.at, -1);
    ic_spec_note(&g, t, n);
    assert_int_equal(g.at, 3);
    assert_int_equal(ic_spec_guess(&g, t, n, out, 12), 12);
    const int32_t want[] = {4, 5, 6, 7, 1, 2, 3, 4, 5, 6, 7, 1}; /* and round again */
    assert_memory_equal(out, want, sizeof want);
}

static void the_latest_of_several_is_taken(void **state)
{
    const int32_t t[] = {1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3};
    struct ic_spec g;

    (void)state;
    ic_spec_init(&g);
    ic_spec_note(&g, t, 11);
    assert_int_equal(t[g.at], 5);
}

static void looks_back_so_far_and_no_farther(void **state)
{
    static int32_t t[IC_SPEC_REACH + 100];
    struct ic_spec g;
    int32_t n = IC_SPEC_REACH + 100;

    (void)state;
    for (int32_t i = 0; i < n; i++)
        t[i] = 1000 + i;
    for (int far = 0; far < 2; far++) {
        int32_t at = far ? 99 : 100;
        memcpy(&t[at], &t[n - 3], 3 * sizeof *t);
        ic_spec_init(&g);
        ic_spec_note(&g, t, n);
        assert_int_equal(g.at, far ? -1 : at + 3);
        t[at] = 0;
    }
}

/* Every token tells, proposed or not. */
static void hits_are_counted_without_proposing(void **state)
{
    int32_t t[64];
    struct ic_spec g;

    (void)state;
    ic_spec_init(&g);
    for (int32_t n = 1; n <= 40; n++) {
        t[n - 1] = n % 5;
        ic_spec_note(&g, t, n);
    }
    assert_true(g.hits > 0.95);
    for (int32_t n = 41; n <= 50; n++) {
        t[n - 1] = n * 7;
        ic_spec_note(&g, t, n);
    }
    assert_true(g.at < 0 && g.hits < 0.76); /* one miss, then no guess that could be wrong */
}

static int32_t count(double hits, double price, double rows, double ns, double limit)
{
    struct ic_spec g = {.at = 1, .hits = hits};
    struct ic_spec_cost c = {.row_ns = price};
    struct ic_spec_tick t = {.rows = rows, .ns = ns, .limit_ns = limit, .alone_ns = 1000};
    return ic_spec_count(&g, &c, &t, IC_SPEC_MAX);
}

static void proposes_what_is_worth_its_price(void **state)
{
    (void)state;
    assert_int_equal(count(1, 1, 1, 1000, 1e9), IC_SPEC_MAX); /* a GPU: rows cost next to nothing */
    assert_int_equal(count(1, 1000, 1, 1000, 1e9), 0);        /* a row costs what a decode costs */
    assert_int_equal(count(0.5, 560, 1, 1000, 1e9), 0);       /* too often wrong */
    assert_int_equal(count(0.3, 0, 1, 1000, 1e9), 0);         /* nothing is known: not on such a chance */
    assert_true(count(0.9, 0, 1, 1000, 1e9) > 0);
    int32_t some = count(0.95, 500, 1, 1000, 1e9);
    assert_in_range(some, 2, 8);
    assert_int_equal(count(0.95, 500, 1, 1000, 2100), 2); /* the gap's bound */
    assert_true(count(0.95, 500, 8, 4500, 1e9) < some);  /* rows of other streams are sure */
}

static void a_price_that_forbids_everything_is_tried_again(void **state)
{
    struct ic_spec g = {.at = 1, .hits = 0.9};
    struct ic_spec_cost c = {0};
    int32_t n = 0;

    (void)state;
    ic_spec_learn(&c, 400, 2);
    ic_spec_learn(&c, 4e9, 2); /* the machine was elsewhere */
    assert_true(c.row_ns < 400);
    for (int i = 0; i < 10; i++)
        ic_spec_learn(&c, 4e9, 2);
    for (; n < 10000; n++) {
        struct ic_spec_tick t = {.rows = 1, .ns = 1000, .limit_ns = 1e9, .alone_ns = 1000};
        if (ic_spec_count(&g, &c, &t, 4))
            break;
    }
    assert_in_range(n, 50, 9999);
}

static struct client_req *singer(struct world *w, int32_t max)
{
    struct client_req *r = ask(w, -1, "abc", max);
    r->req->params.seed = FAKE_SINGS;
    return submit(w, r);
}

/* The same text in fewer decodes, to the very token that was asked for; off: a decode for each. */
static void a_text_that_repeats_itself_takes_fewer_decodes(void **state)
{
    int64_t decodes[2];

    (void)state;
    for (int off = 0; off < 2; off++) {
        struct world *w = world_new(1, 2, 64, 512, 512);
        w->f.be.policy.no_speculation = off;
        world_restart(w);
        struct client_req *r = singer(w, 200);
        run_dry(w);
        CHECK(r->end.stats.tokens == 200);
        decodes[off] = w->f.decodes;
        CHECK(off ? w->c.drafted == 0 : w->c.accepted > 60 && w->c.accepted <= w->c.drafted);
        CHECK(off || w->f.decodes == 1 + 199 - (int64_t)w->c.accepted);
        world_free(w);
    }
    CHECK(decodes[0] < decodes[1] * 2 / 3);
}

static void a_text_that_does_not_proposes_next_to_nothing(void **state)
{
    struct world *w = world_new(2, 2, 64, 512, 512);

    (void)state;
    w->f.ns_row = w->f.ns_base / 2;
    endless(submit_prompt(w, "abc", 400));
    run_dry(w);
    CHECK(w->c.drafted <= 4);
    world_free(w);
}

/* Rows, cells and the context are bounded for them too. */
static void never_beyond_what_there_is(void **state)
{
    (void)state;
    for (int32_t room = 1; room < 12; room++) {
        struct world *w = world_new(3, 1, room, 100, 100);
        w->f.be.outputs = 1 + room / 3; /* asserted as well */
        struct client_req *r = singer(w, -1);
        run_dry(w);
        CHECK(r->end.reason == IC_END_LENGTH && w->f.decoded_rows > 0); /* the fake model asserts the rest */
        CHECK(room < 3 || w->c.accepted > 0);
        world_free(w);
    }
}

/* Two that could be guessed and one that cannot: nobody's gap grows beyond three times. */
static void with_others_there_the_bound_of_a_gap_holds(void **state)
{
    struct world *w = world_new(4, 3, 64, 512, 1536);
    int32_t most = 0;

    (void)state;
    w->f.ns_base = 1000;
    w->f.ns_row = 100;
    singer(w, 150);
    singer(w, 150);
    endless(submit_prompt(w, "xyz", 150));
    while (tick(w))
        if (w->s->n_running == 3 && w->c.tokens > 30 && w->f.last_n > most)
            most = w->f.last_n;
    CHECK(w->c.accepted > 0 && most > 3 && 1000 + 100 * most <= 3 * (1000 + 300) + 200);
    world_free(w);
}

/* What is thrown away leaves nothing behind, and a device that fails amid proposals neither. */
static void wrong_ones_leave_no_cells(void **state)
{
    struct world *w = world_new(5, 2, 64, 512, 512);

    (void)state;
    struct client_req *r = singer(w, 300);
    w->f.aborted = 200;
    run_dry(w);
    w->f.aborted = 0;
    CHECK(r->end.stats.tokens == 300 && w->c.drafted > w->c.accepted && w->f.bad_decodes > 0);
    empty_cache(w);
    CHECK(fake_cells(&w->f) == 0);
    world_free(w);
}

static void a_memory_that_cannot_be_cut_gets_none(void **state)
{
    struct world *w = world_new(6, 2, 64, 512, 512);

    (void)state;
    w->f.be.window = -1;
    world_restart(w);
    singer(w, 200);
    run_dry(w);
    CHECK(w->c.drafted == 0);
    world_free(w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(guesses_what_stood_behind_it_before),
        cmocka_unit_test(the_latest_of_several_is_taken),
        cmocka_unit_test(looks_back_so_far_and_no_farther),
        cmocka_unit_test(hits_are_counted_without_proposing),
        cmocka_unit_test(proposes_what_is_worth_its_price),
        cmocka_unit_test(a_price_that_forbids_everything_is_tried_again),
        cmocka_unit_test(a_text_that_repeats_itself_takes_fewer_decodes),
        cmocka_unit_test(a_text_that_does_not_proposes_next_to_nothing),
        cmocka_unit_test(never_beyond_what_there_is),
        cmocka_unit_test(with_others_there_the_bound_of_a_gap_holds),
        cmocka_unit_test(wrong_ones_leave_no_cells),
        cmocka_unit_test(a_memory_that_cannot_be_cut_gets_none),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
