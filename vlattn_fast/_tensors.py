"""What every operator does to its tensors before and after the arithmetic: masks, strides, heads, dtypes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._checks import check_number


def resolve_scale(scale: Any, default: float) -> float:
    """`scale` as given (0.0 included), or the default where it is None."""
    if scale is None:
        return default
    check_number("scale", scale)
    return float(scale)


def scaled_dot_default(head_dim: int) -> float:
    """1/sqrt(D); 1 where D is 0 and every score is 0."""
    return 1.0 / math.sqrt(head_dim) if head_dim else 1.0


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where autocast is on, as scaled_dot_product_attention does; float64 stays."""
    device = next(x.device.type for x in tensors if x is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as it is; a float mask in `dtype`, where a finite value of a wider dtype stays finite: only -inf hides."""
    if mask.dtype in (torch.bool, dtype):
        return mask
    largest = torch.finfo(dtype).max
    if torch.finfo(mask.dtype).max > largest:
        wide = mask.to(torch.promote_types(mask.dtype, torch.float32))  # bfloat16 would round the bound up, to Inf in float16
        mask = torch.where(torch.isneginf(mask), wide, wide.clamp(-largest, largest))
    return mask.to(dtype)


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied where neighbours in the last dimension are not neighbours in memory: no kernel takes a last stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def mask_padding(key_mask: Tensor | None, *tensors: Tensor | None, fill: float = 0.0) -> tuple[Any, ...]:
    """(B,Hkv,M,*) tensors with rows of padding set to `fill`: what stands there (NaN, Inf) reaches no output, no gradient."""
    if key_mask is None:
        return tensors
    visible = key_mask[:, None, :, None]
    return tuple(None if x is None else torch.where(visible, x, fill) for x in tensors)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Sums are taken in float32, in float64 where the input is float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def expand_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B,Hkv,M,D) as (B,H,M,D): query head h reads key head h // (H / Hkv), as SDPA's enable_gqa."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def fold_heads(grad: Tensor, num_key_heads: int) -> Tensor:
    """The sum over the query heads that share a key head: expand_heads' transpose."""
    return grad if grad.shape[1] == num_key_heads else grad.unflatten(1, (num_key_heads, -1)).sum(2)
