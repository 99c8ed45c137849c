/* What the process ends with; the README lists them. */
#ifndef IC_BASE_EXIT_H
#define IC_BASE_EXIT_H

enum ic_exit {
    IC_EXIT_OK = 0,
    IC_EXIT_FAILED = 1,  /* anything not listed here */
    IC_EXIT_USAGE = 2,   /* unknown or bad option, bad configuration */
    IC_EXIT_PORT = 3,    /* the port is in use, or the address is not ours */
    IC_EXIT_FILE = 4,    /* a model or other input file is missing or broken */
    IC_EXIT_MEMORY = 5,  /* it does not fit */
    IC_EXIT_STALLED = 6, /* an engine stood still and could not be built anew */
};

#endif
