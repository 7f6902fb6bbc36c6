"""What only pixels tell: which images are of one photo, how its crops lie in it, and which part of them is padding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, int]
Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)

_CELLS = 32  # a side of a crop has so many cells at most when it is compared with the thumbnail
_SMALL = 480  # pixels a side are enough for that
_MOST = 41  # images of one photo
_ALIKE = 0.25  # of the thumbnail's variance: what scaling changes is less, other positions of the crops give more
_LEAST_VARIANCE = 0.03  # of the variance is kept when an image is scaled down, or its pattern is too fine
_CLEARLY = 3.0  # times the error: so much more has the second-best grid


@dataclass(frozen=True)
class Photo:
    """Consecutive images of a prompt that show one photo."""

    count: int  # of images
    grid: Shape | None = None  # rows and columns of crops with a thumbnail; None = one image without crops
    first: bool = False  # the thumbnail is before the crops


def photos_in(images: Tensor, first: bool | None, one: bool) -> list[Photo]:
    """The photos that images (n, C, H, W) of a prompt show; with `one` all show the same, or nothing tells.

    Crops of one photo, row by row, have a thumbnail after or before them (`first`; None = either): in exactly one grid they
    are the thumbnail when they are scaled down. An image that is not a part of such a group is a photo by itself.
    """
    photos, at = list[Photo](), 0
    height, width = (min(_SMALL, side) for side in images.shape[-2:])
    small = nn.functional.adaptive_avg_pool2d(images.detach().float(), (height, width))
    while at < len(small):
        photos.append(_photo(small[at:], (False, True) if first is None else (first,), len(small) if one else 3))
        at += photos[-1].count
    return photos


def _photo(images: Tensor, sides: Sequence[bool], fewest: int) -> Photo:
    """The photo of the first images, as many of them as show one, but `fewest` or more; else only the first image."""
    means = images.mean((-2, -1))
    for count in range(min(len(images), _MOST), max(fewest, 3) - 1, -1):
        errors = dict[Photo, float]()
        for first in sides:
            thumbnail, crops = (0, slice(1, count)) if first else (count - 1, slice(0, count - 1))
            spread = float(images[thumbnail].std())
            if float((means[thumbnail] - means[crops].mean(0)).abs().max()) <= spread:  # else another colour
                grid_errors = _errors(images[crops], images[thumbnail])
                if grid_errors is None:
                    return Photo(1)
                errors |= {Photo(count, grid, first): error for grid, error in grid_errors.items()}
        best, *others = sorted(errors.items(), key=lambda item: item[1]) or [(Photo(1), math.inf)]
        if best[1] < _ALIKE and all(error > _CLEARLY * best[1] for _, error in others):
            return best[0]
    return Photo(1)


def _errors(crops: Tensor, thumbnail: Tensor) -> dict[Shape, float] | None:
    """How far crops (n, C, H, W) in each grid of rows and columns are from the thumbnail (C, H, W), as a share of its variance.
    None for a pattern so fine that it is gone when it is scaled down."""
    (count, channels, height, width), errors = crops.shape, dict[Shape, float]()
    for rows in range(1, count + 1):
        columns = count // rows
        down, along = min(_CELLS, height // rows), min(_CELLS, width // columns) if columns else 0
        if rows * columns != count or not down or not along:
            continue
        whole = nn.functional.adaptive_avg_pool2d(thumbnail, (rows * down, columns * along))
        cells = nn.functional.adaptive_avg_pool2d(crops, (down, along)).view(rows, columns, channels, down, along)
        joined = cells.permute(2, 0, 3, 1, 4).reshape(whole.shape)
        variance = _variance(whole)
        if variance <= 1e-6:  # one colour
            return {}
        if variance < _LEAST_VARIANCE * _variance(thumbnail):
            return None
        errors[rows, columns] = float((joined - whole).square().mean()) / variance
    return errors


def _variance(image: Tensor) -> float:
    return float((image - image.mean((-2, -1), keepdim=True)).square().mean())


def numbered(images: Sequence[Tensor]) -> list[int]:
    """The number of the photo of each image: images with the same pixels are of one."""
    firsts, numbers = list[Tensor](), list[int]()
    for image in images:
        number = next((i for i, first in enumerate(firsts) if torch.equal(first, image)), len(firsts))
        if number == len(firsts):
            firsts.append(image)
        numbers.append(number)
    return numbers


def canvas_box(canvas: Tensor) -> Box | None:
    """x1, y1, x2, y2 of a canvas (C, H, W) relative to the photo in its upper left corner, if the canvas has one colour below
    and to the right of the photo; None if it has one colour throughout."""
    drawn = (canvas != canvas[:, -1:, -1:]).any(0)
    if not bool(drawn.any()):
        return None
    bottom, right = (int(drawn.any(axis).nonzero().max()) + 1 for axis in (1, 0))
    return 0.0, 0.0, drawn.shape[1] / right, drawn.shape[0] / bottom


def square_box(size: Shape) -> Box:
    """x1, y1, x2, y2 of a square relative to the photo of `size` (height, width) in its middle."""
    height, width = size
    side = max(height, width)
    across, down = (side - width) // 2, (side - height) // 2
    return -across / width, -down / height, (side - across) / width, (side - down) / height


def real_grids(inputs: Mapping[str, Any], grid: Shape) -> list[Shape]:
    """Rows and columns of each image's part of a grid that lies over the padded images."""
    mask = inputs.get("pixel_mask")
    if mask is None:
        return [grid] * len(inputs["pixel_values"])
    mask = nn.functional.interpolate(mask[:, None].float(), size=grid)[:, 0].bool()  # as ViLT and DETR take it
    return [(int(each[:, 0].sum()), int(each[0].sum())) for each in mask]
