"""One tile of Abar, the map A or relu(A * dA) reduced over the heads, and the way back through it, for relevancy and attention
maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vlattn_fast._ground.tensors import expand_heads, over_sums
from vlattn_fast.backends.inputs import (
    AttentionMapBackwardInputs,
    AttentionMapInputs,
    RelevancyStepBackwardInputs,
    RelevancyStepInputs,
)
from vlattn_fast.backends.streaming._forward_mode import Named, differentiates, gradients
from vlattn_fast.backends.streaming._scores import Logits, Sums, Tile
from vlattn_fast.backends.streaming._tiles import Tiling, probabilities

Inputs = AttentionMapInputs | AttentionMapBackwardInputs | RelevancyStepInputs | RelevancyStepBackwardInputs
# of heads in a tile, and of tiles
_REDUCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "mean": (torch.sum, Tensor.add_),
    "max": (torch.amax, torch.maximum),
    "min": (torch.amin, torch.minimum),
}


class Abar:
    """Abar of a call, tile by tile.

    rule "attention": A; "gradient": relu(A * dA), dA = grad_output @ value^T. row_normalize divides each row by its sum; a zero
    row stays zero. lse as in `probabilities`.
    """

    def __init__(self, inputs: Inputs, head_reduction: str = "mean") -> None:
        self.inputs, self.head_reduction, self.logits = inputs, head_reduction, Logits(inputs.attention)
        self.value = None if inputs.value is None else expand_heads(inputs.value, inputs.attention.query.shape[1])
        self.shape, self.dtype = self.logits.shape, self.logits.dtype

    def tile(self, b: slice, i: slice) -> Tensor:
        """Rows i of the samples b, (b, i, M)."""
        return self._divided(self._reduced(b, i))

    def _divided(self, abar: Tensor) -> Tensor:
        if self.inputs.row_normalize:
            return over_sums(abar)
        return abar / max(1, self.shape[1]) if self.head_reduction == "mean" else abar

    def _reduced(self, b: slice, i: slice) -> Tensor:
        """Returns the tile before the division by the number of heads or by the rows' sums."""
        reduce, combine = _REDUCTIONS[self.head_reduction]
        abar: Tensor | None = None
        for part in self._maps(b, i):
            tile = part[:, 0] if part.shape[1] == 1 else reduce(part, 1)
            abar = tile if abar is None else combine(abar, tile)
        if abar is None:  # no heads
            return self.logits.key.new_zeros((b.stop - b.start, i.stop - i.start, self.shape[3]), dtype=self.dtype)
        return abar

    def _maps(self, b: slice, i: slice) -> Iterator[Tensor]:
        """The maps of the heads, some at a time, (b, h, i, M)."""
        return (self._map(self.logits.of(tile), False, **self._others(tile)) for tile in self._tiles(b, i))

    def _tiles(self, b: slice, i: slice) -> Iterator[Tile]:
        return ((b, h, i) for h in Tiling.of(self.logits.key, *self.shape).heads())

    def _others(self, tile: Tile) -> Named:
        """What a map of `tile` is made of beside the logits."""
        others = {} if self.inputs.lse is None else {"lse": self.inputs.lse[tile].to(self.dtype)}
        if self.inputs.rule == "gradient":
            assert self.value is not None and self.inputs.grad_output is not None
            others["value"] = self.value[tile[:2]].to(self.dtype)
            others["grad_output"] = self.inputs.grad_output[tile].to(self.dtype)
        return others

    def _map(
        self,
        logits: Tensor,
        by_lse: bool,
        lse: Tensor | None = None,
        value: Tensor | None = None,
        grad_output: Tensor | None = None,
    ) -> Tensor:
        """by_lse: lse has a gradient of its own. That it requires one says nothing: a caller's graph may hold it."""
        prob = probabilities(logits, self.dtype, lse)
        has_tangent = lse is not None and differentiates() and forward_ad.unpack_dual(lse).tangent is not None
        if lse is not None and not (by_lse or has_tangent) and (prob.requires_grad or differentiates()):
            total = prob.sum(-1, keepdim=True)  # whose derivatives are those of an lse that is computed from query and key
            prob = prob / (1 + (total - total.detach()))
        return prob if value is None or grad_output is None else (grad_output @ value.mT).mul(prob).relu_()

    def sums(self, needs_lse: bool) -> Sums:
        """Those of query, key, value, grad_output, lse and row_bias. Without one for lse, that counts as computed from query and
        key, as everywhere."""
        inputs = self.inputs if needs_lse else self.inputs._replace(lse=None)
        if inputs.rule == "attention":  # which uses neither
            inputs = inputs._replace(value=None, grad_output=None)
        return Sums(inputs, "query", "key", "value", "grad_output", "lse", "row_bias")

    def add_gradients(self, sums: Sums, b: slice, i: slice, grad: Tensor) -> None:
        """Adds those of the product of rows i with `grad` (b, i, M)."""
        ranked = self.head_reduction != "mean"
        reduced = self._reduced(b, i) if ranked or self.inputs.row_normalize else grad
        grad = gradients(lambda x: [self._divided(x["abar"])], {"abar": reduced}, [grad])["abar"][:, None]
        if ranked:  # equal heads share it, as in torch.amax
            grad = grad / sum((part == reduced[:, None]).sum(1, keepdim=True) for part in self._maps(b, i))

        def maps(logits: Tensor, **others: Tensor) -> tuple[Tensor]:
            part = self._map(logits, "lse" in sums, **others)
            return (torch.where(part == reduced[:, None], part, 0.0) if ranked else part,)

        for tile in self._tiles(b, i):
            self.logits.add_gradients(sums, tile, maps, self._others(tile), [grad])
