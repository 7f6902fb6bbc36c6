"""Grids: how the image tokens of a prompt lie in the pictures that they stand for.

A grid is a function of the config of a model and of its inputs. It gives one `Layout` per image, in the order of the prompts.
Where the image tokens do not add up to what it says, `Tokens.maps` raises. `derived` is the grid of models that nobody lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """The tokens of one image."""

    size: int  # how many image tokens of the prompt are this image's
    maps: tuple[Tensor, ...]  # (h, w): which token lies where in each map. Tokens in no map (CLS, ends of rows) have no place.


Grid = Callable[[Any, Mapping[str, Any]], list[Layout] | None]  # None = nothing tells how the tokens lie


def whole(shape: Shape, before: int = 0) -> Layout:
    """An image of (h, w) tokens, row by row, behind `before` tokens that have no place in it."""
    height, width = shape
    return Layout(before + height * width, (_after(before, shape),))


def frames(count: int, shape: Shape, after: int = 0) -> Layout:
    """A video of `count` frames of (h, w) tokens, and `after` tokens behind them that have no place in it."""
    size = math.prod(shape)
    return Layout(count * size + after, tuple(_after(i * size, shape) for i in range(count)))


def patch_shape(config: Any, size: Sequence[int]) -> Shape:
    """(h, w) of the patches of an image of `size` (height, width) pixels, by the config or by that of its image part."""
    parts = [config, *(getattr(config, name, None) for name in ("vision_config", "image_config"))]
    patch = next((part.patch_size for part in parts if getattr(part, "patch_size", None) is not None), None)
    if patch is None:
        raise ValueError(f"config must have the patch_size of an image; got {type(config).__name__} without")
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return int(size[0]) // height, int(size[1]) // width


def only_picture(inputs: Mapping[str, Any]) -> Tensor | None:
    """The pictures (B, C, H, W) of a model that takes nothing beside them; None where it takes ids, too, or several."""
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    pictures = [value for value in tensors if value.ndim == 4 and value.is_floating_point()]
    ids = [value for value in tensors if value.ndim == 2 and not value.is_floating_point()]
    return pictures[0] if len(pictures) == 1 and not ids else None


def square_patches(count: int, size: Sequence[int], prefix: int | None) -> tuple[int, Shape] | None:
    """The tokens in front of the patches and the grid (h, w) of these, where `count` tokens are of a picture of `size` (height,
    width) pixels in squares that leave nothing over. Without a `prefix` the fewest tokens that fit, at most 8 (CLS, registers);
    None where nothing fits."""
    height, width = int(size[0]), int(size[1])
    common = math.gcd(height, width)
    sides = [side for side in range(1, common + 1) if common % side == 0 and max(height, width) > side]  # one square is no grid
    shapes = {(height // side) * (width // side): (height // side, width // side) for side in sides}
    befores = range(9) if prefix is None else [prefix]
    return next(((before, shapes[count - before]) for before in befores if count - before in shapes), None)


def image_tokens(config: Any, inputs: Mapping[str, Any]) -> Tensor:
    """bool (B, N), True = a token of an image or a video."""
    ids = inputs["input_ids"].reshape(-1, inputs["input_ids"].shape[-1])
    of_image = ids == config.image_token_id
    video = getattr(config, "video_token_id", None)
    return of_image if inputs.get("pixel_values_videos") is None or video is None else of_image | (ids == video)


# --- one token a patch, or a merged block of patches ---


def patches(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """One token a patch (LLaVA, PaliGemma). Some vision towers put their CLS token in front."""
    shapes = merged_shapes(config, inputs, 1)
    before = int(int(image_tokens(config, inputs).sum()) == sum(height * width + 1 for height, width in shapes))
    return [whole(shape, before) for shape in shapes]


def merged_sizes(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """One token for a square of patches, in images of several sizes (Mistral 3)."""
    return [whole(shape) for shape in merged_shapes(config, inputs, config.spatial_merge_size)]


def merged_frames(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """One token for a square of patches, by `image_grid_thw` and `video_grid_thw` (Qwen-VL). A map for each frame."""
    merge = config.vision_config.spatial_merge_size
    sizes = ([] if (grid := inputs.get(name)) is None else grid.tolist() for name in ("image_grid_thw", "video_grid_thw"))
    return _in_order(config, inputs, *([frames(t, (h // merge, w // merge)) for t, h, w in kind] for kind in sizes))


def pooled(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """Patches averaged to `mm_tokens_per_image` tokens, a square (Gemma 3)."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    kernel = side // math.isqrt(config.mm_tokens_per_image)
    return [whole((side // kernel, side // kernel))] * len(inputs["pixel_values"])


def behind_mean(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """The map of a convolutional vision tower, behind its mean (Florence-2)."""
    vision = config.vision_config
    height, width = (int(size) for size in inputs["pixel_values"].shape[-2:])
    for kernel, stride, padding in zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True):
        height, width = ((size + 2 * padding - kernel) // stride + 1 for size in (height, width))
    return [whole((height, width), 1)] * len(inputs["pixel_values"])


# --- tiles ---


def shuffled(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """Tiles, then a thumbnail, with pixels shuffled into channels (InternVL). Each is a map of its own: the inputs do not say how
    the tiles lie."""
    height, width = patch_shape(config.vision_config, inputs["pixel_values"].shape[-2:])
    ratio = config.downsample_ratio
    return [whole((int(height * ratio), int(width * ratio)))] * len(inputs["pixel_values"])


def labelled(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """Tiles, then a thumbnail, each behind a token that names it (Idefics 3, SmolVLM).

    Two tokens stand in front of each, and a line feed behind a row of tiles, so that tiles which are two tokens apart are of one
    row. The tiles of a complete grid are joined to one map of the image; the thumbnail is another one.
    """
    height, width = patch_shape(config.vision_config, inputs["pixel_values"].shape[-2:])
    shape = height // config.scale_factor, width // config.scale_factor
    layouts: list[Layout] = []
    for ids, runs, untiled in _prompts_of_tiles(config, inputs, shape):
        if untiled is not None:
            layouts += untiled
            continue
        labels = [ids[start - 1] if start else None for start, _ in runs]
        rows: list[int] = []  # how many tiles are in each row of the image whose thumbnail is yet to come
        for number, label in enumerate(labels):
            if label == labels[-1]:  # the last tile of a prompt is a thumbnail
                layouts += _joined(rows, shape)
                rows = []
            elif rows and runs[number][0] - runs[number - 1][1] == 2:
                rows[-1] += 1
            else:
                rows.append(1)
    return layouts


def separated(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """Tiles with a token behind each, which is another one at the end of a row, then a thumbnail (Llama 4).

    Between the last row and the thumbnail are that token and the thumbnail's name, as in front of each thumbnail.
    """
    height, width = patch_shape(config.vision_config, inputs["pixel_values"].shape[-2:])
    ratio = config.vision_config.pixel_shuffle_ratio
    shape = int(height * ratio), int(width * ratio)
    layouts: list[Layout] = []
    for ids, runs, untiled in _prompts_of_tiles(config, inputs, shape):
        if untiled is not None:
            layouts += untiled
            continue
        labels: list[int] = []  # in front of the tiles of the image whose thumbnail is yet to come
        for start, _ in runs:
            if ids[start - 1] != ids[runs[-1][0] - 1]:
                labels.append(ids[start - 1])
                continue
            ends = [i for i, label in enumerate(labels) if i and label == ids[start - 2]]
            edges = [0, *ends, len(labels)]
            layouts += _joined([b - a for a, b in zip(edges, edges[1:], strict=False)] if labels else [], shape)
            labels = []
    return layouts


def _prompts_of_tiles(
    config: Any, inputs: Mapping[str, Any], shape: Shape
) -> Iterator[tuple[list[int], list[Shape], list[Layout] | None]]:
    """The ids of each prompt, the stretches of its image tokens, and the layouts where these are no tiles with tokens between."""
    for ids, of_image in zip(inputs["input_ids"].tolist(), image_tokens(config, inputs).tolist(), strict=True):
        edges = [i for i in range(len(ids) + 1) if (i < len(ids) and of_image[i]) != (i > 0 and of_image[i - 1])]
        runs = list(zip(edges[::2], edges[1::2], strict=True))
        tiles = all(stop - start == math.prod(shape) for start, stop in runs)
        yield ids, runs, None if tiles else [whole(shape)] * -(-sum(of_image) // math.prod(shape))


def _joined(rows: Sequence[int], shape: Shape) -> list[Layout]:
    """Tiles of `shape`, so many in each of `rows`, and the thumbnail behind them."""
    if not rows:
        return [whole(shape)]
    if len(set(rows)) > 1:
        return [whole(shape)] * (sum(rows) + 1)
    tiles = _tiled((len(rows), rows[0]), shape)
    return [Layout(tiles.numel() + math.prod(shape), (tiles, _after(tiles.numel(), shape)))]


def _tiled(tiles: Shape, shape: Shape) -> Tensor:
    """Indices (rows * h, columns * w) of tokens that come tile by tile."""
    count = math.prod(tiles) * math.prod(shape)
    return torch.arange(count).view(*tiles, *shape).transpose(1, 2).reshape(tiles[0] * shape[0], tiles[1] * shape[1])


def tiled_states(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """Tiles behind a CLS token each, as many as the model takes at most; `aspect_ratio_ids` says how they lie (Mllama).

    The tokens are keys of cross-attention and in no prompt. Images that only pad a shorter list of images have no map.
    """
    vision = config.vision_config
    shape = patch_shape(vision, (vision.image_size, vision.image_size))
    count = math.prod(shape) + 1
    tiles = inputs["pixel_values"].shape[2]
    layouts = []
    for number in inputs["aspect_ratio_ids"].flatten().tolist():
        maps: tuple[Tensor, ...] = ()
        if number > 0:  # 0 pads
            places = _tiled(tuple(vision.supported_aspect_ratios[number - 1]), shape)
            maps = (places + places // math.prod(shape) + 1,)  # behind the CLS token of its tile and of those before
        layouts.append(Layout(tiles * count, maps))
    return layouts


def anyres(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """A thumbnail, then the image without its padding with a token at the end of each row (LLaVA-NeXT, LLaVA-OneVision).

    Images that the model does not tile are a thumbnail and one token. A map for each frame of a video.
    """
    side = config.vision_config.image_size // config.vision_config.patch_size
    thumbnail = torch.arange(side * side).view(side, side)
    layouts: list[Layout] = []
    for _, index in anyres_tiles(config, inputs):
        if index is None:
            layouts.append(Layout(side * side + 1, (thumbnail,)))
            continue
        height, width = anyres_shape(config, index.shape)
        ends = _after(side * side, (height, width + 1))
        layouts.append(Layout(side * side + ends.numel(), (thumbnail, ends[:, :-1])))
    videos = inputs.get("pixel_values_videos")
    half = (side + 1) // 2  # frames are scaled down by two
    shown = [] if videos is None else [frames(videos.shape[1], (half, half), after=1)] * len(videos)
    return _in_order(config, inputs, layouts, shown)


def anyres_tiles(config: Any, inputs: Mapping[str, Any]) -> list[tuple[int, Tensor | None]]:
    """The tiles of each image, and the indices (h, w) of their features without padding; 0 and None of one that is not tiled."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    size = config.vision_config.image_size
    side = size // config.vision_config.patch_size
    counts = inputs.get("batch_num_images")
    shapes = inputs["image_sizes"] if inputs.get("pixel_values") is not None else []
    tiled = [True] * len(shapes) if counts is None else [int(n) == 1 for n in counts for _ in range(n)]
    images: list[tuple[int, Tensor | None]] = []
    for shape, of_tiles in zip(shapes, tiled, strict=True):
        if not of_tiles:
            images.append((0, None))
            continue
        grid = get_anyres_image_grid_shape(shape, config.image_grid_pinpoints, size)
        images.append((math.prod(grid), unpad_image(_tiled(grid, (side, side))[None], shape)[0]))
    return images


def anyres_shape(config: Any, shape: Sequence[int]) -> Shape:
    """(h, w) of an image's features in the prompt: large ones are scaled down (LLaVA-OneVision)."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    limit = getattr(config, "vision_aspect_ratio", None)  # the model reads no other, though its forward takes one
    height, width = int(shape[0]), int(shape[1])
    ratio = 0.0 if limit is None else math.sqrt(height * width / (int(limit.removeprefix("anyres_max_")) * side**2))
    return (int(height // ratio), int(width // ratio)) if ratio > 1.1 else (height, width)


def merged_shapes(config: Any, inputs: Mapping[str, Any], merge: int) -> list[Shape]:
    """(h, w) of the tokens of each image, which are squares of `merge` by `merge` patches."""
    sizes = inputs.get("image_sizes")
    if sizes is None:
        pixels = inputs["pixel_values"]
        sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
    shapes = (patch_shape(config.vision_config, size) for size in torch.as_tensor(sizes).tolist())
    return [(height // merge, width // merge) for height, width in shapes]


# --- derived from names that many configs and inputs share ---

# The side of the square of patches that one token stands for, and the share of a side that is left.
_SIDES = ("spatial_merge_size", "merge_size", "downsample_factor", "scale_factor", "pixel_shuffle_factor", "pooling_kernel_size")
_SHARES = ("downsample_ratio", "pixel_shuffle_ratio")


def derived(config: Any, inputs: Mapping[str, Any]) -> list[Layout] | None:
    """The images of a model that nobody lists, where config and inputs tell how they lie and the tokens add up; else None."""
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
    return _in_order(config, inputs, *([frames(t, (h // side, w // side)) for t, h, w in kind] for kind in kinds))


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
    for before in (0, 1):  # some vision towers put their CLS token in front
        if count == sum(before + math.prod(shape) for shape in shapes):
            return [whole(shape, before) for shape in shapes]
    for side in _sides(config):
        merged = [(height // side, width // side) for height, width in shapes]
        if count == sum(math.prod(shape) for shape in merged):
            return [whole(shape) for shape in merged]
    return None


def _sides(config: Any) -> list[int]:
    """Sides of the square of patches that config or vision config name."""
    parts = [part for part in (config, getattr(config, "vision_config", None)) if part is not None]
    sides = [getattr(part, name, None) for part in parts for name in _SIDES]
    sides += [round(1 / share) for part in parts for name in _SHARES if (share := getattr(part, name, None))]
    return [side for side in sides if isinstance(side, int) and side > 0]


# --- parts ---


def _in_order(config: Any, inputs: Mapping[str, Any], images: list[Layout], videos: list[Layout]) -> list[Layout]:
    """Images and videos in the order of the prompts."""
    ids = inputs["input_ids"].view(-1, inputs["input_ids"].shape[-1])
    of_image = (ids[image_tokens(config, inputs)] == config.image_token_id).tolist()
    waiting = {True: list(images), False: list(videos)}
    layouts, position = [], 0
    while position < len(of_image) and waiting[of_image[position]]:
        layouts.append(waiting[of_image[position]].pop(0))
        position += layouts[-1].size
    return layouts + waiting[True] + waiting[False]  # what is left has no tokens, as `Tokens.maps` finds out


def _after(count: int, shape: Shape) -> Tensor:
    """Indices (h, w) of tokens behind `count` others."""
    return count + torch.arange(math.prod(shape)).view(shape)
