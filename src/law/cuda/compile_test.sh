#!/bin/sh
# The CUDA code compiles: every host file, every kernel file, and of the convolution the family with the most code
# (NF4, 3x3). 77 (skipped) where nvcc, or the headers of its runtime, are not installed. Argument: the source tree.
set -eu
nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null || true)
[ -n "$nvcc" ] || { echo "skipped: no nvcc"; exit 77; }
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cd "$1"
# Where the headers lie is nvcc's to say: the folder above the program has none where nvcc is a link or a package.
echo '#include <cuda_runtime_api.h>' >"$out/probe.cu"
headers=$("$nvcc" -M "$out/probe.cu" 2>/dev/null | tr ' ' '\n' | sed -n 's|/cuda_runtime_api\.h$||p' | head -1)
[ -n "$headers" ] || { echo "skipped: nvcc without cuda_runtime_api.h"; exit 77; }
newest=$("$nvcc" --list-gpu-arch | sed -n 's/^compute_\([0-9][0-9]\)$/\1/p' | awk '$1 <= 90' | sort -n | tail -1)
for file in pack exec build tune states; do
    cc -std=gnu17 -O2 -Wall -Wextra -Wshadow -Wconversion -Wstrict-prototypes -Werror -D_GNU_SOURCE -fPIC -Isrc \
        -isystem "$headers" -c src/law/cuda/$file.c -o "$out/$file.o"
done
flags="-std=c++17 -arch=sm_$newest -Xcompiler=-fPIC,-Wall,-Wextra -Isrc"
# shellcheck disable=SC2086
for file in conv exact exact_mma expand frames last; do "$nvcc" $flags -c src/law/cuda/$file.cu -o "$out/$file.o"; done
# shellcheck disable=SC2086
"$nvcc" $flags -DIC_CU_TYPE=f16 -DIC_CU_NF4=1 -DIC_CU_TAPS=9 -c src/law/cuda/conv_inst.cu -o "$out/conv_inst.o"
# Hopper's own family
if [ "$newest" = 90 ]; then
    for file in wide wide_inst split split_inst fold split_fold tall; do
        "$nvcc" -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Xcompiler=-fPIC,-Wall,-Wextra -Isrc -DIC_CU_WIDE=1 \
            -DIC_CU_TYPE=f16 -DIC_CU_TAPS=9 -c src/law/cuda/$file.cu -o "$out/$file.o"
    done
fi
echo "compiled for compute capability $newest"
