"""Calls of stacked_cross_attention to compile: SCAN's and DAMSM's sizes, every dtype, every kind of first norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vlattn_fast.backends.inputs import StackedCrossAttentionBackwardInputs, StackedCrossAttentionInputs
from vlattn_fast.kernels import stacked_cross_attention


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    yield "scan bf16", lambda: run(torch.bfloat16, "t2i", "clipped_l2norm", "logsumexp", 36)
    yield "scan fp16", lambda: run(torch.float16, "t2i", "clipped_l2norm", "logsumexp", 36)
    yield "scan fp32", lambda: run(torch.float32, "t2i", "clipped_l2norm", "logsumexp", 36)
    yield "damsm bf16", lambda: run(torch.bfloat16, "t2i", "softmax", "max", 289)
    yield "damsm fp32", lambda: run(torch.float32, "t2i", "softmax", "sum", 289)
    yield "regions ask bf16", lambda: run(torch.bfloat16, "i2t", "l1norm", "mean", 289)


def run(dtype: torch.dtype, direction: str, first_norm: str | None, aggregation: str, regions: int) -> None:
    """Forward and backward at SCAN's features; a caption has at most 60 words."""
    images, captions = torch.empty(2, regions, 1024, dtype=dtype), torch.empty(3, 60, 1024, dtype=dtype)
    inputs = StackedCrossAttentionInputs(
        images=images,
        captions=captions,
        caption_lengths=torch.tensor([60, 20, 7]),
        image_lengths=None,
        features=0,
        direction=direction,
        first_norm=first_norm,
        smooth=9.0,
        aggregation=aggregation,
        lambda_lse=6.0,
        backend="triton",
    )
    similarity = stacked_cross_attention.forward(inputs)
    stacked_cross_attention.backward(StackedCrossAttentionBackwardInputs(grad_similarity=similarity, **inputs._asdict()))
