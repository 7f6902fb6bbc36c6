"""Libraries of C++ kernels, and that of the CPU (csrc/cpu/): its path, which instruction set runs, how a kernel is called.

A call is one struct of pointers, strides, sizes and numbers through ctypes, which releases the GIL. The library says which
members a struct has, and where they lie (csrc/layout.h). The limits of backends only check whether the file exists; it is loaded
at the first call. VLATTN_CPU_LIBRARY names another file than the installed one, and calls that would use it
raise if it does not exist. VLATTN_CPU_ISA names one of the instruction sets (docs/developers/building.md).
The library for GPUs: cuda/_shared_library.py.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import sys
from collections.abc import Callable
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

    def operator(self, name: str, result: Any, *arguments: Any) -> Any:
        """Returns the kernel `name`, whose first argument is a struct, as `bytes`."""
        return self.function(name, result, *arguments)

    @functools.cache  # noqa: B019  there are two
    def members(self, name: str) -> tuple[list[tuple[str, str, int]], int]:
        """Returns path, code and offset of each number in the struct of the kernel `name`, such as ("a.query.stride_b", "q", 80),
        in the order in which they lie there, and the size of the struct."""
        *lines, size = map(str.split, self.text(f"{name}_fields").splitlines())
        return sorted(((path, code, int(offset)) for path, code, offset in lines), key=lambda line: line[2]), int(size[1])

    @functools.cache  # noqa: B019  there are two
    def struct(self, name: str) -> Any:
        """Returns the struct of the kernel `name` for ctypes. Structs within it that have the same members as those of another
        kernel are of the same class."""
        tree: dict[str, Any] = {}
        members, size = self.members(name)
        for path, code, _ in members:
            *outer, last = path.replace("[", ".[").split(".")
            inner = tree
            for part in outer:
                inner = inner.setdefault(part, {})
            inner[last] = _TYPES[code]
        struct = _of_tree(tree)
        assert ctypes.sizeof(struct) == size, f"{name}: {size}"
        return struct


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


# of the codes of Python's `struct`, as csrc/layout.h writes them
_TYPES = {
    "q": ctypes.c_int64,
    "i": ctypes.c_int32,
    "?": ctypes.c_bool,
    "d": ctypes.c_double,
    "f": ctypes.c_float,
    "P": ctypes.c_void_p,
}


_CLASSES: dict[Any, Any] = {}  # by what they consist of


def _one(of: Any, made: Any) -> Any:
    """Returns the class that consists of `of`: the first one that any thread has made. A cached function gives each of the
    threads that call it first a class of its own."""
    return _CLASSES.setdefault(of, made)


def _struct(*fields: tuple[str, Any]) -> Any:
    """Returns a class of structs with these members. Without __slots__ ctypes would take a misspelt member without a word.

    An address keeps no tensor alive: whoever makes a struct holds the tensors until the call is over.
    """
    return _one(fields, type("Struct", (ctypes.Structure,), {"__slots__": (), "_fields_": fields}))


def _of_tree(kind: Any) -> Any:
    if not isinstance(kind, dict):
        return kind
    if "[0]" in kind:
        inner, size = _of_tree(kind["[0]"]), len(kind)
        return _one((inner, size), inner * size)
    return _struct(*((name, _of_tree(inner)) for name, inner in kind.items()))


# (B, H, N, *) with a last stride of 1, or none
StridedTensor = _struct(("data", ctypes.c_void_p), *((f"stride_{name}", ctypes.c_int64) for name in "bhn"))
_NO_TENSOR = StridedTensor()


def strided(x: Tensor | None) -> Any:
    if x is None:
        return _NO_TENSOR
    b, h, n, _ = x.stride()
    return StridedTensor(x.data_ptr(), b, h, n)


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def chosen(name: str) -> str:
    """The C function `name` of the instruction set that runs, or else of the fastest that has it."""
    names = [f"vlattn_{isa}_{name}" for isa in (instruction_set(), *_available())]
    # `amx` and `v4_bf16` have kernels alone that multiply bfloat16
    return next(filter(library.has, names), names[0])


def kernel(name: str) -> Callable[..., None]:
    """Returns the CPU kernel `name`, a function of the members of its struct. A member that a call does not name is 0 or null."""

    @functools.cache
    def loaded() -> tuple[Any, Any]:
        return library.operator(chosen(name), ctypes.c_int64, ctypes.c_char_p), library.struct(chosen(name))

    def run(**members: Any) -> None:
        function, struct = loaded()
        try:
            call = struct(**members)
        except AttributeError as error:
            raise unfit(library, name, error) from error
        if function(bytes(call)) != 0:
            raise MemoryError(f"{name}: not enough memory for the kernel's workspace")

    return run


def part(name: str, member: str) -> Callable[[], Any]:
    """Returns a function that gives the class of a member of the kernel `name`, a struct: the library is not loaded before a
    call."""
    return functools.cache(lambda: dict(library.struct(chosen(name))._fields_)[member])


def unfit(of: Library, name: str, error: AttributeError) -> RuntimeError:
    """Returns the error of a call that names a member which the kernel `name` does not have."""
    return RuntimeError(f"{of.path} does not fit this vlattn_fast: install it again ({name}: {error})")
