"""The parts of relevancy vectors that belong to images and to words, as fields of an Explanation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.interpret.adapters.connector_maps import Connector, joined
from vlattn_fast.interpret.adapters.image_grids import (
    Layout,
    image_tokens,
    is_ids,
    only_image,
    photos_of,
    square_patches,
    stacked,
)
from vlattn_fast.interpret.adapters.patch_grid import PatchGrid
from vlattn_fast.interpret.adapters.pixels import Shape
from vlattn_fast.interpret.adapters.tokens import Patches, Sounds, Text, Tokens
from vlattn_fast.interpret.explaining.answer import Answer
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace

_IMAGES = ("pixel_values", "pixel_values_videos", "image")
_SOUNDS = ("input_features", "input_values", "audio_values")  # spectrograms and waves
_SUMMARIES = ("qformer", "perceiver", "resampler")  # in names of classes whose learned queries look at a whole image
_INSTEAD = "explain a model whose image tokens are patches, such as LLaVA"


def parts(
    towers: list[TowerTrace],
    arguments: Mapping[str, Any],
    relevancy: Mapping[str, Tensor],
    answer: Answer | None,
    patches: PatchGrid | None,
    special: frozenset[int] | None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Fields of an Explanation from relevancy vectors (B, N), or (B, T, N) with one for each token of an answer; and the tower of
    each field. `patches` is the grid in towers without an adapter, `special` the ids that are not words; None = those that the
    config names."""
    fields: dict[str, Any] = {} if answer is None else {"answer": answer.ids}
    owners: dict[str, str] = {}
    name, patch_fields = patch_maps(patches, towers, arguments, relevancy)
    fields |= patch_fields
    if patch_fields:
        fields["photos"], fields["crops"] = Tokens(arguments, towers[0].shape).photos(len(patch_fields["image_samples"]))
    owners |= dict.fromkeys(patch_fields, name)
    for tower, tokens in tokens_of(towers, arguments, special).items():
        row = relevancy[tower.name]
        if patches is None and (maps := _each(row, tokens.maps)) is not None:
            fields["image"], fields["image_samples"] = maps
            if isinstance(tokens, Sounds):
                fields["seconds"] = tokens.seconds()
            else:
                fields["photos"], fields["crops"] = tokens.photos(len(fields["image_samples"]))
            owners["image"] = tower.name
        if tokens.ids is not None and (words := tokens.words()) is not None:
            placed = nn.functional.pad(tokens.ids, (tokens.before, 0))
            if answer is not None and tower is towers[0]:  # every token of an answer is shown
                words[torch.arange(len(words))[:, None], answer.answer_positions + 1] |= answer.real.to(words.device)
            fields["text"], owners["text"] = gather_words(row, words), tower.name
            fields["text_positions"] = [mask.nonzero()[:, 0].tolist() for mask in words]
            fields["token_ids"] = [one[mask[: len(one)]].tolist() for one, mask in zip(placed, words, strict=True)]
        fields |= (further := tokens.fields(row))
        if "boxes" in further:
            fields["photos"] = list(range(len(row)))
        owners |= dict.fromkeys(further, tower.name)
    if answer is not None and (answer.name != "input_ids" or (towers[0].entry is None and "text" not in fields)):
        fields |= _with_answer(fields, relevancy[towers[0].name], answer)
        owners["text"] = towers[0].name
    return fields, owners


def tokens_of(towers: list[TowerTrace], arguments: Mapping[str, Any], special: frozenset[int] | None) -> dict[TowerTrace, Tokens]:
    """The tokens of the towers whose kind is known."""
    reader = None if special is None else _reads_ids(towers, arguments)
    kinds = {
        tower: Text(arguments, tower.shape) if tower is reader else tower.tokens_in(arguments)
        for tower in towers
        if tower.entry is not None or tower.hears or tower is reader
    }
    return {tower: replace(tokens, special=special) for tower, tokens in kinds.items()}


def _reads_ids(towers: list[TowerTrace], arguments: Mapping[str, Any]) -> TowerTrace | None:
    """The tower without an adapter whose tokens are `input_ids`: the only one of this size, or an encoder among those attended
    to, which come last."""
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if not isinstance(ids, Tensor) or (mask is not None and mask.shape != ids.shape):
        return None
    fitting = [tower for tower in towers if tower.entry is None and tower.shape == tuple(ids.shape)]
    return fitting[-1] if len(fitting) == 1 or "decoder_input_ids" in arguments and fitting else None


def gather_words(relevancy: Tensor, words: Tensor) -> Tensor:
    """Only the entries (B, ..., N) of the words (B, N), left-aligned in (B, ..., L) with zeros after shorter texts."""
    entries = [row[..., mask.to(row.device)] for row, mask in zip(relevancy, words, strict=True)]
    return _padded(entries) if entries else relevancy[..., :0]


