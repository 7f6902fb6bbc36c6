"""The library of CUDA C++ kernels: where it is, what it runs on, and how a kernel is called.

A call is a struct of csrc/cuda/, as Python's `struct` packs it with C's own alignment, through ctypes, which releases the GIL.
The device and the stream are torch's. Refusals look only at whether the file exists; it is loaded at the first call.
VLATTN_CUDA_LIBRARY names another file than the installed one: your own build, or libvlattn_host.so, which is built from the
same sources for CPU tensors in tests (see CMakeLists.txt).
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import cast_float_mask
from vlattn_fast.backends.native import DTYPES, Library, described, pointer

INSTALLED = Path(__file__).parent / "libvlattn_cuda.so"
ROWS, MASKS = "4q", "i?7q"  # StridedTensor, Masks of csrc/cuda/attention.h
_NO_MASK, _BOOL, _ADDED = range(3)  # Masks::Kind


def find(path: Path) -> Library:
    device_type = "cpu" if path.name.startswith("libvlattn_host") else "cuda"
    return Library.find(path, "CUDA C++", device_type, INSTALLED, "VLATTN_CUDA_LIBRARY")


library = find(Path(os.environ.get("VLATTN_CUDA_LIBRARY") or INSTALLED))


def state() -> str:
    """How the library was built, or why it was not, for `vlattn info`."""
    return described(library.path, INSTALLED, "VLATTN_CUDA_LIBRARY", _built)


def _built(stored: dict[str, Any]) -> str:
    return f"built for {', '.join(map(_target, stored['targets']))}, with nvcc {stored['nvcc']}"


def _target(name: str) -> str:
    number, _, kind = name.partition("-")  # as CMake writes it: 90a-real
    return f"PTX of compute_{number}" if kind == "virtual" else f"sm_{number}"


def kernel(name: str, sizes: str, fields: str) -> Callable[..., None]:
    """The kernel `name` as a function of a tensor, on whose device and current stream it runs, and of its struct's fields.

    The first field is the dtype, that of the tensor. `fields` are the others: q for an integer of 64 bits or a pointer, i for one
    of 32 bits, f for a number, ? for a flag. The first of them are the sizes whose names `sizes` lists, for what goes wrong.
    """
    names = sizes.split()
    layout = struct.Struct(f"@i{fields}0q")  # 0q: up to the alignment, as sizeof counts
    pack, size = layout.pack, layout.size

    def run(like: Tensor, *values: Any) -> None:
        function, call = _function(library, name), pack(DTYPES[like.dtype], *values)
        if like.is_cuda:
            with torch.cuda.device(like.device):
                message = function(call, size, torch.cuda.current_stream(like.device).cuda_stream)
        else:
            message = function(call, size, None)
        if message is not None:
            facts = ", ".join(f"{fact}={value}" for fact, value in zip(names, values, strict=False))
            raise RuntimeError(f"{name}({facts}) on {like.device}: {message.decode()}")

    return run


@functools.cache
def _function(of: Library, name: str) -> Any:
    check_versions(*_versions(of))
    return of.function(f"vlattn_cuda_{name}", ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p)


def _versions(of: Library) -> tuple[int, int]:
    """The versions of CUDA that the library is built with and that the driver runs; as 1000 major + 10 minor, 0 for none."""
    built, driver = ctypes.c_int(), ctypes.c_int()
    of.function("vlattn_cuda_versions", None, *[ctypes.POINTER(ctypes.c_int)] * 2)(built, driver)
    return built.value, driver.value


def check_versions(built: int, driver: int) -> None:
    """A driver runs what is built with its own major version of CUDA or an older one; else every launch would fail. Torch's own
    version does not matter: the library has a runtime of its own, and both use the device's one context."""
    if driver // 1000 < built // 1000:
        raise RuntimeError(
            f"the CUDA C++ kernels are built with CUDA {built // 1000}, and the driver runs CUDA {driver // 1000}: update the "
            "driver, or install vlattn_fast again with a CUDA toolkit of its version"
        )


def single(x: float) -> float:
    """As C++ narrows it: `struct` refuses what is finite in float64 alone."""
    return ctypes.c_float(x).value


def masks(attn_mask: Tensor | None, key_mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """attn_mask, bool or float32, as a view of (B, H, N, M), and key_mask (B, M), contiguous."""
    if attn_mask is not None:
        attn_mask = cast_float_mask(attn_mask, torch.float32).expand(*query.shape[:3], key.shape[2])
    return attn_mask, None if key_mask is None else key_mask.contiguous()


def mask_fields(attn_mask: Tensor | None, key_mask: Tensor | None, is_causal: bool) -> tuple[Any, ...]:
    """Those of MASKS, of what `masks` made; the caller keeps the tensors until the call is over."""
    pairs: tuple[Any, ...] = (_NO_MASK, is_causal, 0, 0, 0, 0, 0)
    if attn_mask is not None:
        kind = _BOOL if attn_mask.dtype == torch.bool else _ADDED
        pairs = kind, is_causal, attn_mask.data_ptr(), *attn_mask.stride()
    return *pairs, pointer(key_mask), 0 if key_mask is None else key_mask.shape[1]
