"""attention_divergence in O(N + M) memory with plain PyTorch: both maps tile by tile, twice in training.

All f here are homogeneous of degree 1: with r = df/dA and r' = df/dA', f = A r + A' r'. Let m_i = sum_j A_ij r_ij. Then
D = m + m', and dD/dS_ij = A_ij (r_ij - m_i), likewise for the other side. A mean over heads Abar = mean_h A_h gives
dD/dS_h = A_h / H (r - sum_j A_h r).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

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


class Side(Protocol):
    """One of the two sides that are compared."""

    @property
    def heads(self) -> int:
        """How many maps it has."""
        ...

    @property
    def maps(self) -> int:
        """How many maps a tile holds at once."""
        ...

    def scores(self, b: slice, h: slice, i: slice) -> Tensor:
        """(b, h, i, M), without masks."""
        ...

    def zeros(self) -> list[Tensor]:
        """The gradients of its tensors, in the dtype of sums."""
        ...

    def add_gradients(self, made: list[Tensor], by_score: Tensor, b: slice, h: slice, i: slice) -> None:
        """Adds those of a tile of scores."""
        ...


class Products(NamedTuple):
    """scale q k^T; the key has a head for each of the query's."""

    query: Tensor
    key: Tensor
    scale: float

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def maps(self) -> int:
        return self.heads

    def scores(self, b: slice, h: slice, i: slice) -> Tensor:
        dtype = compute_dtype(self.query)
        return self.scale * (self.query[b, h, i].to(dtype) @ self.key[b, h].to(dtype).mT)

    def zeros(self) -> list[Tensor]:
        return zeros_like(self.query, self.key)

    def add_gradients(self, made: list[Tensor], by_score: Tensor, b: slice, h: slice, i: slice) -> None:
        by_score = self.scale * by_score
        made[0][b, h, i] = by_score @ self.key[b, h].to(by_score.dtype)
        made[1][b, h] += by_score.mT @ self.query[b, h, i].to(by_score.dtype)


class Tile(NamedTuple):
    """Some rows: the heads' log A (b, h, i, M), and those of their mean if it is compared."""

    b: slice
    h: slice  # one for both sides, or all heads of each
    i: slice
    heads: tuple[Tensor, Tensor]
    compared: tuple[Tensor, Tensor]


def forward(inputs: AttentionDivergenceInputs) -> Tensor:
    """D (B, H, N), or (B, 1, N) of the mean over heads."""
    query = inputs.query
    shape = query.shape[0], 1 if inputs.head_mean else query.shape[1], query.shape[2]
    return divergences(_tiles(inputs, _sides(inputs)), query, shape, inputs.kind, inputs.beta)


def divergences(tiles: Iterable[Tile], like: Tensor, shape: tuple[int, ...], kind: str, beta: float) -> Tensor:
    """The sum of each row's terms."""
    result = like.new_zeros(shape, dtype=compute_dtype(like))
    for tile in tiles:
        terms, _, _ = _terms(kind, *tile.compared, beta)
        result[tile.b, tile.h, tile.i] = terms.sum(-1)
    return result


