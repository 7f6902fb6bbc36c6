"""Scores that differ only by rounding are a tie: another processor or batch would put them in another order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_SUMS = 16  # ulps of float32 between two orders of summing the same numbers
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # from the finest on


def coarsest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype of the coarsest of these tensors, such as a model's parameters; float64 of none."""
    ranks = (_DTYPES.index(tensor.dtype) for tensor in tensors if tensor.dtype in _DTYPES)
    return _DTYPES[max(ranks, default=0)]


def rounding(dtype: torch.dtype) -> float:
    """How far two scores that should be equal may lie apart, relative to the larger one: sums in float32, or in float64, in two
    orders, and one rounding to the dtype of the model."""
    summed = torch.float64 if dtype == torch.float64 else torch.float32
    return _SUMS * torch.finfo(summed).eps + (0 if dtype == summed else torch.finfo(dtype).eps)


def levelled(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores (..., n) of a model of this dtype, in which all that tie with the largest get its value: `argmax` takes the first of
    them. NaN stays."""
    largest = scores.amax(-1, keepdim=True)
    return torch.where(largest - scores <= rounding(dtype) * largest.abs(), largest, scores)


def constant(values: Tensor) -> bool:
    """Whether a map (n,) has one value, but for the rounding of float32."""
    return bool(values.max() - values.min() <= rounding(torch.float32) * values.abs().max())


def equal_samples(inputs: Mapping[str, Any], count: int) -> list[int]:
    """For each of `count` samples of inputs the first sample that is equal."""
    columns = [value.flatten(1).tolist() for value in inputs.values() if isinstance(value, Tensor) and len(value) == count]
    first: dict[str, int] = {}
    return [first.setdefault(str(row), place) for place, row in enumerate(zip(*columns, strict=True))]
