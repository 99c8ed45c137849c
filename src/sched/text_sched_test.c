/* The text scheduler over a fake model (fake_backend.h) and a fake clock: thousands of random schedules against an
 * oracle, and one test for each rule that random schedules cannot see.
 *
 * The oracle is the fake model asked alone: whatever happened to a request on its way (slices, preemption, evicted
 * sessions, aborted decodes), its text must be what the model says to its prompt, or a beginning of it. It follows
 * sessions at each END, for requests of one session are served one after the other.
 *
 * IC_SEED=n and IC_ROUNDS=n choose other schedules; a failure prints the seed of its schedule. */
#include "sched/text_world.h"

/* ---- random schedules -------------------------------------------------------------------------------------------- */

static void random_text(struct world *w, char *out, size_t n)
{
    for (size_t i = 0; i < n; i++)
        out[i] = "abcxyz ~"[rnd(w, 8)];
    out[n] = 0;
}

static void random_submit(struct world *w)
{
    static const char *const stops[] = {"ab", "bca", "dd", "\xC3\xA9", "aa a", "c", "ddab"};
    char text[200];
    int session = rnd(w, 3) ? -1 : (int)rnd(w, SESSIONS);
    uint64_t most = rnd(w, 12) ? (uint64_t)w->f.be.ctx_size * 2 / 3 : (uint64_t)w->f.be.ctx_size + 20;
    bool chat = session >= 0 ? (session & 1) ^ !rnd(w, 30) : !rnd(w, 3);
    struct client_req *r;

    if (most > sizeof text - 1)
        most = sizeof text - 1;
    random_text(w, text, rnd(w, rnd(w, 3) ? most / 3 + 1 : most));
    r = ask(w, session, chat ? NULL : text, -1);
    for (uint64_t i = 0; chat && i < 1 + rnd(w, 2); i++) {
        say(r, i ? "user" : "system", text);
        random_text(w, text, rnd(w, most / 3 + 1));
    }
    struct ic_text_params *p = &r->req->params;
    p->seed = (uint32_t)rnd(w, 1 << 20);
    p->max_tokens = rnd(w, 4) ? (int32_t)rnd(w, 12) : rnd(w, 2) ? -1 : 0;
    if (!rnd(w, 4)) { /* one whose text can be guessed */
        p->seed |= FAKE_SINGS;
        p->max_tokens = (int32_t)rnd(w, 80);
    }
    if (session < 0 && !chat && !rnd(w, 4)) /* not the text, its vector is wanted */
        r->req->pooling = (enum ic_pooling)(1 + rnd(w, IC_POOLINGS - 1));
    while (p->n_stop < 3 && rnd(w, 2))
        p->stop[p->n_stop++] = strdup(stops[rnd(w, sizeof stops / sizeof *stops)]);
    r->req->client = session >= 0 ? (uint64_t)session % 3 : rnd(w, 3);
    r->req->priority = rnd(w, 3) ? IC_PRIO_NORMAL : (enum ic_priority)rnd(w, 3);
    if (!rnd(w, 8))
        r->req->deadline_ns = w->f.now + (int64_t)rnd(w, 60000);
    if (!rnd(w, 40))
        cancel(w, r, IC_CANCEL_ABORT); /* before anybody has seen it */
    submit(w, r);
}

static void random_cancel(struct world *w)
{
    struct client_req *r = &w->r[w->n ? rnd(w, (uint64_t)w->n) : 0];

    if (!w->n || r->ended)
        return;
    enum ic_cancel how = (enum ic_cancel)(1 + rnd(w, 3));
    if (how == IC_CANCEL_GONE && r->session >= 0 && r->req->session == w->talk[r->session].handle)
        w->talk[r->session].unknown = true;
    cancel(w, r, how);
}

static struct world *random_world(uint64_t seed)
{
    uint64_t g = fake_mix(seed, 5);
    int32_t parallel = 1 + (int32_t)(fake_random(&g) % 6), ctx = 16 + (int32_t)(fake_random(&g) % 80);
    int32_t batch = parallel + (int32_t)(fake_random(&g) % 24),
            kv = ctx + (int32_t)(fake_random(&g) % (uint64_t)(2 * ctx));
    struct world *w = world_new(seed, parallel, batch, ctx, kv);

