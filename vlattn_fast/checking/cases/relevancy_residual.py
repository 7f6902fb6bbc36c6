"""Calls of relevancy_residual."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.backends.reference.relevancy_residual import BY_ROWS, WEIGHTINGS
from vlattn_fast.checking.cases._attention import carried
from vlattn_fast.checking.cases._dice import LENGTHS, Dice
from vlattn_fast.checking.cases._example import Example, Sizes, Tensors, normal
from vlattn_fast.ops.relevancy_residual import relevancy_residual

CARRIERS = ("residual_carrier", "branch_carrier")


def _required(sizes: Sizes) -> Tensors:
    stream = torch.randn(sizes.batch, sizes.queries, sizes.features)
    carriers = carried(sizes), carried(sizes) - 1
    return {"residual": stream, "branch": stream + 1, **dict(zip(CARRIERS, carriers, strict=True))}


def examples(sizes: Sizes) -> Iterator[Example]:
    yield Example(relevancy_residual, "", _required(sizes), in_float32=CARRIERS)


def verify(generator: torch.Generator, sizes: Sizes) -> Iterator[Example]:
    randn, stream = normal(generator), (sizes.batch, sizes.queries, 16 * sizes.features + 1)
    tensors = {name: randn(*stream) for name in ("residual", "branch")}
    tensors |= {name: randn(sizes.batch, sizes.rows, sizes.queries) for name in CARRIERS}
    tensors["residual"][0, 0] = tensors["branch"][0, 0] = 0.0  # half of each
    for weighting in BY_ROWS:
        yield Example(relevancy_residual, weighting, tensors, {"weighting": weighting}, in_float32=CARRIERS)


def draw(dice: Dice, dtype: torch.dtype) -> Example:
    batch, tokens, features, rows = (
        dice.pick(name, some)
        for name, some in {"B": (0, 1, 2, 3), "N": LENGTHS, "C": (*LENGTHS, 513), "T": (1, 1, 2, 17)}.items()
    )
    terms = ("residual", "branch")
    tensors = {name: dice.laid_out(name, dice.randn(batch, tokens, features), dtype) for name in terms}
    tensors |= {name: dice.randn(batch, rows, tokens).to(compute_dtype(tensors["residual"])) for name in CARRIERS}
    options = {"weighting": dice.pick("weighting", WEIGHTINGS)}
    return Example(relevancy_residual, "", tensors, options, in_float32=CARRIERS)


def host(sizes: Sizes) -> Iterator[Example]:
    yield Example(relevancy_residual, "", _required(sizes), in_float32=CARRIERS)
