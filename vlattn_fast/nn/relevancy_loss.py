"""Losses on relevancy vectors: that relevancy lies inside of a mask, or agrees with another relevancy vector."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import (
    check_bool,
    check_choice,
    check_device,
    check_floating,
    check_integer,
    check_number,
    check_tensor,
    describe,
)

KINDS = ("inside", "mse", "cosine")
_MOST_BEFORE = 5  # largest number of tokens before the patches that is tried without `prefix`


class RelevancyLoss(nn.Module):
    """Computes a loss from relevancy vectors (B, N), which `capture_relevancy` gives, and a mask or another relevancy vector.

    Returns a scalar, the mean over the batch, with a gradient in the relevancy. Cost and memory are O(B N).

    Examples:
        >>> import torch, vlattn_fast as va
        >>> relevancy, mask = torch.rand(2, 17), torch.rand(2, 8, 8) > 0.5
        >>> va.nn.RelevancyLoss("inside", prefix=1)(relevancy, mask).shape
        torch.Size([])

    The kinds, for relevancy r and mask m:

    - "inside": the share of the relevancy outside of the mask, sum_i r_i (1 - m_i) / sum_i r_i. A vector of zeros counts 0.
    - "mse": the mean of w_i (s_i - m_i)^2, s = r scaled to [0, 1] by its least and largest entry; w_i = foreground m_i +
      background (1 - m_i). RobustViT (Chefer et al., NeurIPS 2022) trains with foreground=0.3 and background=2, and takes 0.8
      times this loss and 0.2 times the cross-entropy.
    - "cosine": 1 - cos(r, m), for another relevancy vector, such as that of a teacher or of an earlier state of the model.

    A mask is bool or from 0 to 1, (B, N) over all tokens, or (B, h, w) over the image, whose patches come after `prefix` tokens.
    A mask with another grid than the patches is resized by areas. Without `prefix`, the number of tokens before the patches must
    follow from the sizes: N - h w up to 5, else the only number up to 5 that leaves a grid of the mask's shape.

    Args:
        kind: "inside", "mse" or "cosine".
        prefix: tokens before the patches, such as CLS and registers; they have no part in the loss. Default: (B, N) masks cover
            all tokens.
        foreground, background: the weights of "mse" where the mask is one, and where it is zero.
        scaled: for "mse": scale each vector to [0, 1]. False = raw relevancy, for a target in its units.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it).
    """

    def __init__(
        self,
        kind: str = "inside",
        *,
        foreground: float = 1.0,
        background: float = 1.0,
        scaled: bool = True,
        prefix: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, KINDS)
        check_number("foreground", foreground, low=0.0)
        check_number("background", background, low=0.0)
        check_bool(scaled=scaled)
        if kind != "mse" and (foreground, background, scaled) != (1.0, 1.0, True):
            raise ValueError(f"foreground, background and scaled must be left out for kind {kind!r}; they are options of 'mse'")
        if prefix is not None:
            check_integer("prefix", prefix, low=0)
        self.kind, self.foreground, self.background = kind, foreground, background
        self.scaled, self.prefix = scaled, prefix

    def extra_repr(self) -> str:
        return f"{self.kind!r}, prefix={self.prefix}"

    def forward(self, relevancy: Tensor, target: Tensor) -> Tensor:
        row, target = self._alike(relevancy, target)
        if self.kind == "inside":
            total = row.sum(1)
            outside = (row * (1 - target)).sum(1)
            return _mean(torch.where(total == 0, 0.0, outside / total.masked_fill(total == 0, 1.0)))
        if self.kind == "cosine":
            return _mean(1 - nn.functional.cosine_similarity(row, target, 1))
        if self.scaled:
            least, largest = row.amin(1, keepdim=True), row.amax(1, keepdim=True)
            row = (row - least) / (largest - least).masked_fill(largest == least, 1.0)
        weight = self.foreground * target + self.background * (1 - target)
        return _mean(weight * (row - target).square())

    def _alike(self, relevancy: Any, target: Any) -> tuple[Tensor, Tensor]:
        """Returns relevancy and target (B, N) over the same tokens, without those before the patches."""
        check_tensor("relevancy", relevancy, rank=2, shape="(B, N)")
        check_floating(relevancy=relevancy)
        check_tensor("target", target)
        check_device("target", target, "relevancy", relevancy)
        (batch, tokens), prefix = relevancy.shape, self.prefix
        if prefix is not None and prefix >= tokens:
            raise ValueError(f"prefix must be less than relevancy's {tokens} tokens; got {prefix}")
        if target.ndim not in (2, 3) or len(target) != batch or (target.ndim == 2 and target.shape[1] != tokens):
            raise ValueError(
                f"target must have shape (B, N) = {(batch, tokens)}, or (B, h, w) with B={batch}; got {describe(target)}"
            )
        if target.dtype != torch.bool and not target.is_floating_point():
            raise TypeError(f"target must be bool or floating; got {describe(target)}")
        target = target.to(relevancy.dtype)
        if (self.kind == "inside" or (self.kind == "mse" and self.scaled)) and bool(((target < 0) | (target > 1)).any()):
            raise ValueError(
                f"target must be from 0 to 1 for kind {self.kind!r}; got {target.min().item():g} to {target.max().item():g}. "
                "kind='cosine', and kind='mse' with scaled=False, take a target in relevancy's units"
            )
        if target.ndim == 2:
            return relevancy[:, prefix or 0 :], target[:, prefix or 0 :]
        prefix, grid = _grid(tokens, target.shape[1], target.shape[2], prefix)
        if target.shape[1:] != grid:
            target = nn.functional.interpolate(target[:, None], grid, mode="area")[:, 0]
        return relevancy[:, prefix:], target.flatten(1)


def _mean(losses: Tensor) -> Tensor:
    """Returns the mean, and 0 for a batch without a sample."""
    return losses.mean() if losses.numel() else losses.sum()


def _grid(tokens: int, height: int, width: int, prefix: int | None) -> tuple[int, tuple[int, int]]:
    """Returns the number of tokens before the patches, and the patches' rows and columns, in the shape of a mask (height,
    width)."""
    several = range(_MOST_BEFORE + 1) if prefix is None else (prefix,)
    common = math.gcd(height, width) or 1
    rows, columns = height // common, width // common
    if tokens - height * width in several:
        return tokens - height * width, (height, width)
    sides = {before: math.isqrt(max(0, tokens - before) // max(1, rows * columns)) for before in several}
    fitting = [before for before, side in sides.items() if side and side**2 * rows * columns == tokens - before]
    if len(fitting) != 1:
        may = " or ".join(f"{rows * sides[before]} x {columns * sides[before]} after {before}" for before in fitting) or "none"
        raise ValueError(
            f"target (B, {height}, {width}) must fit the patches of relevancy, which has {tokens} tokens; got {may}. Pass "
            "prefix=, the number of tokens before the patches, or a mask (B, N)"
        )
    side = sides[fitting[0]]
    return fitting[0], (rows * side, columns * side)