    w->f.be.window = rnd(w, 3) ? 0 : rnd(w, 2) ? -1 : (int32_t)rnd(w, 40);
    w->f.be.n_seq = parallel + (int32_t)rnd(w, 7);
    w->f.be.policy.cache_ram = rnd(w, 2) ? 0 : 200 + rnd(w, 20000);
    w->f.be.idle_cells = rnd(w, 2) ? 1024 : (int32_t)rnd(w, 30);
    if (rnd(w, 2)) {
        with_disk(w, 200 + rnd(w, 20000));
        w->disk.ns_per_byte = (int64_t)rnd(w, 20);
        w->disk.full = !rnd(w, 3);
        w->disk.failing = !rnd(w, 3);
        w->disk.corrupt = !rnd(w, 3);
        w->disk.every = 1 + (int)rnd(w, 6);
    }
    world_restart(w);
    w->f.be.policy.no_speculation = rnd(w, 4) == 0;
    if (rnd(w, 2)) {
        fake_with_draft(&w->f, (int)rnd(w, 1001));
        w->f.be.outputs = parallel + (int32_t)rnd(w, 20);
        w->f.draft_unsure = (int)rnd(w, 300);
        w->f.draft_fails = rnd(w, 3) ? 0 : (int)rnd(w, 30);
        w->f.draft_forgets = rnd(w, 2) ? 0 : (int)rnd(w, 300);
    }
    w->f.add_bos = rnd(w, 4) != 0;
    w->f.ns_base = (int64_t)rnd(w, 5000);
    w->f.ns_row = (int64_t)rnd(w, 1000);
    w->f.draft_ns = (int64_t)rnd(w, 2) * w->f.ns_base / 20;
    w->f.draft_read_ns = (int64_t)rnd(w, 100);
    if (rnd(w, 2)) {
        w->f.full = (int)rnd(w, 50);
        w->f.aborted = (int)rnd(w, 100);
        w->f.failed = (int)rnd(w, 20);
        w->f.draw_fails = (int)rnd(w, 10);
        w->f.open_fails = (int)rnd(w, 30);
        w->f.states_fail = (int)rnd(w, 20);
        w->f.tokenize_fails = (int)rnd(w, 30);
        w->f.save_fails = (int)rnd(w, 200);
        w->f.load_fails = (int)rnd(w, 200);
    }
    w->cancels_in_decode = rnd(w, 2) ? 0 : (int)rnd(w, 100);
    return w;
}

static uint64_t proposed, taken,
    drafted; /* tokens, by all schedules; drafted: those taken of a draft model alone */
static int disk_puts, disk_gets;
static uint64_t disk_lost;

static void random_schedule(uint64_t seed)
{
    struct world *w = random_world(seed);
    int steps = 20 + (int)rnd(w, 200), busy = 2 + (int)rnd(w, 6);

    for (int i = 0; i < steps && w->n < REQS - 4; i++) {
        uint64_t what = rnd(w, 20);
        if (what < (uint64_t)busy)
            random_submit(w);
        else if (what == 8)
            random_cancel(w);
        else if (what == 9 && !rnd(w, 3))
            close_session(w, (int)rnd(w, SESSIONS));
        else if (what == 10)
            w->f.now += (int64_t)rnd(w, 20000);
        else if (what == 11)
            ic_text_sched_reap(w->s, NULL); /* a rest between two ticks */
        else if (what == 13)
            tidy(w);
        else if (what == 12 && ic_text_sched_is_parked(w->s))
            reopen(w);
        else if (what == 12 && rnd(w, 3) == 0)
            lose(w, rnd(w, 2));
        else
            tick(w);
    }
    if (rnd(w, 8)) { /* else: the server ends in the middle of it */
        w->f.full = w->f.aborted = w->f.failed = w->f.draw_fails = w->f.open_fails = w->f.tokenize_fails =
            w->f.states_fail = 0;
        w->f.draft_fails = 0;
        w->cancels_in_decode = 0;
        int64_t from = w->ticks;
        run_dry(w);
        CHECK(w->ticks - from <= 40LL * w->n * w->f.be.ctx_size + 100);
        if (rnd(w, 2))
            for (int n = 0; tidy(w); n++)
                CHECK(n < FAKE_SEQS + w->f.be.kv_size / IC_SPILL_MIN);
        if (rnd(w, 2)) {
            for (int i = 0; i < SESSIONS; i++)
                close_session(w, i);
            empty_cache(w);
            CHECK(!tick(w) && fake_cells(&w->f) == 0 && w->c.kv_used == 0 && w->c.sessions == 0);
        }
    }
    proposed += w->c.drafted;
    taken += w->c.accepted;
    if (w->f.be.draft && w->f.be.policy.no_speculation)
        drafted += w->c.accepted;
    disk_puts += w->disk.puts;
    disk_gets += w->disk.gets;
    disk_lost += w->c.disk_lost;
    world_free(w);
}

static void thousands_of_schedules(void **state)
{
    uint64_t from = env_number("IC_SEED", 1), rounds = env_number("IC_ROUNDS", 4000);

    (void)state;
    for (uint64_t i = 0; i < rounds; i++)
        random_schedule(from + i);
    CHECK(rounds < 100 || (taken > 0 && taken < proposed && drafted > 0));
    CHECK(rounds < 1000 || (disk_gets > 0 && disk_puts > disk_gets && disk_lost > 0));
}

/* ---- one rule at a time ------------------------------------------------------------------------------------------- */

static void preemption_loses_nothing(void **state)
{
    struct world *w = world_new(1, 2, 8, 60, 64);
    char text[64];

    (void)state;
    struct client_req *a = endless(submit_prompt(w, letters(text, 10), 30));
    struct client_req *b = endless(submit_prompt(w, letters(text, 8), 30));
    run_dry(w); /* 40 and 38 cells do not fit into 64 at once; the oracle compares the texts */
    CHECK(w->c.preempted > 0);
    CHECK(a->end.reason == IC_END_LENGTH && a->end.stats.tokens == 30);
    CHECK(b->end.reason == IC_END_LENGTH && b->end.stats.tokens == 30);
    world_free(w);
}

static void the_victim_is_the_last_of_the_lowest_priority(void **state)
{
    struct world *w = world_new(2, 3, 16, 64, 64);

    (void)state;
    struct client_req *low = ask(w, -1, "ab", 40), *high = ask(w, -1, "ab", 40);
    low->req->priority = IC_PRIO_LOW;
    high->req->priority = IC_PRIO_HIGH;
    endless(submit(w, low));
    tick(w);
    struct client_req *mid = endless(submit_prompt(w, "ab", 40));
    tick(w);
    endless(submit(w, high));
    while (w->c.preempted == 0)
        CHECK(tick(w));
    CHECK(is_running(w, high) && is_running(w, mid) && !is_running(w, low));
    while (w->c.preempted == 1)
        CHECK(tick(w));
    CHECK(is_running(w, high) && !is_running(w, mid));
    CHECK(w->s->waiting->req == mid->req && w->s->waiting->next->req == low->req); /* normal before low */
    run_dry(w);
    world_free(w);
}

