"""Calls of score_attention to compile: every core score, every dtype, head sizes 64, 72 and 128, masks and dropout together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlattn_fast.backends.cuda import score_attention as in_cuda
from vlattn_fast.backends.inputs import Attention, ScoreAttentionBackwardInputs, ScoreAttentionInputs, named
from vlattn_fast.kernels import score_attention
from vlattn_fast.ops.score_attention import DERIVATIVES

# dot_leaky_relu compiles as dot_relu does, hadamard_sigmoid as hadamard_tanh
KINDS = ("dot", "cosine", "dot_relu", "dot_tanh", "dot_sigmoid", "dot_softcap", "additive", "hadamard_tanh")

DECODING = {"heads": 4, "queries": 8, "tokens": 8192}


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for kind in KINDS:
        yield f"{kind} bf16 64", lambda kind=kind: run(kind, torch.bfloat16, 64)
    yield "cosine fp16 64", lambda: run("cosine", torch.float16, 64)  # this score lengthens short vectors
    yield "dot padded bf16 64", lambda: run("dot", torch.bfloat16, 64, padded=True)
    # a program has all keys of a head: UNITER's, ViT-B/16's, and of 128 features
    yield "dot padded bf16 160 64", lambda: run("dot", torch.bfloat16, 64, padded=True, tokens=160)
    yield "dot bf16 197 64", lambda: run("dot", torch.bfloat16, 64, tokens=197)
    yield "dot bf16 77 128", lambda: run("dot", torch.bfloat16, 128, tokens=77)
    yield "dot groups bf16 64", lambda: run("dot", torch.bfloat16, 64, groups=8)
    yield "dot bf16 72", lambda: run("dot", torch.bfloat16, 72)  # SigLIP-so400m's heads
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for size in (96, 192, 256):
            yield f"dot {name} {size}", lambda dtype=dtype, size=size: run("dot", dtype, size)
        yield f"dot masked {name} 256", lambda dtype=dtype: run("dot", dtype, 256, masked=True)
    for kind in ("dot", "additive"):
        yield f"{kind} bf16 128", lambda kind=kind: run(kind, torch.bfloat16, 128)
        yield f"{kind} fp32 64", lambda kind=kind: run(kind, torch.float32, 64)
        yield f"{kind} masked fp16 64", lambda kind=kind: run(kind, torch.float16, 64, masked=True)
    for batch in (1, 8):  # a decoder's step: 8 query heads share each of 4 keys
        yield f"dot decoding {batch} bf16 128", lambda n=batch: run("dot", torch.bfloat16, 128, batch=n, **DECODING)
    for dtype, name, sizes in ((torch.bfloat16, "bf16", (64, 72, 128, 256)), (torch.float32, "fp32", (64, 128, 256))):
        for size in sizes:
            yield f"jvp dot {name} {size}", partial(jvp, "dot", dtype, size)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        yield f"jvp dot groups {name} 64", partial(jvp, "dot", dtype, 64, groups=8)
    for dtype, name in ((torch.float16, "fp16"), (torch.float32, "fp32")):
        yield f"jvp dot masked {name} 64", partial(jvp, "dot", dtype, 64, masked=True)
    yield "jvp dot causal bf16 128", partial(jvp, "dot", torch.bfloat16, 128, causal=True, tokens=704)
    yield "jvp dot_tanh bf16 64", partial(jvp, "dot_tanh", torch.bfloat16, 64)


def causal_calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of one head, counted as a whole: its programs have different lengths."""
    for tokens in (704, 4096):  # LLaVA-7B's, and many
        yield f"dot causal bf16 {tokens} 128", lambda n=tokens: run("dot", torch.bfloat16, 128, heads=1, causal=True, tokens=n)


def compared_calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """By the CUDA C++ kernels."""
    for kind in ("additive", "hadamard_tanh"):
        yield f"cuda {kind} bf16 64", lambda kind=kind: run(kind, torch.bfloat16, 64, kernels=in_cuda)


def run(kind: str, dtype: torch.dtype, size: int, *, kernels: Any = score_attention, **options: Any) -> None:
    """Forward and backward. kernels: the backend's module."""
    inputs = inputs_of(kind, dtype, size, **options)
    out, lse = kernels.forward(inputs)
    shared = {name: x for name, x in inputs._asdict().items() if name != "sink"}
    backward = ScoreAttentionBackwardInputs(grad_out=out, grad_lse=None, out=out, lse=lse, **shared)
    kernels.backward(backward)


def jvp(kind: str, dtype: torch.dtype, size: int, **options: Any) -> None:
    """The tangents, of a forward pass that is not compiled."""
    inputs = inputs_of(kind, dtype, size, **options)
    x = named(inputs)
    out, lse = torch.empty_like(x["query"]), torch.empty(x["query"].shape[:3])
    differentiable = "query", "key", "value", "vector", "row_bias"
    shared = {name: x for name, x in inputs._asdict().items() if name != "sink"}
    tangents = {f"{name}_tangent": x[name] for name in differentiable}
    score_attention.jvp(DERIVATIVES.jvp_type(**tangents, out=out, lse=lse, **shared))


def inputs_of(
    kind: str,
    dtype: torch.dtype,
    size: int,
    *,
    masked: bool = False,
    padded: bool = False,
    causal: bool = False,
    batch: int = 1,
    heads: int = 16,
    queries: int | None = None,
    tokens: int = 577,
    groups: int = 0,
) -> ScoreAttentionInputs:
    """At the sizes of CLIP ViT-L/14@336."""
    q, k, v = (torch.empty(batch, heads, rows, size, dtype=dtype) for rows in (queries or tokens, tokens, tokens))
    vector = torch.empty(heads, size, dtype=dtype) if kind.startswith(("additive", "hadamard")) else None
    return ScoreAttentionInputs(
        attention=Attention(
            query=q,
            key=k,
            vector=vector,
            attn_mask=torch.zeros(tokens, tokens) if masked else None,
            key_mask=torch.ones(1, tokens, dtype=torch.bool) if masked or padded else None,
            row_bias=torch.zeros(batch, heads, queries or tokens, groups) if groups else None,
            key_groups=(torch.arange(tokens) * groups // tokens).repeat(batch, 1) if groups else None,
            score=kind,
            parameter=0.5,
            scale=0.125,
            is_causal=masked or causal,
        ),
        value=v,
        seed=torch.zeros((), dtype=torch.int64) if masked else None,
        sink=None,
        dropout_p=0.1 if masked else 0.0,
        backend="triton",
    )
