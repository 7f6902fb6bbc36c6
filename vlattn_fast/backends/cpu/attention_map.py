"""attention_map by csrc/cpu/attention_map.cpp, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.cpu._abar import REDUCTIONS, gradients
from vlattn_fast.backends.cpu._attention import ATTENTION, attention
from vlattn_fast.backends.cpu.score_attention import SCORE, core_score
from vlattn_fast.backends.inputs import AttentionMapBackwardInputs, AttentionMapInputs
from vlattn_fast.backends.native import Fields, kernel

_FIELDS = (
    "attention a, score score, tensor grad_output, integer gradient reduction row_normalize, pointer lse map rows direct, "
    "integer T, pointer result"
)
run_map = kernel("attention_map", Fields(_FIELDS, attention=ATTENTION, score=SCORE))


def forward(inputs: AttentionMapInputs) -> Tensor:
    """Abar (B, N, M)."""
    query, key, value, grad_output = unit_strides(inputs.query, inputs.key, inputs.value, inputs.grad_output)
    a, _kept = attention(inputs, query, key, value)
    lse = None if inputs.lse is None else inputs.lse.double().contiguous()
    abar = query.new_empty(query.shape[0], query.shape[2], key.shape[2], dtype=torch.float32)
    gradient, reduction = inputs.rule == "gradient", REDUCTIONS.index(inputs.head_reduction)
    how = {"gradient": gradient, "reduction": reduction, "row_normalize": inputs.row_normalize}
    run_map(a=a, score=core_score(inputs, None), grad_output=grad_output, **how, lse=lse, map=abar)
    return abar


def backward(inputs: AttentionMapBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, grad_output, lse and row_bias from that of Abar (B, N, M); None for those without one."""
    return gradients(inputs, reduction=inputs.head_reduction, grad=inputs.grad.float().contiguous())
