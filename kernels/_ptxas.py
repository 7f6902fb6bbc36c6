"""Compiles the kernels of this package by another ptxas if Triton's own one is of CUDA 12.8.

That one can lose the address of an operand of wgmma, which tools/compiled/descriptors.py finds in machine code. On an H100
`paged_attention_statistics` then ended in an illegal access; other kernels would read other numbers. Triton 3.6 and 3.7 have a
ptxas of CUDA 12.8 for Hopper, and also a newer one for Blackwell. Both make the same machine code of the 20 kernels that
take the most time. A ptxas that TRITON_PTXAS_PATH names is used, unless it is one of CUDA 12.8, too.
"""

from __future__ import annotations

import functools
import threading
import warnings
from typing import Any

import torch
import triton

FAULTY = "12.8"
_LOCK = threading.RLock()  # what Triton knows of ptxas belongs to the process


def is_faulty() -> bool:
    return bool(triton.knobs.nvidia.ptxas.version == FAULTY)


def newer_ptxas() -> str | None:
    """The path of a ptxas that can replace a faulty one; None if there is none.

    A driver runs what a ptxas of its major version of CUDA makes, and the driver is as new as torch's CUDA.
    """
    try:
        blackwell = triton.knobs.nvidia.ptxas_blackwell
    except (AttributeError, RuntimeError):  # another Triton, or one that lacks the file
        return None
    version, faulty = (tuple(map(int, text.split("."))) for text in (blackwell.version, FAULTY))
    most = int((torch.version.cuda or blackwell.version).split(".")[0])
    return str(blackwell.path) if version > faulty and version[0] <= most else None


@functools.cache
def warn() -> None:
    """Says once that nothing replaces a faulty ptxas, if there is a Hopper GPU."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        warnings.warn(
            f"Triton {triton.__version__} compiles for this GPU by ptxas of CUDA {FAULTY}, which can lose addresses: some "
            "kernels of vlattn_fast may give wrong numbers. Install triton 3.8 or newer, or name a ptxas of CUDA 12.9 in "
            "TRITON_PTXAS_PATH.",
            RuntimeWarning,
            stacklevel=2,
        )


def install() -> None:
    """Lets Triton compile the kernels of this package by `newer_ptxas`, and all others as before."""
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime import _async_compile
    from triton.runtime.jit import JITFunction

    compile_before = JITFunction._do_compile

    @functools.wraps(compile_before)
    def compile_by(self: Any, *arguments: Any, **options: Any) -> Any:
        if not (self.fn.__module__ or "").startswith(f"{__package__}.") or not is_faulty():
            return compile_before(self, *arguments, **options)
        path = newer_ptxas()
        if path is None:
            warn()
            return compile_before(self, *arguments, **options)
        at_once = _async_compile.active_mode.set(None)  # else another thread would compile after this scope
        try:
            with _LOCK, triton.knobs.nvidia.scope():
                triton.knobs.nvidia.ptxas = path
                get_ptxas_version.cache_clear()  # the version is part of the names of compiled kernels on the disk
                try:
                    return compile_before(self, *arguments, **options)
                finally:
                    get_ptxas_version.cache_clear()
        finally:
            _async_compile.active_mode.reset(at_once)

    JITFunction._do_compile = compile_by


if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
    install()
