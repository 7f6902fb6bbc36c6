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
    """Returns the sigma for which products q . k have the factor of a scaled dot product, 1 / sqrt(D)."""
    return max(head_dim, 1) ** 0.25


@dataclass(frozen=True, eq=False)
class Distance(Score):
    """Computes the score of Gaussian attention, s = -|q - k|^2 / (2 sigma^2), as in a kernel regression.

    Weights are those of a Gaussian around the query. Backends compute the score as a dot product of D + 4 float32 features
    (float64 for float64 input).

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
        >>> va.score_attention(query, key, value, score=va.scores.Distance(sigma=2.0)).shape
        torch.Size([1, 2, 5, 8])

    The score's error is some ulps of (|q - c|^2 + |k - c|^2) / sigma^2 with c in the middle of the keys: more than the formula's
    if sigma is far below |q - c| or |k - c|. The term that only depends on the query, -|q|^2 / (2 sigma^2), cancels in the
    softmax; it counts if there is a sink, and in the log-sum-exp.

    Args:
        sigma: above 0: a number, a tensor without dimensions, or (H) with one for each query head. On a GPU and in traced code a
            tensor's values are not checked: its sign has no effect there, and 0 gives NaN.
    """

    sigma: float | Tensor

    name: ClassVar[str] = "distance"
    parameters: ClassVar = {
        "sigma": Parameter(0, lambda head_dim: (_usual(head_dim),) * 2, lambda x, head_dim: 4 * _usual(head_dim) * (x / 4).exp())
    }

    @property
    def is_linear(self) -> bool:
        return False  # features of the queries depend on the keys

    def features(self, query_dim: int, key_dim: int) -> int:
        return query_dim + 4

    def check(self, query: Tensor, key: Tensor) -> None:
        check_head_dim(query, key)
        if isinstance(self.sigma, Tensor):
            check_parameter("sigma", self.sigma, (), query)
        else:
            check_number("sigma", self.sigma)
            _check_positive(self.sigma, self.sigma > 0)
            least = torch.finfo(compute_dtype(query)).tiny ** 0.5
            if self.sigma < least:
                raise ValueError(f"sigma must be at least {least:.0e} for {query.dtype}, to have a square; got {self.sigma!r}")

    def formula(self, query: Tensor, key: Tensor) -> Tensor:
        squared, sigma = (query[..., :, None, :] - key[..., None, :, :]).square().sum(-1), self._sigma(query)
        return (-squared.to(sigma.dtype) / (2 * sigma.square())).to(query.dtype)

    def core(self, query: Tensor, key: Tensor) -> Core:
        """With w = 1 / sigma^2: s = [w q, w, 1] . [k, -|k|^2 / 2, -w |q|^2 / 2], where each square is the sum of two numbers.

        Four things preserve the digits of a small distance between long vectors. A point amid the keys, which no distance depends
        on, is subtracted. Features are at least float32, and two numbers hold a square. The square of a query is that of the
        rounded w q: its rounding moves the query, and a small distance depends little on that. The query's term is a feature: as
        an offset it would have to cancel against the log-sum-exp.
        """
        dtype = compute_dtype(query)
        query, key = query.to(dtype), key.to(dtype)
        centre = _middle(key.detach())
        query, key = query - expand_heads(centre, query.shape[1]), key - centre
        weight = self._sigma(query).square().reciprocal()
        weighted, weights = query * weight, weight.expand(*query.shape[:3], 1)
        half = weight.detach().double() * 2
        squares = torch.where(half > 0, _squares(weighted.detach().double()) / -half, 0.0)  # 0 for a huge sigma
        query_terms = _exactly(_squares(query) * weight / -2, squares)
        key_terms = _exactly(_squares(key) / -2, _squares(key.detach().double()) / -2)
        ones = key.new_ones(*key.shape[:3], 1)
        phi = torch.cat([weighted, weights, weights, *query_terms], -1)
        psi = torch.cat([key, *key_terms, ones, ones], -1)
        return Core("dot", phi, psi, keeps_dtype=True)

    def _sigma(self, like: Tensor) -> Tensor:
        """Returns sigma in the dtype of sums, broadcastable to (B, H, N, D). Checks a tensor's values if that costs no device
        synchronisation."""
        if not isinstance(self.sigma, Tensor):
            return torch.full((), self.sigma, dtype=torch.float64, device=like.device).to(compute_dtype(like))
        if self.sigma.device.type == "cpu" and readable(self.sigma):
            _check_positive(self.sigma, bool((self.sigma.detach() > 0).all()))
        sigma = self.sigma.to(compute_dtype(like))
        return sigma[:, None, None] if sigma.dim() else sigma


def _check_positive(sigma: float | Tensor, is_positive: bool) -> None:
    if not is_positive:
        raise ValueError(f"sigma must be above 0; got {sigma!r:.80}")


SAMPLE = 15  # keys


def _middle(key: Tensor) -> Tensor:
    """Returns a point amid the keys, (B, Hkv, 1, D): in each column the median of some keys that are not 0 (padding is 0). Any
    point serves; a mean would follow a single long key, even one that no query attends to."""
    if key.shape[2] == 0:
        return key.new_zeros(*key.shape[:2], 1, key.shape[3])
    is_real = (key != 0).any(-1)
    real_first = is_real.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
    spread = torch.arange(SAMPLE, device=key.device) * is_real.sum(-1, keepdim=True) // SAMPLE
    rows = real_first.gather(-1, spread)[..., None].expand(*key.shape[:2], SAMPLE, key.shape[3])
    middle = key.gather(2, rows).sort(2).values[:, :, SAMPLE // 2, None]
    return torch.where(middle.isfinite(), middle, 0.0)


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)


def _exactly(rounded: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two numbers in the dtype of `rounded` with the sum `exact`, which is float64; the gradient is that of `rounded`."""
    high = exact.to(rounded.dtype)
    return rounded + (high - rounded.detach()), (exact - high.double()).to(rounded.dtype)
