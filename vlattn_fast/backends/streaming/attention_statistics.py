"""attention_statistics in O(N + M) memory with plain PyTorch, on any device and dtype.
 A tile holds full rows of A, so each statistic of a row is one reduction. The backward pass recomputes the tiles; in addition to
the inputs it only needs argmax.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import cast_finite, compute_dtype, expand_heads, fold_heads
from vlattn_fast.backends.inputs import (
    AttentionStatisticsBackwardInputs,
    AttentionStatisticsInputs,
    AttentionStatisticsJvpInputs,
    AttentionStatisticsSecondInputs,
)
from vlattn_fast.backends.streaming import _tiles
from vlattn_fast.backends.streaming._forward_mode import differentiates, tangents_of
from vlattn_fast.backends.streaming._scores import score_tile_backward
from vlattn_fast.backends.streaming._tiles import Masks, probabilities, softmax_backward
from vlattn_fast.backends.streaming.score_attention import logit_tiles


def forward(inputs: AttentionStatisticsInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, None, None]:
    """mass (B, H, N, G), entropy, maximum, argmax (B, H, N), received (B, H, M), max_logit (B, H, N); anything for what
    `statistics` does not name."""
    query, key_groups, num_groups, row_weight = inputs.query, inputs.key_groups, inputs.num_groups, inputs.row_weight
    statistics, dtype, per_row = inputs.statistics.split(), compute_dtype(query), query.shape[:3]
    mass = query.new_zeros(*per_row, num_groups, dtype=dtype)
    entropy, maximum = (query.new_zeros(per_row, dtype=dtype) for _ in range(2))
    max_logit = query.new_full(per_row, -torch.inf, dtype=dtype)
    argmax = query.new_full(per_row, -1, dtype=torch.int64)
    received = query.new_zeros(*per_row[:2], inputs.key.shape[2], dtype=dtype)
    key = expand_heads(inputs.key, query.shape[1])
    for b, h, i, logits in _logit_tiles(inputs, key):
        if "max_logit" in statistics:
            max_logit[b, h, i] = cast_finite(logits.amax(-1), dtype)
        prob = probabilities(logits, dtype)
        if "entropy" in statistics:
            # whose tangent at 0 would be NaN
            positive = prob.masked_fill(prob == 0, 1.0) if differentiates() else prob
            entropy[b, h, i] = torch.special.entr(positive).sum(-1)
        if "maximum" in statistics or "argmax" in statistics:
            largest, where = prob.max(-1)
            maximum[b, h, i] = largest
            argmax[b, h, i] = where.masked_fill(largest == 0, -1)
        if "received" in statistics:
            received[b, h] += prob.sum(2) if row_weight is None else (row_weight[b, h, None, i] @ prob).squeeze(2)
        for g, columns in _group_columns(key_groups, num_groups, b, dtype):
            mass[b, h, i, g] = (prob.flatten(1, 2) @ columns).view(*prob.shape[:3], -1)
    return mass, entropy, maximum, argmax, received, max_logit, None, None


def backward(inputs: AttentionStatisticsBackwardInputs) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, row_weight and row_bias."""
    query, key_groups, num_groups, row_weight = inputs.query, inputs.key_groups, inputs.num_groups, inputs.row_weight
    grad_mass, grad_entropy = inputs.grad_mass, inputs.grad_entropy
    grad_maximum, grad_received = inputs.grad_maximum, inputs.grad_received
    dtype, num_key_heads = compute_dtype(query), inputs.key.shape[1]
    key = expand_heads(inputs.key, query.shape[1])
    grad_q = torch.zeros_like(query, memory_format=torch.contiguous_format)
    grad_k = key.new_zeros(key.shape, dtype=dtype)
    grad_weight = None if row_weight is None else torch.zeros_like(row_weight, memory_format=torch.contiguous_format)
    masks, grad_row_bias = Masks.of(inputs), None if inputs.row_bias is None else torch.zeros_like(inputs.row_bias)
    o_kv = torch.arange(key.shape[2], device=key.device)
    for b, h, i, logits in _logit_tiles(inputs, key):
        prob = probabilities(logits, dtype)
        grad_prob = torch.zeros_like(prob)
        if grad_mass is not None:
            for g, columns in _group_columns(key_groups, num_groups, b, dtype):
                grad_prob += (grad_mass[b, h, i, g].flatten(1, 2) @ columns.mT).view_as(prob)
        if grad_entropy is not None:
            # the 1 of d(-P log P)/dP = -(log P + 1) cancels in the softmax
            grad_prob -= grad_entropy[b, h, i, None] * torch.where(prob > 0, prob.log(), 0.0)
        if grad_maximum is not None and inputs.argmax is not None:  # which comes with it
            grad_prob += torch.where(o_kv == inputs.argmax[b, h, i, None], grad_maximum[b, h, i, None], 0.0)
        if grad_received is not None:
            grad_row = grad_received[b, h, None, :]  # the same for every query
            grad_prob += grad_row if row_weight is None else row_weight[b, h, i, None] * grad_row
            if grad_weight is not None:
                grad_weight[b, h, i] = (prob * grad_row).sum(-1)
        grad_logits = softmax_backward(prob, grad_prob)
        if grad_row_bias is not None:
            grad_row_bias[b, h, i] = masks.by_groups(grad_logits, b)
        grad_score = grad_logits * inputs.scale
        operands = query[b, h, i].to(dtype), key[b, h].to(dtype), None
        by_query, by_key, _ = score_tile_backward(inputs.score, grad_score, *operands, inputs.parameter)
        grad_q[b, h, i] = by_query.to(grad_q.dtype)
        grad_k[b, h] += by_key
    return grad_q, fold_heads(grad_k, num_key_heads).to(key.dtype), grad_weight, grad_row_bias


