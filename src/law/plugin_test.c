/* The plug-in's file: missing, no library, of another interface, somebody else's, and one that is right; by
 * name and in the standard places. The plug-ins are fake_plugin.c. Order matters: what is loaded once
 * stays. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

#include "law/cpu/synth.h"
#include "law/plugin.h"

static char self[4096]; /* the folder of this program, with its slash */

static int find_self(void **state)
{
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    (void)state;
    if (n <= 0)
        return -1;
    strrchr(self, '/')[1] = 0;
    unsetenv("IC_LAW_PLUGIN");
    return 0;
}

static void refused(enum ic_status code, const char *says)
{
    struct ic_err err = {0};
    const struct ic_law_backend *be;

    assert_null(ic_law_plugin_load(&err));
    if (err.code != code || !strstr(err.msg, says) || strchr(err.msg, '\n'))
        fail_msg("%d, \"%s\": not %d with \"%s\"", err.code, err.msg, code, says);
    assert_int_equal(ic_law_backend_open("cuda", &be, &err), code);
    assert_null(be);
}

static void refused_file(const char *path, enum ic_status code, const char *says)
{
    ic_law_plugin_path(path);
    refused(code, path);
    refused(code, says);
    ic_law_plugin_path(NULL);
    setenv("IC_LAW_PLUGIN", path, 1);
    refused(code, says);
    unsetenv("IC_LAW_PLUGIN");
}

static void what_is_no_plug_in_is_refused_by_name(void **state)
{
    (void)state;
    refused_file("/nowhere/libic-law-cuda.so", IC_NOT_FOUND, "No such file");
    refused_file(IC_SOURCE_DIR "/README.md", IC_BAD_REQUEST, "not ELF");
    refused_file("/", IC_BAD_REQUEST, "no shared library (not a file)");
    refused_file(FAKE_OTHER_ABI, IC_BAD_REQUEST, "has version 7, this program's has");
    refused_file(FAKE_OTHER_SYMBOL, IC_BAD_REQUEST, "no ic_law_plugin in it");
}

/* The head of a library and nothing after it: ELF, but it does not load. */
static void a_torn_library_is_refused(void **state)
{
    char path[] = "/tmp/ic-plugin-XXXXXX", head[64];
    FILE *in = fopen(FAKE_PLUGIN, "r");
    int fd = mkstemp(path);

    (void)state;
    assert_true(in && fd >= 0);
    assert_int_equal(fread(head, 1, sizeof head, in), sizeof head);
    assert_int_equal(write(fd, head, sizeof head), sizeof head);
    fclose(in);
    close(fd);
    refused_file(path, IC_BAD_REQUEST, "it does not load");
    unlink(path);
}

static void a_name_without_a_slash_is_of_this_folder(void **state)
{
    (void)state;
    ic_law_plugin_path("libc.so.6"); /* dlopen alone would find the system's */
    refused(IC_NOT_FOUND, "./libc.so.6");
    ic_law_plugin_path(NULL);
    setenv("IC_LAW_PLUGIN", "", 1); /* as if it were not set */
    refused(IC_NOT_FOUND, "neither in");
    unsetenv("IC_LAW_PLUGIN");
}

static void without_a_plug_in_other_back_ends_are_there(void **state)
{
    struct ic_err err = {0};
    const struct ic_law_backend *be;

    (void)state;
    refused(IC_NOT_FOUND, self); /* the places that were looked at */
    assert_int_equal(ic_law_backend_open("abacus", &be, &err), IC_NOT_FOUND);
    assert_int_equal(ic_law_backend_open("ref", &be, &err), IC_OK);
    assert_ptr_equal(be, &ic_law_backend_ref);
}

static void copy(const char *from, const char *to)
{
    char cmd[10000];
    snprintf(cmd, sizeof cmd, "cp '%s' '%s'", from, to);
    assert_int_equal(system(cmd), 0);
}

/* Beside this program comes first, then the folder of an installation; a broken one in the first is told,
 * and the second is not taken in its place. The one that is right is loaded last, and steps. */
static void the_standard_places(void **state)
{
    char beside[5000], lib[5000], folder[5000];
    struct ic_err err = {0};
    const struct ic_law_backend *be;

    (void)state;
    snprintf(beside, sizeof beside, "%s" IC_LAW_PLUGIN_FILE, self);
    snprintf(folder, sizeof folder, "%s../lib", self);
    const bool made_lib = mkdir(folder, 0755) == 0;
    snprintf(folder, sizeof folder, "%s" IC_LAW_PLUGIN_LIB, self);
    const bool made = mkdir(folder, 0755) == 0;
    snprintf(lib, sizeof lib, "%s" IC_LAW_PLUGIN_LIB "/" IC_LAW_PLUGIN_FILE, self);
    copy(FAKE_PLUGIN, lib);
    copy(FAKE_OTHER_ABI, beside);
    refused(IC_BAD_REQUEST, beside);
    unlink(beside);
    const struct ic_law_plugin *p = ic_law_plugin_load(&err);
    unlink(lib);
    if (made)
        rmdir(folder);
    snprintf(folder, sizeof folder, "%s../lib", self);
    if (made_lib)
        rmdir(folder);
    if (!p)
        fail_msg("%s", err.msg);
    assert_ptr_equal(ic_law_plugin_load(&err), p);
    assert_int_equal(ic_law_backend_open("cuda", &be, &err), IC_OK);
    assert_ptr_equal(be, p->backends[0]);
    assert_int_equal(ic_law_backend_open("cuda-bf16", &be, &err), IC_NOT_FOUND);
}

