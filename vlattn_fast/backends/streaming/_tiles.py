"""Tiles of the score matrix: some query rows with all their keys, so that each statistic of a row is a plain reduction.

A tile holds at most `tile_elements` scores, or one row of one head if that is longer. So memory is O(N + M), and on a CPU the
temporaries of one tile stay in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import lse_is_lost, masked_logits

# 1 MB in float32; a backward pass has some ten: r Abar at CLIP ViT-L/14@336 size took as long from 2^18 to 2^22 on one core
TILE_ELEMENTS = 1 << 18
# A tile takes some 80 launches: on an H100 a layer of CLIP with a batch of 64, forward and backward, took 813 ms in 1,024 tiles
TIMES_ON_A_GPU = 64


def tile_elements(x: Tensor) -> int:
    """The most scores of a tile on the tensor's device."""
    return TILE_ELEMENTS if x.device.type == "cpu" else TIMES_ON_A_GPU * TILE_ELEMENTS


@dataclass(frozen=True)
class Tiling:
    """The tiles of a (B, H, N, M) score matrix: `for b, i in query_tiles(): for h in heads(): ...`, all slices."""

    batch: int
    num_heads: int
    num_queries: int
    num_keys: int
    elements: int

    @classmethod
    def of(cls, x: Tensor, batch: int, num_heads: int, num_queries: int, num_keys: int) -> Tiling:
        """Those on the tensor's device."""
        return cls(batch, num_heads, num_queries, num_keys, tile_elements(x))

    def _rows_per_tile(self) -> int:
        return max(1, min(self.num_queries, self.elements // max(1, self.num_keys)))

    def query_tiles(self) -> Iterator[tuple[slice, slice]]:
        """Returns slices of the batch and of the queries.

        A tile has several samples only if it has all their queries and heads.
        """
        step_i = self._rows_per_tile()
        per_sample = max(1, self.num_keys) * step_i * self.num_heads
        step_b = max(1, self.elements // max(1, per_sample)) if step_i == self.num_queries else 1
        for b in range(0, self.batch, step_b):
            for i in range(0, self.num_queries, step_i):
                yield slice(b, min(b + step_b, self.batch)), slice(i, min(i + step_i, self.num_queries))

    def heads(self) -> Iterator[slice]:
        """Slices of the heads; one tile holds the heads of a slice."""
        per_head = max(1, self.num_keys) * self._rows_per_tile()
        step_h = max(1, min(self.num_heads, self.elements // per_head))
        for h in range(0, self.num_heads, step_h):
            yield slice(h, min(h + step_h, self.num_heads))


def mask_tile(
    x: Any, score: Tensor, shape: tuple[int, int, int, int], b: slice, h: slice, i: slice, bias: Tensor | None = None
) -> Tensor:
    """The `masked_logits` of a tile (b, h, i, M), whose `bias` of groups is given. attn_mask, key_mask and is_causal are those of
    `x`, an `Attention` or an operator's inputs."""
    mask = None if x.attn_mask is None else x.attn_mask.expand(shape)[b, h, i]
    rows = torch.arange(i.start, i.stop, device=score.device)[:, None] if x.is_causal else None
    return masked_logits(score, mask, None if x.key_mask is None else x.key_mask[b], rows, bias)


def exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - largest) (..., M), their sum (..., 1), and the largest logit (..., 1). A fully masked row has zeros, a
    sum of 1 and a largest of -inf.

    No result depends on what is subtracted, so that it needs no gradient. Its tangent takes off what those of all keys have in
    common, which would cost digits.
    """
    if logits.shape[-1] == 0:
        empty = logits.new_full((*logits.shape[:-1], 1), -torch.inf)
        return logits, torch.ones_like(empty), empty
    with torch.no_grad():
        largest = logits.amax(-1, keepdim=True)
    weights = torch.exp(logits - torch.where(torch.isinf(largest), 0.0, largest))
    total = weights.sum(-1, keepdim=True)
    empty = torch.isneginf(largest)  # rows whose masked logits may have tangents
    return weights, torch.where(empty, 1.0, total), torch.where(empty, -torch.inf, largest)


def log_of_sum(total: Tensor, largest: Tensor) -> Tensor:
    """The log-sum-exp (...) from what `exponentials` returns."""
    return (total.log() + largest)[..., 0]


def logsumexp(logits: Tensor) -> Tensor:
    """The log-sum-exp of each row (..., M); -inf for a fully masked row."""
    return log_of_sum(*exponentials(logits)[1:])


def probabilities(logits: Tensor, dtype: torch.dtype, lse: Tensor | None = None) -> Tensor:
    """Softmax of full rows in `dtype`; a fully masked row gives zeros.

    Without `lse` each row is divided by its sum, which is taken relative to the row's largest logit. That is exact however large
    the logits are. With `lse`, which may count keys that are not here, P = exp(logits - lse); an lse of -inf or +inf marks a
    fully masked row. Where |lse| is too large to hold the logarithm of the sum (`lse_is_lost`), the row is divided by its sum
    over the keys that are here.
    """
    if logits.shape[-1] == 0:
        return logits.to(dtype)
    if lse is not None:
        return _probabilities_from_lse(logits, lse[..., None]).to(dtype)
    return _of_rows(torch.softmax, logits, 0.0).to(dtype)


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax of full rows; -inf for a fully masked row."""
    return _of_rows(torch.log_softmax, logits, -torch.inf) if logits.shape[-1] else logits


def log_sum_of_heads(log_p: Tensor) -> Tensor:
    """The log of the sum over the heads of e^log_p (b, h, i, M), (b, 1, i, M)."""
    if log_p.shape[1] == 1:
        return log_p
    largest = log_p.detach().amax(1, keepdim=True)
    largest = torch.where(torch.isneginf(largest), 0.0, largest)
    total = (log_p - largest).exp().sum(1, keepdim=True)
    seen = total != 0  # of a NaN as well
    return torch.where(seen, torch.where(seen, total, 1.0).log() + largest, -torch.inf)


def _of_rows(softmax: Callable[..., Tensor], logits: Tensor, of_empty: float) -> Tensor:
    empty = torch.isneginf(logits.detach().amax(-1, keepdim=True))
    if empty.device.type == "cpu" and not empty.any():  # here a look at the data is free, and filling costs more than the softmax
        return softmax(logits, dim=-1)
    return softmax(logits.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, of_empty)


def _probabilities_from_lse(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse) (b, h, i, M) with lse (b, h, i, 1)."""
    shift, lost = torch.where(torch.isinf(lse), torch.inf, lse), lse_is_lost(lse)
    if lost.device.type == "cpu" and not lost.any():
        return torch.exp(logits - shift)
    largest = logits.detach().amax(-1, keepdim=True)
    shift = torch.where(lost, torch.where(torch.isneginf(largest), torch.inf, largest), shift)
    prob = torch.exp(logits - shift)
    total = prob.sum(-1, keepdim=True)
    return prob / torch.where(lost & (total > 0), total, 1.0)
