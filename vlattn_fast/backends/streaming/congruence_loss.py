"""congruence_loss in plain PyTorch without per-head maps: each block is computed in tiles of rows, averaged over the heads.

Held whole are maps of a few samples without a head axis: the cross block and the change of basis, O(L V). A tensor with a head
axis is one tile of a block, at most `tile_elements`. Only the inputs are saved for the backward pass.

Each kind is a function that gives the loss and, with its gradient, hands those of the rows of blocks to the blocks: each is
differentiated within a tile. A `_Block` computes the rows of one block, and takes their gradients back to its queries and keys.

The symmetric KL divergence is written without cancellation: with d = log p - log t, sum (p - t) d = sum t expm1(d) d, in which no
term is negative.

L is the number of text tokens, V that of image tokens. The blocks of attention are LL, VV, LV and VL: their queries are text,
image, text and image tokens, their keys text, image, image and text tokens. The formulas stand in the text direction. The image
direction is the same with text and image swapped: its ll is VV, its vv is LL, its lv is VL and its vl is LV.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype, mask_padding
from vlattn_fast.backends.inputs import CongruenceLossBackwardInputs, CongruenceLossInputs, queries_and_keys
from vlattn_fast.backends.reference.congruence_loss import EPSILON, num_gradients, of_all_blocks
from vlattn_fast.backends.streaming._forward_mode import Named, outputs_and_gradients, tangents_of, vjp
from vlattn_fast.backends.streaming._tiles import Tiling, log_sum_of_heads, logsumexp, tile_elements


def forward(inputs: CongruenceLossInputs) -> tuple[Tensor, Tensor]:
    """Returns the loss of each sample, (B), and an empty tensor: no maps are stored."""
    loss = _run(inputs, None, [])
    return loss, loss.new_empty(0)


def backward(inputs: CongruenceLossBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of the queries and of the keys; None for those of blocks that are constants."""
    return of_all_blocks([grad.to(inputs.text_query.dtype) for grad in _gradients(inputs)])


def _gradients(inputs: CongruenceLossBackwardInputs) -> list[Tensor]:
    """Those of the blocks that are no constants, in the dtype of sums."""
    blocks = [getattr(inputs, name) for name in differentiated(inputs.kind)]
    sums = [x.new_zeros(x.shape, dtype=compute_dtype(x)) for x in blocks]
    _run(inputs, inputs.grad_loss.to(sums[0].dtype), sums)
    return sums


def _run(inputs: CongruenceLossInputs | CongruenceLossBackwardInputs, grad: Tensor | None, sums: list[Tensor]) -> Tensor:
    """Returns the loss of each sample, (B). Adds its gradients times `grad` (B) to `sums`, those of the queries, then of the keys
    of as many blocks as have gradients."""
    text, n = inputs.text_query, len(sums) // 2
    loss = text.new_zeros(text.shape[0], dtype=compute_dtype(text))
    for b in _batches(queries_and_keys(inputs)[0]):
        of_blocks = [(sums[k][b], sums[n + k][b]) if k < n else None for k in range(4)]
        blocks = [_Block(*block, total) for block, total in zip(_inputs_of_blocks(b, inputs), of_blocks, strict=True)]
        for ll, vv, lv, vl in _directions(blocks, inputs.direction):
            loss[b] += _LOSSES[inputs.kind](None if grad is None else grad[b], ll, vv, lv, vl, inputs.normalize == "none")
        for block in blocks[:n]:
            block.finish()
    return loss


def jvp(inputs: Any) -> tuple[Tensor]:
    """The tangent of the loss of each sample, (B). The loss is one number, so that its gradient gives it for any tangents."""
    x = filled(inputs)
    ones = x.text_query.new_ones(x.text_query.shape[0], dtype=compute_dtype(x.text_query))
    values = [getattr(x, name, ones) for name in CongruenceLossBackwardInputs._fields]  # `x` has no grad_loss
    return (product_with_tangents(x, _gradients(CongruenceLossBackwardInputs._make(values))),)


