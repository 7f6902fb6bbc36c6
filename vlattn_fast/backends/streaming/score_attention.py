"""score_attention in O(N + M) memory with plain PyTorch, on any device and dtype.

Dot products run in PyTorch's fused CPU kernel if it supports the call (`_fused_cpu`); everything else runs tile by tile, and
the backward pass recomputes each tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import cast_finite, compute_dtype, empty_rows_first, expand_heads, fold_heads
from vlattn_fast.backends.inputs import ScoreAttentionBackwardInputs, ScoreAttentionInputs
from vlattn_fast.backends.streaming import _fused_cpu
from vlattn_fast.backends.streaming._dropout import keep_factor
from vlattn_fast.backends.streaming._forward_mode import tangents_of
from vlattn_fast.backends.streaming._scores import score_tile, score_tile_backward
from vlattn_fast.backends.streaming._tiles import Masks, Tiling, logsumexp, probabilities


def forward(inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv), in memory (B, N, H, Dv) as SDPA's, and lse (B, H, N)."""
    query, vector, score, scale, dropout_p = inputs.query, inputs.vector, inputs.score, inputs.scale, inputs.dropout_p
    masks = Masks.of(inputs)
    num_heads = query.shape[1]
    key, value = expand_heads(inputs.key, num_heads), expand_heads(inputs.value, num_heads)
    if score == "dot" and _fused_cpu.runs(query, key, value, masks, dropout_p, scale):
        return _fused_cpu.forward(query, key, value, masks, scale)
    out = empty_rows_first(query, num_heads, query.shape[2], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=compute_dtype(query))
    for b, h, i, logits in logit_tiles(query, key, vector, masks, score, inputs.parameter, scale):
        lse[b, h, i] = cast_finite(logsumexp(logits), lse.dtype)
        prob = probabilities(logits, compute_dtype(query))
        if dropout_p > 0.0:
            prob = prob * keep_factor(inputs.seed, dropout_p, query.shape[1:3], key.shape[2], (b, h, i), prob.dtype)
        out[b, h, i] = (prob @ value[b, h].to(prob.dtype)).to(out.dtype)
    return out, lse


