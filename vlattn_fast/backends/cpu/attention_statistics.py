"""attention_statistics by csrc/cpu/attention_statistics.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_strides
from vlattn_fast.backends.cpu._attention import FIELDS, fields, masks
from vlattn_fast.backends.inputs import AttentionStatisticsBackwardInputs, AttentionStatisticsInputs
from vlattn_fast.backends.native import kernel, pointer, rows

_GROUPS, _ROW_WEIGHT = "4q", "3q"
_forward = kernel("attention_statistics_forward", f"={FIELDS} {_GROUPS} {_ROW_WEIGHT} 5q")
_backward = kernel("attention_statistics_backward", f"={FIELDS} {_GROUPS} {_ROW_WEIGHT} 5q 4q 4q q")


def forward(inputs: AttentionStatisticsInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, None]:
    """mass (B, H, N, G), entropy, maximum, argmax (B, H, N), received (B, H, M), and None for rows: `backward` needs none.

    `received` is empty where `statistics` does not name it. The others are computed in any case, since they cost next to nothing.
    """
    query, key = unit_strides(inputs.query, inputs.key)
    seen = masks(inputs.attn_mask, inputs.key_mask, inputs.is_causal, query, key)
    key_groups, num_groups, row_weight = inputs.key_groups, inputs.num_groups, inputs.row_weight
    scale = inputs.scale
    batch, heads, queries, _ = query.shape
    mass = query.new_empty(batch, heads, queries, num_groups, dtype=torch.float32)
    entropy = query.new_empty(batch, heads, queries, dtype=torch.float32)
    maximum = torch.empty_like(entropy)
    argmax = query.new_empty(batch, heads, queries, dtype=torch.int64)
    receives = "received" in inputs.statistics  # no name is part of another
    received = query.new_empty(batch, heads, key.shape[2] if receives else 0, dtype=torch.float32)
    _forward(
        *fields(query, key, None, seen, scale),
        *_constants(key_groups, num_groups, row_weight),
        *map(pointer, (mass, entropy, maximum, argmax, received if receives else None)),
    )
    return mass, entropy, maximum, argmax, received if queries else received.zero_(), None  # the kernel runs over queries


def backward(inputs: AttentionStatisticsBackwardInputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of query, key and row_weight."""
    query, key = unit_strides(inputs.query, inputs.key)
    seen = masks(inputs.attn_mask, inputs.key_mask, inputs.is_causal, query, key)
    key_groups, num_groups, row_weight = inputs.key_groups, inputs.num_groups, inputs.row_weight
    scale, argmax = inputs.scale, inputs.argmax.contiguous()
    grads = inputs.grad_mass, inputs.grad_entropy, inputs.grad_maximum, inputs.grad_received
    cotangents = [None if x is None else x.contiguous() for x in grads]
    batch, heads, queries, head_dim = query.shape
    grad_q, grad_k = query.new_empty(batch, heads, queries, head_dim), key.new_empty(*key.shape)
    grad_weight = None
    if row_weight is not None:
        grad_weight = query.new_empty(batch, heads, queries, dtype=torch.float32)  # by head
        if inputs.grad_received is None:
            grad_weight.zero_()
    _backward(
        *fields(query, key, None, seen, scale),
        *_constants(key_groups, num_groups, row_weight),
        *map(pointer, (argmax, *cotangents)),
        *(*rows(grad_q), *rows(grad_k), pointer(grad_weight)),
    )
    if queries == 0:  # the kernel runs over queries
        grad_k.zero_()
    return grad_q, grad_k, None if grad_weight is None else grad_weight.sum(1)


def _constants(key_groups: Tensor | None, num_groups: int, row_weight: Tensor | None) -> tuple[int, ...]:
    """Groups and RowWeight of the kernel."""
    groups = (0, 0, 0) if key_groups is None else (key_groups.data_ptr(), *key_groups.stride())
    weight = (0, 0, 0) if row_weight is None else (row_weight.data_ptr(), *row_weight.stride())
    return *groups, num_groups, *weight
