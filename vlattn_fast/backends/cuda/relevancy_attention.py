"""relevancy_attention and relevancy_step by csrc/cuda/relevancy_attention.cu: short sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import as_dtype, empty_gradient, empty_rows_first, multiprocessors, unit_strides, weigh_rows
from vlattn_fast.backends.cuda._shared_library import MASKS, ROWS, kernel, mask_fields, masks, single
from vlattn_fast.backends.inputs import RelevancyAttentionBackwardInputs, RelevancyAttentionInputs, RelevancyStepInputs
from vlattn_fast.backends.native import pointer, rows

_SIZES = "B H key_heads N M T D DV"
_ATTENTION = f"{3 * ROWS}{MASKS}f{ROWS}q"
_BACKWARD = f"2?{ROWS}{3 * ROWS}q3q3q?q2q"
_FIELDS = f"6q3i{_ATTENTION}{_BACKWARD}"  # Relevancy
_forward = kernel("relevancy_attention", _SIZES, _FIELDS)
_backward = kernel("relevancy_attention_backward", _SIZES, _FIELDS)
_step = kernel("relevancy_step", _SIZES, _FIELDS)
_NO_WEIGHT = (0, 0, 0)


def forward(inputs: RelevancyAttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, N, Dv), a copy of the carrier (B, T, N), lse (B, H, N)."""
    scale, is_causal = inputs.scale, inputs.is_causal
    query, key, value = unit_strides(inputs.query, inputs.key, inputs.value)
    attn_mask, key_mask = masks(inputs.attn_mask, inputs.key_mask, query, key)
    batch, heads, queries, _ = query.shape
    out = empty_rows_first(query, heads, queries, value.shape[3])
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    _forward(
        query,
        *_attention(query, key, value, out, lse, attn_mask, key_mask, scale, is_causal, 0, 1),
        *(False, False),
        *(*rows(None), *rows(None), *rows(None), *rows(None)),
        *(0, *_NO_WEIGHT, *_NO_WEIGHT, False, 0, 0, 0),
    )
    return out, inputs.carrier.clone(), lse


def backward(inputs: RelevancyAttentionBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, and the carrier's cotangent r * a + (r * b) Abar; None where nothing is needed."""
    query, grad_out, grad_carrier = inputs.query, inputs.grad_out, inputs.grad_carrier
    direct = None
    if grad_carrier is not None and grad_out is None and inputs.rule == "gradient":  # Abar is zero
        direct = weigh_rows(grad_carrier, inputs.residual_weight).clone()
        grad_carrier = None
    grads: list[Tensor | None] = [None, None, None]
    if inputs.need_inputs and grad_out is not None:
        grads = [empty_gradient(x) for x in (query, inputs.key, inputs.value)]
    elif grad_carrier is None:
        return None, None, None, direct
    r_abar = _run_backward(
        _backward,
        inputs,
        grad_carrier,
        grad_out,
        inputs.value,
        out=inputs.out,
        lse=None if query.dtype == torch.float32 else inputs.lse,  # a rounded lse would be half of the error: it is made again
        residual_weight=inputs.residual_weight,
        attention_weight=inputs.attention_weight,
        grads=grads,
        residual=True,
    )
    return *grads, r_abar


def step(inputs: RelevancyStepInputs) -> Tensor:
    """relevancy @ Abar, (B, T, N) -> (B, T, M).

    `lse` may count keys that are not here. Under a float mask, rows whose lse is too large to be rounded are normalised over the
    keys that are here.
    """
    value, grad_output = (None, None) if inputs.rule == "attention" else (inputs.value, inputs.grad_output)
    r_abar = _run_backward(_step, inputs, inputs.relevancy, grad_output, value, lse=inputs.lse)
    assert r_abar is not None
    return as_dtype(r_abar, inputs.relevancy.dtype)


def _run_backward(
    run: Any,
    inputs: RelevancyAttentionBackwardInputs | RelevancyStepInputs,
    relevancy: Tensor | None,
    grad_out: Tensor | None,
    value: Tensor | None,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    residual_weight: Tensor | None = None,
    attention_weight: Tensor | None = None,
    grads: list[Tensor | None] | None = None,
    residual: bool = False,
) -> Tensor | None:
    """Fills `grads`, of query, key and value, where they are not None. r * a + (r * b) Abar, or without the first term, where
    there is r, `relevancy`."""
    rule, row_normalize, scale, is_causal = inputs.rule, inputs.row_normalize, inputs.scale, inputs.is_causal
    f32 = torch.float32
    grad_query, grad_key, grad_value = grads or (None, None, None)
    grad_out, query, key, value, out = unit_strides(grad_out, inputs.query, inputs.key, value, out)
    attn_mask, key_mask = masks(inputs.attn_mask, inputs.key_mask, query, key)
    lse, r = (None if x is None else as_dtype(x, f32).contiguous() for x in (lse, relevancy))
    a, b = (None if x is None else as_dtype(x, f32) for x in (residual_weight, attention_weight))
    batch, heads, queries, _ = query.shape
    key_heads, keys = key.shape[1:3]
    carried, parts = 0 if r is None else r.shape[1], _parts(batch, key_heads, multiprocessors(query.device))
    r_abar = None if r is None else r.new_empty(batch, carried, keys)
    row_data = query.new_empty(4, batch, heads, queries, dtype=f32)
    partial = query.new_empty(parts - 1, batch, carried, keys, dtype=f32)
    run(
        query,
        *_attention(query, key, value, out, lse, attn_mask, key_mask, scale, is_causal, carried, parts),
        *(rule == "gradient", row_normalize),
        *(*rows(grad_out), *rows(grad_query), *rows(grad_key), *rows(grad_value)),
        *(pointer(r), *_weight(a), *_weight(b), residual),
        *(pointer(r_abar), row_data.data_ptr(), partial.data_ptr()),
    )
    return r_abar


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    is_causal: bool,
    carried: int,
    parts: int,
) -> tuple[Any, ...]:
    """The first fields; the caller keeps the tensors until the call is over."""
    (batch, heads, queries, head_dim), (_, key_heads, keys, _) = query.shape, key.shape
    return (
        *(batch, heads, key_heads, queries, keys, carried, head_dim, 0 if value is None else value.shape[3], parts),
        *(*rows(query), *rows(key), *rows(value)),
        *(*mask_fields(attn_mask, key_mask, is_causal), single(scale)),
        *(*rows(out), pointer(lse)),
    )


def _parts(batch: int, key_heads: int, multiprocessors: int) -> int:
    """Ranges of key heads into which a backward pass cuts a sample, a block each: two blocks for every multiprocessor, and no cut
    where there is a sample for each."""
    if batch == 0 or batch >= multiprocessors:
        return 1
    return max(1, min(key_heads, -(-2 * multiprocessors // batch)))


def _weight(x: Tensor | None) -> tuple[int, int, int]:
    """RowWeight of (B, N) or (1, 1)."""
    if x is None:
        return _NO_WEIGHT
    batch, row = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), batch, row