/* A back end that has fewer cells than it said: whoever can go on must, and must not be kept from it by somebody who
 * is admitted and thrown out again for ever. */
static void less_room_than_promised_ends_all_the_same(void **state)
{
    (void)state;
    for (int32_t real = 20; real < 90; real += 3) {
        struct world *w = world_new(3, 3, 16, 48, 100);
        char text[64];
        w->f.cells_real = real;
        for (int i = 0; i < 5; i++)
            endless(submit_prompt(w, letters(text, 10 + i), 20));
        run_dry(w);
        for (int i = 0; i < 5; i++)
            CHECK(w->r[i].end.reason == (real >= 30 + i ? IC_END_LENGTH : IC_END_ERROR));
        world_free(w);
    }
}

static void idle_sessions_lose_their_cells_oldest_first_and_only_for_need(void **state)
{
    struct world *w = world_new(4, 4, 32, 64, 100);
    char text[64];

    (void)state;
    for (int i = 0; i < 3; i++) {
        endless(submit(w, ask(w, i, letters(text, 15), 5))); /* leaves 20 cells: BOS, 15 and 4 decoded */
        run_dry(w);
    }
    submit_prompt(w, letters(text, 9), 20); /* 10, then 30: fits beside the 60 */
    run_dry(w);
    CHECK(held(w, 0) == 20 && held(w, 1) == 20 && held(w, 2) == 20);
    submit_prompt(w, letters(text, 29),
                  0); /* 30, and 11 are free: one has to go, which is who was idle longest */
    run_dry(w);
    CHECK(held(w, 0) == 0 && session(w, 0)->n_tokens == 21);
    CHECK(held(w, 1) == 20 && held(w, 2) == 20);
    struct client_req *again = submit(w, ask(w, 0, "x", 1)); /* computed anew: the oracle compares */
    run_dry(w);
    CHECK(again->end.stats.cached_tokens == 0 && again->end.stats.prompt_tokens == 22);
    world_free(w);
}

static void a_slot_is_taken_from_the_oldest_idle_session(void **state)
{
    struct world *w = world_new(5, 2, 32, 64, 200);
    char text[64];

    (void)state;
    w->f.be.n_seq = 2;
    world_restart(w);
    for (int i = 0; i < 2; i++) {
        submit(w, ask(w, i, letters(text, 8), 3));
        run_dry(w);
    }
    submit(w, ask(w, 0, "y", 3));
    run_dry(w); /* now session 1 is the older one */
    submit_prompt(w, letters(text, 8), 3);
    run_dry(w);
    CHECK(held(w, 0) > 0 && held(w, 1) == 0);
    world_free(w);
}

static void priorities_then_arrival(void **state)
{
    struct world *w = world_new(6, 1, 8, 64, 64);
    static const enum ic_priority prio[] = {IC_PRIO_LOW, IC_PRIO_NORMAL, IC_PRIO_HIGH, IC_PRIO_NORMAL,
                                            IC_PRIO_HIGH};
    static const int want[] = {2, 4, 1, 3, 0};
    struct client_req *r[5];
    int done = 0;

    (void)state;
    struct client_req *first = ask(w, -1, "first", 4);
    first->req->priority = IC_PRIO_HIGH; /* else it would be put back */
    submit(w, first);
    tick(w);
    for (int i = 0; i < 5; i++) {
        r[i] = ask(w, -1, "abc", 2);
        r[i]->req->priority = prio[i];
        submit(w, r[i]);
    }
    while (tick(w)) {
        int ended = 0;
        for (int i = 0; i < 5; i++)
            ended += r[i]->ended;
        CHECK(ended <= done + 1);
        if (ended > done)
            CHECK(first->ended && r[want[done]]->ended);
        done = ended;
    }
    CHECK(done == 5);
    world_free(w);
}

static void nobody_overtakes_but_whose_predecessor_waits_for_its_session(void **state)
{
    struct world *w = world_new(7, 4, 16, 80, 100);
    char text[100];

    (void)state;
    endless(submit(w, ask(w, 0, letters(text, 20), 20)));
    tick(w);
    struct client_req *second =
        submit(w, ask(w, 0, "b", 1)); /* behind its own session: passes are allowed */
    struct client_req *big = submit_prompt(w, letters(text, 75), 1);
    struct client_req *small = submit_prompt(w, "c", 1);
    tick(w);
    CHECK(!is_running(w, second) && !is_running(w, big) && !is_running(w, small));
    CHECK(second->queued && big->queued && small->queued);
    cancel(w, big, IC_CANCEL_ABORT);
    tick(w);
    CHECK(big->ended && is_running(w, small) + small->ended == 1);
    tick(w);
    CHECK(small->ended && !second->ended); /* two ticks for two tokens are all that it needed */
    run_dry(w);
    CHECK(second->end.stats.cached_tokens > 0);
    world_free(w);
}

