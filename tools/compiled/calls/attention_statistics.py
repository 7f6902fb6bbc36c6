"""Calls of attention_statistics to compile: few groups and many, every dtype, head sizes 64 and 128, masks and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vlattn_fast.kernels import attention_statistics

NAMES = ("mass", "entropy", "maximum", "argmax", "received")


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for size in (64, 128):
        yield f"2 groups bf16 {size}", lambda d=size: run(2, torch.bfloat16, d)
        yield f"40 groups bf16 {size}", lambda d=size: run(40, torch.bfloat16, d)
        yield f"masked bf16 {size}", lambda d=size: run(2, torch.bfloat16, d, masked=True)
    yield "2 groups bf16 160 64", lambda: run(2, torch.bfloat16, 64, n=160)  # UNITER's sizes
    yield "entropy bf16 64", lambda: run(0, torch.bfloat16, 64, only="entropy")
    yield "mass of 2 groups bf16 64", lambda: run(2, torch.bfloat16, 64, only="mass")
    yield "2 groups fp16 64", lambda: run(2, torch.float16, 64)
    yield "2 groups fp32 64", lambda: run(2, torch.float32, 64)
    yield "40 groups bf16 256", lambda: run(40, torch.bfloat16, 256)


def run(groups: int, dtype: torch.dtype, size: int, masked: bool = False, only: str | None = None, n: int = 577) -> None:
    """Forward and backward at the sizes of CLIP ViT-L/14@336."""
    q, k = (torch.empty(1, 16, n, size, dtype=dtype) for _ in range(2))
    groups_mass = (torch.zeros(1, n, dtype=torch.int64) if groups else None, torch.ones(1, n) if masked else None)
    masks = (torch.zeros(n, n), torch.ones(1, n, dtype=torch.bool)) if masked else (None, None)
    asked = (only,) if only else NAMES
    *statistics, rows = attention_statistics.forward(q, k, *groups_mass, *masks, groups, asked, 0.125, masked)
    mass, _, maximum, argmax, _ = statistics
    grads = tuple(x if name in asked else None for name, x in zip(NAMES, statistics, strict=True) if name != "argmax")
    attention_statistics.backward(*grads, q, k, mass, maximum, argmax, rows, *groups_mass, *masks, groups, 0.125, masked)
