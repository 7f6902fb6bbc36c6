"""attention_statistics by csrc/cpu/attention_statistics.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.cpu._attention import ATTENTION, attention
from vlattn_fast.backends.cpu.score_attention import SCORE, core_score
from vlattn_fast.backends.inputs import AttentionStatisticsBackwardInputs, AttentionStatisticsInputs
from vlattn_fast.backends.native import Fields, kernel

_GROUPS = Fields("pointer index, integer stride_b stride_m count")
_STRUCTS = {"attention": ATTENTION, "score": SCORE, "groups": _GROUPS}
_SHARED = "attention a, score score, groups groups, pointer weight"
_FORWARD = f"{_SHARED} mass entropy maximum argmax received max_logit"
_BACKWARD = f"{_SHARED} argmax d_mass d_entropy d_maximum d_received, tensor d_query d_key, pointer d_weight"
_forward = kernel("attention_statistics_forward", Fields(_FORWARD, **_STRUCTS))
_backward = kernel("attention_statistics_backward", Fields(_BACKWARD, **_STRUCTS))


def forward(inputs: AttentionStatisticsInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, None]:
    """mass (B, H, N, G), entropy, maximum, argmax (B, H, N), received (B, H, M), max_logit (B, H, N), and None for rows:
    `backward` needs none.

    `received` is empty where `statistics` does not name it. The others are computed in any case, since they cost next to nothing.
    """
    query, key = unit_strides(inputs.query, inputs.key)
    a, _kept = attention(inputs, query, key, None)
    batch, heads, queries, _ = query.shape
    mass = query.new_empty(batch, heads, queries, inputs.num_groups, dtype=torch.float32)
    entropy = query.new_empty(batch, heads, queries, dtype=torch.float32)
    maximum, max_logit = torch.empty_like(entropy), torch.empty_like(entropy)
    argmax = query.new_empty(batch, heads, queries, dtype=torch.int64)
    receives = "received" in inputs.statistics  # no name is part of another
    received = query.new_empty(batch, heads, key.shape[2] if receives else 0, dtype=torch.float32)
    weight = None if inputs.row_weight is None else inputs.row_weight.contiguous()
    how = {"a": a, "score": core_score(inputs, None), "groups": _groups(inputs), "weight": weight}
    per_row = {"entropy": entropy, "maximum": maximum, "argmax": argmax, "max_logit": max_logit}
    _forward(**how, mass=mass, **per_row, received=received if receives else None)
    received = received if queries else received.zero_()  # the kernel runs over queries
    return mass, entropy, maximum, argmax, received, max_logit, None


def backward(inputs: AttentionStatisticsBackwardInputs) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """Gradients of query, key and row_weight, and None for that of row_bias."""
    query, key = unit_strides(inputs.query, inputs.key)
    (a, _kept), argmax = attention(inputs, query, key, None), inputs.argmax.contiguous()
    cotangents = inputs.grad_mass, inputs.grad_entropy, inputs.grad_maximum, inputs.grad_received
    mass, entropy, maximum, received = [None if x is None else x.contiguous() for x in cotangents]
    named = {"d_mass": mass, "d_entropy": entropy, "d_maximum": maximum, "d_received": received}
    batch, heads, queries, head_dim = query.shape
    grad_q, grad_k = query.new_empty(batch, heads, queries, head_dim), key.new_empty(*key.shape)
    weight = grad_weight = None
    if inputs.row_weight is not None:
        weight = inputs.row_weight.contiguous()
        grad_weight = torch.zeros_like(weight) if received is None else torch.empty_like(weight)
    how = {"a": a, "score": core_score(inputs, None), "groups": _groups(inputs), "weight": weight}
    _backward(**how, argmax=argmax, **named, d_query=grad_q, d_key=grad_k, d_weight=grad_weight)
    if queries == 0:  # the kernel runs over queries
        grad_k.zero_()
    return grad_q, grad_k, grad_weight, None


def _groups(inputs: AttentionStatisticsInputs | AttentionStatisticsBackwardInputs) -> Any:
    groups = inputs.key_groups
    stride_b, stride_m = (0, 0) if groups is None else groups.stride()
    return _GROUPS.values(index=groups, stride_b=stride_b, stride_m=stride_m, count=inputs.num_groups)
