/* States that stay on a device: what is asked of the host's copy is right whatever happened, nothing
 * travels that need not, and what a lost device takes with it is counted. The device is fake_device.h: it
 * shows what was not copied. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "law/cpu/synth.h"
#include "law/fake_device.h"
#include "law/fallback.h"

#define GRID 16
#define BATCH 3

/* A law with memory on the fake device with the CPU behind it, and the same on the reference. */
static struct rig {
    const struct ic_law_backend *be;
    struct ic_law *law;
    struct ic_law_plan *plan, *ref_plan;
    struct ic_law_packed *packed, *ref_packed;
    struct ic_law_exec *exec, *ref_exec;
    struct ic_law_io io[BATCH], want[BATCH]; /* io: with a state each */
} r;

static struct ic_law_io new_io(uint64_t seed)
{
    struct ic_law_io io = {.psi = fake_alloc(r.plan->psi_bytes),
                           .h = fake_alloc(r.plan->memory_bytes / 2),
                           .c = fake_alloc(r.plan->memory_bytes / 2),
                           .delta = fake_alloc(r.plan->psi_bytes),
                           .gamma = 0.01f};
    synth_psi(io.psi, GRID * GRID, r.law->d, seed);
    memset(io.h, 0, r.plan->memory_bytes / 2);
    memset(io.c, 0, r.plan->memory_bytes / 2);
    return io;
}

static void free_io(struct ic_law_io *io)
{
    free(io->psi);
    free(io->h);
    free(io->c);
    free(io->delta);
}

static void rig_open(void)
{
    static struct ic_law_backend fake;
    struct ic_err err = {0};
    if (!fake.name)
        fake = fake_device_backend("fake");
    memset(&fake_device, 0, sizeof fake_device);
    r = (struct rig){.be = ic_law_backend_with_cpu(&fake), .law = synth_law(IC_LAW_UNET_CONVLSTM, 2, 4, 1)};
    const struct ic_law_backend *ref = &ic_law_backend_ref;
    assert_int_equal(ic_law_plan_open(r.law, GRID, GRID, BATCH, r.be->tensor_bytes, &r.plan, &err), IC_OK);
    assert_int_equal(r.be->pack(r.law, 1, &r.packed, &err), IC_OK);
    assert_int_equal(r.be->open(r.packed, r.plan, &r.exec, &err), IC_OK);
    assert_int_equal(ic_law_plan_open(r.law, GRID, GRID, BATCH, ref->tensor_bytes, &r.ref_plan, &err),
                     IC_OK);
    assert_int_equal(ref->pack(r.law, 1, &r.ref_packed, &err), IC_OK);
    assert_int_equal(ref->open(r.ref_packed, r.ref_plan, &r.ref_exec, &err), IC_OK);
    for (unsigned i = 0; i < BATCH; i++) {
        r.io[i] = new_io(i + 1);
        r.want[i] = new_io(i + 1);
        assert_int_equal(r.be->state_open(r.packed, r.plan, &r.io[i], &r.io[i].state, &err), IC_OK);
    }
}

static void rig_close(void)
{
    for (unsigned i = 0; i < BATCH; i++) {
        r.be->state_close(&r.io[i].state);
        free_io(&r.io[i]);
        free_io(&r.want[i]);
    }
    r.be->close(&r.exec);
    r.be->unpack(&r.packed);
    ic_law_plan_close(&r.plan);
    ic_law_backend_ref.close(&r.ref_exec);
    ic_law_backend_ref.unpack(&r.ref_packed);
    ic_law_plan_close(&r.ref_plan);
    synth_free(r.law);
    assert_int_equal(fake_device.states, 0);
}

static void run(unsigned n, unsigned steps)
{
    struct ic_err err = {0};
    assert_int_equal(r.be->run(r.exec, r.io, n, steps, &err), IC_OK);
}

static void want_steps(struct ic_law_io *io, unsigned n, unsigned steps)
{
    for (unsigned i = 0; i < steps; i++)
        ic_law_backend_ref.step(r.ref_exec, io, n);
}

static void expect_same(const struct ic_law_io *a, const struct ic_law_io *b)
{
    assert_memory_equal(a->psi, b->psi, r.plan->psi_bytes);
    assert_memory_equal(a->h, b->h, r.plan->memory_bytes / 2);
    assert_memory_equal(a->c, b->c, r.plan->memory_bytes / 2);
}

