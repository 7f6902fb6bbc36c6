"""Calls of relevancy_residual to compile: CLIP's residual stream, every dtype, every weighting, and rows of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vlattn_fast.backends.inputs import ResidualWeightsInputs
from vlattn_fast.backends.reference.relevancy_residual import BY_ROWS
from vlattn_fast.kernels import relevancy_residual


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        yield f"contribution {name} 1024", lambda dtype=dtype: run(dtype, 1024)
    for weighting in BY_ROWS[1:]:
        yield f"{weighting} bf16 1024", lambda weighting=weighting: run(torch.bfloat16, 1024, weighting)
    yield "contribution bf16 256", lambda: run(torch.bfloat16, 256)


def run(dtype: torch.dtype, features: int, weighting: str = "contribution") -> None:
    residual, branch, grad = (torch.empty(2, 577, features, dtype=dtype) for _ in range(3))
    relevancy_residual.backward(ResidualWeightsInputs(residual, branch, grad, weighting, "triton"))
