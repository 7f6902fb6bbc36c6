"""Counts instructions in the innermost loops of a compiled kernel, and work that its warps do twice."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tools.compiled.table import tool
from vlattn_fast.kernels._configurations import UNIT_KINDS

CLASSES = {"mma": r"(HGMMA|HMMA|UTC\w*MMA)\b", "mufu": r"MUFU\b"}


@dataclass(frozen=True)
class Loop:
    """instructions: the number of all; mma: of matrix instructions; mufu: of the special function unit's (exp2, tanh, rcp)."""

    instructions: int
    mma: int
    mufu: int


def innermost_loops(sass: str) -> list[Loop]:
    """The innermost loops in nvdisasm's text: stretches from a label to a branch back to the label, without an inner stretch."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line):
            lines.append(code[1].strip())
    stretches = []
    for end, code in enumerate(lines):
        branch = re.match(r"BRA\b.*?(\.L_x_\d+)", code)
        if branch and labels.get(branch[1], end + 1) <= end:
            stretches.append((labels[branch[1]], end))
    loops = []
    for start, end in stretches:
        if not any(inner != (start, end) and start <= inner[0] and inner[1] <= end for inner in stretches):
            body = lines[start : end + 1]
            counts = {name: sum(re.match(pattern, code) is not None for code in body) for name, pattern in CLASSES.items()}
            loops.append(Loop(len(body), **counts))
    return loops


def of_whole_tiles(loops: Sequence[Loop], tile: tuple[int, ...], edge: int | None) -> list[Loop]:
    """The loops without those of the smaller tile at the edge, which have at most half of a whole tile's special functions, and
    the special functions of its rows."""
    if edge is None or edge in tile:
        return list(loops)
    most = max((loop.mufu for loop in loops), default=0)
    return [loop for loop in loops if 3 * loop.mufu >= 2 * most]


def main_loop(loops: Sequence[Loop], tile: tuple[int, ...] = (), edge: int | None = None) -> Loop | None:
    """The shortest loop over whole tiles among those with most matrix instructions, which is the loop without masks."""
    whole = of_whole_tiles(loops, tile, edge)
    most = max((loop.mma for loop in whole), default=0)
    return None if most == 0 else min((loop for loop in whole if loop.mma == most), key=lambda loop: loop.instructions)


def repeated(ttgir: str) -> int:
    """The number of warps that compute the same part of a product: the rows and columns that the layout of warps spans, over the
    tile's rows and columns. 1 is right. Tensor memory (sm_100) has no such layout."""
    layout = r"^(#\w+) = #ttg\.nvidia_mma<\{.*?warpsPerCTA = \[(\d+), (\d+)\].*?instrShape = \[([\d, ]+)\]"
    spans = {}
    for name, down, across, shape in re.findall(layout, ttgir, re.M):
        sizes = [int(size) for size in shape.split(",")]
        spans[name] = (int(down) * sizes[0], int(across) * sizes[1])  # a warp's share of wgmma is [16, n, k], of mma.sync [16, 8]
    most = 1
    for rows, columns, name in re.findall(r"dot\b.*-> tensor<(\d+)x(\d+)x\w+, (#\w+)>", ttgir):
        if name in spans:
            down, across = spans[name]
            most = max(most, max(1, down // int(rows)) * max(1, across // int(columns)))
    return most


@functools.cache  # nvdisasm takes a quarter of a second, and a call launches some kernels several times
def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout


def facts(kernel: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The tile and the innermost loops of a compiled Triton kernel, from the kernel and its launch options.

    edge: the size of the tile at the edge. loops: (instructions, matrix instructions, special functions) of each loop. per_pair:
    instructions of all threads in the main loop for each pair of a query and a key, where a turn of the loop is a tile.
    """
    loops, warps = innermost_loops(disassembled(kernel.asm["cubin"])), kernel.metadata.num_warps
    rows, keys, edge = (options.get(name) for name in ("BLOCK_Q", "BLOCK_KV", "BLOCK_EDGE"))
    # scores that are sums over units have loops within the tile, and no product of queries and keys
    score = getattr(options.get("C"), "SCORE", None)
    loop = None if score in UNIT_KINDS or not (rows and keys) else main_loop(loops, (rows, keys), edge)
    return {
        "tile": f"{rows}x{keys}" if rows and keys else None,
        "edge": edge,
        "warps": warps,
        "repeated": repeated(kernel.asm["ttgir"]),
        "cp_async": "cp.async" in kernel.asm["ptx"],
        "loops": [[one.instructions, one.mma, one.mufu] for one in loops if one.instructions > 1],
        "per_pair": loop and round(loop.instructions * 32 * warps / (rows * keys), 1),
    }
