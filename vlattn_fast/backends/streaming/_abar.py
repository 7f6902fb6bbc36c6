"""One tile of Abar, the map A or relu(A * dA) reduced over the heads, and the way back through it, for relevancy and attention
maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vlattn_fast._ground.tensors import compute_dtype, expand_heads, fold_heads, not_zero, over_sums
from vlattn_fast.backends.inputs import (
    AttentionMapBackwardInputs,
    AttentionMapInputs,
    RelevancyStepBackwardInputs,
    RelevancyStepInputs,
)
from vlattn_fast.backends.streaming._forward_mode import differentiates, tangents_of
from vlattn_fast.backends.streaming._scores import score_tile, score_tile_backward
from vlattn_fast.backends.streaming._tiles import Masks, Tiling, probabilities

Inputs = AttentionMapInputs | AttentionMapBackwardInputs | RelevancyStepInputs | RelevancyStepBackwardInputs
# of heads in a tile, and of tiles
_REDUCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "mean": (torch.sum, Tensor.add_),
    "max": (torch.amax, torch.maximum),
    "min": (torch.amin, torch.minimum),
}


class Abar:
    """Abar of a call, tile by tile. `vector`: that of a core score that sums over hidden units.

    rule "attention": A; "gradient": relu(A * dA), dA = grad_output @ value^T. row_normalize divides each row by its sum; a zero
    row stays zero. lse as in `probabilities`.
    """

    def __init__(self, inputs: Inputs, vector: Tensor | None, head_reduction: str = "mean") -> None:
        self.inputs, self.vector, self.head_reduction = inputs, vector, head_reduction
        query = inputs.query
        num_heads = query.shape[1]
        self.key = expand_heads(inputs.key, num_heads)
        self.value = None if inputs.value is None else expand_heads(inputs.value, num_heads)
        self.masks = Masks.of(inputs)
        self.shape = (*query.shape[:3], self.key.shape[2])
        self.dtype = compute_dtype(query)

    def tile(self, b: slice, i: slice) -> Tensor:
        """Rows i of the samples b, (b, i, M)."""
        abar = self._reduced(b, i)
        if self.head_reduction == "mean" and not self.inputs.row_normalize:
            abar = abar.mul_(1.0 / max(1, self.shape[1]))
        if self.inputs.row_normalize:
            abar = over_sums(abar)
        return abar

    def _reduced(self, b: slice, i: slice) -> Tensor:
        """Returns the tile before the division by the number of heads or by the rows' sums."""
        reduce, combine = _REDUCTIONS[self.head_reduction]
        abar: Tensor | None = None
        for _, prob, grad_prob in self._heads(b, i):
            tile = prob if grad_prob is None else prob.mul_(grad_prob).relu_()
            tile = tile[:, 0] if tile.shape[1] == 1 else reduce(tile, 1)
            abar = tile if abar is None else combine(abar, tile)
        if abar is None:  # no heads
            return self.inputs.query.new_zeros((b.stop - b.start, i.stop - i.start, self.shape[3]), dtype=self.dtype)
        return abar

    def _heads(self, b: slice, i: slice) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Slices of the heads with A and, for rule "gradient", dA, each (b, h, i, M)."""
        inputs, dtype = self.inputs, self.dtype
        for h in Tiling.of(self.inputs.query, *self.shape).heads():
            q, k, vector = self._operands(b, h, i)
            if inputs.score == "dot":
                tile = (q * inputs.scale) @ k.mT
            else:
                tile = score_tile(inputs.score, q, k, vector, inputs.parameter) * inputs.scale
            logits = self.masks.apply(tile, self.shape, b, h, i)
            lse = None if inputs.lse is None else inputs.lse[b, h, i].to(dtype)
            prob = probabilities(logits, dtype, lse)
            if lse is not None and differentiates() and forward_ad.unpack_dual(lse).tangent is None:
                total = prob.sum(-1, keepdim=True)  # its tangent is that of an lse which is computed from query and key
                prob = prob * (1 - (total - total.detach()))
            grad_prob = None
            if inputs.rule == "gradient":
                assert self.value is not None and inputs.grad_output is not None
                grad_prob = inputs.grad_output[b, h, i].to(dtype) @ self.value[b, h].to(dtype).mT
            yield h, prob, grad_prob

    def _operands(self, b: slice, h: slice, i: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        vector = None if self.vector is None else self.vector[h].to(self.dtype)
        return self.inputs.query[b, h, i].to(self.dtype), self.key[b, h].to(self.dtype), vector


class AbarGradients:
    """The gradients of query, key, value, grad_output, lse and row_bias from that of Abar, tile by tile.

    With w the gradient of a head's map E, that of A is w where E = A, w dA where E = A dA > 0; that of dA is w A there.
    `needs_lse`: A = exp(logit - lse) has a gradient by each; else an lse counts as computed from query and key, as everywhere.
    """

    def __init__(self, abar: Abar, needs_lse: bool) -> None:
        self.abar, inputs, by_gradient = abar, abar.inputs, abar.inputs.rule == "gradient"
        self.lse = torch.zeros(abar.shape[:3], dtype=abar.dtype, device=inputs.query.device) if needs_lse else None
        self.query = torch.zeros_like(inputs.query, dtype=abar.dtype, memory_format=torch.contiguous_format)
        self.key = abar.key.new_zeros(abar.key.shape, dtype=abar.dtype)
        self.row_bias = None if inputs.row_bias is None else torch.zeros_like(inputs.row_bias)
        self.value = self.grad_output = None
        if by_gradient:
            assert abar.value is not None and inputs.grad_output is not None
            self.value = abar.value.new_zeros(abar.value.shape, dtype=abar.dtype)
            self.grad_output = torch.zeros_like(inputs.grad_output, dtype=abar.dtype, memory_format=torch.contiguous_format)

    def add(self, b: slice, i: slice, grad: Tensor) -> None:
        """The part of the tile of rows i, whose gradient is `grad` (b, i, M)."""
        abar, inputs = self.abar, self.abar.inputs
        ranked = abar.head_reduction != "mean"
        reduced = abar._reduced(b, i) if ranked or inputs.row_normalize else grad
        if inputs.row_normalize:
            total = not_zero(reduced.sum(-1, keepdim=True))
            grad = (grad - (grad * reduced).sum(-1, keepdim=True) / total) / total  # a zero row has no gradient of its sum
        elif not ranked:
            grad = grad / max(1, abar.shape[1])
        if ranked:  # equal heads share it, as in torch.amax
            grad = grad / sum((_each(p, dp) == reduced[:, None]).sum(1) for _, p, dp in abar._heads(b, i))
        for h, prob, grad_prob in abar._heads(b, i):
            w = torch.where(_each(prob, grad_prob) == reduced[:, None], grad[:, None], 0.0) if ranked else grad[:, None]
            if grad_prob is not None:
                w = torch.where(prob * grad_prob > 0, w, 0.0)
                self._add_gradient(b, h, i, w * prob)
                w = w * grad_prob
            w = prob * w
            total = w.sum(-1, keepdim=True)
            if self.lse is None:
                w = w - prob * total
            else:
                self.lse[b, h, i] = -total[..., 0]
            if self.row_bias is not None:
                self.row_bias[b, h, i] = abar.masks.by_groups(w, b)
            w = w * inputs.scale
            by_query, by_key, _ = score_tile_backward(inputs.score, w, *abar._operands(b, h, i), inputs.parameter)
            self.query[b, h, i] += by_query
            self.key[b, h] += by_key

    def _add_gradient(self, b: slice, h: slice, i: slice, w: Tensor) -> None:
        """The part of dA = grad_output @ value^T, whose gradient is w."""
        abar = self.abar
        assert abar.value is not None and abar.inputs.grad_output is not None
        assert self.value is not None and self.grad_output is not None
        self.grad_output[b, h, i] += w @ abar.value[b, h].to(abar.dtype)
        self.value[b, h] += w.mT @ abar.inputs.grad_output[b, h, i].to(abar.dtype)

    def result(self) -> tuple[Tensor | None, ...]:
        """Those of query, key, value, grad_output, lse and row_bias, in their dtypes; None for those without one."""
        names = ("query", "key", "value", "grad_output", "lse", "row_bias")
        pairs = ((getattr(self, name), getattr(self.abar.inputs, name)) for name in names)
        return tuple(None if grad is None else fold_heads(grad, x.shape[1]).to(x.dtype) for grad, x in pairs)


def _each(prob: Tensor, grad_prob: Tensor | None) -> Tensor:
    """The map of each head."""
    return prob if grad_prob is None else (prob * grad_prob).relu_()


def second_of(backward: Callable[[Any], Any], inputs: Any, kind: Any, fields: Sequence[str]) -> tuple[Tensor | None, ...]:
    """The tangents of the gradients of all `fields` by a backward pass, which gives None for a gradient that it leaves out."""
    asked = {"need_relevancy": True, "need_inputs": True, "need_lse": inputs.lse_tangent is not None}
    asked = {field: need for field, need in asked.items() if field in kind._fields}
    made = tangents_of(lambda x: backward(x._replace(**asked)), inputs, kind, fields)
    given = [getattr(inputs, field) for field in fields]
    return tuple([torch.zeros_like(x) if y is None and x is not None else y for x, y in zip(given, made, strict=True)])
