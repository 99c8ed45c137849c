#include "cli/cli.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "cli/options.h"
#include "law/law_cli.h"

int ic_cli_fail(enum ic_exit code, const char *text)
{
    fprintf(stderr, "inference-core: %s\n", text);
    return code;
}

int ic_cli_fail_for(const struct ic_err *err, enum ic_exit code)
{
    return ic_cli_fail(err->code == IC_OOM ? IC_EXIT_MEMORY : code, err->msg);
}

static int cli_help(int argc, char **argv);

static int cli_version(int argc, char **argv)
{
    (void)argc;
    (void)argv;
    puts("inference-core " IC_VERSION);
    return IC_EXIT_OK;
}

static const struct {
    const char *name, *args, *help;
    int (*run)(int, char **);
} commands[] = {
    {"serve", "[--model FILE.gguf] [--law PATH] [OPTIONS]",
     "serve a text model, laws, or both over WebSocket and HTTP", ic_cli_serve},
    {"supervise", "[OPTIONS] -- serve …",
     "keep a server running: start it again, with less where it keeps ending", ic_cli_supervise},
    {"plan", "--model FILE.gguf [--vram 3GiB] [OPTIONS]",
     "show how serve would split a model between GPU and CPU, without loading it", ic_cli_plan},
    {"ask", "[--host H] [--port N] [--key K] [--max-tokens N] [--raw] TEXT",
     "stream one answer from a running server", ic_cli_ask},
    {"law", "inspect FILE | step --checkpoint F --state IN --steps N --out OUT | …",
     "look at a Law M, or step a stored state", ic_law_main},
    {"version", "", "print the version", cli_version},
    {"help", "", "print this", cli_help},
};
#define N_COMMANDS (sizeof commands / sizeof *commands)

static int cli_help(int argc, char **argv)
{
    struct ic_buf b = {0};

    (void)argc;
    (void)argv;
    puts("usage: inference-core COMMAND …\n");
    for (size_t i = 0; i < N_COMMANDS; i++)
        printf("  %s %s\n      %s\n", commands[i].name, commands[i].args, commands[i].help);
    ic_options_help(&b);
    ic_buf_put(&b, "", 1);
    printf("\noptions of serve and plan (also IC_NAME in the environment, and name = value in a --config "
           "file):\n%s",
           b.data ? b.data : "");
    ic_buf_deinit(&b);
    return IC_EXIT_OK;
}

/* Of stdin, stdout and stderr, one that is closed would be the next file's or socket's, and a backtrace would go to a
 * client. */
static void keep_standard_fds(void)
{
    int fd;
    do
        fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd >= 0)
        close(fd);
}

/* What was printed and did not arrive (a full disk, a closed pipe) is no success. */
static int finish(int code)
{
    if (code == IC_EXIT_OK && (fflush(stdout) || ferror(stdout)))
        return ic_cli_fail(IC_EXIT_FAILED, "stdout could not be written");
    return code;
}

int ic_cli_main(int argc, char **argv)
{
    char text[160];

    keep_standard_fds();
    if (argc < 2) {
        cli_help(argc, argv);
        return IC_EXIT_USAGE;
    }
    const char *name = argv[1];
    if (!strcmp(name, "--help") || !strcmp(name, "-h"))
        name = "help";
    if (!strcmp(name, "--version"))
        name = "version";
    for (size_t i = 0; i < N_COMMANDS; i++)
        if (!strcmp(name, commands[i].name))
            return finish(commands[i].run(argc - 1, argv + 1));
    snprintf(text, sizeof text, "unknown command %.100s (see inference-core help)", name);
    return ic_cli_fail(IC_EXIT_USAGE, text);
}
