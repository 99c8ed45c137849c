/* The seven Law M network families and the tensors each is made of (shared/law-m.md §2).
 *
 * A family is a row of a table: its name in config.json, whether the network's output multiplies the
 * field (UNET_UNITARY) or is added to it, whether it carries memory from step to step, and what the
 * grid side must be a multiple of. Pure data and pure functions; any thread. */
#ifndef IC_LAW_ARCH_H
#define IC_LAW_ARCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum ic_law_arch {
    IC_LAW_UNET,
    IC_LAW_UNET_UNITARY,
    IC_LAW_UNET_UNITARY_RMSNORM,
    IC_LAW_UNET_CONVLSTM,
    IC_LAW_MLP,
    IC_LAW_DEEP_QCA,
    IC_LAW_SNN_UNET,
    IC_LAW_ARCH_COUNT
};

/* Named bounds on what a checkpoint or a caller may ask for. The largest law seen in Atheria's logs is
 * d 21, b 256; its largest grid 2048. */
#define IC_LAW_D_MAX 256      /* complex channels of the field */
#define IC_LAW_B_MAX 1024     /* hidden channels */
#define IC_LAW_GRID_MAX 4096  /* cells on a side */
#define IC_LAW_BATCH_MAX 1024 /* simulations in one step */
#define IC_LAW_SPECS_MAX 48   /* tensors of the largest family (UNET_CONVLSTM has 44) */
#define IC_LAW_TENSOR_NAME_MAX 48

struct ic_law_arch_info {
    const char *name;       /* as MODEL_ARCHITECTURE in config.json */
    const char *what;       /* one line for people */
    bool product;           /* delta = net(psi) * psi instead of net(psi) (law-m.md §1.2 step 4) */
    bool memory;            /* ConvLSTM: h and c, [4b, H/4, W/4] each, belong to the simulation */
    unsigned grid_multiple; /* H and W must be multiples of this */
};

/* Never NULL for a valid enumerator. */
const struct ic_law_arch_info *ic_law_arch_info(enum ic_law_arch arch);
/* Exact names only; anything else is IC_BAD_REQUEST and the message lists the names. */
enum ic_status ic_law_arch_parse(const char *name, enum ic_law_arch *out, struct ic_err *err);

/* One tensor that a family needs: PyTorch's state_dict name and shape (unused dims are 1). */
struct ic_law_spec {
    char name[IC_LAW_TENSOR_NAME_MAX];
    unsigned ndim; /* 0..4 */
    uint32_t dim[4];
    bool parameter; /* false: a buffer, not counted among the parameters */
    bool optional;  /* absent: `standard` is taken */
    float standard;
};

/* Fills `out` (room for IC_LAW_SPECS_MAX) in state_dict order and returns how many.
 * 1 <= d <= IC_LAW_D_MAX, 1 <= b <= IC_LAW_B_MAX. */
size_t ic_law_arch_specs(enum ic_law_arch arch, unsigned d, unsigned b, struct ic_law_spec *out);

/* Group count of Atheria's GroupNorm over c channels (law-m.md §2.1): c div 8 where c > 8, else 1;
 * 1 where that does not divide c. */
unsigned ic_law_groups(unsigned c);

/* Multiply-accumulates of the network per cell of the full grid and step (law-m.md §2). */
uint64_t ic_law_macs_per_cell(enum ic_law_arch arch, unsigned d, unsigned b);

#endif
