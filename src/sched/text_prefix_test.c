/* What clients share: cells of prompts that begin alike, host memory, and turns. Over the fake model, as text_sched_test.c,
 * whose random schedules hold the books against the model's own after every tick. */
#include "sched/text_world.h"

#define PREFIX 60

static char *with_prefix(char *out, const char *prefix, int n)
{
    sprintf(out, "%s%c%d question", prefix, 'A' + n, n);
    return out;
}

/* Sixteen at once: what they have in common is computed by one of them, and is there once. */
static void a_common_prefix_is_computed_once(void **state)
{
    for (int late = 0; late < 40;
         late += 3) { /* the others come when the first is in the middle of it, or through */
        struct world *w = world_new(1, 16, 32, 200, 1000);
        char prefix[PREFIX + 1], text[120];
        int64_t rows = 0;
        (void)state;
        letters(prefix, PREFIX);
        for (int i = 0; i < 16; i++) {
            endless(submit_prompt(w, with_prefix(text, prefix, i), 8));
            rows += (int64_t)strlen(text) - PREFIX + 8 -
                    1; /* of each its own; the last token said is not computed */
            for (int k = 0; i == 0 && k < late / 3; k++)
                tick(w);
        }
        while (w->c.tokens < 16)
            CHECK(tick(w));
        CHECK(fake_cells(&w->f) <= 1 + PREFIX + 16 * 30);
        run_dry(w);
        CHECK(w->f.decoded_rows == 1 + PREFIX + rows + (int64_t)(w->c.drafted - w->c.accepted));
        for (int i = 0; i < 16; i++)
            CHECK(w->r[i].end.stats.tokens == 8 && w->r[i].end.stats.cached_tokens == (i ? 1 + PREFIX : 0));
        world_free(w);
    }
}

/* Who reads for the others goes away: one of them reads on from where it was. */
static void the_one_that_computes_may_go(void **state)
{
    (void)state;
    for (int at = 1; at < 5; at++) {
        struct world *w = world_new(2, 4, 16, 200, 1000);
        char prefix[PREFIX + 1], text[120];
        int64_t rows = 1 + PREFIX;
        letters(prefix, PREFIX);
        for (int i = 0; i < 4; i++) {
            endless(submit_prompt(w, with_prefix(text, prefix, i), 2));
            rows += i ? (int64_t)strlen(text) - PREFIX + 1 : 0;
        }
        for (int i = 0; i < at; i++)
            tick(w);
        cancel(w, &w->r[0], IC_CANCEL_ABORT);
        run_dry(w);
        CHECK(w->f.decoded_rows >= rows && w->f.decoded_rows <= rows + 11 + 1);
        for (int i = 1; i < 4; i++)
            CHECK(w->r[i].end.stats.tokens == 2);
        world_free(w);
    }
}

static void key_spaces_see_nothing_of_each_other(void **state)
{
    struct world *w = world_new(3, 4, 32, 200, 1000);
    char text[100];
    struct client_req *r[4];
    static const char *const salts[] = {"", "tenant", "tenant", ""};

    (void)state;
    letters(text, 80);
    for (int i = 0; i < 4; i++) {
        r[i] = endless(ask(w, -1, text, 3));
        strcpy(r[i]->req->salt, salts[i]);
        submit(w, r[i]);
        if (i < 3) /* the last one runs beside the third and may not share with it either */
            run_dry(w);
    }
    run_dry(w);
    CHECK(r[0]->end.stats.cached_tokens == 0 && r[1]->end.stats.cached_tokens == 0);
    CHECK(r[2]->end.stats.cached_tokens == 80 && r[3]->end.stats.cached_tokens == 80);
    world_free(w);
}

