"""The stage of `explain` before the forward pass: the embeddings of a baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.interpret.adapters.tokens import Text
from vlattn_fast.interpret.explaining.forward_pass import run_traced
from vlattn_fast.interpret.explaining.request import Prompt, Request
from vlattn_fast.interpret.relevancy.embedding_method import BLACK, BLUR, IMAGE_BASELINES, MEAN, PAD, WHITE, BaselineMethod

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id", "image_token_id", "video_token_id")
_BLUR = 1 / 20  # of the shorter side: the standard deviation


def with_baseline(prompt: Prompt, method: BaselineMethod) -> Prompt:
    """The prompt with the embeddings of the method's baseline, from a run without gradients if that is an input."""
    origins = None
    if changed := _changed(prompt, method):
        with torch.no_grad():
            towers = run_traced(replace(prompt, arguments={**prompt.arguments, **changed})).trace.towers
        origins = {tower.name: [part.values.detach() for part in tower.cached] for tower in towers}
    return replace(prompt, origin=partial(method.origin, origins))


def _changed(prompt: Prompt, method: BaselineMethod) -> dict[str, Tensor]:
    """The inputs that the baseline changes; none if it replaces the embeddings."""
    request, inputs, baseline, option = prompt.request, prompt.arguments, method.baseline, method.option
    images = [name for name, value in inputs.items() if _is_image(name, value)]
    words = [name for name in ("input_ids", request.adapter.names[1]) if _are_ids(inputs.get(name))][:1]
    if not isinstance(baseline, Mapping):
        if baseline is None:
            return {}
        if isinstance(baseline, Tensor):
            names = [name for name in images if _fits(baseline, inputs[name])]
        else:
            ids = words or [name for name, value in inputs.items() if _are_ids(value)][:1]
            names = images if baseline in IMAGE_BASELINES else ids
            if not names:
                if method.lenient:
                    return {}
                kind = "an image" if baseline in IMAGE_BASELINES else "token ids"
                raise ValueError(f"inputs must hold {kind} for {option}={baseline!r}; got {[*inputs]}")
        baseline = dict.fromkeys(names, baseline)
    changed = {}
    for name, value in baseline.items():
        whole = inputs.get(name)
        if not isinstance(whole, Tensor):
            raise ValueError(f"{option} must name inputs that are tensors, among {sorted(inputs)}; got {name!r}")
        if isinstance(value, Tensor):
            try:
                changed[name] = value.detach().to(whole).expand_as(whole).contiguous()
            except RuntimeError:
                raise ValueError(f"{option} must broadcast to {name!r} {tuple(whole.shape)}; got {tuple(value.shape)}") from None
        elif value in IMAGE_BASELINES:
            if not _is_image(name, whole):
                raise ValueError(f"{option} must be {value!r} only for an image; got it for {name!r} {tuple(whole.shape)}")
            changed[name] = baseline_image(value, whole, request.processor, option, inputs)
        elif not _are_ids(whole):
            raise ValueError(f"{option} must be a token only for ids (B, N); got {value!r} for {name!r} {tuple(whole.shape)}")
        else:
            changed[name] = _other_words(request, whole, inputs, value, option)
    return changed


def _is_image(name: str, value: Any) -> bool:
    pixels = name.startswith("pixel_values") or (isinstance(value, Tensor) and value.ndim >= 4)
    return isinstance(value, Tensor) and value.is_floating_point() and pixels and not name.endswith("mask")


def _are_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.dtype in (torch.int64, torch.int32)


def _fits(baseline: Tensor, pixels: Tensor) -> bool:
    """Whether a tensor replaces these images, and not embeddings."""
    if baseline.shape == pixels.shape:
        return True
    sizes = zip(reversed(baseline.shape), reversed(pixels.shape), strict=False)
    return 3 <= baseline.ndim <= pixels.ndim and pixels.ndim >= 4 and all(one in (1, size) for one, size in sizes)


# --- images ---


