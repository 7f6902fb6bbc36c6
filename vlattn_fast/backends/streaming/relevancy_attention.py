"""relevancy_attention and relevancy_step in O(N) memory with plain PyTorch, on any device and dtype.

Attention and its gradients are those of score_attention. r Abar is computed after them, one tile of rows of Abar at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import weigh_rows
from vlattn_fast.backends.inputs import (
    RelevancyAttentionBackwardInputs,
    RelevancyAttentionInputs,
    RelevancyStepBackwardInputs,
    RelevancyStepInputs,
)
from vlattn_fast.backends.streaming import score_attention
from vlattn_fast.backends.streaming._abar import Abar
from vlattn_fast.backends.streaming._forward_mode import derivatives
from vlattn_fast.backends.streaming._tiles import Tiling


def forward(inputs: RelevancyAttentionInputs) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv), lse (B, H, N)."""
    return score_attention.forward(inputs.without_carrier())


def backward(inputs: RelevancyAttentionBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key and value, the carrier's cotangent r * a + (r * b) Abar, and row_bias's gradient; None for those
    not needed."""
    grad_q = grad_k = grad_v = grad_row_bias = None
    if inputs.need_inputs and inputs.grad_out is not None:
        grad_q, grad_k, grad_v, _, grad_row_bias = score_attention.backward(inputs.without_carrier(inputs.grad_out))
    if inputs.grad_carrier is None:
        return grad_q, grad_k, grad_v, None, grad_row_bias
    direct = weigh_rows(inputs.grad_carrier, inputs.residual_weight)
    if inputs.grad_out is None and inputs.rule == "gradient":  # Abar is zero
        return grad_q, grad_k, grad_v, direct.clone(), grad_row_bias
    weighted = weigh_rows(inputs.grad_carrier, inputs.attention_weight)
    return grad_q, grad_k, grad_v, direct + step(inputs.step(weighted, lse=None)), grad_row_bias


def step(inputs: RelevancyStepInputs) -> Tensor:
    """relevancy @ Abar, (B, T, N) -> (B, T, M), of any core score."""
    relevancy, abar = inputs.relevancy, Abar(inputs)
    result = relevancy.new_zeros(*relevancy.shape[:2], abar.shape[3], dtype=abar.dtype)
    for b, i in Tiling.of(relevancy, *abar.shape).query_tiles():
        result[b] += relevancy[b, :, i].to(abar.dtype) @ abar.tile(b, i)
    return result.to(relevancy.dtype)


def step_backward(inputs: RelevancyStepBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of relevancy, query, key, value, grad_output, lse and row_bias; None for those not needed.

    With u the gradient of the result, that of relevancy is u Abar^T and that of Abar is relevancy^T u, a tile at a time.
    """
    abar = Abar(inputs)
    relevancy, grad = inputs.relevancy.to(abar.dtype), inputs.grad.to(abar.dtype)
    by_relevancy = torch.zeros_like(relevancy) if inputs.need_relevancy else None
    sums = abar.sums(inputs.need_lse) if inputs.need_inputs else None
    for b, i in Tiling.of(relevancy, *abar.shape).query_tiles():
        if by_relevancy is not None:
            by_relevancy[b, :, i] = grad[b] @ abar.tile(b, i).mT
        if sums is not None:
            abar.add_gradients(sums, b, i, relevancy[b, :, i].mT @ grad[b])
    first = None if by_relevancy is None else by_relevancy.to(inputs.relevancy.dtype)
    return first, *(sums.result() if sums is not None else (None,) * 6)


FIELDS = "relevancy", "query", "key", "value", "grad_output", "lse", "row_bias"
jvp, second = derivatives(step, step_backward, (RelevancyStepInputs, RelevancyStepBackwardInputs), FIELDS)
