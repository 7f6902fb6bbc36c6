"""attention_statistics by csrc/cpu/attention_statistics.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.cpu._attention import ATTENTION, attention, empty_row_bias
from vlattn_fast.backends.cpu.score_attention import SCORE, core_score
from vlattn_fast.backends.inputs import AttentionStatisticsBackwardInputs, AttentionStatisticsInputs
from vlattn_fast.backends.native import Fields, kernel

_GROUPS = Fields("pointer index, integer stride_b stride_m count")
_STRUCTS = {"attention": ATTENTION, "score": SCORE, "groups": _GROUPS}
_SHARED = "attention a, score score, groups groups, pointer weight"
_OUTPUTS = ("mass", "entropy", "maximum", "argmax", "received", "max_logit")
_FORWARD = f"{_SHARED} {' '.join(_OUTPUTS)}"
_BACKWARD = f"{_SHARED} argmax d_mass d_entropy d_maximum d_received, tensor d_query d_key, pointer d_weight d_row_bias"
_forward = kernel("attention_statistics_forward", Fields(_FORWARD, **_STRUCTS))
_backward = kernel("attention_statistics_backward", Fields(_BACKWARD, **_STRUCTS))


def forward(inputs: AttentionStatisticsInputs) -> tuple[Tensor | None, ...]:
    """mass (B, H, N, G), entropy, maximum, argmax (B, H, N), received (B, H, M) and max_logit (B, H, N); None for what
    `statistics` does not name, and for rows: `backward` needs none."""
    query, key = unit_strides(inputs.query, inputs.key)
    a, _kept = attention(inputs, query, key, None)
    batch, heads, queries, _ = query.shape
    per_row, asked = (batch, heads, queries), inputs.statistics
    shapes = {"mass": (*per_row, inputs.num_groups), "received": (batch, heads, key.shape[2])}
    outputs = {  # no name is part of another
        name: query.new_empty(shapes.get(name, per_row), dtype=torch.int64 if name == "argmax" else torch.float32)
        for name in _OUTPUTS
        if name in asked
    }
    weight = None if inputs.row_weight is None else inputs.row_weight.contiguous()
    _forward(a=a, score=core_score(inputs, None), groups=_groups(inputs), weight=weight, **outputs)
    if queries == 0 and "received" in outputs:  # the kernel runs over queries
        outputs["received"].zero_()
    return *map(outputs.get, _OUTPUTS), None


def backward(inputs: AttentionStatisticsBackwardInputs) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, row_weight and row_bias."""
    query, key = unit_strides(inputs.query, inputs.key)
    (a, _kept), argmax = attention(inputs, query, key, None), inputs.argmax
    assert argmax is not None  # which the operator saves for these kernels
    cotangents = inputs.grad_mass, inputs.grad_entropy, inputs.grad_maximum, inputs.grad_received
    mass, entropy, maximum, received = [None if x is None else x.contiguous() for x in cotangents]
    named = {"d_mass": mass, "d_entropy": entropy, "d_maximum": maximum, "d_received": received}
    batch, heads, queries, head_dim = query.shape
    grad_q, grad_k = query.new_empty(batch, heads, queries, head_dim), key.new_empty(*key.shape)
    weight = grad_weight = None
    if inputs.row_weight is not None:
        weight = inputs.row_weight.contiguous()
        grad_weight = torch.zeros_like(weight) if received is None else torch.empty_like(weight)
    grad_row_bias = empty_row_bias(inputs)
    how = {"a": a, "score": core_score(inputs, None), "groups": _groups(inputs), "weight": weight}
    grads = {"d_query": grad_q, "d_key": grad_k, "d_weight": grad_weight, "d_row_bias": grad_row_bias}
    _backward(**how, argmax=argmax.contiguous(), **named, **grads)
    if queries == 0:  # the kernel runs over queries
        grad_k.zero_()
    return grad_q, grad_k, grad_weight, grad_row_bias


def _groups(inputs: AttentionStatisticsInputs | AttentionStatisticsBackwardInputs) -> Any:
    groups = inputs.key_groups
    stride_b, stride_m = (0, 0) if groups is None else groups.stride()
    return _GROUPS.values(index=groups, stride_b=stride_b, stride_m=stride_m, count=inputs.num_groups)
