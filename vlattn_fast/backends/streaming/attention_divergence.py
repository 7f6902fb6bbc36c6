"""attention_divergence in O(N + M) memory with plain PyTorch: both maps tile by tile, twice in training.

All f here are homogeneous of degree 1: with r = df/dA and r' = df/dA', f = A r + A' r'. Let m_i = sum_j A_ij r_ij. Then
D = m + m', and dD/dS_ij = A_ij (r_ij - m_i), likewise for the other side. A mean over heads Abar = mean_h A_h gives
dD/dS_h = A_h / H (r - sum_j A_h r).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype, expand_heads, fold_heads
from vlattn_fast.backends.inputs import derivative_inputs
from vlattn_fast.backends.streaming._forward_mode import tangents_of
from vlattn_fast.backends.streaming._tiles import Masks, Tiling, logsumexp, tile_elements

_SMALL = 1e-2  # below this |log A - log A'| the terms of KL are a series


class AttentionDivergenceInputs(NamedTuple):
    """query (B, H, N, D), key (B, Hkv, M, D), other_query (B, H', N, D'), other_key (B, H'kv, M, D'), attn_mask broadcastable to
    (B, H, N, M), key_mask (B, M); kind a name of KINDS in the formula's file."""

    query: Tensor
    key: Tensor
    other_query: Tensor
    other_key: Tensor
    attn_mask: Tensor | None
    key_mask: Tensor | None
    kind: str
    beta: float
    head_mean: bool
    is_causal: bool
    scale: float
    other_scale: float
    backend: str


class AttentionDivergenceBackwardInputs(NamedTuple):
    """grad (B, H or 1, N), the gradient of the divergence. need_own, need_other: which side gets gradients."""

    grad: Tensor
    query: Tensor
    key: Tensor
    other_query: Tensor
    other_key: Tensor
    attn_mask: Tensor | None
    key_mask: Tensor | None
    kind: str
    beta: float
    head_mean: bool
    is_causal: bool
    scale: float
    other_scale: float
    need_own: bool
    need_other: bool
    backend: str


FIELDS = "query", "key", "other_query", "other_key"
AttentionDivergenceJvpInputs, AttentionDivergenceSecondInputs = derivative_inputs(
    AttentionDivergenceBackwardInputs, FIELDS, grads=("grad",)
)


class _Side(NamedTuple):
    """One of the two attentions; its key has a head for each of the query's."""

    query: Tensor
    key: Tensor
    scale: float


class _Tile(NamedTuple):
    """Some rows: the heads' log A (b, h, i, M), and those of their mean if it is compared."""

    b: slice
    h: slice  # one for both sides, or all heads of each
    i: slice
    heads: tuple[Tensor, Tensor]
    compared: tuple[Tensor, Tensor]


def forward(inputs: AttentionDivergenceInputs) -> Tensor:
    """D (B, H, N), or (B, 1, N) of the mean over heads."""
    query, dtype = inputs.query, compute_dtype(inputs.query)
    result = query.new_zeros(query.shape[0], 1 if inputs.head_mean else query.shape[1], query.shape[2], dtype=dtype)
    for tile in _tiles(inputs, _sides(inputs)):
        terms, _, _ = _terms(inputs.kind, *tile.compared, inputs.beta)
        result[tile.b, slice(None) if inputs.head_mean else tile.h, tile.i] = terms.sum(-1)
    return result


