"""Gaussian attention: the squared distance of query and key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_head_dim, check_number, readable
from vlattn_fast._ground.tensors import compute_dtype, expand_heads
from vlattn_fast.scores.score import Core, Parameter, Score, check_parameter


def _usual(head_dim: int) -> float:
    """The sigma with which products q . k have the factor of a scaled dot product, 1 / sqrt(D)."""
    return max(head_dim, 1) ** 0.25


@dataclass(frozen=True, eq=False)
class Distance(Score):
    """s = -|q - k|^2 / (2 sigma^2): weights are those of a Gaussian around the query, as in a kernel regression.

    sigma is above 0: a number, a tensor without dimensions, or (H) with one for each query head. The term of the row alone,
    -|q|^2 / (2 sigma^2), cancels in the softmax; it counts beside a sink and in the log-sum-exp.

    Backends compute it as a dot product of float32 features (float64 for float64 input). The score's error is then some ulps of
    (|q - c|^2 + |k - c|^2) / sigma^2 with c the mean of the keys: more than the formula's where sigma is far below |q - c|.
    """

    sigma: float | Tensor

    name: ClassVar[str] = "distance"
    parameters: ClassVar = {
        "sigma": Parameter(0, lambda head_dim: (_usual(head_dim),) * 2, lambda x, head_dim: 4 * _usual(head_dim) * (x / 4).exp())
    }

    def features(self, query_dim: int, key_dim: int) -> int:
        return query_dim + 4

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
        """With w = 1 / sigma^2: s = [w q, w, 1] . [k, -|k|^2 / 2, -w |q|^2 / 2], where each square is the sum of two numbers.

        Four things keep the digits of a small distance between long vectors. The mean of the keys, which all distances leave out,
        is taken away. Features are at least float32, and two numbers hold a square. The square of a query is that of the rounded
        w q: its rounding moves the query, and a small distance depends little on that. The row's term is a feature: as an offset
        it would have to cancel against the log-sum-exp.
        """
        dtype = compute_dtype(query)
        query, key = query.to(dtype), key.to(dtype)
        centre = _finite_mean(key.detach())
        query, key = query - expand_heads(centre, query.shape[1]), key - centre
        weight = self._sigma(query).to(dtype).square().reciprocal()
        weighted, weights = query * weight, weight.expand(*query.shape[:3], 1)
        half = weight.detach().double() * 2
        of_query = _exactly(_squares(query) * weight / -2, _squares(weighted.detach().double()) / -half)
        of_key = _exactly(_squares(key) / -2, _squares(key.detach().double()) / -2)
        ones = key.new_ones(*key.shape[:3], 1)
        phi = torch.cat([weighted, weights, weights, *of_query], -1)
        psi = torch.cat([key, *of_key, ones, ones], -1)
        return Core("dot", phi, psi, keeps_dtype=True)

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


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)


def _exactly(rounded: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers in the dtype of `rounded` with the sum `exact`, which has float64; the gradient is that of `rounded`."""
    high = exact.to(rounded.dtype)
    return rounded + (high - rounded.detach()), (exact - high.double()).to(rounded.dtype)
