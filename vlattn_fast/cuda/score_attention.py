"""score_attention by csrc/cuda/score_attention.cu: exact additive scores, forward and backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlattn_fast._tensors import unit_strides
from vlattn_fast.cuda._shared_library import masks, operators


def forward(
    query: Tensor, key: Tensor, value: Tensor, vector: Tensor, attn_mask: Tensor | None, key_mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv) and lse (B, H, N)."""
    query, key, value = unit_strides(query, key, value)
    return operators().score_attention(query, key, value, vector.contiguous(), *masks(attn_mask, key_mask, query, key), *options)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    vector: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and vector."""
    grad_out, query, key, value, out = unit_strides(grad_out, query, key, value, out)
    return operators().score_attention_backward(
        grad_out,
        None if grad_lse is None else grad_lse.contiguous(),
        query,
        key,
        value,
        out,
        lse.contiguous(),
        vector.contiguous(),
        *masks(attn_mask, key_mask, query, key),
        *options,
    )