def backward(inputs: AttentionDivergenceBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, other_query and other_key; None for a side that needs none."""
    sides, needs, dtype = _sides(inputs), (inputs.need_own, inputs.need_other), compute_dtype(inputs.query)
    made = [[torch.zeros(x.shape, dtype=dtype, device=x.device) for x in side[:2]] for side in sides]
    for tile in _tiles(inputs, sides):
        _, *weighted = _terms(inputs.kind, *tile.compared, inputs.beta)  # A r and A' r'
        grad = inputs.grad[tile.b, slice(None) if inputs.head_mean else tile.h, tile.i, None].to(dtype)
        for n, (query, key, scale) in enumerate(sides):
            if not needs[n]:
                continue
            log_p, by_weight, h = tile.heads[n], weighted[n], slice(None) if inputs.head_mean else tile.h
            if inputs.head_mean:  # A_h r = (A_h / Abar) Abar r, and A_h / Abar is at most H
                share = log_p - tile.compared[n]
                share = torch.where(torch.isneginf(log_p), 0.0, share.masked_fill(torch.isneginf(log_p), 0.0).exp())
                by_weight = by_weight * share
            by_score = (by_weight - log_p.exp() * by_weight.sum(-1, keepdim=True)) * grad
            by_score = by_score * (scale / query.shape[1] if inputs.head_mean else scale)
            made[n][0][tile.b, h, tile.i] = by_score @ key[tile.b, h].to(dtype)
            made[n][1][tile.b, h] += by_score.mT @ query[tile.b, h, tile.i].to(dtype)
    keys = inputs.key, inputs.other_key
    gradients = list[Tensor | None]()
    for (by_query, by_key), side, key, need in zip(made, sides, keys, needs, strict=True):
        of_side = by_query.to(side.query.dtype), fold_heads(by_key, key.shape[1]).to(key.dtype)
        gradients += of_side if need else (None, None)
    return tuple(gradients)


def jvp(inputs: NamedTuple) -> tuple[Tensor | None, ...]:
    """The tangent of the divergence."""
    return tangents_of(lambda x: (forward(x),), inputs, AttentionDivergenceInputs, FIELDS)


def second(inputs: NamedTuple) -> tuple[Tensor | None, ...]:
    """The gradients of that tangent's product with `grad`: the tangents of the backward pass."""

    def gradients(x: AttentionDivergenceBackwardInputs) -> tuple[Tensor | None, ...]:
        return backward(x._replace(need_own=True, need_other=True))

    return tangents_of(gradients, inputs, AttentionDivergenceBackwardInputs, FIELDS)


def _sides(inputs: AttentionDivergenceInputs | AttentionDivergenceBackwardInputs) -> tuple[_Side, _Side]:
    query, other = inputs.query, inputs.other_query
    own = _Side(query, expand_heads(inputs.key, query.shape[1]), inputs.scale)
    return own, _Side(other, expand_heads(inputs.other_key, other.shape[1]), inputs.other_scale)


def _tiles(inputs: AttentionDivergenceInputs | AttentionDivergenceBackwardInputs, sides: tuple[_Side, _Side]) -> Iterator[_Tile]:
    """With all heads of both sides in a tile if their means are compared."""
    (batch, num_heads, queries, _), keys = sides[0].query.shape, sides[0].key.shape[2]
    others = sides[1].query.shape[1]
    masks = Masks(inputs.attn_mask, inputs.key_mask, None, None, inputs.is_causal)
    most, dtype = tile_elements(sides[0].query), compute_dtype(sides[0].query)
    at_once = num_heads + others if inputs.head_mean else 2
    tiling = Tiling(batch, 1 if inputs.head_mean else num_heads, queries, keys, max(1, most // max(1, at_once)))
    for b, i in tiling.query_tiles():
        for h in [slice(None)] if inputs.head_mean else tiling.heads():
            logs = list[Tensor]()
            for query, key, scale in sides:
                scores = scale * (query[b, h, i].to(dtype) @ key[b, h].to(dtype).mT)
                shape = batch, query.shape[1], queries, keys
                scores = masks.apply(scores, shape, b, h, i)
                scores = scores - _largest(scores, -1)  # an lse of huge logits would round all of them
                lse = logsumexp(scores)[..., None]
                logs.append(scores - torch.where(torch.isneginf(lse), 0.0, lse))
            own, other = logs
            compared = (_mean(own), _mean(other)) if inputs.head_mean else (own, other)
            yield _Tile(b, h, i, (own, other), compared)


def _largest(x: Tensor, dim: int) -> Tensor:
    """The largest numbers along `dim`, as constants; 0 where all are -inf."""
    largest = x.detach().amax(dim, keepdim=True) if x.shape[dim] else x.new_zeros(())
    return torch.where(torch.isneginf(largest), 0.0, largest)


def _mean(log_p: Tensor) -> Tensor:
    """The logarithm of the mean over heads."""
    largest = _largest(log_p, 1)
    total = (log_p - largest).exp().sum(1, keepdim=True)
    seen = total != 0  # of a NaN as well
    return torch.where(seen, torch.where(seen, total, 1.0).log() + largest - math.log(log_p.shape[1]), -torch.inf)


def _terms(kind: str, a: Tensor, b: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """f(p, q), p df/dp and q df/dq of a = log p, b = log q; 0 for masked pairs. r alone could overflow.

    Terms are at least 0 each, so that a small divergence keeps its digits. Those of KL are p (d - 1 + e^-d), d = a - b: p and q
    have the same sum over the keys, and constants drop out of r.
    """
    if kind == "reverse_kl":
        f, by_q, by_p = _terms("kl", b, a, beta)
        return f, by_p, by_q
    masked = torch.isneginf(a) | torch.isneginf(b)
    a, b = a.masked_fill(masked, 0.0), b.masked_fill(masked, 0.0)
    p, q = (torch.where(masked, 0.0, x.exp()) for x in (a, b))
    d = a - b
    if kind == "kl":
        return _kl(p, q, d), p * d, q - p
    if kind == "js":  # beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
        near = d.clamp(-1, 1)
        m = torch.logaddexp(a + math.log(beta), b + math.log1p(-beta))
        to_m = torch.where(d.abs() < 1, -torch.log1p((1 - beta) * torch.expm1(-near)), a - m)
        from_m = torch.where(d.abs() < 1, -torch.log1p(beta * torch.expm1(near)), b - m)
        mixed = beta * p + (1 - beta) * q
        f = beta * _kl(p, mixed, to_m) + (1 - beta) * _kl(q, mixed, from_m)
        return f, beta * p * to_m, (1 - beta) * q * from_m
    if kind == "hellinger":
        x, y = (torch.where(masked, 0.0, (each / 2).exp()) for each in (a, b))
        return (x - y).square() / 2, x * (x - y) / 2, y * (y - x) / 2
    difference = p - q
    return difference.abs() / 2, p * difference.sign() / 2, -q * difference.sign() / 2


def _kl(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """p (d - 1 + e^-d) for d = log p - log q."""
    series = d * d * (0.5 - d * (1 / 6 - d * (1 / 24 - d / 120)))
    near = torch.where(d.abs() < _SMALL, series, d + torch.expm1(-d.clamp(-1, 1)))
    return torch.where(d.abs() < 1, p * near, p * d + q - p)
