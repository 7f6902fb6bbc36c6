"""attention_divergence in O(N + M) memory with plain PyTorch: both maps tile by tile, twice in training.

All f here are homogeneous of degree 1: with r = df/dA and r' = df/dA', f = A r + A' r'. The slopes of f by log A and log A' are
A r and A' r'; before log A the gradients are autograd's within a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import blocks_of_keys, compute_dtype, expand_heads, fold_heads, lse_is_lost
from vlattn_fast.backends.streaming._forward_mode import Named, derivatives, vjp
from vlattn_fast.backends.streaming._scores import Tile
from vlattn_fast.backends.streaming._tiles import Tiling, log_probabilities, log_sum_of_heads, logsumexp, mask_tile, tile_elements

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
    """grad (B, H or 1, N), the gradient of the divergence, which Triton reads, too. need_own, need_other: which side gets
    gradients."""

    grad: Tensor
    query: Tensor
    key: Tensor
    other_query: Tensor
    other_key: Tensor
    attn_mask: Tensor | None
    key_mask: Tensor | None
    divergence: Tensor | None
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


class Side(NamedTuple):
    """One of the two maps that are compared. tensors: what it is made of; a key has a head for each of the query's. indexed: by
    how many of a tile's slices (b, h, i) each is cut. heads: how many maps it has, and maps: how many a tile holds at once.
    scores: (b, h, i, M) from a tile's parts of the tensors, without masks; or one of each block of keys, if it is `of_blocks`.
    With a tensor "lse" (B, H, N) that is the rows' log-sum-exp."""

    tensors: Named
    indexed: dict[str, int]
    heads: int
    maps: int
    scores: Callable[[Named], Tensor]
    of_blocks: bool = False

    def place(self, name: str, tile: Tile) -> tuple[slice, ...]:
        return tile[: self.indexed[name]]

    def parts(self, tile: Tile) -> Named:
        return {name: x[self.place(name, tile)].to(compute_dtype(x)) for name, x in self.tensors.items()}


def products(query: Tensor, key: Tensor, scale: float, lse: Tensor | None = None) -> Side:
    """scale q k^T."""
    heads = query.shape[1]
    tensors = {"query": query, "key": expand_heads(key, heads)} | ({} if lse is None else {"lse": lse})
    return Side(tensors, {"query": 3, "key": 2, "lse": 3}, heads, heads, lambda x: (scale * x["query"]) @ x["key"].mT)


def forward(inputs: AttentionDivergenceInputs) -> Tensor:
    """D (B, H, N), or (B, 1, N) of the mean over heads."""
    return _divergence(inputs).forward()


