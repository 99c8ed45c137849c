/* The command line: `inference-core COMMAND …`. Each function gets argv from its command on and returns the
 * exit code of the process. */
#ifndef IC_CLI_CLI_H
#define IC_CLI_CLI_H

#include "base/status.h"

/* What the process ends with; the README lists them. */
enum ic_exit {
    IC_EXIT_OK = 0,
    IC_EXIT_FAILED = 1, /* anything not listed here */
    IC_EXIT_USAGE = 2,  /* unknown or bad option, bad configuration */
    IC_EXIT_PORT = 3,   /* the port is in use or the address is not ours */
    IC_EXIT_FILE = 4,   /* a model or other input file is missing or broken */
    IC_EXIT_MEMORY = 5, /* it does not fit */
};

int ic_cli_main(int argc, char **argv);
int ic_cli_serve(int argc, char **argv);
int ic_cli_ask(int argc, char **argv);

/* Prints "inference-core: text" on stderr and returns `code`. */
int ic_cli_fail(enum ic_exit code, const char *text);

#endif
