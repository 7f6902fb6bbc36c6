"""A part of docs/kernels.md: what an H100 measured, beside the estimates."""

from __future__ import annotations

import json
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

180 times of tiles, warps and stages show what the estimate leaves out:

- *An SM should hold two programs or more.* A program's products and its softmax wait for one another, and another program fills
  the wait. By the estimate eight warps with products ahead were best for CLIP's forward pass, 212 µs. Measured they took 630 µs:
  of 140 registers a thread an SM holds one program. The same tiles without products ahead have 126 registers, and two programs
  take 338 µs. Tiles of 64 rows with four warps, of which four fit, take 284 µs.
- *A third stage of copies* takes 8 to 21 % less time than two, where the SM holds as many programs.
- *Products ahead* take 5 to 23 % more time with 64 features. With 128 features they take 7 % less in tiles of 32 keys, and 21 %
  more in tiles of 64.
- With 16,384 tokens the forward pass of 128 rows with products ahead and two stages took 5,962 µs. cuDNN took 3,405,
  FlexAttention 5,364, and FlashAttention-2 6,466. We are behind there. It has a third stage since, which was not measured with so
  many tokens.
"""


def measured_section(entries: list[Entry], rows: Rows) -> str:
    stored = [row for row in json.loads(STORED.read_text()) if row["device"] == DEVICE]
    lines = ["| pass | estimate, µs | measured, µs | of the estimate | TFLOP/s |", f"| --- |{' ---: |' * 4}"]
    for one in PASSES:
        (entry,) = [each for each in entries if each.what == one.what and each.workload.name.startswith(one.workload)]
        estimate, took = times_of(entry, rows).estimate, _microseconds(one, stored)
        cells = f"{estimate:,.0f} | {took:,.0f} | {took / estimate:.2f} | {rate_of(entry, took):.0f}"
        lines.append(f"| {one.what}: {entry.workload.name} | {cells} |")
    return TEXT.format(table="\n".join(lines))


def _microseconds(one: Measured, stored: list[dict[str, Any]]) -> float:
    if one.profiled:
        (row,) = [row for row in stored if row["part"] == "ncu" and row["item"] == one.profiled]
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
