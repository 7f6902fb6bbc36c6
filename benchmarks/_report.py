"""benchmarks/REPORT.md and its plots, from the stored rows alone; the same rows give the same files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlattn_fast.benchmarks._run import OURS, declared

from vlattn_fast._extras import extra

Row = dict[str, Any]

COLUMNS = ("variant", "p20", "p50", "p80 (ms)", "peak MiB", "error", "of bound", "of floor", "calls")
INTRODUCTION = """# Measurements

`make report` writes this page from the rows in `benchmarks/results/`, and `make bench` measures them. The newest row of each
variant is shown.

- Variants run in turns in one process. p20, p50 and p80 are percentiles over single calls, and *calls* is their number. On a GPU
  events time a call, behind a backlog that hides the host.
- *cuda*, *triton*, *sdpa* and *streaming* are backends of this package. *reference* is the formula with whole maps in eager mode.
  *published* is the procedure as its authors run it.
- *peak MiB*: what one call adds to memory at its peak: of torch's allocator on a GPU, of the process's resident set on a CPU.
- *error*: the largest error of any output or compared gradient over its largest magnitude, against the formula in float64 on a
  part of the batch.
- *of bound*: p50 over that of the bound. The bound is the variant in italics; it does the least work that the benchmark needs.
- *of floor*: p50 over the least time that an H200's rates allow (`_measure.py`), on an H200 only.
- On a CPU the batch and the heads are smaller (SCAN: the pairs; whole models: depth and width). Each table names its sizes.
"""


def write(results: Path, out: Path) -> list[Path]:
    """The report and one plot for each file of rows; the paths written."""
    stored = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    files = {name: found for name, rows in stored.items() if (found := newest(rows))}
    plots = [_plot(rows, results / f"{name}.png", name) for name, rows in files.items()]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_text(files, {name: os.path.relpath(path, out.parent) for name, path in zip(files, plots, strict=True)}))
    return [out, *plots]


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each device, benchmark, workload, dtype and variant; other sizes than the last are left behind."""
    found: dict[Any, Row] = {}
    sizes = {}
    for row in rows:
        if "benchmark" in row:  # what tests store in the same folder has none
            found[_key(row), row["variant"]] = row
            sizes[_key(row)] = row["sizes"]
    return [row for row in found.values() if row["sizes"] == sizes[_key(row)]]


def _key(row: Row) -> tuple[str, ...]:
    return row["device"], row["benchmark"], row["workload"], row["dtype"]


def _text(files: dict[str, list[Row]], plots: dict[str, str]) -> str:
    everything = [row for rows in files.values() for row in rows]
    parts = [INTRODUCTION]
    for name, path in plots.items():
        parts.append(f"![Median time over that of the bound, {name}]({path})\n")
    names = list(dict.fromkeys([*(x.name for x in declared()), *(row["benchmark"] for row in everything)]))
    for kind, is_kind in (("GPU", _on_gpu), ("CPU", lambda row: not _on_gpu(row))):
        measured = {row["benchmark"] for row in everything if is_kind(row)}
        missing = [name for name in names if name not in measured]
        if len(missing) == len(names):
            parts.append(f"On a {kind}: not measured.\n")
        elif missing:
            parts.append(f"On a {kind} not measured: {', '.join(missing)}.\n")
    origins = list(dict.fromkeys(_origin(row) for row in everything))
    parts.extend(f"{n}. {origin}" for n, origin in enumerate(origins, 1))
    parts.append("")
    for name in names:
        tables: dict[tuple[str, ...], list[Row]] = {}
        for row in everything:
            if row["benchmark"] == name:
                tables.setdefault(_key(row), []).append(row)
        if tables:
            parts.append(f"## {name}\n")
            parts.extend(_table(rows, origins) for rows in tables.values())
    return "\n".join(parts)


def _on_gpu(row: Row) -> bool:
    return not row["device"].startswith("CPU")


