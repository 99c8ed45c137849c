/* The command line: `inference-core COMMAND …`. Each function gets argv from its command on and returns the
 * exit code of the process. */
#ifndef IC_CLI_CLI_H
#define IC_CLI_CLI_H

#include "base/exit.h"
#include "base/status.h"
#include "cli/options.h"
#include "text/model.h"

int ic_cli_main(int argc, char **argv);
int ic_cli_serve(int argc, char **argv);
int ic_cli_supervise(int argc, char **argv);
int ic_cli_ask(int argc, char **argv);
int ic_cli_plan(int argc, char **argv);

/* What the options say about the text model. Strings are borrowed from them. IC_BAD_REQUEST: --gpu-layers,
 * --lora or --pooling make no sense. */
enum ic_status ic_cli_text_config(const struct ic_options *o, struct ic_text_config *out,
                                  struct ic_err *err);

/* Prints "inference-core: text" on stderr and returns `code`. */
int ic_cli_fail(enum ic_exit code, const char *text);

/* The same for a failure of which the place says what it means (`code`), but for want of memory: a supervisor asks for
 * less then, and takes a bad option (2) or port (3) for something that another start does not mend. */
int ic_cli_fail_for(const struct ic_err *err, enum ic_exit code);

#endif