/* The heart of it: a stream's gap while a long prompt comes in. */
static void a_long_prompt_stretches_gaps_by_a_bounded_factor(void **state)
{
    static const struct {
        int64_t base, row;
    } cost[] = {{1000, 10}, {1000, 100}, {100000, 1}, {20000, 1000}, {100, 100000}};
    char text[1000];

    (void)state;
    for (size_t i = 0; i < sizeof cost / sizeof *cost; i++) {
        struct world *w = world_new(8 + i, 4, 256, 1000, 3000);
        w->f.ns_base = cost[i].base;
        w->f.ns_row = cost[i].row;
        endless(submit_prompt(w, letters(text, 300), 1)); /* teaches what a prompt costs */
        tick(w);
        CHECK(w->f.last_n == 256); /* nobody is disturbed: a whole batch */
        run_dry(w);
        struct client_req *stream = endless(submit_prompt(w, "s", 990)); /* longer than the other is read */
        for (int k = 0; k < 10; k++)
            tick(w);
        struct client_req *late = submit_prompt(w, letters(text, 900), 1);
        int64_t alone = cost[i].base + cost[i].row, most = 0;
        int32_t slice = 0, ticks = 0;
        for (; !late->ended; ticks++) {
            int64_t was = w->f.now;
            int tokens = stream->last_index;
            CHECK(tick(w) && w->f.last_n >= 1 && stream->last_index >= tokens);
            most = w->f.now - was > most ? w->f.now - was : most;
            slice = w->f.last_n - 1 > slice ? w->f.last_n - 1 : slice;
        }
        if (slice > IC_SLICE_MIN) /* below that the prompt would never be read */
            CHECK(most <= IC_GAP_FACTOR * alone + cost[i].row);
        CHECK(slice >= IC_SLICE_MIN && slice <= 255);
        /* And the room is used: by the true price of a row, so that the prompt is read as soon as can be. */
        double ideal = (IC_GAP_AIM * IC_GAP_FACTOR - 1) * (double)alone / (double)cost[i].row;
        ideal = ideal > 255 ? 255 : ideal < IC_SLICE_MIN ? IC_SLICE_MIN : ideal;
        CHECK(ticks <=
              4 + 1.4 * (1 + 1.0 / IC_LOOK_EVERY) * 901 / ideal); /* some to learn it, some to look */
        run_dry(w);
        world_free(w);
    }
}

static void an_unknown_cost_gets_the_smallest_slice(void **state)
{
    struct world *w = world_new(12, 4, 64, 200, 400);
    char text[200];

    (void)state;
    endless(submit_prompt(w, "s", 50));
    tick(w); /* two rows of prompt alone teach a price, decoding has none yet */
    submit_prompt(w, letters(text, 100), 1);
    tick(w);
    CHECK(w->f.last_n <= 3); /* as much as two rows and half as much again, by what is known of two */
    run_dry(w);
    world_free(w);
}

static void a_batch_is_dead_when_all_of_it_are_cancelled(void **state)
{
    struct world *w = world_new(13, 3, 3, 64, 128);
    char text[64];

    (void)state;
    CHECK(!ic_text_sched_batch_is_dead(w->s));
    struct client_req *a = endless(submit_prompt(w, "a", 30)), *b = endless(submit_prompt(w, "b", 30));
    for (int i = 0; i < 6; i++)
        tick(w);
    struct client_req *c = endless(submit_prompt(w, letters(text, 30), 30));
    for (int i = 0; i < 2; i++)
        tick(w);
    cancel(w, a, IC_CANCEL_ABORT);
    cancel(w, b, IC_CANCEL_GONE);
    CHECK(!ic_text_sched_batch_is_dead(w->s)); /* c has a row in it */
    for (int32_t i = 0; i < w->s->n_running; i++)
        if (w->s->order[i]->req == c->req)
            w->s->order[i]->rows = 0; /* as when there is no room for its prompt */
    CHECK(ic_text_sched_batch_is_dead(w->s));
    run_dry(w);
    world_free(w);
}

static void no_tokens_wanted(void **state)
{
    struct world *w = world_new(14, 2, 8, 64, 128);
    char text[64];

    (void)state;
    struct client_req *r = submit_prompt(w, letters(text, 30), 0);
    run_dry(w);
    CHECK(r->end.reason == IC_END_LENGTH && r->end.stats.tokens == 0 && r->end.stats.prompt_tokens == 31);
    CHECK(r->end.stats.ttft_ms <= 0 && r->last_index == -1 && w->f.decoded_rows == 31);
    world_free(w);
}

static void the_context_holds_what_it_says(void **state)
{
    struct world *w = world_new(15, 2, 8, 32, 64);
    char text[64];

    (void)state;
    struct client_req *full =
        endless(submit_prompt(w, letters(text, 30), -1)); /* 31 with BOS: one token fits */
    struct client_req *over = submit_prompt(w, letters(text, 31), -1);
    struct client_req *half = endless(submit_prompt(w, letters(text, 10), -1));
    run_dry(w);
    CHECK(full->end.reason == IC_END_LENGTH && full->end.stats.tokens == 1);
    CHECK(over->code == IC_TOO_LARGE && !over->error_more && over->ended);
    CHECK(strstr(over->err, "32") && strstr(over->err, "31"));
    CHECK(half->end.reason == IC_END_LENGTH && half->end.stats.tokens == 32 - 11);
    CHECK(w->c.refused == 1);
    world_free(w);
}

