/* A device that is not there, has no room, or is lost: the simulations go on on the CPU, to the same
 * states. The device here is the reference back end with faults. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "law/cpu/synth.h"
#include "law/fallback.h"

#define GRID 16

static struct {
    bool no_device, no_room;
    bool without_memory; /* what is lost at lost_at is memory, not the device */
    int lost_at;         /* run, counted from 0; -1: never */
    int runs, opens;
} fault;

static enum ic_status fake_pack(const struct ic_law *law, unsigned threads, struct ic_law_packed **out,
                                struct ic_err *err)
{
    if (fault.no_device)
        return ic_fail(err, IC_UNAVAILABLE, "no device");
    return ic_law_backend_ref.pack(law, threads, out, err);
}

static enum ic_status fake_open(const struct ic_law_packed *packed, const struct ic_law_plan *plan,
                                struct ic_law_exec **out, struct ic_err *err)
{
    fault.opens++;
    if (fault.no_room)
        return ic_fail(err, IC_OOM, "no room");
    return ic_law_backend_ref.open(packed, plan, out, err);
}

static enum ic_status fake_run(struct ic_law_exec *e, const struct ic_law_io *io, unsigned n,
                               unsigned steps, struct ic_err *err)
{
    if (fault.runs++ == fault.lost_at)
        return ic_fail(err, fault.without_memory ? IC_OOM : IC_UNAVAILABLE, "lost");
    for (unsigned i = 0; i < steps; i++)
        ic_law_backend_ref.step(e, io, n);
    return IC_OK;
}

static struct ic_law_backend fake;

static const struct ic_law_backend *fake_with_cpu(void)
{
    fake = ic_law_backend_ref;
    fake.pack = fake_pack;
    fake.open = fake_open;
    fake.run = fake_run;
    return ic_law_backend_with_cpu(&fake);
}

static double relative(const float *a, const float *b, size_t bytes)
{
    double diff = 0, norm = 0;
    for (size_t i = 0; i < bytes / sizeof *a; i++) {
        diff += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        norm += (double)b[i] * (double)b[i];
    }
    return sqrt(diff / norm);
}

/* Five steps, the middle two in one call; compared with the reference's. */
static void five_steps(void)
{
    const struct ic_law_backend *be = fake_with_cpu(), *ref = &ic_law_backend_ref;
    struct ic_law *law = synth_law(IC_LAW_UNET_UNITARY, 2, 4, 1);
    struct ic_law_plan *plan, *ref_plan;
    struct ic_law_packed *packed, *ref_packed;
    struct ic_law_exec *exec, *ref_exec;
    struct ic_err err = {0};
    assert_int_equal(ic_law_plan_open(law, GRID, GRID, 2, be->tensor_bytes, &plan, &err), IC_OK);
    assert_int_equal(be->pack(law, 1, &packed, &err), IC_OK);
    assert_int_equal(be->open(packed, plan, &exec, &err), IC_OK);
    assert_true(be->exec_bytes(exec) > 0 && be->packed_bytes(packed) > 0);
    assert_int_equal(ic_law_plan_open(law, GRID, GRID, 2, ref->tensor_bytes, &ref_plan, &err), IC_OK);
    assert_int_equal(ref->pack(law, 1, &ref_packed, &err), IC_OK);
    assert_int_equal(ref->open(ref_packed, ref_plan, &ref_exec, &err), IC_OK);
    struct ic_law_io io[2], want[2];
    for (int i = 0; i < 2; i++) {
        io[i] = (struct ic_law_io){.psi = aligned_alloc(64, plan->psi_bytes), .gamma = 0.01f};
        want[i] = (struct ic_law_io){.psi = aligned_alloc(64, plan->psi_bytes), .gamma = 0.01f};
        synth_psi(io[i].psi, GRID * GRID, 2, (uint64_t)i + 1);
        memcpy(want[i].psi, io[i].psi, plan->psi_bytes);
    }
    be->step(exec, io, 2);
    assert_int_equal(be->run(exec, io, 2, 2, &err), IC_OK);
    be->step(exec, io, 2);
    be->step(exec, io, 2);
    /* Two back ends round differently and the law amplifies that; a step too many or too few shows far
     * more. */
    for (int i = 0; i < 4; i++)
        ref->step(ref_exec, want, 2);
    for (int i = 0; i < 2; i++)
        assert_true(relative(want[i].psi, io[i].psi, plan->psi_bytes) > 0.2);
    ref->step(ref_exec, want, 2);
    for (int i = 0; i < 2; i++) {
        assert_true(relative(want[i].psi, io[i].psi, plan->psi_bytes) < 0.02);
        free(io[i].psi);
        free(want[i].psi);
    }
    if (!ic_law_fallback_on_device(
            packed)) { /* lost, or never there: what a plan takes is what the CPU's takes */
        struct ic_law_exec *again;
        assert_int_equal(be->open(packed, plan, &again, &err), IC_OK);
        assert_int_equal(be->exec_size(packed, plan), be->exec_bytes(again));
        assert_int_equal(ic_law_fallback_host_bytes(again), be->exec_bytes(again));
        be->close(&again);
    }
    be->close(&exec);
    be->unpack(&packed);
    ic_law_plan_close(&plan);
    ref->close(&ref_exec);
    ref->unpack(&ref_packed);
    ic_law_plan_close(&ref_plan);
    synth_free(law);
}

static void without_faults_the_device_does_all(void **state)
{
    (void)state;
    memset(&fault, 0, sizeof fault);
    fault.lost_at = -1;
    five_steps();
    assert_int_equal(fault.runs, 4);
}

static void lost_in_any_run(void **state)
{
    (void)state;
    for (int at = 0; at < 4; at++) {
        memset(&fault, 0, sizeof fault);
        fault.lost_at = at;
        five_steps();
        assert_int_equal(fault.runs, at + 1); /* a lost device is not asked again */
    }
}

