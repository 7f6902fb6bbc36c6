"""Inputs, masks and weights that the tests of relevancy_attention and relevancy_step run over."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import assert_all_close_to

RULES = tuple(itertools.product(("gradient", "attention"), (False, True)))  # rule, row_normalize
BACKENDS = ("streaming", "cpu", "triton")


def tensors(
    n: int, *, b: int = 1, h: int = 2, kv: int = 2, d: int = 6, dv: int = 5, rows: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """query, key, value and carrier, which is float32 for 16-bit inputs."""
    shapes = {"query": (b, h, n, d), "key": (b, kv, n, d), "value": (b, kv, n, dv)}
    carrier = torch.rand(b, rows, n, dtype=torch.promote_types(dtype, torch.float32))
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()} | {"carrier": carrier}


def cotangents(inputs: dict[str, Tensor]) -> list[Tensor]:
    """Of the output and of the carrier, in the dtype of sums."""
    b, h, n, _ = inputs["query"].shape
    dtype = inputs["carrier"].dtype
    return [torch.randn(b, h, n, inputs["value"].shape[3], dtype=dtype), torch.rand(inputs["carrier"].shape, dtype=dtype)]


def call(operator: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The operator as a function of named tensors alone."""
    return lambda query, key, value, carrier: operator(query, key, value, carrier, **options)


def check(
    backend: str, inputs: dict[str, Tensor], grads: list[Tensor | None] | None = None, *, what: str = "", **options: Any
) -> dict[str, Tensor]:
    """Output, carrier and every gradient against the formula; those of queries and keys cancel: they are held to the size of
    what was summed."""
    options["enable_gqa"] = inputs["key"].shape[1] != inputs["query"].shape[1]
    return assert_all_close_to(
        call(va.relevancy_attention, backend=backend, **options),
        call(va.reference.relevancy_attention, **options),
        inputs,
        cotangents(inputs) if grads is None else grads,
        what=f"{backend} {what}".strip(),
        scales={"grad query": 1.0, "grad key": 1.0},
    )


# For two samples of n tokens and two heads.
WEIGHTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "none": lambda n: {},
    "numbers": lambda n: {"residual_weight": 0.0, "attention_weight": 2},
    "tensors": lambda n: {"residual_weight": torch.rand(n, 2).T, "attention_weight": torch.randn(2, n)},
}
