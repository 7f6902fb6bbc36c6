"""Libraries of C++ kernels, and that of the CPU (csrc/cpu/): its path, which instruction set runs, how a kernel is called.

A call is one struct of pointers, strides, sizes and numbers through ctypes, which releases the GIL. A `Struct` has the members of
one of csrc/ by name; the library's own list must be the same (csrc/layout.h). The limits of backends only check whether the file
exists; it is loaded at the first call. VLATTN_CPU_LIBRARY names another file than the installed one, and calls that would use it
raise if it does not exist. VLATTN_CPU_ISA names one of the instruction sets (docs/building.md).
The library for GPUs: cuda/_shared_library.py.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

INSTALLED = Path(__file__).parent / "cpu" / "libvlattn_cpu.so"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}  # in csrc/cpu/rows.h and csrc/cuda/device.h


class Library(NamedTuple):
    """A file of kernels and what the limits of backends use of it. torch.compile traces them, and cannot access a disk."""

    path: Path
    exists: bool
    title: str
    device_type: str  # what its kernels run on
    error: str  # the error of a call that asks for it if a variable names a file that does not exist; else empty

    @classmethod
    def find(cls, path: Path, title: str, device_type: str, installed: Path, variable: str) -> Library:
        path, exists = path.absolute(), path.is_file()
        error = f"{variable} must name the library of the {title} kernels; got {str(path)!r}, which is not a file"
        return cls(path, exists, title, device_type, "" if exists or path == installed else error)

    @functools.cache  # noqa: B019  there are two
    def load(self) -> ctypes.CDLL:
        try:
            return ctypes.CDLL(str(self.path))
        except OSError as error:
            raise RuntimeError(f"the {self.title} kernels cannot be loaded (install vlattn_fast again): {error}") from error

    def has(self, name: str) -> bool:
        """Returns whether there is a C function of this name."""
        return hasattr(self.load(), name)

    def function(self, name: str, result: Any, *arguments: Any) -> Any:
        """Returns the C function `name`, with the types of its result and arguments."""
        function = getattr(self.load(), name, None)
        if function is None:
            raise RuntimeError(f"{self.path} has no {name}: it does not fit this vlattn_fast; install it again")
        function.restype, function.argtypes = result, arguments
        return function

    def text(self, name: str) -> str:
        """Returns the text that the C function `name` writes into a buffer."""
        buffer = ctypes.create_string_buffer(2**14)
        self.function(name, None, ctypes.c_char_p, ctypes.c_int64)(buffer, len(buffer))
        return buffer.value.decode()

    def operator(self, name: str, call: type[Struct], result: Any, *arguments: Any) -> Any:
        """Returns the kernel `name`, which takes such a struct."""
        function = self.function(name, result, *arguments)
        expected_lines = [*(f"{path} {code} {offset}" for path, code, offset in members(call)), f"size {ctypes.sizeof(call)}"]
        for actual, expected in itertools.zip_longest(self.text(f"{name}_fields").splitlines(), expected_lines):
            if actual != expected:
                raise RuntimeError(
                    f"{self.path} does not fit this vlattn_fast: install it again ({name} has {actual!r} for {expected!r})"
                )
        return function


def find(path: Path) -> Library:
    return Library.find(path, "CPU", "cpu", INSTALLED, "VLATTN_CPU_LIBRARY")


library = find(Path(os.environ.get("VLATTN_CPU_LIBRARY") or INSTALLED))


def described(file: Path, installed: Path, variable: str, words: Callable[[dict[str, Any]], str]) -> str:
    """Returns how a library was built, in `words` of what setup.py has stored with it, or why it was not."""
    if file != installed:
        return f"{file}, named by {variable}{'' if file.exists() else ', does not exist'}"
    record = file.with_name("build.json")
    stored = json.loads(record.read_text()) if record.exists() else {}
    if not file.exists():
        unknown = f"it was, but {file.name} is gone" if stored else "no `pip install` of this copy has tried"
        return f"not built: {stored.get('reason', unknown)}"
    return words(stored) if "seconds" in stored else "built by hand"


def state() -> str:
    """Returns how the library was built, or why it was not, and what of it runs here, for `vlattn info`."""
    text = described(library.path, INSTALLED, "VLATTN_CPU_LIBRARY", lambda stored: f"built with {stored['compiler']}")
    if not library.exists:
        return text
    try:
        by_name = " (VLATTN_CPU_ISA)" if os.environ.get("VLATTN_CPU_ISA") else ""
        return f"{text}; of {', '.join(_available())} this processor runs {instruction_set()}{by_name}"
    except (RuntimeError, ValueError) as error:
        return f"{text}; {error}"


@functools.cache
def _library() -> ctypes.CDLL:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    # libtorch is loaded already
    _set_threads(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}")))
    library.function("vlattn_instruction_sets", ctypes.c_char_p)
    return library.load()


def _set_threads(libtorch: Any) -> None:
    """Kernels run on torch's threads: by its C interface, or, before torch 2.10, by the OpenMP runtime that it has loaded."""
    names = ["torch_parallel_for", "torch_get_num_threads"]
    setter = "vlattn_set_threads"
    if not hasattr(libtorch, names[0]):
        # a look-up goes on in the libraries that libtorch needs, so no second runtime is loaded; the last two are at::
        names = ["GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num"]
        names += ["_ZN2at15get_num_threadsEv", "_ZN2at18in_parallel_regionEv"]
        setter = "vlattn_set_openmp"
    try:
        functions = [getattr(libtorch, name) for name in names]
    except AttributeError as error:
        raise RuntimeError(f"the CPU kernels need torch 2.10 or newer, or one with GNU's OpenMP: {error}") from error
    library.function(setter, None, *[ctypes.c_void_p] * len(names))(*functions)


