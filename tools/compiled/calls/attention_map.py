"""Calls of attention_map to compile: one tile and two passes, both rules, every dtype, head sizes 64 and 128, masks; and of maps
behind other scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vlattn_fast._ground.score_kinds import UNIT_KINDS
from vlattn_fast.backends.inputs import Attention, AttentionMapBackwardInputs, AttentionMapInputs
from vlattn_fast.kernels import attention_map


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for rule in ("attention", "gradient"):
        for size, lengths in ((64, (60, 100, 160, 577)), (128, (160, 577))):
            for length in lengths:
                yield f"{rule} bf16 {length} {size}", lambda r=rule, n=length, d=size: run(r, torch.bfloat16, n, d)
        yield f"{rule} fp16 577 64", lambda r=rule: run(r, torch.float16, 577, 64)
        yield f"{rule} fp32 577 64", lambda r=rule: run(r, torch.float32, 577, 64)
        for length in (100, 577):
            yield f"{rule} masked bf16 {length} 64", lambda r=rule, n=length: run(r, torch.bfloat16, n, 64, masked=True)
        yield f"{rule} lse bf16 577 64", lambda r=rule: run(r, torch.bfloat16, 577, 64, lse=True)
    yield "gradient bf16 577 256", lambda: run("gradient", torch.bfloat16, 577, 256)
    for kind in ("dot_tanh", "cosine", "additive", "hadamard_tanh"):
        yield f"{kind} bf16 577 64", lambda kind=kind: of_score(kind, torch.bfloat16, 64)
    for kind in ("cosine", "additive"):
        yield f"{kind} bf16 577 128", lambda kind=kind: of_score(kind, torch.bfloat16, 128)
        yield f"{kind} fp32 577 64", lambda kind=kind: of_score(kind, torch.float32, 64)
        yield f"{kind} masked fp16 577 64", lambda kind=kind: of_score(kind, torch.float16, 64, masked=True)
    yield "backward bf16 577 64", lambda: backward(torch.bfloat16, 577, "mean")
    yield "gradient groups bf16 577 64", lambda: run("gradient", torch.bfloat16, 577, 64, groups=8)
    yield "backward max bf16 160 64", lambda: backward(torch.bfloat16, 160, "max")
    yield "backward max fp32 160 64", lambda: backward(torch.float32, 160, "max")


def run(rule: str, dtype: torch.dtype, length: int, size: int, masked: bool = False, lse: bool = False, groups: int = 0) -> None:
    """At the sizes of UNITER, LXMERT and CLIP ViT-L/14@336."""
    attention_map.forward(inputs_of(rule, dtype, length, size, masked, lse, "max" if masked else "mean", groups))


def of_score(kind: str, dtype: torch.dtype, size: int, masked: bool = False) -> None:
    inputs = inputs_of("gradient", dtype, 577, size, masked, lse=False, reduction="mean")
    vector = torch.empty(16, size, dtype=dtype) if kind in UNIT_KINDS else None
    attention_map.forward(inputs._replace(attention=inputs.attention._replace(score=kind, vector=vector), row_normalize=False))


def backward(dtype: torch.dtype, length: int, reduction: str) -> None:
    inputs = inputs_of("gradient", dtype, length, 64, masked=False, lse=True, reduction=reduction)
    grad = torch.empty(1, length, length)
    attention_map.backward(AttentionMapBackwardInputs(grad=grad, need_lse=False, **inputs._asdict()))


def inputs_of(
    rule: str, dtype: torch.dtype, length: int, size: int, masked: bool, lse: bool, reduction: str, groups: int = 0
) -> AttentionMapInputs:
    q, k, v, do = (torch.empty(1, 16, length, size, dtype=dtype) for _ in range(4))
    gradient = rule == "gradient"
    return AttentionMapInputs(
        attention=Attention(
            query=q,
            key=k,
            attn_mask=torch.zeros(length, length) if masked else None,
            key_mask=torch.ones(1, length, dtype=torch.bool) if masked else None,
            row_bias=torch.zeros(1, 16, length, groups) if groups else None,
            key_groups=(torch.arange(length) * groups // length)[None] if groups else None,
            scale=0.125,
            is_causal=masked,
        ),
        value=v if gradient else None,
        grad_output=do if gradient else None,
        lse=torch.empty(1, 16, length) if lse else None,
        rule=rule,
        head_reduction=reduction,
        row_normalize=masked,
        backend="triton",
    )