def _padded(entries: list[Tensor]) -> Tensor:
    """Rows (..., n) as (B, ..., L), with zeros after shorter ones."""
    return nn.utils.rnn.pad_sequence([row.movedim(-1, 0) for row in entries], batch_first=True).movedim(1, -1)


def _with_answer(fields: Mapping[str, Any], row: Tensor, answer: Answer) -> dict[str, Any]:
    """Fields of text with the answer after that of the encoder, if there is one; `row` (B, N) or (B, T, N) is the decoder's."""
    decoded = [positions[: len(ids)] for positions, ids in zip((answer.answer_positions + 1).tolist(), answer.ids, strict=True)]
    text, before = fields.get("text"), fields.get("token_ids", [[] for _ in decoded])
    if text is not None and text.shape[1:-1] != row.shape[1:-1]:  # relevancy of other layers than the decoder's
        text, before, fields = None, [[] for _ in decoded], {}
    entries = []
    for number, (positions, ids) in enumerate(zip(decoded, before, strict=True)):
        prompt = [] if text is None else [text[number][..., : len(ids)].to(row)]
        entries.append(torch.cat([*prompt, row[number][..., positions]], -1))
    encoded = fields.get("text_positions", before)
    return {
        "text": _padded(entries) if entries else row[..., :0],
        "text_positions": [
            [*prompt_positions, *answer_positions] for prompt_positions, answer_positions in zip(encoded, decoded, strict=True)
        ],
        "token_ids": [[*prompt_ids, *ids] for prompt_ids, ids in zip(before, answer.ids, strict=True)],
    }


def vision_maps(
    row: Tensor,
    connector: Connector,
    config: Any,
    arguments: Mapping[str, Any],
    fields: Mapping[str, Any],
    layouts: Sequence[Layout] | None,
) -> tuple[Tensor, dict[str, Any]]:
    """The relevancy of the vision tower before a connector, (B, [T,] n): all its tokens of a prompt in order, with zeros after
    shorter ones. And `fields`, those of `parts`, with its maps: crops of a photo are joined according to the `layouts` of the
    image tokens. `row` (images, N) or (images, T, N) is as the tower ran."""
    is_image = image_tokens(config, arguments)
    prompts = is_image.nonzero()[:, 0].cpu()
    merged = connector(config, arguments, (row.shape[0], row.shape[-1]), len(prompts))
    flat = row.movedim(0, -2).flatten(-2)  # ([T,] images * N)
    map_prompts = [int(prompts[merged.tokens[index].max()]) for index in merged.maps]
    photos, crops = ([], []) if layouts is None else photos_of(layouts)
    positions = merged.maps
    if len(positions) != len(photos):
        photo_positions = None if layouts is None else joined(merged, layouts)
        if photo_positions is None:
            photos, crops = list(range(len(positions))), [None] * len(positions)
        positions = photo_positions or positions
    maps = stacked([flat[..., index.to(flat.device)] for index in positions])
    image_samples = [int(prompts[merged.tokens[index].max()]) for index in positions]
    vision_fields: dict[str, Any] = {"image": maps, "image_samples": image_samples, "photos": photos, "crops": crops}
    if fields.get("image_samples") == image_samples:
        vision_fields["tower_images"] = {"language": fields["image"]}
    if map_prompts != list(range(len(row))) or len(row) != len(is_image):  # not one image a prompt
        owners = torch.tensor(map_prompts)[merged.owners].to(flat.device)
        row = _padded([flat[..., owners == prompt] for prompt in range(len(is_image))])
    return row, vision_fields


def _each(relevancy: Tensor, cut: Callable[[Tensor], tuple[Any, Any] | None]) -> tuple[Any, Any] | None:
    """`cut` of relevancy (B, N): tensors (or a tuple of them) and metadata. With relevancy (B, T, N) the tensors have a
    dimension T after the first (in a tuple: before the first)."""
    if relevancy.ndim == 2:
        return cut(relevancy)
    single = [cut(one) for one in relevancy.unbind(1)]
    if not single or single[0] is None:
        return None
    values, metadata = [one[0] for one in single if one is not None], single[0][1]
    if isinstance(values[0], tuple):
        return tuple(torch.stack(maps) for maps in zip(*values, strict=True)), metadata
    return torch.stack(values, 1), metadata


# --- patches of a tower that no adapter describes ---