def _available() -> list[str]:
    return _library().vlattn_instruction_sets().decode().split()


@functools.cache
def instruction_set() -> str:
    """The one whose kernels run: the fastest that the processor has, or the one that VLATTN_CPU_ISA names."""
    available = _available()
    if not available:  # another processor than the one that an editable install compiled for
        raise RuntimeError(
            f"this processor runs no instruction set that {library.path} was built for: install vlattn_fast here again, "
            "or with VLATTN_BUILD_ISA=all"
        )
    named = os.environ.get("VLATTN_CPU_ISA") or available[0]
    if named not in available:
        raise ValueError(f"VLATTN_CPU_ISA must be one of {', '.join(available)}, which this processor runs; got {named!r}")
    return named


class Struct(ctypes.Structure):
    """A struct of csrc/, whose `_fields_` name its members in their order. A member that a call does not name is 0 or null, as in
    C++.

    An address keeps no tensor alive: whoever makes a struct holds the tensors until the call is over.
    """

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        if "__slots__" not in vars(cls):
            raise TypeError(f"{cls.__name__} must have __slots__ = (): without it ctypes takes a misspelt member without a word")


def each(kind: Any, names: str) -> list[tuple[str, Any]]:
    """Members of one kind, for `_fields_`."""
    return [(name, kind) for name in names.split()]


class StridedTensor(Struct):
    """(B, H, N, *) with a last stride of 1, or none."""

    __slots__ = ()
    _fields_ = (("data", ctypes.c_void_p), *each(ctypes.c_int64, "stride_b stride_h stride_n"))


_NO_TENSOR = StridedTensor()


def strided(x: Tensor | None) -> StridedTensor:
    if x is None:
        return _NO_TENSOR
    b, h, n, _ = x.stride()
    return StridedTensor(x.data_ptr(), b, h, n)


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


# of Python's `struct`, as csrc/layout.h writes them
_CODES = {
    ctypes.c_int64: "q",
    ctypes.c_int32: "i",
    ctypes.c_bool: "?",
    ctypes.c_double: "d",
    ctypes.c_float: "f",
    ctypes.c_void_p: "P",
}


def members(kind: Any, path: str = "", offset: int = 0) -> Iterator[tuple[str, str, int]]:
    """Name, code and offset of each number in a struct: "a.query.stride_b", "q", 80."""
    if issubclass(kind, ctypes.Array):
        for n in range(kind._length_):
            yield from members(kind._type_, f"{path}[{n}]", offset + n * ctypes.sizeof(kind._type_))
    elif issubclass(kind, ctypes.Structure):
        for name, member, *_ in kind._fields_:
            yield from members(member, f"{path}.{name}".lstrip("."), offset + getattr(kind, name).offset)
    else:
        yield path, _CODES[kind], offset


def chosen(name: str) -> str:
    """The C function `name` of the instruction set that runs, or else of the fastest that has it."""
    names = [f"vlattn_{isa}_{name}" for isa in (instruction_set(), *_available())]
    # `amx` and `v4_bf16` have kernels alone that multiply bfloat16
    return next(filter(library.has, names), names[0])


def kernel(name: str, call: type[Struct]) -> Callable[[Struct], None]:
    """The CPU kernel `name` as a function of such a struct."""

    @functools.cache
    def function() -> Any:
        return library.operator(chosen(name), call, ctypes.c_int64, ctypes.c_char_p)

    def run(call: Struct) -> None:
        if function()(bytes(call)) != 0:
            raise MemoryError(f"{name}: not enough memory for the kernel's workspace")

    return run
