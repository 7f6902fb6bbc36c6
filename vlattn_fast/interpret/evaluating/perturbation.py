"""Inputs with some of their patches, regions or words removed, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import describe
from vlattn_fast.interpret.adapters.adapter import NAMES, Adapter
from vlattn_fast.interpret.adapters.sound import silenced
from vlattn_fast.interpret.evaluating.box_scores import grid_entries

_IMAGES = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes", "spatial_shapes")
_REGIONS = ("region_", "visual_", "masked_regions")
_VISUAL = "visual_attention_mask"
_MASKS_OF_REGIONS = {"region_features": "region_mask", "visual_feats": _VISUAL, "visual_embeds": _VISUAL}
_NO_WORDS = ("pixel", "decoder_", *_REGIONS)  # inputs that stay whole when words are removed, whatever their length

Words = Callable[[Mapping[str, Any]], Tensor]
Stays = tuple[tuple[str, tuple[int, ...]], ...]  # (part, the entries of it that stay) of each part that is not whole


@dataclass(frozen=True)
class Sample:
    """One sample of a batch."""

    inputs: dict[str, Any]  # of this sample, tensors (1, ...)
    words: Tensor | None  # the columns of `input_ids` with words that may be removed; None without text
    shown_entries: Tensor | None  # their indices in an explanation's `.text`
    entries: dict[int, list[Tensor]]  # and in that of a caller's method, by its width; several if it is ambiguous
    grids: list[tuple[int, int]] | None  # (h, w) of each of its images; None without patches that can be removed
    regions: Tensor | None  # the indices of its real regions; None without regions
    boxes: Tensor | None  # (n, 4) where each entry of the image lies; None if they lie in several images
    problem: str | None  # why the model cannot run on this sample by itself; None = it can
    seconds: float | None = None  # how long the sound is whose strip the image is; None = it is an image
    filled: bool = False  # texts keep their length: the last token, which is padding in short ones, fills them

    def count(self, part: str) -> int:
        """How many entries its "image" or its "text" has."""
        if part == "text":
            return 0 if self.words is None else len(self.words)
        if self.regions is not None:
            return len(self.regions)
        return sum(height * width for height, width in self.grids or [])

    def stays(self, entries: Mapping[str, Sequence[int]]) -> Stays:
        """The entries that stay of each part, from those of some parts: equal for equal inputs."""
        short = {part: left for part, left in entries.items() if len(left) < self.count(part)}
        as_ranked = {"image"} if self.regions is not None else set()
        return tuple((part, tuple(left if part in as_ranked else sorted(left))) for part, left in sorted(short.items()))

    def sizes(self, stays: Stays) -> tuple[tuple[str, int], ...]:
        """The numbers that must be equal for the inputs of samples with the same shapes to keep the same shapes: removed
        words shorten the inputs, so do removed regions, and removed patches do not."""
        image_count = 0 if self.regions is None else 1
        return tuple((part, self.count(part) - len(left) if part == "text" else image_count * len(left)) for part, left in stays)

    def keeping(self, stays: Stays) -> dict[str, Any]:
        """The inputs with only these entries of each part; a part that is not named stays whole.

        Words are removed from ids and masks; the rest of the sequence stays, and its order. Regions are taken in the order in
        which they are named; for LXMERT one box of zeros stands for none. Patches are set to 0, the mean pixel of normalised
        images.
        """
        if self.problem is not None:
            raise ValueError(self.problem)
        inputs = dict(self.inputs)
        for part, entries in stays:
            chosen = torch.tensor(entries, dtype=torch.long)
            inputs |= self._words(chosen) if part == "text" else self._image(chosen)
        return inputs

    def _words(self, chosen: Tensor) -> dict[str, Tensor]:
        """The inputs of the text with only these words."""
        assert self.words is not None
        shape = self.inputs["input_ids"].shape
        stays = torch.ones(shape[1], dtype=torch.bool)
        stays[self.words] = False
        stays[self.words[chosen]] = True
        text_inputs = {n: x for n, x in self._tensors() if x.shape[:2] == shape and not n.startswith(_NO_WORDS)}
        kept = {name: value[:, stays.to(value.device)] for name, value in text_inputs.items()}
        gone = int((~stays).sum()) if self.filled else 0
        return {name: torch.cat([value, text_inputs[name][:, -1:].repeat(1, gone)], 1) for name, value in kept.items()}

    def _image(self, chosen: Tensor) -> dict[str, Tensor]:
        """The inputs of the image or the sound with only these patches, regions or stretches."""
        if self.regions is None:
            stays = torch.zeros(self.count("image"), dtype=torch.bool).index_fill_(0, chosen, True)
            if self.seconds is not None:
                return silenced(self.inputs, stays, self.seconds)
            pixels, real = _image_pixels(self.inputs)
            masked = _masked(pixels, _real_sizes(pixels, real, self.inputs), self.grids or [], stays)
            if real is not None:
                masked[:, 0, 0, 0] += torch.finfo(masked.dtype).tiny  # Idefics takes an image of zeros for padding
                masked = self.inputs["pixel_values"].index_put((real,), masked)
            return {"pixel_values": masked}
        index = self.regions[chosen]
        if not len(index) and "visual_feats" in self.inputs:  # Hugging Face's LXMERT cannot run without any box
            visual = ((name, value) for name, value in self._tensors() if name.startswith("visual_"))
            return {name: torch.full_like(value[:, :1], value.ndim == 2) for name, value in visual}  # a mask has a real one
        return {name: value[:, index.to(value.device)] for name, value in self._tensors() if name.startswith(_REGIONS)}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, value) for name, value in self.inputs.items() if isinstance(value, Tensor))


def _image_pixels(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Pixels without a dimension of samples, and None; or, of pixels (B, S, C, H, W), the images (images, C, H, W) and where
    they are, bool (B, S). The others are padding: `pixel_attention_mask`, (B, S) or (B, S, H, W), leaves them out, or their
    pixels are zeros."""
    pixels, real = inputs["pixel_values"], inputs.get("pixel_attention_mask")
    if pixels.ndim != 5:
        return pixels, None
    real = real if isinstance(real, Tensor) else pixels != 0
    real = real.bool() if real.ndim == 2 else real.flatten(2).any(-1)
    return pixels[real], real


