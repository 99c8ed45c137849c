/* A torch.save checkpoint as a set of tensors: zip container, pickle program, storages.
 *
 * Accepted forms, in the order in which Atheria's loader tries them (shared/law-m.md §3.2): a dict with
 * `model_state_dict`; a dict with `state_dict`; then, beyond it, `model`; a dict of tensors; also a bare tensor (named `psi`, for
 * snapshots). If any key starts with `_orig_mod.`, its first occurrence leaves every key. Optimiser
 * state is parsed with the program that it is part of, and never read. May block on file I/O. */
#ifndef IC_MODEL_TORCH_H
#define IC_MODEL_TORCH_H

#include "base/status.h"
#include "model/tensors.h"

/* Fills an empty set (made by ic_tensors_new) from its file. */
enum ic_status ic_torch_read(struct ic_tensors *set, struct ic_err *err);

/* The format before the zip (until torch 1.6): whether a file that begins with these bytes is one (23 tell), and
 * ic_torch_read for it. It has no checksums. */
bool ic_torch_is_old(const uint8_t *head, size_t n);
enum ic_status ic_torch_read_old(struct ic_tensors *set, struct ic_err *err);

#endif