def backward(inputs: AttentionDivergenceBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, other_query and other_key; None for a side that needs none."""
    tensors = [getattr(inputs, field) for field in FIELDS]
    return _divergence(inputs).gradients(inputs.grad, tensors, (inputs.need_own, inputs.need_other))


jvp, second = derivatives(forward, backward, (AttentionDivergenceInputs, AttentionDivergenceBackwardInputs), FIELDS)


def _divergence(inputs: AttentionDivergenceInputs | AttentionDivergenceBackwardInputs) -> Divergence:
    own = products(inputs.query, inputs.key, inputs.scale)
    other = products(inputs.other_query, inputs.other_key, inputs.other_scale)
    return Divergence(inputs, (own, other), inputs.kind, inputs.beta, inputs.head_mean)


class Divergence:
    """The divergence of two sides, tile by tile; with all heads of both in a tile if their means are compared. block: that of
    their sums over so many keys each. chosen: indices (B, N, K) of the blocks that each query keeps; others are none. Of these
    all but the products is computed."""

    def __init__(
        self,
        inputs: Any,
        sides: tuple[Side, Side],
        kind: str,
        beta: float,
        head_mean: bool,
        chosen: Tensor | None = None,
        block: int = 1,
    ) -> None:
        self.query, self.num_keys, self.sides, self.block = inputs.query, inputs.key.shape[2], sides, block
        self.chosen = None if chosen is None else _once(chosen, -(-self.num_keys // block))
        self.inputs, self.terms, self.head_mean = inputs, partial(_terms, kind, beta), head_mean

    def forward(self) -> Tensor:
        """The sum of each row's terms, (B, H or 1, N)."""
        batch, heads, queries, _ = self.query.shape
        result = self.query.new_zeros(batch, 1 if self.head_mean else heads, queries, dtype=compute_dtype(self.query))
        for tile in self._tiles():
            own, other = [self._map(side, tile, side.parts(tile)) for side in self.sides]
            result[tile] = self.terms(own, other)[0].sum(-1)
        return result

    def gradients(self, grad: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Those of `tensors`, which are those of both sides as they were given, from `grad` (B, H or 1, N); None for those of a
        side that needs none."""
        sums = [
            {name: torch.zeros(x.shape, dtype=compute_dtype(x), device=x.device) for name, x in side.tensors.items() if need}
            for side, need in zip(self.sides, needs, strict=True)
        ]
        for tile in self._tiles():
            self._add_gradients(sums, tile, grad[tile][..., None])
        made = [total.get(name) for side, total in zip(self.sides, sums, strict=True) for name in side.tensors]
        return tuple([y if y is None else fold_heads(y, x.shape[1]).to(x.dtype) for x, y in zip(tensors, made, strict=True)])

    def _add_gradients(self, sums: list[Named], tile: Tile, grad: Tensor) -> None:
        def map_of(side: Side, x: Named) -> Callable[[Named], list[Tensor]]:
            return lambda leaves: [self._map(side, tile, x | leaves)]

        parts = [side.parts(tile) for side in self.sides]
        (own, by_own), (other, by_other) = [
            vjp(map_of(side, x), {name: x[name] for name in total})
            for side, x, total in zip(self.sides, parts, sums, strict=True)
        ]
        _, *slopes = self.terms(own[0], other[0])
        for side, total, pull, slope in zip(self.sides, sums, (by_own, by_other), slopes, strict=True):
            for name, y in pull([slope * grad]).items() if total else ():
                total[name][side.place(name, tile)] += y

    def _tiles(self) -> Iterator[Tile]:
        batch, num_heads, queries, _ = self.query.shape
        at_once = sum(side.maps for side in self.sides) if self.head_mean else 2
        most = max(1, tile_elements(self.query) // max(1, at_once))
        tiling = Tiling(batch, 1 if self.head_mean else num_heads, queries, self.num_keys, most)
        for b, i in tiling.query_tiles():
            for h in [slice(None)] if self.head_mean else tiling.heads():
                yield b, h, i

    def _map(self, side: Side, tile: Tile, x: Named) -> Tensor:
        """log A of a side, (b, h, i, M), or that of the mean over heads; -inf for masked pairs."""
        (b, _, i), (batch, _, queries, _), score, of_blocks = tile, self.query.shape, side.scores(x), side.of_blocks
        pairs = score.new_zeros(*score.shape[:-1], self.num_keys) if of_blocks else score
        logits = mask_tile(self.inputs, pairs, (batch, side.heads, queries, self.num_keys), *tile)
        if of_blocks:
            masks = self._blocks(logits).amax(-1)  # a block has the largest of its keys
            logits = (score + masks).masked_fill(torch.isneginf(masks), -torch.inf)
        if self.chosen is not None:
            blocks = logits[..., None] if of_blocks or self.block == 1 else self._blocks(logits)
            slots, none = self.chosen[b, None, i, :, None], blocks.shape[3]
            found = blocks.gather(3, slots.clamp(max=none - 1).expand(*blocks.shape[:3], -1, blocks.shape[4]))
            logits = found.masked_fill(slots == none, -torch.inf).flatten(3)
        if "lse" not in x:
            log_p = log_probabilities(logits)
        else:
            lse = x["lse"].masked_fill(torch.isneginf(x["lse"]), 0.0)[..., None]
            log_p, lost = logits - lse, lse_is_lost(lse)
            if lost.device.type != "cpu" or lost.any():
                log_p = torch.where(lost, log_probabilities(logits), log_p)
        log_p = log_sum_of_heads(log_p) - math.log(side.heads) if self.head_mean else log_p
        return log_p if of_blocks or self.block == 1 else logsumexp(self._blocks(log_p))

    def _blocks(self, x: Tensor) -> Tensor:
        return blocks_of_keys(x, self.block, -torch.inf)


def _once(chosen: Tensor, keys: int) -> Tensor:
    """Of indices (B, N, K) each once, at most `keys`; `keys` stands for none."""
    slots = torch.where((chosen >= 0) & (chosen < keys), chosen, keys).long().sort(-1).values
    repeated = slots.diff(prepend=slots.new_full((*slots.shape[:-1], 1), -1)) == 0
    return slots.masked_fill(repeated, keys).sort(-1).values[..., :keys]


def _terms(kind: str, beta: float, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f(p, q), p df/dp and q df/dq of a = log p, b = log q; 0 for masked pairs. r alone could overflow.

    Terms are at least 0 each, so that a small divergence keeps its digits. Those of KL are p (d - 1 + e^-d), d = a - b: p and q
    have the same sum over the keys, and constants drop out of r.
    """
    if kind == "reverse_kl":
        f, by_q, by_p = _terms("kl", beta, b, a)
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
