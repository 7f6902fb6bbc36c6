"""attention_map by csrc/cpu/attention_map.cpp, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.cpu._abar import REDUCTIONS, gradients
from vlattn_fast.backends.cpu._attention import attention
from vlattn_fast.backends.cpu.score_attention import core_score, float32, same_heads
from vlattn_fast.backends.inputs import AttentionMapBackwardInputs, AttentionMapInputs
from vlattn_fast.backends.native import address, kernel, strided

run_map = kernel("attention_map")


def forward(inputs: AttentionMapInputs, vector: Tensor | None = None) -> Tensor:
    """Abar (B, N, M), of any core score with its `vector`."""
    key, value = inputs.key, inputs.value
    if value is not None:
        key, value = same_heads(key, value)
    query, key, value, grad_output = unit_strides(inputs.query, key, value, inputs.grad_output)
    vector = float32(vector)
    a, _kept = attention(inputs, query, key, value)
    lse = None if inputs.lse is None else inputs.lse.double().contiguous()
    abar = query.new_empty(query.shape[0], query.shape[2], key.shape[2], dtype=torch.float32)
    run_map(
        a=a,
        score=core_score(inputs, vector),
        grad_output=strided(grad_output),
        gradient=inputs.rule == "gradient",
        reduction=REDUCTIONS.index(inputs.head_reduction),
        row_normalize=inputs.row_normalize,
        lse=address(lse),
        map=address(abar),
    )
    return abar


def backward(inputs: AttentionMapBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, grad_output, lse and row_bias from that of Abar (B, N, M); None for those without one."""
    grad = inputs.grad.float().contiguous()
    return gradients(inputs, reduction=inputs.head_reduction, grad=address(grad))
