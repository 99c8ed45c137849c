#include <string.h>

#include "law/plan.h"
#ifdef IC_LAW_HAVE_CPU
#include "law/cpu/cpu.h"
#endif

const struct ic_law_backend *ic_law_backend_find(const char *name)
{
    if (strcmp(name, "ref") == 0)
        return &ic_law_backend_ref;
#ifdef IC_LAW_HAVE_CPU
    if (strcmp(name, "cpu") == 0)
        return &ic_law_backend_cpu;
#endif
    return NULL;
}
