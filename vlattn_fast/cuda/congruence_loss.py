"""congruence_loss by csrc/cuda/congruence_loss.cu: the loss of one sample in one block, forward and backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlattn_fast._tensors import unit_strides
from vlattn_fast.cuda._shared_library import operators


def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The loss of each sample, (B), and nothing that is kept. Queries and keys: see reference.congruence_loss.block_inputs."""
    loss = operators().congruence_loss(*_prepared(*inputs))
    return loss, loss.new_empty(0)


def backward(grad_loss: Tensor, maps: Tensor, *inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the queries and of the keys: of the first two, or of all four for "iais_distributed"."""
    return operators().congruence_loss_backward(grad_loss.float().contiguous(), *_prepared(*inputs))


def _prepared(
    queries: list[Tensor], keys: list[Tensor], text_mask: Tensor | None, image_mask: Tensor | None, *options: Any
) -> tuple[Any, ...]:
    masks = (None if mask is None else mask.contiguous() for mask in (text_mask, image_mask))
    return list(unit_strides(*queries)), list(unit_strides(*keys)), *masks, *options
