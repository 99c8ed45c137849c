/* A CUDA runtime for tests: two devices, of which the second does not want to be reset at first. */
#define EXPORT __attribute__((visibility("default")))
EXPORT int fake_cudart_resets[2];
EXPORT int fake_cudart_refuse;
static int device;

EXPORT int cudaGetDeviceCount(int *n);
EXPORT int cudaSetDevice(int i);
EXPORT int cudaDeviceReset(void);

EXPORT int cudaGetDeviceCount(int *n)
{
    *n = 2;
    return 0;
}

EXPORT int cudaSetDevice(int i)
{
    device = i;
    return 0;
}

EXPORT int cudaDeviceReset(void)
{
    if (device == 1 && fake_cudart_refuse)
        return 46; /* cudaErrorDevicesUnavailable */
    fake_cudart_resets[device]++;
    return 0;
}