/* What the plug-in takes of this program is there: a step through it is the reference's. */
static void it_steps(void **state)
{
    struct ic_err err = {0};
    const struct ic_law_backend *be, *both[2] = {&ic_law_backend_ref};
    struct ic_law *law = synth_law(IC_LAW_UNET_UNITARY, 2, 4, 1);
    float *psi[2];

    (void)state;
    assert_int_equal(ic_law_backend_open("cuda", &be, &err), IC_OK);
    both[1] = be;
    for (int i = 0; i < 2; i++) {
        struct ic_law_plan *plan;
        struct ic_law_packed *packed;
        struct ic_law_exec *exec;
        assert_int_equal(ic_law_plan_open(law, 8, 8, 1, both[i]->tensor_bytes, &plan, &err), IC_OK);
        assert_int_equal(both[i]->pack(law, 1, &packed, &err), IC_OK);
        assert_int_equal(both[i]->open(packed, plan, &exec, &err), IC_OK);
        psi[i] = aligned_alloc(64, plan->psi_bytes);
        synth_psi(psi[i], 64, 2, 3);
        both[i]->step(exec, &(struct ic_law_io){.psi = psi[i], .gamma = 0.01f}, 1);
        both[i]->close(&exec);
        both[i]->unpack(&packed);
        ic_law_plan_close(&plan);
    }
    assert_memory_equal(psi[0], psi[1], 8 * 8 * 2 * 2 * sizeof(float));
    free(psi[0]);
    free(psi[1]);
    synth_free(law);
}

/* So is what it takes for states that stay and frames: what the device has is not what the host has until
 * it is asked for, and frames are those of the views. */
static void it_keeps_states_and_draws(void **state)
{
    struct ic_err err = {0};
    const struct ic_law_backend *be, *ref = &ic_law_backend_ref;
    struct ic_law *law = synth_law(IC_LAW_UNET_UNITARY, 2, 4, 1);
    struct ic_law_plan *plan;
    struct ic_law_packed *packed;
    struct ic_law_exec *exec;
    struct ic_view_ctx *ctx;
    struct ic_view_frame got = {.bytes = 64}, want;
    uint8_t pixels[64], right[64];

    (void)state;
    assert_int_equal(ic_law_backend_open("cuda", &be, &err), IC_OK);
    assert_int_equal(ic_law_plan_open(law, 8, 8, 1, ref->tensor_bytes, &plan, &err), IC_OK);
    float *psi = aligned_alloc(64, plan->psi_bytes), *before = aligned_alloc(64, plan->psi_bytes);
    synth_psi(psi, 64, 2, 3);
    memcpy(before, psi, plan->psi_bytes);
    struct ic_law_io io = {.psi = psi, .gamma = 0.01f};
    assert_int_equal(be->pack(law, 1, &packed, &err), IC_OK);
    assert_int_equal(be->open(packed, plan, &exec, &err), IC_OK);
    assert_int_equal(be->state_open(packed, plan, &io, &io.state, &err), IC_OK);
    assert_int_equal(be->state_put(io.state, &io, &err), IC_OK);
    be->start(exec, &io, 1, 3);
    assert_int_equal(be->run(exec, &io, 1, 3, &err), IC_OK);
    assert_memory_equal(psi, before, plan->psi_bytes);
    struct ic_law_draw draw = {io.state, -1, {.view = IC_VIEW_PHASE}};
    assert_int_equal(be->draw(exec, &draw, 1, &err), IC_OK);
    assert_int_equal(be->frame(exec, 0, pixels, sizeof pixels, &got, &err), IC_OK);
    assert_int_equal(be->state_get(io.state, &io, &err), IC_OK);
    be->state_close(&io.state);
    be->close(&exec);
    be->unpack(&packed);

    assert_int_equal(ref->pack(law, 1, &packed, &err), IC_OK);
    assert_int_equal(ref->open(packed, plan, &exec, &err), IC_OK);
    for (int i = 0; i < 3; i++)
        ref->step(exec, &(struct ic_law_io){.psi = before, .gamma = 0.01f}, 1);
    assert_memory_equal(psi, before, plan->psi_bytes);
    assert_int_equal(ic_view_ctx_open(&ctx, &err), IC_OK);
    assert_int_equal(ic_view_render(ctx, &draw.request, psi, NULL, (struct ic_law_shape){8, 8, 2}, right,
                                    sizeof right, &want, &err),
                     IC_OK);
    assert_memory_equal(pixels, right, sizeof right);
    ic_view_ctx_close(&ctx);
    ref->close(&exec);
    ref->unpack(&packed);
    ic_law_plan_close(&plan);
    free(psi);
    free(before);
    synth_free(law);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_no_plug_in_is_refused_by_name),
        cmocka_unit_test(a_torn_library_is_refused),
        cmocka_unit_test(a_name_without_a_slash_is_of_this_folder),
        cmocka_unit_test(without_a_plug_in_other_back_ends_are_there),
        cmocka_unit_test(the_standard_places),
        cmocka_unit_test(it_steps),
        cmocka_unit_test(it_keeps_states_and_draws),
    };
    return cmocka_run_group_tests(tests, find_self, NULL);
}
