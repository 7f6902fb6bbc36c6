"""Calls of relevancy_attention's backward and of relevancy_step, forward and backward, and of steps behind other scores, to
compile; relevancy_attention's forward pass is score_attention's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from vlattn_fast._ground.score_kinds import UNIT_KINDS
from vlattn_fast.backends.cuda import relevancy_attention as in_cuda
from vlattn_fast.backends.cuda import score_attention as hidden_units
from vlattn_fast.backends.inputs import (
    Attention,
    RelevancyAttentionBackwardInputs,
    RelevancyStepBackwardInputs,
    RelevancyStepInputs,
)
from vlattn_fast.kernels import relevancy_attention

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype, name, size in ((BF16, "bf16", 64), (BF16, "bf16", 128), (FP16, "fp16", 64), (FP32, "fp32", 64)):
        yield f"backward {name} {size}", lambda dtype=dtype, size=size: backward(dtype, size, 1)
    for size, rows in ((64, 16), (64, 64), (128, 16), (128, 64)):
        yield f"backward {rows} rows bf16 {size}", lambda size=size, rows=rows: backward(BF16, size, rows)
    yield "backward 16 rows fp32 64", lambda: backward(FP32, 64, 16)
    for rows in (1, 16, 64):
        yield f"backward {rows} rows of 160 bf16 64", lambda rows=rows: backward(BF16, 64, rows, tokens=160)
    yield "backward 64 rows bf16 256", lambda: backward(BF16, 256, 64)
    yield "backward masked normalized bf16 64", lambda: backward(BF16, 64, 1, masked=True, row_normalize=True)
    yield "backward groups bf16 64", lambda: backward(BF16, 64, 1, groups=8)
    yield "backward padded bf16 64", lambda: backward(BF16, 64, 1, padded=True)
    yield "backward causal grouped bf16 128", lambda: backward(BF16, 128, 1, key_heads=4, causal=True)
    for dtype, name, size in ((BF16, "bf16", 64), (BF16, "bf16", 128), (FP32, "fp32", 64)):
        yield f"step {name} {size}", lambda dtype=dtype, size=size: step(dtype, size, 1, "gradient")
    yield "step 577 rows bf16 64", lambda: step(BF16, 64, 577, "gradient")
    yield "step 577 rows of long maps bf16 64", lambda: step(BF16, 64, 577, "gradient", 2304)  # rows too large to be stored
    yield "step attention bf16 64", lambda: step(BF16, 64, 1, "attention")
    for kind in ("dot_tanh", "cosine", "additive", "hadamard_tanh"):
        yield f"step {kind} bf16 64", lambda kind=kind: step(BF16, 64, 1, "gradient", kind=kind)
    for kind in ("cosine", "additive"):
        yield f"step {kind} bf16 128", lambda kind=kind: step(BF16, 128, 1, "gradient", kind=kind)
        yield f"step {kind} fp32 64", lambda kind=kind: step(FP32, 64, 1, "gradient", kind=kind)
        yield f"step {kind} 16 rows bf16 64", lambda kind=kind: step(BF16, 64, 16, "gradient", kind=kind)
        yield f"step {kind} masked fp16 64", lambda kind=kind: step(FP16, 64, 1, "gradient", kind=kind, masked=True)
    yield "step additive attention bf16 64", lambda: step(BF16, 64, 1, "attention", kind="additive")
    yield "step additive groups bf16 64", lambda: step(BF16, 64, 1, "gradient", kind="additive", groups=8)
    yield "step backward groups bf16 64", lambda: step_backward(BF16, 64, 1, groups=8)
    for dtype, name, size in ((BF16, "bf16", 64), (BF16, "bf16", 128), (FP32, "fp32", 64), (FP32, "fp32", 128)):
        yield f"step backward {name} {size}", lambda dtype=dtype, size=size: step_backward(dtype, size, 1)
    yield "step backward 64 rows bf16 64", lambda: step_backward(BF16, 64, 64)
    yield "step backward attention bf16 64", lambda: step_backward(BF16, 64, 1, rule="attention")
    for name in ("softcap", "masked normalized"):
        masked = name != "softcap"
        yield f"step backward {name} bf16 64", lambda masked=masked: step_backward(BF16, 64, 1, softcap=not masked, masked=masked)


def causal_calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of one head, counted as a whole: its programs have different lengths."""
    for tokens in (704, 4096):  # LLaVA-7B's, and many
        for language, kernels in (("", relevancy_attention), ("cuda sm_90 ", in_cuda)):
            name = f"{language}backward causal bf16 {tokens} 128"
            yield name, lambda n=tokens, k=kernels: backward(BF16, 128, 1, tokens=n, heads=1, causal=True, kernels=k)


