"""congruence_loss by csrc/cpu/congruence_loss.cpp."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.inputs import CongruenceLossBackwardInputs, CongruenceLossInputs
from vlattn_fast.backends.native import DTYPES, kernel, pointer, rows
from vlattn_fast.backends.reference.congruence_loss import num_gradients

_FIELDS = "=9q d 32q 2q 3q 8q"
_run_forward = kernel("congruence_loss_forward", _FIELDS)
_run_backward = kernel("congruence_loss_backward", _FIELDS)
_KINDS = ("cacr", "iais_singular", "iais_distributed")  # Kind of the kernel
_NO_GRADS = (0,) * 4


def forward(inputs: CongruenceLossInputs) -> tuple[Tensor, Tensor]:
    """The loss of each sample, (B), and the head-mean maps for the backward pass. Padding may hold anything."""
    queries = inputs.queries
    (batch, _, L, _), V = queries[0].shape, queries[1].shape[2]
    loss = queries[0].new_empty(batch, dtype=torch.float32)
    # Zeros, since an output must have the same bits in every run, and the kernel does not fill all of it. The pages of NumPy's
    # zeros come when they are first written, by two megabytes where Linux has such pages.
    maps = torch.from_numpy(np.zeros(maps_shape(batch, L, V), np.float32))
    _call(_run_forward, inputs, maps, loss, None, _NO_GRADS, _NO_GRADS)
    return loss, maps


def backward(inputs: CongruenceLossBackwardInputs) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the queries and of the keys, of as many as `num_gradients` says."""
    n = num_gradients(inputs.kind)
    grads = [[x.new_empty(*x.shape) for x in xs[:n]] for xs in (inputs.queries, inputs.keys)]
    pointers = (tuple(x.data_ptr() for x in xs) + (0,) * (4 - len(xs)) for xs in grads)
    maps, grad_loss = inputs.maps.contiguous(), inputs.grad_loss.float().contiguous()
    _call(_run_backward, inputs, maps, None, grad_loss, *pointers)
    return grads[0], grads[1]


def maps_shape(batch: int, L: int, V: int) -> tuple[int, int, int]:
    """The blocks LL, VV, LV, VL as (keys, rows), with the rows rounded up to an odd multiple of 16."""
    return batch, L + V, (L + 15) // 32 * 32 + (V + 15) // 32 * 32 + 32


def _call(
    run: Any,
    inputs: CongruenceLossInputs | CongruenceLossBackwardInputs,
    maps: Tensor,
    loss: Tensor | None,
    grad_loss: Tensor | None,
    grad_queries: tuple[int, ...],
    grad_keys: tuple[int, ...],
) -> None:
    """Packs CongruenceLoss of csrc/cpu/ and runs the kernel. grad_queries, grad_keys: four pointers each, 0 for none."""
    queries, keys, text_mask, image_mask = inputs.queries, inputs.keys, inputs.text_mask, inputs.image_mask
    kind, direction, scale = inputs.kind, inputs.direction, inputs.scale
    batch, heads, L, head_dim = queries[0].shape
    blocks = unit_strides(*queries, *keys)  # they and the masks live until the call is over
    masks = [None if mask is None else mask.contiguous() for mask in (text_mask, image_mask)]
    run(
        *(DTYPES[queries[0].dtype], batch, heads, head_dim, L, queries[1].shape[2]),
        *(_KINDS.index(kind), direction in ("text", "both"), direction in ("image", "both"), scale),
        *[number for block in blocks for number in rows(block)],
        *map(pointer, masks),
        *(maps.data_ptr(), pointer(loss), pointer(grad_loss), *grad_queries, *grad_keys),
    )
