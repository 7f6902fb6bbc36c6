"""The first fields of every call on attention: `Attention` of csrc/cpu/attention.h."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import as_dtype, expand_heads, unit_strides
from vlattn_fast.backends.inputs import Attention
from vlattn_fast.backends.native import DTYPES, StridedTensor, address, kernel, part

_find_shifts = kernel("mask_shifts")
_struct = part("mask_shifts", "a")
_MASK_DTYPES = {**DTYPES, torch.float64: 4}


def attention(x: Attention, value: Tensor | None) -> tuple[Any, tuple[Any, ...]]:
    """The struct of an attention that is `readable`, and what it has the addresses of, which must live until the call is over."""
    attn_mask, key_mask = x.attn_mask, x.key_mask
    a, query, key, value = _attention(x.query, x.key, value, x.scale, x.is_causal)
    if attn_mask is None and key_mask is None and x.row_bias is None:
        return a, (query, key, value)
    if key_mask is not None:
        key_mask = key_mask.contiguous()
    masks = a.masks
    masks.keys = address(key_mask)
    row_bias = key_groups = shifts = None
    if x.row_bias is not None and x.key_groups is not None:
        row_bias, key_groups = x.row_bias.float().contiguous(), x.key_groups.contiguous()
        masks.row_bias, masks.key_groups, masks.groups = address(row_bias), address(key_groups), row_bias.shape[3]
    if attn_mask is not None:
        pairs = attn_mask.expand(*query.shape[:3], key.shape[2])
        masks.mask, masks.dtype = address(pairs), _MASK_DTYPES[pairs.dtype]
        masks.stride_b, masks.stride_h, masks.stride_n, masks.stride_m = pairs.stride()
        if attn_mask.dtype == torch.float64:
            shifts = query.new_empty(*query.shape[:3], dtype=torch.float64)
            _find_shifts(a=a, shifts=address(shifts))
            masks.shifts = address(shifts)
    return a, (query, key, value, key_mask, row_bias, key_groups, shifts)


def readable(x: Attention, value: Tensor | None = None) -> tuple[Attention, Any]:
    """Returns an attention and its value as the kernels read them, but for strides: with a vector in float32, and key and value
    with one number of heads, where features of keys have those of the queries."""
    key, vector = x.key, x.vector
    if value is not None and value.shape[1] != key.shape[1]:
        heads = max(key.shape[1], value.shape[1])
        key, value = expand_heads(key, heads), expand_heads(value, heads)
    if key is x.key and vector is None:
        return x, value
    return x._replace(key=key, vector=float32(vector)), value


def float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else as_dtype(x, torch.float32).contiguous()


def empty_row_bias(x: Attention) -> Tensor | None:
    """Returns the gradient of row_bias (B, H, N, G), zeros that kernels add to."""
    return None if x.row_bias is None else torch.zeros_like(x.row_bias, dtype=torch.float32)


def _attention(query: Tensor, key: Tensor, value: Tensor | None, scale: float, is_causal: bool) -> tuple[Any, ...]:
    """Returns the struct without masks, except for causality, and the tensors with unit strides."""
    by_query, by_key, by_value = query.stride(), key.stride(), None if value is None else value.stride()
    if by_query[-1] != 1 or by_key[-1] != 1 or (by_value is not None and by_value[-1] != 1):
        query, key, value = unit_strides(query, key, value)
        by_query, by_key, by_value = query.stride(), key.stride(), None if value is None else value.stride()
    value_shape = None if value is None else value.shape
    sized = _sized(query.dtype, query.shape, by_query, key.shape, by_key, value_shape, by_value, scale, is_causal)
    a = type(sized).from_buffer_copy(sized)
    a.query.data, a.key.data = query.data_ptr(), key.data_ptr()
    if value is not None:
        a.value.data = value.data_ptr()
    return a, query, key, value


@functools.lru_cache(maxsize=1024)  # a model asks for the same in each of its layers
def _sized(
    dtype: torch.dtype,
    query_shape: torch.Size,
    query_strides: tuple[int, ...],
    key_shape: torch.Size,
    key_strides: tuple[int, ...],
    value_shape: torch.Size | None,
    value_strides: tuple[int, ...] | None,
    scale: float,
    is_causal: bool,
) -> Any:
    """Returns the struct without addresses and tensors of masks."""
    (batch, heads, queries, head_dim), (_, key_heads, keys, _) = query_shape, key_shape
    a = _struct()(
        dtype=DTYPES[dtype],
        B=batch,
        H=heads,
        Hkv=key_heads,
        N=queries,
        M=keys,
        D=head_dim,
        Dv=0 if value_shape is None else value_shape[3],
        scale=scale,
        query=StridedTensor(None, *query_strides[:3]),
        key=StridedTensor(None, *key_strides[:3]),
        value=StridedTensor(None, *(value_strides or ())[:3]),
    )
    a.masks.is_causal = is_causal
    return a
