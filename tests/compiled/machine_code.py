"""What the loops of a compiled kernel hold, and whether its warps do the same work twice.

Instructions are counted in innermost loops.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.compiled.table import tool
from vlattn_fast.kernels._configurations import UNIT_KINDS

CLASSES = {"mma": r"(HGMMA|HMMA|UTC\w*MMA)\b", "mufu": r"MUFU\b"}


@dataclass(frozen=True)
class Loop:
    """instructions: all of them; mma, mufu: matrix instructions, and those of the special function unit (exp2, tanh, rcp)."""

    instructions: int
    mma: int
    mufu: int


def innermost_loops(sass: str) -> list[Loop]:
    """Of nvdisasm's text: from a label to the branch back to it, where no other such stretch lies within."""
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
    found = []
    for start, end in stretches:
        if not any(other != (start, end) and start <= other[0] and other[1] <= end for other in stretches):
            body = lines[start : end + 1]
            counts = {name: sum(re.match(pattern, code) is not None for code in body) for name, pattern in CLASSES.items()}
            found.append(Loop(len(body), **counts))
    return found


def of_whole_tiles(loops: Sequence[Loop], tile: tuple[int, ...], edge: int | None) -> list[Loop]:
    """Without the loops of a smaller tile at the edge: those have at most half of a whole tile's special functions, and those of
    its rows."""
    if edge is None or edge in tile:
        return list(loops)
    most = max((loop.mufu for loop in loops), default=0)
    return [loop for loop in loops if 3 * loop.mufu >= 2 * most]


def main_loop(loops: Sequence[Loop], tile: tuple[int, ...] = (), edge: int | None = None) -> Loop | None:
    """Of whole tiles, of those with the most matrix instructions the shortest, which is that without masks."""
    whole = of_whole_tiles(loops, tile, edge)
    most = max((loop.mma for loop in whole), default=0)
    return None if most == 0 else min((loop for loop in whole if loop.mma == most), key=lambda loop: loop.instructions)


def repeated(ttgir: str) -> int:
    """How many warps compute the same part of a product: the rows and columns that the layout of its warps spans, over those of
    the tile. 1 is right. Tensor memory (sm_100) has no such layout."""
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


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout


def facts(kernel: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Of a compiled Triton kernel and what it was launched with: its tile, and what the innermost loops hold.

    edge: the size of the tile at the edge. loops: (instructions, those of matrices, those of the special function unit) of each.
    per_pair: instructions of all threads in the main loop for each pair of a query and a key, where a turn of the loop is a tile.
    """
    loops, warps = innermost_loops(disassembled(kernel.asm["cubin"])), kernel.metadata.num_warps
    rows, keys, edge = (options.get(name) for name in ("BLOCK_Q", "BLOCK_KV", "BLOCK_EDGE"))
    # scores that are sums over units have no product of queries and keys, and loops within the tile
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
