"""The way back through Abar by csrc/cpu/abar_backward.cpp, for attention_map and relevancy_step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import as_dtype, unit_strides
from vlattn_fast.backends.cpu._attention import attention, empty_row_bias, readable
from vlattn_fast.backends.cpu.score_attention import core_score
from vlattn_fast.backends.inputs import AttentionMapBackwardInputs, RelevancyStepBackwardInputs
from vlattn_fast.backends.native import address, kernel, strided

_run = kernel("abar_backward")
REDUCTIONS = ("mean", "max", "min")  # Reduction of the kernels


def gradients(
    inputs: AttentionMapBackwardInputs | RelevancyStepBackwardInputs,
    needs_inputs: bool = True,
    reduction: str = "mean",
    **abar_members: Any,
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of query, key, value, grad_output, lse and row_bias; None for those not needed. `abar_members`: the
    gradient of Abar, in members of the kernel's struct."""
    is_gradient = inputs.rule == "gradient"
    x, value = readable(inputs.attention, inputs.value if is_gradient else None)
    (grad_output,) = unit_strides(inputs.grad_output if is_gradient else None)
    (a, _kept), query, tensors = attention(x, value), x.query, (x.query, x.key, value, grad_output)
    lse = None if inputs.lse is None else inputs.lse.double().contiguous()
    grads: list[Tensor | None] = [
        None if y is None or not needs_inputs else torch.empty_like(y, memory_format=torch.contiguous_format) for y in tensors
    ]
    grad_lse = query.new_empty(query.shape[:3], dtype=torch.float32) if inputs.need_lse and needs_inputs else None
    if not query.shape[1] * query.shape[2]:  # the kernel runs over heads and queries
        grads = [None if y is None else y.zero_() for y in grads]
    grad_row_bias = empty_row_bias(x) if needs_inputs else None
    grad_query, grad_key, grad_value, grad_grad_output = map(strided, grads)
    _run(
        a=a,
        score=core_score(x),
        grad_output=strided(grad_output),
        gradient=is_gradient,
        reduction=REDUCTIONS.index(reduction),
        row_normalize=inputs.row_normalize,
        lse=address(lse),
        needs_inputs=needs_inputs,
        grad_query=grad_query,
        grad_key=grad_key,
        grad_value=grad_value,
        grad_grad_output=grad_grad_output,
        grad_lse=address(grad_lse),
        grad_row_bias=address(grad_row_bias),
        **abar_members,
    )
    return *grads, None if grad_lse is None or inputs.lse is None else as_dtype(grad_lse, inputs.lse.dtype), grad_row_bias
