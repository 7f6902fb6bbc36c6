"""Runs a program: hands a launch to the machine (struct Call of machine/interface.cpp) and reads its results."""

from __future__ import annotations

import ctypes
import struct
import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from ptx.running.library import library
from ptx.running.memory import Memory, Range
from ptx.running.program import Program
from ptx.running.reports import Accesses, EmulationError, Finding, FindingsError, Options, read_findings

TEXT_BYTES = 1 << 19
OPTIONS = ("seed", "races", "noise", "counts", "resident", "in_order", "limit", "sample")


class Call(ctypes.Structure):
    _fields_ = [
        ("parameters", ctypes.c_char_p),
        *((name, ctypes.c_int64) for name in ("parameter_bytes", "grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z")),
        *((f"cluster_{axis}", ctypes.c_int64) for axis in "xyz"),
        *((name, ctypes.c_int64) for name in ("shared", "dynamic_shared", "local", "ranges")),
        *((name, ctypes.c_void_p) for name in ("begins", "ends", "writable", "initialised")),
        ("names", ctypes.c_char_p),
        *((name, ctypes.c_int64) for name in OPTIONS),
        ("text", ctypes.c_char_p),
        ("text_bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("by_kind", "total", "by_instruction")),
    ]


@dataclass
class Launch:
    """A launch that has run, with its counts and findings."""

    name: str
    grid: tuple[int, ...]
    seconds: float = 0.0
    executed: int = 0  # instructions of a warp
    counts: dict[str, int] = field(default_factory=dict)  # by kind
    lanes: dict[str, int] = field(default_factory=dict)
    accesses: Accesses = Accesses()
    by_instruction: dict[int, Accesses] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the arguments that are tensors
    carveout: int = -1  # that part of an SM's fast memory is to be shared memory, in percent; -1: the program does not say
    once: tuple[int, int] = (0, 0)  # sectors and the least, if a block had each of its sectors once
    flop: int = 0  # of matrix products
    program: Program | None = None

    @property
    def shared_wavefronts(self) -> tuple[int, int]:
        return self.accesses.wavefronts, self.accesses.least_wavefronts

    @property
    def global_sectors(self) -> tuple[int, int]:
        return self.accesses.sectors, self.accesses.least_sectors

    def check(self) -> None:
        """Raises where there are findings."""
        if self.findings:
            raise FindingsError(f"{self.name}, grid {self.grid}:\n" + "\n".join(map(str, self.findings)))


@cache
def _kinds() -> list[str]:
    """Names of the kinds of instructions. Refuses a library whose struct Call has other members."""
    members = [f"{name} {getattr(Call, name).offset}" for name, *_ in Call._fields_] + [f"size {ctypes.sizeof(Call)}"]
    there = library().ptx_call_members().decode().splitlines()
    if members != there:
        raise RuntimeError(f"struct Call of ptx/machine/interface.cpp differs from launch.py: {set(members) ^ set(there)}")
    return library().ptx_kinds().decode().split()


def _parameters(program: Program, values: list[Any]) -> bytes:
    data = bytearray(max([p.offset + p.size for p in program.parameters], default=0))
    for parameter, value in zip(program.parameters, values, strict=True):
        size = parameter.size
        if isinstance(value, float):
            value = struct.pack("<f" if size == 4 else "<d", value)
        elif isinstance(value, int):
            value = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        if len(value) != size:
            raise ValueError(f"{program.name}: a parameter has {size} bytes; got {len(value)}")
        data[parameter.offset : parameter.offset + size] = value
    return bytes(data)


def _misuses(program: Program) -> list[Finding]:
    """Registers of products that are touched too early: the text alone shows that."""
    places = program.kernel.instructions
    return [
        Finding(one.kind, ", ".join(one.registers), program.at(one.instruction), 1, *places[one.instruction])
        for one in program.kernel.misuses
    ]


def launch(
    program: Program,
    values: list[Any],
    grid: tuple[int, ...],
    block: tuple[int, ...],
    shared: int,
    memory: Memory,
    options: Options,
    cluster: tuple[int, ...] = (),
) -> Launch:
    """Runs a program. `values`: a number or bytes for each parameter; `shared`: bytes of dynamic shared memory;
    `cluster`: blocks of a cluster, if the program does not say."""
    kinds, parameters = _kinds(), _parameters(program, values)
    ranges = [*memory.ranges, *(Range(address, address + size, True, name) for address, size, name in program.buffers)]
    by_kind, total = np.zeros((len(kinds), 2), dtype=np.uint64), np.zeros(7, dtype=np.uint64)
    by_instruction = np.zeros((len(program.kernel.instructions), 4), dtype=np.uint64)
    columns = [np.array([r[n] for r in ranges], dtype=np.uint64) for n in (0, 1, 2, 4)]
    sizes = {
        f"{what}_{axis}": n
        for what, size in (("grid", grid), ("block", block), ("cluster", cluster or program.kernel.cluster or (1,)))
        for axis, n in zip("xyz", (*size, 1, 1), strict=False)
    }
    numbers = {option: int(getattr(options, option)) for option in OPTIONS}
    arrays = dict(begins=columns[0], ends=columns[1], writable=columns[2], initialised=columns[3],
                  by_kind=by_kind, total=total, by_instruction=by_instruction)  # fmt: skip
    text = ctypes.create_string_buffer(TEXT_BYTES)
    call = Call(
        parameters=parameters,
        parameter_bytes=len(parameters),
        shared=-(-program.shared_bytes(shared) // 16) * 16,
        dynamic_shared=shared,
        local=program.kernel.local,
        ranges=len(ranges),
        names="\n".join(r.name for r in ranges).encode(),
        text=ctypes.cast(text, ctypes.c_char_p),
        text_bytes=TEXT_BYTES,
        **sizes,
        **numbers,
        **{member: array.ctypes.data for member, array in arrays.items()},
    )
    before, start = program.flop() if options.counts else 0, time.perf_counter()
    library().ptx_launch(program.handle, ctypes.byref(call))
    seconds = time.perf_counter() - start
    error, findings = read_findings(text.value.decode(), program.at, program.kernel.instructions)
    if error:
        raise EmulationError("\n".join([f"{program.name}: {error}", *map(str, findings)]))
    return Launch(
        program.name,
        tuple(grid),
        seconds,
        int(total[0]),
        {kind: int(n) for kind, (n, _) in zip(kinds, by_kind, strict=True)},
        {kind: int(n) for kind, (_, n) in zip(kinds, by_kind, strict=True)},
        Accesses(*map(int, total[1:5])),
        {int(n): Accesses(*map(int, by_instruction[n])) for n in np.flatnonzero(by_instruction.any(axis=1))},
        [one for one in (*_misuses(program), *findings) if options.fences or "fence" not in one.kind],
        once=(int(total[5]), int(total[6])),
        flop=program.flop() - before if options.counts else 0,
        program=program,
    )