static void a_pinned_prefix_is_there_for_all_and_for_good(void **state)
{
    struct world *w = world_new(4, 2, 32, 100, 200);
    char prefix[PREFIX + 1], text[120];
    int32_t tokens[PREFIX + 1];
    struct ic_err err = {0};

    (void)state;
    letters(prefix, PREFIX);
    int32_t n = fake_tokens(&w->f, prefix, PREFIX, true, tokens);
    CHECK(ic_text_sched_pin(w->s, tokens, n, &err) == IC_OK && w->f.decoded_rows == n);
    CHECK(ic_text_sched_pin(w->s, tokens, n, &err) == IC_TOO_LARGE &&
          strstr(err.msg, "kv-size")); /* twice is too much */
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 6; i++) { /* others that need every cell */
            endless(submit_prompt(w, letters(text, 60), 30));
            run_dry(w);
        }
        struct client_req *r = endless(ask(w, -1, with_prefix(text, prefix, round), 3));
        strcpy(r->req->salt, round == 1 ? "anybody" : "");
        submit(w, r);
        run_dry(w);
        CHECK(r->end.stats.cached_tokens == n);
        if (round == 1) {
            lose(w, round & 1);
            reopen(w); /* it is computed again */
        }
    }
    /* What tenants put behind it stays theirs. */
    struct client_req *other = endless(ask(w, -1, with_prefix(text, prefix, 1), 3));
    strcpy(other->req->salt, "else");
    submit(w, other);
    run_dry(w);
    CHECK(other->end.stats.cached_tokens == n);
    world_free(w);
}

/* A session that had to leave comes back from host memory, at no decode's cost, and the bound of that memory holds. */
static void host_memory_keeps_what_the_cache_cannot(void **state)
{
    (void)state;
    for (int window = -1; window <= 20; window += 7) { /* -1, 6, 13, 20: whole sequences only */
        for (int ram = 0; ram < 2; ram++) {
            struct world *w = world_new(5, 2, 64, 100, 110);
            char text[100];
            w->f.be.window = window == 20 ? 0 : window;
            w->f.be.policy.cache_ram = ram ? 1 << 20 : 0;
            world_restart(w);
            for (int i = 0; i < 4; i++) {
                endless(submit(w, ask(w, i, letters(text, 50), 5)));
                run_dry(w);
            }
            CHECK((w->f.saves > 0) == ram && w->c.spill_bytes == (int64_t)w->s->spill.sum);
            int64_t rows = w->f.decoded_rows;
            struct client_req *r = endless(submit(w, ask(w, 0, "more", 2)));
            run_dry(w);
            CHECK(r->end.stats.cached_tokens == (ram ? 55 : 0)); /* BOS, 50, and 4 of the 5 said */
            CHECK(w->f.decoded_rows - rows == r->end.stats.prompt_tokens - r->end.stats.cached_tokens + 1);
            world_free(w);
        }
    }
}

static void host_memory_drops_the_oldest(void **state)
{
    struct world *w = world_new(6, 2, 64, 100, 110);
    char text[100];

    (void)state;
    w->f.be.policy.cache_ram = 2600; /* two of them and a half */
    world_restart(w);
    for (int i = 0; i < 5; i++) {
        endless(submit(w, ask(w, i, letters(text, 50), 5)));
        run_dry(w);
        check_state(w);
    }
    CHECK(w->s->spill.count == 2 && w->s->spill.sum <= 2600);
    struct client_req *r = submit(w, ask(w, 3, "x", 1));
    run_dry(w);
    CHECK(r->end.stats.cached_tokens > 0);
    r = submit(w, ask(w, 0, "x", 1));
    run_dry(w);
    CHECK(r->end.stats.cached_tokens == 0);
    world_free(w);
}

/* What neither the cache nor host memory can keep comes back from the disk at no decode's cost; from one that is full, or that
 * loses what it was given, nothing does, and nobody notices but by the time it takes. */
static void a_disk_keeps_what_host_memory_cannot(void **state)
{
    enum { WELL, FULL, FAILING, CORRUPT, KINDS };

    (void)state;
    for (int kind = 0; kind < KINDS; kind++)
        for (int recurrent = 0; recurrent < 2; recurrent++) {
            struct world *w = world_new(15, 2, 64, 100, 110);
            char text[100];
            w->f.be.window = -recurrent;
            w->f.be.policy.cache_ram = 2600; /* two and a half, without the others' tokens */
            w->f.ns_row = 100;               /* dearer than the first guess of what reading costs */
            with_disk(w, 1 << 20);
            w->disk.full = kind == FULL;
            w->disk.failing = kind == FAILING;
            w->disk.corrupt = kind == CORRUPT;
            world_restart(w);
            for (int i = 0; i < 5; i++) {
                endless(submit(w, ask(w, i, letters(text, 50), 5)));
                run_dry(w);
                check_state(w);
            }
            CHECK((w->disk.puts > 0) == (kind != FULL) && (kind != WELL || w->c.disk_bytes > 0));
            struct client_req *r = endless(submit(w, ask(w, 0, "more", 2)));
            run_dry(w); /* the oracle compares the text */
            CHECK(r->end.stats.cached_tokens == (kind == WELL ? 55 : 0));
            CHECK((w->c.disk_got > 0) == (kind == WELL) &&
                  (w->c.disk_lost > 0) == (kind == FAILING || kind == CORRUPT));
            world_free(w);
        }
}

