"""Nsight Compute on one kernel: the command, and stalls, pipes and occupancy from its table."""

from __future__ import annotations

import csv
import re
from typing import Any

SECTIONS = ("SpeedOfLight", "WarpStateStats", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats")
STALL = r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio"
PIPE = r"sm__(?:inst_executed_)?pipe_(\w+)\.avg\.pct_of_peak_sustained_active"
FACTS = {
    "ns": "gpu__time_duration.sum",
    "registers": "launch__registers_per_thread",
    "shared": "launch__shared_mem_per_block_dynamic",
    "waves": "launch__waves_per_multiprocessor",
    "occupancy_pct": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm_pct": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_pct": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_hit_pct": "lts__t_sector_hit_rate.pct",
}


def command(program: str, kernel: str, skip: int, child: list[str]) -> list[str]:
    """The command that profiles the launch of a kernel behind its first `skip` launches, with the clocks as they are."""
    sections = [word for section in SECTIONS for word in ("--section", section)]
    options = ["--clock-control", "none", "--target-processes", "all", "--print-units", "base", "--page", "raw", "--csv"]
    chosen = ["--kernel-name", f"regex:^{kernel}$", "--launch-skip", str(skip), "--launch-count", "1"]
    return [program, *options, *chosen, *sections, *child]


def table(said: str) -> dict[str, Any]:
    """The last kernel of the table: numbers by FACTS, and by name stalls in cycles an instruction and pipes in percent of their
    peak. Empty where there is no table."""
    lines = said.splitlines()
    first = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return {}
    rows = [row for row in csv.reader(line for line in lines[first:] if line.startswith('"')) if len(row) > 1]
    header = rows[0]
    kernel_rows = [row for row in rows[1:] if len(row) == len(header) and row[0].isdigit()]  # the row of units has no ID
    if not kernel_rows:
        return {}
    numbers = {name: x for name, text in zip(header, kernel_rows[-1], strict=True) if (x := _number(text)) is not None}
    facts: dict[str, Any] = {name: numbers[metric] for name, metric in FACTS.items() if metric in numbers}
    for group, pattern in (("stalls", STALL), ("pipes", PIPE)):
        matches = [(match[1], x) for name, x in numbers.items() if (match := re.fullmatch(pattern, name))]
        facts[group] = dict(sorted(matches, key=lambda one: -one[1]))
    return facts


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