def patch_maps(
    patches: PatchGrid | None, towers: Sequence[TowerTrace], inputs: Mapping[str, Any], relevancy: Mapping[str, Tensor]
) -> tuple[str, dict[str, Any]]:
    """The first tower that has such a grid, and fields of an Explanation with its patches, from relevancy vectors (B, N) or (B,
    T, N). ValueError if the caller asks for a grid, and no tower has it."""
    free = [tower for tower in towers if tower.entry is None or (patches is not None and tower.entry.kind is Patches)]
    if patches is None:  # towers of ids have no patches
        texts = {name: tuple(value.shape) for name, value in inputs.items() if is_ids(value)}
        text_towers = [tower for tower in free if tower.shape in texts.values()]
        shapes = {tower.shape for tower in text_towers}
        inputs = {name: value for name, value in inputs.items() if texts.get(name) not in shapes}
        free = [tower for tower in free if tower not in text_towers]
    for tower in free:
        if tower.grid is not None:
            if (image := _of_pixels(patches, relevancy[tower.name], tower)) is not None:
                return tower.name, {"image": image, "image_samples": list(range(len(image)))}
        elif (grid := _grid_of(patches, tower.size, inputs)) is not None:
            before, (height, width) = grid
            row = relevancy[tower.name]
            maps = row[..., before : before + height * width].reshape(*row.shape[:-1], height, width)
            return tower.name, {"image": maps, "image_samples": list(range(len(row)))}
    if patches is not None:
        sizes = ", ".join(f"'{tower.name}' of {tower.size} tokens" for tower in free)
        raise ValueError(
            f"patches must fit an explained tower, with prefix + rows * columns tokens; got {patches} for "
            f"{sizes or 'towers whose adapter has a grid'}{_fitting(patches, free)}"
        )
    return "", {}


def grid_of_pixels(patches: PatchGrid | None, tower: TowerTrace) -> Shape:
    """Rows and columns of the patches in a tower of pixels. ValueError if nothing tells, or the caller's do not fit."""
    pixels, shape = tower.grid, (patches.shape if patches is not None else None) or tower.patches
    if pixels is None or shape is None or pixels[0] % shape[0] or pixels[1] % shape[1]:
        raise ValueError(
            f"patches must be a va.PatchGrid(rows, columns) that divides the {pixels} pixels of '{tower.name}'; got "
            f"{shape if patches is None else patches}"
        )
    return shape


def _of_pixels(patches: PatchGrid | None, row: Tensor, tower: TowerTrace) -> Tensor | None:
    """A map of the sums over the patches that the caller asks for, or that the model cuts the image into, else of pixels; None
    if these do not fit."""
    pixels = tower.grid or (1, 1)
    height, width = (patches.shape if patches is not None else None) or tower.patches or pixels
    if (patches is not None and patches.prefix) or pixels[0] % height or pixels[1] % width:
        return None
    squares = row.reshape(*row.shape[:-1], height, pixels[0] // height, width, pixels[1] // width)
    return squares.sum((-3, -1))


def _grid_of(patches: PatchGrid | None, count: int, inputs: Mapping[str, Any]) -> tuple[int, Shape] | None:
    """The tokens before the patches and their grid, in a tower of `count` tokens; None if that is not known."""
    if patches is not None and (shape := patches.shape) is not None:
        return (patches.prefix, shape) if count == patches.prefix + math.prod(shape) else None
    if (image := only_image(inputs)) is not None:
        return square_patches(count, image.shape[-2:], None if patches is None else patches.prefix)
    side = 0 if patches is None else math.isqrt(max(0, count - patches.prefix))
    return (patches.prefix, (side, side)) if patches is not None and side and side**2 == count - patches.prefix else None


def _fitting(patches: PatchGrid, towers: Sequence[TowerTrace]) -> str:
    """The prefix that makes the caller's grid fit."""
    before = [tower.size - math.prod(patches.shape) for tower in towers if patches.shape is not None and tower.grid is None]
    return f". prefix={min(fits)} would fit" if (fits := [count for count in before if count >= 0]) else ""


# --- an explanation without a map ---


def why_no_map(
    model: nn.Module, towers: Sequence[TowerTrace], inputs: Mapping[str, Any], fields: Mapping[str, Any]
) -> str | None:
    """Why an explanation with these `fields` has no map; None if it has a map or boxes, or the inputs are only words."""
    if any(fields.get(name) is not None for name in ("image", "tower_images", "boxes")):
        return None
    names = {name for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()}
    if names.intersection(_SOUNDS):
        heard = towers[-1].name  # the encoder, to which the others attend; else the tower that has all tokens
        return (
            "the input is sound, whose tokens are stretches of time and not of an image: explanation.relevancy"
            f"[{heard!r}] has their numbers in the order of time"
        )
    if not names.intersection(_IMAGES) and only_image(inputs) is None:
        return None
    tower = next((tower for tower in towers if tower.entry is not None and tower.entry.kind.image_ids), None)
    if tower is None:
        which = ", ".join(tower.name for tower in towers if tower.entry is None) or ", ".join(t.name for t in towers)
        return (
            f"it is unknown which tokens of {which} are patches of the image, and on which grid: pass "
            "patches=va.PatchGrid(rows, columns, prefix=0)"
        )
    parts = (type(part).__name__ for part in model.modules())
    queries = next((name for name in parts if any(word in name.lower() for word in _SUMMARIES)), None)
    if queries is not None:
        why = f"the image tokens are the learned queries of {queries}, each of which attends to the whole image"
    else:
        why = "neither the config nor the inputs give the grid of the image tokens"
    return f"{why}: their numbers are in explanation.relevancy[{tower.name!r}]. For a map, {_INSTEAD}"
