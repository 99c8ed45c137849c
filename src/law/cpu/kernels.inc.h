/* All kernels for one vector width. A .c file defines IC_VW and IC_KERNELS (the table's name) and
 * IC_ISA (its text), is compiled with that instruction set's flags, and includes this. */
#include "law/cpu/kernels.h"

#include "base/clock.h"
#include "law/cpu/vec.inc.h"

#include "law/cpu/gemm.inc.h"

#include "law/cpu/wino.inc.h"

#include "law/cpu/expand.inc.h"

#include "law/cpu/point.inc.h"

const struct ic_cpu_kernels IC_KERNELS = {
    .name = IC_ISA,
    .expand = expand,
    .wino = wino,
    .wino_few = wino_few,
    .direct = direct,
    .convt = convt,
    .convt_few = CONVT_FEW,
    .chain = chain,
    .norm = norm,
    .moments = moments,
    .input = input,
    .pool = pool,
    .mem_in = mem_in,
    .lstm = lstm,
    .resize_half = resize_half,
    .update = update,
    .peak = peak,
    .elu = elu,
};
