"""score_attention by csrc/cuda/score_attention.cu: exact additive scores, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import as_dtype, empty_gradient, empty_rows_first, fold_heads, multiprocessors, unit_strides
from vlattn_fast.backends.cuda._shared_library import kernel, masks_of
from vlattn_fast.backends.inputs import Attention, ScoreAttentionBackwardInputs, ScoreAttentionInputs
from vlattn_fast.backends.native import DTYPES, address, strided

_forward, _backward = kernel("score_attention"), kernel("score_attention_backward")
_BLOCK, _GROUP = 64, 16  # keys that a block and a warp take at a time in the backward pass: BACKWARD_ROWS
_BLOCKS = 4  # for each multiprocessor: with fewer heads, the keys of one are divided among blocks
_LARGEST = 2**27  # numbers in the sums of several ranges of keys


def forward(inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv) and lse (B, H, N)."""
    x = inputs.attention
    query, key, value = unit_strides(x.query, x.key, inputs.value)
    (masks, _kept), vector = masks_of(x), _vector(x)
    batch, heads, queries, _ = query.shape
    out = empty_rows_first(query, heads, queries, value.shape[3])
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    rows = {"vector": address(vector), "scale": x.scale, "out": strided(out), "lse": address(lse)}
    _forward(query, **_attention(query, key, value), masks=masks, **rows)
    return out, lse


def backward(inputs: ScoreAttentionBackwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    """Gradients of query, key, value and vector, and None for that of row_bias."""
    x = inputs.attention
    grad_out, query, key, value, out = unit_strides(inputs.grad_out, x.query, x.key, inputs.value, inputs.out)
    (masks, _kept), vector = masks_of(x), _vector(x)
    (batch, heads, queries, units), keys, f32 = query.shape, key.shape[2], torch.float32
    key_heads = max(key.shape[1], value.shape[1])
    lse, grad_lse = inputs.lse.contiguous(), None if inputs.grad_lse is None else inputs.grad_lse.contiguous()
    grad_query, grad_vector = empty_gradient(query), query.new_empty(batch, heads, -(-keys // _GROUP), units, dtype=f32)
    grad_key, grad_value = empty_gradient(key, key_heads), empty_gradient(value, key_heads)
    ranges, rows = _key_ranges(query, key_heads, keys), query.new_empty(3, batch, heads, queries, dtype=f32)
    sums = query.new_zeros(batch, heads, ranges, queries + queries % 2, units + units % 2, dtype=f32)
    parts = query.new_empty(batch, key_heads, keys, units, dtype=f32) if key_heads < heads else None
    _backward(
        query,
        **_attention(query, key, value),
        vector=address(vector),
        masks=masks,
        scale=x.scale,
        out=strided(out),
        lse=address(lse),
        grad_out=strided(grad_out),
        grad_lse=address(grad_lse),
        grad_query=strided(grad_query),
        grad_key=strided(grad_key),
        grad_value=strided(grad_value),
        wide_grad_key=key.shape[1] != key_heads,
        wide_grad_value=value.shape[1] != key_heads,
        ranges=ranges,
        grad_vector=address(grad_vector),
        rows=address(rows),
        sums=address(sums),
        parts=address(parts),
    )
    summed = as_dtype(grad_vector.sum((0, 2)), vector.dtype)
    return grad_query, _folded(grad_key, key), _folded(grad_value, value), summed, None


def _vector(x: Attention) -> Tensor:
    assert x.vector is not None  # additive scores have one
    return x.vector.contiguous()


def _attention(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Any]:
    (batch, heads, queries, units), (_, key_heads, keys, _), (_, value_heads, _, value_dim) = query.shape, key.shape, value.shape
    sizes = {"B": batch, "H": heads, "key_heads": key_heads, "value_heads": value_heads, "N": queries, "M": keys, "A": units}
    tensors = {"query": strided(query), "key": strided(key), "value": strided(value)}
    return {"dtype": DTYPES[query.dtype], **sizes, "DV": value_dim, **tensors}


def _key_ranges(query: Tensor, key_heads: int, keys: int) -> int:
    """Into how many the keys of a head are divided. Each range has sums of its own for the gradient of the query."""
    heads, sums = max(1, query.shape[0] * key_heads), max(1, query.numel())
    return max(1, min(-(-keys // _BLOCK), -(-_BLOCKS * multiprocessors(query.device) // heads), _LARGEST // sums))


def _folded(grad: Tensor, x: Tensor) -> Tensor:
    return as_dtype(fold_heads(grad, x.shape[1]), x.dtype)
