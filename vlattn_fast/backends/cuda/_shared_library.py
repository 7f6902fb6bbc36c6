"""The library of CUDA C++ kernels: where it is, what it runs on, and how a kernel is called.

A call is a struct of csrc/cuda/ through ctypes, which releases the GIL. The device and the stream are
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
from vlattn_fast.backends.inputs import Attention
from vlattn_fast.backends.native import Library, address, described, unfit

INSTALLED = Path(__file__).parent / "libvlattn_cuda.so"
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


def kernel(name: str) -> Callable[..., None]:
    """The kernel `name`, a function of a tensor, on whose device and current stream it runs, and of the members of its struct."""

    def run(like: Tensor, **members: Any) -> None:
        function, struct = _function(library, name)
        try:
            call = struct(**members)
        except AttributeError as error:
            raise unfit(library, name, error) from error
        if like.is_cuda:
            with torch.cuda.device(like.device):
                message = function(bytes(call), torch.cuda.current_stream(like.device).cuda_stream)
        else:
            message = function(bytes(call), None)
        if message is not None:
            numbers = [member for member, of, *_ in struct._fields_ if of in (ctypes.c_int32, ctypes.c_int64)]
            numbers_text = ", ".join(f"{member}={getattr(call, member)}" for member in numbers)
            raise RuntimeError(f"{name}({numbers_text}) on {like.device}: {message.decode()}")

    return run


@functools.cache
def _function(of: Library, name: str) -> tuple[Any, Any]:
    """And its struct."""
    check_versions(*_versions(of))
    function = of.operator(f"vlattn_cuda_{name}", ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
    return function, of.struct(f"vlattn_cuda_{name}")


def part(name: str, member: str) -> Callable[[], Any]:
    """Returns a function that gives the class of a member of the kernel `name`, a struct."""
    return functools.cache(lambda: dict(_function(library, name)[1]._fields_)[member])


_masks = part("score_attention", "masks")


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


def masks_of(x: Attention) -> tuple[Any, tuple[Tensor | None, ...]]:
    """Returns masks, and their tensors, which must live until the call is over: attn_mask, bool or float32, as a view of
    (B, H, N, M), and key_mask (B, M), contiguous."""
    attn_mask, key_mask, masks = x.attn_mask, x.key_mask, causal_mask(x.is_causal)
    if attn_mask is not None:
        attn_mask = cast_float_mask(attn_mask, torch.float32).expand(*x.query.shape[:3], x.key.shape[2])
        masks.kind, masks.pairs = _BOOL if attn_mask.dtype == torch.bool else _ADDED, address(attn_mask)
        masks.stride_b, masks.stride_h, masks.stride_n, masks.stride_m = attn_mask.stride()
    if key_mask is not None:
        key_mask = key_mask.contiguous()
        masks.keys, masks.num_keys = address(key_mask), key_mask.shape[1]
    return masks, (attn_mask, key_mask)


def causal_mask(is_causal: bool) -> Any:
    """Returns masks without tensors."""
    return _masks()(causal=is_causal)
