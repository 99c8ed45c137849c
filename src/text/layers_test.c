/* The layer plan over made-up models and cards, and the reading of llama.cpp's log. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>
#include <ggml.h>

#include "text/meter.h"
#include "text/plan.h"

#define KIB (UINT64_C(1) << 10)
#define MIB (UINT64_C(1) << 20)

static struct ic_gguf_facts facts;
static struct ic_plan_device devices[IC_PLAN_DEVICES_MAX];
static struct ic_plan_in in;
static struct ic_plan plan;

/* Sizes in MiB; `row`: numbers of K, and of V, per token and layer. */
static void make_model(uint32_t layers, uint64_t layer, uint64_t embd, uint64_t output, uint32_t row)
{
    facts = (struct ic_gguf_facts){.arch = "test",
                                   .n_layers = layers,
                                   .n_files = 1,
                                   .embd_bytes = embd * MIB,
                                   .input_bytes = embd * MIB,
                                   .output_bytes = output * MIB,
                                   .tied = output == 0};
    for (uint32_t i = 0; i < layers; i++)
        facts.layer[i] = (struct ic_gguf_layer){.bytes = layer * MIB, .k_row = row, .v_row = row};
    in = (struct ic_plan_in){
        .facts = &facts, .kv_scale = 1, .devices = devices, .exactly = -1, .at_most = INT32_MAX};
    in.kv = (struct ic_gguf_kv){.cells = 4096,
                                .sequences = 64,
                                .batch = 512,
                                .k_type = GGML_TYPE_F16,
                                .v_type = GGML_TYPE_F16,
                                .swa_full = true};
}

static void add_card(uint64_t free_mib, uint64_t margin, uint64_t compute)
{
    devices[in.n_devices] = (struct ic_plan_device){.name = "GPU",
                                                    .desc = "test",
                                                    .total = 3072 * MIB,
                                                    .free = free_mib * MIB,
                                                    .margin = margin * MIB,
                                                    .context = 96 * MIB,
                                                    .compute = compute * MIB};
    in.n_devices++;
}

/* What must hold of every plan that fits. */
static void check_plan(void)
{
    int32_t sum = 0, next = (int32_t)facts.n_layers;

    for (int d = (int)in.n_devices - 1; d >= 0; d--) {
        const struct ic_plan_share *s = &plan.device[d];
        int32_t n = s->layers + s->output;
        assert_int_equal(n, (int32_t)plan.split[d]);
        assert_true(s->left >= 0 || !plan.fits);
        assert_int_equal(s->used != 0, n > 0);
        if (n > 0)
            assert_int_equal(s->first + n - 1, next);
        next -= n;
        sum += n;
    }
    assert_int_equal(sum, plan.layers);
    uint64_t kv = plan.host_kv, all = 0;
    for (unsigned d = 0; d < in.n_devices; d++)
        kv += plan.device[d].kv;
    for (uint32_t i = 0; i < facts.n_layers; i++)
        all += ic_gguf_kv_bytes(&facts, i, &in.kv);
    assert_int_equal(kv, all);
}

static int32_t layers_on_1060(uint32_t cells, uint64_t margin)
{
    in.kv.cells = cells;
    in.n_devices = 0;
    add_card(2900, margin, 100);
    ic_plan_make(&plan, &in);
    assert_true(plan.fits);
    check_plan();
    return plan.layers;
}

/* Q4 shapes of 1, 3 and 7 billion weights on a GTX 1060 of 3 GiB, of which a desktop leaves 2900 MiB: 2192
 * MiB are for layers and caches with the usual margin. */
