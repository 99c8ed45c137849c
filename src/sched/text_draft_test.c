/* A draft model beside the fake one: it pays or is left alone, whatever it is like, and changes no text (the oracle of
 * text_world.h looks at each). Random schedules with it: text_sched_test.c, text_real_test.c. */
#include "sched/text_world.h"

#define NEVER_SLOWER 1.03
#define MUCH 6 /* requests of a long run, one after the other */

/* A stream that cannot be guessed from its own text. */
static struct client_req *talker(struct world *w, int32_t max)
{
    return endless(submit_prompt(w, "abcdefghijklmnopqrstuvwxyz", max));
}

/* ---- the numbers ------------------------------------------------------------------------------------------------ */

static void hits_move_with_evidence_only(void **state)
{
    struct ic_drafter d;
    struct ic_draft_stream r;

    (void)state;
    ic_drafter_init(&d);
    ic_draft_begin(&d, &r);
    double hits = r.hits, sure = r.sure;
    ic_draft_computed(&d, &r, 0, false);
    ic_draft_settle(&d, 1000, 0, 1, 0, 500);
    ic_draft_rest(&r);
    assert_true(r.hits == hits && r.sure == sure && d.hits == hits);
    ic_draft_computed(&d, &r, 3, true);
    assert_true(r.hits == hits && r.sure != sure);
    sure = r.sure;
    ic_draft_checked(&d, &r, true);
    assert_true(r.hits > hits && d.hits > hits && d.hits < r.hits && r.sure == sure);
    hits = r.hits;
    ic_draft_checked(&d, &r, false);
    assert_true(r.hits < hits);
    for (int i = 0; i < 200; i++)
        ic_draft_checked(&d, &r, false);
    assert_true(r.hits < 0.01 && d.hits < 0.01);
    ic_draft_begin(&d, &r); /* the next stream is not as trusting */
    assert_true(r.hits < 0.01);
}

static void rests_grow_until_one_is_right(void **state)
{
    struct ic_drafter d;
    struct ic_draft_stream r;

    (void)state;
    ic_drafter_init(&d);
    ic_draft_begin(&d, &r);
    for (int32_t want = IC_DRAFT_REST_MIN; want < IC_DRAFT_REST_MAX; want *= 2) {
        ic_draft_rest(&r);
        assert_int_equal(r.rest, want);
        ic_draft_checked(&d, &r, false);
    }
    for (int i = 0; i < 3; i++)
        ic_draft_rest(&r);
    assert_int_equal(r.rest, IC_DRAFT_REST_MAX);
    ic_draft_checked(&d, &r, true);
    assert_int_equal(r.rest, IC_DRAFT_REST_MIN);
}

/* A loan, then a share of the time, then what it has brought; never without end. */
static void credit_is_bounded_both_ways(void **state)
{
    struct ic_drafter d;

    (void)state;
    ic_drafter_init(&d);
    assert_true(d.credit == IC_DRAFT_LOAN);
    d.alone_ns = d.value_ns = 1000;
    for (int i = 0; i < 100; i++)
        ic_draft_settle(&d, 1000, 0, 1, 0, 0);
    assert_true(fabs(d.credit - IC_DRAFT_LOAN - 100 * IC_DRAFT_STAKE) < 1e-9);
    d.rows = 2;
    d.kept = 1;
    double before = d.credit;
    ic_draft_settle(&d, 0, 0, 1, 0, 1000);
    assert_true(fabs(d.credit - before) <
                1e-9); /* two rows of half a decode's price, and one token for it */
    for (int i = 0; i < 1000; i++) {
        d.rows = 1;
        ic_draft_settle(&d, 0, 0, 1, 0, 500);
    }
    assert_true(d.credit == -IC_DRAFT_DEBT_MAX);
    for (int i = 0; i < 1000; i++) {
        d.kept = 1;
        ic_draft_settle(&d, 0, 0, 1, 0, 500);
    }
    assert_true(d.credit == IC_DRAFT_CREDIT_MAX);
}

/* ---- in the scheduler ------------------------------------------------------------------------------------------- */

/* The fake time that so many requests take, and what was drafted. */
struct took {
    double ns;
    uint64_t tokens, drafted, accepted;
    int64_t decodes, calls, reads;
};

static int hiccups; /* of 1000 decodes */

