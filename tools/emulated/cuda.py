"""The package's CUDA C++ kernels on CPU tensors: their library is loaded with the emulated GPU of ptx.cuda.

Kernels take pointers, so a call's tensors are copied between guards, and the pointers in the call's struct replaced: an access
outside of these tensors ends the launch.

    with tools.emulated.cuda.emulated(80) as launches:
        va.relevancy_attention(query, key, value, carrier, backend="cuda")
    print(launches[0].name, launches[0].executed)
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

import ptx.cuda
from ptx.running.launch import Launch
from ptx.running.memory import Memory
from ptx.running.reports import Options
from tools.building import ROOT, build
from vlattn_fast.backends.cuda import _shared_library
from vlattn_fast.backends.native import Library

TARGETS = {80: "80", 90: "90a", 100: "100"}


@contextmanager
def emulated(
    architecture: int, options: Options | None = None, *, strict: bool = True, keep: bool = True, library: Path | None = None
) -> Iterator[list[Launch]]:
    """Within it backend="cuda" takes CPU tensors. See ptx.cuda.emulated.

    `library`: another file than the one that is built for the architecture, or that VLATTN_CUDA_LIBRARY names.
    """
    before = _shared_library.library, Tensor.data_ptr
    with ptx.cuda.emulated(architecture, options, strict=strict, keep=keep, namespace="vlattn::") as launches:
        try:
            _shared_library.library = _library(architecture, library)
            Tensor.data_ptr = _recorded  # type: ignore[method-assign]
            yield launches
        finally:
            _shared_library.library, Tensor.data_ptr = before  # type: ignore[method-assign]


def _library(architecture: int, library: Path | str | None) -> Library:
    if library := library or os.environ.get("VLATTN_CUDA_LIBRARY"):
        return Emulated.find(Path(library), "CUDA C++", "cpu", _shared_library.INSTALLED, "VLATTN_CUDA_LIBRARY")
    path = ROOT / "build" / f"ptx{TARGETS[architecture]}" / "libvlattn_ptx.so"
    return Built(path, shutil.which("nvcc") is not None, "CUDA C++", "cpu", "")


# Kernels know tensors by their addresses. The last tensor that was asked for an address is found again by it.
_TENSORS: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
_data_ptr = Tensor.data_ptr


def _recorded(x: Tensor) -> int:
    address = _data_ptr(x)
    _TENSORS[address] = x
    return address


class Emulated(Library):
    """A library whose kernels are emulated."""

    def load(self) -> ctypes.CDLL:
        return ptx.cuda.connected(super().load())

    def operator(self, name: str, result: Any, *arguments: Any) -> Callable[[bytes, None], bytes | None]:
        function, (members, _) = super().operator(name, result, *arguments), self.members(name)

        def call(packed: bytes, stream: None) -> bytes | None:
            device, memory = ptx.cuda.Device.active, Memory()
            assert device is not None  # `emulated` has set it with this library
            here, shapes = bytearray(packed), {}
            for path, code, offset in members:
                if code == "P" and (address := struct.unpack_from("P", packed, offset)[0]):
                    shapes[path] = tuple(_TENSORS[address].shape)
                    struct.pack_into("P", here, offset, memory.place(_TENSORS[address], path))
            device.shapes = shapes
            with device.using(memory):
                return function(bytes(here), stream)

        return call


class Built(Emulated):
    """The library of an architecture, brought up to date when it is loaded."""

    def load(self) -> ctypes.CDLL:
        name = self.path.parent.name
        build(name, f"-DVLATTN_PTX={name.removeprefix('ptx')}")
        return super().load()
