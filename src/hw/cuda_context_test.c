/* Giving CUDA contexts back, with a runtime of the test's (fake_cudart.c). A real one: tools/gpu-idle.sh.
 */
#include "hw/cuda_context.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

static void every_device_of_the_loaded_runtime(void **state)
{
    (void)state;
    assert_int_equal(ic_cuda_release(), 0); /* none is loaded, and none is loaded by asking */
    assert_null(dlopen(FAKE_CUDART, RTLD_NOW | RTLD_NOLOAD));

    void *lib = dlopen(FAKE_CUDART, RTLD_NOW | RTLD_LOCAL); /* as a back end does */
    assert_non_null(lib);
    int *resets = dlsym(lib, "fake_cudart_resets"), *refuse = dlsym(lib, "fake_cudart_refuse");
    assert_int_equal(ic_cuda_release(), 2);
    assert_int_equal(resets[0], 1);
    assert_int_equal(resets[1], 1);
    *refuse = 1;
    assert_int_equal(ic_cuda_release(), 1);
    assert_int_equal(resets[0], 2);
    assert_int_equal(resets[1], 1);
    dlclose(lib);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_device_of_the_loaded_runtime)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