def baseline_image(
    kind: str, pixels: Tensor, processor: Any, option: str = "baseline", inputs: Mapping[str, Any] | None = None
) -> Tensor:
    """Images like `pixels` (..., C, H, W) that are "black", "white", "mean" or "blur". Images that are given as patches
    (patches, features) are in all but "blur": as their smallest and largest number, and the mean of each feature over patches;
    `inputs` tell which patches belong to an image, and which are padding."""
    if pixels.ndim < 4:
        if kind == BLUR:
            allowed = f"{BLACK!r}, {WHITE!r}, {MEAN!r} or a tensor"
            raise ValueError(f"{option} must be {allowed} for images that are given as patches; got {kind!r}")
        fills = {MEAN: lambda image: image.mean(0), BLACK: Tensor.min, WHITE: Tensor.max}
        images = [fills[kind](image[real]).expand_as(image) for image, real in _images_of_patches(pixels, inputs or {})]
        return torch.cat(images).view_as(pixels)
    if kind == MEAN:
        return pixels.mean((-2, -1), keepdim=True).expand_as(pixels).contiguous()
    if kind == BLUR:
        return _blurred(pixels)
    channels = _normalised(0.0 if kind == BLACK else 1.0, processor, pixels)
    if channels is None:
        extremes = pixels.flatten(1).amin(1) if kind == BLACK else pixels.flatten(1).amax(1)
        channels = extremes.view(-1, *[1] * (pixels.ndim - 1))
    return channels.expand_as(pixels).contiguous()


def _images_of_patches(pixels: Tensor, inputs: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The patches (patches, features) of each image, and which of them are no padding, bool (patches,)."""
    mask = inputs.get("pixel_attention_mask")
    real = pixels.new_ones(pixels.shape[:-1], dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == real.shape:
        real = mask.bool() | ~mask.bool().any(-1, keepdim=True)
    if pixels.ndim == 3:
        return zip(pixels, real, strict=True)
    grids = (inputs.get(name) for name in ("image_grid_thw", "video_grid_thw"))
    counts = next(
        (one for grid in grids if grid is not None and sum(one := grid.prod(-1).tolist()) == len(pixels)), [len(pixels)]
    )
    return zip(pixels.split(counts), real.split(counts), strict=True)


def _normalised(value: float, processor: Any, pixels: Tensor) -> Tensor | None:
    """A colour from 0 to 1 as an image processor normalises it, (C, 1, 1); None if it does not say."""
    images = getattr(processor, "image_processor", processor)
    mean, std = getattr(images, "image_mean", None), getattr(images, "image_std", None)
    if mean is None or std is None:
        return None
    if getattr(images, "do_rescale", True) is False:
        value *= 255.0
    elif (factor := getattr(images, "rescale_factor", None)) is not None:
        value *= 255.0 * factor
    mean, std = (torch.as_tensor(part, dtype=pixels.dtype, device=pixels.device).reshape(-1, 1, 1) for part in (mean, std))
    normalised = (value - mean) / std if getattr(images, "do_normalize", True) else torch.full_like(mean, value)
    return normalised if len(normalised) in (1, pixels.shape[-3]) else None


def _blurred(pixels: Tensor) -> Tensor:
    """Under a Gaussian; the edges are repeated outwards."""
    sigma = min(pixels.shape[-2:]) * _BLUR
    radius = max(1, math.ceil(3 * sigma))
    steps = torch.arange(-radius, radius + 1, dtype=pixels.dtype, device=pixels.device)
    weights = (-(steps**2) / (2 * sigma**2)).exp()
    weights = weights / weights.sum()
    flat = nn.functional.pad(pixels.reshape(-1, 1, *pixels.shape[-2:]), (radius,) * 4, mode="replicate")
    rows = nn.functional.conv2d(flat, weights.view(1, 1, 1, -1))
    return nn.functional.conv2d(rows, weights.view(1, 1, -1, 1)).view(pixels.shape)


# --- words ---


def _other_words(request: Request, ids: Tensor, inputs: Mapping[str, Any], value: str | int, option: str) -> Tensor:
    """The ids (B, N) with `value` for words; special tokens, image tokens and padding stay."""
    config = getattr(request.model, "config", None)
    configs = [config, getattr(config, "text_config", None)]
    if value == PAD:
        named = [getattr(one, "pad_token_id", None) for one in (request.tokenizer, *configs)]
        token = next((one for one in named if isinstance(one, int)), None)
        if token is None:
            raise ValueError(f"{option} must be a token's id if neither tokenizer nor config names a padding token; got {PAD!r}")
    else:
        token = int(value)
    special = set(request.special or ()) | {getattr(one, name, None) for one in configs for name in _SPECIAL}
    real = Text(inputs, (ids.shape[0], ids.shape[1])).real()
    special_ids = torch.tensor(sorted(one for one in special if isinstance(one, int)), device=ids.device, dtype=ids.dtype)
    stays = torch.isin(ids, special_ids)
    if real is not None:
        stays |= ~real.to(ids.device)
    return torch.where(stays, ids, torch.full_like(ids, token))