/* unsure: of 1000 tokens; step, row, read: prices in percent of a decode. right < 0: without a draft. */
static struct took run_long(int right, int unsure, int step, int row, int read, int streams)
{
    struct world *w = world_new(1, streams, 64, 1000, 4000);
    struct took t;

    w->f.be.policy.no_speculation = true;
    w->f.be.outputs = streams + 40;
    w->f.ns_base = 100000 - 1000 * row;
    w->f.ns_row = 1000 * row;
    if (right >= 0)
        fake_with_draft(&w->f, right);
    w->f.hiccups = hiccups;
    w->f.draft_unsure = unsure;
    w->f.draft_ns = 1000 * step;
    w->f.draft_read_ns = 1000 * read;
    int64_t t0 = w->f.now;
    for (int i = 0; i < MUCH; i++) {
        for (int k = 0; k < streams; k++)
            talker(w, 900);
        run_dry(w);
    }
    t = (struct took){(double)(w->f.now - t0), w->c.tokens,     w->c.drafted, w->c.accepted, w->f.decodes,
                      w->f.draft_calls,        w->f.draft_reads};
    world_free(w);
    return t;
}

static void one_that_is_right_makes_it_quicker(void **state)
{
    struct took without = run_long(-1, 0, 10, 10, 1, 1), with = run_long(1000, 0, 10, 10, 1, 1);

    (void)state;
    assert_int_equal(without.drafted, 0);
    assert_int_equal(with.accepted, with.drafted);
    assert_int_equal(with.tokens, without.tokens);
    assert_true(with.decodes == without.decodes - (int64_t)with.accepted);
    assert_true(with.decodes < without.decodes / 5 && with.ns < without.ns / 2.5);
}

static void one_that_is_right_half_of_the_time_too(void **state)
{
    struct took without = run_long(-1, 0, 5, 10, 1, 1), with = run_long(500, 0, 5, 10, 1, 1);

    (void)state;
    assert_true(with.accepted > with.drafted / 3 && with.accepted < with.drafted * 2 / 3);
    assert_true(with.ns < without.ns * 0.85);
}

/* Wrong, unsure, slow, behind for ever, rows that are dear: never slower by more than a few percent. */
static void one_that_does_not_pay_costs_next_to_nothing(void **state)
{
    static const struct {
        int right, unsure, step, row, read, streams;
    } t[] = {
        {0, 0, 10, 10, 1, 1},      {0, 0, 10, 50, 10, 1},      {1000, 0, 100, 50, 50, 1},
        {1000, 0, 10, 98, 5, 1},   {1000, 1000, 30, 10, 5, 1}, {300, 300, 30, 40, 10, 1},
        {500, 0, 20, 40, 10, 1},   {0, 0, 30, 10, 5, 4},       {200, 0, 100, 20, 50, 4},
        {500, 100, 30, 20, 30, 4}, {700, 0, 30, 40, 5, 1},     {1000, 0, 20, 10, 200, 1},
    };

    (void)state;
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        struct took without = run_long(-1, 0, 0, t[i].row, 0, t[i].streams);
        struct took with = run_long(t[i].right, t[i].unsure, t[i].step, t[i].row, t[i].read, t[i].streams);
        if (with.ns > without.ns * NEVER_SLOWER || getenv("IC_VERBOSE"))
            printf("case %zu: %.4f times as long, %llu of %llu kept, %lld calls, %lld read\n", i,
                   with.ns / without.ns, (unsigned long long)with.accepted,
                   (unsigned long long)with.drafted, (long long)with.calls, (long long)with.reads);
        assert_true(with.ns <= without.ns * NEVER_SLOWER);
        assert_int_equal(with.tokens, without.tokens);
        assert_true(with.calls > 0); /* it has been tried */
    }
}

/* A machine that stutters neither hides what pays nor makes what does not look as if it did. */
static void a_noisy_machine_is_seen_through(void **state)
{
    (void)state;
    hiccups = 5;
    struct took without = run_long(-1, 0, 0, 40, 0, 1), good = run_long(1000, 0, 10, 40, 1, 1);
    struct took bad = run_long(300, 0, 20, 40, 5, 1), dear = run_long(1000, 0, 40, 60, 5, 1);
    hiccups = 0;
    if (getenv("IC_VERBOSE"))
        printf("%.3f %.3f %.3f\n", good.ns / without.ns, bad.ns / without.ns, dear.ns / without.ns);
    assert_true(good.ns < without.ns * 0.85);
    double slack = 0.02; /* other hiccups at other times */
    assert_true(bad.ns < without.ns * (NEVER_SLOWER + slack) &&
                dear.ns < without.ns * (NEVER_SLOWER + slack));
}

