/* Giving a CUDA context back.
 *
 * A process that has computed on a GPU keeps a context there until its end, some hundred MiB, and a card
 * with a context on it does not go to its lowest power state. llama.cpp frees everything but that.
 * cudaDeviceReset of the runtime that its back end has loaded does the rest; the next load makes a new one.
 * Source: CUDA Runtime API, Device Management, cudaDeviceReset. */
#ifndef IC_HW_CUDA_CONTEXT_H
#define IC_HW_CUDA_CONTEXT_H

/* Resets every device of the CUDA runtime (libcudart.so.*) that is loaded into this process; returns how
 * many devices, 0 without one. Nothing may be in use on them: no buffer, stream or event of this process
 * lives on. Any thread. */
int ic_cuda_release(void);

#endif
