"""relevancy_attention and relevancy_step by csrc/cpu/relevancy_attention.cpp."""

from __future__ import annotations

from torch import Tensor

from vlattn_fast._ground.tensors import as_dtype, unit_strides, weigh_rows
from vlattn_fast.backends.cpu import score_attention
from vlattn_fast.backends.cpu._attention import fields, masks
from vlattn_fast.backends.cpu.score_attention import BACKWARD, NO_RELEVANCY, new_gradient
from vlattn_fast.backends.inputs import RelevancyAttentionBackwardInputs, RelevancyAttentionInputs, RelevancyStepInputs
from vlattn_fast.backends.native import kernel, pointer, rows

_backward = kernel("relevancy_attention_backward", BACKWARD)
_DOT = (0, 0.0, 0, 0, 0.0)  # Score and Dropout of csrc/cpu/
_OWN_LSE, _CALLER_LSE, _NO_LSE = 0, 1, 2  # LseSource of csrc/cpu/backward_tile.h


def forward(inputs: RelevancyAttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, N, Dv), a copy of the carrier (B, T, N), lse (B, H, N) float64."""
    out, lse = score_attention.forward(inputs.attention())
    return out, inputs.carrier.clone(), lse


def backward(inputs: RelevancyAttentionBackwardInputs) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key and value, and the carrier's cotangent r * a + (r * b) Abar; None for those not needed."""
    query, grad_out, grad_carrier = inputs.query, inputs.grad_out, inputs.grad_carrier
    grads: list[Tensor | None] = [None, None, None]
    if inputs.need_inputs and grad_out is not None:
        grads = [new_gradient(x, query) for x in (query, inputs.key, inputs.value)]
    elif grad_carrier is None:
        return None, None, None, None
    elif inputs.rule == "attention":  # Abar needs P alone
        grad_out = None
    direct = weighted = None
    if grad_carrier is not None:
        direct = weigh_rows(grad_carrier, inputs.residual_weight)
        weighted = weigh_rows(grad_carrier, inputs.attention_weight)
        if grad_out is None and inputs.rule == "gradient":  # Abar is zero
            return None, None, None, direct.clone()
    attended = _run(inputs, grad_out, inputs.out, inputs.lse, _OWN_LSE, grads, weighted, direct)
    return grads[0], grads[1], grads[2], attended


def step(inputs: RelevancyStepInputs) -> Tensor:
    """relevancy @ Abar, (B, T, N) -> (B, T, M)."""
    grad_out = None if inputs.rule == "attention" else inputs.grad_output
    no_grads: list[Tensor | None] = [None, None, None]
    lse_source = _NO_LSE if inputs.lse is None else _CALLER_LSE
    attended = _run(inputs, grad_out, None, inputs.lse, lse_source, no_grads, inputs.relevancy, None)
    assert attended is not None
    return attended


def _run(
    inputs: RelevancyAttentionBackwardInputs | RelevancyStepInputs,
    grad_out: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    lse_source: int,
    grads: list[Tensor | None],
    relevancy: Tensor | None,
    direct: Tensor | None,
) -> Tensor | None:
    """Fills `grads`, of query, key and value, where they are not None; direct + relevancy @ Abar where there is `relevancy`."""
    rule, row_normalize, scale = inputs.rule, inputs.row_normalize, inputs.scale
    value = None if grad_out is None else inputs.value
    grad_out, query, key, value, out = unit_strides(grad_out, inputs.query, inputs.key, value, out)
    seen = masks(inputs.attn_mask, inputs.key_mask, inputs.is_causal, query, key)
    lse = None if lse is None else lse.double().contiguous()
    result: Tensor | None = None
    carried: tuple[int, ...] = NO_RELEVANCY
    if relevancy is not None:
        batch, carried_rows, _ = relevancy.shape
        r = relevancy.float().contiguous()
        direct = None if direct is None else direct.float().contiguous()
        result = r.new_empty(batch, carried_rows, key.shape[2])
        if not (query.shape[1] and query.shape[2]):  # without heads or queries there is no work
            result = result.zero_() if direct is None else direct.clone()
        carried = (r.data_ptr(), carried_rows, rule == "gradient", row_normalize, pointer(direct), result.data_ptr())
    _backward(
        *fields(query, key, value, seen, scale),
        *_DOT,
        *(*rows(grad_out), *rows(out), pointer(lse), lse_source, 0),
        *(*rows(grads[0]), *rows(grads[1]), *rows(grads[2]), 0),
        *carried,
    )
    return result if relevancy is None or result is None else as_dtype(result, relevancy.dtype)
