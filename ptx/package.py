"""The kernels of GPUs on CPU tensors: `install` tells the package, from outside, that their compiled code runs here.

    VLATTN_PTX=90 python -m ptx verify --backend triton     # any command of `vlattn`

tests/conftest.py installs it for `make ptx`.
"""

from __future__ import annotations

import os

from vlattn_fast.dispatch.call import OnCpu, run_gpu_kernels_on_cpu

ARCHITECTURES = (80, 90, 100)


def install(architecture: str) -> None:
    """Until the process ends, the backends "triton" and "cuda" run on CPU tensors as a GPU of this architecture would.

    A kernel that reads what the package has allocated, and nothing has written, is reported.
    """
    if architecture not in map(str, ARCHITECTURES):
        raise ValueError(f"VLATTN_PTX must be one of {', '.join(map(str, ARCHITECTURES))}; got {architecture!r}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("VLATTN_PTX runs compiled kernels, and TRITON_INTERPRET=1 leaves them uncompiled: set one of the two")
    from ptx import cuda, triton
    from ptx.running import memory

    number = int(architecture)
    triton.start(number)
    cuda.start(number)
    memory.mark()
    command = f"VLATTN_PTX={architecture} python -m ptx"
    run_gpu_kernels_on_cpu(OnCpu(divmod(number, 10), command, _reseed))


def _reseed() -> None:
    """The launches from here on are drawn as the first ones of a process are."""
    from triton.runtime.driver import driver

    from ptx import cuda

    driver.active.launched = 0
    if cuda.Device.active is not None:
        cuda.Device.active.launched = 0
