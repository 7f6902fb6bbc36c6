"""How the patches of a picture lie among the tokens of a tower that no record describes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlattn_fast._ground.checks import check_integer, describe
from vlattn_fast.interpret.records.image_grids import is_ids, only_picture, square_patches
from vlattn_fast.interpret.records.pixels import Shape
from vlattn_fast.interpret.records.tokens import Patches
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace


@dataclass(frozen=True)
class PatchGrid:
    """The arguments `grid` and `prefix` of `explain`, checked."""

    shape: Shape | None = None  # rows and columns of patches
    prefix: int | None = None  # tokens in front of them

    @classmethod
    def check(cls, grid: Any, prefix: Any) -> PatchGrid:
        if grid is not None:
            if not isinstance(grid, (tuple, list)) or len(grid) != 2:
                raise TypeError(f"grid must be two ints (h, w), rows and columns of patches; got {describe(grid)}")
            for size in grid:
                check_integer("grid", size, low=1)
        if prefix is not None:
            check_integer("prefix", prefix, low=0)
        return cls(None if grid is None else (grid[0], grid[1]), prefix)

    @property
    def asked(self) -> bool:
        return self.shape is not None or self.prefix is not None

    def maps(
        self, towers: Sequence[TowerTrace], inputs: Mapping[str, Any], relevancy: Mapping[str, Tensor]
    ) -> tuple[str, dict[str, Any]]:
        """The first tower that has such a grid, and fields of an Explanation with its patches, from rows (B, N) or (B, T, N).
        ValueError where the caller asks for a grid, and no tower has it."""
        free = [tower for tower in towers if tower.record is None or (self.asked and tower.record.kind is Patches)]
        if not self.asked:  # towers of ids are none of the picture
            texts = {name: tuple(value.shape) for name, value in inputs.items() if is_ids(value)}
            of_text = [tower for tower in free if tower.shape in texts.values()]
            shapes = {tower.shape for tower in of_text}
            inputs = {name: value for name, value in inputs.items() if texts.get(name) not in shapes}
            free = [tower for tower in free if tower not in of_text]
        for tower in free:
            if tower.grid is not None:
                if (picture := self._of_pixels(relevancy[tower.name], tower)) is not None:
                    return tower.name, {"image": picture, "image_rows": list(range(len(picture)))}
            elif (grid := self._in(tower.size, inputs)) is not None:
                before, (height, width) = grid
                row = relevancy[tower.name]
                patches = row[..., before : before + height * width]
                maps = patches.reshape(*row.shape[:-1], height, width)
                return tower.name, {"image": maps, "image_rows": list(range(len(row)))}
        if self.asked:
            sizes = ", ".join(f"'{tower.name}' of {tower.size} tokens" for tower in free)
            raise ValueError(
                f"grid and prefix must fit a tower that is read, which has prefix + h * w tokens; got grid={self.shape} and "
                f"prefix={self.prefix} for {sizes or 'towers whose record says how their tokens lie'}"
            )
        return "", {}

    def grid_of_pixels(self, tower: TowerTrace) -> Shape:
        """Rows and columns of the patches in a tower of pixels. ValueError where nothing tells, or the caller's do not fit."""
        pixels, shape = tower.grid, self.shape or tower.patches
        if pixels is None or shape is None or pixels[0] % shape[0] or pixels[1] % shape[1]:
            raise ValueError(
                f"grid must be rows and columns (h, w) of patches that divide the {pixels} pixels of '{tower.name}'; got {shape}"
            )
        return shape

    def _of_pixels(self, row: Tensor, tower: TowerTrace) -> Tensor | None:
        """A map of the sums over the patches that the caller asks for, or that the model cuts the picture into, else of pixels;
        None where these do not fit."""
        pixels = tower.grid or (1, 1)
        height, width = self.shape or tower.patches or pixels
        if self.prefix or pixels[0] % height or pixels[1] % width:
            return None
        patches = row.reshape(*row.shape[:-1], height, pixels[0] // height, width, pixels[1] // width)
        return patches.sum((-3, -1))

    def _in(self, count: int, inputs: Mapping[str, Any]) -> tuple[int, Shape] | None:
        """The tokens in front of the patches and their grid, in a tower of `count` tokens; None where that is not known."""
        if self.shape is not None:
            before = count - math.prod(self.shape)
            return (before, self.shape) if before >= 0 and self.prefix in (None, before) else None
        if (picture := only_picture(inputs)) is not None:
            return square_patches(count, picture.shape[-2:], self.prefix)
        side = 0 if self.prefix is None else math.isqrt(max(0, count - self.prefix))
        return (self.prefix, (side, side)) if self.prefix is not None and side and side**2 == count - self.prefix else None
