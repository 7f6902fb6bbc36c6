"""From which tokens of a vision tower a connector makes each image token, and their positions in the image.

A connector is a function of the config, the inputs, the shape (images, N) of the vision tower and the number of image tokens of
all prompts. It raises an error if the tokens do not add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.interpret.adapters.image_grids import Layout, anyres, anyres_shape, anyres_tiles, merged_shapes, patch_shape
from vlattn_fast.interpret.adapters.pixels import Shape


@dataclass(frozen=True)
class Merged:
    """The tokens of a vision tower, counted through all its images."""

    tokens: Tensor  # int64 (images * N,), the image token, counted through all prompts, that each is part of; -1 = none
    maps: tuple[Tensor, ...]  # index tensors (h, w), the token at each position of an image
    owners: Tensor  # int64 (images * N,), the map of the image that each belongs to


Connector = Callable[[Any, Mapping[str, Any], Shape, int], Merged]


def _check(fits: bool, name: str, shape: Shape, count: int) -> None:
    if not fits:
        raise ValueError(
            f"{name} must match the image tokens for through_connector=True; got {count} tokens for a tower of {shape}"
        )


def joined(merged: Merged, layouts: Sequence[Layout]) -> tuple[Tensor, ...] | None:
    """The patches (h, w) of each map of the image tokens, if every image fills a part of one; else None."""
    maps = [(start, index) for layout, start in _with_starts(layouts) for index in layout.maps]
    positions = torch.full((sum(layout.size for layout in layouts), 3), -1)  # of each image token: its map, row and column
    for number, (start, index) in enumerate(maps):
        rows, columns = torch.meshgrid(*map(torch.arange, index.shape), indexing="ij")
        positions[start + index] = torch.stack([torch.full_like(rows, number), rows, columns], -1)
    whole: list[Tensor | None] = [None] * len(maps)
    for image in merged.maps:
        tokens = merged.tokens[image]
        (number, top, left), (last, bottom, _) = positions[tokens[0, 0]].tolist(), positions[tokens[-1, -1]].tolist()
        if int(tokens.min()) < 0 or number < 0 or last != number:
            return None
        side = image.shape[0] // (bottom - top + 1)
        if (canvas := whole[number]) is None:
            height, width = maps[number][1].shape
            canvas = whole[number] = torch.full((height * side, width * side), -1)
        canvas[top * side : top * side + image.shape[0], left * side : left * side + image.shape[1]] = image
    full = [canvas for canvas in whole if canvas is not None and int(canvas.min()) >= 0]
    return tuple(full) if len(full) == len(whole) else None


def _with_starts(layouts: Sequence[Layout]) -> Iterator[tuple[Layout, int]]:
    """Each layout, and how many image tokens come before its own."""
    start = 0
    for layout in layouts:
        yield layout, start
        start += layout.size


def squares(config: Any, inputs: Mapping[str, Any], shape: Shape, count: int) -> Merged:
    """One image token for a patch, or for a square of patches, in images of one size. CLS may be an image token, too."""
    (images, size), (height, width) = shape, patch_shape(config.vision_config, inputs["pixel_values"].shape[-2:])
    each, before = count // max(images, 1), size - height * width
    maps = tuple(i * size + before + torch.arange(height * width).view(height, width) for i in range(images))
    owners = torch.arange(images).repeat_interleave(size)
    if each == size:  # CLS is an image token, too
        return Merged(torch.arange(images * size), maps, owners)
    side = round((height * width / each) ** 0.5) if each else 1
    alike = each * images == count and before >= 0
    if not alike or height % side or width % side or each * side**2 != height * width:
        raise ValueError(
            f"image tokens must be squares of patches for through_connector=True; got {count} tokens for {images} images of "
            f"{height} x {width} patches"
        )
    rows, columns = torch.arange(height) // side, torch.arange(width) // side
    square = rows[:, None] * (width // side) + columns
    numbers = torch.full((images, size), -1)
    numbers[:, before:] = square.flatten() + each * torch.arange(images)[:, None]
    return Merged(numbers.flatten(), maps, owners)


def packed(config: Any, inputs: Mapping[str, Any], shape: Shape, count: int) -> Merged:
    """One image token for a square of patches that follow one another; all images are one sequence (Qwen-VL).

    Where the tower attends in windows, it takes the squares window by window.
    """
    vision = config.vision_config
    side, positions, maps = vision.spatial_merge_size, list[Tensor](), list[Tensor]()
    for frames, height, width in inputs["image_grid_thw"].tolist():
        rows, columns = height // side, width // side
        index = torch.arange(frames * rows * columns).view(frames, rows, columns) + sum(part.numel() for part in positions)
        positions.append(_in_windows(index, getattr(vision, "window_size", None) or 0, side * vision.patch_size))
        patches = index[..., None] * side**2 + torch.arange(side**2)
        square = patches.view(frames, rows, columns, side, side).transpose(2, 3)
        maps += list(square.reshape(frames, height, width))
    order = torch.cat(positions)  # the square at each place of the tower's sequence
    _check(shape == (1, len(order) * side**2) and count == len(order), "image_grid_thw", shape, count)
    where = (order.argsort()[:, None] * side**2 + torch.arange(side**2)).flatten()  # of each patch in the tower's sequence
    maps = [where[index] for index in maps]
    owners = torch.empty_like(where)
    for number, index in enumerate(maps):
        owners[index] = number
    return Merged(order.repeat_interleave(side**2), tuple(maps), owners)


def _in_windows(index: Tensor, size: int, square: int) -> Tensor:
    """The squares (frames, rows, columns) in the order in which a tower with windows of `size` pixels takes them."""
    step = size // square
    if not step:
        return index.flatten()
    windows = (part for frame in index for rows in frame.split(step) for part in rows.split(step, dim=1))
    return torch.cat([window.flatten() for window in windows])


def in_one_row(config: Any, inputs: Mapping[str, Any], shape: Shape, count: int) -> Merged:
    """One image token for a patch, or for a square of patches, in images of any size; all images are one sequence (Pixtral)."""
    side = getattr(config, "spatial_merge_size", 1)
    numbers, maps, owners = list[Tensor](), list[Tensor](), list[Tensor]()
    patch = token = 0
    for number, (height, width) in enumerate(merged_shapes(config, inputs, 1)):
        rows, columns = torch.arange(height)[:, None] // side, torch.arange(width) // side
        whole = (rows < height // side) & (columns < width // side)  # what is left at the edges is in no square
        numbers.append(torch.where(whole, token + rows * (width // side) + columns, -1).flatten())
        maps.append(patch + torch.arange(height * width).view(height, width))
        owners.append(torch.full((height * width,), number))
        patch, token = patch + height * width, token + (height // side) * (width // side)
    _check(shape == (1, patch) and count == token, "image_sizes", shape, count)
    return Merged(torch.cat(numbers), tuple(maps), torch.cat(owners))


def tiles(config: Any, inputs: Mapping[str, Any], shape: Shape, count: int) -> Merged:
    """One image token a patch: those of a thumbnail, then of tiles without padding, with a token after each row (LLaVA-NeXT,
    LLaVA-OneVision)."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    area, (images, size) = side * side, shape
    before = size - area  # CLS
    parts = list(zip(anyres(config, inputs), anyres_tiles(config, inputs), strict=True))
    tokens, expected = sum(layout.size for layout, _ in parts), sum(1 + tiles for _, (tiles, _) in parts)
    _check(before >= 0 and expected == images and tokens == count, "image_sizes", shape, count)
    numbers, maps, owners = torch.full((images * size,), -1), list[Tensor](), list[Tensor]()
    tile = token = 0
    for layout, (tiles_of_image, index) in parts:
        positions = [tile * size + before + torch.arange(area).view(side, side)]
        if index is not None:
            if (patches := tuple(index.shape)) != anyres_shape(config, index.shape):
                raise ValueError(
                    f"through_connector=True does not support images that the model scales down; got {patches} patches"
                )
            positions.append((tile + 1 + index // area) * size + before + index % area)
        for place, map_numbers in zip(positions, layout.maps, strict=True):
            numbers[place] = token + map_numbers
        owners.append(torch.full(((1 + tiles_of_image) * size,), len(maps)))
        maps += positions
        token, tile = token + layout.size, tile + 1 + tiles_of_image
    return Merged(numbers, tuple(maps), torch.cat(owners))
