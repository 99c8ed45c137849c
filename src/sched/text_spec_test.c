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

static void what_agrees_longest_goes_before_what_is_later(void **state)
{
    const int32_t t[] = {9, 1, 2, 3, 4, 8, 1, 2, 3, 5, 9, 1, 2, 3};
    struct ic_spec g;

    (void)state;
    ic_spec_init(&g);
    ic_spec_note(&g, t, 14);
    assert_int_equal(t[g.at], 4);
    assert_int_equal(g.agree, 4);
}

/* Every token tells, proposed or not; and what has agreed for long tells nothing of what has just begun to. */
static void hits_are_counted_without_proposing(void **state)
{
    int32_t t[96];
    struct ic_spec g;

    (void)state;
    ic_spec_init(&g);
    for (int32_t n = 1; n <= 60; n++) {
        t[n - 1] = n % 5;
        ic_spec_note(&g, t, n);
    }
    assert_true(g.agree == IC_SPEC_AGREE_MAX && ic_spec_chance(&g, 0) > 0.98);
    double before = g.hits[0];
    for (int32_t n = 61; n <= 70; n++) {
        t[n - 1] = n * 7;
        ic_spec_note(&g, t, n);
    }
    assert_true(g.at < 0 && ic_spec_chance(&g, 0) == 0);
    assert_true(g.hits[3] < 0.76 && g.hits[0] == before); /* one miss, then no guess that could be wrong */
}

#define SIZES 64

/* Rows one by one at `row`, up to `block`; all up to SIZES at the price of one more beyond. */
static struct ic_text_cost price_list(double base, double row, int32_t block)
{
    struct ic_text_cost c = {0};

    for (int32_t n = 1; n <= SIZES; n++)
        ic_text_cost_learn(&c, base + row * (n < block ? n : block), n);
    return c;
}

static int32_t count(double hits, const struct ic_text_cost *c, int32_t rows, double limit)
{
    struct ic_spec g = {.at = 1, .agree = 3, .hits = {hits, hits, hits, hits}};
    struct ic_spec_tick t = {
        .cost = c, .rows = rows, .useful = rows, .ns = ic_text_cost_of(c, rows), .limit_ns = limit};
    double before = t.useful / (t.ns > 0 ? t.ns : 1), hope = 1;
    int32_t k = ic_spec_count(&g, &t, &hope, IC_SPEC_MAX);

    assert_true(t.rows == rows + k && (k > 0) == (t.useful / (t.ns > 0 ? t.ns : 1) > before) &&
                t.ns <= limit);
    return k;
}

static void proposes_what_is_worth_its_price(void **state)
{
    struct ic_text_cost gpu = price_list(1000, 1, SIZES), dear = price_list(0, 1000, SIZES),
                        half = price_list(500, 500, SIZES), none = {0};

    (void)state;
    assert_int_equal(count(1, &gpu, 1, 1e9), IC_SPEC_MAX); /* rows cost next to nothing */
    assert_int_equal(count(1, &dear, 1, 1e9), 0);          /* a row costs what a decode costs */
    assert_int_equal(count(0.5, &half, 1, 1e9), 0);        /* too often wrong */
    assert_int_equal(count(1, &none, 1, 1e9), 0);          /* nothing is known */
    int32_t some = count(0.95, &half, 1, 1e9);
    assert_in_range(some, 2, 8);
    assert_int_equal(count(0.95, &half, 1, 2100), 2); /* the gap's bound */
    assert_true(count(0.95, &half, 8, 1e9) < some);   /* rows of other streams are sure */
}

/* A CPU's kernels: up to seven rows cost by the row, eight and more together no more than those. */
static void many_may_pay_where_few_do_not(void **state)
{
    struct ic_text_cost cpu = price_list(0, 1000, 7);

    (void)state;
    assert_int_equal(count(1, &cpu, 1, 1e9), IC_SPEC_MAX);
    assert_in_range(count(0.95, &cpu, 1, 1e9), 8, IC_SPEC_MAX);
    assert_int_equal(count(0.7, &cpu, 1, 1e9), 0);
    assert_int_equal(count(1, &cpu, 1, 6500), 0); /* too long a gap, and fewer do not pay */
}

/* What nobody has tried is taken to lie between what has been seen: a prompt's price invites a try. */
static void an_unknown_price_is_tried(void **state)
{
    struct ic_text_cost c = {0};

    (void)state;
    ic_text_cost_learn(&c, 1000, 1);
    ic_text_cost_learn(&c, 1000 + 199 * 300, 200);
    assert_in_range(count(0.97, &c, 1, 1e9), 8, IC_SPEC_MAX);
    assert_int_equal(count(0.3, &c, 1, 1e9), 0);
    for (int32_t n = 2; n <= 1 + IC_SPEC_MAX; n++)
        ic_text_cost_learn(&c, 1000 * n, n);
    assert_int_equal(count(0.97, &c, 1, 1e9), 0); /* now it is known better */
}

static void a_price_that_forbids_everything_is_tried_again(void **state)
{
    struct ic_text_cost c = price_list(0, 1300, SIZES);
    double hope = 1;
    int32_t n = 0;

    (void)state;
    c.ns[1] = 1000;
    for (int sure = 0; sure < 2; sure++) {
        struct ic_spec g = {.at = 1, .agree = 3, .hits = {0.7, 0.7, 0.7, 0.7}};
        for (int i = 0; sure && i < IC_SPEC_LEVELS; i++)
            g.hits[i] = 1;
        for (n = 0, hope = 1; n < 1000; n++) {
            struct ic_spec_tick t = {.cost = &c, .rows = 1, .useful = 1, .ns = 1000, .limit_ns = 1e9};
            if (ic_spec_count(&g, &t, &hope, 24))
                break;
        }
        if (sure)
            assert_in_range(n, 20, 500);
        else
            assert_int_equal(n, 1000); /* it would cost too much to find out */
    }
    assert_true(hope == 1);
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
        CHECK(r->end.reason == IC_END_LENGTH &&
              w->f.decoded_rows > 0); /* the fake model asserts the rest */
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
        cmocka_unit_test(what_agrees_longest_goes_before_what_is_later),
        cmocka_unit_test(hits_are_counted_without_proposing),
        cmocka_unit_test(proposes_what_is_worth_its_price),
        cmocka_unit_test(many_may_pay_where_few_do_not),
        cmocka_unit_test(an_unknown_price_is_tried),
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
