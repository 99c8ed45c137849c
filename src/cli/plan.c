/* `inference-core plan`: the options of serve, and what they would come to. */
#include "cli/cli.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "text/lora.h"

#define GPU_LAYERS_MAX 10000

static bool parse_gpu_layers(const char *text, int32_t *out)
{
    char *end;

    if (!text || !strcmp(text, "auto")) {
        *out = IC_GPU_LAYERS_AUTO;
        return true;
    }
    long v = strtol(text, &end, 10);
    *out = (int32_t)v;
    return end != text && !*end && v >= IC_GPU_LAYERS_ALL && v <= GPU_LAYERS_MAX;
}

enum ic_status ic_cli_text_config(const struct ic_options *o, struct ic_text_config *out,
                                  struct ic_err *err)
{
    struct ic_lora_list lora;

    *out = (struct ic_text_config){
        .path = o->model,
        .chat_template = o->chat_template,
        .lora = o->lora,
        .draft = o->draft,
        .ctx_size = (int32_t)o->ctx_size,
        .kv_size = (int32_t)o->kv_size,
        .parallel = (int32_t)o->parallel,
        .batch = (int32_t)o->batch,
        .threads = (int32_t)o->threads,
        .vram_margin = (uint64_t)o->vram_margin,
        .vram_max = (uint64_t)o->vram,
        .backends = o->backends,
        .type_k = o->type_k,
        .type_v = o->type_v,
    };
    if (!parse_gpu_layers(o->gpu_layers, &out->gpu_layers))
        return ic_fail(err, IC_BAD_REQUEST, "--gpu-layers takes auto, or -1 to %d, not \"%.60s\"",
                       GPU_LAYERS_MAX, o->gpu_layers);
    enum ic_status st = ic_pooling_parse(o->pooling, &out->pooling, err);
    if (st != IC_OK)
        return st;
    st = ic_lora_parse(&lora, o->lora, err); /* read again where it is used; here for an early word */
    if (st == IC_OK)
        ic_lora_deinit(&lora);
    return st;
}

static void print_line(void *arg, const char *text)
{
    (void)arg;
    puts(text);
}

static int plan(const struct ic_options *o, struct ic_err *err)
{
    struct ic_text_config cfg;

    if (!o->model)
        return ic_cli_fail(IC_EXIT_USAGE, "plan needs --model FILE.gguf");
    if (ic_log_set_levels(o->log_level ? o->log_level : "info", err) != IC_OK)
        return ic_cli_fail(IC_EXIT_USAGE, err->msg);
    if (ic_cli_text_config(o, &cfg, err) != IC_OK)
        return ic_cli_fail(IC_EXIT_USAGE, err->msg);
    enum ic_status st = ic_text_plan(&cfg, print_line, NULL, err);
    if (st != IC_OK)
        return ic_cli_fail_for(err, IC_EXIT_FILE);
    return IC_EXIT_OK;
}

int ic_cli_plan(int argc, char **argv)
{
    struct ic_options o;
    struct ic_err err = {0};
    bool help;
    int code;

    if (ic_options_parse(&o, argc, argv, &help, &err) != IC_OK)
        code = ic_cli_fail_for(&err, IC_EXIT_USAGE);
    else if (help)
        code = ic_cli_main(2, (char *[]){"inference-core", "help", NULL});
    else
        code = plan(&o, &err);
    ic_options_deinit(&o);
    return code;
}
