"""Which tokens of the inputs are real."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.interpret.records.image_grids import patch_shape
from vlattn_fast.interpret.records.record import Tokens


def real_tokens(tokens: Tokens | None, inputs: Mapping[str, Any], shape: tuple[int, int], config: Any = None) -> Tensor | None:
    """bool (B, N), True = a real token and no padding; None where all tokens are real, or nothing tells.

    Args:
        tokens: what a tower's record says that its tokens are; None without a record.
        shape: (B, N) of the tower.
        config: of the tower, which tells the size of a patch where images are padded.
    """
    if tokens in ("patches", "boxes", "features", "queries", "image"):
        return None
    mask = inputs.get("decoder_attention_mask" if tokens == "decoded" else "attention_mask")
    if tokens == "packed_patches":
        mask = inputs.get("pixel_attention_mask")
        return mask.bool() if isinstance(mask, Tensor) else None
    if tokens in ("regions", "text_patches", "patches_text"):
        words = real_words(inputs)
        if tokens == "regions":
            region_mask = inputs.get(region_names(inputs)[1])
            seen = words.new_ones(shape[0], shape[1] - words.shape[1]) if region_mask is None else region_mask.bool()
        else:
            seen = _real_patches(inputs, (shape[0], shape[1] - words.shape[1]), config).to(words.device)
        return torch.cat([seen, words] if tokens == "patches_text" else [words, seen], dim=1)
    if isinstance(mask, Tensor) and mask.shape == shape:
        return mask.bool()
    if mask is None or tokens is None:
        return None
    got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(f"attention_mask must have shape (B, N) = {shape}; got {got}")


def decoder_inputs(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the decoder of an encoder-decoder gets, under the names of a decoder's inputs; `inputs` themselves of other models."""
    return {name.removeprefix("decoder_"): inputs[name] for name in inputs if name.startswith("decoder_")} or inputs


def real_words(inputs: Mapping[str, Any]) -> Tensor:
    """bool (B, T), True = a real token of the text; CLIP-like inputs may have several texts an image."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def before_sep(inputs: Mapping[str, Any]) -> Tensor:
    """(B,) the token before the text's last real one."""
    return (real_words(inputs).sum(-1) - 2).clamp(min=0)


def region_names(inputs: Mapping[str, Any]) -> tuple[str, str]:
    """What the features of image regions and their mask are called: UNITER's names here, VisualBERT's in transformers."""
    return ("visual_embeds", "visual_attention_mask") if "visual_embeds" in inputs else ("region_features", "region_mask")


def padded_grids(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]]:
    """Rows and columns of patches of each image; `pixel_mask` (B, height, width) says what of it is padding."""
    return real_grids(inputs, patch_shape(config, inputs["pixel_values"].shape[-2:]))


def real_grids(inputs: Mapping[str, Any], grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows and columns of each image's part of a grid that lies over the padded images."""
    mask = inputs.get("pixel_mask")
    if mask is None:
        return [grid] * len(inputs["pixel_values"])
    mask = nn.functional.interpolate(mask[:, None].float(), size=grid)[:, 0].bool()  # as ViLT and DETR take it
    return [(int(each[:, 0].sum()), int(each[0].sum())) for each in mask]


def _real_patches(inputs: Mapping[str, Any], shape: tuple[int, int], config: Any) -> Tensor:
    """bool (B, image tokens): what stands before the patches is real."""
    real = torch.ones(shape, dtype=torch.bool)
    if config is not None and inputs.get("pixel_mask") is not None:
        grids = padded_grids(inputs, config)
        padding = max((height * width for height, width in grids), default=0)
        for row, (height, width) in zip(real, grids, strict=True):
            row[shape[1] - padding + height * width :] = False
    return real


def last_real(tokens: Tokens | None, inputs: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
    """The last real position (B,) of a sequence: the one that predicts a decoder's next token."""
    real = real_tokens(tokens, inputs, shape)
    if real is None:
        return torch.full((shape[0],), shape[1] - 1)
    words = real_words(inputs) if tokens == "patches_text" else real  # patches are real in each row
    if not bool(words.any(-1).all()):
        raise ValueError("attention_mask must have a real token in each row; got a row of padding alone")
    return shape[1] - 1 - real.flip(-1).int().argmax(-1)
