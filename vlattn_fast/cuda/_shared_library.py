"""The library of CUDA C++ kernels: where it is, what it runs on, and how arguments are prepared.

Refusals look only at whether the file exists. It is loaded at the first call and then registers torch.ops.vlattn_cuda.
VLATTN_CUDA_LIBRARY names another file than the installed one: your own build, or libvlattn_host.so, which is built from the
same sources for CPU tensors in tests (see CMakeLists.txt).
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast._native import described
from vlattn_fast._tensors import additive

INSTALLED = Path(__file__).parent / "libvlattn_cuda.so"


class Library(NamedTuple):
    """A file and what refusals need to know of it. torch.compile traces them and cannot look at a disk."""

    path: Path
    exists: bool
    device_type: str  # what it runs on


def find(path: Path) -> Library:
    return Library(path, path.exists(), "cpu" if path.name.startswith("libvlattn_host") else "cuda")


library = find(Path(os.environ.get("VLATTN_CUDA_LIBRARY") or INSTALLED))


def state() -> str:
    """How the library was built, or why it was not, for `vlattn info`."""
    return described(library.path, INSTALLED, "VLATTN_CUDA_LIBRARY", _built)


def _built(stored: dict[str, Any]) -> str:
    targets = ", ".join(map(_target, stored["targets"]))
    return f"built for {targets}, with nvcc {stored['nvcc']} and the headers of torch {stored['torch']}"


def _target(name: str) -> str:
    number, _, kind = name.partition("-")  # as CMake writes it: 90a-real
    return f"PTX of compute_{number}" if kind == "virtual" else f"sm_{number}"


@functools.cache
def _load(file: Path) -> Any:
    torch.ops.load_library(file)
    return torch.ops.vlattn_cuda


def operators() -> Any:
    """torch.ops.vlattn_cuda"""
    return _load(library.path)


def masks(attn_mask: Tensor | None, key_mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """attn_mask, bool or float32, as a view of (B, H, N, M), and key_mask (B, M), contiguous."""
    if attn_mask is not None:
        attn_mask = additive(attn_mask, torch.float32).expand(*query.shape[:3], key.shape[2])
    return attn_mask, None if key_mask is None else key_mask.contiguous()