def product_with_tangents(inputs: Any, gradients: Sequence[Tensor]) -> Tensor:
    """Returns the tangents of the samples, (B), from the gradients of their queries and keys in the order of `differentiated`."""
    tangents = [getattr(inputs, f"{name}_tangent") for name in differentiated(inputs.kind)]
    pairs = [(g, u) for g, u in zip(gradients, tangents, strict=True) if u is not None]
    return sum([(g * u).sum((1, 2, 3)) for g, u in pairs], gradients[0].new_zeros(gradients[0].shape[0]))


def second(inputs: Any) -> tuple[Tensor | None, ...]:
    """The second derivative: the tangents of the gradients of the queries and of the keys."""
    return tangents_of(backward, filled(inputs), CongruenceLossBackwardInputs, differentiated(inputs.kind))


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


_Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, float]  # query, key, tokens, padding, scale: the arguments of a `_Block`
_Pass = tuple[list[Tensor], Callable[[Sequence[Tensor | None]], Named]]


class _Block:
    """Of the heads' attention softmax(scale Q_h K_h^T) of some samples the mean, or the log of the sum, (b, N, M), computed in
    tiles of rows; with `sums`, those of the gradients of queries and keys, also the way back. `finish` must come last.

    Where one tile holds all rows, they are computed once for both directions of the loss, and the way back waits for both. Where
    it also holds all heads, its graph stays until then.
    """

    def __init__(
        self, query: Tensor, key: Tensor, tokens: Tensor, padding: Tensor | None, scale: float, sums: tuple[Tensor, Tensor] | None
    ) -> None:
        self.query, self.key, self.scale, self.sums = query, key, scale, sums
        self.tokens = tokens  # (b, N): real tokens among the queries
        self.padding = padding  # (b, 1, M): padding among the keys; None if there is none
        self.num_heads, self.dtype = query.shape[1], compute_dtype(query)
        self.all_rows = slice(0, query.shape[2])
        self._totals, self._passes, self._waiting = dict[bool, Tensor](), dict[bool, _Pass](), dict[bool, Tensor]()

    def tiles(self, width: int = 0) -> list[slice]:
        """Returns slices of the rows. `width`: the length of the rows that the caller also holds, if that is more."""
        head_tiling = Tiling.of(self.query, 1, 1, self.query.shape[2], max(width, self.key.shape[2]))
        return [i for _, i in head_tiling.query_tiles()]

    def rows(self, i: slice, log: bool = False) -> Tensor:
        """Rows i of the mean over the heads, (b, I, M); `log`: the log of the sum, by logarithms so that no weight underflows. 0
        at padding.

        Where one head has nearly all of the sum, this is its logarithm to the last bit, and its share in the gradient is 1. The
        logarithm of the mean is another number: at -1,000 its rounding changes every share by 6e-5.
        """
        if i != self.all_rows:
            return self._total(i, log)
        if log not in self._totals:
            self._totals[log] = self._total(i, log)
        return self._totals[log]

    def whole(self) -> Tensor:
        """All rows of the mean, (b, N, M); used for the cross blocks only."""
        return _join(self.tiles(), self.rows)

    def add_gradient(self, i: slice, grad: Tensor, log_sum: Tensor | None = None) -> None:
        """Takes the gradient of rows(i), or that of `log_sum`, which is rows(i, log=True)."""
        if i == self.all_rows:
            before = self._waiting.get(log_sum is not None)
            self._waiting[log_sum is not None] = grad if before is None else before + grad
        else:
            self._back(i, grad, log_sum)

    def finish(self) -> None:
        for log, grad in self._waiting.items():
            self._back(self.all_rows, grad, self._totals[log] if log else None)

    def _total(self, i: slice, log: bool) -> Tensor:
        parts = (self._pass(h, i, log)[0][0] for h in self._heads(i))
        total = next(parts) if log else next(parts) / self.num_heads
        for part in parts:
            total = torch.logaddexp(total, part) if log else total.add_(part, alpha=1 / self.num_heads)
        return _fill(total, self.padding, 0.0)

    def _back(self, i: slice, grad: Tensor, log_sum: Tensor | None) -> None:
        assert self.sums is not None
        for h in self._heads(i):
            (part,), pull = self._pass(h, i, log_sum is not None, graph=True)
            grads = pull([grad / self.num_heads if log_sum is None else grad * torch.exp(part - log_sum)])
            self.sums[0][:, h, i] += grads["query"]
            self.sums[1][:, h] += grads["key"]

    def _heads(self, i: slice) -> list[slice]:
        """Slices of the heads, of which one tile holds rows i."""
        return list(Tiling.of(self.query, 1, self.num_heads, i.stop - i.start, self.key.shape[2]).heads())

    def _pass(self, h: slice, i: slice, log: bool, graph: bool = False) -> _Pass:
        """What some heads add to rows i, with its way back if there is a graph."""
        is_whole = i == self.all_rows and h == slice(0, self.num_heads)
        if is_whole and log in self._passes:
            return self._passes[log]
        x = {"query": self.query[:, h, i].to(self.dtype), "key": self.key[:, h].to(self.dtype)}

        def part(leaves: Named) -> list[Tensor]:
            inputs = x | leaves
            score = (self.scale * inputs["query"]) @ inputs["key"].mT
            score = _fill(score, None if self.padding is None else self.padding[:, None], -torch.inf)
            if log:
                return [log_sum_of_heads(torch.log_softmax(score, dim=-1))[:, 0]]
            return [torch.softmax(score, dim=-1).sum(1)]

        heads_pass = vjp(part, x if self.sums is not None and (is_whole or graph) else {})
        if is_whole:
            self._passes[log] = heads_pass
        return heads_pass


