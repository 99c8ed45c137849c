#define IC_VW 8
#define IC_KERNELS ic_cpu_kernels_avx2
#define IC_ISA "avx2"
#include "law/cpu/kernels.inc.h"
