"""Libraries of C++ kernels, and that of the CPU (csrc/cpu/): where it lies, which instruction set runs, how a kernel is called.

A call is one packed struct of pointers, strides, sizes and numbers through ctypes, which releases the GIL; for the CPU each has 8
bytes. Refusals look only at whether the file exists; it is loaded at the first call. VLATTN_CPU_LIBRARY names another file than
the installed one, and calls that would use it raise where it is not there. VLATTN_CPU_ISA names one of the instruction sets: v4,
v3 or baseline. The library for GPUs: cuda/_shared_library.py.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

INSTALLED = Path(__file__).parent / "cpu" / "libvlattn_cpu.so"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}  # in csrc/cpu/rows.h and csrc/cuda/device.h


class Library(NamedTuple):
    """A file of kernels and what refusals need to know of it. torch.compile traces what asks, and cannot look at a disk."""

    path: Path
    exists: bool
    title: str
    device_type: str  # what its kernels run on
    error: str  # what a call that asks for it says where a variable names a file that is not there; else empty

    @classmethod
    def find(cls, path: Path, title: str, device_type: str, installed: Path, variable: str) -> Library:
        path, exists = path.absolute(), path.is_file()
        error = f"{variable} must name the library of the {title} kernels; got {str(path)!r}, which is no file"
        return cls(path, exists, title, device_type, "" if exists or path == installed else error)

    @functools.cache  # noqa: B019  there are two
    def load(self) -> ctypes.CDLL:
        try:
            return ctypes.CDLL(str(self.path))
        except OSError as error:
            raise RuntimeError(f"the {self.title} kernels cannot be loaded (install vlattn_fast again): {error}") from error

    def function(self, name: str, result: Any, *arguments: Any) -> Any:
        """The C function `name`, with the types of its result and arguments."""
        function = getattr(self.load(), name, None)
        if function is None:
            raise RuntimeError(f"{self.path} has no {name}: it does not fit this vlattn_fast; install it again")
        function.restype, function.argtypes = result, arguments
        return function


def find(path: Path) -> Library:
    return Library.find(path, "CPU", "cpu", INSTALLED, "VLATTN_CPU_LIBRARY")


library = find(Path(os.environ.get("VLATTN_CPU_LIBRARY") or INSTALLED))


def described(file: Path, installed: Path, variable: str, words: Callable[[dict[str, Any]], str]) -> str:
    """How a library was built, in `words` of the record that setup.py has stored beside it, or why it was not."""
    if file != installed:
        return f"{file}, named by {variable}{'' if file.exists() else ', is not there'}"
    record = file.with_name("build.json")
    stored = json.loads(record.read_text()) if record.exists() else {}
    if not file.exists():
        unknown = f"it was, but {file.name} is gone" if stored else "no `pip install` of this copy has tried"
        return f"not built: {stored.get('reason', unknown)}"
    return words(stored) if "seconds" in stored else "built by hand"


def state() -> str:
    """How the library was built, or why it was not, and what of it runs here, for `vlattn info`."""
    text = described(library.path, INSTALLED, "VLATTN_CPU_LIBRARY", lambda stored: f"built with {stored['compiler']}")
    if not library.exists:
        return text
    try:
        chosen = " (VLATTN_CPU_ISA)" if os.environ.get("VLATTN_CPU_ISA") else ""
        return f"{text}; of {', '.join(_available())} this processor runs {instruction_set()}{chosen}"
    except (RuntimeError, ValueError) as error:
        return f"{text}; {error}"


@functools.cache
def _library() -> ctypes.CDLL:
    # libtorch is loaded already; the functions of its C interface exist since torch 2.10
    suffix = "dylib" if sys.platform == "darwin" else "so"
    libtorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))
    set_threads = library.function("vlattn_set_threads", None, ctypes.c_void_p, ctypes.c_void_p)
    set_threads(libtorch.torch_parallel_for, libtorch.torch_get_num_threads)
    library.function("vlattn_instruction_sets", ctypes.c_char_p)
    return library.load()


def _available() -> list[str]:
    return _library().vlattn_instruction_sets().decode().split()


@functools.cache
def instruction_set() -> str:
    """The one whose kernels run: the widest that the processor has, or the one that VLATTN_CPU_ISA names."""
    available = _available()
    chosen = os.environ.get("VLATTN_CPU_ISA") or available[0]
    if chosen not in available:
        raise ValueError(f"VLATTN_CPU_ISA must be one of {', '.join(available)}, which this processor runs; got {chosen!r}")
    return chosen


def kernel(name: str, fields: str) -> Callable[..., None]:
    """The kernel `name` as a function of its struct's fields: q for an integer or a pointer, d for a number."""
    layout = struct.Struct(fields)
    pack, size = layout.pack, layout.size

    @functools.cache
    def function() -> Any:
        symbol = f"vlattn_{instruction_set()}_{name}"
        return library.function(symbol, ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64)

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
    """StridedTensor of csrc/cpu/rows.h and csrc/cuda/attention.h: (B, H, N, *) with a last stride of 1, or none."""
    if x is None:
        return 0, 0, 0, 0
    b, h, n, _ = x.stride()
    return x.data_ptr(), b, h, n
