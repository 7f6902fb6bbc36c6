"""A kernel that the machine has loaded. What reading it makes is kept in build/ptx/programs/ for later processes."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import pickle
import re
import zlib
from contextlib import suppress
from functools import cache, cached_property, lru_cache
from pathlib import Path

import numpy as np

from ptx.reading.encoding import Encoded, encode
from ptx.reading.flow import LANES
from ptx.reading.reader import SHARED_BASE, Parameter
from ptx.reading.translate import round_up
from ptx.running.library import BUILD, library

KEPT = BUILD / "programs"
KEPT_FROM, MOST_KEPT = 20_000, 2000  # characters of a text, as a shorter one is soon read; files
_FILES = sorted(path for suffix in ("py", "txt") for path in Path(__file__).parents[1].glob(f"reading/*.{suffix}"))
_SOURCES = hashlib.sha256(b"\0".join(path.read_bytes() for path in _FILES)).hexdigest()[:16]


class Program:
    """A kernel of a PTX text, loaded."""

    def __init__(self, text: str, name: str = "") -> None:
        self.text = text
        self.kernel = kernel = encoded(text, name)
        self.buffers: list[tuple[int, int, str]] = []  # address, bytes and name of the module's variables
        self._arrays: list[np.ndarray] = []
        self.addresses = {"": 0} | {variable: self._place(variable) for variable in kernel.variables}
        constants = self._constants()
        self.handle = ctypes.c_void_p(
            library().ptx_load(
                kernel.code.encode(), kernel.register_bytes, constants.ctypes.data, len(constants), kernel.specials.encode()
            )
        )
        if error := library().ptx_error(self.handle).decode():
            missing = {word for word in error.split() if not word.startswith("(")}
            names = [line.partition(" ")[0] for line in kernel.code.splitlines()]
            places = [self.at(number) for number, one in enumerate(names) if one in missing]
            raise NotImplementedError(
                f"{self.name}: the machine has no handler for {error}" + "".join(f"\n    {p}" for p in places[:5])
            )

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            library().ptx_free(self.handle)

    @property
    def name(self) -> str:
        return self.kernel.name

    @property
    def parameters(self) -> list[Parameter]:
        return self.kernel.parameters

    @cached_property
    def lines(self) -> list[str]:
        """Those of the PTX text."""
        return self.text.splitlines()

    def _place(self, name: str) -> int:
        variable = self.kernel.variables[name]
        array = np.zeros(variable.size + 2 * variable.alignment, np.uint8)
        address = round_up(array.ctypes.data, variable.alignment)
        start = address - array.ctypes.data
        array[start : start + variable.size] = np.frombuffer(variable.data, np.uint8)
        self._arrays.append(array)
        self.buffers.append((address, variable.size, name))
        return address

    def _constants(self) -> np.ndarray:
        """Each constant for all lanes."""
        constants = np.zeros(max(self.kernel.constant_bytes, 16), np.uint8)
        for (variable, bits, width), offset in self.kernel.constants.items():
            lanes = (self.addresses[variable] + bits).to_bytes(width, "little") * LANES
            constants[offset : offset + len(lanes)] = np.frombuffer(lanes, np.uint8)
        return constants

    def shared_bytes(self, dynamic: int) -> int:
        """Bytes of a block's shared memory from address 0 on."""
        kernel = self.kernel
        return kernel.dynamic_shared + dynamic if dynamic or kernel.extern_shared else SHARED_BASE + kernel.shared

    def at(self, number: int) -> str:
        """The PTX line of an instruction, with its place in the source."""
        line, source = self.kernel.instructions[number]
        return f"PTX line {line}, {source or 'no source line'}: {self._assertion(line) or self.lines[line - 1].strip()}"

    def _assertion(self, line: int) -> str:
        """What a failed assertion says: the text stands in a variable that an instruction before the call names."""
        if "__assertfail" not in self.lines[line - 1]:
            return ""
        before = "\n".join(self.lines[max(0, line - 24) : line])
        names = re.findall(r"\b(assertMessage_\d+)\b", before)
        text = names and re.search(rf"\b{names[-1]}\[\d+\] = {{([^}}]*)}}", self.text)
        return "assertion failed: " + bytes(map(int, text[1].split(","))).decode().rstrip("\0") if text else ""

    def hits(self) -> list[int]:
        """How often each instruction has run."""
        return library().ptx_hits(self.handle)[: len(self.kernel.instructions)]

    @cached_property
    def products(self) -> dict[int, int]:
        """FLOP of a warp that runs a matrix product, by the instruction's number. Four warps share one of wgmma."""
        flop = {}
        for number, (one, code) in enumerate(zip(self.kernel.instructions, self.kernel.code.splitlines(), strict=True)):
            match = re.search(r"(wg)?mma\S*\.m(\d+)n(\d+)k(\d+)", self.lines[one.line - 1])
            if match and code.startswith(("mma.", "wgmma.mma")):  # and no other instruction of that line
                flop[number] = 2 * math.prod(map(int, match.groups()[1:])) // (4 if match[1] else 1)
        return flop

    def flop(self) -> int:
        """FLOP of all matrix products so far; those of tensor memory are left out."""
        hits = self.hits()
        return sum(hits[n] * flop for n, flop in self.products.items())


# ---- what is kept


def encoded(text: str, name: str = "") -> Encoded:
    """The kernel as the machine takes it: kept from an earlier process, or read now."""
    if len(text) < KEPT_FROM:
        return encode(text, name)
    path = KEPT / f"{_SOURCES}-{_digest(text)}-{_digest(name)}.kernel"
    with suppress(FileNotFoundError, zlib.error):  # zlib's sum tells a file that is not whole
        return pickle.loads(zlib.decompress(path.read_bytes()))
    kernel = encode(text, name)
    _keep(path, zlib.compress(pickle.dumps(kernel), 1))
    return kernel


@lru_cache(64)
def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _keep(path: Path, data: bytes) -> None:
    """Writes a file that other processes may look for: it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _forget()
    unfinished = path.with_suffix(f".{os.getpid()}")
    with suppress(FileNotFoundError):  # a process that runs other sources may remove it
        unfinished.write_bytes(data)
        unfinished.replace(path)


@cache
def _forget() -> None:
    """Removes what other sources made, and of the rest all but the newest."""
    with suppress(FileNotFoundError):  # another process may do the same
        paths = sorted(KEPT.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        kept = [path for path in paths if path.name.startswith(_SOURCES)][:MOST_KEPT]
        for path in {*paths}.difference(kept):
            path.unlink()