def backward(inputs: AttentionDivergenceBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, other_query and other_key; None for a side that needs none."""
    sides, needs = _sides(inputs), (inputs.need_own, inputs.need_other)
    made = gradients(_tiles(inputs, sides), sides, needs, inputs.grad, inputs.kind, inputs.beta)
    by_tensor = list[Tensor | None]()
    for by_side, side, key in zip(made, sides, (inputs.key, inputs.other_key), strict=True):
        if by_side is None:
            by_tensor += (None, None)
        else:
            by_query, by_key = by_side
            by_tensor += by_query.to(side.query.dtype), fold_heads(by_key, key.shape[1]).to(key.dtype)
    return tuple(by_tensor)


def gradients(
    tiles: Iterable[Tile], sides: tuple[Side, Side], needs: Sequence[bool], grad: Tensor, kind: str, beta: float
) -> list[list[Tensor] | None]:
    """Those of the tensors of each side, in the dtype of sums, from `grad` (B, H or 1, N); None for a side that needs none."""
    made = [side.zeros() if need else None for side, need in zip(sides, needs, strict=True)]
    for tile in tiles:
        _, *weighted = _terms(kind, *tile.compared, beta)  # A r and A' r'
        for side, by_side, log_p, of_mean, by_weight in zip(sides, made, tile.heads, tile.compared, weighted, strict=True):
            if by_side is None:
                continue
            by_score = grad[tile.b, tile.h, tile.i, None].to(by_weight.dtype)
            if of_mean is not log_p:  # A_h r = (A_h / Abar) Abar r, and A_h / Abar is at most H
                share = (log_p - of_mean).masked_fill(torch.isneginf(log_p), -torch.inf).exp()
                by_weight, by_score = by_weight * share, by_score / side.heads
            by_score = (by_weight - log_p.exp() * by_weight.sum(-1, keepdim=True)) * by_score
            side.add_gradients(by_side, by_score, tile.b, tile.h, tile.i)
    return made


def jvp(inputs: NamedTuple) -> tuple[Tensor | None, ...]:
    """The tangent of the divergence."""
    return tangents_of(lambda x: (forward(x),), inputs, AttentionDivergenceInputs, FIELDS)


def second(inputs: NamedTuple) -> tuple[Tensor | None, ...]:
    """The gradients of that tangent's product with `grad`: the tangents of the backward pass."""

    def of_both(x: AttentionDivergenceBackwardInputs) -> tuple[Tensor | None, ...]:
        return backward(x._replace(need_own=True, need_other=True))

    return tangents_of(of_both, inputs, AttentionDivergenceBackwardInputs, FIELDS)


def zeros_like(*tensors: Tensor) -> list[Tensor]:
    """In the dtype of sums."""
    return [torch.zeros(x.shape, dtype=compute_dtype(x), device=x.device) for x in tensors]


def _sides(inputs: AttentionDivergenceInputs | AttentionDivergenceBackwardInputs) -> tuple[Products, Products]:
    query, other = inputs.query, inputs.other_query
    own = Products(query, expand_heads(inputs.key, query.shape[1]), inputs.scale)
    return own, Products(other, expand_heads(inputs.other_key, other.shape[1]), inputs.other_scale)


def _tiles(inputs: AttentionDivergenceInputs | AttentionDivergenceBackwardInputs, sides: tuple[Side, Side]) -> Iterator[Tile]:
    masks = Masks(inputs.attn_mask, inputs.key_mask, None, None, inputs.is_causal)
    return tiles_of(sides, masks, inputs.query, inputs.key.shape[2], inputs.head_mean)


def tiles_of(
    sides: tuple[Side, Side], masks: Masks, query: Tensor, keys: int, head_mean: bool, chosen: Tensor | None = None
) -> Iterator[Tile]:
    """With all heads of both sides in a tile if their means are compared. chosen: indices (B, N, K) of the keys that each query
    keeps; others than 0 to M - 1 are none."""
    batch, num_heads, queries, _ = query.shape
    at_once = sum(side.maps for side in sides) if head_mean else 2
    tiling = Tiling(batch, 1 if head_mean else num_heads, queries, keys, max(1, tile_elements(query) // max(1, at_once)))
    for b, i in tiling.query_tiles():
        kept = None if chosen is None else _kept(chosen[b, i], keys)
        for h in [slice(None)] if head_mean else tiling.heads():
            logs = list[Tensor]()
            for side in sides:
                scores = masks.apply(side.scores(b, h, i), (batch, side.heads, queries, keys), b, h, i)
                if kept is not None:
                    scores = scores.masked_fill(~kept[:, None], -torch.inf)
                scores = scores - _largest(scores, -1)  # an lse of huge logits would round all of them
                lse = logsumexp(scores)[..., None]
                logs.append(scores - torch.where(torch.isneginf(lse), 0.0, lse))
            own, other = logs
            compared = (_mean(own), _mean(other)) if head_mean else (own, other)
            yield Tile(b, h, i, (own, other), compared)


def _kept(chosen: Tensor, keys: int) -> Tensor:
    """bool (b, i, M) of indices (b, i, K)."""
    slots = torch.where((chosen >= 0) & (chosen < keys), chosen, keys).long()
    return slots.new_zeros(*slots.shape[:-1], keys + 1, dtype=torch.bool).scatter_(-1, slots, value=True)[..., :keys]


def _largest(x: Tensor, dim: int) -> Tensor:
    """The largest numbers along `dim`, as constants; 0 where all are -inf."""
    largest = x.detach().amax(dim, keepdim=True) if x.shape[dim] else x.new_zeros(())
    return torch.where(torch.isneginf(largest), 0.0, largest)


def _mean(log_p: Tensor) -> Tensor:
    """The logarithm of the mean over heads."""
    if log_p.shape[1] == 1:
        return log_p
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
    # Of a key with more than half of the weight, the difference is what those of all others leave: beside 1 it has no digits.
    difference, is_most = p - q, p > 0.5
    difference = torch.where(is_most, -difference.masked_fill(is_most, 0.0).sum(-1, keepdim=True), difference)
    return difference.abs() / 2, p * difference.sign() / 2, -q * difference.sign() / 2


def _kl(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """p (d - 1 + e^-d) for d = log p - log q."""
    series = d * d * (0.5 - d * (1 / 6 - d * (1 / 24 - d / 120)))
    near = torch.where(d.abs() < _SMALL, series, d + torch.expm1(-d.clamp(-1, 1)))
    return torch.where(d.abs() < 1, p * near, p * d + q - p)