def _table(rows: Sequence[Row], origins: Sequence[str]) -> str:
    first = rows[0]
    sizes = ", ".join(f"{name} {size}" for name, size in first["sizes"].items())
    runs = sorted({origins.index(_origin(row)) + 1 for row in rows})
    about = f"{first['workload']}: {sizes}; {first['dtype']}; {first['device']}; run {', '.join(map(str, runs))}."
    lines = [about, "", _line(COLUMNS), _line(["---", *["---:"] * (len(COLUMNS) - 1)])]
    for row in rows:
        lines.append(_line([f"*{row['variant']}*" if row["is_bound"] else row["variant"], *_cells(row)]))
    return "\n".join([*lines, ""])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row) -> list[str]:
    if "not_run" in row:
        return [f"not run: {row['not_run']}".replace("|", "\\|"), *[""] * (len(COLUMNS) - 2)]
    peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20
    times = (f"{row[f'p{n}_us'] / 1e3:.3f}" for n in (20, 50, 80))
    others = ((peak, ".1f"), (row["error"], ".1e"), (row["ratio_to_bound"], ".2f"), (row["ratio_to_floor"], ".2f"))
    return [*times, *("" if x is None else format(x, form) for x, form in others), str(row["rounds"])]


def _origin(row: Row) -> str:
    versions = (f"{name} {version}" for name, version in row["versions"].items() if version)
    facts = (f"`{row['command']}`", f"commit {row['commit']}", *versions, f"CPU threads {row['threads']}", row["time"])
    return f"{row['device']}: {', '.join(facts)}."


def _plot(rows: Sequence[Row], path: Path, name: str) -> Path:
    """One panel an operator or task, one line a benchmark, one dot a variant: its p50 over that of the bound."""
    with extra("viz"):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.lines import Line2D

    drawn = [row for row in rows if row.get("ratio_to_bound") and not row["is_bound"]]
    order = [benchmark.name for benchmark in declared()]
    drawn.sort(key=lambda row: order.index(row["benchmark"]) if row["benchmark"] in order else len(order))
    panels: dict[str, dict[str, list[Row]]] = {}
    dtypes = sorted({row["dtype"] for row in drawn})
    for row in drawn:
        module, _, label = row["benchmark"].partition("/")
        lines = panels.setdefault(module, {})
        kind = "" if len(dtypes) == 1 else f" ({row['dtype']})"
        lines.setdefault(label.replace("/", ", ") + kind, []).append(row)
    variants = sorted({row["variant"] for row in drawn})
    looks = {variant: (f"C{number % 10}", "D" if variant in OURS else "o") for number, variant in enumerate(variants)}

    columns = 2 if len(panels) > 1 else 1
    shelves = [list(panels)[start : start + columns] for start in range(0, len(panels), columns)] or [[]]
    heights = [0.9 + 0.24 * max((len(panels[module]) for module in shelf), default=1) for shelf in shelves]
    figure = pyplot.figure(figsize=(7.5 * columns, sum(heights) + 1.2), layout="constrained")
    axes = figure.subplots(len(shelves), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for shelf, cells in zip(shelves, axes, strict=True):
        for cell in cells[len(shelf) :]:
            cell.set_axis_off()
        for module, cell in zip(shelf, cells, strict=False):
            _draw_panel(cell, module, panels[module], looks)
    where = rows[0]["device"] if rows else name
    figure.suptitle(
        f"{where}, {', '.join(dtypes)}: median time over that of the bound (log scale, less is better); "
        "diamonds are this package",
        fontsize=11,
    )
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="", label=variant) for variant, (color, marker) in looks.items()
    ]
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(len(handles), 4 * columns), fontsize=8, frameon=False
        )
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _draw_panel(cell: Any, module: str, lines: dict[str, list[Row]], looks: dict[str, tuple[str, str]]) -> None:
    for place, found in enumerate(lines.values()):
        for number, row in enumerate(found):
            color, marker = looks[row["variant"]]
            height = place + 0.3 * (number / max(len(found) - 1, 1) - 0.5)  # so that equal times do not cover each other
            cell.plot(row["ratio_to_bound"], height, color=color, marker=marker, markersize=6, alpha=0.85, linestyle="")
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
