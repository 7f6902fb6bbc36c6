"""A part of docs/kernels.md: what an H100 measured, beside the estimates."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tools.pages.kernel_times import Entry, Rows, rate_of, times_of
from vlattn_fast.kernels import _configurations

STORED = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu.json"
DEVICE, ARCHITECTURE = "NVIDIA H100 80GB HBM3", "sm_90"


class Measured(NamedTuple):
    """A pass, and its rows: of the part `tiles` those of each launch, or of the part `ncu` that of a profiled call."""

    what: str
    workload: str
    tiles: tuple[str, ...] = ()
    profiled: str = ""  # the call, whose backward kernels count


DOT = "score_attention {} dot torch.bfloat16 1024 1024 {} False"
PASSES = (
    Measured("score_attention, dot, forward", "CLIP", (DOT.format("forward", 64),)),
    Measured("score_attention, dot, backward", "CLIP", (DOT.format("backward_q", 64), DOT.format("backward_kv", 64))),
    Measured("score_attention, dot, forward", "LLaVA", (DOT.format("forward", 128),)),
    Measured("score_attention, dot, backward", "LLaVA", profiled="score_attention/scaled dot, forward+backward/llava triton"),
    Measured("relevancy_attention, backward", "LLaVA", profiled="relevancy_attention/gradient, forward+backward/llava triton"),
)

TEXT = """## Measured on an H100

One H100 (80 GB, HBM3), torch 2.11, Triton 3.6, bfloat16. `benchmarks/results/gpu.json` has the rows.
[REPORT.md](../benchmarks/REPORT.md) has calls beside SDPA, FlexAttention, the compiled formula and the published procedures.
These are the kernels as they are now. The estimate is the one below, of an H200.

{table}

{times} times of tiles, warps and stages show what the estimate leaves out:

- *An SM should hold two programs or more.* A program's products and its softmax wait for one another, and another program fills
  the wait. By the estimate eight warps with products ahead were best for CLIP's forward pass, 212 µs. Measured they took 630 µs:
  with 140 registers a thread an SM holds one program. The same tiles without products ahead have 126 registers, and two programs
  take 338 µs. Tiles of 64 rows with four warps, of which four fit, take 284 µs.
- *A third stage of copies* changes the time of two stages by {stages}.
- *Products ahead* change the time by {ahead}.
  They are best for LLaVA's forward pass in tiles of 64 rows and 32 keys: 7 % less.
- With 16,384 tokens the forward pass of 128 rows with products ahead and two stages took 5,962 µs. cuDNN took 3,405,
  FlexAttention 5,364, and FlashAttention-2 6,466. Causal calls of so many tokens take cuDNN's pass there
  [since](#torchs-attention-for-plain-dot-products). Ours has three stages and no products ahead now. These tiles take 15 % less
  with 704 tokens, and were not measured with so many.

Pairs of tiles count whose programs an SM holds as many of, by their registers and shared memory.
"""


def measured_section(entries: list[Entry], rows: Rows) -> str:
    stored = [row for row in json.loads(STORED.read_text()) if row["device"] == DEVICE]
    lines = ["| pass | estimate, µs | measured, µs | of the estimate | TFLOP/s |", f"| --- |{' ---: |' * 4}"]
    for one in PASSES:
        (entry,) = [each for each in entries if each.what == one.what and each.workload.name.startswith(one.workload)]
        estimate, took = times_of(entry, rows).estimate, _microseconds(one, stored)
        cells = f"{estimate:,.0f} | {took:,.0f} | {took / estimate:.2f} | {rate_of(entry, took):.0f}"
        lines.append(f"| {one.what}: {entry.workload.name} | {cells} |")
    tiles = [row for row in stored if row["part"] == "tiles"]
    changes = {name: _changes(tiles, name, before, after) for name, before, after in (("num_stages", 2, 3), ("AHEAD", 0, 1))}
    return TEXT.format(table="\n".join(lines), times=len(tiles), stages=changes["num_stages"], ahead=changes["AHEAD"])


def _changes(tiles: list[dict[str, Any]], name: str, before: int, after: int) -> str:
    """The median change of the time, and its range, where a number of the configuration is `after` instead of `before`."""
    times = {}
    for row in tiles:
        others = {key: x for key, x in row["config"].items() if key != name}
        launch, _, _ = row["item"].partition(": ")
        times[launch, tuple(sorted(others.items())), row["config"].get(name, 0)] = row["us"], _programs(row)
    changes = []
    for (launch, others, number), (us, programs) in times.items():
        us_before, programs_before = times.get((launch, others, before), (0.0, 0))
        if number == after and programs == programs_before:
            changes.append(us / us_before - 1)
    return f"{statistics.median(changes):+.0%} (median of {len(changes)} pairs, {min(changes):+.0%} to {max(changes):+.0%})"


def _programs(row: dict[str, Any]) -> int:
    """How many programs an SM holds: of 65,536 registers in eights a thread, and 227 KB with 1 KB for each program."""
    registers = -(-row["regs"] // 8) * 8 * 32 * row["config"]["num_warps"]
    return int(min(65536 // registers, 227 * 1024 // (row["shared"] + 1024)))


def _microseconds(one: Measured, stored: list[dict[str, Any]]) -> float:
    if one.profiled:
        *_, row = [row for row in stored if row["part"] == "ncu" and row["item"] == one.profiled]
        return float(sum(us for kernel, us in row["kernels"].items() if "backward" in kernel))
    return sum(_of_tiles(launch, stored) for launch in one.tiles)


def _of_tiles(launch: str, stored: list[dict[str, Any]]) -> float:
    """The last time of the tiles that the launch takes now."""
    operator, kernel, score, _, queries, keys, size, masked = launch.split()
    numbers = {"N": int(queries), "M": int(keys), "size": int(size)}
    facts: dict[str, Any] = {"score": score, "dtype": torch.bfloat16, **numbers, "masked": masked == "True"}
    now = _configurations.by_table(operator, kernel, architecture=ARCHITECTURE, **facts)
    times = [
        row["us"]
        for row in stored
        if row["part"] == "tiles" and row["item"].startswith(f"{launch}: ") and _same(row["config"], now)
    ]
    return float(times[-1])


def _same(config: dict[str, int], now: dict[str, int]) -> bool:
    return all(config.get(name, 0) == now.get(name, 0) for name in {*config, *now})
