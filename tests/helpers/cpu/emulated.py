"""A plugin of pytest: the CPU kernels of a library for aarch64 compute, in a program that qemu emulates (tests/cpu/runner.cpp).

VLATTN_CPU_LIBRARY names the library, and `runner` lies beside it. A call goes there as struct and memory: the library's own
description of the struct says where pointers lie, and torch which storage each of them points into.
"""

import ctypes
import functools
import os
import struct
import subprocess
from typing import Any

import pytest
import torch

from vlattn_fast.backends import native

QEMU = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
TEXT = 2**14  # characters of a description
LARGEST = 2**30  # bytes that a call may copy
_address_of = torch.Tensor.data_ptr
_storages: dict[int, tuple[int, int]] = {}  # address of a tensor -> address and bytes of its storage


def _data_ptr(tensor: torch.Tensor) -> int:
    """The tensor's, whose storage is remembered: all pointers of a call are asked for shortly before it."""
    address, storage = _address_of(tensor), tensor.untyped_storage()
    _storages[address] = storage.data_ptr(), storage.nbytes()
    return address


class Emulated(native.Library):
    """A library whose functions run in the emulated program."""

    @functools.cache  # noqa: B019  there is one
    def _runner(self) -> subprocess.Popen[bytes]:
        command = [*QEMU, self.path.with_name("runner"), self.path]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def has(self, name: str) -> bool:
        return self._described(f"{name}_fields") != ""

    def function(self, name: str, result: Any, *arguments: Any) -> Any:
        if name.endswith(("_fields", "_kinds")):
            return functools.partial(self._describe, name)
        members = [line.split() for line in self._described(f"{name}_fields").splitlines()[:-1]]
        return functools.partial(self._call, name, [int(offset) for _, code, offset in members if code == "P"])

    def _describe(self, name: str, text: Any, size: int) -> None:
        text.value = self._described(name).encode()

    def _described(self, name: str) -> str:
        return self._ask(struct.pack("5q", 1, len(name), 0, 0, 0) + name.encode(), TEXT)[0].split(b"\0")[0].decode()

    def _call(self, name: str, places: list[int], call: bytes) -> int:
        addresses = {at: address for at in places if (address := struct.unpack_from("P", call, at)[0])}
        memories = dict(_storages[address] for address in addresses.values())
        if sum(memories.values()) > LARGEST:
            pytest.skip(f"{sum(memories.values()) >> 30} GiB would be copied into the emulated program")
        starts = list(memories)
        parts = [struct.pack("5q", torch.get_num_threads(), len(name), len(call), len(addresses), len(memories))]
        for at, address in addresses.items():
            start, _ = _storages[address]
            parts.append(struct.pack("3q", at, starts.index(start), address - start))
        parts += [struct.pack("2q", *memory) for memory in memories.items()]
        before = [ctypes.string_at(*memory) for memory in memories.items()]
        result, *after = self._ask(b"".join([*parts, name.encode(), call, *before]), 8, *memories.values())
        for start, old, new in zip(memories, before, after, strict=True):
            if old != new:  # what a call only reads may lie where nothing can be written
                ctypes.memmove(start, new, len(new))
        return struct.unpack("q", result)[0]

    def _ask(self, request: bytes, *sizes: int) -> list[bytes]:
        """The parts of the answer, which have these sizes."""
        runner = self._runner()
        assert runner.stdin and runner.stdout
        runner.stdin.write(request)
        runner.stdin.flush()
        answer = [runner.stdout.read(size) for size in sizes]
        if [*map(len, answer)] != [*sizes]:
            raise RuntimeError(f"the emulated program ended: {runner.wait()}")
        return answer


def pytest_configure() -> None:
    native.library = Emulated(*native.library)
    native._available = lambda: [os.environ["VLATTN_CPU_ISA"]]
    torch.Tensor.data_ptr = _data_ptr


def pytest_unconfigure() -> None:
    native.library._runner().communicate()  # it ends where its input does
