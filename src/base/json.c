/* jansson 2.14's reader goes on where the buffer of the token that it reads could not grow, and then writes past the
 * end of a shorter one; other failures it does not tell from bad JSON. So it never sees one here: the first allocation
 * that fails while it reads leaves it by longjmp, and what it had is freed. For that, each block that is made while
 * a text is read is in a list.
 *
 * Owner of a block: jansson. A block is in the list of its thread's reading only as long as that goes on. */
#include "base/json.h"

#include <setjmp.h>
#include <stdalign.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct block {
    alignas(max_align_t) struct block *prev; /* NULL: in no list */
    struct block *next;
};

struct reading {
    struct block all; /* the list's head: a ring */
    jmp_buf no_memory;
};

static _Thread_local struct reading *reading; /* NULL: this thread reads nothing now */

static void *make(size_t n)
{
    struct block *b = n <= SIZE_MAX - sizeof *b ? malloc(sizeof *b + n) : NULL;

    if (!b && reading)
        longjmp(reading->no_memory, 1);
    if (!b)
        return NULL;
    *b = (struct block){0};
    if (reading) {
        b->prev = &reading->all;
        b->next = reading->all.next;
        b->next->prev = reading->all.next = b;
    }
    return b + 1;
}

static void drop(void *p)
{
    struct block *b = p ? (struct block *)p - 1 : NULL;

    if (b && b->prev) {
        b->prev->next = b->next;
        b->next->prev = b->prev;
    }
    free(b);
}

/* Before anything is made with other functions and freed with these. */
__attribute__((constructor)) static void install(void)
{
    json_set_alloc_funcs(make, drop);
}

json_t *ic_json_load(const char *data, size_t len, size_t flags, json_error_t *je)
{
    struct reading r;
    json_t *volatile root = NULL;
    bool failed = setjmp(r.no_memory) != 0;

    if (!failed) {
        r.all.prev = r.all.next = &r.all;
        reading = &r;
        root = json_loadb(data, len, flags, je);
    }
    reading = NULL;
    for (struct block *b = r.all.next, *next; b != &r.all; b = next) {
        next = b->next;
        b->prev = b->next = NULL;
        if (failed)
            free(b);
    }
    if (failed && je) {
        *je = (json_error_t){.line = -1, .column = -1};
        snprintf(je->text, sizeof je->text, "out of memory");
        je->text[sizeof je->text - 1] = (char)json_error_out_of_memory; /* where json_error_code looks */
    }
    return root;
}
