"""congruence_loss in plain PyTorch without per-head maps: blocks of attention come as row tiles, averaged over the heads.

What is held whole is O(L V) of a few samples (the cross block and the change of basis); what has a head axis is one tile of a
block, at most TILE_ELEMENTS. Nothing is saved for the backward pass but the inputs. Sums of both passes are those of the
symmetric KL divergence written without cancellation: with d = log p - log t, sum (p - t) d = sum t expm1(d) d has no negative
term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vlattn_fast._tensors import compute_dtype
from vlattn_fast.reference.congruence_loss import EPSILON
from vlattn_fast.streaming import _tiles
from vlattn_fast.streaming._tiles import Tiling


def forward(
    queries: list[Tensor],
    keys: list[Tensor],
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    kind: str,
    direction: str,
    scale: float,
) -> Tensor:
    """The loss of each sample, (B). Queries and keys: see reference.congruence_loss.block_inputs."""
    loss = queries[0].new_zeros(queries[0].shape[0], dtype=compute_dtype(queries[0]))
    for b in _batches(queries):
        for side in _sides(_blocks(b, queries, keys, text_mask, image_mask, scale), direction):
            loss[b] += _KINDS[kind](side, None)
    return loss


def backward(
    grad_loss: Tensor,
    queries: list[Tensor],
    keys: list[Tensor],
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    kind: str,
    direction: str,
    scale: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the queries and of the keys: of the first two, or of all four for "iais_distributed"."""
    dtype, n = compute_dtype(queries[0]), 4 if kind == "iais_distributed" else 2
    grad_queries, grad_keys = ([x.new_zeros(x.shape, dtype=dtype) for x in xs[:n]] for xs in (queries, keys))
    for b in _batches(queries):
        blocks = _blocks(b, queries, keys, text_mask, image_mask, scale)
        for block, grad_query, grad_key in zip(blocks, grad_queries, grad_keys, strict=False):
            block.grad_query, block.grad_key = grad_query[b], grad_key[b]
        for side in _sides(blocks, direction):
            _KINDS[kind](side, grad_loss[b].to(dtype))
        for block in blocks:
            block.flush()
    dtype = queries[0].dtype
    return [grad.to(dtype) for grad in grad_queries], [grad.to(dtype) for grad in grad_keys]


