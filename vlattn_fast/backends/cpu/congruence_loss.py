"""congruence_loss by csrc/cpu/congruence_loss.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import saved_for_the_last_time, unit_strides
from vlattn_fast.backends.inputs import CongruenceLossBackwardInputs, CongruenceLossInputs, queries_and_keys
from vlattn_fast.backends.native import DTYPES, address, kernel, strided
from vlattn_fast.backends.reference.congruence_loss import KINDS, num_gradients, of_all_blocks
from vlattn_fast.backends.streaming.congruence_loss import differentiated, filled, product_with_tangents

_run = kernel("congruence_loss")


def forward(inputs: CongruenceLossInputs) -> tuple[Tensor, Tensor]:
    """Returns the loss of each sample, (B), and its gradients if they are needed. Padding may hold anything."""
    (queries, keys), kind, direction = queries_and_keys(inputs), inputs.kind, inputs.direction
    text, image, *_ = queries
    batch, heads, L, head_dim = text.shape
    loss = text.new_empty(batch, dtype=torch.float32)
    # float32: they are still to be multiplied, by a number that takes them far beyond float16
    gradients = loss.new_empty(num_gradients(kind) * (text.numel() + image.numel()) if inputs.saves else 0)
    blocks = unit_strides(*queries, *keys)  # they and the masks live until the call is over
    masks = [None if mask is None else mask.contiguous() for mask in (inputs.text_mask, inputs.image_mask)]
    _run(
        dtype=DTYPES[text.dtype],
        B=batch,
        H=heads,
        D=head_dim,
        lengths=(L, image.shape[2]),
        kind=KINDS.index(kind),
        as_they_are=inputs.normalize == "none",
        directions=(direction in ("text", "both"), direction in ("image", "both")),
        scale=inputs.scale,
        queries=tuple(map(strided, blocks[:4])),
        keys=tuple(map(strided, blocks[4:])),
        masks=tuple(map(address, masks)),
        loss=address(loss),
        gradients=address(gradients),
    )
    return loss, gradients


def backward(inputs: CongruenceLossBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of the queries and of the keys; None for those of blocks that are constants."""
    blocks = [getattr(inputs, name) for name in differentiated(inputs.kind)]
    factor = inputs.grad_loss.float()[:, None, None, None]
    made = inputs.gradients.numel() == 0  # torch.func.vmap saves none
    gradients = _gradients_of_loss(inputs) if made else inputs.gradients
    # not where they are made: code of torch.compile takes no outputs that share memory
    in_place = not made and blocks[0].dtype == torch.float32 and saved_for_the_last_time()
    grads = []
    for x, part in zip(blocks, gradients.split([x.numel() for x in blocks]), strict=True):
        part = part.view(x.shape)
        grads.append(torch.mul(part, factor, out=part if in_place else x.new_empty(x.shape)))
    return of_all_blocks(grads)


def jvp(inputs: Any) -> tuple[Tensor]:
    """The tangent of the loss of each sample, (B). It reads no `gradients`: a backward pass may have multiplied them in place."""
    x = filled(inputs)
    blocks = [getattr(x, name) for name in differentiated(x.kind)]
    parts = _gradients_of_loss(x).split([block.numel() for block in blocks])
    return (product_with_tangents(x, [part.view(block.shape) for part, block in zip(parts, blocks, strict=True)]),)


def _gradients_of_loss(inputs: Any) -> Tensor:
    """Those that a forward pass makes."""
    values = [getattr(inputs, name, True) for name in CongruenceLossInputs._fields]  # `inputs` has no saves
    return forward(CongruenceLossInputs._make(values))[1]
