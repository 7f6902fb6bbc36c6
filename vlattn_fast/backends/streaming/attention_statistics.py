"""attention_statistics in O(N + M) memory with plain PyTorch, on any device and dtype.
 A tile holds full rows of A, so each statistic of a row is one reduction. The backward pass recomputes the tiles; in addition to
the inputs it only needs argmax.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.groups import columns_of_groups
from vlattn_fast._ground.tensors import cast_finite, compute_dtype
from vlattn_fast.backends.inputs import AttentionStatisticsBackwardInputs, AttentionStatisticsInputs
from vlattn_fast.backends.streaming import _tiles
from vlattn_fast.backends.streaming._forward_mode import differentiates, tangents_of
from vlattn_fast.backends.streaming._scores import Logits, Sums, Tile
from vlattn_fast.backends.streaming._tiles import probabilities


def forward(inputs: AttentionStatisticsInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, None, None]:
    """mass (B, H, N, G), entropy, maximum, argmax (B, H, N), received (B, H, M), max_logit (B, H, N); anything for what
    `statistics` does not name."""
    query, num_groups, row_weight = inputs.attention.query, inputs.num_groups, inputs.row_weight
    statistics, dtype, per_row = inputs.statistics.split(), compute_dtype(query), query.shape[:3]
    mass = query.new_zeros(*per_row, num_groups, dtype=dtype)
    entropy, maximum = (query.new_zeros(per_row, dtype=dtype) for _ in range(2))
    max_logit = query.new_full(per_row, -torch.inf, dtype=dtype)
    argmax = query.new_full(per_row, -1, dtype=torch.int64)
    received = query.new_zeros(*per_row[:2], inputs.attention.key.shape[2], dtype=dtype)
    for tile, logits in _logit_tiles(inputs):
        b, h, i = tile
        if "max_logit" in statistics:
            max_logit[tile] = cast_finite(logits.amax(-1), dtype)
        prob = probabilities(logits, dtype)
        if "entropy" in statistics:
            # whose tangent at 0 would be NaN
            positive = prob.masked_fill(prob == 0, 1.0) if differentiates() else prob
            entropy[tile] = torch.special.entr(positive).sum(-1)
        if "maximum" in statistics or "argmax" in statistics:
            largest, where = prob.max(-1)
            maximum[tile] = largest
            argmax[tile] = where.masked_fill(largest == 0, -1)
        if "received" in statistics:
            received[b, h] += prob.sum(2) if row_weight is None else (row_weight[b, h, None, i] @ prob).squeeze(2)
        for g, columns in _group_columns(inputs.attention.key_groups, num_groups, b, dtype):
            mass[b, h, i, g] = (prob.flatten(1, 2) @ columns).view(*prob.shape[:3], -1)
    return mass, entropy, maximum, argmax, received, max_logit, None, None


def backward(inputs: AttentionStatisticsBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, row_weight and row_bias."""
    sums, logits, dtype = Sums(inputs, *_FIELDS), Logits(inputs.attention), compute_dtype(inputs.attention.query)

    def slopes(tile: Tile, probs: Sequence[Tensor]) -> list[Tensor]:
        """The derivative by A of the statistics times their gradients."""
        (b, h, _), (prob,) = tile, probs
        grad = torch.zeros_like(prob)
        if inputs.grad_mass is not None and inputs.attention.key_groups is not None:
            grad += columns_of_groups(inputs.grad_mass[tile], inputs.attention.key_groups[b])
        if inputs.grad_entropy is not None:
            # the 1 of d(-P log P)/dP = -(log P + 1) cancels in the softmax
            grad -= inputs.grad_entropy[tile][..., None] * torch.where(prob > 0, prob.log(), 0.0)
        if inputs.grad_maximum is not None and inputs.argmax is not None:  # which comes with it
            o_kv = torch.arange(prob.shape[-1], device=prob.device)
            grad += torch.where(o_kv == inputs.argmax[tile][..., None], inputs.grad_maximum[tile][..., None], 0.0)
        if inputs.grad_received is not None:
            grad_row = inputs.grad_received[b, h, None, :]  # the same for every query
            grad += grad_row if inputs.row_weight is None else inputs.row_weight[tile][..., None] * grad_row
            if inputs.row_weight is not None:
                sums.add(tile, {"row_weight": (prob * grad_row).sum(-1)})
        return [grad]

    for tile in logits.tiles() if logits.key.shape[2] else ():
        logits.add_gradients(sums, tile, lambda x: [probabilities(x, dtype)], {}, partial(slopes, tile))
    return sums.result()


def _logit_tiles(inputs: AttentionStatisticsInputs) -> Iterator[tuple[Tile, Tensor]]:
    """Tiles with their masked logits, (b, h, i, M). No tile without keys."""
    logits = Logits(inputs.attention)
    return ((tile, logits.of(tile)) for tile in logits.tiles() if logits.key.shape[2] > 0)


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


def jvp(inputs: Any) -> tuple[Tensor | None, ...]:
    """The tangents of mass, entropy, maximum and received; None for what `statistics` does not name."""
    asked = inputs.statistics.split()

    def run(x: AttentionStatisticsInputs) -> list[Tensor | None]:
        mass, entropy, maximum, _, received, *_ = forward(x)
        made = {"mass": mass, "entropy": entropy, "maximum": maximum, "received": received}
        return [y if name in asked else None for name, y in made.items()]

    return tangents_of(run, inputs, AttentionStatisticsInputs, _FIELDS)


def second(inputs: Any) -> tuple[Tensor | None, ...]:
    """The gradients of those tangents' product with the gradients of the statistics: the tangents of the backward pass."""
    return tangents_of(backward, inputs, AttentionStatisticsBackwardInputs, _FIELDS)