/* A disk that was slow once is not waited for again, until it has been left alone for a while. */
static void a_slow_disk_is_not_asked_again_soon(void **state)
{
    struct world *w = world_new(16, 2, 64, 100, 110);
    char text[100];
    int gets[60];

    (void)state;
    w->f.be.policy.cache_ram = 2600;
    w->f.ns_row = 100;
    with_disk(w, 1 << 20);
    w->disk.ns_per_byte = 1000;
    world_restart(w);
    for (int i = 0; i < 60; i++) {
        endless(submit(w, ask(w, i % 6, i < 6 ? letters(text, 50) : "m", 1)));
        run_dry(w);
        gets[i] = w->disk.gets;
    }
    CHECK(gets[59] >= 1 && gets[16] <= 1 && gets[59] < 20);
    world_free(w);
}

/* Copying back is slower than computing: then it is computed. */
static void what_is_dearer_to_restore_is_computed(void **state)
{
    struct world *w = world_new(7, 2, 64, 100, 110);
    char text[100];

    (void)state;
    w->f.be.policy.cache_ram = 1 << 20;
    w->f.ns_base = 0;
    w->f.ns_row = 1; /* a token for a nanosecond */
    world_restart(w);
    for (int i = 0; i < 4; i++) {
        endless(submit(w, ask(w, i, letters(text, 50), 5)));
        run_dry(w);
    }
    struct client_req *r = submit(w, ask(w, 0, "x", 1));
    run_dry(w);
    CHECK(w->f.saves > 0 && w->f.loads == 0 && r->end.stats.cached_tokens == 0);
    world_free(w);
}

/* The part that many begin with is used by each of them, so it outlives their ends. */
static void ends_go_before_beginnings(void **state)
{
    struct world *w = world_new(8, 2, 64, 120, 200);
    char prefix[PREFIX + 1], text[120];

    (void)state;
    letters(prefix, PREFIX);
    for (int i = 0; i < 4; i++) {
        endless(submit_prompt(w, with_prefix(text, prefix, i), 10));
        run_dry(w);
    }
    endless(submit_prompt(w, letters(text, 90), 10)); /* needs most of the cells */
    run_dry(w);
    struct client_req *r = submit_prompt(w, with_prefix(text, prefix, 9), 1);
    run_dry(w);
    CHECK(r->end.stats.cached_tokens == 1 + PREFIX);
    world_free(w);
}

static void one_of_many_starts_after_at_most_one_of_theirs(void **state)
{
    for (int long_one = 0; long_one < 2; long_one++) {
        struct world *w = world_new(9, 1, 64, 120, 400);
        char text[120];
        int begun = 0;
        (void)state;
        for (int i = 0; i < 100; i++) {
            struct client_req *r = endless(ask(w, -1, letters(text, 10), 5));
            r->req->client = 1;
            submit(w, r);
        }
        for (int i = 0; i < 30; i++)
            tick(w);
        for (int i = 0; i < 100; i++)
            begun += w->r[i].last_index >= 0;
        struct client_req *single = endless(ask(w, -1, letters(text, long_one ? 100 : 10), 5));
        single->req->client = 2;
        submit(w, single);
        while (single->last_index < 0)
            CHECK(tick(w));
        for (int i = 0; i < 100; i++)
            begun -= w->r[i].last_index >= 0;
        CHECK(begun >= -1 && single->end.index <= 2);
        run_dry(w);
        world_free(w);
    }
}

