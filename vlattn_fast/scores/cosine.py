"""The cosine of query and key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_head_dim, check_number, readable
from vlattn_fast._ground.tensors import compute_dtype, product, unit_vectors
from vlattn_fast.scores.score import Core, Score


@dataclass(frozen=True, eq=False)
class Cosine(Score):
    """Computes the cosine score s = q . k / max(|q| |k|, eps).

    The clamp is on the product of the norms, as in SCAN and AttnGAN. On a CPU the score is a dot product of unit vectors, unless
    a product of norms is below eps.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
        >>> va.score_attention(query, key, value, score=va.scores.Cosine(), scale=9.0).shape
        torch.Size([1, 2, 5, 8])
    """

    eps: float = 1e-8

    name: ClassVar[str] = "cosine"
    masked_key: ClassVar[float] = 1.0  # the clamp would act on a zero vector
    ignores_lengths: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        return "cosine"

    @property
    def is_linear(self) -> bool:
        return True

    def linear_features(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Returns unit vectors: the score without its clamp, and 0 for a zero vector."""
        (phi, _), (psi, _) = unit_vectors(query, 1.0), unit_vectors(key, 1.0)
        return phi, psi

    def check(self, query: Tensor, key: Tensor) -> None:
        check_number("eps", self.eps, low=0.0)
        check_head_dim(query, key)

    def formula(self, query: Tensor, key: Tensor) -> Tensor:
        """Takes the norms in the dtype of sums: float16 would round eps to 0 and entries of 9000 to an infinite norm."""
        (unit_q, norm_q), (unit_k, norm_k) = unit_vectors(query, self.eps), unit_vectors(key, self.eps)
        cosine = product(unit_q.to(query.dtype), unit_k.to(key.dtype).mT)
        if self.eps == 0.0:
            return cosine
        norms = norm_q[..., :, None] * norm_k[..., None, :]
        clamped = (query.to(norms.dtype) @ key.to(norms.dtype).mT) / self.eps
        # the norms of an infinite vector are NaN, and so is its cosine
        return torch.where(norms < self.eps, clamped.to(query.dtype), cosine)

    def core(self, query: Tensor, key: Tensor) -> Core:
        # A dot product of unit vectors is right only if no product of norms is below eps. The norms are compared if that costs
        # no device synchronisation and no graph break.
        reads_data = query.device.type == "cpu" and readable(query) and readable(key)
        if not reads_data or query.numel() == 0 or key.numel() == 0:
            return self._with_clamp(query, key)
        (unit_q, norm_q), (unit_k, norm_k) = _unit_vectors_of_data(query, self.eps), _unit_vectors_of_data(key, self.eps)
        smallest = norm_q.min() * norm_k.min()
        if smallest > 0 and smallest >= self.eps:
            return Core("dot", unit_q.to(query.dtype), unit_k.to(key.dtype))
        return self._with_clamp(query, key)

    def _with_clamp(self, query: Tensor, key: Tensor) -> Core:
        return Core("cosine", _bounded(query, key, self.eps), _bounded(key, query, self.eps), parameter=self.eps)


def _unit_vectors_of_data(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Does `unit_vectors` in half as many passes over the data, if the values can be read and no square overflows or underflows.

    The passes are most of a call with few queries. Vectors of one entry take unit_vectors, with a gradient of exactly zero.
    """
    if x.shape[-1] == 1:
        return unit_vectors(x, eps)
    wide = x.to(compute_dtype(x))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    smallest, largest = norm.detach().aminmax()
    if smallest >= 2.0**-40 and largest <= 2.0**40:  # False for NaN
        return wide / norm, norm.detach().squeeze(-1)
    return unit_vectors(x, eps)


def _bounded(x: Tensor, partner: Tensor, eps: float) -> Tensor:
    """Returns vectors, divided by powers of two if an entry is above a bound, so that no kernel's product of norms overflows.

    A cosine does not depend on the lengths; only its clamp does. The bound preserves the pairs on which the clamp acts: in
    float16 no product with a vector of that length is below eps; in wider dtypes the vector in `partner` would have to be shorter
    than eps / 2^50. If `partner` holds a zero vector, the clamp always acts, and its gradient, sum x / eps, depends on the
    length. So float16 vectors keep their lengths then; their norms cannot overflow in float32.
    """
    if x.shape[-1] == 0:
        return x
    dtype = compute_dtype(x)
    bound = max(1.0, eps * 2.0**25) if x.dtype == torch.float16 else 2.0 ** int(0.4 * math.log2(torch.finfo(dtype).max))
    largest = x.detach().abs().amax(-1, keepdim=True).to(dtype)
    factor = torch.exp2(torch.log2(bound / largest).floor().clamp(max=0.0))
    if x.dtype == torch.float16 and partner.numel():
        factor = torch.where((partner.detach() == 0).all(-1).any(), 1.0, factor)
    return x * factor.to(x.dtype)
