"""attention_map by csrc/cpu/attention_map.cpp, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.cpu._abar import REDUCTIONS, gradients
from vlattn_fast.backends.cpu._attention import attention, readable
from vlattn_fast.backends.cpu.score_attention import core_score
from vlattn_fast.backends.inputs import AttentionMapBackwardInputs, AttentionMapInputs
from vlattn_fast.backends.native import address, kernel, strided

run_map = kernel("attention_map")


def forward(inputs: AttentionMapInputs) -> Tensor:
    """Abar (B, N, M), of any core score."""
    x, value = readable(inputs.attention, inputs.value)
    (a, _kept), (grad_output,) = attention(x, value), unit_strides(inputs.grad_output)
    lse = None if inputs.lse is None else inputs.lse.double().contiguous()
    abar = x.query.new_empty(x.query.shape[0], x.query.shape[2], x.key.shape[2], dtype=torch.float32)
    run_map(
        a=a,
        score=core_score(x),
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
