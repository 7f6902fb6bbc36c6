"""The stand-in for CUDA's driver (ptx/runtime/driver.cpp): modules of PTX are loaded and launched, and what CUDA refuses is
refused with its errors."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptx import cuda
from ptx.running.launch import Launch
from ptx.running.reports import EmulationError

INVALID_VALUE, INVALID_CONFIGURATION, INVALID_CONTEXT, NO_BINARY, NOT_FOUND, LAUNCH_FAILED = 1, 9, 201, 209, 500, 719
MAX_DYNAMIC_SHARED = 8
# out[i] = i + added, of the first `size` of 32 threads
TEXT = b"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry number(.param .u64 out, .param .u32 added, .param .u32 size)
{
    .reg .pred %p<2>;
    .reg .b32 %r<5>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [out];
    ld.param.u32 %r1, [added];
    ld.param.u32 %r2, [size];
    mov.u32 %r3, %tid.x;
    setp.ge.u32 %p1, %r3, %r2;
    @%p1 ret;
    add.s32 %r4, %r3, %r1;
    mul.wide.u32 %rd2, %r3, 4;
    add.s64 %rd3, %rd1, %rd2;
    st.global.b32 [%rd3], %r4;
    ret;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("c++") is None:
        pytest.skip("the stand-in for the driver is not tested: c++ is not installed")
    made = tmp_path_factory.mktemp("driver") / "libcuda.so"
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run(["c++", *options, cuda.DRIVER, "-o", made], check=True)
    return made


@pytest.fixture
def driver(library: Path) -> Iterator[ctypes.CDLL]:
    loaded = ctypes.CDLL(str(library))
    loaded.cuCtxSetCurrent(None)
    with cuda.emulated(80):
        yield cuda.connected(loaded)


def load(driver: ctypes.CDLL, text: bytes = TEXT, name: bytes = b"number") -> int | ctypes.c_void_p:
    """A function, or the error."""
    context, module, function = (ctypes.c_void_p() for _ in range(3))
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    driver.cuCtxSetCurrent(context)
    return (
        driver.cuModuleLoadData(ctypes.byref(module), text)
        or driver.cuModuleGetFunction(ctypes.byref(function), module, name)
        or function
    )


def number(driver: ctypes.CDLL, out: Tensor, size: int, threads: int = 32, shared: int = 0, function: object = None) -> int:
    """The status of a launch."""
    values = ctypes.c_void_p(out.data_ptr()), ctypes.c_int(5), ctypes.c_int(size)
    arguments = (ctypes.c_void_p * 3)(*(ctypes.addressof(value) for value in values))
    with cuda.Device.active.using(cuda.lent({"out": out})):
        return driver.cuLaunchKernel(function or load(driver), 1, 1, 1, threads, 1, 1, shared, None, arguments, None)


def test_a_launch_writes_to_the_tensors(driver: ctypes.CDLL) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    assert number(driver, out, 20) == 0
    assert out.tolist() == [*range(5, 25), *[0] * 12]
    launches: list[Launch] = cuda.Device.active.launches
    assert [launch.name for launch in launches] == ["number"]


def test_an_access_outside_of_the_tensors_ends_the_launch(driver: ctypes.CDLL) -> None:
    with pytest.raises(EmulationError, match="out"):
        number(driver, torch.zeros(10, dtype=torch.int32), 32)


def test_more_shared_memory_has_to_be_asked_for(driver: ctypes.CDLL) -> None:
    out, function = torch.zeros(32, dtype=torch.int32), load(driver)
    assert number(driver, out, 20, shared=50_000, function=function) == INVALID_VALUE
    assert driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, cuda.SHARED[80] + 1) == INVALID_VALUE
    assert driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, 50_000) == 0
    assert number(driver, out, 20, shared=50_000, function=function) == 0


def test_what_cuda_refuses(driver: ctypes.CDLL) -> None:
    module = ctypes.c_void_p()
    assert driver.cuModuleLoadData(ctypes.byref(module), TEXT) == INVALID_CONTEXT
    assert load(driver, b"\177ELF machine code") == NO_BINARY
    assert load(driver, b"no kernel") == NO_BINARY
    assert load(driver, name=b"numbers") == NOT_FOUND
    assert number(driver, torch.zeros(32, dtype=torch.int32), 20, threads=2048) == INVALID_CONFIGURATION
    name = ctypes.c_char_p()
    assert driver.cuGetErrorName(LAUNCH_FAILED, ctypes.byref(name)) == 0 and name.value == b"CUDA_ERROR_LAUNCH_FAILED"
    assert driver.cuGetErrorName(12345, ctypes.byref(name)) == INVALID_VALUE
