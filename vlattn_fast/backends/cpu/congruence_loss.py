"""congruence_loss by csrc/cpu/congruence_loss.cpp."""

from __future__ import annotations

from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import saved_for_the_last_time, unit_strides
from vlattn_fast.backends.inputs import CongruenceLossBackwardInputs, CongruenceLossInputs
from vlattn_fast.backends.native import DTYPES, StridedTensor, Struct, address, each, kernel, strided
from vlattn_fast.backends.reference.congruence_loss import num_gradients, of_all_blocks


class CongruenceLoss(Struct):
    __slots__ = ()
    _fields_ = (
        *each(c_int64, "dtype B H D"),
        ("lengths", c_int64 * 2),
        ("kind", c_int64),
        ("directions", c_int64 * 2),
        ("scale", c_double),
        *each(StridedTensor * 4, "queries keys"),
        ("masks", c_void_p * 2),
        *each(c_void_p, "loss gradients"),
    )


_run = kernel("congruence_loss", CongruenceLoss)
_KINDS = ("cacr", "iais_singular", "iais_distributed")  # Kind of the kernel


def forward(inputs: CongruenceLossInputs) -> tuple[Tensor, Tensor]:
    """Returns the loss of each sample, (B), and its gradients if they are needed. Padding may hold anything."""
    queries, keys, kind, direction = inputs.queries, inputs.keys, inputs.kind, inputs.direction
    text, image, *_ = queries
    batch, heads, L, head_dim = text.shape
    loss = text.new_empty(batch, dtype=torch.float32)
    # float32: they are still to be multiplied, by a number that takes them far beyond float16
    gradients = loss.new_empty(num_gradients(kind) * (text.numel() + image.numel()) if inputs.saves else 0)
    blocks = unit_strides(*queries, *keys)  # they and the masks live until the call is over
    masks = [None if mask is None else mask.contiguous() for mask in (inputs.text_mask, inputs.image_mask)]
    call = CongruenceLoss(
        dtype=DTYPES[text.dtype],
        B=batch,
        H=heads,
        D=head_dim,
        lengths=(L, image.shape[2]),
        kind=_KINDS.index(kind),
        directions=(direction in ("text", "both"), direction in ("image", "both")),
        scale=inputs.scale,
        queries=tuple(map(strided, blocks[:4])),
        keys=tuple(map(strided, blocks[4:])),
        masks=tuple(map(address, masks)),
        loss=address(loss),
        gradients=address(gradients),
    )
    _run(call)
    return loss, gradients


def backward(inputs: CongruenceLossBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of the queries and of the keys; None for those of blocks that are constants."""
    n = num_gradients(inputs.kind)
    blocks = [*inputs.queries[:n], *inputs.keys[:n]]
    factor = inputs.grad_loss.float()[:, None, None, None]
    parts = inputs.gradients.split([x.numel() for x in blocks])
    in_place = blocks[0].dtype == torch.float32 and saved_for_the_last_time()
    grads = []
    for x, part in zip(blocks, parts, strict=True):
        part = part.view(x.shape)
        grads.append(torch.mul(part, factor, out=part if in_place else x.new_empty(x.shape)))
    return of_all_blocks(grads)
