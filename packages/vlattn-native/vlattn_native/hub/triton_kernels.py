"""The kernels behind the operators on GPUs, by operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import as_gradient, as_outputs, rows_first
from vlattn_fast.backends.inputs import (
    RelevancyAttentionBackwardInputs,
    RelevancyAttentionInputs,
    ScoreAttentionBackwardInputs,
    ScoreAttentionInputs,
)
from vlattn_fast.kernels import attention_map as _map
from vlattn_fast.kernels import attention_statistics as _statistics
from vlattn_fast.kernels import congruence_loss as _congruence
from vlattn_fast.kernels import relevancy_attention as _relevancy
from vlattn_fast.kernels import score_attention as _scores
from vlattn_fast.kernels._tiles import INTERPRETED, OLD_TRITON

BACKEND = "triton"
LSE = torch.float32
STATISTICS_OF_ROWS = ("row_max", "mean_x")  # which the backward pass reads


def check_device(query: Tensor) -> None:
    if query.device.type != "cuda" and not INTERPRETED and not torch.compiler.is_compiling():
        raise ValueError(f"query must be on a CUDA device (on the CPU in Triton's interpreter); got {query.device}")
    if query.device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(query.device)
    if capability < (8, 0):
        raise ValueError("query must be on a GPU of compute capability 8.0 or more")
    if capability[0] in (10, 11) and OLD_TRITON.value:
        raise ValueError("Triton before 3.9 compiles races and wrong addresses for sm_100: install triton 3.9")


def _forward(inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor]:
    out, lse = _scores.forward(inputs)
    return rows_first(out), lse


def _relevancy_forward(inputs: RelevancyAttentionInputs) -> tuple[Tensor | None, ...]:
    out, lse = _relevancy.forward(inputs)
    return rows_first(out), inputs.carrier.clone(memory_format=torch.contiguous_format), lse, None


def _laid_out(inputs: Any, grads: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of query, key and value in the layout of `as_gradient`; the others contiguous."""
    grad_q, grad_k, grad_v, *rest = grads
    by_inputs = (grad_q, inputs.attention.query), (grad_k, inputs.attention.key), (grad_v, inputs.value)
    return *[None if grad is None else as_gradient(grad, x) for grad, x in by_inputs], *as_outputs(rest)


def _backward(inputs: ScoreAttentionBackwardInputs) -> tuple[Tensor | None, ...]:
    return _laid_out(inputs, _scores.backward(inputs))


def _relevancy_backward(inputs: RelevancyAttentionBackwardInputs) -> tuple[Tensor | None, ...]:
    return _laid_out(inputs, _relevancy.backward(inputs))


KERNELS: dict[str, Callable[[Any], Any]] = {
    "score_attention": _forward,
    "score_attention_backward": _backward,
    "relevancy_attention": _relevancy_forward,
    "relevancy_attention_backward": _relevancy_backward,
    "relevancy_step": _relevancy.step,
    "relevancy_step_backward": lambda inputs: as_outputs(_relevancy.step_backward(inputs)),
    "attention_map": _map.forward,
    "attention_map_backward": lambda inputs: as_outputs(_map.backward(inputs)),
    "attention_statistics": _statistics.forward,
    "attention_statistics_backward": _statistics.backward,
    "congruence_loss": _congruence.forward,
    "congruence_loss_backward": _congruence.backward,
}
