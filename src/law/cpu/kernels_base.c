#define IC_VW 4
#define IC_KERNELS ic_cpu_kernels_base
#define IC_ISA "scalar"
#include "law/cpu/kernels.inc.h"
