"""Which rows of the relevancy matrix are read, and which of their entries are patches and words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.interpret.records.image_grids import image_tokens, patch_shape
from vlattn_fast.interpret.records.record import Tower
from vlattn_fast.interpret.records.tokens import last_real, padded_grids, real_grids, real_tokens, real_words
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace


def end_of_text(tower: TowerTrace, inputs: Mapping[str, Any]) -> Tensor:
    """(B,) the position CLIP pools: the first end-of-text token, which old configs (eos_token_id 2) take as the largest id; the
    last real token where neither model nor config names it."""
    ids = _ids(inputs)
    if ids is None:
        raise ValueError("inputs must contain 'input_ids', where CLIP's end-of-text token is searched; got none")
    eos = getattr(tower.model, "eos_token_id", getattr(tower.config, "eos_token_id", None))
    if eos is None:
        return last_real(tower.tokens, inputs, tower.shape)
    return ids.int().argmax(-1) if eos == 2 else torch.isin(ids, torch.as_tensor(eos, device=ids.device)).int().argmax(-1)


def prefix_tokens(tower: Tower, config: Any) -> int:
    """Tokens before the patches: CLS and registers."""
    return tower.prefix + (getattr(config, "num_register_tokens", 0) or 0)


# --- words ---


def word_positions(tower: TowerTrace, config: Any, inputs: Mapping[str, Any], ids: Tensor) -> Tensor | None:
    """bool (B, N), True = a word: no special token, no padding, no image token. None where the tower has no text."""
    if tower.tokens in ("patches", "packed_patches", "image", "boxes", "features", "queries", "decoded"):
        return None
    if tower.tokens == "clip_text":
        position = torch.arange(ids.shape[1], device=ids.device)
        return (position > 0) & (position < end_of_text(tower, inputs).to(ids.device)[:, None])
    if tower.tokens == "patches_text":
        real: Tensor | None = real_words(inputs)
    else:
        real = real_tokens(tower.tokens, inputs, tower.shape)
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real[:, : ids.shape[1]].to(ids.device)
    predicts = tower.record is not None and tower.record.readout == "target"
    if tower.tokens in ("bert_text", "regions", "text_patches", "patches_text") and not predicts:
        # BERT's config does not name [SEP], but every sequence ends with it; [CLS] comes first.
        last = ids.shape[1] - 1 - real.flip(-1).int().argmax(-1)
        words = real & (ids != ids.gather(1, last[:, None]))
        words[:, 0] = False
    else:
        words = real & ~torch.isin(ids, torch.tensor(sorted(_special_ids(config)), device=ids.device))
    if (images := tower.size - words.shape[1]) > 0:
        words = nn.functional.pad(words, (images, 0) if tower.tokens == "patches_text" else (0, images))
    return words


def _special_ids(config: Any) -> set[int]:
    names = ["bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "video_token_id"]
    names += ["vision_start_token_id", "vision_end_token_id", "boi_token_id", "eoi_token_id"]
    ids: set[int] = set()
    for part in (config, getattr(config, "text_config", None)):
        for name in names:
            value = getattr(part, name, None)
            ids.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return ids


def gather_words(relevancy: Tensor, words: Tensor) -> Tensor:
    """The entries (B, ..., N) of the words (B, N) alone, left-aligned in (B, ..., L) with zeros behind shorter texts."""
    rows = [row[..., mask.to(row.device)].movedim(-1, 0) for row, mask in zip(relevancy, words, strict=True)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).movedim(1, -1) if rows else relevancy[..., :0]


def _ids(inputs: Mapping[str, Any]) -> Tensor | None:
    ids = inputs.get("input_ids")
    return ids.view(-1, ids.shape[-1]) if isinstance(ids, Tensor) else None


# --- patches ---


Maps = tuple[Tensor | tuple[Tensor, ...], list[int]]


def image_maps(tower: Tower, config: Any, inputs: Mapping[str, Any], relevancy: Tensor) -> Maps | None:
    """The patch entries of relevancy (B, N) on their grids, and the row each grid belongs to.

    Returns:
        Maps (B, h, w); with several maps in a prompt (images, h, w) in the order of the prompts; a tuple of (h, w) where
        grids differ. None where the tower has no image, or its tokens have no place in it.
    """
    if tower.tokens == "patches":
        height, width = patch_shape(config, inputs["pixel_values"].shape[-2:])
        patches = relevancy[:, prefix_tokens(tower, config) :]
        if patches.shape[1] != height * width:
            raise ValueError(f"pixel_values must give {patches.shape[1]} patches, as the tower has; got {height} x {width}")
        return patches.reshape(-1, height, width), list(range(len(patches)))
    if tower.tokens in ("packed_patches", "text_patches", "patches_text"):
        return _joint_maps(tower, config, inputs, relevancy)
    if tower.tokens == "features":
        return None if inputs.get("pixel_values") is None else _feature_maps(inputs, relevancy)
    seen = any(inputs.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
    if tower.grid is None or _ids(inputs) is None or not seen:
        return None
    of_image = image_tokens(config, inputs) if tower.tokens == "image_text" else torch.ones_like(relevancy, dtype=torch.bool)
    flat = relevancy[of_image.to(relevancy.device)]
    layouts = tower.grid(config, inputs)
    sizes = [layout.size for layout in layouts]
    if sum(sizes) != len(flat):
        grids = [tuple(index.shape) for layout in layouts for index in layout.maps]
        raise ValueError(f"inputs must have {sum(sizes)} image tokens for maps {grids}; got {len(flat)}")
    rows = [part.unique().tolist() for part in of_image.nonzero()[:, 0].split(sizes)]
    maps, of_rows = [], []
    for layout, part, row in zip(layouts, flat.split(sizes), rows, strict=True):
        if len(row) != 1:
            raise ValueError(f"inputs must have all tokens of an image in one prompt; got {layout.size} tokens in prompts {row}")
        maps += [part[index.to(part.device)] for index in layout.maps]
        of_rows += row * len(layout.maps)
    alike = len({image.shape for image in maps}) == 1
    return torch.stack(maps) if alike else tuple(maps), of_rows


def _feature_maps(inputs: Mapping[str, Any], relevancy: Tensor) -> Maps:
    """Maps of a backbone's features, without what of them is padding. Their number tells the stride, a power of two."""
    size, count = inputs["pixel_values"].shape[-2:], relevancy.shape[1]
    shapes = [(-(-size[0] // 2**n), -(-size[1] // 2**n)) for n in range(9)]
    shape = next((shape for shape in shapes if shape[0] * shape[1] == count), None)
    if shape is None:
        raise ValueError(f"pixel_values must have {count} features in steps of a power of two; got images of {tuple(size)}")
    grids = real_grids(inputs, shape)
    maps = tuple(row.view(shape)[:height, :width] for row, (height, width) in zip(relevancy, grids, strict=True))
    return torch.stack(maps) if len(set(grids)) == 1 else maps, list(range(len(maps)))


def _joint_maps(tower: Tower, config: Any, inputs: Mapping[str, Any], relevancy: Tensor) -> Maps | None:
    """Maps of images whose patches are padded, or stand before or behind a text."""
    if tower.tokens == "packed_patches":
        patches, grids = relevancy, [(int(h), int(w)) for h, w in inputs["spatial_shapes"].tolist()]
    else:
        if inputs.get("pixel_values") is None or inputs["pixel_values"].ndim != 4:
            return None  # given as embeddings, or frames
        grids, words = padded_grids(inputs, config), inputs["input_ids"].shape[1]
        images = relevancy[:, :-words] if tower.tokens == "patches_text" else relevancy[:, words:]
        patches = images[:, prefix_tokens(tower, config) :]
    if not grids or patches.shape[1] < max(height * width for height, width in grids):
        return None  # no image, or a model that draws some of the patches
    maps = tuple(row[: h * w].reshape(h, w) for row, (h, w) in zip(patches, grids, strict=True))
    return torch.stack(maps) if len(set(grids)) == 1 else maps, list(range(len(maps)))
