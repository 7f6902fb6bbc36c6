"""CUDA C++ kernels on CPU tensors: nvcc compiles them to PTX, which is emulated; their own host code launches them.

runtime/ stands in for CUDA's runtime library under that host code: grids, blocks and shared memory are the host code's. It hands
each launch over to this module, which holds it against CUDA's limits. Kernels take pointers, so the tensors of a call are copied
between guards, and the call takes the copies' addresses: an access outside of these tensors ends the launch.

    nvcc -shared -Xcompiler -fPIC -cudart none -lineinfo --no-compress \\
         -gencode arch=compute_90a,code=compute_90a mine.cu runtime.cpp -o libmine.so     # RUNTIME

    with ptx.cuda.emulated(90) as launches:
        library, memory = ptx.cuda.connected(ctypes.CDLL("./libmine.so")), Memory()
        with ptx.cuda.Device.active.using(memory):
            library.scale(ctypes.c_void_p(memory.place(x, "x")), x.numel())
    print(launches[0].name, launches[0].executed)

runtime/driver.cpp (DRIVER) stands in for the driver's library, libcuda, under a program that loads modules of PTX and launches by
the driver's API, in the same way. There the launches of a call take the tensors' own addresses if `lent` names them.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ptx.architectures import properties
from ptx.running.launch import Launch, launch
from ptx.running.memory import Memory
from ptx.running.program import Program
from ptx.running.reports import Options

RUNTIME = Path(__file__).with_name("runtime") / "runtime.cpp"  # to be compiled with the host code
DRIVER = RUNTIME.with_name("driver.cpp")  # to be compiled alone, as a library
# Bytes of a block, at most. Of the GPUs that run sm_80's code sm_86 has the least.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
UNASKED = 48 * 1024  # bytes of a block without cudaFuncSetAttribute
GRID, BLOCK, THREADS = (2**31 - 1, 65535, 65535), (1024, 1024, 64), 1024
INVALID_VALUE, INVALID_CONFIGURATION, OUT_OF_RESOURCES, LAUNCH_FAILURE, NOT_SUPPORTED = 1, 9, 701, 719, 801  # cudaError_t
MAX_DYNAMIC_SHARED, CARVEOUT = 8, 9  # cudaFuncAttribute, and the driver's


class _Kernel(ctypes.Structure):
    """Kernel of emulator.h."""

    _fields_ = [("text", ctypes.c_void_p), ("name", ctypes.c_char_p), ("title", ctypes.c_char_p)]


class _Launch(ctypes.Structure):
    """Launch of emulator.h."""

    _fields_ = [
        ("kernel", ctypes.POINTER(_Kernel)),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint64),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
    ]


_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))
_SET = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Kernel), ctypes.c_int, ctypes.c_int)


class _Emulator(ctypes.Structure):
    """Emulator of emulator.h."""

    _fields_ = [("launch", _LAUNCH), ("set", _SET)]


@contextmanager
def emulated(
    architecture: int, options: Options | None = None, *, strict: bool = True, keep: bool = True, namespace: str = ""
) -> Iterator[list[Launch]]:
    """Within it libraries that are `connected` find a GPU of this architecture. Gives the list of launches, which grows unless
    not `keep`; a library's `namespace` ("mine::") is left out of their names.

    A launch with findings raises, unless not `strict`. Errors, after which a kernel cannot go on, raise in any case.
    """
    properties(architecture)
    before, Device.active = Device.active, Device(architecture, options or Options(), strict, keep, namespace)
    try:
        yield Device.active.launches
    finally:
        Device.active = before


def connected(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, whose launches are emulated from here on."""
    library.ptx_connect(ctypes.byref(_EMULATOR))
    return library


def lent(tensors: dict[str, Tensor]) -> Memory:
    """Memory for `Device.using` whose launches use these tensors in place, by name: no access outside of all of them."""
    memory = Memory()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        memory.add(storage.data_ptr(), storage.nbytes(), name, writable=True)
    return memory


@dataclass
class _Loaded:
    """A kernel, the bytes of dynamic shared memory that a block of it may have, and how much of an SM's fast memory it prefers
    to have as shared memory, in percent: -1 if it does not say."""

    program: Program
    title: str
    allowed: int
    carveout: int = -1


class Device:
    """The GPU that is not there."""

    active: Device | None = None  # that of `emulated`

    def __init__(self, architecture: int, options: Options, strict: bool, keep: bool, namespace: str) -> None:
        self.architecture, self.options, self.strict, self.keep, self.namespace = architecture, options, strict, keep, namespace
        self.launches: list[Launch] = []
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
            title = one.title.decode().replace("(anonymous namespace)::", "").replace(self.namespace, "")
            self.loaded[address] = _Loaded(
                program, title.removeprefix("void ").rpartition("(")[0], UNASKED - program.kernel.shared
            )
        return self.loaded[address]

    def set(self, kernel: _Loaded, attribute: int, value: int) -> int:
        if attribute == CARVEOUT and -1 <= value <= 100:
            kernel.carveout = value
        elif attribute == MAX_DYNAMIC_SHARED and 0 <= value <= SHARED[self.architecture] - kernel.program.kernel.shared:
            kernel.allowed = value
        else:
            return INVALID_VALUE if attribute in (CARVEOUT, MAX_DYNAMIC_SHARED) else NOT_SUPPORTED
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
        done.name, done.shapes, done.carveout = kernel.title, self.shapes, kernel.carveout
        if self.keep:
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


def _for_runtime(answer: Callable[..., int]) -> Callable[..., int]:
    """As a callback, through which no exception can pass: the call of the library raises it when it is over."""

    def callback(kernel: Any, *arguments: Any) -> int:
        device = Device.active
        assert device is not None
        try:
            return answer(device, device.kernel(kernel.contents), *arguments)
        except BaseException as error:
            device.error = error
            return LAUNCH_FAILURE

    return callback


_launch, _set = _for_runtime(Device.launch), _for_runtime(Device.set)
_EMULATOR = _Emulator(_LAUNCH(lambda launch: _launch(launch.contents.kernel, launch.contents)), _SET(_set))
