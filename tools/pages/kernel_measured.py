"""Two tables of docs/developers/kernels.md: what an H100 measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tools.compiled.table import programs
from tools.pages.kernel_entries import ENTRIES
from tools.pages.kernel_times import rate_of
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


def measured_kernels() -> str:
    """A line for each pass."""
    stored = _rows()
    lines = []
    for one in PASSES:
        (entry,) = [each for each in ENTRIES if each.what == one.what and each.workload.name.startswith(one.workload)]
        took = _microseconds(one, stored)
        lines.append(f"| {one.what}: {entry.workload.name} | {took:,.0f} | {rate_of(entry, took):.0f} |")
    return "\n".join(["| pass | µs | TFLOP/s |", "| --- | ---: | ---: |", *lines])


def changes_of_tiles() -> str:
    """What a third stage of copies, and products ahead, change of the time."""
    tiles = [row for row in _rows() if row["part"] == "tiles" and "us" in row]
    lines = []
    for what, name, before, after in (("three stages, for two", "num_stages", 2, 3), ("products ahead", "AHEAD", 0, 1)):
        changes = _changes(tiles, name, before, after)
        median = statistics.median(changes)
        lines.append(f"| {what} | {median:+.0%} | {min(changes):+.0%} to {max(changes):+.0%} | {len(changes)} |")
    return "\n".join(["| change of the time | median | range | pairs |", "| --- | ---: | ---: | ---: |", *lines])


def _rows() -> list[dict[str, Any]]:
    return [row for row in json.loads(STORED.read_text(encoding="utf-8")) if row["device"] == DEVICE]


def _changes(tiles: list[dict[str, Any]], name: str, before: int, after: int) -> list[float]:
    """Changes of the time where a number of the configuration is `after` instead of `before`."""
    times = {}
    for row in tiles:
        others = {key: x for key, x in row["config"].items() if key != name}
        launch, _, _ = row["item"].partition(": ")
        times[launch, tuple(sorted(others.items())), row["config"].get(name, 0)] = row["us"], _programs(row)
    changes = []
    for (launch, others, number), (us, held) in times.items():
        us_before, held_before = times.get((launch, others, before), (0.0, 0))
        if number == after and held == held_before:
            changes.append(us / us_before - 1)
    return changes


def _programs(row: dict[str, Any]) -> int:
    """How many programs an SM holds."""
    return programs({"registers": row["regs"], "shared": row["shared"], "warps": row["config"]["num_warps"]}, ARCHITECTURE)


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
    times = [row["us"] for row in stored if "us" in row and row["item"].startswith(f"{launch}: ") and _same(row["config"], now)]
    return float(times[-1])


def _same(config: dict[str, int], now: dict[str, int]) -> bool:
    return all(config.get(name, 0) == now.get(name, 0) for name in {*config, *now})
