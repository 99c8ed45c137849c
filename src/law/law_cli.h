/* `inference-core law …`: look at a law, step a stored state.
 *
 *   law inspect FILE [--config F] [--arch A]
 *   law step --checkpoint F [--config F] [--arch A] --state IN --steps N --out OUT.safetensors
 *            [--precision fp32] [--gamma G] [--backend ref|cpu] [--threads N]
 *
 * IN: safetensors or torch, tensor `psi` or `psi_0`: float32 [H,W,d,2] or complex [H,W,d], a leading 1
 * allowed; `h_state`, `c_state` [4b,H/4,W/4] (leading ones allowed) where the law has memory, zeros
 * where they are absent. OUT: `psi` float32 [H,W,d,2], and h_state, c_state.
 * Results go to stdout, one sentence on failure to stderr. Runs on the calling thread. */
#ifndef IC_LAW_LAW_CLI_H
#define IC_LAW_LAW_CLI_H

#include "base/exit.h"

/* argv[0] is "law". Returns an enum ic_exit. */
int ic_law_main(int argc, char **argv);

#define IC_LAW_STEPS_MAX 1000000000ul /* of one `law step` */

#endif
