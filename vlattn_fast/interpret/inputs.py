"""The inputs of one run: copied, paired image with text, and asked which tokens are real."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.interpret.families import Family, Tower

_IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
_TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


def prepare_inputs(
    model: nn.Module, inputs: Mapping[str, Any], family: Family, target: Any
) -> tuple[dict[str, Any], list[int] | None]:
    """Keyword arguments for the model, and for "pair" families the text that each row stands for.

    One image with T texts becomes T pairs, as in the notebook of Chefer et al.; a target picks the text of each image.

    Raises:
        TypeError: `inputs` is no mapping.
        ValueError: images and texts cannot be paired, or a target is out of range.
    """
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs: expected a mapping of the model's keyword arguments, got {type(inputs).__name__}")
    if inputs.get("output_attentions"):
        raise ValueError("inputs: output_attentions asks for the stored maps that explain does without; leave it out")
    if inputs.get("past_key_values") is not None:
        raise ValueError("inputs: past_key_values hides part of the sequence; relevancy needs all of it in one forward pass")
    # Tensors made under inference mode cannot be saved for a backward pass; a copy made outside of it can.
    given = {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in inputs.items()}
    accepted = inspect.signature(model.forward).parameters
    if hasattr(model, "config") and hasattr(model.config, "return_dict"):
        given["return_dict"] = True
    if family.score == "token" or "use_cache" in accepted:
        given["use_cache"] = False
    if family.score == "token" and not callable(target) and "logits_to_keep" in accepted:
        # Logits of the whole prompt are large and only one row of them is asked for.
        sequence = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        given.pop("labels", None)
        given["logits_to_keep"] = last_real(family.towers[0], given, tuple(sequence.shape[:2])).unique()
    if family.score != "pair" or callable(target):
        return given, None
    return _paired(given, target)


def _paired(given: dict[str, Any], target: Any) -> tuple[dict[str, Any], list[int]]:
    for name in ("pixel_values", "input_ids"):
        if not isinstance(given.get(name), Tensor):
            raise ValueError(f"inputs: '{name}' is missing; the similarity of an image and a text needs both")
    images, texts = given["pixel_values"].shape[0], given["input_ids"].shape[0]
    if target is not None:
        chosen = indices(target, images, texts, "texts")
        rows = list(range(images))
    elif images == texts or images == 1 or texts == 1:
        count = max(images, texts)
        rows = list(range(count)) if images == count else [0] * count
        chosen = list(range(count)) if texts == count else [0] * count
    else:
        counts = f"{images} images and {texts} texts"
        raise ValueError(f"inputs: {counts} cannot be paired; give as many of each, one image, or a target")
    for names, picked, size in ((_IMAGE_INPUTS, rows, images), (_TEXT_INPUTS, chosen, texts)):
        if picked == list(range(size)):
            continue
        for name in names:
            if isinstance(given.get(name), Tensor) and given[name].shape[0] == size:
                given[name] = given[name][picked]
    return given, chosen


def indices(target: Any, batch: int, size: int, what: str) -> list[int]:
    """`target` as one index per row: an int for all, or (B,) ints.

    Raises:
        TypeError: neither an int nor a sequence or tensor of ints.
        ValueError: wrong count, or an index outside 0 ... size - 1.
    """
    if hasattr(target, "tolist"):  # torch's and NumPy's tensors and scalars
        target = target.tolist()
    chosen = [target] * batch if isinstance(target, int) else target
    if not isinstance(chosen, (list, tuple)) or not all(isinstance(i, int) and not isinstance(i, bool) for i in chosen):
        raise TypeError(f"target: expected None, an int, (B,) ints or a callable, got {target!r}")
    if len(chosen) != batch:
        raise ValueError(f"target: expected one index or {batch} of them (one per row), got {len(chosen)}")
    for index in chosen:
        if not 0 <= index < size:
            raise ValueError(f"target: expected indices from 0 to {size - 1} ({what}), got {index}")
    return list(chosen)


def real_tokens(tower: Tower, inputs: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """bool (B, N), True = a real token and no padding; None where all tokens are real."""
    if tower.tokens == "patches":
        return None
    mask = inputs.get("attention_mask")
    if tower.tokens == "regions":
        ids, regions, region_mask = inputs["input_ids"], inputs["region_features"], inputs.get("region_mask")
        words = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        boxes = words.new_ones(regions.shape[:2]) if region_mask is None else region_mask.bool()
        return torch.cat([words, boxes], dim=1)
    if isinstance(mask, Tensor) and mask.shape == shape:
        return mask.bool()
    if mask is None:
        return None
    got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(f"inputs: attention_mask must be (B, N) = {shape}, got {got}")


def last_real(tower: Tower, inputs: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
    """The last real position (B,) of a decoder's sequence: the one that predicts the next token."""
    real = real_tokens(tower, inputs, shape)
    if real is None:
        return torch.full((shape[0],), shape[1] - 1)
    if not bool(real.any(-1).all()):
        raise ValueError("inputs: attention_mask has a row without a real token")
    return shape[1] - 1 - real.flip(-1).int().argmax(-1)