def compared_calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """By the CUDA C++ kernels."""
    for kind in ("additive", "hadamard_tanh"):
        yield f"cuda step {kind} bf16 64", lambda kind=kind: step(BF16, 64, 1, "gradient", kind=kind, kernels=hidden_units)


def backward(
    dtype: torch.dtype,
    size: int,
    rows: int,
    *,
    tokens: int = 577,
    heads: int = 16,
    key_heads: int | None = None,
    masked: bool = False,
    padded: bool = False,
    causal: bool = False,
    row_normalize: bool = False,
    groups: int = 0,
    kernels: Any = relevancy_attention,
) -> None:
    """At the sizes of CLIP ViT-L/14@336, or with fewer tokens. kernels: the backend's module."""
    query, out, grad_out = (torch.empty(1, heads, tokens, size, dtype=dtype) for _ in range(3))
    key, value = (torch.empty(1, key_heads or heads, tokens, size, dtype=dtype) for _ in range(2))
    inputs = RelevancyAttentionBackwardInputs(
        grad_out=grad_out,
        grad_carrier=torch.empty(1, rows, tokens),
        grad_lse=None,
        grad_behind_sink=None,
        attention=Attention(
            query=query,
            key=key,
            attn_mask=torch.zeros(tokens, tokens) if masked else None,
            key_mask=torch.ones(1, tokens, dtype=torch.bool) if masked or padded else None,
            row_bias=torch.zeros(1, heads, tokens, groups) if groups else None,
            key_groups=(torch.arange(tokens) * groups // tokens)[None] if groups else None,
            scale=0.125,
            is_causal=masked or causal,
        ),
        value=value,
        out=out,
        lse=torch.empty(1, heads, tokens),
        residual_weight=None,
        attention_weight=None,
        sink=None,
        rule="gradient",
        row_normalize=row_normalize,
        need_inputs=True,
        backend="triton",
    )
    kernels.backward(inputs)


def step(
    dtype: torch.dtype,
    size: int,
    rows: int,
    rule: str,
    length: int = 577,
    *,
    kind: str = "dot",
    masked: bool = False,
    groups: int = 0,
    kernels: Any = relevancy_attention,
) -> None:
    """Without an lse, so that the kernel that recomputes the lse runs too. kernels: the backend's module."""
    query, key, value, grad_output = (torch.empty(1, 16, length, size, dtype=dtype) for _ in range(4))
    inputs = RelevancyStepInputs(
        relevancy=torch.empty(1, rows, length),
        attention=Attention(
            query=query,
            key=key,
            attn_mask=torch.zeros(length, length) if masked else None,
            key_mask=torch.ones(1, length, dtype=torch.bool) if masked else None,
            row_bias=torch.zeros(1, 16, length, groups) if groups else None,
            key_groups=(torch.arange(length) * groups // length)[None] if groups else None,
            vector=torch.empty(16, size, dtype=dtype) if kind in UNIT_KINDS else None,
            score=kind,
            scale=0.125,
            is_causal=masked,
        ),
        value=value,
        grad_output=grad_output,
        lse=None,
        rule=rule,
        row_normalize=True,
        backend="triton",
    )
    kernels.step(inputs)


def step_backward(
    dtype: torch.dtype,
    size: int,
    rows: int,
    *,
    rule: str = "gradient",
    softcap: bool = False,
    masked: bool = False,
    groups: int = 0,
) -> None:
    length = 577
    query, key, value, grad_output = (torch.empty(1, 16, length, size, dtype=dtype) for _ in range(4))
    inputs = RelevancyStepBackwardInputs(
        grad=torch.empty(1, rows, length),
        relevancy=torch.empty(1, rows, length),
        attention=Attention(
            query=query,
            key=key,
            attn_mask=torch.zeros(length, length) if masked else None,
            key_mask=torch.ones(1, length, dtype=torch.bool) if masked else None,
            row_bias=torch.zeros(1, 16, length, groups) if groups else None,
            key_groups=(torch.arange(length) * groups // length)[None] if groups else None,
            score="dot_softcap" if softcap else "dot",
            parameter=0.02 if softcap else 0.0,
            scale=50.0 if softcap else 0.125,
            is_causal=masked,
        ),
        value=value,
        grad_output=grad_output,
        lse=torch.empty(1, 16, length),
        rule=rule,
        row_normalize=masked,
        need_relevancy=True,
        need_inputs=True,
        need_lse=False,
        backend="triton",
    )
    relevancy_attention.step_backward(inputs)
