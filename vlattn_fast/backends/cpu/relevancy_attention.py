"""relevancy_attention and relevancy_step by csrc/cpu/relevancy_attention.cpp."""

from __future__ import annotations

from torch import Tensor

from vlattn_fast._ground.tensors import as_dtype, unit_strides, weigh_rows
from vlattn_fast.backends.cpu import score_attention
from vlattn_fast.backends.cpu._attention import fields, masks
from vlattn_fast.backends.cpu.score_attention import BACKWARD, NO_RELEVANCY, new_gradient
from vlattn_fast.backends.native import kernel, pointer, rows

_backward = kernel("relevancy_attention_backward", BACKWARD)
_DOT = (0, 0.0, 0, 0, 0.0)  # Score and Dropout of csrc/cpu/
_OWN_LSE, _CALLER_LSE, _NO_LSE = 0, 1, 2  # LseSource of csrc/cpu/backward_tile.h


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    carrier: Tensor,
    residual_weight: Tensor | None,
    attention_weight: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    rule: str,
    row_normalize: bool,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, N, Dv), a copy of the carrier (B, T, N), lse (B, H, N) float64."""
    out, lse = score_attention.forward(query, key, value, None, attn_mask, key_mask, None, "dot", 0.0, scale, 0.0, is_causal)
    return out, carrier.clone(), lse


def backward(
    grad_out: Tensor | None,
    grad_carrier: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    residual_weight: Tensor | None,
    attention_weight: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    rule: str,
    row_normalize: bool,
    scale: float,
    is_causal: bool,
    need_inputs: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key and value, and the carrier's cotangent r * a + (r * b) Abar; None for those not needed."""
    grads: list[Tensor | None] = [None, None, None]
    if need_inputs and grad_out is not None:
        grads = [new_gradient(x, query) for x in (query, key, value)]
    elif grad_carrier is None:
        return None, None, None, None
    elif rule == "attention":  # Abar needs P alone
        grad_out = None
    direct = weighted = None
    if grad_carrier is not None:
        direct = weigh_rows(grad_carrier, residual_weight)
        weighted = weigh_rows(grad_carrier, attention_weight)
        if grad_out is None and rule == "gradient":  # Abar is zero
            return None, None, None, direct.clone()
    attended = _run(
        *(grad_out, query, key, value, out, lse, attn_mask, key_mask, scale, is_causal, _OWN_LSE),
        *(grads, weighted, direct, rule, row_normalize),
    )
    return grads[0], grads[1], grads[2], attended


def step(
    relevancy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grad_output: Tensor | None,
    lse: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    rule: str,
    row_normalize: bool,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """relevancy @ Abar, (B, T, N) -> (B, T, M)."""
    if rule == "attention":
        value = grad_output = None
    no_grads: list[Tensor | None] = [None, None, None]
    lse_source = _NO_LSE if lse is None else _CALLER_LSE
    attended = _run(
        *(grad_output, query, key, value, None, lse, attn_mask, key_mask, scale, is_causal, lse_source),
        *(no_grads, relevancy, None, rule, row_normalize),
    )
    assert attended is not None
    return attended


def _run(
    grad_out: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    is_causal: bool,
    lse_source: int,
    grads: list[Tensor | None],
    relevancy: Tensor | None,
    direct: Tensor | None,
    rule: str,
    row_normalize: bool,
) -> Tensor | None:
    """Fills `grads`, of query, key and value, where they are not None; direct + relevancy @ Abar where there is `relevancy`."""
    if grad_out is None:
        value = None
    grad_out, query, key, value, out = unit_strides(grad_out, query, key, value, out)
    seen = masks(attn_mask, key_mask, is_causal, query, key)
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
