"""congruence_loss in plain PyTorch without per-head maps: each block is computed in tiles of rows, averaged over the heads.

Held whole are maps of a few samples without a head axis: the cross block and the change of basis, O(L V). What has a head axis is
one tile of a block, at most TILE_ELEMENTS. Only the inputs are saved for the backward pass.

Both passes write the symmetric KL divergence without cancellation: with d = log p - log t, sum (p - t) d = sum t expm1(d) d, in
which no term is negative.

L is the number of text tokens, V that of image tokens. The blocks of attention are LL, VV, LV and VL: their queries are text,
image, text and image tokens, their keys text, image, image and text tokens. The formulas stand in the text direction. The image
direction is the same with text and image swapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vlattn_fast._tensors import compute_dtype
from vlattn_fast.reference.congruence_loss import EPSILON, num_gradients
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
) -> tuple[Tensor, Tensor]:
    """The loss of each sample, (B), and an empty tensor: no maps are kept. Queries and keys: see
    reference.congruence_loss.block_inputs."""
    loss = queries[0].new_zeros(queries[0].shape[0], dtype=compute_dtype(queries[0]))
    for b in _batches(queries):
        for blocks in _directions(_blocks(b, queries, keys, text_mask, image_mask, scale), direction):
            loss[b] += _KINDS[kind](blocks, None)
    return loss, loss.new_empty(0)


def backward(
    grad_loss: Tensor,
    maps: Tensor,
    queries: list[Tensor],
    keys: list[Tensor],
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    kind: str,
    direction: str,
    scale: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the queries and of the keys, of as many as `num_gradients` says."""
    dtype, n = compute_dtype(queries[0]), num_gradients(kind)
    grad_queries, grad_keys = ([x.new_zeros(x.shape, dtype=dtype) for x in xs[:n]] for xs in (queries, keys))
    for b in _batches(queries):
        blocks = _blocks(b, queries, keys, text_mask, image_mask, scale)
        for block, grad_query, grad_key in zip(blocks, grad_queries, grad_keys, strict=False):
            block.grad_query, block.grad_key = grad_query[b], grad_key[b]
        for one in _directions(blocks, direction):
            _KINDS[kind](one, grad_loss[b].to(dtype))
        for block in blocks:
            block.flush()
    dtype = queries[0].dtype
    return [grad.to(dtype) for grad in grad_queries], [grad.to(dtype) for grad in grad_keys]


