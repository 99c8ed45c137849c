/* `law inspect`, `step`, `quantize`, `plan` and `fidelity` as a shell sees them: exit codes, one sentence
 * on stderr, the file written.
 */
#include <setjmp.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

#include "law/law_cli.h"
#include "model/safetensors.h"
#include "model/tensors.h"

#define GOLDEN IC_TEST_DIR "/golden/"

static char said[65536]; /* what the last run wrote: stdout, then stderr */
static char out_path[64];

static int run(char *const *args)
{
    char capture[] = "/tmp/ic-law-cli-XXXXXX";
    int fd = mkstemp(capture), kept[2] = {dup(1), dup(2)}, n = 0;
    assert_true(fd >= 0);
    unlink(capture);
    fflush(NULL);
    dup2(fd, 1);
    dup2(fd, 2);
    while (args[n])
        n++;
    int rc = ic_law_main(n, (char **)(uintptr_t)args);
    fflush(NULL);
    dup2(kept[0], 1);
    dup2(kept[1], 2);
    ssize_t got = pread(fd, said, sizeof said - 1, 0);
    said[got > 0 ? got : 0] = 0;
    close(kept[0]);
    close(kept[1]);
    close(fd);
    return rc;
}

#define RUN(...) run((char *const[]){"law", __VA_ARGS__, NULL})
#define SAYS(text)                                                                                         \
    do {                                                                                                   \
        if (!strstr(said, text))                                                                           \
            fail_msg("\"%s\" lacks \"%s\"", said, text);                                                   \
    } while (0)

static int make_out(void **state)
{
    (void)state;
    snprintf(out_path, sizeof out_path, "/tmp/ic-law-out-XXXXXX");
    int fd = mkstemp(out_path);
    return fd < 0 ? -1 : close(fd);
}

static int remove_out(void **state)
{
    (void)state;
    return unlink(out_path);
}

static void inspect_prints_what_the_file_is(void **state)
{
    (void)state;
    assert_int_equal(RUN("inspect", GOLDEN "unet_convlstm-d4-b8/checkpoint_ep7.pth"), IC_EXIT_OK);
    SAYS("UNET_CONVLSTM");
    SAYS("parameters    183928");
    SAYS("conv_gates.weight              [128, 64, 3, 3]");
    SAYS("128x128");
    SAYS("256x256");
    assert_int_equal(RUN("inspect", GOLDEN "quantum_lifecycle", "--arch", "UNET_UNITARY"), IC_EXIT_OK);
    SAYS("parameters    437608");
}

static void wrong_command_lines_exit_2(void **state)
{
    (void)state;
    assert_int_equal(run((char *const[]){"law", NULL}), IC_EXIT_USAGE);
    assert_int_equal(RUN("dance"), IC_EXIT_USAGE);
    SAYS("no such command: dance");
    assert_int_equal(RUN("inspect"), IC_EXIT_USAGE);
    assert_int_equal(RUN("inspect", "a", "b"), IC_EXIT_USAGE);
    assert_int_equal(RUN("inspect", "a", "--state", "b"), IC_EXIT_USAGE);
    SAYS("unknown option --state");
    assert_int_equal(RUN("step", "--frobnicate", "1"), IC_EXIT_USAGE);
    SAYS("unknown option --frobnicate");
    assert_int_equal(RUN("step", "stray"), IC_EXIT_USAGE);
    SAYS("what is stray");
    assert_int_equal(RUN("step", "--steps"), IC_EXIT_USAGE);
    SAYS("no value after --steps");
    assert_int_equal(RUN("step", "--steps", "1", "--steps", "2"), IC_EXIT_USAGE);
    SAYS("given twice");
    assert_int_equal(RUN("step", "--steps", "1"), IC_EXIT_USAGE);
    SAYS("step needs");
#define FULL(...) RUN("step", "--checkpoint", "c", "--state", "s", "--out", "o", __VA_ARGS__)
    assert_int_equal(FULL("--steps", "-1"), IC_EXIT_USAGE);
    assert_int_equal(FULL("--steps", "1e3"), IC_EXIT_USAGE);
    assert_int_equal(FULL("--steps", "99999999999999999999"), IC_EXIT_USAGE);
    assert_int_equal(FULL("--steps", "1", "--precision", "fp8"), IC_EXIT_USAGE);
    assert_int_equal(FULL("--steps", "1", "--gamma", "x"), IC_EXIT_USAGE);
    assert_int_equal(FULL("--steps", "1", "--gamma", "nan"), IC_EXIT_USAGE);
    assert_int_equal(FULL("--steps", "1", "--backend", "abacus"), IC_EXIT_USAGE);
    SAYS("no such back end: abacus");
    assert_int_equal(FULL("--steps", "1", "--threads", "-3"), IC_EXIT_USAGE);
    unsetenv("IC_LAW_PLUGIN"); /* one that is named and missing is told; so is one that a back end needs */
    assert_int_equal(FULL("--steps", "1", "--law-plugin", "/nowhere/x.so"), IC_EXIT_FILE);
    SAYS("law plug-in /nowhere/x.so: No such file");
    assert_int_equal(FULL("--steps", "1", "--backend", "cuda"), IC_EXIT_FILE);
    SAYS("law plug-in libic-law-cuda.so: neither in ");
}

