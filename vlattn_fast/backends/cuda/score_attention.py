"""score_attention by csrc/cuda/score_attention.cu: scores that sum over hidden units, forward and backward; and relevancy_step
through them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import as_dtype, empty_gradient, empty_rows_first, fold_heads, multiprocessors, unit_strides
from vlattn_fast.backends.cuda._shared_library import kernel, masks_of
from vlattn_fast.backends.inputs import Attention, RelevancyStepInputs, ScoreAttentionBackwardInputs, ScoreAttentionInputs
from vlattn_fast.backends.native import DTYPES, address, strided

_forward, _backward = kernel("score_attention"), kernel("score_attention_backward")
_rows, _step = kernel("score_attention_rows"), kernel("score_attention_step")
MOST_SIZE = 128  # hidden units, and features of a value: too_large
_PRODUCTS = {"hadamard_tanh": (1.0, 1.0, 0.0), "hadamard_sigmoid": (0.5, 0.5, 0.5)}  # argument, factor, offset
_BLOCK, _GROUP = 64, 16  # keys that a block and a warp take at a time in the backward pass: BACKWARD_ROWS
_BLOCKS = 4  # for each multiprocessor: with fewer heads, the keys of one are divided among blocks
_LARGEST = 2**27  # numbers in the sums of several ranges of keys
_CARRIED = 4  # rows of relevancy in a launch: MAX_CARRIED


def forward(inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv) and lse (B, H, N)."""
    x = inputs.attention
    query, key, value = unit_strides(x.query, x.key, inputs.value)
    members, _kept = _attention(x, query, key, value)
    batch, heads, queries, _ = query.shape
    out = empty_rows_first(query, heads, queries, value.shape[3])
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    _forward(query, **members, out=strided(out), lse=address(lse))
    return out, lse


def backward(inputs: ScoreAttentionBackwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    """Gradients of query, key, value and vector, and None for that of row_bias."""
    x = inputs.attention
    grad_out, query, key, value, out = unit_strides(inputs.grad_out, x.query, x.key, inputs.value, inputs.out)
    members, kept = _attention(x, query, key, value)
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
        **members,
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
    summed = as_dtype(grad_vector.sum((0, 2)), kept[0].dtype)
    return grad_query, _folded(grad_key, key), _folded(grad_value, value), summed, None


def step(inputs: RelevancyStepInputs) -> Tensor:
    """relevancy @ Abar, (B, T, N) -> (B, T, M), of a score over hidden units.

    `lse` may count keys that are not here. Under a float mask, rows whose lse is too large to be rounded are normalised over the
    keys that are here.
    """
    x, relevancy, f32 = inputs.attention, inputs.relevancy, torch.float32
    value, grad_output = (None, None) if inputs.rule == "attention" else (inputs.value, inputs.grad_output)
    grad_output, query, key, value = unit_strides(grad_output, x.query, x.key, value)
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    if relevancy.numel() * heads * keys == 0:
        return relevancy.new_zeros(*relevancy.shape[:2], keys)
    members, _kept = _attention(x, query, key, value)
    lse = None if inputs.lse is None else as_dtype(inputs.lse, f32).contiguous()
    r, rows = as_dtype(relevancy, f32).contiguous(), query.new_empty(3, batch, heads, queries, dtype=f32)
    row_sums = query.new_empty(batch, heads, queries, dtype=f32) if inputs.row_normalize else None
    members |= {"by_gradient": inputs.rule == "gradient", "grad_out": strided(grad_output), "rows": address(rows)}
    _rows(query, **members, lse=address(lse), relevancy=address(r), row_sums=address(row_sums))
    total = query.new_full((), heads, dtype=f32) if row_sums is None else row_sums.sum(1)[:, None]
    r = r * torch.where(total < torch.finfo(f32).tiny, 0.0, 1.0 / total)  # the reciprocal of a subnormal number overflows
    parts = []
    for some in map(Tensor.contiguous, r.split(_CARRIED, 1)):
        each_head = r.new_empty(batch, heads, some.shape[1], keys)
        _step(query, **members, relevancy=address(some), T=some.shape[1], r_abar=address(each_head))
        parts.append(each_head.sum(1))
    return as_dtype(torch.cat(parts, 1), relevancy.dtype)


def _attention(x: Attention, query: Tensor, key: Tensor, value: Tensor | None) -> tuple[dict[str, Any], tuple[Tensor, Any]]:
    """Members of the struct, and their tensors, which must live until the call is over, the vector first."""
    assert x.vector is not None  # these scores have one
    vector, (masks, kept) = x.vector.contiguous(), masks_of(x)
    (batch, heads, queries, units), (_, key_heads, keys, _) = query.shape, key.shape
    value_heads, value_dim = (key_heads, 0) if value is None else value.shape[1::2]
    sizes = {"B": batch, "H": heads, "key_heads": key_heads, "value_heads": value_heads, "N": queries, "M": keys, "A": units}
    sizes |= {"DV": value_dim, "products": x.score in _PRODUCTS}
    numbers = dict(zip(("argument", "factor", "offset"), _PRODUCTS.get(x.score, (1.0, 1.0, 0.0)), strict=True))
    tensors = {"query": strided(query), "key": strided(key), "value": strided(value), "vector": address(vector)}
    return {"dtype": DTYPES[query.dtype], "masks": masks, "scale": x.scale, **sizes, **numbers, **tensors}, (vector, kept)


def _key_ranges(query: Tensor, key_heads: int, keys: int) -> int:
    """Into how many the keys of a head are divided. Each range has sums of its own for the gradient of the query."""
    heads, sums = max(1, query.shape[0] * key_heads), max(1, query.numel())
    return max(1, min(-(-keys // _BLOCK), -(-_BLOCKS * multiprocessors(query.device) // heads), _LARGEST // sums))


def _folded(grad: Tensor, x: Tensor) -> Tensor:
    return as_dtype(fold_heads(grad, x.shape[1]), x.dtype)