static void a_full_session_is_refused_even_where_nothing_is_added(void **state)
{
    struct world *w = world_new(16, 2, 8, 32, 64);
    char text[64];

    (void)state;
    endless(submit(w, ask(w, 0, letters(text, 20), -1)));
    run_dry(w);
    CHECK(session(w, 0)->n_tokens == 32);
    struct client_req *nothing = submit(w, ask(w, 0, "~", 4)), *more = submit(w, ask(w, 0, "a", 4));
    run_dry(w);
    CHECK(nothing->code == IC_TOO_LARGE && more->code == IC_TOO_LARGE);
    world_free(w);
}

static void a_conversation_goes_on_from_its_cells(void **state)
{
    struct world *w = world_new(17, 3, 16, 100, 300);

    (void)state;
    endless(submit(w, ask(w, 0, "hello", 7)));
    run_dry(w);
    struct client_req *two = submit(w, ask(w, 0, "again", 1));
    run_dry(w);
    CHECK(two->end.stats.cached_tokens == 1 + 5 + 6 && two->end.stats.prompt_tokens == 1 + 5 + 7 + 5);
    struct client_req *chat = ask(w, 1, NULL, 5);
    say(chat, "user", "hi");
    endless(submit(w, chat));
    run_dry(w);
    struct client_req *next = ask(w, 1, NULL, 5);
    say(next, "user", "yes");
    submit(w, next);
    run_dry(w); /* BOS, role, h, i, end, role: all of the first prompt, its answer is tokenised anew */
    CHECK(next->end.stats.cached_tokens >= 6);
    CHECK(session(w, 1)->n_msgs == 4);
    world_free(w);
}

/* The first of two requests of a session is cancelled in each state; the second must find the session as it was, or
 * as far as it was said. */
static void a_cancelled_request_leaves_its_session_right(void **state)
{
    static const enum ic_cancel how[] = {IC_CANCEL_ABORT, IC_CANCEL_GONE, IC_CANCEL_SHUTDOWN};
    char text[100];

    (void)state;
    for (int at = 0; at < 14; at++)
        for (int h = 0; h < 3; h++)
            for (int rec = 0; rec < 2; rec++) {
                struct world *w = world_new(18, 2, 4, 100, 200);
                w->f.be.window = -rec;
                endless(submit(w, ask(w, 0, "begin", 5)));
                run_dry(w);
                int32_t was = session(w, 0)->n_tokens, past = held(w, 0);
                struct client_req *a = endless(submit(w, ask(w, 0, letters(text, 20), 20)));
                struct client_req *b = submit(w, ask(w, 0, "end", 3));
                for (int i = 0; i < at; i++)
                    tick(w);
                if (how[h] == IC_CANCEL_GONE)
                    w->talk[0].unknown = true;
                cancel(w, a, how[h]);
                int32_t said = a->last_index + 1;
                tick(w);
                run_dry(w);
                CHECK(b->ended && b->end.reason != IC_END_ERROR);
                if (at < 6) { /* 21 tokens, four a tick: nothing said yet */
                    CHECK(b->end.stats.prompt_tokens == was + 3);
                    CHECK(rec || b->end.stats.cached_tokens >= past);
                }
                if (how[h] == IC_CANCEL_SHUTDOWN)
                    CHECK(b->end.stats.prompt_tokens == was + 3); /* an error is not a turn */
                else if (at >= 8)
                    CHECK(b->end.stats.prompt_tokens >= was + 20 + said + 3 && said > 0);
                world_free(w);
            }
}

static void a_refused_request_lets_its_session_go_on(void **state)
{
    struct world *w = world_new(19, 2, 8, 40, 80);
    char text[64];

    (void)state;
    endless(submit(w, ask(w, 0, "one", 3)));
    struct client_req *big = submit(w, ask(w, 0, letters(text, 60), 3)), *kind = ask(w, 0, NULL, 3);
    say(kind, "user", "no messages here");
    submit(w, kind);
    struct client_req *last = submit(w, ask(w, 0, "two", 3));
    run_dry(w);
    CHECK(big->code == IC_TOO_LARGE && kind->code == IC_BAD_REQUEST);
    CHECK(big->queued && big->error_more && big->end.reason == IC_END_ERROR); /* it had been told to wait */
    CHECK(last->end.stats.prompt_tokens == 1 + 3 + 3 + 3);
    world_free(w);
}

static void closing_a_session_ends_all_of_it(void **state)
{
    char text[64];

    (void)state;
    for (int at = 0; at < 10; at++) {
        struct world *w = world_new(20, 2, 4, 64, 128);
        endless(submit(w, ask(w, 0, letters(text, 16), 10)));
        for (int i = 0; i < 3; i++)
            submit(w, ask(w, 0, "b", 2));
        struct client_req *other = endless(submit_prompt(w, "other", 10));
        for (int i = 0; i < at; i++)
            tick(w);
        close_session(w, 0);
        for (int i = 0; i < 4; i++)
            CHECK(w->r[i].end.reason == IC_END_ABORT);
        check_state(w);
        run_dry(w);
        CHECK(other->end.reason == IC_END_LENGTH && w->c.sessions == 0);
        empty_cache(w);
        CHECK(fake_cells(&w->f) == 0);
        world_free(w);
    }
}

