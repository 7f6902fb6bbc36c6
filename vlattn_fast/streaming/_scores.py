"""The core scores of one tile and their gradients: q (b, h, i, A), k (b, h, M, A) -> (b, h, i, M).

Scores that are sums over hidden units (additive, Hadamard) run unit by unit, so that no (i, M, A) block exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._tensors import unit_vectors

DOT_KINDS = ("dot", "dot_relu", "dot_leaky_relu", "dot_tanh", "dot_sigmoid")
UNIT_KINDS = ("additive", "hadamard_tanh", "hadamard_sigmoid")


def score_tile(kind: str, q: Tensor, k: Tensor, vector: Tensor | None, parameter: float) -> Tensor:
    """The scores of a tile. `vector` (h, A) belongs to the kinds that sum over hidden units."""
    if kind == "cosine":
        return _cosine(q, k, parameter)
    if kind in DOT_KINDS:
        return _activation(kind, q @ k.mT, parameter)
    assert vector is not None
    score = q.new_zeros(*q.shape[:-1], k.shape[-2])
    for a in range(q.shape[-1]):
        score += _unit(kind, q[..., a, None], k[..., None, :, a])[0] * vector[:, None, None, a]
    return score


def score_tile_backward(
    kind: str, grad: Tensor, q: Tensor, k: Tensor, vector: Tensor | None, parameter: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of q (b, h, i, A), k (b, h, M, A) and the vector (h, A) from that of the scores (b, h, i, M)."""
    if kind == "cosine":
        return *_cosine_backward(grad, q, k, parameter), None
    if kind in DOT_KINDS:
        if kind != "dot":
            grad = grad * _activation_slope(kind, q @ k.mT, parameter)
        return grad @ k, grad.mT @ q, None
    assert vector is not None
    grad_q, grad_k, grad_vector = torch.empty_like(q), torch.empty_like(k), torch.empty_like(vector)
    for a in range(q.shape[-1]):
        unit, by_q, by_k = _unit(kind, q[..., a, None], k[..., None, :, a])
        grad_vector[:, a] = (grad * unit).sum((0, 2, 3))
        weighted = grad * vector[:, None, None, a]
        grad_q[..., a] = (weighted * by_q).sum(-1)
        grad_k[..., a] = (weighted * by_k).sum(-2)
    return grad_q, grad_k, grad_vector


def _unit(kind: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One hidden unit (b, h, i, M) and its derivatives by q and by k."""
    if kind == "additive":
        t = torch.tanh(q + k)
        slope = 1 - t * t
        return t, slope, slope
    z = q * k
    if kind == "hadamard_tanh":
        t = torch.tanh(z)
        slope = 1 - t * t
    else:
        t = torch.sigmoid(z)
        slope = t * (1 - t)
    return t, slope * k, slope * q


def _activation(kind: str, x: Tensor, negative_slope: float) -> Tensor:
    match kind:
        case "dot_relu":
            return torch.relu(x)
        case "dot_leaky_relu":
            return torch.where(x >= 0, x, negative_slope * x)
        case "dot_tanh":
            return torch.tanh(x)
        case "dot_sigmoid":
            return torch.sigmoid(x)
    return x


def _activation_slope(kind: str, x: Tensor, negative_slope: float) -> Tensor:
    match kind:
        case "dot_relu":
            return (x > 0).to(x.dtype)
        case "dot_leaky_relu":
            return torch.where(x > 0, torch.ones_like(x), negative_slope)  # two Python numbers would give float32
        case "dot_tanh":
            return 1 - torch.tanh(x) ** 2
    t = torch.sigmoid(x)
    return t * (1 - t)


def _cosine(q: Tensor, k: Tensor, eps: float) -> Tensor:
    """q . k / max(|q| |k|, eps) by unit vectors, so that no product of norms overflows."""
    (unit_q, norm_q), (unit_k, norm_k) = unit_vectors(q, eps), unit_vectors(k, eps)
    cosine, norms = unit_q @ unit_k.mT, norm_q[..., :, None] * norm_k[..., None, :]
    # |q| |k| / eps is at most 1 where it is used
    return cosine if eps == 0.0 else cosine * torch.where(norms >= eps, 1.0, norms / eps)


def _cosine_backward(grad: Tensor, q: Tensor, k: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of q and k: grad / |q| (unit_k - cosine unit_q) where the clamp does not act, grad k / eps where it does."""
    (unit_q, norm_q), (unit_k, norm_k) = unit_vectors(q, eps), unit_vectors(k, eps)
    norm_q, norm_k = norm_q[..., :, None], norm_k[..., None, :]
    free = norm_q * norm_k >= eps
    by_cosine = torch.where(free, grad * (unit_q @ unit_k.mT), 0.0)
    weight_q = torch.where(free, grad / norm_q, grad * (norm_k / eps) if eps > 0.0 else 0.0)
    weight_k = torch.where(free, grad / norm_k, grad * (norm_q / eps) if eps > 0.0 else 0.0)
    grad_q = weight_q @ unit_k - _divide(unit_q, norm_q) * by_cosine.sum(-1)[..., None]
    grad_k = weight_k.mT @ unit_q - _divide(unit_k, norm_k.mT) * by_cosine.sum(-2)[..., None]
    return grad_q, grad_k


def _divide(unit: Tensor, norm: Tensor) -> Tensor:
    """unit / norm, and 0 for a zero vector, on which the clamp acts."""
    return unit / torch.where(norm > 0.0, norm, 1.0)