/* A stream turns: what did not pay comes back by itself. */
static void what_begins_to_pay_is_found_out(void **state)
{
    struct world *w = world_new(2, 1, 64, 1000, 1000);

    (void)state;
    w->f.be.policy.no_speculation = true;
    fake_with_draft(&w->f, 0);
    w->f.draft_read_ns = 1;
    for (int i = 0; i < 4; i++) {
        talker(w, 900);
        run_dry(w);
    }
    uint64_t before = w->c.accepted;
    CHECK(before == 0 && w->c.drafted < 400);
    w->f.draft_right = 1000;
    for (int i = 0; i < 4; i++) {
        talker(w, 900);
        run_dry(w);
    }
    CHECK(w->c.accepted - before > 1200);
    world_free(w);
}

static void rows_cells_outputs_and_the_context_are_obeyed(void **state)
{
    (void)state;
    for (int32_t room = 2; room < 12; room++) {
        struct world *w = world_new(3, 2, room, 100, 130);
        w->f.be.policy.no_speculation = true;
        w->f.be.outputs = 2 + room / 3; /* the fake model asserts all of them */
        fake_with_draft(&w->f, 900);
        struct client_req *a = endless(submit_prompt(w, "abc", -1)),
                          *b = endless(submit_prompt(w, "xyz", -1));
        run_dry(w);
        CHECK(a->end.reason == IC_END_LENGTH && b->end.reason == IC_END_LENGTH);
        CHECK(room < 4 || w->c.accepted > 0);
        world_free(w);
    }
}

/* A long text is read in pieces, and the streams beside it keep their gaps. */
static void catching_up_is_bounded(void **state)
{
    struct world *w = world_new(4, 3, 256, 1000, 3000);
    char text[801];
    double longest = 0;

    (void)state;
    w->f.be.policy.no_speculation = true;
    w->f.ns_row = 10;
    fake_with_draft(&w->f, 1000);
    w->f.draft_read_ns = 10;
    talker(w, 400);
    talker(w, 400);
    while (w->c.tokens < 100)
        tick(w);
    w->f.draft_read_most = 0;
    endless(submit_prompt(w, letters(text, 800), 150));
    for (bool more = true; more;) {
        int64_t t0 = w->f.now;
        more = tick(w);
        if (w->s->n_running == 3 && (double)(w->f.now - t0) > longest)
            longest = (double)(w->f.now - t0);
    }
    CHECK(w->f.draft_read_most >= IC_DRAFT_READ_MAX / 2);
    CHECK(w->f.draft_read_most <= IC_DRAFT_READ_MAX + IC_DRAFT_NEAR * 3);
    CHECK(w->f.draft_reads > 800 && longest <= 3.3 * (double)(w->f.ns_base + 3 * w->f.ns_row));
    world_free(w);
}

/* Whenever it fails, in whatever part of a call: nobody notices, and it is asked again only when the model has been
 * opened anew. */
static void a_draft_that_fails_fails_nobody(void **state)
{
    (void)state;
    for (int after = 0; after < 12; after++) {
        struct world *w = world_new(5, 2, 64, 512, 1024);
        w->f.be.policy.no_speculation = true;
        fake_with_draft(&w->f, 1000);
        struct client_req *a = talker(w, 300), *b = talker(w, 300);
        while (w->f.draft_calls < after)
            tick(w);
        int64_t calls = w->f.draft_calls;
        w->f.draft_fails = 1024;
        for (int i = 0; i < 20; i++)
            tick(w);
        CHECK(w->f.draft_gone &&
              w->f.draft_calls == calls + 1); /* the fake model asserts that it is left alone */
        CHECK(!a->ended && !b->ended);
        uint64_t drafted = w->c.drafted;
        for (int i = 0; i < 20; i++)
            tick(w);
        CHECK(w->c.drafted == drafted);
        w->f.draft_fails = 0;
        lose(w, true);
        reopen(w);
        run_dry(w);
        CHECK(w->c.drafted > drafted && a->end.stats.tokens == 300 && b->end.stats.tokens == 300);
        CHECK(a->end.reason == IC_END_LENGTH && b->end.reason == IC_END_LENGTH);
        world_free(w);
    }
}

