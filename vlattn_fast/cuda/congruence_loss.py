"""congruence_loss by csrc/congruence_loss.cu: the loss of one sample in one block, forward and backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlattn_fast.cuda._shared_library import operators, unit_strides


def forward(*inputs: Any) -> Tensor:
    """The loss of each sample, (B)."""
    return operators().congruence_loss(*_prepared(*inputs))


def backward(grad_loss: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the eight tensors; None for the cross block unless kind is "iais_distributed"."""
    grads = operators().congruence_loss_backward(grad_loss.float().contiguous(), *_prepared(*inputs))
    return tuple(grad if grad.dim() == 4 else None for grad in grads)


def _prepared(*inputs: Any) -> tuple[Any, ...]:
    tensors, masks, options = inputs[:8], inputs[8:10], inputs[10:]
    return *unit_strides(*tensors), *(None if mask is None else mask.contiguous() for mask in masks), *options