/* Turns are paid in tokens: whose requests are ten times as long gets a tenth as many of them. */
static void clients_share_by_what_is_computed(void **state)
{
    struct world *w = world_new(10, 1, 64, 300, 400);
    char text[300];
    int64_t tokens[2] = {0};
    int ended[2] = {0};

    (void)state;
    for (int i = 0; i < 180; i++) {
        bool big = i < 60;
        struct client_req *r = endless(ask(w, -1, letters(text, big ? 250 : 15), 10));
        r->req->client = big;
        submit(w, r);
    }
    while (ended[0] < 100) {
        CHECK(tick(w));
        memset(ended, 0, sizeof ended);
        memset(tokens, 0, sizeof tokens);
        for (int i = 0; i < 180; i++)
            if (w->r[i].ended) {
                ended[w->r[i].req->client]++;
                tokens[w->r[i].req->client] += w->r[i].end.stats.prompt_tokens + w->r[i].end.stats.tokens;
            }
    }
    CHECK(ended[1] < 20 && tokens[1] < tokens[0] + 2 * IC_TURN_TOKENS &&
          tokens[0] < tokens[1] + 2 * IC_TURN_TOKENS);
    run_dry(w);
    world_free(w);
}

/* Another's short question does not wait until a long text is read, nor the long one for all the short ones to come. */
static void short_prompts_pass_long_ones(void **state)
{
    struct world *w = world_new(14, 6, 20, 400, 2000);
    char text[400];

    (void)state;
    struct client_req *big = endless(ask(w, -1, letters(text, 390), 2));
    submit(w, big);
    tick(w);
    int64_t ticks = w->ticks;
    int n = 0;
    while (big->last_index < 0) { /* a new short one whenever there is room */
        struct client_req *small = endless(ask(w, -1, letters(text, 18), 1));
        small->req->client = 1 + (uint64_t)n++ % 4;
        submit(w, small);
        tick(w);
        tick(w);
        CHECK(w->ticks - ticks <
              400 / (20 / 2 - 2)); /* half of each batch is its own, but for a stream's row or two */
    }
    int ended = 0;
    for (int i = 1; i <= n; i++)
        ended += w->r[i].ended;
    CHECK(n > 5 && ended >= n / 2);
    run_dry(w);
    world_free(w);
}

static void a_high_one_takes_a_place_and_no_token_is_lost(void **state)
{
    struct world *w = world_new(11, 2, 16, 100, 300);
    char text[100];

    (void)state;
    for (int i = 0; i < 3; i++) {
        struct client_req *r = endless(ask(w, -1, letters(text, 20), 30));
        r->req->priority = i == 1 ? IC_PRIO_LOW : IC_PRIO_NORMAL;
        submit(w, r);
    }
    for (int i = 0; i < 20; i++)
        tick(w);
    CHECK(is_running(w, &w->r[0]) && is_running(w, &w->r[2]) && w->c.preempted == 0);
    struct client_req *high = endless(ask(w, -1, letters(text, 20), 5));
    high->req->priority = IC_PRIO_HIGH;
    submit(w, high);
    tick(w);
    CHECK(is_running(w, high) && w->c.preempted == 1 && is_running(w, &w->r[0]) &&
          !is_running(w, &w->r[2]));
    int64_t rows = w->f.decoded_rows;
    while (!w->r[2].ended)
        CHECK(tick(w));
    CHECK(w->f.decoded_rows - rows < 20 + 5 + 30 + 30 + 30); /* its cells were still there: nothing twice */
    run_dry(w);                                              /* the oracle compares every text */
    for (int i = 0; i < 3; i++)
        CHECK(w->r[i].end.stats.tokens == 30);
    world_free(w);
}

static void a_client_has_its_own_bound_of_the_queue(void **state)
{
    struct world *w = world_new(12, 1, 16, 100, 300);

    (void)state;
    w->f.be.policy.queue_per_client = 3;
    world_restart(w);
    w->unchecked = true;
    struct client_req *r[6];
    for (int i = 0; i < 6; i++) {
        r[i] = endless(ask(w, -1, "abc", 3));
        r[i]->req->client = i == 5 ? 2 : 1;
        submit(w, r[i]);
    }
    CHECK(!r[2]->ended && r[3]->ended && r[3]->code == IC_BUSY && strstr(r[3]->err, "again in about"));
    CHECK(r[4]->code == IC_BUSY && !r[5]->ended);
    run_dry(w);
    CHECK(r[5]->end.stats.tokens == 3 && w->c.refused == 2);
    world_free(w);
}

