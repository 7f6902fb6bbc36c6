"""score_attention by csrc/cuda/score_attention.cu: exact additive scores, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import as_dtype, empty_gradient, empty_rows_first, fold_heads, multiprocessors, unit_strides
from vlattn_fast.backends.cuda._shared_library import MASKS, ROWS, kernel, mask_fields, masks, single
from vlattn_fast.backends.inputs import ScoreAttentionBackwardInputs, ScoreAttentionInputs
from vlattn_fast.backends.native import pointer, rows

_SIZES = "B H key_heads value_heads N M A DV"
_FIELDS = f"6q2i{3 * ROWS}q{MASKS}f{ROWS}q{ROWS}q{3 * ROWS}2?2q3q"  # ScoreAttention
_forward = kernel("score_attention", _SIZES, _FIELDS)
_backward = kernel("score_attention_backward", _SIZES, _FIELDS)
_BLOCK, _GROUP = 64, 16  # keys that a block and a warp take at a time in the backward pass: BACKWARD_ROWS
_BLOCKS = 4  # for each multiprocessor: with fewer heads, the keys of one are divided among blocks
_LARGEST = 2**27  # numbers in the sums of several ranges of keys


def forward(inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv) and lse (B, H, N)."""
    query, key, value = unit_strides(inputs.query, inputs.key, inputs.value)
    attn_mask, key_mask = masks(inputs.attn_mask, inputs.key_mask, query, key)
    vector, scale, is_causal = _vector(inputs), inputs.scale, inputs.is_causal
    batch, heads, queries, _ = query.shape
    out = empty_rows_first(query, heads, queries, value.shape[3])
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    _forward(
        query,
        *_fields(query, key, value, vector, attn_mask, key_mask, scale, is_causal),
        *(*rows(out), lse.data_ptr()),
        *(*rows(None), 0),  # grad_out, grad_lse
        *(*rows(None), *rows(None), *rows(None), False, False),
        *(0, 0, 0, 0, 0),
    )
    return out, lse


def backward(inputs: ScoreAttentionBackwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and vector."""
    grad_out, query, key, value, out = unit_strides(inputs.grad_out, inputs.query, inputs.key, inputs.value, inputs.out)
    attn_mask, key_mask = masks(inputs.attn_mask, inputs.key_mask, query, key)
    vector, scale, is_causal = _vector(inputs), inputs.scale, inputs.is_causal
    lse = inputs.lse.contiguous()
    grad_lse = None if inputs.grad_lse is None else inputs.grad_lse.contiguous()
    (batch, heads, queries, units), keys, f32 = query.shape, key.shape[2], torch.float32
    key_heads = max(key.shape[1], value.shape[1])
    grad_query = empty_gradient(query)
    grad_key, grad_value = empty_gradient(key, key_heads), empty_gradient(value, key_heads)
    ranges = _key_ranges(query, key_heads, keys)
    grad_vector = query.new_empty(batch, heads, -(-keys // _GROUP), units, dtype=f32)
    sums = query.new_zeros(batch, heads, ranges, queries + queries % 2, units + units % 2, dtype=f32)
    row_data = query.new_empty(3, batch, heads, queries, dtype=f32)
    parts = query.new_empty(batch, key_heads, keys, units, dtype=f32) if key_heads < heads else None
    _backward(
        query,
        *_fields(query, key, value, vector, attn_mask, key_mask, scale, is_causal),
        *(*rows(out), lse.data_ptr()),
        *(*rows(grad_out), pointer(grad_lse)),
        *(*rows(grad_query), *rows(grad_key), *rows(grad_value), key.shape[1] != key_heads, value.shape[1] != key_heads),
        *(ranges, grad_vector.data_ptr(), row_data.data_ptr(), sums.data_ptr(), pointer(parts)),
    )
    summed = as_dtype(grad_vector.sum((0, 2)), vector.dtype)
    return grad_query, _folded(grad_key, key), _folded(grad_value, value), summed


def _vector(inputs: ScoreAttentionInputs | ScoreAttentionBackwardInputs) -> Tensor:
    assert inputs.vector is not None  # additive scores have one
    return inputs.vector.contiguous()


def _fields(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    vector: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    is_causal: bool,
) -> tuple[Any, ...]:
    """The first fields; the caller keeps the tensors until the call is over."""
    (batch, heads, queries, units), (_, key_heads, keys, _), (_, value_heads, _, value_dim) = query.shape, key.shape, value.shape
    return (
        *(batch, heads, key_heads, value_heads, queries, keys, units, value_dim),
        *(*rows(query), *rows(key), *rows(value), vector.data_ptr()),
        *(*mask_fields(attn_mask, key_mask, is_causal), single(scale)),
    )


def _key_ranges(query: Tensor, key_heads: int, keys: int) -> int:
    """Into how many the keys of a head are divided. Each range has sums of its own for the gradient of the query."""
    heads, sums = max(1, query.shape[0] * key_heads), max(1, query.numel())
    return max(1, min(-(-keys // _BLOCK), -(-_BLOCKS * multiprocessors(query.device) // heads), _LARGEST // sums))


def _folded(grad: Tensor, x: Tensor) -> Tensor:
    return as_dtype(fold_heads(grad, x.shape[1]), x.dtype)
