"""Reads, writes and compares tables of compiled kernels, stored by the compiler's version."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# KB of shared memory that a block may have; sm_86 and sm_89, which have the least, run what is compiled for sm_80
SHARED_LIMITS = {"sm_90": 227, "sm_100": 227}
LEAST_SHARED = 99
REGISTERS, WARPS = 65536, 64  # of an SM
SHARED = {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # KB of an SM; each program takes one more than it asks for

Row = dict[str, Any]  # registers, spills, ... of one kernel on one target
Table = dict[str, dict[str, Row]]


def read(file: Path) -> Table:
    return json.loads(file.read_text()) if file.exists() else {}


def write(file: Path, table: Table) -> None:
    """A line for each row."""
    versions = ",\n".join(
        f"{json.dumps(version)}: {{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows)) + "\n}"
        for version, rows in sorted(table.items())
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{{\n{versions}\n}}\n")


def differences(compiled: dict[str, Row], stored: dict[str, Row]) -> list[str]:
    """A line for each row that differs from the stored row, or that needs too much shared memory."""
    lines = [
        f"{key}: {row['shared']} bytes of shared memory, more than {limit}"
        for key, row in compiled.items()
        if row["shared"] > (limit := 1024 * SHARED_LIMITS.get(key.split()[-1], LEAST_SHARED))
    ]
    for key in sorted(compiled.keys() | stored.keys()):
        if key not in stored or key not in compiled:
            lines.append(f"{key}: {'not in the table' if key in compiled else 'in the table, but not compiled'}")
        elif compiled[key] != stored[key]:
            changed = [
                f"{name} {old} -> {compiled[key][name]}" for name, old in stored[key].items() if compiled[key][name] != old
            ]
            lines.append(f"{key}: {', '.join(changed)}")
    return lines


def programs(row: Row, architecture: str) -> int:
    """How many programs an SM holds, by their registers, which come in eights a thread, their shared memory and their warps."""
    registers = -(-row["registers"] // 8) * 8 * 32 * row["warps"]
    return int(min(REGISTERS // registers, SHARED[architecture] * 1024 // (row["shared"] + 1024), WARPS // row["warps"]))


def usage(kernel: Any) -> Row:
    """Registers of a thread, bytes that it spills, and shared memory of a kernel that Triton compiled."""
    with file_of(kernel.asm["cubin"]) as file:
        said = cuobjdump("--dump-resource-usage", file)
    registers, stack = (int(re.findall(rf"{word}:(\d+)", said)[0]) for word in ("REG", "STACK"))
    return {"registers": registers, "spills": stack, "shared": kernel.metadata.shared}


@contextmanager
def file_of(cubin: bytes) -> Iterator[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        yield file.name


def tool(name: str) -> Path:
    """A program from Triton's package, since some CUDA toolkits lack the program."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None, f"{name} comes with Triton, which is not installed"
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name


def cuobjdump(*arguments: str | Path) -> str:
    """The output of cuobjdump."""
    return subprocess.run([tool("cuobjdump"), *arguments], capture_output=True, text=True, check=True).stdout


def nvdisasm(file: str | Path) -> str:
    """The machine code of a file, as text."""
    return subprocess.run([tool("nvdisasm"), "-c", file], capture_output=True, text=True, check=True).stdout
