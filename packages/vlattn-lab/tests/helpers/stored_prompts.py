"""Maps of a diffusion model's prompt that are all stored and then added up as published, and those of `prompt_maps`."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import vlattn_lab as lab
from tests.helpers.diffusion_cases import HEIGHT, WIDTH, Case


def stored(case: Case, passes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, int]]:
    """Every softmax (B, H, N, M) of torch's attention in these forward passes, and the number of its pass.

    The outputs are torch's own, so that later calls get what they always do: a deep network enlarges roundings.
    """
    kept: list[tuple[Tensor, int]] = []
    torchs = functional.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        kept.append((scores.softmax(-1), number))
        return torchs(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    number = 0
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(functional, "scaled_dot_product_attention", attention)
        for number, inputs in enumerate(passes):  # noqa: B007 (attention reads it)
            case.model(**inputs)
    return kept


def published(case: Case, kept: list[tuple[Tensor, int]], rows: slice, size=(HEIGHT, WIDTH), mode="bicubic") -> Tensor:
    """(B, L, h, w): maps of every head, layer and step, each enlarged, then their mean."""
    maps = []
    for probabilities, _ in kept:
        cut = case.cut(probabilities)
        if cut is None:
            continue
        attention, grid = cut
        for head in attention[rows].unbind(1):
            heat = head.mT.unflatten(-1, grid)
            maps.append(heat if grid == size else functional.interpolate(heat, size=size, mode=mode))
    return torch.stack(maps).mean(0)


def traced(case: Case, passes: list[dict[str, Any]], **options: Any) -> lab.PromptMaps:
    with torch.no_grad(), lab.prompt_maps(case.model, **{"guidance": "none", **options}) as maps:
        for inputs in passes:
            case.model(**inputs)
    return maps
