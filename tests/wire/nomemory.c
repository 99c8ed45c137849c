/* For nomemory.test.mjs, by LD_PRELOAD: of the allocations that the program itself makes (not its libraries) the one
 * whose number stands in the file named by NOMEMORY_FILE, counted from when it was written, finds no memory. The
 * number is 0 then. */
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

void *__libc_malloc(size_t n);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *p, size_t n);

static uintptr_t from, to; /* the program's code */
static _Atomic int64_t *left;

static int program(struct dl_phdr_info *info, size_t size, void *arg)
{
    (void)size;
    (void)arg;
    for (int i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_LOAD && info->dlpi_phdr[i].p_flags & PF_X) {
            from = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            to = from + info->dlpi_phdr[i].p_memsz;
        }
    return 1; /* it comes first */
}

__attribute__((constructor)) static void open_file(void)
{
    const char *path = getenv("NOMEMORY_FILE");
    /* what starts it is another program */
    int fd = path && !strcmp(program_invocation_short_name, "inference-core")
                 ? open(path, O_RDWR | O_CLOEXEC)
                 : -1;
    void *p = fd >= 0 ? mmap(NULL, sizeof *left, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;

    if (fd >= 0)
        close(fd);
    dl_iterate_phdr(program, NULL);
    if (p != MAP_FAILED)
        left = p;
}

static int fails(const void *caller)
{
    uintptr_t at = (uintptr_t)caller;
    int64_t n = left && at >= from && at < to ? atomic_load(left) : 0;

    while (n > 0 && !atomic_compare_exchange_weak(left, &n, n - 1))
        ;
    if (n == 1)
        errno = ENOMEM;
    return n == 1;
}

void *malloc(size_t n)
{
    return fails(__builtin_return_address(0)) ? NULL : __libc_malloc(n);
}

void *calloc(size_t n, size_t size)
{
    return fails(__builtin_return_address(0)) ? NULL : __libc_calloc(n, size);
}

void *realloc(void *p, size_t n)
{
    return fails(__builtin_return_address(0)) ? NULL : __libc_realloc(p, n);
}
