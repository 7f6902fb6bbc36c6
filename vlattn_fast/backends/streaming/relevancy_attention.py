"""relevancy_attention and relevancy_step in O(N) memory with plain PyTorch, on any device and dtype.

Attention and its gradients are those of score_attention. r Abar is computed after them, one tile of rows of Abar at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype, expand_heads, weigh_rows
from vlattn_fast.backends.streaming import score_attention
from vlattn_fast.backends.streaming._abar import abar_tile
from vlattn_fast.backends.streaming._tiles import Masks, Tiling


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    carrier: Tensor,
    residual_weight: Tensor | None,
    attention_weight: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    rule: str,
    row_normalize: bool,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, N, Dv), a copy of the carrier (B, T, N), lse (B, H, N)."""
    out, lse = score_attention.forward(query, key, value, None, attn_mask, key_mask, None, "dot", 0.0, scale, 0.0, is_causal)
    return out, carrier.clone(), lse


def backward(
    grad_out: Tensor | None,
    grad_carrier: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    residual_weight: Tensor | None,
    attention_weight: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    rule: str,
    row_normalize: bool,
    scale: float,
    is_causal: bool,
    need_inputs: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key and value, and the carrier's cotangent r * a + (r * b) Abar; None for those not needed."""
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if need_inputs and grad_out is not None:
        grads = score_attention.backward(
            grad_out, None, query, key, value, out, lse, None, attn_mask, key_mask, None, "dot", 0.0, scale, 0.0, is_causal
        )[:3]
    if grad_carrier is None:
        return grads[0], grads[1], grads[2], None
    direct = weigh_rows(grad_carrier, residual_weight)
    if grad_out is None and rule == "gradient":  # Abar is zero
        return grads[0], grads[1], grads[2], direct.clone()
    weighted = weigh_rows(grad_carrier, attention_weight)
    attended = step(weighted, query, key, value, grad_out, None, attn_mask, key_mask, rule, row_normalize, scale, is_causal)
    return grads[0], grads[1], grads[2], direct + attended


def step(
    relevancy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grad_output: Tensor | None,
    lse: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    rule: str,
    row_normalize: bool,
    scale: float,
    is_causal: bool,
    score: str = "dot",
    vector: Tensor | None = None,
    parameter: float = 0.0,
) -> Tensor:
    """relevancy @ Abar, (B, T, N) -> (B, T, M); also for the other core scores of score_attention."""
    num_heads = query.shape[1]
    key = expand_heads(key, num_heads)
    value = None if value is None else expand_heads(value, num_heads)
    masks = Masks(attn_mask, key_mask, is_causal)
    dtype = compute_dtype(query)
    result = torch.zeros(*relevancy.shape[:2], key.shape[2], dtype=dtype, device=query.device)
    tensors, core = (query, key, value, grad_output, lse), (score, vector, parameter)
    for b, i in Tiling(query.shape[0], num_heads, query.shape[2], key.shape[2]).rows():
        abar = abar_tile(*tensors, masks, rule, row_normalize, scale, b, i, "mean", *core)
        result[b] += relevancy[b, :, i].to(dtype) @ abar
    return result.to(relevancy.dtype)
