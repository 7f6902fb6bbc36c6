"""attention_map in plain PyTorch, on any device and dtype; no per-head map is larger than a tile."""

from __future__ import annotations

from torch import Tensor

from vlattn_fast.backends.inputs import AttentionMapBackwardInputs, AttentionMapInputs
from vlattn_fast.backends.streaming._abar import Abar
from vlattn_fast.backends.streaming._forward_mode import derivatives
from vlattn_fast.backends.streaming._tiles import Tiling


def forward(inputs: AttentionMapInputs) -> Tensor:
    """Abar (B, N, M) of any core score."""
    query, abar = inputs.attention.query, Abar(inputs, inputs.head_reduction)
    batch, _, num_queries, num_keys = abar.shape
    result = query.new_empty(batch, num_queries, num_keys, dtype=abar.dtype)
    for b, i in Tiling.of(query, *abar.shape).query_tiles():
        result[b, i] = abar.tile(b, i)
    return result


def backward(inputs: AttentionMapBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, grad_output, lse and row_bias from that of Abar (B, N, M); None for those without one."""
    abar = Abar(inputs, inputs.head_reduction)
    sums = abar.sums(inputs.need_lse)
    for b, i in Tiling.of(inputs.attention.query, *abar.shape).query_tiles():
        abar.add_gradients(sums, b, i, inputs.grad[b, i].to(abar.dtype))
    return sums.result()


FIELDS = "query", "key", "value", "grad_output", "lse", "row_bias"
jvp, second = derivatives(forward, backward, (AttentionMapInputs, AttentionMapBackwardInputs), FIELDS)