static void deadlines_hold_in_the_queue_too(void **state)
{
    struct world *w = world_new(21, 1, 4, 100, 100);
    char text[100];

    (void)state;
    struct client_req *a = ask(w, -1, letters(text, 60), 30), *b = ask(w, -1, "b", 3);
    a->req->deadline_ns = w->f.now + 10 * w->f.ns_base; /* 16 slices of 4: in the middle of its prompt */
    b->req->deadline_ns = w->f.now + 5 * w->f.ns_base;
    submit(w, a);
    submit(w, b);
    while (!b->ended)
        CHECK(tick(w));
    CHECK(b->end.reason == IC_END_DEADLINE && !a->ended && b->last_index < 0);
    CHECK(w->f.now < b->req->deadline_ns + 2 * w->f.ns_base);
    run_dry(w);
    CHECK(a->end.reason == IC_END_DEADLINE && a->end.stats.tokens == 0 && a->end.stats.prompt_tokens == 61);
    world_free(w);
}

static void a_failed_decode_ends_who_was_in_it(void **state)
{
    struct world *w = world_new(22, 3, 8, 64, 128);

    (void)state;
    struct client_req *a = endless(submit_prompt(w, "aa", 20)),
                      *b = endless(submit(w, ask(w, 0, "bb", 20)));
    for (int i = 0; i < 4; i++)
        tick(w);
    w->f.failed = 1024;
    tick(w);
    w->f.failed = 0;
    CHECK(a->ended && b->ended && a->error_more && b->error_more && a->code == IC_INTERNAL);
    struct client_req *c = submit(w, ask(w, 0, "cc", 2));
    run_dry(w);
    CHECK(c->end.stats.prompt_tokens == 3 && c->end.reason != IC_END_ERROR); /* b never happened */
    world_free(w);
}

/* An answer's held back tail leaves with the end-of-generation token, under an index of its own. */
static void what_was_held_back_leaves_at_the_end(void **state)
{
    int seen = 0;

    (void)state;
    for (uint32_t seed = 1; seed < 4000 && !seen; seed += 2) {
        struct world *w = world_new(23, 1, 8, 64, 64);
        struct client_req *r = ask(w, -1, "abc", -1);
        r->req->params.seed = seed;
        r->req->params.stop[0] = strdup("dda"); /* `dd` or `d` at the end is held */
        r->req->params.n_stop = 1;
        submit(w, r);
        run_dry(w);
        seen += r->end.reason == IC_END_STOP && r->text.len && r->text.data[r->text.len - 1] == 'd' &&
                r->last_index == r->end.stats.tokens;
        world_free(w);
    }
    CHECK(seen);
}

static void a_conversation_too_long_to_keep_is_refused_whole(void **state)
{
    struct world *w = world_new(24, 1, 64, 1000, 1000);

    (void)state;
    struct client_req *first = ask(w, 1, NULL, 2);
    say(first, "user", "a");
    endless(submit(w, first));
    run_dry(w);
    CHECK(session(w, 1)->n_msgs == 2);
    struct client_req *r = ask(w, 1, NULL, 2);
    w->unchecked = true;
    for (int i = 0; i < IC_SESSION_MSGS_MAX - 2; i++) /* they fit, the answer would not */
        say(r, "user", "");
    submit(w, r);
    run_dry(w);
    CHECK(r->code == IC_TOO_LARGE && strstr(r->err, "turns") && session(w, 1)->n_msgs == 2);
    world_free(w);
}

static void times_are_those_of_the_clock(void **state)
{
    struct world *w = world_new(25, 1, 8, 64, 64);

    (void)state;
    w->f.ns_base = 2 * IC_MS;
    w->f.ns_row = 0;
    struct client_req *a = endless(submit_prompt(w, "abc", 5)), *b = endless(submit_prompt(w, "abc", 1));
    run_dry(w);
    CHECK(a->end.stats.queue_ms < 0.001 && a->end.stats.ttft_ms > 1.99 && a->end.stats.ttft_ms < 2.01);
    CHECK(a->end.stats.total_ms > 9.99 && a->end.stats.total_ms < 10.01);
    CHECK(a->end.stats.tps > 499 && a->end.stats.tps < 501);
    CHECK(b->end.stats.queue_ms > 9.99 && b->end.stats.ttft_ms > 11.99 && b->end.stats.ttft_ms < 12.01);
    CHECK(w->c.tokens == 6 && w->c.requests == 2 && w->c.prompt_tokens == 8 &&
          w->c.ended[IC_END_LENGTH] == 2);
    world_free(w);
}

static void on_event_tops(void *arg, struct ic_event *ev)
{
    if (ev->kind == IC_EVENT_TOKEN) {
        CHECK(ev->n_top == 3);
        size_t at = ev->len;
        for (int i = 0; i < 3; i++) {
            CHECK(ev->top[i].off == at && ev->top[i].len == strlen(fake_pieces[i]));
            CHECK(!memcmp(ev->text + at, fake_pieces[i], ev->top[i].len));
            at += ev->top[i].len;
        }
        CHECK(ev->text[at] == 0);
    }
    on_event(arg, ev);
}

static void alternatives_travel_behind_the_text(void **state)
{
    struct world *w = world_new(26, 1, 8, 64, 64);

    (void)state;
    w->f.on_event = on_event_tops;
    struct client_req *r = ask(w, -1, "abc", 20);
    r->req->params.logprobs = 3;
    endless(submit(w, r));
    w->unchecked = false;
    run_dry(w);
    CHECK(r->text.len > 0);
    world_free(w);
}

