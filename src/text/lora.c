#include "text/lora.h"

#include <ctype.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* Cuts the scale off an item. */
static enum ic_status parse_item(struct ic_lora *out, char *item, struct ic_err *err)
{
    char *colon = strrchr(item, ':'), *end = NULL;

    *out = (struct ic_lora){item, 1};
    if (colon) {
        bool number = isdigit((unsigned char)colon[1]) || (colon[1] && strchr("+-.", colon[1]));
        *colon = 0;
        out->scale = number ? strtof(colon + 1, &end) : NAN;
        if (!number || *end || !isfinite(out->scale))
            return ic_fail(err, IC_BAD_REQUEST,
                           "--lora: the scale of %s must be a finite number, not \"%.40s\"", item,
                           colon + 1);
    }
    return *item ? IC_OK : ic_fail(err, IC_BAD_REQUEST, "--lora takes FILE[:SCALE],…; a file is missing");
}

enum ic_status ic_lora_parse(struct ic_lora_list *out, const char *spec, struct ic_err *err)
{
    enum ic_status st = IC_OK;

    *out = (struct ic_lora_list){0};
    if (!spec || !*spec)
        return IC_OK;
    if (!(out->text = strdup(spec)))
        return ic_fail(err, IC_OOM, "out of memory");
    for (char *at = out->text, *next; at && st == IC_OK; at = next) {
        if ((next = strchr(at, ',')) != NULL)
            *next++ = 0;
        if (out->n == IC_LORA_MAX)
            st = ic_fail(err, IC_TOO_LARGE, "--lora: more than %d adapters", IC_LORA_MAX);
        else
            st = parse_item(&out->item[out->n++], at, err);
    }
    if (st != IC_OK)
        ic_lora_deinit(out);
    return st;
}

void ic_lora_deinit(struct ic_lora_list *list)
{
    free(list->text);
    *list = (struct ic_lora_list){0};
}
