"""Calls of indexer_divergence to compile: every dtype, head sizes 64, 128 and 256, masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vlattn_fast.backends.streaming.indexer_divergence import IndexerDivergenceBackwardInputs, IndexerDivergenceInputs
from vlattn_fast.kernels import indexer_divergence

BF16 = torch.bfloat16


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    yield "bf16 64", lambda: run(BF16, 64)
    yield "bf16 128", lambda: run(BF16, 128)
    yield "causal bf16 128", lambda: run(BF16, 128, is_causal=True)
    yield "mask bf16 128", lambda: run(BF16, 128, mask=torch.float32)
    yield "padding fp16 64", lambda: run(torch.float16, 64, mask=torch.bool)
    yield "fp32 64", lambda: run(torch.float32, 64)
    yield "fp32 128", lambda: run(torch.float32, 128)
    yield "bf16 256", lambda: run(BF16, 256)
    yield "fp32 256", lambda: run(torch.float32, 256)
    yield "chosen bf16 64", lambda: run(BF16, 64, chosen=512)
    yield "chosen bf16 128", lambda: run(BF16, 128, chosen=512)
    yield "chosen fp32 256", lambda: run(torch.float32, 256, chosen=512)


def run(dtype: torch.dtype, size: int, is_causal: bool = False, mask: torch.dtype | None = None, chosen: int = 0) -> None:
    """Forward and backward, the attention detached. mask: the dtype of an attn_mask; with bool a key padding mask as well.
    chosen: how many keys of each query, 0 for all."""
    query, key, index_query = (torch.empty(1, 8, 2050, size, dtype=dtype) for _ in range(3))
    inputs = IndexerDivergenceInputs(
        query=query,
        key=key,
        teacher_lse=None,
        index_query=index_query,
        index_key=torch.empty(1, 2050, size, dtype=dtype),
        index_weights=torch.empty(1, 8, 2050, dtype=dtype),
        topk_indices=torch.zeros(1, 2050, chosen, dtype=torch.int64) if chosen else None,
        attn_mask=None if mask is None else torch.empty(1, 1, 2050, 2050, dtype=mask),
        key_mask=torch.ones(1, 2050, dtype=torch.bool) if mask == torch.bool else None,
        is_causal=is_causal,
        scale=size**-0.5,
        key_block=1,
        backend="triton",
    )
    grad = indexer_divergence.forward(inputs)
    needs = {"need_attention": False, "need_index": True}
    indexer_divergence.backward(IndexerDivergenceBackwardInputs(grad=grad, **inputs._asdict(), **needs))
