"""Counts instructions in the innermost loops of a compiled kernel, and work that its warps do twice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tools.compiled.descriptors import Kernel

MMA = r"(HGMMA|HMMA|UTC\w*MMA)\b"


@dataclass(frozen=True)
class Loop:
    """instructions: the number of all; mma: of matrix instructions."""

    instructions: int
    mma: int


def innermost_loops(sass: str) -> list[Loop]:
    """The innermost loops in nvdisasm's text: stretches from a label to a branch back to the label, without an inner stretch."""
    kernel = Kernel(sass)
    branches = [(kernel.labels.get(one.target or "", end + 1), end) for end, one in enumerate(kernel.instructions)]
    stretches = [(start, end) for start, end in branches if start <= end]
    loops = []
    for start, end in stretches:
        if not any(inner != (start, end) and start <= inner[0] and inner[1] <= end for inner in stretches):
            body = kernel.instructions[start : end + 1]
            loops.append(Loop(len(body), sum(re.match(MMA, one.opcode) is not None for one in body)))
    return loops


def main_loop(loops: Sequence[Loop]) -> Loop | None:
    """The shortest loop among those with most matrix instructions, which is the loop without masks."""
    most = max((loop.mma for loop in loops), default=0)
    return None if most == 0 else min((loop for loop in loops if loop.mma == most), key=lambda loop: loop.instructions)


def waits(sass: str) -> dict[str, int]:
    """wgmma instructions in nvdisasm's text, and the waits for them. A product is several instructions and one wait, unless ptxas
    serialises the kernel: then each instruction has its own."""
    return {
        name: len(re.findall(rf"\s{word}\b", sass)) for name, word in (("products", "HGMMA"), ("waits", r"WARPGROUP\.DEPBAR"))
    }


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


def facts(kernel: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The tile of a compiled Triton kernel and what its warps do twice, from the kernel and its launch options. edge: the size of
    the tile at the edge."""
    constants: dict[str, Any] = getattr(options.get("C"), "_asdict", dict)()
    sizes = (constants.get(name) for name in ("BLOCK_Q", "BLOCK_KV", "BLOCK_EDGE"))
    rows, keys, edge = (None if size is None else size.value for size in sizes)
    return {
        "tile": f"{rows}x{keys}" if rows and keys else None,
        "edge": edge or None,
        "warps": kernel.metadata.num_warps,
        "repeated": repeated(kernel.asm["ttgir"]),
        "cp_async": "cp.async" in kernel.asm["ptx"],
    }
