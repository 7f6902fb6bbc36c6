"""attention_divergence by csrc/cpu/attention_divergence.cpp. Its second derivatives are streaming's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast.backends.cpu._attention import attention
from vlattn_fast.backends.inputs import Attention
from vlattn_fast.backends.native import address, kernel, strided
from vlattn_fast.backends.reference.attention_divergence import KINDS
from vlattn_fast.backends.streaming.attention_divergence import AttentionDivergenceBackwardInputs, AttentionDivergenceInputs

_run = kernel("attention_divergence")


def forward(inputs: AttentionDivergenceInputs) -> Tensor:
    """D (B, H, N), or (B, 1, N) of the mean over heads."""
    batch, heads, queries, _ = inputs.query.shape
    divergence = inputs.query.new_empty(batch, 1 if inputs.head_mean else heads, queries, dtype=torch.float32)
    _call(inputs, divergence=address(divergence))
    return divergence


def backward(inputs: AttentionDivergenceBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, other_query and other_key; None for a side that needs none."""
    grad, needs = inputs.grad.float().contiguous(), (inputs.need_own, inputs.need_other)
    sides = (inputs.query, inputs.key), (inputs.other_query, inputs.other_key)
    own, other = (empty_gradients(side, need) for side, need in zip(sides, needs, strict=True))
    queries, keys = zip(own, other, strict=True)
    _call(inputs, grad=address(grad), grad_queries=tuple(map(strided, queries)), grad_keys=tuple(map(strided, keys)))
    return *own, *other


def empty_gradients(side: tuple[Tensor, ...], needed: bool) -> list[Tensor | None]:
    """Those of a side's queries and keys, which the kernel writes; zeros if it has nothing to run over, no head or no query."""
    works = side[0].shape[1] * side[0].shape[2] > 0
    return [(x.new_empty if works else x.new_zeros)(x.shape) if needed else None for x in side]


def _call(inputs: Any, **members: Any) -> None:
    own = side_of(inputs, inputs.query, inputs.key, inputs.scale)
    other = side_of(inputs, inputs.other_query, inputs.other_key, inputs.other_scale)
    options = {"kind": KINDS.index(inputs.kind), "beta": inputs.beta, "head_mean": inputs.head_mean}
    _run(sides=(own[0], other[0]), **options, **members)


def side_of(inputs: Any, query: Tensor, key: Tensor, scale: float) -> tuple[Any, Any]:
    """Returns one of the two attentions, and the tensors in it, which must live until the call is over."""
    x = Attention(query, key, None, inputs.attn_mask, inputs.key_mask, scale=scale, is_causal=inputs.is_causal)
    return attention(x, None)