def backward(inputs: ScoreAttentionBackwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, vector and row_bias."""
    query, vector, out, lse = inputs.query, inputs.vector, inputs.out, inputs.lse
    grad_out, grad_lse = inputs.grad_out, inputs.grad_lse
    score, parameter, scale, dropout_p = inputs.score, inputs.parameter, inputs.scale, inputs.dropout_p
    masks = Masks.of(inputs)
    num_heads, num_key_heads, num_value_heads = query.shape[1], inputs.key.shape[1], inputs.value.shape[1]
    key, value = expand_heads(inputs.key, num_heads), expand_heads(inputs.value, num_heads)
    fused = score == "dot" and grad_lse is None and _fused_cpu.runs(query, key, value, masks, dropout_p, scale)
    if fused and _fused_cpu.runs_backward(query, lse):
        grad_q, grad_k, grad_v = _fused_cpu.backward(grad_out, query, key, value, out, lse, masks, scale)
        return grad_q, fold_heads(grad_k, num_key_heads), fold_heads(grad_v, num_value_heads), None, None
    dtype = compute_dtype(query)
    grad_q = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=dtype) for x in (key, value))
    grad_vector = None if vector is None else vector.new_zeros(vector.shape, dtype=dtype)
    grad_row_bias = None if inputs.row_bias is None else torch.empty_like(inputs.row_bias)
    for b, h, i, logits in logit_tiles(query, key, vector, masks, score, inputs.parameter, scale):
        prob = probabilities(logits, dtype)
        go, v = grad_out[b, h, i].to(dtype), value[b, h].to(dtype)
        grad_prob = go @ v.mT
        dropped = prob
        if dropout_p > 0.0:
            factor = keep_factor(inputs.seed, dropout_p, query.shape[1:3], key.shape[2], (b, h, i), dtype)
            dropped, grad_prob = prob * factor, grad_prob * factor
        grad_v[b, h] += dropped.mT @ go
        # FlashAttention takes delta = sum_j P dP as sum(dO * O); this sum has no rounding of O
        delta = (prob * grad_prob).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[b, h, i, None].to(dtype)
        grad_logits = prob * (grad_prob - delta)
        if grad_row_bias is not None:
            grad_row_bias[b, h, i] = masks.by_groups(grad_logits, b)
        grad_score = grad_logits * scale
        gq, gk, gu = score_tile_backward(score, grad_score, *_operands(query, key, vector, b, h, i), parameter)
        grad_q[b, h, i] = gq.to(grad_q.dtype)
        grad_k[b, h] += gk
        if grad_vector is not None and gu is not None:
            grad_vector[h] += gu
    grad_k, grad_v = fold_heads(grad_k, num_key_heads).to(key.dtype), fold_heads(grad_v, num_value_heads).to(value.dtype)
    return grad_q, grad_k, grad_v, None if grad_vector is None else grad_vector.to(query.dtype), grad_row_bias


_FIELDS = "query", "key", "value", "vector", "row_bias"


def jvp(inputs: Any) -> tuple[Tensor, ...]:
    """The tangents of out and lse for those of query, key, value, vector and row_bias.

    With x = scale (u_q K^T + Q u_k^T) + u_b the tangent of a dot product's logits, that of lse is xi_i = sum_j P_ij x_ij, and
    that of P is P (x - xi). Other scores take the tangents of `forward`.
    """
    if inputs.score != "dot":
        return tangents_of(forward, inputs, ScoreAttentionInputs, _FIELDS)
    query, num_heads, dtype = inputs.query, inputs.query.shape[1], compute_dtype(inputs.query)
    value, value_tangent = (expand_heads(x, num_heads) for x in (inputs.value, inputs.value_tangent))
    to_out = query.new_zeros(*query.shape[:3], value.shape[3])
    to_lse = query.new_zeros(query.shape[:3], dtype=dtype)
    for (b, h, i), p, x, factor in _tangent_tiles(inputs):
        xi = (p * x).sum(-1, keepdim=True)
        x = x - xi
        rest = (p * x).sum(-1, keepdim=True)  # what rounding leaves: x may have a large mean, which no output has
        to_out[b, h, i] = ((p * (x - rest) * factor) @ value[b, h].to(dtype) + (p * factor) @ value_tangent[b, h].to(dtype)).to(
            query.dtype
        )
        to_lse[b, h, i] = (xi + rest)[..., 0]
    return to_out, to_lse


def _tangent_tiles(inputs: Any) -> Iterator[tuple[tuple[slice, slice, slice], Tensor, Tensor, Tensor | float]]:
    """Tiles of P, the tangent of the logits, and the dropout factors; dot products."""
    query, scale, masks, dtype = inputs.query, inputs.scale, Masks.of(inputs), compute_dtype(inputs.query)
    num_heads = query.shape[1]
    key, key_tangent = (expand_heads(x, num_heads) for x in (inputs.key, inputs.key_tangent))
    for b, h, i, logits in logit_tiles(query, key, None, masks, inputs.score, inputs.parameter, scale):
        p = probabilities(logits, dtype)
        q, q_tangent = query[b, h, i].to(dtype), inputs.query_tangent[b, h, i].to(dtype)
        x = scale * (q_tangent @ key[b, h].to(dtype).mT + q @ key_tangent[b, h].to(dtype).mT)
        if inputs.row_bias_tangent is not None:
            x = x + masks.group_bias_of(inputs.row_bias_tangent[b, h, i].to(dtype), b)
        factor: Tensor | float = 1.0
        if inputs.dropout_p > 0.0:
            factor = keep_factor(inputs.seed, inputs.dropout_p, query.shape[1:3], key.shape[2], (b, h, i), dtype)
        yield (b, h, i), p, torch.where(p > 0, x, 0.0), factor  # a masked pair may have any tangent


def second(inputs: Any) -> tuple[Tensor | None, ...]:
    """The tangents of out and lse for those of query, key, value, vector and row_bias, or None, and the gradients of their
    products with grad_out and grad_lse by query, key, value, vector and row_bias; with tangents of grad_out and grad_lse, the
    tangents of the backward pass.

    The backward pass has dP = dO V^T, dS = P (dP - delta), the gradients scale dS K, scale dS^T Q and P^T dO, and sums of dS over
    the groups of keys. With x and xi as in `jvp`, the gradient of dP is P (x - xi), and that of P is x (dP - delta) - xi dP +
    dO u_v^T. Other scores take the tangents of `backward`.
    """
    if inputs.score != "dot":
        rows = jvp(inputs) if inputs.with_jvp else (None, None)
        return *rows, *tangents_of(backward, inputs, ScoreAttentionBackwardInputs, (*_FIELDS, "grad_out", "grad_lse"))
    query, scale = inputs.query, inputs.scale
    masks, num_heads, dtype = Masks.of(inputs), query.shape[1], compute_dtype(query)
    key, value, key_tangent, value_tangent = (
        expand_heads(x, num_heads) for x in (inputs.key, inputs.value, inputs.key_tangent, inputs.value_tangent)
    )
    like = (inputs.grad_out, query, key, value)
    to_out, to_query, to_key, to_value = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in like)
    to_lse = torch.zeros(query.shape[:3], dtype=dtype, device=query.device)
    to_row_bias = None if inputs.row_bias is None else torch.empty_like(inputs.row_bias)
    for (b, h, i), p, x, factor in _tangent_tiles(inputs):
        q, by_q, go = (x[b, h, i].to(dtype) for x in (query, inputs.query_tangent, inputs.grad_out))
        k, v, by_k, by_v = (x[b, h].to(dtype) for x in (key, value, key_tangent, value_tangent))
        dp, by_p = go @ v.mT * factor, go @ by_v.mT * factor
        delta = (p * dp).sum(-1, keepdim=True)
        if inputs.grad_lse is not None:
            delta = delta - inputs.grad_lse[b, h, i, None].to(dtype)
        xi = (p * x).sum(-1, keepdim=True)
        grad_score, by_dp = p * (dp - delta), p * (x - xi) * factor
        by_p = x * (dp - delta) - xi * dp + by_p
        if inputs.grad_out_tangent is not None:
            go_tangent = inputs.grad_out_tangent[b, h, i].to(dtype)
            by_p += go_tangent @ v.mT * factor
            to_value[b, h] += (p * factor).mT @ go_tangent
        by_lse = 0.0 if inputs.grad_lse_tangent is None else inputs.grad_lse_tangent[b, h, i, None].to(dtype)
        by_score = p * (by_p - (p * by_p).sum(-1, keepdim=True) + by_lse)
        if inputs.with_jvp:
            to_out[b, h, i] = by_dp @ v + (p * factor) @ by_v
        to_query[b, h, i] = scale * (by_score @ k + grad_score @ by_k)
        to_key[b, h] += scale * (by_score.mT @ q + grad_score.mT @ by_q)
        to_value[b, h] += by_dp.mT @ go
        if to_row_bias is not None:
            to_row_bias[b, h, i] = masks.by_groups(by_score, b)
        to_lse[b, h, i] = xi[..., 0]
    to_key, to_value = fold_heads(to_key, inputs.key.shape[1]), fold_heads(to_value, inputs.value.shape[1])
    to_inputs = to_query.to(query.dtype), to_key.to(key.dtype), to_value.to(value.dtype)
    rows = (to_out.to(query.dtype), to_lse) if inputs.with_jvp else (None, None)
    return *rows, *to_inputs, None, to_row_bias


def logit_tiles(
    query: Tensor, key: Tensor, vector: Tensor | None, masks: Masks, score: str, parameter: float, scale: float
) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Slices of batch, heads and query rows with their masked logits (b, h, i, M) in the dtype of sums."""
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    tiling = Tiling.of(query, *shape)
    for b, i in tiling.query_tiles():
        for h in tiling.heads():
            tile = score_tile(score, *_operands(query, key, vector, b, h, i), parameter) * scale
            yield b, h, i, masks.apply(tile, shape, b, h, i)


def _operands(
    query: Tensor, key: Tensor, vector: Tensor | None, b: slice, h: slice, i: slice
) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = compute_dtype(query)
    return query[b, h, i].to(dtype), key[b, h].to(dtype), None if vector is None else vector[h].to(dtype)