/* A tick of n rows on a machine where a row costs the same wherever it belongs to. */
static double affine(int32_t n)
{
    return 900 + 100 * n;
}

/* What ticks with these slices settle on; `most`: what the longest of them took. */
static int32_t settled_slice(struct ic_text_cost *c, double (*ns)(int32_t), int32_t n_decode,
                             int32_t n_usual, double bound, double *most)
{
    int32_t slice = 0;

    *most = 0;
    for (int i = 0; i < 40; i++) {
        slice = ic_text_cost_slice(c, n_decode, n_usual, 500, bound);
        ic_text_cost_learn(c, ns(n_decode + slice), n_decode + slice);
        *most = ns(n_decode + slice) > *most ? ns(n_decode + slice) : *most;
    }
    return slice;
}

/* Beside eight streams a tick is dearer than beside one, and its slice of somebody's prompt may be so too. */
static void slices_go_by_the_number_of_streams(void **state)
{
    struct ic_text_cost c = {0};
    double most;

    (void)state;
    CHECK(ic_text_cost_slice(&c, 0, 0, 500, 0) == 500 &&
          ic_text_cost_slice(&c, 3, 3, 500, 0) == IC_SLICE_MIN);
    ic_text_cost_learn(&c, affine(1), 1);
    ic_text_cost_learn(&c, affine(8), 8);
    ic_text_cost_learn(&c, affine(400), 400);
    int32_t one = settled_slice(&c, affine, 1, 1, 0, &most);
    CHECK(one >= 9 && one <= 10 && most <= 2 * affine(1)); /* (2 - 1) * 1000 / 100 */
    int32_t eight = settled_slice(&c, affine, 8, 8, 0, &most);
    CHECK(eight >= 14 && eight <= 17 && most <= 2 * affine(8)); /* as far as sizes are told apart */
    CHECK(settled_slice(&c, affine, 1, 8, 0, &most) >= eight);  /* seven more wait for their first token */
    CHECK(most <= 2 * affine(8));
    CHECK(settled_slice(&c, affine, 8, 8, 2100 / IC_GAP_AIM, &most) == 4 &&
          ic_text_cost_slice(&c, 8, 8, 500, 10) == IC_SLICE_MIN);
    ic_text_cost_learn(&c, 1e9, 1 + one); /* the machine was elsewhere */
    CHECK(ic_text_cost_slice(&c, 1, 1, 500, 0) >= one / 2);
    CHECK(settled_slice(&c, affine, 1, 1, 0, &most) >= one / 2);
}

/* A CPU's kernels: one by one up to seven rows, from eight on in blocks. */
static double in_blocks(int32_t n)
{
    return n < 8 ? 1000 * n : 5000 + 40 * n;
}

static void slices_pass_over_sizes_that_do_not_pay(void **state)
{
    struct ic_text_cost c = {0};
    double most;

    (void)state;
    ic_text_cost_learn(&c, in_blocks(300), 300); /* somebody's prompt while nobody else was there */
    ic_text_cost_learn(&c, in_blocks(1), 1);
    CHECK(settled_slice(&c, in_blocks, 1, 1, 0, &most) == 1 &&
          most <= 2 * in_blocks(1)); /* not once too long */
    ic_text_cost_learn(&c, in_blocks(5), 5);
    int32_t five = settled_slice(&c, in_blocks, 5, 5, 0, &most);
    CHECK(five > 90 &&
          most <= 2.05 * in_blocks(5)); /* 10000 ns: 125 rows, as far as sizes are told apart */
}

