"""Dropout by counter: the seed and (b, h, i, j) decide whether a weight is dropped, so the tiling has no influence."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF


def keep_factor(
    seed: Tensor | None, p: float, heads_queries: tuple[int, ...], num_keys: int, tile: tuple[slice, ...], dtype: torch.dtype
) -> Tensor:
    """(b, h, i, M): 0 where a weight of the tile (b, h, i) is dropped, else 1 / (1 - p). The seed stays on its device."""
    assert seed is not None
    num_heads, num_queries = heads_queries
    o_b, o_h, o_i = (torch.arange(s.start, s.stop, device=seed.device) for s in tile)
    row = (o_b[:, None, None] * num_heads + o_h[:, None]) * num_queries + o_i
    row_key = _mix(_mix(row & _MASK_32) ^ _mix((row >> 32) + (seed & _MASK_32)) ^ _mix((seed >> 32) & _MASK_32))
    word = _mix(row_key[..., None] ^ _mix(torch.arange(num_keys, device=seed.device) + 0x9E3779B9))
    keep = word >= int(p * 2**32)
    return keep.to(dtype) / (1.0 - p)


def _mix(x: Tensor) -> Tensor:
    """A 32-bit hash (xor-shift, multiply) on int64 tensors: every output bit depends on every input bit."""
    x = x & _MASK_32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK_32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK_32
    return x ^ (x >> 16)
