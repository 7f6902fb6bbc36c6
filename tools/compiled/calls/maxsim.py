"""Calls of maxsim to compile: ColPali's sizes, every dtype, with and without masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vlattn_fast.backends.inputs import MaxsimBackwardInputs, MaxsimInputs
from vlattn_fast.kernels import maxsim


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    yield "bf16 128", lambda: run(torch.bfloat16, 128, False)
    yield "masks bf16 128", lambda: run(torch.bfloat16, 128, True)
    yield "bf16 256", lambda: run(torch.bfloat16, 256, False)
    yield "fp16 128", lambda: run(torch.float16, 128, False)
    yield "fp32 128", lambda: run(torch.float32, 128, True)
    yield "fp32 256", lambda: run(torch.float32, 256, False)


def run(dtype: torch.dtype, size: int, masked: bool) -> None:
    """Forward and backward; a query has 32 tokens, a page 1,030 patches."""
    queries, documents = torch.empty(3, 32, size, dtype=dtype), torch.empty(2, 1030, size, dtype=dtype)
    mask = torch.ones(2, 1030, dtype=torch.bool) if masked else None
    inputs = MaxsimInputs(queries=queries, documents=documents, query_mask=None, document_mask=mask, saves=True, backend="triton")
    similarity, places = maxsim.forward(inputs)
    backward = MaxsimBackwardInputs(
        grad_similarity=similarity, queries=queries, documents=documents, places=places, backend="triton"
    )
    maxsim.backward(backward)
