/* The command line: `inference-core COMMAND …`. Each function gets argv from its command on and returns the
 * exit code of the process. */
#ifndef IC_CLI_CLI_H
#define IC_CLI_CLI_H

#include "base/exit.h"
#include "base/status.h"

int ic_cli_main(int argc, char **argv);
int ic_cli_serve(int argc, char **argv);
int ic_cli_ask(int argc, char **argv);

/* Prints "inference-core: text" on stderr and returns `code`. */
int ic_cli_fail(enum ic_exit code, const char *text);

#endif
