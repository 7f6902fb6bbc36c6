"""The grid of models without a listed adapter, derived from names that many configs and inputs share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vlattn_fast.interpret.adapters.image_grids import (
    Layout,
    anyres,
    frames,
    image_tokens,
    in_order,
    merged_shapes,
    whole,
    with_thumbnails,
)
from vlattn_fast.interpret.adapters.pixels import Shape

# The side of the square of patches that one token stands for, and the share of a side that is left.
_SIDES = ("spatial_merge_size", "merge_size", "downsample_factor", "scale_factor", "pixel_shuffle_factor", "pooling_kernel_size")
_SHARES = ("downsample_ratio", "pixel_shuffle_ratio")


def derived(config: Any, inputs: Mapping[str, Any]) -> list[Layout] | None:
    """The images of a model without a listed adapter, if config and inputs give their grids and the tokens add up; else None."""
    for rule in (_by_frames, _by_tiles, _by_pixels):
        layouts = rule(config, inputs)
        if layouts is not None:
            fits = sum(layout.size for layout in layouts) == int(image_tokens(config, inputs).sum())
            return layouts if fits else None
    return None


def _by_frames(config: Any, inputs: Mapping[str, Any]) -> list[Layout] | None:
    """By `image_grid_thw` and the side of a square of patches."""
    grids = [inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")]
    if all(grid is None for grid in grids):
        return None
    side = next((size for size in _sides(config) if size > 1), 1)
    kinds = ([] if grid is None else grid.tolist() for grid in grids)
    return in_order(config, inputs, *([frames(t, (h // side, w // side)) for t, h, w in kind] for kind in kinds))


def _by_tiles(config: Any, inputs: Mapping[str, Any]) -> list[Layout] | None:
    """By `image_sizes` and the grids of tiles that the config lists."""
    named = all(getattr(config, name, None) is not None for name in ("image_grid_pinpoints", "vision_config"))
    vision = getattr(config, "vision_config", None)
    if not named or inputs.get("image_sizes") is None or not isinstance(getattr(vision, "image_size", None), int):
        return None
    return anyres(config, inputs)


def _by_pixels(config: Any, inputs: Mapping[str, Any]) -> list[Layout] | None:
    """One token for a patch, or for a square of patches whose side the config names; images of one size or in `image_sizes`."""
    pixels, vision = inputs.get("pixel_values"), getattr(config, "vision_config", None)
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or getattr(vision, "patch_size", None) is None or not len(pixels):
        return None
    count = int(image_tokens(config, inputs).sum())
    shapes = merged_shapes(config, inputs, 1)
    for before in (0, 1):  # some vision towers put their CLS token first
        if count == sum(before + math.prod(shape) for shape in shapes):
            return _images(config, inputs, shapes, before)
    for side in _sides(config):
        merged = [(height // side, width // side) for height, width in shapes]
        if count == sum(math.prod(shape) for shape in merged):
            return _images(config, inputs, merged)
    return None


def _images(config: Any, inputs: Mapping[str, Any], shapes: Sequence[Shape], before: int = 0) -> list[Layout]:
    """Images of these shapes, some of which may be crops of one photo if all have one shape."""
    alike = len(set(shapes)) == 1 and inputs.get("image_sizes") is None
    return with_thumbnails(config, inputs, shapes[0], before) if alike else [whole(shape, before) for shape in shapes]


def _sides(config: Any) -> list[int]:
    """Sides of the square of patches that config or vision config name."""
    parts = [part for part in (config, getattr(config, "vision_config", None)) if part is not None]
    sides = [getattr(part, name, None) for part in parts for name in _SIDES]
    sides += [round(1 / share) for part in parts for name in _SHARES if (share := getattr(part, name, None))]
    return [side for side in sides if isinstance(side, int) and side > 0]
