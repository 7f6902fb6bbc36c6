"""The core scores of one tile and their gradients: q (b, h, i, A), k (b, h, M, A) -> (b, h, i, M).

Scores that are sums over hidden units (additive, Hadamard) run unit by unit, so that no (i, M, A) block exists. Their cost
is memory traffic: each step of a unit is one pass over the tile, in place, with the keys of the unit side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vlattn_fast._ground.score_kinds import KINDS
from vlattn_fast._ground.tensors import unit_vectors
from vlattn_fast.backends.streaming._forward_mode import differentiates


def score_tile(kind: str, q: Tensor, k: Tensor, vector: Tensor | None, parameter: float) -> Tensor:
    """The scores of a tile. `vector` (h, A) belongs to the kinds that sum over hidden units."""
    if kind == "cosine":
        return _cosine(q, k, parameter)
    if KINDS[kind].of == "product":
        return q @ k.mT if kind == "dot" else _ACTIVATIONS[kind].value(q @ k.mT, parameter)
    assert vector is not None
    units = _Units(kind, q, k, vector)
    score, unit, ones = units.new_tile().zero_(), units.buffer(), vector.new_zeros(vector.shape[0])
    for a in range(q.shape[-1]):
        if units.factored[a]:
            score.addcdiv_(-2 * vector[:, None, None, a], units.one_plus_exp(a, unit))
            ones += vector[:, a]  # the 1 in 1 - 2 / (1 + e^2x e^2y)
        else:
            score.addcmul_(units.activation(a, unit), vector[:, None, None, a])
    return score.add_(ones[:, None, None]) if any(units.factored) else score


def score_tile_backward(
    kind: str, grad: Tensor, q: Tensor, k: Tensor, vector: Tensor | None, parameter: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of q (b, h, i, A), k (b, h, M, A) and the vector (h, A) from that of the scores (b, h, i, M)."""
    if kind == "cosine":
        return *_cosine_backward(grad, q, k, parameter), None
    if KINDS[kind].of == "product":
        if kind != "dot":
            grad = grad * _ACTIVATIONS[kind].slope(q @ k.mT, parameter)
        return grad @ k, grad.mT @ q, None
    assert vector is not None
    units = _Units(kind, q, k, vector)
    buffer, second, total = units.buffer(), units.buffer(), grad.sum((0, 2, 3))
    grad_q, grad_k, grad_vector = torch.empty_like(q), torch.empty_like(k), torch.empty_like(vector)
    for a in range(q.shape[-1]):
        if units.factored[a]:
            # with r = 1 / (1 + e^2x e^2y) the unit is 1 - 2 r and its slope 4 r (1 - r)
            unit = units.one_plus_exp(a, buffer).reciprocal_()
            by_unit = torch.mul(grad, unit, out=second)
            grad_vector[:, a] = total - 2 * by_unit.sum((0, 2, 3))
            grad_product = torch.addcmul(by_unit, by_unit, unit, value=-1.0, out=buffer).mul_(4.0)
        else:
            unit = units.activation(a, buffer)
            grad_vector[:, a] = torch.mul(grad, unit, out=second).sum((0, 2, 3))
            grad_product = units.slope(unit, buffer).mul_(grad)
        grad_q[..., a], grad_k[..., a] = units.sums(a, grad_product, second)
    grad_q *= vector[:, None]
    grad_k *= vector[:, None]
    return grad_q, grad_k, grad_vector