static void the_model_goes_and_comes_back_amid_proposals(void **state)
{
    struct world *w = world_new(6, 2, 64, 512, 1024);

    (void)state;
    w->f.be.policy.no_speculation = true;
    w->f.be.policy.cache_ram = 100000;
    world_restart(w);
    fake_with_draft(&w->f, 800);
    struct client_req *a = talker(w, 400), *b = talker(w, 400);
    for (int i = 0; i < 6; i++) {
        uint64_t drafted = w->c.drafted;
        while (w->c.drafted < drafted + 20)
            CHECK(tick(w));
        lose(w, i % 2 == 0 || !a->ended);
        w->f.be.draft = i == 3 ? NULL : fake_draft; /* it does not always come along */
        reopen(w);
        for (int k = 0; k < 3; k++)
            tick(w);
        w->f.be.draft = fake_draft;
    }
    run_dry(w);
    CHECK(a->end.stats.tokens == 400 && b->end.stats.tokens == 400);
    world_free(w);
}

/* Decodes that stop half-way, clients that go meanwhile. */
static void a_device_that_stumbles_leaves_nothing_behind(void **state)
{
    struct world *w = world_new(7, 3, 64, 512, 1536);

    (void)state;
    w->f.be.policy.no_speculation = true;
    fake_with_draft(&w->f, 700);
    w->f.draft_forgets = 100;
    w->f.aborted = 200;
    w->cancels_in_decode = 3;
    for (int i = 0; i < 12; i++)
        talker(w, 200);
    run_dry(w);
    w->f.aborted = 0;
    CHECK(w->c.drafted > w->c.accepted && w->c.accepted > 0 && w->f.bad_decodes > 0);
    empty_cache(w);
    CHECK(fake_cells(&w->f) == 0);
    world_free(w);
}

/* With both, what repeats itself is looked up, which costs nothing, and the draft is left what does not. */
static void good_lookups_go_first(void **state)
{
    int64_t calls[2], decodes[2];

    (void)state;
    for (int both = 0; both < 2; both++) {
        struct world *w = world_new(8, 1, 64, 1000, 1000);
        w->f.be.policy.no_speculation = !both;
        fake_with_draft(&w->f, 600);
        struct client_req *r = ask(w, -1, "abc", 900);
        r->req->params.seed = FAKE_SINGS;
        submit(w, r);
        run_dry(w);
        calls[both] = w->f.draft_calls;
        decodes[both] = w->f.decodes;
        world_free(w);
    }
    CHECK(calls[1] > 0 && calls[1] < calls[0] / 2 && decodes[1] < decodes[0]);
}

static void a_memory_that_cannot_be_cut_gets_none(void **state)
{
    struct world *w = world_new(9, 2, 64, 512, 512);

    (void)state;
    w->f.be.window = -1;
    world_restart(w);
    fake_with_draft(&w->f, 1000);
    talker(w, 200);
    run_dry(w);
    CHECK(w->c.drafted == 0 && w->f.draft_calls == 0);
    world_free(w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(hits_move_with_evidence_only),
        cmocka_unit_test(rests_grow_until_one_is_right),
        cmocka_unit_test(credit_is_bounded_both_ways),
        cmocka_unit_test(one_that_is_right_makes_it_quicker),
        cmocka_unit_test(one_that_is_right_half_of_the_time_too),
        cmocka_unit_test(one_that_does_not_pay_costs_next_to_nothing),
        cmocka_unit_test(a_noisy_machine_is_seen_through),
        cmocka_unit_test(what_begins_to_pay_is_found_out),
        cmocka_unit_test(rows_cells_outputs_and_the_context_are_obeyed),
        cmocka_unit_test(catching_up_is_bounded),
        cmocka_unit_test(a_draft_that_fails_fails_nobody),
        cmocka_unit_test(the_model_goes_and_comes_back_amid_proposals),
        cmocka_unit_test(a_device_that_stumbles_leaves_nothing_behind),
        cmocka_unit_test(good_lookups_go_first),
        cmocka_unit_test(a_memory_that_cannot_be_cut_gets_none),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
