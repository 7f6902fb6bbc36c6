"""The report's picture of one file of records: our best backend among its baselines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlattn_fast._ground.extras import extra
from vlattn_fast.benchmarks._formula import OURS

Record = dict[str, Any]
BEST = "vlattn_fast"  # the name of our best backend in the first picture


def draw_baselines(records: Sequence[Record], path: Path, title: str) -> Path:
    """One panel an operator or task, one line a benchmark, one dot a variant: its p50 over that of the bound."""
    with extra("viz"):
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

    by_module: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        module, _, label = record["benchmark"].partition("/")
        kind = "" if len({each["dtype"] for each in records}) == 1 else f" ({record['dtype']})"
        by_module.setdefault(module, {}).setdefault(label.replace("/", ", ") + kind, []).append(record)
    looks = _looks(records)
    columns: list[list[str]] = [[] for _ in range(min(3, len(by_module)) or 1)]
    heights = {module: 0.9 + 0.15 * len(lines) for module, lines in by_module.items()}  # inches
    for module in by_module:
        min(columns, key=lambda column: sum(heights[name] for name in column)).append(module)
    tallest = max(sum(heights[name] for name in column) for column in columns)
    figure = Figure(figsize=(6.5 * len(columns), tallest + 1.2), layout="constrained")
    for column, part in zip(columns, figure.subfigures(1, len(columns), squeeze=False)[0], strict=True):
        rest = max(tallest - sum(heights[name] for name in column), 1e-3)  # below the shorter column's panels
        *cells, below = part.subplots(len(column) + 1, height_ratios=[*(heights[name] for name in column), rest])
        below.set_axis_off()
        for module, cell in zip(column, cells, strict=True):
            _draw_panel(cell, module, by_module[module], looks)
    figure.suptitle(f"{title}: median time over that of the bound (log scale, less is better)", fontsize=11)
    handles = [Line2D([], [], color=color, marker=marker, linestyle="", label=name) for name, (color, marker) in looks.items()]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=3 * len(columns), fontsize=8, frameon=False)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    return path


def _draw_panel(cell: Any, module: str, lines: dict[str, list[Record]], looks: dict[str, tuple[str, str]]) -> None:
    for place, line in enumerate(lines.values()):
        for number, record in enumerate(line):
            color, marker = looks[record["variant"]]
            height = place + 0.3 * (number / max(len(line) - 1, 1) - 0.5)  # so that equal times do not cover each other
            cell.plot(record["ratio_to_bound"], height, color=color, marker=marker, markersize=6, alpha=0.85, linestyle="")
    cell.set_yticks(range(len(lines)), list(lines), fontsize=8)
    cell.set_ylim(len(lines) - 0.4, -0.6)
    cell.set_xscale("log")
    cell.axvline(1.0, color="black", linewidth=0.8)
    low, high = cell.get_xlim()
    cell.set_xlim(min(low, 0.8), max(high, 12.0))  # a tick that names a power of ten in every panel
    cell.xaxis.set_major_formatter("{x:g}")
    cell.tick_params(axis="x", labelsize=8)
    cell.grid(axis="both", alpha=0.25)
    cell.set_title(module, fontsize=10, loc="left")


def _looks(records: Sequence[Record]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each variant; diamonds are ours."""
    variants = sorted({record["variant"] for record in records})
    return {name: (f"C{number % 10}", "D" if name in (BEST, *OURS) else "o") for number, name in enumerate(variants)}