def _constant(grad: Tensor | None, ll: _Block, vv: _Block, lv: _Block, vl: _Block, as_they_are: bool, singular: bool) -> Tensor:
    """The divergence of the rows of LL from softmax(X VV X^T), (b), with a constant X.

    CACR: X = LV. IAIS singular: row i of X is one-hot at the largest entry of row i of LV.
    """
    x = _one_hot_rows(lv.whole()) if singular else lv.whole()
    vv_x = _join(vv.tiles(), lambda i: vv.rows(i) @ x.mT)
    grad_vv_x, weight, log = torch.zeros_like(vv_x), _row_weight(ll, vv), singular and not as_they_are
    loss = weight.new_zeros(weight.shape[0])
    for i in ll.tiles(width=vv.key.shape[2]):

        def divergence(y: Named, i: slice = i) -> Tensor:
            target = x[:, i] @ y["vv_x"]
            if as_they_are:
                terms = _terms(y["rows"], _fill(target, ll.padding, 0.0))
            else:
                t, d = _log_ratio(ll, y["rows"], target, singular)
                terms = t * torch.expm1(d) * d  # (p - t) d
            return (weight[:, i] * terms.sum(-1)).sum(-1)

        rows = ll.rows(i, log)
        part, grads = _with_gradients(divergence, {"rows": rows, "vv_x": vv_x}, grad)
        loss += part
        if grads:
            ll.add_gradient(i, grads["rows"], rows if log else None)
            grad_vv_x += grads["vv_x"]
    for i in vv.tiles() if grad is not None else ():
        vv.add_gradient(i, grad_vv_x[:, i] @ x)
    return loss