/* Another back end's rounding, amplified by a few steps; one step more or less shows far more. */
static void expect_close(const struct ic_law_io *a, const struct ic_law_io *b)
{
    double diff = 0, norm = 0;
    for (size_t i = 0; i < r.plan->psi_bytes / sizeof(float); i++) {
        diff += pow((double)a->psi[i] - (double)b->psi[i], 2);
        norm += pow((double)b->psi[i], 2);
    }
    assert_true(sqrt(diff / norm) < 0.02);
}

static void get(unsigned i, enum ic_status code)
{
    struct ic_err err = {0};
    assert_int_equal(r.be->state_get(r.io[i].state, &r.io[i], &err), code);
}

static void states_stay_and_are_read_when_asked_for(void **state)
{
    (void)state;
    rig_open();
    float *before = malloc(r.plan->psi_bytes);
    memcpy(before, r.io[0].psi, r.plan->psi_bytes);
    run(BATCH, 2);
    run(2, 3); /* of fewer, and others' places stay */
    r.be->start(r.exec, r.io, BATCH, 4);
    run(BATCH, 4);
    assert_int_equal(fake_device.puts, BATCH); /* once each */
    assert_int_equal(fake_device.gets, 0);
    assert_memory_equal(before, r.io[0].psi, r.plan->psi_bytes); /* untouched */
    want_steps(r.want, BATCH, 2);
    want_steps(r.want, 2, 3);
    want_steps(r.want, BATCH, 4);
    for (unsigned i = 0; i < BATCH; i++) {
        get(i, IC_OK);
        get(i, IC_OK); /* again: nothing to do */
        expect_same(&r.io[i], &r.want[i]);
        r.be->delta(r.exec, i, r.io[i].delta, NULL);
        assert_memory_equal(r.io[i].delta, r.want[i].delta, r.plan->psi_bytes);
    }
    assert_int_equal(fake_device.gets, BATCH);
    free(before);
    rig_close();
}

static void an_edit_goes_to_the_device(void **state)
{
    struct ic_err err = {0};
    (void)state;
    rig_open();
    run(BATCH, 1);
    want_steps(r.want, BATCH, 1);
    get(1, IC_OK);
    r.io[1].psi[7] += 0.5f;
    r.io[1].c[3] += 0.5f;
    assert_int_equal(r.be->state_put(r.io[1].state, &r.io[1], &err), IC_OK);
    r.want[1].psi[7] += 0.5f;
    r.want[1].c[3] += 0.5f;
    run(BATCH, 2);
    want_steps(r.want, BATCH, 2);
    for (unsigned i = 0; i < BATCH; i++) {
        get(i, IC_OK);
        expect_same(&r.io[i], &r.want[i]);
        assert_int_equal(ic_law_fallback_lost(r.io[i].state), 0);
    }
    assert_int_equal(fake_device.puts, BATCH + 1);
    rig_close();
}

/* Beside those with a state: one without, as /predict is. */
static void guests_are_brought_and_taken_back(void **state)
{
    (void)state;
    rig_open();
    struct ic_law_io mixed[BATCH] = {r.io[0], r.io[1], r.io[2]};
    struct ic_err err = {0};
    mixed[1].state = NULL;
    for (int i = 0; i < 3; i++)
        assert_int_equal(r.be->run(r.exec, mixed, BATCH, 2, &err), IC_OK);
    want_steps(r.want, BATCH, 6);
    expect_same(&r.io[1], &r.want[1]);
    assert_memory_equal(r.io[1].delta, r.want[1].delta, r.plan->psi_bytes);
    get(0, IC_OK);
    expect_same(&r.io[0], &r.want[0]);
    assert_int_equal(fake_device.states, 3); /* two, and a place that stays for the next guest */
    rig_close();
}

