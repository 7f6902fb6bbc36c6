"""attention_statistics by csrc/cpu/attention_statistics.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast.backends.cpu._attention import attention, empty_row_bias
from vlattn_fast.backends.cpu.score_attention import core_score
from vlattn_fast.backends.inputs import AttentionStatisticsBackwardInputs, AttentionStatisticsInputs
from vlattn_fast.backends.native import address, kernel, part, strided

_OUTPUTS = ("mass", "entropy", "maximum", "argmax", "received", "max_logit")


_forward, _backward = kernel("attention_statistics_forward"), kernel("attention_statistics_backward")
_groups_struct = part("attention_statistics_forward", "groups")


def forward(inputs: AttentionStatisticsInputs) -> tuple[Tensor | None, ...]:
    """mass (B, H, N, G), entropy, maximum, argmax (B, H, N), received (B, H, M) and max_logit (B, H, N); None for what
    `statistics` does not name, and for row_max and mean_x: `backward` needs none."""
    x = inputs.attention
    (a, _kept), query, key = attention(x, None), x.query, x.key
    batch, heads, queries, _ = query.shape
    per_row, asked = (batch, heads, queries), inputs.statistics
    shapes = {"mass": (*per_row, inputs.num_groups), "received": (batch, heads, key.shape[2])}
    outputs = {  # no name is part of another
        name: query.new_empty(shapes.get(name, per_row), dtype=torch.int64 if name == "argmax" else torch.float32)
        for name in _OUTPUTS
        if name in asked
    }
    weight = None if inputs.row_weight is None else inputs.row_weight.contiguous()
    addresses = {name: address(x) for name, x in outputs.items()}
    score, groups = core_score(x), _groups(inputs)
    _forward(a=a, score=score, groups=groups, weight=address(weight), **addresses)
    if queries == 0 and "received" in outputs:  # the kernel runs over queries
        outputs["received"].zero_()
    return *map(outputs.get, _OUTPUTS), None, None


def backward(inputs: AttentionStatisticsBackwardInputs) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, row_weight and row_bias."""
    x = inputs.attention
    (a, _kept), argmax, query, key = attention(x, None), inputs.argmax, x.query, x.key
    assert argmax is not None  # which the operator saves for these kernels
    argmax = argmax.contiguous()
    cotangents = inputs.grad_mass, inputs.grad_entropy, inputs.grad_maximum, inputs.grad_received
    mass, entropy, maximum, received = [None if y is None else y.contiguous() for y in cotangents]
    batch, heads, queries, head_dim = query.shape
    grad_q, grad_k = query.new_empty(batch, heads, queries, head_dim), key.new_empty(*key.shape)
    weight = grad_weight = None
    if inputs.row_weight is not None:
        weight = inputs.row_weight.contiguous()
        grad_weight = torch.zeros_like(weight) if received is None else torch.empty_like(weight)
    grad_row_bias = empty_row_bias(x)
    _backward(
        a=a,
        score=core_score(x),
        groups=_groups(inputs),
        weight=address(weight),
        argmax=address(argmax),
        d_mass=address(mass),
        d_entropy=address(entropy),
        d_maximum=address(maximum),
        d_received=address(received),
        d_query=strided(grad_q),
        d_key=strided(grad_k),
        d_weight=address(grad_weight),
        d_row_bias=address(grad_row_bias),
    )
    if queries == 0:  # the kernel runs over queries
        grad_k.zero_()
    return grad_q, grad_k, grad_weight, grad_row_bias


def _groups(inputs: AttentionStatisticsInputs | AttentionStatisticsBackwardInputs) -> Any:
    groups = inputs.attention.key_groups
    stride_b, stride_m = (0, 0) if groups is None else groups.stride()
    return _groups_struct()(index=address(groups), stride_b=stride_b, stride_m=stride_m, count=inputs.num_groups)
