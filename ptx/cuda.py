"""CUDA C++ kernels on CPU tensors: nvcc compiles them to PTX, which is emulated; their own host code launches them.

runtime/ stands in for CUDA's runtime library under that host code: grids, blocks and shared memory are the library's. It hands
each launch over to this module, which holds it against CUDA's limits. Kernels take pointers, so a call's tensors are copied
between guards, and the pointers in the call's struct replaced: an access outside of these tensors ends the launch.

    with ptx.cuda.emulated(80) as launches:
        va.relevancy_attention(query, key, value, carrier, backend="cuda")
    print(launches[0].name, launches[0].executed)
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

from ptx.building import ROOT, build
from ptx.running.launch import Launch, launch
from ptx.running.memory import Memory
from ptx.running.program import Program
from ptx.running.reports import Options
from vlattn_fast.backends.cuda import _shared_library
from vlattn_fast.backends.native import Fields, Library

TARGETS = {80: "80", 90: "90a", 100: "100"}
# Bytes of a block, at most. Of the GPUs that run sm_80's code sm_86 has the least.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
UNASKED = 48 * 1024  # bytes of a block without cudaFuncSetAttribute
GRID, BLOCK, THREADS = (2**31 - 1, 65535, 65535), (1024, 1024, 64), 1024
INVALID_VALUE, INVALID_CONFIGURATION, OUT_OF_RESOURCES, LAUNCH_FAILURE = 1, 9, 701, 719  # cudaError_t


class _Kernel(ctypes.Structure):
    """Kernel of runtime.cpp."""

    _fields_ = [("text", ctypes.c_void_p), ("name", ctypes.c_char_p), ("title", ctypes.c_char_p)]


class _Launch(ctypes.Structure):
    """Launch of runtime.cpp."""

    _fields_ = [
        ("kernel", ctypes.POINTER(_Kernel)),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint64),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
    ]


_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))
_ALLOW = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Kernel), ctypes.c_int)


class _Emulator(ctypes.Structure):
    """Emulator of runtime.cpp."""

    _fields_ = [("launch", _LAUNCH), ("allow", _ALLOW)]


@contextmanager
def emulated(
    architecture: int, options: Options | None = None, *, strict: bool = True, library: Path | None = None
) -> Iterator[list[Launch]]:
    """Within it backend="cuda" takes CPU tensors. Gives the list of launches, which grows.

    `library`: another file than the one that is built for the architecture. A launch with findings raises, unless not `strict`.
    Errors, after which a kernel cannot go on, raise in any case.
    """
    before = _shared_library.library, Tensor.data_ptr, Device.active
    launches: list[Launch] = []
    try:
        start(architecture, options, strict=strict, library=library, launches=launches)
        yield launches
    finally:
        _shared_library.library, Tensor.data_ptr, Device.active = before  # type: ignore[method-assign]


def start(
    architecture: int,
    options: Options | None = None,
    *,
    strict: bool = True,
    library: Path | str | None = None,
    launches: list[Launch] | None = None,
) -> None:
    """The same until the process ends. Without `options` launches are drawn by VLATTN_PTX_SEED (0)."""
    options = options or Options(seed=int(os.environ.get("VLATTN_PTX_SEED", "0")))
    Device.active = Device(architecture, options, strict, launches)
    path = ROOT / "build" / f"ptx{TARGETS[architecture]}" / "libvlattn_ptx.so"
    if library := library or os.environ.get("VLATTN_CUDA_LIBRARY"):
        facts = (Path(library), "CUDA C++", "cpu", _shared_library.INSTALLED, "VLATTN_CUDA_LIBRARY")
        _shared_library.library = Emulated.find(*facts)
    else:
        _shared_library.library = Built(path, shutil.which("nvcc") is not None, "CUDA C++", "cpu", "")
    Tensor.data_ptr = _recorded  # type: ignore[method-assign]


# Kernels know tensors by their addresses. What asked for its address since the last call is known again by it.
_TENSORS: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
_data_ptr = Tensor.data_ptr


def _recorded(x: Tensor) -> int:
    address = _data_ptr(x)
    _TENSORS[address] = x
    return address


class Emulated(Library):
    """A library whose kernels are emulated."""

    def load(self) -> ctypes.CDLL:
        loaded = super().load()
        loaded.ptx_connect(ctypes.byref(_EMULATOR))
        return loaded

    def operator(self, name: str, fields: Fields, result: Any, *arguments: Any) -> Callable[[bytes, None], bytes | None]:
        function = super().operator(name, fields, result, *arguments)

        def call(packed: bytes, stream: None) -> bytes | None:
            device, memory = Device.active, Memory()
            assert device is not None  # start() has set it with this library
            numbers, shapes = [], {}
            for (path, code), number in zip(fields.numbers, fields.layout.unpack(packed), strict=True):
                if code == "P" and number:
                    shapes[path] = tuple(_TENSORS[number].shape)
                    number = memory.place(_TENSORS[number], path)
                numbers.append(number)
            _TENSORS.clear()
            device.shapes = shapes
            with device.using(memory):
                return function(fields.layout.pack(*numbers), stream)

        return call


class Built(Emulated):
    """The library of an architecture, brought up to date when it is loaded."""

    def load(self) -> ctypes.CDLL:
        name = self.path.parent.name
        build(name, f"-DVLATTN_PTX={name.removeprefix('ptx')}")
        return super().load()


@dataclass
class _Loaded:
    """A kernel, and the bytes of dynamic shared memory that a block of it may have."""

    program: Program
    title: str
    allowed: int


class Device:
    """The GPU that is not there."""

    active: Device | None = None  # which `start` sets

    def __init__(self, architecture: int, options: Options, strict: bool, launches: list[Launch] | None) -> None:
        self.architecture, self.options, self.strict, self.launches = architecture, options, strict, launches
        self.launched = 0
        self.memory: Memory | None = None
        self.error: BaseException | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}  # of a call's tensors
        self.loaded: dict[int, _Loaded] = {}  # by the address of the runtime's Kernel

    @contextmanager
    def using(self, memory: Memory) -> Iterator[None]:
        """A call of the library, whose kernels run on these copies of its tensors."""
        self.memory, self.error = memory, None
        yield
        memory.back()
        if self.error is not None:
            raise self.error

    def kernel(self, one: _Kernel) -> _Loaded:
        address = ctypes.addressof(one)
        if address not in self.loaded:
            program = _program(one.text, one.name.decode())
            title = one.title.decode().replace("(anonymous namespace)::", "").replace("vlattn::", "")
            self.loaded[address] = _Loaded(
                program, title.removeprefix("void ").rpartition("(")[0], UNASKED - program.kernel.shared
            )
        return self.loaded[address]

    def allow(self, kernel: _Loaded, shared: int) -> int:
        if not 0 <= shared <= SHARED[self.architecture] - kernel.program.kernel.shared:
            return INVALID_VALUE
        kernel.allowed = shared
        return 0

    def refusal(self, kernel: _Loaded, launch: _Launch) -> int:
        """CUDA's error where it launches no such grid, else 0."""
        block = math.prod(launch.block)
        sizes = zip((*launch.grid, *launch.block), GRID + BLOCK, strict=True)
        if not all(1 <= size <= largest for size, largest in sizes) or block > THREADS:
            return INVALID_CONFIGURATION
        if block > (kernel.program.kernel.max_threads or THREADS):
            return OUT_OF_RESOURCES
        return INVALID_VALUE if launch.shared > kernel.allowed else 0

    def launch(self, kernel: _Loaded, call: _Launch) -> int:
        if refusal := self.refusal(kernel, call):
            return refusal
        assert self.memory is not None
        options = replace(self.options, seed=self.options.seed + self.launched)
        self.launched += 1
        values = [ctypes.string_at(call.arguments[n], one.size) for n, one in enumerate(kernel.program.parameters)]
        done = launch(kernel.program, values, tuple(call.grid), tuple(call.block), call.shared, self.memory, options)
        done.name, done.shapes = kernel.title, self.shapes
        if self.launches is not None:
            self.launches.append(done)
        if self.strict:
            done.check()
        return 0


@functools.cache
def _program(text: int, name: str) -> Program:
    """The kernel `name` of the PTX at the address `text`."""
    return Program(text_at(text), name)


@functools.cache
def text_at(address: int) -> str:
    return ctypes.string_at(address).decode()


def _for_runtime(answer: Callable[[Device, Any, Any], int]) -> Callable[[Any, Any], int]:
    """As a callback, through which no exception can pass: the call of the library raises it when it is over."""

    def callback(kernel: Any, argument: Any) -> int:
        device = Device.active
        assert device is not None
        try:
            return answer(device, device.kernel(kernel.contents), argument)
        except BaseException as error:
            device.error = error
            return LAUNCH_FAILURE

    return callback


_launch, _allow = _for_runtime(Device.launch), _for_runtime(Device.allow)
_EMULATOR = _Emulator(_LAUNCH(lambda launch: _launch(launch.contents.kernel, launch.contents)), _ALLOW(_allow))
