"""The map of a word without the maps of earlier words, and a filter against outliers (Li et al. 2025, arXiv 2506.23270)."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_bool
from vlattn_fast.interpret.result.numbers.explained import Explained

E = TypeVar("E", bound=Explained)


def rest_of_map(values: Tensor, earlier: Tensor, weights: Tensor) -> Tensor:
    """max(M - a I, 0) of a map M (n), with I the mean of the maps of earlier words (E, n) with `weights` (E), not negative.
    a minimises the square of M - a I."""
    interference = weights / (weights.sum() + 1e-8) @ earlier
    square = interference @ interference
    scale = (values @ interference) / square if square > 0 else 0.0
    return (values - scale * interference).clamp(min=0)


def rank_filtered(maps: Tensor, size: int = 3) -> Tensor:
    """Maps (..., h, w), each number replaced by a mean of the `size` * `size` numbers around it in the order of their size.

    The weights of the mean are a Gaussian over the ranks, around the rank of the median; its width is the standard deviation of
    the numbers divided by their mean. Numbers that are all equal stay; if the mean is not above zero, the result is zero. Edges
    are mirrored, and repeated if a map is too narrow for that.
    """
    height, width = maps.shape[-2:]
    flat, pad = maps.reshape(-1, 1, height, width), size // 2
    for sides, length in (((pad, pad, 0, 0), width), ((0, 0, pad, pad), height)):
        flat = nn.functional.pad(flat, sides, mode="reflect" if length > pad else "replicate")
    around = nn.functional.unfold(flat, size).sort(dim=1).values  # (maps, size * size, h * w)
    mean, deviation = around.mean(1, keepdim=True), around.std(1, keepdim=True, correction=0)
    ranks = torch.arange(size * size, dtype=maps.dtype, device=maps.device)[None, :, None] - size * size // 2
    equal = deviation <= 1e-12 * mean.abs()
    widths = torch.where(equal | (mean <= 0), 1.0, deviation / mean)
    weights = (-(ranks**2) / (2 * widths**2)).exp()
    result = (around * weights).sum(1) / weights.sum(1)
    result = torch.where(equal[:, 0], around[:, size * size // 2], result)
    return torch.where(mean[:, 0] > 0, result, 0.0).reshape(maps.shape)


def with_filtered_image(explanation: E) -> E:
    """A copy with the maps of the image filtered."""
    image = explanation.image
    if image is None or len(image) == 0:
        return explanation
    return replace(explanation, image=tuple(map(rank_filtered, image)) if isinstance(image, tuple) else rank_filtered(image))


def subtract_earlier(explanation: E, rank_filter: bool) -> E:
    """See `Explanation.subtract_earlier`."""
    check_bool(rank_filter=rank_filter)
    if not explanation.per_token or explanation.answer is None:
        raise ValueError("subtract_earlier needs an answer explained per token, as explain(..., answer=...) gives it; got none")
    if explanation.image is None or explanation.image_samples is None:
        raise ValueError("subtract_earlier needs maps of an image; got an explanation without")
    if explanation.text_positions is None:
        raise ValueError("subtract_earlier needs the text_positions of the answer's tokens, as explain sets them; got None")
    row_of = next(iter(explanation.relevancy.values()))
    parts = []
    for maps, sample in zip(explanation.image, explanation.image_samples, strict=True):
        ids = explanation.answer[sample]
        positions = torch.tensor(explanation.text_positions[sample][-len(ids) :], device=row_of.device)
        weights, flat = row_of[sample][:, positions].clamp(min=0).to(maps), maps.flatten(1)
        left = torch.zeros_like(flat)
        for number, token in enumerate(ids):
            earlier = [before for before in range(number) if ids[before] != token]
            left[number] = flat[number].clamp(min=0)
            if earlier:
                left[number] = rest_of_map(left[number], flat[earlier].clamp(min=0), weights[number, earlier])
        parts.append(left.view_as(maps))
    image = tuple(parts) if isinstance(explanation.image, tuple) else torch.stack(parts) if parts else explanation.image
    without_earlier = replace(explanation, image=image)
    return with_filtered_image(without_earlier) if rank_filter else without_earlier
