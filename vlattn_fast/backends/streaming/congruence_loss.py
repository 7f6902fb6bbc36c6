"""congruence_loss in plain PyTorch without per-head maps: each block is computed in tiles of rows, averaged over the heads.

Held whole are maps of a few samples without a head axis: the cross block and the change of basis, O(L V). A tensor with a head
axis is one tile of a block, at most `tile_elements`. Only the inputs are saved for the backward pass.

Each kind is a forward function, which gives the loss, and a backward function, which gives the gradients of blocks. A `_Block`
computes the rows of one block, and a `_BackwardBlock` also takes their gradients.

Both passes write the symmetric KL divergence without cancellation: with d = log p - log t, sum (p - t) d = sum t expm1(d) d, in
which no term is negative.

L is the number of text tokens, V that of image tokens. The blocks of attention are LL, VV, LV and VL: their queries are text,
image, text and image tokens, their keys text, image, image and text tokens. The formulas stand in the text direction. The image
direction is the same with text and image swapped: its ll is VV, its vv is LL, its lv is VL and its vl is LV.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype, mask_padding
from vlattn_fast.backends.inputs import (
    CongruenceLossBackwardInputs,
    CongruenceLossInputs,
    CongruenceLossJvpInputs,
    CongruenceLossSecondInputs,
)
from vlattn_fast.backends.reference.congruence_loss import EPSILON, num_gradients, of_all_blocks
from vlattn_fast.backends.streaming._forward_mode import tangents_of
from vlattn_fast.backends.streaming._tiles import Tiling, tile_elements


def forward(inputs: CongruenceLossInputs) -> tuple[Tensor, Tensor]:
    """Returns the loss of each sample, (B), and an empty tensor: no maps are stored."""
    text = inputs.queries[0]
    loss = text.new_zeros(text.shape[0], dtype=compute_dtype(text))
    for b in _batches(inputs.queries):
        blocks = [_Block(*block) for block in _inputs_of_blocks(b, inputs)]
        for ll, vv, lv, vl in _directions(blocks, inputs.direction):
            loss[b] += _FORWARD[inputs.kind](ll, vv, lv, vl)
    return loss, loss.new_empty(0)


def backward(inputs: CongruenceLossBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of the queries and of the keys; None for those of blocks that are constants."""
    return of_all_blocks([grad.to(inputs.text_query.dtype) for grad in _gradients(inputs)])


def _gradients(inputs: CongruenceLossBackwardInputs) -> list[Tensor]:
    """Those of the queries and of the keys, of as many as `num_gradients` says, in the dtype of sums."""
    kind, text = inputs.kind, inputs.queries[0]
    dtype, n = compute_dtype(text), num_gradients(kind)
    grad_queries, grad_keys = ([x.new_zeros(x.shape, dtype=dtype) for x in xs[:n]] for xs in (inputs.queries, inputs.keys))
    for b in _batches(inputs.queries):
        blocks = _inputs_of_blocks(b, inputs)
        differentiated = [_BackwardBlock(blocks[k], grad_queries[k][b], grad_keys[k][b]) for k in range(n)]
        constants = [_Block(*blocks[k]) for k in range(n, 4)]
        for ll, vv, lv, vl in _directions([*differentiated, *constants], inputs.direction):
            _BACKWARD[kind](inputs.grad_loss[b].to(dtype), ll, vv, lv, vl)
        for block in differentiated:
            block.finish()
    return [*grad_queries, *grad_keys]


def jvp(inputs: CongruenceLossJvpInputs) -> tuple[Tensor]:
    """The tangent of the loss of each sample, (B). The loss is one number, so that its gradient gives it for any tangents."""
    x = filled(inputs)
    ones = x.text_query.new_ones(x.text_query.shape[0], dtype=compute_dtype(x.text_query))
    values = [getattr(x, name, ones) for name in CongruenceLossBackwardInputs._fields]  # `x` has no grad_loss
    return (product_with_tangents(x, _gradients(CongruenceLossBackwardInputs._make(values))),)


def product_with_tangents(inputs: Any, gradients: Sequence[Tensor]) -> Tensor:
    """Returns the tangents of the samples, (B), from the gradients of their queries and keys in the order of `differentiated`."""
    tangents = [getattr(inputs, f"{name}_tangent") for name in differentiated(inputs.kind)]
    pairs = [(g, u) for g, u in zip(gradients, tangents, strict=True) if u is not None]
    zero = gradients[0].new_zeros(gradients[0].shape[0])
    return sum([(g * u).sum((1, 2, 3)) for g, u in pairs], zero)