static void a_small_card(void **state)
{
    static const struct {
        uint32_t layers;
        uint64_t layer, embd, output;
        uint32_t row, cells;
        uint64_t margin;
        int32_t placed;
    } rows[] = {
        {22, 27, 35, 51, 256, 8192, 512, 23},    /* 1B: 645 + 176 of cache: all */
        {22, 27, 35, 51, 256, 65536, 512, 23},   /* 645 + 1408 */
        {22, 27, 35, 51, 256, 131072, 512, 14},  /* 27 + 128 a layer: 13 and the output */
        {28, 52, 308, 0, 1024, 4096, 512, 28},   /* 3B, tied output 308: 52 + 16 a layer: 27 */
        {28, 52, 308, 0, 1024, 2048, 512, 29},   /* a smaller cache: all */
        {28, 52, 308, 0, 1024, 16384, 512, 17},  /* 52 + 64 a layer: 16 */
        {28, 52, 308, 0, 1024, 4096, 0, 29},     /* the margin costs a layer */
        {28, 52, 308, 0, 1024, 4096, 1024, 21},  /* and a double one eight */
        {32, 118, 70, 103, 4096, 4096, 512, 12}, /* 7B with 32 heads of KV: 118 + 64: 11 */
        {32, 118, 70, 103, 1024, 4096, 512, 16}, /* with 8: 118 + 16: 15 */
    };

    (void)state;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        make_model(rows[i].layers, rows[i].layer, rows[i].embd, rows[i].output, rows[i].row);
        assert_int_equal(layers_on_1060(rows[i].cells, rows[i].margin), rows[i].placed);
        if (plan.layers == plan.layers_max)
            continue; /* else one more would not have fitted */
        uint64_t one = rows[i].layer * MIB + ic_gguf_kv_bytes(&facts, 0, &in.kv);
        assert_true((uint64_t)plan.device[0].left < one);
    }
}

static void more_cache_fewer_layers(void **state)
{
    int32_t before = 33;

    (void)state;
    make_model(32, 118, 70, 103, 1024);
    for (uint32_t cells = 256; cells <= 1 << 20; cells *= 2) {
        int32_t now = layers_on_1060(cells, 512);
        assert_true(now <= before);
        before = now;
    }
    assert_int_equal(before, 1); /* the output has no cache */
}

static void no_card_or_a_tiny_one(void **state)
{
    (void)state;
    make_model(22, 27, 35, 51, 256);
    ic_plan_make(&plan, &in);
    assert_int_equal(plan.layers, 0);
    assert_true(plan.fits);
    assert_int_equal(plan.host_weights / MIB, 22 * 27 + 35 + 51);
    for (uint64_t mib = 0; mib < 740;
         mib += 20) { /* 512 margin + 96 context + 80 buffers + 51 output = 739 */
        in.n_devices = 0;
        add_card(mib, 512, 80);
        ic_plan_make(&plan, &in);
        assert_int_equal(plan.layers, 0);
        assert_int_equal(plan.device[0].used, 0);
        check_plan();
    }
    in.n_devices = 0;
    add_card(740, 512, 80);
    ic_plan_make(&plan, &in);
    assert_int_equal(plan.layers, 1);
    assert_true(plan.device[0].output);
}

static void others_hold_some_of_it(void **state)
{
    (void)state;
    make_model(22, 27, 35, 51, 256);
    add_card(1200, 512, 80);
    ic_plan_make(&plan, &in);
    int32_t alone = plan.layers;
    devices[0].held = 200 * MIB;
    ic_plan_make(&plan, &in);
    assert_true(plan.layers > 0 && plan.layers < alone);
    check_plan();
    devices[0].held = 2000 * MIB;
    ic_plan_make(&plan, &in);
    assert_int_equal(plan.layers, 0);
}

static void as_many_as_asked_for(void **state)
{
    (void)state;
    make_model(22, 27, 35, 51, 256);
    add_card(3000, 512, 80);
    for (int32_t n = 0; n <= 23; n++) {
        in.exactly = n;
        ic_plan_make(&plan, &in);
        assert_int_equal(plan.layers, n);
        assert_true(plan.fits);
        check_plan();
    }
    in.exactly = 1000;
    ic_plan_make(&plan, &in);
    assert_int_equal(plan.layers, 23);
    for (uint64_t mib = 0; mib <= 900; mib += 300) { /* too small, down to nothing at all */
        in.n_devices = 0;
        add_card(mib, 512, 80);
        ic_plan_make(&plan, &in);
        assert_int_equal(plan.layers, 23);
        assert_false(plan.fits);
        assert_true(plan.device[0].left < 0);
        check_plan();
    }
    in.exactly = -1;
    in.at_most = 5;
    in.n_devices = 0;
    add_card(3000, 512, 80);
    ic_plan_make(&plan, &in);
    assert_int_equal(plan.layers, 5);
}