static void frames_are_drawn_there(void **state)
{
    const struct ic_law_shape shape = {GRID, GRID, 2};
    struct ic_view_ctx *ctx;
    struct ic_err err = {0};
    (void)state;
    rig_open();
    run(BATCH, 2);
    want_steps(r.want, BATCH, 2);
    assert_int_equal(ic_view_ctx_open(&ctx, &err), IC_OK);
    for (int v = 0; v < IC_VIEW_COUNT; v++) {
        struct ic_law_draw d[2] = {{r.io[2].state, 2, {(enum ic_view)v, IC_VIEW_U8, {3, 2, 7, 5}}},
                                   {r.io[0].state, -1, {(enum ic_view)v, IC_VIEW_F32, {0, 0, 3, 3}}}};
        const enum ic_status st = r.be->draw(r.exec, d, 2, &err);
        assert_int_equal(st, ic_view_of_one_cell((enum ic_view)v) ? IC_OK : IC_BAD_REQUEST);
        for (int i = 0; i < 2 && st == IC_OK; i++) {
            unsigned char got[7 * 5 * 12], want[7 * 5 * 12];
            struct ic_view_frame f, g;
            const struct ic_law_io *w = &r.want[i ? 0 : 2];
            assert_int_equal(ic_view_plan(&d[i].request, shape, &f, &err), IC_OK);
            assert_int_equal(r.be->frame(r.exec, (unsigned)i, got, sizeof got, &f, &err), IC_OK);
            ic_view_render(ctx, &d[i].request, w->psi, i ? NULL : w->delta, shape, want, sizeof want, &g,
                           NULL);
            assert_memory_equal(got, want, f.bytes);
            assert_true(f.min == g.min && f.max == g.max);
        }
    }
    assert_int_equal(fake_device.gets, 0);
    /* an edited state is not on the device until the next run */
    struct ic_law_draw d = {r.io[0].state, -1, {.view = IC_VIEW_DENSITY}};
    r.be->state_put(r.io[0].state, &r.io[0], &err);
    assert_int_equal(r.be->draw(r.exec, &d, 1, &err), IC_UNAVAILABLE);
    ic_view_ctx_close(&ctx);
    rig_close();
}

/* Lost in its third call: two of three had their host copies brought up to date, at different times. */
static void what_a_lost_device_takes_is_counted(void **state)
{
    (void)state;
    for (int started = 0; started < 2; started++) {
        rig_open();
        fake_device.fail_at = 3;
        fake_device.fail_with = IC_UNAVAILABLE;
        run(BATCH, 4);
        get(0, IC_OK);
        run(BATCH, 5);
        get(1, IC_OK);
        if (started)
            r.be->start(r.exec, r.io, 2, 2);
        run(2, 2); /* made on the CPU */
        assert_int_equal(ic_law_fallback_lost(r.io[0].state), 5);
        assert_int_equal(ic_law_fallback_lost(r.io[0].state), 0); /* said once */
        assert_int_equal(ic_law_fallback_lost(r.io[1].state), 0);
        assert_int_equal(ic_law_fallback_lost(r.io[2].state), 0); /* not known yet */
        run(BATCH, 1);
        assert_int_equal(ic_law_fallback_lost(r.io[2].state), 9);
        assert_false(ic_law_fallback_on_device(r.packed));
        assert_int_equal(fake_device.runs, 3);
        assert_int_equal(fake_device.states, 0);
        want_steps(&r.want[0], 1, 4 + 3);
        want_steps(&r.want[1], 1, 9 + 3);
        want_steps(&r.want[2], 1, 1);
        for (unsigned i = 0; i < BATCH; i++)
            expect_close(&r.io[i], &r.want[i]);
        rig_close();
    }
}

/* A step that failed in the middle, on a device that can still be read: its states are not believed. What
 * was written before is not counted as lost. */
static void a_step_that_fails_half_made(void **state)
{
    struct ic_err err = {0};
    (void)state;
    rig_open();
    fake_device.fail_at = 3;
    fake_device.fail_with = IC_INTERNAL;
    run(BATCH, 4);
    r.be->state_put(r.io[0].state, &r.io[0], &err); /* as it began */
    run(BATCH, 2);
    run(2, 1);
    assert_int_equal(ic_law_fallback_lost(r.io[0].state), 2);
    assert_int_equal(ic_law_fallback_lost(r.io[1].state), 6);
    want_steps(r.want, 2, 1);
    expect_close(&r.io[0], &r.want[0]);
    expect_close(&r.io[1], &r.want[1]);
    get(2, IC_OK); /* not in that batch: it can be read */
    want_steps(&r.want[2], 1, 6);
    expect_same(&r.io[2], &r.want[2]);
    rig_close();
}

