"""congruence_loss by csrc/cuda/congruence_loss.cu: the loss of one sample in one block, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._native import pointer, rows
from vlattn_fast._tensors import unit_strides
from vlattn_fast.cuda._shared_library import ROWS, kernel, single
from vlattn_fast.reference.congruence_loss import num_gradients

_SIZES = "B H L V D"
_KINDS = ("cacr", "iais_singular", "iais_distributed")  # Congruence::Kind
_BLOCKS = (0, 2, 3, 1)  # LL, LV, VL, VV, as the kernel has them, of LL, VV, LV, VL


def _kernel(name: str) -> Any:
    return kernel(name, _SIZES, f"4q2ii2?{8 * ROWS}2qfqq{8 * ROWS}q")  # Congruence


_forward, _backward = _kernel("congruence_loss"), _kernel("congruence_loss_backward")


def forward(
    queries: list[Tensor],
    keys: list[Tensor],
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    kind: str,
    direction: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The loss of each sample, (B), and an empty tensor: nothing is kept for the backward pass.

    Queries and keys: see reference.congruence_loss.block_inputs.
    """
    loss = queries[0].new_empty(queries[0].shape[0], dtype=torch.float32)
    regions = 3 if kind == "iais_singular" else 2
    _call(_forward, queries, keys, text_mask, image_mask, kind, direction, scale, regions, loss, None, [], [])
    return loss, loss.new_empty(0)


def backward(
    grad_loss: Tensor,
    maps: Tensor,
    queries: list[Tensor],
    keys: list[Tensor],
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    kind: str,
    direction: str,
    scale: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the queries and of the keys, of as many as `num_gradients` says."""
    grads = [[x.new_empty(*x.shape) for x in xs[: num_gradients(kind)]] for xs in (queries, keys)]
    grad_loss = grad_loss.float().contiguous()
    regions = 5 if kind == "iais_singular" else 3
    _call(_backward, queries, keys, text_mask, image_mask, kind, direction, scale, regions, None, grad_loss, *grads)
    return grads[0], grads[1]


def _call(
    run: Any,
    queries: list[Tensor],
    keys: list[Tensor],
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    kind: str,
    direction: str,
    scale: float,
    regions: int,
    loss: Tensor | None,
    grad_loss: Tensor | None,
    grad_queries: list[Tensor],
    grad_keys: list[Tensor],
) -> None:
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
