"""Calls of attention_divergence to compile: heads and their means, every kind and dtype, head sizes 64, 128 and 256, masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vlattn_fast.backends.streaming.attention_divergence import AttentionDivergenceBackwardInputs, AttentionDivergenceInputs
from vlattn_fast.kernels import attention_divergence

BF16 = torch.bfloat16


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for kind in ("kl", "js", "hellinger", "total_variation"):  # one side's gradient of reverse_kl is the other's of kl
        yield f"{kind} bf16 64", lambda kind=kind: run(kind, BF16, 64)
        yield f"{kind} bf16 128", lambda kind=kind: run(kind, BF16, 128)
    yield "js causal bf16 128", lambda: run("js", BF16, 128, is_causal=True)
    yield "js mask bf16 128", lambda: run("js", BF16, 128, mask=torch.float32)
    yield "kl padding fp16 64", lambda: run("kl", torch.float16, 64, mask=torch.bool)
    yield "kl fp32 64", lambda: run("kl", torch.float32, 64)
    yield "js fp32 128", lambda: run("js", torch.float32, 128)
    yield "js bf16 256", lambda: run("js", BF16, 256)
    yield "kl fp32 256", lambda: run("kl", torch.float32, 256)
    yield "kl means bf16 64", lambda: run("kl", BF16, 64, head_mean=True)
    yield "js means bf16 128", lambda: run("js", BF16, 128, head_mean=True)
    yield "js means fp32 64", lambda: run("js", torch.float32, 64, head_mean=True)


def run(
    kind: str, dtype: torch.dtype, size: int, is_causal: bool = False, mask: torch.dtype | None = None, head_mean: bool = False
) -> None:
    """Forward and backward, both sides. mask: the dtype of an attn_mask; with bool a key padding mask as well."""
    (query, key), (other_query, other_key) = ((torch.empty(1, 8, n, size, dtype=dtype) for n in (2050, 2050)) for _ in range(2))
    inputs = AttentionDivergenceInputs(
        query=query,
        key=key,
        other_query=other_query,
        other_key=other_key,
        attn_mask=None if mask is None else torch.empty(1, 1, 2050, 2050, dtype=mask),
        key_mask=torch.ones(1, 2050, dtype=torch.bool) if mask == torch.bool else None,
        kind=kind,
        beta=0.5,
        head_mean=head_mean,
        is_causal=is_causal,
        scale=size**-0.5,
        other_scale=size**-0.5,
        backend="triton",
    )
    divergence = attention_divergence.forward(inputs)
    more = {"grad": divergence, "divergence": divergence, "need_own": True, "need_other": True}
    attention_divergence.backward(AttentionDivergenceBackwardInputs(**inputs._asdict(), **more))