/* What an engine does while it rests: cancels and deadlines are obeyed, and nothing is computed. */
static void a_rest_obeys_cancels_and_deadlines(void **state)
{
    struct world *w = world_new(28, 2, 8, 64, 64);
    struct client_req *r[4];
    int64_t until = INT64_MAX;

    (void)state;
    for (int i = 0; i < 4; i++) { /* two run, two wait */
        r[i] = ask(w, -1, "abc", 20);
        r[i]->req->deadline_ns = i % 2 ? w->f.now + 1000 * w->f.ns_base * (i + 1) : 0;
        endless(submit(w, r[i]));
    }
    for (int i = 0; i < 3; i++)
        tick(w);
    int64_t decodes = w->f.decodes;
    CHECK(ic_text_sched_reap(w->s, &until) && until == r[1]->req->deadline_ns);
    until = 5; /* never raised */
    CHECK(ic_text_sched_reap(w->s, &until) && until == 5);
    cancel(w, r[0], IC_CANCEL_ABORT);
    cancel(w, r[2], IC_CANCEL_ABORT);
    CHECK(ic_text_sched_reap(w->s, NULL) && r[0]->ended && r[2]->ended && !r[1]->ended && !r[3]->ended);
    w->f.now = r[1]->req->deadline_ns;
    until = INT64_MAX;
    CHECK(ic_text_sched_reap(w->s, &until) && r[1]->ended && until == r[3]->req->deadline_ns);
    w->f.now = until;
    CHECK(!ic_text_sched_reap(w->s, NULL) && r[3]->ended && r[3]->end.reason == IC_END_DEADLINE);
    CHECK(w->f.decodes == decodes && !tick(w));
    world_free(w);
}

static void the_end_of_the_server_ends_all(void **state)
{
    struct world *w = world_new(27, 2, 8, 64, 64);

    (void)state;
    for (int i = 0; i < 6; i++)
        endless(submit(w, ask(w, i % 2 ? 0 : -1, "abc", 20)));
    for (int i = 0; i < 3; i++)
        tick(w);
    ic_text_sched_close(&w->s);
    for (int i = 0; i < 6; i++)
        CHECK(w->r[i].ended && w->r[i].error_more && w->r[i].code == IC_UNAVAILABLE &&
              w->r[i].end.reason == IC_END_ERROR);
    world_free(w);
}

static void the_victim_comes_back_first(void **state)
{
    struct world *w = world_new(28, 2, 8, 60, 64);
    char text[64];

    (void)state;
    endless(submit_prompt(w, letters(text, 10), 30));
    struct client_req *b = endless(submit_prompt(w, letters(text, 8), 30));
    tick(w);
    struct client_req *c = endless(submit_prompt(w, "c", 1));
    while (w->c.preempted == 0)
        CHECK(tick(w));
    CHECK(!c->ended && w->s->waiting->req == b->req && w->s->waiting->next->req == c->req);
    run_dry(w);
    world_free(w);
}

/* After a back end has shown itself smaller than it said, who waits joins again as soon as somebody has ended, not
 * only when all have. */
static void a_crowded_house_opens_again(void **state)
{
    struct world *w = world_new(29, 4, 16, 60, 200);
    char text[64];

    (void)state;
    w->f.cells_real = 80;
    endless(submit_prompt(w, letters(text, 10), 45));
    endless(submit_prompt(w, letters(text, 10), 20));
    struct client_req *c = endless(submit_prompt(w, letters(text, 10), 20));
    while (w->c.preempted == 0)
        CHECK(tick(w));
    CHECK(!is_running(w, c));
    w->f.cells_real = 200;
    while (!w->r[1].ended)
        CHECK(tick(w));
    tick(w);
    CHECK(is_running(w, c) && is_running(w, &w->r[0]));
    run_dry(w);
    world_free(w);
}

/* Its own cells are the last that a session's request may cost, be the session idle for ever so long. */
static void a_session_does_not_eat_its_own_cells(void **state)
{
    struct world *w = world_new(30, 3, 32, 64, 70);
    char text[64];

    (void)state;
    endless(submit(w, ask(w, 0, letters(text, 15), 5)));
    run_dry(w);
    endless(submit(w, ask(w, 1, letters(text, 25), 5)));
    run_dry(w);
    struct client_req *r = submit(w, ask(w, 0, letters(text, 30), 1)); /* 31 more; 20 free */
    run_dry(w);
    CHECK(r->end.stats.cached_tokens == 20 && held(w, 1) == 0);
    world_free(w);
}

static void prompts_are_read_in_the_order_of_admission(void **state)
{
    struct world *w = world_new(31, 3, 10, 100, 300);
    char text[100];

    (void)state;
    struct client_req *a = endless(submit_prompt(w, letters(text, 40), 1));
    struct client_req *b = endless(submit_prompt(w, letters(text, 30), 1));
    for (int i = 0; i < 4; i++)
        tick(w);
    CHECK(!a->ended && w->s->slots[1].n_past == 0);
    tick(w); /* the last row of a, and what else fits of b */
    CHECK(a->ended && !b->ended && w->f.last_n > 1);
    run_dry(w);
    world_free(w);
}

/* A stream outgrows what was kept free for it while somebody else's prompt is still being read. */
static void a_prompt_takes_no_more_cells_than_there_are(void **state)
{
    struct world *w = world_new(32, 2, 5, 240, 243);
    char text[240];

    (void)state;
    endless(submit_prompt(w, "abcd", 230));
    tick(w);
    tick(w);
    endless(submit_prompt(w, letters(text, 200), 5));
    tick(w);
    CHECK(w->s->n_running == 2);
    while (w->c.preempted == 0)
        CHECK(tick(w)); /* the fake model asserts that it is never asked for more than it has */
    run_dry(w);
    world_free(w);
}

