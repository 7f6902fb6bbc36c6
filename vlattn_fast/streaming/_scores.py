"""The core scores of one tile and their gradients: q (b,h,i,A), k (b,h,M,A) -> (b,h,i,M).

Scores that are sums over hidden units of a function of both sides run unit by unit, so that no (i,M,A) block exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

DOT_KINDS = ("dot", "dot_relu", "dot_leaky_relu", "dot_tanh", "dot_sigmoid")
UNIT_KINDS = ("additive", "hadamard_tanh", "hadamard_sigmoid")


def score_tile(kind: str, q: Tensor, k: Tensor, vector: Tensor | None, parameter: float) -> Tensor:
    """The scores of a tile; vector (h,A) for the kinds that sum over hidden units."""
    if kind == "cosine":
        return (q @ k.mT) / _norm_product(q, k).clamp(min=parameter)
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
    """From the gradient at the scores (b,h,i,M): those of q (b,h,i,A), k (b,h,M,A) and the vector (h,A)."""
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
    """One hidden unit's contribution (b,h,i,M) and its derivatives by q and by k."""
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
            return torch.where(x > 0, torch.ones_like(x), negative_slope)  # two numbers would meet in float32
        case "dot_tanh":
            return 1 - torch.tanh(x) ** 2
    t = torch.sigmoid(x)
    return t * (1 - t)


def _norm_product(q: Tensor, k: Tensor) -> Tensor:
    return q.norm(dim=-1)[..., :, None] * k.norm(dim=-1)[..., None, :]


def _cosine_backward(grad: Tensor, q: Tensor, k: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    norm_q, norm_k = q.norm(dim=-1), k.norm(dim=-1)
    product = norm_q[..., :, None] * norm_k[..., None, :]
    by_dot = grad / product.clamp(min=eps)
    by_norm = torch.where(product >= eps, -by_dot * (q @ k.mT) / product.clamp(min=eps), 0.0)
    # a zero vector's norm has slope 0, as autograd takes it
    unit_q = q / torch.where(norm_q > 0, norm_q, 1.0)[..., None]
    unit_k = k / torch.where(norm_k > 0, norm_k, 1.0)[..., None]
    grad_q = by_dot @ k + unit_q * (by_norm @ norm_k[..., None])
    grad_k = by_dot.mT @ q + unit_k * (by_norm.mT @ norm_q[..., None])
    return grad_q, grad_k
