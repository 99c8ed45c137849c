#include "law/plugin.h"

#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
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

static bool is_there(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0;
}

/* Where it lies when nobody says so: beside this program, as it was built, or else where it is installed.
 */
static enum ic_status find_default(char *out, size_t size, struct ic_err *err)
{
    static const char *const places[] = {"", IC_LAW_PLUGIN_LIB "/"};
    char self[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);

    self[n > 0 ? n : 0] = 0;
    char *slash = strrchr(self, '/');
    if (!slash)
        return ic_fail(err, IC_NOT_FOUND, "law plug-in: where this program lies is not known");
    slash[1] = 0;
    for (size_t i = 0; i < sizeof places / sizeof *places; i++)
        if ((size_t)snprintf(out, size, "%s%s%s", self, places[i], IC_LAW_PLUGIN_FILE) < size &&
            is_there(out))
            return IC_OK;
    return ic_fail(err, IC_NOT_FOUND, "law plug-in %s: neither in %s nor in %s%s", IC_LAW_PLUGIN_FILE, self,
                   self, IC_LAW_PLUGIN_LIB);
}

static enum ic_status find_file(char *out, size_t size, struct ic_err *err)
{
    const char *env = getenv("IC_LAW_PLUGIN"), *named = chosen ? chosen : env && *env ? env : NULL;

    if (!named)
        return find_default(out, size, err);
    /* Without a slash dlopen would look in the system's folders. */
    if ((size_t)snprintf(out, size, "%s%s", strchr(named, '/') ? "" : "./", named) >= size)
        return ic_fail(err, IC_BAD_REQUEST, "law plug-in: its path is too long");
    return IC_OK;
}

/* dlopen's own words about a file that is no library are many and differ; so this is asked first. */
static enum ic_status check_file(const char *path, struct ic_err *err)
{
    unsigned char head[4] = {0};
    struct stat st;
    FILE *f = fopen(path, "re");

    if (!f)
        return ic_fail(err, errno == ENOENT ? IC_NOT_FOUND : IC_BAD_REQUEST, "law plug-in %s: %s", path,
                       strerror(errno));
    const bool file = fstat(fileno(f), &st) == 0 && S_ISREG(st.st_mode);
    const bool elf =
        file && fread(head, 1, sizeof head, f) == sizeof head && memcmp(head, "\177ELF", 4) == 0;
    fclose(f);
    return elf ? IC_OK
               : ic_fail(err, IC_BAD_REQUEST, "law plug-in %s: no shared library (%s)", path,
                         file ? "not ELF" : "not a file");
}

static enum ic_status check_table(const char *path, const struct ic_law_plugin *p, struct ic_err *err)
{
    if (!p)
        return ic_fail(err, IC_BAD_REQUEST, "law plug-in %s: not one of Inference-Core's (no %s in it)",
                       path, IC_LAW_PLUGIN_SYMBOL);
    if (p->abi != IC_LAW_PLUGIN_ABI)
        return ic_fail(err, IC_BAD_REQUEST,
                       "law plug-in %s: its interface has version %u, this program's has %u", path, p->abi,
                       IC_LAW_PLUGIN_ABI);
    if (p->backend_size != sizeof(struct ic_law_backend) || p->plan_size != sizeof(struct ic_law_plan) ||
        p->law_size != sizeof(struct ic_law))
        return ic_fail(err, IC_BAD_REQUEST, "law plug-in %s: made for another build of this program", path);
    return IC_OK;
}

static enum ic_status load(struct ic_err *err)
{
    char path[PATH_MAX];
    enum ic_status s = find_file(path, sizeof path, err);

    if (s != IC_OK || (s = check_file(path, err)) != IC_OK)
        return s;
    void *lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!lib)
        return ic_fail(err, IC_BAD_REQUEST, "law plug-in %s: it does not load: %s", path, dlerror());
    const struct ic_law_plugin *p = dlsym(lib, IC_LAW_PLUGIN_SYMBOL);
    if ((s = check_table(path, p, err)) != IC_OK) {
        dlclose(lib);
        return s;
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
