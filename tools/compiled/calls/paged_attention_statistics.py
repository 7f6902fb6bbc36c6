"""Calls of paged_attention_statistics to compile: one token of each request and prompts, every dtype, sizes 64 to 256."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vlattn_fast.backends.inputs import PagedAttentionStatisticsInputs
from vlattn_fast.kernels import paged_attention_statistics

BLOCK_SIZE = 16  # keys of a block in vLLM
STATISTICS = "mass entropy maximum received"


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for size in (64, 128, 256):
        yield f"tokens bf16 {size}", lambda d=size: run(torch.bfloat16, d)
        yield f"prompt bf16 {size}", lambda d=size: run(torch.bfloat16, d, tokens=512)
    for dtype, name in ((torch.float16, "fp16"), (torch.float32, "fp32")):
        yield f"tokens {name} 128", lambda dtype=dtype: run(dtype, 128)
        yield f"prompt {name} 128", lambda dtype=dtype: run(dtype, 128, tokens=512)
    yield "prompt softcap window bf16 256", lambda: run(torch.bfloat16, 256, tokens=512, softcap=True, window=4096)  # Gemma-2's
    yield "tokens received bf16 128", lambda: run(torch.bfloat16, 128, groups=0, statistics="received")


def run(
    dtype: torch.dtype,
    size: int,
    *,
    tokens: int = 1,
    groups: int = 3,
    statistics: str = STATISTICS,
    softcap: bool = False,
    window: int = 0,
    requests: int = 4,
    length: int = 1024,
) -> None:
    """At the heads of Llama-3-8B: 32 for queries and 8 for keys. Each request has so many new tokens, and as many keys."""
    columns = length // BLOCK_SIZE
    cache = torch.empty(requests * columns, BLOCK_SIZE, 8, size, dtype=dtype)  # as vLLM keeps it
    inputs = PagedAttentionStatisticsInputs(
        query=torch.empty(requests * tokens, 32, size, dtype=dtype),
        key_cache=cache.transpose(1, 2),
        block_table=torch.arange(requests * columns, dtype=torch.int32).view(requests, columns),
        lengths=torch.full((requests,), length, dtype=torch.int32),
        query_starts=torch.arange(requests + 1, dtype=torch.int32) * tokens,
        key_groups=torch.arange(length).remainder(groups).repeat(requests, 1) if groups else None,
        num_groups=groups,
        statistics=statistics,
        window=window,
        score="dot_softcap" if softcap else "dot",
        parameter=0.0025 if softcap else 0.0,
        scale=50.0 if softcap else 0.125,
        backend="triton",
    )
    paged_attention_statistics.forward(inputs)
