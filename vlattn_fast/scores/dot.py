"""Dot products, with and without 1 / sqrt(D)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlattn_fast._ground.checks import check_head_dim
from vlattn_fast._ground.tensors import product, scaled_dot_default
from vlattn_fast.scores.score import Core, Score


@dataclass(frozen=True, eq=False)
class Dot(Score):
    """Computes the dot product s = q . k.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key, value = torch.randn(3, 1, 2, 5, 8)
        >>> va.score_attention(query, key, value, score=va.scores.Dot()).shape  # or score="dot"
        torch.Size([1, 2, 5, 8])
    """

    name: ClassVar[str] = "dot"
    is_plain: ClassVar[bool] = True

    def check(self, query: Tensor, key: Tensor) -> None:
        check_head_dim(query, key)

    def formula(self, query: Tensor, key: Tensor) -> Tensor:
        return product(query, key.mT)

    def core(self, query: Tensor, key: Tensor) -> Core:
        return Core("dot", query, key)


@dataclass(frozen=True, eq=False)
class ScaledDot(Dot):
    """Computes the scaled dot product s = q . k / sqrt(D), the score of SDPA.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key, value = torch.randn(3, 1, 2, 5, 8)
        >>> va.score_attention(query, key, value, score=va.scores.ScaledDot()).shape  # or score="scaled_dot", the default
        torch.Size([1, 2, 5, 8])

    Reference: Vaswani et al. 2017.
    """

    name: ClassVar[str] = "scaled_dot"

    def default_scale(self, head_dim: int) -> float:
        return scaled_dot_default(head_dim)
