"""The scores of attention that a module writes out by hand, from the product of queries and keys to the softmax."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_CASTS = ("float", "to", "type", "type_as", "contiguous")
_MASKED = -1e4  # models mask with this or less, where every weight is 0


class WrittenScores:
    """One product of queries and keys, with the module's scale, softcap and mask.

    query: (B, H, N, D). transposed_key: (B, H, D, M). shape: of the scores.
    """

    def __init__(self, query: Tensor, transposed_key: Tensor, scores: Tensor) -> None:
        self.query, self.transposed_key, self.shape = query, transposed_key, scores.shape
        self._scores: Callable[[], Tensor | None] = weakref.ref(scores)
        self._scale = 1.0  # of the product
        self._cap: float | None = None  # of its tanh; None = none is taken
        self._mask: Tensor | None = None

    def masks(self, scores: Tensor) -> Mapping[str, Any] | None:
        """attn_mask, is_causal, scale and softcap, if there is one, of `scores` in front of the softmax; None where another
        operation changed the scores."""
        if self._scores() is not scores:
            return None
        masks = {"attn_mask": self._mask, "is_causal": False, "scale": self._scale}
        if self._cap is None:
            return masks
        # cap * tanh(scale * product) is a softcap of the product times cap * scale. One that is not above 0 is none.
        return {**masks, "scale": self._cap * self._scale, "softcap": self._cap} if self._cap > 0 else None

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Goes on from the scores to `result` where `func` scales, caps, masks or casts them; stops after another operation."""
        scores = self._scores()
        if scores is None or all(x is not scores for x in args):
            return
        name = getattr(func, "__name__", "").rstrip("_")
        operand = None if len(args) < 2 else args[1] if args[0] is scores else args[0]
        if name in _CASTS or (not kwargs and self._takes(name, args, operand, scores)):
            self._scores = weakref.ref(result)
        elif result is None or result is scores:
            self._scores = lambda: None

    def _takes(self, name: str, args: Sequence[Any], operand: Any, scores: Tensor) -> bool:
        """Keeps a scale, a softcap or a mask; whether the operation is one."""
        if name == "tanh" and self._cap is None and self._mask is None:
            self._cap = 1.0
            return True
        if name == "mul" or (name == "div" and args[0] is scores):
            if self._mask is not None or not _is_number(operand):
                return False
            factor = float(operand) if name == "mul" else 1 / float(operand)
            if self._cap is None:
                self._scale *= factor
            else:
                self._cap *= factor
            return True
        if name == "add" and isinstance(operand, Tensor) and operand.is_floating_point():
            self._mask = joined(self._mask, operand)
            return True
        if name == "masked_fill" and _is_number(args[2]) and float(args[2]) <= _MASKED:
            self._mask = joined(self._mask, ~args[1])
            return True
        return False


def is_masked_score(scores: Tensor) -> Tensor:
    """bool, True where a mask that was added to finished scores hides a key."""
    return scores <= _MASKED / 2  # it may be added to a positive score


def is_masked(mask: Tensor) -> Tensor:
    """bool, of the mask's shape: True where a query does not see a key."""
    return ~mask if mask.dtype == torch.bool else mask <= _MASKED


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) or (isinstance(x, Tensor) and x.ndim == 0 and not x.requires_grad)


def joined(first: Tensor | None, second: Tensor) -> Tensor:
    """Two masks as one: bool where both are bool."""
    if first is None:
        return second
    if first.dtype != torch.bool and second.dtype != torch.bool:
        return first + second
    if first.dtype == second.dtype:
        return first & second
    visible, added = (first, second) if first.dtype == torch.bool else (second, first)
    return torch.where(visible, added, -torch.inf)
