"""attention_map in plain PyTorch, on any device and dtype; no per-head map is larger than a tile."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.backends.inputs import AttentionMapBackwardInputs, AttentionMapInputs
from vlattn_fast.backends.streaming import _derivatives, _formulas
from vlattn_fast.backends.streaming._abar import Abar, AbarGradients
from vlattn_fast.backends.streaming._derivatives import Formula
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
    gradients = AbarGradients(abar, inputs.need_lse)
    for b, i in Tiling.of(inputs.query, *abar.shape).query_tiles():
        gradients.add(b, i, inputs.grad[b, i].to(abar.dtype))
    return gradients.result()


_FORMULA = Formula(
    fields=("query", "key", "value", "grad_output", "lse", "row_bias"),
    of_tile=lambda inputs, b, i, varies: partial(_formulas.attention_map, lse_varies="lse" in varies),
    shapes=lambda x: ((x.query.shape[0], x.query.shape[2], x.key.shape[2]),),
    sums=(False,),
    rows=1,
)


def jvp(inputs: Any) -> tuple[Tensor, ...]:
    """The tangent of Abar."""
    return _derivatives.jvp(_FORMULA, inputs)


def second(inputs: Any) -> tuple[Tensor | None, ...]:
    """The gradients of that tangent's product with `grad`."""
    return _derivatives.second(_FORMULA, inputs, (inputs.grad,))
