"""relevancy_attention and relevancy_step by csrc/cuda/relevancy_attention.cu: short sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._tensors import unit_strides
from vlattn_fast.cuda._shared_library import masks, operators


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    carrier: Tensor,
    residual_weight: Tensor | None,
    attention_weight: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, N, Dv), a copy of the carrier (B, T, N), lse (B, H, N)."""
    query, key, value = unit_strides(query, key, value)
    return operators().relevancy_attention(
        query, key, value, carrier, residual_weight, attention_weight, *masks(attn_mask, key_mask, query, key), *options
    )


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
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, and the carrier's cotangent r * a + (r * b) Abar; None where nothing is needed."""
    residual = None
    if grad_carrier is not None and grad_out is None and rule == "gradient":  # Abar is zero
        residual = grad_carrier.clone() if residual_weight is None else grad_carrier * residual_weight[:, None]
        grad_carrier = None
    needs_gradients = need_inputs and grad_out is not None
    if not needs_gradients and grad_carrier is None:
        return None, None, None, residual
    grad_out, query, key, value, out = unit_strides(grad_out, query, key, value, out)
    *grads, r_abar = operators().relevancy_attention_backward(
        grad_out,
        None if grad_carrier is None else grad_carrier.contiguous(),
        query,
        key,
        value,
        out,
        lse.contiguous(),
        residual_weight,
        attention_weight,
        *masks(attn_mask, key_mask, query, key),
        rule,
        row_normalize,
        scale,
        is_causal,
        need_inputs,
    )
    return *(grads if needs_gradients else (None,) * 3), residual if grad_carrier is None else r_abar


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
    *options: Any,
) -> Tensor:
    """relevancy @ Abar, (B, T, N) -> (B, T, M).

    `lse` may count keys that are not here. Under a float mask, rows whose lse is too large to be rounded are normalised over the
    keys that are here.
    """
    if rule == "attention":
        value = grad_output = None
    query, key, value, grad_output = unit_strides(query, key, value, grad_output)
    r_abar = operators().relevancy_step(
        relevancy.to(torch.float32).contiguous(),
        query,
        key,
        value,
        grad_output,
        None if lse is None else lse.to(torch.float32).contiguous(),
        *masks(attn_mask, key_mask, query, key),
        rule,
        *options,
    )
    return r_abar.to(relevancy.dtype)
