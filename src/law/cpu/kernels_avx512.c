#define IC_VW 16
#define IC_KERNELS ic_cpu_kernels_avx512
#define IC_ISA "avx512"
#include "law/cpu/kernels.inc.h"
