"""The library of CUDA C++ kernels: where it is, what it runs on, and how a kernel is called.

A call is a struct of csrc/cuda/, which `Fields` packs, through ctypes, which releases the GIL. The device and the stream are
torch's. Refusals look only at whether the file exists; it is loaded at the first call. VLATTN_CUDA_LIBRARY names another file
than the installed one. Who runs the kernels of GPUs on CPU tensors puts another `library` here, for device_type "cpu".
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import cast_float_mask
from vlattn_fast.backends.native import Fields, Library, described

INSTALLED = Path(__file__).parent / "libvlattn_cuda.so"
MASKS = Fields(
    "int32 kind, flag causal, pointer pairs, integer stride_b stride_h stride_n stride_m, pointer keys, integer num_keys"
)
_BOOL, _ADDED = 1, 2  # Masks::Kind, in which 0 is none


def find(path: Path) -> Library:
    return Library.find(path, "CUDA C++", "cuda", INSTALLED, "VLATTN_CUDA_LIBRARY")


library = find(Path(os.environ.get("VLATTN_CUDA_LIBRARY") or INSTALLED))


def state() -> str:
    """How the library was built, or why it was not, for `vlattn info`."""
    return described(library.path, INSTALLED, "VLATTN_CUDA_LIBRARY", _built)


def _built(stored: dict[str, Any]) -> str:
    return f"built for {', '.join(map(_target, stored['targets']))}, with nvcc {stored['nvcc']}"


def _target(name: str) -> str:
    number, _, kind = name.partition("-")  # as CMake writes it: 90a-real
    return f"PTX of compute_{number}" if kind == "virtual" else f"sm_{number}"


def kernel(name: str, fields: Fields) -> Callable[..., None]:
    """The kernel `name` as a function of a tensor, on whose device and current stream it runs, and of its struct's members."""
    pack = fields.layout.pack

    def run(like: Tensor, numbers: tuple[Any, ...]) -> None:
        function, call = _function(library, name, fields), pack(*numbers)
        if like.is_cuda:
            with torch.cuda.device(like.device):
                message = function(call, torch.cuda.current_stream(like.device).cuda_stream)
        else:
            message = function(call, None)
        if message is not None:
            values = {path: number for (path, _), number in zip(fields.numbers, numbers, strict=True)}
            facts = ", ".join(f"{size}={values[size]}" for size in fields.sizes)
            raise RuntimeError(f"{name}({facts}) on {like.device}: {message.decode()}")

    return fields.function("_run(like, {})", "like", _run=run)


@functools.cache
def _function(of: Library, name: str, fields: Fields) -> Any:
    check_versions(*_versions(of))
    return of.operator(f"vlattn_cuda_{name}", fields, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)


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


def masks(inputs: Any, query: Tensor, key: Tensor) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    """MASKS of an operator's inputs, and the tensors behind them, which must live until the call is over: attn_mask, bool or
    float32, as a view of (B, H, N, M), and key_mask (B, M), contiguous."""
    attn_mask, key_mask, named = inputs.attn_mask, inputs.key_mask, {"causal": inputs.is_causal}
    if attn_mask is not None:
        attn_mask = cast_float_mask(attn_mask, torch.float32).expand(*query.shape[:3], key.shape[2])
        b, h, n, m = attn_mask.stride()
        kind = _BOOL if attn_mask.dtype == torch.bool else _ADDED
        named |= {"kind": kind, "pairs": attn_mask, "stride_b": b, "stride_h": h, "stride_n": n, "stride_m": m}
    if key_mask is not None:
        key_mask = key_mask.contiguous()
        named |= {"keys": key_mask, "num_keys": key_mask.shape[1]}
    return MASKS.values(**named), (attn_mask, key_mask)
