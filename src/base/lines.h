/* Lines of a text file, as inih wants them; like fgets, but a NUL ends the file: one of zeros, as a crash may leave, is
 * not an empty one, and a value in front of them is not a whole one. */
#ifndef IC_BASE_LINES_H
#define IC_BASE_LINES_H

#include <stdbool.h>
#include <stdio.h>

struct ic_lines {
    FILE *file; /* borrowed; ask ferror() at the end */
    bool nul;   /* there was one */
};

/* `lines`: a struct ic_lines. Cut at size - 1 bytes; NULL: no more. */
char *ic_lines_next(char *line, int size, void *lines);

#endif
