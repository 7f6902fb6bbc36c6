"""congruence_loss by csrc/cpu/congruence_loss.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.inputs import CongruenceLossBackwardInputs, CongruenceLossInputs
from vlattn_fast.backends.native import DTYPES, Fields, kernel
from vlattn_fast.backends.reference.congruence_loss import num_gradients

_FIELDS = Fields(
    "integer dtype B H D lengths[2] kind directions[2], number scale, tensor queries[4] keys[4], "
    "pointer masks[2] maps loss grad_loss grad_queries[4] grad_keys[4]"
)
_run_forward = kernel("congruence_loss_forward", _FIELDS)
_run_backward = kernel("congruence_loss_backward", _FIELDS)
_KINDS = ("cacr", "iais_singular", "iais_distributed")  # Kind of the kernel


def forward(inputs: CongruenceLossInputs) -> tuple[Tensor, Tensor]:
    """The loss of each sample, (B), and the head-mean maps for the backward pass. Padding may hold anything."""
    queries = inputs.queries
    (batch, _, L, _), V = queries[0].shape, queries[1].shape[2]
    loss = queries[0].new_empty(batch, dtype=torch.float32)
    maps = loss.new_empty(maps_shape(batch, L, V))
    _call(_run_forward, inputs, maps=maps, loss=loss)
    return loss, maps


def backward(inputs: CongruenceLossBackwardInputs) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the queries and of the keys, of as many as `num_gradients` says."""
    n = num_gradients(inputs.kind)
    grad_queries, grad_keys = ([x.new_empty(*x.shape) for x in xs[:n]] for xs in (inputs.queries, inputs.keys))
    maps, grad_loss, rest = inputs.maps.contiguous(), inputs.grad_loss.float().contiguous(), [None] * (4 - n)
    grads = {"grad_queries": [*grad_queries, *rest], "grad_keys": [*grad_keys, *rest]}
    _call(_run_backward, inputs, maps=maps, grad_loss=grad_loss, **grads)
    return grad_queries, grad_keys


def maps_shape(batch: int, L: int, V: int) -> tuple[int, int, int]:
    """The blocks LL, VV, LV, VL as (keys, rows), with the rows rounded up to an odd multiple of 16."""
    return batch, L + V, (L + 15) // 32 * 32 + (V + 15) // 32 * 32 + 32


def _call(run: Any, inputs: CongruenceLossInputs | CongruenceLossBackwardInputs, **named: Any) -> None:
    """Runs the kernel, to which the operator's inputs go beside the members that are named."""
    queries, keys, direction = inputs.queries, inputs.keys, inputs.direction
    batch, heads, L, head_dim = queries[0].shape
    blocks = unit_strides(*queries, *keys)  # they and the masks live until the call is over
    masks = [None if mask is None else mask.contiguous() for mask in (inputs.text_mask, inputs.image_mask)]
    sizes = {"B": batch, "H": heads, "D": head_dim, "lengths": (L, queries[1].shape[2])}
    directions = direction in ("text", "both"), direction in ("image", "both")
    how = {"kind": _KINDS.index(inputs.kind), "directions": directions, "scale": inputs.scale}
    run(dtype=DTYPES[queries[0].dtype], **sizes, **how, queries=blocks[:4], keys=blocks[4:], masks=masks, **named)