/* A model that cannot cut forgets all of a session at admission: then all of it has to find room. */
static void what_cannot_be_cut_is_counted_as_gone(void **state)
{
    (void)state;
    for (int recurrent = 0; recurrent < 2; recurrent++) {
        struct world *w = world_new(33, 3, 64, 100, 105);
        char text[64];
        w->f.be.window = -recurrent;
        struct client_req *chat = ask(w, 1, NULL, 20);
        say(chat, "user", "abcdefghijklmnopqrstuvwxyzabcdefghijklmn");
        endless(submit(w, chat));
        run_dry(w);
        endless(submit_prompt(w, letters(text, 8), 30));
        tick(w);
        struct client_req *next =
            ask(w, 1, NULL, 4); /* its answer is tokenised anew: the KV has to be cut there */
        say(next, "user", "x");
        endless(submit(w, next));
        tick(w);
        CHECK(!is_running(w, next)); /* 29 new tokens would fit, all 73 do not */
        run_dry(w);
        CHECK((next->end.stats.cached_tokens == 0) == recurrent && w->c.preempted == 0);
        world_free(w);
    }
}

/* A back end that is full gives an idle session's cells away before anybody is put back into the queue. */
static void idle_sessions_go_before_anybody_is_preempted(void **state)
{
    struct world *w = world_new(34, 3, 32, 64, 200);
    char text[64];

    (void)state;
    submit(w, ask(w, 0, letters(text, 20), 5));
    run_dry(w);
    w->f.cells_real = 60; /* 25 of them idle */
    endless(submit_prompt(w, letters(text, 10), 10));
    endless(submit_prompt(w, letters(text, 10), 10));
    run_dry(w);
    CHECK(w->c.preempted == 0 && held(w, 0) == 0 && w->f.bad_decodes == 1);
    world_free(w);
}

/* An answer that cannot be kept is not kept by half: the conversation is as before it, and the client is told. */
static void without_memory_a_turn_is_forgotten_whole(void **state)
{
    (void)state;
    for (int left = 0; left < 4; left++) {
        struct world *w = world_new(35, 2, 64, 200, 400);
        for (int i = 0; i < 3; i++) {
            struct client_req *r = ask(w, 1, NULL, 4);
            say(r, "user", i ? "more" : "first");
            endless(submit(w, r));
            w->unchecked = i == 1;
            strdups_left =
                i == 1 ? left : -1; /* a question's role and content, an answer's role and content */
            run_dry(w);
            CHECK(r->end.reason == (i == 1 ? IC_END_ERROR : IC_END_LENGTH) &&
                  (i != 1 || r->code == IC_OOM));
            CHECK(session(w, 1)->n_msgs == (i == 2 ? 4 : 2));
        }
        world_free(w);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(preemption_loses_nothing),
        cmocka_unit_test(the_victim_is_the_last_of_the_lowest_priority),
        cmocka_unit_test(less_room_than_promised_ends_all_the_same),
        cmocka_unit_test(idle_sessions_lose_their_cells_oldest_first_and_only_for_need),
        cmocka_unit_test(a_slot_is_taken_from_the_oldest_idle_session),
        cmocka_unit_test(priorities_then_arrival),
        cmocka_unit_test(nobody_overtakes_but_whose_predecessor_waits_for_its_session),
        cmocka_unit_test(a_long_prompt_stretches_gaps_by_a_bounded_factor),
        cmocka_unit_test(an_unknown_cost_gets_the_smallest_slice),
        cmocka_unit_test(a_batch_is_dead_when_all_of_it_are_cancelled),
        cmocka_unit_test(no_tokens_wanted),
        cmocka_unit_test(the_context_holds_what_it_says),
        cmocka_unit_test(a_full_session_is_refused_even_where_nothing_is_added),
        cmocka_unit_test(a_conversation_goes_on_from_its_cells),
        cmocka_unit_test(a_cancelled_request_leaves_its_session_right),
        cmocka_unit_test(a_refused_request_lets_its_session_go_on),
        cmocka_unit_test(closing_a_session_ends_all_of_it),
        cmocka_unit_test(deadlines_hold_in_the_queue_too),
        cmocka_unit_test(a_failed_decode_ends_who_was_in_it),
        cmocka_unit_test(what_was_held_back_leaves_at_the_end),
        cmocka_unit_test(a_conversation_too_long_to_keep_is_refused_whole),
        cmocka_unit_test(times_are_those_of_the_clock),
        cmocka_unit_test(alternatives_travel_behind_the_text),
        cmocka_unit_test(a_rest_obeys_cancels_and_deadlines),
        cmocka_unit_test(the_end_of_the_server_ends_all),
        cmocka_unit_test(the_victim_comes_back_first),
        cmocka_unit_test(a_crowded_house_opens_again),
        cmocka_unit_test(a_session_does_not_eat_its_own_cells),
        cmocka_unit_test(prompts_are_read_in_the_order_of_admission),
        cmocka_unit_test(a_prompt_takes_no_more_cells_than_there_are),
        cmocka_unit_test(what_cannot_be_cut_is_counted_as_gone),
        cmocka_unit_test(idle_sessions_go_before_anybody_is_preempted),
        cmocka_unit_test(without_memory_a_turn_is_forgotten_whole),
        cmocka_unit_test(thousands_of_schedules),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
