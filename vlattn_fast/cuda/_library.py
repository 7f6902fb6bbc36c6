"""The library of CUDA C++ kernels: where it is, what it runs on, and what every call is prepared with.

Whether a call can run is asked of the file's presence alone; it is loaded, and registers torch.ops.vlattn_cuda, when first used.
VLATTN_CUDA_LIBRARY names another file than the installed one: a build of one's own, or libvlattn_host.so, which is made of the
same sources for CPU tensors, for tests (see CMakeLists.txt).
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops._checks import additive

path = Path(os.environ.get("VLATTN_CUDA_LIBRARY") or Path(__file__).parent / "libvlattn_cuda.so")


def device_type() -> str:
    """What the library runs on."""
    return "cpu" if path.name.startswith("libvlattn_host") else "cuda"


@functools.cache
def _load(file: Path) -> Any:
    torch.ops.load_library(file)
    return torch.ops.vlattn_cuda


def operators() -> Any:
    """torch.ops.vlattn_cuda"""
    return _load(path)


def unit_strides(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors, copied where neighbours in the last dimension are not neighbours in memory: no kernel takes a last stride."""
    return tuple(x if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous() for x in tensors)


def masks(attn_mask: Tensor | None, key_mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """attn_mask, bool or float32, as a view of (B,H,N,M), and key_mask (B,M) contiguous."""
    if attn_mask is not None:
        attn_mask = additive(attn_mask, torch.float32).expand(*query.shape[:3], key.shape[2])
    return attn_mask, None if key_mask is None else key_mask.contiguous()