static void several_cards(void **state)
{
    (void)state;
    make_model(32, 118, 70, 103, 1024);
    add_card(3000, 512, 100);
    add_card(6000, 512, 100);
    ic_plan_make(&plan,
                 &in); /* 4391 + 52 MiB of padding-free items over 2392 + 5392: all, by what is free */
    assert_int_equal(plan.layers, 33);
    check_plan();
    assert_in_range((int)plan.split[0], 9, 11);
    assert_in_range((int)plan.split[1], 22, 24);
    in.n_devices = 0;
    add_card(3000, 512, 100);
    add_card(2000, 512, 100);
    add_card(400, 512, 100); /* nothing fits here: it must not get a context */
    ic_plan_make(&plan, &in);
    assert_true(plan.layers > 20 && plan.layers < 33);
    assert_int_equal((int)plan.split[2], 0);
    assert_int_equal(plan.device[2].used, 0);
    assert_true(plan.device[1].output);
    check_plan();
}

static void a_measured_cache_is_believed(void **state)
{
    (void)state;
    make_model(22, 27, 35, 51, 256);
    in.kv.cells = 65536;
    add_card(1600, 512, 80);
    ic_plan_make(&plan, &in);
    int32_t by_facts = plan.layers;
    in.kv_scale = 2;
    ic_plan_make(&plan, &in);
    assert_true(plan.layers < by_facts);
}

static void keep_line(void *arg, const char *text)
{
    strncat(arg, text, 4000 - strlen(arg));
    strncat(arg, "\n", 4000 - strlen(arg));
}

static void the_table_names_every_item(void **state)
{
    static const char *const wanted[] = {"layers 17-27 and the output",
                                         "KV cache of 11 layers, 16384 tokens",
                                         "compute buffers (estimated)",
                                         "driver context",
                                         "safety margin",
                                         "held by others",
                                         "left",
                                         "decided: 12 of 29 layers"};
    static char text[4096];

    (void)state;
    make_model(28, 52, 308, 0, 1024);
    in.kv.cells = 16384;
    add_card(2900, 512, 100);
    devices[0].held = 512 * MIB;
    ic_plan_make(&plan, &in);
    text[0] = 0;
    ic_plan_print(&plan, &in, keep_line, text);
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        if (!strstr(text, wanted[i]))
            fail_msg("%s is not in\n%s", wanted[i], text);
}

static void the_log_is_read(void **state)
{
    static const char *const lines[] = {
        "load_tensors:   CPU_Mapped model buffer size =    20.51 MiB\n",
        "load_tensors:      Vulkan0 model buffer size =   100.00 MiB\n",
        "load_tensors:      Vulkan0 model buffer size =    86.25 MiB\n",
        "llama_kv_cache:    Vulkan0 KV buffer size =   176.00 MiB\n",
        "llama_kv_cache: size =  176.00 MiB (  8192 cells,  22 layers, 64/1 seqs), K (f16):   88.00 MiB, V "
        "(f16):   88.00 MiB\n",
        "sched_reserve:    Vulkan0 compute buffer size =    49.00 MiB\n",
        "sched_reserve:    Vulkan0 compute buffer size =    50.00 MiB\n",
        "sched_reserve: Vulkan_Host compute buffer size =    16.02 MiB\n",
        "llama_context:        CPU  output buffer size =     7.81 MiB\n",
        "resolve_fused_ops: Flash Attention enabled\n",
        "anything: else buffer size = -1 MiB",
        "print_info: file size = 12 MiB",
        "",
    };
    struct ic_meter m;

    (void)state;
    ic_meter_line(lines[0]); /* nobody listens */
    ic_meter_listen(&m);
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++)
        ic_meter_line(lines[i]);
    ic_meter_listen(NULL);
    ic_meter_line(lines[1]);
    assert_int_equal(ic_meter_row(&m, "Vulkan0").weights / KIB, 186 * 1024 + 256 + 10);
    assert_int_equal(ic_meter_row(&m, "Vulkan0").cache / MIB, 176);
    assert_int_equal(ic_meter_row(&m, "Vulkan0").compute / MIB, 50);
    assert_int_equal(ic_meter_row(&m, "Vulkan_Host").compute / MIB, 16);
    assert_int_equal(ic_meter_row(&m, "CUDA0").weights, 0);
    assert_int_equal(m.cache_total / MIB, 176);
    assert_true(m.compute_seen && m.flash);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_small_card),
        cmocka_unit_test(more_cache_fewer_layers),
        cmocka_unit_test(no_card_or_a_tiny_one),
        cmocka_unit_test(others_hold_some_of_it),
        cmocka_unit_test(as_many_as_asked_for),
        cmocka_unit_test(several_cards),
        cmocka_unit_test(a_measured_cache_is_believed),
        cmocka_unit_test(the_table_names_every_item),
        cmocka_unit_test(the_log_is_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
