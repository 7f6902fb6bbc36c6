"""Inputs, masks and the comparison that the tests of congruence_loss on every kernel share."""

from __future__ import annotations

from typing import Any

import torch
from compare import assert_all_close_to
from torch import Tensor

import vlattn_fast as va

NAMES = ("text_query", "text_key", "image_query", "image_key")
CROSS = ("cross_text_query", "cross_image_key", "cross_image_query", "cross_text_key")


def make(words: int, regions: int, *, b: int = 1, h: int = 2, d: int = 8, cross: bool = False) -> dict[str, Tensor]:
    return {name: 1.5 * torch.randn(b, h, words if "text" in name else regions, d) for name in NAMES + (CROSS if cross else ())}


def call(fn: Any, **options: Any) -> Any:
    """`fn` of the named tensors, one loss per sample unless the options say otherwise."""

    def run(**x: Tensor) -> Tensor:
        cross = ((x[CROSS[0]], x[CROSS[1]]), (x[CROSS[2]], x[CROSS[3]])) if CROSS[0] in x else None
        given = {"reduction": "none", **options}
        return fn((x["text_query"], x["text_key"]), (x["image_query"], x["image_key"]), cross, **given)

    return run


def check(backend: str, x: dict[str, Tensor], **options: Any) -> None:
    """`backend` against the formula."""
    sent = [torch.linspace(0.5, 1.5, x["text_query"].shape[0])]
    run, plain = call(va.congruence_loss, backend=backend, **options), call(va.reference.congruence_loss, **options)
    # one token attends to itself with weight 1, and scale 0 makes all maps uniform: what cancels is of the size of logarithms
    cancels = min(x["text_query"].shape[2], x["image_query"].shape[2]) == 1 or options.get("scale") == 0.0
    scales = dict.fromkeys(("out0", *(f"grad {name}" for name in x)), 10.0) if cancels else None
    assert_all_close_to(run, plain, x, sent, what=str(options.get("direction", "both")), scales=scales)


def prefix(size: int, *lengths: int) -> Tensor:
    return torch.arange(size) < torch.tensor(lengths)[:, None]


def masks(name: str) -> dict[str, Tensor]:
    """Of three samples with 15 words and 20 regions."""
    if name == "ragged":
        return {"text_mask": prefix(15, 15, 9, 1), "image_mask": prefix(20, 17, 1, 20)}
    if name == "scattered":  # the first token is not a real one
        words, regions = torch.rand(3, 15) > 0.4, torch.rand(3, 20) > 0.4
        words[:, 0], words[:, 2], regions[:, 0], regions[:, 3] = False, True, False, True
        return {"text_mask": words, "image_mask": regions}
    if name == "text only":
        return {"text_mask": prefix(15, 11, 0, 7)}
    return {"text_mask": prefix(15, 0, 15, 13), "image_mask": prefix(20, 20, 0, 17)}
