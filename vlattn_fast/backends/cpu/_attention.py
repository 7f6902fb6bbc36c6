"""The first fields of every call on attention: `Attention` of csrc/cpu/attention.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import cast_float_mask
from vlattn_fast.backends.native import DTYPES, pointer, rows

FIELDS = "8q d 20q"


def masks(attn_mask: Tensor | None, key_mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """attn_mask as a view of (B, H, N, M), bool or of at most 32 bits, and key_mask (B, M), contiguous."""
    if attn_mask is not None:
        if attn_mask.dtype == torch.float64:
            attn_mask = cast_float_mask(attn_mask, torch.float32)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return attn_mask, None if key_mask is None else key_mask.contiguous()


def fields(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    is_causal: bool,
) -> tuple[Any, ...]:
    """The fields; the tensors come from `unit_strides` and `masks`, and the caller keeps them until the call is over."""
    batch, heads, queries, head_dim = query.shape
    _, key_heads, keys, _ = key.shape
    value_dim = 0 if value is None else value.shape[3]
    mask = (0, 0, 0, 0, 0, 0) if attn_mask is None else (attn_mask.data_ptr(), DTYPES[attn_mask.dtype], *attn_mask.stride())
    return (
        *(DTYPES[query.dtype], batch, heads, key_heads, queries, keys, head_dim, value_dim, scale),
        *(*rows(query), *rows(key), *rows(value), *mask, pointer(key_mask), is_causal),
    )
