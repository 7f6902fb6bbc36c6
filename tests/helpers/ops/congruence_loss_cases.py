"""Inputs, masks and the comparison of congruence_loss, on any backend."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import assert_all_close_to
from vlattn_fast.ops.congruence_loss import KINDS, NORMALIZATIONS

FORMS = {
    f"{kind} {normalize}": {"kind": kind, "normalize": normalize} for kind, normalize in itertools.product(KINDS, NORMALIZATIONS)
}
NAMES = ("text_query", "text_key", "image_query", "image_key")
CROSS = ("cross_text_query", "cross_image_key", "cross_image_query", "cross_text_key")


def make(L: int, V: int, *, b: int = 1, h: int = 2, d: int = 8, cross: bool = False) -> dict[str, Tensor]:
    """Float64 queries and keys by name, of L text tokens and V image tokens."""
    names = NAMES + (CROSS if cross else ())
    return {name: 1.5 * torch.randn(b, h, L if "text" in name else V, d, dtype=torch.float64) for name in names}


def call(fn: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """`fn` of the named tensors, one loss per sample unless the options say otherwise."""
    options = {"reduction": "none", **options}

    def run(**x: Tensor) -> Tensor:
        cross = ((x[CROSS[0]], x[CROSS[1]]), (x[CROSS[2]], x[CROSS[3]])) if CROSS[0] in x else None
        return fn((x["text_query"], x["text_key"]), (x["image_query"], x["image_key"]), cross, **options)

    return run


def check(backend: str, x: dict[str, Tensor], cotangent: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    """Losses and gradients of `backend` against the formula's; nothing that goes in is written to."""
    before = {name: value.clone() for name, value in x.items()}
    cotangent = cotangent_of(x) if cotangent is None else cotangent
    run, plain = call(va.congruence_loss, backend=backend, **options), call(va.reference.congruence_loss, **options)
    # one token attends to itself with weight 1, and scale 0 makes all maps uniform: what cancels is of the size of logarithms
    cancels = min(x["text_query"].shape[2], x["image_query"].shape[2]) == 1 or options.get("scale") == 0.0
    scales = dict.fromkeys(("out0", *(f"grad {name}" for name in x)), 10.0) if cancels else 0.0
    got = assert_all_close_to(run, plain, x, [cotangent], what=str(options.get("direction", "both")), scales=scales)
    assert all(torch.equal(x[name], value) for name, value in before.items())
    return got


def cotangent_of(x: dict[str, Tensor]) -> Tensor:
    """Another one for each sample."""
    return torch.linspace(0.5, 1.5, x["text_query"].shape[0])


def prefix(size: int, *lengths: int) -> Tensor:
    return torch.arange(size) < torch.tensor(lengths)[:, None]


def masks(name: str) -> dict[str, Tensor]:
    """Of three samples with 6 text tokens and 9 image tokens."""
    if name == "ragged":
        return {"text_mask": prefix(6, 6, 4, 1), "image_mask": prefix(9, 7, 1, 9)}
    if name == "scattered":  # the first token is not a real one
        text, image = torch.rand(3, 6) > 0.4, torch.rand(3, 9) > 0.4
        text[:, 0], text[:, 2], image[:, 0], image[:, 3] = False, True, False, True
        return {"text_mask": text, "image_mask": image}
    if name == "text only":
        return {"text_mask": prefix(6, 5, 0, 3)}
    return {"text_mask": prefix(6, 0, 6, 5), "image_mask": prefix(9, 9, 0, 7)}  # "empty samples"