def _real_sizes(pixels: Tensor, real: Tensor | None, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Height and width of each image of `_image_pixels`, without padding, by `pixel_mask` (images, H, W), `pixel_attention_mask`
    (B, S, H, W) or `image_sizes` (images, 2)."""
    mask, sizes = inputs.get("pixel_mask"), inputs.get("image_sizes")
    if real is not None:
        mask, sizes = inputs.get("pixel_attention_mask"), None
        mask = mask[real] if isinstance(mask, Tensor) and mask.ndim == 4 else None
    if isinstance(mask, Tensor):
        return [(int(each[:, 0].sum()), int(each[0].sum())) for each in mask]
    if isinstance(sizes, Tensor):
        return [(height, width) for height, width in sizes.tolist()]
    return [(pixels.shape[-2], pixels.shape[-1])] * len(pixels)


def _masked(pixels: Tensor, sizes: list[tuple[int, int]], grids: list[tuple[int, int]], stays: Tensor) -> Tensor:
    """Pixels (images, C, H, W), or patches (P, features) of all images in turn, with 0 where an entry does not stay. The grid of
    an image lies over its size, and that of crops over all of them."""
    if pixels.ndim == 2:
        return pixels * stays.to(pixels).repeat_interleave(pixels.shape[0] // len(stays))[:, None]
    masks = []
    h, w = min(grids)
    cells = [part.view(grid) for part, grid in zip(stays.split([h * w for h, w in grids]), grids, strict=True)]
    if len(grids) != len(pixels):
        cells = [crop for part in cells for rows in part.split(h) for crop in rows.split(w, dim=1)]
    for (height, width), part in zip(sizes, cells, strict=True):
        h, w = part.shape
        mask = part.repeat_interleave(height // h, 0).repeat_interleave(width // w, 1)
        masks.append(nn.functional.pad(mask, (0, pixels.shape[-1] - width, 0, pixels.shape[-2] - height)))
    return pixels * torch.stack(masks).to(pixels)[:, None]


def split(
    adapter: Adapter | None, inputs: Mapping[str, Any], count: int, shown: Any, words: Words | None, before: int | None = None
) -> list[Sample]:
    """A batch of `count` samples, one by one. `shown`, an explanation of it or, for a model without an adapter, any object with
    `.image`, tells grids and towers. `words`: see `evaluate`. `before`: the column from which on an answer stands, whose words
    stay."""
    texts, pictures = _Texts.of(adapter, inputs, shown, words, before), _Pictures.of(inputs, count, shown)
    filled = adapter is not None and adapter.names != NAMES  # its positions are those of the longest text
    samples, region_boxes, seconds = [], getattr(shown, "boxes", None), getattr(shown, "seconds", None)
    for number in range(count):
        (grids, images), regions, boxes = pictures.of_sample(number), _real_regions(inputs, number), None
        length = None if seconds is None else seconds[number]
        if regions is not None and region_boxes is not None:
            boxes = region_boxes[number].cpu().double()[regions]
        elif grids is not None and len(grids) == 1:
            boxes = grid_entries(*grids[0]) * torch.tensor([length or 1.0, 1, length or 1.0, 1])
        single = _sample_inputs(inputs, number, count, images)
        samples.append(Sample(single, *texts.of_sample(number), grids, regions, boxes, pictures.problem(count), length, filled))
    return samples


@dataclass(frozen=True)
class _Texts:
    """The words of a batch, masks bool (B, N) over the columns of `input_ids`."""

    shown: Tensor | None  # as an explanation's `.text` has them
    removable: Tensor | None  # None without text
    widths: list[Tensor]  # all that a vector of `.text` may be over

    @classmethod
    def of(
        cls, adapter: Adapter | None, inputs: Mapping[str, Any], shown: Any, words: Words | None, before: int | None
    ) -> _Texts:
        text = _shown_words(adapter, inputs, shown)
        masks = [mask for mask in (text, _inner_words(adapter, inputs)) if mask is not None]
        if not masks:
            return cls(text, None, [])
        removable = masks[0] & masks[-1]
        if words is not None:
            removable = _asked(words, inputs, text if adapter is None else removable)
            masks += [removable] if adapter is None else []
        if before is not None:
            removable = removable & (torch.arange(removable.shape[1]) < before)
        rule = adapter.towers[0].rule if adapter is not None and adapter.towers and adapter.answers == "input_ids" else None
        if adapter is not None and rule is not None and rule.token is not None and rule.asks:
            # without these words another question would be asked
            asking = rule.token(adapter.scoring.kind(inputs, (removable.shape[0], removable.shape[1])))
            removable = removable if asking is None else removable.scatter(1, asking[:, None].cpu(), False)
        return cls(text, removable, masks)

    def of_sample(self, number: int) -> tuple[Tensor | None, Tensor | None, dict[int, list[Tensor]]]:
        """`words`, `shown_entries` and `entries` of a `Sample`."""
        if self.removable is None:
            return None, None, {}
        columns = self.removable[number].nonzero()[:, 0]
        shown = None if self.shown is None else self.shown[number].cumsum(0)[columns] - 1
        return columns, shown, _entries(self.widths, number, columns)


@dataclass(frozen=True)
class _Pictures:
    """The maps of a batch, and the images in `pixel_values` that they belong to."""

    grids: list[tuple[int, int]]  # (h, w) of each map
    owners: Sequence[int]  # the sample of each map
    images: list[list[int]] | None  # the images of each map; None if patches cannot be removed
    pixels: Any

    @classmethod
    def of(cls, inputs: Mapping[str, Any], count: int, shown: Any) -> _Pictures:
        image, owners, pixels = getattr(shown, "image", None), getattr(shown, "image_samples", None), inputs.get("pixel_values")
        grids = [] if image is None else [tuple(part.shape[-2:]) for part in image]
        owners = list(range(len(grids)) if owners is None else owners)
        if getattr(shown, "seconds", None) is not None:  # strips of a sound
            return cls(grids, owners, [[] for _ in grids], None)
        images = _images(pixels, grids, [owners.count(number) for number in range(count)], inputs) if grids else None
        return cls(grids, owners, images, pixels)

    def of_sample(self, number: int) -> tuple[list[tuple[int, int]] | None, list[int] | None]:
        """Grids and images of a sample. None without; and without images if its row of `pixel_values` has them."""
        if self.images is None:
            return None, None
        maps = [index for index, owner in enumerate(self.owners) if owner == number]
        images = None if self.pixels is None or self.pixels.ndim == 5 else [row for index in maps for row in self.images[index]]
        return [self.grids[index] for index in maps] or None, images

    def problem(self, count: int) -> str | None:
        """Why the model cannot run on a sample of `count` by itself."""
        if self.images is not None or not isinstance(self.pixels, Tensor) or count == 1 or self.pixels.shape[0] in (1, count):
            return None
        return (
            "inputs must be of one sample if it is unknown which pixel_values, such as tiles of images, belong to which; "
            f"got {count} samples and pixel_values {tuple(self.pixels.shape)}. Pass them one by one in dataset"
        )


def _asked(words: Words, inputs: Mapping[str, Any], text: Tensor | None) -> Tensor:
    """The words that the caller allows to be removed, among those of `text`."""
    ids, removable = inputs["input_ids"], words(inputs)
    if not isinstance(removable, Tensor) or removable.shape != ids.shape or removable.dtype != torch.bool:
        raise ValueError(f"words must return bool (B, N) = {tuple(ids.shape)}; got {describe(removable)}")
    return removable.cpu() if text is None else removable.cpu() & text


def _shown_words(adapter: Adapter | None, inputs: Mapping[str, Any], shown: Any) -> Tensor | None:
    """bool (B, N), True = a word, as the `.text` of an explanation has them; None without."""
    ids, positions = inputs.get("input_ids"), getattr(shown, "text_positions", None)
    if not isinstance(ids, Tensor) or positions is None:
        return None
    # If patches come before the words, positions count from the first patch.
    towers = () if adapter is None else adapter.towers
    text_rows = [(tower.kind, shown.relevancy[tower.name]) for tower in towers if tower.kind.text]
    before = sum(kind(inputs, (len(positions), carried.shape[-1])).before for kind, carried in text_rows)
    words = torch.zeros(len(positions), ids.shape[-1], dtype=torch.bool)
    for number, columns in enumerate(positions):
        words[number, torch.tensor(columns, dtype=torch.long) - before] = True
    return words


def _inner_words(adapter: Adapter | None, inputs: Mapping[str, Any]) -> Tensor | None:
    """bool (B, N) without an adapter: all but padding and the first and last token, such as [CLS] and [SEP]."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or (adapter is not None and adapter.towers):
        return None
    real = mask.bool().cpu() if isinstance(mask, Tensor) else torch.ones(ids.shape, dtype=torch.bool)
    place = real.cumsum(1)
    return real & (place > 1) & (place < place[:, -1:])


def _entries(texts: list[Tensor], number: int, columns: Tensor) -> dict[int, list[Tensor]]:
    """The indices of a sample's columns in its vector of `.text`, by the width of the vector, which has an entry for each word of
    one of the masks `texts`, with zeros after shorter texts, or for each column of `input_ids`."""
    by_width: dict[int, list[Tensor]] = {}
    for mask in [*texts, torch.ones_like(texts[0])]:
        same_width = by_width.setdefault(int(mask.sum(1).max()), [])
        entries = (mask[number].cumsum(0) - 1)[columns]
        if bool(mask[number][columns].all()) and not any(torch.equal(entries, one) for one in same_width):
            same_width.append(entries)
    return by_width


def _images(pixels: Any, grids: list[tuple[int, int]], counts: list[int], inputs: Mapping[str, Any]) -> list[list[int]] | None:
    """The numbers of the images in `pixel_values` that each map belongs to; None if their patches cannot be told apart. Each
    sample has `counts` maps. ValueError for an image that is not a whole number of patches."""
    if not isinstance(pixels, Tensor):
        return None
    if pixels.ndim == 2:
        whole = inputs.get("image_grid_thw") is not None and pixels.shape[0] % sum(h * w for h, w in grids) == 0
        return [[number] for number in range(len(grids))] if whole else None
    pixels, real = _image_pixels(inputs)
    if real is not None and real.sum(1).tolist() != counts:
        return None
    if pixels.ndim != 4 or (images := _images_of_maps(grids, len(pixels))) is None:
        return None
    shapes = [min(grids) if len(grids) < len(pixels) else grid for grid, rows in zip(grids, images, strict=True) for _ in rows]
    for (height, width), (h, w) in zip(_real_sizes(pixels, real, inputs), shapes, strict=True):
        if height % h or width % w:
            raise ValueError(f"pixel_values must be a whole number of patches, {h} x {w}; got {height} x {width} pixels")
    return images


def _images_of_maps(grids: list[tuple[int, int]], count: int) -> list[list[int]] | None:
    """The numbers of the images, among `count`, that each map belongs to: one each, or crops of the smallest map's shape joined
    row by row. None if they do not add up."""
    height, width = min(grids)
    joined = [1 if count == len(grids) else (h // height) * (w // width) for h, w in grids]
    if sum(joined) != count or (count != len(grids) and any(h % height or w % width for h, w in grids)):
        return None
    ends = list(accumulate(joined))
    return [list(range(end - size, end)) for size, end in zip(joined, ends, strict=True)]


def _real_regions(inputs: Mapping[str, Any], number: int) -> Tensor | None:
    for name, mask in _MASKS_OF_REGIONS.items():
        features, real = inputs.get(name), inputs.get(mask)
        if isinstance(features, Tensor):
            return torch.arange(features.shape[1]) if real is None else real[number].bool().nonzero()[:, 0].cpu()
    return None


def _sample_inputs(inputs: Mapping[str, Any], number: int, count: int, images: list[int] | None) -> dict[str, Any]:
    """The inputs of one sample of `count`, with its images if they are known."""
    single = dict(inputs)
    grid = inputs.get("image_grid_thw")
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue
        if name == "pixel_values" and value.ndim == 2 and grid is not None and images is not None:
            parts = value.split(grid.prod(-1).tolist())
            single[name] = torch.cat([parts[index] for index in images])
        elif name in _IMAGES and images is not None:
            single[name] = value[images]
        elif value.shape[0] == count:
            single[name] = value[number : number + 1]
    return single