class _Block:
    """mean_h softmax(scale Q_h K_h^T) of some samples, (b,N,M), in tiles of rows.

    Where one tile holds all rows they are computed once, and differentiated once: both directions of the loss read them.
    """

    def __init__(self, query: Tensor, key: Tensor, tokens: Tensor, masked: Tensor | None, scale: float) -> None:
        self.query, self.key, self.scale = query, key, scale
        self.tokens = tokens  # (b,N): real tokens among the queries
        self.masked = masked  # (b,1,M): padding among the keys; None where there is none
        self.grad_query: Tensor | None = None
        self.grad_key: Tensor | None = None
        self.dtype = compute_dtype(query)
        self._mean: Tensor | None = None
        self._kept: dict[bool, Tensor] = {}
        self._pending: Tensor | None = None

    @property
    def every(self) -> slice:
        return slice(0, self.query.shape[2])

    def tiles(self, width: int = 0) -> list[slice]:
        """Slices of the rows; `width`: the caller holds rows that long too."""
        return [i for _, i in Tiling(1, 1, self.query.shape[2], max(width, self.key.shape[2])).rows()]

    def rows(self, i: slice) -> Tensor:
        """(b,I,M)"""
        if self._mean is not None and self._holds_all(i):
            return self._mean
        mean = self._zero(i)
        for _, prob in self._maps(i):
            mean += prob.sum(1)
        mean /= self.query.shape[1]
        if self._holds_all(i):
            self._mean = mean
        return mean

    def whole(self) -> Tensor:
        """(b,N,M): only for the blocks between the modalities."""
        return _join(self.tiles(), self.rows)

    def log_rows(self, i: slice) -> Tensor:
        """log of rows(i), (b,I,M), from logarithms: no weight underflows. 0 at padding, where nothing may read it."""
        total = torch.full_like(self._zero(i), -torch.inf)
        for _, log_prob in self._maps(i, log=True):
            total = torch.logaddexp(total, torch.logsumexp(log_prob, dim=1))
        return _fill(total - math.log(self.query.shape[1]), self.masked, 0.0)

    def add_gradient(self, i: slice, grad: Tensor) -> None:
        """Takes the gradient at rows(i); applied at once, or by flush() where the tile holds all rows."""
        if self._holds_all(i):
            self._pending = grad if self._pending is None else self._pending + grad
        else:
            self.backward(i, grad)

    def flush(self) -> None:
        if self._pending is not None:
            self.backward(self.every, self._pending)

    def backward(self, i: slice, grad: Tensor, log_mean: Tensor | None = None) -> None:
        """Adds to grad_query and grad_key, from the gradient at rows(i), or at log_rows(i) where that is given."""
        assert self.grad_query is not None and self.grad_key is not None
        grad = grad[:, None] / self.query.shape[1]
        for h, prob in self._maps(i, log=log_mean is not None):
            if log_mean is None:
                grad_score = grad * prob
            else:
                prob, grad_score = torch.exp(prob), grad * torch.exp(prob - log_mean[:, None])
            grad_score.addcmul_(prob, grad_score.sum(-1, keepdim=True), value=-1.0)
            self.grad_query[:, h, i] += grad_score @ (self.scale * self.key[:, h].to(self.dtype))
            self.grad_key[:, h] += grad_score.mT @ (self.scale * self.query[:, h, i].to(self.dtype))

    def _maps(self, i: slice, log: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the heads with their attention (b,h,I,M), or its logarithm, which is -inf at padding.

        In the backward pass a tile that is the whole block is kept for its second use.
        """
        if log in self._kept and self._holds_all(i):
            yield slice(0, self.query.shape[1]), self._kept[log]
            return
        for h in Tiling(1, self.query.shape[1], i.stop - i.start, self.key.shape[2]).heads():
            score = (self.scale * self.query[:, h, i].to(self.dtype)) @ self.key[:, h].to(self.dtype).mT
            score = _fill(score, None if self.masked is None else self.masked[:, None], -torch.inf)
            prob = torch.log_softmax(score, dim=-1) if log else torch.softmax(score, dim=-1)
            if self.grad_query is not None and self._holds_all(i) and prob.shape[1] == self.query.shape[1]:
                self._kept[log] = prob
            yield h, prob

    def _zero(self, i: slice) -> Tensor:
        return self.query.new_zeros(self.query.shape[0], i.stop - i.start, self.key.shape[2], dtype=self.dtype)

    def _holds_all(self, i: slice) -> bool:
        return i == self.every


@dataclass(frozen=True)
class _Side:
    """One direction for some samples: `own` is LL for the text, `other` VV, `cross` LV, `back` VL."""

    own: _Block
    other: _Block
    cross: _Block
    back: _Block
    weight: Tensor  # (b,N): 1 / number of rows at each row that counts, else 0


def _batches(queries: list[Tensor]) -> list[slice]:
    """Slices of the batch whose blocks fit in one tile with all heads, or single samples."""
    (batch, num_heads, L, _), V = queries[0].shape, queries[1].shape[2]
    if num_heads == 0 or L == 0 or V == 0:
        return []
    step = max(1, _tiles.TILE_ELEMENTS // (num_heads * max(L, V) ** 2))
    return [slice(b, min(b + step, batch)) for b in range(0, batch, step)]


def _blocks(
    b: slice, queries: list[Tensor], keys: list[Tensor], text_mask: Tensor | None, image_mask: Tensor | None, scale: float
) -> list[_Block]:
    """LL, VV, LV, VL of the samples `b`."""
    text, image = (
        x.new_ones(x.shape[0], x.shape[2], dtype=torch.bool)[b] if mask is None else mask[b]
        for mask, x in ((text_mask, queries[0]), (image_mask, queries[1]))
    )
    text_padding, image_padding = _padding(text_mask, b), _padding(image_mask, b)
    tokens, masked = (text, image, text, image), (text_padding, image_padding, image_padding, text_padding)
    return [_Block(queries[i][b], keys[i][b], tokens[i], masked[i], scale) for i in range(4)]


def _sides(blocks: list[_Block], direction: str) -> list[_Side]:
    """The directions of the loss, over shared blocks."""
    ll, vv, lv, vl = blocks
    sides = []
    if direction in ("text", "both"):
        sides.append(_Side(ll, vv, lv, vl, _row_weight(ll.tokens, vv.tokens, ll.dtype)))
    if direction in ("image", "both"):
        sides.append(_Side(vv, ll, vl, lv, _row_weight(vv.tokens, ll.tokens, ll.dtype)))
    return sides


def _padding(mask: Tensor | None, b: slice) -> Tensor | None:
    """(b,1,M), True at keys without a token; nowhere in a sample that has none at all, whose softmax would be 0 / 0."""
    return None if mask is None else (~mask[b] & mask[b].any(-1, keepdim=True))[:, None]


def _row_weight(rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    return (rows & columns.any(-1, keepdim=True)).to(dtype) / rows.sum(-1, keepdim=True).clamp(min=1)


def _change_of_basis(side: _Side, grad: Tensor | None, singular: bool) -> Tensor:
    """own against softmax(X other X^T), X a constant: cross with softmax(own) for CACR; for IAIS singular the one-hot matrix of
    the keys that cross attends to most, with own itself. (Products with X, not gather and scatter_add: deterministic on a GPU.)
    """
    own, other = side.own, side.other
    loss, weight = _start(side, grad)
    change = side.cross.whole()
    if singular:
        change = torch.zeros_like(change).scatter_(-1, change.argmax(-1, keepdim=True), 1.0)
    moved = _join(other.tiles(), lambda i: other.rows(i) @ change.mT)
    grad_moved = None if grad is None else torch.zeros_like(moved)
    for i in own.tiles(width=other.key.shape[2]):
        target = change[:, i] @ moved
        visible = _fill(target, own.masked, -torch.inf)
        t = torch.softmax(visible, dim=-1)
        if singular:
            log_p = own.log_rows(i)
            d = log_p - (target - torch.logsumexp(visible, dim=-1, keepdim=True))
        else:
            # log p - log t is the gap minus the difference of the two log-sum-exps, which is log sum t e^gap
            gap = own.rows(i) - target
            d = gap - torch.log1p((t * torch.expm1(gap)).sum(-1, keepdim=True))
        difference = t * torch.expm1(d)  # p - t
        p = t + difference
        loss += (side.weight[:, i] * (difference * d).sum(-1)).sum(-1)
        if grad_moved is not None:
            by_log_p, by_log_t = weight[:, i, None] * (p * d + difference), -weight[:, i, None] * (t * d + difference)
            if singular:
                own.backward(i, by_log_p, log_p)
            else:
                own.add_gradient(i, _log_softmax_backward(p, by_log_p))
            grad_moved += change[:, i].mT @ _log_softmax_backward(t, by_log_t)
    if grad_moved is not None:
        for i in other.tiles():
            other.add_gradient(i, grad_moved[:, i] @ change)
    return loss


def _distributed(side: _Side, grad: Tensor | None) -> Tensor:
    """own against cross back, with EPSILON in the logarithms of the first arguments."""
    own, cross, back = side.own, side.cross, side.back
    loss, weight = _start(side, grad)
    returned = back.whole()
    grad_returned = None if grad is None else torch.zeros_like(returned)
    tiny = torch.finfo(own.dtype).tiny  # 0 log 0 = 0
    for i in own.tiles(width=cross.key.shape[2]):
        p, x = own.rows(i), cross.rows(i)
        t = x @ returned
        safe_p, safe_t, first_p, first_t = p.clamp(min=tiny), t.clamp(min=tiny), (p + EPSILON).log(), (t + EPSILON).log()
        # t (log t - log(p + eps)) + p (log p - log(t + eps)), with log x - log(x + eps) = -log1p(eps / x)
        value = (t - p) * (first_t - first_p) - t * torch.log1p(EPSILON / safe_t) - p * torch.log1p(EPSILON / safe_p)
        loss += (side.weight[:, i] * value.sum(-1)).sum(-1)
        if grad_returned is not None:
            # log p - log(t + eps) + 1 - t / (p + eps), small where p is near t
            by_p = safe_p.log() - first_t + (p - t + EPSILON) / (p + EPSILON)
            by_t = weight[:, i, None] * (safe_t.log() - first_p + (t - p + EPSILON) / (t + EPSILON))
            own.add_gradient(i, weight[:, i, None] * by_p)
            cross.add_gradient(i, by_t @ returned.mT)
            grad_returned += x.mT @ by_t
    if grad_returned is not None:
        for i in back.tiles():
            back.add_gradient(i, grad_returned[:, i])
    return loss


_KINDS: dict[str, Callable[[_Side, Tensor | None], Tensor]] = {
    "cacr": partial(_change_of_basis, singular=False),
    "iais_singular": partial(_change_of_basis, singular=True),
    "iais_distributed": _distributed,
}


def _join(tiles: list[slice], rows: Callable[[slice], Tensor]) -> Tensor:
    """rows(i) (b,I,*) of all tiles as one tensor."""
    first = rows(tiles[0])
    if len(tiles) == 1:
        return first
    out = first.new_empty(first.shape[0], tiles[-1].stop, *first.shape[2:])
    out[:, tiles[0]] = first
    for i in tiles[1:]:
        out[:, i] = rows(i)
    return out


def _start(side: _Side, grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """A loss of zeros (b), and the weight of each row in the gradient (b,N)."""
    weight = side.weight
    return weight.new_zeros(weight.shape[0]), weight if grad is None else weight * grad[:, None]


def _log_softmax_backward(prob: Tensor, grad_log: Tensor) -> Tensor:
    return grad_log - prob * grad_log.sum(-1, keepdim=True)


def _fill(x: Tensor, where: Tensor | None, value: float) -> Tensor:
    return x if where is None else x.masked_fill(where, value)
