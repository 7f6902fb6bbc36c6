"""congruence_loss by csrc/cpu/congruence_loss.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import saved_for_the_last_time, unit_strides
from vlattn_fast.backends.inputs import CongruenceLossBackwardInputs, CongruenceLossInputs
from vlattn_fast.backends.native import DTYPES, Fields, kernel
from vlattn_fast.backends.reference.congruence_loss import num_gradients

_FIELDS = Fields(
    "integer dtype B H D lengths[2] kind directions[2], number scale, tensor queries[4] keys[4], pointer masks[2] loss gradients"
)
_run = kernel("congruence_loss", _FIELDS)
_KINDS = ("cacr", "iais_singular", "iais_distributed")  # Kind of the kernel


def forward(inputs: CongruenceLossInputs) -> tuple[Tensor, Tensor]:
    """The loss of each sample, (B), and its gradients where they are needed. Padding may hold anything."""
    queries, keys, kind, direction = inputs.queries, inputs.keys, inputs.kind, inputs.direction
    text, image, *_ = queries
    batch, heads, L, head_dim = text.shape
    loss = text.new_empty(batch, dtype=torch.float32)
    # float32: they are still to be multiplied, by a number that takes them far beyond float16
    gradients = loss.new_empty(num_gradients(kind) * (text.numel() + image.numel()) if inputs.saves else 0)
    blocks = unit_strides(*queries, *keys)  # they and the masks live until the call is over
    masks = [None if mask is None else mask.contiguous() for mask in (inputs.text_mask, inputs.image_mask)]
    sizes = {"B": batch, "H": heads, "D": head_dim, "lengths": (L, image.shape[2])}
    directions = direction in ("text", "both"), direction in ("image", "both")
    how = {"kind": _KINDS.index(kind), "directions": directions, "scale": inputs.scale}
    tensors = {"queries": blocks[:4], "keys": blocks[4:], "masks": masks, "loss": loss, "gradients": gradients}
    _run(dtype=DTYPES[text.dtype], **sizes, **how, **tensors)
    return loss, gradients


def backward(inputs: CongruenceLossBackwardInputs) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the queries and of the keys, of as many as `num_gradients` says."""
    n = num_gradients(inputs.kind)
    blocks = [*inputs.queries[:n], *inputs.keys[:n]]
    factor = inputs.grad_loss.float()[:, None, None, None]
    parts = inputs.gradients.split([x.numel() for x in blocks])
    in_place = blocks[0].dtype == torch.float32 and saved_for_the_last_time()
    grads = []
    for x, part in zip(blocks, parts, strict=True):
        part = part.view(x.shape)
        grads.append(torch.mul(part, factor, out=part if in_place else x.new_empty(x.shape)))
    return grads[:n], grads[n:]
