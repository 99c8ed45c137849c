/* NF4 weights as 16-bit ones, in pack.c's order, for plans whose arena is larger than they are. Otherwise
 * every block of a convolution expands what it needs (conv.cuh). */
#include "law/cuda/conv.cuh"

/* A thread expands eight inputs of a column at a tap. */
template <class T> __global__ void expand_kernel(ic_cu_nf4 q, uint4 *out, int columns, int units, int taps)
{
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= columns * units * 2)
        return;
    const int block = i / (256 * units), width = min(128, columns - block * 128),
              in_block = i - block * 256 * units, unit = in_block / (2 * width),
              row = in_block - unit * 2 * width;
    const int column = block * 128 + row / 16 * 8 + row % 8, place = unit / taps * 16 + row / 8 % 2 * 8;
    const int o = q.phases == 4 ? column % q.cout_pad : column,
              tap = q.phases == 4 ? column / q.cout_pad : unit % taps;
    /* in padding the code is that of 0, whatever the scale */
    const int real = place < q.cpad0 ? place : q.cin0 + place - q.cpad0,
              base = min(o, q.cout - 1) * q.so + tap * q.st;
    const uint32_t codes = q.codes[i];
    float v[8];
#pragma unroll
    for (int k = 0; k < 8; k++)
        v[k] = nf4_book[codes >> 4 * k & 15] * q.absmax[(base + min(real + k, q.cin - 1) * q.si) >> 6];
    out[i] = make_uint4(T::pack(v[0], v[1]), T::pack(v[2], v[3]), T::pack(v[4], v[5]), T::pack(v[6], v[7]));
}

cudaError_t ic_cu_expand_run(const struct ic_cu_nf4 *q, void *out, enum ic_cu_type type, int columns,
                             int units, int taps, cudaStream_t stream)
{
    const unsigned blocks = ((unsigned)(columns * units * 2) + 255) / 256;
    if (type == IC_CU_F16)
        expand_kernel<f16><<<blocks, 256, 0, stream>>>(*q, static_cast<uint4 *>(out), columns, units, taps);
    else
        expand_kernel<bf16>
            <<<blocks, 256, 0, stream>>>(*q, static_cast<uint4 *>(out), columns, units, taps);
    return cudaGetLastError();
}
