"""Libraries of C++ kernels, and that of the CPU (csrc/cpu/): where it lies, which instruction set runs, how a kernel is called.

A call is one packed struct of pointers, strides, sizes and numbers through ctypes, which releases the GIL. `Fields` lists the
struct's members by name; the library's own list must be the same (csrc/layout.h). Refusals look only at whether the file exists;
it is loaded at the first call. VLATTN_CPU_LIBRARY names another file than the installed one, and calls that would use it raise
where it is not there. VLATTN_CPU_ISA names one of the instruction sets (docs/install.md).
The library for GPUs: cuda/_shared_library.py.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import os
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

INSTALLED = Path(__file__).parent / "cpu" / "libvlattn_cpu.so"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}  # in csrc/cpu/rows.h and csrc/cuda/device.h


class Library(NamedTuple):
    """A file of kernels and what refusals need to know of it. torch.compile traces what asks, and cannot look at a disk."""

    path: Path
    exists: bool
    title: str
    device_type: str  # what its kernels run on
    error: str  # what a call that asks for it says where a variable names a file that is not there; else empty

    @classmethod
    def find(cls, path: Path, title: str, device_type: str, installed: Path, variable: str) -> Library:
        path, exists = path.absolute(), path.is_file()
        error = f"{variable} must name the library of the {title} kernels; got {str(path)!r}, which is no file"
        return cls(path, exists, title, device_type, "" if exists or path == installed else error)

    @functools.cache  # noqa: B019  there are two
    def load(self) -> ctypes.CDLL:
        try:
            return ctypes.CDLL(str(self.path))
        except OSError as error:
            raise RuntimeError(f"the {self.title} kernels cannot be loaded (install vlattn_fast again): {error}") from error

    def has(self, name: str) -> bool:
        """Whether there is a C function of this name."""
        return hasattr(self.load(), name)

    def function(self, name: str, result: Any, *arguments: Any) -> Any:
        """The C function `name`, with the types of its result and arguments."""
        function = getattr(self.load(), name, None)
        if function is None:
            raise RuntimeError(f"{self.path} has no {name}: it does not fit this vlattn_fast; install it again")
        function.restype, function.argtypes = result, arguments
        return function

    def operator(self, name: str, fields: Fields, result: Any, *arguments: Any) -> Any:
        """The kernel `name`, whose struct has these fields."""
        function = self.function(name, result, *arguments)
        text = ctypes.create_string_buffer(2**14)
        self.function(f"{name}_fields", None, ctypes.c_char_p, ctypes.c_int64)(text, len(text))
        for actual, expected in itertools.zip_longest(text.value.decode().splitlines(), fields.lines()):
            if actual != expected:
                raise RuntimeError(
                    f"{self.path} does not fit this vlattn_fast: install it again ({name} has {actual!r} for {expected!r})"
                )
        return function


def find(path: Path) -> Library:
    return Library.find(path, "CPU", "cpu", INSTALLED, "VLATTN_CPU_LIBRARY")


library = find(Path(os.environ.get("VLATTN_CPU_LIBRARY") or INSTALLED))


def described(file: Path, installed: Path, variable: str, words: Callable[[dict[str, Any]], str]) -> str:
    """How a library was built, in `words` of the record that setup.py has stored beside it, or why it was not."""
    if file != installed:
        return f"{file}, named by {variable}{'' if file.exists() else ', is not there'}"
    record = file.with_name("build.json")
    stored = json.loads(record.read_text()) if record.exists() else {}
    if not file.exists():
        unknown = f"it was, but {file.name} is gone" if stored else "no `pip install` of this copy has tried"
        return f"not built: {stored.get('reason', unknown)}"
    return words(stored) if "seconds" in stored else "built by hand"


def state() -> str:
    """How the library was built, or why it was not, and what of it runs here, for `vlattn info`."""
    text = described(library.path, INSTALLED, "VLATTN_CPU_LIBRARY", lambda stored: f"built with {stored['compiler']}")
    if not library.exists:
        return text
    try:
        chosen = " (VLATTN_CPU_ISA)" if os.environ.get("VLATTN_CPU_ISA") else ""
        return f"{text}; of {', '.join(_available())} this processor runs {instruction_set()}{chosen}"
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
    chosen = os.environ.get("VLATTN_CPU_ISA") or available[0]
    if chosen not in available:
        raise ValueError(f"VLATTN_CPU_ISA must be one of {', '.join(available)}, which this processor runs; got {chosen!r}")
    return chosen


def strided_tensor(x: Tensor | None) -> tuple[int, int, int, int]:
    """StridedTensor of csrc/cpu/rows.h and csrc/cuda/attention.h: (B, H, N, *) with a last stride of 1, or none."""
    if x is None:
        return 0, 0, 0, 0
    b, h, n, _ = x.stride()
    return x.data_ptr(), b, h, n


def single(x: float) -> float:
    """As C++ narrows it: `struct` refuses what is finite in float64 alone."""
    return ctypes.c_float(x).value


_CODES = {"integer": "q", "size": "q", "int32": "i", "size32": "i", "flag": "?", "number": "d", "single": "f", "pointer": "P"}
_TENSOR = [("data", "P"), ("stride_b", "q"), ("stride_h", "q"), ("stride_n", "q")]
# The expression for the numbers of a value; elsewhere the value is the number.
_NUMBERS = {"single": "_single({})", "pointer": "0 if {0} is None else {0}.data_ptr()", "tensor": "*_strided({})"}


class Fields:
    """The members of a struct of csrc/, by kind and name, in their order: "integer B H, tensor keys[4], masks masks".

    A kind is "tensor", one of _CODES, or the name of another struct. Errors name members of the kinds "size" and "size32".
    `values(B=2, keys=...)` gives all numbers, flat. It takes a sequence for an array, and for a struct what that one's `values`
    gave. A member that is not named is 0 or null, as in C++.
    """

    def __init__(self, text: str, **structs: Fields) -> None:
        self.numbers: list[tuple[str, str]] = []  # name and code of `struct`
        self.sizes: list[str] = []
        self._parameters: list[str] = []
        self._expressions: list[str] = []
        for kind, names in (part.split(maxsplit=1) for part in text.split(",")):
            if kind in structs:
                numbers, expression, none = structs[kind].numbers, "*{}", repr(structs[kind].values())
            else:
                numbers = _TENSOR if kind == "tensor" else [("", _CODES[kind])]
                expression, none = _NUMBERS.get(kind, "{}"), "None" if kind in ("tensor", "pointer") else "0"
            self.sizes += names.split() if kind.startswith("size") else []
            for name, count in re.findall(r"(\w+)(?:\[(\d)\])?", names):
                self._parameters.append(f"{name}=({none},) * {count}" if count else f"{name}={none}")
                for element in [f"{name}[{n}]" for n in range(int(count))] if count else [name]:
                    self._expressions.append(expression.format(element))
                    self.numbers += [(f"{element}.{path}".rstrip("."), code) for path, code in numbers]
        codes = "".join(code for _, code in self.numbers)
        self.layout = struct.Struct(f"@{codes}0q")  # 0q: up to the alignment, as sizeof counts
        self.values: Callable[..., tuple[Any, ...]] = self.function("{}")

    def function(self, result: str, *before: str, **names: Any) -> Callable[..., Any]:
        """The expression `result` of the numbers {} as a function of arguments `before` and of the members by name."""
        # as a named tuple does it: a loop over the members takes several microseconds
        source = f"lambda {', '.join((*before, '*', *self._parameters))}: {result}".format(f"({', '.join(self._expressions)},)")
        # no member begins with _
        function: Callable[..., Any] = eval(source, {"_strided": strided_tensor, "_single": single, **names})
        return function

    def lines(self) -> list[str]:
        """As csrc/layout.h writes them."""
        lines, codes = [], ""
        for name, code in self.numbers:
            lines.append(f"{name} {code} {struct.calcsize(f'@{codes}0{code}')}")
            codes += code
        return [*lines, f"size {self.layout.size}"]


def kernel(name: str, fields: Fields) -> Callable[..., None]:
    """The CPU kernel `name` as a function of its struct's members by name."""
    pack = fields.layout.pack

    @functools.cache
    def function() -> Any:
        names = [f"vlattn_{each}_{name}" for each in (instruction_set(), *_available())]
        # `amx` and `v4_bf16` have kernels alone that multiply bfloat16
        present = next(filter(library.has, names), names[0])
        return library.operator(present, fields, ctypes.c_int64, ctypes.c_char_p)

    def run(numbers: tuple[Any, ...]) -> None:
        if function()(pack(*numbers)) != 0:
            raise MemoryError(f"{name}: not enough memory for the kernel's workspace")

    return fields.function("_run({})", _run=run)