def _log_ratio(ll: _Block, rows: Tensor, target: Tensor, singular: bool) -> tuple[Tensor, Tensor]:
    """t = softmax(target) and d = log p - log t, (b, I, L) each; p = softmax(rows) (CACR), or p = exp(rows) / H."""
    logits = _fill(target, ll.padding, -torch.inf)
    t = torch.softmax(logits, dim=-1)
    if not singular:
        # log p - log t = gap - log sum t e^gap: the sum is the ratio of the two softmaxes' denominators
        gap = rows - target
        return t, gap - torch.log1p((t * torch.expm1(gap)).sum(-1, keepdim=True))
    log_p = _fill(rows - math.log(ll.num_heads), ll.padding, 0.0)
    return t, log_p - (target - logsumexp(logits)[..., None])


def _distributed(grad: Tensor | None, ll: _Block, vv: _Block, lv: _Block, vl: _Block, as_they_are: bool) -> Tensor:
    """The divergence of P = LL from T = LV VL, (b)."""
    terms, slope = (_terms, _slope) if as_they_are else (_published_terms, _published_slope)
    vl_rows = vl.whole()
    grad_vl, weight = torch.zeros_like(vl_rows), _row_weight(ll, vv)[..., None]
    loss = weight.new_zeros(weight.shape[0])
    for i in ll.tiles(width=lv.key.shape[2]):
        p, x = ll.rows(i), {"lv": lv.rows(i), "vl": vl_rows}
        (t,), pull = vjp(lambda y: [y["lv"] @ y["vl"]], x)
        if grad is None:
            loss += (weight[:, i] * terms(p, t)).sum((1, 2))
        else:  # autograd's own slopes would take 1.4 times as long
            by_p, by_t = (weight[:, i] * grad[:, None, None] * part for part in (slope(p, t), slope(t, p)))
            grads = pull([by_t])
            ll.add_gradient(i, by_p)
            lv.add_gradient(i, grads["lv"])
            grad_vl += grads["vl"]
    for i in vl.tiles() if grad is not None else ():
        vl.add_gradient(i, grad_vl[:, i])
    return loss


def _terms(p: Tensor, t: Tensor) -> Tensor:
    """(p - t) (log(p + eps) - log(t + eps)), which is never negative, and 0 only where p = t."""
    return (p - t) * _log_difference(p, t)


def _slope(p: Tensor, t: Tensor) -> Tensor:
    """Their derivative by p."""
    return _log_difference(p, t) + (p - t) / (p + EPSILON)


def _log_difference(p: Tensor, t: Tensor) -> Tensor:
    """log(p + eps) - log(t + eps), to a few ulp where p is near t."""
    gap = p - t
    return torch.where(gap > 0, torch.log1p(gap / (t + EPSILON)), -torch.log1p(-gap / (p + EPSILON)))


def _published_terms(p: Tensor, t: Tensor) -> Tensor:
    """t (log t - log(p + eps)) + p (log p - log(t + eps)), with log x - log(x + eps) = -log1p(eps / x)."""
    value = (t - p) * ((t + EPSILON).log() - (p + EPSILON).log())
    for x in (t, p):
        value = value - x * torch.log1p(EPSILON / x.clamp(min=torch.finfo(x.dtype).tiny))  # 0 log 0 = 0
    return value


def _published_slope(p: Tensor, t: Tensor) -> Tensor:
    """Their derivative by p: log p - log(t + eps) + 1 - t / (p + eps), small where p is near t."""
    return p.clamp(min=torch.finfo(p.dtype).tiny).log() - (t + EPSILON).log() + (p - t + EPSILON) / (p + EPSILON)


def _with_gradients(f: Callable[[Named], Tensor], x: Named, grad: Tensor | None) -> tuple[Tensor, Named]:
    """f(x), and the gradients of its product with `grad`; none without it."""
    (y,), grads = outputs_and_gradients(lambda leaves: [f(x | leaves)], {} if grad is None else x, [grad])
    return y, grads


_LOSSES: dict[str, Callable[..., Tensor]] = {
    "cacr": partial(_constant, singular=False),
    "iais_singular": partial(_constant, singular=True),
    "iais_distributed": _distributed,
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
    (queries, keys), text_mask, image_mask = queries_and_keys(inputs), inputs.text_mask, inputs.image_mask
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