def second(inputs: CongruenceLossSecondInputs) -> tuple[Tensor | None, ...]:
    """The second derivative: the tangents of the gradients of the queries and of the keys."""
    made = tangents_of(_gradients, filled(inputs), CongruenceLossBackwardInputs, differentiated(inputs.kind))
    return of_all_blocks([grad.to(inputs.text_query.dtype) for grad in made])


BLOCKS = CongruenceLossInputs._fields[:8]  # the queries and the keys


def differentiated(kind: str) -> tuple[str, ...]:
    """Returns the queries and the keys of blocks that are not constants."""
    n = num_gradients(kind)
    return *BLOCKS[:n], *BLOCKS[4 : 4 + n]


def filled(inputs: Any) -> Any:
    """Returns the inputs with zeros at padding, where other backends take anything."""
    for modality, mask in (("text", inputs.text_mask), ("image", inputs.image_mask)):
        names = [name for block in BLOCKS if modality in block for name in (block, f"{block}_tangent")]
        filled = mask_padding(mask, *[getattr(inputs, name) for name in names])
        inputs = inputs._replace(**dict(zip(names, filled, strict=True)))
    return inputs


_Softmax = Callable[..., Tensor]
_Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, float]  # query, key, tokens, padding, scale: the arguments of a `_Block`


class _Block:
    """mean_h softmax(scale Q_h K_h^T) of some samples, (b, N, M), computed in tiles of rows.

    Where one tile holds all rows, they are computed once for both directions of the loss.
    """

    def __init__(self, query: Tensor, key: Tensor, tokens: Tensor, padding: Tensor | None, scale: float) -> None:
        self.query, self.key, self.scale = query, key, scale
        self.tokens = tokens  # (b, N): real tokens among the queries
        self.padding = padding  # (b, 1, M): padding among the keys; None if there is none
        self.num_heads, self.dtype = query.shape[1], compute_dtype(query)
        self.all_rows = slice(0, query.shape[2])

    def tiles(self, width: int = 0) -> list[slice]:
        """Returns slices of the rows. `width`: the length of the rows that the caller also holds, if that is more."""
        head_tiling = Tiling.of(self.query, 1, 1, self.query.shape[2], max(width, self.key.shape[2]))
        return [i for _, i in head_tiling.query_tiles()]

    def map_tile(self, i: slice) -> Tensor:
        """Rows i of the block, (b, I, M)."""
        return self._mean_of_all_rows if i == self.all_rows else self._mean(i)

    def whole(self) -> Tensor:
        """All rows, (b, N, M); used for the cross blocks only."""
        return _join(self.tiles(), self.map_tile)

    def log_sum(self, i: slice) -> Tensor:
        """log of the sum of map_tile(i) over the heads, (b, I, M), from logarithms so that no weight underflows; 0 at padding.

        Where one head has nearly all of the sum, this is its logarithm to the last bit, and its share in the gradient is 1. The
        logarithm of the mean is another number: at -1,000 its rounding changes every share by 6e-5.
        """
        total = self.filled(i, -torch.inf)
        for _, log_prob in self.maps(i, torch.log_softmax):
            total = torch.logaddexp(total, torch.logsumexp(log_prob, dim=1))
        return _fill(total, self.padding, 0.0)

    def maps(self, i: slice, softmax: _Softmax = torch.softmax) -> Iterable[tuple[slice, Tensor]]:
        """Slices of the heads with their attention (b, h, I, M), or by torch.log_softmax with its logarithm, -inf at padding."""
        return ((h, softmax(self._logits(h, i), dim=-1)) for h in self.heads(i))

    def heads(self, i: slice) -> list[slice]:
        """Slices of the heads, of which one tile holds rows i."""
        return list(Tiling.of(self.query, 1, self.num_heads, i.stop - i.start, self.key.shape[2]).heads())

    @cached_property
    def _mean_of_all_rows(self) -> Tensor:
        return self._mean(self.all_rows)

    def _mean(self, i: slice) -> Tensor:
        total = self.filled(i, 0.0)
        for _, prob in self.maps(i):
            total += prob.sum(1)
        return total.div_(self.num_heads)

    def _logits(self, h: slice, i: slice) -> Tensor:
        score = (self.scale * self.query[:, h, i].to(self.dtype)) @ self.key[:, h].to(self.dtype).mT
        return _fill(score, None if self.padding is None else self.padding[:, None], -torch.inf)

    def filled(self, i: slice, value: float) -> Tensor:
        return self.query.new_full((self.query.shape[0], i.stop - i.start, self.key.shape[2]), value, dtype=self.dtype)