class _Units:
    """The hidden units of a tile, one at a time in a buffer (b, h, i, M).

    `factored` says which of them are tanh(x + y) = 1 - 2 / (1 + e^2x e^2y), with exponentials once a query and a key. Only in
    float64, whose tanh takes as long as four passes: in float32 this gains nothing in the backward pass, and where |x + y| is
    small, scores and the vector's gradient have up to twelve times the error of tanh, which has the digits of small numbers.
    """

    def __init__(self, kind: str, q: Tensor, k: Tensor, vector: Tensor) -> None:
        self.kind, self.q, self.keys = kind, q, k.mT.contiguous()
        self.factored = [False] * q.shape[-1]
        if kind == "additive" and q.dtype == torch.float64 and q.device.type == "cpu" and q.numel() and k.numel():
            self.factored = (_factors(q, k) & vector.isfinite().all(0)).tolist()
            self.exp_q, self.exp_keys = torch.exp(2 * q), torch.exp(2 * self.keys)
            self.ones = q.new_ones(k.shape[-2])

    def new_tile(self) -> Tensor:
        return self.q.new_empty(*self.q.shape[:-1], self.keys.shape[-1])

    def buffer(self) -> Tensor | None:
        """A tile for `out=`, which has no tangents: None in forward mode."""
        return None if differentiates() else self.new_tile()

    def one_plus_exp(self, a: int, out: Tensor | None) -> Tensor:
        return torch.addcmul(self.ones, self.exp_q[..., a, None], self.exp_keys[..., a, None, :], out=out)

    def activation(self, a: int, out: Tensor | None) -> Tensor:
        combine = torch.add if self.kind == "additive" else torch.mul
        unit = combine(self.q[..., a, None], self.keys[..., a, None, :], out=out)
        return unit.sigmoid_() if self.kind == "hadamard_sigmoid" else unit.tanh_()

    def slope(self, unit: Tensor, out: Tensor | None) -> Tensor:
        """The derivative of a unit by what the activation acts on; `out` may be the unit."""
        first = unit if self.kind == "hadamard_sigmoid" else unit.new_ones(())
        return torch.addcmul(first, unit, unit, value=-1.0, out=out)

    def sums(self, a: int, grad: Tensor, buffer: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradients (b, h, i) and (b, h, M) of the unit's queries and keys from that of their sum or product."""
        if self.kind == "additive":
            return grad.sum(-1), grad.sum(-2)
        by_q = torch.mul(grad, self.keys[..., a, None, :], out=buffer).sum(-1)
        return by_q, torch.mul(grad, self.q[..., a, None], out=buffer).sum(-2)


def _factors(q: Tensor, k: Tensor) -> Tensor:
    """(A) for which units 1 - 2 / (1 + e^2x e^2y) has the digits of float64 that count, from the least and largest x and y.

    No exponential overflows; some |x + y| is more than 2^-5, as units near 0 lose digits to the 1; and some is less than 7, as
    slopes beyond are what is left of 1 - tanh^2.
    """
    (least_q, most_q), (least_k, most_k) = (torch.aminmax(x, dim=-2) for x in (q, k))  # (b, h, A)
    corners = torch.stack([least_q + least_k, least_q + most_k, most_q + least_k, most_q + most_k]).abs()
    single = torch.stack([least_q, most_q, least_k, most_k]).abs().amax(0)
    fit = (single <= 170.0) & (corners.amax(0) <= 170.0) & (corners.amax(0) >= 2.0**-5) & (corners.amin(0) <= 7.0)
    return fit.all(0).all(0)


class _Activation(NamedTuple):
    """What acts on a product, of the product and the kind's number; and its derivative by the product."""

    value: Callable[[Tensor, float], Tensor]
    slope: Callable[[Tensor, float], Tensor]


def _sigmoid_slope(x: Tensor, p: float) -> Tensor:
    t = torch.sigmoid(x)
    return t * (1 - t)


_ACTIVATIONS = {
    "dot_relu": _Activation(lambda x, p: torch.relu(x), lambda x, p: (x > 0).to(x.dtype)),
    "dot_leaky_relu": _Activation(
        lambda x, p: torch.where(x > 0, x, p * x),
        lambda x, p: torch.where(x > 0, torch.ones_like(x), p),  # two Python numbers would give float32
    ),
    "dot_tanh": _Activation(lambda x, p: torch.tanh(x), lambda x, p: 1 - torch.tanh(x) ** 2),
    "dot_sigmoid": _Activation(lambda x, p: torch.sigmoid(x), _sigmoid_slope),
    "dot_softcap": _Activation(lambda x, p: torch.tanh(x * p), lambda x, p: (1 - torch.tanh(x * p) ** 2) * p),
}


def _cosine(q: Tensor, k: Tensor, eps: float) -> Tensor:
    """q . k / max(|q| |k|, eps) by unit vectors, so that no product of norms overflows."""
    (unit_q, norm_q), (unit_k, norm_k) = unit_vectors(q, eps), unit_vectors(k, eps)
    cosine, clamps = unit_q @ unit_k.mT, norm_q[..., :, None] * norm_k[..., None, :] < eps
    return torch.where(clamps, q @ k.mT / eps, cosine) if eps > 0.0 and _any(clamps) else cosine


def _cosine_backward(grad: Tensor, q: Tensor, k: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of q and k: through unit vectors where the clamp does not act, grad k / eps where it does.

    A unit vector's gradient loses the part along it once it is summed, as in autograd: of one feature exactly 0 is left.
    """
    (unit_q, norm_q), (unit_k, norm_k) = unit_vectors(q, eps), unit_vectors(k, eps)
    norm_q, norm_k = norm_q[..., :, None], norm_k[..., None, :]
    clamps = norm_q * norm_k < eps
    by_unit = torch.where(clamps, 0.0, grad)
    grad_q = _norm_backward(by_unit @ unit_k, unit_q, norm_q)
    grad_k = _norm_backward(by_unit.mT @ unit_q, unit_k, norm_k.mT)
    if eps > 0.0 and _any(clamps):
        clamped = torch.where(clamps, grad, 0.0)
        grad_q += clamped @ k / eps
        grad_k += clamped.mT @ q / eps
    return grad_q, grad_k


def _any(clamps: Tensor) -> bool:
    """Whether the clamp acts on a pair, or may: only on a CPU does looking cost nothing."""
    return clamps.device.type != "cpu" or bool(clamps.any())


def _norm_backward(grad: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """The gradient of x from that of x / |x|, and 0 for a zero vector, on which the clamp acts."""
    return (grad - unit * (grad * unit).sum(-1, keepdim=True)) / torch.where(norm > 0.0, norm, 1.0)
