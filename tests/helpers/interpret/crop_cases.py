"""Decoders whose processors cut photos into crops: tiny models, and prompts of photos as the family's processor makes them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers as t
from torch import Tensor

from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.decoder_cases import DECODERS, IMAGE, VOCABULARY, Decoder, image, words
from tests.helpers.interpret.decoder_cases import mllama as of_mllama
from tests.helpers.releases import LLAMA4_FAILS

TILE = {"height": 32, "width": 32}


@dataclass(frozen=True)
class Crops:
    """Args:
    model: a decoder.
    inputs: the inputs of a prompt with these photos.
    maps: of each photo of the tests.
    language, states: the module that gets states of tokens, and their name.
    """

    model: torch.nn.Module
    inputs: Callable[[Sequence[Any]], dict[str, Any]]
    maps: int = 2
    vision: str = "model.vision_tower"
    language: str = "model.language_model"
    states: str = "inputs_embeds"


def _made(prompt: list[int], **images: Any) -> dict[str, Any]:
    ids = torch.tensor([prompt])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}


def _model(name: str) -> Decoder:
    torch.manual_seed(0)
    decoder = {**DECODERS, "mllama": of_mllama}[name]()
    lively(decoder.model).eval()
    return decoder


def internvl() -> Crops:
    processor = t.GotOcr2ImageProcessorPil(size=TILE, crop_to_patches=True, max_patches=12)

    def inputs(photos: Sequence[Any]) -> dict[str, Any]:
        made = processor(list(photos), return_tensors="pt")
        runs = [[*image(4 * count), 6] for count in made["num_patches"].tolist()]
        return _made([1, 5, *sum(runs, []), *words(4, 20)], pixel_values=made["pixel_values"])

    return Crops(_model("InternVLForConditionalGeneration").model, inputs)


def gemma3() -> Crops:
    processor = t.Gemma3ImageProcessorPil(
        size=TILE,
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=16,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )

    def inputs(photos: Sequence[Any]) -> dict[str, Any]:
        made = processor(list(photos), return_tensors="pt")
        parts = [[10, *image(4), 11, *[12, *image(4), 13] * count] for count in made["num_crops"].tolist()]
        made = _made([1, *sum(parts, []), *words(4, 20)], pixel_values=made["pixel_values"])
        return {**made, "token_type_ids": (made["input_ids"] == IMAGE).long()}

    return Crops(_model("Gemma3ForConditionalGeneration").model, inputs)


def _llava(name: str, processor: Any) -> Crops:
    model = _model(name).model

    def inputs(photos: Sequence[Any]) -> dict[str, Any]:
        made = dict(processor(list(photos), return_tensors="pt"))
        made.pop("batch_num_images", None)
        with torch.no_grad():  # the model tells how many tokens it makes
            found = model.model.get_image_features(**made, return_dict=True).pooler_output
        parts = [[*image(len(part)), 6] for part in found]
        return _made([1, *sum(parts, []), *words(4, 20)], **made)

    return Crops(model, inputs)


_PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def llava_next() -> Crops:
    sizes = {"size": {"shortest_edge": 32}, "crop_size": TILE, "image_grid_pinpoints": _PINPOINTS}
    return _llava("LlavaNextForConditionalGeneration", t.LlavaNextImageProcessorPil(**sizes))


def llava_onevision() -> Crops:
    processor = t.LlavaOnevisionImageProcessorPil(size=TILE, image_grid_pinpoints=_PINPOINTS)
    return _llava("LlavaOnevisionForConditionalGeneration", processor)


def _labelled(name: str, processor: Any) -> Crops:
    def inputs(photos: Sequence[Any]) -> dict[str, Any]:
        made = dict(processor([list(photos)], return_tensors="pt", return_row_col_info=True))
        (rows,), (columns,) = made.pop("rows"), made.pop("cols")
        prompt = [1]
        for down, along in zip(rows, columns, strict=True):
            for row in range(down):
                for column in range(along):
                    prompt += [90, 40 + 6 * row + column, *image(4)]
                prompt += [89]
            prompt += [88] * (down > 0) + [90, 80, *image(4), 90]
        return _made([*prompt, *words(4, 20)], **made)

    return Crops(_model(name).model, inputs, vision="model.vision_model", language="model.text_model")


def idefics3() -> Crops:
    processor = t.Idefics3ImageProcessorPil(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    return _labelled("Idefics3ForConditionalGeneration", processor)


def smolvlm() -> Crops:
    processor = t.SmolVLMImageProcessorPil(size={"longest_edge": 128}, max_image_size={"longest_edge": 32})
    return _labelled("SmolVLMForConditionalGeneration", processor)


def mllama() -> Crops:
    processor = t.MllamaImageProcessorPil(size=TILE, max_image_tiles=2)

    def inputs(photos: Sequence[Any]) -> dict[str, Any]:
        made = dict(processor([list(photos)], return_tensors="pt"))
        made.pop("num_tiles")
        made = _made([1, *[VOCABULARY] * len(photos), *words(5, 20)], **made)
        after = (made["input_ids"] == VOCABULARY).cumsum(1).clamp(max=1)[:, :, None, None]
        return {**made, "cross_attention_mask": after * made["aspect_ratio_mask"][:, None]}

    model = _model("mllama").model
    return Crops(model, inputs, maps=1, vision="model.vision_model", states="cross_attention_states")


def llama4_tiles(picture: Any, side: int = 32, most: int = 16) -> tuple[Tensor, tuple[int, int]]:
    """Tiles and a thumbnail of a photo as Llama 4's processor makes them, which runs with torchvision alone, and their rows and
    columns. The canvas of tiles is the one onto which the photo fits with the least scaling up, else with the least scaling down;
    the photo fills its upper left corner and is scaled up to no more than one tile, and the rest is black."""
    width, height = picture.size
    grids = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
    scales = {grid: min(grid[0] * side / height, grid[1] * side / width) for grid in grids}
    larger = [scale for scale in scales.values() if scale >= 1]
    chosen = min(larger) if larger else max(scales.values())
    rows, columns = min((grid for grid in grids if scales[grid] == chosen), key=math.prod)
    limits = [min(max(size, side), count * side) for size, count in ((height, rows), (width, columns))]
    scale = min(limits[0] / height, limits[1] / width)
    canvas = np.zeros((rows * side, columns * side, 3), np.uint8)
    scaled = np.asarray(picture.resize((math.floor(width * scale), math.floor(height * scale))))
    canvas[: scaled.shape[0], : scaled.shape[1]] = scaled
    parts = [canvas[y : y + side, x : x + side] for y in range(0, rows * side, side) for x in range(0, columns * side, side)]
    if len(parts) > 1:
        parts.append(np.asarray(picture.resize((side, side))))
    return torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2) / 127.5 - 1, (rows, columns)


def llama4() -> Crops:
    def inputs(photos: Sequence[Any]) -> dict[str, Any]:
        prompt, tiles = [1], []
        for picture in photos:
            of_photo, (rows, columns) = llama4_tiles(picture)
            tiles.append(of_photo)
            prompt += [80]
            for _ in range(rows if rows * columns > 1 else 0):
                prompt += [*([*image(4), 81] * columns)[:-1], 82]
            prompt += [83, *image(4), 84]
        return _made([*prompt, *words(4, 20)], pixel_values=torch.cat(tiles))

    model = _model("Llama4ForConditionalGeneration").model
    return Crops(model, inputs, vision="vision_model", language="language_model.model")


CASES: dict[str, Callable[[], Crops]] = {
    "InternVL": internvl,
    "Gemma 3": gemma3,
    "LLaVA-NeXT": llava_next,
    "LLaVA-OneVision": llava_onevision,
    "Idefics 3": idefics3,
    "SmolVLM": smolvlm,
    "Mllama": mllama,
    **({} if LLAMA4_FAILS else {"Llama 4": llama4}),
}
