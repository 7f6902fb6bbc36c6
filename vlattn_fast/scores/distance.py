"""Gaussian attention: the squared distance of query and key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_head_dim, check_number, readable
from vlattn_fast._ground.tensors import compute_dtype, expand_heads
from vlattn_fast.scores.score import Core, Parameter, Score, check_parameter


@dataclass(frozen=True, eq=False)
class Distance(Score):
    """s = -|q - k|^2 / (2 sigma^2): weights are those of a Gaussian around the query, as in a kernel regression.

    sigma is above 0: a number, a tensor without dimensions, or (H) with one for each query head. The term of the row alone,
    -|q|^2 / (2 sigma^2), cancels in the softmax; it counts beside a sink and in the log-sum-exp.
    """

    sigma: float | Tensor

    name: ClassVar[str] = "distance"
    # at first the products q . k have the factor of a scaled dot product, 1 / sqrt(D)
    parameters: ClassVar = {
        "sigma": Parameter(0, lambda head_dim: (head_dim**0.25,) * 2, lambda x, head_dim: head_dim**0.25 * (x / 2).exp())
    }

    def features(self, query_dim: int, key_dim: int) -> int:
        return query_dim + 1

    def check(self, query: Tensor, key: Tensor) -> None:
        check_head_dim(query, key)
        if isinstance(self.sigma, Tensor):
            check_parameter("sigma", self.sigma, (), query)
        else:
            check_number("sigma", self.sigma)
            _check_positive(self.sigma, self.sigma > 0)

    def formula(self, query: Tensor, key: Tensor) -> Tensor:
        return -(query[..., :, None, :] - key[..., None, :, :]).square().sum(-1) / (2 * self._sigma(query).square())

    def core(self, query: Tensor, key: Tensor) -> Core:
        """With w = 1 / sigma^2: s = [w q, w] . [k, -|k|^2 / 2] - w |q|^2 / 2, for queries and keys around the mean of the keys.

        Three things keep the digits of a small distance between long vectors. The mean takes away what all keys share. Features
        are at least float32. And w |q|^2 is that of the rounded w q, so that a rounding moves the query, on which the distance
        depends little where it is small.
        """
        dtype = compute_dtype(query)
        query, key = query.to(dtype), key.to(dtype)
        centre = _finite_mean(key.detach())
        query, key = query - expand_heads(centre, query.shape[1]), key - centre
        weight = self._sigma(query).to(dtype).square().reciprocal()
        weighted = query * weight
        offset = -(weighted.square() / (2 * weight)).sum(-1)
        ones = weight.expand(*query.shape[:3], 1)
        return Core(
            "dot",
            torch.cat([weighted, ones], -1),
            torch.cat([key, -key.square().sum(-1, keepdim=True) / 2], -1),
            offset=offset,
            keeps_dtype=True,
        )

    def _sigma(self, like: Tensor) -> Tensor:
        """sigma as it broadcasts to (B, H, N, D). Its values are read where reading costs no device synchronisation."""
        sigma = self.sigma if isinstance(self.sigma, Tensor) else torch.full((), self.sigma, dtype=like.dtype, device=like.device)
        if sigma.device.type == "cpu" and readable(sigma):
            _check_positive(self.sigma, bool((sigma.detach() > 0).all()))
        return sigma[:, None, None] if sigma.dim() else sigma


def _check_positive(sigma: float | Tensor, is_positive: bool) -> None:
    if not is_positive:
        raise ValueError(f"sigma must be above 0; got {sigma!r:.80}")


def _finite_mean(key: Tensor) -> Tensor:
    """The mean (B, Hkv, 1, D) of the keys; 0 in columns where it is not finite."""
    mean = key.sum(2, keepdim=True) / max(key.shape[2], 1)
    return torch.where(mean.isfinite(), mean, 0.0)
