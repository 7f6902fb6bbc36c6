"""The first fields of every call on attention: `Attention` of csrc/cpu/attention.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast.backends.native import DTYPES, Fields, kernel

_MASKS = Fields(
    "pointer mask, integer dtype stride_b stride_h stride_n stride_m, pointer keys, integer is_causal, pointer shifts row_bias "
    "key_groups, integer groups"
)
ATTENTION = Fields("integer dtype B H Hkv N M D Dv, number scale, tensor query key value, masks masks", masks=_MASKS)
_NO_MASKS = {is_causal: _MASKS.values(is_causal=is_causal) for is_causal in (False, True)}
_find_shifts = kernel("mask_shifts", Fields("attention a, pointer shifts", attention=ATTENTION))
Numbers = tuple[Any, ...]
_MASK_DTYPES = {**DTYPES, torch.float64: 4}


def attention(inputs: Any, query: Tensor, key: Tensor, value: Tensor | None) -> tuple[Numbers, tuple[Any, ...]]:
    """ATTENTION of an operator's inputs, with query, key and value as `unit_strides` gives them, and the copies in it, which must
    live until the call is over."""
    attn_mask, key_mask, is_causal, scale = inputs.attn_mask, inputs.key_mask, inputs.is_causal, inputs.scale
    if attn_mask is None and key_mask is None and inputs.row_bias is None:
        return _numbers(query, key, value, scale, _NO_MASKS[is_causal]), ()
    if key_mask is not None:
        key_mask = key_mask.contiguous()
    row_bias, groups = inputs.row_bias, {}
    if row_bias is not None:
        row_bias, key_groups = row_bias.float().contiguous(), inputs.key_groups.contiguous()
        groups = {"row_bias": row_bias, "key_groups": key_groups, "groups": row_bias.shape[3]}
    if attn_mask is None:
        return _numbers(query, key, value, scale, _MASKS.values(keys=key_mask, is_causal=is_causal, **groups)), (key_mask, groups)
    pairs = attn_mask.expand(*query.shape[:3], key.shape[2])
    b, h, n, m = pairs.stride()
    strides = {"stride_b": b, "stride_h": h, "stride_n": n, "stride_m": m}
    masks = {"mask": pairs, "dtype": _MASK_DTYPES[pairs.dtype], **strides, "keys": key_mask, "is_causal": is_causal, **groups}
    shifts = None
    if attn_mask.dtype == torch.float64:
        shifts = query.new_empty(*query.shape[:3], dtype=torch.float64)
        _find_shifts(a=_numbers(query, key, None, 1.0, _MASKS.values(**masks)), shifts=shifts)
    return _numbers(query, key, value, scale, _MASKS.values(**masks, shifts=shifts)), (key_mask, shifts, groups)


def empty_row_bias(inputs: Any) -> Tensor | None:
    """The gradient of row_bias (B, H, N, G), which kernels fill where there is something to sum."""
    return None if inputs.row_bias is None else torch.zeros_like(inputs.row_bias, dtype=torch.float32)


def _numbers(query: Tensor, key: Tensor, value: Tensor | None, scale: float, masks: Numbers) -> Numbers:
    batch, heads, queries, head_dim = query.shape
    _, key_heads, keys, _ = key.shape
    return ATTENTION.values(
        dtype=DTYPES[query.dtype],
        B=batch,
        H=heads,
        Hkv=key_heads,
        N=queries,
        M=keys,
        D=head_dim,
        Dv=0 if value is None else value.shape[3],
        scale=scale,
        query=query,
        key=key,
        value=value,
        masks=masks,
    )
