"""Kernels that were compiled ahead, launched by the launcher in C++ over a stand-in for CUDA's driver, on CPU tensors.

with tests.helpers.launching.emulated(folder, 90) as launches:      # a folder with an archive of PTX
    va.score_attention(query, key, value, backend="triton")
print(launches[0].executed)

A launch that no archive covers raises an error: Triton has no driver here. `planned` leaves the launches out, to time the host.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ptx.cuda
from ptx.running.launch import Launch
from ptx.running.reports import Options
from vlattn_fast.dispatch.call import OnCpu, run_gpu_kernels_on_cpu
from vlattn_fast.kernels import _configurations
from vlattn_native import archive, building


@functools.cache
def driver() -> Path:
    """The stand-in for CUDA's driver that the package ptx brings along."""
    library = building.ROOT / "build" / "driver" / "libcuda.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        newest = max(path.stat().st_mtime for path in ptx.cuda.DRIVER.parent.iterdir())
        if not library.exists() or library.stat().st_mtime < newest:
            command = ["c++", "-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", ptx.cuda.DRIVER, "-o", library]
            subprocess.run(command, check=True)
    return library


@contextmanager
def planned(folder: Path, architecture: int) -> Iterator[archive.Launching]:
    """Within it backend="triton" takes CPU tensors, and all kernels are launched from the archives in a folder:
    with nothing behind the driver, launches do nothing."""
    with ExitStack() as stack:
        stack.callback(run_gpu_kernels_on_cpu, run_gpu_kernels_on_cpu(OnCpu(divmod(architecture, 10))))
        stack.callback(setattr, _configurations, "TARGET", _configurations.TARGET)
        _configurations.TARGET = f"sm_{architecture}"
        made = archive.Launching(
            folder,
            building.launcher(),
            str(driver()),
            lambda: 0,
            lambda device: 0,
            lambda device: divmod(architecture, 10),
            torch._C._dynamo.guards._empty_strided_cpu,
        )
        stack.callback(made.end)
        stack.callback(setattr, archive, "on_cpu", archive.on_cpu)
        archive.on_cpu = made
        made.take()
        yield made


@contextmanager
def emulated(folder: Path, architecture: int, options: Options | None = None) -> Iterator[list[Launch]]:
    """The same, with launches that are emulated. Gives the list of launches, which grows."""
    with ptx.cuda.emulated(architecture, options) as launches, planned(folder, architecture) as made:
        stand_in = ctypes.CDLL(str(driver()))
        ptx.cuda.connected(stand_in)
        for kernel in made.kernels:
            kernel.run = _with_tensors(kernel.run)
        made.allocate, of = _allocate, made.of
        made.of = lambda function: _with_tensors(of(function))  # type: ignore[method-assign]
        try:
            yield launches
        finally:
            stand_in.ptx_connect(None)


def _allocate(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """For launches that are repeated, whose tensors no function of Python sees."""
    made = torch.empty_strided(shape, stride, dtype=dtype)
    device = ptx.cuda.Device.active
    assert device is not None and device.memory is not None
    device.memory.ranges += ptx.cuda.lent({"allocation": made}).ranges
    return made


def _with_tensors(run: Callable[..., Any]) -> Callable[..., Any]:
    """A launch whose tensors the emulated GPU can reach."""

    def launch(*arguments: Any, **named: Any) -> Any:
        device = ptx.cuda.Device.active
        assert device is not None
        with device.using(ptx.cuda.lent(dict(_tensors("", (*arguments, named))))):
            return run(*arguments, **named)

    return launch


def _tensors(path: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor) and value.numel():
        yield path, value
    elif isinstance(value, dict | tuple):
        members = value.items() if isinstance(value, dict) else enumerate(value)
        for name, member in members:
            yield from _tensors(f"{path}.{name}", member)
