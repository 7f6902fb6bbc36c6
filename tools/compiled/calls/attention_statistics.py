"""Calls of attention_statistics to compile: few groups and many, every dtype, head sizes 64 and 128, masks and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vlattn_fast.backends.inputs import Attention, AttentionStatisticsBackwardInputs, AttentionStatisticsInputs
from vlattn_fast.kernels import attention_statistics

NAMES = ("mass", "entropy", "maximum", "argmax", "received")


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for size in (64, 128):
        yield f"2 groups bf16 {size}", lambda d=size: run(2, torch.bfloat16, d)
        yield f"40 groups bf16 {size}", lambda d=size: run(40, torch.bfloat16, d)
        yield f"masked bf16 {size}", lambda d=size: run(2, torch.bfloat16, d, masked=True)
    yield "bias of 8 groups bf16 64", lambda: run(8, torch.bfloat16, 64, biased=True)
    yield "2 groups bf16 160 64", lambda: run(2, torch.bfloat16, 64, n=160)  # UNITER's sizes
    yield "entropy bf16 64", lambda: run(0, torch.bfloat16, 64, only="entropy")
    yield "mass of 2 groups bf16 64", lambda: run(2, torch.bfloat16, 64, only="mass")
    yield "2 groups softcap bf16 64", lambda: run(2, torch.bfloat16, 64, softcap=True)
    yield "2 groups fp16 64", lambda: run(2, torch.float16, 64)
    yield "2 groups fp32 64", lambda: run(2, torch.float32, 64)
    yield "40 groups bf16 256", lambda: run(40, torch.bfloat16, 256)
    yield "2 groups decoding bf16 128", lambda: run(2, torch.bfloat16, 128, n=8192, queries=2, heads=32)


def run(
    groups: int,
    dtype: torch.dtype,
    size: int,
    masked: bool = False,
    only: str | None = None,
    n: int = 577,
    softcap: bool = False,
    queries: int | None = None,
    heads: int = 16,
    biased: bool = False,
) -> None:
    """Forward and backward at the sizes of CLIP ViT-L/14@336."""
    q, k = (torch.empty(1, heads, rows, size, dtype=dtype) for rows in (queries or n, n))
    attention = Attention(
        q,
        k,
        attn_mask=torch.zeros(n, n) if masked else None,
        key_mask=torch.ones(1, n, dtype=torch.bool) if masked else None,
        row_bias=torch.zeros(1, heads, queries or n, groups) if biased else None,
        key_groups=torch.zeros(1, n, dtype=torch.int64) if groups else None,
        score="dot_softcap" if softcap else "dot",
        parameter=0.0025 if softcap else 0.0,
        scale=50.0 if softcap else 0.125,
        is_causal=masked,
    )
    options = {"attention": attention, "row_weight": torch.ones(1, 16, n) if masked else None, "num_groups": groups}
    asked = (only,) if only else NAMES
    options |= {"statistics": " ".join(asked), "backend": "triton"}
    *statistics, _, row_max, mean_x = attention_statistics.forward(AttentionStatisticsInputs(**options))
    mass, _, maximum, argmax, _ = statistics
    grads = {f"grad_{name}": x if name in asked else None for name, x in zip(NAMES, statistics, strict=True) if name != "argmax"}
    saved = {"mass": mass, "maximum": maximum, "argmax": argmax, "row_max": row_max, "mean_x": mean_x}
    attention_statistics.backward(AttentionStatisticsBackwardInputs(**grads, **saved, **options))
