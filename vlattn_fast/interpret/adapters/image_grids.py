"""Grids: how the image tokens of a prompt lie in the images that they stand for.

A grid is a function of the config of a model and of its inputs. It gives one `Layout` per image, in the order of the prompts.
If the image tokens do not add up to it, `Tokens.maps` raises an error. `derived_grids` is for models without a listed adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.interpret.adapters.pixels import WHOLE, Box, Shape, canvas_box, photos_in, square_box


@dataclass(frozen=True)
class Layout:
    """The tokens of one image."""

    size: int  # how many image tokens of the prompt are this image's
    maps: tuple[Tensor, ...]  # (h, w): the token at each position of a map. Some tokens are in no map (CLS, ends of rows).
    boxes: tuple[Box | None, ...] | None = None  # x1, y1, x2, y2 of each map relative to the photo; None = the inputs do not tell
    film: bool = False  # each map is of a frame, and not all of one photo


Maps = tuple[Tensor | tuple[Tensor, ...], list[int]]  # (images, h, w), or (h, w) each, and the row that each belongs to
Grid = Callable[[Any, Mapping[str, Any]], list[Layout] | None]  # None = nothing tells how the tokens lie


def whole(shape: Shape, before: int = 0, box: Box | None = None) -> Layout:
    """An image of (h, w) tokens, row by row, after `before` tokens that have no position in it."""
    height, width = shape
    return Layout(before + height * width, (_after(before, shape),), (box,))


def frames(count: int, shape: Shape, after: int = 0) -> Layout:
    """A video of `count` frames of (h, w) tokens, and then `after` tokens that have no position in it."""
    size = math.prod(shape)
    return Layout(count * size + after, tuple(_after(i * size, shape) for i in range(count)), film=True)


def patch_shape(config: Any, size: Sequence[int]) -> Shape:
    """(h, w) of the patches of an image of `size` (height, width) pixels, by the config or by that of its image part."""
    parts = [config, *(getattr(config, name, None) for name in ("vision_config", "image_config"))]
    patch = next((part.patch_size for part in parts if getattr(part, "patch_size", None) is not None), None)
    if patch is None:
        raise ValueError(f"config must have the patch_size of an image; got {type(config).__name__} without it")
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return int(size[0]) // height, int(size[1]) // width


def only_image(inputs: Mapping[str, Any]) -> Tensor | None:
    """The images (B, C, H, W) of a model that takes nothing else; None if it also takes ids, or several images."""
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    images = [value for value in tensors if value.ndim == 4 and value.is_floating_point()]
    return images[0] if len(images) == 1 and not any(map(is_ids, tensors)) else None


def is_ids(value: Any) -> bool:
    """Whether an input may be token ids (B, N)."""
    return isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point()


def square_patches(count: int, size: Sequence[int], prefix: int | None) -> tuple[int, Shape] | None:
    """The tokens before the patches and the grid (h, w) of these, if `count` tokens are of an image of `size` (height,
    width) pixels in squares that leave nothing over. Without a `prefix` the fewest tokens that fit, at most 8 (CLS, registers);
    None if nothing fits."""
    height, width = int(size[0]), int(size[1])
    common = math.gcd(height, width)
    sides = [side for side in range(1, common + 1) if common % side == 0 and max(height, width) > side]  # not one square
    shapes = {(height // side) * (width // side): (height // side, width // side) for side in sides}
    befores = range(9) if prefix is None else [prefix]
    return next(((before, shapes[count - before]) for before in befores if count - before in shapes), None)


def image_tokens(config: Any, inputs: Mapping[str, Any]) -> Tensor:
    """bool (B, N), True = a token of an image or a video."""
    ids = inputs["input_ids"].reshape(-1, inputs["input_ids"].shape[-1])
    is_image = ids == config.image_token_id
    video = getattr(config, "video_token_id", None)
    return is_image if inputs.get("pixel_values_videos") is None or video is None else is_image | (ids == video)


def photos_of(layouts: Sequence[Layout]) -> tuple[list[int], list[Box | None]]:
    """The number of the photo of each map, and the map's box relative to it."""
    photos, boxes, count = list[int](), list[Box | None](), 0
    for layout in layouts:
        numbers = range(count, count + len(layout.maps)) if layout.film else [count] * len(layout.maps)
        photos += numbers
        boxes += layout.boxes or [None] * len(layout.maps)
        count += len(set(numbers))
    return photos, boxes


