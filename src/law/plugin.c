#include "law/plugin.h"

#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *chosen;
static const struct ic_law_plugin *loaded;

void ic_law_plugin_path(const char *path)
{
    pthread_mutex_lock(&lock);
    chosen = path;
    pthread_mutex_unlock(&lock);
}

/* The file named, or the one beside this executable. */
static enum ic_status find_file(char *out, size_t size, struct ic_err *err)
{
    const char *named = chosen ? chosen : getenv("IC_LAW_PLUGIN");
    if (named) {
        if ((size_t)snprintf(out, size, "%s%s", strchr(named, '/') ? "" : "./", named) >= size)
            return ic_fail(err, IC_BAD_REQUEST, "the plug-in's path is too long");
    } else {
        char self[PATH_MAX];
        ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
        self[n > 0 ? n : 0] = 0;
        char *slash = strrchr(self, '/');
        if (!slash || (size_t)snprintf(out, size, "%.*s/%s", (int)(slash - self), self, IC_LAW_PLUGIN_FILE) >= size)
            return ic_fail(err, IC_NOT_FOUND, "where this program lies is not known");
    }
    if (access(out, R_OK) != 0)
        return ic_fail(err, IC_NOT_FOUND, "%s: %s", out, strerror(errno));
    return IC_OK;
}

static enum ic_status load(struct ic_err *err)
{
    char path[PATH_MAX];
    enum ic_status s = find_file(path, sizeof path, err);
    if (s != IC_OK)
        return s;
    void *lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!lib)
        return ic_fail(err, IC_UNAVAILABLE, "the plug-in does not load: %s", dlerror());
    const struct ic_law_plugin *p = dlsym(lib, IC_LAW_PLUGIN_SYMBOL);
    if (!p || p->abi != IC_LAW_PLUGIN_ABI || p->backend_size != sizeof(struct ic_law_backend) ||
        p->plan_size != sizeof(struct ic_law_plan) || p->law_size != sizeof(struct ic_law)) {
        dlclose(lib);
        return ic_fail(err, IC_UNAVAILABLE, "%s is no plug-in of this build", path);
    }
    loaded = p;
    return IC_OK;
}

const struct ic_law_plugin *ic_law_plugin_load(struct ic_err *err)
{
    pthread_mutex_lock(&lock);
    if (!loaded)
        (void)load(err);
    const struct ic_law_plugin *p = loaded;
    pthread_mutex_unlock(&lock);
    return p;
}

enum ic_status ic_law_backend_open(const char *name, const struct ic_law_backend **out, struct ic_err *err)
{
    struct ic_err why = {0};
    if ((*out = ic_law_backend_find(name)) != NULL)
        return IC_OK;
    const struct ic_law_plugin *p = strncmp(name, "cuda", 4) == 0 ? ic_law_plugin_load(&why) : NULL;
    for (size_t i = 0; p && i < IC_LAW_PLUGIN_BACKENDS; i++)
        if (p->backends[i] && strcmp(p->backends[i]->name, name) == 0) {
            *out = p->backends[i];
            return IC_OK;
        }
    if (why.code != IC_OK)
        return ic_fail(err, why.code, "the Law M back end %s: %s", name, why.msg);
    return ic_fail(err, IC_NOT_FOUND, "there is no Law M back end %s", name);
}
