"""Compiles the kernels of this package by another ptxas where Triton's own one is of CUDA 12.8.

That one can lose the address of an operand of wgmma, which tools/compiled/descriptors.py finds in machine code. On an H100
`paged_attention_statistics` then ended in an illegal access; other kernels would read other numbers. Triton 3.6 and 3.7 have a
ptxas of CUDA 12.8 for Hopper, and a newer one for Blackwell beside it. Both make the same machine code of
the 20 kernels that take the most time. A ptxas that TRITON_PTXAS_PATH names is kept, unless it is one of CUDA 12.8, too.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

FAULTY = "12.8"


def newer_ptxas() -> str | None:
    """The path of a ptxas that is to take the place of a faulty one; None where there is no such thing.

    A driver runs what a ptxas of its major version of CUDA makes, and the driver is as new as torch's CUDA.
    """
    nvidia = triton.knobs.nvidia
    blackwell = getattr(nvidia, "ptxas_blackwell", None)
    if nvidia.ptxas.version != FAULTY or blackwell is None or blackwell.version == FAULTY:
        return None
    major, most = (int(version.split(".")[0]) for version in (blackwell.version, torch.version.cuda or blackwell.version))
    return str(blackwell.path) if major <= most else None


def install() -> None:
    """Lets Triton compile the kernels of this package by `newer_ptxas`, and all others as before."""
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime.jit import JITFunction

    compile_before = JITFunction._do_compile

    @functools.wraps(compile_before)
    def compile_by(self: Any, *arguments: Any, **options: Any) -> Any:
        path = newer_ptxas() if self.fn.__module__.startswith(f"{__package__}.") else None
        if path is None:
            return compile_before(self, *arguments, **options)
        with triton.knobs.nvidia.scope():
            triton.knobs.nvidia.ptxas = path
            get_ptxas_version.cache_clear()  # the version is part of the names of compiled kernels on the disk
            try:
                return compile_before(self, *arguments, **options)
            finally:
                get_ptxas_version.cache_clear()

    JITFunction._do_compile = compile_by


if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
    install()
