"""Tiles of heads by tensor descriptors, which the host makes: one instruction copies a tile, and no thread computes addresses.

They need sm_90. Triton compiles the same kernels to loads and stores for older GPUs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vlattn_fast.kernels._tiles import Tile


class Boxes(NamedTuple):
    """Tiles of query, key and value. The last tile of keys may be smaller."""

    q: TensorDescriptor
    k: TensorDescriptor
    v: TensorDescriptor
    k_edge: TensorDescriptor
    v_edge: TensorDescriptor


def boxes_of(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles [rows, columns] of the heads of `x` (B, H, N, D), for which `fits` holds."""
    boxes = object.__new__(TensorDescriptor)  # whose constructor takes 2 microseconds to look at what `fits` has seen
    boxes.__dict__.update(_fields(x.shape, x.stride(), rows, columns), base=x)
    return boxes


@functools.lru_cache(maxsize=1024)
def _fields(shape: tuple[int, ...], stride: tuple[int, ...], rows: int, columns: int) -> dict[str, Any]:
    """The fields of a descriptor, but for the tensor, which a cache may not keep."""
    like = torch.empty(8, dtype=torch.float16, device="cpu")
    return vars(TensorDescriptor(like, list(shape), list(_strides(shape, stride)), [1, 1, rows, columns]))


def fits(x: Tensor) -> bool:
    """Whether a descriptor can describe an `aligned` tensor (B, H, N, D): steps are multiples of 16 bytes, and none is 0."""
    return x.dtype != torch.float32 and x.shape[3] % 8 == 0 and 0 not in (*x.shape, *_strides(x.shape, x.stride()))


@functools.lru_cache(maxsize=1024)
def _strides(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a dimension of size 1 lead nowhere, and may be no multiple of 16 bytes."""
    return (*(step if n > 1 else shape[3] for n, step in zip(shape[:3], stride[:3], strict=True)), 1)


@triton.jit
def boxed_tile(boxes, i_b, i_h, row):
    """The tile [rows,columns], not `wide`, of head i_h of sample i_b that begins at this row, zeros outside of the tensor."""
    b = boxes.load([i_b.to(tl.int32), i_h.to(tl.int32), row, 0])
    return Tile(b.reshape([boxes.block_shape[2], boxes.block_shape[3]]), 0, 0, 0, 0)


@triton.jit
def store_box(boxes, i_b, i_h, row, b):
    """Writes the tile [rows,columns] that begins at this row of head i_h of sample i_b, as far as it lies within the tensor."""
    boxes.store([i_b.to(tl.int32), i_h.to(tl.int32), row, 0], b.to(boxes.dtype).reshape(boxes.block_shape))