class _Block:
    """mean_h softmax(scale Q_h K_h^T) of some samples, (b, N, M), computed in tiles of rows.

    Both directions of the loss read a block. Where one tile holds all rows, they are computed once and differentiated once.
    """

    def __init__(self, query: Tensor, key: Tensor, tokens: Tensor, masked: Tensor | None, scale: float) -> None:
        self.query, self.key, self.scale = query, key, scale
        self.tokens = tokens  # (b, N): real tokens among the queries
        self.masked = masked  # (b, 1, M): padding among the keys; None where there is none
        self.grad_query: Tensor | None = None
        self.grad_key: Tensor | None = None
        self.dtype = compute_dtype(query)
        self._mean: Tensor | None = None  # rows(all_rows)
        self._stored: dict[bool, Tensor] = {}  # what _maps(all_rows, log) gave, by `log`
        self._pending: Tensor | None = None  # the gradient of rows(all_rows) so far

    @property
    def all_rows(self) -> slice:
        return slice(0, self.query.shape[2])

    def tiles(self, width: int = 0) -> list[slice]:
        """Slices of the rows. `width`: the length of the rows that the caller holds beside them, where that is more."""
        return [i for _, i in Tiling(1, 1, self.query.shape[2], max(width, self.key.shape[2])).rows()]

    def rows(self, i: slice) -> Tensor:
        """Rows i of the block, (b, I, M)."""
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
        """All rows, (b, N, M); used for the cross blocks only."""
        return _join(self.tiles(), self.rows)

    def log_sum(self, i: slice) -> Tensor:
        """log of the sum of rows(i) over the heads, (b, I, M), from logarithms so that no weight underflows; 0 at padding.

        Where one head has nearly all of the sum, this is its logarithm to the last bit, and its share in `backward` is 1. The
        logarithm of the mean is another number: at -1,000 its rounding changes every share by 6e-5.
        """
        total = torch.full_like(self._zero(i), -torch.inf)
        for _, log_prob in self._maps(i, log=True):
            total = torch.logaddexp(total, torch.logsumexp(log_prob, dim=1))
        return _fill(total, self.masked, 0.0)

    def add_gradient(self, i: slice, grad: Tensor) -> None:
        """Adds the gradient of rows(i): at once, or in flush() where the tile holds all rows."""
        if self._holds_all(i):
            self._pending = grad if self._pending is None else self._pending + grad
        else:
            self.backward(i, grad)

    def flush(self) -> None:
        """Differentiates the whole block once, from the sum of the gradients."""
        if self._pending is not None:
            self.backward(self.all_rows, self._pending)

    def backward(self, i: slice, grad: Tensor, log_sum: Tensor | None = None) -> None:
        """Adds to grad_query and grad_key, from the gradient of rows(i), or of log_sum(i), which is then `log_sum`."""
        assert self.grad_query is not None and self.grad_key is not None
        grad = grad[:, None] if log_sum is not None else grad[:, None] / self.query.shape[1]
        for h, prob in self._maps(i, log=log_sum is not None):
            if log_sum is None:
                grad_score = grad * prob
            else:
                prob, grad_score = torch.exp(prob), grad * torch.exp(prob - log_sum[:, None])
            grad_score.addcmul_(prob, grad_score.sum(-1, keepdim=True), value=-1.0)
            self.grad_query[:, h, i] += grad_score @ (self.scale * self.key[:, h].to(self.dtype))
            self.grad_key[:, h] += grad_score.mT @ (self.scale * self.query[:, h, i].to(self.dtype))

    def _maps(self, i: slice, log: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the heads with their attention (b, h, I, M), or its logarithm, which is -inf at padding.

        The backward pass reads each tile twice and stores one that is the whole block.
        """
        if log in self._stored and self._holds_all(i):
            yield slice(0, self.query.shape[1]), self._stored[log]
            return
        for h in Tiling(1, self.query.shape[1], i.stop - i.start, self.key.shape[2]).heads():
            score = (self.scale * self.query[:, h, i].to(self.dtype)) @ self.key[:, h].to(self.dtype).mT
            score = _fill(score, None if self.masked is None else self.masked[:, None], -torch.inf)
            prob = torch.log_softmax(score, dim=-1) if log else torch.softmax(score, dim=-1)
            if self.grad_query is not None and self._holds_all(i) and prob.shape[1] == self.query.shape[1]:
                self._stored[log] = prob
            yield h, prob

    def _zero(self, i: slice) -> Tensor:
        return self.query.new_zeros(self.query.shape[0], i.stop - i.start, self.key.shape[2], dtype=self.dtype)

    def _holds_all(self, i: slice) -> bool:
        return i == self.all_rows


@dataclass(frozen=True)
class _Direction:
    """The blocks in the text direction; in the image direction ll is VV, vv is LL, lv is VL and vl is LV."""

    ll: _Block
    vv: _Block
    lv: _Block
    vl: _Block
    weight: Tensor  # (b, L): 1 / number of real text tokens at each of them, else 0


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


def _directions(blocks: list[_Block], direction: str) -> list[_Direction]:
    """The directions of the loss. They share the blocks."""
    ll, vv, lv, vl = blocks
    directions = []
    if direction in ("text", "both"):
        directions.append(_Direction(ll, vv, lv, vl, _row_weight(ll.tokens, vv.tokens, ll.dtype)))
    if direction in ("image", "both"):
        directions.append(_Direction(vv, ll, vl, lv, _row_weight(vv.tokens, ll.tokens, ll.dtype)))
    return directions


def _padding(mask: Tensor | None, b: slice) -> Tensor | None:
    """(b, 1, M), True at padding; False throughout in a sample without any real token, whose softmax would be 0 / 0."""
    return None if mask is None else (~mask[b] & mask[b].any(-1, keepdim=True))[:, None]


def _row_weight(text: Tensor, image: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean over real text tokens (b, L) as weights; 0 in a sample without real image tokens (b, V)."""
    return (text & image.any(-1, keepdim=True)).to(dtype) / text.sum(-1, keepdim=True).clamp(min=1)


def _change_of_basis(blocks: _Direction, grad: Tensor | None, singular: bool) -> Tensor:
    """The divergence of LL from softmax(X VV X^T), with a constant X (L, V).

    CACR: X is LV, and LL passes a softmax, too. IAIS singular: row i of X is one-hot at the key that row i of LV attends to most.
    (Products with X are deterministic on a GPU; scatter_add is not.)
    """
    ll, vv = blocks.ll, blocks.vv
    loss, weight = _start(blocks, grad)
    x = blocks.lv.whole()
    if singular:
        x = torch.zeros_like(x).scatter_(-1, x.argmax(-1, keepdim=True), 1.0)
    vv_x = _join(vv.tiles(), lambda i: vv.rows(i) @ x.mT)
    grad_vv_x = None if grad is None else torch.zeros_like(vv_x)
    for i in ll.tiles(width=vv.key.shape[2]):
        target = x[:, i] @ vv_x
        logits = _fill(target, ll.masked, -torch.inf)
        t = torch.softmax(logits, dim=-1)
        if singular:
            log_sum = ll.log_sum(i)
            log_p = _fill(log_sum - math.log(ll.query.shape[1]), ll.masked, 0.0)
            d = log_p - (target - torch.logsumexp(logits, dim=-1, keepdim=True))
        else:
            # log p - log t = gap - log sum t e^gap: the sum is the ratio of the two softmaxes' denominators
            gap = ll.rows(i) - target
            d = gap - torch.log1p((t * torch.expm1(gap)).sum(-1, keepdim=True))
        difference = t * torch.expm1(d)  # p - t
        p = t + difference
        loss += (blocks.weight[:, i] * (difference * d).sum(-1)).sum(-1)
        if grad_vv_x is not None:
            by_log_p, by_log_t = weight[:, i, None] * (p * d + difference), -weight[:, i, None] * (t * d + difference)
            if singular:
                ll.backward(i, by_log_p, log_sum)
            else:
                ll.add_gradient(i, _log_softmax_backward(p, by_log_p))
            grad_vv_x += x[:, i].mT @ _log_softmax_backward(t, by_log_t)
    if grad_vv_x is not None:
        for i in vv.tiles():
            vv.add_gradient(i, grad_vv_x[:, i] @ x)
    return loss


def _distributed(blocks: _Direction, grad: Tensor | None) -> Tensor:
    """The divergence of LL from LV VL, with EPSILON in the logarithms of the first arguments."""
    ll, lv, vl = blocks.ll, blocks.lv, blocks.vl
    loss, weight = _start(blocks, grad)
    vl_rows = vl.whole()
    grad_vl = None if grad is None else torch.zeros_like(vl_rows)
    tiny = torch.finfo(ll.dtype).tiny  # 0 log 0 = 0
    for i in ll.tiles(width=lv.key.shape[2]):
        p, x = ll.rows(i), lv.rows(i)
        t = x @ vl_rows
        safe_p, safe_t, first_p, first_t = p.clamp(min=tiny), t.clamp(min=tiny), (p + EPSILON).log(), (t + EPSILON).log()
        # t (log t - log(p + eps)) + p (log p - log(t + eps)), with log x - log(x + eps) = -log1p(eps / x)
        value = (t - p) * (first_t - first_p) - t * torch.log1p(EPSILON / safe_t) - p * torch.log1p(EPSILON / safe_p)
        loss += (blocks.weight[:, i] * value.sum(-1)).sum(-1)
        if grad_vl is not None:
            # log p - log(t + eps) + 1 - t / (p + eps), small where p is near t
            by_p = safe_p.log() - first_t + (p - t + EPSILON) / (p + EPSILON)
            by_t = weight[:, i, None] * (safe_t.log() - first_p + (t - p + EPSILON) / (t + EPSILON))
            ll.add_gradient(i, weight[:, i, None] * by_p)
            lv.add_gradient(i, by_t @ vl_rows.mT)
            grad_vl += x.mT @ by_t
    if grad_vl is not None:
        for i in vl.tiles():
            vl.add_gradient(i, grad_vl[:, i])
    return loss


_KINDS: dict[str, Callable[[_Direction, Tensor | None], Tensor]] = {
    "cacr": partial(_change_of_basis, singular=False),
    "iais_singular": partial(_change_of_basis, singular=True),
    "iais_distributed": _distributed,
}


def _join(tiles: list[slice], rows: Callable[[slice], Tensor]) -> Tensor:
    """rows(i) (b, I, *) of all tiles as one tensor."""
    first = rows(tiles[0])
    if len(tiles) == 1:
        return first
    out = first.new_empty(first.shape[0], tiles[-1].stop, *first.shape[2:])
    out[:, tiles[0]] = first
    for i in tiles[1:]:
        out[:, i] = rows(i)
    return out


def _start(blocks: _Direction, grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """A loss of zeros (b), and the weight of each row in the gradient (b, N)."""
    weight = blocks.weight
    return weight.new_zeros(weight.shape[0]), weight if grad is None else weight * grad[:, None]


def _log_softmax_backward(prob: Tensor, grad_log: Tensor) -> Tensor:
    return grad_log - prob * grad_log.sum(-1, keepdim=True)


def _fill(x: Tensor, where: Tensor | None, value: float) -> Tensor:
    return x if where is None else x.masked_fill(where, value)