/* A stream beside one long prompt, and beside eight short ones of eight clients, or of one. */
static int32_t slice_beside(int readers, int clients, bool own)
{
    struct world *w = world_new(14, 16, 400, 500, 8000);
    char text[400];
    int32_t n = 0;

    w->f.ns_base = 1000;
    w->f.ns_row = 100;
    struct client_req *stream = endless(ask(w, -1, "s", 400));
    stream->req->client = 1;
    submit(w, stream);
    for (int i = 0; i < 30; i++)
        tick(w);
    for (int i = 0; i < 3; i++) { /* the price of a row is learnt */
        submit(w, endless(ask(w, -1, letters(text, 100), 1)));
        for (int k = 0; k < 10; k++)
            tick(w);
    }
    for (int i = 0; i < readers; i++) {
        struct client_req *r = endless(ask(w, -1, letters(text, 300), 1));
        r->req->client = own ? 1 : (uint64_t)(2 + i % clients);
        submit(w, r);
    }
    for (int i = 0; i < 10; i++) { /* it grows as it turns out that it may */
        tick(w);
        n = w->f.last_n - 1 > n ? w->f.last_n - 1 : n;
    }
    run_dry(w);
    world_free(w);
    return n;
}

/* The machine becomes three times slower while a prompt is read: so does the stream by itself, and its gap may grow with it. */
static void slices_follow_the_machine(void **state)
{
    struct world *w = world_new(17, 4, 500, 1000, 8000);
    char text[1000];
    int32_t n = 0, looks = 0;

    (void)state;
    w->f.ns_base = 1000;
    w->f.ns_row = 300;
    submit(w, endless(ask(w, -1, "s", 400)));
    for (int i = 0; i < 30; i++)
        tick(w);
    submit(w, endless(ask(w, -1, letters(text, 900), 1)));
    for (int i = 0; i < 15; i++)
        tick(w);
    CHECK(w->f.last_n >= 4); /* of 2600 ns 1300 are left: 4 rows */
    w->f.ns_base *= 3;
    w->f.ns_row *= 3;
    for (int i = 0; i < 70; i++) {
        tick(w);
        looks += w->f.last_n == 1;
        n = i >= 40 && w->f.last_n > n ? w->f.last_n : n;
    }
    CHECK(n >= 4 && looks >= 3 && looks <= 6);
    run_dry(w);
    world_free(w);
}

static void slices_are_larger_where_several_wait(void **state)
{
    (void)state;
    int32_t one = slice_beside(1, 1, false);
    CHECK(one >= 9 && one <= 12);                        /* (2 - 1) * 1100 / 100 */
    CHECK(slice_beside(8, 8, false) >= one + 7 * 2 - 3); /* as beside eight streams */
    CHECK(slice_beside(8, 1, false) == one);             /* one client's many are not everybody's gaps */
    CHECK(slice_beside(8, 1, true) >= one + 7 * 2 - 3);  /* but its own they may be */
}

/* Cells of nobody cost every row a look: beside the next stream those beyond some go to host memory, the oldest first and not all
 * in one tick, and come back. */
static void idle_cells_are_few_where_they_can_be_kept_elsewhere(void **state)
{
    (void)state;
    for (int keep = 0; keep < 3; keep++) { /* nowhere, in a little memory, in enough */
        struct world *w = world_new(15, 4, 512, 1000, 8000);
        char text[900], first[900];
        w->f.be.policy.cache_ram = keep == 0 ? 0 : keep == 1 ? 9000 : 1 << 20;
        w->f.be.idle_cells = 100;
        w->f.ns_row = 1000; /* dearer than a copy */
        world_restart(w);
        letters(first, 400);
        endless(submit_prompt(w, first, 2));
        run_dry(w);
        for (int i = 0; i < 3; i++) {
            endless(submit_prompt(w, letters(text, 400), 2));
            uint64_t before = w->c.spilled;
            ic_text_sched_tick(w->s);
            CHECK(w->c.spilled - before <= IC_TRIM_CELLS + IC_SPILL_MIN);
            run_dry(w);
            CHECK(w->c.spilled == 0 || keep);
        }
        int32_t idle = fake_cells(&w->f);
        CHECK(idle >= 400); /* the last one's */
        endless(submit_prompt(w, "x", 30));
        run_dry(w);
        int32_t left = fake_cells(&w->f);
        CHECK(keep == 2 ? left <= 100 + 40 && w->c.spilled > 1100 : left > 400);
        CHECK(keep == 1 ? w->c.spilled > 0 && w->c.spill_bytes <= 9000 : true);
        struct client_req *again = endless(submit_prompt(w, first, 2));
        run_dry(w);
        CHECK(again->end.stats.cached_tokens >= 400 - IC_SPILL_MIN && (w->c.restored > 0) == (keep > 0));
        world_free(w);
    }
}

