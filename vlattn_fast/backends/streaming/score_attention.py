"""score_attention in O(N + M) memory with plain PyTorch, on any device and dtype.

Dot products run in PyTorch's fused CPU kernel if it supports the call (`_fused_cpu`); everything else runs tile by tile, and
the backward pass recomputes each tile.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from vlattn_fast._ground.tensors import cast_finite, compute_dtype, empty_rows_first, expand_heads, fold_heads
from vlattn_fast.backends.inputs import ScoreAttentionBackwardInputs, ScoreAttentionInputs
from vlattn_fast.backends.streaming import _fused_cpu
from vlattn_fast.backends.streaming._dropout import keep_factor
from vlattn_fast.backends.streaming._forward_mode import tangents_of
from vlattn_fast.backends.streaming._scores import Logits, Sums, Tile
from vlattn_fast.backends.streaming._tiles import exponentials, log_of_sum


def forward(inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv), in memory (B, N, H, Dv) as SDPA's, and lse (B, H, N)."""
    logits = Logits(inputs.attention)
    x, value = inputs.attention._replace(key=logits.key), expand_heads(inputs.value, logits.key.shape[1])
    if _fused_cpu.runs(x, value, inputs.dropout_p):
        return _fused_cpu.forward(x, value)
    out, lse = _empty(inputs)
    for tile in logits.tiles():
        rows = _rows(inputs, tile, logits.of(tile), value[tile[:2]].to(lse.dtype))
        out[tile], lse[tile] = rows[0].to(out.dtype), cast_finite(rows[1], lse.dtype)
    return out, lse


def _empty(inputs: Any) -> tuple[Tensor, Tensor]:
    """out and lse, uninitialised."""
    query = inputs.attention.query
    out = empty_rows_first(query, query.shape[1], query.shape[2], inputs.value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=compute_dtype(query))


def _rows(inputs: Any, tile: Tile, logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of a tile."""
    weights, total, largest = exponentials(logits)
    if inputs.dropout_p > 0.0:
        sizes = inputs.attention.query.shape[1:3], logits.shape[3]
        weights = weights * keep_factor(inputs.seed, inputs.dropout_p, *sizes, tile, weights.dtype)
    return (weights.to(value.dtype) @ value) / total.to(value.dtype), log_of_sum(total, largest)


def backward(inputs: ScoreAttentionBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, vector and row_bias."""
    x, heads = inputs.attention, inputs.attention.query.shape[1]
    if inputs.grad_lse is None:
        expanded, value = x._replace(key=expand_heads(x.key, heads)), expand_heads(inputs.value, heads)
        if _fused_cpu.runs(expanded, value, inputs.dropout_p) and _fused_cpu.runs_backward(x.query, inputs.lse):
            by_tensor = _fused_cpu.backward(inputs.grad_out, expanded, value, inputs.out, inputs.lse)
            grad_k, grad_v = (fold_heads(y, of.shape[1]) for y, of in zip(by_tensor[1:], (x.key, inputs.value), strict=True))
            return by_tensor[0], grad_k, grad_v, None, None
    return _gradients(inputs, None)


def _gradients(inputs: ScoreAttentionBackwardInputs, rows: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, ...]:
    """Those of _FIELDS, tile by tile. `rows` takes out and lse."""
    logits, sums = Logits(inputs.attention), Sums(inputs, *_FIELDS)
    value, dtype = expand_heads(inputs.value, logits.key.shape[1]), logits.dtype
    for tile in logits.tiles():
        grads = [None if grad is None else grad[tile].to(dtype) for grad in (inputs.grad_out, inputs.grad_lse)]
        of_value = {"value": value[tile[:2]].to(dtype)}
        made = logits.add_gradients(sums, tile, partial(_rows, inputs, tile), of_value, grads)
        for whole, part in zip(rows or (), made, strict=rows is not None):
            whole[tile] = part.to(whole.dtype)
    return sums.result()


_FIELDS = "query", "key", "value", "vector", "row_bias"


def jvp(inputs: Any) -> tuple[Tensor, ...]:
    """The tangents of out and lse for those of query, key, value, vector and row_bias."""
    return tangents_of(forward, inputs, ScoreAttentionInputs, _FIELDS)


def second(inputs: Any) -> tuple[Tensor | None, ...]:
    """The tangents of out and lse for those of query, key, value, vector and row_bias, or None, and the tangents of the backward
    pass for those and the tangents of grad_out and grad_lse."""

    def run(x: ScoreAttentionBackwardInputs) -> tuple[Tensor | None, ...]:
        rows = _empty(x) if inputs.with_jvp else None
        gradients = _gradients(x, rows)
        return *(rows or (None, None)), *gradients

    return tangents_of(run, inputs, ScoreAttentionBackwardInputs, (*_FIELDS, "grad_out", "grad_lse"))