class _BackwardBlock(_Block):
    """A block that adds to the gradients of its queries and keys. `finish` must come last.

    The backward pass reads each tile twice. Where one tile is the whole block, it is held in between.
    """

    def __init__(self, inputs: _Inputs, grad_query: Tensor, grad_key: Tensor) -> None:
        super().__init__(*inputs)
        self.grad_query, self.grad_key = grad_query, grad_key
        self._grad_all_rows: Tensor | None = None
        self._whole_maps: dict[_Softmax, list[tuple[slice, Tensor]]] = {}

    def add_gradient(self, i: slice, grad: Tensor) -> None:
        """Takes the gradient of map_tile(i). That of all rows waits for the second direction: a block is differentiated once."""
        if i == self.all_rows:
            self._grad_all_rows = grad if self._grad_all_rows is None else self._grad_all_rows + grad
        else:
            self._mean_backward(i, grad)

    def add_gradient_of_log_sum(self, i: slice, log_sum: Tensor, grad: Tensor) -> None:
        """Takes the gradient of `log_sum`, which is log_sum(i)."""
        for h, log_prob in self.maps(i, torch.log_softmax):
            self._softmax_backward(h, i, torch.exp(log_prob), grad[:, None] * torch.exp(log_prob - log_sum[:, None]))

    def finish(self) -> None:
        if self._grad_all_rows is not None:
            self._mean_backward(self.all_rows, self._grad_all_rows)

    def maps(self, i: slice, softmax: _Softmax = torch.softmax) -> Iterable[tuple[slice, Tensor]]:
        if i != self.all_rows or len(self.heads(i)) > 1:
            return super().maps(i, softmax)
        if softmax not in self._whole_maps:
            self._whole_maps[softmax] = list(super().maps(i, softmax))
        return self._whole_maps[softmax]

    def _mean_backward(self, i: slice, grad: Tensor) -> None:
        grad = grad[:, None] / self.num_heads
        for h, prob in self.maps(i):
            self._softmax_backward(h, i, prob, grad * prob)

    def _softmax_backward(self, h: slice, i: slice, prob: Tensor, grad_log_prob: Tensor) -> None:
        """From the probabilities (b, h, I, M) and the gradient of their logarithms, which is overwritten."""
        grad_score = grad_log_prob.addcmul_(prob, grad_log_prob.sum(-1, keepdim=True), value=-1.0)
        self.grad_query[:, h, i] += grad_score @ (self.scale * self.key[:, h].to(self.dtype))
        self.grad_key[:, h] += grad_score.mT @ (self.scale * self.query[:, h, i].to(self.dtype))


def _constant_forward(ll: _Block, vv: _Block, lv: _Block, vl: _Block, singular: bool) -> Tensor:
    """The divergence of the rows of LL from softmax(X VV X^T), (b), with a constant X.

    CACR: X = LV. IAIS singular: row i of X is one-hot at the largest entry of row i of LV.
    """
    x = _one_hot_rows(lv.whole()) if singular else lv.whole()
    vv_x = _times_transposed(vv, x)
    weight = _row_weight(ll, vv)
    loss = weight.new_zeros(weight.shape[0])
    for i in ll.tiles(width=vv.key.shape[2]):
        log_sum = ll.log_sum(i) if singular else None
        loss += _divergence(weight[:, i], *_log_ratio(ll, i, log_sum, x[:, i] @ vv_x))
    return loss