def _logit_tiles(
    inputs: AttentionStatisticsInputs | AttentionStatisticsBackwardInputs, key: Tensor
) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Slices of batch, heads and query rows with their masked logits, (b, h, i, M). No tile without keys."""
    query, masks = inputs.query, Masks.of(inputs)
    if key.shape[2] > 0:
        yield from logit_tiles(query, key, None, masks, inputs.score, inputs.parameter, inputs.scale)


def _group_columns(key_groups: Tensor | None, num_groups: int, b: slice, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the groups with the membership of each key (b, M, g), 0 or 1; no slice is larger than a tile.

    A product with the membership, instead of scatter_add, is deterministic, and an index out of range belongs to no group.
    """
    if key_groups is None:
        return
    groups = key_groups[b, :, None]
    step = max(1, _tiles.tile_elements(groups) // max(1, groups.numel()))
    for g in range(0, num_groups, step):
        index = torch.arange(g, min(g + step, num_groups), device=groups.device)
        yield slice(g, g + len(index)), (groups == index).to(dtype)


_FIELDS = "query", "key", "row_weight", "row_bias"


def jvp(inputs: AttentionStatisticsJvpInputs) -> tuple[Tensor | None, ...]:
    """The tangents of mass, entropy, maximum and received; None for what `statistics` does not name."""
    asked = inputs.statistics.split()

    def run(x: AttentionStatisticsInputs) -> list[Tensor | None]:
        mass, entropy, maximum, _, received, *_ = forward(x)
        made = {"mass": mass, "entropy": entropy, "maximum": maximum, "received": received}
        return [y if name in asked else None for name, y in made.items()]

    return tangents_of(run, inputs, AttentionStatisticsInputs, _FIELDS)


def second(inputs: AttentionStatisticsSecondInputs) -> tuple[Tensor | None, ...]:
    """The gradients of those tangents' product with the gradients of the statistics: the tangents of the backward pass."""
    return tangents_of(backward, inputs, AttentionStatisticsBackwardInputs, _FIELDS)
