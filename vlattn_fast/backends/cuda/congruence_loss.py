"""congruence_loss by csrc/cuda/congruence_loss.cu: the loss of one sample in one block, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.cuda._shared_library import kernel
from vlattn_fast.backends.inputs import CongruenceLossBackwardInputs, CongruenceLossInputs
from vlattn_fast.backends.native import DTYPES, Fields
from vlattn_fast.backends.reference.congruence_loss import num_gradients

_FIELDS = Fields(
    "int32 dtype, size B H L V, size32 D, int32 kind, flag text image, tensor query[4] key[4], "
    "pointer text_mask image_mask, single scale, pointer loss grad_loss, tensor grad_query[4] grad_key[4], pointer maps"
)
_forward, _backward = kernel("congruence_loss", _FIELDS), kernel("congruence_loss_backward", _FIELDS)
_KINDS = ("cacr", "iais_distributed")  # Congruence::Kind
_BLOCKS = (0, 2, 3, 1)  # LL, LV, VL, VV, as the kernel has them, of LL, VV, LV, VL


def forward(inputs: CongruenceLossInputs) -> tuple[Tensor, Tensor]:
    """The loss of each sample, (B), and an empty tensor: nothing is kept for the backward pass."""
    text = inputs.queries[0]
    loss = text.new_empty(text.shape[0], dtype=torch.float32)
    _call(_forward, inputs, loss=loss)
    return loss, loss.new_empty(0)


def backward(inputs: CongruenceLossBackwardInputs) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the queries and of the keys, of as many as `num_gradients` says."""
    n = num_gradients(inputs.kind)
    queries, keys = ([x.new_empty(*x.shape) for x in xs[:n]] for xs in (inputs.queries, inputs.keys))
    grads = {"grad_query": _in_order(queries), "grad_key": _in_order(keys)}
    _call(_backward, inputs, grad_loss=inputs.grad_loss.float().contiguous(), **grads)
    return queries, keys


def _call(run: Any, inputs: CongruenceLossInputs | CongruenceLossBackwardInputs, **named: Any) -> None:
    """Runs the kernel, to which the operator's inputs go beside the members that are named."""
    like, direction = inputs.queries[0], inputs.direction
    batch, heads, L, head_dim = like.shape
    V = inputs.queries[1].shape[2]
    query, key = _in_order(unit_strides(*inputs.queries)), _in_order(unit_strides(*inputs.keys))
    text_mask, image_mask = (None if mask is None else mask.contiguous() for mask in (inputs.text_mask, inputs.image_mask))
    maps = like.new_empty(batch, 3, L + V, L + V, dtype=torch.float32)
    sizes = {"B": batch, "H": heads, "L": L, "V": V, "D": head_dim}
    how = {"kind": _KINDS.index(inputs.kind), "text": direction in ("text", "both"), "image": direction in ("image", "both")}
    tensors = {"query": query, "key": key, "text_mask": text_mask, "image_mask": image_mask, "maps": maps}
    run(like, dtype=DTYPES[like.dtype], **sizes, **how, scale=inputs.scale, **tensors, **named)


def _in_order(blocks: Sequence[Tensor]) -> list[Tensor | None]:
    """As the kernel has them; those that are not in the list are absent."""
    return [blocks[n] if n < len(blocks) else None for n in _BLOCKS]
