"""attention_map in plain PyTorch, on any device and dtype; no per-head map is larger than a tile."""

from __future__ import annotations

from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.backends.inputs import (
    AttentionMapBackwardInputs,
    AttentionMapInputs,
    AttentionMapJvpInputs,
    AttentionMapSecondInputs,
)
from vlattn_fast.backends.streaming._abar import Abar, second_of
from vlattn_fast.backends.streaming._forward_mode import tangents_of
from vlattn_fast.backends.streaming._tiles import Tiling


def forward(inputs: AttentionMapInputs, vector: Tensor | None = None) -> Tensor:
    """Abar (B, N, M); also for core scores that the operator does not have, with their `vector`."""
    query, num_keys = inputs.query, inputs.key.shape[2]
    batch, num_heads, num_queries, _ = query.shape
    result = query.new_empty(batch, num_queries, num_keys, dtype=compute_dtype(query))
    abar = Abar(inputs, vector, inputs.head_reduction)
    for b, i in Tiling.of(query, batch, num_heads, num_queries, num_keys).query_tiles():
        result[b, i] = abar.tile(b, i)
    return result


def backward(inputs: AttentionMapBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, grad_output, lse and row_bias from that of Abar (B, N, M); None for those without one."""
    abar = Abar(inputs, None, inputs.head_reduction)
    sums = abar.sums(inputs.need_lse)
    for b, i in Tiling.of(inputs.query, *abar.shape).query_tiles():
        abar.add_gradients(sums, b, i, inputs.grad[b, i].to(abar.dtype))
    return sums.result()


_FIELDS = "query", "key", "value", "grad_output", "lse", "row_bias"


def jvp(inputs: AttentionMapJvpInputs) -> tuple[Tensor | None, ...]:
    """The tangent of Abar."""
    return tangents_of(lambda x: (forward(x),), inputs, AttentionMapInputs, _FIELDS)


def second(inputs: AttentionMapSecondInputs) -> tuple[Tensor | None, ...]:
    """The gradients of that tangent's product with `grad`: the tangents of the backward pass."""
    return second_of(backward, inputs, AttentionMapBackwardInputs, _FIELDS)
