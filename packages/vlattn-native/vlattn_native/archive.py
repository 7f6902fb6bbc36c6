"""Kernels that were compiled ahead of their first call: archives, which launch each of their kernels covers, and its launcher.

An archive, compiled/sm_90.zip, is written by compiling.py. Its manifest has an entry for each compiled launch, with what the
kernel was compiled for: `Form` and needs. Its other members are cubins, or PTX, which the driver compiles for sm_100.
libvlattn_launch.so (csrc/launch/) then launches through CUDA's driver. All else stays as it is: the functions of
vlattn_fast.kernels plan a launch and name its arguments, and Triton compiles and launches what no entry covers. If such a
function does nothing but allocate and launch, calls with the metadata of an earlier one repeat its launches, and the function
does not run.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction, KernelInterface

from vlattn_fast import kernels
from vlattn_fast._ground.tensors import LAYOUTS
from vlattn_fast.kernels._configurations import OVERRIDES
from vlattn_fast.kernels._tiles import OLD_TRITON

FOLDER = Path(__file__).parent / "compiled"
LIBRARY = FOLDER / "libvlattn_launch.so"
MANIFEST = "manifest.json"
DRIVER = "libcuda.so.1"
IS_ON = os.environ.get("VLATTN_COMPILED", "1") != "0"
# a parameter's type in Triton's signature: its code in csrc/launch/launch.cpp
CODES = {"i64": "q", "u64": "q", "i32": "i", "u32": "i", "i1": "b", "u1": "b", "i8": "b", "fp32": "f", "fp64": "d"}


class Leaf(NamedTuple):
    """A number, a tensor or a constant among the arguments of a launch. kind: what it is, in a form."""

    path: str
    kind: str
    value: Any


class Form(NamedTuple):
    """What chooses a compiled kernel, beside divisibility: a text for each leaf, path and kind, and the options."""

    kernel: str
    leaves: tuple[str, ...]
    options: tuple[str, ...]


class Uncovered(Exception):
    """A launch with an argument of a kind that no archive has, such as a tensor descriptor."""


def name_of(kernel: Any) -> str:
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


def text_of(constant: Any) -> str:
    """The text of a constant, with and without Triton's wrapper."""
    if isinstance(constant, tl.constexpr):
        return text_of(constant.value)
    if isinstance(constant, tuple):
        return f"({', '.join(map(text_of, constant))})"
    return repr(constant)


def leaves_of(kernel: Any, named: dict[str, Any]) -> list[Leaf]:
    """In the order in which the launcher numbers them."""
    made: list[Leaf] = []
    for parameter in kernel.params:
        if parameter.name not in named:
            made.append(Leaf(parameter.name, "default", None))
        elif parameter.is_constexpr:
            made.append(Leaf(parameter.name, text_of(named[parameter.name]), None))
        else:
            made.extend(_leaves(parameter.name, named[parameter.name]))
    return made


