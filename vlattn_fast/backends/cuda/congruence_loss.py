"""congruence_loss by csrc/cuda/congruence_loss.cu: the loss of one sample in one block, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.cuda._shared_library import ROWS, kernel, single
from vlattn_fast.backends.inputs import CongruenceLossBackwardInputs, CongruenceLossInputs
from vlattn_fast.backends.native import pointer, rows
from vlattn_fast.backends.reference.congruence_loss import num_gradients

_SIZES = "B H L V D"
_KINDS = ("cacr", "iais_singular", "iais_distributed")  # Congruence::Kind
_BLOCKS = (0, 2, 3, 1)  # LL, LV, VL, VV, as the kernel has them, of LL, VV, LV, VL


def _kernel(name: str) -> Any:
    return kernel(name, _SIZES, f"4q2ii2?{8 * ROWS}2qfqq{8 * ROWS}q")  # Congruence


_forward, _backward = _kernel("congruence_loss"), _kernel("congruence_loss_backward")


def forward(inputs: CongruenceLossInputs) -> tuple[Tensor, Tensor]:
    """The loss of each sample, (B), and an empty tensor: nothing is kept for the backward pass."""
    text = inputs.queries[0]
    loss = text.new_empty(text.shape[0], dtype=torch.float32)
    regions = 3 if inputs.kind == "iais_singular" else 2
    _call(_forward, inputs, regions, loss, None, [], [])
    return loss, loss.new_empty(0)


def backward(inputs: CongruenceLossBackwardInputs) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the queries and of the keys, of as many as `num_gradients` says."""
    n = num_gradients(inputs.kind)
    grads = [[x.new_empty(*x.shape) for x in xs[:n]] for xs in (inputs.queries, inputs.keys)]
    regions = 5 if inputs.kind == "iais_singular" else 3
    _call(_backward, inputs, regions, None, inputs.grad_loss.float().contiguous(), *grads)
    return grads[0], grads[1]


def _call(
    run: Any,
    inputs: CongruenceLossInputs | CongruenceLossBackwardInputs,
    regions: int,
    loss: Tensor | None,
    grad_loss: Tensor | None,
    grad_queries: list[Tensor],
    grad_keys: list[Tensor],
) -> None:
    queries, keys, text_mask, image_mask = inputs.queries, inputs.keys, inputs.text_mask, inputs.image_mask
    kind, direction, scale = inputs.kind, inputs.direction, inputs.scale
    batch, heads, L, head_dim = queries[0].shape
    V = queries[1].shape[2]
    blocks = unit_strides(*queries), unit_strides(*keys)  # they, the masks and the maps live until the call is over
    masks = [None if mask is None else mask.contiguous() for mask in (text_mask, image_mask)]
    maps = queries[0].new_empty(batch, regions, L + V, L + V, dtype=torch.float32)
    run(
        queries[0],
        *(batch, heads, L, V, head_dim, regions),
        *(_KINDS.index(kind), direction in ("text", "both"), direction in ("image", "both")),
        *(*_rows(blocks[0]), *_rows(blocks[1]), *map(pointer, masks), single(scale)),
        *(pointer(loss), pointer(grad_loss), *_rows(grad_queries), *_rows(grad_keys), maps.data_ptr()),
    )


def _rows(blocks: Any) -> tuple[int, ...]:
    """StridedTensor[4]; those that are not in the list are absent."""
    return sum((rows(blocks[n] if n < len(blocks) else None) for n in _BLOCKS), ())