static void a_device_lost_between_steps(void **state)
{
    (void)state;
    rig_open();
    run(BATCH, 2);
    get(0, IC_OK);
    run(BATCH, 1);
    fake_device.gone = true;
    get(0, IC_UNAVAILABLE);
    assert_int_equal(ic_law_fallback_lost(r.io[0].state), 1);
    want_steps(r.want, 1, 2);
    expect_same(&r.io[0], &r.want[0]); /* what it was then */
    struct ic_law_state *other = r.io[1].state;
    assert_int_equal(ic_law_fallback_abandon(&other), 3);
    assert_null(other);
    r.io[1].state = NULL;
    fake_device.states--; /* the abandoned one is never freed; the test knows where it is not */
    rig_close();
}

/* Without memory for a step the states are read back: not a step is lost. */
static void out_of_memory_loses_nothing(void **state)
{
    (void)state;
    rig_open();
    fake_device.fail_at = 2;
    fake_device.fail_with = IC_OOM;
    run(BATCH, 3);
    run(2, 1); /* made on the CPU; the third is read back when it needs it */
    want_steps(r.want, 2, 4);
    want_steps(&r.want[2], 1, 3);
    run(BATCH, 1);
    want_steps(r.want, BATCH, 1);
    for (unsigned i = 0; i < BATCH; i++) {
        get(i, IC_OK);
        expect_close(&r.io[i], &r.want[i]);
        assert_int_equal(ic_law_fallback_lost(r.io[i].state), 0);
    }
    assert_true(ic_law_fallback_on_device(r.packed)); /* for the next plan */
    assert_int_equal(fake_device.states, 0);
    rig_close();
}

static struct {
    size_t limit, held;
} purse;

static bool take_some(void *arg, const char *what, size_t bytes, struct ic_err *why)
{
    (void)arg;
    if (purse.held + bytes > purse.limit) {
        ic_fail(why, IC_OOM, "nothing left for %s", what);
        return false;
    }
    purse.held += bytes;
    return true;
}

static void give_back(void *arg, size_t bytes)
{
    (void)arg;
    assert_true(bytes <= purse.held);
    purse.held -= bytes;
}

/* Room for two of three: who waits longest leaves, and comes back. For one in a batch of two: the CPU. */
static void states_make_room_for_each_other(void **state)
{
    const struct ic_law_gate gate = {take_some, give_back, NULL};
    struct ic_err err = {0};
    (void)state;
    ic_law_fallback_gate(&gate);
    purse.limit = SIZE_MAX;
    rig_open();
    const size_t each = ic_law_state_bytes(r.law, GRID, GRID);
    purse.limit = purse.held + 2 * each;
    for (int round = 0; round < 3; round++) {
        for (unsigned i = 0; i < BATCH; i++)
            assert_int_equal(r.be->run(r.exec, &r.io[i], 1, 2, &err), IC_OK);
        assert_int_equal(fake_device.states, 2);
        assert_int_equal(purse.held, purse.limit);
    }
    want_steps(r.want, BATCH, 6);
    for (unsigned i = 0; i < BATCH; i++) {
        get(i, IC_OK);
        expect_same(&r.io[i], &r.want[i]);
        assert_int_equal(ic_law_fallback_lost(r.io[i].state), 0);
    }
    assert_int_equal(fake_device.runs, 9);
    run(BATCH, 1); /* not all of them at once */
    assert_int_equal(fake_device.runs, 9);
    assert_int_equal(fake_device.states, 0);
    want_steps(r.want, BATCH, 1);
    for (unsigned i = 0; i < BATCH; i++)
        expect_close(&r.io[i], &r.want[i]);
    rig_close();
    assert_int_equal(purse.held, 0);
    ic_law_fallback_gate(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(states_stay_and_are_read_when_asked_for),
        cmocka_unit_test(an_edit_goes_to_the_device),
        cmocka_unit_test(guests_are_brought_and_taken_back),
        cmocka_unit_test(frames_are_drawn_there),
        cmocka_unit_test(what_a_lost_device_takes_is_counted),
        cmocka_unit_test(a_step_that_fails_half_made),
        cmocka_unit_test(a_device_lost_between_steps),
        cmocka_unit_test(out_of_memory_loses_nothing),
        cmocka_unit_test(states_make_room_for_each_other),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