def _constant_backward(grad: Tensor, ll: _BackwardBlock, vv: _BackwardBlock, lv: _Block, vl: _Block, singular: bool) -> None:
    x = _one_hot_rows(lv.whole()) if singular else lv.whole()
    vv_x = _times_transposed(vv, x)
    grad_vv_x = torch.zeros_like(vv_x)
    weight = _row_weight(ll, vv) * grad[:, None]
    for i in ll.tiles(width=vv.key.shape[2]):
        log_sum = ll.log_sum(i) if singular else None
        t, d = _log_ratio(ll, i, log_sum, x[:, i] @ vv_x)
        p, grad_log_p, grad_log_t = _divergence_backward(weight[:, i], t, d)
        if log_sum is None:
            ll.add_gradient(i, _log_softmax_backward(p, grad_log_p))
        else:
            ll.add_gradient_of_log_sum(i, log_sum, grad_log_p)
        grad_vv_x += x[:, i].mT @ _log_softmax_backward(t, grad_log_t)
    for i in vv.tiles():
        vv.add_gradient(i, grad_vv_x[:, i] @ x)


def _log_ratio(ll: _Block, i: slice, log_sum: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
    """t = softmax(target) and d = log p - log t, (b, I, L) each; p = softmax(LL) (CACR), or p = LL = exp(log_sum) / H."""
    logits = _fill(target, ll.padding, -torch.inf)
    t = torch.softmax(logits, dim=-1)
    if log_sum is None:
        # log p - log t = gap - log sum t e^gap: the sum is the ratio of the two softmaxes' denominators
        gap = ll.map_tile(i) - target
        return t, gap - torch.log1p((t * torch.expm1(gap)).sum(-1, keepdim=True))
    log_p = _fill(log_sum - math.log(ll.num_heads), ll.padding, 0.0)
    return t, log_p - (target - torch.logsumexp(logits, dim=-1, keepdim=True))


def _distributed_forward(ll: _Block, vv: _Block, lv: _Block, vl: _Block) -> Tensor:
    """The divergence of P = LL from T = LV VL, (b), with EPSILON in the logarithms of the first arguments."""
    vl_rows = vl.whole()
    tiny = torch.finfo(ll.dtype).tiny  # 0 log 0 = 0
    weight = _row_weight(ll, vv)
    loss = weight.new_zeros(weight.shape[0])
    for i in ll.tiles(width=lv.key.shape[2]):
        p, t = ll.map_tile(i), lv.map_tile(i) @ vl_rows
        # t (log t - log(p + eps)) + p (log p - log(t + eps)), with log x - log(x + eps) = -log1p(eps / x)
        value = (t - p) * ((t + EPSILON).log() - (p + EPSILON).log())
        value = value - t * torch.log1p(EPSILON / t.clamp(min=tiny)) - p * torch.log1p(EPSILON / p.clamp(min=tiny))
        loss += (weight[:, i] * value.sum(-1)).sum(-1)
    return loss


def _distributed_backward(grad: Tensor, ll: _BackwardBlock, vv: _Block, lv: _BackwardBlock, vl: _BackwardBlock) -> None:
    vl_rows = vl.whole()
    grad_vl = torch.zeros_like(vl_rows)
    tiny = torch.finfo(ll.dtype).tiny
    weight = _row_weight(ll, vv) * grad[:, None]
    for i in ll.tiles(width=lv.key.shape[2]):
        p, x = ll.map_tile(i), lv.map_tile(i)
        t = x @ vl_rows
        # log p - log(t + eps) + 1 - t / (p + eps), small where p is near t
        grad_p = p.clamp(min=tiny).log() - (t + EPSILON).log() + (p - t + EPSILON) / (p + EPSILON)
        grad_t = t.clamp(min=tiny).log() - (p + EPSILON).log() + (t - p + EPSILON) / (t + EPSILON)
        grad_t = weight[:, i, None] * grad_t
        ll.add_gradient(i, weight[:, i, None] * grad_p)
        lv.add_gradient(i, grad_t @ vl_rows.mT)
        grad_vl += x.mT @ grad_t
    for i in vl.tiles():
        vl.add_gradient(i, grad_vl[:, i])


_FORWARD: dict[str, Callable[..., Tensor]] = {
    "cacr": partial(_constant_forward, singular=False),
    "iais_singular": partial(_constant_forward, singular=True),
    "iais_distributed": _distributed_forward,
}
_BACKWARD: dict[str, Callable[..., None]] = {
    "cacr": partial(_constant_backward, singular=False),
    "iais_singular": partial(_constant_backward, singular=True),
    "iais_distributed": _distributed_backward,
}


def _batches(queries: list[Tensor]) -> list[slice]:
    """Slices of the batch whose blocks fit in one tile with all heads, or single samples."""
    (batch, num_heads, L, _), V = queries[0].shape, queries[1].shape[2]
    if num_heads == 0 or L == 0 or V == 0:
        return []
    step = max(1, tile_elements(queries[0]) // (num_heads * max(L, V) ** 2))
    return [slice(b, min(b + step, batch)) for b in range(0, batch, step)]


def _inputs_of_blocks(b: slice, inputs: CongruenceLossInputs | CongruenceLossBackwardInputs) -> list[_Inputs]:
    """Those of LL, VV, LV, VL of the samples `b`."""
    queries, keys, text_mask, image_mask = inputs.queries, inputs.keys, inputs.text_mask, inputs.image_mask
    text, image = (
        x.new_ones(x.shape[0], x.shape[2], dtype=torch.bool)[b] if mask is None else mask[b]
        for mask, x in ((text_mask, queries[0]), (image_mask, queries[1]))
    )
    text_padding, image_padding = _padding(text_mask, b), _padding(image_mask, b)
    tokens, padding = (text, image, text, image), (text_padding, image_padding, image_padding, text_padding)
    return [(queries[k][b], keys[k][b], tokens[k], padding[k], inputs.scale) for k in range(4)]


def _padding(mask: Tensor | None, b: slice) -> Tensor | None:
    """(b, 1, M), True at padding; False throughout in a sample without any real token, whose softmax would be 0 / 0."""
    return None if mask is None else (~mask[b] & mask[b].any(-1, keepdim=True))[:, None]


def _directions(blocks: Sequence[Any], direction: str) -> list[tuple[Any, Any, Any, Any]]:
    """ll, vv, lv, vl of the directions of the loss. They share the blocks LL, VV, LV, VL."""
    ll, vv, lv, vl = blocks
    text, image = (ll, vv, lv, vl), (vv, ll, vl, lv)
    return {"text": [text], "image": [image], "both": [text, image]}[direction]


def _row_weight(ll: _Block, vv: _Block) -> Tensor:
    """(b, L): 1 / number of real text tokens at each of them, else 0; 0 also in a sample without real image tokens."""
    text, image = ll.tokens, vv.tokens
    return (text & image.any(-1, keepdim=True)).to(ll.dtype) / text.sum(-1, keepdim=True).clamp(min=1)


def _one_hot_rows(x: Tensor) -> Tensor:
    """1 at the first largest entry of each row, else 0. (A product with it is deterministic on a GPU; scatter_add is not.)"""
    return torch.zeros_like(x).scatter_(-1, x.argmax(-1, keepdim=True), 1.0)


def _times_transposed(vv: _Block, x: Tensor) -> Tensor:
    """VV X^T (b, V, L), with X (b, L, V)."""
    return _join(vv.tiles(), lambda i: vv.map_tile(i) @ x.mT)


def _divergence(weight: Tensor, t: Tensor, d: Tensor) -> Tensor:
    """sum_ij weight_i (p - t) d, (b), with d = log p - log t; weight (b, I), t and d (b, I, L)."""
    return (weight * (t * torch.expm1(d) * d).sum(-1)).sum(-1)


def _divergence_backward(weight: Tensor, t: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p, and the gradients of log p and of log t, (b, I, L) each."""
    weight, difference = weight[..., None], t * torch.expm1(d)
    p = t + difference
    return p, weight * (p * d + difference), -weight * (t * d + difference)


def _log_softmax_backward(prob: Tensor, grad_log: Tensor) -> Tensor:
    return grad_log - prob * grad_log.sum(-1, keepdim=True)


def _join(tiles: list[slice], tile: Callable[[slice], Tensor]) -> Tensor:
    """tile(i) (b, I, *) of all tiles as one tensor."""
    first = tile(tiles[0])
    if len(tiles) == 1:
        return first
    out = first.new_empty(first.shape[0], tiles[-1].stop, *first.shape[2:])
    out[:, tiles[0]] = first
    for i in tiles[1:]:
        out[:, i] = tile(i)
    return out


def _fill(x: Tensor, where: Tensor | None, value: float) -> Tensor:
    return x if where is None else x.masked_fill(where, value)
