"""What the package does where VLATTN_PTX names an architecture: its GPU kernels take CPU tensors, and their PTX is emulated.

    VLATTN_PTX=90 python -m vlattn_fast verify --backend triton

vlattn_fast/ops/_dispatch.py calls `install` at the first use of an operator.
"""

from __future__ import annotations

import os

ARCHITECTURES = (80, 90, 100)


def install(architecture: str) -> None:
    """Until the process ends, the backends "triton" and "cuda" run on CPU tensors as a GPU of this architecture would.

    A kernel that reads what the package has allocated, and nothing has written, is reported.
    """
    if architecture not in map(str, ARCHITECTURES):
        raise ValueError(f"VLATTN_PTX must be one of {', '.join(map(str, ARCHITECTURES))}; got {architecture!r}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("VLATTN_PTX runs compiled kernels, and TRITON_INTERPRET=1 leaves them uncompiled: set one of the two")
    from ptx import cuda, memory, triton

    triton.start(int(architecture))
    cuda.start(int(architecture))
    memory.mark()


def reseed() -> None:
    """The launches from here on are drawn as the first ones of a process are."""
    from triton.runtime.driver import driver

    from ptx import cuda

    driver.active.launched = 0
    if cuda.Device.active is not None:
        cuda.Device.active.launched = 0
