"""The backward pass of relevancy_attention by csrc/cuda/relevancy_attention_long.cu, for long sequences on sm_90. The forward
pass is FlashAttention-2, as torch has it: it returns the log-sum-exp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import as_dtype, empty_gradient, expand_heads, rows_first, unit_strides, weigh_rows
from vlattn_fast.backends.cuda._shared_library import causal_mask, kernel, part
from vlattn_fast.backends.inputs import RelevancyAttentionBackwardInputs, RelevancyAttentionInputs
from vlattn_fast.backends.native import DTYPES, address, strided

_QUERIES, _FEATURES = 64, 128  # of a tile of the kernel
_long = kernel("relevancy_attention_long")
_row_weight = part("relevancy_attention_long", "residual_weight")


def forward(inputs: RelevancyAttentionInputs) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv), lse (B, H, N)."""
    x = inputs.attention
    query, key, value = unit_strides(x.query, x.key, inputs.value)
    aten, shared = torch.ops.aten, (expand_heads(key, query.shape[1]), expand_heads(value, query.shape[1]))
    attend = aten._scaled_dot_product_flash_attention if query.is_cuda else aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attend(query, *shared, 0.0, x.is_causal, scale=x.scale)[:2]
    return rows_first(out), lse.contiguous()


def backward(inputs: RelevancyAttentionBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, the carrier's cotangent r * a + (r * b) Abar, and None for row_bias; None where nothing is
    needed."""
    x, grad_out, grad_carrier = inputs.attention, inputs.grad_out, inputs.grad_carrier
    if grad_out is None or x.query.shape[1] == 0:  # Abar is zero
        direct = None if grad_carrier is None else weigh_rows(grad_carrier, inputs.residual_weight).clone()
        return None, None, None, direct, None
    f32 = torch.float32  # all gradients come from one kernel, so each is computed
    query, key, value, out, grad_out = map(_pieces, (x.query, x.key, inputs.value, inputs.out, grad_out))
    (batch, heads, queries, head_dim), key_heads = query.shape, key.shape[1]
    tiles = -(-queries // _QUERIES)
    grads = empty_gradient(query), empty_gradient(key), empty_gradient(value)
    r = None if grad_carrier is None else as_dtype(grad_carrier, f32).contiguous()
    shares = query.new_empty(batch, key_heads, 0 if r is None else r.shape[1], queries, dtype=f32)
    lse = inputs.lse.contiguous()
    weights = [None if y is None else as_dtype(y, f32) for y in (inputs.residual_weight, inputs.attention_weight)]
    rows = query.new_empty(3, batch, heads, tiles * _QUERIES, dtype=f32)
    sums = query.new_empty(batch, heads, tiles, _QUERIES * _FEATURES, dtype=f32)
    turns = query.new_empty(batch * heads * tiles + 1, dtype=torch.int32)
    members: dict[str, Any] = {"T": shares.shape[2], "relevancy": address(r), "r_abar": address(shares), "rows": address(rows)}
    members |= {"sums": address(sums), "turns": address(turns), "lse": address(lse)}
    members |= dict(zip(("residual_weight", "attention_weight"), map(_weight, weights), strict=True))
    members |= dict(zip(("grad_query", "grad_key", "grad_value"), map(strided, grads), strict=True))
    members |= {"B": batch, "H": heads, "key_heads": key_heads, "N": queries, "M": queries, "D": head_dim, "DV": head_dim}
    members |= dict(
        zip(("query", "key", "value", "out", "grad_out"), map(strided, (query, key, value, out, grad_out)), strict=True)
    )
    _long(query, dtype=DTYPES[query.dtype], scale=x.scale, masks=causal_mask(x.is_causal), **members)
    needed = grads if inputs.need_inputs else (None, None, None)
    return *needed, None if r is None else shares.sum(1), None


def _pieces(x: Tensor) -> Tensor:
    """`x` (B, H, N, D), copied unless its rows begin at multiples of 16 bytes."""
    steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    fits = x.stride(-1) == 1 and all(step % 8 == 0 for step in steps) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _weight(x: Tensor | None) -> Any:
    """Of (B, N) or (1, 1)."""
    if x is None:
        return _row_weight()()
    batch, row = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return _row_weight()(data=address(x), stride_b=batch, stride_n=row)
