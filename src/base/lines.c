#include "base/lines.h"

char *ic_lines_next(char *line, int size, void *lines)
{
    struct ic_lines *l = lines;
    int n = 0, c = 0;

    while (n < size - 1 && c != '\n' && (c = getc(l->file)) != EOF && !(l->nul |= c == 0))
        line[n++] = (char)c;
    line[n] = 0;
    return n && !l->nul ? line : NULL;
}