static void bad_input_exits_4(void **state)
{
    (void)state;
#define STEP(c, s, ...)                                                                                    \
    RUN("step", "--checkpoint", c, "--state", s, "--steps", "1", "--out", out_path, ##__VA_ARGS__)
    assert_int_equal(RUN("inspect", "/no/such/file"), IC_EXIT_FILE);
    assert_int_equal(RUN("inspect", GOLDEN "README.md"), IC_EXIT_FILE);
    SAYS("README.md: neither a zip (torch.save) nor safetensors");
    assert_int_equal(RUN("inspect", GOLDEN "quantum_lifecycle"), IC_EXIT_FILE);
    SAYS("UNET or UNET_UNITARY?");
    assert_int_equal(STEP(GOLDEN "mlp-d8-b32", "/no/such/state"), IC_EXIT_FILE);
    assert_int_equal(STEP(GOLDEN "mlp-d8-b32", GOLDEN "unet-d4-b8/golden.safetensors"), IC_EXIT_FILE);
    SAYS("tensor psi_0 has shape [32, 32, 4, 2]; expected [H, W, 8, 2]");
    assert_int_equal(STEP(GOLDEN "mlp-d8-b32", GOLDEN "mlp-d8-b32/checkpoint_ep7.pth"), IC_EXIT_FILE);
    SAYS("no tensor psi or psi_0");
}

static void read_back(const char *path, const char *name, float **out, size_t *n)
{
    struct ic_err err = {0};
    struct ic_tensors *set;
    if (ic_tensors_open(path, &set, &err))
        fail_msg("%s: %s", path, err.msg);
    const struct ic_tensor *t = ic_tensors_find(set, name);
    assert_non_null(t);
    *n = (size_t)t->count * ic_dtype_info(t->dtype)->parts;
    *out = malloc(*n * sizeof **out);
    assert_int_equal(ic_tensors_read_f32(set, t, *out, *n, &err), IC_OK);
    ic_tensors_close(&set);
}

static void expect_close(const char *path, const char *name, const char *golden, const char *want_name)
{
    float *got, *want;
    size_t n, m;
    double worst = 0;
    read_back(path, name, &got, &n);
    read_back(golden, want_name, &want, &m);
    assert_int_equal(n, m);
    for (size_t i = 0; i < n; i++)
        worst = fmax(worst, fabs((double)got[i] - (double)want[i]));
    if (worst > 2e-5)
        fail_msg("%s: %.2e from %s", golden, worst, want_name);
    free(got);
    free(want);
}

/* Ten steps at once, and four then six: the memory travels in the file. */
static void steps_reach_the_golden_state(void **state)
{
    static const char *const folders[] = {"unet_unitary-d4-b16", "unet_convlstm-d4-b8", "snn_unet-d4-b16"};
    (void)state;
    for (int i = 0; i < 3; i++) {
        char law[256], golden[300];
        snprintf(law, sizeof law, GOLDEN "%s", folders[i]);
        snprintf(golden, sizeof golden, "%s/golden.safetensors", law);
        char *ten[] = {"law",   "step",   "--checkpoint", law,    "--state",   golden, "--steps", "10",
                       "--out", out_path, "--precision",  "fp32", "--backend", "ref",  NULL};
        assert_int_equal(run(ten), IC_EXIT_OK);
        SAYS("10 steps of");
        expect_close(out_path, "psi", golden, "psi_10.f64");
        ten[7] = "4";
        assert_int_equal(run(ten), IC_EXIT_OK);
        ten[5] = out_path; /* in place: read whole before it is replaced */
        ten[7] = "6";
        assert_int_equal(run(ten), IC_EXIT_OK);
        expect_close(out_path, "psi", golden, "psi_10.f64");
    }
}

/* [1,H,W,d] complex, as Atheria's snapshots are. */
static void complex_states_are_taken(void **state)
{
    struct ic_err err = {0};
    float *psi;
    size_t n;
    char in[] = "/tmp/ic-law-in-XXXXXX";
    const char *golden = GOLDEN "mlp-d8-b32/golden.safetensors";
    (void)state;
    read_back(golden, "psi_0", &psi, &n);
    const struct ic_safetensors_out out = {"psi", IC_DTYPE_C64, 4, {1, 24, 24, 8}, psi};
    close(mkstemp(in));
    assert_int_equal(ic_safetensors_write(in, &out, 1, NULL, 0, &err), IC_OK);
    assert_int_equal(STEP(GOLDEN "mlp-d8-b32", in, "--gamma", "0.01"), IC_EXIT_OK);
    expect_close(out_path, "psi", golden, "psi_1.f64");
    unlink(in);
    free(psi);
}

/* A quantised file, which needs neither config.json nor --arch, steps exactly as its original does when it
 * is given the same precision; and so near to float32 as its bits allow. */
static void a_quantised_file_steps(void **state)
{
    static const char *const ways[][2] = {
        {"fp16", "inc=fp16"}, {"bf16", "inc=bf16"}, {"nf4", "up1=bf16"}, {"nf4dq", "all=nf4"}};
    char file[] = "/tmp/ic-law-q-XXXXXX";
    const char *law = GOLDEN "unet_unitary-d4-b16",
               *golden = GOLDEN "unet_unitary-d4-b16/golden.safetensors";
    (void)state;
    close(mkstemp(file));
    for (int i = 0; i < 4; i++) {
        float *a, *b, *want;
        size_t n, m;
        double sum = 0;
        assert_int_equal(RUN("quantize", (char *)(uintptr_t)law, file, "--precision",
                             (char *)(uintptr_t)ways[i][0], "--law-policy", (char *)(uintptr_t)ways[i][1]),
                         IC_EXIT_OK);
        SAYS("bits each");
        assert_int_equal(STEP(file, (char *)(uintptr_t)golden), IC_EXIT_OK);
        read_back(out_path, "psi", &a, &n);
        assert_int_equal(STEP((char *)(uintptr_t)law, (char *)(uintptr_t)golden, "--precision",
                              (char *)(uintptr_t)ways[i][0], "--law-policy", (char *)(uintptr_t)ways[i][1]),
                         IC_EXIT_OK);
        read_back(out_path, "psi", &b, &m);
        assert_int_equal(n, m);
        assert_memory_equal(a, b, n * sizeof *a);
        read_back(golden, "psi_1.f64", &want, &m);
        for (size_t k = 0; k < n; k++)
            sum += ((double)a[k] - (double)want[k]) * ((double)a[k] - (double)want[k]);
        sum = sqrt(sum / (double)n);
        assert_true(sum > 1e-8 && sum < (i < 2 ? 0.003 : 0.1));
        free(a);
        free(b);
        free(want);
    }
    assert_int_equal(RUN("inspect", file), IC_EXIT_OK);
    SAYS("[128, 64, 3, 3]    nf4");
    assert_int_equal(STEP(file, (char *)(uintptr_t)golden, "--precision", "bf16"), IC_EXIT_FILE);
    SAYS("is stored as nf4");
    assert_int_equal(RUN("quantize", (char *)(uintptr_t)law, file, "--law-policy", "attic=nf4"),
                     IC_EXIT_FILE);
    SAYS("has no layer attic");
    assert_int_equal(RUN("quantize", (char *)(uintptr_t)law, "/no/such/folder/file"), IC_EXIT_FILE);
    assert_int_equal(RUN("quantize", (char *)(uintptr_t)law), IC_EXIT_USAGE);
    assert_int_equal(RUN("quantize", "a", "b", "c"), IC_EXIT_USAGE);
    unlink(file);
}

static void copy_file(const char *from, const char *to)
{
    static char bytes[8 << 20];
    int fd = open(from, O_RDONLY);
    ssize_t n = read(fd, bytes, sizeof bytes);
    close(fd);
    fd = open(to, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    assert_int_equal(write(fd, bytes, (size_t)n), n);
    close(fd);
}

/* The checkpoint under any of its names, what is no file, a file that may not grow: each refused, and all is
 * as it was, without remains beside it. */
static void what_must_not_be_written_over_stays(void **state)
{
    static char golden[] = GOLDEN "unet_unitary-d4-b16/golden.safetensors";
    char folder[] = "/tmp/ic-law-spare-XXXXXX", path[64], other[64];
    struct stat st;
    struct rlimit old, low;
    (void)state;
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/law.pth", folder);
    snprintf(other, sizeof other, "%s/other", folder);
    copy_file(GOLDEN "unet_unitary-d4-b16/checkpoint_ep7.pth", path);
    assert_int_equal(symlink(path, other), 0);
    for (int i = 0; i < 2; i++) {
        char *out = i ? other : path;
        assert_int_equal(RUN("quantize", path, out, "--arch", "UNET_UNITARY"), IC_EXIT_FILE);
        SAYS("that is the checkpoint");
        assert_int_equal(RUN("step", "--checkpoint", folder, "--arch", "UNET_UNITARY", "--state", golden,
                             "--steps", "1", "--out", out),
                         IC_EXIT_FILE);
        SAYS("that is the checkpoint");
        assert_int_equal(RUN("inspect", path, "--arch", "UNET_UNITARY"), IC_EXIT_OK);
    }
    unlink(other);
    assert_int_equal(mkfifo(other, 0600), 0);
    assert_int_equal(RUN("quantize", path, other, "--arch", "UNET_UNITARY"), IC_EXIT_FILE);
    SAYS("not a regular file");
    assert_int_equal(stat(other, &st), 0);
    assert_true(S_ISFIFO(st.st_mode));
    unlink(other);
    getrlimit(RLIMIT_FSIZE, &old);
    low = (struct rlimit){4096, old.rlim_max};
    setrlimit(RLIMIT_FSIZE, &low);
    const int rc = RUN("quantize", path, other, "--arch", "UNET_UNITARY");
    setrlimit(RLIMIT_FSIZE, &old);
    assert_int_equal(rc, IC_EXIT_FAILED);
    SAYS("File too large");
    unlink(path);
    assert_int_equal(rmdir(folder), 0); /* nothing else in it */
}

static void plan_prints_bytes_by_item(void **state)
{
    char *law = GOLDEN "unet_unitary-d4-b16";
    (void)state;
    assert_int_equal(RUN("plan", law, "--grid", "32", "--memory", "64"), IC_EXIT_OK);
    SAYS("simulation: psi                   32768 B");
    SAYS("fp32 on");
    SAYS("bf16 on");
    SAYS("nf4 on");
    SAYS("largest batch in 64 MiB");
    assert_int_equal(RUN("plan", law, "--precision", "nf4", "--batch", "auto", "--memory", "8"),
                     IC_EXIT_OK);
    assert_null(strstr(said, "fp32 on"));
    assert_int_equal(RUN("plan", law, "--batch", "some"), IC_EXIT_USAGE);
    assert_int_equal(RUN("plan", law, "--grid", "33"), IC_EXIT_FILE);
    assert_int_equal(RUN("plan"), IC_EXIT_USAGE);
}

static size_t lines_of(const char *path, const char *with)
{
    char line[512];
    size_t n = 0;
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    while (fgets(line, sizeof line, f))
        n += strstr(line, with) != NULL;
    fclose(f);
    return n;
}

/* The line that begins with `with`. */
static void line_of(const char *path, const char *with, char *out, int size)
{
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    do
        assert_non_null(fgets(out, size, f));
    while (strncmp(out, with, strlen(with)) != 0);
    fclose(f);
}

static void fidelity_judges(void **state)
{
    char *law = GOLDEN "unet_unitary-d4-b16", csv[] = "/tmp/ic-law-csv-XXXXXX",
         svg[] = "/tmp/ic-law-svg-XXXXXX";
    (void)state;
    close(mkstemp(csv));
    close(mkstemp(svg));
#define FIDELITY(...)                                                                                      \
    RUN("fidelity", "--law", law, "--grids", "8,12", "--seeds", "2", "--steps", "40", "--csv", csv,        \
        "--plot", svg, ##__VA_ARGS__)
    assert_int_equal(FIDELITY("--threshold", "900", "--layers", "yes"), IC_EXIT_OK);
    SAYS("verdict: nf4 passes");
    SAYS("grid 12x12, 2 seeds, 40 steps");
    SAYS("each layer alone in NF4");
    assert_int_equal(lines_of(csv, "8,nf4,mean,entropy"), 2); /* a line per seed */
    assert_int_equal(lines_of(csv, "8,nf4,batch,entropy"), 2 * 8);
    assert_int_equal(lines_of(csv, "12,bf16,overlap,"), 2 * 6); /* after 1, 2, 5, 10, 20, 40 steps */
    assert_int_equal(lines_of(svg, "<polyline"), 2 * 4);        /* grids, precisions */
    assert_int_equal(lines_of(svg, "</svg>"), 1);
    /* A law compared with itself departs by nothing, and everything in NF4 by more than nothing. */
    assert_int_equal(FIDELITY("--threshold", "0.0001", "--precisions", "fp32"), IC_EXIT_OK);
    SAYS("verdict: fp32 passes");
    /* two seeds cannot tell so small a difference; sixteen can */
    assert_int_equal(FIDELITY("--threshold", "0.0001", "--precisions", "fp32,nf4"), IC_EXIT_OK);
    SAYS("verdict: nf4 is undecided");
    assert_int_equal(RUN("fidelity", "--law", law, "--grids", "12", "--seeds", "16", "--steps", "40",
                         "--threshold", "0.0001", "--precisions", "fp32", "--law-policy", "all=nf4"),
                     IC_EXIT_FAILED);
    SAYS("verdict: fp32 passes");
    SAYS("verdict: nf4+policy FAILS");
    /* averages begin where they are told to; one seed says nothing about others, however small the
     * deviation */
    assert_int_equal(RUN("fidelity", "--law", law, "--grids", "8", "--seeds", "1", "--steps", "40",
                         "--spin-up", "30", "--threshold", "900", "--precisions", "bf16"),
                     IC_EXIT_OK);
    SAYS("means over steps 31 to 40");
    SAYS("verdict: bf16 is undecided");
    SAYS("one seed says nothing about others");
    /* more seeds than are stepped together: each starts from its own number, whoever else runs */
    char alone[128], among[128];
#define MANY(n, ...)                                                                                       \
    RUN("fidelity", "--law", law, "--grids", "8", "--seeds", n, "--steps", "4", "--threshold", "900",      \
        "--precisions", "bf16", "--csv", csv, ##__VA_ARGS__)
    assert_int_equal(MANY("2"), IC_EXIT_OK);
    line_of(csv, "8,bf16,mean,complexity,1,", alone, sizeof alone);
    assert_int_equal(MANY("67"), IC_EXIT_OK);
    SAYS("grid 8x8, 67 seeds, 4 steps");
    assert_int_equal(lines_of(csv, "8,bf16,mean,complexity,"), 67);
    line_of(csv, "8,bf16,mean,complexity,1,", among, sizeof among);
    assert_string_equal(alone, among);
    line_of(csv, "8,bf16,mean,complexity,65,", among, sizeof among); /* the second of its group */
    assert_string_not_equal(strrchr(alone, ','), strrchr(among, ','));
    assert_int_equal(MANY("2", "--first-seed", "66"), IC_EXIT_OK); /* the CSV counts from 0 */
    line_of(csv, "8,bf16,mean,complexity,65,", alone, sizeof alone);
    assert_string_equal(alone, among);
    assert_int_equal(RUN("fidelity", "--law", law, "--seeds", "4097"), IC_EXIT_USAGE);
    assert_int_equal(RUN("fidelity", "--law", law, "--first-seed", "0"), IC_EXIT_USAGE);
    assert_int_equal(RUN("fidelity", "--law", law, "--steps", "40", "--spin-up", "40"), IC_EXIT_USAGE);
    assert_int_equal(FIDELITY("--precisions", "fp12"), IC_EXIT_USAGE);
    assert_int_equal(RUN("fidelity"), IC_EXIT_USAGE);
    assert_int_equal(RUN("fidelity", "--law", law, "--seeds", "0"), IC_EXIT_USAGE);
    assert_int_equal(RUN("fidelity", "--law", law, "--steps", "3"), IC_EXIT_USAGE);
    assert_int_equal(RUN("fidelity", "--law", law, "--grids", "64,,x"), IC_EXIT_USAGE);
    assert_int_equal(RUN("fidelity", "--law", law, "--threshold", "-1"), IC_EXIT_USAGE);
    assert_int_equal(RUN("fidelity", "--law", law, "--plot", "/no/such/folder/x.svg"), IC_EXIT_FAILED);
    unlink(csv);
    unlink(svg);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(inspect_prints_what_the_file_is),
        cmocka_unit_test(wrong_command_lines_exit_2),
        cmocka_unit_test(bad_input_exits_4),
        cmocka_unit_test(steps_reach_the_golden_state),
        cmocka_unit_test(complex_states_are_taken),
        cmocka_unit_test(a_quantised_file_steps),
        cmocka_unit_test(what_must_not_be_written_over_stays),
        cmocka_unit_test(plan_prints_bytes_by_item),
        cmocka_unit_test(fidelity_judges),
    };
    return cmocka_run_group_tests(tests, make_out, remove_out);
}