static void no_room_on_the_device(void **state)
{
    (void)state;
    memset(&fault, 0, sizeof fault);
    fault.no_room = true;
    five_steps();
    assert_int_equal(fault.opens, 1);
    assert_int_equal(fault.runs, 0);
}

static void no_device_at_all(void **state)
{
    (void)state;
    memset(&fault, 0, sizeof fault);
    fault.no_device = true;
    five_steps();
    assert_int_equal(fault.opens, 0);
}

static struct {
    size_t limit, held, most;
    int refused;
} purse;

static bool take_some(void *arg, const char *what, size_t bytes, struct ic_err *why)
{
    (void)arg;
    if (purse.held + bytes > purse.limit) {
        purse.refused++;
        ic_fail(why, IC_OOM, "nothing left for %s", what);
        return false;
    }
    purse.held += bytes;
    purse.most = purse.held > purse.most ? purse.held : purse.most;
    return true;
}

static void give_back(void *arg, size_t bytes)
{
    (void)arg;
    assert_true(bytes <= purse.held);
    purse.held -= bytes;
}

static void others_memory_is_left_to_them(void **state)
{
    const struct ic_law_gate gate = {take_some, give_back, NULL};
    size_t all;

    (void)state;
    memset(&fault, 0, sizeof fault);
    memset(&purse, 0, sizeof purse);
    fault.lost_at = -1;
    ic_law_fallback_gate(&gate);
    purse.limit = SIZE_MAX;
    five_steps();
    assert_int_equal(fault.runs, 4);
    assert_true(purse.most > 0);
    assert_int_equal(purse.held, 0); /* all given back */
    all = purse.most;

    purse.limit = 0; /* not even the weights: all on the CPU */
    five_steps();
    assert_int_equal(fault.runs, 4);
    assert_int_equal(purse.held, 0);
    assert_int_equal(purse.refused, 1);

    purse.limit = all - 1; /* the weights, but no plan */
    purse.most = 0;
    five_steps();
    assert_int_equal(fault.runs, 4);
    assert_true(purse.most > 0 && purse.most < all);
    assert_int_equal(purse.held, 0);

    purse.limit = SIZE_MAX; /* a lost device holds nothing */
    memset(&fault, 0, sizeof fault);
    fault.lost_at = 1;
    five_steps();
    assert_int_equal(purse.held, 0);
    ic_law_fallback_gate(NULL);
}

/* Neither the device nor the CPU has memory: the step fails, nothing has changed, nothing is held of the
 * device; the next try finds memory on the CPU and goes on there. */
static void no_memory_anywhere(void **state)
{
    const struct ic_law_gate gate = {take_some, give_back, NULL};
    struct ic_law *law = synth_law(IC_LAW_UNET_UNITARY, 2, 4, 1);
    struct ic_law_plan *plan;
    struct ic_law_packed *packed;
    struct ic_law_exec *exec;
    struct ic_err err = {0};

    (void)state;
    memset(&fault, 0, sizeof fault);
    memset(&purse, 0, sizeof purse);
    fault.without_memory = true;
    purse.limit = SIZE_MAX;
    ic_law_fallback_gate(&gate);
    const struct ic_law_backend *be = fake_with_cpu();
    assert_int_equal(ic_law_plan_open(law, GRID, GRID, 1, be->tensor_bytes, &plan, &err), IC_OK);
    assert_int_equal(be->pack(law, 1, &packed, &err), IC_OK);
    const size_t weights = purse.held;
    assert_int_equal(be->open(packed, plan, &exec, &err), IC_OK);
    assert_true(purse.held > weights);
    assert_true(ic_law_fallback_on_device(packed));
    assert_int_equal(be->exec_size(packed, plan), be->exec_bytes(exec));
    const size_t staged = ic_law_fallback_host_bytes(exec);
    assert_in_range(staged, ic_law_staging_bytes(&fake, law, GRID, GRID, 1), be->exec_bytes(exec) - 1);
    float *psi = aligned_alloc(64, plan->psi_bytes), *before = malloc(plan->psi_bytes);
    const struct ic_law_io io = {.psi = psi, .gamma = 0.01f};
    synth_psi(psi, GRID * GRID, 2, 1);
    memcpy(before, psi, plan->psi_bytes);
    assert_int_equal(be->run(exec, &io, 1, 1, &err), IC_OOM); /* main orders the CPU's fault */
    assert_non_null(strstr(err.msg, "IC_FAULT"));
    assert_memory_equal(psi, before, plan->psi_bytes);
    assert_int_equal(purse.held, weights);
    assert_int_equal(be->run(exec, &io, 1, 1, &err), IC_OK);
    assert_int_equal(fault.runs, 1); /* the device was left alone */
    assert_int_equal(ic_law_fallback_host_bytes(exec),
                     be->exec_bytes(exec)); /* all of it is the host's now */
    assert_true(ic_law_fallback_host_bytes(exec) > staged);
    assert_true(relative(before, psi, plan->psi_bytes) > 0.01);
    be->close(&exec);
    be->unpack(&packed);
    assert_int_equal(purse.held, 0);
    ic_law_plan_close(&plan);
    ic_law_fallback_gate(NULL);
    free(before);
    free(psi);
    synth_free(law);
}

int main(void)
{
    setenv("IC_FAULT", "law-oom:1", 1); /* for the first test, which takes it */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_memory_anywhere), cmocka_unit_test(without_faults_the_device_does_all),
        cmocka_unit_test(lost_in_any_run),    cmocka_unit_test(no_room_on_the_device),
        cmocka_unit_test(no_device_at_all),   cmocka_unit_test(others_memory_is_left_to_them),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