static void a_full_context_goes_on_when_told_to(void **state)
{
    struct world *w = world_new(13, 2, 16, 64, 128);
    char text[64];

    (void)state;
    w->f.be.policy.shift = true;
    world_restart(w);
    w->unchecked = true; /* the oracle knows of no shift */
    struct client_req *r = endless(submit_prompt(w, letters(text, 30), 200));
    run_dry(w);
    CHECK(r->end.reason == IC_END_LENGTH && r->end.stats.tokens == 200);
    struct client_req *p = endless(submit_prompt(w, letters(text, 30), 200)); /* and across a reopening */
    for (int i = 0; i < 60; i++)
        tick(w);
    lose(w, true);
    reopen(w);
    run_dry(w);
    CHECK(p->end.stats.tokens == 200);
    world_free(w);
}

/* While nobody streams all of them go, in pieces, where there is room for them. */
static void idle_cells_leave_while_nobody_streams(void **state)
{
    (void)state;
    for (int keep = 0; keep < 2; keep++) {
        struct world *w = world_new(16, 4, 512, 1000, 8000);
        char first[900];
        int pieces = 0;
        w->f.be.policy.cache_ram = keep ? 1 << 20 : 0;
        w->f.ns_row = 1000;
        world_restart(w);
        struct client_req *one = endless(submit_prompt(w, letters(first, 400), 20));
        CHECK(!tidy(w)); /* it waits */
        tick(w);
        CHECK(!tidy(w)); /* it runs */
        run_dry(w);
        for (uint64_t before = w->c.spilled; tidy(w); before = w->c.spilled, pieces++)
            CHECK(w->c.spilled - before <= IC_TRIM_CELLS + IC_SPILL_MIN);
        CHECK(pieces == (keep ? 2 : 0) && (fake_cells(&w->f) == 0) == keep);
        struct client_req *again = endless(submit_prompt(w, first, 20));
        run_dry(w);
        CHECK(again->end.stats.cached_tokens == again->end.stats.prompt_tokens - 1 &&
              (w->c.restored > 0) == keep);
        CHECK(again->text.len == one->text.len &&
              memcmp(again->text.data, one->text.data, one->text.len) == 0);
        world_free(w);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_common_prefix_is_computed_once),
        cmocka_unit_test(the_one_that_computes_may_go),
        cmocka_unit_test(key_spaces_see_nothing_of_each_other),
        cmocka_unit_test(a_pinned_prefix_is_there_for_all_and_for_good),
        cmocka_unit_test(host_memory_keeps_what_the_cache_cannot),
        cmocka_unit_test(host_memory_drops_the_oldest),
        cmocka_unit_test(a_disk_keeps_what_host_memory_cannot),
        cmocka_unit_test(a_slow_disk_is_not_asked_again_soon),
        cmocka_unit_test(what_is_dearer_to_restore_is_computed),
        cmocka_unit_test(ends_go_before_beginnings),
        cmocka_unit_test(one_of_many_starts_after_at_most_one_of_theirs),
        cmocka_unit_test(clients_share_by_what_is_computed),
        cmocka_unit_test(short_prompts_pass_long_ones),
        cmocka_unit_test(a_high_one_takes_a_place_and_no_token_is_lost),
        cmocka_unit_test(a_client_has_its_own_bound_of_the_queue),
        cmocka_unit_test(slices_go_by_the_number_of_streams),
        cmocka_unit_test(slices_pass_over_sizes_that_do_not_pay),
        cmocka_unit_test(slices_are_larger_where_several_wait),
        cmocka_unit_test(slices_follow_the_machine),
        cmocka_unit_test(idle_cells_are_few_where_they_can_be_kept_elsewhere),
        cmocka_unit_test(idle_cells_leave_while_nobody_streams),
        cmocka_unit_test(a_full_context_goes_on_when_told_to),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
