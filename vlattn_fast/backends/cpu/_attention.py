"""The first fields of every call on attention: `Attention` of csrc/cpu/attention.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast.backends.native import DTYPES, kernel, pointer, rows

FIELDS = "8q d 21q"
_find_shifts = kernel("mask_shifts", f"={FIELDS} q")
_MASK_DTYPES = {**DTYPES, torch.float64: 4}


class Masks(NamedTuple):
    """The masks of a call as the kernels read them; they are kept until the call is over."""

    attn_mask: Tensor | None  # a view of (B, H, N, M)
    key_mask: Tensor | None  # (B, M), contiguous
    is_causal: bool
    shifts: Tensor | None = None  # (B, H, N) of a float64 attn_mask: mask_shifts.cpp


def masks(attn_mask: Tensor | None, key_mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Masks:
    """The masks of a call with query (B, H, N, D) and key (B, Hkv, M, D)."""
    if key_mask is not None:
        key_mask = key_mask.contiguous()
    if attn_mask is None:
        return Masks(None, key_mask, is_causal)
    seen = Masks(attn_mask.expand(*query.shape[:3], key.shape[2]), key_mask, is_causal)
    if attn_mask.dtype != torch.float64:
        return seen
    shifts = query.new_empty(*query.shape[:3], dtype=torch.float64)
    _find_shifts(*fields(query, key, None, seen, 1.0), shifts.data_ptr())
    return seen._replace(shifts=shifts)


def fields(query: Tensor, key: Tensor, value: Tensor | None, masks: Masks, scale: float) -> tuple[Any, ...]:
    """The fields; the tensors come from `unit_strides`, and the caller keeps them until the call is over."""
    batch, heads, queries, head_dim = query.shape
    _, key_heads, keys, _ = key.shape
    value_dim = 0 if value is None else value.shape[3]
    attn_mask, key_mask, is_causal, shifts = masks
    mask = (0, 0, 0, 0, 0, 0) if attn_mask is None else (attn_mask.data_ptr(), _MASK_DTYPES[attn_mask.dtype], *attn_mask.stride())
    return (
        *(DTYPES[query.dtype], batch, heads, key_heads, queries, keys, head_dim, value_dim, scale),
        *(
            *rows(query),
            *rows(key),
            *rows(value),
            *mask,
            pointer(key_mask),
            is_causal,
            0 if shifts is None else shifts.data_ptr(),
        ),
    )
