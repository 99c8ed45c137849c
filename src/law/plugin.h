/* Back ends that are not linked in: shared libraries, loaded when one of their names is first asked for.
 *
 * The library is the file that ic_law_plugin_path (--law-plugin) or the environment variable IC_LAW_PLUGIN
 * names, or else IC_LAW_PLUGIN_FILE beside this executable or in IC_LAW_PLUGIN_LIB, seen from there. That
 * there is none is normal: a server without a GPU has none. A library made for other headers is refused. A
 * plug-in exports one symbol, `ic_law_plugin`, and takes what it needs of this program from the program
 * itself (which exports its symbols). */
#ifndef IC_LAW_PLUGIN_H
#define IC_LAW_PLUGIN_H

#include "law/plan.h"

#define IC_LAW_PLUGIN_ABI 3
#define IC_LAW_PLUGIN_FILE "libic-law-cuda.so"
#define IC_LAW_PLUGIN_LIB "../lib/inference-core" /* where `cmake --install` puts it */
#define IC_LAW_PLUGIN_SYMBOL "ic_law_plugin"
#define IC_LAW_PLUGIN_BACKENDS 4

struct ic_law_plugin {
    uint32_t abi;
    size_t backend_size, plan_size, law_size; /* sizes of the structs it was compiled with */
    const struct ic_law_backend *backends[IC_LAW_PLUGIN_BACKENDS]; /* unused: NULL */
    /* For measurements; not thread-safe. */
    enum ic_status (*set_states)(struct ic_law_exec *exec, const struct ic_law_io *io, unsigned n,
                                 struct ic_err *err);
    /* Milliseconds per step of the first n places, device time, states left on the device. */
    enum ic_status (*time_steps)(struct ic_law_exec *exec, unsigned n, unsigned steps, bool graphs,
                                 double *ms, struct ic_err *err);
    size_t (*launches)(const struct ic_law_exec *exec); /* kernels of one step */
};

/* Names the library, before the first use of a plug-in. Borrowed until the last one. Main thread. NULL: the
 * standard places. */
void ic_law_plugin_path(const char *path);

/* The loaded library, loading it first if need be; NULL with the reason, which names the file: NOT_FOUND
 * (no such file), BAD_REQUEST (no library, does not load, of another version or build). Never unloaded. Any
 * thread. */
const struct ic_law_plugin *ic_law_plugin_load(struct ic_err *err);

/* A back end by name, linked in or from the plug-in. NOT_FOUND, BAD_REQUEST: *out is NULL. */
enum ic_status ic_law_backend_open(const char *name, const struct ic_law_backend **out, struct ic_err *err);

#endif
