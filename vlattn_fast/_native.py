"""The library of the CPU's C++ kernels (csrc/cpu/): where it lies, which instruction set runs, and how a kernel is called.

A call is one packed struct of pointers, strides, sizes and numbers, each of 8 bytes, through ctypes, which releases the GIL.
VLATTN_CPU_LIBRARY names another file, VLATTN_CPU_ISA one of the instruction sets: v4, v3 or baseline.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

INSTALLED = Path(__file__).parent / "cpu" / "libvlattn_cpu.so"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}  # Dtype of csrc/cpu/rows.h


class Library(NamedTuple):
    """A file and whether it is there. torch.compile traces what asks, and cannot look at a disk."""

    path: Path
    exists: bool


def find(path: Path) -> Library:
    return Library(path, path.is_file())


library = find(Path(os.environ.get("VLATTN_CPU_LIBRARY") or INSTALLED))


@functools.cache
def _library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library.path))
    # it is loaded already; the functions of its C interface exist since torch 2.10
    libtorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    loaded.vlattn_set_threads(libtorch.torch_parallel_for, libtorch.torch_get_num_threads)
    loaded.vlattn_instruction_sets.restype = ctypes.c_char_p
    return loaded


@functools.cache
def instruction_set() -> str:
    """The one whose kernels run: the widest that the processor has, or the one that VLATTN_CPU_ISA names."""
    available = _library().vlattn_instruction_sets().decode().split()
    wanted = os.environ.get("VLATTN_CPU_ISA") or available[0]
    if wanted not in available:
        raise ValueError(f"VLATTN_CPU_ISA must be one of {', '.join(available)}, which this processor runs; got {wanted!r}")
    return wanted


def kernel(name: str, fields: str) -> Callable[..., None]:
    """The kernel `name` as a function of its struct's fields: q for an integer or a pointer, d for a number."""
    layout = struct.Struct(fields)
    pack, size = layout.pack, layout.size

    @functools.cache
    def function() -> Any:
        found = getattr(_library(), f"vlattn_{instruction_set()}_{name}")
        found.argtypes, found.restype = (ctypes.c_char_p, ctypes.c_int64), ctypes.c_int64
        return found

    def run(*values: Any) -> None:
        code = function()(pack(*values), size)
        if code == 1:
            raise MemoryError(f"{name}: not enough memory for the kernel's workspace")
        if code != 0:
            raise RuntimeError(f"{library.path} does not fit this vlattn_fast: install it again")

    return run


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def rows(x: Tensor | None) -> tuple[int, int, int, int]:
    """Rows of csrc/cpu/rows.h: a tensor (B, H, N, *) with a last stride of 1, or none."""
    if x is None:
        return 0, 0, 0, 0
    b, h, n, _ = x.stride()
    return x.data_ptr(), b, h, n
