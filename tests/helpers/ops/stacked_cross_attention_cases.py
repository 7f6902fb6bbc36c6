"""Inputs and the comparison of stacked_cross_attention, on any backend."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to

RAGGED = {"caption_lengths": (9, 1, 0, 5), "image_lengths": (7, 0, 3)}  # of 3 images of 7 regions and 4 captions of 9 words


def tensors(
    sets: tuple[int, int] = (3, 4), regions: int = 7, words: int = 9, size: int = 12, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """images (Bi, R, D) and captions (Bc, T, D) of unit vectors."""
    images = torch.randn(sets[0], regions, size, dtype=torch.float64)
    captions = torch.randn(sets[1], words, size, dtype=torch.float64)
    unit = partial(torch.nn.functional.normalize, dim=-1)
    return as_dtype({"images": unit(images), "captions": unit(captions)}, dtype)


def check(
    backend: str,
    inputs: dict[str, Tensor],
    call: str = "stacked_cross_attention",
    score: Callable[..., Any] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Similarities and gradients of `backend` against the formula's. No input is written to. Tuples become tensors. `score` makes
    a score of those inputs that are not images and captions."""
    options = {name: torch.tensor(x) if isinstance(x, tuple) else x for name, x in options.items()}
    given = {name: x for name, x in (inputs | options).items() if isinstance(x, Tensor)}
    before = {name: x.clone() for name, x in given.items()}

    def run(fn: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
        def on(images: Tensor, captions: Tensor, **parameters: Tensor) -> Tensor:
            return fn(images, captions, **options, **({} if score is None else {"score": score(**parameters)}))

        return on

    got = assert_all_close_to(
        run(getattr(va, call), **options, backend=backend),
        run(getattr(va.reference, call), **options),
        inputs,
        [torch.randn(len(inputs["images"]), len(inputs["captions"]))],
    )
    assert all(torch.equal(given[name], x) for name, x in before.items())
    assert all(x.isfinite().all() for x in got.values())
    return got


def random_lengths(sets: Tensor, least: int = 1) -> Tensor:
    """How many rows of each set are real."""
    return torch.randint(least, sets.shape[1] + 1, (len(sets),))
