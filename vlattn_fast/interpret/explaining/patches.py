"""How the patches of an image lie among the tokens of a tower that no adapter describes. `patches` is what the caller says; if it
is None, they are derived."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vlattn_fast._ground.checks import describe
from vlattn_fast.interpret.adapters.image_grids import is_ids, only_picture, square_patches
from vlattn_fast.interpret.adapters.patch_grid import PatchGrid
from vlattn_fast.interpret.adapters.pixels import Shape
from vlattn_fast.interpret.adapters.tokens import Patches
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace


def check_patches(patches: Any) -> PatchGrid | None:
    """The argument of this name; TypeError unless it is None or a `PatchGrid`."""
    if patches is not None and not isinstance(patches, PatchGrid):
        raise TypeError(f"patches must be a va.PatchGrid(rows, columns, prefix=0); got {describe(patches)}")
    return patches


def patch_maps(
    patches: PatchGrid | None, towers: Sequence[TowerTrace], inputs: Mapping[str, Any], relevancy: Mapping[str, Tensor]
) -> tuple[str, dict[str, Any]]:
    """The first tower that has such a grid, and fields of an Explanation with its patches, from rows (B, N) or (B, T, N).
    ValueError where the caller asks for a grid, and no tower has it."""
    free = [tower for tower in towers if tower.entry is None or (patches is not None and tower.entry.kind is Patches)]
    if patches is None:  # towers of ids are none of the picture
        texts = {name: tuple(value.shape) for name, value in inputs.items() if is_ids(value)}
        of_text = [tower for tower in free if tower.shape in texts.values()]
        shapes = {tower.shape for tower in of_text}
        inputs = {name: value for name, value in inputs.items() if texts.get(name) not in shapes}
        free = [tower for tower in free if tower not in of_text]
    for tower in free:
        if tower.grid is not None:
            if (picture := _of_pixels(patches, relevancy[tower.name], tower)) is not None:
                return tower.name, {"image": picture, "image_samples": list(range(len(picture)))}
        elif (grid := _grid_of(patches, tower.size, inputs)) is not None:
            before, (height, width) = grid
            row = relevancy[tower.name]
            maps = row[..., before : before + height * width].reshape(*row.shape[:-1], height, width)
            return tower.name, {"image": maps, "image_samples": list(range(len(row)))}
    if patches is not None:
        sizes = ", ".join(f"'{tower.name}' of {tower.size} tokens" for tower in free)
        raise ValueError(
            f"patches must fit a tower that is read, which has prefix + rows * columns tokens; got {patches} for "
            f"{sizes or 'towers whose adapter says how their tokens lie'}{_fitting(patches, free)}"
        )
    return "", {}


def grid_of_pixels(patches: PatchGrid | None, tower: TowerTrace) -> Shape:
    """Rows and columns of the patches in a tower of pixels. ValueError where nothing tells, or the caller's do not fit."""
    pixels, shape = tower.grid, (patches.shape if patches is not None else None) or tower.patches
    if pixels is None or shape is None or pixels[0] % shape[0] or pixels[1] % shape[1]:
        raise ValueError(
            f"patches must be a va.PatchGrid(rows, columns) that divides the {pixels} pixels of '{tower.name}'; got "
            f"{shape if patches is None else patches}"
        )
    return shape


def _of_pixels(patches: PatchGrid | None, row: Tensor, tower: TowerTrace) -> Tensor | None:
    """A map of the sums over the patches that the caller asks for, or that the model cuts the picture into, else of pixels; None
    where these do not fit."""
    pixels = tower.grid or (1, 1)
    height, width = (patches.shape if patches is not None else None) or tower.patches or pixels
    if (patches is not None and patches.prefix) or pixels[0] % height or pixels[1] % width:
        return None
    squares = row.reshape(*row.shape[:-1], height, pixels[0] // height, width, pixels[1] // width)
    return squares.sum((-3, -1))


def _grid_of(patches: PatchGrid | None, count: int, inputs: Mapping[str, Any]) -> tuple[int, Shape] | None:
    """The tokens in front of the patches and their grid, in a tower of `count` tokens; None where that is not known."""
    if patches is not None and (shape := patches.shape) is not None:
        return (patches.prefix, shape) if count == patches.prefix + math.prod(shape) else None
    if (picture := only_picture(inputs)) is not None:
        return square_patches(count, picture.shape[-2:], None if patches is None else patches.prefix)
    side = 0 if patches is None else math.isqrt(max(0, count - patches.prefix))
    return (patches.prefix, (side, side)) if patches is not None and side and side**2 == count - patches.prefix else None


def _fitting(patches: PatchGrid, towers: Sequence[TowerTrace]) -> str:
    """The prefix that makes the caller's grid fit."""
    before = [tower.size - math.prod(patches.shape) for tower in towers if patches.shape is not None and tower.grid is None]
    return f". prefix={min(fits)} would fit" if (fits := [count for count in before if count >= 0]) else ""
