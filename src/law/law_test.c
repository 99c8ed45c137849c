/* From files to a law: what is inferred, what config.json says, what is refused and how. */
#include <setjmp.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <cmocka.h>

#include "law/fixture.h"
#include "law/plan.h"
#include "model/fixture.h"

/* ---- A folder to write in -------------------------------------------------------------------- */

static char folder[64];

static int make_folder(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/ic-law-test-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    char command[128];
    (void)state;
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    return system(command);
}

static const char *in_folder(const char *name)
{
    static char path[32][256];
    static unsigned turn;
    char *p = path[turn++ % 32];
    snprintf(p, sizeof path[0], "%s/%s", folder, name);
    return p;
}

static void write_text(const char *name, const char *text)
{
    FILE *f = fopen(in_folder(name), "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

/* ---- Checkpoints to order -------------------------------------------------------------------- */

struct edit { /* what to do to one tensor of an otherwise sound checkpoint */
    const char *name;
    enum { NOTHING, LEAVE_OUT, RESHAPE, SET } what;
    float value;
};

static void write_law(const char *name, enum ic_law_arch arch, unsigned d, unsigned b,
                      const struct edit *edit)
{
    struct ic_law_spec specs[IC_LAW_SPECS_MAX];
    struct ic_safetensors_out out[IC_LAW_SPECS_MAX + 1];
    struct ic_err err = {0};
    size_t n = ic_law_arch_specs(arch, d, b, specs), kept = 0;
    for (size_t i = 0; i < n; i++) {
        const struct ic_law_spec *s = &specs[i];
        size_t count = (size_t)s->dim[0] * s->dim[1] * s->dim[2] * s->dim[3];
        bool hit = edit && strcmp(edit->name, s->name) == 0;
        float *data = calloc(count, sizeof *data);
        for (size_t k = 0; k < count; k++)
            data[k] = s->optional ? s->standard : 0.01f * (float)(k % 7);
        if (hit && edit->what == SET)
            data[count - 1] = edit->value;
        out[kept] = (struct ic_safetensors_out){
            .name = s->name, .dtype = IC_DTYPE_F32, .ndim = s->ndim, .data = data};
        for (unsigned k = 0; k < s->ndim; k++)
            out[kept].shape[k] = s->dim[k];
        if (hit && edit->what == RESHAPE) {
            out[kept].ndim = 1;
            out[kept].shape[0] = (int64_t)count;
        }
        if (hit && edit->what == LEAVE_OUT)
            free(data);
        else
            kept++;
    }
    assert_int_equal(ic_safetensors_write(in_folder(name), out, kept, NULL, 0, &err), IC_OK);
    for (size_t i = 0; i < kept; i++)
        free((void *)(uintptr_t)out[i].data);
}

static struct ic_law *open_law(const char *path, const char *arch, const char *config)
{
    struct ic_law *law;
    struct ic_err err = {0};
    if (ic_law_open(path, &(struct ic_law_open_opts){.arch = arch, .config = config}, &law, &err))
        fail_msg("%s: %s", path, err.msg);
    return law;
}

static void open_fails(const char *path, const char *arch, const char *config, enum ic_status code,
                       const char *why)
{
    struct ic_law *law = (void *)1;
    struct ic_err err = {0};
    enum ic_status s =
        ic_law_open(path, &(struct ic_law_open_opts){.arch = arch, .config = config}, &law, &err);
    if (s == IC_OK)
        fail_msg("opened; expected: %s", why);
    assert_null(law);
    if (s != code || !strstr(err.msg, why))
        fail_msg("%s \"%s\" lacks \"%s\"", ic_status_name(s), err.msg, why);
}

/* ---- Tests ----------------------------------------------------------------------------------- */

static void atheria_checkpoints_load(void **state)
{
    static const struct {
        const char *folder, *arch;
        enum ic_law_arch want;
        unsigned d, b;
        uint64_t params;
    } rows[] = {
        {"deep_qca-d4-b32", NULL, IC_LAW_DEEP_QCA, 4, 32,
         16 * 4 * 9 + 32 * 64 + 32 + 32 * 32 + 32 + 8 * 32 + 8},
        {"mlp-d8-b32", NULL, IC_LAW_MLP, 8, 32, 32 * 16 + 32 + 32 * 32 + 32 + 16 * 32 + 16},
        {"snn_unet-d4-b16", NULL, IC_LAW_SNN_UNET, 4, 16, 12632},
        {"unet-d4-b8", NULL, IC_LAW_UNET, 4, 8, 110072},
        {"unet_convlstm-d4-b8", NULL, IC_LAW_UNET_CONVLSTM, 4, 8, 110072 + 1152 * 64 + 16 * 8},
        {"unet_unitary-d4-b16", NULL, IC_LAW_UNET_UNITARY, 4, 16, 437608},
        {"unet_unitary-d5-b10", NULL, IC_LAW_UNET_UNITARY, 5, 10, 171770},
        {"unet_unitary_rmsnorm-d4-b8", NULL, IC_LAW_UNET_UNITARY_RMSNORM, 4, 8, 109752},
        {"quantum_lifecycle", "UNET_UNITARY", IC_LAW_UNET_UNITARY, 4, 16, 437608},
    };
    (void)state;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        char path[512];
        snprintf(path, sizeof path, "%s/golden/%s", IC_TEST_DIR, rows[i].folder);
        struct ic_law *law = open_law(path, rows[i].arch, NULL);
        print_message("%s: %llu parameters\n", rows[i].folder, (unsigned long long)law->params);
        assert_int_equal(law->arch, rows[i].want);
        assert_int_equal(law->d, rows[i].d);
        assert_int_equal(law->b, rows[i].b);
        assert_int_equal(law->params, rows[i].params);
        assert_int_equal(law->product, rows[i].want == IC_LAW_UNET_UNITARY);
        assert_int_equal(law->memory, rows[i].want == IC_LAW_UNET_CONVLSTM);
        assert_int_equal(law->has_config, rows[i].arch == NULL);
        if (law->has_config) {
            assert_string_equal(law->name, rows[i].folder);
            /* a trainer's file says its own inside (3, 5); a bare one is known by its name (7), from which
             * the step is taken in any case */
            assert_true(law->episode >= 3 && law->episode <= 7);
            assert_int_equal(law->initial_step, 700);
        }
        ic_law_close(&law);
    }
}

static void tensors_decide_where_nobody_says(void **state)
{
    (void)state;
    for (unsigned arch = 0; arch < IC_LAW_ARCH_COUNT; arch++) {
        write_law("x_ep12.safetensors", (enum ic_law_arch)arch, 3, 5, NULL);
        const char *path = in_folder("x_ep12.safetensors");
        if (arch == IC_LAW_UNET || arch == IC_LAW_UNET_UNITARY) {
            open_fails(path, NULL, NULL, IC_BAD_REQUEST, "UNET or UNET_UNITARY?");
            continue;
        }
        struct ic_law *law = open_law(path, NULL, NULL);
        assert_int_equal(law->arch, arch);
        assert_int_equal(law->d, 3);
        assert_int_equal(law->b, 5);
        assert_string_equal(law->name, "x_ep12");
        assert_string_equal(law->initial_mode, "complex_noise");
        assert_true(law->gamma == 0.01f);
        assert_int_equal(law->episode, 12);
        assert_int_equal(law->initial_step, 1200);
        ic_law_close(&law);
    }
}

static void said_and_found_must_agree(void **state)
{
    (void)state;
    write_law("u.safetensors", IC_LAW_UNET, 2, 8, NULL);
    const char *u = in_folder("u.safetensors");
    open_fails(u, "MLP", NULL, IC_BAD_REQUEST,
               "--arch says MLP, but the tensors are those of UNET or UNET_UNITARY");
    open_fails(u, "UNET_UNITARIA", NULL, IC_BAD_REQUEST,
               "architecture UNET_UNITARIA is none of UNET, UNET_UNITARY,");
    write_text("c.json", "{\"MODEL_ARCHITECTURE\": \"SNN_UNET\"}");
    open_fails(u, NULL, in_folder("c.json"), IC_BAD_REQUEST, "config.json says SNN_UNET");
    struct ic_law *law =
        open_law(u, "UNET_UNITARY", in_folder("c.json")); /* the option has the last word */
    assert_true(law->product);
    ic_law_close(&law);
    write_text(
        "c.json",
        "{\"MODEL_ARCHITECTURE\": \"UNET\", \"D_STATE\": 8, \"MODEL_PARAMS\": {\"hidden_channels\": 8}}");
    open_fails(u, NULL, in_folder("c.json"), IC_BAD_REQUEST,
               "tensor inc.conv_block.0.weight has shape [8, 4, 3, 3]; expected [8, 16, 3, 3]");
}

static void shapes_and_names_are_strict(void **state)
{
    static const struct {
        enum ic_law_arch arch;
        struct edit edit;
        const char *why;
    } rows[] = {
        {IC_LAW_UNET,
         {"bot.conv_block.4.bias", LEAVE_OUT, 0},
         "tensor bot.conv_block.4.bias [32] is missing"},
        {IC_LAW_UNET, {"outc.weight", LEAVE_OUT, 0}, "tensor outc.weight is missing"},
        {IC_LAW_UNET,
         {"outc.weight", RESHAPE, 0},
         "tensor outc.weight has shape [16]; expected [2d, b, 1, 1]"},
        {IC_LAW_UNET,
         {"up1.weight", RESHAPE, 0},
         "tensor up1.weight has shape [2048]; expected [32, 16, 2, 2]"},
        {IC_LAW_UNET, {"up1.bias", SET, NAN}, "tensor up1.bias holds NaN"},
        {IC_LAW_UNET, {"outc.bias", SET, INFINITY}, "tensor outc.bias holds an infinity"},
        {IC_LAW_SNN_UNET,
         {"lif2.threshold", SET, 0},
         "tensor lif2.threshold is 0; a threshold must be positive"},
        {IC_LAW_DEEP_QCA,
         {"conv_neighbors.weight", LEAVE_OUT, 0},
         "tensor conv_neighbors.weight [32, 1, 3, 3]"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        write_law("s.safetensors", rows[i].arch, 2, 4, &rows[i].edit);
        open_fails(in_folder("s.safetensors"), ic_law_arch_info(rows[i].arch)->name, NULL, IC_BAD_REQUEST,
                   rows[i].why);
    }
    write_law("s.safetensors", IC_LAW_SNN_UNET, 2, 4, &(struct edit){"lif2.threshold", SET, 0.5f});
    struct ic_law *law = open_law(in_folder("s.safetensors"), NULL, NULL);
    assert_true(law->weights[ic_law_weight_find(law, "lif2.threshold")].data[0] == 0.5f);
    assert_true(law->weights[ic_law_weight_find(law, "lif1.threshold")].data[0] == 1.0f);
    struct ic_law_plan *plan;
    assert_int_equal(ic_law_plan_open(law, 3, 3, 1, ic_law_tensor_bytes_nchw, &plan, NULL), IC_OK);
    unsigned seen = 0;
    for (size_t i = 0; i < plan->op_count; i++)
        seen += plan->ops[i].act == IC_LAW_ACT_SPIKE && plan->ops[i].spike_at == 0.5f;
    assert_int_equal(seen, 1);
    ic_law_plan_close(&plan);
    ic_law_close(&law);
}

/* A torch file of a whole UNET whose tensors are all views of one storage: {key: {wrapper + name: …}, "config": …}.
 * `skip`: how many tensors from `from` on are left out. */
static const char *write_torch(const char *name, const char *key, const char *const wrappers[2],
                               size_t from, size_t skip, const char *const config[][2])
{
    struct ic_law_spec specs[IC_LAW_SPECS_MAX];
    const size_t n = ic_law_arch_specs(IC_LAW_UNET, 1, 1, specs);
    static float zeros[8 * 4 * 9 * 2];
    struct ic_buf p = {0}, b = {0};
    pk_begin(&p);
    ic_buf_puts(&p, "}");
    pk_str(&p, key);
    ic_buf_puts(&p, "}(");
    for (size_t i = 0; i < n; i++) {
        char full[IC_LAW_TENSOR_NAME_MAX + 32];
        int32_t size[4], stride[4], step = 1;
        if (i >= from && i < from + skip)
            continue;
        for (unsigned k = specs[i].ndim; k-- > 0; step *= size[k]) {
            size[k] = (int32_t)specs[i].dim[k];
            stride[k] = step;
        }
        snprintf(full, sizeof full, "%.30s%.47s", wrappers[i == n - 1], specs[i].name);
        pk_str(&p, full);
        pk_tensor(&p, "FloatStorage", "0", (int32_t)(sizeof zeros / 4), 0, specs[i].ndim, size, stride);
    }
    ic_buf_puts(&p, "us");
    if (config) {
        pk_str(&p, "config");
        ic_buf_puts(&p, "}(");
        for (size_t i = 0; config[i][0]; i++) {
            pk_str(&p, config[i][0]);
            if (config[i][1][0] >= '0' && config[i][1][0] <= '9')
                pk_int(&p, atoi(config[i][1]));
            else
                pk_str(&p, config[i][1]);
        }
        pk_str(&p, "MODEL_PARAMS");
        ic_buf_puts(&p, "}");
        pk_str(&p, "d_state");
        ic_buf_puts(&p, "K\x01sus");
    }
    ic_buf_puts(&p, ".");
    struct zip_entry e[2] = {zip_stored("m/data.pkl", p.data, p.len),
                             zip_stored("m/data/0", zeros, sizeof zeros)};
    zip_write(&b, e, 2);
    FILE *f = fopen(in_folder(name), "w");
    assert_non_null(f);
    fwrite(b.data, 1, b.len, f);
    fclose(f);
    ic_buf_deinit(&p);
    ic_buf_deinit(&b);
    return in_folder(name);
}

static void wrappers_leave_the_names(void **state)
{
    static const char *const alike[][2] = {{"module.", "module."},
                                           {"model.", "model."},
                                           {"module._orig_mod.", "module._orig_mod."},
                                           {"a.b.c.", "a.b.c."}};
    (void)state;
    for (size_t i = 0; i < sizeof alike / sizeof alike[0]; i++)
        for (int k = 0; k < 2; k++) {
            const char *path = write_torch("w.pth", k ? "model" : "state_dict", alike[i], 0, 0, NULL);
            struct ic_law *law = open_law(path, "UNET", NULL);
            assert_int_equal(law->d, 1);
            ic_law_close(&law);
        }
    const char *path =
        write_torch("w.pth", "state_dict", (const char *const[2]){"module.", ""}, 41, 0, NULL);
    struct ic_law *law = open_law(path, "UNET", NULL); /* a name outside the wrapper stays what it is */
    ic_law_close(&law);
}

static void a_config_inside_the_checkpoint_counts(void **state)
{
    static const char *const plain[2] = {"", ""};
    static const char *const good[][2] = {{"MODEL_ARCHITECTURE", "UNET_UNITARY"},
                                          {"GRID_SIZE_TRAINING", "48"},
                                          {"EXPERIMENT_NAME", "inner"},
                                          {0}};
    static const char *const polar[][2] = {
        {"MODEL_ARCHITECTURE", "UNET_UNITARY"}, {"ENGINE_TYPE", "POLAR"}, {0}};
    (void)state;
    struct ic_law *law = open_law(write_torch("c.pth", "model_state_dict", plain, 0, 0, good), NULL, NULL);
    assert_int_equal(law->arch, IC_LAW_UNET_UNITARY);
    assert_int_equal(law->grid_training, 48);
    assert_string_equal(law->name, "inner");
    ic_law_close(&law);
    const char *path = write_torch("c.pth", "model_state_dict", plain, 0, 0, polar);
    open_fails(path, NULL, NULL, IC_BAD_REQUEST, "inside the checkpoint, config: ENGINE_TYPE POLAR");
    write_text("outer.json", "{\"MODEL_ARCHITECTURE\": \"UNET\", \"EXPERIMENT_NAME\": \"outer\"}");
    law = open_law(path, NULL, in_folder("outer.json")); /* config.json has the last word */
    assert_int_equal(law->arch, IC_LAW_UNET);
    assert_string_equal(law->name, "outer");
    ic_law_close(&law);
}

static void what_is_missing_is_named(void **state)
{
    static const char *const plain[2] = {"", ""};
    (void)state;
    open_fails(
        write_torch("l.pth", "state_dict", plain, 18, 3, NULL), "UNET", NULL, IC_BAD_REQUEST,
        "tensor bot.conv_block.0.weight [8, 4, 3, 3] is missing, and 2 more: bot.conv_block.1.weight, "
        "bot.conv_block.1.bias");
    open_fails(write_torch("l.pth", "state_dict", plain, 3, 37, NULL), "UNET", NULL, IC_BAD_REQUEST,
               "and 36 more: ");
    /* also where the missing one is what the family is known by */
    open_fails(write_torch("l.pth", "state_dict", plain, 2, 1, NULL), "UNET", NULL, IC_BAD_REQUEST,
               "tensor inc.conv_block.1.bias [1] is missing");
    write_law("l.safetensors", IC_LAW_UNET_CONVLSTM, 2, 4,
              &(struct edit){"conv_gates.weight", LEAVE_OUT, 0});
    open_fails(in_folder("l.safetensors"), "UNET_CONVLSTM", NULL, IC_BAD_REQUEST,
               "tensor conv_gates.weight [64, 32, 3, 3] is missing");
    write_law("l.safetensors", IC_LAW_MLP, 2, 4, &(struct edit){"net.0.weight", LEAVE_OUT, 0});
    open_fails(in_folder("l.safetensors"), NULL, NULL, IC_BAD_REQUEST,
               "tensor net.0.weight [4, 4, 1, 1] is missing");
}

/* A [1]-shaped scalar, as some snnTorch versions keep it, is taken too. */
static void scalars_may_be_vectors_of_one(void **state)
{
    (void)state;
    write_law("v.safetensors", IC_LAW_SNN_UNET, 1, 2, &(struct edit){"lif1.beta", RESHAPE, 0});
    struct ic_law *law = open_law(in_folder("v.safetensors"), NULL, NULL);
    ic_law_close(&law);
}

static void config_is_typed(void **state)
{
    static const struct {
        const char *json, *why;
    } rows[] = {
        {"{\"GAMMA_DECAY\": \"0.01\"}", "config: GAMMA_DECAY is not a number"},
        {"{\"GAMMA_DECAY\": 1e300}", "config: GAMMA_DECAY is not a number of sensible size"},
        {"{\"GAMMA_DECAY\": NaN}", "bad.json: config: GAMMA_DECAY is not a number"},
        {"{\"D_STATE\": -Infinity}", "config: D_STATE is not a whole number"},
        {"{\"D_STATE\": 18446744073709551618}", "config: D_STATE is not a whole number"},
        {"{\"EXPERIMENT_NAME\": Nan}", "config: line 1"},
        {"{\"D_STATE\": 2.5}", "config: D_STATE is not a whole number from 1 to 256"},
        {"{\"MODEL_PARAMS\": {\"d_state\": 0}}", "config: d_state is not a whole number"},
        {"{\"MODEL_PARAMS\": [8]}", "config: MODEL_PARAMS is not an object"},
        {"{\"MODEL_ARCHITECTURE\": 3}", "config: MODEL_ARCHITECTURE is not a string"},
        {"{\"ENGINE_TYPE\": \"POLAR\"}", "config: ENGINE_TYPE POLAR steps by other rules"},
        {"{\"EXPERIMENT_NAME\": \"a\", \"EXPERIMENT_NAME\": \"b\"}", "duplicate"},
        {"[1]", "config: not a JSON object"},
        {"{", "config: line 1"},
        {"", "config: line 1"},
    };
    (void)state;
    write_law("m.safetensors", IC_LAW_MLP, 2, 4, NULL);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        write_text("bad.json", rows[i].json);
        open_fails(in_folder("m.safetensors"), NULL, in_folder("bad.json"), IC_BAD_REQUEST, rows[i].why);
    }
    open_fails(in_folder("m.safetensors"), NULL, in_folder("absent.json"), IC_NOT_FOUND, "absent.json");
    write_text(
        "good.json",
        "{\"D_STATE\": 9, \"MODEL_PARAMS\": {\"d_state\": 2.0, \"alpha\": null}, \"GAMMA_DECAY\": -1,"
        " \"HIDDEN_CHANNELS\": null, \"ENGINE_TYPE\": \"PYTHON\", \"EXPERIMENT_NAME\": \"m\\u00e9\","
        " \"INITIAL_STATE_MODE_INFERENCE\": \"random\", \"QCA_STEPS_TRAINING\": 16,"
        " \"best\": [NaN, -Infinity,Infinity], \"seed\": 18446744073709551616, \"note\": \"\\\"NaN\"}");
    struct ic_law *law = open_law(in_folder("m.safetensors"), NULL, in_folder("good.json"));
    assert_int_equal(law->d, 2);
    assert_true(law->gamma == -1);
    assert_string_equal(law->name, "m\xC3\xA9");
    assert_string_equal(law->initial_mode, "random");
    assert_int_equal(law->steps_training, 16);
    ic_law_close(&law);
}

static void a_folder_means_its_latest_checkpoint(void **state)
{
    (void)state;
    assert_int_equal(mkdir(in_folder("training_checkpoints"), 0700) | mkdir(in_folder("experiments"), 0700),
                     0);
    assert_int_equal(
        mkdir(in_folder("training_checkpoints/exp"), 0700) | mkdir(in_folder("experiments/exp"), 0700), 0);
    open_fails(in_folder("training_checkpoints/exp"), NULL, NULL, IC_NOT_FOUND, "holds no .pth file");
    write_law("training_checkpoints/exp/checkpoint_ep9.pth", IC_LAW_MLP, 2, 4, NULL);
    write_law("training_checkpoints/exp/checkpoint_ep10.pth", IC_LAW_MLP, 3, 4, NULL);
    write_law("training_checkpoints/exp/best_model.pth", IC_LAW_MLP, 1, 4, NULL);
    write_law("training_checkpoints/exp/snapshot_ep99.pt", IC_LAW_MLP, 1, 4, NULL);
    write_text("experiments/exp/config.json", "{\"EXPERIMENT_NAME\": \"exp\", \"GAMMA_DECAY\": 0.25}");
    struct ic_law *law = open_law(in_folder("training_checkpoints/exp"), NULL, NULL);
    assert_int_equal(law->d, 3); /* 10 > 9: numbers, not text; best_model ranks 0 */
    assert_true(law->gamma == 0.25f);
    ic_law_close(&law);
    law = open_law(in_folder("training_checkpoints/exp/best_model.pth"), NULL, NULL);
    assert_int_equal(law->d, 1);
    assert_int_equal(law->episode, -1);
    ic_law_close(&law);
    write_text("training_checkpoints/exp/config.json", "{\"GAMMA_DECAY\": 0.5}"); /* nearer */
    law = open_law(in_folder("training_checkpoints/exp/"), NULL, NULL);
    assert_true(law->gamma == 0.5f);
    ic_law_close(&law);
    open_fails(in_folder("nothing"), NULL, NULL, IC_NOT_FOUND, "nothing");
}

static void strangers_are_named(void **state)
{
    struct ic_err err = {0};
    const float v[2] = {1, 2};
    const struct ic_safetensors_out out = {"layer.weight", IC_DTYPE_F32, 1, {2}, v};
    (void)state;
    assert_int_equal(ic_safetensors_write(in_folder("o.safetensors"), &out, 1, NULL, 0, &err), IC_OK);
    open_fails(in_folder("o.safetensors"), NULL, NULL, IC_BAD_REQUEST,
               "1 tensors (safetensors), but not those of any");
    const struct ic_safetensors_out huge[2] = {{"net.0.weight", IC_DTYPE_F32, 1, {2}, v},
                                               {"net.4.weight", IC_DTYPE_F32, 4, {2, 0, 1, 1}, v}};
    assert_int_equal(ic_safetensors_write(in_folder("o.safetensors"), huge, 2, NULL, 0, &err), IC_OK);
    open_fails(in_folder("o.safetensors"), NULL, NULL, IC_BAD_REQUEST,
               "net.4.weight has shape [2, 0, 1, 1]");
}

/* A real checkpoint cut at every byte, then with single bits flipped: refused or equal, never a crash. */
static void damaged_real_checkpoints_are_survived(void **state)
{
    char from[512];
    (void)state;
    snprintf(from, sizeof from, "%s/golden/mlp-d8-b32/checkpoint_ep7.pth", IC_TEST_DIR);
    FILE *f = fopen(from, "rb");
    static unsigned char bytes[16384];
    size_t n = f ? fread(bytes, 1, sizeof bytes, f) : 0;
    assert_in_range(n, 1000, sizeof bytes - 1);
    fclose(f);
    const char *path = in_folder("damaged.pth");
    int fd = open(path, O_RDWR | O_CREAT, 0600);
    assert_int_equal(write(fd, bytes, n), n);
    struct ic_law *sound = open_law(path, NULL, NULL), *law;
    struct fixture_rng rng = {1};
    size_t same = 0, tries = 3000;
    for (size_t i = 0; i < tries; i++) {
        struct ic_err err = {0};
        size_t at = fixture_bits(&rng) % n;
        unsigned char damaged = (unsigned char)(bytes[at] ^ 1u << fixture_bits(&rng) % 8);
        assert_int_equal(pwrite(fd, &damaged, 1, (off_t)at), 1);
        if (ic_law_open(path, NULL, &law, &err) == IC_OK) {
            same++;
            assert_int_equal(law->weight_bytes, sound->weight_bytes);
            assert_memory_equal(law->data, sound->data, sound->weight_bytes);
            ic_law_close(&law);
        }
        assert_int_equal(pwrite(fd, bytes + at, 1, (off_t)at), 1);
    }
    print_message("%zu flipped bits: %zu refused, %zu without effect\n", tries, tries - same, same);
    while (n-- > 0) {
        struct ic_err err = {0};
        assert_int_equal(ftruncate(fd, (off_t)n), 0);
        assert_int_equal(ic_law_open(path, NULL, &law, &err), IC_BAD_REQUEST);
    }
    close(fd);
    ic_law_close(&sound);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(atheria_checkpoints_load),
        cmocka_unit_test(tensors_decide_where_nobody_says),
        cmocka_unit_test(said_and_found_must_agree),
        cmocka_unit_test(shapes_and_names_are_strict),
        cmocka_unit_test(wrappers_leave_the_names),
        cmocka_unit_test(a_config_inside_the_checkpoint_counts),
        cmocka_unit_test(what_is_missing_is_named),
        cmocka_unit_test(scalars_may_be_vectors_of_one),
        cmocka_unit_test(config_is_typed),
        cmocka_unit_test(a_folder_means_its_latest_checkpoint),
        cmocka_unit_test(strangers_are_named),
        cmocka_unit_test(damaged_real_checkpoints_are_survived),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
