"""Memory of a launch: tensors between guards, a range for each argument, and which bytes were never written."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

GUARD = 1 << 16  # bytes around a copy, so that an access outside of one tensor is not within the next one
ALIGNMENT = 512
LARGE = 1 << 28  # a storage of more bytes is used in place

# Uninitialised storages are filled with this: NaN in all floating dtypes. Where 16 bytes hold something else, they were written.
PATTERN = np.array([0xFFF5FFA9, 0xFFF3FFE5, 0xFFFBFFCB, 0xFFF7FF9D], dtype=np.uint32).view(np.uint8)


class Range(NamedTuple):
    begin: int
    end: int
    writable: bool
    name: str
    initialised: int = 0  # address of a byte for each byte from `begin` on, 0 where it was never written; 0: all were


class _Uninitialised(NamedTuple):
    storage: StorageWeakRef
    written: np.ndarray  # a byte for each of the storage's


_uninitialised: dict[int, _Uninitialised] = {}  # by the storage's address


def _bytes_at(address: int, size: int) -> np.ndarray:
    held: Any = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(held, dtype=np.uint8)


def uninitialised(tensor: torch.Tensor) -> torch.Tensor:
    """Fills the tensor's storage, as torch.empty gives it, and reports reads of it in kernels until something writes there."""
    if type(tensor) is not torch.Tensor:  # fake tensors have no memory
        return tensor
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    for key in [key for key, one in _uninitialised.items() if one.storage.expired()]:
        del _uninitialised[key]
    if tensor.device.type == "cpu" and 0 < size <= LARGE:
        _bytes_at(storage.data_ptr(), size)[:] = np.resize(PATTERN, size)
        _uninitialised[storage.data_ptr()] = _Uninitialised(StorageWeakRef(storage), np.zeros(size, dtype=np.uint8))
    return tensor


ALLOCATE = (
    *((torch, name) for name in ("empty", "empty_like", "empty_strided", "empty_permuted")),
    *((torch.Tensor, name) for name in ("new_empty", "new_empty_strided")),
)


@contextmanager
def marked(package: str = "") -> Iterator[None]:
    """Within it `uninitialised` is what the modules of a package allocate; without a name, what any module does."""
    before = [getattr(owner, name) for owner, name in ALLOCATE]
    for (owner, name), allocate in zip(ALLOCATE, before, strict=True):
        setattr(owner, name, _marked(allocate, package))
    try:
        yield
    finally:
        for (owner, name), allocate in zip(ALLOCATE, before, strict=True):
            setattr(owner, name, allocate)


def _marked(allocate: Callable[..., torch.Tensor], package: str) -> Callable[..., torch.Tensor]:
    def allocated(*arguments: Any, **options: Any) -> torch.Tensor:
        made = allocate(*arguments, **options)
        if torch.compiler.is_compiling() or not str(sys._getframe(1).f_globals.get("__name__", "")).startswith(package):
            return made
        return uninitialised(made)

    return allocated


def _written(address: int, size: int) -> np.ndarray | None:
    """Which bytes of a storage were written, by kernels or by torch; None: all."""
    record = _uninitialised.get(address)
    if record is None or record.storage.expired() or len(record.written) != size:
        return None
    changed = (_bytes_at(address, size) != np.resize(PATTERN, size)) & (record.written == 0)
    for start, end, step in ((0, size // 16 * 16, 16), (size // 16 * 16, size, size % 16)):
        if end > start:  # a part of 16 bytes may have the pattern's value by chance
            record.written[start:end].reshape(-1, step)[changed[start:end].reshape(-1, step).any(axis=1)] = 1
    return None if record.written.all() else record.written


class _Copy(NamedTuple):
    buffer: np.ndarray | None  # None: used in place
    start: int
    size: int
    written: np.ndarray | None


class Memory:
    """What one launch sees of the tensors."""

    def __init__(self) -> None:
        self.ranges: list[Range] = []
        self._copies: dict[int, _Copy] = {}  # by the storage's address
        self._nowhere = np.zeros(2 * ALIGNMENT, dtype=np.uint8)

    def place(self, tensor: torch.Tensor, name: str, writable: bool = True) -> int:
        """The address of the tensor's first element for the kernel. Views of one storage share its copy."""
        if not tensor.numel():  # nothing may be touched, and torch gives address 0
            return -(-self._nowhere.ctypes.data // ALIGNMENT) * ALIGNMENT
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{name} must lie on the CPU, where launches are emulated; it lies on {tensor.device}: pass {name}.cpu()"
            )
        storage = tensor.untyped_storage()
        copy = self._copies.get(storage.data_ptr())
        if copy is None:
            copy = self._copies[storage.data_ptr()] = self._copy(storage.data_ptr(), storage.nbytes())
        offset = int(tensor.storage_offset()) * tensor.element_size()
        steps = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        begin, extent = copy.start + offset, (steps + 1) * tensor.element_size()
        initialised = 0 if copy.written is None else copy.written.ctypes.data + offset
        self.ranges.append(Range(begin, begin + extent, writable, name, initialised))
        return begin

    def add(self, address: int, size: int, name: str, writable: bool = False) -> None:
        """A range that is no tensor: constants of a module, scratch."""
        self.ranges.append(Range(address, address + size, writable, name))

    def back(self) -> None:
        """Writes results to the tensors."""
        for address, copy in self._copies.items():
            if copy.buffer is not None:
                ctypes.memmove(address, copy.start, copy.size)

    @staticmethod
    def _copy(address: int, size: int) -> _Copy:
        if size > LARGE:
            return _Copy(None, address, size, None)
        written = _written(address, size)
        buffer = np.empty(size + 2 * GUARD + 2 * ALIGNMENT, dtype=np.uint8)
        start = -(-(buffer.ctypes.data + GUARD) // ALIGNMENT) * ALIGNMENT + address % 16
        ctypes.memmove(start, address, size)
        return _Copy(buffer, start, size, written)
