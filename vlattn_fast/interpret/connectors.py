"""From the image tokens of a decoder back into the vision tower behind its connector.

A connector makes an image token of one patch, or of a square of neighbouring ones. The relevancy of an image token is divided
equally among the patches it was made of, so that its sum stays. The backward pass then goes on through the vision tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.interpret.grids import Shape, image_tokens, patch_shape
from vlattn_fast.interpret.towers import TowerTrace


def connect(vision: TowerTrace, language: TowerTrace, config: Any, arguments: Mapping[str, Any]) -> None:
    """Let the relevancy of `language`'s image tokens go on into `vision`, which runs before it."""

    def below(like: Tensor) -> Tensor:
        leaving = vision.leaving()
        fed = patches_of_tokens(vision.shape, grid_of(config, arguments), int(image_tokens(config, arguments).sum()))
        real = (fed >= 0).flatten()
        shares = 1 / fed.flatten()[real].bincount().to(leaving)
        tokens = fed.flatten()[real].to(leaving.device)
        given = leaving.new_zeros(len(shares)).index_add(0, tokens, leaving.flatten()[real.to(leaving.device)]) * shares
        places = image_tokens(config, arguments).flatten().nonzero()[:, 0].to(like.device)
        return torch.zeros_like(like).flatten().index_copy(0, places, given.to(like)).view_as(like)

    language.below = below


def grid_of(config: Any, arguments: Mapping[str, Any]) -> Shape:
    """(H, W) of the patches of an image of the vision tower."""
    return patch_shape(config.vision_config, arguments["pixel_values"].shape[-2:])


def patches_of_tokens(shape: tuple[int, int], grid: Shape, tokens: int) -> Tensor:
    """int64 (images, N): the image token, counted through all prompts, that each token of the vision tower is part of; -1 = none.

    Args:
        shape: (images, N) of the vision tower.
        grid: (H, W) of its patches; tokens in front of them (CLS) may be image tokens, too, or are left out.
        tokens: the image tokens of all prompts.

    Raises:
        ValueError: the tokens are no equal squares of the patches.
    """
    (images, size), (height, width) = shape, grid
    each, before = tokens // max(images, 1), size - height * width
    merged = round((height * width / each) ** 0.5) if each else 1
    if each == size:  # CLS is an image token, too
        return torch.arange(images * size).view(images, size)
    alike = each * images == tokens and before >= 0
    if not alike or height % merged or width % merged or each * merged**2 != height * width:
        raise ValueError(
            f"through_connector must be off where image tokens are no squares of patches; got {tokens} tokens for {images} "
            f"images of {height} x {width} patches"
        )
    rows, columns = torch.arange(height) // merged, torch.arange(width) // merged
    square = rows[:, None] * (width // merged) + columns
    numbers = torch.full((images, size), -1)
    numbers[:, before:] = square.flatten() + each * torch.arange(images)[:, None]
    return numbers
