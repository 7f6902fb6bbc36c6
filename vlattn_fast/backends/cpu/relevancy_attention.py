"""relevancy_attention and relevancy_step by csrc/cpu/score_attention.cpp, whose backward pass carries r past each tile, and where
rows of r are many or queries few by csrc/cpu/attention_map.cpp; the gradients of relevancy_step by csrc/cpu/abar_backward.cpp."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import as_dtype, unit_stride, weigh_rows
from vlattn_fast.backends import native
from vlattn_fast.backends.cpu import score_attention
from vlattn_fast.backends.cpu._abar import gradients
from vlattn_fast.backends.cpu._attention import attention, empty_row_bias, float32, readable
from vlattn_fast.backends.cpu.attention_map import run_map
from vlattn_fast.backends.cpu.score_attention import core_score, new_gradients, relevancy_struct, run_backward
from vlattn_fast.backends.inputs import (
    RelevancyAttentionBackwardInputs,
    RelevancyAttentionInputs,
    RelevancyStepBackwardInputs,
    RelevancyStepInputs,
)
from vlattn_fast.backends.native import address, strided

_OWN_LSE, _CALLER_LSE, _NO_LSE = 0, 1, 2  # LseSource of csrc/cpu/backward_tile.h


@functools.lru_cache
def _by_map(rows: int, queries: int) -> bool:
    return bool(native.library.function(native.chosen("carries_by_map"), *[ctypes.c_int64] * 3)(rows, queries))


def forward(inputs: RelevancyAttentionInputs) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv), lse (B, H, N) float64."""
    return score_attention.attend(inputs.attention, inputs.value)


def backward(inputs: RelevancyAttentionBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key and value, the carrier's cotangent r * a + (r * b) Abar, and the gradient of row_bias; None for
    those not needed."""
    x, grad_out, grad_carrier = inputs.attention, inputs.grad_out, inputs.grad_carrier
    grads: tuple[Tensor | None, ...] = (None, None, None)
    grad_members: dict[str, Any] = {}
    grad_row_bias = None
    if inputs.need_inputs and grad_out is not None:
        grads, grad_row_bias = new_gradients(x, inputs.value), empty_row_bias(x)
        grad_members = dict(zip(("grad_query", "grad_key", "grad_value"), map(strided, grads), strict=True))
    elif grad_carrier is None:
        return None, None, None, None, None
    elif inputs.rule == "attention":  # Abar only needs P
        grad_out = None
    direct = weighted = None
    if grad_carrier is not None:
        direct = weigh_rows(grad_carrier, inputs.residual_weight)
        weighted = weigh_rows(grad_carrier, inputs.attention_weight)
        if grad_out is None and inputs.rule == "gradient":  # Abar is zero
            return None, None, None, direct.clone(), None
    out, grad_lse = unit_stride(inputs.out), float32(inputs.grad_lse)
    lse_members = {"lse_source": _OWN_LSE, "grad_lse": address(grad_lse)}
    row_members = {"out": strided(out), **lse_members, "grad_row_bias": address(grad_row_bias), **grad_members}
    # the gradients also compute each head's map: computing it again pays if r passes H of them at more than that costs
    if not grad_members or weighted is None or weighted.shape[1] <= 2 * (x.query.shape[3] + inputs.value.shape[3]):
        attended = _run(inputs, grad_out, inputs.lse, weighted, direct, **row_members)
    else:
        _run(inputs, grad_out, inputs.lse, None, None, **row_members)
        attended = _run(inputs, grad_out, None, weighted, direct)
    return *grads, attended, grad_row_bias


def step(inputs: RelevancyStepInputs) -> Tensor:
    """relevancy @ Abar, (B, T, N) -> (B, T, M), of any core score."""
    grad_out = None if inputs.rule == "attention" else inputs.grad_output
    lse_source = _NO_LSE if inputs.lse is None else _CALLER_LSE
    attended = _run(inputs, grad_out, inputs.lse, as_dtype(inputs.relevancy, torch.float32), None, lse_source=lse_source)
    assert attended is not None
    return as_dtype(attended, inputs.relevancy.dtype)


def step_backward(inputs: RelevancyStepBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of relevancy, query, key, value, grad_output, lse and row_bias; None for those not needed."""
    r, grad_result = (x.float().contiguous() for x in (inputs.relevancy, inputs.grad))
    grad_rows = torch.zeros_like(r) if inputs.need_relevancy else None  # even if there are no heads
    abar_members: dict[str, Any] = {
        "rows": r.data_ptr(),
        "T": r.shape[1],
        "grad_result": grad_result.data_ptr(),
        "grad_rows": address(grad_rows),
    }
    grads = gradients(inputs, inputs.need_inputs, **abar_members)
    return None if grad_rows is None else as_dtype(grad_rows, inputs.relevancy.dtype), *grads


def _run(
    inputs: RelevancyAttentionBackwardInputs | RelevancyStepInputs,
    grad_out: Tensor | None,
    lse: Tensor | None,
    relevancy: Tensor | None,
    direct: Tensor | None,
    **row_members: Any,
) -> Tensor | None:
    """Returns direct + relevancy @ Abar if there is `relevancy`, in float32; computes gradients if `row_members`, members of
    Backward, has them."""
    x, value = readable(inputs.attention, None if grad_out is None else inputs.value)
    (a, _kept), query, score = attention(x, value), x.query, core_score(x)
    grad_out = None if grad_out is None else unit_stride(grad_out)
    lse = None if lse is None else as_dtype(lse, torch.float64).contiguous()
    if relevancy is None:
        run_backward(a=a, score=score, grad_out=strided(grad_out), lse=address(lse), **row_members)
        return None
    batch, carried_rows, _ = relevancy.shape
    r, direct = relevancy.contiguous(), None if direct is None else direct.contiguous()
    result = r.new_empty(batch, carried_rows, x.key.shape[2])
    if not (query.shape[1] and query.shape[2]):  # without heads or queries there is no work
        result = result.zero_() if direct is None else direct.clone()
    sums = {"rows": r.data_ptr(), "direct": address(direct), "result": result.data_ptr()}
    carried = {"T": carried_rows, "row_normalize": inputs.row_normalize, **sums}
    is_gradient = inputs.rule == "gradient"
    if "grad_query" not in row_members and _by_map(carried_rows, query.shape[2]):
        lse = None if row_members.get("lse_source") == _OWN_LSE else lse
        map_members = {"grad_output": strided(grad_out), "gradient": is_gradient, "lse": address(lse)}
        run_map(a=a, score=score, **map_members, **carried)
    else:
        head_members = {"grad_out": strided(grad_out), "lse": address(lse)}
        relevancy_members = relevancy_struct()(is_gradient=is_gradient, **carried)
        run_backward(a=a, score=score, **head_members, relevancy=relevancy_members, **row_members)
    return result