def members(path: str, value: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """The members of a tuple among the arguments, with their paths."""
    names = getattr(value, "_fields", range(len(value)))
    return [(f"{path}.{name}", member) for name, member in zip(names, value, strict=True)]


def _leaves(path: str, value: Any) -> Iterator[Leaf]:
    if isinstance(value, tuple):
        for member in members(path, value):
            yield from _leaves(*member)
    elif value is None or isinstance(value, bool | int | float):
        yield Leaf(path, type(value).__name__, value)
    elif isinstance(value, Tensor):
        yield Leaf(path, str(value.dtype), value)
    else:
        raise Uncovered(path)


def form_of(kernel: Any, named: dict[str, Any], leaves: list[Leaf]) -> Form:
    parameters = {parameter.name for parameter in kernel.params}
    options = tuple(sorted(f"{name}={text_of(value)}" for name, value in named.items() if name not in parameters))
    return Form(name_of(kernel), tuple(f"{leaf.path}={leaf.kind}" for leaf in leaves), options)


class Entry(NamedTuple):
    """A compiled launch. needs: by the number of a leaf what its value or address must be, 1 itself or a multiple of 16.
    parameters: the leaf and the type of each parameter of the kernel, -1 for scratch memory, which it does not use."""

    member: str
    symbol: str
    warps: int
    shared: int
    needs: dict[int, int]
    parameters: list[tuple[int, str]]

    def covers(self, leaves: list[Leaf]) -> bool:
        return all(_meets(leaves[int(n)].value, need) for n, need in self.needs.items()) and all(
            -(2**31) <= leaves[n].value < 2**31 for n, kind in self.parameters if kind == "i32"
        )


def _meets(value: Any, need: int) -> bool:
    number = value.data_ptr() if isinstance(value, Tensor) else value
    return bool(number == 1 if need == 1 else number % need == 0)


def sources() -> str:
    """A digest of the files with kernels, and of Triton's version as far as they depend on it. An archive of other
    sources is not used."""
    digest = hashlib.sha256(repr(bool(OLD_TRITON.value)).encode())
    for file in sorted(Path(kernels.__path__[0]).glob("*.py")):
        text = file.read_bytes()
        if re.search(rb"(?m)^@triton\.", text):
            digest.update(text)
    return digest.hexdigest()


class Archive:
    """The compiled kernels for GPUs of one architecture."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as file:
            manifest = json.loads(file.read(MANIFEST))
        self.sources: str = manifest["sources"]
        self.entries: dict[Form, list[Entry]] = {}
        for kernel, leaves, options, *entry in manifest["entries"]:
            self.entries.setdefault(Form(kernel, tuple(leaves), tuple(options)), []).append(Entry(*entry))
        for same in self.entries.values():
            same.sort(key=lambda entry: -len(entry.needs))  # the most specialised first
        self.kernels = {form.kernel for form in self.entries}
        self.functions: dict[tuple[int, str], int] = {}  # the driver's, by device and member

    def find(self, kernel: Any, named: dict[str, Any]) -> Entry | None:
        """The compiled kernel of a launch, or None."""
        try:
            leaves = leaves_of(kernel, named)
        except Uncovered:
            return None
        same = self.entries.get(form_of(kernel, named, leaves), ())
        return next((entry for entry in same if entry.covers(leaves)), None)

    def image(self, entry: Entry) -> bytes:
        with zipfile.ZipFile(self.path) as file:
            return file.read(entry.member)


class _Allocations(TorchDispatchMode):
    """Keeps what is allocated within it, and sees whether torch did anything else but views."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.is_all = True

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if op in _ALLOCATING:
            self.made.append(result)
        elif op not in _VIEWS:
            self.is_all = False
        return result


_ATEN = torch.ops.aten
_ALLOCATING = {
    _ATEN.empty.memory_format,
    _ATEN.empty_strided.default,
    _ATEN.empty_like.default,
    _ATEN.new_empty.default,
    _ATEN.new_empty_strided.default,
}
_VIEWS = {
    _ATEN.transpose.int,
    _ATEN.view.default,
    _ATEN.select.int,
    _ATEN.slice.Tensor,
    _ATEN.unsqueeze.default,
    _ATEN.squeeze.dim,
    _ATEN.expand.default,
    _ATEN.detach.default,
    _ATEN.alias.default,
}


def repeatable(inputs: Any, outputs: Any, allocated: list[Tensor], launches: list[Any]) -> tuple[Any, ...] | None:
    """What the launcher repeats of a call: its allocations, its launches with the tensor that each address is of, and which
    allocation each output is. None if an address is no argument's and no allocation's, or an output is a part of an
    allocation."""
    arguments = [x for each in inputs for x in (each if isinstance(each, tuple) else (each,))]  # with those of an attention
    addresses = {x.data_ptr(): n for n, x in enumerate(arguments) if isinstance(x, Tensor)}
    storages = [(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in allocated]
    geometry = list(allocated)
    single = isinstance(outputs, Tensor)
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    if not single and type(outputs) is not tuple or any(x.device != device for x in allocated):
        return None
    numbers = []
    for x in (outputs,) if single else outputs:
        of = [n for n, (start, _) in enumerate(storages) if x is not None and x.untyped_storage().data_ptr() == start]
        if x is None:
            numbers.append(-1)
            continue
        extent = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
        if len(of) != 1 or of[0] in numbers or not x.numel() or extent * x.element_size() != storages[of[0]][1]:
            return None
        geometry[of[0]] = x
        numbers.append(of[0])
    repeated = []
    for launch in launches:
        if launch is None:
            return None
        compiled, grid, values, tensors = launch
        sources = []
        for place in tensors:
            address = values[place]
            within = [n for n, (start, size) in enumerate(storages) if start <= address < start + size]
            if address in addresses:
                sources.append((place, addresses[address], 0))
            elif within:
                sources.append((place, len(arguments) + within[0], address - storages[within[0]][0]))
            elif address:  # a tensor without numbers has none
                return None
        repeated.append((compiled, grid, values, sources))
    allocations = [(tuple(x.shape), x.stride(), x.dtype) for x in geometry]
    return tuple(allocations), tuple(repeated), tuple(numbers), single


_GETITEM = KernelInterface.__getitem__


def _state() -> int | None:
    """A number for all that plans depend on beside their arguments. None if tiles are tried, or something watches launches."""
    if OVERRIDES or KernelInterface.__getitem__ is not _GETITEM:
        return None
    is_tf32 = torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"
    return LAYOUTS.promised + 2 * is_tf32 + 4 * torch._C._get_cudnn_sdp_enabled()


class Launching:
    """Launches from the archives in a folder, by the library. current_device, stream and capability are torch's, and
    allocate(shape, stride, dtype) gives a tensor on the current device."""

    def __init__(
        self,
        folder: Path,
        library: Path,
        driver: str,
        current_device: Callable[[], int],
        stream: Callable[[int], int],
        capability: Callable[[int], tuple[int, int]],
        allocate: Callable[..., Tensor],
    ) -> None:
        loader = importlib.machinery.ExtensionFileLoader("vlattn_launch", str(library))
        spec = importlib.util.spec_from_file_location("vlattn_launch", library, loader=loader)
        assert spec is not None
        self.library = importlib.util.module_from_spec(spec)
        self.library.connect(driver, Tensor, current_device, stream, text_of)
        self.folder, self.capability, self.allocate = folder, capability, allocate
        self.archives: dict[int, Archive | None] = {}  # by device
        self.lock = threading.RLock()  # a kernel is loaded once, and modules are taken once
        self.modules: set[str] = set()
        self.kernels: list[Any] = []
        self.functions: dict[Callable[[Any], Any], Callable[[Any], Any]] = {}

    def archive(self, device: int) -> Archive | None:
        """That of a device; None if there is none of these sources."""
        if device not in self.archives:
            major, minor = self.capability(device)
            # code for sm_80 runs on 8.6 and 8.9, PTX for sm_100f on 10.3; code for sm_90a runs on nothing else
            path = self.folder / f"sm_{major}{0 if major in (8, 10) else minor}.zip"
            found = Archive(path) if path.is_file() else None
            self.archives[device] = found if found is not None and found.sources == sources() else None
        return self.archives[device]

    def resolve(self, kernel: Any, named: dict[str, Any], device: int) -> tuple[Any, ...] | None:
        """For the launcher: the compiled kernel of a launch that it meets for the first time, or None."""
        with self.lock:
            archive = self.archive(device)
            if archive is None:
                return None
            entry = archive.find(kernel, {name: x for name, x in named.items() if name not in ("grid", "warmup")})
            if entry is None:
                return None
            place = device, entry.member
            if place not in archive.functions:
                try:
                    archive.functions[place] = self.library.load(archive.image(entry), entry.symbol, entry.shared, device)
                except RuntimeError as error:  # a driver that is older than the PTX
                    _warn(str(error))
                    return None
        parameters = tuple((leaf, "q" if kind[0] == "*" else CODES[kind]) for leaf, kind in entry.parameters)
        return archive.functions[place], entry.symbol, 32 * entry.warps, entry.shared, parameters

    def of(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`function`, which launches kernels, with launches from the archives. A second call with the same metadata repeats them
        without planning."""
        found: Callable[[Any], Any] | None = self.functions.get(function)
        if found is None:
            self.take()  # all modules that it needs are imported
            found = self.functions[function] = self.library.Planned(function, self.plan, _state, self.allocate)
        return found

    def plan(self, function: Callable[[Any], Any], inputs: Any) -> tuple[Any, tuple[Any, ...] | None]:
        """The result of a first call, and what may be repeated of it: nothing if torch computed something, too."""
        allocations = _Allocations()
        self.library.record()
        try:
            with allocations:
                outputs = function(inputs)
        finally:
            launches = self.library.end_record()
        return outputs, repeatable(inputs, outputs, allocations.made, launches) if allocations.is_all else None

    def take(self) -> None:
        """Launches the kernels of all modules of vlattn_fast.kernels that are imported by now."""
        prefix = f"{kernels.__name__}."
        with self.lock:
            for name in [name for name in sys.modules if name.startswith(prefix) and name not in self.modules]:
                self.modules.add(name)
                for kernel in vars(sys.modules[name]).values():
                    if isinstance(kernel, JITFunction) and kernel.fn.__module__ == name:
                        self.replace(kernel)

    def replace(self, kernel: Any) -> None:
        """Puts the launcher in place of Triton's, to which it hands over what it does not launch."""
        parameters = tuple((one.name, one.is_constexpr) for one in kernel.params)
        kernel.run = self.library.Launcher(parameters, functools.partial(self.resolve, kernel), kernel.run)
        self.kernels.append(kernel)

    def end(self) -> None:
        """Gives all kernels back to Triton."""
        for kernel in self.kernels:
            vars(kernel).pop("run", None)
        self.kernels.clear()
        self.modules.clear()


@functools.cache
def _warn(error: str) -> None:
    warnings.warn(f"Triton compiles kernels at their first call, since a compiled one cannot be used: {error}", stacklevel=2)


on_cpu: Launching | None = None  # that of calls with CPU tensors, of which a test emulates the launches


def of(function: Callable[[Any], Any], device: torch.device) -> Callable[[Any], Any]:
    """The hook of vlattn_fast: `function`, which launches kernels, with launches from the device's archive if it has one."""
    found = on_cpu if device.index is None else launching()
    return function if found is None else found.of(function)


@functools.cache
def launching() -> Launching | None:
    """That of this process; None without the library or archives, and with VLATTN_COMPILED=0."""
    if not IS_ON or not LIBRARY.is_file() or torch.version.hip is not None:
        return None
    try:
        return Launching(
            FOLDER,
            LIBRARY,
            DRIVER,
            torch._C._cuda_getDevice,
            torch._C._cuda_getCurrentRawStream,
            torch.cuda.get_device_capability,
            torch._C._dynamo.guards._empty_strided_cuda,  # type: ignore[attr-defined]  # quicker than torch.empty_strided
        )
    except (ImportError, OSError, AttributeError) as error:  # a torch whose private functions have other names
        _warn(str(error))
        return None
