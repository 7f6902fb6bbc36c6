"""Rank correlations of two maps."""

from __future__ import annotations

from torch import Tensor


def rank_correlation(one: Tensor, two: Tensor) -> float | None:
    """Spearman's correlation of two maps (n,); ties have their mean rank. None below three entries, and for a constant map."""
    if len(one) < 3:
        return None
    first, second = (mean_ranks(values) - (len(one) + 1) / 2 for values in (one, two))
    norm = float((first @ first * (second @ second)).sqrt())
    return float(first @ second) / norm if norm > 0 else None


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks (n,) from 1 on, in ascending order; equal values share their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]
