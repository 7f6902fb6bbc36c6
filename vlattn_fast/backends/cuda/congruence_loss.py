"""congruence_loss by csrc/cuda/congruence_loss.cu: forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.cuda._shared_library import kernel
from vlattn_fast.backends.inputs import CongruenceLossBackwardInputs, CongruenceLossInputs, queries_and_keys
from vlattn_fast.backends.native import DTYPES, address, strided
from vlattn_fast.backends.reference.congruence_loss import num_gradients, of_all_blocks

_forward, _backward = kernel("congruence_loss"), kernel("congruence_loss_backward")
_KINDS = ("cacr", "iais_distributed")  # Congruence::Kind
_ROWS = 64  # of a block of threads, which has a part of the loss
_STRIP = 16  # a multiple of so many rows and columns has the block of a map
_BLOCKS = (0, 2, 3, 1)  # LL, LV, VL, VV, as the kernel has them, of LL, VV, LV, VL


def forward(inputs: CongruenceLossInputs) -> tuple[Tensor, Tensor]:
    """Returns the loss of each sample, (B), and an empty tensor: nothing is stored for the backward pass."""
    text, image = inputs.text_query, inputs.image_query
    parts = sum(-(-x.shape[2] // _ROWS) for x in (text, image))
    losses = text.new_empty(text.shape[0], parts, dtype=torch.float32)
    _call(_forward, inputs, 1, loss=address(losses), parts=parts)
    return losses.sum(1), losses.new_empty(0)


def backward(inputs: CongruenceLossBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of the queries and of the keys; None for those of blocks that are constants."""
    n = num_gradients(inputs.kind)
    queries, keys = ([x.new_empty(*x.shape) for x in xs[:n]] for xs in queries_and_keys(inputs))
    grad_loss = inputs.grad_loss.float().contiguous()
    grads = {"grad_query": _in_order(queries), "grad_key": _in_order(keys)}
    _call(_backward, inputs, 3, grad_loss=address(grad_loss), **grads)
    return of_all_blocks([*queries, *keys])


def _call(run: Any, inputs: CongruenceLossInputs | CongruenceLossBackwardInputs, regions: int, **others: Any) -> None:
    """Runs the kernels with the operator's inputs, a workspace of so many maps a sample, and other members."""
    like, direction = inputs.text_query, inputs.direction
    batch, heads, L, head_dim = like.shape
    V = inputs.image_query.shape[2]
    queries, keys = (unit_strides(*xs) for xs in queries_and_keys(inputs))
    text_mask, image_mask = (None if mask is None else mask.contiguous() for mask in (inputs.text_mask, inputs.image_mask))
    length = sum(-(-size // _STRIP) * _STRIP for size in (L, V))
    maps = like.new_empty(regions, batch, length, length, dtype=torch.float32)
    run(
        like,
        dtype=DTYPES[like.dtype],
        B=batch,
        H=heads,
        L=L,
        V=V,
        D=head_dim,
        kind=_KINDS.index(inputs.kind),
        text=direction in ("text", "both"),
        image=direction in ("image", "both"),
        query=_in_order(queries),
        key=_in_order(keys),
        text_mask=address(text_mask),
        image_mask=address(image_mask),
        scale=inputs.scale,
        maps=address(maps),
        **others,
    )


def _in_order(blocks: Sequence[Tensor]) -> tuple[Any, ...]:
    """As the kernel has them; those that are not in the list are absent."""
    return tuple(strided(blocks[n] if n < len(blocks) else None) for n in _BLOCKS)
