/* The model goes and comes back under the text scheduler's hands: by order (idle unload), or because its device is lost.
 * That it happens at any time whatever is in text_sched_test.c's random schedules; here stands what these cannot see. */
#include "sched/text_world.h"

static void a_park_at_any_tick_changes_no_answer(void **state)
{
    char text[64];

    (void)state;
    for (int at = 0; at < 20; at++)
        for (int recurrent = 0; recurrent < 2; recurrent++) {
            struct world *w = world_new(1, 2, 8, 60, 128);
            w->f.be.window = -recurrent;
            struct client_req *a = endless(submit(w, ask(w, 0, letters(text, 20), 12)));
            struct client_req *b = endless(submit_prompt(w, letters(text, 9), 12));
            struct client_req *c = endless(submit_prompt(w, letters(text, 7), 3)); /* waits */
            for (int i = 0; i < at; i++)
                tick(w);
            int64_t events = w->events;
            lose(w, true);
            CHECK(w->events == events && tick(w) == (!a->ended || !b->ended || !c->ended) &&
                  w->events == events);
            reopen(w);
            run_dry(w); /* the oracle compares every text */
            CHECK(a->end.stats.tokens == 12 && b->end.stats.tokens == 12 && c->end.stats.tokens == 3);
            struct client_req *more = submit(w, ask(w, 0, "x", 2));
            run_dry(w);
            CHECK(more->end.stats.prompt_tokens == 21 + 12 + 1);
            world_free(w);
        }
}

/* Who was in the batch that never came back fails; who waits does not. */
static void a_lost_device_fails_its_batch_only(void **state)
{
    struct world *w = world_new(2, 2, 8, 60, 128);
    char text[64];

    (void)state;
    struct client_req *a = endless(submit_prompt(w, "aa", 20)),
                      *b = endless(submit(w, ask(w, 0, "bb", 20)));
    struct client_req *c = endless(submit_prompt(w, letters(text, 9), 20));
    for (int i = 0; i < 4; i++)
        tick(w);
    CHECK(is_running(w, a) && is_running(w, b) && !is_running(w, c));
    lose(w, false);
    CHECK(a->ended && b->ended && a->code == IC_INTERNAL && b->code == IC_INTERNAL && !c->ended);
    lose(w, false);                /* nothing more to lose */
    submit(w, ask(w, 0, "dd", 3)); /* taken while there is no model */
    CHECK(tick(w) && tick(w));
    reopen(w);
    run_dry(w);
    CHECK(c->end.stats.tokens == 20 && w->r[3].end.stats.prompt_tokens == 3); /* b never happened */
    world_free(w);
}

static void cancels_and_deadlines_hold_while_there_is_no_model(void **state)
{
    struct world *w = world_new(3, 2, 8, 60, 128);
    int64_t until = INT64_MAX;

    (void)state;
    struct client_req *a = endless(submit_prompt(w, "aa", 20)), *b = ask(w, 0, "bb", 20);
    b->req->deadline_ns = w->f.now + 100000;
    submit(w, b);
    tick(w);
    lose(w, true);
    struct client_req *c = submit(w, ask(w, 1, "cc", 3));
    cancel(w, a, IC_CANCEL_ABORT);
    close_session(w, 1);
    CHECK(c->end.reason == IC_END_ABORT);
    CHECK(ic_text_sched_reap(w->s, &until) && until == b->req->deadline_ns &&
          a->end.reason == IC_END_ABORT);
    w->f.now = until;
    CHECK(!tick(w) && b->end.reason == IC_END_DEADLINE);
    reopen(w);
    world_free(w);
}

/* After a fallback the model may be smaller. */
static void what_does_not_fit_any_more_ends_with_a_reason(void **state)
{
    struct world *w = world_new(4, 3, 16, 100, 300);
    char text[100];

    (void)state;
    struct client_req *big = endless(submit_prompt(w, letters(text, 80), 10));
    struct client_req *small = endless(submit_prompt(w, letters(text, 20), 10));
    for (int i = 0; i < 4; i++)
        tick(w);
    lose(w, true);
    w->f.be.parallel = w->f.be.n_seq = 1;
    w->f.be.batch = 4;
    w->f.be.ctx_size = w->f.be.kv_size = w->f.cells_real = 50;
    w->unchecked = true; /* big's error is none that the oracle knows */
    reopen(w);
    run_dry(w);
    CHECK(big->code == IC_TOO_LARGE && big->end.reason == IC_END_ERROR);
    CHECK(small->end.reason == IC_END_LENGTH && small->end.stats.tokens == 10);
    world_free(w);
}

/* Nothing of one model is of use to another: neither its KV nor what its tokens were called. */
static void another_model_begins_with_nothing(void **state)
{
    struct world *w = world_new(5, 3, 16, 100, 300);
    const int32_t pinned[] = {1, 2, 3, 4};
    char text[100];

    (void)state;
    w->f.be.policy.cache_ram = 1 << 20;
    lose(w, true);
    reopen(w);
    CHECK(ic_text_sched_pin(w->s, pinned, 4, NULL) == IC_OK);
    struct client_req *a = submit(w, ask(w, 0, letters(text, 40), 3));
    run_dry(w);
    struct client_req *b = endless(submit_prompt(w, letters(text, 20), 50));
    tick(w);
    lose(w, true);
    struct client_req *c = submit(w, ask(w, 0, "c", 3)), *d = submit_prompt(w, letters(text, 40), 3);
    CHECK(a->end.reason == IC_END_LENGTH && w->c.spill_bytes > 0 && w->s->pins);
    w->unchecked = true; /* these errors are none that the oracle knows */
    ic_text_sched_forget_model(w->s);
    CHECK(b->ended && b->code == IC_UNAVAILABLE && w->c.spill_bytes == 0 && !w->s->pins);
    run_dry(w);
    CHECK(c->code == IC_NOT_FOUND && d->end.stats.tokens == 3 && d->end.stats.cached_tokens == 0);
    world_free(w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_park_at_any_tick_changes_no_answer),
        cmocka_unit_test(a_lost_device_fails_its_batch_only),
        cmocka_unit_test(cancels_and_deadlines_hold_while_there_is_no_model),
        cmocka_unit_test(what_does_not_fit_any_more_ends_with_a_reason),
        cmocka_unit_test(another_model_begins_with_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
