/* The built-in page, web/index.html, as bytes of the program. */
#include "proto/internal.h"

__asm__(".section .rodata\n"
        ".global ic_web_index\n"
        ".global ic_web_index_end\n"
        "ic_web_index:\n"
        ".incbin \"" IC_WEB_DIR "/index.html\"\n"
        "ic_web_index_end:\n"
        ".byte 0\n"
        ".previous\n");

extern const char ic_web_index[], ic_web_index_end[];

const char *ic_web_page(size_t *len)
{
    *len = (size_t)(ic_web_index_end - ic_web_index);
    return ic_web_index;
}
