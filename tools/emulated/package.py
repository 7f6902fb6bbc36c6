"""Both backends for GPUs at once: `emulated` for a while, as tests/conftest.py takes it, `install` for a process."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import ptx.cuda
import ptx.triton
from ptx.architectures import ARCHITECTURES
from ptx.running import memory
from ptx.running.launch import Launch
from ptx.running.reports import Options
from tools.emulated import cuda, triton
from vlattn_fast._ground import extras
from vlattn_fast.dispatch.call import OnCpu, run_gpu_kernels_on_cpu

_UNTIL_THE_END = ExitStack()
atexit.register(_UNTIL_THE_END.close)


def architecture_of(text: str) -> int:
    """The architecture that VLATTN_PTX names."""
    if text not in map(str, ARCHITECTURES):
        raise ValueError(f"VLATTN_PTX must be one of {', '.join(map(str, ARCHITECTURES))}; got {text!r}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("VLATTN_PTX runs compiled kernels, and TRITON_INTERPRET=1 leaves them uncompiled: set one of the two")
    return int(text)


def install(architecture: str) -> None:
    """Until the process ends, the backends "triton" and "cuda" run on CPU tensors as a GPU of this architecture would."""
    _UNTIL_THE_END.enter_context(emulated(architecture_of(architecture), options_of_process(), keep=False))


def options_of_process() -> Options:
    """VLATTN_PTX_SEED (0) draws the launches. Triton before 3.8 leaves out fences on sm_90 (docs/reliability.md): there all other
    findings count."""
    return Options(seed=int(os.environ.get("VLATTN_PTX_SEED", "0")), fences=not extras.missing("triton", 3, 8))


@contextmanager
def emulated(architecture: int, options: Options, *, keep: bool = True) -> Iterator[list[Launch]]:
    """The same within it. Gives the list of Triton's launches, which grows unless not `keep`.

    A kernel that reads what the package has allocated, and nothing has written, is reported.
    """
    on_cpu = OnCpu(divmod(architecture, 10), f"VLATTN_PTX={architecture} python -m tools.emulated", _reseed)
    with ExitStack() as stack:
        launches = stack.enter_context(triton.emulated(architecture, options, keep=keep))
        stack.enter_context(cuda.emulated(architecture, options, keep=False))
        stack.enter_context(memory.marked("vlattn_fast"))
        stack.callback(run_gpu_kernels_on_cpu, run_gpu_kernels_on_cpu(on_cpu))
        yield launches


def _reseed() -> None:
    """The launches from here on are drawn as the first ones of a process are."""
    ptx.triton.reseed()
    if ptx.cuda.Device.active is not None:
        ptx.cuda.Device.active.launched = 0