# --- one token a patch, or a merged block of patches ---


def patches(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """One token a patch (LLaVA, PaliGemma). Some vision towers put their CLS token first."""
    shapes = merged_shapes(config, inputs, 1)
    before = int(int(image_tokens(config, inputs).sum()) == sum(height * width + 1 for height, width in shapes))
    return [whole(shape, before) for shape in shapes]


def cameras(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """One token a patch, in images (B, cameras, C, height, width) of which `pixel_attention_mask` says which exist (PI0)."""
    pixels, mask = inputs["pixel_values"], inputs.get("pixel_attention_mask")
    count = pixels.shape[0] * pixels.shape[1] if mask is None else int(mask.sum())
    return [whole(patch_shape(config.vision_config, pixels.shape[-2:]))] * count


def merged_sizes(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """One token for a square of patches, in images of several sizes (Mistral 3)."""
    return [whole(shape) for shape in merged_shapes(config, inputs, config.spatial_merge_size)]


def merged_frames(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """One token for a square of patches, by `image_grid_thw` and `video_grid_thw` (Qwen-VL). A map for each frame."""
    merge = config.vision_config.spatial_merge_size
    sizes = ([] if (grid := inputs.get(name)) is None else grid.tolist() for name in ("image_grid_thw", "video_grid_thw"))
    return in_order(config, inputs, *([frames(t, (h // merge, w // merge)) for t, h, w in kind] for kind in sizes))


def pooled(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """Patches averaged to `mm_tokens_per_image` tokens, a square. Crops may be after the whole photo (Gemma 3)."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    kernel = side // math.isqrt(config.mm_tokens_per_image)
    return with_thumbnails(config, inputs, (side // kernel, side // kernel), first=True)


def after_mean(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """The map of a convolutional vision tower, after its mean (Florence-2)."""
    vision = config.vision_config
    height, width = (int(size) for size in inputs["pixel_values"].shape[-2:])
    for kernel, stride, padding in zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True):
        height, width = ((size + 2 * padding - kernel) // stride + 1 for size in (height, width))
    return [whole((height, width), 1)] * len(inputs["pixel_values"])


# --- tiles ---


def shuffled(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """Tiles, then a thumbnail, with pixels shuffled into channels (InternVL). Only their pixels say how the tiles lie."""
    height, width = patch_shape(config.vision_config, inputs["pixel_values"].shape[-2:])
    ratio = config.downsample_ratio
    return with_thumbnails(config, inputs, (int(height * ratio), int(width * ratio)), first=False, apart=True)


def with_thumbnails(
    config: Any, inputs: Mapping[str, Any], shape: Shape, before: int = 0, first: bool | None = None, apart: bool = False
) -> list[Layout]:
    """Images of `shape` tokens, each after `before` others. Crops of a photo are joined to one map if a thumbnail shows how
    they lie: before them (`first`) or after them. `apart`: images with other tokens between them are other photos."""
    pixels, size = inputs["pixel_values"], before + math.prod(shape)
    layouts: list[Layout] = []
    for _, runs in _runs(config, inputs):
        counts = [(stop - start) // size for start, stop in runs]
        if not apart and all(count == 1 for count in counts):
            counts = [len(counts)]
        for count in counts:
            images, pixels = pixels[:count], pixels[count:]
            photos = photos_in(images, first, one=apart)
            layouts += [_cropped(one.grid, shape, before, one.first) if one.grid else whole(shape, before) for one in photos]
    return layouts + [whole(shape, before)] * len(pixels)  # what is left has no tokens, as `Tokens.maps` finds out


def _cropped(grid: Shape, shape: Shape, before: int, first: bool) -> Layout:
    """The map of crops of `shape`, and that of their thumbnail before or after them."""
    crops, size = math.prod(grid), before + math.prod(shape)
    joined = _tiled(grid, shape)
    joined = joined + (joined // math.prod(shape) + 1) * before + first * size
    thumbnail = _after(before + (0 if first else crops * size), shape)
    maps = (thumbnail, joined) if first else (joined, thumbnail)
    return Layout((crops + 1) * size, maps, (WHOLE, WHOLE))


def labelled(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """Tiles, then a thumbnail, each after a token that names it (Idefics 3, SmolVLM).

    Two tokens stand before each, and a line feed after a row of tiles, so that tiles which are two tokens apart are of one
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
    """Tiles with a token after each, which is another one at the end of a row, then a thumbnail (Llama 4).

    Between the last row and the thumbnail are that token and the thumbnail's name, as before each thumbnail. The tiles, or a
    single one without a thumbnail, are of a canvas whose upper left corner the photo fills.
    """
    pixels = inputs["pixel_values"]
    height, width = patch_shape(config.vision_config, pixels.shape[-2:])
    ratio = config.vision_config.pixel_shuffle_ratio
    shape = int(height * ratio), int(width * ratio)
    layouts: list[Layout] = []
    for ids, runs, untiled in _prompts_of_tiles(config, inputs, shape):
        if untiled is not None:
            layouts, pixels = layouts + untiled, pixels[len(untiled) :]
            continue
        labels: list[int] = []  # before the tiles of the image whose thumbnail is yet to come
        for start, _ in runs:
            if ids[start - 1] != ids[runs[-1][0] - 1]:
                labels.append(ids[start - 1])
                continue
            ends = [i for i, label in enumerate(labels) if i and label == ids[start - 2]]
            edges = [0, *ends, len(labels)]
            rows = [b - a for a, b in zip(edges, edges[1:], strict=False)] if labels else []
            tiles, pixels = pixels[: max(1, len(labels))], pixels[len(labels) + 1 :]
            layouts += _joined(rows, shape, _canvas(tiles, rows or [1]))
            labels = []
    return layouts


def _prompts_of_tiles(
    config: Any, inputs: Mapping[str, Any], shape: Shape
) -> Iterator[tuple[list[int], list[Shape], list[Layout] | None]]:
    """The ids of each prompt, the stretches of its image tokens, and the layouts if these are not tiles with tokens between
    them."""
    for ids, runs in _runs(config, inputs):
        tiles = all(stop - start == math.prod(shape) for start, stop in runs)
        count = sum(stop - start for start, stop in runs)
        yield ids, runs, None if tiles else [whole(shape)] * -(-count // math.prod(shape))


def _runs(config: Any, inputs: Mapping[str, Any]) -> Iterator[tuple[list[int], list[Shape]]]:
    """The ids of each prompt, and the start and stop of each stretch of its image tokens."""
    ids_of = inputs["input_ids"].reshape(-1, inputs["input_ids"].shape[-1])
    for ids, is_image in zip(ids_of.tolist(), image_tokens(config, inputs).tolist(), strict=True):
        edges = [i for i in range(len(ids) + 1) if (i < len(ids) and is_image[i]) != (i > 0 and is_image[i - 1])]
        yield ids, list(zip(edges[::2], edges[1::2], strict=True))


def _joined(rows: Sequence[int], shape: Shape, box: Box | None = WHOLE) -> list[Layout]:
    """Tiles of `shape`, so many in each of `rows`, and the thumbnail after them. `box` of the tiles relative to the photo."""
    if not rows:
        return [whole(shape, box=box)]
    if len(set(rows)) > 1:
        return [whole(shape)] * (sum(rows) + 1)
    return [replace(_cropped((len(rows), rows[0]), shape, 0, False), boxes=(box, WHOLE))]


def _canvas(tiles: Tensor, rows: Sequence[int]) -> Box | None:
    """The box of tiles (n, C, H, W), so many in each of `rows`, relative to the photo in the upper left corner of all."""
    if len(set(rows)) > 1 or len(tiles) != sum(rows):
        return None
    height, width = tiles.shape[-2:]
    canvas = tiles.detach().movedim(1, 0).flatten(1)[:, _tiled((len(rows), rows[0]), (height, width)).to(tiles.device)]
    return canvas_box(canvas)


def _tiled(tiles: Shape, shape: Shape) -> Tensor:
    """Indices (rows * h, columns * w) of tokens that come tile by tile."""
    count = math.prod(tiles) * math.prod(shape)
    return torch.arange(count).view(*tiles, *shape).transpose(1, 2).reshape(tiles[0] * shape[0], tiles[1] * shape[1])


def tiled_states(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """Tiles after a CLS token each, as many as the model takes at most; `aspect_ratio_ids` says how they lie (Mllama).

    The tokens are keys of cross-attention and in no prompt. Images that only pad a shorter list of images have no map. The photo
    fills the upper left corner of the tiles.
    """
    vision = config.vision_config
    shape = patch_shape(vision, (vision.image_size, vision.image_size))
    count = math.prod(shape) + 1
    tiles = inputs["pixel_values"].shape[2]
    layouts = []
    images = inputs["pixel_values"].flatten(0, 1)
    for image, number in zip(images, inputs["aspect_ratio_ids"].flatten().tolist(), strict=True):
        maps, boxes = tuple[Tensor, ...](), tuple[Box | None, ...]()
        if number > 0:  # 0 pads
            rows, columns = vision.supported_aspect_ratios[number - 1]
            positions = _tiled((rows, columns), shape)
            maps = (positions + positions // math.prod(shape) + 1,)  # after the CLS token of its tile and of those before
            boxes = (_canvas(image[: rows * columns], [columns] * rows),)
        layouts.append(Layout(tiles * count, maps, boxes))
    return layouts


def anyres(config: Any, inputs: Mapping[str, Any]) -> list[Layout]:
    """A thumbnail, then the image without its padding with a token at the end of each row (LLaVA-NeXT, LLaVA-OneVision).

    Images that the model does not tile are a thumbnail, with an edge that makes it a square, and one token. A map for each frame
    of a video.
    """
    side = config.vision_config.image_size // config.vision_config.patch_size
    thumbnail = torch.arange(side * side).view(side, side)
    layouts: list[Layout] = []
    for number, (_, index) in enumerate(anyres_tiles(config, inputs)):
        if index is None:
            height, width = (int(pixels) for pixels in inputs["image_sizes"][number])
            layouts.append(Layout(side * side + 1, (thumbnail,), (square_box((height, width)),)))
            continue
        height, width = anyres_shape(config, index.shape)
        ends = _after(side * side, (height, width + 1))
        layouts.append(Layout(side * side + ends.numel(), (thumbnail, ends[:, :-1]), (WHOLE, WHOLE)))
    videos = inputs.get("pixel_values_videos")
    half = (side + 1) // 2  # frames are scaled down by two
    shown = [] if videos is None else [frames(videos.shape[1], (half, half), after=1)] * len(videos)
    return in_order(config, inputs, layouts, shown)


def anyres_tiles(config: Any, inputs: Mapping[str, Any]) -> list[tuple[int, Tensor | None]]:
    """The tiles of each image, and the indices (h, w) of their features without padding; 0 and None of one that is not tiled."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    size = config.vision_config.image_size
    side = size // config.vision_config.patch_size
    counts = inputs.get("batch_num_images")
    shapes = inputs["image_sizes"] if inputs.get("pixel_values") is not None else []
    tiled = [True] * len(shapes) if counts is None else [int(n) == 1 for n in counts for _ in range(n)]
    images: list[tuple[int, Tensor | None]] = []
    for shape, tile_parts in zip(shapes, tiled, strict=True):
        if not tile_parts:
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


# --- parts ---


def in_order(config: Any, inputs: Mapping[str, Any], images: list[Layout], videos: list[Layout]) -> list[Layout]:
    """Images and videos in the order of the prompts."""
    ids = inputs["input_ids"].view(-1, inputs["input_ids"].shape[-1])
    is_image = (ids[image_tokens(config, inputs)] == config.image_token_id).tolist()
    waiting = {True: list(images), False: list(videos)}
    layouts, position = [], 0
    while position < len(is_image) and waiting[is_image[position]]:
        layouts.append(waiting[is_image[position]].pop(0))
        position += layouts[-1].size
    return layouts + waiting[True] + waiting[False]  # what is left has no tokens, as `Tokens.maps` finds out


def _after(count: int, shape: Shape) -> Tensor:
    """Indices (h, w) of tokens after `count` others."""
    return count + torch.arange(math.prod(shape)).view(shape)


def cut(patches: Tensor, grids: list[Shape]) -> Maps | None:
    """Maps of images whose patches are padded; None without an image, or of a model that draws some of the patches."""
    if not grids or patches.shape[1] < max(height * width for height, width in grids):
        return None
    maps = [row[: h * w].reshape(h, w) for row, (h, w) in zip(patches, grids, strict=True)]
    return stacked(maps), list(range(len(maps)))


def stacked(maps: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Maps (h, w) as one tensor, unless their shapes differ."""
    return torch.stack(list(maps)) if len({one.shape for one in maps}) == 1 else tuple(maps)
