"""Hands a launch to the machine (struct Call of machine/interface.cpp) and reads its results."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import numpy as np

from ptx.memory import Range
from ptx.reports import Accesses, EmulationError, Launch, Options, read_findings

TEXT_BYTES = 1 << 19


class Call(ctypes.Structure):
    _fields_ = [
        ("parameters", ctypes.c_char_p),
        *((name, ctypes.c_int64) for name in ("parameter_bytes", "grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z")),
        *((name, ctypes.c_int64) for name in ("shared", "dynamic_shared", "local", "ranges")),
        *((name, ctypes.c_void_p) for name in ("begins", "ends", "writable", "initialised")),
        ("names", ctypes.c_char_p),
        *((name, ctypes.c_int64) for name in ("seed", "races", "noise", "counts", "resident", "in_order", "limit", "sample")),
        ("text", ctypes.c_char_p),
        ("text_bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("by_kind", "total", "by_instruction")),
    ]


def declare(library: ctypes.CDLL) -> None:
    """Types of the machine's functions; refuses a library whose struct Call has other members."""
    for name, result in (
        ("load", ctypes.c_void_p),
        ("error", ctypes.c_char_p),
        ("handlers", ctypes.c_char_p),
        ("kinds", ctypes.c_char_p),
    ):
        getattr(library, f"ptx_{name}").restype = result
    library.ptx_load.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p]
    library.ptx_error.argtypes = library.ptx_free.argtypes = library.ptx_hits.argtypes = [ctypes.c_void_p]
    library.ptx_free.restype = None
    library.ptx_hits.restype = ctypes.POINTER(ctypes.c_uint64)
    library.ptx_launch.argtypes = [ctypes.c_void_p, ctypes.POINTER(Call)]
    library.ptx_call_members.restype = ctypes.c_char_p
    members = [f"{name} {getattr(Call, name).offset}" for name, _ in Call._fields_] + [f"size {ctypes.sizeof(Call)}"]
    there = library.ptx_call_members().decode().splitlines()
    if members != there:
        raise RuntimeError(f"struct Call of machine/interface.cpp differs from ptx/launch.py: {set(members) ^ set(there)}")


def run(
    library: ctypes.CDLL,
    program: int,
    instructions: int,
    name: str,
    place: Callable[[int], str],
    parameters: bytes,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    shared: int,
    dynamic_shared: int,
    local: int,
    ranges: list[Range],
    options: Options,
) -> Launch:
    """`shared`: the end of shared memory (it begins at 1024), dynamic memory included; `place(n)`: where instruction n stands."""
    kinds = library.ptx_kinds().decode().split()
    by_kind, total = np.zeros((len(kinds), 2), dtype=np.uint64), np.zeros(5, dtype=np.uint64)
    by_instruction = np.zeros((instructions, 4), dtype=np.uint64)
    columns = [np.array([r[n] for r in ranges], dtype=np.uint64) for n in (0, 1, 2, 4)]
    sizes = {
        f"{what}_{axis}": n
        for what, size in (("grid", grid), ("block", block))
        for axis, n in zip("xyz", (*size, 1, 1), strict=False)
    }
    numbers = {
        option: int(getattr(options, option))
        for option in ("seed", "races", "noise", "counts", "resident", "in_order", "limit", "sample")
    }
    text = ctypes.create_string_buffer(TEXT_BYTES)
    call = Call(
        parameters=parameters, parameter_bytes=len(parameters),
        shared=-(-shared // 16) * 16, dynamic_shared=dynamic_shared, local=local, ranges=len(ranges), begins=columns[0].ctypes.data, ends=columns[1].ctypes.data, writable=columns[2].ctypes.data,
        initialised=columns[3].ctypes.data, names="\n".join(r.name for r in ranges).encode(), **sizes, **numbers,
        text=ctypes.cast(text, ctypes.c_char_p), text_bytes=TEXT_BYTES, by_kind=by_kind.ctypes.data, total=total.ctypes.data,
        by_instruction=by_instruction.ctypes.data,
    )  # fmt: skip
    start = time.perf_counter()
    library.ptx_launch(program, ctypes.byref(call))
    seconds = time.perf_counter() - start
    error, findings = read_findings(text.value.decode(), place)
    if error:
        raise EmulationError("\n".join([f"{name}: {error}", *map(str, findings)]))
    return Launch(
        name, tuple(grid), seconds, int(total[0]),
        {kind: int(n) for kind, (n, _) in zip(kinds, by_kind, strict=True)},
        {kind: int(n) for kind, (_, n) in zip(kinds, by_kind, strict=True)},
        Accesses(*map(int, total[1:])),
        {n: Accesses(*map(int, by_instruction[n])) for n in np.flatnonzero(by_instruction.any(axis=1))},
        findings,
    )  # fmt: skip
